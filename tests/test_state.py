"""Values of a run: round trips, digests, and the sum that a state stands for."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedlora.adapter import Adapter, Factors
from fedlora.errors import AdapterError
from fedlora.state import (
    Block,
    GlobalState,
    Layout,
    LocalTraining,
    Module,
    Task,
    TrainPlan,
    expected_shapes,
    keyed,
    part,
    zero_adapter,
)

names = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=6)
modules = st.builds(
    lambda out, inp, kind: Module(out=out, inp=inp, kind=kind),
    st.integers(1, 9),
    st.integers(1, 9),
    st.sampled_from(["linear", "conv1d", "embedding"]),
)
layouts = st.builds(
    lambda m, h: Layout(modules=m, head=h),
    st.dictionaries(names, modules, min_size=1, max_size=4),
    st.dictionaries(names, st.tuples(st.integers(1, 9), st.integers(1, 9)), max_size=2),
)
TRAINING = LocalTraining(learning_rate=1e-3, local_steps=1, local_epochs=None, batch_size=1)
LAYOUT = Layout(modules={"q": Module(out=5, inp=4), "v": Module(out=2, inp=4)}, head={"score.weight": (3, 5)})


def plan(rank: int, send: tuple) -> TrainPlan:
    return TrainPlan(method="m", rank=rank, rows=rank, scale=1.0, train=("A",), send=send, training=TRAINING)


def adapter(rank: int, seed: int, scale: float = 1.0) -> Adapter:
    rng = np.random.default_rng(seed)
    return Adapter(
        {
            n: Factors(rng.normal(size=(rank, m.inp)), rng.normal(size=(m.out, rank)), scale)
            for n, m in LAYOUT.modules.items()
        }
    )


@settings(deadline=None, max_examples=30)
@given(layouts)
def test_layout_survives_json_and_digest_ignores_order(layout):
    again = Layout.from_json(json.loads(json.dumps(layout.to_json())))
    assert again == layout
    backwards = Layout(modules=dict(reversed(layout.modules.items())), head=dict(reversed(layout.head.items())))
    assert again.digest == backwards.digest == layout.digest
    assert layout.max_rank() == min(min(m.out, m.inp) for m in layout.modules.values())


@pytest.mark.parametrize(
    "other",
    [
        dataclasses.replace(LAYOUT, head={}),
        dataclasses.replace(LAYOUT, head={"score.weight": (5, 3)}),
        dataclasses.replace(LAYOUT, modules={**LAYOUT.modules, "q": Module(out=4, inp=5)}),
        dataclasses.replace(LAYOUT, modules={**LAYOUT.modules, "q": Module(out=5, inp=4, kind="conv1d")}),
        dataclasses.replace(LAYOUT, modules={"k": LAYOUT.modules["q"], "v": LAYOUT.modules["v"]}),
    ],
)
def test_another_layout_has_another_digest(other):
    assert other.digest != LAYOUT.digest


def state(*tasks: Task) -> GlobalState:
    return GlobalState(version=1, base="b", layout=LAYOUT, tasks={t.name: t for t in tasks})


def test_update_is_the_dense_sum_over_tasks_blocks_and_pairs():
    sealed = Task(
        name="old",
        sealed=True,
        blocks=(Block(adapter=adapter(2, 0), born=1), Block(adapter=adapter(3, 1, -0.5), born=2)),
    )
    opened = Task(name="new", pair=adapter(4, 2, 2.0), blocks=(Block(adapter=adapter(0, 3), born=3),))
    update = state(sealed, opened).update()
    for name in LAYOUT.modules:
        terms = [(1.0, adapter(2, 0)), (-0.5, adapter(3, 1)), (2.0, adapter(4, 2))]
        expected = sum(s * x[name].b @ x[name].a for s, x in terms)
        np.testing.assert_allclose(update[name].b @ update[name].a, expected, atol=1e-12)
        assert (update[name].rank, update[name].scale) == (9, 1.0)


def test_a_state_that_has_learnt_nothing_has_rank_zero():
    update = state(Task(name="")).update()
    assert {n: (f.rank, f.shape) for n, f in update.items()} == {"q": (0, (5, 4)), "v": (0, (2, 4))}
    assert not any(f.dense().any() for f in zero_adapter(LAYOUT, 3).values())


def test_with_task_is_the_next_version_and_leaves_the_old_alone():
    first = state(Task(name="a"), Task(name="b"))
    second = first.with_task(Task(name="a", sealed=True), memory={"m": {"x": np.ones(1)}})
    assert (first.version, second.version) == (1, 2)
    assert (first.tasks["a"].sealed, second.tasks["a"].sealed) == (False, True)
    assert list(second.tasks) == ["a", "b"]
    assert second.tasks["b"] is first.tasks["b"]
    assert (first.memory, list(second.memory)) == ({}, ["m"])
    assert second.with_task(Task(name="c")).memory is second.memory
    assert (first.open_task.name, second.open_task.name) == ("a", "b")


def test_all_sealed_means_nothing_to_train():
    with pytest.raises(AdapterError, match="every task of this state is sealed"):
        _ = state(Task(name="a", sealed=True)).open_task


def test_values_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        state(Task(name="a")).version = 2


def test_expected_shapes_are_those_the_plan_sends():
    assert expected_shapes(plan(3, ("A", "B", "head")), LAYOUT) == {
        "A:q": (3, 4),
        "B:q": (5, 3),
        "A:v": (3, 4),
        "B:v": (2, 3),
        "head:score.weight": (3, 5),
    }
    assert expected_shapes(plan(2, ("B",)), LAYOUT) == {"B:q": (5, 2), "B:v": (2, 2)}
    assert expected_shapes(plan(2, ()), LAYOUT) == {}


@given(st.dictionaries(names, st.integers(), max_size=4), st.dictionaries(names, st.integers(), max_size=4))
def test_part_undoes_keyed_whatever_the_names(a, b):
    arrays = {**keyed("A", a), **keyed("probe", b)}
    assert (part(arrays, "A"), part(arrays, "probe"), part(arrays, "B")) == (a, b, {})
