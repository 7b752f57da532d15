"""Local training against transformers' Trainer with PEFT: the same rows, model, rank, steps and batch size.

    python simulations/benchmarks/local_training.py [--hidden 256 --layers 4 --steps 20 --batch 8 --threads 2]

Rows have the lengths of real instruction data: log-normal prompts (median 60 tokens, some above 300) and answers
(median 30). Trainer runs as its documentation shows it: a collator that pads each batch to its longest row, labels of
-100 on the prompt, AdamW, a constant rate. Both start from the same A and zero B. Prints rows per second, their ratio,
and the loss of both on the same held-out batch.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from torch.utils.data import Dataset
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainingArguments,
)

from fedlora.adapter import Adapter, Factors
from fedlora.base import Base, load_base
from fedlora.config import ModelConfig
from fedlora.data.batches import pad
from fedlora.data.rows import TokenRow
from fedlora.rng import stream
from fedlora.state import Ask, Block, Header, LocalTraining, TrainPlan
from fedlora.training.attach import attach
from fedlora.training.local import train_client
from fedlora.training.objective import counted, loss_sum

VOCABULARY = 32_000
RANK, SCALE, RATE = 8, 2.0, 1e-3


def make_rows(count: int, purpose: str) -> list[TokenRow]:
    """Rows whose answers can be learnt: each answer token follows from the one before it."""
    g = stream(0, purpose)
    rows = []
    for _ in range(count):
        prompt = int(np.clip(np.round(g.lognormal(np.log(60), 0.9)), 8, 600))
        answer = int(np.clip(np.round(g.lognormal(np.log(30), 0.8)), 2, 300))
        start = int(g.integers(1, 200))
        tokens = np.concatenate([g.integers(1, VOCABULARY, prompt), 1 + (start + 7 * np.arange(answer)) % 200])
        rows.append(TokenRow(tokens.astype(np.int32), np.arange(prompt + answer) >= prompt))
    return rows


class Rows(Dataset[TokenRow]):
    def __init__(self, rows: list[TokenRow]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> TokenRow:
        return self.rows[index]


def collate(rows: list[TokenRow]) -> dict[str, torch.Tensor]:
    batch = pad(rows, 0)
    tokens = torch.from_numpy(batch.tokens)
    labels = torch.where(torch.from_numpy(batch.answer), tokens, -100)
    return {"input_ids": tokens, "attention_mask": torch.from_numpy(batch.attention), "labels": labels}


def with_trainer(
    folder: str, base: Base, a: dict[str, Any], rows: list[TokenRow], steps: int, batch: int
) -> tuple[float, Adapter]:
    """Seconds of `Trainer.train`, and the adapter it found."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    names = sorted({n.rpartition(".")[2] for n in base.layout.modules})
    peft: Any = get_peft_model(model, LoraConfig(r=RANK, lora_alpha=int(SCALE * RANK), target_modules=names))
    modules: dict[str, Any] = {n: peft.base_model.model.get_submodule(n) for n in base.layout.modules}
    for name, module in modules.items():
        module.lora_A["default"].weight.data.copy_(torch.from_numpy(a[name]))
    arguments = TrainingArguments(
        output_dir=folder,
        max_steps=steps,
        per_device_train_batch_size=batch,
        learning_rate=RATE,
        lr_scheduler_type="constant",
        optim="adamw_torch",
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        remove_unused_columns=False,
        use_cpu=True,
    )
    trainer = Trainer(model=peft, args=arguments, train_dataset=Rows(rows), data_collator=collate)
    begin = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - begin
    found = {
        n: Factors(
            m.lora_A["default"].weight.detach().numpy().copy(),
            m.lora_B["default"].weight.detach().numpy().copy(),
            SCALE,
        )
        for n, m in modules.items()
    }
    return seconds, Adapter(found)


def with_fedlora(
    base: Base, a: dict[str, Any], rows: list[TokenRow], steps: int, batch: int, threads: int
) -> tuple[float, Adapter]:
    """Seconds of `train_client`, checks and measures included, and the adapter it found."""
    training = LocalTraining(
        learning_rate=RATE,
        local_steps=steps,
        local_epochs=None,
        batch_size=batch,
        schedule="constant",
        warmup=0.0,
    )
    plan = TrainPlan(
        method="benchmark",
        rank=RANK,
        rows=RANK,
        scale=SCALE,
        train=("A", "B"),
        send=("A", "B"),
        b_from="zero",
        training=training,
    )
    header = Header(run="benchmark", round=1, client="one", kind="train", base=base.fingerprint)
    ask = Ask(plan=plan, arrays={f"A:{n}": x for n, x in a.items()})
    begin = time.perf_counter()
    answer = train_client(base, header, ask, rows, threads=threads)
    seconds = time.perf_counter() - begin
    pairs = {n: Factors(answer.arrays[f"A:{n}"], answer.arrays[f"B:{n}"], SCALE) for n in base.layout.modules}
    return seconds, Adapter(pairs)


def held_out_loss(base: Base, adapter: Adapter | None, rows: list[TokenRow]) -> float:
    attach(base, [] if adapter is None else [Block(adapter=adapter, born=1)], f"held out {id(adapter)}")
    batch = pad(rows, 0)
    with torch.inference_mode():
        return float(loss_sum(base, batch)) / counted(base, batch)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("hidden", 256), ("layers", 4), ("steps", 20), ("batch", 8), ("threads", 2), ("repeats", 1)):
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    rows, held_out = make_rows(args.steps * args.batch, "train"), make_rows(16, "held out")
    lengths = sorted(len(r.tokens) for r in rows)
    print(f"rows {len(rows)}, tokens: median {lengths[len(lengths) // 2]}, longest {lengths[-1]}, sum {sum(lengths)}")
    with tempfile.TemporaryDirectory() as folder:
        settings = LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=args.hidden,
            intermediate_size=args.hidden * 11 // 4,
            num_hidden_layers=args.layers,
            num_attention_heads=args.hidden // 64,
            num_key_value_heads=args.hidden // 64,
            pad_token_id=0,
        )
        LlamaForCausalLM(settings).save_pretrained(Path(folder))
        base = load_base(ModelConfig(name=folder, device="cpu", dtype="float32"))
        g = stream(0, "factors")
        a = {n: (g.random((RANK, m.inp), np.float32) * 2 - 1) / m.inp**0.5 for n, m in base.layout.modules.items()}
        a = {n: x.astype(np.float32) for n, x in a.items()}
        print(f"loss before: {held_out_loss(base, None, held_out):.4f}")
        ours, theirs = [], []
        for _ in range(args.repeats):
            seconds, adapter = with_trainer(folder, base, a, rows, args.steps, args.batch)
            theirs.append(seconds)
            attach(base, [], "bare")
            seconds, own = with_fedlora(base, a, rows, args.steps, args.batch, args.threads)
            ours.append(seconds)
        presented = args.steps * args.batch
        for who, times, found in (("Trainer + PEFT", theirs, adapter), ("fedlora", ours, own)):
            rate, loss = presented / min(times), held_out_loss(base, found, held_out)
            print(f"{who:15s} {rate:8.2f} rows/s   loss {loss:.4f}   {min(times):.2f} s")
        print(f"ratio {min(theirs) / min(ours):.2f}")


if __name__ == "__main__":
    main()
