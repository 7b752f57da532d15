"""The ways that hold nothing back, and the bounds; what each does is what its fields say, or the settings of its tasks.

- sequential: one pair goes on from task to task.
- incremental: a new pair a task, unconstrained.
- replay: as sequential, and clients train on some rows of old tasks again (fedlora.continual.tasks.replayed).
- separate: each task on the base alone, for inference with the task known.
- joint: all tasks at once, as one (fedlora.continual.tasks.legs).
- nearest-mean: nothing is trained; class means of the frozen base's features (Mensink et al., PAMI 2013).
"""

from __future__ import annotations

from strategies.continual.way import Way

__all__ = ["WAYS"]

WAYS = (
    Way(name="sequential"),
    Way(name="incremental"),
    Way(name="replay"),
    Way(name="separate", alone=True),
    Way(name="joint"),
    Way(name="nearest-mean", trains=False),
)
