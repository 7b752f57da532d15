"""A run with private rows: every ask carries the same noise, clients score nothing, and the log says what is spent."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from fedlora.errors import RoundFailed
from fedlora.privacy.accounting import RELATION, Event, Privacy, epsilon, noise_multiplier
from fedlora.privacy.statement import statement
from fedlora.report.log import read_log
from fedlora.state import Answer, Ask, Header
from fedlora.wire import encode_answer
from server import checkpoint
from server.private import OWNER

SETS = ("method.name=ffa-lora", "training.local_steps=3", "evaluation.every=1", "data.holdout=0")
PRIVATE = (*SETS, "privacy.level=example", "privacy.epsilon=8", "privacy.rows=100", "privacy.sampling=1")
Z = noise_multiplier(8.0, 1e-5, sampling=1.0, times=6)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch, fakes: Any) -> list[tuple[Header, Ask]]:
    """All asks that reached a client, but hellos."""
    seen: list[tuple[Header, Ask]] = []
    honest = fakes.Client.honest

    def heard(self: Any, header: Header, ask: Ask) -> Any:
        seen.extend([(header, ask)] if header.kind != "hello" else [])
        return honest(self, header, ask)

    monkeypatch.setattr(fakes.Client, "honest", heard)
    return seen


def of(steps: int) -> float:
    return epsilon([Event(noise_multiplier=Z, times=steps)], 1e-5)


def test_every_ask_is_to_train_with_the_resolved_noise(
    lab: Callable[..., Any], asked: list[tuple[Header, Ask]]
) -> None:
    here = lab()
    here.conduct(*PRIVATE)
    assert {header.kind for header, _ in asked} == {"train"}
    told = {ask.plan.privacy for _, ask in asked if ask.plan is not None}
    assert told == {Privacy(clip=1.0, noise_multiplier=Z, sampling=1.0, expected=100.0)}
    assert [e["privacy"]["epsilon"] for e in here.rounds] == [of(3), of(6)]
    assert of(6) <= 8.0
    last = here.rounds[-1]["privacy"]
    assert last == last | {"unit": "example", "relation": RELATION, "delta": 1e-5, "noise_multiplier": Z, "clip": 1.0}
    assert last["sampling"] == 1.0
    assert not any("evaluation" in e for e in here.rounds)


@pytest.mark.parametrize(
    ("sets", "said"),
    [
        (
            (*PRIVATE, "privacy.epsilon=none", "privacy.noise_multiplier=0.1"),
            "100 rows, example level: epsilon .* next",
        ),
        ((*SETS, "privacy.level=client", "privacy.noise_multiplier=0.1"), "clients, client level: epsilon .* next"),
        (PRIVATE, ""),
    ],
)
def test_a_promise_that_means_nothing_is_said_to_mean_nothing_at_the_start(
    lab: Callable[..., Any], sets: tuple[str, ...], said: str
) -> None:
    here = lab()
    here.conduct(*sets)
    notes = [event["text"] for event in here.notes if event["event"] == "note"]
    assert bool(notes) == bool(said)
    assert re.search(said, "".join(notes))


def test_the_server_scores_rows_of_its_own(lab: Callable[..., Any], asked: list[tuple[Header, Ask]]) -> None:
    here = lab()
    here.conduct(*PRIVATE, evaluator=lambda state: {"correct": 1.0, "counted": 2.0, "loss": 3.0, "tokens": 4.0})
    assert {header.kind for header, _ in asked} == {"train"}
    assert here.rounds[-1]["evaluation"]["server"]["score"] == 0.5
    assert here.rounds[-1]["evaluation"]["clients"] == {}


def test_without_privacy_nothing_changes(lab: Callable[..., Any], asked: list[tuple[Header, Ask]]) -> None:
    here = lab()
    state = here.conduct(*SETS)
    assert {header.kind for header, _ in asked} == {"train", "evaluate"}
    assert all(ask.plan is None or ask.plan.privacy is None for _, ask in asked)
    assert OWNER not in state.memory
    assert not any("privacy" in e for e in here.rounds)
    assert statement(read_log(here.folder)) is None


def test_noise_and_count_survive_a_crash(
    lab: Callable[..., Any], asked: list[tuple[Header, Ask]], monkeypatch: pytest.MonkeyPatch
) -> None:
    here = lab()

    def stop(event: dict[str, Any]) -> None:
        if event["event"] == "round" and event["round"] == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        here.conduct(*PRIVATE, stop=stop)
    [found] = [checkpoint.latest(here.folder / "checkpoints", key=None)]
    assert found is not None
    assert found[1].memory[OWNER]["noise_multiplier"] == np.array([Z])
    monkeypatch.setattr("fedlora.privacy.budget.noise_multiplier", lambda *a, **k: 99.0)  # another accountant
    here.conduct(*PRIVATE)
    assert {ask.plan.privacy.noise_multiplier for _, ask in asked if ask.plan and ask.plan.privacy} == {Z}
    assert [e["privacy"]["steps"] for e in here.rounds] == [3, 6]


def test_a_repeated_round_asks_the_same_again_and_counts_once(
    lab: Callable[..., Any], fakes: Any, asked: list[tuple[Header, Ask]]
) -> None:
    here = lab()
    for client in here.clients.values():
        client.train = _only_later
    here.conduct(
        *PRIVATE, "rounds.count=1", "rounds.retries=1", "privacy.epsilon=none", f"privacy.noise_multiplier={Z!r}"
    )
    assert here.rounds[0]["privacy"]["steps"] == 3
    first, again = ([ask.plan for header, ask in asked if header.attempt == n] for n in (0, 1))
    assert first == []
    assert len(again) == 5


def test_a_spent_budget_is_a_refusal_that_counts_no_strike(lab: Callable[..., Any], fakes: Any) -> None:
    here = lab()
    here.clients[2].train = _spent
    here.conduct(*PRIVATE, "rounds.quarantine=1")
    for number in (1, 2):
        assert [rule for _, rule, _ in here.refusals(number)] == ["BudgetSpent"]
    for client in here.clients.values():
        client.train = _spent
    again = lab(clients=here.clients)
    with pytest.raises(RoundFailed, match="BudgetSpent: client x: budget"):
        again.conduct(*PRIVATE)


def test_the_statement_names_unit_relation_accountant_and_who_adds_the_noise(lab: Callable[..., Any]) -> None:
    here = lab()
    here.conduct(*PRIVATE)
    said = statement(read_log(here.folder))
    assert said is not None
    for part in (
        "unit: example",
        f"relation: {RELATION}",
        f"epsilon {of(6):.4g} at delta 1e-05",
        "dp-accounting PLD",
        "6 steps",
        "each client, locally, before anything leaves it",
    ):
        assert part in said
    assert json.dumps(said).isascii()


def _only_later(client: Any, header: Header, ask: Ask) -> bytes:
    if header.attempt == 0:
        info = {"error": "TrainingError", "message": "not yet"}
        return encode_answer(replace(header, kind="error"), Answer(info=info))
    return encode_answer(header, client.honest(header, ask))


def _spent(client: Any, header: Header, ask: Ask) -> bytes:

    info = {"error": "BudgetSpent", "message": "client x: budget"}
    return encode_answer(replace(header, kind="error"), Answer(info=info))
