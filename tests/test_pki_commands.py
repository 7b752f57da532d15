"""`fedlora pki` as a person uses it: what it prints, what it asks, its exit status."""

from __future__ import annotations

import os
import pty
import shutil
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from typer.testing import CliRunner

from fedlora import pki_commands
from fedlora.errors import ConfigError
from fedlora.pki import PkiError, load_certificate, registry, server_names

NOW = datetime.now(UTC).replace(microsecond=0)
HOSTS = ("--name", "localhost", "--address", "127.0.0.1")


def call(*words: str | Path, status: int = 0) -> str:
    """What the command prints; its error, if it has one, is raised."""
    result = CliRunner().invoke(pki_commands.app, [str(w) for w in words], catch_exceptions=False)
    assert result.exit_code == status, result.output
    return result.output


def later(monkeypatch: pytest.MonkeyPatch, days: int) -> None:
    monkeypatch.setattr(pki_commands, "_now", lambda: NOW + timedelta(days=days))


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shared") / "pki"
    call("init", folder, *HOSTS)
    call("node", folder, "north")
    return folder


@pytest.fixture
def own(shared: Path, tmp_path: Path) -> Path:
    return shutil.copytree(shared, tmp_path / "own")


def test_from_nothing_to_a_revoked_node_and_no_secret_on_the_screen(tmp_path: Path) -> None:
    folder = tmp_path / "pki"
    screen = call("init", folder, *HOSTS, "--days", "90")
    assert "good for localhost, 127.0.0.1" in screen
    assert f"until {NOW + timedelta(days=90):%Y-%m-%d}" in screen
    screen += (enrolled := call("node", folder, "north"))
    ident = registry(folder)[0].id
    assert f"id   {ident}" in enrolled
    screen += (shown := call("show", folder))
    for words in ("CA certificate", "localhost, 127.0.0.1", "operator.pub", "enrolled 20", "still in"):
        assert words in shown
    assert any(line.startswith("node") and line.endswith(ident) for line in shown.splitlines())
    screen += call("revoke", folder, "north")
    screen += call("renew", folder)
    screen += (shown := call("show", folder))
    assert "revoked 20" in shown
    assert registry(folder) == ()
    assert "PRIVATE" not in screen
    for key in folder.rglob("*.key"):
        for line in key.read_text().splitlines()[1:-1]:
            assert line[:20] not in screen


def test_a_node_sees_whose_operator_it_has_pinned(tmp_path: Path) -> None:
    folder = tmp_path / "keys"
    call("init", folder, "--name", "fl.example.org")
    made = call("node", folder, "north")
    shown = call("show", folder / "nodes" / "north")
    operator = next(line.split()[-1] for line in call("show", folder).splitlines() if "operator" in line)
    assert [line.split()[-1] for line in shown.splitlines()[:2]] == [
        made.split()[made.split().index("id") + 1],
        operator,
    ]


def test_show_warns_and_then_fails(shared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "warning" not in call("show", shared)
    later(monkeypatch, 340)
    shown = call("show", shared)
    assert "warning: until " in shown
    assert f"fedlora pki renew {shared}" in shown
    later(monkeypatch, 366)
    assert "problem: expired at " in call("show", shared, status=1)


def test_show_fails_on_a_private_file_that_others_can_read(own: Path) -> None:
    (own / "server.key").chmod(0o644)
    assert f"chmod 600 {own / 'server.key'}" in call("show", own, status=1)


def test_renew_after_the_end(own: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    later(monkeypatch, 400)
    call("show", own, status=1)
    os.rename(own / "ca.key", tmp_path / "safe.key")
    with pytest.raises(PkiError, match=r"ca\.key"):
        call("renew", own)
    assert "good for localhost, 127.0.0.1" in call("renew", own, "--ca-key", tmp_path / "safe.key", "--days", "30")
    assert "not here" in call("show", own)
    assert "good for other.org" in call("renew", own, "--ca-key", tmp_path / "safe.key", "--name", "other.org")


def test_without_a_terminal_and_a_name_nothing_is_made(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--name HOST or --address IP"):
        call("init", tmp_path / "pki")
    assert list(tmp_path.iterdir()) == []


def test_at_a_terminal_it_asks(tmp_path: Path) -> None:
    ours, theirs = pty.openpty()
    script = "import sys; from fedlora.pki_commands import app; app(['init', sys.argv[1]])"
    with subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path / "pki")], stdin=theirs, stdout=theirs, stderr=theirs
    ) as asked:
        os.write(ours, b"fl.example.org, localhost\n10.0.0.5\n")
        assert asked.wait(60) == 0, os.read(ours, 10000).decode()
    screen = os.read(ours, 10000).decode()
    os.close(ours)
    os.close(theirs)
    assert screen.index("DNS names") < screen.index("IP addresses") < screen.index("good for")
    found = server_names(load_certificate(tmp_path / "pki" / "server.pem"))
    assert found == (("fl.example.org", "localhost"), ("10.0.0.5",))


def test_the_same_folder_or_name_twice_is_refused(shared: Path) -> None:
    with pytest.raises(PkiError, match="exists already"):
        call("init", shared, *HOSTS)
    with pytest.raises(PkiError, match="enrolled already"):
        call("node", shared, "north")
    with pytest.raises(PkiError, match="enrolled: north"):
        call("revoke", shared, "south")
