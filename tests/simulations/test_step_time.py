"""The time that a plan tells is that of real steps of the run's settings."""

from __future__ import annotations

import math
from typing import Any

import pytest

from fedlora.base import load_base
from fedlora.config import load_config
from simulations import step_time
from simulations.step_time import step_seconds

SMALL = ("model.max_length=16", "lora.ranks=4", "training.batch_size=2", "training.threads=1")
PRIVATE = ("privacy.level=example", "privacy.epsilon=8", "privacy.rows=6", "privacy.sampling=1", "data.holdout=0")


@pytest.mark.parametrize("sets", [("method.name=flora",), ("method.name=ffa-lora", *PRIVATE)])
def test_it_is_the_time_of_steps_at_the_runs_own_settings(
    sets: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = load_config(None, [*SMALL, *sets])
    seen: list[tuple[int, bool, int]] = []
    clock = iter([0.0, 1.0, 10.0, 17.0])  # a step beside what is done once takes (7 - 1) / 3 s

    def trained(base: Any, header: Any, ask: Any, rows: Any, *, threads: int) -> None:
        assert (ask.plan.rank, len(rows[0].tokens), threads) == (4, 16, 1)
        seen.append((ask.plan.training.local_steps, ask.plan.privacy is not None, len(rows)))

    monkeypatch.setattr(step_time, "train_client", trained)
    monkeypatch.setattr(step_time.time, "perf_counter", lambda: next(clock))
    assert step_seconds(config, load_base(config.model)) == pytest.approx(2.0)
    private = "privacy.level=example" in sets
    assert seen == [(1, private, 6 if private else 2), (4, private, 6 if private else 2)]


def test_real_steps_take_time() -> None:
    config = load_config(None, [*SMALL, "method.name=ffa-lora", *PRIVATE])
    found = step_seconds(config, load_base(config.model))
    assert math.isfinite(found)
    assert found >= 0.0
