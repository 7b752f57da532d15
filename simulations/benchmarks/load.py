"""Large updates through a whole deployment: peak memory, MB/s, seconds a round, and whether anything is lost.

python -m simulations.benchmarks.load FOLDER          (from a checkout; a new folder with a short path; Linux)

A server and four nodes on loopback, as real processes over TLS, in as many rounds of `ffa-lora` as are wanted. In place
of a node's worker runs a stub with the node's real keys: it announces a layout of made-up modules `[65536, 16]` of rank
16, whose B fill 100 MB, and answers with signed changes that follow from (round, node, module) alone. These are whole
numbers over 2^16, and the weights add up to a power of two, so that sums and means are exact in float32 and float64;
the last B must equal, bit for bit, the one computed here from the seeds with integers. Exit status 1 if it does not, or
if an update was not counted.

Memory is each process's own high-water mark (VmHWM), CPU its user and system time; both are looked at twice a second,
so that the last moments of a process may be missing. Where other work runs on the machine, seconds and MB/s say little,
and CPU seconds more.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import logging
import os
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Final

import numpy as np
import psutil
from numpy.typing import NDArray

from clients.worker import Worker, _Server
from fedlora.deploy import NodeFile, read_node
from fedlora.envelope import open_ask, sign_answer
from fedlora.processes import private_folder
from fedlora.rng import stream
from fedlora.state import Answer, Layout, Module, keyed
from fedlora.wire import decode_ask, encode_answer
from server.checkpoint import latest
from simulations.benchmarks.deployment import Deployment, TooLate

__all__ = ["KINDS", "Usage", "Watched", "change", "expected", "main", "worker"]

OUT, INP, RANK = 65536, 16, 16  # of every made-up module
SEED: Final = 7
WEIGHTS: Final = (1, 1, 2, 4)  # examples of each node: their sum is a power of two
UNIT: Final = 2.0**-16  # of a change, whose values are UNIT times whole numbers of 16 bits
BASE: Final = hashlib.sha256(b"a base that nobody has").hexdigest()
KINDS: Final[Mapping[str, tuple[str, ...]]] = {
    "conductor": ("flwr-serverapp",),
    "SuperLink": ("flower-superlink",),
    "executor (server)": ("flower-superexec", "--root-certificates"),
    "SuperNode": ("flower-supernode",),
    "executor (node)": ("flower-superexec", "--insecure"),
    "ClientApp": ("flwr-clientapp",),
    "worker": ("worker",),
}  # kind -> the words that its command line has; the first that fits
PAUSED: Final = 3  # exit status of a server whose run can be gone on with
PAUSES: Final = 5  # on a busy machine Flower loses an answer when its database is locked for five seconds
_LOOK: Final = 0.5  # seconds between looks


@dataclass(frozen=True, kw_only=True)
class Usage:
    """Of one kind of process: how many there were, most resident bytes of one of them, CPU seconds of all."""

    processes: int
    peak: int
    cpu: float


class Watched:
    """What the processes below this one use, by kind. Needs Linux (/proc)."""

    def __init__(self) -> None:
        self._seen: dict[psutil.Process, tuple[str, int, float]] = {}  # kind, most resident bytes, CPU seconds
        self._looked = 0.0

    def look(self) -> None:
        """Look at all of them, at most twice a second."""
        if time.monotonic() - self._looked < _LOOK:
            return
        self._looked = time.monotonic()
        for process in psutil.Process().children(recursive=True):
            try:
                command = process.cmdline()
                times = process.cpu_times()
                peak = _high_water_mark(process.pid)
            except (psutil.Error, OSError):  # it has ended
                continue
            if command:  # else it is a zombie
                self._seen[process] = (_kind(command), peak, times.user + times.system)

    def usage(self) -> dict[str, Usage]:
        """By kind, in the order of `KINDS`."""
        found: dict[str, Usage] = {}
        for kind in (*KINDS, "other"):
            mine = [(peak, cpu) for name, peak, cpu in self._seen.values() if name == kind]
            if mine:
                most = max(peak for peak, _ in mine)
                found[kind] = Usage(processes=len(mine), peak=most, cpu=sum(cpu for _, cpu in mine))
        return found

    def cpu(self) -> float:
        """CPU seconds of all."""
        return sum(cpu for _, _, cpu in self._seen.values())


def _kind(command: Sequence[str]) -> str:
    line = " ".join(command)
    return next((kind for kind, words in KINDS.items() if all(word in line for word in words)), "other")


def _high_water_mark(pid: int) -> int:
    """Most bytes that were ever resident of a process. Raises: OSError if there is none; 0 for a zombie."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return 0


def layout(modules: int) -> Layout:
    """So many linear modules `[OUT, INP]`."""
    return Layout(modules={f"layer{i:02d}": Module(out=OUT, inp=INP) for i in range(modules)})


def change(round_: int, node: int, module: str) -> NDArray[np.int16]:
    """What a node changes of one B in a round, `[OUT, RANK]` in units of `UNIT`."""
    rng = stream(SEED, "load", round_, node, module)
    return rng.integers(-(2**15), 2**15, (OUT, RANK), np.int16)


def expected(rounds: int, nodes: int, module: str) -> NDArray[np.float32]:
    """B of one module after so many rounds of all nodes: the sum of the weighted means, `[OUT, RANK]`."""
    total = np.zeros((OUT, RANK), np.int64)
    for round_, node in itertools.product(range(1, rounds + 1), range(nodes)):
        total += WEIGHTS[node] * change(round_, node, module).astype(np.int64)
    b: NDArray[np.float32] = (total * (UNIT / sum(WEIGHTS[:nodes]))).astype(np.float32)
    return b


class Stub(Worker):
    """A worker without a base: it takes what its operator signed, and signs what `change` says."""

    def __init__(self, node: NodeFile, modules: int) -> None:
        super().__init__(node)
        self._layout = layout(modules)

    def answered(self, data: bytes) -> bytes:
        ask = open_ask(data, self._operator, max_bytes=self.max_bytes)
        header, _ = decode_ask(ask.payload, max_bytes=self.max_bytes)
        if header.kind == "hello":
            info = {"id": self.id, "rank": RANK, "base": BASE, "layout": self._layout.to_json(), "keeps": False}
            return sign_answer(encode_answer(header, Answer(info=info)), ask, header, "", self._key)
        node, examples = self._node.share[0], 0
        arrays: dict[str, NDArray[np.float32]] = {}
        if header.kind == "train":
            examples = WEIGHTS[node]
            arrays = {
                name: change(header.round, node, name).astype(np.float32) * np.float32(UNIT)
                for name in self._layout.modules
            }
        payload = encode_answer(header, Answer(examples=examples, arrays=keyed("B", arrays)))
        return sign_answer(payload, ask, header, self._layout.digest, self._key)


def worker(node: Path, modules: int) -> None:
    """Serve as a node's worker until this process ends."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    file = read_node(node)
    private_folder(file.state)
    file.meeting.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    file.meeting.unlink(missing_ok=True)
    with _Server(Stub(file, modules), file.meeting) as server:
        server.serve_forever(poll_interval=0.2)


def deployed(whole: Deployment, modules: int, seconds: float) -> Watched:
    """Conduct the run to its end. Raises: TooLate after `seconds`, or if it ends in another way."""
    whole.make()
    watched, started = Watched(), list[str]()

    def ended() -> bool:
        watched.look()
        if any(whole.status(name) is not None for name in started):
            raise TooLate(f"a node has ended\n{whole.logs()}")
        return whole.status("server") is not None

    with whole:
        for name in whole.nodes:
            command = [sys.executable, "-P", "-m", "simulations.benchmarks.load", str(whole.node_path(name))]
            whole.start(f"{name}-worker", [*command, "--worker", "--modules", str(modules)])
        whole.wait("the workers", lambda: all(whole.node(n).meeting.exists() for n in whole.nodes), seconds=seconds)
        whole.start_server()
        whole.wait("the run", lambda: "submitted" in whole.log("server") or ended(), seconds=seconds)
        for name in whole.nodes:
            whole.start_node(name, part="relay")
            started.append(f"{name}-relay")
        for _ in range(PAUSES + 1):
            whole.wait("the end of the run", ended, seconds=seconds)
            if whole.status("server") != PAUSED:
                break
            whole.start_server()
        if whole.status("server") != 0:
            raise TooLate(f"the run did not end as it should\n{whole.logs()}")
    return watched


def spans(journal: Sequence[Mapping[str, Any]]) -> list[tuple[float, float, float]]:
    """Of each round the seconds until its first answer was accepted, from there to the last, and from there to the next
    round: the mean, its digest, the log and the checkpoint."""
    found: list[tuple[float, float, float]] = []
    began, answers = 0.0, list[float]()
    for event in journal:
        at = datetime.fromisoformat(event["time"]).timestamp()
        if event["event"] == "round":
            began, answers = at, []
        elif event["event"] == "answer" and event["kind"] == "train":
            answers.append(at)
        elif event["event"] == "closed" and answers:
            found.append((answers[0] - began, answers[-1] - answers[0], at - answers[-1]))
    return found


def lost(whole: Deployment, modules: int, rounds: int) -> list[str]:
    """What is missing of the run; nothing if every update was counted and B is the right one."""
    found = latest(whole.folder / "run" / "checkpoints")
    if found is None or found[0] != rounds:
        return [f"the last checkpoint is of round {found and found[0]}, not {rounds}"]
    wrong: list[str] = []
    counted = sum(len(event["clients"]) for event in whole.events() if event["event"] == "round")
    if counted != rounds * len(whole.nodes):
        wrong.append(f"{counted} updates were counted of {rounds * len(whole.nodes)}")
    pair = found[1].open_task.pair
    for name in layout(modules).modules:
        if pair is None or not np.array_equal(pair[name].b, expected(rounds, len(whole.nodes), name)):
            wrong.append(f"B of {name} is not the one computed from the seeds")
    return wrong


def table(whole: Deployment, watched: Watched, loads: Sequence[float], whole_b: bool) -> str:
    """What was measured, in one Markdown table."""
    rounds = [event for event in whole.events() if event["event"] == "round"]
    journal = whole.journal()
    again = sum(event["event"] in ("retry", "conducting") for event in journal) - 1
    refused = [event["rule"] for event in journal if event["event"] == "refused"]
    parts = spans(journal)
    each = [sum(span) for span in parts]
    counted = sum(len(event["clients"]) for event in rounds)
    up, down = (sum(event[key] for event in rounds) / 1e6 for key in ("bytes_up", "bytes_down"))

    def middle(pick: Callable[[tuple[float, float, float]], float]) -> str:
        return f"{statistics.median(pick(span) for span in parts):.1f}"

    rows = [
        ("updates counted", f"{counted} of {len(rounds) * len(whole.nodes)}"),
        ("answers that did not come or were refused; rounds begun again", f"{refused or 'none'}; {again}"),
        ("the last B is the one computed from the seeds", "yes" if whole_b else "**no**"),
        ("one update, MB", f"{up / max(counted, 1):.1f}"),
        (
            "seconds a round: median (least to most)",
            f"{statistics.median(each):.1f} ({min(each):.1f} to {max(each):.1f})",
        ),
        ("- until the first answer is accepted", middle(lambda span: span[0])),
        ("- from the first answer to the last", middle(lambda span: span[1])),
        ("- mean, digest, log, checkpoint", middle(lambda span: span[2])),
        ("MB/s up, over all rounds", f"{up / sum(each):.1f}"),
        ("MB/s down, over all rounds", f"{down / sum(each):.1f}"),
    ]
    for kind, usage in watched.usage().items():
        cpu = f"{usage.cpu:.0f} CPU s in all"
        rows.append((f"{kind} (processes: {usage.processes})", f"peak RSS {usage.peak / 2**20:.0f} MiB; {cpu}"))
    rows.append(("load average of the machine: before, after", f"{loads[0]:.1f}, {loads[1]:.1f}"))
    rows.append(("cores", str(os.cpu_count())))
    return "\n".join(["| what | measured |", "|---|---|", *(f"| {what} | {value} |" for what, value in rows)])


def main() -> None:
    """Run it as the command line says, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rounds", type=int, default=13)
    parser.add_argument("--nodes", type=int, default=4, choices=(1, 2, 4), help="their weights add up to 1, 2 or 8")
    parser.add_argument("--modules", type=int, default=24, help="4.2 MB of B each")
    parser.add_argument("--in-flight", type=int, default=64, help="asks that are out at once (rounds.in_flight)")
    parser.add_argument("--minutes", type=float, default=25.0, help="after which it is given up")
    parser.add_argument("--worker", action="store_true", help="be the stub worker of the node.toml FOLDER")
    given = parser.parse_args()
    if given.worker:
        worker(given.folder, given.modules)
        return
    before = os.getloadavg()[0]
    settings = {"method.name": "ffa-lora", "rounds.count": given.rounds, "rounds.quorum": 1.0, "rounds.deadline": 900}
    settings["rounds.in_flight"] = given.in_flight
    whole = Deployment(given.folder, {f"n{i}": RANK for i in range(given.nodes)}, settings)
    watched = deployed(whole, given.modules, 60.0 * given.minutes)
    wrong = lost(whole, given.modules, given.rounds)
    print(table(whole, watched, (before, os.getloadavg()[0]), not wrong))
    if wrong:
        sys.exit("\n".join(wrong))


if __name__ == "__main__":
    main()
