"""RoLoRA: whose turn it is, what travels, and that each half is an exact mean."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from fedlora.config import MethodConfig
from fedlora.errors import MethodError
from fedlora.state import Answer, Ask, GlobalState, Layout, LocalTraining, Module, expected_shapes
from fedlora.wire import decode_state, encode_state
from strategies.base import Closed, Cohort, Member
from strategies.fedit import METHOD as FEDIT
from strategies.ffa_lora import METHOD as FFA
from strategies.flora import METHOD as FLORA
from strategies.rolora import METHOD

SETTINGS = MethodConfig(name="rolora")
TRAINING = LocalTraining(learning_rate=1e-3, local_steps=1, local_epochs=None, batch_size=1)
LAYOUT = Layout(modules={"q": Module(out=7, inp=5), "v": Module(out=4, inp=6)}, head={"score.weight": (2, 4)})
WHO = (Member(id="big", rank=4, scale=2.0), Member(id="mid", rank=3, scale=0.5), Member(id="small", rank=1, scale=8.0))


def cohort(*who: Member, round_: int = 1, training: LocalTraining = TRAINING) -> Cohort:
    return Cohort(
        round=round_, rounds=9, members=who, settings=SETTINGS, training=training, seed=0, progress=(0.0, 1.0)
    )


def opened(*who: Member, layout: Layout = LAYOUT) -> GlobalState:
    return METHOD.open("base", layout, who, SETTINGS, 11)


def answered(asks: dict[str, Ask], layout: Layout, seed: int) -> dict[str, Answer]:
    rng = np.random.default_rng(seed)
    answers: dict[str, Answer] = {}
    for client, ask in asks.items():
        assert ask.plan is not None
        shapes = expected_shapes(ask.plan, layout)
        arrays = {k: rng.standard_normal(s, np.float32) for k, s in shapes.items()}
        answers[client] = Answer(examples=int(rng.integers(1, 30)), arrays=arrays)
    return answers


def one_round(state: GlobalState, group: Cohort, seed: int = 0) -> tuple[Closed, dict[str, Ask], dict[str, Answer]]:
    protocol = METHOD.protocol(state, group)
    asks = dict(next(protocol))
    answers = answered(asks, state.layout, seed)
    with pytest.raises(StopIteration) as done:
        protocol.send(answers)
    return done.value.value, asks, answers


def turn(state: GlobalState, round_: int = 1) -> str:
    """Which factor the next round trains."""
    found = set()
    for ask in next(METHOD.protocol(state, cohort(*WHO, round_=round_))).values():
        assert ask.plan is not None
        assert ask.plan.train == ask.plan.send == ask.plan.changes
        assert ask.plan.train[1:] == (("head",) if state.layout.head else ())
        found.add(ask.plan.train[0])
    assert len(found) == 1
    return found.pop()


def test_factors_take_turns_and_b_is_first() -> None:
    state, turns = opened(*WHO), ""
    for t in range(1, 6):
        turns += turn(state, t)
        closed = one_round(state, cohort(*WHO, round_=t), t)[0]
        assert closed.report["phase"] == float("BA".index(turns[-1]))
        state = closed.state
    assert turns == "BABAB"


@pytest.mark.parametrize("rounds", [(1, 2, 3), (2, 4, 6), (5, 5, 5)])
def test_the_number_of_the_round_says_nothing(rounds: tuple[int, ...]) -> None:
    state, turns = opened(*WHO), ""
    for t in rounds:
        turns += turn(state, t)
        state = one_round(state, cohort(*WHO, round_=t), t)[0].state
    assert turns == "BAB"


def test_a_round_that_fails_does_not_skip_a_turn() -> None:
    state = one_round(opened(*WHO), cohort(*WHO))[0].state
    for t in (2, 3):
        protocol = METHOD.protocol(state, cohort(*WHO, round_=t))
        next(protocol)
        with pytest.raises(MethodError, match="no client answered"):
            protocol.send({})
        assert turn(state, t + 1) == "A"
    again = [one_round(state, cohort(*WHO, round_=4), 4)[0].state for _ in range(2)]
    assert encode_state(again[0]) == encode_state(again[1])


def test_a_run_that_is_resumed_goes_on_where_it_was() -> None:
    state = opened(*WHO)
    for t in range(1, 4):
        saved = decode_state(encode_state(state))
        assert turn(saved, t) == turn(state, t)
        resumed = one_round(saved, cohort(*WHO, round_=t), t)[0].state
        state = one_round(state, cohort(*WHO, round_=t), t)[0].state
        assert encode_state(resumed) == encode_state(state)


def test_the_first_round_is_ffa_loras() -> None:
    """The same public A, the same mean of the same changes of B, to the byte."""
    ours, _, answers = one_round(opened(*WHO), cohort(*WHO), 3)
    protocol = FFA.protocol(FFA.open("base", LAYOUT, WHO, SETTINGS, 11), cohort(*WHO))
    next(protocol)
    with pytest.raises(StopIteration) as done:
        protocol.send(answers)
    theirs: Closed = done.value.value
    a, b = ours.state.open_task.pair, theirs.state.open_task.pair
    assert a is not None
    assert b is not None
    assert a.digest == b.digest
    assert ours.report["update_norm"] == theirs.report["update_norm"]


def test_each_half_is_the_exact_mean_of_what_clients_did() -> None:
    state = opened(*WHO)
    for t in range(4):
        trained = turn(state)
        before = {n: f.dense() for n, f in state.update().items()}
        closed, asks, answers = one_round(state, cohort(*WHO), t)
        total, moved = sum(a.examples for a in answers.values()), 0.0
        for n, m in LAYOUT.modules.items():
            mean = np.zeros((m.out, m.inp))
            for client, answer in answers.items():
                plan = asks[client].plan
                assert plan is not None
                a, b = (asks[client].arrays[f"{x}:{n}"].astype(np.float64) for x in "AB")
                if trained == "A":
                    a[: plan.rank] += answer.arrays[f"A:{n}"]
                else:
                    b[:, : plan.rank] += answer.arrays[f"B:{n}"]
                mean += answer.examples / total * plan.scale * b @ a
            after = closed.state.update()[n].dense()
            np.testing.assert_allclose(after, mean, rtol=1e-5, atol=1e-5)
            moved += float(np.sum((mean - before[n]) ** 2))
        assert closed.report["update_norm"] == pytest.approx(moved**0.5, rel=1e-5)
        assert closed.report["rank"] == 4.0
        state = closed.state


def test_both_factors_go_down_and_one_comes_up() -> None:
    state = opened(*WHO)
    for trained, fixed in (("B", "A"), ("A", "B")):
        before = state.open_task.pair
        assert before is not None
        closed, asks, answers = one_round(state, cohort(*WHO))
        for m in WHO:
            ask = asks[m.id]
            assert ask.plan is not None
            assert {k.split(":")[0] for k in ask.arrays} == {"A", "B", "head"}
            assert {k.split(":")[0] for k in answers[m.id].arrays} == {trained, "head"}
            assert (ask.plan.a_from, ask.plan.b_from) == ("given", "given")
            assert (ask.plan.rank, ask.plan.rows, ask.plan.scale) == (m.rank, 4, 2.0)
            assert ask.frozen is None
            for n, f in before.items():
                assert ask.arrays[f"A:{n}"].tobytes() == f.a.tobytes()
                assert ask.arrays[f"B:{n}"].tobytes() == f.b.tobytes()
        after = closed.state.open_task.pair
        assert after is not None
        for n, f in before.items():
            kept, moved = (f.a, f.b) if fixed == "A" else (f.b, f.a)
            got = (after[n].a, after[n].b) if fixed == "A" else (after[n].b, after[n].a)
            assert got[0].tobytes() == kept.tobytes()
            assert got[1].tobytes() != moved.tobytes()
        state = closed.state


def test_rows_that_wait_for_their_columns_do_nothing() -> None:
    """Only the small client answered so far: B's later columns are zero, so A's later rows have no gradient B^T G."""
    state = one_round(opened(*WHO), cohort(WHO[2]))[0].state
    pair = state.open_task.pair
    assert pair is not None
    gradient = np.random.default_rng(0).normal(size=(7, 5))
    waiting = pair["q"].b.T @ gradient
    assert waiting[0].any()
    assert not waiting[1:].any()


def test_a_starts_orthonormal_and_b_at_zero() -> None:
    pair = opened(*WHO).open_task.pair
    assert pair is not None
    for f in pair.values():
        np.testing.assert_allclose(f.a @ f.a.T, np.eye(4), atol=1e-6)
        assert not f.b.any()
        assert f.a.dtype == f.b.dtype == np.float32
    assert opened(*WHO).open_task.public_seed is None


def test_an_embedding_waits_for_the_second_round() -> None:
    layout = Layout(modules={"tok": Module(out=5, inp=3, kind="embedding")})
    state = opened(*WHO, layout=layout)
    pair = state.open_task.pair
    assert pair is not None
    assert not pair["tok"].a.any()
    assert pair["tok"].b.all()
    first = one_round(state, cohort(*WHO))[0]
    assert first.report["update_norm"] == 0.0
    second = one_round(first.state, cohort(*WHO))[0]
    assert second.report["update_norm"] > 0.0


@pytest.mark.parametrize("settings", [SETTINGS.model_copy(update={"task_rank": 6}), SETTINGS])
def test_a_rank_above_the_inputs_is_refused_by_name(settings: MethodConfig) -> None:
    with pytest.raises(MethodError, match="rolora: rank 6 is above the 5 inputs of q"):
        METHOD.open("base", LAYOUT, (Member(id="a", rank=6, scale=1.0),), settings, 0)


def test_the_task_rank_caps_the_clients() -> None:
    state = METHOD.open("base", LAYOUT, WHO, SETTINGS.model_copy(update={"task_rank": 2}), 0)
    plans = [a.plan for a in next(METHOD.protocol(state, cohort(*WHO))).values()]
    assert [(p.rank, p.rows) for p in plans if p] == [(2, 2), (2, 2), (1, 2)]


def test_moments_of_another_factor_are_refused() -> None:
    group = cohort(*WHO, training=replace(TRAINING, optimizer_state="keep"))
    with pytest.raises(MethodError, match=r"rolora: training\.optimizer_state is keep, .* use fresh"):
        next(METHOD.protocol(opened(*WHO), group))


def test_a_state_of_another_method_is_refused() -> None:
    with pytest.raises(MethodError, match="rolora: this state keeps no pair"):
        next(METHOD.protocol(FLORA.open("base", LAYOUT, WHO, MethodConfig(name="flora"), 0), cohort(*WHO)))
    with pytest.raises(MethodError, match="rolora: this state does not say which factor is next"):
        next(METHOD.protocol(FEDIT.open("base", LAYOUT, WHO, MethodConfig(name="fedit"), 0), cohort(*WHO)))


def test_what_other_methods_remember_is_left_alone() -> None:
    state = opened(*WHO)
    state = replace(state, memory={"other": {"x": np.ones(2)}, **state.memory})
    after = one_round(state, cohort(*WHO))[0].state
    assert after.memory["other"]["x"].tolist() == [1.0, 1.0]
