"""Which task an input is of: linear discriminants on the frozen base's features, from sums alone.

    s_c(f) = mu_c^T S^-1 f - mu_c^T S^-1 mu_c / 2,    weight of a task = sum over its classes of softmax(s)_c

mu_c are class means of features (mean over tokens of the last hidden states, norm 1), S is the covariance within
classes: Fisher's discriminant for several classes (Rao, 1948). Old rows are gone when a router is wanted, so it is made
of what clients summed while each task was there: features and counts by class, and a sketch of their second moment
(fedlora/discriminants.py). Routing by the nearest mean alone, as S-Prompts (Wang et al.,
NeurIPS 2022) and CoLoR (Wistuba et al., 2023) do with k-means centres, is the case S = I.

Cost: d (C + s) numbers a client and task; O(d s^2) to fit, with d features, C classes, s columns.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedlora.adapter import Array
from fedlora.discriminants import scatter
from fedlora.errors import DataError
from fedlora.rng import public_normal

Float64 = NDArray[np.float64]

__all__ = ["EXPERTS", "Router", "added", "fit", "largest", "nearest_class", "omega", "task_names"]

EXPERTS = 2  # tasks that a row's mixture holds at most

_FLOOR = 0.1  # of the even part of S: added to it in all directions, so that no direction is trusted without end


@dataclass(frozen=True, kw_only=True)
class Router:
    """`weights [C, d]` and `offsets [C]` of every class that was seen, and for each its task and its label index
    (-1 for rows without labels)."""

    weights: Float64
    offsets: Float64
    tasks: tuple[str, ...]
    labels: NDArray[np.int64]

    @property
    def names(self) -> tuple[str, ...]:
        """The tasks, each once, in the order in which they were added."""
        return tuple(dict.fromkeys(self.tasks))

    def routed(self, features: Array) -> tuple[NDArray[np.int64], Float64]:
        """For features `[n, d]` of norm 1: the index in `names` of the likeliest task `[n]`, and weights `[n, tasks]`
        that sum to 1. Raises: DataError if there are fewer than two tasks, or features do not fit.
        """
        names = self.names
        if len(names) < 2:
            raise DataError(f"routing chooses between tasks, and there is {', '.join(names) or 'none'} alone")
        if features.ndim != 2 or features.shape[1] != self.weights.shape[1]:
            raise DataError(
                f"features {features.shape} must be [n, {self.weights.shape[1]}]; are they of the same base?"
            )
        scores = features.astype(np.float64) @ self.weights.T + self.offsets
        shares = np.exp(scores - scores.max(1, keepdims=True))
        shares /= shares.sum(1, keepdims=True)
        owner = np.array(self.tasks)
        weights = np.stack([shares[:, owner == name].sum(1) for name in names], axis=1)
        return weights.argmax(1), weights


def largest(weights: Float64, k: int = EXPERTS) -> Float64:
    """The k largest weights of each row `[n, tasks]`, scaled to sum to 1, and 0 for all others: the gates of a mixture.

    A router of a mixture of experts, as in Shazeer et al., Outrageously Large Neural Networks, ICLR 2017, eq. 3 to 5,
    but for its weights: there they are trained with the experts, here `fit` has them at the end from sums that clients
    gave when their tasks were sealed, and nothing is trained. Of equal weights the earlier task's counts first.
    Raises: DataError if k is below 1.
    """
    if k < 1:
        raise DataError(f"a mixture holds at least one task, got k = {k}")
    kept = np.zeros_like(weights)
    chosen = np.argsort(-weights, axis=1, kind="stable")[:, :k]
    np.put_along_axis(kept, chosen, np.take_along_axis(weights, chosen, 1), 1)
    return np.asarray(kept / kept.sum(1, keepdims=True))


def omega(seed: int, width: int, columns: int) -> Float64:
    """The public test matrix `[width, columns]` of the sketch of features."""
    return public_normal(seed, "sketch", "feature", shape=(width, columns))


def added(
    kept: Mapping[str, Array], task: str, sums: Array, counts: Array, sketch: Array, *, labelled: bool
) -> dict[str, NDArray[Any]]:
    """What is kept (empty before the first task) with one task more, as named arrays for a state's memory.

    `sums [C, d]`, `counts [C]`, `sketch [d, s]` are those of the task's rows over all clients.
    Raises: DataError if nothing was counted, the task is there already, or shapes differ.
    """
    seen = np.flatnonzero(counts > 0)
    if sums.ndim != 2 or counts.shape != sums.shape[:1] or len(sketch) != sums.shape[1]:
        raise DataError(f"task {task}: sums {sums.shape}, counts {counts.shape} and sketch {sketch.shape} do not fit")
    if not len(seen):
        raise DataError(f"task {task}: no row was counted; do its clients have training rows?")
    tasks = json.loads(bytes(kept["tasks"])) if kept else []
    if task in tasks:
        raise DataError(f"task {task}: its features were added already")
    labels = seen if labelled else np.full(len(seen), -1)
    parts = {"sums": sums[seen], "counts": counts[seen], "labels": labels.astype(np.int64)}
    whole = {k: np.concatenate([kept[k], x]) if kept else x for k, x in parts.items()}
    whole["sketch"] = sketch + kept["sketch"] if kept else sketch
    whole["tasks"] = np.frombuffer(json.dumps(tasks + [task] * len(seen)).encode(), np.uint8)
    return whole


def fit(kept: Mapping[str, Array], seed: int) -> Router:
    """The router of all tasks that were `added`. Raises: DataError before the first; MethodError as `second_moment`."""
    if not kept:
        raise DataError("no features were summed yet: no task was sealed, or continual.routing is off")
    test = omega(seed, *kept["sketch"].shape)
    energy = float(kept["counts"].sum())  # each feature has norm 1
    within = scatter(kept["sums"], kept["counts"], kept["sketch"], energy, test)
    weights = within.solved(within.values + _FLOOR * within.even, (1.0 + _FLOOR) * within.even)
    return Router(
        weights=weights,
        offsets=-np.sum(weights * within.means, axis=1) / 2.0,
        tasks=tuple(json.loads(bytes(kept["tasks"]))),
        labels=kept["labels"].astype(np.int64),
    )


def task_names(kept: Mapping[str, Array]) -> tuple[str, ...]:
    """The tasks that were `added`, in order."""
    return tuple(dict.fromkeys(json.loads(bytes(kept["tasks"])))) if kept else ()


def nearest_class(
    kept: Mapping[str, Array], features: Array, allowed: Sequence[int] | None = None
) -> NDArray[np.int64]:
    """The label whose mean feature has the largest cosine, `[n]`, for features `[n, d]`; of `allowed` labels only.

    The nearest class mean trains nothing (Mensink et al., IEEE TPAMI 2013): what does not beat it has learnt nothing
    that the base did not know. Raises: DataError if no class that was seen is allowed, or features do not fit.
    """
    usable = kept["labels"] >= 0 if allowed is None else np.isin(kept["labels"], [x for x in allowed if x >= 0])
    if not usable.any():
        raise DataError(f"no class among {'all' if allowed is None else list(allowed)} has a mean yet")
    if features.ndim != 2 or features.shape[1] != kept["sums"].shape[1]:
        raise DataError(f"features {features.shape} must be [n, {kept['sums'].shape[1]}]; are they of the same base?")
    means = kept["sums"][usable].astype(np.float64)
    means /= np.maximum(np.linalg.norm(means, axis=1, keepdims=True), 1e-12)
    return np.asarray(kept["labels"][usable][(features.astype(np.float64) @ means.T).argmax(1)], np.int64)
