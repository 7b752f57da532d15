"""Rounds over signed messages and a durable spool: the same state as without, whoever lies, whenever it is killed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from flwr.app import Error, Metadata
from flwr.app.message import make_message
from flwr.common.constant import ErrorCode

from fedlora.envelope import SignedAsk, open_ask, sign_answer
from fedlora.errors import RoundFailed
from fedlora.pki import node_id
from fedlora.state import GlobalState, Header
from fedlora.wire import encode_state, peek
from server.asking import STRIKES
from server.channel import Signed

OPERATOR = Ed25519PrivateKey.from_private_bytes(b"o" * 32)
Forge = Callable[["Keyed", bytes, SignedAsk, Header, str], bytes]


@dataclass
class Keyed:
    """Puts a client of the lab behind keys: opens what is signed, signs what it says; `forge` may do otherwise."""

    client: Any
    layout: str
    key: Ed25519PrivateKey = field(default_factory=Ed25519PrivateKey.generate)
    forge: Forge | None = None
    kept: bytes = b""

    def __post_init__(self) -> None:
        self.client.id = node_id(self.key.public_key())
        self.inner = self.client.respond
        self.client.respond = self.respond

    def respond(self, data: bytes) -> Any:
        ask = open_ask(data, OPERATOR.public_key(), max_bytes=10**8)
        header = peek(ask.payload, max_bytes=10**8)
        payload = self.inner(ask.payload)
        assert isinstance(payload, bytes)
        layout = "" if header.kind == "hello" else self.layout
        if self.forge is not None and header.kind == "train":
            return self.forge(self, payload, ask, header, layout)
        answer = sign_answer(payload, ask, header, layout, self.key)
        if header.kind == "train":
            self.kept = self.kept or answer
        return answer


@dataclass
class Federation:
    """A lab whose clients have keys."""

    lab: Any
    nodes: list[Keyed]
    revoked: set[str] = field(default_factory=set)

    def keys(self) -> Mapping[str, Ed25519PublicKey]:
        found = {node_id(n.key.public_key()): n.key.public_key() for n in self.nodes}
        return {i: key for i, key in found.items() if i not in self.revoked}

    def conduct(self, *sets: str, **kwargs: Any) -> GlobalState:
        channel = Signed(OPERATOR, self.keys, settings="")
        state: GlobalState = self.lab.conduct(*sets, channel=channel, durable=True, **kwargs)
        return state


@pytest.fixture
def federation(lab: Any, fakes: Any) -> Callable[[], Federation]:
    """Makes federations of the same five keys, each in a folder of its own."""
    keys = [Ed25519PrivateKey.from_private_bytes(bytes([i]) * 32) for i in range(1, 6)]

    def make() -> Federation:
        one = lab()
        return Federation(
            one, [Keyed(c, fakes.LAYOUT.digest, k) for c, k in zip(one.clients.values(), keys, strict=True)]
        )

    return make


def bare(state: GlobalState) -> bytes:
    """The state but for the counts of what was refused."""
    memory = {owner: arrays for owner, arrays in state.memory.items() if owner != STRIKES}
    return encode_state(GlobalState(**{**vars(state), "memory": memory}))


def unsigned(node: Keyed, payload: bytes, ask: SignedAsk, header: Header, layout: str) -> bytes:
    return payload


def by_a_stranger(node: Keyed, payload: bytes, ask: SignedAsk, header: Header, layout: str) -> bytes:
    return sign_answer(payload, ask, header, layout, Ed25519PrivateKey.generate())


def by_another_node(node: Keyed, payload: bytes, ask: Any, header: Header, layout: str) -> bytes:
    """Client 2's answer, signed by client 1, who is enrolled too."""
    return sign_answer(payload, ask, header, layout, Ed25519PrivateKey.from_private_bytes(bytes([2]) * 32))


def altered(node: Keyed, payload: bytes, ask: SignedAsk, header: Header, layout: str) -> bytes:
    data = bytearray(sign_answer(payload, ask, header, layout, node.key))
    data[-1] ^= 1
    return bytes(data)


def in_another_layout(node: Keyed, payload: bytes, ask: SignedAsk, header: Header, layout: str) -> bytes:
    return sign_answer(payload, ask, header, "f" * 64, node.key)


def without_layout(node: Keyed, payload: bytes, ask: SignedAsk, header: Header, layout: str) -> bytes:
    return sign_answer(payload, ask, header, "", node.key)


def the_first_one_again(node: Keyed, payload: bytes, ask: SignedAsk, header: Header, layout: str) -> bytes:
    node.kept = node.kept or sign_answer(payload, ask, header, layout, node.key)
    return node.kept


FORGERIES: dict[str, tuple[Forge, str, int]] = {
    "unsigned": (unsigned, "not signed", 1),
    "by a stranger": (by_a_stranger, "other node", 1),
    "by another node": (by_another_node, "other node", 1),
    "altered": (altered, "signature", 1),
    "in another layout": (in_another_layout, "signature", 1),
    "without its layout": (without_layout, "signature", 1),
    "an answer of an earlier round": (the_first_one_again, "stale", 2),
}


@pytest.mark.parametrize("case", FORGERIES)
def test_a_forged_answer_is_refused_by_name_and_changes_nothing(
    federation: Callable[[], Federation], case: str
) -> None:
    forge, rule, number = FORGERIES[case]
    one, clean = federation(), federation()
    bad = one.nodes[2]
    bad.forge = forge
    state = one.conduct("rounds.count=2")
    assert [(c, r) for c, r, _ in one.lab.refusals(number)] == [(bad.client.id, rule)]
    gone = clean.nodes[2].client
    gone.rounds, gone.train = ({1, 2} if number == 1 else {2}), None
    clean.nodes[2].forge = (
        unsigned if number == 1 else lambda n, p, a, h, x: sign_answer(p, a, h, x, n.key) if h.round == 1 else b""
    )
    assert bare(clean.conduct("rounds.count=2")) == bare(state)


def test_the_state_is_that_of_unsigned_rounds_and_the_bytes_are_counted(
    federation: Callable[[], Federation], lab: Any
) -> None:
    one, plain = federation(), lab()
    for node, client in zip(one.nodes, plain.clients.values(), strict=True):
        client.id = node.client.id
    assert encode_state(one.conduct()) == encode_state(plain.conduct())
    ours, theirs = one.lab.rounds[0], plain.rounds[0]
    assert ours["bytes_up"] - theirs["bytes_up"] == 5 * 136
    assert ours["bytes_down"] - theirs["bytes_down"] == 5 * 104
    assert not (one.lab.folder / "spool").exists()


def test_a_node_that_lies_about_its_id_is_not_enrolled(federation: Callable[[], Federation]) -> None:
    one = federation()
    one.nodes[1].client.id = one.nodes[0].client.id
    one.conduct("rounds.count=1")
    refused = [n for n in one.lab.notes if n["event"] == "refused"]
    assert (refused[0]["client"], refused[0]["rule"]) == ("node 1001", "other node")
    assert "signed by" in refused[0]["detail"]
    assert len(one.lab.rounds[0]["clients"]) == 4


def test_a_revoked_node_is_out_from_the_next_message_on(federation: Callable[[], Federation]) -> None:
    one = federation()
    victim = one.nodes[4].client.id

    def revoke(event: Mapping[str, Any]) -> None:
        if event["event"] == "closed" and event["round"] == 1:
            one.revoked.add(victim)

    one.conduct("rounds.count=2", stop=revoke)
    assert victim in [c["id"] for c in one.lab.rounds[0]["clients"]]
    assert victim not in [c["id"] for c in one.lab.rounds[1]["clients"]]
    assert ("revoked", victim) in [(n.get("rule"), n.get("client")) for n in one.lab.notes]


def test_three_wrong_answers_and_a_node_is_asked_no_more(federation: Callable[[], Federation]) -> None:
    one = federation()
    bad = one.nodes[0]
    bad.forge = altered
    one.conduct("rounds.count=5")
    asked = [r for r, _ in bad.client.down if r > 0]
    assert asked == [1, 2, 3]
    assert [r.get("quarantined", []) for r in one.lab.rounds] == [[], [], [], [bad.client.id], [bad.client.id]]
    assert [n["client"] for n in one.lab.notes if n["event"] == "quarantine"] == [bad.client.id]
    again = federation()
    again.nodes[0].forge = altered
    again.conduct("rounds.count=5", "rounds.quarantine=0")
    assert sorted({r for r, _ in again.nodes[0].client.down if r > 0}) == [1, 2, 3, 4, 5]


def test_a_client_that_says_itself_what_is_wrong_is_not_quarantined(
    federation: Callable[[], Federation], fakes: Any
) -> None:
    one = federation()
    one.nodes[0].client.train = fakes.complaining
    one.conduct("rounds.count=5")
    assert sorted({r for r, _ in one.nodes[0].client.down if r > 0}) == [1, 2, 3, 4, 5]
    assert {r["rule"] for e in one.lab.rounds for r in e["refused"]} == {"TrainingError"}


class Killed(BaseException):
    """The process is gone."""


@pytest.mark.parametrize("after", range(1, 11))
def test_an_accepted_answer_is_not_asked_for_again_after_a_kill(
    federation: Callable[[], Federation], after: int
) -> None:
    one, whole = federation(), federation()
    heard = 0

    def kill(event: Mapping[str, Any]) -> None:
        nonlocal heard
        heard += event["event"] == "answer"
        if heard == after and event["event"] == "answer":
            raise Killed

    with pytest.raises(Killed):
        one.conduct(stop=kill)
    assert encode_state(one.conduct()) == encode_state(whole.conduct())
    assert [n.client.trained for n in one.nodes] == [2] * 5


def test_what_was_accepted_counts_although_its_client_is_gone_after_the_kill(
    federation: Callable[[], Federation],
) -> None:
    one, whole = federation(), federation()
    order: list[str] = []

    def kill(event: Mapping[str, Any]) -> None:
        if event["event"] == "answer":
            order.append(event["client"])
            if len(order) == 4:
                raise Killed

    with pytest.raises(Killed):
        one.conduct("rounds.count=1", stop=kill)
    quiet = next(i for i, n in enumerate(one.nodes) if n.client.id == order[0])
    one.lab.grid.silent = {quiet}
    one.lab.grid.pulls = 0

    def speak(event: Mapping[str, Any]) -> None:
        if event["event"] == "start":
            one.lab.grid.silent = {quiet}

    one.lab.grid.silent = set()
    state = one.conduct("rounds.count=1", "rounds.deadline=0.5", stop=speak)
    assert encode_state(state) == encode_state(whole.conduct("rounds.count=1"))


def test_a_damaged_spool_file_is_refused_and_the_client_is_asked_again(federation: Callable[[], Federation]) -> None:
    one, whole = federation(), federation()

    def kill(event: Mapping[str, Any]) -> None:
        if event["event"] == "answer":
            raise Killed

    with pytest.raises(Killed):
        one.conduct(stop=kill)
    [path] = (one.lab.folder / "spool").glob("*/*.flw")
    path.write_bytes(path.read_bytes()[:-3])
    assert encode_state(one.conduct()) == encode_state(whole.conduct())


def test_a_pause_keeps_what_was_accepted(federation: Callable[[], Federation]) -> None:
    one, whole = federation(), federation()
    for node in one.nodes[:3]:
        node.forge = altered
    with pytest.raises(RoundFailed, match="2 of 5 clients answered"):
        one.conduct("rounds.count=1", "rounds.quarantine=0")
    assert len(list(Path(one.lab.folder / "spool").glob("*/*.flw"))) == 4  # two in each of two attempts
    for node in one.nodes[:3]:
        node.forge = None
    done = [n.client.trained for n in one.nodes]
    assert bare(one.conduct("rounds.count=1", "rounds.quarantine=0")) == bare(whole.conduct("rounds.count=1"))
    assert [n.client.trained - d for n, d in zip(one.nodes, done, strict=True)] == [1, 1, 1, 0, 0]


@pytest.mark.parametrize("times", [1, 2])
def test_an_answer_that_flower_lost_is_asked_for_once_more(federation: Callable[[], Federation], times: int) -> None:
    one, whole = federation(), federation()
    pull, lost = one.lab.grid.pull_messages, []

    def torn(ids: Any) -> Any:
        replies = pull(ids)
        if replies and replies[0].metadata.message_type == "train" and len(lost) < times:
            first = replies[0].metadata
            if not lost or lost[0] == first.src_node_id:
                lost.append(first.src_node_id)
                metadata = Metadata(
                    run_id=1,
                    message_id="",
                    src_node_id=1,
                    dst_node_id=1,
                    message_type="system",
                    group_id="",
                    ttl=0,
                    reply_to_message_id=first.reply_to_message_id,
                    created_at=0.0,
                )  # as Flower's Grid makes it
                return [make_message(metadata=metadata, error=Error(ErrorCode.MESSAGE_UNAVAILABLE, "a part is gone"))]
        return replies

    one.lab.grid.pull_messages = torn
    state = one.conduct("rounds.count=1", "rounds.retries=0", "rounds.quorum=0.8")
    assert [n["round"] for n in one.lab.notes if n["event"] == "again"] == [1]
    if times == 1:
        assert bare(state) == bare(whole.conduct("rounds.count=1"))
        assert one.lab.refusals() == []
    else:
        assert [rule for _, rule, _ in one.lab.refusals()] == ["answer lost"]
