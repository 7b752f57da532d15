"""What a federated method is: two pure functions over values, and the registry of those that exist.

A method opens a state and runs rounds. A round is a generator, `protocol(state, cohort)`: it yields who is asked what,
receives who answered what, and returns the next state with a report. It knows neither Flower nor files nor deadlines.

With s_k the scale of client k, n_k its examples and p_k = n_k / (sum of n over those who answered), every method obeys
these laws (`tests/laws/test_every_method.py`), which speak of W_eff, since factors are not unique:

1. Order. Answers are folded in the order of stable ids: the order in which they came changes no byte.
2. Fixed point. Clients of one rank that return the same factors give the product of those factors.
3. Echo. Clients that train nothing leave W_eff as it was (methods that truncate say in the report what they lost).
4. Weights. p_k is over those who answered, not over those who were asked; scaling all n_k changes nothing.
5. Nobody. A round without a single answer is refused; the old state is intact.
6. Frozen. Whatever the plan does not train (and all that earlier tasks left) is the same bytes afterwards.
7. Head. A dense head, where the layout has one, moves by the p_k-weighted mean of its changes.

Arrays were checked by admission (keys, shapes, finite values, counts); methods trust them.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from fedlora.adapter import Adapter, Array, Factors
from fedlora.config import MethodConfig
from fedlora.errors import AnswerRejected, MethodError
from fedlora.rng import public_normal, public_orthonormal, stream
from fedlora.state import (
    Answer,
    Ask,
    Block,
    GlobalState,
    Layout,
    LocalTraining,
    Module,
    Part,
    Task,
    TrainPlan,
    keyed,
    part,
)

HEAD_STD = 0.02  # standard deviation of a new head's weights, as transformers initialises its classifiers


@dataclass(frozen=True, kw_only=True)
class Member:
    """One client as a method sees it: stable id, LoRA rank r_k, and scale s_k (alpha / rank, or as configured).

    `key` is its raw Ed25519 public key (32 bytes), where it told one; only secure sums look at it.
    """

    id: str
    rank: int
    scale: float
    key: bytes = b""


@dataclass(frozen=True, kw_only=True)
class SumSession:
    """Which secure sum of which run this is: `attempt` was never used before in this run."""

    run: str
    round: int
    attempt: int


@dataclass(frozen=True, kw_only=True)
class Cohort:
    """Who is asked in one round, in the order of stable ids, and all else that a round depends on."""

    round: int  # 1-based
    rounds: int
    members: tuple[Member, ...]
    settings: MethodConfig
    training: LocalTraining
    seed: int
    progress: tuple[float, float]  # of the whole run, at the first and after the last local step of this round
    session: SumSession | None = None  # where secure sums are on
    enrolled: tuple[Member, ...] = ()  # where whole clients are private: all from whom `members` were drawn


@dataclass(frozen=True, kw_only=True)
class Closed:
    """The end of a round: the next state and what to log about it."""

    state: GlobalState
    report: dict[str, float]
    clients: Mapping[str, Mapping[str, float]] = field(default_factory=dict)  # id -> facts about its update, to log
    refused: tuple[AnswerRejected, ...] = ()  # what only the method could see was wrong


T = TypeVar("T")
Steps = Generator[Mapping[str, Ask], Mapping[str, Answer], T]  # a part of a round, and what it comes to
Round = Steps[Closed]


class Open(Protocol):
    """Version 0 of a run: one unnamed open task, for `members`, all enrolled clients. Raises: MethodError."""

    def __call__(
        self, base: str, layout: Layout, members: Sequence[Member], settings: MethodConfig, seed: int
    ) -> GlobalState: ...


@dataclass(frozen=True, kw_only=True)
class Method:
    """A published federated method: pure functions under one name.

    `open(base, layout, members, settings, seed)` gives version 0; `protocol(state, cohort)` is one round, which
    raises MethodError if nobody answered; `released(state)` is what a run hands out, by default W_eff - W0.
    `evaluation(state, member)` is what one client evaluates, where that is not just W_eff and the head. Under a
    `personal` method every client has a model of its own and nobody has a common one: the server scores nothing.
    """

    name: str
    summary: str
    open: Open
    protocol: Callable[[GlobalState, Cohort], Round]
    released: Callable[[GlobalState], Adapter] = GlobalState.update
    evaluation: Callable[[GlobalState, Member], Ask] | None = None
    personal: bool = False


def play(protocol: Round, answer: Callable[[str, Ask], Answer]) -> Closed:
    """One round in one process, without Flower: `answer(client, ask)` is what each client says.

    Raises: MethodError as the protocol does.
    """
    asks = next(protocol)
    while True:
        try:
            asks = protocol.send({client: answer(client, ask) for client, ask in sorted(asks.items())})
        except StopIteration as closed:
            end: Closed = closed.value
            return end


METHODS: dict[str, Method] = {}


def register(method: Method) -> Method:
    """Adds a method to `METHODS` under its name; each method's file does so once, when `strategies` is imported."""
    METHODS[method.name] = method
    return method


def get(name: str) -> Method:
    """The method of this name. Raises: MethodError that names the nearest one and all that exist."""
    if name in METHODS:
        return METHODS[name]
    near = difflib.get_close_matches(name, METHODS, n=1, cutoff=0.4)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise MethodError(f"no method is called {name!r}; {hint}There are: {', '.join(sorted(METHODS))}")


def opened(
    base: str,
    layout: Layout,
    seed: int,
    *,
    pair: Adapter | None = None,
    public_seed: int | None = None,
    memory: Mapping[str, Mapping[str, Array]] | None = None,
) -> GlobalState:
    """Version 0 with one unnamed open task, and a new head if the layout has one."""
    task = Task(name="", pair=pair, extras=new_head(layout, seed), public_seed=public_seed)
    return GlobalState(version=0, base=base, layout=layout, tasks={"": task}, memory=memory or {})


def new_head(layout: Layout, seed: int) -> dict[str, Array]:
    """Head weights N(0, 0.02) from the public generator, biases (one axis) zero: the same for every client."""
    return {
        name: (HEAD_STD * public_normal(seed, "head", name, shape=shape)).astype(np.float32)
        if len(shape) > 1
        else np.zeros(shape, np.float32)
        for name, shape in sorted(layout.head.items())
    }


def plan_of_largest(asks: Mapping[str, Ask]) -> str:
    """The client whose plan trains the largest rank, the first by id among equals. Raises: MethodError for no plan."""
    ranks = {c: ask.plan.rank for c, ask in asks.items() if ask.plan is not None}
    if not ranks or len(ranks) < len(asks):
        raise MethodError("asks without a plan train nothing, so there is nothing to add up")
    return min(ranks, key=lambda c: (-ranks[c], c))


def largest(members: Sequence[Member], method: str) -> Member:
    """The member of the largest rank, the first by id among equals. Raises: MethodError if there is none."""
    if not members:
        raise MethodError(f"{method}: no client is enrolled, so there is no rank to open a state with")
    return min(members, key=lambda m: (-m.rank, m.id))


def orthonormal_pair(
    layout: Layout, members: Sequence[Member], settings: MethodConfig, seed: int, method: str
) -> Adapter:
    """A public orthonormal A `[rank, in]`, B `[out, rank]` zero, of the rank and scale of the largest member (or
    `task_rank`): where A is the factor that stands still.

    Raises: MethodError for no client, an embedding, or a rank above a module's inputs.
    """
    first = largest(members, method)
    rank = settings.task_rank or first.rank
    pairs: dict[str, Factors] = {}
    for name, module in layout.modules.items():
        if module.kind == "embedding":
            raise MethodError(
                f"{method}: {name} is an embedding, where A is the factor that starts at zero: freezing it would train "
                "nothing. Leave embeddings out of model.target_modules, or use flora or fedit"
            )
        a = orthonormal_rows(rank, name, module, seed, method)
        pairs[name] = Factors(a, np.zeros((module.out, rank), np.float32), first.scale)
    return Adapter(pairs)


def orthonormal_rows(rank: int, name: str, module: Module, seed: int, method: str) -> NDArray[np.float32]:
    """The public A `[rank, in]` of one module, float32. Raises: MethodError for a rank above its inputs."""
    if rank > module.inp:
        raise MethodError(
            f"{method}: rank {rank} is above the {module.inp} inputs of {name}, and there are no more orthonormal rows "
            "than that. Lower lora.ranks or method.task_rank, or leave the module out of model.target_modules"
        )
    return public_orthonormal(seed, "basis", name, rows=rank, cols=module.inp).astype(np.float32)


def fresh_a(rows: int, module: Module, rng: np.random.Generator) -> NDArray[np.float32]:
    """A new A `[rows, in]`, uniform in +-1/sqrt(in), as PEFT starts (Kaiming, a = sqrt 5): rows of norm 1/sqrt(3)."""
    bound = 1.0 / math.sqrt(module.inp)
    return rng.uniform(-bound, bound, (rows, module.inp)).astype(np.float32)


def plan_for(
    method: str,
    state: GlobalState,
    cohort: Cohort,
    member: Member,
    *,
    rank: int,
    rows: int,
    scale: float,
    train: tuple[Part, ...],
    changes: tuple[Part, ...] = (),
    a_from: Literal["given", "fresh", "public"] = "given",
    b_from: Literal["given", "zero", "public"] = "given",
    a_seed: int = 0,
    core: bool = False,
    keep: tuple[Part, ...] = (),
    feedback: Literal["coordinates", "product"] = "coordinates",
) -> TrainPlan:
    """A plan that sends what it trains and does not keep; where the layout has a head, that is trained too, and its
    change is sent (unless it is kept).

    Its seed is another one for each client and round, so that fresh factors and batches never repeat.
    """
    head: tuple[Part, ...] = ("head",) if state.layout.head else ()
    return TrainPlan(
        method=method,
        rank=rank,
        rows=rows,
        scale=scale,
        train=train + head,
        send=tuple(p for p in train + head if p not in keep),
        changes=tuple(p for p in changes + head if p not in keep),
        a_from=a_from,
        b_from=b_from,
        a_seed=a_seed,
        core=core,
        keep=tuple(p for p in keep if p != "head" or head),
        feedback=feedback,
        training=cohort.training,
        progress=cohort.progress,
        seed=int(stream(cohort.seed, "plan", cohort.round, member.id).integers(2**53)),
    )


def blocks_for_all(state: GlobalState) -> tuple[Block, ...]:
    """The frozen blocks every client trains on top of: those of sealed tasks and of the open one."""
    return tuple(b for t in state.tasks.values() if t.sealed for b in t.blocks) + state.open_task.blocks


def pair_of(state: GlobalState, method: str) -> Adapter:
    """The open task's pair. Raises: MethodError if it has none, as under a method that keeps only blocks."""
    pair = state.open_task.pair
    if pair is None:
        raise MethodError(f"{method}: this state keeps no pair (A, B); was it opened by another method?")
    return pair


def head_start(state: GlobalState) -> dict[str, Array]:
    """The open task's head as arrays of an Ask; empty where the layout has none."""
    return keyed("head", state.open_task.extras)


def pair_arrays(pair: Adapter) -> dict[str, Array]:
    """A pair as the arrays `A:module` and `B:module`; its scale is left out."""
    return {**keyed("A", {n: f.a for n, f in pair.items()}), **keyed("B", {n: f.b for n, f in pair.items()})}


def pair_from(arrays: Mapping[str, Array], scale: float = 1.0) -> Adapter:
    """The inverse of `pair_arrays`, in float64."""
    b = part(arrays, "B")
    return Adapter(
        {n: Factors(a.astype(np.float64), b[n].astype(np.float64), scale) for n, a in part(arrays, "A").items()}
    )


def in_order(answers: Mapping[str, Answer], cohort: Cohort) -> Iterator[tuple[Member, Answer]]:
    """Members who answered with their answers, in the order of stable ids, one answer in memory at a time.

    Raises: MethodError if nobody answered.
    """
    if not answers:
        raise MethodError(
            f"no client answered in round {cohort.round} (asked: {len(cohort.members)}); "
            "a method cannot average nothing, and the last state stands"
        )
    members = {m.id: m for m in cohort.members}
    for client in sorted(answers):
        yield members[client], answers[client]


class Sums:
    """Weighted float64 sums of named arrays, of one shape each; smaller arrays are padded with zeros.

    Padding is at the end of every axis, so the first r rows of A or columns of B land where they belong. Memory is one
    client's arrays in float64, whatever the number of clients.
    """

    def __init__(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self._sums = {name: np.zeros(shape, np.float64) for name, shape in shapes.items()}
        self.weight = 0.0

    def add(self, arrays: Mapping[str, Array], weight: float) -> None:
        for name, total in self._sums.items():
            x = arrays[name]
            total[tuple(slice(n) for n in x.shape)] += weight * x.astype(np.float64)
        self.weight += weight

    def total(self) -> dict[str, NDArray[np.float64]]:
        """The sums."""
        return dict(self._sums)

    def mean(self) -> dict[str, NDArray[np.float64]]:
        """The sums over the weight of all that was added."""
        return {name: total / self.weight for name, total in self._sums.items()}


def head_sums(layout: Layout) -> Sums:
    """An empty sum of head changes; `add(part(answer.arrays, "head"), n_k)` for each client."""
    return Sums(layout.head)


def moved(start: Mapping[str, Array], change: Mapping[str, NDArray[np.float64]]) -> dict[str, Array]:
    """`start + change` in float64, in the dtype of the start."""
    return {name: (x.astype(np.float64) + change[name]).astype(x.dtype) for name, x in start.items()}


def relative(part_norm: float, whole_norm: float) -> float:
    """A norm as a fraction of another; 0 of 0 is 0, and something of nothing is infinite."""
    if whole_norm > 0.0:
        return part_norm / whole_norm
    return 0.0 if part_norm == 0.0 else math.inf


__all__ = [
    "METHODS",
    "Closed",
    "Cohort",
    "Member",
    "Method",
    "Open",
    "Round",
    "SumSession",
    "Sums",
    "blocks_for_all",
    "fresh_a",
    "get",
    "head_start",
    "head_sums",
    "in_order",
    "keyed",
    "largest",
    "moved",
    "new_head",
    "opened",
    "orthonormal_pair",
    "orthonormal_rows",
    "pair_arrays",
    "pair_from",
    "pair_of",
    "part",
    "plan_for",
    "plan_of_largest",
    "play",
    "register",
    "relative",
]
