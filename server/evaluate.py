"""What is evaluated and how it adds up; and the server's own score, if it has test rows and holds the base."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from fedlora.adapter import Array
from fedlora.config import RunConfig
from fedlora.continual.router import EXPERTS, fit, largest, nearest_class
from fedlora.continual.router import task_names as seen_tasks
from fedlora.state import Ask, Block, GlobalState, PublicPair, keyed
from fedlora.wire import blocks_id
from strategies.continual.views import FEATURES, blocks_known, blocks_of, head_of, joint_head
from strategies.ffa_lora import checksum

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


def test_tokens(config: RunConfig, base: Base) -> list[TokenRow]:
    """The server's test rows of one run or task as tokens; empty if the settings give none. Raises: DataError."""
    from fedlora.data import test_rows
    from fedlora.data.prompt import prompt_format
    from fedlora.data.report import tell

    rows = test_rows(config)
    if not rows:
        return []
    encoded, left_out = prompt_format(config, base.tokenizer).encode(rows)
    tell(left_out, "test rows")
    return encoded


test_tokens.__test__ = False  # type: ignore[attr-defined]  # not a pytest function


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


def tasks_blocks(state: GlobalState, tasks: Sequence[str], way: str) -> tuple[tuple[Block, ...], NDArray[np.float64]]:
    """The different blocks that these tasks know, and how often each task has each, `[tasks, blocks]`.

    With weights p over tasks, `p @` that is what every block of a mixture counts: of a task's adapter as much as all
    tasks that were trained on top of it together, which is 1 for the first; under `separate` its own task's weight.
    """
    held = [blocks_known(state, task, way) for task in tasks]
    ids = [[blocks_id([block]) for block in blocks] for blocks in held]
    named = {
        name: block for names, blocks in zip(ids, held, strict=True) for name, block in zip(names, blocks, strict=True)
    }
    return tuple(named.values()), np.array([[float(names.count(name)) for name in named] for names in ids])


class TaskRows:
    """Scores a run with tasks on the server's rows of each.

    Ways of inference. `summed`: all adapters at once, the task known for its head and classes alone. `known`: what the
    task was sealed with, its adapter on top of those before it. `open`: all adapters, one head, all classes compete.
    `weighed`: the same, but each task's classes weigh as much as the task is likely by the router, which sees the
    frozen base's features alone. `routed`: the likeliest task decides adapters and head; `routing` is the share of rows
    whose task was found. `mixed`: the `experts` likeliest tasks, each as much as it is likely, mix their adapters for
    every row and answer with their own heads, `p(class | row) = sum_t p_t p(class | row, task t)`, as a mixture of
    experts does; for a row of which the router is sure this is `routed`.
    """

    __test__ = False  # not a pytest class

    def __init__(
        self,
        base: Base,
        rows: Mapping[str, Sequence[TokenRow]],
        config: RunConfig,
        *,
        batch_size: int,
        experts: int = EXPERTS,
    ) -> None:
        self._base, self._rows, self._config, self._batch_size = base, rows, config, batch_size
        self._experts = experts
        self._features: dict[str, NDArray[np.float32]] = {}

    def scores(self, state: GlobalState, names: Sequence[str]) -> dict[str, dict[str, float]]:
        if self._config.continual.method == "nearest-mean":
            return {n: self._nearest(state, n) for n in names}
        return {n: self._score(*self._at_last(state, n), self._rows[n]) for n in names}

    def right(self, state: GlobalState) -> dict[str, NDArray[np.bool_]]:
        """What `scores` counts, row by row `[rows]`, of every task that has test rows."""
        from fedlora.evaluation.score import outcomes
        from fedlora.training.attach import attach

        found = {}
        for name, rows in self._rows.items():
            if self._config.continual.method == "nearest-mean":
                found[name] = self._near(state, name, rows[0].choices)
                continue
            blocks, head = self._at_last(state, name)
            attach(self._base, blocks, blocks_id(blocks), None, head)
            found[name] = outcomes(self._base, rows, batch_size=self._batch_size).right
        return found

    def _at_last(self, state: GlobalState, name: str) -> tuple[tuple[Block, ...], dict[str, Array]]:
        """Everything that was learnt (under `separate` for this task alone), and the task's own head."""
        way = self._config.continual.method
        blocks = blocks_of(state, state.tasks.values())
        if way == "separate":
            blocks = blocks_known(state, name, way) if name in state.tasks else ()
        return blocks, head_of(state, name, self._config)

    def inference(self, state: GlobalState) -> dict[str, dict[str, dict[str, float]]]:
        way, names = self._config.continual.method, list(self._rows)
        everything = blocks_of(state, state.tasks.values())
        head = joint_head(state, self._config)
        found: dict[str, dict[str, dict[str, float]]] = {
            key: {} for key in ("summed", "known", "open", "weighed", "mixed", "routed", "routing")
        }
        beliefs = self._beliefs(state)
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
            if beliefs is None:
                continue
            tasks, likely = beliefs[0], beliefs[1][name]
            if way != "separate" and rows[0].choices is not None:
                found["weighed"][name] = self._weighed(everything, head, rows, tasks, likely)
            found["mixed"][name] = self._mixed(state, rows, tasks, likely)
            to, right = np.array(tasks)[likely.argmax(1)], 0.0
            for other in sorted(set(to)):
                moved = self._as_of(other, [rows[int(i)] for i in np.flatnonzero(to == other)])
                if moved:
                    sums = self._score(blocks_known(state, other, way), head_of(state, other, self._config), moved)
                    right += sums["correct"]
            found["routed"][name] = {"score": right / len(rows), "counted": float(len(rows))}
            found["routing"][name] = {"score": float(np.mean(to == name)), "counted": float(len(rows))}
        return {name: tasks for name, tasks in found.items() if tasks}

    def _as_of(self, task: str, rows: Sequence[TokenRow]) -> list[TokenRow]:
        """The rows as rows of `task`; those whose class the task does not have cannot be right, and are left out."""
        choices = self._rows[task][0].choices
        there = [row for row in rows if row.label is None or choices is None or row.label in choices]
        return [replace(row, choices=choices) for row in there]

    def _weighed(
        self,
        blocks: tuple[Block, ...],
        head: Mapping[str, Array],
        rows: Sequence[TokenRow],
        tasks: Sequence[str],
        likely: NDArray[np.float64],
    ) -> dict[str, float]:
        """All classes compete, each with its share among its task's classes times how likely the task is."""
        from fedlora.evaluation.score import all_logits
        from fedlora.training.attach import attach

        attach(self._base, blocks, blocks_id(blocks), None, head)
        logits = all_logits(self._base, rows, batch_size=self._batch_size)
        return self._compete(np.repeat(logits[:, None], len(tasks), 1), rows, tasks, likely)

    def _mixed(
        self, state: GlobalState, rows: Sequence[TokenRow], tasks: Sequence[str], likely: NDArray[np.float64]
    ) -> dict[str, float]:
        """The likeliest tasks' adapters and heads, mixed for every row, in one forward pass."""
        from fedlora.evaluation.score import all_logits, score
        from fedlora.training.attach import mixture

        blocks, known = tasks_blocks(state, tasks, self._config.continual.method)
        heads = [head_of(state, task, self._config) for task in tasks]
        weights = largest(likely, self._experts)
        with mixture(self._base, blocks, known, weights, heads) as gates:
            if not self._base.head:
                return _share(score(self._base, rows, batch_size=self._batch_size, gates=gates))
            logits = all_logits(self._base, rows, batch_size=self._batch_size, gates=gates)
        return self._compete(logits, rows, tasks, weights)

    def _compete(
        self,
        logits: NDArray[np.float32],
        rows: Sequence[TokenRow],
        tasks: Sequence[str],
        likely: NDArray[np.float64],
    ) -> dict[str, float]:
        """All classes compete: from logits by task `[rows, tasks, classes]` each class has its share among its task's
        classes times how likely the task is."""
        shares = np.zeros((len(rows), logits.shape[2]))
        for i, task in enumerate(tasks):
            own = list(self._rows[task][0].choices or range(logits.shape[2]))
            found = logits[:, i, own].astype(np.float64)
            raised = np.exp(found - found.max(1, keepdims=True))
            shares[:, own] += likely[:, i, None] * raised / raised.sum(1, keepdims=True)
        labels = np.array([row.label for row in rows])
        return {"score": float(np.mean(shares.argmax(1) == labels)), "counted": float(len(rows))}

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

    def _beliefs(self, state: GlobalState) -> tuple[tuple[str, ...], dict[str, NDArray[np.float64]]] | None:
        """The tasks in the router's order, and by test set how likely each row is of each `[n, tasks]`; None where
        nothing was summed, or there is one task."""
        saved = state.memory.get(FEATURES, {})
        if len(seen_tasks(saved)) < 2 or self._config.continual.method in ("nearest-mean", "joint"):
            return None
        router = fit(saved, self._config.seed)
        return router.names, {n: router.routed(self._of(n))[1] for n in self._rows}

    def _nearest(self, state: GlobalState, name: str) -> dict[str, float]:
        """Nearest class mean: among the task's own classes, and among all."""
        choices = self._rows[name][0].choices
        right = {k: self._near(state, name, c) for k, c in (("correct", choices), ("correct_open", None))}
        return {"counted": float(len(self._rows[name])), **{k: float(x.sum()) for k, x in right.items()}}

    def _near(self, state: GlobalState, name: str, allowed: Sequence[int] | None) -> NDArray[np.bool_]:
        """Whether the nearest mean of the allowed classes is that of the row's own; no row's, before the task."""
        rows, saved = self._rows[name], state.memory.get(FEATURES, {})
        if name not in seen_tasks(saved):
            return np.zeros(len(rows), np.bool_)
        labels = np.array([row.label for row in rows])
        return np.asarray(nearest_class(saved, self._of(name), allowed) == labels, np.bool_)


def _share(sums: Mapping[str, float], key: str = "correct") -> dict[str, float]:
    return {"score": sums[key] / sums["counted"], "counted": sums["counted"]}
