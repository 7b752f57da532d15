"""FedSVD: what the refactorisation keeps, what it cannot change, and what it changes at mixed ranks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from fedlora.adapter import Adapter, Factors
from fedlora.config import MethodConfig
from fedlora.errors import MethodError
from fedlora.rng import public_orthonormal
from fedlora.state import Answer, Ask, GlobalState, Layout, LocalTraining, Module, expected_shapes
from strategies.base import Closed, Cohort, Member, Method
from strategies.fedsvd import METHOD, refactorised
from strategies.ffa_lora import METHOD as FFA
from strategies.flora import METHOD as FLORA

Dense = dict[str, NDArray[np.float64]]
Step = Callable[[NDArray[np.float64]], NDArray[np.float64]]

SETTINGS = MethodConfig(name="fedsvd")
TRAINING = LocalTraining(learning_rate=1e-3, local_steps=1, local_epochs=None, batch_size=1)
LAYOUT = Layout(modules={"q": Module(out=9, inp=7), "v": Module(out=5, inp=8)})
WHO = (Member(id="a", rank=4, scale=0.5), Member(id="b", rank=1, scale=8.0), Member(id="c", rank=2, scale=3.0))
EQUAL = tuple(Member(id=c, rank=4, scale=2.0) for c in "abc")


def cohort(who: Sequence[Member], t: int = 1) -> Cohort:
    return Cohort(
        round=t, rounds=9, members=tuple(who), settings=SETTINGS, training=TRAINING, seed=0, progress=(0.0, 1.0)
    )


def one_round(state: GlobalState, answers: Mapping[str, Answer], who: Sequence[Member] = WHO) -> Closed:
    protocol = METHOD.protocol(state, cohort(who))
    next(protocol)
    with pytest.raises(StopIteration) as done:
        protocol.send(answers)
    closed: Closed = done.value.value
    return closed


def noisy(state: GlobalState, rng: np.random.Generator, who: Sequence[Member] = WHO) -> dict[str, Answer]:
    answers = {}
    for i, (client, ask) in enumerate(next(METHOD.protocol(state, cohort(who))).items()):
        assert ask.plan is not None
        shapes = expected_shapes(ask.plan, LAYOUT)
        assert all(key.startswith("B:") for key in shapes)
        arrays = {key: rng.normal(size=shape).astype(np.float32) for key, shape in shapes.items()}
        answers[client] = Answer(examples=1 + 2 * i, arrays=arrays)
    return answers


def pair_in(state: GlobalState) -> Adapter:
    assert state.open_task.pair is not None
    return state.open_task.pair


def opened(who: Sequence[Member] = WHO, seed: int = 0) -> GlobalState:
    return METHOD.open("base", LAYOUT, who, SETTINGS, seed)


def projector(a: NDArray[np.floating]) -> NDArray[np.float64]:
    """Onto the row space, by an SVD of its own."""
    _, sigma, vt = np.linalg.svd(a.astype(np.float64), full_matrices=False)
    assert sigma[-1] > 0.5
    return np.asarray(vt.T @ vt)


def test_the_row_space_of_a_never_changes() -> None:
    state, rng = opened(), np.random.default_rng(0)
    first = {n: projector(f.a) for n, f in pair_in(state).items()}
    turned = []
    for t in range(12):
        here = [WHO[1:], WHO[:1], WHO][t % 3]  # also rounds in which only a few columns move
        state = one_round(state, noisy(state, rng, here), here).state
        for n, f in pair_in(state).items():
            np.testing.assert_allclose(projector(f.a), first[n], atol=5e-6)
            np.testing.assert_allclose(f.a @ f.a.T, np.eye(4), atol=1e-6)
            gram = f.b.astype(np.float64).T @ f.b
            np.testing.assert_allclose(gram, np.diag(np.diag(gram)), atol=1e-5 * gram[0, 0])
            assert (np.diff(np.diag(gram)) <= 1e-6 * gram[0, 0]).all()
            turned.append(np.abs(np.diag(f.a @ pair_in(opened())[n].a.T)).min())
    assert min(turned) < 0.5


def test_directions_that_nobody_trained_complete_the_basis() -> None:
    """After a round of rank 1 the product has rank 1; A still has all its rows, in the space of the old ones."""
    start = opened()
    state = one_round(start, noisy(start, np.random.default_rng(1), WHO[1:2]), WHO[1:2]).state
    for n, f in pair_in(state).items():
        sizes = np.linalg.norm(f.b, axis=0)
        assert sizes[0] > 0.1
        assert sizes[1:].max() < 1e-6 * sizes[0]
        np.testing.assert_allclose(f.a @ f.a.T, np.eye(4), atol=1e-6)
        np.testing.assert_allclose(projector(f.a), projector(pair_in(start)[n].a), atol=1e-6)
        np.testing.assert_allclose(f.a[0], pair_in(start)[n].a[0], atol=1e-6)  # the only row with a column


def test_the_start_is_public_and_an_echo_keeps_it() -> None:
    state = opened(seed=11)
    for n, f in pair_in(state).items():
        np.testing.assert_allclose(f.a, public_orthonormal(11, "basis", n, rows=4, cols=f.shape[1]), atol=1e-7)
        assert not f.b.any()
        assert f.scale == 0.5
    silent = {m.id: Answer(examples=1, arrays={f"B:{n}": np.zeros((k.out, m.rank), np.float32)
                                               for n, k in LAYOUT.modules.items()}) for m in WHO}  # fmt: skip
    closed = one_round(state, silent)
    assert closed.report == {"update_norm": 0.0, "rank": 4.0}
    for n, f in pair_in(closed.state).items():
        np.testing.assert_allclose(f.a, pair_in(state)[n].a, atol=1e-6)
        assert not f.b.any()


@settings(deadline=None, max_examples=60)
@given(
    out=st.integers(1, 9),
    inp=st.integers(1, 9),
    data=st.data(),
    scale=st.sampled_from([0.01, 1.0, 40.0, -2.0]),
    seed=st.integers(0, 2**31),
)
def test_refactorising_keeps_the_product(out: int, inp: int, data: st.DataObject, scale: float, seed: int) -> None:
    """At any shapes (out below the rank too) and any rank of the product, also from rows that are not orthonormal."""
    rank = data.draw(st.integers(1, inp))
    filled = data.draw(st.integers(0, min(rank, out)))
    rng = np.random.default_rng(seed)
    b = rng.normal(size=(out, filled)) @ rng.normal(size=(filled, rank))
    q, _ = np.linalg.qr(rng.normal(size=(inp, rank)))
    skew = np.triu(rng.uniform(-0.5, 0.5, (rank, rank)), 1) + np.diag(rng.uniform(0.5, 2.0, rank))
    old = Factors(skew @ q.T, b, scale)
    new = refactorised(old)
    assert (new.a.shape, new.b.shape, new.scale) == (old.a.shape, old.b.shape, scale)
    assert {new.a.dtype, new.b.dtype} == {np.dtype(np.float32)}
    np.testing.assert_allclose(new.dense(), old.dense(), atol=1e-6 * float(np.linalg.norm(old.dense())) + 1e-30)
    np.testing.assert_allclose(new.a @ new.a.T, np.eye(rank), atol=2e-6)
    np.testing.assert_allclose(projector(new.a), q @ q.T, atol=5e-6)
    sigma = np.linalg.svd(old.dense(), compute_uv=False)
    want = np.pad(sigma, (0, rank))[:rank] / abs(scale)
    np.testing.assert_allclose(np.linalg.norm(new.b, axis=0), want, atol=1e-5 * float(want[0]) + 1e-30)
    assert (np.sum(new.a * old.a, axis=1) >= -1e-6).all()


def test_the_state_is_a_function_of_the_sum_alone() -> None:
    """Post-processing: other answers of the same weighted sum give the same bytes."""
    start, rng = opened(EQUAL), np.random.default_rng(2)
    state = one_round(start, noisy(start, rng, EQUAL), EQUAL).state
    shapes = {f"B:{n}": f.b.shape for n, f in pair_in(state).items()}
    x, y = ({k: rng.integers(-64, 64, s).astype(np.float32) for k, s in shapes.items()} for _ in range(2))
    apart = {"a": Answer(examples=2, arrays=x), "b": Answer(examples=2, arrays=y)}
    mixed = {k: (x[k] + 3 * y[k]) / 4 for k in shapes}
    other = {k: (3 * x[k] + y[k]) / 4 for k in shapes}
    swapped = {"a": Answer(examples=2, arrays=mixed), "b": Answer(examples=2, arrays=other)}
    one, two = (pair_in(one_round(state, answers, EQUAL[:2]).state) for answers in (apart, swapped))
    for n, f in one.items():
        assert f.a.tobytes() == two[n].a.tobytes()
        assert f.b.tobytes() == two[n].b.tobytes()


def descend(method: Method, who: Sequence[Member], rounds: int, step: Step) -> list[Dense]:
    """Clients with targets of their own take one step on ||W_eff - target||^2 / 2 in B; W_eff after every round."""
    config = MethodConfig.model_validate({"name": method.name})
    state, path = method.open("base", LAYOUT, who, config, 5), []
    targets = {m.id: {n: np.random.default_rng([i, j]).normal(size=(k.out, k.inp)) * (1 + 4 * (j == 0))
                      for j, (n, k) in enumerate(LAYOUT.modules.items())} for i, m in enumerate(who)}  # fmt: skip
    for t in range(1, rounds + 1):
        protocol = method.protocol(state, cohort(who, t))
        answers = {}
        pair, w = pair_in(state), {n: f.dense() for n, f in state.update().items()}
        for client, ask in next(protocol).items():
            assert ask.plan is not None
            r = ask.plan.rank
            arrays = {
                f"B:{n}": step(f.scale * (w[n] - targets[client][n]) @ f.a[:r].T.astype(np.float64)).astype(np.float32)
                for n, f in pair.items()
            }
            answers[client] = Answer(examples=1, arrays=arrays)
        with pytest.raises(StopIteration) as done:
            protocol.send(answers)
        state = done.value.value.state
        path.append({n: f.dense() for n, f in state.update().items()})
    return path


def apart(one: Dense, two: Dense) -> float:
    return float(np.sqrt(sum(np.sum((x - two[n]) ** 2) for n, x in one.items())))


def signs(g: NDArray[np.float64]) -> NDArray[np.float64]:
    return -0.1 * np.sign(g)  # what Adam's first step is


def test_at_one_rank_gradient_descent_is_that_of_ffa_lora_clipped_or_not() -> None:
    """The theorem of the docstring: a step of B sees A only through its row space; steps by entries see more."""
    norms = []

    def clipped(g: NDArray[np.float64]) -> NDArray[np.float64]:
        norms.append(float(np.linalg.norm(g)))
        return -0.02 * g * min(1.0, 30.0 / norms[-1])

    for step in (clipped, lambda g: -0.02 * g):
        path, other = (descend(m, EQUAL, 6, step) for m in (METHOD, FFA))
        for one, two in zip(path, other, strict=True):
            assert apart(one, two) < 1e-5 * apart(one, {n: np.zeros_like(x) for n, x in one.items()})
    assert min(norms) < 30.0 < max(norms)
    path, other = (descend(m, EQUAL, 3, signs) for m in (METHOD, FFA))
    assert apart(path[0], other[0]) < 1e-5
    assert apart(path[2], other[2]) > 1e-2


def test_small_clients_train_the_leading_directions() -> None:
    """Row 1 of A is the leading right singular vector of what has been learnt, formed densely."""
    state = opened()
    state = one_round(state, noisy(state, np.random.default_rng(4))).state
    asks = next(METHOD.protocol(state, cohort(WHO)))
    for n, f in state.update().items():
        _, _, vt = np.linalg.svd(f.dense())
        for m in WHO:
            a, plan = asks[m.id].arrays[f"A:{n}"], asks[m.id].plan
            assert plan is not None
            assert plan.rank == m.rank
            cosines = np.abs(np.sum(a[: plan.rank] * vt[: plan.rank], axis=1))
            np.testing.assert_allclose(cosines, 1.0, atol=1e-5)


def test_a_travels_the_same_for_all_and_b_alone_is_trained() -> None:
    state = opened()
    state = one_round(state, noisy(state, np.random.default_rng(5))).state
    asks = next(METHOD.protocol(state, cohort(WHO)))
    for m in WHO:
        ask: Ask = asks[m.id]
        assert {key.split(":")[0] for key in ask.arrays} == {"A", "B"}
        assert all(x.tobytes() == asks["a"].arrays[key].tobytes() for key, x in ask.arrays.items())
        assert (ask.frozen, ask.blocks) == (None, ())
        assert ask.plan is not None
        assert (ask.plan.rank, ask.plan.rows, ask.plan.scale) == (m.rank, 4, 0.5)
        assert (ask.plan.a_from, ask.plan.b_from) == ("given", "given")
        assert (ask.plan.train, ask.plan.send, ask.plan.changes) == (("B",), ("B",), ("B",))
    assert state.open_task.public_seed is None


def test_the_update_norm_is_that_of_the_move() -> None:
    before = opened()
    before = one_round(before, noisy(before, np.random.default_rng(6))).state
    closed = one_round(before, noisy(before, np.random.default_rng(7)))
    old, new = ({n: f.dense() for n, f in s.update().items()} for s in (before, closed.state))
    assert closed.report["update_norm"] == pytest.approx(apart(new, old), rel=1e-5)


def test_the_task_rank_caps_the_clients() -> None:
    state = METHOD.open("base", LAYOUT, WHO, SETTINGS.model_copy(update={"task_rank": 2}), 0)
    asks = next(METHOD.protocol(state, cohort(WHO)))
    assert {c: (a.plan.rank, a.plan.rows) for c, a in asks.items() if a.plan} == {"a": (2, 2), "b": (1, 2), "c": (2, 2)}


def test_embeddings_are_refused_by_name() -> None:
    layout = Layout(modules={"q": Module(out=7, inp=5), "tok": Module(out=4, inp=60, kind="embedding")})
    with pytest.raises(MethodError, match="fedsvd: tok is an embedding, where A is the factor that starts at zero"):
        METHOD.open("base", layout, WHO, SETTINGS, 0)


@pytest.mark.parametrize("task_rank", [8, None])
def test_a_rank_above_the_inputs_is_refused_by_name(task_rank: int | None) -> None:
    config = SETTINGS.model_copy(update={"task_rank": task_rank})
    with pytest.raises(MethodError, match="fedsvd: rank 8 is above the 7 inputs of q"):
        METHOD.open("base", LAYOUT, [Member(id="a", rank=8, scale=1.0)], config, 0)


def test_a_state_of_another_method_is_refused() -> None:
    flora = FLORA.open("base", LAYOUT, WHO, MethodConfig(name="flora"), 0)
    with pytest.raises(MethodError, match="fedsvd: this state keeps no pair"):
        next(METHOD.protocol(flora, cohort(WHO)))
