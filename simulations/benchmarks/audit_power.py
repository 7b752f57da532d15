"""How often the audit flags faults that were planted, and how often the code as it is, as a Markdown table.

    python -m simulations.benchmarks.audit_power [--repeats 20] [--canaries 200,500]

Clients: the attack of `fedlora audit` on whole runs at client level. Rows: its attack by gradients on private training
of a small random llama, ten times 32 canaries. Keys, coins and canaries of repetition i are of seed i. mu is the shift
over the noise, the larger one of the plain attack and of that on replayed noise; it is cut at 100.
`forgotten charges`: of four rounds or steps one is charged, so the claim is lower.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Callable, Iterator, Sequence
from functools import partial

from transformers import LlamaConfig, LlamaForCausalLM, set_seed

from fedlora.base import Base, load_base
from fedlora.config import ModelConfig
from fedlora.privacy.accounting import Privacy
from fedlora.privacy.audit import Finding
from simulations.audit import ClientAudit, RowAudit
from simulations.planted import CLIENT_FAULTS, ROW_FAULTS, clients_with, rows_with

__all__ = ["ROWS", "main", "row", "small_base"]

ROWS = RowAudit(privacy=Privacy(clip=0.5, noise_multiplier=1.0, sampling=1.0, expected=32.0), canaries=32)


def small_base() -> Base:
    """A random llama of two layers of width 16 over 61 tokens, on the CPU."""
    shape = LlamaConfig(
        vocab_size=61,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.2,
        pad_token_id=0,
    )
    set_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        LlamaForCausalLM(shape).save_pretrained(folder)
        return load_base(ModelConfig(name=folder, device="cpu"))


def row(attack: str, fault: str, found: Sequence[Finding]) -> str:
    """One line of the table: flagged of all, the means of mu and of the best lower bound, the claim."""
    mu = statistics.fmean(max(b.mu for b in one.bounds if b.mu is not None) for one in found)
    bound = statistics.fmean(one.best.epsilon for one in found)
    flagged = f"{sum(one.flagged for one in found)} of {len(found)}"
    return f"| {attack} | {fault} | {flagged} | {mu:.2f} | {bound:.2f} | {found[0].claimed:.2f} |"


def attacks(canaries: Sequence[int]) -> Iterator[tuple[str, Sequence[str], Callable[..., Finding]]]:
    """(name, its faults, the audit of a `fault` and a `seed`); the small base is made last."""
    for count in canaries:
        yield f"clients, {count} canaries", CLIENT_FAULTS, partial(clients_with, settings=ClientAudit(canaries=count))
    name = f"rows, {ROWS.repeats} times {ROWS.canaries} canaries"
    yield name, ROW_FAULTS, partial(rows_with, base=small_base(), settings=ROWS)


def main() -> None:
    """Print the table, a line as soon as it is known."""
    parser = argparse.ArgumentParser(description="how often the audit flags faults that were planted")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--canaries", type=lambda said: [int(x) for x in said.split(",")], default=[200, 500])
    given = parser.parse_args()
    print("| attack | fault | flagged | mu, mean | lower bound, mean | claimed epsilon |")
    print("|---|---|---:|---:|---:|---:|", flush=True)
    for attack, faults, audit in attacks(given.canaries):
        for fault in ("none", *faults):
            print(row(attack, fault, [audit(fault=fault, seed=seed) for seed in range(given.repeats)]), flush=True)


if __name__ == "__main__":
    main()
