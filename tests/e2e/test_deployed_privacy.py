"""Everything at once over TLS: secure sums of privately trained updates, and a worker killed in each stage of a sum."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest

from simulations.benchmarks.deployment import Deployment

STAGES = 5
NODES = {"a": 4, "b": 4, "c": 2, "d": 2}
SETTINGS = {
    "method.name": "ffa-lora",
    "rounds.count": STAGES,
    "secure.on": True,
    "privacy.level": "example",
    "privacy.noise_multiplier": 1.0,
    "privacy.rows": 6,
    "privacy.sampling": 0.5,
    "data.holdout": 0.0,
    "lora.ranks": "4",
}


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_worker_killed_in_each_stage_of_a_sum_costs_its_part_and_no_budget(tmp_path: Path) -> None:
    with Deployment(tmp_path, NODES, SETTINGS) as whole:
        whole.make()
        for name in NODES:
            whole.start_node(name)
        whole.start_server()
        for number in range(1, STAGES + 1):

            def heard(number: int = number) -> bool:
                answers = [e for e in whole.journal() if e["event"] == "answer" and e.get("round") == number]
                return len(answers) > 3 * (number - 1)  # a worker that was killed before may be missing

            whole.wait(f"stage {number} of round {number}", heard, seconds=300)
            for worker in whole.children("d", "clients.worker"):
                os.kill(worker.pid, signal.SIGKILL)
        assert whole.wait_for_end("server", seconds=600) == 0, whole.logs()
        rounds = [e for e in whole.events() if e["event"] == "round"]
        assert [e["round"] for e in rounds] == [1, 2, 3, 4, 5]
        assert all(e["aggregate"].get("lost", 0.0) == 0.0 for e in rounds), whole.logs()
        assert all(e["aggregate"]["summed"] >= 3.0 for e in rounds)
        assert rounds[-1]["privacy"]["epsilon"] > 0.0
        for name in NODES:
            [ledger] = (tmp_path / f"memory-{name}").rglob("privacy.jsonl")
            lines = [json.loads(line) for line in ledger.read_text().splitlines()]
            charges = [line for line in lines if "charge" in line["body"]]
            assert len(charges) == STAGES, lines  # one a round, whatever was killed
