"""Seconds of a round, deployed, against what Flower itself takes: with the resident worker, and without.

python -m simulations.benchmarks.floor FOLDER          (from a checkout; a new folder with a short path; Linux)

Two nodes on loopback in the same closed deployment (TLS, node authentication, separate executors), one after another:

- Flower alone: an app whose nodes send back the 16 bytes that they got, over Flower's own `send_and_receive`;
- the same, over `server.exchange`, which looks for answers more often than that;
- fedlora with its resident worker: one step on the embedded base, no evaluation;
- the same training by `clients.app`: every message starts a process that imports torch and loads the base.

Each has one round more at the start, and those that train one at the end, which evaluates; neither is counted. CPU
seconds are those of all processes of the deployment, server and nodes, looked at twice a second. Where other work runs
on the machine, the seconds say little, and ratios and CPU seconds more.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import secrets
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from fedlora.processes import flower_environment, program_path
from fedlora.report.log import read_log
from server.serve import CONNECTION, Serving
from simulations.benchmarks.deployment import OWN, ROOT, TINY, Deployment
from simulations.benchmarks.load import Watched

__all__ = ["Measured", "main", "per_round", "table"]

NODES: Final = {"a": 4, "b": 2}  # name -> rank
PATIENCE: Final = 600.0  # seconds for the start, and for each round
WAYS: Final = ("flower", "exchange")
ECHOED: Final = "echo.jsonl"
BUNDLE: Final = {
    "pyproject.toml": """\
[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"

[project]
name = "echo"
version = "1.0.0"
description = "sends back what it got"
license = "Apache-2.0"
dependencies = []

[tool.hatch.build.targets.wheel]
packages = ["echo"]

[tool.flwr.app]
publisher = "fedlora"
fab-include = ["echo/*.py"]

[tool.flwr.app.components]
serverapp = "echo.server:app"
clientapp = "echo.client:app"

[tool.flwr.app.config]
rounds = 5
nodes = 2
out = ""
""",
    "echo/__init__.py": '"""An app that does nothing."""\n',
    "echo/client.py": """\
from flwr.app import Message
from flwr.clientapp import ClientApp

app = ClientApp()


@app.train()
def train(message, context):
    return Message(message.content, reply_to=message)
""",
    "echo/server.py": """\
import json
import time
from pathlib import Path

from flwr.app import Message, MessageType
from flwr.serverapp import ServerApp

from server.exchange import Asked, Failure, exchange, pack

app = ServerApp()
TRAIN = {"message_type": MessageType.TRAIN, "group": "1", "deadline": 600.0, "in_flight": 64}


@app.main()
def main(grid, context):
    given = context.run_config
    while len(nodes := list(grid.get_node_ids())) < given["nodes"]:
        time.sleep(0.2)
    for way in ("flower", "exchange"):
        for _ in range(given["rounds"]):
            began = time.monotonic()
            if way == "flower":
                messages = [Message(pack(bytes(16)), node, MessageType.TRAIN) for node in nodes]
                failed = [reply.has_error() for reply in grid.send_and_receive(messages, timeout=600.0)]
            else:
                asked = [Asked(str(node), node, lambda: bytes(16)) for node in nodes]
                failed = [isinstance(said, Failure) for _, said, _ in exchange(grid, asked, **TRAIN)]
            answers = len(failed) - sum(failed)
            line = {"way": way, "seconds": time.monotonic() - began, "answers": answers}
            with Path(given["out"]).open("a") as file:
                file.write(json.dumps(line) + "\\n")
""",
}


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One way: seconds and CPU seconds of each round that counts, answers that were lost, load average at its end."""

    what: str
    seconds: Sequence[float]
    cpu: Sequence[float]
    lost: int
    load: float


class Served(Serving):
    """A server whose run is another app."""

    app: Path
    words: Sequence[str]

    def _submit(self) -> None:
        self._run = int(self._flower("run", str(self.app), CONNECTION, *self.words)["run-id"])


def per_round(totals: Sequence[float]) -> list[float]:
    """What came with each round, of totals at the end of each; what came with the first is unknown."""
    return [after - before for before, after in itertools.pairwise(totals)]


def watched(whole: Deployment, rounds: Callable[[], int], wanted: int) -> list[float]:
    """CPU seconds so far at the end of each round, until there are so many. Raises: TooLate."""
    seen, totals = Watched(), list[float]()

    def ended() -> bool:
        seen.look()
        totals.extend([seen.cpu()] * (rounds() - len(totals)))
        return len(totals) >= wanted

    whole.wait(f"{wanted} rounds", ended, seconds=PATIENCE * (1 + wanted))
    return totals


def deployed(folder: Path, settings: dict[str, object]) -> Deployment:
    """A deployment in a new folder, ready to start."""
    whole = Deployment(folder, NODES, settings)
    whole.make()
    return whole


def served(whole: Deployment, app: Path, config: dict[str, object]) -> Served:
    """A server of `whole` with another app and its settings, started; the run is submitted."""
    serving = Served(whole.deploy, whole.folder / "deploy.toml", notify=lambda event: None)
    serving.app, serving.words = (
        app,
        ["--run-config", " ".join(f"{key}={json.dumps(value)}" for key, value in config.items())],
    )
    try:
        serving.check()
        serving.start()
    except BaseException:
        serving.stop()
        raise
    return serving


def echoed(folder: Path, count: int) -> list[Measured]:
    """Flower alone, both ways."""
    whole, out = deployed(folder, {}), folder / ECHOED
    for name, text in BUNDLE.items():
        path = folder / "app" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    out.touch()
    with whole:
        serving = served(whole, folder / "app", {"rounds": count + 1, "nodes": len(NODES), "out": str(out)})
        try:
            for name in NODES:
                whole.start_node(name, part="relay")
            cpu = per_round(watched(whole, lambda: out.read_text().count("\n"), len(WAYS) * (count + 1)))
        finally:
            serving.stop()
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    found = []
    for number, (way, what) in enumerate(zip(WAYS, ("Flower alone", "Flower alone, `server.exchange`"), strict=True)):
        first = number * (count + 1)
        mine = lines[first + 1 : first + 1 + count]
        assert all(line["way"] == way for line in mine)
        found.append(
            Measured(
                what=what,
                seconds=[line["seconds"] for line in mine],
                cpu=cpu[first : first + count],
                lost=sum(len(NODES) - line["answers"] for line in mine),
                load=os.getloadavg()[0],
            )
        )
    return found


def resident(folder: Path, count: int) -> Measured:
    """fedlora as it is deployed."""
    whole = deployed(folder, {"rounds.count": count + 2})
    with whole:
        whole.start_server()
        for name in NODES:
            whole.start_node(name)
        cpu = watched(whole, lambda: _rounds(whole.folder / "run"), count + 1)
        whole.wait_for_end("server", seconds=PATIENCE)
    return trained("fedlora, resident worker", whole.folder / "run", cpu)


def reloaded(folder: Path, count: int) -> Measured:
    """The same training, a new process with torch and the base for every message."""
    whole, out = deployed(folder, {}), folder / "out"
    ranks = ",".join(map(str, NODES.values()))
    own = {**OWN, **TINY, "lora.ranks": ranks, "rounds.count": count + 2, "rounds.clients": len(NODES)}
    with whole:
        serving = served(whole, ROOT, {**own, "out": str(out)})
        try:
            for part, name in enumerate(NODES):
                _start_node(whole, name, f'partition-id={part} num-partitions={len(NODES)} memory="{folder}/{name}"')
            cpu = watched(whole, lambda: _rounds(out), count + 2)
        finally:
            serving.stop()
    return trained("fedlora, a process and a base for each message", out, cpu[: count + 1])


def trained(what: str, run: Path, cpu: Sequence[float]) -> Measured:
    """The rounds of a run but the first, which reads data, and the last, which evaluates."""
    rounds = [event for event in read_log(run) if event["event"] == "round"][1:-1]
    return Measured(
        what=what,
        seconds=[event["seconds"] for event in rounds],
        cpu=per_round(cpu),
        lost=sum(len(NODES) - len(event["clients"]) for event in rounds),
        load=os.getloadavg()[0],
    )


def _rounds(run: Path) -> int:
    if not (run / "metrics.jsonl").exists():
        return 0
    return sum(event["event"] == "round" for event in read_log(run))


def _start_node(whole: Deployment, name: str, config: str) -> None:
    """Flower's SuperNode and executor of a node as `clients.node` starts them, with other words for the ClientApp."""
    node = whole.node(name)
    (node.state / "flower").mkdir(mode=0o700, parents=True, exist_ok=True)
    secret = node.state / "executor.secret"
    with open(secret, "xb", opener=lambda path, flags: os.open(path, flags, 0o600)) as file:
        file.write(secrets.token_bytes(32))
    own = {**flower_environment(node.state / "flower"), "PYTHONPATH": ""}
    shared = ["--superexec-auth-secret-file", str(secret)]
    supernode = ["--root-certificates", str(node.keys / "ca.pem"), "--superlink", node.server]
    supernode += ["--auth-supernode-private-key", str(node.keys / "auth.key"), "--host", "127.0.0.1"]
    supernode += ["--port", str(node.port), "--node-config", config, "--isolation", "process"]
    whole.start(f"{name}-supernode", [program_path("flower-supernode"), *supernode, *shared], environment=own)
    executor = ["--insecure", "--runtime-api-address", f"127.0.0.1:{node.port}"]
    whole.start(f"{name}-executor", [program_path("flower-superexec"), *executor, *shared], environment=own)


def table(rows: Sequence[Measured]) -> str:
    """Medians and ratios to the first row and to the second, as Markdown."""
    lines = [
        "| way | rounds | s a round: median (least to most) | to Flower's | to Flower's, same polling "
        "| CPU s a round: median | to Flower's | answers lost | load average |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    first, second = (statistics.median(row.seconds) for row in rows[:2])
    least = statistics.median(rows[0].cpu)
    for row in rows:
        seconds, cpu = statistics.median(row.seconds), statistics.median(row.cpu)
        lines.append(
            f"| {row.what} | {len(row.seconds)} | {seconds:.1f} ({min(row.seconds):.1f} to {max(row.seconds):.1f}) "
            f"| {seconds / first:.2f} | {seconds / second:.2f} | {cpu:.1f} | {cpu / least:.2f} | {row.lost} "
            f"| {row.load:.1f} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Run all ways and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rounds", type=int, default=5, help="of each way that count")
    given = parser.parse_args()
    folder = given.folder.resolve()
    rows = [*echoed(folder / "a", given.rounds), resident(folder / "b", given.rounds)]
    rows.append(reloaded(folder / "c", given.rounds))
    print(table(rows))
    print(f"\n{os.cpu_count()} cores, {len(NODES)} nodes.")
    if any(row.lost for row in rows):
        sys.exit(1)


if __name__ == "__main__":
    main()
