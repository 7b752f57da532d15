"""Programs that are started, watched, started again when they die, and stopped in turn: no shell, no orphans.

A child that outlives its parent would go on as nobody's, so on Linux the kernel is told to end it with its parent.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from fedlora.errors import FedLoRAError

__all__ = [
    "Died",
    "Program",
    "Programs",
    "end_with_parent",
    "flower_environment",
    "private_folder",
    "program_path",
    "secret_file",
]

_WINDOW: Final = 600.0  # seconds over which restarts are counted
_FIRST_PAUSE, _LONGEST_PAUSE = 0.5, 30.0  # seconds before a program is started again
_SETTLED: Final = 30.0  # seconds after which a program that dies is started again at once
_GRACE = 10.0  # seconds between SIGTERM and SIGKILL
_PR_SET_PDEATHSIG: Final = 1
_LIBC: Final = ctypes.CDLL(None, use_errno=True) if sys.platform == "linux" else None  # loaded before any fork

Notify = Callable[[dict[str, Any]], None]


class Died(FedLoRAError):
    """A program that ended more often than it may."""


@dataclass(kw_only=True)
class Program:
    """One program: its command, the environment on top of this one's, and the file that takes all it says."""

    name: str
    command: Sequence[str]
    log: Path
    environment: Mapping[str, str] = field(default_factory=dict)
    hint: Callable[[int], str] = lambda status: ""  # exit status -> what it means, for people

    process: subprocess.Popen[bytes] | None = None
    ended: list[float] = field(default_factory=list)
    began: float = 0.0
    early: int = 0  # times in a row that it died soon after its start
    wait_until: float = 0.0


class Programs:
    """Programs in the order in which they are started; they are stopped in the opposite one."""

    def __init__(self, *, restarts: int, notify: Notify) -> None:
        self._programs: list[Program] = []
        self._restarts = restarts
        self._notify = notify

    def start(self, program: Program) -> None:
        """Start one more. Raises: Died if its command is not there."""
        self._programs.append(program)
        self._launch(program)

    def look(self) -> None:
        """Start again what has died, with growing pauses where it died early.

        Raises: Died for more than `restarts` in ten minutes.
        """
        now = time.monotonic()
        for program in self._programs:
            if program.process is not None and program.process.poll() is not None:
                status = program.process.returncode
                program.process = None
                program.ended = [t for t in program.ended if now - t < _WINDOW] + [now]
                said = _said(program, status)
                self._notify({"event": "died", "program": program.name, "status": status, "detail": said})
                if len(program.ended) > self._restarts:
                    raise Died(f"{said}, {len(program.ended)} times in ten minutes; its log is {program.log}")
                program.early = program.early + 1 if now - program.began < _SETTLED else 0
                pause = min(_FIRST_PAUSE * 2**program.early, _LONGEST_PAUSE)
                program.wait_until = now + pause
            if program.process is None and now >= program.wait_until:
                self._launch(program)

    def running(self) -> dict[str, int]:
        """name -> process id of those that run."""
        return {p.name: p.process.pid for p in self._programs if p.process is not None and p.process.poll() is None}

    def stop(self) -> None:
        """SIGTERM to each from the last to the first, SIGKILL to what is still there after ten seconds."""
        for program in reversed(self._programs):
            process, program.process = program.process, None
            if process is None or process.poll() is not None:
                continue
            with contextlib.suppress(ProcessLookupError):
                process.terminate()
            try:
                process.wait(_GRACE)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self._programs.clear()

    def _launch(self, program: Program) -> None:
        program.log.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with program.log.open("ab") as log:
            try:
                program.process = subprocess.Popen(
                    list(program.command),
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    env={**os.environ, **program.environment},
                    start_new_session=True,  # Ctrl-C is for us, who stop them in turn
                    cwd="/",  # never a checkout, whose folders would be imported
                    preexec_fn=end_with_parent,
                )
            except OSError as error:
                raise Died(f"{program.name}: {program.command[0]} cannot be started: {error.strerror}") from error
        program.began = time.monotonic()
        self._notify({"event": "started", "program": program.name, "pid": program.process.pid})


def end_with_parent() -> None:
    """Have the kernel end this process when the one that started it ends (Linux; elsewhere nothing happens)."""
    if _LIBC is not None:
        _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def program_path(name: str) -> str:
    """The program of that name that was installed with this Python. Raises: Died if there is none."""
    path = Path(sys.executable).parent / name
    if not path.is_file():
        raise Died(f"{name} is not beside {sys.executable}: install fedlora with its dependencies in one environment")
    return str(path)


def flower_environment(home: Path) -> dict[str, str]:
    """What every program of Flower gets: a home of its own, no calls to others, this environment's programs first."""
    here = str(Path(program_path("flwr")).parent)
    return {
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "MALLOC_MMAP_THRESHOLD_": "1048576",  # large messages go back to the system when they are done with
        "FLWR_HOME": str(home),
        "PATH": f"{here}{os.pathsep}{os.environ.get('PATH', os.defpath)}",
    }


def secret_file(path: Path) -> Path:
    """A file of 32 random bytes that this user alone may read; made if it is not there."""
    if not path.exists():
        with open(path, "xb", opener=lambda name, flags: os.open(name, flags, 0o600)) as file:
            file.write(secrets.token_bytes(32))
    return path


def private_folder(path: Path) -> Path:
    """Make a folder that only this user may enter. Raises: FedLoRAError if it is there and open to others."""
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    if path.stat().st_mode & 0o077:
        raise FedLoRAError(f"{path}: others may look into it, and it holds secrets: chmod 700 {path}")
    return path


def _said(program: Program, status: int) -> str:
    hint = program.hint(status)
    how = f"was ended by signal {-status}" if status < 0 else f"ended with status {status}"
    return f"{program.name} {how}{f' ({hint})' if hint else ''}"
