"""A run's tasks on its page: what was forgotten, when and by what; which task an input is of; overlap."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Callable
from typing import Any, Final

from fedlora.continual.tasks import ONE_PAIR
from fedlora.report.charts import Series, heat_map, line_chart
from fedlora.report.numbers import NOTHING, decimal, percent
from fedlora.report.stream import FALL, NOT_TOLD, WAYS, Stream, falls_told, measures_told, points

LINES: Final = 12  # of the chart; of more tasks the first
NAME: Final = 14  # letters of a line's name
SPACIOUS: Final = 6  # up to so many lines have their last value beside their name
ROUNDING: Final = 1e-6  # relative errors below this are those of float32

BROAD: Final = 6  # columns of a heat map; one with more has the whole width
PAIRS: Final = (  # what the log calls it, before the other task's name; caption; meaning
    (
        "similarity/",
        "Similarity φ of two tasks' updates",
        "input directions that both work in, mean over modules: 0 none, 1 all",
    ),
    (
        "overlap/",
        "Overlap of A with each earlier task",
        "share of A in that task's rows of A, mean over modules: 0 none, 1 all",
    ),
)
PRESSED: Final = {
    "o-lora": "Penalty: what the overlap of A with earlier tasks' A added to the training loss.",
    "ewc": "Penalty: what the distance from where old tasks left the pair added to the training loss.",
}
UNMEASURED: Final = (
    "By default only input-aware tasks that another one follows are measured; continual.effects = true measures all."
)

Cell = tuple[float, str, str, str, str]  # colour from 0 to 100, text, second line, CSS class, title


def tasks_view(stream: Stream, measure: str) -> dict[str, Any] | None:
    """Matrix, chart and tables for the page; `measure` says what a score is. None before a task was sealed."""
    if not stream.borders:
        return None
    scored = any(border.scores for border in stream.borders)
    return {
        "text": _said(stream, measure) if scored else "No row was scored when tasks were sealed.",
        "matrix": _matrix(stream) if scored else None,
        "forgotten": falls_told(stream),
        "none": f"No task fell by more than {100 * FALL:.0f} points below its best." if _compared(stream) else "",
        "measures": _measures(stream) if scored else None,
        "chart": _chart(stream),
        "caption": "where tasks were sealed; above, the task in training"
        + (f"; the first {LINES} tasks" if len(stream.tasks) > LINES else ""),
        "parts": [part for part in (_inference(stream, measure), _overlap(stream)) if part],
    }


def spans(stream: Stream, before: float) -> list[tuple[float, str]]:
    """Where each task begins, `before` its first round: for a chart over rounds."""
    starts: dict[int, list[str]] = {}
    for name, number in stream.begun.items():
        starts.setdefault(number, []).append(name)
    return [(number - before, ", ".join(names)) for number, names in sorted(starts.items())]


def _compared(stream: Stream) -> bool:
    """Whether any task was scored after a later border than its own."""
    return any(
        task in border.scores
        for row, border in enumerate(stream.borders)
        for task in stream.tasks
        if (own := stream.border_of(task)) is not None and own < row
    )


def _said(stream: Stream, measure: str) -> str:
    whose = "the server's test rows" if stream.judge == "server" else "the rows that clients held out"
    text = f"Scores are {measure} on {whose}, in per cent: of every task in its column, after the tasks of the row. "
    text += "A frame marks the task that the row has just learnt, ▼ what is more than "
    text += f"{100 * FALL:.0f} points below its best so far. Small figures are the change since the row above. "
    if any(n not in b.sealed for i, b in enumerate(stream.borders) for n in b.scores if _ahead(stream, n, i)):
        text += "Grey: not learnt yet. "
    if stream.rows:
        error = math.sqrt(0.25 / stream.rows)
        text += f"A score on {stream.rows:,} rows has a standard error of up to {100 * error:.1f} points."
    return text


def _ahead(stream: Stream, task: str, row: int) -> bool:
    own = stream.border_of(task)
    return own is None or own > row


def _matrix(stream: Stream) -> dict[str, Any]:
    rows: list[dict[str, Any]] = []
    if stream.untrained:
        cells = [_plain(stream.untrained.get(task), "ahead", f"{task}, untrained") for task in stream.tasks]
        rows.append({"name": "untrained", "note": "", "cells": [*cells, _plain(None, "sep", "")]})
    for i, border in enumerate(stream.borders):
        mean = _plain(stream.mean(i), "sep", f"mean of the tasks sealed up to round {border.round}")
        rows.append(
            {
                "name": "after " + ", ".join(border.sealed),
                "note": f"round {border.round}",
                "cells": [*(_cell(stream, task, i) for task in stream.tasks), mean],
            }
        )
    return {"heads": [*stream.tasks, "mean so far"], "rows": rows}


def _plain(score: float | None, css: str, title: str) -> Cell:
    return (0.0, "", "", css, "") if score is None else (_floor(score), f"{100 * score:.1f}", "", css, title)


def _floor(score: float) -> float:
    return math.floor(100 * score)


def _cell(stream: Stream, task: str, row: int) -> Cell:
    border = stream.borders[row]
    score = border.scores.get(task)
    own = task in border.sealed
    said = f"{task} after {', '.join(border.sealed)}: {percent(score, 1)}"
    if score is None or own or _ahead(stream, task, row):
        return _plain(score, "own" if own else "ahead", said)
    above = stream.borders[row - 1].scores.get(task)
    change = "" if above is None else points(score - above).removesuffix(" points")
    if not stream.forgotten(task, row):
        return _floor(score), f"{100 * score:.1f}", change, "", said
    below = 100 * ((stream.best(task, row) or 0.0) - score)
    return _floor(score), f"▼ {100 * score:.1f}", change, "lost", f"{said}, {below:.1f} points below its best so far"


def _measures(stream: Stream) -> dict[str, Any]:
    told = measures_told(stream.measured())
    return {
        "title": "",
        "heads": [("measure", ""), ("value", ""), ("what it is", "text")],
        "rows": [[(name, ""), (value, ""), (what, "free")] for name, value, what in told],
    }


def _chart(stream: Stream) -> str:
    series = []
    for at, task in enumerate(stream.tasks[:LINES]):
        start = [(0.0, stream.untrained[task])] if task in stream.untrained else []
        seen = [(float(b.round), b.scores[task]) for b in stream.borders if task in b.scores]
        name = task if len(task) <= NAME else f"{task[: NAME // 2]}…{task[1 - NAME // 2 :]}"
        series.append(Series(name=name, points=start + seen, tone=at % 5 + 1))
    return line_chart(
        "Score of each task", series, percent, top=1.0, spans=spans(stream, 1.0), values=len(series) <= SPACIOUS
    )


def _inference(stream: Stream, measure: str) -> dict[str, Any] | None:
    if not stream.inference:
        return None
    rows = []
    for way, scores in stream.inference.items():
        name, what = WAYS[way]
        cells = [(percent(scores.get(task), 1), "") for task in stream.tasks]
        rows.append([(name, ""), *cells, (percent(statistics.fmean(scores.values()), 1), "mean"), (what, "free")])
    heads = [("", ""), *((task, "") for task in stream.tasks), ("mean", ""), ("how", "text")]
    return {
        "heading": "Which task is it?",
        "text": f"After the last round, on the server's test rows: {measure} by the way that an input's task is known "
        "or guessed.",
        "tables": [{"title": "", "heads": heads, "rows": rows}],
    }


def _overlap(stream: Stream) -> dict[str, Any] | None:
    """Heat maps of what the tasks' updates have in common, and what else the log says of training and sealing them."""
    sealing = {name: dict(told) for name, told in stream.sealing.items()}
    known = {key for told in sealing.values() for key in told}
    figures = [figure for figure in (*(_pairs(sealing, *about) for about in PAIRS), _shared_rows(sealing)) if figure[2]]
    columns: list[tuple[str, str, Callable[[str], str]]] = []
    said = ["No overlap does not mean that nothing is forgotten."] if figures else []
    notes = ""
    if any(name in stream.penalties for name in sealing):
        columns += [
            ("penalty, first round", "", lambda name: _penalty(stream, name, 0)),
            ("penalty, last round", "", lambda name: _penalty(stream, name, -1)),
            ("rounds without it", "text", lambda name: _unpenalised(stream, name)),
        ]
        said.append(f"{PRESSED[stream.way]} It is a mean over clients, weighed by their rows, in the first and in the ")
        said[-1] += "last round of the task that had one."
    if "effect_on_old" in known or ("inputs_seen" in known and stream.way != "joint"):
        columns.append(("effect on old inputs", "", lambda name: decimal(sealing[name].get("effect_on_old"))))
        said.append("Effect on old inputs: how much a task's update changes what old tasks' inputs give, beside what ")
        said[-1] += "it changes of its own, as the root of a ratio of squares: 1 is as much, 0 nothing."
        notes = _unmeasured(stream)
    if any(told.get("sealed_error_relative", 0.0) > ROUNDING for told in sealing.values()):
        columns.append(("lost when sealed", "", lambda name: percent(sealing[name].get("sealed_error_relative"), 1)))
        said.append("Lost when sealed: the share of the task's update that was cut off.")
    if "inputs_seen" in known:
        columns.append(("inputs seen", "", lambda name: percent(sealing[name].get("inputs_seen"))))
        said.append("Inputs seen: the share of the squared norm of a task's inputs that its sketch holds.")
    if not columns and not figures:
        return None
    table = {
        "title": "",
        "heads": [("sealed task", ""), *((head, css) for head, css, _ in columns)],
        "rows": [[(name, ""), *((show(name), css) for _, css, show in columns)] for name in sealing],
    }
    return {
        "heading": "Overlap of the tasks" if figures else "What each task was under",
        "text": " ".join(said),
        "figures": figures,
        "tables": [table] if columns else [],
        "note": notes,
    }


def _penalty(stream: Stream, task: str, at: int) -> str:
    """In the first (0) or the last (-1) round that had one."""
    told = stream.penalties.get(task, {}).values()
    values = [value for value in told if not isinstance(value, str)]
    if values:
        return decimal(values[at])
    return NOTHING if NOT_TOLD in told or not told else "0"


def _unpenalised(stream: Stream, task: str) -> str:
    """How many of a task's rounds had no penalty, by the reason: `all: no A was trained`."""
    told = stream.penalties.get(task, {})
    counts = Counter(value for value in told.values() if isinstance(value, str))
    return "; ".join(f"{'all' if n == len(told) else f'{n} of {len(told)}'}: {why}" for why, n in counts.items())


def _unmeasured(stream: Stream) -> str:
    """Why some tasks have no effect on old inputs; empty where all have."""
    first = next(iter(stream.sealing))
    why = []
    for name, told in stream.sealing.items():
        if "effect_on_old" in told:
            continue
        if name == first:
            why.append(f"Nothing was sealed before {name}.")
        elif "inputs_seen" not in told:
            why.append(UNMEASURED)
        elif stream.way in ONE_PAIR:
            why.append(f"Under {stream.way} one pair goes on from task to task: none has an update of its own.")
        else:
            why.append("A task in which nothing was trained has no update.")
    return f"{NOTHING} means not measured. {' '.join(dict.fromkeys(why))}" if why else ""


def _pairs(sealing: dict[str, dict[str, float]], key: str, title: str, note: str) -> tuple[str, str, str, str]:
    """Caption, meaning, heat map and CSS class: every sealed task against each before it."""
    rows = [name for name, told in sealing.items() if any(other.startswith(key) for other in told)]
    before = [name for name in sealing if any(key + name in told for told in sealing.values())]
    cells = [[sealing[name].get(key + other) for other in before] for name in rows]
    svg = heat_map(title, rows, before, cells, decimal) if rows else ""
    return title, note, svg, "broad" if len(before) > BROAD else ""


def _shared_rows(sealing: dict[str, dict[str, float]]) -> tuple[str, str, str, str]:
    """Caption, meaning, heat map and CSS class: every sealed task against all before it together."""
    title = "Overlap with all earlier tasks"
    names = {
        "overlap": "A, mean",
        "overlap_largest": "A, largest",
        "overlap_product": "BA, mean",
        "overlap_random": "random",
    }
    keys = [key for key in names if any(key in told for told in sealing.values())]
    rows = [name for name, told in sealing.items() if any(key in told for key in keys)]
    cells = [[sealing[name].get(key) for key in keys] for name in rows]
    note = "share of A, and of BA, in earlier tasks' rows; and what chance gives"
    svg = heat_map(title, rows, [names[key] for key in keys], cells, decimal) if rows else ""
    return title, note, svg, ""
