"""Clients' answers as updates of the product, and the K x K matrix of their inner products, from factors alone.

    <D_i, D_j> = sum over modules of s_i s_j <B_i A_i, B_j A_j>_F = s_i s_j sum((B_i^T B_j) o (A_i A_j^T))

With Bc = [s_1 B_1 ... s_K B_K] side by side and Ac = [A_1; ...; A_K] below one another, H = (Bc^T Bc) o (Ac Ac^T),
and the sums of H over the clients' blocks are the Gram matrix G: ranks may differ, and no product is formed. All that
robust rules ask for follows from G: norms, distances, cosines, medians of updates.

An update D is what the client's product moved by, from what it was sent to what it trained: the same whatever factors
((B M)(M^-1 A) = B A) and scales stand for it, and frozen rows, blocks and factors cancel, because they did not move. A
dense head's change counts as one more module.

Source: the trace identity <X, Y> = tr(X^T Y), cyclic; no paper's.
Everything is float64: updates that differ by 1e-4 of their norm have a squared distance of 1e-8 of it, which float32
does not see.

Cost per module, with R the sum of the updates' ranks: O((out + in) R^2) time, (out + in) R float64 of memory, and tiles
of H of at most 2,048 rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from fedlora.adapter import Adapter, Array, Factors, inner, require_same_modules
from fedlora.errors import MethodError
from fedlora.rng import public_orthonormal
from fedlora.state import Answer, Ask, Layout, Module, TrainPlan, part

__all__ = [
    "Step",
    "gram",
    "head_change_of",
    "plan_of",
    "require_known",
    "squared_at",
    "start_of",
    "step_of",
    "stepped",
    "update_of",
    "way_to",
]

Float64 = NDArray[np.float64]
TILE = 2048  # rows of H at a time
DOUBLINGS, HALVINGS = 60, 100


def gram(updates: Sequence[Adapter], heads: Sequence[Mapping[str, Array]] = ()) -> Float64:
    """Inner products of K updates, `[K, K]` float64: over all modules together, and the changes of dense heads if
    given.

    Ranks may differ, also from module to module, and may be 0. Modules are taken one at a time.
    Raises: AdapterError if modules or shapes differ; MethodError if there are heads, but not one for each update.
    """
    if heads and len(heads) != len(updates):
        raise MethodError(f"a Gram matrix of {len(updates)} updates needs as many heads or none, got {len(heads)}")
    total = np.zeros((len(updates), len(updates)))
    for other in updates[1:]:
        require_same_modules(updates[0], other)
    for name in updates[0] if updates else ():
        _add_products(total, [u[name] for u in updates])
    for name in heads[0] if heads else ():
        flat = np.stack([h[name].astype(np.float64).reshape(-1) for h in heads])
        total += flat @ flat.T
    return (total + total.T) / 2.0


def _add_products(total: Float64, factors: Sequence[Factors]) -> None:
    """Add one module's inner products, tile by tile."""
    live = [i for i, f in enumerate(factors) if f.rank]
    if not live:
        return
    a = np.concatenate([factors[i].a for i in live], dtype=np.float64)
    b = np.concatenate([factors[i].b.T for i in live], dtype=np.float64)
    scale = np.repeat([factors[i].scale for i in live], [factors[i].rank for i in live])
    b *= scale[:, None]
    tiles = _tiles([factors[i].rank for i in live])
    for x, (rows, firsts, at) in enumerate(tiles):
        for columns, seconds, to in tiles[x:]:
            h = b[rows] @ b[columns].T
            h *= a[rows] @ a[columns].T
            block = np.add.reduceat(np.add.reduceat(h, firsts, axis=0), seconds, axis=1)
            where = np.ix_(live[at], live[to])
            total[where] += block
            if rows != columns:
                total[where[1].T, where[0].T] += block.T


def _tiles(ranks: Sequence[int]) -> list[tuple[slice, list[int], slice]]:
    """Neighbouring clients of at most `TILE` ranks together: (rows of H, where each begins in them, which clients)."""
    tiles: list[tuple[slice, list[int], slice]] = []
    begin = first = 0
    firsts: list[int] = []
    row = 0
    for i, rank in enumerate(ranks):
        if firsts and row + rank - begin > TILE:
            tiles.append((slice(begin, row), firsts, slice(first, i)))
            begin, first, firsts = row, i, []
        firsts.append(row - begin)
        row += rank
    return [*tiles, (slice(begin, row), firsts, slice(first, len(ranks)))]


@dataclass(frozen=True, kw_only=True)
class Step:
    """How far one answer moves one module's product, in float64.

    Where only one factor moves, or the product starts at zero, the update is linear in what was sent. Where both move,
    a client that goes only the share t of its way moves the product by `t first + t^2 second`; `factors` is then the
    squared Frobenius norm of what both factors moved by.
    """

    update: Factors
    first: Factors | None = None  # dB A0 + B0 dA
    second: Factors | None = None  # dB dA
    factors: float = 0.0

    @property
    def polynomial(self) -> Float64:
        """`[3]`: ||first||^2, <first, second> and ||second||^2; if the update is linear, ||update||^2, 0, 0."""
        if self.first is None or self.second is None:
            return np.array([_inner(self.update, self.update), 0.0, 0.0])
        pairs = ((self.first, self.first), (self.first, self.second), (self.second, self.second))
        return np.array([_inner(x, y) for x, y in pairs])


def squared_at(polynomials: Float64, t: Float64) -> Float64:
    """Squared norms `[K]` of K updates after the shares `t` `[K]` of their ways, from `Step.polynomial` `[K, 3]`."""
    p, pq, q = polynomials.T
    return np.asarray(t**2 * p + 2.0 * t**3 * pq + t**4 * q)


def way_to(polynomials: Float64, squared: Float64) -> Float64:
    """Shares `[K]`, 0 or more, of K ways at which the updates have the squared norms `squared` `[K]`; by bisection.

    Where an update is zero all along its way the share is 1.
    """
    moves = squared_at(polynomials, np.ones(len(squared))) > 0.0
    low, high = np.zeros(len(squared)), np.ones(len(squared))
    for _ in range(DOUBLINGS):
        high = np.where(moves & (squared_at(polynomials, high) < squared), 2.0 * high, high)
    for _ in range(HALVINGS):
        middle = 0.5 * (low + high)
        beyond = squared_at(polynomials, middle) >= squared
        low, high = np.where(beyond, low, middle), np.where(beyond, middle, high)
    return np.where(moves, high, 1.0)


def _inner(x: Factors, y: Factors) -> float:
    return inner(Adapter({"": x}), Adapter({"": y}))


def require_known(plan: TrainPlan) -> None:
    """Raises: MethodError if the server cannot know the product that a client trains under this plan."""
    parts = ("A", "B", "R")
    kept = [p for p in parts if p in plan.keep]
    unsent = [p for p in parts if p in plan.train and p not in plan.send]
    who = f"{plan.method}: the product of a client's update cannot be known, "
    if kept:
        raise MethodError(f"{who}because {' and '.join(kept)} stays with it; use a method that sends what it trains")
    if unsent:
        raise MethodError(f"{who}because {' and '.join(unsent)} is trained, but not sent")
    if plan.core and ("A" in plan.train or "B" in plan.train):
        raise MethodError(f"{who}because it trains more than the core between its bases")
    if plan.a_from == "fresh" and ("A" not in plan.send or {"A", "B"} & set(plan.changes) or plan.b_from != "zero"):
        raise MethodError(f"{who}because only the client knows the fresh A that it started from")


def update_of(ask: Ask, answer: Answer, layout: Layout) -> Adapter:
    """What a client's product moved by, factored in float64: `s B A` as trained minus as it began.

    A part that is not sent was not trained and is what the ask gave, or what the public generator makes of the plan's
    seed. The rank is r where one factor moved or the product began at zero, else 2 r.
    Raises: MethodError as `require_known`, and if the ask has no plan.
    """
    require_known(plan_of(ask))
    return Adapter({n: step_of(ask, answer, n, m).update for n, m in layout.modules.items()})


def head_change_of(ask: Ask, answer: Answer) -> dict[str, Float64]:
    """What the dense head moved by, in float64; empty if it is not sent."""
    sent = {name: x.astype(np.float64) for name, x in part(answer.arrays, "head").items()}
    if "head" in plan_of(ask).changes:
        return sent
    start = part(ask.arrays, "head")
    return {name: x - start[name].astype(np.float64) for name, x in sent.items()}


def plan_of(ask: Ask) -> TrainPlan:
    """The plan of an ask to train. Raises: MethodError if it has none."""
    if ask.plan is None:
        raise MethodError("an ask without a plan trains nothing, so its answer holds no update")
    return ask.plan


def start_of(ask: Ask, name: str, module: Module) -> tuple[Float64, Float64]:
    """A `[rows, in]` and B `[out, rows]` that the client began with; empty where it made A and its product was zero.

    Raises: MethodError if the ask does not carry what its plan starts from.
    """
    plan = plan_of(ask)
    if plan.a_from == "fresh":
        return np.zeros((0, module.inp)), np.zeros((module.out, 0))
    a = _basis(plan.a_seed, "basis", name, plan.rows, module.inp) if plan.a_from == "public" else _given(ask, "A", name)
    if plan.b_from == "zero":
        return a, np.zeros((module.out, plan.rows))
    if plan.b_from == "public":
        return a, _basis(plan.a_seed, "basis-b", name, plan.rows, module.out).T
    return a, _given(ask, "B", name)


def step_of(ask: Ask, answer: Answer, name: str, module: Module) -> Step:
    """One module of an answer whose plan has passed `require_known`."""
    plan = plan_of(ask)
    a0, b0 = start_of(ask, name, module)
    a, b, r = (_sent(answer, p, name) for p in ("A", "B", "R"))
    if not {"A", "B", "R"} & set(plan.send):
        return Step(update=Factors(a0[:0], b0[:, :0]))
    if plan.core:
        r0 = np.zeros_like(r) if "R" in plan.changes else _given(ask, "R", name)[: len(r), : len(r)]
        return Step(update=Factors(a0[: len(r)], b0[:, : len(r)] @ (r - r0), plan.scale))
    rank = len(a) if "A" in plan.send else b.shape[1]
    if plan.b_from == "zero":
        if "A" not in plan.send or "A" in plan.changes:
            a = a0[:rank] + (a if "A" in plan.send else 0.0)
        return Step(update=Factors(a, b if "B" in plan.send else b0[:, :rank], plan.scale))
    if _free(plan):
        ends = np.concatenate([a, a0[: plan.rank]]), np.concatenate([b, -b0[:, : plan.rank]], axis=1)
        return Step(update=Factors(*ends, plan.scale))
    a0, b0 = a0[:rank], b0[:, :rank]
    da = a if "A" in plan.changes or "A" not in plan.send else a - a0
    db = b if "B" in plan.changes or "B" not in plan.send else b - b0
    if "A" not in plan.send:
        return Step(update=Factors(a0, db, plan.scale))
    if "B" not in plan.send:
        return Step(update=Factors(da, b0, plan.scale))
    left = np.concatenate([db, b0], axis=1)
    return Step(
        update=Factors(np.concatenate([a0 + da, da]), left, plan.scale),
        first=Factors(np.concatenate([a0, da]), left, plan.scale),
        second=Factors(da, db, plan.scale),
        factors=float(np.sum(da**2) + np.sum(db**2)),
    )


def stepped(ask: Ask, answer: Answer, layout: Layout, t: float) -> dict[str, Array]:
    """The answer's arrays if the client had gone only the share `t` of its way (beyond 1: further; below 0: back).

    Where only one factor moves, or the product began at zero, or the plan says that only the product counts (its
    feedback is "product"), the update is `t` times what it was; in the last case the answer's rank may grow by that of
    the start. Elsewhere both factors go the share `t`, and the product moves by `t first + t^2 second` (see `Step`).
    The head's change is `t` times what it was. Raises: MethodError as `require_known`.
    """
    plan = plan_of(ask)
    require_known(plan)
    if t == 1.0:
        return dict(answer.arrays)
    out: dict[str, Array] = {}
    for key, x in answer.arrays.items():
        which, name = key.split(":", 1)
        new = x.astype(np.float64)
        if which in "AB" and _free(plan):
            a0, b0 = start_of(ask, name, layout.modules[name])
            if which == "A":
                new = np.concatenate([new, a0[: plan.rank]])
            else:
                new = np.concatenate([t * new, (1.0 - t) * b0[:, : plan.rank]], axis=1)
        elif plan.b_from == "zero" and which in "AB":
            new = new * (t if which == "B" else 1.0)
        elif which in plan.changes:
            new = t * new
        else:
            start = ask.arrays[key].astype(np.float64)[tuple(slice(n) for n in x.shape)]
            new = start + t * (new - start)
        out[key] = new.astype(x.dtype)
    return out


def _free(plan: TrainPlan) -> bool:
    """Whether only the product counts, whatever its rank: whole factors are sent, and they need not be averaged."""
    whole = {"A", "B"} <= set(plan.send) - set(plan.changes)
    return plan.feedback == "product" and plan.b_from != "zero" and whole


def _sent(answer: Answer, which: str, name: str) -> Float64:
    """One array of an answer in float64; empty if it was not sent."""
    x = answer.arrays.get(f"{which}:{name}")
    return np.zeros((0, 0)) if x is None else x.astype(np.float64)


def _given(ask: Ask, which: str, name: str) -> Float64:
    key = f"{which}:{name}"
    if key not in ask.arrays:
        raise MethodError(f"the plan starts from {key}, which its ask does not carry")
    return ask.arrays[key].astype(np.float64)


@lru_cache(maxsize=4096)
def _basis(seed: int, purpose: str, name: str, rows: int, cols: int) -> Float64:
    """Public rows as clients hold them: rounded to float32."""
    basis = public_orthonormal(seed, purpose, name, rows=rows, cols=cols).astype(np.float32).astype(np.float64)
    basis.flags.writeable = False
    return basis
