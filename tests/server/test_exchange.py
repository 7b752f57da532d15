"""Questions out and answers in: bounded in flight, matched by message, ended by the deadline."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, MessageType, RecordDict
from flwr.supercore.inflatable.inflatable_utils import ObjectPullError, ObjectPushError, ObjectUnavailableError
from flwr.superlink.grid import http_grid

from fedlora.errors import WireError
from fedlora.state import Ask, Header
from fedlora.wire import encode_ask
from server import exchange as exchange_module
from server.exchange import Asked, Failure, bound_pulls, exchange, pack, unpack


def asks(fakes: Any, count: int, made: list[int]) -> list[Asked]:
    def payload(i: int) -> bytes:
        made.append(i)
        header = Header(run="r", round=1, client=f"client-0000{i}", kind="hello")
        return encode_ask(header, Ask())

    return [Asked(f"client-0000{i}", 1000 + i, lambda i=i: payload(i)) for i in range(count)]


def gather(grid: Any, asked: list[Asked], **kwargs: Any) -> list[tuple[str, Any, int]]:
    usual: dict[str, Any] = {"deadline": 5.0, "in_flight": 3}
    return list(exchange(grid, asked, message_type=MessageType.QUERY, group="1", **usual | kwargs))


@pytest.fixture
def grid(fakes: Any) -> Any:
    return fakes.FakeGrid({i: fakes.Client(i, 1) for i in range(9)})


@pytest.mark.parametrize("in_flight", [1, 3, 20])
def test_payloads_are_made_when_sent_and_bounded(fakes: Any, grid: Any, in_flight: int) -> None:
    made: list[int] = []
    answered = 0
    stream = exchange(
        grid, asks(fakes, 9, made), message_type=MessageType.QUERY, group="1", deadline=5, in_flight=in_flight
    )
    for _, data, sent in stream:
        answered += 1
        assert isinstance(data, bytes)
        assert sent > 0
        assert len(made) - answered < in_flight
    assert (answered, grid.alive <= in_flight) == (9, True)


def test_who_is_silent_fails_at_the_deadline_and_who_was_not_asked_too(fakes: Any, grid: Any) -> None:
    grid.silent = {0, 1, 2}
    began = time.monotonic()
    got = gather(grid, asks(fakes, 5, []), deadline=0.1)
    assert time.monotonic() - began < 2
    assert [(c[-1], d.rule, sent > 0) for c, d, sent in got] == [
        ("0", "deadline", True),
        ("1", "deadline", True),
        ("2", "deadline", True),
        ("3", "not asked", False),
        ("4", "not asked", False),
    ]
    assert got[0][1] == Failure("deadline", "no answer within 0.1 s")


def test_time_inside_the_grid_is_not_waiting(fakes: Any, grid: Any) -> None:
    pull = grid.pull_messages

    def slow(ids: Any) -> Any:
        time.sleep(0.02)  # as an in-process engine, which trains here
        return pull(ids)

    grid.pull_messages = slow
    got = gather(grid, asks(fakes, 9, []), deadline=0.1, in_flight=1)
    assert sum(isinstance(d, bytes) for _, d, _ in got) == 9


def test_a_message_that_flower_does_not_take(fakes: Any, grid: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    push = grid.push_messages
    lost = iter([[None], []])  # over HTTP; in Flower's own simulation

    def refuse(messages: Any) -> Any:
        return next(lost) if messages[0].metadata.dst_node_id in (1000, 1001) else push(messages)

    monkeypatch.setattr(grid, "push_messages", refuse)
    got = gather(grid, asks(fakes, 3, []))
    assert [(c, d.rule, n) for c, d, n in got if isinstance(d, Failure)] == [
        (f"client-0000{i}", "not sent", 0) for i in (0, 1)
    ]


def test_a_message_whose_content_a_restarted_superlink_forgot_is_pushed_anew(
    fakes: Any, grid: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    push, failed = grid.push_messages, [0]
    monkeypatch.setattr(exchange_module, "_LONGEST_PAUSE", 0.0)

    def forgets(messages: Any) -> Any:
        if messages[0].metadata.dst_node_id == 1001 and failed[0] < 2:
            failed[0] += 1
            raise ObjectPushError("f0", 1, "a session")
        return push(messages)

    monkeypatch.setattr(grid, "push_messages", forgets)
    assert all(isinstance(data, bytes) for _, data, _ in gather(grid, asks(fakes, 3, [])))
    assert failed == [2]
    failed[0] = -1
    with pytest.raises(ObjectPushError):
        gather(grid, asks(fakes, 3, []))


def test_nobody_asked_is_nothing_sent(grid: Any) -> None:
    assert gather(grid, []) == []
    assert grid.pulls == 0


def test_pack_and_unpack() -> None:
    assert unpack(pack(b"")) == b""
    assert unpack(pack(bytes(range(256)))) == bytes(range(256))


def bad(array: Array) -> RecordDict:
    return RecordDict({"fedlora": ArrayRecord({"bytes": array})})


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (RecordDict(), r"got \[\]"),
        (RecordDict({"fedlora": ConfigRecord({"bytes": b"x"})}), "expected one array"),
        (RecordDict({"fedlora": ArrayRecord({"other": Array(np.zeros(2, np.uint8))})}), "expected one array"),
        (RecordDict({**pack(b"x"), "more": ConfigRecord({})}), r"got \['fedlora', 'more'\]"),
        (bad(Array(np.zeros(2, np.float32))), "one array of uint8"),
        (bad(Array(np.zeros((2, 2), np.uint8))), "one array of uint8"),
        (bad(Array(dtype="uint8", shape=(2,), stype="numpy.ndarray", data=b"no npy")), "`bytes` is no array"),
        (bad(Array(dtype="uint8", shape=(2,), stype="other", data=b"")), "`bytes` is no array"),
    ],
)
def test_other_records_are_refused(content: RecordDict, what: str) -> None:
    with pytest.raises(WireError, match=what):
        unpack(content)


def test_a_claim_of_a_terabyte_is_refused(fakes: Any) -> None:
    header = b"\x93NUMPY\x01\x00v\x00{'descr': '|u1', 'fortran_order': False, 'shape': (900000000000000,), }"
    data = header + b" " * (127 - len(header)) + b"\n" + b"x"
    with pytest.raises(WireError, match="`bytes` is no array"):
        unpack(bad(Array(dtype="uint8", shape=(2,), stype="numpy.ndarray", data=data)))


def test_flower_gives_up_an_answer_that_comes_drop_by_drop(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_grid, "pull_objects", http_grid.pull_objects)
    bound_pulls(0.2)

    def never(object_id: str) -> bytes:
        raise ObjectUnavailableError(object_id)

    began = time.monotonic()
    with pytest.raises(ObjectPullError):
        http_grid.pull_objects(["f0"], never)
    assert time.monotonic() - began < 30.0
