"""The ClientApp of a deployed node: it passes every message to the node's worker and back, and can do nothing else.

Flower starts a new process for every message, from whatever bundle the SuperLink names, so nothing here is trusted: it
holds no key, no data and no base, and it imports neither torch nor the trainer. What the worker takes is signed.
"""

from __future__ import annotations

import socket
import time

import numpy as np
from flwr.app import Array, ArrayRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

from clients.framing import ANSWERED, receive_response, send
from fedlora.errors import FedLoRAError, WireError
from fedlora.npy import npy_bytes

PATIENCE = 120.0  # seconds in which a worker that died must be back
_PAUSE = 0.5
_MOST = 1 << 40  # bytes of an answer; the worker is the node's own

app = ClientApp()


class WorkerGone(FedLoRAError):
    """The node's worker could not be reached, or would not answer."""


@app.query()
def hello(message: Message, context: Context) -> Message:
    return relayed(message, context)


@app.train()
def train(message: Message, context: Context) -> Message:
    return relayed(message, context)


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    return relayed(message, context)


def relayed(message: Message, context: Context) -> Message:
    """The worker's answer to a message. Raises: WorkerGone with what it said, which Flower reports to the server."""
    record = message.content.get("fedlora")
    if not isinstance(record, ArrayRecord) or "bytes" not in record:
        raise WorkerGone("not a fedlora message: expected one array `bytes` in record `fedlora`")
    where = str(context.node_config.get("socket", ""))
    data = asked(where, npy_bytes(record["bytes"].data), patience=PATIENCE)
    return Message(
        RecordDict({"fedlora": ArrayRecord({"bytes": Array(np.frombuffer(data, np.uint8))})}), reply_to=message
    )


def asked(where: str, ask: bytes, *, patience: float) -> bytes:
    """Give an ask to the worker that listens at `where`; if it dies meanwhile, give it to the one that follows.

    A worker that had finished answers the same ask from its memory. Raises: WorkerGone if none is back within
    `patience` seconds, or it refuses.
    """
    end = time.monotonic() + patience
    while True:
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
                connection.connect(where)
                send(connection, ask)
                status, data = receive_response(connection, max_bytes=_MOST)
                break
        except (OSError, WireError) as error:
            if time.monotonic() > end:
                raise WorkerGone(f"the node's worker does not answer: {error}") from error
            time.sleep(_PAUSE)
    if status != ANSWERED:
        raise WorkerGone(f"the worker refused: {data.decode(errors='replace')[:2000]}")
    return data
