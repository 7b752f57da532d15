"""The ClientApp of a simulation, in process or under `flwr run`: decode, answer, encode. One base stays resident.

flwr run .            (as part of the Flower app that pyproject.toml names)

A deployed node runs `clients/relay.py` instead, which holds nothing.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from flwr.app import Array, ArrayRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

from clients.answer import Client, answer
from clients.memory import Memory
from clients.resident import encoded, resident_base, stable_id
from fedlora.code import require_one_checkout
from fedlora.config import RunConfig, load_config
from fedlora.data.rows import TokenRow
from fedlora.errors import WireError
from fedlora.npy import npy_bytes

require_one_checkout(__file__)

app = ClientApp()


@app.query()
def hello(message: Message, context: Context) -> Message:
    return reply(message, context)


@app.train()
def train(message: Message, context: Context) -> Message:
    return reply(message, context)


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    return reply(message, context)


Rows = Callable[[RunConfig, int, str], tuple[list[TokenRow], list[TokenRow]]]


def reply(message: Message, context: Context, *, rows: Rows | None = None) -> Message:
    """Answer one message. A refusal of ours travels back as an `error` answer; anything else is Flower's to report.

    `rows(config, index, task)` are what the client trains and scores on, by default its own.
    """
    config = settings({k: v for k, v in context.run_config.items() if k != "out"})
    index = int(context.node_config["partition-id"])
    where = context.node_config.get("memory") or os.environ.get("FEDLORA_MEMORY")
    own = rows or encoded
    memory = Path(str(where)) if where else None
    client = Client(
        id=stable_id(index),
        rank=config.rank_of(index),
        config=config,
        base=lambda: resident_base(config.model),
        rows=lambda task: own(config, index, task),
        measured=None if rows else lambda task: encoded(config, index, task, again=False)[0],
        memory=memory,
        key=None if memory is None or not config.secure.on else lambda: simulated_key(memory, stable_id(index)),
    )
    record = ArrayRecord({"bytes": Array(np.frombuffer(answer(client, _bytes(message)), np.uint8))})
    return Message(RecordDict({"fedlora": record}), reply_to=message)


def simulated_key(memory: Path, client: str) -> Ed25519PrivateKey:
    """The signing key of a simulated client, from the system's entropy, kept in its memory folder."""
    kept = Memory(memory, "keys", client)
    raw = kept.durable("signing")
    if raw is None:
        raw = Ed25519PrivateKey.generate().private_bytes_raw()
        kept.keep_durable("signing", raw)
    return Ed25519PrivateKey.from_private_bytes(raw)


def _bytes(message: Message) -> bytes:
    """The one byte string of a message. Raises: WireError if it carries anything else."""
    record = message.content.get("fedlora")
    if not isinstance(record, ArrayRecord) or "bytes" not in record:
        raise WireError("not a fedlora message: expected one array `bytes` in record `fedlora`")
    return npy_bytes(record["bytes"].data)


def settings(run_config: dict[str, bool | int | float | str]) -> RunConfig:
    """The run's settings out of Flower's run config; parsed once per process."""
    return _settings(tuple(sorted(run_config.items())))


@lru_cache(maxsize=4)
def _settings(items: tuple[tuple[str, bool | int | float | str], ...]) -> RunConfig:
    return load_config(flower=dict(items))
