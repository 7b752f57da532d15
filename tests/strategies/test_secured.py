"""Methods under secure sums: the state of the plain method, whoever drops out, and nothing seen but a sum.

Clients are the real client side (`clients.sums`), with a trainer that moves its start by seeded noise; every ask and
answer goes over the wire.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from scipy.stats import chi2

import strategies
from clients import sums
from clients.memory import Memory
from fedlora.config import ConfigError, MethodConfig, SecureConfig, load_config
from fedlora.config_secure import LINEAR, NESTED
from fedlora.errors import FedLoRAError, MethodError, RoundFailed
from fedlora.privacy.accounting import Event
from fedlora.privacy.clients import ClientPrivacy
from fedlora.privacy.secagg.fixed_point import FixedPoint
from fedlora.privacy.secagg.refusal import Refused
from fedlora.rng import stream
from fedlora.state import (
    Answer,
    Ask,
    GlobalState,
    Header,
    Layout,
    LocalTraining,
    Module,
    expected_arrays,
)
from fedlora.wire import decode_answer, decode_ask, encode_answer, encode_ask
from strategies.base import Closed, Cohort, Member, Method, SumSession, get
from strategies.private import clip_now
from strategies.secured import secured

BASE = "ab" * 32
LAYOUT = Layout(
    modules={"q": Module(out=6, inp=8), "v": Module(out=5, inp=7)}, head={"score.weight": (3, 6), "score.bias": (3,)}
)
TRAINING = LocalTraining(learning_rate=1e-3, local_steps=1, local_epochs=None, batch_size=1)
SETTINGS = SecureConfig(on=True)
RANKS = (4, 4, 4, 2, 2, 2)


@dataclass
class Party:
    """One client: its key, its memory, its rows; `gone` names the stage from which on it is silent."""

    id: str
    rank: int
    examples: int
    memory: Memory
    key: Ed25519PrivateKey = field(default_factory=Ed25519PrivateKey.generate)
    scale: float = 2.0
    gone: str = ""
    part: int = 1  # of the sum, in which it is gone
    trained: int = 0
    seen: list[bytes] = field(default_factory=list)

    @property
    def member(self) -> Member:
        raw = self.key.public_key().public_bytes_raw()
        return Member(id=self.id, rank=self.rank, scale=self.scale, key=raw)

    def honest(self, ask: Ask) -> Answer:
        """An update of noise that the plan's seed and the client decide."""
        self.trained += 1
        assert ask.plan is not None
        noise = stream(ask.plan.seed, "fake", self.id)
        shapes = expected_arrays(replace(ask, secure=None, message=b""), LAYOUT)
        arrays = {k: noise.normal(size=s).astype(np.float32) for k, s in sorted(shapes.items())}
        return Answer(examples=self.examples, arrays=arrays, metrics={"loss_before": 2.0, "loss_after": 1.0})

    def summed(self, ask: Ask, round_: int) -> Answer:
        header = Header(run="run", round=round_, client=self.id, kind="secure", base=BASE)
        _, ask = decode_ask(encode_ask(header, ask), max_bytes=10**7)
        base: Any = SimpleNamespace(fingerprint=BASE, layout=LAYOUT)
        said = sums.answered(
            header, ask, base=base, key=self.key, memory=self.memory, trusted=None, train=lambda: self.honest(ask)
        )
        self.seen.append(said.message)
        return decode_answer(encode_answer(header, said), max_bytes=10**7, expected={})[1]


@pytest.fixture
def parties(tmp_path: Path) -> Iterator[list[Party]]:
    yield [
        Party(f"client-{i}", rank, 50 + 10 * i, Memory(tmp_path, "run", f"client-{i}")) for i, rank in enumerate(RANKS)
    ]
    sums._SESSIONS.clear()


def cohort_of(parties: list[Party], *, number: int = 1, attempt: int = 0) -> Cohort:
    return Cohort(
        round=number,
        rounds=3,
        members=tuple(p.member for p in parties),
        settings=MethodConfig(),
        training=TRAINING,
        seed=5,
        progress=(0.0, 1.0),
        session=SumSession(run="run", round=number, attempt=attempt),
    )


def opened(name: str, parties: list[Party]) -> GlobalState:
    settings = MethodConfig.model_validate({"name": name, "basis": "random" if name == "fed-sb" else ""})
    return get(name).open(BASE, LAYOUT, [p.member for p in parties], settings, 7)


def played(method: Method, state: GlobalState, cohort: Cohort, say: Callable[[str, Ask], Answer | None]) -> Closed:
    """One round; a client that says None is silent."""
    protocol = method.protocol(state, cohort)
    asks = next(protocol)
    while True:
        answers = {c: said for c, ask in sorted(asks.items()) if (said := say(c, ask)) is not None}
        try:
            asks = protocol.send(answers)
        except StopIteration as end:
            closed: Closed = end.value
            return closed


def plain(name: str, state: GlobalState, parties: list[Party], **more: Any) -> GlobalState:
    by_id = {p.id: p for p in parties}
    return played(get(name), state, cohort_of(parties, **more), lambda c, ask: by_id[c].honest(ask)).state


def summed(
    name: str, state: GlobalState, parties: list[Party], *, settings: SecureConfig = SETTINGS, **more: Any
) -> Closed:
    by_id = {p.id: p for p in parties}

    def say(client: str, ask: Ask) -> Answer | None:
        party = by_id[client]
        assert ask.secure is not None
        order = ("advertise", "share", "mask", "confirm", "unmask")
        if party.gone and ask.secure.part >= party.part and order.index(ask.secure.stage) >= order.index(party.gone):
            return None
        return party.summed(ask, more.get("number", 1))

    return played(secured(get(name), settings), state, cohort_of(parties, **more), say)


def close(a: GlobalState, b: GlobalState) -> None:
    x, y = a.update(), b.update()
    assert x.keys() == y.keys()
    for name in x:
        dense = [f[name].scale * f[name].b.astype(np.float64) @ f[name].a.astype(np.float64) for f in (x, y)]
        np.testing.assert_allclose(dense[0], dense[1], atol=2e-4)
    for name, head in a.open_task.extras.items():
        np.testing.assert_allclose(head, b.open_task.extras[name], atol=2e-5)


@pytest.mark.parametrize("name", LINEAR)
def test_the_state_is_that_of_the_plain_method(name: str, parties: list[Party]) -> None:
    for party in parties:
        party.rank = 4 if name not in NESTED else party.rank
    state = opened(name, parties)
    want = plain(name, state, parties)
    closed = summed(name, state, parties)
    close(closed.state, want)
    assert closed.report["summed"] == 6.0
    assert closed.report["examples"] == sum(p.examples for p in parties)
    assert (closed.report["loss_before"], closed.report["loss_after"]) == pytest.approx((2.0, 1.0), abs=1e-4)
    again = summed(name, closed.state, parties, number=2)
    close(again.state, plain(name, closed.state, parties, number=2))


def test_clients_of_other_scales_fold_theirs_in(parties: list[Party]) -> None:
    for i, party in enumerate(parties):
        party.rank, party.scale = 4, 0.5 + i % 2
    state = opened("fedit", parties)
    close(summed("fedit", state, parties).state, plain("fedit", state, parties))


@pytest.mark.parametrize("stage", ["advertise", "share", "mask"])
@pytest.mark.parametrize("who", [(0,), (5,)])
def test_who_drops_out_before_masking_is_not_in_the_sum(stage: str, who: tuple[int, ...], parties: list[Party]) -> None:
    more = [
        Party(f"client-{i}", 4, 70, Memory(parties[0].memory._folder.parents[1], "run", f"client-{i}"))
        for i in range(6, 9)
    ]
    everybody = parties + more
    state = opened("ffa-lora", everybody)
    for i in who:
        everybody[i].gone = stage
    left = [p for i, p in enumerate(everybody) if i not in who]
    closed = summed("ffa-lora", state, everybody)
    by_id = {p.id: p for p in left}
    cohort = cohort_of(everybody)
    want = played(get("ffa-lora"), state, cohort, lambda c, ask: by_id[c].honest(ask) if c in by_id else None)
    close(closed.state, want.state)
    assert closed.report["summed"] == len(left)


@pytest.mark.parametrize("stage", ["confirm", "unmask"])
def test_who_drops_out_after_masking_is_still_in_the_sum(stage: str, parties: list[Party]) -> None:
    state = opened("ffa-lora", parties)
    want = plain("ffa-lora", state, parties)
    parties[1].gone = stage
    close(summed("ffa-lora", state, parties).state, want)


def test_a_single_large_client_is_moved_down_before_it_trains(parties: list[Party]) -> None:
    parties[0].rank, parties[1].rank, parties[2].rank = 4, 2, 2
    state = opened("ffa-lora", parties)
    lowered = [replace(p, rank=min(p.rank, 2)) for p in parties]
    close(summed("ffa-lora", state, parties).state, plain("ffa-lora", state, lowered))


def test_too_few_left_fails_the_round_and_a_retry_uses_the_same_update(parties: list[Party]) -> None:
    state = opened("ffa-lora", parties)
    want = plain("ffa-lora", state, parties)
    before = [p.trained for p in parties]
    for party in parties[:4]:
        party.gone = "mask"
    with pytest.raises(RoundFailed, match="secure sum"):
        summed("ffa-lora", state, parties)
    for party in parties[:4]:
        party.gone = ""
    close(summed("ffa-lora", state, parties, attempt=1).state, want)
    assert [p.trained - b for p, b in zip(parties, before, strict=True)] == [1] * 6


def test_a_sum_that_cannot_be_opened_loses_the_round_and_clients_refuse_it_for_good(parties: list[Party]) -> None:
    state = opened("ffa-lora", parties)
    for party in parties[:4]:
        party.gone = "unmask"
    closed = summed("ffa-lora", state, parties)
    assert closed.state is state
    assert closed.report == {"lost": 1.0}
    for party in parties[:4]:
        party.gone = ""
    with pytest.raises(sums.RoundOver, match="round 1 was opened with this client's help"):
        summed("ffa-lora", state, parties[4:] + parties[:4], attempt=1)
    sums._SESSIONS.clear()
    assert summed("ffa-lora", state, parties, number=2, attempt=2).report["summed"] == 6.0


def test_a_process_that_ended_has_dropped_out_and_keeps_its_promise(parties: list[Party]) -> None:
    state = opened("ffa-lora", parties)
    summed("ffa-lora", state, parties)
    sums._SESSIONS.clear()
    with pytest.raises(sums.RoundOver):
        summed("ffa-lora", state, parties, attempt=1)


def test_a_vector_that_was_sent_is_not_sent_again_while_its_sum_could_be_opened_without_its_owner(
    parties: list[Party],
) -> None:
    """A server that leaves one client out of the unmasking opens its vector all the same, by the others' shares."""
    state = opened("ffa-lora", parties)
    parties[0].gone = "confirm"
    assert summed("ffa-lora", state, parties[:4]).report["summed"] == 4.0
    parties[0].gone = ""
    with pytest.raises(Refused, match="could still be opened"):
        summed("ffa-lora", state, [parties[0], *parties[4:]], attempt=1)


def test_no_message_holds_an_update(parties: list[Party]) -> None:
    """The masked words of one client are not those of its update, and have nothing in common with them."""
    state = opened("ffa-lora", parties)
    summed("ffa-lora", state, parties)
    largest = max(parties[0].seen, key=len)
    words = np.frombuffer(largest[: len(largest) // 4 * 4], np.uint32)
    assert len(set(words.tolist())) > 0.95 * len(words)
    assert abs(float(np.mean(words / 2.0**32)) - 0.5) < 0.1


SKETCH = SecureConfig(on=True, columns=18)  # the sum of the ranks
COARSE = SecureConfig(on=True, columns=2)


def test_a_sketch_of_all_ranks_is_the_stack_itself(parties: list[Party]) -> None:
    for i, party in enumerate(parties):
        party.scale = 0.5 + i % 2
    state = opened("flora", parties)
    closed = summed("flora", state, parties, settings=SKETCH)
    close(closed.state, plain("flora", state, parties))
    assert closed.report["summed"] == 6.0
    assert [p.trained for p in parties] == [2] * 6  # once for the sum and once for the plain twin
    again = summed("flora", closed.state, parties, settings=SKETCH, number=2)
    close(again.state, plain("flora", closed.state, parties, number=2))


def test_a_coarse_sketch_has_its_rank_and_is_near_the_best(parties: list[Party]) -> None:
    state = opened("flora", parties)
    want, got = (
        s.update() for s in (plain("flora", state, parties), summed("flora", state, parties, settings=COARSE).state)
    )
    for name in want:
        dense, ours = (f[name].scale * f[name].b.astype(np.float64) @ f[name].a.astype(np.float64) for f in (want, got))
        values = np.linalg.svd(dense, compute_uv=False)
        assert np.linalg.matrix_rank(ours, tol=1e-4) == 2
        assert np.linalg.norm(ours - dense) >= np.sqrt(np.sum(values[2:] ** 2)) - 1e-6
        assert np.linalg.norm(ours - dense) <= 0.95 * np.linalg.norm(dense)


def test_a_round_whose_second_part_fails_is_lost_and_never_repeated(parties: list[Party]) -> None:
    state = opened("flora", parties)
    parties[3].gone, parties[3].part = "mask", 2
    closed = summed("flora", state, parties, settings=SKETCH)
    assert closed.state is state
    assert closed.report == {"lost": 1.0}
    assert "missing" in closed.refused[-1].detail
    parties[3].gone = ""
    with pytest.raises((sums.RoundOver, Refused)):
        summed("flora", state, parties, settings=SKETCH, attempt=1)


def test_who_drops_out_of_part_one_is_not_asked_for_part_two(parties: list[Party]) -> None:
    state = opened("flora", parties)
    parties[5].gone = "mask"
    closed = summed("flora", state, parties, settings=SKETCH)
    left = {p.id: p for p in parties[:5]}
    want = played(get("flora"), state, cohort_of(parties), lambda c, ask: left[c].honest(ask) if c in left else None)
    close(closed.state, want.state)


def test_a_range_that_would_magnify_is_refused(parties: list[Party]) -> None:
    """A server that sends 100 Q would have clients add what is beyond the bound of the sum."""
    state = opened("flora", parties)
    by_id = {p.id: p for p in parties}
    protocol = secured(get("flora"), SKETCH).protocol(state, cohort_of(parties))
    asks = next(protocol)
    while next(iter(asks.values())).secure.part == 1:  # type: ignore[union-attr]
        asks = protocol.send({c: by_id[c].summed(ask, 1) for c, ask in asks.items()})
    large = {k: 100 * x for k, x in asks["client-0"].arrays.items()}
    with pytest.raises(Refused, match="basis is"):
        by_id["client-0"].summed(replace(asks["client-0"], arrays=large), 1)


def test_what_a_client_does_not_take(parties: list[Party]) -> None:
    state = opened("ffa-lora", parties)
    asks = next(secured(get("ffa-lora"), SETTINGS).protocol(state, cohort_of(parties)))
    ask, party = asks["client-0"], parties[0]
    header = Header(run="run", round=1, client="client-0", kind="secure", base=BASE)
    base: Any = SimpleNamespace(fingerprint=BASE, layout=LAYOUT)

    def say(ask: Ask, header: Header = header, **fields: Any) -> None:
        usual: dict[str, Any] = {"base": base, "key": party.key, "memory": party.memory, "trusted": None}
        sums.answered(header, ask, **usual | fields, train=lambda: party.honest(ask))

    with pytest.raises(FedLoRAError, match="needs a signing key and a memory folder"):
        say(ask, memory=None)
    with pytest.raises(FedLoRAError, match="no secure sum of round 1 is open here"):
        say(Ask(secure=replace(ask.secure, stage="share"), message=b"x"))  # type: ignore[type-var]
    for other, what in (({"run": "other"}, "run is"), ({"round": 2}, "round is")):
        with pytest.raises(Refused, match=what):
            say(ask, replace(header, **other))  # type: ignore[arg-type]
    with pytest.raises(Refused, match="base is"):
        say(ask, base=SimpleNamespace(fingerprint="cd" * 32, layout=LAYOUT))
    with pytest.raises(Refused, match="are not in this node's own list"):
        say(ask, trusted={"f" * 64})
    assert ask.plan is not None
    with pytest.raises(Refused, match="layout is"):
        say(replace(ask, secure=replace(ask.secure, rows=3)))  # type: ignore[type-var]
    with pytest.raises(Refused, match="on the roster with rank 4"):
        say(replace(ask, plan=replace(ask.plan, rank=3)))
    assert party.trained == 0


def test_what_is_no_weighted_sum_is_refused(parties: list[Party]) -> None:
    with pytest.raises(MethodError, match="another mean than that of its answers"):
        next(secured(get("fedit"), SETTINGS).protocol(opened("fedit", parties), cohort_of(parties)))
    stacked = get("fed-sb").open(BASE, LAYOUT, [p.member for p in parties], MethodConfig(name="fed-sb"), 7)
    with pytest.raises(MethodError, match="factors on bases of their own"):
        next(secured(get("fed-sb"), SETTINGS).protocol(stacked, cohort_of(parties)))


def test_methods_that_need_single_updates_are_refused() -> None:
    with pytest.raises(MethodError, match="flora needs single updates"):
        secured(strategies.base.get("flora"), SETTINGS)


@pytest.mark.parametrize(
    ("sets", "what"),
    [
        (["method.name=flora"], r"stacked. Use ffa-lora.*or flora with secure.columns"),
        (["method.name=flora", "secure.columns=8", "method.warm_start=true"], "leave warm_start off"),
        (["method.name=ffa-lora", "secure.columns=8"], "sketches are for flora"),
        (["method.name=ffa-lora", "robust.rule=screen"], "private or robust, not both"),
        (["method.name=ffa-lora", "wire.up=int8"], "under secure.on use float32"),
        (["method.name=ffa-lora", "rounds.clients=2"], "a sum of 2 clients hides too little"),
        (["method.name=ffa-lora", "secure.least=12"], "at least 12 must be asked"),
        (["method.name=ffa-lora", "rounds.max_norm=3"], "rounds.max_norm"),
    ],
)
def test_what_cannot_be_combined(sets: list[str], what: str) -> None:
    with pytest.raises(ConfigError, match=what):
        load_config(None, ["secure.on=true", *sets])
    with pytest.raises(ConfigError, match=r"has no effect while secure.on is false"):
        load_config(None, ["secure.bound=50"])


# ---- whole clients private ------------------------------------------------------------------------------------------

TERMS = ClientPrivacy(clip=1e3, noise_multiplier=1e-12, sampling=1.0, counted=1.0, population=6)
OWN = replace(TERMS, clip=1.0, noise_multiplier=2.0, by="clients", parties=3)


@dataclass
class Books:
    """The events that clients were asked to charge, by client, with how often each had trained by then."""

    charged: dict[str, list[tuple[Event, int]]] = field(default_factory=dict)

    def whole(
        self,
        name: str,
        state: GlobalState,
        parties: list[Party],
        terms: ClientPrivacy,
        *,
        settings: SecureConfig = SETTINGS,
        edit: Callable[[Ask], Ask] = lambda ask: ask,
        **more: Any,
    ) -> Closed:
        """One round of sums under these terms; every client charges what it is asked to."""
        by_id, number = {p.id: p for p in parties}, more.get("number", 1)
        base: Any = SimpleNamespace(fingerprint=BASE, layout=LAYOUT)

        def say(client: str, ask: Ask) -> Answer | None:
            party = by_id[client]
            assert ask.secure is not None
            order = ("advertise", "share", "mask", "confirm", "unmask")
            if party.gone and order.index(ask.secure.stage) >= order.index(party.gone):
                return None
            header = Header(run="run", round=number, client=client, kind="secure", base=BASE)
            _, ask = decode_ask(encode_ask(header, edit(ask)), max_bytes=10**7)
            said = sums.answered(
                header,
                ask,
                base=base,
                key=party.key,
                memory=party.memory,
                trusted=None,
                train=lambda: party.honest(ask),
                charge=lambda event: self.charged.setdefault(client, []).append((event, party.trained)),
            )
            return decode_answer(encode_answer(header, said), max_bytes=10**7, expected={})[1]

        return played(secured(get(name), settings, terms), state, cohort_of(parties, **more), say)


def trusting(name: str, state: GlobalState, parties: list[Party], terms: ClientPrivacy, **more: Any) -> Closed:
    """One round of sums to which the server adds the noise: clients charge nothing."""
    by_id = {p.id: p for p in parties}
    method = secured(get(name), more.pop("settings", SETTINGS), terms)
    number = more.get("number", 1)
    return played(method, state, cohort_of(parties, **more), lambda c, ask: by_id[c].summed(ask, number))


def equal_rows(parties: list[Party], name: str) -> None:
    for party in parties:
        party.examples, party.rank = 10, party.rank if name in NESTED else 4


@pytest.mark.parametrize("name", LINEAR)
def test_without_clip_and_noise_whole_clients_make_the_state_of_the_plain_method(
    name: str, parties: list[Party]
) -> None:
    equal_rows(parties, name)
    state = opened(name, parties)
    closed = trusting(name, state, parties, replace(TERMS, clip=50.0))
    close(closed.state, plain(name, state, parties))
    assert closed.report.keys() >= {"summed", "clip"}
    assert closed.report.keys().isdisjoint({"loss_before", "loss_after", "clipped", "examples", "aggregation_error"})
    assert (closed.report["summed"], closed.clients) == (6.0, {})


def moved_by(closed: Closed, state: GlobalState) -> np.ndarray:
    """What B and the head moved by, as one vector: under ffa-lora the release itself."""
    old, new = state.open_task, closed.state.open_task
    assert old.pair is not None
    assert new.pair is not None
    parts = [new.pair[n].b.astype(float) - f.b for n, f in sorted(old.pair.items())]
    parts += [new.extras[n].astype(float) - x for n, x in sorted(old.extras.items())]
    return np.concatenate([x.ravel() for x in parts])


def test_the_server_sees_sums_whose_noise_the_clients_made(
    parties: list[Party], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Six add the shares of three, so the sum has sqrt(2) of what is promised; the server draws nothing.

    Chi-square; it fails wrongly once in 10^9 runs.
    """
    monkeypatch.setattr("strategies.secured.Noise", None)
    state, books, found = opened("ffa-lora", parties), Books(), []
    monkeypatch.setattr(
        Party,
        "honest",
        lambda self, ask: Answer(
            examples=1,
            arrays={
                k: np.zeros(s, np.float32)
                for k, s in expected_arrays(replace(ask, secure=None, message=b""), LAYOUT).items()
            },
        ),
    )
    for number in range(1, 5):
        closed = books.whole("ffa-lora", state, parties, OWN, number=number, attempt=number)
        found.append(moved_by(closed, state) * OWN.expected)
        assert closed.report["summed"] == 6.0
    x = np.concatenate(found)
    made = math.sqrt(6 / 3) * OWN.sd() * 1.001  # a thousandth for what rounding adds to a clip
    low, high = chi2.ppf([5e-10, 1 - 5e-10], len(x))
    assert low < float(x @ x) / made**2 < high
    assert len(np.unique(x)) > 0.99 * len(x)
    assert books.charged.keys() == {p.id for p in parties}
    for told in books.charged.values():
        assert [event for event, _ in told] == [told[0][0]] * 4
        assert 2.0 <= told[0][0].noise_multiplier < 2.0 * (1 + 1e-8)
        assert told[0][0].sampling == 1.0


def test_a_client_charges_before_it_trains_and_a_retry_comes_with_the_same_event(parties: list[Party]) -> None:
    state, books = opened("ffa-lora", parties), Books()
    for party in parties[:4]:
        party.gone = "mask"
    with pytest.raises(RoundFailed):
        books.whole("ffa-lora", state, parties, OWN)
    for party in parties[:4]:
        party.gone = ""
    books.whole("ffa-lora", state, parties, OWN, attempt=1)
    for party in parties:
        (first, before), (second, after) = books.charged[party.id]
        assert (before, after) == (0, 1)
        assert first == second


def test_the_noise_of_a_sum_is_never_drawn_twice_alike(parties: list[Party], monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[np.ndarray] = []
    inner = sums.own_noise

    def caught(*args: Any) -> Any:
        drawn.append(inner(*args))
        return drawn[-1]

    monkeypatch.setattr(sums, "own_noise", caught)
    state = opened("ffa-lora", parties)
    for number in (1, 2):
        Books().whole("ffa-lora", state, parties, OWN, number=number, attempt=number)
    assert len(drawn) == 12
    assert all(np.mean(x == y) < 0.1 for i, x in enumerate(d[:-4] for d in drawn) for y in (e[:-4] for e in drawn[:i]))


@pytest.mark.parametrize("quantile", [None, 0.5])
def test_the_sum_is_divided_by_the_plan_and_the_count_moves_the_clip(
    quantile: float | None, parties: list[Party]
) -> None:
    state = opened("ffa-lora", parties)
    terms = replace(TERMS, clip=50.0, sampling=0.5, population=100, quantile=quantile)
    closed = trusting("ffa-lora", state, parties, terms)
    equal_rows(parties, "ffa-lora")
    want = moved_by(Closed(state=plain("ffa-lora", state, parties), report={}), state) * 6 / 50
    np.testing.assert_allclose(moved_by(closed, state), want, atol=1e-5)
    now = clip_now(terms, closed.state).clip
    if quantile is None:
        assert now == 50.0
    else:  # six of fifty within: the fraction is 1/2 + 3/50, the noise on it a twentieth
        assert math.log(now / 50.0) == pytest.approx(-0.2 * 3 / 50, abs=0.2 * 0.05 * 6.5)
        assert closed.report["clip"] == 50.0


def test_a_round_with_too_few_for_a_sum_is_null(parties: list[Party]) -> None:
    state = opened("ffa-lora", parties)
    protocol = secured(get("ffa-lora"), SecureConfig(on=True, least=4), OWN).protocol(state, cohort_of(parties[:3]))
    with pytest.raises(StopIteration) as end:
        next(protocol)  # nobody is asked
    closed = end.value.value
    assert closed.state is state
    assert closed.report == {"null": 1.0, "clip": 1.0}
    nobody = secured(get("ffa-lora"), SETTINGS, TERMS).protocol(state, cohort_of([]))
    with pytest.raises(StopIteration):
        next(nobody)


def test_a_sum_that_cannot_be_opened_moves_neither_state_nor_clip(parties: list[Party]) -> None:
    state = opened("ffa-lora", parties)
    for party in parties[:4]:
        party.gone = "unmask"
    closed = Books().whole("ffa-lora", state, parties, replace(OWN, quantile=0.5))
    assert closed.state is state
    assert closed.report == {"lost": 1.0}


@pytest.mark.parametrize("quantile", [None, 0.5])
def test_one_client_moves_the_sum_by_the_clip_at_most(
    quantile: float | None, parties: list[Party], monkeypatch: pytest.MonkeyPatch
) -> None:
    state, found = opened("ffa-lora", parties), []
    honest = Party.honest
    terms = replace(TERMS, clip=0.5, quantile=quantile)
    for factor in (1.0, 1e6, 0.0):

        def scaled(self: Party, ask: Ask, factor: float = factor) -> Answer:
            said = honest(self, ask)
            by = np.float32(factor if self is parties[0] else 1.0)
            return replace(said, arrays={k: x * by for k, x in said.arrays.items()})

        monkeypatch.setattr(Party, "honest", scaled)
        number = len(found) + 1
        found.append(moved_by(trusting("ffa-lora", state, parties, terms, number=number, attempt=number), state))
    plans = [found[0] - found[2], found[1] - found[2]]  # of other seeds each round, so this bounds all six
    assert all(np.linalg.norm(x) <= 12 * 0.5 * 1.001 / 6 for x in plans)


def no_whole(ask: Ask) -> Ask:
    return replace(ask, secure=replace(ask.secure, whole=None))  # type: ignore[type-var]


def with_whole(**fields: Any) -> Callable[[Ask], Ask]:
    def edit(ask: Ask) -> Ask:
        assert ask.secure is not None
        assert ask.secure.whole is not None
        return replace(ask, secure=replace(ask.secure, whole=replace(ask.secure.whole, **fields)))

    return edit


@pytest.mark.parametrize(
    ("edit", "what"),
    [
        (no_whole, "only with noise of its own"),
        (with_whole(noise=0.0), "protects nothing is not joined"),
        (with_whole(clip=0.0), "protects nothing is not joined"),
        (with_whole(counted=True), "protects nothing is not joined"),
        (with_whole(noise=1e30), "too coarse"),
        (with_whole(noise=1e300), "too coarse"),
        (with_whole(noise=40.0), "call for another grid"),
    ],
)
def test_a_sum_that_would_not_protect_as_charged_is_refused_before_training(
    edit: Callable[[Ask], Ask], what: str, parties: list[Party]
) -> None:
    """The server's word is not taken: noise that the grid cannot hold would wrap around to none."""
    state, books = opened("ffa-lora", parties), Books()
    with pytest.raises(FedLoRAError, match=what):
        books.whole("ffa-lora", state, parties, OWN, edit=edit)
    assert books.charged == {}
    assert [p.trained for p in parties] == [0] * 6


def test_a_grid_that_is_coarser_than_the_noise_calls_for_is_refused(
    parties: list[Party], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rounding on it would lengthen what was clipped, by up to its double, under the same charge."""

    def coarse(size: int, clients: int, whole: Any) -> FixedPoint:
        return FixedPoint(size=size, clients=clients, bound=2.0**24)

    monkeypatch.setattr("strategies.secured.coding", coarse)
    books = Books()
    with pytest.raises(Refused, match="call for another grid"):
        books.whole("ffa-lora", opened("ffa-lora", parties), parties, OWN)
    assert books.charged == {}


def test_a_sketch_is_two_releases() -> None:
    with pytest.raises(MethodError, match="two sums are two releases"):
        secured(get("flora"), SKETCH, TERMS)
