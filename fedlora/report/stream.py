"""What a run with tasks kept and lost, read from its log: the accuracy matrix, its measures, inference and overlap.

Scores are shares from 0 to 1. The measures are those of `fedlora.continual.metrics`, whose sources stand there.
"""

from __future__ import annotations

import itertools
import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final, Literal

import numpy as np

from fedlora.continual.metrics import Measures, measures
from fedlora.continual.tasks import JOINT
from fedlora.report.compare import markdown_table
from fedlora.report.numbers import NOTHING, percent

FALL: Final = 0.05  # a score lower than its best by more than this is marked as forgotten
_TINY: Final = 1e-9  # rounding of a difference of two shares

WAYS: Final[Mapping[str, tuple[str, str]]] = {
    "known": ("task known", "the task that is named gives its head and classes, and its adapter on those before it"),
    "routed": ("task found", "a router that sees the bare base's features decides which task's are used"),
    "summed": ("all adapters, own classes", "every adapter at once; the task gives its head and classes alone"),
    "open": ("all adapters, all classes", "no task is given or guessed: the classes of all tasks compete"),
    "weighed": ("the same, weighed", "each task's classes weigh as much as the router takes the task to be likely"),
    "mixed": (
        "tasks mixed",
        "the likeliest tasks' adapters and heads, mixed for every row as much as the router takes each to be likely",
    ),
    "routing": ("routing accuracy", "share of the rows whose task was found, whatever was then answered"),
}

NEAR: Final = ("overlap", "effect_on_old", "similarity/")  # of a task with those before it
PAIRED: Final = ("overlap/", "similarity/")  # of a task with the one that is named after it
PENALTY: Final[Mapping[str, str]] = {"o-lora": "overlap_penalty", "ewc": "anchor_penalty"}  # what clients call it

NOTHING_SEALED: Final = "nothing was sealed before it"
NO_A: Final = "no A was trained"
NOT_TOLD: Final = "clients did not tell"
SEALING: Final = (
    "overlap",
    "overlap_largest",
    "overlap_product",
    "overlap_random",
    "effect_on_old",
    "sealed_error_relative",
    "inputs_seen",
)

Json = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Border:
    """The scores after a round in which tasks were sealed, by task; tasks that were not measured are absent."""

    round: int
    sealed: tuple[str, ...]
    scores: Mapping[str, float]


@dataclass(frozen=True, kw_only=True)
class Fall:
    """A task that at some border was more than `FALL` below its best: where it ended, and its largest fall at once."""

    task: str
    best: float
    best_round: int
    final: float
    largest: float
    rounds: tuple[int, int]  # of the largest fall: after the border before, up to the border that saw it
    during: tuple[str, ...]  # the tasks that were trained in these rounds


@dataclass(frozen=True, kw_only=True)
class Stream:
    """A run with tasks, finished or not."""

    way: str  # continual.method
    tasks: tuple[str, ...]  # in the order of sealing, then those that are not sealed yet
    judge: Literal["server", "own"]  # whose rows: the server's, or what the clients held out
    trained: Mapping[int, tuple[str, ...]]  # round -> the tasks that were trained in it
    borders: tuple[Border, ...]
    untrained: Mapping[str, float]
    rows: int  # the least that any of these scores counts; 0 if not known
    inference: Mapping[str, Mapping[str, float]]  # way -> task -> score
    sealing: Mapping[str, Mapping[str, float]]  # task -> what the log says of its sealing
    penalties: Mapping[str, Mapping[int, float | str]]  # task -> round -> what the way's penalty added to the loss, or
    # why there was none; empty for a way without a penalty

    @property
    def sealed(self) -> tuple[str, ...]:
        return tuple(name for border in self.borders for name in border.sealed)

    @property
    def begun(self) -> dict[str, int]:
        """The first round of each task that has begun."""
        first: dict[str, int] = {}
        for number in sorted(self.trained):
            for name in self.trained[number]:
                first.setdefault(name, number)
        return first

    @property
    def overlapping(self) -> bool:
        """Whether two tasks were ever trained in the same round."""
        return any(len(names) > 1 for names in self.trained.values())

    def border_of(self, task: str) -> int | None:
        """The row of the matrix after which `task` was sealed."""
        return next((i for i, border in enumerate(self.borders) if task in border.sealed), None)

    def best(self, task: str, row: int) -> float | None:
        """The task's best score from its own border up to this row; None before it was sealed or measured."""
        own = self.border_of(task)
        if own is None or own > row:
            return None
        return max((b.scores[task] for b in self.borders[own : row + 1] if task in b.scores), default=None)

    def forgotten(self, task: str, row: int) -> bool:
        """Whether the score in this cell is more than `FALL` below the task's best so far."""
        best, score = self.best(task, row), self.borders[row].scores.get(task)
        return best is not None and score is not None and best - score > FALL + _TINY

    def falls(self) -> list[Fall]:
        """One for each task with a forgotten cell, the furthest below its best at the end first."""
        found = []
        for task in self.tasks:
            if not any(self.forgotten(task, row) for row in range(len(self.borders))):
                continue
            own = self.border_of(task)
            seen = [b for b in self.borders[own:] if task in b.scores]
            top = max(seen, key=lambda b: b.scores[task])
            before, after = max(itertools.pairwise(seen), key=lambda p: p[0].scores[task] - p[1].scores[task])
            span = range(before.round + 1, after.round + 1)
            found.append(
                Fall(
                    task=task,
                    best=top.scores[task],
                    best_round=top.round,
                    final=seen[-1].scores[task],
                    largest=before.scores[task] - after.scores[task],
                    rounds=(span[0], span[-1]),
                    during=tuple(dict.fromkeys(n for r in span for n in self.trained[r])),
                )
            )
        return sorted(found, key=lambda f: f.final - f.best)

    def measured(self) -> Measures | None:
        """Over the tasks sealed so far; None before the first, or where a score on or below the diagonal is missing.

        A score of a task that had begun already is no forward transfer, so that is not defined where tasks overlap;
        and nothing is before or after anything where all tasks are trained together.
        """
        order = self.sealed
        if not order:
            return None
        begun = self.begun
        R = np.full((len(order), len(order)), np.nan)
        for i, name in enumerate(order):
            border = self.borders[self.border_of(name) or 0]
            for j, other in enumerate(order):
                if j <= i or begun.get(other, math.inf) > border.round:
                    R[i, j] = border.scores.get(other, math.nan)
        if np.isnan(R[np.tril_indices(len(order))]).any():
            return None
        found = measures(R, np.array([self.untrained.get(name, math.nan) for name in order]))
        return replace(found, backward_transfer=None, forgetting=None) if self.way == "joint" else found

    def mean(self, row: int) -> float | None:
        """The mean over the tasks sealed up to this row."""
        seen = [n for b in self.borders[: row + 1] for n in b.sealed]
        scores = self.borders[row].scores
        return statistics.fmean(scores[n] for n in seen) if all(n in scores for n in seen) else None


def stream_of(events: Sequence[Json]) -> Stream | None:
    """The stream of tasks in a run's log; None for a run without tasks. Of events written twice the last counts."""
    start: Json = next((e for e in reversed(events) if e["event"] == "start"), {})
    config = start.get("config", {})
    listed = [str(table["name"]) for table in json.loads(config.get("tasks") or "[]")]
    if not listed:
        return None
    rounds = {e["round"]: e for e in events if e["event"] == "round"}
    closed = [(rounds[r], rounds[r]["border"]) for r in sorted(rounds) if "border" in rounds[r]]
    judge: Literal["server", "own"] = "server" if any(border.get("server") for _, border in closed) else "own"
    if any(JOINT in border.get(judge, {}) for _, border in closed):
        listed = [JOINT]  # clients score their rows of all tasks at once
    scored = {e["round"]: _scores(border.get(judge, {})) for e, border in closed}
    names = {e["round"]: _named(border["sealed"], listed) for e, border in closed}
    order = [name for sealed in names.values() for name in sealed]
    untrained: Json = next((e["tasks"] for e in reversed(events) if e["event"] == "untrained"), {})
    inference: Json = next((b["inference"] for _, b in reversed(closed) if "inference" in b), {})
    return Stream(
        way=str(config.get("continual.method", "")),
        tasks=(*order, *(name for name in listed if name not in order)),
        judge=judge,
        trained={r: _named(e.get("tasks", ()), listed) for r, e in rounds.items()},
        borders=tuple(Border(round=r, sealed=names[r], scores=scored[r]) for r in names),
        untrained=_scores(untrained) if judge == "server" else {},
        rows=min((int(x.get("counted", 0)) for _, b in closed for x in b.get(judge, {}).values()), default=0),
        inference={way: _scores(inference[way]) for way in WAYS if inference.get(way)},
        sealing=_sealing([(e.get("aggregate") or {}, names[e["round"]]) for e, _ in closed]),
        penalties=_penalties(rounds, str(config.get("continual.method", ""))),
    )


def _named(told: Sequence[str], tasks: Sequence[str]) -> tuple[str, ...]:
    """Trained together they are one task in the log; here they are all of them."""
    return tuple(tasks if list(told) == [JOINT] else told)


def _scores(tasks: Mapping[str, Json]) -> dict[str, float]:
    return {name: float(told["score"]) for name, told in tasks.items() if "score" in told}


def _sealing(closed: Sequence[tuple[Json, tuple[str, ...]]]) -> dict[str, dict[str, float]]:
    """By task. Of tasks sealed in one round the first that has a value has it under the plain name, others under
    `task/name`; the first task of a run overlaps with nothing."""
    found: dict[str, dict[str, float]] = {}
    for aggregate, sealed in closed:
        paired = {start + other: other for start in PAIRED for other in (*found, *sealed)}
        for key in (*SEALING, *paired):
            after = sealed[sealed.index(paired[key]) + 1 :] if paired.get(key) in sealed else sealed
            able = [n for n in after if found or n != sealed[0] or not key.startswith(NEAR)]
            for name in sealed:
                value = aggregate.get(key if able[:1] == [name] else f"{name}/{key}")
                if value is not None:
                    found.setdefault(name, {})[key] = float(value)
        for name in sealed:
            found.setdefault(name, {})
    return found


def _penalties(rounds: Mapping[int, Json], way: str) -> dict[str, dict[int, float | str]]:
    """By task and round: the penalty, mean over clients weighed by examples, in the units of the loss; or why none."""
    found: dict[str, dict[int, float | str]] = {}
    if way not in PENALTY:
        return found
    borders = [number for number, event in rounds.items() if "border" in event]
    for number in sorted(rounds):
        told: dict[str, list[Json]] = {}
        for client in rounds[number].get("clients", ()):
            if "task" in client:
                told.setdefault(client["task"], []).append(client)
        for task, clients in told.items():
            found.setdefault(task, {})[number] = _penalty(clients, way, min(borders, default=number) < number)
    return found


def _penalty(clients: Sequence[Json], way: str, sealed: bool) -> float | str:
    pressed = [c for c in clients if PENALTY[way] in c]
    if pressed:
        weights = [float(c.get("examples", 0)) for c in pressed]
        return statistics.fmean([float(c[PENALTY[way]]) for c in pressed], weights if sum(weights) else None)
    if not sealed:
        return NOTHING_SEALED
    return NO_A if way == "o-lora" and any("grad_norm" in c for c in clients) else NOT_TOLD


def points(difference: float | None) -> str:
    """A difference of two shares: `+0.6 points`."""
    return "n/a" if difference is None else f"{round(100 * difference, 1) + 0.0:+.1f} points".replace("-", "−")


def measures_told(found: Measures | None) -> list[tuple[str, str, str]]:
    """Name, value and what it is, in plain words, of each measure; `n/a` where it is not defined, and why."""
    if found is None:
        names = (
            "average accuracy (AA)",
            "backward transfer (BWT)",
            "forgetting",
            "forward transfer (FWT)",
            "plasticity",
        )
        return [(name, "n/a", "Some task was not scored when it was sealed, or not later.") for name in names]
    two = " It needs two tasks, one after another." if found.forgetting is None else ""
    ahead = (
        " It needs two tasks, one after another, and the server's test rows." if found.forward_transfer is None else ""
    )
    return [
        (
            "average accuracy (AA)",
            percent(found.average_accuracy, 1),
            "The mean score of the sealed tasks after the last of them.",
        ),
        (
            "backward transfer (BWT)",
            points(found.backward_transfer),
            f"What later tasks changed in earlier ones since these were trained; below zero is lost.{two}",
        ),
        (
            "forgetting",
            points(found.forgetting).removeprefix("+"),
            f"How far earlier tasks stand below the best that they had reached before the last one.{two}",
        ),
        (
            "forward transfer (FWT)",
            points(found.forward_transfer),
            f"What a task scored just before it was trained, less the score of the untrained model.{ahead}",
        ),
        (
            "plasticity",
            percent(found.plasticity, 1),
            "The mean score of each task right after it was trained: how well it was learnt.",
        ),
    ]


def falls_told(stream: Stream) -> list[str]:
    """A sentence for each task that was forgotten at some time: how far, when, and by what."""
    said = []
    for fall in stream.falls():
        first, last = fall.rounds
        when = f"round {first}" if first == last else f"rounds {first} to {last}"
        during = f", while {' and '.join(fall.during)} {'was' if len(fall.during) == 1 else 'were'} trained"
        below = 100 * (fall.best - fall.final)
        said.append(
            f"{fall.task} stands at {percent(fall.final, 1)}, {below:.1f} points below its best "
            f"({percent(fall.best, 1)} in round {fall.best_round}). Its largest fall at once, "
            f"{100 * fall.largest:.1f} points, came in {when}{during}."
        )
    return said


def stream_table(events: Sequence[Json]) -> str:
    """The accuracy matrix, its measures and the ways of inference in Markdown; empty for a run without tasks.

    Scores are in per cent. `[ ]` marks the task of the row, `▼` what is more than 5 points below its best so far.
    """
    stream = stream_of(events)
    if stream is None or not stream.borders:
        return ""
    parts = []
    if any(border.scores for border in stream.borders):
        rows = [["after", *stream.tasks, "mean so far"]]
        if stream.untrained:
            rows.append(["untrained", *(_number(stream.untrained.get(task)) for task in stream.tasks), ""])
        for i, border in enumerate(stream.borders):
            cells = [_marked(stream, task, i) for task in stream.tasks]
            rows.append([f"{' + '.join(border.sealed)}, round {border.round}", *cells, _number(stream.mean(i))])
        parts.append(markdown_table(rows))
        parts.append(
            f"Per cent, on rows {'of the server' if stream.judge == 'server' else 'that clients held out'}. "
            f"[ ]: the row's own task. ▼: more than {100 * FALL:.0f} points below its best so far.\n"
        )
        parts += ["".join(f"- {said}\n" for said in falls_told(stream))] if stream.falls() else []
        parts.append(markdown_table([["measure", "value"], *([n, v] for n, v, _ in measures_told(stream.measured()))]))
    if stream.inference:
        rows = [["which task is it?", *stream.tasks, "mean"]]
        for way, scores in stream.inference.items():
            rows.append(
                [
                    WAYS[way][0],
                    *(_number(scores.get(t)) for t in stream.tasks),
                    _number(statistics.fmean(scores.values())),
                ]
            )
        parts.append(markdown_table(rows))
    return "\n".join(parts)


def _number(share: float | None) -> str:
    return NOTHING if share is None else f"{100 * share:.1f}"


def _marked(stream: Stream, task: str, row: int) -> str:
    text = _number(stream.borders[row].scores.get(task))
    if task in stream.borders[row].sealed:
        return f"[{text}]"
    return f"{text} ▼" if stream.forgotten(task, row) else text
