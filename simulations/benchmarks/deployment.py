"""A whole deployment in one folder: keys, settings, `fedlora server` and `fedlora node` as processes, their logs.

It drives the real programs and is no test itself. With the `with` block everything that was started has ended, also
what those processes had started.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any

import psutil
from flwr.app import Context, Message

from clients.worker import Worker
from fedlora import pki
from fedlora.deploy import DeployFile, NodeFile, read_deploy, read_node
from fedlora.processes import end_with_parent
from fedlora.report.log import read_log
from fedlora.shared_settings import shared_settings
from server.app import open_run, run
from server.channel import Signed
from server.deployed import run_settings, trusted_keys
from server.exchange import pack, unpack
from simulations.engine import LocalGrid

__all__ = ["Deployment", "TooLate", "free_ports", "toml", "undisturbed"]

ROOT = Path(__file__).resolve().parents[2]
FEDLORA = Path(sys.executable).parent / "fedlora"
_PAUSE = 0.2
_GRACE = 40.0  # seconds in which a program that was told to end has to
TINY: Mapping[str, object] = {
    "seed": 5,
    "training.local_steps": 1,
    "training.batch_size": 2,
    "evaluation.every": 0,
    "evaluation.server": False,
    "rounds.deadline": 300,
}
OWN: Mapping[str, object] = {
    "seed": 5,
    "data.rows_per_client": 6,
    "data.skills": "date_iso",
    "training.threads": 1,
    "evaluation.batch_size": 2,
}


class TooLate(AssertionError):
    """Something did not happen in time; the message ends with the logs."""


class Deployment:
    """Nodes `{name: rank}` and one server in `folder`; `settings` of the run by dotted key, on top of tiny ones."""

    def __init__(self, folder: Path, nodes: Mapping[str, int], settings: Mapping[str, object]) -> None:
        self.folder = folder.resolve()
        self.nodes = dict(nodes)
        self.settings = {**TINY, "rounds.clients": len(nodes), **settings}
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self._seen: set[psutil.Process] = set()
        self.environment = {
            **{k: v for k, v in os.environ.items() if not k.startswith(("FLWR_", "FEDLORA_"))},
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
        }

    def make(self, *, own: Mapping[str, object] | None = None) -> None:
        """Write keys, `deploy.toml`, `run.toml` and a `node-NAME.toml` for each node; ports are free ones."""
        self.folder.mkdir(parents=True, exist_ok=True)
        now = datetime.now(UTC)
        pki.init(self.folder / "keys", names=["localhost"], addresses=["127.0.0.1"], at=now)
        port, *ports = free_ports(1 + len(self.nodes))
        self.write_run("run")
        (self.folder / "deploy.toml").write_text(
            f'settings = "run.toml"\nfolder = "run"\nkeys = "keys"\nhost = "127.0.0.1"\nport = {port}\nmetrics = 0\n'
            "restarts = 1000\n"
        )
        for i, (name, rank) in enumerate(self.nodes.items()):
            pki.node(self.folder / "keys", name, at=now)
            shutil.move(self.folder / "keys" / "nodes" / name, self.folder / f"keys-{name}")
            self.node_path(name).write_text(
                f'server = "127.0.0.1:{port}"\nkeys = "keys-{name}"\nmemory = "memory-{name}"\nstate = "state-{name}"\n'
                f"rank = {rank}\nport = {ports[i]}\nshare = [{i}, {len(self.nodes)}]\nrestarts = 1000\n\n[settings]\n"
                + toml({**OWN, **(own or {})})
            )

    def write_run(self, name: str) -> None:
        """The settings, for the run folder `name`, which the next server conducts."""
        (self.folder / "run.toml").write_text(toml(self.settings))
        deploy = self.folder / "deploy.toml"
        if deploy.exists():
            lines = [f'folder = "{name}"' if x.startswith("folder") else x for x in deploy.read_text().splitlines()]
            deploy.write_text("\n".join(lines) + "\n")

    def node_path(self, name: str) -> Path:
        return self.folder / f"node-{name}.toml"

    @property
    def deploy(self) -> DeployFile:
        return read_deploy(self.folder / "deploy.toml")

    def node(self, name: str) -> NodeFile:
        return read_node(self.node_path(name))

    def id_of(self, name: str) -> str:
        """The stable id of a node."""
        return next(node.id for node in pki.registry(self.folder / "keys", revoked=True) if node.name == name)

    def start_server(self) -> None:
        self.start("server", [str(FEDLORA), "server", "--config", str(self.folder / "deploy.toml")])

    def start_node(self, name: str, *, part: str = "both", environment: Mapping[str, str] | None = None) -> None:
        """`fedlora node`, as a process called NAME; the halves are called NAME-worker and NAME-relay."""
        words = [str(FEDLORA), "node", "--config", str(self.node_path(name)), "--part", part]
        self.start(name if part == "both" else f"{name}-{part}", words, environment=environment)

    def start(self, name: str, command: Sequence[str], *, environment: Mapping[str, str] | None = None) -> None:
        """Start any program; what it says goes to the log `name`."""
        with (self.folder / f"{name}.log").open("ab") as log:
            self._processes[name] = subprocess.Popen(
                list(command),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**self.environment, **(environment or {})},
                cwd="/",
                preexec_fn=end_with_parent,
            )

    def flwr(self, *words: str) -> dict[str, Any]:
        """What `flwr WORDS --format json` says, over the server's own connection."""
        environment = {**self.environment, "FLWR_HOME": str(self.deploy.state / "flower")}
        environment |= {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1"}
        program = str(FEDLORA.parent / "flwr")
        done = subprocess.run(
            [program, *words, "--format", "json"],
            env=environment,
            cwd="/",
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        start = done.stdout.find("{")
        return dict(json.loads(done.stdout[start:])) if start >= 0 else {"error": done.stdout + done.stderr}

    def log(self, name: str) -> str:
        """All that a process said."""
        path = self.folder / f"{name}.log"
        return path.read_text(errors="replace") if path.exists() else ""

    def logs(self) -> str:
        """Every log there is, its end; for people who look for the reason of a failure."""
        paths = [*self.folder.glob("*.log"), *self.folder.glob("state*/logs/*")]
        return "\n".join(f"--- {p.relative_to(self.folder)}\n{p.read_text(errors='replace')[-3000:]}" for p in paths)

    def events(self, folder: str = "run") -> list[dict[str, Any]]:
        """The run log; empty before there is one."""
        path = self.folder / folder
        return [dict(event) for event in read_log(path)] if (path / "metrics.jsonl").exists() else []

    def journal(self) -> list[dict[str, Any]]:
        """`logs/run.jsonl` of the server: every step of all its runs."""
        path = self.deploy.state / "logs" / "run.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def status(self, name: str) -> int | None:
        """The exit status of a process, None while it runs."""
        return self._processes[name].poll()

    def wait(self, what: str, happened: Callable[[], Any], *, seconds: float) -> Any:
        """The first truthy value of `happened()`. Raises: TooLate with the logs after `seconds`."""
        end = time.monotonic() + seconds
        while True:
            self._look()
            found = happened()
            if found:
                return found
            if time.monotonic() > end:
                raise TooLate(f"{what}: not within {seconds:g} s\n{self.logs()}")
            time.sleep(_PAUSE)

    def wait_for_end(self, name: str, *, seconds: float) -> int:
        """The exit status of a process that is about to end."""
        self.wait(f"the end of {name}", lambda: self.status(name) is not None, seconds=seconds)
        status = self.status(name)
        assert status is not None
        return status

    def children(self, name: str, word: str) -> list[psutil.Process]:
        """The processes below `name` whose command line has `word`."""
        found = []
        with contextlib.suppress(psutil.Error):
            for child in psutil.Process(self._processes[name].pid).children(recursive=True):
                with contextlib.suppress(psutil.Error):
                    if any(word in part for part in child.cmdline()):
                        found.append(child)
        return found

    def end(self, name: str) -> None:
        """SIGTERM to one of our processes, and wait; SIGKILL if that does not help."""
        process = self._processes.pop(name, None)
        if process is None:
            return
        self._look(process)
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
        try:
            process.wait(_GRACE)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    def stop(self) -> None:
        """End everything that was started here, the server first, and what that had started."""
        self._look()
        for name in sorted(self._processes, key=lambda n: n != "server"):
            self.end(name)
        for child in self._seen:
            with contextlib.suppress(psutil.Error):
                child.kill()  # of psutil: not if the number is another process's by now
        self._seen.clear()

    def __enter__(self) -> Deployment:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.stop()

    def _look(self, *processes: subprocess.Popen[bytes]) -> None:
        """Remember what our processes have started: a child that outlives its parent is nobody's."""
        for process in processes or self._processes.values():
            with contextlib.suppress(psutil.Error):
                self._seen.update(psutil.Process(process.pid).children(recursive=True))


def free_ports(count: int) -> list[int]:
    """TCP ports of this machine that nobody listens on now."""
    with ExitStack() as held:
        sockets = [held.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [int(one.getsockname()[1]) for one in sockets]


def toml(settings: Mapping[str, object]) -> str:
    """Dotted keys and scalars as TOML."""
    return "".join(f"{key} = {json.dumps(value)}\n" for key, value in settings.items())


def undisturbed(
    deployment: Deployment, folder: Path, *, answer: Callable[[str, Worker, bytes], bytes] | None = None
) -> Path:
    """Conduct the same run in this process, without Flower's processes, into `folder`/run; returns its adapter.

    The real conductor and the real workers, over the same signed messages, with memories of their own under `folder`.
    `answer(name, worker, ask)` may answer in a worker's place, or raise where its node says nothing.
    """
    nodes = {}
    for name in deployment.nodes:
        own = {"memory": folder / f"memory-{name}", "state": folder / f"state-{name}"}
        nodes[name] = Worker(deployment.node(name).model_copy(update=own))
    names = sorted(nodes)

    def reply(message: Message, context: Context) -> Message:
        name = names[int(context.node_config["partition-id"])]
        data = unpack(message.content)
        said = nodes[name].answered(data) if answer is None else answer(name, nodes[name], data)
        return Message(pack(said), reply_to=message)

    deploy = deployment.deploy
    config = run_settings(deploy)
    open_run(folder / "run", config)
    operator = pki.load_private_key(deploy.keys / "operator.key", "ed25519")
    return run(
        LocalGrid(reply, clients=len(names), run_config={}),
        config,
        folder / "run",
        evaluator=None,
        notify=lambda event: None,
        signing_key=operator,
        channel=Signed(operator, lambda: trusted_keys(deploy), settings=shared_settings(config)),
        durable=True,
    )
