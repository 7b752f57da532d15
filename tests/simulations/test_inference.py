"""A run with tasks put to use: what is attached for which word, on states whose products are known."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from clients.resident import resident_base
from fedlora.adapter import Adapter, Factors
from fedlora.config import RunConfig, load_config
from fedlora.continual.router import added, omega
from fedlora.continual.tasks import JOINT
from fedlora.errors import BaseMismatch, ConfigError
from fedlora.state import Block, GlobalState, Layout, Module, Task
from fedlora.training.measure import features
from server.checkpoint import save
from simulations import inference
from simulations.inference import (
    ALL,
    AUTO,
    MIX,
    answers,
    asked_tasks,
    attached,
    begun,
    newest,
    routable,
    routed,
    score_tasks,
    without_task,
)
from strategies.continual.views import FEATURES, HEAD, ONE_PAIR

LAYOUT = Layout(modules={"up": Module(out=5, inp=4), "down": Module(out=4, inp=5)}, head={"score": (4, 3)}, features=6)
NAMES = ("news", "wines", "dates")
LABELS = {"news": "sport,trade", "wines": "red", "dates": "old"}


def settings(way: str = "incremental", *overrides: str, names: tuple[str, ...] = NAMES) -> RunConfig:
    tables = [{"name": n, "data.name": f"{n}.csv", "data.labels": LABELS[n].split(",")} for n in names]
    own = ["model.task_type=sequence-classification", "data.partition.kind=iid", "method.name=fedit"]
    return load_config(overrides=[f"tasks={json.dumps(tables)}", f"continual.method={way}", *own, *overrides])


def product(number: int) -> Adapter:
    rng = np.random.default_rng(number)
    return Adapter(
        {
            n: Factors(rng.normal(size=(2, m.inp)).astype(np.float32), rng.normal(size=(m.out, 2)).astype(np.float32))
            for n, m in LAYOUT.modules.items()
        }
    )


def sealed(name: str, order: int) -> Task:
    head = np.full((4, 3), float(order), np.float32)
    block = Block(adapter=product(order), born=order)
    return Task(name=name, blocks=(block,), extras={"score": head}, sealed=True, statistics={"sealed": float(order)})


def state_of(*tasks: Task, summed: tuple[str, ...] = NAMES) -> GlobalState:
    kept: Mapping[str, NDArray[np.float64]] = {}
    for i, name in enumerate(summed):
        f = np.eye(6)[2 * i : 2 * i + 2]
        kept = added(kept, name, f, np.ones(2), np.zeros((6, 6)), labelled=True)
    memory = {HEAD: {"score": np.zeros((4, 3), np.float32)}, **({FEATURES: kept} if kept else {})}
    return GlobalState(version=9, base="base", layout=LAYOUT, tasks={t.name: t for t in tasks}, memory=memory)


THREE = state_of(*(sealed(name, i + 1) for i, name in enumerate(NAMES)))


def dense(blocks: tuple[Block, ...], name: str = "up") -> NDArray[np.float64]:
    m = LAYOUT.modules[name]
    return sum((b.adapter[name].dense().astype(np.float64) for b in blocks), np.zeros((m.out, m.inp)))


@pytest.mark.parametrize(
    ("way", "task", "summed"),
    [
        ("incremental", ALL, (1, 2, 3)),
        ("incremental", "news", (1,)),
        ("incremental", "wines", (1, 2)),
        ("incremental", "dates", (1, 2, 3)),
        ("separate", "wines", (2,)),
        ("sequential", "news", (1, 2, 3)),
    ],
)
def test_what_is_attached(way: str, task: str, summed: tuple[int, ...]) -> None:
    blocks, head = attached(settings(way), THREE, task)
    wanted = sum(product(i)["up"].dense().astype(np.float64) for i in summed)
    np.testing.assert_allclose(dense(blocks), wanted, rtol=1e-6)
    # of all tasks at once, each class as the task that has it left it
    rows = [1.0, 1.0, 2.0, 3.0] if task == ALL else [1.0 + NAMES.index(task)] * 4
    np.testing.assert_array_equal(head["score"][:, 0], rows)


def test_without_a_word_the_task_is_found_where_it_can_be() -> None:
    assert asked_tasks(settings(), THREE, None) == AUTO
    alone = state_of(sealed("news", 1), summed=("news",))
    assert asked_tasks(settings(), alone, None) == ALL
    assert asked_tasks(settings(), THREE, "wines") == "wines"
    assert asked_tasks(settings(), THREE, ALL) == ALL


@pytest.mark.parametrize(
    ("config", "state", "match"),
    [
        (settings(names=("news",)), state_of(sealed("news", 1), summed=("news",)), r"there is one: use --task news"),
        (settings("joint"), state_of(sealed(JOINT, 1), summed=()), r"joint one adapter serves all.*--task all"),
        (
            settings("incremental", "continual.routing=false"),
            state_of(sealed("news", 1), sealed("wines", 2), summed=()),
            r"continual\.routing was off.*--task all, or news or wines",
        ),
        (settings(), state_of(sealed("news", 1), sealed("wines", 2), summed=("news",)), r"1 of 2 was: use --task all"),
    ],
    ids=["one task", "joint", "routing off", "one sealed"],
)
def test_why_no_task_can_be_found(config: RunConfig, state: GlobalState, match: str) -> None:
    assert routable(config, state)
    assert asked_tasks(config, state, None) == ALL
    for word in (AUTO, MIX):
        with pytest.raises(ConfigError, match=f"--task {word}: .*{match}"):
            asked_tasks(config, state, word)


def test_a_name_that_is_none() -> None:
    with pytest.raises(
        ConfigError, match=r"--task wine: no task of this run.*news, wines, dates, all, auto and mix; did.*'wines'"
    ):
        asked_tasks(settings(), THREE, "wine")
    early = state_of(sealed("news", 1), sealed("wines", 2), summed=("news", "wines"))
    assert begun(settings(), early) == ("news", "wines")
    with pytest.raises(ConfigError, match=r"--task dates: it has not begun yet; .* wines, all, auto and mix"):
        asked_tasks(settings(), early, "dates")


def test_trained_together_every_task_has_the_same() -> None:
    config, state = settings("joint"), state_of(sealed(JOINT, 1), summed=())
    assert begun(config, state) == NAMES
    for task in (ALL, *NAMES):
        np.testing.assert_array_equal(dense(attached(config, state, task)[0]), dense(state.tasks[JOINT].blocks))


def test_a_removed_task_is_gone_from_the_sum_exactly() -> None:
    config = settings()
    less = without_task(config, THREE, "wines")
    for name in LAYOUT.modules:
        kept = tuple(b for n in ("news", "dates") for b in THREE.tasks[n].blocks)
        np.testing.assert_array_equal(dense(attached(config, less, ALL)[0], name), dense(kept, name))
    np.testing.assert_array_equal(dense(attached(config, less, "wines")[0]), dense(THREE.tasks["news"].blocks))
    assert attached(config, less, ALL)[1]["score"].tolist() == attached(config, THREE, ALL)[1]["score"].tolist()
    assert THREE.tasks["wines"].blocks  # the state that was given is as it was


def test_a_removed_task_that_is_still_open_loses_its_pair() -> None:
    open_one = replace(sealed("dates", 3), sealed=False, statistics={}, blocks=(), pair=product(3))
    state = state_of(sealed("news", 1), open_one)
    less = without_task(settings(), state, "dates")
    np.testing.assert_array_equal(dense(attached(settings(), less, ALL)[0]), dense(state.tasks["news"].blocks))


@pytest.mark.parametrize("way", [*ONE_PAIR, "separate", "nearest-mean"])
def test_ways_under_which_no_task_can_be_removed(way: str) -> None:
    with pytest.raises(ConfigError, match=rf"--without news: under continual\.method={way} "):
        without_task(settings(way), THREE, "news")
    with pytest.raises(ConfigError, match=r"--without new: no task .* called so.*did you mean 'news'"):
        without_task(settings(way), THREE, "new")


def test_a_folder_without_tasks_or_without_a_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="trained without tasks"):
        newest(load_config(), tmp_path)
    with pytest.raises(ConfigError, match=r"no checkpoint.*checkpoints/"):
        newest(settings(), tmp_path)
    save(tmp_path / "checkpoints", 0, state_of(summed=()))
    with pytest.raises(ConfigError, match=r"no task has begun.*--resume"):
        newest(settings(), tmp_path)


def test_another_base_and_a_classifier_are_refused(tmp_path: Path) -> None:
    save(tmp_path / "checkpoints", 3, THREE)
    assert newest(settings(), tmp_path).tasks.keys() == set(NAMES)
    with pytest.raises(ConfigError, match=r"a classifier writes nothing.*fedlora evaluate"):
        answers(settings(), tmp_path, ["?"], task=None, max_new_tokens=1)
    tiny = load_config(overrides=['tasks=[{"name": "news"}, {"name": "wines"}, {"name": "dates"}]'])
    with pytest.raises(BaseMismatch, match=r"adapters are of base base, and tiny is [0-9a-f]+.*--model"):
        answers(tiny, tmp_path, ["?"], task=ALL, max_new_tokens=1)
    with pytest.raises(BaseMismatch):
        score_tasks(tiny, tmp_path)


def test_a_prompt_finds_the_task_whose_prompts_it_is_like() -> None:
    base = resident_base(load_config().model)
    from fedlora.data.rows import TokenRow

    texts = {"news": ["the cup final", "a cup match"], "dates": ["29 November 1991", "2 August 1975"]}
    ids = {n: [base.tokenizer(t)["input_ids"] for t in some] for n, some in texts.items()}  # type: ignore[misc]
    kept: Mapping[str, NDArray[np.float64]] = {}
    for name, some in ids.items():
        rows = [TokenRow(np.array(i, np.int32), np.zeros(len(i), np.bool_)) for i in some]
        f = features(base, rows, batch_size=2).astype(np.float64)
        sketch = f.T @ (f @ omega(0, f.shape[1], 4))
        kept = added(kept, name, f.sum(0, keepdims=True), np.array([2.0]), sketch, labelled=False)
    state = replace(state_of(summed=()), memory={FEATURES: kept})
    asked = [ids["dates"][1], ids["news"][0], ids["dates"][0]]
    names, likely = routed(base, load_config(), state, asked, batch_size=2)
    assert [names[i] for i in likely.argmax(1)] == ["dates", "news", "dates"]


def test_a_mixture_answers_as_the_task_that_a_prompt_is_surely_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With sure weights `mix` writes what `auto` writes; otherwise it says what each task had, the largest first."""
    base = resident_base(load_config().model)
    tables = [{"name": n, "data.name": f"{n}.csv"} for n in NAMES]
    config = load_config(overrides=[f"tasks={json.dumps(tables)}", "continual.method=incremental"])
    rng = np.random.default_rng(0)

    def task(i: int, name: str) -> Task:
        pair = Adapter(
            {
                n: Factors(*(rng.normal(size=s).astype(np.float32) / 4 for s in ((2, m.inp), (m.out, 2))))
                for n, m in base.layout.modules.items()
            }
        )
        return Task(name=name, blocks=(Block(adapter=pair, born=i),), sealed=True, statistics={"sealed": float(i)})

    state = state_of(*(task(i, n) for i, n in enumerate(NAMES, 1)))
    memory = {FEATURES: state.memory[FEATURES]}
    state = replace(state, base=base.fingerprint, layout=base.layout, memory=memory)
    save(tmp_path / "checkpoints", 3, state)
    weights = np.array([[0.0, 1.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, 1.0]])
    monkeypatch.setattr(inference, "routed", lambda base, config, state, ids, **_: (NAMES, weights[: len(ids)]))
    prompts = ["the cup", "of wine", "in 1991"]
    auto, mix = (answers(config, tmp_path, prompts, task=t, max_new_tokens=4) for t in (AUTO, MIX))
    assert [(x.task, x.base, x.tuned) for x in mix] == [(x.task, x.base, x.tuned) for x in auto]
    assert any(x.tuned != x.base for x in mix)
    assert [x.shares for x in mix] == [{"wines": 1.0}, {"news": 1.0}, {"dates": 1.0}]
    assert [x.shares for x in auto] == [{}] * 3
    weights[0] = [0.2, 0.75, 0.05]
    [said] = answers(config, tmp_path, prompts[:1], task=MIX, max_new_tokens=1)
    assert list(said.shares) == ["wines", "news"]
    assert said.shares["news"] == pytest.approx(0.2 / 0.95)
