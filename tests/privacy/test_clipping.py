"""The joint clip against dense algebra, what it bounds and what a clip of products does not; the adaptive bound."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedlora.errors import ConfigError, TrainingError
from fedlora.privacy.accounting import gaussian_epsilon
from fedlora.privacy.clipping import AdaptiveClip, clip_jointly, joint_norm
from fedlora.privacy.noise import Noise

Arrays = dict[str, np.ndarray]


def flat(arrays: Arrays) -> np.ndarray:
    return np.concatenate([x.ravel().astype(np.float64) for x in arrays.values()])


def change(seed: int, size: float) -> Arrays:
    g = np.random.default_rng(seed)
    shapes = {"A:q": (2, 7), "B:q": (5, 2), "head:score": (3, 4)}
    return {key: (size * g.normal(size=shape)).astype(np.float32) for key, shape in shapes.items()}


@given(seed=st.integers(0, 10_000), size=st.floats(1e-30, 1e30), clip=st.floats(1e-6, 1e6))
def test_the_clip_holds_jointly_after_rounding_and_keeps_the_direction(seed: int, size: float, clip: float) -> None:
    x = change(seed, size)
    got, norm = clip_jointly(x, clip)
    assert norm == pytest.approx(float(np.linalg.norm(flat(x))), rel=1e-12)
    assert float(np.linalg.norm(flat(got))) <= clip
    if norm <= clip * (1 - 1e-6):
        assert all(np.array_equal(got[k], x[k]) for k in x)
    else:
        assert float(np.linalg.norm(flat(got))) == pytest.approx(clip, rel=1e-6)
        np.testing.assert_allclose(flat(got) / clip, flat(x) / norm, rtol=1e-5, atol=1e-9)
    assert all(y.dtype == np.float32 for y in got.values())


def test_a_zero_update_and_no_arrays() -> None:
    got, norm = clip_jointly({"B:q": np.zeros((3, 2), np.float32)}, 1.0)
    assert norm == 0.0
    assert np.array_equal(got["B:q"], np.zeros((3, 2)))
    assert clip_jointly({}, 1.0) == ({}, 0.0)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_refused(bad: float) -> None:
    x = change(0, 1.0)
    x["B:q"][1, 1] = bad
    with pytest.raises(TrainingError, match="clipping: B:q has 1 values that are not finite"):
        clip_jointly(x, 1.0)
    with pytest.raises(TrainingError, match="not finite"):
        joint_norm(x)


def test_a_clip_of_products_bounds_nothing_that_is_released_and_ours_does() -> None:
    """(t B)(A / t) is one product for every t: it passes a clip of products and moves the factors by any amount."""
    g = np.random.default_rng(3)
    a, b = g.normal(size=(2, 6)), g.normal(size=(5, 2))
    clip = 1.01 * float(np.linalg.norm(b @ a))
    moved = []
    for t in (1.0, 1e2, 1e4):
        factors = {"A:q": a / t, "B:q": t * b}
        product = np.linalg.norm(factors["B:q"] @ factors["A:q"])
        assert product <= clip  # so a clip of products leaves it whole
        moved.append(float(np.linalg.norm(flat(factors))))
        ours, _ = clip_jointly(factors, clip)
        assert np.linalg.norm(flat(ours)) <= clip
    assert moved[2] > 1e3 * clip
    # One client more moves the released sums by what it gives: with and without it.
    others = {"A:q": g.normal(size=(2, 6)), "B:q": g.normal(size=(5, 2))}
    ours, _ = clip_jointly({"A:q": a / 1e4, "B:q": 1e4 * b}, clip)
    gap = flat({k: others[k] + ours[k] for k in others}) - flat(others)
    assert np.linalg.norm(gap) <= clip * (1 + 1e-9)


def test_with_orthonormal_frozen_rows_both_norms_are_one() -> None:
    g = np.random.default_rng(4)
    basis = np.linalg.qr(g.normal(size=(9, 3)))[0].T
    b = g.normal(size=(5, 3))
    assert joint_norm({"B:q": b}) == pytest.approx(float(np.linalg.norm(b @ basis)))


def test_refusals() -> None:
    for clip in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(ConfigError, match="a clip must be finite and above 0"):
            clip_jointly(change(0, 1.0), clip)


@pytest.mark.parametrize("start", [0.001, 1000.0])
@pytest.mark.parametrize("quantile", [0.2, 0.5, 0.9])
def test_the_adaptive_clip_finds_its_quantile_from_both_sides(start: float, quantile: float) -> None:
    g = np.random.default_rng(5)
    norms = np.exp(g.normal(size=500))
    noise = Noise()
    adaptive = AdaptiveClip(clip=start, quantile=quantile, rate=0.2, count_noise=2.0, expected=100.0)
    kept = []
    for round_ in range(800):
        cohort = norms[g.random(500) < 0.2]
        adaptive = adaptive.after(sum(adaptive.indicator(x) for x in cohort), noise)
        kept += [adaptive.clip] if round_ >= 500 else []
    want = np.quantile(norms, quantile)
    # The centred sum over a Poisson sample is right on average for every quantile.
    assert float(np.exp(np.mean(np.log(kept)))) == pytest.approx(want, rel=0.1)


def test_the_sign_of_the_adaptive_clip() -> None:
    noise = Noise()
    adaptive = AdaptiveClip(clip=1.0, count_noise=1e-9, expected=10.0)
    assert adaptive.after(5.0, noise).clip == pytest.approx(math.exp(-0.2 * 0.5))  # all within: lower
    assert adaptive.after(-5.0, noise).clip == pytest.approx(math.exp(0.2 * 0.5))  # none within: higher
    assert adaptive.after(0.0, noise).clip == pytest.approx(1.0)
    assert (adaptive.indicator(1.0), adaptive.indicator(1.0001), adaptive.indicator(0.0)) == (0.5, -0.5, 0.5)


def test_the_count_is_noised() -> None:
    noise = Noise()
    adaptive = AdaptiveClip(clip=1.0, rate=1.0, count_noise=3.0, expected=100.0)
    moves = np.array([-math.log(adaptive.after(0.0, noise).clip) for _ in range(4000)])
    assert abs(moves.std() / 0.03 - 1.0) < 5 / math.sqrt(8000)


def test_both_releases_cost_what_the_one_would() -> None:
    adaptive = AdaptiveClip(clip=1.0, count_noise=5.0, expected=100.0)
    z = 1.2
    z_sum = adaptive.sum_multiplier(z)
    assert z_sum > z
    # The pair (update / clip, indicator) of sensitivities 1 and 1/2 as one Gaussian release.
    mu = math.hypot(1.0 / z_sum, 0.5 / adaptive.count_noise)
    assert gaussian_epsilon(mu, 1e-5) == pytest.approx(gaussian_epsilon(1.0 / z, 1e-5), rel=1e-9)
    with pytest.raises(ConfigError, match="raise count_noise"):
        adaptive.sum_multiplier(10.0)


def test_adaptive_refusals() -> None:
    adaptive = AdaptiveClip(clip=1.0, count_noise=5.0, expected=100.0)
    for name in ("clip", "rate", "count_noise", "expected"):
        with pytest.raises(ConfigError, match=f"adaptive clipping: {name} must be finite"):
            replace(adaptive, **{name: 0.0})
    with pytest.raises(ConfigError, match="quantile must be between 0 and 1"):
        replace(adaptive, quantile=1.0)
    for bad in (math.nan, math.inf):
        with pytest.raises(TrainingError, match="norm must be finite"):
            adaptive.indicator(bad)
        with pytest.raises(TrainingError, match="sum of indicators must be finite"):
            adaptive.after(bad, Noise())
