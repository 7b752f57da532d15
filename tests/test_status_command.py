"""`fedlora status` as a person uses it: what is on the screen, and the exit status."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from datetime import UTC, datetime
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from fedlora import status_command
from fedlora.cli import app
from fedlora.deploy import DeployFile
from fedlora.errors import ConfigError
from fedlora.watching import NodeStatus, Status, programs_record
from tests.watched import RUN, deployment, ids, journal, steps, write_run


@pytest.fixture
def deploy(tmp_path: Path) -> DeployFile:
    found = deployment(tmp_path)
    write_run(found)
    return found


@pytest.fixture(autouse=True)
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(status_command, "console", Console(width=100, highlight=False))


def call(path: Path, *words: str, status: int = 0) -> str:
    """What is printed; an error of ours is raised."""
    result = CliRunner().invoke(app, ["status", str(path), *words], catch_exceptions=False)
    assert result.exit_code == status, result.output
    return "\n".join(line.rstrip() for line in result.output.splitlines())


def conduct(deploy: DeployFile) -> None:
    """As if this process were the server and its conductor, in the fourth round for half a minute."""
    now = datetime.now(UTC)
    late = {"event": "refused", "client": ids(deploy)["north"], "rule": "deadline", "strikes": 0}
    journal(deploy, *steps(deploy), late, late, first=now)
    (deploy.state / "programs.json").write_bytes(programs_record({"server": os.getpid(), "superlink": os.getpid()}))
    (deploy.state / "conductor.pid").write_text(str(os.getpid()))
    os.utime(deploy.state / "conductor.pid", (now.timestamp() - 1, now.timestamp() - 1))


def test_a_run_that_is_conducted(deploy: DeployFile, tmp_path: Path) -> None:
    conduct(deploy)
    screen = call(tmp_path / "deploy.toml")
    lines = {line.split()[0]: " ".join(line.split()[1:]) for line in screen.splitlines() if line.strip()}
    assert lines["run"] == f"{RUN} ffa-lora"
    assert lines["state"] == "running"
    assert lines["rounds"] == "3 of 5 closed"
    assert lines["now"].endswith(": 1 of 3 have trained")
    assert lines["score"] == "75.0% on the server's rows, after round 2"
    assert lines["a"] == "round 30 s the last, 20 s on average"
    assert lines["sent"] == "6.0 MB up, 9.0 MB down; 3.0 MB and 3.0 MB in the last round"
    assert (lines["missing"], lines["refused"]) == ("deadline 2", "not finite 1")
    assert lines["privacy"] == "none claimed"
    assert lines["certificate"] == "364 days left" or lines["certificate"] == "365 days left"
    assert lines["programs"] == "server, superlink, conductor run; executor not"
    assert (lines["east"], lines["north"], lines["west"]) == ("round 4 0", "round 4 0", "none 2 in quarantine")
    assert "problem" not in screen


def test_nothing_of_one_client_is_on_the_screen(deploy: DeployFile, tmp_path: Path) -> None:
    (deploy.state).mkdir()
    said = {"state": "failed", "detail": f"{ids(deploy)['east']} [red]sent\x1b[2J[/red]", "pid": 1}
    (deploy.state / "outcome.json").write_text(json.dumps(said))
    screen = call(tmp_path / "deploy.toml", status=1)
    assert "failed: east [red]sent [2J[/red]" in screen
    assert "reported by a node 1" in screen
    for secret in ("0.4321", "0.123", "my own rule", "\x1b", ids(deploy)["east"]):
        assert secret not in screen


@pytest.mark.parametrize(("state", "status"), [("done", 0), ("paused", 3), ("failed", 1)])
def test_the_exit_status(deploy: DeployFile, tmp_path: Path, state: str, status: int) -> None:
    (deploy.state).mkdir()
    (deploy.state / "outcome.json").write_text(json.dumps({"state": state, "detail": "words", "pid": 1}))
    assert f"{state}: " in call(tmp_path / "deploy.toml", status=status)


def test_a_server_that_is_gone(deploy: DeployFile, tmp_path: Path) -> None:
    assert "stopped: no server runs; start it again to go on" in call(tmp_path / "deploy.toml", status=3)


def test_a_run_folder(deploy: DeployFile) -> None:
    screen = call(deploy.folder)
    assert "clients  2" in screen
    assert "programs" not in screen
    assert "last answer" not in screen


def test_neither(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no run folder"):
        call(tmp_path)


def ending(looks: int, each: Callable[[], None]) -> Callable[[float], None]:
    """A `sleep` that does something instead, and that a person interrupts."""
    left = iter(range(looks))

    def sleep(seconds: float) -> None:
        if next(left, None) is None:
            raise KeyboardInterrupt
        each()

    return sleep


def test_watching_draws_anew_until_interrupted(
    deploy: DeployFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    conduct(deploy)
    north = {"event": "answer", "kind": "train", "round": 4, "client": ids(deploy)["north"]}
    west = {**north, "client": ids(deploy)["west"]}
    more = iter((north, west))
    monkeypatch.setattr(time, "sleep", ending(2, lambda: journal(deploy, next(more), first=datetime.now(UTC))))
    screen = StringIO()
    console = Console(file=screen, width=100, height=40, force_terminal=True, highlight=False, color_system=None)
    monkeypatch.setattr(status_command, "console", console)
    call(tmp_path / "deploy.toml", "--watch")
    for answered in (1, 2, 3):
        assert f"{answered} of 3 have trained" in screen.getvalue()


def shown(nodes: int, height: int) -> str:
    there = [
        NodeStatus(name=f"n{i:03}", last_round=9, strikes=0, quarantined=i == 77, revoked=False) for i in range(nodes)
    ]
    there[50] = NodeStatus(name="n050", last_round=3, strikes=0, quarantined=False, revoked=False)
    screen = StringIO()
    found = Status(state="running", detail="", round=9, nodes=tuple(there))
    Console(file=screen, width=100).print(status_command.page(found, height))
    return screen.getvalue()


@pytest.mark.parametrize(
    ("days", "words"), [(1.2, "1 day left: "), (-1.0, "ended 1 day ago: "), (99.0, "99 days left")]
)
def test_the_days_of_a_certificate(days: float, words: str) -> None:
    screen = StringIO()
    found = Status(state="running", detail="", certificate_days=days)
    Console(file=screen, width=100).print(status_command.page(found, 40))
    assert f"certificate  {words}" in screen.getvalue()


def test_of_many_nodes_those_with_trouble_come_first_and_a_page_fits() -> None:
    text = shown(100, 40)
    assert len(text.splitlines()) <= 40
    names = [line.split()[0] for line in text.splitlines() if line.startswith("n0")]
    assert names[:3] == ["n077", "n050", "n000"]
    assert f"and {100 - len(names)} more nodes" in text
