"""Fed-SB: between two fixed bases only a small core R is trained and averaged, so the mean is exact and tiny to send.

    R <- R + sum_k p_k pad(dR_k),    W_eff = W0 + s B R A,    A and B fixed, R [rank, rank]

Singhal et al., "Fed-SB: A Silver Bullet for Extreme Communication Efficiency and Performance in (Private) Federated
LoRA Fine-Tuning", 2025, after LoRA-SB (Ponkshe et al., "Initialization using Update Approximation is a Silver Bullet
for Extremely Efficient Low-Rank Fine-Tuning", 2024). The product is linear in R, so the mean of the R_k gives the mean
of the products.

The bases (`method.basis`), always orthonormal, so that ||s B dR A||_F = s ||dR||_F:
- `update`, the default. The first round is an ordinary one: clients train a fresh A and B = 0 at their own ranks, and
  the exact mean of their products (FLoRA's sum) has the compact SVD U S V^T. Its first R directions are the bases,
  B = U, A = V^T, and the core starts at diag(S) / s. What lies outside of them stays in W_eff as one frozen block, so
  the first round is exact too; its share of the round's norm is reported as `outside_bases`. Directions that the first
  update lacks are random ones, orthogonal to it, with a zero core.
- `random`: both bases come from the public generator and R starts at zero. Nothing but R and a checksum of A travels.

Where we differ. LoRA-SB takes its bases from the SVD of the first step of full fine-tuning, estimated from gradients of
all weights; Fed-SB lets one place compute it. Ours is the federated form: the first round's mean update, which needs no
dense gradient, no data at the server and no client with more memory than LoRA takes. The authors drop what the SVD
truncates, we keep it. Ranks may differ: a client loads all of R, trains the leading r_k x r_k block and sends its
change; the sum is divided by the weight of all who answered, so what only large clients train moves more slowly, and an
untrained echo changes nothing. The scale s belongs to the task, in the first round too: it is that of the largest
enrolled client (the first by id among equals). Leading directions are the largest of the first update.

Cost, per module: up r_k^2, in the first round of `update` (out + in) r_k. Down R^2, and under `update` (out + in) R for
the bases each round, since a client need not remember them, and the block once, at rank min(sum r_k, out, in) - R. At
the server one client's core; in the first round of `update` what FLoRA's takes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from fedlora.adapter import Adapter, Array, Factors, ProductSum, norm, truncated
from fedlora.config import MethodConfig
from fedlora.errors import MethodError
from fedlora.rng import public_orthonormal, stream
from fedlora.state import Ask, Block, GlobalState, Layout, PublicPair, TrainPlan, zero_adapter
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
    largest,
    moved,
    opened,
    pair_from,
    pair_of,
    part,
    plan_for,
    register,
    relative,
)
from strategies.ffa_lora import checksum
from strategies.warm import NEGLIGIBLE

__all__ = ["METHOD", "NAME", "evaluation", "open_state", "protocol", "with_cores"]

NAME = "fed-sb"


def open_state(base: str, layout: Layout, members: Sequence[Member], settings: MethodConfig, seed: int) -> GlobalState:
    """Public bases and a zero core, or a pair of rank R that is zero until the first round names the bases.

    The memory of this method holds `B:module [out, R]` and `R:module [R, R]` once there are bases; A and B R are the
    task's pair. Raises: MethodError for a rank above what a module can hold.
    """
    first = largest(members, NAME)
    rank = settings.task_rank or first.rank
    for name, module in layout.modules.items():
        if rank > min(module.out, module.inp):
            raise MethodError(
                f"{NAME}: rank {rank} is above what {name} [{module.out}, {module.inp}] can hold, which has no more "
                "orthonormal directions. Lower lora.ranks or method.task_rank, or leave the module out of "
                "model.target_modules"
            )
    nothing = Adapter({n: Factors(f.a, f.b, first.scale) for n, f in zero_adapter(layout, rank).items()})
    if settings.basis != "random":
        return opened(base, layout, seed, pair=nothing, memory={NAME: {}})
    a = {n: public_orthonormal(seed, "basis", n, rows=rank, cols=m.inp) for n, m in layout.modules.items()}
    b = {n: public_orthonormal(seed, "basis-b", n, rows=rank, cols=m.out).T for n, m in layout.modules.items()}
    pair = Adapter({n: Factors(a[n].astype(np.float32), f.b, f.scale) for n, f in nothing.items()})
    cores = {n: np.zeros((rank, rank), np.float32) for n in layout.modules}
    memory = {**keyed("B", {n: x.astype(np.float32) for n, x in b.items()}), **keyed("R", cores)}
    return opened(base, layout, seed, pair=pair, public_seed=seed, memory={NAME: memory})


def protocol(state: GlobalState, cohort: Cohort) -> Round:
    """One round: cores out, changes of their leading blocks in; under `update` the first one is of fresh pairs.

    Raises: MethodError if nobody answers.
    """
    pair = pair_of(state, NAME)
    if NAME not in state.memory:
        raise MethodError(f"{NAME}: this state has no core; was it opened by another method?")
    cores = part(state.memory[NAME], "R")
    closed: Closed = yield from (_core_round if cores else _first_round)(state, pair, cohort)
    return closed


def _core_round(state: GlobalState, pair: Adapter, cohort: Cohort) -> Round:
    task, cores = state.open_task, part(state.memory[NAME], "R")
    blocks, arrays = blocks_for_all(state), {**_sent(state, pair), **head_start(state)}
    answers = yield {
        m.id: Ask(plan=_core_plan(state, cohort, m, pair), blocks=blocks, arrays=arrays) for m in cohort.members
    }
    changes, heads = Sums({n: r.shape for n, r in cores.items()}), head_sums(state.layout)
    for _, answer in in_order(answers, cohort):
        changes.add(part(answer.arrays, "R"), answer.examples)
        heads.add(part(answer.arrays, "head"), answer.examples)
    change = changes.mean()
    size = math.hypot(*(abs(pair[n].scale) * float(np.linalg.norm(x)) for n, x in change.items()))
    state = state.with_task(replace(task, extras=moved(task.extras, heads.mean())))
    state = with_cores(state, moved(cores, change))
    return Closed(state=state, report={"update_norm": size, "rank": _rank(state)})


def _first_round(state: GlobalState, pair: Adapter, cohort: Cohort) -> Round:
    task, blocks, head = state.open_task, blocks_for_all(state), head_start(state)
    answers = yield {
        m.id: Ask(plan=_first_plan(state, cohort, m, pair), blocks=blocks, arrays=head) for m in cohort.members
    }
    scale = next(iter(pair.values())).scale
    products, heads = ProductSum(), head_sums(state.layout)
    for _, answer in in_order(answers, cohort):
        products.add(pair_from(answer.arrays, scale), answer.examples)
        heads.add(part(answer.arrays, "head"), answer.examples)
    update = products.total().scaled(1.0 / heads.weight)
    a, memory, rest = _bases(update, pair, cohort.seed)

    left = Block(adapter=rest, born=state.version + 1, since=state.version)
    blocks = (*task.blocks, left) if max(rest.ranks.values()) else task.blocks
    pair = Adapter({n: Factors(a[n], f.b, f.scale) for n, f in pair.items()})
    task = replace(task, pair=pair, blocks=blocks, extras=moved(task.extras, heads.mean()))
    state = state.with_task(task, memory={**state.memory, NAME: memory})
    state = with_cores(state, part(memory, "R"))
    size = norm(update)
    return Closed(
        state=state,
        report={"update_norm": size, "rank": _rank(state), "outside_bases": relative(norm(rest), size)},
    )


def with_cores(state: GlobalState, cores: Mapping[str, Array]) -> GlobalState:
    """The same version of the state with these cores R `[R, R]`, and the pair (A, B R) that they give, in float32."""
    pair, memory = pair_of(state, NAME), state.memory[NAME]
    b = {n: x.astype(np.float64) @ cores[n].astype(np.float64) for n, x in part(memory, "B").items()}
    pair = Adapter({n: Factors(f.a, b[n].astype(np.float32), f.scale) for n, f in pair.items()})
    task = replace(state.open_task, pair=pair)
    kept = {**memory, **keyed("R", cores)}
    return replace(state, tasks={**state.tasks, task.name: task}, memory={**state.memory, NAME: kept})


def evaluation(state: GlobalState, member: Member) -> Ask:
    """What a client evaluates: the blocks, and the pair as frozen factors; public bases stay at home, R travels."""
    task, pair, head = state.open_task, pair_of(state, NAME), head_start(state)
    blocks = blocks_for_all(state)
    if task.public_seed is None:
        frozen = pair if part(state.memory[NAME], "R") else None
        return Ask(blocks=blocks, frozen=frozen, arrays=head)
    first = next(iter(pair.values()))
    public = PublicPair(seed=task.public_seed, rows=first.rank, scale=first.scale, core=True)
    return Ask(blocks=blocks, public=public, arrays={**_sent(state, pair), **head})


def _sent(state: GlobalState, pair: Adapter) -> dict[str, Array]:
    """The core and its bases as arrays of an Ask; of public bases the checksums."""
    memory, seed = state.memory[NAME], state.open_task.public_seed
    if seed is None:
        return {**memory, **keyed("A", {n: f.a for n, f in pair.items()})}
    probes = {n: checksum(f, n, seed) for n, f in pair.items()}
    return {**keyed("R", part(memory, "R")), **keyed("probe", probes)}


def _core_plan(state: GlobalState, cohort: Cohort, member: Member, pair: Adapter) -> TrainPlan:
    first, seed = next(iter(pair.values())), state.open_task.public_seed
    return plan_for(
        NAME,
        state,
        cohort,
        member,
        rank=min(member.rank, first.rank),
        rows=first.rank,
        scale=first.scale,
        train=("R",),
        changes=("R",),
        a_from="given" if seed is None else "public",
        b_from="given" if seed is None else "public",
        a_seed=seed or 0,
        core=True,
    )


def _first_plan(state: GlobalState, cohort: Cohort, member: Member, pair: Adapter) -> TrainPlan:
    return plan_for(
        NAME,
        state,
        cohort,
        member,
        rank=member.rank,
        rows=member.rank,
        scale=next(iter(pair.values())).scale,
        train=("A", "B"),
        a_from="fresh",
        b_from="zero",
    )


def _bases(update: Adapter, pair: Adapter, seed: int) -> tuple[dict[str, Array], dict[str, Array], Adapter]:
    """A by module, the arrays `B:` and `R:` of the memory, and what of `update` is outside of the bases; float32.

    `pair` says the rank and scale of every module's core. U and V are the singular vectors of the update, in falling
    order; singular values below rounding are no directions.
    """
    svd = truncated(update, {n: min(f.shape) for n, f in update.items()})[0]
    a: dict[str, Array] = {}
    memory: dict[str, Array] = {}
    rest: dict[str, Factors] = {}
    for name, f in svd.items():
        rank, scale = pair[name].rank, pair[name].scale
        root = np.linalg.norm(f.a, axis=1)  # of the singular values, which are split evenly over both factors
        known = int(np.sum(root**2 > NEGLIGIBLE * np.max(root**2, initial=0.0)))
        keep = min(rank, known)
        rng = stream(seed, "fed-sb-basis", name)
        v = _completed(f.a[:keep].T / root[:keep], rank, rng)
        u = _completed(f.b[:, :keep] / root[:keep], rank, rng)
        core = np.zeros((rank, rank))
        core[range(keep), range(keep)] = root[:keep] ** 2 / scale
        a[name] = np.ascontiguousarray(v.T, np.float32)
        memory[f"B:{name}"] = u.astype(np.float32)
        memory[f"R:{name}"] = core.astype(np.float32)
        over = slice(keep, known)
        rest[name] = Factors(f.a[over].astype(np.float32), np.ascontiguousarray(f.b[:, over], np.float32))
    return a, memory, Adapter(rest)


def _completed(known: NDArray[np.float64], rank: int, rng: np.random.Generator) -> NDArray[np.float64]:
    """Orthonormal columns `known [n, k]` and random ones orthogonal to them, `[n, rank]`."""
    k = known.shape[1]
    if k == rank:
        return known
    more = rng.standard_normal((len(known), rank - k))
    q = np.linalg.qr(np.hstack([known, more]))[0]
    return np.hstack([known, q[:, k:]])


def _rank(state: GlobalState) -> float:
    """The largest rank of what the open task adds to a module: its core's and its blocks'."""
    terms = [pair_of(state, NAME), *(b.adapter for b in state.open_task.blocks)]
    return float(max(sum(t[n].rank for t in terms) for n in terms[0]))


METHOD = register(
    Method(
        name=NAME,
        summary="trains and averages an r x r core between fixed bases: exact, the least traffic up, any ranks",
        open=open_state,
        protocol=protocol,
        evaluation=evaluation,
    )
)
