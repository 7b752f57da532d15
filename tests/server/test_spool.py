"""The spool gives answers back in id order, from memory or from files, and drops what it made."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedlora.errors import CheckpointError
from fedlora.state import Answer
from server.spool import Spool

NASTY = ["b", "a", "../../etc/passwd", "ü" * 150, "a/b", "."]


def decode(client: str, data: bytes) -> Answer:
    return Answer(info={"client": client, "data": data.decode()})


@pytest.mark.parametrize("limit", [0, 12, 10**6])
def test_answers_come_back_in_id_order(tmp_path: Path, limit: int) -> None:
    spool = Spool(tmp_path / "spool", decode, memory_limit=limit)
    for client in NASTY:
        spool.put(client, f"of {client}".encode())
    assert list(spool) == sorted(NASTY)
    assert len(spool) == len(NASTY)
    assert "b" in spool
    assert "c" not in spool
    assert {c: a.info for c, a in spool.items()} == {c: {"client": c, "data": f"of {c}"} for c in NASTY}
    files = list(tmp_path.rglob("*.flw"))
    assert {0: len(NASTY), 10**6: 0}.get(limit, len(files)) == len(files)
    assert all(p.parent == tmp_path / "spool" for p in files)
    with pytest.raises(KeyError):
        spool["nobody"]
    spool.clear()
    assert (len(spool), list(tmp_path.iterdir())) == (0, [])


def test_memory_is_bounded(tmp_path: Path) -> None:
    spool = Spool(tmp_path, decode, memory_limit=1000)
    for i in range(100):
        spool.put(f"{i:03d}", b"x" * 90)
    assert len(spool) == 100
    assert len(list(tmp_path.glob("*.flw"))) == 100 - 11


def test_what_a_crash_left_is_dropped_with_the_rest(tmp_path: Path) -> None:
    folder = tmp_path / "spool"
    folder.mkdir()
    (folder / "stale.flw").write_bytes(b"")
    Spool(folder, decode, memory_limit=0).clear()
    assert not folder.exists()


def test_a_disk_that_refuses_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    spool = Spool(tmp_path / "file", decode, memory_limit=0)
    with pytest.raises(CheckpointError, match=r"set aside the answer of c1 \(4 bytes\).*checkpoint is intact"):
        spool.put("c1", b"data")
    spool = Spool(tmp_path / "spool", decode, memory_limit=0)
    spool.put("c1", b"data")
    next((tmp_path / "spool").iterdir()).unlink()
    with pytest.raises(CheckpointError, match="cannot read the answer of c1 back"):
        spool["c1"]
