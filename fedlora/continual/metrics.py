"""What continual learning keeps and loses, from the accuracy matrix.

`R [T, T]`: `R[i, j]` is the accuracy on task j after training task i, tasks in the order of training; NaN above the
diagonal where it was not measured. `b [T]`: the accuracy of the untrained base on each task; NaN where not measured.
Units are those of R. Every mean is over tasks, whatever their numbers of rows. Papers differ (some divide by T, some
take the first accuracy for the best): print R beside these.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedlora.adapter import Array
from fedlora.errors import DataError


@dataclass(frozen=True, kw_only=True)
class Measures:
    """All of one run. None: not defined (transfer and forgetting of one task), or not measured."""

    average_accuracy: float
    backward_transfer: float | None
    forgetting: float | None
    forward_transfer: float | None
    plasticity: float


def measures(R: Array, b: Array) -> Measures:
    """Every measure below. Raises: DataError as they do."""
    return Measures(
        average_accuracy=average_accuracy(R),
        backward_transfer=backward_transfer(R),
        forgetting=forgetting(R),
        forward_transfer=forward_transfer(R, b),
        plasticity=plasticity(R),
    )


def average_accuracy(R: Array) -> float:
    """`1/T sum_j R[T, j]`. Raises: DataError if R is not square or has a gap on or below the diagonal.

    Source: Lopez-Paz and Ranzato, Gradient Episodic Memory, NeurIPS 2017, eq. 2.
    """
    _require_matrix(R)
    return float(np.mean(R[-1]))


def backward_transfer(R: Array) -> float | None:
    """`1/(T-1) sum_{j<T} (R[T, j] - R[j, j])`; negative: later tasks cost earlier ones. One task: None.

    Source: Lopez-Paz and Ranzato, 2017, eq. 3. Raises: DataError as `average_accuracy`.
    """
    _require_matrix(R)
    return float(np.mean((R[-1] - np.diagonal(R))[:-1])) if len(R) > 1 else None


def forgetting(R: Array) -> float | None:
    """`1/(T-1) sum_{j<T} (max_{j<=l<T} R[l, j] - R[T, j])`, from the best before the last task. One task: None.

    Source: Chaudhry et al., Riemannian Walk, ECCV 2018, section 3. Raises: DataError as `average_accuracy`.
    """
    _require_matrix(R)
    last = len(R) - 1
    return float(np.mean([R[j:last, j].max() - R[last, j] for j in range(last)])) if last else None


def forward_transfer(R: Array, b: Array) -> float | None:
    """`1/(T-1) sum_{j>1} (R[j-1, j] - b[j])`: what earlier tasks taught of the next. One task, or a gap: None.

    Source: Lopez-Paz and Ranzato, 2017, eq. 4. Raises: DataError as `average_accuracy`, or if b is not `[T]`.
    """
    _require_matrix(R)
    if b.shape != (len(R),):
        raise DataError(f"the untrained accuracies have shape {b.shape}, expected one for each of {len(R)} tasks")
    if len(R) < 2:
        return None
    mean = float(np.mean(np.diagonal(R, 1) - b[1:]))
    return mean if math.isfinite(mean) else None


def plasticity(R: Array) -> float:
    """`1/T sum_j R[j, j]`: how well each task was learnt when it was trained. Raises: as `average_accuracy`."""
    _require_matrix(R)
    return float(np.mean(np.diagonal(R)))


def paired_difference(
    correct_a: NDArray[np.bool_] | NDArray[np.float64], correct_b: NDArray[np.bool_] | NDArray[np.float64]
) -> tuple[float, float]:
    """Accuracy of a less accuracy of b on the same n rows, both `[n]`, and its standard error.

    A row is right or wrong, or where several seeds were trained the share of them in which it is right.

    The error is that of the mean of the paired differences (sample variance, n - 1): rows that both find hard cancel.
    It covers the draw of test rows only, not that of seeds. Raises: DataError if shapes differ or n is below 2.
    """
    if correct_a.shape != correct_b.shape or correct_a.ndim != 1 or len(correct_a) < 2:
        raise DataError(
            f"two methods compare on the same rows, at least 2: got {correct_a.shape} and {correct_b.shape} outcomes"
        )
    gap = correct_a.astype(np.float64) - correct_b.astype(np.float64)
    return float(gap.mean()), float(gap.std(ddof=1) / math.sqrt(len(gap)))


def _require_matrix(R: Array) -> None:
    if R.ndim != 2 or R.shape[0] != R.shape[1] or not len(R):
        raise DataError(f"the accuracy matrix has shape {R.shape}, expected [T, T]: tasks trained by tasks tested")
    gaps = np.argwhere(~np.isfinite(np.tril(R)))
    if len(gaps):
        i, j = gaps[0].tolist()
        raise DataError(f"the accuracy of task {j} after task {i} (from 0) is {R[i, j]}; was it evaluated?")
