"""The bytes in the run log are those that Flower carried: a SuperLink and two SuperNodes on loopback, without TLS.

Flower counts what each of its own calls between a SuperNode and the SuperLink carries, and keeps the sums of a run in
the SuperLink's database. A trigger there writes down every single count. Not counted by Flower: the app, which a node
fetches once, polls that bring no message, heartbeats, and what HTTP adds.
"""

from __future__ import annotations

import json
import socket
import sqlite3
import subprocess
import sys
import time
from contextlib import ExitStack, closing
from pathlib import Path

import pytest

from fedlora.report.log import read_log
from simulations.flower import FlowerSimulation

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]
ROOT = Path(__file__).resolve().parents[2]
CLIENTS = 2
SETTINGS = {
    "seed": 2,
    "method.name": "flora",
    "lora.ranks": "4,2",
    "rounds.count": 2,
    "rounds.clients": CLIENTS,
    "rounds.fraction": 0.5,  # one client in each round, since every message starts a process that imports torch
    "rounds.in_flight": 1,  # one question at a time, so that Flower's counts come in the order of the questions
    "training.local_steps": 2,
    "training.batch_size": 4,
    "training.threads": 1,
    "data.rows_per_client": 20,
    "evaluation.server": False,
    "evaluation.every": 0,  # after the last round alone
    "wire.down": "float32",
    "wire.up": "int8",
}
SAMPLED = ["client-00000", "client-00001"]  # in round 1 and 2, under this seed
ASKED = [1, 2]  # messages to each: to train, and after the last round to evaluate
ENVELOPE = 2000  # bytes, at most, that Flower adds to a question and its answer together, in either direction
VARIES = 24  # bytes by which that may differ: numbers are longer or shorter, and so is `evaluate` than `train`
HELLO = 4000  # bytes, at most, of a hello and its answer in either direction, which the log does not count
TRIGGER = """
CREATE TABLE counts (id INTEGER PRIMARY KEY, down INTEGER, up INTEGER);
CREATE TRIGGER counted AFTER UPDATE OF bytes_sent, bytes_recv ON run BEGIN
  INSERT INTO counts (down, up) VALUES (NEW.bytes_sent - OLD.bytes_sent, NEW.bytes_recv - OLD.bytes_recv);
END;
"""


class Deployment(FlowerSimulation):
    """The same app, but deployed: a SuperLink and `CLIENTS` SuperNodes, and a new process for every message."""

    def carried(self, out: Path, processes: ExitStack) -> list[tuple[int, int]]:
        """Run into `out`; (down, up) of every question with its answer, in bytes and in the order of the questions.

        `processes` outlive the call: they end with this context, and the stack then waits for them.
        """
        state = self._home / "state.db"
        with ExitStack() as held:
            sockets = [held.enter_context(socket.socket()) for _ in range(1 + CLIENTS)]
            for one in sockets:
                one.bind(("127.0.0.1", 0))
            ports = [one.getsockname()[1] for one in sockets]
        link = f"127.0.0.1:{ports[0]}"
        (self._home / "config.toml").write_text(
            f'[superlink]\ndefault = "deployed"\n[superlink.deployed]\naddress = "{link}"\ninsecure = true\n'
        )
        superlink = processes.enter_context(self._start("superlink", ports[0], "--database", str(state)))
        end = time.monotonic() + 120
        while not _listens(ports[0]):
            assert superlink.poll() is None, (self._home / f"{ports[0]}.log").read_text()
            assert time.monotonic() < end, "the SuperLink does not listen"
            time.sleep(0.2)
        with closing(sqlite3.connect(state, timeout=60)) as database:
            database.executescript(TRIGGER)
        for i, port in enumerate(ports[1:]):
            node = f"partition-id={i} num-partitions={CLIENTS} memory={json.dumps(str(self._home / 'memory'))}"
            processes.enter_context(self._start("supernode", port, "--superlink", link, "--node-config", node))
        words = " ".join(f"{key}={json.dumps(value)}" for key, value in {**SETTINGS, "out": str(out)}.items())
        said = self._call("run", str(self._app), "deployed", "--stream", "--run-config", words)
        assert (out / "adapter" / "adapter_model.safetensors").is_file(), said
        with closing(sqlite3.connect(state, timeout=60)) as database:
            counts = database.execute("SELECT down, up FROM counts ORDER BY id").fetchall()
            assert database.execute("SELECT bytes_sent, bytes_recv FROM run").fetchall() == [_sum(counts)]
        return _exchanges(counts)

    def _start(self, kind: str, port: int, *words: str) -> subprocess.Popen[bytes]:
        command = [str(Path(sys.executable).parent / f"flower-{kind}"), "--insecure", "--host", "127.0.0.1"]
        with (self._home / f"{port}.log").open("wb") as log:
            return subprocess.Popen(
                [*command, "--port", str(port), *words],
                cwd=self._home,
                env=self._environment,
                stdout=log,
                stderr=subprocess.STDOUT,
            )


def _listens(port: int) -> bool:
    with socket.socket() as one:
        return one.connect_ex(("127.0.0.1", port)) == 0


def _sum(counts: list[tuple[int, int]]) -> tuple[int, int]:
    return sum(down for down, _ in counts), sum(up for _, up in counts)


def _exchanges(counts: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """A node takes a message and brings its answer in one call each, which alone count in both directions."""
    calls = [i for i, (down, up) in enumerate(counts) if down and up]
    return [_sum(counts[i:j]) for i, j in zip(calls[::2], [*calls[2::2], len(counts)], strict=True)]


def test_logged_bytes_are_what_flower_carried(tmp_path: Path) -> None:
    """Per client, round and direction they differ by one constant per message, whatever the size of the message."""
    flower = Deployment(ROOT, tmp_path / "home")
    with ExitStack() as processes, flower:
        carried = flower.carried(tmp_path / "out", processes)
    assert len(carried) == CLIENTS + sum(ASKED)
    assert max(max(hello) for hello in carried[:CLIENTS]) < HELLO
    del carried[:CLIENTS]

    rounds = [event for event in read_log(tmp_path / "out") if event["event"] == "round"]
    assert [[client["id"] for client in event["clients"]] for event in rounds] == [[name] for name in SAMPLED]
    added: list[tuple[float, float]] = []  # by Flower to each message: down, up
    for event, count in zip(rounds, ASKED, strict=True):
        [client] = event["clients"]
        (down, up), ours = _sum(carried[:count]), (client["bytes_down"], client["bytes_up"])
        del carried[:count]
        print(f"round {event['round']}, {count} messages: Flower {down} down {up} up, log {ours}")
        added.append(((down - ours[0]) / count, (up - ours[1]) / count))
        assert (event["bytes_down"], event["bytes_up"]) == ours
    for each in zip(*added, strict=True):
        assert 0 < min(each) <= max(each) <= min(ENVELOPE, min(each) + VARIES), added
