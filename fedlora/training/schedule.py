"""Learning rates over the whole run: a round knows its place in it and never starts the schedule anew."""

from __future__ import annotations

import math
from collections.abc import Sequence

from fedlora.state import LocalTraining

__all__ = ["factor", "rates"]


def factor(position: float, training: LocalTraining) -> float:
    """The share of `learning_rate` at `position` (0 to 1) of the run: linear warm-up, then constant or cosine to 0.

    >>> from fedlora.state import LocalTraining
    >>> work = {"learning_rate": 1.0, "local_steps": 1, "local_epochs": None, "batch_size": 1}
    >>> t = LocalTraining(**work, schedule="cosine", warmup=0.5)
    >>> [round(factor(p, t), 3) for p in (0.0, 0.25, 0.5, 0.75, 1.0)]
    [0.0, 0.5, 1.0, 0.5, 0.0]
    """
    if position < training.warmup:
        return position / training.warmup
    if training.schedule == "constant":
        return 1.0
    left = 1.0 - training.warmup
    return 0.5 * (1 + math.cos(math.pi * (position - training.warmup) / left)) if left > 0 else 1.0


def rates(training: LocalTraining, progress: Sequence[float], steps: int) -> list[float]:
    """The learning rate of each local step, `[steps]`. Step i is at the middle of its share of `progress`, so rounds
    join without a repeated or a zero step, however the run is cut into rounds."""
    begin, end = progress
    return [training.learning_rate * factor(begin + (end - begin) * (i + 0.5) / steps, training) for i in range(steps)]
