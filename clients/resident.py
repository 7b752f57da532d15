"""What a client's process holds on to: the base, and the encoded rows of the clients that it answered for last."""

from __future__ import annotations

from collections.abc import Collection
from functools import lru_cache

from fedlora.base import Base, load_base
from fedlora.config import ModelConfig, RunConfig, task_config
from fedlora.continual.tasks import JOINT, replayed, task_names, tasks_of
from fedlora.data import client_rows
from fedlora.data.prompt import prompt_format
from fedlora.data.report import tell
from fedlora.data.rows import TokenRow
from fedlora.errors import DataError
from fedlora.rng import stream

ROWS_KEPT = 32  # clients (each with each of its tasks) whose encoded rows stay in memory
REPLAY_ROWS = 32  # of each old task, where nothing else is said


def stable_id(index: int) -> str:
    """The stable id of a simulated client: its partition."""
    return f"client-{index:05d}"


@lru_cache(maxsize=1)
def resident_base(model: ModelConfig) -> Base:
    """The base of this process: loaded once, adapters are swapped on it."""
    return load_base(model)


def encoded(
    config: RunConfig, index: int, task: str = "", *, again: bool = True, has: Collection[str] | None = None
) -> tuple[list[TokenRow], list[TokenRow]]:
    """(training rows, held-out rows) of one client as tokens; the rows of the last clients stay in memory.

    In a task also what the settings have it train on again: some rows of old tasks (`continual.replay_rows` of each,
    drawn once; not with `again` False), or the rows of all tasks; of those tasks that the client `has` (None: by the
    settings). Only the task's own rows are held out, or those of all. Raises: DataError if it has none of them.
    """
    has = tasks_of(config, stable_id(index)) if has is None else has
    own, *others = (replayed(config, task, has) or (None,)) if task else ("",)
    if own is None:
        raise DataError(f"{stable_id(index)} has none of the tasks {', '.join(task_names(config))}")
    if not again and task != JOINT:
        others = []
    train, held_out = _encoded(config.model_dump_json(), index, own)
    most = (config.continual.replay_rows or REPLAY_ROWS) if task != JOINT else None
    for other in others:
        old, held = _encoded(config.model_dump_json(), index, other)
        if task == JOINT:
            train, held_out = train + old, held_out + held
            continue
        drawn = stream(config.seed, "replay", index, other).permutation(len(old))[:most]
        train = train + [old[i] for i in sorted(drawn)]
    return train, held_out


@lru_cache(maxsize=ROWS_KEPT)
def _encoded(config_json: str, index: int, task: str) -> tuple[list[TokenRow], list[TokenRow]]:
    config = task_config(RunConfig.model_validate_json(config_json), task)
    rows = client_rows(config, index)
    form = prompt_format(config, resident_base(config.model).tokenizer)
    train, trained_on = form.encode(rows.train)
    held_out, scored_on = form.encode(rows.holdout)
    tell(rows.report, config.data.name)
    tell(trained_on + scored_on, stable_id(index))
    return train, held_out
