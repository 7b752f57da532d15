"""Settings of runs with tasks: each mistake is said by name, and a task's own are those of a run of its own."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from fedlora.config import flat, load_config, task_config, to_toml
from fedlora.errors import ConfigError

A_B: list[dict[str, Any]] = [{"name": "a"}, {"name": "b"}]


def said(sets: Sequence[str], tables: list[dict[str, Any]] | None = A_B) -> str:
    more = [f"tasks={json.dumps(tables)}"] if tables is not None else []
    with pytest.raises(ConfigError) as error:
        load_config(None, [*more, *sets])
    return str(error.value)


@pytest.mark.parametrize(
    "setting",
    ["method=subspace", "task_dim=3", "floor=0.5", "sketch=9", "penalty=1", "penalty_form=squared", "replay_rows=4",
     "rank=2", "routing=false"],
)  # fmt: skip
def test_what_only_tasks_read_needs_tasks(setting: str) -> None:
    key = f"continual.{setting.split('=')[0]}"
    assert f"{key}: needs tasks, and there are none; got" in said([f"continual.{setting}"], None)


@pytest.mark.parametrize("name", ["", "a b", "../up", ".hidden", "ö", "x" * 65])
def test_a_name_is_a_word(name: str) -> None:
    assert "tasks: every task needs a name of its own, of letters, digits, '_', '-' and '.', got" in said(
        [], [{"name": name}, {"name": "b"}]
    )


def test_a_task_without_a_name_is_refused() -> None:
    assert "every task needs a name of its own" in said([], [{"rounds.count": 2}])


def test_the_same_task_twice_is_refused() -> None:
    assert "got 'a' twice" in said([], [{"name": "a"}, {"name": "b"}, {"name": "a"}])


def test_the_name_of_all_tasks_together_is_taken() -> None:
    """A client asked for `all-tasks` trains on the rows of every task."""
    assert "all-tasks" in said([], [{"name": "all-tasks"}, {"name": "b"}])


@pytest.mark.parametrize(
    "key",
    [
        "lora.ranks",
        "rounds.clients",
        "rounds.fraction",
        "wire.up",
        "continual.method",
        "method.nonsense",
        "ranks",
        "seed",
    ],
)
def test_what_is_not_a_tasks_own_is_refused(key: str) -> None:
    """The cohort of a round is drawn once for all tasks, so its share is none of a task's settings either."""
    found = said([], [{"name": "a", key: "4"}, {"name": "b"}])
    assert (
        f"tasks: a: {key} is no setting of a task; there are name, start, clients, rank, and those that begin with"
        in (found)
    )


@pytest.mark.parametrize("key", ["start", "rank", "continual.task_dim"])
@pytest.mark.parametrize("value", ["0", "-1", "two", "1.5"])
def test_counts_are_whole_numbers(key: str, value: str) -> None:
    found = said(["continual.method=subspace"], [{"name": "a", key: value}, {"name": "b"}])
    assert f"tasks: a: {key} must be a whole number from 1 on, got" in found


@pytest.mark.parametrize(
    ("setting", "way", "owners"),
    [
        ("task_dim=3", "incremental", "subspace, input-aware"),
        ("sketch=3", "subspace", "input-aware"),
        ("penalty=3", "subspace", "o-lora, ewc"),
        ("penalty_form=squared", "ewc", "o-lora"),
        ("replay_rows=3", "sequential", "replay"),
    ],
)
def test_a_setting_of_another_way_is_refused(setting: str, way: str, owners: str) -> None:
    found = said(["method.name=fedit", f"continual.method={way}", f"continual.{setting}"])
    assert f"continual.{setting.split('=')[0]}: belongs to {owners}; the method is {way} and got" in found


def test_dimensions_of_one_task_belong_to_subspaces_too() -> None:
    found = said(["continual.method=incremental"], [{"name": "a", "continual.task_dim": 3}])
    assert "belongs to subspace, input-aware; the method is incremental and got" in found


@pytest.mark.parametrize(
    ("sets", "message"),
    [
        (["method.name=fedsa-lora"], "fedsa-lora's B stays with the clients, so no task could be sealed"),
        (["continual.method=o-lora", "method.name=ffa-lora"], "o-lora is a penalty on A, and ffa-lora freezes A"),
        (["continual.method=o-lora", "method.name=fed-sb"], "o-lora is a penalty on A, and fed-sb freezes A"),
        (["continual.method=o-lora", "method.name=fedsvd"], "o-lora is a penalty on A, and fedsvd freezes A"),
        (["continual.method=ewc", "method.name=flora"], "ewc holds the entries of one pair .*: got flora"),
        (["attack.kind=sign-flip"], "no simulated attack is made for runs with tasks: got sign-flip"),
        (["continual.method=nearest-mean"], "nearest-mean needs classes: use sequence-classification"),
        (["personal.steps=3"], "local adapters come after a run of one task: leave it at 0"),
        (["method.name=fedit", "training.optimizer_state=keep"], "a new task begins with new moments: use fresh"),
    ],
)  # fmt: skip
def test_what_tasks_cannot_go_with(sets: list[str], message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        raise AssertionError(said(sets))


@pytest.mark.parametrize(
    ("way", "method", "message"),
    [
        ("subspace", "fedsa-lora", "fedsa-lora's B stays with the clients"),
        ("o-lora", "ffa-lora", "o-lora is a penalty on A, and ffa-lora freezes A"),
        ("ewc", "flora", "ewc holds the entries of one pair"),
        ("sequential", "flora", "one pair goes on from task to task"),
    ],
)
def test_a_method_of_one_task_is_held_to_the_same(way: str, method: str, message: str) -> None:
    sets = ["method.name=fedit", f"continual.method={way}"]
    assert message in said(sets, [{"name": "a"}, {"name": "b", "method.name": method}])


def test_a_pair_must_fit_its_tasks_subspace() -> None:
    sets = ["method.name=ffa-lora", "continual.method=subspace", "continual.task_dim=8"]
    two = [{"name": "a", "method.task_rank": 8}, {"name": "b", "method.task_rank": 9}]
    assert "task b: a pair of rank 9 has no room in a subspace of 8 dimensions" in said(sets, two)
    load_config(None, [*sets, f"tasks={json.dumps([two[0], {**two[1], 'continual.task_dim': 9}])}"])


def test_all_mistakes_are_said_at_once() -> None:
    found = said(["personal.steps=3", "attack.kind=sign-flip"], [{"name": "a", "rank": "x"}, {"name": "a"}])
    assert found.startswith("4 mistakes in the settings")


def test_a_mistake_in_a_tasks_own_settings_is_said_with_its_name() -> None:
    found = said([], [{"name": "a", "training.learning_rate": "fast"}, {"name": "b", "method.name": "fedITT"}])
    assert "tasks, a: training.learning_rate" in found
    assert "tasks, b: method.name" in found
    assert "fedit" in found


# ---- a task's own settings -------------------------------------------------------------------------------------------


def test_a_task_has_the_runs_settings_but_for_its_own(tmp_path: Path) -> None:
    tables = [{"name": "a", "training.local_epochs": 2, "data.skills": ["phone_abroad"]}, {"name": "b", "rank": 2}]
    sets = [f"tasks={json.dumps(tables)}", "training.local_steps=7", "seed=3", "lora.ranks=5,4", "wire.up=int8"]
    config = load_config(None, sets)
    one, other = task_config(config, "a"), task_config(config, "b")
    assert (one.training.local_epochs, one.training.local_steps, one.data.skills) == (2.0, None, ("phone_abroad",))
    assert (other.training.local_epochs, other.training.local_steps, other.data.skills) == (None, 7, ())
    for own in (one, other):
        assert (own.seed, own.lora.ranks, own.wire.up, own.tasks) == (3, (5, 4), "int8", ())
    assert (one.name, other.name) == ("a", "b")
    # the three ways in give the same tasks
    (tmp_path / "run.toml").write_text(to_toml(config))
    assert load_config(tmp_path / "run.toml") == config
    assert load_config(flower=flat(config)) == config


def test_a_task_may_take_a_setting_back_to_its_default() -> None:
    """Flower's config says nothing by a default, and a task still can."""
    default = load_config().training.learning_rate
    tables = json.dumps([{"name": "a", "training.learning_rate": default}, {"name": "b"}])
    config = load_config(None, [f"tasks={tables}", "training.learning_rate=0.5"])
    assert task_config(config, "a").training.learning_rate == default
    assert task_config(config, "b").training.learning_rate == 0.5


def test_without_tasks_a_run_is_its_own() -> None:
    config = load_config(None, ["seed=4"])
    assert task_config(config, "") is config


@pytest.mark.parametrize("name", ["c", "", "all-tasks"])
def test_an_unknown_task_is_refused_with_those_there_are(name: str) -> None:
    config = load_config(None, [f"tasks={json.dumps(A_B)}"])
    with pytest.raises(ConfigError, match=f"no task is called '{name}'; there are a, b"):
        task_config(config, name)


def test_tasks_of_a_run_without_any_are_refused() -> None:
    with pytest.raises(ConfigError, match="no task is called 'a'; there are none"):
        task_config(load_config(), "a")


def test_the_labels_of_all_tasks_together_are_those_of_the_model() -> None:
    tables = [{"name": "a", "data.labels": ["w", "x"]}, {"name": "b", "data.labels": ["x", "y"]}]
    sets = [f"tasks={json.dumps(tables)}", "model.task_type=sequence-classification", "data.name=rows.csv"]
    config = load_config(None, sets)
    assert config.model.labels == ("w", "x", "y")
    assert [task_config(config, n).data.labels for n in "ab"] == [("w", "x"), ("x", "y")]
    assert {task_config(config, n).model.labels for n in "ab"} == {("w", "x", "y")}
    own = load_config(None, [*sets, "model.labels=y,x,w"])
    assert own.model.labels == ("y", "x", "w")
    found = said([*sets[1:], "model.labels=w,x"], tables)
    assert "tasks, b: data.labels: must be among model.labels" in found
