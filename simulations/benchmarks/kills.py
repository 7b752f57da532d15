"""SIGKILL at random instants over the processes of a running deployment; the adapter must not notice.

python -m simulations.benchmarks.kills FOLDER --kills 40 --of server,worker --seed 1          (from a checkout)

A server and two nodes, as real processes over TLS; the quorum is all. `server` stands for the conductor (Flower's
ServerApp process), the SuperLink and the executor; `worker` for a node's resident worker; `supernode` for its
SuperNode, whose loss Flower notices after a minute. After each kill it waits until what was killed works again: the
conductor has resumed, the SuperLink listens, the worker listens, the SuperNode's node has answered. When a run ends
before all kills are done, the next one begins, with the same nodes. Every adapter, and the state after every round,
must equal those of the same run conducted undisturbed in one process. Exit status 1 if one does not, or a run does not
end.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import random
import socket
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import psutil

from fedlora.report.log import read_log
from server.deployed import CONDUCTOR
from simulations.benchmarks.deployment import Deployment, TooLate, undisturbed

__all__ = ["KINDS", "Hunt", "Kill", "main"]

SERVER: Final = ("conductor", "superlink", "executor")
KINDS: Final = (*SERVER, "worker", "supernode")
NODES: Final = {"a": 4, "b": 2}  # name -> rank
PROGRAM: Final = {
    "superlink": "flower-superlink",
    "executor": "flower-superexec",
    "worker": "clients.worker",
    "supernode": "flower-supernode",
}
PATIENCE: Final = 400.0  # seconds for one recovery
ADAPTER: Final = "adapter_model.safetensors"


@dataclass(frozen=True, kw_only=True)
class Kill:
    """One SIGKILL: what was hit, in which round, and the seconds until it worked again."""

    kind: str
    round: int
    seconds: float


@dataclass
class Hunt:
    """Kills over runs of one deployment; `instants` draws what is killed and when."""

    whole: Deployment
    instants: random.Random
    kinds: tuple[str, ...]
    span: float  # seconds in which the next kill comes
    kills: list[Kill] = field(default_factory=list)

    def run(self, name: str, *, most: int, until: float) -> None:
        """One run into the folder `name`, with kills while there are fewer than `most` and it is before `until`.

        Raises: TooLate if something does not recover, or the run does not end.
        """
        self.whole.write_run(name)
        before = len(self.whole.journal())
        self.whole.start_server()
        self.whole.wait("the start", lambda: self._heard("start", before) or self._over(), seconds=PATIENCE)
        while len(self.kills) < most and time.monotonic() < until and not self._over():
            time.sleep(self.instants.uniform(0.0, self.span))
            kill = self._kill(self.instants.choice(self.kinds))
            if kill is not None:
                self.kills.append(kill)
                print(f"{len(self.kills):4}  round {kill.round:3}  {kill.kind:10} {kill.seconds:6.1f} s", flush=True)
        status = self.whole.wait_for_end("server", seconds=PATIENCE + 60.0 * self._rounds)
        if status != 0:
            raise TooLate(f"{name} ended with status {status}\n{self.whole.logs()}")

    @property
    def _rounds(self) -> int:
        return int(str(self.whole.settings["rounds.count"]))

    def _over(self) -> bool:
        return self.whole.status("server") is not None

    def _heard(self, event: str, before: int, **like: Any) -> bool:
        """Whether the server's journal has such an event after its first `before` lines."""
        return any(
            e["event"] == event and all(e.get(key) == value for key, value in like.items())
            for e in self.whole.journal()[before:]
        )

    def _kill(self, kind: str) -> Kill | None:
        """Kill one process of that kind and wait until it works again; None if there is none at this instant."""
        node = self.instants.choice(sorted(NODES))
        owner = node if kind in ("worker", "supernode") else "server"
        victim = self._conductor() if kind == "conductor" else self._program(owner, kind)
        if victim is None:
            return None
        before = self.whole.journal()
        number = max((int(e["round"]) for e in before[-50:] if e["event"] == "round"), default=0)
        recovered = self._recovery(kind, node, victim, len(before))
        began = time.monotonic()
        with contextlib.suppress(psutil.Error):
            victim.kill()
        self.whole.wait(f"the recovery of {kind}", lambda: recovered() or self._over(), seconds=PATIENCE)
        return Kill(kind=kind, round=number, seconds=time.monotonic() - began)

    def _recovery(self, kind: str, node: str, victim: psutil.Process, before: int) -> Callable[[], bool]:
        whole, owner = self.whole, "server" if kind in SERVER else node

        def again() -> bool:
            found = self._program(owner, kind)
            return found is not None and found != victim

        def listens() -> bool:
            deploy = whole.deploy
            with contextlib.suppress(OSError), socket.create_connection((deploy.address, deploy.port), timeout=1.0):
                return again()
            return False

        def taken() -> bool:
            with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as one:
                one.connect(str(whole.node(node).meeting))
                return again()
            return False

        return {
            "conductor": lambda: self._heard("start", before),
            "executor": lambda: again() and self._heard("start", before),  # the conductor dies with it
            "superlink": listens,
            "worker": taken,
            "supernode": lambda: again() and self._heard("answer", before, client=whole.id_of(node)),
        }[kind]

    def _conductor(self) -> psutil.Process | None:
        with contextlib.suppress(OSError, ValueError, psutil.Error):
            process = psutil.Process(int((self.whole.deploy.state / CONDUCTOR).read_text()))
            if process.status() != psutil.STATUS_ZOMBIE and any("serverapp" in word for word in process.cmdline()):
                return process
        return None

    def _program(self, owner: str, kind: str) -> psutil.Process | None:
        return next(iter(self.whole.children(owner, PROGRAM[kind])), None)


def same(run: Path, reference: Path) -> bool:
    """Whether the adapter's bytes and the state after every round are those of the reference."""
    states = [[event["state"] for event in read_log(one) if event["event"] == "round"] for one in (run, reference)]
    adapters = [(one / "adapter" / ADAPTER).read_bytes() for one in (run, reference)]
    return states[0] == states[1] and adapters[0] == adapters[1]


def main() -> None:
    """Hunt as the command line says, print each kill and a table, and compare the adapters."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="a new folder, with a short path")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--of", default="server,worker", help=f"of server (three kinds), {', '.join(KINDS)}")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rounds", type=int, default=10, help="of each run")
    parser.add_argument("--span", type=float, default=8.0, help="seconds in which the next kill comes")
    parser.add_argument("--minutes", type=float, default=60.0, help="no kill after so many")
    given = parser.parse_args()
    words = [word.strip() for word in given.of.split(",")]
    kinds = tuple(itertools.chain.from_iterable(SERVER if word == "server" else (word,) for word in words))
    if unknown := sorted(set(kinds) - set(KINDS)):
        parser.error(f"--of: {', '.join(unknown)}; known: server, {', '.join(KINDS)}")
    settings = {"rounds.count": given.rounds, "rounds.quorum": 1.0, "rounds.deadline": 60, "rounds.retries": 50}
    whole = Deployment(given.folder, NODES, settings)
    whole.make()
    undisturbed(whole, given.folder / "reference")
    hunt = Hunt(whole, random.Random(given.seed), kinds, given.span)
    began = time.monotonic()
    equal: list[bool] = []
    with whole:
        for name in NODES:
            whole.start_node(name)
        while len(hunt.kills) < given.kills and time.monotonic() - began < 60.0 * given.minutes:
            name = f"run-{len(equal)}"
            hunt.run(name, most=given.kills, until=began + 60.0 * given.minutes)
            equal.append(same(given.folder / name, given.folder / "reference" / "run"))
            print(f"{name}: {'equal' if equal[-1] else 'NOT EQUAL'}", flush=True)
    print(table(hunt.kills))
    print(
        f"{len(hunt.kills)} kills, all recovered, in {time.monotonic() - began:.0f} s; {sum(equal)} of {len(equal)} "
        f"runs of {given.rounds} rounds ended with the adapter and the states of the undisturbed one"
    )
    if not all(equal):
        sys.exit(1)


def table(kills: list[Kill]) -> str:
    """Kills and the seconds of their recoveries, by kind, as Markdown."""
    lines = ["| killed | times | recovery: median s | longest s |", "|---|---|---|---|"]
    for kind in KINDS:
        seconds = [kill.seconds for kill in kills if kill.kind == kind]
        if seconds:
            lines.append(f"| {kind} | {len(seconds)} | {statistics.median(seconds):.1f} | {max(seconds):.1f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
