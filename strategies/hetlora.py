"""HetLoRA: zero-padded means of factors, weighed by the size of each update, and clients that prune their own rank.

    A <- sum_k w_k pad(A_k),    B <- sum_k w_k pad(s_k B_k),    w_k = ||s_k B_k A_k||_F / sum_j ||s_j B_j A_j||_F

with norms over all modules together, and W_eff = W0 + B A. A client starts from the first r_k rows of A and columns of
B, and trains with the loss F_k + `prune_penalty` * sum over modules of ||B_k[:, tail]||_F ||A_k[tail]||_F. The tail is
what lies beyond `prune` of its rank, at least one row while there are two. Where that sum is smaller after the round
than at its start, the client gives its tail up: from then on it gets, trains and sends r_k - tail rows.

Cho et al., "Heterogeneous LoRA for Federated Fine-tuning of On-Device Foundation Models", EMNLP 2024: truncation,
sparsity-weighted aggregation, rank self-pruning.

Where we differ: s_k is folded into B_k before the mean and its norm, so alphas may differ (the global pair has scale
1). The weights are one per client, from all its modules. Numbers of examples do not count for A and B; a head, which
the paper does not have, moves by the example-weighted mean of its changes, as in every method. If every product is zero
there are no weights, and the pair stays as it was. The server decides who prunes, from the start that it sent and the
answer: it comes to the same, and a client needs no memory. The answer of that round still counts whole. A tail that
starts at zero, as all do in the first round, cannot shrink and is never pruned. At `prune` = 0.99 a client of less than
100 rows gives up one row at a time. The authors published no code. What travels up is the change of each factor.

Each round reports `pruned`, how many clients gave a tail up in it, and what the rule gets wrong:
- `aggregation_error` = ||sum w_k s_k B_k A_k - B A||_F / ||sum w_k s_k B_k A_k||_F, over all modules;
- `truncated_down`    = sum p_k ||B A - B[:, :r_k] A[:r_k]||_F / ||B A||_F, p_k by examples as in fedit;
and for each client its `rank` in this round and its `weight` w_k.

Padding shrinks what only large clients hold, in A and in B, so an untrained echo at unequal ranks changes W_eff.

Cost: as fedit, and a QR of every client's factors for its norm: O((out + in) r_k^2) per module.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from fedlora.adapter import Adapter, Array, Factors, ProductSum, difference, norm
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

__all__ = ["METHOD", "NAME", "PRUNE", "PRUNE_PENALTY", "open_state", "protocol", "tail_of"]

NAME = "hetlora"
PRUNE, PRUNE_PENALTY = 0.99, 5e-3  # where the settings say nothing


def open_state(base: str, layout: Layout, members: Sequence[Member], settings: MethodConfig, seed: int) -> GlobalState:
    """One fresh A for all, B zero (embeddings: A zero, B normal). Raises: MethodError if nobody is enrolled.

    The memory of this method holds the rank `[1]` of every client that has pruned itself, by its id.
    """
    rank = settings.task_rank or largest(members, NAME).rank
    return opened(base, layout, seed, pair=fresh_pair(layout, rank, seed), memory={NAME: {}})


def protocol(state: GlobalState, cohort: Cohort) -> Round:
    """One round: leading rows and columns out, their changes in. Raises: MethodError if nobody answers."""
    task, pair = state.open_task, pair_of(state, NAME)
    pruned = dict(state.memory.get(NAME, {}))
    ranks = {m.id: _rank(m, pair, pruned) for m in cohort.members}
    leading = {
        (r, s): at_scale(_first(pair, r), s) for r, s in sorted({(ranks[m.id], m.scale) for m in cohort.members})
    }
    asks = {m.id: _ask(state, cohort, m, leading[ranks[m.id], m.scale]) for m in cohort.members}
    answers = yield asks

    factors = Sums({key: x.shape for key, x in pair_arrays(pair).items()})
    products, heads = ProductSum(), head_sums(state.layout)
    lost_by_rank = {r: _lost(pair, r) for r in sorted(set(ranks.values()))}
    lost, sizes, gave_up = 0.0, {}, 0
    for member, answer in in_order(answers, cohort):
        rank = ranks[member.id]
        start = leading[rank, member.scale]
        changed = {key: x.astype(np.float64) + answer.arrays[key] for key, x in pair_arrays(start).items()}
        trained = pair_from(changed, member.scale)
        scaled = trained.folded()
        sizes[member.id] = norm(scaled)
        factors.add(pair_arrays(scaled), sizes[member.id])
        products.add(scaled, sizes[member.id])
        heads.add(part(answer.arrays, "head"), answer.examples)
        lost += answer.examples * lost_by_rank[rank]
        tail = tail_of(rank, cohort.settings)
        if tail and _tail_size(trained, tail) < _tail_size(start, tail):
            pruned[member.id] = np.array([rank - tail], np.float32)
            gave_up += 1

    report = {"rank": float(max(pair.ranks.values())), "truncated_down": lost / heads.weight, "pruned": float(gave_up)}
    new, error = pair, 0.0
    if factors.weight > 0.0:
        mean = pair_from(factors.mean())
        exact = products.total().scaled(1.0 / factors.weight)
        new, error = as_float32(mean), relative(norm(difference(exact, mean)), norm(exact))
    report |= {"update_norm": norm(difference(new, pair)), "aggregation_error": error}
    task = replace(task, pair=new, extras=moved(task.extras, heads.mean()))
    return Closed(
        state=state.with_task(task, memory={**state.memory, NAME: pruned}),
        report=report,
        clients={c: {"rank": float(ranks[c]), "weight": relative(x, factors.weight)} for c, x in sizes.items()},
    )


def tail_of(rank: int, settings: MethodConfig) -> int:
    """How many of a client's `rank` rows it may give up at the end of a round: all beyond `prune` of them, at least one
    while two are left; none at `prune` = 1."""
    share = PRUNE if settings.prune is None else settings.prune
    if share >= 1.0 or rank < 2:
        return 0
    return rank - min(rank - 1, max(1, math.floor(share * rank + 1e-9)))


def _rank(member: Member, pair: Adapter, pruned: Mapping[str, Array]) -> int:
    """The rank at which this client is asked: its own, at most the global pair's, and what it pruned itself to."""
    most = min(member.rank, *pair.ranks.values())
    return min(most, int(pruned[member.id][0])) if member.id in pruned else most


def _first(pair: Adapter, rank: int) -> Adapter:
    return Adapter({n: Factors(f.a[:rank], f.b[:, :rank]) for n, f in pair.items()})


def _lost(pair: Adapter, rank: int) -> float:
    """The share of the global product that a client of this rank does not get to see."""
    rest = Adapter({n: Factors(f.a[rank:], f.b[:, rank:]) for n, f in pair.items()})
    return relative(norm(rest), norm(pair))


def _tail_size(pair: Adapter, tail: int) -> float:
    """What the penalty presses: the sum over modules of ||B[:, tail]||_F ||A[tail]||_F."""
    ends = ((f.a[f.rank - tail :], f.b[:, f.rank - tail :]) for f in pair.values())
    return sum(float(np.linalg.norm(a.astype(np.float64)) * np.linalg.norm(b.astype(np.float64))) for a, b in ends)


def _ask(state: GlobalState, cohort: Cohort, member: Member, leading: Adapter) -> Ask:
    rank = max(leading.ranks.values())
    tail = tail_of(rank, cohort.settings)
    penalty = PRUNE_PENALTY if cohort.settings.prune_penalty is None else cohort.settings.prune_penalty
    train: tuple[Part, ...] = ("A", "B")
    plan = plan_for(NAME, state, cohort, member, rank=rank, rows=rank, scale=member.scale, train=train, changes=train)
    plan = replace(plan, tail=tail, tail_penalty=penalty if tail else 0.0)
    return Ask(plan=plan, blocks=blocks_for_all(state), arrays={**pair_arrays(leading), **head_start(state)})


METHOD = register(
    Method(
        name=NAME,
        summary="zero-padded means weighed by each update's norm, and clients that prune their own rank",
        open=open_state,
        protocol=protocol,
    )
)
