"""What a client remembers: one unmasking a round, one more for part 2, and no attempt beside one that may be opened."""

from __future__ import annotations

import json
from dataclasses import replace
from types import ModuleType

import pytest

from fedlora.errors import CheckpointError
from fedlora.privacy.secagg.client import Client
from fedlora.privacy.secagg.consent import Consent, Signed
from fedlora.privacy.secagg.refusal import Refused


def refused(consent: Consent, sessions: ModuleType, clients: object, rule: str, **changes: object) -> None:
    with pytest.raises(Refused) as caught:
        consent.begin(clients.session(**changes)[0])  # type: ignore[attr-defined]
    assert caught.value.rule == rule


def test_attempts_count_up_and_rounds_go_on(sessions: ModuleType) -> None:
    clients = sessions.federation(4)
    fresh = Consent("run")
    refused(fresh, sessions, clients, "run", run="other")
    refused(fresh, sessions, clients, "parts", parts=2, part=2)
    began = fresh.begin(clients.session(round=3, attempt=1)[0])
    assert (began.round, began.attempt, began.part, began.answered) == (3, 1, 1, 0)
    for attempt in (0, 1):
        refused(began, sessions, clients, "attempt", round=3, attempt=attempt)
    refused(began, sessions, clients, "round", round=2)
    refused(began, sessions, clients, "parts", round=3, attempt=2, parts=2)
    assert began.begin(clients.session(round=3, attempt=2)[0]).attempt == 2
    assert began.begin(clients.session(round=4)[0]) == Consent("run", 4, 1, 1, 0)


def test_an_answer_is_the_last_of_its_round(sessions: ModuleType) -> None:
    clients = sessions.federation(4)
    context, _ = clients.session(round=1)
    answered = Consent("run").begin(context).answer(context, clients.ids)
    for attempt in (0, 1, 50):
        refused(answered, sessions, clients, "unmasked", round=1, attempt=attempt)
    with pytest.raises(Refused, match="attempt"):
        answered.answer(context, clients.ids)
    refused(answered, sessions, clients, "parts", round=1, parts=2, part=2)
    assert answered.begin(clients.session(round=2)[0]).answered == 0


def test_part_two_is_for_the_survivors_once(sessions: ModuleType) -> None:
    clients = sessions.federation(5)
    context, _ = clients.session(parts=2)
    began = Consent("run").begin(context)
    refused(began, sessions, clients, "parts", parts=2, part=2)
    answered = began.answer(context, clients.ids[1:])
    two, _ = clients.session(clients.ids[1:], parts=2, part=2)
    again = answered.begin(two)
    for ids in (clients.ids, clients.ids[:4], clients.ids[2:]):
        with pytest.raises(Refused, match="survivors of part 1"):
            answered.begin(clients.session(ids, parts=2, part=2)[0])
    for attempt in (0, 1):
        with pytest.raises(Refused, match="comes once"):
            again.begin(clients.session(clients.ids[1:], parts=2, part=2, attempt=attempt)[0])
    with pytest.raises(Refused, match="unmasked"):
        again.begin(context)
    with pytest.raises(Refused, match="unmasked"):
        again.answer(two, clients.ids[1:]).begin(two)


def test_an_older_session_is_not_answered(sessions: ModuleType) -> None:
    """A client that began a new attempt does not finish the old one, also if the object is still there."""
    run = sessions.started(5, "unmask")
    clients = run.federation
    me = clients.ids[0]
    Client(clients.session(attempt=1)[0], clients.keys[me], clients.consents[me])
    with pytest.raises(Refused, match="is not what this client is in"):
        run.clients[me].unmask(run.requests[me])
    assert clients.consents[me].consent.answered == 0


def test_records_are_written_before_what_they_allow(sessions: ModuleType) -> None:
    run = sessions.started(5, "unmask")
    me = run.federation.ids[0]
    memory = run.federation.consents[me]
    assert [json.loads(h)["answered"] for h in memory.history] == [0, 0, 0]
    assert memory.consent.signed == (Signed(0, 4, tuple(run.federation.ids)),)

    def full_disk(consent: Consent) -> None:
        raise OSError("no space left")

    memory.save = full_disk
    with pytest.raises(OSError, match="no space"):
        run.clients[me].unmask(run.requests[me])
    with pytest.raises(Refused, match="order"):
        run.clients[me].unmask(run.requests[me])


def test_no_retry_beside_an_attempt_that_could_be_opened(sessions: ModuleType) -> None:
    """Of ten, seven answer and open the sum. The other three make no second sum, not with colluders that forget."""
    clients = sessions.federation(10)
    context, key = clients.session()
    run = sessions.Run(clients, context, key, sessions.vectors(context), drop={"unmask": clients.ids[7:]})
    run.sum()
    for i in clients.ids[:3]:
        clients.consents[i].consent = Consent("run")
    for attempt, colluders in ((1, clients.ids[:3]), (2, [])):
        retry, key = clients.session([*clients.ids[7:], *colluders], attempt=attempt)
        again = sessions.Run(clients, retry, key, sessions.vectors(retry))
        again.until("mask")
        me = clients.ids[7]
        with pytest.raises(Refused, match=f"{3 + len(colluders)} neighbours of attempt 0 are here.*fewer than 7"):
            again.clients[me].mask(again.deliveries[me], again.vectors[me])


def test_a_retry_that_is_safe() -> None:
    record = Consent("run", 0, 1, 1, 5, signed=(Signed(4, 3, ("a", "b", "c", "d")), Signed(5, 1, ("x",))))
    record.require_closed({"a", "b", "d", "e"})
    with pytest.raises(Refused, match="2 neighbours of attempt 4"):
        record.require_closed({"a", "b"})


def test_bytes(sessions: ModuleType) -> None:
    record = Consent("run", 2, 2, 1, 5, 1, ("a", "b"), (Signed(4, 3, ("a", "b", "c", "d")),))
    assert Consent.from_bytes(record.to_bytes()) == record
    data = record.to_bytes()
    values = json.loads(data)
    for bad in (
        b"", b"{}", b"[]", data[:-1], data + b"\n", data.replace(b"consent-v1", b"consent-v2"),
        json.dumps({**values, "extra": 1}, sort_keys=True, separators=(",", ":")).encode(),
        json.dumps({**values, "signed": [{}]}, sort_keys=True, separators=(",", ":")).encode(),
        json.dumps(values).encode(),
    ):  # fmt: skip
        with pytest.raises(CheckpointError):
            Consent.from_bytes(bad)
    assert replace(record, answered=2) != record
