"""Server optimisers over any method that allows them: FedAvgM, FedAdam and FedYogi as wrappers.

With x what the method moves and d = x_next - x the mean change of a round, as the method itself computes it:

    momentum:    m = beta1 m + d                                    x <- x + rate m
    adam:        m = beta1 m + (1 - beta1) d                        x <- x + rate m' / (sqrt(v') + tau)
                 v = beta2 v + (1 - beta2) d^2
    yogi:        v = v - (1 - beta2) d^2 sign(v - d^2)              the rest as adam
    where        m' = m / (1 - beta1^t),  v' = v / (1 - beta2^t),   t = the steps taken, this one included

Hsu et al., "Measuring the Effects of Non-Identical Data Distribution for Federated Visual Classification", 2019
(FedAvgM); Reddi et al., "Adaptive Federated Optimization", ICLR 2021, Algorithm 2 (FedAdam, FedYogi).

Where we differ. Algorithm 2 corrects no bias and starts at v = tau^2; we start at 0 and correct, as Kingma and Ba do
(Adam, ICLR 2015, Algorithm 1). A federated run has few rounds: without the correction m would have less than half its
size after 6 of them at beta1 = 0.9, and the size of early steps would hang on tau. For yogi, whose v does not decay
geometrically, the correction is exact in the first step; at a steady d it then overstates v, by 1.6 times at most, and
steps are a fifth shorter at worst. t is kept with the moments and counts steps, not rounds: a round that failed, was
repeated or sampled nobody is no step, and a resume changes nothing.

Where it is allowed. Moments of single entries mean something only where entries keep their meaning:

- in coordinates: B of ffa-lora (A is frozen and common), the core R of fed-sb (both bases are frozen), A of fedsa-lora
  (each B stays at its client), and the head with every method below. A padded column that few clients train moves by
  a diluted mean, and adam and yogi undo that dilution, since they divide by the size of what they see;
- in product space: momentum over flora and frlora, whose round is one new frozen block. m is then a factored product,
  m = beta1 m + the round's update, stacked and recompressed to rank min(out, in), which loses nothing, or to
  `method.max_rank`; the block that enters the state is rate m. What a method remembers of its own update, as the warm
  start of flora does, stays its own. Second moments of a product's entries have no factored form.

The others are refused by name: (B M)(M^-1 A) = B A for every invertible M, so the entries of factors that both move are
not the model's; and where a basis is chosen anew (rolora, fedsvd, flexlora), old moments belong to the old one.

What changes in the laws of `strategies/base.py`: with beta1 > 0 a round in which nobody learnt anything (3), or all
agree (2), still moves by what the moments carry, and the head (7) by the optimiser's step. The rest hold. All is a
function of the aggregate: no client reveals more than without it. A steady d moves the model by rate / (1 - beta1) of
itself a round under momentum, and by about `rate` in every entry under adam and yogi.

Cost. In coordinates: one array (momentum) or two (adam, yogi) of what moves, float32, at the server; nothing more
travels. In product space, per module, with S the ranks of a round and R that of m: time O((out + in) (R + S)^2), memory
(out + in) R float32, and down a block of rank up to min(R + S, out, in, method.max_rank) where it was one of rank S.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedlora.adapter import Adapter, Array, Factors, norm, stack, truncated
from fedlora.config import ServerConfig
from fedlora.errors import MethodError
from fedlora.state import GlobalState
from strategies.base import Closed, Cohort, Method, Round, keyed, pair_arrays, pair_from, part
from strategies.blocks import Stepped, as_float32
from strategies.fed_sb import NAME as FED_SB
from strategies.fed_sb import with_cores

__all__ = ["COORDINATES", "OWNER", "PRODUCTS", "basis", "optimised", "pair_mistake", "trained", "with_trained"]

OWNER = "server"  # in GlobalState.memory
COORDINATES = ("fed-sb", "fedsa-lora", "ffa-lora")  # what moves has one shape and one basis
PRODUCTS = ("flora", "frlora")  # a round is one new frozen block
RATES: Mapping[str, float] = {"momentum": 1.0, "adam": 1e-2, "yogi": 1e-2}
_FREE = "A and B are free up to an invertible M, (B M)(M^-1 A) = B A, so moments of their entries mean nothing"
_REASONS: Mapping[str, str] = {
    "fedex-lora": _FREE,
    "fedit": _FREE,
    "fedsvd": "A is rotated after every round, and moments of B belong to the A of their round",
    "flexlora": "every round takes both factors from a new SVD, and moments belong to the factors of their round",
    "flora": "every round adds a new block, and second moments of a product's entries have no factored form",
    "frlora": "every round adds a new block, and second moments of a product's entries have no factored form",
    "hetlora": _FREE,
    "lora-fair": _FREE,
    "rolora": "A and B take turns, and moments of one belong to the values that the other had",
}


def pair_mistake(method: str, optimizer: str) -> str | None:
    """Why this server optimiser cannot go with this method, and which pairs can; None if it can."""
    if optimizer == "none" or method in COORDINATES or (optimizer == "momentum" and method in PRODUCTS):
        return None
    reason = _REASONS.get(method, "it is not known to move arrays of one shape in one basis")
    return (
        f"{optimizer} does not go with {method}: {reason}. adam, yogi and momentum go with {_listed(COORDINATES)}; "
        f"momentum also with {_listed(PRODUCTS)}"
    )


def optimised(method: Method, settings: ServerConfig) -> Method:
    """The same method, whose move of every round is replaced by the server optimiser's step; itself under "none".

    Each report gains `server_step_norm`, the L2 norm of the step over all entries that the optimiser moves (in product
    space: of the product), and momentum over products `server_velocity_rank` and `server_velocity_error`, a bound on
    the Frobenius error that recompression left in m; rate times that is part of `truncation_error`. A round that chose
    the basis (the first of fed-sb, with `method.basis = update`) is taken as it is and is no step.
    Raises: MethodError for a method that the optimiser cannot go with; in a round, as the method does, or if the
    memory holds moments of other arrays.
    """
    mistake = pair_mistake(method.name, settings.optimizer)
    if mistake is not None:
        raise MethodError(mistake)
    if settings.optimizer == "none":
        return method

    def protocol(state: GlobalState, cohort: Cohort) -> Round:
        kept = state.memory.get(OWNER, {})
        if method.name not in PRODUCTS:
            closed: Closed = yield from method.protocol(state, cohort)
            return _moved_in_coordinates(method.name, settings, kept, state, closed)
        velocity = _Velocity(kept, settings, cohort.settings.max_rank)
        closed = yield from method.protocol(Stepped(**_fields(state), step=velocity), cohort)
        if velocity.steps != 1:
            raise MethodError(
                f"{method.name}: momentum needs each round to add one update through strategies.blocks.grown, and this "
                f"one added {velocity.steps}"
            )
        closed = replace(closed, state=GlobalState(**_fields(closed.state)))
        return _moved_in_coordinates(method.name, settings, kept, state, closed, velocity)

    return replace(method, protocol=protocol)


def trained(method: str, state: GlobalState) -> dict[str, Array]:
    """What the optimiser moves entry by entry, under the keys of the wire (`A:module`, `B:module`, `R:module`,
    `head:name`): what the method trains in a fixed basis, as far as the state has it, and the head.
    """
    task = state.open_task
    arrays = keyed("head", task.extras)
    if method == FED_SB:
        arrays |= keyed("R", part(state.memory.get(FED_SB, {}), "R"))
    elif method in COORDINATES and task.pair is not None:
        pair = pair_arrays(task.pair)
        arrays |= keyed("A", part(pair, "A")) if method == "fedsa-lora" else keyed("B", part(pair, "B"))
    return arrays


def with_trained(method: str, state: GlobalState, arrays: Mapping[str, Array]) -> GlobalState:
    """The same version of the state with these values in place of those that `trained` found."""
    task, cores = replace(state.open_task, extras=part(arrays, "head")), part(arrays, "R")
    a, b = part(arrays, "A"), part(arrays, "B")
    if task.pair is not None and (a or b):
        pair = {n: Factors(a.get(n, f.a), b.get(n, f.b), f.scale) for n, f in task.pair.items()}
        task = replace(task, pair=Adapter(pair))
    state = replace(state, tasks={**state.tasks, task.name: task})
    return with_cores(state, cores) if cores else state


def basis(method: str, state: GlobalState) -> dict[str, Array]:
    """The frozen factors in which the entries of `trained` have their meaning, as far as the state has them."""
    pair = state.open_task.pair
    if pair is None or method not in (FED_SB, "ffa-lora"):
        return {}
    bases = keyed("A", {n: f.a for n, f in pair.items()})
    return bases | keyed("B", part(state.memory.get(FED_SB, {}), "B"))


def _moved_in_coordinates(
    method: str,
    settings: ServerConfig,
    kept: Mapping[str, Array],
    before: GlobalState,
    closed: Closed,
    velocity: _Velocity | None = None,
) -> Closed:
    """The closed round with the optimiser's step in place of its own move of arrays, and the moments in its memory."""
    old, new = trained(method, before), trained(method, closed.state)
    if not _equal(basis(method, before), basis(method, closed.state)):
        others = {owner: arrays for owner, arrays in closed.state.memory.items() if owner != OWNER}
        return replace(closed, state=replace(closed.state, memory=others))
    moments = _Moments.of(kept, new, settings)
    arrays, size = {}, 0.0
    for key, x in old.items():
        step = moments.step(key, new[key].astype(np.float64) - x.astype(np.float64))
        arrays[key] = (x.astype(np.float64) + step).astype(new[key].dtype)
        size = math.hypot(size, float(np.linalg.norm(step)))
    mine, report = moments.arrays(), {"server_step_norm": size}
    if velocity is not None:
        mine |= velocity.arrays()
        report = velocity.report(size)
    state = with_trained(method, closed.state, arrays)
    return replace(
        closed,
        state=replace(state, memory={**state.memory, OWNER: mine}),
        report={**closed.report, **report},
    )


@dataclass
class _Moments:
    """The moments of named arrays during one step; `taken` steps were taken before."""

    settings: ServerConfig
    taken: int
    first: dict[str, NDArray[np.float64]]
    second: dict[str, NDArray[np.float64]]

    @classmethod
    def of(cls, kept: Mapping[str, Array], arrays: Mapping[str, Array], settings: ServerConfig) -> _Moments:
        """Read from the memory; zeros at the first step. Raises: MethodError if they belong to other arrays."""
        names = "m" if settings.optimizer == "momentum" else "mv"
        want = {f"{of}:{key}": x.shape for of in names for key, x in arrays.items()}
        have = {key: x.shape for key, x in kept.items() if key[:2] in ("m:", "v:")}
        if kept and have != want:
            odd = sorted(key for key in want.keys() | have.keys() if want.get(key) != have.get(key))
            raise MethodError(
                f"server.optimizer = {settings.optimizer}: the memory of the server holds moments of other arrays "
                f"(first {odd[0]}: {have.get(odd[0], 'none')}, needed {want.get(odd[0], 'none')}). Was this run opened "
                "with another optimiser or for another task? Start a new run, or drop the memory of 'server'"
            )
        read = {key: kept[key].astype(np.float64) if kept else np.zeros(shape) for key, shape in want.items()}
        first, second = ({key[2:]: x for key, x in read.items() if key[0] == of} for of in "mv")
        return cls(settings, int(kept["steps"][0]) if kept else 0, first, second)

    def step(self, key: str, d: NDArray[np.float64]) -> NDArray[np.float64]:
        """The step of one array, whose mean change is `d`; float64."""
        s, t = self.settings, self.taken + 1
        rate = RATES[s.optimizer] if s.rate is None else s.rate
        if s.optimizer == "momentum":
            self.first[key] = s.beta1 * self.first[key] + d
            return rate * self.first[key]
        m, v = s.beta1 * self.first[key] + (1.0 - s.beta1) * d, self.second[key]
        if s.optimizer == "adam":
            v = s.beta2 * v + (1.0 - s.beta2) * d**2
        else:
            v = v - (1.0 - s.beta2) * d**2 * np.sign(v - d**2)
        self.first[key], self.second[key] = m, v
        step: NDArray[np.float64] = rate * (m / (1.0 - s.beta1**t)) / (np.sqrt(v / (1.0 - s.beta2**t)) + s.tau)
        return step

    def arrays(self) -> dict[str, Array]:
        """What the memory keeps: the moments in float32, and the number of steps taken as `steps`, `[1]` float64."""
        found: dict[str, Array] = {"steps": np.array([self.taken + 1.0])}
        for of, moments in (("m", self.first), ("v", self.second)):
            found |= {f"{of}:{key}": x.astype(np.float32) for key, x in moments.items()}
        return found


class _Velocity:
    """Momentum of products: takes one round's update, gives rate m, and keeps m at a bounded rank.

    `error` bounds the Frobenius error of m: what recompression and the updates themselves left out, decayed as m is.
    """

    def __init__(self, kept: Mapping[str, Array], settings: ServerConfig, max_rank: int | None) -> None:
        self.steps = 0
        self._beta, self._max_rank = settings.beta1, max_rank
        self._rate = RATES["momentum"] if settings.rate is None else settings.rate
        self._old = pair_from(kept) if kept else None
        self._error = float(kept["error"][0]) if kept else 0.0
        self._norm = 0.0
        self._new = Adapter({})

    def __call__(self, update: Adapter, lost: float) -> tuple[Adapter, float]:
        """(rate m, a bound on its Frobenius error); m enters the state before it is recompressed for the memory."""
        self.steps += 1
        m, error = update, lost
        if self._old is not None and self._beta > 0.0:
            m, error = stack([self._old.scaled(self._beta), update]), self._beta * self._error + lost
        bounds = {n: min([*f.shape, self._max_rank or max(f.shape)]) for n, f in m.items()}
        small, cut = truncated(m, bounds)
        self._new, self._error = as_float32(small), error + cut
        whole = m.scaled(self._rate)
        self._norm = norm(whole)
        return whole, self._rate * error

    def arrays(self) -> dict[str, Array]:
        """What the memory keeps: m as `A:module` and `B:module` in float32, and its error as `error`, `[1]` float64."""
        return {**pair_arrays(self._new), "error": np.array([self._error])}

    def report(self, head: float) -> dict[str, float]:
        """The facts of this step; `head` is the norm of what the head moved."""
        return {
            "server_step_norm": math.hypot(self._norm, head),
            "server_velocity_rank": float(max(self._new.ranks.values())),
            "server_velocity_error": self._error,
        }


def _fields(state: GlobalState) -> dict[str, Any]:
    return {f.name: getattr(state, f.name) for f in fields(GlobalState)}


def _equal(old: Mapping[str, Array], new: Mapping[str, Array]) -> bool:
    return old.keys() == new.keys() and all(np.array_equal(x, new[key]) for key, x in old.items())


def _listed(names: tuple[str, ...]) -> str:
    return ", ".join(names[:-1]) + " and " + names[-1]
