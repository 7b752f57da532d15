"""Clients without a model: numpy stand-ins that follow their plan to the letter, with seeded noise instead of training.

They keep nothing: what a plan wants kept starts in each round as for a client that has kept nothing yet.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedlora.adapter import Array, Factors
from fedlora.config import MethodConfig
from fedlora.errors import MethodError
from fedlora.rng import public_orthonormal, stream
from fedlora.state import Answer, Ask, GlobalState, Layout, LocalTraining, Module, part
from strategies.base import Closed, Cohort, Member, get

__all__ = ["Dense", "Federation", "Took", "cohort_of", "federation", "follow", "opened", "turn"]

Dense = dict[str, NDArray[np.float64]]  # module -> [out, in]
TRAINING = LocalTraining(learning_rate=1e-3, local_steps=1, local_epochs=None, batch_size=1)
SEED = 7


@dataclass(frozen=True, kw_only=True)
class Took:
    """One client's part in a round, in float64; a core is folded into B."""

    examples: int
    under: Dense  # blocks and frozen factors that it was sent
    start: dict[str, Factors]
    trained: dict[str, Factors]
    answer: Answer

    def model(self, pair: Mapping[str, Factors]) -> Dense:
        """W_eff - W0 as this client sees it with its pair at `start` or `trained`."""
        return {n: self.under[n] + f.dense() for n, f in pair.items()}


@dataclass(frozen=True, kw_only=True)
class Federation:
    """Who is enrolled, and how many examples each has, by id."""

    layout: Layout
    members: tuple[Member, ...]
    examples: Mapping[str, int]


def federation(number: int, *, fewest: int = 1, alike: bool = False) -> Federation:
    """The random federation of this number: `fewest` to 5 clients of ranks 1 to 5, scales 0.05 to 20 (all the same if
    `alike`) and 1 to 1,000 examples; modules of 1 to 12 rows and columns, one square, one as small as the top rank.
    """
    rng = stream(number, "federation")
    count = int(rng.integers(fewest, 6))
    ranks = [int(r) for r in rng.integers(1, 6, count)]
    scales = [float(s) for s in np.exp(rng.uniform(np.log(0.05), np.log(20.0), count))]
    if alike:
        ranks, scales = ranks[:1] * count, scales[:1] * count
    top = max(ranks)
    out, inp, side = (int(n) for n in rng.integers(top, 13, 3))
    modules = {
        "any": Module(out=out, inp=inp),
        "hidden-is-rank": Module(out=top, inp=top),
        "square": Module(out=side, inp=side),
    }
    members = tuple(Member(id=f"c{i}", rank=ranks[i], scale=scales[i]) for i in range(count))
    examples = {m.id: int(n) for m, n in zip(members, rng.integers(1, 1001, count), strict=True)}
    return Federation(layout=Layout(modules=modules), members=members, examples=examples)


def opened(settings: MethodConfig, fed: Federation) -> GlobalState:
    """Version 0. Raises: MethodError as the method does."""
    return get(settings.name).open("base", fed.layout, fed.members, settings, SEED)


def cohort_of(settings: MethodConfig, members: Sequence[Member], round_: int) -> Cohort:
    """The cohort of a round in which all of `members` are asked."""
    return Cohort(
        round=round_,
        rounds=round_,
        members=tuple(members),
        settings=settings,
        training=TRAINING,
        seed=SEED,
        progress=(0.0, 1.0),
    )


def turn(
    state: GlobalState,
    settings: MethodConfig,
    fed: Federation,
    round_: int,
    *,
    here: Sequence[str] | None = None,
    same: int | None = None,
    through: Callable[[str, Ask], Ask] = lambda _, ask: ask,
) -> tuple[GlobalState, dict[str, Took]]:
    """One round: all of `fed` are asked, and `here` (or all) answer, in that order. `through` delivers an ask.

    Raises: MethodError as the method does, or if it asks a second time.
    """
    protocol = get(settings.name).protocol(state, cohort_of(settings, fed.members, round_))
    asks = next(protocol)
    took = {c: follow(through(c, asks[c]), fed.layout, fed.examples[c], 0.1, same) for c in here or asks}
    try:
        protocol.send({c: t.answer for c, t in took.items()})
    except StopIteration as end:
        closed: Closed = end.value
        return closed.state, took
    raise MethodError(f"{settings.name} asks more than once in a round, which these stand-ins do not follow")


def follow(ask: Ask, layout: Layout, examples: int, noise: float, seed: int | None = None) -> Took:
    """Do what the plan says; `noise` is the standard deviation of every trained entry's change, drawn from the plan's
    seed or, the same for everybody, from `seed`. Raises: MethodError if there is no plan.
    """
    plan = ask.plan
    if plan is None:
        raise MethodError("a stand-in was asked without a plan, and has nothing to follow")
    rng = stream(plan.seed if seed is None else seed, "stand-in")
    start: dict[str, Array] = {k: x for of in ("head:", "R:") for k, x in ask.arrays.items() if k.startswith(of)}
    for n, m in sorted(layout.modules.items()):
        a: Array = rng.uniform(-1, 1, (plan.rows, m.inp)).astype(np.float32)
        b: Array = np.zeros((m.out, plan.rows), np.float32)
        if plan.a_from == "public":
            a = public_orthonormal(plan.a_seed, "basis", n, rows=plan.rows, cols=m.inp).astype(np.float32)
        elif plan.a_from == "given":
            a = ask.arrays[f"A:{n}"]
        if plan.b_from == "public":
            b = public_orthonormal(plan.a_seed, "basis-b", n, rows=plan.rows, cols=m.out).astype(np.float32).T
        elif plan.b_from == "given":
            b = ask.arrays[f"B:{n}"]
        start[f"A:{n}"], start[f"B:{n}"] = a, b

    trained = {key: np.array(x) for key, x in start.items()}
    sent: dict[str, Array] = {}
    for key, x in trained.items():
        of = key.split(":")[0]
        rows, columns = (slice(plan.rank if of in axis else None) for axis in ("AR", "BR"))
        first = (rows, columns)[: x.ndim]
        if of in plan.train:
            x[first] += np.float32(noise) * rng.standard_normal(x[first].shape, np.float32)
        if of in plan.send:
            sent[key] = x[first] - start[key][first] if of in plan.changes else x[first]

    def pairs(arrays: Mapping[str, Array]) -> dict[str, Factors]:
        a, b, r = ({n: x.astype(np.float64) for n, x in part(arrays, of).items()} for of in ("A", "B", "R"))
        return {n: Factors(x, b[n] @ r[n] if plan.core else b[n], plan.scale) for n, x in a.items()}

    held = [block.adapter for block in ask.blocks] + ([ask.frozen] if ask.frozen is not None else [])
    under = {n: sum((x[n].dense() for x in held), np.zeros((m.out, m.inp))) for n, m in layout.modules.items()}
    answer = Answer(examples=examples, arrays=sent)
    return Took(examples=examples, under=under, start=pairs(start), trained=pairs(trained), answer=answer)
