"""The frame refuses what is hostile quickly, in little memory and in a few words. Each of these broke it once."""

from __future__ import annotations

import hashlib
import json
import tracemalloc
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import pytest

from fedlora.errors import WireError
from fedlora.frame import from_json, read_header, read_rows, read_table
from fedlora.state import Ask, Header
from fedlora.wire import decode_answer, decode_ask, encode_ask

HEADER = Header(run="r", round=1, client="c", kind="train")


def framed(header: bytes, body: bytes = b"") -> bytes:
    return b"FLW1" + len(header).to_bytes(4, "little") + header + body


def compact(value: object) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


def with_table(table: object) -> bytes:
    """An answer of one body that holds this table and no data."""
    text = compact(table)
    body = len(text).to_bytes(8, "little") + text
    values: dict[str, Any] = {"header": asdict(HEADER), "examples": 1, "metrics": {}, "info": {}, "codec": "float32"}
    values |= {"packed": [{}], "kind": "answer", "bodies": [[len(body), 1, hashlib.sha256(body).hexdigest()]]}
    return framed(compact(values), body)


@pytest.mark.timeout(20)
def test_many_keys_of_one_name_are_refused_in_linear_time() -> None:
    header = b"{" + b",".join([b'"a":1'] * 170_000) + b"}"  # below the cap of a megabyte
    with pytest.raises(WireError, match=r"duplicate keys in JSON: \['a'\]"):
        read_header(framed(header), ["answer"], 10**7)
    with pytest.raises(WireError, match=r"duplicate keys in JSON: \['a'\]"):
        read_rows(header, 0, 65536)


def test_sizes_of_thousands_of_digits_are_refused_as_ours() -> None:
    data = encode_ask(HEADER, Ask())
    values = json.loads(data[8 : 8 + int.from_bytes(data[4:8], "little")])
    values["bodies"] = [[int("9" * 4300), 0, ""]] * 2  # their sum has more digits than Python writes
    with pytest.raises(WireError, match=r"bodies must be int, got 9{80}$"):
        decode_ask(framed(compact(values)), max_bytes=10**6)
    assert from_json(int, 2**128 - 1, "seed") == 2**128 - 1
    for beyond in (2**128, -(2**128)):
        with pytest.raises(WireError, match="seed must be int"):
            from_json(int, beyond, "seed")


@pytest.mark.parametrize("shape", [[0, 2**62], [0, 2**64], [0, 2**31, 2**31, 2**31], [0, 2**48], [2**63, 0, 1]])
def test_shapes_of_no_bytes_that_numpy_has_not_are_refused_as_ours(shape: list[int]) -> None:
    table = {"array/A:q": {"dtype": "F32", "shape": shape, "data_offsets": [0, 0]}}
    with pytest.raises(WireError, match=r"array/A:q: shape .* is impossible"):
        decode_answer(with_table(table), max_bytes=10**6)


@pytest.mark.parametrize("shape", [[0, 2**47], [0], [0, 0, 5]])
def test_empty_arrays_still_travel(shape: list[int]) -> None:
    table = {"array/A:q": {"dtype": "F32", "shape": shape, "data_offsets": [0, 0]}}
    assert decode_answer(with_table(table), max_bytes=10**6)[1].arrays["A:q"].shape == tuple(shape)


@pytest.mark.parametrize("filling", [b"[]", b'{"":1}', b"0", b"[[[]]]"])
def test_a_table_takes_no_more_memory_than_its_arrays_need(filling: bytes) -> None:
    text = b'{"a":[' + b",".join([filling] * (4_000_000 // (len(filling) + 1))) + b"]}"
    raw = memoryview(len(text).to_bytes(8, "little") + text)
    tracemalloc.start()
    with pytest.raises(WireError, match="has more values than 5000 arrays need"):
        read_table(raw, 5000)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2 * len(text)


def test_errors_are_short_whatever_came() -> None:
    long = "x" * 100_000
    hostile: list[tuple[Any, Any]] = [
        (Header, {long: 1, "y" * 100_000: 2}),
        (Mapping[str, int], {"a": long}),
        (int, [[long]]),
    ]
    for hint, value in hostile:
        with pytest.raises(WireError) as error:
            from_json(hint, value, "where")
        assert len(str(error.value)) < 1000
    with pytest.raises(WireError) as error:
        read_header(framed(compact({"kind": long})), ["answer"], 10**7)
    assert len(str(error.value)) < 200


def test_metadata_is_allowed_only_where_it_is_asked_for() -> None:
    text = compact({"__metadata__": {"format": "pt"}, "a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}})
    [row] = read_rows(text, 8, 1, metadata=True)
    assert (row.key, row.dtype, row.shape, row.start, row.end) == ("a", "F32", (2,), 0, 8)
    with pytest.raises(WireError):
        read_rows(text, 8, 1)
