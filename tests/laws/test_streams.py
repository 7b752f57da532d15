"""The law of task subspaces: after ten tasks no A has a part in the rows of those before it, under every wrapper.

Clients are numpy stand-ins that move what they are asked to train by seeded noise, and measure random inputs of their
task. Overlaps are of the A's as they act on the base (`Task.full`, float32), each task against all before it. Every way
that is known to break the law is planted once, so that these tests are seen to be able to fail.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import lru_cache
from typing import Literal

import numpy as np
import pytest
from numpy.typing import NDArray

from fedlora.adapter import Adapter, Array, Factors, stack
from fedlora.codec import rounded
from fedlora.config import RunConfig, load_config, local_training
from fedlora.continual.overlap import random_overlap, row_overlap, row_spaces
from fedlora.feedback import compress
from fedlora.rng import public_normal, public_orthonormal, stream
from fedlora.state import Answer, Ask, GlobalState, Layout, Module, expected_arrays, times
from simulations.benchmarks.stand_in import follow
from strategies.base import Cohort, Member, play
from strategies.continual.views import sealed_in_order
from strategies.streams import streamed

Float64 = NDArray[np.float64]
TASKS, ROUNDS = 10, 2
EXACT, BROKEN = 1e-6, 1e-3  # overlaps: a law that holds, a law that was broken
LAYOUT = Layout(
    modules={
        "k": Module(out=7, inp=96, shares="k"),
        "q": Module(out=9, inp=96, kind="conv1d", shares="k"),
    },
    head={"score.weight": (2, 7)},
    features=5,
)
WHO = tuple(Member(id=f"client-{i:05d}", rank=r, scale=2.0) for i, r in enumerate((4, 2, 3, 1)))
METHODS = (
    "fed-sb",
    "fedex-lora",
    "fedit",
    "fedsvd",
    "ffa-lora",
    "flexlora",
    "flora",
    "frlora",
    "hetlora",
    "lora-fair",
    "rolora",
)
CODED = {"fedex-lora", "fedit", "ffa-lora", "flora", "hetlora", "lora-fair", "rolora"}
WRAPPED = [
    *((name,) for name in METHODS if name not in CODED),
    *((name, "wire.up=int8", "wire.down=int8") for name in METHODS if name in CODED),
    ("flexlora", "wire.up=int8"),
    ("ffa-lora", "server.optimizer=adam", "server.rate=0.1"),
]
MORE = [
    ("fed-sb", "method.basis=random", "server.optimizer=yogi", "server.rate=0.1"),
    ("flora", "server.optimizer=momentum", "method.warm_start=true"),
    ("fedit", "robust.rule=norm-bound"),
]


once = lru_cache(maxsize=None)(public_normal)  # the same numbers, made once for all tests
orthonormal = lru_cache(maxsize=None)(public_orthonormal)


@pytest.fixture(autouse=True)
def _made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("strategies.continual.moments.public_normal", once)


def settings(
    way: str, method: str, *more: str, tasks: int = TASKS, rounds: int = ROUNDS, rank: int | None = None
) -> RunConfig:
    own = {} if rank is None else {"rank": rank}
    tables = [{"name": f"t{i}", "rounds.count": rounds, **own} for i in range(tasks)]
    common = [f"continual.method={way}", f"method.name={method}", f"tasks={json.dumps(tables)}", "continual.sketch=24"]
    return load_config(None, [s for s in common if way == "input-aware" or "sketch" not in s] + list(more))


class Clients:
    """Stand-ins that answer any ask, and remember what codecs left out of their messages."""

    def __init__(self) -> None:
        self.errors: dict[tuple[str, str], dict[str, Array]] = {}

    def __call__(self, client: str, ask: Ask) -> Answer:
        if ask.measure is not None:
            return self.measured(client, ask)
        plan, layout = ask.plan, LAYOUT if ask.subspace is None else LAYOUT.within(ask.subspace.dim)
        assert plan is not None
        answer = follow(replace(ask, blocks=(), frozen=None), layout, 3 + int(client[-1]), 0.1).answer
        if plan.codec != "float32":
            error = self.errors.get((client, ask.task), {})
            arrays, self.errors[client, ask.task] = compress(answer.arrays, plan, error, layout)
            answer = replace(answer, arrays=arrays)
        return answer

    def measured(self, client: str, ask: Ask) -> Answer:
        """Sketches of 30 inputs, most of whose energy is common to all tasks."""
        assert ask.measure is not None
        arrays: dict[str, Array] = {}
        for key, shape in expected_arrays(ask, LAYOUT).items():
            name = key.split(":")[1]
            if not key.startswith("sketch"):
                arrays.setdefault(key, np.ones(shape, np.float32))
                continue
            rng, common = stream(1, "inputs", ask.task, client, name), stream(1, "inputs", name)
            x = 3.0 * rng.normal(size=(30, 4)) @ common.normal(size=(4, shape[0])) + rng.normal(size=(30, shape[0]))
            omega = once(ask.measure.seed, "sketch", name, shape=shape)
            arrays[key] = (x.T @ (x @ omega) / len(x)).astype(np.float32)
            arrays[f"energy:{name}"] = np.array([np.sum(x**2) / len(x)], np.float32)
        return Answer(examples=30, arrays=arrays)


def states(config: RunConfig, clients: Callable[[str, Ask], Answer]) -> Iterator[GlobalState]:
    """The state after every round; two of the four clients are drawn each time."""
    method, last = streamed(config), TASKS * ROUNDS
    state = method.open("base", LAYOUT, WHO, config.method, config.seed)
    for number in range(1, last + 1):
        drawn = stream(5, "drawn", number).permutation(len(WHO))[:2]
        cohort = Cohort(
            round=number,
            rounds=last,
            members=tuple(WHO[i] for i in sorted(drawn)),
            settings=config.method,
            training=local_training(config),
            seed=config.seed,
            progress=(0.0, 1.0),
        )

        def coded(client: str, ask: Ask) -> Answer:
            up = config.wire.up if ask.plan is not None else "float32"
            return clients(client, ask if ask.plan is None else replace(ask, plan=replace(ask.plan, codec=up)))

        state = play(method.protocol(state, cohort), coded).state
        yield state


def last_of(config: RunConfig) -> GlobalState:
    return list(states(config, Clients()))[-1]


def overlaps(state: GlobalState) -> list[float]:
    """The largest over modules of every task's overlap with all before it."""
    sealed = [stack([b.adapter for b in t.full.blocks]) for t in sealed_in_order(state)]
    return [max(row_overlap(new, sealed[:i]).values()) for i, new in enumerate(sealed) if i]


def learnt(state: GlobalState) -> float:
    """The smallest norm of a task's product in a module."""
    return min(
        float(np.linalg.norm(f.dense()))
        for t in state.tasks.values()
        for f in stack([b.adapter for b in t.full.blocks]).values()
    )


@pytest.mark.parametrize(
    ("way", "sets"),
    [("subspace", sets) for sets in WRAPPED] + [("input-aware", sets) for sets in WRAPPED + MORE],
    ids=lambda x: x if isinstance(x, str) else " ".join(x),
)
def test_no_task_has_a_part_in_the_rows_of_those_before_it(way: str, sets: tuple[str, ...]) -> None:
    state = last_of(settings(way, *sets))
    assert len(sealed_in_order(state)) == TASKS
    assert learnt(state) > 1e-2
    found = overlaps(state)
    assert len(found) == TASKS - 1
    assert max(found) <= EXACT
    # what the run says of it is the mean over modules
    assert [t.statistics["overlap_largest"] for t in sealed_in_order(state)[1:]] == pytest.approx(found, abs=1e-9)


def test_without_a_subspace_the_measure_sees_what_random_rows_share() -> None:
    """The same clients, unconstrained: the overlap is that of random rows, so the law above is no property of noise."""
    state = last_of(settings("incremental", "flora"))
    found = overlaps(state)
    assert min(found) > BROKEN
    spaces = row_spaces([stack([b.adapter for b in t.full.blocks]) for t in sealed_in_order(state)[:2]])
    assert 0.3 * random_overlap(*spaces["q"].shape) < found[1] < 3.0


# -- planted: each of these is a way to write the same method that looks right


def test_a_coded_a_in_full_without_projection_breaks_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """int8 for M N in place of M: rounding does not know the subspace."""
    config = settings("subspace", "fedit", "wire.up=int8", "wire.down=int8")
    state = last_of(config)
    assert max(overlaps(state)) <= EXACT
    monkeypatch.setattr("fedlora.state.times", lambda m, n: rounded(times(m, n).astype(np.float64), "int8", "A:x"))
    fresh = replace(state, tasks={n: replace(t) for n, t in state.tasks.items()})  # without what `full` remembers
    assert min(overlaps(fresh)) > BROKEN


def test_a_basis_that_forgets_who_came_before_breaks_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """`design` without the rows to avoid."""
    from fedlora.continual.design import design

    def careless(dim: int, new: object, old: object, avoid: Array, **more: object) -> Array:
        return design(dim, new, old, avoid[:0], **more)  # type: ignore[arg-type]

    monkeypatch.setattr("strategies.continual.input_aware.design", careless)
    assert min(overlaps(last_of(settings("input-aware", "ffa-lora")))) > BROKEN


def test_public_rows_that_are_allotted_twice_break_it(monkeypatch: pytest.MonkeyPatch) -> None:
    from fedlora.continual.capacity import allot

    monkeypatch.setattr(
        "strategies.continual.subspace.allot", lambda layout, used, *rest: allot(layout, used[:-1], *rest)
    )
    assert max(overlaps(last_of(settings("subspace", "ffa-lora")))) > BROKEN


class Projecting(Clients):
    """Clients that train A in full and project it on rows of their task before they send it."""

    def __call__(self, client: str, ask: Ask) -> Answer:
        answer = super().__call__(client, ask)
        if ask.measure is not None:
            return answer
        first = 8 * int(ask.task.removeprefix("t"))
        arrays = dict(answer.arrays)
        for key in [key for key in arrays if key.startswith("A:")]:
            n = orthonormal(9, "own rows", key, rows=96, cols=96)[first : first + 8]
            start = ask.arrays[key]  # what is sent is the way from there
            arrays[key] = ((start + arrays[key]) @ n.T @ n - start).astype(np.float32)
        return replace(answer, arrays=arrays)


@pytest.mark.parametrize("method", ["fedit", "hetlora"])
def test_projection_at_the_clients_is_undone_by_a_coded_downlink(method: str) -> None:
    """It holds as long as the server hands on A as it came; int8 of A in full does not know the subspace."""
    plain, coded = (
        overlaps(list(states(settings("incremental", method, *sets, rank=1), Projecting()))[-1])  # all train every row
        for sets in ((), ("wire.down=int8",))
    )
    assert max(plain) <= EXACT
    assert min(coded) > 100 * EXACT


class Adam:
    """Adam over named arrays, element by element, as a client's or the server's optimiser (Kingma and Ba, 2015)."""

    def __init__(self) -> None:
        self.steps: dict[str, int] = {}
        self.m: dict[str, Float64] = {}
        self.v: dict[str, Float64] = {}

    def step(self, key: str, d: Float64) -> Float64:
        t = self.steps[key] = self.steps.get(key, 0) + 1
        m = self.m[key] = 0.9 * self.m.get(key, np.zeros(d.shape)) + 0.1 * d
        v = self.v[key] = 0.99 * self.v.get(key, np.zeros(d.shape)) + 0.01 * d**2
        stepped: Float64 = 0.05 * (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.99**t)) + 1e-6)
        return stepped


Twin = Literal["coordinates", "gradients", "server"]


def task_by_hand(twin: Twin, n: Float64, rng: np.random.Generator) -> NDArray[np.float32]:
    """Two rounds of three clients in the subspace of N, by hand; the A that the task ends with, in float32.

    coordinates: Adam moves M, at the clients and at the server, and A is M N. gradients: clients move A by Adam, its
    gradient projected. server: clients project what they send, and the server moves A by Adam, element by element.
    """
    public = twin == "coordinates"
    start = rng.normal(size=(3, len(n)))
    a, server = start if public else start @ n, Adam()
    for _ in range(2):
        sent = []
        for _ in range(3):
            own, local = a.copy(), Adam()
            for _ in range(3):
                gradient = rng.normal(size=(3, n.shape[1])) @ n.T  # of M
                own = own - local.step("a", gradient if public else gradient @ n)
            if twin == "server":
                own = own @ n.T @ n
            sent.append(own - a)
        change = np.mean(sent, axis=0)
        a = a + (change if twin == "gradients" else server.step("a", change))
    return (a @ n if public else a).astype(np.float32)


@pytest.mark.parametrize(("twin", "holds"), [("coordinates", True), ("gradients", False), ("server", False)])
def test_only_coordinates_survive_element_wise_steps(twin: Twin, holds: bool) -> None:
    """Projected gradients under a client's Adam leave the subspace, projected answers under the server's too."""
    basis = public_orthonormal(3, "capacity", "up", rows=40, cols=60)
    rng = stream(2, "twin", twin)
    made = [
        Adapter({"up": Factors(task_by_hand(twin, basis[4 * i : 4 * i + 4], rng), np.ones((2, 3)))}) for i in range(10)
    ]
    found = [row_overlap(new, made[:i])["up"] for i, new in enumerate(made) if i]
    if holds:
        assert max(found) <= EXACT
    else:
        assert min(found) > BROKEN
