"""Routing by discriminants from sums, against discriminants from all rows."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from fedlora.continual.router import Router, added, fit, largest, nearest_class, omega, task_names
from fedlora.errors import DataError

Float64 = NDArray[np.float64]
WIDTH, SEED = 24, 3


def rows_of(rng: np.random.Generator, centre: Float64, spread: Float64, count: int) -> Float64:
    x = centre + rng.normal(size=(count, WIDTH)) @ spread
    return np.asarray(x / np.linalg.norm(x, axis=1, keepdims=True))


@pytest.fixture
def data() -> dict[str, tuple[Float64, NDArray[np.int64]]]:
    """Two tasks whose means differ by little, across a direction of little noise; noise along others is large."""
    rng = np.random.default_rng(0)
    spread = np.diag(np.r_[np.full(4, 0.6), np.full(WIDTH - 4, 0.03)])
    centres = 0.5 * rng.normal(size=(1, WIDTH)) + 0.08 * rng.normal(size=(5, WIDTH))
    found = {}
    for task, classes in (("a", [0, 1, 2]), ("b", [3, 4])):
        x = np.concatenate([rows_of(rng, centres[c], spread, 60) for c in classes])
        found[task] = (x, np.repeat(classes, 60))
    return found


def summed(
    kept: dict[str, Any], task: str, x: Float64, y: NDArray[np.int64], columns: int, *, labelled: bool = True
) -> dict[str, Any]:
    sums, counts = np.zeros((5, WIDTH)), np.bincount(y, minlength=5).astype(float)
    np.add.at(sums, y, x)
    return added(kept, task, sums, counts, x.T @ (x @ omega(SEED, WIDTH, columns)), labelled=labelled)


def router_of(data: dict[str, tuple[Float64, NDArray[np.int64]]], columns: int) -> Router:
    kept: dict[str, Any] = {}
    for task, (x, y) in data.items():
        kept = summed(kept, task, x, y, columns)
    return fit(kept, SEED)


def test_it_is_the_linear_discriminant_of_all_rows(data: dict[str, tuple[Float64, NDArray[np.int64]]]) -> None:
    router = router_of(data, WIDTH)
    x, y = (np.concatenate([d[i] for d in data.values()]) for i in (0, 1))
    means = np.stack([x[y == c].mean(0) for c in range(5)])
    s = (x - means[y]).T @ (x - means[y]) / len(x)
    inverse = np.linalg.inv(s)
    score = x @ inverse @ means.T - 0.5 * np.sum(means @ inverse * means, axis=1)
    found = x @ router.weights.T + router.offsets
    np.testing.assert_allclose(found - found[:, :1], score - score[:, :1], rtol=0.02, atol=0.02 * np.abs(score).max())
    assert router.labels.tolist() == [0, 1, 2, 3, 4]
    assert router.names == ("a", "b")


def test_it_finds_tasks_that_the_nearest_mean_mistakes(data: dict[str, tuple[Float64, NDArray[np.int64]]]) -> None:
    x, y = (np.concatenate([d[i] for d in data.values()]) for i in (0, 1))
    truth = (y >= 3).astype(int)
    means = np.stack([x[y == c].mean(0) for c in range(5)])
    nearest = np.mean(((x @ (means / np.linalg.norm(means, axis=1, keepdims=True)).T).argmax(1) >= 3) == truth)
    few, all_ = (np.mean(router_of(data, columns).routed(x)[0] == truth) for columns in (8, WIDTH))
    assert nearest < 0.9 < few <= all_ + 0.02
    weights = router_of(data, 8).routed(x)[1]
    np.testing.assert_allclose(weights.sum(1), 1.0)
    assert (weights.argmax(1) == router_of(data, 8).routed(x)[0]).all()


def test_sums_of_clients_give_the_router_of_all(data: dict[str, tuple[Float64, NDArray[np.int64]]]) -> None:
    x, y = data["a"]
    whole = summed({}, "a", x, y, 8)
    parts = [summed({}, "a", x[i::3], y[i::3], 8) for i in range(3)]
    np.testing.assert_allclose(sum(p["sums"] for p in parts), whole["sums"])
    np.testing.assert_allclose(sum(p["sketch"] for p in parts), whole["sketch"])


def test_rows_without_labels_are_one_class_of_their_task(data: dict[str, tuple[Float64, NDArray[np.int64]]]) -> None:
    kept: dict[str, Any] = {}
    for task, (x, _) in data.items():
        kept = summed(kept, task, x, np.zeros(len(x), np.int64), 8, labelled=False)
    router = fit(kept, SEED)
    assert router.tasks == ("a", "b")
    assert router.labels.tolist() == [-1, -1]


def test_what_cannot_be_routed_is_refused(data: dict[str, tuple[Float64, NDArray[np.int64]]]) -> None:
    x, y = data["a"]
    kept = summed({}, "a", x, y, 8)
    with pytest.raises(DataError, match="there is a alone"):
        fit(kept, SEED).routed(x)
    with pytest.raises(DataError, match="task a: its features were added already"):
        summed(kept, "a", x, y, 8)
    with pytest.raises(DataError, match="no row was counted"):
        added({}, "b", np.zeros((2, WIDTH)), np.zeros(2), np.zeros((WIDTH, 4)), labelled=True)
    with pytest.raises(DataError, match="do not fit"):
        added({}, "b", np.zeros((2, WIDTH)), np.ones(3), np.zeros((WIDTH, 4)), labelled=True)
    with pytest.raises(DataError, match="no features were summed"):
        fit({}, SEED)
    with pytest.raises(DataError, match=r"features \(2, 3\) must be \[n, 24\]"):
        router_of(data, 8).routed(np.zeros((2, 3)))


def test_the_nearest_class_is_among_those_allowed(data: dict[str, tuple[Float64, NDArray[np.int64]]]) -> None:
    kept: dict[str, Any] = {}
    for task, (x, y) in data.items():
        kept = summed(kept, task, x, y, 8)
    assert task_names(kept) == ("a", "b")
    x = np.concatenate([d[0] for d in data.values()])
    y = np.concatenate([d[1] for d in data.values()])
    means = np.stack([x[y == c].mean(0) for c in range(5)])
    cosine = x @ (means / np.linalg.norm(means, axis=1, keepdims=True)).T
    np.testing.assert_array_equal(nearest_class(kept, x), cosine.argmax(1))
    np.testing.assert_array_equal(nearest_class(kept, x, (1, 4)), np.where(cosine[:, 1] > cosine[:, 4], 1, 4))
    with pytest.raises(DataError, match=r"no class among \[9\] has a mean yet"):
        nearest_class(kept, x, [9])
    with pytest.raises(DataError, match="are they of the same base"):
        nearest_class(kept, x[:, :3])


def test_the_largest_weights_are_kept_and_sum_to_one() -> None:
    weights = np.array([[0.5, 0.2, 0.3], [0.0, 1.0, 0.0], [0.4, 0.4, 0.2]])
    np.testing.assert_allclose(largest(weights, 2), [[0.625, 0, 0.375], [0, 1, 0], [0.5, 0.5, 0]])
    np.testing.assert_array_equal(largest(weights, 1), [[1, 0, 0], [0, 1, 0], [1, 0, 0]])
    np.testing.assert_allclose(largest(weights, 9), weights)
    with pytest.raises(DataError, match="k = 0"):
        largest(weights, 0)
