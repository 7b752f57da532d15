"""One hostile node against a running server: what it sends in each round, and what comes of it.

python -m simulations.benchmarks.hostile FOLDER               (from a checkout; about half a minute a row)

A server, two honest nodes and one hostile one, as real processes over TLS. The hostile node is enrolled and holds its
real keys; in place of its worker runs this program, which answers the hello honestly and in every round sends one thing
of `ROWS`. Its SuperNode also sends one answer twice. The quorum is two of three, nobody is quarantined, the robust rule
is `screen`. The same run is then conducted in one process without Flower, with the hostile node silent wherever its
answer should be refused: a state is intact if the digests of both runs are equal. Exit status 1 if any row fails.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import psutil

from clients.worker import Worker, _Server
from fedlora.deploy import NodeFile, read_node
from fedlora.envelope import ANSWER_OVERHEAD, open_ask
from fedlora.processes import private_folder
from fedlora.report.log import read_log
from fedlora.wire import decode_answer, decode_ask
from server.deployed import CONDUCTOR
from simulations.benchmarks.deployment import Deployment, undisturbed
from simulations.benchmarks.hostile_rows import DEADLINE, MAX_BYTES, ROWS, TOUCHED, WHERE, Case, Row

HOSTILE, OTHER = "h", "b"
NODES: Final[Mapping[str, int]] = {"a": 4, OTHER: 2, HOSTILE: 2}  # name -> rank
PAUSED: Final = 3  # exit status of a server whose run can be gone on with
PAUSES: Final = 5  # on a busy machine Flower loses messages whose ClientApp does not start within 30 seconds

__all__ = ["Hostile", "chosen", "deployed", "expected", "judged", "main", "worker"]

SETTINGS: Final[Mapping[str, object]] = {
    "rounds.quorum": 0.6,  # two of three
    "rounds.quarantine": 0,
    "rounds.deadline": DEADLINE,
    "wire.max_bytes": MAX_BYTES,
    "robust.rule": "screen",
}
SEND_TWICE: Final = """\
import sys

if any(word.endswith("flower-supernode") for word in sys.orig_argv):
    import flwr.supernode.start_client_internal as internal

    push = internal._push_messages

    def twice(state, object_store, send, push_object):
        def again(message, tree, seconds):
            first = send(message, tree, seconds)
            if message.metadata.group_id == "ROUND":
                try:
                    print("sent again:", send(message, tree, seconds), flush=True)
                except Exception as error:
                    print("sent again, refused:", repr(error), flush=True)
            return first

        push(state, object_store, again, push_object)

    internal._push_messages = twice
"""  # Flower's SuperNode of the hostile node, which sends its answer of one round twice


class Hostile(Worker):
    """The worker of the hostile node: honest, but to `train` it answers what its row says for that round."""

    def __init__(self, node: NodeFile, other: Path, rows: Sequence[Row]) -> None:
        super().__init__(node)
        self._other = other
        self._rows = rows
        self._kept: dict[int, bytes] = {}

    def answered(self, data: bytes) -> bytes:
        case = self.case(data)
        return self.honest if case is None else self._rows[case.header.round - 1].make(case)

    def case(self, data: bytes) -> Case | None:
        """What is needed to forge an answer to this ask; None if it is not to train. `honest` is the honest answer."""
        self.honest = super().answered(data)
        ask = open_ask(data, self._operator, max_bytes=self.max_bytes)
        header, decoded = decode_ask(ask.payload, max_bytes=self.max_bytes)
        if header.kind != "train":
            return None
        said, answer = decode_answer(self.honest[ANSWER_OVERHEAD:], max_bytes=self.max_bytes)
        if said.kind != "train":  # it lost its blocks, says so, and is asked again
            return None
        self._kept[header.round] = self.honest
        return Case(
            answer=answer,
            header=header,
            ask=ask,
            layout=self._client(decoded).base().layout.digest,
            key=self._key,
            honest=self.honest,
            kept=self._kept,
            other=self._other,
            signed_ask=data,
        )


def worker(node: Path, other: Path, rows: Sequence[Row]) -> None:
    """Serve as the hostile node's worker until this process ends."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    file = read_node(node)
    private_folder(file.state)
    file.meeting.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    file.meeting.unlink(missing_ok=True)
    with _Server(Hostile(file, other, rows), file.meeting) as server:
        server.serve_forever(poll_interval=0.2)


def main() -> None:
    """Run all rows against a new deployment in the given folder, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--worker", action="store_true", help="be the hostile worker of the node.toml FOLDER")
    parser.add_argument("--other", type=Path, help="node.toml of an honest node, for --worker")
    parser.add_argument("--only", default="", help="words, with commas between: the rows that have one of them")
    given = parser.parse_args()
    rows = chosen(given.only)
    if given.worker:
        worker(given.folder, given.other, rows)
        return
    seconds, memory, ended = deployed(given.folder, rows, given.only)
    lines, whole = judged(given.folder, rows, expected(given.folder, rows))
    print("| round | sent | what happened | finished | state intact | s |\n|---|---|---|---|---|---|")
    print("\n".join(lines))
    ran = (given.folder / TOUCHED).exists()
    print(
        f"\n{len(rows)} rows in {seconds:.0f} s; the server ended with status {ended}, its conductor held at most "
        f"{memory / 2**20:.0f} MiB; the pickle's command {'RAN' if ran else 'did not run'}."
    )
    if not whole or ended != 0 or ran:
        sys.exit(1)


def chosen(words: str) -> tuple[Row, ...]:
    """The rows whose description has one of the words; all without words."""
    some = [word.strip() for word in words.split(",") if word.strip()]
    return tuple(row for row in ROWS if not some or any(word in row.what for word in some))


def settings(rows: Sequence[Row]) -> dict[str, object]:
    """Of a run with one round a row."""
    return {**SETTINGS, "rounds.count": len(rows)}


def deployed(folder: Path, rows: Sequence[Row], only: str) -> tuple[float, int, int]:
    """Conduct the run against real processes: (seconds, most resident bytes of the conductor, the exit status)."""
    patch = folder / "patch"
    with Deployment(folder, NODES, settings(rows)) as whole:
        if not (folder / "deploy.toml").exists():  # else it goes on where it was stopped
            whole.make()
        patch.mkdir(exist_ok=True)
        twice = next((number for number, row in enumerate(rows, 1) if "twice" in row.what), 0)
        (patch / "sitecustomize.py").write_text(SEND_TWICE.replace("ROUND", str(twice)))
        began = time.monotonic()
        whole.start_server()
        for name in NODES.keys() - {HOSTILE}:
            whole.start_node(name)
        command = [sys.executable, "-P", "-m", "simulations.benchmarks.hostile", str(whole.node_path(HOSTILE))]
        command += ["--worker", "--other", str(whole.node_path(OTHER)), "--only", only]
        whole.start("h-worker", command, environment={WHERE: str(folder)})
        path = f"{patch}{os.pathsep}{whole.environment['PYTHONPATH']}"
        whole.start_node(HOSTILE, part="relay", environment={"PYTHONPATH": path})
        most = 0

        def ended() -> bool:
            nonlocal most
            with contextlib.suppress(psutil.Error, OSError, ValueError):
                most = max(most, psutil.Process(int((whole.deploy.state / CONDUCTOR).read_text())).memory_info().rss)
            return whole.status("server") is not None

        for _ in range(PAUSES + 1):
            whole.wait("the end of the run", ended, seconds=300.0 + len(rows) * (DEADLINE + 30.0))
            if whole.status("server") != PAUSED:
                break
            whole.start_server()
        status = whole.status("server")
        return time.monotonic() - began, most, -1 if status is None else status


def expected(folder: Path, rows: Sequence[Row]) -> list[dict[str, Any]]:
    """The rounds of the same run without Flower, in which the hostile node says only what may count."""
    whole = Deployment(folder, NODES, settings(rows))
    quiet = Hostile(whole.node(HOSTILE), whole.node_path(OTHER), rows)

    def answer(name: str, own: Worker, data: bytes) -> bytes:
        if name != HOSTILE:
            return own.answered(data)
        quiet._node = own._node
        case = quiet.case(data)
        if case is None:
            return quiet.honest
        row = rows[case.header.round - 1]
        if row.rule != "accepted":
            raise RuntimeError("it says nothing")
        return row.make(case)

    shutil.rmtree(folder / "reference", ignore_errors=True)
    run = undisturbed(whole, folder / "reference", answer=answer).parent
    return [dict(event) for event in read_log(run) if event["event"] == "round"]


def judged(folder: Path, rows: Sequence[Row], reference: list[dict[str, Any]]) -> tuple[list[str], bool]:
    """One line of Markdown a row, and whether all rows are as they should be."""
    whole = Deployment(folder, NODES, settings(rows))
    rounds = {event["round"]: event for event in whole.events() if event["event"] == "round"}
    mine = whole.id_of(HOSTILE)
    lines, right = [], True
    for number, row in enumerate(rows, 1):
        event = rounds.get(number)
        if event is None:
            lines.append(f"| {number} | {row.what} | the run did not get here | no | - | - |")
            right = False
            continue
        heard = {client["id"]: client for client in event["clients"]}
        refused = [r for r in event["refused"] if r["client"] == mine]
        said = "; ".join(f"{r['rule']}: {r['detail'].replace('|', '/')[:110]}" for r in refused)
        if mine in heard:
            said = f"left out by the screen {said}" if heard[mine].get("quarantined") else f"accepted {said}"
        happened = (
            (row.rule == "accepted" and mine in heard)
            or (row.rule == "screened" and bool(heard.get(mine, {}).get("quarantined")))
            or [r["rule"] for r in refused] == [row.rule]
            or (row.rule == "deadline" and "Message Unavailable" in said)  # Flower's word for it, if it comes first
        )
        finished = len(heard.keys() - {mine}) == len(NODES) - 1
        intact = event["state"] == reference[number - 1]["state"]
        right &= happened and finished and intact
        wrong = "" if happened else f" **(expected {row.rule})**"
        yes = {True: "yes", False: "**no**"}
        ends = f"{yes[finished]} | {yes[intact]} | {event['seconds']:.0f} |"
        lines.append(f"| {number} | {row.what} | {said.strip()}{wrong} | {ends}")
    return lines, right


if __name__ == "__main__":
    main()
