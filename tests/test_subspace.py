"""Public bases of subspaces: disjoint ranges of one orthonormal basis, and checksums."""

from __future__ import annotations

import numpy as np
import pytest

from fedlora.errors import AdapterError
from fedlora.rng import public_normal, public_orthonormal
from fedlora.state import Subspace
from fedlora.subspace import public_rows, rows_checksum


def test_ranges_of_a_seed_are_rows_of_one_orthonormal_basis() -> None:
    whole = public_orthonormal(7, "capacity", "q", rows=12, cols=12)
    ranges = [Subspace(dim=d, start=s, seed=7) for s, d in ((0, 4), (4, 1), (5, 7))]
    rows = np.concatenate([public_rows(r, "q", 12) for r in ranges])
    assert rows.dtype == np.float32
    np.testing.assert_allclose(rows, whole, atol=1e-6)
    np.testing.assert_allclose(rows @ rows.T, np.eye(12), atol=1e-6)
    assert np.abs(public_rows(ranges[0], "v", 12) - rows[:4]).max() > 0.1
    assert np.abs(public_rows(Subspace(dim=4, seed=8), "q", 12) - rows[:4]).max() > 0.1
    with pytest.raises(ValueError, match="read-only"):
        public_rows(ranges[0], "q", 12)[0, 0] = 1.0


def test_a_checksum_is_the_product_with_the_public_probe() -> None:
    subspace = Subspace(dim=5, start=2, seed=7)
    rows = public_rows(subspace, "q", 40)
    want = [float(np.dot(row.astype(float), public_normal(7, "probe", "q", shape=(40,)))) for row in rows]
    found = rows_checksum(subspace, "q", rows)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, want, rtol=1e-6)


def test_what_is_no_public_subspace_is_refused() -> None:
    with pytest.raises(AdapterError, match="q: a subspace without a seed was designed, its basis cannot be derived"):
        public_rows(Subspace(dim=2), "q", 6)
    with pytest.raises(AdapterError, match="q: a subspace without a seed was designed, it has no public checksum"):
        rows_checksum(Subspace(dim=2), "q", np.eye(2, 6, dtype=np.float32))
    with pytest.raises(AdapterError, match="no 7 orthonormal rows fit into 6 dimensions"):
        public_rows(Subspace(dim=4, start=3, seed=0), "q", 6)
    for bad in (Subspace(dim=2, start=-1, seed=0), Subspace(dim=0, seed=0)):
        with pytest.raises(AdapterError, match=f"no {bad.dim} rows from row {bad.start} on make a subspace"):
            public_rows(bad, "q", 6)
