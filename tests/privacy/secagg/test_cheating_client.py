"""What the server rejects of a client that cheats, by name, and that the others' sum is not harmed."""

from __future__ import annotations

from dataclasses import replace
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from fedlora.errors import AnswerRejected, RoundFailed, WireError
from fedlora.privacy.secagg.fixed_point import FixedPoint
from fedlora.privacy.secagg.messages import from_client, share_commitment
from fedlora.privacy.secagg.refusal import Refused
from fedlora.privacy.secagg.server import Server


def rejected(run: Any, sender: str, message: Any, rule: str) -> None:
    with pytest.raises(AnswerRejected) as caught:
        run.server.receive(sender, message)
    assert (caught.value.client, caught.value.rule) == (sender, rule)


def test_forged_signatures_at_every_stage(sessions: ModuleType) -> None:
    run = sessions.started(5)
    me, other = run.federation.ids[:2]
    stages: tuple[tuple[str, Any], ...] = (
        ("advertise", lambda c: c.advertise()),
        ("share", lambda c: c.share(run.adverts[me])),
        ("confirm", lambda c: c.confirm(run.survivors)),
        ("unmask", lambda c: c.unmask(run.requests[me])),
    )
    for stage, act in stages:
        run = sessions.started(5, stage)
        me, other = run.federation.ids[:2]
        message = act(run.clients[me])
        rejected(run, me, replace(message, signature=bytes(64)), "signature")
        rejected(run, me, sessions.signed(message, run.federation.keys[other]), "signature")
        rejected(run, other, message, "sender")
        run.server.receive(me, message)
        rejected(run, me, message, "twice")


def test_a_masked_vector_that_is_not_as_agreed(sessions: ModuleType) -> None:
    run = sessions.started(5, "mask")
    me, other = run.federation.ids[:2]
    message = run.clients[me].mask(run.deliveries[me], run.vectors[me])
    rejected(run, me, replace(message, words=message.words[:-1]), "size")
    rejected(run, me, replace(message, words=message.words.astype(np.uint64)), "size")
    rejected(run, me, replace(message, words=message.words + np.uint32(1)), "signature")
    rejected(run, me, replace(message, tag=bytes(16)), "signature")
    run.server.receive(me, message)
    rejected(run, me, message, "twice")
    stolen = replace(message, sender=other)
    rejected(run, other, stolen, "signature")
    run.left = [i for i in run.left if i != me]
    run.mask()
    run.confirm()
    run.unmask()
    plain = sum((v.astype(np.float64) for v in run.vectors.values()), np.zeros(37))
    np.testing.assert_allclose(run.server.finish().values, plain, atol=run.context.fixed_point.error(5))


def test_a_tampered_share_is_named_and_done_without(sessions: ModuleType) -> None:
    for which in ("seeds", "keys"):
        clients = sessions.federation(8)
        context, key = clients.session()
        run = sessions.Run(clients, context, key, sessions.vectors(context), drop={"mask": clients.ids[-1:]})
        run.until("unmask")
        bad = clients.ids[0]
        for i in clients.ids[:-1]:
            answer = run.clients[i].unmask(run.requests[i])
            if i == bad:
                (owner, share), *rest = getattr(answer, which)
                forged = replace(answer, **{which: ((owner, bytes([share[0] ^ 1]) + share[1:]), *rest)})
                rejected(run, i, sessions.signed(forged, clients.keys[i]), "tampered-share")
            else:
                run.server.receive(i, answer)
        plain = sum((run.vectors[i].astype(np.float64) for i in clients.ids[:-1]), np.zeros(37))
        np.testing.assert_allclose(run.server.finish().values, plain, atol=context.fixed_point.error(7))


def test_shares_left_out_or_of_the_wrong_kind(sessions: ModuleType) -> None:
    run = sessions.started(8, "unmask")
    me = run.federation.ids[0]
    answer, key = run.clients[me].unmask(run.requests[me]), run.federation.keys[me]
    for seeds, keys in ((answer.seeds[1:], ()), ((), answer.seeds), (answer.seeds + answer.seeds[:1], ())):
        rejected(run, me, sessions.signed(replace(answer, seeds=seeds, keys=keys), key), "shares")


@pytest.mark.parametrize("secret", ["seed", "key"])
def test_an_owner_whose_shares_are_of_another_secret(sessions: ModuleType, secret: str) -> None:
    """Every share is as committed to, and together they are not the secret: only its owner can have done this."""
    run = sessions.started(5, "share")
    bad = run.federation.ids[0]
    keys = run.clients[bad]._keys
    if secret == "seed":
        keys.seed = bytes(32)
    else:
        keys.mask = X25519PrivateKey.generate()
    run.drop = {"mask": [bad]} if secret == "key" else {}
    run.share()
    run.mask()
    run.confirm()
    run.unmask()
    with pytest.raises(AnswerRejected, match=f"{bad}: dishonest-shares"):
        run.server.finish()


def test_an_owner_that_commits_to_one_share_and_seals_another(
    sessions: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = sessions.started(5, "share")
    bad, victim = run.federation.ids[:2]

    def other(session: bytes, purpose: str, owner: str, holder: str, share: bytes) -> bytes:
        return share_commitment(session, purpose, owner, holder, bytes(33) if holder == victim else share)

    with monkeypatch.context() as patched:
        patched.setattr("fedlora.privacy.secagg.client.share_commitment", other)
        message = run.clients[bad].share(run.adverts[bad])
    run.server.receive(bad, message)
    run.left = [i for i in run.left if i != bad]
    run.share()
    with pytest.raises(Refused, match=f"{bad} sealed other shares"):
        run.clients[victim].mask(run.deliveries[victim], run.vectors[victim])


def test_replay_and_strangers(sessions: ModuleType) -> None:
    run = sessions.started(5)
    old = {i: c.advertise() for i, c in run.clients.items()}
    clients = run.federation
    context, key = clients.session(round=1)
    later = sessions.Run(clients, context, key, run.vectors)
    me = clients.ids[0]
    rejected(later, me, old[me], "session")
    rejected(later, me, replace(old[me], session=context.digest), "signature")
    others = sessions.federation(3)
    strange, _ = others.session()
    stranger = others.clients(strange)[others.ids[0]].advertise()
    rejected(later, others.ids[0], replace(stranger, session=context.digest), "members")


def test_another_client_s_keys(sessions: ModuleType) -> None:
    run = sessions.started(5)
    me, other = run.federation.ids[:2]
    theirs = run.clients[other].advertise()
    run.server.receive(other, theirs)
    mine = run.clients[me].advertise()
    for changed in ({"mask_key": theirs.mask_key}, {"channel_key": theirs.mask_key}, {"mask_key": mine.channel_key}):
        rejected(run, me, sessions.signed(replace(mine, **changed), run.federation.keys[me]), "keys")
    rejected(run, me, sessions.signed(replace(mine, channel_key=bytes(32)), run.federation.keys[me]), "keys")


def test_shares_for_the_wrong_clients(sessions: ModuleType) -> None:
    run = sessions.started(5, "share")
    me = run.federation.ids[0]
    message, key = run.clients[me].share(run.adverts[me]), run.federation.keys[me]
    for sealed in (message.sealed[1:], message.sealed[:1] * 4, tuple(reversed(message.sealed))):
        rejected(run, me, sessions.signed(replace(message, sealed=sealed), key), "shares")


def test_a_confirmation_of_other_lists(sessions: ModuleType) -> None:
    run = sessions.started(5, "confirm")
    me = run.federation.ids[0]
    fewer = replace(run.survivors, ids=run.survivors.ids[:-1])
    rejected(run, me, run.clients[me].confirm(fewer), "survivors")


def test_messages_at_the_wrong_time(sessions: ModuleType) -> None:
    run = sessions.started(5)
    me = run.federation.ids[0]
    advert = run.clients[me].advertise()
    with pytest.raises(RoundFailed, match="Shares is not open"):
        run.server.close_sharing()
    run.left = [i for i in run.left if i != me]
    run.server.receive(me, advert)
    run.advertise()
    rejected(run, me, advert, "stage")


def test_a_sum_beyond_what_honest_clients_reach(sessions: ModuleType) -> None:
    """A client that codes for ten times the bound gets through the masks; the norm of the sum gives it away."""
    run = sessions.started(3, "mask")
    bad = run.federation.ids[0]
    context = run.clients[bad]._context
    object.__setattr__(context.fixed_point, "__class__", Loose)
    message = run.clients[bad].mask(run.deliveries[bad], np.full(37, 5.0, np.float32))
    object.__setattr__(context.fixed_point, "__class__", FixedPoint)
    run.server.receive(bad, message)
    run.left = [i for i in run.left if i != bad]
    run.mask()
    run.left = run.federation.ids
    run.confirm()
    run.unmask()
    with pytest.raises(Refused, match="sum-bound"):
        run.server.finish()


class Loose(FixedPoint):
    """Codes what is too long."""

    def encode(self, vector: Any, noise: Any = None) -> Any:
        return np.rint(vector.astype(np.float64) * 2.0**self.bits).astype(np.int64).astype(np.uint32)


def test_a_server_with_another_key(sessions: ModuleType) -> None:
    context, _ = sessions.federation(3).session()
    with pytest.raises(Refused, match="server-key"):
        Server(context, X25519PrivateKey.generate())


def test_bytes_of_the_wrong_size(sessions: ModuleType) -> None:
    run = sessions.started(3, "mask")
    me = run.federation.ids[0]
    data = run.clients[me].mask(run.deliveries[me], run.vectors[me]).to_bytes()
    for wrong in (data[:-1], data + b"\0", data[:72] + (2**40).to_bytes(8, "little") + data[80:], b"", data[:40]):
        with pytest.raises(WireError):
            from_client(wrong, run.context)


def test_the_commitment_binds_owner_and_holder() -> None:
    a, b = "a" * 64, "b" * 64
    found = {share_commitment(bytes(32), p, *pair, b"x") for p in ("k", "s") for pair in ((a, b), (b, a), (a, a))}
    assert len(found) == 6
