"""Whole clients private: every round is charged once, before anybody is asked, whatever dies; and what the log says."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedlora.config import load_config
from fedlora.errors import RoundFailed
from fedlora.privacy.accounting import Event, epsilon
from fedlora.privacy.ledger import BudgetSpent, Key, Ledger, LedgerError, Terms
from fedlora.privacy.statement import statement
from fedlora.provenance import rounds_of, state_digest
from fedlora.report.log import RunLog, read_log
from fedlora.state import Ask, GlobalState, Header
from fedlora.wire import encode_state
from server import checkpoint
from server.holdings import OWNER as HOLDINGS
from server.releases import LEDGER, Releases

Z = 4.0
PRIVATE = (
    "method.name=ffa-lora",
    "rounds.count=3",
    "evaluation.every=1",
    "privacy.level=client",
    f"privacy.noise_multiplier={Z}",
)
DRAWN = ("rounds.fraction=0.5", "rounds.sampling=poisson")
Labs = Callable[..., Any]


def spent(rounds: int, sampling: float = 1.0) -> float:
    return epsilon([Event(noise_multiplier=Z, sampling=sampling, times=rounds)], 1e-5)


def ledger_of(folder: Path, rounds: int = 3, sampling: float = 1.0) -> Ledger:
    terms = Terms(owner="server", unit="client", epsilon=spent(rounds, sampling), delta=1e-5)
    return Ledger.open(folder / LEDGER, terms)


def rows(number: int) -> Key:
    return Key(run="run-1", round=number, release="", part="0")


def test_every_round_is_charged_on_disk_before_anybody_is_asked_and_sealed_with_its_state(
    lab: Labs, fakes: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    here, seen = lab(), set()
    honest = fakes.Client.honest

    def heard(self: Any, header: Header, ask: Ask) -> Any:
        if header.kind != "hello":
            seen.add((header.kind, header.round, (here.folder / LEDGER).read_text().count('"charge"')))
        return honest(self, header, ask)

    monkeypatch.setattr(fakes.Client, "honest", heard)
    here.conduct(*PRIVATE)
    assert seen == {("train", n, n) for n in (1, 2, 3)}  # and nobody scores
    with ledger_of(here.folder) as ledger:
        assert dict(ledger.charges) == {rows(n): Event(noise_multiplier=Z) for n in (1, 2, 3)}
        assert [ledger.sealed(rows(n)) for n in (1, 2, 3)] == [e["state"] for e in here.rounds]
        assert ledger.epsilon() == ledger.terms.epsilon == here.rounds[-1]["privacy"]["epsilon"]
    assert [e["privacy"]["epsilon"] for e in here.rounds] == [spent(n) for n in (1, 2, 3)]


def test_a_seal_is_on_disk_before_the_state_is_scored(lab: Labs) -> None:
    here = lab()

    def score(state: GlobalState) -> dict[str, float]:
        assert state_digest(state) in (here.folder / LEDGER).read_text()
        return {"correct": 1.0, "counted": 2.0, "loss": 3.0, "tokens": 4.0}

    here.conduct(*PRIVATE, evaluator=score)
    assert here.rounds[-1]["evaluation"] == here.rounds[-1]["evaluation"] | {"clients": {}}


def test_the_same_seed_gives_other_noise_and_other_samples(lab: Labs) -> None:
    runs = [lab(ranks=(2,) * 9) for _ in range(2)]
    states = [here.conduct(*PRIVATE, *DRAWN, "rounds.quorum=0.01", "seed=3") for here in runs]
    assert encode_state(states[0]) != encode_state(states[1])
    answers = [[(e["round"], e["client"]) for e in here.notes if e["event"] == "answer"] for here in runs]
    assert answers[0] != answers[1]  # the same once in 2^27 runs
    public = [lab(ranks=(2,) * 9) for _ in range(2)]
    for here in public:
        here.conduct(*PRIVATE, *DRAWN, "privacy.level=none", "privacy.noise_multiplier=none", "rounds.quorum=0.01")
    told = [[[c["id"] for c in e["clients"]] for e in here.rounds] for here in public]
    assert told[0] == told[1]


def test_who_was_drawn_is_nowhere_in_the_log_but_in_what_the_operator_sees(lab: Labs) -> None:
    here = lab()
    here.conduct(*PRIVATE, *DRAWN, "rounds.quorum=0.01")
    start, *rounds = (e for e in read_log(here.folder) if e["event"] in ("start", "round"))
    for event in rounds:
        assert event.keys().isdisjoint({"clients", "missing", "refused", "quarantined", "bytes_up", "bytes_down"})
        assert event.keys().isdisjoint({"evaluation"})
        assert event["aggregate"].keys() == {"update_norm", "rank", "clip"}
        assert "client-0" not in json.dumps(event)
        assert event["privacy"]["sampling"] == 0.5
    assert len(start["clients"]) == 5  # who is enrolled is public
    assert any(e["event"] == "answer" and e["client"].startswith("client-") for e in here.notes)
    assert rounds[-1]["privacy"]["epsilon"] == spent(3, 0.5) < spent(3)
    assert [r.participants for r in rounds_of(read_log(here.folder))] == [None] * 3
    said = statement(read_log(here.folder))
    assert said is not None
    assert "who was drawn is kept from the log" in said


def test_with_everybody_drawn_the_log_has_ids_ranks_and_bytes_alone(lab: Labs) -> None:
    here = lab()
    here.conduct(*PRIVATE)
    for event in here.rounds:
        assert [c["id"] for c in event["clients"]] == [f"client-0000{i}" for i in range(5)]
        assert all(c.keys() == {"id", "rank", "bytes_up", "bytes_down"} for c in event["clients"])
        assert len({c["bytes_up"] for c in event["clients"] if c["rank"] == 2}) == 1
    assert [r.participants for r in rounds_of(read_log(here.folder))] == [5] * 3


def test_who_drops_out_or_is_refused_adds_nothing_and_the_denominator_stands(
    lab: Labs, fakes: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedlora.privacy.noise.Noise.normal", lambda self, shape, sd: np.zeros(shape))
    sets = (*PRIVATE, "rounds.count=1", "privacy.clip=1000", "rounds.clients=5")
    everybody, fewer = lab(ranks=(2,) * 5), lab(ranks=(2,) * 5)
    fewer.clients[1].train = fakes.changed(lambda x: x.update({k: np.full_like(v, np.nan) for k, v in x.items()}))
    alone = lab(ranks=(2,) * 5)
    for i in (0, 2, 3, 4):
        alone.clients[i].train = fakes.changed(lambda x: x.update({k: np.zeros_like(v) for k, v in x.items()}))
    found = [here.conduct(*sets).open_task.pair for here in (everybody, fewer, alone)]
    for name in found[0]:
        np.testing.assert_allclose(found[0][name].b, found[1][name].b + found[2][name].b, atol=1e-6)


class Died(BaseException):
    """A process that ends here."""


def dies(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, *, after: bool, at: int = 2) -> Callable[[], None]:
    """The function dies at its call number `at`, before or after what it does; returns how to heal it."""
    inner, calls = getattr(owner, name), iter(range(1, 1000))

    def mortal(*args: Any, **kwargs: Any) -> Any:
        last = next(calls) == at
        if last and not after:
            raise Died
        found = inner(*args, **kwargs)
        if last:
            raise Died
        return found

    monkeypatch.setattr(owner, name, mortal)
    return lambda: monkeypatch.setattr(owner, name, inner)


def kill(here: Any, monkeypatch: pytest.MonkeyPatch, where: str, *sets: str) -> None:
    """Run until round 2 dies at this step."""
    if where == "before the charge":
        heal = dies(monkeypatch, Releases, "charge", after=False)
    elif where == "charged":
        heal = dies(monkeypatch, Releases, "charge", after=True)
    elif where == "kept":
        heal = dies(monkeypatch, Releases, "seal", after=False)
    elif where == "sealed":
        heal = dies(monkeypatch, Releases, "seal", after=True)
    else:
        heal = dies(monkeypatch, RunLog, "append", after=True, at=3)  # start, round 1, round 2
    with pytest.raises(Died):
        here.conduct(*PRIVATE, *sets)
    heal()


@pytest.mark.parametrize("where", ["before the charge", "charged", "kept", "sealed", "logged"])
@pytest.mark.parametrize("drawn", [(), (*DRAWN, "rounds.quorum=0.01")])
def test_killed_at_any_step_every_round_is_charged_once(
    where: str, drawn: tuple[str, ...], lab: Labs, monkeypatch: pytest.MonkeyPatch
) -> None:
    here, sampling = lab(), 0.5 if drawn else 1.0
    kill(here, monkeypatch, where, *drawn)
    kept = checkpoint.latest(here.folder / "checkpoints" / "released")
    assert kept is not None
    sealed = where in ("sealed", "logged")
    asked = len([e for e in here.notes if e["event"] == "answer"])
    here.conduct(*PRIVATE, *drawn)
    with ledger_of(here.folder, sampling=sampling) as ledger:
        assert set(ledger.charges) == {rows(1), rows(2), rows(3)}
        assert ledger.epsilon() == ledger.terms.epsilon
        assert [ledger.sealed(rows(n)) for n in (1, 2, 3)] == [e["state"] for e in here.rounds]
        reused = ledger.sealed(rows(2)) == state_digest(kept[1])
    assert reused == sealed  # else noise was drawn anew: nothing had left
    again = {e["round"] for e in here.notes[:] if e["event"] == "answer"}
    assert again == {1, 2, 3} or drawn
    if not drawn:
        assert len([e for e in here.notes if e["event"] == "answer"]) - asked == (5 if sealed else 10)
    assert [e["privacy"]["steps"] for e in here.rounds] == [1, 2, 3]


def test_a_sealed_state_is_the_next_rounds_start_byte_for_byte(lab: Labs, monkeypatch: pytest.MonkeyPatch) -> None:
    here = lab()
    kill(here, monkeypatch, "sealed", "privacy.quantile=0.5", "rounds.count=2")
    kept = checkpoint.latest(here.folder / "checkpoints" / "released")
    assert kept is not None
    state = here.conduct(*PRIVATE, "privacy.quantile=0.5", "rounds.count=2")
    assert state.version == kept[1].version == 2
    task, other = state.open_task, kept[1].open_task
    assert task.pair is not None
    assert other.pair is not None
    assert all(np.array_equal(f.b, other.pair[n].b) for n, f in task.pair.items())
    assert np.array_equal(state.memory["private-clients"]["clip"], kept[1].memory["private-clients"]["clip"])


def test_a_lost_state_is_another_release_and_the_budget_ends(lab: Labs, monkeypatch: pytest.MonkeyPatch) -> None:
    here = lab()
    kill(here, monkeypatch, "sealed")
    before = (here.folder / LEDGER).read_text()
    shutil.rmtree(here.folder / "checkpoints" / "released")
    with pytest.raises(RoundFailed, match=r"round 3: .*above the budget of .*plan more noise or fewer rounds"):
        here.conduct(*PRIVATE)
    with ledger_of(here.folder) as ledger:  # round 2 was charged twice, so there is nothing left for round 3
        assert list(ledger.charges) == [rows(1), rows(2), Key(run="run-1", round=2, release="", part="1")]
    assert (here.folder / LEDGER).read_text().startswith(before)


def test_a_spent_budget_changes_neither_ledger_nor_state(lab: Labs, monkeypatch: pytest.MonkeyPatch) -> None:
    here = lab()
    kill(here, monkeypatch, "sealed")
    shutil.rmtree(here.folder / "checkpoints" / "released")
    for _ in range(2):
        with pytest.raises(RoundFailed) as caught:
            here.conduct(*PRIVATE)
        assert isinstance(caught.value.__cause__, BudgetSpent)
        found = checkpoint.latest(here.folder / "checkpoints")
        assert found is not None
        seen = (found[0], encode_state(found[1]), (here.folder / LEDGER).read_bytes())
        asked = len([e for e in here.notes if e["event"] == "answer"])
        with pytest.raises(RoundFailed):
            here.conduct(*PRIVATE)
        found = checkpoint.latest(here.folder / "checkpoints")
        assert found is not None
        assert (found[0], encode_state(found[1]), (here.folder / LEDGER).read_bytes()) == seen
        assert len([e for e in here.notes if e["event"] == "answer"]) == asked  # nobody was asked


def test_a_kept_state_that_is_another_is_not_taken(lab: Labs, monkeypatch: pytest.MonkeyPatch) -> None:
    here = lab()
    kill(here, monkeypatch, "sealed", "rounds.count=4", "privacy.noise_multiplier=none", "privacy.epsilon=50")
    opened = checkpoint.latest(here.folder / "checkpoints")
    assert opened is not None
    checkpoint.save(here.folder / "checkpoints" / "released", 2, opened[1])
    with pytest.raises(RoundFailed):  # four rounds were planned for, and this would be a fifth release
        here.conduct(*PRIVATE, "rounds.count=4", "privacy.noise_multiplier=none", "privacy.epsilon=50")
    text = (here.folder / LEDGER).read_text()
    assert text.count('"part":"1"') == 2  # charged anew, and sealed


def test_a_run_is_not_resumed_without_its_ledger(lab: Labs, monkeypatch: pytest.MonkeyPatch) -> None:
    here = lab()
    kill(here, monkeypatch, "charged")
    (here.folder / LEDGER).unlink()
    with pytest.raises(LedgerError, match="without it what was spent is unknown"):
        here.conduct(*PRIVATE)
    assert not (here.folder / LEDGER).exists()


def test_a_round_below_quorum_is_paid_for_once_and_let_nothing_out(lab: Labs, fakes: Any) -> None:
    here = lab()
    for i in range(4):
        here.clients[i].train = fakes.failing
    for _ in range(2):
        with pytest.raises(RoundFailed, match="the quorum is 3"):
            here.conduct(*PRIVATE)
        with ledger_of(here.folder) as ledger:
            assert list(ledger.charges) == [rows(1)]
            assert ledger.sealed(rows(1)) is None
    for i in range(4):
        here.clients[i].train = None
    here.conduct(*PRIVATE)
    with ledger_of(here.folder) as ledger:
        assert ledger.epsilon() == ledger.terms.epsilon


def test_what_nobody_drawn_costs(lab: Labs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.rounds.drawn", lambda members, config: ())
    here = lab()
    state = here.conduct(*PRIVATE, *DRAWN)
    assert not any(e["event"] == "answer" for e in here.notes)
    assert state.version == 3
    assert state.open_task.pair is not None
    assert all(np.count_nonzero(f.b) == f.b.size for f in state.open_task.pair.values())
    with ledger_of(here.folder, sampling=0.5) as ledger:
        assert len(ledger.charges) == 3


def test_without_client_level_nothing_is_kept(lab: Labs, tmp_path: Path) -> None:
    here = lab()
    here.conduct("rounds.count=1")
    assert not (here.folder / LEDGER).exists()
    releases = Releases(load_config(None, []), tmp_path, "run", begun=True)
    releases.charge(1)
    releases.seal("0" * 64)
    assert (releases.private, releases.hidden, releases.told(), releases.warning()) == (False, False, {}, "")
    assert not releases.out(1, "0" * 64)
    releases.close()


def test_tasks_are_charged_one_by_one(tmp_path: Path) -> None:
    tasks = 'tasks=[{"name": "a"}, {"name": "b", "start": 3}]'
    way = ("continual.method=subspace", "continual.routing=false", tasks)
    releases = Releases(load_config(None, [*PRIVATE, *way]), tmp_path, "run", begun=False)
    for number in range(1, 6):
        releases.charge(number)
        releases.seal(f"{number:064x}")
    terms = Terms(
        owner="server", unit="client", epsilon=epsilon([Event(noise_multiplier=Z, times=6)], 1e-5), delta=1e-5
    )
    releases.close()
    with Ledger.open(tmp_path / LEDGER, terms) as ledger:
        assert [(k.round, k.release) for k in ledger.charges] == [
            (1, "a"), (2, "a"), (3, "a"), (3, "b"), (4, "b"), (5, "b"),
        ]  # fmt: skip
        assert ledger.epsilon() == terms.epsilon


def test_a_promise_that_means_nothing_is_said_so_when_the_run_starts(lab: Labs) -> None:
    here = lab()
    here.conduct(*PRIVATE, "rounds.count=1", "privacy.noise_multiplier=0.1", "privacy.delta=0.2")
    [text] = [e["text"] for e in here.notes if e["event"] == "note"]
    assert "promises next to nothing; use example level" in text
    assert "delta 0.2 is not below 1/5" in text
    assert math.isfinite(here.rounds[0]["privacy"]["epsilon"])


def test_where_sampling_counts_a_round_without_an_answer_is_closed_with_noise_and_not_repeated(lab: Labs) -> None:
    def conducted(*sets: str) -> Any:
        here = lab()

        def hush(event: dict[str, Any]) -> None:
            if event["event"] == "start":
                here.grid.silent = set(here.clients)

        here.conduct(*PRIVATE, *sets, "rounds.quorum=1", "rounds.deadline=0.2", stop=hush)
        return here

    here = conducted(*DRAWN)
    assert [e["round"] for e in here.rounds] == [1, 2, 3]
    assert not any(note["event"] == "retry" for note in here.notes)
    assert len({e["state"] for e in here.rounds}) == 3  # noise moved it each time
    with pytest.raises(RoundFailed, match="quorum"):
        conducted()


def test_what_a_refused_client_said_is_not_in_the_log(lab: Labs, fakes: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    here, honest = lab(), fakes.Client.honest

    def not_finite(self: Any, header: Header, ask: Ask) -> Any:
        answer = honest(self, header, ask)
        if header.kind == "train" and self is here.clients[0]:
            answer = replace(answer, arrays={k: np.full_like(x, np.nan) for k, x in answer.arrays.items()})
        return answer

    monkeypatch.setattr(fakes.Client, "honest", not_finite)
    here.conduct(*PRIVATE, "rounds.quorum=0.5")
    refused = [r for e in here.rounds for r in e["refused"]]
    assert refused
    assert {r["detail"] for r in refused} == {""}
    assert any(note["event"] == "refused" and note["detail"] for note in here.notes)  # the operator's own view


@pytest.mark.parametrize("hidden", [True, False])
def test_where_sampling_counts_the_checkpoints_have_no_word_of_who_was_drawn(lab: Labs, hidden: bool) -> None:
    here = lab()
    here.conduct(*PRIVATE, *(DRAWN if hidden else ()), "rounds.clients=3")
    found = checkpoint.latest(here.folder / "checkpoints")
    assert found is not None
    assert (HOLDINGS in found[1].memory) != hidden  # who holds what was sent
