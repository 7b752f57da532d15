"""What a private run would promise and cost: section 2.1's arithmetic by hand, and a picture that is one."""

from __future__ import annotations

import io
import math
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
from rich.console import Console

from fedlora.config import load_config
from fedlora.errors import CheckpointError, ConfigError
from fedlora.plan_command import show
from fedlora.privacy.accounting import gaussian_epsilon
from fedlora.privacy.plan import TARGETS, picture, plan
from fedlora.state import Layout, Module

LAYOUT = Layout(modules={"q": Module(out=6, inp=4), "v": Module(out=10, inp=4)}, head={"score": (2, 3)})
NOISE = (
    "privacy.level=example",
    "privacy.noise_multiplier=4",
    "privacy.rows=50",
    "privacy.sampling=1",
    "data.holdout=0",
)
ALL = ("data.rows_per_client=16",)  # as many as a step has: no sampling, so the closed form
SMALL = ("lora.ranks=2", "rounds.clients=9", "rounds.count=5", "training.local_steps=3")


def test_sizes_ratios_and_epsilon_by_hand() -> None:
    found = plan(load_config(None, [*NOISE, *SMALL]), LAYOUT)
    assert (found.clients, found.rounds, found.steps, found.rank, found.modules) == (9, 5, 15, 2, 2)
    assert found.trained == (6 + 2 * (10 + 14), 6 + 2 * 16, 6 + 2 * 4)
    assert found.upload == tuple(4 * 45 * m for m in found.trained)
    [row] = found.noise
    assert row.ratios == pytest.approx([4 * math.sqrt(m) / (50 * 3) for m in found.trained])
    assert row.epsilon == gaussian_epsilon(math.sqrt(15) / 4, 1e-5)


def test_without_settings_it_shows_three_targets_and_what_whole_clients_would_get() -> None:
    found = plan(load_config(None, ["rounds.count=20", *ALL]), LAYOUT)
    for row, target in zip(found.noise, TARGETS, strict=True):
        assert 0.97 * target < row.epsilon <= target
    assert found.rows == 16
    # ten silos, everybody in twenty rounds, noise as large as the clip: the closed form
    spent = gaussian_epsilon(math.sqrt(20), 0.01)
    assert (
        f"10 clients, client level: epsilon {spent:.1f} at delta 0.01 promises next to nothing" in found.whole_clients
    )
    assert "use example level" in found.whole_clients


def test_a_setting_without_meaning_is_said_to_have_none() -> None:
    sets = [s for s in NOISE if "multiplier" not in s]
    found = plan(load_config(None, [*sets, *SMALL, "privacy.noise_multiplier=0.5", "privacy.delta=0.1"]), LAYOUT)
    assert "promises next to nothing" in found.noise[0].advice
    assert "delta 0.1 is not below 1/50" in found.noise[0].advice


def test_rows_must_be_known() -> None:
    with pytest.raises(ConfigError, match=r"privacy\.rows: how many rows"):
        plan(load_config(None, ["data.name=rows.csv"]), LAYOUT)
    with pytest.raises(ConfigError, match=r"training\.local_epochs"):
        plan(load_config(None, ["training.local_epochs=1"]), LAYOUT)


def test_printed_and_drawn(tmp_path: Path) -> None:
    console = Console(record=True, width=140, file=io.StringIO())
    show(load_config(None, [*NOISE, *SMALL]), LAYOUT, console, tmp_path / "eps.svg", step=0.5)
    text = console.export_text()
    for part in (
        "9 clients, 5 rounds, 15 steps",
        "4.000",
        "numbers trained",
        "Whole clients",
        "takes 0.5 s",
        ", 8 s of",
        f"{tmp_path}",
    ):
        assert part in text.replace("\n", "")
    root = ET.fromstring((tmp_path / "eps.svg").read_text())
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    assert len([e for e in root.iter() if e.tag.endswith("polyline")]) == 1
    with pytest.raises(CheckpointError, match="cannot be written"):
        show(load_config(None, [*NOISE, *SMALL]), LAYOUT, console, tmp_path / "no" / "eps.svg")


def test_the_picture_has_a_line_for_each_target() -> None:
    drawn = picture(plan(load_config(None, ["rounds.count=2", *ALL]), LAYOUT))
    assert drawn.count("<polyline") == len(TARGETS)


WHOLE = ("privacy.level=client", "privacy.noise_multiplier=4", "method.name=ffa-lora", "rounds.sampling=poisson")


@pytest.mark.parametrize("secure", [False, True])
def test_whole_clients_by_hand(secure: bool) -> None:
    """One release a round; amplified only where nobody sees who was drawn; the mean over q K clients."""
    more = ("rounds.fraction=0.5", f"secure.on={str(secure).lower()}")
    found = plan(load_config(None, [*WHOLE, "lora.ranks=2", "rounds.clients=12", "rounds.count=5", *more]), LAYOUT)
    assert (found.unit, found.clients, found.rounds, found.steps, found.rows) == ("client", 12, 5, 5, 12)
    assert found.sampling == (1.0 if secure else 0.5)
    [row] = found.noise
    assert row.ratios == pytest.approx([4 * math.sqrt(m) / (0.5 * 12) for m in found.trained])
    whole = gaussian_epsilon(math.sqrt(5) / 4, 1e-5)
    assert row.epsilon == whole if secure else 0.3 * whole < row.epsilon < 0.7 * whole
    assert found.whole_clients == ""


def test_whole_clients_need_no_rows_and_no_steps_and_a_task_is_a_release() -> None:
    tasks = 'tasks=[{"name": "a"}, {"name": "b"}]'
    way = ("continual.method=subspace", "continual.routing=false", "training.local_epochs=1", "data.name=rows.csv")
    found = plan(load_config(None, [*WHOLE, *way, tasks, "rounds.count=3"]), LAYOUT)
    assert (found.rounds, found.steps) == (6, 6)
    assert found.noise[0].epsilon == gaussian_epsilon(math.sqrt(6) / 4, 1e-5)


def test_ten_whole_clients_are_told_to_use_the_other_level() -> None:
    sets = ("privacy.level=client", "privacy.noise_multiplier=1", "method.name=ffa-lora", "rounds.count=20")
    found = plan(load_config(None, [*sets, "privacy.delta=0.01"]), LAYOUT)
    spent = gaussian_epsilon(math.sqrt(20), 0.01)
    assert f"10 clients, client level: epsilon {spent:.1f} at delta 0.01 promises" in found.noise[0].advice
    console = Console(record=True, width=200, file=io.StringIO())
    show(load_config(None, sets), LAYOUT, console, None)
    text = console.export_text()
    for part in ("10 clients, each private as a whole; 20 rounds, 20 noised sums", "in one round", "use example level"):
        assert part in text
    assert "Whole clients (level=client)" not in text
