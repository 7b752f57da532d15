"""The public bases of subspaces: rows of one orthonormal basis per module that anyone can derive from a seed.

Tasks take disjoint ranges of rows, so the rows of A of one task are orthogonal to those of every other by construction,
and no basis ever travels. Server and clients make them here; a checksum shows that they made the same.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from fedlora.errors import AdapterError
from fedlora.rng import public_normal, public_orthonormal
from fedlora.state import Subspace

Float = NDArray[np.float32]


@lru_cache(maxsize=1024)
def public_rows(subspace: Subspace, module: str, inp: int) -> Float:
    """N `[dim, inp]` of one module: rows `start` to `start + dim` of its public orthonormal basis; read-only.

    Cost: that of `start + dim` orthonormal rows (`public_orthonormal`); the last 1024 answers are remembered.
    Raises: AdapterError if the subspace has no seed, its range is not one, or it ends after row `inp`.
    """
    if subspace.seed is None:
        raise AdapterError(f"{module}: a subspace without a seed was designed, its basis cannot be derived")
    if subspace.start < 0 or subspace.dim < 1:
        raise AdapterError(f"{module}: no {subspace.dim} rows from row {subspace.start} on make a subspace")
    end = subspace.start + subspace.dim
    basis = public_orthonormal(subspace.seed, "capacity", module, rows=end, cols=inp)
    rows = np.ascontiguousarray(basis[subspace.start :], np.float32)
    rows.flags.writeable = False
    return rows


def rows_checksum(subspace: Subspace, module: str, rows: Float) -> Float:
    """`N @ probe` `[dim]`, in float64 and rounded once, with the public normal probe of this module `[inp]`.

    Raises: AdapterError if the subspace has no seed.
    """
    if subspace.seed is None:
        raise AdapterError(f"{module}: a subspace without a seed was designed, it has no public checksum")
    probe = public_normal(subspace.seed, "probe", module, shape=(rows.shape[1],))
    return (rows.astype(np.float64) @ probe).astype(np.float32)
