"""What is evaluated and how it adds up; and the server's own score, if it has test rows and holds the base."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from fedlora.state import Ask, Block, GlobalState, keyed, part
from fedlora.wire import blocks_id

if TYPE_CHECKING:
    from fedlora.base import Base
    from fedlora.data.rows import TokenRow


class Evaluator(Protocol):
    """What the server can measure by itself, if it was given data and has the base."""

    def __call__(self, state: GlobalState) -> Mapping[str, float]: ...


class TestRows:
    """Scores a state on rows that belong to the server: sums as `fedlora.evaluation.score.score` gives them."""

    __test__ = False  # not a pytest class

    def __init__(self, base: Base, rows: Sequence[TokenRow], *, batch_size: int) -> None:
        self._base = base
        self._rows = rows
        self._batch_size = batch_size

    def __call__(self, state: GlobalState) -> Mapping[str, float]:
        from fedlora.evaluation.score import score  # torch, which a server that only aggregates may lack
        from fedlora.training.attach import attach

        ask = evaluation_ask(state)
        attach(self._base, ask.blocks, blocks_id(ask.blocks), None, part(ask.arrays, "head"))
        return score(self._base, self._rows, batch_size=self._batch_size)


def evaluation_ask(state: GlobalState) -> Ask:
    """The whole of W_eff as blocks, and the head: what every client evaluates."""
    task = state.open_task
    blocks = tuple(b for t in state.tasks.values() for b in t.blocks)
    if task.pair is not None:
        blocks += (Block(adapter=task.pair.folded(), born=state.version),)
    return Ask(blocks=blocks, arrays=keyed("head", task.extras))


def summary(sums: Mapping[str, float], *, groups: bool = True) -> dict[str, Any]:
    """Score and mean loss from the sums that `fedlora.evaluation.score` returns; groups sorted by name."""
    counted, tokens = sums.get("counted", 0.0), sums.get("tokens", 0.0)
    result: dict[str, Any] = {"counted": counted}
    if counted:
        result["score"] = sums["correct"] / counted
    if tokens:
        result["loss"] = sums["loss"] / tokens
    if groups:
        names = sorted(k.split("/", 1)[1] for k in sums if k.startswith("counted/"))
        result["groups"] = {g: {"correct": sums[f"correct/{g}"], "counted": sums[f"counted/{g}"]} for g in names}
    return result
