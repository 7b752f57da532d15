"""The scale is the largest that cannot overflow; sums are exact to the bound; a sum's norm is held to its own."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedlora.privacy.secagg.fixed_point import FixedPoint, clipped
from fedlora.privacy.secagg.refusal import Refused

fast = settings(deadline=None, max_examples=80)
bounds = st.floats(1e-6, 1e6)


@fast
@given(size=st.integers(1, 1 << 24), clients=st.integers(1, 5000), bound=bounds, headroom=st.integers(0, 1 << 20))
def test_the_largest_scale_that_cannot_overflow(size: int, clients: int, bound: float, headroom: int) -> None:
    """By exact rational arithmetic, with sqrt(size) from below and above."""
    point = FixedPoint(size=size, clients=clients, bound=bound, headroom=headroom)
    root = Fraction(math.isqrt(size * 10**12), 10**6)

    def most(bits: int, slack: Fraction) -> Fraction:
        return clients * (Fraction(2) ** bits * Fraction(bound) * slack + root / 2) + headroom

    assert most(point.bits, Fraction(1)) < 2**31
    assert clients * point.largest + headroom < 2**31
    assert most(point.bits + 1, Fraction(1 + 2**-19)) + clients >= 2**31 - 1


@fast
@given(clients=st.integers(1, 40), size=st.integers(1, 50), bound=bounds, seed=st.integers(0, 2**32 - 1))
def test_a_sum_modulo_the_ring_is_the_plain_sum(clients: int, size: int, bound: float, seed: int) -> None:
    point, rng = FixedPoint(size=size, clients=clients, bound=bound), np.random.default_rng(seed)
    vectors = [clipped(bound * rng.standard_normal(size) * 2, bound) for _ in range(clients)]
    words = [point.encode(v) for v in vectors]
    offset = rng.integers(0, 2**32, size, dtype=np.uint32)
    total = offset.copy()
    for w in words:
        total += w
    total -= offset
    plain = np.sum([v.astype(np.float64) for v in vectors], axis=0)
    assert np.abs(point.decode(total, clients) - plain).max() <= point.error(clients) * (1 + 1e-6)


def test_the_worst_vectors_do_not_overflow() -> None:
    """All clients at the bound, all in one coordinate, of either sign."""
    for sign in (1.0, -1.0):
        point = FixedPoint(size=3, clients=1000, bound=0.75)
        total = np.zeros(3, np.uint32)
        for _ in range(1000):
            total += point.encode(np.array([sign * 0.75, 0, 0]))
        np.testing.assert_allclose(point.decode(total, 1000), [sign * 750.0, 0, 0], atol=point.error(1000))


def test_the_rounded_norm_is_within_its_bound() -> None:
    rng = np.random.default_rng(0)
    point = FixedPoint(size=100_000, clients=1000, bound=1.0)
    x = rng.standard_normal(point.size)
    q = point.encode(x / np.linalg.norm(x)).view(np.int32).astype(np.float64)
    assert np.linalg.norm(q) <= float(point.largest)
    assert float(point.largest) <= 2.0**point.bits * (1 + 2**-19) + math.sqrt(point.size) / 2 + 0.5


@pytest.mark.parametrize(
    ("vector", "match"),
    [
        (np.zeros(4, np.float32), "is coded"),
        (np.zeros(3, np.int32), "is coded"),
        (np.zeros((3, 1), np.float32), "is coded"),
        (np.array([1.0, 0.01, 0]), "above the bound"),
        (np.array([np.nan, 0, 0]), "not finite"),
        (np.array([0, -np.inf, 0]), "not finite"),
        (np.array([1e300, 0, 0]), "above the bound"),
    ],
)
def test_what_is_not_coded(vector: np.ndarray, match: str) -> None:
    with pytest.raises(Refused, match=match):
        FixedPoint(size=3, clients=3, bound=1.0).encode(vector)


@pytest.mark.parametrize(
    "settings_",
    [
        {"size": 0}, {"size": 1 << 29}, {"clients": 0}, {"clients": 1 << 30}, {"bound": 0.0}, {"bound": math.nan},
        {"bound": math.inf}, {"bound": -1.0}, {"headroom": -1}, {"headroom": 1 << 31},
        {"clients": 10**6, "size": 1 << 27},
    ],
)  # fmt: skip
def test_settings_that_cannot_hold(settings_: dict[str, float]) -> None:
    with pytest.raises(Refused, match="fixed-point"):
        FixedPoint(**{"size": 3, "clients": 3, "bound": 1.0, **settings_})  # type: ignore[arg-type]


def test_sums_that_are_refused() -> None:
    point = FixedPoint(size=3, clients=5, bound=1.0)
    one = point.encode(np.array([0.99, 0.0, 0.0]))
    assert point.decode(one, 1)[0] == pytest.approx(0.99)
    for total, clients in ((one[:2], 1), (one.astype(np.uint64), 1), (one, 6), (one, 0)):
        with pytest.raises(Refused, match="is no sum"):
            point.decode(total, clients)
    with pytest.raises(Refused, match="sum-bound"):
        point.decode(one + one, 1)


@fast
@given(values=st.lists(st.floats(-1e30, 1e30), min_size=1, max_size=20), bound=bounds)
def test_clipping(values: list[float], bound: float) -> None:
    x = np.array(values)
    y = clipped(x, bound).astype(np.float64)
    assert np.linalg.norm(y) <= bound * (1 + 2**-21)
    expected = x * min(1.0, bound / max(float(np.linalg.norm(x)), 1e-300))
    np.testing.assert_allclose(y, expected, rtol=1e-6, atol=1e-37)
    FixedPoint(size=x.size, clients=3, bound=bound).encode(clipped(x, bound))


def test_clipping_refuses_what_is_not_finite() -> None:
    with pytest.raises(Refused, match="not finite"):
        clipped(np.array([np.nan]), 1.0)
