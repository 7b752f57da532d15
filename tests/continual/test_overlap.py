"""Overlaps and similarities against dense projectors, and what must not change them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from fedlora.adapter import Adapter, Factors, padded
from fedlora.continual.overlap import (
    product_overlap,
    product_spaces,
    random_overlap,
    row_overlap,
    row_spaces,
    similarities,
    similarity,
)
from fedlora.errors import AdapterError

Float64 = NDArray[np.float64]
SHAPES = {"q": (9, 14), "v": (4, 10)}
seeds = st.integers(0, 2**32 - 1)


def adapter(rng: np.random.Generator, rank: int, scale: float = 1.0) -> Adapter:
    return Adapter(
        {n: Factors(rng.normal(size=(rank, i)), rng.normal(size=(o, rank)), scale) for n, (o, i) in SHAPES.items()}
    )


def changed(x: Adapter, by: float = 1.0, b_by: float = 1.0) -> Adapter:
    return Adapter({n: Factors(by * f.a, b_by * f.b, f.scale) for n, f in x.items()})


def projector(rows: Float64) -> Float64:
    return np.asarray(np.linalg.pinv(rows) @ rows)


def dense_row_overlap(new: Factors, old: Sequence[Factors]) -> float:
    p = projector(np.concatenate([f.a for f in old]))
    return float(np.linalg.norm(new.a @ p) / np.linalg.norm(new.a))


def dense_product_overlap(new: Factors, old: Sequence[Factors]) -> float:
    p = projector(np.concatenate([f.dense() for f in old]))
    return float(np.linalg.norm(new.dense() @ p) / np.linalg.norm(new.dense()))


@given(seeds, st.integers(1, 3), st.integers(1, 3))
@settings(max_examples=20, deadline=None)
def test_overlaps_are_those_of_dense_projectors(seed: int, rank: int, tasks: int) -> None:
    rng = np.random.default_rng(seed)
    new, old = adapter(rng, rank, 0.5), [adapter(rng, rank, 2.0) for _ in range(tasks)]
    for name in SHAPES:
        parts = [x[name] for x in old]
        assert row_overlap(new, old)[name] == pytest.approx(dense_row_overlap(new[name], parts), abs=1e-9)
        assert product_overlap(new, old)[name] == pytest.approx(dense_product_overlap(new[name], parts), abs=1e-9)
        assert row_spaces(old)[name].shape == (min(rank * tasks, SHAPES[name][1]), SHAPES[name][1])


@given(seeds, st.sampled_from([1e-6, 0.1, 7.0, 1e6]))
@settings(max_examples=20, deadline=None)
def test_no_scaling_changes_an_overlap(seed: int, c: float) -> None:
    rng = np.random.default_rng(seed)
    new, old = adapter(rng, 2), [adapter(rng, 2), adapter(rng, 3)]
    for overlap in (row_overlap, product_overlap):
        expected = pytest.approx(overlap(new, old))
        assert overlap(changed(new, c, 1.0 / c), old) == expected
        assert overlap(changed(new, c), old) == expected  # a smaller A alone
        assert overlap(new.scaled(c), old) == expected
        assert overlap(new, [changed(old[0], c), old[1]]) == expected
        assert overlap(new, [changed(old[0], c, 1.0 / c), old[1].scaled(c)]) == expected


def test_rows_that_b_does_not_use_move_the_rows_overlap_and_not_the_products() -> None:
    rng = np.random.default_rng(0)
    new, old = adapter(rng, 2), [adapter(rng, 2)]
    wider = {}
    for name, f in new.items():
        free = np.eye(f.shape[1]) - projector(old[0][name].a)
        a = np.concatenate([f.a, 100.0 * rng.normal(size=(3, f.shape[1])) @ free])
        wider[name] = Factors(a, np.concatenate([f.b, np.zeros((f.shape[0], 3))], axis=1), f.scale)
    for name in SHAPES:
        assert row_overlap(Adapter(wider), old)[name] < 0.02 < 0.1 < row_overlap(new, old)[name]
    assert product_overlap(Adapter(wider), old) == pytest.approx(product_overlap(new, old))
    assert product_overlap(old[0], [Adapter(wider)]) == pytest.approx(product_overlap(old[0], [new]))
    assert product_spaces([Adapter(wider)])["q"].shape == (2, 14)
    zeros = Adapter({n: padded(f, 6) for n, f in new.items()})
    assert row_overlap(zeros, old) == pytest.approx(row_overlap(new, old))


def test_any_other_factors_of_the_product_have_its_overlap() -> None:
    rng = np.random.default_rng(1)
    new, old = adapter(rng, 3), [adapter(rng, 3)]
    mix = {n: rng.normal(size=(3, 3)) for n in SHAPES}
    mixed = Adapter({n: Factors(np.linalg.inv(mix[n]) @ f.a, f.b @ mix[n], f.scale) for n, f in new.items()})
    assert product_overlap(mixed, old) == pytest.approx(product_overlap(new, old))
    assert similarities({"new": new, "mixed": mixed}) == pytest.approx(np.ones((2, 2)))


def test_the_ends_of_the_scale() -> None:
    rng = np.random.default_rng(2)
    one, two = adapter(rng, 2), adapter(rng, 2)
    silent = Adapter({n: Factors(f.a @ (np.eye(f.shape[1]) - projector(two[n].a)), f.b) for n, f in one.items()})
    zero = Adapter({n: Factors(f.a, 0.0 * f.b) for n, f in one.items()})
    for overlap in (row_overlap, product_overlap):
        assert overlap(one, [two, changed(one, 3.0)]) == pytest.approx({"q": 1.0, "v": 1.0})
        assert overlap(silent, [two]) == pytest.approx({"q": 0.0, "v": 0.0}, abs=1e-12)
        assert overlap(one, []) == {"q": 0.0, "v": 0.0}
    for none in (zero, one.scaled(0.0)):
        assert product_overlap(none, [two]) == product_overlap(one, [none]) == {"q": 0.0, "v": 0.0}
    assert row_overlap(zero, [two]) == row_overlap(one, [two])
    assert row_spaces([]) == {}


def test_float32_repeats_have_no_directions_of_their_own() -> None:
    rng = np.random.default_rng(3)
    old = adapter(rng, 3)
    copies = [Adapter({n: Factors((c * f.a).astype(np.float32), f.b) for n, f in old.items()}) for c in (1.0, 0.3, 7e4)]
    assert row_spaces(copies)["q"].shape == product_spaces(copies)["q"].shape == (3, 14)


def test_random_rows_overlap_at_the_random_level() -> None:
    rng = np.random.default_rng(4)
    space = np.linalg.qr(rng.normal(size=(50, 8)))[0]
    rows = rng.normal(size=(20_000, 50))
    shares = np.sum((rows @ space) ** 2, axis=1) / np.sum(rows**2, axis=1)
    assert random_overlap(8, 50) ** 2 == pytest.approx(shares.mean(), rel=0.01)
    assert random_overlap(0, 50) == 0.0
    assert random_overlap(50, 50) == 1.0


@given(seeds, st.integers(1, 4), st.integers(1, 3))
@settings(max_examples=20, deadline=None)
def test_similarity_is_that_of_dense_singular_vectors(seed: int, i: int, j: int) -> None:
    rng = np.random.default_rng(seed)
    x, y = adapter(rng, 4, 0.1)["q"], adapter(rng, 3)["q"]
    vx, vy = (np.linalg.svd(f.dense())[2] for f in (x, y))
    expected = np.linalg.norm(vx[:i] @ vy[:j].T) ** 2 / min(i, j)
    assert similarity(x, y, i, j) == pytest.approx(expected)
    assert similarity(x, y, i, j) == pytest.approx(similarity(y, x, j, i))
    assert similarity(x, x, i, i) == pytest.approx(1.0)


def test_similarities_of_adapters_by_name() -> None:
    rng = np.random.default_rng(5)
    x, y = adapter(rng, 3), adapter(rng, 2)
    zero = Adapter({n: Factors(f.a, 0.0 * f.b) for n, f in x.items()})
    matrix = similarities({"x": x, "y": y, "zero": zero})
    between = np.mean([similarity(x[n], y[n], 3, 2) for n in SHAPES])
    np.testing.assert_allclose(matrix, [[1.0, between, 0.0], [between, 1.0, 0.0], [0.0, 0.0, 0.0]])
    orthogonal = Adapter({n: Factors(f.a @ (np.eye(f.shape[1]) - projector(x[n].a)), f.b) for n, f in y.items()})
    assert similarities({"x": x, "o": orthogonal})[0, 1] == pytest.approx(0.0, abs=1e-12)


def test_what_cannot_be_compared_is_refused() -> None:
    rng = np.random.default_rng(6)
    x = adapter(rng, 2)
    for call in (row_overlap, product_overlap):
        with pytest.raises(AdapterError, match="modules differ"):
            call(x, [Adapter({"q": x["q"]})])
    with pytest.raises(AdapterError, match="modules differ"):
        similarities({"x": x, "y": Adapter({"q": x["q"]})})
    with pytest.raises(AdapterError, match="no common input"):
        similarity(x["q"], x["v"], 1, 1)
    for i, j in ((3, 1), (1, 3), (0, 1)):
        with pytest.raises(AdapterError, match=f"subspaces of {i} and {j} directions"):
            similarity(x["q"], x["q"], i, j)
