"""The graph is symmetric, regular, connected, the same for everybody, and drawn anew from another digest."""

from __future__ import annotations

import hashlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedlora.privacy.secagg.graph import least_degree, neighbours


def names(count: int) -> list[str]:
    return [hashlib.sha256(str(i).encode()).hexdigest() for i in range(count)]


@settings(deadline=None, max_examples=30)
@given(count=st.integers(3, 80), half=st.integers(1, 20), seed=st.binary(min_size=32, max_size=32))
def test_regular_symmetric_connected(count: int, half: int, seed: bytes) -> None:
    ids, degree = names(count), min(2 * half, count - 1)
    graph = neighbours(ids, degree, seed)
    assert graph == neighbours(ids[::-1], degree, seed)
    assert all(len(set(n)) == degree and i not in n for i, n in graph.items())
    assert all(i in graph[j] for i, n in graph.items() for j in n)
    seen, todo = {ids[0]}, [ids[0]]
    while todo:
        new = set(graph[todo.pop()]) - seen
        seen |= new
        todo += new
    assert len(seen) == count


def test_another_digest_draws_another_graph() -> None:
    ids = names(40)
    assert neighbours(ids, 10, bytes(32)) != neighbours(ids, 10, b"\1" * 32)


def test_degrees() -> None:
    assert [least_degree(n) for n in (3, 10, 30, 31, 32, 100, 1000)] == [2, 9, 29, 30, 30, 40, 60]


@pytest.mark.parametrize(("count", "degree"), [(10, 0), (10, 10), (10, 3)])
def test_degrees_that_make_no_graph(count: int, degree: int) -> None:
    with pytest.raises(ValueError, match=f"degree {degree}"):
        neighbours(names(count), degree, b"")


def test_ids_must_differ() -> None:
    with pytest.raises(ValueError, match="2 ids, 1 of them"):
        neighbours(["a", "a"], 1, b"")


def test_the_odds_that_the_docstring_gives() -> None:
    """Expected clients, of n, that 10 % drop-outs leave unopenable, and that 10 % colluders lay open."""
    from scipy.stats import hypergeom

    for n in (100, 300, 1000):
        size = least_degree(n) + 1
        threshold = 2 * size // 3 + 1
        tenth = round(0.1 * n)
        assert n * hypergeom.sf(size - threshold, n - 1, tenth, size - 1) < 3.1e-4
        assert n * hypergeom.sf(2 * threshold - size - 1, n - 1, tenth, size - 1) < 5e-5
