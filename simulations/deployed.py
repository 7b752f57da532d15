"""The app as it is deployed, on one machine: a SuperLink and its SuperNodes, each a process, and Flower's own counters.

Everything listens on 127.0.0.1 and nothing is encrypted, so this is for tests and measurements, not for data that
must stay where it is: there use TLS and node keys. Every message starts a new client process, which loads the base
again; a round takes seconds where the simulation takes a fraction of one.
"""

from __future__ import annotations

import json
import socket
import sqlite3
import subprocess
import sys
import time
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from fedlora.config import RunConfig, flat
from fedlora.errors import RoundFailed
from simulations.flower import FlowerSimulation

_HOME = '[superlink]\ndefault = "deployed"\n[superlink.deployed]\naddress = "127.0.0.1:{port}"\ninsecure = true\n'
_STATE = "state.db"
_START = 120.0  # seconds that a SuperLink may take to listen
_STEPS = """
CREATE TABLE traffic_steps (id INTEGER PRIMARY KEY, run_id INTEGER, down INTEGER, up INTEGER);
CREATE TRIGGER traffic_step AFTER UPDATE OF bytes_sent, bytes_recv ON run BEGIN
  INSERT INTO traffic_steps (run_id, down, up)
  VALUES (NEW.run_id, NEW.bytes_sent - OLD.bytes_sent, NEW.bytes_recv - OLD.bytes_recv);
END;
"""  # Flower keeps the sums of a run alone


@dataclass(frozen=True)
class Traffic:
    """Bytes between the SuperLink and the SuperNodes in one run, as Flower counts them.

    Per message: itself with the tree of its objects, and each object that is fetched or stored. Not counted are the
    app, which a SuperNode fetches once, polls that bring no message, heartbeats, and what HTTP adds. `steps` are the
    (down, up) of the single counts in their order; they add up to `down` and `up`.
    """

    down: int
    up: int
    steps: tuple[tuple[int, int], ...]


class FlowerDeployment(FlowerSimulation):
    """Runs of the Flower app in `app` (a folder with pyproject.toml) on `nodes` SuperNodes. `home` must not exist yet.

    The processes share the home. Flower unpacks the app there without a lock, which is safe since the ServerApp has
    it unpacked before it sends the first message. Node `i` has partition `i` and the memory folder `home/memory/i`.
    """

    def __init__(self, app: Path, home: Path, *, nodes: int) -> None:
        super().__init__(app, home)
        self._processes: list[subprocess.Popen[bytes]] = []
        self._files = ExitStack()
        self._traffic: Traffic | None = None
        with ExitStack() as held:
            sockets = [held.enter_context(socket.socket()) for _ in range(nodes + 1)]
            for one in sockets:
                one.bind(("127.0.0.1", 0))
            self._port, *self._node_ports = (one.getsockname()[1] for one in sockets)

    def __enter__(self) -> FlowerDeployment:
        """Raises: RoundFailed if the SuperLink ends, or does not listen after two minutes."""
        super().__enter__()
        (self._home / "config.toml").write_text(_HOME.format(port=self._port))
        try:
            self._start("superlink", "--port", str(self._port), "--database", str(self._home / _STATE))
            self._wait()
            with closing(sqlite3.connect(self._home / _STATE, timeout=60)) as state:
                state.executescript(_STEPS)
            for i, port in enumerate(self._node_ports):
                memory = json.dumps(str(self._home / "memory" / str(i)))
                node = f"partition-id={i} num-partitions={len(self._node_ports)} memory={memory}"
                where = ("--superlink", f"127.0.0.1:{self._port}", "--port", str(port))
                self._start("supernode", *where, "--node-config", node)
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        super().__exit__(kind, error, at)
        for process in self._processes:
            process.wait()
        self._files.close()

    @property
    def traffic(self) -> Traffic:
        """What the last run moved. Raises: RoundFailed before the first run has ended."""
        if self._traffic is None:
            raise RoundFailed("no run has ended yet, so there is no traffic to tell of; call run first")
        return self._traffic

    def run(self, config: RunConfig, out: Path, *, deadline: float = 600.0) -> tuple[str, str]:
        """(status, log) of one run into the new folder `out`; the status, since `flwr run` exits 0 on failed runs too.

        Raises: RoundFailed if a Flower command fails or the run has not ended after `deadline` seconds.
        """
        default = flat(RunConfig())
        changed = {k: v for k, v in flat(config).items() if v != default[k]} | {"out": str(out)}
        words = " ".join(f"{k}={json.dumps(v)}" for k, v in changed.items())
        command = [self._flwr, "run", str(self._app), "deployed", "--stream", "--run-config", words]
        try:  # one command until the end: each `flwr list` is a new Python process
            done = subprocess.run(
                command, cwd=self._home, env=self._environment, capture_output=True, text=True, timeout=deadline
            )
        except subprocess.TimeoutExpired as error:
            said = (error.stdout or b"").decode()
            raise RoundFailed(f"the Flower run into {out} has not ended after {deadline:g} s:\n{said}") from error
        if done.returncode != 0:
            raise RoundFailed(f"flwr run failed:\n{done.stdout}{done.stderr}")
        newest = json.loads(self._call("list", "deployed", "--format", "json"))["runs"][0]
        moved = newest["network-traffic"]
        steps = self._steps(int(newest["run-id"]))
        self._traffic = Traffic(down=int(moved["outbound-bytes"]), up=int(moved["inbound-bytes"]), steps=steps)
        return str(newest["status"]), done.stdout

    def _steps(self, run: int) -> tuple[tuple[int, int], ...]:
        signed = run - 2**64 if run >= 2**63 else run  # as SQLite holds it
        with closing(sqlite3.connect(self._home / _STATE)) as state:
            query = "SELECT down, up FROM traffic_steps WHERE run_id = ? ORDER BY id"
            return tuple((int(down), int(up)) for down, up in state.execute(query, (signed,)))

    def _start(self, kind: str, *words: str) -> None:
        """Start `flower-superlink` or `flower-supernode`; what it says goes to a file of the home."""
        said = self._files.enter_context((self._home / f"{kind}-{len(self._processes)}.log").open("wb"))
        command = [str(Path(sys.executable).parent / f"flower-{kind}"), "--insecure", "--host", "127.0.0.1", *words]
        self._processes.append(
            subprocess.Popen(command, cwd=self._home, env=self._environment, stdout=said, stderr=subprocess.STDOUT)
        )

    def _wait(self) -> None:
        """Until the SuperLink listens."""
        end = time.monotonic() + _START
        while True:
            try:
                socket.create_connection(("127.0.0.1", self._port), timeout=1).close()
                return
            except OSError as error:
                if self._processes[0].poll() is not None or time.monotonic() > end:
                    said = (self._home / "superlink-0.log").read_text()
                    raise RoundFailed(f"the SuperLink does not listen on port {self._port}:\n{said}") from error
            time.sleep(0.2)
