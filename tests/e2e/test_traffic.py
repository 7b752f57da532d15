"""What a run logs as its bytes is what Flower counted between a SuperLink and two SuperNodes: real processes."""

from __future__ import annotations

from itertools import groupby
from pathlib import Path

import pytest
from flwr.app import Context, RecordDict

from clients.app import respond
from fedlora.code import code_digest
from fedlora.config import load_config
from fedlora.report.log import read_log
from fedlora.state import Ask, Header
from fedlora.wire import encode_ask
from simulations.deployed import FlowerDeployment

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]
ROOT = Path(__file__).resolve().parents[2]
CLIENTS, ROUNDS = 2, 2
SMALL = [
    f"rounds.count={ROUNDS}",
    f"rounds.clients={CLIENTS}",
    "rounds.in_flight=1",  # so that Flower's counts come message by message
    "lora.ranks=4,2",
    "training.local_steps=2",
    "training.batch_size=4",
    "training.threads=1",
    "data.rows_per_client=20",
    "evaluation.server=false",
]
ENVELOPE = 2000  # bytes that Flower may add to a message, at most
VARIES = 24  # bytes: by how much what it adds may differ from one message to the next
RECEIPT = 600  # bytes, at most, that go the other way with a message: the request for it, or the thanks


@pytest.mark.parametrize("codec", ["float32", "int8"])
def test_logged_bytes_are_what_flower_carried(codec: str, tmp_path: Path) -> None:
    """Per client, round and direction the log and Flower differ by a constant per message, whatever its size."""
    config = load_config(None, [*SMALL, "method.name=flora", f"wire.up={codec}", f"wire.down={codec}"])
    with FlowerDeployment(ROOT, tmp_path / "home", nodes=CLIENTS) as flower:
        status, log = flower.run(config, tmp_path / "out", deadline=280)
        assert status == "finished:completed", log
        traffic = flower.traffic
    assert (traffic.down, traffic.up) == tuple(map(sum, zip(*traffic.steps, strict=True)))

    messages = [(down, list(steps)) for down, steps in groupby(traffic.steps, key=lambda step: step[0] > step[1])]
    assert [down for down, _ in messages] == [True, False] * CLIENTS * (1 + 2 * ROUNDS)
    asks = [sum(down for down, _ in steps) for is_ask, steps in messages if is_ask]
    answers = [sum(up for _, up in steps) for is_ask, steps in messages if not is_ask]

    header = Header(run="0" * 16, round=0, client=f"node {2**63}", kind="hello", code=code_digest())
    context = Context(
        run_id=1,
        node_id=1,
        node_config={"partition-id": 0, "num-partitions": CLIENTS, "memory": str(tmp_path)},
        state=RecordDict(),
        run_config={},
    )
    hello = len(encode_ask(header, Ask())), len(respond(config, header, Ask(), b"", context))
    added_down = [asks.pop(0) - hello[0] for _ in range(CLIENTS)]  # the log does not count the hellos
    added_up = [answers.pop(0) - hello[1] for _ in range(CLIENTS)]

    logged = [e for e in read_log(tmp_path / "out") if e["event"] == "round"]
    for event in logged:
        assert [c["id"] for c in event["clients"]] == ["client-00000", "client-00001"]
        for i, client in enumerate(event["clients"]):
            added_down.append((asks[i] + asks[CLIENTS + i] - client["bytes_down"]) / 2)  # training and evaluation
            added_up.append((answers[i] + answers[CLIENTS + i] - client["bytes_up"]) / 2)
        del asks[: 2 * CLIENTS], answers[: 2 * CLIENTS]
    print(
        codec,
        "added to asks",
        added_down,
        "to answers",
        added_up,
        traffic.down,
        traffic.up,
        hello,
        [(e["bytes_down"], e["bytes_up"], [(c["bytes_down"], c["bytes_up"]) for c in e["clients"]]) for e in logged],
    )
    for added in (added_down, added_up):
        assert 0 < min(added) <= max(added) < ENVELOPE
        assert max(added) - min(added) <= VARIES

    count = CLIENTS * (1 + 2 * ROUNDS)
    for carried, key, greeting in ((traffic.down, "bytes_down", hello[0]), (traffic.up, "bytes_up", hello[1])):
        ours = sum(e[key] for e in logged) + CLIENTS * greeting
        assert 0 < carried - ours < count * (ENVELOPE + RECEIPT)
    for event in logged:
        for key in ("bytes_down", "bytes_up"):
            assert event[key] == sum(client[key] for client in event["clients"])
