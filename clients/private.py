"""A client whose single rows are private: what it refuses, what it charges, and how it answers the same thing once.

The ledger is one file a client for all runs and tasks, `privacy.jsonl` in `<memory>/<client id>`. For one training ask:

    charge (on disk) -> train -> keep the answer (on disk) -> seal its SHA-256 (on disk) -> answer

A release is named by the run, the round and the digest of what is asked, the attempt left out: a repeated ask, also one
of a repeated round, gets the update that was made the first time, at no charge, and never fresh noise for free. An ask
for anything else is another release. Killed between two of the steps: charged, not kept, so nothing left, and it is
trained again under the same charge; kept, not sealed: it is sealed when it is asked for again; sealed and what was kept
is lost: a new release is charged, since the first may be out.

Blocks are left out of that digest, as the state's version is in it: one server may cut the same state into blocks in
several ways.
"""

from __future__ import annotations

import hashlib
import itertools
import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from clients.memory import Memory, folder_name
from fedlora.config import RunConfig
from fedlora.errors import DataError, FedLoRAError, TrainingError
from fedlora.privacy.accounting import Event, Unit
from fedlora.privacy.budget import run_epsilon
from fedlora.privacy.clients import promised
from fedlora.privacy.ledger import Key, Ledger, Terms
from fedlora.state import Ask, Header
from fedlora.wire import decode_answer, encode_answer, encode_ask

__all__ = ["LEDGER", "Budget", "NotPrivate", "charge_whole", "open_ledger", "release", "require_private"]

LEDGER = "privacy.jsonl"
_log = logging.getLogger("fedlora.private")


class NotPrivate(FedLoRAError):
    """An ask whose answer would tell of single rows without noise, or could not be counted."""


@dataclass(frozen=True, kw_only=True)
class Budget:
    """What the owner of a node allows over all runs, whatever a run promises: epsilon at delta, of one unit."""

    epsilon: float
    delta: float
    unit: Unit = "example"


def require_private(config: RunConfig, own: Budget | None, header: Header, ask: Ask) -> bool:
    """Whether this ask is about private rows. Raises: NotPrivate for one whose answer would not be.

    An owner whose unit is the whole client answers secure sums alone, in which this client adds noise of its own.
    """
    plan = ask.plan
    if own is not None and own.unit == "client":
        if header.kind == "secure" and ask.secure is not None and ask.secure.whole is not None:
            return False
        raise NotPrivate(
            f"client {header.client}, round {header.round}: limits.unit is client, so nothing leaves but sums with "
            "noise of its own: the run must set privacy.level=client, privacy.noise=clients and secure.on=true"
        )
    if own is None and config.privacy.level != "example" and (plan is None or plan.privacy is None):
        return False
    rule = "limits.epsilon is set" if own is not None else "privacy.level is example"
    who = f"client {header.client}, round {header.round}"
    if header.kind == "secure" and plan is None:  # a later stage of a sum, of what was released at its first
        return False
    if header.kind not in ("train", "secure") or plan is None:
        raise NotPrivate(
            f"{who}: {rule}, so nothing that is measured or scored on its rows leaves it; the server may score the "
            "model on rows of its own (data.test)"
        )
    if plan.privacy is None:
        raise NotPrivate(
            f"{who}: {rule}, and this plan has no privacy: the run must set privacy.level=example and an epsilon"
        )
    if plan.training.local_steps is None:
        raise NotPrivate(f"{who}: {rule}, and epochs have as many steps as it has rows: set training.local_steps")
    return True


def open_ledger(root: Path, client: str, config: RunConfig, own: Budget | None) -> Ledger:
    """The client's ledger, made at its first private ask. Its terms are the owner's, else those of the run.

    One file for each unit: rows, and the client as a whole.

    Raises: LedgerError as `Ledger.open`, also where the folder is there and its ledger is gone; NotPrivate if nobody
    says what may be spent.
    """
    if own is None:
        whole = promised(config)
        spend = run_epsilon(config) if whole is None else whole
        if spend is None:
            raise NotPrivate(
                f"client {client}: neither its owner nor the run says what may be spent: set limits.epsilon"
            )
        own = Budget(epsilon=spend, delta=config.privacy.delta, unit="example" if whole is None else "client")
    terms = Terms(owner=client, unit=own.unit, epsilon=own.epsilon, delta=own.delta)
    name = folder_name(client)
    folder = root / (name if own.unit == "example" else f"{name}.whole")
    if not folder.exists():  # made whole or not at all, so that a folder without a ledger has lost it
        begun = root / f"{folder.name}.begun"
        begun.mkdir(mode=0o700, parents=True, exist_ok=True)
        Ledger.open(begun / LEDGER, terms, create=True).close()
        begun.rename(folder)
    return Ledger.open(folder / LEDGER, terms)


def charge_whole(ledger: Ledger, header: Header, ask: Ask, event: Event) -> None:
    """Charge the secure sum of this round, and task, whose noise this client has a share in; once for all attempts.

    Raises: BudgetSpent before anything is trained; LedgerError as `Ledger`, also where an attempt comes with less or
    other noise than one before.
    """
    ledger.charge(Key(run=header.run, round=header.round, release=f"whole {ask.task}".rstrip()), event)


def release(ledger: Ledger, memory: Memory, header: Header, ask: Ask, train: Callable[[Header], bytes]) -> bytes:
    """The one answer to this private ask: charged before `train` makes it, kept and sealed before it is returned.

    Raises: BudgetSpent for a charge beyond the budget, before anything is trained; LedgerError as `Ledger`;
    TrainingError without a reason where training fails, since that may be of one row: the client's own log has it.
    """
    plan = ask.plan
    assert plan is not None
    assert plan.privacy is not None
    assert plan.training.local_steps is not None
    first = replace(header, attempt=0)
    asked = encode_ask(first, replace(ask, blocks=(), on=None, whole="", settings=""))
    name = hashlib.sha256(asked).hexdigest()
    parts = (Key(run=header.run, round=header.round, release=name, part=str(n)) for n in itertools.count())
    kept = memory.recall(asked)
    digest = None if kept is None else hashlib.sha256(kept).hexdigest()
    key = next(k for k in parts if ledger.sealed(k) in (None, digest))
    if kept is None or digest is None:
        ledger.charge(key, plan.privacy.event(plan.training.local_steps))
        try:
            kept = train(first)
        except (DataError, TrainingError) as error:
            _log.warning("round %d: %s", header.round, error)
            raise TrainingError(
                f"client {header.client}, round {header.round}: private training failed, and why is in its own log only"
            ) from None
        memory.remember(asked, kept)
        digest = hashlib.sha256(kept).hexdigest()
    ledger.seal(key, digest)
    if header == first:
        return kept
    return encode_answer(header, decode_answer(kept, max_bytes=len(kept))[1], plan.codec)
