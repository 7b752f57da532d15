"""Signed asks and answers: what was signed passes, and nothing else does."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedlora.envelope import (
    ANSWER_OVERHEAD,
    ASK_OVERHEAD,
    EnvelopeError,
    SignedAsk,
    new_nonce,
    node_of,
    open_answer,
    open_ask,
    sign_answer,
    sign_ask,
)
from fedlora.pki import node_id
from fedlora.state import Header

OPERATOR, NODE, OTHER = (Ed25519PrivateKey.from_private_bytes(bytes([i]) * 32) for i in (1, 2, 3))
KEYS = {node_id(key.public_key()): key.public_key() for key in (NODE, OTHER)}
ME = node_id(NODE.public_key())
HEADER = Header(run="run", round=3, client=ME, kind="train", base="b", version=2, attempt=1, phase=1, code="c")
NONCE = bytes(range(32))
ASK = SignedAsk(nonce=NONCE, payload=b"what to do")
LAYOUT = "d" * 64


def opened(data: bytes, **other: Any) -> tuple[str, bytes]:
    usual: dict[str, Any] = {"ask": ASK, "asked": HEADER, "layout": LAYOUT, "keys": KEYS, "max_bytes": 1000}
    return open_answer(data, **usual | other)


def answered(**other: Any) -> bytes:
    usual: dict[str, Any] = {"ask": ASK, "header": HEADER, "layout": LAYOUT, "key": NODE}
    return sign_answer(b"what I did", **usual | other)


def test_an_ask_passes_and_costs_104_bytes() -> None:
    data = sign_ask(ASK.payload, OPERATOR, NONCE)
    assert open_ask(data, OPERATOR.public_key(), max_bytes=10) == ASK
    assert len(data) - len(ASK.payload) == ASK_OVERHEAD == 104


def test_every_byte_of_an_ask_counts() -> None:
    data = sign_ask(ASK.payload, OPERATOR, NONCE)
    for i in range(len(data)):
        changed = data[:i] + bytes([data[i] ^ 1]) + data[i + 1 :]
        with pytest.raises(EnvelopeError) as error:
            open_ask(changed, OPERATOR.public_key(), max_bytes=1000)
        assert error.value.rule == ("not signed" if i < 8 else "signature")


def test_an_ask_of_another_operator_or_too_large_or_torn_is_refused() -> None:
    data = sign_ask(ASK.payload, OTHER, NONCE)
    with pytest.raises(EnvelopeError, match="signature: the ask is not signed by the operator"):
        open_ask(data, OPERATOR.public_key(), max_bytes=1000)
    with pytest.raises(EnvelopeError, match="not signed: 114 bytes, at most 9 are taken"):
        open_ask(sign_ask(ASK.payload, OPERATOR, NONCE), OPERATOR.public_key(), max_bytes=9)
    for torn in (b"", data[:50], data[:103]):
        with pytest.raises(EnvelopeError, match="no signed ask"):
            open_ask(torn, OPERATOR.public_key(), max_bytes=1000)
    with pytest.raises(EnvelopeError, match="a nonce has 32 bytes, got 3"):
        sign_ask(b"", OPERATOR, b"abc")


def test_an_answer_passes_and_costs_136_bytes() -> None:
    data = answered()
    assert opened(data) == (ME, b"what I did")
    assert node_of(data) == ME
    assert len(data) - len(b"what I did") == ANSWER_OVERHEAD == 136


def test_every_byte_of_an_answer_counts() -> None:
    data = answered()
    for i in range(len(data)):
        changed = data[:i] + bytes([data[i] ^ 1]) + data[i + 1 :]
        with pytest.raises(EnvelopeError) as error:
            opened(changed)
        wanted = "not signed" if i < 8 else "stale" if i < 40 else "other node" if i < 72 else "signature"
        assert error.value.rule == wanted, i


@pytest.mark.parametrize("name", [f.name for f in fields(Header)])
def test_an_answer_is_bound_to_every_field_that_was_asked(name: str) -> None:
    value = getattr(HEADER, name)
    other = replace(HEADER, **{name: value + 1 if isinstance(value, int) else f"{value}x"})
    with pytest.raises(EnvelopeError, match=r"^signature: node "):
        opened(answered(header=other))


def test_an_answer_is_bound_to_its_ask_its_layout_and_its_node() -> None:
    with pytest.raises(EnvelopeError, match=r"^signature"):
        opened(answered(ask=replace(ASK, payload=b"other")))
    with pytest.raises(EnvelopeError, match=r"^signature"):
        opened(answered(layout=""))
    with pytest.raises(EnvelopeError, match=r"^stale: it answers another ask"):
        opened(answered(ask=replace(ASK, nonce=new_nonce())))
    relabelled = bytearray(answered())
    relabelled[40:72] = bytes.fromhex(node_id(OTHER.public_key()))
    with pytest.raises(EnvelopeError, match=r"^signature"):
        opened(bytes(relabelled))


def test_a_revoked_node_and_a_size_beyond_the_cap() -> None:
    with pytest.raises(EnvelopeError, match=r"other node: no node with key .* is enrolled, or it was revoked"):
        opened(answered(), keys={node_id(OTHER.public_key()): OTHER.public_key()})
    with pytest.raises(EnvelopeError, match="at most 9 are taken"):
        opened(answered(), max_bytes=9)


def test_an_ask_is_no_answer_and_nonces_differ() -> None:
    with pytest.raises(EnvelopeError, match="no signed answer"):
        node_of(sign_ask(b"x" * 200, OPERATOR, NONCE))
    assert len({new_nonce() for _ in range(100)}) == 100
