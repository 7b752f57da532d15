"""A 7B-shaped adapter (q and v of 32 layers, 4096 x 4096, r = 16) from many clients, through the server's own sums.

    python -m simulations.benchmarks.stream [--clients 10 --clients 100 --clients 1000] [--modules 64] [--many 8]

Two paths, one client in memory at a time: `ProductSum` with a limit (flora and flexlora with `max_rank`), from answers
in float32 to the mean, truncated to the limit, and `Sums` of B (ffa-lora). More than 100 clients go through `--many`
modules only, and so do the rows that they are compared with; `--many 64` is the whole adapter, and takes eight times as
long. Each run has a process of its own. Peak memory is what it grows by (ru_maxrss) from before the first client. Holes
in glibc's heap add up to a tenth over time; MALLOC_MMAP_THRESHOLD_=131072 in the environment keeps arrays out of it.

Clients are made on the fly and their making is not timed. In each module client k has B_k A_k with rows falling as
1 / sqrt(i): a signal that all share plus as much noise of its own, and rotated by a matrix of its own, so that factors
have no common basis. The error of the sum in the first module is against the dense sum of the same clients in float32,
which is also the obvious alternative: its time is measured there, in one module, its memory is computed from shapes.
`bound` is what ProductSum and the last cut claim, over all modules; `best` is the least error of that rank there is, by
subspace iteration. Times are CPU seconds of all threads; with OMP_NUM_THREADS=1 they are wall time on an idle machine.
"""

from __future__ import annotations

import argparse
import math
import resource
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from typing import Literal, TypeVar

import numpy as np
from numpy.typing import NDArray

from fedlora.adapter import Array, Factors, ProductSum, norm
from fedlora.rng import stream
from fedlora.state import part
from strategies.base import Sums, pair_from
from strategies.blocks import bounded_svd

Path = Literal["products", "means"]
PATHS: tuple[Path, ...] = ("products", "means")
T = TypeVar("T")
SCALE = 2.0
FULL_UP_TO = 100  # clients


@dataclass(frozen=True, kw_only=True)
class Size:
    """How many modules of which size, at which rank, and the limit of the running sum."""

    modules: int = 64
    side: int = 4096
    rank: int = 16
    limit: int = 64

    def nbytes(self, path: Path) -> int:
        """Of one client's answer, float32."""
        return self.modules * self.side * self.rank * 4 * (2 if path == "products" else 1)


@dataclass(frozen=True, kw_only=True)
class Measured:
    """CPU seconds of all clients and of the end, MB that the peak grew by; of products, the bound claimed on the
    relative error of all modules, and the mean of the first one."""

    seconds: float
    closing: float
    peak: float
    bound: float = 0.0
    first: Factors | None = None


Signals = Mapping[int, tuple[NDArray[np.float32], NDArray[np.float32]]]


def signals(size: Size, modules: int) -> Signals:
    """What all clients have in common, by module: a `[rank, side]` and b `[side, rank]`."""
    return {m: _noise(size, stream(0, "signal", m)) for m in range(modules)}


def answers(size: Size, clients: int, common: Signals) -> Iterator[tuple[int, dict[str, Array]]]:
    """(examples, arrays `A:` and `B:`) of every client, one at a time, at scale `SCALE`, in the modules of `common`."""
    fall = 1.0 / np.sqrt(np.arange(1, size.rank + 1, dtype=np.float32))
    for k in range(clients):
        arrays: dict[str, Array] = {}
        for m, (a0, b0) in common.items():
            rng = stream(0, "client", k, m)
            turn = np.linalg.qr(rng.standard_normal((size.rank, size.rank)))[0].astype(np.float32)
            a, b = _noise(size, rng)
            arrays[f"A:{m:02}"] = turn @ ((a0 + a) * fall[:, None])
            arrays[f"B:{m:02}"] = ((b0 + b) * fall) @ turn.T
        yield 1 + 37 * k % 500, arrays
        del arrays


def _noise(size: Size, rng: np.random.Generator) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    a = rng.standard_normal((size.rank, size.side), np.float32) / np.float32(math.sqrt(size.side))
    b = rng.standard_normal((size.side, size.rank), np.float32) / np.float32(math.sqrt(size.side))
    return a, b


def run(path: Path, size: Size, clients: int) -> Measured:
    """Stream all clients through one path, in this process."""
    products, sums = ProductSum(size.limit), Sums({f"{m:02}": (size.side, size.rank) for m in range(size.modules)})
    common = signals(size, size.modules)
    start, seconds, weight = peak(), 0.0, 0
    for examples, arrays in answers(size, clients, common):
        began = time.process_time()
        if path == "products":
            products.add(pair_from(arrays, SCALE), examples)
        else:
            sums.add(part(arrays, "B"), examples)
        seconds += time.process_time() - began
        weight += examples
        del arrays
    began = time.process_time()
    if path == "means":
        sums.mean()
        return Measured(seconds=seconds, closing=time.process_time() - began, peak=peak() - start)
    mean, left = bounded_svd(products.total().scaled(1.0 / weight), max_rank=size.limit, max_error=None)
    closing = time.process_time() - began
    bound = (products.error / weight + left) / math.hypot(norm(mean), left)
    return Measured(seconds=seconds, closing=closing, peak=peak() - start, bound=bound, first=next(iter(mean.values())))


def peak() -> float:
    """The most memory that this process has had, in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e6


def dense(size: Size, clients: int) -> tuple[NDArray[np.float32], float]:
    """The mean of the products in the first module, added up densely in float32, and the CPU seconds that it took."""
    total, seconds, weight = np.zeros((size.side, size.side), np.float32), 0.0, 0
    for examples, arrays in answers(size, clients, signals(size, 1)):
        began = time.process_time()
        total += (np.float32(SCALE * examples) * arrays["B:00"]) @ arrays["A:00"]
        seconds += time.process_time() - began
        weight += examples
    return total / np.float32(weight), seconds


def errors(size: Size, clients: int, got: Factors) -> tuple[float, float, float]:
    """Relative Frobenius errors of `got` in the first module, and the least of its rank (block power iteration, 8
    steps); and the seconds of the dense sum that it is held against."""
    exact, seconds = dense(size, clients)
    whole = float(np.linalg.norm(exact.astype(np.float64)))
    basis = stream(0, "basis").standard_normal((size.side, 2 * size.limit), np.float32)
    for _ in range(8):
        basis = exact @ np.linalg.qr(exact.T @ np.linalg.qr(basis)[0])[0]
    top = np.linalg.svd((np.linalg.qr(basis)[0].T @ exact).astype(np.float64), compute_uv=False)[: size.limit]
    off = float(np.linalg.norm((exact - got.b @ got.a).astype(np.float64)))
    return off / whole, math.sqrt(max(0.0, 1.0 - float(np.sum(top**2)) / whole**2)), seconds


def apart(function: Callable[..., T], *arguments: object) -> T:
    """The result of a call in a new process. This one stays small: a child's ru_maxrss begins at its parent's size."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def report(size: Size, counts: Sequence[int]) -> None:
    """Run every count on this size and print a table of both paths, peaks against the first, and the dense way."""
    print(f"\n{size.modules} modules of {size.side} x {size.side}, r = {size.rank}, limit {size.limit}\n")
    print("| path | clients | MB each | peak, MB | to the first | s / client | MB/s | end, s | bound | error | best |")
    print("|---" * 11 + "|")
    for path in PATHS:
        first = 0.0
        for n in counts:
            m = apart(run, path, size, n)
            first = first or m.peak
            each, rate = size.nbytes(path) / 1e6, m.seconds / n
            row = [
                path,
                f"{n}",
                f"{each:.1f}",
                f"{m.peak:.0f}",
                f"{m.peak / first if first else math.nan:.3f}",
                f"{rate:.3f}",
            ]
            row += [f"{each / rate:.0f}", f"{m.closing:.2f}"]
            if m.first is None:
                row += ["exact", "-", "-"]
            else:
                error, best, seconds = apart(errors, size, n, m.first)
                row += [f"{x:.4f}" for x in (m.bound, error, best)]
            print("| " + " | ".join(row) + " |", flush=True)
    memory = size.modules * size.side**2 * 4 / 1e6
    one, memory = seconds / n, size.modules * size.side**2 * 4 / 1e6
    print(
        f"\ndense, float32: {one:.3f} s per client, measured in one module with {n} clients; in {size.modules} modules "
        f"{size.modules * one:.2f} s and {memory:.0f} MB (both computed, not run)"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, action="append", help="may be repeated; default: 10, 100, 1000")
    parser.add_argument("--modules", type=int, default=64)
    parser.add_argument("--many", type=int, default=8, help=f"modules for more than {FULL_UP_TO} clients")
    parser.add_argument("--side", type=int, default=4096)
    options = parser.parse_args()
    counts = sorted(options.clients or [10, 100, 1000])
    few = [n for n in counts if n <= FULL_UP_TO or options.many >= options.modules]
    if few:
        report(Size(modules=options.modules, side=options.side), few)
    if few != counts:
        print(f"\nMore than {FULL_UP_TO} clients: {options.many} of {options.modules} modules, not the whole adapter.")
        report(Size(modules=options.many, side=options.side), counts)


if __name__ == "__main__":
    main()
