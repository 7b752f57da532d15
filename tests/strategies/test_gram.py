"""Updates of the product, and their Gram matrix, against dense float64 oracles."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import NDArray

from fedlora.adapter import Adapter, Array, Factors
from fedlora.config import MethodConfig
from fedlora.errors import AdapterError, MethodError
from fedlora.rng import public_orthonormal
from fedlora.state import Answer, Ask, GlobalState, Layout, LocalTraining, Module, TrainPlan, expected_shapes
from strategies import gram as gram_module
from strategies.base import METHODS, Cohort, Member, get
from strategies.gram import (
    Step,
    gram,
    head_change_of,
    require_known,
    squared_at,
    step_of,
    stepped,
    update_of,
    way_to,
)

Float64 = NDArray[np.float64]
TRAINING = LocalTraining(learning_rate=1e-3, local_steps=1, local_epochs=None, batch_size=1)
LAYOUT = Layout(
    modules={"tall": Module(out=11, inp=6), "square": Module(out=8, inp=8), "wide": Module(out=5, inp=9)},
    head={"score.weight": (3, 8), "score.bias": (3,)},
)
CASES = [
    *(MethodConfig(name=n) for n in sorted(METHODS) if not METHODS[n].personal),  # type: ignore[arg-type]
    MethodConfig(name="flora", warm_start=True),
    MethodConfig(name="fed-sb", basis="random"),
]
every = pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c.name} {c.warm_start} {c.basis}")


def random_adapter(rng: np.random.Generator, rank: int, scale: float = 1.0) -> Adapter:
    return Adapter(
        {
            n: Factors(rng.normal(size=(rank, m.inp)), rng.normal(size=(m.out, rank)), scale)
            for n, m in LAYOUT.modules.items()
        }
    )


def flat(adapter: Adapter, head: Mapping[str, Array] | None = None) -> Float64:
    """The products, and the head, as one long vector."""
    parts = [f.scale * (f.b.astype(np.float64) @ f.a.astype(np.float64)) for f in adapter.values()]
    return np.concatenate([x.reshape(-1) for x in [*parts, *(x for _, x in sorted((head or {}).items()))]])


def dense_gram(updates: Sequence[Adapter], heads: Sequence[Mapping[str, Array]] = ()) -> Float64:
    rows = np.stack([flat(u, heads[i] if heads else None) for i, u in enumerate(updates)])
    return np.asarray(rows @ rows.T)


def heads_of(rng: np.random.Generator, count: int) -> list[dict[str, Array]]:
    return [{n: rng.normal(size=s) for n, s in LAYOUT.head.items()} for _ in range(count)]


@pytest.mark.parametrize("tile", [1, 7, 2048])
@pytest.mark.parametrize("ranks", [[3, 3, 3], [1, 5, 2, 4, 1, 6], [0, 3, 0, 2], [0, 0], [4]])
def test_the_gram_matrix_is_the_dense_one(tile: int, ranks: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gram_module, "TILE", tile)
    rng = np.random.default_rng(1)
    updates = [random_adapter(rng, r, s) for r, s in zip(ranks, rng.uniform(-3, 3, len(ranks)), strict=True)]
    heads = heads_of(rng, len(ranks))
    np.testing.assert_allclose(gram(updates), dense_gram(updates), rtol=1e-12, atol=1e-12)
    got = gram(updates, heads)
    np.testing.assert_allclose(got, dense_gram(updates, heads), rtol=1e-12, atol=1e-12)
    assert (got == got.T).all()
    assert got.dtype == np.float64


def test_ranks_may_differ_from_module_to_module() -> None:
    rng = np.random.default_rng(2)
    mixed = [random_adapter(rng, r) for r in (1, 2, 3)]
    updates = [Adapter({n: mixed[(i + j) % 3][n] for j, n in enumerate(LAYOUT.modules)}) for i in range(3)]
    np.testing.assert_allclose(gram(updates), dense_gram(updates), rtol=1e-12)


def test_factors_of_the_same_product_are_the_same_update() -> None:
    rng = np.random.default_rng(3)
    updates = [random_adapter(rng, 3) for _ in range(3)]
    turned = []
    for u in updates:
        m = rng.normal(size=(3, 3))
        turned.append(Adapter({n: Factors(np.linalg.inv(m) @ f.a, f.b @ m) for n, f in u.items()}))
    np.testing.assert_allclose(gram(turned), gram(updates), rtol=1e-9)


def test_nearly_equal_updates_keep_their_distance() -> None:
    """At a step of 1e-4 float32 products of factors are off by the whole distance or more; float64 are not."""
    rng = np.random.default_rng(4)
    a, b = rng.normal(size=(8, 64)).astype(np.float32), rng.normal(size=(64, 8)).astype(np.float32)
    other = b + np.float32(1e-4) * rng.normal(size=b.shape).astype(np.float32)
    g = gram([Adapter({"q": Factors(a, b)}), Adapter({"q": Factors(a, other)})])
    want = float(np.sum(((other.astype(np.float64) - b) @ a.astype(np.float64)) ** 2))
    assert g[0, 0] + g[1, 1] - 2 * g[0, 1] == pytest.approx(want, rel=1e-5)

    def single(x: NDArray[np.float32], y: NDArray[np.float32]) -> np.float32:
        return np.sum((x.T @ y) * (a @ a.T), dtype=np.float32)

    in_float32 = float(single(b, b) + single(other, other) - 2 * single(b, other))
    assert abs(in_float32 - want) > 0.99 * want


def test_what_does_not_fit_is_refused() -> None:
    rng = np.random.default_rng(5)
    with pytest.raises(MethodError, match="of 2 updates needs as many heads or none, got 1"):
        gram([random_adapter(rng, 2), random_adapter(rng, 2)], heads_of(rng, 1))
    with pytest.raises(AdapterError, match="modules differ"):
        gram([random_adapter(rng, 2), Adapter({"other": Factors(np.ones((1, 2)), np.ones((2, 1)))})])
    assert gram([]).shape == (0, 0)


def trained(ask: Ask, rng: np.random.Generator, noise: float = 0.1) -> tuple[Answer, Float64]:
    """An answer to the letter of its plan, and what the client's product and head moved by, formed densely."""
    plan = ask.plan
    assert plan is not None
    start: dict[str, Float64] = {k: x.astype(np.float64) for k, x in ask.arrays.items() if not k.startswith("probe:")}
    for n, m in LAYOUT.modules.items():
        if plan.a_from == "fresh":
            start[f"A:{n}"] = rng.uniform(-1, 1, (plan.rows, m.inp)).astype(np.float32).astype(np.float64)
        elif plan.a_from == "public":
            a = public_orthonormal(plan.a_seed, "basis", n, rows=plan.rows, cols=m.inp)
            start[f"A:{n}"] = a.astype(np.float32).astype(np.float64)
        if plan.b_from == "zero":
            start[f"B:{n}"] = np.zeros((m.out, plan.rows))
        elif plan.b_from == "public":
            b = public_orthonormal(plan.a_seed, "basis-b", n, rows=plan.rows, cols=m.out)
            start[f"B:{n}"] = b.T.astype(np.float32).astype(np.float64)
    end = {k: x.copy() for k, x in start.items()}
    sent: dict[str, Array] = {}
    for key, x in end.items():
        which = key.split(":")[0]
        first = {
            "A": (slice(plan.rank),),
            "B": (slice(None), slice(plan.rank)),
            "R": (slice(plan.rank), slice(plan.rank)),
        }.get(which, ())
        if which in plan.train:
            x[first] = (x[first] + noise * rng.normal(size=x[first].shape)).astype(np.float32)
        if which in plan.send:
            value = x[first] - start[key][first] if which in plan.changes else x[first]
            sent[key] = value.astype(np.float32)
            x[first] = sent[key].astype(np.float64) + (start[key][first] if which in plan.changes else 0.0)
    assert {k: x.shape for k, x in sent.items()} == expected_shapes(plan, LAYOUT)

    def product(arrays: Mapping[str, Float64], n: str) -> Float64:
        core = arrays[f"R:{n}"] if plan.core else np.eye(plan.rows)
        return np.asarray(plan.scale * arrays[f"B:{n}"] @ core @ arrays[f"A:{n}"])

    moves = [product(end, n) - product(start, n) for n in sorted(LAYOUT.modules)]
    moves += [end[f"head:{n}"] - start[f"head:{n}"] for n in sorted(LAYOUT.head)]
    return Answer(examples=1, arrays=sent), np.concatenate([x.reshape(-1) for x in moves])


def opened(case: MethodConfig) -> tuple[GlobalState, Cohort]:
    who = tuple(Member(id=f"c{i}", rank=r, scale=s) for i, (r, s) in enumerate([(4, 2.0), (1, 0.5), (3, 1.7)]))
    cohort = Cohort(
        round=1, rounds=9, members=who, settings=case, training=TRAINING, seed=7, progress=(0.0, 1.0)
    )  # fmt: skip
    return get(case.name).open("base", LAYOUT, who, case, 7), cohort


def rounds_of(case: MethodConfig, rng: np.random.Generator) -> list[tuple[Ask, Answer, Float64]]:
    """Asks, answers and moves of three rounds."""
    state, cohort = opened(case)
    seen: list[tuple[Ask, Answer, Float64]] = []
    for t in (1, 2, 3):
        protocol = get(case.name).protocol(state, replace(cohort, round=t))
        asks = next(protocol)
        made = {c: (ask, *trained(ask, rng)) for c, ask in asks.items()}
        seen += made.values()
        with pytest.raises(StopIteration) as done:
            protocol.send({c: m[1] for c, m in made.items()})
        state = done.value.value.state
    return seen


@every
def test_an_update_is_what_the_product_moved_by(case: MethodConfig) -> None:
    for ask, answer, moved in rounds_of(case, np.random.default_rng(6)):
        got = flat(update_of(ask, answer, LAYOUT), head_change_of(ask, answer))
        np.testing.assert_allclose(got, moved, atol=1e-12 * np.linalg.norm(moved) + 1e-14)
        assert np.linalg.norm(moved) > 0.01


@every
@pytest.mark.parametrize("t", [0.0, 0.3, 1.0, 2.5, -1.0])
def test_a_share_of_the_way(case: MethodConfig, t: float) -> None:
    """Linear where one factor moves or only the product counts; else t P + t^2 Q, in every module."""
    for ask, answer, moved in rounds_of(case, np.random.default_rng(7)):
        part = replace(answer, arrays=stepped(ask, answer, LAYOUT, t))
        assert {x.dtype for x in part.arrays.values()} == {np.dtype(np.float32)}
        want = []
        for n, m in sorted(LAYOUT.modules.items()):
            step = step_of(ask, answer, n, m)
            bent = step.first is not None and step.second is not None
            terms = [(t, step.first), (t * t, step.second)] if bent else [(t, step.update)]
            want.append(sum(c * f.dense() for c, f in terms if f is not None))
        flat_want = np.concatenate(
            [x.reshape(-1) for x in [*want, *(t * h for _, h in sorted(head_change_of(ask, answer).items()))]]
        )
        got = flat(update_of(ask, part, LAYOUT), head_change_of(ask, part))
        np.testing.assert_allclose(got, flat_want, atol=2e-6 * max(1.0, abs(t)) ** 2)
        if t == 1.0:
            np.testing.assert_allclose(flat_want, moved, atol=1e-12)
            assert all(part.arrays[k] is x for k, x in answer.arrays.items())


def test_which_updates_bend() -> None:
    """Only where a method averages both factors from a given start is a share of the way not a share of the update."""
    bent = set()
    for case in CASES:
        for ask, answer, _ in rounds_of(case, np.random.default_rng(8)):
            step = step_of(ask, answer, "tall", LAYOUT.modules["tall"])
            if step.first is not None and step.second is not None:
                bent.add(case.name if not case.warm_start else "flora warm")
                assert step.factors == pytest.approx(
                    float(np.sum(step.second.a**2) + np.sum(step.second.b**2)), rel=1e-12
                )
    assert bent - {"flora warm"} == {"fedex-lora", "fedit", "frlora", "hetlora", "lora-fair"}


def test_an_absolute_core_is_compared_with_what_was_sent() -> None:
    rng = np.random.default_rng(9)
    plan = TrainPlan(
        method="m", rank=2, rows=3, scale=0.5, train=("R",), send=("R",), core=True, training=TRAINING
    )  # fmt: skip
    layout = Layout(modules={"q": Module(out=6, inp=5)})
    a, b, r0 = (rng.normal(size=s).astype(np.float32) for s in ((3, 5), (6, 3), (3, 3)))
    r = rng.normal(size=(2, 2)).astype(np.float32)
    ask = Ask(plan=plan, arrays={"A:q": a, "B:q": b, "R:q": r0})
    answer = Answer(arrays={"R:q": r})
    want = 0.5 * b[:, :2].astype(np.float64) @ (r.astype(np.float64) - r0[:2, :2]) @ a[:2]
    np.testing.assert_allclose(update_of(ask, answer, layout)["q"].dense(), want, atol=1e-12)
    part = replace(answer, arrays=stepped(ask, answer, layout, 0.25))
    np.testing.assert_allclose(update_of(ask, part, layout)["q"].dense(), 0.25 * want, atol=1e-6)


@pytest.mark.parametrize("length", [0.0, 0.2, 1.0, 3.0, 1e4])
def test_the_way_to_a_length(length: float) -> None:
    """By bisection, against the norms of the products themselves; a way that leads nowhere is gone to its end."""
    rng = np.random.default_rng(10)
    steps = []
    for _ in range(5):
        a0, da = rng.normal(size=(2, 3, 6))
        b0, db = rng.normal(size=(2, 7, 3))
        left = np.concatenate([db, b0], axis=1)
        steps.append(
            Step(
                update=Factors(np.concatenate([a0 + da, da]), left, 2.0),
                first=Factors(np.concatenate([a0, da]), left, 2.0),
                second=Factors(da, db, 2.0),
            )
        )
    steps.append(Step(update=Factors(rng.normal(size=(2, 6)), rng.normal(size=(7, 2)), 3.0)))
    ways = np.stack([s.polynomial for s in steps])
    whole = np.array([np.linalg.norm(s.update.dense()) for s in steps])
    np.testing.assert_allclose(squared_at(ways, np.ones(6)), whole**2, rtol=1e-12)
    t = way_to(ways, (length * whole) ** 2)
    for i, s in enumerate(steps):
        moves = [(t[i], s.update)] if s.first is None or s.second is None else [(t[i], s.first), (t[i] ** 2, s.second)]
        moved = sum((c * f.dense() for c, f in moves), np.zeros((7, 6)))
        assert np.linalg.norm(moved) == pytest.approx(length * whole[i], rel=1e-9, abs=1e-9)
    assert way_to(np.zeros((2, 3)), np.array([0.0, 1.0])).tolist() == [1.0, 1.0]


def test_an_absolute_head_is_compared_with_what_was_sent() -> None:
    plan = TrainPlan(method="m", rank=1, rows=1, scale=1.0, train=("head",), send=("head",), training=TRAINING)
    ask = Ask(plan=replace(plan, b_from="zero", a_from="fresh"), arrays={"head:w": np.full(2, 3.0, np.float32)})
    answer = Answer(arrays={"head:w": np.full(2, 5.0, np.float32)})
    assert head_change_of(ask, answer)["w"].tolist() == [2.0, 2.0]
    ask = replace(ask, plan=replace(plan, a_from="public", b_from="public"))
    half = replace(answer, arrays=stepped(ask, answer, LAYOUT, 0.5))
    assert half.arrays["head:w"].tolist() == [4.0, 4.0]
    assert {n: f.rank for n, f in update_of(ask, answer, LAYOUT).items()} == dict.fromkeys(LAYOUT.modules, 0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"keep": ("B",), "send": ("A",)},
            "m: the product of a client's update cannot be known, because B stays with it",
        ),
        ({"send": ("B",)}, "because A is trained, but not sent"),
        ({"core": True}, "because it trains more than the core"),
        ({"a_from": "fresh"}, "because only the client knows the fresh A"),
        ({"a_from": "fresh", "b_from": "zero", "changes": ("A",)}, "because only the client knows the fresh A"),
        ({"a_from": "fresh", "b_from": "zero", "train": ("B",), "send": ("B",)}, "because only the client knows"),
    ],
)
def test_a_product_that_cannot_be_known_is_refused(change: dict[str, object], message: str) -> None:
    plan = TrainPlan(method="m", rank=1, rows=1, scale=1.0, train=("A", "B"), send=("A", "B"), training=TRAINING)
    require_known(plan)
    require_known(replace(plan, a_from="fresh", b_from="zero"))
    wrong = replace(plan, **change)  # type: ignore[arg-type]
    for refuse in (
        lambda: require_known(wrong),
        lambda: update_of(Ask(plan=wrong), Answer(), LAYOUT),
        lambda: stepped(Ask(plan=wrong), Answer(), LAYOUT, 0.5),
    ):
        with pytest.raises(MethodError, match=message):
            refuse()


def test_an_ask_must_carry_what_its_plan_starts_from() -> None:
    plan = TrainPlan(method="m", rank=1, rows=1, scale=1.0, train=("B",), send=("B",), training=TRAINING)
    with pytest.raises(MethodError, match="the plan starts from A:tall, which its ask does not carry"):
        update_of(Ask(plan=plan), Answer(), LAYOUT)
    with pytest.raises(MethodError, match="an ask without a plan trains nothing"):
        update_of(Ask(), Answer(), LAYOUT)
