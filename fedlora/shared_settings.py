"""What a server tells its nodes of a run's settings, and how a node lays its own beneath them.

A client reads few settings: how rows become tokens, which modules are adapted, how tasks are called. Those are the
run's and must be the same for all, so they travel in every signed ask. Where the data and the base lie, how columns are
called, which device and how many threads: those are the node's own and never leave it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Final

from fedlora.config import RunConfig, flat, load_config
from fedlora.config_text import Scalar
from fedlora.errors import ConfigError
from fedlora.privacy.budget import run_epsilon, step_sampling
from fedlora.privacy.clients import promised

__all__ = ["OWN", "SHARED", "merged", "shared_settings"]

SHARED: Final = (
    "model.fingerprint",
    "model.task_type",
    "model.labels",
    "model.target_modules",
    "model.max_length",
    "model.pooling",
    "model.head",
    "data.prompt",
    "data.labels",
    "data.holdout",
    "method.name",
    "continual.method",
    "continual.replay_rows",
    "continual.routing",
    "privacy.level",
    "privacy.clip",
    "privacy.noise_multiplier",
    "privacy.epsilon",
    "privacy.delta",
    "privacy.sampling",
    "privacy.rows",
)  # of the run
OWN: Final = (
    "seed",
    "model.name",
    "model.revision",
    "model.dtype",
    "model.device",
    "data.name",
    "data.split",
    "data.columns",
    "data.skills",
    "data.rows_per_client",
    "data.partition.kind",
    "data.partition.alpha",
    "data.partition.key",
    "data.partition.skills_per_client",
    "data.partition.minimum_rows",
    "training.threads",
    "evaluation.batch_size",
    "wire.max_bytes",
)  # of a node; what is neither is the server's alone


NOT_HELD: Final = {"data.name": "not held by this node"}


def shared_settings(config: RunConfig) -> str:
    """The run's settings that its nodes must go by, as canonical JSON: dotted key -> scalar, and `tasks`."""
    every = flat(config)
    told: dict[str, Any] = {key: every[key] for key in SHARED}
    if (
        spend := run_epsilon(config)
    ) is not None:  # which follow from rounds and batches, of which a node does not hear
        told |= {"privacy.sampling": step_sampling(config), "privacy.epsilon": spend, "privacy.noise_multiplier": ""}
    if (whole := promised(config)) is not None:
        told |= {"privacy.epsilon": whole, "privacy.noise_multiplier": ""}
    told["tasks"] = [{k: v for k, v in task.items() if k == "name" or k in SHARED} for task in config.tasks]
    return json.dumps(told, sort_keys=True, separators=(",", ":"))


def merged(
    told: str, own: Mapping[str, Scalar], tasks: Mapping[str, Mapping[str, Scalar]], *, shares: int
) -> RunConfig:
    """A node's settings for one ask: what the server `told`, the node's `own`, and its own of each task that it has.

    A task that is not among them is one that the node has no data of. `shares` is the number of parts in which the
    node's data are dealt (1: it has all of them).
    Raises: ConfigError naming a setting that is not the server's to tell or not the node's to set, and as
    `fedlora.config.load_config`.
    """
    given = _told(told)
    for key in (*own, *(key for table in tasks.values() for key in table)):
        if key not in OWN:
            raise ConfigError(f"settings: {key} is set by the run, not by a node; a node may set {', '.join(OWN)}")
    tables = given.pop("tasks")
    if unknown := sorted(tasks.keys() - {table["name"] for table in tables}):
        names = ", ".join(table["name"] for table in tables) or "none"
        raise ConfigError(f"tasks: this node has data for {', '.join(unknown)}, and the run's tasks are {names}")
    whole = [
        {**table, **({k: str(v) for k, v in tasks[table["name"]].items()} if table["name"] in tasks else NOT_HELD)}
        for table in tables
    ]
    overrides = [f"{key}={value}" for key, value in own.items()]
    overrides += [f"tasks={json.dumps(whole)}"] if whole else []
    return load_config(None, [*overrides, f"rounds.clients={shares}"], flower=given)


def _told(text: str) -> dict[str, Any]:
    try:
        told = json.loads(text)
    except ValueError as error:
        raise ConfigError(f"the ask carries no settings of its run ({error}): is the server deployed?") from None
    tables = told.get("tasks") if isinstance(told, dict) else None
    if not isinstance(tables, list) or not all(isinstance(t, dict) and isinstance(t.get("name"), str) for t in tables):
        raise ConfigError("the ask's settings have no list of tasks: is the server of the same version?")
    foreign = {*told, *(key for table in tables for key in table)} - {*SHARED, "tasks", "name"}
    if foreign:
        raise ConfigError(f"the ask tells {', '.join(sorted(foreign))}, which a server may not set at a node")
    return dict(told)
