"""A client that adds noise of its own to secure sums: what it charges and refuses, whatever the server says."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from clients import answer as answering
from clients import sums
from clients.answer import Client, answer
from clients.private import LEDGER, Budget, open_ledger
from fedlora.code import code_digest
from fedlora.config import MethodConfig, RunConfig, SecureConfig, load_config
from fedlora.privacy.accounting import Event, Privacy, epsilon
from fedlora.privacy.clients import ClientPrivacy, client_privacy
from fedlora.shared_settings import merged, shared_settings
from fedlora.state import Answer, Ask, Header, Layout, LocalTraining, Measure, Module, TrainPlan, expected_arrays
from fedlora.wire import decode_answer, encode_ask
from strategies.base import Closed, Cohort, Member, SumSession, get
from strategies.secured import secured

BASE = "b" * 64
LAYOUT = Layout(modules={"q": Module(out=6, inp=8)})
TRAINING = LocalTraining(learning_rate=1e-3, local_steps=1, local_epochs=None, batch_size=1)
SETS = (
    "method.name=ffa-lora",
    "rounds.clients=4",
    "rounds.count=3",
    "secure.on=true",
    "privacy.level=client",
    "privacy.noise=clients",
    "privacy.noise_multiplier=2",
)
CONFIG = load_config(None, SETS)
ROUND = Event(noise_multiplier=2.0)


def of_rounds(count: int) -> float:
    return epsilon([replace(ROUND, times=count)], 1e-5)


@dataclass
class Party:
    """One client behind `clients.answer`, with a trainer that looks at its ledger."""

    client: Client
    key: Ed25519PrivateKey
    charged: list[int] = field(default_factory=list)  # lines in the ledger when it trained

    @property
    def member(self) -> Member:
        return Member(id=self.client.id, rank=2, scale=2.0, key=self.key.public_key().public_bytes_raw())

    @property
    def ledger(self) -> Path:
        assert self.client.memory is not None
        return self.client.memory / f"{self.client.id}.whole" / LEDGER

    def events(self) -> list[tuple[str, Event]]:
        assert self.client.memory is not None
        with open_ledger(self.client.memory, self.client.id, self.client.config, self.client.budget) as ledger:
            return [(f"{k.run}/{k.round}/{k.release}", event) for k, event in ledger.charges.items()]

    def said(self, ask: Ask, round_: int = 1, **fields: Any) -> Answer:
        header = Header(run="run", round=round_, client=self.client.id, kind="secure", base=BASE, code=code_digest())
        data = answer(self.client, encode_ask(replace(header, **fields), ask))
        return decode_answer(data, max_bytes=10**6)[1]


@pytest.fixture
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., list[Party]]]:
    found: dict[str, Party] = {}

    def train(base: Any, header: Header, ask: Ask, rows: Any, **kwargs: Any) -> Answer:
        party = found[header.client]
        party.charged.append(party.ledger.read_text().count('"charge"') if party.ledger.exists() else 0)
        shapes = expected_arrays(replace(ask, secure=None, message=b""), LAYOUT)
        return Answer(examples=3, arrays={k: np.ones(s, np.float32) for k, s in shapes.items()})

    def parties(config: RunConfig = CONFIG, budget: Budget | None = None, *, memory: bool = True) -> list[Party]:
        monkeypatch.setattr(answering, "train_client", train)
        base: Any = SimpleNamespace(fingerprint=BASE, layout=LAYOUT, initial_head={})
        for i in range(4):
            key, name = Ed25519PrivateKey.generate(), f"client-{i}"
            client = Client(
                id=name, rank=2, config=config, base=lambda: base, rows=lambda task: ([], []),
                memory=tmp_path if memory else None, budget=budget, key=lambda key=key: key,
            )  # fmt: skip
            found[name] = Party(client, key)
        return list(found.values())

    yield parties
    sums._SESSIONS.clear()


def played(
    parties: list[Party],
    number: int = 1,
    *,
    attempt: int | None = None,
    edit: Callable[[Ask], Ask] = lambda ask: ask,
    terms: ClientPrivacy | None = None,
    until: str = "",
) -> tuple[Closed | None, list[Answer]]:
    """One round; stops at the first refusal. Returns how it closed, and what was refused."""
    terms = client_privacy(CONFIG) if terms is None else terms
    members = [p.member for p in parties]
    state = get("ffa-lora").open(BASE, LAYOUT, members, MethodConfig(), 7)
    cohort = Cohort(
        round=number, rounds=3, members=tuple(members), settings=MethodConfig(), training=TRAINING, seed=5,
        progress=(0.0, 1.0), session=SumSession(run="run", round=number, attempt=attempt or number),
    )  # fmt: skip
    protocol = secured(get("ffa-lora"), SecureConfig(on=True), terms).protocol(state, cohort)
    asks = next(protocol)
    while True:
        if any(ask.secure is not None and ask.secure.stage == until for ask in asks.values()):
            return None, []
        answers = {p.client.id: p.said(edit(asks[p.client.id]), number) for p in parties}
        if refused := [a for a in answers.values() if a.info]:
            return None, refused
        try:
            asks = protocol.send(answers)
        except StopIteration as end:
            return end.value, []


def test_each_round_is_charged_once_before_training_and_the_budget_is_what_the_run_promised(
    make: Callable[..., list[Party]],
) -> None:
    parties = make()
    for number in (1, 2, 3):
        closed, _ = played(parties, number)
        assert closed is not None
        assert closed.report["summed"] == 4.0
    for party in parties:
        assert party.charged == [1, 2, 3]
        names, events = zip(*party.events(), strict=True)
        assert names == ("run/1/whole", "run/2/whole", "run/3/whole")
        assert all(2.0 <= e.noise_multiplier < 2.0 * (1 + 1e-8) and e.sampling == 1.0 for e in events)
        assert 0.999999 * of_rounds(3) < epsilon(events, 1e-5) <= of_rounds(3)
    _, refused = played(parties, 4)
    assert {a.info["error"] for a in refused} == {"BudgetSpent"}
    assert all(len(p.charged) == 3 for p in parties)


def test_a_repeated_attempt_trains_and_charges_once(make: Callable[..., list[Party]]) -> None:
    parties = make()
    played(parties, until="mask")
    closed, _ = played(parties, attempt=2)
    assert closed is not None
    assert all(p.charged == [1] and len(p.events()) == 1 for p in parties)


def test_a_process_that_ended_pays_no_second_time_for_the_same_round(make: Callable[..., list[Party]]) -> None:
    parties = make()
    played(parties, until="mask")
    sums._SESSIONS.clear()
    assert played(parties, attempt=2)[0] is not None
    assert all(p.charged == [1, 1] and len(p.events()) == 1 for p in parties)


def test_an_attempt_with_other_noise_than_was_charged_is_refused(make: Callable[..., list[Party]]) -> None:
    parties, terms = make(), client_privacy(CONFIG)
    assert terms is not None
    played(parties, until="share")
    for noise in (1.0, 3.0):
        _, refused = played(parties, attempt=2, terms=replace(terms, noise_multiplier=noise))
        assert {a.info["error"] for a in refused} == {"LedgerError"}
        assert "now comes with" in refused[0].info["message"]
    assert all(p.charged == [1] for p in parties)


def test_less_noise_than_promised_passes_the_budget(make: Callable[..., list[Party]]) -> None:
    parties, terms = make(), client_privacy(CONFIG)
    assert terms is not None
    _, refused = played(parties, terms=replace(terms, noise_multiplier=1.0))
    assert {a.info["error"] for a in refused} == {"BudgetSpent"}
    assert all(p.charged == [] and p.events() == [] for p in parties)


def test_fewer_parties_than_are_sure_cost_more_than_was_planned(make: Callable[..., list[Party]]) -> None:
    """Shares of a sum of four, in a sum that three may open: sqrt(3/4) of the noise."""
    parties, terms = make(), client_privacy(CONFIG)
    assert terms is not None
    short = replace(terms, parties=4)
    for number in (1, 2):
        assert played(parties, number, terms=short, until="share") == (None, [])
    for party in parties:
        assert [event.noise_multiplier for _, event in party.events()] == pytest.approx([2.0 * (3 / 4) ** 0.5] * 2)
    assert {a.info["error"] for a in played(parties, 3, terms=short)[1]} == {"BudgetSpent"}


@pytest.mark.parametrize("budget", [None, Budget(epsilon=50.0, delta=1e-5, unit="client")])
def test_the_owners_budget_goes_before_the_runs(budget: Budget | None, make: Callable[..., list[Party]]) -> None:
    plain = load_config(None, ["method.name=ffa-lora"]) if budget else CONFIG  # an owner's holds whatever a run says
    parties = make(plain, budget)
    assert played(parties)[0] is not None
    assert all(p.charged == [1] for p in parties)


def test_one_budget_for_all_runs(make: Callable[..., list[Party]]) -> None:
    parties = make(CONFIG, Budget(epsilon=of_rounds(2), delta=1e-5, unit="client"))
    for number in (1, 2):
        assert played(parties, number)[0] is not None
    assert {a.info["error"] for a in played(parties, 3)[1]} == {"BudgetSpent"}


def test_an_owner_whose_unit_is_the_client_lets_nothing_else_out(make: Callable[..., list[Party]]) -> None:
    party = make(CONFIG, Budget(epsilon=8.0, delta=1e-5, unit="client"))[0]
    plan = TrainPlan(
        method="ffa-lora", rank=2, rows=2, scale=1.0, train=("B",), send=("B",), training=TRAINING,
        privacy=Privacy(clip=1.0, noise_multiplier=50.0, sampling=1.0, expected=10.0),
    )  # fmt: skip
    for kind, ask in (
        ("train", Ask(plan=replace(plan, privacy=None))),
        ("train", Ask(plan=plan)),
        ("evaluate", Ask()),
        ("measure", Ask(measure=Measure(sketch=2))),
    ):
        said = party.said(ask, kind=kind)
        assert said.info["error"] == "NotPrivate"
        assert "limits.unit is client" in said.info["message"]
        assert "privacy.noise=clients and secure.on=true" in said.info["message"]
    assert party.charged == []
    assert not party.ledger.exists()


def without_whole(ask: Ask) -> Ask:
    return replace(ask, secure=replace(ask.secure, whole=None))  # type: ignore[type-var]


def with_whole(**fields: Any) -> Callable[[Ask], Ask]:
    def edit(ask: Ask) -> Ask:
        assert ask.secure is not None
        assert ask.secure.whole is not None
        return replace(ask, secure=replace(ask.secure, whole=replace(ask.secure.whole, **fields)))

    return edit


@pytest.mark.parametrize(
    ("edit", "error"),
    [
        (without_whole, "NotPrivate"),
        (with_whole(noise=0.0), "ConfigError"),
        (with_whole(noise=1e-3), "Refused"),  # of another grid; on its own one it passes the budget
        (with_whole(noise=1e30), "Refused"),
        (with_whole(clip=0.0), "ConfigError"),
        (with_whole(counted=True), "ConfigError"),
    ],
)
def test_a_sum_without_noise_of_its_own_is_refused(
    edit: Callable[[Ask], Ask], error: str, make: Callable[..., list[Party]]
) -> None:
    parties = make(CONFIG, Budget(epsilon=50.0, delta=1e-5, unit="client"))
    _, refused = played(parties, edit=edit)
    assert {a.info["error"] for a in refused} == {error}
    assert all(p.charged == [] for p in parties)
    assert not parties[0].ledger.exists() or parties[0].events() == []


def test_where_the_server_adds_the_noise_a_client_keeps_no_books(make: Callable[..., list[Party]]) -> None:
    trusting = load_config(None, [s for s in SETS if s != "privacy.noise=clients"])
    parties = make(trusting)
    assert played(parties, terms=client_privacy(trusting))[0] is not None
    assert all(p.charged == [0] and not p.ledger.exists() for p in parties)


def test_an_owner_of_single_rows_joins_no_sum_of_whole_clients(make: Callable[..., list[Party]]) -> None:
    _, refused = played(make(CONFIG, Budget(epsilon=8.0, delta=1e-5)))
    assert {a.info["error"] for a in refused} == {"NotPrivate"}


def test_rows_and_the_client_have_ledgers_of_their_own(make: Callable[..., list[Party]], tmp_path: Path) -> None:
    played(make())
    rows = load_config(None, ["privacy.level=example", "privacy.rows=99", "privacy.epsilon=8", "data.holdout=0"])
    with open_ledger(tmp_path, "client-0", rows, None) as ledger:
        assert (ledger.terms.unit, len(ledger.charges)) == ("example", 0)
    with open_ledger(tmp_path, "client-0", CONFIG, None) as ledger:
        assert (ledger.terms.unit, ledger.terms.epsilon) == ("client", of_rounds(3))


def test_a_lost_ledger_is_no_empty_one(make: Callable[..., list[Party]]) -> None:
    parties = make()
    played(parties)
    for party in parties:
        party.ledger.unlink()
    assert {a.info["error"] for a in played(parties, 2)[1]} == {"LedgerError"}


def test_a_node_hears_the_promise_of_whole_clients_and_not_the_noise() -> None:
    node = merged(shared_settings(CONFIG), {"data.name": "/data/rows.jsonl"}, {}, shares=1)
    assert (node.privacy.level, node.privacy.epsilon) == ("client", of_rounds(3))
    assert node.privacy.noise_multiplier is None
