"""The oracle is dense: W0 + scale * B @ A written into a copy of the base. About eight seconds, most of it imports."""

from __future__ import annotations

import copy
import errno
import json
import os
import re
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import nn

from fedlora.adapter import Adapter, Factors
from fedlora.errors import AdapterError, CheckpointError
from fedlora.peft_bridge import TaskType, as_peft_model, from_peft_model, into_peft_model, load_adapter, save_adapter
from fedlora.state import Layout, Module

IDS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6], [2, 7, 1, 8, 2, 8, 1, 8]])
LINEAR = "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj".split()
# PEFT 0.21 still asks transformers 5.23 for an attribute under its old name.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
Spec = tuple[Callable[[], nn.Module], list[str], list[str], TaskType]  # base, ends of targets, head, task


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def llama(layers: int = 2, kind: str = "LlamaForCausalLM", tied: bool = False) -> nn.Module:
    config = transformers.LlamaConfig(
        vocab_size=23,
        hidden_size=16,
        intermediate_size=20,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=tied,
        pad_token_id=0,
    )
    config.num_labels = 3
    return seeded(getattr(transformers, kind), config)


def gpt2() -> nn.Module:
    config = transformers.GPT2Config(
        bos_token_id=0, eos_token_id=0, vocab_size=23, n_positions=16, n_embd=16, n_layer=2, n_head=2
    )
    return seeded(transformers.GPT2LMHeadModel, config)


def bert() -> nn.Module:
    config = transformers.BertConfig(
        vocab_size=23,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=20,
        max_position_embeddings=16,
    )
    config.num_labels = 3
    return seeded(transformers.BertForSequenceClassification, config)


def distilbert() -> nn.Module:
    config = transformers.DistilBertConfig(
        vocab_size=23, dim=16, n_layers=2, n_heads=2, hidden_dim=20, max_position_embeddings=16
    )
    config.num_labels = 3
    return seeded(transformers.DistilBertForSequenceClassification, config)


def seeded(cls: Any, config: Any) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model: nn.Module = cls(config).eval()
    return model


BERT_HEAD = ["classifier.weight", "classifier.bias"]
SPECS: dict[str, Spec] = {
    "llama": (llama, LINEAR, [], "causal-lm"),
    "llama-tied": (lambda: llama(tied=True), LINEAR, [], "causal-lm"),
    "llama-classifier": (
        lambda: llama(kind="LlamaForSequenceClassification"),
        LINEAR,
        ["score.weight"],
        "sequence-classification",
    ),
    "llama-head": (llama, ["q_proj", "v_proj"], ["lm_head.weight"], "causal-lm"),
    "llama-embedding": (llama, ["embed_tokens", "v_proj", "lm_head"], [], "causal-lm"),
    "gpt2-conv1d": (gpt2, ["c_attn", "c_fc", "c_proj"], [], "causal-lm"),
    "bert-head": (bert, ["query", "value", "dense"], BERT_HEAD, "sequence-classification"),
    "distilbert-two-layer-head": (
        distilbert,
        ["q_lin", "lin1"],
        ["pre_classifier.weight", "pre_classifier.bias", *BERT_HEAD],
        "sequence-classification",
    ),
}


def layout_of(base: nn.Module, ends: list[str], head: list[str]) -> Layout:
    modules = {}
    for name, m in base.named_modules():
        if name.rsplit(".", 1)[-1] not in ends:
            continue
        if isinstance(m, nn.Embedding):
            modules[name] = Module(out=m.embedding_dim, inp=m.num_embeddings, kind="embedding")
        elif isinstance(m, nn.Linear):
            modules[name] = Module(out=m.out_features, inp=m.in_features)
        else:
            modules[name] = Module(out=m.weight.shape[1], inp=m.weight.shape[0], kind="conv1d")
    return Layout(modules=modules, head={n: tuple(base.get_parameter(n).shape) for n in head})


def random_adapter(layout: Layout, rank: int | list[int], seed: int = 0, scale: float = 1.0) -> Adapter:
    g = np.random.default_rng(seed)
    ranks = [rank] if isinstance(rank, int) else rank
    made = {}
    for i, (name, m) in enumerate(sorted(layout.modules.items())):
        r = ranks[i % len(ranks)]
        a, b = g.normal(0, 0.3, (r, m.inp)), g.normal(0, 0.3, (m.out, r))
        made[name] = Factors(a.astype(np.float32), b.astype(np.float32), scale)
    return Adapter(made)


def random_head(layout: Layout) -> dict[str, Any]:
    g = np.random.default_rng(1)
    return {n: g.normal(0, 1, s).astype(np.float32) for n, s in layout.head.items()}


def merged_by_hand(base: nn.Module, adapter: Adapter, layout: Layout, head: dict[str, Any]) -> nn.Module:
    dense = copy.deepcopy(base)
    with torch.no_grad():
        for name, f in adapter.items():
            product = f.scale * (f.b.astype(np.float64) @ f.a.astype(np.float64))
            turned = product if layout.modules[name].kind == "linear" else product.T
            weight = dense.get_parameter(f"{name}.weight")
            weight.copy_(weight + torch.from_numpy(turned))
        for name, x in head.items():
            dense.get_parameter(name).copy_(torch.from_numpy(x))
    return dense


def logits(model: nn.Module) -> Any:
    with torch.no_grad():
        return model(input_ids=IDS).logits.double().numpy()


def close(got: Any, want: Any) -> None:
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_a_saved_folder_gives_the_logits_of_w0_plus_ba_in_peft_and_merged(spec: Spec, tmp_path: Path) -> None:
    make, ends, head_names, task = spec
    base = make()
    layout = layout_of(base, ends, head_names)
    adapter, head = random_adapter(layout, [2, 5, 3], scale=0.7), random_head(layout)
    want = logits(merged_by_hand(base, adapter, layout, head))
    assert np.abs(want - logits(base)).max() > 0.01, "the update must be visible"
    save_adapter(tmp_path / "x", adapter, layout, base_name="tiny", task_type=task, head=head)
    model = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "x")
    assert {m.scaling["default"] for m in model.modules() if isinstance(m, LoraLayer)} == {1.0}
    close(logits(model), want)
    close(logits(model.merge_and_unload()), want)
    close(logits(as_peft_model(copy.deepcopy(base), adapter, layout, task_type=task, head=head)), want)


def test_patterns_name_whole_paths_so_layer_1_is_not_layer_11(tmp_path: Path) -> None:
    base = llama(layers=12)
    layout = layout_of(base, ["q_proj"], [])
    ranks = {n: 7 if ".1." in n else 3 if ".11." in n else 2 for n in layout.modules}
    adapter = Adapter({n: random_adapter(layout, r)[n] for n, r in ranks.items()})
    save_adapter(tmp_path, adapter, layout, base_name="tiny", task_type="causal-lm")
    model = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    assert from_peft_model(model)[0].ranks == ranks
    close(logits(model), logits(merged_by_hand(base, adapter, layout, {})))


def test_modules_whose_path_ends_like_another_keep_their_own_rank(tmp_path: Path) -> None:
    class Twins(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.proj, self.inner = nn.Linear(4, 4), nn.ModuleDict({"proj": nn.Linear(4, 4)})

    layout = Layout(modules={"proj": Module(out=4, inp=4), "inner.proj": Module(out=4, inp=4)})
    adapter = random_adapter(layout, [3, 2])
    save_adapter(tmp_path, adapter, layout, base_name="twins", task_type="causal-lm")
    config = LoraConfig.from_pretrained(str(tmp_path))
    config.task_type = config.base_model_name_or_path = None  # the twins do not generate and have no folder
    model = get_peft_model(Twins(), config)
    assert from_peft_model(model)[0].ranks == adapter.ranks == {"inner.proj": 3, "proj": 2}


def test_rank_equal_to_the_hidden_size_is_told_apart_by_key(tmp_path: Path) -> None:
    base = llama()
    layout = layout_of(base, ["q_proj", "o_proj"], [])
    adapter = random_adapter(layout, 16)
    assert all(f.a.shape == f.b.shape for f in adapter.values())
    save_adapter(tmp_path, adapter, layout, base_name="tiny", task_type="causal-lm")
    close(
        logits(PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)),
        logits(merged_by_hand(base, adapter, layout, {})),
    )
    for name, f in load_adapter(tmp_path)[0].items():
        np.testing.assert_array_equal(f.a, adapter[name].a)
        np.testing.assert_array_equal(f.b, adapter[name].b)


def test_modules_of_rank_0_are_left_out_and_mean_zero(tmp_path: Path) -> None:
    base = llama()
    layout = layout_of(base, LINEAR, [])
    adapter = random_adapter(layout, [0, 4])
    save_adapter(tmp_path, adapter, layout, base_name="tiny", task_type="causal-lm")
    assert load_adapter(tmp_path)[0].ranks == {n: r for n, r in adapter.ranks.items() if r > 0}
    model = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    close(logits(model), logits(merged_by_hand(base, adapter, layout, {})))
    with pytest.raises(AdapterError, match=r"every module has rank 0.*no empty adapter"):
        save_adapter(tmp_path, random_adapter(layout, 0), layout, base_name="tiny", task_type="causal-lm")


@pytest.mark.parametrize("dtype", ["float16", "float64", "bfloat16"])
def test_other_dtypes_are_written_as_float32(dtype: str, tmp_path: Path) -> None:
    ml_dtypes = pytest.importorskip("ml_dtypes")
    layout = layout_of(llama(), ["q_proj"], [])
    kind = ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype
    adapter = Adapter(
        {n: Factors(f.a.astype(kind), f.b.astype(kind), 0.3) for n, f in random_adapter(layout, 4).items()}
    )
    save_adapter(tmp_path, adapter, layout, base_name="tiny", task_type="causal-lm")
    for name, f in load_adapter(tmp_path)[0].items():
        assert f.a.dtype == f.b.dtype == np.float32
        np.testing.assert_allclose(f.dense(), adapter[name].dense(), rtol=1e-5, atol=1e-6)


@settings(deadline=None, max_examples=20)
@given(st.lists(st.integers(1, 6), min_size=1, max_size=4), st.floats(-3, 3), st.integers(0, 99))
def test_a_round_trip_keeps_every_product_and_then_every_byte(
    tmp_path_factory: pytest.TempPathFactory, ranks: list[int], scale: float, seed: int
) -> None:
    tmp = tmp_path_factory.mktemp("trip")
    names = ["model.layers.1.q", "model.layers.11.q", "model.embed", "c.attn"]
    kinds: list[Any] = ["linear", "linear", "embedding", "conv1d"]
    modules = {n: Module(out=5 + i, inp=7 - i, kind=k) for i, (n, k) in enumerate(zip(names, kinds, strict=True))}
    layout = Layout(modules=modules, head={"out.weight": (3, 5), "out.bias": (3,)})
    adapter, head = random_adapter(layout, ranks, seed, scale), random_head(layout)
    save_adapter(tmp / "one", adapter, layout, base_name="tiny", task_type="causal-lm", head=head)
    listed = json.loads((tmp / "one" / "adapter_config.json").read_text())["target_modules"]
    assert listed == sorted(names), "PEFT keeps a set, whose order changes from process to process"
    again, head_again = load_adapter(tmp / "one")
    assert {f.scale for f in again.values()} == {1.0}
    for name in adapter:
        np.testing.assert_allclose(again[name].dense(), adapter[name].dense(), rtol=1e-5, atol=1e-6)
    save_adapter(tmp / "two", again, layout, base_name="tiny", task_type="causal-lm", head=head_again)
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp / "one" / file).read_bytes() == (tmp / "two" / file).read_bytes()
    assert sorted(p.name for p in (tmp / "two").iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]


def randomised(base: nn.Module, config: Any, seed: int = 3) -> PeftModel:
    """A PEFT model made by PEFT, every adapter weight random (PEFT itself starts one factor at zero)."""
    model: PeftModel = get_peft_model(base, config)
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                p.copy_(torch.randn(p.shape, generator=g) * 0.3)
    model.eval()
    return model


def saved(model: PeftModel, folder: Path) -> Path:
    with warnings.catch_warnings():
        # PEFT announces that it adds a copy of the base's embedding when an embedding is adapted.
        warnings.filterwarnings("ignore", message="Setting `save_embedding_layers` to `True`")
        model.save_pretrained(str(folder))
    return folder


def peft_deltas(model: PeftModel) -> dict[str, Any]:
    """PEFT's own products, as [out, in]."""
    found = {}
    layers: dict[str, Any] = {path: m for path, m in model.named_modules() if isinstance(m, LoraLayer)}
    for path, m in layers.items():
        delta = m.get_delta_weight("default").detach().double().numpy()
        turned = bool(m.lora_embedding_A) or m.fan_in_fan_out
        found[path.removeprefix("base_model.model.")] = delta.T if turned else delta
    return found


PEFT_MADE = {
    "plain": (llama, {"r": 4, "lora_alpha": 10, "target_modules": LINEAR}),
    "rslora": (llama, {"r": 4, "lora_alpha": 10, "use_rslora": True, "target_modules": "all-linear"}),
    "patterns": (
        llama,
        {
            "r": 4,
            "lora_alpha": 3,
            "use_rslora": True,
            "target_modules": LINEAR,
            "rank_pattern": {"q_proj": 2, r"layers\.1\.mlp\..*_proj": 6, "^model.layers.0.mlp.up_proj": 1},
            "alpha_pattern": {"mlp.*": 5, "v_proj": 7.5},
        },
    ),
    "conv1d": (gpt2, {"r": 3, "lora_alpha": 6, "target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}),
    "embedding": (llama, {"r": 3, "lora_alpha": 9, "target_modules": ["embed_tokens", "q_proj", "lm_head"]}),
    "head": (bert, {"r": 2, "lora_alpha": 1, "target_modules": ["query"], "task_type": "SEQ_CLS"}),
    "two-layer-head": (distilbert, {"r": 2, "lora_alpha": 1, "target_modules": ["q_lin"], "task_type": "SEQ_CLS"}),
    "hidden-size-rank": (llama, {"r": 16, "lora_alpha": 8, "target_modules": ["q_proj", "o_proj"]}),
    "gaussian": (llama, {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj"], "init_lora_weights": "gaussian"}),
}


@pytest.mark.parametrize("made", PEFT_MADE.values(), ids=PEFT_MADE)
def test_products_read_from_peft_are_pefts_delta_weights(
    made: tuple[Callable[[], nn.Module], Any], tmp_path: Path
) -> None:
    make, options = made
    model = randomised(make(), LoraConfig(**options))
    want = peft_deltas(model)
    saved_classifier = {
        k.split("base_model.model.")[1].replace("modules_to_save.default.", ""): p.detach().numpy()
        for k, p in model.named_parameters()
        if "modules_to_save" in k
    }
    for adapter, head in (load_adapter(saved(model, tmp_path)), from_peft_model(model)):
        assert adapter.keys() == want.keys()
        for name, f in adapter.items():
            np.testing.assert_allclose(f.dense(), want[name], rtol=1e-5, atol=1e-6)
        assert head.keys() == saved_classifier.keys()
        for name, x in head.items():
            np.testing.assert_array_equal(x, saved_classifier[name])
    assert bool(saved_classifier) == ("task_type" in options)


def test_a_checkpoint_made_by_peft_survives_our_save_with_its_logits(tmp_path: Path) -> None:
    base = bert()
    options: Any = PEFT_MADE["head"][1]
    model = randomised(copy.deepcopy(base), LoraConfig(**options))
    adapter, head = load_adapter(saved(model, tmp_path / "theirs"))
    layout = layout_of(base, ["query"], BERT_HEAD)
    save_adapter(tmp_path / "ours", adapter, layout, base_name="t", task_type="sequence-classification", head=head)
    close(logits(PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "ours")), logits(model))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_checkpoints_are_read_exactly(dtype: torch.dtype, tmp_path: Path) -> None:
    model = randomised(llama(), LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj"]))
    folder = saved(model.to(dtype), tmp_path)
    stored = safetensors.torch.load_file(folder / "adapter_model.safetensors")
    assert {t.dtype for t in stored.values()} == {dtype}
    for adapter, _ in (load_adapter(folder), from_peft_model(model)):
        for name, f in adapter.items():
            assert f.a.dtype == np.float32
            np.testing.assert_array_equal(f.a, stored[f"base_model.model.{name}.lora_A.weight"].float().numpy())
            np.testing.assert_array_equal(f.b, stored[f"base_model.model.{name}.lora_B.weight"].float().numpy())


def test_into_a_model_with_its_own_scaling_sets_the_same_function() -> None:
    base = bert()
    layout = layout_of(base, ["query", "value"], BERT_HEAD)
    adapter, head = random_adapter(layout, 3, seed=8, scale=0.4), random_head(layout)
    config = LoraConfig(r=3, lora_alpha=7, use_rslora=True, target_modules=["query", "value"], task_type="SEQ_CLS")
    model = randomised(copy.deepcopy(base), config)
    into_peft_model(model, adapter, head)
    close(logits(model), logits(merged_by_hand(base, adapter, layout, head)))
    before = from_peft_model(model)[0]
    shrunk = Adapter({n: Factors(f.a[:2], f.b[:, :2]) if "layer.0." in n else f for n, f in adapter.items()})
    with pytest.raises(AdapterError, match=r"2 modules .*first bert.*0.*query: got .*2, 16.* the model has .*3, 16"):
        into_peft_model(model, shrunk, head)
    with pytest.raises(AdapterError, match=r"classifier.bias: got None, the model has \(3,\)"):
        into_peft_model(model, adapter, {"classifier.weight": head["classifier.weight"]})
    with pytest.raises(AdapterError, match=r"extra: got"):
        into_peft_model(model, Adapter({**adapter, "extra": adapter[min(adapter)]}), head)
    for name, f in from_peft_model(model)[0].items():
        np.testing.assert_array_equal(f.b, before[name].b, err_msg="a refusal must write nothing")


def test_models_that_cannot_be_read_or_written_say_why() -> None:
    model = randomised(llama(), LoraConfig(r=2, lora_alpha=2, target_modules=["q_proj"]))
    with pytest.raises(AdapterError, match=r"'other' is not in the model, which has \['default'\]"):
        from_peft_model(model, "other")
    adapter, _ = from_peft_model(model)
    for m in model.modules():
        if isinstance(m, LoraLayer):
            m.set_scale("default", 0.0)
    with pytest.raises(AdapterError, match=r"scaling 0 in"):
        into_peft_model(model, adapter)
    model.merge_adapter()
    with pytest.raises(AdapterError, match=r"merged into the base at .*unmerge"):
        from_peft_model(model)
    layout = Layout(modules={"model.layers.0.self_attn.q_proj": Module(out=16, inp=9)})
    with pytest.raises(AdapterError, match=r"do not fit PEFT adapter.*\(2, 9\).*the model has .*\(2, 16\)"):
        as_peft_model(llama(), random_adapter(layout, 2), layout, task_type="causal-lm")


REFUSED: dict[str, tuple[Any, str]] = {
    "dora": (lambda: LoraConfig(r=2, target_modules=["q_proj"], use_dora=True), "use_dora is True: DoRA rescales"),
    "lora_bias": (lambda: LoraConfig(r=2, target_modules=["q_proj"], lora_bias=True), "lora_bias is True: a bias"),
    "bias": (lambda: LoraConfig(r=2, target_modules=["q_proj"], bias="all"), "bias is 'all': trained biases"),
    "replication": (
        lambda: LoraConfig(r=2, target_modules=["q_proj"], layer_replication=[(0, 2), (0, 2)]),
        "layer_replication is .*replicated layers make another base",
    ),
    "tokens": (
        lambda: LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=[1, 2]),
        "trainable_token_indices is .*trained token rows",
    ),
    "pissa": (
        lambda: LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights="pissa"),
        "init_lora_weights is 'pissa', which may change the base",
    ),
    "ia3": (
        lambda: IA3Config(target_modules=["q_proj"], feedforward_modules=[]),
        "peft_type is .*IA3; fedlora reads LORA",
    ),
}


@pytest.mark.parametrize("case", REFUSED.values(), ids=REFUSED)
@pytest.mark.filterwarnings("ignore:`lora_bias=True` was passed but the targeted layer")  # Llama has no biases
@pytest.mark.filterwarnings("ignore:Adapter 'default'.* have invalid shape")  # PEFT takes lora_bias for a torn shard
def test_what_products_cannot_express_is_refused_in_memory_and_from_disk(case: Any, tmp_path: Path) -> None:
    make, message = case
    model = get_peft_model(llama(), make())
    with pytest.raises(AdapterError, match=message):
        from_peft_model(model)
    with pytest.raises(AdapterError, match=f"PEFT folder .*{message}"):
        load_adapter(saved(model, tmp_path))


def test_convolutions_are_refused(tmp_path: Path) -> None:
    model = get_peft_model(nn.Sequential(nn.Conv2d(3, 4, 1)), LoraConfig(r=2, target_modules=["0"]))
    with pytest.raises(AdapterError, match=r"0.lora_A.weight has shape \(2, 3, 1, 1\).*not convolutions"):
        load_adapter(saved(model, tmp_path))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A good folder with a head, to be damaged by the test."""
    layout = Layout(modules={n: Module(out=4, inp=5) for n in ("x.q", "x.v")}, head={"score.weight": (2, 4)})
    save_adapter(
        tmp_path / "good",
        random_adapter(layout, 2),
        layout,
        base_name="tiny",
        task_type="sequence-classification",
        head=random_head(layout),
    )
    assert load_adapter(tmp_path / "good")[0].ranks == {"x.q": 2, "x.v": 2}
    return tmp_path / "good"


Q = "base_model.model.x.q."
DAMAGED: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "missing factor": (lambda t: t.pop(Q + "lora_B.weight"), "x.q has only the factor A"),
    "ranks": (lambda t: t.update({Q + "lora_B.weight": torch.ones(4, 3)}), r"x.q: A \(2, 5\) and B \(4, 3\) do not"),
    "broadcast": (lambda t: t.update({Q + "lora_A.weight": torch.ones(1, 5)}), r"x.q: A \(1, 5\) and B \(4, 2\)"),
    "other rank": (
        lambda t: t.update({Q + "lora_A.weight": torch.ones(3, 5), Q + "lora_B.weight": torch.ones(4, 3)}),
        "x.q: the config says rank 2, the weights have rank 3",
    ),
    "vector": (lambda t: t.update({Q + "lora_A.weight": torch.ones(5)}), r"lora_A.weight has shape \(5,\)"),
    "nan": (lambda t: t[Q + "lora_A.weight"].fill_(torch.nan), "x.q.lora_A.weight has 10 non-finite values of 10"),
    "infinite head": (lambda t: t["base_model.model.score.weight"].fill_(torch.inf), "score.weight has 8 non-finite"),
    "integers": (
        lambda t: t.update({Q + "lora_A.weight": torch.ones(2, 5, dtype=torch.int8)}),
        "x.q.lora_A.weight has dtype torch.int8: fedlora reads",
    ),
    "magnitude": (lambda t: t.update({Q + "lora_magnitude_vector": torch.ones(4)}), "magnitude_vector: DoRA rescales"),
    "bias": (lambda t: t.update({Q + "lora_B.bias": torch.ones(4)}), "lora_B.bias: a bias on lora_B"),
    "unknown": (lambda t: t.update({Q + "lora_C.weight": torch.ones(4)}), "lora_C.weight is neither a LoRA factor"),
    "base weights": (
        lambda t: t.update({"base_model.model.emb.base_layer.weight": torch.ones(4)}),
        "emb.base_layer.weight.* are weights of the base",
    ),
    "no head": (lambda t: t.pop("base_model.model.score.weight"), r"modules_to_save names \['score'\], but none"),
    "no factors": (lambda t: [t.pop(k) for k in list(t) if "lora_" in k], "there are no LoRA factors"),
}


@pytest.mark.parametrize("case", DAMAGED.values(), ids=DAMAGED)
def test_damaged_weights_are_refused_by_name(case: Any, folder: Path) -> None:
    damage, message = case
    tensors = safetensors.torch.load_file(folder / "adapter_model.safetensors")
    damage(tensors)
    safetensors.torch.save_file(tensors, folder / "adapter_model.safetensors")
    with pytest.raises(AdapterError, match=f"{re.escape(str(folder))}.*{message}|^base_model.*{message}"):
        load_adapter(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"r": "two"}, "r is 'two', which is no number"),
        ({"lora_alpha": float("nan")}, "lora_alpha is nan"),
        ({"rank_pattern": {"x.q": None}}, "rank_pattern is .*no number"),
        ({"peft_type": "PREFIX_TUNING"}, "peft_type is PREFIX_TUNING"),
        ({"rank_pattern": {"q": 2, "x.*": 3}}, r"x.q: several keys of rank_pattern match, with \[2.0, 3.0\]"),
        ({"alpha_pattern": {"x.q": 2, "q": 3}}, "x.q: several keys of alpha_pattern match"),
        ({"alpha_pattern": {"(": 2}}, r"alpha_pattern holds .* which is no regular expression"),
        ({"use_something_new": True}, "use_something_new is True: fedlora does not know"),
    ],
)
def test_configs_that_cannot_be_trusted_are_refused(change: dict[str, Any], message: str, folder: Path) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(AdapterError, match=message):
        load_adapter(folder)


def test_files_that_are_absent_torn_or_pickled_are_refused(folder: Path) -> None:
    weights = folder / "adapter_model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-5])
    with pytest.raises(AdapterError, match=r"adapter_model.safetensors is damaged"):
        load_adapter(folder)
    weights.unlink()
    with pytest.raises(AdapterError, match=r"no adapter_model.safetensors: is this an adapter folder"):
        load_adapter(folder)
    (folder / "adapter_model.bin").write_bytes(b"\x80")
    with pytest.raises(AdapterError, match=r"a pickle, which fedlora never opens; save it again"):
        load_adapter(folder)
    (folder / "adapter_config.json").write_text("[]")
    with pytest.raises(AdapterError, match=r"holds a list, not settings"):
        load_adapter(folder)
    (folder / "adapter_config.json").write_text("{")
    with pytest.raises(AdapterError, match=r"cannot read adapter_config.json .*is this an adapter folder"):
        load_adapter(folder)
    with pytest.raises(AdapterError, match=r"cannot read adapter_config.json .*No such file"):
        load_adapter(folder / "nowhere")


def test_what_does_not_fit_the_layout_is_not_saved(tmp_path: Path) -> None:
    layout = Layout(modules={"x.q": Module(out=4, inp=5), "x.score.p": Module(out=4, inp=5)}, head={"h.weight": (2, 4)})
    head = {"h.weight": np.ones((2, 4), np.float32)}
    q = Adapter({"x.q": random_adapter(layout, 2)["x.q"]})

    def save(adapter: Adapter, head: Any = head, task: TaskType = "causal-lm", plan: Layout = layout) -> None:
        save_adapter(tmp_path / "f", adapter, plan, base_name="tiny", task_type=task, head=head)

    save(q)
    with pytest.raises(AdapterError, match=r"y is not among the 2 adapted modules"):
        save(Adapter({"y": q["x.q"]}))
    with pytest.raises(AdapterError, match=r"x.q: the product has shape \(5, 4\), the layout says \(4, 5\)"):
        save(Adapter({"x.q": Factors(q["x.q"].b.T, q["x.q"].a.T)}))
    with pytest.raises(AdapterError, match=r"the head has arrays \{\}, the layout says \{'h.weight': \(2, 4\)\}"):
        save(q, {})
    with pytest.raises(AdapterError, match=r"sequence classification needs its head"):
        save(q, {}, "sequence-classification", Layout(modules=layout.modules))
    with pytest.raises(AdapterError, match=r"\['x.score.p'\] lie in modules that PEFT saves whole"):
        save(random_adapter(layout, 2), head, "sequence-classification")
    with pytest.raises(AdapterError, match=r"head array 'bare' belongs to no module"):
        save(q, {"bare": np.ones(3)}, plan=Layout(modules=layout.modules, head={"bare": (3,)}))
    with pytest.raises(AdapterError, match=r"x.q.lora_B.weight has \d+ non-finite"):
        save(Adapter({"x.q": Factors(q["x.q"].a, q["x.q"].b, 1e300)}))
    with pytest.raises(AdapterError, match=r"h.weight has 8 non-finite"):
        save(q, {"h.weight": np.full((2, 4), np.nan)})


def test_a_full_disk_is_named_and_leaves_no_readable_mixture(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    adapter, head = load_adapter(folder)
    layout = Layout(modules={n: Module(out=4, inp=5) for n in adapter}, head={"score.weight": (2, 4)})
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CheckpointError, match=r"cannot write the PEFT adapter to .*No space left"):
        save_adapter(folder, adapter, layout, base_name="t", task_type="sequence-classification", head=head)
    monkeypatch.undo()
    assert sorted(p.name for p in folder.iterdir()) == ["adapter_model.safetensors"]
    with pytest.raises(AdapterError, match=r"cannot read adapter_config.json"):
        load_adapter(folder)
