"""What is evaluated and how it adds up; and the server's own score, if it has test rows and holds the base."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from fedlora.state import Ask, Block, GlobalState, PublicPair, keyed
from fedlora.wire import blocks_id
from strategies.ffa_lora import checksum

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

        blocks = _blocks(state)
        pair = state.open_task.pair
        if pair is not None:
            blocks += (Block(adapter=pair.folded(), born=state.version),)
        attach(self._base, blocks, blocks_id(blocks), None, state.open_task.extras)
        return score(self._base, self._rows, batch_size=self._batch_size)


def evaluation_ask(state: GlobalState) -> Ask:
    """The whole of W_eff, and the head: what every client evaluates. A public A stays at home."""
    task, blocks, head = state.open_task, _blocks(state), keyed("head", state.open_task.extras)
    if task.pair is None:
        return Ask(blocks=blocks, arrays=head)
    if task.public_seed is None:
        return Ask(blocks=blocks, frozen=task.pair, arrays=head)
    probes = {n: checksum(f, n, task.public_seed) for n, f in task.pair.items()}
    arrays = keyed("B", {n: f.b for n, f in task.pair.items()}) | keyed("probe", probes) | head
    first = next(iter(task.pair.values()))
    public = PublicPair(seed=task.public_seed, rows=first.rank, scale=first.scale)
    return Ask(blocks=blocks, public=public, arrays=arrays)


def _blocks(state: GlobalState) -> tuple[Block, ...]:
    return tuple(b for t in state.tasks.values() for b in t.blocks)


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
