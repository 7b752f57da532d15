"""The server's side of one session: it collects, checks, names who cheats, and opens the sum and nothing else."""

from __future__ import annotations

import hmac
from collections.abc import Callable, Collection
from dataclasses import dataclass

import numpy as np
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from numpy.typing import NDArray

from fedlora.errors import AnswerRejected, RoundFailed
from fedlora.privacy.secagg.client import pair_key, server_channel, vector_tag
from fedlora.privacy.secagg.context import Context
from fedlora.privacy.secagg.field import combine, share_value
from fedlora.privacy.secagg.masks import derive, mask
from fedlora.privacy.secagg.messages import (
    Advertise,
    Advertisements,
    Confirm,
    Deliveries,
    FromClient,
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


@dataclass(frozen=True, eq=False)
class SecureSum:
    """The sum `[m]` in float64, and whose vectors are in it, sorted."""

    values: NDArray[np.float64]
    survivors: tuple[str, ...]


class Server:
    """Five stages; in each, `receive` what clients send, then close it, which gives what to send to whom.

    A message that breaks a rule changes nothing and raises AnswerRejected with who and why; its sender may be counted
    as gone. Too few left at the end of a stage raise RoundFailed. Memory: one sum, whatever the number of clients.
    """

    def __init__(self, context: Context, key: X25519PrivateKey) -> None:
        if key.public_key().public_bytes_raw() != context.server_key:
            raise Refused("server-key", "the context was made with another key")
        self._context, self._key = context, key
        self._stage: type[FromClient] | None = Advertise
        self._total = np.zeros(context.fixed_point.size, "<u4")
        self._adverts: dict[str, Advertise] = {}
        self._shares: dict[str, Shares] = {}
        self._masked: set[str] = set()
        self._lists = (b"", b"")  # digests of who shared and who survived
        self._confirmed: dict[str, Confirm] = {}
        self._unmasked: dict[str, Unmask] = {}

    def receive(self, sender: str, message: FromClient) -> None:
        """Check one message of the open stage and keep it; `sender` is who the transport says it came from.

        Raises: AnswerRejected.
        """
        if sender not in self._context.members:
            raise AnswerRejected(sender, "members", "is not on the roster of this session")
        if message.sender != sender:
            raise AnswerRejected(sender, "sender", f"sent a message in the name of {message.sender}")
        if message.session != self._context.digest:
            raise AnswerRejected(sender, "session", "a message of another session: an old one, or another context")
        if type(message) is not self._stage:
            stage = self._stage.__name__ if self._stage else "nothing"
            raise AnswerRejected(sender, "stage", f"{type(message).__name__} where {stage} is expected")
        if not isinstance(message, Masked) and not self._context.verify(
            sender, message.signature, message.signed_bytes()
        ):
            raise AnswerRejected(sender, "signature", "is not signed with its key")
        if isinstance(message, Advertise):
            self._advertised(message)
        elif isinstance(message, Shares):
            self._shared(message)
        elif isinstance(message, Masked):
            self._add(message)
        elif isinstance(message, Confirm):
            self._confirm(message)
        else:
            self._unmask(message)

    def close_advertising(self) -> dict[str, Advertisements]:
        """For each client that advertised, the keys in its neighbourhood. Raises: RoundFailed."""
        self._close(Advertise, Shares)
        self._require_enough(self._adverts, self._adverts, "advertised")
        return {
            i: Advertisements(
                session=self._context.digest,
                entries=tuple(self._adverts[j] for j in sorted(self._near(i) & self._adverts.keys())),
            )
            for i in sorted(self._adverts)
        }

    def close_sharing(self) -> dict[str, Deliveries]:
        """For each client that shared, who did, and what was sealed for it. Raises: RoundFailed."""
        self._close(Shares, Masked)
        self._require_enough(self._shares, self._shares, "shared")
        everybody = tuple(sorted(self._shares))
        inbox: dict[str, list[Sealed]] = {i: [] for i in everybody}
        for owner in everybody:
            for entry in self._shares[owner].sealed:
                if entry.peer in inbox:
                    returned = Sealed(owner, entry.key_commitment, entry.seed_commitment, entry.data)
                    inbox[entry.peer].append(returned)
        return {
            i: Deliveries(session=self._context.digest, shared=everybody, sealed=tuple(inbox[i])) for i in everybody
        }

    def close_masking(self) -> Survivors:
        """Who survived, for each of them. Raises: RoundFailed."""
        self._close(Masked, Confirm)
        self._require_enough(self._masked, self._shares, "sent a vector")
        self._lists = (digest_of(self._shares), digest_of(self._masked))
        return Survivors(session=self._context.digest, ids=tuple(sorted(self._masked)))

    def close_confirming(self) -> dict[str, UnmaskRequest]:
        """For each client that confirmed, what to unmask. Raises: RoundFailed."""
        self._close(Confirm, Unmask)
        alive = tuple(sorted(self._masked))
        gone = tuple(sorted(self._shares.keys() - self._masked))
        self._require_neighbourhoods(self._confirmed, self._shares, "confirmed")
        return {
            i: UnmaskRequest(
                session=self._context.digest,
                alive=alive,
                gone=gone,
                signatures=tuple(
                    (j, self._confirmed[j].signature) for j in sorted(self._near(i) & self._confirmed.keys())
                ),
            )
            for i in sorted(self._confirmed)
        }

    def finish(self) -> SecureSum:
        """The sum over the survivors.

        Raises: RoundFailed if a neighbourhood gave too few shares; AnswerRejected, naming the client, if what a client
        shared out was not the secret that it had committed to; Refused if the sum is beyond what honest clients can
        reach. In all cases the round is lost, for clients have answered.
        """
        self._close(Unmask, None)
        self._require_neighbourhoods(self._unmasked, self._shares, "answered")
        session = self._context.digest
        add: list[bytes] = []
        subtract: list[bytes] = []
        for owner in sorted(self._masked):
            seed = self._rebuilt(owner, lambda answer: answer.seeds)
            expected = self._adverts[owner].seed_commitment
            if not hmac.compare_digest(commitment(session, "seed", bytes.fromhex(owner), seed), expected):
                raise AnswerRejected(owner, "dishonest-shares", "its shares do not give the seed that it committed to")
            subtract.append(derive(seed, session, "self", bytes.fromhex(owner)))
        for owner in sorted(self._shares.keys() - self._masked):
            private = X25519PrivateKey.from_private_bytes(self._rebuilt(owner, lambda answer: answer.keys))
            if private.public_key().public_bytes_raw() != self._adverts[owner].mask_key:
                raise AnswerRejected(owner, "dishonest-shares", "its shares do not give the key that it advertised")
            for peer in sorted(self._near(owner) & self._masked):
                key = pair_key(private, self._adverts[owner], self._adverts[peer], self._context)
                (subtract if peer < owner else add).append(key)
        mask(self._total, add=add, subtract=subtract)
        survivors = tuple(sorted(self._masked))
        return SecureSum(self._context.fixed_point.decode(self._total, len(survivors)), survivors)

    def _advertised(self, message: Advertise) -> None:
        self._require_new(message.sender, self._adverts)
        known = {key for a in self._adverts.values() for key in (a.channel_key, a.mask_key)}
        if message.channel_key == message.mask_key or {message.channel_key, message.mask_key} & known:
            raise AnswerRejected(message.sender, "keys", "advertised a key twice, or another client's")
        self._vector_key(message)
        self._adverts[message.sender] = message

    def _shared(self, message: Shares) -> None:
        self._require_new(message.sender, self._shares)
        expected = sorted((self._near(message.sender) & self._adverts.keys()) - {message.sender})
        if message.sender not in self._adverts or [s.peer for s in message.sealed] != expected:
            raise AnswerRejected(message.sender, "shares", "not one sealed entry for each neighbour that advertised")
        self._shares[message.sender] = message

    def _add(self, message: Masked) -> None:
        self._require_new(message.sender, self._masked)
        if message.sender not in self._shares:
            raise AnswerRejected(message.sender, "shares", "sent a vector, and never shares")
        if message.words.shape != self._total.shape or message.words.dtype != np.uint32:
            raise AnswerRejected(
                message.sender, "size", f"{message.words.shape} where {self._total.shape} was agreed on"
            )
        tag = vector_tag(self._vector_key(self._adverts[message.sender]), message.words)
        if not hmac.compare_digest(tag, message.tag):
            raise AnswerRejected(message.sender, "signature", "the vector's tag is not of this vector and this client")
        self._total += message.words
        self._masked.add(message.sender)

    def _confirm(self, message: Confirm) -> None:
        self._require_new(message.sender, self._confirmed)
        if message.sender not in self._masked or (message.shared, message.survivors) != self._lists:
            raise AnswerRejected(message.sender, "survivors", "signed other lists than it was sent, or did not survive")
        self._confirmed[message.sender] = message

    def _unmask(self, message: Unmask) -> None:
        self._require_new(message.sender, self._unmasked)
        near = self._near(message.sender)
        owners = ([i for i, _ in message.seeds], [i for i, _ in message.keys])
        expected = (sorted(near & self._masked), sorted((near & self._shares.keys()) - self._masked))
        if message.sender not in self._confirmed or owners != expected:
            raise AnswerRejected(message.sender, "shares", "not one share for each neighbour, or it never confirmed")
        for purpose, shares in (("key share", message.keys), ("seed share", message.seeds)):
            for owner, share in shares:
                committed = self._committed(owner, message.sender, purpose)
                found = share_commitment(self._context.digest, purpose, owner, message.sender, share)
                if not hmac.compare_digest(committed, found):
                    raise AnswerRejected(message.sender, "tampered-share", f"its {purpose} of {owner} was altered")
        self._unmasked[message.sender] = message

    def _committed(self, owner: str, holder: str, purpose: str) -> bytes:
        shares = self._shares[owner]
        if owner == holder:
            return shares.own_commitment
        entry = next(s for s in shares.sealed if s.peer == holder)
        return entry.key_commitment if purpose == "key share" else entry.seed_commitment

    def _rebuilt(self, owner: str, of: Callable[[Unmask], tuple[tuple[str, bytes], ...]]) -> bytes:
        """A secret from the first `threshold` shares; each is the one that its owner committed to."""
        holders = sorted(self._near(owner) & self._unmasked.keys())[: self._context.threshold]
        try:
            shares = {self._context.points[i]: share_value(dict(of(self._unmasked[i]))[owner]) for i in holders}
            return combine(shares).to_bytes(32, "little")
        except (ValueError, OverflowError):
            raise AnswerRejected(owner, "dishonest-shares", "its shares are not of 32 bytes") from None

    def _vector_key(self, advert: Advertise) -> bytes:
        try:
            return server_channel(self._key, advert.channel_key, self._context, advert)
        except Refused as error:
            raise AnswerRejected(advert.sender, error.rule, error.detail) from None

    def _near(self, member: str) -> frozenset[str]:
        return self._context.neighbourhood(member)

    def _require_new(self, sender: str, known: Collection[str]) -> None:
        if sender in known:
            raise AnswerRejected(sender, "twice", "sent a second message in one stage")

    def _close(self, stage: type[FromClient], after: type[FromClient] | None) -> None:
        if self._stage is not stage:
            raise RoundFailed(f"the stage of {stage.__name__} is not open; a session goes one way, once")
        self._stage = after

    def _require_enough(self, left: Collection[str], owners: Collection[str], what: str) -> None:
        try:
            self._context.require_enough(tuple(left), what)
        except Refused as error:
            raise RoundFailed(f"secure sum: {error}") from None
        self._require_neighbourhoods(left, owners, what)

    def _require_neighbourhoods(self, left: Collection[str], owners: Collection[str], what: str) -> None:
        for owner in owners:
            count = len(self._near(owner) & set(left))
            if count < self._context.threshold:
                raise RoundFailed(
                    f"secure sum: {count} in the neighbourhood of {owner} {what}; {self._context.threshold} are "
                    "needed to open it"
                )
