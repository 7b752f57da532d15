"""A client with private rows: what it refuses, and that nothing is trained with fresh noise for free, whatever dies."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from clients import answer as answering
from clients import private
from clients.answer import Client, answer
from clients.memory import Memory
from clients.private import LEDGER, Budget, open_ledger
from fedlora.code import code_digest
from fedlora.config import RunConfig, load_config
from fedlora.errors import FedLoRAError, TrainingError
from fedlora.privacy.accounting import Event, Privacy, epsilon
from fedlora.privacy.ledger import Ledger, Terms
from fedlora.state import Answer, Ask, Header, Layout, LocalTraining, Measure, Module, Secure, TrainPlan
from fedlora.wire import decode_answer, encode_ask

BASE = "b" * 64
LAYOUT = Layout(modules={"q": Module(out=4, inp=4)})
TRAINING = LocalTraining(learning_rate=1e-3, local_steps=3, local_epochs=None, batch_size=1)
PRIVACY = Privacy(clip=1.0, noise_multiplier=2.0, sampling=1.0, expected=10.0)
PLAN = TrainPlan(
    method="ffa-lora", rank=2, rows=2, scale=1.0, train=("B",), send=("B",), training=TRAINING, privacy=PRIVACY
)
ASK = Header(run="run", round=1, client="client-00001", kind="train", base=BASE, version=4, code=code_digest())
SETTINGS = ("privacy.level=example", "privacy.rows=10", "privacy.sampling=1", "data.holdout=0")
ROUND = Event(noise_multiplier=2.0, times=3)


def of_rounds(count: int) -> float:
    return epsilon([replace(ROUND, times=3 * count)], 1e-5)


def settings(budget: float) -> RunConfig:
    return load_config(None, [*SETTINGS, f"privacy.epsilon={budget!r}"])


Trainer = Callable[[Header, Ask], Answer]


class Played:
    """A client whose training is a number that never comes twice, and what it was asked."""

    def __init__(
        self, monkeypatch: pytest.MonkeyPatch, root: Path | None, config: RunConfig, own: Budget | None = None
    ):
        self.trained: list[Header] = []
        self.fails: FedLoRAError | None = None
        base: Any = SimpleNamespace(fingerprint=BASE, layout=LAYOUT, initial_head={})
        monkeypatch.setattr(answering, "train_client", self._train)
        self.client = Client(
            id=ASK.client, rank=2, config=config, base=lambda: base, rows=lambda task: ([], []), memory=root, budget=own
        )

    def _train(self, base: Any, header: Header, ask: Ask, rows: Any, **kwargs: Any) -> Answer:
        if self.fails is not None:
            raise self.fails
        self.trained.append(header)
        noise = np.full((4, 2), len(self.trained), np.float32)
        return Answer(examples=10, metrics={"steps": 3.0}, arrays={"B:q": noise})

    def bytes_for(self, header: Header = ASK, plan: TrainPlan | None = PLAN, **fields: Any) -> bytes:
        return answer(self.client, encode_ask(header, Ask(plan=plan, **fields)))

    def said(self, header: Header = ASK, plan: TrainPlan | None = PLAN, **fields: Any) -> tuple[Header, Answer]:
        return decode_answer(self.bytes_for(header, plan, **fields), max_bytes=10**6)

    def error(self, header: Header = ASK, plan: TrainPlan | None = PLAN, **fields: Any) -> tuple[str, str]:
        told, said = self.said(header, plan, **fields)
        assert told.kind == "error"
        return said.info["error"], said.info["message"]

    def ledger(self) -> Ledger:
        assert self.client.memory is not None
        return open_ledger(self.client.memory, self.client.id, self.client.config, self.client.budget)


@pytest.fixture
def played(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Played:
    return Played(monkeypatch, tmp_path, settings(of_rounds(2)))


def test_an_answer_is_charged_and_sealed_with_the_hash_of_its_bytes(played: Played) -> None:
    data = played.bytes_for()
    with played.ledger() as ledger:
        [(key, event)] = ledger.charges.items()
        assert event == ROUND
        assert ledger.sealed(key) == hashlib.sha256(data).hexdigest()
        assert ledger.terms.epsilon == of_rounds(2)


def test_the_charge_is_on_disk_before_anything_is_trained(
    played: Played, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    seen: list[int] = []
    inner = played._train

    def train(*args: Any, **kwargs: Any) -> Answer:
        seen.append((tmp_path / ASK.client / LEDGER).read_text().count('"charge"'))
        return inner(*args, **kwargs)

    monkeypatch.setattr(answering, "train_client", train)
    played.bytes_for()
    assert seen == [1]


def test_a_repeated_ask_and_a_repeated_round_get_the_first_update_at_no_charge(played: Played) -> None:
    first = played.bytes_for()
    assert played.bytes_for() == first
    header, again = played.said(replace(ASK, attempt=1))
    assert header == replace(ASK, attempt=1)
    assert np.array_equal(again.arrays["B:q"], decode_answer(first, max_bytes=10**6)[1].arrays["B:q"])
    assert len(played.trained) == 1
    with played.ledger() as ledger:
        assert len(ledger.charges) == 1


def test_the_first_ask_that_arrives_may_be_a_second_attempt(played: Played) -> None:
    header, said = played.said(replace(ASK, attempt=1))
    assert header.attempt == 1
    assert np.array_equal(played.said()[1].arrays["B:q"], said.arrays["B:q"])
    assert len(played.trained) == 1


def test_another_ask_of_the_same_round_is_another_release_and_the_budget_ends(played: Played) -> None:
    played.bytes_for()
    played.bytes_for(plan=replace(PLAN, seed=1))
    before = played.ledger()
    head = before.head
    before.close()
    kind, message = played.error(plan=replace(PLAN, seed=2))
    assert kind == "BudgetSpent"
    assert "above the budget" in message
    assert played.error(replace(ASK, round=2))[0] == "BudgetSpent"
    assert len(played.trained) == 2
    with played.ledger() as ledger:
        assert ledger.head == head  # a refused charge changes nothing


def test_one_budget_for_all_runs(played: Played) -> None:
    played.bytes_for()
    played.bytes_for(replace(ASK, run="another"))
    assert played.error(replace(ASK, run="a third"))[0] == "BudgetSpent"


def test_the_owners_terms_go_before_the_runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    played = Played(monkeypatch, tmp_path, settings(1e3), Budget(epsilon=of_rounds(1), delta=1e-5))
    played.bytes_for()
    assert played.error(replace(ASK, round=2))[0] == "BudgetSpent"


def test_killed_before_the_answer_is_kept_the_same_charge_holds(
    played: Played, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as broken:
        broken.setattr(Memory, "remember", _die)
        with pytest.raises(KeyboardInterrupt):
            played.bytes_for()
    played.bytes_for()
    assert len(played.trained) == 2  # nothing of the first had left
    with played.ledger() as ledger:
        assert len(ledger.charges) == 1


def test_killed_before_the_seal_the_kept_answer_is_sealed_later(
    played: Played, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as broken:
        broken.setattr(Ledger, "seal", _die)
        with pytest.raises(KeyboardInterrupt):
            played.bytes_for()
    data = played.bytes_for()
    assert len(played.trained) == 1
    with played.ledger() as ledger:
        [key] = ledger.charges
        assert ledger.sealed(key) == hashlib.sha256(data).hexdigest()


def test_a_sealed_answer_that_is_lost_costs_another_charge(played: Played, tmp_path: Path) -> None:
    first = played.bytes_for()
    kept = tmp_path / "run" / ASK.client / "answer"
    kept.unlink()
    assert played.bytes_for() != first
    with played.ledger() as ledger:
        assert len(ledger.charges) == 2
    kept.unlink()
    assert played.error()[0] == "BudgetSpent"
    assert len(played.trained) == 2


def test_a_lost_ledger_is_no_empty_one(played: Played, tmp_path: Path) -> None:
    played.bytes_for()
    (tmp_path / ASK.client / LEDGER).unlink()
    kind, message = played.error(replace(ASK, round=2))
    assert kind == "LedgerError"
    assert "Bring it back" in message
    assert played.error()[0] == "LedgerError"  # nor does the kept answer leave without one


def test_a_first_folder_is_made_whole(played: Played, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with monkeypatch.context() as broken:
        broken.setattr(Path, "rename", _die)
        with pytest.raises(KeyboardInterrupt):
            played.bytes_for()
    assert not (tmp_path / ASK.client).exists()
    played.bytes_for()
    assert len(played.trained) == 1


@pytest.mark.parametrize("own", [None, Budget(epsilon=8.0, delta=1e-5)])
def test_what_would_tell_of_rows_is_refused(
    own: Budget | None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    config = settings(8.0) if own is None else load_config(None, [])
    played = Played(monkeypatch, tmp_path, config, own)
    rule = "privacy.level is example" if own is None else "limits.epsilon is set"
    for header, plan, fields in (
        (replace(ASK, kind="evaluate"), None, {}),
        (replace(ASK, kind="measure"), None, {"measure": Measure(sketch=2)}),
        (replace(ASK, kind="evaluate"), None, {"secure": Secure(stage="mask")}),
        (ASK, replace(PLAN, privacy=None), {}),
        (ASK, replace(PLAN, training=replace(TRAINING, local_steps=None, local_epochs=1.0)), {}),
    ):
        kind, message = played.error(header, plan, **fields)
        assert kind == "NotPrivate"
        assert rule in message
    assert played.trained == []
    assert not (tmp_path / ASK.client).exists()


def test_a_private_plan_needs_a_promise_and_a_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert "set limits.epsilon" in Played(monkeypatch, tmp_path, load_config(None, [])).error()[1]
    assert "FEDLORA_MEMORY" in Played(monkeypatch, None, settings(8.0)).error()[1]


def test_why_private_training_failed_stays_here(played: Played, caplog: pytest.LogCaptureFixture) -> None:
    played.fails = TrainingError("3 of 40 rows have no answer token")
    kind, message = played.error()
    assert kind == "TrainingError"
    assert "40" not in message
    assert "3 of 40 rows" in caplog.text


def test_a_lossy_codec_answers_a_second_attempt_with_what_it_said_first(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    played, coded = Played(monkeypatch, tmp_path, settings(8.0)), replace(PLAN, codec="int8", changes=("B",))
    first, again = played.said(plan=coded)[1], played.said(replace(ASK, attempt=2), coded)[1]
    assert np.array_equal(first.arrays["B:q"], again.arrays["B:q"])
    assert len(played.trained) == 1


def test_the_terms_of_a_ledger_are_for_good(played: Played, tmp_path: Path) -> None:
    played.bytes_for()
    folder = private.folder_name(ASK.client)
    terms = Terms(owner=ASK.client, unit="example", epsilon=99.0, delta=1e-5)
    with pytest.raises(private.FedLoRAError, match="it was opened with"):
        Ledger.open(tmp_path / folder / LEDGER, terms)


def _die(*args: Any, **kwargs: Any) -> None:
    raise KeyboardInterrupt
