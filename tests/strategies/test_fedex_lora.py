"""FedEx-LoRA: the mean pair, its residual, and what bounding the residual costs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import NDArray

from fedlora.config import MethodConfig
from fedlora.errors import MethodError
from fedlora.state import Answer, Ask, GlobalState, Layout, LocalTraining, Module, expected_shapes
from fedlora.wire import decode_state, encode_state
from strategies.base import Closed, Cohort, Member
from strategies.fedex_lora import METHOD
from strategies.fedit import METHOD as FEDIT
from strategies.flora import METHOD as FLORA

SETTINGS = MethodConfig(name="fedex-lora")
TRAINING = LocalTraining(learning_rate=1e-3, local_steps=1, local_epochs=None, batch_size=1)
LAYOUT = Layout(modules={"q": Module(out=20, inp=17), "v": Module(out=14, inp=24)})
WHO = tuple(Member(id=f"c{i}", rank=r, scale=s) for i, (r, s) in enumerate([(4, 2.0), (1, 0.5), (3, 1.7)]))
Dense = dict[str, NDArray[np.float64]]


def cohort(*who: Member, settings: MethodConfig = SETTINGS) -> Cohort:
    return Cohort(round=1, rounds=9, members=who, settings=settings, training=TRAINING, seed=0, progress=(0.0, 1.0))


def changed(asks: Mapping[str, Ask], seed: int, layout: Layout = LAYOUT) -> dict[str, Answer]:
    rng = np.random.default_rng(seed)
    return {
        client: Answer(
            examples=int(rng.integers(1, 40)),
            arrays={
                k: 0.1 * rng.standard_normal(s, np.float32)
                for k, s in expected_shapes(ask.plan, layout).items()
                if ask.plan is not None
            },
        )
        for client, ask in asks.items()
        if ask.plan is not None
    }


def one_round(
    state: GlobalState, group: Cohort, seed: int, layout: Layout = LAYOUT
) -> tuple[Closed, dict[str, Ask], dict[str, Answer]]:
    protocol = METHOD.protocol(state, group)
    asks = dict(next(protocol))
    answers = changed(asks, seed, layout)
    with pytest.raises(StopIteration) as done:
        protocol.send(answers)
    return done.value.value, asks, answers


def opened(*who: Member, settings: MethodConfig = SETTINGS) -> GlobalState:
    return METHOD.open("base", LAYOUT, who, settings, 3)


def w_eff(state: GlobalState) -> Dense:
    return {n: f.dense() for n, f in state.update().items()}


def exact_mean(asks: Mapping[str, Ask], answers: Mapping[str, Answer]) -> Dense:
    """The weighted mean of the products that clients ended with, blocks aside: dense, all rows."""
    total = sum(a.examples for a in answers.values())
    out: Dense = {}
    for n, m in LAYOUT.modules.items():
        out[n] = np.zeros((m.out, m.inp))
        for client, answer in answers.items():
            plan = asks[client].plan
            assert plan is not None
            a, b = (asks[client].arrays[f"{x}:{n}"].astype(np.float64) for x in "AB")
            a[: plan.rank] += answer.arrays[f"A:{n}"]
            b[:, : plan.rank] += answer.arrays[f"B:{n}"]
            out[n] += answer.examples / total * plan.scale * b @ a
    return out


def size(x: Dense) -> float:
    return float(sum(np.sum(v**2) for v in x.values()) ** 0.5)


def minus(x: Dense, y: Dense) -> Dense:
    return {n: v - y[n] for n, v in x.items()}


def pair_of(state: GlobalState) -> Dense:
    assert state.open_task.pair is not None
    return {n: f.dense() for n, f in state.open_task.pair.items()}


def test_the_block_is_the_mean_product_less_the_product_of_means() -> None:
    state = opened(*WHO)
    kept: Dense = {n: np.zeros((m.out, m.inp)) for n, m in LAYOUT.modules.items()}
    for t in range(3):
        before = w_eff(state)
        closed, asks, answers = one_round(state, cohort(*WHO), t)
        state, exact = closed.state, exact_mean(asks, answers)
        residual = minus(exact, pair_of(state))
        block = state.open_task.blocks[-1]
        assert size(minus({n: f.dense() for n, f in block.adapter.items()}, residual)) < 1e-6 * size(exact)
        assert size(residual) > 0.05 * size(exact)
        kept = {n: kept[n] + x for n, x in residual.items()}
        whole = {n: kept[n] + x for n, x in pair_of(state).items()}
        assert size(minus(w_eff(state), whole)) < 1e-6 * size(whole)
        report = closed.report
        assert report["aggregation_error"] == pytest.approx(size(residual) / size(exact), rel=1e-4)
        assert report["update_norm"] == pytest.approx(size(minus(w_eff(state), before)), rel=1e-4)
        assert (report["truncation_error"], report["truncation_error_relative"]) == (0.0, 0.0)
        assert report["rank"] == 4 + sum(b.adapter["q"].rank for b in state.open_task.blocks)


def test_no_scale_and_no_weight_is_lost_in_the_mean_pair() -> None:
    closed, asks, answers = one_round(opened(*WHO), cohort(*WHO), 1)
    total = sum(a.examples for a in answers.values())
    pair = closed.state.open_task.pair
    assert pair is not None
    for n in LAYOUT.modules:
        a = asks["c0"].arrays[f"A:{n}"].astype(np.float64)
        b = 2.0 * asks["c0"].arrays[f"B:{n}"].astype(np.float64)
        for m in WHO:
            p = answers[m.id].examples / total
            a[: m.rank] += p * answers[m.id].arrays[f"A:{n}"]
            b[:, : m.rank] += p * m.scale * answers[m.id].arrays[f"B:{n}"]
        np.testing.assert_allclose(pair[n].a, a, rtol=1e-5, atol=1e-7)
        np.testing.assert_allclose(pair[n].b, b, rtol=1e-5, atol=1e-7)
        assert pair[n].a.dtype == pair[n].b.dtype == np.float32


def test_at_one_rank_the_pair_and_the_error_are_fedits() -> None:
    who = tuple(Member(id=f"c{i}", rank=3, scale=s) for i, s in enumerate([0.5, 2.0, 1.0, 3.0]))
    ours, _, answers = one_round(opened(*who), cohort(*who), 4)
    protocol = FEDIT.protocol(FEDIT.open("base", LAYOUT, who, SETTINGS, 3), cohort(*who))
    next(protocol)
    with pytest.raises(StopIteration) as done:
        protocol.send(answers)
    theirs: Closed = done.value.value
    assert theirs.report["aggregation_error"] == pytest.approx(ours.report["aggregation_error"], rel=1e-5)
    assert size(minus(pair_of(ours.state), w_eff(theirs.state))) < 1e-6 * size(w_eff(theirs.state))


def test_the_block_has_no_empty_directions() -> None:
    """A covariance of clients of ranks 4, 1, 3 has rank 7, and one of a single client is nothing, on the wire too."""
    closed = one_round(opened(*WHO), cohort(*WHO), 1)[0]
    assert set(closed.state.open_task.blocks[0].adapter.ranks.values()) == {7}
    for f in closed.state.open_task.blocks[0].adapter.values():
        sigma = np.linalg.svd(f.dense(), compute_uv=False)
        assert sigma[6] > 1e-4 * sigma[0]

    alone = one_round(closed.state, cohort(WHO[0]), 2)[0]
    assert set(alone.state.open_task.blocks[1].adapter.ranks.values()) == {0}
    assert alone.report["aggregation_error"] < 1e-14
    saved = decode_state(encode_state(alone.state))
    assert encode_state(saved) == encode_state(alone.state)
    assert one_round(saved, cohort(*WHO), 3)[0].report == one_round(alone.state, cohort(*WHO), 3)[0].report


def test_each_block_says_from_which_version_it_leads_to_which() -> None:
    state = opened(*WHO)
    for t in range(2):
        state = one_round(state, cohort(*WHO), t)[0].state
    assert [(b.since, b.born) for b in state.open_task.blocks] == [(0, 1), (1, 2)]


def test_many_rounds_are_recompressed_without_loss() -> None:
    state, want = opened(*WHO), {n: np.zeros((m.out, m.inp)) for n, m in LAYOUT.modules.items()}
    counts = []
    for t in range(8):
        before = pair_of(state)
        closed, asks, answers = one_round(state, cohort(*WHO), t)
        want = {n: want[n] + x - before[n] for n, x in exact_mean(asks, answers).items()}
        state = closed.state
        counts.append(len(state.open_task.blocks))
    assert min(counts[1:]) == 1
    assert max(counts) > 1
    assert size(minus(w_eff(state), want)) < 1e-6 * size(want)


def test_max_rank_keeps_the_best_directions_and_says_what_it_lost() -> None:
    settings = SETTINGS.model_copy(update={"max_rank": 2})
    state = opened(*WHO, settings=settings)
    closed, asks, answers = one_round(state, cohort(*WHO, settings=settings), 1)
    blocks = closed.state.open_task.blocks
    assert len(blocks) == 1
    assert set(blocks[0].adapter.ranks.values()) == {2}
    exact = exact_mean(asks, answers)
    residual = minus(exact, pair_of(closed.state))
    best = sum(float(np.sum(np.linalg.svd(x, compute_uv=False)[2:] ** 2)) for x in residual.values()) ** 0.5
    lost = size(minus(exact, w_eff(closed.state)))
    assert lost == pytest.approx(best, rel=1e-4)
    assert closed.report["truncation_error"] == pytest.approx(best, rel=1e-4)
    kept = size(w_eff(closed.state))
    assert closed.report["truncation_error_relative"] == pytest.approx(best / np.hypot(kept, best), rel=1e-4)
    assert closed.report["rank"] == 6
    assert closed.report["aggregation_error"] == pytest.approx(size(residual) / size(exact), rel=1e-4)


def test_with_max_rank_the_running_sum_is_bounded_and_its_loss_counted() -> None:
    """Ranks of 12 in all pass twice the limit max_rank + R = 5: that loses no more than the truncation after it."""
    settings = SETTINGS.model_copy(update={"max_rank": 3})
    who = tuple(Member(id=f"c{i:02}", rank=2, scale=1.0) for i in range(6))
    closed, asks, answers = one_round(opened(*who, settings=settings), cohort(*who, settings=settings), 1)
    exact = exact_mean(asks, answers)
    residual = minus(exact, pair_of(closed.state))
    best = sum(float(np.sum(np.linalg.svd(x, compute_uv=False)[3:] ** 2)) for x in residual.values()) ** 0.5
    lost = size(minus(exact, w_eff(closed.state)))
    assert best * (1 - 1e-6) <= lost <= closed.report["truncation_error"] * (1 + 1e-6)
    assert best * 1.01 < closed.report["truncation_error"] <= 2 * best


def test_max_error_is_met() -> None:
    settings = SETTINGS.model_copy(update={"max_error": 0.3})
    closed, asks, answers = one_round(opened(*WHO, settings=settings), cohort(*WHO, settings=settings), 1)
    exact = exact_mean(asks, answers)
    residual = minus(exact, pair_of(closed.state))
    lost = size(minus(exact, w_eff(closed.state)))
    assert 0 < lost <= 0.3 * size(residual)
    assert closed.report["truncation_error"] == pytest.approx(lost, rel=1e-4)
    assert max(closed.state.open_task.blocks[0].adapter.ranks.values()) < 7
    both = settings.model_copy(update={"max_rank": 1})
    with pytest.raises(MethodError, match=r"max_error = 0.3 needs rank \d in q, and method.max_rank allows 1"):
        one_round(opened(*WHO, settings=both), cohort(*WHO, settings=both), 1)


def test_the_task_rank_is_that_of_the_pair() -> None:
    settings = SETTINGS.model_copy(update={"task_rank": 2})
    protocol = METHOD.protocol(opened(*WHO, settings=settings), cohort(*WHO, settings=settings))
    plans = [a.plan for a in next(protocol).values()]
    assert [(p.rank, p.rows, p.scale) for p in plans if p] == [(2, 2, 2.0), (1, 2, 0.5), (2, 2, 1.7)]


def test_every_client_trains_on_the_residuals_of_all_rounds() -> None:
    state = one_round(opened(*WHO), cohort(*WHO), 1)[0].state
    for ask in next(METHOD.protocol(state, cohort(*WHO))).values():
        assert ask.blocks == state.open_task.blocks
        assert ask.frozen is None


def test_a_state_without_a_pair_is_refused() -> None:
    flora = FLORA.open("base", LAYOUT, WHO, MethodConfig(name="flora"), 0)
    with pytest.raises(MethodError, match="fedex-lora: this state keeps no pair"):
        next(METHOD.protocol(flora, cohort(*WHO)))


def test_an_embedding_learns_in_its_zero_factor() -> None:
    layout = Layout(modules={"tok": Module(out=4, inp=40, kind="embedding")})
    state = METHOD.open("base", layout, WHO, SETTINGS, 0)
    pair = state.open_task.pair
    assert pair is not None
    assert not pair["tok"].a.any()
    assert pair["tok"].b.all()
    closed = one_round(replace(state, layout=layout), cohort(*WHO), 1, layout)[0]
    assert closed.report["update_norm"] > 0
