"""Folders in, a folder out: the adapters that `fedlora compose` reads, checks, combines and writes.

The arithmetic, its sources and its cost are in `fedlora.composition`. Here are the folders: run folders (their released
adapter) and PEFT folders, all for one base with one set of modules; ranks, alphas and rsLoRA may differ, since reading
turns them into explicit scales. The result is a PEFT folder and `compose.json`, which says what it was made of. LoRAHub
(Huang et al., COLM 2024) also needs the base, to score candidate weights on the examples.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

from safetensors import safe_open

from fedlora.adapter import Adapter, Array, require_same_modules
from fedlora.base import Base, load_base
from fedlora.composition import Composition, Found, Recipe, compose, composed_head, penalty, search
from fedlora.config import RunConfig, load_config, task_config
from fedlora.continual.tasks import task_names
from fedlora.data import test_rows
from fedlora.data.prompt import prompt_format
from fedlora.data.report import tell
from fedlora.data.rows import TokenRow
from fedlora.errors import AdapterError, BaseMismatch, CheckpointError, ConfigError
from fedlora.evaluation.score import score
from fedlora.peft_bridge import TaskType, load_adapter, save_adapter
from fedlora.state import Block, Layout, Module
from fedlora.training.attach import attach
from fedlora.wire import digests_id

__all__ = ["Composed", "Source", "compose_folders", "few_shot_loss", "parse_source", "read_source", "write_folder"]

_RECORD = "compose.json"
_TASKS: Mapping[str, TaskType] = {"CAUSAL_LM": "causal-lm", "SEQ_CLS": "sequence-classification"}


@dataclass(frozen=True, kw_only=True)
class Source:
    """One adapter to combine, and what its folder says about its base; None or empty where it does not say."""

    name: str  # as it was given
    weight: float | None
    adapter: Adapter
    head: Mapping[str, Array]
    layout: Layout
    task_type: TaskType
    base: str | None
    fingerprint: str | None
    labels: tuple[str, ...]
    pooling: str | None  # what a classifier's head reads
    sha256: str  # of its weights file
    run: Path | None  # the run folder, if it is one


@dataclass(frozen=True, kw_only=True)
class Composed:
    """What was written to `folder`: the weights used, in the order of the sources, and what the search found."""

    folder: Path
    base: str
    sources: tuple[Source, ...]
    weights: tuple[float, ...]
    result: Composition
    found: Found | None


def compose_folders(
    words: Sequence[str],
    out: Path,
    recipe: Recipe,
    *,
    model: str | None = None,
    examples: str | None = None,
    evaluations: int | None = None,
    overrides: Sequence[str] = (),
    notify: Callable[[str], None] = lambda _: None,
) -> Composed:
    """Combine the adapters that `words` name (`NAME=WEIGHT`, see `parse_source`) into the new PEFT folder `out`.

    A source without a weight has weight 1; under `lorahub`, weights are where the search starts, 1/n without. `model`
    says which base all are for, where their folders disagree or do not say. For `lorahub`: `examples` are the rows that
    it scores on, `evaluations` how many weights it tries (40), `overrides` further settings for reading the rows;
    `notify` gets a line for each better candidate.
    Equal arguments give equal bytes on one machine.
    Raises: ConfigError, AdapterError, BaseMismatch naming the source; CheckpointError if the disk refuses.
    """
    searches = {"--examples": examples, "--evaluations": evaluations, "--set": overrides or None}
    if recipe.how != "lorahub" and (given := [flag for flag, value in searches.items() if value is not None]):
        raise ConfigError(f"{', '.join(given)}: for lorahub only; --how is {recipe.how}, whose weights are given")
    if recipe.how == "lorahub" and examples is None:
        raise ConfigError("--how lorahub searches weights by their loss on a few rows: say which with --examples FILE")
    if not words:
        raise ConfigError("nothing to compose: name one or more adapters, e.g. runs/001-flora=0.7 runs/002-flora=0.3")
    if out.exists():
        raise ConfigError(f"{out} exists already. Choose another folder with --out.")
    sources = tuple(read_source(word) for word in words)
    base = _one_base(sources, model)
    _same_classes(sources)
    found = None
    weights = tuple(1.0 if s.weight is None else s.weight for s in sources)
    if examples is not None:
        start = [1 / len(sources) if s.weight is None else s.weight for s in sources]
        found = _searched(sources, start, examples, evaluations or 40, recipe.seed, model, overrides, notify)
        weights = found.weights
    result = compose([s.adapter for s in sources], weights, recipe)
    if not any(result.adapter.ranks.values()):
        raise ConfigError("the combination is zero in every module (weights of 0, or sources that cancel): no adapter")
    head = composed_head([s.head for s in sources], weights)
    composed = Composed(folder=out, base=base, sources=sources, weights=weights, result=result, found=found)
    _write(composed, recipe, head, examples)
    return composed


def parse_source(word: str) -> tuple[Path, float | None]:
    """`NAME=WEIGHT` as (folder, weight), split at the last `=`; a folder's name alone has no weight.

    Raises: ConfigError if the weight is no finite number, or there is no such folder (with the nearest names).
    """
    name, mark, number = word.rpartition("=")
    if not mark or (not Path(name).expanduser().is_dir() and Path(word).expanduser().is_dir()):
        name, mark = word, ""
    folder = Path(name).expanduser()
    if not name or not folder.is_dir():
        places = [p for p in (folder.parent, Path("runs")) if p.is_dir()]
        there = {p.name: p for place in places for p in sorted(place.iterdir()) if p.is_dir()}
        near = [str(there[n]) for n in difflib.get_close_matches(folder.name, there, 3, 0.5)]
        raise ConfigError(
            f"{word!r}: no folder {name!r}; near: {', '.join(near) or 'nothing'}. A source is NAME=WEIGHT, with NAME a "
            "run folder or a PEFT adapter folder"
        )
    if not mark:
        return folder, None
    try:
        weight = float(number)
    except ValueError:
        weight = math.nan
    if not math.isfinite(weight):
        raise ConfigError(
            f"{word}: the weight {number!r} is no finite number; a source is NAME=WEIGHT, e.g. {name}=0.5"
        )
    return folder, weight


def read_source(word: str) -> Source:
    """The adapter of a run folder or PEFT folder, with its weight.

    Raises: ConfigError as `parse_source`, or if the folder is neither or its run has not ended; AdapterError as
    `fedlora.peft_bridge.load_adapter`.
    """
    given, weight = parse_source(word)
    name = str(given)
    run = given if (given / "config.toml").is_file() else None
    folder = given / "adapter" if run is not None else given
    if not (folder / "adapter_config.json").is_file():
        raise ConfigError(
            f"{name} has no adapter yet: the run has not ended. Go on with: fedlora simulate --resume {name}"
            if run is not None
            else f"{name} is neither a run folder (config.toml) nor a PEFT adapter folder (adapter_config.json)"
        )
    adapter, head = load_adapter(folder)
    said = json.loads((folder / "adapter_config.json").read_bytes())
    record = _json(given / ("manifest.json" if run is not None else _RECORD))
    task = said.get("task_type") or ("SEQ_CLS" if head else "CAUSAL_LM")
    if task not in _TASKS:
        raise AdapterError(f"{name}: its task_type is {task}; fedlora combines {' and '.join(_TASKS)}")
    about = record.get("base", {})
    labels, pooling = record.get("labels", ()), record.get("pooling")
    if run is not None and task == "SEQ_CLS":
        model = load_config(run / "config.toml").model
        labels, pooling = model.labels, model.pooling
    weights_file = folder / "adapter_model.safetensors"
    return Source(
        name=name,
        weight=weight,
        adapter=adapter,
        head=head,
        layout=_layout(weights_file, adapter, head, conv1d=bool(said.get("fan_in_fan_out"))),
        task_type=_TASKS[task],
        base=said.get("base_model_name_or_path") or None,
        fingerprint=about.get("fingerprint"),
        labels=tuple(labels) if task == "SEQ_CLS" else (),
        pooling=pooling,
        sha256=hashlib.sha256(weights_file.read_bytes()).hexdigest(),
        run=run,
    )


def few_shot_loss(
    base: Base, rows: Sequence[TokenRow], sources: Sequence[Source], *, batch_size: int
) -> Callable[[tuple[float, ...]], float]:
    """The mean loss of the base with `sum_i w_i dW_i` attached, over answer tokens (or rows of a classifier), of w.

    Exact products, attached as blocks: nothing is truncated, and no weights are copied but those of the blocks. Under
    heads (see `composed_head`) weights whose sum is not positive have an infinite loss. Each call costs one attachment
    and one forward pass over the rows; what it attached stays attached.
    """
    heads = [s.head for s in sources]
    adapters = [s.adapter for s in sources]

    def loss(weights: tuple[float, ...]) -> float:
        if any(heads) and not sum(weights) > 0.0:
            return math.inf
        blocks = tuple(Block(adapter=a.scaled(w), born=0) for a, w in zip(adapters, weights, strict=True))
        attach(base, blocks, digests_id([*(a.digest for a in adapters), repr(weights)]), None, _whole_head(weights))
        sums = score(base, rows, batch_size=batch_size)
        return sums["loss"] / sums["tokens"]

    def _whole_head(weights: Sequence[float]) -> dict[str, Any]:
        return {**base.initial_head, **composed_head(heads, weights)}

    return loss


def _one_base(sources: Sequence[Source], model: str | None) -> str:
    """The base's name. Raises: AdapterError, BaseMismatch, ConfigError naming the two sources that differ."""
    first = sources[0]
    for other in sources[1:]:
        pair = f"{first.name} and {other.name}"
        if other.task_type != first.task_type:
            raise AdapterError(f"{pair} have different tasks, {first.task_type} and {other.task_type}")
        try:
            require_same_modules(first.adapter, other.adapter)
        except AdapterError as error:
            raise AdapterError(f"{pair}: {error}") from None
        if other.layout.modules != first.layout.modules:
            kinds = [n for n in first.layout.modules if first.layout.modules[n] != other.layout.modules[n]]
            raise AdapterError(f"{pair}: {kinds[:5]} are modules of another kind (linear, conv1d, embedding)")
        if other.layout.head != first.layout.head:
            raise AdapterError(
                f"{pair}: heads differ, {dict(first.layout.head)} and {dict(other.layout.head)}; same labels?"
            )
    for (what, i), (_, j) in _pairs([(s.labels, s) for s in sources if s.labels]):
        raise AdapterError(f"{i.name} and {j.name} have different labels, {what} and {j.labels}; order counts")
    for (what, i), (_, j) in _pairs([(s.pooling, s) for s in sources if s.pooling]):
        raise AdapterError(f"the head of {i.name} reads model.pooling={what}, that of {j.name} {j.pooling}")
    for (what, i), (_, j) in _pairs([(s.fingerprint, s) for s in sources if s.fingerprint]):
        raise BaseMismatch(f"{i.name} was trained on base {what[:12]}, {j.name} on {str(j.fingerprint)[:12]}")
    if model is not None:
        return model
    sure = [s for s in sources if s.fingerprint]
    for (what, i), (_, j) in _pairs([(_path(s.base), s) for s in sources if s.base and (len(sure) < len(sources))]):
        raise BaseMismatch(
            f"{i.name} is for base {what}, {j.name} for {j.base}: adapters of different bases do not add up. If both "
            "names are the same base, say so with --model NAME"
        )
    name = next((s.base for s in sources if s.base), None)
    if name is None:
        raise ConfigError("none of the sources says which base it is for: give it with --model")
    return name


def _same_classes(sources: Sequence[Source]) -> None:
    """Raises: ConfigError if two heads are of one run whose tasks have classes of their own: their mean is no head.

    Each of them has learnt the rows of its own classes, and the mean would weaken those by rows that did not learn.
    """
    seen: dict[Path, tuple[tuple[str, ...], Source]] = {}
    for source in sources:
        found = _part_of_run(Path(source.name)) if source.head else None
        if found is None:
            continue
        run, classes = found
        first, other = seen.setdefault(run, (classes, source))
        if classes != first:
            raise ConfigError(
                f"{other.name} and {source.name} are of one run, and their heads have classes of their own, "
                f"{', '.join(first)} and {', '.join(classes)}: their mean knows neither. All tasks but some, each "
                f"with the rows of its own classes: fedlora compose {run} --without TASK"
            )


def _part_of_run(folder: Path) -> tuple[Path, tuple[str, ...]] | None:
    """The run with tasks that a folder is a part of (itself, its `adapter`, or one of `tasks/`), and the classes there.

    None for any other folder.
    """
    here = folder.expanduser().resolve()
    parts = {here: "", here.parent: "" if here.name == "adapter" else None}
    if here.parent.name == "tasks":
        parts[here.parent.parent] = here.name
    for run, task in parts.items():
        if task is None or not (run / "config.toml").is_file():
            continue
        config = load_config(run / "config.toml")
        if not config.tasks:
            return None
        own = task_config(config, task).data.labels if task in task_names(config) else ()
        return run, own or config.model.labels
    return None


def _pairs(said: Sequence[tuple[Any, Source]]) -> list[tuple[tuple[Any, Source], tuple[Any, Source]]]:
    """The first of these with each that says otherwise."""
    return [(said[0], other) for other in said if other[0] != said[0][0]]


def _path(base: str | None) -> str:
    return str(Path(str(base)).resolve()) if Path(str(base)).is_dir() else str(base)


def _layout(weights_file: Path, adapter: Adapter, head: Mapping[str, Array], *, conv1d: bool) -> Layout:
    """What PEFT's files say about the modules: embeddings by their keys, Conv1D by `fan_in_fan_out`."""
    with safe_open(weights_file, framework="numpy") as file:
        keys = set(file.keys())
    modules = {}
    for name, f in adapter.items():
        embedding = f"base_model.model.{name}.lora_embedding_A" in keys
        kind: Literal["linear", "conv1d", "embedding"] = "embedding" if embedding else "conv1d" if conv1d else "linear"
        modules[name] = Module(out=f.shape[0], inp=f.shape[1], kind=kind)
    return Layout(modules=modules, head={n: x.shape for n, x in head.items()})


def _searched(
    sources: Sequence[Source],
    start: Sequence[float],
    examples: str,
    evaluations: int,
    seed: int,
    model: str | None,
    overrides: Sequence[str],
    notify: Callable[[str], None],
) -> Found:
    config = _settings(sources, examples, model, overrides)
    base = load_base(config.model.model_copy(update={"target_modules": tuple(sources[0].adapter)}))
    known = next((s for s in sources if s.fingerprint), None)
    if known is not None and known.fingerprint != base.fingerprint:
        raise BaseMismatch(f"{known.name} was trained on base {known.fingerprint}, {config.model.name} is another")
    rows, left_out = prompt_format(config, base.tokenizer).encode(test_rows(config))
    tell(left_out, "examples")
    if not rows:
        raise ConfigError(f"--examples {examples}: no row of it can be scored")
    loss = few_shot_loss(base, rows, sources, batch_size=config.evaluation.batch_size)
    best = math.inf

    def told(weights: tuple[float, ...]) -> float:
        nonlocal best
        value = loss(weights)
        if (objective := value + penalty(weights)) < best:
            best = objective
            notify(f"loss {value:.4f} on {len(rows)} examples at " + " ".join(f"{w:.3f}" for w in weights))
        return value

    return search(told, start, evaluations=evaluations, seed=seed)


def _settings(sources: Sequence[Source], examples: str, model: str | None, overrides: Sequence[str]) -> RunConfig:
    """How the examples become rows: as in the first source that is a run, else by defaults and `overrides`."""
    options = [] if model is None else [f"model.name={model}"]
    run = next((s.run for s in sources if s.run is not None), None)
    rows = str(Path(examples).expanduser().resolve()) if Path(examples).expanduser().exists() else examples
    if run is not None:
        config = load_config(run / "config.toml", [*options, *overrides])
    elif model is None:
        raise ConfigError("--how lorahub scores on the base, and no source is a run that names it: give --model")
    else:
        labels = next((s.labels for s in sources if s.labels), ())
        options += [f"model.task_type={sources[0].task_type}", f"data.name={rows}"]
        options += [f"model.labels={json.dumps(labels)}"] if labels else []
        options += [f"model.pooling={s.pooling}" for s in sources if s.pooling][:1]
        config = load_config(None, [*options, *overrides])
    return config.model_copy(update={"data": config.data.model_copy(update={"test": rows})})


def _write(composed: Composed, recipe: Recipe, head: Mapping[str, Array], examples: str | None) -> None:
    sources, result, found = composed.sources, composed.result, composed.found
    record = {
        "how": recipe.how,
        "settings": recipe.settings,
        "base": {"name": composed.base, "fingerprint": next((s.fingerprint for s in sources if s.fingerprint), None)},
        "task_type": sources[0].task_type,
        "labels": next((s.labels for s in sources if s.labels), ()),
        "pooling": next((s.pooling for s in sources if s.pooling), None),
        "sources": [
            {"name": s.name, "weight": w, "rank": max(s.adapter.ranks.values()), "sha256": s.sha256}
            for s, w in zip(sources, composed.weights, strict=True)
        ],
        "error": {"frobenius": result.error, "relative": result.relative_error},
        "search": None
        if found is None
        else {"examples": examples, "objective": found.objective, "start": found.start, "tried": found.evaluations},
    }
    write_folder(composed.folder, record, result.adapter, sources[0].layout, head)


def write_folder(
    folder: Path, record: Mapping[str, Any], adapter: Adapter, layout: Layout, head: Mapping[str, Array]
) -> None:
    """The new `folder`: `compose.json`, then the adapter: with its config, which comes last, it becomes readable.

    `record` says what it was made of, with `base` (a name and a fingerprint) and `task_type`; the format, the rank and
    the version are added. Raises: ConfigError if the folder exists; CheckpointError if the disk refuses.
    """
    said = {
        **record,
        "format": "fedlora-composition/1",
        "rank": max(adapter.ranks.values()),
        "fedlora": version("fedlora"),
    }
    try:
        folder.mkdir(parents=True)
        (folder / _RECORD).write_text(json.dumps(said, indent=2, sort_keys=True) + "\n", "utf-8")
    except FileExistsError:
        raise ConfigError(f"{folder} exists already. Choose another folder with --out.") from None
    except OSError as error:
        raise CheckpointError(f"cannot write {folder}: {error}. Is there room?") from error
    save_adapter(folder, adapter, layout, base_name=record["base"]["name"], task_type=record["task_type"], head=head)


def _json(path: Path) -> dict[str, Any]:
    """A record of ours, or an empty one where there is none. Raises: AdapterError if it is damaged."""
    if not path.is_file():
        return {}
    try:
        record = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise AdapterError(f"{path} is damaged ({error}); copy it again from its source, or delete it") from error
    return record if isinstance(record, dict) else {}
