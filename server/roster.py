"""Who takes part: nodes are asked once who they are; clients are chosen by stable id, never by node id or arrival."""

from __future__ import annotations

import hashlib
import math
import re
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from flwr.app import MessageType
from flwr.serverapp import Grid

from fedlora.adapter import Array
from fedlora.code import code_digest
from fedlora.config import RunConfig
from fedlora.errors import AdapterError, AnswerRejected, RoundFailed, WireError
from fedlora.frame import from_json
from fedlora.privacy.noise import Noise
from fedlora.rng import stream
from fedlora.state import Answer, Ask, Header, Layout, part
from fedlora.wire import ModuleKind, encode_ask
from server.admission import admit, plain
from server.channel import Channel, Plain
from server.exchange import Asked, Failure, exchange
from strategies.base import Member

_PAUSE = 0.2  # seconds between looks at who is online
_LASTING = {"deadline", "malformed"}  # a node that failed its hello in another way is asked again before the next round


@dataclass(frozen=True)
class Enrolled:
    """One client that may take part: where it is, and what its plan depends on."""

    member: Member
    node: int
    keeps: bool = False  # it holds the blocks that it was sent


@dataclass(frozen=True)
class Refusal:
    """Who was refused by which rule, and what came."""

    client: str
    rule: str
    detail: str

    def __str__(self) -> str:
        return f"{self.client}: {self.rule}: {self.detail}"


@dataclass(frozen=True, kw_only=True)
class Hello:
    """What a client says of itself."""

    id: str
    rank: int
    base: str
    layout: Layout
    digest: str  # of the layout
    head: Mapping[str, Array]  # the base's own, as it was loaded; empty if the layout has none
    keeps: bool
    key: bytes  # its signing key, raw; empty if it has none


class Roster:
    """The clients of a run by stable id, agreed on one base and layout: those of the checkpoint, if there is one."""

    def __init__(
        self,
        grid: Grid,
        config: RunConfig,
        run: str,
        *,
        base: str | None,
        layout: Layout | None,
        channel: Channel | None = None,
    ) -> None:
        self._grid = grid
        self._channel = channel or Plain()
        self._config = config
        self._run = run
        self._seen: set[int] = set()
        self.base = base or config.model.fingerprint
        self.layout = layout
        self.head: Mapping[str, Array] = {}  # what a new run's head starts from: that of the first client by id
        self.clients: dict[str, Enrolled] = {}

    def wait(self, notify: Callable[[dict[str, Any]], None], *, resumed: bool) -> None:
        """Wait until `rounds.clients` nodes are connected; a resumed run goes on at the deadline if a quorum is.

        Raises: RoundFailed at the deadline, with the counts.
        """
        rounds, told = self._config.rounds, -1
        wanted, end = rounds.clients, time.monotonic() + rounds.deadline
        while (online := len(list(self._grid.get_node_ids()))) < wanted:
            if time.monotonic() > end:
                if resumed and online >= math.ceil(rounds.quorum * wanted):
                    return
                advice = "resume again" if resumed else "set rounds.clients to what there is"
                raise RoundFailed(
                    f"{online} of {wanted} nodes are online after {rounds.deadline:g} s. Start the missing nodes, or "
                    f"{advice}."
                )
            if online != told:
                notify({"event": "waiting", "online": online, "wanted": wanted})
                told = online
            time.sleep(_PAUSE)

    def await_nodes(self, wanted: int) -> None:
        """Wait until so many nodes are online, at most `rounds.deadline`: one that is started again is soon back."""
        end = time.monotonic() + self._config.rounds.deadline
        while len(list(self._grid.get_node_ids())) < wanted and time.monotonic() < end:
            time.sleep(_PAUSE)

    def refresh(self) -> list[Refusal]:
        """Ask every new node who it is; forget nodes that left. Returns who was refused, and why.

        The base is the one of the settings or of the checkpoint, else the commonest among the first answers; a client
        with another base, layout or code is refused. Raises: RoundFailed if no base or layout is the commonest.
        """
        online = set(self._grid.get_node_ids())
        trusted = self._channel.trusted()
        revoked = [c for c in self.clients if trusted is not None and c not in trusted]
        self.clients = {c: e for c, e in self.clients.items() if e.node in online and c not in revoked}
        self._seen &= online
        hellos: dict[int, Hello] = {}
        refused = [Refusal(c, "revoked", "its key is no longer trusted") for c in revoked]
        refused += self._ask(sorted(online - self._seen), hellos)
        self._agree(list(hellos.values()))
        for node, hello in sorted(hellos.items()):
            refusal = self._enrol(node, hello)
            if refusal is not None:
                refused.append(refusal)
        self.clients = dict(sorted(self.clients.items()))
        if not self.head and self.clients:
            first = next(iter(self.clients.values())).node
            self.head = hellos[first].head if first in hellos else {}
        return refused

    def _ask(self, nodes: list[int], hellos: dict[int, Hello]) -> list[Refusal]:
        """Fill `hellos` with what each node says of itself; the rest are refused."""
        refused: list[Refusal] = []
        layouts: dict[str, Layout] = {}  # one object for all who hold the same
        by_name = {f"node {n}": n for n in nodes}
        headers = {c: Header(run=self._run, round=0, client=c, kind="hello", code=code_digest()) for c in by_name}
        ask = Ask(settings=self._channel.settings)

        def payload(name: str) -> bytes:
            return self._channel.sealed(name, encode_ask(headers[name], ask))

        asks = [Asked(c, n, partial(payload, c)) for c, n in by_name.items()]
        for name, data, _ in exchange(
            self._grid,
            asks,
            message_type=MessageType.QUERY,
            group="hello",
            deadline=self._config.rounds.deadline,
            in_flight=self._config.rounds.in_flight,
        ):
            node = by_name[name]
            if isinstance(data, Failure):
                refused.append(Refusal(name, data.rule, data.detail))
                if data.rule in _LASTING:
                    self._seen.add(node)
                continue
            self._seen.add(node)
            try:
                limit = self._config.wire.max_bytes
                signer, data = self._channel.opened(data, headers[name], layout="", max_bytes=limit)
                hello = _hello(admit(data, headers[name], expected=None, max_bytes=limit))
                if hello.key and signer is not None and hashlib.sha256(hello.key).hexdigest() != signer:
                    raise AnswerRejected(
                        name, "other node", f"it tells another key than the one that {signer[:12]} has"
                    )
                if signer is not None and hello.id != signer:
                    raise AnswerRejected(
                        name, "other node", f"it calls itself {hello.id[:12]}, signed by {signer[:12]}"
                    )
                hellos[node] = replace(hello, layout=layouts.setdefault(hello.digest, hello.layout))
            except AnswerRejected as error:
                refused.append(Refusal(name, error.rule, error.detail))
            except WireError as error:
                refused.append(Refusal(name, "hello", plain(f"not a fedlora hello: {error}", 400)))
        return refused

    def _agree(self, hellos: list[Hello]) -> None:
        if self.base is None and hellos:
            self.base = _commonest([h.base for h in hellos], "bases", "set model.fingerprint to the base of the run")
        if self.layout is None:
            layouts = {h.digest: h.layout for h in hellos if h.base == self.base}
            if layouts:
                digests = [h.digest for h in hellos if h.base == self.base]
                chosen = _commonest(digests, "layouts", "give all the same model.target_modules and model.labels")
                self.layout = layouts[chosen]

    def _enrol(self, node: int, hello: Hello) -> Refusal | None:
        name, rank = hello.id, hello.rank
        if hello.base != self.base or self.layout is None:
            return Refusal(
                name, "other base", f"its base is {hello.base[:12]}, the run's is {(self.base or '')[:12]}; same model?"
            )
        if hello.layout != self.layout:
            ours, theirs = self.layout.to_json(), hello.layout.to_json()
            differ = sorted(
                name
                for part in ("modules", "head")
                for name in ours[part].keys() | theirs[part].keys()
                if ours[part].get(name) != theirs[part].get(name)
            )
            return Refusal(
                name,
                "other layout",
                plain(f"{len(differ)} modules or heads differ from the run's, such as {differ[:3]}", 400)
                + "; same target_modules and labels on both sides?",
            )
        if not 1 <= rank <= self.layout.max_rank():
            return Refusal(
                name, "rank", f"rank {rank}; the smallest adapted layer allows 1 to {self.layout.max_rank()}"
            )
        if name in self.clients:
            self._seen.discard(node)  # it may be the same client come back, before Flower saw its old node leave
            return Refusal(
                name, "same id twice", f"node {self.clients[name].node} has it already; every client needs its own id"
            )
        self.clients[name] = Enrolled(
            Member(id=name, rank=rank, scale=self._config.scale_of(rank), key=hello.key), node, hello.keeps
        )
        return None

    def members(self) -> tuple[Member, ...]:
        return tuple(e.member for e in self.clients.values())

    def require_members(self) -> tuple[str, Layout]:
        """(base, layout). Raises: RoundFailed if nobody could be enrolled."""
        if not self.clients or self.base is None or self.layout is None:
            raise RoundFailed("no client could be enrolled: every node failed or was refused; the log says why")
        return self.base, self.layout


def _hello(answer: Answer) -> Hello:
    """Raises: WireError naming the field that is wrong."""
    info = answer.info
    layout = from_json(Mapping[str, Any], info.get("layout"), "layout")
    modules = from_json(Mapping[str, tuple[int, int, ModuleKind, str]], layout.get("modules"), "modules")
    features = from_json(int, layout.get("features"), "features")
    head = from_json(Mapping[str, tuple[int, ...]], layout.get("head"), "head")
    sizes = [n for out, inp, _, _ in modules.values() for n in (out, inp)] + [
        n for shape in head.values() for n in shape
    ]
    if not modules or min(sizes) < 1 or features < 0:
        raise WireError(
            f"layout: {len(modules)} modules, smallest size {min(sizes, default=0)}, {features} features; sizes must "
            "be positive, and features at least 0"
        )
    if lost := sorted({m[3] for m in modules.values() if m[3]} - modules.keys())[:3]:
        raise WireError(f"layout: {lost} are named as sharing an input and are no modules")
    name = from_json(str, info.get("id"), "id")
    if not (0 < len(name) <= 200 and name.isprintable()):
        raise WireError(f"id must be 1 to 200 printable characters, got {name!r:.80}")
    parsed = Layout.from_json({"modules": modules, "head": head, "features": features})
    own = part(answer.arrays, "head")
    if answer.arrays and {n: x.shape for n, x in own.items()} != dict(parsed.head):
        raise WireError(
            f"its arrays {sorted(answer.arrays)[:4]} do not fit its layout's head {sorted(parsed.head)[:4]}"
        )
    return Hello(
        id=name,
        rank=from_json(int, info.get("rank"), "rank"),
        base=plain(from_json(str, info.get("base"), "base"), 200),
        layout=parsed,
        digest=parsed.digest,
        head=own,
        keeps=from_json(bool, info.get("keeps", False), "keeps"),
        key=_key(from_json(str, info.get("key", ""), "key")),
    )


def _key(text: str) -> bytes:
    """Raises: WireError if it is not the 32 bytes of a raw Ed25519 key in hex, nor nothing."""
    if text and not re.fullmatch(r"[0-9a-f]{64}", text):
        raise WireError(f"key must be 64 hex digits, got {text!r:.80}")
    return bytes.fromhex(text)


def _commonest(values: list[str], what: str, fix: str) -> str:
    first, *rest = Counter(values).most_common(2)
    if rest and first[1] == rest[0][1]:
        names = " and ".join(sorted((first[0][:12], rest[0][0][:12])))
        raise RoundFailed(f"clients hold different {what} in equal numbers ({names}): {fix}")
    return first[0]


def sample(members: tuple[Member, ...], config: RunConfig, round_: int) -> tuple[Member, ...]:
    """The clients of one round, by stable id: a fixed share without replacement, or each with that probability.

    Depends on the seed, the round and the ids alone. A Poisson sample may be empty.
    Raises: AdapterError if `members` is not sorted by id.
    """
    if [m.id for m in members] != sorted(m.id for m in members):
        raise AdapterError("members must come in stable-id order")
    generator = stream(config.seed, "sampling", round_)
    fraction = config.rounds.fraction
    if config.rounds.sampling == "poisson":
        return tuple(m for m, draw in zip(members, generator.random(len(members)), strict=True) if draw < fraction)
    count = max(1, round(fraction * len(members)))
    if count >= len(members):
        return members
    return tuple(members[i] for i in sorted(generator.choice(len(members), count, replace=False)))


def drawn(members: tuple[Member, ...], config: RunConfig) -> tuple[Member, ...]:
    """The clients of one round, each with probability `rounds.fraction`, by draws that nobody can make again."""
    return tuple(members[i] for i in Noise().chosen(len(members), config.rounds.fraction))
