"""Secure sums end to end in a simulation: the adapter of plain rounds, and through a stop in the middle."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from fedlora.config import RunConfig, load_config
from fedlora.report.log import read_log
from server.app import open_run
from simulations.simulate import simulate

SETS = [
    "method.name=ffa-lora",
    "rounds.count=2",
    "rounds.clients=4",
    "lora.ranks=4,4,4,2",
    "training.local_steps=1",
    "training.batch_size=4",
    "training.threads=1",
    "data.rows_per_client=20",
    "data.test_rows=12",
    "evaluation.server=false",
]


class Stopped(Exception):
    """The run is stopped here."""


def run(folder: Path, *sets: str, stop: Any = None) -> dict[str, np.ndarray]:
    config: RunConfig = load_config(None, [*SETS, *sets])
    if not folder.exists():
        open_run(folder, config)
    simulate(config, folder, notify=stop or (lambda event: None))
    return dict(load_file(folder / "adapter" / "adapter_model.safetensors"))


@pytest.mark.slow
def test_the_adapter_is_that_of_plain_rounds(tmp_path: Path) -> None:
    plain = run(tmp_path / "plain")
    secure = run(tmp_path / "secure", "secure.on=true")
    assert plain.keys() == secure.keys()
    largest = max(float(np.abs(x).max()) for x in plain.values())
    for name, x in plain.items():
        np.testing.assert_allclose(secure[name], x, atol=5e-3 * largest)  # training amplifies rounding
    rounds = [e for e in read_log(tmp_path / "secure") if e["event"] == "round"]
    assert [len(e["clients"]) for e in rounds] == [4, 4]
    for event in rounds:
        assert not event.get("evaluation", {}).get("clients")  # a score is of one client's rows
        for client in event["clients"]:
            assert client.keys() <= {"id", "rank", "bytes_up", "bytes_down"}  # no measure of a single client
        assert event["aggregate"]["summed"] == 4.0


@pytest.mark.slow
def test_stacks_summed_by_sketches_are_those_of_plain_rounds(tmp_path: Path) -> None:
    plain = run(tmp_path / "plain", "method.name=flora", "rounds.count=1")
    secure = run(
        tmp_path / "secure",
        "method.name=flora",
        "rounds.count=1",
        "secure.on=true",
        "secure.columns=14",
        "secure.examples=20",
    )
    for name in (n for n in plain if n.endswith("lora_A.weight")):
        other = name.replace("lora_A", "lora_B")
        want, got = (x[other] @ x[name] for x in (plain, secure))
        np.testing.assert_allclose(got, want, atol=5e-3 * float(np.abs(want).max()))


@pytest.mark.slow
@pytest.mark.parametrize("after", [2, 7, 13, 18])
def test_a_stop_within_a_sum_is_gone_on_from(tmp_path: Path, after: int) -> None:
    """Answers of round 1: 4 each to advertise, share, mask, confirm, unmask. Once opened, a round is not repeated."""
    heard = 0

    def stop(event: Mapping[str, Any]) -> None:
        nonlocal heard
        heard += event["event"] == "answer"
        if heard == after and event["event"] == "answer":
            raise Stopped

    with pytest.raises(Stopped):
        run(tmp_path / "run", "secure.on=true", stop=stop)
    adapter = run(tmp_path / "run", "secure.on=true")
    rounds = [e for e in read_log(tmp_path / "run") if e["event"] == "round"]
    assert [e["round"] for e in rounds] == [1, 2]
    lost = [e["aggregate"].get("lost", 0.0) for e in rounds]
    assert lost == [1.0 if after > 16 else 0.0, 0.0]
    assert adapter


@pytest.mark.slow
def test_private_training_under_a_secure_sum_is_charged_once(tmp_path: Path) -> None:
    """Noise at the client, then masks: the ledger has one charge a round and client, also through a stop in between."""
    sets = ["secure.on=true", "privacy.level=example", "privacy.noise_multiplier=1", "privacy.rows=20"]
    sets += ["data.holdout=0", "privacy.sampling=0.2"]
    heard = 0

    def stop(event: Mapping[str, Any]) -> None:
        nonlocal heard
        heard += event["event"] == "answer"
        if heard == 6 and event["event"] == "answer":
            raise Stopped

    with pytest.raises(Stopped):
        run(tmp_path / "run", *sets, stop=stop)
    run(tmp_path / "run", *sets)
    rounds = [e for e in read_log(tmp_path / "run") if e["event"] == "round"]
    assert [e["aggregate"]["summed"] for e in rounds] == [4.0, 4.0]
    assert [e["aggregate"]["examples"] for e in rounds] == [4.0, 4.0]
    ledgers = list(tmp_path.rglob("privacy.jsonl"))
    assert len(ledgers) == 4
    for ledger in ledgers:
        kinds = [line for line in ledger.read_text().splitlines() if '"charge"' in line]
        assert len(kinds) == 2, ledger.read_text()
