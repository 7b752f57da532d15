"""The same app under Flower's own simulation: `flwr run`, Ray, another process per client."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from fedlora.config import RunConfig, flat, load_config
from server.app import open_run
from simulations.simulate import simulate

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent
SMALL = [
    "rounds.count=2",
    "rounds.clients=3",
    "lora.ranks=4,2,2",
    "training.local_steps=2",
    "training.batch_size=4",
    "training.threads=1",
    "data.rows_per_client=20",
    "data.test_rows=12",
]


@dataclass
class Flower:
    """A private home and ports; the SuperLink that `flwr run` starts there ends with the test."""

    home: Path
    ports: tuple[int, int]

    @property
    def environment(self) -> dict[str, str]:
        return {
            **{k: v for k, v in os.environ.items() if not k.startswith("FLWR_")},
            "PATH": f"{BIN}:{os.environ['PATH']}",
            "FLWR_HOME": str(self.home),
            "FLWR_TELEMETRY_ENABLED": "0",
            "FLWR_DISABLE_UPDATE_CHECK": "1",
            "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
            "FLWR_LOCAL_SUPERLINK_HTTP_API_PORT": str(self.ports[0]),
            "FLWR_LOCAL_CONTROL_API_PORT": str(self.ports[1]),
        }

    def call(self, *args: str) -> str:
        done = subprocess.run(  # from a neutral folder: the daemon inherits it, and a checkout there would be imported
            [str(BIN / "flwr"), *args], cwd=self.home, env=self.environment, capture_output=True, text=True, timeout=240
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def run(self, app: Path, config: RunConfig, out: Path) -> tuple[str, str]:
        """(status, log) of one run of the app in `app`."""
        settings = {k: v for k, v in flat(config).items() if v != flat(RunConfig())[k]} | {"out": str(out)}
        words = " ".join(f"{k}={json.dumps(v)}" for k, v in settings.items())
        federation = ("@none/default", "local-simulation")
        self.call(
            "federation",
            "simulation-config",
            *federation,
            "--num-supernodes",
            str(config.rounds.clients),
            "--client-resources-num-cpus",
            "1",
        )
        said = self.call("run", str(app), "local-simulation", "--format", "json", "--run-config", words)
        number = str(json.loads(said)["run-id"])
        end = time.monotonic() + 240
        while time.monotonic() < end:
            listed = json.loads(self.call("list", "local-simulation", "--run-id", number, "--format", "json"))
            status = str(listed["runs"][0]["status"])
            if status.startswith("finished"):
                return status, self.call("log", number, "local-simulation", "--show")
            time.sleep(1)
        raise AssertionError(f"run {number} has not ended: {self.call('log', number, 'local-simulation', '--show')}")


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


@pytest.fixture
def flower(tmp_path: Path) -> Iterator[Flower]:
    home = tmp_path / "home"
    home.mkdir()
    (home / "config.toml").write_text(
        '[superlink]\ndefault = "local-simulation"\n[superlink.local-simulation]\naddress = ":local-in-memory:"\n'
    )
    made = Flower(home, (_free_port(), _free_port()))
    yield made
    _end(made)


def _end(flower: Flower) -> None:
    """End every process that carries this home in its environment."""
    mark = f"FLWR_HOME={flower.home}".encode()
    for process in Path("/proc").iterdir():
        if not process.name.isdigit() or int(process.name) == os.getpid():
            continue
        try:
            if mark in (process / "environ").read_bytes().split(b"\0"):
                os.kill(int(process.name), signal.SIGKILL)
        except (OSError, ProcessLookupError):
            continue  # it is gone, or not ours


@pytest.mark.parametrize("method", ["flora", "ffa-lora"])
def test_same_adapter_under_flower_and_in_process(method: str, flower: Flower, tmp_path: Path) -> None:
    config = load_config(None, [*SMALL, f"method.name={method}"])
    status, log = flower.run(ROOT, config, tmp_path / "flower")
    assert status == "finished:completed", log
    open_run(tmp_path / "here", config)
    simulate(config, tmp_path / "here", notify=lambda event: None)
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        theirs, ours = (tmp_path / side / "adapter" / name for side in ("flower", "here"))
        assert theirs.read_bytes() == ours.read_bytes()


def test_a_client_from_another_checkout_refuses(flower: Flower, tmp_path: Path) -> None:
    """The daemon is started inside another checkout, whose `clients` and `fedlora` the pool's workers then import."""
    other = tmp_path / "other"
    for package in ("clients", "fedlora", "server", "strategies"):
        shutil.copytree(ROOT / package, other / package, ignore=shutil.ignore_patterns("__pycache__"))
    app = other / "clients" / "app.py"
    app.write_text(app.read_text() + "\n# another version\n")
    flower.home = flower.home  # the home stays neutral; only the working directory of the daemon changes
    config = load_config(None, SMALL)
    object.__setattr__(flower, "call", _from(other, flower))
    status, log = flower.run(ROOT, config, tmp_path / "flower")
    assert status != "finished:completed"
    assert re.search(r"the server runs fedlora code \w+ and this client runs \w+", log), log


def _from(folder: Path, flower: Flower):  # type: ignore[no-untyped-def]
    def call(*args: str) -> str:
        done = subprocess.run(
            [str(BIN / "flwr"), *args], cwd=folder, env=flower.environment, capture_output=True, text=True, timeout=240
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    return call
