"""A classifier's head that begins as linear discriminants of what it reads (`model.head=discriminants`).

Before the first round its clients give sums of what the head will read (`fedlora.state.Measure`), and the server makes
the head of their total. With a random head the first rounds bend the features to noise, each client towards the labels
that it happens to have; this one is right about most rows before anything is trained. Source: fedlora/discriminants.py.

What clients give tells the server the mean of each of their classes: it is not for private runs (fedlora/config_*).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from fedlora.adapter import Array
from fedlora.config import RunConfig
from fedlora.continual.router import omega
from fedlora.discriminants import discriminants, scatter
from fedlora.state import Answer, Ask, GlobalState, Measure, expected_arrays, keyed
from strategies.base import Closed, Cohort, Method, Round, Sums, in_order

__all__ = ["COLUMNS", "fitted_head", "headed"]

COLUMNS = 128  # of a sketch of features


def headed(method: Method, config: RunConfig) -> Method:
    """The same method, whose head is fitted before the first round to what the clients of that round have."""
    if config.model.head == "random":
        return method

    def protocol(state: GlobalState, cohort: Cohort) -> Round:
        if cohort.round == 1:
            task, layout = state.open_task, state.layout
            what = Measure(seed=config.seed, reads=len(config.model.labels), columns=min(COLUMNS, layout.features))
            ask = Ask(task=task.name, measure=what, arrays=keyed("head", task.extras))
            answers: Mapping[str, Answer] = yield {m.id: ask for m in cohort.members}
            sums = Sums(expected_arrays(ask, layout))
            for _, answer in in_order(answers, cohort):
                sums.add(answer.arrays, 1.0)
            task = replace(task, extras=fitted_head(task.extras, sums.total(), config.seed))
            state = replace(state, tasks={**state.tasks, task.name: task})
        closed: Closed = yield from method.protocol(state, cohort)
        return closed

    return replace(method, protocol=protocol)


def fitted_head(head: Mapping[str, Array], sums: Mapping[str, Array], seed: int) -> dict[str, Array]:
    """A head `[classes, features]` whose classes that somebody has are linear discriminants; the others stay.

    `sums` are what the answers' `read:` arrays add up to. Raises: MethodError as `fedlora.discriminants.scatter`.
    """
    seen, sketch = np.flatnonzero(sums["read:count"] > 0), sums["read:sketch"]
    means, counts, energy = sums["read:sum"][seen], sums["read:count"][seen], float(sums["read:energy"][0])
    weights, offsets = discriminants(scatter(means, counts, sketch, energy, omega(seed, *sketch.shape)))
    made = {name: np.array(x) for name, x in head.items()}
    for x in made.values():
        x[seen] = weights if x.ndim == 2 else offsets
    return made
