"""FedEx-LoRA and FlexLoRA by their formulas, densely, right or as published, for one module and one round.

Singhal et al., "FedEx-LoRA", ACL 2025; Bai et al., "FlexLoRA", NeurIPS 2024. Written from the formulas.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from fedlora.adapter import Factors
from fedlora.rng import stream

Matrix = NDArray[np.floating]
EXAMPLES = (900, 40, 310, 70, 520, 15, 230, 640, 110, 180)
SCALES = (1.0, 4.0, 0.5, 2.0)  # alphas 16, 64, 8, 32 at rank 16; powers of two, so that B / s rounds nothing


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """What one round's clients ended with, whole factors in float32, and their common start (rank R, scale 1)."""

    start: Factors
    trained: tuple[Factors, ...]
    examples: tuple[int, ...]

    @property
    def shares(self) -> list[float]:
        return [n / sum(self.examples) for n in self.examples]


def inputs(
    shape: tuple[int, int], ranks: Sequence[int], scales: Sequence[float], *, equal: bool = False, moved: float = 1.0
) -> Inputs:
    """Seeded normal factors, row i times 1 / (i + 1): (1 - moved) of a common start and `moved` of a client's own.

    `scales` are repeated in turn; examples are `EXAMPLES`, or `equal`.
    """
    rng = stream(0, "residual", *shape)

    def noise(rank: int, size: float) -> tuple[Matrix, Matrix]:
        a, b = (rng.standard_normal((n, rank), np.float32) * np.float32(size) for n in reversed(shape))
        return (a / np.arange(1, rank + 1, dtype=np.float32)).T, b

    a0, b0 = noise(max(ranks), 1.0 - moved)
    trained = []
    for r, s in zip(ranks, itertools.cycle(scales), strict=False):
        a, b = noise(r, moved)
        trained.append(Factors(a0[:r] + a, (b0[:, :r] + b) / np.float32(s), s))
    counts = tuple(1 if equal else EXAMPLES[i % len(EXAMPLES)] for i in range(len(ranks)))
    return Inputs(start=Factors(a0, b0), trained=tuple(trained), examples=counts)


def dense_mean(x: Inputs, dtype: type[np.floating] = np.float64) -> Matrix:
    """sum_k p_k s_k B_k A_k, `[out, in]`."""
    total: Matrix = np.zeros(x.start.shape, dtype)
    for p, f in zip(x.shares, x.trained, strict=True):
        total += (dtype(p * f.scale) * f.b.astype(dtype)) @ f.a.astype(dtype)
    return total


def dense_residual(x: Inputs, dtype: type[np.floating] = np.float64) -> Matrix:
    """The mean of the products less the product of the means; clients of one rank."""
    a, b = np.zeros(x.start.a.shape, dtype), np.zeros(x.start.b.shape, dtype)
    for p, f in zip(x.shares, x.trained, strict=True):
        a += dtype(p) * f.a.astype(dtype)
        b += dtype(p * f.scale) * f.b.astype(dtype)
    return np.asarray(dense_mean(x, dtype) - b @ a)


def published_fedex(x: Inputs, *, transposed: bool, residual: bool = True) -> Matrix | None:
    """s mean(B) mean(A) + s residual, with uniform means and the first client's s; None if the shapes do not fit."""
    a, b = (np.mean([getattr(f, of) for f in x.trained], axis=0) for of in "ab")
    change = np.mean([f.b @ f.a for f in x.trained], axis=0) - b @ a if residual else np.zeros(x.start.shape)
    change = change.T if transposed else change
    return np.asarray(x.trained[0].scale * (b @ a + change)) if change.shape == x.start.shape else None


def cut(w: Matrix, ranks: Sequence[int]) -> list[Matrix]:
    """Best approximations at these ranks, by the SVD of the dense matrix."""
    u, s, vt = np.linalg.svd(w, full_matrices=False)
    return [(u[:, :r] * s[:r]) @ vt[:r] for r in ranks]


def published_flexlora(x: Inputs, up: Sequence[float], down: Sequence[float]) -> list[Matrix]:
    """What each client starts from, s_k B A: factor up_k in the mean, its dense SVD, B divided by down_k."""
    scaled = [replace(f, scale=u) for f, u in zip(x.trained, up, strict=True)]
    seen = cut(dense_mean(replace(x, trained=tuple(scaled)), np.float32), [f.rank for f in x.trained])
    return [f.scale / d * w for f, d, w in zip(x.trained, down, seen, strict=True)]


def off(got: Matrix, want: Matrix) -> float:
    """Relative Frobenius error."""
    return float(np.linalg.norm(got.astype(np.float64) - want) / np.linalg.norm(want))
