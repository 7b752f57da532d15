"""Settings of private runs: what is refused by name, what they come to, and what a node hears of them."""

from __future__ import annotations

import json
import math

import pytest

from fedlora.config import RunConfig, load_config
from fedlora.errors import ConfigError
from fedlora.privacy.accounting import Event, epsilon, noise_multiplier
from fedlora.privacy.budget import planned_steps, resolved, run_epsilon, step_sampling
from fedlora.shared_settings import merged, shared_settings

PRIVATE = ("privacy.level=example", "privacy.epsilon=8", "privacy.rows=300", "data.holdout=0")
TASKS = json.dumps(
    [{"name": "a", "rounds.count": "2"}, {"name": "b", "rounds.count": "3", "training.local_steps": "4"}]
)
STREAM = (*PRIVATE, "continual.method=subspace", "continual.routing=false", f"tasks={TASKS}")


def private(*sets: str) -> RunConfig:
    return load_config(None, [*PRIVATE, *sets])


@pytest.mark.parametrize(
    ("sets", "said"),
    [
        (["privacy.epsilon=none"], r"privacy\.epsilon: set exactly one of noise_multiplier and epsilon, got neither"),
        (["privacy.noise_multiplier=1"], r"privacy\.epsilon: set exactly one of .*, got 1\.0 and 8"),
        (["privacy.rows=none"], r"privacy\.rows: how many rows a client is taken to have must be said"),
        (["privacy.rows=15"], r"privacy\.rows: a step of 16 rows is more than the 15 of a client"),
        (["privacy.scheme=fixed-size"], r"privacy\.scheme: epsilon is counted for Poisson sampling"),
        (["privacy.scheme=poison"], r"privacy\.scheme: must be one of poisson, fixed-size.*did you mean poisson"),
        (["privacy.delta=1"], r"privacy\.delta: must be a number > 0 and < 1"),
        (["training.local_epochs=1"], r"training\.local_epochs: epochs have as many steps as"),
        (["method.name=fedit", "training.optimizer_state=keep"], r"training\.optimizer_state: what a client keeps"),
        (["method.name=fedsa-lora"], r"method\.name: fedsa-lora's clients keep their B"),
        (["personal.steps=5"], r"personal\.steps: local adapters are trained without noise"),
        (["data.holdout=0.1"], r"data\.holdout: clients do not score under privacy"),
        ([*STREAM, "continual.routing=true"], r"continual\.routing: clients would send sums over their rows"),
        ([*STREAM, "continual.effects=true"], r"continual\.effects: clients would send sums"),
        ([*STREAM, "continual.method=input-aware"], r"continual\.method: input-aware: .*sketches"),
        ([*STREAM, "continual.method=ewc", "method.name=fedit"], r"continual\.method: ewc: its Fisher information"),
        ([*STREAM, "continual.method=replay", "method.name=fedit"], r"continual\.method: replay: which rows are drawn"),
    ],
)
def test_what_would_break_the_promise_is_refused_by_name(sets: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        private(*sets)


def test_class_means_are_refused_too() -> None:
    sets = ["model.task_type=sequence-classification", "model.labels=x,y", "continual.method=nearest-mean"]
    with pytest.raises(ConfigError, match=r"continual\.method: nearest-mean: class means are sums over rows"):
        private(*STREAM[4:], *sets)


def test_class_means_for_a_head_are_refused_too() -> None:
    sets = ["model.task_type=sequence-classification", "model.labels=x,y", "data.name=rows.jsonl", "model.pooling=mean"]
    assert private(*sets).model.pooling == "mean"
    with pytest.raises(ConfigError, match=r"model\.head: clients would send class means .*, without noise: use random"):
        private(*sets, "model.head=discriminants")


@pytest.mark.parametrize("key", ["clip=2", "noise_multiplier=1", "epsilon=1", "delta=1e-6", "sampling=0.5", "rows=9"])
def test_without_a_level_nothing_reads_the_rest(key: str) -> None:
    with pytest.raises(ConfigError, match=r"has no effect while privacy\.level is none"):
        load_config(None, [f"privacy.{key}"])


def test_codecs_rules_and_norms_work_on_what_is_noised_already() -> None:
    private("wire.up=int8", "wire.down=int8", "wire.top=4", "robust.rule=screen", "rounds.max_norm=10")


def test_noise_is_the_least_that_keeps_all_steps_within_epsilon() -> None:
    config = private("rounds.count=6", "training.local_steps=5")
    found = resolved(config)
    assert found is not None
    assert planned_steps(config) == 30
    assert found.sampling == step_sampling(config) == 16 / 300
    assert found.expected == pytest.approx(16.0)
    assert found.noise_multiplier == noise_multiplier(8.0, 1e-5, sampling=16 / 300, times=30)
    assert 7.9 < epsilon([found.event(30)], 1e-5) <= 8.0 < epsilon([found.event(31)], 1e-5)
    assert resolved(config, noise=3.0) == resolved(private("privacy.epsilon=none", "privacy.noise_multiplier=3"))
    assert resolved(RunConfig()) is None
    assert run_epsilon(RunConfig()) is None


def test_all_tasks_share_one_budget() -> None:
    config = load_config(None, STREAM)
    assert planned_steps(config) == 2 * 15 + 3 * 4
    found = resolved(config)
    assert found is not None
    assert found.noise_multiplier == noise_multiplier(8.0, 1e-5, sampling=16 / 300, times=42)


def test_given_noise_promises_what_it_comes_to() -> None:
    config = private("privacy.epsilon=none", "privacy.noise_multiplier=2", "privacy.sampling=1")
    assert run_epsilon(config) == epsilon([Event(noise_multiplier=2.0, times=6 * 15)], 1e-5)


@pytest.mark.parametrize("sets", [(), ("privacy.epsilon=none", "privacy.noise_multiplier=0.9")])
def test_a_node_hears_the_promise_and_not_the_noise(sets: tuple[str, ...]) -> None:
    """Its own batches and rounds are not the run's, so what it is told must not depend on them."""
    run = private("training.batch_size=4", "privacy.rows=10", "rounds.count=3", *sets)
    node = merged(shared_settings(run), {"data.name": "/data/rows.jsonl"}, {}, shares=1)
    assert node.privacy.level == "example"
    assert node.privacy.noise_multiplier is None
    assert run_epsilon(node) == run_epsilon(run)
    assert node.data.holdout == 0.0
    assert node.privacy.sampling == 0.4


def test_a_node_hears_of_private_tasks() -> None:
    node = merged(shared_settings(load_config(None, STREAM)), {}, {"a": {}, "b": {}}, shares=1)
    assert [t["name"] for t in node.tasks] == ["a", "b"]
    assert math.isclose(run_epsilon(node) or 0.0, 8.0)
