"""The frozen base: what is adapted, what names it, and that blocks come and go without a trace."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from fedlora.adapter import Adapter, Factors
from fedlora.base import Base, _shared, load_base
from fedlora.config import ModelConfig
from fedlora.data.batches import pad
from fedlora.data.rows import TokenRow
from fedlora.errors import AdapterError, BaseMismatch, ConfigError
from fedlora.state import Ask, Block, Header, Module, TrainPlan
from fedlora.training.attach import attach
from fedlora.training.local import train_client
from fedlora.training.objective import class_logits
from fedlora.wire import blocks_id


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> None:
    torch.set_num_threads(1)


def llama(folder: Path, *, tied: bool = False, seed: int = 0, **save: Any) -> Path:
    torch.manual_seed(seed)
    LlamaForCausalLM(
        LlamaConfig(
            vocab_size=40,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            initializer_range=0.2,
            tie_word_embeddings=tied,
        )
    ).save_pretrained(folder, **save)
    return folder


def encoder_settings(kind: type) -> Any:
    return kind(vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2)


def load(folder: Path, **settings: Any) -> Base:
    return load_base(ModelConfig(name=str(folder), device="cpu", **settings))


def classifier(folder: Path, **settings: Any) -> Base:
    return load(folder, task_type="sequence-classification", labels=("no", "yes", "maybe"), **settings)


def random_adapter(base: Base, seed: int, rank: int = 3) -> Adapter:
    g = np.random.default_rng(seed)
    shapes = base.layout.modules.items()
    return Adapter({n: Factors(g.normal(size=(rank, m.inp)), g.normal(size=(m.out, rank)), 0.1) for n, m in shapes})


def logits(base: Base) -> torch.Tensor:
    with torch.inference_mode():
        out: torch.Tensor = base.model(input_ids=torch.arange(1, 9)[None]).logits
    return out


# -- what is adapted


def test_all_linear_leaves_out_the_output_head(tmp_path: Path) -> None:
    base = load(llama(tmp_path))
    names = {n.rpartition(".")[2] for n in base.layout.modules}
    assert names == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert len(base.layout.modules) == 14
    down = base.layout.modules["model.layers.1.mlp.down_proj"]
    assert (down.out, down.inp, down.kind) == (16, 24, "linear")
    assert not base.layout.head
    assert not any(p.requires_grad for p in base.model.parameters())


def test_conv1d_shapes_are_out_and_in(tmp_path: Path) -> None:
    GPT2LMHeadModel(GPT2Config(vocab_size=40, n_embd=16, n_layer=1, n_head=2)).save_pretrained(tmp_path)
    base = load(tmp_path)
    spec = base.layout.modules["transformer.h.0.attn.c_attn"]
    assert (spec.out, spec.inp, spec.kind) == (48, 16, "conv1d")
    assert set(base.layout.modules) == {f"transformer.h.0.{n}" for n in ("attn.c_attn", "attn.c_proj", "mlp.c_fc")} | {
        "transformer.h.0.mlp.c_proj"
    }


def test_a_classifier_has_a_head_and_three_labels(tmp_path: Path) -> None:
    BertForSequenceClassification(encoder_settings(BertConfig)).save_pretrained(tmp_path)
    base = classifier(tmp_path)
    assert base.layout.head == {"classifier.bias": (3,), "classifier.weight": (3, 16)}
    assert "bert.pooler.dense" in base.layout.modules
    assert "classifier" not in base.layout.modules
    assert base.initial_head["classifier.weight"].dtype == np.float32


def test_a_pooler_that_the_files_lack_is_part_of_the_head(tmp_path: Path) -> None:
    BertForMaskedLM(encoder_settings(BertConfig)).save_pretrained(tmp_path)
    first, second = classifier(tmp_path), classifier(tmp_path)
    assert "bert.pooler.dense.weight" in first.layout.head
    assert "bert.pooler.dense" not in first.layout.modules
    for name, x in first.initial_head.items():  # fresh, and the same for everybody
        np.testing.assert_array_equal(x, second.initial_head[name])


# -- who reads the same input


def test_modules_that_read_one_tensor_share_it(tmp_path: Path) -> None:
    """q, k, v of a layer, gate and up of its MLP; the first by name stands for them."""
    base = load(llama(tmp_path))
    shares = {n: m.shares for n, m in base.layout.modules.items()}
    first = {"q_proj": "self_attn.k_proj", "v_proj": "self_attn.k_proj", "up_proj": "mlp.gate_proj"}
    for n, shared in shares.items():
        layer, _, last = n.rsplit(".", 2)
        assert shared == (f"{layer}.{first[last]}" if last in first else "")
    assert set(base.layout.inputs()) == {n for n in shares if n.rpartition(".")[2] not in first}
    assert base.layout.features == 16
    assert load(tmp_path).layout.digest == base.layout.digest


def test_only_adapted_modules_share(tmp_path: Path) -> None:
    llama(tmp_path)
    pair = load(tmp_path, target_modules=("q_proj", "v_proj", "embed_tokens")).layout
    assert {n: m.shares for n, m in pair.modules.items() if m.shares} == {
        f"model.layers.{i}.self_attn.v_proj": f"model.layers.{i}.self_attn.q_proj" for i in (0, 1)
    }
    assert not any(m.shares for m in load(tmp_path, target_modules=("v_proj",)).layout.modules.values())


def test_the_same_numbers_in_two_tensors_are_two_inputs(tmp_path: Path) -> None:
    """A classifier's modules too; a module that no token passes, and layers that share weights, read their own."""
    BertForSequenceClassification(encoder_settings(BertConfig)).save_pretrained(tmp_path / "bert")
    layout = classifier(tmp_path / "bert").layout
    self_ = "bert.encoder.layer.0.attention.self"
    assert {n: m.shares for n, m in layout.modules.items() if m.shares} == {
        f"{self_}.query": f"{self_}.key",
        f"{self_}.value": f"{self_}.key",
    }

    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.config = BertConfig(vocab_size=40)
            self.device = torch.device("cpu")
            for name in ("a", "b", "c", "d", "idle"):
                setattr(self, name, nn.Linear(1, 1))

        def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
            x = input_ids[..., None].float()
            y = self.a(x) + self.b(x) + self.c(x.clone()) + self.d(x)
            return y + self.d(x + 1)  # called twice: another input than a's

    odd = _shared(Odd(), {n: Module(out=1, inp=1) for n in ("d", "c", "b", "a", "idle")})
    assert {n: m.shares for n, m in odd.items()} == {"a": "", "b": "a", "c": "", "d": "", "idle": ""}
    assert list(odd) == ["d", "c", "b", "a", "idle"]


def test_a_deep_head_travels_whole(tmp_path: Path) -> None:
    RobertaForSequenceClassification(encoder_settings(RobertaConfig)).save_pretrained(tmp_path)
    base = classifier(tmp_path)
    assert set(base.layout.head) == {f"classifier.{m}.{p}" for m in ("dense", "out_proj") for p in ("bias", "weight")}
    assert not [n for n in base.layout.modules if n.startswith("classifier")]


@pytest.mark.parametrize("pooler", [True, False])
def test_a_head_may_read_the_mean_of_the_last_hidden_states(
    pooler: bool, tmp_path: Path, plan: TrainPlan, header: Callable[..., Header], given: Callable[..., Ask]
) -> None:
    """Logits are those of each row alone, by hand; a pooler, loaded or not, is neither passed nor trained."""
    torch.manual_seed(0)
    settings = encoder_settings(BertConfig)
    (BertForSequenceClassification if pooler else BertForMaskedLM)(settings).save_pretrained(tmp_path)
    base = classifier(tmp_path, pooling="mean")
    assert base.layout.head == {"classifier.bias": (3,), "classifier.weight": (3, 16)}
    assert len(base.layout.modules) == 6
    assert all(name.startswith("bert.encoder.") for name in base.layout.modules)
    rows = [
        TokenRow(np.arange(3, 3 + length, dtype=np.int32), np.zeros(length, np.bool_), label)
        for label, length in enumerate((9, 4, 6))
    ]
    base.set_head({n: np.random.default_rng(1).normal(size=s) for n, s in base.layout.head.items()})
    with torch.inference_mode():
        together = class_logits(base, pad(rows, base.pad_id))
        for row, got in zip(rows, together, strict=True):
            states = base.model.bert(input_ids=torch.from_numpy(row.tokens).long()[None]).last_hidden_state[0]
            torch.testing.assert_close(got, base.model.classifier(states.mean(0)))
    plan = replace(plan, train=("A", "B", "head"), send=("B", "head"))
    answer = train_client(base, header(base), given(base, plan), rows)
    assert answer.metrics["loss_after"] < answer.metrics["loss_before"]
    assert {key for key in answer.arrays if key.startswith("head")} == {
        "head:classifier.bias",
        "head:classifier.weight",
    }


def test_means_are_read_by_a_head_of_one_linear_module_only(tmp_path: Path) -> None:
    RobertaForSequenceClassification(encoder_settings(RobertaConfig)).save_pretrained(tmp_path)
    told = (
        r"mean needs a head of one linear module \[3, 16\]; .* has classifier.dense Linear, classifier.out_proj Linear"
    )
    with pytest.raises(ConfigError, match=told):
        classifier(tmp_path, pooling="mean")


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_decoder_without_a_pad_token_classifies_batches(
    family: str,
    tmp_path: Path,
    plan: TrainPlan,
    header: Callable[..., Header],
    given: Callable[..., Ask],
) -> None:
    torch.manual_seed(0)
    if family == "llama":
        settings = LlamaConfig(
            vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2
        )
        LlamaForSequenceClassification(settings).save_pretrained(tmp_path)
    else:
        small = GPT2Config(vocab_size=40, n_embd=16, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0)
        GPT2ForSequenceClassification(small).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text()).get("pad_token_id") is None
    base = classifier(tmp_path)
    rows = [
        TokenRow(np.arange(3, 3 + length, dtype=np.int32), np.zeros(length, np.bool_), label)
        for label, length in enumerate((9, 4))
    ]
    with torch.inference_mode():
        both = class_logits(base, pad(rows, base.pad_id))
        alone = [base.model(input_ids=torch.from_numpy(r.tokens).long()[None]).logits[0] for r in rows]
    torch.testing.assert_close(both, torch.stack(alone))  # of each row's own last token, not of the padding
    plan = replace(plan, training=replace(plan.training, local_steps=1, batch_size=2))
    answer = train_client(base, header(base), given(base, plan), rows)
    assert np.isfinite(answer.metrics["loss_after"])


def test_name_endings_choose_modules(tmp_path: Path) -> None:
    llama(tmp_path)
    by_tuple = load(tmp_path, target_modules=("q_proj", "layers.1.mlp.up_proj")).layout
    by_text = load(tmp_path, target_modules="q_proj, layers.1.mlp.up_proj").layout
    assert by_tuple == by_text
    assert sorted(n.removeprefix("model.layers.") for n in by_text.modules) == [
        "0.self_attn.q_proj",
        "1.mlp.up_proj",
        "1.self_attn.q_proj",
    ]
    with pytest.raises(ConfigError, match=r"\['q_prj'\] match no module .*near: .*'q_proj'"):
        load(tmp_path, target_modules=("q_prj", "v_proj"))


# -- blocks


@pytest.mark.parametrize("conv", [False, True])
def test_blocks_are_derived_from_the_pristine_weight(conv: bool, tmp_path: Path) -> None:
    if conv:
        GPT2LMHeadModel(GPT2Config(vocab_size=40, n_embd=16, n_layer=1, n_head=2)).save_pretrained(tmp_path)
    else:
        llama(tmp_path)
    base = load(tmp_path, target_modules=("wte", "c_fc") if conv else ("embed_tokens", "q_proj", "down_proj"))
    if conv:
        assert not base.layers["transformer.wte"].folds  # its weight is the output head's too
    pristine, bare = {n: layer.weight.clone() for n, layer in base.layers.items()}, logits(base)
    x, y = (Block(adapter=random_adapter(base, s), born=s) for s in (1, 2))
    base.set_blocks([x], "x")
    base.set_blocks([x, y], "xy")
    for n, layer in base.layers.items():
        if layer.folds:
            want = pristine[n].double().numpy()
            update = x.adapter[n].dense() + y.adapter[n].dense()
            want = want + (update if base.layout.modules[n].kind == "linear" else update.T)
            np.testing.assert_allclose(layer.weight.numpy(), want, atol=1e-5)
    there = logits(base)
    base.set_blocks((), "none")
    assert torch.equal(logits(base), bare)
    base.set_blocks([x, y], "xy again")
    assert torch.equal(logits(base), there)  # the way there leaves no trace
    assert not torch.equal(there, bare)


def test_a_known_id_costs_nothing(tmp_path: Path) -> None:
    base = load(llama(tmp_path))
    block = Block(adapter=random_adapter(base, 1), born=1)
    base.set_blocks([block], "1")
    there = logits(base)
    base.set_blocks([], "1")
    assert torch.equal(logits(base), there)


def test_factored_and_folded_blocks_agree(tmp_path: Path) -> None:
    base = load(llama(tmp_path), target_modules=("embed_tokens", "q_proj", "v_proj"))
    adapter = random_adapter(base, 1)
    attach(base, [Block(adapter=adapter, born=1)], "1")
    folded = logits(base)
    attach(base, [], "0", frozen=adapter)
    torch.testing.assert_close(logits(base), folded, rtol=1e-4, atol=1e-4)
    attach(base, [Block(adapter=adapter, born=1)], "1", frozen=adapter.scaled(-1.0))
    attach(base, [], "0")
    assert torch.equal(logits(base), logits(load(tmp_path)))


def test_a_tied_embedding_leaves_the_output_head_alone(tmp_path: Path) -> None:
    """Tied weights are one array: an update of the embedding must not reach the logits' matrix."""
    base = load(llama(tmp_path, tied=True), target_modules=("embed_tokens",))
    assert not base.layers["model.embed_tokens"].folds
    before = base.model.lm_head.weight.clone()
    base.set_blocks([Block(adapter=random_adapter(base, 1), born=1)], "1")
    assert torch.equal(base.model.lm_head.weight, before)


def test_bf16_blocks_stay_factored(tmp_path: Path) -> None:
    base = load(llama(tmp_path), dtype="bfloat16")
    before = {n: layer.weight.clone() for n, layer in base.layers.items()}
    bare = logits(base)
    base.set_blocks([Block(adapter=random_adapter(base, 1), born=1)], "1")
    assert all(torch.equal(layer.weight, before[n]) for n, layer in base.layers.items())
    exact = load(tmp_path)
    plain = logits(exact)
    exact.set_blocks([Block(adapter=random_adapter(base, 1), born=1)], "1")
    moved, want = logits(base).float() - bare.float(), logits(exact) - plain
    assert float((moved - want).norm() / want.norm()) < 0.1
    base.set_blocks([], "0")
    assert torch.equal(logits(base), bare)


def test_adapters_of_another_base_are_refused(tmp_path: Path) -> None:
    base = load(llama(tmp_path))
    some = load(tmp_path, target_modules=("q_proj",))
    with pytest.raises(AdapterError, match=r"missing \['model.layers.0.mlp.down_proj'.*same target_modules"):
        base.set_blocks([Block(adapter=random_adapter(some, 1), born=1)], "1")
    name = "model.layers.0.self_attn.q_proj"
    wide = {**random_adapter(base, 1), name: Factors(np.zeros((2, 17)), np.zeros((16, 2)))}
    with pytest.raises(AdapterError, match=r"q_proj: the base needs \(out, in\) = \(16, 16\), got \(16, 17\)"):
        base.set_frozen(Adapter(wide))
    with pytest.raises(AdapterError, match=r"head: this base needs {}"):
        base.set_head({"score.weight": np.zeros((2, 2))})


def test_digest_of_blocks_sees_every_value(tmp_path: Path) -> None:
    base = load(llama(tmp_path), target_modules=("q_proj",))
    ads = [random_adapter(base, 1), random_adapter(base, 1), random_adapter(base, 2), random_adapter(base, 1).scaled(2)]
    digests = [blocks_id([Block(adapter=a, born=1)]) for a in ads]
    assert digests[0] == digests[1]
    assert len({*digests, blocks_id([])}) == 4


# -- what names it


def tokenizer(folder: Path, words: str) -> None:
    from tokenizers import Tokenizer, models

    vocabulary = {w: i for i, w in enumerate(["<pad>", "<unk>", *words.split()])}
    PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>")), pad_token="<pad>"
    ).save_pretrained(folder)


def test_fingerprint_is_of_the_stored_base(tmp_path: Path) -> None:
    one = llama(tmp_path / "one")
    name = load(one).fingerprint
    assert load(one, dtype="bfloat16").fingerprint == name
    assert load(one, target_modules=("q_proj",)).fingerprint == name
    assert load(llama(tmp_path / "shards", max_shard_size="4KB")).fingerprint == name
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    settings = json.loads((one / "config.json").read_text())
    (one / "config.json").write_text(json.dumps({**settings, "transformers_version": "9.9", "use_cache": False}))
    assert load(one).fingerprint == name
    (one / "config.json").write_text(json.dumps({**settings, "rms_norm_eps": 1e-3}))
    assert load(one).fingerprint != name
    assert load(llama(tmp_path / "other", seed=1)).fingerprint != name


def test_fingerprint_sees_one_changed_weight(tmp_path: Path) -> None:
    base = load(llama(tmp_path / "a"))
    base.model.model.norm.weight.data[3] += 1e-3
    base.model.save_pretrained(tmp_path / "b")
    assert load(tmp_path / "b").fingerprint != base.fingerprint


def test_fingerprint_sees_the_tokenizer_but_not_its_padding(tmp_path: Path) -> None:
    bare = load(llama(tmp_path))
    tokenizer(tmp_path, "a b c")
    first = load(tmp_path)
    assert bare.tokenizer is None
    assert first.tokenizer is not None
    assert first.pad_id == 0
    assert first.fingerprint != bare.fingerprint
    again = AutoTokenizer.from_pretrained(tmp_path)
    again.backend_tokenizer.enable_truncation(max_length=7)
    again.save_pretrained(tmp_path)
    assert load(tmp_path).fingerprint == first.fingerprint
    tokenizer(tmp_path, "a c b")
    assert load(tmp_path).fingerprint != first.fingerprint


def test_pickled_weights_have_the_name_of_the_same_safetensors(tmp_path: Path) -> None:
    from fedlora.fingerprint import fingerprint

    one = llama(tmp_path / "one")
    two = tmp_path / "two"
    two.mkdir()
    torch.save(load(one).model.state_dict(), two / "pytorch_model.bin")
    (two / "config.json").write_text((one / "config.json").read_text())
    assert fingerprint(two) == fingerprint(one)


def test_another_base_than_the_run_s_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BaseMismatch, match=r"the run was opened with base feed, this one is [0-9a-f]{64}"):
        load(llama(tmp_path), fingerprint="feed")


# -- what cannot be loaded


def test_a_missing_base_names_what_was_tried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    llama(tmp_path / "my-llama")
    with pytest.raises(ConfigError, match=r"no base '.*my-lama'; tried the folder .*\. Near: .*my-llama"):
        load(tmp_path / "my-lama")
    with pytest.raises(ConfigError, match=r"no base 'tony'; tried the folder .* and the Hub id 'tony'.*Near: tiny"):
        load(Path("tony"))
    with pytest.raises(ConfigError, match=r"has no config\.json"):
        load(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "config.json").write_text((tmp_path / "my-llama" / "config.json").read_text())
    with pytest.raises(ConfigError, match=r"has no weights"):
        load(tmp_path / "empty")


def test_torn_weights_are_refused_by_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = llama(tmp_path) / "model.safetensors"
    whole = weights.read_bytes()
    for share in (0.0, 0.01, 0.5):  # none, a torn header, a torn tensor
        weights.write_bytes(whole[: int(len(whole) * share)])
        with pytest.raises(ConfigError, match=rf"cannot be loaded for causal-lm from {tmp_path}: .*copy or download"):
            load(tmp_path)
    monkeypatch.setattr("fedlora.base.fingerprint", lambda _: "")
    with pytest.raises(ConfigError, match=rf"from {tmp_path}: SafetensorError: .*if a file there is torn"):
        load(tmp_path)


def test_a_torn_pickle_or_tokenizer_is_refused_by_folder(tmp_path: Path) -> None:
    model = LlamaForCausalLM.from_pretrained(llama(tmp_path / "a"))
    (tmp_path / "b").mkdir()
    model.config.save_pretrained(tmp_path / "b")
    pickled = tmp_path / "b" / "pytorch_model.bin"
    torch.save(model.state_dict(), pickled)
    pickled.write_bytes(pickled.read_bytes()[:5000])
    tokenizer(tmp_path / "a", "abc")
    load(tmp_path / "a")
    torn = tmp_path / "a" / "tokenizer.json"
    torn.write_bytes(torn.read_bytes()[:100])
    for name in "ab":
        with pytest.raises(ConfigError, match=rf"from {tmp_path / name}: .*copy or download the folder anew"):
            load(tmp_path / name)


def test_files_of_another_model_are_refused(tmp_path: Path) -> None:
    llama(tmp_path / "a")
    settings = json.loads((tmp_path / "a" / "config.json").read_text())
    (tmp_path / "a" / "config.json").write_text(json.dumps({**settings, "num_hidden_layers": 3}))
    with pytest.raises(ConfigError, match=r"lack weights of the model: \['model.layers.2"):
        load(tmp_path / "a")


@pytest.mark.parametrize("cap", [None, 30.0])
def test_a_soft_cap_is_found_however_quiet_the_logits(cap: float | None, tmp_path: Path) -> None:
    """Logits of a thousandth: tanh(x / 30) * 30 is x to seven digits, so only a louder probe can tell."""
    settings = Gemma2Config(
        vocab_size=40,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        initializer_range=0.001,
        final_logit_softcapping=cap,
    )
    Gemma2ForCausalLM(settings).save_pretrained(tmp_path)
    base = load(tmp_path)
    assert float(logits(base).abs().max()) < 0.1
    assert base.splits is (cap is None)


def test_bad_devices_and_labels(tmp_path: Path) -> None:
    llama(tmp_path)
    with pytest.raises(ConfigError, match="'gpu' is no device"):
        load_base(ModelConfig(name=str(tmp_path), device="gpu"))
    with pytest.raises(ConfigError, match="cuda:99 was asked for, torch sees"):
        load_base(ModelConfig(name=str(tmp_path), device="cuda:99"))
    with pytest.raises(ConfigError, match=r"sequence classification needs at least 2 labels, got \['a'\]"):
        load(tmp_path, task_type="sequence-classification", labels=("a",))


def test_the_embedded_base_loads() -> None:
    base = load_base(ModelConfig(device="cpu"))
    assert base.tokenizer is not None
    assert base.dtype == torch.float32
    assert base.splits
    assert base.fingerprint == load_base(ModelConfig(device="cpu")).fingerprint
