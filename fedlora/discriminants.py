"""Linear discriminants from sums that add over clients: what classes look like, without anybody's rows.

    log p(c | h) = w_c^T h + b_c + const,    w_c = S^-1 mu_c,    b_c = log(n_c / n) - w_c^T mu_c / 2

with class means mu_c, counts n_c and the covariance S within classes: the rule of Bayes for Gaussian classes that share
S (Fisher, 1936; Rao, 1948). Clients give sums and counts by class, the energy `sum |h|^2` and a sketch `F Omega` of
`F = sum h h^T`; all four add. Less the means, `(F - sum n_c mu_c mu_c^T) Omega` is the sketch of n S, whose leading
part it tells; what it does not hold of the energy of S is taken to be even in all other directions.

Used for routing (fedlora/continual/router.py), and as the head that a classifier begins with. A head that is fitted
before the features move keeps them from being bent to a random one (Kumar et al., Fine-Tuning can Distort Pretrained
Features, ICLR 2022), and class means are how to fit it where labels are uneven over clients (Legate et al., Guiding The
Last Layer in Federated Learning with Pre-Trained Models, NeurIPS 2023).

Cost: d (C + s) + C + 1 numbers from a client; O(d s (C + s)) to fit, with d features, C classes, s columns.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedlora.adapter import Array
from fedlora.continual.design import second_moment

Float64 = NDArray[np.float64]

__all__ = ["Within", "discriminants", "scatter"]

SHRINK = 0.5  # share of S that is made the same in all directions; few rows tell their classes apart too well
TEMPER = 4.0  # what evidence is divided by: features of one row are no independent witnesses (docs/LOG.md)
_ROUNDING = 1e-4  # share of the energy; S below it cannot be told from float32 sums
_LEAST = 1e-6  # share of the energy that S is taken to have at least off its vectors
_ROUND = 0.01  # share of the energy that S is taken to have at least when it is made round


@dataclass(frozen=True, kw_only=True)
class Within:
    """Classes that were seen: `means [C, d]`, `counts [C]`, and what n S is: `values [k]` along the orthonormal columns
    of `vectors [d, k]`, `even` along every other direction; `energy` is that of all rows, means and all."""

    means: Float64
    counts: Float64
    vectors: Float64
    values: Float64
    even: float
    energy: float

    def solved(self, top: Array, rest: float) -> Float64:
        """`n M^-1 mu_c`, `[C, d]`, where M is `top [k]` along `vectors` and `rest` along all else."""
        along = self.means @ self.vectors * (1.0 / top - 1.0 / rest)
        return np.asarray(self.counts.sum() * (self.means / rest + along @ self.vectors.T), np.float64)


def scatter(sums: Array, counts: Array, sketch: Array, energy: float, omega: Array) -> Within:
    """Means and scatter within classes out of `sums [C, d]`, `counts [C]` (above 0), `sketch [d, s]`, `energy`.

    Raises: MethodError as `fedlora.continual.design.second_moment`, for another `omega [d, s]` or other sums.
    """
    n: Float64 = counts.astype(np.float64)
    means: Float64 = sums.astype(np.float64) / n[:, None]
    inner = sketch - (means * n[:, None]).T @ (means @ omega)
    left = max(energy - float(np.sum(n * np.sum(means**2, axis=1))), 0.0)
    if left <= _ROUNDING * energy:  # each class is one point, and the sketch of S is what rounding leaves
        vectors, values = np.zeros((len(inner), 0)), np.zeros(0)
    else:
        vectors, values = second_moment(inner, omega, left)
    even = max(left - float(values.sum()), _LEAST * energy) / max(len(vectors) - len(values), 1)
    return Within(means=means, counts=n, vectors=vectors, values=values, even=even, energy=energy)


def discriminants(within: Within, shrink: float = SHRINK, temper: float = TEMPER) -> tuple[Float64, Float64]:
    """Weights `[C, d]` and offsets `[C]` of the classes, with `(1 - shrink) S + shrink tr(S)/d I` in place of S.

    All of it but the priors is divided by `temper`, which leaves equal classes in their order and makes the
    probabilities less sure. Source: the shrinkage is that of Friedman, Regularized Discriminant Analysis, JASA 1989,
    eq. 18, towards one size.
    """
    width = len(within.vectors)
    trace = float(within.values.sum()) + within.even * (width - len(within.values))
    size = max(trace, _ROUND * within.energy) / width
    kept, added = 1.0 - shrink, shrink * size
    weights = within.solved(kept * within.values + added, kept * within.even + added) / temper
    share = within.counts / within.counts.sum()
    return weights, np.log(share) - np.sum(weights * within.means, axis=1) / 2.0
