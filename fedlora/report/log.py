"""The run log: `metrics.jsonl`, one JSON event a line, on disk before the run goes on.

An event ends with its newline: a last line without one was torn by a crash and does not count. The lines are a hash
chain: `chain`, the last field of each, is the SHA-256 of the `chain` before it (of the first: nothing) and the line
without it. Scores are shares from 0 to 1, losses are means per answer token, sizes are bytes, times are seconds.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, Literal, NotRequired, TypedDict

from fedlora.errors import CheckpointError

FILE: Final = "metrics.jsonl"
_log = logging.getLogger(__name__)


class Group(TypedDict):
    """Right answers of one skill or class, and how many were asked."""

    correct: float
    counted: float


class ClientInfo(TypedDict):
    """One client, as the run opens."""

    id: str
    rank: int
    examples: NotRequired[int]
    groups: NotRequired[dict[str, int]]  # skill, class or source -> training rows


class Refused(TypedDict):
    """An answer that admission did not take."""

    client: str
    rule: str
    detail: str


class StartEvent(TypedDict):
    """A run opens, or is resumed: the last one counts. `config` has `tasks` as a JSON list of tables, or empty."""

    event: Literal["start"]
    run: str
    method: str
    config: dict[str, bool | int | float | str]
    clients: list[ClientInfo]
    base: NotRequired[str]  # fingerprint
    parameters: NotRequired[int]  # of the frozen base
    started: NotRequired[str]  # ISO 8601
    resumed_after: NotRequired[int]  # rounds that were already done
    refused: NotRequired[list[Refused]]  # clients that may not take part


class TaskScore(TypedDict):
    """One task, among its own classes; `score_open` among the classes of all tasks. `score` needs a counted row."""

    counted: float
    score: NotRequired[float]
    loss: NotRequired[float]
    score_open: NotRequired[float]


class UntrainedEvent(TypedDict):
    """What the server's rows of every task score before round 1. The last one counts."""

    event: Literal["untrained"]
    tasks: dict[str, TaskScore]


class Border(TypedDict):
    """A round in which tasks were sealed.

    `own`: the clients' held-out rows, of the tasks that have begun; `server`: its rows, of all tasks. `inference`,
    after the last round: way to tell the task -> task -> score; `routing` is the share of rows whose task was found.
    """

    sealed: list[str]
    own: dict[str, TaskScore]
    server: dict[str, TaskScore]
    inference: NotRequired[dict[str, dict[str, TaskScore]]]


class ClientRound(TypedDict):
    """What one client did in one round, or, in a run with tasks, for one task of it; bytes are in its first entry."""

    id: str
    task: NotRequired[str]
    rank: NotRequired[int]
    examples: NotRequired[int]
    loss_before: NotRequired[float]
    loss_after: NotRequired[float]
    steps: NotRequired[float]
    tokens: NotRequired[float]
    seconds: NotRequired[float]
    grad_norm: NotRequired[float]
    weight_change: NotRequired[float]
    overlap_penalty: NotRequired[float]  # o-lora: what it added to the loss, mean over steps; absent without one
    anchor_penalty: NotRequired[float]  # ewc, likewise
    bytes_up: NotRequired[int]
    bytes_down: NotRequired[int]


class Spent(TypedDict):
    """What any one client has spent at most so far, see docs/PRIVACY.md."""

    unit: str
    relation: str
    epsilon: float
    delta: float
    noise_multiplier: float
    clip: float
    sampling: float  # that is counted: of a row, in a step; at client level of a client, in a round
    steps: int  # counted so far; at client level, sums
    noise_by: NotRequired[str]  # client level: server or clients, of whom `parties` are in every sum
    parties: NotRequired[int]
    quantile: NotRequired[float | None]  # that the clip follows


class Aggregate(TypedDict):
    """What the method says of its new state. Of two tasks in a round the second has `task/key` where both have a key.

    `overlap` to `inputs_seen` come where a task is sealed: see `fedlora.continual.overlap` and `.design`.
    """

    rank: NotRequired[float]  # of what W_eff has over W0
    truncation_error: NotRequired[float]
    aggregation_error: NotRequired[float]
    update_norm: NotRequired[float]  # Frobenius, over all adapted modules
    overlap: NotRequired[float]  # of A with the rows of all earlier A, mean over modules; 0 to 1
    overlap_largest: NotRequired[float]  # over modules
    overlap_product: NotRequired[float]  # of B A, mean over modules
    overlap_random: NotRequired[float]  # of random rows, mean over modules
    effect_on_old: NotRequired[float]  # of the update on old tasks' inputs, beside that on its own; and, for every
    # earlier task, `overlap/NAME`: of A with its rows alone, and `similarity/NAME`: of both updates' input directions
    sealed_error_relative: NotRequired[float]  # lost when the task was cut to continual.rank
    inputs_seen: NotRequired[float]  # share of the inputs' squared norm that the sketch holds, mean over inputs


class ClientScore(TypedDict):
    """The evaluation by one client, on the rows that it holds out."""

    score: NotRequired[float]
    loss: NotRequired[float]
    counted: NotRequired[float]


class ServerScore(TypedDict):
    """The evaluation by the server, on its own rows."""

    score: NotRequired[float]
    loss: NotRequired[float]
    groups: NotRequired[dict[str, Group]]


class Evaluation(TypedDict):
    """Sums over the clients' held-out rows, and what the server measured; of the tasks that the round trained."""

    score: NotRequired[float]
    loss: NotRequired[float]
    counted: NotRequired[float]
    groups: NotRequired[dict[str, Group]]
    clients: NotRequired[dict[str, ClientScore]]
    server: NotRequired[ServerScore]


class RoundEvent(TypedDict):
    """A round closed. `round` counts from 1."""

    event: Literal["round"]
    round: int
    tasks: NotRequired[list[str]]  # that were trained
    border: NotRequired[Border]
    version: NotRequired[int]
    state: NotRequired[str]  # SHA-256 of the state after the round, see `fedlora.provenance.state_digest`
    seconds: NotRequired[float]
    clients: NotRequired[list[ClientRound]]
    aggregate: NotRequired[Aggregate]
    evaluation: NotRequired[Evaluation]
    bytes_up: NotRequired[int]
    bytes_down: NotRequired[int]
    refused: NotRequired[list[Refused]]
    missing: NotRequired[list[str]]
    privacy: NotRequired[Spent]


class ReferenceEvent(TypedDict):
    """Something to compare with: `bare base`, `local only`, `centralised`. The last of a name counts.

    `detail` of `local only`: `score on groups held` and `score on groups not held`, by the client itself.
    """

    event: Literal["reference"]
    name: str
    score: NotRequired[float]
    loss: NotRequired[float]
    groups: NotRequired[dict[str, Group]]
    seconds: NotRequired[float]
    detail: NotRequired[dict[str, float]]


class PersonalClient(ClientRound):
    """One client's local adapter on top of the global one: what training it did, and both scores on its own rows."""

    personal: NotRequired[ClientScore]


class PersonalEvent(TypedDict):
    """Every client has trained a local adapter on the global one. Its entries also hold `global`, a ClientScore."""

    event: Literal["personal"]
    steps: int
    clients: list[PersonalClient]
    refused: NotRequired[list[Refused]]
    bytes_up: NotRequired[int]
    bytes_down: NotRequired[int]


class EndEvent(TypedDict):
    """The run is over."""

    event: Literal["end"]
    seconds: NotRequired[float]
    peak_memory_mib: NotRequired[float]
    score: NotRequired[float]
    loss: NotRequired[float]


Event = StartEvent | UntrainedEvent | RoundEvent | PersonalEvent | ReferenceEvent | EndEvent


class RunLog:
    """Appends events to `folder/metrics.jsonl`. What a crash tore off the end is cut away when it is opened.

    Raises: CheckpointError, here and below, when the disk refuses.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / FILE
        self._chain = ""
        with _writing(self.path, "open the run log"):
            if self.path.exists():
                data = self.path.read_bytes()
                whole = data.rfind(b"\n") + 1
                if whole < len(data):
                    _log.warning("%s: the last line was torn by a crash and is cut away", self.path)
                    os.truncate(self.path, whole)
                self._chain = _chain_of(data[:whole])

    def append(self, event: Event | dict[str, Any]) -> None:
        """Write one event and wait until it is on disk.

        Raises: CheckpointError for a number that is not finite, and when the disk refuses; the log stays as it was.
        """
        for where, value in _numbers(event, event["event"]):
            if not math.isfinite(value):
                raise CheckpointError(f"{self.path}: {where} is {value}; leave out what could not be measured")
        line, chain = _chained(event, self._chain)
        with _writing(self.path, f"write the {event['event']} event"):
            size = self.path.stat().st_size if self.path.exists() else 0
            try:
                with self.path.open("ab", buffering=0) as file:
                    _write(file.fileno(), line)
            except OSError:
                if self.path.exists():
                    os.truncate(self.path, size)
                raise
        self._chain = chain

    def truncate_to(self, round: int) -> None:
        """Forget the rounds after `round` and the end of the run, as a resumed run must; all or nothing on disk.

        Of several `untrained` events the last stays.
        """
        if not self.path.exists():
            return
        events = read_log(self.path.parent)
        untrained = max((i for i, event in enumerate(events) if event["event"] == "untrained"), default=None)
        kept = [
            event
            for i, event in enumerate(events)
            if event["event"] not in ("end", "personal")
            and (event["event"] != "round" or event["round"] <= round)
            and (event["event"] != "untrained" or i == untrained)
        ]
        new = self.path.with_suffix(".new")
        lines, chain = b"", ""
        for event in kept:
            line, chain = _chained(event, chain)
            lines += line
        with _writing(self.path, f"cut the run log to round {round}"):
            with new.open("wb", buffering=0) as file:
                _write(file.fileno(), lines)
            os.replace(new, self.path)
            folder = os.open(self.path.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
        self._chain = chain


def read_log(folder: Path) -> list[dict[str, Any]]:
    """All events of a run, in order. A torn last line is left out and reported through `logging`.

    Raises: CheckpointError for a missing log and for any other damage, with its line.
    """
    path = folder / FILE
    try:
        data = path.read_bytes()
    except OSError as error:
        raise CheckpointError(
            f"{path}: cannot read the run log: {error.strerror}; is this the folder of a run?"
        ) from None
    *lines, torn = data.split(b"\n")
    if torn:
        _log.warning("%s, line %d: torn by a crash, left out", path, len(lines) + 1)
    events: list[dict[str, Any]] = []
    chain = ""
    for number, line in enumerate(lines, 1):
        try:
            event = json.loads(line, parse_constant=_refuse_constant)
        except (ValueError, RecursionError) as error:
            raise CheckpointError(f"{path}, line {number}: damaged: {error}; restore it from a copy") from None
        kind = event.get("event") if isinstance(event, dict) else None
        if kind not in ("start", "untrained", "round", "personal", "reference", "end"):
            raise CheckpointError(f"{path}, line {number}: no event of a run log: {line[:60].decode(errors='replace')}")
        if kind == "round" and not isinstance(event.get("round"), int):
            raise CheckpointError(f"{path}, line {number}: a round event without its number")
        said = event.pop("chain", None)
        if said is not None or chain:  # a log of an older fedlora has no chain
            try:
                chain = _chained(event, chain)[1]
            except (ValueError, RecursionError):  # 1e999 or half a surrogate pair, which were never written
                chain = "none"
            if said != chain or chain == "none":
                raise CheckpointError(
                    f"{path}, line {number}: this line, or the one before it, is not what was written (its chain "
                    "differs); restore the log from a copy"
                )
        events.append(event)
    return events


def _chained(event: Mapping[str, Any], before: str) -> tuple[bytes, str]:
    """One line with its link, and the link."""
    text = json.dumps(event, ensure_ascii=False, allow_nan=False)
    chain = hashlib.sha256(f"{before}{text}".encode()).hexdigest()
    return f'{text[:-1]}, "chain": "{chain}"}}\n'.encode(), chain


def _chain_of(lines: bytes) -> str:
    """The link of the last of whole lines, empty where it has none; damage is `read_log`'s to find."""
    last = lines.rstrip(b"\n").rpartition(b"\n")[2]
    try:
        event = json.loads(last) if last else {}
    except (ValueError, RecursionError):
        return ""
    return str(event.get("chain", "")) if isinstance(event, dict) else ""


@contextmanager
def _writing(path: Path, what: str) -> Iterator[None]:
    """Raises: CheckpointError for an OSError."""
    try:
        yield
    except OSError as error:
        raise CheckpointError(
            f"{path}: cannot {what}: {error.strerror or error}; free some space or allow writing there, and resume"
        ) from error


def _refuse_constant(text: str) -> float:
    raise ValueError(f"{text} is not a finite number")


def _numbers(value: object, where: str) -> Iterator[tuple[str, float]]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _numbers(inner, f"{where}.{key}")
    elif isinstance(value, list | tuple):
        for index, inner in enumerate(value):
            yield from _numbers(inner, f"{where}.{index}")
    elif isinstance(value, float):
        yield where, value


def _write(descriptor: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]
    os.fsync(descriptor)
