"""The ServerApp of a deployment: conducts the run of `deploy.toml` over signed messages, and says how it ended.

Started by Flower's executor, which `fedlora server` starts with FEDLORA_DEPLOY naming the file.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import time
import traceback
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from flwr.app import Context
from flwr.serverapp import Grid, ServerApp
from flwr.supercore.inflatable.inflatable_utils import ObjectPushError
from httpx import HTTPError

from fedlora.config import RunConfig, load_config
from fedlora.continual.tasks import client_list
from fedlora.deploy import DeployFile, read_deploy
from fedlora.errors import ConfigError, FedLoRAError, RoundFailed
from fedlora.pki import load_private_key, registry
from fedlora.processes import end_with_parent
from fedlora.report.html import write_report
from fedlora.shared_settings import shared_settings
from fedlora.watching import CONDUCTOR, ENDED, JOURNAL
from server.app import open_run, own_evaluators, require_same_settings, run
from server.channel import Signed
from server.checkpoint import write_atomic
from server.exchange import bound_pulls

__all__ = [
    "CONDUCTOR",
    "ENDED",
    "JOURNAL",
    "VARIABLE",
    "Journal",
    "Outcome",
    "app",
    "conduct",
    "read_outcome",
    "run_settings",
    "write_outcome",
]

VARIABLE: Final = "FEDLORA_DEPLOY"
_TOLD: Final[Mapping[str, tuple[str, ...]]] = {
    "conducting": ("run",),
    "waiting": ("online", "wanted"),
    "start": ("clients", "rounds", "done", "strikes"),
    "round": ("round", "clients"),
    "answer": ("kind", "round", "client"),
    "refused": ("client", "rule", "strikes"),
    "retry": ("round",),
    "again": ("round", "client"),
    "quarantine": ("client", "rule"),
    "closed": ("round",),
    "personal": ("clients",),
    "done": ("seconds",),
}  # event -> what is told of it
_LOCK_PATIENCE = 60.0  # seconds for a process that conducted this run before to let go

app = ServerApp()


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a run ended: `done`, `paused` (mend something, then start again) or `failed`; `pid` is the process that says
    so: the conductor, or the server that gave up."""

    state: str
    detail: str
    pid: int


@app.main()
def main(grid: Grid, context: Context) -> None:
    end_with_parent()
    deploy = read_deploy(Path(os.environ[VARIABLE]))
    write_atomic(deploy.state / CONDUCTOR, str(os.getpid()).encode())
    try:
        adapter = conduct(grid, deploy)
    except RoundFailed as error:
        _end(deploy, "paused", str(error))
    except FedLoRAError as error:
        _end(deploy, "failed", str(error))
    except (HTTPError, ObjectPushError):  # the SuperLink is gone or was restarted: the server submits the run again
        raise
    except Exception:
        _end(deploy, "failed", traceback.format_exc())
        raise
    else:
        _end(deploy, "done", str(adapter))


def conduct(grid: Grid, deploy: DeployFile) -> Path:
    """Conduct the run over `grid`, or go on with it, and return the folder of its adapter.

    Raises: FedLoRAError as `server.app.run`; ConfigError if another process has the run folder.
    """
    config = run_settings(deploy)
    operator = load_private_key(deploy.keys / "operator.key", "ed25519")
    if not (deploy.folder / "config.toml").is_file():
        open_run(deploy.folder, config)
        deploy.folder.chmod(0o700)  # its log has measures of single clients
    require_same_settings(deploy.folder, config)
    journal = Journal(deploy.state)
    with _alone(deploy.folder):
        journal({"event": "conducting", "run": (deploy.folder / "run-id").read_text().strip()})
        channel = Signed(operator, lambda: trusted_keys(deploy), settings=shared_settings(config))
        one, several = own_evaluators(config)
        bound_pulls(config.rounds.deadline)
        adapter = run(
            grid,
            config,
            deploy.folder,
            evaluator=one,
            notify=journal,
            tasks_evaluator=several,
            signing_key=operator,
            channel=channel,
            durable=True,
        )
        write_report(deploy.folder)
        return adapter


def run_settings(deploy: DeployFile) -> RunConfig:
    """The run's settings, with the ids of nodes where tasks name them. Raises: ConfigError for an unknown node."""
    config = load_config(deploy.settings)
    if config.attack.kind != "none":
        raise ConfigError("attack.kind: only fedlora simulate and compare have hostile clients")
    ids = {node.name: node.id for node in registry(deploy.keys)}
    tasks = []
    for task in config.tasks:
        if "clients" in task:
            names = client_list(task["clients"])
            if lost := [n for n in names if n not in ids and n not in ids.values()]:
                raise ConfigError(
                    f"tasks, {task['name']}: clients names {', '.join(lost)}, and enrolled are {', '.join(ids)}"
                )
            task = {**task, "clients": json.dumps([ids.get(n, n) for n in names])}
        tasks.append(task)
    return config.model_copy(update={"tasks": tuple(tasks)})


def trusted_keys(deploy: DeployFile) -> Mapping[str, Ed25519PublicKey]:
    """id -> key of the nodes that are enrolled and not revoked, as nodes.json says now."""
    return {node.id: node.signing_key for node in registry(deploy.keys)}


def read_outcome(deploy: DeployFile) -> Outcome | None:
    """How the run ended, or None if it has not since `fedlora server` was started."""
    try:
        return Outcome(**json.loads((deploy.state / ENDED).read_text()))
    except FileNotFoundError:
        return None


def write_outcome(deploy: DeployFile, state: str, detail: str) -> None:
    """Note how the run ended, for the server and `fedlora status`. Raises: CheckpointError if it cannot be written."""
    outcome = {"state": state, "detail": detail, "pid": os.getpid()}
    write_atomic(deploy.state / ENDED, json.dumps(outcome).encode())


def _end(deploy: DeployFile, state: str, detail: str) -> None:
    write_outcome(deploy, state, detail)
    print(f"{state}: {detail}", flush=True)


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Hold the run folder, so that no two processes conduct one run. Raises: ConfigError if it is held."""
    end = time.monotonic() + _LOCK_PATIENCE
    with (folder / "lock").open("w") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > end:
                    raise ConfigError(f"{folder} is being conducted by another process; stop that first") from None
                time.sleep(0.2)
        yield


class Journal:
    """`logs/run.jsonl` in the state folder: one line of JSON for every step, with its time; no measures of clients.

    It is for people and for `fedlora status`; what a run must remember is in its own folder.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / "logs" / JOURNAL

    def __call__(self, event: Mapping[str, Any]) -> None:
        kind = event["event"]
        if kind not in _TOLD:
            return
        told = {"time": datetime.now(UTC).isoformat(timespec="milliseconds"), "event": kind}
        line = json.dumps({**told, **{key: event[key] for key in _TOLD[kind]}}, ensure_ascii=True)
        self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with self._path.open("a") as file:
            file.write(line + "\n")
