"""FedEx-LoRA's residual and FlexLoRA's scales: ours against the published formulas, on identical inputs.

    python -m simulations.benchmarks.residual [--shapes 2048x2048,4096x1024,4096x4096] [--clients 10] [--rank 16]

1. One round of fedex-lora at the server, one module (out x in), examples and alphas unequal: `strategies.fedex_lora`
   against the obvious dense way in float32, sum_k p_k s_k B_k A_k - mean(B) mean(A), added to the weights. Ours: timed
   up to the residual as exact factors (`strategies.means.mean_of`, with the means), and as the whole round, with the
   compact SVD that is sent and the report. Errors are of the residual alone, against the same formula in float64: where
   all factors are new, and where training moved a common start by a hundredth.
2. FedEx-LoRA as published: uniform weights, one alpha / rank, and the residual transposed before it is added to the
   weights of a linear layer. Errors are of the whole update, against the exact mean.
3. FlexLoRA: what every client starts the next round from, under the published ways to handle alpha, against the best
   approximation of the exact mean at its own rank. Errors are over all clients together.

Times are CPU seconds of all threads, medians of three; with OMP_NUM_THREADS=1 they are wall time on an idle machine.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from fedlora.adapter import Adapter
from fedlora.config import MethodConfig
from fedlora.state import Answer, Ask, Layout, Module
from simulations.benchmarks.published import (
    SCALES,
    Inputs,
    Matrix,
    cut,
    dense_mean,
    dense_residual,
    inputs,
    off,
    published_fedex,
    published_flexlora,
)
from simulations.benchmarks.stand_in import cohort_of
from strategies import fedex_lora, flexlora
from strategies.base import Closed, Member, Method
from strategies.means import mean_of


def play_round(method: Method, x: Inputs) -> tuple[Closed, Mapping[str, Ask], float, float]:
    """One round: its end, the asks of the next, and CPU seconds from the answers on, of all and of `mean_of` alone.

    fedex-lora starts from the inputs' start and is sent changes, flexlora is sent whole factors.
    """
    out, inp = x.start.shape
    who = [Member(id=f"c{i:03}", rank=f.rank, scale=f.scale) for i, f in enumerate(x.trained)]
    settings = MethodConfig.model_validate({"name": method.name})
    state = method.open("base", Layout(modules={"w": Module(out=out, inp=inp)}), who, settings, 0)
    pair = Adapter({"w": x.start})
    if method.name == "fedex-lora":
        state = replace(state, tasks={"": replace(state.open_task, pair=pair)})
    cohort = cohort_of(settings, who, 1)
    protocol = method.protocol(state, cohort)
    answers = {}
    for (client, ask), f, n in zip(sorted(next(protocol).items()), x.trained, x.examples, strict=True):
        changes = ask.plan.changes if ask.plan is not None else ()
        arrays = {k: v - ask.arrays[k] if k[0] in changes else v for k, v in (("A:w", f.a), ("B:w", f.b))}
        answers[client] = Answer(examples=n, arrays=arrays)
    began = time.process_time()
    try:
        protocol.send(answers)
    except StopIteration as end:
        closed: Closed = end.value
    ended = time.process_time()
    mean_of(pair, answers, cohort, state.layout)
    alone = time.process_time() - ended
    following = next(method.protocol(closed.state, cohort_of(settings, who, 2)))
    return closed, following, ended - began, alone


def first_table(shapes: Sequence[tuple[int, int]], clients: int, rank: int) -> None:
    print(f"## 1. Residual, {clients} clients of rank {rank}: ours, and the dense way in float32\n")
    print(
        "| out x in | moved | error: ours | dense | ours: residual | whole round | dense | dense / ours | sent: ours |"
    )
    print("|---" * 9 + "|")
    for shape, moved in itertools.product(shapes, (1.0, 0.01)):
        x = inputs(shape, [rank] * clients, SCALES, moved=moved)
        weights, times = np.zeros(shape, np.float32), []
        for _ in range(3):
            (closed, _, round_seconds, mean_seconds), began = play_round(fedex_lora.METHOD, x), time.process_time()
            residual = dense_residual(x, np.float32)
            weights += residual
            times.append((mean_seconds, round_seconds, time.process_time() - began))
        want, block = dense_residual(x), closed.state.open_task.blocks[0].adapter
        alone, whole, dense = (statistics.median(column) for column in zip(*times, strict=True))
        print(
            f"| {shape[0]} x {shape[1]} | {moved:g} | {off(block['w'].dense(), want):.0e} | {off(residual, want):.0e} "
            f"| {alone:.3f} s | {whole:.3f} s | {dense:.3f} s | {dense / alone:.1f}, {dense / whole:.1f} "
            f"| {block.nbytes / 1e6:.1f} of {residual.nbytes / 1e6:.0f} MB |",
            flush=True,
        )


def second_table(clients: int, rank: int) -> None:
    ranks, shapes = [rank] * clients, ((1024, 1024), (1024, 512))
    cases = [inputs(shape, ranks, [2.0], equal=True) for shape in shapes]
    cases += [inputs(shape, ranks, SCALES) for shape in shapes]
    rows: dict[str, list[Matrix | None]] = {
        "published: 1/K, one alpha, transposed": [published_fedex(x, transposed=True) for x in cases],
        "the same, not transposed": [published_fedex(x, transposed=False) for x in cases],
        "1/K, one alpha, no residual": [published_fedex(x, transposed=False, residual=False) for x in cases],
        "p_k and s_k, no residual": [dense_mean(x) - dense_residual(x) for x in cases],
        "`fedex-lora`": [play_round(fedex_lora.METHOD, x)[0].state.update()["w"].dense() for x in cases],
    }
    print("\n## 2. FedEx-LoRA: error of the whole update\n")
    print("| examples and alphas: | equal, square | equal, 1024 x 512 | unequal, square | unequal, 1024 x 512 |")
    print("|---" * 5 + "|")
    for name, row in rows.items():
        print_row(name, row, [dense_mean(x) for x in cases])


def third_table(clients: int, rank: int) -> None:
    ranks = [rank // (1, 2, 4)[i % 3] for i in range(clients)]
    laws = {
        "alpha 16": [16 / r for r in ranks],
        "alpha 16, rsLoRA": [16 / r**0.5 for r in ranks],
        "alphas 8 and 32": [(8, 32)[i % 2] / r for i, r in enumerate(ranks)],
    }
    one, coded = [1.0] * clients, [16 / r for r in ranks]
    cases = [(inputs((512, 384), ranks, scales), scales) for scales in laws.values()]
    rows = {
        "alpha neither up nor down": [published_flexlora(x, one, one) for x, _ in cases],
        "alpha up only": [published_flexlora(x, s, one) for x, s in cases],
        "16 / r up and down": [published_flexlora(x, coded, coded) for x, _ in cases],
        "s_k up and down, dense SVD": [published_flexlora(x, s, s) for x, s in cases],
        "`flexlora`": [products_sent(x) for x, _ in cases],
    }
    print(f"\n## 3. FlexLoRA: what clients start from, ranks {rank}, {rank // 2} and {rank // 4}, 512 x 384\n")
    print("| | " + " | ".join(laws) + " |\n|---" + "|---" * len(laws) + "|")
    for name, row in rows.items():
        print_row(name, [np.stack(w) for w in row], [np.stack(cut(dense_mean(x), ranks)) for x, _ in cases])


def products_sent(x: Inputs) -> list[Matrix]:
    """s_k B A of every client's start in the round after one of flexlora."""
    asks = play_round(flexlora.METHOD, x)[1]
    return [
        f.scale * asks[c].arrays["B:w"] @ asks[c].arrays["A:w"] for c, f in zip(sorted(asks), x.trained, strict=True)
    ]


def print_row(name: str, row: Sequence[Matrix | None], want: Sequence[Matrix]) -> None:
    found = (f"{off(x, w):.2g}" if x is not None else "no sum" for x, w in zip(row, want, strict=True))
    print(f"| {name} | " + " | ".join(found) + " |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default="2048x2048,4096x1024,4096x4096")
    parser.add_argument("--clients", type=int, default=10)
    parser.add_argument("--rank", type=int, default=16)
    options = parser.parse_args()
    shapes = [(int(out), int(inp)) for out, inp in (text.split("x") for text in options.shapes.split(","))]
    first_table(shapes, options.clients, options.rank)
    second_table(options.clients, options.rank)
    third_table(options.clients, options.rank)


if __name__ == "__main__":
    main()
