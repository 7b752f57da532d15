"""What a client keeps: the same ask gets the same bytes, whatever happened in between."""

from __future__ import annotations

import stat
from pathlib import Path

import numpy as np
import pytest

from clients.memory import Memory
from fedlora.errors import CheckpointError

NASTY = [
    "../../x",
    "..",
    ".",
    "",
    "a/b",
    "/etc/passwd",
    "a\0b",
    "ü" * 90,
    "n" * 300,
    "\ud800",
    "CON.",
    "a b",
    "~",
    "-\n",
]


def test_only_the_same_ask_gets_the_kept_answer(tmp_path: Path) -> None:
    memory = Memory(tmp_path, "run", "client")
    assert memory.recall(b"ask") is None
    memory.remember(b"ask", b"answer")
    assert Memory(tmp_path, "run", "client").recall(b"ask") == b"answer"
    assert memory.recall(b"another") is None
    assert Memory(tmp_path, "run", "other").recall(b"ask") is None
    assert Memory(tmp_path, "run-2", "client").recall(b"ask") is None
    memory.remember(b"another", b"")
    assert memory.recall(b"another") == b""
    assert memory.recall(b"ask") is None  # one answer is kept


@pytest.mark.parametrize("cut", [0, 10, 40, 64, 66])
def test_a_torn_answer_is_no_answer(tmp_path: Path, cut: int) -> None:
    memory = Memory(tmp_path, "run", "client")
    memory.remember(b"ask", b"answer")
    path = tmp_path / "run" / "client" / "answer"
    path.write_bytes(path.read_bytes()[:cut])
    assert memory.recall(b"ask") is None


def test_an_interruption_leaves_the_answer_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    memory = Memory(tmp_path, "run", "client")
    memory.remember(b"ask", b"answer")

    def interrupt(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("os.replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        memory.remember(b"next", b"torn")
    assert memory.recall(b"ask") == b"answer"


def test_no_id_leaves_the_root_or_meets_another(tmp_path: Path) -> None:
    root = tmp_path / "deep" / "root"
    for i, name in enumerate(NASTY):
        Memory(root, name, name).remember(b"ask", str(i).encode())
    for i, name in enumerate(NASTY):
        assert Memory(root, name, name).recall(b"ask") == str(i).encode()
    files = [p for p in tmp_path.rglob("*") if p.is_file()]
    assert len(files) == len(NASTY)
    assert all(len(p.relative_to(root).parts) == 3 for p in files)


def test_nobody_else_may_read_it(tmp_path: Path) -> None:
    Memory(tmp_path / "root", "run", "client").remember(b"ask", b"answer")
    for path in (tmp_path / "root").rglob("*"):
        assert stat.S_IMODE(path.stat().st_mode) == (0o700 if path.is_dir() else 0o600)
    assert stat.S_IMODE((tmp_path / "root").stat().st_mode) == 0o700


def test_a_disk_that_refuses_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"cannot keep 70 bytes in .*: (File exists|Not a directory). Free"):
        Memory(tmp_path / "file", "run", "client").remember(b"ask", b"answer")


def test_moments_are_those_before_the_round_that_is_asked(tmp_path: Path) -> None:
    memory = Memory(tmp_path, "run", "client")
    assert memory.moments(1) == {}
    for number in (2, 3, 7):
        memory.keep_moments(number, {"exp_avg": np.full(3, number, np.float32), "step": np.array(float(number))})
    assert memory.moments(8)["exp_avg"].tolist() == [7, 7, 7]
    assert memory.moments(8)["step"].shape == ()
    assert memory.moments(7)["exp_avg"].tolist() == [3, 3, 3]  # round 7 is repeated after a crash
    assert memory.moments(3) == {}  # only the last two are kept
    assert len(list(tmp_path.rglob("moments-*"))) == 2
    assert Memory(tmp_path, "run", "other").moments(8) == {}


def test_damaged_moments_are_named(tmp_path: Path) -> None:
    memory = Memory(tmp_path, "run", "client")
    memory.keep_moments(1, {"exp_avg": np.zeros(3, np.float32)})
    next(tmp_path.rglob("moments-*")).write_bytes(b"torn")
    with pytest.raises(CheckpointError, match="moments-000001 cannot be read"):
        memory.moments(2)
