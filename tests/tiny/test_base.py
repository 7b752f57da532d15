"""The embedded base: found through the distribution, small, loads silently, answers what it was taught and no more."""

from __future__ import annotations

import importlib.metadata
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from jinja2 import TemplateError
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

import fedlora.tiny
from fedlora.data.prompt import PromptFormat
from fedlora.data.rows import Row
from fedlora.errors import ConfigError
from fedlora.tiny import SKILLS, base_path, rows
from fedlora.tiny.pretrain import CHAT_TEMPLATE

PACKAGE_LIMIT = 12e6  # bytes


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(base_path())


@pytest.fixture(scope="module")
def model() -> Any:
    return AutoModelForCausalLM.from_pretrained(base_path(), dtype=torch.float32)


class FakeDistribution:
    """As much of a distribution as base_path reads."""

    version = "9.9"

    def __init__(self, origin: dict[str, Any] | None, site: Path) -> None:
        self.origin, self.site = origin, site

    def read_text(self, name: str) -> str | None:
        assert name == "direct_url.json"
        return None if self.origin is None else json.dumps(self.origin)

    def locate_file(self, path: str) -> Path:
        return self.site / path


def put_base(root: Path) -> Path:
    folder = root / "fedlora" / "tiny" / "base"
    folder.mkdir(parents=True)
    (folder / "model.safetensors").touch()
    return folder


@pytest.mark.parametrize("origin", [None, {"url": "file:///elsewhere", "dir_info": {}}], ids=["index", "folder"])
def test_base_path_of_an_installed_wheel(
    origin: dict[str, Any] | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.metadata, "distribution", lambda name: FakeDistribution(origin, tmp_path))
    folder = put_base(tmp_path)
    assert base_path() == folder


def test_base_path_of_an_editable_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "my source"  # the space is quoted in the URL
    origin = {"url": source.as_uri(), "dir_info": {"editable": True}}
    monkeypatch.setattr(importlib.metadata, "distribution", lambda name: FakeDistribution(origin, tmp_path / "site"))
    assert base_path.__module__ == "fedlora.tiny"
    folder = put_base(source)
    assert base_path() == folder


def test_a_distribution_without_weights_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.metadata, "distribution", lambda name: FakeDistribution(None, tmp_path))
    with pytest.raises(ConfigError, match=r"fedlora 9\.9 has no embedded base in .*; reinstall it"):
        base_path()


def test_no_distribution_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> None:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "distribution", absent)
    with pytest.raises(ConfigError, match=r"not installed here; run `pip install fedlora`"):
        base_path()


def test_skills_and_path_need_no_torch() -> None:
    code = (
        "import sys; sys.modules['torch'] = sys.modules['transformers'] = None\n"
        "from fedlora.tiny import base_path, rows; base_path(); rows('kilos', 'train', 1, 0)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_the_package_is_small() -> None:
    files = [f for f in base_path().parent.rglob("*") if f.is_file() and "__pycache__" not in f.parts]
    assert sum(f.stat().st_size for f in files) <= PACKAGE_LIMIT


@pytest.mark.slow
def test_it_loads_without_a_word(capfd: pytest.CaptureFixture[str]) -> None:
    code = (
        "import warnings; warnings.simplefilter('error')\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer, logging\n"
        "logging.disable_progress_bar()\n"
        "from fedlora.tiny import base_path\n"
        "AutoTokenizer.from_pretrained(base_path()); AutoModelForCausalLM.from_pretrained(base_path())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_it_is_a_small_tied_llama(model: Any) -> None:
    assert model.config.model_type == "llama"
    assert model.config.tie_word_embeddings
    assert 1_000_000 <= model.num_parameters() <= 3_000_000
    with safe_open(base_path() / "model.safetensors", "pt") as stored:
        assert "lm_head.weight" not in stored.keys()  # noqa: SIM118 - not a dict


def test_tokens_give_the_text_back(tokenizer: Any) -> None:
    for text in [
        "Convert 1250 g",
        "  two  spaces,\n\ttab",
        "ISO-8601: Zürich 東京 🙂 ARC",
        '{"id": 7}',
        "a<|b|>c",
    ]:
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    for skill in SKILLS:
        for row in rows(skill, "test", 5, 0):
            assert tokenizer.decode(tokenizer(row["input"])["input_ids"]) == row["input"]


def test_each_digit_is_a_token(tokenizer: Any) -> None:
    assert tokenizer.tokenize("2048") == ["2", "0", "4", "8"]


def test_special_tokens_are_single(tokenizer: Any) -> None:
    specials = ["<|pad|>", "<|user|>", "<|assistant|>", "<|end|>"]
    assert [len(tokenizer(token)["input_ids"]) for token in specials] == [1, 1, 1, 1]
    assert (tokenizer.pad_token, tokenizer.eos_token) == ("<|pad|>", "<|end|>")


def test_the_model_and_tokenizer_agree(model: Any, tokenizer: Any) -> None:
    assert model.config.vocab_size == len(tokenizer)
    assert model.config.eos_token_id == model.generation_config.eos_token_id == tokenizer.eos_token_id
    assert model.config.pad_token_id == tokenizer.pad_token_id


def test_the_chat_template_is_exact(tokenizer: Any) -> None:
    user = {"role": "user", "content": "Convert to grams\n1.250 kg"}
    answer = {"role": "assistant", "content": "1250 g"}
    asked = "<|user|>Convert to grams\n1.250 kg<|assistant|>"
    assert tokenizer.apply_chat_template([user], tokenize=False, add_generation_prompt=True) == asked
    assert tokenizer.apply_chat_template([user, answer], tokenize=False) == asked + "1250 g<|end|>"


def test_turns_that_the_base_does_not_know_are_reported(tokenizer: Any) -> None:
    with pytest.raises(TemplateError, match="only user and assistant have turns, not system"):
        tokenizer.apply_chat_template([{"role": "system", "content": "Be brief."}], tokenize=False)
    talk = (("user", "u"), ("assistant", "a"))
    talks = [Row(messages=(("system", "s"), *talk), source="f:1"), Row(messages=talk, source="f:2")]
    kept, report = PromptFormat(tokenizer, None, 64).encode(talks)
    assert len(kept) == 1
    assert report.dropped == (("f:1", "no such prompt: the format does not fit this conversation"),)
    assert tokenizer.chat_template == CHAT_TEMPLATE


def exact_match(model: Any, tokenizer: Any, public: bool, each: int) -> float:
    """By the library's own greedy generation, left-padded."""
    examples = [row for name, skill in SKILLS.items() if skill.public == public for row in rows(name, "test", each, 11)]
    asked = [[{"role": "user", "content": f"{row['instruction']}\n{row['input']}"}] for row in examples]
    prompts = tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
    batch = tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left")
    out = model.generate(**batch, max_new_tokens=24, do_sample=False)
    given = tokenizer.batch_decode(out[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    hits: int = sum(row["output"] == text for row, text in zip(examples, given, strict=True))
    return hits / len(examples)


def test_it_answers_what_it_was_taught(model: Any, tokenizer: Any) -> None:
    assert exact_match(model, tokenizer, public=True, each=1) >= 0.95


def test_it_does_not_know_the_private_skills(model: Any, tokenizer: Any) -> None:
    assert exact_match(model, tokenizer, public=False, each=3) <= 0.10


def test_the_record_says_how_it_was_made(model: Any) -> None:
    record = json.loads((base_path() / "training.json").read_text())
    assert record["recipe"].keys() >= {"seed", "steps", "vocabulary"}
    assert record["parameters"] == model.num_parameters()
    assert record["loss"][-1][1] < 0.1 * record["loss"][0][1]
    assert record["exact_match_public"]["mean"] >= 0.95
    assert record["exact_match_private"]["mean"] <= 0.10
    assert record["versions"].keys() >= {"torch", "transformers", "tokenizers", "numpy"}


def test_the_package_exports_what_others_use() -> None:
    assert all(hasattr(fedlora.tiny, name) for name in fedlora.tiny.__all__)
