"""A method that is linear in its clients' answers, folded from one: their weighted mean, as if one client had sent it.

Since such a method folds answers by weighted sums alone, the mean gives the same state as all answers together. Ranks
may differ where smaller updates are padded with zeros. What hides or noises single answers works on their sum, and
hands the method this one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from fedlora.config_secure import NESTED
from fedlora.errors import MethodError
from fedlora.state import Answer, Ask, TrainPlan
from strategies.base import Closed, Round, plan_of_largest

__all__ = ["MEANINGLESS", "closed_with", "plan_in", "ratio_of", "reference_of", "require_linear"]

MEANINGLESS: Final = ("aggregation_error", "truncation_error")  # where there is one answer


def reference_of(asks: Mapping[str, Ask]) -> tuple[str, TrainPlan]:
    """The client that stands for all, and its plan: that of the largest rank. Raises: MethodError for no plan."""
    largest = plan_of_largest(asks)
    return largest, plan_in(asks[largest])


def plan_in(ask: Ask) -> TrainPlan:
    """The plan of a training ask."""
    assert ask.plan is not None
    return ask.plan


def ratio_of(ask: Ask, reference: TrainPlan) -> float:
    """What a client's B is multiplied by to have the reference's scale."""
    return plan_in(ask).scale / reference.scale


def closed_with(method: str, inner: Round, largest: str, answer: Answer) -> Closed:
    """What the method makes of the one answer. Raises: MethodError if it then asks again."""
    try:
        inner.send({largest: answer})
    except StopIteration as end:
        closed: Closed = end.value
        return closed
    raise MethodError(f"{method}: asks its clients twice a round, which one sum does not do")


def require_linear(name: str, asks: Mapping[str, Ask]) -> None:
    """Raises: MethodError where the method's fold of these asks would be no weighted sum."""
    plans = [ask.plan for ask in asks.values() if ask.plan is not None]
    if any(plan.a_from == "fresh" for plan in plans):
        raise MethodError(f"{name}: clients would send factors on bases of their own, which add up to nothing")
    ranks = sorted({plan.rank for plan in plans})
    if name not in NESTED and len(ranks) > 1:
        raise MethodError(
            f"{name}: the sum of padded factors of ranks {ranks} is another mean than that of its answers; give all "
            f"clients one rank, or use {', '.join(NESTED)}"
        )
