"""Rows of text from files, data sets and the embedded skills: dealt to clients, made prompts, cut into batches.

`client_rows` and `test_rows` say who trains and scores on what. Nothing here imports torch or a tokenizer.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

from fedlora.config import DataConfig, RunConfig
from fedlora.data.partition import Indices, deal, partition
from fedlora.data.report import Report
from fedlora.data.rows import Row, TokenRow
from fedlora.data.sources import Loaded, load_rows, skill_rows, skills
from fedlora.errors import ConfigError, DataError
from fedlora.rng import stream

LOADS_KEPT = 16
MAX_GROUPS = 200  # of one load; more are no skills or classes but free text, and nobody reads scores by them

__all__ = [
    "ClientRows",
    "Report",
    "Row",
    "TokenRow",
    "client_rows",
    "describe",
    "hold_out",
    "skills_per_client",
    "test_rows",
]


@dataclass(frozen=True, kw_only=True)
class ClientRows:
    """What one client trains on, what it holds out, and the report of the load that its rows came from."""

    train: list[Row]
    holdout: list[Row]
    report: Report


def client_rows(config: RunConfig, index: int) -> ClientRows:
    """The rows of the client with this index, the same in every process.

    Embedded skills are generated for this client alone (about 10 ms), so a thousand clients cost nothing until asked;
    files and data sets are loaded and dealt once per process. A client may hold nothing. Where all rows together have
    more than `MAX_GROUPS` groups (answers in free text under `label`, say), each row's group is the data set's name.

    Raises: ConfigError if there is no such client; DataError as `load_rows` and `partition`.
    """
    if not 0 <= index < config.rounds.clients:
        raise ConfigError(f"no client has index {index}; there are {config.rounds.clients}, counted from 0")
    if _generated(config.data):
        rows = []
        seed = int(stream(config.seed, "client skills", index).integers(2**31))
        for skill, count in _skill_counts(*_key(config))[index].items():
            rows += skill_rows(skill, "train", count, seed)
        report = Report(kept=len(rows))
    else:
        loaded, parts = _dealt(*_key(config))
        rows, report = [loaded.rows[i] for i in parts[index]], loaded.report
    train, holdout = hold_out(rows, config.data.holdout, seed=config.seed, index=index)
    return ClientRows(train=train, holdout=holdout, report=report)


def hold_out(rows: Sequence[Row], share: float, *, seed: int, index: int) -> tuple[list[Row], list[Row]]:
    """A client's rows as (train, holdout), drawn by seed and client.

    About `share` of the rows are held out, never more, and equal conversations stay on one side. There is a row to
    train on if there is any row.
    """
    alike: dict[tuple[tuple[str, str], ...], list[Row]] = {}
    for row in rows:
        alike.setdefault(row.messages, []).append(row)
    kinds = list(alike.values())
    wanted = min(round(len(rows) * share), len(rows) - 1)
    train: list[Row] = []
    held: list[Row] = []
    for i in stream(seed, "holdout", index).permutation(len(kinds)):
        (held if len(held) + len(kinds[i]) <= wanted else train).extend(kinds[i])
    return train, held


def test_rows(config: RunConfig) -> list[Row]:
    """The rows that the server may evaluate on; none if the data names none.

    `data.test` is a split of `data.name` if it is a bare word; else a file, a glob, a data set id, or a folder with
    files of split `test`. Without it the embedded skills give `data.test_rows` rows in all, spread evenly over the
    skills and different from any training row. Of more than `MAX_GROUPS` groups one is made, as in `client_rows`.
    Raises: DataError as `load_rows`.
    """
    data = config.data
    if data.test is None:
        if data.name != "skills":
            return []
        names = skills(data)
        return [
            row
            for name, count in zip(names, _spread(data.test_rows, len(names)), strict=True)
            for row in skill_rows(name, "test", count, config.seed)
        ]
    return list(_grouped(_loaded(_test_config(data).model_dump_json(), config.seed).rows, data.name))


test_rows.__test__ = False  # type: ignore[attr-defined]  # no test, whatever pytest makes of the name


def describe(config: RunConfig) -> list[Counter[str]]:
    """By client: how many rows (train and holdout) of each group. Generates no skill rows."""
    if _generated(config.data):
        return [Counter(counts) for counts in _skill_counts(*_key(config))]
    loaded, parts = _dealt(*_key(config))
    return [Counter(loaded.rows[i].group for i in part) for part in parts]


def _generated(data: DataConfig) -> bool:
    return data.name == "skills" and data.partition.kind == "skills"


def _key(config: RunConfig) -> tuple[str, int, int]:
    return config.data.model_dump_json(), config.rounds.clients, config.seed


def _grouped(rows: tuple[Row, ...], name: str) -> tuple[Row, ...]:
    """The rows as they are, or if their groups are too many to score by, all in the one group of the data set."""
    if len({row.group for row in rows}) <= MAX_GROUPS:
        return rows
    group = Path(name).expanduser().resolve().name or name
    return tuple(replace(row, group=group) for row in rows)


def _spread(total: int, parts: int) -> list[int]:
    """`total` in `parts` whole numbers that differ by at most one, the larger first."""
    return [total // parts + (i < total % parts) for i in range(parts)]


def _test_config(data: DataConfig) -> DataConfig:
    """The settings under which `data.test` is loaded as ordinary rows."""
    assert data.test is not None
    plain = data.partition.model_copy(update={"kind": "iid", "key": None})
    if any(mark in data.test for mark in "/\\.~*?"):
        return data.model_copy(update={"name": data.test, "split": "test", "partition": plain})
    if Path(data.name).expanduser().is_file() or data.name == "skills":
        raise DataError(
            f"data.test: {data.test!r} is read as a split, and {data.name} has none; for a file or folder of that name "
            f"say ./{data.test}"
        )
    return data.model_copy(update={"split": data.test, "partition": plain})


def skills_per_client(config: DataConfig, clients: int) -> int:
    """How many of the embedded skills each client holds: as set, else 4, or as many as it takes to hold all."""
    held = len(skills(config))
    return config.partition.skills_per_client or min(held, max(4, -(-held // clients)))


# Settings travel as JSON so that they can be keys. The loads of a few tasks are kept, with their test rows.
@lru_cache(maxsize=LOADS_KEPT)
def _skill_counts(data: str, clients: int, seed: int) -> list[dict[str, int]]:
    """By client: how many rows of which skills."""
    config = DataConfig.model_validate_json(data)
    dealt = deal(skills(config), clients=clients, per_client=skills_per_client(config, clients), seed=seed)
    return [dict(zip(held, _spread(config.rows_per_client, len(held)), strict=True)) for held in dealt]


@lru_cache(maxsize=LOADS_KEPT)
def _loaded(data: str, seed: int) -> Loaded:
    return load_rows(DataConfig.model_validate_json(data), seed=seed)


@lru_cache(maxsize=LOADS_KEPT)
def _dealt(data: str, clients: int, seed: int) -> tuple[Loaded, list[Indices]]:
    loaded = _loaded(data, seed)
    config = DataConfig.model_validate_json(data)
    parts = partition(loaded.rows, config, clients=clients, seed=seed)
    return replace(loaded, rows=_grouped(loaded.rows, config.name)), parts
