"""The worker of a deployed node: one process that stays, with the base in memory, the data, the keys and the memory.

python -m clients.worker NODE.TOML            (`fedlora node` starts and watches it)

It listens on a Unix socket that only its user (or one group) may use, and does what the operator signed and nothing
else. The code that runs is what is installed here; an ask from a server that runs other code is refused by name.
"""

from __future__ import annotations

import contextlib
import grp
import logging
import os
import signal
import socketserver
import sys
import threading
from functools import lru_cache
from pathlib import Path
from types import FrameType
from typing import Any

from clients.answer import Client, refusal, respond
from clients.framing import ANSWERED, REFUSED, receive_bytes, receive_length, send
from clients.memory import Memory
from clients.private import Budget, NotPrivate
from clients.resident import encoded, resident_base
from clients.sums import RoundOver
from fedlora.code import code_digest
from fedlora.config import RunConfig
from fedlora.continual.tasks import JOINT
from fedlora.data.rows import TokenRow
from fedlora.deploy import NodeFile, read_node
from fedlora.envelope import ASK_OVERHEAD, EnvelopeError, SignedAsk, open_ask, sign_answer
from fedlora.errors import (
    BaseMismatch,
    BlocksMissing,
    CodeMismatch,
    ConfigError,
    DataError,
    FedLoRAError,
    WireError,
)
from fedlora.pki import load_private_key, load_public_key, node_id, registry
from fedlora.privacy.ledger import BudgetSpent
from fedlora.privacy.secagg.refusal import Refused
from fedlora.shared_settings import merged
from fedlora.state import Ask, Header
from fedlora.wire import decode_ask

_log = logging.getLogger("fedlora.worker")
_GREETING = 5.0  # seconds in which a relay must say how long its ask is
_READING = 60.0  # seconds in which it must hand the ask over, and take the answer
_AT_ONCE = 4  # asks that are held at a time; further ones wait, and a connection that says nothing holds none
MAX_BYTES = 2_000_000_000  # of an ask, where the node's settings do not say wire.max_bytes


class NotAllowed(FedLoRAError):
    """What this node does not do, whoever signs it."""


_TOLD = (
    *(BaseMismatch, BlocksMissing, BudgetSpent, CodeMismatch, NotAllowed, NotPrivate, Refused, RoundOver),
)  # errors whose words hold no data


class Worker:
    """Answers signed asks for one node. `answered` is called from one thread at a time."""

    def __init__(self, node: NodeFile) -> None:
        self._node = node
        self._key = load_private_key(node.keys / "signing.key", "ed25519")
        self._operator = load_public_key(node.keys / "operator.pub", "ed25519")
        self.id = node_id(self._key.public_key())
        self.max_bytes = int(node.settings.get("wire.max_bytes", MAX_BYTES))
        self._lock = threading.Lock()

    def answered(self, data: bytes) -> bytes:
        """The signed answer to one signed ask; also one that says why there is none.

        Raises: EnvelopeError if the operator did not sign it; WireError if what was signed is no ask.
        """
        ask = open_ask(data, self._operator, max_bytes=self.max_bytes)
        header, decoded = decode_ask(ask.payload, max_bytes=self.max_bytes)
        with self._lock:
            return self._answered(ask, header, decoded)

    def _answered(self, ask: SignedAsk, header: Header, decoded: Ask) -> bytes:
        layout = ""
        try:
            client = self._client(decoded)
            if header.kind != "hello":
                require_within(decoded, self._node, header)
                self._require_fresh(header)
                layout = client.base().layout.digest
            payload = respond(client, header, decoded, ask.payload)
        except FedLoRAError as error:
            _log.warning("round %d, %s: refused: %s: %s", header.round, header.kind, type(error).__name__, error)
            payload = refusal(header, error, quiet=not isinstance(error, _TOLD))
        else:
            _log.info("round %d, %s: answered, %d bytes", header.round, header.kind, len(payload))
        return sign_answer(payload, ask, header, layout, self._key)

    def _client(self, ask: Ask) -> Client:
        config = self._settings(ask.settings)
        limits, part, own = self._node.limits, self._node.share[0], {task.name for task in self._node.tasks}

        def rows(task: str, again: bool = True) -> tuple[list[TokenRow], list[TokenRow]]:
            if task and not (own if task == JOINT else task in own):
                raise DataError(f"this node has no rows of task {task}; it has {', '.join(sorted(own)) or 'no tasks'}")
            return encoded(config, part, task, again=again, has=own)

        return Client(
            id=self.id,
            rank=self._node.rank,
            config=config,
            base=lambda: resident_base(config.model),
            rows=rows,
            measured=lambda task: rows(task, again=False)[0],
            memory=self._node.memory,
            key=lambda: self._key,
            trusted=self._peers(),
            budget=None
            if limits.epsilon is None
            else Budget(epsilon=limits.epsilon, delta=limits.delta, unit=limits.unit),
        )

    def _peers(self) -> frozenset[str] | None:
        """The ids in this node's own list of nodes, read anew each time; None where it has none."""
        if self._node.peers is None:
            return None
        return frozenset(node.id for node in registry(self._node.peers))

    @lru_cache(maxsize=4)  # noqa: B019  one worker a process
    def _settings(self, told: str) -> RunConfig:
        tasks = {task.name: task.settings for task in self._node.tasks}
        return merged(told, self._node.settings, tasks, shares=self._node.share[1])

    def _require_fresh(self, header: Header) -> None:
        """Refuse an ask of a round before the last one that was answered: it was kept by somebody and sent again."""
        memory = Memory(self._node.memory, header.run, self.id)
        last = memory.last_round()
        if header.round < last:
            raise NotAllowed(
                f"round {header.round} is over: this node answered round {last} of run {header.run} already. If the "
                "server was set back to an older state, begin a new run."
            )
        if header.round > last:
            memory.note_round(header.round)


def require_within(ask: Ask, node: NodeFile, header: Header) -> None:
    """Refuse what the node's own limits do not allow. Raises: NotAllowed naming the limit."""
    limits, plan = node.limits, ask.plan
    if header.kind == "measure" and not limits.measure:
        raise NotAllowed("limits.measure: this node gives no sums of inputs, features or gradients")
    if plan is None:
        return
    training = plan.training
    wanted: list[tuple[str, Any, Any]] = [
        ("rank", plan.rank, limits.rank),
        ("local_steps", training.local_steps, limits.local_steps),
        ("local_epochs", training.local_epochs, limits.local_epochs),
    ]
    for name, asked, most in wanted:
        if asked is not None and most is not None and asked > most:
            raise NotAllowed(f"limits.{name}: this node does at most {most:g}, the operator asks for {asked:g}")


class _Handler(socketserver.BaseRequestHandler):
    server: _Server

    def handle(self) -> None:
        with contextlib.ExitStack() as held:
            try:
                most = self.server.worker.max_bytes + ASK_OVERHEAD
                length = receive_length(self.request, max_bytes=most, seconds=_GREETING)
                held.enter_context(self.server.slots)
                data = receive_bytes(self.request, length, seconds=_READING)
                status, said = ANSWERED, self.server.worker.answered(data)
            except (EnvelopeError, WireError) as error:
                _log.warning("refused an ask: %s", error)
                status, said = REFUSED, str(error).encode()
            except OSError as error:
                _log.warning("a relay went away: %s", error)
                return
            except Exception as error:  # a defect: the relay hears its type, the log everything; the worker stays
                _log.exception("an ask failed")
                status, said = REFUSED, f"the worker failed: {type(error).__name__}; see its log".encode()
            try:
                self.request.settimeout(_READING)
                send(self.request, said, status)
            except OSError as error:  # asked again, it gets what was remembered
                _log.warning("the relay did not wait for the answer: %s", error)


class _Server(socketserver.ThreadingUnixStreamServer):
    daemon_threads = True
    request_queue_size = 64

    def __init__(self, worker: Worker, where: Path) -> None:
        self.worker = worker
        self.slots = threading.BoundedSemaphore(_AT_ONCE)
        super().__init__(str(where), _Handler)


def serve(node: NodeFile) -> None:
    """Listen until SIGTERM or SIGINT. Raises: ConfigError for a group that is not there; PkiError for keys."""
    worker = Worker(node)
    where = node.meeting
    node.memory.mkdir(mode=0o700, parents=True, exist_ok=True)
    where.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    where.unlink(missing_ok=True)
    before = os.umask(0o177)
    try:
        server = _Server(worker, where)
    finally:
        os.umask(before)
    if node.relay_group is not None:
        _open_to(where, node.relay_group)

    def stop(number: int, frame: FrameType | None) -> None:
        threading.Thread(target=server.shutdown, daemon=True).start()

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    code = Path(__file__).resolve().parents[1]  # the server hears its digest alone
    _log.info("node %s with code %s of %s listens at %s", worker.id[:12], code_digest()[:12], code, where)
    with server:
        server.serve_forever(poll_interval=0.2)
    where.unlink(missing_ok=True)


def _open_to(where: Path, group: str) -> None:
    """Let one group use the socket, and no more than that of the folders above it."""
    try:
        number = grp.getgrnam(group).gr_gid
    except KeyError:
        raise ConfigError(f"relay_group: this machine has no group {group!r}") from None
    for path, mode in ((where.parent, 0o710), (where, 0o660)):
        os.chown(path, -1, number)
        path.chmod(mode)


def main() -> None:
    """Serve the node of the file that the command line names; an error of ours is one line and exit status 1."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    try:
        serve(read_node(Path(sys.argv[1])))
    except FedLoRAError as error:
        _log.error("%s", error)
        sys.exit(1)


if __name__ == "__main__":
    main()
