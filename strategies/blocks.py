"""The blocks of a task: one for every round, recompressed so that they stay bounded.

A round's update enters the state as one frozen block in the form of its compact SVD: a function of the product alone,
so that nobody can read one client's factors out of it (what remains visible is the mean update and its span). A client
that has last round's weights needs that block only. When the ranks of all blocks pass twice what a module can hold,
min(out, in), they are brought into one, which loses nothing; with `max_rank` or `max_error` they are one block at all
times, truncated by the singular values of the whole.

Source: compact SVD of a factored product (QR of each factor, SVD of the small core); Eckart and Young, 1936.
Cost, per module, with S the ranks to be recompressed: O((out + in) S^2) time, 2 (out + in) min(S, 2 min(out, in))
float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from fedlora.adapter import Adapter, Factors, norm, stack, truncated
from fedlora.config import MethodConfig
from fedlora.errors import MethodError
from fedlora.state import Block, GlobalState
from strategies.base import relative

__all__ = ["Stepped", "as_float32", "bounded_svd", "canonical", "cut_by_error", "grown"]


@dataclass(frozen=True, kw_only=True)
class Stepped(GlobalState):
    """A state to which `grown` adds not a round's update but what `step` makes of it: the hook of a server optimiser.

    `step(update, lost)` takes the update and the Frobenius error that it carries, and gives both as they are to be
    added. What a method reports or remembers of its own update stays its own.
    """

    step: Callable[[Adapter, float], tuple[Adapter, float]]


def grown(
    state: GlobalState, update: Adapter, settings: MethodConfig, *, lost: float = 0.0
) -> tuple[tuple[Block, ...], dict[str, float]]:
    """The open task's blocks after `update` was added to its product, and what to report about them.

    `lost` is the Frobenius error that `update` carries already; it is added to the round's `truncation_error`. To a
    `Stepped` state its step is added instead; `update_norm` stays that of `update`.
    Raises: MethodError if `max_rank` cannot meet `max_error`.
    """
    update_norm = norm(update)
    if isinstance(state, Stepped):
        update, lost = state.step(update, lost)
    blocks, version = state.open_task.blocks, state.version + 1
    shapes = {n: min(f.shape) for n, f in update.items()}
    bounded = settings.max_rank is not None or settings.max_error is not None
    total = {n: sum(b.adapter[n].rank for b in blocks) + min(f.rank, shapes[n]) for n, f in update.items()}
    error = lost
    if bounded:
        summed = stack([*(b.adapter for b in blocks), update])
        whole, left = bounded_svd(summed, max_rank=settings.max_rank, max_error=settings.max_error)
        blocks, error = (Block(adapter=whole, born=version),), error + left
    elif any(total[n] > 2 * shapes[n] for n in total):
        blocks = (Block(adapter=canonical(stack([*(b.adapter for b in blocks), update])), born=version),)
    else:
        blocks = (*blocks, Block(adapter=canonical(update), born=version, since=state.version))
    ranks = [sum(b.adapter[n].rank for b in blocks) for n in update]
    size = norm(stack([b.adapter for b in blocks])) if error > 0.0 else 0.0
    return blocks, {
        "update_norm": update_norm,
        "rank": float(max(ranks)),
        "truncation_error": error,
        "truncation_error_relative": relative(error, math.hypot(size, error)),
    }


def canonical(update: Adapter) -> Adapter:
    """The compact SVD of every product, in float32: a function of the products alone, directions in falling order."""
    return as_float32(truncated(update, {n: min(f.shape) for n, f in update.items()})[0])


def as_float32(adapter: Adapter) -> Adapter:
    """The same factors in float32."""
    return Adapter({n: Factors(f.a.astype(np.float32), f.b.astype(np.float32), f.scale) for n, f in adapter.items()})


def bounded_svd(whole: Adapter, *, max_rank: int | None, max_error: float | None) -> tuple[Adapter, float]:
    """The compact SVD of every product at the bounds of the settings, in float32, and the Frobenius error of the cut.

    `max_rank` bounds the rank in every module, `max_error` is that of `cut_by_error`; without either nothing is cut.
    Raises: MethodError if `max_rank` cannot meet `max_error`.
    """
    most = {n: min([*f.shape, max_rank or max(f.shape)]) for n, f in whole.items()}
    if max_error is None:
        small, left = truncated(whole, most)
        return as_float32(small), left
    exact = truncated(whole, {n: min(f.shape) for n, f in whole.items()})[0]
    small, left = cut_by_error(exact, max_error)
    over = {n: f.rank for n, f in small.items() if f.rank > most[n]}
    if over:
        name = max(over, key=lambda n: over[n])
        raise MethodError(
            f"method.max_error = {max_error:g} needs rank {over[name]} in {name}, and method.max_rank allows "
            f"{max_rank}: raise the one or the other, or leave one of them out"
        )
    return as_float32(small), left


def cut_by_error(svd: Adapter, share: float) -> tuple[Adapter, float]:
    """The fewest directions, over all modules together, that leave an error of at most `share` of the whole norm.

    `svd` is in the form that `truncate` returns: directions in falling order, singular values split evenly, so that
    the square of a column's norm is its singular value. Returns the cut adapter and its Frobenius error.
    """
    sigma = {n: np.sum(f.b.astype(np.float64) ** 2, axis=0) * abs(f.scale) for n, f in svd.items()}
    every = np.concatenate([np.zeros(0), *sigma.values()])
    order = np.sort(every) ** 2
    budget = share**2 * float(np.sum(order))
    dropped = int(np.searchsorted(np.cumsum(order), budget, side="right"))
    edge = math.sqrt(order[dropped]) if dropped < len(order) else math.inf
    keep: Mapping[str, int] = {n: int(np.sum(s >= edge)) for n, s in sigma.items()}
    left = math.sqrt(sum(float(np.sum(s[keep[n] :] ** 2)) for n, s in sigma.items()))
    return Adapter({n: Factors(f.a[: keep[n]], f.b[:, : keep[n]], f.scale) for n, f in svd.items()}), left
