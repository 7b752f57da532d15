"""Error feedback: what a codec leaves out of one message is added to the next one, so that sums are kept.

    sent_t = Q(x_t + e_t),    e_{t+1} = x_t + e_t - sent_t,    hence    sum of sent + e_T = sum of x

for any rounding Q and e_0 = 0: what is missing at the end is one error, not the sum of all. Without a memory, what Q
rounds away every time never arrives. Seide et al., "1-Bit Stochastic Gradient Descent and its Application to
Data-Parallel Distributed Training of Speech DNNs", Interspeech 2014; Karimireddy et al., "Error Feedback Fixes SignSGD
and other Gradient Compression Schemes", ICML 2019 (EF-SGD: the rate of SGD, for every contraction Q). Q is a codec of
`fedlora/codec.py`; where the product counts, it is the leading directions in a codec.

**Coordinates.** Where an entry of an array means the same in every round, x, e and Q are taken entry by entry: changes
of A, B, R and of the head; also values sent whole, if the next round starts from what was sent, because x_{t+1} then
contains sent_t. When a client prunes its rank, the errors of the rows that are gone are dropped. A part that is not
sent in a round keeps its error.

**Products.** Factors that are made anew in every round have no such entries: x is the product s B A of a module, and e
is a factored product E. The best approximation of s B A + E at the rank to be sent (the client's, or `top` leading
directions), its singular values split evenly, is rounded factor by factor, and E' is what both leave out, at no more
than twice the rank of the pair:

    s B' A' = Q(truncate(s B A + E)),    E' = truncate(s B A + E - s B' A')

The bound on E is the one loss; there is none while twice the rank is at least min(out, in). Otherwise E forgets its
smallest directions. Of updates that come back to the same directions this takes little, and the error of their sum
stays bounded. Of directions that never come back, a message of rank r cannot bring r new ones and the old ones'
remains: their errors still add up like a random walk, a little more slowly than without memory. Where whole products
are sent (FlexLoRA) the same formula holds, E being the error of the last message alone, for the next product begins at
the ones that were sent. Where a start is taken off by the server (a warm FLoRA) it holds for s B A, start included.

**The way down.** The published state is the rounded one. Let P_t be what is published of the blocks of a task, of a
factor or of a head. The method computes x_t = P_{t-1} + u_t from the state that was published before, and
P_t = Q(x_t + e_{t-1}), so by induction

    P_t + e_t = P_{t-1} + e_{t-1} + u_t = P_0 + e_0 + u_1 + ... + u_t

A block that comes on top of others is Q(u_t + E_{t-1}), one that replaces them all is Q(P_{t-1} + u_t + E_{t-1}); the
identity is the same, so one E serves both. Everyone trains on, evaluates and releases P.

Where we differ. EF-SGD feeds back at the workers; here the server also does, for its own rounding. A client's answer
that was lost or refused takes the error along that it carried; its memory goes on with what that answer left out.

Cost: coordinates a few passes; products O((out + in) R^2) a module in float64, with R = 4 r once there is an E. Kept,
in float32: under coordinates as much as is sent before coding, under products twice that.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace

import numpy as np

from fedlora.adapter import Adapter, Array, Factors, difference, require_finite, truncated
from fedlora.codec import rounded, travels
from fedlora.errors import AdapterError, MethodError
from fedlora.state import Codec, GlobalState, Layout, Task, TrainPlan, keyed, part, zero_adapter

__all__ = ["compress", "publish"]

Arrays = dict[str, Array]

_KEPT = 2  # ranks of E for every rank of what is sent
_RANK_AXES: Mapping[str, tuple[int, ...]] = {"A": (0,), "B": (1,), "R": (0, 1)}  # by part; ranks may change


def compress(
    arrays: Mapping[str, Array], plan: TrainPlan, error: Mapping[str, Array], layout: Layout
) -> tuple[Arrays, Arrays]:
    """What a client sends instead of its answer's `arrays`, exact in `plan.codec`, and the error to keep for next time.

    `error` is what was kept last time, at first empty; under product feedback its `A:` and `B:` arrays are the factors
    of E, in the units of the product. With `plan.top`, A is `[top, in]` and B `[out, top]` where the rank is larger.
    Raises: MethodError if the plan's feedback or `top` does not fit what it sends; AdapterError for a value that is not
    finite or an error of another model; WireError for a value that overflows the codec.
    """
    if plan.codec == "float32" and plan.top is None:
        return dict(arrays), dict(error)
    require_finite(sorted(arrays.items()))
    factors = _factor_keys(arrays, plan, layout)
    entries = {key: x for key, x in arrays.items() if key not in factors}
    sent, kept = _by_entry(entries, _lasting(error, plan), plan.codec)
    kept = _lasting(kept, plan)
    if factors:
        pair = _adapter(arrays, layout, plan.scale)
        ranks = {n: min(r, plan.top or r) for n, r in pair.ranks.items()}
        pair, left = _by_product(pair, _adapter(error, layout), ranks, plan.codec)
        sent |= _factors(pair)
        kept |= _factors(left)
    return sent, kept


def publish(
    before: GlobalState | None,
    after: GlobalState,
    codec: Codec,
    error: Mapping[str, Array],
    *,
    starts: Collection[str] = (),
) -> tuple[GlobalState, Arrays]:
    """The state that everyone is to hold instead of `after`, exact in `codec`, and the error for the next time.

    `before` is the published state that `after` was made from; None at the opening. What the open task has and `before`
    has not, byte for byte, is rounded with feedback: blocks as products, the pair and heads by entry. A public A never
    travels and stays. A new task starts without errors. Pairs in the memory of the owners in `starts`, which the next
    round starts from and takes off again, are rounded without. Everything else, and the version, is as it was.
    Raises: AdapterError for an error of another model; WireError for a value that overflows the codec.
    """
    if codec == "float32":
        return after, dict(error)
    task = after.open_task
    old = before.tasks.get(task.name) if before is not None else None
    rounding = _Rounding(codec, after.layout, error if old is not None else {})
    known = {b.adapter.digest for b in old.blocks} if old is not None else set()
    blocks = tuple(
        b if b.adapter.digest in known else replace(b, adapter=rounding.product("block", b.adapter))
        for b in task.blocks
    )
    heads = rounding.entries("", keyed("head", task.extras), {} if old is None else keyed("head", old.extras))
    published = replace(task, blocks=blocks, extras=part(heads, "head"))
    if task.pair is not None:
        published = replace(published, pair=_published_pair(rounding, task, old, task.pair))
    memories = {
        owner: {k: rounded(x, codec, k) if owner in starts and travels(k, x.shape) else x for k, x in arrays.items()}
        for owner, arrays in after.memory.items()
    }
    return replace(after, tasks={**after.tasks, task.name: published}, memory=memories), rounding.error


def _published_pair(rounding: _Rounding, task: Task, old: Task | None, pair: Adapter) -> Adapter:
    was = {} if old is None or old.pair is None else _factors(old.pair)
    now = _factors(pair)
    travelling = {k: x for k, x in now.items() if task.public_seed is None or k.startswith("B:")}
    new = now | rounding.entries("pair/", travelling, was)
    return Adapter({n: Factors(new[f"A:{n}"], new[f"B:{n}"], f.scale) for n, f in pair.items()})


class _Rounding:
    """The roundings of one publication, and the errors they leave, each under its own name."""

    def __init__(self, codec: Codec, layout: Layout, error: Mapping[str, Array]) -> None:
        self._codec, self._layout = codec, layout
        self.error = dict(error)

    def entries(self, owner: str, arrays: Mapping[str, Array], was: Mapping[str, Array]) -> Arrays:
        """`arrays`, with those that are not as they were rounded entry by entry."""
        new = {k: x for k, x in arrays.items() if k not in was or not np.array_equal(x, was[k])}
        sent, left = _by_entry(new, self._of(owner, new), self._codec)
        self.error |= {owner + key: e for key, e in left.items()}
        return {**arrays, **sent}

    def product(self, owner: str, adapter: Adapter) -> Adapter:
        """The rounded adapter, of the same ranks."""
        before = _adapter(self._of(f"{owner}/", _factors(adapter)), self._layout)
        sent, left = _by_product(adapter, before, adapter.ranks, self._codec)
        self.error |= {f"{owner}/{key}": e for key, e in _factors(left).items()}
        return sent

    def _of(self, owner: str, keys: Collection[str]) -> Arrays:
        return {key: self.error[owner + key] for key in keys if owner + key in self.error}


def _by_entry(arrays: Mapping[str, Array], error: Mapping[str, Array], codec: Codec) -> tuple[Arrays, Arrays]:
    """`Q(x + e)` and what it leaves out, for each array that travels in the codec; errors of others are kept."""
    sent, kept = dict(arrays), dict(error)
    for key, x in arrays.items():
        if not travels(key, x.shape):
            continue
        target = x.astype(np.float64)
        if key in error:
            target += _fitted(error[key], x.shape, key)
        sent[key] = rounded(target, codec, key)
        kept[key] = (target - sent[key]).astype(np.float32)
    return sent, kept


def _fitted(error: Array, shape: tuple[int, ...], key: str) -> Array:
    """The error at another rank: rows and columns that are gone are dropped, new ones have none.

    Raises: AdapterError if another axis than that of the rank differs.
    """
    axes = _RANK_AXES.get(key.split(":", 1)[0], ())
    if error.ndim != len(shape) or any(error.shape[i] != n for i, n in enumerate(shape) if i not in axes):
        raise AdapterError(f"{key}: the error kept is {error.shape}, the array is {shape}; is it of another model?")
    fitted = np.zeros(shape, error.dtype)
    both = tuple(slice(min(old, new)) for old, new in zip(error.shape, shape, strict=True))
    fitted[both] = error[both]
    return fitted


def _by_product(product: Adapter, error: Adapter, ranks: Mapping[str, int], codec: Codec) -> tuple[Adapter, Adapter]:
    """Pairs of these ranks for `product + error`, exact in the codec, of the product's scales; and E' (scale 1)."""
    target = difference(product, error.scaled(-1.0))
    best, _ = truncated(target, ranks)
    sent = Adapter(
        {
            n: Factors(
                rounded(f.a, codec, f"A:{n}"), rounded(f.b / product[n].scale, codec, f"B:{n}"), product[n].scale
            )
            for n, f in best.items()
        }
    )
    kept = {n: max(_KEPT * f.rank, error[n].rank) for n, f in product.items()}
    left, _ = truncated(difference(target, sent), kept)
    return sent, Adapter({n: Factors(f.a.astype(np.float32), f.b.astype(np.float32)) for n, f in left.items()})


def _factor_keys(arrays: Mapping[str, Array], plan: TrainPlan, layout: Layout) -> set[str]:
    """The keys of A and B under product feedback, else none. Raises: MethodError as `compress`."""
    if plan.feedback != "product":
        if plan.top is not None:
            raise MethodError(
                f"{plan.method}: leading directions of a product (wire.top = {plan.top}) cannot be chosen where A and "
                "B are combined by entry; leave wire.top out, or use flora or flexlora"
            )
        return set()
    keys = {f"{name}:{module}" for module in layout.modules for name in "AB"}
    if not keys <= arrays.keys() or {"A", "B"} & set(plan.changes):
        raise MethodError(
            f"{plan.method}: the error of a product needs A and B of every module, whole; the plan sends "
            f"{list(plan.send)}, of which {list(plan.changes)} as changes"
        )
    return keys


def _adapter(arrays: Mapping[str, Array], layout: Layout, scale: float = 1.0) -> Adapter:
    """The pairs in `arrays`; modules that have none get the product zero, at rank 0."""
    none = zero_adapter(layout, 0)
    return Adapter({n: Factors(arrays.get(f"A:{n}", f.a), arrays.get(f"B:{n}", f.b), scale) for n, f in none.items()})


def _factors(adapter: Adapter) -> Arrays:
    return {**keyed("A", {n: f.a for n, f in adapter.items()}), **keyed("B", {n: f.b for n, f in adapter.items()})}


def _lasting(error: Mapping[str, Array], plan: TrainPlan) -> Arrays:
    """The errors whose entries mean the same in the next round: all under coordinates, else those of the head."""
    return {key: e for key, e in error.items() if plan.feedback == "coordinates" or key.startswith("head:")}
