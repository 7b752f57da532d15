"""A client's update as the vector of a secure sum, and the sum as the mean of a federated method.

    v_k = (w_k x_k,  w_k,  w_k loss_before,  w_k loss_after,  clipped),    w_k = min(n_k, N) / N,    ||v_k|| <= C

x_k are the arrays that the method folds, padded with zeros to the shapes of the largest rank, with B scaled from the
client's s_k to the task's. N is public; a client with more rows than N counts as N. Only the arrays are clipped, so
that the norm of all is at most C. The mean is sum w_k x_k / sum w_k: what a method that is linear in w_k x_k makes of
its clients' answers, it makes of one answer with that mean. Padding and means as in HetLoRA (Cho et al., EMNLP 2024)
and FFA-LoRA (Sun et al., ICLR 2024); nested ranks under a sum: `fedlora.privacy.secagg.context.tiers`.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from fedlora.adapter import Array, Factors
from fedlora.errors import RoundFailed
from fedlora.privacy.secagg import sketch
from fedlora.privacy.secagg.packing import Packing
from fedlora.state import Layout, Secure, TrainPlan, expected_shapes, part

__all__ = [
    "MOST_LOSS",
    "SCALARS",
    "Mean",
    "basis_of",
    "mean_of",
    "packing",
    "padded",
    "sketched",
    "sum_shapes",
    "vector",
]

SCALARS = ("clipped", "loss_after", "loss_before", "weight")
MOST_LOSS = 10.0  # a loss above counts as this


@dataclass(frozen=True, kw_only=True)
class Mean:
    """What a sum says: mean arrays, the sum of the clients' rows (each at most N), and means of losses."""

    arrays: dict[str, NDArray[np.float32]]
    examples: int
    loss_before: float
    loss_after: float
    clipped: float  # share of the clients whose update was longer than the bound


def sum_shapes(plan: TrainPlan, secure: Secure, layout: Layout) -> dict[str, tuple[int, ...]]:
    """Key -> shape of every array in the sum: those of the largest rank, or of one part of a sketch.

    The head goes with part 2, whose norm is that of the update and no more.
    """
    shapes = expected_shapes(replace(plan, rank=secure.rows or plan.rank), layout)
    if not secure.columns:
        return shapes
    heads = {key: shape for key, shape in shapes.items() if key.startswith("head:")}
    least = {n: min(secure.columns, m.out, m.inp) for n, m in layout.modules.items()}
    if secure.part == 1:
        return {f"Y:{n}": (m.out, least[n]) for n, m in layout.modules.items()}
    return {f"Z:{n}": (least[n], m.inp) for n, m in layout.modules.items()} | heads


def basis_of(plan: TrainPlan, secure: Secure, ranges: Mapping[str, Array]) -> str:
    """What is public and common besides the base, as a digest: the seed of A, or of Omega, or Q by module."""
    if not secure.columns:
        return hashlib.sha256(f"basis {plan.a_seed}".encode()).hexdigest()
    if secure.part == 1:
        return hashlib.sha256(f"omega {secure.seed} {secure.columns}".encode()).hexdigest()
    told = [f"{name} {sketch.digest(ranges[name].astype(np.float64))}" for name in sorted(ranges)]
    return hashlib.sha256("\n".join(told).encode()).hexdigest()


def sketched(
    arrays: Mapping[str, Array], plan: TrainPlan, secure: Secure, ranges: Mapping[str, Array]
) -> dict[str, Array]:
    """The sketch of a client's products `s B A` for one part, and in part 2 its head.

    `ranges` are Q `[out, p]` by module, orthonormal columns to 1e-5. Raises: AdapterError for a Q that is none.
    """
    a, b = part(arrays, "A"), part(arrays, "B")
    factors = {n: Factors(a[n], b[n], plan.scale) for n in a}
    if secure.part == 1:
        found = {}
        for name, f in factors.items():
            columns = min(secure.columns, *f.shape)
            omega = sketch.public_omega(secure.seed, name, inp=f.shape[1], columns=columns)
            found[f"Y:{name}"] = sketch.first_pass(f, omega / math.sqrt(columns), 1.0)
        return dict(found)
    passed = {f"Z:{n}": sketch.second_pass(f, ranges[n].astype(np.float64), 1.0) for n, f in factors.items()}
    return passed | {key: x for key, x in arrays.items() if key.startswith("head:")}


def packing(shapes: Mapping[str, tuple[int, ...]]) -> Packing:
    """The layout of the vector for arrays of these shapes, those of the largest rank."""
    return Packing({k: tuple(s) for k, s in shapes.items()}, SCALARS)


def padded(
    arrays: Mapping[str, Array], shapes: Mapping[str, tuple[int, ...]], ratio: float
) -> dict[str, NDArray[np.float64]]:
    """The arrays with zeros at the end of every axis, float64, in these `shapes`; B times `ratio`."""
    found = {}
    for name, shape in shapes.items():
        x = arrays[name].astype(np.float64)
        found[name] = np.zeros(shape, np.float64)
        found[name][tuple(slice(n) for n in x.shape)] = x * ratio if name.startswith("B:") else x
    return found


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
    full = {name: weight * x for name, x in padded(arrays, into.shapes, ratio).items()}
    room = math.sqrt(bound**2 - 1.0 - sum(s**2 for s in scalars.values()))
    length = math.sqrt(sum(float(np.sum(x**2)) for x in full.values()))
    if length > room:
        full = {name: x * (room / length) for name, x in full.items()}
    return into.pack(full, {**scalars, "clipped": float(length > room)})


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
