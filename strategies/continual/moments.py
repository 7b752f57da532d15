"""What clients give of their inputs and features when a task opens and when it is sealed: one more yield of a round.

Sketches of second moments add over clients (`fedlora.state.Measure`), and with one Omega for all tasks they add over
tasks too: the memory of old inputs is one sum, however many tasks there were.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from fedlora.adapter import Array, stack
from fedlora.config import RunConfig
from fedlora.continual.design import second_moment
from fedlora.continual.tasks import Leg
from fedlora.rng import public_normal
from fedlora.state import Answer, Ask, Block, GlobalState, Layout, Measure, Task, expected_arrays, keyed
from strategies.base import Cohort, Steps, Sums, in_order
from strategies.continual.views import INPUTS, head_of, remembering
from strategies.headed import COLUMNS

__all__ = ["Moments", "effect_on_old", "measured", "old_inputs", "with_old_inputs"]

Moments = dict[str, tuple[NDArray[np.float64], NDArray[np.float64], float]]  # by input: vectors, values, energy
_SKETCH = 64  # columns, if the settings say nothing


def measured(
    state: GlobalState,
    leg: Leg,
    cohort: Cohort,
    config: RunConfig,
    under: tuple[Block, ...],
    *,
    inputs: bool = False,
    features: bool = False,
    reads: bool = False,
) -> Steps[tuple[Moments, dict[str, NDArray[np.float64]]]]:
    """Second moments of every input under the blocks `under`, and all sums: those that the moments come from, and of
    features by class or of what a head reads, where asked for. Sums are over the rows of all who answered.
    """
    layout = state.layout
    widths = layout.inputs()
    labels = len(leg.config.model.labels)
    what = Measure(
        sketch=min(config.continual.sketch or _SKETCH, *widths.values()) if inputs else 0,
        seed=config.seed,
        classes=max(1, labels) if features else 0,
        columns=min(COLUMNS, layout.features) if features or reads else 0,
        reads=labels if reads else 0,
    )
    ask = Ask(task=leg.name, measure=what, blocks=under, arrays=keyed("head", head_of(state, leg.name, config)))
    answers: Mapping[str, Answer] = yield {m.id: ask for m in cohort.members}
    sums = Sums(expected_arrays(ask, layout))
    for _, answer in in_order(answers, cohort):
        means = {k: x * answer.examples for k, x in answer.arrays.items() if not k.startswith("feature")}
        sums.add({**answer.arrays, **means}, 1.0)
    total = sums.total()
    return _moments(total, widths, config.seed) if inputs else {}, total


def old_inputs(state: GlobalState, config: RunConfig) -> Moments:
    """The second moments of the sealed tasks' inputs, each scaled to energy 1 and added up; empty before any."""
    kept = state.memory.get(INPUTS)
    return {} if kept is None else _moments(kept, state.layout.inputs(), config.seed)


def with_old_inputs(state: GlobalState, sums: Mapping[str, Array]) -> GlobalState:
    """The state that remembers one sealed task's inputs more; `sums` are those that `measured` gave of them."""
    kept = dict(state.memory.get(INPUTS, {}))
    for name in state.layout.inputs():
        energy = float(sums[f"energy:{name}"][0]) or 1.0  # without any, the sketch is nothing too
        for key in (f"sketch:{name}", f"energy:{name}"):
            kept[key] = kept.get(key, 0.0) + sums[key] / energy
    return remembering(state, INPUTS, kept)


def _moments(sums: Mapping[str, Array], widths: Mapping[str, int], seed: int) -> Moments:
    """The second moment of every input out of summed sketches."""
    found: Moments = {}
    for name, width in widths.items():
        sketch, energy = sums[f"sketch:{name}"], float(sums[f"energy:{name}"][0])
        omega = public_normal(seed, "sketch", name, shape=(width, sketch.shape[1]))
        found[name] = (*second_moment(sketch, omega, energy), energy)
    return found


def effect_on_old(task: Task, new: Moments, old: Moments, layout: Layout) -> float:
    """`sqrt(E |dW x_old|^2 / E |dW x_new|^2)` over all modules, both inputs scaled to one mean energy: 1 if the task's
    update acts on old tasks' inputs as much as on its own, 0 if it is silent there. As far as the sketches can tell."""
    sums = {"new": 0.0, "old": 0.0}
    update = stack([b.adapter for b in task.full.blocks])
    for name, f in update.items():
        which = layout.modules[name].shares or name
        triangle = np.linalg.qr(f.b.astype(np.float64), mode="r") @ f.a.astype(np.float64) * f.scale
        for key, (vectors, values, energy) in (("new", new[which]), ("old", old[which])):
            seen = np.sum((triangle @ vectors) ** 2, axis=0)
            rest = max(energy - float(np.sum(values)), 0.0) / max(len(vectors) - len(values), 1)
            sums[key] += (float(seen @ values) + rest * (float(np.sum(triangle**2)) - float(np.sum(seen)))) / energy
    return float(np.sqrt(sums["old"] / sums["new"])) if sums["new"] > 0.0 else 0.0
