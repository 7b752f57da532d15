"""A checkpoint is whole or not there: through full disks, interruptions and damage."""

from __future__ import annotations

import hashlib
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedlora.adapter import Adapter, Factors
from fedlora.errors import CheckpointError
from fedlora.state import Block, GlobalState, Task
from fedlora.wire import encode_state
from server import checkpoint
from server.checkpoint import latest, save, write_atomic


@pytest.fixture(scope="session")
def state(fakes: Any) -> GlobalState:
    rng = np.random.default_rng(0)
    modules = fakes.LAYOUT.modules.items()
    adapter = Adapter({n: Factors(rng.normal(size=(2, m.inp)), rng.normal(size=(m.out, 2))) for n, m in modules})
    task = Task(name="", blocks=(Block(adapter=adapter, born=1),))
    return GlobalState(version=1, base=fakes.BASE, layout=fakes.LAYOUT, tasks={"": task})


def test_the_newest_comes_back_and_only_two_are_kept(tmp_path: Path, state: GlobalState) -> None:
    assert latest(tmp_path / "none") is None
    for round_ in (0, 1, 999_999, 1_000_000):  # seven digits sort after six
        save(tmp_path / "c", round_, state)
    assert sorted(p.name for p in (tmp_path / "c").iterdir()) == ["round-1000000.flw", "round-999999.flw"]
    found = latest(tmp_path / "c")
    assert found is not None
    assert (found[0], encode_state(found[1])) == (1_000_000, encode_state(state))


def test_what_is_no_checkpoint_is_not_taken_for_one(tmp_path: Path, state: GlobalState) -> None:
    path = save(tmp_path, 3, state)
    for name in (".round-000004.flw.partial", "round-000005.flw.bak", "round-5.flw", "round-00000x.flw"):
        (tmp_path / name).write_bytes(b"torn")
    found = latest(tmp_path)
    assert found is not None
    assert found[0] == 3
    assert path.exists()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("damage")


@settings(deadline=None, max_examples=50)
@given(st.data())
def test_any_damaged_byte_is_seen(state: GlobalState, folder: Path, data: Any) -> None:
    path = save(folder, 1, state)
    raw = bytearray(path.read_bytes())
    raw[data.draw(st.integers(0, len(raw) - 1))] ^= data.draw(st.integers(1, 255))
    cut = data.draw(st.sampled_from([len(raw), len(raw) // 2, 5, 0]))
    path.write_bytes(raw[:cut])
    with pytest.raises(CheckpointError, match=r"round-000001.flw is damaged: .*SHA-256; start the run anew"):
        latest(folder)


def test_another_format_is_named(tmp_path: Path) -> None:
    data = b"FLW9 something of the future"
    (tmp_path / "round-000001.flw").write_bytes(hashlib.sha256(data).digest() + data)
    with pytest.raises(CheckpointError, match="was written by another version of fedlora"):
        latest(tmp_path)


def test_an_unreadable_checkpoint_is_not_called_damaged(tmp_path: Path) -> None:
    (tmp_path / "round-000001.flw").mkdir()
    with pytest.raises(CheckpointError, match=r"round-000001.flw cannot be read: Is a directory. Mend that"):
        latest(tmp_path)


@pytest.mark.parametrize("call", ["os.fsync", "os.replace"])
def test_an_interruption_leaves_the_old_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    path = tmp_path / "file"
    write_atomic(path, b"old")

    def interrupt(*args: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(call, interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_atomic(path, b"new" * 1000)
    assert path.read_bytes() == b"old"
    monkeypatch.undo()
    write_atomic(path, b"new")
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_the_bytes_are_on_disk_before_the_name_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[str] = []
    replace = checkpoint.os.replace
    monkeypatch.setattr(
        "os.fsync", lambda fd: steps.append("folder" if Path(f"/proc/self/fd/{fd}").is_dir() else "file")
    )
    monkeypatch.setattr("os.replace", lambda a, b: (steps.append("rename"), replace(a, b)))
    write_atomic(tmp_path / "file", b"data")
    assert steps == ["file", "rename", "folder"]


def test_a_full_disk_is_named_and_the_old_file_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_atomic(tmp_path / "file", b"old")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(CheckpointError, match=r"file \(3 bytes\): No space left on device. Nothing that was saved"):
        write_atomic(tmp_path / "file", b"new")
    assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == [("file", b"old")]


def test_a_file_size_limit_of_the_system(tmp_path: Path) -> None:
    """A real refusal by the kernel, in a process of its own."""
    script = f"""
import resource, signal, sys
sys.path.insert(0, {str(Path(checkpoint.__file__).parents[1])!r})
from pathlib import Path
from server.checkpoint import write_atomic
from fedlora.errors import CheckpointError
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
path = Path({str(tmp_path / "round-000001.flw")!r})
write_atomic(path, b"old")
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, {resource.RLIM_INFINITY}))
try:
    write_atomic(path, b"new" * 100_000)
except CheckpointError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert "(300,000 bytes): File too large. Nothing that was saved before is lost" in done.stdout
    assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == [("round-000001.flw", b"old")]


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path, state: GlobalState) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"cannot write .*round-000000.flw .*: (File exists|Not a directory)"):
        save(tmp_path / "file", 0, state)
