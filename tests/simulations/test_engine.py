"""The Grid in this process behaves as Flower's: one answer a pull, errors as replies, nothing lost."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from flwr.app import ConfigRecord, Context, Message, MessageType, RecordDict
from flwr.clientapp import ClientApp
from flwr.common.constant import ErrorCode

from simulations.engine import LocalGrid


@pytest.fixture
def seen() -> list[Context]:
    return []


@pytest.fixture
def app(seen: list[Context]) -> ClientApp:
    made = ClientApp()

    @made.train()
    def train(message: Message, context: Context) -> Message:
        seen.append(context)
        if context.node_config["partition-id"] == 2:
            raise ValueError("no such luck")
        if context.node_config["partition-id"] == 3:
            raise KeyboardInterrupt
        return Message(RecordDict({"who": ConfigRecord({"node": context.node_id})}), reply_to=message)

    return made


def messages(*nodes: int) -> list[Message]:
    return [Message(RecordDict(), node, MessageType.TRAIN) for node in nodes]


def grid_of(app: ClientApp, **kwargs: Any) -> LocalGrid:
    return LocalGrid(app, clients=5, run_config={"seed": 3}, **kwargs)


def test_one_message_is_answered_at_each_pull(app: ClientApp, seen: list[Context]) -> None:
    grid = grid_of(app)
    assert grid.get_node_ids() == [1000, 1001, 1002, 1003, 1004]
    ids = grid.push_messages(messages(1004, 1000, 1001))
    assert len(set(ids)) == 3
    assert seen == []  # nothing is trained when it is sent
    order = []
    for done in (1, 2, 3):
        [reply] = grid.pull_messages(reversed(ids))
        assert len(seen) == done
        order.append((reply.metadata.reply_to_message_id, reply.content["who"]["node"]))  # type: ignore[index]
    assert order == list(zip(ids, (1004, 1000, 1001), strict=True))
    assert grid.pull_messages(ids) == []


def test_only_what_was_asked_for_is_answered(app: ClientApp) -> None:
    grid = grid_of(app)
    first, second = grid.push_messages(messages(1000, 1001))
    assert grid.pull_messages(["999"]) == []
    assert [r.metadata.reply_to_message_id for r in grid.pull_messages([second])] == [second]
    assert [r.metadata.reply_to_message_id for r in grid.pull_messages([first, second])] == [first]


def test_a_client_gets_its_node_config_and_the_settings(app: ClientApp, seen: list[Context], tmp_path: Path) -> None:
    grid_of(app, memory=tmp_path).send_and_receive(messages(1001))
    grid_of(app).send_and_receive(messages(1001))
    assert seen[0].node_config == {"partition-id": 1, "num-partitions": 5, "memory": str(tmp_path)}
    assert seen[1].node_config == {"partition-id": 1, "num-partitions": 5}
    assert seen[0].run_config == {"seed": 3}


def test_an_exception_is_an_error_reply_and_the_rest_goes_on(app: ClientApp) -> None:
    replies = grid_of(app).send_and_receive(messages(1000, 1002, 1001))
    assert [r.has_error() for r in replies] == [False, True, False]
    assert replies[1].error.code == ErrorCode.CLIENT_APP_RAISED_EXCEPTION
    assert "ValueError: no such luck" in replies[1].error.reason
    assert replies[1].metadata.src_node_id == 1002


def test_an_interruption_is_not_swallowed(app: ClientApp) -> None:
    with pytest.raises(KeyboardInterrupt):
        grid_of(app).send_and_receive(messages(1003))


def test_a_reply_after_the_time_to_live_is_still_a_reply(app: ClientApp) -> None:
    grid = grid_of(app)
    late = Message(RecordDict(), 1000, MessageType.TRAIN, ttl=1e-9)
    assert not grid.send_and_receive([late])[0].has_error()


def test_the_exchange_holds_one_payload_in_this_engine(app: ClientApp) -> None:
    from server.exchange import Asked, exchange

    made, held = [0], []

    def payload() -> bytes:
        made[0] += 1
        return b"x"

    asked = [Asked(f"c{i}", 1000 + i % 2, payload) for i in range(6)]
    for done, _ in enumerate(
        exchange(grid_of(app), asked, message_type=MessageType.TRAIN, group="1", deadline=9, in_flight=64)
    ):
        held.append(made[0] - done)
    assert held == [1] * 6
