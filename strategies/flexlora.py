"""FlexLoRA: the mean of the products, and for each client its best approximation at the client's own rank.

    W = sum_k p_k s_k B_k A_k = U S V^T,    W_eff = W0 + W;    client k starts from A = V_r^T, B = U_r S_r / s_k

Bai et al., "Federated Fine-tuning of Large Language Models under Heterogeneous Tasks and Client Resources",
NeurIPS 2024.

Clients send the whole A and B that they ended with, and W is made anew from these in each round: what a client could
not hold is missing from its share of the mean, so at mixed ranks even an untrained echo changes W_eff. Each round
reports what is cut (W_r is the best approximation of W at rank r, r = r_k above):

- `truncated_down` = sum_k p_k ||W - W_{r_k}||_F / ||W||_F, what clients do not see of the W that the round starts from;
- `truncation_error` = ||mean of the products - W||_F for the new W, `truncation_error_relative` to that mean's norm.

Where we differ. B is divided by each client's own s_k on the way down; the authors' code has 16 / r_k for every s_k,
both ways. The mean is never formed: it is a stack of factors, brought to the form of its compact SVD. That is a
function of the mean alone, so no client's factors can be read in it.

The state holds the best approximation of the mean at rank R, the largest that was enrolled at the opening. No client
starts from more, so training is the paper's, and what is evaluated and released is what the largest client holds; at
one rank for all, an echo is silent. `max_rank` and `max_error` replace this bound, by the rules of
`strategies/blocks.py`; a `max_rank` of min(out, in) keeps the whole mean. With `max_rank` alone, a round whose stack
passes twice the bound is compacted on the way, and `truncation_error` is an upper bound.

Where W has fewer directions than r_k, in the first round none, A gets fresh rows, the same for all clients of a round,
and B zero columns (`strategies/warm.py`). Known rows of A have norm 1, fresh ones 1/sqrt(3) on average.

Embeddings are refused: a lookup of a fresh A, whose entries are of the order of 1/sqrt(in), hardly moves one while B is
zero at the start (PEFT starts embeddings the other way round, with a random B).

Cost, per module, with S the sum of a round's ranks: (out + in) r_k up and down; at the server
O((out + in) S min(S, out, in)) time and (out + in) min(S, 2 min(out, in, max_rank)) float64.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from fedlora.adapter import Adapter, Factors, ProductSum, difference, norm, padded
from fedlora.config import MethodConfig
from fedlora.errors import MethodError
from fedlora.state import Ask, GlobalState, Layout, zero_adapter
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
    pair_of,
    part,
    plan_for,
    register,
    relative,
)
from strategies.blocks import bounded_svd
from strategies.means import at_scale
from strategies.warm import warm_pair

__all__ = ["METHOD", "NAME"]

NAME = "flexlora"


def open_state(base: str, layout: Layout, members: Sequence[Member], settings: MethodConfig, seed: int) -> GlobalState:
    """The product zero, at the largest enrolled rank, which bounds the state's from then on.

    Raises: MethodError for an embedding, or if nobody is enrolled.
    """
    rank = largest(members, NAME).rank
    for name, module in layout.modules.items():
        if module.kind == "embedding":
            raise MethodError(
                f"{NAME}: {name} is an embedding, and a start from a random A and B = 0 hardly moves one. Leave "
                "embeddings out of model.target_modules, or use flora or fedit"
            )
    return opened(base, layout, seed, pair=zero_adapter(layout, rank))


def protocol(state: GlobalState, cohort: Cohort) -> Round:
    """One round: to each client its truncation, whole factors back. Raises: MethodError if nobody answers, or if
    `max_rank` cannot meet `max_error`.
    """
    task, pair = state.open_task, pair_of(state, NAME)
    whole = max((m.rank for m in cohort.members), default=0)
    start = warm_pair(pair, whole, state.layout, cohort.seed, cohort.round, row_norm=1.0)
    answers = yield {m.id: _ask(state, cohort, m, start) for m in cohort.members}

    settings = cohort.settings
    limit = settings.max_rank if settings.max_error is None else None  # what is compacted on the way meets no max_error
    products, heads = ProductSum(limit), head_sums(state.layout)
    unseen = {r: _unseen(pair, r) for r in {m.rank for m in cohort.members}}
    lost = 0.0
    for member, answer in in_order(answers, cohort):
        products.add(pair_from(answer.arrays, member.scale), answer.examples)
        heads.add(part(answer.arrays, "head"), answer.examples)
        lost += answer.examples * unseen[member.rank]

    mean = products.total().scaled(1.0 / heads.weight)
    new, left = _kept(mean, pair, settings)
    error = products.error / heads.weight + left
    report = {
        "update_norm": norm(difference(new, pair)),
        "rank": float(max(new.ranks.values())),
        "truncation_error": error,
        "truncation_error_relative": relative(error, math.hypot(norm(new), error)),
        "truncated_down": lost / heads.weight,
    }
    task = replace(task, pair=new, extras=moved(task.extras, heads.mean()))
    return Closed(state=state.with_task(task), report=report)


def _kept(mean: Adapter, old: Adapter, settings: MethodConfig) -> tuple[Adapter, float]:
    """The new state and its error: at the bounds of the settings, else at the old state's rank, filled with zeros."""
    if settings.max_rank is not None or settings.max_error is not None:
        return bounded_svd(mean, max_rank=settings.max_rank, max_error=settings.max_error)
    rank = max(old.ranks.values())
    small, left = bounded_svd(mean, max_rank=rank, max_error=None)
    return Adapter({n: padded(f, rank) for n, f in small.items()}), left


def _unseen(pair: Adapter, rank: int) -> float:
    """The share of the product that a client of this rank does not see; directions fall, so the first are the best."""
    rest = Adapter({n: Factors(f.a[rank:], f.b[:, rank:]) for n, f in pair.items()})
    return relative(norm(rest), norm(pair))


def _ask(state: GlobalState, cohort: Cohort, member: Member, start: Adapter) -> Ask:
    r = member.rank
    leading = at_scale(Adapter({n: Factors(f.a[:r], f.b[:, :r]) for n, f in start.items()}), member.scale)
    plan = plan_for(
        NAME,
        state,
        cohort,
        member,
        rank=r,
        rows=r,
        scale=member.scale,
        train=("A", "B"),
        feedback="product",
    )
    return Ask(plan=plan, blocks=blocks_for_all(state), arrays={**pair_arrays(leading), **head_start(state)})


METHOD = register(
    Method(
        name=NAME,
        summary="averages the products and gives each client its best truncation at its own rank, rescaled both ways",
        open=open_state,
        protocol=protocol,
    )
)
