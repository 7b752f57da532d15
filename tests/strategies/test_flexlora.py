"""FlexLoRA against its formula, written out densely: SVD of the dense mean, truncated and rescaled for each client."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from fedlora.adapter import Adapter
from fedlora.config import MethodConfig
from fedlora.errors import MethodError
from fedlora.state import Answer, Ask, GlobalState, Layout, LocalTraining, Module
from strategies.base import Closed, Cohort, Member
from strategies.flexlora import METHOD
from strategies.flora import METHOD as FLORA

Dense = dict[str, NDArray[np.float64]]

SETTINGS = MethodConfig(name="flexlora")
WHOLE = SETTINGS.model_copy(update={"max_rank": 99})
TRAINING = LocalTraining(learning_rate=1e-3, local_steps=1, local_epochs=None, batch_size=1)
LAYOUT = Layout(modules={"q": Module(out=7, inp=6), "v": Module(out=6, inp=12)})
WHO = (Member(id="a", rank=3, scale=0.5), Member(id="b", rank=1, scale=4.0), Member(id="c", rank=2, scale=2.0))


def ask_all(
    state: GlobalState, who: Sequence[Member] = WHO, t: int = 1, config: MethodConfig = SETTINGS
) -> Mapping[str, Ask]:
    return next(METHOD.protocol(state, cohort(who, t, config)))


def cohort(who: Sequence[Member], t: int, config: MethodConfig) -> Cohort:
    return Cohort(
        round=t, rounds=9, members=tuple(who), settings=config, training=TRAINING, seed=0, progress=(0.0, 1.0)
    )


def close(
    state: GlobalState,
    answers: Mapping[str, Answer],
    who: Sequence[Member] = WHO,
    t: int = 1,
    config: MethodConfig = SETTINGS,
) -> Closed:
    protocol = METHOD.protocol(state, cohort(who, t, config))
    next(protocol)
    with pytest.raises(StopIteration) as done:
        protocol.send(answers)
    closed: Closed = done.value.value
    return closed


def random_answers(who: Sequence[Member], seed: int) -> tuple[dict[str, Answer], Dense]:
    """Whole factors from everybody, and the dense mean of their products."""
    rng, answers = np.random.default_rng(seed), {}
    mean = {n: np.zeros((m.out, m.inp)) for n, m in LAYOUT.modules.items()}
    counts = {m.id: int(rng.integers(1, 50)) for m in who}
    for k in who:
        arrays: dict[str, NDArray[np.float32]] = {}
        for n, m in LAYOUT.modules.items():
            a = rng.normal(size=(k.rank, m.inp)).astype(np.float32)
            b = rng.normal(size=(m.out, k.rank)).astype(np.float32)
            arrays |= {f"A:{n}": a, f"B:{n}": b}
            mean[n] += counts[k.id] / sum(counts.values()) * k.scale * (b.astype(np.float64) @ a.astype(np.float64))
        answers[k.id] = Answer(examples=counts[k.id], arrays=arrays)
    return answers, mean


def best(x: NDArray[np.float64], rank: int) -> NDArray[np.float64]:
    u, s, vt = np.linalg.svd(x, full_matrices=False)
    return np.asarray((u[:, :rank] * s[:rank]) @ vt[:rank])


def tail(x: Dense, rank: int) -> float:
    return float(np.sqrt(sum(np.sum(np.linalg.svd(v, compute_uv=False)[rank:] ** 2) for v in x.values())))


def size(x: Dense) -> float:
    return tail(x, 0)


def learnt(state: GlobalState) -> Dense:
    return {n: f.dense() for n, f in state.update().items()}


def started(ask: Ask, name: str) -> NDArray[np.float64]:
    assert ask.plan is not None
    b, a = ask.arrays[f"B:{name}"].astype(np.float64), ask.arrays[f"A:{name}"].astype(np.float64)
    return ask.plan.scale * (b @ a)


def opened(who: Sequence[Member] = WHO, config: MethodConfig = SETTINGS) -> GlobalState:
    return METHOD.open("base", LAYOUT, who, config, 0)


@settings(deadline=None, max_examples=30)
@given(
    ranks=st.lists(st.integers(1, 5), min_size=1, max_size=5),
    scales=st.lists(st.floats(0.1, 9.0), min_size=5, max_size=5),
    seed=st.integers(0, 2**31),
)
def test_state_and_starts_are_the_truncated_svd_of_the_dense_mean(
    ranks: list[int], scales: list[float], seed: int
) -> None:
    who = [Member(id=f"c{i}", rank=r, scale=scales[i]) for i, r in enumerate(ranks)]
    answers, mean = random_answers(who, seed)
    closed, top, whole = close(opened(who), answers, who), max(ranks), size(mean)
    for n, x in learnt(closed.state).items():
        np.testing.assert_allclose(x, best(mean[n], top), atol=1e-5 * whole)
    assert closed.report["truncation_error"] == pytest.approx(tail(mean, top), rel=1e-5, abs=1e-6 * whole)
    assert closed.report["truncation_error_relative"] == pytest.approx(tail(mean, top) / whole, rel=1e-5, abs=1e-6)
    assert closed.report["rank"] == top
    for m, ask in zip(who, ask_all(closed.state, who, 2).values(), strict=True):
        assert ask.plan is not None
        assert ask.plan.scale == m.scale
        for n, x in mean.items():
            np.testing.assert_allclose(started(ask, n), best(x, m.rank), atol=1e-5 * whole)
            gram = ask.arrays[f"A:{n}"] @ ask.arrays[f"A:{n}"].T  # V^T: orthonormal, S is all in B
            np.testing.assert_allclose(gram, np.eye(m.rank), atol=1e-4)
    echo = {m.id: answers[m.id] for m in who}
    again = close(closed.state, echo, who, 2).report
    counts = np.array([answers[m.id].examples for m in who])
    unseen = np.array([tail(learnt(closed.state), m.rank) for m in who])
    assert again["truncated_down"] == pytest.approx(
        float(counts @ unseen / counts.sum() / size(learnt(closed.state))), rel=1e-4, abs=1e-6
    )


def test_the_update_is_absolute_and_its_norm_is_that_of_the_change() -> None:
    first, _ = random_answers(WHO, 1)
    second, mean = random_answers(WHO, 2)
    state = close(opened(), first).state
    closed = close(state, second, t=2)
    old, new = learnt(state), learnt(closed.state)
    for n, x in new.items():
        np.testing.assert_allclose(x, best(mean[n], 3), atol=1e-5 * size(mean))
    assert closed.report["update_norm"] == pytest.approx(size({n: new[n] - x for n, x in old.items()}), rel=1e-5)


def test_a_client_that_trains_alone_loses_nothing() -> None:
    alone = WHO[:1]
    answers, mean = random_answers(alone, 3)
    closed = close(opened(alone), answers, alone)
    for n, x in learnt(closed.state).items():
        np.testing.assert_allclose(x, mean[n], atol=1e-6 * size(mean))
    assert closed.report["truncation_error"] < 1e-6 * size(mean)
    assert closed.report["truncated_down"] == 0.0


def test_the_bound_of_the_state_is_no_bound_of_training() -> None:
    """With the whole mean in the state, enrolled clients start from the same products; more is kept and released."""
    answers, mean = random_answers(WHO, 4)
    short, whole = close(opened(), answers), close(opened(config=WHOLE), answers, config=WHOLE)
    for n, x in learnt(whole.state).items():
        np.testing.assert_allclose(x, mean[n], atol=1e-6 * size(mean))
    assert whole.report["truncation_error"] < 1e-6 * size(mean)
    assert (short.report["rank"], whole.report["rank"]) == (3.0, 6.0)
    starts = ask_all(short.state, t=2), ask_all(whole.state, t=2, config=WHOLE)
    for m in WHO:
        for n in LAYOUT.modules:
            np.testing.assert_allclose(started(starts[0][m.id], n), started(starts[1][m.id], n), atol=1e-4)


def test_max_rank_and_max_error_cut_as_they_do_elsewhere() -> None:
    answers, mean = random_answers(WHO, 5)
    two = SETTINGS.model_copy(update={"max_rank": 2})
    closed = close(opened(), answers, config=two)
    off = size({n: mean[n] - x for n, x in learnt(closed.state).items()})
    assert closed.report["rank"] == 2.0
    assert tail(mean, 2) * (1 - 1e-6) <= off <= closed.report["truncation_error"] * (1 + 1e-6) < 2 * off
    loose = SETTINGS.model_copy(update={"max_error": 0.3})
    closed = close(opened(), answers, config=loose)
    off = size({n: mean[n] - x for n, x in learnt(closed.state).items()})
    assert closed.report["truncation_error"] == pytest.approx(off, rel=1e-5)
    assert 0.0 < closed.report["truncation_error_relative"] == pytest.approx(off / size(mean), rel=1e-5)
    assert closed.report["truncation_error_relative"] <= 0.3
    tight = SETTINGS.model_copy(update={"max_error": 0.01, "max_rank": 1})
    with pytest.raises(MethodError, match=r"method.max_error = 0.01 needs rank \d in ., and method.max_rank allows 1"):
        close(opened(), answers, config=tight)


def test_modules_that_an_error_bound_cut_away_start_fresh() -> None:
    answers, _ = random_answers(WHO, 6)
    faint = {
        c: Answer(examples=a.examples, arrays={**a.arrays, "B:q": a.arrays["B:q"] * np.float32(1e-3)})
        for c, a in answers.items()
    }
    config = SETTINGS.model_copy(update={"max_error": 0.1})
    closed = close(opened(), faint, config=config)
    pair = closed.state.open_task.pair
    assert pair is not None
    assert pair["q"].rank == 0
    for m in WHO:
        ask = ask_all(closed.state, t=2, config=config)[m.id]
        assert ask.arrays["A:q"].shape == (m.rank, 6)
        assert ask.arrays["A:q"].any(axis=1).all()
        assert not ask.arrays["B:q"].any()
        assert ask.arrays["B:v"].any()


def test_clients_of_a_round_share_fresh_rows() -> None:
    asks = ask_all(opened())
    later = ask_all(opened(), t=2)
    for n, m in LAYOUT.modules.items():
        a = asks["a"].arrays[f"A:{n}"]
        assert 0 < np.abs(a).max() <= m.inp**-0.5
        assert asks["c"].arrays[f"A:{n}"].tobytes() == a[:2].tobytes()
        assert asks["b"].arrays[f"A:{n}"].tobytes() == a[:1].tobytes()
        assert not np.array_equal(later["a"].arrays[f"A:{n}"], a)
        for ask in asks.values():
            assert not ask.arrays[f"B:{n}"].any()


def test_directions_that_the_mean_lacks_start_fresh_and_the_state_keeps_its_rank() -> None:
    """A round of one client of rank 1: the next largest client still has three directions to train."""
    small = WHO[1:2]
    answers, mean = random_answers(small, 7)
    state = close(opened(), answers, small).state
    asks = ask_all(state, t=2)
    for n, x in mean.items():
        a, b = asks["a"].arrays[f"A:{n}"], asks["a"].arrays[f"B:{n}"]
        np.testing.assert_allclose(np.linalg.norm(a[0]), 1.0, rtol=1e-5)
        assert (np.linalg.norm(a[1:], axis=1) > 0.1).all()
        assert not b[:, 1:].any()
        np.testing.assert_allclose(started(asks["a"], n), x, atol=1e-5 * size(mean))
    answers, mean = random_answers(WHO, 8)
    closed = close(state, answers, t=2)
    assert closed.report["rank"] == 3.0
    for n, x in learnt(closed.state).items():
        np.testing.assert_allclose(x, best(mean[n], 3), atol=1e-5 * size(mean))


def test_a_client_larger_than_all_that_were_enrolled_trains_all_of_its_rank() -> None:
    answers, mean = random_answers(WHO, 9)
    state = close(opened(), answers).state
    ask = ask_all(state, [Member(id="late", rank=5, scale=3.0)], 2)["late"]
    assert ask.plan is not None
    assert (ask.plan.rank, ask.plan.rows) == (5, 5)
    for n, x in mean.items():
        np.testing.assert_allclose(started(ask, n), best(x, 3), atol=1e-5 * size(mean))
        assert ask.arrays[f"A:{n}"].shape == (5, x.shape[1])
        assert (np.linalg.norm(ask.arrays[f"A:{n}"], axis=1) > 0.1).all()


def test_no_clients_factors_can_be_read_in_the_state() -> None:
    answers, _ = random_answers(WHO, 10)
    pair: Adapter | None = close(opened(), answers).state.open_task.pair
    assert pair is not None
    for n, f in pair.items():
        gram = f.a @ f.a.T
        np.testing.assert_allclose(gram, np.diag(np.diag(gram)), atol=1e-4 * gram[0, 0])
        assert (np.diff(np.diag(gram)) < 0).all()
        assert {f.a.dtype, f.b.dtype} == {np.dtype(np.float32)}
        assert f.scale == 1.0
        for answer in answers.values():
            for row in answer.arrays[f"A:{n}"]:
                assert np.abs(f.a @ row / np.linalg.norm(f.a, axis=1) / np.linalg.norm(row)).max() < 0.999


def test_whole_factors_are_asked_for() -> None:
    for m in WHO:
        ask = ask_all(opened())[m.id]
        assert ask.plan is not None
        assert ask.frozen is None
        assert (ask.plan.rank, ask.plan.rows, ask.plan.scale) == (m.rank, m.rank, m.scale)
        assert (ask.plan.train, ask.plan.send, ask.plan.changes) == (("A", "B"), ("A", "B"), ())
        assert (ask.plan.a_from, ask.plan.b_from, ask.plan.feedback) == ("given", "given", "product")


def test_embeddings_are_refused_by_name() -> None:
    layout = Layout(modules={"q": Module(out=7, inp=5), "tok": Module(out=4, inp=60, kind="embedding")})
    with pytest.raises(MethodError, match="flexlora: tok is an embedding"):
        METHOD.open("base", layout, WHO, SETTINGS, 0)


def test_a_state_of_another_method_is_refused() -> None:
    flora = FLORA.open("base", LAYOUT, WHO, MethodConfig(name="flora"), 0)
    with pytest.raises(MethodError, match="flexlora: this state keeps no pair"):
        ask_all(flora)
