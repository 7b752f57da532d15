"""A context cannot promise too little, its digest covers every field, and its bytes have one form."""

from __future__ import annotations

import json
from dataclasses import replace
from types import ModuleType
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given, settings
from hypothesis import strategies as st

from fedlora.errors import WireError
from fedlora.pki import node_id
from fedlora.privacy.secagg.context import Context, Member, demoted, roster, tiers, usual_threshold
from fedlora.privacy.secagg.fixed_point import FixedPoint
from fedlora.privacy.secagg.refusal import Refused

BAD: list[tuple[dict[str, Any], str]] = [
    ({"run": ""}, "run"),
    ({"round": -1}, "numbers"),
    ({"attempt": -1}, "numbers"),
    ({"part": 0}, "part"),
    ({"part": 2}, "part"),
    ({"parts": 3}, "part"),
    ({"base": "A" * 64}, "digest"),
    ({"layout": "a" * 63}, "digest"),
    ({"server_key": b""}, "server-key"),
    ({"fixed_point": FixedPoint(size=3, clients=9, bound=1.0)}, "fixed-point"),
    ({"degree": 8}, "graph"),
    ({"degree": 10}, "graph"),
    ({"threshold": 5}, "threshold"),
    ({"threshold": 11}, "threshold"),
    ({"least_survivors": 2}, "survivors"),
    ({"least_survivors": 11}, "survivors"),
    ({"least_per_tier": 2}, "tier"),
    ({"least_per_tier": 11}, "tier"),
]


@pytest.mark.parametrize(("changes", "rule"), BAD)
def test_what_no_session_may_have(sessions: ModuleType, changes: dict[str, Any], rule: str) -> None:
    with pytest.raises(Refused) as caught:
        sessions.federation(10).session(**changes)
    assert caught.value.rule == rule


def test_rosters_that_are_refused(sessions: ModuleType) -> None:
    context, _ = sessions.federation(4).session()
    for members in (
        context.roster[:2], context.roster[::-1], (*context.roster, context.roster[-1]),
        tuple(Member(m.key, 0) for m in context.roster), (*context.roster[:3], Member(b"", 4)),
    ):  # fmt: skip
        with pytest.raises(Refused, match="roster"):
            replace(context, roster=tuple(sorted(members, key=lambda m: m.id)) if b"" in [m.key for m in members]
                    else members, degree=min(3, max(len(members) - 1, 1)))  # fmt: skip


def test_a_graph_that_is_too_sparse(sessions: ModuleType) -> None:
    clients = sessions.federation(40)
    context, _ = clients.session()
    assert context.degree == 32
    for degree in (30, 33):
        with pytest.raises(Refused, match=f"{degree} neighbours among 40"):
            clients.session(degree=degree)
    with pytest.raises(Refused, match="graph"):
        Context.from_bytes(context.to_bytes().replace(b'"degree":32', b'"degree":16'))


def test_the_digest_covers_every_field(sessions: ModuleType) -> None:
    clients = sessions.federation(10)
    context, _ = clients.session()
    changes: list[dict[str, Any]] = [
        {"run": "r"}, {"round": 1}, {"attempt": 1}, {"parts": 2}, {"base": "0" * 64}, {"layout": "0" * 64},
        {"basis": "0" * 64}, {"server_key": bytes(32)}, {"threshold": 8}, {"least_survivors": 4}, {"least_per_tier": 4},
        {"fixed_point": replace(context.fixed_point, size=9)},
        {"fixed_point": replace(context.fixed_point, clients=11)},
        {"fixed_point": replace(context.fixed_point, bound=1.5)}, {"parts": 2, "part": 2},
        {"fixed_point": replace(context.fixed_point, headroom=1)},
        {"roster": tuple(Member(m.key, 2) for m in context.roster)}, {"roster": context.roster[1:], "degree": 8},
    ]  # fmt: skip
    digests = {replace(context, **c).digest for c in changes} | {context.digest}
    assert len(digests) == len(changes) + 1
    assert all(name in str(changes) for name in ("degree", "roster", "part"))


def test_the_graph_does_not_depend_on_what_a_server_may_vary(sessions: ModuleType) -> None:
    context, _ = sessions.federation(50).session()
    same = replace(context, attempt=9, server_key=bytes(32), threshold=30, basis="0" * 64)
    assert same.neighbours == context.neighbours
    assert replace(context, round=1).neighbours != context.neighbours


def test_bytes_have_one_form(sessions: ModuleType) -> None:
    context, _ = sessions.federation(10).session()
    data = context.to_bytes()
    assert Context.from_bytes(data) == context
    values = json.loads(data)
    wrong: list[bytes] = [
        b"", b"[]", b"{}", b"null", b"[" * 100_000, data + b" ", data.replace(b":", b": ", 1), b"x" * (1 << 22),
        json.dumps({**values, "more": 1}, sort_keys=True, separators=(",", ":")).encode(),
    ]  # fmt: skip
    for name, value in (
        ("round", True), ("round", 1.0), ("round", "1"), ("round", 2**70), ("run", 3), ("roster", 3),
        ("roster", [["zz", 1]] * 10), ("fixed_point", [1]), ("fixed_point", [37, 10, 1.0, 0]), ("protocol", "other"),
        ("server_key", 7), ("roster", [values["roster"][0] * 2]),
    ):  # fmt: skip
        wrong.append(json.dumps({**values, name: value}, sort_keys=True, separators=(",", ":")).encode())
    for bad in wrong:
        with pytest.raises(WireError):
            Context.from_bytes(bad)


def test_ids_are_those_of_the_keys() -> None:
    keys = [Ed25519PrivateKey.generate().public_key() for _ in range(4)]
    members = roster({k.public_bytes_raw(): 2 for k in keys})
    assert [m.id for m in members] == sorted(node_id(k) for k in keys)


def test_thresholds() -> None:
    assert [usual_threshold(n) for n in (3, 10, 20, 41, 50)] == [3, 7, 14, 28, 34]


def test_a_tier_counts_those_above() -> None:
    assert tiers({"a": 8, "b": 4, "c": 8, "d": 1}) == {8: 2, 4: 3, 1: 4}


@settings(deadline=None, max_examples=100)
@given(ranks=st.lists(st.sampled_from([1, 2, 4, 8, 16]), min_size=3, max_size=20), least=st.integers(3, 6))
def test_demotion_fills_every_tier_and_takes_no_more_than_it_must(ranks: list[int], least: int) -> None:
    before = {str(i): r for i, r in enumerate(ranks)}
    if len(ranks) < least:
        with pytest.raises(Refused, match="tier"):
            demoted(before, least)
        return
    after = demoted(before, least)
    assert list(after) == list(before)
    assert all(after[i] <= before[i] for i in before)
    assert min(tiers(after).values()) >= least
    if after != before:
        moved_to = max(after.values())
        above = min(r for r in ranks if r > moved_to)
        assert sum(r >= above for r in ranks) < least
    assert demoted(after, least) == after


def test_a_demotion() -> None:
    assert demoted({"a": 16, "b": 8, "c": 8, "d": 4, "e": 1}, 3) == {"a": 8, "b": 8, "c": 8, "d": 4, "e": 1}
    assert demoted({"a": 16, "b": 8, "c": 4, "d": 2}, 4) == {"a": 2, "b": 2, "c": 2, "d": 2}
