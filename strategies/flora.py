"""FLoRA: stack the clients' factors, so that the sum of their products is exact at any mix of ranks and scales.

    W_eff <- W_eff + sum_k p_k s_k B_k A_k,    B_k A_k = one product of stacked factors

Wang et al., "FLoRA: Federated Fine-Tuning Large Language Models with Heterogeneous Low-Rank Adaptations", NeurIPS 2024.

Where we differ: p_k and s_k are folded into one factor (the authors' code leaves s_k out, which is wrong as soon as the
clients' alpha / rank differ). The sum of a round is a frozen block, never merged into the weights, so nothing is lost
to low precision and a client that missed rounds catches up. Each round's block is brought to the form of a compact SVD
before it enters the state: a plain stack would show every client the factors of every other (what remains visible is
their joint span). Blocks are recompressed into one when their ranks together pass `max_rank`, or, without one, the
rank min(out, in) up to which nothing is lost; the error is in each round's report.

Restarts. A client starts every round from a fresh A and B = 0, which loses momentum over many short rounds. With
`warm_start` it starts from the first r_k singular directions of the last round's update instead, and that product is
taken off again in its frozen factors: W_eff is where it was, and what counts is s_k B_k A_k minus the start. The rows
of A at the start have the norm of fresh ones, 1/sqrt(3), and B takes the rest; directions that the last update does
not have get a fresh row and a zero column. In the first round all clients share one fresh A.

Cost, per module, with S the sum of ranks in a round (a warm start adds one per rank and scale): time O((out + in) S^2),
memory (out + in) min(S, 2 min(out, in, max_rank)) float64. A warm start sends its pair twice, as start and as frozen.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from fedlora.adapter import Adapter, Factors, ProductSum, norm, stack, truncated
from fedlora.config import MethodConfig
from fedlora.rng import stream
from fedlora.state import Ask, Block, GlobalState, Layout
from strategies.base import (
    Closed,
    Cohort,
    Member,
    Method,
    Round,
    blocks_for_all,
    fresh_a,
    head_start,
    head_sums,
    in_order,
    largest,
    moved,
    opened,
    pair_arrays,
    pair_from,
    part,
    plan_for,
    register,
    relative,
)

NAME = "flora"
START_NORM = 3.0**-0.5  # of a row of a fresh A
NEGLIGIBLE = 1e-7  # singular values below this share of the largest are float32 rounding, not directions


def open_state(base: str, layout: Layout, members: Sequence[Member], settings: MethodConfig, seed: int) -> GlobalState:
    """No pair and no blocks; with a warm start, the memory holds the pair that the next round starts from."""
    rank = largest(members, NAME).rank
    if not settings.warm_start:
        return opened(base, layout, seed)
    first = Adapter({n: Factors(np.zeros((0, m.inp)), np.zeros((m.out, 0))) for n, m in layout.modules.items()})
    return opened(base, layout, seed, memory={NAME: pair_arrays(_next_start(first, rank, layout, seed, 0))})


def protocol(state: GlobalState, cohort: Cohort) -> Round:
    """One round: fresh or warm pairs out, products in, one exact block more. Raises: MethodError if nobody answers."""
    warm = NAME in state.memory
    starts = {(m.rank, m.scale): _start(state, m) for m in cohort.members} if warm else {}
    answers = yield {m.id: _ask(state, cohort, m, starts.get((m.rank, m.scale))) for m in cohort.members}

    products, heads = ProductSum(cohort.settings.max_rank), head_sums(state.layout)
    started: Counter[tuple[int, float]] = Counter()
    for member, answer in in_order(answers, cohort):
        products.add(pair_from(answer.arrays, member.scale), answer.examples)
        heads.add(part(answer.arrays, "head"), answer.examples)
        if warm:
            started[member.rank, member.scale] += answer.examples
    for key, weight in started.items():
        products.add(_as(starts[key], np.float64), -weight)
    update = products.total().scaled(1.0 / heads.weight)
    return _close(state, cohort, update, products.error / heads.weight, heads.mean())


def _close(
    state: GlobalState, cohort: Cohort, update: Adapter, error: float, head: Mapping[str, NDArray[np.float64]]
) -> Closed:
    task, version = state.open_task, state.version + 1
    own = {n: min(f.rank, *f.shape) for n, f in update.items()}  # what the update's compact form has
    ranks = {n: sum(b.adapter[n].rank for b in task.blocks) + own[n] for n in update}
    bounds = {n: _bound(f, cohort.settings.max_rank) for n, f in update.items()}
    if any(ranks[n] > bounds[n] for n in ranks):
        small, left = truncated(stack([*(b.adapter for b in task.blocks), update]), bounds)
        small = _as(small, np.float32)
        ranks, error = small.ranks, error + left
        blocks: tuple[Block, ...] = (Block(adapter=small, born=version),)
    else:
        blocks = (*task.blocks, Block(adapter=_canonical(update), born=version))
    whole = norm(stack([b.adapter for b in blocks])) if error > 0.0 else 0.0
    report = {
        "update_norm": norm(update),
        "rank": float(max(ranks.values())),
        "truncation_error": error,
        "truncation_error_relative": relative(error, math.hypot(whole, error)),
    }
    memory = dict(state.memory)
    if NAME in memory:
        rank = next(x.shape[0] for x in part(memory[NAME], "A").values())
        memory[NAME] = pair_arrays(_next_start(_canonical(update), rank, state.layout, cohort.seed, cohort.round))
    task = replace(task, blocks=blocks, extras=moved(task.extras, head))
    return Closed(state=state.with_task(task, memory=memory), report=report)


def _bound(f: Factors, max_rank: int | None) -> int:
    """The rank above which a module's blocks are recompressed; min(out, in) loses nothing."""
    return min(f.shape) if max_rank is None else min(max_rank, *f.shape)


def _canonical(update: Adapter) -> Adapter:
    """The compact SVD of every product, in float32: a function of the products alone, directions in falling order."""
    return _as(truncated(update, {n: min(f.shape) for n, f in update.items()})[0], np.float32)


def _as(adapter: Adapter, dtype: type[np.floating]) -> Adapter:
    return Adapter({n: Factors(f.a.astype(dtype), f.b.astype(dtype), f.scale) for n, f in adapter.items()})


def _ask(state: GlobalState, cohort: Cohort, member: Member, start: Adapter | None) -> Ask:
    rank = member.rank if start is None else max(start.ranks.values())
    plan = plan_for(
        NAME,
        state,
        cohort,
        member,
        rank=rank,
        rows=rank,
        scale=member.scale,
        train=("A", "B"),
        a_from="fresh" if start is None else "given",
        b_from="zero" if start is None else "given",
    )
    if start is None:
        return Ask(plan=plan, blocks=blocks_for_all(state), arrays=head_start(state))
    arrays = {**pair_arrays(start), **head_start(state)}
    return Ask(plan=plan, blocks=blocks_for_all(state), frozen=start.scaled(-1.0), arrays=arrays)


def _start(state: GlobalState, member: Member) -> Adapter:
    """The warm start of one client: the first r_k directions, B divided by s_k so that the product has scale s_k."""
    memory, r = state.memory[NAME], member.rank
    b = part(memory, "B")
    return Adapter(
        {n: Factors(a[:r], b[n][:, :r] / np.float32(member.scale), member.scale) for n, a in part(memory, "A").items()}
    )


def _next_start(update: Adapter, rank: int, layout: Layout, seed: int, round_: int) -> Adapter:
    """The first `rank` directions of a canonical update, scale 1, completed by fresh rows and zero columns."""
    pairs: dict[str, Factors] = {}
    for name, f in update.items():
        module = layout.modules[name]
        a = fresh_a(rank, module, stream(seed, "flora-start", round_, name))
        b = np.zeros((module.out, rank), np.float32)
        rows = np.linalg.norm(f.a[:rank], axis=1)  # roots of the singular values, falling
        known = int(np.sum(rows**2 > NEGLIGIBLE * np.max(rows**2, initial=0.0)))
        grow = (START_NORM / rows[:known]).astype(np.float32)
        a[:known] = f.a[:known] * grow[:, None]
        b[:, :known] = f.b[:, :known] / grow
        pairs[name] = Factors(a, b)
    return Adapter(pairs)


METHOD = register(
    Method(
        name=NAME,
        summary="stacks the clients' factors: the exact mean of their updates at any ranks and scales",
        open=open_state,
        protocol=protocol,
    )
)
