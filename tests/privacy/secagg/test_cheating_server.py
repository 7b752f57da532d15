"""What a client refuses of a server that cheats. After a refusal it does nothing more in the session."""

from __future__ import annotations

from dataclasses import replace
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from fedlora.errors import AnswerRejected
from fedlora.privacy.secagg.client import Client
from fedlora.privacy.secagg.messages import UnmaskRequest
from fedlora.privacy.secagg.refusal import Refused


def refuses(step: Any, message: Any, rule: str, *rest: Any) -> None:
    with pytest.raises(Refused) as caught:
        step(message, *rest)
    assert caught.value.rule == rule
    with pytest.raises(Refused, match="order"):
        step(message, *rest)


def test_a_replaced_key(sessions: ModuleType) -> None:
    public = X25519PrivateKey.generate().public_key().public_bytes_raw()
    for name in ("mask_key", "channel_key", "seed_commitment"):
        fresh = sessions.started(5, "share")
        me, other = fresh.federation.ids[:2]
        entries = tuple(replace(a, **{name: public}) if a.sender == other else a for a in fresh.adverts[me].entries)
        refuses(fresh.clients[me].share, replace(fresh.adverts[me], entries=entries), "signature")
    run, mine = sessions.started(5, "share"), Ed25519PrivateKey.generate()  # a key that is not on the roster
    me, other = run.federation.ids[:2]
    entries = tuple(
        sessions.signed(replace(a, mask_key=public), mine) if a.sender == other else a for a in run.adverts[me].entries
    )
    refuses(run.clients[me].share, replace(run.adverts[me], entries=entries), "signature")


def altered_adverts(entries: tuple[Any, ...], me: str, how: str) -> tuple[Any, ...]:
    own = next(a for a in entries if a.sender == me)
    others = tuple(a for a in entries if a.sender != me)
    return {
        "own key gone": others,
        "own key altered": (replace(own, mask_key=own.channel_key), *others),
        "one twice": (own, *others, others[0]),
        "too few": (own, others[0]),
        "one's key given to another": (own, replace(others[0], mask_key=others[1].mask_key), *others[1:]),
    }[how]


@pytest.mark.parametrize(
    ("how", "rule"),
    [
        ("own key gone", "keys"),
        ("own key altered", "keys"),
        ("one twice", "members"),
        ("too few", "threshold"),
        ("one's key given to another", "keys"),
    ],
)
def test_a_list_of_keys_that_is_not_right(sessions: ModuleType, how: str, rule: str) -> None:
    run = sessions.started(5, "share")
    me = run.federation.ids[0]
    entries = altered_adverts(run.adverts[me].entries, me, how)
    refuses(run.clients[me].share, replace(run.adverts[me], entries=entries), rule)


def test_a_key_of_low_order_signed_by_its_owner(sessions: ModuleType) -> None:
    run = sessions.started(5, "share")
    me, other = run.federation.ids[:2]
    key = run.federation.keys[other]
    entries = tuple(
        sessions.signed(replace(a, channel_key=bytes(32)), key) if a.sender == other else a
        for a in run.adverts[me].entries
    )
    refuses(run.clients[me].share, replace(run.adverts[me], entries=entries), "keys")


def test_an_old_session_s_keys_replayed(sessions: ModuleType) -> None:
    run = sessions.started(5, "share")
    clients = run.federation
    context, key = clients.session(attempt=1)
    later = sessions.Run(clients, context, key, run.vectors)
    later.advertise()
    me, other = clients.ids[:2]
    old = next(a for a in run.adverts[me].entries if a.sender == other)
    entries = tuple(old if a.sender == other else a for a in later.adverts[me].entries)
    refuses(later.clients[me].share, replace(later.adverts[me], entries=entries), "signature")


def test_a_message_of_another_session(sessions: ModuleType) -> None:
    run = sessions.started(5, "share")
    me = run.federation.ids[0]
    refuses(run.clients[me].share, replace(run.adverts[me], session=bytes(32)), "context")


def test_contexts_that_differ_between_clients(sessions: ModuleType) -> None:
    """The keys of one who was told another basis are not signed for this session, and the server sees it too."""
    clients = sessions.federation(5)
    context, key = clients.session()
    other, _ = clients.session(basis="d" * 64, server_key=context.server_key)
    run = sessions.Run(clients, context, key, sessions.vectors(context))
    victim = clients.ids[1]
    clients.consents[victim].consent = clients.consents[victim].consent.__class__("run")
    advert = Client(other, clients.keys[victim], clients.consents[victim]).advertise()
    with pytest.raises(AnswerRejected, match=f"{victim}: session"):
        run.server.receive(victim, advert)
    run.advertise()
    for me, shown in ((clients.ids[0], advert), (clients.ids[2], replace(advert, session=context.digest))):
        entries = tuple(shown if a.sender == victim else a for a in run.adverts[me].entries)
        refuses(run.clients[me].share, replace(run.adverts[me], entries=entries), "signature")


def test_what_a_client_knows_beforehand(sessions: ModuleType) -> None:
    context, _ = sessions.federation(3).session()
    context.require(base="a" * 64, round=0, part=1)
    with pytest.raises(Refused, match="basis"):
        context.require(base="a" * 64, basis="e" * 64)


def test_swapped_or_altered_shares(sessions: ModuleType) -> None:
    for how in ("altered", "swapped", "commitment", "missing"):
        run = sessions.started(5, "mask")
        me = run.federation.ids[0]
        message = run.deliveries[me]
        a, b, *rest = message.sealed
        sealed = {
            "altered": (replace(a, data=bytes([a.data[0] ^ 1]) + a.data[1:]), b, *rest),
            "swapped": (replace(a, data=b.data), replace(b, data=a.data), *rest),
            "commitment": (replace(a, seed_commitment=b.seed_commitment), b, *rest),
            "missing": (b, *rest),
        }[how]
        refuses(run.clients[me].mask, replace(message, sealed=sealed), "shares", run.vectors[me])


def test_who_shared_is_too_few_or_without_the_client(sessions: ModuleType) -> None:
    for count, rule in ((2, "survivors"), (3, "threshold")):
        run = sessions.started(5, "mask")
        me, message = run.federation.ids[0], run.deliveries[run.federation.ids[0]]
        refuses(run.clients[me].mask, replace(message, shared=message.shared[:count]), rule, run.vectors[me])
    run = sessions.started(5, "mask")
    me, message = run.federation.ids[0], run.deliveries[run.federation.ids[0]]
    refuses(run.clients[me].mask, replace(message, shared=message.shared[1:]), "members", run.vectors[me])
    run = sessions.started(5, "mask")
    refuses(run.clients[me2 := run.federation.ids[0]].mask, replace(run.deliveries[me2], shared=("f" * 64,) * 4),
            "members", run.vectors[me2])  # fmt: skip


def test_a_vector_that_is_not_bounded(sessions: ModuleType) -> None:
    for value in (1.0, np.nan, np.inf):
        run = sessions.started(3, "mask")
        me = run.federation.ids[0]
        refuses(run.clients[me].mask, run.deliveries[me], "fixed-point", np.full(37, value, np.float32))


def test_a_split_view_of_the_survivors(sessions: ModuleType) -> None:
    """Half of the clients are told that one is gone; neither half finds enough signatures on its own list."""
    run = sessions.started(10, "confirm")
    everybody = run.survivors
    fewer = replace(everybody, ids=everybody.ids[:-1])
    told = {i: fewer if at % 2 else everybody for at, i in enumerate(run.federation.ids[:-1])}
    confirms = {i: run.clients[i].confirm(message) for i, message in told.items()}
    signatures = tuple((i, c.signature) for i, c in confirms.items())
    for me, message in list(told.items())[:2]:
        same = tuple((i, s) for i, s in signatures if told[i] == message)
        gone = () if message is everybody else everybody.ids[-1:]
        request = UnmaskRequest(session=run.context.digest, alive=message.ids, gone=gone, signatures=same)
        refuses(run.clients[me].unmask, request, "threshold")
    me = run.federation.ids[2]
    request = UnmaskRequest(session=run.context.digest, alive=everybody.ids, gone=(), signatures=signatures)
    refuses(run.clients[me].unmask, request, "signature")


def altered_request(message: Any, ids: list[str], how: str) -> Any:
    first = message.signatures[0]
    return {
        "alive and gone": replace(message, gone=tuple(ids)),
        "one of them both": replace(message, gone=(ids[1],)),
        "one missing": replace(message, alive=message.alive[1:]),
        "one moved": replace(message, alive=message.alive[1:], gone=message.alive[:1]),
        "too few signatures": replace(message, signatures=message.signatures[:3]),
        "one signature many times": replace(message, signatures=(first,) * 4),
        "one for another": replace(message, signatures=(*message.signatures[:-1], (ids[-1], first[1]))),
        "forged": replace(message, signatures=(*message.signatures[:-1], (ids[-1], bytes(64)))),
        "by a stranger": replace(message, signatures=(*message.signatures, ("f" * 64, first[1]))),
    }[how]


@pytest.mark.parametrize(
    ("how", "rule"),
    [
        ("alive and gone", "alive-and-gone"),
        ("one of them both", "alive-and-gone"),
        ("one missing", "survivors"),
        ("one moved", "survivors"),
        ("too few signatures", "threshold"),
        ("one signature many times", "signature"),
        ("one for another", "signature"),
        ("forged", "signature"),
        ("by a stranger", "signature"),
    ],
)
def test_an_unmasking_that_asks_too_much(sessions: ModuleType, how: str, rule: str) -> None:
    run = sessions.started(5, "unmask")
    me = run.federation.ids[0]
    before = run.federation.consents[me].consent
    refuses(run.clients[me].unmask, altered_request(run.requests[me], run.federation.ids, how), rule)
    assert run.federation.consents[me].consent == before


def test_a_second_unmasking(sessions: ModuleType) -> None:
    run = sessions.started(5, "unmask")
    me = run.federation.ids[0]
    run.clients[me].unmask(run.requests[me])
    for step, message in (("unmask", run.requests[me]), ("share", run.adverts[me]), ("confirm", run.survivors)):
        with pytest.raises(Refused, match="order"):
            getattr(run.clients[me], step)(message)
    assert run.clients[me]._keys is None
    for attempt in (0, 1, 7):
        context, _ = run.federation.session(attempt=attempt)
        with pytest.raises(Refused, match="unmasked"):
            Client(context, run.federation.keys[me], run.federation.consents[me])


def test_steps_out_of_order(sessions: ModuleType) -> None:
    run = sessions.started(5, "share")
    me = run.federation.ids[0]
    with pytest.raises(Refused, match="order"):
        run.clients[me].advertise()
    with pytest.raises(Refused, match="order"):
        run.clients[me].share(run.adverts[me])


def test_survivors_too_few_or_strange(sessions: ModuleType) -> None:
    """Of 5 with 3 to open a secret, a list of two; one with who never shared; one without the client."""
    for pick, rule in ((slice(0, 2), "survivors"), (slice(1, 5), "survivors")):
        run = sessions.started(5, "confirm", threshold=3)
        me = run.federation.ids[0]
        refuses(run.clients[me].confirm, replace(run.survivors, ids=run.survivors.ids[pick]), rule)
    clients = sessions.federation(6)
    context, key = clients.session(threshold=4)
    run = sessions.Run(clients, context, key, sessions.vectors(context), drop={"share": clients.ids[5:]})
    run.until("confirm")
    refuses(run.clients[clients.ids[0]].confirm, replace(run.survivors, ids=tuple(clients.ids)), "survivors")


def test_a_tier_of_one(sessions: ModuleType) -> None:
    """Refused in the roster, among who shared, and among who survived: each time before anything is sent."""
    clients = sessions.federation(7)
    clients.ranks = dict(zip(clients.ids, [8, 8, 8, 4, 4, 4, 4], strict=True))
    context, key = clients.session(threshold=4)
    run = sessions.Run(clients, context, key, sessions.vectors(context))
    run.until("mask")
    me, message = clients.ids[-1], run.deliveries[clients.ids[-1]]
    refuses(run.clients[me].mask, replace(message, shared=message.shared[2:]), "tier", run.vectors[me])
    run.left = [i for i in run.left if i != me]
    run.mask()
    for me, ids in ((clients.ids[0], clients.ids[:1] + clients.ids[3:6]), (clients.ids[4], clients.ids[2:6])):
        refuses(run.clients[me].confirm, replace(run.survivors, ids=tuple(ids)), "tier")
    clients.ranks[clients.ids[0]] = 16
    with pytest.raises(Refused, match="1 of rank 16 or above"):
        clients.session()


def test_a_list_shortened_in_part_two(sessions: ModuleType) -> None:
    run = sessions.started(8, "advertise", parts=2)
    run.sum()
    clients = run.federation
    context, key = clients.session(parts=2, part=2)
    two = sessions.Run(clients, context, key, run.vectors)
    two.until("confirm")
    refuses(two.clients[clients.ids[0]].confirm, replace(two.survivors, ids=two.survivors.ids[:-1]), "parts")


def test_a_client_that_is_not_on_the_roster(sessions: ModuleType) -> None:
    clients, others = sessions.federation(3), sessions.federation(1)
    context, _ = clients.session()
    with pytest.raises(Refused, match="not on the roster"):
        Client(context, others.keys[others.ids[0]], others.consents[others.ids[0]])
