"""What a sealed task is said to share with those before it, against dense projectors."""

from __future__ import annotations

import numpy as np
import pytest

from fedlora.adapter import Adapter, Factors
from fedlora.state import Block, Task
from strategies.continual.sealing import overlaps

SHAPES = {"q": (9, 14), "v": (4, 10)}


def task(name: str, *seeds: int, rank: int = 2) -> Task:
    """A sealed task with one block of random factors for each seed."""
    blocks = []
    for seed in seeds:
        rng = np.random.default_rng(seed)
        factors = {n: Factors(rng.normal(size=(rank, i)), rng.normal(size=(o, rank))) for n, (o, i) in SHAPES.items()}
        blocks.append(Block(adapter=Adapter(factors), born=1))
    return Task(name=name, sealed=True, blocks=tuple(blocks))


def dense(new: Task, old: Task) -> list[float]:
    """`||A_new P_old||_F / ||A_new||_F` by module; P by the pseudo-inverse of all the old task's rows."""
    shares = []
    for n in SHAPES:
        a, rows = (np.concatenate([b.adapter[n].a for b in t.blocks]) for t in (new, old))
        shares.append(float(np.linalg.norm(a @ np.linalg.pinv(rows) @ rows) / np.linalg.norm(a)))
    return shares


def test_the_overlap_with_each_task_is_that_of_dense_projectors() -> None:
    new, before = task("new", 3), [task("one", 1), task("two", 2, 4)]
    found = overlaps(new, before)
    for old in before:
        assert found[f"overlap/{old.name}"] == pytest.approx(np.mean(dense(new, old)), abs=1e-6)
    assert found["overlap/one"] < found["overlap/two"] < found["overlap"]  # two tasks span what neither does alone


def test_one_task_before_is_all_before_it() -> None:
    found = overlaps(task("new", 2), [task("one", 1)])
    assert found["overlap/one"] == pytest.approx(found["overlap"], abs=1e-12)


def test_the_same_rows_overlap_in_full_whatever_their_size() -> None:
    new = task("new", 1)
    twice = Adapter({n: Factors(2.0 * f.a, f.b, f.scale) for n, f in new.blocks[0].adapter.items()})
    old = Task(name="old", sealed=True, blocks=(Block(adapter=twice, born=1),))
    assert overlaps(new, [old, task("other", 5)])["overlap/old"] == pytest.approx(1.0, abs=1e-6)


def test_a_task_without_blocks_overlaps_with_nothing() -> None:
    found = overlaps(task("new", 2), [task("empty"), task("one", 1)])
    assert found["overlap/empty"] == found["similarity/empty"] == 0.0
    assert found["overlap/one"] > 0.0
    assert overlaps(task("new", 2), [task("empty")]) == {}
