"""Stacking K clients' adapters against copying the same bytes.

    python simulations/benchmarks/stack.py --clients 10 --layers 22 --hidden 2048 --kv 256 --rank 16

The adapter has the shape of LoRA on q and v of TinyLlama. `copy` is np.copyto of every factor into buffers that exist
already and are warm, which is the least that any stacking must do; `fresh copy` also makes the buffers. The three take
turns; the medians are printed.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import numpy as np

from fedlora.adapter import Adapter, Factors, stack
from fedlora.rng import stream


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=10)
    parser.add_argument("--layers", type=int, default=22)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--kv", type=int, default=256, help="rows of v's product")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=15)
    options = parser.parse_args()

    rng = stream(0, "benchmark")

    def client() -> Adapter:
        modules: dict[str, Factors] = {}
        for layer in range(options.layers):
            for name, out in (("q", options.hidden), ("v", options.kv)):
                a = rng.standard_normal((options.rank, options.hidden), dtype=np.float32)
                b = rng.standard_normal((out, options.rank), dtype=np.float32)
                modules[f"layers.{layer}.{name}"] = Factors(a, b, 2.0 / options.clients)
        return Adapter(modules)

    adapters = [client() for _ in range(options.clients)]
    arrays = [x for adapter in adapters for f in adapter.values() for x in (f.a, f.b)]
    buffers = [x.copy() for x in arrays]

    def copy() -> object:
        for x, buffer in zip(arrays, buffers, strict=True):
            np.copyto(buffer, x)
        return None

    def fresh_copy() -> object:
        return [x.copy() for x in arrays]

    def stacked() -> object:
        return stack(adapters)

    times = interleaved({"copy": copy, "fresh copy": fresh_copy, "stack": stacked}, options.repeats)
    print(f"{sum(x.nbytes for x in arrays) / 1e6:.0f} MB in {len(arrays)} arrays, median of {options.repeats}")
    for name, seconds in times.items():
        print(f"{name:12s} {1e3 * seconds:8.1f} ms   {seconds / times['copy']:.2f} times copy")


def interleaved(functions: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Median seconds of each, taking turns, after one turn that is not counted."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(repeats + 1):
        for name, function in functions.items():
            start = time.perf_counter()
            made = function()
            times[name].append(time.perf_counter() - start)
            del made
    return {name: statistics.median(seconds[1:]) for name, seconds in times.items()}


if __name__ == "__main__":
    main()
