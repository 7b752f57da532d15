"""Rosters, sessions and a driver that runs one, with drop-outs and with somebody in the middle."""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from numpy.typing import NDArray

from fedlora.pki import node_id
from fedlora.privacy.secagg.client import Client
from fedlora.privacy.secagg.consent import Consent
from fedlora.privacy.secagg.context import Context, roster, usual_threshold
from fedlora.privacy.secagg.fixed_point import FixedPoint
from fedlora.privacy.secagg.graph import least_degree
from fedlora.privacy.secagg.messages import FromClient, FromServer, from_client, from_server
from fedlora.privacy.secagg.server import SecureSum, Server

Vectors = Mapping[str, NDArray[np.float32]]
STAGES = ("advertise", "share", "mask", "confirm", "unmask")


@dataclass
class Memory:
    """A record that is kept in memory, and every version of it."""

    consent: Consent
    history: list[bytes] = field(default_factory=list)

    def load(self) -> Consent:
        return self.consent

    def save(self, consent: Consent) -> None:
        self.history.append(consent.to_bytes())
        self.consent = Consent.from_bytes(self.history[-1])


@dataclass
class Federation:
    """Clients that live longer than a session."""

    keys: dict[str, Ed25519PrivateKey]
    ranks: dict[str, int]
    consents: dict[str, Memory]

    @property
    def ids(self) -> list[str]:
        return sorted(self.keys)

    def session(self, ids: Collection[str] | None = None, **changes: Any) -> tuple[Context, X25519PrivateKey]:
        members = sorted(self.ids if ids is None else ids)
        key = X25519PrivateKey.generate()
        degree = changes.pop("degree", least_degree(len(members)))
        settings: dict[str, Any] = {
            "run": "run", "round": 0, "attempt": 0, "part": 1, "parts": 1, "base": "a" * 64, "layout": "b" * 64,
            "basis": "c" * 64, "server_key": key.public_key().public_bytes_raw(), "degree": degree,
            "fixed_point": FixedPoint(size=37, clients=len(members), bound=1.0),
            "threshold": usual_threshold(degree + 1), "least_survivors": 3, "least_per_tier": 3,
            "roster": roster({self.keys[i].public_key().public_bytes_raw(): self.ranks[i] for i in members}),
        }  # fmt: skip
        return Context(**settings | changes), key

    def clients(self, context: Context) -> dict[str, Client]:
        return {i: Client(context, self.keys[i], self.consents[i]) for i in context.members}


def federation(count: int, ranks: Sequence[int] = (4,)) -> Federation:
    keys = [Ed25519PrivateKey.generate() for _ in range(count)]
    ids = [node_id(k.public_key()) for k in keys]
    return Federation(
        keys=dict(zip(ids, keys, strict=True)),
        ranks={i: ranks[at % len(ranks)] for at, i in enumerate(ids)},
        consents={i: Memory(Consent("run")) for i in ids},
    )


def vectors(context: Context, seed: int = 0, norm: float = 1.0) -> dict[str, NDArray[np.float32]]:
    rng = np.random.default_rng(seed)
    found = {}
    for i in context.members:
        x = rng.standard_normal(context.fixed_point.size)
        found[i] = (norm * x / np.linalg.norm(x)).astype(np.float32)
    return found


Tamper = Callable[[str, Any], Any]


@dataclass
class Run:
    """One session, stage by stage; every message goes through bytes. `down` and `up` may change what passes."""

    federation: Federation
    context: Context
    key: X25519PrivateKey
    vectors: Vectors
    drop: Mapping[str, Collection[str]] = field(default_factory=dict)
    up: Tamper = lambda i, m: m
    down: Tamper = lambda i, m: m

    def __post_init__(self) -> None:
        self.server = Server(self.context, self.key)
        self.clients = self.federation.clients(self.context)
        self.left = sorted(self.clients)

    def to(self, i: str, message: FromServer) -> Any:
        return self.down(i, from_server(message.to_bytes(), self.context))

    def send(self, i: str, message: FromClient) -> None:
        self.server.receive(i, self.up(i, from_client(message.to_bytes(), self.context)))

    def alive(self, stage: str) -> list[str]:
        self.left = [i for i in self.left if i not in self.drop.get(stage, ())]
        return self.left

    def advertise(self) -> None:
        for i in self.alive("advertise"):
            self.send(i, self.clients[i].advertise())
        self.adverts = self.server.close_advertising()

    def share(self) -> None:
        for i in self.alive("share"):
            self.send(i, self.clients[i].share(self.to(i, self.adverts[i])))
        self.deliveries = self.server.close_sharing()

    def mask(self) -> None:
        for i in self.alive("mask"):
            self.send(i, self.clients[i].mask(self.to(i, self.deliveries[i]), self.vectors[i]))
        self.survivors = self.server.close_masking()

    def confirm(self) -> None:
        for i in self.alive("confirm"):
            self.send(i, self.clients[i].confirm(self.to(i, self.survivors)))
        self.requests = self.server.close_confirming()

    def unmask(self) -> None:
        for i in self.alive("unmask"):
            self.send(i, self.clients[i].unmask(self.to(i, self.requests[i])))

    def until(self, stage: str) -> None:
        """All stages before one."""
        for name in STAGES[: STAGES.index(stage)]:
            getattr(self, name)()

    def sum(self) -> SecureSum:
        self.until("unmask")
        self.unmask()
        return self.server.finish()


def started(count: int = 5, stage: str = "advertise", **changes: Any) -> Run:
    """A session of `count` clients, run up to a stage."""
    clients = federation(count)
    context, key = clients.session(**changes)
    run = Run(clients, context, key, vectors(context))
    run.until(stage)
    return run


def signed(message: Any, key: Ed25519PrivateKey) -> Any:
    return replace(message, signature=key.sign(message.signed_bytes()))


@pytest.fixture(scope="session")
def sessions() -> ModuleType:
    """This module: with `--import-mode=importlib` a conftest cannot be imported by name."""
    return sys.modules[__name__]
