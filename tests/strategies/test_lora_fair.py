"""LoRA-FAIR: the correction is the ridge solution, and the state lies between fedit's and the exact mean."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from fedlora.adapter import Factors
from fedlora.config import MethodConfig
from fedlora.errors import MethodError
from fedlora.state import Answer, Ask, GlobalState, Layout, LocalTraining, Module, expected_shapes
from strategies.base import Closed, Cohort, Member
from strategies.fedit import METHOD as FEDIT
from strategies.flora import METHOD as FLORA
from strategies.lora_fair import METHOD, correction

SETTINGS = MethodConfig(name="lora-fair")
TRAINING = LocalTraining(learning_rate=1e-3, local_steps=1, local_epochs=None, batch_size=1)
LAYOUT = Layout(modules={"q": Module(out=20, inp=17), "v": Module(out=14, inp=24)})
WHO = tuple(Member(id=f"c{i}", rank=r, scale=s) for i, (r, s) in enumerate([(4, 2.0), (1, 0.5), (3, 1.7), (4, 1.0)]))
SAME = tuple(Member(id=f"c{i}", rank=3, scale=s) for i, s in enumerate([2.0, 0.5, 1.7]))
Dense = dict[str, NDArray[np.float64]]


def with_ridge(ridge: float | None) -> MethodConfig:
    return SETTINGS.model_copy(update={"ridge": ridge})


def cohort(*who: Member, ridge: float | None = None) -> Cohort:
    return Cohort(
        round=1, rounds=9, members=who, settings=with_ridge(ridge), training=TRAINING, seed=0, progress=(0.0, 1.0)
    )


def opened(*who: Member, layout: Layout = LAYOUT) -> GlobalState:
    return METHOD.open("base", layout, who, SETTINGS, 3)


def one_round(
    state: GlobalState, group: Cohort, seed: int, size: float = 0.2
) -> tuple[Closed, dict[str, Ask], dict[str, Answer]]:
    protocol = METHOD.protocol(state, group)
    asks = dict(next(protocol))
    rng = np.random.default_rng(seed)
    answers: dict[str, Answer] = {}
    for client, ask in asks.items():
        assert ask.plan is not None
        shapes = expected_shapes(ask.plan, state.layout)
        arrays = {k: np.float32(size) * rng.standard_normal(s, np.float32) for k, s in shapes.items()}
        answers[client] = Answer(examples=int(rng.integers(1, 40)), arrays=arrays)
    with pytest.raises(StopIteration) as done:
        protocol.send(answers)
    return done.value.value, asks, answers


def oracle(asks: dict[str, Ask], answers: dict[str, Answer]) -> tuple[Dense, Dense, Dense]:
    """Dense in float64: the mean of A, the mean of B, and the mean of the whole products."""
    total = sum(a.examples for a in answers.values())
    mean_a, mean_b, exact = {}, {}, {}
    for n, m in LAYOUT.modules.items():
        plans = [a.plan for a in asks.values()]
        assert plans[0] is not None
        mean_a[n], mean_b[n] = np.zeros((plans[0].rows, m.inp)), np.zeros((m.out, plans[0].rows))
        exact[n] = np.zeros((m.out, m.inp))
        for client, answer in answers.items():
            plan = asks[client].plan
            assert plan is not None
            a, b = (asks[client].arrays[f"{x}:{n}"].astype(np.float64) for x in "AB")
            a[: plan.rank] += answer.arrays[f"A:{n}"]
            b[:, : plan.rank] += answer.arrays[f"B:{n}"]
            p = answer.examples / total
            mean_a[n] += p * a
            mean_b[n] += p * plan.scale * b
            exact[n] += p * plan.scale * b @ a
    return mean_a, mean_b, exact


def size(x: Dense) -> float:
    return float(sum(np.sum(v**2) for v in x.values()) ** 0.5)


def off(state: GlobalState, exact: Dense) -> float:
    return size({n: f.dense() - exact[n] for n, f in state.update().items()}) / size(exact)


@settings(deadline=None, max_examples=40)
@given(
    out=st.integers(1, 9),
    inp=st.integers(1, 9),
    rank=st.integers(1, 6),
    inner=st.integers(0, 6),
    ridge=st.sampled_from([0.0, 1e-3, 0.01, 2.0]),
    seed=st.integers(0, 2**31),
)
def test_the_correction_solves_the_ridge_problem(
    out: int, inp: int, rank: int, inner: int, ridge: float, seed: int
) -> None:
    """As least squares with the penalty as further rows, by numpy's own solver: the smallest one at ridge 0."""
    rng = np.random.default_rng(seed)
    a = rng.normal(size=(rank, inp))
    residual = Factors(rng.normal(size=(inner, inp)), rng.normal(size=(out, inner)), 1.7)
    left = np.concatenate([a.T, np.sqrt(ridge) * np.eye(rank)])
    right = np.concatenate([residual.dense().T, np.zeros((rank, out))])
    want = np.linalg.lstsq(left, right, rcond=1e-10)[0].T
    np.testing.assert_allclose(correction(residual, a, ridge), want, rtol=1e-6, atol=1e-6)


def test_rows_of_a_that_say_nothing_are_no_singular_problem() -> None:
    """A zero row, two equal rows, and one that differs by rounding: nothing blows up, and the error is the least."""
    rng = np.random.default_rng(0)
    a = rng.normal(size=(5, 8)).astype(np.float32)
    a[1] = 0.0
    a[3] = a[2]
    a[4] = a[2] * np.float32(1 + 1e-7)
    residual = Factors(rng.normal(size=(3, 8)), rng.normal(size=(6, 3)))
    span = np.linalg.svd(a[[0, 2]].astype(np.float64), full_matrices=False)[2]
    least = np.linalg.norm(residual.dense() @ (np.eye(8) - span.T @ span))
    for ridge in (0.0, 1e-9):
        best = correction(residual, a, ridge)
        assert np.abs(best[:, 1]).max() < 1e-12
        assert np.abs(best).max() < 10
        assert np.linalg.norm(residual.dense() - best @ a) == pytest.approx(least, rel=1e-6)
        assert not correction(residual, np.zeros((2, 8), np.float32), ridge).any()


def test_without_a_penalty_it_is_the_best_b_for_the_mean_a() -> None:
    """min over B of ||B A' - M|| by dense least squares on the whole target, over three rounds."""
    state = opened(*WHO)
    for t in range(3):
        closed, asks, answers = one_round(state, cohort(*WHO, ridge=0.0), t)
        mean_a, _, exact = oracle(asks, answers)
        best = {n: np.linalg.lstsq(a.T, exact[n].T, rcond=None)[0].T @ a for n, a in mean_a.items()}
        least = size({n: x - exact[n] for n, x in best.items()}) / size(exact)
        assert closed.report["aggregation_error_corrected"] == pytest.approx(least, rel=1e-4)
        assert off(closed.state, exact) == pytest.approx(least, rel=1e-4)
        got = {n: f.dense() - best[n] for n, f in closed.state.update().items()}
        assert size(got) < 1e-5 * size(best)
        state = closed.state


def test_it_minimises_the_penalised_error() -> None:
    """Dense normal equations, at the default penalty of 0.01 and mixed ranks and scales."""
    state = one_round(opened(*WHO), cohort(*WHO), 1)[0].state
    closed, asks, answers = one_round(state, cohort(*WHO), 2)
    mean_a, mean_b, exact = oracle(asks, answers)
    pair = closed.state.open_task.pair
    assert pair is not None
    for n, a in mean_a.items():
        e = exact[n] - mean_b[n] @ a
        want = mean_b[n] + e @ a.T @ np.linalg.inv(a @ a.T + 0.01 * np.eye(len(a)))
        np.testing.assert_allclose(pair[n].b, want, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(pair[n].a, a, rtol=1e-5, atol=1e-6)
        assert pair[n].a.dtype == pair[n].b.dtype == np.float32
    plain = size({n: exact[n] - mean_b[n] @ a for n, a in mean_a.items()}) / size(exact)
    assert closed.report["aggregation_error"] == pytest.approx(plain, rel=1e-4)
    assert closed.report["aggregation_error_corrected"] == pytest.approx(off(closed.state, exact), rel=1e-4)
    assert off(closed.state, exact) < plain
    before = state.update()
    moved = size({n: f.dense() - before[n].dense() for n, f in closed.state.update().items()})
    assert closed.report["update_norm"] == pytest.approx(moved, rel=1e-4)
    assert closed.report["rank"] == 4.0


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 2**31), scale=st.sampled_from([0.01, 0.2, 1.0]), mixed=st.booleans())
def test_the_error_falls_with_the_penalty_and_is_never_above_that_of_plain_means(
    seed: int, scale: float, mixed: bool
) -> None:
    who = WHO if mixed else SAME
    state = opened(*who)
    found = []
    for ridge in (0.0, 1e-3, 0.01, 1.0, 100.0):
        closed, asks, answers = one_round(state, cohort(*who, ridge=ridge), seed, scale)
        found.append(closed.report["aggregation_error_corrected"])
        exact = oracle(asks, answers)[2]
        assert off(closed.state, exact) <= closed.report["aggregation_error"] * (1 + 1e-5) + 1e-6
    assert all(
        x <= y * (1 + 1e-9) for x, y in zip(found, [*found[1:], closed.report["aggregation_error"]], strict=True)
    )
    assert found[0] < found[-1]


def fedits(group: Cohort, answers: dict[str, Answer]) -> Closed:
    protocol = FEDIT.protocol(FEDIT.open("base", LAYOUT, group.members, SETTINGS, 3), group)
    next(protocol)
    with pytest.raises(StopIteration) as done:
        protocol.send(answers)
    closed: Closed = done.value.value
    return closed


def test_a_heavy_penalty_is_fedit_and_any_lighter_one_is_better() -> None:
    group = cohort(*SAME, ridge=1e12)
    heavy, asks, answers = one_round(opened(*SAME), group, 5)
    theirs = fedits(group, answers)
    ours, plain = heavy.state.open_task.pair, theirs.state.open_task.pair
    assert ours is not None
    assert plain is not None
    for n, f in plain.items():
        np.testing.assert_allclose(ours[n].a, f.a, rtol=1e-5, atol=1e-7)
        np.testing.assert_allclose(ours[n].b, f.b, rtol=1e-5, atol=1e-7)
    error = theirs.report["aggregation_error"]
    assert heavy.report["aggregation_error"] == pytest.approx(error, rel=1e-5)
    assert heavy.report["aggregation_error_corrected"] == pytest.approx(error, rel=1e-5)
    light = one_round(opened(*SAME), cohort(*SAME), 5)[0]
    exact = oracle(asks, answers)[2]
    assert off(light.state, exact) < off(theirs.state, exact) == pytest.approx(error, rel=1e-4)


def test_the_default_penalty_is_the_papers() -> None:
    default, stated, none = (
        one_round(opened(*WHO), cohort(*WHO, ridge=ridge), 1)[0].report for ridge in (None, 0.01, 0.0)
    )
    assert default == stated != none


def test_one_client_needs_no_correction() -> None:
    closed, asks, answers = one_round(opened(*WHO), cohort(WHO[0], ridge=0.0), 1)
    assert closed.report["aggregation_error"] < 1e-14
    assert closed.report["aggregation_error_corrected"] < 1e-13
    assert off(closed.state, oracle(asks, answers)[2]) < 1e-6


def test_an_embedding_starts_at_a_zero_a() -> None:
    layout = Layout(modules={"tok": Module(out=6, inp=40, kind="embedding")})
    state = opened(*WHO, layout=layout)
    pair = state.open_task.pair
    assert pair is not None
    assert not pair["tok"].a.any()
    closed = one_round(state, cohort(*WHO, ridge=0.0), 1, size=0.0)[0]
    assert closed.state.open_task.pair is not None
    assert closed.state.open_task.pair["tok"].b.tobytes() == pair["tok"].b.tobytes()
    moved = one_round(state, cohort(*WHO), 1)[0]
    assert 0 < moved.report["aggregation_error_corrected"] < moved.report["aggregation_error"]


def test_a_state_without_a_pair_is_refused() -> None:
    flora = FLORA.open("base", LAYOUT, WHO, MethodConfig(name="flora"), 0)
    with pytest.raises(MethodError, match="lora-fair: this state keeps no pair"):
        next(METHOD.protocol(flora, cohort(*WHO)))


def test_the_task_rank_is_that_of_the_pair() -> None:
    settings_ = SETTINGS.model_copy(update={"task_rank": 2})
    state = METHOD.open("base", LAYOUT, WHO, settings_, 0)
    plans = [a.plan for a in next(METHOD.protocol(state, cohort(*WHO))).values()]
    assert [(p.rank, p.rows) for p in plans if p] == [(2, 2), (1, 2), (2, 2), (2, 2)]
