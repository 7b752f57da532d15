"""The Gram matrix of K clients' updates from factors, against forming the products.

    python simulations/benchmarks/gram.py --size 4096 --pairs-of 5

Two cohorts: 50 clients of rank 16, and 20 clients whose ranks are 4, 8, 16 and 32 in turn; one module of size x size,
factors float32, all sums in float64. Three ways:

- factored: `strategies.gram.gram`;
- dense, by rows: the products formed 64 rows at a time for all clients, and one symmetric BLAS product of them: the
  best that can be done with dense updates, in memory that does not grow with the size;
- dense, by pairs: every product formed and held, and `numpy.vdot` of each pair: the obvious way. It would hold K
  products (6.7 GB for 50 at 4096), so it is timed on the first `pairs-of` clients, and the times per product and per
  pair are multiplied by how many there are.

Times are CPU seconds of all threads: a busy machine hardly changes them; with OMP_NUM_THREADS=1 they are wall time on
an idle one. The factored way is timed `repeats` times and the median is taken. The difference is the largest entry of
|factored - dense by rows| over the largest entry of the matrix.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from fedlora.adapter import Adapter, Factors
from fedlora.rng import stream
from strategies.gram import gram

Float64 = NDArray[np.float64]
ROWS = 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=4096, help="rows and columns of the module")
    parser.add_argument("--pairs-of", type=int, default=5, help="clients whose products are formed and held")
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()

    print(f"| module {options.size} x {options.size} | factored | dense, by rows | dense, by pairs | difference |")
    print("|---|---:|---:|---:|---:|")
    for name, ranks in (("K = 50, r = 16", [16] * 50), ("K = 20, r = 4 to 32", [4, 8, 16, 32] * 5)):
        print(f"| {name} | {row(ranks, options.size, options.pairs_of, options.repeats)} |", flush=True)


def row(ranks: Sequence[int], size: int, some: int, repeats: int) -> str:
    """One line of the table: seconds, ratios to the factored way, and the difference."""
    updates = [client(i, rank, size) for i, rank in enumerate(ranks)]
    times = []
    for _ in range(repeats):
        start = time.process_time()
        got = gram([Adapter({"module": f}) for f in updates])
        times.append(time.process_time() - start)
    factored = statistics.median(times)
    start = time.process_time()
    want = by_rows(updates)
    rows = time.process_time() - start
    pairs = by_pairs(updates[:some], len(updates))
    off = float(np.max(np.abs(got - want)) / np.max(np.abs(want)))
    cells = [f"{factored:.3f} s", *(f"{t:.1f} s ({t / factored:.0f} x)" for t in (rows, pairs)), f"{off:.1e}"]
    return " | ".join(cells)


def client(index: int, rank: int, size: int) -> Factors:
    rng = stream(0, "benchmark", index)
    a = rng.standard_normal((rank, size), dtype=np.float32)
    return Factors(a, rng.standard_normal((size, rank), dtype=np.float32), 2.0)


def by_rows(updates: Sequence[Factors]) -> Float64:
    """`[K, K]`, with `ROWS` rows of all products in memory."""
    total = np.zeros((len(updates), len(updates)))
    out, inp = updates[0].shape
    wide = [f.a.astype(np.float64) for f in updates]
    for at in range(0, out, ROWS):
        block = np.empty((len(updates), min(ROWS, out - at) * inp))
        for i, f in enumerate(updates):
            block[i] = (f.scale * f.b[at : at + ROWS].astype(np.float64) @ wide[i]).reshape(-1)
        total += block @ block.T
    return total


def by_pairs(updates: Sequence[Factors], clients: int) -> float:
    """CPU seconds for `clients` of them, from the times of these."""
    start = time.process_time()
    products = [f.dense() for f in updates]
    formed = time.process_time() - start
    start = time.process_time()
    for i, x in enumerate(products):
        for y in products[i:]:
            np.vdot(x, y)
    compared = time.process_time() - start
    k = len(updates)
    return formed / k * clients + compared / (k * (k + 1)) * clients * (clients + 1)


if __name__ == "__main__":
    main()
