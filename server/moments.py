"""Second moments that a client gives are checked here, one client at a time: sums of them tell nobody apart later.

A sketch `C Omega` that is no second moment's, or means that are larger than the energy beside them allows, would make
sums from which no subspace, router or head can be made, and end the run for all. What passes is what some rows may
have given: it can still be false.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from fedlora.adapter import Array
from fedlora.continual.design import second_moment
from fedlora.continual.router import omega
from fedlora.discriminants import scatter
from fedlora.errors import AnswerRejected, MethodError
from fedlora.rng import public_normal
from fedlora.state import Answer, Ask, Measure, part

__all__ = ["RULE", "require_moments"]

RULE = "moments"
_SLACK = 1e-3  # relative; float32 sums of rows are far closer


def require_moments(ask: Ask, answer: Answer, client: str) -> None:
    """Refuse sketches, counts and means (`fedlora.state.Measure`) of an admitted answer that no rows have.

    Each sketch must be symmetric under its own Omega and hold no more than the energy beside it. Features, of norm 1,
    must be counted once for each row, and no class may have a sum that is longer than its count. The means of classes
    must fit in the energy of all, and the sketch of all less these means must still be that of a second moment.
    Cost: O(d s^2) for every sketch `[d, s]`. Raises: AnswerRejected, rule "moments", with what does not hold.
    """
    what, arrays = ask.measure, answer.arrays
    if what is None:
        return
    try:
        for name, sketch in part(arrays, "sketch").items():
            test = public_normal(what.seed, "sketch", name, shape=sketch.shape)
            second_moment(sketch, test, float(arrays[f"energy:{name}"][0]))
        if what.classes:
            _features(what, arrays, answer.examples)
        if what.reads:
            _classes("read", what, arrays, float(arrays["read:energy"][0]))
    except MethodError as error:
        raise AnswerRejected(client, RULE, str(error)) from error


def _features(what: Measure, arrays: Mapping[str, Array], examples: int) -> None:
    counts = arrays["feature:count"].astype(np.float64)
    if abs(counts.sum() - examples) > _SLACK * examples:
        raise MethodError(f"features of {counts.sum():g} rows were counted, and it measured {examples}")
    lengths = np.linalg.norm(arrays["feature:sum"].astype(np.float64), axis=1)
    for label in np.flatnonzero(lengths > (1.0 + _SLACK) * counts)[:1]:
        raise MethodError(
            f"feature:sum of class {label} has norm {lengths[label]:.4g}, and {counts[label]:g} features of norm 1 "
            "have no larger sum"
        )
    if what.columns:
        _classes("feature", what, arrays, float(counts.sum()))


def _classes(name: str, what: Measure, arrays: Mapping[str, Array], energy: float) -> None:
    """Sums, counts and sketch of rows by class, whose energy is that of all rows."""
    sums, counts = arrays[f"{name}:sum"].astype(np.float64), arrays[f"{name}:count"].astype(np.float64)
    squares, seen = np.sum(sums**2, axis=1), counts > 0.0
    if squares[~seen].any():
        raise MethodError(f"{name}:sum of class {np.flatnonzero(squares * ~seen)[0]} is not 0, and it has no rows")
    held = float(np.sum(squares[seen] / counts[seen]))
    if held > (1.0 + _SLACK) * energy:
        raise MethodError(f"the means of classes in {name}:sum hold {held:.4g}, and the energy of all is {energy:.4g}")
    sketch = arrays[f"{name}:sketch"]
    test = omega(what.seed, *sketch.shape)
    second_moment(sketch, test, energy)
    scatter(sums[seen], counts[seen], sketch, energy, test)
