"""A client's update as the vector of a secure sum, and the sum as the mean of a federated method.

    v_k = (w_k x_k,  w_k,  w_k loss_before,  w_k loss_after,  clipped),    w_k = min(n_k, N) / N,    ||v_k|| <= C

x_k are the arrays that the method folds, padded with zeros to the shapes of the largest rank, with B scaled from the
client's s_k to the task's. N is public; a client with more rows than N counts as N. Only the arrays are clipped, so
that the norm of all is at most C. The mean is sum w_k x_k / sum w_k: what a method that is linear in w_k x_k makes of
its clients' answers, it makes of one answer with that mean. Padding and means as in HetLoRA (Cho et al., EMNLP 2024)
and FFA-LoRA (Sun et al., ICLR 2024); nested ranks under a sum: `fedlora.privacy.secagg.context.tiers`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedlora.adapter import Array
from fedlora.errors import RoundFailed
from fedlora.privacy.secagg.packing import Packing

__all__ = ["LEAST_BOUND", "MOST_LOSS", "SCALARS", "Mean", "mean_of", "packing", "vector"]

SCALARS = ("clipped", "loss_after", "loss_before", "weight")
MOST_LOSS = 10.0  # a loss above counts as this
LEAST_BOUND = 16.0  # more than the scalars' own norm, sqrt(2 + 2 * 10^2)


@dataclass(frozen=True, kw_only=True)
class Mean:
    """What a sum says: mean arrays, the sum of the clients' rows (each at most N), and means of losses."""

    arrays: dict[str, NDArray[np.float32]]
    examples: int
    loss_before: float
    loss_after: float
    clipped: float  # share of the clients whose update was longer than the bound


def packing(shapes: Mapping[str, tuple[int, ...]]) -> Packing:
    """The layout of the vector for arrays of these shapes, those of the largest rank."""
    return Packing({k: tuple(s) for k, s in shapes.items()}, SCALARS)


def vector(
    arrays: Mapping[str, Array],
    into: Packing,
    *,
    examples: int,
    most: int,
    ratio: float,
    bound: float,
    losses: tuple[float, float],
) -> NDArray[np.float32]:
    """v_k `[into.size]` of a client with `examples` rows and these arrays, B to be multiplied by `ratio`.

    `most` is N, `bound` is C, `losses` are those before and after training. Cost: one copy in float64 an array.
    """
    weight = min(examples, most) / most
    scalars = {
        "weight": weight,
        "loss_before": weight * min(max(losses[0], 0.0), MOST_LOSS),
        "loss_after": weight * min(max(losses[1], 0.0), MOST_LOSS),
    }
    padded: dict[str, Array] = {}
    squares = 0.0
    for name, shape in into.shapes.items():
        x = arrays[name].astype(np.float64) * (weight * (ratio if name.startswith("B:") else 1.0))
        full = np.zeros(shape, np.float64)
        full[tuple(slice(n) for n in x.shape)] = x
        padded[name] = full
        squares += float(np.sum(x**2))
    room = math.sqrt(bound**2 - 1.0 - sum(s**2 for s in scalars.values()))
    length = math.sqrt(squares)
    if length > room:
        padded = {name: x * (room / length) for name, x in padded.items()}
    return into.pack(padded, {**scalars, "clipped": float(length > room)})


def mean_of(total: Array, into: Packing, *, clients: int, most: int) -> Mean:
    """The mean that the sum `[into.size]` over `clients` stands for. Raises: RoundFailed if no client had a row."""
    arrays, scalars = into.unpack(total)
    weight = scalars["weight"]
    if not weight * most > 0.5:
        raise RoundFailed("the clients of a secure sum have no rows between them")
    return Mean(
        arrays={name: (x / weight).astype(np.float32) for name, x in arrays.items()},
        examples=round(weight * most),
        loss_before=scalars["loss_before"] / weight,
        loss_after=scalars["loss_after"] / weight,
        clipped=scalars["clipped"] / clients,
    )
