"""Whole clients as the unit: what a round's sum over them is clipped to, noised with and divided by.

    release = (sum over drawn clients k of clip_C(x_k) + N(0, (z C)^2 I)) / (q K)

x_k is everything that client k adds to the sum, factors and heads, as one vector; every client weighs 1. K is how many
clients the run is planned for and q the probability with which each is drawn: public numbers, whoever was drawn and
whoever answered. So one client moves the sum by C at most, and an empty round releases noise alone.

McMahan et al., ICLR 2018 (arXiv 1710.06963), the estimator with a fixed denominator; noise that clients share: Kairouz,
Liu and Steinke, ICML 2021 (2102.06387), with rounded Gaussians (`fedlora.privacy.noise`).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Final, Literal

import numpy as np

from fedlora.adapter import Array
from fedlora.config import RunConfig
from fedlora.continual.tasks import legs
from fedlora.errors import ConfigError
from fedlora.privacy.accounting import Event, epsilon, noise_multiplier
from fedlora.privacy.clipping import AdaptiveClip
from fedlora.privacy.noise import Noise

__all__ = ["ClientPrivacy", "client_privacy", "planned_releases", "promised"]

NoiseBy = Literal["server", "clients"]
_COUNT_SHARE: Final = 20.0  # of a round's clients: standard deviation of the noise on a count (Andrew et al., 2021)


@dataclass(frozen=True, kw_only=True)
class ClientPrivacy:
    """How the sum of one round is released. Raises: ConfigError for a number out of its range.

    `counted` is the sampling that epsilon is counted with: `sampling` where nobody but a trusted server learns who was
    drawn, else 1. With `by` clients, `parties` of them are sure to be in every sum, and each adds its share of noise.
    `quantile`: the clip follows this quantile of the clients' norms, whose noised count is a release as well, paid for
    with a little more noise on the sum. `noise_multiplier` is what both together come to.
    """

    clip: float
    noise_multiplier: float
    sampling: float
    counted: float
    population: int
    by: NoiseBy = "server"
    parties: int = 1
    quantile: float | None = None

    def __post_init__(self) -> None:
        if not (math.isfinite(self.clip) and self.clip > 0.0):
            raise ConfigError(f"privacy.clip must be finite and above 0, got {self.clip}")
        if self.population < 1 or self.parties < 1:
            raise ConfigError(f"{self.population} clients, of whom {self.parties} add noise: there must be some")
        self.event()  # checks noise and sampling

    @property
    def expected(self) -> float:
        """q K: how many clients a round expects, and what its sum is divided by."""
        return self.sampling * self.population

    def event(self, times: int = 1) -> Event:
        """What so many rounds cost."""
        return Event(noise_multiplier=self.noise_multiplier, sampling=self.counted, times=times)

    def at(self, clip: float) -> ClientPrivacy:
        """The same with another clip."""
        return replace(self, clip=clip)

    @property
    def adaptive(self) -> AdaptiveClip | None:
        """The clip as something that moves; None where it stands still."""
        if self.quantile is None:
            return None
        count = max(self.expected / _COUNT_SHARE, 2.0 * self.noise_multiplier)
        return AdaptiveClip(clip=self.clip, quantile=self.quantile, count_noise=count, expected=self.expected)

    @property
    def multiplier(self) -> float:
        """The noise multiplier of the updates alone: more than `noise_multiplier` where a count is released too."""
        adaptive = self.adaptive
        return self.noise_multiplier if adaptive is None else adaptive.sum_multiplier(self.noise_multiplier)

    def sd(self, slack: float = 0.0) -> float:
        """Standard deviation of the noise on the sum; `slack` is how much rounding adds to a clipped norm."""
        return self.multiplier * (self.clip + slack)

    def released(self, total: Mapping[str, Array], noise: Noise | None, slack: float = 0.0) -> dict[str, Array]:
        """The release out of the sum of clipped arrays, float32; without `noise` it is in the sum already."""
        sd = self.sd(slack)
        noised = {k: x if noise is None else x + noise.normal(x.shape, sd) for k, x in total.items()}
        return {k: (x / self.expected).astype(np.float32) for k, x in noised.items()}


def planned_releases(config: RunConfig) -> int:
    """Sums that the run releases: one a round for each task that is trained in it."""
    return sum(leg.rounds for leg in legs(config)) or config.rounds.count


def client_privacy(config: RunConfig) -> ClientPrivacy | None:
    """What `privacy.level = client` comes to; None under another level.

    The noise is `privacy.noise_multiplier`, or the smallest with which all planned releases stay within
    `privacy.epsilon` (seconds the first time; see `fedlora.privacy.accounting.noise_multiplier`).
    Raises: ConfigError for an epsilon that no noise reaches, or tasks that overlap where sampling is counted.
    """
    own, rounds = config.privacy, config.rounds
    if own.level != "client":
        return None
    counted = 1.0 if config.secure.on else rounds.fraction
    if counted < 1.0 and any(one.last >= other.first for one, other in itertools.pairwise(legs(config))):
        raise ConfigError(
            "tasks: two are trained in one round, and who is drawn for one is drawn for both, while epsilon is counted "
            "for draws of their own: leave `start` out, or set rounds.fraction=1"
        )
    z = own.noise_multiplier
    if z is None:
        assert own.epsilon is not None
        z = noise_multiplier(own.epsilon, own.delta, sampling=counted, times=planned_releases(config))
    return ClientPrivacy(
        clip=own.clip,
        noise_multiplier=z,
        sampling=rounds.fraction,
        counted=counted,
        population=rounds.clients,
        by=own.noise,
        parties=config.secure.least if own.noise == "clients" else 1,
        quantile=own.quantile,
    )


def promised(config: RunConfig) -> float | None:
    """What the run may spend of each client: `privacy.epsilon`, or what its noise comes to over all planned releases.

    None under another level.
    """
    if config.privacy.level != "client":
        return None
    if config.privacy.epsilon is not None:
        return config.privacy.epsilon
    terms = client_privacy(config)
    assert terms is not None
    return epsilon([terms.event(planned_releases(config))], config.privacy.delta)
