"""The session that a secure sum belongs to: what all sides must agree on before a key is made, and its digest."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from fedlora.errors import WireError
from fedlora.privacy.secagg.fixed_point import FixedPoint
from fedlora.privacy.secagg.graph import least_degree, neighbours
from fedlora.privacy.secagg.refusal import Refused

PROTOCOL = "fedlora-secagg/1"
LEAST = 3  # members of any sum: of two, each can subtract itself
_LARGEST = 1 << 21  # bytes of an encoded context
_MEMBERS = 10_000


@dataclass(frozen=True)
class Member:
    """One client: its raw Ed25519 public key (32 bytes) and the rank at which it trains."""

    key: bytes
    rank: int

    @cached_property
    def id(self) -> str:
        """The stable id: SHA-256 of the raw key, 64 hex digits (`pki.node_id`)."""
        return hashlib.sha256(self.key).hexdigest()


@dataclass(frozen=True, kw_only=True)
class Context:
    """One session. `base`, `layout` and `basis` are 64 hex digits: the base model's fingerprint, the digest of the
    vector's layout (`packing.Packing.digest`), and of the public A0, Omega or Q. `server_key` is the server's raw
    X25519 key for this session. `threshold` is how many of a neighbourhood, the client itself among them, open a
    secret; `degree` is how many neighbours each client has.

    Raises: Refused for values that cannot keep the promise, each named.
    """

    run: str
    round: int
    attempt: int
    part: int
    parts: int
    base: str
    layout: str
    basis: str
    server_key: bytes
    fixed_point: FixedPoint
    threshold: int
    degree: int
    least_survivors: int
    least_per_tier: int
    roster: tuple[Member, ...]

    def __post_init__(self) -> None:
        ids, n = [m.id for m in self.roster], len(self.roster)
        size = self.degree + 1
        rules = (
            ("run", 1 <= len(self.run) <= 200, "a run id has 1 to 200 characters"),
            ("numbers", self.round >= 0 and self.attempt >= 0, "round and attempt count from 0"),
            ("part", 1 <= self.part <= self.parts <= 2, f"part {self.part} of {self.parts}, of at most 2"),
            ("digest", all(_is_digest(x) for x in (self.base, self.layout, self.basis)), "a digest is 64 hex digits"),
            ("server-key", len(self.server_key) == 32, "an X25519 key has 32 bytes"),
            ("roster", LEAST <= n <= _MEMBERS, f"{n} members; {LEAST} to {_MEMBERS} can hide one another"),
            ("roster", ids == sorted(set(ids)), "members must differ and be sorted by id"),
            ("roster", all(len(m.key) == 32 and m.rank >= 1 for m in self.roster), "keys of 32 bytes, ranks from 1"),
            ("fixed-point", self.fixed_point.clients >= n, f"coded for {self.fixed_point.clients} of {n} clients"),
            (
                "graph",
                least_degree(max(n, 2)) <= self.degree <= n - 1 and (self.degree % 2 == 0 or self.degree == n - 1),
                f"{self.degree} neighbours among {n} clients: too few, too many or odd; {least_degree(max(n, 2))} do",
            ),
            (
                "threshold",
                size < 2 * self.threshold <= 2 * size,
                f"{self.threshold} of a neighbourhood of {size}: must be more than half, or both shares can be had",
            ),
            ("survivors", LEAST <= self.least_survivors <= n, f"{self.least_survivors} of {n} survivors"),
            ("tier", self.least_per_tier >= LEAST, f"{self.least_per_tier} per tier; fewer than {LEAST} hide nothing"),
        )
        for rule, holds, detail in rules:
            if not holds:
                raise Refused(rule, detail)
        self.require_tiers(ids, "roster")

    @cached_property
    def digest(self) -> bytes:
        """SHA-256 of the canonical encoding, 32 bytes: what every key and every signature is bound to."""
        return hashlib.sha256(self.to_bytes()).digest()

    @cached_property
    def members(self) -> dict[str, Member]:
        return {m.id: m for m in self.roster}

    @cached_property
    def points(self) -> dict[str, int]:
        """Where each member's Shamir shares are taken: its place in the roster, from 1."""
        return {m.id: at for at, m in enumerate(self.roster, 1)}

    @cached_property
    def neighbours(self) -> dict[str, tuple[str, ...]]:
        """The graph, from a digest of what a server cannot vary within a round: no attempt, no key, no setting."""
        ids = sorted(self.members)
        fixed = {"run": self.run, "round": self.round, "base": self.base, "degree": self.degree, "roster": ids}
        return neighbours(ids, self.degree, hashlib.sha256(_canonical(fixed)).digest())

    def neighbourhood(self, member: str) -> frozenset[str]:
        """A member and its neighbours."""
        return frozenset((member, *self.neighbours[member]))

    def require_tiers(self, ids: Collection[str], stage: str) -> None:
        """Every column of a nested adapter must be the sum of enough of `ids`: see `tiers`.

        Raises: Refused, naming tier and stage.
        """
        for rank, count in tiers({i: self.members[i].rank for i in ids}).items():
            if count < self.least_per_tier:
                raise Refused(
                    "tier",
                    f"{stage}: {count} of rank {rank} or above, and columns up to {rank} would be their sum alone; "
                    f"{self.least_per_tier} are needed: move them to a lower rank before training (`demoted`)",
                )

    def require_enough(self, ids: Collection[str], stage: str) -> None:
        """What any list of remaining members must satisfy: members, enough of them, in every tier, and in part 2 all.

        Raises: Refused, naming rule and stage.
        """
        if len(set(ids)) < len(ids) or not self.members.keys() >= set(ids):
            raise Refused("members", f"{stage}: a list with others than members, or with one twice")
        if len(ids) < self.least_survivors:
            raise Refused("survivors", f"{stage}: {len(ids)} are left, {self.least_survivors} are needed")
        if self.part > 1 and len(ids) < len(self.roster):
            raise Refused(
                "parts",
                f"{stage}: {len(self.roster) - len(ids)} of those in part 1 are missing; sums over different clients "
                "would show their difference, so the round is lost",
            )
        self.require_tiers(ids, stage)

    def require(self, **expected: object) -> None:
        """What a client knows of the session beforehand, by name of field. Raises: Refused for the first that differs.

        An unknown name is a mistake of the caller's: AttributeError.
        """
        for name, value in expected.items():
            if (got := getattr(self, name)) != value:
                raise Refused("context", f"{name} is {got!r} in this session, and {value!r} here")

    def verify(self, member: str, signature: bytes, data: bytes) -> bool:
        """Whether a member signed these bytes."""
        try:
            Ed25519PublicKey.from_public_bytes(self.members[member].key).verify(signature, data)
        except InvalidSignature:
            return False
        return True

    def to_bytes(self) -> bytes:
        """Canonical JSON: sorted keys, no spaces, floats in hexadecimal."""
        return _canonical(self._values())

    def _values(self) -> dict[str, Any]:
        f = self.fixed_point
        values = {name: getattr(self, name) for name in _TEXTS + _NUMBERS}
        return values | {
            "protocol": PROTOCOL,
            "server_key": self.server_key.hex(),
            "fixed_point": [f.size, f.clients, float(f.bound).hex(), f.headroom],
            "roster": [[m.key.hex(), m.rank] for m in self.roster],
        }

    @classmethod
    def from_bytes(cls, data: bytes) -> Context:
        """The context of these bytes, which must be those that `to_bytes` gives.

        Raises: WireError if they are not; Refused if they are, and the session cannot keep its promise.
        """
        if len(data) > _LARGEST:
            raise WireError(f"a context of {len(data)} bytes is above the cap of {_LARGEST}")
        try:
            values = json.loads(data)
            if values.pop("protocol") != PROTOCOL:
                raise ValueError(f"not a session of {PROTOCOL}")
            size, clients, bound, headroom = values.pop("fixed_point")
            point = FixedPoint(
                size=_whole(size), clients=_whole(clients), bound=float.fromhex(bound), headroom=_whole(headroom)
            )
            roster = tuple(Member(bytes.fromhex(key), _whole(rank)) for key, rank in values.pop("roster"))
            found: dict[str, Any] = {name: _text(values.pop(name)) for name in _TEXTS}
            found |= {name: _whole(values.pop(name)) for name in _NUMBERS}
            server_key = bytes.fromhex(values.pop("server_key"))
            context = cls(fixed_point=point, roster=roster, server_key=server_key, **found)
            canonical = context.to_bytes()
        except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError) as error:
            raise WireError(f"not the context of a secure sum: {type(error).__name__}: {error}") from None
        if canonical != data:
            raise WireError("a context that is not byte for byte what it says in canonical form")
        return context


_TEXTS = ("run", "base", "layout", "basis")
_NUMBERS = (
    "round", "attempt", "part", "parts", "threshold", "degree", "least_survivors", "least_per_tier",
)  # fmt: skip


def roster(members: Mapping[bytes, int] | Sequence[Member]) -> tuple[Member, ...]:
    """Members in the order of their ids, from Ed25519 public key (32 bytes) to rank."""
    found = [Member(*item) for item in members.items()] if isinstance(members, Mapping) else members
    return tuple(sorted(found, key=lambda m: m.id))


def usual_threshold(neighbourhood: int) -> int:
    """floor(2s/3) + 1 of a neighbourhood of s: bears s/3 that drop out, or s/3 that help the server (Bonawitz 2017)."""
    return 2 * neighbourhood // 3 + 1


def tiers(ranks: Mapping[str, int]) -> dict[int, int]:
    """For each rank that occurs, highest first, how many clients have it or a higher one.

    In a nested sum (columns beyond a client's rank are zero) columns up to rank r and beyond the next lower rank are
    the sum of exactly these clients. A single client of a low rank among many of higher ones is therefore well hidden,
    and the lowest tier holds everybody.
    """
    return {rank: sum(r >= rank for r in ranks.values()) for rank in sorted(set(ranks.values()), reverse=True)}


def demoted(ranks: Mapping[str, int], least: int) -> dict[str, int]:
    """The ranks at which clients must train so that each tier has `least` members; to be applied before training.

    From the top, a tier with too few members moves down to the next rank that occurs. Ids keep their order.
    Raises: Refused if all clients together are fewer than `least`.
    """
    if len(ranks) < least:
        raise Refused("tier", f"{len(ranks)} clients in all, and every sum needs {least}")
    fitting = [rank for rank, count in tiers(ranks).items() if count >= least]
    return {client: min(rank, fitting[0]) for client, rank in ranks.items()}


def _canonical(values: Mapping[str, Any]) -> bytes:
    return json.dumps(values, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def _is_digest(text: str) -> bool:
    return len(text) == 64 and set(text) <= set("0123456789abcdef")


def _whole(value: Any) -> int:
    if type(value) is not int or not 0 <= value < 2**63:
        raise ValueError(f"{value!r} is not a whole number of 63 bits")
    return value


def _text(value: Any) -> str:
    if type(value) is not str:
        raise ValueError(f"{value!r} is not text")
    return value
