"""FFA-LoRA against FedIT under the same epsilon of single training rows, each at its own best learning rate.

python -m simulations.benchmarks.private --epsilons none,8,3,1 --seeds 3

Embedded skills, one rank for all clients, the same rounds, steps and sampling for both; `none` is the same run without
privacy (steps of as many rows, without Poisson sampling). The best rate is that of the highest mean score over the
seeds, then of the lowest loss: it is chosen on the rows that it is reported on, for both methods alike, and choosing it
is not counted in epsilon. Prints and writes mean and sample standard deviation over the seeds for every rate.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from fedlora.config import RunConfig, load_config
from server.app import open_run
from simulations.simulate import simulate

RATES = (2e-3, 6e-3, 2e-2)
METHODS = ("ffa-lora", "fedit")


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One method at one epsilon and one rate, over the seeds."""

    method: str
    epsilon: str  # a number, or none
    rate: float
    scores: tuple[float, ...]
    losses: tuple[float, ...]
    seconds: float  # of one run, mean

    def line(self, best: bool) -> str:
        score, loss = (_spread(values) for values in (self.scores, self.losses))
        mark = "*" if best else " "
        what = f"{self.epsilon:>5} {self.method:9} {self.rate:7.0e} {mark}"
        return f"{what} score {score}  loss {loss}  {self.seconds:.0f} s"


def _spread(values: Sequence[float]) -> str:
    sd = f"{statistics.stdev(values):.3f}" if len(values) > 1 else "  -  "
    return f"{statistics.fmean(values):.3f} sd {sd}"


def settings(args: argparse.Namespace, method: str, epsilon: str, rate: float, seed: int) -> RunConfig:
    """The run of one cell and seed."""
    rows = args.rows
    sets = [
        f"method.name={method}",
        f"seed={seed}",
        f"training.learning_rate={rate!r}",
        f"rounds.count={args.rounds}",
        f"rounds.clients={args.clients}",
        f"lora.ranks={args.rank}",
        f"training.local_steps={args.steps}",
        "training.threads=1",
        f"data.rows_per_client={rows}",
        f"data.test_rows={args.test_rows}",
        "data.holdout=0",
        f"evaluation.every={args.rounds}",
    ]
    if epsilon == "none":
        return load_config(None, [*sets, f"training.batch_size={round(args.sampling * rows)}"])
    private = [
        "level=example",
        f"epsilon={epsilon}",
        f"rows={rows}",
        f"sampling={args.sampling!r}",
        f"clip={args.clip!r}",
    ]
    return load_config(None, [*sets, "training.batch_size=64", *(f"privacy.{s}" for s in private)])


def cell(args: argparse.Namespace, method: str, epsilon: str, rate: float) -> Cell:
    """Run one cell over all seeds."""
    scores, losses, began = [], [], time.monotonic()
    for seed in range(args.seeds):
        with tempfile.TemporaryDirectory() as where:
            config, folder = settings(args, method, epsilon, rate, seed), Path(where) / "run"
            open_run(folder, config)
            result = simulate(config, folder, notify=lambda event: None, bare=False)
        assert result.score is not None
        assert result.loss is not None
        scores.append(result.score)
        losses.append(result.loss)
    seconds = (time.monotonic() - began) / args.seeds
    return Cell(method=method, epsilon=epsilon, rate=rate, scores=tuple(scores), losses=tuple(losses), seconds=seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--epsilons", default="none,8,3,1")
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--rates", default=",".join(map(str, RATES)))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--clients", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--steps", type=int, default=15)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--rows", type=int, default=300)
    parser.add_argument("--test-rows", type=int, default=240)
    parser.add_argument("--sampling", type=float, default=0.2)
    parser.add_argument("--clip", type=float, default=1.0)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    found: list[Cell] = []
    for epsilon in args.epsilons.split(","):
        for method in args.methods.split(","):
            rates = [float(r) for r in args.rates.split(",")]
            cells = []
            for rate in rates:
                cells.append(cell(args, method, epsilon, rate))
                print(cells[-1].line(best=False), flush=True)
            best = max(cells, key=lambda c: (statistics.fmean(c.scores), -statistics.fmean(c.losses)))
            print(best.line(best=True), flush=True)
            found += cells
            if args.out is not None:
                args.out.write_text(json.dumps([asdict(c) for c in found], indent=1))


if __name__ == "__main__":
    main()
