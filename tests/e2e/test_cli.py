"""The command line as a person uses it, on a run of seconds."""

from __future__ import annotations

import json
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console
from safetensors.numpy import load_file
from transformers import LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

from clients.resident import resident_base
from fedlora.cli import app
from fedlora.config import RunConfig
from fedlora.errors import ConfigError, DataError, FedLoRAError
from fedlora.tiny import base_path

SMALL = [
    "--clients",
    "3",
    "--rounds",
    "2",
    "--ranks",
    "4,2,1",
    *(
        word
        for setting in (
            "training.local_steps=2",
            "training.batch_size=4",
            "training.threads=1",
            "data.rows_per_client=16",
            "data.test_rows=12",
            "data.partition.skills_per_client=4",
        )
        for word in ("--set", setting)
    ),
]


def call(*words: str) -> str:
    """What the command prints; its error, if it has one, is raised."""
    result = CliRunner().invoke(app, list(words), catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "one"
    output = call("simulate", *SMALL, "--references", "--out", str(folder))
    for words in ("round   2/2", "bare base", "local only", "centralised", "federated", str(folder / "adapter")):
        assert words in output.replace("\n", "")
    return folder


def test_a_run_folder_holds_what_it_should(finished: Path) -> None:
    names = {p.name for p in finished.iterdir()}
    assert {"config.toml", "metrics.jsonl", "checkpoints", "adapter", "manifest.json", "report.html"} <= names
    assert not (finished / "clients").exists()
    assert load_file(finished / "adapter" / "adapter_model.safetensors")
    events = [json.loads(line)["event"] for line in (finished / "metrics.jsonl").read_text().splitlines()]
    assert events == ["start", "round", "round", "end", "reference", "reference", "reference"]


def test_the_same_seed_gives_the_same_bytes(finished: Path, tmp_path: Path) -> None:
    call("simulate", *SMALL, "--out", str(tmp_path / "again"))
    name = "adapter/adapter_model.safetensors"
    assert (tmp_path / "again" / name).read_bytes() == (finished / name).read_bytes()


def test_another_seed_gives_others(finished: Path, tmp_path: Path) -> None:
    call("simulate", *SMALL, "--seed", "1", "--out", str(tmp_path / "other"))
    name = "adapter/adapter_model.safetensors"
    assert (tmp_path / "other" / name).read_bytes() != (finished / name).read_bytes()


def test_the_live_display_of_a_terminal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    screen = StringIO()
    monkeypatch.setattr("fedlora.cli.console", Console(file=screen, force_terminal=True, width=100, highlight=False))
    call("simulate", *SMALL, "--references", "--out", str(tmp_path / "run"))
    shown = screen.getvalue()
    for words in ("starting", "answers", "round   2/2", "training for comparison: local only"):
        assert words in shown, words


def test_kept_moments_matter(tmp_path: Path) -> None:
    words = (*SMALL, "--method", "fedit", "--set", "evaluation.every=0")
    adapters = {}
    for name in ("fresh", "keep"):
        call("simulate", *words, "--set", f"training.optimizer_state={name}", "--out", str(tmp_path / name))
        adapters[name] = (tmp_path / name / "adapter/adapter_model.safetensors").read_bytes()
    assert adapters["keep"] != adapters["fresh"]


def test_a_classifier(tmp_path: Path) -> None:
    rows = "".join(
        json.dumps({"text": f"{'good' if i % 2 else 'bad'} {i}", "label": "ab"[i % 2]}) + "\n" for i in range(60)
    )
    (tmp_path / "rows.jsonl").write_text(rows)
    model = tmp_path / "model"
    config = LlamaConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, vocab_size=1536
    )
    LlamaForCausalLM(config).save_pretrained(model)
    for file in base_path().glob("tokenizer*"):
        (model / file.name).write_bytes(file.read_bytes())
    words = ("--model", str(model), "--data", str(tmp_path / "rows.jsonl"), "--task-type", "sequence-classification")
    out = ("--out", str(tmp_path / "run"))
    said = call("simulate", *SMALL, *words, "--set", "model.labels=a,b", "--ranks", "2", *out)
    assert "evaluate" in said
    scored = call("evaluate", str(tmp_path / "run"), "--data", str(tmp_path / "rows.jsonl"))
    assert "tuned" in scored
    with pytest.raises(ConfigError, match="a classifier writes nothing"):
        call("generate", str(tmp_path / "run"))


def test_a_run_without_anything_to_score_on_still_ends(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text("".join(f'{{"instruction": "{i}", "output": "{i}"}}\n' for i in range(9)))
    words = ("--data", str(tmp_path / "rows.jsonl"), "--set", "data.holdout=0")
    said = call("simulate", *SMALL, *words, "--references", "--out", str(tmp_path / "run"))
    assert "no bare base, local only, centralised for comparison: nothing to score on" in said
    assert (tmp_path / "run" / "report.html").is_file()
    with pytest.raises(DataError, match="nothing to score on"):
        call("compare", "--set", f"data.name={tmp_path / 'rows.jsonl'}", "--set", "data.holdout=0", "--seeds", "1")


def test_what_is_left_out_of_the_test_rows_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "rows.jsonl").write_text("".join(f'{{"instruction": "{i}", "output": "{i}"}}\n' for i in range(30)))
    test = [{"instruction": "1", "output": "1"}, {"instruction": "x " * 900, "output": "2"}]
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in test))
    words = ("--data", str(tmp_path / "rows.jsonl"), "--set", f"data.test={tmp_path / 'test.jsonl'}")
    call("simulate", *SMALL, *words, "--out", str(tmp_path / "run"))
    assert "test rows: 1 row kept, 1 dropped" in caplog.text


def test_the_public_a_of_ffa_lora_never_travels(tmp_path: Path) -> None:
    down = {}
    for every in (0, 1):
        words = ("--method", "ffa-lora", "--set", f"evaluation.every={every}", "--rounds", "1", "--ranks", "4")
        call("simulate", *SMALL, *words, "--out", str(tmp_path / str(every)))
        events = [json.loads(line) for line in (tmp_path / str(every) / "metrics.jsonl").read_text().splitlines()]
        down[every] = next(e["bytes_down"] for e in events if e["event"] == "round")
    layout = resident_base(RunConfig().model).layout
    b = 3 * 4 * 4 * sum(m.out for m in layout.modules.values())  # clients x float32 x rank
    assert 2 * b < down[1] < 2 * b * 1.2  # B for training and again for evaluation, and some headers; no A
    assert down[0] == down[1]  # the last round is always evaluated


def test_evaluate_generate_report(finished: Path) -> None:
    scored = call("evaluate", str(finished))
    assert "tuned" in scored
    assert "all" in scored
    said = call(
        "generate", str(finished), "Stamp the letter for the archive\n29 November 1991", "--max-new-tokens", "4"
    )
    assert "29 November 1991" in said
    (finished / "report.html").unlink()
    call("report", str(finished))
    assert "<svg" in (finished / "report.html").read_text()


def test_an_ended_run_can_be_resumed_and_stays_the_same(finished: Path) -> None:
    before = (finished / "adapter" / "adapter_model.safetensors").read_bytes()
    call("simulate", "--resume", str(finished))
    assert (finished / "adapter" / "adapter_model.safetensors").read_bytes() == before


@pytest.mark.parametrize(
    ("words", "match"),
    [
        (("simulate", "--method", "florra"), r"method\.name.*flora"),
        (("simulate", "--set", "training.learnig_rate=1"), r"training\.learning_rate"),
        (("simulate", "--ranks", "0"), r"lora\.ranks"),
        (("simulate", "--model", "no/such/folder", "--rounds", "1"), r"no/such/folder"),
        (("simulate", "--data", "missing.jsonl", "--rounds", "1"), r"missing\.jsonl"),
        (("simulate", "--set", "training.optimizer_state=keep"), r"optimizer_state.*use fresh"),
        (("compare", "--methods", "fedit,fedit"), r"different names"),
        (("compare", "--methods", ""), r"one or more"),
        (("report", "nowhere"), r"nowhere is not a run folder"),
        (("generate", "nowhere"), r"neither a run folder .* nor a PEFT adapter"),
        (("compare", "--set", "nope:training.learning_rate=1"), r"no method 'nope' is compared"),
        (("simulate", "taks"), r"taks is neither a file nor a shipped scenario; shipped are default, own, tasks"),
        (("simulate", "taks.toml"), r"taks\.toml: cannot read the settings"),
        (("compare", "--continual", "sequential"), r"the settings have none: try the scenario tasks"),
        (("compare", "tasks", "--continual", "sequential", "--methods", "fedit"), r"--continual and --methods exclude"),
        (("compare", "tasks", "--continual", "sequential", "--codecs", "int8"), r"--continual and --codecs exclude"),
        (("compare", "tasks", "--continual", "sequential,sequential"), r"--continual needs one or more different"),
        (("compare", "tasks", "--continual", "o-lora"), r"ffa-lora freezes A.*fedit"),
        (("compare", "tasks", "--continual", "ewc", "--set", "o-lora:seed=1"), r"no way 'o-lora' is compared here"),
    ],
)
def test_mistakes_are_named(
    words: tuple[str, ...], match: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FedLoRAError, match=match):
        call(*words)


def test_a_run_without_tasks_has_none_to_ask_for(finished: Path) -> None:
    with pytest.raises(ConfigError, match=r"--task auto: .* trained without tasks"):
        call("generate", str(finished), "29 November 1991", "--task", "auto")
    with pytest.raises(ConfigError, match=r"--without dates: .* trained without tasks"):
        call("evaluate", str(finished), "--without", "dates")


def test_a_file_of_this_folder_goes_before_a_shipped_scenario(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tasks.toml").write_text("[rounds]\ncount = 0\n")
    for word in ("tasks.toml", "./tasks.toml"):
        with pytest.raises(ConfigError, match=r"rounds\.count"):
            call("simulate", word)
    with pytest.raises(ConfigError, match=r"continual\.floor"):  # the shipped one
        call("simulate", "tasks", "--set", "continual.floor=-1")


@pytest.mark.slow
def test_tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The shipped scenario, as small as it can be: compared, simulated, evaluated, and asked."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("fedlora.cli.console", Console(width=160, highlight=False))
    small = [
        word
        for setting in (
            "rounds.count=1",
            "rounds.clients=2",
            "lora.ranks=2",
            "data.rows_per_client=12",
            "data.test_rows=6",
            "training.local_steps=2",
            "training.threads=1",
        )
        for word in ("--set", setting)
    ]
    said = call(
        "compare", "tasks", "--continual", "input-aware,separate:fedit", "--seeds", "1", "--out", "both", *small
    )
    for words in ("| input-aware ", "| separate:fedit ", "forgetting", "| input-aware: records ", "sealed numbers"):
        assert words in said, words
    rows = json.loads(Path("both/comparison.json").read_text())
    assert [row["way"] for row in rows] == ["input-aware", "separate:fedit"]
    assert [border[0] for border in rows[0]["borders"]] == list(rows[0]["tasks"]) == ["dates", "records", "numbers"]
    assert Path("both/comparison.html").read_text().count("<figure>") == 2
    run = "both/input-aware-seed0"
    said = call("simulate", "--resume", run)  # it has ended
    for words in ("[", "average accuracy (AA)", "routing accuracy", f"{run}/tasks", f"generate {run} --task auto"):
        assert words in said, words
    said = call("evaluate", run)
    for words in ("dates", "all adapters", "task known", "task found", "mean"):
        assert words in said, words
    said = call("evaluate", run, "--without", "records")
    assert "without records" in said
    assert "change" in said
    prompt = "Stamp the letter for the archive"
    for words, found in ((("--task", "numbers"), "numbers"), (("--task", "all"), "all"), ((), "")):
        said = call("generate", run, prompt, "--max-new-tokens", "2", *words)
        assert f" {found}" in said.split("tuned")[1]
    assert "right answer" in call("generate", run, "--max-new-tokens", "2")
    with pytest.raises(ConfigError, match=r"--task number: .*dates, records, numbers.*did you mean 'numbers'"):
        call("generate", run, prompt, "--task", "number")
    with pytest.raises(ConfigError, match="leave --data out"):
        call("evaluate", run, "--data", "rows.jsonl")


def test_an_output_folder_that_exists(finished: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot be made: File exists.*--out"):
        call("compare", "--seeds", "1", "--out", str(finished))
    with pytest.raises(ConfigError, match=r"exists already.*--resume"):
        call("simulate", *SMALL, "--out", str(finished))


def test_a_resumed_run_keeps_its_settings(finished: Path) -> None:
    with pytest.raises(ConfigError, match=r"rounds\.count: 2 -> 5"):
        call("simulate", "--resume", str(finished), "--rounds", "5")


def test_a_rank_above_the_layers_size(tmp_path: Path) -> None:
    with pytest.raises(FedLoRAError, match=r"rank 4000; the smallest adapted layer allows"):
        call("simulate", *SMALL, "--ranks", "4000", "--out", str(tmp_path / "run"))
