"""FedIT against its formula, written out densely."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from fedlora.config import MethodConfig
from fedlora.state import Answer, Ask, GlobalState, Layout, LocalTraining, Module
from strategies.base import Closed, Cohort, Member
from strategies.fedit import METHOD

SETTINGS = MethodConfig(name="fedit")
TRAINING = LocalTraining(learning_rate=1e-3, local_steps=1, local_epochs=None, batch_size=1)
LAYOUT = Layout(modules={"q": Module(out=7, inp=5), "v": Module(out=4, inp=6)})


def one_round(
    who: list[Member], seed: int, state: GlobalState | None = None
) -> tuple[Closed, dict[str, Ask], dict[str, Answer]]:
    """Answers here hold what clients ended with; what they send is what they changed."""
    cohort = Cohort(
        round=1, rounds=1, members=tuple(who), settings=SETTINGS, training=TRAINING, seed=0, progress=(0.0, 1.0)
    )
    protocol = METHOD.protocol(state or METHOD.open("base", LAYOUT, who, SETTINGS, 0), cohort)
    asks = dict(next(protocol))
    rng = np.random.default_rng(seed)
    trained = {
        m.id: Answer(
            examples=int(rng.integers(1, 50)),
            arrays={k: rng.normal(size=x.shape).astype(np.float32) for k, x in asks[m.id].arrays.items()},
        )
        for m in who
    }
    sent = {c: replace(t, arrays={k: x - asks[c].arrays[k] for k, x in t.arrays.items()}) for c, t in trained.items()}
    with pytest.raises(StopIteration) as done:
        protocol.send(sent)
    return done.value.value, asks, trained


def pad(x: NDArray[np.floating], shape: tuple[int, int]) -> NDArray[np.float64]:
    return np.pad(x.astype(np.float64), [(0, n - m) for n, m in zip(shape, x.shape, strict=True)])


@settings(deadline=None, max_examples=25)
@given(
    ranks=st.lists(st.integers(1, 4), min_size=1, max_size=5),
    scales=st.lists(st.floats(0.1, 9.0), min_size=5, max_size=5),
    seed=st.integers(0, 2**31),
)
def test_means_and_their_error_equal_the_formula(ranks: list[int], scales: list[float], seed: int) -> None:
    """In the second round, so that the start, of which only changes are sent, is not zero."""
    who = [Member(id=f"c{i}", rank=r, scale=scales[i]) for i, r in enumerate(ranks)]
    closed, _, answers = one_round(who, seed, one_round(who, seed + 1)[0].state)
    total, top = sum(a.examples for a in answers.values()), max(ranks)
    off = whole = 0.0
    for name, m in LAYOUT.modules.items():
        mean_a, mean_b, exact = np.zeros((top, m.inp)), np.zeros((m.out, top)), np.zeros((m.out, m.inp))
        for k in who:
            p, arrays = answers[k.id].examples / total, answers[k.id].arrays
            mean_a += p * pad(arrays[f"A:{name}"], mean_a.shape)
            mean_b += p * k.scale * pad(arrays[f"B:{name}"], mean_b.shape)
            exact += p * k.scale * arrays[f"B:{name}"].astype(np.float64) @ arrays[f"A:{name}"].astype(np.float64)
        off += float(np.sum((exact - mean_b @ mean_a) ** 2))
        whole += float(np.sum(exact**2))
        pair = closed.state.update()[name]
        np.testing.assert_allclose(pair.dense(), mean_b @ mean_a, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(closed.state.open_task.pair[name].a, mean_a, rtol=1e-6, atol=1e-6)  # type: ignore[index]
    assert closed.report["aggregation_error"] == pytest.approx((off / whole) ** 0.5, rel=1e-5, abs=1e-6)


def test_one_client_has_no_aggregation_error() -> None:
    closed, _, _ = one_round([Member(id="a", rank=3, scale=2.0)], 1)
    assert closed.report["aggregation_error"] < 1e-14


def test_what_travels_up_are_changes_of_both_factors() -> None:
    who = [Member(id="a", rank=3, scale=2.0), Member(id="b", rank=2, scale=0.5)]
    for ask in one_round(who, 0)[1].values():
        assert ask.plan is not None
        assert ask.plan.train == ask.plan.send == ask.plan.changes == ("A", "B")
        assert (ask.plan.a_from, ask.plan.b_from) == ("given", "given")


def test_a_client_that_was_not_asked_the_same_start_is_added_to_its_own() -> None:
    """Ranks and scales all differ, nobody trains: the mean is that of the padded starts, not of one of them."""
    who = [Member(id=c, rank=r, scale=s) for c, r, s in (("a", 1, 4.0), ("b", 3, 0.5), ("c", 3, 2.0))]
    state = one_round(who, 3)[0].state
    before = state.open_task.pair
    assert before is not None
    cohort = Cohort(
        round=2, rounds=2, members=tuple(who), settings=SETTINGS, training=TRAINING, seed=0, progress=(0.0, 1.0)
    )
    protocol = METHOD.protocol(state, cohort)
    echo = {
        c: Answer(examples=1, arrays={k: np.zeros_like(x) for k, x in a.arrays.items()})
        for c, a in next(protocol).items()
    }
    with pytest.raises(StopIteration) as done:
        protocol.send(echo)
    after = done.value.value.state.open_task.pair
    share = np.array([1.0, 2 / 3, 2 / 3])
    for name, f in before.items():
        np.testing.assert_allclose(after[name].a, share[:, None] * f.a, rtol=1e-6)
        np.testing.assert_allclose(after[name].b, share * f.b, rtol=1e-6)


def test_independent_factors_err_as_theory_says() -> None:
    """Three equal clients with independent factors: E ||error||^2 / E ||mean||^2 = 1 - 1/K = 2/3, up to sampling."""
    layout_error = [one_round([Member(id=c, rank=4, scale=1.0) for c in "abc"], s)[0] for s in range(30)]
    mean = np.mean([c.report["aggregation_error"] for c in layout_error])
    assert 0.7 < mean < 0.95


def test_everybody_starts_from_one_small_a_and_a_zero_b() -> None:
    who = [Member(id="a", rank=3, scale=2.0), Member(id="b", rank=2, scale=2.0)]
    _, asks, _ = one_round(who, 0)
    for name, m in LAYOUT.modules.items():
        a = asks["a"].arrays[f"A:{name}"]
        assert a.shape == (3, m.inp)
        assert 0 < np.abs(a).max() <= m.inp**-0.5
        assert asks["b"].arrays[f"A:{name}"].tobytes() == a[:2].tobytes()
        assert not asks["a"].arrays[f"B:{name}"].any()


def test_embeddings_start_the_other_way_round() -> None:
    layout = Layout(modules={"embed": Module(out=3, inp=9, kind="embedding")})
    pair = METHOD.open("base", layout, [Member(id="a", rank=2, scale=1.0)], SETTINGS, 0).open_task.pair
    assert pair is not None
    assert not pair["embed"].a.any()
    assert pair["embed"].b.all()


def test_the_task_rank_caps_the_clients() -> None:
    who = [Member(id="a", rank=4, scale=2.0), Member(id="b", rank=1, scale=2.0)]
    state = METHOD.open("base", LAYOUT, who, SETTINGS.model_copy(update={"task_rank": 2}), 0)
    cohort = Cohort(
        round=1, rounds=1, members=tuple(who), settings=SETTINGS, training=TRAINING, seed=0, progress=(0.0, 1.0)
    )
    asks = next(METHOD.protocol(state, cohort))
    assert {c: (a.plan.rank, a.plan.rows) for c, a in asks.items() if a.plan} == {"a": (2, 2), "b": (1, 1)}
