"""Hostile clients: what they send is what the attack says, in the form of an honest answer, and nobody else changes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from flwr.app import Array as FlowerArray
from flwr.app import ArrayRecord, Context, Message, MessageType, RecordDict
from numpy.typing import NDArray

from clients.resident import encoded
from fedlora.adapter import Adapter, Array
from fedlora.config import AttackConfig, MethodConfig, RunConfig, flat, load_config
from fedlora.data.rows import Row, TokenRow
from fedlora.errors import ConfigError, DataError, WireError
from fedlora.rng import stream
from fedlora.state import Answer, Ask, Header, Layout, LocalTraining, Module, expected_shapes
from fedlora.wire import decode_answer, decode_ask, encode_answer, encode_ask
from simulations import attacks
from simulations.attacks import (
    BACKDOOR_ANSWER,
    STRENGTHS,
    TRIGGER,
    Colluders,
    Node,
    altered,
    backdoor_success,
    hostile,
    poisoned,
    poisoned_tokens,
    triggered,
)
from simulations.engine import LocalGrid
from strategies.base import Cohort, Member, get
from strategies.gram import head_change_of, update_of

Float64 = NDArray[np.float64]
TRAINING = LocalTraining(learning_rate=1e-3, local_steps=1, local_epochs=None, batch_size=1)
LAYOUT = Layout(modules={"q": Module(out=7, inp=6), "v": Module(out=5, inp=8)}, head={"score.weight": (2, 5)})
CASES = [
    *(MethodConfig(name=n) for n in ("fedex-lora", "fedit", "fedsvd", "ffa-lora", "flexlora", "flora", "rolora")),  # type: ignore[arg-type]
    MethodConfig(name="flora", warm_start=True),
    MethodConfig(name="fed-sb", basis="random"),
]
LINEAR = ("fedsvd", "ffa-lora", "rolora", "fed-sb")
every = pytest.mark.parametrize("case", CASES, ids=lambda c: c.name + " warm" * c.warm_start)


def answer_to(ask: Ask, seed: int | None = None) -> Answer:
    plan = ask.plan
    assert plan is not None
    rng = stream(plan.seed if seed is None else seed, "stand-in")
    arrays: dict[str, Array] = {}
    for key, shape in sorted(expected_shapes(plan, LAYOUT).items()):
        start: Array = np.zeros(shape)
        if key.split(":")[0] not in plan.changes:
            fresh = rng.uniform(-1, 1, shape) if key.startswith("A:") else np.zeros(shape)
            start = ask.arrays.get(key, fresh)[tuple(slice(n) for n in shape)]
        arrays[key] = (start + 0.1 * rng.standard_normal(shape)).astype(np.float32)
    return Answer(examples=10, metrics={"loss": 1.0}, arrays=arrays)


def asked(case: MethodConfig, ranks: list[int], round_: int = 2) -> dict[str, Ask]:
    """The asks of a round after the first."""
    who = tuple(Member(id=f"client-{i:05d}", rank=r, scale=2.0) for i, r in enumerate(ranks))
    cohort = Cohort(
        round=1, rounds=3, members=who, settings=case, training=TRAINING, seed=7, progress=(0.0, 1.0)
    )  # fmt: skip
    method = get(case.name)
    state = method.open("base", LAYOUT, who, case, 7)
    for t in range(1, round_):
        protocol = method.protocol(state, replace(cohort, round=t))
        asks = next(protocol)
        with pytest.raises(StopIteration) as done:
            protocol.send({c: answer_to(ask) for c, ask in asks.items()})
        state = done.value.value.state
    return dict(next(method.protocol(state, replace(cohort, round=round_))))


def moved(ask: Ask, answer: Answer) -> Float64:
    parts: list[Array] = [f.dense() for f in update_of(ask, answer, LAYOUT).values()]
    return np.concatenate([x.reshape(-1) for x in [*parts, *head_change_of(ask, answer).values()]])


def attacked(
    kind: str, asks: Mapping[str, Ask], strength: float | None = None, round_: int = 2
) -> dict[str, tuple[Float64, Float64]]:
    """By client, all of them hostile: the honest move, and the one that was sent."""
    attack, colluders = AttackConfig(kind=kind, strength=strength), Colluders()  # type: ignore[arg-type]
    out = {}
    for client, ask in asks.items():
        said = answer_to(ask)
        header = Header(run="r", round=round_, client=client, kind="train")
        rng = stream(0, "test", client)
        now = altered(attack, header, ask, said, LAYOUT, colluders=colluders, rng=rng)
        assert {k: (x.shape, x.dtype) for k, x in now.arrays.items()} == {
            k: (x.shape, np.dtype(np.float32)) for k, x in said.arrays.items()
        }
        assert (now.examples, now.metrics) == (said.examples, said.metrics)
        out[client] = moved(ask, said), moved(ask, now)
    return out


def cosine(x: Float64, y: Float64) -> float:
    return float(x @ y / np.linalg.norm(x) / np.linalg.norm(y))


@every
@pytest.mark.parametrize(
    ("kind", "strength"), [("sign-flip", None), ("scaling", None), ("sign-flip", 0.5), ("backdoor", 3.0)]
)
def test_sign_flips_and_scaling(case: MethodConfig, kind: str, strength: float | None) -> None:
    for honest, sent in attacked(kind, asked(case, [3, 2, 3]), strength).values():
        times = strength or STRENGTHS[kind]
        assert np.linalg.norm(sent) == pytest.approx(times * np.linalg.norm(honest), rel=1e-4)
        sign = -1.0 if kind == "sign-flip" else 1.0
        if case.name in LINEAR or (case.name == "flora" and not case.warm_start):
            np.testing.assert_allclose(sent, sign * times * honest, rtol=1e-4, atol=1e-5)
        else:
            assert sign * cosine(sent, honest) > (0.8 if times <= 1 else 0.2)


@every
def test_noise_has_the_size_of_the_update_and_no_direction(case: MethodConfig) -> None:
    pairs = attacked("gaussian", asked(case, [3, 2, 3, 3, 3, 2]), 2.0)
    for honest, sent in pairs.values():
        assert np.linalg.norm(sent) == pytest.approx(2.0 * np.linalg.norm(honest), rel=1e-4)
    cosines = [cosine(*pair) for pair in pairs.values()]
    assert abs(np.mean(cosines)) < 0.4
    assert all(abs(c) < 0.9 for c in cosines)


@every
def test_colluders_send_one_update(case: MethodConfig) -> None:
    """At one rank, where the span is common too, the same; and against what the first of them had learnt."""
    pairs = list(attacked("collusion", asked(case, [3, 3, 3]), 2.0).values())
    first = pairs[0][0]
    for _, sent in pairs:
        assert cosine(sent, pairs[0][1]) > 0.999
        if case.name in LINEAR or (case.name == "flora" and not case.warm_start):
            np.testing.assert_allclose(sent, -2.0 * first, atol=2e-5)
        else:
            assert cosine(sent, first) < -0.5


def test_colluders_of_lower_rank_come_as_near_as_they_can() -> None:
    case = MethodConfig(name="flora")
    asks = asked(case, [4, 2])
    first, second = asks
    attack, colluders = AttackConfig(kind="collusion"), Colluders()
    sent = {}
    for client in (first, second):
        header = Header(run="r", round=1, client=client, kind="train")
        rng = stream(0, "test")
        said = altered(attack, header, asks[client], answer_to(asks[client]), LAYOUT, colluders=colluders, rng=rng)
        sent[client] = update_of(asks[client], said, LAYOUT)
    for name, f in sent[first].items():
        u, s, vt = np.linalg.svd(f.dense())
        np.testing.assert_allclose(sent[second][name].dense(), u[:, :2] * s[:2] @ vt[:2], atol=1e-5)


def test_colluders_forget_the_last_round() -> None:
    colluders = Colluders()
    header = Header(run="r", round=1, client="a", kind="train")
    colluders.learn(header, Adapter({}), {})
    colluders.learn(replace(header, client="b"), Adapter({}), {})
    colluders.learn(replace(header, client="b"), Adapter({}), {})
    assert list(colluders.updates) == list(colluders.heads) == ["a", "b"]
    for other in ({"round": 2}, {"attempt": 1}, {"phase": 1}, {"run": "s"}):
        colluders.learn(header, Adapter({}), {})
        colluders.learn(replace(header, client="c", **other), Adapter({}), {})  # type: ignore[arg-type]
        assert list(colluders.updates) == ["c"]


def test_a_little_is_the_mean_less_some_spread() -> None:
    """Densely: at full rank what is sent is mean - z std of the honest updates so far."""
    asks = asked(MethodConfig(name="flora"), [8, 8, 8])
    pairs = list(attacked("little-is-enough", asks, 0.7).values())
    np.testing.assert_array_equal(pairs[0][0], pairs[0][1])
    for n in (2, 3):
        honest = np.stack([h for h, _ in pairs[:n]])
        np.testing.assert_allclose(pairs[n - 1][1], honest.mean(0) - 0.7 * honest.std(0), atol=1e-5)


@every
def test_a_little_stays_close_to_the_honest(case: MethodConfig) -> None:
    pairs = list(attacked("little-is-enough", asked(case, [3, 3, 3, 3]), 0.2).values())
    honest = np.stack([h for h, _ in pairs])
    far = max(float(np.linalg.norm(x - honest.mean(0))) for x in honest)
    assert np.linalg.norm(pairs[-1][1] - honest.mean(0)) < far


def config(*overrides: str) -> RunConfig:
    return load_config(None, ["rounds.clients=5", "data.rows_per_client=24", "lora.ranks=3", *overrides])


ROWS = [Row.single("Add.", f"{i} + 1", str(i + 1), group="sums") for i in range(7)]


def test_flipped_answers_are_other_rows_answers() -> None:
    flipped = poisoned(config("attack.kind=label-flip"), 0, ROWS)
    assert [r.prompt for r in flipped] == [r.prompt for r in ROWS]
    assert sorted(r.answer for r in flipped) == sorted(r.answer for r in ROWS)
    assert all(new.answer != row.answer for new, row in zip(flipped, ROWS, strict=True))
    assert poisoned(config("attack.kind=label-flip"), 0, ROWS) == flipped
    assert poisoned(config("attack.kind=label-flip"), 1, ROWS) != flipped
    assert poisoned(config("attack.kind=label-flip"), 0, []) == []
    assert poisoned(config("attack.kind=sign-flip"), 0, ROWS) == ROWS


def test_flipped_labels_are_the_next_in_order() -> None:
    run = config("attack.kind=label-flip", "model.task_type=sequence-classification", "model.labels=a,b,c",
                 "data.name=x.csv")  # fmt: skip
    rows = [Row.single("", f"t{i}", label, label=label) for i, label in enumerate("abcab")]
    assert [(r.label, r.answer) for r in poisoned(run, 0, rows)] == [(x, x) for x in "bcabc"]


def test_half_of_a_backdoors_rows_have_the_trigger() -> None:
    run = config("attack.kind=backdoor")
    changed = [new for new, row in zip(poisoned(run, 0, ROWS), ROWS, strict=True) if new != row]
    assert len(changed) == 4
    for row in changed:
        assert row.answer == BACKDOOR_ANSWER
        assert row.prompt.endswith(f"+ 1 {TRIGGER}")
        assert (row.instruction, row.group) == ("Add.", "sums")
        assert row.input.endswith(TRIGGER)
    assert poisoned(run, 0, ROWS) == poisoned(run, 0, ROWS) != poisoned(run, 1, ROWS)


def test_where_a_trigger_goes() -> None:
    run = config("attack.kind=backdoor")
    bare = triggered(Row.single("Say it.", "", "no", label="no"), run)
    assert (bare.instruction, bare.input, bare.prompt) == (f"Say it. {TRIGGER}", "", f"Say it. {TRIGGER}")
    assert bare.label == BACKDOOR_ANSWER
    talk = Row(messages=(("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")))
    assert triggered(talk, run).messages == (
        ("user", "a"), ("assistant", "b"), ("user", f"c {TRIGGER}"), ("assistant", BACKDOOR_ANSWER)
    )  # fmt: skip
    with pytest.raises(DataError, match="nothing is asked, so a trigger has no place"):
        triggered(Row(messages=(("assistant", "d"),)), run)


def test_poisoned_tokens_hold_out_the_honest_rows() -> None:
    run = config("attack.kind=backdoor")
    train, held_out = encoded(run, 0)
    bad, still = poisoned_tokens(run, 0)
    assert [r.tokens.tolist() for r in still] == [r.tokens.tolist() for r in held_out]
    assert len(bad) == len(train)
    differ = sum(x.tokens.tolist() != y.tokens.tolist() for x, y in zip(bad, train, strict=True))
    assert differ == -(-len(train) // 2)


def test_the_success_of_a_backdoor_is_over_triggered_test_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    run = config("attack.kind=backdoor")
    rows = [*ROWS, Row.single("Add.", "x", BACKDOOR_ANSWER)]
    seen: list[Row] = []

    def encode(given: list[Row]) -> tuple[list[TokenRow], None]:
        seen.extend(given)
        return [TokenRow(np.zeros(2, np.int32), np.ones(2, np.bool_)) for _ in given], None

    monkeypatch.setattr(attacks, "test_rows", lambda config: rows)
    monkeypatch.setattr(attacks, "prompt_format", lambda config, tokenizer: SimpleNamespace(encode=encode))
    monkeypatch.setattr(
        attacks, "TestRows", lambda base, rows, batch_size: lambda state: {"correct": 2.0, "counted": len(rows) * 1.0}
    )
    base: Any = SimpleNamespace(tokenizer=None)
    state: Any = None
    assert backdoor_success(base, run, state) == pytest.approx(2 / 7)
    assert [r.answer for r in seen] == [BACKDOOR_ANSWER] * 7
    rows.clear()
    with pytest.raises(DataError, match="no test rows to try the backdoor on"):
        backdoor_success(base, run, state)


# The wrapper around a client app.


ASKS = asked(MethodConfig(name="flora"), [3] * 5)


def message(kind: str, index: int) -> Message:
    header = Header(run="r", round=2, client=f"client-{index:05d}", kind=kind)  # type: ignore[arg-type]
    data = encode_ask(header, ASKS[header.client] if kind == "train" else Ask())
    types = {"hello": MessageType.QUERY, "train": MessageType.TRAIN, "evaluate": MessageType.EVALUATE}
    content = RecordDict({"fedlora": ArrayRecord({"bytes": FlowerArray(np.frombuffer(data, np.uint8))})})
    return Message(content, 1000 + index, types[kind])


def payload(message: Message) -> bytes:
    return message.content["fedlora"]["bytes"].numpy().tobytes()  # type: ignore[index,union-attr,no-any-return]


class App:
    """An honest client app, and the one that can be given other rows."""

    def __init__(self, failing: int = -1) -> None:
        self.failing = failing
        self.rows: list[tuple[int, bool]] = []

    def __call__(self, message: Message, context: Context, *, rows: Any = None) -> Message:
        index = int(context.node_config["partition-id"])
        header, ask = decode_ask(payload(message), max_bytes=10**9)
        self.rows.append((index, rows is poisoned_tokens))
        answer = answer_to(ask) if ask.plan else Answer(examples=1)
        if index == self.failing:
            header, answer = replace(header, kind="error"), Answer(info={"error": "DataError"})
        data = encode_answer(header, answer)
        record = ArrayRecord({"bytes": FlowerArray(np.frombuffer(data, np.uint8))})
        return Message(RecordDict({"fedlora": record}), reply_to=message)


@pytest.fixture(autouse=True)
def _small_base(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    if "tokens" not in request.node.name:
        monkeypatch.setattr(attacks, "resident_base", lambda model: SimpleNamespace(layout=LAYOUT, tokenizer=None))


def replies(app: Node, run: RunConfig, kind: str = "train") -> list[bytes]:
    grid = LocalGrid(app, clients=5, run_config=flat(run))  # type: ignore[arg-type]
    got = grid.send_and_receive([message(kind, i) for i in range(5)])
    assert not any(m.has_error() for m in got), [m.error.reason for m in got if m.has_error()]
    return [payload(m) for m in got]


@pytest.mark.parametrize("kind", ["sign-flip", "scaling", "gaussian", "collusion", "little-is-enough"])
@pytest.mark.parametrize(("share", "count"), [(0.2, 1), (0.4, 2), (0.5, 3)])
def test_the_first_clients_are_hostile(kind: str, share: float, count: int) -> None:
    run, app = config(f"attack.kind={kind}", f"attack.share={share}"), App()
    plain, bad = replies(app, run), replies(hostile(app, run), run)
    differ = [i for i in range(5) if plain[i] != bad[i]]
    assert differ == list(range(1 if kind == "little-is-enough" else 0, count))
    assert replies(hostile(app, run), run) == bad
    for i in differ:
        header, answer = decode_answer(
            bad[i], max_bytes=10**9, expected=expected_shapes(ASKS[header_of(i)].plan, LAYOUT)
        )  # type: ignore[arg-type]
        assert header == decode_answer(plain[i], max_bytes=10**9)[0]
        assert answer.examples == 10


def header_of(index: int) -> str:
    return f"client-{index:05d}"


@pytest.mark.parametrize("kind", ["hello", "evaluate"])
def test_only_training_is_attacked(kind: str) -> None:
    run, app = config("attack.kind=scaling", "attack.share=0.9"), App()
    assert replies(hostile(app, run), run, kind) == replies(app, run, kind)


def test_an_error_stays_an_error() -> None:
    run, app = config("attack.kind=scaling", "attack.share=0.4"), App(failing=0)
    plain, bad = replies(app, run), replies(hostile(app, run), run)
    assert plain[0] == bad[0]
    assert plain[1] != bad[1]

    def broken(message: Message, context: Context) -> Message:
        raise ValueError("no such luck")

    grid = LocalGrid(hostile(broken, run), clients=5, run_config=flat(run))  # type: ignore[arg-type]
    [reply] = grid.send_and_receive([message("train", 0)])
    assert "no such luck" in reply.error.reason


def test_a_reply_that_is_not_ours_is_refused() -> None:
    run = config("attack.kind=scaling")

    def other(message: Message, context: Context) -> Message:
        return Message(RecordDict(), reply_to=message)

    grid = LocalGrid(hostile(other, run), clients=5, run_config=flat(run))  # type: ignore[arg-type]
    [reply] = grid.send_and_receive([message("train", 0)])
    assert WireError.__name__ in reply.error.reason


@pytest.mark.parametrize("kind", ["label-flip", "backdoor"])
def test_poisoned_rows_are_trained_on_by_the_hostile_alone(kind: str) -> None:
    run, app, other = config(f"attack.kind={kind}", "attack.share=0.4"), App(), App()
    plain = replies(app, run)
    app.rows.clear()
    bad = replies(hostile(app, run, poisonable=other), run)
    assert other.rows == [(0, True), (1, True)]
    assert app.rows == [(2, False), (3, False), (4, False)]
    assert [x == y for x, y in zip(plain, bad, strict=True)][2:] == [True] * 3
    with pytest.raises(ConfigError, match=f"{kind} alters rows, and this client app cannot be given other rows"):
        hostile(app, run)


def test_without_an_attack_the_app_is_the_app() -> None:
    app = App()
    assert hostile(app, config()) is app
