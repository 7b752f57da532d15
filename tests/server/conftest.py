"""Clients without a model, which follow their plan honestly or misbehave on request, and a Grid that can be unkind."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, Context, Error, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.common.constant import ErrorCode
from flwr.serverapp import Grid
from flwr.supercore.task_identity import TaskIdentity

import strategies  # noqa: F401  (registers the methods)
from fedlora.code import code_digest
from fedlora.config import RunConfig, load_config
from fedlora.frame import body, message
from fedlora.report.log import read_log
from fedlora.rng import public_orthonormal, stream
from fedlora.state import Answer, Ask, GlobalState, Header, Layout, Module, part
from fedlora.wire import decode_ask, encode_answer
from server.rounds import Conductor

BASE = hashlib.sha256(b"a base").hexdigest()
LAYOUT = Layout(
    modules={
        "square": Module(out=8, inp=8),
        "tall": Module(out=9, inp=5),
        "wide": Module(out=4, inp=7, kind="conv1d"),
    },
    head={"score.weight": (3, 8), "score.bias": (3,)},
)
OTHER_LAYOUT = replace(LAYOUT, head={"score.weight": (2, 8), "score.bias": (2,)})
Twist = Callable[["Client", Header, Ask], "bytes | RecordDict"]


def follow(plan_of: Ask, header: Header) -> dict[str, np.ndarray]:
    """What an honest client answers: its start moved by noise that only its plan's seed decides."""
    plan = plan_of.plan
    assert plan is not None
    noise = stream(plan.seed, "fake-training", header.client)
    given_a, given_b, head = (part(plan_of.arrays, p) for p in ("A", "B", "head"))
    arrays: dict[str, np.ndarray] = {}
    for name, module in sorted(LAYOUT.modules.items()):
        if plan.a_from == "given":
            a = given_a[name]
        elif plan.a_from == "public":
            a = public_orthonormal(plan.a_seed, "basis", name, rows=plan.rows, cols=module.inp)
        else:
            a = noise.normal(size=(plan.rows, module.inp))
        b = given_b[name] if plan.b_from == "given" else np.zeros((module.out, plan.rows))
        for p, x in (("A", a[: plan.rank]), ("B", b[:, : plan.rank])):
            moved = x + (0.1 * noise.normal(size=x.shape) if p in plan.train else 0.0)
            if p in plan.send:
                arrays[f"{p}:{name}"] = moved - x if p in plan.changes else moved
    if "head" in plan.send:
        arrays |= {f"head:{n}": 0.1 * noise.normal(size=s) for n, s in sorted(LAYOUT.head.items())}
        if "head" not in plan.changes:
            arrays |= {f"head:{n}": arrays[f"head:{n}"] + head[n] for n in LAYOUT.head}
    return {k: np.ascontiguousarray(x, np.float32) for k, x in arrays.items()}


@dataclass
class Client:
    """One client: what it says of itself, how it misbehaves, and what it has seen."""

    index: int
    rank: int
    id: str = ""
    base: str = BASE
    layout: Any = field(default_factory=LAYOUT.to_json)
    head: dict[str, np.ndarray] = field(default_factory=dict)  # its base's own
    hello: Twist | None = None
    train: Twist | None = None
    evaluate: Twist | None = None
    rounds: set[int] | None = None  # in which it misbehaves; None: in all
    trained: int = 0
    kept: bytes = b""  # its first training answer
    down: list[tuple[int, int]] = field(default_factory=list)  # (round, bytes) of the asks it got
    up: list[tuple[int, int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.id = self.id or f"client-{self.index:05d}"

    def honest(self, header: Header, ask: Ask) -> Answer:
        if header.kind == "hello":
            info = {"id": self.id, "rank": self.rank, "base": self.base, "layout": self.layout}
            return Answer(info=info, arrays={f"head:{n}": x for n, x in self.head.items()})
        if header.kind == "evaluate":
            sums = {"correct": 3.0, "counted": 4.0, "loss": 2.0, "tokens": 8.0}
            return Answer(examples=4, metrics=sums | {"correct/dates": 3.0, "counted/dates": 4.0})
        self.trained += 1
        return Answer(examples=10 + self.index, metrics={"loss_after": 0.5, "steps": 2.0}, arrays=follow(ask, header))

    def respond(self, data: bytes) -> bytes | RecordDict:
        header, ask = decode_ask(data, max_bytes=10**8)
        self.down.append((header.round, len(data)))
        twist: Twist | None = getattr(self, header.kind)
        if twist is not None and (self.rounds is None or header.round in self.rounds):
            reply = twist(self, header, ask)
        else:
            reply = encode_answer(header, self.honest(header, ask))
        if header.kind == "train" and isinstance(reply, bytes):
            self.kept = self.kept or reply
        if isinstance(reply, bytes):
            self.up.append((header.round, len(reply)))
        return reply


def app_of(clients: Mapping[int, Client]) -> ClientApp:
    app = ClientApp()

    def reply(msg: Message, context: Context) -> Message:
        data = msg.content["fedlora"]["bytes"].numpy().tobytes()
        answer = clients[int(context.node_config["partition-id"])].respond(data)
        if isinstance(answer, bytes):
            answer = RecordDict({"fedlora": ArrayRecord({"bytes": Array(np.frombuffer(answer, np.uint8))})})
        return Message(answer, reply_to=msg)

    app.query()(reply)
    app.train()(reply)
    app.evaluate()(reply)
    return app


class FakeGrid(Grid):
    """`nodes` maps node id to client index. Answers in a shuffled order; some are silent, lost or answer twice."""

    def __init__(self, clients: Mapping[int, Client], nodes: Mapping[int, int] | None = None, *, shuffle: int = 0):
        TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 1
        self.clients = clients
        self.app = app_of(clients)
        self.nodes = dict(nodes or {1000 + i: i for i in clients})
        self.silent: set[int] = set()  # client indices, from here on
        self.lost: set[int] = set()
        self.twice: set[int] = set()
        self.waiting: dict[str, Message] = {}
        self.again: list[Message] = []
        self.alive = 0  # the most messages ever out at once
        self.pulls = 0
        self._numbers = itertools.count(1)
        self._rng = np.random.default_rng(shuffle)

    def set_run(self, run: Any) -> None:
        raise NotImplementedError

    @property
    def run(self) -> Any:
        raise NotImplementedError

    def create_message(self, *args: Any, **kwargs: Any) -> Message:
        raise NotImplementedError

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        raise NotImplementedError

    def get_node_ids(self) -> list[int]:
        return list(self.nodes)

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        ids = []
        for msg in messages:
            assert msg.metadata.dst_node_id in self.nodes
            number = f"message-{next(self._numbers)}"
            msg.metadata.__dict__["_message_id"] = number
            self.waiting[number] = msg
            ids.append(number)
        self.alive = max(self.alive, len(self.waiting))
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        self.pulls += 1
        if self.again:
            return [self.again.pop()]
        if self.pulls % 3:  # answers come now and then, so several are waiting
            return []
        ready = [n for n in sorted(set(message_ids)) if n in self.waiting and self._who(n) not in self.silent]
        if not ready:
            return []
        number = ready[int(self._rng.integers(len(ready)))]
        index = self._who(number)
        msg = self.waiting.pop(number)
        if index in self.lost:
            error = Message(Error(code=ErrorCode.NODE_UNAVAILABLE, reason="the node is gone"), reply_to=msg)
            error.metadata.__dict__["_src_node_id"] = 1  # as the SuperLink does
            return [error]
        context = Context(
            run_id=1,
            node_id=msg.metadata.dst_node_id,
            node_config={"partition-id": index},
            state=RecordDict(),
            run_config={},
        )
        try:
            reply = self.app(msg, context)
        except Exception as error:
            return [Message(Error(code=ErrorCode.CLIENT_APP_RAISED_EXCEPTION, reason=repr(error)), reply_to=msg)]
        if index in self.twice:
            self.again.append(reply)
        return [reply]

    def _who(self, number: str) -> int:
        return self.nodes[self.waiting[number].metadata.dst_node_id]


# ---- how a client can misbehave --------------------------------------------------------------------------------------


def changed(edit: Callable[[dict[str, np.ndarray]], None]) -> Twist:
    """Honest but for `edit` of its arrays."""

    def twist(client: Client, header: Header, ask: Ask) -> bytes:
        answer = client.honest(header, ask)
        arrays = {k: x.copy() for k, x in answer.arrays.items()}
        edit(arrays)
        return encode_answer(header, replace(answer, arrays=arrays))

    return twist


def restated(**fields: Any) -> Twist:
    """Honest but for `fields` of its answer, such as the example count."""
    return lambda client, header, ask: encode_answer(header, replace(client.honest(header, ask), **fields))


def headed(**fields: Any) -> Twist:
    """Honest but for `fields` of the header that it echoes."""
    return lambda client, header, ask: encode_answer(replace(header, **fields), client.honest(header, ask))


def failing(client: Client, header: Header, ask: Ask) -> bytes:
    raise ValueError("\x1b[31mthe disk is on fire")


def complaining(client: Client, header: Header, ask: Ask) -> bytes:
    info = {"error": "TrainingError", "message": "the loss is not finite\x1b[2J"}
    return encode_answer(replace(header, kind="error"), Answer(info=info))


def in_float64(client: Client, header: Header, ask: Ask) -> bytes:
    answer = client.honest(header, ask)
    own = body({f"array/{k}": x.astype(np.float64) for k, x in answer.arrays.items()})
    values = {
        "header": vars(header),
        "examples": answer.examples,
        "metrics": {},
        "info": {},
        "codec": "float32",
        "packed": [{}],
    }
    return message("answer", values, [(own, own.entry())])


def torn(client: Client, header: Header, ask: Ask) -> bytes:
    return encode_answer(header, client.honest(header, ask))[:-5]


def not_ours(client: Client, header: Header, ask: Ask) -> RecordDict:
    return RecordDict({"metrics": MetricRecord({"num-examples": 3})})


def replayed(client: Client, header: Header, ask: Ask) -> bytes:
    return client.kept


def enlarged(client: Client, header: Header, ask: Ask) -> bytes:
    return encode_answer(header, client.honest(header, ask)) + b"\0" * 300_000


# ---- a run -----------------------------------------------------------------------------------------------------------


@dataclass
class Lab:
    """Clients, a Grid and a folder; `conduct` runs them, as often as one likes."""

    folder: Path
    ranks: tuple[int, ...] = (4, 3, 2, 2, 1)
    clients: dict[int, Client] = field(default_factory=dict)
    notes: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.clients = self.clients or {i: Client(i, r) for i, r in enumerate(self.ranks)}
        self.grid = FakeGrid(self.clients)

    def config(self, *sets: str) -> RunConfig:
        usual = ["rounds.count=2", "lora.alpha=4", "method.name=fedit", "rounds.deadline=5", "evaluation.every=0"]
        keep = {f"rounds.clients={len(self.clients)}"} if not any(s.startswith("rounds.clients=") for s in sets) else ()
        return load_config(None, [*usual, *keep, *sets])

    def conduct(self, *sets: str, stop: Callable[[dict[str, Any]], None] | None = None, **kwargs: Any) -> GlobalState:
        def hear(event: dict[str, Any]) -> None:
            self.notes.append(event)
            if stop is not None:
                stop(event)

        self.folder.mkdir(parents=True, exist_ok=True)
        kwargs = {"evaluator": None} | kwargs
        return Conductor(self.grid, self.config(*sets), self.folder, run="run-1", notify=hear, **kwargs).conduct()

    @property
    def rounds(self) -> list[dict[str, Any]]:
        return [e for e in read_log(self.folder) if e["event"] == "round"]

    def refusals(self, number: int = 1) -> list[tuple[str, str, str]]:
        event = next(e for e in self.rounds if e["round"] == number)
        return [(r["client"], r["rule"], r["detail"]) for r in event["refused"]]


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.exchange._FIRST_PAUSE", 0.0002)
    monkeypatch.setattr("server.exchange._LONGEST_PAUSE", 0.0005)
    monkeypatch.setattr("server.roster._PAUSE", 0.001)
    monkeypatch.setattr("os.fsync", lambda descriptor: None)  # the disk is the slowest part of these tests


@pytest.fixture
def lab(tmp_path: Path) -> Callable[..., Lab]:
    """Makes labs in folders of their own."""
    numbers = itertools.count()
    return lambda *args, **kwargs: Lab(tmp_path / f"run-{next(numbers)}", *args, **kwargs)


@pytest.fixture(scope="session")
def fakes() -> Any:
    """This module: with `--import-mode=importlib` a conftest cannot be imported by name."""
    import sys

    return sys.modules[__name__]


__all__ = ["BASE", "LAYOUT", "OTHER_LAYOUT", "Client", "FakeGrid", "Lab", "code_digest"]
