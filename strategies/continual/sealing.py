"""A task's pair as blocks when it is sealed, and how much of it overlaps with the tasks before it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from fedlora.adapter import Adapter, norm, stack
from fedlora.continual.overlap import product_overlap, random_overlap, row_overlap, row_spaces, similarities
from fedlora.state import Block, Task
from strategies.blocks import as_float32, bounded_svd, canonical

__all__ = ["cut", "overlaps"]


def cut(task: Task, rank: int | None, version: int) -> tuple[Task, float]:
    """The task's products as blocks at the least rank that loses nothing, or at `rank`; and the share that was lost."""
    if task.pair is not None and not task.blocks and rank is None:
        return replace(task, pair=None, blocks=(Block(adapter=as_float32(task.pair.folded()), born=version),)), 0.0
    terms = [b.adapter for b in task.blocks] + ([] if task.pair is None else [task.pair])
    whole = stack(terms)
    if rank is None:
        return replace(task, pair=None, blocks=(Block(adapter=canonical(whole), born=version),)), 0.0
    small, lost = bounded_svd(whole, max_rank=rank, max_error=None)
    size = norm(whole)
    return replace(task, pair=None, blocks=(Block(adapter=small, born=version),)), lost / size if size else 0.0


def overlaps(task: Task, before: Sequence[Task]) -> dict[str, float]:
    """Normalised overlap of the sealed task with all before it, of A and of the product, beside random rows.

    And with each: `overlap/TASK` of A, `||A P_TASK||_F / ||A||_F`, and `similarity/TASK` of the product (phi); all are
    means over modules from 0 to 1, 0 for a task without blocks. Empty for the first. Source: fedlora/continual/overlap.
    """
    old = [b.adapter for t in before for b in t.full.blocks]
    if not old:
        return {}
    new = stack([b.adapter for b in task.full.blocks])
    rows = row_overlap(new, old)
    spaces = row_spaces(old)
    return {
        "overlap": float(np.mean(list(rows.values()))),
        "overlap_largest": float(max(rows.values())),
        "overlap_product": float(np.mean(list(product_overlap(new, old).values()))),
        "overlap_random": float(np.mean([random_overlap(*spaces[n].shape) for n in new])),
        **{f"overlap/{t.name}": _shared(new, t) for t in before},
        **{f"similarity/{t.name}": phi for t, phi in zip(before, _similar(new, before), strict=True)},
    }


def _shared(new: Adapter, old: Task) -> float:
    """The share of a new task's A in the rows of one earlier task's, mean over modules; 0 to 1."""
    return float(np.mean(list(row_overlap(new, [b.adapter for b in old.full.blocks]).values())))


def _similar(new: Adapter, before: Sequence[Task]) -> list[float]:
    """The subspace similarity phi of a new task's product and that of each task before it; 0 to 1."""
    named = {t.name: stack([b.adapter for b in t.full.blocks]) for t in before if t.full.blocks}
    matrix = similarities({"": new, **named})[0]
    return [float(matrix[1 + list(named).index(t.name)]) if t.name in named else 0.0 for t in before]
