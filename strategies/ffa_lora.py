"""FFA-LoRA: freeze A, train and average B alone; then the mean of the products is the product of the means.

    B <- B + sum_k p_k pad(dB_k),    W_eff = W0 + s B A,    A A^T = I, the same for all

Sun et al., "Improving LoRA in Privacy-preserving Federated Learning", ICLR 2024.

Where we differ: A is not a random draw of the server's that travels, but rows of an orthonormal basis from the public
generator, which every client makes for itself from a seed; what travels is a checksum `A @ probe` per module. Ranks
may differ: the global pair has R rows (`task_rank`, or the largest enrolled rank); a client loads all R columns of B,
trains the first min(r_k, R) and sends their change. The change is divided by the weight of all who answered, so columns
that only large clients train move more slowly, and an untrained echo changes nothing.

The scale s belongs to the task: it is that of the largest enrolled client (the first by id among equals), whatever the
others' s_k are. Where all clients share one scale, which is the default, it is that one. Only half of the factors move,
so FFA-LoRA wants a larger learning rate than the others.

Embeddings are refused: there PEFT's zero factor is A, and B is the random one.

Cost: an upload of (out) r_k per module, no A either way; memory at the server is one client's B.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from fedlora.adapter import Adapter, Array, Factors, norm
from fedlora.config import MethodConfig
from fedlora.errors import MethodError
from fedlora.rng import public_normal
from fedlora.state import Ask, GlobalState, Layout
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
    keyed,
    moved,
    opened,
    orthonormal_pair,
    pair_of,
    part,
    plan_for,
    register,
)

NAME = "ffa-lora"


def open_state(base: str, layout: Layout, members: Sequence[Member], settings: MethodConfig, seed: int) -> GlobalState:
    """Orthonormal A, B zero. Raises: MethodError for an embedding, or a rank above a module's inputs."""
    return opened(base, layout, seed, pair=orthonormal_pair(layout, members, settings, seed, NAME), public_seed=seed)


def protocol(state: GlobalState, cohort: Cohort) -> Round:
    """One round: all columns of B out, changes of the first r_k in. Raises: MethodError if nobody answers."""
    task, pair = state.open_task, pair_of(state, NAME)
    if task.public_seed is None:
        raise MethodError(f"{NAME}: this state has no public seed, so A cannot stay at home; opened by another method?")
    start = {n: f.b for n, f in pair.items()}
    arrays = {
        **keyed("B", start),
        **keyed("probe", {n: checksum(f, n, task.public_seed) for n, f in pair.items()}),
        **head_start(state),
    }
    answers = yield {m.id: _ask(state, cohort, m, pair, task.public_seed, arrays) for m in cohort.members}

    changes, heads = Sums({n: b.shape for n, b in start.items()}), head_sums(state.layout)
    for _, answer in in_order(answers, cohort):
        changes.add(part(answer.arrays, "B"), answer.examples)
        heads.add(part(answer.arrays, "head"), answer.examples)

    change = changes.mean()
    update = Adapter({n: Factors(f.a, change[n], f.scale) for n, f in pair.items()})
    b = moved(start, change)
    pair = Adapter({n: Factors(f.a, b[n], f.scale) for n, f in pair.items()})
    report = {"update_norm": norm(update), "rank": float(max(pair.ranks.values()))}
    task = replace(task, pair=pair, extras=moved(task.extras, heads.mean()))
    return Closed(state=state.with_task(task), report=report)


def checksum(f: Factors, module: str, public_seed: int) -> NDArray[np.float32]:
    """`A @ probe`, `[rank]` float32: what a client that made A from `public_seed` must find to within 1e-5."""
    probe = public_normal(public_seed, "probe", module, shape=(f.a.shape[1],))
    return (f.a.astype(np.float64) @ probe).astype(np.float32)


def _ask(
    state: GlobalState,
    cohort: Cohort,
    member: Member,
    pair: Adapter,
    public_seed: int,
    arrays: Mapping[str, Array],
) -> Ask:
    first = next(iter(pair.values()))
    plan = plan_for(
        NAME,
        state,
        cohort,
        member,
        rank=min(member.rank, first.rank),
        rows=first.rank,
        scale=first.scale,
        train=("B",),
        changes=("B",),
        a_from="public",
        a_seed=public_seed,
    )
    return Ask(plan=plan, blocks=blocks_for_all(state), arrays=arrays)


METHOD = register(
    Method(
        name=NAME,
        summary="freezes one public A and averages changes of B: exact, half the traffic, any ranks",
        open=open_state,
        protocol=protocol,
    )
)
