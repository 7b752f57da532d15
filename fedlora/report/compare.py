"""The table of a comparison: one row a method, and the rows that users always ask for beside it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment

from fedlora.errors import CheckpointError
from fedlora.report.numbers import decimal, duration, percent, size
from fedlora.report.page import COMPARISON, STYLE

HEADS = ("method", "score", "loss", "bytes up", "bytes down", "time")


@dataclass(frozen=True, kw_only=True)
class ComparisonRow:
    """The final round of one method over its seeds: means, and the sample standard deviation of the score."""

    method: str  # or `bare base`, `local only`, `centralised`
    seeds: int
    score: float | None = None
    score_sd: float | None = None
    loss: float | None = None
    bytes_up: float | None = None  # a run, all clients and rounds
    bytes_down: float | None = None
    seconds: float | None = None  # a run


def cells(row: ComparisonRow) -> tuple[str, ...]:
    """The row as people read it, in the order of `HEADS`."""
    score = percent(row.score, 1)
    if row.score is not None and row.score_sd is not None:
        score = f"{100 * row.score:.1f} ± {100 * row.score_sd:.1f} %"
    return row.method, score, decimal(row.loss), size(row.bytes_up), size(row.bytes_down), duration(row.seconds)


def comparison_markdown(rows: Sequence[ComparisonRow]) -> str:
    """The table in Markdown, padded so that it reads well as plain text too."""
    table = [HEADS, *(tuple(c.replace("|", "\\|") for c in cells(row)) for row in rows)]
    widths = [max(len(line[i]) for line in table) for i in range(len(HEADS))]

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
