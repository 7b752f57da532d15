"""FFA-LoRA against LoRA under the same epsilon of single training rows, each at its own best learning rate.

    python -m simulations.benchmarks.private --on skills --out results.jsonl
    FEDLORA_REAL_DATA=DIR python -m simulations.benchmarks.private --on agnews --out results.jsonl

Whether freezing A helps under privacy, as Sun et al. (ICLR 2024, arXiv 2403.12313) say: `ffa-lora` trains B alone, so
that the noise on it stays linear; `fedit` trains and averages both factors, whose product has the product of two noises
besides. Same clients, rows, rank, modules, rounds, steps, sampling, clip; only the rate is each method's own. `none` is
the same run without privacy: steps of as many rows as the private ones expect.

`skills`: four of the embedded skills, four clients with two each, 2000 generated rows a client, exact match on 240
rows. `agnews`: the pre-trained MiniLM (`make minilm`) on DIR/agnews/{train,dev,test}.jsonl and labels.json, two
clients with half of the 1000 training rows each, texts cut at 32 tokens, accuracy; the classifier's head is trained,
too. Few numbers are trained, and steps are few, so that there is signal left above the noise.

Rates are chosen with seed 100: other generated rows of the skills, and the dev rows of AG News. The best is that of the
highest score, then of the lowest loss. They are tried in steps of three; while the best is at the edge of those tried,
one more is; with `--finer`, also those between the best and its neighbours. Scores are of other seeds, from 0 on, on
the test rows. Choosing the rate is not counted in epsilon, for neither method.

Every finished run is a line of the results file, under the SHA-256 of its settings: what is there is not run again, so
that a measurement which was stopped goes on. Runs under privacy draw noise from the system's entropy and do not repeat.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from fedlora.config import RunConfig, digest, load_config
from fedlora.errors import ConfigError
from server.app import open_run
from simulations.benchmarks.minilm import settings as minilm
from simulations.simulate import simulate

LADDER = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1)
BETWEEN = (5e-4, 1.7e-3, 5e-3, 1.7e-2, 5e-2, 1.7e-1)  # each between two of the ladder
FIRST = (1e-2, 3e-2)  # rates tried in any case
CHOICE = 100  # the seed with which rates are chosen
METHODS = ("ffa-lora", "fedit")
SKILLS = "archive_stamp,parcel_label,dose_chart,triage_tag"  # one of each group
LAST_LAYERS = ",".join(f"{layer}.attention.self.{part}" for layer in (4, 5) for part in ("query", "value"))


@dataclass(frozen=True, kw_only=True)
class Task:
    """What both methods share: rows of a client, rows that a step expects, and settings."""

    rows: int
    expected: int
    settings: dict[str, object]


TASKS = {
    "skills": Task(
        rows=2000,
        expected=16,
        settings={
            "data.skills": SKILLS,
            "data.partition.skills_per_client": 2,
            "data.rows_per_client": 2000,
            "model.target_modules": "q_proj,v_proj",
            "lora.ranks": 4,
            "rounds.clients": 4,
            "rounds.count": 4,
            "training.local_steps": 20,
        },
    ),
    "agnews": Task(
        rows=500,
        expected=50,
        settings={
            "data.partition.kind": "iid",
            "model.target_modules": LAST_LAYERS,
            "lora.ranks": 2,
            "rounds.clients": 2,
            "rounds.count": 3,
            "training.local_steps": 10,
            "training.local_epochs": "none",
        },
    ),
}


@dataclass(frozen=True, kw_only=True)
class Run:
    """One finished run. `epsilon`: a number, or none. `seconds`, `cpu`: of the whole simulation, by clock and CPU."""

    on: str
    method: str
    epsilon: str
    rate: float
    seed: int
    score: float
    loss: float
    seconds: float
    cpu: float
    settings: str  # SHA-256 of all settings


def settings(on: str, method: str, epsilon: str, rate: float, seed: int, more: Sequence[str] = ()) -> RunConfig:
    """The settings of one run; on the dev rows with the seed that rates are chosen with.

    Raises: ConfigError without the model or the data of `agnews`, or for a wrong setting in `more` ("KEY=VALUE").
    """
    task = TASKS[on]
    both: dict[str, object] = {
        "method.name": method,
        "training.learning_rate": rate,
        "training.threads": 1,
        "training.batch_size": task.expected if epsilon == "none" else 64,
        "rounds.quorum": 1.0,
        "data.holdout": 0.0,
        "evaluation.every": 0,
        "seed": seed,
    }
    if epsilon != "none":
        both |= {
            "privacy.level": "example",
            "privacy.epsilon": epsilon,
            "privacy.rows": task.rows,
            "privacy.sampling": task.expected / task.rows,
        }
    sets = [f"{k}={v}" for k, v in {**task.settings, **both}.items()] + list(more)
    if on == "skills":
        return load_config(None, sets)
    data = os.environ.get("FEDLORA_REAL_DATA")
    if data is None:
        raise ConfigError("FEDLORA_REAL_DATA is not set: it names the folder that holds agnews/train.jsonl")
    split = "dev" if seed == CHOICE else "test"
    return minilm("agnews", Path(data), split, **{k: v for k, _, v in (one.partition("=") for one in sets)})


def run(on: str, method: str, epsilon: str, rate: float, config: RunConfig) -> Run:
    """Conduct a run in a folder that is not kept. Raises: as `simulate`."""
    with tempfile.TemporaryDirectory() as where:
        folder = Path(where) / "run"
        open_run(folder, config)
        began, spent = time.monotonic(), time.process_time()
        result = simulate(config, folder, notify=lambda event: None, bare=False)
        seconds, cpu = time.monotonic() - began, time.process_time() - spent
    assert result.score is not None
    assert result.loss is not None
    return Run(
        on=on,
        method=method,
        epsilon=epsilon,
        rate=rate,
        seed=config.seed,
        score=result.score,
        loss=result.loss,
        seconds=seconds,
        cpu=cpu,
        settings=digest(config),
    )


def climb(measure: Callable[[float], Run], *, finer: bool = False) -> list[Run]:
    """Runs at the first rates, and at further ones of the ladder while the best is at the edge of those tried.

    `finer`: and then at those between the best and its neighbours.
    """
    tried = [measure(rate) for rate in FIRST]
    while True:
        at, low, high = (LADDER.index(f(tried).rate) for f in (best, _lowest, _highest))
        further = at - 1 if at == low else at + 1 if at == high else -1
        if not 0 <= further < len(LADDER):
            between = BETWEEN[max(at - 1, 0) : at + 1] if finer else ()
            return tried + [measure(rate) for rate in reversed(between)]
        tried.append(measure(LADDER[further]))


def best(runs: Sequence[Run]) -> Run:
    """The run of the highest score, then of the lowest loss."""
    return max(runs, key=lambda r: (r.score, -r.loss))


def _lowest(runs: Sequence[Run]) -> Run:
    return min(runs, key=lambda r: r.rate)


def _highest(runs: Sequence[Run]) -> Run:
    return max(runs, key=lambda r: r.rate)


def table(found: dict[tuple[str, str], list[Run]]) -> str:
    """Runs by method and epsilon, in the order of seeds, as Markdown; scores in points, sample sd over the seeds.

    `cost` and the last lines are paired over the seeds: a run less that without privacy, `ffa-lora` less `fedit`.
    """
    lines = [
        "| epsilon | method | rate | score | cost | loss | seconds | CPU seconds |",
        "|---|---|---:|" + "---:|" * 5,
    ]
    for (method, epsilon), runs in found.items():
        free = found.get((method, "none"), [])
        cost = "" if epsilon == "none" else _difference(runs, free)
        shown = _spread([100 * r.score for r in runs]), cost, f"{statistics.fmean(r.loss for r in runs):.3f}"
        took = (f"{statistics.median(getattr(r, what) for r in runs):.0f}" for what in ("seconds", "cpu"))
        lines.append(f"| {epsilon} | `{method}` | {runs[0].rate:g} | {' | '.join([*shown, *took])} |")
    for epsilon in dict.fromkeys(epsilon for _, epsilon in found):
        pair = [found.get((method, epsilon), []) for method in METHODS]
        lines.append(f"\nepsilon {epsilon}: ffa-lora less fedit {_difference(*pair)}")
    return "\n".join(lines)


def _difference(a: Sequence[Run], b: Sequence[Run]) -> str:
    other = {r.seed: r.score for r in b}
    return _spread([100 * (r.score - other[r.seed]) for r in a if r.seed in other])


def _spread(values: Sequence[float]) -> str:
    if not values:
        return "not run"
    return f"{statistics.fmean(values):.1f}" + (f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--on", choices=tuple(TASKS), default="skills")
    parser.add_argument("--out", type=Path, required=True, help="a file of finished runs, one JSON object a line")
    parser.add_argument("--epsilons", default="none,8,3,1")
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--finer", action="store_true", help="try the rates between the best and its neighbours, too")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="another setting, for all runs")
    args = parser.parse_args()
    done = [Run(**json.loads(line)) for line in args.out.read_text().splitlines()] if args.out.exists() else []
    by_settings = {one.settings: one for one in done}

    def measured(method: str, epsilon: str, rate: float, seed: int) -> Run:
        config = settings(args.on, method, epsilon, rate, seed, args.set)
        if (one := by_settings.get(digest(config))) is None:
            one = run(args.on, method, epsilon, rate, config)
            with args.out.open("a") as out:
                out.write(json.dumps(asdict(one)) + "\n")
        what = f"{epsilon:>5} {method:9} {rate:7g} seed {seed:3}"
        print(f"{what}  score {one.score:.3f}  loss {one.loss:.3f}  {one.seconds:.0f} s", flush=True)
        return one

    found: dict[tuple[str, str], list[Run]] = {}
    for epsilon in args.epsilons.split(","):
        for method in args.methods.split(","):
            tried = climb(lambda rate, m=method, e=epsilon: measured(m, e, rate, CHOICE), finer=args.finer)  # type: ignore[misc]
            rate = best(tried).rate
            found[method, epsilon] = [measured(method, epsilon, rate, seed) for seed in range(args.seeds)]
    print(table(found))


if __name__ == "__main__":
    main()
