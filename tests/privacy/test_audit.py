"""Bounds from scores against theorems, scipy's exact intervals and mechanisms whose epsilon is known."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from scipy.stats import binom, binomtest

from fedlora.errors import ConfigError
from fedlora.privacy.accounting import gaussian_epsilon
from fedlora.privacy.audit import (
    CLAIM,
    Finding,
    LedgerFinding,
    LowerBound,
    _p_value,
    auc,
    bounds,
    gaussian_bound,
    one_run_bound,
    threshold_bound,
)

Bound = Callable[..., LowerBound]
DELTA = 1e-5


def gaussian(mu: float, m: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Scores of m canaries under a release of sensitivity over noise mu, and who joined."""
    rng = np.random.default_rng(seed)
    joined = rng.random(m) < 0.5
    return mu * joined + rng.standard_normal(m), joined


@pytest.mark.parametrize("mu", [0.0, 0.5, 1.118, 3.0])
def test_a_normal_bound_covers_as_often_as_it_says_and_is_near(mu: float) -> None:
    found = [gaussian_bound(*gaussian(mu, 500, seed), delta=DELTA, confidence=0.95, attack="a") for seed in range(400)]
    over = sum(bound.epsilon > gaussian_epsilon(mu, DELTA) for bound in found)
    assert over <= binom.ppf(0.9999, 400, 0.05)
    assert over >= binom.ppf(0.0001, 400, 0.05) or mu == 0.0  # the interval is no wider than it must be
    assert np.mean([bound.mu for bound in found]) == pytest.approx(mu, abs=0.03)


def test_a_shift_without_noise_is_cut() -> None:
    joined = np.array([True, False] * 20)
    for scores, mu in ((joined * 1.0, 100.0), (joined * -1.0, -100.0), (joined * 0.0, 0.0)):
        bound = gaussian_bound(scores, joined, delta=DELTA, attack="a")
        assert bound.mu == mu
        assert (bound.epsilon > 1000.0) == (mu > 0.0)


def test_p_values_are_those_of_the_theorem() -> None:
    for m, guesses, correct, delta, epsilon in (
        (100, 40, 35, 0.0, 1.0),
        (100, 40, 35, 1e-3, 0.5),
        (50, 50, 31, 1e-2, 0),
    ):
        rate = math.exp(epsilon) / (1.0 + math.exp(epsilon))
        tail = sum(math.comb(guesses, k) * rate**k * (1 - rate) ** (guesses - k) for k in range(correct, guesses + 1))
        worst = max(
            sum(math.comb(guesses, k) * rate**k * (1 - rate) ** (guesses - k) for k in range(correct - i, correct)) / i
            for i in range(1, correct + 1)
        )
        assert _p_value(m, guesses, correct, delta, epsilon) == pytest.approx(min(1.0, tail + 2 * m * delta * worst))


def test_a_one_run_bound_holds_for_randomised_response() -> None:
    truth, found = 1.5, []
    for seed in range(60):
        rng = np.random.default_rng(seed)
        joined = rng.random(600) < 0.5
        honest = rng.random(600) < 1.0 / (1.0 + math.exp(-truth))
        scores = np.where(honest, joined, ~joined) + 1e-9 * rng.standard_normal(600)
        found.append(one_run_bound(scores, joined, delta=0.0, confidence=0.95, attack="a").epsilon)
    assert sum(e > truth for e in found) <= binom.ppf(0.9999, 60, 0.05)
    assert np.mean(found) > 0.7


def test_a_one_run_bound_cannot_pass_what_its_canaries_can_show() -> None:
    joined = np.random.default_rng(0).random(500) < 0.5
    bound = one_run_bound(joined * 1.0, joined, delta=DELTA, confidence=0.95, attack="a")
    assert 3.0 < bound.epsilon < math.log(500)
    assert one_run_bound(-1.0 * joined, joined, delta=DELTA, attack="a").epsilon == 0.0
    assert replace(bound, epsilon=0.0) == replace(
        one_run_bound(joined * 2.0, joined, delta=DELTA, confidence=0.95, attack="a"), epsilon=0.0
    )


def test_a_threshold_bound_is_clopper_and_pearsons() -> None:
    scores, joined = gaussian(2.0, 400, 5)
    level, delta, best = 0.05 / 28, 1e-3, 0.0
    for share in (0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95):
        told = scores > np.quantile(scores, 1.0 - share)
        for guessed, of in ((told, joined), (~told, ~joined)):
            right, wrong = int(guessed[of].sum()), int(guessed[~of].sum())
            low = binomtest(right, int(of.sum()), alternative="greater").proportion_ci(1 - level, "exact").low
            high = binomtest(wrong, int((~of).sum()), alternative="less").proportion_ci(1 - level, "exact").high
            best = max(best, math.log(max(low - delta, 1e-9) / high))
    bound = threshold_bound(scores, joined, delta=delta, confidence=0.95, attack="a")
    assert bound.epsilon == pytest.approx(best)
    assert best > 1.0
    assert threshold_bound(-1.0 * joined, joined, delta=DELTA, attack="a").epsilon == 0.0


@pytest.mark.parametrize("way", [gaussian_bound, one_run_bound, threshold_bound])
def test_no_bound_is_above_a_correct_release(way: Bound) -> None:
    over = 0
    for seed in range(30):
        over += way(*gaussian(1.118, 300, seed), delta=DELTA, confidence=0.99, attack="a").epsilon > 4.9834
    assert over <= binom.ppf(0.9999, 30, 0.01)


def test_areas_are_shares_of_pairs() -> None:
    rng = np.random.default_rng(3)
    scores, joined = rng.integers(0, 6, 40).astype(float), rng.random(40) < 0.4
    pairs = [(a > b) + 0.5 * (a == b) for a in scores[joined] for b in scores[~joined]]
    assert auc(scores, joined) == pytest.approx(np.mean(pairs))


def test_what_is_said() -> None:
    scores, joined = gaussian(4.0, 300, 0)
    found = Finding(
        what="w", claimed=5.0, delta=DELTA, auc=0.9, bounds=tuple(bounds(scores, joined, delta=DELTA, attack="a"))
    )
    assert found.flagged
    assert found.best.way == "normal scores"
    assert not replace(found, claimed=60.0).flagged
    told = json.loads(json.dumps(found.to_json()))
    assert told["says"] == CLAIM == "lower bound from one attack"
    assert told["flagged"] is True
    assert {b["confidence"] for b in told["bounds"]} == {0.999}
    for bound in found.bounds:
        assert CLAIM in str(bound)
        assert "confidence 0.999" in str(bound)
        assert "proved" not in str(bound)
    assert "asymptotic" in str(found.bounds[0])
    assert "rigorous" in str(found.bounds[1])


def test_ledgers_are_flagged() -> None:
    good = LedgerFinding(client="c", rounds=2, uncharged=(), steps=6, charged_steps=6, charged=4.0, told=4.0)
    assert not good.flagged
    for wrong in (replace(good, uncharged=(2,)), replace(good, charged_steps=3), replace(good, charged=4.1)):
        assert wrong.flagged
        assert wrong.to_json()["flagged"] is True


@pytest.mark.parametrize("way", [gaussian_bound, one_run_bound, threshold_bound])
def test_refusals(way: Bound) -> None:
    joined = np.array([True, False, True, False])
    for scores, coins, match in (
        (np.zeros(3), joined, "a score and a coin for each canary"),
        (np.array([0.0, np.nan, 0.0, 0.0]), joined, "must be finite; 1 are not"),
        (np.zeros(4), np.ones(4, np.bool_), "of 4, 4 did"),
    ):
        with pytest.raises(ConfigError, match=match):
            way(scores, coins, delta=DELTA, attack="a")
    with pytest.raises(ConfigError, match="a confidence must be from"):
        way(np.zeros(4), joined, delta=DELTA, confidence=1.0, attack="a")
