"""o-lora: a new pair a task, with a penalty on the overlap of its A with every sealed A, from the second task on.

Source: Wang et al., Orthogonal Subspace Learning for Language Model Continual Learning, EMNLP 2023 Findings, eq. 7 and
8; its forms and its gradient are in fedlora/training/penalty.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from fedlora.adapter import Array
from fedlora.config import RunConfig
from fedlora.state import GlobalState, TrainPlan
from strategies.continual.way import Way

__all__ = ["WAY"]

_WEIGHT = 0.5  # that of the authors' code, as is the form


def _led(plan: TrainPlan, under: int, state: GlobalState, config: RunConfig) -> tuple[TrainPlan, Mapping[str, Array]]:
    if not under or "A" not in plan.train:
        return plan, {}
    way = config.continual
    return replace(plan, against=under, overlap=way.penalty or _WEIGHT, overlap_form=way.penalty_form or "absolute"), {}


WAY = Way(name="o-lora", led=_led)
