"""Which task a row belongs to, by the nearest mean of frozen features; and the nearest class mean as a classifier.

A prototype is the mean of one task's (or one class's) features under the bare base, of norm 1. Features are sums that
clients add up (`Measure.classes`), so no row and no client's mean is seen. Routing rows to the adapter of the nearest
prototype's task is that of S-Prompts (Wang et al., NeurIPS 2022) and CoLoR (Wistuba et al., 2023), which
take k-means centres for a task where we take its class means. The nearest class mean (Mensink et al., IEEE TPAMI 2013)
trains nothing: what does not beat it has learnt nothing that the base did not know.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedlora.adapter import Array
from fedlora.errors import DataError

TEMPERATURE = 0.05  # of `routed`: a cosine better by 0.05 weighs e times as much


@dataclass(frozen=True, eq=False)
class Prototypes:
    """`means [n, d]` float32 of norm 1, and for each row its task and its label index (-1: it stands for no label).

    Raises: DataError if lengths differ or a mean is not of norm 1.
    """

    means: NDArray[np.float32]
    tasks: tuple[str, ...]
    labels: NDArray[np.int64]

    def __post_init__(self) -> None:
        if self.means.ndim != 2 or not len(self.means) == len(self.tasks) == len(self.labels):
            raise DataError(
                f"prototypes need means [n, d] with n tasks and labels, got {self.means.shape}, {len(self.tasks)} "
                f"and {len(self.labels)}"
            )
        if not np.allclose(np.linalg.norm(self.means, axis=1), 1.0, atol=1e-4):
            raise DataError("prototypes must have norm 1: are they sums, or damaged?")

    @property
    def names(self) -> tuple[str, ...]:
        """The tasks, each once, in the order of their first prototype."""
        return tuple(dict.fromkeys(self.tasks))

    def routed(
        self, features: Array, temperature: float = TEMPERATURE
    ) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """For features `[n, d]` of norm 1: the index in `names` of the nearest prototype's task `[n]`, and weights
        `[n, tasks]` that sum to 1, the softmax over tasks of each task's best cosine divided by `temperature`.

        Ties go to the earlier task. Raises: DataError if there are fewer than two tasks, or features do not fit.
        """
        names = self.names
        if len(names) < 2:
            raise DataError(
                f"routing chooses between tasks, and there are prototypes of {len(names)}: {', '.join(names) or 'none'}"
            )
        cosine = self._cosines(features)
        owner = np.array(self.tasks)
        best = np.stack([cosine[:, owner == name].max(1) for name in names], axis=1)
        raised = np.exp((best - best.max(1, keepdims=True)) / temperature)
        return best.argmax(1), raised / raised.sum(1, keepdims=True)

    def nearest_class(self, features: Array, allowed: Sequence[int] | None = None) -> NDArray[np.int64]:
        """The label index of the nearest prototype `[n]`, for features `[n, d]` of norm 1; of `allowed` ones only.

        Raises: DataError if no prototype has such a label, or features do not fit.
        """
        usable = self.labels >= 0 if allowed is None else np.isin(self.labels, [x for x in allowed if x >= 0])
        if not usable.any():
            raise DataError(
                f"no prototype has a label{'' if allowed is None else f' of {list(allowed)}'}; "
                f"there are {sorted(set(self.labels.tolist()) - {-1})}"
            )
        return np.asarray(self.labels[usable][self._cosines(features)[:, usable].argmax(1)])

    def to_arrays(self) -> dict[str, NDArray[Any]]:
        """As named arrays for a state's memory; task names as JSON in bytes."""
        tasks = np.frombuffer(json.dumps(self.tasks).encode(), np.uint8)
        return {"means": self.means, "labels": self.labels, "tasks": tasks}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, NDArray[Any]]) -> Prototypes:
        """The inverse of `to_arrays`. Raises: DataError if they do not fit together."""
        return cls(arrays["means"], tuple(json.loads(arrays["tasks"].tobytes())), arrays["labels"])

    def _cosines(self, features: Array) -> NDArray[np.float64]:
        if features.ndim != 2 or features.shape[1] != self.means.shape[1] or not np.isfinite(features).all():
            raise DataError(
                f"features {features.shape} must be finite [n, {self.means.shape[1]}]; are they of the same base?"
            )
        return features.astype(np.float64) @ self.means.T.astype(np.float64)


def from_sums(task: str, sums: Array, counts: Array, *, labelled: bool = True) -> Prototypes:
    """One prototype for each class of `task` that has rows, from summed features `[C, d]` and row counts `[C]`.

    `labelled=False`: the rows had no labels (C is 1), and the prototype stands for none.
    Raises: DataError if shapes differ, a value is not finite, nothing was counted, or a class's features cancel to 0.
    """
    if sums.ndim != 2 or counts.shape != sums.shape[:1]:
        raise DataError(f"task {task}: feature sums {sums.shape} and counts {counts.shape} must be [C, d] and [C]")
    if not (np.isfinite(sums).all() and np.isfinite(counts).all()):
        raise DataError(f"task {task}: feature sums and counts must be finite")
    seen = np.flatnonzero(counts > 0)
    if not len(seen):
        raise DataError(f"task {task}: no row was counted, so it has no prototype; do its clients have training rows?")
    means = sums[seen].astype(np.float64)
    sizes = np.linalg.norm(means, axis=1)
    if not (sizes > 0.0).all():
        raise DataError(f"task {task}: the features of class {int(seen[sizes.argmin()])} sum to 0; are they all 0?")
    labels = seen.astype(np.int64) if labelled else np.full(len(seen), -1, np.int64)
    return Prototypes((means / sizes[:, None]).astype(np.float32), (task,) * len(seen), labels)


def joined(parts: Sequence[Prototypes]) -> Prototypes:
    """All prototypes of all `parts`, in order. Raises: DataError if there is none, widths differ or a task is twice."""
    if not parts:
        raise DataError("no prototypes to join: no task has any yet")
    if len({p.means.shape[1] for p in parts}) > 1:
        raise DataError(f"prototypes of widths {[p.means.shape[1] for p in parts]}: features of one base?")
    names = [name for p in parts for name in p.names]
    if twice := sorted({n for n in names if names.count(n) > 1}):
        raise DataError(f"prototypes of {', '.join(twice)} came twice; replace the old ones instead")
    return Prototypes(
        np.concatenate([p.means for p in parts]),
        tuple(task for p in parts for task in p.tasks),
        np.concatenate([p.labels for p in parts]),
    )
