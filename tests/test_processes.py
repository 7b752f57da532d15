"""Programs that are watched: restarts with a limit, order of stopping, no orphans."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from fedlora.errors import FedLoRAError
from fedlora.processes import (
    Died,
    Program,
    Programs,
    flower_environment,
    private_folder,
    program_path,
    secret_file,
)

SLEEP = [sys.executable, "-c", "import time; time.sleep(60)"]


def program(folder: Path, name: str, command: list[str], **fields: Any) -> Program:
    return Program(name=name, command=command, log=folder / "logs" / f"{name}.log", **fields)


def until(true: Callable[[], bool], look: Callable[[], None] = lambda: None) -> None:
    end = time.monotonic() + 10.0
    while not true():
        assert time.monotonic() < end
        look()
        time.sleep(0.01)


def test_what_dies_is_started_again_and_all_is_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedlora.processes._FIRST_PAUSE", 0.01)
    told: list[dict[str, Any]] = []
    programs = Programs(restarts=2, notify=told.append)
    programs.start(program(tmp_path, "one", SLEEP))
    programs.start(program(tmp_path, "two", SLEEP))
    first = programs.running()
    os.kill(first["one"], signal.SIGKILL)
    until(lambda: programs.running().get("one") not in (None, first["one"]), programs.look)
    second = programs.running()
    assert second["two"] == first["two"]
    assert [(e["event"], e["program"]) for e in told] == [
        ("started", "one"),
        ("started", "two"),
        ("died", "one"),
        ("started", "one"),
    ]
    assert told[2]["detail"] == "one was ended by signal 9"
    programs.stop()
    assert not any(psutil.pid_exists(pid) for pid in second.values())
    assert programs.running() == {}


def test_what_dies_too_often_ends_the_watch_with_its_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedlora.processes._FIRST_PAUSE", 0.001)
    programs = Programs(restarts=2, notify=lambda event: None)
    command = [sys.executable, "-c", "print('no port'); raise SystemExit(7)"]
    programs.start(program(tmp_path, "short", command, hint=lambda status: f"hint {status}"))
    with pytest.raises(Died, match=r"short ended with status 7 \(hint 7\), 3 times in ten minutes; its log is .*short"):
        until(lambda: False, programs.look)
    assert (tmp_path / "logs" / "short.log").read_text() == "no port\n" * 3
    programs.stop()


def test_a_program_ends_with_the_one_that_started_it(tmp_path: Path) -> None:
    parent = (
        "import sys, time, pathlib; from fedlora.processes import Program, Programs;"
        "p = Programs(restarts=0, notify=lambda e: print(e['pid'], flush=True));"
        f"p.start(Program(name='child', command={SLEEP!r}, log=pathlib.Path({str(tmp_path / 'log')!r})));"
        "time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", parent], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        child = int(process.stdout.readline())
        assert psutil.pid_exists(child)
        process.kill()
    until(lambda: not psutil.pid_exists(child) or psutil.Process(child).status() == psutil.STATUS_ZOMBIE)


def test_the_environment_is_added_and_the_folder_is_no_checkout(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "import os; print(os.environ['A'], os.getcwd())"]
    programs = Programs(restarts=0, notify=lambda event: None)
    one = program(tmp_path, "one", command, environment={"A": "b"})
    programs.start(one)
    assert one.process is not None
    one.process.wait()
    assert one.log.read_text() == "b /\n"


def test_a_command_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(Died, match="gone: /no/such/program cannot be started"):
        Programs(restarts=0, notify=lambda event: None).start(program(tmp_path, "gone", ["/no/such/program"]))
    with pytest.raises(Died, match="no-such-program is not beside"):
        program_path("no-such-program")


def test_a_folder_for_secrets_is_private(tmp_path: Path) -> None:
    assert (private_folder(tmp_path / "new").stat().st_mode & 0o777) == 0o700
    (tmp_path / "open").mkdir(mode=0o755)
    with pytest.raises(FedLoRAError, match="others may look into it"):
        private_folder(tmp_path / "open")


def test_the_shared_secret_is_made_once_and_is_private(tmp_path: Path) -> None:
    path = secret_file(tmp_path / "secret")
    first = path.read_bytes()
    assert (len(first), path.stat().st_mode & 0o777) == (32, 0o600)
    assert secret_file(path).read_bytes() == first


def test_flower_calls_nobody_and_starts_what_is_installed_here(tmp_path: Path) -> None:
    given = flower_environment(tmp_path)
    assert (given["FLWR_TELEMETRY_ENABLED"], given["FLWR_HOME"]) == ("0", str(tmp_path))
    assert given["PATH"].split(os.pathsep)[0] == str(Path(sys.executable).parent)
