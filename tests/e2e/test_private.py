"""A private run from settings to release, on the embedded base: budget, log, manifest, card and report agree."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fedlora.config import load_config
from fedlora.privacy.ledger import Ledger, Terms
from fedlora.report.log import read_log
from server.app import open_run
from simulations.simulate import simulate

SETS = (
    "method.name=ffa-lora",
    "rounds.count=2",
    "rounds.clients=2",
    "lora.ranks=8",
    "training.local_steps=3",
    "training.threads=1",
    "data.test_rows=36",
    "data.holdout=0",
    "privacy.level=example",
    "privacy.epsilon=8",
    "privacy.rows=300",
)


@pytest.mark.slow
def test_a_private_simulation_keeps_its_books(tmp_path: Path) -> None:
    config, folder = load_config(None, SETS), tmp_path / "run"
    open_run(folder, config)
    result = simulate(config, folder, notify=lambda event: None, bare=False)
    assert result.score is not None
    last = [e for e in read_log(folder) if e["event"] == "round"][-1]
    spent = last["privacy"]["epsilon"]
    assert 7.9 < spent <= 8.0
    for client in ("client-00000", "client-00001"):
        terms = Terms(owner=client, unit="example", epsilon=8.0, delta=1e-5)
        with Ledger.open(folder / "clients" / client / "privacy.jsonl", terms) as ledger:
            assert [event.times for event in ledger.charges.values()] == [3, 3]
            assert ledger.epsilon() == spent
            assert all(ledger.sealed(key) for key in ledger.charges)
    for told_of in last["clients"]:
        assert told_of.keys() == {"id", "rank", "examples", "steps", "weight_change", "bytes_down", "bytes_up"}
        assert told_of["examples"] == 300
    said = json.loads((folder / "manifest.json").read_text())["privacy"]
    assert f"epsilon {spent:.4g} at delta 1e-05" in said
    card = (folder / "adapter" / "README.md").read_text()
    assert "add-or-remove-one" in card
    assert "None claimed" not in card
    assert "Epsilon by round" in (folder / "report.html").read_text()
