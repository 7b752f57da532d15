"""The law table: every registered method against five laws, on seeded random federations, as Markdown.

    python -m simulations.benchmarks.gallery [--federations 40] [--stale 10]

Clients are numpy stand-ins. What a method should have computed is formed densely, in float64, from what the clients
held and ended with (`oracles.py`): for most the exact mean of the clients' moves, for those that average or truncate
factors their own published rule. Each number is the largest relative error ||got - want||_F / ||want||_F of W_eff - W0,
over all modules together, of any round of any federation.
"""

from __future__ import annotations

import argparse
import importlib
import math
import pkgutil
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial

import numpy as np

import strategies
from fedlora.adapter import Factors
from fedlora.config import MethodConfig
from fedlora.errors import WireError
from fedlora.rng import stream
from fedlora.state import Ask, Block, GlobalState, Header
from fedlora.wire import blocks_id, decode_ask, encode_ask
from server.holdings import Holdings
from simulations.benchmarks.oracles import OWN, ended, moves, off
from simulations.benchmarks.stand_in import Dense, Federation, Took, federation, opened, turn
from strategies.base import METHODS

ROUNDS, LATE_ROUNDS, JOINS = 3, 10, 7
COLUMNS = ("order", "fixed point", "oracle", "partial", "stale client", "bias")
NOTES = f"""
Errors are the largest of all federations and rounds; 0 is exactly 0. W_eff is compared, and under fedsa-lora the shared
A: its B stays with the clients, so there is no common W_eff, and no bias either (-).

- order: the answers of the third round arrive in another order.
- fixed point: clients of one rank and scale return the same factors, and W_eff is what each of them had.
- oracle: 1 to 5 clients of ranks 1 to 5, scales 0.05 to 20 and 1 to 1,000 examples, random shapes, {ROUNDS} rounds.
  Not marked: W_eff moves by sum p_k (what client k's W_eff moved by). Marked *: theory says that the method is not that
  mean, because it averages or truncates factors, so it is compared with its own formula. fedit: zero-padded mean(B)
  mean(A). hetlora: the same with weights ||s_k B_k A_k||. flexlora: SVD of sum p_k s_k B_k A_k, cut at the largest
  enrolled rank. lora-fair: ridge regression of B on the exact mean. frlora: W_eff + mean(B) mean(A) - B0 A0.
  fedsa-lora: mean of A.
- partial: the same with a random part of 2 to 5 clients answering each round; p_k is over those who did.
- stale client: joins at round {JOINS} of {LATE_ROUNDS}. What it starts from, from then on and after the last round,
  against a client that was always there and against the server's own W_eff; every ask goes through server.holdings and
  is encoded and decoded by fedlora.wire. (hetlora without pruning: who prunes hangs on the past, and differs.)
- bias: not an error. Median of ||W_eff - sum p_k W_k|| / ||sum p_k W_k|| in the last round of 2 clients or
  more, W_k what client k ended with. Inputs are noise, which tells what is exact, not how much the rest matters.
"""


def every_case() -> list[MethodConfig]:
    """Every registered method at its defaults, and the variants that change what is computed."""
    for found in pkgutil.iter_modules(strategies.__path__):
        importlib.import_module(f"strategies.{found.name}")
    variants = [MethodConfig(name="flora", warm_start=True), MethodConfig(name="fed-sb", basis="random")]
    return sorted([MethodConfig.model_validate({"name": name}) for name in METHODS] + variants, key=label)


def label(case: MethodConfig) -> str:
    return case.name + (" warm" if case.warm_start else "") + (f" {case.basis}" if case.basis else "")


def learnt(state: GlobalState, case: MethodConfig) -> Dense:
    """What is compared: W_eff - W0, or the shared A of a personal method."""
    if METHODS[case.name].personal and state.open_task.pair is not None:
        return {n: f.a.astype(np.float64) for n, f in state.open_task.pair.items()}
    return {n: f.dense() for n, f in state.update().items()}


def seen(took: Took, pair: Mapping[str, Factors], case: MethodConfig) -> Dense:
    """The same at one client, with its pair at the start or trained."""
    return {n: f.a.astype(np.float64) for n, f in pair.items()} if METHODS[case.name].personal else took.model(pair)


def after(case: MethodConfig, fed: Federation, rounds: int) -> GlobalState:
    state = opened(case, fed)
    for t in range(1, rounds + 1):
        state = turn(state, case, fed, t)[0]
    return state


def order(case: MethodConfig, number: int) -> float:
    fed = federation(number, fewest=2)
    state, ids = after(case, fed, ROUNDS - 1), [m.id for m in fed.members]
    shuffled = [ids[i] for i in stream(number, "arrival").permutation(len(ids))]
    plain, other = (turn(state, case, fed, ROUNDS, here=here)[0] for here in (ids, shuffled))
    return off(learnt(other, case), learnt(plain, case))


def fixed_point(case: MethodConfig, number: int) -> float:
    fed = federation(number, alike=True)
    state, took = turn(after(case, fed, ROUNDS - 1), case, fed, ROUNDS, same=number)
    return max(off(learnt(state, case), seen(t, t.trained, case)) for t in took.values())


def oracle(case: MethodConfig, number: int, *, some: bool = False) -> tuple[float, float]:
    """The largest error of all rounds, and the bias of the last one; nan for one client or a personal method."""
    fed = federation(number, fewest=2 if some else 1)
    ids, top = [m.id for m in fed.members], max(m.rank for m in fed.members)
    rng, state = stream(number, "who answers"), opened(case, fed)
    want, worst, bias = learnt(state, case), 0.0, 0.0
    for t in range(1, ROUNDS + 1):
        here = [ids[i] for i in rng.permutation(len(ids))[: rng.integers(1, len(ids))]] if some else ids
        state, took = turn(state, case, fed, t, here=here)
        group = [took[c] for c in sorted(took)]
        want = OWN.get(case.name, moves)(want, group, top)
        worst = max(worst, off(learnt(state, case), want))
        common = len(ids) > 1 and not METHODS[case.name].personal
        bias = off(learnt(state, case), ended(group)) if common else math.nan
    return worst, bias


class Post:
    """Server and clients as far as blocks are concerned: who holds what, and every ask as the bytes of a message."""

    def __init__(self) -> None:
        self._holdings = Holdings()
        self._held: dict[str, tuple[str, tuple[Block, ...]]] = {}

    def deliver(self, state: GlobalState, client: str, ask: Ask) -> Ask:
        """The ask as this client has it in the end. Raises: WireError if the blocks are not those meant."""
        offer = self._holdings.offer(client, ask.blocks, state.version)
        header = Header(run="gallery", round=state.version + 1, client=client, kind="train", version=state.version)
        message = encode_ask(header, replace(ask, blocks=offer.blocks, on=offer.on, whole=offer.whole))
        got = decode_ask(message, max_bytes=2**30)[1]
        which, held = self._held.get(client, (None, ()))
        blocks = got.blocks if got.on is None else held + got.blocks
        if got.on not in (None, which) or blocks_id(blocks) != got.whole:
            raise WireError(f"{client} was sent blocks on top of {got.on}, holds {which}, and cannot make {got.whole}")
        self._held[client] = got.whole, blocks
        self._holdings.accepted(client, offer)
        return replace(got, blocks=blocks)


def stale(case: MethodConfig, number: int) -> float:
    """A twin of the largest client that joins late, against it and against the server."""
    fed = federation(number, fewest=2)
    always = max(fed.members, key=lambda m: m.rank)
    late = replace(always, id="late")
    whole = replace(fed, members=(*fed.members, late), examples={**fed.examples, "late": 100})
    case = case.model_copy(update={"prune": 1.0}) if case.name == "hetlora" else case
    state, post, worst = opened(case, whole), Post(), 0.0
    for t in range(1, LATE_ROUNDS + 2):
        before = state
        state, took = turn(state, case, whole if t >= JOINS else fed, t, through=partial(post.deliver, before))
        if t >= JOINS:
            one, other = (seen(took[m.id], took[m.id].start, case) for m in (late, always))
            worst = max(worst, off(one, other), off(one, learnt(before, case)))
    return worst


def row(case: MethodConfig, numbers: Sequence[int], late: Sequence[int]) -> list[float]:
    """The numbers of `COLUMNS` over the federations of these numbers; nan where there is nothing to say."""
    whole = [oracle(case, i) for i in numbers]
    return [
        max(order(case, i) for i in numbers),
        max(fixed_point(case, i) for i in numbers),
        max(error for error, _ in whole),
        max(oracle(case, i, some=True)[0] for i in numbers),
        max(stale(case, i) for i in late),
        statistics.median([bias for _, bias in whole if not math.isnan(bias)] or [math.nan]),
    ]


def shown(x: float) -> str:
    return "-" if math.isnan(x) else f"{x:.0e}" if 0 < x < 1e-3 else f"{x:.2g}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--federations", type=int, default=40)
    parser.add_argument("--stale", type=int, default=10, help="federations for the stale client")
    options = parser.parse_args()
    print(f"| {options.federations} federations, {options.stale} for the stale client | " + " | ".join(COLUMNS) + " |")
    print("|---" * (1 + len(COLUMNS)) + "|")
    for case in every_case():
        numbers = [shown(x) for x in row(case, range(options.federations), range(options.stale))]
        for i in (2, 3):
            numbers[i] += "*" if case.name in OWN else ""
        print(f"| `{label(case)}` | " + " | ".join(numbers) + " |", flush=True)
    print(NOTES)


if __name__ == "__main__":
    main()
