"""The ClientApp: decode, check, hand to the trainer, encode. One base stays resident in the process.

flwr run .            (as part of the Flower app that pyproject.toml names)
"""

from __future__ import annotations

import os
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

from clients.memory import Memory
from fedlora.base import Base, load_base
from fedlora.code import require_one_checkout, require_same_code
from fedlora.config import ModelConfig, RunConfig, load_config
from fedlora.data import client_rows
from fedlora.data.prompt import prompt_format
from fedlora.data.report import tell
from fedlora.data.rows import TokenRow
from fedlora.errors import BaseMismatch, FedLoRAError, WireError
from fedlora.evaluation.score import score
from fedlora.state import Answer, Ask, Block, Header, keyed, part
from fedlora.training.attach import attach
from fedlora.training.local import train_client
from fedlora.training.start import public_pair
from fedlora.wire import blocks_id, decode_ask, encode_answer

require_one_checkout(__file__)

app = ClientApp()
ROWS_KEPT = 32  # clients whose encoded rows stay in memory


@app.query()
def hello(message: Message, context: Context) -> Message:
    return _reply(message, context)


@app.train()
def train(message: Message, context: Context) -> Message:
    return _reply(message, context)


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    return _reply(message, context)


def _reply(message: Message, context: Context) -> Message:
    """Answer one message. A refusal of ours travels back as an `error` answer; anything else is Flower's to report."""
    config = settings({k: v for k, v in context.run_config.items() if k != "out"})
    data = _bytes(message)
    header, ask = decode_ask(data, max_bytes=config.wire.max_bytes)
    try:
        answer = respond(config, header, ask, data, context)
    except FedLoRAError as error:
        info = {"error": type(error).__name__, "message": str(error)}
        answer = encode_answer(replace(header, kind="error"), Answer(info=info))
    record = ArrayRecord({"bytes": Array(np.frombuffer(answer, np.uint8))})
    return Message(RecordDict({"fedlora": record}), reply_to=message)


def _bytes(message: Message) -> bytes:
    """The one byte string of a message. Raises: WireError if it carries anything else."""
    record = message.content.get("fedlora")
    if not isinstance(record, ArrayRecord) or "bytes" not in record:
        raise WireError("not a fedlora message: expected one array `bytes` in record `fedlora`")
    return record["bytes"].numpy().tobytes()


def respond(config: RunConfig, header: Header, ask: Ask, data: bytes, context: Context) -> bytes:
    """The answer to one ask, as bytes. Raises: FedLoRAError of the kind that fits."""
    require_same_code(header.code)
    index = int(context.node_config["partition-id"])
    client = stable_id(index)
    base = resident_base(config.model)
    if header.kind == "hello":
        info: dict[str, Any] = {
            "id": client,
            "rank": config.rank_of(index),
            "base": base.fingerprint,
            "layout": base.layout.to_json(),
        }
        return encode_answer(header, Answer(info=info, arrays=keyed("head", base.initial_head)))
    if header.client != client:
        raise FedLoRAError(f"this is {client}, but the ask is for {header.client}: the node ids were mixed up")
    if header.base != base.fingerprint:
        raise BaseMismatch(
            f"client {client}: its base is {base.fingerprint[:12]}, the run's is {header.base[:12]}. Same model, same "
            "revision, same tokenizer on both sides?"
        )
    memory = (
        Memory(Path(str(context.node_config["memory"])), header.run, client)
        if "memory" in context.node_config
        else None
    )
    if header.kind == "train":
        kept = memory.recall(data) if memory else None
        if kept is not None:
            return kept
        keep = memory is not None and ask.plan is not None and ask.plan.training.optimizer_state == "keep"
        moments = memory.moments(header.round) if memory and keep else None
        rows = encoded(config, index)[0]
        trained = train_client(base, header, ask, rows, threads=threads(config), optimizer=moments)
        answer = encode_answer(header, trained, config.wire.dtype)
        if memory and moments is not None:
            memory.keep_moments(header.round, moments)
        if memory:
            memory.remember(data, answer)
        return answer
    blocks = ask.blocks
    if ask.public is not None:
        blocks += (Block(adapter=public_pair(ask, header, base.layout).folded(), born=header.version),)
    attach(base, blocks, blocks_id(blocks), ask.frozen, part(ask.arrays, "head"))
    held_out = encoded(config, index)[1]
    metrics = score(base, held_out, batch_size=config.evaluation.batch_size) if held_out else {}
    return encode_answer(header, Answer(examples=len(held_out), metrics=metrics))


def stable_id(index: int) -> str:
    """The stable id of a simulated client: its partition."""
    return f"client-{index:05d}"


@lru_cache(maxsize=1)
def resident_base(model: ModelConfig) -> Base:
    """The base of this process: loaded once, adapters are swapped on it."""
    return load_base(model)


def threads(config: RunConfig) -> int:
    """Torch threads of a training step. Set by number, since a process pool may have its own default."""
    return config.training.threads or os.cpu_count() or 1


def settings(run_config: dict[str, bool | int | float | str]) -> RunConfig:
    """The run's settings out of Flower's run config; parsed once per process."""
    return _settings(tuple(sorted(run_config.items())))


@lru_cache(maxsize=4)
def _settings(items: tuple[tuple[str, bool | int | float | str], ...]) -> RunConfig:
    return load_config(flower=dict(items))


def encoded(config: RunConfig, index: int) -> tuple[list[TokenRow], list[TokenRow]]:
    """(training rows, held-out rows) of one client as tokens; the rows of the last clients stay in memory."""
    return _encoded(config.model_dump_json(), index)


@lru_cache(maxsize=ROWS_KEPT)
def _encoded(config_json: str, index: int) -> tuple[list[TokenRow], list[TokenRow]]:
    config = RunConfig.model_validate_json(config_json)
    rows = client_rows(config, index)
    form = prompt_format(config, resident_base(config.model).tokenizer)
    train, trained_on = form.encode(rows.train)
    held_out, scored_on = form.encode(rows.holdout)
    tell(rows.report, config.data.name)
    tell(trained_on + scored_on, stable_id(index))
    return train, held_out
