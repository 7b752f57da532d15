"""Robust rules in product space: whole updates are weighed, shortened or left out, by their inner products alone.

    W_eff moves by sum_k w_k c_k D_k,    w_k >= 0, sum_k w_k = 1,    G_ij = <D_i, D_j> over all modules and the head

D_k is what client k's product moved by, and G comes from its factors (`strategies/gram.py`), at any ranks and scales. A
rule is a function of G and the p_k; the method under it folds the same answers as ever, with other weights. Let d_k be
the distance of D_k to the aggregate, and tau the bound, by default the median of the round's norms.

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

Where we differ from all of these: they weigh or sort vectors of parameters; ours are products, since (B M)(M^-1 A) =
BA and a median of factors has nothing to do with the updates. And:

- p_k = n_k / sum n is of counts that nobody can check, so here no count is above twice the median count: without that,
  one integer beats every rule.
- c_k is exact where one factor moves or the product began at zero. Where a client moves both factors from a given
  start, it is made to go the share t of its way at which its product has moved c_k ||D_k|| (bisection on t^2 ||P||^2
  + 2 t^3 <P, Q> + t^4 ||Q||^2): the direction turns a little.
- Methods that average factors (fedit, frlora, hetlora, lora-fair) can be hurt by factors whose product looks honest: A
  times 1,000, B divided by it. There the way of both factors, over the root of the rank, is bounded by three times its
  median.
- hetlora weighs updates by the norms of their products and not by examples, so rules that do no more than leave out or
  shorten go with it (norm-bound, screen, krum, multi-krum), and those that weigh do not.

Everyone left out, or a trusted client that is missing: RoundFailed, so that the round is repeated once and then the
run pauses with its last state. No rule sees a backdoor in an update that looks like the others. A rule must see each
update, so it does not go with secure aggregation.

`Closed.clients` gets for each client `robust_weight` w_k, `robust_scale` (the share of its way that counted), `norm`
||D_k||, `cosine` to the aggregate, `quarantined` (1: left out) and `flagged_norm`, `flagged_distance`,
`flagged_cosine`, `flagged_score`, `flagged_root` = 1 for what it was flagged for; the report gets the counts
`quarantined` and `rescaled`; `state.memory["robust"]` counts the rounds in which each client was left out.

Cost: the Gram matrix, O((out + in) R^2) per module with R the sum of the updates' ranks, and rules on K x K. Answers
are decoded one at a time, once for the Gram matrix and once for the fold; a large round, whose float64 factors would
need more than 1 GiB, takes several passes over groups of modules.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np
from numpy.typing import NDArray

from fedlora.adapter import Adapter, Array, Factors
from fedlora.config import RobustConfig
from fedlora.errors import MethodError, RoundFailed
from fedlora.state import Answer, Ask, GlobalState, Layout, TrainPlan, keyed
from strategies.base import Closed, Cohort, Method, Round
from strategies.gram import gram, head_change_of, plan_of, require_known, squared_at, step_of, stepped, way_to

__all__ = [
    "COORDINATE_RULES",
    "MEMORY",
    "WEIGHING_RULES",
    "Verdict",
    "capped_shares",
    "centred_clipping",
    "clients_needed",
    "coordinate_wise",
    "fltrust",
    "geometric_median",
    "guarded",
    "hostile_count",
    "krum",
    "norm_bound",
    "pair_mistake",
    "screen",
    "squared_distances",
]

Float64 = NDArray[np.float64]
COORDINATE_RULES = ("median", "trimmed-mean")
WEIGHING_RULES = ("geometric-median", "centred-clipping", "fltrust")
MEMORY = "robust"  # owner of the quarantine counts in GlobalState.memory
COUNT_CAP = 2.0  # times the median count of examples: no client's weight is above
OUTLIER = 3.5  # sigmas
SIGMA = 1.4826  # of a normal distribution, in median absolute deviations
LEAST_SPREAD = 0.1  # least sigma: of the median norm or distance, or of a cosine
LEAST_DISTANCE = 0.01  # least sigma of distances, of the median norm: nearly equal updates are no outliers
CLIPPINGS = 5
WEISZFELD_STEPS = 500
FACTOR_CAP = 3.0  # times the median way of both factors
WEIGHT_UNITS = 2**40  # weights travel to the method as whole numbers of these
PASS_BYTES = 2**30  # of float64 factors held at a time


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


def _norms(g: Float64) -> Float64:
    return np.asarray(np.sqrt(np.maximum(np.diagonal(g), 0.0)))


def _shortened(lengths: Float64, bound: float) -> Float64:
    """min(1, bound / length), 1 where the length is zero."""
    return np.asarray(np.minimum(1.0, np.divide(bound, lengths, out=np.ones_like(lengths), where=lengths > 0.0)))


def norm_bound(g: Float64, p: Float64, *, bound: float | None = None) -> Verdict:
    """Updates of Gram matrix `g` `[K, K]` and shares `p` `[K]`, none longer than `bound` (None: their median norm)."""
    norms = _norms(g)
    return Verdict(weights=p, scales=_shortened(norms, float(np.median(norms)) if bound is None else bound))


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
    norms, distances = _norms(g), _medians_to_others(np.sqrt(squared_distances(g)))
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
    scales = np.where(stay, _shortened(norms, size), 1.0)
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


def _squared_distances_to(g: Float64, coefficients: Float64) -> Float64:
    """||D_k - sum_j a_j D_j||^2 `[K]`."""
    mixed = g @ coefficients
    return np.asarray(np.maximum(np.diagonal(g) - 2.0 * mixed + coefficients @ mixed, 0.0))


def geometric_median(g: Float64, p: Float64, *, smoothing: float = 1e-6, tolerance: float = 1e-10) -> Verdict:
    """Weights at which the sum of p_k times the distances to the aggregate is least (Weiszfeld).

    Distances below `smoothing` times the median norm count as that; iterations end when no weight moves by more than
    `tolerance`, or after 500.
    """
    apart = squared_distances(g)
    least = smoothing * (float(np.median(_norms(g))) or 1.0)
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
    tau = float(np.median(_norms(g))) if bound is None else bound
    a = np.zeros(len(g))
    for _ in range(CLIPPINGS):
        pull = p * _shortened(np.sqrt(_squared_distances_to(g, a)), tau)
        a = a * (1.0 - np.sum(pull)) + pull
    total = float(np.sum(a))
    if total <= 0.0:
        raise RoundFailed(f"centred-clipping to a norm of {tau:g} leaves nothing of {len(g)} updates.")
    return Verdict(weights=a / total, scales=np.full(len(g), total))


def fltrust(g: Float64, root: int) -> Verdict:
    """Updates weighed by their cosine to that of `root`, where positive, at its norm.

    Raises: RoundFailed if the root's update is zero, or nobody goes its way.
    """
    norms = _norms(g)
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


def pair_mistake(method: str, rule: str) -> str | None:
    """Why this method and this rule cannot go together, and which methods can; None if they can."""
    if rule == "none":
        return None
    if rule in COORDINATE_RULES and method != "ffa-lora":
        return (
            f"{rule} goes with ffa-lora only, where all clients stand on one frozen A and an entry of B means the same "
            f"for everyone; the method is {method}. Rules in product space (norm-bound, screen, krum, multi-krum, "
            "geometric-median, centred-clipping, fltrust) go with any method that sends what it trains"
        )
    if rule in WEIGHING_RULES and method == "hetlora":
        return (
            f"{rule} is a matter of weights, and hetlora weighs updates by their own norms: use norm-bound, screen, "
            "krum or multi-krum, or another method"
        )
    if method == "fedsa-lora":
        return (
            f"{rule} needs the product of every update, and fedsa-lora's B stays with the clients: use rule none, or "
            "any other method"
        )
    return None


def guarded(method: Method, settings: RobustConfig) -> Method:
    """The same method under a robust rule: the same asks go out, other weights and lengths come back (module's text).

    Raises: MethodError if the two cannot go together, or fltrust has no trusted client; in a round, if the product of
    an update cannot be known, too few clients are asked for the rule, or the trusted one is not among them; RoundFailed
    if too few answered for the rule, the trusted client did not, or all are left out.
    """
    if settings.rule == "none":
        return method
    wrong = pair_mistake(method.name, settings.rule)
    if wrong is None and method.personal:
        wrong = f"{settings.rule} needs a common model, and {method.name} has none: use rule none, or another method"
    if wrong is None and settings.rule == "fltrust" and settings.trusted is None:
        wrong = "fltrust holds all updates against one client's: name it in robust.trusted, e.g. client-00000"
    if wrong is not None:
        raise MethodError(wrong)
    return replace(method, protocol=partial(_protocol, method, settings))


def _protocol(method: Method, settings: RobustConfig, state: GlobalState, cohort: Cohort) -> Round:
    inside = method.protocol(state, cohort)
    asks = next(inside)
    report: dict[str, float] = {"quarantined": 0.0, "rescaled": 0.0}
    facts: dict[str, dict[str, float]] = {}
    while True:
        _require_askable(asks, settings)
        answers = yield asks
        view: Mapping[str, Answer] = answers
        if answers:
            if settings.rule in COORDINATE_RULES:
                view, told, counts = _combined(asks, answers, state.layout, settings)
            else:
                view, told, counts = _weighed(asks, answers, state.layout, settings)
            for client, told_now in told.items():
                out = max(told_now["quarantined"], facts.get(client, {}).get("quarantined", 0.0))
                facts[client] = {**facts.get(client, {}), **told_now, "quarantined": out}
            report |= counts
            report["quarantined"] = sum(f["quarantined"] for f in facts.values())
        try:
            asks = inside.send(view)
        except StopIteration as end:
            closed: Closed = end.value
            break
    before = state.memory.get(MEMORY, {})
    out_now = {c for c, f in facts.items() if f["quarantined"]}
    counted = {
        c: np.array([(float(before[c][0]) if c in before else 0.0) + (c in out_now)], np.float32)
        for c in sorted(before.keys() | out_now)
    }
    return Closed(
        state=replace(closed.state, memory={**closed.state.memory, MEMORY: counted}),
        report={**closed.report, **report},
        clients={c: {**closed.clients.get(c, {}), **facts.get(c, {})} for c in sorted({*closed.clients, *facts})},
    )


def _require_askable(asks: Mapping[str, Ask], settings: RobustConfig) -> None:
    """Raises: MethodError if no set of answers to these asks could be judged."""
    for ask in asks.values():
        require_known(plan_of(ask))
    f = hostile_count(settings.attackers, len(asks))
    if settings.rule in ("krum", "multi-krum") and len(asks) <= 2 * f + 2:
        raise MethodError(
            f"{settings.rule} at robust.attackers = {settings.attackers:g} needs at least "
            f"{clients_needed(settings.attackers)} clients a round, more than 2 f + 2 with f hostile ones; {len(asks)} "
            f"are asked, and f is {f}. Ask more clients, lower robust.attackers, or use geometric-median"
        )
    if settings.rule in COORDINATE_RULES and len(asks) <= 2 * f:
        raise MethodError(
            f"{settings.rule} at robust.attackers = {settings.attackers:g} needs more than {2 * f} clients a round, "
            f"and {len(asks)} are asked"
        )
    if settings.rule == "fltrust" and settings.trusted not in asks:
        raise MethodError(
            f"fltrust: the trusted client {settings.trusted} is not among the {len(asks)} that are asked; does a "
            "client of that id take part, and in every round (rounds.fraction = 1)?"
        )


def _require_judgeable(asks: Mapping[str, Ask], clients: Sequence[str], settings: RobustConfig) -> None:
    """Raises: RoundFailed if too few answered, or the trusted client did not."""
    f = hostile_count(settings.attackers, len(asks))
    least = {"krum": 2 * f + 2, "multi-krum": 2 * f + 2, "median": 2 * f, "trimmed-mean": 2 * f}.get(settings.rule, 0)
    if len(clients) <= least:
        raise RoundFailed(
            f"{settings.rule} against {f} hostile clients needs more than {least} answers, and {len(clients)} of "
            f"{len(asks)} clients answered."
        )
    if settings.rule == "fltrust" and settings.trusted not in clients:
        raise RoundFailed(f"fltrust: the trusted client {settings.trusted} did not answer.")


def _judged(g: Float64, p: Float64, clients: Sequence[str], asked: int, settings: RobustConfig) -> Verdict:
    f = hostile_count(settings.attackers, asked)
    if settings.rule == "norm-bound":
        return norm_bound(g, p, bound=settings.bound)
    if settings.rule == "screen":
        return screen(g, p)
    if settings.rule in ("krum", "multi-krum"):
        return krum(g, p, hostile=f, many=settings.rule == "multi-krum")
    if settings.rule == "geometric-median":
        return geometric_median(g, p)
    if settings.rule == "centred-clipping":
        return centred_clipping(g, p, bound=settings.bound)
    assert settings.trusted is not None  # guarded
    return fltrust(g, list(clients).index(settings.trusted))


@dataclass
class _Seen:
    """What the first pass over the answers leaves: K x K, and four numbers for each client."""

    gram: Float64
    polynomial: Float64  # [K, 3]: ||P||^2, <P, Q>, ||Q||^2 where both factors move, the head's in the first
    ways: Float64  # [K]: root of the squared way of both factors over the rank; 0 where only one moves
    counts: list[int]


def _weighed(
    asks: Mapping[str, Ask], answers: Mapping[str, Answer], layout: Layout, settings: RobustConfig
) -> tuple[Mapping[str, Answer], dict[str, dict[str, float]], dict[str, float]]:
    """The answers as a rule in product space has them read, facts about each client, and counts for the report."""
    clients = sorted(answers)
    _require_judgeable(asks, clients, settings)
    seen = _looked_at(asks, answers, clients, layout)
    verdict = _judged(seen.gram, capped_shares(seen.counts), clients, len(asks), settings)
    units = np.floor(verdict.weights * WEIGHT_UNITS).astype(np.int64)
    steps = _steps(seen, verdict, units > 0)
    kept = {c: (int(units[i]), float(steps[i])) for i, c in enumerate(clients) if units[i]}
    norms = _norms(seen.gram)
    lengths = np.sqrt(np.maximum(squared_at(seen.polynomial, steps), 0.0))
    used = verdict.weights * np.divide(lengths, norms, out=np.ones_like(norms), where=norms > 0.0)
    facts = _facts(clients, seen.gram, seen.gram @ used, float(used @ seen.gram @ used))
    for i, c in enumerate(clients):
        facts[c] |= {
            "robust_weight": float(verdict.weights[i]),
            "robust_scale": float(steps[i]),
            "quarantined": float(i in verdict.left_out),
            **{f"flagged_{reason}": 1.0 for reason in verdict.flagged.get(i, ())},
        }
    rescaled = float(sum(t != 1.0 for _, t in kept.values()))
    return _Weighed(answers, asks, layout, kept), facts, {"rescaled": rescaled}


def _facts(clients: Sequence[str], g: Float64, to_mean: Float64, squared_mean: float) -> dict[str, dict[str, float]]:
    """Norms, and cosines to the aggregate from its inner products `to_mean` `[K]` and its squared norm."""
    norms = _norms(g)
    lengths = norms * math.sqrt(max(squared_mean, 0.0))
    cosines = np.clip(np.divide(to_mean, lengths, out=np.zeros_like(norms), where=lengths > 0.0), -1.0, 1.0)
    return {c: {"norm": float(norms[i]), "cosine": float(cosines[i])} for i, c in enumerate(clients)}


class _Weighed(Mapping[str, Answer]):
    """The answers of those who are kept, each decoded when it is read, with the rule's weight and share of its way."""

    def __init__(
        self,
        answers: Mapping[str, Answer],
        asks: Mapping[str, Ask],
        layout: Layout,
        kept: Mapping[str, tuple[int, float]],
    ) -> None:
        self._answers, self._asks, self._layout, self._kept = answers, asks, layout, kept

    def __getitem__(self, client: str) -> Answer:
        weight, t = self._kept[client]
        answer = self._answers[client]
        return replace(answer, examples=weight, arrays=stepped(self._asks[client], answer, self._layout, t))

    def __iter__(self) -> Iterator[str]:
        return iter(self._kept)

    def __len__(self) -> int:
        return len(self._kept)


def _looked_at(asks: Mapping[str, Ask], answers: Mapping[str, Answer], clients: Sequence[str], layout: Layout) -> _Seen:
    """The first pass; several over groups of modules where one would hold too much."""
    k = len(clients)
    seen = _Seen(np.zeros((k, k)), np.zeros((k, 3)), np.zeros(k), [0] * k)
    for first, names in _groups(asks, clients, layout):
        updates: list[Adapter] = []
        heads: list[Mapping[str, Array]] = []
        for i, client in enumerate(clients):
            ask, answer = asks[client], answers[client]
            steps = {n: step_of(ask, answer, n, layout.modules[n]) for n in names}
            updates.append(Adapter({n: s.update for n, s in steps.items()}))
            if first:
                seen.counts[i] = answer.examples
                heads.append(head_change_of(ask, answer))
                seen.polynomial[i, 0] += sum(float(np.sum(h**2)) for h in heads[-1].values())
            for s in steps.values():
                if s.second is not None:
                    seen.polynomial[i] += s.polynomial
                    seen.ways[i] += s.factors / max(s.second.rank, 1)
        seen.gram += gram(updates, heads)
    seen.ways = np.sqrt(seen.ways)
    _require_finite(seen.gram, clients)
    linear = seen.ways == 0.0
    seen.polynomial[linear, 0] = np.diagonal(seen.gram)[linear]
    return seen


def _require_finite(g: Float64, clients: Sequence[str]) -> None:
    wrong = [c for c, x in zip(clients, np.diagonal(g), strict=True) if not np.isfinite(x)]
    if wrong:
        raise MethodError(f"the updates of {', '.join(wrong[:5])} are not finite, so nothing can be compared")


def _update_rank(plan: TrainPlan) -> int:
    """Of the update of one module: twice the client's where both factors moved from a start that is not zero."""
    return plan.rank * (2 if {"A", "B"} <= set(plan.send) and plan.b_from != "zero" else 1)


def _groups(asks: Mapping[str, Ask], clients: Sequence[str], layout: Layout) -> Iterator[tuple[bool, list[str]]]:
    """Modules in groups whose float64 factors of all clients stay below `PASS_BYTES`, and whether it is the first."""
    ranks = sum(_update_rank(plan_of(asks[c])) for c in clients)
    group: list[str] = []
    held, first = 0, True
    for name, module in sorted(layout.modules.items()):
        size = 8 * ranks * (module.out + module.inp)
        if group and held + size > PASS_BYTES:
            yield first, group
            group, held, first = [], 0, False
        group.append(name)
        held += size
    yield first, group


def _steps(seen: _Seen, verdict: Verdict, kept: NDArray[np.bool_]) -> Float64:
    """The share of its way at which each update has `scales` times its norm, within the bound on both factors."""
    whole = squared_at(seen.polynomial, np.ones(len(kept)))
    bent = (seen.ways > 0.0) & (verdict.scales != 1.0)
    t = np.where(bent, way_to(seen.polynomial, verdict.scales**2 * whole), verdict.scales)
    both = kept & (seen.ways > 0.0)
    if both.any():
        most = FACTOR_CAP * float(np.median(seen.ways[both]))
        t = np.where(both, np.minimum(t, np.divide(most, seen.ways, out=np.ones_like(t), where=both)), t)
    return np.asarray(t)


def _combined(
    asks: Mapping[str, Ask], answers: Mapping[str, Answer], layout: Layout, settings: RobustConfig
) -> tuple[Mapping[str, Answer], dict[str, dict[str, float]], dict[str, float]]:
    """One answer in place of all, by a rule on entries of changes of B on a common A; facts, and the columns held."""
    clients = sorted(answers)
    _require_judgeable(asks, clients, settings)
    k, held = len(clients), 0
    counts = [0] * k
    shares = np.zeros(k)
    g = np.zeros((k + 1, k + 1))
    arrays: dict[str, Array] = {}
    for first, names in _groups(asks, clients, layout):
        updates: list[dict[str, Factors]] = []
        heads: list[Mapping[str, Array]] = []
        for i, client in enumerate(clients):
            ask, answer = asks[client], answers[client]
            updates.append({n: step_of(ask, answer, n, layout.modules[n]).update for n in names})
            if first:
                counts[i] = answer.examples
                heads.append(head_change_of(ask, answer))
        if first:
            shares = capped_shares(counts)
        mean: dict[str, Factors] = {}
        for n in names:
            b, columns = coordinate_wise([u[n].b for u in updates], shares, settings.rule, settings.attackers)
            held += columns
            mean[n] = Factors(max((u[n] for u in updates), key=lambda f: f.rank).a, b, updates[0][n].scale)
            arrays[f"B:{n}"] = b.astype(np.float32)
        centre: dict[str, Float64] = {}
        for n in heads[0] if heads else ():
            flat = [h[n].reshape(-1, 1) for h in heads]
            centre[n] = coordinate_wise(flat, shares, settings.rule, settings.attackers)[0].reshape(heads[0][n].shape)
        arrays |= keyed("head", {n: x.astype(np.float32) for n, x in centre.items()})
        every = [*heads, centre] if heads else []
        g += gram([Adapter(u) for u in [*updates, mean]], every)
    _require_finite(g, [*clients, "the aggregate"])
    facts = _facts(clients, g[:k, :k], g[:k, k], float(g[k, k]))
    for i, c in enumerate(clients):
        facts[c] |= {"robust_weight": float(shares[i]), "robust_scale": 1.0, "quarantined": 0.0}
    largest = max(clients, key=lambda c: plan_of(asks[c]).rank)
    return {largest: Answer(examples=1, arrays=arrays)}, facts, {"held_columns": float(held)}
