"""The ClientApp: decode, check, hand to the trainer, encode. One base stays resident in the process.

flwr run .            (as part of the Flower app that pyproject.toml names)
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp
from numpy.typing import NDArray

from clients.memory import Memory
from fedlora.base import Base, load_base
from fedlora.code import require_one_checkout, require_same_code
from fedlora.config import ModelConfig, RunConfig, load_config, task_config
from fedlora.continual.tasks import JOINT, replayed
from fedlora.data import client_rows
from fedlora.data.prompt import prompt_format
from fedlora.data.report import tell
from fedlora.data.rows import TokenRow
from fedlora.errors import BaseMismatch, BlocksMissing, FedLoRAError, TrainingError, WireError
from fedlora.evaluation.score import score
from fedlora.feedback import compress
from fedlora.rng import stream
from fedlora.state import Answer, Ask, Block, Header, keyed, part
from fedlora.training.attach import attach
from fedlora.training.local import train_client
from fedlora.training.measure import measure
from fedlora.training.start import personal_pair, public_pair
from fedlora.wire import blocks_id, decode_ask, encode_answer

require_one_checkout(__file__)

app = ClientApp()
ROWS_KEPT = 32  # clients (each with each of its tasks) whose encoded rows stay in memory
REPLAY_ROWS = 32  # of each old task, where nothing else is said


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
    data = _bytes(message)
    header, ask = decode_ask(data, max_bytes=config.wire.max_bytes)
    try:
        answer = respond(config, header, ask, data, context, rows=rows)
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


def respond(
    config: RunConfig, header: Header, ask: Ask, data: bytes, context: Context, *, rows: Rows | None = None
) -> bytes:
    """The answer to one ask, as bytes. `rows(config, index, task)` are what it trains and scores on, else its own.

    Raises: FedLoRAError of the kind that fits.
    """
    rows = rows or encoded
    require_same_code(header.code)
    index = int(context.node_config["partition-id"])
    client = stable_id(index)
    base = resident_base(config.model)
    where = context.node_config.get("memory") or os.environ.get("FEDLORA_MEMORY")
    root = Path(str(where)) if where else None
    if header.kind == "hello":
        info: dict[str, Any] = {
            "id": client,
            "rank": config.rank_of(index),
            "base": base.fingerprint,
            "layout": base.layout.to_json(),
            "keeps": root is not None,
        }
        return encode_answer(header, Answer(info=info, arrays=keyed("head", base.initial_head)))
    if header.client != client:
        raise FedLoRAError(f"this is {client}, but the ask is for {header.client}: the node ids were mixed up")
    if header.base != base.fingerprint:
        raise BaseMismatch(
            f"client {client}: its base is {base.fingerprint[:12]}, the run's is {header.base[:12]}. Same model, same "
            "revision, same tokenizer on both sides?"
        )
    memory = Memory(root, header.run, client) if root is not None else None
    answered = memory.recall(data) if memory and header.kind == "train" else None
    if answered is not None:
        return answered
    ask = replace(ask, blocks=whole_blocks(ask, memory), on=None)
    if header.kind == "train":
        answer = _train(config, base, header, ask, rows(config, index, ask.task)[0], memory)
        if memory:
            memory.remember(data, answer)
        return answer
    if header.kind == "measure":
        train = rows(config, index, ask.task)[0]
        return encode_answer(header, measure(base, header, ask, train, batch_size=config.evaluation.batch_size))
    held_out = rows(config, index, ask.task)[1]
    metrics = _evaluate(config, base, header, ask, held_out, memory) if held_out else {}
    return encode_answer(header, Answer(examples=len(held_out), metrics=metrics))


def whole_blocks(ask: Ask, memory: Memory | None) -> tuple[Block, ...]:
    """All blocks that an ask speaks of: those it carries, after those that it says are here; kept for the next ask.

    Raises: BlocksMissing if they are not here, or are others than the asker thinks.
    """
    blocks = ask.blocks
    if ask.on is not None:
        if memory is None:
            raise BlocksMissing("this client has no memory folder, so it holds no blocks; send them whole")
        blocks = memory.blocks(ask.on) + blocks
    if ask.whole:
        if blocks_id(blocks) != ask.whole:
            raise BlocksMissing(f"the blocks here and in the ask are {blocks_id(blocks)[:12]}, not {ask.whole[:12]}")
        if memory is not None:
            memory.keep_blocks(ask.whole, blocks)
    return blocks


def _train(
    config: RunConfig, base: Base, header: Header, ask: Ask, rows: Sequence[TokenRow], memory: Memory | None
) -> bytes:
    """One round's training, with what stays here between rounds: moments, own parts, what the codec left out."""
    plan, layout = ask.plan, base.layout if ask.subspace is None else base.layout.within(ask.subspace.dim)

    def before(name: str, needed: bool) -> dict[str, NDArray[np.floating]] | None:
        return memory.arrays(_of_task(name, ask.task), header.round) if memory and needed else None

    moments = before("moments", plan is not None and plan.training.optimizer_state == "keep")
    kept = before("parts", plan is not None and bool(plan.keep))
    answer = train_client(base, header, ask, rows, threads=threads(config), optimizer=moments, kept=kept)
    error = None
    if plan is not None and (plan.codec != "float32" or plan.top is not None):
        error = before("error", True)
        if error is None:
            raise TrainingError(
                f"{header.client}: wire.up={plan.codec} and wire.top={plan.top} need a memory folder for what they "
                "leave out, and this client has none: give the node one (FEDLORA_MEMORY), or use float32 and no top"
            )
        arrays, error = compress(answer.arrays, plan, error, layout)
        answer = replace(answer, arrays=arrays)
    data = encode_answer(header, answer, "float32" if plan is None else plan.codec)
    for name, left in (("moments", moments), ("parts", kept), ("error", error)):
        if memory and left is not None:
            memory.keep_arrays(_of_task(name, ask.task), header.round, left)
    return data


def _of_task(name: str, task: str) -> str:
    """The name under which something of one task is kept, so that a new task begins without."""
    return f"{name}.{task}" if task else name


def _evaluate(
    config: RunConfig, base: Base, header: Header, ask: Ask, rows: Sequence[TokenRow], memory: Memory | None
) -> Mapping[str, float]:
    """Sums over the held-out rows, of the blocks and whatever pair the ask speaks of."""
    extra = [] if ask.frozen is None else [ask.frozen]
    head = part(ask.arrays, "head")
    if ask.public is not None:
        extra.append(public_pair(ask, header, base.layout))
    if ask.personal is not None:
        kept = memory.arrays("parts", header.round + 1) if memory else {}
        own, head = personal_pair(ask, header, base.layout, kept)
        extra.append(own)
    blocks = ask.blocks + tuple(Block(adapter=pair.folded(), born=header.version) for pair in extra)
    attach(base, blocks, blocks_id(blocks), None, head)
    return score(base, rows, batch_size=config.evaluation.batch_size)


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


def encoded(config: RunConfig, index: int, task: str = "") -> tuple[list[TokenRow], list[TokenRow]]:
    """(training rows, held-out rows) of one client as tokens; the rows of the last clients stay in memory.

    In a task also what the settings have it train on again: some rows of old tasks (`continual.replay_rows` of each,
    drawn once), or the rows of all tasks. Only the task's own rows are held out, or those of all.
    """
    own, *others = replayed(config, task) if task else [""]
    train, held_out = _encoded(config.model_dump_json(), index, own)
    most = (config.continual.replay_rows or REPLAY_ROWS) if task != JOINT else None
    for other in others:
        again, held = _encoded(config.model_dump_json(), index, other)
        if task == JOINT:
            train, held_out = train + again, held_out + held
            continue
        drawn = stream(config.seed, "replay", index, other).permutation(len(again))[:most]
        train = train + [again[i] for i in sorted(drawn)]
    return train, held_out


@lru_cache(maxsize=ROWS_KEPT)
def _encoded(config_json: str, index: int, task: str) -> tuple[list[TokenRow], list[TokenRow]]:
    config = task_config(RunConfig.model_validate_json(config_json), task)
    rows = client_rows(config, index)
    form = prompt_format(config, resident_base(config.model).tokenizer)
    train, trained_on = form.encode(rows.train)
    held_out, scored_on = form.encode(rows.holdout)
    tell(rows.report, config.data.name)
    tell(trained_on + scored_on, stable_id(index))
    return train, held_out
