"""FedSA-LoRA: A is averaged, B and the head stay at each client; everybody has a model of its own.

    A <- A + sum_k p_k pad(dA_k),    W_k = W0 + s_k B_k A[:r_k]

Guo et al., "Selective Aggregation for Low-Rank Adaptation in Federated Learning", ICLR 2025: A is found to learn what
clients have in common, B what is their own.

Where we differ. B and the head never leave a client: they lie in its memory folder, a plan says which (`keep`), the
answer has no room for them, and each client starts from what it kept of its own last round. The authors' configuration
sets `share_local_model` next to `local_param`: the clients of one process then train one model object, and each begins
with the B and head that the client before it left there. At unequal ranks, which the paper leaves open, a client loads,
trains and evaluates the first r_k rows of an A of R rows (`task_rank`, or the largest enrolled rank) at its own scale
s_k, and sends their change. The change is divided by the weight of all who answered, so rows that only large clients
train move more slowly, and an untrained echo changes nothing.

There is no common W_eff to score: clients evaluate their own (`evaluation`), and who never took part adds nothing to
the base. What a run hands out is the shared A with B = 0, a place to start from; personal adapters stay where they are.

Embeddings are refused: there PEFT's zero factor is A, which is the shared one here. A client without a memory folder
refuses the round.

Cost: (out) r_k less than FedIT either way, (in) r_k per module; memory at the server is one client's A.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from fedlora.adapter import Adapter, Array, Factors
from fedlora.config import MethodConfig
from fedlora.errors import MethodError
from fedlora.rng import stream
from fedlora.state import Ask, GlobalState, Layout, PersonalPair
from strategies.base import (
    Closed,
    Cohort,
    Member,
    Method,
    Round,
    Sums,
    blocks_for_all,
    fresh_a,
    head_start,
    in_order,
    keyed,
    largest,
    moved,
    opened,
    pair_of,
    part,
    plan_for,
    register,
)

__all__ = ["METHOD", "NAME", "evaluation", "open_state", "protocol"]

NAME = "fedsa-lora"


def open_state(base: str, layout: Layout, members: Sequence[Member], settings: MethodConfig, seed: int) -> GlobalState:
    """One fresh A `[R, in]` for all; the B beside it is zero and stays so. Raises: MethodError for an embedding."""
    rank = settings.task_rank or largest(members, NAME).rank
    pairs: dict[str, Factors] = {}
    for name, module in layout.modules.items():
        if module.kind == "embedding":
            raise MethodError(
                f"{NAME}: {name} is an embedding, where A is the factor that starts at zero: beside a B of zero "
                "neither would get a gradient. Leave embeddings out of model.target_modules, or use flora or fedit"
            )
        a = fresh_a(rank, module, stream(seed, "fedsa-start", name))
        pairs[name] = Factors(a, np.zeros((module.out, rank), np.float32))
    return opened(base, layout, seed, pair=Adapter(pairs))


def protocol(state: GlobalState, cohort: Cohort) -> Round:
    """One round: leading rows of A out, their changes in. Raises: MethodError if nobody answers."""
    task, pair = state.open_task, pair_of(state, NAME)
    answers = yield {m.id: _ask(state, cohort, m, pair) for m in cohort.members}

    start: dict[str, Array] = {n: f.a for n, f in pair.items()}
    changes = Sums({n: a.shape for n, a in start.items()})
    for _, answer in in_order(answers, cohort):
        changes.add(part(answer.arrays, "A"), answer.examples)
    change = changes.mean()
    a = moved(start, change)
    report = {
        "update_norm": math.hypot(*(float(np.linalg.norm(x)) for x in change.values())),
        "rank": float(max(pair.ranks.values())),
    }
    task = replace(task, pair=Adapter({n: Factors(a[n], f.b, f.scale) for n, f in pair.items()}))
    return Closed(state=state.with_task(task), report=report)


def evaluation(state: GlobalState, member: Member) -> Ask:
    """What this client evaluates: its own B and head beside its rows of A, at its own scale."""
    rank = min(member.rank, max(pair_of(state, NAME).ranks.values()))
    own = PersonalPair(rank=rank, scale=member.scale)
    return Ask(blocks=blocks_for_all(state), personal=own, arrays=_start(state, rank))


def _ask(state: GlobalState, cohort: Cohort, member: Member, pair: Adapter) -> Ask:
    rank = min(member.rank, max(pair.ranks.values()))
    plan = plan_for(
        NAME,
        state,
        cohort,
        member,
        rank=rank,
        rows=rank,
        scale=member.scale,
        train=("A", "B"),
        changes=("A",),
        b_from="zero",
        keep=("B", "head"),
    )
    return Ask(plan=plan, blocks=blocks_for_all(state), arrays=_start(state, rank))


def _start(state: GlobalState, rank: int) -> dict[str, Array]:
    """The first rows of A, and the head for a client that has none of its own yet."""
    leading = {n: f.a[:rank] for n, f in pair_of(state, NAME).items()}
    return {**keyed("A", leading), **head_start(state)}


METHOD = register(
    Method(
        name=NAME,
        summary="averages A, keeps B and the head at each client: personal models, half the traffic, any ranks",
        open=open_state,
        protocol=protocol,
        evaluation=evaluation,
        personal=True,
    )
)
