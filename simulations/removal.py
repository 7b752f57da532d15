"""A run's adapter without some of its tasks: the exact sum of the others', in a new PEFT folder.

    fedlora compose RUN --without TASK --out DIR

Nothing is trained: the tasks' blocks are left out, and what those after them lose by that is measured by
`fedlora evaluate RUN --without TASK`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from fedlora.adapter import Adapter
from fedlora.composing import write_folder
from fedlora.composition import compacted
from fedlora.config import RunConfig, load_config
from fedlora.continual.tasks import legs
from fedlora.errors import ConfigError
from fedlora.state import GlobalState
from simulations.inference import newest, require_separable
from strategies.continual.views import blocks_of, joint_head, sealed_in_order

__all__ = ["Left", "compose_without", "left_out", "on_top"]


@dataclass(frozen=True, kw_only=True)
class Left:
    """What was written to `folder`: its rank, the rank of every task that is in it, and by task that was left out,
    those that were trained on top of it."""

    folder: Path
    rank: int
    ranks: Mapping[str, int]
    on_top: Mapping[str, tuple[str, ...]]


def compose_without(run: Path, without: Sequence[str], out: Path) -> Left:
    """Write the adapters of all tasks of `run` but some, summed at the lowest rank that loses nothing, to `out`.

    Of a classifier every class is as the task that has it left it. The classes that only removed tasks have are as the
    run began with them. Parts of a head that are not by class are those of the remaining task that was sealed last.
    `compose.json` names the run, what was left out and what was trained on top of it. Equal runs give equal adapters.
    Raises: ConfigError if `out` exists, the run has not ended or has no tasks, a name is none, the way has no adapter
    of one task, or nothing would be left; CheckpointError.
    """
    if out.exists():
        raise ConfigError(f"{out} exists already. Choose another folder with --out.")
    config = load_config(run / "config.toml")
    state = newest(config, run)
    if missing := [leg.name for leg in legs(config) if leg.name not in {t.name for t in sealed_in_order(state)}]:
        raise ConfigError(
            f"{run} has not ended: task {missing[0]} is not sealed yet. Go on with: fedlora simulate --resume {run}"
        )
    less = left_out(config, state, without)
    terms = {t.name: [block.adapter for block in blocks_of(state, [t])] for t in sealed_in_order(less)}
    some = [adapter for own in terms.values() for adapter in own]
    total = compacted(some) if some else Adapter({})
    if not any(total.ranks.values()):
        raise ConfigError(f"--without {', '.join(without)}: the other tasks' adapters are zero: there is none to write")
    ranks = {name: sum(max(a.ranks.values()) for a in own) for name, own in terms.items()}
    above = {name: on_top(config, name, tuple(less.tasks)) for name in without}
    classifier = config.model.task_type == "sequence-classification"
    record = {
        "how": "without",
        "run": {"folder": str(run), "id": _text(run / "run-id"), "manifest": _sha256(run / "manifest.json")},
        "without": above,
        "sources": [{"name": name, "weight": 1.0, "rank": rank} for name, rank in ranks.items()],
        "base": {"name": config.model.name, "fingerprint": state.base},
        "task_type": config.model.task_type,
        "labels": config.model.labels,
        "pooling": config.model.pooling if classifier else None,
    }
    write_folder(out, record, total, state.layout, joint_head(less, config))
    return Left(folder=out, rank=max(total.ranks.values()), ranks=ranks, on_top=above)


def left_out(config: RunConfig, state: GlobalState, without: Sequence[str]) -> GlobalState:
    """The same state as if it had never held these tasks, their heads included.

    Raises: ConfigError as `simulations.inference.require_separable`, or if no task would be left.
    """
    for name in without:
        require_separable(config, state, name)
    rest = {name: task for name, task in state.tasks.items() if name not in without}
    if not rest:
        raise ConfigError(
            f"--without {', '.join(without)}: the run has no other task, and without any it is the base that it began "
            "with: there is no adapter to write"
        )
    return replace(state, tasks=rest)


def on_top(config: RunConfig, task: str, among: Sequence[str]) -> tuple[str, ...]:
    """Which tasks of `among` had rounds after this one was sealed, and so were trained with it there."""
    last = {leg.name: leg.last for leg in legs(config)}
    if config.continual.method == "separate":
        return ()
    return tuple(name for name in last if name in among and last[name] > last[task])


def _text(path: Path) -> str | None:
    return path.read_text("utf-8").strip() if path.is_file() else None


def _sha256(path: Path) -> str | None:
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None
