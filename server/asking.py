"""Takes the asks of one turn to their clients and brings back what they answer, admitted and spooled.

What outlasts a turn is here too: which blocks each client holds, so that few bytes are sent, and how often a client's
answers were refused for what they are.
"""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import MessageType
from flwr.serverapp import Grid

from fedlora.adapter import Array
from fedlora.code import code_digest
from fedlora.config import RunConfig
from fedlora.errors import AnswerRejected, BlocksMissing
from fedlora.state import Answer, Ask, GlobalState, Header, Kind, Part, expected_arrays
from fedlora.wire import BlocksBody, decode_answer, encode_ask, encode_blocks
from server.admission import ReportedError, admit, require_moments, require_norm
from server.channel import Channel
from server.exchange import Asked, Failure, exchange
from server.holdings import OWNER, Holdings, Offer
from server.private import Account
from server.roster import Refusal, Roster
from server.spool import Spool

__all__ = ["SPOOL_MEMORY", "STRIKES", "Courier", "Notify", "Tally", "Turn"]

Notify = Callable[[dict[str, Any]], None]
STRIKES = "strikes"  # in GlobalState.memory
SPOOL_MEMORY = 256 * 2**20  # bytes of answers that one turn may hold in memory before it spills to disk


@dataclass
class Tally:
    """What one round saw: bytes and refusals of all its attempts, and who is still missing."""

    down: dict[str, int] = field(default_factory=dict)
    up: dict[str, int] = field(default_factory=dict)
    refused: list[Refusal] = field(default_factory=list)
    missing: set[str] = field(default_factory=set)
    quarantined: set[str] = field(default_factory=set)


@dataclass(frozen=True, kw_only=True)
class Turn:
    """Which asks these are: of a round's attempt, which yields them in phases."""

    kind: Kind
    round: int
    attempt: int = 0
    phase: int = 0


class Courier:
    """Asks and answers of one run over one Grid. `spool` is the folder for answers that are not folded yet; with
    `durable` every accepted one is on disk before it counts, and who gave it is not asked again after a crash.
    """

    def __init__(
        self, grid: Grid, config: RunConfig, spool: Path, *, run: str, channel: Channel, durable: bool, notify: Notify
    ) -> None:
        self._grid, self._config, self._channel, self._run = grid, config, channel, run
        self._spool, self._durable, self._notify = spool, durable, notify
        self._strikes: dict[str, int] = {}  # client -> answers that were refused for what they are
        self._holdings = Holdings()
        self._account: Account

    @property
    def strikes(self) -> dict[str, int]:
        """By client, how many of its answers were refused for what they are."""
        return dict(self._strikes)

    def restore(self, memory: Mapping[str, Mapping[str, Array]], account: Account) -> None:
        """Go on from what a state remembers (see `memory`), and on this account of privacy."""
        codec, versioned = self._config.wire.down, not self._config.tasks
        self._account = account
        self._holdings = Holdings(memory.get(OWNER), codec=codec, versioned=versioned)
        self._strikes = {c: int(x[0]) for c, x in memory.get(STRIKES, {}).items()}

    def memory(self, *, hidden: bool) -> dict[str, Mapping[str, Array]]:
        """What a state has to remember, by owner. With `hidden` not who holds what, which says who was drawn."""
        strikes = {c: np.array([n], np.float64) for c, n in sorted(self._strikes.items())}
        return {**({} if hidden else {OWNER: self._holdings.memory()}), **({STRIKES: strikes} if strikes else {})}

    def ask(
        self, turn: Turn, state: GlobalState, asks: Mapping[str, Ask], roster: Roster, tally: Tally
    ) -> tuple[Spool, list[dict[str, Any]]]:
        """Send, admit and spool; returns the spool and what each accepted client told, in stable-id order."""
        kind, number, wire = turn.kind, turn.round, self._config.wire
        common = Header(
            run=self._run,
            round=number,
            client="",
            kind=kind,
            base=state.base,
            version=state.version,
            attempt=turn.attempt,
            phase=turn.phase,
            code=code_digest(),
        )
        asks = {c: self._coded(ask) for c, ask in asks.items()}
        self._account.asked(number, turn.attempt, turn.phase, asks)
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

        place = self._spool / f"{number:06d}-{turn.attempt}-{kind}-{turn.phase}"
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
        self.refuse(tally, (Refusal(c, "node unavailable", "it left after the round began") for c in gone))

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
                self.refuse(tally, [Refusal(client, data.rule, data.detail)], strike=data.rule == "malformed")
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
                    self.refuse(tally, [refusal], strike=not isinstance(error, ReportedError))
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

    def refuse(self, tally: Tally, refusals: Iterable[Refusal], *, strike: bool = False) -> None:
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

    def quarantined(self, client: str) -> bool:
        limit = self._config.rounds.quarantine
        return bool(limit) and self._strikes.get(client, 0) >= limit

    def forget(self, *, keep: int | None = None) -> None:
        """Remove the spooled answers of rounds that are saved: all, or all but those of round `keep`."""
        if keep is None:
            shutil.rmtree(self._spool, ignore_errors=True)
            return
        for folder in self._spool.glob("*"):
            if not folder.match(f"{keep:06d}-*"):
                shutil.rmtree(folder, ignore_errors=True)
