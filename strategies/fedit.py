"""FedIT: average A and average B, as FedAvg would any parameters. The baseline, and biased.

    A <- sum_k p_k pad(A_k),    B <- sum_k p_k pad(s_k B_k),    W_eff = W0 + B A

where mean(B) mean(A) is not mean(B A).

Zhang et al., "Towards Building the Federated GPT: Federated Instruction Tuning", ICASSP 2024.

Where we differ: s_k is folded into B_k before the mean, so alphas may differ (the global pair has scale 1). At unequal
ranks the paper says nothing; a client then gets the first r_k rows and columns of a global pair of rank R (`task_rank`,
or the largest enrolled rank) and its factors are padded with zeros: that is the zero-padding baseline of HetLoRA (Cho
et al., "Heterogeneous LoRA for Federated Fine-tuning of On-Device Foundation Models", EMNLP 2024), not its full method.
Padding shrinks what only large clients hold, in A and in B, so an untrained echo at unequal ranks does change W_eff.
What travels up is the change of each factor, and the server adds it to the start that it sent. The mean is the same,
and a codec rounds the change only, not what everybody knows.

Each round reports what the rule gets wrong:
- `aggregation_error` = ||sum p_k s_k B_k A_k - B A||_F / ||sum p_k s_k B_k A_k||_F, over all modules;
- `truncated_down`    = sum p_k ||B A - B[:, :r_k] A[:r_k]||_F / ||B A||_F, lost on the way down to smaller clients.

Cost: an upload of (out + in) r_k per module. The mean needs one client in memory; its error needs the stack of all, in
float64, which is compacted without loss at rank 2 min(out, in).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from fedlora.adapter import Adapter, Factors, ProductSum, difference, norm
from fedlora.config import MethodConfig
from fedlora.state import Ask, GlobalState, Layout, Part
from strategies.base import (
    Closed,
    Cohort,
    Member,
    Method,
    Round,
    Sums,
    blocks_for_all,
    head_start,
    head_sums,
    in_order,
    largest,
    moved,
    opened,
    pair_arrays,
    pair_from,
    pair_of,
    part,
    plan_for,
    register,
    relative,
)
from strategies.blocks import as_float32
from strategies.means import at_scale, fresh_pair

NAME = "fedit"


def open_state(base: str, layout: Layout, members: Sequence[Member], settings: MethodConfig, seed: int) -> GlobalState:
    """One fresh A for all, B zero (embeddings: A zero, B normal). Raises: MethodError if nobody is enrolled."""
    rank = settings.task_rank or largest(members, NAME).rank
    return opened(base, layout, seed, pair=fresh_pair(layout, rank, seed))


def protocol(state: GlobalState, cohort: Cohort) -> Round:
    """One round: leading rows and columns out, their changes in. Raises: MethodError if nobody answers."""
    task, pair = state.open_task, pair_of(state, NAME)
    rank = max(pair.ranks.values())
    leading = {(m.rank, m.scale): _leading(pair, m) for m in cohort.members}
    answers = yield {m.id: _ask(state, cohort, m, leading[m.rank, m.scale]) for m in cohort.members}

    factors = Sums({key: x.shape for key, x in pair_arrays(pair).items()})
    products, heads = ProductSum(), head_sums(state.layout)
    lost_by_rank = {r: _lost(pair, r) for r in {min(m.rank, rank) for m in cohort.members}}
    lost = 0.0
    for member, answer in in_order(answers, cohort):
        start = pair_arrays(leading[member.rank, member.scale])
        trained = {key: x.astype(np.float64) + answer.arrays[key] for key, x in start.items()}
        scaled = pair_from(trained, member.scale).folded()
        factors.add(pair_arrays(scaled), answer.examples)
        products.add(scaled, answer.examples)
        heads.add(part(answer.arrays, "head"), answer.examples)
        lost += answer.examples * lost_by_rank[min(member.rank, rank)]

    mean = pair_from(factors.mean())
    exact = products.total().scaled(1.0 / heads.weight)
    new = as_float32(mean)
    report = {
        "update_norm": norm(difference(new, pair)),
        "rank": float(rank),
        "aggregation_error": relative(norm(difference(exact, mean)), norm(exact)),
        "truncated_down": lost / heads.weight,
    }
    task = replace(task, pair=new, extras=moved(task.extras, heads.mean()))
    return Closed(state=state.with_task(task), report=report)


def _lost(pair: Adapter, rank: int) -> float:
    """The share of the global product that a client of this rank does not get to see."""
    rest = Adapter({n: Factors(f.a[rank:], f.b[:, rank:]) for n, f in pair.items()})
    return relative(norm(rest), norm(pair))


def _leading(pair: Adapter, member: Member) -> Adapter:
    """What one client starts from: the first rows and columns, B divided by s_k so that the product has scale s_k."""
    r = member.rank
    return at_scale(Adapter({n: Factors(f.a[:r], f.b[:, :r]) for n, f in pair.items()}), member.scale)


def _ask(state: GlobalState, cohort: Cohort, member: Member, leading: Adapter) -> Ask:
    r = max(leading.ranks.values())
    both: tuple[Part, ...] = ("A", "B")
    plan = plan_for(NAME, state, cohort, member, rank=r, rows=r, scale=member.scale, train=both, changes=both)
    return Ask(plan=plan, blocks=blocks_for_all(state), arrays={**pair_arrays(leading), **head_start(state)})


METHOD = register(
    Method(
        name=NAME,
        summary="averages A and B separately (FedAvg on factors): the biased baseline, zero-padded at mixed ranks",
        open=open_state,
        protocol=protocol,
    )
)
