"""What client and server say to one another, as values and as bytes.

    message = "fsagg-1" | kind (1 byte) | session (32) | sender (32, up only) | body | signature (64) or tag (16)

Integers are little endian, ids and keys raw, lists a u32 count and entries of one size. Bytes are untrusted: every
count is held against the session's own numbers before anything is made of it, and nothing may be left over.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import ClassVar, TypeVar

import numpy as np

from fedlora.errors import WireError
from fedlora.privacy.secagg.context import Context
from fedlora.privacy.secagg.field import SHARE_BYTES
from fedlora.privacy.secagg.fixed_point import Words

T = TypeVar("T")

SEALED_BYTES = 2 * SHARE_BYTES + 16  # two shares and AES-GCM's tag
_MAGIC = b"fsagg-1"


@dataclass(frozen=True, kw_only=True)
class Advertise:
    """A client's public keys for this session (X25519, 32 bytes each) and the commitment to its seed."""

    KIND: ClassVar[int] = 1
    session: bytes
    sender: str
    channel_key: bytes
    mask_key: bytes
    seed_commitment: bytes
    signature: bytes = b""

    def signed_bytes(self) -> bytes:
        return _head(self.KIND, self.session, self.sender) + self.channel_key + self.mask_key + self.seed_commitment

    def to_bytes(self) -> bytes:
        return self.signed_bytes() + self.signature


@dataclass(frozen=True)
class Sealed:
    """Two shares, of a mask key and of a seed, sealed for or from `peer`, and the owner's commitment to each."""

    peer: str
    key_commitment: bytes
    seed_commitment: bytes
    data: bytes

    def to_bytes(self) -> bytes:
        return bytes.fromhex(self.peer) + self.key_commitment + self.seed_commitment + self.data


@dataclass(frozen=True, kw_only=True)
class Shares:
    """What a client shares out: one entry for each neighbour, and the commitment to the seed share that it keeps."""

    KIND: ClassVar[int] = 2
    session: bytes
    sender: str
    own_commitment: bytes
    sealed: tuple[Sealed, ...]
    signature: bytes = b""

    def signed_bytes(self) -> bytes:
        return (
            _head(self.KIND, self.session, self.sender)
            + self.own_commitment
            + _listed(s.to_bytes() for s in self.sealed)
        )

    def to_bytes(self) -> bytes:
        return self.signed_bytes() + self.signature


@dataclass(frozen=True, kw_only=True, eq=False)
class Masked:
    """A masked vector `[m]` and its tag (GMAC under a key that only this client and the server have)."""

    KIND: ClassVar[int] = 3
    session: bytes
    sender: str
    words: Words
    tag: bytes

    def to_bytes(self) -> bytes:
        count = self.words.size.to_bytes(8, "little")
        return b"".join((_head(self.KIND, self.session, self.sender), count, self.words.data.cast("B"), self.tag))


@dataclass(frozen=True, kw_only=True)
class Confirm:
    """A client's signature over who shared and who survived (`digest_of` each): the consistency round."""

    KIND: ClassVar[int] = 4
    session: bytes
    sender: str
    shared: bytes
    survivors: bytes
    signature: bytes = b""

    def signed_bytes(self) -> bytes:
        return _head(self.KIND, self.session, self.sender) + self.shared + self.survivors

    def to_bytes(self) -> bytes:
        return self.signed_bytes() + self.signature


@dataclass(frozen=True, kw_only=True)
class Unmask:
    """Shares by owner: of the seeds of those alive, of the mask keys of those gone."""

    KIND: ClassVar[int] = 5
    session: bytes
    sender: str
    seeds: tuple[tuple[str, bytes], ...]
    keys: tuple[tuple[str, bytes], ...]
    signature: bytes = b""

    def signed_bytes(self) -> bytes:
        return _head(self.KIND, self.session, self.sender) + _pairs(self.seeds) + _pairs(self.keys)

    def to_bytes(self) -> bytes:
        return self.signed_bytes() + self.signature


@dataclass(frozen=True, kw_only=True)
class Advertisements:
    """The keys in one client's neighbourhood, its own among them."""

    KIND: ClassVar[int] = 6
    session: bytes
    entries: tuple[Advertise, ...]

    def to_bytes(self) -> bytes:
        return _head(self.KIND, self.session) + _listed(e.to_bytes() for e in self.entries)


@dataclass(frozen=True, kw_only=True)
class Deliveries:
    """Everybody who shared, and what the neighbours among them sealed for one client."""

    KIND: ClassVar[int] = 7
    session: bytes
    shared: tuple[str, ...]
    sealed: tuple[Sealed, ...]

    def to_bytes(self) -> bytes:
        return _head(self.KIND, self.session) + _ids(self.shared) + _listed(s.to_bytes() for s in self.sealed)


@dataclass(frozen=True, kw_only=True)
class Survivors:
    """Everybody whose masked vector is in the sum."""

    KIND: ClassVar[int] = 8
    session: bytes
    ids: tuple[str, ...]

    def to_bytes(self) -> bytes:
        return _head(self.KIND, self.session) + _ids(self.ids)


@dataclass(frozen=True, kw_only=True)
class UnmaskRequest:
    """Who is alive and who is gone of those who shared, and signatures of the neighbourhood over these lists."""

    KIND: ClassVar[int] = 9
    session: bytes
    alive: tuple[str, ...]
    gone: tuple[str, ...]
    signatures: tuple[tuple[str, bytes], ...]

    def to_bytes(self) -> bytes:
        return _head(self.KIND, self.session) + _ids(self.alive) + _ids(self.gone) + _pairs(self.signatures)


FromClient = Advertise | Shares | Masked | Confirm | Unmask
FromServer = Advertisements | Deliveries | Survivors | UnmaskRequest


def commitment(session: bytes, purpose: str, *parts: bytes) -> bytes:
    """SHA-256 over a purpose and length-prefixed parts, bound to the session. What is hidden has 256 random bits."""
    whole = (b"fedlora-secagg/1 commitment", session, purpose.encode(), *parts)
    return hashlib.sha256(b"".join(len(x).to_bytes(4, "little") + x for x in whole)).digest()


def share_commitment(session: bytes, purpose: str, owner: str, holder: str, share: bytes) -> bytes:
    """The commitment to one share; `purpose` is "key share" or "seed share"."""
    return commitment(session, purpose, bytes.fromhex(owner), bytes.fromhex(holder), share)


def digest_of(ids: Iterable[str]) -> bytes:
    """SHA-256 over a set of stable ids."""
    return hashlib.sha256(b"".join(bytes.fromhex(i) for i in sorted(ids))).digest()


def from_client(data: bytes, context: Context) -> FromClient:
    """The message in these bytes; the session that it names is not compared. Raises: WireError if there is none."""
    kind, r = _opened(data)
    message: FromClient
    if kind == Advertise.KIND:
        message = _advertise(r, r.take(32))
    elif kind == Shares.KIND:
        message = Shares(
            session=r.take(32), sender=r.id(), own_commitment=r.take(32),
            sealed=r.listed(context.degree, r.sealed), signature=r.take(64),
        )  # fmt: skip
    elif kind == Masked.KIND:
        message = Masked(session=r.take(32), sender=r.id(), words=r.words(context.fixed_point.size), tag=r.take(16))
    elif kind == Confirm.KIND:
        message = Confirm(
            session=r.take(32), sender=r.id(), shared=r.take(32), survivors=r.take(32), signature=r.take(64)
        )
    elif kind == Unmask.KIND:
        near = context.degree + 1
        message = Unmask(
            session=r.take(32), sender=r.id(),
            seeds=r.listed(near, lambda: (r.id(), r.take(SHARE_BYTES))),
            keys=r.listed(near, lambda: (r.id(), r.take(SHARE_BYTES))), signature=r.take(64),
        )  # fmt: skip
    else:
        raise WireError(f"message of kind {kind} where a client's was expected")
    r.end()
    return message


def from_server(data: bytes, context: Context) -> FromServer:
    """The message in these bytes; the session that it names is not compared. Raises: WireError if there is none."""
    kind, r = _opened(data)
    everybody, near = len(context.roster), context.degree + 1
    message: FromServer
    if kind == Advertisements.KIND:
        message = Advertisements(session=r.take(32), entries=r.listed(near, r.advertise))
    elif kind == Deliveries.KIND:
        message = Deliveries(
            session=r.take(32), shared=r.listed(everybody, r.id), sealed=r.listed(context.degree, r.sealed)
        )
    elif kind == Survivors.KIND:
        message = Survivors(session=r.take(32), ids=r.listed(everybody, r.id))
    elif kind == UnmaskRequest.KIND:
        message = UnmaskRequest(
            session=r.take(32), alive=r.listed(everybody, r.id), gone=r.listed(everybody, r.id),
            signatures=r.listed(near, lambda: (r.id(), r.take(64))),
        )  # fmt: skip
    else:
        raise WireError(f"message of kind {kind} where a server's was expected")
    r.end()
    return message


class _Reader:
    """Takes bytes in order and never more than there are."""

    def __init__(self, data: bytes) -> None:
        self._data = memoryview(data)
        self._at = 0

    def take(self, count: int) -> bytes:
        return bytes(self._view(count))

    def id(self) -> str:
        return self.take(32).hex()

    def listed(self, most: int, read: Callable[[], T]) -> tuple[T, ...]:
        count = int.from_bytes(self.take(4), "little")
        if count > most:
            raise WireError(f"a list of {count} entries where at most {most} can be")
        return tuple(read() for _ in range(count))

    def sealed(self) -> Sealed:
        return Sealed(self.id(), self.take(32), self.take(32), self.take(SEALED_BYTES))

    def advertise(self) -> Advertise:
        head = self.take(len(_MAGIC) + 1)
        if head != _MAGIC + bytes([Advertise.KIND]):
            raise WireError("an entry that is not an advertisement")
        return _advertise(self, self.take(32))

    def words(self, size: int) -> Words:
        count = int.from_bytes(self.take(8), "little")
        if count != size:
            raise WireError(f"{count} words where {size} were agreed on")
        return np.frombuffer(self._view(4 * size), "<u4")

    def end(self) -> None:
        if self._at != len(self._data):
            raise WireError(f"{len(self._data) - self._at} bytes after the message's end")

    def _view(self, count: int) -> memoryview:
        if self._at + count > len(self._data):
            raise WireError(f"torn message: {len(self._data)} bytes, and more are needed")
        self._at += count
        return self._data[self._at - count : self._at]


def _advertise(r: _Reader, session: bytes) -> Advertise:
    return Advertise(
        session=session, sender=r.id(), channel_key=r.take(32), mask_key=r.take(32), seed_commitment=r.take(32),
        signature=r.take(64),
    )  # fmt: skip


def _opened(data: bytes) -> tuple[int, _Reader]:
    reader = _Reader(data)
    if reader.take(len(_MAGIC)) != _MAGIC:
        raise WireError(f"not a message of a secure sum: it starts with {data[: len(_MAGIC)]!r}")
    return reader.take(1)[0], reader


def _head(kind: int, session: bytes, sender: str = "") -> bytes:
    return _MAGIC + bytes([kind]) + session + bytes.fromhex(sender)


def _listed(entries: Iterable[bytes]) -> bytes:
    found = list(entries)
    return len(found).to_bytes(4, "little") + b"".join(found)


def _ids(ids: tuple[str, ...]) -> bytes:
    return _listed(bytes.fromhex(i) for i in ids)


def _pairs(pairs: tuple[tuple[str, bytes], ...]) -> bytes:
    return _listed(bytes.fromhex(i) + data for i, data in pairs)
