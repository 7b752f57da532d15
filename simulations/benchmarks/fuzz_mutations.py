"""Mutations for fuzz.py that know what they break: bytes, JSON, safetensors, fedlora's frame, Flower's arrays.

Those of structured messages put lengths and digests right again in most cases, so that the damage reaches the layer
behind them. All draw from a `random.Random` alone: the same generator gives the same case.
"""

from __future__ import annotations

import hashlib
import json
import random
import struct
from collections.abc import Callable, Iterator, Sequence
from typing import Any

Mutation = Callable[[random.Random, bytes, Sequence[bytes]], bytes]

_MARK = "\x02raw"  # stands for text that no JSON library would write
_DEEP = "\x02deep"
_SHAPES = (
    "[0,9223372036854775808]",
    "[0,4611686018427387904]",
    "[0,2147483648,2147483648,2147483648]",
    "[1,1,1,1,1,1,1,1,1]",
    "[-1,-6]",
    "[]",
    "[0]",
    "[0,0]",
)
_ODD = (
    *("null", "true", "false", "-1", "0", "1", "2", "3", "255", "256", "2147483648", "-2147483649"),
    *("9007199254740993", "9223372036854775807", "18446744073709551616", "9" * 4300, "9" * 4301),
    *("0.1", "-0.0", "-0", "1e308", "-1e308", "1e999", "1E5", "5e-324", "NaN", "Infinity", "-Infinity", "1" * 400),
    *('""', '"a"', '"\\u0000"', '"\\ud800"', '"\\ud83d\\ude00"', '"\\u001b[31m"', '"../../../etc/passwd"', '"/"'),
    *('"float32"', '"int4"', '"int8"', '"bfloat16"', '"F32"', '"BOOL"', '"U64"', '"BF16"', '"error"', '"train"'),
    *("[]", "{}", "[[]]", '{"a":1,"a":2}', '{"":{}}', '"' + "x" * 5000 + '"', "[" + "1," * 300 + "1]"),
    *_SHAPES,
)


def damaged(rng: random.Random, data: bytes, others: Sequence[bytes]) -> bytes:
    """One to four plain damages: bits, bytes, cuts, copies, and splices with another message."""
    raw = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        at, much = rng.randrange(len(raw) + 1), rng.choice((1, 1, 2, 4, 8, 64, 512))
        how = rng.randrange(8)
        if how == 0 and at < len(raw):
            raw[at] ^= 1 << rng.randrange(8)
        elif how == 1 and at < len(raw):
            raw[at] = rng.choice((0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256), *b'0-9"[]{},:eE'))
        elif how == 2:
            del raw[at:]
        elif how == 3:
            del raw[at : at + much]
        elif how == 4:
            raw[at:at] = raw[at : at + much]
        elif how == 5:
            raw[at:at] = rng.randbytes(much)
        elif how == 6:
            other = rng.choice(others)
            raw[at:] = other[rng.randrange(len(other) + 1) :]
        else:
            raw[at : at + 4] = struct.pack("<I", rng.choice((0, 1, 7, len(raw), 2**16, 2**31, 2**32 - 1)))
    return bytes(raw)


def json_text(rng: random.Random, value: Any, *, compact: bool = True, ordered: bool = True) -> bytes:
    """`value` as JSON after one to three edits. `value` itself is changed."""
    raws: list[str] = []
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        spots = list(_spots(value))
        if not spots:
            break
        holder, key = rng.choice(spots)
        _edit(rng, holder, key, spots, raws)
    separators = (",", ":") if compact else None
    text = json.dumps(value, sort_keys=ordered, separators=separators, ensure_ascii=False)
    for number, raw in enumerate(raws):
        text = text.replace(json.dumps(f"{_MARK}{number}", ensure_ascii=False), raw)
    return text.encode(errors="surrogatepass")


def _spots(value: Any) -> Iterator[tuple[Any, Any]]:
    stack = [value]
    while stack:
        one = stack.pop()
        if isinstance(one, dict | list):
            for key in list(one) if isinstance(one, dict) else range(len(one)):
                yield one, key
                stack.append(one[key])


def _edit(rng: random.Random, holder: Any, key: Any, spots: list[tuple[Any, Any]], raws: list[str]) -> None:
    old, how = holder[key], rng.randrange(12)
    if how <= 4:
        raws.append(_DEEP if rng.random() < 0.03 else rng.choice(_ODD))
        if raws[-1] == _DEEP:
            depth, opening = rng.choice((30, 33, 500, rng.randrange(900, 1010), 5000)), rng.random() < 0.5
            raws[-1] = "[" * depth + "]" * depth if opening else '{"a":' * depth + "1" + "}" * depth
        holder[key] = f"{_MARK}{len(raws) - 1}"
    elif how == 5:
        del holder[key]
    elif how == 6 and isinstance(holder, dict):
        holder[rng.choice(("", "x", "array/A:q", "a/../b", "__metadata__", key + "\u00e9", key * 40, "\x1b[2J"))] = old
    elif how == 7 and isinstance(holder, dict):  # the same key twice, in the text
        raws.append(f"1,{json.dumps(key)}:{rng.choice(_ODD)}")
        holder[key] = f"{_MARK}{len(raws) - 1}"
    elif how == 8 and isinstance(holder, list):
        holder[key:key] = [old] * rng.choice((1, 1, 5, 300))
    elif how == 9:
        there, name = rng.choice(spots)
        try:
            holder[key], there[name] = json.loads(json.dumps(there[name])), json.loads(json.dumps(old))
        except (KeyError, IndexError):  # an earlier edit took it away
            return
    elif isinstance(old, int | float) and not isinstance(old, bool):
        holder[key] = rng.choice((old + 1, old - 1, 2 * old, -old, old // 2, old + 8, 0.5 * old))
    elif isinstance(old, str):
        at = rng.randrange(len(old) + 1)
        holder[key] = rng.choice((old[:at], old[:at] + rng.choice('"\\\n\0\u202eA0é') + old[at:], old[::-1], old * 3))
    elif isinstance(old, list):
        rng.shuffle(old)


def safetensors(rng: random.Random, data: bytes, others: Sequence[bytes]) -> bytes:
    """A safetensors file with its table edited, its data struck, or the length of its table a lie."""
    size = int.from_bytes(data[:8], "little")
    table, values = data[8 : 8 + size], data[8 + size :]
    how = rng.choice((0, 0, 0, 3, 3, 3, 4, 5))
    if how == 0:
        table = json_text(rng, json.loads(table), ordered=False)
    elif how == 3 and values:
        raw, at = bytearray(values), 4 * rng.randrange(max(1, len(values) // 4))
        odd = rng.choice((0x7FC00000, 0xFF800000, 0x7F7FFFFF, 0xF0000000, 0x49742410, 0x00000001, rng.getrandbits(32)))
        raw[at : at + 4] = struct.pack("<I", odd)
        values = bytes(raw[: len(values)])
    elif how == 4:
        values = damaged(rng, values, others)
    else:
        return rng.choice((0, 1, size - 1, size + 1, 2**32, 2**64 - 1)).to_bytes(8, "little") + data[8:]
    if rng.random() < 0.9:
        table += b" " * (-len(table) % 8)
    return len(table).to_bytes(8, "little") + table + values


def frame(rng: random.Random, data: bytes, others: Sequence[bytes]) -> bytes:
    """A message of fedlora with its header edited or one body changed; digests and sizes are made to fit in most."""
    if rng.random() < 0.2:
        return damaged(rng, data, others)
    values, bodies = opened(data)
    if rng.random() < 0.06:  # what belongs to another message
        stranger, parts = opened(rng.choice(others))
        values, bodies = rng.choice(((values, parts), (stranger, bodies)))
    edit = rng.random() < 0.55
    if not edit and bodies:
        which = rng.randrange(len(bodies))
        bodies[which] = safetensors(rng, bodies[which], others)
    if rng.random() < 0.95 and isinstance(values.get("bodies"), list):
        counts = [entry[1] for entry in values["bodies"]]
        values["bodies"] = [
            [len(b), n, hashlib.sha256(b).hexdigest()] for b, n in zip(bodies, counts, strict=False)
        ] + values["bodies"][len(bodies) :]
    header = json_text(rng, values) if edit else json.dumps(values, sort_keys=True, separators=(",", ":")).encode()
    if edit and rng.random() < 0.1:
        bodies = [damaged(rng, b, others) for b in bodies]
    header = (
        header
        if edit
        else json.dumps(json.loads(header), sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()
    )
    size = len(header) if rng.random() < 0.97 else rng.choice((0, 1, len(header) - 1, 2**20, 2**26 + 1, 2**32 - 1))
    return data[:4] + size.to_bytes(4, "little") + header + b"".join(bodies)


def opened(data: bytes) -> tuple[dict[str, Any], list[bytes]]:
    """Header and bodies of a valid message."""
    size = int.from_bytes(data[4:8], "little")
    values, at, bodies = json.loads(data[8 : 8 + size]), 8 + size, []
    for length, _, _ in values["bodies"]:
        bodies.append(data[at : at + length])
        at += length
    return values, bodies


def large_frame(rng: random.Random, data: bytes, others: Sequence[bytes]) -> bytes:
    """A message that is large and worthless: a megabyte of header or table that takes most memory once parsed."""
    filling = rng.choice((b"[]", b'{"":1}', b"0", b'""', b"[[[]]]"))
    many = b",".join([filling] * (900_000 // (len(filling) + 1)))
    if rng.random() < 0.5:
        twice = b",".join([b'"a":1'] * 150_000)
        header = rng.choice((b'{"a":[' + many + b'],"kind":"answer"}', b"{" + twice + b"}"))
        return data[:4] + len(header).to_bytes(4, "little") + header
    values, bodies = opened(data)
    table = b'{"a":[' + many + b"]}"
    bodies[0] = len(table).to_bytes(8, "little") + table
    values["bodies"][0] = [len(bodies[0]), rng.choice((1000, 65536)), hashlib.sha256(bodies[0]).hexdigest()]
    header = json.dumps(values, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()
    return data[:4] + len(header).to_bytes(4, "little") + header + b"".join(bodies)


def npy(rng: random.Random, data: bytes, others: Sequence[bytes]) -> bytes:
    """The bytes of a Flower array: an .npy file with another dtype, shape, version or length; a zip; a pickle."""
    if rng.random() < 0.4:
        return damaged(rng, data, others)
    if rng.random() < 0.15:
        return rng.choice((b"PK\x03\x04", b"\x80\x04]q\x00.", b"PK\x05\x06" + bytes(18), b"")) + rng.randbytes(64)
    dtype = rng.choice(("|u1", "|i1", "|O", "<f8", "|V1", "|S1", "|V0", "|u1'*9+'", "<U0", "x" * 200))
    shape = rng.choice(("(8,)", "(2,4)", "()", "(0,)", "(-1,)", f"({10**11},)", f"({2**63},)", f"({2**62},8)", "8"))
    nested = "(" * rng.choice((0, 0, 0, 90, 3000)) + shape
    order = rng.choice(("False", "True", "None", "1"))
    text = f"{{'descr': '{dtype}', 'fortran_order': {order}, 'shape': {nested}, }}".encode()
    if rng.random() < 0.1:
        text = rng.choice((b"-" * 9000 + b"1", b"[" * 9900, b"{" + b"'a':1," * 1500 + b"}", b"", b"\xff" * 99))
    version = rng.choice((1, 1, 1, 2, 3, 4, 255))
    size = len(text) if rng.random() < 0.9 else rng.choice((0, 2**16 - 1, len(text) + 999))
    length = size.to_bytes(2, "little") if version == 1 else size.to_bytes(4, "little")
    return b"\x93NUMPY" + bytes([version, 0]) + length + text + data[-8:]


def lines(rng: random.Random, data: bytes, others: Sequence[bytes]) -> bytes:
    """JSON lines with one line edited, or plain damage."""
    rows = data.split(b"\n")
    at = rng.randrange(len(rows))
    if not rows[at] or rng.random() < 0.3:
        return damaged(rng, data, others)
    rows[at] = json_text(rng, json.loads(rows[at]), ordered=False)
    return b"\n".join(rows)
