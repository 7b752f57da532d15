"""A run log that was damaged in ways that JSON allows."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedlora.errors import CheckpointError
from fedlora.report.log import RunLog, read_log


@pytest.mark.parametrize("line", ["[" * 100_000, '{"event":' * 5000 + "1" + "}" * 5000, '{"event":' + "9" * 5000 + "}"])
def test_a_line_that_python_cannot_parse_is_named(tmp_path: Path, line: str) -> None:
    (tmp_path / "metrics.jsonl").write_text(line + "\n")
    with pytest.raises(CheckpointError, match="line 1: damaged"):
        read_log(tmp_path)


@pytest.mark.parametrize("value", ["1e999", '"\\ud800"'])
def test_a_chained_line_of_what_was_never_written_is_named(tmp_path: Path, value: str) -> None:
    log = RunLog(tmp_path)
    log.append({"event": "start", "run": "r", "seconds": 1.5})
    text = log.path.read_text()
    log.path.write_text(text.replace("1.5", value))
    with pytest.raises(CheckpointError, match="line 1"):
        read_log(tmp_path)


def test_a_log_whose_last_line_is_nested_deeply_opens_and_is_refused_when_it_is_read(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text("[" * 100_000 + "\n")
    RunLog(tmp_path).append({"event": "end"})
    with pytest.raises(CheckpointError, match="line 1: damaged"):
        read_log(tmp_path)
