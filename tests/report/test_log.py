"""The run log: what is written is there, what was torn is said, what is damaged is refused."""

from __future__ import annotations

import errno
import json
import logging
import os
from pathlib import Path
from typing import Any

import pytest

from fedlora.errors import CheckpointError
from fedlora.report.log import FILE, RunLog, read_log


def start() -> dict[str, Any]:
    return {"event": "start", "run": "r", "method": "flora", "config": {}, "clients": [{"id": "a", "rank": 4}]}


def numbered(number: int) -> dict[str, Any]:
    return {
        "event": "round",
        "round": number,
        "evaluation": {"score": 0.5, "groups": {"é\u2028": {"correct": 1, "counted": 2}}},
    }


def filled(folder: Path, rounds: int = 3) -> RunLog:
    log = RunLog(folder)
    log.append(start())
    for number in range(1, rounds + 1):
        log.append(numbered(number))
    return log


def test_events_come_back_as_they_went_in(tmp_path: Path) -> None:
    filled(tmp_path)
    assert read_log(tmp_path) == [start(), numbered(1), numbered(2), numbered(3)]


def test_every_event_is_on_disk_before_append_returns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[int] = []
    fsync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda fd: (synced.append(os.fstat(fd).st_size), fsync(fd))[1])
    log = RunLog(tmp_path)
    log.append(start())
    log.append(numbered(1))
    assert synced[-1] == log.path.stat().st_size
    assert len(synced) == 2


@pytest.mark.parametrize("keep", [1, 10, -1])
def test_one_torn_last_line_is_left_out_reported_and_cut_on_opening(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, keep: int
) -> None:
    path = filled(tmp_path).path
    data = path.read_bytes()
    whole = data[: data[:-1].rfind(b"\n") + 1]
    path.write_bytes(whole + data[len(whole) :][:keep])
    with caplog.at_level(logging.WARNING):
        assert read_log(tmp_path)[-1] == numbered(2)
        RunLog(tmp_path).append(numbered(3))
    assert "line 4: torn by a crash" in caplog.text
    assert "is cut away" in caplog.text
    assert path.read_bytes() == data


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (b'{"event": "rou', r"line 3: damaged: .*restore it from a copy"),
        (b'{"event": "round", "round": 2, "seconds": NaN}', r"line 3: damaged: NaN is not a finite number"),
        (b"\xff\xfe", r"line 3: damaged"),
        (b"", r"line 3: damaged"),
        (b"[]", r"line 3: no event of a run log: \[\]"),
        (b'{"event": "party"}', r"line 3: no event of a run log"),
        (b'{"event": "round"}', r"line 3: a round event without its number"),
    ],
)
def test_other_damage_is_refused_with_its_line(tmp_path: Path, line: bytes, said: str) -> None:
    path = filled(tmp_path).path
    lines = path.read_bytes().split(b"\n")
    lines[2] = line
    path.write_bytes(b"\n".join(lines))
    with pytest.raises(CheckpointError, match=said):
        read_log(tmp_path)


def test_a_folder_without_a_log_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        CheckpointError, match=r"metrics\.jsonl: cannot read the run log: .*is this the folder of a run\?"
    ):
        read_log(tmp_path)


def test_a_resumed_run_forgets_later_rounds_and_the_end_and_keeps_references(tmp_path: Path) -> None:
    log = filled(tmp_path)
    log.append({"event": "reference", "name": "bare base", "score": 0.0})
    log.append({"event": "end", "seconds": 1.0})
    log.truncate_to(1)
    assert [(e["event"], e.get("round")) for e in read_log(tmp_path)] == [
        ("start", None),
        ("round", 1),
        ("reference", None),
    ]
    assert [p.name for p in tmp_path.iterdir()] == [FILE]
    log.append(numbered(2))
    assert read_log(tmp_path)[-1] == numbered(2)


@pytest.mark.parametrize("round_", [0, 2])
def test_of_the_untrained_scores_a_resumed_run_keeps_the_last(tmp_path: Path, round_: int) -> None:
    log = RunLog(tmp_path)
    for score in (0.1, 0.2):
        log.append(start())
        log.append({"event": "untrained", "tasks": {"agnews": {"score": score, "counted": 10.0}}})
    log.append(numbered(1))
    log.truncate_to(round_)
    log.truncate_to(round_)
    kept = [e for e in read_log(tmp_path) if e["event"] == "untrained"]
    assert kept == [{"event": "untrained", "tasks": {"agnews": {"score": 0.2, "counted": 10.0}}}]
    assert len(read_log(tmp_path)) == 3 + (round_ > 0)


def test_a_crash_while_truncating_leaves_the_old_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = filled(tmp_path)
    before = log.path.read_bytes()

    def crash(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", crash)
    with pytest.raises(KeyboardInterrupt):
        log.truncate_to(0)
    assert log.path.read_bytes() == before


def test_nothing_to_truncate_is_fine(tmp_path: Path) -> None:
    RunLog(tmp_path).truncate_to(3)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("call", ["open", "replace", "fsync"])
def test_a_disk_that_refuses_while_truncating_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    log = filled(tmp_path)

    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(os, call, refuse)
    with pytest.raises(
        CheckpointError, match=r"metrics\.jsonl: cannot cut the run log to round 1: Read-only .* and resume"
    ):
        log.truncate_to(1)


def test_a_log_that_cannot_be_opened_is_said(tmp_path: Path) -> None:
    (tmp_path / FILE).mkdir()
    with pytest.raises(CheckpointError, match=r"metrics\.jsonl: cannot open the run log: .*allow writing there"):
        RunLog(tmp_path)
    log = RunLog(tmp_path / "gone")
    with pytest.raises(CheckpointError, match=r"gone/metrics\.jsonl: cannot write the start event: No such file"):
        log.append(start())


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite_are_refused_by_name(tmp_path: Path, bad: float) -> None:
    log = filled(tmp_path, rounds=1)
    before = log.path.read_bytes()
    event = numbered(2) | {"clients": [{"id": "a"}, {"id": "b", "loss_after": bad}]}
    with pytest.raises(CheckpointError, match=r"round\.clients\.1\.loss_after is (nan|inf); leave out"):
        log.append(event)
    assert log.path.read_bytes() == before


def test_a_full_disk_is_said_and_leaves_whole_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = filled(tmp_path, rounds=1)
    before = log.path.read_bytes()
    write = os.write

    def half(fd: int, data: Any) -> int:
        if len(data) > 20:
            return write(fd, data[:20])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "write", half)
    event = numbered(2)
    assert len(json.dumps(event)) > 40
    with pytest.raises(
        CheckpointError, match=r"cannot write the round event: No space left on device; free some space"
    ):
        log.append(event)
    assert log.path.read_bytes() == before
