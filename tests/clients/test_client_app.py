"""The ClientApp around a trainer that only counts: what it answers, what it refuses, what it does not do twice."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MessageType, RecordDict

from clients import answer as answering
from clients import app as client
from fedlora.code import code_digest
from fedlora.config import flat, load_config
from fedlora.errors import CheckpointError, TrainingError
from fedlora.state import Answer, Ask, Header, Layout, LocalTraining, Measure, Module, TrainPlan
from fedlora.wire import decode_answer, encode_ask
from simulations.engine import LocalGrid

BASE = "b" * 64
LAYOUT = Layout(modules={"q": Module(out=4, inp=4)})
TRAINING = LocalTraining(learning_rate=1e-3, local_steps=1, local_epochs=None, batch_size=1)
PLAN = TrainPlan(method="flora", rank=1, rows=1, scale=1.0, train=("A",), send=(), training=TRAINING)
ASK = Header(run="run", round=1, client="client-00001", kind="train", base=BASE, version=0, code=code_digest())


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[Header]:
    """The headers of the asks that were trained on."""
    seen: list[Header] = []

    def train(base: Any, header: Header, ask: Ask, rows: Any, **kwargs: Any) -> Answer:
        seen.append(header)
        return Answer(examples=3, metrics={"seconds": float(len(seen))})

    monkeypatch.setattr(
        client, "resident_base", lambda model: SimpleNamespace(fingerprint=BASE, layout=LAYOUT, initial_head={})
    )
    monkeypatch.setattr(client, "encoded", lambda config, index, task="", again=True: ([], []))
    monkeypatch.setattr(answering, "train_client", train)
    monkeypatch.setattr(answering, "attach", lambda *args: None)
    return seen


def grid_in(memory: Path | None) -> LocalGrid:
    config = load_config(None, ["rounds.clients=3", "lora.ranks=3,2,1"])
    return LocalGrid(client.app, clients=3, run_config=flat(config), memory=memory)


def ask(
    grid: LocalGrid, header: Header, *, node: int = 1001, plan: TrainPlan | None = PLAN
) -> tuple[Header, Answer, bytes]:
    kinds = {"hello": MessageType.QUERY, "train": MessageType.TRAIN, "evaluate": MessageType.EVALUATE}
    array = Array(np.frombuffer(encode_ask(header, Ask(plan=plan)), np.uint8))
    record = RecordDict({"fedlora": ArrayRecord({"bytes": array})})
    [reply] = grid.send_and_receive([Message(record, node, kinds[header.kind])])
    assert not reply.has_error(), reply.error.reason
    data = reply.content["fedlora"]["bytes"].numpy().tobytes()  # type: ignore[index,union-attr]
    return *decode_answer(data, max_bytes=10**6), data


def test_a_hello_says_who_it_is(trained: list[Header]) -> None:
    hello = Header(run="run", round=0, client="node 1001", kind="hello", code=code_digest())
    header, answer, _ = ask(grid_in(None), hello, plan=None)
    assert header == hello
    assert answer.info == {
        "id": "client-00001",
        "rank": 2,
        "base": BASE,
        "layout": LAYOUT.to_json(),
        "keeps": False,
        "key": "",
    }


def test_rows_of_old_tasks_are_trained_on_and_not_measured(
    trained: list[Header], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = {True: ["own", "own", "old"], False: ["own", "own"]}
    monkeypatch.setattr(client, "encoded", lambda config, index, task="", again=True: (rows[again], []))
    monkeypatch.setattr(answering, "measure", lambda base, header, ask, rows, batch_size: Answer(examples=len(rows)))
    asked = encode_ask(replace(ASK, kind="measure"), Ask(measure=Measure(sketch=1)))
    record = RecordDict({"fedlora": ArrayRecord({"bytes": Array(np.frombuffer(asked, np.uint8))})})
    [reply] = grid_in(None).send_and_receive([Message(record, 1001, MessageType.QUERY)])
    data = reply.content["fedlora"]["bytes"].numpy().tobytes()  # type: ignore[index,union-attr]
    assert decode_answer(data, max_bytes=10**6)[1].examples == 2


def test_the_same_ask_is_not_trained_twice(trained: list[Header], tmp_path: Path) -> None:
    first = ask(grid_in(tmp_path), ASK)[2]
    assert ask(grid_in(tmp_path), ASK)[2] == first  # another process, the same folder
    assert len(trained) == 1
    for other in (replace(ASK, attempt=1), replace(ASK, round=2), replace(ASK, run="run-2")):
        assert ask(grid_in(tmp_path), other)[2] != first
    assert len(trained) == 4


def test_an_evaluation_in_between_does_not_push_the_answer_out(trained: list[Header], tmp_path: Path) -> None:
    first = ask(grid_in(tmp_path), ASK)[2]
    assert ask(grid_in(tmp_path), replace(ASK, kind="evaluate"), plan=None)[1] == Answer()
    assert ask(grid_in(tmp_path), ASK)[2] == first
    assert len(trained) == 1


def test_without_a_memory_it_trains_each_time(trained: list[Header]) -> None:
    ask(grid_in(None), ASK)
    ask(grid_in(None), ASK)
    assert len(trained) == 2


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"code": "0" * 64}, "CodeMismatch", "the server runs fedlora code 000000000000 and this client runs"),
        ({"client": "client-00002"}, "FedLoRAError", "this is client-00001, but the ask is for client-00002"),
        (
            {"base": "c" * 64},
            "BaseMismatch",
            "client client-00001: its base is bbbbbbbbbbbb, the run's is cccccccccccc",
        ),
    ],
)
def test_a_refusal_travels_back_with_its_reason(
    trained: list[Header], tmp_path: Path, change: dict[str, str], error: str, message: str
) -> None:
    header, answer, _ = ask(grid_in(tmp_path), replace(ASK, **change))
    assert header == replace(ASK, **change, kind="error")
    assert answer.info["error"] == error
    assert message in answer.info["message"]
    assert trained == []
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("error", [TrainingError("the loss is nan"), CheckpointError("no space")])
def test_what_training_refuses_travels_back_and_is_not_kept(
    trained: list[Header], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def stop(*args: Any, **kwargs: Any) -> Answer:
        raise error

    monkeypatch.setattr(answering, "train_client", stop)
    header, answer, _ = ask(grid_in(tmp_path), ASK)
    assert (header.kind, answer.info) == ("error", {"error": type(error).__name__, "message": str(error)})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("content", [RecordDict(), RecordDict({"fedlora": ConfigRecord({"bytes": b"x"})})])
def test_a_message_that_is_not_ours_is_refused(trained: list[Header], content: RecordDict) -> None:
    [reply] = grid_in(None).send_and_receive([Message(content, 1000, MessageType.TRAIN)])
    assert "WireError: not a fedlora message: expected one array `bytes`" in reply.error.reason


@pytest.mark.parametrize("fields", [{"top": 1, "feedback": "product"}, {"codec": "int8"}, {"codec": "bfloat16"}])
def test_nothing_is_left_out_where_nothing_can_be_remembered(trained: list[Header], fields: dict[str, Any]) -> None:
    header, answer, _ = ask(grid_in(None), ASK, plan=replace(PLAN, **fields))
    assert header.kind == "error"
    assert answer.info["error"] == "TrainingError"
    assert "need a memory folder" in answer.info["message"]
