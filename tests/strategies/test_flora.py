"""FLoRA: what it keeps over many rounds, what recompression loses, and what a broadcast shows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import pytest
from numpy.typing import NDArray

from fedlora.config import MethodConfig
from fedlora.errors import MethodError
from fedlora.state import Answer, Ask, GlobalState, Layout, LocalTraining, Module, expected_shapes
from strategies.base import Closed, Cohort, Member, Round, get, play
from strategies.flora import METHOD

SETTINGS = MethodConfig(name="flora")
TRAINING = LocalTraining(learning_rate=1e-3, local_steps=1, local_epochs=None, batch_size=1)
LAYOUT = Layout(modules={"q": Module(out=7, inp=5), "v": Module(out=6, inp=12)})
WHO = (Member(id="a", rank=3, scale=0.5), Member(id="b", rank=1, scale=4.0), Member(id="c", rank=2, scale=2.0))
Dense = dict[str, NDArray[np.float64]]


def ask_all(
    state: GlobalState, settings: MethodConfig, t: int, who: Sequence[Member] = WHO
) -> tuple[Round, Mapping[str, Ask]]:
    cohort = Cohort(
        round=t, rounds=99, members=tuple(who), settings=settings, training=TRAINING, seed=0, progress=(0.0, 1.0)
    )
    protocol = METHOD.protocol(state, cohort)
    return protocol, next(protocol)


def rounds(settings: MethodConfig, count: int) -> Iterator[tuple[Closed, Dense]]:
    """Rounds in which clients answer random factors; with the dense running sum."""
    state = METHOD.open("base", LAYOUT, WHO, settings, 0)
    want = {n: np.zeros((m.out, m.inp)) for n, m in LAYOUT.modules.items()}
    rng = np.random.default_rng(3)
    for t in range(1, count + 1):
        protocol, _ = ask_all(state, settings, t)
        answers = {}
        for i, k in enumerate(WHO):
            arrays: dict[str, NDArray[np.float32]] = {}
            for n, m in LAYOUT.modules.items():
                a = rng.normal(size=(k.rank, m.inp)).astype(np.float32)
                b = rng.normal(size=(m.out, k.rank)).astype(np.float32)
                arrays |= {f"A:{n}": a, f"B:{n}": b}
                want[n] = want[n] + (1 + i) / 6 * k.scale * (b.astype(np.float64) @ a.astype(np.float64))
            answers[k.id] = Answer(examples=10 * (1 + i), arrays=arrays)
        with pytest.raises(StopIteration) as done:
            protocol.send(answers)
        state = done.value.value.state
        yield done.value.value, want


def far(state: GlobalState, want: Dense) -> float:
    return float(np.sqrt(sum(np.sum((state.update()[n].dense() - x) ** 2) for n, x in want.items())))


def size(x: Dense) -> float:
    return float(np.sqrt(sum(np.sum(v**2) for v in x.values())))


def test_recompression_at_the_lossless_bound_loses_nothing() -> None:
    recompressed = 0
    for closed, want in rounds(SETTINGS, 12):
        assert far(closed.state, want) < 1e-6 * size(want)
        assert closed.report["truncation_error"] == 0.0
        assert closed.report["rank"] <= 2 * 6
        recompressed += len(closed.state.open_task.blocks) == 1
    assert recompressed > 3


def test_the_state_does_not_grow_with_rounds() -> None:
    for warm in (False, True):
        sizes = []
        for closed, _ in rounds(SETTINGS.model_copy(update={"max_rank": 4, "warm_start": warm}), 15):
            blocks = closed.state.open_task.blocks
            memory = sum(x.nbytes for arrays in closed.state.memory.values() for x in arrays.values())
            sizes.append(sum(b.adapter.nbytes for b in blocks) + memory)
            assert closed.report["rank"] <= 4
        assert max(sizes) == sizes[-1] == sizes[1]


def test_the_reported_error_is_the_error() -> None:
    """The first recompression leaves the discarded singular values of the dense sum."""
    closed, want = next(rounds(SETTINGS.model_copy(update={"max_rank": 2}), 1))
    left = np.sqrt(sum(np.sum(np.linalg.svd(x, compute_uv=False)[2:] ** 2) for x in want.values()))
    assert closed.report["truncation_error"] >= left * (1 - 1e-6)
    assert far(closed.state, want) <= closed.report["truncation_error"] * (1 + 1e-6)
    loose, want = next(rounds(SETTINGS.model_copy(update={"max_rank": 4}), 1))
    left = np.sqrt(sum(np.sum(np.linalg.svd(x, compute_uv=False)[4:] ** 2) for x in want.values()))
    assert loose.report["truncation_error"] == pytest.approx(left, rel=1e-5)
    assert loose.report["truncation_error_relative"] == pytest.approx(left / size(want), rel=1e-5)
    assert loose.report["update_norm"] == pytest.approx(size(want), rel=1e-5)


def test_blocks_are_versioned_until_they_are_recompressed() -> None:
    wide = Layout(modules={"w": Module(out=10, inp=10)})
    state = METHOD.open("base", wide, WHO, SETTINGS, 0)
    born = []
    for t in range(1, 6):
        protocol, asks = ask_all(state, SETTINGS, t)
        answers = {
            k.id: Answer(
                examples=1,
                arrays={
                    "A:w": np.random.default_rng(t).normal(size=(k.rank, 10)).astype(np.float32),
                    "B:w": np.random.default_rng(-t % 7).normal(size=(10, k.rank)).astype(np.float32),
                },
            )
            for k in WHO
        }
        assert all(ask.blocks == state.open_task.blocks for ask in asks.values())
        with pytest.raises(StopIteration) as done:
            protocol.send(answers)
        state = done.value.value.state
        born.append([(b.since, b.born) for b in state.open_task.blocks])
    chain = [(n, n + 1) for n in range(5)]  # ranks 6, 12, 18; 24 is more than two times 10
    assert born == [chain[:1], chain[:2], chain[:3], [(-1, 4)], [(-1, 4), (4, 5)]]


def test_no_clients_factors_can_be_read_in_the_broadcast() -> None:
    """A block is the compact SVD of the sum: orthogonal directions, falling, and no slice of a client."""
    layout = Layout(modules={"q": Module(out=9, inp=8), "v": Module(out=8, inp=12)})  # room: nothing is recompressed
    state = METHOD.open("base", layout, WHO, SETTINGS, 0)
    protocol, _ = ask_all(state, SETTINGS, 1)
    rng = np.random.default_rng(0)
    answers = {
        k.id: Answer(
            examples=1,
            arrays={f"A:{n}": rng.normal(size=(k.rank, m.inp)).astype(np.float32) for n, m in layout.modules.items()}
            | {f"B:{n}": rng.normal(size=(m.out, k.rank)).astype(np.float32) for n, m in layout.modules.items()},
        )
        for k in WHO
    }
    with pytest.raises(StopIteration) as done:
        protocol.send(answers)
    (block,) = done.value.value.state.open_task.blocks
    for n, f in block.adapter.items():
        assert f.rank == 6
        gram_a, gram_b = f.a @ f.a.T, f.b.T @ f.b
        values = np.diag(gram_a)
        np.testing.assert_allclose(gram_a, np.diag(values), atol=1e-5 * values[0])
        np.testing.assert_allclose(gram_b, gram_a, atol=1e-5 * values[0])
        assert (np.diff(values) < 0).all()
        for answer in answers.values():
            for row in answer.arrays[f"A:{n}"]:
                cosine = np.abs(f.a @ row) / np.linalg.norm(f.a, axis=1) / np.linalg.norm(row)
                assert cosine.max() < 0.999
    assert {f.a.dtype for f in block.adapter.values()} == {np.dtype(np.float32)}


def test_a_cold_client_gets_no_arrays_and_starts_fresh() -> None:
    state = METHOD.open("base", LAYOUT, WHO, SETTINGS, 0)
    _, asks = ask_all(state, SETTINGS, 1)
    for k in WHO:
        ask: Ask = asks[k.id]
        assert ask.arrays == {}
        assert ask.frozen is None
        assert ask.plan is not None
        assert (ask.plan.rank, ask.plan.rows, ask.plan.scale) == (k.rank, k.rank, k.scale)
        assert (ask.plan.a_from, ask.plan.b_from) == ("fresh", "zero")
        assert (ask.plan.train, ask.plan.send, ask.plan.changes) == (("A", "B"), ("A", "B"), ())


def test_a_warm_start_is_the_best_of_the_last_update_and_is_taken_off_again() -> None:
    warm = SETTINGS.model_copy(update={"warm_start": True})
    closed, want = next(rounds(warm, 1))
    state = closed.state
    _, asks = ask_all(state, warm, 2)
    opening = METHOD.open("base", LAYOUT, WHO, warm, 0)
    _, first = ask_all(opening, warm, 1)
    for k in WHO:
        ask: Ask = asks[k.id]
        assert ask.frozen is not None
        assert ask.plan is not None
        assert (ask.plan.a_from, ask.plan.b_from, ask.plan.rank) == ("given", "given", k.rank)
        for n in LAYOUT.modules:
            a, b = ask.arrays[f"A:{n}"], ask.arrays[f"B:{n}"]
            start = k.scale * (b.astype(np.float64) @ a.astype(np.float64))
            np.testing.assert_allclose(np.linalg.norm(a, axis=1), 3**-0.5, rtol=1e-5)
            np.testing.assert_array_equal(ask.frozen[n].dense(), -start)
            u, s, vt = np.linalg.svd(want[n])
            # The first round's start had B = 0, so the update is the plain sum.
            best = (u[:, : k.rank] * s[: k.rank]) @ vt[: k.rank]
            np.testing.assert_allclose(start, best, atol=1e-5 * s[0])
            assert first["a"].arrays[f"A:{n}"].any()
            assert not first["a"].arrays[f"B:{n}"].any()


def test_directions_that_the_last_update_lacks_start_fresh() -> None:
    """After a round that learnt nothing, a warm client can still learn: A is not zero where B is."""
    warm = SETTINGS.model_copy(update={"warm_start": True})
    state = METHOD.open("base", LAYOUT, WHO, warm, 0)
    protocol, asks = ask_all(state, warm, 1)
    with pytest.raises(StopIteration) as done:
        protocol.send({c: Answer(examples=1, arrays=dict(ask.arrays)) for c, ask in asks.items()})
    state = done.value.value.state
    assert done.value.value.report["update_norm"] == 0.0
    _, asks = ask_all(state, warm, 2)
    for ask in asks.values():
        for n in LAYOUT.modules:
            assert (np.linalg.norm(ask.arrays[f"A:{n}"], axis=1) > 0.1).all()
            assert not ask.arrays[f"B:{n}"].any()


def test_a_client_larger_than_all_that_were_enrolled_trains_what_the_start_has() -> None:
    warm = SETTINGS.model_copy(update={"warm_start": True})
    state = METHOD.open("base", LAYOUT, WHO, warm, 0)
    _, asks = ask_all(state, warm, 1, [Member(id="late", rank=5, scale=1.0)])
    assert asks["late"].plan is not None
    assert (asks["late"].plan.rank, asks["late"].plan.rows) == (3, 3)
    assert asks["late"].arrays["A:q"].shape == (3, 5)


@pytest.mark.parametrize("name", ["flora", "fedex-lora", "frlora", "flexlora"])
def test_a_bound_on_the_rank_that_misses_the_bound_on_the_error_is_refused(name: str) -> None:
    """Also where the stack of the round could be compacted on the way, which would hide the error."""
    case = MethodConfig(name=name, max_rank=1, max_error=1e-3)  # type: ignore[arg-type]
    method = get(name)
    state = method.open("base", LAYOUT, WHO, case, 0)
    cohort = Cohort(round=1, rounds=1, members=WHO, settings=case, training=TRAINING, seed=0, progress=(0.0, 1.0))

    def noise(client: str, ask: Ask) -> Answer:
        assert ask.plan is not None
        rng = np.random.default_rng(ord(client))
        shapes = expected_shapes(ask.plan, LAYOUT)
        return Answer(examples=1, arrays={k: rng.normal(size=s).astype(np.float32) for k, s in shapes.items()})

    with pytest.raises(MethodError, match=r"max_error = 0\.001 needs rank \d+ in .*max_rank allows 1:"):
        play(method.protocol(state, cohort), noise)
