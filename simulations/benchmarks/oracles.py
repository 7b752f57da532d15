"""What each method should compute: published formulas, dense, in float64, that share nothing with the methods' files.

An oracle takes W_eff - W0 before a round (dense, by module), what the clients who answered held and ended with, and the
largest enrolled rank; it gives W_eff - W0 after the round. Under fedsa-lora both are the shared A. The papers are named
in `strategies/`, in the file of each method; s_k is folded into B_k throughout, and alphas and ranks may differ.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from simulations.benchmarks.stand_in import Dense, Took

__all__ = ["OWN", "Oracle", "ended", "moves", "off", "size"]

Oracle = Callable[[Dense, Sequence[Took], int], Dense]

RIDGE = 0.01  # lora-fair's default


def ended(group: Sequence[Took]) -> Dense:
    """sum p_k (what client k's W_eff was after training)."""
    return _mean(group, [t.model(t.trained) for t in group])


def moves(before: Dense, group: Sequence[Took], top: int) -> Dense:
    """The exact mean: W + sum p_k (what client k's own W_eff moved by)."""
    end, start = ended(group), _mean(group, [t.model(t.start) for t in group])
    return {n: w + end[n] - start[n] for n, w in before.items()}


def fedit(before: Dense, group: Sequence[Took], top: int) -> Dense:
    """mean(B) mean(A), zero-padded."""
    return {n: b @ a for n, (a, b) in _factor_means(group, _shares(group), 0.0).items()}


def hetlora(before: Dense, group: Sequence[Took], top: int) -> Dense:
    """The same, weighed by the norms of the products."""
    sizes = [size({n: f.dense() for n, f in t.trained.items()}) for t in group]
    return {n: b @ a for n, (a, b) in _factor_means(group, [x / sum(sizes) for x in sizes], 0.0).items()}


def flexlora(before: Dense, group: Sequence[Took], top: int) -> Dense:
    """SVD of the mean of the products, cut at the largest enrolled rank."""
    svd = {n: np.linalg.svd(x, full_matrices=False) for n, x in ended(group).items()}
    return {n: (u[:, :top] * s[:top]) @ vt[:top] for n, (u, s, vt) in svd.items()}


def lora_fair(before: Dense, group: Sequence[Took], top: int) -> Dense:
    """(B + dB) A with the means A and B and the dB that ridge regression on the exact mean gives (normal equations)."""
    exact, w = ended(group), {}
    for n, (a, b) in _factor_means(group, _shares(group), 1.0).items():
        change = np.linalg.solve(a @ a.T + RIDGE * np.eye(len(a)), a @ (exact[n] - b @ a).T).T
        w[n] = (b + change) @ a
    return w


def frlora(before: Dense, group: Sequence[Took], top: int) -> Dense:
    """W + mean(B) mean(A) - B0 A0, with the common start (B0, A0)."""
    start = {n: max((t.start[n] for t in group), key=lambda f: f.rank).dense() for n in before}
    return {n: before[n] + b @ a - start[n] for n, (a, b) in _factor_means(group, _shares(group), 1.0).items()}


def fedsa(before: Dense, group: Sequence[Took], top: int) -> Dense:
    """The mean of A; rows that a client does not hold stay as they were."""
    rows = [{n: np.vstack([t.trained[n].a, x[t.trained[n].rank :]]) for n, x in before.items()} for t in group]
    return _mean(group, rows)


OWN: Mapping[str, Oracle] = {
    "fedit": fedit,
    "fedsa-lora": fedsa,
    "flexlora": flexlora,
    "frlora": frlora,
    "hetlora": hetlora,
    "lora-fair": lora_fair,
}


def size(x: Mapping[str, NDArray[np.float64]]) -> float:
    """Frobenius norm over all modules."""
    return float(np.sqrt(sum(np.sum(v**2) for v in x.values())))


def off(got: Dense, want: Dense) -> float:
    """||got - want||_F / ||want||_F over all modules; 0 of 0 is 0."""
    wrong = size({n: got[n] - x for n, x in want.items()})
    return wrong / size(want) if wrong else 0.0


def _shares(group: Sequence[Took]) -> list[float]:
    return [t.examples / sum(x.examples for x in group) for t in group]


def _mean(group: Sequence[Took], models: Sequence[Dense]) -> Dense:
    shares = _shares(group)
    return {n: sum((p * m[n] for p, m in zip(shares, models, strict=True)), 0.0 * x) for n, x in models[0].items()}


def _factor_means(
    group: Sequence[Took], weights: Sequence[float], rest: float
) -> dict[str, tuple[NDArray[np.float64], NDArray[np.float64]]]:
    """Weighted means of A_k and s_k B_k, filled up to the largest rank with `rest` times the largest client's start."""
    pairs = {}
    for n in group[0].start:
        full = max((t.start[n] for t in group), key=lambda f: f.rank)
        a, b = np.zeros(full.a.shape), np.zeros(full.b.shape)
        for w, f in zip(weights, (t.trained[n] for t in group), strict=True):
            a += w * np.vstack([f.a, rest * full.a[f.rank :]])
            b += w * np.hstack([f.scale * f.b, rest * full.scale * full.b[:, f.rank :]])
        pairs[n] = a, b
    return pairs
