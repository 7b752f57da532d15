"""What a state with tasks says: which are sealed and in what order, which blocks act on an input, which head scores it.

And what a stream of tasks keeps in `GlobalState.memory`, by owner.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import numpy as np

from fedlora.adapter import Array
from fedlora.config import RunConfig, task_config
from fedlora.continual.tasks import JOINT, ONE_PAIR, Leg
from fedlora.state import Block, GlobalState, Layout, Subspace, Task
from strategies.base import Member, new_head

__all__ = [
    "FEATURES",
    "HEAD",
    "INPUTS",
    "ONE_PAIR",
    "blocks_known",
    "blocks_of",
    "bounded",
    "first_memory",
    "head_of",
    "joint_head",
    "members_of",
    "owned",
    "remembering",
    "sealed_in_order",
    "with_owned",
]

HEAD = "stream:head"  # owners in GlobalState.memory: the head that every task starts from
INPUTS = "stream:inputs"  # by input, summed sketches of old tasks' inputs, see strategies/continual/moments.py
FEATURES = "stream:features"  # sums of features by class and their sketch, see fedlora/continual/router.py
_MEMBERS = "stream:members"


def sealed_in_order(state: GlobalState) -> list[Task]:
    """The sealed tasks, in the order in which they were sealed."""
    return sorted((t for t in state.tasks.values() if t.sealed), key=lambda t: t.statistics["sealed"])


def blocks_known(state: GlobalState, task: str, way: str) -> tuple[Block, ...]:
    """The blocks of W_eff for an input that is known to be of `task`: what the task was trained on top of, and its own.

    Under the ways whose one pair moves on there is one W_eff for all tasks. A task that is not sealed has what is
    there now.
    """
    tasks = sealed_in_order(state)
    names = [t.name for t in tasks]
    if way in ONE_PAIR or task not in names:
        return blocks_of(state, state.tasks.values())
    if way == "separate":
        return blocks_of(state, [state.tasks[task]])
    return blocks_of(state, tasks[: names.index(task) + 1])


def blocks_of(state: GlobalState, tasks: Iterable[Task]) -> tuple[Block, ...]:
    """The blocks, and pairs as blocks, of some tasks, as they act on the base."""
    found: tuple[Block, ...] = ()
    for task in (t.full for t in tasks):
        found += task.blocks
        if task.pair is not None:
            found += (Block(adapter=task.pair.folded(), born=state.version),)
    return found


def head_of(state: GlobalState, task: str, config: RunConfig) -> dict[str, Array]:
    """The head that scores `task`: its own, or where it has not begun, the one that it would begin with."""
    found = state.tasks.get(task) or state.tasks.get(JOINT)
    return dict(found.extras) if found is not None and found.extras else joint_head(state, config)


def joint_head(state: GlobalState, config: RunConfig) -> dict[str, Array]:
    """One head for all classes: those of a task as its own head has them, all else as the task sealed last left it.

    Arrays with one entry, or row, for each of `model.labels` are taken apart; tasks without labels of their own have
    all of them. Before any task is sealed this is the head that the run began with.
    """
    head = {n: np.array(x) for n, x in state.memory.get(HEAD, {}).items()}
    labels = config.model.labels
    for task in sealed_in_order(state):
        own = task_config(config, task.name).data.labels if task.name != JOINT else ()
        rows = [labels.index(name) for name in own or labels]
        for name, x in task.extras.items():
            if len(x) == len(labels):
                head[name][rows] = x[rows]
            else:
                head[name] = np.array(x)
    return head


def first_memory(layout: Layout, members: Sequence[Member], seed: int) -> dict[str, Mapping[str, Array]]:
    """What a stream remembers before its first round: who was enrolled, and the head that every task starts from."""
    table = json.dumps([[m.id, m.rank, m.scale] for m in sorted(members, key=lambda m: m.id)])
    memory: dict[str, Mapping[str, Array]] = {_MEMBERS: {"json": np.frombuffer(table.encode(), np.uint8)}}
    if layout.head:
        memory[HEAD] = new_head(layout, seed)
    return memory


def members_of(state: GlobalState, leg: Leg) -> list[Member]:
    """Who has the task, of everybody who was enrolled when the run began."""
    table = json.loads(bytes(state.memory[_MEMBERS]["json"]))
    return [Member(id=name, rank=rank, scale=scale) for name, rank, scale in table if leg.holds(name)]


def bounded(member: Member, rank: int | None, subspace: Subspace | None = None) -> Member:
    """The member at the rank that a task, or its subspace, leaves it."""
    most = min(rank or member.rank, member.rank if subspace is None else subspace.dim)
    return replace(member, rank=min(member.rank, most))


def _owner(task: str) -> str:
    return f"task:{task}:"


def owned(state: GlobalState, task: str) -> dict[str, Mapping[str, Array]]:
    """What the method of one task remembers."""
    prefix = _owner(task)
    return {owner.removeprefix(prefix): x for owner, x in state.memory.items() if owner.startswith(prefix)}


def with_owned(state: GlobalState, task: str, memory: Mapping[str, Mapping[str, Array]]) -> GlobalState:
    prefix = _owner(task)
    rest = {owner: x for owner, x in state.memory.items() if not owner.startswith(prefix)}
    return replace(state, memory={**rest, **{prefix + owner: x for owner, x in memory.items()}})


def remembering(state: GlobalState, owner: str, arrays: Mapping[str, Array]) -> GlobalState:
    return replace(state, memory={**state.memory, owner: dict(arrays)})
