"""The resident worker of a node: it does what the operator signed, once, within the node's limits, and says so signed.

The trainer is one that counts. The socket is real; so is the relay's side of it.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import stat
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from clients import answer as answering
from clients import worker as working
from clients.framing import ANSWERED, REFUSED, receive_response, send
from clients.relay import WorkerGone, asked
from clients.worker import Worker, _Server
from fedlora.code import code_digest
from fedlora.config import load_config
from fedlora.continual.tasks import JOINT
from fedlora.deploy import Limits, NodeFile
from fedlora.envelope import EnvelopeError, SignedAsk, new_nonce, open_answer, sign_ask
from fedlora.errors import WireError
from fedlora.pki import load_private_key
from fedlora.privacy.accounting import Privacy
from fedlora.privacy.ledger import Ledger, Terms
from fedlora.shared_settings import shared_settings
from fedlora.state import Answer, Ask, Header, Layout, LocalTraining, Measure, Module, TrainPlan
from fedlora.wire import decode_answer, encode_ask
from tests.keys import node_keys

BASE = "b" * 64
LAYOUT = Layout(modules={"q": Module(out=4, inp=4)})
TRAINING = LocalTraining(learning_rate=1e-3, local_steps=5, local_epochs=None, batch_size=1)
PLAN = TrainPlan(method="flora", rank=2, rows=2, scale=1.0, train=("A",), send=(), training=TRAINING)
SETTINGS = shared_settings(load_config(None, []))


class Node:
    """A node in a folder, with a worker, and its operator."""

    def __init__(self, folder: Path, **fields: Any) -> None:
        self.operator = node_keys(folder)
        self.file = NodeFile(
            server="localhost:1",
            keys=folder / "keys",
            memory=folder / "memory",
            state=folder / "state",
            rank=2,
            **fields,
        )
        self.worker = Worker(self.file)
        self.key = load_private_key(folder / "keys" / "signing.key", "ed25519").public_key()

    def header(self, **fields: Any) -> Header:
        usual: dict[str, Any] = {"run": "run", "round": 1, "client": self.worker.id, "kind": "train", "base": BASE}
        return Header(**usual | {"code": code_digest()} | fields)

    def ask(self, header: Header, ask: Ask | None = None, *, operator: Ed25519PrivateKey | None = None) -> bytes:
        plan = PLAN if header.kind == "train" else None
        payload = encode_ask(header, ask or Ask(plan=plan, settings=SETTINGS))
        self.sent = SignedAsk(nonce=new_nonce(), payload=payload)
        return sign_ask(payload, operator or self.operator, self.sent.nonce)

    def opened(self, data: bytes, header: Header, *, layout: str = LAYOUT.digest) -> Answer:
        keys = {self.worker.id: self.key}
        told = "" if header.kind == "hello" else layout
        node, payload = open_answer(data, ask=self.sent, asked=header, layout=told, keys=keys, max_bytes=10**6)
        assert node == self.worker.id
        return decode_answer(payload, max_bytes=10**6)[1]

    def said(self, header: Header, ask: Ask | None = None, *, layout: str = LAYOUT.digest) -> Answer:
        return self.opened(self.worker.answered(self.ask(header, ask)), header, layout=layout)


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[Header]:
    """The headers of the asks that were trained on."""
    seen: list[Header] = []

    def train(base: Any, header: Header, ask: Ask, rows: Any, **kwargs: Any) -> Answer:
        seen.append(header)
        return Answer(examples=3, metrics={"seconds": float(len(seen))})

    base = SimpleNamespace(fingerprint=BASE, layout=LAYOUT, initial_head={})
    monkeypatch.setattr(working, "resident_base", lambda model: base)
    monkeypatch.setattr(working, "encoded", lambda config, index, task="", again=True, has=(): ([], []))
    monkeypatch.setattr(answering, "train_client", train)
    monkeypatch.setattr(answering, "attach", lambda *args: None)
    return seen


@pytest.fixture
def node(tmp_path: Path, trained: list[Header]) -> Node:
    return Node(tmp_path)


def test_a_hello_says_who_it_is_and_is_signed(node: Node) -> None:
    said = node.said(node.header(round=0, client="node 17", kind="hello", base=""))
    assert said.info["id"] == node.worker.id
    assert said.info["rank"] == 2
    assert said.info["keeps"] is True


def test_what_the_operator_did_not_sign_reaches_nothing(node: Node, trained: list[Header], tmp_path: Path) -> None:
    signed = node.ask(node.header())
    stranger = Ed25519PrivateKey.generate()
    for data in (node.ask(node.header(), operator=stranger), signed[:-1], signed + b"\0", node.sent.payload, b""):
        with pytest.raises(EnvelopeError):
            node.worker.answered(data)
    with pytest.raises(WireError):
        node.worker.answered(sign_ask(b"no ask", node.operator, new_nonce()))
    assert trained == []
    assert not (tmp_path / "memory").exists()


def test_rows_of_old_tasks_are_not_measured(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = {True: ["own", "own", "old"], False: ["own", "own"]}
    monkeypatch.setattr(working, "encoded", lambda config, index, task="", again=True, has=(): (rows[again], []))
    monkeypatch.setattr(answering, "measure", lambda base, header, ask, rows, batch_size: Answer(examples=len(rows)))
    asked = Ask(measure=Measure(sketch=1), settings=SETTINGS)
    assert node.said(node.header(kind="measure"), asked).examples == 2


@pytest.mark.parametrize("way", ["replay", "joint"])
def test_a_node_trains_on_the_tasks_that_it_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str) -> None:
    """Those that its own file lists; with none of them it refuses."""
    seen: list[Any] = []

    def encoded(config: Any, index: int, task: str = "", **said: Any) -> tuple[list[Any], list[Any]]:
        seen.append((task, said))
        return [], []

    base = SimpleNamespace(fingerprint=BASE, layout=LAYOUT, initial_head={})
    monkeypatch.setattr(working, "resident_base", lambda model: base)
    monkeypatch.setattr(working, "encoded", encoded)
    monkeypatch.setattr(answering, "train_client", lambda *args, **kwargs: Answer(examples=3))
    monkeypatch.setattr(answering, "attach", lambda *args: None)
    task = "c" if way == "replay" else JOINT
    names = json.dumps([{"name": n, "data.name": f"{n}.jsonl"} for n in "abc"])
    settings = shared_settings(load_config(None, [f"tasks={names}", f"continual.method={way}", "method.name=fedit"]))
    ask = Ask(plan=PLAN, task=task, settings=settings)
    folders = [tmp_path / "some", tmp_path / "none"]
    for folder in folders:
        folder.mkdir()
    node = Node(folders[0], tasks=[{"name": n, "data.name": f"{n}.jsonl"} for n in "ac"])
    assert node.said(node.header(), ask).examples == 3
    assert seen == [(task, {"again": True, "has": {"a", "c"}})]
    bare = Node(folders[1])
    assert bare.said(bare.header(), ask).info["error"] == "DataError"
    assert len(seen) == 1


def test_the_same_ask_signed_again_gets_the_same_answer_and_trains_once(node: Node, trained: list[Header]) -> None:
    first, second = node.said(node.header()), node.said(node.header())
    assert first == second
    assert len(trained) == 1
    assert node.said(node.header(attempt=1)).metrics == {"seconds": 2.0}


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"code": "0" * 64}, "CodeMismatch", "the server runs fedlora code 000000000000"),
        ({"client": "f" * 64}, "FedLoRAError", "its words stay with the node"),
        ({"base": "c" * 64}, "BaseMismatch", "its base is bbbbbbbbbbbb, the run's is cccccccccccc"),
    ],
)
def test_a_refusal_is_signed_with_its_reason(
    node: Node, trained: list[Header], change: dict[str, Any], error: str, message: str
) -> None:
    said = node.said(node.header(**change))
    assert said.info["error"] == error
    assert message in said.info["message"]
    assert trained == []


def test_a_server_that_would_set_the_nodes_paths_is_refused(
    node: Node, trained: list[Header], caplog: pytest.LogCaptureFixture
) -> None:
    ask = Ask(plan=PLAN, settings='{"tasks": [], "data.name": "/etc/shadow"}')
    said = node.said(node.header(), ask, layout="")
    assert (said.info["error"], "shadow" in said.info["message"]) == ("ConfigError", False)  # words stay here
    assert "tells data.name, which a server may not set" in caplog.text
    assert trained == []


def test_an_ask_of_a_round_that_is_over_is_refused(node: Node, trained: list[Header]) -> None:
    kept = node.ask(node.header(round=1))
    before = node.sent
    node.opened(node.worker.answered(kept), node.header(round=1))
    node.said(node.header(round=2))
    node.sent = before
    said = node.opened(node.worker.answered(kept), node.header(round=1), layout="")
    assert "round 1 is over: this node answered round 2" in said.info["message"]
    assert [h.round for h in trained] == [1, 2]
    assert node.said(node.header(run="another", round=1)).examples == 3


@pytest.mark.parametrize(
    ("limits", "plan", "kind", "what"),
    [
        (Limits(rank=2), replace(PLAN, rank=3), "train", "limits.rank: this node does at most 2"),
        (Limits(local_steps=4), PLAN, "train", "limits.local_steps: this node does at most 4, the operator asks for 5"),
        (
            Limits(local_epochs=0.5),
            replace(PLAN, training=replace(TRAINING, local_steps=None, local_epochs=2.0)),
            "train",
            "limits.local_epochs",
        ),
        (Limits(measure=False), None, "measure", "limits.measure: this node gives no sums"),
    ],
)
def test_a_nodes_limits_hold_whatever_is_signed(
    tmp_path: Path, trained: list[Header], limits: Limits, plan: TrainPlan | None, kind: Any, what: str
) -> None:
    node = Node(tmp_path, limits=limits)
    ask = Ask(plan=plan, measure=Measure(fisher=1) if plan is None else None, settings=SETTINGS)
    said = node.said(node.header(kind=kind), ask, layout="")
    assert what in said.info["message"]
    assert trained == []


@pytest.fixture
def listening(node: Node) -> Iterator[Path]:
    """The socket of a worker that serves in a thread."""
    node.file.meeting.parent.mkdir(parents=True)
    before = os.umask(0o177)
    server = _Server(node.worker, node.file.meeting)
    os.umask(before)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield node.file.meeting
    server.shutdown()
    thread.join()
    server.server_close()


def test_the_relay_passes_bytes_and_the_socket_is_private(node: Node, listening: Path) -> None:
    assert stat.S_IMODE(listening.stat().st_mode) == 0o600
    header = node.header()
    assert node.opened(asked(str(listening), node.ask(header), patience=1.0), header).examples == 3
    with pytest.raises(WorkerGone, match="the worker refused: not signed: 3 bytes that are no signed ask"):
        asked(str(listening), b"abc", patience=1.0)


def test_a_relay_that_lies_about_lengths_or_goes_away_harms_nobody(node: Node, listening: Path) -> None:
    for start in (b"\xff" * 8, b"\0" * 7, b"\0" * 7 + b"\x05ab"):
        with socket.socket(socket.AF_UNIX) as one:
            one.connect(str(listening))
            one.sendall(start)
            one.shutdown(socket.SHUT_WR)
            status, said = receive_response(one, max_bytes=1000)
            assert status == REFUSED
            assert b"bytes" in said
    with socket.socket(socket.AF_UNIX) as one:
        one.connect(str(listening))
        send(one, node.ask(node.header()))  # and does not wait
    header = node.header()
    assert node.opened(asked(str(listening), node.ask(header), patience=1.0), header).examples == 3


def test_connections_that_say_nothing_hold_nobody_up(
    node: Node, listening: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(working, "_GREETING", 30.0)
    with contextlib.ExitStack() as idle:
        for _ in range(3 * working._AT_ONCE):
            one = idle.enter_context(socket.socket(socket.AF_UNIX))
            one.connect(str(listening))
        header, began = node.header(), time.monotonic()
        assert node.opened(asked(str(listening), node.ask(header), patience=1.0), header).examples == 3
        assert time.monotonic() - began < 10.0


@pytest.mark.parametrize(("limit", "start"), [("_GREETING", b""), ("_READING", b"\0" * 6 + b"\x20\0")])
def test_a_relay_that_drips_is_cut_off_as_a_whole(
    listening: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, limit: str, start: bytes
) -> None:
    """Each byte comes in time, and a length of zeros would take 1.6 s."""
    monkeypatch.setattr(working, limit, 0.4)

    def drip(one: socket.socket) -> None:
        for _ in range(7):
            one.sendall(b"\0")
            time.sleep(0.2)

    with socket.socket(socket.AF_UNIX) as one:
        one.connect(str(listening))
        one.sendall(start)
        with pytest.raises(BrokenPipeError):
            drip(one)
    assert "bytes came within 0.4 s" in caplog.text or "timed out" in caplog.text


def test_a_defect_is_reported_without_its_text_and_the_worker_stays(
    node: Node, listening: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*args: Any, **kwargs: Any) -> Answer:
        raise RuntimeError("a row of somebody's data")

    monkeypatch.setattr(answering, "train_client", broken)
    with pytest.raises(WorkerGone, match=r"the worker failed: RuntimeError; see its log") as error:
        asked(str(listening), node.ask(node.header()), patience=1.0)
    assert "somebody" not in str(error.value)
    with socket.socket(socket.AF_UNIX) as one:
        one.connect(str(listening))
        send(one, node.ask(node.header(round=0, kind="hello", client="x", base="")))
        assert receive_response(one, max_bytes=10**6)[0] == ANSWERED


def test_an_ask_waits_for_a_worker_that_is_being_started_again(node: Node, tmp_path: Path) -> None:
    where = tmp_path / "later"
    answered: list[bytes] = []
    header = node.header()
    data = node.ask(header)
    waiting = threading.Thread(target=lambda: answered.append(asked(str(where), data, patience=20.0)))
    waiting.start()
    time.sleep(0.1)
    server = _Server(node.worker, where)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    waiting.join()
    server.shutdown()
    thread.join()
    server.server_close()
    assert node.opened(answered[0], header).examples == 3
    with pytest.raises(WorkerGone, match="does not answer") as error:
        asked(str(tmp_path / "nowhere"), data, patience=0.0)
    assert str(tmp_path) not in str(error.value)  # Flower tells it to the server


def test_a_node_with_a_budget_of_its_own_answers_private_training_only(tmp_path: Path, trained: list[Header]) -> None:
    node = Node(tmp_path, limits=Limits(epsilon=3.0, delta=1e-6))
    said = node.said(node.header())
    assert said.info["error"] == "NotPrivate"
    assert "limits.epsilon is set, and this plan has no privacy" in said.info["message"]
    scored = node.said(node.header(kind="evaluate"))
    assert scored.info["error"] == "NotPrivate"
    assert "nothing that is measured or scored" in scored.info["message"]
    privacy = Privacy(clip=1.0, noise_multiplier=5.0, sampling=1.0, expected=10.0)
    assert "error" not in node.said(node.header(), Ask(plan=replace(PLAN, privacy=privacy), settings=SETTINGS)).info
    assert len(trained) == 1
    terms = Terms(owner=node.worker.id, unit="example", epsilon=3.0, delta=1e-6)
    with Ledger.open(tmp_path / "memory" / node.worker.id / "privacy.jsonl", terms) as ledger:
        assert list(ledger.charges.values()) == [privacy.event(5)]
    greedy = replace(PLAN, privacy=replace(privacy, noise_multiplier=0.1))
    assert node.said(node.header(round=2), Ask(plan=greedy, settings=SETTINGS)).info["error"] == "BudgetSpent"
    assert len(trained) == 1
