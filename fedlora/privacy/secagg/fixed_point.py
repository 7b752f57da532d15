"""Vectors bounded in L2 as signed fixed point modulo 2^32, such that sums cannot overflow.

A client's x `[m]` has |x|_2 <= C. It sends q = rint(2^k x), two's complement, so the number of survivors does not enter
the decoding. Rounding moves each coordinate by at most 1/2, hence |q|_2 <= 2^k C + sqrt(m)/2, and every coordinate of a
sum of n such vectors is at most n (2^k C + sqrt(m)/2) in size. `k` is the largest whole number for which this and
`headroom` stay below 2^31. A scale that is a power of two makes both scaling and decoding exact: a decoded sum of s
clients is off by at most s 2^-(k+1) a coordinate.

Bound of the rounded norm: Kairouz, Liu and Steinke, ICML 2021 (2102.06387), section 3, for deterministic rounding.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from fedlora.privacy.secagg.refusal import Refused

Words = NDArray[np.uint32]

LARGEST_SIZE = 1 << 28  # coordinates: 1 GiB of words
_LIMIT = 2**31 - 1
_ALLOWED = 1 + 2**-21  # times C is let through: a clip in float32 may end a little above
_SLACK = Fraction(1 + 2**-20)  # times C is what the bounds are proved for, so float64 in the check cannot matter
_BLOCK = 1 << 15  # coordinates, so that a block in float64 stays in the cache


@dataclass(frozen=True, kw_only=True)
class FixedPoint:
    """How vectors of `size` coordinates and L2 norm at most `bound` are coded for sums over at most `clients`.

    `headroom`, in quanta, is kept free in each coordinate of the sum for integer noise that clients add.
    Raises: Refused if a value is out of range, or rounding could exceed half of what is left for the vectors.
    """

    size: int
    clients: int
    bound: float
    headroom: int = 0

    def __post_init__(self) -> None:
        if not 1 <= self.size <= LARGEST_SIZE:
            raise Refused("fixed-point", f"size must be 1 to {LARGEST_SIZE} coordinates, got {self.size}")
        if self.clients < 1 or not 0 <= self.headroom < _LIMIT:
            raise Refused("fixed-point", f"{self.clients} clients with a headroom of {self.headroom} quanta")
        if not (math.isfinite(self.bound) and 2.0**-100 <= self.bound <= 2.0**100):
            raise Refused("fixed-point", f"the bound must be 2^-100 to 2^100, got {self.bound}")
        room = Fraction(_LIMIT - self.headroom, self.clients) - self._rounding
        if room < 2 * self._rounding or room < 2:
            raise Refused(
                "fixed-point",
                f"32 bits are too few for {self.clients} clients, {self.size} coordinates and a headroom of "
                f"{self.headroom}: rounding alone takes up to {float(self._rounding):g} quanta of each",
            )

    @property
    def _rounding(self) -> Fraction:
        """At least sqrt(size) / 2, the most by which rounding changes an L2 norm, in quanta."""
        return Fraction(math.isqrt(self.size - 1) + 1, 2)

    @cached_property
    def bits(self) -> int:
        """k: one quantum is 2^-k."""
        room = (Fraction(_LIMIT - self.headroom, self.clients) - self._rounding) / self._bound
        k = room.numerator.bit_length() - room.denominator.bit_length()
        return k if _power(k) <= room else k - 1

    @property
    def _bound(self) -> Fraction:
        return Fraction(self.bound) * _SLACK

    @cached_property
    def largest(self) -> Fraction:
        """The most, in quanta, that one coded vector's L2 norm, hence any coordinate of it, can be."""
        return _power(self.bits) * self._bound + self._rounding

    def error(self, clients: int) -> float:
        """The most by which one coordinate of a decoded sum over `clients` can be off, in units of the vector."""
        return clients * 2.0 ** -(self.bits + 1)

    def encode(
        self, vector: NDArray[np.float32] | NDArray[np.float64], noise: NDArray[np.int32] | None = None
    ) -> Words:
        """The vector `[size]` in little-endian words; `noise` `[size]`, in quanta, is added modulo 2^32.

        Raises: Refused if shapes or dtypes are others, a value is not finite or the L2 norm exceeds the bound (by more
        than a millionth).
        """
        if vector.shape != (self.size,) or vector.dtype not in (np.float32, np.float64):
            raise Refused("fixed-point", f"{vector.dtype} {vector.shape} where float [{self.size}] is coded")
        if noise is not None and (noise.shape != (self.size,) or noise.dtype != np.int32):
            raise Refused("fixed-point", f"noise is int32 [{self.size}], got {noise.dtype} {noise.shape}")
        words = np.empty(self.size, "<u4")
        signed, scale, allowed = words.view("<i4"), 2.0**self.bits, (self.bound * _ALLOWED) ** 2
        squares = 0.0
        for start in range(0, self.size, _BLOCK):
            block = vector[start : start + _BLOCK].astype(np.float64)
            squares += _squares(block)
            if not squares <= allowed:  # also refuses nan
                raise Refused("fixed-point", f"the L2 norm is not finite or above the bound {self.bound}; clip first")
            block *= scale
            np.rint(block, out=block)
            signed[start : start + _BLOCK] = block
        if noise is not None:
            words += noise.view(np.uint32)
        return words

    def decode(self, total: Words, clients: int) -> NDArray[np.float64]:
        """The sum `[size]` that words modulo 2^32 stand for.

        Raises: Refused if shape or dtype are others, or the L2 norm exceeds what `clients` honest ones can reach: then
        some client sent what it must not.
        """
        if total.shape != (self.size,) or total.dtype != np.uint32 or not 1 <= clients <= self.clients:
            raise Refused(
                "fixed-point", f"{total.dtype} {total.shape} is no sum of {clients} of {self.clients} vectors"
            )
        out = np.empty(self.size, np.float64)
        signed, scale = total.view("<i4"), 2.0**-self.bits
        allowed = (clients * float(self.largest) + self.headroom * math.sqrt(self.size)) * scale
        squares = 0.0
        for start in range(0, self.size, _BLOCK):
            block = out[start : start + _BLOCK]
            np.multiply(signed[start : start + _BLOCK], scale, out=block)
            squares += _squares(block)
        if not math.sqrt(squares) <= allowed * (1 + 1e-9):
            raise Refused(
                "sum-bound",
                f"the sum of {clients} vectors has L2 norm {math.sqrt(squares):g}, above {allowed:g}; some client "
                "did not clip, and a secure sum cannot say which",
            )
        return out


def clipped(vector: NDArray[np.float32] | NDArray[np.float64], bound: float) -> NDArray[np.float32]:
    """The vector `[m]` in float32, scaled down to L2 norm `bound` if it is longer. Raises: Refused if not finite."""
    squares = sum(_squares(vector[i : i + _BLOCK].astype(np.float64)) for i in range(0, vector.size, _BLOCK))
    if not math.isfinite(squares):
        raise Refused("fixed-point", "a vector that is not finite, or too long for float64, cannot be clipped")
    norm = math.sqrt(squares)
    if norm <= bound:
        return vector.astype(np.float32, copy=False)
    return np.multiply(vector, bound / norm, dtype=np.float64).astype(np.float32)


def _squares(block: NDArray[np.float64]) -> float:
    with np.errstate(over="ignore"):  # infinity is told from a bound
        return float(np.dot(block, block))


def _power(k: int) -> Fraction:
    return Fraction(2) ** k
