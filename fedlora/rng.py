"""Randomness: one numpy stream per purpose for experiments, and the specified public generator for bases.

`stream` is for experiments only. Keys, masks and deployed noise never come from here.
"""

from __future__ import annotations

import hashlib

import numpy as np


def stream(seed: int, purpose: str, *ids: int | str) -> np.random.Generator:
    """The generator for one purpose, e.g. `stream(seed, "batches", client, round)`.

    Different purposes or ids give independent streams; the same arguments always give the same stream.
    """
    digest = hashlib.sha256(f"{purpose}:{ids!r}".encode()).digest()
    return np.random.default_rng([seed, *np.frombuffer(digest, "<u4").tolist()])
