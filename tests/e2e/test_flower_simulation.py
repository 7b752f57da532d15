"""The same app under Flower's own simulation: `flwr run`, Ray, another process per client."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from fedlora.config import load_config
from server.app import open_run
from simulations.flower import FlowerSimulation
from simulations.simulate import simulate

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
ROOT = Path(__file__).resolve().parents[2]
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


def test_same_adapters_under_flower_and_in_process(tmp_path: Path) -> None:
    with FlowerSimulation(ROOT, tmp_path / "home") as flower:
        for method, *more in (
            ("flora", "wire.up=int8", "wire.down=int8"),
            ("ffa-lora",),
            ("fedsa-lora",),
        ):
            config = load_config(None, [*SMALL, f"method.name={method}", *more])
            method += "-coded" if more else ""
            status, log = flower.run(config, tmp_path / f"{method}-flower")
            assert status == "finished:completed", log
            open_run(tmp_path / f"{method}-here", config)
            simulate(config, tmp_path / f"{method}-here", notify=lambda event: None)
            for name in ("adapter_model.safetensors", "adapter_config.json"):
                theirs, ours = (tmp_path / f"{method}-{side}" / "adapter" / name for side in ("flower", "here"))
                assert theirs.read_bytes() == ours.read_bytes(), method


def test_clients_from_another_checkout_refuse(tmp_path: Path) -> None:
    """The daemon is started inside another checkout, whose `clients` and `fedlora` its workers then import."""
    other = tmp_path / "other"
    for package in ("clients", "fedlora", "server", "strategies"):
        shutil.copytree(ROOT / package, other / package, ignore=shutil.ignore_patterns("__pycache__"))
    app = other / "clients" / "app.py"
    app.write_text(app.read_text() + "\n# another version\n")
    with FlowerSimulation(ROOT, tmp_path / "home", start_in=other) as flower:
        status, log = flower.run(load_config(None, SMALL), tmp_path / "out")
    assert status != "finished:completed"
    assert re.search(r"the server runs fedlora code \w+ and this client runs \w+", log), log
