"""A run that is killed at any instant, again and again, ends with the byte-identical adapter."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
FEDLORA = Path(sys.executable).parent / "fedlora"
SETTINGS = {
    "rounds.count": "60",
    "rounds.clients": "3",
    "lora.ranks": "4,2,2",
    "training.local_steps": "3",
    "training.batch_size": "4",
    "training.threads": "1",
    "data.rows_per_client": "20",
    "data.test_rows": "12",
}


def _start(folder: Path, *, resume: bool, method: str) -> subprocess.Popen[str]:
    if resume:
        words = ["--resume", str(folder)]
    else:
        words = ["--out", str(folder), "--method", method]
        words += [w for key, value in SETTINGS.items() for w in ("--set", f"{key}={value}")]
    return subprocess.Popen(
        [str(FEDLORA), "simulate", *words], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def _finish(process: subprocess.Popen[str]) -> None:
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output


@pytest.mark.parametrize(("method", "times"), [("flora", 10), ("ffa-lora", 4)])
def test_killed_again_and_again_and_resumed(method: str, times: int, tmp_path: Path) -> None:
    calm, hunted = tmp_path / "calm", tmp_path / "hunted"
    _finish(_start(calm, resume=False, method=method))
    moment = random.Random(method)
    kills = 0
    while kills < times:
        began = (hunted / "config.toml").exists()
        process = _start(hunted, resume=began, method=method)
        before = _touched(hunted)
        end = time.monotonic() + 120
        while process.poll() is None and _touched(hunted) == before and time.monotonic() < end:
            time.sleep(0.01)  # until it does something to the folder: from there on, any instant
        time.sleep(moment.uniform(0.0, 1.0))
        if process.poll() is None:
            os.kill(process.pid, signal.SIGKILL)
            kills += 1
        process.communicate()
        if (hunted / "manifest.json").exists():
            break
    assert kills == times, "the run ended before it could be killed often enough: give it more rounds"
    if not (hunted / "manifest.json").exists():
        _finish(_start(hunted, resume=True, method=method))
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (hunted / "adapter" / name).read_bytes() == (calm / "adapter" / name).read_bytes()
    rounds = [
        e["round"]
        for e in map(json.loads, (hunted / "metrics.jsonl").read_text().splitlines())
        if e["event"] == "round"
    ]
    assert rounds == list(range(1, int(SETTINGS["rounds.count"]) + 1))


def _touched(folder: Path) -> float:
    return max((p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file()), default=0) if folder.exists() else -1
