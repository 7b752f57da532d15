"""What a client does with an ask: check it, train, measure or evaluate, keep what must stay here, answer in bytes.

Knows nothing of Flower: the ClientApp of a simulation and the worker of a deployed node both call `answer`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from numpy.typing import NDArray

from clients import sums
from clients.memory import Memory
from clients.private import Budget, NotPrivate, charge_whole, open_ledger, release, require_private
from fedlora.base import Base
from fedlora.code import require_same_code
from fedlora.config import RunConfig
from fedlora.data.rows import TokenRow
from fedlora.errors import BaseMismatch, BlocksMissing, FedLoRAError, TrainingError
from fedlora.evaluation.score import score
from fedlora.feedback import compress
from fedlora.privacy.accounting import Event
from fedlora.state import Answer, Ask, Block, Header, keyed, part
from fedlora.training.attach import attach
from fedlora.training.local import train_client
from fedlora.training.measure import measure
from fedlora.training.start import personal_pair, public_pair
from fedlora.wire import blocks_id, decode_answer, decode_ask, encode_answer


@dataclass(frozen=True, kw_only=True)
class Client:
    """Who answers: its stable id and rank, the settings it goes by, what it holds, and where it keeps things.

    `base()` is loaded when it is first wanted; `rows(task)` are (training rows, held-out rows) as tokens; without a
    `memory` folder nothing is kept between asks. With a `budget` it answers private asks only.
    """

    id: str
    rank: int
    config: RunConfig
    base: Callable[[], Base]
    rows: Callable[[str], tuple[list[TokenRow], list[TokenRow]]]
    memory: Path | None
    budget: Budget | None = None
    key: Callable[[], Ed25519PrivateKey] | None = None  # signs what is its own in secure sums
    measured: Callable[[str], list[TokenRow]] | None = None  # training rows without old tasks'; None: those of `rows`
    trusted: Collection[str] | None = None  # ids that may be in a sum with it; None: whoever the server says


def answer(client: Client, data: bytes) -> bytes:
    """The answer to one ask, as bytes; a refusal of ours is an answer of kind `error`.

    Raises: WireError if `data` is no ask; anything that is not a FedLoRAError is a defect and goes up.
    """
    header, ask = decode_ask(data, max_bytes=client.config.wire.max_bytes)
    try:
        return respond(client, header, ask, data)
    except FedLoRAError as error:
        return refusal(header, error)


def refusal(header: Header, error: FedLoRAError, *, quiet: bool = False) -> bytes:
    """The answer that says why there is none; with `quiet` only what kind of error it was, for words may quote rows."""
    words = "its words stay with the node, since they may quote data: see its log" if quiet else str(error)
    info = {"error": type(error).__name__, "message": words}
    return encode_answer(replace(header, kind="error"), Answer(info=info))


def respond(client: Client, header: Header, ask: Ask, data: bytes) -> bytes:
    """The answer to the decoded ask that `data` holds. Raises: FedLoRAError of the kind that fits."""
    require_same_code(header.code)
    config, base, root = client.config, client.base(), client.memory
    if header.kind == "hello":
        info: dict[str, Any] = {
            "id": client.id,
            "rank": client.rank,
            "base": base.fingerprint,
            "layout": base.layout.to_json(),
            "keeps": root is not None,
            "key": client.key().public_key().public_bytes_raw().hex() if client.key is not None else "",
        }
        return encode_answer(header, Answer(info=info, arrays=keyed("head", base.initial_head)))
    if header.client != client.id:
        raise FedLoRAError(f"this is {client.id}, but the ask is for {header.client}: the node ids were mixed up")
    if header.base != base.fingerprint:
        raise BaseMismatch(
            f"client {client.id}: its base is {base.fingerprint[:12]}, the run's is {header.base[:12]}. Same model, "
            "same revision, same tokenizer on both sides?"
        )
    memory = Memory(root, header.run, client.id) if root is not None else None
    private = require_private(config, client.budget, header, ask)
    if header.kind == "secure":
        return encode_answer(header, _summed(client, header, ask, memory, private=private))
    if private:
        return _private(client, header, ask, memory)
    answered = memory.recall(data) if memory and header.kind == "train" else None
    if answered is not None:
        return answered
    ask = replace(ask, blocks=whole_blocks(ask, memory), on=None)
    if header.kind == "train":
        answer = _train(config, base, header, ask, client.rows(ask.task)[0], memory)
        if memory:
            memory.remember(data, answer)
        return answer
    if header.kind == "measure":
        train = client.rows(ask.task)[0] if client.measured is None else client.measured(ask.task)
        return encode_answer(header, measure(base, header, ask, train, batch_size=config.evaluation.batch_size))
    held_out = client.rows(ask.task)[1]
    metrics = _evaluate(config, base, header, ask, held_out, memory) if held_out else {}
    return encode_answer(header, Answer(examples=len(held_out), metrics=metrics))


def _summed(client: Client, header: Header, ask: Ask, memory: Memory | None, *, private: bool) -> Answer:
    """The client's message in one stage of a secure sum, see `clients.sums`."""

    def train() -> Answer:
        if private:
            data = _private(client, replace(header, kind="train"), replace(ask, secure=None, message=b""), memory)
            return decode_answer(data, max_bytes=len(data))[1]
        whole = replace(ask, blocks=whole_blocks(ask, memory), on=None)
        return train_client(client.base(), header, whole, client.rows(ask.task)[0], threads=threads(client.config))

    def charge(event: Event) -> None:
        if client.memory is None:
            raise NotPrivate(f"client {client.id}: a ledger needs a memory folder, and it has none")
        with open_ledger(client.memory, client.id, client.config, client.budget) as ledger:
            charge_whole(ledger, header, ask, event)

    key = client.key() if client.key is not None else None
    base, trusted, whole = client.base(), client.trusted, ask.secure is not None and ask.secure.whole
    own = (whole and whole.noise > 0.0) or (client.budget is not None and client.budget.unit == "client")
    paid = charge if own else None
    return sums.answered(header, ask, base=base, key=key, memory=memory, trusted=trusted, train=train, charge=paid)


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


def _private(client: Client, header: Header, ask: Ask, memory: Memory | None) -> bytes:
    """The answer to a private training ask, see `clients.private`. Raises: NotPrivate without a memory folder."""
    if memory is None or client.memory is None:
        raise NotPrivate(
            f"client {client.id}: without a memory folder there is no ledger, and what was spent would be forgotten: "
            "give the client one (FEDLORA_MEMORY)"
        )
    whole = replace(ask, blocks=whole_blocks(ask, memory), on=None)

    def train(first: Header) -> bytes:
        return _train(client.config, client.base(), first, whole, client.rows(ask.task)[0], memory)

    with open_ledger(client.memory, client.id, client.config, client.budget) as ledger:
        return release(ledger, memory, header, whole, train)


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


def threads(config: RunConfig) -> int:
    """Torch threads of a training step. Set by number, since a process pool may have its own default."""
    return config.training.threads or os.cpu_count() or 1
