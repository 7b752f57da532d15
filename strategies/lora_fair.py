"""LoRA-FAIR: average A and average B, then correct B so that the product comes as near to the exact mean as it can.

    A' = A + sum_k p_k dA_k,    B_bar = B + sum_k p_k dB_k,    B' = B_bar + dB,    W_eff = W0 + B' A'

    dB = argmin ||(B_bar + dB) A' - M||_F^2 + lambda ||dB||_F^2 = (M - B_bar A') A'^T (A' A'^T + lambda I)^-1

with M the exact p_k-weighted mean of the clients' whole products and lambda = `ridge`, 0.01 by default. The state is
one pair, as in FedIT; A' is not corrected. The error that remains is never above that of the plain means, for dB = 0 is
allowed; at lambda = 0 it is that of the best B for this A', and as lambda grows dB goes to zero.

Bian et al., "LoRA-FAIR: Federated LoRA Fine-Tuning with Aggregation and Initialization Refinement", ICCV 2025.

Where we differ. The paper measures nearness by a cosine similarity and descends on dB by SGD; a cosine does not see the
size of the product, and the result depends on steps and rate. Ours is the least-squares problem with the same penalty,
solved in closed form through the SVD of A', so that lambda = 0 and an A' without full rank are no special cases:
directions that A' lacks (singular values below 1e-7 of the largest) get no correction. Near such directions a small
lambda gives a large B, which is what the penalty is for. M - B_bar A' comes from the changes alone and stays factored,
see `strategies/means.py`. The other half of the paper, that clients start from the refined mean, is how all methods
here start that keep a pair.

Mixed ranks and scales, which the paper does not treat: as in `fedex-lora`, a client loads all R rows of the pair,
trains the first r_k and sends changes, so that an untrained echo changes nothing.

Each round reports `aggregation_error`, what the plain means get wrong, as `fedit` does, and
`aggregation_error_corrected`, what is left of it: ||M - B' A'||_F / ||M||_F over all modules.

Cost: an upload of (out + in) r_k and a download of (out + in) R per module; the correction takes O((out + in) R S) with
S the rank of the residual. Memory at the server does not grow with the clients.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from fedlora.adapter import Adapter, Array, Factors, difference, norm, stack
from fedlora.config import MethodConfig
from fedlora.state import GlobalState, Layout
from strategies.base import Closed, Cohort, Member, Method, Round, largest, moved, opened, pair_of, register, relative
from strategies.blocks import as_float32
from strategies.means import ask_all, fresh_pair, mean_of
from strategies.warm import NEGLIGIBLE

NAME = "lora-fair"
RIDGE = 0.01  # lambda of the paper's experiments


def open_state(base: str, layout: Layout, members: Sequence[Member], settings: MethodConfig, seed: int) -> GlobalState:
    """The start of `fedit`: one fresh A for all, B zero. Raises: MethodError if nobody is enrolled."""
    rank = settings.task_rank or largest(members, NAME).rank
    return opened(base, layout, seed, pair=fresh_pair(layout, rank, seed))


def protocol(state: GlobalState, cohort: Cohort) -> Round:
    """One round: the pair out, changes in, the corrected mean pair. Raises: MethodError if nobody answers."""
    task, pair = state.open_task, pair_of(state, NAME)
    ridge = RIDGE if cohort.settings.ridge is None else cohort.settings.ridge
    answers = yield ask_all(NAME, state, cohort, pair)

    mean = mean_of(pair, answers, cohort, state.layout)
    a = {n: f.a.astype(np.float32) for n, f in mean.pair.items()}
    best = Adapter({n: Factors(a[n], correction(r, a[n], ridge)) for n, r in mean.residual.items()})
    new = as_float32(Adapter({n: Factors(a[n], f.b + best[n].b) for n, f in mean.pair.items()}))
    left = difference(mean.residual, best)
    report = {
        "update_norm": norm(difference(new, pair)),
        "rank": float(max(new.ranks.values())),
        "aggregation_error": mean.error(),
        "aggregation_error_corrected": relative(norm(left), norm(stack([mean.pair, mean.residual]))),
    }
    task = replace(task, pair=new, extras=moved(task.extras, mean.head))
    return Closed(state=state.with_task(task), report=report)


def correction(residual: Factors, a: Array, ridge: float) -> NDArray[np.float64]:
    """dB `[out, rank]` that minimises `||dB a - residual||_F^2 + ridge ||dB||_F^2`; the smallest one if there are many.

    `a` is `[rank, in]`, `residual` a product `[out, in]`, `ridge` 0 or more.
    With a = U diag(sigma) V^T it is residual V diag(sigma / (sigma^2 + ridge)) U^T (Golub and Van Loan, section 6.1.4).
    """
    u, sigma, vt = np.linalg.svd(a.astype(np.float64), full_matrices=False)
    known = sigma > NEGLIGIBLE * np.max(sigma, initial=0.0)
    gain = sigma / np.where(known, sigma**2 + ridge, np.inf)
    seen = residual.b @ (residual.a @ vt.T)
    return np.asarray(residual.scale * (seen * gain) @ u.T)


METHOD = register(
    Method(
        name=NAME,
        summary="averages A and B and corrects B by ridge regression on the exact mean: one pair, less bias than fedit",
        open=open_state,
        protocol=protocol,
    )
)
