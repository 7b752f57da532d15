"""Clients that keep their blocks on disk, in whole runs: they always have the server's weights, for fewer bytes."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from clients.answer import whole_blocks
from clients.memory import Memory
from fedlora.adapter import stack
from fedlora.errors import BlocksMissing
from fedlora.state import Answer, Ask, GlobalState, Header
from fedlora.wire import encode_answer, encode_state
from server import checkpoint
from server.holdings import OWNER

EVERY = ("method.name=flora", "rounds.count=10", "evaluation.every=1", "rounds.quorum=0.1")
Weights = dict[str, np.ndarray]


def weights(ask: Ask) -> Weights:
    return {n: f.dense() for n, f in stack([b.adapter for b in ask.blocks]).items()} if ask.blocks else {}


@pytest.fixture
def keeper(fakes: Any, tmp_path: Path) -> Any:
    """Makes clients that keep what they were sent, and note the weights that they had at every ask."""

    @dataclass
    class Keeper(fakes.Client):  # type: ignore[name-defined,misc]
        keeps: bool = True
        root: Path = tmp_path / "memory"
        had: dict[tuple[int, str], Weights] = field(default_factory=dict)

        def honest(self, header: Header, ask: Ask) -> Answer:
            answer: Answer = super().honest(header, ask)
            return replace(answer, info={**answer.info, "keeps": self.keeps}) if header.kind == "hello" else answer

        @property
        def memory(self) -> Memory | None:
            return Memory(self.root, "run-1", self.id) if self.keeps else None

        def respond(self, data: bytes) -> Any:
            header, ask = fakes.decode_ask(data, max_bytes=10**8)
            try:
                whole = replace(ask, blocks=whole_blocks(ask, self.memory), on=None)
            except BlocksMissing as error:
                self.down.append((header.round, len(data)))
                info = {"error": type(error).__name__, "message": str(error)}
                return encode_answer(replace(header, kind="error"), Answer(info=info))
            self.had[header.round, header.kind] = weights(whole)
            return super().respond(data)

    return Keeper


def states(monkeypatch: pytest.MonkeyPatch) -> dict[int, GlobalState]:
    """The state after every round, as it is saved."""
    seen: dict[int, GlobalState] = {}
    save = checkpoint.save

    def spy(folder: Path, number: int, state: GlobalState, *, key: bytes | None = None) -> Path:
        seen[number] = state
        return save(folder, number, state, key=key)

    monkeypatch.setattr("server.checkpoint.save", spy)
    return seen


def require_right_weights(lab: Any, seen: dict[int, GlobalState]) -> int:
    """At every ask each client had the server's W_eff to 1e-6; returns how many asks that were."""
    count = 0
    for client in lab.clients.values():
        for (number, kind), got in client.had.items():
            if kind == "hello":
                continue
            want = {n: f.dense() for n, f in seen[number - (kind == "train")].update().items()}
            size = max((float(np.linalg.norm(x)) for x in want.values()), default=0.0)
            for n, x in want.items():
                assert float(np.linalg.norm(got.get(n, 0.0) - x)) <= 1e-6 * max(size, 1e-9)
            count += 1
    return count


def without_holdings(state: GlobalState) -> bytes:
    return encode_state(replace(state, memory={k: v for k, v in state.memory.items() if k != OWNER}))


@pytest.mark.parametrize(
    "sets", [(), ("rounds.fraction=0.4",), ("method.max_rank=3",), ("rounds.fraction=0.4", "seed=3")]
)
def test_clients_that_keep_blocks_have_the_servers_weights(
    lab: Any, keeper: Any, monkeypatch: pytest.MonkeyPatch, sets: tuple[str, ...]
) -> None:
    seen = states(monkeypatch)
    keeping = lab(clients={i: keeper(i, r) for i, r in enumerate((4, 3, 2, 2, 1))})
    state = keeping.conduct(*EVERY, *sets)
    asked = 5 if not sets or "max_rank" in sets[0] else 2
    assert require_right_weights(keeping, seen) == 10 * asked * 2
    forgetful = lab(clients={i: keeper(i, r, keeps=False) for i, r in enumerate((4, 3, 2, 2, 1))})
    assert without_holdings(forgetful.conduct(*EVERY, *sets)) == without_holdings(state)
    assert require_right_weights(forgetful, seen) == 10 * asked * 2
    down = [sum(e["bytes_down"] for e in one.rounds) for one in (keeping, forgetful)]
    assert down[0] < down[1]


def test_a_client_that_lost_its_folder_is_asked_again_with_everything(
    lab: Any, keeper: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = states(monkeypatch)
    one = lab(clients={i: keeper(i, r) for i, r in enumerate((4, 3, 2))})

    def lose(event: dict[str, Any]) -> None:
        if event["event"] == "round" and event["round"] == 4:
            shutil.rmtree(one.clients[1].root / "run-1" / one.clients[1].id)

    state = one.conduct(*EVERY, stop=lose)
    assert [(e["round"], e["client"]) for e in one.notes if e["event"] == "again"] == [(4, "client-00001")]
    assert all(e["refused"] == [] and e["missing"] == [] for e in one.rounds)
    require_right_weights(one, seen)
    twice = [n for r, n in one.clients[1].down if r == 4]
    assert len(twice) == 3  # the ask that failed, the same with all blocks, and the evaluation
    told = next(c for c in one.rounds[3]["clients"] if c["id"] == "client-00001")
    assert told["bytes_down"] == sum(twice)
    undisturbed = lab(clients={i: keeper(i, r, root=one.clients[0].root / "other") for i, r in enumerate((4, 3, 2))})
    assert without_holdings(undisturbed.conduct(*EVERY)) == without_holdings(state)


def test_a_client_that_never_finds_its_blocks_is_refused_by_name(lab: Any, keeper: Any, fakes: Any) -> None:
    one = lab(clients={i: keeper(i, r) for i, r in enumerate((4, 3, 2))})

    def lost(client: Any, header: Header, ask: Ask) -> bytes:
        info = {"error": "BlocksMissing", "message": "nothing is here"}
        return encode_answer(replace(header, kind="error"), Answer(info=info))

    one.clients[2].train = lost
    one.conduct(*EVERY, "rounds.count=2")
    assert one.refusals(2) == [("client-00002", "BlocksMissing", "nothing is here")]


def test_a_resumed_run_sends_what_an_undisturbed_one_sends(lab: Any, keeper: Any) -> None:
    class Killed(Exception):
        pass

    def kill(event: dict[str, Any]) -> None:
        if event["event"] == "answer" and event["round"] == 6:
            raise Killed

    whole = lab(clients={i: keeper(i, r) for i, r in enumerate((4, 3, 2))})
    want = whole.conduct(*EVERY)
    torn = lab(clients={i: keeper(i, r, root=whole.clients[0].root / "torn") for i, r in enumerate((4, 3, 2))})
    with pytest.raises(Killed):
        torn.conduct(*EVERY, stop=kill)
    assert encode_state(torn.conduct(*EVERY)) == encode_state(want)  # who holds what included
    assert [e["bytes_down"] for e in torn.rounds] == [e["bytes_down"] for e in whole.rounds]
