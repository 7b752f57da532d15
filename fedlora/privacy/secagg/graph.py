"""Who shares keys with whom: everybody up to 31 clients, beyond that a public regular graph of degree O(log n).

Clients stand on a circle in an order that is drawn from a public digest, and each is joined to the k/2 next on either
side (Bell et al. 2020, section 3, after Harary). With k = 2 ceil(3 log2 n) and a threshold of two thirds, by
hypergeometric tails and a union bound over clients: of n = 100, 300 or 1000, if 10 % drop out at random, some client
can no longer be unmasked in 3 rounds of 10,000 or fewer; if 10 % collude with the server, it reads some client in 5 of
100,000 or fewer. For 20 % of either k must be larger, or the graph complete; `degree` of the context sets it.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence


def least_degree(clients: int) -> int:
    """The least number of neighbours that a client accepts: n - 1, or 2 ceil(3 log2 n) if that is less."""
    return min(clients - 1, 2 * math.ceil(3 * math.log2(clients)))


def neighbours(ids: Sequence[str], degree: int, seed: bytes) -> dict[str, tuple[str, ...]]:
    """The neighbours of each stable id, itself not among them, sorted; the same whatever the order of `ids`.

    Raises: ValueError if the degree is odd (but for a complete graph), below 1 or above n - 1, or an id comes twice.
    """
    n = len(ids)
    if len(set(ids)) < n or not 1 <= degree <= n - 1 or (degree % 2 and degree != n - 1):
        raise ValueError(f"no graph of degree {degree} on {n} ids, {len(set(ids))} of them different")
    circle = sorted(ids, key=lambda i: hashlib.sha256(b"fedlora-secagg/1 graph" + seed + i.encode()).digest())
    if degree == n - 1:
        return {i: tuple(sorted(set(ids) - {i})) for i in ids}
    steps = [s for s in range(-(degree // 2), degree // 2 + 1) if s]
    return {i: tuple(sorted(circle[(at + s) % n] for s in steps)) for at, i in enumerate(circle)}
