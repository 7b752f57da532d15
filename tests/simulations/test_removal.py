"""An adapter without a task, on states whose products are known: what is in the folder, and what PEFT makes of it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForSequenceClassification
from typer.testing import CliRunner

from fedlora.adapter import Adapter, Factors
from fedlora.base import Base, load_base
from fedlora.cli import app
from fedlora.config import RunConfig, load_config
from fedlora.continual.tasks import JOINT, ONE_PAIR
from fedlora.errors import ConfigError
from fedlora.peft_bridge import load_adapter, save_adapter
from fedlora.state import Block, GlobalState, Subspace, Task
from fedlora.training.attach import attach
from server.app import open_run
from server.checkpoint import save
from simulations.removal import compose_without
from strategies.continual.views import HEAD, blocks_of, first_memory, joint_head

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
NAMES = ("news", "wines", "dates")
LABELS = {"news": ["sport", "trade"], "wines": ["red"], "dates": ["old"]}
IDS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6], [2, 7, 1, 8, 2, 8, 1, 8]])


def settings(base: Path, way: str = "incremental", names: tuple[str, ...] = NAMES, *, own: bool = True) -> RunConfig:
    """Tasks with classes of their own, or (`own` false) with the same four."""
    tables = [{"name": n, "data.name": f"{n}.csv", **({"data.labels": LABELS[n]} if own else {})} for n in names]
    labels = json.dumps([label for n in names for label in LABELS[n]])
    plain = [
        "model.task_type=sequence-classification",
        "data.partition.kind=iid",
        "method.name=fedit",
        "rounds.count=2",
    ]
    plain += [f"model.labels={labels}"]
    named = [f"model.name={base}", "model.device=cpu", "model.target_modules=query,value"]
    return load_config(overrides=[f"tasks={json.dumps(tables)}", f"continual.method={way}", *plain, *named])


def sealed(base: Base, name: str, order: int) -> Task:
    """A task of rank 2 with a head of its own; the second one lies in coordinates of a subspace."""
    rng = np.random.default_rng(order)

    def draw(*shape: int) -> Any:
        return rng.normal(size=shape).astype(np.float32)

    dim = 3
    inside = order == 2
    pairs = {n: Factors(draw(2, dim if inside else m.inp), draw(m.out, 2)) for n, m in base.layout.modules.items()}
    task = Task(
        name=name,
        blocks=(Block(adapter=Adapter(pairs), born=order),),
        extras={n: draw(*shape) for n, shape in base.layout.head.items()},
        sealed=True,
        statistics={"sealed": float(order)},
    )
    basis = {n: draw(dim, m.inp) for n, m in base.layout.modules.items()}
    return replace(task, subspace=Subspace(dim=dim), basis=basis) if inside else task


class Made:
    """A run folder, as a finished run with these tasks leaves it, and what is in it."""

    def __init__(
        self, folder: Path, bert: Path, way: str = "incremental", names: tuple[str, ...] = NAMES, *, own: bool = True
    ) -> None:
        self.folder, self.config = folder, settings(bert, way, names, own=own)
        self.base = load_base(self.config.model)
        tasks = {n: sealed(self.base, n, i) for i, n in enumerate(names, 1)}
        if way == "joint":
            tasks = {JOINT: sealed(self.base, JOINT, 1)}
        memory = first_memory(self.base.layout, [], 7)
        self.state = GlobalState(
            version=9, base=self.base.fingerprint, layout=self.base.layout, tasks=tasks, memory=memory
        )
        open_run(folder, self.config)
        self.save(self.state)

    def save(self, state: GlobalState) -> None:
        save(self.folder / "checkpoints", 3, state)


@pytest.fixture
def made(folders: dict[str, Path], tmp_path: Path) -> Made:
    return Made(tmp_path / "run", folders["bert"])


def call(*words: str) -> str:
    result = CliRunner().invoke(app, list(words), catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return " ".join(result.output.split())


@pytest.mark.parametrize("gone", [("news",), ("wines",), ("dates",), ("news", "dates")])
def test_the_folder_is_the_sum_of_the_other_tasks_with_their_classes(
    made: Made, gone: tuple[str, ...], tmp_path: Path
) -> None:
    left = compose_without(made.folder, gone, tmp_path / "out")
    adapter, head = load_adapter(tmp_path / "out")
    rest = [made.state.tasks[n].full for n in NAMES if n not in gone]
    for name, factors in adapter.items():
        wanted = sum(t.blocks[0].adapter[name].dense().astype(np.float64) for t in rest)
        np.testing.assert_allclose(factors.dense(), wanted, atol=1e-6 * np.abs(wanted).max())
        assert factors.rank == 2 * len(rest) == left.rank
    begun = made.state.memory[HEAD]
    of = {label: n for n in NAMES for label in LABELS[n]}
    for i, label in enumerate(made.config.model.labels):
        source = begun if of[label] in gone else made.state.tasks[of[label]].extras
        for name, x in source.items():
            np.testing.assert_array_equal(head[name][i], x[i])
    assert left.ranks == {t.name: 2 for t in rest}


def test_peft_gives_the_logits_of_the_state_without_the_task(made: Made, tmp_path: Path) -> None:
    compose_without(made.folder, ["wines"], tmp_path / "out")
    bare = AutoModelForSequenceClassification.from_pretrained(
        made.config.model.name, num_labels=4, ignore_mismatched_sizes=True
    )
    read = PeftModel.from_pretrained(bare, tmp_path / "out").eval()
    less = replace(made.state, tasks={n: t for n, t in made.state.tasks.items() if n != "wines"})
    attach(made.base, blocks_of(less, less.tasks.values()), "less", None, joint_head(less, made.config))
    with torch.inference_mode():
        wanted = made.base.model(input_ids=IDS).logits
        got = read(input_ids=IDS).logits
        attach(made.base, blocks_of(made.state, made.state.tasks.values()), "all", None, joint_head(less, made.config))
        whole = made.base.model(input_ids=IDS).logits
    assert (got - wanted).abs().max() < 1e-5 * wanted.abs().max()
    assert (whole - wanted).abs().max() > 1e-3 * wanted.abs().max()


def test_what_was_removed_and_what_stood_on_it_is_told(made: Made, tmp_path: Path) -> None:
    out = tmp_path / "out"
    said = call("compose", str(made.folder), "--without", "news", "--without", "dates", "--out", str(out))
    record = json.loads((out / "compose.json").read_text())
    assert record["without"] == {"news": ["wines"], "dates": []}
    assert record["run"]["folder"] == str(made.folder)
    assert record["run"]["id"] == (made.folder / "run-id").read_text().strip()
    assert [s["name"] for s in record["sources"]] == ["wines"]
    assert record["labels"] == ["sport", "trade", "red", "old"]
    assert record["base"] == {"name": made.config.model.name, "fingerprint": made.base.fingerprint}
    assert f"wines: trained on top of news; what is lost without it: fedlora evaluate {made.folder}" in said
    assert "on top of dates" not in said
    again = tmp_path / "again"
    call("compose", str(out), "--out", str(again))  # it is a source like any other
    assert load_adapter(again)[1].keys() == load_adapter(out)[1].keys()


def test_each_on_the_base_alone_can_be_taken_out_too(folders: dict[str, Path], tmp_path: Path) -> None:
    made = Made(tmp_path / "run", folders["bert"], "separate")
    assert compose_without(made.folder, ["news"], tmp_path / "out").on_top == {"news": ()}


@pytest.mark.parametrize("way", [*ONE_PAIR, "joint", "nearest-mean"])
def test_ways_that_have_no_adapter_of_one_task(way: str, folders: dict[str, Path], tmp_path: Path) -> None:
    made = Made(tmp_path / "run", folders["bert"], way)
    with pytest.raises(ConfigError, match=rf"--without news: under continual\.method={way} "):
        compose_without(made.folder, ["news"], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_mistakes_are_named(made: Made, tmp_path: Path) -> None:
    run, out = str(made.folder), ("--out", str(tmp_path / "out"))
    (tmp_path / "there").mkdir()
    plain = load_config(overrides=["model.device=cpu"])
    open_run(tmp_path / "plain", plain)
    for words, match in (
        ((run, "--without", "wine", *out), r"no task of this run.*there are news, wines, dates; did you mean 'wines'"),
        ((run, *(w for n in NAMES for w in ("--without", n)), *out), r"has no other task.*no adapter to write"),
        ((run, "--without", "news", "--out", str(tmp_path / "there")), r"there exists already.*--out"),
        ((str(tmp_path / "plain"), "--without", "news", *out), r"plain was trained without tasks"),
        ((str(tmp_path / "there"), "--without", "news", *out), r"is not a run folder"),
        ((f"{run}=0.5", "--without", "news", *out), r"give its folder alone"),
        ((run, run, "--without", "news", *out), r"give its folder alone"),
        ((run, "--without", "news", "--rank", "2", "--max-error", "0", *out), r"leave --rank, --max-error out"),
        ((run, "--without", "news", "--how", "ties", *out), r"leave --how out"),
    ):
        with pytest.raises(ConfigError, match=match):
            call("compose", *words)
    assert not (tmp_path / "out").exists()


def test_the_only_task_a_run_that_goes_on_and_one_that_learnt_nothing(
    made: Made, folders: dict[str, Path], tmp_path: Path
) -> None:
    alone = Made(tmp_path / "alone", folders["bert"], names=("news",))
    with pytest.raises(ConfigError, match="--without news: the run has no other task"):
        compose_without(alone.folder, ["news"], tmp_path / "out")
    tasks = made.state.tasks
    made.save(replace(made.state, tasks={**tasks, "dates": replace(tasks["dates"], sealed=False)}))
    with pytest.raises(ConfigError, match=r"has not ended: task dates is not sealed yet.*--resume"):
        compose_without(made.folder, ["news"], tmp_path / "out")
    bare = {n: t if n == "news" else replace(t, blocks=()) for n, t in tasks.items()}
    made.save(replace(made.state, tasks=bare))
    with pytest.raises(ConfigError, match="--without news: the other tasks' adapters are zero"):
        compose_without(made.folder, ["news"], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def released(made: Made) -> None:
    """The folders that a release of the run has."""
    parts = {"adapter": (made.state.update(), joint_head(made.state, made.config))}
    for name, task in made.state.tasks.items():
        parts[f"tasks/{name}"] = task.full.blocks[0].adapter, dict(task.extras)
    for where, (adapter, head) in parts.items():
        save_adapter(
            made.folder / where,
            adapter,
            made.base.layout,
            base_name=made.config.model.name,
            task_type="sequence-classification",
            head=head,
        )


def test_heads_of_one_run_with_classes_of_their_own_are_not_averaged(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    released(made)
    run, out = made.folder, ("--out", str(tmp_path / "out"))
    a, c = run / "tasks" / "news", run / "tasks" / "dates"
    match = rf"heads have classes of their own, sport, trade and old: .*fedlora compose {run} --without TASK"
    with pytest.raises(ConfigError, match=match):
        call("compose", str(a), str(c), *out)
    for whole in (run, run / "adapter"):
        with pytest.raises(ConfigError, match=r"classes of their own, sport, trade, red, old and sport, trade"):
            call("compose", str(whole), f"{a}=-0.5", *out)
    monkeypatch.chdir(run / "tasks")  # named from within
    with pytest.raises(ConfigError, match="classes of their own"):
        call("compose", "news", "dates", *out)
    assert not (tmp_path / "out").exists()
    call("compose", f"{a}=0.5", f"{a}=0.5", *out)  # of the same classes


def test_heads_of_one_run_with_the_same_classes_are_averaged(folders: dict[str, Path], tmp_path: Path) -> None:
    made = Made(tmp_path / "run", folders["bert"], own=False)
    released(made)
    tasks = [made.folder / "tasks" / n for n in ("news", "dates")]
    call("compose", *map(str, tasks), "--out", str(tmp_path / "out"))
    for name, x in load_adapter(tmp_path / "out")[1].items():
        mean = np.mean([made.state.tasks[n].extras[name] for n in ("news", "dates")], axis=0)
        np.testing.assert_allclose(x, mean, atol=1e-6)
    left = tmp_path / "left"  # every task has all classes: the last one that remains says what they are
    compose_without(made.folder, ["dates"], left)
    for name, x in load_adapter(left)[1].items():
        np.testing.assert_array_equal(x, made.state.tasks["wines"].extras[name])
