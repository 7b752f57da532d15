"""Fed-SB: where the bases come from, what travels, and what the core's mean is, against dense float64."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import NDArray

from fedlora.adapter import Adapter, Factors
from fedlora.config import MethodConfig
from fedlora.errors import MethodError
from fedlora.rng import public_orthonormal
from fedlora.state import Answer, Ask, Block, GlobalState, Header, Layout, LocalTraining, Module, expected_shapes, part
from fedlora.training.start import public_pair
from fedlora.wire import decode_state, encode_state
from strategies.base import Closed, Cohort, Member, play
from strategies.fed_sb import METHOD, NAME, with_cores
from strategies.flora import METHOD as FLORA

TRAINING = LocalTraining(learning_rate=1e-3, local_steps=1, local_epochs=None, batch_size=1)
LAYOUT = Layout(
    modules={"q": Module(out=7, inp=9), "v": Module(out=12, inp=6), "tok": Module(out=5, inp=11, kind="embedding")},
    head={"score.weight": (2, 4)},
)
WHO = (Member(id="big", rank=4, scale=2.0), Member(id="mid", rank=3, scale=0.3), Member(id="tiny", rank=1, scale=8.0))
RANDOM, UPDATE = MethodConfig(name="fed-sb", basis="random"), MethodConfig(name="fed-sb")
EXAMPLES = {"big": 1, "mid": 2, "tiny": 7}
Dense = dict[str, NDArray[np.float64]]


def cohort(settings: MethodConfig, t: int, who: Sequence[Member] = WHO) -> Cohort:
    return Cohort(
        round=t, rounds=9, members=tuple(who), settings=settings, training=TRAINING, seed=5, progress=(0.0, 1.0)
    )


def opened(settings: MethodConfig, who: Sequence[Member] = WHO) -> GlobalState:
    return METHOD.open("base", LAYOUT, who, settings, 11)


def one_round(
    state: GlobalState, settings: MethodConfig, t: int, who: Sequence[Member] = WHO, size: float = 1.0
) -> tuple[Closed, Mapping[str, Ask], Mapping[str, Answer]]:
    """A round in which everybody answers random arrays of the planned shapes."""
    rng = np.random.default_rng(100 * t + int(10 * size))
    asks: dict[str, Ask] = {}
    answers: dict[str, Answer] = {}

    def answer(client: str, ask: Ask) -> Answer:
        assert ask.plan is not None
        shapes = expected_shapes(ask.plan, LAYOUT)
        arrays = {k: (size * rng.normal(size=s)).astype(np.float32) for k, s in shapes.items()}
        asks[client], answers[client] = ask, Answer(examples=EXAMPLES[client], arrays=arrays)
        return answers[client]

    return play(METHOD.protocol(state, cohort(settings, t, who)), answer), asks, answers


def dense(adapter: Adapter) -> Dense:
    return {n: f.dense() for n, f in adapter.items()}


def core_of(state: GlobalState) -> tuple[Dense, Dense]:
    memory = state.memory[NAME]
    return tuple({n: x.astype(np.float64) for n, x in part(memory, p).items()} for p in ("B", "R"))  # type: ignore[return-value, arg-type]


def mean_product(answers: Mapping[str, Answer], scale: float) -> Dense:
    total = sum(a.examples for a in answers.values())
    return {
        n: sum(
            (
                a.examples / total * scale * a.arrays[f"B:{n}"].astype(float) @ a.arrays[f"A:{n}"].astype(float)
                for a in answers.values()
            ),
            np.zeros((m.out, m.inp)),
        )
        for n, m in LAYOUT.modules.items()
    }


def test_the_first_round_is_exact_and_its_leading_directions_are_the_bases() -> None:
    closed, asks, answers = one_round(opened(UPDATE), UPDATE, 1)
    for client, ask in asks.items():
        assert ask.plan is not None
        assert {k.split(":")[0] for k in ask.arrays} == {"head"}
        assert (ask.plan.a_from, ask.plan.b_from, ask.plan.core) == ("fresh", "zero", False)
        assert ask.plan.scale == 2.0
        assert ask.plan.rank == ask.plan.rows == {m.id: m.rank for m in WHO}[client]
    want, state = mean_product(answers, 2.0), closed.state
    pair, (b, r) = state.open_task.pair, core_of(state)
    assert pair is not None
    outside = whole = 0.0
    for n, x in want.items():
        np.testing.assert_allclose(state.update()[n].dense(), x, atol=3e-6 * np.linalg.norm(x))
        u, s, vt = np.linalg.svd(x)
        np.testing.assert_allclose(b[n].T @ b[n], np.eye(4), atol=1e-6)
        np.testing.assert_allclose(pair[n].a @ pair[n].a.T, np.eye(4), atol=1e-6)
        np.testing.assert_allclose(np.abs(np.diag(b[n].T @ u[:, :4])), 1.0, atol=1e-5)
        np.testing.assert_allclose(r[n], np.diag(s[:4]) / 2.0, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(pair[n].dense(), u[:, :4] * s[:4] @ vt[:4], atol=1e-5 * s[0])
        rest = state.open_task.blocks[0].adapter[n].dense()
        np.testing.assert_allclose(rest, x - u[:, :4] * s[:4] @ vt[:4], atol=1e-5 * s[0])
        outside, whole = outside + float(np.sum(s[4:] ** 2)), whole + float(np.sum(s**2))
    assert closed.report["outside_bases"] == pytest.approx((outside / whole) ** 0.5, rel=1e-5)
    assert closed.report["update_norm"] == pytest.approx(whole**0.5, rel=1e-6)
    assert closed.report["rank"] == 4 + max(state.open_task.blocks[0].adapter.ranks.values())
    (block,) = state.open_task.blocks
    assert (block.born, block.since) == (state.version, state.version - 1)


def test_a_round_of_small_clients_completes_the_bases_with_silent_directions() -> None:
    """Rank 1 in the first round, cores of rank 4: three directions of each basis are random and their core is zero."""
    closed, _, answers = one_round(opened(UPDATE), UPDATE, 1, [WHO[2]])
    state, want = closed.state, mean_product(answers, 2.0)
    (b, r), pair = core_of(state), closed.state.open_task.pair
    assert pair is not None
    assert state.open_task.blocks == ()
    assert closed.report["outside_bases"] == 0.0
    for n, x in want.items():
        np.testing.assert_allclose(state.update()[n].dense(), x, atol=1e-5 * np.linalg.norm(x))
        np.testing.assert_allclose(b[n].T @ b[n], np.eye(4), atol=1e-6)
        np.testing.assert_allclose(pair[n].a @ pair[n].a.T, np.eye(4), atol=1e-6)
        assert np.count_nonzero(r[n]) == 1
    again = one_round(opened(UPDATE), UPDATE, 1, [WHO[2]])[0].state
    assert encode_state(again) == encode_state(state)


def test_a_first_round_that_learns_nothing_leaves_usable_bases() -> None:
    closed = one_round(opened(UPDATE), UPDATE, 1, size=0.0)[0]
    b, r = core_of(closed.state)
    assert not any(x.any() for x in r.values())
    for x in b.values():
        np.testing.assert_allclose(x.T @ x, np.eye(4), atol=1e-6)
    moved = one_round(closed.state, UPDATE, 2)[0].state
    assert all(np.abs(f.dense()).max() > 0.1 for f in moved.update().values())


@pytest.mark.parametrize("settings", [RANDOM, UPDATE], ids=["random", "update"])
def test_cores_move_by_the_padded_mean_of_their_changes(settings: MethodConfig) -> None:
    """Three rounds of cores: W_eff moves by s B (sum p_k pad(dR_k)) A, and the bases keep their bytes."""
    state = opened(settings)
    if settings is UPDATE:
        state = one_round(state, settings, 1)[0].state
    first = state
    for t in (2, 3, 4):
        before = dense(state.update())
        closed, asks, answers = one_round(state, settings, t)
        size = 0.0
        for n, x in before.items():
            change = np.zeros((4, 4))
            for m in WHO:
                plan = asks[m.id].plan
                assert plan is not None
                assert (plan.core, plan.rank, plan.rows, plan.scale) == (True, m.rank, 4, 2.0)
                assert (plan.train, plan.send, plan.changes) == (("R", "head"),) * 3
                change[: m.rank, : m.rank] += EXAMPLES[m.id] / 10 * answers[m.id].arrays[f"R:{n}"].astype(float)
            pair = state.open_task.pair
            assert pair is not None
            move = 2.0 * core_of(state)[0][n] @ change @ pair[n].a.astype(float)
            got = closed.state.update()[n].dense()
            np.testing.assert_allclose(got, x + move, atol=3e-6 * np.linalg.norm(x + move))
            size += float(np.sum(move**2))
        assert closed.report["update_norm"] == pytest.approx(size**0.5, rel=1e-5)
        state = closed.state
    assert state.open_task.pair is not None
    assert first.open_task.pair is not None
    assert core_of(state)[0].keys() == LAYOUT.modules.keys()
    for n, f in state.open_task.pair.items():
        assert f.a.tobytes() == first.open_task.pair[n].a.tobytes()
        assert state.memory[NAME][f"B:{n}"].tobytes() == first.memory[NAME][f"B:{n}"].tobytes()
    assert [b.adapter.digest for b in state.open_task.blocks] == [b.adapter.digest for b in first.open_task.blocks]


def test_of_random_bases_only_the_core_and_a_checksum_travel() -> None:
    state = opened(RANDOM)
    closed, asks, answers = one_round(state, RANDOM, 1)
    for ask in asks.values():
        assert {k.split(":")[0] for k in ask.arrays} == {"R", "probe", "head"}
        assert ask.plan is not None
        assert (ask.plan.a_from, ask.plan.b_from, ask.plan.a_seed) == ("public", "public", 11)
        assert ask.blocks == ()
        assert ask.frozen is None
    for answer in answers.values():
        assert {k.split(":")[0] for k in answer.arrays} == {"R", "head"}
    assert closed.state.open_task.public_seed == 11
    pair, (b, _) = state.open_task.pair, core_of(state)
    assert pair is not None
    for n, m in LAYOUT.modules.items():
        np.testing.assert_allclose(pair[n].a, public_orthonormal(11, "basis", n, rows=4, cols=m.inp), atol=1e-6)
        np.testing.assert_allclose(b[n], public_orthonormal(11, "basis-b", n, rows=4, cols=m.out).T, atol=1e-6)
        assert not state.update()[n].dense().any()


def test_of_an_updates_bases_everything_travels_each_round() -> None:
    state = one_round(opened(UPDATE), UPDATE, 1)[0].state
    _, asks, _ = one_round(state, UPDATE, 2, WHO[1:])
    for ask in asks.values():
        assert {k.split(":")[0] for k in ask.arrays} == {"A", "B", "R", "head"}
        assert ask.blocks == state.open_task.blocks
        assert ask.plan is not None
        assert (ask.plan.a_from, ask.plan.b_from) == ("given", "given")
        product = {
            n: ask.plan.scale * ask.arrays[f"B:{n}"] @ ask.arrays[f"R:{n}"] @ ask.arrays[f"A:{n}"]
            for n in LAYOUT.modules
        }
        for n, x in dense(state.update()).items():
            np.testing.assert_allclose(product[n] + ask.blocks[0].adapter[n].dense(), x, atol=1e-5)


@pytest.mark.parametrize("settings", [RANDOM, UPDATE], ids=["random", "update"])
def test_what_a_client_evaluates_is_w_eff(settings: MethodConfig) -> None:
    state, header = opened(settings), Header(run="r", round=0, client="big", kind="evaluate")
    assert METHOD.evaluation is not None
    for t in (1, 2, 3):
        ask = METHOD.evaluation(state, WHO[0])
        terms = [b.adapter for b in ask.blocks]
        if settings is RANDOM:
            assert {k.split(":")[0] for k in ask.arrays} == {"R", "probe", "head"}
            terms.append(public_pair(ask, header, LAYOUT))
        else:
            assert {k.split(":")[0] for k in ask.arrays} == {"head"}
            assert (ask.frozen is None) == (t == 1)  # there is no core before the first round
            terms += [ask.frozen] if ask.frozen is not None else []
        for n, x in dense(state.update()).items():
            got = sum((a[n].dense() for a in terms), np.zeros_like(x))
            np.testing.assert_allclose(got, x, atol=1e-5 * max(1.0, float(np.linalg.norm(x))))
        state = one_round(state, settings, t)[0].state


def test_earlier_tasks_blocks_are_evaluated_and_trained_on() -> None:
    old = Adapter({n: Factors(np.ones((1, m.inp)), np.ones((m.out, 1))) for n, m in LAYOUT.modules.items()})
    done = replace(opened(UPDATE).open_task, name="old", pair=None, blocks=(Block(adapter=old, born=1),), sealed=True)
    state = opened(UPDATE)
    task = replace(state.open_task, blocks=(Block(adapter=old.scaled(0.5), born=2),))
    state = replace(state, tasks={"old": done, **state.tasks, task.name: task})
    assert METHOD.evaluation is not None
    for t in (1, 2):
        own = state.open_task.blocks
        assert METHOD.evaluation(state, WHO[0]).blocks == (*done.blocks, *own)
        closed, asks, _ = one_round(state, UPDATE, t)
        assert all(ask.blocks == (*done.blocks, *own) for ask in asks.values())
        assert closed.state.open_task.blocks[: len(own)] == own
        assert len(closed.state.open_task.blocks) == 2
        state = closed.state


@pytest.mark.parametrize("settings", [RANDOM, UPDATE], ids=["random", "update"])
def test_the_state_survives_a_checkpoint(settings: MethodConfig) -> None:
    """Also before the first round, and with a block that has nothing to hold for one of the modules."""
    state = opened(settings)
    for t in (1, 2):
        back = decode_state(encode_state(state))
        assert encode_state(back) == encode_state(state)
        got = one_round(back, settings, t)[0].state
        state = one_round(state, settings, t)[0].state
        assert encode_state(got) == encode_state(state)


def test_the_task_rank_is_the_cores() -> None:
    for settings in (RANDOM, UPDATE):
        capped = settings.model_copy(update={"task_rank": 2})
        state = opened(capped)
        if settings is UPDATE:
            state = one_round(state, capped, 1)[0].state
        _, asks, _ = one_round(state, capped, 2)
        assert {c: (a.plan.rank, a.plan.rows) for c, a in asks.items() if a.plan} == {
            "big": (2, 2), "mid": (2, 2), "tiny": (1, 2),
        }  # fmt: skip


def test_cores_can_be_replaced_and_the_pair_follows() -> None:
    state = one_round(opened(UPDATE), UPDATE, 1)[0].state
    cores = {n: np.full((4, 4), 0.5, np.float32) for n in LAYOUT.modules}
    other = with_cores(state, cores)
    assert other.version == state.version
    assert other.open_task.pair is not None
    for n, f in other.open_task.pair.items():
        want = 2.0 * core_of(state)[0][n] @ cores[n].astype(float) @ f.a.astype(float)
        np.testing.assert_allclose(f.dense(), want, atol=1e-6)
        assert (core_of(other)[1][n] == 0.5).all()


def test_what_cannot_work_is_refused_by_name() -> None:
    for settings in (RANDOM, UPDATE):
        with pytest.raises(MethodError, match=r"fed-sb: rank 6 is above what tok \[5, 11\] can hold"):
            opened(settings.model_copy(update={"task_rank": 6}))
    flora = FLORA.open("base", LAYOUT, WHO, MethodConfig(name="flora"), 0)
    with pytest.raises(MethodError, match="fed-sb: this state keeps no pair"):
        next(METHOD.protocol(flora, cohort(UPDATE, 1)))
    with pytest.raises(MethodError, match="fed-sb: this state has no core; was it opened by another method"):
        next(METHOD.protocol(replace(opened(UPDATE), memory={}), cohort(UPDATE, 1)))
    for settings, t in ((RANDOM, 1), (UPDATE, 1), (UPDATE, 2)):
        state = opened(settings) if t == 1 else one_round(opened(settings), settings, 1)[0].state
        protocol = METHOD.protocol(state, cohort(settings, t))
        next(protocol)
        with pytest.raises(MethodError, match=f"no client answered in round {t}"):
            protocol.send({})
