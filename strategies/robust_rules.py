"""Robust rules as functions of the updates' Gram matrix: who counts how much, who is shortened, who is left out.

    W_eff moves by sum_k w_k c_k D_k,    w_k >= 0, sum_k w_k = 1,    G_ij = <D_i, D_j>

Let p_k be the clients' shares of the examples, d_k the distance of D_k to the aggregate, and tau the bound, by default
the median of the round's norms.

- norm-bound: w_k = p_k, c_k = min(1, tau / ||D_k||). Sun et al., "Can You Really Backdoor Federated Learning?", 2019.
- screen: leaves out whose norm, or median distance to the others, is above the median of all by more than 3.5 sigma
  (sigma = 1.4826 MAD; Iglewicz and Hoaglin, "How to Detect and Handle Outliers", 1993), or whose median cosine to the
  others is below zero and as far below the median of all. At most (K - 1) / 2 are left out, the worst first; the
  flagged ones that stay are shortened to tau. Clients whose data differ are outliers too, so sigma has floors: a tenth
  of the median (norms, distances), 0.1 (cosines).
- krum: the one update with the least sum of squared distances to its K - f - 2 nearest. multi-krum: the K - f - 2
  best of them, weighed by p_k. Blanchard et al., "Machine Learning with Adversaries", NeurIPS 2017; so many and no
  more is the condition of El Mhamdi et al., ICML 2018. f is `robust.attackers` of those asked, and K > 2 f + 2 must
  answer.
- geometric-median: w_k ~ p_k / max(d_k, nu), the smoothed Weiszfeld iteration, to convergence. Pillutla et al., "Robust
  Aggregation for Federated Learning" (RFA), IEEE Transactions on Signal Processing, 2022.
- centred-clipping: v <- v + sum_k p_k (D_k - v) min(1, tau / d_k), five times from v = 0. The coefficients of v may sum
  to less than 1; that sum is the c_k of all. Karimireddy et al., "Learning from History", ICML 2021, who start from the
  last round's v, which has no meaning here where the basis moves.
- fltrust: w_k ~ max(0, cos(D_k, D_0)), c_k = ||D_0|| / ||D_k||, with D_0 the update of `robust.trusted`, which is a
  measure and is not averaged. p_k plays no part. Cao et al., "FLTrust", NDSS 2021.
- median, trimmed-mean: entry by entry (Yin et al., ICML 2018), only under ffa-lora, where all B stand on one A and an
  entry means the same for everyone. Over those who train a column, times their share of the weight, as the mean does
  it. A column that too few train to outvote `robust.attackers` of them does not move; `held_columns` counts these.

Cost: on K x K. What methods make of a verdict is in strategies/robust.py.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from fedlora.adapter import Array
from fedlora.errors import MethodError, RoundFailed

__all__ = [
    "COORDINATE_RULES",
    "Verdict",
    "capped_shares",
    "centred_clipping",
    "clients_needed",
    "coordinate_wise",
    "fltrust",
    "geometric_median",
    "hostile_count",
    "krum",
    "norm_bound",
    "norms_of",
    "screen",
    "shortened",
    "squared_distances",
    "squared_distances_to",
]

Float64 = NDArray[np.float64]
COORDINATE_RULES = ("median", "trimmed-mean")
COUNT_CAP = 2.0  # times the median count of examples: no client's weight is above
OUTLIER = 3.5  # sigmas
SIGMA = 1.4826  # of a normal distribution, in median absolute deviations
LEAST_SPREAD = 0.1  # least sigma: of the median norm or distance, or of a cosine
LEAST_DISTANCE = 0.01  # least sigma of distances, of the median norm: nearly equal updates are no outliers
CLIPPINGS = 5
WEISZFELD_STEPS = 500


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What a rule makes of K updates: `weights` `[K]` >= 0 that sum to 1, `scales` `[K]` >= 0, who was flagged for
    what, and who is left out. A client may have no weight and not be left out: the trusted one under fltrust."""

    weights: Float64
    scales: Float64
    flagged: Mapping[int, tuple[str, ...]] = field(default_factory=dict)
    left_out: frozenset[int] = frozenset()


def hostile_count(share: float, clients: int) -> int:
    """How many of `clients` are hostile at this share, rounded up."""
    return math.ceil(share * clients - 1e-9)


def clients_needed(share: float) -> int:
    """The least K with K > 2 f + 2, for f = `hostile_count(share, K)` and a share below one half."""
    return next(k for k in range(3, 10**6) if k > 2 * hostile_count(share, k) + 2)


def capped_shares(counts: Sequence[float]) -> Float64:
    """p_k `[K]` of example counts, none of which counts for more than twice their median."""
    n = np.asarray(counts, np.float64)
    n = np.minimum(n, COUNT_CAP * np.median(n))
    return np.asarray(n / np.sum(n))


def squared_distances(g: Float64) -> Float64:
    """||D_i - D_j||^2 `[K, K]` of a Gram matrix; rounding below zero is zero."""
    norms = np.diagonal(g)
    return np.asarray(np.maximum(norms[:, None] + norms[None, :] - 2.0 * g, 0.0))


def norms_of(g: Float64) -> Float64:
    return np.asarray(np.sqrt(np.maximum(np.diagonal(g), 0.0)))


def shortened(lengths: Float64, bound: float) -> Float64:
    """min(1, bound / length), 1 where the length is zero."""
    return np.asarray(np.minimum(1.0, np.divide(bound, lengths, out=np.ones_like(lengths), where=lengths > 0.0)))


def norm_bound(g: Float64, p: Float64, *, bound: float | None = None) -> Verdict:
    """Updates of Gram matrix `g` `[K, K]` and shares `p` `[K]`, none longer than `bound` (None: their median norm)."""
    norms = norms_of(g)
    return Verdict(weights=p, scales=shortened(norms, float(np.median(norms)) if bound is None else bound))


def _medians_to_others(x: Float64) -> Float64:
    """Each row's median without its diagonal entry; 0 for a single row."""
    if len(x) == 1:
        return np.zeros(1)
    others = x[~np.eye(len(x), dtype=bool)].reshape(len(x), -1)
    return np.asarray(np.median(others, axis=1))


def _sigmas(x: Float64, floor: float) -> Float64:
    """How far each entry is above the median of all, in robust standard deviations of at least `floor`."""
    above = x - np.median(x)
    spread = max(SIGMA * float(np.median(np.abs(above))), floor)
    return np.asarray(above / spread) if spread > 0.0 else np.where(above > 0.0, math.inf, 0.0)


def screen(g: Float64, p: Float64) -> Verdict:
    """Outliers in norm, distance or direction left out, never half of the clients or more; see the module's text."""
    norms, distances = norms_of(g), _medians_to_others(np.sqrt(squared_distances(g)))
    lengths = np.outer(norms, norms)
    cosines = _medians_to_others(np.divide(g, lengths, out=np.zeros_like(g), where=lengths > 0.0))
    size = float(np.median(norms))
    far = max(LEAST_SPREAD * float(np.median(distances)), LEAST_DISTANCE * size)
    signs = {
        "norm": _sigmas(norms, LEAST_SPREAD * size),
        "distance": _sigmas(distances, far),
        "cosine": np.where(cosines < 0.0, _sigmas(-cosines, LEAST_SPREAD), 0.0),
    }
    flagged = {
        i: reasons
        for i in range(len(g))
        if (reasons := tuple(name for name, sigmas in signs.items() if sigmas[i] > OUTLIER))
    }
    worst = sorted(flagged, key=lambda i: (-max(float(s[i]) for s in signs.values()), i))
    out = frozenset(worst[: (len(g) - 1) // 2])
    weights = np.where([i in out for i in range(len(g))], 0.0, p)
    stay = np.array([i in flagged and i not in out for i in range(len(g))])
    scales = np.where(stay, shortened(norms, size), 1.0)
    return Verdict(weights=weights / np.sum(weights), scales=scales, flagged=flagged, left_out=out)


def krum(g: Float64, p: Float64, *, hostile: int, many: bool) -> Verdict:
    """The update that is nearest to its K - hostile - 2 neighbours, or with `many` the K - hostile - 2 best of them.

    Among equals the first. Raises: MethodError unless K > 2 hostile + 2.
    """
    neighbours = len(g) - hostile - 2
    if len(g) <= 2 * hostile + 2:
        raise MethodError(
            f"krum against {hostile} hostile clients needs more than {2 * hostile + 2} updates, got {len(g)}"
        )
    apart = squared_distances(g)
    np.fill_diagonal(apart, math.inf)
    scores = np.sum(np.sort(apart, axis=1)[:, :neighbours], axis=1)
    chosen = np.argsort(scores, kind="stable")[: neighbours if many else 1]
    weights = np.zeros(len(g))
    weights[chosen] = p[chosen] / np.sum(p[chosen])
    out = frozenset(range(len(g))) - frozenset(chosen.tolist())
    return Verdict(
        weights=weights, scales=np.ones(len(g)), flagged=dict.fromkeys(sorted(out), ("score",)), left_out=out
    )


def squared_distances_to(g: Float64, coefficients: Float64) -> Float64:
    """||D_k - sum_j a_j D_j||^2 `[K]`."""
    mixed = g @ coefficients
    return np.asarray(np.maximum(np.diagonal(g) - 2.0 * mixed + coefficients @ mixed, 0.0))


def geometric_median(g: Float64, p: Float64, *, smoothing: float = 1e-6, tolerance: float = 1e-10) -> Verdict:
    """Weights at which the sum of p_k times the distances to the aggregate is least (Weiszfeld).

    Distances below `smoothing` times the median norm count as that; iterations end when no weight moves by more than
    `tolerance`, or after 500.
    """
    apart = squared_distances(g)
    least = smoothing * (float(np.median(norms_of(g))) or 1.0)
    weights = p
    for _ in range(WEISZFELD_STEPS):
        away = apart @ weights - 0.5 * weights @ apart @ weights  # weights sum to 1
        new = p / np.maximum(np.sqrt(np.maximum(away, 0.0)), least)
        new /= np.sum(new)
        moved = float(np.max(np.abs(new - weights)))
        weights = new
        if moved <= tolerance:
            break
    return Verdict(weights=weights, scales=np.ones(len(g)))


def centred_clipping(g: Float64, p: Float64, *, bound: float | None = None) -> Verdict:
    """Five clippings around the aggregate so far, from zero; `bound` None: the median norm.

    Raises: RoundFailed if nothing is left, with a bound of zero and no update at zero.
    """
    tau = float(np.median(norms_of(g))) if bound is None else bound
    a = np.zeros(len(g))
    for _ in range(CLIPPINGS):
        pull = p * shortened(np.sqrt(squared_distances_to(g, a)), tau)
        a = a * (1.0 - np.sum(pull)) + pull
    total = float(np.sum(a))
    if total <= 0.0:
        raise RoundFailed(f"centred-clipping to a norm of {tau:g} leaves nothing of {len(g)} updates.")
    return Verdict(weights=a / total, scales=np.full(len(g), total))


def fltrust(g: Float64, root: int) -> Verdict:
    """Updates weighed by their cosine to that of `root`, where positive, at its norm.

    Raises: RoundFailed if the root's update is zero, or nobody goes its way.
    """
    norms = norms_of(g)
    if norms[root] == 0.0:
        raise RoundFailed(
            "fltrust: the trusted client's update is zero, so there is nothing to hold the others against."
        )
    lengths = norms * norms[root]
    trust = np.maximum(np.divide(g[root], lengths, out=np.zeros(len(g)), where=lengths > 0.0), 0.0)
    out = frozenset(int(i) for i in np.flatnonzero(trust == 0.0))
    trust[root] = 0.0
    if not trust.any():
        raise RoundFailed(
            f"fltrust: none of {len(g) - 1} updates goes the way of the trusted client's; all are left out."
        )
    scales = np.divide(norms[root], norms, out=np.ones(len(g)), where=norms > 0.0)
    return Verdict(
        weights=trust / np.sum(trust), scales=scales, flagged=dict.fromkeys(sorted(out), ("root",)), left_out=out
    )


def coordinate_wise(parts: Sequence[Array], p: Float64, rule: str, attackers: float) -> tuple[Float64, int]:
    """Entry by entry over K arrays `[..., r_k]`: the median, or the mean without the f largest and f smallest.

    Column j is over the clients with r_k > j, times their share of `p`; f is `attackers` of them, rounded up. Where no
    more than 2 f train a column it is zero. Returns the array `[..., max r_k]` and how many columns were held at zero.
    """
    ranks = [x.shape[-1] for x in parts]
    out = np.zeros((*parts[0].shape[:-1], max(ranks)))
    low = held = 0
    for high in sorted({r for r in ranks if r}):
        who = [i for i, r in enumerate(ranks) if r >= high]
        f = hostile_count(attackers, len(who))
        if len(who) <= 2 * f:
            held += high - low
        else:
            x = np.stack([parts[i][..., low:high].astype(np.float64) for i in who])
            centre = np.median(x, axis=0) if rule == "median" else np.mean(np.sort(x, axis=0)[f : len(who) - f], axis=0)
            out[..., low:high] = float(np.sum(p[who])) * centre
        low = high
    return out, held
