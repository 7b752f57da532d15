"""Rounds with clients that misbehave, come late, leave and return; resuming; what is logged."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Mapping
from typing import Any, NotRequired, get_origin, get_type_hints

import numpy as np
import pytest

from fedlora.errors import CheckpointError, RoundFailed
from fedlora.report import log
from fedlora.state import GlobalState
from fedlora.wire import encode_state
from server import checkpoint
from server.asking import STRIKES

BAD = 2  # the index of the client that misbehaves; not the one of the largest rank
NAN, INF = float("nan"), float("inf")


def fill(value: float) -> Callable[[dict[str, Any]], None]:
    def edit(arrays: dict[str, Any]) -> None:
        arrays["B:tall"][0, 0] = value

    return edit


def put(key: str, make: Callable[[Any], Any]) -> Callable[[dict[str, Any]], None]:
    def edit(arrays: dict[str, Any]) -> None:
        arrays[key] = make(arrays.get(key))

    return edit


def drop(key: str) -> Callable[[dict[str, Any]], None]:
    def edit(arrays: dict[str, Any]) -> None:
        del arrays[key]

    return edit


CASES: dict[str, tuple[Callable[[Any], Any], str, str]] = {
    "raises": (lambda f: f.failing, "client failed", r"ValueError.* the disk is on fire|ValueError\('.*on fire"),
    "complains": (lambda f: f.complaining, "TrainingError", r"^the loss is not finite \[2J$"),
    "nan": (lambda f: f.changed(fill(NAN)), "not finite", r"B:tall has 1 NaN or infinite values of 18; lower the"),
    "infinite": (lambda f: f.changed(fill(-INF)), "not finite", r"B:tall has 1 NaN or infinite"),
    "absurd value": (lambda f: f.changed(fill(-3e7)), "absurd value", r"B:tall has a value of 3e\+07, at most 1e\+06"),
    "wrong shape": (
        lambda f: f.changed(put("A:tall", lambda x: x.T.copy())),
        "malformed",
        r"A:tall has shape \(5, 2\), expected \(2, 5\)",
    ),
    "rank 1 that would broadcast": (
        lambda f: f.changed(put("A:tall", lambda x: x[:1].copy())),
        "malformed",
        r"A:tall has shape \(1, 5\), expected \(2, 5\)",
    ),
    "one axis that would broadcast": (
        lambda f: f.changed(put("A:tall", lambda x: x[0].copy())),
        "malformed",
        r"A:tall has 1 dimensions \(5,\), expected 2",
    ),
    "missing module": (
        lambda f: f.changed(drop("B:wide")),
        "malformed",
        r"missing \['B:wide'\], extra \[\]",
    ),
    "extra module": (
        lambda f: f.changed(put("B:other", lambda _: np.ones((2, 2), np.float32))),
        "malformed",
        r"missing \[\], extra \['B:other'\]",
    ),
    "wrong dtype": (lambda f: f.in_float64, "malformed", r"has dtype F64, this message's are F32"),
    "zero rows": (
        lambda f: f.restated(examples=0),
        "example count",
        r"^0 rows; the weight must be from 1 to 1,000,000",
    ),
    "negative rows": (lambda f: f.restated(examples=-5), "example count", r"^-5 rows"),
    "absurd rows": (lambda f: f.restated(examples=10**30), "example count", r"^10{30} rows"),
    "absurd measure": (lambda f: f.restated(metrics={"loss_after": 1e300}), "measures", r"loss_after is 1e\+300"),
    "too many measures": (
        lambda f: f.restated(metrics={f"m{i}": 0.0 for i in range(5000)}),
        "measures",
        r"5000 measures, at most 4096",
    ),
    "another client": (
        lambda f: f.headed(client="client-00000"),
        "not the answer asked for",
        r"^client is 'client-00000'",
    ),
    "another run": (lambda f: f.headed(run="run-0"), "not the answer asked for", r"^run is 'run-0', asked was 'run-1'"),
    "another version": (lambda f: f.headed(version=7), "not the answer asked for", r"^version is 7, asked was 0"),
    "another attempt": (lambda f: f.headed(attempt=1), "not the answer asked for", r"^attempt is 1"),
    "another kind": (lambda f: f.headed(kind="evaluate"), "not the answer asked for", r"^kind is 'evaluate'"),
    "another base": (lambda f: f.headed(base="f" * 64), "other base", r"^base is 'ffff"),
    "another code": (lambda f: f.headed(code="0" * 64), "other code", r"^code is '0000"),
    "torn": (lambda f: f.torn, "malformed", r"torn message: the bodies need \d+ bytes"),
    "noise": (lambda f: lambda *_: b"\x1b[2J not a message", "malformed", r"not a fedlora message: it starts with"),
    "empty": (lambda f: lambda *_: b"", "malformed", r"not a fedlora message"),
    "too large": (lambda f: f.enlarged, "malformed", r"is above the cap of 250000 \(wire.max_bytes\)"),
    "not our record": (lambda f: f.not_ours, "malformed", r"expected one array `bytes` in record `fedlora`"),
}


def without_strikes(state: GlobalState) -> bytes:
    """The state but for the counts of what was refused."""
    memory = {owner: arrays for owner, arrays in state.memory.items() if owner != STRIKES}
    return encode_state(dataclasses.replace(state, memory=memory))


@pytest.fixture(scope="module")
def honest(fakes: Any, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The state after one round among the honest alone."""
    clean = fakes.Lab(tmp_path_factory.mktemp("honest"))
    del clean.grid.nodes[1000 + BAD]
    return encode_state(clean.conduct("rounds.count=1", "rounds.clients=4"))


@pytest.mark.parametrize("case", CASES)
def test_a_client_that_misbehaves_is_refused_by_name_and_changes_nothing(
    lab: Any, fakes: Any, honest: bytes, case: str
) -> None:
    make, rule, detail = CASES[case]
    mixed = lab()
    mixed.clients[BAD].train = make(fakes)
    mixed.clients[BAD].rounds = {1}
    state = mixed.conduct("rounds.count=1", "wire.max_bytes=250000")
    [(who, why, what)] = mixed.refusals()
    assert (who, why) == ("client-00002", rule)
    assert what.isprintable()
    with pytest.raises(AssertionError, match=detail):
        raise AssertionError(what)
    assert [c["id"] for c in mixed.rounds[0]["clients"]] == [f"client-0000{i}" for i in (0, 1, 3, 4)]
    assert mixed.rounds[0]["missing"] == (["client-00002"] if rule == "client failed" else [])

    assert without_strikes(state) == honest


@pytest.mark.parametrize("method", ["fedit", "flora", "ffa-lora"])
def test_the_honest_aggregate_of_every_method(lab: Any, fakes: Any, method: str) -> None:
    mixed, clean = lab(), lab()
    mixed.clients[BAD].train = fakes.changed(fill(NAN))
    state = mixed.conduct(f"method.name={method}")
    del clean.grid.nodes[1000 + BAD]
    assert encode_state(clean.conduct(f"method.name={method}", "rounds.clients=4")) == without_strikes(state)
    assert [r for _, r, _ in mixed.refusals(2)] == ["not finite"]


def test_an_old_answer_sent_again_is_refused(lab: Any, fakes: Any) -> None:
    one = lab()
    one.clients[BAD].train, one.clients[BAD].rounds = fakes.replayed, {2}
    one.conduct()
    assert one.refusals(1) == []
    assert one.refusals(2) == [("client-00002", "not the answer asked for", "round is 1, asked was 2")]


def test_the_second_of_two_answers_is_refused_and_the_first_counts(lab: Any) -> None:
    one, other = lab(), lab()
    one.grid.twice = {BAD}
    state = one.conduct("rounds.count=1")
    assert set(one.refusals()) == {("client-00002", "second answer", "its first answer to this ask stands")}
    assert one.rounds[0]["missing"] == []
    assert encode_state(other.conduct("rounds.count=1")) == encode_state(state)


def test_a_silent_client_is_missing_at_the_deadline(lab: Any) -> None:
    one = lab()
    one.conduct(
        "rounds.count=1",
        "rounds.deadline=0.15",
        "evaluation.every=1",
        stop=lambda e: one.grid.silent.add(BAD) if e["event"] == "start" else None,
    )
    assert one.refusals() == [("client-00002", "deadline", "no answer within 0.15 s")]  # once: evaluation spares it
    assert one.rounds[0]["missing"] == ["client-00002"]
    assert "client-00002" not in one.rounds[0]["evaluation"]["clients"]


def test_an_error_of_the_superlink_is_laid_at_the_right_door(lab: Any) -> None:
    one = lab()
    one.conduct("rounds.count=1", stop=lambda e: one.grid.lost.update({1, 3}) if e["event"] == "start" else None)
    assert one.refusals() == [(f"client-0000{i}", "node unavailable", "the node is gone") for i in (1, 3)]


LIES: list[tuple[dict[str, float], str]] = [
    ({"counted": 5.0}, r"missing \['correct', 'loss', 'tokens'\]"),
    ({"correct": 9.0, "counted": 5.0, "loss": 1.0, "tokens": 2.0}, r"correct is 9 of 5"),
    ({"correct": -1.0, "counted": 5.0, "loss": 1.0, "tokens": 2.0}, r"correct is -1, a sum cannot be negative"),
    ({"correct": 1.0, "counted": 5.0, "loss": 1.0, "tokens": 2.0, "counted/x": 1.0}, r"missing \['correct/x'\]"),
    ({"correct": 1.0, "counted": 1e18, "loss": 1.0, "tokens": 2.0}, r"counted is 1e\+18"),
]


@pytest.mark.parametrize(("metrics", "detail"), LIES)
def test_sums_that_cannot_be_are_refused_in_an_evaluation(lab: Any, fakes: Any, metrics: Any, detail: str) -> None:
    one = lab()
    one.clients[BAD].evaluate = fakes.restated(metrics=metrics)
    one.conduct("rounds.count=1", "evaluation.every=1")
    [(who, rule, what)] = one.refusals()
    assert (who, rule) == ("client-00002", "measures")
    with pytest.raises(AssertionError, match=detail):
        raise AssertionError(what)
    evaluation = one.rounds[0]["evaluation"]
    assert evaluation["counted"] == 16.0
    assert sorted(evaluation["clients"]) == [f"client-0000{i}" for i in (0, 1, 3, 4)]


def test_a_client_cannot_write_another_name_into_the_log(lab: Any, fakes: Any) -> None:
    one = lab()
    one.clients[BAD].train = fakes.restated(metrics={"id": 7.0, "rank": 99.0, "examples": 1.0, "bytes_up": 0.0})
    one.conduct("rounds.count=1")
    told = one.rounds[0]["clients"][BAD]
    assert (told["id"], told["rank"], told["examples"]) == ("client-00002", 2, 12)
    assert told["bytes_up"] > 0


def test_below_quorum_the_round_is_repeated_and_then_the_run_pauses_whole(lab: Any, fakes: Any) -> None:
    one = lab()
    for index in (0, 1, 2):
        one.clients[index].train, one.clients[index].rounds = fakes.changed(fill(NAN)), {2}
    with pytest.raises(
        RoundFailed,
        match=r"round 2: 2 of 5 clients answered, the quorum is 3 \(the last .*not finite.*Bring the clients back.* "
        r"pauses after round 1, whose state is in .*checkpoints. Mend that, then resume",
    ):
        one.conduct("rounds.retries=2")
    assert [n["event"] for n in one.notes].count("retry") == 2
    assert [len([r for r, _ in c.down if r == 2]) for c in one.clients.values()] == [3] * 5
    assert [r["round"] for r in one.rounds] == [1]
    found = checkpoint.latest(one.folder / "checkpoints")
    assert found is not None
    assert found[0] == 1

    for client in one.clients.values():
        client.train = None
    whole = lab()
    assert encode_state(one.conduct()) == encode_state(whole.conduct())
    assert [r["round"] for r in one.rounds] == [1, 2]


def test_a_repeated_round_counts_all_bytes_but_only_who_is_missing_at_the_end(lab: Any, fakes: Any) -> None:
    one, whole = lab(), lab()
    bad = {0, 1, 2}

    def mend(event: Mapping[str, Any]) -> None:
        if event["event"] == "start":
            one.grid.lost = set(bad)
        if event["event"] == "retry":
            one.grid.lost = set()

    state = one.conduct("rounds.count=1", "rounds.retries=1", stop=mend)
    [event] = one.rounds
    assert event["missing"] == []
    assert [(r["client"], r["rule"]) for r in event["refused"]] == [
        (f"client-0000{i}", "node unavailable") for i in bad
    ]
    sent = sum(n for c in one.clients.values() for r, n in c.down if r == 1)
    lost = sum(next(n for r, n in one.clients[i].down if r == 1) for i in bad)  # asked twice, heard once
    assert event["bytes_down"] == sent + lost
    assert encode_state(state) == encode_state(whole.conduct("rounds.count=1"))


def test_bytes_are_those_of_the_payloads(lab: Any) -> None:
    one = lab()
    one.conduct("evaluation.every=1", "wire.up=float32")
    for event in one.rounds:
        number = event["round"]
        down = {c.id: sum(n for r, n in c.down if r == number) for c in one.clients.values()}
        up = {c.id: sum(n for r, n in c.up if r == number) for c in one.clients.values()}
        assert {c["id"]: (c["bytes_down"], c["bytes_up"]) for c in event["clients"]} == {
            i: (down[i], up[i]) for i in down
        }
        assert (event["bytes_down"], event["bytes_up"]) == (sum(down.values()), sum(up.values()))


@pytest.mark.parametrize("method", ["fedit", "flora", "ffa-lora"])
def test_order_of_arrival_and_node_ids_change_no_byte(lab: Any, fakes: Any, method: str) -> None:
    states = set()
    for shuffle in range(3):
        one = lab()
        ids = np.random.default_rng(shuffle).permutation(10**9 - np.arange(5)).tolist()
        one.grid = fakes.FakeGrid(one.clients, dict(zip(ids, range(5), strict=True)), shuffle=shuffle)
        states.add(encode_state(one.conduct(f"method.name={method}", "rounds.fraction=0.6", "rounds.in_flight=3")))
        assert one.grid.alive == 3
    assert len(states) == 1


def test_a_spool_on_disk_gives_the_same_bytes_and_leaves_no_files(lab: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    one, other = lab(), lab()
    state = one.conduct()
    monkeypatch.setattr("server.asking.SPOOL_MEMORY", 3000)
    seen = []
    other.conduct(stop=lambda e: seen.append(len(list((other.folder / "spool").glob("*/*")))))
    found = checkpoint.latest(other.folder / "checkpoints")
    assert found is not None
    assert encode_state(found[1]) == encode_state(state)
    assert max(seen) >= 3
    assert not (other.folder / "spool").exists()


def test_a_node_that_leaves_is_forgotten_and_its_client_may_return_elsewhere(lab: Any) -> None:
    one = lab()

    def move(event: Mapping[str, Any]) -> None:
        if event["event"] == "closed" and event["round"] == 1:
            del one.grid.nodes[1002]
        if event["event"] == "closed" and event["round"] == 2:
            one.grid.nodes[77] = BAD

    one.conduct("rounds.count=3", stop=move)
    assert [[c["id"][-1] for c in r["clients"]] for r in one.rounds] == [list("01234"), list("0134"), list("01234")]
    assert all(r["refused"] == [] for r in one.rounds)


def test_a_client_that_returns_before_its_old_node_is_seen_to_leave(lab: Any) -> None:
    one = lab()

    def move(event: Mapping[str, Any]) -> None:
        if event["event"] == "closed" and event["round"] == 1:
            one.grid.nodes[2222] = BAD  # and 1002 still counts as online
        if event["event"] == "closed" and event["round"] == 2:
            del one.grid.nodes[1002]

    one.conduct("rounds.count=3", stop=move)
    assert [r for _, r, _ in one.refusals(2)] == ["same id twice"]
    assert [len(r["clients"]) for r in one.rounds] == [5, 5, 5]
    assert one.refusals(3) == []


def test_a_client_that_left_within_the_round_is_missing_on_the_repeat(lab: Any) -> None:
    one = lab()

    def leave(event: Mapping[str, Any]) -> None:
        if event["event"] == "start":
            one.grid.lost = {0, 1, 2}
        if event["event"] == "retry":
            one.grid.lost = set()
            del one.grid.nodes[1002]

    one.conduct("rounds.count=1", "evaluation.every=1", "rounds.deadline=0.5", stop=leave)
    assert one.rounds[0]["missing"] == ["client-00002"]
    assert ("client-00002", "node unavailable", "it left after the round began") in one.refusals()


def test_everybody_gone_pauses_the_run(lab: Any) -> None:
    one = lab()
    with pytest.raises(RoundFailed, match=r"round 2: every client has left. The run pauses after round 1"):
        one.conduct(stop=lambda e: one.grid.nodes.clear() if e["event"] == "closed" else None)


def test_an_empty_poisson_cohort_leaves_the_state(lab: Any) -> None:
    one = lab()
    one.conduct("rounds.sampling=poisson", "rounds.fraction=0.0001", "rounds.count=2", "evaluation.every=1")
    found = checkpoint.latest(one.folder / "checkpoints")
    assert found is not None
    assert (found[0], found[1].version) == (2, 0)
    assert [(r["clients"], r["bytes_down"], "evaluation" in r) for r in one.rounds] == [([], 0, False)] * 2


def test_the_server_scores_an_empty_cohort_too(lab: Any) -> None:
    one = lab()
    sums = {"correct": 1.0, "counted": 2.0, "loss": 3.0, "tokens": 4.0}
    one.conduct("rounds.sampling=poisson", "rounds.fraction=0.0001", evaluator=lambda state: sums)
    assert one.rounds[1]["evaluation"]["server"] == {"counted": 2.0, "score": 0.5, "loss": 0.75, "groups": {}}
    assert "evaluation" not in one.rounds[0]  # every=0: only at the end


class Killed(BaseException):
    """Stands for a signal: nothing may catch it."""


@pytest.mark.parametrize(
    ("kind", "method"), [(k, "flora") for k in ("start", "round", "answer", "closed", "done")] + [("answer", "fedit")]
)
def test_a_run_stopped_anywhere_ends_with_the_same_bytes(lab: Any, kind: str, method: str) -> None:
    one, whole = lab(), lab()
    left = {"count": 1 if kind in ("start", "done") else 2 if kind != "answer" else 8}

    def kill(event: Mapping[str, Any]) -> None:
        if event["event"] == kind:
            left["count"] -= 1
            if left["count"] == 0:
                raise Killed

    sets = ("rounds.count=3", f"method.name={method}")
    with pytest.raises(Killed):
        one.conduct(*sets, stop=kill)
    assert encode_state(one.conduct(*sets)) == encode_state(whole.conduct(*sets))
    assert [r["round"] for r in one.rounds] == [1, 2, 3]
    assert same(one.rounds) == same(whole.rounds)


def same(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{k: v for k, v in e.items() if k != "seconds"} for e in events]


def test_a_run_resumed_from_an_older_checkpoint_ends_with_the_same_bytes(lab: Any) -> None:
    one = lab()
    state = one.conduct("rounds.count=3")
    before = same(one.rounds)
    (one.folder / "checkpoints" / "round-000003.flw").unlink()
    assert encode_state(one.conduct("rounds.count=3")) == encode_state(state)
    assert same(one.rounds) == before


def test_a_resumed_run_keeps_the_layout_of_its_state(lab: Any, fakes: Any) -> None:
    one = lab()
    one.conduct("rounds.count=1")
    (one.folder / "checkpoints" / "round-000001.flw").unlink()
    for index in (1, 2, 3, 4):  # by now the most have another head
        one.clients[index].layout = fakes.OTHER_LAYOUT.to_json()
    state = one.conduct("rounds.count=1", "rounds.quorum=0.1")
    assert state.layout == fakes.LAYOUT
    assert [c["id"] for c in one.rounds[0]["clients"]] == ["client-00000"]


def test_a_finished_run_needs_no_client_to_be_read_again(lab: Any) -> None:
    one = lab()
    state = one.conduct()
    one.grid.nodes.clear()
    assert encode_state(one.conduct()) == encode_state(state)


def test_a_damaged_newest_checkpoint_stops_the_run(lab: Any) -> None:
    one = lab()
    one.conduct()
    path = one.folder / "checkpoints" / "round-000002.flw"
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(CheckpointError, match=r"round-000002.flw is damaged.*delete it to go on from round-000001.flw"):
        one.conduct()


def test_a_full_disk_stops_the_run_and_spares_what_was_saved(lab: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    one, whole = lab(), lab()

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    def fill_up(event: Mapping[str, Any]) -> None:
        if event["event"] == "closed":
            monkeypatch.setattr("server.checkpoint.os.fsync", full)

    with pytest.raises(CheckpointError, match="No space left on device"):
        one.conduct("rounds.count=2", stop=fill_up)
    monkeypatch.undo()
    assert sorted(p.name for p in (one.folder / "checkpoints").iterdir()) == ["round-000000.flw", "round-000001.flw"]
    assert encode_state(one.conduct("rounds.count=2")) == encode_state(whole.conduct("rounds.count=2"))


def test_what_a_method_could_not_measure_is_left_out(lab: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from strategies.base import METHODS, Closed

    method = METHODS["fedit"]

    def protocol(state: Any, cohort: Any) -> Any:
        closed = yield from method.protocol(state, cohort)
        return Closed(state=closed.state, report=dict(closed.report) | {"aggregation_error": math.inf})

    monkeypatch.setitem(METHODS, "fedit", dataclasses.replace(method, protocol=protocol))
    one = lab()
    one.conduct("rounds.count=1")
    assert sorted(one.rounds[0]["aggregate"]) == ["rank", "truncated_down", "update_norm"]


def test_events_are_what_the_log_says_they_are(lab: Any, fakes: Any) -> None:
    one = lab()
    one.clients[BAD].train = fakes.changed(fill(NAN))
    one.conduct("evaluation.every=1", "method.name=flora", evaluator=lambda state: {"correct": 1.0, "counted": 2.0})
    start, *rounds = log.read_log(one.folder)
    conform(start, log.StartEvent)
    for event in rounds:
        conform(event, log.RoundEvent)
        for client in event["clients"]:
            conform(client, log.ClientRound)
        for refused in event["refused"]:
            conform(refused, log.Refused)
        conform(event["evaluation"], log.Evaluation)
        for score in event["evaluation"]["clients"].values():
            conform(score, log.ClientScore)
    assert start["clients"] == [{"id": f"client-0000{i}", "rank": r} for i, r in enumerate(one.ranks)]
    json.dumps(rounds, allow_nan=False)


def conform(event: Mapping[str, Any], schema: Any) -> None:
    hints = get_type_hints(schema, include_extras=True)
    assert {k for k, hint in hints.items() if get_origin(hint) is not NotRequired} <= event.keys() <= hints.keys()


def test_clients_share_their_shapes_and_blocks(lab: Any, fakes: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = {"shapes": 0, "blocks": 0}
    for name, target in (("shapes", "expected_arrays"), ("blocks", "encode_blocks")):
        inner = getattr(__import__("server.asking", fromlist=["x"]), target)

        def counted(*args: Any, inner: Any = inner, name: str = name) -> Any:
            calls[name] += 1
            return inner(*args)

        monkeypatch.setattr(f"server.asking.{target}", counted)
    one = lab(ranks=(4, 2) * 15)
    one.conduct("rounds.count=2", "method.name=flora", "rounds.in_flight=4")
    assert calls == {"shapes": 5, "blocks": 3}  # two ranks in two rounds and one evaluation; three sets of blocks
    assert one.grid.alive == 4


@pytest.mark.parametrize("method", ["fedit", "flora", "ffa-lora", "fed-sb"])
def test_an_update_beyond_the_norm_is_refused_whatever_its_factors(lab: Any, fakes: Any, method: str) -> None:
    """Under `flora` half the A and twice the B is the same product, and as far as the bound goes the same update."""
    sets = [f"method.name={method}", "rounds.count=1"]
    plain = lab()
    plain.conduct(*sets)
    largest = max(c["norm"] for c in normed(lab, *sets).values())
    one, other = lab(), lab()
    one.conduct(*sets, f"rounds.max_norm={1.01 * largest}")
    assert one.rounds[0]["refused"] == []
    other.conduct(*sets, f"rounds.max_norm={0.99 * largest}")
    [(_, rule, detail)] = other.refusals()
    assert rule == "norm"
    assert "at most" in detail


def normed(lab: Any, *sets: str) -> dict[str, dict[str, float]]:
    """By client the norm of its update, as the rule norm-bound reports it (an independent way: the Gram matrix)."""
    one = lab()
    one.conduct(*sets, "robust.rule=norm-bound", "robust.bound=1e9")
    return {c["id"]: c for c in one.rounds[0]["clients"]}


def test_rescaled_factors_do_not_pass_the_norm(lab: Any, fakes: Any) -> None:
    def rescaled(arrays: dict[str, np.ndarray]) -> None:
        scales = {"A": 1e-3, "B": 1e3, "head": 1.0}
        for key in arrays:
            arrays[key] = (arrays[key] * scales[key.split(":")[0]]).astype(np.float32)

    one, other = lab(), lab()
    bound = 2.0 * max(c["norm"] for c in normed(lab, "method.name=flora", "rounds.count=1").values())
    one.clients[BAD].train = fakes.changed(rescaled)
    one.conduct("method.name=flora", "rounds.count=1", f"rounds.max_norm={bound}")
    assert one.rounds[0]["refused"] == []

    def enlarged(arrays: dict[str, np.ndarray]) -> None:
        scales = {"A": 1e-3, "B": 1e4, "head": 1.0}
        for key in arrays:
            arrays[key] = (arrays[key] * scales[key.split(":")[0]]).astype(np.float32)

    other.clients[BAD].train = fakes.changed(enlarged)
    other.conduct("method.name=flora", "rounds.count=1", f"rounds.max_norm={bound}")
    assert [(c, r) for c, r, _ in other.refusals()] == [("client-00002", "norm")]
