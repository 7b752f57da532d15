"""`fedlora server`: Flower's SuperLink and executor, started closed and restart-proof; the nodes registered; the run
submitted, watched, and submitted again after a crash, until its adapter is there. Every closed round is told.

Closed: TLS, node authentication, an executor with a shared secret. Restart-proof: the executor is a process of its own
and the SuperLink keeps a database, so either may die; the conductor goes on from its newest checkpoint and from the
answers that it had accepted.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType
from typing import Any, Final

from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from fedlora.bundle import write_bundle
from fedlora.config import task_config
from fedlora.continual.tasks import task_names
from fedlora.data import test_rows
from fedlora.deploy import DeployFile
from fedlora.errors import FedLoRAError
from fedlora.pki import WARNING, Node, load_certificate, load_private_key, registry, require_valid
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
from fedlora.tail import Tail
from fedlora.watched_events import Steps
from fedlora.watching import JOURNAL, MISSING, PROGRAMS, alive, programs_record
from server.checkpoint import write_atomic
from server.deployed import CONDUCTOR, ENDED, VARIABLE, Outcome, read_outcome, run_settings, write_outcome
from server.watch import endpoint

__all__ = ["Serving", "serve"]

CONNECTION: Final = "fedlora"
_START: Final = 300.0  # seconds in which the SuperLink must listen; a busy machine takes long to import it
_LOOK: Final = 0.5  # seconds between looks
_ASK_FLOWER: Final = 120.0  # seconds between asking Flower whether the run still runs
_FLOWER: Final = 120.0  # seconds in which `flwr` must have answered
_TOLD: Final[Mapping[str, tuple[str, ...]]] = {
    "waiting": ("event", "online", "wanted"),
    "start": ("event", "clients", "rounds", "done"),
    "retry": ("event", "round"),
}  # event of the journal -> what is told of it


class _Told:
    """What is told of a run, from its journal: for whom it waits, its start, and each round that is repeated or closed.

    `new` are events for `Notify`; whoever tells them empties it.
    """

    def __init__(self) -> None:
        self.new: list[dict[str, Any]] = []
        self._steps = Steps()
        self._rounds = 0
        self._answered: set[str] = set()
        self._before: Counter[str] = Counter()  # refusals when the last round closed

    def take(self, event: Any) -> None:
        """Keep one line. Raises: what `fedlora.tail` takes to say that it is none."""
        self._steps.take(event)
        kind = event["event"]
        if kind in ("waiting", "start", "retry"):
            self.new.append({key: event[key] for key in _TOLD[kind]})
        if kind == "start":
            self._rounds = int(event["rounds"])
        elif kind in ("round", "retry"):
            self._answered = set()
        elif kind == "answer" and event["kind"] in ("train", "secure"):
            self._answered.add(str(event["client"]))
        elif kind == "closed":
            self.new.append(self._closed(int(event["round"])))

    def _closed(self, number: int) -> dict[str, Any]:
        refused, self._before = self._steps.refusals - self._before, self._steps.refusals.copy()
        told: dict[str, Any] = {"event": "closed", "round": f"{number}/{self._rounds}"}
        told["clients"] = f"{len(self._answered)}/{self._steps.asked}"
        if self._steps.since is not None and self._steps.last is not None:
            told["seconds"] = f"{(self._steps.last - self._steps.since).total_seconds():.1f}"
        for what, rules in (("missing", refused.keys() & MISSING), ("refused", refused.keys() - MISSING)):
            if rules:
                told[what] = ", ".join(f"{rule} {refused[rule]}" for rule in sorted(rules))
        return told


class Serving:
    """The server's programs and its run. `notify` hears of every step."""

    def __init__(self, deploy: DeployFile, path: Path, *, notify: Notify) -> None:
        self._deploy = deploy
        self._path = path.resolve()
        self._notify = notify
        self._home = deploy.state / "flower"
        self._at = f"{deploy.address}:{deploy.port}"
        self._environment = flower_environment(self._home) | {VARIABLE: str(self._path)}
        self._programs = Programs(restarts=deploy.restarts, notify=notify)
        self._run = 0  # Flower's id of the run that was submitted last
        self._asked = 0.0
        self._resubmitted: list[float] = []
        self._noted: dict[str, int] = {}  # what programs.json says
        self._journal = Tail(deploy.state / "logs" / JOURNAL, _Told)

    def check(self) -> None:
        """Refuse to start with wrong keys, certificates or settings. Raises: FedLoRAError naming what is wrong."""
        keys, now = self._deploy.keys, datetime.now(UTC)
        ca, certificate = load_certificate(keys / "ca.pem"), load_certificate(keys / "server.pem")
        require_valid(certificate, ca=ca, at=now, names=[self._deploy.address])
        load_private_key(keys / "server.key", "ec")
        load_private_key(keys / "operator.key", "ed25519")
        left = certificate.not_valid_after_utc - now
        if left < WARNING:
            self._notify({"event": "expiring", "days": left.days})
        config = run_settings(self._deploy)
        for name in task_names(config) or ("",) if config.evaluation.server else ():
            test_rows(task_config(config, name))
        enrolled = registry(keys)
        if len(enrolled) < config.rounds.clients:
            raise FedLoRAError(
                f"{self._deploy.settings}: rounds.clients is {config.rounds.clients}, and {len(enrolled)} nodes are "
                f"enrolled in {keys}: `fedlora pki node {keys} NAME` for each, or lower rounds.clients"
            )

    def start(self) -> None:
        """Start Flower, register the enrolled nodes, submit the run."""
        keys, state = self._deploy.keys, private_folder(self._deploy.state)
        private_folder(self._home)
        secret = secret_file(state / "executor.secret")
        (self._home / "config.toml").write_text(
            f'[superlink]\ndefault = "{CONNECTION}"\n\n[superlink.{CONNECTION}]\naddress = "{self._at}"\n'
            f"root-certificates = {json.dumps(str(keys / 'ca.pem'))}\n"
        )
        self._journal.look().new.clear()  # of earlier days
        write_bundle(state / "bundle")
        (state / ENDED).unlink(missing_ok=True)
        (state / CONDUCTOR).unlink(missing_ok=True)
        self._note_programs()
        tls = ["--ssl-ca-certfile", keys / "ca.pem", "--ssl-certfile", keys / "server.pem"]
        tls += ["--ssl-keyfile", keys / "server.key"]
        listen = ["--host", self._deploy.host, "--port", str(self._deploy.port)]
        closed = ["--enable-supernode-auth", "--isolation", "process", "--superexec-auth-secret-file", secret]
        kept = ["--database", state / "flower.db", "--disable-runtime-dependency-installation"]
        self._start("superlink", ["flower-superlink", *tls, *listen, *closed, *kept])
        self._wait_for_port()
        self._start(
            "executor",
            [
                *("flower-superexec", "--root-certificates", keys / "ca.pem", "--runtime-api-address", self._at),
                *("--superexec-auth-secret-file", secret),
            ],
        )
        self._register()
        self._submit()

    def watch(self) -> Outcome | None:
        """One look at everything: restart what died, submit the run again if its conductor is gone.

        Returns how the run ended, if it has. Raises: Died if that happens too often.
        """
        self._programs.look()
        self._note_programs()
        outcome = read_outcome(self._deploy)
        self._tell()
        if outcome is not None:
            return outcome
        lost = self._conductor_lost()
        if lost and read_outcome(self._deploy) is None:
            now = time.monotonic()
            self._resubmitted = [t for t in self._resubmitted if now - t < 600.0] + [now]
            if len(self._resubmitted) > self._deploy.restarts:
                raise Died(f"the conductor died {len(self._resubmitted)} times in ten minutes; see {self._log}")
            self._notify({"event": "resubmitted", "reason": lost})
            self._run = 0
        if self._run == 0 and self._listens():
            try:
                self._submit()
            except FedLoRAError as error:  # the SuperLink died meanwhile; it is on its way up again
                self._notify({"event": "unreachable", "detail": str(error)})
        return None

    def _conductor_lost(self) -> str:
        """Why the run needs a new conductor, or nothing: its process is gone, or Flower says that it ended."""
        if self._run == 0:  # known already, and none could be submitted yet
            return ""
        pid = self._deploy.state / CONDUCTOR
        if pid.exists() and not alive(int(pid.read_text())):
            return "its conductor is gone"
        now = time.monotonic()
        if now - self._asked < _ASK_FLOWER:
            return ""
        self._asked = now
        status = self._status()
        return f"Flower says that it {status}" if status.startswith("finished") else ""

    def gave_up(self, error: Exception) -> None:
        """Note for `fedlora status` why nobody conducts the run any more, unless it had ended before."""
        if read_outcome(self._deploy) is not None:
            return
        why = str(error) if isinstance(error, FedLoRAError) else f"{type(error).__name__}: {error}"
        try:
            said = f"the server gave up: {why.rstrip('.')}. Mend that and start it again to go on."
            write_outcome(self._deploy, "failed", said)
        except FedLoRAError as unwritten:
            self._notify({"event": "unrecorded", "detail": str(unwritten)})

    def stop(self) -> None:
        """Stop Flower; the run can be gone on with."""
        self._programs.stop()
        (self._deploy.state / PROGRAMS).unlink(missing_ok=True)

    def running(self) -> dict[str, int]:
        """Program -> process id."""
        return self._programs.running()

    @property
    def _log(self) -> Path:
        return self._deploy.state / "logs" / "executor.log"

    def _start(self, name: str, command: list[Any]) -> None:
        program = Program(
            name=name,
            command=[program_path(str(command[0])), *map(str, command[1:])],
            log=self._deploy.state / "logs" / f"{name}.log",
            environment=self._environment,
        )
        self._programs.start(program)
        self._note_programs()

    def _tell(self) -> None:
        """Tell what the journal has new."""
        told = self._journal.look()
        for event in told.new:
            self._notify(event)
        told.new.clear()

    def _note_programs(self) -> None:
        """`programs.json` in the state folder: what runs, for `fedlora status`; written when that changed."""
        running = {"server": os.getpid(), **self.running()}
        if running != self._noted:
            write_atomic(self._deploy.state / PROGRAMS, programs_record(running))
            self._noted = running

    def _wait_for_port(self) -> None:
        end = time.monotonic() + _START
        while not self._listens():
            self._programs.look()
            if time.monotonic() > end:
                log = self._deploy.state / "logs" / "superlink.log"
                raise Died(f"the SuperLink does not listen at {self._at}; its log is {log}")
            time.sleep(0.2)

    def _listens(self) -> bool:
        """Whether the SuperLink takes connections."""
        try:
            with socket.create_connection((self._deploy.address, self._deploy.port), timeout=1.0):
                return True
        except OSError:
            return False

    def _register(self) -> None:
        """Register the enrolled nodes that Flower does not know, and unregister those that were revoked.

        Flower lists its nodes without names or keys, so which is which is kept here: id -> Flower's number.
        """
        record = self._deploy.state / "registered.json"
        known: dict[str, str] = json.loads(record.read_text()) if record.exists() else {}
        there = {n["node-id"] for n in self._flower("supernode", "list", CONNECTION).get("nodes", [])}
        for node in registry(self._deploy.keys, revoked=True):
            number = known.get(node.id)
            if node.revoked is None and number not in there:
                known[node.id] = self._registered(node)
                self._notify({"event": "registered", "node": node.name})
            elif node.revoked is not None and number in there:
                self._flower("supernode", "unregister", str(number), CONNECTION)
                del known[node.id]  # Flower lists it on
                self._notify({"event": "unregistered", "node": node.name})
            write_atomic(record, json.dumps(known).encode())

    def _registered(self, node: Node) -> str:
        """Flower's number of the node, which it gets now. Raises: FedLoRAError if Flower has its key without a record
        here."""
        key = self._deploy.state / f"{node.name}.pub"
        key.write_bytes(node.auth_key.public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH) + b"\n")
        try:
            return str(self._flower("supernode", "register", str(key), CONNECTION, "--name", node.name)["node-id"])
        except FedLoRAError as error:
            if "already in use" in str(error):
                raise FedLoRAError(
                    f"node {node.name}: Flower's database has its key and {self._deploy.state / 'registered.json'} has "
                    "not: put that file back, or move flower.db away to begin with an empty one"
                ) from error
            raise
        finally:
            key.unlink()

    def _submit(self) -> None:
        (self._deploy.state / CONDUCTOR).unlink(missing_ok=True)
        said = self._flower("run", str(self._deploy.state / "bundle"), CONNECTION)
        self._run = int(said["run-id"])
        self._asked = time.monotonic()
        self._notify({"event": "submitted", "run": self._run})

    def _status(self) -> str:
        try:
            runs = self._flower("list", CONNECTION, "--run-id", str(self._run)).get("runs", [])
        except FedLoRAError as error:  # the SuperLink may be on its way up again
            self._notify({"event": "unreachable", "detail": str(error)})
            return "unknown"
        return str(runs[0]["status"]) if runs else "unknown"

    def _flower(self, *arguments: str) -> dict[str, Any]:
        """What `flwr` says as JSON. Raises: FedLoRAError with its words."""
        try:
            done = subprocess.run(
                [program_path("flwr"), *arguments, "--format", "json"],
                env={**os.environ, **self._environment},
                cwd="/",
                capture_output=True,
                text=True,
                timeout=_FLOWER,
                check=False,
            )
        except subprocess.TimeoutExpired:
            raise FedLoRAError(f"flwr {arguments[0]}: no answer within {_FLOWER:g} s") from None
        text = done.stdout
        try:
            said = json.loads(text[text.index("{") :])
        except ValueError:
            said = {}
        if done.returncode != 0 or said.get("success") is False or not said:
            words = " ".join((done.stderr or text).split())[-800:]
            raise FedLoRAError(f"flwr {arguments[0]}: {said.get('error-message') or words}")
        return dict(said)


def serve(deploy: DeployFile, path: Path, *, notify: Notify, each: Callable[[Serving], None] | None = None) -> Outcome:
    """Serve until the run has ended, or SIGTERM or SIGINT comes; `each` is called at every look.

    Raises: FedLoRAError for what cannot be started or dies again and again; `fedlora status` then says why. Everything
    that was started is stopped.
    """
    serving = Serving(deploy, path, notify=notify)
    serving.check()
    stopped: list[int] = []

    def stop(number: int, frame: FrameType | None) -> None:
        stopped.append(number)

    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        with endpoint(deploy):
            try:
                serving.start()
                while not stopped:
                    outcome = serving.watch()
                    if outcome is not None:
                        return outcome
                    if each is not None:
                        each(serving)
                    time.sleep(_LOOK)
            except Exception as error:
                serving.gave_up(error)
                raise
        return Outcome(state="stopped", detail=f"signal {stopped[0]}; start it again to go on", pid=os.getpid())
    finally:
        serving.stop()
        for number, handler in before.items():
            signal.signal(number, handler)
