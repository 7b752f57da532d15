"""Ways to keep tasks apart: the settings of each row, and its figures from runs whose scores are given."""

from __future__ import annotations

import json
import statistics
from pathlib import Path

import pytest

from fedlora.config import RunConfig, load_config
from fedlora.errors import ConfigError
from fedlora.report.stream import Border, Stream
from simulations.compare import compare_ways, way_row, with_way
from simulations.simulate import Result

NAMES = ("dates", "records")


def settings(*overrides: str) -> RunConfig:
    return load_config(overrides=[f"tasks={json.dumps([{'name': n} for n in NAMES])}", *overrides])


def result(matrix: list[list[float]], *, up: int = 100, routing: float | None = 1.0) -> Result:
    stream = Stream(
        way="sequential",
        tasks=NAMES,
        judge="server",
        trained={1: NAMES[:1], 2: NAMES[1:]},
        borders=tuple(
            Border(round=i + 1, sealed=(NAMES[i],), scores=dict(zip(NAMES, line, strict=True)))
            for i, line in enumerate(matrix)
        ),
        untrained={"dates": 0.1, "records": 0.0},
        rows=100,
        inference={} if routing is None else {"routing": {"dates": routing, "records": 0.5}},
        sealing={},
        penalties={},
    )
    return Result(
        folder=Path("x"),
        score=None,
        own=None,
        loss=None,
        bytes_up=up,
        bytes_down=2 * up,
        seconds=3.0,
        references=(),
        next_command="",
        stream=stream,
    )


def test_the_figures_are_means_over_seeds() -> None:
    matrices = [[[0.9, 0.2], [0.5, 0.8]], [[0.8, 0.0], [0.78, 0.7]]]
    row = way_row("sequential", [result(m, up=100 * (i + 1)) for i, m in enumerate(matrices)])
    averages = [(m[1][0] + m[1][1]) / 2 for m in matrices]
    lost = [m[1][0] - m[0][0] for m in matrices]
    assert row.average_accuracy is not None
    assert row.backward_transfer is not None
    assert row.average_accuracy.mean == pytest.approx(statistics.fmean(averages))
    assert row.average_accuracy.sd == pytest.approx(statistics.stdev(averages))
    assert row.backward_transfer.mean == pytest.approx(statistics.fmean(lost))
    assert row.routing is not None
    assert row.routing.mean == 0.75
    assert (row.known, row.open, row.bytes_up, row.bytes_down) == (None, None, 150.0, 300.0)
    cells = row.matrix[1]
    assert [c.own for c in cells] == [False, True]
    assert cells[0].forgotten == 1  # of the second seed it is no more than 5 points below its best
    assert cells[0].score is not None
    assert cells[0].score.mean == pytest.approx(0.64)
    assert row.matrix[0][1].ahead
    assert not cells[1].ahead


def test_one_seed_has_no_deviation_and_what_no_seed_measured_is_left_out() -> None:
    row = way_row("sequential", [result([[0.9, 0.2], [0.5, 0.8]], routing=None)])
    assert row.average_accuracy is not None
    assert row.average_accuracy.sd is None
    assert row.routing is None
    mixed = [result([[0.9, 0.2], [0.5, 0.8]]), result([[0.9, 0.2], [0.5, 0.8]], routing=None)]
    assert way_row("sequential", mixed).routing is None  # a mean over some of the seeds would be none of the row


def test_a_way_with_its_method() -> None:
    base = settings("method.name=ffa-lora", "continual.method=input-aware", "continual.sketch=32")
    found = with_way(base, "o-lora:fedit")
    assert (found.continual.method, found.method.name, found.continual.sketch) == ("o-lora", "fedit", None)
    assert with_way(base, "subspace").method.name == "ffa-lora"
    assert with_way(base, "input-aware") == base
    assert with_way(base, "input-aware:fedit").continual.sketch == 32


def test_settings_of_other_ways_and_methods_go_back_to_their_defaults() -> None:
    base = settings("method.name=flora", "method.warm_start=true", "continual.task_dim=6", "seed=4")
    moved = with_way(base, "subspace")
    assert (moved.continual.task_dim, moved.method.warm_start, moved.seed) == (6, True, 4)
    other = with_way(base, "sequential:fedit")
    assert (other.continual.task_dim, other.method.warm_start, other.seed) == (None, False, 4)
    held = settings("method.name=fedit", "continual.method=ewc", "continual.penalty=7")
    assert with_way(held, "o-lora").continual.penalty is None  # its unit is another


@pytest.mark.parametrize(
    ("name", "match"),
    [
        ("sequental", r"no way is called 'sequental'; there are .*did you mean 'sequential'"),
        ("subspace:fedit2", r"no method is called 'fedit2'; there are .*did you mean 'fedit'"),
        ("subspace:", r"no method is called ''"),
        ("o-lora:ffa-lora", r"o-lora is a penalty on A, and ffa-lora freezes A"),
    ],
)
def test_a_way_that_is_none(name: str, match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        with_way(settings(), name)


def test_a_run_without_tasks_has_no_ways() -> None:
    with pytest.raises(ConfigError, match=r"the settings have none: try the scenario tasks"):
        with_way(load_config(), "sequential")


def test_nothing_is_made_where_a_way_cannot_run(tmp_path: Path) -> None:
    tables = json.dumps([{"name": "dates"}, {"name": "records", "start": 2}])
    config = load_config(overrides=[f"tasks={tables}", "rounds.count=3", "method.name=fedit"])
    ways = {name: with_way(config, name) for name in ("subspace", "sequential")}
    with pytest.raises(ConfigError, match=r"records begins in round 2, before dates ends"):
        compare_ways(config, tmp_path / "out", ways=ways, seeds=1, notify=lambda event: None)
    assert not (tmp_path / "out").exists()
