"""Adapters as factored products: algebra on pairs (A, B) that never forms B @ A.

A module's update is `scale * B @ A` with `A: [rank, in]` and `B: [out, rank]`. Everything below that speaks of
norms, inner products, differences or truncation means that product, which is what the model sees: factors are
not unique ((B M)(M^-1 A) = B A). Sums are taken in float64.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

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

    def scaled(self, factor: float) -> Factors:
        return Factors(self.a, self.b, self.scale * factor)

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

    @cached_property
    def digest(self) -> str:
        """SHA-256 over names, scales, dtypes, shapes and bytes of all factors, in hex; computed once."""
        digest = hashlib.sha256()
        for name, f in self.items():
            table = [name, float(f.scale), f.a.dtype.name, f.a.shape, f.b.dtype.name, f.b.shape]
            digest.update(json.dumps(table).encode())
            digest.update(np.ascontiguousarray(f.a).view(np.uint8).data)
            digest.update(np.ascontiguousarray(f.b).view(np.uint8).data)
        return digest.hexdigest()

    def folded(self) -> Adapter:
        return Adapter({n: f.folded() for n, f in self.items()})

    def scaled(self, factor: float) -> Adapter:
        return Adapter({n: f.scaled(factor) for n, f in self.items()})


def stack(adapters: Sequence[Adapter]) -> Adapter:
    """The exact sum of products: A's below one another, B's side by side (FLoRA, Wang et al. 2024, eq. 4).

    Ranks add up; scales are folded into A, where folding is free, and the result has scale 1. All its arrays lie in
    one allocation, written once: about the time of copying the bytes.
    Raises: AdapterError if there is none, or if modules or shapes differ.
    """
    if not adapters:
        raise AdapterError("nothing to stack: no adapters were given")
    for other in adapters[1:]:
        require_same_modules(adapters[0], other)
    return _stacked({name: [adapter[name] for adapter in adapters] for name in adapters[0]})


def _stacked(modules: Mapping[str, Sequence[Factors]]) -> Adapter:
    """Each module's parts stacked; they have one shape, and any number."""
    buffers = iter(_allocate([spec for parts in modules.values() for spec in _stacked_specs(parts)]))
    return Adapter({name: _stack_into(next(buffers), next(buffers), parts) for name, parts in modules.items()})


Spec = tuple[tuple[int, int], np.dtype[Any]]


def _stacked_specs(parts: Sequence[Factors]) -> tuple[Spec, Spec]:
    """Shape and dtype of the stacked a and b."""
    out, inp = parts[0].shape
    rank = sum(p.rank for p in parts)
    return ((rank, inp), np.result_type(*(p.a for p in parts))), ((out, rank), np.result_type(*(p.b for p in parts)))


def _allocate(specs: Sequence[Spec]) -> list[Array]:
    """Uninitialised arrays in one allocation, each on a cache line of its own.

    A large allocation comes in huge pages; one for each factor would cost a page fault for every 4 kB written, which
    takes longer than the copying.
    """
    sizes = [math.prod(shape) * dtype.itemsize for shape, dtype in specs]
    starts = list(itertools.accumulate((-(-size // 64) * 64 for size in sizes), initial=0))
    memory = np.empty(starts[-1], np.uint8)
    return [
        memory[at : at + size].view(dtype).reshape(shape)
        for (shape, dtype), size, at in zip(specs, sizes, starts, strict=False)
    ]


def _stack_into(a: Array, b: Array, parts: Sequence[Factors]) -> Factors:
    at = 0
    for p in parts:
        if p.scale == 1.0:
            a[at : at + p.rank] = p.a
        else:
            np.multiply(p.a, a.dtype.type(p.scale), out=a[at : at + p.rank])
        _put_columns(p.b, b, at)
        at += p.rank
    return Factors(a, b)


def _put_columns(source: Array, target: Array, at: int) -> None:
    """`target[:, at : at + rank] = source`, a row at a time: numpy's own loop over short rows is half as fast."""
    width = source.shape[1] * source.dtype.itemsize
    if source.size == 0 or source.dtype != target.dtype or not source.flags.c_contiguous:
        target[:, at : at + source.shape[1]] = source
        return
    rows = np.ndarray((len(target),), f"V{width}", target.data, at * target.dtype.itemsize, (target.strides[0],))
    rows[...] = source.view(f"V{width}")[:, 0]


def difference(left: Adapter, right: Adapter) -> Adapter:
    """`left - right` as an exact stack (rank is the sum of ranks), in float64: nearly equal products cancel in it."""
    require_same_modules(left, right)
    return _stacked({n: [_float64(f), _float64(right[n].scaled(-1.0))] for n, f in left.items()})


def _float64(f: Factors) -> Factors:
    return _astype(f, np.dtype(np.float64))


def _astype(f: Factors, dtype: np.dtype[Any]) -> Factors:
    return Factors(f.a.astype(dtype, copy=False), f.b.astype(dtype, copy=False), f.scale)


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
    return abs(f.scale) * float(np.linalg.norm(_triangle(f.b) @ _triangle(f.a.T).T))


def _triangle(x: Array) -> NDArray[np.float64]:
    """R of `x = QR`, in float64."""
    return np.asarray(np.linalg.qr(x.astype(np.float64), mode="r"))  # numpy types mode="r" as the whole pair


def truncate(f: Factors, rank: int) -> tuple[Factors, float]:
    """Best factors of at most `rank` for the product, and the Frobenius error they leave.

    QR of each factor, SVD of the small core: O((out + in) * f.rank^2), the product is never formed. The
    singular values are split evenly over both factors and fall along the rank; the dtype is the input's and the scale
    is 1. A rank that is not below the product's own loses nothing but rounding.
    Raises: AdapterError if `rank` is negative or a factor is not finite.
    Source: Eckart and Young, 1936; QR + core SVD as in the compact SVD of a low-rank product.
    """
    if rank < 0:
        raise AdapterError(f"cannot truncate to rank {rank}: ranks are 0 or more")
    out, inp = f.shape
    dtype = np.result_type(f.a, f.b)
    if f.rank == 0 or rank == 0:
        return Factors(np.zeros((0, inp), dtype), np.zeros((out, 0), dtype)), factor_norm(f)
    qb, rb = _Reflectors.of(f.b)
    qa, ra = _Reflectors.of(f.a.T)
    core = f.scale * (rb @ ra.T)
    if not np.isfinite(core).all():
        raise AdapterError(f"cannot truncate factors a {f.a.shape} and b {f.b.shape}: their product is not finite")
    u, s, vt = np.linalg.svd(core, full_matrices=False)
    keep = min(rank, len(s))
    root = np.sqrt(s[:keep])
    b, a = qb.times(u[:, :keep] * root), qa.times(vt[:keep].T * root).T
    return Factors(np.ascontiguousarray(a, dtype), np.ascontiguousarray(b, dtype)), float(np.linalg.norm(s[keep:]))


@dataclass(frozen=True)
class _Reflectors:
    """The Q of `x = Q R` as Householder vectors, which is what LAPACK finds; Q itself would take as long again."""

    vectors: NDArray[np.float64]  # [columns of x, rows of x]: a vector in each row, from the diagonal on
    tau: NDArray[np.float64]

    @classmethod
    def of(cls, x: Array) -> tuple[_Reflectors, NDArray[np.float64]]:
        """Q and R of `x`, in float64."""
        vectors, tau = np.linalg.qr(x.astype(np.float64), mode="raw")
        return cls(vectors, tau), np.triu(vectors.T[: len(tau)])

    def times(self, x: NDArray[np.float64]) -> NDArray[np.float64]:
        """`Q @ x`, a block of 64 reflectors at a time: `H_1 ... H_n = I - V T V^T` with
        `T^-1 = diag(1 / tau) + strict upper triangle of V^T V` (Puglisi, 1992).
        """
        y = np.zeros((self.vectors.shape[1], x.shape[1]))
        y[: len(x)] = x
        for at in reversed(range(0, len(self.tau), 64)):
            live = np.flatnonzero(self.tau[at : at + 64])  # tau 0 is the identity
            v = np.triu(self.vectors[at : at + 64, at:], 1)
            np.fill_diagonal(v, 1.0)
            v = v[live]
            y[at:] -= v.T @ np.linalg.solve(np.triu(v @ v.T, 1) + np.diag(1.0 / self.tau[at + live]), v @ y[at:])
        return y


def truncated(adapter: Adapter, rank: int | Mapping[str, int]) -> tuple[Adapter, float]:
    """Every module truncated to `rank` (or its own); the Frobenius error over all modules together.

    Raises: AdapterError as `truncate`, or if `rank` names other modules.
    """
    if not isinstance(rank, int) and rank.keys() != adapter.keys():
        raise AdapterError(f"ranks for other modules than the adapter's: {sorted(rank.keys() ^ adapter.keys())[:5]}")
    cut = {n: truncate(f, rank if isinstance(rank, int) else rank[n]) for n, f in adapter.items()}
    return Adapter({n: f for n, (f, _) in cut.items()}), float(np.sqrt(sum(e * e for _, e in cut.values())))


def padded(f: Factors, rank: int) -> Factors:
    """The same product at a larger rank: zero rows of A, zero columns of B. Raises: AdapterError if it is smaller."""
    if rank < f.rank:
        raise AdapterError(f"cannot pad rank {f.rank} to the smaller rank {rank}; truncate instead")
    a = np.zeros((rank, f.a.shape[1]), f.a.dtype)
    b = np.zeros((f.b.shape[0], rank), f.b.dtype)
    a[: f.rank], b[:, : f.rank] = f.a, f.b
    return Factors(a, b, f.scale)


class ProductSum:
    """A running sum of products whose memory does not grow with the number of terms.

    A module's terms are kept as they came until their ranks pass twice its bound, which is `min(out, in)` or a smaller
    `limit`; then they are truncated to that bound, in float64. At the first bound nothing is lost but rounding; what a
    `limit` costs is in `error`. At most twice the bound and one term are held; `total` may have a rank up to twice the
    bound. Compaction costs O((out + in) * bound) for each rank added.
    Raises: AdapterError if `limit` is below 1.
    """

    def __init__(self, limit: int | None = None) -> None:
        if limit is not None and limit < 1:
            raise AdapterError(f"the rank limit of a running sum must be at least 1, got {limit}")
        self._limit = limit
        self._terms: dict[str, list[Factors]] | None = None
        self._dtypes: dict[str, np.dtype[Any]] = {}
        self._errors: dict[str, float] = {}

    @property
    def error(self) -> float:
        """Upper bound on the Frobenius norm of what compaction lost, over all modules: a module's losses add.

        It is loose by several times: 4 to 13 times the true loss where that was measured.
        """
        return math.hypot(*self._errors.values())

    def add(self, adapter: Adapter, weight: float = 1.0) -> None:
        """Add `weight` times the products of `adapter`. Raises: AdapterError if its modules or shapes are others."""
        if self._terms is None:
            self._terms = {name: [] for name in adapter}
        else:
            require_same_modules({name: terms[0] for name, terms in self._terms.items()}, adapter)
        for name, f in adapter.scaled(weight).items():
            terms = self._terms[name]
            terms.append(f)
            self._dtypes[name] = np.result_type(f.a, f.b, self._dtypes.get(name, np.float32))
            bound = min(f.shape) if self._limit is None else min(self._limit, *f.shape)
            if sum(t.rank for t in terms) > 2 * bound:
                small, left = truncate(_stacked({name: [_float64(t) for t in terms]})[name], bound)
                self._terms[name] = [small]
                self._errors[name] = self._errors.get(name, 0.0) + left

    def total(self) -> Adapter:
        """The sum, stacked, of scale 1, in the terms' dtype (at least float32). Raises: AdapterError if it is empty."""
        if self._terms is None:
            raise AdapterError("an empty sum has no total: nothing was added")
        return Adapter({name: _astype(f, self._dtypes[name]) for name, f in _stacked(self._terms).items()})


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
