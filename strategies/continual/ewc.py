"""ewc: one pair goes on from task to task, held near where it stood by the Fisher information of old rows.

    penalty / 2 * sum_i F_i (x_i - x*_i)^2,    F_i = sum over rows of (d loss of the row / d x_i)^2 / rows

at the entries of A and of scale * B. The sum over tasks of their quadratics is one quadratic, so that its cost does not
grow. Source: Kirkpatrick et al., Overcoming catastrophic forgetting in neural networks, PNAS 2017, eq. 3.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from fedlora.adapter import Array
from fedlora.config import RunConfig
from fedlora.continual.tasks import Leg
from fedlora.errors import MethodError
from fedlora.state import Answer, Ask, GlobalState, Measure, TrainPlan, keyed
from strategies.base import Cohort, Steps, Sums, in_order
from strategies.continual.views import head_of, remembering
from strategies.continual.way import Way

__all__ = ["WAY"]

_OWNER = "stream:ewc"  # in GlobalState.memory: by entry, summed Fisher information, and its product with where it stood
_WEIGHT = 100.0
_ROWS = 64  # of each client, whose gradients are squared
_TINY = 1e-30  # divides nothing by zero


def _sealed(state: GlobalState, leg: Leg, cohort: Cohort, config: RunConfig) -> Steps[GlobalState]:
    """Add this task's Fisher information, and its product with where the entries stand, to what is held."""
    pair = state.tasks[leg.name].pair
    if pair is None:
        raise MethodError(f"task {leg.name}: {leg.config.method.name} keeps no pair that ewc could hold")
    at = {**keyed("A", {n: f.a for n, f in pair.items()}), **keyed("B", {n: f.folded().b for n, f in pair.items()})}
    head = keyed("head", head_of(state, leg.name, config))
    ask = Ask(task=leg.name, measure=Measure(fisher=_ROWS), arrays={**at, **head})
    answers: Mapping[str, Answer] = yield {m.id: ask for m in cohort.members}
    sums, rows = Sums({f"fisher-{key}": x.shape for key, x in at.items()}), 0
    for _, answer in in_order(answers, cohort):
        sums.add(answer.arrays, 1.0)
        rows += min(answer.examples, _ROWS)
    kept = dict(state.memory.get(_OWNER, {}))
    for key, total in sums.total().items():
        fisher, where = total / rows, key.removeprefix("fisher-")
        kept[key] = kept.get(key, 0.0) + fisher
        kept[f"moment-{where}"] = kept.get(f"moment-{where}", 0.0) + fisher * at[where].astype(np.float64)
    return remembering(state, _OWNER, kept)


def _led(plan: TrainPlan, under: int, state: GlobalState, config: RunConfig) -> tuple[TrainPlan, Mapping[str, Array]]:
    kept = state.memory.get(_OWNER, {})
    if not kept:
        return plan, {}
    return replace(plan, anchor=config.continual.penalty or _WEIGHT), _anchors_at(kept, plan.scale)


def _anchors_at(kept: Mapping[str, Array], scale: float) -> dict[str, Array]:
    """All tasks' penalties as one, for a client that trains B at `scale`: what is kept is of A and of scale * B."""
    arrays: dict[str, Array] = {}
    for key, fisher in kept.items():
        of, _, where = key.partition("-")
        if of == "fisher":
            own = scale if where.startswith("B:") else 1.0
            anchor = kept[f"moment-{where}"] / np.maximum(fisher, _TINY)
            arrays[key] = (fisher * own**2).astype(np.float32)
            arrays[f"anchor-{where}"] = (anchor / own).astype(np.float32)
    return arrays


WAY = Way(name="ewc", led=_led, sealed=_sealed)
