"""A classifier's head that begins as linear discriminants of what it reads (`model.head=discriminants`).

Before the first round its clients give sums of what the head will read (`fedlora.state.Measure`), and the server makes
the head of their total. With a random head the first rounds bend the features to noise, each client towards the labels
that it happens to have; this one is right about most rows before anything is trained. Source: fedlora/discriminants.py.

What clients give tells the server the mean of each of their classes: it is not for private runs (fedlora/config_*).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
        if state.version == 0:  # rounds that nobody was drawn for leave it so
            task, layout = state.open_task, state.layout
            what = Measure(seed=config.seed, reads=len(config.model.labels), columns=min(COLUMNS, layout.features))
            ask = Ask(task=task.name, measure=what, arrays=keyed("head", task.extras))
            answers: Mapping[str, Answer] = yield {m.id: ask for m in cohort.members}
            sums = Sums(expected_arrays(ask, layout))
            for _, answer in in_order(answers, cohort):
                sums.add(answer.arrays, float(answer.examples))
            own = range(len(config.model.labels))
            task = replace(task, extras=fitted_head(task.extras, sums.total(), own, config.seed))
            state = replace(state, tasks={**state.tasks, task.name: task})
        closed: Closed = yield from method.protocol(state, cohort)
        return closed

    return replace(method, protocol=protocol)


def fitted_head(
    head: Mapping[str, Array], sums: Mapping[str, Array], own: Sequence[int], seed: int
) -> dict[str, Array]:
    """A head `[classes, features]` whose rows of the classes `own` are linear discriminants; all others stay.

    `sums` are what the answers' `read:` arrays, each times its rows, add up to. A class of `own` that nobody has yet is
    taken to have one row, the mean of all: it is a little behind the others and not lost.
    Raises: MethodError as `fedlora.discriminants.scatter`.
    """
    total, counts, sketch = sums["read:sum"], sums["read:count"], sums["read:sketch"]
    seen = np.flatnonzero(counts > 0.0)
    within = scatter(total[seen], counts[seen], sketch, float(sums["read:energy"][0]), omega(seed, *sketch.shape))
    weights, offsets = discriminants(within)
    share = within.counts / within.counts.sum()
    middle = share @ weights  # the discriminant of the mean of all, for it is linear in means
    at = {int(c): (weights[i], offsets[i]) for i, c in enumerate(seen)}
    unseen = middle, -np.log1p(within.counts.sum()) - float(middle @ (share @ within.means)) / 2.0
    made = {name: np.array(x) for name, x in head.items()}
    for x in made.values():
        for c in own:
            x[c] = at.get(c, unseen)[0 if x.ndim == 2 else 1]
    return made
