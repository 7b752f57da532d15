"""Client-level clipping of what is released: the change of all summands in one joint L2 norm; its adaptive bound.

What must be bounded is the norm of the arrays that are summed, all factors and heads of a client as one vector. A bound
on the product B A bounds nothing while the factors are released: (t B)(A / t) is the same product for every t, and the
factors' norm grows without end. Only where A is frozen with orthonormal rows are the two norms one and the same.

What is divided by afterwards is a fixed, public number (`fedlora.privacy.clients`). Nothing divides by the weight that
was drawn, which is private, and which one client's weight could change for all.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from fedlora.adapter import Array
from fedlora.errors import ConfigError, TrainingError
from fedlora.privacy.noise import Noise

__all__ = ["AdaptiveClip", "clip_jointly", "joint_norm"]


def joint_norm(arrays: Mapping[str, Array]) -> float:
    """The L2 norm of all the arrays as one vector, in float64; 0.0 for none.

    Raises: TrainingError if a value is not finite.
    """
    total = 0.0
    for key, x in arrays.items():
        flat = np.ascontiguousarray(x, np.float64).ravel()
        if not np.isfinite(flat).all():
            raise TrainingError(
                f"clipping: {key} has {np.sum(~np.isfinite(flat))} values that are not finite, so no bound holds; "
                "nothing may be sent. Lower the learning rate"
            )
        total += float(flat @ flat)
    return math.sqrt(total)


def clip_jointly(arrays: Mapping[str, Array], clip: float) -> tuple[dict[str, Array], float]:
    """The arrays scaled down together to an L2 norm of at most `clip`, float32; and their norm before.

    The bound holds for what is returned, after rounding to float32. What is within it comes back as it is.
    Raises: ConfigError unless `clip` is finite and above 0; TrainingError if a value is not finite.
    """
    if not (math.isfinite(clip) and clip > 0.0):
        raise ConfigError(f"a clip must be finite and above 0, got {clip}")
    norm = joint_norm(arrays)
    # Rounding to float32 adds at most 2^-24 of each value. Below the bound by so much, nothing needs scaling.
    factor = 1.0 if norm <= clip * (1.0 - 2.0**-23) else clip / norm * (1.0 - 2.0**-23)
    return {key: (np.asarray(x, np.float64) * factor).astype(np.float32) for key, x in arrays.items()}, norm


@dataclass(frozen=True, kw_only=True)
class AdaptiveClip:
    """A clip that follows a quantile of the clients' norms (Andrew et al., NeurIPS 2021, arXiv 1905.03871).

        C <- C exp(-rate (b - quantile)),    b = 1/2 + (sum over drawn clients of (b_i - 1/2) + N(0, count_noise^2)) / m

    with b_i = 1 where the norm is within C: the fraction *un*clipped. More of them than the quantile: C falls. m, how
    many clients a round expects, is fixed: b may leave [0, 1], and to push it back would bias the quantile.

    Each client gives `indicator`, unweighted, in the same sum as its update. The noised count is a release too:
    `sum_multiplier` says how much noise the updates then need for both to cost what `noise_multiplier` alone would.
    Raises: ConfigError for a number out of its range.
    """

    clip: float
    quantile: float = 0.5
    rate: float = 0.2
    count_noise: float  # standard deviation, in clients; the paper takes a twentieth of a round's clients
    expected: float  # clients of a round

    def __post_init__(self) -> None:
        for name in ("clip", "rate", "count_noise", "expected"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) > 0.0):
                raise ConfigError(f"adaptive clipping: {name} must be finite and above 0, got {getattr(self, name)}")
        if not 0.0 < self.quantile < 1.0:
            raise ConfigError(f"adaptive clipping: quantile must be between 0 and 1, got {self.quantile}")

    def indicator(self, norm: float) -> float:
        """What a client adds to the count: +1/2 if its norm is within the clip, else -1/2; one client moves it by 1/2.

        Raises: TrainingError for a norm that is not finite or is negative.
        """
        if not (math.isfinite(norm) and norm >= 0.0):
            raise TrainingError(f"adaptive clipping: a norm must be finite and not negative, got {norm}")
        return 0.5 if norm <= self.clip else -0.5

    def sum_multiplier(self, noise_multiplier: float) -> float:
        """The noise multiplier z_sum of the updates with which both releases cost as one of `noise_multiplier` z.

        z_sum = (z^-2 - (2 count_noise)^-2)^(-1/2): theorem 1 of the paper.
        Raises: ConfigError unless z is above 0 and below 2 count_noise.
        """
        if not 0.0 < noise_multiplier < 2.0 * self.count_noise:
            raise ConfigError(
                f"adaptive clipping: with noise {self.count_noise:g} on the count alone, a noise multiplier must be "
                f"above 0 and below {2.0 * self.count_noise:g}, got {noise_multiplier}; raise count_noise"
            )
        return 1.0 / math.sqrt(noise_multiplier**-2 - (2.0 * self.count_noise) ** -2)

    def after(self, indicators: float, noise: Noise | None) -> AdaptiveClip:
        """With the next round's clip; `indicators` is the sum of this round's. Charge it first.

        Without `noise` the sum has it already, of standard deviation `count_noise`.
        Raises: TrainingError if the sum is not finite.
        """
        if not math.isfinite(indicators):
            raise TrainingError(f"adaptive clipping: the sum of indicators must be finite, got {indicators}")
        noised = indicators + (float(noise.normal((), self.count_noise)) if noise is not None else 0.0)
        within = 0.5 + noised / self.expected
        return replace(self, clip=self.clip * math.exp(-self.rate * (within - self.quantile)))
