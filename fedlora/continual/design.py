"""Subspaces designed from inputs: a task writes where its own inputs are and earlier tasks' inputs are not.

An update `B A` does nothing to an input x if `A x = 0`. So the rows of A are taken from the leading directions of the
new task's inputs after those of old inputs are removed (InfLoRA, Liang and Li, CVPR 2024, eq. 6-9), and what old inputs
are is a basis that holds a share of their energy (gradient projection memory, Saha et al., ICLR 2021, section 5). In a
federation nobody has the inputs. Clients sum sketches `C Omega` of their second moments `C = sum x x^T`, which are
linear in C, and only the sum is used (as in FOT, Bakman et al., ICLR 2024, which sketches the inputs themselves).

Where we differ. Energy is the trace of C, the sum of |x|^2; InfLoRA's code squares C's eigenvalues once more. Its
second memory, of the complement once the first has more than half the dimensions, is left out: it saves space only.
A task also avoids earlier tasks' own subspaces, so that updates stay orthogonal to one another, as in O-LoRA.
All computation is in float64.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from fedlora.adapter import Array
from fedlora.errors import MethodError
from fedlora.rng import public_normal

Float64 = NDArray[np.float64]

_SAME = 1e-7  # float32 copies of unit rows differ by less: no direction of their own
_NOTHING = 1e-12  # share of the energy below which a direction is rounding
_MISFIT = 0.1  # noise of sketches is far below, other inputs or another Omega are far above


def second_moment(sketch: Array, omega: Array, energy: float) -> tuple[Float64, Float64]:
    """Leading eigenvectors `[in, k]` (orthonormal columns) and eigenvalues `[k]`, falling, of `C = sum x x^T`.

    The Nystrom approximation `Y (Omega^T Y)^+ Y^T` from `Y = C Omega` and the same Gaussian `omega`, both `[in, s]`,
    with the shift of Tropp, Yurtsever, Udell and Cevher (NeurIPS 2017, algorithm 3). Ours is as large as the noise: the
    rounding of the sketch's dtype, or the asymmetry of `Omega^T Y`, which is symmetric without noise. What is below it
    is left out. Up to noise it is at most C, and equals C where C's rank is at most s. `energy` is trace(C); `held`
    says how much of it the approximation has. Cost: O(in * s^2).
    Raises: MethodError if shapes differ, a value is not finite, `energy` is negative, `Omega^T Y` is not symmetric to
    10%, or the approximation has 10% more than `energy`: another Omega, or other inputs.
    """
    if sketch.shape != omega.shape or sketch.ndim != 2:
        raise MethodError(f"sketch {sketch.shape} and Omega {omega.shape} must both be [in, s]")
    if not (np.isfinite(sketch).all() and math.isfinite(energy) and energy >= 0.0):
        raise MethodError(f"a sketch of inputs must be finite and its energy 0 or more; the energy is {energy}")
    u, s, vt = np.linalg.svd(omega.astype(np.float64), full_matrices=False)
    y = sketch.astype(np.float64) @ vt.T / s  # C u, u with orthonormal columns
    core = u.T @ y
    skew = float(np.linalg.norm(core - core.T))
    if skew > _MISFIT * float(np.linalg.norm(core)):
        raise MethodError(
            f"Omega^T Y is asymmetric by {skew / np.linalg.norm(core):.1%}; was every sketch made with this Omega "
            "(one seed, input name and size)?"
        )
    shift = max(float(np.finfo(sketch.dtype).eps * np.linalg.norm(y)), skew)
    if shift == 0.0:
        return np.zeros((len(y), 0)), np.zeros(0)
    y += shift * u
    spectrum, axes = np.linalg.eigh((core + core.T) / 2.0 + shift * np.eye(len(core)))
    vectors, roots, _ = np.linalg.svd(y @ (axes / np.sqrt(np.maximum(spectrum, shift))), full_matrices=False)
    values = roots**2 - shift
    keep = values > shift
    if float(values[keep].sum()) > (1.0 + _MISFIT) * energy:
        raise MethodError(
            f"the approximation holds {values[keep].sum():.3g} and the inputs' whole energy is {energy:.3g}; "
            "were sketch and energy summed over the same clients and inputs?"
        )
    return vectors[:, keep], values[keep]


def held(rows: Array, vectors: Array, values: Array, energy: float) -> float:
    """The share of `energy` that the projection on orthonormal `rows [k, in]` holds, as far as the sketch can tell.

    `rows = vectors.T` gives the share that the approximation holds at all. No energy: 1.
    """
    seen = float(np.sum((rows.astype(np.float64) @ vectors) ** 2 * values))
    return seen / energy if energy > 0.0 else 1.0


def remember(memory: Array, vectors: Array, values: Array, energy: float, threshold: float) -> Float64:
    """The basis of old inputs `[k', in]` after this task: `memory [k, in]`, and the fewest new rows below it.

    So many that their projection holds at least `threshold` (0 to 1) of this task's `energy`, if the sketch holds as
    much; else all that it has. They are the leading eigenvectors of `(I-P) C (I-P)` with P the projector on `memory`,
    which gain most (Ky Fan). `memory` is orthonormal, up to float32 rounding; the result is to float64.
    Source: GPM, section 5: there the inputs are columns of R, and ||R||_F^2 is trace(C).
    """
    old = _orthonormal(memory, np.zeros((0, memory.shape[1])))
    directions, gains = _residual(vectors, values, old)
    need = threshold * energy - energy * held(old, vectors, values, energy)
    count = int(np.searchsorted(np.cumsum(gains), need)) + 1 if need > 0.0 else 0
    return np.concatenate([old, _signed(_orthonormal(directions[:count], old))])


def design(dim: int, vectors: Array, values: Array, avoid: Array, *, seed: int, name: str) -> NDArray[np.float32]:
    """The basis N `[dim, in]` of a task in module `name`: orthonormal rows, orthogonal to `avoid [k, in]` to 1e-7.

    They are the leading eigenvectors of `(I-P) C (I-P)`, P the projector on `avoid` (unit rows: old inputs and earlier
    tasks' N, which may depend on one another), that is the leading left singular vectors of the inputs less their part
    in `avoid` (InfLoRA, eq. 6-9). Where C has fewer, public random directions of the rest follow. Each row's
    largest entry is positive, so N is a function of C where eigenvalues differ.
    Cost: O(in * k^2 + in * s^2). Raises: MethodError if fewer than `dim` directions are left.
    """
    taken = span(avoid, _SAME)
    width = avoid.shape[1]
    if width - len(taken) < dim:
        raise MethodError(
            f"{name}: a task needs {dim} input directions and {width - len(taken)} of {width} are left, "
            f"{len(taken)} belong to old inputs and earlier tasks; lower task_dim or the share of old inputs that is "
            "remembered, remove a task, or adapt only modules with more inputs"
        )
    directions, _ = _residual(vectors, values, taken)
    lead = _signed(_orthonormal(directions[:dim], taken))
    drawn = public_normal(seed, "complement", name, shape=(dim - len(lead), width))
    rest = _signed(_orthonormal(drawn, np.concatenate([taken, lead])))
    return np.concatenate([lead, rest]).astype(np.float32)


def contrast(
    dim: int,
    new: tuple[Array, Array, float],
    old: tuple[Array, Array, float],
    avoid: Array,
    *,
    floor: float,
) -> NDArray[np.float32]:
    """The rows `[dim, in]` of a task's subspace: where its inputs are large beside those of old tasks, and as large.

    `new` and `old` are (vectors `[in, k]`, values `[k]`, energy) of second moments C and D, each of energy 1 after
    scaling; what their vectors miss is taken to be spread evenly. Among the directions of `new` that are orthogonal to
    `avoid` (orthonormal rows, other tasks' own) the rows maximise `a C a^T / a (D + floor/in I) a^T`, one after another
    and uncorrelated in both, and each is scaled so that `E (a x)^2 = E |x|^2 / in` over the task's inputs, as for a
    random unit row: what is trained on top sees inputs of one size, and one learning rate does for all subspaces.
    """
    vectors, values, energy = new
    width = len(vectors)
    root = vectors * np.sqrt(values / energy)
    q, r = np.linalg.qr(root - avoid.T @ (avoid @ root))
    inside = np.linalg.svd(r)
    size = float(inside.S.max(initial=0.0))
    keep = inside.S > 1e-6 * size
    q = (q @ inside.U)[:, keep]
    if q.shape[1] < dim:
        raise MethodError("contrast: too few directions")
    mine = (root.T @ q).T @ (root.T @ q) + max(1.0 - float(np.sum(values)) / energy, 0.0) / width * np.eye(q.shape[1])
    theirs = floor / width * np.eye(q.shape[1])
    v, w, e = old
    if e > 0.0:
        seen = (v * np.sqrt(w / e)).T @ q
        rest = max(1.0 - float(np.sum(w)) / e, 0.0) / max(width - len(w), 1)
        flat = v.T @ q
        theirs += seen.T @ seen + rest * (np.eye(q.shape[1]) - flat.T @ flat)
    low = np.linalg.cholesky(theirs)
    half = np.linalg.solve(low, np.linalg.solve(low, mine).T)
    _, axes = np.linalg.eigh((half + half.T) / 2)
    c = np.linalg.solve(low.T, axes[:, ::-1][:, :dim])
    size = np.sqrt(np.sum(c * (mine @ c), axis=0) * width)
    return _signed((q @ (c / size)).T).astype(np.float32)


def span(rows: Array, tolerance: float) -> Float64:
    """Orthonormal rows `[k, in]` with the row space of `rows`; singular values of at most `tolerance` do not count."""
    _, s, vt = np.linalg.svd(rows.astype(np.float64), full_matrices=False)
    return np.asarray(vt[s > tolerance])


def _residual(vectors: Array, values: Array, taken: Float64) -> tuple[Float64, Float64]:
    """Eigenvectors, as rows, and eigenvalues of `(I-P) C (I-P)` above rounding, falling; P projects on `taken`."""
    root = vectors * np.sqrt(values)
    u, s, _ = np.linalg.svd(root - taken.T @ (taken @ root), full_matrices=False)
    keep = s**2 > _NOTHING * float(np.sum(values))
    return u.T[keep], s[keep] ** 2


def _orthonormal(rows: Array, taken: Float64) -> Float64:
    """`rows` orthonormalised in their order, against `taken` too. For residuals that is the second time, which takes
    away what the first, of nearly equal numbers, left."""
    rows = rows.astype(np.float64)
    q, r = np.linalg.qr((rows - rows @ taken.T @ taken).T)
    return np.asarray(np.where(np.diagonal(r) < 0.0, -q, q).T)


def _signed(rows: Float64) -> Float64:
    """Every row with its largest entry positive."""
    if rows.size == 0:
        return rows
    largest = np.take_along_axis(rows, np.abs(rows).argmax(1)[:, None], 1)
    return np.asarray(np.where(largest < 0.0, -rows, rows))
