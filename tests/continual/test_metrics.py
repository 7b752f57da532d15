"""Measures of continual learning against a matrix worked out by hand, and paired tests against a simulation."""

from __future__ import annotations

import numpy as np
import pytest

from fedlora.continual.metrics import (
    Measures,
    average_accuracy,
    backward_transfer,
    forgetting,
    forward_transfer,
    measures,
    paired_difference,
    plasticity,
)
from fedlora.errors import DataError

# Tasks 1, 2, 3; in hundredths, so that every number below can be checked by head.
R = np.array([[90.0, 30.0, 10.0], [94.0, 80.0, 25.0], [84.0, 83.0, 70.0]])
B = np.array([50.0, 20.0, 30.0])


def test_every_measure_of_a_matrix_worked_out_by_hand() -> None:
    found = measures(R, B)
    assert found.average_accuracy == pytest.approx((84 + 83 + 70) / 3)
    assert found.backward_transfer == pytest.approx(((84 - 90) + (83 - 80)) / 2) == pytest.approx(-1.5)
    assert found.forgetting == pytest.approx(((94 - 84) + (80 - 83)) / 2) == pytest.approx(3.5)
    assert found.forward_transfer == pytest.approx(((30 - 20) + (25 - 30)) / 2) == pytest.approx(2.5)
    assert found.plasticity == pytest.approx((90 + 80 + 70) / 3)


def test_nothing_changes_when_nothing_is_forgotten() -> None:
    kept = np.tile([0.9, 0.8, 0.7], (3, 1))
    assert measures(kept, np.array([0.9, 0.8, 0.7])) == Measures(
        average_accuracy=pytest.approx(0.8),
        backward_transfer=0.0,
        forgetting=0.0,
        forward_transfer=0.0,
        plasticity=pytest.approx(0.8),
    )


def test_above_the_diagonal_only_forward_transfer_looks() -> None:
    gaps = np.where(np.triu(np.ones((3, 3)), 1) > 0, np.nan, R)
    full, without = measures(R, B), measures(gaps, B)
    assert without.forward_transfer is None
    assert (without.average_accuracy, without.backward_transfer, without.forgetting, without.plasticity) == (
        full.average_accuracy,
        full.backward_transfer,
        full.forgetting,
        full.plasticity,
    )
    far = R.copy()
    far[0, 2] = np.nan
    assert forward_transfer(far, B) == pytest.approx(2.5)
    assert forward_transfer(R, np.array([np.nan, 20.0, 30.0])) == pytest.approx(2.5)
    assert forward_transfer(R, np.array([50.0, np.nan, 30.0])) is None


def test_one_task_has_no_transfer() -> None:
    assert measures(np.array([[0.7]]), np.array([0.1])) == Measures(
        average_accuracy=0.7, backward_transfer=None, forgetting=None, forward_transfer=None, plasticity=0.7
    )


@pytest.mark.parametrize("measure", [average_accuracy, backward_transfer, forgetting, plasticity])
def test_matrices_that_do_not_fit_are_refused(measure) -> None:  # type: ignore[no-untyped-def]
    for shape in ((0, 0), (2, 3), (3,)):
        with pytest.raises(DataError, match=r"expected \[T, T\]"):
            measure(np.zeros(shape))
    gap = R.copy()
    gap[2, 1] = np.nan
    with pytest.raises(DataError, match=r"task 1 after task 2 \(from 0\) is nan"):
        measure(gap)
    with pytest.raises(DataError, match="one for each of 3 tasks"):
        forward_transfer(R, B[:2])


def test_a_paired_difference_worked_out_by_hand() -> None:
    a = np.array([True, True, True, False])
    b = np.array([True, False, False, True])
    gap = np.array([0.0, 1.0, 1.0, -1.0])  # mean 1/4, squares around it 11/4
    assert paired_difference(a, b) == pytest.approx((0.25, np.sqrt(11 / 4 / 3 / 4)))
    assert paired_difference(b, a)[0] == pytest.approx(-gap.mean())
    assert paired_difference(a, a) == (0.0, 0.0)


def test_its_standard_error_is_the_spread_over_draws_of_rows() -> None:
    rng = np.random.default_rng(0)
    hard = rng.random((4000, 60)) < 0.5  # rows that both find hard: correlation that pairing removes
    a, b = hard & (rng.random(hard.shape) < 0.9), hard & (rng.random(hard.shape) < 0.8)
    found = np.array([paired_difference(x, y) for x, y in zip(a, b, strict=True)])
    assert found[:, 0].mean() == pytest.approx(0.05, abs=0.005)
    assert np.sqrt(np.mean(found[:, 1] ** 2)) == pytest.approx(found[:, 0].std(), rel=0.05)


def test_outcomes_on_other_rows_are_refused() -> None:
    yes = np.ones(3, np.bool_)
    for a, b in ((yes, yes[:2]), (yes[:1], yes[:1]), (yes[None], yes[None])):
        with pytest.raises(DataError, match="the same rows, at least 2"):
            paired_difference(a, b)
