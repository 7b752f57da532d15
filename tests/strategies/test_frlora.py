"""FRLoRA against its formula, written out densely: means of the factors, increments, the start of the next round."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from fedlora.config import MethodConfig
from fedlora.errors import MethodError
from fedlora.state import Answer, Ask, GlobalState, Layout, LocalTraining, Module
from strategies.base import Closed, Cohort, Member
from strategies.blocks import Stepped
from strategies.flora import METHOD as FLORA
from strategies.frlora import METHOD

Dense = dict[str, NDArray[np.float64]]

SETTINGS = MethodConfig(name="frlora")
TRAINING = LocalTraining(learning_rate=1e-3, local_steps=1, local_epochs=None, batch_size=1)
LAYOUT = Layout(modules={"q": Module(out=9, inp=7), "v": Module(out=8, inp=12)})
WHO = (Member(id="a", rank=3, scale=0.5), Member(id="b", rank=1, scale=4.0), Member(id="c", rank=2, scale=2.0))


def cohort(who: Sequence[Member], t: int, config: MethodConfig) -> Cohort:
    return Cohort(
        round=t, rounds=9, members=tuple(who), settings=config, training=TRAINING, seed=0, progress=(0.0, 1.0)
    )


def opened(who: Sequence[Member] = WHO, config: MethodConfig = SETTINGS) -> GlobalState:
    return METHOD.open("base", LAYOUT, who, config, 0)


def ask_all(
    state: GlobalState, who: Sequence[Member] = WHO, t: int = 1, config: MethodConfig = SETTINGS
) -> Mapping[str, Ask]:
    return next(METHOD.protocol(state, cohort(who, t, config)))


@dataclass(frozen=True)
class Played:
    """A round: its end, what was asked, and by the formula the increment and the error of the mean."""

    closed: Closed
    asks: Mapping[str, Ask]
    increment: Dense
    error: float


def size(x: Dense) -> float:
    return float(np.sqrt(sum(np.sum(v**2) for v in x.values())))


def learnt(state: GlobalState) -> Dense:
    return {n: f.dense() for n, f in state.update().items()}


def pad(x: NDArray[np.floating], shape: tuple[int, ...]) -> NDArray[np.float64]:
    return np.pad(x.astype(np.float64), [(0, n - m) for n, m in zip(shape, x.shape, strict=True)])


def play(
    state: GlobalState,
    seed: int,
    who: Sequence[Member] = WHO,
    t: int = 1,
    config: MethodConfig = SETTINGS,
    noise: float = 0.3,
) -> Played:
    """Random changes from everybody; dense oracles from what the clients hold and say.

    The common start is what the largest client was given, its scale folded in.
    """
    protocol = METHOD.protocol(state, cohort(who, t, config))
    asks, rng = dict(next(protocol)), np.random.default_rng(seed)
    answers = {
        m.id: Answer(
            examples=int(rng.integers(1, 50)),
            arrays={k: (noise * rng.normal(size=x.shape)).astype(np.float32) for k, x in asks[m.id].arrays.items()},
        )
        for m in who
    }
    with pytest.raises(StopIteration) as done:
        protocol.send(answers)
    largest = max(who, key=lambda m: m.rank)
    total = sum(a.examples for a in answers.values())
    increment, exact = {}, {}
    for n in LAYOUT.modules:
        a0 = asks[largest.id].arrays[f"A:{n}"].astype(np.float64)
        b0 = largest.scale * asks[largest.id].arrays[f"B:{n}"].astype(np.float64)
        mean_a, mean_b, exact[n] = a0, b0, np.zeros((len(b0), a0.shape[1]))
        for m in who:
            p, arrays, given_ = answers[m.id].examples / total, answers[m.id].arrays, asks[m.id].arrays
            mean_a = mean_a + p * pad(arrays[f"A:{n}"], a0.shape)
            mean_b = mean_b + p * m.scale * pad(arrays[f"B:{n}"], b0.shape)
            a, b = given_[f"A:{n}"].astype(np.float64), given_[f"B:{n}"].astype(np.float64)
            exact[n] += p * m.scale * ((b + arrays[f"B:{n}"]) @ (a + arrays[f"A:{n}"]) - b @ a)
        increment[n] = mean_b @ mean_a - b0 @ a0
    error = size({n: exact[n] - x for n, x in increment.items()}) / (size(exact) or 1.0)
    return Played(done.value.value, asks, increment, error)


@settings(deadline=None, max_examples=25)
@given(
    ranks=st.lists(st.integers(1, 4), min_size=1, max_size=4),
    scales=st.lists(st.floats(0.1, 9.0), min_size=4, max_size=4),
    seed=st.integers(0, 2**31),
)
def test_increments_and_their_error_equal_the_formula(ranks: list[int], scales: list[float], seed: int) -> None:
    who = [Member(id=f"c{i}", rank=r, scale=scales[i]) for i, r in enumerate(ranks)]
    state, want = opened(who), {n: np.zeros((m.out, m.inp)) for n, m in LAYOUT.modules.items()}
    for t in (1, 2, 3):
        played = play(state, seed + t, who, t)
        want = {n: x + played.increment[n] for n, x in want.items()}
        state = played.closed.state
        off = size({n: x - want[n] for n, x in learnt(state).items()})
        assert off < 2e-6 * size(want)
        report = played.closed.report
        assert report["update_norm"] == pytest.approx(size(played.increment), rel=1e-5)
        assert report["aggregation_error"] == pytest.approx(played.error, rel=1e-4, abs=1e-6)
        assert report["truncation_error"] == 0.0
        assert state.open_task.pair is None


def test_one_client_has_no_aggregation_error() -> None:
    state = play(opened(WHO[:1]), 1, WHO[:1]).closed.state
    assert play(state, 2, WHO[:1], 2).closed.report["aggregation_error"] < 1e-12


def test_clients_start_from_the_best_of_the_last_increment_and_take_it_off_again() -> None:
    first = play(opened(), 1)
    second = play(first.closed.state, 2, t=2)
    for last, state, t in ((first, first.closed.state, 2), (second, second.closed.state, 3)):
        for m, ask in zip(WHO, ask_all(state, t=t).values(), strict=True):
            assert ask.frozen is not None
            assert ask.plan is not None
            for n, x in last.increment.items():
                a, b = ask.arrays[f"A:{n}"], ask.arrays[f"B:{n}"]
                start = m.scale * (b.astype(np.float64) @ a.astype(np.float64))
                u, s, vt = np.linalg.svd(x)
                np.testing.assert_allclose(start, (u[:, : m.rank] * s[: m.rank]) @ vt[: m.rank], atol=1e-5 * s[0])
                np.testing.assert_allclose(np.linalg.norm(a, axis=1), 3**-0.5, rtol=1e-5)
                np.testing.assert_array_equal(ask.frozen[n].dense(), -start)
            assert ask.blocks == state.open_task.blocks


def test_the_first_start_is_fresh_and_common() -> None:
    asks = ask_all(opened())
    for n, m in LAYOUT.modules.items():
        a = asks["a"].arrays[f"A:{n}"]
        assert 0 < np.abs(a).max() <= m.inp**-0.5
        for ask in asks.values():
            assert ask.plan is not None
            assert ask.arrays[f"A:{n}"].tobytes() == a[: ask.plan.rank].tobytes()
            assert not ask.arrays[f"B:{n}"].any()


def test_the_next_start_is_not_what_was_trained() -> None:
    """A start knows the last increment only: after two rounds it is no approximation of the sum."""
    state = play(play(opened(), 1).closed.state, 2, t=2).closed.state
    ask = ask_all(state, t=3)["a"]
    assert ask.frozen is not None
    for n, x in learnt(state).items():
        u, s, vt = np.linalg.svd(x)
        best = (u[:, :3] * s[:3]) @ vt[:3]
        assert np.linalg.norm(-ask.frozen[n].dense() - best) > 0.1 * np.linalg.norm(best)


def test_a_round_without_learning_leaves_a_start_that_can_learn() -> None:
    state = play(opened(), 1).closed.state
    quiet = play(state, 2, t=2, noise=0.0).closed
    assert quiet.report["update_norm"] == 0.0
    assert quiet.report["aggregation_error"] == 0.0
    for n, x in learnt(quiet.state).items():
        np.testing.assert_allclose(x, learnt(state)[n], atol=1e-6)
    for ask in ask_all(quiet.state, t=3).values():
        for n in LAYOUT.modules:
            assert (np.linalg.norm(ask.arrays[f"A:{n}"], axis=1) > 0.1).all()
            assert not ask.arrays[f"B:{n}"].any()


def test_the_sum_of_rounds_outgrows_the_rank_of_the_pair_from_the_third_on() -> None:
    """Round 2 starts from all of round 1's increment, so the two together are one pair of rank R."""
    who = [Member(id=c, rank=1, scale=1.0) for c in "ab"]
    state, ranks = opened(who), []
    for t in (1, 2, 3):
        state = play(state, t, who, t).closed.state
        ranks.append(int(np.linalg.matrix_rank(learnt(state)["v"], tol=1e-4)))
    assert ranks == [1, 1, 3]


def test_changes_of_small_clients_are_diluted_by_those_who_did_not_train_them() -> None:
    """Two clients of equal weight change B alike; only one of them has row 2."""
    who = [Member(id="a", rank=2, scale=1.0), Member(id="b", rank=1, scale=1.0)]
    protocol = METHOD.protocol(opened(who), cohort(who, 1, SETTINGS))
    asks = next(protocol)
    a0 = asks["a"].arrays["A:q"].astype(np.float64)
    ones = {
        c: Answer(examples=5, arrays={k: np.full(x.shape, k[0] == "B", np.float32) for k, x in ask.arrays.items()})
        for c, ask in asks.items()
    }
    with pytest.raises(StopIteration) as done:
        protocol.send(ones)
    np.testing.assert_allclose(
        learnt(done.value.value.state)["q"], np.outer(np.ones(9), a0[0] + a0[1] / 2), rtol=1e-4, atol=1e-6
    )


def test_max_rank_and_max_error_bound_the_sum() -> None:
    for bound in ({"max_rank": 2}, {"max_error": 0.2}):
        config, sizes = SETTINGS.model_copy(update=bound), []
        state = opened(config=config)
        for t in range(1, 5):
            before = learnt(state) if t > 1 else {n: np.zeros((m.out, m.inp)) for n, m in LAYOUT.modules.items()}
            played = play(state, t, t=t, config=config)
            state, report = played.closed.state, played.closed.report
            off = size({n: x - before[n] - played.increment[n] for n, x in learnt(state).items()})
            assert report["truncation_error"] == pytest.approx(off, rel=1e-4)
            assert len(state.open_task.blocks) == 1
            sizes.append(report["rank"])
            assert report["truncation_error_relative"] <= bound.get("max_error", 1.0)
        assert max(sizes) <= bound.get("max_rank", 7)
    both = SETTINGS.model_copy(update={"max_error": 0.001, "max_rank": 1})
    with pytest.raises(MethodError, match=r"method.max_error = 0.001 needs rank \d in ., and method.max_rank allows 1"):
        play(opened(), 1, config=both)


def test_the_start_is_of_the_own_increment_whatever_the_server_adds() -> None:
    """Under a server optimiser the blocks take its step; the warm start stays that of the mean."""
    state = opened()
    shared = {f.name: getattr(state, f.name) for f in fields(GlobalState)}
    doubled = Stepped(**shared, step=lambda update, lost: (update.scaled(2.0), lost))
    plain, stepped = play(state, 1).closed, play(doubled, 1).closed
    for n, x in learnt(plain.state).items():
        np.testing.assert_allclose(learnt(stepped.state)[n], 2 * x, atol=1e-5)
    assert all(
        x.tobytes() == stepped.state.memory["frlora"][key].tobytes() for key, x in plain.state.memory["frlora"].items()
    )


def test_the_plan_asks_for_changes_of_the_leading_rows() -> None:
    for m in WHO:
        ask = ask_all(opened())[m.id]
        assert ask.plan is not None
        assert (ask.plan.rank, ask.plan.rows, ask.plan.scale) == (m.rank, m.rank, m.scale)
        assert (ask.plan.train, ask.plan.send, ask.plan.changes) == (("A", "B"), ("A", "B"), ("A", "B"))
        assert (ask.plan.a_from, ask.plan.b_from) == ("given", "given")


def test_the_task_rank_caps_the_clients_and_those_who_come_late() -> None:
    who = (*WHO, Member(id="late", rank=6, scale=1.0))
    config = SETTINGS.model_copy(update={"task_rank": 2})
    capped = ask_all(opened(config=config), who, config=config)
    assert {c: a.plan.rank for c, a in capped.items() if a.plan} == {"a": 2, "b": 1, "c": 2, "late": 2}
    assert {c: a.plan.rank for c, a in ask_all(opened(), who).items() if a.plan} == {"a": 3, "b": 1, "c": 2, "late": 3}


def test_embeddings_are_refused_by_name() -> None:
    layout = Layout(modules={"q": Module(out=7, inp=5), "tok": Module(out=4, inp=60, kind="embedding")})
    with pytest.raises(MethodError, match="frlora: tok is an embedding"):
        METHOD.open("base", layout, WHO, SETTINGS, 0)


def test_a_state_of_another_method_is_refused() -> None:
    flora = FLORA.open("base", LAYOUT, WHO, MethodConfig(name="flora"), 0)
    with pytest.raises(MethodError, match="frlora: this state remembers no pair to start from"):
        ask_all(flora)
