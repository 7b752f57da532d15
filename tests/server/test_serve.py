"""`fedlora server` without Flower: what it tells of a run, and what is left when it gives up."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from flwr.supercore.inflatable.inflatable_utils import ObjectPushError
from httpx import ConnectError

from fedlora.deploy import DeployFile
from fedlora.errors import CheckpointError, RoundFailed
from fedlora.processes import Died
from fedlora.watching import watcher
from server import deployed
from server import serve as serving
from server.deployed import Outcome, read_outcome, write_outcome
from server.serve import Serving, serve
from tests.watched import NOW, deployment, ids, journal, steps


@pytest.fixture
def deploy(tmp_path: Path) -> DeployFile:
    found = deployment(tmp_path)
    found.state.mkdir(mode=0o700)
    return found


@pytest.fixture
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is checked, started or submitted, and no time passes."""
    for name in ("check", "start", "_note_programs"):
        monkeypatch.setattr(Serving, name, lambda self: None)
    monkeypatch.setattr(Serving, "_listens", lambda self: False)
    monkeypatch.setattr(serving, "_LOOK", 0.0)


def ending(looks: int, error: Exception) -> Callable[[Any], None]:
    """What works some times, and then fails."""
    left = iter(range(looks))

    def look(self: object) -> None:
        if next(left, None) is None:
            raise error

    return look


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (Died("executor ended with status 2, 6 times in ten minutes; its log is x.log"), "executor ended with status"),
        (OSError(28, "No space left on device"), "OSError: [Errno 28] No space left on device. Mend that"),
    ],
)
def test_who_gives_up_says_why(
    deploy: DeployFile, quiet: None, monkeypatch: pytest.MonkeyPatch, error: Exception, words: str
) -> None:
    monkeypatch.setattr("fedlora.processes.Programs.look", ending(2, error))
    with pytest.raises(type(error)):
        serve(deploy, deploy.state.parent / "deploy.toml", notify=lambda event: None)
    found = watcher(deploy.state.parent / "deploy.toml").look(at=NOW)
    assert (found.state, found.exit_status) == ("failed", 1)
    assert found.detail.startswith(f"the server gave up: {words}")
    assert found.detail.endswith(". Mend that and start it again to go on.")
    outcome = read_outcome(deploy)
    assert outcome is not None
    assert outcome.pid == os.getpid()


def test_an_end_that_was_noted_stays(deploy: DeployFile, quiet: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The conductor paused the run, and before the next look a program died once too often."""
    monkeypatch.setattr("fedlora.processes.Programs.look", ending(1, Died("executor")))
    with pytest.raises(Died):
        serve(
            deploy,
            deploy.state.parent / "deploy.toml",
            notify=lambda event: None,
            each=lambda _: write_outcome(deploy, "paused", "round 2: bring them back"),
        )
    assert read_outcome(deploy) == Outcome(state="paused", detail="round 2: bring them back", pid=os.getpid())


def test_what_cannot_be_noted_is_told_and_hides_nothing(
    deploy: DeployFile, quiet: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: object) -> None:
        raise CheckpointError("cannot write outcome.json: No space left on device")

    told: list[dict[str, Any]] = []
    monkeypatch.setattr(serving, "write_outcome", full)
    monkeypatch.setattr("fedlora.processes.Programs.look", ending(0, Died("executor")))
    with pytest.raises(Died, match="executor"):
        serve(deploy, deploy.state.parent / "deploy.toml", notify=told.append)
    assert told == [{"event": "unrecorded", "detail": "cannot write outcome.json: No space left on device"}]


def test_every_round_is_told(deploy: DeployFile, quiet: None, monkeypatch: pytest.MonkeyPatch) -> None:
    who = ids(deploy)
    refused = {"event": "refused", "client": who["west"], "strikes": 0}
    looks = iter(
        [
            steps(deploy)[:3],
            [
                {"event": "round", "round": 4, "clients": 3},
                {"event": "answer", "kind": "measure", "round": 4, "client": who["west"]},
                {"event": "answer", "kind": "train", "round": 4, "client": who["east"]},
                {**refused, "rule": "not finite"},
                {**refused, "rule": "deadline"},
            ],
            [
                {"event": "retry", "round": 4},
                {"event": "answer", "kind": "train", "round": 4, "client": who["east"]},
                {"event": "answer", "kind": "train", "round": 4, "client": who["north"]},
                {**refused, "rule": "deadline"},
                {"event": "closed", "round": 4},
                {"event": "round", "round": 5, "clients": 3},
                *({"event": "answer", "kind": "secure", "round": 5, "client": who[name]} for name in who),
                {"event": "closed", "round": 5},
            ],
        ]
    )
    told: list[dict[str, Any]] = []

    def each(_: Serving) -> None:
        more = next(looks, None)
        if more is None:
            write_outcome(deploy, "done", "/x/adapter")
        else:
            journal(deploy, *more)

    end = serve(deploy, deploy.state.parent / "deploy.toml", notify=told.append, each=each)
    assert end.state == "done"
    assert told == [
        {"event": "waiting", "online": 1, "wanted": 3},
        {"event": "start", "clients": 3, "rounds": 5, "done": 3},
        {"event": "retry", "round": 4},
        {
            "event": "closed",
            "round": "4/5",
            "clients": "2/3",
            "seconds": "4.0",
            "missing": "deadline 2",
            "refused": "not finite 1",
        },
        {"event": "closed", "round": "5/5", "clients": "3/3", "seconds": "4.0"},
    ]
    for secret in (*who.values(), "/x/"):
        assert secret not in json.dumps(told)


def test_rounds_of_earlier_days_are_not_told_again(deploy: DeployFile, monkeypatch: pytest.MonkeyPatch) -> None:
    journal(deploy, *steps(deploy), {"event": "closed", "round": 4})
    told: list[dict[str, Any]] = []
    one = Serving(deploy, deploy.state.parent / "deploy.toml", notify=told.append)
    monkeypatch.setattr(serving, "write_bundle", ending(0, Died("here")))
    with pytest.raises(Died, match="here"):
        one.start()
    one._tell()
    assert told == []


@pytest.mark.parametrize(
    ("error", "state"),
    [
        (ObjectPushError("f0", 1, "a session"), None),
        (ConnectError("refused"), None),
        (RuntimeError("a defect"), "failed"),
        (RoundFailed("too few"), "paused"),
    ],
)
def test_a_lost_superlink_is_no_end_of_the_run(
    deploy: DeployFile, monkeypatch: pytest.MonkeyPatch, error: Exception, state: str | None
) -> None:
    """Then the conductor ends without an outcome, and `fedlora server` submits the run again."""

    def conduct(grid: Any, deploy: DeployFile) -> Path:
        raise error

    monkeypatch.setenv(deployed.VARIABLE, "deploy.toml")
    monkeypatch.setattr(deployed, "end_with_parent", lambda: None)
    monkeypatch.setattr(deployed, "read_deploy", lambda path: deploy)
    monkeypatch.setattr(deployed, "conduct", conduct)
    with contextlib.nullcontext() if state == "paused" else pytest.raises(type(error)):
        deployed.main(None, None)
    outcome = read_outcome(deploy)
    assert (None if outcome is None else outcome.state) == state
