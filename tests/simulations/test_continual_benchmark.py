"""Ways compared on the same test rows, from rows whose outcomes are given."""

from __future__ import annotations

import math

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import stats

from fedlora.errors import DataError
from simulations.benchmarks.continual import compared, difference, figures

Rows = dict[str, NDArray[np.bool_]]


def drawn(seed: int, level: float, n: int = 400) -> Rows:
    rng = np.random.default_rng(seed)
    return {"a": rng.random(n) < level, "b": rng.random(n // 2) < level}


def test_the_difference_is_that_of_paired_rows_by_task() -> None:
    """Its error is that of a paired t test in each task, and tasks weigh alike whatever their rows."""
    one, other = drawn(0, 0.8), drawn(1, 0.6)
    gap, error = difference([one], [other])
    tests = [stats.ttest_rel(one[t].astype(float), other[t].astype(float)) for t in one]
    gaps = [float(one[t].mean() - other[t].mean()) for t in one]
    errors = [g / float(test.statistic) for g, test in zip(gaps, tests, strict=True)]
    assert gap == pytest.approx(100 * sum(gaps) / 2)
    assert error == pytest.approx(100 * math.hypot(*errors) / 2)
    with pytest.raises(DataError):
        difference([one], [{"a": one["a"][1:], "b": one["b"]}])


def test_rows_count_as_the_share_of_seeds_that_have_them_right() -> None:
    runs = [drawn(0, 0.8), drawn(1, 0.8)]
    other = [drawn(2, 0.6), drawn(3, 0.6)]
    gap, error = difference(runs, other)
    alone = [difference([a], [b]) for a, b in zip(runs, other, strict=True)]
    assert gap == pytest.approx((alone[0][0] + alone[1][0]) / 2)
    assert error == pytest.approx(math.hypot(alone[0][1], alone[1][1]) / 2, rel=0.15)  # seeds that are independent


def test_the_best_way_against_every_other_and_what_is_noise() -> None:
    best = drawn(0, 0.8)
    near = {t: x.copy() for t, x in best.items()}
    near["a"][np.flatnonzero(best["a"])[:2]] = False
    near["a"][np.flatnonzero(~best["a"])[:1]] = True
    lines = compared({"low": {0: drawn(1, 0.5)}, "near": {0: near}, "best": {0: best}, "else": {5: drawn(2, 0.4)}})
    heads, _, first, second, third = lines.splitlines()
    assert heads.startswith("| best against |")
    assert first.startswith("| near |")
    assert first.endswith("| noise |")
    assert second.startswith("| low |")
    assert second.endswith("|  |")
    assert third == "| else | – | – | no seed in common |"


def test_figures_made_again_take_the_place_of_those_in_the_log() -> None:
    told = {"summed": {"t": {"score": 0.5}}}
    border = {"sealed": ["t"], "server": {"t": {"score": 0.5}}, "inference": told}
    events = [
        {"event": "untrained", "tasks": {"t": {"score": 0.1}}},
        {"event": "round", "border": border, "bytes_up": 1, "bytes_down": 1, "seconds": 1.0},
    ]
    assert "mixed" not in figures(events, ["t"])
    assert figures(events, ["t"], {**told, "mixed": {"t": {"score": 0.75}}})["mixed"] == 75.0
