"""One client in one session. Whatever it refuses ends the session; keys are then dropped."""

from __future__ import annotations

import secrets
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import numpy as np
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from numpy.typing import NDArray

from fedlora.pki import node_id
from fedlora.privacy.secagg.consent import Consents
from fedlora.privacy.secagg.context import Context
from fedlora.privacy.secagg.field import SHARE_BYTES, share_bytes, split
from fedlora.privacy.secagg.masks import derive, mask
from fedlora.privacy.secagg.messages import (
    Advertise,
    Advertisements,
    Confirm,
    Deliveries,
    FromServer,
    Masked,
    Sealed,
    Shares,
    Survivors,
    Unmask,
    UnmaskRequest,
    commitment,
    digest_of,
    share_commitment,
)
from fedlora.privacy.secagg.refusal import Refused


@dataclass
class _Keys:
    """Everything secret, in one place to be dropped."""

    channel: X25519PrivateKey = field(default_factory=X25519PrivateKey.generate)
    mask: X25519PrivateKey = field(default_factory=X25519PrivateKey.generate)
    seed: bytes = field(default_factory=lambda: secrets.token_bytes(32))
    own_share: bytes = b""
    key_shares: dict[str, bytes] = field(default_factory=dict)  # by owner
    seed_shares: dict[str, bytes] = field(default_factory=dict)


class Client:
    """The five steps of one client: advertise, share, mask, confirm, unmask; each once, in this order.

    Each takes the server's message and gives the client's. The record in `consents` is written before the session
    begins, before survivors are signed and before an unmasking is answered.
    Raises: Refused, by the constructor and by every step, if a rule would be broken; nothing can be done with the
    object after that.
    """

    def __init__(self, context: Context, signing_key: Ed25519PrivateKey, consents: Consents) -> None:
        self.id = node_id(signing_key.public_key())
        if self.id not in context.members:
            raise Refused("members", f"{self.id} is not on the roster of this session")
        consents.save(consents.load().begin(context))
        self._context, self._signing_key, self._consents = context, signing_key, consents
        self._near = context.neighbourhood(self.id)
        self._keys: _Keys | None = _Keys()
        self._next = "advertise"
        self._adverts: dict[str, Advertise] = {}
        self._shared: frozenset[str] = frozenset()
        self._survivors: frozenset[str] = frozenset()
        self._lists = (b"", b"")  # digests of the two

    def advertise(self) -> Advertise:
        """This session's public keys, signed."""
        with self._step("advertise", "share") as keys:
            session = self._context.digest
            own = Advertise(
                session=session,
                sender=self.id,
                channel_key=keys.channel.public_key().public_bytes_raw(),
                mask_key=keys.mask.public_key().public_bytes_raw(),
                seed_commitment=commitment(session, "seed", bytes.fromhex(self.id), keys.seed),
            )
            own = replace(own, signature=self._signing_key.sign(own.signed_bytes()))
            self._adverts = {self.id: own}
            return own

    def share(self, adverts: Advertisements) -> Shares:
        """Shares of mask key and seed, sealed for each neighbour that advertised."""
        with self._step("share", "mask", adverts) as keys:
            self._check_adverts(adverts.entries)
            self._adverts = {a.sender: a for a in adverts.entries}
            holders = sorted(self._adverts)
            points = [self._context.points[i] for i in holders]
            secrets_ = (keys.mask.private_bytes_raw(), keys.seed)
            key_values, seed_values = (
                split(int.from_bytes(s, "little"), self._context.threshold, points) for s in secrets_
            )
            sealed = []
            for holder, key_value, seed_value in zip(holders, key_values, seed_values, strict=True):
                if holder == self.id:
                    keys.own_share = share_bytes(seed_value)
                else:
                    sealed.append(self._seal(keys, holder, share_bytes(key_value), share_bytes(seed_value)))
            own_commitment = share_commitment(self._context.digest, "seed share", self.id, self.id, keys.own_share)
            shares = Shares(
                session=self._context.digest, sender=self.id, own_commitment=own_commitment, sealed=tuple(sealed)
            )
            return replace(shares, signature=self._signing_key.sign(shares.signed_bytes()))

    def mask(
        self,
        deliveries: Deliveries,
        vector: NDArray[np.float32] | NDArray[np.float64],
        noise: NDArray[np.int32] | None = None,
    ) -> Masked:
        """The vector `[m]` in fixed point (with integer `noise` `[m]`, if given) under its masks."""
        with self._step("mask", "confirm", deliveries) as keys:
            context = self._context
            context.require_enough(deliveries.shared, "before masking")
            self._shared = frozenset(deliveries.shared)
            present = self._near & self._shared
            self._require_neighbours(present, "who shared")
            if not present <= self._adverts.keys() or self.id not in present:
                raise Refused("members", "a list of who shared with one whose keys never came, or without this client")
            peers = sorted(present - {self.id})
            if sorted(s.peer for s in deliveries.sealed) != peers:
                raise Refused("shares", "not one sealed entry from each neighbour that is said to have shared")
            for entry in deliveries.sealed:
                self._open(keys, entry)
            record = self._consents.load()
            record.require_closed(present)
            self._consents.save(record.sign(context, self._near))
            words = context.fixed_point.encode(vector, noise)
            add = [derive(keys.seed, context.digest, "self", bytes.fromhex(self.id))]
            pairs = [(peer, self._pair_key(keys.mask, peer)) for peer in peers]
            mask(words, add=add + [k for p, k in pairs if self.id < p], subtract=[k for p, k in pairs if p < self.id])
            key = server_channel(keys.channel, context.server_key, context, self._adverts[self.id])
            return Masked(session=context.digest, sender=self.id, words=words, tag=vector_tag(key, words))

    def confirm(self, survivors: Survivors) -> Confirm:
        """A signature over who shared and who survived, both as this client was told."""
        with self._step("confirm", "unmask", survivors):
            self._context.require_enough(survivors.ids, "before unmasking")
            self._survivors = frozenset(survivors.ids)
            if not self._survivors <= self._shared or self.id not in self._survivors:
                raise Refused("survivors", "a list with one who did not share, or without this client")
            self._require_neighbours(self._near & self._survivors, "who survived")
            self._lists = (digest_of(self._shared), digest_of(self._survivors))
            self._consents.save(self._consents.load().sign(self._context, self._near))
            own = self._confirmation(self.id, b"")
            return replace(own, signature=self._signing_key.sign(own.signed_bytes()))

    def unmask(self, request: UnmaskRequest) -> Unmask:
        """For each neighbour one share: of its seed if it is alive, of its mask key if it is gone. Once, for good."""
        with self._step("unmask", "done", request) as keys:
            self._check_request(request)
            self._consents.save(self._consents.load().answer(self._context, self._survivors))
            held = keys.seed_shares | {self.id: keys.own_share}
            alive, gone = self._near & self._survivors, (self._near & self._shared) - self._survivors
            answer = Unmask(
                session=self._context.digest,
                sender=self.id,
                seeds=tuple((i, held[i]) for i in sorted(alive)),
                keys=tuple((i, keys.key_shares[i]) for i in sorted(gone)),
            )
            answer = replace(answer, signature=self._signing_key.sign(answer.signed_bytes()))
        self._keys = None
        return answer

    @contextmanager
    def _step(self, step: str, after: str, message: FromServer | None = None) -> Iterator[_Keys]:
        keys, expected = self._keys, self._next
        self._next = "closed"
        self._keys = None
        if keys is None or expected != step:
            raise Refused("order", f"{step} where {expected} is next; a session goes one way, once")
        if message is not None and message.session != self._context.digest:
            raise Refused("context", "a message of another session")
        yield keys
        self._next, self._keys = after, keys

    def _check_adverts(self, entries: Sequence[Advertise]) -> None:
        senders = {a.sender for a in entries}
        if len(senders) < len(entries) or not senders <= self._near:
            raise Refused("members", "keys of one who is no neighbour, or of one twice")
        self._require_neighbours(senders, "who advertised")
        if self._adverts[self.id] not in entries:
            raise Refused("keys", "this client's own keys came back altered or not at all")
        public = [key for a in entries for key in (a.channel_key, a.mask_key)]
        if len(set(public)) < len(public):
            raise Refused("keys", "two advertised keys are the same")
        for a in entries:
            if a.session != self._context.digest or not self._context.verify(a.sender, a.signature, a.signed_bytes()):
                raise Refused(
                    "signature", f"the keys of {a.sender} are not signed by it for this session; were they replaced?"
                )

    def _check_request(self, request: UnmaskRequest) -> None:
        alive, gone = frozenset(request.alive), frozenset(request.gone)
        if alive & gone:
            raise Refused(
                "alive-and-gone", f"{len(alive & gone)} are said to be alive and gone; both shares open a vector"
            )
        if alive != self._survivors or alive | gone != self._shared:
            raise Refused("survivors", "who is alive and gone is not who survived and shared when this client signed")
        signers = {i for i, _ in request.signatures}
        if len(signers) < len(request.signatures) or not signers <= self._near & self._survivors:
            raise Refused("signature", "a signature by one who is no surviving neighbour, or by one twice")
        for i, signature in request.signatures:
            if not self._context.verify(i, signature, self._confirmation(i, signature).signed_bytes()):
                raise Refused("signature", f"{i} did not sign these lists; was it shown others?")
        self._require_neighbours(signers, "who signed the survivors")

    def _require_neighbours(self, ids: frozenset[str] | set[str], what: str) -> None:
        if len(ids) < self._context.threshold:
            raise Refused(
                "threshold", f"{len(ids)} of {len(self._near)} in {what}; {self._context.threshold} are needed"
            )

    def _confirmation(self, sender: str, signature: bytes) -> Confirm:
        shared, survivors = self._lists
        return Confirm(
            session=self._context.digest, sender=sender, shared=shared, survivors=survivors, signature=signature
        )

    def _seal(self, keys: _Keys, holder: str, key_share: bytes, seed_share: bytes) -> Sealed:
        session = self._context.digest
        entry = Sealed(
            holder,
            share_commitment(session, "key share", self.id, holder, key_share),
            share_commitment(session, "seed share", self.id, holder, seed_share),
            b"",
        )
        cipher = self._channel(keys, self.id, holder)
        data = cipher.encrypt(bytes(12), key_share + seed_share, _associated(session, self.id, holder, entry))
        return replace(entry, data=data)

    def _open(self, keys: _Keys, entry: Sealed) -> None:
        session, owner = self._context.digest, entry.peer
        cipher = self._channel(keys, owner, self.id)
        try:
            both = cipher.decrypt(bytes(12), entry.data, _associated(session, owner, self.id, entry))
        except InvalidTag:
            raise Refused("shares", f"what came from {owner} is not what it sealed for this client") from None
        key_share, seed_share = both[:SHARE_BYTES], both[SHARE_BYTES:]
        if (
            share_commitment(session, "key share", owner, self.id, key_share) != entry.key_commitment
            or share_commitment(session, "seed share", owner, self.id, seed_share) != entry.seed_commitment
        ):
            raise Refused(
                "shares", f"{owner} sealed other shares than it committed to; leave it out of the next attempt"
            )
        keys.key_shares[owner], keys.seed_shares[owner] = key_share, seed_share

    def _channel(self, keys: _Keys, source: str, target: str) -> AESGCM:
        """One key for each direction of each pair; it seals one message, so its nonce is zero."""
        peer = target if source == self.id else source
        shared = exchanged(keys.channel, self._adverts[peer].channel_key, peer)
        public = [self._adverts[i].channel_key for i in (source, target)]
        return AESGCM(
            derive(shared, self._context.digest, "channel", bytes.fromhex(source), bytes.fromhex(target), *public)
        )

    def _pair_key(self, private: X25519PrivateKey, peer: str) -> bytes:
        return pair_key(private, self._adverts[self.id], self._adverts[peer], self._context)


def exchanged(private: X25519PrivateKey, public: bytes, peer: str) -> bytes:
    """X25519 (RFC 7748). Raises: Refused for a key of low order, whose owner has no secret."""
    try:
        return private.exchange(X25519PublicKey.from_public_bytes(public))
    except ValueError:
        raise Refused("keys", f"{peer} advertised a key of low order") from None


def pair_key(private: X25519PrivateKey, own: Advertise, peer: Advertise, context: Context) -> bytes:
    """The mask key of a pair, from the private mask key of one and the public one of the other; symmetric."""
    low, high = sorted((own, peer), key=lambda a: a.sender)
    shared = exchanged(private, peer.mask_key, peer.sender)
    public = (bytes.fromhex(low.sender), bytes.fromhex(high.sender), low.mask_key, high.mask_key)
    return derive(shared, context.digest, "mask", *public)


def server_channel(private: X25519PrivateKey, public: bytes, context: Context, client: Advertise) -> bytes:
    """The key that authenticates one client's masked vector to the server; both sides derive it."""
    sender = bytes.fromhex(client.sender)
    shared = exchanged(private, public, client.sender)
    return derive(shared, context.digest, "vector", sender, client.channel_key, context.server_key)


def vector_tag(key: bytes, words: NDArray[np.uint32]) -> bytes:
    """GMAC (NIST SP 800-38D) over the words, 16 bytes; a tenth of the time of a hash. The key tags one vector."""
    return AESGCM(key).encrypt(bytes(12), b"", words.data.cast("B"))


def _associated(session: bytes, source: str, target: str, entry: Sealed) -> bytes:
    ids = bytes.fromhex(source) + bytes.fromhex(target)
    return session + ids + entry.key_commitment + entry.seed_commitment
