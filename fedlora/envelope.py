"""Signed asks and answers of a deployed federation: who says so, in answer to what, and that it is not an old one.

    ask     "FLASK1\\0\\0"  nonce [32]                signature [64]  payload
    answer  "FLANS1\\0\\0"  nonce [32]  node id [32]  signature [64]  payload

Payloads are the bytes of `fedlora.wire`. Signatures are Ed25519 (RFC 8032) over a domain and the canonical JSON of what
is stated: of an ask its nonce and the payload's SHA-256; of an answer the run, round, attempt, phase, kind, client,
state version and base that were asked for, the node, the nonce of the ask, the SHA-256 of the ask's payload and of its
own, and the digest of the layout that it was computed in (none in a hello, which states the layout itself). A node's id
is the SHA-256 of its raw public key (`fedlora.pki.node_id`). The nonce is drawn anew for every sending, so that an
answer, kept and sent again, fits no later ask.

Cost: one signature (some 0.1 ms) and one SHA-256 over the payload (some 0.5 s a GB) on each side; 104 or 136 bytes.
"""

from __future__ import annotations

import hashlib
import json
import secrets
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from fedlora.errors import FedLoRAError
from fedlora.state import Header

__all__ = [
    "ANSWER_OVERHEAD",
    "ASK_OVERHEAD",
    "EnvelopeError",
    "SentAsk",
    "SignedAsk",
    "new_nonce",
    "node_of",
    "open_answer",
    "open_ask",
    "sent_ask",
    "sign_answer",
    "sign_ask",
]

_ASK, _ANSWER = b"FLASK1\0\0", b"FLANS1\0\0"
_NONCE, _NODE, _SIGNATURE = 32, 32, 64  # bytes
_DOMAIN_ASK, _DOMAIN_ANSWER = b"fedlora-ask-v1\0", b"fedlora-answer-v1\0"
ASK_OVERHEAD = len(_ASK) + _NONCE + _SIGNATURE
ANSWER_OVERHEAD = len(_ANSWER) + _NONCE + _NODE + _SIGNATURE


class EnvelopeError(FedLoRAError):
    """A message that is not signed as it must be; `rule` is one of `not signed`, `signature`, `stale`, `other node`."""

    def __init__(self, rule: str, detail: str) -> None:
        super().__init__(f"{rule}: {detail}")
        self.rule = rule
        self.detail = detail


@dataclass(frozen=True, kw_only=True)
class SignedAsk:
    """An ask whose signature holds: its nonce, and the bytes to decode."""

    nonce: bytes
    payload: bytes

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the payload, in hex."""
        return hashlib.sha256(self.payload).hexdigest()


@dataclass(frozen=True, kw_only=True)
class SentAsk:
    """What whoever waits for an answer keeps of an ask: nothing that grows with it."""

    nonce: bytes
    digest: str  # SHA-256 of the payload, in hex


def new_nonce() -> bytes:
    """32 bytes from the system's entropy."""
    return secrets.token_bytes(_NONCE)


def sign_ask(payload: bytes, key: Ed25519PrivateKey, nonce: bytes) -> bytes:
    """The ask as a node will take it. Raises: EnvelopeError for a nonce that is not 32 bytes."""
    return sent_ask(payload, key, nonce)[0]


def sent_ask(payload: bytes, key: Ed25519PrivateKey, nonce: bytes) -> tuple[bytes, SentAsk]:
    """The ask as a node will take it, and what to keep of it. Raises: EnvelopeError as `sign_ask`."""
    if len(nonce) != _NONCE:
        raise EnvelopeError("not signed", f"a nonce has {_NONCE} bytes, got {len(nonce)}")
    sent = SentAsk(nonce=nonce, digest=hashlib.sha256(payload).hexdigest())
    return b"".join((_ASK, nonce, key.sign(_statement_of_ask(sent)), payload)), sent


def open_ask(data: bytes, operator: Ed25519PublicKey, *, max_bytes: int) -> SignedAsk:
    """The ask in `data`, if the operator signed it; nothing of it is parsed before that.

    Raises: EnvelopeError if it is too large, not signed, or signed by another key.
    """
    if len(data) > max_bytes + ASK_OVERHEAD:
        raise EnvelopeError("not signed", f"{len(data):,} bytes, at most {max_bytes:,} are taken (wire.max_bytes)")
    if len(data) < ASK_OVERHEAD or data[: len(_ASK)] != _ASK:
        raise EnvelopeError("not signed", f"{len(data):,} bytes that are no signed ask")
    nonce = data[len(_ASK) : len(_ASK) + _NONCE]
    signature, payload = data[len(_ASK) + _NONCE : ASK_OVERHEAD], data[ASK_OVERHEAD:]
    ask = SignedAsk(nonce=nonce, payload=payload)
    try:
        operator.verify(signature, _statement_of_ask(ask))
    except InvalidSignature:
        raise EnvelopeError(
            "signature", "the ask is not signed by the operator whose key is pinned here (operator.pub)"
        ) from None
    return ask


def sign_answer(payload: bytes, ask: SignedAsk, header: Header, layout: str, key: Ed25519PrivateKey) -> bytes:
    """The answer to `ask`, whose header is `header`, computed in the layout of digest `layout` (empty: a hello)."""
    node = _raw_id(key.public_key())
    signature = key.sign(_statement_of_answer(payload, ask, header, layout, node))
    return b"".join((_ANSWER, ask.nonce, node, signature, payload))


def node_of(data: bytes) -> str:
    """The id, in hex, of the node that says it signed; it is not verified. Raises: EnvelopeError if it is no answer."""
    if len(data) < ANSWER_OVERHEAD or data[: len(_ANSWER)] != _ANSWER:
        raise EnvelopeError("not signed", f"{len(data):,} bytes that are no signed answer")
    start = len(_ANSWER) + _NONCE
    return data[start : start + _NODE].hex()


def open_answer(
    data: bytes,
    *,
    ask: SignedAsk | SentAsk,
    asked: Header,
    layout: str,
    keys: Mapping[str, Ed25519PublicKey],
    max_bytes: int,
) -> tuple[str, bytes]:
    """(id of the node that signed, payload) of an answer to `ask`; `keys` are those of the nodes that are trusted now.

    Raises: EnvelopeError: `not signed`; `other node` where its key is not (or no longer) trusted; `stale` where it
    answers another sending; `signature` where anything that it states differs.
    """
    if len(data) > max_bytes + ANSWER_OVERHEAD:
        raise EnvelopeError("not signed", f"{len(data):,} bytes, at most {max_bytes:,} are taken (wire.max_bytes)")
    node = node_of(data)
    if node not in keys:
        raise EnvelopeError("other node", f"no node with key {node[:12]} is enrolled, or it was revoked")
    nonce = data[len(_ANSWER) : len(_ANSWER) + _NONCE]
    if not secrets.compare_digest(nonce, ask.nonce):
        raise EnvelopeError("stale", "it answers another ask than the one that was sent (its nonce differs)")
    start = len(_ANSWER) + _NONCE + _NODE
    signature, payload = data[start : start + _SIGNATURE], data[ANSWER_OVERHEAD:]
    try:
        keys[node].verify(signature, _statement_of_answer(payload, ask, asked, layout, bytes.fromhex(node)))
    except InvalidSignature:
        raise EnvelopeError(
            "signature", f"node {node[:12]} did not sign these bytes as the answer to this ask in this layout"
        ) from None
    return node, payload


def _raw_id(key: Ed25519PublicKey) -> bytes:
    return hashlib.sha256(key.public_bytes(Encoding.Raw, PublicFormat.Raw)).digest()


def _statement_of_ask(ask: SignedAsk | SentAsk) -> bytes:
    return _DOMAIN_ASK + _canonical({"nonce": ask.nonce.hex(), "payload": ask.digest})


def _statement_of_answer(payload: bytes, ask: SignedAsk | SentAsk, header: Header, layout: str, node: bytes) -> bytes:
    stated = {
        **asdict(header),
        "node": node.hex(),
        "nonce": ask.nonce.hex(),
        "layout": layout,
        "ask": ask.digest,
        "payload": hashlib.sha256(payload).hexdigest(),
    }
    return _DOMAIN_ANSWER + _canonical(stated)


def _canonical(stated: Mapping[str, Any]) -> bytes:
    return json.dumps(stated, sort_keys=True, separators=(",", ":"), ensure_ascii=True).encode()
