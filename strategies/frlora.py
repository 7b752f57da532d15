"""FRLoRA: every round starts from a common pair that is not the trained one; the weights take what the mean pair adds.

    A' = A0 + sum_k p_k pad(dA_k),    B' = B0 + sum_k p_k s_k pad(dB_k)
    W_eff <- W_eff + B' A' - B0 A0,   kept as a frozen block;    the next round starts from another (A0, B0)

Yan et al., "Federated Residual Low-Rank Adaption of Large Language Models", ICLR 2025.

A round adds an increment of rank up to 2 R, so the sum over many rounds is not bound to rank R. (With our start that
begins with round 3: round 2 starts from all that round 1 added.)

Where we differ. The paper restarts from the principal singular vectors of W0 (as PiSSA does), the same in each round.
W0 is at the clients, and this server does not hold it. Ours starts from the leading R directions of the last round's
increment (`strategies/warm.py`), in the first round from one fresh A and B = 0: it knows where training went, and
nothing of W0. As in the paper the start is taken off again, here in each client's frozen factors, so that W_eff at the
start is the state's. Rows of A start at the norm of fresh ones, 1/sqrt(3), and B takes the rest; directions that the
increment lacks get a fresh row and a zero column. The start is a function of the aggregate alone. The weights are p_k;
the authors' code counts every client once.

Scales and ranks. The start has scale 1 at the server; a client gets B0 / s_k and its scale s_k, and s_k is folded into
dB_k before the mean, so alphas may differ. The pair has R rows (`task_rank`, or the largest enrolled rank); a client
gets, trains and takes off the first min(r_k, R) of them. (The others would be frozen on both sides and cancel.) Changes
are divided by the weight of all who answered, so an untrained echo changes nothing, and directions that only large
clients train move more slowly.

The mean of the factors is the paper's, and biased. With dW_k what client k added to its W_eff, each round reports

    aggregation_error = ||sum_k p_k dW_k - (B' A' - B0 A0)||_F / ||sum_k p_k dW_k||_F,    over all modules;

the numerator is the covariance of the changes (`strategies/means.py`). Nothing large is subtracted: the increment is
formed as B0 (A' - A0) + (B' - B0) A', in float64.

Blocks follow the rules of `strategies/blocks.py`: lossless unless `max_rank` or `max_error` is set; `update_norm`,
`rank`, `truncation_error` and `truncation_error_relative` are theirs.

Embeddings are refused: the start has a random A and B = 0, and a lookup of such an A, whose entries are of the order of
1/sqrt(in), hardly moves an embedding (PEFT starts them the other way round).

Cost, per module: an upload of (out + in) r_k; a download of the pair twice, 2 (out + in) r_k, and of the blocks that
the client does not hold. Server, with S the sum of a round's ranks: O((out + in) (S min(S, out, in) + R^2)) time and
(out + in) min(S, 2 min(out, in)) float64, both for the reported error.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from fedlora.adapter import Adapter, Factors, norm, stack
from fedlora.config import MethodConfig
from fedlora.errors import MethodError
from fedlora.state import Ask, GlobalState, Layout
from strategies.base import (
    Closed,
    Cohort,
    Member,
    Method,
    Round,
    blocks_for_all,
    head_start,
    largest,
    moved,
    opened,
    pair_arrays,
    part,
    plan_for,
    register,
    relative,
)
from strategies.blocks import canonical, grown
from strategies.means import at_scale, mean_of
from strategies.warm import empty, warm_pair

__all__ = ["METHOD", "NAME"]

NAME = "frlora"


def open_state(base: str, layout: Layout, members: Sequence[Member], settings: MethodConfig, seed: int) -> GlobalState:
    """No pair and no blocks; the memory holds the start, a fresh A and B = 0. Raises: MethodError for an embedding, or
    if nobody is enrolled.
    """
    rank = settings.task_rank or largest(members, NAME).rank
    for name, module in layout.modules.items():
        if module.kind == "embedding":
            raise MethodError(
                f"{NAME}: {name} is an embedding, and a start from a random A and B = 0 hardly moves one. Leave "
                "embeddings out of model.target_modules, or use flora or fedit"
            )
    start = warm_pair(empty(layout), rank, layout, seed, 0)
    return opened(base, layout, seed, memory={NAME: pair_arrays(start)})


def protocol(state: GlobalState, cohort: Cohort) -> Round:
    """One round: the common start out, changes in, their increment as one frozen block more.

    Raises: MethodError if nobody answers, if `max_rank` cannot meet `max_error`, or for another method's state.
    """
    start = _start(state)
    leading = {(m.rank, m.scale): at_scale(_first(start, m.rank), m.scale) for m in cohort.members}
    answers = yield {m.id: _ask(state, cohort, m, leading[m.rank, m.scale]) for m in cohort.members}

    mean = mean_of(start, answers, cohort, state.layout)
    increment = Adapter({n: _increment(f, mean.pair[n]) for n, f in start.items()})
    blocks, report = grown(state, increment, cohort.settings)
    report["aggregation_error"] = relative(norm(mean.residual), norm(stack([increment, mean.residual])))
    rank = max(start.ranks.values())
    warm = warm_pair(canonical(increment), rank, state.layout, cohort.seed, cohort.round)
    task = replace(state.open_task, blocks=blocks, extras=moved(state.open_task.extras, mean.head))
    return Closed(state=state.with_task(task, memory={**state.memory, NAME: pair_arrays(warm)}), report=report)


def _increment(start: Factors, mean: Factors) -> Factors:
    """B' A' - B0 A0 as factors of rank 2 R in float64; exactly zero where nothing changed."""
    b0 = start.b.astype(np.float64)
    return Factors(np.concatenate([mean.a - start.a, mean.a]), np.concatenate([b0, mean.b - b0], axis=1))


def _start(state: GlobalState) -> Adapter:
    """The common pair (A0, B0) of scale 1 that the next round starts from."""
    if NAME not in state.memory:
        raise MethodError(f"{NAME}: this state remembers no pair to start from; was it opened by another method?")
    b = part(state.memory[NAME], "B")
    return Adapter({n: Factors(a, b[n]) for n, a in part(state.memory[NAME], "A").items()})


def _first(pair: Adapter, rank: int) -> Adapter:
    return Adapter({n: Factors(f.a[:rank], f.b[:, :rank]) for n, f in pair.items()})


def _ask(state: GlobalState, cohort: Cohort, member: Member, start: Adapter) -> Ask:
    r = max(start.ranks.values())
    plan = plan_for(
        NAME,
        state,
        cohort,
        member,
        rank=r,
        rows=r,
        scale=member.scale,
        train=("A", "B"),
        changes=("A", "B"),
    )
    arrays = {**pair_arrays(start), **head_start(state)}
    return Ask(plan=plan, blocks=blocks_for_all(state), frozen=start.scaled(-1.0), arrays=arrays)


METHOD = register(
    Method(
        name=NAME,
        summary="averages A and B from a common restart and keeps what they add as a frozen block: rank grows, biased",
        open=open_state,
        protocol=protocol,
    )
)
