"""Drives a run: the one place that knows Flower, deadlines, quorum and checkpoints.

A method's round is a generator that yields {client: Ask} and receives {client: Answer}; this file carries them over
the Grid, admits and spools the answers, has the clients evaluate, logs, and checkpoints after every round.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from flwr.serverapp import Grid

from fedlora.at_rest import key_from_environment
from fedlora.config import RunConfig, flat, local_training
from fedlora.continual.tasks import legs, rounds_in_all
from fedlora.errors import RoundFailed
from fedlora.provenance import state_digest
from fedlora.report.log import RunLog, read_log
from fedlora.state import Ask, GlobalState, Kind
from server import checkpoint
from server.asking import STRIKES, Courier, Notify, Tally, Turn
from server.channel import Channel, Plain
from server.evaluate import Evaluator, TasksEvaluator
from server.personal import personalised
from server.private import OWNER as ACCOUNT
from server.private import Account
from server.releases import Releases
from server.roster import Refusal, Roster, drawn, sample
from server.scoring import Scoring
from server.spool import Spool
from strategies.base import Closed, Cohort, Member, Method, SumSession
from strategies.configured import PUBLISHED
from strategies.continual.views import HEAD
from strategies.streams import streamed

__all__ = ["Conductor"]

_OVER = "RoundOver"  # what a client says that helped to open a sum of this round before
_RELEASED = "released"  # folder in that of the checkpoints: a private state, until its round is saved
_SHOWS = ("clients", "missing", "refused", "quarantined", "bytes_up", "bytes_down")  # in the log: who was drawn
_KNOWN = ("id", "task", "rank", "bytes_down", "bytes_up")  # of a client: what is not computed from its rows


class Conductor:
    """One run over one Grid, in one folder. `notify` hears of every step; if it raises, the run ends there.

    `evaluator` scores a run without tasks, `tasks_evaluator` one with tasks. With `durable`, every accepted answer is
    on disk before it counts, and a resumed run does not ask for it again.
    """

    def __init__(
        self,
        grid: Grid,
        config: RunConfig,
        folder: Path,
        *,
        run: str,
        evaluator: Evaluator | None,
        notify: Notify,
        tasks_evaluator: TasksEvaluator | None = None,
        channel: Channel | None = None,
        durable: bool = False,
    ) -> None:
        self._grid = grid
        self._channel = channel or Plain()
        self._durable = durable
        self._config = config
        self._folder = folder
        self._checkpoints = folder / "checkpoints"
        self._key = key_from_environment()
        self._run = run
        self._notify = notify
        self._method: Method = streamed(config)
        self._legs = legs(config)
        self._rounds = rounds_in_all(config)
        self._courier = Courier(
            grid, config, folder / "spool", run=run, channel=self._channel, durable=durable, notify=notify
        )
        self._scoring = Scoring(
            config, self._method, self._courier, evaluator=evaluator, tasks_evaluator=tasks_evaluator
        )
        self._account: Account
        self._releases: Releases
        self._log = RunLog(folder)

    def conduct(self) -> GlobalState:
        """Run from the newest checkpoint (or the opening) to the last round, and return the final state.

        Raises: RoundFailed when a round stays below quorum after its retries (the last state is on disk, and the run
        can be resumed); CheckpointError when the folder cannot be written or read.
        """
        resumed = checkpoint.latest(self._checkpoints, key=self._key)
        self._releases = Releases(self._config, self._folder, self._run, begun=resumed is not None)
        try:
            return self._conducted(resumed)
        finally:
            self._releases.close()

    def _conducted(self, resumed: tuple[int, GlobalState] | None) -> GlobalState:
        started = time.monotonic()
        self._courier.forget(keep=(resumed[0] + 1 if resumed else 1) if self._durable else None)
        if resumed is not None and resumed[0] >= self._rounds and not self._personal_left():
            return resumed[1]
        roster = Roster(
            self._grid,
            self._config,
            self._run,
            base=resumed[1].base if resumed else None,
            layout=resumed[1].layout if resumed else None,
            channel=self._channel,
        )
        roster.wait(self._notify, resumed=resumed is not None)
        tally = Tally()
        self._courier.refuse(tally, roster.refresh())
        if not roster.clients and tally.refused:
            raise RoundFailed(f"no client could be enrolled; the first was refused: {tally.refused[0]}")
        base, layout = roster.require_members()
        if resumed is None:
            done, state = 0, self._method.open(base, layout, roster.members(), self._config.method, self._config.seed)
            if roster.head and self._legs:  # where the clients' base brings a head, that is what all start from
                own = {n: np.array(x) for n, x in roster.head.items()}
                state = replace(state, memory={**state.memory, HEAD: own})
            elif roster.head:
                task = replace(state.open_task, extras={n: np.array(x) for n, x in roster.head.items()})
                left = {k: x for k, x in state.memory.get(PUBLISHED, {}).items() if not k.startswith("head:")}
                memory = {**state.memory, PUBLISHED: left} if PUBLISHED in state.memory else state.memory
                state = replace(state, tasks={**state.tasks, task.name: task}, memory=memory)
            self._account = Account(self._config, {})
            if self._account.private:
                state = replace(state, memory={**state.memory, ACCOUNT: self._account.memory()})
            checkpoint.save(self._checkpoints, 0, state, key=self._key)
        else:
            done, state = resumed
            self._account = Account(self._config, state.memory.get(ACCOUNT, {}))
        self._courier.restore(state.memory, self._account)
        self._log.truncate_to(done)
        self._log.append(self._start_event(roster, done, tally.refused))
        clients, strikes = len(roster.clients), self._courier.strikes
        self._notify({"event": "start", "clients": clients, "rounds": self._rounds, "done": done, "strikes": strikes})
        if warning := self._account.warning() or self._releases.warning():
            self._notify({"event": "note", "text": warning})
        if done == 0 and (untrained := self._scoring.untrained(state)):
            self._log.append({"event": "untrained", "tasks": untrained})
        for number in range(done + 1, self._rounds + 1):
            tally = Tally()
            if number > done + 1:
                self._courier.refuse(tally, roster.refresh())
            state = self._round(number, state, roster, tally)
        if self._personal_left():
            self._log.append(personalised(self._config, state, roster, self._courier, self._notify))
        self._notify({"event": "done", "seconds": time.monotonic() - started})
        return state

    def _round(self, number: int, state: GlobalState, roster: Roster, tally: Tally) -> GlobalState:
        began = time.monotonic()
        if not roster.clients:
            raise self._paused(number, f"round {number}: every client has left.")
        tally.quarantined = {c for c in roster.clients if self._courier.quarantined(c)}
        there = tuple(m for m in roster.members() if m.id not in tally.quarantined)
        if not there:
            raise self._paused(number, f"round {number}: every client is in quarantine.")
        members = drawn(there, self._config) if self._releases.hidden else sample(there, self._config, number)
        self._notify({"event": "round", "round": number, "clients": len(members)})
        event: dict[str, Any] = {"event": "round", "round": number, "clients": []}
        facts: Mapping[str, Mapping[str, float]] = {}
        if (released := self._released(number)) is not None:
            state = released
        elif members or self._legs or self._releases.private:  # else an empty Poisson sample leaves the state as it is
            self._releases.charge(number)
            closed, event["clients"] = self._train(number, state, members, there, roster, tally)
            self._courier.refuse(tally, (Refusal(r.client, r.rule, r.detail) for r in closed.refused), strike=True)
            state = closed.state
            if self._releases.private:
                checkpoint.save(self._checkpoints / _RELEASED, number, state, key=self._key)
                self._releases.seal(state_digest(state))
            event["aggregate"] = {k: v for k, v in closed.report.items() if math.isfinite(v)}
            facts = closed.clients
        every, last = self._config.evaluation.every, number == self._rounds
        sealed = [leg.name for leg in self._legs if leg.last == number]
        if self._legs:
            event["tasks"] = [leg.name for leg in self._legs if leg.first <= number <= leg.last]
            if sealed or (every and number % every == 0):
                seen = None if self._unseen else members
                event |= self._scoring.of_tasks(number, state, sealed, seen, roster, tally)
        elif last or (every and number % every == 0):
            seen = () if self._unseen else members  # a score is a sum over one client's rows, in the clear
            if seen or self._scoring.by_server:
                event["evaluation"] = self._scoring.plain(number, state, seen, roster, tally)
        ranks = {m.id: m.rank for m in members}
        counted: set[str] = set()  # a client that trained two tasks has two entries, and its bytes are in the first
        for client in event["clients"]:
            name = client["id"]
            bytes_down, bytes_up = (0, 0) if name in counted else (tally.down[name], tally.up[name])
            counted.add(name)
            client |= {"rank": ranks[name], "bytes_down": bytes_down, "bytes_up": bytes_up}
            client |= facts.get(name, {})
        event |= {
            "version": state.version,
            "state": state_digest(state),
            "bytes_down": sum(tally.down.values()),
            "bytes_up": sum(tally.up.values()),
            "refused": [vars(r) for r in sorted(tally.refused, key=lambda r: r.client)],
            "missing": sorted(tally.missing),
            **({"quarantined": sorted(tally.quarantined)} if tally.quarantined else {}),
            **({"privacy": told} if (told := self._account.told() or self._releases.told()) else {}),
            "seconds": time.monotonic() - began,
        }
        if self._releases.hidden:
            event = {k: v for k, v in event.items() if k not in _SHOWS}
        elif self._releases.private:
            event["clients"] = [{k: v for k, v in c.items() if k in _KNOWN} for c in event["clients"]]
            event["refused"] = [{**r, "detail": ""} for r in event["refused"]]  # a client's own words, of its rows
            if released is not None:
                del event["clients"]
        memory = {k: x for k, x in state.memory.items() if k != STRIKES}
        memory |= self._courier.memory(hidden=self._releases.hidden)
        memory |= {ACCOUNT: self._account.memory()} if self._account.private else {}
        state = replace(state, memory=memory)
        self._log.append(event)
        checkpoint.save(self._checkpoints, number, state, key=self._key)
        self._courier.forget()
        self._notify({"event": "closed", "round": number, "summary": event})
        return state

    def _released(self, number: int) -> GlobalState | None:
        """The state that this round had let out before a crash, which is not made twice."""
        found = checkpoint.latest(self._checkpoints / _RELEASED, key=self._key) if self._releases.private else None
        if found is None or found[0] != number or not self._releases.out(number, state_digest(found[1])):
            return None
        return found[1]

    def _train(
        self,
        number: int,
        state: GlobalState,
        members: tuple[Member, ...],
        there: tuple[Member, ...],
        roster: Roster,
        tally: Tally,
    ) -> tuple[Closed, list[dict[str, Any]]]:
        """One round of the method, repeated from its start while it stays below quorum and retries are left."""
        rounds = self._config.rounds
        cohort = Cohort(
            round=number,
            rounds=self._rounds,
            members=members,
            settings=self._config.method,
            training=local_training(self._config),
            seed=self._config.seed,
            progress=((number - 1) / self._rounds, number / self._rounds),
            enrolled=there if self._releases.private else (),
        )
        for attempt in range(rounds.retries + 1):
            try:
                return self._attempt(self._numbered(cohort), attempt, state, roster, tally)
            except RoundFailed as error:
                if any(r.rule == _OVER for r in tally.refused):
                    return Closed(state=state, report={"lost": 1.0}), []
                if attempt == rounds.retries:
                    raise self._paused(number, str(error)) from error
                self._notify({"event": "retry", "round": number, "reason": str(error)})
            tally.missing.clear()
            roster.await_nodes(len(cohort.members))
            self._courier.refuse(tally, roster.refresh())
        raise AssertionError("unreachable: the loop returns or raises")

    def _attempt(
        self, cohort: Cohort, attempt: int, state: GlobalState, roster: Roster, tally: Tally
    ) -> tuple[Closed, list[dict[str, Any]]]:
        protocol = self._method.protocol(state, cohort)
        told: list[dict[str, Any]] = []
        answers: Spool | None = None
        for phase in itertools.count():
            try:
                asks = next(protocol) if answers is None else protocol.send(answers)
            except StopIteration as closed:
                return closed.value, told
            finally:
                if answers is not None:
                    answers.clear()
            kind = _kind_of(asks)
            turn = Turn(kind=kind, round=cohort.round, attempt=attempt, phase=phase)
            answers, told_now = self._courier.ask(turn, state, asks, roster, tally)
            quorum = math.ceil(self._config.rounds.quorum * len(asks))
            if self._releases.hidden:  # a round that were repeated or given up for its answers would tell how many
                quorum = 0
            if len(answers) < quorum and kind != "secure":  # which has rules of its own for who may be missing
                answers.clear()
                why = "; ".join(str(r) for r in tally.refused[-3:])
                raise RoundFailed(
                    f"round {cohort.round}: {len(told_now)} of {len(asks)} clients answered, the quorum is {quorum} "
                    f"(the last refusals: {why}). Bring the clients back, or begin a new run with a lower "
                    "rounds.quorum."
                )
            if kind == "secure" and any(
                ask.secure and (ask.secure.stage, ask.secure.part) == ("mask", 1) for ask in asks.values()
            ):
                told += _of_tasks([{"id": c["id"]} for c in told_now], asks)
            told += _of_tasks(told_now, asks) if kind == "train" and (self._legs or not told) else []
        raise AssertionError("unreachable: the loop returns or raises")

    @property
    def _unseen(self) -> bool:
        """Whether nothing of a single client may be seen: then clients do not score."""
        return self._account.private or self._releases.private or self._config.secure.on

    def _numbered(self, cohort: Cohort) -> Cohort:
        """The cohort with a number for its secure sum that no earlier attempt had, also before a crash."""
        if not self._config.secure.on:
            return cohort
        path = self._checkpoints / "sums"
        number = int(path.read_text()) + 1 if path.exists() else 0
        checkpoint.write_atomic(path, str(number).encode())
        return replace(cohort, session=SumSession(run=self._run, round=cohort.round, attempt=number))

    def _paused(self, number: int, why: str) -> RoundFailed:
        return RoundFailed(
            f"{why} The run pauses after round {number - 1}, whose state is in {self._checkpoints}. Mend that, then "
            "resume the run; other settings need a new one."
        )

    def _personal_left(self) -> bool:
        """Whether the clients still have to train their local adapters."""
        if self._config.personal.steps == 0:
            return False
        return not any(e["event"] == "personal" for e in read_log(self._log.path.parent))

    def _start_event(self, roster: Roster, done: int, refused: list[Refusal]) -> dict[str, Any]:
        return {
            "event": "start",
            "run": self._run,
            "method": self._config.method.name,
            "config": flat(self._config),
            "clients": [{"id": m.id, "rank": m.rank} for m in roster.members()],
            "base": roster.base,
            "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "resumed_after": done,
            "refused": [vars(r) for r in refused],
        }


def _kind_of(asks: Mapping[str, Ask]) -> Kind:
    if any(ask.secure for ask in asks.values()):
        return "secure"
    return "measure" if any(ask.measure for ask in asks.values()) else "train"


def _of_tasks(told: list[dict[str, Any]], asks: Mapping[str, Ask]) -> list[dict[str, Any]]:
    """What clients told of their training, with the task where there are tasks."""
    return [{**c, "task": asks[c["id"]].task} if asks[c["id"]].task else c for c in told]
