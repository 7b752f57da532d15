"""Where a client's training starts: factors and a head that its Ask gives, that it kept, or that it makes by itself."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import get_args

import numpy as np
from numpy.typing import NDArray

from fedlora.adapter import Adapter, Array, Factors
from fedlora.errors import BaseMismatch, TrainingError
from fedlora.rng import public_normal, public_orthonormal, stream
from fedlora.state import Ask, Header, Layout, Module, Overlap, Part, Subspace, TrainPlan, part, times
from fedlora.subspace import public_rows, rows_checksum

__all__ = ["Start", "bases", "check_plan", "coordinates", "personal_pair", "public_pair", "start"]

Float = NDArray[np.float32]
PROBE_TOLERANCE = 1e-5  # relative to the norm of the checksum


@dataclass(frozen=True, kw_only=True)
class Start:
    """What a client's training begins with, by module: `a [rows, in]`, `b [out, rows]`, with a core `r [rows, rows]`
    (else empty), and the `head` by name; float32."""

    a: Mapping[str, Float]
    b: Mapping[str, Float]
    r: Mapping[str, Float]
    head: Mapping[str, Float]


def check_plan(plan: TrainPlan, layout: Layout, who: str) -> None:
    """Raises: TrainingError if this base cannot follow the plan, or the plan contradicts itself."""
    if not 1 <= plan.rank <= plan.rows:
        raise TrainingError(f"{who}: rank {plan.rank} must be between 1 and the pair's {plan.rows} rows")
    for name, module in layout.modules.items():
        if plan.rank > min(module.out, module.inp):
            raise TrainingError(
                f"{who}: rank {plan.rank} is above what {name} [{module.out}, {module.inp}] can hold; lower lora.ranks"
            )
    if not plan.train:
        raise TrainingError(f"{who}: the plan trains nothing; train must name A, B, R or head")
    if "head" in {*plan.train, *plan.send, *plan.keep} and not layout.head:
        raise TrainingError(
            f"{who}: the plan names a head, this base has none; is model.task_type the same everywhere?"
        )
    if extra := set(plan.changes) - set(plan.send):
        raise TrainingError(f"{who}: changes of {sorted(extra)} are asked for, but only {list(plan.send)} is sent")
    if not (math.isfinite(plan.scale) and plan.scale != 0):
        raise TrainingError(f"{who}: scale must be finite and not 0, got {plan.scale}")
    _check_parts(plan, who)
    _check_tail(plan, who)
    _check_penalties(plan, who)
    t = plan.training
    if plan.privacy is not None and (t.local_steps is None or t.accumulation != 1):
        raise TrainingError(
            f"{who}: with example-level privacy the steps are fixed and each draws its own rows: set local_steps and "
            f"accumulation 1, got local_epochs {t.local_epochs} and accumulation {t.accumulation}; batch_size only "
            "bounds the rows worked on at a time"
        )
    if (t.local_steps is None) == (t.local_epochs is None):
        raise TrainingError(
            f"{who}: exactly one of local_steps and local_epochs must be set, got {t.local_steps} and {t.local_epochs}"
        )


def _check_parts(plan: TrainPlan, who: str) -> None:
    """Raises: TrainingError if cores, kept parts and public bases do not go together."""
    moved = {*plan.train, *plan.send}
    if plan.core and moved - {"R", "head"}:
        raise TrainingError(
            f"{who}: with a core only R and head are trained and sent, A and B are its fixed bases; the plan trains "
            f"{list(plan.train)} and sends {list(plan.send)}"
        )
    if not plan.core and "R" in moved:
        raise TrainingError(f"{who}: the plan names R, but its pair has no core; set core, or train A and B")
    if both := set(plan.keep) & set(plan.send):
        raise TrainingError(f"{who}: {sorted(both)} must stay at the client and is to be sent too; keep it or send it")
    if "R" in plan.keep or (plan.core and {"A", "B"} & set(plan.keep)):
        raise TrainingError(
            f"{who}: a core and its bases are the same for all clients, so they cannot be kept; keep is "
            f"{list(plan.keep)}"
        )
    if twice := {p for p, source in (("A", plan.a_from), ("B", plan.b_from)) if p in plan.keep and source == "public"}:
        raise TrainingError(f"{who}: {sorted(twice)} is public and cannot be the client's own; start it otherwise")
    if plan.b_from == "public" and plan.a_from != "public":
        raise TrainingError(
            f"{who}: a public B has no checksum but that of a public A from the same generator; a_from is "
            f"{plan.a_from!r}"
        )


def _check_tail(plan: TrainPlan, who: str) -> None:
    """Raises: TrainingError if there is no such tail, or nothing that its penalty could press."""
    if not 0 <= plan.tail <= plan.rank:
        raise TrainingError(f"{who}: the tail must be 0 to {plan.rank} of the trained rows, got {plan.tail}")
    if not (math.isfinite(plan.tail_penalty) and plan.tail_penalty >= 0):
        raise TrainingError(f"{who}: tail_penalty must be finite and not negative, got {plan.tail_penalty}")
    if plan.tail_penalty and not (plan.tail and not plan.core and {"A", "B"} & set(plan.train)):
        raise TrainingError(
            f"{who}: tail_penalty {plan.tail_penalty:g} needs a tail of a trained A or B; the plan trains "
            f"{list(plan.train)} with a tail of {plan.tail}"
        )


def _check_penalties(plan: TrainPlan, who: str) -> None:
    """Raises: TrainingError if a penalty is no number, has nothing to be measured against, or would be constant."""
    for name, value in (("overlap", plan.overlap), ("anchor", plan.anchor)):
        if not (math.isfinite(value) and value >= 0):
            raise TrainingError(f"{who}: {name} must be finite and not negative, got {value}")
    if plan.against < 0:
        raise TrainingError(f"{who}: against counts blocks, got {plan.against}")
    if plan.overlap_form not in get_args(Overlap):
        raise TrainingError(f"{who}: overlap_form is one of {', '.join(get_args(Overlap))}, got {plan.overlap_form!r}")
    if plan.overlap and not plan.against:
        raise TrainingError(
            f"{who}: overlap {plan.overlap:g} against 0 blocks: there is nothing to be orthogonal to; the first task's "
            "overlap must be 0"
        )
    if plan.overlap and (plan.core or "A" not in plan.train):
        raise TrainingError(
            f"{who}: overlap {plan.overlap:g} would be a constant, because A is frozen; the plan trains "
            f"{list(plan.train)}"
        )
    if plan.anchor and (plan.core or not {"A", "B"} & set(plan.train)):
        raise TrainingError(
            f"{who}: anchor {plan.anchor:g} would be a constant, because neither A nor B is trained; the plan trains "
            f"{list(plan.train)}"
        )


def coordinates(ask: Ask, layout: Layout) -> Layout:
    """The layout as the plan and the arrays of an ask see it: in the coordinates of its subspace, if it has one."""
    return layout if ask.subspace is None else layout.within(ask.subspace.dim)


def bases(ask: Ask, header: Header, layout: Layout) -> dict[str, Float]:
    """N `[dim, in]` of every module; empty without a subspace. An A of the ask acts as `M N`.

    A public N is made here and checked against the ask's `probe:N/module` `[dim]`; a designed one is the ask's
    `N:module`.
    Raises: TrainingError if something is missing, misshapen or has a row of zeros, or an embedding is adapted (its
    A is looked up by token, and its fresh factor is B); BaseMismatch if a public N is not the server's; AdapterError if
    a public subspace does not fit a module.
    """
    subspace = ask.subspace
    if subspace is None:
        return {}
    who = f"client {header.client}, round {header.round}"
    given, probes = part(ask.arrays, "N"), part(ask.arrays, "probe")
    out: dict[str, Float] = {}
    for name, module in sorted(layout.modules.items()):
        if module.kind == "embedding":
            raise TrainingError(
                f"{who}: {name} is an embedding, and a subspace is one of inputs: leave it out of model.target_modules"
            )
        if subspace.seed is not None:
            out[name] = _public_n(subspace, name, module, probes, who)
            continue
        n = _given(given, f"N:{name}", name, (subspace.dim, module.inp), who)
        if not (np.isfinite(n).all() and n.any(axis=1).all()):
            raise TrainingError(
                f"{who}: N:{name} has rows that are zero or not finite; was it sent with a lossy codec?"
            )
        out[name] = n
    return out


def start(ask: Ask, plan: TrainPlan, header: Header, layout: Layout, kept: Mapping[str, Array] | None = None) -> Start:
    """What the plan says to begin with; parts in `plan.keep` are taken from `kept` where it has their shape.

    Fresh A is uniform within 1/sqrt(in) (LoRA's usual Kaiming start), one stream per client and round over sorted
    modules. An embedding's fresh pair is the other way round, as in PEFT: A is zero and B normal, because looking up
    a zero B would give A no gradient. A public A is checked against the Ask's checksum `A @ probe` per module; a public
    B is the transpose of orthonormal rows from the same generator, which that checksum vouches for. In a subspace every
    A is coordinates `[rows, dim]`, and these rules hold for them: `in` is `dim`.
    Raises: TrainingError if an array is missing or misshapen, or parts are to be kept and `kept` is None; BaseMismatch
    if a public A is not the server's.
    """
    who = f"client {header.client}, round {header.round}"
    if plan.keep and kept is None:
        raise TrainingError(
            f"{who}: this client has no memory folder, and {plan.method} keeps {', '.join(plan.keep)} there from round "
            "to round; give the node one, or choose a method that keeps nothing"
        )
    layout = coordinates(ask, layout)
    given_a, given_b, given_r, head = (part(ask.arrays, name) for name in ("A", "B", "R", "head"))
    probes = part(ask.arrays, "probe")
    a: dict[str, Float] = {}
    b: dict[str, Float] = {}
    r: dict[str, Float] = {}
    draw = stream(plan.seed, "fresh-a", header.client, header.round)
    for name, module in sorted(layout.modules.items()):
        shape_a, shape_b = (plan.rows, module.inp), (module.out, plan.rows)
        own_a, own_b = _own(plan, kept, "A", name, shape_a), _own(plan, kept, "B", name, shape_b)
        if own_a is not None:
            a[name] = own_a
        elif plan.a_from == "given":
            a[name] = _given(given_a, f"A:{name}", name, shape_a, who)
        elif plan.a_from == "fresh":
            bound = 1 / math.sqrt(module.inp)
            a[name] = (draw.random(shape_a, np.float32) * 2 - 1) * np.float32(bound)
        else:
            a[name] = _public_a(plan.a_seed, plan.rows, name, module, probes, who)
        if own_b is not None:
            b[name] = own_b
        elif plan.b_from == "given":
            b[name] = _given(given_b, f"B:{name}", name, shape_b, who)
        elif plan.b_from == "zero":
            b[name] = np.zeros(shape_b, np.float32)
        else:
            b[name] = _public_b(plan.a_seed, plan.rows, name, module, who)
        if module.kind == "embedding" and plan.a_from == "fresh" and plan.b_from == "zero":
            if own_a is None:
                a[name] = np.zeros(shape_a, np.float32)
            if own_b is None:
                b[name] = draw.standard_normal(shape_b, np.float32)
        if plan.core:
            r[name] = _given(given_r, f"R:{name}", name, (plan.rows, plan.rows), who)
    heads: dict[str, Float] = {}
    for name, shape in sorted(layout.head.items()):
        own = _own(plan, kept, "head", name, tuple(shape))
        heads[name] = _given(head, f"head:{name}", name, tuple(shape), who) if own is None else own
    return Start(a=a, b=b, r=r, head=heads)


def _own(
    plan: TrainPlan, kept: Mapping[str, Array] | None, of: Part, name: str, shape: tuple[int, ...]
) -> Float | None:
    """What this client kept of a part that the plan leaves to it, if it has this shape."""
    x = kept.get(f"{of}:{name}") if kept is not None and of in plan.keep else None
    return x.astype(np.float32) if x is not None and x.shape == shape else None


def _given(arrays: Mapping[str, Array], key: str, name: str, shape: tuple[int, ...], who: str) -> Float:
    if name not in arrays:
        raise TrainingError(f"{who}: the plan starts from {key}, which the ask does not carry")
    if arrays[name].shape != shape:
        raise TrainingError(f"{who}: {key} has shape {arrays[name].shape}, the plan and this base need {shape}")
    return arrays[name].astype(np.float32)


def public_pair(ask: Ask, header: Header, layout: Layout) -> Adapter:
    """The pair that an evaluation attaches: A made here, and B from the ask; with a core, B made here too, times R.

    In a subspace A is made in its coordinates, and returned as it acts on the base, `M N`.
    Raises: as `start` and `bases`, and TrainingError if the ask has none.
    """
    who = f"client {header.client}, round {header.round}"
    if ask.public is None:
        raise TrainingError(f"{who}: the ask has no public pair")
    seed, rows = ask.public.seed, ask.public.rows
    b, r, probes = (part(ask.arrays, name) for name in ("B", "R", "probe"))
    pairs: dict[str, Factors] = {}
    for name, module in coordinates(ask, layout).modules.items():
        if ask.public.core:
            core = _given(r, f"R:{name}", name, (rows, rows), who)
            left = _public_b(seed, rows, name, module, who) @ core
        else:
            left = _given(b, f"B:{name}", name, (module.out, rows), who)
        pairs[name] = Factors(_public_a(seed, rows, name, module, probes, who), left, ask.public.scale)
    return _acting(pairs, bases(ask, header, layout))


def personal_pair(
    ask: Ask, header: Header, layout: Layout, kept: Mapping[str, Array]
) -> tuple[Adapter, dict[str, Float]]:
    """The pair and head of this client's own that an evaluation attaches; `kept` is what it kept of its last round.

    A `[rank, in]` is the first rows of the ask's, or kept where the ask has none; B `[out, rank]` and head are kept.
    What was not kept in this shape adds nothing: B is zero there, and the head is the ask's. In a subspace A is
    coordinates, and returned as it acts on the base.
    Raises: TrainingError if the ask has no personal pair, or its A or head is missing or misshapen; as `bases`.
    """
    who = f"client {header.client}, round {header.round}"
    if ask.personal is None:
        raise TrainingError(f"{who}: the ask has no personal pair")
    rank, given = ask.personal.rank, part(ask.arrays, "A")
    own = {of: part(kept, of) for of in ("A", "B", "head")}
    pairs: dict[str, Factors] = {}
    for name, module in coordinates(ask, layout).modules.items():
        shape_a, shape_b = (rank, module.inp), (module.out, rank)
        if given:
            leading = {name: given[name][:rank]} if name in given else {}
            a = _given(leading, f"A:{name}", name, shape_a, who)
        else:
            a = _kept(own["A"], name, shape_a)
        pairs[name] = Factors(a, _kept(own["B"], name, shape_b), ask.personal.scale)
    head = part(ask.arrays, "head")
    heads: dict[str, Float] = {}
    for name, shape in sorted(layout.head.items()):
        mine = name in own["head"] and own["head"][name].shape == tuple(shape)
        heads[name] = _given(own["head"] if mine else head, f"head:{name}", name, tuple(shape), who)
    return _acting(pairs, bases(ask, header, layout)), heads


def _acting(pairs: Mapping[str, Factors], basis: Mapping[str, Float]) -> Adapter:
    """The pairs as they act on the base: coordinates times their basis, where there is one."""
    return Adapter({n: Factors(times(f.a, basis[n]), f.b, f.scale) if n in basis else f for n, f in pairs.items()})


def _kept(arrays: Mapping[str, Array], name: str, shape: tuple[int, ...]) -> Float:
    """What was kept under this name in this shape, or zeros."""
    if name in arrays and arrays[name].shape == shape:
        return arrays[name].astype(np.float32)
    return np.zeros(shape, np.float32)


def _public_a(seed: int, rows: int, name: str, module: Module, probes: Mapping[str, Array], who: str) -> Float:
    basis, checksum = _basis(seed, name, rows, module.inp)
    _vouched(probes, name, checksum, f"A of {name}", seed, who)
    return basis


def _public_n(subspace: Subspace, name: str, module: Module, probes: Mapping[str, Array], who: str) -> Float:
    checksum = _checksum(subspace, name, module.inp)
    _vouched(probes, f"N/{name}", checksum, f"basis N of {name}", subspace.seed, who)
    return public_rows(subspace, name, module.inp)


def _vouched(
    probes: Mapping[str, Array], key: str, checksum: NDArray[np.floating], what: str, seed: int | None, who: str
) -> None:
    """Raises: TrainingError without a checksum of this shape in the ask; BaseMismatch if it is another's."""
    if key not in probes or probes[key].shape != checksum.shape:
        raise TrainingError(
            f"{who}: a public {what} needs its checksum probe:{key} of shape {checksum.shape} in the ask"
        )
    off = float(np.linalg.norm(probes[key].astype(np.float64) - checksum))
    if not off <= PROBE_TOLERANCE * max(float(np.linalg.norm(checksum)), 1e-30):
        raise BaseMismatch(
            f"{who}: the public {what} made here from seed {seed} is not the server's: checksums differ by {off:.2e}; "
            "do both sides run the same fedlora version?"
        )


def _public_b(seed: int, rows: int, name: str, module: Module, who: str) -> Float:
    if rows > module.out:
        raise TrainingError(
            f"{who}: a public B of {rows} orthonormal columns does not fit the {module.out} outputs of {name}; lower "
            "method.task_rank or lora.ranks"
        )
    return _basis_b(seed, name, rows, module.out)


@functools.lru_cache(maxsize=4096)
def _basis(seed: int, name: str, rows: int, inp: int) -> tuple[Float, NDArray[np.float64]]:
    basis = np.asarray(public_orthonormal(seed, "basis", name, rows=rows, cols=inp), np.float32)
    probe = np.asarray(public_normal(seed, "probe", name, shape=(inp,)), np.float64)
    basis.flags.writeable = False
    return basis, basis.astype(np.float64) @ probe


@functools.lru_cache(maxsize=4096)
def _checksum(subspace: Subspace, name: str, inp: int) -> Float:
    return rows_checksum(subspace, name, public_rows(subspace, name, inp))


@functools.lru_cache(maxsize=4096)
def _basis_b(seed: int, name: str, rows: int, out: int) -> Float:
    basis = np.asarray(public_orthonormal(seed, "basis-b", name, rows=rows, cols=out), np.float32).T
    basis.flags.writeable = False
    return basis
