"""The ledger: what it admits and refuses, what it finds damaged, and what a kill at any write leaves of it."""

from __future__ import annotations

import hashlib
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import fedlora.privacy.ledger as under_test
from fedlora.errors import ConfigError
from fedlora.privacy.accounting import Event, gaussian_epsilon
from fedlora.privacy.ledger import BudgetSpent, Key, Ledger, LedgerError, Terms

TERMS = Terms(owner="server", unit="client", epsilon=3.0, delta=1e-5)
EVENT = Event(noise_multiplier=10.0)  # 100 of these come to 4.4
DIGEST = hashlib.sha256(b"what left").hexdigest()


def key(round_: int, release: str = "0", part: str = "") -> Key:
    return Key(run="r1", round=round_, release=release, part=part)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "privacy.jsonl"


def spent(count: int) -> float:
    return gaussian_epsilon(count**0.5 / 10.0, 1e-5)


def test_charges_are_kept_and_add_up(path: Path) -> None:
    with Ledger.open(path, TERMS, create=True) as ledger:
        assert ledger.epsilon() == 0.0
        assert [ledger.charge(key(i), EVENT) for i in range(3)] == [True] * 3
        assert ledger.charge(key(1, part="count"), EVENT)
        head = ledger.head
    with Ledger.open(path, TERMS) as again:
        assert list(again.charges) == [key(0), key(1), key(2), key(1, part="count")]
        assert set(again.charges.values()) == {EVENT}
        assert again.epsilon() == pytest.approx(spent(4))
        assert again.head == head
    assert path.stat().st_mode & 0o777 == 0o600


def test_the_same_charge_again_is_none_and_another_event_is_refused(path: Path) -> None:
    with Ledger.open(path, TERMS, create=True) as ledger:
        assert ledger.charge(key(1), EVENT)
        before = path.read_bytes()
        assert not ledger.charge(key(1), EVENT)
        with pytest.raises(LedgerError, match=r"was charged with .* and now comes with .*; one is wrong"):
            ledger.charge(key(1), Event(noise_multiplier=9.0))
        assert path.read_bytes() == before
    with Ledger.open(path, TERMS) as again:
        assert not again.charge(key(1), EVENT)
        with pytest.raises(LedgerError, match="was charged with"):
            again.charge(key(1), Event(noise_multiplier=10.0, released=False))
        assert again.epsilon() == pytest.approx(spent(1))


def test_a_charge_beyond_the_budget_changes_nothing(path: Path) -> None:
    fits = max(n for n in range(1, 200) if spent(n) <= 3.0)
    with Ledger.open(path, TERMS, create=True) as ledger:
        for task in range(fits):  # one budget for all tasks and runs
            ledger.charge(Key(run=f"r{task % 3}", round=task, release=f"task{task}"), EVENT)
        before, head = path.read_bytes(), ledger.head
        with pytest.raises(BudgetSpent, match=r"would bring epsilon from 2\.9\d+ to 3\.0\d+, above the budget of 3 at"):
            ledger.charge(key(999), EVENT)
        assert (path.read_bytes(), ledger.head, len(ledger.charges)) == (before, head, fits)
        assert not ledger.charge(Key(run="r0", round=0, release="task0"), EVENT)  # what was charged stays good
        assert ledger.charge(key(999), Event(noise_multiplier=1000.0))  # and what fits still fits


def test_a_nodes_own_ledger_of_sampled_steps(path: Path) -> None:
    terms = Terms(owner="node 7", unit="example", epsilon=1.0, delta=1e-5)
    steps = Event(noise_multiplier=1.0, sampling=0.01, times=15)
    with Ledger.open(path, terms, create=True) as ledger:
        for round_ in range(5):
            ledger.charge(key(round_), steps)
        assert 0.0 < ledger.epsilon() < 1.0
        with pytest.raises(BudgetSpent, match="node 7: privacy ledger"):
            ledger.charge(key(9), Event(noise_multiplier=1.0, sampling=0.5, times=15))


def test_only_the_sealed_bytes_may_leave(path: Path) -> None:
    with Ledger.open(path, TERMS, create=True) as ledger:
        with pytest.raises(LedgerError, match="is to be released and was never charged"):
            ledger.seal(key(1), DIGEST)
        ledger.charge(key(1), EVENT)
        assert ledger.sealed(key(1)) is None
        assert ledger.seal(key(1), DIGEST)
        assert not ledger.seal(key(1), DIGEST)
        with pytest.raises(LedgerError, match="64 hexadecimal digits"):
            ledger.seal(key(1), "AB")
    with Ledger.open(path, TERMS) as again:
        assert again.sealed(key(1)) == DIGEST
        with pytest.raises(LedgerError, match="other bytes may have left already"):
            again.seal(key(1), hashlib.sha256(b"new noise").hexdigest())
        assert again.epsilon() == pytest.approx(spent(1))


def test_other_terms_are_refused(path: Path) -> None:
    Ledger.open(path, TERMS, create=True).close()
    for other in ({"epsilon": 30.0}, {"delta": 1e-4}, {"unit": "example"}, {"owner": "x"}):
        with pytest.raises(LedgerError, match=r"it was opened with .* now with"):
            Ledger.open(path, Terms(**{**TERMS.__dict__, **other}), create=True)
    for wrong in ({"epsilon": 0.0}, {"epsilon": float("inf")}, {"delta": 1.0}, {"epsilon": float("nan")}):
        with pytest.raises(ConfigError, match="a budget needs a finite epsilon above 0"):
            Terms(**{**TERMS.__dict__, **wrong})


def test_a_ledger_that_is_gone_is_not_an_empty_one(path: Path) -> None:
    with pytest.raises(LedgerError, match="cannot be opened: No such file or directory; without it what was spent"):
        Ledger.open(path, TERMS)
    assert not path.exists()
    path.touch(0o600)
    with pytest.raises(LedgerError, match="it has no terms"):
        Ledger.open(path, TERMS)


def test_it_is_private_and_held_once(path: Path) -> None:
    with (
        Ledger.open(path, TERMS, create=True),
        pytest.raises(LedgerError, match="another process holds it"),
    ):
        Ledger.open(path, TERMS)
    Ledger.open(path, TERMS).close()
    path.chmod(0o640)
    with pytest.raises(LedgerError, match=r"others may use it \(mode 640\)"):
        Ledger.open(path, TERMS)
    path.chmod(0o600)
    link = path.with_name("link")
    link.symlink_to(path)
    with pytest.raises(LedgerError, match="cannot be opened"):
        Ledger.open(link, TERMS)


def filled(path: Path, count: int = 3) -> list[bytes]:
    with Ledger.open(path, TERMS, create=True) as ledger:
        for i in range(count):
            ledger.charge(key(i), EVENT)
        ledger.seal(key(0), DIGEST)
    return path.read_bytes().splitlines(keepends=True)


@pytest.mark.parametrize(
    ("edit", "line"),
    [
        (lambda lines: [lines[0], *lines[2:]], 2),
        (lambda lines: [lines[0], lines[2], lines[1], *lines[3:]], 2),
        (lambda lines: [*lines[:2], lines[1], *lines[2:]], 3),
        (lambda lines: [*lines[:2], lines[2].replace(b"10.0", b"99.0"), *lines[3:]], 3),
        (lambda lines: [*lines[:2], lines[2].replace(b":", b": ", 1), *lines[3:]], 3),
        (lambda lines: [*lines[:2], b"\x00" * 40 + b"\n", *lines[3:]], 3),
        (lambda lines: [*lines, b"{}\n"], 6),
        (lambda lines: [*lines, lines[0]], 6),
        (lambda lines: lines[1:], 1),
    ],
)
def test_a_broken_chain_is_refused(path: Path, edit: Callable[[list[bytes]], list[bytes]], line: int) -> None:
    path.write_bytes(b"".join(edit(filled(path))))
    with pytest.raises(LedgerError, match=f"line {line} is damaged, or was changed"):
        Ledger.open(path, TERMS, create=True)


def test_a_line_with_a_right_hash_and_a_wrong_body_is_refused(path: Path) -> None:
    filled(path)
    with Ledger.open(path, TERMS) as ledger:
        for body in ({"charge": {"run": "r"}, "event": {}}, {"charge": {}}, {"what": 1}):
            line, _ = ledger._line(body)
            whole = path.read_bytes()
            path.write_bytes(whole + line)
            ledger.close()
            with pytest.raises(LedgerError):
                Ledger.open(path, TERMS)
            path.write_bytes(whole)
            ledger = Ledger.open(path, TERMS)
        ledger.close()


def test_an_end_cut_off_is_seen_by_the_head(path: Path) -> None:
    lines = filled(path)
    with Ledger.open(path, TERMS) as ledger:
        head = ledger.head
        ledger.charge(key(7), EVENT)
        ledger.require(head)  # older ones are still in the chain
        newest = ledger.head
    path.write_bytes(b"".join(lines[:-1]))
    with Ledger.open(path, TERMS) as ledger:
        for gone in (head, newest):
            with pytest.raises(LedgerError, match="is this an old copy"):
                ledger.require(gone)


@pytest.mark.parametrize("cut", [1, 40, -1])
def test_a_torn_line_is_cut_off_and_no_earlier_charge_is_lost(path: Path, cut: int) -> None:
    lines = filled(path)
    path.write_bytes(b"".join(lines[:3]) + lines[3][:cut])
    with Ledger.open(path, TERMS) as ledger:
        assert list(ledger.charges) == [key(0), key(1)]
        assert path.read_bytes() == b"".join(lines[:3])
        assert ledger.charge(key(2), EVENT)
    assert path.read_bytes() == b"".join(lines[:4])


def test_torn_terms_are_begun_anew_but_other_bytes_are_not(path: Path) -> None:
    lines = filled(path)
    path.write_bytes(lines[0][:30])
    with pytest.raises(LedgerError, match="it has no terms"):
        Ledger.open(path, TERMS)
    Ledger.open(path, TERMS, create=True).close()
    assert path.read_bytes() == lines[0]
    path.write_bytes(b"something else")
    with pytest.raises(LedgerError, match="never begun or is damaged"):
        Ledger.open(path, TERMS, create=True)


def test_after_a_failed_write_nothing_is_accepted(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    filled(path)
    ledger = Ledger.open(path, TERMS)

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(under_test.os, "fsync", full)
        with pytest.raises(LedgerError, match="writing failed: No space left on device; nothing may leave"):
            ledger.charge(key(8), EVENT)
    with pytest.raises(LedgerError, match="it is closed, or a write to it failed"):
        ledger.charge(key(9), EVENT)
    assert key(8) not in ledger.charges
    ledger.close()
    with Ledger.open(path, TERMS) as again:  # the line was written: it counts, for safety
        assert key(8) in again.charges
        assert not again.charge(key(8), EVENT)


DISK = ("open", "write", "fsync", "ftruncate")


class Watched:
    """`os` as the ledger uses it, with every call that changes the disk given to `call(name, real, args)`."""

    def __init__(self, call: Callable[[str, Any, tuple[Any, ...]], Any]) -> None:
        self._call = call

    def __getattr__(self, name: str) -> Any:
        real = getattr(os, name)
        return (lambda *args: self._call(name, real, args)) if name in DISK else real


def test_the_disk_has_it_before_the_caller_does(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []

    def note(name: str, real: Any, args: tuple[Any, ...]) -> Any:
        calls.append(name)
        return real(*args)

    monkeypatch.setattr(under_test, "os", Watched(note))
    ledger = Ledger.open(path, TERMS, create=True)
    assert calls == ["open", "write", "fsync", "fsync", "open", "fsync"]  # the last two: the folder
    for act in (lambda: ledger.charge(key(1), EVENT), lambda: ledger.seal(key(1), DIGEST)):
        calls.clear()
        act()
        assert calls == ["write", "fsync"]
    ledger.close()
    calls.clear()
    Ledger.open(path, TERMS).close()  # what another process left unsynced is on disk before anything is said about it
    assert calls == ["open", "fsync", "open", "fsync"]


def work(path: Path, said: int, kill_at: int, cut: int) -> None:
    """In a child: two charges and a seal, and what came back of them told; dead at the `kill_at`-th boundary.

    At the middle of a write `cut` bytes of it are there (negative: counted from its end).
    """
    count = 0

    def here() -> bool:
        nonlocal count
        count += 1
        return count == kill_at

    def dying(name: str, real: Any, args: tuple[Any, ...]) -> Any:
        if here():
            os.kill(os.getpid(), signal.SIGKILL)
        if name == "write" and here():
            real(args[0], bytes(args[1])[:cut])
            os.kill(os.getpid(), signal.SIGKILL)
        out = real(*args)
        if here():
            os.kill(os.getpid(), signal.SIGKILL)
        return out

    under_test.os = Watched(dying)  # type: ignore[assignment]
    ledger = Ledger.open(path, TERMS, create=True)
    for i in (1, 2):
        ledger.charge(key(i), EVENT)
        os.write(said, f"{i}".encode())
    ledger.seal(key(1), DIGEST)
    os.write(said, b"s")


def killed(path: Path, kill_at: int, cut: int) -> tuple[str, bool]:
    """What the child had been told when it died, and whether it died."""
    here, there = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            work(path, there, kill_at, cut)
        finally:
            os._exit(0)
    os.close(there)
    _, status = os.waitpid(child, 0)
    told = os.read(here, 100).decode()
    os.close(here)
    return told, os.WIFSIGNALED(status)


def after_a_kill(path: Path, told: str) -> None:
    """Nothing that was told is lost; doing it all again charges each once."""
    with Ledger.open(path, TERMS, create=True) as ledger:
        for i in (1, 2):
            if str(i) in told:
                assert ledger.charges[key(i)] == EVENT
        if "s" in told:
            assert ledger.sealed(key(1)) == DIGEST
        for i in (1, 2):
            ledger.charge(key(i), EVENT)
        ledger.seal(key(1), DIGEST)
        assert ledger.charges == {key(1): EVENT, key(2): EVENT}
        assert ledger.epsilon() == pytest.approx(spent(2))
    lines = [json.loads(line)["body"] for line in path.read_bytes().splitlines()]
    assert [next(iter(sorted(body))) for body in lines] == ["terms", "charge", "charge", "digest"]


def test_a_kill_at_every_write_boundary(path: Path) -> None:
    boundaries = 1  # the first is before anything
    while True:
        told, died = killed(path, boundaries + 1, cut=25)
        if not died:
            assert told == "12s"
            break
        after_a_kill(path, told)
        path.unlink(missing_ok=True)
        boundaries += 1
    # before and after each of open 2, write 4 (and its middle), fsync 6
    assert boundaries == 2 * (2 + 4 + 6) + 4


def test_a_kill_while_a_torn_line_is_mended(path: Path) -> None:
    lines = filled(path, 1)
    for kill_at in (3, 4):  # around the cut
        path.write_bytes(b"".join(lines[:2]) + lines[2][:9])
        _, died = killed(path, kill_at, cut=1)
        assert died
        with Ledger.open(path, TERMS) as ledger:
            assert ledger.charges == {key(0): EVENT}


@pytest.mark.slow
def test_a_kill_after_every_byte(path: Path) -> None:
    filled(path, 2)
    longest = max(map(len, path.read_bytes().splitlines()))
    path.unlink()
    writes = [4, 15, 20, 25]  # their middles: after open, each of three synced, with folder and file after the first
    kills = 0
    for kill_at in writes:
        for cut in range(0, longest + 2, 3):
            told, died = killed(path, kill_at, cut)
            assert died
            after_a_kill(path, told)
            path.unlink()
            kills += 1
    assert kills > 300
