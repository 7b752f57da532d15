"""subspace: a task writes in the next rows of a public orthonormal basis, and nothing of them travels.

Rows of different tasks are orthogonal, so `A_t A_s^T = 0` and `<dW_t, dW_s> = 0` under every aggregation. Source: ours;
the constraint of O-LoRA (Wang et al., EMNLP 2023 Findings) met by construction (fedlora/continual/capacity.py).
"""

from __future__ import annotations

from fedlora.adapter import Array
from fedlora.continual.capacity import allot
from fedlora.state import Subspace
from fedlora.subspace import public_rows
from strategies.continual.way import Opening, Way

__all__ = ["WAY"]


def _allotted(opening: Opening) -> tuple[Subspace, dict[str, Array]]:
    state, seed = opening.state, opening.config.seed
    used = [t.subspace for t in state.tasks.values() if t.subspace is not None]
    subspace = allot(state.layout, used, opening.dim, seed, opening.leg.name)
    return subspace, {n: public_rows(subspace, n, m.inp) for n, m in state.layout.modules.items()}


WAY = Way(name="subspace", allotted=_allotted)
