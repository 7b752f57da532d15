"""Who is enrolled and who is not; sampling by stable id."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from fedlora.code import code_digest
from fedlora.config import load_config
from fedlora.errors import AdapterError, RoundFailed
from fedlora.wire import decode_state
from server.roster import Roster, sample
from strategies.base import Member


def roster_of(lab: Any, *sets: str, **kwargs: Any) -> Roster:
    usual: dict[str, Any] = {"base": None, "layout": None}
    return Roster(lab.grid, lab.config(*sets), "run-1", **usual | kwargs)


def with_layout(**changes: Any) -> Callable[[Any, Any], None]:
    return lambda client, fakes: setattr(client, "layout", {**client.layout, **changes})


CASES: dict[str, tuple[Callable[[Any, Any], Any], str, str]] = {
    "other base": (lambda c, f: setattr(c, "base", "e" * 64), "client-00002 other base", "its base is eeeeeeeeeeee"),
    "other layout": (
        lambda c, f: setattr(c, "layout", f.OTHER_LAYOUT.to_json()),
        "client-00002 other layout",
        r"2 modules or heads differ from the run's, such as \['score.bias', 'score.weight'\]",
    ),
    "rank 0": (lambda c, f: setattr(c, "rank", 0), "client-00002 rank", "rank 0; the smallest .* allows 1 to 4"),
    "rank above": (lambda c, f: setattr(c, "rank", 5), "client-00002 rank", "rank 5; the smallest .* allows 1 to 4"),
    "same id": (
        lambda c, f: setattr(c, "id", "client-00000"),
        "client-00000 same id twice",
        "node 1000 has it already",
    ),
    "no id": (lambda c, f: setattr(c, "id", ""), "node 1002 hello", "id must be 1 to 200 printable"),
    "an id that moves the cursor": (
        lambda c, f: setattr(c, "id", "a\x1b[2J"),
        "node 1002 hello",
        "id must be 1 to 200",
    ),
    "an id of half a character": (
        lambda c, f: setattr(c, "id", json.loads('"\\ud800"')),
        "node 1002 client failed",
        "surrogate",
    ),
    "rank as text": (lambda c, f: setattr(c, "rank", "4"), "node 1002 hello", "rank must be int, got '4'"),
    "rank as truth": (lambda c, f: setattr(c, "rank", True), "node 1002 hello", "rank must be int, got True"),
    "modules as a list": (with_layout(modules=[]), "node 1002 hello", "modules must be"),
    "no module": (with_layout(modules={}), "node 1002 hello", "0 modules"),
    "sizes as text": (with_layout(modules={"q": ["4", 4, "linear", ""]}), "node 1002 hello", "modules.q must be int"),
    "size 0": (with_layout(modules={"q": [4, 0, "linear", ""]}), "node 1002 hello", "smallest size 0"),
    "unknown kind": (with_layout(modules={"q": [4, 4, "magic", ""]}), "node 1002 hello", "modules.q must be"),
    "an input shared with nobody": (
        with_layout(modules={"q": [4, 4, "linear", "k"]}),
        "node 1002 hello",
        "named as sharing an input",
    ),
    "features below 0": (with_layout(features=-1), "node 1002 hello", "-1 features"),
    "no layout": (lambda c, f: setattr(c, "layout", None), "node 1002 hello", "layout must be"),
    "a head of another shape": (
        lambda c, f: setattr(c, "head", {n: np.zeros((1, *s), np.float32) for n, s in f.LAYOUT.head.items()}),
        "node 1002 hello",
        "do not fit its layout's head",
    ),
    "raises": (lambda c, f: setattr(c, "hello", f.failing), "node 1002 client failed", "the disk is on fire"),
    "other code": (lambda c, f: setattr(c, "hello", f.headed(code="0" * 64)), "node 1002 other code", "code is '0000"),
    "not ours": (lambda c, f: setattr(c, "hello", f.not_ours), "node 1002 malformed", "expected one array"),
}


@pytest.mark.parametrize("case", CASES)
def test_a_node_that_does_not_fit_is_refused_by_name(lab: Any, fakes: Any, case: str) -> None:
    spoil, who, detail = CASES[case]
    one = lab()
    spoil(one.clients[2], fakes)
    roster = roster_of(one)
    [refusal] = roster.refresh()
    assert f"{refusal.client} {refusal.rule}" == who
    assert refusal.detail.isprintable()
    with pytest.raises(AssertionError, match=detail):
        raise AssertionError(refusal.detail)
    assert list(roster.clients) == [f"client-0000{i}" for i in (0, 1, 3, 4)]
    assert roster.require_members() == (fakes.BASE, fakes.LAYOUT)


def test_members_carry_rank_and_scale(lab: Any) -> None:
    roster = roster_of(lab())
    assert roster.refresh() == []
    assert [(m.rank, m.scale) for m in roster.members()] == [(r, 4 / r) for r in (4, 3, 2, 2, 1)]


def test_the_run_decides_base_and_layout_where_it_has_them(lab: Any, fakes: Any) -> None:
    one = lab()
    for client in list(one.clients.values())[:4]:
        client.base = "e" * 64
    assert list(_refreshed(roster_of(one)).clients) == [f"client-0000{i}" for i in range(4)]  # the majority
    assert list(_refreshed(roster_of(one, base=fakes.BASE)).clients) == ["client-00004"]
    assert list(_refreshed(roster_of(one, f"model.fingerprint={fakes.BASE}")).clients) == ["client-00004"]
    two = lab()
    for client in list(two.clients.values())[:4]:
        client.layout = fakes.OTHER_LAYOUT.to_json()
    assert list(_refreshed(roster_of(two, layout=fakes.LAYOUT)).clients) == ["client-00004"]


def _refreshed(roster: Roster) -> Roster:
    roster.refresh()
    return roster


def test_a_run_starts_from_the_head_that_the_base_brings(lab: Any, fakes: Any) -> None:
    one = lab()
    heads = {i: {n: np.full(s, i, np.float32) for n, s in fakes.LAYOUT.head.items()} for i in (1, 3)}
    for i, client in one.clients.items():
        client.head = heads.get(i, heads[1])
        client.id = f"client-{9 - i}"  # the first by id is the last by node
    roster = _refreshed(roster_of(one))
    assert {n: x.flat[0] for n, x in roster.head.items()} == {"score.bias": 1.0, "score.weight": 1.0}
    one.conduct("rounds.count=1")
    opening = decode_state((one.folder / "checkpoints" / "round-000000.flw").read_bytes()[32:])
    assert opening.open_task.extras.keys() == fakes.LAYOUT.head.keys()
    assert all((x == 1.0).all() for x in opening.open_task.extras.values())


@pytest.mark.parametrize("what", ["base", "layout"])
def test_a_tie_is_not_decided_by_arrival(lab: Any, fakes: Any, what: str) -> None:
    one = lab(ranks=(2, 2))
    setattr(one.clients[0], what, "e" * 64 if what == "base" else fakes.OTHER_LAYOUT.to_json())
    with pytest.raises(RoundFailed, match=f"clients hold different {what}s in equal numbers .* (set|give all) "):
        roster_of(one).refresh()


def test_a_node_is_asked_once_but_again_where_it_failed(lab: Any, fakes: Any) -> None:
    one = lab()
    one.clients[1].hello = fakes.failing
    one.clients[2].base = "e" * 64
    roster = roster_of(one)
    assert sorted(r.rule for r in roster.refresh()) == ["client failed", "other base"]
    one.clients[1].hello = None
    assert roster.refresh() == []
    assert [len(c.down) for c in one.clients.values()] == [1, 2, 1, 1, 1]
    assert list(roster.clients) == [f"client-0000{i}" for i in (0, 1, 3, 4)]


def test_a_node_that_hangs_is_waited_for_once(lab: Any) -> None:
    one = lab()
    one.grid.silent = {3}
    roster = roster_of(one, "rounds.deadline=0.1")
    assert [r.rule for r in roster.refresh()] == ["deadline"]
    assert roster.refresh() == []


def test_waiting_for_nodes_ends_with_the_counts(lab: Any) -> None:
    one, heard = lab(), []
    roster = roster_of(one, "rounds.clients=6", "rounds.deadline=0.05")
    with pytest.raises(RoundFailed, match=r"5 of 6 nodes are online after 0.05 s. Start .* or set rounds.clients"):
        roster.wait(heard.append, resumed=False)
    assert heard == [{"event": "waiting", "online": 5, "wanted": 6}]  # told once, not at every look


def test_a_resumed_run_goes_on_with_a_quorum(lab: Any) -> None:
    one = lab()
    sets = ("rounds.clients=6", "rounds.deadline=0.05", "rounds.quorum=0.8")
    roster_of(one, *sets).wait(lambda event: None, resumed=True)  # 5 >= ceil(4.8)
    del one.grid.nodes[1000]
    with pytest.raises(RoundFailed, match=r"4 of 6 nodes are online .* or resume again"):
        roster_of(one, *sets).wait(lambda event: None, resumed=True)


def test_nobody_enrolled_is_refused(lab: Any, fakes: Any) -> None:
    one = lab(ranks=(2,))
    one.clients[0].rank = 99
    with pytest.raises(RoundFailed, match="no client could be enrolled; the first was refused: client-00000: rank: "):
        one.conduct()
    with pytest.raises(RoundFailed, match="every node failed or was refused"):
        roster_of(one).require_members()


def members(count: int) -> tuple[Member, ...]:
    return tuple(Member(id=f"client-{i:05d}", rank=1, scale=1.0) for i in range(count))


def test_sampling_by_fraction() -> None:
    config = load_config(None, ["rounds.fraction=0.25"])
    chosen = [[m.id for m in sample(members(40), config, r)] for r in range(1, 9)]
    assert {len(c) for c in chosen} == {10}
    assert all(c == sorted(set(c)) for c in chosen)
    assert len({tuple(c) for c in chosen}) == 8
    assert [m.id for m in sample(members(40), config, 1)] == chosen[0]
    other = replace_seed(config, 1)
    assert [m.id for m in sample(members(40), other, 1)] != chosen[0]
    assert len(sample(members(3), load_config(None, ["rounds.fraction=0.01"]), 1)) == 1
    assert sample(members(3), load_config(None, []), 1) == members(3)
    assert sample((), load_config(None, []), 1) == ()


def replace_seed(config: Any, seed: int) -> Any:
    return config.model_copy(update={"seed": seed})


def test_poisson_sampling_has_the_right_rate() -> None:
    config = load_config(None, ["rounds.sampling=poisson", "rounds.fraction=0.3"])
    sizes = [len(sample(members(100), config, r)) for r in range(1, 101)]
    assert abs(sum(sizes) - 3000) < 5 * (10_000 * 0.3 * 0.7) ** 0.5  # five standard deviations of a binomial
    assert len(set(sizes)) > 5


def test_members_out_of_order_are_refused() -> None:
    with pytest.raises(AdapterError, match="members must come in stable-id order"):
        sample(tuple(reversed(members(3))), load_config(None, []), 1)


@pytest.mark.parametrize("sampling", ["fraction", "poisson"])
def test_node_ids_do_not_decide_who_is_sampled(lab: Any, fakes: Any, sampling: str) -> None:
    chosen = []
    for nodes in ({1000 + i: i for i in range(5)}, {9 - i: i for i in range(5)}, {5: 3, 77: 0, 6: 4, 1: 1, 2: 2}):
        one = lab()
        one.grid = fakes.FakeGrid(one.clients, nodes)
        one.conduct(f"rounds.sampling={sampling}", "rounds.fraction=0.5", "rounds.count=4")
        chosen.append([[c["id"] for c in r["clients"]] for r in one.rounds])
    assert chosen[0] == chosen[1] == chosen[2]
    assert len({tuple(c) for c in chosen[0]}) > 1


def test_asks_carry_the_code_of_the_server(lab: Any, fakes: Any) -> None:
    seen = []

    def look(client: Any, header: Any, ask: Any) -> bytes:
        seen.append(header.code)
        return fakes.headed()(client, replace(header), ask)

    one = lab(ranks=(2,))
    one.clients[0].hello = look
    roster_of(one).refresh()
    assert seen == [code_digest()]
