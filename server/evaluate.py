"""What is evaluated and how it adds up; and the server's own score, if it has test rows and holds the base."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from fedlora.adapter import Array
from fedlora.config import RunConfig
from fedlora.continual.prototypes import Prototypes
from fedlora.state import Ask, Block, GlobalState, PublicPair, keyed
from fedlora.wire import blocks_id
from strategies.ffa_lora import checksum
from strategies.streams import PROTOTYPES, blocks_known, blocks_of, head_of, joint_head

if TYPE_CHECKING:
    from fedlora.base import Base
    from fedlora.data.rows import TokenRow


class Evaluator(Protocol):
    """What the server can measure by itself, if it was given data and has the base."""

    def __call__(self, state: GlobalState) -> Mapping[str, float]: ...


class TestRows:
    """Scores a state on rows that belong to the server: sums as `fedlora.evaluation.score.score` gives them."""

    __test__ = False  # not a pytest class

    def __init__(self, base: Base, rows: Sequence[TokenRow], *, batch_size: int) -> None:
        self._base = base
        self._rows = rows
        self._batch_size = batch_size

    def __call__(self, state: GlobalState) -> Mapping[str, float]:
        from fedlora.evaluation.score import score  # torch, which a server that only aggregates may lack
        from fedlora.training.attach import attach

        blocks = _blocks(state)
        pair = state.open_task.pair
        if pair is not None:
            blocks += (Block(adapter=pair.folded(), born=state.version),)
        attach(self._base, blocks, blocks_id(blocks), None, state.open_task.extras)
        return score(self._base, self._rows, batch_size=self._batch_size)


def evaluation_ask(state: GlobalState) -> Ask:
    """The whole of W_eff, and the head: what every client evaluates. A public A stays at home."""
    task, blocks, head = state.open_task, _blocks(state), keyed("head", state.open_task.extras)
    if task.pair is None:
        return Ask(blocks=blocks, arrays=head)
    if task.public_seed is None:
        return Ask(blocks=blocks, frozen=task.pair, arrays=head)
    probes = {n: checksum(f, n, task.public_seed) for n, f in task.pair.items()}
    arrays = keyed("B", {n: f.b for n, f in task.pair.items()}) | keyed("probe", probes) | head
    first = next(iter(task.pair.values()))
    public = PublicPair(seed=task.public_seed, rows=first.rank, scale=first.scale)
    return Ask(blocks=blocks, public=public, arrays=arrays)


def _blocks(state: GlobalState) -> tuple[Block, ...]:
    return tuple(b for t in state.tasks.values() for b in t.blocks)


def summary(sums: Mapping[str, float], *, groups: bool = True) -> dict[str, Any]:
    """Score and mean loss from the sums that `fedlora.evaluation.score` returns; groups sorted by name."""
    counted, tokens = sums.get("counted", 0.0), sums.get("tokens", 0.0)
    result: dict[str, Any] = {"counted": counted}
    if counted:
        result["score"] = sums["correct"] / counted
    if counted and "correct_open" in sums:
        result["score_open"] = sums["correct_open"] / counted
    if tokens:
        result["loss"] = sums["loss"] / tokens
    if groups:
        names = sorted(k.split("/", 1)[1] for k in sums if k.startswith("counted/"))
        result["groups"] = {g: {"correct": sums[f"correct/{g}"], "counted": sums[f"counted/{g}"]} for g in names}
    return result


class TasksEvaluator(Protocol):
    """What the server can measure of a run with tasks, if it has test rows of them and holds the base."""

    def scores(self, state: GlobalState, names: Sequence[str]) -> dict[str, dict[str, float]]:
        """Sums by task, each with everything that was learnt attached and the task's own head."""
        ...

    def inference(self, state: GlobalState) -> dict[str, dict[str, dict[str, float]]]:
        """At the end of a run, by way to tell an input's task, and by task: `score` and `counted`."""
        ...


class TaskRows:
    """Scores a run with tasks on the server's rows of each.

    Ways of inference. `summed`: all adapters at once, the task known for its head and classes alone. `known`: what the
    task was sealed with, its adapter on top of those before it. `open`: all adapters, one head, all classes compete.
    `routed`: the task whose prototype is nearest to the frozen base's feature decides adapters and head; `routing` is
    the share of rows whose task was found.
    """

    __test__ = False  # not a pytest class

    def __init__(
        self, base: Base, rows: Mapping[str, Sequence[TokenRow]], config: RunConfig, *, batch_size: int
    ) -> None:
        self._base, self._rows, self._config, self._batch_size = base, rows, config, batch_size
        self._features: dict[str, NDArray[np.float32]] = {}

    def scores(self, state: GlobalState, names: Sequence[str]) -> dict[str, dict[str, float]]:
        way = self._config.continual.method
        if way == "nearest-mean":
            return {n: self._nearest(state, n) for n in names}
        found = {}
        for name in names:
            blocks = blocks_of(state, state.tasks.values())
            if way == "separate":
                blocks = blocks_known(state, name, way) if name in state.tasks else ()
            found[name] = self._score(blocks, head_of(state, name, self._config), self._rows[name])
        return found

    def inference(self, state: GlobalState) -> dict[str, dict[str, dict[str, float]]]:
        way, names = self._config.continual.method, list(self._rows)
        everything = blocks_of(state, state.tasks.values())
        head = joint_head(state, self._config)
        found: dict[str, dict[str, dict[str, float]]] = {
            "summed": {},
            "known": {},
            "open": {},
            "routed": {},
            "routing": {},
        }
        routes = self._routes(state)
        for name in names:
            rows = self._rows[name]
            if way == "nearest-mean":
                sums = self._nearest(state, name)
                found["known"][name] = _share(sums)
                found["open"][name] = _share(sums, "correct_open")
                continue
            known = self._score(blocks_known(state, name, way), head_of(state, name, self._config), rows)
            found["known"][name] = _share(known)
            if way != "separate":
                found["summed"][name] = _share(self._score(everything, head_of(state, name, self._config), rows))
                opened = self._score(everything, head, rows)
                found["open"][name] = _share(opened, "correct_open" if "correct_open" in opened else "correct")
            if routes is not None:
                to, right = routes[name], 0.0
                for other in sorted(set(to)):
                    some = [rows[int(i)] for i in np.flatnonzero(to == other)]
                    allowed = self._rows[other][0].choices
                    moved = [
                        replace(row, choices=allowed)
                        for row in some
                        if row.label is None or allowed is None or row.label in allowed
                    ]
                    if moved:
                        sums = self._score(blocks_known(state, other, way), head_of(state, other, self._config), moved)
                        right += sums["correct"]
                found["routed"][name] = {"score": right / len(rows), "counted": float(len(rows))}
                found["routing"][name] = {"score": float(np.mean(to == name)), "counted": float(len(rows))}
        return {name: tasks for name, tasks in found.items() if tasks}

    def _score(
        self, blocks: tuple[Block, ...], head: Mapping[str, Array], rows: Sequence[TokenRow]
    ) -> dict[str, float]:
        from fedlora.evaluation.score import score
        from fedlora.training.attach import attach

        attach(self._base, blocks, blocks_id(blocks), None, head)
        return score(self._base, rows, batch_size=self._batch_size)

    def _of(self, name: str) -> NDArray[np.float32]:
        """Features of the bare base, computed once."""
        from fedlora.training.measure import features

        if name not in self._features:
            self._features[name] = features(self._base, self._rows[name], batch_size=self._batch_size)
        return self._features[name]

    def _routes(self, state: GlobalState) -> dict[str, NDArray[np.str_]] | None:
        """The task that each row is taken to be of; None where nothing was summed, or there is one task."""
        saved = state.memory.get(PROTOTYPES)
        if saved is None or self._config.continual.method in ("nearest-mean", "joint"):
            return None
        prototypes = Prototypes.from_arrays(saved)
        if len(prototypes.names) < 2:
            return None
        return {n: np.array(prototypes.names)[prototypes.routed(self._of(n))[0]] for n in self._rows}

    def _nearest(self, state: GlobalState, name: str) -> dict[str, float]:
        """Nearest class mean: among the task's own classes, and among all."""
        rows = self._rows[name]
        counted = float(len(rows))
        saved = state.memory.get(PROTOTYPES)
        if saved is None or name not in state.tasks:
            return {"counted": counted, "correct": 0.0, "correct_open": 0.0}
        prototypes, found = Prototypes.from_arrays(saved), self._of(name)
        labels = np.array([row.label for row in rows])
        right = {
            key: float(np.sum(prototypes.nearest_class(found, allowed) == labels))
            for key, allowed in (("correct", rows[0].choices), ("correct_open", None))
        }
        return {"counted": counted, **right}


def _share(sums: Mapping[str, float], key: str = "correct") -> dict[str, float]:
    return {"score": sums[key] / sums["counted"], "counted": sums["counted"]}
