"""Linear discriminants from sums: against dense algebra over all rows, and the rule of Bayes that they come from."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from fedlora.discriminants import discriminants, scatter
from fedlora.errors import MethodError
from fedlora.rng import public_normal

WIDTH, CLASSES = 12, 4
Floats = NDArray[np.float64]


def rows(n: int = 400, seed: int = 0) -> tuple[Floats, NDArray[np.int64]]:
    """Gaussian classes of uneven size that share a covariance which is far from round."""
    g = np.random.default_rng(seed)
    labels = g.choice(CLASSES, n, p=[0.5, 0.3, 0.15, 0.05])
    labels[:CLASSES] = range(CLASSES)
    means = 2.0 * np.random.default_rng(9).normal(size=(CLASSES, WIDTH))
    root = np.random.default_rng(8).normal(size=(WIDTH, WIDTH)) * np.geomspace(3.0, 0.05, WIDTH)
    return means[labels] + g.normal(size=(n, WIDTH)) @ root.T, labels


def sums(x: Floats, labels: NDArray[np.int64], columns: int) -> tuple[Floats, Floats, Floats, float, Floats]:
    omega = public_normal(1, "sketch", "feature", shape=(WIDTH, columns))
    total = np.stack([x[labels == c].sum(0) for c in range(CLASSES)])
    return total, np.bincount(labels, minlength=CLASSES).astype(float), x.T @ (x @ omega), float(np.sum(x**2)), omega


def dense(x: Floats, labels: NDArray[np.int64], shrink: float) -> tuple[Floats, Floats]:
    means = np.stack([x[labels == c].mean(0) for c in range(CLASSES)])
    off = x - means[labels]
    s = off.T @ off / len(x)
    s = (1 - shrink) * s + shrink * np.trace(s) / WIDTH * np.eye(WIDTH)
    weights = np.linalg.solve(s, means.T).T
    return weights, np.log(np.bincount(labels) / len(x)) - np.einsum("cd,cd->c", weights, means) / 2


@pytest.mark.parametrize("shrink", [0.05, 0.5, 1.0])
def test_a_whole_sketch_gives_what_all_rows_give(shrink: float) -> None:
    x, labels = rows()
    weights, offsets = discriminants(scatter(*sums(x, labels, WIDTH)), shrink, 1.0)
    want, at = dense(x, labels, shrink)
    np.testing.assert_allclose(weights, want, rtol=1e-6, atol=1e-8 * np.abs(want).max())
    np.testing.assert_allclose(offsets, at, rtol=1e-6)


def test_sums_of_clients_that_hold_different_classes_give_the_same() -> None:
    x, labels = rows()
    parts = [sums(x[labels % 2 == k], labels[labels % 2 == k], WIDTH) for k in (0, 1)]
    together = [a + b for a, b in zip(parts[0][:4], parts[1][:4], strict=True)]
    a = discriminants(scatter(*together, parts[0][4]))  # type: ignore[arg-type]
    b = discriminants(scatter(*sums(x, labels, WIDTH)))
    for got, want in zip(a, b, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-7)


def test_a_narrow_sketch_keeps_the_size_of_what_it_does_not_hold() -> None:
    """Half the columns: the trace of S is kept, and new rows are told apart about as well."""
    x, labels = rows(4000)
    within = scatter(*sums(x, labels, WIDTH // 2))
    means = np.stack([x[labels == c].mean(0) for c in range(CLASSES)])
    trace = float(np.sum((x - means[labels]) ** 2))
    assert within.values.sum() + within.even * (WIDTH - len(within.values)) == pytest.approx(trace)
    assert len(within.values) <= WIDTH // 2

    def right(weights: Floats, offsets: Floats) -> float:
        new, truth = rows(4000, 1)
        return float(np.mean((new @ weights.T + offsets).argmax(1) == truth))

    best = right(*dense(x, labels, 0.5))
    assert best > 0.8 > max(np.bincount(labels)) / len(labels) + 0.2
    assert right(*discriminants(within, 0.5, 1.0)) > best - 0.02


def test_scores_are_log_probabilities_of_gaussian_classes() -> None:
    """Differences of scores are the log odds that the densities have, priors with them."""
    x, labels = rows()
    weights, offsets = discriminants(scatter(*sums(x, labels, WIDTH)), 0.0, 1.0)
    means = np.stack([x[labels == c].mean(0) for c in range(CLASSES)])
    off = x - means[labels]
    inverse = np.linalg.inv(off.T @ off / len(x))
    far = np.stack([np.einsum("nd,de,ne->n", x - m, inverse, x - m) for m in means], 1)
    odds = -far / 2 + np.log(np.bincount(labels) / len(x))
    got = x @ weights.T + offsets
    np.testing.assert_allclose(got - got[:, :1], odds - odds[:, :1], rtol=1e-5, atol=1e-5)


def test_tempering_divides_the_evidence_and_not_the_priors() -> None:
    x, labels = rows()
    within = scatter(*sums(x, labels, WIDTH))
    (w1, b1), (w4, b4) = discriminants(within, temper=1.0), discriminants(within, temper=4.0)
    prior = np.log(np.bincount(labels) / len(labels))
    np.testing.assert_allclose(w4, w1 / 4)
    np.testing.assert_allclose(b4 - prior, (b1 - prior) / 4)


def test_another_omega_is_refused() -> None:
    x, labels = rows()
    total, counts, sketch, energy, omega = sums(x, labels, 6)
    with pytest.raises(MethodError, match="asymmetric"):
        scatter(total, counts, sketch, energy, omega[::-1])


@pytest.mark.parametrize("again", [1, 10])
def test_classes_of_one_point_have_a_rule_too(again: int) -> None:
    """Float32 sums of rows that equal their class mean: nothing is left of S but rounding."""
    points = np.random.default_rng(3).normal(size=(CLASSES, WIDTH)) + 5.0
    x, labels = np.tile(points, (again, 1)), np.tile(np.arange(CLASSES), again)
    total, counts, sketch, energy, omega = sums(x, labels, 6)
    weights, offsets = discriminants(
        scatter(total.astype(np.float32), counts, sketch.astype(np.float32), float(np.float32(energy)), omega)
    )
    assert ((x @ weights.T + offsets).argmax(1) == labels).all()
    assert np.abs(x @ (weights - weights.mean(0)).T).max() < 1e4
