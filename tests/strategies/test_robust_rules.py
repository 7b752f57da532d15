"""Robust rules on K x K Gram matrices, beside the same rules on flat vectors, dense and slow."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from fedlora.errors import MethodError, RoundFailed
from strategies.robust_rules import (
    COORDINATE_RULES,
    Verdict,
    capped_shares,
    centred_clipping,
    clients_needed,
    coordinate_wise,
    fltrust,
    geometric_median,
    hostile_count,
    krum,
    norm_bound,
    screen,
    squared_distances,
)

Float64 = NDArray[np.float64]


def cloud(k: int, seed: int = 0, size: int = 12) -> Float64:
    """K updates `[K, size]` around a common one, with one far off."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=size) + 0.7 * rng.normal(size=(k, size))
    x[-1] *= 9.0
    return np.asarray(x)


def shares(k: int, seed: int = 0) -> Float64:
    p = np.random.default_rng(seed + 100).uniform(1, 3, k)
    return np.asarray(p / p.sum())


def mixed(x: Float64, v: Verdict) -> Float64:
    assert (v.weights >= 0).all()
    assert v.weights.sum() == pytest.approx(1.0)
    assert (v.scales >= 0).all()
    return np.asarray((v.weights * v.scales) @ x)


def test_squared_distances() -> None:
    x = cloud(6)
    want = ((x[:, None] - x[None, :]) ** 2).sum(-1)
    np.testing.assert_allclose(squared_distances(x @ x.T), want, atol=1e-10)


@pytest.mark.parametrize("bound", [None, 0.5, 1e9])
def test_norm_bound(bound: float | None) -> None:
    x, p = cloud(5), shares(5)
    norms = np.linalg.norm(x, axis=1)
    tau = np.median(norms) if bound is None else bound
    want = sum(p[i] * x[i] * min(1.0, tau / norms[i]) for i in range(5))
    np.testing.assert_allclose(mixed(x, norm_bound(x @ x.T, p, bound=bound)), want, rtol=1e-9)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("k", "f"), [(5, 1), (8, 2), (9, 3), (10, 2), (3, 0)])
def test_krum_on_flat_vectors(k: int, f: int, seed: int) -> None:
    x, p = cloud(k, seed), shares(k, seed)
    scores = []
    for i in range(k):
        others = sorted(float(np.sum((x[i] - x[j]) ** 2)) for j in range(k) if j != i)
        scores.append(sum(others[: k - f - 2]))
    best = int(np.argmin(scores))
    one = krum(x @ x.T, p, hostile=f, many=False)
    np.testing.assert_allclose(mixed(x, one), x[best])
    assert one.left_out == frozenset(range(k)) - {best}
    assert one.flagged == {i: ("score",) for i in range(k) if i != best}
    some = np.argsort(scores)[: k - f - 2]
    np.testing.assert_allclose(mixed(x, krum(x @ x.T, p, hostile=f, many=True)), p[some] @ x[some] / p[some].sum())


def test_krum_needs_more_than_twice_its_enemies_and_two() -> None:
    with pytest.raises(MethodError, match="krum against 2 hostile clients needs more than 6 updates, got 6"):
        krum(np.eye(6), np.full(6, 1 / 6), hostile=2, many=False)


@pytest.mark.parametrize("seed", range(5))
def test_the_geometric_median_is_where_the_distances_are_least(seed: int) -> None:
    """No step in any direction makes the weighted sum of distances smaller, and flat Weiszfeld comes to the same."""
    x, p = cloud(9, seed), shares(9, seed)
    median = mixed(x, geometric_median(x @ x.T, p))
    v = p @ x
    for _ in range(3000):
        w = p / np.maximum(np.linalg.norm(x - v, axis=1), 1e-12)
        v = w @ x / w.sum()
    np.testing.assert_allclose(median, v, atol=1e-7)
    least = p @ np.linalg.norm(x - median, axis=1)
    rng = np.random.default_rng(seed)
    for _ in range(30):
        other = median + 1e-2 * rng.normal(size=x.shape[1])
        assert p @ np.linalg.norm(x - other, axis=1) >= least


def test_the_geometric_median_on_an_update_and_of_nothing() -> None:
    x = np.vstack([np.ones((6, 4)), 5.0 + np.arange(12).reshape(3, 4)])
    np.testing.assert_allclose(mixed(x, geometric_median(x @ x.T, np.full(9, 1 / 9))), np.ones(4), atol=1e-4)
    none = geometric_median(np.zeros((3, 3)), shares(3))
    np.testing.assert_allclose(none.weights, shares(3))


@pytest.mark.parametrize("bound", [None, 0.3, 2.0, 1e6])
@pytest.mark.parametrize("seed", range(3))
def test_centred_clipping_on_flat_vectors(bound: float | None, seed: int) -> None:
    x, p = cloud(7, seed), shares(7, seed)
    tau = float(np.median(np.linalg.norm(x, axis=1))) if bound is None else bound
    v = np.zeros(x.shape[1])
    for _ in range(5):
        v = v + sum(p[i] * (x[i] - v) * min(1.0, tau / np.linalg.norm(x[i] - v)) for i in range(7))
    verdict = centred_clipping(x @ x.T, p, bound=bound)
    np.testing.assert_allclose(mixed(x, verdict), v, rtol=1e-9, atol=1e-12)
    assert len(set(verdict.scales.tolist())) == 1
    assert verdict.scales[0] <= 1.0 + 1e-12


def test_centred_clipping_of_zeros() -> None:
    assert mixed(np.zeros((3, 2)), centred_clipping(np.zeros((3, 3)), shares(3))).tolist() == [0.0, 0.0]
    with pytest.raises(RoundFailed, match="centred-clipping to a norm of 0 leaves nothing of 2 updates"):
        centred_clipping(np.eye(2), np.full(2, 0.5), bound=0.0)


@pytest.mark.parametrize("seed", range(4))
def test_fltrust_on_flat_vectors(seed: int) -> None:
    x = cloud(8, seed)
    x[3] *= -2.0
    root = x[0]
    cos = x @ root / np.linalg.norm(x, axis=1) / np.linalg.norm(root)
    trust = np.maximum(cos, 0.0)
    trust[0] = 0.0
    want = sum(trust[i] * x[i] * np.linalg.norm(root) / np.linalg.norm(x[i]) for i in range(8)) / trust.sum()
    verdict = fltrust(x @ x.T, 0)
    np.testing.assert_allclose(mixed(x, verdict), want, rtol=1e-9)
    assert verdict.left_out == {i for i in range(1, 8) if cos[i] <= 0.0}
    assert 3 in verdict.left_out
    assert verdict.flagged[3] == ("root",)


def test_fltrust_without_a_way_or_without_company() -> None:
    with pytest.raises(RoundFailed, match="the trusted client's update is zero"):
        fltrust(np.diag([0.0, 1.0]), 0)
    x = np.array([[1.0, 0.0], [-1.0, 0.2], [0.0, 0.0]])
    with pytest.raises(RoundFailed, match="none of 2 updates goes the way of the trusted client's; all are left out"):
        fltrust(x @ x.T, 0)


def honest(k: int, seed: int, size: int = 200, noise: float = 0.6) -> Float64:
    rng = np.random.default_rng(seed)
    return np.asarray(rng.normal(size=size) + noise * rng.normal(size=(k, size)))


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(
    ("attack", "reason"),
    [
        (lambda x: 10.0 * x, "norm"),
        (lambda x: -x, "cosine"),
        (lambda x: np.tile(-3.0 * x[0], (len(x), 1)), "cosine"),
        (lambda x: 5.0 * np.random.default_rng(0).normal(size=x.shape), "distance"),
    ],
)
def test_the_screen_leaves_out_attackers_and_no_one_else(
    seed: int, attack: Callable[[Float64], Float64], reason: str
) -> None:
    x = honest(10, seed)
    x[:2] = attack(x[:2])
    verdict = screen(x @ x.T, shares(10))
    assert verdict.left_out == {0, 1}
    assert set(verdict.flagged) == {0, 1}
    assert all(reason in why for why in verdict.flagged.values())
    np.testing.assert_allclose(mixed(x, verdict), shares(10)[2:] @ x[2:] / shares(10)[2:].sum())


@pytest.mark.parametrize("noise", [0.0, 1e-6, 0.1, 1.0, 3.0])
def test_the_screen_leaves_honest_clients_alone(noise: float) -> None:
    for seed in range(5):
        x = honest(12, seed, noise=noise)
        verdict = screen(x @ x.T, shares(12))
        assert not verdict.flagged
        assert (verdict.scales == 1.0).all()


@settings(deadline=None, max_examples=30)
@given(k=st.integers(1, 9), seed=st.integers(0, 10**6))
def test_the_screen_never_leaves_out_half(k: int, seed: int) -> None:
    """Whatever came; who is flagged and stays is no longer than the median."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(k, 3)) * 10.0 ** rng.integers(-6, 7, (k, 1)) * rng.integers(0, 2, (k, 1))
    verdict = screen(x @ x.T, np.full(k, 1 / k))
    assert 2 * len(verdict.left_out) < k
    norms = np.linalg.norm(x, axis=1)
    for i in set(verdict.flagged) - verdict.left_out:
        assert verdict.weights[i] > 0
        assert verdict.scales[i] * norms[i] <= np.median(norms) * (1 + 1e-9)


def test_the_screen_leaves_out_the_worst_first() -> None:
    x = honest(5, 0)
    x[:3] *= np.array([[-1.0], [1e3], [1e6]])
    verdict = screen(x @ x.T, np.full(5, 0.2))
    assert verdict.flagged.keys() == {0, 1, 2}
    assert verdict.left_out == {1, 2}
    np.testing.assert_allclose(verdict.weights, [1 / 3, 0.0, 0.0, 1 / 3, 1 / 3])


@pytest.mark.parametrize("rule", COORDINATE_RULES)
def test_entries_over_those_who_train_a_column(rule: str) -> None:
    rng = np.random.default_rng(1)
    ranks, p = [4, 1, 2, 4, 2, 2, 4], shares(7)
    parts = [rng.normal(size=(5, r)) for r in ranks]
    got, held = coordinate_wise(parts, p, rule, 0.2)
    assert got.shape == (5, 4)
    assert held == 0
    for j in range(4):
        who = [i for i, r in enumerate(ranks) if r > j]
        columns = np.sort(np.stack([parts[i][:, j] for i in who]), axis=0)
        f = -(-len(who) // 5)
        centre = np.median(columns, axis=0) if rule == "median" else columns[f : len(who) - f].mean(axis=0)
        np.testing.assert_allclose(got[:, j], p[who].sum() * centre, rtol=1e-12)


def test_columns_without_a_safe_majority_are_held() -> None:
    parts = [np.ones((3, r)) for r in (4, 4, 2, 2, 2, 1)]
    got, held = coordinate_wise(parts, np.full(6, 1 / 6), "median", 0.2)
    assert held == 2
    np.testing.assert_allclose(got, np.tile([1.0, 5 / 6, 0.0, 0.0], (3, 1)))
    assert coordinate_wise(parts, np.full(6, 1 / 6), "trimmed-mean", 0.0)[1] == 0
    assert coordinate_wise(parts, np.full(6, 1 / 6), "median", 0.49)[1] == 4


@pytest.mark.parametrize(
    ("share", "clients", "f"), [(0.2, 10, 2), (0.2, 11, 3), (0.0, 9, 0), (0.3, 10, 3), (0.1, 1, 1)]
)
def test_how_many_are_hostile(share: float, clients: int, f: int) -> None:
    assert hostile_count(share, clients) == f


@pytest.mark.parametrize("share", [0.0, 0.1, 0.2, 0.3, 0.4, 0.49])
def test_how_many_clients_krum_needs(share: float) -> None:
    least = clients_needed(share)
    assert least > 2 * hostile_count(share, least) + 2
    assert all(k <= 2 * hostile_count(share, k) + 2 for k in range(1, least))


def test_no_count_is_above_twice_the_median() -> None:
    np.testing.assert_allclose(capped_shares([1, 2, 3]), np.array([1, 2, 3]) / 6)
    np.testing.assert_allclose(capped_shares([10, 10, 10**9]), [0.25, 0.25, 0.5])
    np.testing.assert_allclose(capped_shares([70, 70, 7 * 10**9]), [0.25, 0.25, 0.5])
