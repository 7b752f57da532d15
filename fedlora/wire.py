"""Every Ask, Answer and state as one byte string: JSON header and safetensors bodies (see frame.py); never pickle.

The wire never rounds: an array of two axes travels in the codec of its message (`fedlora/codec.py`) where that gives it
back bit for bit, which whoever chose the codec sees to (`fedlora/feedback.py`), and in float32 where it does not, as do
biases and probes. All arrive as float32; a state keeps its dtypes. Size, digest, table, fields, keys, shapes and
dtypes are checked in that order, before any array is made. Decoded arrays are C-contiguous and **read-only**: where
nothing had to be converted they are views of the message, which lives as long as they do. Torch wants a copy:
`torch.tensor(x)`.

An ask has two bodies; the second holds the blocks, which are the same for all clients of a round and are therefore
encoded once, by `encode_blocks`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np

from fedlora import codec as codecs
from fedlora.adapter import Adapter, Array, Factors
from fedlora.errors import AdapterError, WireError
from fedlora.frame import Body, Table, body, from_json, message, open_message, read_header
from fedlora.state import (
    Answer,
    Ask,
    Block,
    Codec,
    GlobalState,
    Header,
    Layout,
    Measure,
    Module,
    PersonalPair,
    PublicPair,
    Secure,
    Subspace,
    Task,
    TrainPlan,
)

SavedBlock = tuple[int, int, Mapping[str, float]]  # born, since, and the scales that are not 1
ModuleKind = Literal["linear", "conv1d", "embedding"]

Shapes = dict[str, tuple[int, ...]]  # key -> shape, of arrays that int8 and int4 pack into strings of bytes

_PROBE = "array/probe:"
_MESSAGE = "message"  # bytes of a secure sum, as they are
_DTYPES: Mapping[Codec, str] = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "int8": "U8", "int4": "U8"}


@dataclass(frozen=True, kw_only=True)
class BlocksBody:
    """Blocks encoded once, to go into the ask of every client of a round; made by `encode_blocks`."""

    blocks: tuple[Block, ...]
    codec: Codec
    body: Body
    entry: list[int | str]
    packed: Shapes


def encode_blocks(blocks: tuple[Block, ...], codec: Codec = "float32") -> BlocksBody:
    """The part of an ask that all clients of a round share. Raises: WireError as `encode_ask`."""
    arrays = {key: x for i, block in enumerate(blocks) for key, x in _arrays_of(block.adapter, f"{i}/")}
    tensors, packed = _packed(arrays, codec)
    encoded = body(tensors)
    return BlocksBody(blocks=blocks, codec=codec, body=encoded, entry=encoded.entry(), packed=packed)


def encode_ask(header: Header, ask: Ask, codec: Codec = "float32", *, shared: BlocksBody | None = None) -> bytes:
    """One ask as bytes; with `shared` (the same blocks, encoded before) its blocks cost one copy.

    Raises: WireError if a value overflows float32, a number of the plan is not finite, or `shared` is of other blocks.
    """
    shared = encode_blocks(ask.blocks, codec) if shared is None else shared
    same = [b.born for b in shared.blocks] == [b.born for b in ask.blocks] and all(
        x.adapter is y.adapter for x, y in zip(shared.blocks, ask.blocks, strict=True)
    )
    if not same or shared.codec != codec:
        raise WireError(
            f"ask to {header.client}: the shared body is of {len(shared.blocks)} blocks in {shared.codec}, not"
            f" this ask's {len(ask.blocks)} in {codec}; call encode_blocks on the blocks of this round"
        )
    arrays = {f"array/{key}": x for key, x in ask.arrays.items()}
    if ask.frozen is not None:
        arrays.update(_arrays_of(ask.frozen, "frozen/"))
    tensors, packed = _packed(arrays, codec)
    own = body(tensors | _carried(ask.message))
    values = {
        "header": asdict(header),
        "task": ask.task,
        "settings": ask.settings,
        "plan": None if ask.plan is None else asdict(ask.plan),
        "measure": None if ask.measure is None else asdict(ask.measure),
        "secure": None if ask.secure is None else asdict(ask.secure),
        "subspace": None if ask.subspace is None else asdict(ask.subspace),
        "blocks": [[b.born, b.since, _scales(b.adapter)] for b in ask.blocks],
        "on": ask.on,
        "whole": ask.whole,
        "public": None if ask.public is None else asdict(ask.public),
        "personal": None if ask.personal is None else asdict(ask.personal),
        "frozen": None if ask.frozen is None else _scales(ask.frozen),
        "codec": codec,
        "packed": [packed, shared.packed],
    }
    return message("ask", values, [(own, own.entry()), (shared.body, shared.entry)])


def decode_ask(data: bytes, *, max_bytes: int) -> tuple[Header, Ask]:
    """The header and ask of a message; arrays float32. Raises: WireError saying what is wrong with the bytes."""
    names = {"header", "task", "settings", "plan", "measure", "subspace", "blocks", "on", "whole", "public", "personal"}
    names |= {"frozen", "secure", "codec", "packed"}
    values, tables = open_message(data, "ask", max_bytes, names, bodies=2)
    own, shared = _arrays_in(tables, values)
    frozen = from_json(Mapping[str, float] | None, values["frozen"], "frozen")
    ask = Ask(
        task=from_json(str, values["task"], "task"),
        settings=from_json(str, values["settings"], "settings"),
        plan=from_json(TrainPlan | None, values["plan"], "plan"),
        measure=from_json(Measure | None, values["measure"], "measure"),
        secure=from_json(Secure | None, values["secure"], "secure"),
        message=own.carried(),
        subspace=from_json(Subspace | None, values["subspace"], "subspace"),
        blocks=_take_blocks(shared, "", from_json(tuple[SavedBlock, ...], values["blocks"], "blocks")),
        on=from_json(str | None, values["on"], "on"),
        whole=from_json(str, values["whole"], "whole"),
        public=from_json(PublicPair | None, values["public"], "public"),
        personal=from_json(PersonalPair | None, values["personal"], "personal"),
        frozen=None if frozen is None else _take_adapter(own, "frozen/", frozen),
        arrays={key: own.take(f"array/{key}") for key in own.names("array/")},
    )
    own.require_empty()
    shared.require_empty()
    return from_json(Header, values["header"], "header"), ask


def encode_answer(header: Header, answer: Answer, codec: Codec = "float32") -> bytes:
    """One answer as bytes. Raises: WireError if a value overflows float32, or a metric or fact is not finite JSON."""
    tensors, packed = _packed({f"array/{key}": x for key, x in answer.arrays.items()}, codec)
    own = body(tensors | _carried(answer.message))
    values = {
        "header": asdict(header),
        "examples": answer.examples,
        "metrics": {name: float(x) for name, x in answer.metrics.items()},
        "info": dict(answer.info),
        "codec": codec,
        "packed": [packed],
    }
    return message("answer", values, [(own, own.entry())])


def decode_answer(
    data: bytes, *, max_bytes: int, expected: Mapping[str, tuple[int, ...]] | None = None
) -> tuple[Header, Answer]:
    """The header and answer of a message; arrays float32.

    `expected` (key -> shape, see `state.expected_shapes`) is the exact key set; it is checked before arrays are made.
    Raises: WireError saying what is wrong with the bytes, or which key is missing, extra, or of another shape.
    """
    names = {"header", "examples", "metrics", "info", "codec", "packed"}
    values, tables = open_message(data, "answer", max_bytes, names, bodies=1)
    [own] = _arrays_in(tables, values)
    if expected is not None:
        _require_shapes({key: own.shape(f"array/{key}") for key in own.names("array/")}, expected)
    answer = Answer(
        examples=from_json(int, values["examples"], "examples"),
        metrics=from_json(Mapping[str, float], values["metrics"], "metrics"),
        arrays={key: own.take(f"array/{key}") for key in own.names("array/")},
        info=from_json(Mapping[str, Any], values["info"], "info"),
        message=own.carried(),
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
        arrays.update({f"task/{i}/basis/{name}": x for name, x in task.basis.items()})
        tasks.append(
            {
                "name": task.name,
                "pair": None if task.pair is None else _scales(task.pair),
                "blocks": [[b.born, b.since, _scales(b.adapter)] for b in task.blocks],
                "extras": list(task.extras),
                "public_seed": task.public_seed,
                "sealed": task.sealed,
                "statistics": [[name, float(x)] for name, x in task.statistics.items()],
                "subspace": None if task.subspace is None else asdict(task.subspace),
                "basis": list(task.basis),
            }
        )
    for i, named in enumerate(state.memory.values()):
        arrays.update({f"memory/{i}/{name}": x for name, x in named.items()})
    values = {
        "version": state.version,
        "base": state.base,
        "modules": [[name, m.out, m.inp, m.kind, m.shares] for name, m in state.layout.modules.items()],
        "head": [[name, list(shape)] for name, shape in state.layout.head.items()],
        "features": state.layout.features,
        "tasks": tasks,
        "memory": [[owner, list(named)] for owner, named in state.memory.items()],
    }
    whole = body(arrays)
    return message("state", values, [(whole, whole.entry())])


def decode_state(data: bytes) -> GlobalState:
    """The state that `encode_state` wrote. Raises: WireError if the bytes are damaged or are no state."""
    names = {"version", "base", "modules", "head", "features", "tasks", "memory"}
    values, (table,) = open_message(data, "state", len(data), names, bodies=1)
    tasks: dict[str, Task] = {}
    saved_tasks = from_json(tuple[_SavedTask, ...], values["tasks"], "tasks")
    _require_once("tasks", [saved.name for saved in saved_tasks])
    for i, saved in enumerate(saved_tasks):
        tasks[saved.name] = Task(
            name=saved.name,
            pair=None if saved.pair is None else _take_adapter(table, f"task/{i}/pair/", saved.pair),
            blocks=_take_blocks(table, f"task/{i}/block/", saved.blocks),
            extras={name: table.take(f"task/{i}/extra/{name}") for name in saved.extras},
            public_seed=saved.public_seed,
            sealed=saved.sealed,
            statistics=dict(saved.statistics),
            subspace=saved.subspace,
            basis={name: table.take(f"task/{i}/basis/{name}") for name in saved.basis},
        )
    memory = from_json(tuple[tuple[str, tuple[str, ...]], ...], values["memory"], "memory")
    modules = from_json(tuple[tuple[str, int, int, ModuleKind, str], ...], values["modules"], "modules")
    head = from_json(tuple[tuple[str, tuple[int, ...]], ...], values["head"], "head")
    for what, named in (("memory", memory), ("modules", modules), ("head", head)):
        _require_once(what, [name for name, *_ in named])
    state = GlobalState(
        version=from_json(int, values["version"], "version"),
        base=from_json(str, values["base"], "base"),
        layout=Layout(
            modules={
                name: Module(out=out, inp=inp, kind=kind, shares=shares) for name, out, inp, kind, shares in modules
            },
            head=dict(head),
            features=from_json(int, values["features"], "features"),
        ),
        tasks=tasks,
        memory={
            owner: {name: table.take(f"memory/{i}/{name}") for name in named} for i, (owner, named) in enumerate(memory)
        },
    )
    table.require_empty()
    return state


def _require_once(what: str, names: Sequence[str]) -> None:
    if len(set(names)) < len(names):
        raise WireError(f"{what}: a name is there more than once")


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
    subspace: Subspace | None
    basis: tuple[str, ...]


def encode_block(block: Block) -> bytes:
    """One block as bytes, lossless, for a client that keeps it. Raises: WireError as `encode_ask`."""
    whole = body(dict(_arrays_of(block.adapter, "")))
    values = {"born": block.born, "since": block.since, "scales": _scales(block.adapter)}
    return message("block", values, [(whole, whole.entry())])


def decode_block(data: bytes) -> Block:
    """The block that `encode_block` wrote. Raises: WireError if the bytes are damaged or are no block."""
    values, (table,) = open_message(data, "block", len(data), {"born", "since", "scales"}, bodies=1)
    scales = from_json(Mapping[str, float], values["scales"], "scales")
    block = Block(
        adapter=_take_adapter(table, "", scales),
        born=from_json(int, values["born"], "born"),
        since=from_json(int, values["since"], "since"),
    )
    table.require_empty()
    return block


def blocks_id(blocks: Iterable[Block]) -> str:
    """SHA-256 over the content of the blocks in order (not over when they were born): the same for the same W_eff.

    Each adapter remembers its own digest, so that asking again costs nothing.
    """
    return digests_id(block.adapter.digest for block in blocks)


def digests_id(digests: Iterable[str]) -> str:
    """The id of blocks whose digests are known: `blocks_id(blocks) == digests_id(b.adapter.digest for b in blocks)`."""
    return hashlib.sha256("".join(digests).encode()).hexdigest()


def _arrays_of(adapter: Adapter, prefix: str) -> Iterator[tuple[str, Array]]:
    for name, f in adapter.items():
        yield f"{prefix}a/{name}", f.a
        yield f"{prefix}b/{name}", f.b


def _scales(adapter: Adapter) -> dict[str, float]:
    """The scales that are not 1."""
    return {name: float(f.scale) for name, f in adapter.items() if f.scale != 1.0}


class _Arrays:
    """The arrays of one body of a message, out of its codec, as float32; each to be taken once."""

    def __init__(self, table: Table, codec: Codec, packed: Mapping[str, tuple[int, ...]]) -> None:
        self._table, self._codec, self._packed = table, codec, packed
        self.names, self.require_empty = table.names, table.require_empty

    def shape(self, key: str) -> tuple[int, ...]:
        return self._packed[key] if key in self._packed else self._table.rows[key].shape

    def take(self, key: str) -> Array:
        x = self._table.take(key)
        if key not in self._packed:
            return _upcast(x)
        y = codecs.dequantise(x, self._packed[key], self._codec, key.removeprefix("array/"))
        y.flags.writeable = False
        return y

    def carried(self) -> bytes:
        """The message that the arrays carry besides, or nothing."""
        return self._table.take(_MESSAGE).tobytes() if _MESSAGE in self._table.rows else b""


def _carried(message: bytes) -> dict[str, Array]:
    return {_MESSAGE: np.frombuffer(message, np.uint8)} if message else {}


def _take_adapter(table: Table | _Arrays, prefix: str, scales: Mapping[str, float]) -> Adapter:
    names = table.names(f"{prefix}a/")
    if not set(scales) <= set(names):
        raise WireError(f"scales for modules that are not there: {sorted(set(scales) - set(names))[:5]}")
    modules: dict[str, Factors] = {}
    for name in names:
        a, b = table.take(f"{prefix}a/{name}"), table.take(f"{prefix}b/{name}")
        try:
            modules[name] = Factors(a, b, scales.get(name, 1.0))
        except AdapterError as error:
            raise WireError(f"{name}: {error}") from error
    return Adapter(modules)


def _take_blocks(table: Table | _Arrays, prefix: str, saved: Sequence[SavedBlock]) -> tuple[Block, ...]:
    return tuple(
        Block(adapter=_take_adapter(table, f"{prefix}{j}/", scales), born=born, since=since)
        for j, (born, since, scales) in enumerate(saved)
    )


def _packed(arrays: Mapping[str, Array], codec: Codec) -> tuple[dict[str, Array], Shapes]:
    """Arrays as they travel, and the shapes of those that became strings of bytes.

    Raises: WireError naming the array that overflows float32, or for an unknown codec.
    """
    if codec not in _DTYPES:
        raise WireError(f"unknown wire codec {codec!r}; known: {', '.join(_DTYPES)}")
    tensors: dict[str, Array] = {}
    shapes: Shapes = {}
    for key, x in arrays.items():
        name = key.removeprefix("array/")
        y = _float32(x, name)
        if codec != "float32" and y.ndim == 2 and not key.startswith(_PROBE) and _is_lossless(y, codec, name):
            tensors[key] = codecs.quantise(y, codec, name)
            if _DTYPES[codec] == "U8":
                shapes[key] = (int(y.shape[0]), int(y.shape[1]))
        else:
            tensors[key] = y
    return tensors, shapes


def _is_lossless(x: Array, codec: Codec, name: str) -> bool:
    """A value that is not finite, or overflows the codec, travels in float32: the wire does not judge."""
    try:
        return codecs.lossless(x, codec, name)
    except WireError:
        return False


def _float32(x: Array, name: str) -> Array:
    with np.errstate(over="ignore"):
        y = x.astype(np.float32, copy=False)
    if y is not x and not np.isfinite(y).all() and np.isfinite(x[~np.isfinite(y)]).any():
        raise WireError(f"{name}: {float(np.abs(x[np.isfinite(x)]).max()):.6g} overflows float32")
    return y


def _arrays_in(tables: Sequence[Table], values: Mapping[str, Any]) -> list[_Arrays]:
    """The bodies of a message, out of its codec. Raises: WireError for a dtype or packed shape that is not its own."""
    codec: Codec = from_json(Codec, values["codec"], "codec")
    packed = from_json(tuple[Mapping[str, tuple[int, int]], ...], values["packed"], "packed")
    if len(packed) != len(tables):
        raise WireError(f"packed: expected the shapes of {len(tables)} bodies, got {len(packed)}")
    arrays = []
    for table, shapes in zip(tables, packed, strict=True):
        strangers = sorted(shapes.keys() - table.rows.keys())
        if strangers or (shapes and _DTYPES[codec] != "U8"):
            raise WireError(
                f"packed: shapes of arrays that are not there, or not packed: {strangers or sorted(shapes)[:5]}"
            )
        for key, tensor in table.rows.items():
            name = key.removeprefix("array/")
            if key == _MESSAGE:
                if tensor.dtype != "U8" or len(tensor.shape) != 1:
                    raise WireError(f"message: a string of bytes, got {tensor.dtype} {tensor.shape}")
                continue
            right = {"U8"} if key in shapes else {"F32", _DTYPES[codec]} - {"U8"}
            if tensor.dtype not in right:
                raise WireError(f"{name} has dtype {tensor.dtype}, this message's are {', '.join(sorted(right))}")
            if key.startswith(_PROBE) and tensor.dtype != "F32":
                raise WireError(f"{name} has dtype {tensor.dtype}; probes travel in float32")
            if key in shapes and tensor.shape != codecs.packed(shapes[key], codec, name)[1]:
                raise WireError(
                    f"{name}: {tensor.shape[0] if tensor.shape else 0} bytes do not hold {codec} {shapes[key]}"
                )
        arrays.append(_Arrays(table, codec, shapes))
    return arrays


def _upcast(x: Array) -> Array:
    """Float32, read-only in either case."""
    if x.dtype == np.float32:
        return x
    y = x.astype(np.float32)
    y.flags.writeable = False
    return y


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
