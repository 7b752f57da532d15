"""Every reader of others' bytes accepts or refuses cleanly, and the fuzzer sees it where one does not."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest

from fedlora.errors import WireError
from simulations.benchmarks import fuzz
from simulations.benchmarks.fuzz import Campaign, Tally, attempt, chosen, drawn, several, table, write_failures
from simulations.benchmarks.fuzz_targets import Case, Target, Unsound, size_of, targets

CASES = {  # of the short run; readers of folders are slower
    "wire/peek": 100,
    "wire/ask": 100,
    "wire/answer": 100,
    "wire/state": 100,
    "wire/block": 100,
    "server/admit": 150,
    "server/unpack": 100,
    "server/hello": 100,
    "transport/ask": 150,
    "transport/answer": 150,
    "transport/socket": 150,
    "release/manifest": 150,
    "release/signature": 150,
    "release/folder": 20,
    "pki/folder": 20,
    "pki/private": 100,
    "pki/private-ec": 100,
    "pki/public": 100,
    "pki/public-ec": 200,
    "pki/certificate": 200,
    "disk/sealed": 20,
    "disk/secret": 150,
    "disk/checkpoint": 30,
    "disk/log": 150,
    "disk/memory": 40,
}


@pytest.mark.parametrize("name", CASES)
def test_cases_are_refused_cleanly_or_accepted_as_promised(name: str) -> None:
    tally = several(targets()[name], 0, range(CASES[name]), traced_every=20)
    assert tally.unclean == []
    assert tally.cases == CASES[name]
    assert tally.accepted + tally.refused.total() == tally.cases
    assert min(tally.accepted, tally.refused.total()) > 0  # neither noise alone nor nothing but valid inputs


def test_no_target_is_left_out() -> None:
    assert list(targets()) == list(CASES)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_while_of_the_campaign_is_clean(tmp_path: Path) -> None:
    campaign = Campaign(list(targets()), seed=1)
    campaign.run(20.0)
    write_failures(tmp_path, campaign.tallies, 1)
    assert {name: t.unclean for name, t in campaign.tallies.items() if t.unclean} == {}
    assert all(tally.cases for tally in campaign.tallies.values())


# The fuzzer itself


def planted(read: Callable[[Case], object]) -> Target:
    return Target("planted", lambda rng: {"case": rng.randbytes(9)}, read, (WireError,))


def _raise(error: BaseException) -> object:
    raise error


def _spin(case: Case) -> object:
    while True:
        pass


def _swallow(case: Case) -> object:
    try:
        return _spin(case)
    except Exception:
        return None


@pytest.mark.parametrize(
    ("read", "found"),
    [
        (lambda case: _raise(KeyError("x")), "KeyError: 'x'"),
        (lambda case: _raise(MemoryError()), "MemoryError"),
        (lambda case: _raise(type("Panic", (BaseException,), {})()), "Panic"),
        (lambda case: _raise(WireError("x" * 20_000)), "Unsound: an error of 20,000 characters"),
        (lambda case: _raise(Unsound("accepted")), "Unsound: accepted"),
        (lambda case: bytes(20 * 2**20), "memory: 20,9"),
        (_spin, "hang: more than 0.05 s"),
        (_swallow, "hang: more than 0.05 s"),
    ],
    ids=range(8),
)
def test_what_is_not_clean_is_seen(monkeypatch: pytest.MonkeyPatch, read: Callable[[Case], object], found: str) -> None:
    monkeypatch.setattr(fuzz, "SECONDS", 0.05)
    tally = Tally()
    attempt(planted(read), 0, 7, tally, traced="memory" in found)
    assert tally.cases == 1
    [(index, text)] = tally.unclean
    assert index == 7
    assert text.startswith(found)


def test_what_is_clean_is_counted() -> None:
    tally = several(planted(lambda case: _raise(WireError("short")) if size_of(case) else None), 0, range(5))
    assert (tally.accepted, tally.refused, tally.unclean) == (0, {"WireError": 5}, [])
    assert several(planted(lambda case: None), 0, range(5)).accepted == 5


def test_a_case_is_the_same_whenever_it_is_drawn() -> None:
    for name, target in targets().items():
        one = [drawn(target, 3, index) for index in range(5)]
        assert one == [drawn(target, 3, index) for index in range(5)], name
        assert one != [drawn(target, 4, index) for index in range(5)], name


def test_failures_are_written_with_the_command_that_repeats_them(tmp_path: Path) -> None:
    tallies = {"wire/ask": Tally(unclean=[(n, "KeyError: 'x'\n") for n in range(5)])}
    write_failures(tmp_path, tallies, 9)
    assert {p.name for p in tmp_path.iterdir()} == {"wire-ask-0", "wire-ask-1", "wire-ask-2"}  # of one kind, three
    assert "--target wire/ask --seed 9 --only 1" in (tmp_path / "wire-ask-1" / "why.txt").read_text()
    case = drawn(targets()["wire/ask"], 9, 1)
    assert (tmp_path / "wire-ask-1" / "0.bin").read_bytes() == case["case"]
    assert table(tallies).count("\n") == 3


def test_targets_are_chosen_by_how_their_names_begin() -> None:
    known = ["wire/ask", "wire/state", "server/admit"]
    assert chosen("", known) == known
    assert chosen("wire", known) == known[:2]
    assert chosen("server,wire/state", known) == known[1:]
    with pytest.raises(SystemExit, match="unknown target wires"):
        chosen("wires", known)


def test_mutations_reach_behind_the_digests() -> None:
    """Most refusals of an answer come from after its SHA-256 was right: the mutations put it right again."""
    target, reasons = targets()["wire/answer"], []
    for index in range(300):
        try:
            target.read(target.draw(random.Random(index)))
        except WireError as error:
            reasons.append(str(error))
    early = ("SHA-256", "not JSON", "torn", "not a fedlora", "header of", "follow the end", "not canonical JSON")
    assert sum(any(word in reason for word in early) for reason in reasons) < 0.7 * len(reasons)
    assert len({reason[:20] for reason in reasons}) > 30
