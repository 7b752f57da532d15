"""The frame of a message: magic, JSON header, safetensors bodies; everything checked before an array is made.

    message = "FLW1" | u32 length of the header | header | body 0 | body 1 ...          (little endian)

The header is canonical JSON (sorted keys, no spaces but for padding to 8 bytes): the kind of message, its values,
and for each body its bytes, tensors and SHA-256. A body is a safetensors file. The same value gives the same bytes.

Nobody is trusted: what a message makes its reader hold stays below 64 times its bytes, and the time grows with them.
"""

from __future__ import annotations

import hashlib
import json
import math
import sys
import types
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from functools import cache
from typing import Any, Literal, NoReturn, TypeVar, Union, get_args, get_origin, get_type_hints

import ml_dtypes
import numpy as np
from safetensors.numpy import save

from fedlora.adapter import Array
from fedlora.errors import WireError

T = TypeVar("T")

_MAGIC = b"FLW1"
_MAX_HEADER = {"ask": 1 << 20, "answer": 1 << 20, "block": 1 << 20, "state": 1 << 26}  # bytes of JSON
_MAX_TENSORS = 1 << 16  # in one body
_MAX_ENTRY = 1024  # bytes of a body's table per tensor
_MAX_MARKS = 64  # of `[`, `{` and `,` in it per tensor: 14 for a row, the rest for its name
_MAX_PRODUCT = 2**48  # of the sizes of an array that are not 0
_LARGEST = 2**128  # whole numbers stay below it: seeds may be large, and no text of one is long
DTYPES: dict[str, np.dtype[Any]] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "U64": np.dtype(np.uint64),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}


@dataclass(frozen=True)
class Body:
    """A safetensors file in bytes, and its entry in the header."""

    data: bytes | memoryview
    tensors: int

    def entry(self) -> list[int | str]:
        return [len(self.data), self.tensors, hashlib.sha256(self.data).hexdigest()]


@dataclass(frozen=True)
class Tensor:
    """One row of a body's table: where an array lies, and what it is."""

    dtype: str
    shape: tuple[int, ...]
    raw: memoryview

    def array(self) -> Array:
        """A read-only view of the message."""
        return np.frombuffer(self.raw, DTYPES[self.dtype]).reshape(self.shape)


def body(arrays: Mapping[str, Array]) -> Body:
    """Named arrays as a safetensors body. Raises: WireError for a dtype outside `DTYPES` or too many arrays."""
    if len(arrays) > _MAX_TENSORS:
        raise WireError(f"a message holds at most {_MAX_TENSORS} arrays, got {len(arrays)}")
    known = set(DTYPES.values())
    for key, x in arrays.items():
        if x.dtype not in known:
            raise WireError(f"{key}: arrays of dtype {x.dtype} do not travel; known: {', '.join(DTYPES)}")
        if len(key.encode()) > _MAX_ENTRY // 2:
            raise WireError(f"{key[:80]}...: names are at most {_MAX_ENTRY // 2} bytes, got {len(key.encode())}")
    return Body(save({key: np.asarray(x, order="C") for key, x in arrays.items()}), len(arrays))


def message(kind: str, values: Mapping[str, Any], parts: Sequence[tuple[Body, list[int | str]]]) -> bytes:
    """The whole message; `parts` are bodies with their entries. Raises: WireError if `values` are not plain JSON."""
    header = _canonical({**values, "kind": kind, "bodies": [entry for _, entry in parts]})
    header += b" " * (-len(header) % 8)
    if len(header) > _MAX_HEADER[kind]:
        raise WireError(f"{kind}: the header takes {len(header)} bytes, more than the {_MAX_HEADER[kind]} allowed")
    return b"".join([_MAGIC, len(header).to_bytes(4, "little"), header, *(part.data for part, _ in parts)])


def _canonical(values: Mapping[str, Any]) -> bytes:
    try:
        text = json.dumps(values, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
        return text.encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise WireError(f"values that are not plain, finite JSON do not travel: {error}") from error


def read_header(data: bytes, kinds: Sequence[str], max_bytes: int) -> tuple[dict[str, Any], memoryview]:
    """The parsed header and what follows it. Raises: WireError."""
    if len(data) > max_bytes:
        raise WireError(f"a message of {len(data)} bytes is above the cap of {max_bytes} (wire.max_bytes)")
    if data[:4] != _MAGIC:
        raise WireError(f"not a fedlora message: it starts with {data[:4]!r} instead of {_MAGIC!r}")
    size = int.from_bytes(data[4:8], "little")
    limit = max(_MAX_HEADER[kind] for kind in kinds)
    if size > limit:
        raise WireError(f"a header of {size} bytes is above the cap of {limit}")
    if len(data) < 8 + size:
        raise WireError(f"torn message: the header alone needs {8 + size} bytes, got {len(data)}")
    values = _parse(data[8 : 8 + size])
    if values.get("kind") not in kinds:
        raise WireError(f"expected a message of kind {' or '.join(kinds)}, got {values.get('kind')!r:.80}")
    return values, memoryview(data)[8 + size :]


def _parse(raw: bytes) -> dict[str, Any]:
    try:
        values = json.loads(raw, object_pairs_hook=_without_duplicates, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError and JSONDecodeError are ValueErrors
        raise WireError(f"the header is not JSON: {error}") from error
    if not isinstance(values, dict):
        raise WireError(f"the header must be a JSON object, got {type(values).__name__}")
    if _canonical(values) != raw.rstrip(b" "):
        raise WireError("the header is not canonical JSON (sorted keys, no spaces); was it written by another library?")
    return values


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        raise WireError(
            f"duplicate keys in JSON: {_some(n for n, count in Counter(n for n, _ in pairs).items() if count > 1)}"
        )
    return values


def _some(names: Iterable[str]) -> list[str]:
    """The first few, none of them long: for the text of an error."""
    return [name[:80] for name in sorted(names)[:8]]


def _refuse_constant(name: str) -> NoReturn:
    raise WireError(f"{name} is not a JSON number; only finite numbers travel")


def open_message(
    data: bytes, kind: str, max_bytes: int, names: set[str], bodies: int
) -> tuple[dict[str, Any], list[Table]]:
    """A verified message: its values (exactly `names`), and the table of each of its `bodies`. Raises: WireError."""
    values, rest = read_header(data, [kind], max_bytes)
    require_names(kind, values.keys() - {"kind"}, names | {"bodies"})
    entries = from_json(tuple[tuple[int, int, str], ...], values["bodies"], "bodies")
    if len(entries) != bodies:
        raise WireError(f"{kind}: expected {bodies} bodies, got {len(entries)}")
    total = sum(size for size, _, _ in entries)
    if any(size < 0 for size, _, _ in entries) or len(rest) < total:
        raise WireError(f"torn message: the bodies need {total} bytes, got {len(rest)}")
    if len(rest) > total:
        raise WireError(f"{len(rest) - total} bytes follow the end of the message")
    tables: list[Table] = []
    for size, tensors, digest in entries:
        raw, rest = rest[:size], rest[size:]
        if hashlib.sha256(raw).hexdigest() != digest:
            raise WireError(f"{kind}: the body does not match its SHA-256; the message was damaged on its way")
        tables.append(Table(read_table(raw, tensors)))
    return values, tables


def require_names(what: str, got: set[str], names: set[str]) -> None:
    """Raises WireError naming what is missing and what is unknown."""
    if got != names:
        raise WireError(f"{what}: fields differ; missing {_some(names - got)}, unknown {_some(got - names)}")


def read_table(raw: memoryview, tensors: int) -> dict[str, Tensor]:
    """The arrays of a safetensors body by key, as views of it. Raises: WireError as `read_rows`."""
    if not 0 <= tensors <= _MAX_TENSORS:
        raise WireError(f"a body of {tensors} arrays is above the cap of {_MAX_TENSORS}")
    size = int.from_bytes(raw[:8], "little")
    if len(raw) < 8 or size > min(len(raw) - 8, _MAX_ENTRY * (tensors + 1)):
        raise WireError(f"a table of {size} bytes does not fit a body of {len(raw)} bytes and {tensors} arrays")
    data = raw[8 + size :]
    rows = read_rows(bytes(raw[8 : 8 + size]), len(data), tensors)
    return {row.key: Tensor(row.dtype, row.shape, data[row.start : row.end]) for row in rows}


@dataclass(frozen=True)
class Row:
    """One array of a safetensors file: bytes `start` to `end` of what follows the table."""

    key: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


def read_rows(text: bytes, size: int, tensors: int, *, metadata: bool = False) -> list[Row]:
    """The table of a safetensors file that has `size` bytes after it and so many arrays, in the order of their bytes.

    Offsets without holes or overlaps that end at `size`; sizes that fit shapes and dtypes; `__metadata__` only if that
    is allowed, and it is not read. Raises: WireError.
    """
    if sum(map(text.count, (b"[", b"{", b","))) > _MAX_MARKS * (tensors + 1):
        raise WireError(f"a table of {len(text)} bytes has more values than {tensors} arrays need")
    try:
        parsed = json.loads(text, object_pairs_hook=_without_duplicates)
    except (ValueError, RecursionError) as error:
        raise WireError(f"the table of arrays is not JSON: {error}") from error
    if metadata and isinstance(parsed, dict):
        parsed.pop("__metadata__", None)
    rows = from_json(Mapping[str, Mapping[str, Any]], parsed, "table of arrays")
    if len(rows) != tensors:
        raise WireError(f"the table lists {len(rows)} arrays, the header announced {tensors}")
    at = 0
    found: list[Row] = []
    for key, row in sorted(rows.items(), key=lambda item: _start(*item)):
        require_names(key, set(row), {"dtype", "shape", "data_offsets"})
        shape = from_json(tuple[int, ...], row["shape"], f"{key}: shape")
        start, end = from_json(tuple[int, int], row["data_offsets"], f"{key}: data_offsets")
        dtype = row["dtype"]
        if not isinstance(dtype, str) or dtype not in DTYPES:
            raise WireError(f"{key}: unknown dtype {dtype!r:.80}; known: {', '.join(DTYPES)}")
        if len(shape) > 8 or any(n < 0 for n in shape):
            raise WireError(f"{key}: shape {shape!s:.80} is impossible")
        if start != at or end - start != math.prod(shape) * DTYPES[dtype].itemsize:
            raise WireError(f"{key}: bytes {start} to {end} do not hold {dtype} {shape} next to the array before it")
        if math.prod(max(n, 1) for n in shape) >= _MAX_PRODUCT:  # of no bytes: what has some was found above
            raise WireError(f"{key}: shape {shape} is impossible")
        if end > size:
            raise WireError(f"{key}: ends at byte {end} of a body that has {size}")
        found.append(Row(key, dtype, shape, start, end))
        at = end
    if at != size:
        raise WireError(f"{size - at} bytes of a body belong to no array")
    return found


def _start(key: str, row: Mapping[str, Any]) -> tuple[int, int, str]:
    start, end = from_json(tuple[int, int], row.get("data_offsets"), f"{key}: data_offsets")
    return start, end, key


class Table:
    """The arrays of one body, each to be taken once; what is left over at the end is refused."""

    def __init__(self, rows: Mapping[str, Tensor]) -> None:
        self.rows = rows
        self._left = dict(rows)
        self._keys = sorted(rows)

    def take(self, key: str) -> Array:
        """One array, as it lies in the message. Raises: WireError if there is no such key."""
        if key not in self._left:
            raise WireError(f"array {key} is missing")
        return self._left.pop(key).array()

    def names(self, prefix: str) -> list[str]:
        """The keys under `prefix`, without it, sorted."""
        after = prefix[:-1] + chr(ord(prefix[-1]) + 1)  # the first string above every string that starts with prefix
        keys = self._keys[bisect_left(self._keys, prefix) : bisect_left(self._keys, after)]
        return [key.removeprefix(prefix) for key in keys]

    def require_empty(self) -> None:
        if self._left:
            raise WireError(f"arrays that belong to nothing: {sorted(self._left)[:5]}")


@cache
def _hints(kind: type) -> dict[str, Any]:
    return get_type_hints(kind)


def from_json(hint: Any, value: object, where: str) -> Any:
    """`value` (parsed JSON) as the type `hint`: int, float, str, bool, Literal, unions, tuples, string-keyed mappings,
    and frozen dataclasses of these, with exactly their fields; whole numbers of at most 128 bits.
    Raises: WireError naming the field.
    """
    origin, args = get_origin(hint), get_args(hint)
    if hint is Any:
        return value
    if is_dataclass(hint) and isinstance(hint, type):
        if not isinstance(value, dict):
            raise WireError(f"{where} must be an object, got {value!r:.80}")
        hints = _hints(hint)
        require_names(where, set(value), {f.name for f in fields(hint)})
        return hint(**{name: from_json(hints[name], x, f"{where}.{name}") for name, x in value.items()})
    if origin is Literal:
        if isinstance(value, str) and value in args:
            return value
    elif origin in (Union, types.UnionType):
        if value is None:
            return None
        return from_json(next(a for a in args if a is not types.NoneType), value, where)
    elif origin is tuple and isinstance(value, list):
        if len(args) == 2 and args[1] is Ellipsis:
            return tuple(from_json(args[0], x, where) for x in value)
        if len(args) == len(value):
            return tuple(from_json(a, x, where) for a, x in zip(args, value, strict=True))
    elif origin is Mapping and isinstance(value, dict):
        return {name: from_json(args[1], x, f"{where}.{name}") for name, x in value.items()}
    elif hint is float and type(value) in (int, float) and abs(value) <= sys.float_info.max:  # type: ignore[arg-type]
        return float(value)  # type: ignore[arg-type]
    elif hint in (int, str, bool) and type(value) is hint and (not isinstance(value, int) or abs(value) < _LARGEST):
        return value
    raise WireError(f"{where} must be {getattr(hint, '__name__', hint)}, got {value!r:.80}")
