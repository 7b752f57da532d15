"""The table of a comparison: one row a method, and the rows that users always ask for beside it.

With tasks: one row a way to keep them apart, and a picture of what became of each task under it.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from jinja2 import Environment
from markupsafe import Markup

from fedlora.errors import CheckpointError
from fedlora.report.charts import Series, curve_chart, line_chart
from fedlora.report.numbers import NOTHING, decimal, duration, percent, size
from fedlora.report.page import COMPARISON, STYLE, WAYS_PAGE

HEADS = ("method", "score", "own rows", "loss", "bytes up", "bytes down", "time")


WAY_HEADS: Final = (
    "way",
    "AA",
    "BWT",
    "forgetting",
    "plasticity",
    "AA, task known",
    "AA, all classes",
    "AA, weighed",
    "AA, task found",
    "routing",
    "bytes up",
    "bytes down",
    "time",
)
WAYS_TOLD: Final = (
    ("AA", "average accuracy, the mean score of all tasks after the last; all adapters, and the task gives its head"),
    ("BWT", "backward transfer, what later tasks changed in earlier ones since these were trained; below zero is lost"),
    ("forgetting", "how far earlier tasks stand below the best that they had reached before the last one"),
    ("plasticity", "the mean score of each task right after it was trained: how well it was learnt"),
    ("task known", "the task gives its head, and its adapter on those before it"),
    ("all classes", "no task is given or guessed: all adapters, one head, the classes of all tasks compete"),
    ("weighed", "the same, and each task's classes weigh as much as the task is likely"),
    ("task found", "a router that sees the bare base's features picks the task; routing: how often it is right"),
)
_LINES: Final = 12  # of a chart; of more tasks the first
_VALUES: Final = 6  # lines up to which the last value stands beside a line's name


@dataclass(frozen=True, kw_only=True)
class ComparisonRow:
    """The final round of one method over its seeds: means, and the sample standard deviation of the score."""

    method: str  # or `bare base`, `local only`, `centralised`
    seeds: int
    codec: str = ""  # of this row, where several are compared
    score: float | None = None
    score_sd: float | None = None
    own: float | None = None  # of the clients' held-out rows, each client its own
    own_sd: float | None = None
    loss: float | None = None
    bytes_up: float | None = None  # a run, all clients and rounds
    bytes_down: float | None = None
    seconds: float | None = None  # a run


@dataclass(frozen=True, kw_only=True)
class Figure:
    """A mean over seeds, and the sample standard deviation; None with one seed."""

    mean: float
    sd: float | None = None


@dataclass(frozen=True, kw_only=True)
class TaskCell:
    """One task after one border: its score over the seeds, and in how many of them it counts as forgotten."""

    score: Figure | None
    own: bool  # this border sealed it
    ahead: bool  # it is not sealed yet
    forgotten: int


@dataclass(frozen=True, kw_only=True)
class WayRow:
    """A way to keep tasks apart over its seeds. Shares from 0 to 1, differences of shares, bytes, seconds.

    `matrix` has a row for each border and a column for each of `tasks`; `untrained` a column for each.
    """

    way: str
    seeds: int
    average_accuracy: Figure | None
    backward_transfer: Figure | None
    forgetting: Figure | None
    plasticity: Figure | None
    known: Figure | None
    open: Figure | None
    weighed: Figure | None
    routed: Figure | None
    routing: Figure | None
    bytes_up: float  # a run, all clients and rounds
    bytes_down: float
    seconds: float  # a run
    tasks: tuple[str, ...]
    borders: tuple[tuple[str, ...], ...]
    untrained: tuple[Figure | None, ...]
    matrix: tuple[tuple[TaskCell, ...], ...]


def cells(row: ComparisonRow) -> tuple[str, ...]:
    """The row as people read it, in the order of `HEADS`."""
    return (
        f"{row.method} {row.codec}".rstrip(),
        _with_sd(row.score, row.score_sd),
        _with_sd(row.own, row.own_sd),
        decimal(row.loss),
        size(row.bytes_up),
        size(row.bytes_down),
        duration(row.seconds),
    )


def _with_sd(mean: float | None, sd: float | None) -> str:
    if mean is None or sd is None:
        return percent(mean, 1)
    return f"{100 * mean:.1f} ± {100 * sd:.1f} %"


def curve(rows: Sequence[ComparisonRow]) -> str:
    """Score against all bytes, up and down, one line a method through its codecs; empty where there is one codec."""
    lines: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        score = row.score if row.score is not None else row.own
        if row.codec and score is not None and row.bytes_up is not None and row.bytes_down is not None:
            lines.setdefault(row.method, []).append((row.bytes_up + row.bytes_down, score))
    if not any(len(points) > 1 for points in lines.values()):
        return ""
    series = [
        Series(name=name, points=sorted(points), tone=i % 5 + 1)
        for i, (name, points) in enumerate(sorted(lines.items()))
    ]
    return curve_chart("Score against bytes, up and down", series, lambda y: percent(y, 1), size)


def comparison_markdown(rows: Sequence[ComparisonRow]) -> str:
    """The table in Markdown."""
    return markdown_table([HEADS, *map(cells, rows)])


def markdown_table(rows: Sequence[Sequence[str]]) -> str:
    """Rows of cells, the heads first, in Markdown, padded so that they read well as plain text too."""
    table = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]

    def line(values: Sequence[str]) -> str:
        padded = [v.ljust(w) if i == 0 else v.rjust(w) for i, (v, w) in enumerate(zip(values, widths, strict=True))]
        return "| " + " | ".join(padded) + " |"

    rule = "|" + "|".join("-" * (w + 2) if i == 0 else "-" * (w + 1) + ":" for i, w in enumerate(widths)) + "|"
    return "\n".join([line(table[0]), rule, *map(line, table[1:])]) + "\n"


def compare_table(rows: Sequence[ComparisonRow]) -> str:
    """The comparison as one self-contained HTML page."""
    view = [
        {
            "cells": cells(row),
            "width": None if row.score is None else round(100 * row.score, 2),
            "sd": row.score is not None and row.score_sd is not None,
            "left": round(100 * max((row.score or 0.0) - (row.score_sd or 0.0), 0.0), 2),
            "spread": round(200 * (row.score_sd or 0.0), 2),
            "aside": row.bytes_up is None,
        }
        for row in rows
    ]
    seeds = sorted({row.seeds for row in rows})
    return (
        Environment(autoescape=True)
        .from_string(COMPARISON)
        .render(
            style=STYLE,
            heads=HEADS,
            rows=view,
            seeds=" to ".join(map(str, seeds[:1] + seeds[1:][-1:])),
            one=seeds == [1],
            curve=Markup(curve(rows)),
        )
    )


def way_cells(row: WayRow) -> tuple[str, ...]:
    """The row as people read it, in the order of `WAY_HEADS`; scores in per cent, differences in points."""
    return (
        row.way,
        _number(row.average_accuracy),
        _number(row.backward_transfer, signed=True),
        _number(row.forgetting),
        _number(row.plasticity),
        _number(row.known),
        _number(row.open),
        _number(row.weighed),
        _number(row.routed),
        _number(row.routing),
        size(row.bytes_up),
        size(row.bytes_down),
        duration(row.seconds),
    )


def ways_table(rows: Sequence[WayRow]) -> list[tuple[str, ...]]:
    """`WAY_HEADS` and the rows as people read them, without the columns in which no way has a value."""
    table = [WAY_HEADS, *map(way_cells, rows)]
    kept = [i for i in range(len(WAY_HEADS)) if any(line[i] != NOTHING for line in table[1:])]
    return [tuple(line[i] for i in kept) for line in table]


def _told(heads: Sequence[str]) -> list[tuple[str, str]]:
    """What the columns that are there mean."""
    return [(name, what) for name, what in WAYS_TOLD if any(head in (name, f"AA, {name}") for head in heads)]


def ways_markdown(rows: Sequence[WayRow]) -> str:
    """The table in Markdown, the accuracy matrix of every way below it, and what the columns are."""
    whole = ways_table(rows)
    parts = [markdown_table(whole)]
    table = [["after", *rows[0].tasks]]
    for row in rows:
        for border, line in zip(row.borders, row.matrix, strict=True):
            table.append([f"{row.way}: {_border(row, border)}", *(_marked(row, cell) for cell in line)])
    same = all(row.tasks == rows[0].tasks for row in rows)
    parts += [markdown_table(table)] if same else []
    seeds = rows[0].seeds
    over = "One seed." if seeds == 1 else f"Mean ± standard deviation over {seeds} seeds."
    parts.append(
        f"Per cent and points. {over} [ ]: the row's own task. ▼: more than 5 points below its best so far"
        f"{'' if seeds == 1 else ', in most seeds'}.\n\n"
        + "".join(f"- {name}: {what}.\n" for name, what in _told(whole[0]))
    )
    return "\n".join(parts)


def ways_page(rows: Sequence[WayRow]) -> str:
    """The comparison of ways as one self-contained HTML page: a picture of each way, and the table."""
    seeds, (heads, *lines) = rows[0].seeds, ways_table(rows)
    return (
        Environment(autoescape=True)
        .from_string(WAYS_PAGE)
        .render(
            style=STYLE,
            heads=heads,
            rows=lines,
            told=_told(heads),
            one=seeds == 1,
            seeds=seeds,
            ways=[_picture(row) for row in rows],
        )
    )


def write_ways(folder: Path, rows: Sequence[WayRow]) -> Path:
    """Write `comparison.html` of ways into `folder`, as `write_comparison` does."""
    return write_page(folder / "comparison.html", ways_page(rows))


def _picture(row: WayRow) -> dict[str, Any]:
    """A line for each task from border to border, and the accuracy matrix under it."""
    series = []
    for at, task in enumerate(row.tasks[:_LINES]):
        start = row.untrained[at]
        points = [] if start is None else [(0.0, start.mean)]
        scores = [line[at].score for line in row.matrix]
        points += [(i + 1.0, score.mean) for i, score in enumerate(scores) if score is not None]
        series.append(Series(name=task, points=points, tone=at % 5 + 1))
    chart = line_chart(
        f"{row.way}: score of each task as tasks are sealed",
        series,
        percent,
        top=1.0,
        x_name="sealed",
        spans=[(float(i), _border(row, border)) for i, border in enumerate(row.borders)],
        values=len(series) <= _VALUES,
    )
    note = [f"AA {_number(row.average_accuracy)}"]
    note += [f"forgetting {_number(row.forgetting)}"] if row.forgetting is not None else []
    return {
        "name": row.way,
        "note": ", ".join(note),
        "chart": chart,
        "cut": _LINES if len(row.tasks) > _LINES else 0,
        "heads": row.tasks,
        "rows": [
            {
                "name": f"after {_border(row, border)}",
                "cells": [_heat(row, task, cell) for task, cell in zip(row.tasks, line, strict=True)],
            }
            for border, line in zip(row.borders, row.matrix, strict=True)
        ],
    }


def _border(row: WayRow, border: Sequence[str]) -> str:
    return "all" if len(border) > 1 and len(border) == len(row.tasks) else ", ".join(border)


def _marked(row: WayRow, cell: TaskCell) -> str:
    """A cell in Markdown."""
    text = _number(cell.score)
    return f"[{text}]" if cell.own else f"{text} ▼" if _css(row, cell) == "lost" else text


def _heat(row: WayRow, task: str, cell: TaskCell) -> tuple[float, str, str, str]:
    """A cell of the heat map: colour from 0 to 100, text, CSS class, title."""
    if cell.score is None:
        return 0.0, NOTHING, _css(row, cell), f"{task}: not scored"
    css, mean = _css(row, cell), Figure(mean=cell.score.mean)
    return (
        round(100 * mean.mean),
        f"{'▼ ' if css == 'lost' else ''}{_number(mean)}",
        css,
        f"{task}: {_number(cell.score)}",
    )


def _css(row: WayRow, cell: TaskCell) -> str:
    if cell.ahead:
        return "ahead"
    return "own" if cell.own else "lost" if 2 * cell.forgotten > row.seeds else ""


def _number(figure: Figure | None, *, signed: bool = False) -> str:
    """A share or a difference in per cent or points, with its standard deviation if there is one."""
    if figure is None:
        return NOTHING
    mean = f"{round(100 * figure.mean, 1) + 0.0:{'+' if signed else ''}.1f}".replace("-", "−")
    return mean if figure.sd is None else f"{mean} ± {100 * figure.sd:.1f}"


def write_comparison(folder: Path, rows: Sequence[ComparisonRow]) -> Path:
    """Write `comparison.html` into `folder`, in one step; returns its path. Raises: CheckpointError as `write_page`."""
    return write_page(folder / "comparison.html", compare_table(rows))


def write_page(path: Path, text: str) -> Path:
    """A whole page or the old one: never half of it. Raises: CheckpointError if the disk refuses."""
    new = path.with_suffix(".new")
    try:
        new.write_text(text, encoding="utf-8")
        os.replace(new, path)
    except OSError as error:
        raise CheckpointError(
            f"{path}: cannot write the page: {error.strerror or error}; free some space or allow writing there, and "
            "write it again"
        ) from error
    return path
