"""Runs with tasks: late clients, skipped tasks, empty rounds, quorum in phases that measure, and resuming anywhere."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, NotRequired, get_origin, get_type_hints

import numpy as np
import pytest

from clients.answer import whole_blocks
from clients.memory import Memory
from fedlora.adapter import stack
from fedlora.errors import BlocksMissing, RoundFailed
from fedlora.report import log
from fedlora.rng import public_normal, stream
from fedlora.state import Answer, Ask, Block, GlobalState, Header, Layout, Module, expected_arrays
from fedlora.wire import encode_answer, encode_state
from server import checkpoint
from server.asking import STRIKES
from server.holdings import OWNER
from simulations.benchmarks.stand_in import follow
from strategies.continual.views import sealed_in_order

LAYOUT = Layout(
    modules={
        "k": Module(out=5, inp=16, shares="k"),
        "q": Module(out=6, inp=16, shares="k"),
        "up": Module(out=7, inp=18, kind="conv1d"),
    },
    head={"score.weight": (3, 5), "score.bias": (3,)},
    features=4,
)
RANKS = (3, 2, 2)
Weights = dict[str, np.ndarray]
once = lru_cache(maxsize=None)(public_normal)  # the same numbers, made once for all tests


@pytest.fixture(autouse=True)
def _made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("strategies.continual.moments.public_normal", once)


def sets(way: str, *more: str, tables: Sequence[Mapping[str, Any]] | None = None) -> tuple[str, ...]:
    """Three tasks of two rounds each, if `tables` say nothing else."""
    tables = tables or [{"name": n, "rounds.count": 2} for n in "abc"]
    return (f"continual.method={way}", f"tasks={json.dumps(tables)}", "rounds.quorum=0.5", *more)


@pytest.fixture
def town(lab: Any, fakes: Any, tmp_path: Path) -> Callable[..., Any]:
    """Makes labs whose clients train in subspaces, measure, and note what blocks they had at every ask."""

    @dataclass
    class Client(fakes.Client):  # type: ignore[name-defined,misc]
        layout: Any = field(default_factory=LAYOUT.to_json)
        measure: Any = None  # how it misbehaves when it is to measure
        keeps: bool = True
        root: Path = tmp_path / "memory"
        seen: list[tuple[Header, Ask]] = field(default_factory=list)

        @property
        def memory(self) -> Memory | None:
            return Memory(self.root, "run-1", self.id) if self.keeps else None

        def honest(self, header: Header, ask: Ask) -> Answer:
            rows = 10 + self.index
            if header.kind == "measure":
                return Answer(examples=rows, arrays=measured(ask, self.id, rows))
            if header.kind == "train":
                self.trained += 1
                layout = LAYOUT if ask.subspace is None else LAYOUT.within(ask.subspace.dim)
                arrays = follow(replace(ask, blocks=(), frozen=None), layout, rows, 0.1).answer.arrays
                return Answer(examples=rows, metrics={"loss_after": 0.5, "steps": 2.0}, arrays=arrays)
            answer: Answer = super().honest(header, ask)
            return replace(answer, info={**answer.info, "keeps": self.keeps}) if header.kind == "hello" else answer

        def respond(self, data: bytes) -> Any:
            header, ask = fakes.decode_ask(data, max_bytes=10**8)
            try:
                whole = replace(ask, blocks=whole_blocks(ask, self.memory), on=None)
            except BlocksMissing as error:
                self.down.append((header.round, len(data)))
                info = {"error": type(error).__name__, "message": str(error)}
                return encode_answer(replace(header, kind="error"), Answer(info=info))
            self.seen.append((header, whole))
            return super().respond(data)

    def make(ranks: Sequence[int] = RANKS, **fields: Any) -> Any:
        root = tmp_path / f"memory-{len(list(tmp_path.iterdir()))}"
        root.mkdir()
        return lab(clients={i: Client(i, r, root=root, **fields) for i, r in enumerate(ranks)})

    return make


def measured(ask: Ask, client: str, rows: int) -> dict[str, np.ndarray]:
    """Moments of random inputs, and of as many features of norm 1 as it has rows; Fisher information is whatever."""
    assert ask.measure is not None
    arrays: dict[str, np.ndarray] = {}
    for key, shape in expected_arrays(ask, LAYOUT).items():
        name, rng = key.split(":")[1], stream(1, ask.task, client, key)
        if key.startswith("sketch"):
            x = rng.normal(size=(9, shape[0]))
            arrays[key] = x.T @ (x @ once(ask.measure.seed, "sketch", name, shape=shape)) / 9
            arrays[f"energy:{name}"] = np.array([np.sum(x**2) / 9])
        elif key == "feature:sketch":
            f = rng.normal(size=(rows, shape[0]))
            f /= np.linalg.norm(f, axis=1, keepdims=True)
            one = np.eye(ask.measure.classes)[np.arange(rows) % ask.measure.classes]
            test = once(ask.measure.seed, "sketch", "feature", shape=shape)
            arrays |= {key: f.T @ (f @ test), "feature:sum": one.T @ f, "feature:count": one.sum(0)}
        elif key.startswith("fisher"):
            arrays[key] = rng.uniform(0.1, 1.0, shape)
    return {k: x.astype(np.float32) for k, x in arrays.items()}


def states(monkeypatch: pytest.MonkeyPatch) -> dict[int, GlobalState]:
    """The state after every round, as it is saved."""
    seen: dict[int, GlobalState] = {}
    save = checkpoint.save

    def spy(folder: Path, number: int, state: GlobalState, *, key: bytes | None = None) -> Path:
        seen[number] = state
        return save(folder, number, state, key=key)

    monkeypatch.setattr("server.checkpoint.save", spy)
    return seen


def weights(blocks: Sequence[Block]) -> Weights:
    return {n: f.dense() for n, f in stack([b.adapter for b in blocks]).items()} if blocks else {}


def require_right_weights(lab: Any, seen: Mapping[int, GlobalState], first: int = 1) -> int:
    """Every ask to train spoke of the sealed tasks and the task's own blocks, every one to evaluate of everything."""
    count = 0
    for client in lab.clients.values():
        for header, ask in client.seen:
            if header.kind not in ("train", "evaluate") or header.round < first:
                continue
            state = seen[header.round - (header.kind == "train")]
            blocks = [b for t in sealed_in_order(state) for b in t.full.blocks]
            if ask.plan is not None and ask.plan.against:  # a penalty is measured against each of them, not their sum
                apart = [b.adapter.digest for b in ask.blocks[: ask.plan.against]]
                assert apart == [b.adapter.digest for b in blocks]
            own = state.tasks.get(ask.task)
            if header.kind == "train" and own is not None and not own.sealed:
                blocks += own.full.blocks
            want = weights(blocks) if header.kind == "train" else {n: f.dense() for n, f in state.update().items()}
            got, size = weights(ask.blocks), max([float(np.linalg.norm(x)) for x in want.values()], default=0.0)
            for n, x in want.items():
                assert float(np.linalg.norm(got.get(n, 0.0) - x)) <= 1e-6 * max(size, 1e-9), (header, n)
            count += 1
    return count


def without_holdings(state: GlobalState, *more: str) -> bytes:
    return encode_state(replace(state, memory={k: v for k, v in state.memory.items() if k not in (OWNER, *more)}))


WAYS = [
    ("input-aware", "ffa-lora"),
    ("o-lora", "flora"),
    ("ewc", "fedit"),
]


@pytest.mark.parametrize(("way", "method"), WAYS[:2])
def test_clients_that_keep_blocks_have_the_servers_weights(
    town: Any, monkeypatch: pytest.MonkeyPatch, way: str, method: str
) -> None:
    seen = states(monkeypatch)
    keeping, forgetful = town(), town(keeps=False)
    settings = sets(way, f"method.name={method}", "evaluation.every=1")
    state = keeping.conduct(*settings)
    assert require_right_weights(keeping, seen) == 3 * (6 + 1 + 1 + 1 + 2 + 1 + 3)  # at borders all that have begun
    assert without_holdings(forgetful.conduct(*settings)) == without_holdings(state)
    down = [sum(e["bytes_down"] for e in one.rounds) for one in (keeping, forgetful)]
    assert down[0] < down[1]
    against = {(h.round, a.plan.against) for c in keeping.clients.values() for h, a in c.seen if a.plan}
    assert against == ({(n, (n - 1) // 2) for n in range(1, 7)} if way == "o-lora" else {(n, 0) for n in range(1, 7)})


@pytest.mark.parametrize("way", ["input-aware", "o-lora"])
def test_a_late_client_gets_what_was_sealed(town: Any, monkeypatch: pytest.MonkeyPatch, way: str) -> None:
    """It enrols in the second task; from then on it has the weights of the others, to 1e-6, also by a snapshot."""
    seen = states(monkeypatch)
    one = town()
    late = one.grid.nodes.pop(1002)

    def arrive(event: dict[str, Any]) -> None:
        if event["event"] == "closed" and event["round"] == 3:
            one.grid.nodes[1002] = late

    settings = sets(way, "method.name=flora", "rounds.clients=2", "evaluation.every=1")
    one.conduct(*settings, stop=arrive)
    assert [len(r["clients"]) for r in one.rounds] == [2, 2, 2, 3, 3, 3]
    assert {h.round for h, _ in one.clients[2].seen if h.round} == {4, 5, 6}
    assert require_right_weights(one, seen) > 20


@pytest.mark.parametrize("way", ["subspace", "input-aware"])
def test_a_client_may_skip_a_task(town: Any, fakes: Any, monkeypatch: pytest.MonkeyPatch, way: str) -> None:
    """It fails throughout the second task; the third finds it with all that was sealed."""
    seen = states(monkeypatch)
    one = town()
    one.clients[1].train = one.clients[1].measure = fakes.failing
    one.clients[1].rounds = {3, 4}
    state = one.conduct(*sets(way, "method.name=flora"))
    assert [len(r["clients"]) for r in one.rounds] == [3, 3, 2, 2, 3, 3]
    assert {c for r in one.rounds for c in r["missing"]} == {"client-00001"}
    assert [t.name for t in sealed_in_order(state)] == ["a", "b", "c"]
    require_right_weights(one, seen)


def test_only_clients_of_a_task_are_asked(town: Any) -> None:
    tables = [
        {"name": "a", "rounds.count": 3, "clients": [0]},
        {"name": "b", "rounds.count": 2, "start": 2, "clients": [0, 2]},
    ]
    one = town()
    one.conduct(*sets("input-aware", tables=tables))
    told = [[(c["id"][-1], c["task"]) for c in r["clients"]] for r in one.rounds]
    assert told == [[("0", "a")], [("0", "a"), ("0", "b"), ("2", "b")], [("0", "a"), ("0", "b"), ("2", "b")]]
    assert [r["tasks"] for r in one.rounds] == [["a"], ["a", "b"], ["a", "b"]]
    assert not any(h.round for h, _ in one.clients[1].seen)
    for event in one.rounds:  # who trained two tasks has two entries, and its bytes are in the first
        down = sum(n for c in one.clients.values() for r, n in c.down if r == event["round"])
        assert sum(c["bytes_down"] for c in event["clients"]) == event["bytes_down"] == down
    assert [c["bytes_down"] for c in one.rounds[2]["clients"]][1] == 0


def test_a_task_of_whose_clients_none_is_drawn_waits(town: Any) -> None:
    tables = [{"name": "a", "rounds.count": 6, "clients": [2]}, {"name": "b", "rounds.count": 1}]
    one = town()
    state = one.conduct(*sets("subspace", "rounds.fraction=0.4", tables=tables))
    told = [[c["id"][-1] for c in r["clients"]] for r in one.rounds]
    assert 0 < sum(bool(t) for t in told[:6]) < 6
    assert all(t in ([], ["2"]) for t in told[:6])
    assert state.version == 7
    assert [t.sealed for t in state.tasks.values()] == [True, True]


@pytest.mark.parametrize("way", ["subspace", "input-aware", "sequential"])
def test_rounds_may_be_empty_and_tasks_begin_and_end_in_them(town: Any, way: str) -> None:
    one = town()
    state = one.conduct(*sets(way, "rounds.sampling=poisson", "rounds.fraction=0.0001"))
    assert [(r["clients"], r["version"], r["tasks"]) for r in one.rounds] == [
        ([], n + 1, ["aabbcc"[n]]) for n in range(6)
    ]
    assert [t.name for t in sealed_in_order(state)] == ["a", "b", "c"]
    assert not any(f.dense().any() for f in state.update().values())
    assert all(h.kind in ("hello", "measure") for c in one.clients.values() for h, _ in c.seen)


# ---- failing, killed and resumed -------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [2, 3])  # one seals a task and one opens the next: both measure
def test_a_measurement_below_quorum_is_repeated_from_the_start_of_its_round(town: Any, fakes: Any, number: int) -> None:
    one, whole = town(), town()
    for client in (one.clients[0], one.clients[1]):
        client.measure, client.rounds = fakes.failing, {number}

    def mend(event: dict[str, Any]) -> None:
        if event["event"] == "retry":
            for client in one.clients.values():
                client.measure = None

    settings = sets("input-aware", "rounds.retries=1", "rounds.quorum=0.6")
    assert without_holdings(one.conduct(*settings, stop=mend)) == without_holdings(whole.conduct(*settings))
    event = one.rounds[number - 1]
    assert [(r["client"], r["rule"]) for r in event["refused"]] == [
        (f"client-0000{i}", "client failed") for i in (0, 1)
    ]
    assert event["missing"] == []
    assert [n["round"] for n in one.notes if n["event"] == "retry"] == [number]


def test_a_forged_sketch_is_refused_by_name_and_spoils_nothing(town: Any, fakes: Any) -> None:
    """Its sums would have been no second moment's; they are those of the other clients."""

    def forging(client: Any, header: Header, ask: Ask) -> bytes:
        answer = client.honest(header, ask)
        turned = {k: -x if k.startswith("sketch") else x for k, x in answer.arrays.items()}
        return encode_answer(header, replace(answer, arrays=turned))

    one, other = town(), town()
    one.clients[1].measure, other.clients[1].measure = forging, fakes.failing
    one.clients[1].rounds = other.clients[1].rounds = {2}
    settings = sets("input-aware")
    forged, failed = one.conduct(*settings), other.conduct(*settings)
    assert without_holdings(forged, STRIKES) == without_holdings(failed)
    assert {c: float(x[0]) for c, x in forged.memory[STRIKES].items()} == {"client-00001": 1.0}
    [refused] = one.rounds[1]["refused"]
    assert (refused["client"], refused["rule"]) == ("client-00001", "moments")


def test_below_quorum_in_a_measurement_the_run_pauses_and_goes_on(town: Any, fakes: Any) -> None:
    one, whole = town(), town()
    for client in (one.clients[0], one.clients[1]):
        client.measure, client.rounds = fakes.failing, {3}
    settings = sets("input-aware", "rounds.quorum=0.6")
    with pytest.raises(RoundFailed, match=r"round 3: 1 of 3 clients answered, the quorum is 2 .*pauses after round 2"):
        one.conduct(*settings)
    for client in one.clients.values():
        client.measure = None
    assert without_holdings(one.conduct(*settings)) == without_holdings(whole.conduct(*settings))
    assert [r["round"] for r in one.rounds] == [1, 2, 3, 4, 5, 6]


class Killed(BaseException):
    """Stands for a signal: nothing may catch it."""


OVERLAPPING = [
    {"name": "a", "rounds.count": 3},
    {"name": "b", "rounds.count": 3, "start": 2, "clients": [0, 2]},
    {"name": "c", "rounds.count": 2, "start": 5},
]


@pytest.mark.parametrize(
    ("way", "method", "tables"),
    [*((*pair, None) for pair in WAYS), ("input-aware", "flora", OVERLAPPING), ("o-lora", "fedit", OVERLAPPING)],
)
def test_a_run_killed_after_every_round_ends_with_the_same_bytes(
    town: Any, way: str, method: str, tables: Sequence[Mapping[str, Any]] | None
) -> None:
    """The borders of tasks included, and tasks that are open at once; what the log says is the same, bytes too."""
    one, whole = town(), town()
    settings = sets(way, f"method.name={method}", "evaluation.every=1", tables=tables)
    want = encode_state(whole.conduct(*settings))

    def kill(event: dict[str, Any]) -> None:
        if event["event"] == "closed":
            raise Killed

    for _ in range(6):
        with pytest.raises(Killed):
            one.conduct(*settings, stop=kill)
    assert encode_state(one.conduct(*settings)) == want
    assert same(one.rounds) == same(whole.rounds)


def test_a_run_killed_within_rounds_ends_with_the_same_bytes(town: Any) -> None:
    """At one answer after another: in phases that measure and phases that train, at borders and between."""
    one, whole = town(), town()
    settings = sets("input-aware", "method.name=flora")
    want = without_holdings(whole.conduct(*settings))
    answers = sum(n["event"] == "answer" for n in whole.notes)
    kills = 0
    for at in range(1, answers, 4):
        left = {"count": at}

        def kill(event: dict[str, Any], left: dict[str, int] = left) -> None:
            left["count"] -= event["event"] == "answer"
            if left["count"] == 0:
                raise Killed

        try:
            state = one.conduct(*settings, stop=kill)
        except Killed:
            kills += 1
        else:
            break
    state = one.conduct(*settings)
    assert kills >= 3
    assert without_holdings(state) == want
    assert [r["round"] for r in one.rounds] == [1, 2, 3, 4, 5, 6]


def same(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{k: v for k, v in e.items() if k != "seconds"} for e in events]


# ---- what is told ----------------------------------------------------------------------------------------------------


class Scores:
    """A server that scores every task, and notes of which states it did."""

    def __init__(self) -> None:
        self.asked: list[tuple[int, tuple[str, ...]]] = []

    def scores(self, state: GlobalState, names: Sequence[str]) -> dict[str, dict[str, float]]:
        self.asked.append((state.version, tuple(names)))
        return {n: {"correct": 1.0 + state.version, "counted": 10.0, "loss": 2.0, "tokens": 4.0} for n in names}

    def inference(self, state: GlobalState) -> dict[str, dict[str, dict[str, float]]]:
        return {"known": {n: {"score": 0.5, "counted": 10.0} for n in "abc"}}


def test_scores_by_task_at_every_border(town: Any) -> None:
    one, scorer = town(), Scores()
    settings = sets("input-aware", "evaluation.every=1")
    one.conduct(*settings, tasks_evaluator=scorer)
    assert scorer.asked == [(0, ("a", "b", "c"))] + [
        (n, ("a", "b", "c") if n % 2 == 0 else ("aabbcc"[n - 1],)) for n in range(1, 7)
    ]
    events = log.read_log(one.folder)
    [untrained] = [e for e in events if e["event"] == "untrained"]
    assert {n: t["score"] for n, t in untrained["tasks"].items()} == {"a": 0.1, "b": 0.1, "c": 0.1}
    for number, event in enumerate(one.rounds, 1):
        conform(event, log.RoundEvent)
        if number % 2:
            assert "border" not in event
        else:
            border = event["border"]
            conform(border, log.Border)
            assert border["sealed"] == ["abc"[number // 2 - 1]]
            assert sorted(border["own"]) == list("abc"[: number // 2])
            assert {n: t["score"] for n, t in border["server"].items()} == dict.fromkeys("abc", (1 + number) / 10)
            assert ("inference" in border) == (number == 6)
        assert event["evaluation"]["server"]["score"] == pytest.approx((1 + number) / 10)
        assert sorted(event["evaluation"]["clients"]) == [f"client-0000{i}" for i in range(3)]
        assert {c["task"] for c in event["clients"]} == {"aabbcc"[number - 1]}
    json.dumps(one.rounds, allow_nan=False)
    before = len(scorer.asked)
    one.conduct(*settings, tasks_evaluator=scorer)
    assert len(scorer.asked) == before  # a finished run is not scored again


def test_each_task_is_scored_with_its_own_head(town: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = states(monkeypatch)
    one = town()
    one.conduct(*sets("sequential"))
    for header, ask in one.clients[0].seen:
        if header.kind == "evaluate":
            task = seen[header.round].tasks[ask.task]
            np.testing.assert_array_equal(ask.arrays["head:score.weight"], task.extras["score.weight"])
    asked = [(h.round, a.task) for h, a in one.clients[0].seen if h.kind == "evaluate"]
    assert asked == [(2, "a"), (4, "a"), (4, "b"), (6, "a"), (6, "b"), (6, "c")]


def test_the_head_of_the_clients_base_is_where_every_task_begins(town: Any) -> None:
    head = {"score.weight": np.full((3, 5), 0.25, np.float32), "score.bias": np.ones(3, np.float32)}
    one = town(head=head)
    one.conduct(*sets("separate"))
    for header, ask in one.clients[0].seen:
        if header.kind == "train" and header.round % 2:
            np.testing.assert_array_equal(ask.arrays["head:score.weight"], head["score.weight"])


def conform(event: Mapping[str, Any], schema: Any) -> None:
    hints = get_type_hints(schema, include_extras=True)
    assert {k for k, hint in hints.items() if get_origin(hint) is not NotRequired} <= event.keys() <= hints.keys()
