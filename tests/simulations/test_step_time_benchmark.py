"""What the benchmark of sealed tasks compares, and how it estimates: the steps, and the arithmetic."""

from __future__ import annotations

import math
import time

import pytest

from fedlora.errors import ConfigError
from simulations.benchmarks.step_time import cases, measured, open_base, paired


def test_the_overhead_is_the_mean_log_ratio_of_pairs() -> None:
    found = paired([(1.0, 1.1), (2.0, 2.0), (4.0, 4.4 * 1.1)])
    assert (found.bare, found.sealed) == (2.0, 2.0)
    assert found.overhead == pytest.approx(math.log(1.1))
    assert found.error == pytest.approx(math.log(1.1) / math.sqrt(3))


def test_steps_on_sealed_tasks_and_on_none_are_the_same_but_for_those() -> None:
    base, rows = open_base("tiny", 1)
    found = list(cases(base, tasks=3, rank=2, batch=1, steps=1))
    clock = time.perf_counter
    for case in found:
        assert case.bare.blocks == ()
        assert len(case.sealed.blocks) == (0 if case.name == "nothing sealed" else 3)
        assert case.bare.plan is not None
        assert case.bare.plan.overlap == 0.0
        assert case.sealed.plan is not None
        assert bool(case.sealed.plan.overlap) == (case.name == "o-lora")
        told = measured(base, rows, case, repeats=2)
        assert min(told.bare, told.sealed) > 0.0
    assert time.perf_counter is clock
    with pytest.raises(ConfigError, match="200 tasks of rank 2 and one more do not fit into inputs of 192"):
        next(cases(base, tasks=200, rank=2, batch=1, steps=1))
