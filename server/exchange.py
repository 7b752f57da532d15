"""Asks out, answers in, over a Flower Grid: bounded in flight, taken as they arrive, failures named by client."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, Message, RecordDict
from flwr.common.constant import ErrorCode
from flwr.serverapp import Grid
from flwr.supercore.inflatable.inflatable_utils import ObjectPushError, pull_objects
from flwr.superlink.grid import http_grid

from fedlora.errors import WireError
from fedlora.npy import npy_bytes
from server.admission import plain

_LOST = {ErrorCode.NODE_UNAVAILABLE: "node unavailable", ErrorCode.MESSAGE_UNAVAILABLE: "answer lost"}
_PUSHES = 3  # of one message
_FIRST_PAUSE, _LONGEST_PAUSE = 0.01, 1.0  # seconds between polls when nothing has arrived


@dataclass(frozen=True)
class Asked:
    """One client's question: its node, and the bytes, made only when they are sent."""

    client: str
    node: int
    payload: Callable[[], bytes]


@dataclass(frozen=True)
class Failure:
    """No usable answer; the rule says why: `deadline`, `not asked`, `not sent`, `node unavailable`, `client failed`,
    `malformed`, `answer lost` (Flower began to carry it and lost a part), or `second answer` (the first one stands).
    """

    rule: str
    detail: str


def pack(data: bytes) -> RecordDict:
    """A Flower record that carries one byte string."""
    return RecordDict({"fedlora": ArrayRecord({"bytes": Array(np.frombuffer(data, np.uint8))})})


def unpack(content: RecordDict) -> bytes:
    """The inverse of `pack`. Raises: WireError if the record is anything else."""
    record = content.get("fedlora")
    if list(content) != ["fedlora"] or not isinstance(record, ArrayRecord) or list(record) != ["bytes"]:
        raise WireError(
            f"not a fedlora message: expected one array `bytes` in record `fedlora`, got {list(content)!s:.200}"
        )
    array = record["bytes"]
    if array.stype != "numpy.ndarray":
        raise WireError(f"not a fedlora message: `bytes` is no array of numpy's but {array.stype!r:.80}")
    return npy_bytes(array.data)


def exchange(
    grid: Grid, asked: Sequence[Asked], *, message_type: str, group: str, deadline: float, in_flight: int
) -> Iterator[tuple[str, bytes | Failure, int]]:
    """Send every question and yield (client, answer bytes or Failure, bytes sent down) as each arrives.

    At most `in_flight` questions are out at once, so the server holds that many payloads and no more; the Grid is asked
    for answers after every question, so an in-process engine holds one. Flower marks a lost node's error with the
    SuperLink's own id, so replies are matched by the message that they reply to. Whoever has not answered after
    `deadline` seconds of waiting is yielded as a Failure; a late answer is dropped. Time inside the Grid's
    `pull_messages` is not waiting: there answers are fetched, and there an in-process engine trains.
    """
    end = time.monotonic() + deadline
    queue = deque(asked)
    out: dict[str, tuple[str, int]] = {}  # message id -> client, bytes sent
    answered: dict[str, str] = {}  # message id -> client
    pause = _FIRST_PAUSE
    while queue or out:
        left = end - time.monotonic()
        if queue and len(out) < in_flight and left > 0:
            one = queue.popleft()
            data = one.payload()
            meta = {"dst_node_id": one.node, "message_type": message_type, "group_id": group, "ttl": left}
            if number := _pushed(grid, data, meta):
                out[number] = (one.client, len(data))
            else:
                yield one.client, Failure("not sent", "Flower did not take the message; see its log"), 0
            del data
        began = time.monotonic()
        replies = list(grid.pull_messages(list(out))) if out else []
        end += time.monotonic() - began
        for reply in replies:
            number = reply.metadata.reply_to_message_id
            if number in out:
                client, sent = out.pop(number)
                answered[number] = client
                yield client, _content(reply), sent
            elif number in answered:
                yield answered[number], Failure("second answer", "its first answer to this ask stands"), 0
        if replies:
            pause = _FIRST_PAUSE
        elif time.monotonic() >= end:
            for client, sent in out.values():
                yield client, Failure("deadline", f"no answer within {deadline:g} s"), sent
            for one in queue:
                yield one.client, Failure("not asked", f"{in_flight} others took all of the {deadline:g} s"), 0
            return
        elif out and not (queue and len(out) < in_flight):
            time.sleep(min(pause, max(0.0, end - time.monotonic())))
            pause = min(1.5 * pause, _LONGEST_PAUSE)


def bound_pulls(seconds: float) -> None:
    """Have Flower give up an answer whose objects are not all there after so long; its own bound is two hours.

    It fetches answers one after another, so one node that sends drop by drop would hold up all others for that time.
    What was given up is `answer lost`. For this process, which is a conductor's own.
    """
    vars(http_grid)["pull_objects"] = partial(pull_objects, max_time=seconds)


def _pushed(grid: Grid, data: bytes, meta: Mapping[str, Any]) -> str | None:
    """The id under which Flower took the message, or None if it did not.

    A SuperLink that is restarted between a message and its content has forgotten that it waits for it: then the message
    is pushed anew, `_PUSHES` times in all. Raises: ObjectPushError after that.
    """
    for left in reversed(range(_PUSHES)):
        try:
            return next(iter(grid.push_messages([Message(pack(data), **meta)])), None) or None
        except ObjectPushError:
            if not left:
                raise
            time.sleep(_LONGEST_PAUSE)
    raise AssertionError("unreachable: the loop returns or raises")


def _content(reply: Message) -> bytes | Failure:
    if reply.has_error():
        rule = _LOST.get(reply.error.code, "client failed")
        return Failure(rule, plain(reply.error.reason, 2000))
    try:
        return unpack(reply.content)
    except WireError as error:
        return Failure("malformed", plain(error, 2000))
