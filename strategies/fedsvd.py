"""FedSVD: train and average B alone, then refactorise the product, so that A is its right singular vectors.

    B <- B + sum_k p_k pad(dB_k);    s B A = U S V^T;    A <- V^T,  B <- U S / s;    W_eff = W0 + s B A,    A A^T = I

Lee et al., "FedSVD: Adaptive Orthogonalization for Private Federated Learning with LoRA", NeurIPS 2025.

A is frozen within a round and travels. The refactorisation leaves the product as it is, and it is a function of the sum
alone: under secure sums or noise it is post-processing, and costs no privacy.

What it can and cannot do. Only B moves, so every row of the product is a combination of rows of A, and V^T = Q A with
an orthogonal Q [R, R]: the row space of A never changes. FedSVD turns the coordinates within the space that the start
chose; it does not look for a better one. Whatever does not depend on Q goes as under FFA-LoRA from the same start. A
gradient step on B moves the product by -rate s^2 G A^T A, with G the gradient with respect to W_eff, and A^T A is the
projector onto that space; so too weight decay, clipping by an L2 norm (of one example or of the whole gradient) and, in
distribution, Gaussian noise on B. What differs is what acts on single entries or columns: Adam, the rounding of a
codec, and small ranks. At mixed ranks that is an advantage: a client of rank r_k trains the r_k leading directions of
what has been learnt, where under FFA-LoRA it trains r_k random ones.

Where we differ. The start is that of our FFA-LoRA: A from the public generator, orthonormal from the first round, and B
zero. The product is never formed (QR of A, SVD of a core [out, R]). Where it has fewer than R directions, at first
none, the SVD completes V within the row space, with columns of B that are zero up to rounding. Signs, which an SVD
leaves open, are those at which each row of A keeps a positive inner product with the old one. Any ranks: the pair has R
rows (`task_rank`, or the largest enrolled rank); a client loads all of them, trains the first min(r_k, R) columns of B
and sends their change; the sum is divided by the weight of all who answered. The scale s belongs to the task, as in
FFA-LoRA: that of the largest enrolled client, the first by id among equals.

Embeddings are refused: there PEFT's zero factor is A, and B is the random one.

`rank` in the report is R. Each round rounds A and B to float32, so the row space drifts by about 1e-7 a round.

Cost, per module: an upload of out r_k, a download of (out + in) R; O((out + in) R^2) at the server, which holds one
client's B at a time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from fedlora.adapter import Adapter, Array, Factors, norm
from fedlora.config import MethodConfig
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
    moved,
    opened,
    orthonormal_pair,
    pair_arrays,
    pair_of,
    part,
    plan_for,
    register,
)

__all__ = ["METHOD", "NAME", "refactorised"]

NAME = "fedsvd"


def open_state(base: str, layout: Layout, members: Sequence[Member], settings: MethodConfig, seed: int) -> GlobalState:
    """Orthonormal A, B zero. Raises: MethodError for no client, an embedding, or a rank above a module's inputs."""
    return opened(base, layout, seed, pair=orthonormal_pair(layout, members, settings, seed, NAME))


def protocol(state: GlobalState, cohort: Cohort) -> Round:
    """One round: the pair out, changes of the first r_k columns of B in. Raises: MethodError if nobody answers."""
    task, pair = state.open_task, pair_of(state, NAME)
    arrays = {**pair_arrays(pair), **head_start(state)}
    answers = yield {m.id: _ask(state, cohort, m, pair, arrays) for m in cohort.members}

    changes, heads = Sums({n: f.b.shape for n, f in pair.items()}), head_sums(state.layout)
    for _, answer in in_order(answers, cohort):
        changes.add(part(answer.arrays, "B"), answer.examples)
        heads.add(part(answer.arrays, "head"), answer.examples)

    change = changes.mean()
    report = {
        "update_norm": norm(Adapter({n: Factors(f.a, change[n], f.scale) for n, f in pair.items()})),
        "rank": float(max(pair.ranks.values())),
    }
    new = {n: refactorised(Factors(f.a, f.b + change[n], f.scale)) for n, f in pair.items()}
    task = replace(task, pair=Adapter(new), extras=moved(task.extras, heads.mean()))
    return Closed(state=state.with_task(task), report=report)


def refactorised(f: Factors) -> Factors:
    """The same product `scale * B A` at the same rank R and scale, in float32: A `[R, in]` its right singular vectors.

    A has orthonormal rows in the row space of the old one, which must have full rank R <= in; B `[out, R]` has
    orthogonal columns, whose norms fall and are the singular values over |scale|. Directions that the product lacks
    have columns of norm 0 (up to rounding) and rows that complete the basis. O((out + in) R^2), in float64.
    Source: Lee et al., FedSVD: the server's step; QR and SVD of the core, as in the compact SVD of a factored product.
    """
    old = f.a.astype(np.float64)
    q, r = np.linalg.qr(old.T)
    core = f.b.astype(np.float64) @ r.T  # B A = core Q^T
    # Where out < R, the thin SVD would leave V incomplete.
    u, sigma, vt = np.linalg.svd(core, full_matrices=len(core) < f.rank)
    a: NDArray[np.float64] = vt @ q.T
    signs = np.where(np.sum(a * old, axis=1) < 0.0, -1.0, 1.0)
    b = np.zeros((f.shape[0], f.rank))
    b[:, : len(sigma)] = u * sigma
    return Factors((a * signs[:, None]).astype(np.float32), (b * signs).astype(np.float32), f.scale)


def _ask(state: GlobalState, cohort: Cohort, member: Member, pair: Adapter, arrays: Mapping[str, Array]) -> Ask:
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
    )
    return Ask(plan=plan, blocks=blocks_for_all(state), arrays=arrays)


METHOD = register(
    Method(
        name=NAME,
        summary="averages changes of B on a common A, then turns A to the product's singular vectors: exact, any ranks",
        open=open_state,
        protocol=protocol,
    )
)
