"""Server optimisers: torch's Adam, the rule of Yogi entry by entry, dense momentum; and what may go with what."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from fedlora.adapter import Adapter, Array, Factors, norm
from fedlora.config import METHOD_NAMES, MethodConfig, RobustConfig, ServerConfig
from fedlora.errors import MethodError
from fedlora.state import Answer, Ask, Block, GlobalState, Layout, LocalTraining, Module, Task, expected_shapes
from fedlora.wire import decode_state, encode_state
from strategies import fedsa_lora, frlora
from strategies.base import Closed, Cohort, Member, Method, Round, get, opened, play
from strategies.robust import guarded
from strategies.server_optimizer import (
    COORDINATES,
    OWNER,
    PRODUCTS,
    basis,
    optimised,
    pair_mistake,
    trained,
    with_trained,
)

Dense = dict[str, NDArray[np.float64]]
TRAINING = LocalTraining(learning_rate=1e-3, local_steps=1, local_epochs=None, batch_size=1)
LAYOUT = Layout(
    modules={"q": Module(out=7, inp=5), "v": Module(out=6, inp=12), "square": Module(out=5, inp=5)},
    head={"score.weight": (3, 4), "score.bias": (3,)},
)
WHO = tuple(Member(id=i, rank=r, scale=s) for i, r, s in (("a", 3, 0.5), ("b", 1, 4.0), ("c", 2, 2.0)))
EXAMPLES = {"a": 10, "b": 20, "c": 30}
FFA, FLORA, FRLORA = MethodConfig(name="ffa-lora"), MethodConfig(name="flora"), MethodConfig(name=frlora.NAME)
FEDSA = MethodConfig(name=fedsa_lora.NAME)
CORE, CORE_LATER = MethodConfig(name="fed-sb", basis="random"), MethodConfig(name="fed-sb", basis="update")
FIXED = [FFA, FEDSA, CORE, CORE_LATER]
MOMENTUM = ServerConfig(optimizer="momentum")
ADAM, YOGI = ServerConfig(optimizer="adam"), ServerConfig(optimizer="yogi")
Answers = dict[str, Answer]


def label(value: object) -> str:
    if isinstance(value, ServerConfig):
        return value.optimizer
    assert isinstance(value, MethodConfig)
    rest = {"warm": value.warm_start, value.max_rank: value.max_rank, value.max_error: value.max_error}
    return "-".join(map(str, [value.name, *(key for key, on in rest.items() if on), value.basis or ""])).rstrip("-")


def cohort(case: MethodConfig, t: int, who: Sequence[Member] = WHO) -> Cohort:
    return Cohort(round=t, rounds=99, members=tuple(who), settings=case, training=TRAINING, seed=0, progress=(0.0, 1.0))


def said(client: str, ask: Ask, t: int, size: float = 0.1) -> Answer:
    """What a client says in round t: noise of its own in every array that its plan wants."""
    assert ask.plan is not None
    rng = np.random.default_rng([t, ord(client)])
    shapes = expected_shapes(ask.plan, LAYOUT)
    arrays = {key: (size * rng.standard_normal(shape)).astype(np.float32) for key, shape in shapes.items()}
    return Answer(examples=EXAMPLES[client], arrays=arrays)


def one(
    method: Method,
    case: MethodConfig,
    state: GlobalState,
    t: int,
    answer: Callable[[str, Ask], Answer] | None = None,
    who: Sequence[Member] = WHO,
) -> Closed:
    return play(method.protocol(state, cohort(case, t, who)), answer or (lambda client, ask: said(client, ask, t)))


def start(case: MethodConfig) -> GlobalState:
    return get(case.name).open("base", LAYOUT, WHO, case, 0)


def after(method: Method, case: MethodConfig, count: int) -> GlobalState:
    state = start(case)
    for t in range(1, count + 1):
        state = one(method, case, state, t).state
    return state


def same_tasks(left: GlobalState, right: GlobalState) -> bool:
    return encode_state(replace(left, memory={})) == encode_state(replace(right, memory={}))


def dense(state: GlobalState) -> Dense:
    return {n: f.dense() for n, f in state.update().items()}


def far(left: Mapping[str, Array], right: Mapping[str, Array]) -> float:
    assert left.keys() == right.keys()
    return math.sqrt(sum(float(np.sum((x - right[n]) ** 2)) for n, x in left.items()))


def size_of(x: Mapping[str, Array]) -> float:
    return math.sqrt(sum(float(np.sum(v.astype(np.float64) ** 2)) for v in x.values()))


def mean_changes(answers: Answers, state: GlobalState) -> Dense:
    """Of ffa-lora: sum p_k pad(dB_k), and of the head, by hand."""
    weight = sum(a.examples for a in answers.values())
    changes = {key: np.zeros(x.shape) for key, x in trained("ffa-lora", state).items()}
    for a in answers.values():
        for key, x in a.arrays.items():
            at = (..., slice(x.shape[1])) if key.startswith("B:") else ...
            changes[key][at] += a.examples / weight * x.astype(np.float64)
    return changes


@pytest.mark.parametrize("settings", [ADAM, ServerConfig(optimizer="adam", rate=0.3, beta1=0.5, beta2=0.9, tau=0.05)])
def test_adam_over_ffa_lora_is_torchs_adam(settings: ServerConfig) -> None:
    """Ranks differ and other clients answer in every round; the head moves by the same rule."""
    method, state = optimised(get("ffa-lora"), settings), start(FFA)
    parameters = {
        key: torch.nn.Parameter(torch.tensor(x, dtype=torch.float64)) for key, x in trained("ffa-lora", state).items()
    }
    adam = torch.optim.Adam(
        parameters.values(), lr=settings.rate or 1e-2, betas=(settings.beta1, settings.beta2), eps=settings.tau
    )
    for t in range(1, 13):
        answers: Answers = {}
        who = [m for i, m in enumerate(WHO) if (i + t) % 3]

        def keep(client: str, ask: Ask, t: int = t, answers: Answers = answers) -> Answer:
            answers[client] = said(client, ask, t)
            return answers[client]

        closed = one(method, FFA, state, t, keep, who)
        before = {key: p.detach().clone() for key, p in parameters.items()}
        for key, change in mean_changes(answers, state).items():
            parameters[key].grad = torch.tensor(-change)
        adam.step()
        step = math.sqrt(sum(float(((p.detach() - before[key]) ** 2).sum()) for key, p in parameters.items()))
        assert closed.report["server_step_norm"] == pytest.approx(step, rel=1e-5)
        state = closed.state
        for key, x in trained("ffa-lora", state).items():
            assert x.dtype == np.float32
            np.testing.assert_allclose(x, parameters[key].detach().numpy(), rtol=2e-5, atol=1e-6)
    assert state.memory[OWNER]["steps"] == 12


def test_yogi_is_its_published_rule_entry_by_entry() -> None:
    settings = ServerConfig(optimizer="yogi", rate=0.05, beta1=0.8, beta2=0.7, tau=0.02)
    method, state = optimised(get("ffa-lora"), settings), start(FFA)
    key, at = "B:q", (2, 0)
    x, m, v, smaller, larger = 0.0, 0.0, 0.0, 0, 0
    for t in range(1, 11):
        answers: Answers = {}
        loud = 0.3 if t < 5 else 0.02

        def keep(client: str, ask: Ask, t: int = t, answers: Answers = answers, loud: float = loud) -> Answer:
            answers[client] = said(client, ask, t, loud)
            return answers[client]

        state_before, state = state, one(method, FFA, state, t, keep).state
        d = float(mean_changes(answers, state_before)[key][at])
        m = 0.8 * m + 0.2 * d
        v += 0.3 * d * d if v < d * d else -0.3 * d * d
        smaller, larger = smaller + (v < d * d), larger + (v > d * d)
        x += 0.05 * (m / (1 - 0.8**t)) / (math.sqrt(v / (1 - 0.7**t)) + 0.02)
        assert trained("ffa-lora", state)[key][at] == pytest.approx(x, rel=1e-4, abs=1e-6)
    assert smaller
    assert larger
    assert not same_tasks(
        after(method, FFA, 2),
        after(optimised(get("ffa-lora"), settings.model_copy(update={"optimizer": "adam"})), FFA, 2),
    )


def test_a_steady_change_makes_steady_steps() -> None:
    """With the right step index, m' = d and v' = d^2 in every round: each step is rate d / (|d| + tau)."""
    method, state = optimised(get("ffa-lora"), ADAM), start(FFA)
    key = "head:score.weight"
    for t in range(1, 9):
        before = trained("ffa-lora", state)[key]
        closed = one(method, FFA, state, t, lambda client, ask: said(client, ask, 1))
        state = closed.state
        answers = {m.id: said(m.id, ask, 1) for m in WHO for ask in [next(asks_of(state))[m.id]]}
        d = mean_changes(answers, state)[key]
        np.testing.assert_allclose(trained("ffa-lora", state)[key] - before, 1e-2 * d / (abs(d) + 1e-3), rtol=2e-4)


def asks_of(state: GlobalState) -> Round:
    return get("ffa-lora").protocol(state, cohort(FFA, 1))


def test_a_steady_change_makes_yogi_a_fifth_slower_at_most() -> None:
    settings = ServerConfig(optimizer="yogi", beta1=0.0, tau=1e-8)
    layout = Layout(modules={"q": Module(out=1, inp=3)})
    who = (Member(id="a", rank=1, scale=1.0),)
    method, state = optimised(get("ffa-lora"), settings), get("ffa-lora").open("base", layout, who, FFA, 0)
    steps, moved = [], {"B:q": np.full((1, 1), 0.5, np.float32)}
    for t in range(1, 130):
        closed = one(method, FFA, state, t, lambda client, ask: Answer(examples=1, arrays=moved), who)
        state = closed.state
        steps.append(closed.report["server_step_norm"] / 1e-2)
    assert 0.78 < min(steps) < 0.82
    assert max(steps) < 1.01


@pytest.mark.parametrize("settings", [ADAM, ServerConfig(optimizer="momentum", rate=0.5, beta1=0.6)], ids=label)
@pytest.mark.parametrize("case", FIXED, ids=label)
def test_every_method_of_one_basis_moves_by_torchs_rule(case: MethodConfig, settings: ServerConfig) -> None:
    """d is what the method itself would have moved by; torch's SGD with momentum is FedAvgM."""
    name, method = case.name, optimised(get(case.name), settings)
    state = start(case) if case is not CORE_LATER else after(method, case, 1)
    parameters = {
        key: torch.nn.Parameter(torch.tensor(x, dtype=torch.float64)) for key, x in trained(name, state).items()
    }
    mine = parameters.values()
    rule: torch.optim.Optimizer = torch.optim.SGD(mine, lr=0.5, momentum=0.6)
    if settings is ADAM:
        rule = torch.optim.Adam(mine, lr=1e-2, betas=(0.9, 0.99), eps=1e-3)
    for t in range(2, 9):
        plain = trained(name, one(get(name), case, state, t).state)
        for key, x in trained(name, state).items():
            parameters[key].grad = torch.tensor(x.astype(np.float64) - plain[key].astype(np.float64))
        rule.step()
        state = one(method, case, state, t).state
        for key, x in trained(name, state).items():
            assert x.dtype == np.float32
            np.testing.assert_allclose(x, parameters[key].detach().numpy(), rtol=2e-5, atol=2e-6)
    assert state.memory[OWNER]["steps"] == 7
    kinds = {"ffa-lora": "B", "fedsa-lora": "A", "fed-sb": "R"}
    assert {key.split(":")[0] for key in parameters} == {kinds[name], "head"}


@pytest.mark.parametrize("case", [CORE, CORE_LATER], ids=label)
def test_the_pair_of_fed_sb_follows_its_core(case: MethodConfig) -> None:
    method, state = optimised(get("fed-sb"), ADAM), start(case)
    for t in range(1, 5):
        state = one(method, case, state, t).state
        memory, pair = state.memory["fed-sb"], state.open_task.pair
        assert pair is not None
        assert pair["q"].scale == WHO[0].scale
        for n, f in pair.items():
            np.testing.assert_allclose(f.b, memory[f"B:{n}"].astype(np.float64) @ memory[f"R:{n}"], atol=1e-6)
            assert f.b.any()


def test_the_round_that_makes_the_bases_of_fed_sb_is_no_step() -> None:
    method, state = optimised(get("fed-sb"), ADAM), start(CORE_LATER)
    first = one(method, CORE_LATER, state, 1)
    assert encode_state(first.state) == encode_state(one(get("fed-sb"), CORE_LATER, state, 1).state)
    assert OWNER not in first.state.memory
    assert "server_step_norm" not in first.report
    second = one(method, CORE_LATER, first.state, 2)
    assert second.state.memory[OWNER]["steps"] == 1
    assert second.report["server_step_norm"] > 0.0


def test_what_stays_at_the_clients_is_not_moved() -> None:
    """Under fedsa-lora the server's B is zero and its head is only a start."""
    for settings in (ADAM, YOGI, MOMENTUM):
        state = start(FEDSA)
        then = after(optimised(get("fedsa-lora"), settings), FEDSA, 3)
        assert then.open_task.pair is not None
        assert not any(f.b.any() for f in then.open_task.pair.values())
        for n, x in state.open_task.extras.items():
            assert then.open_task.extras[n].tobytes() == x.tobytes()


PLAIN = [
    *FIXED,
    FRLORA,
    FLORA,
    MethodConfig(name="flora", warm_start=True),
    MethodConfig(name="flora", max_rank=2),
    MethodConfig(name="frlora", max_rank=2),
    MethodConfig(name="flora", max_error=0.2),
]


@pytest.mark.parametrize("case", PLAIN, ids=label)
def test_without_memory_and_at_rate_one_it_is_the_method_itself_byte_for_byte(case: MethodConfig) -> None:
    wrapped = optimised(get(case.name), ServerConfig(optimizer="momentum", rate=1.0, beta1=0.0))
    state = bare = start(case)
    for t in range(1, 5):
        closed, plain = one(wrapped, case, state, t), one(get(case.name), case, bare, t)
        state, bare = closed.state, plain.state
        assert same_tasks(state, bare)
        assert {o: x for o, x in state.memory.items() if o != OWNER}.keys() == bare.memory.keys()
        for owner, arrays in bare.memory.items():
            assert all(state.memory[owner][key].tobytes() == x.tobytes() for key, x in arrays.items())
        assert plain.report.items() <= closed.report.items()
    assert type(state) is GlobalState


def product_rounds(case: MethodConfig, settings: ServerConfig, count: int) -> list[tuple[Closed, Dense, Dense]]:
    """Rounds of momentum over products, with dense W_eff and dense m."""
    method, state = optimised(get(case.name), settings), start(case)
    w, m, found = dense(state), {n: np.zeros_like(x) for n, x in dense(state).items()}, []
    rate = 1.0 if settings.rate is None else settings.rate
    lossless = case.model_copy(update={"max_rank": None, "max_error": None})
    for t in range(1, count + 1):
        own = dense(one(get(case.name), lossless, state, t).state)
        here = dense(state)
        for n in w:
            m[n] = settings.beta1 * m[n] + (own[n] - here[n])
            w[n] = w[n] + rate * m[n]
        closed = one(method, case, state, t)
        state = closed.state
        found.append((closed, dict(w), dict(m)))
    return found


def kept(state: GlobalState) -> Dense:
    memory = state.memory[OWNER]
    return {n: memory[f"B:{n}"].astype(np.float64) @ memory[f"A:{n}"].astype(np.float64) for n in LAYOUT.modules}


@pytest.mark.parametrize("case", [FLORA, MethodConfig(name="flora", warm_start=True), FRLORA], ids=label)
@pytest.mark.parametrize(("rate", "beta1"), [(None, 0.9), (0.3, 0.5)])
def test_momentum_over_products_is_dense_momentum(rate: float | None, beta1: float, case: MethodConfig) -> None:
    """Eight rounds, recompressed many times on the way: W_eff and m are those of dense float64 algebra."""
    settings = ServerConfig(optimizer="momentum", rate=rate, beta1=beta1)
    recompressed = 0
    for closed, w, m in product_rounds(case, settings, 8):
        assert far(dense(closed.state), w) < 1e-6 * size_of(w)
        assert far(kept(closed.state), m) < 1e-6 * size_of(m)
        assert closed.report["truncation_error"] == closed.report["server_velocity_error"] == 0.0
        assert closed.report["server_velocity_rank"] <= 6
        recompressed += len(closed.state.open_task.blocks) == 1
    assert recompressed > 2


def test_the_update_is_the_method_s_own_and_the_step_is_the_optimiser_s() -> None:
    closed, _, m = product_rounds(FLORA, ServerConfig(optimizer="momentum", rate=0.25), 4)[-1]
    before = product_rounds(FLORA, ServerConfig(optimizer="momentum", rate=0.25), 3)[-1][0].state
    plain = one(get("flora"), FLORA, before, 4)
    assert closed.report["update_norm"] == plain.report["update_norm"]
    head = {key: x - trained("flora", before)[key] for key, x in trained("flora", closed.state).items()}
    want = math.hypot(0.25 * size_of(m), size_of(head))
    assert closed.report["server_step_norm"] == pytest.approx(want, rel=1e-5)
    assert norm(closed.state.update()) == pytest.approx(size_of(dense(closed.state)), rel=1e-5)


def test_the_head_has_momentum_where_products_have() -> None:
    method, state = optimised(get("flora"), MOMENTUM), start(FLORA)
    want = {key: x.astype(np.float64) for key, x in trained("flora", state).items()}
    carried = {key: np.zeros_like(x) for key, x in want.items()}
    for t in range(1, 6):
        plain = trained("flora", one(get("flora"), FLORA, state, t).state)
        for key, x in trained("flora", state).items():
            carried[key] = 0.9 * carried[key] + (plain[key].astype(np.float64) - x)
            want[key] = want[key] + carried[key]
        state = one(method, FLORA, state, t).state
    assert want.keys() == {"head:score.weight", "head:score.bias"}
    assert far(trained("flora", state), want) < 1e-6 * size_of(want)


@pytest.mark.parametrize(
    "case", [MethodConfig(name="flora", max_rank=3, warm_start=w) for w in (False, True)], ids=label
)
def test_a_bounded_velocity_says_what_it_lost(case: MethodConfig) -> None:
    sizes, lost = [], 0.0
    for closed, w, m in product_rounds(case, ServerConfig(optimizer="momentum", rate=0.5, beta1=0.7), 10):
        memory = closed.state.memory[OWNER]
        assert {x.shape[0] for key, x in memory.items() if key.startswith("A:")} == {3}
        off, said_off = far(kept(closed.state), m), closed.report["server_velocity_error"]
        assert 1e-3 * size_of(m) < off <= said_off * (1 + 1e-6)
        lost += closed.report["truncation_error"]
        assert far(dense(closed.state), w) <= lost * (1 + 1e-6)
        sizes.append(len(encode_state(closed.state)))
    assert max(sizes) - min(sizes[1:]) < 256


def test_the_first_recompression_loses_what_the_discarded_singular_values_say() -> None:
    closed, _, m = product_rounds(MethodConfig(name="flora", max_rank=3), MOMENTUM, 1)[0]
    left = math.sqrt(sum(float(np.sum(np.linalg.svd(x, compute_uv=False)[3:] ** 2)) for x in m.values()))
    assert closed.report["server_velocity_error"] == pytest.approx(left, rel=1e-5)
    assert closed.report["truncation_error"] == pytest.approx(left, rel=1e-5)  # of the state; m's is of the next round


def test_an_error_of_the_velocity_decays_with_it() -> None:
    """A lossless round after a truncated one: the old error counts beta1 times, and rate times in the state."""
    settings = ServerConfig(optimizer="momentum", rate=0.5, beta1=0.7)
    method = optimised(get("flora"), settings)
    first = one(method, MethodConfig(name="flora", max_rank=3), start(FLORA), 1)
    second = one(method, FLORA, first.state, 2)
    carried = 0.7 * first.report["server_velocity_error"]
    assert second.report["server_velocity_error"] == pytest.approx(carried)
    assert second.report["truncation_error"] == pytest.approx(0.5 * carried)


def test_the_warm_start_stays_the_rounds_own() -> None:
    case = MethodConfig(name="flora", warm_start=True)
    state = after(optimised(get("flora"), MOMENTUM), case, 3)
    plain, wrapped = one(get("flora"), case, state, 4), one(optimised(get("flora"), MOMENTUM), case, state, 4)
    assert not same_tasks(plain.state, wrapped.state)
    for key, x in plain.state.memory["flora"].items():
        assert wrapped.state.memory["flora"][key].tobytes() == x.tobytes()


WRAPPED = [
    (FFA, ADAM),
    (FFA, YOGI),
    (FFA, MOMENTUM),
    (CORE, ADAM),
    (CORE_LATER, YOGI),
    (FEDSA, ADAM),
    (FLORA, MOMENTUM),
    (FRLORA, MOMENTUM),
    (MethodConfig(name="flora", max_rank=3, warm_start=True), MOMENTUM),
]
wrapped = pytest.mark.parametrize(("case", "settings"), WRAPPED, ids=label)


@wrapped
def test_the_order_of_arrival_changes_no_byte(case: MethodConfig, settings: ServerConfig) -> None:
    method = optimised(get(case.name), settings)
    state = after(method, case, 2)
    protocol = method.protocol(state, cohort(case, 3))
    asks = next(protocol)
    answers = {client: said(client, asks[client], 3) for client in ("c", "a", "b")}
    with pytest.raises(StopIteration) as done:
        protocol.send(answers)
    plain = one(method, case, state, 3)
    assert encode_state(done.value.value.state) == encode_state(plain.state)
    assert done.value.value.report == plain.report


@wrapped
def test_nobody_is_refused_and_the_memory_is_intact(case: MethodConfig, settings: ServerConfig) -> None:
    """A round that failed is no step: repeated, it is what it would have been, whatever its number."""
    method = optimised(get(case.name), settings)
    state = after(method, case, 2)
    held = encode_state(state)
    protocol = method.protocol(state, cohort(case, 3))
    next(protocol)
    with pytest.raises(MethodError, match=r"no client answered in round 3 \(asked: 3\)"):
        protocol.send({})
    assert encode_state(state) == held
    cold = case.model_copy(update={"warm_start": False})  # a warm start's fresh rows are drawn by the round's number
    again, later = (one(method, cold, state, t, lambda client, ask: said(client, ask, 3)).state for t in (3, 8))
    assert again.memory[OWNER]["steps"] == later.memory[OWNER]["steps"] == (2 if case is CORE_LATER else 3)
    assert same_tasks(again, later)
    for key, x in again.memory[OWNER].items():
        assert later.memory[OWNER][key].tobytes() == x.tobytes()


@wrapped
def test_what_is_frozen_and_what_others_remember_are_the_same_bytes(case: MethodConfig, settings: ServerConfig) -> None:
    method = optimised(get(case.name), settings)
    state = after(method, case, 2)
    old = Adapter({n: Factors(np.ones((1, m.inp)), np.ones((m.out, 1))) for n, m in LAYOUT.modules.items()})
    done = Task(name="old", blocks=(Block(adapter=old, born=1),), extras={"score.bias": np.ones(3)}, sealed=True)
    other = {"x": np.arange(3.0)}
    state = replace(state, tasks={"old": done, **state.tasks}, memory={"someone": other, **state.memory})
    closed = one(method, case, state, 3)
    assert closed.state.tasks["old"] is done
    assert closed.state.memory["someone"] is other
    assert closed.state.version == state.version + 1
    pair, new = state.open_task.pair, closed.state.open_task.pair
    if pair is not None and new is not None:
        still, moves = ("b", "a") if case is FEDSA else ("a", "b")
        for n, f in pair.items():
            assert getattr(new[n], still).tobytes() == getattr(f, still).tobytes()
            assert getattr(new[n], moves).tobytes() != getattr(f, moves).tobytes()
            assert new[n].scale == f.scale
    for key in basis(case.name, state):
        assert basis(case.name, closed.state)[key].tobytes() == basis(case.name, state)[key].tobytes()


@wrapped
def test_a_resumed_run_is_the_same_run(case: MethodConfig, settings: ServerConfig) -> None:
    """A state survives its bytes, and the round that follows is the same to the byte."""
    method = optimised(get(case.name), settings)
    state = after(method, case, 3)
    data = encode_state(state)
    read = decode_state(data)
    assert encode_state(read) == data
    straight, resumed = (one(method, case, s, 4) for s in (state, read))
    assert encode_state(straight.state) == encode_state(resumed.state)
    assert straight.report == resumed.report
    assert {x.dtype for key, x in state.memory[OWNER].items() if ":" in key} == {np.dtype(np.float32)}
    steps = state.memory[OWNER]["steps"]
    assert (steps.shape, float(steps[0])) == ((1,), 2.0 if case is CORE_LATER else 3.0)


@wrapped
def test_shares_are_of_those_who_answered_and_asks_are_the_methods_own(
    case: MethodConfig, settings: ServerConfig
) -> None:
    method = optimised(get(case.name), settings)
    assert (method.name, method.open, method.released) == (case.name, get(case.name).open, get(case.name).released)
    state, answers = after(method, case, 2), {}
    protocol, plain = method.protocol(state, cohort(case, 3)), get(case.name).protocol(state, cohort(case, 3))
    asks, own = next(protocol), next(plain)
    for client, ask in asks.items():
        assert ask.plan == own[client].plan
        assert ask.blocks == own[client].blocks
        assert {k: x.tobytes() for k, x in ask.arrays.items()} == {
            k: x.tobytes() for k, x in own[client].arrays.items()
        }
        answers[client] = said(client, ask, 3)
    del answers["b"]
    with pytest.raises(StopIteration) as done:
        protocol.send({c: replace(a, examples=7 * a.examples) for c, a in answers.items()})
    only = one(method, case, state, 3, who=[m for m in WHO if m.id != "b"]).state
    some = done.value.value.state
    assert far(dense(some), dense(only)) <= 1e-6 * size_of(dense(only))
    assert far(trained(case.name, some), trained(case.name, only)) <= 1e-6 * size_of(trained(case.name, only))


@pytest.mark.parametrize("case", [FFA, FLORA], ids=lambda c: c.name)
def test_an_echo_moves_by_what_is_carried(case: MethodConfig) -> None:
    """Nobody learns anything in round 3: the model moves by beta1 times its last move."""

    def echo(client: str, ask: Ask) -> Answer:
        return said(client, ask, 3, size=0.0)

    method = optimised(get(case.name), MOMENTUM)
    before, state = after(method, case, 1), after(method, case, 2)
    then = one(method, case, state, 3, echo).state
    last = {n: x - dense(before)[n] for n, x in dense(state).items()}
    move = {n: x - dense(state)[n] for n, x in dense(then).items()}
    assert far(move, {n: 0.9 * x for n, x in last.items()}) < 1e-5 * size_of(last)
    untouched = one(optimised(get(case.name), MOMENTUM), case, start(case), 1, echo)
    assert untouched.report["server_step_norm"] == 0.0


@pytest.mark.parametrize("settings", [ADAM, YOGI, MOMENTUM], ids=lambda s: s.optimizer)
def test_entries_that_nobody_ever_trained_keep_their_bytes(settings: ServerConfig) -> None:
    method, state = optimised(get("ffa-lora"), settings), start(FFA)
    for t in (1, 2, 3):
        state = one(method, FFA, state, t, who=WHO[1:]).state  # rank 2 at most; the pair has rank 3
    for key, x in trained("ffa-lora", state).items():
        if key.startswith("B:"):
            assert x[:, :2].all()
            assert not x[:, 2:].any()


def test_what_goes_with_what() -> None:
    can = {(m, o) for m in METHOD_NAMES for o in ("none", "momentum", "adam", "yogi") if pair_mistake(m, o) is None}
    fixed = {"fed-sb", "fedsa-lora", "ffa-lora"}
    assert can == {(m, "none") for m in METHOD_NAMES} | {
        (m, o) for m in fixed for o in ("momentum", "adam", "yogi")
    } | {("flora", "momentum"), ("frlora", "momentum")}
    assert fixed == set(COORDINATES)
    assert set(PRODUCTS) == {"flora", "frlora"}


@pytest.mark.parametrize(
    ("method", "settings", "why"),
    [
        ("fedit", ADAM, r"adam does not go with fedit: .*\(B M\)\(M\^-1 A\) = B A"),
        ("fedit", MOMENTUM, "momentum does not go with fedit"),
        ("flora", YOGI, "yogi does not go with flora: .*no factored form"),
    ],
)
def test_other_pairs_are_refused_with_those_that_can(method: str, settings: ServerConfig, why: str) -> None:
    with pytest.raises(MethodError, match=why) as error:
        optimised(get(method), settings)
    assert (
        "adam, yogi and momentum go with fed-sb, fedsa-lora and ffa-lora; momentum also with flora and frlora"
        in str(error.value)
    )


@pytest.mark.parametrize("method", METHOD_NAMES)
def test_every_refusal_has_a_reason_of_its_own(method: str) -> None:
    text = pair_mistake(method, "adam")
    assert text is None or "not known" not in text
    assert "is not known to move arrays" in str(pair_mistake("mine", "adam"))
    for name, word in (("rolora", "take turns"), ("fedsvd", "rotated"), ("flexlora", "new SVD")):
        assert word in str(pair_mistake(name, "momentum"))


def test_none_is_the_method() -> None:
    assert optimised(get("fedit"), ServerConfig()) is get("fedit")


def test_moments_of_other_arrays_are_refused() -> None:
    state = after(optimised(get("ffa-lora"), MOMENTUM), FFA, 1)
    with pytest.raises(MethodError, match=r"adam: the memory of the server holds moments .*first v:B:q: none, needed"):
        one(optimised(get("ffa-lora"), ADAM), FFA, state, 2)
    state = after(optimised(get("ffa-lora"), ADAM), FFA, 1)
    with pytest.raises(MethodError, match=r"momentum: the memory .*first v:B:q: \(7, 3\), needed none"):
        one(optimised(get("ffa-lora"), MOMENTUM), FFA, state, 2)


def test_a_round_that_chooses_its_basis_is_no_step() -> None:
    """Where the frozen factor is another one afterwards, the round is taken as it is and old moments are dropped."""
    ffa, turn = get("ffa-lora"), iter((False, True, False))

    def turning(state: GlobalState, group: Cohort) -> Round:
        closed: Closed = yield from ffa.protocol(state, group)
        if not next(turn):
            return closed
        assert closed.state.open_task.pair is not None
        pair = Adapter({n: Factors(-f.a, f.b, f.scale) for n, f in closed.state.open_task.pair.items()})
        task = replace(closed.state.open_task, pair=pair)
        return replace(closed, state=replace(closed.state, tasks={task.name: task}))

    method, state = optimised(replace(ffa, protocol=turning), MOMENTUM), start(FFA)
    state = one(method, FFA, state, 1).state
    assert OWNER in state.memory
    plain = trained("ffa-lora", one(ffa, FFA, state, 2).state)
    closed = one(method, FFA, state, 2)
    assert all(x.tobytes() == plain[key].tobytes() for key, x in trained("ffa-lora", closed.state).items())
    assert OWNER not in closed.state.memory
    assert "server_step_norm" not in closed.report
    assert one(method, FFA, closed.state, 3).state.memory[OWNER]["steps"] == 1


def test_a_method_whose_rounds_are_no_single_block_is_refused() -> None:
    def still(state: GlobalState, group: Cohort) -> Round:
        yield {}
        return Closed(state=state.with_task(state.open_task), report={})

    method = optimised(replace(get("flora"), protocol=still), MOMENTUM)
    with pytest.raises(MethodError, match=r"flora: momentum needs each round to add one update .*this one added 0"):
        play(method.protocol(opened("base", LAYOUT, 0), cohort(FLORA, 1)), lambda client, ask: said(client, ask, 1))


@pytest.mark.parametrize(("case", "settings"), [(FLORA, MOMENTUM), (CORE, ADAM)], ids=label)
def test_a_robust_rule_may_be_under_it(case: MethodConfig, settings: ServerConfig) -> None:
    """The optimiser takes the move that the rule left, and both keep their memory."""
    rule = guarded(get(case.name), RobustConfig(rule="norm-bound", bound=0.3))
    state = start(case)
    for t in (1, 2):
        state = one(optimised(rule, settings), case, state, t).state
    assert {OWNER, "robust"} <= state.memory.keys()
    idle = ServerConfig(optimizer="momentum", rate=1.0, beta1=0.0)
    assert same_tasks(one(optimised(rule, idle), case, start(case), 1).state, one(rule, case, start(case), 1).state)
    assert not same_tasks(one(rule, case, start(case), 1).state, one(get(case.name), case, start(case), 1).state)


def test_what_is_trained_can_be_written_back() -> None:
    for case in (*FIXED, FLORA):
        state = after(get(case.name), case, 2)
        arrays = trained(case.name, state)
        assert encode_state(with_trained(case.name, state, arrays)) == encode_state(state)
        doubled = with_trained(case.name, state, {key: 2 * x for key, x in arrays.items()})
        assert all((x == 2 * arrays[key]).all() for key, x in trained(case.name, doubled).items())
