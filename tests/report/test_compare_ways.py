"""Ways to keep tasks apart, compared: the table and the page from rows whose figures are given."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest

from fedlora.report.compare import (
    Figure,
    TaskCell,
    WayRow,
    way_cells,
    ways_markdown,
    ways_page,
    ways_table,
    write_ways,
)

TASKS = ("dates", "<b>records</b>", "numbers")


def way_row(way: str, matrix: Sequence[Sequence[float]], *, seeds: int = 3, forgotten: int = 3) -> WayRow:
    """One task a border, in order; below the diagonal all is forgotten in `forgotten` seeds."""
    sd = None if seeds == 1 else 0.02
    return WayRow(
        way=way,
        seeds=seeds,
        average_accuracy=Figure(mean=0.614, sd=sd),
        backward_transfer=Figure(mean=-0.204, sd=sd),
        forgetting=Figure(mean=0.204, sd=sd),
        plasticity=Figure(mean=0.8, sd=sd),
        known=Figure(mean=0.7, sd=sd),
        open=None,
        weighed=None,
        routed=Figure(mean=0.69, sd=sd),
        routing=Figure(mean=1.0, sd=None if seeds == 1 else 0.0),
        bytes_up=2_600_000.0,
        bytes_down=1_900_000.0,
        seconds=98.0,
        tasks=TASKS,
        borders=tuple((task,) for task in TASKS),
        untrained=tuple(Figure(mean=0.1, sd=sd) for _ in TASKS),
        matrix=tuple(
            tuple(
                TaskCell(score=Figure(mean=x, sd=sd), own=i == j, ahead=j > i, forgotten=forgotten if j < i else 0)
                for j, x in enumerate(line)
            )
            for i, line in enumerate(matrix)
        ),
    )


FALLS = [[0.9, 0.11, 0.1], [0.5, 0.8, 0.1], [0.3, 0.4, 0.9]]
ROWS = [way_row("sequential", FALLS), way_row("o-lora:fedit", FALLS, forgotten=1)]


def test_a_row_in_per_cent_and_points() -> None:
    cells = way_cells(ROWS[0])
    assert cells[:5] == ("sequential", "61.4 ± 2.0", "−20.4 ± 2.0", "20.4 ± 2.0", "80.0 ± 2.0")
    assert cells[-3:] == ("2.6 MB", "1.9 MB", "1 min 38 s")
    assert way_cells(way_row("sequential", FALLS, seeds=1))[1] == "61.4"


def test_columns_without_a_value_are_left_out() -> None:
    heads = ways_table(ROWS)[0]
    assert "AA, all classes" not in heads
    assert "AA, weighed" not in heads
    some = [ROWS[0], replace(ROWS[1], open=Figure(mean=0.5))]
    assert "- all classes: " in ways_markdown(some)
    assert "- all classes: " not in ways_markdown(ROWS)
    table = ways_table(some)
    column = table[0].index("AA, all classes")
    assert [line[column] for line in table[1:]] == ["–", "50.0"]


def test_markdown_marks_the_own_task_and_what_most_seeds_forgot() -> None:
    text = ways_markdown(ROWS)
    lines = [line for line in text.splitlines() if line.startswith("| sequential: numbers")]
    assert re.findall(r"[\d.]+ ± [\d.]+ ▼", lines[0]) == ["30.0 ± 2.0 ▼", "40.0 ± 2.0 ▼"]
    assert "[90.0 ± 2.0]" in lines[0]
    fewer = next(line for line in text.splitlines() if line.startswith("| o-lora:fedit: numbers"))
    assert "▼" not in fewer
    assert "3 seeds" in text
    assert "One seed." in ways_markdown([way_row("sequential", FALLS, seeds=1)])


def test_the_page_is_well_formed_and_shows_every_way(tmp_path: Path) -> None:
    text = write_ways(tmp_path, ROWS).read_text()
    assert text == ways_page(ROWS)
    page = ElementTree.fromstring(re.sub(r"<style>.*?</style>|<meta[^>]*>|<!doctype html>", "", text, flags=re.S))
    figures = page.findall(".//figure")
    assert [f.findtext("figcaption", "").strip() for f in figures] == ["sequential", "o-lora:fedit"]
    for figure, lost in zip(figures, (3, 0), strict=True):
        assert len(figure.findall(".//svg/polyline")) == len(TASKS)
        cells = figure.findall(".//td")
        assert [c.get("class") for c in cells].count("own") == 3
        assert [c.get("class") for c in cells].count("ahead") == 3
        assert [c.get("class") for c in cells].count("lost") == lost
        assert [(c.text or "").strip() for c in cells[3:5]] == ["▼ 50.0" if lost else "50.0", "80.0"]
        assert cells[3].get("title") == "dates: 50.0 ± 2.0"
    assert "<b>records" not in text


def test_lines_fall_where_a_task_is_forgotten() -> None:
    dates = re.findall(r'<polyline class="line t1" points="([^"]+)"', ways_page(ROWS))[0]
    heights = [float(point.split(",")[1]) for point in dates.split()]  # down the page is a lower score
    assert heights[0] > heights[1] < heights[2] < heights[3]


def test_a_border_of_all_tasks_and_one_without_scores() -> None:
    empty = TaskCell(score=None, own=True, ahead=False, forgotten=0)
    joint = replace(
        way_row("joint", FALLS),
        borders=(TASKS,),
        matrix=((empty,) * 3,),
        untrained=(None,) * 3,
        backward_transfer=None,
        forgetting=None,
    )
    assert "| joint: all " in ways_markdown([joint])
    assert "after all" in ways_page([joint])
    assert way_cells(joint)[2] == "–"


@pytest.mark.parametrize("seeds", [1, 3])
def test_figures_below_a_tenth_of_a_point_have_no_sign_of_their_own(seeds: int) -> None:
    row = replace(way_row("subspace", FALLS, seeds=seeds), backward_transfer=Figure(mean=-0.0001))
    assert way_cells(row)[2] == "+0.0"
