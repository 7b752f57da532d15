"""Which task is trained in which round, and by whom."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedlora.config import load_config
from fedlora.continual.tasks import JOINT, ONE_PAIR, Leg, legs, replayed, rounds_in_all, task_names, tasks_of
from fedlora.errors import ConfigError


def spans(found: tuple[Leg, ...]) -> list[tuple[str, int, int]]:
    return [(leg.name, leg.first, leg.last) for leg in found]


def of(tables: list[dict[str, Any]], *sets: str) -> tuple[Leg, ...]:
    return legs(load_config(None, [f"tasks={json.dumps(tables)}", "rounds.count=3", *sets]))


def test_without_tasks_there_are_none() -> None:
    config = load_config(None, ["rounds.count=5"])
    assert (legs(config), rounds_in_all(config), task_names(config)) == ((), 5, ())


def test_tasks_follow_one_another() -> None:
    tables = [{"name": "a"}, {"name": "b", "rounds.count": 1}, {"name": "c", "rounds": {"count": 2}}]
    found = of(tables)
    assert spans(found) == [("a", 1, 3), ("b", 4, 4), ("c", 5, 6)]
    assert [leg.rounds for leg in found] == [3, 1, 2]
    config = load_config(None, [f"tasks={json.dumps(tables)}", "rounds.count=3"])
    assert (rounds_in_all(config), task_names(config)) == (6, ("a", "b", "c"))


@settings(deadline=None, max_examples=20)
@given(st.lists(st.integers(1, 4), min_size=1, max_size=5))
def test_every_round_belongs_to_one_task(counts: list[int]) -> None:
    found = of([{"name": f"t{i}", "rounds.count": n} for i, n in enumerate(counts)])
    covered = [n for leg in found for n in range(leg.first, leg.last + 1)]
    assert covered == list(range(1, sum(counts) + 1))


def test_a_task_may_start_while_another_goes_on() -> None:
    tables = [{"name": "a"}, {"name": "b", "start": 2}, {"name": "c", "rounds.count": 1}]
    assert spans(of(tables)) == [("a", 1, 3), ("b", 2, 4), ("c", 5, 5)]


def test_a_round_without_a_task_is_refused() -> None:
    with pytest.raises(ConfigError, match="nothing is trained in round 4; let a task start earlier or take more"):
        of([{"name": "a"}, {"name": "b", "start": 5}])


@pytest.mark.parametrize("way", ONE_PAIR)
def test_one_pair_cannot_be_in_two_tasks(way: str) -> None:
    said = f"b begins in round 3, before a ends in round 3, and under {way} one pair goes on .* leave `start` out"
    with pytest.raises(ConfigError, match=said):
        of([{"name": "a"}, {"name": "b", "start": 3}], f"continual.method={way}", "method.name=fedit")


@pytest.mark.parametrize(
    ("written", "ids"),
    [
        ([0, 12], ("client-00000", "client-00012")),
        (["0", "hospital-7"], ("client-00000", "hospital-7")),
        ("3, hospital-7", ("client-00003", "hospital-7")),
        ("hospital-7", ("hospital-7",)),
        (4, ("client-00004",)),
    ],
)
def test_clients_are_ids_or_indices(written: object, ids: tuple[str, ...]) -> None:
    [leg] = of([{"name": "a", "clients": written}])
    assert leg.clients == ids
    assert [leg.holds(c) for c in ("client-00009", *ids)] == [False, *(True for _ in ids)]
    assert of([{"name": "a"}])[0].holds("anyone")


@pytest.mark.parametrize("written", ["[1, 2", "[1,]"])
def test_a_list_of_clients_that_cannot_be_read_is_refused(written: str) -> None:
    with pytest.raises(ConfigError, match="clients must be a list of ids or numbers"):
        of([{"name": "a", "clients": written}])


def test_what_a_task_has_for_itself() -> None:
    tables = [
        {"name": "a", "rank": 2, "continual.task_dim": 5, "method.name": "ffa-lora", "training.learning_rate": 0.5},
        {"name": "b"},
    ]
    one, other = of(tables, "method.name=flora", "training.learning_rate=0.25")
    assert (one.rank, one.task_dim, one.config.method.name, one.config.training.learning_rate) == (
        2,
        5,
        "ffa-lora",
        0.5,
    )
    assert (other.rank, other.task_dim, other.config.method.name) == (None, None, "flora")
    assert other.config.training.learning_rate == 0.25
    assert one.config.tasks == ()


def test_all_at_once_is_one_task_of_everybody() -> None:
    tables = [{"name": "a", "clients": [1, 2]}, {"name": "b", "clients": [0, 2], "rounds.count": 4}]
    [leg] = of(tables, "continual.method=joint")
    assert spans((leg,)) == [(JOINT, 1, 7)]
    assert leg.clients == ("client-00000", "client-00001", "client-00002")
    [leg] = of([*tables, {"name": "c"}], "continual.method=joint")
    assert leg.clients is None


def test_a_nearest_mean_takes_one_round() -> None:
    tables = [{"name": "a", "rounds.count": 4}, {"name": "b"}]
    sets = ["continual.method=nearest-mean", "model.task_type=sequence-classification", "model.labels=x,y"]
    assert spans(of(tables, *sets, "data.name=rows.csv")) == [("a", 1, 1), ("b", 2, 2)]


def test_whose_rows_are_trained_on_again() -> None:
    tables = json.dumps([{"name": n} for n in "abc"])
    replay, other, joint = (
        load_config(None, [f"tasks={tables}", f"continual.method={way}", "method.name=fedit"])
        for way in ("replay", "sequential", "joint")
    )
    assert [replayed(replay, n, "abc") for n in "abc"] == [("a",), ("b", "a"), ("c", "a", "b")]
    assert [replayed(replay, n, "bc") for n in "bc"] == [("b",), ("c", "b")]
    assert [replayed(other, n, "abc") for n in "abc"] == [("a",), ("b",), ("c",)]
    assert replayed(joint, JOINT, "abc") == ("a", "b", "c")
    assert replayed(joint, JOINT, "ca") == ("a", "c")
    assert replayed(joint, JOINT, ()) == ()
    assert replayed(joint, "b", "abc") == ("b",)


def test_whose_tasks_are_whose() -> None:
    tables = json.dumps([{"name": "a", "clients": [1, "hospital-7"]}, {"name": "b"}, {"name": "c", "clients": "1,2"}])
    config = load_config(None, [f"tasks={tables}"])
    who = ("client-00000", "client-00001", "client-00002", "hospital-7")
    assert [tasks_of(config, name) for name in who] == [("b",), ("a", "b", "c"), ("b", "c"), ("a", "b")]
