"""Means of factors and their covariance, against dense algebra."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedlora.adapter import Adapter, Factors
from fedlora.config import MethodConfig
from fedlora.errors import MethodError
from fedlora.rng import stream
from fedlora.state import Answer, Layout, LocalTraining, Module, expected_shapes
from strategies.base import Cohort, Member, opened
from strategies.means import Mean, ask_all, at_scale, fresh_pair, mean_of

LAYOUT = Layout(modules={"q": Module(out=9, inp=7), "v": Module(out=6, inp=12)}, head={"score.bias": (3,)})
TRAINING = LocalTraining(learning_rate=1e-3, local_steps=1, local_epochs=None, batch_size=1)


def cohort(who: list[Member]) -> Cohort:
    settings_ = MethodConfig(name="fedit")
    return Cohort(
        round=1, rounds=1, members=tuple(who), settings=settings_, training=TRAINING, seed=0, progress=(0.0, 1.0)
    )


def members(ranks: list[int], scales: list[float]) -> list[Member]:
    return [Member(id=f"c{i}", rank=r, scale=s) for i, (r, s) in enumerate(zip(ranks, scales, strict=False))]


def some_pair(rank: int, seed: int, size: float = 1.0) -> Adapter:
    rng = np.random.default_rng(seed)
    return Adapter(
        {
            n: Factors(
                (size * rng.normal(size=(rank, m.inp))).astype(np.float32),
                (size * rng.normal(size=(m.out, rank))).astype(np.float32),
            )
            for n, m in LAYOUT.modules.items()
        }
    )


def changes(who: list[Member], rank: int, seed: int, size: float = 1.0) -> dict[str, Answer]:
    rng = np.random.default_rng(seed)
    answers: dict[str, Answer] = {}
    for m in who:
        arrays = {}
        for n, module in LAYOUT.modules.items():
            r = min(m.rank, rank)
            arrays[f"A:{n}"] = (size * rng.normal(size=(r, module.inp))).astype(np.float32)
            arrays[f"B:{n}"] = (size * rng.normal(size=(module.out, r))).astype(np.float32)
        arrays["head:score.bias"] = rng.normal(size=3).astype(np.float32)
        answers[m.id] = Answer(examples=int(rng.integers(1, 60)), arrays=arrays)
    return answers


def mean(pair: Adapter, who: list[Member], answers: dict[str, Answer], limit: int | None = None) -> Mean:
    return mean_of(pair, answers, cohort(who), LAYOUT, limit=limit)


some_ranks = st.lists(st.integers(1, 5), min_size=1, max_size=5)
some_scales = st.lists(st.floats(0.1, 9.0), min_size=5, max_size=5)


@settings(deadline=None, max_examples=30)
@given(ranks=some_ranks, scales=some_scales, cap=st.integers(1, 5), seed=st.integers(0, 2**31))
def test_pair_and_residual_are_the_exact_mean_of_whole_products(
    ranks: list[int], scales: list[float], cap: int, seed: int
) -> None:
    """The oracle forms every client's whole product densely, frozen rows included, before it subtracts anything."""
    who, pair = members(ranks, scales), some_pair(cap, seed)
    answers = changes(who, cap, seed + 1)
    got = mean(pair, who, answers)
    total = sum(a.examples for a in answers.values())
    for n, f in pair.items():
        exact = np.zeros(f.shape)
        mean_a, mean_b = f.a.astype(np.float64), f.b.astype(np.float64)
        for m in who:
            p, arrays, r = answers[m.id].examples / total, answers[m.id].arrays, min(m.rank, cap)
            a, b = f.a.astype(np.float64), f.b.astype(np.float64)
            a[:r] += arrays[f"A:{n}"]
            b[:, :r] += m.scale * arrays[f"B:{n}"].astype(np.float64)
            exact += p * b @ a
            mean_a, mean_b = mean_a + p * (a - f.a), mean_b + p * (b - f.b)
        np.testing.assert_allclose(got.pair[n].a, mean_a, rtol=1e-10, atol=1e-12)
        np.testing.assert_allclose(got.pair[n].b, mean_b, rtol=1e-10, atol=1e-12)
        np.testing.assert_allclose(
            got.pair[n].dense() + got.residual[n].dense(), exact, rtol=0, atol=1e-11 * float(np.linalg.norm(exact))
        )
        rank = np.linalg.matrix_rank(exact - mean_b @ mean_a, tol=1e-9 * np.linalg.norm(exact))
        assert rank <= got.residual_rank == sum(min(r, cap) for r in ranks) - min(min(r, cap) for r in ranks)
    assert got.lost == 0.0


def test_the_residual_rank_is_reached() -> None:
    """Random changes of ranks 1 and 2 in a product of 6 x 12: a covariance of rank 2, not of 3."""
    who = members([1, 2], [1.0, 2.0])
    got = mean(some_pair(2, 0), who, changes(who, 2, 1))
    assert got.residual_rank == 2
    for f in got.residual.values():
        assert np.linalg.matrix_rank(f.dense(), tol=1e-10) == 2


def test_a_small_change_of_a_large_pair_has_all_its_digits() -> None:
    """The pair is a thousand million times larger: as a difference of whole products, nothing of this would be left."""
    who = members([2, 3, 3], [1.0, 2.0, 0.5])
    answers = changes(who, 3, 5, size=1e-4)
    small, large = (mean(some_pair(3, 4, size), who, answers) for size in (1e-4, 1e5))
    for n in LAYOUT.modules:
        np.testing.assert_array_equal(large.residual[n].dense(), small.residual[n].dense())
        assert np.linalg.norm(small.residual[n].dense()) > 1e-9


def test_the_error_is_over_all_modules() -> None:
    who = members([3, 2, 1], [2.0, 1.0, 0.3])
    got = mean(some_pair(3, 0), who, changes(who, 3, 1))
    off = sum(float(np.sum(f.dense() ** 2)) for f in got.residual.values())
    whole = sum(float(np.sum((got.pair[n].dense() + f.dense()) ** 2)) for n, f in got.residual.items())
    assert got.error() == pytest.approx((off / whole) ** 0.5, rel=1e-12)


def test_head_changes_are_weighted() -> None:
    who = members([1, 1], [1.0, 1.0])
    answers = changes(who, 1, 2)
    total = sum(a.examples for a in answers.values())
    want = sum(a.examples / total * a.arrays["head:score.bias"].astype(np.float64) for a in answers.values())
    np.testing.assert_allclose(mean(some_pair(1, 0), who, answers).head["score.bias"], want, rtol=1e-12)


def test_a_limit_bounds_the_rank_and_says_what_it_lost() -> None:
    who = members([2] * 12, [1.0] * 12)
    answers, pair = changes(who, 2, 3), some_pair(2, 0)
    exact, cut = mean(pair, who, answers), mean(pair, who, answers, limit=3)
    assert max(f.rank for f in cut.residual.values()) <= 2 * 3 + 2
    off = sum(float(np.sum((exact.residual[n].dense() - f.dense()) ** 2)) for n, f in cut.residual.items()) ** 0.5
    assert 0 < off <= cut.lost * (1 + 1e-9)


def test_nobody_is_refused() -> None:
    who = members([1], [1.0])
    with pytest.raises(MethodError, match=r"no client answered in round 1 \(asked: 1\)"):
        mean(some_pair(1, 0), who, {})


def test_everybody_gets_the_whole_pair_at_an_own_scale() -> None:
    who = members([1, 4, 2], [0.5, 3.0, 0.5])
    pair = some_pair(3, 0)
    state = opened("base", LAYOUT, 0, pair=pair)
    for m, ask in zip(who, ask_all("fedit", state, cohort(who), pair).values(), strict=True):
        plan = ask.plan
        assert plan is not None
        assert (plan.rank, plan.rows, plan.scale) == (min(m.rank, 3), 3, m.scale)
        assert plan.train == plan.send == plan.changes == ("A", "B", "head")
        assert plan.method == "fedit"
        assert set(expected_shapes(plan, LAYOUT)) == set(ask.arrays)
        for n, f in pair.items():
            assert ask.arrays[f"A:{n}"].tobytes() == f.a.tobytes()
            assert ask.arrays[f"B:{n}"].dtype == np.float32
            np.testing.assert_allclose(m.scale * ask.arrays[f"B:{n}"], f.b, rtol=1e-6)


def test_another_scale_is_the_same_product() -> None:
    pair = some_pair(3, 0)
    for n, f in at_scale(pair, 0.7).items():
        assert f.scale == 0.7
        assert f.b.dtype == np.float32
        np.testing.assert_allclose(f.dense(), pair[n].dense(), rtol=1e-5, atol=1e-6)


def test_a_fresh_pair_is_that_of_its_seed() -> None:
    layout = Layout(modules={"e": Module(out=4, inp=30, kind="embedding"), "q": Module(out=5, inp=16)})
    pair, again, other = fresh_pair(layout, 3, 1), fresh_pair(layout, 3, 1), fresh_pair(layout, 3, 2)
    assert pair.digest == again.digest != other.digest
    assert {f.scale for f in pair.values()} == {1.0}
    assert not pair["q"].b.any()
    assert np.abs(pair["q"].a).max() <= 0.25
    assert not pair["e"].a.any()
    want = stream(1, "fedit-start", "e").standard_normal((4, 3), np.float32)
    assert pair["e"].b.tobytes() == want.tobytes()
