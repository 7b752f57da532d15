"""Subspaces designed from inputs: a task writes where its own inputs are large and old tasks' inputs are small.

An update `B A` does to an input x what `A x` lets it do. So the rows of A are chosen for what inputs are like: InfLoRA
(Liang and Li, CVPR 2024, eq. 6-9) takes the leading directions of the new task's inputs after those of old inputs are
removed, and gradient projection memory (Saha et al., ICLR 2021) decides which those are, by their share of the energy.
In a federation nobody has the inputs. Clients sum sketches `C Omega` of their second moments `C = E x x^T`, which are
linear in C, and only the sums are used (as FOT, Bakman et al., ICLR 2024, sketches the inputs themselves). With one
Omega for all tasks the memory of old inputs is itself a sum of sketches, whose size does not grow with tasks.

Where we differ from InfLoRA. (1) Old directions are not cut off at a share of the energy, but weighed: a row is good if
the new task has much more energy along it than the old ones, however little that is. What old inputs have beyond the
cut is what a hard projection forgets by. (2) Rows are scaled until the task's own inputs are as large along each of
them as they are on average: leading directions of inputs are so uneven (the mean token alone is most of the energy)
that on them one learning rate is too large and too small at once. (3) The rows are orthogonal to all earlier tasks' own
rows too, so updates stay orthogonal to one another, as in O-LoRA. docs/LOG.md has what each is worth.
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

Moment = tuple[Array, Array, float]  # vectors [in, k] with orthonormal columns, values [k], energy
_NOTHING = 1e-12  # share of the energy below which a direction is rounding
_MISFIT = 0.1  # noise of sketches is far below, other inputs or another Omega are far above


def second_moment(sketch: Array, omega: Array, energy: float) -> tuple[Float64, Float64]:
    """Leading eigenvectors `[in, k]` (orthonormal columns) and eigenvalues `[k]`, falling, of `C = sum x x^T`.

    The Nystrom approximation `Y (Omega^T Y)^+ Y^T` from `Y = C Omega` and the same Gaussian `omega`, both `[in, s]`,
    with the shift of Tropp, Yurtsever, Udell and Cevher (NeurIPS 2017, algorithm 3). Ours is as large as the noise: the
    rounding of the sketch's dtype, or the asymmetry of `Omega^T Y`, which is symmetric without noise. What is below it
    is left out. Up to noise it is at most C, and equals C where C's rank is at most s. `energy` is trace(C), of which
    the values' sum is what the approximation has. Cost: O(in * s^2).
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


def design(
    dim: int, new: Moment, old: Moment | None, avoid: Array, *, floor: float, seed: int, name: str
) -> NDArray[np.float32]:
    """The basis N `[dim, in]` of a task in module `name`: independent rows, orthogonal to `avoid` to float32 rounding.

    `new` and `old` are (vectors `[in, k]`, values `[k]`, energy) of the second moments C of the new task's inputs and D
    of the old ones' (None: no old task), each scaled to energy 1. What the vectors do not hold of the energy is taken
    to be even in all directions. Among the directions of `new` less their part in `avoid` (orthonormal rows `[m, in]`),
    the rows are those of the largest `a C a^T / a (D + floor/in I) a^T`, in falling order and uncorrelated under both
    (the generalised eigenvectors of C and D), each scaled to `a C a^T = 1/in`: along it the inputs are as large as
    along a random unit row. Each row's largest entry is positive. Where `new` has fewer directions than `dim`, public
    random ones of the rest follow, scaled alike.
    Cost: O(in * (k + m)^2). Raises: MethodError if fewer than `dim` directions are left beside `avoid`.
    """
    vectors, values, energy = new
    width = len(vectors)
    if width - len(avoid) < dim:
        raise MethodError(
            f"{name}: a task needs {dim} input directions and {width - len(avoid)} of {width} are left, {len(avoid)} "
            "belong to earlier tasks; lower continual.task_dim, remove a task, or adapt only modules with more inputs"
        )
    root = vectors * np.sqrt(values / energy if energy > 0.0 else values)
    inside = _basis(root - avoid.T @ (avoid @ root))
    if inside.shape[1] < dim:
        drawn = public_normal(seed, "complement", name, shape=(dim - inside.shape[1], width)).T
        taken = np.concatenate([avoid.T, inside], axis=1)
        inside = np.concatenate([inside, _basis(drawn - taken @ (taken.T @ drawn))], axis=1)
    ours = _within(inside, new)
    theirs = floor / width * np.eye(inside.shape[1]) + (0.0 if old is None else _within(inside, old))
    low = np.linalg.cholesky(theirs)
    ratio = np.linalg.solve(low, np.linalg.solve(low, ours).T)
    axes = np.linalg.solve(low.T, np.linalg.eigh((ratio + ratio.T) / 2.0)[1][:, ::-1][:, :dim])
    size = np.sqrt(width * np.maximum(np.sum(axes * (ours @ axes), axis=0), _NOTHING / width))
    rows = (inside @ (axes / size)).T
    return _signed(rows - rows @ avoid.T @ avoid).astype(np.float32)


def _within(inside: Float64, moment: Moment) -> Float64:
    """`Q^T C Q` for orthonormal columns Q, C scaled to energy 1 and even where its vectors do not reach."""
    vectors, values, energy = moment
    if energy <= 0.0:
        return np.zeros((inside.shape[1], inside.shape[1]))
    seen = vectors.T @ inside
    rest = max(1.0 - float(np.sum(values)) / energy, 0.0) / max(len(vectors) - len(values), 1)
    return seen.T @ (seen * (values / energy)[:, None]) + rest * (np.eye(inside.shape[1]) - seen.T @ seen)


def _basis(columns: Float64) -> Float64:
    """Orthonormal columns that span `columns`; directions of less than 1e-6 of the largest are rounding."""
    u, s, _ = np.linalg.svd(columns, full_matrices=False)
    return np.asarray(u[:, s > 1e-6 * s.max(initial=0.0)])


def span(rows: Array, tolerance: float) -> Float64:
    """Orthonormal rows `[k, in]` with the row space of `rows`; singular values of at most `tolerance` do not count."""
    _, s, vt = np.linalg.svd(rows.astype(np.float64), full_matrices=False)
    return np.asarray(vt[s > tolerance])


def _signed(rows: Float64) -> Float64:
    """Every row with its largest entry positive."""
    if rows.size == 0:
        return rows
    largest = np.take_along_axis(rows, np.abs(rows).argmax(1)[:, None], 1)
    return np.asarray(np.where(largest < 0.0, -rows, rows))
