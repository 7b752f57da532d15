"""Two adapters of disjoint skills combined in every way, scored on the skills of both.

    OMP_NUM_THREADS=1 python -m simulations.benchmarks.compose [--rounds 3] [--seed 0] [--out DIR]

Two federated runs of the embedded base are trained here (flora, released at rank 16), one on the first half of the
embedded skills and one on the second. Each row of the table is one combination, scored by exact match on rows that
neither run trained on; `error` is what cutting the result to its rank lost, relative to its Frobenius norm. The last
rows are PEFT's `add_weighted_adapter` on the same two adapters, and again after both were turned into other factors of
the same products, (B M)(M^-1 A): what acts on factors then gives another model. LoRAHub's examples are rows of the
training split, four of each skill. One seed; the standard error of a score over all rows is one to three points.
Fifty seconds on one core.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from peft import PeftModel
from transformers import AutoModelForCausalLM
from transformers.utils.logging import disable_progress_bar

from clients.resident import resident_base
from fedlora.adapter import Adapter, Factors
from fedlora.base import Base
from fedlora.composing import Source, few_shot_loss, read_source
from fedlora.composition import Recipe, compose, search
from fedlora.config import RunConfig, load_config
from fedlora.data import client_rows
from fedlora.data.prompt import prompt_format
from fedlora.data.sources import skills
from fedlora.evaluation.score import score
from fedlora.peft_bridge import from_peft_model, save_adapter
from fedlora.rng import stream
from fedlora.state import Block
from fedlora.tiny import base_path
from fedlora.training.attach import attach
from fedlora.wire import blocks_id
from server.app import open_run
from simulations.simulate import simulate, test_tokens

RANK = 16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--clients", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="a new folder for the two runs; without it, they are thrown away")
    options = parser.parse_args()
    disable_progress_bar()  # type: ignore[no-untyped-call]
    with tempfile.TemporaryDirectory() as scratch:
        report(options, options.out or Path(scratch) / "runs", Path(scratch))


def report(options: argparse.Namespace, out: Path, scratch: Path) -> None:
    """Train the two runs in `out`, then print one line for each combination."""
    names = skills(load_config().data)
    halves = names[: len(names) // 2], names[len(names) // 2 :]
    started = time.monotonic()
    folders = [trained(out / "ab"[i], half, options) for i, half in enumerate(halves)]
    print(f"trained in {time.monotonic() - started:.0f} s: a on {', '.join(halves[0])}; b on {', '.join(halves[1])}\n")

    config = settings(names, options)
    base = resident_base(config.model)
    rows = test_tokens(config)
    sources = [read_source(str(folder)) for folder in folders]
    both = [s.adapter for s in sources]
    print(
        f"{'combination':46s} {'a':>7s} {'b':>7s} {'all':>7s} {'loss':>7s} {'rank':>5s} {'error':>7s} {'seconds':>8s}"
    )

    def line(name: str, make: Callable[[], tuple[Adapter, float | None]]) -> None:
        start = time.monotonic()
        adapter, error = make()
        seconds, lost = time.monotonic() - start, "" if error is None else f"{error:.1%}"
        blocks = (Block(adapter=adapter, born=0),)
        attach(base, blocks, blocks_id(blocks))
        sums = score(base, rows, batch_size=64)
        parts = [sum(sums[f"correct/{s}"] for s in h) / sum(sums[f"counted/{s}"] for s in h) for h in halves]
        print(
            f"{name:46s} {parts[0]:7.1%} {parts[1]:7.1%} {sums['correct'] / sums['counted']:7.1%} "
            f"{sums['loss'] / sums['tokens']:7.3f} {max(adapter.ranks.values()):5d} {lost:>7s} {seconds:8.2f}",
            flush=True,
        )

    def ours(name: str, weights: Sequence[float], **recipe: Any) -> None:
        def make() -> tuple[Adapter, float | None]:
            result = compose(both, weights, Recipe(seed=options.seed, **recipe))
            return result.adapter, result.relative_error

        line(name, make)

    line("the base", lambda: (both[0].scaled(0.0), None))
    line("a alone", lambda: (both[0], None))
    line("b alone", lambda: (both[1], None))
    ours("cat 1, 1", (1.0, 1.0))
    ours("cat 0.5, 0.5", (0.5, 0.5))
    ours("cat 1, 1, rank 16", (1.0, 1.0), rank=RANK)
    ours("task-arithmetic 1, 1, lambda 0.7", (1.0, 1.0), how="task-arithmetic", coefficient=0.7)
    ours("task-arithmetic 1, -1: b unlearnt", (1.0, -1.0), how="task-arithmetic")
    ours("ties 1, 1, density 0.2", (1.0, 1.0), how="ties")
    ours("ties 1, 1, density 0.5", (1.0, 1.0), how="ties", density=0.5)
    ours("ties 1, 1, density 0.2, any rank", (1.0, 1.0), how="ties", rank=10**6)
    ours("ties 1, 1, density 0.5, any rank", (1.0, 1.0), how="ties", density=0.5, rank=10**6)
    ours("dare 1, 1, drop 0.5", (1.0, 1.0), how="dare")
    ours("dare 1, 1, drop 0.5, any rank", (1.0, 1.0), how="dare", rank=10**6)
    ours("dare 1, 1, drop 0.9, any rank", (1.0, 1.0), how="dare", drop=0.9, rank=10**6)
    ours("dare-ties 1, 1, drop 0.5, any rank", (1.0, 1.0), how="dare-ties", rank=10**6)
    weights: tuple[float, ...] = ()

    def found() -> tuple[Adapter, float | None]:
        nonlocal weights
        weights = searched(base, sources, config, options.seed)
        result = compose(both, weights, Recipe(how="lorahub"))
        return result.adapter, result.relative_error

    line("lorahub, 40 evaluations", found)
    print("  its weights: " + ", ".join(f"{w:.3f}" for w in weights))
    for what, pair in (("", both), (", other factors", [turned(x, i) for i, x in enumerate(both)])):
        places = [saved(scratch / f"{what}{i}", x, sources[i]) for i, x in enumerate(pair)]
        for how, w, more in (
            ("linear", 0.5, {}),
            ("linear", 1.0, {}),
            ("ties", 1.0, {"density": 0.2}),
            ("ties", 1.0, {"density": 0.5}),
            ("ties_svd", 1.0, {"density": 0.5, "svd_rank": 2 * RANK}),
        ):
            name = f"PEFT {how} {w:g}, {w:g}" + (f", density {more['density']}" if more else "") + what
            line(name, partial(peft, places, how, w, more))


def settings(names: Sequence[str], options: argparse.Namespace) -> RunConfig:
    """A run on these skills, all of which every client holds."""
    values = {
        "seed": options.seed,
        "data.skills": ",".join(names),
        "data.partition.skills_per_client": len(names),
        "rounds.clients": options.clients,
        "rounds.count": options.rounds,
        "lora.ranks": RANK,
        "method.name": "flora",
        "method.max_rank": RANK,
        "training.threads": 1,
        "evaluation.every": 0,
    }
    return load_config(None, [f"{key}={value}" for key, value in values.items()])


def trained(folder: Path, names: Sequence[str], options: argparse.Namespace) -> Path:
    """The folder of a run on these skills."""
    config = settings(names, options)
    open_run(folder, config)
    simulate(config, folder, notify=lambda _: None, bare=False)
    return folder


def searched(base: Base, sources: Sequence[Source], config: RunConfig, seed: int) -> tuple[float, ...]:
    """LoRAHub's weights, by four training rows of each skill."""
    few: dict[str, list[Any]] = {}
    for row in client_rows(config, 0).train:
        few.setdefault(row.group, []).append(row)
    rows, _ = prompt_format(config, base.tokenizer).encode([row for group in few.values() for row in group[:4]])
    start = [1 / len(sources)] * len(sources)
    return search(few_shot_loss(base, rows, sources, batch_size=64), start, seed=seed).weights


def turned(adapter: Adapter, seed: int) -> Adapter:
    """The same products from other factors, (B M)(M^-1 A), with a random orthogonal M."""
    out = {}
    for name, f in adapter.items():
        m = np.linalg.qr(stream(seed, "turn", name).standard_normal((f.rank, f.rank)))[0]
        out[name] = Factors((m.T @ f.a).astype(np.float32), (f.b @ m).astype(np.float32), f.scale)
    return Adapter(out)


def saved(folder: Path, adapter: Adapter, source: Source) -> Path:
    layout = replace(source.layout, head={})
    save_adapter(folder, adapter, layout, base_name=str(base_path()), task_type="causal-lm")
    return folder


def peft(folders: Sequence[Path], how: str, weight: float, more: dict[str, Any]) -> tuple[Adapter, None]:
    """PEFT's own combination of two folders, with the same weight for both; it reports no error."""
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base_path()), folders[0], adapter_name="a")
    model.load_adapter(folders[1], "b")
    model.add_weighted_adapter(["a", "b"], [weight, weight], "both", combination_type=how, **more)
    return from_peft_model(model, "both")[0], None


if __name__ == "__main__":
    main()
