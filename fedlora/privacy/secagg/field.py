"""Shamir's secret sharing over GF(p), p = 2^256 + 297, the least prime above 2^256: any 32 bytes are one element.

Source: Shamir, How to share a secret, CACM 22 (1979). Python's integers do not run in constant time; that is
observable only by who runs on the client's own machine.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from functools import lru_cache

PRIME = 2**256 + 297
SHARE_BYTES = 33


def split(secret: int, threshold: int, points: Sequence[int]) -> list[int]:
    """Values at `points` of a random polynomial of degree `threshold - 1` whose value at 0 is the secret.

    Any `threshold` of them determine the secret, fewer say nothing. Coefficients come from the system's entropy.
    Raises: ValueError if the secret is no field element, a point is 0 or given twice, or they are fewer than needed.
    """
    if not 0 <= secret < PRIME:
        raise ValueError("the secret is not an element of the field")
    if not 1 <= threshold <= len(points):
        raise ValueError(f"a threshold of {threshold} cannot be met by {len(points)} shares")
    _require_points(points)
    coefficients = [secret, *(secrets.randbelow(PRIME) for _ in range(threshold - 1))]
    return [_value(coefficients, x) for x in points]


def combine(shares: Mapping[int, int]) -> int:
    """The value at 0 of the polynomial of least degree through `shares`, point to value (Lagrange).

    A wrong share gives a wrong secret and no error: callers compare with a commitment.
    Raises: ValueError if there is none, or a point or a value is outside the field.
    """
    if not shares or not all(0 <= y < PRIME for y in shares.values()):
        raise ValueError("shares must be elements of the field, and at least one")
    points = tuple(sorted(shares))
    return sum(w * shares[x] for w, x in zip(_weights(points), points, strict=True)) % PRIME


def share_bytes(value: int) -> bytes:
    """A field element in 33 bytes, little endian."""
    return value.to_bytes(SHARE_BYTES, "little")


def share_value(data: bytes) -> int:
    """The element of 33 bytes. Raises: ValueError if they are not 33 or not below p."""
    value = int.from_bytes(data, "little")
    if len(data) != SHARE_BYTES or value >= PRIME:
        raise ValueError(f"{len(data)} bytes that are not an element of the field")
    return value


@lru_cache(maxsize=256)
def _weights(points: tuple[int, ...]) -> tuple[int, ...]:
    """prod_j x_j / (x_j - x_i) for each i: public, the same for all secrets that the same clients hold."""
    _require_points(points)
    weights = []
    for x in points:
        above = below = 1
        for other in points:
            if other != x:
                above = above * other % PRIME
                below = below * (other - x) % PRIME
        weights.append(above * pow(below, -1, PRIME) % PRIME)
    return tuple(weights)


def _value(coefficients: Sequence[int], x: int) -> int:
    value = 0
    for c in reversed(coefficients):
        value = (value * x + c) % PRIME
    return value


def _require_points(points: Sequence[int]) -> None:
    if len(set(points)) < len(points) or not all(0 < x < PRIME for x in points):
        raise ValueError("points must differ from one another and from 0")
