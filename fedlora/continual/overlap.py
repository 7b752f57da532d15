"""How far adapters work in one another's directions, measured on the side of the inputs (rows of A, rows of B A).

O-LoRA's penalty, the sum of |A_old A_new^T| (Wang et al., EMNLP 2023 Findings, as its code has it), falls when A
is made smaller, which changes nothing if B grows. What is measured here is a share of a norm. Random rows overlap too:
report it beside `random_overlap`. No overlap with old rows does not mean that old outputs stay: for that see
`fedlora.continual.design`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from fedlora.adapter import Adapter, Factors, require_same_modules
from fedlora.continual.design import span
from fedlora.errors import AdapterError

Float64 = NDArray[np.float64]

_RANK = 1e-6  # singular values below this share of the largest are rounding of float32 factors


def row_overlap(new: Adapter, old: Sequence[Adapter]) -> dict[str, float]:
    """`||A P||_F / ||A||_F` by module, 0 to 1: the share of A's rows that lies in the rows of all old A's together.

    P projects on `row_spaces(old)`. One factor for all of A changes nothing; rows of A that B does not use count.
    No old adapter, or A = 0: 0. Raises: AdapterError if modules or shapes differ.
    """
    _require_alike(new, old)
    spaces = row_spaces(old)
    return {n: _share(f.a.astype(np.float64), spaces[n]) if old else 0.0 for n, f in new.items()}


def product_overlap(new: Adapter, old: Sequence[Adapter]) -> dict[str, float]:
    """`||dW P||_F / ||dW||_F` by module, 0 to 1, with `dW = s B A` and P the projector on the old products' rows.

    No other way to write the products as factors changes it: scaling, mixing or padding. No old adapter, or dW = 0: 0.
    Raises: AdapterError if modules or shapes differ.
    """
    _require_alike(new, old)
    spaces = product_spaces(old)
    return {n: _share(_core(f), spaces[n]) if old else 0.0 for n, f in new.items()}


def row_spaces(adapters: Sequence[Adapter]) -> dict[str, Float64]:
    """By module, orthonormal rows `[k, in]` that span the rows of all A's; each A counts alike, whatever its size."""
    return {n: _joint([_directions(a[n].a.astype(np.float64)) for a in adapters]) for n in _names(adapters)}


def product_spaces(adapters: Sequence[Adapter]) -> dict[str, Float64]:
    """By module, orthonormal rows `[k, in]` that span those of all products; each counts alike, whatever its size."""
    return {n: _joint([_directions(_core(a[n])) for a in adapters]) for n in _names(adapters)}


def random_overlap(k: int, inp: int) -> float:
    """`sqrt(k / in)`: the root mean square overlap of a random row with k of `in` dimensions; `k, inp = space.shape`.

    Exact: a uniformly distributed direction has the expected squared share k / in in any k dimensions.
    """
    return math.sqrt(k / inp)


def similarity(x: Factors, y: Factors, i: int, j: int) -> float:
    """`||V_i^T V_j||_F^2 / min(i, j)`, 0 to 1: how much the leading i and j input directions of two products share.

    V_i: the first i right singular vectors of the product. Source: Hu et al., LoRA, ICLR 2022, section 7.2, eq. 4,
    which takes them of A; of the product they do not depend on how it is factored.
    Raises: AdapterError if the widths differ, or i or j is below 1 or above the product's rank.
    """
    if x.shape[1] != y.shape[1]:
        raise AdapterError(f"no common input: the products are {x.shape} and {y.shape} (out, in)")
    vx, vy = _directions(_core(x)), _directions(_core(y))
    if not (1 <= i <= len(vx) and 1 <= j <= len(vy)):
        raise AdapterError(f"subspaces of {i} and {j} directions asked of products of rank {len(vx)} and {len(vy)}")
    return _similarity(vx[:i], vy[:j])


def similarities(adapters: Mapping[str, Adapter]) -> Float64:
    """`[n, n]`, symmetric, in the mapping's order: the mean over modules of `similarity` at the products' full ranks.

    A module in which one of two products is 0 counts 0. Raises: AdapterError if modules or shapes differ.
    """
    given = list(adapters.values())
    for other in given[1:]:
        require_same_modules(given[0], other)
    spaces = [{n: _directions(_core(f)) for n, f in a.items()} for a in given]
    matrix = np.zeros((len(given), len(given)))
    for at, x in enumerate(spaces):
        for to, y in enumerate(spaces[: at + 1]):
            matrix[at, to] = matrix[to, at] = np.mean([_similarity(x[n], y[n]) for n in x])
    return matrix


def _similarity(vx: Float64, vy: Float64) -> float:
    return float(np.sum((vx @ vy.T) ** 2)) / max(1, min(len(vx), len(vy)))


def _core(f: Factors) -> Float64:
    """`s R A` with `B = Q R`: a matrix of few rows with the singular values and right singular vectors of `s B A`."""
    return np.asarray(f.scale * (np.linalg.qr(f.b.astype(np.float64), mode="r") @ f.a.astype(np.float64)))


def _directions(rows: Float64) -> Float64:
    """The right singular vectors `[rank, in]`, leading ones first."""
    _, s, vt = np.linalg.svd(rows, full_matrices=False)
    return np.asarray(vt[s > _RANK * s.max(initial=0.0)])


def _joint(spaces: Sequence[Float64]) -> Float64:
    return span(np.concatenate(spaces), _RANK)


def _share(rows: Float64, space: Float64) -> float:
    size = float(np.linalg.norm(rows))
    return float(np.linalg.norm(rows @ space.T)) / size if size > 0.0 else 0.0


def _names(adapters: Sequence[Adapter]) -> list[str]:
    for other in adapters[1:]:
        require_same_modules(adapters[0], other)
    return list(adapters[0]) if adapters else []


def _require_alike(new: Adapter, old: Sequence[Adapter]) -> None:
    for other in old:
        require_same_modules(new, other)
