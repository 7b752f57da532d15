"""When which task is trained, and by whom: the settings of a stream of tasks as a list of legs.

Tasks come one after another, or overlap where a task says at which round it starts. Everything here is a function of
the settings alone, so that server, clients and reports agree without asking one another.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Collection
from dataclasses import dataclass

from fedlora.config import RunConfig, task_config
from fedlora.errors import ConfigError

__all__ = ["JOINT", "ONE_PAIR", "Leg", "client_list", "legs", "replayed", "rounds_in_all", "task_names", "tasks_of"]

ONE_PAIR = ("sequential", "replay", "ewc")  # ways under which one pair goes on from task to task
JOINT = "all-tasks"  # the one task of `continual.method = joint`


@dataclass(frozen=True, kw_only=True)
class Leg:
    """One task of a stream: rounds `first` to `last`, 1-based, both included.

    `clients` are the stable ids that hold it (None: all); `rank` bounds the rank that each trains it with.
    """

    name: str
    first: int
    last: int
    config: RunConfig  # of a run of this task alone
    clients: tuple[str, ...] | None = None
    rank: int | None = None
    task_dim: int | None = None

    @property
    def rounds(self) -> int:
        return self.last - self.first + 1

    def holds(self, client: str) -> bool:
        """Whether this client has rows of the task."""
        return self.clients is None or client in self.clients


def legs(config: RunConfig) -> tuple[Leg, ...]:
    """The tasks in the order of the settings; none for a run without tasks.

    A task begins when the one before it in the list has ended, or at its `start`. Under `nearest-mean` a task takes
    one round, and under `joint` there is one leg, over as many rounds as all tasks together.
    Raises: ConfigError for a task that is wrong; a round in which nothing is trained; a base method that cannot be.
    """
    found: list[Leg] = []
    end = 0
    for table in config.tasks:
        name, own = table["name"], task_config(config, table["name"])
        first = int(table.get("start", end + 1))
        end = first + (1 if config.continual.method == "nearest-mean" else own.rounds.count) - 1
        clients = client_list(table["clients"]) if "clients" in table else None
        rank, dim = (int(table[key]) if key in table else None for key in ("rank", "continual.task_dim"))
        found.append(Leg(name=name, first=first, last=end, config=own, clients=clients, rank=rank, task_dim=dim))
    if not found:
        return ()
    if config.continual.method == "joint":
        count = sum(leg.rounds for leg in found)
        holders = {None if leg.clients is None else frozenset(leg.clients) for leg in found}
        everybody = (
            None if None in holders else tuple(sorted(frozenset().union(*(h for h in holders if h is not None))))
        )
        return (Leg(name=JOINT, first=1, last=count, config=found[0].config, clients=everybody),)
    idle = sorted(set(range(1, max(leg.last for leg in found) + 1)) - {r for leg in found for r in _span(leg)})
    if idle:
        raise ConfigError(f"tasks: nothing is trained in round {idle[0]}; let a task start earlier or take more rounds")
    if config.continual.method in ONE_PAIR:
        for one, other in itertools.pairwise(found):
            if other.first <= one.last:
                raise ConfigError(
                    f"tasks: {other.name} begins in round {other.first}, before {one.name} ends in round {one.last}, "
                    f"and under {config.continual.method} one pair goes on from task to task: leave `start` out"
                )
    return tuple(found)


def _span(leg: Leg) -> range:
    return range(leg.first, leg.last + 1)


def client_list(text: str) -> tuple[str, ...]:
    """Ids from a list; a number is the client of that index in a simulation. Raises: ConfigError if it is no list."""
    try:
        items = json.loads(text) if text.lstrip().startswith("[") else [part.strip() for part in text.split(",")]
    except ValueError:
        raise ConfigError(f"tasks: clients must be a list of ids or numbers, such as 0,1,2; got {text!r}") from None
    return tuple(f"client-{int(x):05d}" if isinstance(x, int) or str(x).isdecimal() else str(x) for x in items)


def rounds_in_all(config: RunConfig) -> int:
    """Rounds of the whole run: of all tasks, or `rounds.count` where there are none."""
    return max((leg.last for leg in legs(config)), default=config.rounds.count)


def task_names(config: RunConfig) -> tuple[str, ...]:
    """The names of the tasks in order, also where they are trained together."""
    return tuple(table["name"] for table in config.tasks)


def tasks_of(config: RunConfig, client: str) -> tuple[str, ...]:
    """The names of the tasks that a client has by the settings, in order."""
    return tuple(
        table["name"] for table in config.tasks if "clients" not in table or client in client_list(table["clients"])
    )


def replayed(config: RunConfig, task: str, has: Collection[str]) -> tuple[str, ...]:
    """The tasks whose rows a client that `has` these tasks trains on in task `task`, its own first: for `joint` all
    that it has, for `replay` those before it that it has, else itself alone."""
    names = task_names(config)
    if task == JOINT:
        return tuple(name for name in names if name in has)
    if config.continual.method != "replay":
        return (task,)
    return (task, *(name for name in names[: names.index(task)] if name in has))
