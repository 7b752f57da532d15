"""FedEx-LoRA: average A and average B, and keep what that gets wrong as a frozen residual.

    A' = A + sum_k p_k dA_k,    B' = B + sum_k p_k dB_k,    W_eff = W0 + residuals of all rounds + B' A'

    residual of a round = sum_k p_k B_k A_k - B' A' = sum_k p_k dB_k dA_k - (sum_k p_k dB_k)(sum_k p_k dA_k)

with B_k A_k the whole product that client k ended with, s_k folded into B_k and dB_k, and changes padded with zeros.
Clients keep training a pair that has learnt something, as in FedIT, and W_eff is the exact mean, as in FLoRA.

Singhal et al., "FedEx-LoRA: Exact Aggregation for Federated and Efficient Fine-Tuning of Large Language Models",
ACL 2025.

Where we differ. The weights are p_k; the paper and its code know 1 / K only. The residual is formed from the changes
(the second form above: A and B cancel, see `strategies/means.py`), so it costs no cancellation and has a rank of at
most the sum of the ranks minus the smallest; the authors take the difference of the whole products. It is kept as a
factored block and never merged into the weights; their code adds a dense matrix to W0, transposed, which is right for
Conv1D weights and wrong for linear ones. Blocks are recompressed by the rules of `strategies/blocks.py`, without loss
unless `max_rank` or `max_error` is set; these bound the blocks, to whose rank that of the pair is added.

Mixed ranks and scales, which the paper does not treat, stay exact: the global pair has R rows (`task_rank`, or the
largest enrolled rank) and scale 1; a client loads all of them, B divided by s_k, trains the first r_k and leaves the
rest frozen. Rows that only large clients train move by those clients' share of the weight, and an untrained echo
changes nothing.

Each round reports `aggregation_error`, what the mean pair alone would have got wrong, as `fedit` does; here it is not
lost, it goes into the block. `rank` is that of the blocks and the pair together.

Cost: an upload of (out + in) r_k per module, a download of (out + in) (R + the blocks' rank). Memory at the server does
not grow with the clients; with `max_rank` the running sum is kept at rank max_rank + R, at which its best truncation
loses no more than that of the residual to `max_rank`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from fedlora.adapter import Adapter, difference, norm, stack, truncate
from fedlora.config import MethodConfig
from fedlora.state import GlobalState, Layout
from strategies.base import Closed, Cohort, Member, Method, Round, largest, moved, opened, pair_of, register, relative
from strategies.blocks import as_float32, grown
from strategies.means import ask_all, fresh_pair, mean_of

NAME = "fedex-lora"


def open_state(base: str, layout: Layout, members: Sequence[Member], settings: MethodConfig, seed: int) -> GlobalState:
    """The start of `fedit`: one fresh A for all, B zero, no blocks. Raises: MethodError if nobody is enrolled."""
    rank = settings.task_rank or largest(members, NAME).rank
    return opened(base, layout, seed, pair=fresh_pair(layout, rank, seed))


def protocol(state: GlobalState, cohort: Cohort) -> Round:
    """One round: the pair out, changes in, the mean pair and one exact block more.

    Raises: MethodError if nobody answers, or if `max_rank` cannot meet `max_error`.
    """
    pair, settings = pair_of(state, NAME), cohort.settings
    rows = max(pair.ranks.values())
    answers = yield ask_all(NAME, state, cohort, pair)

    bounded = settings.max_rank is not None and settings.max_error is None  # else the error must be known
    limit = (settings.max_rank or 0) + rows if bounded else None
    mean = mean_of(pair, answers, cohort, state.layout, limit=limit)
    residual = mean.residual if limit is not None else _without_noise(mean.residual, mean.residual_rank)
    blocks, report = grown(state, residual, settings, lost=mean.lost)
    new = as_float32(mean.pair)
    error = report["truncation_error"]
    report |= {
        "update_norm": norm(stack([difference(mean.pair, pair), residual])),
        "rank": report["rank"] + rows,
        "aggregation_error": mean.error(),
    }
    if error > 0.0:
        whole = norm(stack([new, *(b.adapter for b in blocks)]))
        report["truncation_error_relative"] = relative(error, math.hypot(whole, error))
    task = replace(state.open_task, pair=new, blocks=blocks, extras=moved(state.open_task.extras, mean.head))
    return Closed(state=state.with_task(task), report=report)


def _without_noise(residual: Adapter, rank: int) -> Adapter:
    """The same products without the directions past `rank`, which are zero but for float64 rounding."""
    return Adapter({n: truncate(f, rank)[0] if rank < min(f.rank, *f.shape) else f for n, f in residual.items()})


METHOD = register(
    Method(
        name=NAME,
        summary="averages A and B and keeps the exact residual as a frozen block: exact at any ranks and scales",
        open=open_state,
        protocol=protocol,
    )
)
