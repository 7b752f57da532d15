"""Three tasks through `fedlora simulate`: what a run leaves behind, and that a killed one ends as a calm one does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedlora.config import RunConfig, load_config
from fedlora.continual.overlap import row_overlap
from fedlora.peft_bridge import load_adapter
from server import checkpoint
from server.app import open_run
from simulations.simulate import simulate
from strategies.continual.views import sealed_in_order

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
SKILLS = {"dates": "payment_due", "records": "badge_line", "numbers": "invoice_total"}
SMALL = [
    f"tasks={json.dumps([{'name': n, 'data.skills': [skill]} for n, skill in SKILLS.items()])}",
    "rounds.count=2",
    "rounds.clients=3",
    "lora.ranks=4,2,2",
    "method.name=ffa-lora",
    "training.local_steps=2",
    "training.batch_size=4",
    "training.threads=1",
    "data.rows_per_client=20",
    "data.test_rows=12",
]


def run(folder: Path, *sets: str, kill_in: int | None = None) -> RunConfig:
    config = load_config(None, [*SMALL, *sets])
    if not folder.exists():
        open_run(folder, config)

    def hear(event: dict[str, Any]) -> None:
        if event["event"] == "answer" and event["kind"] == "train" and event["round"] == kill_in:
            raise Killed

    simulate(config, folder, notify=hear, bare=False)
    return config


class Killed(BaseException):
    """Stands for a signal: nothing may catch it."""


def released(folder: Path) -> dict[str, bytes]:
    return {
        str(p.relative_to(folder)): p.read_bytes()
        for where in ("adapter", "tasks")
        for p in sorted((folder / where).rglob("*"))
        if p.is_file()
    }


@pytest.mark.parametrize("method", ["ffa-lora", "flora"])
def test_killed_in_the_second_task_and_resumed(method: str, tmp_path: Path) -> None:
    sets = [f"method.name={method}"]
    run(tmp_path / "calm", *sets)
    with pytest.raises(Killed):
        run(tmp_path / "killed", *sets, kill_in=4)
    assert not (tmp_path / "killed" / "manifest.json").exists()
    run(tmp_path / "killed", *sets)
    calm, killed = released(tmp_path / "calm"), released(tmp_path / "killed")
    assert set(calm) >= {f"tasks/{n}/adapter_model.safetensors" for n in SKILLS}
    assert calm == killed


def test_three_tasks_leave_three_adapters_that_keep_apart(tmp_path: Path) -> None:
    run(tmp_path / "run")
    found = checkpoint.latest(tmp_path / "run" / "checkpoints")
    assert found is not None
    state = found[1]
    adapters = {n: load_adapter(tmp_path / "run" / "tasks" / n)[0] for n in SKILLS}
    assert [t.name for t in sealed_in_order(state)] == list(SKILLS)
    for i, name in enumerate(list(SKILLS)[1:], 1):
        old = [adapters[n] for n in list(SKILLS)[:i]]
        assert max(row_overlap(adapters[name], old).values()) <= 1e-6
    whole = load_adapter(tmp_path / "run" / "adapter")[0]
    for n, f in whole.items():
        np.testing.assert_allclose(f.dense(), sum(a[n].dense() for a in adapters.values()), atol=1e-6)
        assert any(a[n].dense().any() for a in adapters.values())
    events = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    borders = [e["border"] for e in events if e["event"] == "round" and "border" in e]
    assert [b["sealed"] for b in borders] == [[n] for n in SKILLS]
    assert all(set(b["server"]) == set(SKILLS) for b in borders)
    assert {"known", "summed", "open", "routed", "routing"} <= borders[-1]["inference"].keys()
    assert (tmp_path / "run" / "report.html").exists()


@pytest.mark.parametrize(
    ("way", "method"),
    [("sequential", "fedit"), ("ewc", "fedit"), ("replay", "fedit"), ("o-lora", "fedit"), ("joint", "flora"),
     ("separate", "flora"), ("subspace", "fedsvd")],
)  # fmt: skip
def test_every_way_comes_to_its_end(way: str, method: str, tmp_path: Path) -> None:
    run(tmp_path / "run", f"continual.method={way}", f"method.name={method}", "rounds.count=1")
    assert (tmp_path / "run" / "manifest.json").exists()
