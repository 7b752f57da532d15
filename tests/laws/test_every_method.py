"""The laws of `strategies/base.py`, for every method that is registered. A new method inherits them.

Clients are a stand-in that follows its TrainPlan to the letter in numpy: it builds the start, moves what the plan
trains by seeded noise, and answers. Oracles are dense and in float64.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

import strategies as every_method
from fedlora.adapter import Adapter, Array, Factors
from fedlora.config import MethodConfig
from fedlora.errors import MethodError
from fedlora.rng import public_normal, public_orthonormal, stream
from fedlora.state import Answer, Ask, Block, GlobalState, Layout, LocalTraining, Module, Task, expected_shapes, part
from strategies.base import METHODS, Closed, Cohort, Member, get

Dense = dict[str, NDArray[np.float64]]

CASES = [
    *(MethodConfig(name=name) for name in sorted(METHODS) if name != "hetlora"),
    MethodConfig(name="hetlora", prune=1.0),  # a pruned client asks for less than its rank, see its own tests
    MethodConfig(name="fed-sb", basis="random"),
    MethodConfig(name="flora", warm_start=True),
]
CASES = [c for c in CASES if not METHODS[c.name].personal]  # those have no common W_eff: laws of their own
LINEAR = {"fed-sb", "fedsvd", "ffa-lora", "rolora"}  # one task scale, changes of leading columns, padded
EXACT = [c for c in CASES if c.name in LINEAR | {"flora", "fedex-lora"}]  # W_eff moves by the mean of clients' moves
ANY_RANKS = [c for c in CASES if c in EXACT or c.name in {"frlora", "lora-fair"}]  # an echo at any ranks is silent
TRAINING = LocalTraining(learning_rate=1e-3, local_steps=1, local_epochs=None, batch_size=1)
LAYOUT = Layout(
    modules={
        "tall": Module(out=11, inp=6),
        "square": Module(out=8, inp=8),
        "wide": Module(out=5, inp=9, kind="conv1d"),
        "hidden-is-rank": Module(out=4, inp=4),
    },
    head={"score.weight": (3, 8), "score.bias": (3,)},
)


def ids(case: MethodConfig) -> str:
    return case.name + (" warm" if case.warm_start else "") + (f" {case.basis}" if case.basis else "")


every = pytest.mark.parametrize("case", CASES, ids=ids)


def dense(adapter: Adapter | None, layout: Layout) -> Dense:
    if adapter is None:
        return {n: np.zeros((m.out, m.inp)) for n, m in layout.modules.items()}
    return {n: f.scale * (f.b.astype(np.float64) @ f.a.astype(np.float64)) for n, f in adapter.items()}


def add(left: Dense, right: Dense, weight: float = 1.0) -> Dense:
    return {n: x + weight * right[n] for n, x in left.items()}


def size(x: Dense) -> float:
    return float(np.sqrt(sum(np.sum(v**2) for v in x.values())))


def w_eff(state: GlobalState) -> Dense:
    return dense(state.update(), state.layout)


def close_to(got: Dense, want: Dense, tolerance: float = 1e-6) -> None:
    off, whole = size(add(got, want, -1.0)), size(want)
    assert off <= tolerance * max(whole, 1e-3), f"off by {off / max(whole, 1e-3):.2e} of {whole:.3g}"


@dataclass(frozen=True)
class Trained:
    """What one client did: W_eff - W0 as it saw it before and after, and what it said."""

    before: Dense
    after: Dense
    answer: Answer


def follow(ask: Ask, layout: Layout, examples: int, noise: float, seed: int | None = None) -> Trained:
    """Do what the plan says, in numpy; the noise is the client's own, or everybody's if `seed` is given."""
    plan = ask.plan
    assert plan is not None
    rng = stream(plan.seed if seed is None else seed, "stand-in")
    start: dict[str, Array] = {f"head:{n}": x for n, x in part(ask.arrays, "head").items()}
    for key, x in ask.arrays.items():
        if key.startswith("R:"):
            assert plan.core
            assert x.shape == (plan.rows, plan.rows)
            start[key] = x
    for name, m in sorted(layout.modules.items()):
        fresh = rng.uniform(-1, 1, (plan.rows, m.inp)).astype(np.float32)
        if plan.a_from == "public":
            a = public_orthonormal(plan.a_seed, "basis", name, rows=plan.rows, cols=m.inp).astype(np.float32)
            probe = a @ public_normal(plan.a_seed, "probe", name, shape=(m.inp,))
            np.testing.assert_allclose(ask.arrays[f"probe:{name}"], probe, atol=1e-5)
        else:
            a = ask.arrays[f"A:{name}"] if plan.a_from == "given" else fresh
        start[f"A:{name}"] = a
        if plan.b_from == "public":
            b = public_orthonormal(plan.a_seed, "basis-b", name, rows=plan.rows, cols=m.out).astype(np.float32).T
        else:
            b = ask.arrays[f"B:{name}"] if plan.b_from == "given" else np.zeros((m.out, plan.rows), np.float32)
        start[f"B:{name}"] = b
        assert start[f"A:{name}"].shape == (plan.rows, m.inp)
        assert start[f"B:{name}"].shape == (m.out, plan.rows)

    trained = {key: x.copy() for key, x in start.items()}
    sent: dict[str, Array] = {}
    for key, x in trained.items():
        of = key.split(":")[0]
        rows = slice(plan.rank) if of in "AR" else slice(None)
        columns = slice(plan.rank) if of in "BR" else slice(None)
        first = (rows, columns)[: x.ndim]
        if of in plan.train:
            x[first] += np.float32(noise) * rng.standard_normal(x[first].shape, np.float32)
        if of in plan.send:
            sent[key] = x[first] - start[key][first] if of in plan.changes else x[first]
    assert {key: x.shape for key, x in sent.items()} == expected_shapes(plan, layout)

    under = dense(ask.frozen, layout)
    for block in ask.blocks:
        under = add(under, dense(block.adapter, layout))

    def seen(arrays: Mapping[str, Array]) -> Dense:
        cores = {n: arrays[f"R:{n}"] if plan.core else np.eye(plan.rows) for n in layout.modules}
        pair = {n: Factors(arrays[f"A:{n}"], arrays[f"B:{n}"] @ cores[n], plan.scale) for n in layout.modules}
        return add(under, dense(Adapter(pair), layout))

    return Trained(before=seen(start), after=seen(trained), answer=Answer(examples=examples, arrays=sent))


def members(ranks: Sequence[int], scales: Sequence[float] | None = None) -> tuple[Member, ...]:
    return tuple(Member(id=f"c{i}", rank=r, scale=scales[i] if scales else 2.0) for i, r in enumerate(ranks))


def cohort(case: MethodConfig, who: Sequence[Member], round_: int = 1) -> Cohort:
    return Cohort(
        round=round_, rounds=9, members=tuple(who), settings=case, training=TRAINING, seed=7, progress=(0.0, 1.0)
    )


def opened(case: MethodConfig, who: Sequence[Member], layout: Layout = LAYOUT) -> GlobalState:
    return get(case.name).open("base", layout, who, case, 7)


Arrival = Callable[[dict[str, Answer]], Mapping[str, Answer]]


def round_of(
    state: GlobalState,
    group: Cohort,
    *,
    noise: float = 0.1,
    examples: Mapping[str, int] | None = None,
    same: int | None = None,
    arrival: Arrival = lambda answers: answers,
) -> tuple[Closed, dict[str, Trained]]:
    """One round of stand-ins; `arrival` may drop or reorder what the server receives."""
    protocol = get(group.settings.name).protocol(state, group)
    asks = next(protocol)
    assert sorted(asks) == [m.id for m in group.members]
    trained = {
        client: follow(ask, state.layout, (examples or {}).get(client, 1 + i), noise, same)
        for i, (client, ask) in enumerate(asks.items())
    }
    with pytest.raises(StopIteration) as done:
        protocol.send(arrival({client: t.answer for client, t in trained.items()}))
    closed: Closed = done.value.value
    assert closed.state.version == state.version + 1
    assert all(np.isfinite(x) for x in closed.report.values()), closed.report
    return closed, trained


def learnt(case: MethodConfig, who: Sequence[Member], layout: Layout = LAYOUT) -> GlobalState:
    """A state after two noisy rounds, so that laws are not tested on zeros."""
    state = opened(case, who, layout)
    for t in (1, 2):
        state = round_of(state, cohort(case, who, t))[0].state
    assert size(w_eff(state)) > 0.01
    return state


def every_byte(state: GlobalState) -> list[tuple[str, bytes]]:
    found: list[tuple[str, Array]] = []
    for t in state.tasks.values():
        adapters = [b.adapter for b in t.blocks] + ([t.pair] if t.pair is not None else [])
        found += [(f"{t.name}/{i}/{n}/{s}", x) for i, ad in enumerate(adapters) for n, f in ad.items()
                  for s, x in (("a", f.a), ("b", f.b))]  # fmt: skip
        found += [(f"{t.name}/{n}", x) for n, x in t.extras.items()]
    found += [(f"{owner}/{n}", x) for owner, arrays in state.memory.items() for n, x in arrays.items()]
    return [(name, x.tobytes()) for name, x in found]


def test_all_are_registered() -> None:
    assert {"fedit", "ffa-lora", "flora"} <= METHODS.keys()
    assert len(every_method.__all__) == len(METHODS)


@every
@settings(deadline=None, max_examples=10)
@given(order=st.permutations(range(4)))
def test_the_order_of_arrival_changes_no_byte(case: MethodConfig, order: list[int]) -> None:
    who = members([4, 2, 3, 1])
    state, group = learnt(case, who), cohort(case, who, 3)
    plain = round_of(state, group)[0]
    shuffled = round_of(state, group, arrival=lambda a: {f"c{i}": a[f"c{i}"] for i in order})[0]
    assert every_byte(plain.state) == every_byte(shuffled.state)
    assert plain.report == shuffled.report


@every
@pytest.mark.parametrize("scale", [2.0, 0.7])
def test_clients_that_agree_give_what_they_agree_on(case: MethodConfig, scale: float) -> None:
    """At one rank, with the same factors from all, W_eff is what each of them had after training."""
    who = members([3] * 4, [scale] * 4)
    closed, trained = round_of(learnt(case, who), cohort(case, who, 3), same=5)
    for t in trained.values():
        close_to(w_eff(closed.state), t.after)


@every
def test_clients_start_from_the_state(case: MethodConfig) -> None:
    """At equal ranks every client's W_eff before training is the server's."""
    who = members([3] * 3, [0.3, 2.0, 1.1] if case.name not in LINEAR else None)
    state = learnt(case, who)
    for t in round_of(state, cohort(case, who, 3))[1].values():
        close_to(t.before, w_eff(state))


@every
def test_an_untrained_echo_changes_nothing(case: MethodConfig) -> None:
    who = members([3] * 4, [2.0, 0.5, 1.7, 3.0])
    state = learnt(case, who)
    closed, _ = round_of(state, cohort(case, who, 3), noise=0.0)
    close_to(w_eff(closed.state), w_eff(state))
    for name, x in closed.state.open_task.extras.items():
        assert x.tobytes() == state.open_task.extras[name].tobytes()


@pytest.mark.parametrize("case", ANY_RANKS, ids=ids)
def test_an_untrained_echo_changes_nothing_at_any_ranks(case: MethodConfig) -> None:
    who = members([4, 1, 3, 2], [2.0, 0.5, 1.7, 3.0])
    state = learnt(case, who)
    closed, trained = round_of(state, cohort(case, who, 3), noise=0.0)
    close_to(w_eff(closed.state), w_eff(state))
    for t in trained.values():
        close_to(t.before, w_eff(state))


@pytest.mark.parametrize("case", [c for c in CASES if c not in ANY_RANKS], ids=ids)
def test_methods_that_truncate_say_what_an_echo_loses(case: MethodConfig) -> None:
    who = members([4, 1, 3, 2])
    state = learnt(case, who)
    before = w_eff(state)
    closed, trained = round_of(state, cohort(case, who, 3), noise=0.0)
    assert size(add(w_eff(closed.state), before, -1.0)) > 1e-3 * size(before)
    lost = [size(add(t.before, before, -1.0)) / size(before) for t in trained.values()]
    weights = np.arange(1, 5) / 10
    assert closed.report["truncated_down"] == pytest.approx(float(weights @ lost), rel=1e-5)


@every
def test_nobody_is_refused(case: MethodConfig) -> None:
    who = members([2, 1])
    protocol = get(case.name).protocol(opened(case, who), cohort(case, who, 3))
    next(protocol)
    with pytest.raises(MethodError, match=r"no client answered in round 3 \(asked: 2\)"):
        protocol.send({})


@every
def test_no_enrolled_client_is_refused(case: MethodConfig) -> None:
    with pytest.raises(MethodError, match=f"{case.name}: no client is enrolled"):
        opened(case, [])


@every
def test_weights_are_over_those_who_answered(case: MethodConfig) -> None:
    who = members([4, 2, 3, 1, 4])
    state, here = learnt(case, who), ("c0", "c2", "c3")
    examples = {m.id: 3 + 5 * i for i, m in enumerate(who)}
    some = round_of(state, cohort(case, who, 3), examples=examples, arrival=lambda a: {c: a[c] for c in here})[0]
    only = round_of(state, cohort(case, [m for m in who if m.id in here], 3), examples=examples)[0]
    assert every_byte(some.state) == every_byte(only.state)
    assert some.report == only.report


@every
def test_weights_are_shares(case: MethodConfig) -> None:
    """Ten times all examples is the same round; another share is not."""
    who = members([3, 3])
    state, group = learnt(case, who), cohort(case, who, 3)
    one = w_eff(round_of(state, group, examples={"c0": 1, "c1": 3})[0].state)
    ten = w_eff(round_of(state, group, examples={"c0": 10, "c1": 30})[0].state)
    other = w_eff(round_of(state, group, examples={"c0": 3, "c1": 1})[0].state)
    close_to(ten, one)
    if case.name == "hetlora":  # weighs by the norms of the products, and the head alone by examples
        close_to(other, one)
    else:
        assert size(add(other, one, -1.0)) > 1e-3 * size(one)


@every
def test_the_head_moves_by_the_weighted_mean_of_changes(case: MethodConfig) -> None:
    who = members([2, 1, 3])
    state = learnt(case, who)
    closed, trained = round_of(state, cohort(case, who, 3), examples={"c0": 1, "c1": 2, "c2": 7})
    for name, x in state.open_task.extras.items():
        change = sum(w * trained[c].answer.arrays[f"head:{name}"] for c, w in (("c0", 0.1), ("c1", 0.2), ("c2", 0.7)))
        np.testing.assert_allclose(closed.state.open_task.extras[name], x + change, rtol=1e-5, atol=1e-7)


@every
def test_a_new_head_is_small_and_public(case: MethodConfig) -> None:
    first, second = (opened(case, members(r)).open_task.extras for r in ([2, 1], [4]))
    assert {n: x.shape for n, x in first.items()} == LAYOUT.head
    assert 0.005 < float(np.std(first["score.weight"])) < 0.04
    assert not first["score.bias"].any()
    assert all(first[n].tobytes() == second[n].tobytes() for n in first)


@every
def test_earlier_tasks_are_the_same_bytes_and_every_client_trains_on_them(case: MethodConfig) -> None:
    who = members([3, 2])
    state = learnt(case, who)
    old = Adapter({n: Factors(np.ones((1, m.inp)), np.ones((m.out, 1))) for n, m in LAYOUT.modules.items()})
    done = Task(name="old", blocks=(Block(adapter=old, born=1),), extras={"score.bias": np.ones(3)}, sealed=True)
    state = replace(state, tasks={"old": done, **state.tasks})
    kept = [x for x in every_byte(state) if x[0].startswith("old/")]
    assert len(kept) == 2 * len(LAYOUT.modules) + 1
    closed, trained = round_of(state, cohort(case, who, 3))
    assert [x for x in every_byte(closed.state) if x[0].startswith("old/")] == kept
    if case in ANY_RANKS:
        for t in trained.values():
            close_to(t.before, w_eff(state))


@every
def test_the_next_client_has_other_noise(case: MethodConfig) -> None:
    """Plans carry another seed for each client and round, and the schedule's place as it was given."""
    who = members([2, 2])
    state, seen = opened(case, who), set()
    for t in (1, 2):
        for ask in next(get(case.name).protocol(state, cohort(case, who, t))).values():
            assert ask.plan is not None
            seen.add(ask.plan.seed)
            assert (ask.plan.training, ask.plan.progress, ask.plan.method) == (TRAINING, (0.0, 1.0), case.name)
    assert len(seen) == 4


@st.composite
def federations(draw: st.DrawFn) -> tuple[Layout, tuple[Member, ...], list[int]]:
    """Random shapes (one square, one as narrow as the largest rank), ranks, scales and examples."""
    ranks = draw(st.lists(st.integers(1, 5), min_size=1, max_size=5))
    top = max(ranks)
    side = st.integers(top, 12)
    modules = {
        "any": Module(out=draw(side), inp=draw(side)),
        "square": Module(out=(n := draw(side)), inp=n),
        "hidden-is-rank": Module(out=top, inp=top),
    }
    scales = draw(st.lists(st.floats(0.05, 20.0), min_size=len(ranks), max_size=len(ranks)))
    examples = draw(st.lists(st.integers(1, 1000), min_size=len(ranks), max_size=len(ranks)))
    return Layout(modules=modules), members(ranks, scales), examples


@pytest.mark.parametrize("case", EXACT, ids=ids)
@settings(deadline=None, max_examples=30)
@given(federation=federations())
def test_exact_methods_equal_a_dense_oracle(
    case: MethodConfig, federation: tuple[Layout, tuple[Member, ...], list[int]]
) -> None:
    """W_eff after three rounds is the running sum of p_k times each client's own move, formed densely in float64.

    The scale is the largest client's where the pair's basis is common, else the client's own s_k.
    """
    layout, who, counts = federation
    examples = {m.id: n for m, n in zip(who, counts, strict=True)}
    state, want = opened(case, who, layout), dense(None, layout)
    task_scale = min(who, key=lambda m: (-m.rank, m.id)).scale
    for t in (1, 2, 3):
        group = cohort(case, who, t)
        asks = next(get(case.name).protocol(state, group))
        for m in who:
            plan = asks[m.id].plan
            assert plan is not None
            assert plan.scale == (task_scale if case.name in LINEAR else m.scale)
            assert plan.rank == m.rank
        closed, trained = round_of(state, group, examples=examples)
        for m in who:
            move = add(trained[m.id].after, trained[m.id].before, -1.0)
            want = add(want, move, examples[m.id] / sum(counts))
        state = closed.state
        close_to(w_eff(state), want)
