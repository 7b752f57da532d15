"""Coding and decoding one adapter, against copying it and against PyTorch's own quantisation.

    python simulations/benchmarks/codec.py --layers 32 --hidden 4096 --kv 4096 --rank 16

The adapter has the shape of LoRA on q and v of a 7B model: 34 MB in float32. Rates are MB of float32 per CPU second of
one thread, which a busy machine changes least, medians over `repeats`. `copy` is np.copyto into buffers that exist;
`copies` is the time of the codec, coding and decoding, over that of `copy`. `torch` is torch.quantize_per_channel: the
same lines, with a float32 scale each, found by amax (no int4). `off` is the relative error that one round trip leaves,
Frobenius, of standard normal factors. `feedback` is the whole of a client's step, rounding and error, in its second
round: by entry, and in products.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import get_args

import numpy as np
import torch
from numpy.typing import NDArray

from fedlora.codec import dequantise, nbytes, quantise
from fedlora.feedback import compress
from fedlora.rng import stream
from fedlora.state import Codec, Layout, LocalTraining, Module, TrainPlan

Arrays = dict[str, NDArray[np.float32]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--kv", type=int, default=4096, help="rows of v's product")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--feedback", action="store_true", help="also the client's step, which takes seconds")
    options = parser.parse_args()
    torch.set_num_threads(1)

    layout = Layout(
        modules={
            f"layers.{i}.{name}": Module(out=out, inp=options.hidden)
            for i in range(options.layers)
            for name, out in (("q", options.hidden), ("v", options.kv))
        }
    )
    arrays = pairs(layout, options.rank, 0)
    size = sum(x.nbytes for x in arrays.values()) / 1e6
    copied = copy_seconds(list(arrays.values()), options.repeats)
    print(f"{size:.1f} MB in {len(arrays)} arrays, median of {options.repeats}; copy {size / copied:.0f} MB/s")
    print(f"{'':18s} {'bytes':>12s} {'smaller':>8s} {'encode':>12s} {'decode':>12s} {'copies':>15s} {'off':>10s}")
    for codec in get_args(Codec)[1:]:
        show(codec, arrays, size, copied, *coded(arrays, codec, options.repeats))
    show("torch int8", arrays, size, copied, *torch_coded(list(arrays.values()), options.repeats))
    if options.feedback:
        for how in ("coordinates", "product"):
            print(f"feedback, {how:12s} int8 {step_seconds(arrays, layout, options.rank, how):8.2f} s")


def pairs(layout: Layout, rank: int, seed: int) -> Arrays:
    rng = stream(0, "benchmark", seed)
    arrays: Arrays = {}
    for name, m in layout.modules.items():
        arrays[f"A:{name}"] = rng.standard_normal((rank, m.inp), dtype=np.float32)
        arrays[f"B:{name}"] = rng.standard_normal((m.out, rank), dtype=np.float32)
    return arrays


def show(
    name: str, arrays: Arrays, size: float, copied: float, total: int, encode: float, decode: float, off: float
) -> None:
    print(
        f"{name:18s} {total:12,d} {1e6 * size / total:8.2f} {size / encode:7.0f} MB/s {size / decode:7.0f} MB/s"
        f" {encode / copied:7.1f}{decode / copied:8.1f} {off:10.2e}"
    )


def copy_seconds(arrays: Sequence[NDArray[np.float32]], repeats: int) -> float:
    buffers = [x.copy() for x in arrays]

    def copy() -> None:
        for x, buffer in zip(arrays, buffers, strict=True):
            np.copyto(buffer, x)

    return seconds(copy, repeats)


def seconds(function: Callable[[], object], repeats: int) -> float:
    """Median CPU seconds, after one call that is not counted."""
    times = []
    for _ in range(repeats + 1):
        start = time.process_time()
        made = function()
        times.append(time.process_time() - start)
        del made
    return statistics.median(times[1:])


def coded(arrays: Arrays, codec: Codec, repeats: int) -> tuple[int, float, float, float]:
    """Bytes, seconds to encode, seconds to decode, and the relative error of a round trip."""
    data = {key: quantise(x, codec, key) for key, x in arrays.items()}
    if sum(x.nbytes for x in data.values()) != sum(nbytes(x.shape, codec) for x in arrays.values()):
        raise AssertionError(f"{codec}: nbytes is not what quantise returns")

    def decode() -> list[NDArray[np.float32]]:
        return [dequantise(data[key], x.shape, codec, key) for key, x in arrays.items()]

    encoded = seconds(lambda: [quantise(x, codec, key) for key, x in arrays.items()], repeats)
    return sum(x.nbytes for x in data.values()), encoded, seconds(decode, repeats), relative(arrays, decode())


def torch_coded(arrays: Sequence[NDArray[np.float32]], repeats: int) -> tuple[int, float, float, float]:
    tensors = [torch.from_numpy(x) for x in arrays]

    def encode() -> list[torch.Tensor]:
        out = []
        for x in tensors:
            axis = 0 if x.shape[0] <= x.shape[1] else 1
            scales = x.abs().amax(1 - axis).double() / 127
            out.append(torch.quantize_per_channel(x, scales, torch.zeros_like(scales).long(), axis, torch.qint8))
        return out

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch announces the end of this API
        data = encode()
        encoded, decoded = seconds(encode, repeats), seconds(lambda: [x.dequantize() for x in data], repeats)
        back = [x.dequantize().numpy() for x in data]
    total = sum(x.size + 4 * min(x.shape) for x in arrays)
    return total, encoded, decoded, relative(dict(enumerate(arrays)), back)


def relative(
    arrays: dict[str, NDArray[np.float32]] | dict[int, NDArray[np.float32]], back: Sequence[NDArray[np.float32]]
) -> float:
    whole = math.hypot(*(float(np.linalg.norm(x)) for x in arrays.values()))
    return math.hypot(*(float(np.linalg.norm(x - y)) for x, y in zip(arrays.values(), back, strict=True))) / whole


def step_seconds(arrays: Arrays, layout: Layout, rank: int, how: str) -> float:
    """Seconds of a client's second round under one kind of feedback."""
    plan = TrainPlan(
        method="benchmark",
        rank=rank,
        rows=rank,
        scale=2.0,
        train=("A", "B"),
        send=("A", "B"),
        codec="int8",
        training=LocalTraining(learning_rate=1e-3, local_steps=1, local_epochs=None, batch_size=1),
    )
    plan = replace(plan, feedback="product") if how == "product" else plan
    _, error = compress(arrays, plan, {}, layout)
    second = pairs(layout, rank, 1)
    start = time.process_time()
    compress(second, plan, error, layout)
    return time.process_time() - start


if __name__ == "__main__":
    main()
