"""A server process killed outright, at ten random moments, ends with the same bytes as one that was left alone."""

from __future__ import annotations

import random
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fedlora.report.log import read_log

SCRIPT = """
import importlib.util, sys
from pathlib import Path
spec = importlib.util.spec_from_file_location("fakes", sys.argv[1])
fakes = importlib.util.module_from_spec(spec)
sys.modules["fakes"] = fakes
spec.loader.exec_module(fakes)
import server.asking
server.asking.SPOOL_MEMORY = 2000
lab = fakes.Lab(Path(sys.argv[2]))
print("ready", flush=True)
lab.conduct("rounds.count=40", "method.name=flora", "evaluation.every=1", "rounds.in_flight=2")
"""


def start(folder: Path) -> subprocess.Popen[bytes]:
    fakes = Path(__file__).with_name("conftest.py")
    process = subprocess.Popen([sys.executable, "-c", SCRIPT, str(fakes), str(folder)], stdout=subprocess.PIPE)
    assert process.stdout is not None
    with process.stdout as said:
        assert said.readline() == b"ready\n"
    return process


@pytest.mark.slow
def test_ten_kills_change_no_byte(tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    began = time.monotonic()
    assert start(whole).wait(120) == 0
    longest = time.monotonic() - began
    rng, kills = random.Random(0), 0
    for _ in range(10):
        process = start(killed)
        time.sleep(rng.uniform(0, longest / 6))
        process.kill()
        kills += process.wait(60) == -9
    assert kills >= 8
    assert start(killed).wait(120) == 0
    last = "round-000040.flw"
    assert (killed / "checkpoints" / last).read_bytes() == (whole / "checkpoints" / last).read_bytes()
    assert [e["round"] for e in read_log(killed) if e["event"] == "round"] == list(range(1, 41))
    assert not list(killed.rglob("*.partial"))
    assert not (killed / "spool").exists()
