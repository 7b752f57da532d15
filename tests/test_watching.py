"""How a run goes, from its files: what they say, whatever part of them is there, and nothing of a single client."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedlora import pki, watching
from fedlora.deploy import DeployFile, read_deploy
from fedlora.errors import ConfigError
from fedlora.report.log import RunLog
from fedlora.tail import Tail
from fedlora.watched_events import REPORTED, RULES, Rounds, Steps
from fedlora.watching import PROGRAMS, Status, Watcher, alive, programs_record, span, watcher
from tests.watched import NODES, NOW, RUN, deployment, ids, journal, steps, write_run

SLEEP = [sys.executable, "-c", "import time; time.sleep(60)"]


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return deployment(tmp_path_factory.mktemp("keys")).keys


@pytest.fixture
def deploy(keys: Path, tmp_path: Path) -> DeployFile:
    """A deployment of its own with the keys of all."""
    for name in ("deploy.toml", "run.toml"):
        text = (keys.parent / name).read_text()
        (tmp_path / name).write_text(text.replace('keys = "keys"', f"keys = {json.dumps(str(keys))}"))
    return read_deploy(tmp_path / "deploy.toml")


@pytest.fixture
def pid() -> Iterator[int]:
    with subprocess.Popen(SLEEP) as process:
        yield process.pid
        process.kill()


def look(deploy: DeployFile, at: datetime = NOW) -> Status:
    return watcher(deploy.state.parent / "deploy.toml").look(at=at)


def serve(deploy: DeployFile, pid: int, *, conducting: bool = True) -> None:
    """As if a server ran, and the process `pid` were all of its programs; the conductor began at `NOW`."""
    deploy.state.mkdir(exist_ok=True)
    (deploy.state / PROGRAMS).write_bytes(programs_record(dict.fromkeys(("server", "superlink", "executor"), pid)))
    if conducting:
        (deploy.state / "conductor.pid").write_text(str(pid))
        os.utime(deploy.state / "conductor.pid", (NOW.timestamp(), NOW.timestamp()))


def end(deploy: DeployFile, state: str, detail: str) -> None:
    deploy.state.mkdir(exist_ok=True)
    (deploy.state / "outcome.json").write_text(json.dumps({"state": state, "detail": detail, "pid": 1}))


def test_before_anything_ran(deploy: DeployFile) -> None:
    found = look(deploy)
    assert (found.state, found.exit_status) == ("not started", 3)
    assert (found.run, found.method, found.round, found.rounds) == (None, "ffa-lora", 0, 5)
    assert [(n.name, n.last_round, n.strikes) for n in found.nodes] == [(name, None, None) for name in NODES]
    assert not any(found.programs.values())
    assert found.problems == ()


def test_in_the_midst_of_a_round(deploy: DeployFile, pid: int) -> None:
    write_run(deploy)
    journal(deploy, *steps(deploy))
    serve(deploy, pid)
    found = look(deploy, NOW + timedelta(seconds=33))
    assert (found.state, found.exit_status, found.run, found.round, found.rounds) == ("running", 0, RUN, 3, 5)
    assert found.open == watching.OpenRound(number=4, seconds=30, asked=3, kind="train", answered=1, repeated=False)
    assert {n.name: (n.last_round, n.strikes, n.quarantined) for n in found.nodes} == {
        "east": (4, 0, False),
        "north": (4, 0, False),
        "west": (None, 2, True),
    }
    assert (found.answers, found.refusals) == (3, {"not finite": 1})
    assert (found.bytes_up, found.bytes_down) == (6_000_000, 9_000_000)
    assert (found.last_bytes_up, found.last_bytes_down) == (3_000_000, 3_000_000)
    assert (found.last_seconds, found.mean_seconds) == (30.0, 20.0)
    assert found.score is not None
    assert (found.score.value, found.score.round, found.score.rows) == (0.75, 2, "the server's rows")
    assert found.programs == {"server": True, "superlink": True, "executor": True, "conductor": True}
    assert found.certificate_days == pytest.approx(365.0 - 33 / 86400)
    assert (found.privacy, found.problems) == ("none claimed", ())


def test_nothing_that_one_client_measured_and_no_id_comes_out(deploy: DeployFile) -> None:
    write_run(deploy)
    end(deploy, "paused", f"round 4: 1 of 3 answered ({ids(deploy)['west']}: late\x1b[2J). Bring it back.")
    found = look(deploy)
    assert found.detail == "round 4: 1 of 3 answered (west: late [2J). Bring it back."
    text = repr(found)
    for secret in ("0.4321", "0.123", "my own rule", "\x1b", *ids(deploy).values()):
        assert secret not in text
    assert found.refusals == {"other base": 1, REPORTED: 1}


def test_who_did_not_answer_is_missing_and_not_refused(deploy: DeployFile) -> None:
    write_run(deploy)
    one = {"event": "refused", "client": ids(deploy)["west"], "strikes": 0}
    rules = ("deadline", "node unavailable", "client failed", "not finite", "malformed", "deadline")
    journal(deploy, *steps(deploy)[:4], *({**one, "rule": rule} for rule in rules))
    found = look(deploy)
    assert found.missing == {"client failed": 1, "deadline": 2, "node unavailable": 1}
    assert found.refusals == {"malformed": 1, "not finite": 1}
    assert watching.MISSING <= RULES


def test_a_score_of_one_client_is_that_clients_own(deploy: DeployFile) -> None:
    def told(clients: int) -> watching.Score | None:
        rounds = Rounds()
        scores = {f"c{i}": {"score": 0.3} for i in range(clients)}
        rounds.take({"event": "round", "round": 1, "evaluation": {"score": 0.3, "clients": scores}})
        return rounds.score

    assert told(1) is None
    assert told(2) == watching.Score(value=0.3, round=1, rows="the clients' held-out rows")


@pytest.mark.parametrize(
    ("state", "detail", "status", "words"),
    [
        ("done", "/x/adapter", 0, "adapter in /x/adapter"),
        ("paused", "round 2: bring them back", 3, "round 2: bring them back"),
        ("failed", "keys.toml: wrong", 1, "keys.toml: wrong"),
        ("failed", "Traceback (most recent call last):\n  File x\nKeyError: 'a'\n", 1, "KeyError: 'a' (all of it: "),
    ],
)
def test_how_it_ended(deploy: DeployFile, pid: int, state: str, detail: str, status: int, words: str) -> None:
    write_run(deploy)
    serve(deploy, pid)
    end(deploy, state, detail)
    found = look(deploy)
    assert (found.state, found.exit_status) == (state, status)
    assert found.detail.startswith(words)
    assert found.open is None


def test_stopped_starting_waiting(deploy: DeployFile, pid: int) -> None:
    write_run(deploy)
    assert (look(deploy).state, look(deploy).exit_status) == ("stopped", 3)
    serve(deploy, pid, conducting=False)
    journal(deploy, *steps(deploy), first=NOW - timedelta(hours=1))
    assert look(deploy).state == "starting"
    serve(deploy, pid)
    assert look(deploy).state == "starting"  # what the journal has is of the conductor before it
    one, two, *rest = steps(deploy)
    journal(deploy, one)
    assert look(deploy).state == "starting"
    journal(deploy, two)
    found = look(deploy)
    assert (found.state, found.detail) == ("waiting", "nodes join; 1 of 3 were online at the last look")
    journal(deploy, *rest, {"event": "closed", "round": 4})
    found = look(deploy)
    assert (found.state, found.open) == ("running", None)
    journal(deploy, {"event": "done", "seconds": 1.0})
    assert look(deploy).detail == "writing the adapter"


def test_a_retry_asks_anew_and_another_run_counts_anew(deploy: DeployFile, pid: int) -> None:
    write_run(deploy)
    journal(deploy, *steps(deploy), {"event": "retry", "round": 4})
    serve(deploy, pid)
    found = look(deploy)
    assert found.open is not None
    assert (found.open.repeated, found.open.answered) == (True, 0)
    journal(deploy, {"event": "conducting", "run": RUN})
    assert look(deploy).answers == 3
    journal(deploy, {"event": "conducting", "run": "f" * 16})
    assert (look(deploy).answers, look(deploy).refusals) == (0, {})


def test_a_number_that_was_given_to_another_process(deploy: DeployFile, pid: int) -> None:
    serve(deploy, pid)
    record = json.loads((deploy.state / PROGRAMS).read_text())
    for entry in record.values():
        entry["began"] -= 100.0
    (deploy.state / PROGRAMS).write_text(json.dumps(record))
    assert not any(look(deploy).programs.values())


def test_who_is_alive() -> None:
    process = subprocess.Popen(SLEEP)
    assert alive(process.pid)
    assert alive(os.getpid())
    process.kill()
    while process.returncode is None and os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT) is None:
        pass
    assert not alive(process.pid)  # a zombie
    process.wait()
    assert not alive(process.pid)
    assert json.loads(programs_record({"gone": process.pid})) == {}
    assert not alive(10**18)


def test_privacy_spent(deploy: DeployFile) -> None:
    write_run(deploy)
    log = RunLog(deploy.folder)
    log.append({"event": "round", "round": 4, "privacy": {"epsilon": 1.2345, "delta": 1e-5, "unit": "client"}})
    log.append({"event": "round", "round": 5})
    assert look(deploy).privacy == "epsilon 1.23 at delta 1e-05, for each client"


def test_revoked_nodes_keep_their_names_and_do_not_count(tmp_path: Path) -> None:
    own = deployment(tmp_path)
    write_run(own)
    looking = watcher(tmp_path / "deploy.toml")
    assert looking.look(at=NOW).enrolled == 3
    pki.revoke(own.keys, "east", at=NOW)
    found = looking.look(at=NOW)
    assert found.enrolled == 2
    assert [(n.name, n.last_round) for n in found.nodes if n.revoked] == [("east", 2)]


def test_a_certificate_that_ended(deploy: DeployFile) -> None:
    assert look(deploy, NOW + timedelta(days=366)).certificate_days == pytest.approx(-1.0)


def test_a_folder_of_a_simulation_has_no_names(deploy: DeployFile) -> None:
    write_run(deploy)
    looking = watcher(deploy.folder)
    found = looking.look(at=NOW)
    assert (found.state, found.exit_status, found.round, found.clients) == ("running", 0, 3, 2)
    assert "looks the same" in found.detail
    assert (found.nodes, found.programs, found.certificate_days) == ((), {}, None)
    RunLog(deploy.folder).append({"event": "end"})
    assert looking.look(at=NOW).state == "done"


def test_what_is_neither(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no run folder"):
        watcher(tmp_path)
    (tmp_path / "deploy.toml").write_text("")
    with pytest.raises(ConfigError, match=r"did you mean .*deploy\.toml"):
        watcher(tmp_path)
    with pytest.raises(ConfigError, match="settings: Field required"):
        watcher(tmp_path / "deploy.toml")
    with pytest.raises(ConfigError, match="cannot be read"):
        watcher(tmp_path / "none.toml")


def test_what_may_not_be_read_is_said(deploy: DeployFile) -> None:
    write_run(deploy)
    (deploy.folder / "run-id").unlink()
    (deploy.folder / "run-id").mkdir()  # as root reads any file, a folder in its place
    with pytest.raises(watching.WatchError, match="run-id: cannot be read"):
        look(deploy)


def test_a_run_that_went_back_is_read_anew(deploy: DeployFile) -> None:
    write_run(deploy)
    looking = watcher(deploy.state.parent / "deploy.toml")
    assert looking.look(at=NOW).bytes_up == 6_000_000
    RunLog(deploy.folder).truncate_to(1)
    found = looking.look(at=NOW)
    assert (found.round, found.bytes_up, found.refusals) == (1, 1_000_000, {"other base": 1})
    RunLog(deploy.folder).append({"event": "round", "round": 2, "bytes_up": 5})
    assert looking.look(at=NOW).bytes_up == 1_000_005
    (deploy.folder / "metrics.jsonl").unlink()
    assert looking.look(at=NOW).bytes_up == 0


def test_a_line_that_was_written_and_taken_back_is_forgotten(deploy: DeployFile) -> None:
    """As `RunLog.append` does when the disk refuses: the file may be longer again at the next look."""
    write_run(deploy)
    log, tail = deploy.folder / "metrics.jsonl", Tail(deploy.folder / "metrics.jsonl", Rounds)
    size = log.stat().st_size
    RunLog(deploy.folder).append({"event": "round", "round": 4, "bytes_up": 1})
    assert tail.look().round == 4
    os.truncate(log, size)
    RunLog(deploy.folder).append({"event": "round", "round": 4, "bytes_up": 2, "bytes_down": 1})
    assert (tail.look().closed, tail.look().bytes_up) == (4, 6_000_002)


@pytest.mark.parametrize("make", [Rounds, Steps])
def test_a_log_that_is_cut_at_any_byte(deploy: DeployFile, make: Callable[[], Rounds | Steps]) -> None:
    """Its whole lines count, whether it is read at once or as it grows. Oracle: the lines, split and taken in turn."""
    write_run(deploy)
    journal(deploy, *steps(deploy))
    log = deploy.folder / "metrics.jsonl" if make is Rounds else deploy.state / "logs" / "run.jsonl"
    data, path = log.read_bytes(), deploy.folder / "part"
    ends = [i for i, byte in enumerate(data, 1) if byte == ord("\n")]
    cuts = sorted(
        {0, *range(1, len(data), 97), *(end + beside for end in ends for beside in (-1, 0, 1))} - {len(data) + 1}
    )
    growing: Tail[Any] = Tail(path, make)
    wanted, taken = make(), 0
    for cut in cuts:
        path.write_bytes(data[:cut])
        for line in data.split(b"\n")[taken : data[:cut].count(b"\n")]:
            wanted.take(json.loads(line))
            taken += 1
        assert growing.look() == Tail(path, make).look() == wanted
    assert taken == len(ends)
    assert growing.damaged == 0


def test_lines_that_are_no_events_are_counted(deploy: DeployFile) -> None:
    write_run(deploy)
    before = look(deploy)
    with (deploy.folder / "metrics.jsonl").open("a") as file:
        for line in ("", "[]", "7", '{"event": "round"}', '{"event": "round", "round": Infinity}', "[" * 10**5):
            file.write(line + "\n")
        file.write('{"event": "round", "round": 4, "evaluation": [1], "bytes_up": 9}\n{"event": "new kind"}\n')
    found = look(deploy)
    assert dataclasses.replace(found, problems=()) == before
    assert found.problems == (f"{deploy.folder / 'metrics.jsonl'}: 7 lines cannot be read",)


FILES = (
    *("run/config.toml", "run/metrics.jsonl", "run/run-id", "state/logs/run.jsonl", "state/outcome.json"),
    *("state/programs.json", "state/conductor.pid", "keys/nodes.json", "keys/server.pem", "keys/ca.pem", "run.toml"),
)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Every file of a deployment that status reads."""
    folder = tmp_path_factory.mktemp("whole")
    deploy = deployment(folder)
    write_run(deploy)
    journal(deploy, *steps(deploy))
    serve(deploy, os.getpid())
    end(deploy, "failed", "Traceback (most recent call last):\nKeyError: 'ü'")
    return {name: (folder / name).read_bytes() for name in FILES}


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(parts=st.fixed_dictionaries({name: st.none() | st.floats(0.0, 1.0) for name in FILES}))
def test_whatever_part_of_the_files_is_there(whole: dict[str, bytes], parts: dict[str, float | None]) -> None:
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        fields = {"settings": folder / "run.toml", "folder": folder / "run", "keys": folder / "keys"}
        for name, share in parts.items():
            if share is not None:
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                (folder / name).write_bytes(whole[name][: round(share * len(whole[name]))])
        deploy = DeployFile(**fields, state=folder / "state")
        found = Watcher(deploy.folder, deploy).look(at=NOW)
        assert found.state in watching.STATES
        assert found.exit_status in (0, 1, 3)
        assert found.detail.isprintable()


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(-1, "0 s"), (0.4, "0 s"), (119, "119 s"), (120, "2 min"), (7199, "120 min"), (7200, "2.0 h"), (3e5, "3.5 days")],
)
def test_times_in_words(seconds: float, words: str) -> None:
    assert span(seconds) == words
