"""Whatever bytes come, an answer is admitted or refused by name: nothing else is raised, and nothing odd gets in."""

from __future__ import annotations

import json
from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedlora.errors import AnswerRejected
from fedlora.state import Answer, Header
from fedlora.wire import encode_answer
from server.admission import admit, plain, require_echo

ASKED = Header(run="r", round=3, client="c1", kind="train", base="b", version=2, attempt=1, phase=0, code="c")
EXPECTED = {"A:q": (2, 3), "B:q": (4, 2)}
GOOD = Answer(examples=5, metrics={"loss_after": 1.0}, arrays={k: np.ones(s, np.float32) for k, s in EXPECTED.items()})


def test_a_good_answer_is_admitted() -> None:
    got = admit(encode_answer(ASKED, GOOD), ASKED, expected=EXPECTED, max_bytes=10**6)
    assert (got.examples, got.metrics) == (5, {"loss_after": 1.0})
    assert all(np.array_equal(got.arrays[k], GOOD.arrays[k]) for k in EXPECTED)


@settings(deadline=None, max_examples=300)
@given(st.data())
def test_mutated_bytes_are_admitted_whole_or_refused(data: Any) -> None:
    raw = bytearray(encode_answer(ASKED, GOOD))
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(raw) - 1))
        how = data.draw(st.sampled_from(["flip", "cut", "insert", "digit"]))
        if how == "flip":
            raw[at] ^= data.draw(st.integers(1, 255))
        elif how == "cut":
            del raw[at : at + data.draw(st.integers(1, 9))]
        elif how == "digit":
            raw[at] = ord(data.draw(st.sampled_from(list('0123456789-eE".[]{}nI'))))
        else:
            raw[at:at] = data.draw(st.binary(max_size=9))
        if not raw:
            break
    refused: AnswerRejected | None = None
    try:
        got = admit(bytes(raw), ASKED, expected=EXPECTED, max_bytes=10**6)
    except AnswerRejected as error:
        refused = error
    if refused is not None:
        assert refused.client == "c1"
        assert refused.detail.isprintable()
        assert len(refused.detail) < 2500
    else:
        assert got.arrays.keys() == EXPECTED.keys()
        assert all(np.isfinite(x).all() for x in got.arrays.values())
        assert 1 <= got.examples <= 10**9


@pytest.mark.parametrize("field", [f.name for f in fields(Header)])
def test_every_field_of_the_header_counts(field: str) -> None:
    value: Any = {"str": "other", "int": 9}[type(getattr(ASKED, field)).__name__]
    with pytest.raises(AnswerRejected, match=rf"client c1: (other base|other code|not the answer .*): {field} is"):
        require_echo(replace(ASKED, **{field: value}), ASKED)
    require_echo(replace(ASKED), ASKED)


def test_the_size_is_tested_before_anything_is_read() -> None:
    with pytest.raises(AnswerRejected, match=r"malformed: a message of 5000000 bytes is above the cap of 4000000"):
        admit(bytes(5_000_000), ASKED, expected=EXPECTED, max_bytes=4_000_000)


def test_an_error_for_another_question_is_not_believed() -> None:
    raw = encode_answer(replace(ASKED, kind="error", round=2), Answer(info={"error": "E", "message": "m"}))
    with pytest.raises(AnswerRejected, match="not the answer asked for: round is 2, asked was 3"):
        admit(raw, ASKED, expected=EXPECTED, max_bytes=10**6)


def test_an_error_with_arrays_is_malformed() -> None:
    raw = encode_answer(replace(ASKED, kind="error"), GOOD)
    with pytest.raises(AnswerRejected, match="client c1: malformed: arrays differ from the plan's"):
        admit(raw, ASKED, expected=EXPECTED, max_bytes=10**6)


def test_an_error_is_cut_and_cleaned() -> None:
    info = {"error": "E" * 500, "message": "line\nline \x1b[31m" + "x" * 9000}
    raw = encode_answer(replace(ASKED, kind="error"), Answer(info=info))
    with pytest.raises(AnswerRejected, match=r"line line  \[31mxxx") as caught:
        admit(raw, ASKED, expected=EXPECTED, max_bytes=10**6)
    assert (len(caught.value.rule), len(caught.value.detail)) == (100, 2000)


def test_an_evaluation_needs_no_rows_but_not_fewer() -> None:
    asked = replace(ASKED, kind="evaluate")
    assert admit(encode_answer(asked, Answer()), asked, expected={}, max_bytes=10**6).examples == 0
    with pytest.raises(AnswerRejected, match="example count: -1 rows; the weight must be from 0"):
        admit(encode_answer(asked, Answer(examples=-1)), asked, expected={}, max_bytes=10**6)


def test_plain_is_one_printable_line() -> None:
    assert plain("a\nb\x1b[0m\u202ec" + "d" * 50, 12) == "a b [0m cddd"
    assert plain(json.loads('"\\ud800"'), 5) == " "


def test_a_measurement_has_rows_and_no_negative_squares() -> None:
    asked = Header(run="r", round=1, client="c", kind="measure")
    shapes = {"energy:q": (1,), "sketch:q": (2, 2)}

    def said(energy: float, examples: int) -> bytes:
        arrays = {"energy:q": np.array([energy], np.float32), "sketch:q": np.full((2, 2), -1, np.float32)}
        return encode_answer(asked, Answer(examples=examples, arrays=arrays))

    assert admit(said(2.0, 3), asked, expected=shapes, max_bytes=10**6).examples == 3
    for energy, examples, why in ((-1.0, 3, "sums of squares have none below 0"), (2.0, 0, "weight must be from 1")):
        with pytest.raises(AnswerRejected, match=why):
            admit(said(energy, examples), asked, expected=shapes, max_bytes=10**6)


def test_what_a_head_reads_comes_as_shares_of_rows() -> None:
    asked = Header(run="r", round=1, client="c", kind="measure")
    shapes = {"read:count": (3,), "read:energy": (1,)}

    def said(count: list[float], energy: float) -> bytes:
        arrays = {"read:count": np.array(count, np.float32), "read:energy": np.array([energy], np.float32)}
        return encode_answer(asked, Answer(examples=30, arrays=arrays))

    assert admit(said([0.1, 0.9, 0.0], 2.0), asked, expected=shapes, max_bytes=10**6).examples == 30
    for count, energy, why in (
        ([0.5, 0.8, -0.3], 2.0, "read:count has a value of -0.3, and sums of squares have none below 0"),
        ([1.0, 0.0, 0.0], -2.0, "read:energy has a value of -2"),
        ([1.0, 2.0, 0.0], 2.0, "read:count sums to 3, and shares of rows sum to 1"),
        ([0.0, 0.0, 0.0], 2.0, "read:count sums to 0, and shares"),
    ):
        with pytest.raises(AnswerRejected, match=f"absurd value: {why}"):
            admit(said(count, energy), asked, expected=shapes, max_bytes=10**6)
