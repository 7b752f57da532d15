"""Every Ask, Answer and state as one byte string: JSON header and safetensors bodies (see frame.py); never pickle.

Arrays travel in the wire dtype (`probe:` always in float32) and arrive as float32; a state keeps its dtypes. Size,
digest, table, fields, keys, shapes and dtypes are checked in that order, before any array is made. Decoded arrays are
C-contiguous and **read-only**: where nothing had to be converted they are views of the message, which lives as long
as they do. Torch wants a copy: `torch.tensor(x)`.

An ask has two bodies; the second holds the blocks, which are the same for all clients of a round and are therefore
encoded once, by `encode_blocks`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np

from fedlora.adapter import Adapter, Array, Factors
from fedlora.errors import AdapterError, WireError
from fedlora.frame import DTYPES, Body, Table, body, from_json, message, open_message, read_header
from fedlora.state import Answer, Ask, Block, GlobalState, Header, Layout, Module, PublicPair, Task, TrainPlan

SavedBlock = tuple[int, Mapping[str, float]]  # born, and the scales that are not 1
ModuleKind = Literal["linear", "conv1d", "embedding"]

_PROBE = "array/probe:"
_WIRE = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}


@dataclass(frozen=True, kw_only=True)
class BlocksBody:
    """Blocks encoded once, to go into the ask of every client of a round; made by `encode_blocks`."""

    blocks: tuple[Block, ...]
    dtype: str
    body: Body
    entry: list[int | str]


def encode_blocks(blocks: tuple[Block, ...], dtype: str = "float32") -> BlocksBody:
    """The part of an ask that all clients of a round share. Raises: WireError as `encode_ask`."""
    arrays = {key: x for i, block in enumerate(blocks) for key, x in _arrays_of(block.adapter, f"{i}/")}
    encoded = body(_cast(arrays, dtype))
    return BlocksBody(blocks=blocks, dtype=dtype, body=encoded, entry=encoded.entry())


def encode_ask(header: Header, ask: Ask, dtype: str = "float32", *, shared: BlocksBody | None = None) -> bytes:
    """One ask as bytes; with `shared` (the same blocks, encoded before) its blocks cost one copy.

    Raises: WireError if a value overflows `dtype`, a number of the plan is not finite, or `shared` is of other blocks.
    """
    shared = encode_blocks(ask.blocks, dtype) if shared is None else shared
    same = [b.born for b in shared.blocks] == [b.born for b in ask.blocks] and all(
        x.adapter is y.adapter for x, y in zip(shared.blocks, ask.blocks, strict=True)
    )
    if not same or shared.dtype != dtype:
        raise WireError(
            f"ask to {header.client}: the shared body is of {len(shared.blocks)} blocks in {shared.dtype}, not"
            f" this ask's {len(ask.blocks)} in {dtype}; call encode_blocks on the blocks of this round"
        )
    arrays = {f"array/{key}": x for key, x in ask.arrays.items()}
    if ask.frozen is not None:
        arrays.update(_arrays_of(ask.frozen, "frozen/"))
    own = body(_cast(arrays, dtype))
    values = {
        "header": asdict(header),
        "plan": None if ask.plan is None else asdict(ask.plan),
        "blocks": [[b.born, _scales(b.adapter)] for b in ask.blocks],
        "public": None if ask.public is None else asdict(ask.public),
        "frozen": None if ask.frozen is None else _scales(ask.frozen),
        "dtype": dtype,
    }
    return message("ask", values, [(own, own.entry()), (shared.body, shared.entry)])


def decode_ask(data: bytes, *, max_bytes: int) -> tuple[Header, Ask]:
    """The header and ask of a message; arrays float32. Raises: WireError saying what is wrong with the bytes."""
    names = {"header", "plan", "blocks", "public", "frozen", "dtype"}
    values, (own, shared) = open_message(data, "ask", max_bytes, names, bodies=2)
    for table in (own, shared):
        _require_dtype(table, values["dtype"])
    frozen = from_json(Mapping[str, float] | None, values["frozen"], "frozen")
    ask = Ask(
        plan=from_json(TrainPlan | None, values["plan"], "plan"),
        blocks=_take_blocks(shared, "", from_json(tuple[SavedBlock, ...], values["blocks"], "blocks"), upcast=True),
        public=from_json(PublicPair | None, values["public"], "public"),
        frozen=None if frozen is None else _take_adapter(own, "frozen/", frozen, upcast=True),
        arrays={key: _upcast(own.take(f"array/{key}")) for key in own.names("array/")},
    )
    own.require_empty()
    shared.require_empty()
    return from_json(Header, values["header"], "header"), ask


def encode_answer(header: Header, answer: Answer, dtype: str = "float32") -> bytes:
    """One answer as bytes. Raises: WireError if a value overflows `dtype`, or a metric or fact is not finite JSON."""
    own = body(_cast({f"array/{key}": x for key, x in answer.arrays.items()}, dtype))
    values = {
        "header": asdict(header),
        "examples": answer.examples,
        "metrics": {name: float(x) for name, x in answer.metrics.items()},
        "info": dict(answer.info),
        "dtype": dtype,
    }
    return message("answer", values, [(own, own.entry())])


def decode_answer(
    data: bytes, *, max_bytes: int, expected: Mapping[str, tuple[int, ...]] | None = None
) -> tuple[Header, Answer]:
    """The header and answer of a message; arrays float32.

    `expected` (key -> shape, see `state.expected_shapes`) is the exact key set; it is checked before arrays are made.
    Raises: WireError saying what is wrong with the bytes, or which key is missing, extra, or of another shape.
    """
    values, (own,) = open_message(
        data, "answer", max_bytes, {"header", "examples", "metrics", "info", "dtype"}, bodies=1
    )
    _require_dtype(own, values["dtype"])
    if expected is not None:
        _require_shapes({key: own.rows[f"array/{key}"].shape for key in own.names("array/")}, expected)
    answer = Answer(
        examples=from_json(int, values["examples"], "examples"),
        metrics=from_json(Mapping[str, float], values["metrics"], "metrics"),
        arrays={key: _upcast(own.take(f"array/{key}")) for key in own.names("array/")},
        info=from_json(Mapping[str, Any], values["info"], "info"),
    )
    own.require_empty()
    return from_json(Header, values["header"], "header"), answer


def peek(data: bytes, *, max_bytes: int) -> Header:
    """The header of an ask or answer; its bodies are neither read nor verified. Raises: WireError."""
    values, _ = read_header(data, ["ask", "answer"], max_bytes)
    header: Header = from_json(Header, values.get("header"), "header")
    return header


def encode_state(state: GlobalState) -> bytes:
    """The whole state as bytes, lossless: dtypes, scales, the order of every mapping. Raises: WireError."""
    arrays: dict[str, Array] = {}
    tasks: list[dict[str, Any]] = []
    for i, task in enumerate(state.tasks.values()):
        if task.pair is not None:
            arrays.update(_arrays_of(task.pair, f"task/{i}/pair/"))
        for j, block in enumerate(task.blocks):
            arrays.update(_arrays_of(block.adapter, f"task/{i}/block/{j}/"))
        arrays.update({f"task/{i}/extra/{name}": x for name, x in task.extras.items()})
        tasks.append(
            {
                "name": task.name,
                "pair": None if task.pair is None else _scales(task.pair),
                "blocks": [[b.born, _scales(b.adapter)] for b in task.blocks],
                "extras": list(task.extras),
                "public_seed": task.public_seed,
                "sealed": task.sealed,
                "statistics": [[name, float(x)] for name, x in task.statistics.items()],
            }
        )
    for i, named in enumerate(state.memory.values()):
        arrays.update({f"memory/{i}/{name}": x for name, x in named.items()})
    values = {
        "version": state.version,
        "base": state.base,
        "modules": [[name, m.out, m.inp, m.kind] for name, m in state.layout.modules.items()],
        "head": [[name, list(shape)] for name, shape in state.layout.head.items()],
        "tasks": tasks,
        "memory": [[owner, list(named)] for owner, named in state.memory.items()],
    }
    whole = body(arrays)
    return message("state", values, [(whole, whole.entry())])


def decode_state(data: bytes) -> GlobalState:
    """The state that `encode_state` wrote. Raises: WireError if the bytes are damaged or are no state."""
    names = {"version", "base", "modules", "head", "tasks", "memory"}
    values, (table,) = open_message(data, "state", len(data), names, bodies=1)
    tasks: dict[str, Task] = {}
    for i, saved in enumerate(from_json(tuple[_SavedTask, ...], values["tasks"], "tasks")):
        tasks[saved.name] = Task(
            name=saved.name,
            pair=None if saved.pair is None else _take_adapter(table, f"task/{i}/pair/", saved.pair),
            blocks=_take_blocks(table, f"task/{i}/block/", saved.blocks),
            extras={name: table.take(f"task/{i}/extra/{name}") for name in saved.extras},
            public_seed=saved.public_seed,
            sealed=saved.sealed,
            statistics=dict(saved.statistics),
        )
    memory = from_json(tuple[tuple[str, tuple[str, ...]], ...], values["memory"], "memory")
    modules = from_json(tuple[tuple[str, int, int, ModuleKind], ...], values["modules"], "modules")
    state = GlobalState(
        version=from_json(int, values["version"], "version"),
        base=from_json(str, values["base"], "base"),
        layout=Layout(
            modules={name: Module(out=out, inp=inp, kind=kind) for name, out, inp, kind in modules},
            head=dict(from_json(tuple[tuple[str, tuple[int, ...]], ...], values["head"], "head")),
        ),
        tasks=tasks,
        memory={
            owner: {name: table.take(f"memory/{i}/{name}") for name in named} for i, (owner, named) in enumerate(memory)
        },
    )
    table.require_empty()
    return state


@dataclass(frozen=True, kw_only=True)
class _SavedTask:
    """A task as the header of a state says it: names in order; the arrays are in the body."""

    name: str
    pair: Mapping[str, float] | None
    blocks: tuple[SavedBlock, ...]
    extras: tuple[str, ...]
    public_seed: int | None
    sealed: bool
    statistics: tuple[tuple[str, float], ...]


def blocks_id(blocks: Iterable[Block]) -> str:
    """SHA-256 over the content of the blocks in order (not over when they were born): the same for the same W_eff.

    Each adapter remembers its own digest, so that asking again costs nothing.
    """
    return hashlib.sha256("".join(block.adapter.digest for block in blocks).encode()).hexdigest()


def _arrays_of(adapter: Adapter, prefix: str) -> Iterator[tuple[str, Array]]:
    for name, f in adapter.items():
        yield f"{prefix}a/{name}", f.a
        yield f"{prefix}b/{name}", f.b


def _scales(adapter: Adapter) -> dict[str, float]:
    """The scales that are not 1."""
    return {name: float(f.scale) for name, f in adapter.items() if f.scale != 1.0}


def _take_adapter(table: Table, prefix: str, scales: Mapping[str, float], upcast: bool = False) -> Adapter:
    names = table.names(f"{prefix}a/")
    if not set(scales) <= set(names):
        raise WireError(f"scales for modules that are not there: {sorted(set(scales) - set(names))[:5]}")
    modules: dict[str, Factors] = {}
    for name in names:
        a, b = table.take(f"{prefix}a/{name}"), table.take(f"{prefix}b/{name}")
        try:
            modules[name] = Factors(*((_upcast(a), _upcast(b)) if upcast else (a, b)), scales.get(name, 1.0))
        except AdapterError as error:
            raise WireError(f"{name}: {error}") from error
    return Adapter(modules)


def _take_blocks(table: Table, prefix: str, saved: Sequence[SavedBlock], upcast: bool = False) -> tuple[Block, ...]:
    return tuple(
        Block(adapter=_take_adapter(table, f"{prefix}{j}/", scales, upcast), born=born)
        for j, (born, scales) in enumerate(saved)
    )


def _cast(arrays: Mapping[str, Array], dtype: str) -> dict[str, Array]:
    """Arrays in the wire dtype, probes in float32. Raises: WireError naming the array that overflows."""
    if dtype not in _WIRE:
        raise WireError(f"unknown wire dtype {dtype!r}; known: {', '.join(_WIRE)}")
    cast: dict[str, Array] = {}
    for key, x in arrays.items():
        target = DTYPES["F32" if key.startswith(_PROBE) else _WIRE[dtype]]
        with np.errstate(over="ignore"):
            y = x.astype(target, copy=False)
        if y is not x and not np.isfinite(y).all() and np.isfinite(x[~np.isfinite(y)]).any():
            raise WireError(
                f"{key.removeprefix('array/')}: {float(np.abs(x[np.isfinite(x)]).max()):.6g} overflows {target.name};"
                " choose bfloat16 or float32 (wire.dtype)"
            )
        cast[key] = y
    return cast


def _upcast(x: Array) -> Array:
    """Float32, read-only in either case."""
    if x.dtype == np.float32:
        return x
    y = x.astype(np.float32)
    y.flags.writeable = False
    return y


def _require_dtype(table: Table, dtype: object) -> None:
    """Raises WireError unless every array has the message's wire dtype (probes: float32)."""
    if not isinstance(dtype, str) or dtype not in _WIRE:
        raise WireError(f"unknown wire dtype {dtype!r}; known: {', '.join(_WIRE)}")
    for key, tensor in table.rows.items():
        right = "F32" if key.startswith(_PROBE) else _WIRE[dtype]
        if tensor.dtype != right:
            raise WireError(f"{key.removeprefix('array/')} has dtype {tensor.dtype}, this message's is {right}")


def _require_shapes(got: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]]) -> None:
    """Raises WireError naming arrays that are missing or extra, and the first of another rank or shape."""
    if got.keys() != expected.keys():
        missing, extra = sorted(expected.keys() - got.keys()), sorted(got.keys() - expected.keys())
        raise WireError(
            f"arrays differ from the plan's; missing {missing[:5]}, extra {extra[:5]}. Same target modules?"
        )
    for key, shape in expected.items():
        if len(got[key]) != len(shape):
            raise WireError(f"{key} has {len(got[key])} dimensions {got[key]}, expected {len(shape)}: {tuple(shape)}")
        if got[key] != tuple(shape):
            raise WireError(f"{key} has shape {got[key]}, expected {tuple(shape)}")
