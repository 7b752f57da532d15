"""RoLoRA: train B with A fixed, then A with B fixed, in turn; each mean is the mean of the products.

    B <- B + sum_k p_k pad(dB_k)    then    A <- A + sum_k p_k pad(dA_k)    and so on,    W_eff = W0 + s B A

The product is linear in the one factor that moves, so every round is exact, at any ranks.

Chen et al., "Robust Federated Finetuning of LLMs via Alternating Optimization of LoRA", NeurIPS 2025.

Where we differ. The phase is not the parity of the round: it is kept in the state and moves on only when a round
closes, so a round that fails and is repeated, or a run that is resumed, trains the factor whose turn it is. B is first.
A starts with orthonormal rows from the public generator and travels, for it moves too; both factors go down, so clients
remember nothing, and only the trained one comes up. Ranks may differ: the global pair has R rows (`task_rank`, or the
largest enrolled rank); a client loads all of it, trains the first min(r_k, R) rows of A or columns of B and sends their
change. Changes are divided by the weight of all who answered, so what only large clients train moves more slowly, and
an untrained echo changes nothing.

A row of A gets no gradient while its column of B is zero. After the first round that holds for columns that nobody who
answered had the rank to train; their rows wait, and train once their columns have. It is harmless.

The scale s belongs to the task: it is that of the largest enrolled client (the first by id among equals), whatever the
others' s_k are, because only then is the product linear in what is averaged.

Embeddings are taken, with PEFT's start, A zero and B normal. The first round, which trains B, leaves them as they were.
AdamW's moments cannot be kept between rounds (`training.optimizer_state`), as the next round trains the other factor.

Cost: an upload of out r_k or in r_k per module, in turn, and a download of (out + in) R; memory at the server is one
client's factor.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from fedlora.adapter import Adapter, Array, Factors, norm
from fedlora.config import MethodConfig
from fedlora.errors import MethodError
from fedlora.rng import public_normal
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
    orthonormal_rows,
    pair_arrays,
    pair_of,
    part,
    plan_for,
    register,
)

NAME = "rolora"
PHASES: tuple[Part, ...] = ("B", "A")  # trained in turn; the memory holds the index of the next one
PHASE = "phase"


def open_state(base: str, layout: Layout, members: Sequence[Member], settings: MethodConfig, seed: int) -> GlobalState:
    """Orthonormal A, B zero (embeddings: A zero, B normal), and B's turn in the memory.

    Raises: MethodError if nobody is enrolled, or for a rank above a module's inputs.
    """
    first = largest(members, NAME)
    rank = settings.task_rank or first.rank
    pairs: dict[str, Factors] = {}
    for name, module in layout.modules.items():
        a, b = np.zeros((rank, module.inp), np.float32), np.zeros((module.out, rank), np.float32)
        if module.kind == "embedding":
            b = public_normal(seed, "basis-b", name, shape=b.shape).astype(np.float32)
        else:
            a = orthonormal_rows(rank, name, module, seed, NAME)
        pairs[name] = Factors(a, b, first.scale)
    return opened(base, layout, seed, pair=Adapter(pairs), memory={NAME: {PHASE: np.zeros(1, np.float32)}})


def protocol(state: GlobalState, cohort: Cohort) -> Round:
    """One round: both factors out, changes of one in.

    Raises: MethodError if nobody answers, if the state has no phase, or if clients are to keep AdamW's moments.
    """
    task, pair = state.open_task, pair_of(state, NAME)
    if NAME not in state.memory:
        raise MethodError(f"{NAME}: this state does not say which factor is next; was it opened by another method?")
    if cohort.training.optimizer_state == "keep":
        raise MethodError(
            f"{NAME}: training.optimizer_state is keep, but A and B are trained in turn and the moments of the one do "
            "not belong to the other; use fresh"
        )
    phase = int(state.memory[NAME][PHASE][0])
    trained = PHASES[phase]
    start = part(pair_arrays(pair), trained)
    answers = yield {m.id: _ask(state, cohort, m, pair, trained) for m in cohort.members}

    changes, heads = Sums({n: x.shape for n, x in start.items()}), head_sums(state.layout)
    for _, answer in in_order(answers, cohort):
        changes.add(part(answer.arrays, trained), answer.examples)
        heads.add(part(answer.arrays, "head"), answer.examples)

    change = changes.mean()
    update = _with(pair, trained, change)
    new = _with(pair, trained, moved(start, change))
    report = {"update_norm": norm(update), "rank": float(max(new.ranks.values())), "phase": float(phase)}
    memory = {**state.memory, NAME: {PHASE: np.full(1, (phase + 1) % len(PHASES), np.float32)}}
    task = replace(task, pair=new, extras=moved(task.extras, heads.mean()))
    return Closed(state=state.with_task(task, memory=memory), report=report)


def _with(pair: Adapter, trained: Part, arrays: Mapping[str, Array]) -> Adapter:
    """The pair with other arrays in place of its A or its B."""
    if trained == "A":
        return Adapter({n: Factors(arrays[n], f.b, f.scale) for n, f in pair.items()})
    return Adapter({n: Factors(f.a, arrays[n], f.scale) for n, f in pair.items()})


def _ask(state: GlobalState, cohort: Cohort, member: Member, pair: Adapter, trained: Part) -> Ask:
    first = next(iter(pair.values()))
    plan = plan_for(
        NAME,
        state,
        cohort,
        member,
        rank=min(member.rank, first.rank),
        rows=first.rank,
        scale=first.scale,
        train=(trained,),
        changes=(trained,),
    )
    return Ask(plan=plan, blocks=blocks_for_all(state), arrays={**pair_arrays(pair), **head_start(state)})


METHOD = register(
    Method(
        name=NAME,
        summary="trains B and A in turn and averages changes of the one that moves: exact, half the upload, any ranks",
        open=open_state,
        protocol=protocol,
    )
)
