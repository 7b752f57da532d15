"""What is spent: releases as events, the epsilon they come to at a delta, and the noise that a target epsilon needs.

The neighbouring relation is everywhere *add or remove one*: one client (client level) or one training row (example
level) more or less. A release is Gaussian noise on a sum whose L2 norm one unit changes by at most the sensitivity;
`noise_multiplier` is the noise's standard deviation over it. Its units are drawn by Poisson sampling: each with
probability `sampling`, by itself, without a look at the others.

Epsilon is that of privacy loss distributions (Koskela et al., AISTATS 2020; Doroshenko et al., PoPETs 2022), by the
package dp-accounting, which rounds upwards: an upper bound, tight to about 1/1000. Without sampling it is the closed
form of Balle and Wang (ICML 2018), which is exact and, since sampling never hurts under this relation, an upper bound
with sampling too. No RDP, which is 5 to 27 % above.
"""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from fedlora.errors import ConfigError

__all__ = [
    "ACCOUNTANT",
    "RELATION",
    "Event",
    "Privacy",
    "Unit",
    "advice",
    "epsilon",
    "gaussian_delta",
    "gaussian_epsilon",
    "noise_multiplier",
    "require_poisson",
    "within",
]

Unit = Literal["client", "example"]
RELATION = "add-or-remove-one"
ACCOUNTANT = "dp-accounting PLD; closed form without sampling"
MEANINGFUL = 10.0  # above, a guarantee is weak: Ponomareva et al. 2023 (arXiv 2303.00654), section 5.2.1
COARSE = 1e-2  # the widest grid of privacy losses
STEEP = 40.0  # sensitivity over noise above which even that grid is too long


@dataclass(frozen=True, kw_only=True)
class Event:
    """`times` releases of Gaussian noise, each on a Poisson sample. Not `released`: a null release.

    A null release let nothing out (an empty or small cohort) and is charged in full: that nothing came depends on who
    was drawn. Raises: ConfigError for a number out of its range.
    """

    noise_multiplier: float
    sampling: float = 1.0
    times: int = 1
    released: bool = True

    def __post_init__(self) -> None:
        _check_noise(self.noise_multiplier)
        _check_sampling(self.sampling)
        if self.times < 1:
            raise ConfigError(f"an event happens at least once, got {self.times} times")

    def to_json(self) -> dict[str, Any]:
        return {
            "kind": "gaussian",
            "noise_multiplier": self.noise_multiplier,
            "sampling": self.sampling,
            "times": self.times,
            "released": self.released,
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Event:
        """Raises: ConfigError for another kind of event, e.g. of fixed-size samples, or a missing or wrong field."""
        fields = dict(data)
        if (kind := fields.pop("kind", None)) != "gaussian":
            raise ConfigError(f"an event must be of kind 'gaussian', got {kind!r}; did another version write it?")
        want = {"noise_multiplier": float, "sampling": float, "times": int, "released": bool}
        if {name: type(value) for name, value in fields.items()} != want:
            raise ConfigError(f"an event has the fields {sorted(want)}, got {fields}")
        return cls(**fields)


@dataclass(frozen=True, kw_only=True)
class Privacy:
    """Example-level privacy of one client's local training; all four are public, and the same whatever rows it has.

    `clip`: the L2 norm that one row's gradient is clipped to, over all that is trained. `noise_multiplier`: the noise
    on a step's sum over `clip`. `sampling`: the probability with which a row takes part in a step. `expected`: how many
    rows a step expects, which its sum is divided by; a plan's number, never the drawn one.
    Raises: ConfigError for a number out of its range.
    """

    clip: float
    noise_multiplier: float
    sampling: float
    expected: float

    def __post_init__(self) -> None:
        _check_noise(self.noise_multiplier)
        _check_sampling(self.sampling)
        for name, value in (("clip", self.clip), ("expected rows of a step", self.expected)):
            if not (math.isfinite(value) and value > 0.0):
                raise ConfigError(f"the {name} must be finite and above 0, got {value}")

    def event(self, steps: int) -> Event:
        """What so many steps of this training cost."""
        return Event(noise_multiplier=self.noise_multiplier, sampling=self.sampling, times=steps)


def require_poisson(scheme: str) -> None:
    """Raises: ConfigError unless units are drawn by Poisson sampling.

    Under add-or-remove-one a sample of fixed size is not even defined (all others' chances change), and accountants
    for it assume that one unit is *replaced*, which doubles the sensitivity; some forget to.
    """
    if scheme != "poisson":
        raise ConfigError(
            f"sampling {scheme!r} is refused: epsilon is counted for Poisson sampling under {RELATION}; in a sample of "
            "fixed size one unit more changes the chances of all others, and the number would be wrong. Use 'poisson'"
        )


def epsilon(events: Iterable[Event], delta: float) -> float:
    """Epsilon at `delta` of all these releases together, each chosen after those before or not; 0.0 for none.

    Cost: where there is sampling, 0.1 to 1 s for each different (noise, sampling), whatever their number; the first
    such call loads dp-accounting, which takes seconds. Raises: ConfigError unless 0 < delta < 1.
    """
    counts = _counts(events)
    bound = gaussian_epsilon(_mu(counts), delta)
    unsampled = _mu({key: times for key, times in counts.items() if key[1] == 1.0})
    sampled = [1.0 / z for z, q in counts if q < 1.0]
    if not sampled or max(unsampled, *sampled) > STEEP:
        return bound
    key = tuple(sorted(counts.items()))
    rough = _pld_epsilon(key, delta, COARSE)
    return min(bound, _pld_epsilon(key, delta, _width(counts, unsampled, rough)))


def within(events: Iterable[Event], delta: float, budget: float) -> bool:
    """Whether `epsilon(events, delta) <= budget`; at once where the closed form settles it."""
    events = tuple(events)
    return gaussian_epsilon(_mu(_counts(events)), delta) <= budget or epsilon(events, delta) <= budget


@functools.lru_cache(maxsize=256)
def noise_multiplier(target: float, delta: float, *, sampling: float = 1.0, times: int = 1) -> float:
    """The smallest noise multiplier, to 1/1000, with which `times` releases stay within epsilon `target`.

    The result is on the safe side: `epsilon` of it is at most `target`. Cost: some ten calls of `epsilon`; remembered.
    Raises: ConfigError for a number out of its range, or a target below 0.01 that needs more noise than 10^6.
    """
    _check_delta(delta)
    if not (math.isfinite(target) and target > 0.0):
        raise ConfigError(f"a target epsilon must be finite and above 0, got {target}")

    def spent(z: float) -> float:
        return epsilon([Event(noise_multiplier=z, sampling=sampling, times=times)], delta)

    enough = math.sqrt(times) / _gaussian_mu(target, delta) * 1.002
    if enough > 1e6 or spent(enough) > target:
        raise ConfigError(f"epsilon {target:g} at delta {delta:g} needs a noise multiplier above 10^6: nothing is left")
    little = enough
    while spent(little) <= target:
        enough, little = little, little / 2.0
    while enough > 1.001 * little:
        middle = math.sqrt(enough * little)
        enough, little = (middle, little) if spent(middle) <= target else (enough, middle)
    return enough


def gaussian_delta(mu: float, epsilon: float) -> float:
    """Delta at `epsilon` of one Gaussian release whose sensitivity is `mu` times its noise, exactly.

    Phi(mu/2 - eps/mu) - e^eps Phi(-mu/2 - eps/mu): Balle and Wang, ICML 2018 (arXiv 1805.06530), theorem 8. Releases
    with noise multipliers z_i are as one of mu = sqrt(sum 1/z_i^2).
    """
    from scipy.special import log_ndtr

    if mu == 0.0:
        return 0.0
    first, second = log_ndtr(mu / 2.0 - epsilon / mu), epsilon + log_ndtr(-mu / 2.0 - epsilon / mu)
    return float(math.exp(first) * -math.expm1(min(second - first, 0.0)))


def gaussian_epsilon(mu: float, delta: float) -> float:
    """The epsilon at which `gaussian_delta(mu, epsilon)` is `delta`; 0.0 where it is less at epsilon 0.

    Raises: ConfigError unless 0 < delta < 1 and mu is finite and not negative.
    """
    _check_delta(delta)
    if not (math.isfinite(mu) and mu >= 0.0):
        raise ConfigError(f"a sensitivity over its noise must be finite and not negative, got {mu}")
    if gaussian_delta(mu, 0.0) <= delta:
        return 0.0
    low, high = 0.0, 1.0
    while gaussian_delta(mu, high) > delta:
        low, high = high, 2.0 * high
    return _bisect(lambda e: gaussian_delta(mu, e) > delta, low, high)


def advice(unit: Unit, population: int, events: Iterable[Event], delta: float) -> str:
    """What is wrong with these settings, in plain sentences; empty if nothing is.

    `population`: clients at client level, rows of the smallest client at example level.
    """
    events = tuple(events)
    spent = epsilon(events, delta)
    who, what = ("clients", "client") if unit == "client" else ("rows", "example")
    said = []
    if delta * population >= 1.0:
        said.append(
            f"delta {delta:g} is not below 1/{population}: giving away one of {population} {who} whole would be "
            f"allowed; use {0.1 / population:.2g}"
        )
    if spent > MEANINGFUL:
        told = f"{population} {who}, {what} level: epsilon {spent:.1f} at delta {delta:g} promises next to nothing"
        cure = "use example level" if unit == "client" else "use more noise, fewer steps or a smaller sampling"
        said.append(f"{told}; {cure}")
    if (least := min((e.sampling for e in events), default=1.0)) * population < 1.0:
        said.append(f"sampling {least:g} of {population} {who}: most releases will be noise alone")
    return "".join(f"{sentence}. " for sentence in said).rstrip()


def _counts(events: Iterable[Event]) -> Counter[tuple[float, float]]:
    """How often each (noise multiplier, sampling) happens."""
    counts: Counter[tuple[float, float]] = Counter()
    for event in events:
        counts[event.noise_multiplier, event.sampling] += event.times
    return counts


def _mu(counts: Mapping[tuple[float, float], int]) -> float:
    """Sensitivity over noise of the one Gaussian release that all these come to without sampling."""
    return math.sqrt(sum(times / z**2 for (z, _), times in counts.items()))


def _width(counts: Mapping[tuple[float, float], int], unsampled: float, rough: float) -> float:
    """A grid of a twentieth of the smallest standard deviation of a release's privacy loss: an error of about 1/1000.

    That of a sampled release is about q sqrt(e^(1/z^2) - 1). Never so fine that epsilon, `rough` or below, is more than
    200,000 cells. More releases never make it finer, so that fewer of them never come to more.
    """
    losses = [q * math.sqrt(math.expm1(min(z**-2, 100.0))) for z, q in counts if q < 1.0]
    return min(COARSE, max(min([*losses, *([unsampled] if unsampled else [])]) / 20.0, rough / 2e5))


@functools.lru_cache(maxsize=1024)
def _pld_epsilon(counts: tuple[tuple[tuple[float, float], int], ...], delta: float, width: float) -> float:
    import dp_accounting  # loads for seconds
    from dp_accounting.pld import PLDAccountant

    accountant = PLDAccountant(dp_accounting.NeighboringRelation.ADD_OR_REMOVE_ONE, width)
    whole = _mu({key: times for key, times in counts if key[1] == 1.0})
    if whole:
        accountant.compose(dp_accounting.GaussianDpEvent(1.0 / whole))
    for (z, q), times in counts:
        if q < 1.0:
            accountant.compose(dp_accounting.PoissonSampledDpEvent(q, dp_accounting.GaussianDpEvent(z)), times)
    return float(accountant.get_epsilon(delta))


def _gaussian_mu(target: float, delta: float) -> float:
    """The largest mu whose epsilon at `delta` is at most `target`."""
    high = 1.0
    while gaussian_delta(high, target) <= delta:
        high *= 2.0
    return _bisect(lambda mu: gaussian_delta(mu, target) <= delta, 0.0, high)


def _bisect(below: Callable[[float], bool], low: float, high: float) -> float:
    """Where `below` turns from true to false, to the last bits; from the side of `high` by less than one."""
    for _ in range(200):
        middle = (low + high) / 2.0
        if middle in (low, high):
            break
        low, high = (middle, high) if below(middle) else (low, middle)
    return high


def _check_delta(delta: float) -> None:
    if not 0.0 < delta < 1.0:
        raise ConfigError(f"delta must be above 0 and below 1, got {delta}; 1/(10 N) is usual for N units")


def _check_noise(value: float) -> None:
    if not (math.isfinite(value) and value > 0.0):
        raise ConfigError(f"a noise multiplier must be finite and above 0, got {value}; no noise, no privacy")


def _check_sampling(value: float) -> None:
    if not 0.0 < value <= 1.0:
        raise ConfigError(f"a sampling probability must be above 0 and at most 1, got {value}")
