"""HetLoRA against its formula, written out densely; and who prunes, when, and for how long."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from fedlora.adapter import Array
from fedlora.config import MethodConfig
from fedlora.state import Answer, Ask, GlobalState, Layout, LocalTraining, Module, expected_shapes
from fedlora.wire import decode_state, encode_state
from strategies.base import Closed, Cohort, Member, play
from strategies.hetlora import METHOD, NAME, tail_of

SETTINGS = MethodConfig(name="hetlora")
TRAINING = LocalTraining(learning_rate=1e-3, local_steps=1, local_epochs=None, batch_size=1)
LAYOUT = Layout(modules={"q": Module(out=7, inp=5), "v": Module(out=4, inp=6)}, head={"score.weight": (2, 4)})
WHO = (Member(id="a", rank=4, scale=2.0), Member(id="b", rank=3, scale=0.5), Member(id="c", rank=1, scale=2.0))
Change = Callable[[str, str, Array | None, tuple[int, ...]], Array]  # client, key, its start, its shape


def cohort(t: int, who: Sequence[Member] = WHO, settings: MethodConfig = SETTINGS) -> Cohort:
    return Cohort(
        round=t, rounds=9, members=tuple(who), settings=settings, training=TRAINING, seed=5, progress=(0.0, 1.0)
    )


def opened(who: Sequence[Member] = WHO, settings: MethodConfig = SETTINGS) -> GlobalState:
    return METHOD.open("base", LAYOUT, who, settings, 0)


def one_round(
    state: GlobalState,
    t: int,
    change: Change,
    who: Sequence[Member] = WHO,
    settings: MethodConfig = SETTINGS,
    examples: Mapping[str, int] | None = None,
) -> tuple[Closed, dict[str, Ask], dict[str, Answer]]:
    asks: dict[str, Ask] = {}
    answers: dict[str, Answer] = {}

    def answer(client: str, ask: Ask) -> Answer:
        assert ask.plan is not None
        shapes = expected_shapes(ask.plan, LAYOUT)
        arrays = {k: change(client, k, ask.arrays.get(k), s).astype(np.float32) for k, s in shapes.items()}
        asks[client] = ask
        answers[client] = Answer(examples=(examples or {}).get(client, 5), arrays=arrays)
        return answers[client]

    return play(METHOD.protocol(state, cohort(t, who, settings)), answer), asks, answers


def noise(seed: int) -> Change:
    rng = np.random.default_rng(seed)
    return lambda client, key, start, shape: rng.normal(size=shape)


def silence(client: str, key: str, start: Array | None, shape: tuple[int, ...]) -> Array:
    return np.zeros(shape)


def tails(factors: Mapping[str, float]) -> Change:
    """Everybody's last row of A and column of B becomes `factors[client]` times what it was; nothing else moves."""

    def change(client: str, key: str, start: Array | None, shape: tuple[int, ...]) -> Array:
        out = np.zeros(shape)
        if key[0] in "AB" and start is not None:
            at = np.s_[-1:] if key[0] == "A" else np.s_[:, -1:]
            out[at] = (factors.get(client, 1.0) - 1.0) * start[at]
        return out

    return change


def pad(x: NDArray[np.floating], shape: tuple[int, int]) -> NDArray[np.float64]:
    return np.pad(x.astype(np.float64), [(0, n - m) for n, m in zip(shape, x.shape, strict=True)])


@settings(deadline=None, max_examples=25)
@given(
    ranks=st.lists(st.integers(1, 4), min_size=1, max_size=5),
    scales=st.lists(st.floats(0.1, 9.0), min_size=5, max_size=5),
    seed=st.integers(0, 2**31),
)
def test_means_weights_and_errors_equal_the_formula(ranks: list[int], scales: list[float], seed: int) -> None:
    never = SETTINGS.model_copy(update={"prune": 1.0})
    who = [Member(id=f"c{i}", rank=r, scale=scales[i]) for i, r in enumerate(ranks)]
    state = one_round(opened(who, never), 1, noise(seed), who, never)[0].state
    before, top = state.update(), max(ranks)
    examples = {m.id: 1 + 3 * i for i, m in enumerate(who)}
    closed, asks, answers = one_round(state, 2, noise(seed + 1), who, never, examples)
    trained = {
        m.id: {k: asks[m.id].arrays[k].astype(float) + x for k, x in answers[m.id].arrays.items() if k[0] in "AB"}
        for m in who
    }
    products = {
        m.id: {n: m.scale * trained[m.id][f"B:{n}"] @ trained[m.id][f"A:{n}"] for n in LAYOUT.modules} for m in who
    }
    norms = {c: sum(float(np.sum(x**2)) for x in by_name.values()) ** 0.5 for c, by_name in products.items()}
    weights = {c: x / sum(norms.values()) for c, x in norms.items()}
    off = whole = 0.0
    lost = {m.id: 0.0 for m in who}
    for name, m in LAYOUT.modules.items():
        mean_a, mean_b = np.zeros((top, m.inp)), np.zeros((m.out, top))
        exact = sum((weights[k.id] * products[k.id][name] for k in who), np.zeros((m.out, m.inp)))
        for k in who:
            start_a, start_b = asks[k.id].arrays[f"A:{name}"], asks[k.id].arrays[f"B:{name}"]
            assert start_a.shape == (k.rank, m.inp)
            lost[k.id] += float(np.sum((before[name].dense() - k.scale * start_b.astype(float) @ start_a) ** 2))
            mean_a += weights[k.id] * pad(trained[k.id][f"A:{name}"], mean_a.shape)
            mean_b += weights[k.id] * k.scale * pad(trained[k.id][f"B:{name}"], mean_b.shape)
        off += float(np.sum((exact - mean_b @ mean_a) ** 2))
        whole += float(np.sum(exact**2))
        got = closed.state.update()[name].dense()
        np.testing.assert_allclose(got, mean_b @ mean_a, atol=1e-5 * max(1.0, float(np.linalg.norm(got))))
    assert closed.report["aggregation_error"] == pytest.approx((off / whole) ** 0.5, rel=1e-4, abs=1e-6)
    size = sum(float(np.sum(f.dense() ** 2)) for f in before.values()) ** 0.5
    down = sum(examples[c] * x**0.5 / size for c, x in lost.items()) / sum(examples.values())
    assert closed.report["truncated_down"] == pytest.approx(down, rel=1e-4, abs=1e-5)
    assert {c: facts["weight"] for c, facts in closed.clients.items()} == pytest.approx(weights, rel=1e-5)
    assert {c: facts["rank"] for c, facts in closed.clients.items()} == {m.id: float(m.rank) for m in who}
    assert closed.report["pruned"] == 0.0


def test_a_client_that_moved_ten_times_as_far_counts_ten_times() -> None:
    who = [Member(id="a", rank=2, scale=1.0), Member(id="b", rank=2, scale=10.0)]
    shapes = {"A:q": (2, 5), "B:q": (7, 2), "A:v": (2, 6), "B:v": (4, 2), "head:score.weight": (2, 4)}
    rng = np.random.default_rng(3)
    same = {k: rng.normal(size=shape) for k, shape in shapes.items()}
    for examples in ({"a": 1, "b": 1}, {"a": 1000, "b": 1}):
        closed, _, _ = one_round(
            opened(who),
            1,
            lambda client, key, start, shape: same[key] - (0.0 if key[0] == "h" or start is None else start),
            who,
            examples=examples,
        )
        assert closed.clients["b"]["weight"] == pytest.approx(10 / 11)
        for n, f in closed.state.update().items():
            want = (1 / 11 + 10 / 11 * 10) * same[f"B:{n}"] @ same[f"A:{n}"]
            np.testing.assert_allclose(f.dense(), want, rtol=1e-4, atol=1e-4)


def test_the_head_is_weighed_by_examples() -> None:
    value = {"a": 1.0, "b": 3.0, "c": -2.0}
    state = opened()
    closed, _, _ = one_round(
        state,
        1,
        lambda client, key, start, shape: np.full(shape, value[client]),
        examples={"a": 1, "b": 2, "c": 7},
    )
    change = closed.state.open_task.extras["score.weight"] - state.open_task.extras["score.weight"]
    np.testing.assert_allclose(change, 0.1 * 1 + 0.2 * 3 - 0.7 * 2, rtol=1e-5)


def test_where_nobody_has_a_product_the_pair_stays() -> None:
    """A moves alone beside a B of zero: there is no norm to weigh by."""
    state = opened()
    closed, _, _ = one_round(
        state, 1, lambda client, key, start, shape: np.ones(shape) if key[0] in "Ah" else np.zeros(shape)
    )
    assert closed.state.open_task.pair is not None
    assert state.open_task.pair is not None
    assert closed.state.open_task.pair.digest == state.open_task.pair.digest
    assert (closed.report["update_norm"], closed.report["aggregation_error"]) == (0.0, 0.0)
    assert {facts["weight"] for facts in closed.clients.values()} == {0.0}
    np.testing.assert_allclose(
        closed.state.open_task.extras["score.weight"] - state.open_task.extras["score.weight"], 1.0, rtol=1e-5
    )


@pytest.mark.parametrize(
    ("prune", "tails_by_rank"),
    [
        (None, {1: 0, 2: 1, 16: 1, 99: 1, 100: 1, 101: 2, 200: 2}),
        (0.5, {1: 0, 2: 1, 3: 2, 8: 4, 9: 5}),
        (0.7, {10: 3, 20: 6}),
        (0.29, {100: 71}),  # 0.29 * 100 is a little less than 29 in floating point
        (0.01, {1: 0, 2: 1, 8: 7}),
        (1.0, {1: 0, 2: 0, 100: 0}),
    ],
)
def test_the_tail_is_what_lies_beyond_the_share(prune: float | None, tails_by_rank: dict[int, int]) -> None:
    cut = SETTINGS.model_copy(update={"prune": prune})
    assert {r: tail_of(r, cut) for r in tails_by_rank} == tails_by_rank


def test_the_plan_presses_the_tail() -> None:
    for change, tail, penalty in (
        ({}, {"a": 1, "b": 1, "c": 0}, {"a": 5e-3, "b": 5e-3, "c": 0.0}),
        ({"prune": 0.5, "prune_penalty": 0.1}, {"a": 2, "b": 2, "c": 0}, {"a": 0.1, "b": 0.1, "c": 0.0}),
        ({"prune_penalty": 0.0}, {"a": 1, "b": 1, "c": 0}, {"a": 0.0, "b": 0.0, "c": 0.0}),
        ({"prune": 1.0}, {"a": 0, "b": 0, "c": 0}, {"a": 0.0, "b": 0.0, "c": 0.0}),
    ):
        cut = SETTINGS.model_copy(update=change)
        plans = {c: ask.plan for c, ask in next(METHOD.protocol(opened(), cohort(1, settings=cut))).items()}
        assert {c: p.tail for c, p in plans.items() if p} == tail
        assert {c: p.tail_penalty for c, p in plans.items() if p} == penalty
        for plan in plans.values():
            assert plan is not None
            assert (plan.train, plan.send, plan.changes) == ((("A", "B", "head"),) * 3)


def learnt() -> GlobalState:
    """A state with something in every row, and nobody pruned."""
    return one_round(opened(), 1, noise(1))[0].state


def ranks_asked(state: GlobalState, t: int, settings: MethodConfig = SETTINGS) -> dict[str, int]:
    asks = next(METHOD.protocol(state, cohort(t, settings=settings)))
    for ask in asks.values():
        assert ask.plan is not None
        assert ask.plan.rank == ask.plan.rows == ask.arrays["A:q"].shape[0] == ask.arrays["B:q"].shape[1]
    return {c: ask.plan.rank for c, ask in asks.items() if ask.plan}


def test_a_tail_that_starts_at_zero_is_never_pruned() -> None:
    state = opened()
    for change in (silence, noise(2)):
        assert one_round(state, 1, change)[0].report["pruned"] == 0.0
    assert ranks_asked(learnt(), 2) == {"a": 4, "b": 3, "c": 1}


def test_a_client_whose_tail_shrank_is_asked_at_the_smaller_rank_from_then_on() -> None:
    state = learnt()
    closed, _, _ = one_round(state, 2, tails({"a": 0.9, "b": 1.1, "c": 0.1}))
    assert closed.report["pruned"] == 1.0
    assert closed.clients["a"]["rank"] == 4.0
    assert {k: x.tolist() for k, x in closed.state.memory[NAME].items()} == {"a": [3.0]}
    state = decode_state(encode_state(closed.state))
    assert ranks_asked(state, 3) == {"a": 3, "b": 3, "c": 1}
    away, _, _ = one_round(state, 3, noise(4), WHO[1:])
    assert ranks_asked(away.state, 4)["a"] == 3
    closed, _, _ = one_round(state, 3, tails({"a": 0.5, "b": 0.5}))
    assert closed.report["pruned"] == 2.0
    assert ranks_asked(closed.state, 4) == {"a": 2, "b": 2, "c": 1}
    closed, _, _ = one_round(closed.state, 4, tails({"a": 0.5, "b": 2.0}))
    closed, _, _ = one_round(closed.state, 5, tails({"a": 0.5, "b": 0.5}))
    assert ranks_asked(closed.state, 6) == {"a": 1, "b": 1, "c": 1}
    assert ranks_asked(one_round(closed.state, 6, silence)[0].state, 7) == {"a": 1, "b": 1, "c": 1}


def test_what_counts_is_the_product_of_the_tails_norms_over_all_modules() -> None:
    """A grows and B shrinks by as much: no change, no pruning; one module may grow if the others shrink more."""

    def opposite(client: str, key: str, start: Array | None, shape: tuple[int, ...]) -> Array:
        factor = {"A": 2.0, "B": 0.5 if client == "b" else 0.4, "h": 1.0}[key[0]]
        return tails({client: factor})(client, key, start, shape)

    assert list(one_round(learnt(), 2, opposite)[0].state.memory[NAME]) == ["a"]

    def one_module(client: str, key: str, start: Array | None, shape: tuple[int, ...]) -> Array:
        grows = key.endswith(":q") and client == "a"
        return tails({client: 1.01 if grows else 0.5})(client, key, start, shape)

    assert list(one_round(learnt(), 2, one_module)[0].state.memory[NAME]) == ["a", "b"]


def test_an_untouched_tail_and_a_share_of_one_prune_nobody() -> None:
    state = learnt()
    assert one_round(state, 2, silence)[0].state.memory[NAME] == {}
    never = SETTINGS.model_copy(update={"prune": 1.0})
    closed, _, _ = one_round(state, 2, tails({"a": 0.1, "b": 0.1}), settings=never)
    assert (closed.report["pruned"], closed.state.memory[NAME]) == (0.0, {})


def test_the_answer_of_the_round_counts_whole() -> None:
    """Who prunes itself still moves the last row it trained."""
    never = SETTINGS.model_copy(update={"prune": 1.0})
    change = tails({"a": 0.9})
    pruning, plain = one_round(learnt(), 2, change)[0], one_round(learnt(), 2, change, settings=never)[0]
    assert pruning.report["pruned"] == 1.0
    assert pruning.state.update().digest == plain.state.update().digest


def test_the_task_rank_caps_the_clients() -> None:
    capped = SETTINGS.model_copy(update={"task_rank": 2})
    state = opened(settings=capped)
    assert ranks_asked(state, 1, capped) == {"a": 2, "b": 2, "c": 1}
    state = one_round(state, 1, noise(1), settings=capped)[0].state
    closed, _, _ = one_round(state, 2, tails({"a": 0.5}), settings=capped)
    assert {c: facts["rank"] for c, facts in closed.clients.items()} == {"a": 2.0, "b": 2.0, "c": 1.0}
    assert ranks_asked(closed.state, 3, capped) == {"a": 1, "b": 2, "c": 1}
