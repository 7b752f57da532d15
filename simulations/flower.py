"""The app under Flower's own simulation: `flwr run`, from a neutral folder, on a private home and ports.

A local SuperLink is a daemon on a fixed port that keeps the environment, the folder and the code of whoever started
it first, and never ends by itself. Here it gets its own home, ports and folder, and ends with the `with` block.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType

from fedlora.config import RunConfig, flat
from fedlora.errors import RoundFailed

_HOME = '[superlink]\ndefault = "local-simulation"\n[superlink.local-simulation]\naddress = ":local-in-memory:"\n'


class FlowerSimulation:
    """Runs of the Flower app in `app` (a folder with pyproject.toml). `home` must not exist yet.

    `start_in` is the folder the daemon is started in; it must lie outside every checkout, since its workers import from
    it first. Default: the home itself.
    """

    def __init__(self, app: Path, home: Path, *, start_in: Path | None = None) -> None:
        self._app = app
        self._home = home
        self._folder = start_in or home
        with socket.socket() as one, socket.socket() as two:
            one.bind(("127.0.0.1", 0))
            two.bind(("127.0.0.1", 0))
            ports = one.getsockname()[1], two.getsockname()[1]
        binaries = Path(sys.executable).parent
        self._flwr = str(binaries / "flwr")
        self._environment = {
            **{k: v for k, v in os.environ.items() if not k.startswith("FLWR_")},
            "PATH": f"{binaries}:{os.environ.get('PATH', '')}",
            "FLWR_HOME": str(home),
            "FEDLORA_MEMORY": str(home / "memory"),
            "FLWR_TELEMETRY_ENABLED": "0",
            "FLWR_DISABLE_UPDATE_CHECK": "1",
            "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
            "FLWR_LOCAL_SUPERLINK_HTTP_API_PORT": str(ports[0]),
            "FLWR_LOCAL_CONTROL_API_PORT": str(ports[1]),
        }

    def __enter__(self) -> FlowerSimulation:
        self._home.mkdir(parents=True)
        (self._home / "config.toml").write_text(_HOME)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        """End every process that carries this home in its environment."""
        mark = f"FLWR_HOME={self._home}".encode()
        for process in Path("/proc").iterdir():
            if process.name.isdigit() and int(process.name) != os.getpid():
                try:
                    ours = mark in (process / "environ").read_bytes().split(b"\0")
                    if ours:
                        os.kill(int(process.name), signal.SIGKILL)
                except OSError:
                    continue  # it has ended meanwhile, or belongs to somebody else

    def run(self, config: RunConfig, out: Path, *, deadline: float = 600.0) -> tuple[str, str]:
        """(status, log) of one run into the new folder `out`; the status, since `flwr run` exits 0 on failed runs too.

        Raises: RoundFailed if a Flower command fails or the run has not ended after `deadline` seconds.
        """
        nodes = ("--num-supernodes", str(config.rounds.clients), "--client-resources-num-cpus", "1")
        self._call("federation", "simulation-config", "@none/default", "local-simulation", *nodes)
        default = flat(RunConfig())
        changed = {k: v for k, v in flat(config).items() if v != default[k]} | {"out": str(out)}
        words = " ".join(f"{k}={json.dumps(v)}" for k, v in changed.items())
        said = self._call("run", str(self._app), "local-simulation", "--format", "json", "--run-config", words)
        number = str(json.loads(said)["run-id"])
        end = time.monotonic() + deadline
        while time.monotonic() < end:
            listed = json.loads(self._call("list", "local-simulation", "--run-id", number, "--format", "json"))
            status = str(listed["runs"][0]["status"])
            if status.startswith("finished"):
                return status, self._log(number)
            time.sleep(1)
        raise RoundFailed(f"Flower run {number} has not ended after {deadline:g} s:\n{self._log(number)}")

    def _log(self, number: str) -> str:
        return self._call("log", number, "local-simulation", "--show")

    def _call(self, *words: str) -> str:
        done = subprocess.run(
            [self._flwr, *words], cwd=self._folder, env=self._environment, capture_output=True, text=True, timeout=300
        )
        if done.returncode != 0:
            raise RoundFailed(f"flwr {' '.join(words)} failed:\n{done.stdout}{done.stderr}")
        return done.stdout
