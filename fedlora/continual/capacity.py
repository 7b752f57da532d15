"""Which rows of the public bases a task may write in.

Every module has one public orthonormal basis (`[in, in]`, by seed), and every task owns a run of consecutive rows of
it, the same in every module. Rows of different tasks are orthogonal, so their updates are: `<dW_i, dW_j>_F = 0`,
whatever is trained and however it is averaged (the constraint of O-LoRA, Wang et al., EMNLP 2023 Findings, met by
construction). The number of rows is that of the narrowest module's inputs, and the tasks share it.
"""

from __future__ import annotations

from collections.abc import Sequence

from fedlora.errors import MethodError
from fedlora.state import Layout, Subspace


def left(layout: Layout, used: Sequence[Subspace]) -> int:
    """How many rows no task owns: the smallest `inp` less the end of the last run. Designed subspaces own none."""
    return min(m.inp for m in layout.modules.values()) - _end(used)


def allot(layout: Layout, used: Sequence[Subspace], dim: int, seed: int, name: str) -> Subspace:
    """The next `dim` free rows for task `name`, after those of all subspaces in `used`. Gaps are not filled.

    Raises: MethodError if `dim` is below 1 or above what is left, or if an earlier task's subspace was designed from
    inputs or has another seed: its rows are not orthogonal to these.
    """
    if dim < 1:
        raise MethodError(f"task {name}: a subspace needs at least 1 dimension, task_dim is {dim}")
    if any(s.seed is None for s in used):
        raise MethodError(
            f"task {name}: public rows are not orthogonal to an earlier task's subspace, which was designed from "
            "inputs; design this task's from inputs too"
        )
    if wrong := sorted({s.seed for s in used if s.seed is not None} - {seed}):
        raise MethodError(
            f"task {name}: rows of seed {seed} are not orthogonal to those of earlier tasks, of seed {wrong[0]}; "
            "a run has one seed for all of them"
        )
    free = left(layout, used)
    if dim > free:
        narrow = min(layout.modules, key=lambda n: layout.modules[n].inp)
        raise MethodError(
            f"task {name} needs {dim} dimensions and {max(0, free)} of {layout.modules[narrow].inp} are left, the "
            f"inputs of {narrow}; lower task_dim, remove a task, or adapt only modules with more inputs"
        )
    return Subspace(dim=dim, start=_end(used), seed=seed)


def _end(used: Sequence[Subspace]) -> int:
    return max((s.start + s.dim for s in used if s.seed is not None), default=0)
