"""Means of factors: what `fedit`, `fedex-lora` and `lora-fair` have in common.

With A, B the global pair (scale 1), and dA_k, dB_k what client k changed in its first r_k rows and columns, padded with
zeros at the end and with s_k folded into dB_k, the mean pair is

    A' = A + sum_k p_k dA_k,    B' = B + sum_k p_k dB_k

and what its product lacks of the exact mean of the clients' products is their covariance: A and B cancel, because

    sum_k p_k (B + dB_k)(A + dA_k) - B' A' = sum_k p_k dB_k dA_k - (sum_k p_k dB_k)(sum_k p_k dA_k)

The product of client k is the whole one that it ended with, its trained part and its frozen rest. So the residual comes
from the changes alone, which are small, and nothing large is subtracted. Its rank is at most the sum of the ranks minus
the smallest: in the rows that all clients train, a covariance of K terms has rank K - 1.

Source: the means are those of Zhang et al. (FedIT, ICASSP 2024), the residual is that of Singhal et al. (FedEx-LoRA,
ACL 2025), and the identity is that of a covariance, E[XY] - E[X]E[Y], which no shift of X and Y changes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedlora.adapter import Adapter, Factors, ProductSum, difference, norm, stack
from fedlora.rng import stream
from fedlora.state import Answer, Ask, GlobalState, Layout, part
from strategies.base import (
    Cohort,
    Member,
    Sums,
    blocks_for_all,
    fresh_a,
    head_start,
    head_sums,
    in_order,
    pair_arrays,
    pair_from,
    plan_for,
    relative,
)

__all__ = ["Mean", "ask_all", "at_scale", "fresh_pair", "mean_of"]


def fresh_pair(layout: Layout, rank: int, seed: int) -> Adapter:
    """A fresh A `[rank, in]` for all, B `[out, rank]` zero, scale 1, in float32; the same for the same seed.

    In embeddings A is the zero factor and B the random one, N(0, 1), as in PEFT.
    """
    pairs: dict[str, Factors] = {}
    for name, module in layout.modules.items():
        rng = stream(seed, "fedit-start", name)
        if module.kind == "embedding":
            b = rng.standard_normal((module.out, rank), np.float32)
            pairs[name] = Factors(np.zeros((rank, module.inp), np.float32), b)
        else:
            pairs[name] = Factors(fresh_a(rank, module, rng), np.zeros((module.out, rank), np.float32))
    return Adapter(pairs)


def at_scale(pair: Adapter, scale: float) -> Adapter:
    """The same product as `pair`, whose scale is 1, for a client of this scale: B is divided by it, in float32."""
    return Adapter({n: Factors(f.a, f.b / np.float32(scale), scale) for n, f in pair.items()})


def ask_all(method: str, state: GlobalState, cohort: Cohort, pair: Adapter) -> dict[str, Ask]:
    """Every client gets all rows of the pair at its own scale, trains the first r_k and sends their changes."""
    rows = max(pair.ranks.values())
    starts = {scale: pair_arrays(at_scale(pair, scale)) for scale in {m.scale for m in cohort.members}}
    head, blocks = head_start(state), blocks_for_all(state)

    def ask(m: Member) -> Ask:
        plan = plan_for(
            method,
            state,
            cohort,
            m,
            rank=min(m.rank, rows),
            rows=rows,
            scale=m.scale,
            train=("A", "B"),
            changes=("A", "B"),
        )
        return Ask(plan=plan, blocks=blocks, arrays={**starts[m.scale], **head})

    return {m.id: ask(m) for m in cohort.members}


@dataclass(frozen=True, kw_only=True)
class Mean:
    """What the answers to `ask_all` come to, in float64: the exact mean is the product of `pair` plus `residual`."""

    pair: Adapter  # A' and B', scale 1
    residual: Adapter  # covariance of the changes, factored
    residual_rank: int  # at most, in exact arithmetic, in every module
    lost: float  # upper bound on the Frobenius error of the residual; 0 without a limit
    head: Mapping[str, NDArray[np.float64]]  # mean changes

    def error(self) -> float:
        """What plain averaging gets wrong: ||exact mean - B' A'||_F / ||exact mean||_F, over all modules."""
        return relative(norm(self.residual), norm(stack([self.pair, self.residual])))


def mean_of(
    pair: Adapter, answers: Mapping[str, Answer], cohort: Cohort, layout: Layout, *, limit: int | None = None
) -> Mean:
    """The mean of the clients who answered, weighted by their examples and folded in the order of their ids.

    `limit` bounds the rank at which the running sum of the products dB_k dA_k is kept; without it nothing is lost.
    Cost, per module, with S the sum of the ranks: time O((out + in) S min(S, out, in)), memory
    (out + in) min(S, 2 min(out, in)) float64.
    Raises: MethodError if nobody answered.
    """
    changes = Sums({key: x.shape for key, x in pair_arrays(pair).items()})
    products, heads = ProductSum(limit), head_sums(layout)
    ranks: list[int] = []
    for member, answer in in_order(answers, cohort):
        change = pair_from(answer.arrays, member.scale).folded()
        changes.add(pair_arrays(change), answer.examples)
        products.add(change, answer.examples)
        heads.add(part(answer.arrays, "head"), answer.examples)
        ranks.append(max(change.ranks.values()))
    change = pair_from(changes.mean())
    return Mean(
        pair=Adapter({n: Factors(f.a + change[n].a, f.b + change[n].b) for n, f in pair.items()}),
        residual=difference(products.total().scaled(1.0 / changes.weight), change),
        residual_rank=sum(ranks) - min(ranks),
        lost=products.error / changes.weight,
        head=heads.mean(),
    )
