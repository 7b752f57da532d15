"""The command line as a person uses it, on a run of seconds."""

from __future__ import annotations

import json
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console
from safetensors.numpy import load_file
from typer.testing import CliRunner

from fedlora.cli import app
from fedlora.errors import ConfigError, FedLoRAError

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
    assert events == ["start", "round", "round", "reference", "reference", "reference", "end"]


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
    for words in (
        "starting",
        "round 1/2",
        "0/6",
        "6/6",
        "answers",
        "round   2/2",
        "training the reference: local only",
    ):
        assert words in shown, words


def test_kept_moments_matter(tmp_path: Path) -> None:
    words = (*SMALL, "--method", "fedit", "--set", "evaluation.every=0")
    adapters = {}
    for name in ("fresh", "keep"):
        call("simulate", *words, "--set", f"training.optimizer_state={name}", "--out", str(tmp_path / name))
        adapters[name] = (tmp_path / name / "adapter/adapter_model.safetensors").read_bytes()
    assert adapters["keep"] != adapters["fresh"]


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
        (("report", "nowhere"), r"nowhere is not a run folder"),
        (("generate", "nowhere"), r"neither a run folder .* nor a PEFT adapter"),
        (("compare", "--set", "nope:training.learning_rate=1"), r"no method 'nope' is compared"),
    ],
)
def test_mistakes_are_named(
    words: tuple[str, ...], match: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FedLoRAError, match=match):
        call(*words)


def test_an_output_folder_that_exists(finished: Path) -> None:
    with pytest.raises(ConfigError, match=r"exists already.*--resume"):
        call("simulate", *SMALL, "--out", str(finished))


def test_a_resumed_run_keeps_its_settings(finished: Path) -> None:
    with pytest.raises(ConfigError, match=r"rounds\.count: 2 -> 5"):
        call("simulate", "--resume", str(finished), "--rounds", "5")


def test_a_rank_above_the_layers_size(tmp_path: Path) -> None:
    with pytest.raises(FedLoRAError, match=r"rank 4000; the smallest adapted layer allows"):
        call("simulate", *SMALL, "--ranks", "4000", "--out", str(tmp_path / "run"))
