"""Records and answers that a hostile node sends: refused as ours, in one printable line, before memory is reserved."""

from __future__ import annotations

import tracemalloc
from io import BytesIO

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, RecordDict

from fedlora.errors import AnswerRejected, WireError
from fedlora.state import Answer, Header
from fedlora.wire import encode_answer
from server.admission import admit
from server.exchange import pack, unpack


def record(data: bytes, stype: str = "numpy.ndarray") -> RecordDict:
    return RecordDict({"fedlora": ArrayRecord({"bytes": Array("uint8", (8,), stype, data)})})


def npy(shape: str, dtype: str = "|u1", rest: bytes = b"12345678") -> bytes:
    text = f"{{'descr': '{dtype}', 'fortran_order': False, 'shape': {shape}, }}".encode()
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text + rest


@pytest.mark.parametrize("shape", ["(100000000000,)", "(9223372036854775808,)", "(4611686018427387904, 8)", "(9,)"])
def test_a_shape_that_lies_reserves_no_memory(shape: str) -> None:
    tracemalloc.start()
    with pytest.raises(WireError, match="not a fedlora message"):
        unpack(record(npy(shape)))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**20


def test_only_one_array_of_bytes_of_just_that_length_is_taken() -> None:
    assert unpack(record(npy("(8,)"))) == b"12345678"
    assert unpack(pack(b"")) == b""
    zipped = BytesIO()
    np.savez(zipped, bytes=np.zeros(8, np.uint8))
    hostile = [
        npy("(8,)", rest=b"123456789"),
        npy("(7,)"),
        npy("(2, 4)"),
        npy("()"),
        npy("(8,)", "|i1"),
        npy("(8,)", "|O"),
        npy("(8,)").replace(b"NUMPY\x01", b"NUMPY\x02"),
        npy("(" * 3000 + "8,)"),
        zipped.getvalue(),
        b"\x80\x04]q\x00.",
        b"",
    ]
    for data in hostile:
        with pytest.raises(WireError, match="not a fedlora message"):
            unpack(record(data))
    with pytest.raises(WireError, match="not a fedlora message"):
        unpack(record(npy("(8,)"), "pickle"))


def test_a_refusal_is_one_printable_line_whatever_a_hello_names_its_arrays() -> None:
    asked = Header(run="r", round=0, client="node 7", kind="hello")
    key = "head:\x1b[2Jgone\n" + "x" * 400
    for value in (np.nan, 1e9):
        data = encode_answer(asked, Answer(arrays={key: np.full(2, value, np.float32)}))
        with pytest.raises(AnswerRejected) as error:
            admit(data, asked, expected=None, max_bytes=10**6)
        assert error.value.detail.isprintable()
