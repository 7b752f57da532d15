"""Adapters as factored products: algebra on pairs (A, B) that never forms B @ A.

A module's update is `scale * B @ A` with `A: [rank, in]` and `B: [out, rank]`. Everything below that speaks of
norms, inner products, differences or truncation means that product, which is what the model sees: factors are
not unique ((B M)(M^-1 A) = B A). Sums are taken in float64.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedlora.errors import AdapterError

Array = NDArray[np.floating]


@dataclass(frozen=True, eq=False)
class Factors:
    """One module's pair: `a [rank, in]`, `b [out, rank]`, and the explicit `scale` of the product `scale * b @ a`."""

    a: Array
    b: Array
    scale: float = 1.0

    def __post_init__(self) -> None:
        if self.a.ndim != 2 or self.b.ndim != 2 or self.a.shape[0] != self.b.shape[1]:
            raise AdapterError(
                f"factors need a [rank, in] and b [out, rank] with one rank, got a {self.a.shape} and b {self.b.shape}"
            )

    @property
    def rank(self) -> int:
        return int(self.a.shape[0])

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in), the shape of the product."""
        return int(self.b.shape[0]), int(self.a.shape[1])

    def folded(self) -> Factors:
        """The same product with scale 1: the scale goes into b."""
        return self if self.scale == 1.0 else Factors(self.a, self.b * self.b.dtype.type(self.scale))

    def dense(self) -> NDArray[np.float64]:
        """The product itself, `[out, in]` in float64: the slow twin, for tests and small modules."""
        return self.scale * (self.b.astype(np.float64) @ self.a.astype(np.float64))


class Adapter(Mapping[str, Factors]):
    """Module name -> Factors, in sorted order. Immutable; arithmetic acts on the products, module by module."""

    def __init__(self, modules: Mapping[str, Factors]) -> None:
        self._modules = {name: modules[name] for name in sorted(modules)}

    def __getitem__(self, name: str) -> Factors:
        return self._modules[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._modules)

    def __len__(self) -> int:
        return len(self._modules)

    @property
    def ranks(self) -> dict[str, int]:
        return {name: f.rank for name, f in self.items()}

    @property
    def nbytes(self) -> int:
        return sum(f.a.nbytes + f.b.nbytes for f in self.values())

    def folded(self) -> Adapter:
        return Adapter({n: f.folded() for n, f in self.items()})

    def scaled(self, factor: float) -> Adapter:
        return Adapter({n: Factors(f.a, f.b, f.scale * factor) for n, f in self.items()})


def stack(adapters: Sequence[Adapter]) -> Adapter:
    """The exact sum of products: A's below one another, scaled B's side by side (FLoRA, Wang et al. 2024, eq. 4).

    Ranks add up; the result has scale 1. One preallocated buffer per factor, so it costs one copy of the bytes.
    Raises: AdapterError if there is none, or if modules or shapes differ.
    """
    if not adapters:
        raise AdapterError("nothing to stack: no adapters were given")
    first = adapters[0]
    for other in adapters[1:]:
        require_same_modules(first, other)
    return Adapter({name: _stack_factors([ad[name] for ad in adapters]) for name in first})


def _stack_factors(parts: Sequence[Factors]) -> Factors:
    out, inp = parts[0].shape
    rank = sum(p.rank for p in parts)
    a = np.empty((rank, inp), np.result_type(*(p.a for p in parts)))
    b = np.empty((out, rank), np.result_type(*(p.b for p in parts)))
    at = 0
    for p in parts:
        a[at : at + p.rank] = p.a
        np.multiply(p.b, b.dtype.type(p.scale), out=b[:, at : at + p.rank])
        at += p.rank
    return Factors(a, b)


def difference(left: Adapter, right: Adapter) -> Adapter:
    """`left - right` as an exact stack (rank is the sum of ranks)."""
    return stack([left, right.scaled(-1.0)])


def inner(left: Adapter, right: Adapter) -> float:
    """Sum over modules of `<B1 A1, B2 A2>_F` = sum((B1^T B2) * (A1 A2^T)), in float64."""
    require_same_modules(left, right)
    return float(sum(_inner(left[n], right[n]) for n in left))


def _inner(x: Factors, y: Factors) -> float:
    bb = x.b.astype(np.float64).T @ y.b.astype(np.float64)
    aa = x.a.astype(np.float64) @ y.a.astype(np.float64).T
    return x.scale * y.scale * float(np.sum(bb * aa))


def norm(adapter: Adapter) -> float:
    """Frobenius norm of all products together; by QR of each factor, so that differences do not cancel."""
    return float(np.sqrt(sum(factor_norm(f) ** 2 for f in adapter.values())))


def factor_norm(f: Factors) -> float:
    """`||scale * b @ a||_F` through the small core `R_b R_a^T`; O((out + in) * rank^2)."""
    if f.rank == 0:
        return 0.0
    rb = np.linalg.qr(f.b.astype(np.float64), mode="r")
    ra = np.linalg.qr(f.a.astype(np.float64).T, mode="r")
    return abs(f.scale) * float(np.linalg.norm(rb @ ra.T))


def truncate(f: Factors, rank: int) -> tuple[Factors, float]:
    """Best factors of at most `rank` for the product, and the Frobenius error they leave.

    QR of each factor, SVD of the small core: O((out + in) * f.rank^2), the product is never formed. The
    singular values are split evenly over both factors; the dtype is the input's and the scale is 1. A rank that
    is not below the product's own loses nothing but rounding.
    Raises: AdapterError if `rank` is negative.
    Source: Eckart and Young, 1936; QR + core SVD as in the compact SVD of a low-rank product.
    """
    if rank < 0:
        raise AdapterError(f"cannot truncate to rank {rank}: ranks are 0 or more")
    out, inp = f.shape
    dtype = np.result_type(f.a, f.b)
    if f.rank == 0 or rank == 0:
        return Factors(np.zeros((0, inp), dtype), np.zeros((out, 0), dtype)), factor_norm(f)
    qb, rb = np.linalg.qr(f.b.astype(np.float64))
    qa, ra = np.linalg.qr(f.a.astype(np.float64).T)
    u, s, vt = np.linalg.svd(f.scale * (rb @ ra.T), full_matrices=False)
    keep = min(rank, len(s))
    root = np.sqrt(s[:keep])
    b = (qb @ (u[:, :keep] * root)).astype(dtype)
    a = ((vt[:keep] * root[:, None]) @ qa.T).astype(dtype)
    return Factors(a, b), float(np.linalg.norm(s[keep:]))


def truncated(adapter: Adapter, rank: int | Mapping[str, int]) -> tuple[Adapter, float]:
    """Every module truncated to `rank` (or its own); the Frobenius error over all modules together."""
    cut = {n: truncate(f, rank if isinstance(rank, int) else rank[n]) for n, f in adapter.items()}
    return Adapter({n: f for n, (f, _) in cut.items()}), float(np.sqrt(sum(e * e for _, e in cut.values())))


def padded(f: Factors, rank: int) -> Factors:
    """The same product at a larger rank: zero rows of A, zero columns of B."""
    if rank < f.rank:
        raise AdapterError(f"cannot pad rank {f.rank} to the smaller rank {rank}; truncate instead")
    a = np.zeros((rank, f.a.shape[1]), f.a.dtype)
    b = np.zeros((f.b.shape[0], rank), f.b.dtype)
    a[: f.rank], b[:, : f.rank] = f.a, f.b
    return Factors(a, b, f.scale)


class ProductSum:
    """A running exact sum of products whose memory does not grow with the number of terms.

    Terms are stacked; when a module's stacked rank passes `limit` (default: the lossless bound min(out, in)
    plus the newest term) it is compacted by `truncate` to that limit and the error is added to `error`.
    """

    def __init__(self, limit: int | None = None) -> None:
        if limit is not None and limit < 1:
            raise AdapterError(f"the rank limit of a running sum must be at least 1, got {limit}")
        self._limit = limit
        self._terms: list[Adapter] = []
        self._rank = 0
        self.error = 0.0  # upper bound on the Frobenius error left by compaction (errors of steps add)

    def add(self, adapter: Adapter, weight: float = 1.0) -> None:
        self._terms.append(adapter.scaled(weight))
        self._rank += max(adapter.ranks.values(), default=0)
        if self._rank > 2 * self._bound(adapter):
            self._compact()

    def _bound(self, adapter: Adapter) -> int:
        lossless = max(min(f.shape) for f in adapter.values())
        return lossless if self._limit is None else min(self._limit, lossless)

    def _compact(self) -> None:
        whole = stack(self._terms)
        bound = self._bound(whole)
        small, left = truncated(whole, {n: min(bound, *f.shape) for n, f in whole.items()})
        self._terms, self._rank = [small], max(small.ranks.values())
        self.error += left

    def total(self) -> Adapter:
        """The sum, stacked (scale 1). Raises: AdapterError if nothing was added."""
        if not self._terms:
            raise AdapterError("an empty sum has no total: nothing was added")
        return stack(self._terms)


def require_same_modules(left: Mapping[str, Factors], right: Mapping[str, Factors]) -> None:
    """Raises AdapterError naming what is missing, extra or of another shape."""
    if left.keys() != right.keys():
        missing, extra = sorted(left.keys() - right.keys()), sorted(right.keys() - left.keys())
        raise AdapterError(
            f"modules differ; missing {missing}, extra {extra}. Same base and target modules on both sides?"
        )
    for name in left:
        if left[name].shape != right[name].shape:
            raise AdapterError(f"{name}: shapes differ, {left[name].shape} and {right[name].shape} (out, in)")


def require_finite(arrays: Iterable[tuple[str, Array]]) -> None:
    """Raises AdapterError naming the first array with a NaN or infinity."""
    for name, x in arrays:
        if not np.isfinite(x).all():
            raise AdapterError(f"{name} has {int(np.sum(~np.isfinite(x)))} non-finite values of {x.size}")
