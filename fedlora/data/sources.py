"""Rows from files, Hugging Face data sets and the embedded skills; bad rows are reported by file and line."""

from __future__ import annotations

import csv
import glob
import io
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, cast

from fedlora import tiny
from fedlora.config import DataConfig
from fedlora.data.columns import Columns, Record, Unusable
from fedlora.data.report import Report
from fedlora.data.rows import Row
from fedlora.errors import ConfigError, DataError

if TYPE_CHECKING:
    import datasets

SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")
_SPLITS = ("train", "training", "validation", "valid", "val", "dev", "test", "eval")
_SHOWN = 3  # reasons named when a file holds nothing usable


@dataclass(frozen=True)
class Loaded:
    """Rows in file order, and what was dropped on the way."""

    rows: tuple[Row, ...]
    report: Report


@dataclass(frozen=True)
class _Bad:
    """A record that could not be read."""

    reason: str


def load_rows(config: DataConfig, *, seed: int) -> Loaded:
    """All rows of `config.name`.

    `skills`: `rows_per_client` generated training rows of each skill, drawn by `seed`, group = skill. A file, a folder
    of files or a glob: see `data_files` for which files; `.jsonl`, `.ndjson`, `.json` (a list, or lines), `.csv`,
    `.tsv`, `.parquet`. A folder written by `Dataset.save_to_disk`. Anything else is a Hugging Face data set, `id` or
    `id:configuration`, of which `config.split` is taken. With partition kind `files` a row's owner is its file.

    Raises: DataError for what is not there, a wrong column (with the columns there are and the nearest name), and a
    file in which nothing is usable (with partition kind `files` that is an empty client, and is reported);
    ConfigError for a role or skill that does not exist.
    """
    if config.name == "skills":
        rows = [row for skill in skills(config) for row in skill_rows(skill, "train", config.rows_per_client, seed)]
        return Loaded(tuple(rows), Report(kept=len(rows)))
    path = Path(config.name).expanduser()
    if not _is_local(config.name):
        return _load_hub(config)
    if (path / "dataset_info.json").is_file() or (path / "dataset_dict.json").is_file():
        return _load_saved(path, config)
    rows, report = [], Report()
    for file in data_files(config):
        loaded = _load_file(file, config)
        rows.extend(loaded.rows)
        report += loaded.report
    if not rows:
        raise DataError(f"{config.name}: nothing is usable; {report.summary()}")
    return Loaded(tuple(rows), report)


def data_files(config: DataConfig) -> list[Path]:
    """The files that `config.name` means, sorted.

    A file is itself; a glob is what it matches. Of a folder: with partition kind `files`, every data file in it, one
    per client; otherwise those of the split, by name (`train.jsonl`, `train-00000-of-00002.parquet`, `train/a.csv`),
    or, for split `train` where no name tells a split, all of them.

    Raises: DataError if there is no such file, or none of this split.
    """
    path = Path(config.name).expanduser()
    if path.is_file():
        if path.suffix.lower() not in SUFFIXES:
            raise DataError(f"{path}: cannot read files ending in {path.suffix!r}; known are {' '.join(SUFFIXES)}")
        return [path]
    if not path.is_dir():
        found = sorted(Path(name) for name in glob.glob(str(path), recursive=True))
        files = [file for file in found if file.is_file() and file.suffix.lower() in SUFFIXES]
        if not files:
            raise DataError(f"{config.name}: no such file or folder, and no data file matches")
        return files
    seen = (file for file in path.rglob("*") if file.is_file() and file.suffix.lower() in SUFFIXES)
    files = sorted(file for file in seen if not any(part[0] == "." for part in file.relative_to(path).parts))
    if not files:
        raise DataError(f"{path}: the folder holds no data file; known are {' '.join(SUFFIXES)}")
    if config.partition.kind == "files":
        return files
    chosen = [file for file in files if _is_split(file, path, config.split)]
    named = [split for split in _SPLITS if any(_is_split(file, path, split) for file in files)]
    if not chosen and (named or config.split != "train"):
        raise DataError(
            f"{path}: no file of split {config.split!r}; splits by name: {', '.join(named) or 'none'}; "
            f"files: {', '.join(str(file.relative_to(path)) for file in files[:8])}"
        )
    return chosen or files


def skills(config: DataConfig) -> tuple[str, ...]:
    """The skills that `config` names, or all private ones. Raises: ConfigError for one that does not exist."""
    for name in config.skills:
        if name not in tiny.SKILLS:
            raise ConfigError(f"data.skills: no skill is called {name!r}; there are {', '.join(tiny.SKILLS)}")
    return config.skills or tuple(name for name, skill in tiny.SKILLS.items() if not skill.public)


def skill_rows(skill: str, split: tiny.Split, count: int, seed: int) -> list[Row]:
    """`count` different rows of an embedded skill; label and owner are unset, the group is the skill."""
    return [
        Row.single(r["instruction"], r["input"], r["output"], group=skill, source=f"skill:{skill}/{split}/{seed}:{i}")
        for i, r in enumerate(tiny.rows(skill, split, count, seed), 1)
    ]


def _is_local(name: str) -> bool:
    """Whether a name means files: they exist, or it could be no data set id."""
    path = Path(name).expanduser()
    return path.exists() or path.suffix.lower() in SUFFIXES or name[:1] in "./~\\" or bool(re.search(r"[*?\[]", name))


def _is_split(file: Path, folder: Path, split: str) -> bool:
    parts = file.relative_to(folder).parts
    return split in parts[:-1] or re.fullmatch(re.escape(split) + r"([-_.].*)?", file.stem) is not None


def _load_file(file: Path, config: DataConfig) -> Loaded:
    read = {".csv": _read_csv, ".tsv": _read_csv, ".parquet": _read_parquet}.get(file.suffix.lower(), _read_json)
    try:
        records = list(read(file))
    except OSError as error:
        raise DataError(f"{file}: cannot be read: {error.strerror or error}") from error
    return _rows(records, config, str(file), owner=str(file) if config.partition.kind == "files" else None)


def _rows(records: list[tuple[str, Record | _Bad]], config: DataConfig, where: str, owner: str | None = None) -> Loaded:
    """Rows of (source, record) pairs. A file for one client (`owner`) may come out empty."""
    good = [record for _, record in records if not isinstance(record, _Bad)]
    columns = Columns.of([name for record in good for name in record], config, where) if good else Columns()
    rows: list[Row] = []
    dropped: list[tuple[str, str]] = []
    for source, record in records:
        if isinstance(record, _Bad):
            dropped.append((source, record.reason))
            continue
        try:
            row = columns.row(record, source)
        except Unusable as error:
            dropped.append((source, str(error)))
        else:
            rows.append(row if owner is None else replace(row, owner=owner))
    if not rows and owner is None:
        reasons = "; ".join(f"{source}: {reason}" for source, reason in dropped[:_SHOWN]) or "it is empty"
        raise DataError(f"{where}: none of {len(records)} rows is usable: {reasons}")
    return Loaded(tuple(rows), Report(kept=len(rows), dropped=tuple(dropped)))


def _read_json(file: Path) -> Iterator[tuple[str, Record | _Bad]]:
    """One object a line, or (`.json`) one list of objects."""
    data = file.read_bytes().removeprefix(b"\xef\xbb\xbf")
    if file.suffix.lower() == ".json" and data.lstrip()[:1] == b"[":
        try:
            items = json.loads(data.decode())
        except ValueError as error:  # JSONDecodeError and UnicodeDecodeError
            raise DataError(f"{file}: not a JSON list: {error}") from error
        for number, item in enumerate(items, 1):
            yield f"{file}:row {number}", item if isinstance(item, dict) else _Bad(f"no object: {type(item).__name__}")
        return
    lines = data.split(b"\n")
    if not lines[-1]:
        lines.pop()
    for number, line in enumerate(lines, 1):
        yield f"{file}:{number}", _json_line(line)


def _json_line(line: bytes) -> Record | _Bad:
    if not line.strip():
        return _Bad("empty line")
    try:
        item = json.loads(line.decode())
    except UnicodeDecodeError as error:
        return _Bad(f"bad UTF-8: byte {error.object[error.start]:#04x} at {error.start}")
    except (json.JSONDecodeError, RecursionError) as error:
        return _Bad(f"bad JSON: {error}")
    return item if isinstance(item, dict) else _Bad(f"no object: {type(item).__name__}")


def _read_csv(file: Path) -> Iterator[tuple[str, Record | _Bad]]:
    """Records named by the line they begin on; quoted cells may span lines. The first record names the columns."""
    # bytes that are not UTF-8 become lone surrogates, which `columns` refuses cell by cell
    text = file.read_bytes().removeprefix(b"\xef\xbb\xbf").decode(errors="surrogateescape")
    reader = csv.reader(
        io.StringIO(text, newline=""), delimiter="\t" if file.suffix.lower() == ".tsv" else ",", strict=True
    )
    header: list[str] | None = None
    while True:
        line = reader.line_num + 1
        source = f"{file}:{line}"
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            lost = reader.line_num - line
            also = f", and the {lost} lines after it are lost" if lost else ""
            if header is None:
                raise DataError(f"{source}: the header is no CSV: {error}") from error
            yield source, _Bad(f"bad CSV: {error}{also}")
            continue
        if header is None:
            header = cells
            if len(set(header)) < len(header):
                raise DataError(f"{source}: two columns have one name: {', '.join(header)}")
        elif not cells:
            yield source, _Bad("empty line")
        elif len(cells) != len(header):
            yield source, _Bad(f"wrong number of cells: {len(cells)}, the header has {len(header)}")
        else:
            yield source, dict(zip(header, cells, strict=True))


def _read_parquet(file: Path) -> Iterator[tuple[str, Record | _Bad]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.read_table(file)
        items = table.to_pylist()
    except (pa.ArrowException, UnicodeDecodeError) as error:
        raise DataError(f"{file}: not a sound Parquet file: {error}") from error
    names = _class_names(json.loads((table.schema.metadata or {}).get(b"huggingface", b"{}")))
    for number, item in enumerate(items, 1):
        yield f"{file}:row {number}", _named(item, names)


def _class_names(written: dict[str, dict[str, dict[str, dict[str, object]]]]) -> dict[str, list[str]]:
    """Names of classes by column, from what `datasets` writes beside integer labels."""
    features = written.get("info", {}).get("features", {})
    return {
        column: cast("list[str]", feature["names"])
        for column, feature in features.items()
        if isinstance(feature, dict) and feature.get("_type") == "ClassLabel" and "names" in feature
    }


def _named(item: dict[str, object], names: dict[str, list[str]]) -> Record:
    """The record with class numbers replaced by their names; -1, which marks a hidden label, becomes none."""
    for column, classes in names.items():
        value = item.get(column)
        if isinstance(value, int):
            item[column] = classes[value] if 0 <= value < len(classes) else None
    return item


def _load_saved(folder: Path, config: DataConfig) -> Loaded:
    import datasets

    data = datasets.load_from_disk(str(folder))
    if isinstance(data, datasets.DatasetDict):
        if config.split not in data:
            raise DataError(f"{folder}: no split {config.split!r}; there are {', '.join(data)}")
        data = data[config.split]
    return _load_dataset(data, config, str(folder))


def _load_hub(config: DataConfig) -> Loaded:
    import datasets

    name, _, configuration = config.name.partition(":")
    try:
        data = datasets.load_dataset(name, configuration or None, split=config.split)
    except Exception as error:  # whatever the hub, the network or the data set's own files raise
        reason = (str(error).splitlines() or [""])[0]
        raise DataError(
            f"{config.name}: no such file or folder here, and it cannot be loaded as a Hugging Face data set "
            f"(split {config.split!r}): {type(error).__name__}: {reason}. Offline? Name a local file or folder"
        ) from error
    return _load_dataset(data, config, f"{config.name}/{config.split}")


def _load_dataset(data: datasets.Dataset, config: DataConfig, where: str) -> Loaded:
    names = {column: feature.names for column, feature in data.features.items() if hasattr(feature, "names")}
    records = [(f"{where}:row {n}", _named(item, names)) for n, item in enumerate(data.to_list(), 1)]
    return _rows(cast("list[tuple[str, Record | _Bad]]", records), config, where)
