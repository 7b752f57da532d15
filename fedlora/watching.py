"""How a run goes, read from its files alone: of a deployment (`deploy.toml`) or of any run folder.

No process is asked, so this works beside a server, after it died, and while files are being written; a torn last line
waits for its end. Every look reads what was added since the last one. It tells names of nodes, counts, bytes, times
and scores over many clients, and nothing that a single client measured.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, Final, Literal, get_args

import psutil

from fedlora.config import RunConfig, load_config
from fedlora.continual.tasks import rounds_in_all
from fedlora.deploy import DeployFile, read_deploy
from fedlora.errors import ConfigError, FedLoRAError
from fedlora.pki import Node, PkiError, load_certificate, registry
from fedlora.report.log import FILE
from fedlora.tail import Tail, read_whole
from fedlora.watched_events import Rounds, Score, Steps

__all__ = [
    "CONDUCTOR",
    "ENDED",
    "JOURNAL",
    "MISSING",
    "PROGRAMS",
    "STATES",
    "NodeStatus",
    "OpenRound",
    "State",
    "Status",
    "WatchError",
    "Watcher",
    "alive",
    "programs_record",
    "span",
    "watcher",
]

ENDED: Final = "outcome.json"  # in the state folder of a deployment
CONDUCTOR: Final = "conductor.pid"
PROGRAMS: Final = "programs.json"
JOURNAL: Final = "run.jsonl"  # in its folder `logs`
MISSING: Final = frozenset(
    ("deadline", "not asked", "not sent", "node unavailable", "client failed", "answer lost")
)  # rules by which nothing came of a node, so that nothing was refused
State = Literal["not started", "starting", "waiting", "running", "stopped", "paused", "done", "failed"]
STATES: Final[tuple[State, ...]] = get_args(State)
_STATUS: Final[Mapping[State, int]] = {"failed": 1, "paused": 3, "stopped": 3, "not started": 3}
_OURS: Final = ("server", "superlink", "executor")
_LONGEST: Final = 600  # characters of a reason
_JITTER: Final = 2.0  # seconds by which two readings of when a process began may differ


class WatchError(FedLoRAError):
    """A file of a run that is there and cannot be read."""


@dataclass(frozen=True, kw_only=True)
class NodeStatus:
    """One node of the registry. `last_round` is the last that it answered; `strikes` is None where no log says."""

    name: str
    last_round: int | None
    strikes: int | None
    quarantined: bool
    revoked: bool


@dataclass(frozen=True, kw_only=True)
class OpenRound:
    """The round that is open: for how long, and how many of those asked have answered what was asked last."""

    number: int
    seconds: float
    asked: int
    kind: str  # train, measure or evaluate; nothing before the first answer
    answered: int
    repeated: bool


@dataclass(frozen=True, kw_only=True)
class Status:
    """How a run goes. `round` is the last that closed; bytes and seconds are of closed rounds.

    `answers` are those accepted, where a journal tells; `missing` are those that did not come, and `refusals` those
    that did and were not taken, by rule; `certificate_days` are left to the server's certificate or the CA's, whichever
    ends first. What a file does not tell is None, or nothing; `problems` are files that cannot be used.
    """

    state: State
    detail: str
    run: str | None = None
    method: str | None = None
    round: int = 0
    rounds: int | None = None
    open: OpenRound | None = None
    clients: int = 0  # that took part when the run was last opened
    nodes: tuple[NodeStatus, ...] = ()
    answers: int = 0
    missing: Mapping[str, int] = field(default_factory=dict)
    refusals: Mapping[str, int] = field(default_factory=dict)
    bytes_up: int = 0
    bytes_down: int = 0
    last_bytes_up: int = 0
    last_bytes_down: int = 0
    last_seconds: float | None = None
    mean_seconds: float | None = None
    score: Score | None = None
    privacy: str = "none claimed"
    certificate_days: float | None = None
    programs: Mapping[str, bool] = field(default_factory=dict)
    problems: tuple[str, ...] = ()

    @property
    def exit_status(self) -> int:
        """0 while it runs and when it is done, 1 when it failed, 3 when somebody must start it (again)."""
        return _STATUS.get(self.state, 0)

    @property
    def enrolled(self) -> int:
        """Nodes that are trusted now."""
        return sum(not node.revoked for node in self.nodes)


class Watcher:
    """Looks at one run again and again. `deploy` is None for a folder of `fedlora simulate`, which names no nodes."""

    def __init__(self, folder: Path, deploy: DeployFile | None = None) -> None:
        self._folder = folder
        self._deploy = deploy
        self._rounds = Tail(folder / FILE, Rounds)
        self._steps = Tail(deploy.state / "logs" / JOURNAL, Steps) if deploy else None
        self._kept: tuple[str, int] | None = None  # method and rounds
        self._registry: tuple[tuple[int, ...], tuple[Node, ...]] = ((), ())
        self._problems: list[str] = []

    def look(self, *, at: datetime) -> Status:
        """The state at the time `at` (UTC). Raises: WatchError if a file is there and may not be read."""
        try:
            return self._look(at)
        except OSError as error:
            raise WatchError(
                f"{error.filename}: cannot be read: {error.strerror}; look as the user that runs the server"
            ) from error

    def _look(self, at: datetime) -> Status:
        self._problems = []
        rounds = self._rounds.look()
        steps = self._steps.look() if self._steps else None
        tails: tuple[Tail[Any] | None, ...] = (self._rounds, self._steps)
        for tail in tails:
            if tail is not None and tail.damaged:
                lines = "1 line" if tail.damaged == 1 else f"{tail.damaged} lines"
                self._problems.append(f"{tail.path}: {lines} cannot be read")
        settings = self._settings()
        facts: dict[str, Any] = {
            "run": self._run(),
            "method": settings[0] if settings else None,
            "round": rounds.round,
            "rounds": settings[1] if settings else None,
            "clients": rounds.clients,
            "bytes_up": rounds.bytes_up,
            "bytes_down": rounds.bytes_down,
            "last_bytes_up": rounds.last_bytes_up,
            "last_bytes_down": rounds.last_bytes_down,
            "last_seconds": rounds.last_seconds,
            "mean_seconds": rounds.seconds / rounds.closed if rounds.closed else None,
            "score": rounds.score,
            "privacy": rounds.privacy,
        }
        if self._deploy is None or steps is None:
            state, detail = self._of_folder(rounds, at)
            refusals = rounds.refusals
        else:
            refusals = steps.refusals if steps.began else rounds.refusals
            nodes = self._nodes(self._deploy)
            programs = self._programs(self._deploy)
            stale = self._stale(self._deploy, steps)
            state, detail = self._of_deployment(self._deploy, rounds, steps, programs, stale=stale)
            facts |= {
                "answers": steps.answers,
                "nodes": tuple(_node(one, rounds, steps) for one in nodes),
                "certificate_days": self._certificate(self._deploy, at),
                "programs": programs,
                "open": _open(steps, at) if state == "running" else None,
            }
            for node in nodes:
                detail = detail.replace(node.id, node.name)
        return Status(
            state=state,
            detail=_line(detail),
            missing={rule: count for rule, count in sorted(refusals.items()) if rule in MISSING},
            refusals={rule: count for rule, count in sorted(refusals.items()) if rule not in MISSING},
            problems=tuple(self._problems),
            **facts,
        )

    def _of_folder(self, rounds: Rounds, at: datetime) -> tuple[State, str]:
        """Of a run whose processes nobody wrote down."""
        if rounds.ended or (self._folder / "manifest.json").is_file():
            return "done", f"adapter in {self._folder / 'adapter'}"
        try:
            written = (self._folder / FILE).stat().st_mtime
        except FileNotFoundError:
            return "running", "nothing is written yet"
        return "running", f"last written {span(at.timestamp() - written)} ago; one that was stopped looks the same"

    def _of_deployment(
        self, deploy: DeployFile, rounds: Rounds, steps: Steps, programs: Mapping[str, bool], *, stale: bool
    ) -> tuple[State, str]:
        outcome = self._json(deploy.state / ENDED)
        if outcome is not None and outcome.get("state") in ("done", "paused", "failed"):
            words = str(outcome.get("detail", "")).strip()
            state: State = outcome["state"]
            if state == "failed" and words.startswith("Traceback"):
                words = f"{words.splitlines()[-1]} (all of it: {deploy.state / ENDED})"
            return state, f"adapter in {words}" if state == "done" else words
        if not programs["server"]:
            if steps.began is None and not rounds.run:
                return "not started", "no server was started yet"
            return "stopped", "no server runs; start it again to go on"
        if not programs["conductor"] or stale or not steps.phase:
            return "starting", "Flower and the conductor are on their way up"
        if steps.phase == "waiting":
            return "waiting", f"nodes join; {steps.online} of {steps.wanted} were online at the last look"
        doing = {"personal": "clients train their own adapters", "finishing": "writing the adapter"}
        return "running", doing.get(steps.phase, "")

    def _stale(self, deploy: DeployFile, steps: Steps) -> bool:
        """Whether the journal's last line is of an earlier conductor than the one that runs."""
        try:
            began = (deploy.state / CONDUCTOR).stat().st_mtime
        except FileNotFoundError:
            return True
        return steps.last is None or steps.last.timestamp() < began - 1e-3  # the journal has milliseconds

    def _programs(self, deploy: DeployFile) -> dict[str, bool]:
        """Which programs run; of a machine or container with processes of its own, only from inside."""
        record = self._json(deploy.state / PROGRAMS) or {}
        up = dict.fromkeys(_OURS, False) | {name: _same(entry) for name, entry in record.items()}
        conductor = read_whole(deploy.state / CONDUCTOR) or b""
        running = up["server"] and conductor.isdigit() and len(conductor) < 20 and alive(int(conductor))
        return {**up, "conductor": running}

    def _nodes(self, deploy: DeployFile) -> tuple[Node, ...]:
        """The registry, read again when its file is another one: checking the keys of 1,000 nodes takes a second."""
        try:
            found = os.stat(deploy.keys / "nodes.json")
            version = (found.st_ino, found.st_size, found.st_mtime_ns)
            if version != self._registry[0]:
                self._registry = version, registry(deploy.keys, revoked=True)
        except FileNotFoundError:
            self._problems.append(f"{deploy.keys / 'nodes.json'}: there is none; `fedlora pki init` makes it")
            return ()
        except PkiError as error:
            self._problems.append(_line(str(error)))
            return ()
        return self._registry[1]

    def _certificate(self, deploy: DeployFile, at: datetime) -> float | None:
        try:
            ends = [load_certificate(deploy.keys / name).not_valid_after_utc for name in ("server.pem", "ca.pem")]
        except PkiError as error:
            self._problems.append(_line(str(error)))
            return None
        return (min(ends) - at).total_seconds() / 86400.0

    def _settings(self) -> tuple[str, int] | None:
        """Method and rounds, of the settings in the run's folder, which stay; before, of those that will be used."""
        own = self._folder / "config.toml"
        kept = own.is_file()
        if self._kept or not (kept or self._deploy):
            return self._kept
        try:
            config = load_config(own if kept or self._deploy is None else self._deploy.settings)
            found = _method(config), rounds_in_all(config)
        except ConfigError as error:
            self._problems.append(_line(str(error)))
            return None
        self._kept = found if kept else None
        return found

    def _run(self) -> str | None:
        data = read_whole(self._folder / "run-id")
        return _line(data.decode(errors="replace")) or None if data else None

    def _json(self, path: Path) -> dict[str, Any] | None:
        """An object in a file, if there is one."""
        data = read_whole(path)
        if data is None:
            return None
        try:
            found = json.loads(data)
        except ValueError:
            found = None
        if not isinstance(found, dict):
            self._problems.append(f"{path}: cannot be read")
            return None
        return found


def watcher(path: Path) -> Watcher:
    """Of a `deploy.toml`, or of a run folder. Raises: ConfigError if it is neither, or the file has mistakes."""
    if path.is_dir():
        if not any((path / name).exists() for name in ("config.toml", FILE)):
            hint = f"; did you mean {path / 'deploy.toml'}?" if (path / "deploy.toml").is_file() else ""
            raise ConfigError(f"{path} is no run folder: it has neither config.toml nor {FILE}{hint}")
        return Watcher(path)
    deploy = read_deploy(path)
    return Watcher(deploy.folder, deploy)


def programs_record(running: Mapping[str, int]) -> bytes:
    """What `programs.json` holds: name -> process id, and when it began in seconds since the machine did.

    With the second a number that was given to another process, also after a restart of the machine, is told apart,
    whatever was done to the clock. A process that is gone already is left out.
    """
    began = {name: (pid, _began(pid)) for name, pid in running.items()}
    return json.dumps({n: {"pid": pid, "began": at} for n, (pid, at) in began.items() if at is not None}).encode()


def alive(pid: int) -> bool:
    """Whether the process runs; one that has ended and whose parent never asked for its status does not."""
    return _began(pid) is not None


def span(seconds: float) -> str:
    """A time as `32 s`, `5 min`, `2.5 h` or `3.1 days`."""
    seconds = max(0.0, seconds)
    for unit, size, digits in (("days", 86400.0, 1), ("h", 3600.0, 1), ("min", 60.0, 0)):
        if seconds >= 2.0 * size:
            return f"{seconds / size:.{digits}f} {unit}"
    return f"{seconds:.0f} s"


def _began(pid: int) -> float | None:
    """Seconds from the start of the machine to that of the process; None if it does not run."""
    try:
        process = psutil.Process(pid)
        if process.status() == psutil.STATUS_ZOMBIE:
            return None
        return float(process.create_time() - psutil.boot_time())
    except (psutil.NoSuchProcess, OverflowError, ValueError):
        return None


def _same(entry: object) -> bool:
    """Whether the process of an entry of `programs.json` still runs."""
    if not isinstance(entry, dict) or type(entry.get("pid")) is not int:
        return False
    now, then = _began(entry["pid"]), entry.get("began")
    return now is not None and isinstance(then, float) and abs(now - then) < _JITTER


def _node(node: Node, rounds: Rounds, steps: Steps) -> NodeStatus:
    answered = [last[node.id] for last in (rounds.answered, steps.answered) if node.id in last]
    return NodeStatus(
        name=node.name,
        last_round=max(answered, default=None),
        strikes=steps.strikes.get(node.id, 0) if steps.counts_strikes else None,
        quarantined=node.id in rounds.quarantined | steps.quarantined,
        revoked=node.revoked is not None,
    )


def _open(steps: Steps, at: datetime) -> OpenRound | None:
    if steps.phase != "round" or steps.since is None:
        return None
    return OpenRound(
        number=steps.number,
        seconds=max(0.0, (at - steps.since).total_seconds()),
        asked=steps.asked,
        kind=steps.kind,
        answered=len(steps.here),
        repeated=steps.repeated,
    )


def _method(config: RunConfig) -> str:
    return f"{config.method.name}, {config.continual.method}" if config.tasks else config.method.name


def _line(text: str) -> str:
    """As one printable line, not too long."""
    line = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return line if len(line) <= _LONGEST else f"{line[: _LONGEST - 3]}..."
