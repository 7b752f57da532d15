"""input-aware: a task writes where its own inputs are large and old tasks' inputs are small.

N_t is designed (fedlora/continual/design.py) from sums of sketches that clients give once when a task opens and once
when it is sealed; it is orthogonal to the rows of every task before it. Source: ours, after InfLoRA (Liang and Li, CVPR
2024), GPM (Saha et al., ICLR 2021) and FOT (Bakman et al., ICLR 2024).
"""

from __future__ import annotations

import numpy as np

from fedlora.adapter import Array
from fedlora.continual.design import design, span
from fedlora.state import Subspace
from strategies.continual.moments import old_inputs
from strategies.continual.way import Opening, Way

__all__ = ["WAY"]


def _allotted(opening: Opening) -> tuple[Subspace, dict[str, Array]]:
    config, state, dim = opening.config, opening.state, opening.dim
    before = old_inputs(state, config)
    made: dict[str, Array] = {}
    for name, moment in opening.inputs.items():
        own = [t.basis[name] for t in state.tasks.values() if name in t.basis]
        made[name] = design(
            dim,
            moment,
            before.get(name),
            span(np.concatenate([np.zeros((0, len(moment[0]))), *own]), 1e-7),
            floor=config.continual.floor,
            seed=config.seed,
            name=f"task {opening.leg.name}, {name}",
        )
    return Subspace(dim=dim), {n: made[m.shares or n] for n, m in state.layout.modules.items()}


WAY = Way(name="input-aware", sketches=True, allotted=_allotted)
