"""`fedlora node`: the node's worker and Flower's SuperNode with its executor, started, watched, started again, stopped.

The worker holds all that is private. SuperNode, executor and the processes that the executor starts for every message
hold the key that lets the node in at the SuperLink, and pass messages on.
"""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any, Final

from fedlora.deploy import NodeFile
from fedlora.errors import FedLoRAError
from fedlora.pki import load_certificate, load_private_key, load_public_key, node_id
from fedlora.processes import (
    Died,
    Notify,
    Program,
    Programs,
    flower_environment,
    private_folder,
    program_path,
    secret_file,
)

__all__ = ["PARTS", "serve"]

PARTS: Final = ("both", "worker", "relay")
_START: Final = 300.0  # seconds in which the worker must listen
_LOOK: Final = 0.5


def serve(node: NodeFile, path: Path, *, part: str, notify: Notify) -> None:
    """Run a node until SIGTERM or SIGINT. `worker` and `relay` of `PARTS` are its halves, for two users of a machine.

    Raises: FedLoRAError for keys that are wrong, and for a program that dies again and again; all is stopped then.
    """
    stopped: list[int] = []

    def stop(number: int, frame: FrameType | None) -> None:
        stopped.append(number)

    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    programs = Programs(restarts=node.restarts, notify=notify)
    try:
        if part != "relay":
            _start_worker(node, path.resolve(), programs, stopped)
        if part != "worker" and not stopped:
            _start_relay(node, programs)
        if not stopped:
            notify({"event": "serving", "part": part, "server": node.server})
        while not stopped:
            programs.look()
            time.sleep(_LOOK)
    finally:
        programs.stop()
        for number, handler in before.items():
            signal.signal(number, handler)


def _start_worker(node: NodeFile, path: Path, programs: Programs, stopped: Sequence[int]) -> None:
    signing = load_private_key(node.keys / "signing.key", "ed25519")
    load_public_key(node.keys / "operator.pub", "ed25519")
    private_folder(node.memory)
    _state(node)
    node.meeting.unlink(missing_ok=True)
    programs.start(
        Program(
            name="worker",
            command=[sys.executable, "-P", "-m", "clients.worker", str(path)],
            log=node.state / "logs" / "worker.log",
            environment={"TOKENIZERS_PARALLELISM": "false"},
        )
    )
    end = time.monotonic() + _START
    while not node.meeting.exists() and not stopped:
        programs.look()
        if time.monotonic() > end:
            raise Died(f"the worker of node {node_id(signing.public_key())[:12]} does not listen; see its log")
        time.sleep(0.1)


def _start_relay(node: NodeFile, programs: Programs) -> None:
    keys, state = node.keys, _state(node)
    load_private_key(keys / "auth.key", "ec")
    ca = load_certificate(keys / "ca.pem")
    if ca.not_valid_after_utc < datetime.now(UTC):
        raise FedLoRAError(f"{keys / 'ca.pem'}: the CA's certificate ended on {ca.not_valid_after_utc:%Y-%m-%d}")
    secret = secret_file(state / "executor.secret")
    environment = flower_environment(private_folder(state / "flower"))

    def start(name: str, command: list[Any]) -> None:
        programs.start(
            Program(
                name=name,
                command=[program_path(str(command[0])), *map(str, command[1:])],
                log=state / "logs" / f"{name}.log",
                environment=environment,
                hint=partial(_hint, state / "logs" / "supernode.log") if name == "supernode" else lambda status: "",
            )
        )

    closed = ["--isolation", "process", "--superexec-auth-secret-file", secret]
    start(
        "supernode",
        [
            *("flower-supernode", "--root-certificates", keys / "ca.pem", "--superlink", node.server),
            *("--auth-supernode-private-key", keys / "auth.key", "--host", "127.0.0.1", "--port", node.port),
            *("--node-config", f'socket="{node.meeting}"', *closed),
        ],
    )
    start(
        "executor",
        [
            *("flower-superexec", "--insecure", "--runtime-api-address", f"127.0.0.1:{node.port}"),
            *("--superexec-auth-secret-file", secret),
        ],
    )


def _state(node: NodeFile) -> Path:
    """The state folder; with a relay group it may be passed through, not read."""
    if node.relay_group is None:
        return private_folder(node.state)
    node.state.mkdir(mode=0o711, parents=True, exist_ok=True)
    return node.state


def _hint(log: Path, status: int) -> str:
    """What the SuperNode's last words mean."""
    last = log.read_bytes()[-4000:].decode(errors="replace")
    if "CERTIFICATE_VERIFY_FAILED" in last:
        return "the server's certificate is not of the CA in this node's keys, or not for the name in `server`"
    if "Failed to activate" in last:
        return "the server does not know this node's auth.key yet, or it was revoked; it is tried again"
    if "address already in use" in last.lower():
        return "its port is taken: give `port` another number"
    return f"see {log}"
