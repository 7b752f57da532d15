"""Truncation of a factored product against the SVD of the dense product.

    python simulations/benchmarks/truncate.py --sizes 1024,2048,4096 --ranks 160,512 --keep 16

A product of n x n and the given rank is cut to rank `keep`: by `fedlora.adapter.truncate` (QR of each factor, SVD of
the core, in float64) and by forming the product and `numpy.linalg.svd` in float32. Times are CPU seconds of all
threads: a busy machine does not change them; with OMP_NUM_THREADS=1 they are wall time on an idle one. Dense: once a
size (its time does not depend on the rank; minutes at 4096), the truncation `repeats` times around it: medians.
"""

from __future__ import annotations

import argparse
import statistics
import time

import numpy as np

from fedlora.adapter import Factors, truncate
from fedlora.rng import stream


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default="1024,2048,4096")
    parser.add_argument("--ranks", default="160,512")
    parser.add_argument("--keep", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=6)
    options = parser.parse_args()

    print(f"{'n':>6s} {'rank':>6s} {'dense SVD':>12s} {'truncate':>12s} {'ratio':>8s}   error left: dense, truncate")
    for size in (int(n) for n in options.sizes.split(",")):
        products = [product(size, int(rank)) for rank in options.ranks.split(",")]
        times: list[list[float]] = [[] for _ in products]
        half = -(-options.repeats // 2)
        repeat(products, times, options.keep, half)
        dense_time, dense_error = dense(products[-1], options.keep)
        errors = repeat(products, times, options.keep, half)
        for f, seconds, error in zip(products, times, errors, strict=True):
            median = statistics.median(seconds)
            seen = f"{dense_error:.6g}, {error:.6g}" if f is products[-1] else f"-, {error:.6g}"
            print(f"{size:6d} {f.rank:6d} {dense_time:10.2f} s {median:10.4f} s {dense_time / median:8.0f}   {seen}")


def product(size: int, rank: int) -> Factors:
    rng = stream(0, "benchmark", size, rank)
    a = rng.standard_normal((rank, size), dtype=np.float32)
    return Factors(a, rng.standard_normal((size, rank), dtype=np.float32))


def repeat(products: list[Factors], times: list[list[float]], keep: int, repeats: int) -> list[float]:
    """Time the truncations, taking turns; the errors that they report."""
    errors = [0.0] * len(products)
    for _ in range(repeats):
        for i, f in enumerate(products):
            start = time.process_time()
            _, errors[i] = truncate(f, keep)
            times[i].append(time.process_time() - start)
    return errors


def dense(f: Factors, keep: int) -> tuple[float, float]:
    """Seconds of the dense way, and the Frobenius error that it leaves."""
    start = time.process_time()
    u, s, vt = np.linalg.svd(f.b @ f.a, full_matrices=False)
    root = np.sqrt(s[:keep])
    Factors(vt[:keep] * root[:, None], u[:, :keep] * root)
    return time.process_time() - start, float(np.linalg.norm(s[keep:].astype(np.float64)))


if __name__ == "__main__":
    main()
