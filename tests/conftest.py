"""Small random bases of three architectures, saved once, and rows, plans and asks to train them on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

from fedlora.base import Base, load_base
from fedlora.config import ModelConfig
from fedlora.data.rows import TokenRow
from fedlora.state import Ask, Header, LocalTraining, TrainPlan

VOCABULARY = 61
FAMILIES = ("llama", "gpt2", "bert", "gemma2")


def _model(family: str) -> torch.nn.Module:
    if family == "llama":
        return LlamaForCausalLM(
            LlamaConfig(
                vocab_size=VOCABULARY,
                hidden_size=16,
                intermediate_size=24,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=2,
                max_position_embeddings=64,
                initializer_range=0.2,
                pad_token_id=0,
            )
        )
    if family == "gpt2":
        return GPT2LMHeadModel(
            GPT2Config(
                vocab_size=VOCABULARY,
                n_embd=16,
                n_layer=2,
                n_head=2,
                n_positions=64,
                initializer_range=0.2,
                bos_token_id=0,
                eos_token_id=0,
            )
        )
    if family == "gemma2":
        return Gemma2ForCausalLM(
            Gemma2Config(
                vocab_size=VOCABULARY,
                hidden_size=16,
                intermediate_size=24,
                num_hidden_layers=2,
                num_attention_heads=2,
                num_key_value_heads=1,
                head_dim=8,
                max_position_embeddings=64,
                initializer_range=0.2,
                final_logit_softcapping=30.0,
            )
        )
    return BertForSequenceClassification(
        BertConfig(
            vocab_size=VOCABULARY,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=64,
            num_labels=3,
            initializer_range=0.2,
        )
    )


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    torch.set_num_threads(1)
    out = {}
    for i, family in enumerate(FAMILIES):
        torch.manual_seed(i)
        out[family] = tmp_path_factory.mktemp(family)
        _model(family).save_pretrained(out[family])
    return out


@pytest.fixture
def load(folders: dict[str, Path]) -> Callable[..., Base]:
    """`load("llama", dtype="bfloat16")`: a base of that family."""

    def make(family: str, **settings: object) -> Base:
        if family == "bert":
            settings = {"task_type": "sequence-classification", "labels": ("a", "b", "c"), **settings}
        return load_base(ModelConfig(name=str(folders[family]), device="cpu", **settings))  # type: ignore[arg-type]

    return make


@pytest.fixture
def rows() -> list[TokenRow]:
    """Thirty rows of random tokens, the last few of each the answer; labels are unset."""
    g = np.random.default_rng(0)
    out = []
    for i in range(30):
        length, answers = int(g.integers(4, 20)), int(g.integers(1, 4))
        answer = np.arange(length) >= length - answers
        out.append(TokenRow(g.integers(1, VOCABULARY, length).astype(np.int32), answer, None, f"g{i % 2}"))
    return out


@pytest.fixture
def labelled(rows: list[TokenRow]) -> list[TokenRow]:
    return [replace(row, label=int(row.tokens[0]) % 3, answer=np.zeros_like(row.answer)) for row in rows]


@pytest.fixture
def plan() -> TrainPlan:
    return TrainPlan(
        method="test",
        rank=4,
        rows=4,
        scale=2.0,
        train=("A", "B"),
        send=("A", "B"),
        a_from="fresh",
        b_from="zero",
        training=LocalTraining(
            learning_rate=1e-2,
            local_steps=5,
            local_epochs=None,
            batch_size=6,
            schedule="constant",
            warmup=0.0,
            clip_norm=None,
        ),
        seed=3,
    )


@pytest.fixture
def header() -> Callable[..., Header]:
    def make(base: Base, client: str = "c0", round: int = 1) -> Header:
        return Header(run="r", round=round, client=client, kind="train", base=base.fingerprint)

    return make


@pytest.fixture
def given() -> Callable[..., Ask]:
    """An ask that carries a random pair of `plan.rows` rows for every module, and the base's own head."""

    def make(base: Base, plan: TrainPlan, seed: int = 0) -> Ask:
        g = np.random.default_rng(seed)
        arrays: dict[str, np.ndarray] = {}
        for name, m in base.layout.modules.items():
            arrays[f"A:{name}"] = (g.normal(size=(plan.rows, m.inp)) / np.sqrt(m.inp)).astype(np.float32)
            arrays[f"B:{name}"] = (g.normal(size=(m.out, plan.rows)) / 20).astype(np.float32)
        arrays |= {f"head:{n}": x for n, x in base.initial_head.items()}
        return Ask(plan=replace(plan, a_from="given", b_from="given"), arrays=arrays)

    return make
