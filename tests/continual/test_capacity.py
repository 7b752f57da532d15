"""Rows that tasks own: disjoint, consecutive, within the narrowest module, and refused beyond."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedlora.continual.capacity import allot, left
from fedlora.errors import MethodError
from fedlora.rng import public_orthonormal
from fedlora.state import Layout, Module, Subspace

LAYOUT = Layout(modules={"wide": Module(out=4, inp=30), "narrow": Module(out=9, inp=12), "even": Module(out=9, inp=12)})


@given(st.lists(st.integers(1, 5), max_size=8))
def test_tasks_own_disjoint_rows_until_none_are_left(dims: list[int]) -> None:
    used: list[Subspace] = []
    owned: set[int] = set()
    for at, dim in enumerate(dims):
        if len(owned) + dim > 12:
            with pytest.raises(MethodError, match=rf"task t{at} needs {dim} .* and {12 - len(owned)} of 12 are left"):
                allot(LAYOUT, used, dim, 7, f"t{at}")
            return
        new = allot(LAYOUT, used, dim, 7, f"t{at}")
        rows = set(range(new.start, new.start + new.dim))
        assert new.seed == 7
        assert len(rows) == dim
        assert not rows & owned
        owned |= rows
        used.append(new)
        assert left(LAYOUT, used) == 12 - len(owned)


def test_the_rows_of_two_tasks_are_orthogonal_in_every_module() -> None:
    first = allot(LAYOUT, [], 5, 3, "a")
    second = allot(LAYOUT, [first], 7, 3, "b")
    for name, module in LAYOUT.modules.items():
        basis = public_orthonormal(3, "capacity", name, rows=12, cols=module.inp)
        a, b = (basis[s.start : s.start + s.dim] for s in (first, second))
        assert np.abs(a @ b.T).max() < 1e-12


def test_the_order_of_earlier_tasks_does_not_matter_and_gaps_stay() -> None:
    used = [Subspace(dim=2, start=6, seed=0), Subspace(dim=3, start=0, seed=0)]
    assert allot(LAYOUT, used, 1, 0, "t") == allot(LAYOUT, used[::-1], 1, 0, "t") == Subspace(dim=1, start=8, seed=0)


def test_the_whole_is_allowed_and_the_message_names_the_narrow_module() -> None:
    assert allot(LAYOUT, [], 12, 0, "t") == Subspace(dim=12, start=0, seed=0)
    with pytest.raises(
        MethodError, match=r"task t needs 13 .* 12 of 12 are left, the inputs of narrow; lower task_dim"
    ):
        allot(LAYOUT, [], 13, 0, "t")


def test_rows_that_are_not_orthogonal_to_earlier_ones_are_refused() -> None:
    with pytest.raises(MethodError, match=r"task t: rows of seed 1 .* of seed 0"):
        allot(LAYOUT, [Subspace(dim=2, start=0, seed=0)], 2, 1, "t")
    with pytest.raises(MethodError, match=r"task t: public rows are not orthogonal .* designed from inputs"):
        allot(LAYOUT, [Subspace(dim=2)], 2, 1, "t")
    assert left(LAYOUT, [Subspace(dim=2)]) == 12


@pytest.mark.parametrize("dim", [0, -3])
def test_a_subspace_has_at_least_one_dimension(dim: int) -> None:
    with pytest.raises(MethodError, match=f"at least 1 dimension, task_dim is {dim}"):
        allot(LAYOUT, [], dim, 0, "t")
