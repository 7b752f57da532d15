"""A client's side of secure sums: trains once, keeps the update in this process, and goes through the stages.

Keys and update live in memory alone: a process that ends is a client that drops out. What must outlive it is the
record of what was consented to (`fedlora.privacy.secagg.consent`), which is on disk before any message that it allows.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from numpy.typing import NDArray

from clients.memory import Memory
from fedlora.adapter import Array
from fedlora.base import Base
from fedlora.errors import FedLoRAError, TrainingError, WireError
from fedlora.pki import node_id
from fedlora.privacy.accounting import Event
from fedlora.privacy.secagg import messages
from fedlora.privacy.secagg.client import Client
from fedlora.privacy.secagg.consent import Consent
from fedlora.privacy.secagg.context import Context
from fedlora.privacy.secagg.packing import Packing
from fedlora.privacy.secagg.refusal import Refused
from fedlora.privacy.secagg.update import basis_of, packing, sketched, sum_shapes, vector
from fedlora.privacy.secagg.whole import coding, event_of, own_noise, whole_vector
from fedlora.state import Answer, Ask, Header, Secure, TrainPlan, part

__all__ = ["RoundOver", "answered"]

_CONSENT = "consent"


class RoundOver(FedLoRAError):
    """This client helped to open a sum of this round, and will not add to another one of it."""


@dataclass(frozen=True)
class _Update:
    """What a client trained in one round, for all attempts and parts of it."""

    answer: Answer
    plan: TrainPlan
    asked: str  # digest of what it answers


@dataclass(frozen=True)
class _Session:
    """What one client holds between the stages of one part of a round."""

    context: Context
    client: Client
    update: _Update
    secure: Secure
    into: Packing
    ranges: Mapping[str, Array]  # Q, in part 2


_SESSIONS: dict[tuple[str, str], _Session] = {}  # by run and client


class _Kept:
    """The record of one run in a client's memory folder."""

    def __init__(self, memory: Memory, run: str) -> None:
        self._memory, self._run = memory, run

    def load(self) -> Consent:
        data = self._memory.durable(_CONSENT)
        return Consent(self._run) if data is None else Consent.from_bytes(data)

    def save(self, consent: Consent) -> None:
        self._memory.keep_durable(_CONSENT, consent.to_bytes())


def answered(
    header: Header,
    ask: Ask,
    *,
    base: Base,
    key: Ed25519PrivateKey | None,
    memory: Memory | None,
    trusted: Collection[str] | None,
    train: Callable[[], Answer],
    charge: Callable[[Event], None] | None = None,
) -> Answer:
    """The client's message of one stage. `train()` is called once a round, and again only for another plan.

    Where its own noise protects it as a whole client, `charge` writes the cost of the sum down before it trains.
    `trusted` are the ids that may be in a sum with this client; None: whoever the server says.
    Raises: RoundOver; Refused where the protocol's rules forbid it; TrainingError without a key, a memory folder or a
    session; WireError for a message that is none.
    """
    assert ask.secure is not None
    if key is None or memory is None:
        raise TrainingError(
            f"{header.client}: a secure sum needs a signing key and a memory folder, which this client has not; run it "
            "as a node, or under fedlora simulate"
        )
    who = (header.run, node_id(key.public_key()))
    before = _SESSIONS.get(who)
    if before is not None and before.context.round != header.round:
        before = None
    if ask.secure.stage == "advertise":
        _SESSIONS.pop(who, None)
        _SESSIONS[who] = _begun(header, ask, base, key, memory, trusted, train, charge, before)
        return Answer(message=_SESSIONS[who].client.advertise().to_bytes())
    if before is None:
        raise TrainingError(f"{header.client}: no secure sum of round {header.round} is open here; was it restarted?")
    told = messages.from_server(ask.message, before.context)
    stage, client = ask.secure.stage, before.client
    if stage == "share" and isinstance(told, messages.Advertisements):
        return Answer(message=client.share(told).to_bytes())
    if stage == "mask" and isinstance(told, messages.Deliveries):
        return Answer(message=client.mask(told, _vector(before), _noise(before)).to_bytes())
    if stage == "confirm" and isinstance(told, messages.Survivors):
        return Answer(message=client.confirm(told).to_bytes())
    if stage == "unmask" and isinstance(told, messages.UnmaskRequest):
        said = client.unmask(told).to_bytes()
        if before.context.part == before.context.parts:
            del _SESSIONS[who]  # the round is over for this client
        return Answer(message=said)
    raise WireError(f"a {type(told).__name__} at the stage {stage}")


def _begun(
    header: Header,
    ask: Ask,
    base: Base,
    key: Ed25519PrivateKey,
    memory: Memory,
    trusted: Collection[str] | None,
    train: Callable[[], Answer],
    charge: Callable[[Event], None] | None,
    before: _Session | None,
) -> _Session:
    assert ask.secure is not None
    secure, held = ask.secure, before.update if before is not None else None
    plan = ask.plan or (held.plan if held is not None and secure.part > 1 else None)
    if plan is None:
        raise TrainingError(f"{header.client}: a secure sum without a plan has nothing to add up; was it restarted?")
    layout = base.layout if ask.subspace is None else base.layout.within(ask.subspace.dim)
    into, ranges = packing(sum_shapes(plan, secure, layout)), part(ask.arrays, "Q")
    context = Context.from_bytes(ask.message)
    wanted = {"run": header.run, "round": header.round, "base": base.fingerprint, "part": secure.part}
    context.require(**wanted, layout=into.digest, basis=basis_of(plan, secure, ranges))
    mine = node_id(key.public_key())
    rank = 1 if secure.columns else plan.rank
    if mine in context.members and (told := context.members[mine].rank) != rank:
        raise Refused("context", f"this client is on the roster with rank {told}, and it adds {rank}")
    if trusted is not None and (strangers := sorted(context.members.keys() - set(trusted))):
        raise Refused("roster", f"{strangers[0][:12]} and {len(strangers) - 1} others are not in this node's own list")
    kept = _Kept(memory, header.run)
    record = kept.load()
    if record.round == context.round and context.part <= record.answered:
        raise RoundOver(f"round {context.round} was opened with this client's help; go on to the next")
    if charge is not None:
        if secure.whole is None or secure.columns:
            raise Refused("noise", "this client is in sums only with noise of its own, and was asked for none")
        event = event_of(secure.whole, context.least_survivors)
        if context.fixed_point != coding(into.size, len(context.roster), secure.whole):
            raise Refused("fixed-point", "this clip and noise call for another grid; on this one the charge is wrong")
        charge(event)
    client = Client(context, key, kept)
    asked = hashlib.sha256(repr((plan, ask.task)).encode()).hexdigest()
    if held is None or held.asked != asked:
        held = _Update(train(), plan, asked)
    return _Session(context, client, held, secure, into, ranges)


def _vector(session: _Session) -> NDArray[np.float32]:
    """What this client adds to the sum."""
    answer, secure = session.update.answer, session.secure
    if secure.whole is not None:
        return whole_vector(answer.arrays, session.into, ratio=secure.ratio, whole=secure.whole)
    losses = [answer.metrics.get(name, 0.0) for name in ("loss_before", "loss_after")]
    before, after = (x if math.isfinite(x) else 0.0 for x in losses)
    arrays: Mapping[str, Array] = answer.arrays
    if secure.columns:
        arrays = sketched(answer.arrays, session.update.plan, secure, session.ranges)
    return vector(
        arrays,
        session.into,
        examples=answer.examples,
        most=secure.examples,
        ratio=secure.ratio,
        bound=session.context.fixed_point.bound,
        losses=(before, after),
    )


def _noise(session: _Session) -> NDArray[np.int32] | None:
    """Its share of the noise, drawn anew for every sum; None where it adds none."""
    whole = session.secure.whole
    return None if whole is None else own_noise(session.into, whole, session.context.fixed_point.bits)
