"""Every function of the factored algebra against dense float64 products."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from fedlora.adapter import (
    Adapter,
    Factors,
    ProductSum,
    difference,
    factor_norm,
    inner,
    norm,
    padded,
    require_finite,
    require_same_modules,
    stack,
    truncate,
    truncated,
)
from fedlora.errors import AdapterError

fast = settings(deadline=None, max_examples=40)
Shapes = dict[str, tuple[int, int]]  # (out, in)

dims = st.integers(1, 9)
shapes = st.one_of(
    st.fixed_dictionaries({"q": st.tuples(dims, dims), "v": st.tuples(dims, dims)}),
    st.integers(1, 6).map(lambda n: {"square": (n, n)}),
    st.just({"tall": (12, 3), "wide": (2, 11)}),
)
ranks = st.lists(st.integers(0, 6), min_size=1, max_size=5)
seeds = st.integers(0, 2**32 - 1)
scales = st.sampled_from([1.0, -1.0, 2.0, 0.1, 16 / 3, 1e-3])


def make(shape: Shapes, rank: int, seed: int, scale: float = 1.0, dtype: type[np.floating] = np.float64) -> Adapter:
    rng = np.random.default_rng([seed, rank])
    return Adapter(
        {
            n: Factors(rng.normal(size=(rank, i)).astype(dtype), rng.normal(size=(o, rank)).astype(dtype), scale)
            for n, (o, i) in shape.items()
        }
    )


def dense(adapter: Adapter) -> dict[str, NDArray[np.float64]]:
    """Slow and independent of `Factors.dense`: a sum of outer products."""
    products = {}
    for name, f in adapter.items():
        total = np.zeros(f.shape)
        for column, row in zip(f.b.T.astype(np.float64), f.a.astype(np.float64), strict=True):
            total += f.scale * np.outer(column, row)
        products[name] = total
    return products


def flat(adapter: Adapter) -> NDArray[np.float64]:
    return np.concatenate([x.ravel() for x in dense(adapter).values()])


def summed(adapters: Sequence[Adapter], weights: Sequence[float]) -> NDArray[np.float64]:
    return np.asarray(sum(w * flat(x) for x, w in zip(adapters, weights, strict=True)))


class TestFactors:
    @fast
    @given(shapes, st.integers(0, 6), seeds, scales)
    def test_dense_and_folded_and_scaled_are_the_product(self, shape, rank, seed, scale):
        adapter = make(shape, rank, seed, scale)
        for name, product in dense(adapter).items():
            np.testing.assert_allclose(adapter[name].dense(), product, atol=1e-12)
            np.testing.assert_allclose(adapter.folded()[name].dense(), product, atol=1e-12)
            np.testing.assert_allclose(adapter.scaled(-0.5)[name].dense(), -0.5 * product, atol=1e-12)
            assert adapter.folded()[name].scale == 1.0
            assert adapter[name].shape == product.shape

    @pytest.mark.parametrize(("a_shape", "b_shape"), [((2, 3), (4, 3)), ((3,), (4, 3)), ((1, 3), (4,))])
    def test_factors_without_one_rank_are_refused(self, a_shape, b_shape):
        with pytest.raises(AdapterError, match=re.escape(f"got a {a_shape} and b {b_shape}")):
            Factors(np.zeros(a_shape), np.zeros(b_shape))

    def test_modules_are_sorted_and_sized(self):
        adapter = make({"z": (2, 3), "a": (4, 5)}, 2, 0, dtype=np.float32)
        assert list(adapter) == ["a", "z"]
        assert adapter.ranks == {"a": 2, "z": 2}
        assert adapter.nbytes == 4 * 2 * (2 + 3 + 4 + 5)

    def test_digest_tells_content_apart(self):
        shape = {"q": (2, 3), "r": (2, 3)}
        adapter = make(shape, 2, 0)
        f = adapter["q"]
        f_order = Factors(np.asfortranarray(f.a), np.asfortranarray(f.b))
        assert Adapter({**adapter, "q": f_order}).digest == adapter.digest
        others = [
            adapter.scaled(2.0),
            make(shape, 2, 1),
            make(shape, 2, 0, dtype=np.float32),
            Adapter({"q": adapter["q"]}),
            Adapter({"q": adapter["r"], "r": adapter["q"]}),
            make(shape, 0, 0),
        ]
        assert len({adapter.digest, *(x.digest for x in others)}) == 7


class TestStack:
    @fast
    @given(shapes, ranks, seeds, st.lists(scales, min_size=5, max_size=5))
    def test_is_the_sum_of_products(self, shape, ranks, seed, scales):
        adapters = [make(shape, r, seed + k, s) for k, (r, s) in enumerate(zip(ranks, scales, strict=False))]
        whole = stack(adapters)
        np.testing.assert_allclose(flat(whole), summed(adapters, [1.0] * len(adapters)), atol=1e-11)
        assert all(f.rank == sum(ranks) and f.scale == 1.0 for f in whole.values())
        assert all(f.a.flags.c_contiguous and f.b.flags.c_contiguous for f in whole.values())

    @fast
    @given(ranks, seeds)
    def test_mixed_dtypes_and_layouts(self, ranks, seed):
        dtypes = [np.float32, np.float64, np.float16, np.float32, np.float32]
        adapters = [make({"q": (7, 5)}, r, seed + k, dtype=dtypes[k]) for k, r in enumerate(ranks)]
        odd = [Adapter({"q": Factors(x["q"].a[:, ::-1], np.asfortranarray(x["q"].b))}) for x in adapters]
        for terms in (adapters, odd):
            whole = stack(terms)
            np.testing.assert_allclose(flat(whole), summed(terms, [1.0] * len(terms)), atol=1e-12)
            assert whole["q"].b.dtype == np.result_type(*dtypes[: len(ranks)])

    def test_is_a_copy_and_leaves_neighbours_alone(self):
        adapters = [make({"q": (5, 3), "v": (3, 7)}, r, r, dtype=np.float32) for r in (1, 3, 2)]
        before = flat(adapters[1])
        whole = stack(adapters)
        whole["q"].a[...] = 0.0
        np.testing.assert_allclose(dense(whole)["v"], sum(dense(x)["v"] for x in adapters), atol=1e-5)
        assert np.array_equal(flat(adapters[1]), before)
        whole["v"].b[...] = 7.0
        assert not whole["q"].a.any()

    def test_nothing_is_refused(self):
        with pytest.raises(AdapterError, match="nothing to stack"):
            stack([])

    def test_other_modules_and_shapes_are_refused_by_name(self):
        with pytest.raises(AdapterError, match=r"missing \['q'\], extra \['k'\]"):
            stack([make({"q": (2, 2)}, 1, 0), make({"k": (2, 2)}, 1, 0)])
        with pytest.raises(AdapterError, match=re.escape("q: shapes differ, (2, 2) and (2, 3)")):
            stack([make({"q": (2, 2)}, 1, 0), make({"q": (2, 3)}, 1, 0)])


class TestNorms:
    @fast
    @given(shapes, st.integers(0, 6), st.integers(0, 6), seeds, scales)
    def test_inner_norm_and_difference_are_those_of_the_products(self, shape, r1, r2, seed, scale):
        x, y = make(shape, r1, seed, scale), make(shape, r2, seed + 1)
        assert inner(x, y) == pytest.approx(flat(x) @ flat(y), rel=1e-9, abs=1e-9)
        assert norm(x) == pytest.approx(np.linalg.norm(flat(x)), rel=1e-12)
        assert norm(difference(x, y)) == pytest.approx(np.linalg.norm(flat(x) - flat(y)), rel=1e-9)
        for name, f in x.items():
            assert factor_norm(f) == pytest.approx(np.linalg.norm(dense(x)[name]), rel=1e-12)

    @pytest.mark.parametrize("scale", [1.0, 0.1, 16 / 3])
    @pytest.mark.parametrize("dtype", [np.float32, np.float64])
    def test_nearly_equal_adapters_cancel_exactly(self, scale, dtype):
        shape, gap = {"q": (40, 30)}, 1e-6
        x, bump = make(shape, 5, 3, scale, dtype), make(shape, 5, 4, dtype=dtype)
        y = Adapter({"q": Factors(x["q"].a, x["q"].b + dtype(gap) * bump["q"].b, scale)})
        step = y["q"].b.astype(np.float64) - x["q"].b.astype(np.float64)  # exact: neighbours in floating point
        expected = scale * np.linalg.norm(step @ x["q"].a.astype(np.float64))
        assert norm(difference(y, x)) == pytest.approx(expected, rel=1e-8)
        assert norm(difference(x, x)) <= 1e-13 * norm(x)

    def test_inner_products_of_float32_are_summed_in_float64(self):
        a = Adapter({"q": Factors(np.full((1, 4), 1e4, np.float32), np.array([[1e4], [1.0]], np.float32))})
        assert inner(a, a) == 4e16 + 4e8

    def test_other_modules_are_refused(self):
        with pytest.raises(AdapterError, match="modules differ"):
            inner(make({"q": (2, 2)}, 1, 0), make({"k": (2, 2)}, 1, 0))
        with pytest.raises(AdapterError, match="modules differ"):
            difference(make({"q": (2, 2)}, 1, 0), make({"k": (2, 2)}, 1, 0))


class TestTruncate:
    @fast
    @given(shapes, st.integers(0, 12), st.integers(0, 12), seeds, scales)
    def test_is_the_best_of_its_rank(self, shape, rank, keep, seed, scale):
        adapter = make(shape, rank, seed, scale)
        small, left = truncated(adapter, keep)
        total = 0.0
        for name, product in dense(adapter).items():
            s = np.linalg.svd(product, compute_uv=False)
            assert np.linalg.norm(product - dense(small)[name]) == pytest.approx(np.linalg.norm(s[keep:]), abs=1e-11)
            assert small[name].rank == min(keep, rank, *product.shape)
            assert small[name].shape == product.shape
            assert small[name].scale == 1.0
            np.testing.assert_allclose(  # split evenly, in falling order
                np.sum(small[name].b ** 2, axis=0), s[: small[name].rank], atol=1e-11
            )
            total += float(np.sum(s[keep:] ** 2))
        assert left == pytest.approx(np.sqrt(total), abs=1e-11)

    @pytest.mark.parametrize(("out", "inp", "rank"), [(300, 200, 130), (90, 300, 128), (70, 65, 200)])
    def test_many_reflectors_and_degenerate_columns(self, out, inp, rank):
        f = make({"q": (out, inp)}, rank, 0)["q"]
        f.b[:, 3], f.b[:, 5], f.a[7] = 0.0, f.b[:, 4], 0.0
        product = f.dense()
        s = np.linalg.svd(product, compute_uv=False)
        for keep in (1, 64, rank):
            small, left = truncate(f, keep)
            assert left == pytest.approx(np.linalg.norm(s[keep:]), rel=1e-9, abs=1e-9)
            assert np.linalg.norm(product - small.dense()) == pytest.approx(left, rel=1e-9, abs=1e-9)
            assert small.a.flags.c_contiguous
            assert small.b.flags.c_contiguous

    def test_float32_in_float32_out_and_error_of_cancelled_terms(self):
        x, y = (make({"q": (50, 40)}, 6, k, dtype=np.float32) for k in (0, 1))
        cancelled = stack([x, x.scaled(-1.0), y])["q"]  # rank 18 on paper, 6 in truth
        small, left = truncate(cancelled, 6)
        assert small.a.dtype == small.b.dtype == np.float32
        assert left < 1e-13 * factor_norm(y["q"])
        np.testing.assert_allclose(small.dense(), y["q"].dense(), atol=1e-5)

    def test_own_rank_of_each_module(self):
        adapter = make({"q": (9, 9), "v": (4, 9)}, 4, 0)
        assert truncated(adapter, {"q": 3, "v": 1})[0].ranks == {"q": 3, "v": 1}
        with pytest.raises(AdapterError, match=r"ranks for other modules than the adapter's: \['k', 'v'\]"):
            truncated(adapter, {"q": 3, "k": 1})

    def test_negative_ranks_and_nan_are_refused(self):
        f = make({"q": (3, 3)}, 2, 0)["q"]
        with pytest.raises(AdapterError, match="cannot truncate to rank -1"):
            truncate(f, -1)
        f.b[0, 0] = np.nan
        with pytest.raises(AdapterError, match="their product is not finite"):
            truncate(f, 1)


class TestPadded:
    @fast
    @given(shapes, st.integers(0, 5), st.integers(0, 5), seeds, scales)
    def test_keeps_the_product(self, shape, rank, more, seed, scale):
        for f in make(shape, rank, seed, scale).values():
            wide = padded(f, rank + more)
            assert wide.rank == rank + more
            np.testing.assert_allclose(wide.dense(), f.dense(), atol=1e-12)

    def test_smaller_ranks_are_refused(self):
        with pytest.raises(AdapterError, match="cannot pad rank 3 to the smaller rank 2; truncate instead"):
            padded(make({"q": (5, 5)}, 3, 0)["q"], 2)


class TestProductSum:
    @fast
    @given(shapes, st.lists(st.integers(0, 6), min_size=1, max_size=12), seeds)
    def test_without_limit_nothing_is_lost(self, shape, ranks, seed):
        adapters = [make(shape, r, seed + k, 0.5) for k, r in enumerate(ranks)]
        weights = [float(k % 4) - 1.0 for k in range(len(ranks))]
        running = ProductSum()
        for adapter, weight in zip(adapters, weights, strict=True):
            running.add(adapter, weight)
        scale = sum(abs(w) * norm(x) for x, w in zip(adapters, weights, strict=True))
        np.testing.assert_allclose(flat(running.total()), summed(adapters, weights), atol=1e-12 * max(scale, 1.0))
        assert running.error <= 1e-12 * max(scale, 1.0)

    @fast
    @given(shapes, st.lists(st.integers(0, 4), min_size=1, max_size=12), seeds, st.integers(1, 4))
    def test_with_a_limit_the_error_is_an_upper_bound(self, shape, ranks, seed, limit):
        adapters = [make(shape, r, seed + k) for k, r in enumerate(ranks)]
        running = ProductSum(limit)
        for adapter in adapters:
            running.add(adapter)
        lost = np.linalg.norm(flat(running.total()) - summed(adapters, [1.0] * len(adapters)))
        assert lost <= running.error + 1e-10
        assert max(running.total().ranks.values()) <= 2 * limit
        if sum(ranks) <= 2 * min(limit, *(d for s in shape.values() for d in s)):
            assert running.error == 0.0

    def test_each_module_is_held_to_its_own_bound(self):
        shape = {"q": (40, 40), "v": (4, 40)}
        running = ProductSum()
        for k in range(200):
            running.add(make(shape, 3, k, dtype=np.float32))
            held = running.total().ranks
            assert held["q"] <= 80
            assert held["v"] <= 8
        whole = running.total()
        assert whole["q"].a.dtype == np.float32
        expected = summed([make(shape, 3, k, dtype=np.float32) for k in range(200)], [1.0] * 200)
        assert np.linalg.norm(flat(whole) - expected) <= 1e-6 * np.linalg.norm(expected)
        assert running.error <= 1e-11 * np.linalg.norm(expected)

    def test_many_compactions_of_float32_round_once(self):
        terms = [make({"v": (4, 40)}, 3, k, 0.1, np.float32) for k in range(200)]  # compacted every other term
        running = ProductSum()
        for term in terms:
            running.add(term)
        expected = summed(terms, [1.0] * 200)
        assert np.linalg.norm(flat(running.total()) - expected) <= 1e-7 * np.linalg.norm(expected)

    def test_an_adapter_without_modules_adds_up_to_one(self):
        running = ProductSum()
        running.add(Adapter({}))
        running.add(Adapter({}))
        assert len(running.total()) == 0

    def test_refusals(self):
        with pytest.raises(AdapterError, match="limit of a running sum must be at least 1, got 0"):
            ProductSum(0)
        with pytest.raises(AdapterError, match="an empty sum has no total"):
            ProductSum().total()
        running = ProductSum()
        running.add(make({"q": (2, 2)}, 1, 0))
        with pytest.raises(AdapterError, match="modules differ"):
            running.add(make({"k": (2, 2)}, 1, 0))


def test_require_same_modules_accepts_other_ranks():
    require_same_modules(make({"q": (2, 3)}, 1, 0), make({"q": (2, 3)}, 4, 0))


def test_require_finite_names_the_array_and_counts():
    require_finite([("fine", np.zeros(3))])
    with pytest.raises(AdapterError, match="B:q has 2 non-finite values of 3"):
        require_finite([("A:q", np.zeros(2)), ("B:q", np.array([np.nan, 1.0, -np.inf]))])
