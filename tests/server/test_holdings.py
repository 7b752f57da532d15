"""What a client is sent: a chain, everything or a snapshot, whichever is the fewest bytes; always the same weights."""

from __future__ import annotations

import numpy as np
import pytest

from fedlora.adapter import Adapter, Factors, stack
from fedlora.config import MethodConfig
from fedlora.errors import CheckpointError
from fedlora.rng import stream
from fedlora.state import Block, GlobalState, Layout, Module
from fedlora.wire import blocks_id
from server.holdings import Holdings, Offer, snapshot
from strategies.base import opened
from strategies.blocks import grown

LAYOUT = Layout(modules={"tall": Module(out=20, inp=12), "square": Module(out=16, inp=16)})


def some(rank: int, *seed: int) -> Adapter:
    rng = stream(3, "holdings", *seed)
    return Adapter(
        {n: Factors(rng.normal(size=(rank, m.inp)), rng.normal(size=(m.out, rank))) for n, m in LAYOUT.modules.items()}
    )


def rounds(count: int, rank: int) -> list[GlobalState]:
    """The states of a run in which every round adds a block of this rank."""
    states = [opened("base", LAYOUT, 0)]
    for r in range(count):
        task = states[-1].open_task
        blocks, _ = grown(states[-1], some(rank, r), MethodConfig())
        states.append(states[-1].with_task(type(task)(name=task.name, blocks=blocks)))
    return states


class Client:
    """Keeps what a real one keeps: the blocks of its last ask, under their id."""

    def __init__(self) -> None:
        self.held: dict[str, tuple[Block, ...]] = {}
        self.received: list[int] = []  # values

    def take(self, offer: Offer) -> dict[str, np.ndarray]:
        self.received.append(sum(f.a.size + f.b.size for b in offer.blocks for f in b.adapter.values()))
        blocks = (self.held[offer.on] if offer.on is not None else ()) + offer.blocks
        assert blocks_id(blocks) == offer.whole
        self.held = {offer.whole: blocks}
        if not blocks:
            return {n: np.zeros((m.out, m.inp)) for n, m in LAYOUT.modules.items()}
        return {n: f.dense() for n, f in stack([b.adapter for b in blocks]).items()}


def ask(holdings: Holdings, client: Client, name: str, state: GlobalState) -> dict[str, np.ndarray]:
    offer = holdings.offer(name, state.open_task.blocks, state.version)
    got = client.take(offer)
    holdings.accepted(name, offer)
    return got


def far(got: dict[str, np.ndarray], want: dict[str, np.ndarray]) -> float:
    off = sum(float(np.sum((got[n] - want[n]) ** 2)) for n in want)
    return float(np.sqrt(off / max(sum(float(np.sum(x**2)) for x in want.values()), 1e-30)))


@pytest.mark.parametrize("joins", range(10))
@pytest.mark.parametrize("rank", [1, 3, 9])
def test_a_client_that_joins_late_ends_with_the_same_weights(joins: int, rank: int) -> None:
    states = rounds(10, rank)
    holdings, always, late = Holdings(), Client(), Client()
    for state in states:
        here = ask(holdings, always, "always", state)
        exact = {n: f.dense() for n, f in state.update().items()}
        assert far(here, exact) < 1e-6
        if state.version >= joins:
            assert far(ask(holdings, late, "late", state), here) < 1e-6


def test_who_was_there_last_round_is_sent_one_block() -> None:
    holdings, client = Holdings(), Client()
    for state in rounds(6, 3):
        ask(holdings, client, "c", state)
    assert client.received == [0] + 6 * [3 * 64]
    assert ask(holdings, client, "c", state)
    assert client.received[-1] == 0


def test_one_that_missed_rounds_is_sent_the_chain_or_a_snapshot_whichever_is_smaller() -> None:
    states = rounds(7, 3)
    holdings, client = Holdings(), Client()
    ask(holdings, client, "c", states[1])
    ask(holdings, client, "c", states[4])  # three blocks of rank 3, and no snapshot could be smaller
    assert client.received[-1] == 3 * 3 * 64
    newcomer = Client()
    ask(holdings, newcomer, "n", states[7])  # stack: rank 21; the compact form: 12 and 16
    assert newcomer.received[-1] == 12 * 32 + 16 * 32
    follows = rounds(8, 3)[8]
    ask(holdings, newcomer, "n", follows)  # what comes after a snapshot goes on top of it
    assert newcomer.received[-1] == 3 * 64


def test_after_recompression_everything_is_sent_once() -> None:
    states = rounds(9, 6)  # 12 can be held twice over: after the fifth round all becomes one block
    holdings, client = Holdings(), Client()
    for state in states:
        ask(holdings, client, "c", state)
    first_again = next(s.version for s in states if s.version > 1 and len(s.open_task.blocks) == 1)
    assert client.received[first_again] == sum(f.a.size + f.b.size for f in states[first_again].update().values())
    assert client.received[first_again + 1] == 6 * 64
    assert max(sum(f.rank for f in (b.adapter["tall"] for b in s.open_task.blocks)) for s in states) <= 24


def test_a_checkpoint_keeps_who_holds_what() -> None:
    states = rounds(5, 2)
    one, client = Holdings(), Client()
    ask(one, client, "c", states[3])
    other = Holdings(one.memory())
    assert other.offer("c", states[4].open_task.blocks, 4) == one.offer("c", states[4].open_task.blocks, 4)
    assert other.offer("c", states[4].open_task.blocks, 4).on is not None
    other.lost("c")
    assert other.offer("c", states[4].open_task.blocks, 4).on is None
    assert bytes(Holdings(one.memory()).memory()["json"]) == bytes(one.memory()["json"])


def test_a_damaged_record_is_refused() -> None:
    with pytest.raises(CheckpointError, match="held blocks cannot be read"):
        Holdings({"json": np.frombuffer(b'{"lists": [], "clients": {"c": 3}}', np.uint8)})


def test_a_snapshot_is_the_smaller_form_of_every_module() -> None:
    parts = [some(7, 1), some(7, 2)]
    small = snapshot(parts)
    assert small.ranks == {"tall": 12, "square": 14}
    whole = stack(parts)
    assert far({n: f.dense() for n, f in small.items()}, {n: f.dense() for n, f in whole.items()}) < 1e-6


def test_a_tight_codec_makes_a_float32_snapshot_dear() -> None:
    state = rounds(7, 3)[7]
    assert len(Holdings().offer("n", state.open_task.blocks, 7).blocks) == 1
    assert len(Holdings(codec="int8").offer("n", state.open_task.blocks, 7).blocks) == 7
