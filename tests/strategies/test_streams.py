"""Streams of tasks: what is sealed, what moves on, what is asked of whom; against dense sums of the tasks' products."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any, get_args

import numpy as np
import pytest
from numpy.typing import NDArray

from fedlora.adapter import Adapter, Array, stack
from fedlora.config import ContinualName, RunConfig, load_config, local_training
from fedlora.continual.design import design
from fedlora.continual.router import omega
from fedlora.discriminants import discriminants, scatter
from fedlora.errors import ConfigError, MethodError
from fedlora.rng import public_normal, stream
from fedlora.state import Answer, Ask, GlobalState, Layout, Measure, Module, Task, expected_arrays
from fedlora.subspace import public_rows
from fedlora.wire import blocks_id, decode_state, encode_state
from simulations.benchmarks.stand_in import follow
from strategies.base import Closed, Cohort, Member
from strategies.continual import WAYS, sealing
from strategies.continual.views import (
    FEATURES,
    HEAD,
    INPUTS,
    ONE_PAIR,
    blocks_known,
    blocks_of,
    head_of,
    joint_head,
    sealed_in_order,
)
from strategies.server_optimizer import OWNER as MOMENTS
from strategies.streams import streamed

Dense = dict[str, NDArray[np.float64]]
LABELS = ("w", "x", "y", "z")
LAYOUT = Layout(
    modules={
        "k": Module(out=7, inp=30, shares="k"),
        "q": Module(out=9, inp=30, shares="k"),
        "up": Module(out=8, inp=33, kind="conv1d"),
    },
    head={"dense.weight": (7, 7), "score.bias": (4,), "score.weight": (4, 7)},
    features=5,
)
EVERY_WAY = ("ewc", "incremental", "input-aware", "o-lora", "replay", "separate", "sequential", "subspace")
APART = tuple(way for way in EVERY_WAY if way not in ONE_PAIR)
once = lru_cache(maxsize=None)(public_normal)  # the same numbers, made once for all tests


@pytest.fixture(autouse=True)
def _made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("strategies.continual.moments.public_normal", once)


def tasks(*names: str, rounds: int = 2, **own: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [{"name": n, "rounds.count": rounds, **own.get(n, {})} for n in names]


THREE = tasks("a", "b", "c")


@dataclass
class Run:
    """A stream of tasks over stand-ins that move what they train by seeded noise; all that they were asked is kept."""

    way: str
    sets: Sequence[str] = ()
    tables: Sequence[Mapping[str, Any]] = field(default_factory=lambda: THREE)
    ranks: Sequence[int] = (3, 2, 3)
    layout: Layout = LAYOUT
    asked: list[tuple[int, dict[str, Ask]]] = field(default_factory=list)
    reports: list[dict[str, float]] = field(default_factory=list)

    def __post_init__(self) -> None:
        common = [f"continual.method={self.way}"] if self.tables else []
        common += ["method.name=fedit", f"tasks={json.dumps(self.tables)}"]
        self.config: RunConfig = load_config(None, [*common, *self.sets])
        self.method = streamed(self.config)
        self.who = tuple(Member(id=f"client-{i:05d}", rank=r, scale=2.0) for i, r in enumerate(self.ranks))

    def open(self) -> GlobalState:
        return self.method.open("base", self.layout, self.who, self.config.method, self.config.seed)

    def round(self, state: GlobalState, number: int, who: Sequence[int] | None = None) -> GlobalState:
        """One round with these of the clients, by default all."""
        cohort = Cohort(
            round=number,
            rounds=9,
            members=self.who if who is None else tuple(self.who[i] for i in who),
            settings=self.config.method,
            training=local_training(self.config),
            seed=self.config.seed,
            progress=(0.0, 1.0),
        )
        protocol, answers = self.method.protocol(state, cohort), None
        while True:
            try:
                asks = next(protocol) if answers is None else protocol.send(answers)
            except StopIteration as end:
                closed: Closed = end.value
                self.reports.append(closed.report)
                return closed.state
            self.asked.append((number, dict(asks)))
            answers = {client: self.answer(client, ask) for client, ask in asks.items()}

    def states(self, rounds: int = 6) -> Iterator[GlobalState]:
        state = self.open()
        for number in range(1, rounds + 1):
            state = self.round(state, number)
            yield state

    def last(self, rounds: int = 6) -> GlobalState:
        return list(self.states(rounds))[-1]

    def answer(self, client: str, ask: Ask) -> Answer:
        if ask.plan is not None:
            layout = self.layout if ask.subspace is None else self.layout.within(ask.subspace.dim)
            return follow(replace(ask, blocks=(), frozen=None), layout, 3 + int(client[-1]), 0.1).answer
        assert ask.measure is not None
        arrays: dict[str, Array] = {}
        for key, shape in expected_arrays(ask, self.layout).items():
            name, rng = key.split(":")[1], stream(1, ask.task, client, key)
            if key.startswith("sketch"):
                c = second_moment_of(ask.task, client, name, shape[0])
                arrays[key] = c @ once(ask.measure.seed, "sketch", name, shape=shape)
                arrays[f"energy:{name}"] = np.array([np.trace(c)])
            elif key.startswith("read"):
                arrays |= read_sums(ask.measure, ask.task, client, self.layout.features)
            elif not key.startswith("energy"):
                arrays[key] = rng.uniform(0.5, 1.0, shape)  # features and Fisher information: whatever, not negative
        return Answer(examples=10 + int(client[-1]), arrays={k: x.astype(np.float32) for k, x in arrays.items()})

    def training(self, number: int) -> dict[str, Ask]:
        """The one question of a round that is one of training."""
        [asks] = [asks for n, asks in self.asked if n == number and all(a.plan for a in asks.values())]
        return asks


def read_sums(what: Measure, task: str, client: str, width: int) -> dict[str, Array]:
    """What heads read of rows of all classes but the last, all of the first at client 0."""
    rng = stream(1, "read", task, client)
    h = rng.normal(size=(40, width)) + 1.0
    labels = np.zeros(40, int) if client.endswith("0") else rng.integers(0, what.reads - 1, 40)
    h[np.arange(40), labels % width] += 3.0
    total = np.stack([h[labels == c].sum(0) for c in range(what.reads)])
    test = public_normal(what.seed, "sketch", "feature", shape=(width, what.columns))
    counts = np.bincount(labels, minlength=what.reads)
    found = {"sum": total, "count": counts, "energy": np.array([np.sum(h**2)]), "sketch": h.T @ (h @ test)}
    return {f"read:{key}": x / len(h) for key, x in found.items()}


def second_moment_of(task: str, client: str, name: str, width: int) -> NDArray[np.float64]:
    """C `[width, width]` of a client's inputs in a task, of rank 12."""
    x = stream(1, "inputs", task, client, name).normal(size=(12, width)) * (1.0 + np.arange(width) % 5)
    return x.T @ x / 12


def dense(adapters: Sequence[Adapter], layout: Layout = LAYOUT) -> Dense:
    total = {n: np.zeros((m.out, m.inp)) for n, m in layout.modules.items()}
    for adapter in adapters:
        for n, f in adapter.items():
            total[n] += f.scale * (f.b.astype(np.float64) @ f.a.astype(np.float64))
    return total


def own_product(task: Task) -> Dense:
    """s B M N, summed over pair and blocks, in float64 throughout."""
    total = {n: np.zeros((m.out, m.inp)) for n, m in LAYOUT.modules.items()}
    for adapter in [b.adapter for b in task.blocks] + ([] if task.pair is None else [task.pair]):
        for n, f in adapter.items():
            a = f.a.astype(np.float64) @ task.basis[n].astype(np.float64) if task.basis else f.a.astype(np.float64)
            total[n] += f.scale * f.b.astype(np.float64) @ a
    return total


def close(got: Dense, want: Dense, tolerance: float = 1e-6) -> None:
    for n, x in want.items():
        assert float(np.linalg.norm(got[n] - x)) <= tolerance * max(1.0, float(np.linalg.norm(x))), n


def every_byte(task: Task) -> dict[str, bytes]:
    terms = [b.adapter for b in task.blocks] + ([] if task.pair is None else [task.pair])
    found = {f"{i}/{n}/{s}": x.tobytes() for i, a in enumerate(terms) for n, f in a.items()
             for s, x in (("a", f.a), ("b", f.b))}  # fmt: skip
    found |= {f"head/{n}": x.tobytes() for n, x in task.extras.items()}
    return found | {f"basis/{n}": x.tobytes() for n, x in task.basis.items()}


def test_without_tasks_it_is_the_method_itself() -> None:
    plain = streamed(load_config(None, ["method.name=flora"]))
    state = plain.open("base", LAYOUT, (Member(id="c", rank=2, scale=1.0),), load_config().method, 0)
    assert list(state.tasks) == [""]


# ---- what is sealed --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", APART)
@pytest.mark.parametrize("name", ["fedit", "flora", "rolora"])
def test_the_update_is_the_sum_of_the_tasks_and_what_is_sealed_never_changes(way: str, name: str) -> None:
    sealed: dict[str, dict[str, bytes]] = {}
    for state in Run(way, [f"method.name={name}"]).states():
        products = [own_product(t) for t in state.tasks.values()]
        close(dense([state.update()]), {n: sum(p[n] for p in products) for n in LAYOUT.modules})
        for task in sealed_in_order(state):
            assert task.pair is None
            assert sealed.setdefault(task.name, every_byte(task)) == every_byte(task)
    assert list(sealed) == ["a", "b", "c"]
    assert [t.statistics["sealed"] for t in sealed_in_order(state)] == [1.0, 2.0, 3.0]
    assert [t.statistics["round"] for t in sealed_in_order(state)] == [2.0, 4.0, 6.0]
    assert min(float(np.linalg.norm(x)) for t in state.tasks.values() for x in own_product(t).values()) > 1e-2


def test_every_way_of_the_settings_is_one_value() -> None:
    assert sorted(get_args(ContinualName)) == sorted(WAYS)
    assert all(name == way.name for name, way in WAYS.items())
    assert {name for name, way in WAYS.items() if way.one_pair} == set(ONE_PAIR)


@pytest.mark.parametrize("way", ["separate", "incremental"])
def test_inputs_are_measured_under_the_weights_that_the_task_was_trained_to(way: str) -> None:
    run = Run(way, ["continual.effects=true"])
    final = run.last()
    asked = [a for _, asks in run.asked for a in asks.values() if a.measure is not None and a.measure.sketch]
    under = {a.task: blocks_id(a.blocks) for a in asked}
    assert under == {name: blocks_id(blocks_known(final, name, way)) for name in "abc"}


@pytest.mark.parametrize("way", ONE_PAIR)
def test_one_pair_is_as_large_as_any_task_trains_it(way: str) -> None:
    """A first task at a low rank, or held by small clients alone, does not bound those after it."""
    for own in ({"a": {"rank": 1}}, {"a": {"clients": [1]}}):
        run = Run(way, tables=tasks("a", "b", **own))
        run.last(4)
        ranks = [[a.plan.rank for a in run.training(n).values() if a.plan] for n in (1, 3)]
        assert ranks == [[1, 1, 1] if "rank" in own["a"] else [2], [3, 2, 3]]


@pytest.mark.parametrize("way", ["sequential", "replay", "ewc", "incremental"])
def test_a_task_begins_with_fresh_moments_at_the_server(way: str) -> None:
    """Whatever goes on of the pair: after a task's first round the optimiser has taken one step."""
    run = Run(way, ["method.name=ffa-lora", "server.optimizer=adam"])
    for number, state in enumerate(run.states(), 1):
        if number % 2:
            moments = state.memory[f"task:{'abc'[number // 2]}:{MOMENTS}"]
            np.testing.assert_array_equal(moments["steps"], [1.0])


@pytest.mark.parametrize("way", APART)
def test_nothing_is_lost_when_a_task_is_sealed(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[Task, Task]] = []
    cut = sealing.cut

    def spy(task: Task, rank: int | None, version: int) -> tuple[Task, float]:
        done, lost = cut(task, rank, version)
        seen.append((task, done))
        assert lost == 0.0
        return done, lost

    monkeypatch.setattr("strategies.streams.cut", spy)
    for name in ("fedit", "fedex-lora"):
        run = Run(way, [f"method.name={name}"], tables=tasks("a", "b"))
        run.last(4)
        assert [r["sealed_error_relative"] for r in run.reports if "sealed_error_relative" in r] == [0.0, 0.0]
    assert len(seen) == 4
    for before, after in seen:
        close(own_product(after), own_product(before), 1e-6)


@pytest.mark.parametrize("name", ["fedit", "flora"])
@pytest.mark.parametrize("way", ["incremental", "subspace"])
def test_a_task_is_cut_as_the_svd_of_its_product_says(way: str, name: str) -> None:
    """Against the dense SVD (Eckart and Young): the best product of this rank, and the share that is lost."""
    whole = Run(way, [f"method.name={name}"], tables=tasks("a")).last(2).tasks["a"]
    run = Run(way, [f"method.name={name}", "continual.rank=1"], tables=tasks("a"))
    small = run.last(2).tasks["a"]
    want, off, size = {}, 0.0, 0.0
    for n, x in own_product(whole).items():
        u, s, vt = np.linalg.svd(x)
        want[n] = s[0] * np.outer(u[:, 0], vt[0])
        off, size = off + float(np.sum(s[1:] ** 2)), size + float(np.sum(s**2))
    close(own_product(small), want, 1e-5)
    assert set(stack([b.adapter for b in small.blocks]).ranks.values()) == {1}
    assert run.reports[-1]["sealed_error_relative"] == pytest.approx((off / size) ** 0.5, rel=1e-4)
    assert small.statistics["sealed_error_relative"] == run.reports[-1]["sealed_error_relative"] > 0.01


@pytest.mark.parametrize("way", ["incremental", "input-aware", "separate", "subspace"])
def test_a_task_can_be_taken_away_exactly(way: str) -> None:
    state = Run(way, ["method.name=flora"]).last()
    without = replace(state, tasks={n: t for n, t in state.tasks.items() if n != "b"})
    kept = [own_product(state.tasks[n]) for n in ("a", "c")]
    close(dense([without.update()]), {n: kept[0][n] + kept[1][n] for n in LAYOUT.modules})
    assert every_byte(without.tasks["c"]) == every_byte(state.tasks["c"])


@pytest.mark.parametrize("way", EVERY_WAY)
def test_a_state_is_the_same_after_it_was_saved_and_so_is_what_follows(way: str) -> None:
    """At every round border, the borders of tasks included: saving changes no byte of the end, twice as little."""
    more = ["wire.down=int8"] if way != "ewc" else []
    straight, saved = Run(way, more), Run(way, more)
    state = saved.open()
    for number, whole in enumerate(straight.states(), 1):
        data = encode_state(state)
        state = decode_state(data)
        assert encode_state(state) == data
        state = saved.round(state, number)
        assert encode_state(state) == encode_state(whole)
    assert saved.reports == straight.reports


def test_a_method_remembers_nothing_of_a_task_that_was_sealed() -> None:
    for way in ("input-aware", "separate"):
        for state in Run(way, ["wire.down=int8"]).states():
            owners = {k.split(":")[1] for k in state.memory if k.startswith("task:")}
            assert owners == {n for n, t in state.tasks.items() if not t.sealed}


def test_where_one_pair_moves_on_only_the_last_task_is_remembered() -> None:
    for way in ("sequential", "replay"):
        for state in Run(way, ["wire.down=int8"]).states():
            owners = [k for k in state.memory if k.startswith("task:")]
            assert owners == [f"task:{list(state.tasks)[-1]}:published"]


# ---- what moves on ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ONE_PAIR)
def test_one_pair_goes_on_and_heads_stay(way: str) -> None:
    run, heads = Run(way, ranks=(3, 3, 3)), {}
    before = None
    for number, state in enumerate(run.states(), 1):
        for ask in run.training(number).values():
            assert ask.blocks == ()
            if before is not None:
                assert before.pair is not None
                assert ask.plan is not None
                for n, f in before.pair.items():
                    np.testing.assert_array_equal(ask.arrays[f"A:{n}"], f.a)
                    np.testing.assert_allclose(ask.plan.scale * ask.arrays[f"B:{n}"], f.scale * f.b, rtol=1e-6)
        before = list(state.tasks.values())[-1]
        close(dense([state.update()]), own_product(before))
        for task in sealed_in_order(state):
            arrays = {n: x.tobytes() for n, x in task.extras.items()}
            assert heads.setdefault(task.name, arrays) == arrays
    assert [t.pair is None for t in state.tasks.values()] == [True, True, False]
    assert len({h["score.weight"] for h in heads.values()}) == 3
    for name in "abc":  # there is one W_eff, whatever the task
        close(dense([b.adapter for b in blocks_known(state, name, way)]), own_product(before))
        assert {n: x.tobytes() for n, x in head_of(state, name, run.config).items()} == heads[name]


@pytest.mark.parametrize("way", APART)
def test_a_task_is_trained_on_those_that_were_sealed(way: str) -> None:
    """What clients get below the task's own pair is the sum of the sealed ones; `separate` has the base alone."""
    run = Run(way)
    state = run.open()
    for number in range(1, 7):
        sealed = sealed_in_order(state)
        want = dense([b.adapter for t in sealed for b in t.full.blocks] if way != "separate" else [])
        state = run.round(state, number)
        for ask in run.training(number).values():
            assert ask.task == "aabbcc"[number - 1]
            close(dense([b.adapter for b in ask.blocks]), want)
    for i, name in enumerate("abc"):
        chain = [name] if way == "separate" else "abc"[: i + 1]
        parts = [own_product(state.tasks[n]) for n in chain]
        known = dense([b.adapter for b in blocks_known(state, name, way)])
        close(known, {n: sum(p[n] for p in parts) for n in LAYOUT.modules})


def test_a_new_task_is_fresh() -> None:
    """Its own seeds, B = 0, and the schedule from its beginning."""
    run = Run("incremental")
    for _ in run.states():
        pass
    starts = {n: run.training(n)["client-00000"] for n in range(1, 7)}
    for n in (1, 3, 5):
        plan, arrays = starts[n].plan, starts[n].arrays
        assert plan is not None
        assert plan.progress == (0.0, 0.5)
        assert not arrays["B:up"].any()
    assert len({starts[n].arrays["A:up"].tobytes() for n in (1, 3, 5)}) == 3
    assert len({ask.plan.seed for ask in starts.values() if ask.plan is not None}) == 6


def labelled(way: str, *more: str, layout: Layout = LAYOUT) -> Run:
    own = {"a": {"data.labels": ["y", "w"]}, "b": {"data.labels": ["x"]}, "c": {"data.labels": ["w", "z"]}}
    sets = ["model.task_type=sequence-classification", "data.name=rows.csv", f"model.labels={json.dumps(LABELS)}"]
    return Run(way, [*sets, *more], tables=tasks("a", "b", "c", **own), layout=layout)


@pytest.mark.parametrize("way", ["incremental", "separate", "sequential"])
def test_the_joint_head_has_each_class_as_the_last_task_with_it_left_it(way: str) -> None:
    run = labelled(way)
    states = list(run.states())
    state = states[-1]
    of = {n: t.extras for n, t in state.tasks.items()}
    joint = joint_head(state, run.config)
    for key in ("score.weight", "score.bias"):
        np.testing.assert_array_equal(joint[key][2], of["a"][key][2])  # y
        np.testing.assert_array_equal(joint[key][1], of["b"][key][1])  # x
        np.testing.assert_array_equal(joint[key][[0, 3]], of["c"][key][[0, 3]])  # w: last in c
    np.testing.assert_array_equal(joint["dense.weight"], of["c"]["dense.weight"])
    first = run.open()
    for n, x in joint_head(first, run.config).items():
        np.testing.assert_array_equal(x, first.memory[HEAD][n])
    begun = joint_head(states[1], run.config) if way != "separate" else first.memory[HEAD]
    for key, x in begun.items():  # what the second task began with
        np.testing.assert_array_equal(run.training(3)["client-00000"].arrays[f"head:{key}"], x)
    assert (
        joint_head(states[2], run.config)["score.weight"].tobytes()
        == joint_head(states[1], run.config)["score.weight"].tobytes()
    )  # an open task has no part in it


# ---- penalties -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sets", "weight", "form"),
    [
        ((), 0.5, "absolute"),
        (("continual.penalty=2", "continual.penalty_form=squared"), 2.0, "squared"),
        (("continual.penalty_form=normalised",), 0.5, "normalised"),
    ],
)
@pytest.mark.parametrize("name", ["fedit", "flora", "rolora"])
def test_o_lora_is_on_from_the_second_task(name: str, sets: tuple[str, ...], weight: float, form: str) -> None:
    run = Run("o-lora", [f"method.name={name}", *sets])
    for number, _ in enumerate(run.states(), 1):
        for ask in run.training(number).values():
            assert ask.plan is not None
            told = (ask.plan.against, ask.plan.overlap, ask.plan.overlap_form)
            on = number > 2 and "A" in ask.plan.train
            assert told == ((number - 1) // 2, weight, form) if on else told == (0, 0.0, "squared")
            assert all(b.adapter["up"].rank for b in ask.blocks[: ask.plan.against])
    trained = [n for n in range(3, 7) if "A" in run.training(n)["client-00000"].plan.train]  # type: ignore[union-attr]
    assert trained == ([4, 6] if name == "rolora" else [3, 4, 5, 6])


@pytest.mark.parametrize("name", ["fed-sb", "fedsvd", "ffa-lora"])
def test_o_lora_is_refused_where_a_is_never_trained(name: str) -> None:
    """Else the penalty would be silently zero."""
    with pytest.raises(ConfigError, match=f"o-lora is a penalty on A, and {name} freezes A"):
        Run("o-lora", [f"method.name={name}"])


@pytest.mark.parametrize("name", ["fedit", "ffa-lora"])
def test_the_penalties_of_two_tasks_are_one_quadratic(name: str) -> None:
    """1/2 F (x - x*)^2 differs from the sum of both tasks' by a constant, whatever scale a client trains B at.

    Both are of A and s B as they act. At its own scale s a client moves B, so it is its penalty of B that is compared.
    """
    run, at, information = Run("ewc", [f"method.name={name}"], ranks=(3, 3, 3)), [], []
    for number, state in enumerate(run.states(), 1):
        asks = run.training(number)
        assert [a.plan.anchor for a in asks.values() if a.plan] == [0.0 if number <= 2 else 100.0] * 3
        if number in (2, 4):
            pair = state.tasks["ab"[number // 2 - 1]].pair
            assert pair is not None
            folded = pair["up"].folded()
            at.append({"A:up": folded.a.astype(float), "B:up": folded.b.astype(float)})
            [fisher] = [
                a for n, a in run.asked if n == number and all(x.measure and x.measure.fisher for x in a.values())
            ]
            for ask in fisher.values():
                np.testing.assert_array_equal(ask.arrays["A:up"], folded.a)
                np.testing.assert_array_equal(ask.arrays["B:up"], folded.b)
            told = [run.answer(c, a) for c, a in fisher.items()]
            rows = sum(min(64, t.examples) for t in told)
            information.append({k: sum(t.arrays[f"fisher-{k}"].astype(float) for t in told) / rows for k in at[0]})
    ask = run.training(6)["client-00001"]
    assert ask.plan is not None
    for key, scale in (("A:up", 1.0), ("B:up", ask.plan.scale)):
        rng = np.random.default_rng(3)
        fisher, anchor = ask.arrays[f"fisher-{key}"].astype(float), ask.arrays[f"anchor-{key}"].astype(float)
        x, y = rng.normal(size=(2, *anchor.shape))
        of = list(zip((f[key] for f in information), (x0[key] for x0 in at), strict=True))
        both = [sum(0.5 * float(np.sum(f * (scale * z - x0) ** 2)) for f, x0 in of) for z in (x, y)]
        one = [0.5 * float(np.sum(fisher * (z - anchor) ** 2)) for z in (x, y)]
        assert one[0] - one[1] == pytest.approx(both[0] - both[1], rel=1e-5)


# ---- subspaces -------------------------------------------------------------------------------------------------------


def test_a_public_subspace_never_travels() -> None:
    run = Run("subspace")
    state = run.last()
    ends = [(t.subspace.start, t.subspace.dim) for t in state.tasks.values() if t.subspace is not None]
    assert ends == [(0, 7), (7, 7), (14, 7)]  # 30 // 4, below four times the largest rank
    for number in range(1, 7):
        for ask in run.training(number).values():
            task = state.tasks[ask.task]
            assert ask.subspace == task.subspace
            assert task.subspace is not None
            assert not any(k.startswith("N:") for k in ask.arrays)
            for n, m in LAYOUT.modules.items():
                np.testing.assert_array_equal(task.basis[n], public_rows(task.subspace, n, m.inp))
                assert ask.arrays[f"probe:N/{n}"].shape == (7,)
                assert ask.arrays[f"A:{n}"].shape[1] == 7


def test_a_designed_subspace_is_that_of_all_clients_inputs(monkeypatch: pytest.MonkeyPatch) -> None:
    """The moments that reach `design` are those of all rows of all clients, each task's of energy 1 in the memory."""
    seen: list[tuple[Any, Any]] = []

    def spy(dim: int, new: Any, old: Any, avoid: Array, **more: Any) -> Array:
        seen.append((new, old))
        return design(dim, new, old, avoid, **more)

    monkeypatch.setattr("strategies.continual.input_aware.design", spy)
    run = Run("input-aware", ["method.name=ffa-lora"])
    state = run.last()
    assert len(seen) == 3 * 2  # one for each input, not for each module
    assert (run.asked[0][0], [a.measure.sketch for a in run.asked[0][1].values() if a.measure]) == (1, [30] * 3)
    shares = [10 / 33, 11 / 33, 12 / 33]

    def mean(task: str) -> NDArray[np.float64]:
        parts = [w * second_moment_of(task, f"client-{i:05d}", "k", 30) for i, w in enumerate(shares)]
        return np.asarray(sum(parts))

    vectors, values, energy = seen[0][0]
    assert energy / 33 == pytest.approx(np.trace(mean("a")), rel=1e-6)
    np.testing.assert_allclose((vectors * values) @ vectors.T / 33, mean("a"), atol=1e-4 * energy / 33)
    assert seen[0][1] is None
    vectors, values, energy = seen[4][1]  # what the third task keeps off
    unit = [mean(t) / np.trace(mean(t)) for t in "ab"]
    assert energy == pytest.approx(2.0, rel=1e-6)
    np.testing.assert_allclose((vectors * values) @ vectors.T, unit[0] + unit[1], atol=1e-4)
    assert set(state.memory[INPUTS]) == {f"{of}:{n}" for of in ("sketch", "energy") for n in ("k", "up")}
    assert all(np.allclose(x, 2.0) for n, x in state.memory[INPUTS].items() if n.startswith("energy"))


@pytest.mark.parametrize("name", ["ffa-lora", "fedit"])
def test_a_frozen_a_is_the_leading_rows_of_the_design(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Array] = []

    def spy(*args: Any, **more: Any) -> Array:
        made.append(design(*args, **more))
        return made[-1]

    monkeypatch.setattr("strategies.continual.input_aware.design", spy)
    run = Run("input-aware", [f"method.name={name}"], tables=tasks("a", **{"a": {"continual.task_dim": "5"}}))
    task = run.last(2).tasks["a"]
    assert task.subspace is not None
    assert (task.subspace.dim, task.subspace.seed) == (5, None)
    if name == "fedit":
        assert all(np.array_equal(task.basis[n], made[0]) for n in ("k", "q"))
        return
    for n, module in LAYOUT.modules.items():
        want = made[0 if module.shares == "k" else 1][:3]
        np.testing.assert_allclose(task.full.blocks[0].adapter[n].a, want, atol=1e-5 * np.abs(want).max())
    asks = run.training(1)["client-00000"].arrays
    assert {k for k in asks if k[0] in "AN"} == {f"N:{n}" for n in LAYOUT.modules}


@pytest.mark.parametrize(("name", "dim"), [("ffa-lora", 3), ("fed-sb", 3), ("fedsvd", 3), ("fedit", 7), ("flora", 7)])
def test_a_frozen_a_takes_no_more_capacity_than_its_rank(name: str, dim: int) -> None:
    for way in ("subspace", "input-aware"):
        task = Run(way, [f"method.name={name}"]).last(1).tasks["a"]
        assert task.subspace is not None
        assert task.subspace.dim == dim


def test_a_rank_never_exceeds_the_subspace() -> None:
    run = Run("subspace", ["continual.task_dim=2"], ranks=(4, 3, 1))
    run.last(2)
    assert [a.plan.rank for a in run.training(1).values() if a.plan] == [2, 2, 1]


# ---- who has what, and when ------------------------------------------------------------------------------------------


def test_a_task_is_asked_of_its_clients_at_its_rank() -> None:
    own = {"a": {"clients": [0, 2], "rank": 2}, "b": {"clients": "client-00001"}}
    run = Run("input-aware", tables=tasks("a", "b", **own), ranks=(4, 3, 1))
    run.last(4)
    for number, asks in run.asked:
        assert sorted(asks) == (["client-00000", "client-00002"] if number <= 2 else ["client-00001"])
    assert [a.plan.rank for a in run.training(1).values() if a.plan] == [2, 1]
    assert [a.plan.rank for a in run.training(3).values() if a.plan] == [3]


@pytest.mark.parametrize("name", ["fedit", "flora", "frlora"])
@pytest.mark.parametrize("way", ["input-aware", "subspace"])
def test_where_nobody_is_drawn_a_task_begins_and_ends_all_the_same(way: str, name: str) -> None:
    """Poisson rounds may be empty, and none of a task's clients may be drawn: all who have it are then asked."""
    run = Run(way, [f"method.name={name}"], tables=tasks("a", "b", **{"a": {"clients": [0, 2]}}))
    state = run.open()
    state = run.round(state, 1, who=[])
    assert (state.version, list(state.tasks)) == (1, ["a"])
    state = run.round(state, 2, who=[1])
    assert (state.version, state.tasks["a"].sealed) == (2, True)
    assert not any(x.any() for x in own_product(state.tasks["a"]).values())
    state = run.round(state, 3, who=[1])
    state = run.round(state, 4, who=[])
    assert [t.sealed for t in state.tasks.values()] == [True, True]
    assert min(float(np.linalg.norm(x)) for x in own_product(state.tasks["b"]).values()) > 1e-2
    asked = [(n, sorted(asks)) for n, asks in run.asked if any(a.plan for a in asks.values())]
    assert asked == [(3, ["client-00001"])]
    for number, asks in run.asked:
        if all(a.measure for a in asks.values()):
            have = ["client-00000", "client-00002"] if number <= 2 else [m.id for m in run.who]
            assert sorted(asks) == (["client-00001"] if number == 3 else have)


def test_tasks_that_are_open_at_once_see_one_another_when_sealed() -> None:
    """`b` begins while `a` is trained, and goes on above it when it is sealed; all rows are apart at the end."""
    run = Run("subspace", tables=[
        {"name": "a", "rounds.count": 3}, {"name": "b", "rounds.count": 4, "start": 2}, {"name": "c", "rounds.count": 1}
    ])  # fmt: skip
    for number, state in enumerate(run.states(), 1):
        for _, asks in [x for x in run.asked if x[0] == number and all(a.plan for a in x[1].values())]:
            ask = asks["client-00000"]
            under = {"a": "", "b": "a" if number >= 3 else "", "c": "ab"}[ask.task]  # `a` is sealed before `b` trains
            want = blocks_of(state, [state.tasks[n] for n in under])
            close(dense([b.adapter for b in ask.blocks]), dense([b.adapter for b in want]))
    assert [t.name for t in sealed_in_order(state)] == ["a", "b", "c"]
    assert [(t.subspace.start, t.subspace.dim) for t in state.tasks.values() if t.subspace] == [(0, 7), (7, 7), (14, 7)]
    in_two = [r for r in run.reports if "b/update_norm" in r]
    assert len(in_two) == 2
    assert all({"update_norm", "b/update_norm"} <= r.keys() for r in in_two)
    assert "overlap_largest" in run.reports[4]
    assert run.reports[4]["overlap_largest"] <= 1e-6
    assert [b.adapter["up"].rank for b in blocks_known(state, "b", "subspace")] == [3, 3]


def test_a_task_that_is_listed_last_and_comes_first_is_heard_of_too() -> None:
    """The order of the settings is not that of time: `a` begins when `b` is sealed, and keeps off its inputs."""
    run = Run("input-aware", tables=[
        {"name": "a", "rounds.count": 1, "start": 2}, {"name": "b", "rounds.count": 1, "start": 1}
    ])  # fmt: skip
    states = list(run.states(2))
    assert INPUTS in states[0].memory
    assert [t.name for t in sealed_in_order(states[1])] == ["b", "a"]


def test_all_at_once_is_one_task() -> None:
    run = Run("joint", tables=tasks("a", "b", **{"a": {"clients": [0]}, "b": {"clients": [2]}}))
    state = run.last(4)
    assert list(state.tasks) == ["all-tasks"]
    assert FEATURES not in state.memory
    for number in range(1, 5):
        assert sorted(run.training(number)) == ["client-00000", "client-00002"]
    for name in ("a", "b"):
        assert head_of(state, name, run.config)["score.bias"].tobytes() == (
            state.tasks["all-tasks"].extras["score.bias"].tobytes()
        )


def test_nearest_mean_trains_nothing() -> None:
    run = labelled("nearest-mean")
    state = run.last(3)
    assert all(a.plan is None and a.measure is not None for _, asks in run.asked for a in asks.values())
    assert [n for n, _ in run.asked] == [1, 2, 3]
    assert known_to_router(state) == ["a", "b", "c"]
    assert state.memory[FEATURES]["sums"].shape == (12, 5)  # these clients have rows of every class
    assert not any(np.any(x) for x in dense([state.update()]).values())


CLASSES = Layout(modules=LAYOUT.modules, head={"score.bias": (4,), "score.weight": (4, 5)}, features=5)
FITTED = ("model.pooling=mean", "model.head=discriminants")


OWN = {"a": (1, 0, 2), "b": (2,), "c": (0, 3)}  # by task, as indices of LABELS; nobody has rows of class 3
NEW = {1: (0, 1, 2), 3: (), 5: (3,)}  # where one pair goes on, by the round in which a task begins


@pytest.mark.parametrize("way", ["none", *EVERY_WAY, "joint"])
def test_a_head_begins_as_the_discriminants_of_what_it_reads(way: str) -> None:
    """Of all clients' sums, under the tasks sealed before; only of a task's own classes, and where one pair and head go
    on only of those that are new. A class that nobody has yet is a mean of the others."""
    if way == "none":
        sets = ["model.task_type=sequence-classification", "data.name=rows.csv", f"model.labels={json.dumps(LABELS)}"]
        run = Run("subspace", [*sets, *FITTED], tables=(), layout=CLASSES)
    else:
        own = {n: {"data.labels": [LABELS[c] for c in classes]} for n, classes in OWN.items()}
        sets = ["model.task_type=sequence-classification", "data.name=rows.csv", f"model.labels={json.dumps(LABELS)}"]
        run = Run(way, [*sets, *FITTED], tables=tasks("a", "b", "c", **own), layout=CLASSES)
    state, fitted = run.open(), {}
    for number in range(1, 4 if way == "none" else 7):
        seen = len(run.asked)
        blocks = blocks_of(state, () if way == "separate" else sealed_in_order(state))
        before = state.open_task.extras if way == "none" else joint_head(state, run.config)
        if way == "separate":
            before = state.memory[HEAD]
        state = run.round(state, number)
        measured = [asks for _, asks in run.asked[seen:] if any(a.measure and a.measure.reads for a in asks.values())]
        if not measured:
            continue
        [asks] = measured
        assert len(asks) == 3
        assert {blocks_id(ask.blocks) for ask in asks.values()} == {blocks_id(blocks)}
        classes = (0, 1, 2, 3) if way in ("none", "joint") else OWN["abc"[number // 2]]
        fitted[number] = sorted(NEW[number] if way in ONE_PAIR else classes)
        answers = [run.answer(client, ask) for client, ask in asks.items()]
        sums = {
            k: np.sum([a.examples * a.arrays[k] for a in answers], 0, dtype=np.float64)
            for k in answers[0].arrays
            if k.startswith("read:")
        }
        test = omega(run.config.seed, 5, 5)
        within = scatter(
            sums["read:sum"][:3], sums["read:count"][:3], sums["read:sketch"], float(sums["read:energy"][0]), test
        )
        want, at = discriminants(within)
        first = next(iter(run.training(number).values()))
        weights, offsets = first.arrays["head:score.weight"], first.arrays["head:score.bias"]
        for c in range(4):
            if c not in fitted[number]:
                assert weights[c].tobytes() == before["score.weight"][c].tobytes()
            elif c == 3:  # as if it had one row, at the mean of all: the rule is linear in means
                share = within.counts / within.counts.sum()
                np.testing.assert_allclose(weights[c], share @ want, rtol=1e-4, atol=1e-5)
                prior = -np.log(within.counts.sum() + 1.0)
                np.testing.assert_allclose(offsets[c], prior - weights[c] @ (share @ within.means) / 2, rtol=1e-4)
            else:
                np.testing.assert_allclose(weights[c], want[c], rtol=1e-4, atol=1e-5)
                np.testing.assert_allclose(offsets[c], at[c], rtol=1e-4, atol=1e-5)
    rounds = [1] if way in ("none", "joint") else [1, 5] if way in ONE_PAIR else [1, 3, 5]
    assert list(fitted) == rounds


def test_a_head_is_fitted_in_the_first_round_that_somebody_is_drawn_for() -> None:
    sets = ["model.task_type=sequence-classification", "data.name=rows.csv", f"model.labels={json.dumps(LABELS)}"]
    run = Run("subspace", [*sets, *FITTED], tables=(), layout=CLASSES)
    state = run.open()
    for number in (3, 4):  # nobody was drawn for the rounds before, so the state is still the first
        state = run.round(state, number)
    assert [n for n, asks in run.asked if any(a.measure for a in asks.values())] == [3]


def test_random_heads_are_asked_nothing() -> None:
    run = labelled("incremental")
    run.last()
    assert not any(ask.measure and ask.measure.reads for _, asks in run.asked for ask in asks.values())


def known_to_router(state: GlobalState) -> list[str]:
    return list(dict.fromkeys(json.loads(bytes(state.memory[FEATURES]["tasks"]))))


def test_features_are_asked_for_only_if_inputs_are_to_find_tasks() -> None:
    with_routes, without = Run("incremental"), Run("incremental", ["continual.routing=false"])
    assert known_to_router(with_routes.last()) == ["a", "b", "c"]
    assert FEATURES not in without.last().memory
    assert all(a.plan for _, asks in without.asked for a in asks.values())


# ---- bad input -------------------------------------------------------------------------------------------------------


def test_a_task_that_nobody_has_is_refused_at_the_start() -> None:
    run = Run("subspace", tables=tasks("a", "b", **{"b": {"clients": "hospital-7"}}))
    with pytest.raises(MethodError, match="task b: none of the 3 enrolled clients has it; mend `clients`"):
        run.open()


@pytest.mark.parametrize("way", ["subspace", "input-aware"])
def test_tasks_without_room_are_refused_before_the_first_is_trained(way: str) -> None:
    tables = tasks("a", "b", "c", **{"c": {"continual.task_dim": 7}})
    said = (
        r"the tasks need 31 dimensions \(a 12, b 12, c 7\), and k has 30 inputs; lower continual\.task_dim or the ranks"
    )
    with pytest.raises(MethodError, match=said):
        Run(way, ["continual.task_dim=12"], tables=tables).open()
    full = Run(way, ["continual.task_dim=12"], tables=tasks("a", "b", "c", **{"c": {"continual.task_dim": 6}}))
    assert [t.subspace.dim for t in full.last().tasks.values() if t.subspace] == [12, 12, 6]


@pytest.mark.parametrize("way", ["subspace", "input-aware"])
def test_embeddings_have_no_subspace(way: str) -> None:
    layout = Layout(modules={"tokens": Module(out=6, inp=50, kind="embedding"), "up": LAYOUT.modules["up"]})
    run = Run(way, layout=layout)
    with pytest.raises(MethodError, match="task a: tokens is an embedding, whose inputs are token ids"):
        run.last(1)


def test_a_round_that_fails_and_is_repeated_is_the_same() -> None:
    run = Run("input-aware", ["method.name=flora"])
    state = run.last(2)
    assert encode_state(run.round(state, 3)) == encode_state(run.round(state, 3))
