"""Where clients start when what they start from is not a pair that was averaged: directions of a known product.

Source: Yan et al., FRLoRA; Lee et al., FedSVD; Bai et al., FlexLoRA: a compact SVD is handed out as the next start. All
of it is post-processing of the aggregate.
"""

from __future__ import annotations

import numpy as np

from fedlora.adapter import Adapter, Factors
from fedlora.rng import stream
from fedlora.state import Layout
from strategies.base import fresh_a

__all__ = ["NEGLIGIBLE", "START_NORM", "empty", "warm_pair"]

START_NORM = 3.0**-0.5  # of a row of a fresh A
NEGLIGIBLE = 1e-7  # singular values below this share of the largest are float32 rounding, not directions


def warm_pair(
    svd: Adapter, rank: int, layout: Layout, seed: int, round_: int, *, row_norm: float = START_NORM
) -> Adapter:
    """The first `rank` directions of a product, scale 1, completed by fresh rows of A and zero columns of B.

    `svd` is in the form that `fedlora.adapter.truncate` returns (directions in falling order, singular values split
    evenly). Known rows of A get the norm `row_norm` and B the rest; where the product has fewer directions, A gets
    fresh rows (seeded by `seed`, `round_` and the module) and B zero columns, so the product is the truncated one.
    """
    pairs: dict[str, Factors] = {}
    for name, f in svd.items():
        module = layout.modules[name]
        a = fresh_a(rank, module, stream(seed, "warm-start", round_, name))
        b = np.zeros((module.out, rank), np.float32)
        rows = np.linalg.norm(f.a[:rank], axis=1)  # roots of the singular values, falling
        known = int(np.sum(rows**2 > NEGLIGIBLE * np.max(rows**2, initial=0.0)))
        grow = (row_norm / rows[:known]).astype(np.float32)
        a[:known] = f.a[:known] * grow[:, None]
        b[:, :known] = f.b[:, :known] / grow
        pairs[name] = Factors(a, b)
    return Adapter(pairs)


def empty(layout: Layout) -> Adapter:
    """The product zero, at rank 0: what a run has learnt before its first round."""
    return Adapter({n: Factors(np.zeros((0, m.inp)), np.zeros((m.out, 0))) for n, m in layout.modules.items()})
