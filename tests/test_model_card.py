"""The card of a released adapter: what it says, what it must not say, and that it is the same each time."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from peft import PeftModel
from transformers import AutoModelForSequenceClassification

from fedlora.adapter import Adapter, Factors
from fedlora.config import load_config
from fedlora.data.batches import pad
from fedlora.data.rows import TokenRow
from fedlora.model_card import model_card
from fedlora.peft_bridge import save_adapter
from fedlora.provenance import Base, Code, Manifest, Ranks, Round
from fedlora.state import Block
from fedlora.training.attach import attach
from fedlora.training.objective import class_logits

CONFIG = load_config(None, ["model.name=owner/base", "name=ward | letters", "method.name=ffa-lora"])
MANIFEST = Manifest(
    format="fedlora-manifest/2",
    run="a-run",
    method="ffa-lora",
    settings="0" * 64,
    base=Base(name="owner/base", revision=None, fingerprint="f" * 64),
    ranks={"adapter": Ranks(smallest=4, largest=16, modules=21), "tasks/one": Ranks(smallest=4, largest=4, modules=21)},
    public={},
    rounds=tuple(
        Round(round=n, participants=p, state="", refused=r) for n, p, r in ((1, 3, {}), (2, 2, {"not finite": 1}))
    ),
    privacy="none claimed",
    code=Code(digest="0" * 64, versions={}, constraints=None),
)


def events(scored: int = 3) -> list[dict[str, Any]]:
    names = ["hospital-a", "hospital-b", "hospital-c"]
    rounds = [
        {
            "event": "round",
            "round": n,
            "seconds": 12.345,
            "bytes_up": 1_500_000,
            "bytes_down": 2_000_000,
            "clients": [{"id": name, "loss_after": 0.987, "examples": 77} for name in names],
            "refused": [{"client": "hospital-b", "rule": "not finite", "detail": "secret"}],
            "evaluation": {
                "score": 0.625 + n / 1000,
                "loss": 1.5,
                "counted": 40,
                "groups": {"pneumonia": {"correct": 3, "counted": 7}},
                "clients": {name: {"score": 0.4321, "counted": 10} for name in names[:scored]},
                "server": {
                    "score": 0.75,
                    "loss": 0.5,
                    "groups": {"a|b`": {"correct": 1, "counted": 4}, "empty": {"correct": 0, "counted": 0}},
                },
            },
            "border": {"server": {"first": {"score": 0.5, "counted": 4}}},
        }
        for n in (1, 2)
    ]
    clients = [{"id": name, "rank": rank} for name, rank in zip(names, (4, 4, 16), strict=True)]
    return [{"event": "start", "started": "2026-01-31T09:30:00Z", "clients": clients}, *rounds]


def test_the_front_matter_is_what_the_hub_reads() -> None:
    card = model_card(MANIFEST, CONFIG, events())
    before, front, body = card.split("---\n", 2)
    assert before == ""
    assert yaml.safe_load(front) == {
        "base_model": "owner/base",
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "tags": ["federated-learning", "fedlora", "ffa-lora", "lora"],
    }
    assert body.startswith("\n# ward \\| letters\n")
    unnamed = load_config(None, ["model.name=owner/base"])
    for name, title in (("owner/base", "owner/base"), ("/srv/models/minilm", "minilm")):
        manifest = replace(MANIFEST, base=replace(MANIFEST.base, name=name))
        assert f"\n# LoRA adapter for {title}, federated (ffa-lora)\n" in model_card(manifest, unnamed, events())
    assert card.endswith("\n")
    assert "\n\n\n" not in card


def test_it_says_how_it_was_trained_and_scored() -> None:
    lines = model_card(MANIFEST, CONFIG, events()).splitlines()
    for line in (
        "| method | ffa-lora |",
        "| clients | 3 |",
        "| their ranks (clients) | 4 (2), 16 (1) |",
        "| a client in a round | 15 steps, 16 rows a step |",
        "| rounds | 2 |",
        "| answers in a round | 2 to 3 |",
        "| answers refused | 1 |",
        "| sent by all clients | 3.0 MB |",
        "| sent to all clients | 4.0 MB |",
        "| adapter | 21 modules of rank 4 to 16 |",
        "| tasks/one | 21 modules of rank 4 |",
        "| the server | 75.0% | 0.500 |",
        "| the server, a\\|b\\` | 25.0% |  |",
        "| the server, task first | 50.0% |  |",
        "| the clients, held out by them | 62.7% | 1.500 |",
    ):
        assert line in lines, line
    assert any(line.startswith("After round 2.") for line in lines)
    assert not any("empty" in line for line in lines)


def test_scores_of_a_round_that_trained_some_tasks_say_which() -> None:
    of_tasks = [{**e, "tasks": ["first", "second"]} if e["event"] == "round" else e for e in events()]
    lines = model_card(MANIFEST, CONFIG, of_tasks).splitlines()
    assert "| the server, in training then: first, second | 75.0% | 0.500 |" in lines
    assert "| the clients, held out by them, in training then: first, second | 62.7% | 1.500 |" in lines


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # PEFT asks for it
def test_a_head_that_reads_means_comes_with_the_lines_that_give_its_logits(
    load: Any, folders: dict[str, Path], labelled: list[TokenRow], tmp_path: Path
) -> None:
    """The lines of the card, run on a folder that was saved, against our own logits."""
    classes = ["model.name=owner/base", "model.task_type=sequence-classification", "model.labels=a,b,c"]
    config = load_config(None, [*classes, "data.name=rows.jsonl", "model.pooling=mean"])
    card = model_card(MANIFEST, config, events())
    assert "This head reads the mean of the last hidden states." in card
    assert "last_hidden_state" not in model_card(MANIFEST, load_config(None, [*classes, "data.name=r.jsonl"]), events())
    base = load("bert", pooling="mean", target_modules=("query", "value"))
    g = np.random.default_rng(0)
    head = {n: g.normal(size=s).astype(np.float32) for n, s in base.layout.head.items()}
    adapter = Adapter(
        {n: Factors(g.normal(size=(2, m.inp)), g.normal(size=(m.out, 2))) for n, m in base.layout.modules.items()}
    )
    save_adapter(tmp_path, adapter, base.layout, base_name="b", task_type="sequence-classification", head=head)
    attach(base, (Block(adapter=adapter, born=1),), "one", None, head)
    batch = pad(labelled[:4], base.pad_id)
    whole = AutoModelForSequenceClassification.from_pretrained(folders["bert"], num_labels=3)
    texts = {"input_ids": torch.from_numpy(batch.tokens), "attention_mask": torch.from_numpy(batch.attention)}
    names = {"model": PeftModel.from_pretrained(whole, tmp_path).eval(), "texts": texts}
    code = card.split("```python")[1].split("```")[0].split("padding=True)\n")[1]
    with torch.inference_mode():
        exec(code, names)
        torch.testing.assert_close(names["logits"], class_logits(base, batch), rtol=1e-4, atol=1e-5)


def test_one_of_a_thing_is_not_called_many() -> None:
    manifest = replace(MANIFEST, ranks={"adapter": Ranks(smallest=4, largest=4, modules=1)})
    epochs = load_config(None, ["training.local_steps=none", "training.local_epochs=1", "training.batch_size=1"])
    lines = model_card(manifest, epochs, events()).splitlines()
    assert "| a client in a round | 1 pass over the client's rows, 1 row a step |" in lines
    assert "| adapter | 1 module of rank 4 |" in lines


def test_it_holds_no_name_and_no_value_of_one_client_and_no_time() -> None:
    card = model_card(MANIFEST, CONFIG, events())
    for text in ("hospital", "43.2", "0.987", "77", "secret", "pneumonia", "12.3", "2026"):
        assert text not in card, text


def test_the_scores_of_fewer_than_three_clients_are_left_out() -> None:
    assert "held out by them" not in model_card(MANIFEST, CONFIG, events(scored=2))


def test_it_is_the_same_each_time_and_whatever_files_the_manifest_lists() -> None:
    assert model_card(MANIFEST, CONFIG, events()) == model_card(replace(MANIFEST, files={}), CONFIG, events())


def test_privacy_is_claimed_only_where_the_manifest_does() -> None:
    assert "None claimed: no differential privacy" in model_card(MANIFEST, CONFIG, events())
    card = model_card(replace(MANIFEST, privacy="client level, epsilon 3 at delta 1e-6"), CONFIG, events())
    assert "client level, epsilon 3 at delta 1e-6" in card
    assert "None claimed" not in card


def snippet(card: str) -> str:
    return card.split("```python\n")[1].split("```")[0]


@pytest.mark.parametrize(
    ("name", "settings", "line", "front"),
    [
        ("owner/base", [], "base = AutoModelForCausalLM.from_pretrained('owner/base')", True),
        ("tiny", [], "base = AutoModelForCausalLM.from_pretrained(str(base_path()))", False),
        ("/home/someone/models/mine", [], "base = AutoModelForCausalLM.from_pretrained('mine')", False),
        (
            "owner/base",
            ["model.task_type=sequence-classification", "model.labels=no,yes,maybe"],
            "base = AutoModelForSequenceClassification.from_pretrained('owner/base', num_labels=3)",
            True,
        ),
    ],
)
def test_it_says_how_to_load_it_and_tells_no_path(name: str, settings: list[str], line: str, front: bool) -> None:
    manifest = replace(MANIFEST, base=replace(MANIFEST.base, name=name))
    data = ["data.name=rows.jsonl"] if settings else []
    card = model_card(manifest, load_config(None, [f"model.name={name}", *settings, *data]), events())
    code = snippet(card)
    compile(code, "card", "exec")
    assert line in code.splitlines()
    assert "/home" not in card
    assert ("base_model:" in card) is front


def test_a_revision_is_loaded_too() -> None:
    base = replace(MANIFEST.base, revision="v1.2")
    assert "('owner/base', revision='v1.2')" in model_card(replace(MANIFEST, base=base), CONFIG, events())


def test_a_run_that_scored_nothing_and_logged_nothing_has_a_card() -> None:
    card = model_card(replace(MANIFEST, rounds=(), ranks={}), CONFIG, [])
    assert "## Scores" not in card
    assert "| rounds | 0 |" in card
    assert json.dumps(card)
