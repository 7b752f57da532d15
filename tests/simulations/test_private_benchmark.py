"""The comparison of methods under privacy, without a run: the choice of rates, the table, going on after a stop."""

from __future__ import annotations

import statistics
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from fedlora.config import RunConfig
from fedlora.errors import ConfigError
from simulations.benchmarks import private
from simulations.benchmarks.private import CHOICE, LADDER, Run, climb, settings, table

ONE = Run(
    on="skills",
    method="fedit",
    epsilon="8",
    rate=1e-2,
    seed=0,
    score=0.5,
    loss=1.0,
    seconds=3.0,
    cpu=2.0,
    settings="",
)


@pytest.mark.parametrize(
    ("peak", "tried"),
    [
        (1e-2, [1e-2, 3e-2, 3e-3]),
        (3e-2, [1e-2, 3e-2, 1e-1]),
        (3e-1, [1e-2, 3e-2, 1e-1, 3e-1]),
        (3e-4, [1e-2, 3e-2, 3e-3, 1e-3, 3e-4]),
    ],
)
def test_rates_are_tried_until_the_best_is_not_at_the_edge(peak: float, tried: list[float]) -> None:
    def measure(rate: float) -> Run:
        return replace(ONE, rate=rate, score=1.0 - abs(LADDER.index(rate) - LADDER.index(peak)) / 10)

    assert [r.rate for r in climb(measure)] == tried


def test_finer_tries_both_sides_of_the_best() -> None:
    def measured(peak: float) -> list[float]:
        return [r.rate for r in climb(lambda rate: replace(ONE, rate=rate, score=float(rate == peak)), finer=True)]

    assert measured(1e-2) == [1e-2, 3e-2, 3e-3, 1.7e-2, 5e-3]
    assert measured(3e-2) == [1e-2, 3e-2, 1e-1, 5e-2, 1.7e-2]


def test_of_equal_scores_the_lower_loss_is_best() -> None:
    runs = [replace(ONE, rate=rate, loss=loss) for rate, loss in ((1e-3, 2.0), (3e-3, 1.0))]
    assert private.best(runs).rate == 3e-3


def test_methods_share_everything_but_their_name_and_rate() -> None:
    ours, theirs = (settings("skills", m, "8", r, 1).model_dump() for m, r in (("ffa-lora", 1e-2), ("fedit", 3e-3)))
    for dumped in (ours, theirs):
        del dumped["method"]["name"], dumped["training"]["learning_rate"]
    assert ours == theirs


def test_rates_are_chosen_on_other_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[str, object]] = []
    monkeypatch.setenv("FEDLORA_REAL_DATA", "there")
    monkeypatch.setattr(private, "minilm", lambda task, data, split, **more: seen.append((split, more["seed"])))
    for seed in (CHOICE, 0):
        settings("agnews", "fedit", "8", 1e-2, seed)
    assert seen == [("dev", str(CHOICE)), ("test", "0")]
    monkeypatch.delenv("FEDLORA_REAL_DATA")
    with pytest.raises(ConfigError, match="FEDLORA_REAL_DATA"):
        settings("agnews", "fedit", "8", 1e-2, 0)


def test_differences_are_paired_over_seeds() -> None:
    scores = {
        ("ffa-lora", "none"): (0.9, 0.7),
        ("ffa-lora", "8"): (0.8, 0.5),
        ("fedit", "none"): (0.9, 0.9),
        ("fedit", "8"): (0.5, 0.4),
    }
    found = {
        (m, e): [replace(ONE, method=m, epsilon=e, seed=i, score=s) for i, s in enumerate(values)]
        for (m, e), values in scores.items()
    }
    shown = table(found)
    assert f"| 8 | `ffa-lora` | 0.01 | 65.0 ± {statistics.stdev([80, 50]):.1f} | -15.0 ± 7.1 |" in shown
    assert "epsilon 8: ffa-lora less fedit 20.0 ± 14.1" in shown  # of 30 and 10 points


def test_finished_runs_are_not_repeated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[tuple[float, int]] = []

    def run(on: str, method: str, epsilon: str, rate: float, config: RunConfig) -> Run:
        ran.append((rate, config.seed))
        score = 1.0 if rate == 1e-2 else 0.0
        own = private.digest(config)
        return replace(ONE, method=method, epsilon=epsilon, rate=rate, seed=config.seed, score=score, settings=own)

    out = tmp_path / "results.jsonl"
    monkeypatch.setattr(private, "run", run)
    monkeypatch.setattr(
        sys, "argv", ["private", "--out", str(out), "--epsilons", "8", "--methods", "fedit", "--seeds", "2"]
    )
    private.main()
    assert ran == [(1e-2, CHOICE), (3e-2, CHOICE), (3e-3, CHOICE), (1e-2, 0), (1e-2, 1)]
    lines = out.read_text().splitlines()
    out.write_text("\n".join(lines[:-1]) + "\n")
    ran.clear()
    private.main()
    assert ran == [(1e-2, 1)]
