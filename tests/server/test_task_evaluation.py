"""The server's scores by task, and what a run with tasks hands out; against dense weights in a model of its own."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch.func import functional_call
from transformers import AutoModelForSequenceClassification

from fedlora.adapter import Adapter, Factors
from fedlora.base import Base
from fedlora.config import RunConfig, load_config
from fedlora.continual.router import added, fit, omega
from fedlora.data.rows import TokenRow
from fedlora.peft_bridge import load_adapter
from fedlora.state import Block, GlobalState, Subspace, Task
from fedlora.subspace import public_rows
from server.evaluate import TaskRows, tasks_blocks
from server.release import release
from strategies.continual.views import FEATURES, HEAD, joint_head

CHOICES = {"one": (0, 1), "two": (2, 0), "three": (1, 2)}
LABELS = "abc"
LAST = "three"  # of the tasks, the one that has not begun


def config_of(way: str, base: Base) -> RunConfig:
    tables = [{"name": n, "data.labels": [LABELS[i] for i in c]} for n, c in CHOICES.items()]
    return load_config(
        None,
        [f"continual.method={way}", "method.name=fedit", f"tasks={json.dumps(tables)}", "data.name=rows.csv",
         "model.task_type=sequence-classification", "model.labels=a,b,c", "seed=3"],
    )  # fmt: skip


@pytest.fixture
def base(load: Callable[..., Base]) -> Base:
    return load("bert")


@pytest.fixture
def by_task() -> dict[str, list[TokenRow]]:
    """Rows of each task, in tokens of its own, so that a router has something to go by."""
    rng = np.random.default_rng(5)
    return {name: [_row(rng, i, choices) for _ in range(25)] for i, (name, choices) in enumerate(CHOICES.items())}


def _row(rng: np.random.Generator, task: int, choices: tuple[int, ...]) -> TokenRow:
    tokens = rng.integers(1 + 20 * task, 21 + 20 * task, int(rng.integers(4, 12))).astype(np.int32)
    return TokenRow(tokens, np.zeros(len(tokens), np.bool_), int(rng.choice(choices)), "", choices)


def sealed(base: Base, folder: Path, rows: Mapping[str, Sequence[TokenRow]]) -> GlobalState:
    """Two sealed tasks of random pairs, one of them in a subspace, with heads of their own; the third has not begun."""
    rng = np.random.default_rng(1)

    def pair(columns: int | None = None) -> Adapter:
        return Adapter({
            n: Factors(rng.normal(size=(2, columns or m.inp)).astype(np.float32) / 2,
                       rng.normal(size=(m.out, 2)).astype(np.float32) / 2)
            for n, m in base.layout.modules.items()
        })  # fmt: skip

    def head() -> dict[str, NDArray[np.float32]]:
        return {n: (x + 0.5 * rng.normal(size=x.shape)).astype(np.float32) for n, x in base.initial_head.items()}

    subspace = Subspace(dim=6, start=2, seed=9)
    basis = {n: public_rows(subspace, n, m.inp) for n, m in base.layout.modules.items()}
    tasks = [
        Task(name="one", blocks=(Block(adapter=pair(), born=1),), extras=head(), sealed=True,
             statistics={"sealed": 1.0}),
        Task(name="two", blocks=(Block(adapter=pair(6), born=2),), extras=head(), sealed=True,
             statistics={"sealed": 2.0}, subspace=subspace, basis=basis),
    ]  # fmt: skip
    kept: dict[str, Any] = {}
    for name in ("one", "two"):
        f = features(folder, rows[name])
        labels = np.array([row.label for row in rows[name]])
        sums = np.stack([f[labels == c].sum(0) for c in range(3)])
        sketch = f.T @ (f @ omega(3, f.shape[1], 8))
        kept = added(kept, name, sums, np.bincount(labels, minlength=3).astype(float), sketch, labelled=True)
    memory = {HEAD: dict(base.initial_head), FEATURES: kept}
    return GlobalState(
        version=4, base=base.fingerprint, layout=base.layout, tasks={t.name: t for t in tasks}, memory=memory
    )


def product(task: Task) -> dict[str, NDArray[np.float64]]:
    out: dict[str, NDArray[np.float64]] = {}
    for block in task.blocks:
        for n, f in block.adapter.items():
            a = f.a.astype(float) @ task.basis[n].astype(float) if task.basis else f.a.astype(float)
            out[n] = out.get(n, 0.0) + f.scale * f.b.astype(float) @ a
    return out


@lru_cache(maxsize=1)
def model_in(folder: Path) -> Any:
    return AutoModelForSequenceClassification.from_pretrained(folder).eval()


def features(folder: Path, rows: Sequence[TokenRow]) -> NDArray[np.float64]:
    model = model_in(folder)
    found = []
    with torch.no_grad():
        for row in rows:
            tokens = torch.from_numpy(row.tokens.astype(np.int64))[None]
            states = model.base_model(input_ids=tokens, attention_mask=torch.ones_like(tokens)).last_hidden_state
            mean = states[0].double().mean(0).numpy()
            found.append(mean / np.linalg.norm(mean))
    return np.array(found)


def logits(
    folder: Path, tasks: Sequence[Task], head: Mapping[str, NDArray[Any]], rows: Sequence[TokenRow]
) -> NDArray[np.float64]:
    """`[rows, 3]`, one row at a time, with the tasks' products added to the weights."""
    model = model_in(folder)
    weights = {n: torch.from_numpy(np.asarray(x)) for n, x in head.items()}
    for task in tasks:
        for n, x in product(task).items():
            key = f"{n}.weight"
            weights[key] = weights.get(key, model.get_parameter(key)) + torch.from_numpy(x).float()
    out = []
    with torch.no_grad():
        for row in rows:
            tokens = torch.from_numpy(row.tokens.astype(np.int64))[None]
            call = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
            out.append(functional_call(model, weights, (), call).logits[0].double().numpy())
    return np.array(out)


def right(found: NDArray[np.float64], rows: Sequence[TokenRow], choices: Sequence[int] | None = None) -> list[bool]:
    """Whether each row's label has the largest logit, among its own choices or these."""
    among = [list(choices if choices is not None else row.choices or range(3)) for row in rows]
    return [bool(a[int(np.argmax(x[a]))] == row.label) for x, a, row in zip(found, among, rows, strict=True)]


@pytest.mark.parametrize("way", ["incremental", "separate"])
def test_scores_are_those_of_the_dense_weights(
    way: str, base: Base, folders: dict[str, Path], by_task: dict[str, list[TokenRow]]
) -> None:
    state = sealed(base, folders["bert"], by_task)
    config = config_of(way, base)
    scorer = TaskRows(base, by_task, config, batch_size=7)
    both = list(state.tasks.values())
    found = scorer.scores(state, tuple(CHOICES))
    for name, rows in by_task.items():
        head = state.tasks[name].extras if name in state.tasks else joint_head(state, config)
        on = both if way == "incremental" else [state.tasks[name]] if name in state.tasks else []
        want = right(logits(folders["bert"], on, head, rows), rows)
        assert found[name]["correct"] == sum(want)
        assert found[name]["counted"] == 25
        assert 0 < sum(want) < 25


@pytest.mark.parametrize("way", ["incremental", "separate"])
def test_inference_with_and_without_the_task(
    way: str, base: Base, folders: dict[str, Path], by_task: dict[str, list[TokenRow]]
) -> None:
    folder, config = folders["bert"], config_of(way, base)
    state = sealed(base, folder, by_task)
    rows = {n: by_task[n] for n in ("one", "two")}
    found = TaskRows(base, rows, config, batch_size=7).inference(state)
    both, heads = list(state.tasks.values()), {n: t.extras for n, t in state.tasks.items()}
    on = {n: [state.tasks[n]] if way == "separate" else both[: i + 1] for i, n in enumerate(rows)}
    router = fit(state.memory[FEATURES], config.seed)
    ways = {"known", "routed", "mixed", "routing"} | ({"summed", "open", "weighed"} if way == "incremental" else set())
    assert set(found) == ways
    for name, some in rows.items():
        assert found["known"][name]["score"] == np.mean(right(logits(folder, on[name], heads[name], some), some))
        to, likely = router.routed(features(folder, some))
        assert found["routing"][name]["score"] == np.mean(np.array(router.names)[to] == name)
        hits = np.zeros(len(some), np.bool_)
        for other, choices in ((n, CHOICES[n]) for n in rows):
            there = [row.label in choices for row in some]
            under = right(logits(folder, on[other], heads[other], some), some, choices)
            hits |= (np.array(router.names)[to] == other) & there & under
        assert found["routed"][name]["score"] == pytest.approx(np.mean(hits))
        if way == "separate":
            continue
        assert found["summed"][name]["score"] == np.mean(right(logits(folder, both, heads[name], some), some))
        joint = logits(folder, both, joint_head(state, config), some)
        assert found["open"][name]["score"] == np.mean(right(joint, some, range(3)))
        shares = np.zeros(joint.shape)
        for i, other in enumerate(router.names):
            own = list(CHOICES[other])
            raised = np.exp(joint[:, own])
            shares[:, own] += likely[:, i : i + 1] * raised / raised.sum(1, keepdims=True)
        assert found["weighed"][name]["score"] == np.mean(right(shares, some, range(3)))
    assert np.mean([t["score"] for t in found["routing"].values()]) > 0.8


@pytest.mark.parametrize("way", ["incremental", "separate", "sequential"])
def test_a_mixture_of_one_is_the_routed_way(
    way: str, base: Base, folders: dict[str, Path], by_task: dict[str, list[TokenRow]]
) -> None:
    """The law: with one task a row (k = 1) a mixture is routing, under every meaning that a task's blocks have."""
    state = sealed(base, folders["bert"], by_task)
    rows = {n: by_task[n] for n in ("one", "two")}
    found = TaskRows(base, rows, config_of(way, base), batch_size=7, experts=1).inference(state)
    assert found["mixed"] == found["routed"]
    assert 0.0 < found["routed"]["one"]["score"] < 1.0


@pytest.mark.parametrize("way", ["incremental", "separate"])
def test_a_mixture_is_the_sum_over_tasks_of_what_each_head_says_of_the_mixed_weights(
    way: str, base: Base, folders: dict[str, Path], by_task: dict[str, list[TokenRow]], monkeypatch: pytest.MonkeyPatch
) -> None:
    state = sealed(base, folders["bert"], by_task)
    rows, names = {n: by_task[n] for n in ("one", "two")}, ("one", "two")
    likely = {n: np.random.default_rng(i).dirichlet(np.ones(2), 25) for i, n in enumerate(names)}
    scorer = TaskRows(base, rows, config_of(way, base), batch_size=7)
    monkeypatch.setattr(scorer, "_beliefs", lambda state: (names, likely))
    found = scorer.inference(state)["mixed"]
    for name, some in rows.items():
        hits = []
        for row, p in zip(some, likely[name], strict=True):
            shares = np.zeros(3)
            gates = (p[0] + p[1], p[1]) if way == "incremental" else (p[0], p[1])  # of the blocks of one and of two
            on = [scaled(state.tasks[n], g) for n, g in zip(names, gates, strict=True)]
            for weight, other in zip(p, names, strict=True):
                own = list(CHOICES[other])
                raised = np.exp(logits(folders["bert"], on, state.tasks[other].extras, [row])[0][own])
                shares[own] += weight * raised / raised.sum()
            hits.append(int(shares.argmax()) == row.label)
        assert found[name]["score"] == np.mean(hits)


def scaled(task: Task, gate: float) -> Task:
    return replace(
        task,
        blocks=tuple(
            replace(b, adapter=Adapter({n: Factors(f.a, f.b, gate * f.scale) for n, f in b.adapter.items()}))
            for b in task.blocks
        ),
    )


def test_what_blocks_count_by_task(base: Base, folders: dict[str, Path], by_task: dict[str, list[TokenRow]]) -> None:
    state = sealed(base, folders["bert"], by_task)
    for way, want in (
        ("incremental", [[1, 0], [1, 1]]), ("separate", [[1, 0], [0, 1]]), ("sequential", [[1, 1], [1, 1]])
    ):  # fmt: skip
        blocks, known = tasks_blocks(state, ("one", "two"), way)
        assert known.tolist() == want
        assert [b.born for b in blocks] == [1, 2]
    twice = replace(state, tasks={n: replace(t, blocks=2 * t.blocks) for n, t in state.tasks.items()})
    assert tasks_blocks(twice, ("one", "two"), "incremental")[1].tolist() == [[2, 0], [2, 2]]
    bare = replace(state, tasks={n: replace(t, blocks=()) for n, t in state.tasks.items()})
    assert tasks_blocks(bare, ("one", "two"), "incremental")[1].shape == (2, 0)
    rows = {n: by_task[n] for n in ("one", "two")}
    assert "mixed" in TaskRows(base, rows, config_of("incremental", base), batch_size=7).inference(bare)


@pytest.mark.parametrize("way", ["incremental", "separate", "nearest-mean"])
def test_row_by_row_adds_up_to_the_scores(
    way: str, base: Base, folders: dict[str, Path], by_task: dict[str, list[TokenRow]]
) -> None:
    state = sealed(base, folders["bert"], by_task)
    scorer = TaskRows(base, by_task, config_of(way, base), batch_size=7)
    found = scorer.right(state)
    assert {n: float(x.sum()) for n, x in found.items()} == {
        n: sums["correct"] for n, sums in scorer.scores(state, tuple(CHOICES)).items()
    }
    if way == "incremental":
        name = "one"
        dense = logits(folders["bert"], list(state.tasks.values()), state.tasks[name].extras, by_task[name])
        assert found[name].tolist() == right(dense, by_task[name])


def test_routing_with_one_task_says_nothing(
    base: Base, folders: dict[str, Path], by_task: dict[str, list[TokenRow]]
) -> None:
    state = sealed(base, folders["bert"], by_task)
    alone = replace(state, memory={HEAD: state.memory[HEAD]})
    found = TaskRows(base, {"one": by_task["one"]}, config_of("incremental", base), batch_size=7).inference(alone)
    assert set(found) == {"summed", "known", "open"}


def test_the_nearest_class_mean_is_that_of_the_bare_base(
    base: Base, folders: dict[str, Path], by_task: dict[str, list[TokenRow]]
) -> None:
    state = sealed(base, folders["bert"], by_task)
    scorer = TaskRows(base, by_task, config_of("nearest-mean", base), batch_size=7)
    found = scorer.scores(state, ("one", "two", LAST))
    means = []
    for name in ("one", "two"):
        f, labels = features(folders["bert"], by_task[name]), np.array([row.label for row in by_task[name]])
        means += [(c, f[labels == c].mean(0)) for c in CHOICES[name]]
    for name in ("one", "two"):
        f, labels = features(folders["bert"], by_task[name]), np.array([row.label for row in by_task[name]])
        for key, allowed in (("correct", CHOICES[name]), ("correct_open", (0, 1, 2))):
            usable = [(c, m / np.linalg.norm(m)) for c, m in means if c in allowed]
            said = [max(usable, key=lambda u, x=x: float(u[1] @ x))[0] for x in f]
            assert found[name][key] == sum(np.array(said) == labels)
    assert found[LAST] == {"counted": 25.0, "correct": 0.0, "correct_open": 0.0}


@pytest.mark.parametrize(
    ("way", "trained"),
    [("incremental", ("one", "two")), ("sequential", ("two",)), ("nearest-mean", ()), ("incremental", ("two",))],
)
def test_what_is_released_adds_up(
    way: str,
    trained: tuple[str, ...],
    base: Base,
    folders: dict[str, Path],
    by_task: dict[str, list[TokenRow]],
    tmp_path: Path,
) -> None:
    """`adapter/` is the sum, `tasks/NAME/` each its own with its own head; no folder where nothing was trained.

    So it is where a pair went on to the next task, and where none of a task's clients was ever drawn, so that B is 0.
    """
    config = config_of(way, base)
    state = sealed(base, folders["bert"], by_task)
    tasks = {}
    for name, task in state.tasks.items():
        [block] = task.blocks
        zero = Adapter({n: Factors(f.a, 0.0 * f.b) for n, f in block.adapter.items()})
        none = (replace(block, adapter=zero),) if way == "incremental" else ()
        tasks[name] = task if name in trained else replace(task, blocks=none)
    state = replace(state, tasks=tasks)
    release(tmp_path, state, config, run="r", events=[])
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    found = {str(Path(p).parent) for p in manifest["files"]}
    assert found == {f"tasks/{n}" for n in trained} | ({"adapter"} if trained else set())
    total: dict[str, NDArray[np.float64]] = {}
    for name in trained:
        adapter, head = load_adapter(tmp_path / "tasks" / name)
        for n, x in product(state.tasks[name]).items():
            np.testing.assert_allclose(adapter[n].dense(), x, atol=1e-5)
            total[n] = total.get(n, 0.0) + x
        for n, x in state.tasks[name].extras.items():
            np.testing.assert_array_equal(head[n], x)
    if trained:
        whole, head = load_adapter(tmp_path / "adapter")
        for n, f in whole.items():
            np.testing.assert_allclose(f.dense(), total[n], atol=1e-5)
        for n, x in joint_head(state, config).items():
            np.testing.assert_array_equal(head[n], x)
