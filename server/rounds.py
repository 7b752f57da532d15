"""Drives a run: the one place that knows Flower, deadlines, quorum and checkpoints.

A method's round is a generator that yields {client: Ask} and receives {client: Answer}; this file carries them over
the Grid, admits and spools the answers, has the clients evaluate, logs, and checkpoints after every round.
"""

from __future__ import annotations

import itertools
import math
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import MessageType
from flwr.serverapp import Grid

from fedlora.at_rest import key_from_environment
from fedlora.code import code_digest
from fedlora.config import RunConfig, flat, local_training
from fedlora.continual.tasks import JOINT, legs, rounds_in_all, task_names
from fedlora.errors import AnswerRejected, BlocksMissing, RoundFailed
from fedlora.provenance import state_digest
from fedlora.report.log import RunLog, read_log
from fedlora.rng import stream
from fedlora.state import (
    Answer,
    Ask,
    Block,
    GlobalState,
    Header,
    Kind,
    Part,
    PersonalPair,
    TrainPlan,
    expected_arrays,
    keyed,
)
from fedlora.wire import BlocksBody, decode_answer, encode_ask, encode_blocks
from server import checkpoint
from server.admission import ReportedError, admit, require_norm
from server.channel import Channel, Plain
from server.evaluate import Evaluator, TasksEvaluator, evaluation_ask, summary
from server.exchange import Asked, Failure, exchange
from server.holdings import OWNER, Holdings, Offer
from server.moments import require_moments
from server.private import OWNER as ACCOUNT
from server.private import Account
from server.releases import Releases
from server.roster import Refusal, Roster, drawn, sample
from server.spool import Spool
from strategies.base import Closed, Cohort, Member, Method, SumSession, head_start
from strategies.configured import PUBLISHED
from strategies.continual.views import HEAD, blocks_known, blocks_of, head_of
from strategies.streams import streamed

__all__ = ["SPOOL_MEMORY", "Conductor", "Evaluator", "Notify", "Tally", "evaluation_ask", "summary"]

Notify = Callable[[dict[str, Any]], None]
_OVER = "RoundOver"  # what a client says that helped to open a sum of this round before
_RELEASED = "released"  # folder in that of the checkpoints: a private state, until its round is saved
_SHOWS = ("clients", "missing", "refused", "quarantined", "bytes_up", "bytes_down")  # in the log: who was drawn
_KNOWN = ("id", "task", "rank", "bytes_down", "bytes_up")  # of a client: what is not computed from its rows
STRIKES = "strikes"  # in GlobalState.memory
SPOOL_MEMORY = 256 * 2**20  # bytes of answers that one round may hold in memory before it spills to disk


@dataclass
class Tally:
    """What one round saw: bytes and refusals of all its attempts, and who is still missing."""

    down: dict[str, int] = field(default_factory=dict)
    up: dict[str, int] = field(default_factory=dict)
    refused: list[Refusal] = field(default_factory=list)
    missing: set[str] = field(default_factory=set)
    quarantined: set[str] = field(default_factory=set)


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
        self._strikes: dict[str, int] = {}  # client -> answers that were refused for what they are
        self._config = config
        self._folder = folder
        self._checkpoints = folder / "checkpoints"
        self._spool = folder / "spool"
        self._key = key_from_environment()
        self._run = run
        self._evaluator = evaluator if config.evaluation.server else None
        self._tasks_evaluator = tasks_evaluator if config.evaluation.server else None
        self._notify = notify
        self._method: Method = streamed(config)
        self._legs = legs(config)
        self._rounds = rounds_in_all(config)
        self._holdings = Holdings()
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
        self._forget_answers(keep=f"{resumed[0] + 1 if resumed else 1:06d}-*" if self._durable else None)
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
        self._refuse(tally, roster.refresh())
        if not roster.clients and tally.refused:
            raise RoundFailed(f"no client could be enrolled; the first was refused: {_say(tally.refused[0])}")
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
        self._holdings = Holdings(state.memory.get(OWNER), codec=self._config.wire.down, versioned=not self._legs)
        self._strikes = {c: int(x[0]) for c, x in state.memory.get(STRIKES, {}).items()}
        self._log.truncate_to(done)
        self._log.append(self._start_event(roster, done, tally.refused))
        clients, strikes = len(roster.clients), dict(self._strikes)
        self._notify({"event": "start", "clients": clients, "rounds": self._rounds, "done": done, "strikes": strikes})
        if warning := self._account.warning() or self._releases.warning():
            self._notify({"event": "note", "text": warning})
        if self._tasks_evaluator is not None and done == 0:
            untrained = _by_task(self._tasks_evaluator.scores(state, task_names(self._config)))
            self._log.append({"event": "untrained", "tasks": untrained})
        for number in range(done + 1, self._rounds + 1):
            tally = Tally()
            if number > done + 1:
                self._refuse(tally, roster.refresh())
            state = self._round(number, state, roster, tally)
        if self._personal_left():
            self._personalise(state, roster)
        self._notify({"event": "done", "seconds": time.monotonic() - started})
        return state

    def _round(self, number: int, state: GlobalState, roster: Roster, tally: Tally) -> GlobalState:
        began = time.monotonic()
        if not roster.clients:
            raise self._paused(number, f"round {number}: every client has left.")
        tally.quarantined = {c for c in roster.clients if self._quarantined(c)}
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
            self._refuse(tally, (Refusal(r.client, r.rule, r.detail) for r in closed.refused), strike=True)
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
                event |= self._evaluate_tasks(number, state, sealed, members, roster, tally)
        elif ((members and not self._unseen) or self._evaluator) and (last or (every and number % every == 0)):
            event["evaluation"] = self._evaluate(number, state, members, roster, tally)
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
        strikes = {c: np.array([n], np.float64) for c, n in sorted(self._strikes.items())}
        memory = {k: x for k, x in state.memory.items() if k != STRIKES}
        if not self._releases.hidden:  # who holds what was sent says who was drawn
            memory |= {OWNER: self._holdings.memory()}
        memory |= {STRIKES: strikes} if strikes else {}
        memory |= {ACCOUNT: self._account.memory()} if self._account.private else {}
        state = replace(state, memory=memory)
        self._log.append(event)
        checkpoint.save(self._checkpoints, number, state, key=self._key)
        self._forget_answers(keep=None)
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
            self._refuse(tally, roster.refresh())
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
            answers, told_now = self._ask(kind, cohort.round, attempt, phase, state, asks, roster, tally)
            quorum = math.ceil(self._config.rounds.quorum * len(asks))
            if self._releases.hidden:  # a round that were repeated or given up for its answers would tell how many
                quorum = 0
            if len(answers) < quorum and kind != "secure":  # which has rules of its own for who may be missing
                answers.clear()
                why = "; ".join(_say(r) for r in tally.refused[-3:])
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

    def _evaluate(
        self, number: int, state: GlobalState, members: tuple[Member, ...], roster: Roster, tally: Tally
    ) -> dict[str, Any]:
        """Sums over the clients' held-out rows, per group and per client; and the server's own, if it has data.

        Who did not answer the training at all is not asked again: that could cost another deadline.
        """
        common = evaluation_ask(state) if self._method.evaluation is None else None
        scoring = () if self._unseen else members  # a score is a sum over one client's rows, in the clear
        asks = {m.id: common or self._evaluation(state, m) for m in scoring if m.id not in tally.missing}
        spool, told = self._ask("evaluate", number, 0, 0, state, asks, roster, tally)
        spool.clear()
        result = summary(_added(client["metrics"] for client in told))
        result["clients"] = {c["id"]: summary(c["metrics"], groups=False) for c in told}
        if self._evaluator is not None and not self._method.personal:
            result["server"] = summary(self._evaluator(state))
        return result

    def _evaluate_tasks(
        self,
        number: int,
        state: GlobalState,
        sealed: Sequence[str],
        members: tuple[Member, ...],
        roster: Roster,
        tally: Tally,
    ) -> dict[str, Any]:
        """`evaluation`: of the tasks that are being trained; where one was sealed also `border`: of all tasks.

        Clients score the tasks that they have and that have begun, each on its own held-out rows. The server scores
        all; after the last round it also tries every way to tell which task an input is of.
        """
        begun = [leg for leg in self._legs if leg.name in state.tasks and (sealed or number <= leg.last)]
        own: dict[str, dict[str, float]] = {}
        clients: dict[str, dict[str, float]] = {}
        way = self._config.continual.method
        if way != "nearest-mean" and not self._unseen:
            for phase, leg in enumerate(begun):
                ask = Ask(
                    task=leg.name,
                    blocks=self._blocks_for(state, leg.name),
                    arrays=keyed("head", head_of(state, leg.name, self._config)),
                )
                asks = {m.id: ask for m in members if leg.holds(m.id) and m.id not in tally.missing}
                spool, told = self._ask("evaluate", number, 0, phase, state, asks, roster, tally)
                spool.clear()
                own[leg.name] = _added(c["metrics"] for c in told)
                for c in told:
                    clients[c["id"]] = _added([clients.get(c["id"], {}), c["metrics"]])
        active = [leg.name for leg in self._legs if leg.first <= number <= leg.last]
        names = task_names(self._config) if JOINT in active else tuple(active)
        served: dict[str, dict[str, float]] = {}
        if self._tasks_evaluator is not None:
            served = self._tasks_evaluator.scores(state, task_names(self._config) if sealed else names)
        result = summary(_added(own[name] for name in active if name in own))
        result["clients"] = {c: summary(sums, groups=False) for c, sums in sorted(clients.items())}
        if served:
            result["server"] = summary(_added(served[name] for name in names))
        found: dict[str, Any] = {"evaluation": result}
        if sealed:
            found["border"] = {"sealed": list(sealed), "own": _by_task(own), "server": _by_task(served)}
            if self._tasks_evaluator is not None and number == self._rounds:
                found["border"]["inference"] = self._tasks_evaluator.inference(state)
        return found

    def _blocks_for(self, state: GlobalState, task: str) -> tuple[Block, ...]:
        """What `task` is scored with: everything; one adapter a task has nothing else."""
        if self._config.continual.method == "separate":
            return blocks_known(state, task, "separate")
        return blocks_of(state, state.tasks.values())

    def _evaluation(self, state: GlobalState, member: Member) -> Ask:
        assert self._method.evaluation is not None
        return self._method.evaluation(state, member)

    def _personal_left(self) -> bool:
        """Whether the clients still have to train their local adapters."""
        if self._config.personal.steps == 0:
            return False
        return not any(e["event"] == "personal" for e in read_log(self._log.path.parent))

    def _personalise(self, state: GlobalState, roster: Roster) -> None:
        """Every client trains a local adapter on the global one and keeps it; both are scored on its own rows."""
        number, steps = self._config.rounds.count + 1, self._config.personal.steps
        plain = local_training(self._config, method="plain LoRA")
        training = replace(plain, local_steps=steps, local_epochs=None, optimizer_state="fresh")
        common = evaluation_ask(state)
        head: tuple[Part, ...] = ("head",) if state.layout.head else ()
        asks: dict[str, Ask] = {}
        own: dict[str, Ask] = {}
        for m in roster.members():
            rank = self._config.personal.rank or m.rank
            plan = TrainPlan(
                method="personal",
                rank=rank,
                rows=rank,
                scale=m.scale,
                train=("A", "B", *head),
                send=(),
                keep=("A", "B", *head),
                a_from="fresh",
                b_from="zero",
                training=training,
                seed=int(stream(self._config.seed, "personal", m.id).integers(2**53)),
            )
            pair = state.open_task.pair
            asks[m.id] = Ask(plan=plan, blocks=common.blocks, frozen=pair, arrays=head_start(state))
            own[m.id] = replace(common, personal=PersonalPair(rank=rank, scale=m.scale))
        tally = Tally()
        self._notify({"event": "personal", "clients": len(asks)})
        trained, told = self._ask("train", number, 0, 0, state, asks, roster, tally)
        trained.clear()
        if not told:
            why = "; ".join(_say(r) for r in tally.refused[-3:])
            raise RoundFailed(
                f"no client could train a local adapter ({why}); the run's own adapter is in its checkpoint"
            )
        scores: list[dict[str, dict[str, Any]]] = []
        for phase, each in enumerate((dict.fromkeys(own, common), own)):
            there = {c["id"]: each[c["id"]] for c in told}
            spool, measured = self._ask("evaluate", number, 0, phase, state, there, roster, tally)
            spool.clear()
            scores.append({c["id"]: summary(c["metrics"], groups=False) for c in measured})
        clients = [
            {
                **client,
                "global": scores[0].get(client["id"], {}),
                "personal": scores[1].get(client["id"], {}),
            }
            for client in told
        ]
        refused = [vars(r) for r in sorted(tally.refused, key=lambda r: r.client)]
        traffic = {"bytes_down": sum(tally.down.values()), "bytes_up": sum(tally.up.values())}
        self._log.append({"event": "personal", "steps": steps, "clients": clients, "refused": refused, **traffic})

    def _ask(
        self,
        kind: Kind,
        number: int,
        attempt: int,
        phase: int,
        state: GlobalState,
        asks: Mapping[str, Ask],
        roster: Roster,
        tally: Tally,
    ) -> tuple[Spool, list[dict[str, Any]]]:
        """Send, admit and spool; returns the spool and what each accepted client told, in stable-id order."""
        wire = self._config.wire
        common = Header(
            run=self._run,
            round=number,
            client="",
            kind=kind,
            base=state.base,
            version=state.version,
            attempt=attempt,
            phase=phase,
            code=code_digest(),
        )
        asks = {c: self._coded(ask) for c, ask in asks.items()}
        self._account.asked(number, attempt, phase, asks)
        shapes: dict[tuple[int, tuple[Part, ...]], dict[str, tuple[int, ...]]] = {}  # few: asks share rank and parts
        bodies: dict[tuple[int, ...], BlocksBody] = {}  # few: clients lack the same blocks, which are encoded once
        offers: dict[str, Offer] = {}

        def expected(client: str) -> dict[str, tuple[int, ...]]:
            if kind == "secure":
                return {}
            plan = asks[client].plan
            key = (0, ()) if plan is None else (plan.rank, plan.send)  # all else is the same for all
            if key not in shapes:
                shapes[key] = expected_arrays(asks[client], state.layout)
            return shapes[key]

        def decode(client: str, data: bytes) -> Answer:
            return decode_answer(data, max_bytes=wire.max_bytes, expected=expected(client))[1]

        def offered(client: str) -> Offer:
            if kind == "secure" and asks[client].plan is None:
                offer = Offer(None, (), "")
            elif roster.clients[client].keeps:
                plan = asks[client].plan
                merge = plan is None or plan.against == 0  # a penalty is measured against each of them
                offer = self._holdings.offer(client, asks[client].blocks, state.version, merge=merge)
            else:  # the blocks as they are, so that its weights are bit for bit those of a client that holds them
                offer = Offer(None, asks[client].blocks, "")
            offers[client] = offer
            return offer

        def payload(client: str) -> bytes:
            offer = offered(client)
            ask = replace(asks[client], blocks=offer.blocks, on=offer.on, whole=offer.whole)
            key = tuple(map(id, ask.blocks))
            if key not in bodies:
                bodies[key] = encode_blocks(ask.blocks, wire.down)
            data = encode_ask(replace(common, client=client), ask, wire.down, shared=bodies[key])
            return self._channel.sealed(client, data)

        place = self._spool / f"{number:06d}-{attempt}-{kind}-{phase}"
        durable = self._durable and kind != "secure"  # the keys of a secure sum do not outlive this process
        spool = Spool(place, decode, memory_limit=SPOOL_MEMORY, durable=durable)
        told: dict[str, dict[str, Any]] = {}

        def accept(client: str, answer: Answer) -> None:
            if offers[client].whole:
                self._holdings.accepted(client, offers[client])
            measures = {"metrics": dict(answer.metrics)} if kind == "evaluate" else dict(answer.metrics)
            told[client] = {**measures, "id": client, "examples": answer.examples}
            self._notify(
                {"event": "answer", "kind": kind, "round": number, "client": client, "metrics": answer.metrics}
            )

        def admitted(client: str, data: bytes) -> Answer:
            asked = replace(common, client=client)
            answer = admit(data, asked, expected=expected(client), max_bytes=wire.max_bytes)
            if kind == "train" and self._config.rounds.max_norm is not None:
                require_norm(asks[client], answer, client, state.layout, self._config.rounds.max_norm)
            if kind == "measure":
                require_moments(asks[client], answer, client)
            return answer

        for client in sorted(asks):  # what was accepted before a crash stays accepted
            held = spool.found(client) if client in roster.clients else None
            if held is None:
                continue
            try:
                answer = admitted(client, held)
            except AnswerRejected as error:  # damaged on the disk: asked for again
                self._notify({"event": "again", "round": number, "client": client, "reason": error.detail})
                continue
            tally.down.setdefault(client, 0)
            tally.up[client] = tally.up.get(client, 0) + len(held)
            offered(client)
            spool.keep(client)
            accept(client, answer)
        here = [c for c in sorted(asks) if c in roster.clients and c not in told]
        gone = sorted(asks.keys() - roster.clients.keys())
        tally.missing.update(gone)
        self._refuse(tally, (Refusal(c, "node unavailable", "it left after the round began") for c in gone))

        def replies(clients: Iterable[str]) -> Iterator[tuple[str, bytes | Failure, int]]:
            return exchange(
                self._grid,
                [Asked(c, roster.clients[c].node, partial(payload, c)) for c in clients],
                message_type=MessageType.EVALUATE if kind == "evaluate" else MessageType.TRAIN,
                group=str(number),
                deadline=self._config.rounds.deadline,
                in_flight=self._config.rounds.in_flight,
            )

        again: list[str] = []  # asked once more: who lost its blocks (with all of them), and whose answer Flower lost
        for client, data, sent in itertools.chain(replies(here), itertools.chain.from_iterable(map(replies, [again]))):
            tally.down[client] = tally.down.get(client, 0) + sent
            if isinstance(data, Failure):
                if data.rule == "answer lost" and client not in again and kind != "secure":
                    again.append(client)
                    self._notify({"event": "again", "round": number, "client": client, "reason": data.detail})
                    continue
                if data.rule not in ("malformed", "second answer"):
                    tally.missing.add(client)
                self._refuse(tally, [Refusal(client, data.rule, data.detail)], strike=data.rule == "malformed")
                continue
            tally.up[client] = tally.up.get(client, 0) + len(data)
            asked = replace(common, client=client)
            try:
                _, data = self._channel.opened(data, asked, layout=state.layout.digest, max_bytes=wire.max_bytes)
                answer = admitted(client, data)
            except AnswerRejected as error:
                if error.rule == BlocksMissing.__name__ and client not in again:
                    self._holdings.lost(client)
                    again.append(client)
                    self._notify({"event": "again", "round": number, "client": client, "reason": error.detail})
                else:
                    refusal = Refusal(client, error.rule, error.detail)
                    self._refuse(tally, [refusal], strike=not isinstance(error, ReportedError))
                continue
            spool.put(client, data)
            accept(client, answer)
        return spool, [told[c] for c in sorted(told)]

    def _coded(self, ask: Ask) -> Ask:
        """The ask with the settings that its client goes by, its privacy, and the codec that its answer travels in."""
        ask = replace(ask, settings=self._channel.settings)
        if ask.plan is None:
            return ask
        wire = self._config.wire
        top = wire.top if ask.plan.feedback == "product" else None
        return replace(ask, plan=replace(ask.plan, codec=wire.up, top=top, privacy=self._account.privacy))

    def _refuse(self, tally: Tally, refusals: Iterable[Refusal], *, strike: bool = False) -> None:
        """Note who was refused. With `strike` it counts towards quarantine: what was sent was wrong, not late."""
        for refusal in refusals:
            tally.refused.append(refusal)
            strikes = self._strikes.get(refusal.client, 0) + strike
            self._notify({"event": "refused", **vars(refusal), "strikes": strikes})
            if not strike:
                continue
            self._strikes[refusal.client] = strikes
            if strikes == self._config.rounds.quarantine:
                self._notify({"event": "quarantine", "client": refusal.client, "rule": refusal.rule})

    def _quarantined(self, client: str) -> bool:
        limit = self._config.rounds.quarantine
        return bool(limit) and self._strikes.get(client, 0) >= limit

    def _forget_answers(self, *, keep: str | None) -> None:
        """Remove the spooled answers of rounds that are saved, all but those whose folder matches `keep`."""
        if keep is None:
            shutil.rmtree(self._spool, ignore_errors=True)
            return
        for folder in self._spool.glob("*"):
            if not folder.match(keep):
                shutil.rmtree(folder, ignore_errors=True)

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


def _added(several: Iterable[Mapping[str, float]]) -> dict[str, float]:
    sums: dict[str, float] = {}
    for one in several:
        for key, value in one.items():
            sums[key] = sums.get(key, 0.0) + value
    return sums


def _by_task(sums: Mapping[str, Mapping[str, float]]) -> dict[str, dict[str, Any]]:
    """Score, loss and score among the classes of all tasks, by task."""
    return {task: summary(one, groups=False) for task, one in sums.items()}


def _say(refusal: Refusal) -> str:
    return f"{refusal.client}: {refusal.rule}: {refusal.detail}"
