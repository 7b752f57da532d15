"""`fedlora compose` on folders that PEFT and fedlora wrote; PEFT reads the result. About twenty seconds."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.numpy import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, GPT2Config, GPT2LMHeadModel
from typer.testing import CliRunner

from fedlora.base import load_base
from fedlora.cli import app
from fedlora.composing import few_shot_loss, parse_source, read_source
from fedlora.config import ModelConfig, load_config
from fedlora.data import test_rows as rows_of
from fedlora.data.prompt import prompt_format
from fedlora.data.rows import TokenRow
from fedlora.errors import AdapterError, BaseMismatch, ConfigError, DataError, FedLoRAError
from fedlora.evaluation.score import score
from fedlora.peft_bridge import load_adapter
from fedlora.state import Block
from fedlora.training.attach import attach

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
IDS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6], [2, 7, 1, 8, 2, 8, 1, 8]])
Deltas = dict[str, np.ndarray[Any, Any]]


def call(*words: str) -> str:
    """What the command prints; its error, if it has one, is raised."""
    result = CliRunner().invoke(app, list(words), catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def peft_folder(base: Path, out: Path, seed: int, *, kind: Any = AutoModelForCausalLM, **settings: Any) -> Path:
    """A random adapter of `base` that PEFT itself wrote."""
    torch.manual_seed(seed)
    task = "SEQ_CLS" if kind is AutoModelForSequenceClassification else "CAUSAL_LM"
    more = {"num_labels": 3} if task == "SEQ_CLS" else {}
    model = get_peft_model(kind.from_pretrained(base, **more), LoraConfig(task_type=task, **settings))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(out)
    return out


def other_head(folder: Path, seed: int) -> dict[str, Any]:
    """Gives the adapter in `folder` a random head, as training would; PEFT saves the base's own."""
    g, file = np.random.default_rng(seed), folder / "adapter_model.safetensors"
    head = {n: g.normal(size=x.shape).astype(np.float32) for n, x in load_adapter(folder)[1].items()}
    save_file({**load_file(file), **{f"base_model.model.{n}": x for n, x in head.items()}}, file)
    return head


@pytest.fixture
def llama(folders: dict[str, Path]) -> Path:
    return folders["llama"]


@pytest.fixture
def two(llama: Path, tmp_path: Path) -> tuple[Path, Path]:
    """Other ranks by module, other alphas, one with rsLoRA."""
    targets = ["q_proj", "v_proj", "up_proj"]
    a = peft_folder(llama, tmp_path / "a", 1, r=4, lora_alpha=6, target_modules=targets, rank_pattern={"v_proj": 2})
    b = peft_folder(llama, tmp_path / "b", 2, r=3, lora_alpha=5, target_modules=targets, use_rslora=True)
    return a, b


def logits(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        out: torch.Tensor = model.eval()(input_ids=IDS).logits
    return out


def deltas(folder: Path) -> Deltas:
    return {n: f.dense() for n, f in load_adapter(folder)[0].items()}


def with_deltas(model: Any, changes: Deltas) -> Any:
    """The oracle: dense updates written into the base."""
    with torch.no_grad():
        for name, x in changes.items():
            module = model.get_submodule(name)
            x = x if isinstance(module, nn.Linear) else x.T  # embeddings and Conv1D hold [in, out]
            module.weight += torch.from_numpy(x).float()
    return model


def test_peft_reads_the_sum_and_gives_the_same_logits(llama: Path, two: tuple[Path, Path], tmp_path: Path) -> None:
    a, b = two
    out = tmp_path / "out"
    said = call("compose", f"{a}=0.7", f"{b}=-0.3", "--out", str(out))
    assert "error 0.00%" in said.replace("\n", "")
    assert {p.name for p in out.iterdir()} == {"adapter_config.json", "adapter_model.safetensors", "compose.json"}
    mixed = {n: 0.7 * x - 0.3 * deltas(b)[n] for n, x in deltas(a).items()}
    want = logits(with_deltas(AutoModelForCausalLM.from_pretrained(llama), mixed))
    got = logits(PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(llama), out))
    bare = logits(AutoModelForCausalLM.from_pretrained(llama))
    assert (got - want).abs().max() < 1e-5 * (want - bare).abs().max()
    record = json.loads((out / "compose.json").read_text())
    assert [(s["weight"], s["rank"]) for s in record["sources"]] == [(0.7, 4), (-0.3, 3)]
    assert record["how"] == "cat"
    assert record["rank"] == 7
    assert record["base"]["name"] == str(llama)
    call("compose", f"{a}=0.7", f"{b}=-0.3", "--out", str(tmp_path / "again"))
    for name in ("adapter_config.json", "adapter_model.safetensors", "compose.json"):
        assert (tmp_path / "again" / name).read_bytes() == (out / name).read_bytes()


@pytest.mark.parametrize("how", ["ties", "dare", "dare-ties", "task-arithmetic"])
def test_every_way_ends_in_a_folder_that_peft_reads(
    llama: Path, two: tuple[Path, Path], tmp_path: Path, how: str
) -> None:
    words = ("compose", *map(str, two), "--how", how, "--rank", "5", "--seed", "3", "--out")
    said = call(*words, str(tmp_path / "out"))
    call(*words, str(tmp_path / "again"))
    name = "adapter_model.safetensors"
    assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "out" / name).read_bytes()
    got = deltas(tmp_path / "out")
    assert max(np.linalg.matrix_rank(x, tol=1e-5) for x in got.values()) == 5
    want = logits(with_deltas(AutoModelForCausalLM.from_pretrained(llama), got))
    assert torch.allclose(
        logits(PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(llama), tmp_path / "out")),
        want,
        atol=1e-4,
    )
    error = json.loads((tmp_path / "out" / "compose.json").read_text())["error"]["relative"]
    assert 0.0 < error < 1.0
    assert f"error {error:.2%}" in said.replace("\n", "")


def test_averaging_with_itself_where_pefts_linear_doubles(llama: Path, two: tuple[Path, Path], tmp_path: Path) -> None:
    a = two[0]
    call("compose", f"{a}=0.5", f"{a}=0.5", "--out", str(tmp_path / "out"))
    ours, one = deltas(tmp_path / "out"), deltas(a)
    assert max(np.linalg.norm(ours[n] - one[n]) / np.linalg.norm(one[n]) for n in one) < 1e-6
    plain = peft_folder(llama, tmp_path / "plain", 3, r=4, lora_alpha=6, target_modules=["q_proj"])
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(llama), plain, adapter_name="one")
    model.load_adapter(plain, "two")
    model.add_weighted_adapter(["one", "two"], [0.5, 0.5], "mean", combination_type="linear")
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    assert torch.allclose(layer.get_delta_weight("mean"), 2 * layer.get_delta_weight("one"), atol=1e-5)


def test_embeddings_and_conv1d_keep_their_kind(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = GPT2Config(bos_token_id=0, eos_token_id=0, vocab_size=23, n_positions=16, n_embd=16, n_layer=2, n_head=2)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    kinds = {"target_modules": ["c_attn", "wte"], "fan_in_fan_out": True}
    a = peft_folder(tmp_path / "gpt2", tmp_path / "a", 1, r=3, **kinds)
    b = peft_folder(tmp_path / "gpt2", tmp_path / "b", 2, r=2, **kinds)
    call("compose", f"{a}=1.5", f"{b}=0.5", "--out", str(tmp_path / "out"))
    mixed = {n: 1.5 * x + 0.5 * deltas(b)[n] for n, x in deltas(a).items()}
    read = GPT2LMHeadModel.from_pretrained(tmp_path / "gpt2")
    composed = PeftModel.from_pretrained(read, tmp_path / "out")
    for name, x in mixed.items():
        module = composed.base_model.model.get_submodule(name)
        delta = module.get_delta_weight("default").detach().numpy()
        assert np.allclose(delta, x.T, atol=1e-4), name


def test_classifiers_average_their_heads(folders: dict[str, Path], tmp_path: Path) -> None:
    kind = AutoModelForSequenceClassification
    made = [
        peft_folder(folders["bert"], tmp_path / n, i, kind=kind, r=2, target_modules=["query"])
        for i, n in enumerate("ab")
    ]
    weights = [other_head(folder, i) for i, folder in enumerate(made)]
    call("compose", f"{made[0]}=1.5", f"{made[1]}=0.5", "--how", "ties", "--out", str(tmp_path / "out"))
    mean = load_adapter(tmp_path / "out")[1]
    for name, x in mean.items():
        assert np.allclose(x, 0.75 * weights[0][name] + 0.25 * weights[1][name], atol=1e-6)
    model = PeftModel.from_pretrained(kind.from_pretrained(folders["bert"], num_labels=3), tmp_path / "out")
    assert logits(model).shape == (2, 3)
    with pytest.raises(ConfigError, match="must be positive"):
        call("compose", f"{made[0]}=1", f"{made[1]}=-1", "--out", str(tmp_path / "none"))
    assert not (tmp_path / "none").exists()


# --- runs, and LoRAHub on them


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two short runs on other skills."""
    made = []
    for i, skill in enumerate(("archive_stamp", "sign_off")):
        folder = tmp_path_factory.mktemp("runs") / str(i)
        settings = (f"data.skills={skill}", "data.rows_per_client=64", "data.test_rows=12", "training.threads=1")
        words = [word for setting in (*settings, "data.partition.skills_per_client=1") for word in ("--set", setting)]
        call("simulate", "--clients", "1", "--rounds", "2", "--ranks", "8", *words, "--out", str(folder))
        made.append(folder)
    return made[0], made[1]


@pytest.fixture
def examples(tmp_path: Path) -> Path:
    """A few rows of the first run's skill."""
    config = load_config(None, ["data.skills=archive_stamp", "data.test_rows=6", "seed=5"])
    lines = [json.dumps({"instruction": r.prompt, "output": r.answer}) for r in rows_of(config)]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines) + "\n")
    return tmp_path / "rows.jsonl"


@pytest.mark.slow
def test_lorahub_prefers_the_adapter_of_the_examples_skill(
    runs: tuple[Path, Path], examples: Path, tmp_path: Path
) -> None:
    words = ("compose", *map(str, runs), "--how", "lorahub", "--examples", str(examples), "--out")
    said = call(*words, str(tmp_path / "out"))
    assert "on 6 examples at 0.500 0.500" in said
    record = json.loads((tmp_path / "out" / "compose.json").read_text())
    weights = [s["weight"] for s in record["sources"]]
    assert record["search"]["tried"] == 40
    assert record["search"]["objective"] < record["search"]["start"]
    assert weights[0] > 0.3  # further up the loss hardly falls, and the penalty counts
    assert weights[0] > 3 * abs(weights[1])
    assert record["base"]["fingerprint"] == json.loads((runs[0] / "manifest.json").read_text())["base"]["fingerprint"]
    mixed = {
        n: weights[0] * x + weights[1] * deltas(runs[1] / "adapter")[n] for n, x in deltas(runs[0] / "adapter").items()
    }
    got = deltas(tmp_path / "out")
    assert max(np.linalg.norm(got[n] - x) / np.linalg.norm(x) for n, x in mixed.items()) < 1e-5
    assert "tuned" in call("evaluate", str(tmp_path / "out"), "--model", "tiny", "--data", str(examples))
    call(*words, str(tmp_path / "again"))
    for name in ("adapter_model.safetensors", "compose.json"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "out" / name).read_bytes()
    call("compose", f"{tmp_path / 'out'}=1", f"{runs[1]}=0.1", "--out", str(tmp_path / "third"))
    further = json.loads((tmp_path / "third" / "compose.json").read_text())
    assert [s["weight"] for s in further["sources"]] == [1.0, 0.1]
    assert further["base"] == record["base"]


def test_the_loss_of_candidate_weights_is_that_of_the_composed_adapter(
    runs: tuple[Path, Path], examples: Path, tmp_path: Path
) -> None:
    call("compose", f"{runs[0]}=0.9", f"{runs[1]}=-0.2", "--out", str(tmp_path / "out"))
    sources = [read_source(str(run)) for run in runs]
    config = load_config(runs[0] / "config.toml", [f"data.test={examples}"])
    base = load_base(config.model)
    rows, _ = prompt_format(config, base.tokenizer).encode(rows_of(config))
    loss = few_shot_loss(base, rows, sources, batch_size=4)
    bare, mixed = loss((0.0, 0.0)), loss((0.9, -0.2))
    adapter, _ = load_adapter(tmp_path / "out")
    attach(base, (Block(adapter=adapter, born=0),), "composed")
    sums = score(base, rows, batch_size=4)
    assert mixed == pytest.approx(sums["loss"] / sums["tokens"], rel=1e-4)
    assert bare > mixed
    attach(base, (), "none")
    sums = score(base, rows, batch_size=4)
    assert bare == pytest.approx(sums["loss"] / sums["tokens"], rel=1e-5)


def test_lorahub_of_bare_adapters_needs_a_model(runs: tuple[Path, Path], examples: Path, tmp_path: Path) -> None:
    bare = [str(run / "adapter") for run in runs]
    words = ("--how", "lorahub", "--examples", str(examples), "--evaluations", "8")
    with pytest.raises(ConfigError, match="no source is a run that names it: give --model"):
        call("compose", *bare, *words, "--out", str(tmp_path / "out"))
    weights = []
    for seed in "12":
        out = tmp_path / seed
        said = call(
            "compose", f"{bare[0]}=1", f"{bare[1]}=0.9", *words, "--model", "tiny", "--seed", seed, "--out", str(out)
        )
        assert "on 6 examples at 1.000 0.900" in said
        weights.append([s["weight"] for s in json.loads((out / "compose.json").read_text())["sources"]])
    assert weights[0] != weights[1]


def test_lorahub_of_classifiers(folders: dict[str, Path], tmp_path: Path) -> None:
    kind = AutoModelForSequenceClassification
    for i, n in enumerate("ab"):
        other_head(peft_folder(folders["bert"], tmp_path / n, i, kind=kind, r=2, target_modules=["query"]), i)
    made = [read_source(str(tmp_path / n)) for n in "ab"]
    base = load_base(
        ModelConfig(
            name=str(folders["bert"]),
            task_type="sequence-classification",
            labels=("x", "y", "z"),
            target_modules=tuple(made[0].adapter),
            device="cpu",
        )
    )
    rows = [TokenRow(np.arange(1, 9, dtype=np.int32), np.zeros(8, np.bool_), i, "") for i in range(3)]
    loss = few_shot_loss(base, rows, made, batch_size=2)
    assert loss((0.5, -0.5)) == np.inf
    assert loss((0.5, -0.7)) == np.inf
    call("compose", f"{tmp_path / 'a'}=0.6", f"{tmp_path / 'b'}=0.2", "--out", str(tmp_path / "out"))
    adapter, head = load_adapter(tmp_path / "out")
    ours = loss((0.6, 0.2))
    attach(base, (Block(adapter=adapter, born=0),), "composed", None, head)
    assert ours == pytest.approx(score(base, rows, batch_size=3)["loss"] / 3, rel=1e-5)


# --- mistakes


def test_a_source_is_split_at_the_last_equals_sign(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a", "lr=0.1", "runs/flora"):
        (tmp_path / name).mkdir(parents=True)
    assert parse_source("a=0.7") == (Path("a"), 0.7)
    assert parse_source("a=-1e-1") == (Path("a"), -0.1)
    assert parse_source("a") == (Path("a"), None)
    assert parse_source("lr=0.1=0.5") == (Path("lr=0.1"), 0.5)
    assert parse_source("lr=0.1") == (Path("lr=0.1"), None)
    for word in ("a=half", "a=", "a=nan", "a=inf"):
        with pytest.raises(ConfigError, match=rf"{word}: the weight .* is no finite number"):
            parse_source(word)
    for word in ("b=0.5", "=0.5", "", "flor=1"):
        with pytest.raises(ConfigError, match="no folder"):
            parse_source(word)
    with pytest.raises(ConfigError, match=r"near: runs.flora\. A source"):
        parse_source("flor=1")


def test_sources_that_do_not_fit(llama: Path, two: tuple[Path, Path], tmp_path: Path) -> None:
    a, b = two
    out = ("--out", str(tmp_path / "out"))
    other = peft_folder(llama, tmp_path / "c", 3, r=2, target_modules=["q_proj"])
    with pytest.raises(AdapterError, match=r"a and .*c: modules differ; missing \[.*up_proj.*v_proj"):
        call("compose", f"{a}=1", f"{other}=1", *out)
    config = json.loads((b / "adapter_config.json").read_text())
    (b / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": "another/base"}))
    with pytest.raises(BaseMismatch, match=r"a is for base .*, .*b for another/base: .*say so with --model"):
        call("compose", f"{a}=1", f"{b}=1", *out)
    call("compose", f"{a}=1", f"{b}=1", "--model", "the/same", "--out", str(tmp_path / "said"))
    written = json.loads((tmp_path / "said" / "adapter_config.json").read_text())
    assert written["base_model_name_or_path"] == "the/same"
    for folder in two:
        config = json.loads((folder / "adapter_config.json").read_text())
        (folder / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": None}))
    with pytest.raises(ConfigError, match="none of the sources says which base"):
        call("compose", f"{a}=1", f"{b}=1", *out)
    for key, value, match in (
        ("task_type", "SEQ_2_SEQ_LM", "its task_type is SEQ_2_SEQ_LM"),
        ("task_type", "SEQ_CLS", "different tasks, causal-lm and sequence-classification"),
        ("fan_in_fan_out", True, "another kind"),
    ):
        (b / "adapter_config.json").write_text(json.dumps({**config, key: value}))
        with pytest.raises(AdapterError, match=match):
            call("compose", f"{a}=1", f"{b}=1", *out)
    assert not (tmp_path / "out").exists()


def test_runs_of_other_bases_or_labels(runs: tuple[Path, Path], tmp_path: Path) -> None:
    copied = tmp_path / "copy"
    shutil.copytree(runs[1], copied)
    manifest = json.loads((copied / "manifest.json").read_text())
    manifest["base"]["fingerprint"] = "0" * 64
    (copied / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(BaseMismatch, match=r"was trained on base .{12}, .*copy on 000000000000"):
        call("compose", f"{runs[0]}=1", f"{copied}=1", "--model", "tiny", "--out", str(tmp_path / "out"))
    (copied / "manifest.json").write_text("{")
    with pytest.raises(AdapterError, match=r"manifest\.json is damaged"):
        call("compose", f"{runs[0]}=1", f"{copied}=1", "--out", str(tmp_path / "out"))


def test_classifiers_of_other_labels(folders: dict[str, Path], tmp_path: Path) -> None:
    kind = AutoModelForSequenceClassification
    a, b = (
        peft_folder(folders["bert"], tmp_path / n, i, kind=kind, r=2, target_modules=["query"])
        for i, n in enumerate("ab")
    )
    for folder, labels in ((a, ["x", "y", "z"]), (b, ["x", "z", "y"])):
        (folder / "compose.json").write_text(json.dumps({"labels": labels}))
    with pytest.raises(AdapterError, match=r"different labels, \('x', 'y', 'z'\) and \('x', 'z', 'y'\)"):
        call("compose", f"{a}=1", f"{b}=1", "--out", str(tmp_path / "out"))
    (b / "compose.json").unlink()
    call("compose", f"{b}=1", f"{a}=1", "--out", str(tmp_path / "out"))
    assert json.loads((tmp_path / "out" / "compose.json").read_text())["labels"] == ["x", "y", "z"]


def test_classifiers_that_read_other_things(folders: dict[str, Path], tmp_path: Path) -> None:
    kind = AutoModelForSequenceClassification
    a, b = (
        peft_folder(folders["bert"], tmp_path / n, i, kind=kind, r=2, target_modules=["query"])
        for i, n in enumerate("ab")
    )
    for folder, pooling in ((a, "mean"), (b, "model")):
        (folder / "compose.json").write_text(json.dumps({"pooling": pooling}))
    with pytest.raises(AdapterError, match=r"the head of .*a reads model.pooling=mean, that of .*b model"):
        call("compose", f"{a}=1", f"{b}=1", "--out", str(tmp_path / "out"))
    (b / "compose.json").unlink()
    said = call("compose", f"{b}=1", f"{a}=1", "--out", str(tmp_path / "out"))
    assert json.loads((tmp_path / "out" / "compose.json").read_text())["pooling"] == "mean"
    assert "--set model.pooling=mean" in " ".join(said.split())


def test_mistakes_are_named(two: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run").mkdir()
    (tmp_path / "empty").mkdir()
    (tmp_path / "run" / "config.toml").touch()
    for words, match in (
        (("a=1", "--how", "tees"), r"did you mean ties"),
        (("a=1", "--how", "ties", "--density", "2"), r"--density.*got 2"),
        (("a=x",), r"a=x: the weight 'x' is no finite number"),
        (("a=1", "nope=1"), r"no folder 'nope'"),
        (("run=1",), r"run has no adapter yet.*--resume run"),
        (("empty=1",), r"empty is neither a run folder .* nor a PEFT adapter folder"),
        (("a=1", "--out", "empty"), r"empty exists already.*--out"),
        (("nope=1", "--out", "empty"), r"empty exists already.*--out"),  # known before any work
        (("a=1", "--how", "lorahub"), r"--examples FILE"),
        (("a=1", "--examples", "rows.jsonl"), r"--examples: for lorahub only; --how is cat"),
        (("a=1", "--evaluations", "9", "--set", "seed=1"), r"--evaluations, --set: for lorahub only"),
        (("a=1", "a=-1"), r"zero in every module"),
        (("a=0",), r"zero in every module"),
    ):
        with pytest.raises(FedLoRAError, match=match):
            call("compose", *words)
    assert not (tmp_path / "runs").exists()


def test_examples_that_cannot_be_read(runs: tuple[Path, Path], tmp_path: Path) -> None:
    words = ("compose", f"{runs[0]}=1", "--how", "lorahub", "--out", str(tmp_path / "out"), "--examples")
    with pytest.raises(DataError, match=r"missing\.jsonl"):
        call(*words, str(tmp_path / "missing.jsonl"))
    (tmp_path / "long.jsonl").write_text(json.dumps({"instruction": "x " * 900, "output": "y"}) + "\n")
    with pytest.raises(ConfigError, match="no row of it can be scored"):
        call(*words, str(tmp_path / "long.jsonl"))
    assert not (tmp_path / "out").exists()


def test_without_out_it_is_the_next_run_folder(
    two: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    said = call("compose", "a=1", "b")
    assert (tmp_path / "runs" / "001-compose" / "compose.json").is_file()
    assert "runs/001-compose" in said
