"""The table of a comparison: one row a method, and the rows that users always ask for beside it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment
from markupsafe import Markup

from fedlora.errors import CheckpointError
from fedlora.report.charts import Series, curve_chart
from fedlora.report.numbers import decimal, duration, percent, size
from fedlora.report.page import COMPARISON, STYLE

HEADS = ("method", "score", "own rows", "loss", "bytes up", "bytes down", "time")


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
