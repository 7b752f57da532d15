"""Robust rules in product space: whole updates are weighed, shortened or left out, by their inner products alone.

    W_eff moves by sum_k w_k c_k D_k,    w_k >= 0, sum_k w_k = 1,    G_ij = <D_i, D_j> over all modules and the head

D_k is what client k's product moved by, and G comes from its factors (`strategies/gram.py`), at any ranks and scales. A
rule is a function of G and the p_k; the method under it folds the same answers as ever, with other weights. What each
rule is, and its source: strategies/robust_rules.py.

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
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
from numpy.typing import NDArray

from fedlora.adapter import Adapter, Array, Factors
from fedlora.config import RobustConfig
from fedlora.errors import MethodError, RoundFailed
from fedlora.state import Answer, Ask, GlobalState, Layout, TrainPlan, keyed
from strategies.base import Closed, Cohort, Method, Round
from strategies.gram import gram, head_change_of, plan_of, require_known, squared_at, step_of, stepped, way_to
from strategies.robust_rules import (
    COORDINATE_RULES,
    Verdict,
    capped_shares,
    centred_clipping,
    clients_needed,
    coordinate_wise,
    fltrust,
    geometric_median,
    hostile_count,
    krum,
    norm_bound,
    norms_of,
    screen,
)

__all__ = ["MEMORY", "WEIGHING_RULES", "guarded", "pair_mistake"]

Float64 = NDArray[np.float64]
WEIGHING_RULES = ("geometric-median", "centred-clipping", "fltrust")
MEMORY = "robust"  # owner of the quarantine counts in GlobalState.memory
FACTOR_CAP = 3.0  # times the median way of both factors
WEIGHT_UNITS = 2**40  # weights travel to the method as whole numbers of these
PASS_BYTES = 2**30  # of float64 factors held at a time


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
    norms = norms_of(seen.gram)
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
    norms = norms_of(g)
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
