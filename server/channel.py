"""How asks and answers are sealed on their way: as they are in a simulation, signed in a deployment.

An answer is let through only if it answers the very ask that was sent last to its client; what it says is then the
matter of `server/admission.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Protocol

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from fedlora.envelope import EnvelopeError, SentAsk, new_nonce, open_answer, sent_ask
from fedlora.errors import AnswerRejected, WireError
from fedlora.state import Header
from fedlora.wire import peek

__all__ = ["Channel", "Plain", "Signed"]


class Channel(Protocol):
    """What `server/asking.py` and `server/roster.py` put their messages through. `settings` go into every ask."""

    settings: str

    def sealed(self, client: str, ask: bytes) -> bytes:
        """The ask as it travels to `client`."""

    def opened(self, data: bytes, asked: Header, *, layout: str, max_bytes: int) -> tuple[str | None, bytes]:
        """(who signed, or None where nobody signs; the answer's bytes). Raises: AnswerRejected naming the rule."""

    def trusted(self) -> Collection[str] | None:
        """The stable ids that may take part now; None: whoever comes."""


class Plain:
    """Nothing is signed: clients in this process or under this person's own Flower."""

    settings = ""

    def sealed(self, client: str, ask: bytes) -> bytes:
        return ask

    def opened(self, data: bytes, asked: Header, *, layout: str, max_bytes: int) -> tuple[str | None, bytes]:
        return None, data

    def trusted(self) -> Collection[str] | None:
        return None


class Signed:
    """Asks signed by the operator, answers by enrolled nodes; `nodes()` gives their keys by stable id, read anew at
    every use, so that whoever is revoked is out from the next message on."""

    def __init__(
        self, operator: Ed25519PrivateKey, nodes: Callable[[], Mapping[str, Ed25519PublicKey]], *, settings: str
    ) -> None:
        self._operator = operator
        self._nodes = nodes
        self._sent: dict[str, SentAsk] = {}
        self.settings = settings

    def sealed(self, client: str, ask: bytes) -> bytes:
        data, self._sent[client] = sent_ask(ask, self._operator, new_nonce())
        return data

    def opened(self, data: bytes, asked: Header, *, layout: str, max_bytes: int) -> tuple[str | None, bytes]:
        try:
            node, payload = self._open(data, asked, layout, max_bytes)
        except EnvelopeError as error:
            raise AnswerRejected(asked.client, error.rule, error.detail) from error
        if asked.kind != "hello" and node != asked.client:
            raise AnswerRejected(asked.client, "other node", f"signed by node {node[:12]}, which was not asked")
        return node, payload

    def trusted(self) -> Collection[str] | None:
        return self._nodes().keys()

    def _open(self, data: bytes, asked: Header, layout: str, max_bytes: int) -> tuple[str, bytes]:
        ask, keys = self._sent[asked.client], self._nodes()
        try:
            return open_answer(data, ask=ask, asked=asked, layout=layout, keys=keys, max_bytes=max_bytes)
        except EnvelopeError as error:
            if error.rule != "signature" or not layout:
                raise
            try:  # a node that could not load its base knows no layout, and can only say so
                opened = open_answer(data, ask=ask, asked=asked, layout="", keys=keys, max_bytes=max_bytes)
                if peek(opened[1], max_bytes=max_bytes).kind == "error":
                    return opened
            except (EnvelopeError, WireError):
                raise error from None
            raise
