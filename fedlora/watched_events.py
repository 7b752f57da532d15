"""What is kept of a run's two logs to say how it goes: `metrics.jsonl` of any run, `run.jsonl` of a deployed one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Final

from fedlora import errors

__all__ = ["NO_PRIVACY", "REPORTED", "RULES", "Rounds", "Score", "Steps"]

NO_PRIVACY: Final = "none claimed"
REPORTED: Final = "reported by a node"
RULES: Final = frozenset(
    (
        *("deadline", "not asked", "not sent", "node unavailable", "client failed", "malformed", "second answer"),
        "answer lost",
        *("hello", "revoked", "other node", "other base", "other layout", "other code", "rank", "same id twice"),
        *("not signed", "signature", "stale", "not the answer asked for"),
        *("size", "not finite", "absurd value", "norm", "moments", "example count", "measures", "secure sum"),
        *("members", "sender", "session", "stage", "keys", "shares", "survivors", "twice"),
        *("dishonest-shares", "tampered-share"),
        *(name for name, kind in vars(errors).items() if isinstance(kind, type)),
    )
)  # a node names its own errors: any other name counts as REPORTED, so that it cannot make up labels without end


@dataclass(frozen=True, kw_only=True)
class Score:
    """The last score, a share from 0 to 1: of which round, and on whose rows."""

    value: float
    round: int
    rows: str


@dataclass
class Rounds:
    """What `metrics.jsonl` tells; see `fedlora.report.log` for its events."""

    run: str = ""
    clients: int = 0
    round: int = 0
    closed: int = 0
    seconds: float = 0.0
    last_seconds: float | None = None
    bytes_up: int = 0
    bytes_down: int = 0
    last_bytes_up: int = 0
    last_bytes_down: int = 0
    refusals: Counter[str] = field(default_factory=Counter)
    answered: dict[str, int] = field(default_factory=dict)  # client -> the last round in which it trained
    quarantined: frozenset[str] = frozenset()
    score: Score | None = None
    privacy: str = NO_PRIVACY
    ended: bool = False

    def take(self, event: Any) -> None:
        """Keep one event. Raises: what `fedlora.tail` takes to say that it is none."""
        kind = event["event"]
        if kind == "start":
            run, clients, refused = str(event["run"]), len(event["clients"]), _rules(event.get("refused", ()))
            self.run, self.clients = run, clients
            self.refusals += refused
        elif kind == "round":
            self._close(event)
        elif kind == "personal":
            up, down = _bytes(event)
            self.refusals += _rules(event.get("refused", ()))
            self.bytes_up, self.bytes_down = self.bytes_up + up, self.bytes_down + down
        elif kind == "end":
            self.ended = True

    def _close(self, event: Mapping[str, Any]) -> None:
        number, seconds = int(event["round"]), float(event.get("seconds", 0.0))
        refused, (up, down) = _rules(event.get("refused", ())), _bytes(event)
        clients = {str(client["id"]): number for client in event.get("clients", ())}
        quarantined = frozenset(map(str, event.get("quarantined", ())))
        score = _score(event.get("evaluation", {}), number)
        privacy = _privacy(event["privacy"]) if "privacy" in event else self.privacy
        self.round, self.closed = number, self.closed + 1
        self.seconds, self.last_seconds = self.seconds + seconds, seconds
        self.bytes_up, self.bytes_down = self.bytes_up + up, self.bytes_down + down
        self.last_bytes_up, self.last_bytes_down = up, down
        self.refusals += refused
        self.answered |= clients
        self.quarantined = quarantined
        self.score = score or self.score
        self.privacy = privacy


@dataclass
class Steps:
    """What `run.jsonl` tells: of the last run in it, and of what goes on now."""

    run: str = ""
    began: datetime | None = None  # the first line
    last: datetime | None = None
    phase: str = ""  # waiting, between, round, personal, finishing
    online: int = 0
    wanted: int = 0
    number: int = 0  # of the round that is open
    since: datetime | None = None
    asked: int = 0
    kind: str = ""
    here: set[str] = field(default_factory=set)  # who answered what was asked last
    repeated: bool = False
    answers: int = 0
    answered: dict[str, int] = field(default_factory=dict)  # client -> the last round that it answered
    refusals: Counter[str] = field(default_factory=Counter)
    counts_strikes: bool = False
    strikes: dict[str, int] = field(default_factory=dict)
    quarantined: frozenset[str] = frozenset()

    def take(self, event: Any) -> None:
        """Keep one line. Raises: what `fedlora.tail` takes to say that it is none."""
        kind, time = event["event"], datetime.fromisoformat(event["time"])
        if time.tzinfo is None:
            raise ValueError("a time without its zone")
        if kind == "conducting":
            self._conducted(str(event["run"]))
        elif kind == "waiting":
            self.online, self.wanted = int(event["online"]), int(event["wanted"])
            self.phase = "waiting"
        elif kind == "start":
            self._strike(event)
            self.quarantined = frozenset()  # those that are still in it are in the last closed round
            self.phase = "between"
        elif kind == "round":
            self.number, self.asked = int(event["round"]), int(event["clients"])
            self.phase, self.since, self.kind, self.here, self.repeated = "round", time, "", set(), False
        elif kind == "answer":
            self._answer(str(event["client"]), str(event["kind"]), int(event["round"]))
        elif kind == "refused":
            self.refusals += _rules((event,))
            self._strike(event)
        elif kind == "retry":
            self.kind, self.here, self.repeated = "", set(), True
        elif kind == "quarantine":
            self.quarantined |= {str(event["client"])}
        elif kind in ("closed", "personal", "done"):
            self.phase = {"closed": "between", "personal": "personal", "done": "finishing"}[kind]
        self.began, self.last = self.began or time, time

    def _conducted(self, run: str) -> None:
        """A conductor begins. Of another run than the one before it, all that was counted is another's."""
        if run != self.run:
            self.answers, self.answered, self.refusals, self.strikes = 0, {}, Counter(), {}
        self.run, self.phase, self.quarantined = run, "", frozenset()

    def _answer(self, client: str, kind: str, number: int) -> None:
        if kind != self.kind:
            self.kind, self.here = kind, set()
        self.here.add(client)
        self.answers += 1
        self.answered[client] = number

    def _strike(self, event: Mapping[str, Any]) -> None:
        """Strikes as the conductor counts them: of all where it starts, of one where an answer is refused."""
        if "strikes" not in event:
            return
        said = event["strikes"]
        if isinstance(said, dict):
            self.strikes = {str(client): int(count) for client, count in said.items()}
        else:
            self.strikes[str(event["client"])] = int(said)
        self.counts_strikes = True


def _rules(refused: Iterable[Mapping[str, Any]]) -> Counter[str]:
    rules = [one["rule"] for one in refused]
    return Counter(rule if rule in RULES else REPORTED for rule in rules)


def _bytes(event: Mapping[str, Any]) -> tuple[int, int]:
    return int(event.get("bytes_up", 0)), int(event.get("bytes_down", 0))


def _score(evaluation: Mapping[str, Any], number: int) -> Score | None:
    """The server's score, else that over the clients' rows; over one client's alone it would be that client's own."""
    served = evaluation.get("server", {})
    if "score" in served:
        return Score(value=float(served["score"]), round=number, rows="the server's rows")
    if "score" in evaluation and len(evaluation.get("clients", ())) > 1:
        return Score(value=float(evaluation["score"]), round=number, rows="the clients' held-out rows")
    return None


def _privacy(said: Any) -> str:
    """What was spent so far: as it is said in words, or from epsilon and delta."""
    if isinstance(said, str):
        return said
    spent = f"epsilon {float(said['epsilon']):.3g} at delta {float(said['delta']):.1g}"
    return f"{spent}, for each {said['unit']}" if "unit" in said else spent
