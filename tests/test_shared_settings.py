"""What a server tells its nodes, and what a node lays beneath it."""

from __future__ import annotations

import json

import pytest

from fedlora.config import flat, load_config
from fedlora.errors import ConfigError
from fedlora.shared_settings import OWN, SHARED, merged, shared_settings

RUN = load_config(
    None,
    [
        "model.name=/srv/base",
        "model.max_length=64",
        "data.name=held by the nodes",
        "data.holdout=0.25",
        "method.name=ffa-lora",
        "rounds.clients=9",
        "rounds.quorum=0.8",
        "lora.ranks=4,2",
        "robust.rule=screen",
        "wire.up=int8",
        "seed=77",
    ],
)


def test_every_setting_is_shared_or_a_nodes_own_or_the_servers_alone() -> None:
    every = set(flat(RUN))
    assert not set(SHARED) & set(OWN)
    assert set(SHARED) | set(OWN) <= every
    assert {"robust.rule", "rounds.quorum", "lora.ranks", "out", "name"} & (set(SHARED) | set(OWN)) == set()


def test_what_is_told_names_no_path_and_no_seed() -> None:
    told = json.loads(shared_settings(RUN))
    assert told.keys() == {*SHARED, "tasks"}
    assert "/srv/base" not in shared_settings(RUN)
    assert "77" not in shared_settings(RUN)


def test_a_node_goes_by_the_runs_settings_with_its_own_data() -> None:
    config = merged(shared_settings(RUN), {"data.name": "/data/rows.jsonl", "training.threads": 2}, {}, shares=1)
    assert (config.model.max_length, config.data.holdout, config.method.name) == (64, 0.25, "ffa-lora")
    assert (config.data.name, config.training.threads, config.rounds.clients) == ("/data/rows.jsonl", 2, 1)
    assert (config.model.name, config.seed, config.robust.rule) == ("tiny", 0, "none")


def test_tasks_bring_their_labels_and_take_the_nodes_data() -> None:
    tasks = [
        {"name": "topics", "data": {"name": "a", "labels": ["x", "y"]}, "rounds": {"count": 2}},
        {"name": "stars", "data": {"name": "b", "labels": ["1", "2"]}, "training": {"learning_rate": 1e-4}},
    ]
    sets = ["model.task_type=sequence-classification", "model.pooling=mean", "model.head=discriminants"]
    run = load_config(None, [*sets, f"tasks={json.dumps(tasks)}"])
    config = merged(shared_settings(run), {}, {"topics": {"data.name": "/data/topics.csv"}}, shares=1)
    assert config.model.pooling == "mean"  # what the head reads; how it begins is the server's alone
    assert [t["name"] for t in config.tasks] == ["topics", "stars"]
    assert config.tasks[0]["data.name"] == "/data/topics.csv"
    assert config.tasks[1]["data.name"] == "not held by this node"
    assert config.model.labels == ("x", "y", "1", "2")
    with pytest.raises(ConfigError, match="data for wrong, and the run's tasks are topics, stars"):
        merged(shared_settings(run), {}, {"wrong": {}}, shares=1)


@pytest.mark.parametrize(
    ("told", "why"),
    [
        ("", "carries no settings of its run"),
        ("[]", "no list of tasks"),
        ('{"tasks": [{}]}', "no list of tasks"),
        ('{"tasks": [], "data.name": "/etc/shadow"}', "tells data.name, which a server may not set"),
        ('{"tasks": [{"name": "t", "data.name": "/etc/shadow"}]}', "tells data.name, which a server may not set"),
        ('{"tasks": [], "model.name": "evil"}', "tells model.name, which a server may not set"),
    ],
)
def test_a_server_cannot_set_what_is_the_nodes(told: str, why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        merged(told, {}, {}, shares=1)


def test_a_node_cannot_set_what_is_the_runs() -> None:
    with pytest.raises(ConfigError, match=r"model.max_length is set by the run, not by a node"):
        merged(shared_settings(RUN), {"model.max_length": 8}, {}, shares=1)
    with pytest.raises(ConfigError, match=r"training.learning_rate is set by the run"):
        merged(shared_settings(RUN), {}, {"t": {"training.learning_rate": 1.0}}, shares=1)
