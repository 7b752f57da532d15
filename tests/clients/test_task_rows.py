"""What a client trains and scores on in a task: its own rows, a stated buffer of old ones, or those of all tasks."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest

from clients import resident as client
from fedlora.config import RunConfig, load_config
from fedlora.continual.tasks import JOINT
from fedlora.data import ClientRows
from fedlora.data.report import Report
from fedlora.data.rows import Row
from fedlora.errors import ConfigError, DataError

OWN, HELD = 50, 5


def config_of(way: str, *sets: str) -> RunConfig:
    tasks = json.dumps([{"name": n} for n in "abc"])
    return load_config(None, [f"tasks={tasks}", f"continual.method={way}", "method.name=fedit", *sets])


@pytest.fixture
def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that are words, fifty of each task to train on and five held out."""

    def rows(text: str, index: int, task: str) -> tuple[list[str], list[str]]:
        return [f"{task}{index}-{i}" for i in range(OWN)], [f"{task}{index}-held-{i}" for i in range(HELD)]

    monkeypatch.setattr(client, "_encoded", rows)


def encoded(config: RunConfig, index: int, task: str) -> tuple[list[Any], list[Any]]:
    return client.encoded(config, index, task)


@pytest.mark.usefixtures("plain")
@pytest.mark.parametrize("way", ["incremental", "input-aware", "sequential", "separate"])
def test_a_task_is_its_own_rows(way: str) -> None:
    train, held = encoded(config_of(way), 3, "b")
    assert train == [f"b3-{i}" for i in range(OWN)]
    assert held == [f"b3-held-{i}" for i in range(HELD)]


@pytest.mark.usefixtures("plain")
@pytest.mark.parametrize(
    ("sets", "most"), [((), 32), (("continual.replay_rows=7",), 7), (("continual.replay_rows=80",), OWN)]
)
def test_replay_adds_a_stated_number_of_each_old_task(sets: tuple[str, ...], most: int) -> None:
    config = config_of("replay", *sets)
    train, held = encoded(config, 3, "c")
    assert train[:OWN] == [f"c3-{i}" for i in range(OWN)]  # its own, all of them
    assert held == [f"c3-held-{i}" for i in range(HELD)]
    old = [[row for row in train[OWN:] if row[0] == name] for name in "ab"]
    assert [len(set(rows)) for rows in old] == [most, most]
    assert len(train) == OWN + 2 * most
    for rows, name in zip(old, "ab", strict=True):
        assert set(rows) <= {f"{name}3-{i}" for i in range(OWN)}
    assert encoded(config, 3, "a")[0] == [f"a3-{i}" for i in range(OWN)]
    assert client.encoded(config, 3, "c", again=False)[0] == [f"c3-{i}" for i in range(OWN)]  # what is measured


@pytest.mark.usefixtures("plain")
def test_the_buffer_is_drawn_once() -> None:
    """The same rows each time and in every later task, others for another client, task or seed."""
    config = config_of("replay", "continual.replay_rows=7")

    def kept(index: int, task: str, name: str = "a", config: RunConfig = config) -> list[int]:
        return [int(row.split("-")[1]) for row in encoded(config, index, task)[0] if row[0] == name]

    assert kept(3, "b") == kept(3, "b") == kept(3, "c")
    assert len({tuple(x) for x in (kept(3, "c"), kept(4, "c"), kept(3, "c", "b"))}) == 3
    assert kept(3, "b", config=config_of("replay", "continual.replay_rows=7", "seed=1")) != kept(3, "b")


@pytest.mark.usefixtures("plain")
def test_all_tasks_at_once_are_all_rows() -> None:
    train, held = encoded(config_of("joint"), 3, JOINT)
    assert client.encoded(config_of("joint"), 3, JOINT, again=False) == (train, held)
    assert train == [f"{n}3-{i}" for n in "abc" for i in range(OWN)]
    assert held == [f"{n}3-held-{i}" for n in "abc" for i in range(HELD)]


@pytest.mark.usefixtures("plain")
@pytest.mark.parametrize(("way", "task"), [("replay", "c"), ("joint", JOINT)])
def test_rows_are_of_tasks_that_the_client_has(way: str, task: str) -> None:
    tasks = json.dumps([{"name": "a"}, {"name": "b", "clients": [0]}, {"name": "c", "clients": [3]}])
    config = load_config(None, [f"tasks={tasks}", f"continual.method={way}", "method.name=fedit"])
    assert {row[0] for row in encoded(config, 3, task)[0]} == {"a", "c"}
    assert {row[0] for row in client.encoded(config, 3, task, has=("c",))[0]} == {"c"}  # a node's own list
    if way == "joint":
        assert {row[0] for row in encoded(config, 0, task)[0]} == {"a", "b"}
        with pytest.raises(DataError, match="client-00003 has none of the tasks a, b, c"):
            client.encoded(config, 3, task, has=())


@pytest.mark.usefixtures("plain")
def test_without_tasks_it_is_the_runs_rows() -> None:
    assert encoded(load_config(), 3, "")[0] == [f"3-{i}" for i in range(OWN)]


LABELS = {"a": ("y", "w"), "b": ("x",)}


@pytest.fixture
def labelled(monkeypatch: pytest.MonkeyPatch) -> RunConfig:
    """Two tasks of labelled texts, and a tokenizer of one token a character."""

    def tokens(texts: list[str], **_: Any) -> dict[str, list[list[int]]]:
        return {"input_ids": [[ord(c) for c in text] for text in texts]}

    def texts(config: RunConfig, index: int) -> ClientRows:
        own = LABELS[config.name]
        rows = [Row.single(f"{config.name} row {i}", "", "-", label=own[i % len(own)]) for i in range(20)]
        return ClientRows(train=rows[:15], holdout=rows[15:], report=Report(kept=20))

    client._encoded.cache_clear()
    monkeypatch.setattr(client, "resident_base", lambda model: SimpleNamespace(tokenizer=tokens))
    monkeypatch.setattr(client, "client_rows", texts)
    tables = json.dumps([{"name": n, "data.labels": list(labels)} for n, labels in LABELS.items()])
    return load_config(
        None,
        [f"tasks={tables}", "continual.method=replay", "method.name=fedit", "continual.replay_rows=3",
         "data.name=rows.csv", "model.task_type=sequence-classification", "model.labels=w,x,y"],
    )  # fmt: skip


def test_rows_are_of_their_tasks_classes(labelled: RunConfig) -> None:
    """Old rows too: among which classes a row is to be found is of its own task."""
    train, held = encoded(labelled, 1, "b")
    assert (len(train), len(held)) == (15 + 3, 5)
    own, old = train[:-3], train[-3:]
    assert {(row.label, row.choices) for row in own + held} == {(1, (1,))}
    assert {row.choices for row in old} == {(2, 0)}
    assert {row.label for row in old} <= {2, 0}
    first, _ = encoded(labelled, 1, "a")
    assert {row.label for row in first} == {2, 0}
    assert {bytes(row.tokens) for row in old} <= {bytes(row.tokens) for row in first}


def test_a_label_that_is_not_the_tasks_is_refused(labelled: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(LABELS, "b", ("w",))
    with pytest.raises(DataError, match=r"label 'w' is none of data\.labels: x"):
        encoded(labelled, 0, "b")


def test_an_unknown_task_is_refused(labelled: RunConfig) -> None:
    with pytest.raises(ConfigError, match="no task is called 'z'; there are a, b"):
        client._encoded(labelled.model_dump_json(), 0, "z")
