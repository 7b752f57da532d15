"""Prototypes, routing and the nearest class mean against a slow reading of their definitions."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from fedlora.continual.prototypes import TEMPERATURE, Prototypes, from_sums, joined
from fedlora.errors import DataError
from fedlora.frame import DTYPES

seeds = st.integers(0, 2**32 - 1)


def unit(x: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.asarray(x / np.linalg.norm(x, axis=-1, keepdims=True))


def some(rng: np.random.Generator) -> Prototypes:
    """Three tasks of 2, 1 and 3 prototypes in 5 dimensions; the labels 0 to 5, but the second task has none."""
    one = from_sums("news", np.vstack([rng.normal(size=(2, 5)), np.zeros((1, 5))]), np.array([3.0, 1.0, 0.0]))
    two = from_sums("mail", rng.normal(size=(1, 5)), np.array([9.0]), labelled=False)
    sums = np.vstack([np.zeros((3, 5)), rng.normal(size=(3, 5))])
    three = from_sums("wiki", sums, np.array([0.0, 0.0, 0.0, 2.0, 2.0, 2.0]))
    return joined([one, two, three])


def test_prototypes_are_means_of_norm_1_of_the_classes_that_have_rows() -> None:
    rng = np.random.default_rng(0)
    features = unit(rng.normal(size=(12, 4)))
    labels = np.array([0, 2] * 6)
    clients = [slice(0, 5), slice(5, 12)]
    sums, counts = np.zeros((4, 4)), np.zeros(4)
    for rows in clients:  # each adds its own sums
        for x, label in zip(features[rows], labels[rows], strict=True):
            sums[label] += x
            counts[label] += 1
    made = from_sums("news", sums.astype(np.float32), counts.astype(np.float32))
    assert made.tasks == ("news", "news")
    assert made.labels.tolist() == [0, 2]
    assert made.means.dtype == np.float32
    for row, label in zip(made.means, (0, 2), strict=True):
        np.testing.assert_allclose(row, unit(features[labels == label].mean(0)), atol=1e-6)


@given(seeds)
@settings(max_examples=20, deadline=None)
def test_routing_is_the_nearest_prototype_and_a_softmax_of_the_best_cosines(seed: int) -> None:
    rng = np.random.default_rng(seed)
    known = some(rng)
    assert known.names == ("news", "mail", "wiki")
    features = unit(rng.normal(size=(7, 5)))
    tasks, weights = known.routed(features, 0.2)
    for x, task, row in zip(features, tasks, weights, strict=True):
        distance = [float(np.linalg.norm(x - mean)) for mean in known.means]  # of unit vectors: the same order
        assert known.names[task] == known.tasks[int(np.argmin(distance))]
        best = {
            n: max(float(x @ m) for m, t in zip(known.means, known.tasks, strict=True) if t == n) for n in known.names
        }
        raised = [math.exp(best[n] / 0.2) for n in known.names]
        np.testing.assert_allclose(row, np.array(raised) / sum(raised), rtol=1e-9)


def test_the_temperature_says_how_soft_and_ties_go_to_the_earlier_task() -> None:
    rng = np.random.default_rng(1)
    known = some(rng)
    features = unit(rng.normal(size=(6, 5)))
    tasks, sharp = known.routed(features, 1e-6)
    np.testing.assert_allclose(sharp, np.eye(3)[tasks], atol=1e-9)
    np.testing.assert_allclose(known.routed(features, 1e6)[1], 1.0 / 3.0, atol=1e-5)
    np.testing.assert_array_equal(known.routed(features)[1], known.routed(features, TEMPERATURE)[1])
    same = joined([from_sums(t, np.ones((1, 3)), np.ones(1)) for t in ("b", "a")])
    tied, halves = same.routed(np.eye(3))
    assert tied.tolist() == [0, 0, 0]
    np.testing.assert_allclose(halves, 0.5)


def test_the_nearest_class_mean_looks_at_labels_that_are_allowed() -> None:
    rng = np.random.default_rng(2)
    known = some(rng)
    features = unit(rng.normal(size=(40, 5)))
    for allowed in (None, [3, 4, 5], [0, 4], [1], [-1, 1]):
        of = [k for k, y in enumerate(known.labels) if y >= 0 and (allowed is None or y in allowed)]
        nearest = [of[int(np.argmin([np.linalg.norm(x - known.means[k]) for k in of]))] for x in features]
        assert known.nearest_class(features, allowed).tolist() == known.labels[nearest].tolist()
    with pytest.raises(DataError, match=r"no prototype has a label of \[2, 7\]; there are \[0, 1, 3, 4, 5\]"):
        known.nearest_class(features, [2, 7])
    with pytest.raises(DataError, match=r"no prototype has a label; there are \[\]"):
        from_sums("mail", np.ones((1, 5)), np.ones(1), labelled=False).nearest_class(features)


def test_prototypes_survive_a_states_memory() -> None:
    known = some(np.random.default_rng(3))
    arrays = known.to_arrays()
    assert json.loads(arrays["tasks"].tobytes()) == list(known.tasks)
    assert {x.dtype for x in arrays.values()} <= set(DTYPES.values())
    again = Prototypes.from_arrays({n: x.copy() for n, x in arrays.items()})
    assert again.tasks == known.tasks
    np.testing.assert_array_equal(again.means, known.means)
    np.testing.assert_array_equal(again.labels, known.labels)
    with pytest.raises(DataError, match="with n tasks and labels, got"):
        Prototypes.from_arrays({**arrays, "labels": arrays["labels"][:5]})
    with pytest.raises(DataError, match="norm 1"):
        Prototypes.from_arrays({**arrays, "means": 2.0 * arrays["means"]})


def test_routing_needs_two_tasks_and_features_that_fit() -> None:
    one = from_sums("news", np.eye(3), np.ones(3))
    with pytest.raises(DataError, match="prototypes of 1: news"):
        one.routed(np.eye(3))
    none = Prototypes(np.zeros((0, 3), np.float32), (), np.zeros(0, np.int64))
    with pytest.raises(DataError, match="prototypes of 0: none"):
        none.routed(np.eye(3))
    two = joined([one, from_sums("mail", np.eye(3), np.ones(3))])
    for bad in (np.eye(4), np.ones(3), np.full((2, 3), np.nan)):
        with pytest.raises(DataError, match=r"must be finite \[n, 3\]"):
            two.routed(bad)
        with pytest.raises(DataError, match=r"must be finite \[n, 3\]"):
            two.nearest_class(bad)


@pytest.mark.parametrize(
    ("sums", "counts", "match"),
    [
        (np.ones((2, 3)), np.zeros(2), "task t: no row was counted"),
        (np.ones((2, 3)), np.ones(3), r"sums \(2, 3\) and counts \(3,\)"),
        (np.ones(3), np.ones(3), r"must be \[C, d\]"),
        (np.full((2, 3), np.inf), np.ones(2), "must be finite"),
        (np.array([[1.0, 0.0], [0.0, 0.0]]), np.ones(2), "features of class 1 sum to 0"),
    ],
)
def test_sums_without_a_mean_are_refused(sums: NDArray[np.float64], counts: NDArray[np.float64], match: str) -> None:
    with pytest.raises(DataError, match=match):
        from_sums("t", sums, counts)


def test_joined_refuses_nothing_other_widths_and_a_task_twice() -> None:
    one, two = from_sums("a", np.eye(3), np.ones(3)), from_sums("b", np.eye(4), np.ones(4))
    with pytest.raises(DataError, match="no prototypes to join"):
        joined([])
    with pytest.raises(DataError, match=r"widths \[3, 4\]"):
        joined([one, two])
    with pytest.raises(DataError, match="of a came twice"):
        joined([one, one])
