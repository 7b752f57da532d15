"""Whole clients private in a secure sum: what each adds, its share of the noise, and the coding that holds both.

    v_k = (clip_C(x_k), [+-C/2])  in fixed point,  plus  rint(N(0, (2^b s)^2))  in every coordinate of x

With h clients sure to be in the sum, s = z C' / sqrt(h) gives it a noise of z C' at least. C' is C and what rounding to
the grid may add to it. Every client weighs the same and sends no losses, so nothing else of it is in the sum.

Rounded Gaussians inside a secure sum: after Kairouz, Liu and Steinke, ICML 2021 (arXiv 2102.06387); that rounding
before the sum costs nothing here: `fedlora.privacy.noise`.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping
from typing import Final

import numpy as np
from numpy.typing import NDArray

from fedlora.adapter import Array
from fedlora.errors import ConfigError
from fedlora.privacy.accounting import Event
from fedlora.privacy.clients import ClientPrivacy
from fedlora.privacy.clipping import clip_jointly
from fedlora.privacy.noise import Noise
from fedlora.privacy.secagg.fixed_point import FixedPoint
from fedlora.privacy.secagg.packing import Packing
from fedlora.privacy.secagg.refusal import Refused
from fedlora.privacy.secagg.update import SCALARS, padded
from fedlora.state import Whole

__all__ = ["ROUNDING", "coding", "count_in", "event_of", "own_noise", "slack_of", "whole_of", "whole_vector"]

ROUNDING: Final = 1e-3  # share of the clip that rounding to the grid may add to a norm; the noise covers it
_MARGIN: Final = 1.0 + 1e-9  # so that floating point never makes noise less than was promised
_TAIL: Final = 8.3  # standard deviations that no draw of `fedlora.privacy.noise` exceeds
_LIMIT: Final = 2**31 - 1


def whole_of(terms: ClientPrivacy) -> Whole:
    """What each client is told to do under these terms."""
    adaptive, own = terms.adaptive, terms.by == "clients"
    share = _MARGIN / math.sqrt(terms.parties)
    return Whole(
        clip=terms.clip,
        noise=terms.sd(slack_of(terms.clip)) * share if own else 0.0,
        counted=adaptive is not None,
        count_noise=adaptive.count_noise * share if own and adaptive is not None else 0.0,
    )


def slack_of(clip: float) -> float:
    """The most that rounding may add to the norm of a client's arrays, see `coding`."""
    return ROUNDING * clip


def event_of(whole: Whole, survivors: int) -> Event:
    """What a sum over at least so many clients costs each of them, by the noise that they add themselves.

    Raises: ConfigError where they add none, or to a clip or a count that is none.
    """
    share, clip = math.sqrt(survivors), whole.clip + slack_of(whole.clip)
    noises = [whole.noise * share / clip if clip > 0.0 else 0.0]
    if whole.counted:
        noises.append(2.0 * whole.count_noise * share)
    if not 0.0 < min(noises) <= max(noises) < math.inf:
        raise ConfigError(f"a sum in which this client's own noise, {whole.noise:g}, protects nothing is not joined")
    return Event(noise_multiplier=1.0 / math.hypot(*(1.0 / z for z in noises)))


def coding(size: int, clients: int, whole: Whole) -> FixedPoint:
    """Fixed point for sums of such vectors: the largest scale at which no coordinate overflows, noise included.

    Raises: Refused where 32 bits are so few that rounding would add more than `ROUNDING` to the clip.
    """
    bound = whole.clip * math.sqrt(1.25) * _MARGIN
    sd = _largest_noise(whole)
    bits = FixedPoint(size=size, clients=clients, bound=bound).bits
    found = None if sd else FixedPoint(size=size, clients=clients, bound=bound)
    while found is None and bits > -100:
        room = clients * (math.ceil(min(_TAIL * sd * 2.0**bits, _LIMIT)) + 1)
        # as much again is kept free where it would hold a larger scale, at which the noise would not fit
        room = max(room, min(_LIMIT, _LIMIT - math.floor(clients * bound * 2.0 ** (bits + 1))))
        with contextlib.suppress(Refused):
            fits = FixedPoint(size=size, clients=clients, bound=bound, headroom=room)
            found = fits if fits.bits == bits else None  # fewer bits: too little is left beside the noise
        bits -= 1
    if found is None or math.sqrt(size) / 2.0 > slack_of(whole.clip) * 2.0**found.bits:
        raise Refused(
            "fixed-point",
            f"32 bits are too coarse for {size} numbers of {clients} clients, a clip of {whole.clip:g} and noise of "
            f"{sd:g} each: train less (fewer modules, a smaller rank), or ask fewer clients with less noise each",
        )
    return found


def whole_vector(arrays: Mapping[str, Array], into: Packing, *, ratio: float, whole: Whole) -> NDArray[np.float32]:
    """v_k `[into.size]` of a client with these arrays, B to be multiplied by `ratio`; noise is added when it is coded.

    Raises: TrainingError if a value is not finite.
    """
    update, norm = clip_jointly(padded(arrays, into.shapes, ratio), whole.clip)
    within = math.copysign(0.5 * whole.clip, whole.clip - norm) if whole.counted else 0.0
    return into.pack(update, {**dict.fromkeys(SCALARS, 0.0), "clipped": within})


def count_in(scalars: Mapping[str, float], clip: float) -> float:
    """The sum of the clients' indicators in that of their vectors."""
    return scalars["clipped"] / clip


def own_noise(into: Packing, whole: Whole, bits: int) -> NDArray[np.int32] | None:
    """This client's share of the noise `[into.size]`, in quanta of 2^-bits; None where it adds none.

    Raises: ConfigError for noise that the grid is too coarse for, or that 32 bits do not hold: wrapped around it would
    be none.
    """
    if not whole.noise:
        return None
    scale, noise = 2.0**bits, Noise()
    if not _TAIL * _largest_noise(whole) * scale < _LIMIT:
        raise ConfigError(f"noise of {_largest_noise(whole):g} does not fit in 32 bits at {bits} of them")
    drawn = np.zeros(into.size, np.int32)
    drawn[: -len(SCALARS)] = noise.grid((into.size - len(SCALARS),), whole.noise * scale)
    if whole.counted:
        drawn[sorted(SCALARS).index("clipped") - len(SCALARS)] = noise.grid((), whole.count_noise * whole.clip * scale)
    return drawn


def _largest_noise(whole: Whole) -> float:
    """The largest standard deviation in any coordinate of the vector."""
    return max(whole.noise, whole.count_noise * whole.clip)
