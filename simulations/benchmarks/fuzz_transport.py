"""The targets of fuzz.py that carry messages: Flower's records, a hello, signed envelopes, the worker's socket."""

from __future__ import annotations

import random
import socket
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, cast

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.supercore.task_identity import TaskIdentity

from clients.framing import receive
from fedlora.code import code_digest
from fedlora.config import load_config
from fedlora.envelope import EnvelopeError, SignedAsk, open_answer, open_ask, sign_answer, sign_ask
from fedlora.errors import AnswerRejected, WireError
from fedlora.pki import node_id
from fedlora.wire import encode_answer, encode_ask
from server.exchange import pack, unpack
from server.roster import Roster
from simulations.benchmarks.fuzz_mutations import damaged, frame, npy
from simulations.benchmarks.fuzz_targets import CAP, HEADER, Target, Unsound, answers, asks, of_bytes, require

OPERATOR = Ed25519PrivateKey.from_private_bytes(bytes(32))
NODE = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))


def transport_targets() -> list[Target]:
    return [*_flower(), *_envelopes(), of_bytes("transport/socket", [_framed(b"an ask")], [_lied], _receive, WireError)]


def _flower() -> list[Target]:
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 1  # as in a ServerApp
    whole = pack(b"12345678")["fedlora"]
    assert isinstance(whole, ArrayRecord)
    hello, said, _ = answers()[0]
    named = replace(hello, run="r", client="node 7", base="", code=code_digest(), version=0, attempt=0, phase=0)
    hellos = [encode_answer(named, said), encode_answer(named, replace(said, arrays={}))]
    config = load_config(None, ["rounds.clients=1"])

    def read_record(data: bytes) -> object:
        wanted = Array("uint8", (8,), "numpy.ndarray", data)
        got = unpack(RecordDict({"fedlora": ArrayRecord({"bytes": wanted})}))
        require(len(got) <= len(data), "more bytes than came")
        for strange in (
            RecordDict({}),
            RecordDict({"fedlora": ConfigRecord({"bytes": data})}),
            RecordDict({"fedlora": MetricRecord({"bytes": 1.0})}),
            RecordDict({"fedlora": ArrayRecord({"bytes": wanted, "more": wanted})}),
            RecordDict({"fedlora": ArrayRecord({"bytes": Array("O", (2**62, 9), "pickle", data)})}),
        ):
            with suppress(WireError):
                unpack(strange)
                raise Unsound(f"a record of another form was taken: {list(strange)}")
        return got

    def read_hello(data: bytes) -> object:
        roster = Roster(cast(Grid, _OneNode(pack(data))), config, "r", base=None, layout=None)
        refused = roster.refresh()
        require(len(refused) + len(roster.clients) == 1, "a node that is neither enrolled nor refused")
        for one in refused:
            require(one.detail.isprintable() and len(one.detail) <= 2500, "a refusal that is not one printable line")
            raise AnswerRejected("node 7", one.rule, one.detail)
        (client,) = roster.clients.values()
        require(client.member.id.isprintable() and 1 <= client.member.rank <= 6, "an absurd member")
        return client

    return [
        of_bytes("server/unpack", [whole["bytes"].data], [npy], read_record, WireError),
        of_bytes("server/hello", hellos, [frame], read_hello, AnswerRejected),
    ]


@dataclass
class _OneNode:
    """A Flower Grid of one node that answers everything with one record."""

    content: Any
    error: Any = None

    def get_node_ids(self) -> list[int]:
        return [7]

    def push_messages(self, messages: Sequence[object]) -> list[str]:
        return ["m" for _ in messages]

    def pull_messages(self, ids: Sequence[str]) -> list[_OneNode]:
        return [self]

    @property
    def metadata(self) -> _OneNode:
        return self

    reply_to_message_id = "m"

    def has_error(self) -> bool:
        return False


def _envelopes() -> list[Target]:
    payloads = [encode_ask(h, a) for h, a in asks()]
    nonce = bytes(range(32))
    asked = SignedAsk(nonce=nonce, payload=payloads[1])
    signed = [sign_ask(p, OPERATOR, nonce) for p in payloads]
    said = [
        sign_answer(encode_answer(h, a), asked, HEADER, layout, key)
        for h, a, _ in answers()[:3]
        for layout in ("", "d")
        for key in (NODE, OPERATOR)
    ]
    trusted = {node_id(NODE.public_key()): NODE.public_key()}

    def read_ask(data: bytes) -> object:
        got = open_ask(data, OPERATOR.public_key(), max_bytes=CAP)
        require(data in signed, "an ask that the operator did not sign was taken")
        return got

    def read_answer(data: bytes) -> object:
        got = open_answer(data, ask=asked, asked=HEADER, layout="d", keys=trusted, max_bytes=CAP)
        require(data in said, "an answer that no node signed was taken")
        return got

    return [
        of_bytes("transport/ask", signed, [damaged], read_ask, EnvelopeError),
        of_bytes("transport/answer", said, [damaged], read_answer, EnvelopeError),
    ]


def _framed(data: bytes) -> bytes:
    return len(data).to_bytes(8, "big") + data


def _lied(rng: random.Random, data: bytes, others: Sequence[bytes]) -> bytes:
    """A length that is not that of what follows it, or plain damage."""
    length = rng.choice((0, 1, 2**20, CAP, CAP + 1, 2**31, 2**63, 2**64 - 1))
    return damaged(rng, data, others) if rng.random() < 0.3 else length.to_bytes(8, "big") + data[8:]


def _receive(data: bytes) -> object:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.sendall(data)
        theirs.shutdown(socket.SHUT_WR)
        got = receive(ours, max_bytes=CAP)
    require(data[8:].startswith(got), "other bytes than were sent")
    return got
