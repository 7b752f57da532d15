"""Hostile clients, and models of a client's own, through whole simulated runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fedlora.config import RunConfig, load_config
from server.app import open_run
from simulations.personal import score_personal
from simulations.simulate import simulate

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]
SMALL = [
    "rounds.count=2",
    "rounds.clients=3",
    "lora.ranks=4,2,2",
    "training.local_steps=2",
    "training.batch_size=4",
    "training.threads=1",
    "data.rows_per_client=20",
    "data.test_rows=12",
]


def run(folder: Path, *sets: str) -> RunConfig:
    config = load_config(None, [*SMALL, *sets])
    open_run(folder, config)
    simulate(config, folder, notify=lambda event: None, bare=False)
    return config


def adapter(folder: Path) -> bytes:
    return (folder / "adapter" / "adapter_model.safetensors").read_bytes()


def events(folder: Path, kind: str) -> list[dict[str, Any]]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [e for e in map(json.loads, lines) if e["event"] == kind]


def test_an_attack_changes_the_run_and_a_rule_sees_it(tmp_path: Path) -> None:
    run(tmp_path / "honest")
    for kind in ("sign-flip", "label-flip", "backdoor"):
        run(tmp_path / kind, f"attack.kind={kind}", "attack.share=0.3")
        assert adapter(tmp_path / kind) != adapter(tmp_path / "honest")
    run(tmp_path / "screened", "attack.kind=scaling", "attack.share=0.3", "robust.rule=screen")
    told = events(tmp_path / "screened", "round")[-1]["clients"]
    assert [(c["id"], c["quarantined"]) for c in told if c["quarantined"]] == [("client-00000", 1.0)]


@pytest.mark.parametrize("method", ["flora", "ffa-lora", "fedit"])
def test_local_adapters_on_top_of_the_global_one(tmp_path: Path, method: str) -> None:
    config = run(tmp_path / "run", f"method.name={method}", "personal.steps=3", "data.holdout=0.3")
    run(tmp_path / "plain", f"method.name={method}", "data.holdout=0.3")
    assert adapter(tmp_path / "run") == adapter(tmp_path / "plain")
    [event] = events(tmp_path / "run", "personal")
    assert [c["id"] for c in event["clients"]] == ["client-00000", "client-00001", "client-00002"]
    found = score_personal(config, tmp_path / "run", (0.0, 1.0))
    for told, scored in zip(event["clients"], found, strict=True):
        assert scored.rows == told["personal"]["counted"] == 6
        assert scored.scores[0.0] == pytest.approx(told["global"]["score"])
        assert scored.scores[1.0] == pytest.approx(told["personal"]["score"])


def test_fedsa_leaves_each_client_its_own(tmp_path: Path) -> None:
    config = run(tmp_path / "run", "method.name=fedsa-lora", "data.holdout=0.3")
    found = score_personal(config, tmp_path / "run", (1.0,))
    told = events(tmp_path / "run", "round")[-1]["evaluation"]["clients"]
    assert {s.client: s.scores[1.0] for s in found} == {c: pytest.approx(t["score"]) for c, t in told.items()}
    folders = sorted(p.name for p in (tmp_path / "run" / "clients").iterdir())
    assert folders == ["client-00000", "client-00001", "client-00002"]
