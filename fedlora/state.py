"""The values of a run: what the server holds, what it asks, what a client answers. All frozen.

    W_eff = W0 + sum over tasks and blocks of B_j A_j + s * B A          for each adapted module

`W0` is the frozen base, which never travels; blocks are frozen factor pairs with their scale folded in; the
pair of the open task is what clients train. Arrays travel under keys `part:name`, e.g. `A:model.layers.0.mlp.up_proj`,
`B:...`, `head:score.weight`, `probe:...`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal

import numpy as np

from fedlora.adapter import Adapter, Array, Factors, stack
from fedlora.errors import AdapterError
from fedlora.privacy.accounting import Privacy

Part = Literal["A", "B", "R", "head"]
Codec = Literal["float32", "float16", "bfloat16", "int8", "int4"]
Kind = Literal["hello", "train", "measure", "secure", "evaluate", "error"]  # error: an answer only, says what is wrong
Stage = Literal["advertise", "share", "mask", "confirm", "unmask"]  # of a secure sum
Overlap = Literal["squared", "absolute", "normalised"]


@dataclass(frozen=True, kw_only=True)
class Module:
    """One adapted module of the base. `kind` says how the product acts: embeddings look A's columns up.

    `shares` names the module (the first by name) that reads the same input, as q, k and v of a layer do; empty: itself.
    """

    out: int
    inp: int
    kind: Literal["linear", "conv1d", "embedding"] = "linear"
    shares: str = ""


@dataclass(frozen=True, kw_only=True)
class Layout:
    """What may be trained: adapted modules by name, and dense extras (a classifier head) with their shapes.

    `features` is the width of the base's last hidden states, 0 where nobody says.
    """

    modules: Mapping[str, Module]
    head: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    features: int = 0

    def to_json(self) -> dict[str, Any]:
        return {
            "modules": {n: [m.out, m.inp, m.kind, m.shares] for n, m in sorted(self.modules.items())},
            "head": {n: list(s) for n, s in sorted(self.head.items())},
            "features": self.features,
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Layout:
        return cls(
            modules={n: Module(out=o, inp=i, kind=k, shares=s) for n, (o, i, k, s) in sorted(data["modules"].items())},
            head={n: tuple(s) for n, s in sorted(data["head"].items())},
            features=data["features"],
        )

    def inputs(self) -> dict[str, int]:
        """Every different input of an adapted module, by the name of the first module that reads it, and its width."""
        return {n: m.inp for n, m in self.modules.items() if m.shares in ("", n)}

    def within(self, dim: int) -> Layout:
        """The same modules as seen in the coordinates of a subspace of `dim` dimensions: every A has `dim` columns."""
        return replace(self, modules={n: replace(m, inp=dim) for n, m in self.modules.items()})

    @property
    def digest(self) -> str:
        return hashlib.sha256(json.dumps(self.to_json(), sort_keys=True).encode()).hexdigest()

    def max_rank(self) -> int:
        """The largest rank that every module can hold: the smallest min(out, in)."""
        return min(min(m.out, m.inp) for m in self.modules.values())


@dataclass(frozen=True, kw_only=True)
class Block:
    """A frozen sum of products (scale 1), and the state version at which it was made.

    It holds what was added after version `since` up to version `born`; -1: all from the beginning on.
    """

    adapter: Adapter
    born: int
    since: int = -1


@dataclass(frozen=True, kw_only=True)
class Subspace:
    """Where every A of a task lies: `A = M N` with N `[dim, in]`, independent rows, for each module.

    With a `seed` N is public: rows `start` to `start + dim` of the orthonormal basis of that module from the public
    generator, which every client makes by itself. Without one N was designed, and travels as `N:` arrays; its rows
    are then of the lengths that suit its inputs.
    """

    dim: int
    start: int = 0
    seed: int | None = None


@dataclass(frozen=True, kw_only=True)
class Task:
    """One task: its trained pair (if the method keeps one), its blocks, its dense extras such as a head.

    With a `subspace` the A of pair and blocks are coordinates M `[rank, dim]` in its `basis`, by module `[dim, in]`;
    `full` gives them as they act on the base.
    """

    name: str
    pair: Adapter | None = None  # its scale is the task's s
    blocks: tuple[Block, ...] = ()
    extras: Mapping[str, Array] = field(default_factory=dict)
    public_seed: int | None = None  # A (in fed-sb B too) comes from the public generator and is never sent
    sealed: bool = False
    statistics: Mapping[str, float] = field(default_factory=dict)
    subspace: Subspace | None = None
    basis: Mapping[str, Array] = field(default_factory=dict)

    @cached_property
    def full(self) -> Task:
        """The same task without a subspace: every A is `M N`, computed in float64, in float32 `[rank, in]`."""
        if self.subspace is None:
            return self

        def expanded(adapter: Adapter) -> Adapter:
            return Adapter({n: Factors(times(f.a, self.basis[n]), f.b, f.scale) for n, f in adapter.items()})

        return replace(
            self,
            pair=None if self.pair is None else expanded(self.pair),
            blocks=tuple(replace(b, adapter=expanded(b.adapter)) for b in self.blocks),
            subspace=None,
            basis={},
        )


def times(m: Array, n: Array) -> Array:
    """`M N` in float64, rounded once to float32: `[rank, dim] [dim, in] -> [rank, in]`."""
    return (m.astype(np.float64) @ n.astype(np.float64)).astype(np.float32)


@dataclass(frozen=True, kw_only=True)
class GlobalState:
    """All that the server must remember; the checkpoint is all of it."""

    version: int
    base: str  # fingerprint
    layout: Layout
    tasks: Mapping[str, Task]
    memory: Mapping[str, Mapping[str, Array]] = field(default_factory=dict)  # owner (a method) -> named arrays

    @property
    def open_task(self) -> Task:
        """The one task that is being trained. Raises: AdapterError if all are sealed."""
        for task in self.tasks.values():
            if not task.sealed:
                return task
        raise AdapterError("every task of this state is sealed: there is nothing to train")

    def with_task(self, task: Task, *, memory: Mapping[str, Mapping[str, Array]] | None = None) -> GlobalState:
        """The next version, with `task` in place of its namesake."""
        return replace(
            self,
            version=self.version + 1,
            tasks={**self.tasks, task.name: task},
            memory=self.memory if memory is None else memory,
        )

    def update(self) -> Adapter:
        """W_eff - W0 as one exact adapter of scale 1 (ranks add up); rank 0 for a state that has learnt nothing."""
        tasks = [t.full for t in self.tasks.values()]
        terms = [b.adapter for t in tasks for b in t.blocks]
        terms += [t.pair for t in tasks if t.pair is not None]
        return stack(terms) if terms else zero_adapter(self.layout, 0)


def zero_adapter(layout: Layout, rank: int) -> Adapter:
    """The adapter of product zero: all factors zero, float32."""
    return Adapter(
        {
            n: Factors(np.zeros((rank, m.inp), np.float32), np.zeros((m.out, rank), np.float32))
            for n, m in layout.modules.items()
        }
    )


@dataclass(frozen=True, kw_only=True)
class LocalTraining:
    """What one client does in one round. Exactly one of `local_steps` and `local_epochs` is set."""

    learning_rate: float
    local_steps: int | None  # optimiser steps
    local_epochs: float | None  # passes over the client's rows
    batch_size: int  # rows per micro-batch
    accumulation: int = 1  # micro-batches per optimiser step
    schedule: Literal["constant", "cosine"] = "constant"  # over the whole run
    warmup: float = 0.03  # fraction of the whole run
    weight_decay: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.99
    epsilon: float = 1e-8
    clip_norm: float | None = 1.0  # L2 over the client's whole gradient
    checkpointing: bool = False  # recompute activations in the backward pass
    autocast: bool = False  # bf16 compute around fp32 factors
    optimizer_state: Literal["fresh", "keep"] = "fresh"


@dataclass(frozen=True, kw_only=True)
class TrainPlan:
    """What a client must do with what it was sent; the method that wrote it stays at the server.

    The client's update is `scale * B @ A` (with a core, `scale * B @ R @ A`) on top of the blocks and `frozen` factors
    of its Ask. `rows` is the rank of the pair it starts from; it trains the first `rank` rows of A and columns of B (of
    the core, its leading `rank x rank` part), the rest stay frozen.

    Parts in `keep` stay at the client: it starts them from what it kept of its last round before this one (where it has
    nothing of that shape, as the plan says), trains those that `train` names, keeps them and never sends them.
    """

    method: str
    rank: int
    rows: int
    scale: float
    train: tuple[Part, ...]
    send: tuple[Part, ...]
    changes: tuple[Part, ...] = ()  # parts sent as trained value minus start value, first `rank` rows or columns
    a_from: Literal["given", "fresh", "public"] = "given"
    b_from: Literal["given", "zero", "public"] = "given"
    a_seed: int = 0  # of the public generator, when a_from or b_from is "public"
    core: bool = False  # the pair has a core R [rows, rows], given as `R:` arrays
    keep: tuple[Part, ...] = ()
    tail: int = 0  # the last trained rows of A and columns of B that `tail_penalty` presses towards zero
    tail_penalty: float = 0.0  # adds tail_penalty * sum over modules of ||B_tail||_F ||A_tail||_F to the loss
    against: int = 0  # the first so many blocks of the ask are of sealed tasks, which `overlap` is measured against
    overlap: float = (
        0.0  # weight of the penalty on the overlap of A with the A of those blocks, see training/penalty.py
    )
    overlap_form: Overlap = "squared"
    anchor: float = 0.0  # weight of 1/2 sum fisher (x - anchor)^2; the ask carries both for A and B, see `Ask.arrays`
    codec: Codec = "float32"  # how the answer's arrays travel
    feedback: Literal["coordinates", "product"] = (
        "coordinates"  # where the codec's error is remembered, see feedback.py
    )
    top: int | None = None  # only so many leading directions of the product are sent; the rest waits in the error
    training: LocalTraining
    privacy: Privacy | None = None  # of single rows, see fedlora/training/private.py; clip_norm then does nothing
    progress: tuple[float, float] = (0.0, 1.0)  # of the whole run, at the first and after the last local step
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class Header:
    """Who, when and about what: travels with every Ask and is echoed by its Answer."""

    run: str
    round: int
    client: str
    kind: Kind
    base: str = ""  # fingerprint; empty only in a hello
    version: int = 0
    attempt: int = 0
    phase: int = 0
    code: str = ""  # digest of the asker's code; a client that runs other code refuses


@dataclass(frozen=True, kw_only=True)
class PublicPair:
    """A pair `scale * B @ A` to evaluate whose B is in the Ask and whose A `[rows, in]` never travels: every client
    makes it from the public generator, and checks it against the Ask's `probe:` arrays. With `core` B is public too,
    the product is `scale * B @ R @ A`, and the Ask carries `R:` arrays [rows, rows] instead of B."""

    seed: int
    rows: int
    scale: float
    core: bool = False


@dataclass(frozen=True, kw_only=True)
class PersonalPair:
    """A pair `scale * B @ A` of rank `rank` to evaluate that is the client's own: B, and a head, are what it kept; A is
    the first `rank` rows of the Ask's `A:` arrays, or what it kept where there are none. Who kept nothing adds nothing.
    """

    rank: int
    scale: float


@dataclass(frozen=True, kw_only=True)
class Measure:
    """What a client measures on its training rows, under what the ask attaches. All are sums over rows, or means that
    become sums times the answer's `examples`, so that what clients give adds (and can be added where nobody sees one of
    them). Arrays of the answer, float32:

    `sketch:input` `[in, sketch]`, the mean of x x^T Omega over the tokens' inputs x of every `Layout.inputs`, with
    Omega from `public_normal(seed, "sketch", input, shape=(in, sketch))`, and `energy:input` `[1]`, the mean of |x|^2;
    `feature:sum` `[classes, features]` and `feature:count` `[classes]`: features of the bare base by label (one class
    for rows without labels), each scaled to norm 1, and with `columns` `feature:sketch` `[features, columns]`, the sum
    of f f^T Omega (`fedlora.continual.router.omega`); `read:sum` `[reads, features]`, `read:count`, `read:energy` `[1]`
    and `read:sketch`: the same, and |h|^2, of what a classifier's head reads under the blocks that the ask attaches,
    means of last hidden states as they are; divided by the rows, so that counts are shares (`fedlora.discriminants`);
    `fisher-A:module`, `fisher-B:module`: the sum over at most `fisher` rows of the squared gradient of that row's
    loss, by entry of the ask's `A:` and `B:`.
    """

    sketch: int = 0
    seed: int = 0
    classes: int = 0  # 0: no features
    columns: int = 0  # of the sketch of features, and of what a head reads
    fisher: int = 0
    reads: int = 0  # classes; 0: nothing of what a head reads


@dataclass(frozen=True, kw_only=True)
class Whole:
    """What a client does for whole clients to be private in a secure sum (`fedlora.privacy.secagg.whole`).

    Its arrays are clipped to `clip`, one L2 norm over all; with `counted` it adds +1/2 or -1/2, whether they were
    within it, times `clip`. `noise` and `count_noise` are the standard deviations of its own noise on the arrays and
    on that count; 0.0 where the server adds all.
    """

    clip: float
    noise: float = 0.0
    counted: bool = False
    count_noise: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Secure:
    """One stage of a secure sum (`fedlora.privacy.secagg`); its message is the ask's.

    At `advertise` the client trains by the ask's plan, whose update it keeps. What it adds to the sum is its arrays in
    the shapes of rank `rows`, padded with zeros, B times `ratio`, all of it times its weight, min(its rows, `examples`)
    / `examples`; and the scalars of `fedlora.privacy.secagg.update`. With `columns` p it is a sketch of its products in
    two parts (`fedlora.privacy.secagg.sketch`): B (A Omega) `[out, p]` with Omega from `seed`, and, when the ask of
    part 2 has brought `Q:` arrays `[out, p]`, (Q^T B) A `[p, in]` and its head; p is at most out and in of a module.
    With `whole` all clients weigh the same, and no losses are summed.
    """

    stage: Stage
    part: int = 1
    rows: int = 0
    ratio: float = 1.0
    examples: int = 1
    columns: int = 0
    seed: int = 0
    whole: Whole | None = None


@dataclass(frozen=True, kw_only=True)
class Ask:
    """What one client is asked: blocks of W_eff (the same for all), its own frozen factors, arrays to start from.

    With `on`, the id of blocks that the client holds already, `blocks` come after those. `whole` is the id of all of
    them together (`fedlora.wire.blocks_id`); empty: the client need not hold them any longer than for this ask.
    """

    task: str = ""  # whose rows and settings the client uses; empty in a run without tasks
    settings: str = ""  # deployed: what the run tells its nodes, see `fedlora.shared_settings`
    plan: TrainPlan | None = None  # None but for training
    measure: Measure | None = None
    secure: Secure | None = None
    message: bytes = b""  # of the server's side of a secure sum
    subspace: Subspace | None = None  # the A of plan and arrays are coordinates in it
    blocks: tuple[Block, ...] = ()
    on: str | None = None
    whole: str = ""
    public: PublicPair | None = None  # in an evaluation; a training plan says where its A comes from
    personal: PersonalPair | None = None  # in an evaluation
    frozen: Adapter | None = None  # added to W_eff for this client alone; products may be negative
    # `A:`, `B:`, `R:`, `head:`, `probe:` (with `probe:N/module` of a public subspace), `N:` of a designed one, and for
    # an anchored plan `fisher-A:`, `fisher-B:`, `anchor-A:`, `anchor-B:`
    arrays: Mapping[str, Array] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What one client says: arrays as its plan's `send` asks, the weight of its data, measures, and facts (a hello)."""

    examples: int = 0
    metrics: Mapping[str, float] = field(default_factory=dict)
    arrays: Mapping[str, Array] = field(default_factory=dict)
    info: Mapping[str, Any] = field(default_factory=dict)  # JSON values only
    message: bytes = b""  # of the client's side of a secure sum


def expected_shapes(plan: TrainPlan, layout: Layout) -> dict[str, tuple[int, ...]]:
    """Key -> shape of every array that an answer to `plan` must carry, no more and no fewer."""
    shapes: dict[str, tuple[int, ...]] = {}
    rank = plan.rank if plan.top is None else min(plan.top, plan.rank)
    for name, module in layout.modules.items():
        if "A" in plan.send:
            shapes[f"A:{name}"] = (rank, module.inp)
        if "B" in plan.send:
            shapes[f"B:{name}"] = (module.out, rank)
        if "R" in plan.send:
            shapes[f"R:{name}"] = (plan.rank, plan.rank)
    if "head" in plan.send:
        shapes.update({f"head:{name}": tuple(shape) for name, shape in layout.head.items()})
    return shapes


def expected_arrays(ask: Ask, layout: Layout) -> dict[str, tuple[int, ...]]:
    """Key -> shape of every array that an answer to `ask` must carry: of its plan, or of what it measures."""
    if ask.secure is not None:
        return {}
    if ask.plan is not None:
        return expected_shapes(ask.plan, layout if ask.subspace is None else layout.within(ask.subspace.dim))
    shapes: dict[str, tuple[int, ...]] = {}
    if ask.measure is None:
        return shapes
    if ask.measure.sketch:
        for name, width in layout.inputs().items():
            shapes[f"sketch:{name}"], shapes[f"energy:{name}"] = (width, ask.measure.sketch), (1,)
    if ask.measure.classes:
        shapes["feature:sum"] = (ask.measure.classes, layout.features)
        shapes["feature:count"] = (ask.measure.classes,)
        if ask.measure.columns:
            shapes["feature:sketch"] = (layout.features, ask.measure.columns)
    if ask.measure.reads:
        shapes |= {"read:sum": (ask.measure.reads, layout.features), "read:count": (ask.measure.reads,)}
        shapes |= {"read:energy": (1,), "read:sketch": (layout.features, ask.measure.columns)}
    if ask.measure.fisher:
        shapes |= {f"fisher-{key}": x.shape for key, x in ask.arrays.items() if key[:2] in ("A:", "B:")}
    return shapes


def part(arrays: Mapping[str, Array], name: str) -> dict[str, Array]:
    """The arrays of one part, keyed by module: `part({"A:q": x}, "A") == {"q": x}`."""
    return {key.split(":", 1)[1]: x for key, x in arrays.items() if key.split(":", 1)[0] == name}


def keyed(name: str, arrays: Mapping[str, Array]) -> dict[str, Array]:
    """The inverse of `part`: `keyed("A", {"q": x}) == {"A:q": x}`."""
    return {f"{name}:{module}": x for module, x in arrays.items()}
