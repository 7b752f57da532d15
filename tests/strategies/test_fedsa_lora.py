"""FedSA-LoRA: its own laws, for it has no common W_eff. Stand-ins keep what the plan leaves to them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedlora.adapter import Adapter, Array, Factors
from fedlora.config import MethodConfig
from fedlora.errors import MethodError
from fedlora.rng import stream
from fedlora.state import (
    Answer,
    Ask,
    Block,
    GlobalState,
    Header,
    Layout,
    LocalTraining,
    Module,
    PersonalPair,
    Task,
    expected_shapes,
)
from fedlora.training.start import personal_pair, start
from strategies.base import Closed, Cohort, Member
from strategies.fedsa_lora import METHOD, NAME
from strategies.flora import METHOD as FLORA

SETTINGS = MethodConfig(name="fedsa-lora")
TRAINING = LocalTraining(learning_rate=1e-3, local_steps=1, local_epochs=None, batch_size=1)
LAYOUT = Layout(
    modules={"q": Module(out=7, inp=5), "v": Module(out=4, inp=6), "c": Module(out=5, inp=5, kind="conv1d")},
    head={"score.weight": (2, 4), "score.bias": (2,)},
)
Kept = dict[str, dict[str, Array]]


def members(ranks: Sequence[int]) -> tuple[Member, ...]:
    return tuple(Member(id=f"c{i}", rank=r, scale=0.5 + i) for i, r in enumerate(ranks))


def cohort(who: Sequence[Member], t: int = 1) -> Cohort:
    return Cohort(
        round=t, rounds=9, members=tuple(who), settings=SETTINGS, training=TRAINING, seed=7, progress=(0.0, 1.0)
    )


def opened(who: Sequence[Member]) -> GlobalState:
    return METHOD.open("base", LAYOUT, who, SETTINGS, 7)


def header(client: str, t: int) -> Header:
    return Header(run="r", round=t, client=client, kind="train")


def follow(ask: Ask, client: str, t: int, kept: dict[str, Array], noise: float, examples: int) -> Answer:
    """Do what the plan says: start from what was kept, move what is trained, keep what stays, send the rest."""
    plan = ask.plan
    assert plan is not None
    begun = start(ask, plan, header(client, t), LAYOUT, kept)
    arrays: dict[str, Array] = {f"A:{n}": x for n, x in begun.a.items()}
    arrays |= {f"B:{n}": x for n, x in begun.b.items()} | {f"head:{n}": x for n, x in begun.head.items()}
    rng = stream(plan.seed, "stand-in")
    trained = {k: x + np.float32(noise) * rng.standard_normal(x.shape, np.float32) for k, x in arrays.items()}
    kept.clear()
    kept.update({k: x for k, x in trained.items() if k.split(":")[0] in plan.keep})
    sent = {k: x - arrays[k] for k, x in trained.items() if k.split(":")[0] in plan.send}
    assert set(plan.send) == set(plan.changes)
    assert {k: x.shape for k, x in sent.items()} == expected_shapes(plan, LAYOUT)
    return Answer(examples=examples, arrays=sent)


def round_of(
    state: GlobalState,
    group: Cohort,
    kept: Kept,
    *,
    noise: float = 0.1,
    examples: Mapping[str, int] | None = None,
    here: Sequence[str] | None = None,
) -> tuple[Closed, dict[str, Ask], dict[str, Answer]]:
    """One round; those `here` answer, in that order (everybody, in the order of ids)."""
    protocol = METHOD.protocol(state, group)
    asks = dict(next(protocol))
    assert sorted(asks) == [m.id for m in group.members]
    answers = {
        c: follow(asks[c], c, group.round, kept.setdefault(c, {}), noise, (examples or {}).get(c, 1 + int(c[1:])))
        for c in here or sorted(asks)
    }
    with pytest.raises(StopIteration) as done:
        protocol.send(answers)
    closed: Closed = done.value.value
    assert closed.state.version == state.version + 1
    return closed, asks, answers


def learnt(who: Sequence[Member]) -> tuple[GlobalState, Kept]:
    state, kept = opened(who), Kept()
    for t in (1, 2):
        state = round_of(state, cohort(who, t), kept)[0].state
    return state, kept


def copied(kept: Kept) -> Kept:
    return {c: dict(arrays) for c, arrays in kept.items()}


def every_byte(state: GlobalState) -> list[bytes]:
    pair = state.open_task.pair
    assert pair is not None
    arrays = [x for f in pair.values() for x in (f.a, f.b)] + list(state.open_task.extras.values())
    return [x.tobytes() for x in arrays]


def shared_a(state: GlobalState) -> dict[str, np.ndarray]:
    assert state.open_task.pair is not None
    return {n: f.a.astype(np.float64) for n, f in state.open_task.pair.items()}


@settings(deadline=None, max_examples=8)
@given(order=st.permutations(range(4)))
def test_the_order_of_arrival_changes_no_byte(order: list[int]) -> None:
    who = members([4, 2, 3, 1])
    state, kept = learnt(who)
    plain = round_of(state, cohort(who, 3), copied(kept))[0]
    shuffled = round_of(state, cohort(who, 3), copied(kept), here=[f"c{i}" for i in order])[0]
    assert every_byte(plain.state) == every_byte(shuffled.state)
    assert plain.report == shuffled.report


def test_a_moves_by_the_padded_mean_of_those_who_answered() -> None:
    who = members([4, 2, 3, 1])
    state, kept = learnt(who)
    examples = {"c0": 1, "c1": 2, "c3": 7}
    closed, _, answers = round_of(state, cohort(who, 3), kept, examples=examples, here=["c0", "c1", "c3"])
    size = 0.0
    for n, x in shared_a(state).items():
        change = np.zeros_like(x)
        for c, w in (("c0", 0.1), ("c1", 0.2), ("c3", 0.7)):
            sent = answers[c].arrays[f"A:{n}"].astype(float)
            change[: len(sent)] += w * sent
        np.testing.assert_allclose(shared_a(closed.state)[n], x + change, rtol=1e-6, atol=1e-7)
        size += float(np.sum(change**2))
    assert closed.report["update_norm"] == pytest.approx(size**0.5, rel=1e-6)
    assert closed.report["rank"] == 4.0


def test_weights_are_shares_of_those_who_answered() -> None:
    who = members([4, 2, 3, 1, 4])
    state, kept = learnt(who)
    here, examples = ["c0", "c2", "c3"], {m.id: 3 + 5 * i for i, m in enumerate(who)}
    some = round_of(state, cohort(who, 3), copied(kept), examples=examples, here=here)[0]
    only = round_of(state, cohort([m for m in who if m.id in here], 3), copied(kept), examples=examples)[0]
    assert every_byte(some.state) == every_byte(only.state)
    tenfold = {c: 10 * n for c, n in examples.items()}
    ten = round_of(state, cohort(who, 3), copied(kept), examples=tenfold, here=here)[0]
    other = round_of(state, cohort(who, 3), copied(kept), examples={**examples, "c0": 999}, here=here)[0]
    for n, x in shared_a(some.state).items():
        np.testing.assert_allclose(shared_a(ten.state)[n], x, atol=1e-7)
        assert np.abs(shared_a(other.state)[n] - x).max() > 1e-3


def test_an_untrained_echo_leaves_as_bytes_at_any_ranks() -> None:
    who = members([4, 1, 3, 2])
    state, kept = learnt(who)
    closed, _, _ = round_of(state, cohort(who, 3), kept, noise=0.0)
    assert every_byte(closed.state) == every_byte(state)
    assert closed.report["update_norm"] == 0.0


def test_nothing_of_b_or_the_head_is_asked_for_or_held_by_the_server() -> None:
    who = members([4, 2])
    state, kept = opened(who), Kept()
    for t in (1, 2, 3):
        closed, asks, answers = round_of(state, cohort(who, t), kept)
        for c, ask in asks.items():
            plan = ask.plan
            assert plan is not None
            assert (plan.train, plan.send, plan.keep) == (("A", "B", "head"), ("A",), ("B", "head"))
            assert (plan.a_from, plan.b_from) == ("given", "zero")
            assert plan.rank == plan.rows == {"c0": 4, "c1": 2}[c]
            assert {k.split(":")[0] for k in ask.arrays} == {"A", "head"}
            assert {k.split(":")[0] for k in answers[c].arrays} == {"A"}
        state = closed.state
        assert state.open_task.pair is not None
        assert not any(f.b.any() for f in state.open_task.pair.values())
        for n, x in opened(who).open_task.extras.items():
            assert state.open_task.extras[n].tobytes() == x.tobytes()
        assert state.memory == {}
    assert METHOD.personal


def test_without_a_head_only_b_is_kept() -> None:
    who = members([2])
    state = METHOD.open("base", Layout(modules=LAYOUT.modules), who, SETTINGS, 7)
    (ask,) = next(METHOD.protocol(state, cohort(who))).values()
    assert ask.plan is not None
    assert (ask.plan.train, ask.plan.send, ask.plan.keep) == (("A", "B"), ("A",), ("B",))


def test_everybody_trains_its_own_model_from_round_to_round() -> None:
    """W_k before round 3 is s_k times its own B of round 2 beside the first r_k rows of A: nobody else's."""
    who = members([3, 3, 1])
    state, kept = learnt(who)
    assert METHOD.evaluation is not None
    seen = []
    for m in who:
        ask = METHOD.evaluation(state, m)
        assert ask.personal == PersonalPair(rank=m.rank, scale=m.scale)
        assert ask.plan is None
        pair, head = personal_pair(ask, header(m.id, 3), LAYOUT, kept[m.id])
        for n, f in pair.items():
            want = m.scale * kept[m.id][f"B:{n}"].astype(float) @ shared_a(state)[n][: m.rank]
            np.testing.assert_allclose(f.dense(), want, rtol=1e-5, atol=1e-6)
        for n, x in head.items():
            assert x.tobytes() == kept[m.id][f"head:{n}"].tobytes()
        _, asks, _ = round_of(state, cohort(who, 3), copied(kept), noise=0.0)
        plan = asks[m.id].plan
        assert plan is not None
        begun = start(asks[m.id], plan, header(m.id, 3), LAYOUT, kept[m.id])
        for n, f in pair.items():
            assert plan.scale == f.scale
            assert begun.b[n].tobytes() == f.b.tobytes()
            assert begun.a[n].tobytes() == f.a.tobytes()
        seen.append(pair["q"].dense())
    assert np.abs(seen[0] - seen[1]).max() > 0.01


def test_a_newcomer_adds_nothing_and_begins_with_the_public_head() -> None:
    who = members([3, 3])
    state, _ = learnt(who)
    assert METHOD.evaluation is not None
    pair, head = personal_pair(METHOD.evaluation(state, who[0]), header("c9", 3), LAYOUT, {})
    assert not any(f.dense().any() for f in pair.values())
    assert all(x.tobytes() == state.open_task.extras[n].tobytes() for n, x in head.items())


def test_what_a_run_hands_out_is_the_shared_a() -> None:
    state, _ = learnt(members([3, 2]))
    for n, f in METHOD.released(state).items():
        assert f.rank == 3
        assert not f.dense().any()
        np.testing.assert_array_equal(f.a, shared_a(state)[n])


def test_earlier_tasks_are_the_same_bytes_and_every_client_trains_on_them() -> None:
    who = members([3, 2])
    state, kept = learnt(who)
    old = Adapter({n: Factors(np.ones((1, m.inp)), np.ones((m.out, 1))) for n, m in LAYOUT.modules.items()})
    done = Task(name="old", blocks=(Block(adapter=old, born=1),), extras={"score.bias": np.ones(2)}, sealed=True)
    state = replace(state, tasks={"old": done, **state.tasks})
    closed, asks, _ = round_of(state, cohort(who, 3), kept)
    assert closed.state.tasks["old"] is done
    assert METHOD.evaluation is not None
    for ask in (*asks.values(), METHOD.evaluation(state, who[0])):
        assert [b.adapter for b in ask.blocks] == [old]


def test_a_new_a_is_small_the_same_for_all_and_capped() -> None:
    state = opened(members([4, 2]))
    for n, m in LAYOUT.modules.items():
        a = shared_a(state)[n]
        assert a.shape == (4, m.inp)
        assert 0 < np.abs(a).max() <= m.inp**-0.5
    capped = METHOD.open("base", LAYOUT, members([4, 1]), SETTINGS.model_copy(update={"task_rank": 2}), 7)
    asks = next(METHOD.protocol(capped, cohort(members([4, 1]))))
    assert {c: (a.plan.rank, a.plan.rows, a.plan.scale) for c, a in asks.items() if a.plan} == {
        "c0": (2, 2, 0.5), "c1": (1, 1, 1.5),
    }  # fmt: skip
    assert METHOD.evaluation is not None
    assert METHOD.evaluation(capped, members([4, 1])[0]).personal == PersonalPair(rank=2, scale=0.5)


def test_plans_carry_another_seed_for_each_client_and_round() -> None:
    who = members([2, 2])
    plans = [a.plan for t in (1, 2) for a in next(METHOD.protocol(opened(who), cohort(who, t))).values()]
    assert len({p.seed for p in plans if p}) == 4
    assert {(p.method, p.training, p.progress) for p in plans if p} == {(NAME, TRAINING, (0.0, 1.0))}


def test_what_cannot_work_is_refused_by_name() -> None:
    who = members([2, 1])
    protocol = METHOD.protocol(opened(who), cohort(who, 3))
    next(protocol)
    with pytest.raises(MethodError, match=r"no client answered in round 3 \(asked: 2\)"):
        protocol.send({})
    with pytest.raises(MethodError, match="fedsa-lora: no client is enrolled"):
        opened([])
    with pytest.raises(MethodError, match="fedsa-lora: this state keeps no pair"):
        next(METHOD.protocol(FLORA.open("base", LAYOUT, who, MethodConfig(name="flora"), 0), cohort(who)))
    layout = Layout(modules={"q": Module(out=7, inp=5), "tok": Module(out=4, inp=60, kind="embedding")})
    with pytest.raises(MethodError, match="fedsa-lora: tok is an embedding, where A is the factor that starts at zero"):
        METHOD.open("base", layout, who, SETTINGS, 0)
