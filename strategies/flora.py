"""FLoRA: stack the clients' factors, so that the sum of their products is exact at any mix of ranks and scales.

    W_eff <- W_eff + sum_k p_k s_k B_k A_k,    B_k A_k = one product of stacked factors

Wang et al., "FLoRA: Federated Fine-Tuning Large Language Models with Heterogeneous Low-Rank Adaptations", NeurIPS 2024.

Where we differ: p_k and s_k are folded into one factor (the authors' code leaves s_k out, which is wrong as soon as the
clients' alpha / rank differ). The sum of a round is a frozen block, never merged into the weights, so nothing is lost
to low precision and a client that missed rounds catches up. Each round's block is brought to the form of a compact SVD
before it enters the state: a plain stack would show every client the factors of every other (what remains visible is
their joint span). Blocks are recompressed by the rules of `strategies/blocks.py`, without loss unless `max_rank` or
`max_error` is set; the error is in each round's report.

Restarts. A client starts every round from a fresh A and B = 0, which loses momentum over many short rounds. With
`warm_start` it starts from the first r_k singular directions of the last round's update instead, and that product is
taken off again in its frozen factors: W_eff is where it was, and what counts is s_k B_k A_k minus the start. The rows
of A at the start have the norm of fresh ones, 1/sqrt(3), and B takes the rest; directions that the last update does
not have get a fresh row and a zero column. In the first round all clients share one fresh A.

Cost, per module, with S the sum of ranks in a round (a warm start adds one per rank and scale): time O((out + in) S^2),
memory (out + in) min(S, 2 min(out, in, max_rank)) float64. A warm start sends its pair twice, as start and as frozen.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from fedlora.adapter import Adapter, Factors, ProductSum
from fedlora.config import MethodConfig
from fedlora.state import Ask, GlobalState, Layout
from strategies.base import (
    Closed,
    Cohort,
    Member,
    Method,
    Round,
    blocks_for_all,
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
)
from strategies.blocks import canonical, grown
from strategies.warm import empty, warm_pair

NAME = "flora"


def open_state(base: str, layout: Layout, members: Sequence[Member], settings: MethodConfig, seed: int) -> GlobalState:
    """No pair and no blocks; with a warm start, the memory holds the pair that the next round starts from."""
    rank = largest(members, NAME).rank
    if not settings.warm_start:
        return opened(base, layout, seed)
    return opened(base, layout, seed, memory={NAME: pair_arrays(warm_pair(empty(layout), rank, layout, seed, 0))})


def protocol(state: GlobalState, cohort: Cohort) -> Round:
    """One round: fresh or warm pairs out, products in, one exact block more. Raises: MethodError if nobody answers."""
    warm = NAME in state.memory
    starts = {(m.rank, m.scale): _start(state, m) for m in cohort.members} if warm else {}
    answers = yield {m.id: _ask(state, cohort, m, starts.get((m.rank, m.scale))) for m in cohort.members}

    limit = cohort.settings.max_rank if cohort.settings.max_error is None else None  # else the error must be known
    products, heads = ProductSum(limit), head_sums(state.layout)
    started: Counter[tuple[int, float]] = Counter()
    for member, answer in in_order(answers, cohort):
        products.add(pair_from(answer.arrays, member.scale), answer.examples)
        heads.add(part(answer.arrays, "head"), answer.examples)
        if warm:
            started[member.rank, member.scale] += answer.examples
    for key, weight in started.items():
        products.add(pair_from(pair_arrays(starts[key]), key[1]), -weight)
    update = products.total().scaled(1.0 / heads.weight)
    return _close(state, cohort, update, products.error / heads.weight, heads.mean())


def _close(
    state: GlobalState, cohort: Cohort, update: Adapter, error: float, head: Mapping[str, NDArray[np.float64]]
) -> Closed:
    blocks, report = grown(state, update, cohort.settings, lost=error)
    memory = dict(state.memory)
    if NAME in memory:
        rank = next(x.shape[0] for x in part(memory[NAME], "A").values())
        memory[NAME] = pair_arrays(warm_pair(canonical(update), rank, state.layout, cohort.seed, cohort.round))
    task = replace(state.open_task, blocks=blocks, extras=moved(state.open_task.extras, head))
    return Closed(state=state.with_task(task, memory=memory), report=report)


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
        feedback="product",
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


METHOD = register(
    Method(
        name=NAME,
        summary="stacks the clients' factors: the exact mean of their updates at any ranks and scales",
        open=open_state,
        protocol=protocol,
    )
)
