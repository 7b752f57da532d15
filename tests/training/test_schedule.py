"""One schedule over the whole run, however it is cut into rounds."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedlora.state import LocalTraining
from fedlora.training.schedule import factor, rates


def training(schedule: str, warmup: float) -> LocalTraining:
    return LocalTraining(
        learning_rate=2e-3, local_steps=1, local_epochs=None, batch_size=1, schedule=schedule, warmup=warmup
    )  # type: ignore[arg-type]


@given(
    schedule=st.sampled_from(["cosine", "constant"]),
    warmup=st.sampled_from([0.0, 0.03, 0.5, 1.0]),
    rounds=st.integers(1, 6),
    steps=st.integers(1, 12),
)
@settings(deadline=None, max_examples=50)
def test_rounds_join_into_one_run(schedule: str, warmup: float, rounds: int, steps: int) -> None:
    t = training(schedule, warmup)
    cut = [rate for r in range(rounds) for rate in rates(t, (r / rounds, (r + 1) / rounds), steps)]
    assert cut == pytest.approx(rates(t, (0.0, 1.0), rounds * steps), rel=1e-9, abs=1e-15)
    assert all(0 < rate <= t.learning_rate for rate in cut)


def test_shape_of_the_schedules() -> None:
    cosine, constant = training("cosine", 0.2), training("constant", 0.2)
    assert [factor(p, cosine) for p in (0.0, 0.1, 0.2)] == pytest.approx([0.0, 0.5, 1.0])
    assert factor(0.6, cosine) == pytest.approx(0.5)
    assert factor(1.0, cosine) == pytest.approx(0.0)
    assert factor(0.4, cosine) == pytest.approx((1 + math.cos(math.pi / 4)) / 2)
    assert [factor(p, constant) for p in (0.1, 0.2, 1.0)] == pytest.approx([0.5, 1.0, 1.0])
