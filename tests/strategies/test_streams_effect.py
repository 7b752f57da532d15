"""What a new task's update does to old inputs, from second moments, against the inputs themselves."""

from __future__ import annotations

import numpy as np
import pytest

from fedlora.adapter import Adapter, Factors
from fedlora.state import Block, GlobalState, Layout, Module, Task
from strategies.continual.moments import effect_on_old, with_old_inputs
from strategies.continual.views import INPUTS


def test_the_effect_on_old_inputs_is_that_of_the_dense_update() -> None:
    rng = np.random.default_rng(0)
    own = rng.normal(size=(200, 12)) @ rng.normal(size=(12, 12))
    old = rng.normal(size=(200, 12)) @ np.diag([1.0] * 4 + [0.0] * 8)
    f = Factors(rng.normal(size=(3, 12)), rng.normal(size=(5, 3)), 0.5)

    def moment(x: np.ndarray) -> tuple[np.ndarray, np.ndarray, float]:  # type: ignore[type-arg]
        values, vectors = np.linalg.eigh(x.T @ x)
        return vectors[:, ::-1], values[::-1], float(np.sum(x**2))

    def share(x: np.ndarray) -> float:  # type: ignore[type-arg]
        return float(np.sum((x @ f.dense().T) ** 2) / np.sum(x**2))

    layout = Layout(modules={"k": Module(out=5, inp=12, shares="a"), "q": Module(out=5, inp=12)})
    task = Task(name="t", blocks=(Block(adapter=Adapter({"q": f}), born=0),))
    found = effect_on_old(task, {"q": moment(own)}, {"q": moment(old)}, layout)
    assert found == pytest.approx(np.sqrt(share(old) / share(own)))
    shared = Task(name="t", blocks=(Block(adapter=Adapter({"k": f}), born=0),))
    assert effect_on_old(shared, {"a": moment(own)}, {"a": moment(old)}, layout) == pytest.approx(found)
    blind = {"q": (moment(old)[0][:, :4], moment(old)[1][:4], moment(old)[2])}  # the rest is not there, so none is even
    assert effect_on_old(task, {"q": moment(own)}, blind, layout) == pytest.approx(found)


def test_old_inputs_add_up_at_one_energy_each_and_silent_ones_add_nothing() -> None:
    state = GlobalState(version=0, base="b", layout=Layout(modules={"q": Module(out=5, inp=3)}), tasks={}, memory={})
    sketch = np.arange(6.0).reshape(3, 2)
    for size in (4.0, 2.0):
        state = with_old_inputs(state, {"sketch:q": size * sketch, "energy:q": np.array([size])})
    np.testing.assert_allclose(state.memory[INPUTS]["sketch:q"], 2 * sketch)
    np.testing.assert_allclose(state.memory[INPUTS]["energy:q"], [2.0])
    silent = with_old_inputs(state, {"sketch:q": 0.0 * sketch, "energy:q": np.zeros(1)})
    np.testing.assert_array_equal(silent.memory[INPUTS]["sketch:q"], state.memory[INPUTS]["sketch:q"])
