"""Robust rules under every method that allows them; as functions of a Gram matrix they are in test_robust_rules.py."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from fedlora.adapter import Adapter, Array
from fedlora.config import MethodConfig, RobustConfig
from fedlora.errors import MethodError, RoundFailed
from fedlora.rng import stream
from fedlora.state import Answer, Ask, GlobalState, Layout, LocalTraining, Module, expected_shapes
from strategies import robust
from strategies.base import METHODS, Closed, Cohort, Member, Method, get
from strategies.gram import gram, head_change_of, stepped, update_of
from strategies.robust import MEMORY, guarded, pair_mistake
from strategies.robust_rules import (
    COORDINATE_RULES,
    clients_needed,
    coordinate_wise,
)

Float64 = NDArray[np.float64]
TRAINING = LocalTraining(learning_rate=1e-3, local_steps=1, local_epochs=None, batch_size=1)
LAYOUT = Layout(modules={"q": Module(out=7, inp=6), "v": Module(out=5, inp=8)}, head={"score.weight": (2, 5)})
RULES = ("norm-bound", "screen", "krum", "multi-krum", "geometric-median", "centred-clipping", "fltrust")
CASES = [
    *(MethodConfig(name=n) for n in sorted(METHODS) if not METHODS[n].personal),  # type: ignore[arg-type]
    MethodConfig(name="flora", warm_start=True),
    MethodConfig(name="fed-sb", basis="random"),
]
PAIRS = [(c, r) for c in CASES for r in (*RULES, *COORDINATE_RULES) if pair_mistake(c.name, r) is None]
pairs = pytest.mark.parametrize(
    ("case", "rule"), PAIRS, ids=[f"{r} {c.name}{' warm' * c.warm_start}{' random' * bool(c.basis)}" for c, r in PAIRS]
)


# Methods under a rule.


def members(ranks: list[int], scale: float = 2.0) -> tuple[Member, ...]:
    return tuple(Member(id=f"c{i}", rank=r, scale=scale) for i, r in enumerate(ranks))


def cohort(case: MethodConfig, who: tuple[Member, ...], round_: int = 1) -> Cohort:
    return Cohort(round=round_, rounds=9, members=who, settings=case, training=TRAINING, seed=7, progress=(0.0, 1.0))


def answer_to(ask: Ask, *, noise: float = 0.1, seed: int | None = None, examples: int = 10) -> Answer:
    """What the plan wants, moved by noise that is the client's own, or everybody's where `seed` is given."""
    plan = ask.plan
    assert plan is not None
    rng = stream(plan.seed if seed is None else seed, "stand-in")
    arrays: dict[str, Array] = {}
    for key, shape in sorted(expected_shapes(plan, LAYOUT).items()):
        change = noise * rng.standard_normal(shape)
        start: Array = np.zeros(shape)
        if key.split(":")[0] not in plan.changes:
            fresh = rng.uniform(-1, 1, shape) if key.startswith("A:") else np.zeros(shape)
            start = ask.arrays.get(key, fresh)[tuple(slice(n) for n in shape)]
        arrays[key] = (start + change).astype(np.float32)
    return Answer(examples=examples, arrays=arrays)


def settings_of(rule: str, **kwargs: Any) -> RobustConfig:
    return RobustConfig(rule=rule, trusted="c2" if rule == "fltrust" else None, **kwargs)  # type: ignore[arg-type]


Change = Callable[[str, Ask, Answer], Answer]


def close(method: Method, state: GlobalState, group: Cohort, change: Change, **kwargs: Any) -> Closed:
    """One round in which `change(client, ask, honest answer)` is what the server receives."""
    protocol = method.protocol(state, group)
    asks = next(protocol)
    with pytest.raises(StopIteration) as done:
        protocol.send({c: change(c, ask, answer_to(ask, **kwargs)) for c, ask in asks.items()})
    closed: Closed = done.value.value
    assert closed.state.version == state.version + 1
    assert all(np.isfinite(x) for x in closed.report.values())
    return closed


def honestly(client: str, ask: Ask, answer: Answer) -> Answer:
    return answer


@cache
def learnt(case: MethodConfig, who: tuple[Member, ...]) -> GlobalState:
    """After two rounds; the second phase of methods that have two."""
    method = get(case.name)
    state = method.open("base", LAYOUT, who, case, 7)
    for t in (1, 2):
        state = close(method, state, cohort(case, who, t), honestly).state
    return state


def vector(state: GlobalState) -> Float64:
    """W_eff - W0 and the head, flat."""
    parts: list[Array] = [f.dense() for f in state.update().values()]
    return np.concatenate([x.astype(np.float64).reshape(-1) for x in [*parts, *state.open_task.extras.values()]])


ONE_MIND = members([3] * 7)
MIXED = members([3, 3, 2, 3, 3, 2, 3, 2])


def huge(client: str, ask: Ask, answer: Answer) -> Answer:
    return replace(answer, arrays=stepped(ask, answer, LAYOUT, -300.0)) if client == "c1" else answer


@cache
def moved_without_a_rule(case: MethodConfig, who: tuple[Member, ...], change: Change, seed: int | None) -> Float64:
    state = learnt(case, who)
    return vector(close(get(case.name), state, cohort(case, who, 3), change, seed=seed).state) - vector(state)


@pairs
def test_a_cohort_of_one_mind_moves_as_without_a_rule(case: MethodConfig, rule: str) -> None:
    state, group = learnt(case, ONE_MIND), cohort(case, ONE_MIND, 3)
    closed = close(guarded(get(case.name), settings_of(rule)), state, group, honestly, seed=5)
    move = moved_without_a_rule(case, ONE_MIND, honestly, 5)
    assert np.linalg.norm(move) > 0.1
    before = vector(state)
    np.testing.assert_allclose(vector(closed.state) - before, move, atol=4e-6 * np.linalg.norm(before))
    if "krum" not in rule:
        assert closed.report["quarantined"] == 0.0
    for facts in closed.clients.values():
        assert facts["cosine"] == pytest.approx(1.0, abs=1e-6)
        assert facts["robust_scale"] == pytest.approx(1.0)


@pairs
def test_one_huge_attacker_is_harmless(case: MethodConfig, rule: str) -> None:
    """The aggregate is no longer than about that of the honest; without the rule it is."""
    state, group = learnt(case, MIXED), cohort(case, MIXED, 3)
    good = np.linalg.norm(moved_without_a_rule(case, MIXED, honestly, None))
    assert np.linalg.norm(moved_without_a_rule(case, MIXED, huge, None)) > 10.0 * good
    closed = close(guarded(get(case.name), settings_of(rule)), state, group, huge)
    most = 3.0 if "krum" in rule or rule == "fltrust" else 1.5  # these take one update, or one length
    assert np.linalg.norm(vector(closed.state) - vector(state)) < most * good
    facts = closed.clients["c1"]
    assert facts["norm"] > 50 * closed.clients["c0"]["norm"]
    if rule in ("screen", "krum", "multi-krum"):
        assert facts["quarantined"] == 1.0
        assert facts["robust_weight"] == 0.0
    assert closed.report["quarantined"] == sum(f["quarantined"] for f in closed.clients.values())


SOME = [p for i, p in enumerate(PAIRS) if i % 5 == 0 or p[0].name in ("flora", "ffa-lora")]


@pytest.mark.parametrize(("case", "rule"), SOME, ids=lambda x: x if isinstance(x, str) else x.name)
def test_the_order_of_arrival_changes_no_byte(case: MethodConfig, rule: str) -> None:
    state, group = learnt(case, MIXED), cohort(case, MIXED, 3)
    ends = []
    for order in (range(8), [5, 2, 7, 0, 1, 6, 4, 3]):
        protocol = guarded(get(case.name), settings_of(rule)).protocol(state, group)
        asks = next(protocol)
        with pytest.raises(StopIteration) as done:
            protocol.send({f"c{i}": answer_to(asks[f"c{i}"], examples=3 + i) for i in order})
        ends.append(done.value.value)
    assert vector(ends[0].state).tobytes() == vector(ends[1].state).tobytes()
    assert ends[0].report == ends[1].report
    assert ends[0].clients == ends[1].clients


EXACT = [c for c in CASES if c.name in ("flora", "ffa-lora", "fedex-lora", "fedsvd", "rolora", "fed-sb")]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("case", EXACT, ids=lambda c: f"{c.name}{' warm' * c.warm_start}{' random' * bool(c.basis)}")
def test_the_model_moves_by_the_rules_aggregate(case: MethodConfig, rule: str) -> None:
    """Under an exact method W_eff moves by sum_k w_k c_k D_k, formed densely, at mixed ranks, scales and counts."""
    who = tuple(Member(id=f"c{i}", rank=r, scale=s) for i, (r, s) in enumerate(
        zip([3, 2, 3, 1, 3, 2, 3, 3], [2.0, 0.5, 1.0, 3.0, 2.0, 2.0, 1.5, 1.0], strict=True)))  # fmt: skip
    state, group = learnt(case, who), cohort(case, who, 3)
    protocol = guarded(get(case.name), settings_of(rule)).protocol(state, group)
    asks = next(protocol)
    answers = {c: answer_to(ask, examples=5 + i) for i, (c, ask) in enumerate(asks.items())}
    strong = ("c1",) if rule == "norm-bound" else ()
    for c in strong:
        answers[c] = replace(answers[c], arrays=stepped(asks[c], answers[c], LAYOUT, 3.0))
    with pytest.raises(StopIteration) as done:
        protocol.send(answers)
    closed: Closed = done.value.value
    rows = []
    for c in sorted(asks):
        t = closed.clients[c]["robust_scale"]
        went = replace(answers[c], arrays=stepped(asks[c], answers[c], LAYOUT, t))
        parts = [f.dense() for f in update_of(asks[c], went, LAYOUT).values()]
        parts += [x for _, x in sorted(head_change_of(asks[c], went).items())]
        rows.append(np.concatenate([x.reshape(-1) for x in parts]))
    moves = np.stack(rows)
    w = np.array([closed.clients[c]["robust_weight"] for c in sorted(asks)])
    assert w.sum() == pytest.approx(1.0)
    got, want = vector(closed.state) - vector(state), w @ moves
    assert np.linalg.norm(got - want) < 3e-6 * max(np.linalg.norm(want), np.linalg.norm(vector(state)))
    for i, c in enumerate(sorted(asks)):
        cosine = moves[i] @ want / np.linalg.norm(moves[i]) / np.linalg.norm(want)
        assert closed.clients[c]["cosine"] == pytest.approx(float(cosine), abs=0.06)


def test_where_both_factors_move_the_norm_is_the_bound() -> None:
    case, who = MethodConfig(name="fedex-lora"), members([3] * 5)
    state, group = learnt(case, who), cohort(case, who, 3)
    for t, bound in ((1.0, 0.05), (4.0, 0.3)):
        closed = close(
            guarded(get(case.name), settings_of("norm-bound", bound=bound)), state, group,
            lambda c, ask, a, t=t: replace(a, arrays=stepped(ask, a, LAYOUT, t)) if c == "c0" else a,
        )  # fmt: skip
        asks = next(get(case.name).protocol(state, group))
        answer = answer_to(asks["c0"])
        step = t * closed.clients["c0"]["robust_scale"]
        went = replace(answer, arrays=stepped(asks["c0"], answer, LAYOUT, step))
        g = gram([update_of(asks["c0"], went, LAYOUT)], [head_change_of(asks["c0"], went)])
        assert np.sqrt(g[0, 0]) == pytest.approx(bound, rel=1e-5)
        assert closed.report["rescaled"] == 5.0


def test_fltrust_lengthens_short_updates() -> None:
    case, who = MethodConfig(name="fedit"), members([3] * 4)
    state, group = learnt(case, who), cohort(case, who, 3)

    def short(client: str, ask: Ask, answer: Answer) -> Answer:
        return replace(answer, arrays=stepped(ask, answer, LAYOUT, 0.01 if client == "c0" else 1.0))

    closed = close(guarded(get("fedit"), settings_of("fltrust")), state, group, short, seed=5)
    assert closed.clients["c0"]["robust_scale"] == pytest.approx(100.0, rel=1e-3)
    assert closed.clients["c2"] == {**closed.clients["c2"], "robust_weight": 0.0, "quarantined": 0.0}
    want = vector(close(get("fedit"), state, group, honestly, seed=5).state)
    np.testing.assert_allclose(vector(closed.state), want, atol=1e-4)


@pytest.mark.parametrize("rule", ["norm-bound", "screen", "geometric-median"])
@pytest.mark.parametrize("name", ["fedit", "frlora", "hetlora"])
def test_factors_whose_product_looks_honest_are_bounded(name: str, rule: str) -> None:
    """A times 1,000 and B divided by it is the same update, and ruins a mean of factors."""
    if pair_mistake(name, rule):
        return
    case, who = MethodConfig(name=name), members([3] * 6)  # type: ignore[arg-type]
    state, group = learnt(case, who), cohort(case, who, 3)

    def disguised(client: str, ask: Ask, answer: Answer) -> Answer:
        if client != "c0":
            return answer
        arrays: dict[str, Array] = {}
        for key, x in answer.arrays.items():
            start = (
                ask.arrays[key][tuple(slice(n) for n in x.shape)] if not key.startswith("head") else np.zeros(x.shape)
            )
            plan = ask.plan
            assert plan is not None
            start = start if key.split(":")[0] in plan.changes else np.zeros(x.shape)
            gauge = {"A": 1e3, "B": 1e-3, "h": 1.0}[key[0]]
            arrays[key] = (gauge * (start + x) - start).astype(np.float32)
        return replace(answer, arrays=arrays)

    group_asks = next(get(name).protocol(state, group))
    plain, turned = answer_to(group_asks["c0"]), disguised("c0", group_asks["c0"], answer_to(group_asks["c0"]))
    np.testing.assert_allclose(
        gram([update_of(group_asks["c0"], turned, LAYOUT)]),
        gram([update_of(group_asks["c0"], plain, LAYOUT)]),
        rtol=1e-2,
    )
    method = guarded(get(name), settings_of(rule))
    good = np.linalg.norm(vector(close(method, state, group, honestly).state) - vector(state))
    bad = np.linalg.norm(vector(close(method, state, group, disguised).state) - vector(state))
    ruined = np.linalg.norm(vector(close(get(name), state, group, disguised).state) - vector(state))
    assert bad < 2.0 * good
    assert ruined > 10.0 * good


@pytest.mark.parametrize("rule", [r for r in RULES if r != "fltrust"])
def test_a_claim_of_a_billion_examples_is_not_believed(rule: str) -> None:
    case, who = MethodConfig(name="flora"), members([3] * 8)
    state, group = learnt(case, who), cohort(case, who, 3)
    closed = close(
        guarded(get("flora"), settings_of(rule)), state, group,
        lambda c, ask, a: replace(a, examples=10**9) if c == "c0" else a,
    )  # fmt: skip
    assert closed.clients["c0"]["robust_weight"] <= 0.5 if "krum" in rule else 2 / 9 + 0.1


@pytest.mark.parametrize("rule", COORDINATE_RULES)
def test_rules_on_entries_give_ffa_one_answer(rule: str) -> None:
    case, who = MethodConfig(name="ffa-lora"), members([4, 4, 4, 2, 2, 1, 1])
    state, group = learnt(case, who), cohort(case, who, 3)
    protocol = guarded(get("ffa-lora"), settings_of(rule)).protocol(state, group)
    asks = next(protocol)
    answers = {c: answer_to(ask) for c, ask in asks.items()}
    with pytest.raises(StopIteration) as done:
        protocol.send(answers)
    closed: Closed = done.value.value
    pair, before = closed.state.open_task.pair, state.open_task.pair
    assert pair is not None and before is not None  # noqa: PT018
    for n in LAYOUT.modules:
        parts = [answers[c].arrays[f"B:{n}"].astype(np.float64) for c in sorted(answers)]
        want = coordinate_wise(parts, np.full(7, 1 / 7), rule, 0.2)[0]
        np.testing.assert_allclose(pair[n].b, before[n].b + want, atol=1e-6)
    heads = np.stack([answers[c].arrays["head:score.weight"] for c in sorted(answers)])
    centre = np.median(heads, axis=0) if rule == "median" else np.sort(heads, axis=0)[2:5].mean(axis=0)
    was = state.open_task.extras["score.weight"]
    np.testing.assert_allclose(closed.state.open_task.extras["score.weight"], was + centre, atol=1e-6)
    assert closed.report["held_columns"] == 0.0
    assert set(closed.clients["c0"]) == {"norm", "cosine", "robust_weight", "robust_scale", "quarantined"}


class Lazy(Mapping[str, Answer]):
    """Answers that are made when they are read, as a spool's are; counts the reads."""

    def __init__(self, asks: Mapping[str, Ask], change: Change) -> None:
        self.asks, self.change = asks, change
        self.reads: dict[str, int] = dict.fromkeys(asks, 0)

    def __getitem__(self, client: str) -> Answer:
        self.reads[client] += 1
        return self.change(client, self.asks[client], answer_to(self.asks[client]))

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self.asks))

    def __len__(self) -> int:
        return len(self.asks)


@pytest.mark.parametrize("passes", [1, 2])
@pytest.mark.parametrize(("name", "rule"), [("flora", "screen"), ("ffa-lora", "median")])
def test_answers_are_read_one_at_a_time_and_not_kept(
    name: str, rule: str, passes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    case, who = MethodConfig(name=name), members([3] * 6)  # type: ignore[arg-type]
    state, group = learnt(case, who), cohort(case, who, 3)
    ends = []
    for limit in (robust.PASS_BYTES, robust.PASS_BYTES if passes == 1 else 1):
        monkeypatch.setattr(robust, "PASS_BYTES", limit)
        protocol = guarded(get(name), settings_of(rule)).protocol(state, group)
        lazy = Lazy(next(protocol), lambda c, ask, a: replace(
            a, arrays=stepped(ask, a, LAYOUT, 100.0)) if c == "c1" else a)  # fmt: skip
        with pytest.raises(StopIteration) as done:
            protocol.send(lazy)
        ends.append(done.value.value)
    fold = 0 if rule == "median" else 1
    assert lazy.reads == {c: passes + (fold if c != "c1" else 0) for c in lazy.asks}
    np.testing.assert_allclose(vector(ends[0].state), vector(ends[1].state), rtol=1e-6, atol=1e-9)
    for c, facts in ends[0].clients.items():
        assert ends[1].clients[c] == pytest.approx(facts)


def test_what_is_logged_and_remembered() -> None:
    """Who was left out and for what, and how often each was so far; a client that leaves is not forgotten."""
    case, who = MethodConfig(name="flora", warm_start=True), members([3, 2, 3, 3, 2, 3])
    method = guarded(get("flora"), settings_of("screen"))
    state = learnt(case, who)
    memory = state.memory

    def hostile(*names: str) -> Change:
        return lambda c, ask, a: replace(a, arrays=stepped(ask, a, LAYOUT, -50.0)) if c in names else a

    first = close(method, state, cohort(case, who, 3), hostile("c1"))
    facts = first.clients["c1"]
    assert {k for k in facts if k.startswith("flagged")} >= {"flagged_norm", "flagged_distance"}
    assert facts["quarantined"] == 1.0
    assert set(first.clients["c0"]) == {"norm", "cosine", "robust_weight", "robust_scale", "quarantined"}
    assert first.report["quarantined"] == 1.0
    assert first.state.memory.keys() == {*memory, MEMORY}
    second = close(method, first.state, cohort(case, who[:5], 4), hostile("c1", "c3"))
    third = close(method, second.state, cohort(case, who, 5), honestly)
    for closed, counts in ((first, {"c1": 1}), (second, {"c1": 2, "c3": 1}), (third, {"c1": 2, "c3": 1})):
        remembered = closed.state.memory[MEMORY]
        assert {c: x.tolist() for c, x in remembered.items()} == {c: [n] for c, n in counts.items()}
        assert {x.dtype for x in remembered.values()} == {np.dtype(np.float32)}


def test_the_methods_own_facts_stay() -> None:
    case, who = MethodConfig(name="hetlora"), members([3] * 5)
    closed = close(
        guarded(get("hetlora"), settings_of("norm-bound")), learnt(case, who), cohort(case, who, 3), honestly
    )
    assert {"rank", "weight", "robust_weight"} <= set(closed.clients["c0"])
    assert {"aggregation_error", "quarantined", "rescaled"} <= set(closed.report)


def test_weights_travel_as_whole_numbers_and_no_weight_stays_at_home() -> None:
    seen: dict[str, Answer] = {}
    flora = get("flora")

    def spy(state: GlobalState, group: Cohort) -> Any:
        answers = yield next(flora.protocol(state, group))
        seen.update(answers)
        assert len(answers) == len(list(answers)) == 3
        assert "c0" not in answers
        return Closed(state=replace(state, version=state.version + 1), report={})

    case, who = MethodConfig(name="flora"), members([3] * 4)
    state = learnt(case, who)
    close(
        guarded(replace(flora, protocol=spy), settings_of("screen")), state, cohort(case, who, 3),
        lambda c, ask, a: replace(a, arrays=stepped(ask, a, LAYOUT, 50.0)) if c == "c0" else a,
    )  # fmt: skip
    assert {type(a.examples) for a in seen.values()} == {int}
    assert sum(a.examples for a in seen.values()) == pytest.approx(2**40, abs=3)


def round_with(method: Method, case: MethodConfig, who: tuple[Member, ...], here: tuple[str, ...]) -> None:
    state = method.open("base", LAYOUT, who, case, 7)
    protocol = method.protocol(state, cohort(case, who))
    asks = next(protocol)
    protocol.send({c: answer_to(asks[c]) for c in here})


def test_too_few_for_a_rule() -> None:
    case = MethodConfig(name="flora")
    for rule in ("krum", "multi-krum"):
        method = guarded(get("flora"), settings_of(rule))
        with pytest.raises(
            MethodError,
            match=rf"{rule} at robust.attackers = 0.2 needs at least {clients_needed(0.2)} clients.*; 4 are",
        ):
            round_with(method, case, members([2] * 4), ())
        with pytest.raises(
            RoundFailed, match="against 1 hostile clients needs more than 4 answers, and 4 of 5 clients"
        ):
            round_with(method, case, members([2] * 5), ("c0", "c1", "c2", "c3"))
    ffa = MethodConfig(name="ffa-lora")
    method = guarded(get("ffa-lora"), settings_of("median"))
    with pytest.raises(MethodError, match=r"median at robust.attackers = 0.2 needs more than 2 clients a round, and 2"):
        round_with(method, ffa, members([2] * 2), ())
    with pytest.raises(RoundFailed, match="median against 1 hostile clients needs more than 2 answers, and 2 of 3"):
        round_with(method, ffa, members([2] * 3), ("c0", "c1"))


def test_the_trusted_client_must_be_there() -> None:
    case, method = MethodConfig(name="flora"), guarded(get("flora"), settings_of("fltrust"))
    with pytest.raises(MethodError, match="the trusted client c2 is not among the 2 that are asked"):
        round_with(method, case, members([2] * 2), ())
    with pytest.raises(RoundFailed, match="the trusted client c2 did not answer"):
        round_with(method, case, members([2] * 4), ("c0", "c1", "c3"))
    with pytest.raises(MethodError, match=r"name it in robust.trusted"):
        guarded(get("flora"), RobustConfig(rule="fltrust"))


def test_all_left_out_is_a_round_that_failed_and_the_state_is_intact() -> None:
    case, who = MethodConfig(name="flora"), members([3] * 4)
    state = learnt(case, who)
    before = vector(state).tobytes()
    protocol = guarded(get("flora"), settings_of("fltrust")).protocol(state, cohort(case, who, 3))
    asks = next(protocol)
    answers = {c: answer_to(ask, seed=1) for c, ask in asks.items()}
    for c in ("c0", "c1", "c3"):
        answers[c] = replace(answers[c], arrays=stepped(asks[c], answers[c], LAYOUT, -1.0))
    with pytest.raises(RoundFailed, match="all are left out"):
        protocol.send(answers)
    assert vector(state).tobytes() == before


def test_nobody_is_refused_by_the_method_itself() -> None:
    for rule in RULES:
        with pytest.raises(MethodError, match="no client answered in round 1"):
            round_with(guarded(get("flora"), settings_of(rule)), MethodConfig(name="flora"), members([2] * 7), ())


def test_values_that_are_not_finite_are_refused_by_client() -> None:
    case, who = MethodConfig(name="flora"), members([2] * 5)
    method = guarded(get("flora"), settings_of("screen"))
    protocol = method.protocol(method.open("base", LAYOUT, who, case, 7), cohort(case, who))
    asks = next(protocol)
    answers = {c: answer_to(ask) for c, ask in asks.items()}
    answers["c3"].arrays["B:q"][0, 0] = np.nan
    with pytest.raises(MethodError, match="the updates of c3 are not finite"):
        protocol.send(answers)


def test_no_rule_is_the_method_itself() -> None:
    assert guarded(get("flora"), RobustConfig()) is get("flora")
    assert pair_mistake("fedsa-lora", "none") is None


@pytest.mark.parametrize("rule", [*RULES, *COORDINATE_RULES])
def test_which_pairs_go_together(rule: str) -> None:
    for name, method in METHODS.items():
        wrong = pair_mistake(name, rule)
        if name == "fedsa-lora":
            assert wrong is not None
        elif rule in COORDINATE_RULES:
            assert (wrong is None) == (name == "ffa-lora")
        elif name == "hetlora":
            assert (wrong is None) == (rule in ("norm-bound", "screen", "krum", "multi-krum"))
        else:
            assert wrong is None
        if wrong:
            with pytest.raises(MethodError) as refused:
                guarded(method, settings_of(rule))
            assert str(refused.value) == wrong
            assert rule in wrong


def test_a_method_without_a_common_model_is_refused_whatever_its_name() -> None:
    own = replace(get("flora"), name="mine", personal=True)
    with pytest.raises(MethodError, match="screen needs a common model, and mine has none"):
        guarded(own, settings_of("screen"))


def test_two_phases_are_two_judgements() -> None:
    """A method that asks twice a round: who is left out in either phase counts once."""
    flora = get("flora")

    def twice(state: GlobalState, group: Cohort) -> Any:
        for _ in range(2):
            answers = yield next(flora.protocol(state, group))
            assert len(answers) == 4
        return Closed(state=replace(state, version=state.version + 1), report={"mine": 1.0})

    case, who = MethodConfig(name="flora"), members([3] * 5)
    state = learnt(case, who)
    protocol = guarded(replace(flora, protocol=twice), settings_of("screen")).protocol(state, cohort(case, who, 3))
    asks = next(protocol)

    def answers(bad: str) -> dict[str, Answer]:
        made = {c: answer_to(ask) for c, ask in asks.items()}
        return made | {bad: replace(made[bad], arrays=stepped(asks[bad], made[bad], LAYOUT, 90.0))}

    protocol.send(answers("c1"))
    with pytest.raises(StopIteration) as done:
        protocol.send(answers("c4"))
    closed: Closed = done.value.value
    assert {c for c, f in closed.clients.items() if f["quarantined"]} == {"c1", "c4"}
    assert closed.report == {"mine": 1.0, "quarantined": 2.0, "rescaled": 0.0}
    assert set(closed.state.memory[MEMORY]) == {"c1", "c4"}
    assert isinstance(closed.state.update(), Adapter)
