"""Randomness: one numpy stream per purpose for experiments, and the specified public generator for bases.

`stream` is for experiments only: numpy may change what it yields. `public_normal` and `public_orthonormal` are
specified below to the byte, so that every client, today and in another language, derives the same basis from a seed
and the basis never travels. Neither is secret: keys, masks and deployed noise never come from here.

The public generator, version 1:

1. items = (seed, purpose, *ids). An integer is written in ASCII decimal after the letter `i`, a string in UTF-8 after
   the letter `s`; each such item is preceded by its length in bytes (letter included) as u32, little endian.
   key = SHA-256("fedlora-public-1" + items), 32 bytes.
2. block_j = SHA-256(key + j), j = 0, 1, ... as u64 little endian. The blocks in order are a stream of u64 words,
   little endian, four to a block.
3. A word w gives the uniform u = (2 * floor(w / 2^12) + 1) / 2^53: exact in float64, never 0 or 1.
4. Words 2i and 2i+1 give u and v, and by Box and Muller (1958) the normals
   z_2i = sqrt(-2 ln u) cos(2 pi v) and z_2i+1 = sqrt(-2 ln u) sin(2 pi v), in float64. An array is filled row by row.
5. Orthonormal rows: G [rows, cols] from step 4, G^T = Q R with every diagonal entry of R positive; the rows are Q^T.

Steps 1 to 3 are exact everywhere; 4 and 5 up to the last bits of a platform's logarithm, sine and linear algebra.
"""

from __future__ import annotations

import hashlib
import math

import numpy as np
from numpy.typing import NDArray

from fedlora.errors import AdapterError

_DOMAIN = b"fedlora-public-1"


def stream(seed: int, purpose: str, *ids: int | str) -> np.random.Generator:
    """The generator for one purpose, e.g. `stream(seed, "batches", client, round)`.

    Different purposes or ids give independent streams; the same arguments always give the same stream.
    """
    digest = hashlib.sha256(f"{purpose}:{ids!r}".encode()).digest()
    return np.random.default_rng([seed, *np.frombuffer(digest, "<u4").tolist()])


def public_normal(seed: int, purpose: str, *ids: int | str, shape: tuple[int, ...]) -> NDArray[np.float64]:
    """Standard normals that anyone can derive (steps 1 to 4 above), `shape` filled row by row.

    Fewer rows are a prefix of more. One SHA-256 for four values, about 0.2 microseconds a value.
    """
    count = math.prod(shape)
    pairs = -(-count // 2)
    uniform = _uniforms(_key(seed, purpose, ids), 2 * pairs).reshape(pairs, 2)
    radius, angle = np.sqrt(-2.0 * np.log(uniform[:, 0])), 2.0 * np.pi * uniform[:, 1]
    normal = np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1)
    return normal.reshape(-1)[:count].reshape(shape)


def public_orthonormal(seed: int, purpose: str, *ids: int | str, rows: int, cols: int) -> NDArray[np.float64]:
    """A `[rows, cols]` with orthonormal rows, uniformly distributed, that anyone can derive (steps 1 to 5 above).

    Nested: the first r rows are those of the call with `rows=r`, up to rounding, because Q's first columns depend on
    G's first rows alone. Cost: that of the normals, and O(cols * rows^2).
    Raises: AdapterError if `rows` is negative or above `cols`.
    """
    if not 0 <= rows <= cols:
        raise AdapterError(
            f"{purpose}: no {rows} orthonormal rows fit into {cols} dimensions; the rank must be 0 to the input size"
        )
    q, r = np.linalg.qr(public_normal(seed, purpose, *ids, shape=(rows, cols)).T)
    return np.ascontiguousarray((q * np.where(np.diagonal(r) < 0.0, -1.0, 1.0)).T)


def _key(seed: int, purpose: str, ids: tuple[int | str, ...]) -> bytes:
    digest = hashlib.sha256(_DOMAIN)
    for item in (seed, purpose, *ids):
        raw = f"s{item}".encode() if isinstance(item, str) else f"i{int(item)}".encode()
        digest.update(len(raw).to_bytes(4, "little") + raw)
    return digest.digest()


def _uniforms(key: bytes, count: int) -> NDArray[np.float64]:
    """The first `count` uniforms of the stream, each an odd multiple of 2^-53."""
    blocks = (hashlib.sha256(key + j.to_bytes(8, "little")).digest() for j in range(-(-count // 4)))
    words = np.frombuffer(b"".join(blocks), "<u8")[:count]
    return (2.0 * (words >> np.uint64(12)).astype(np.float64) + 1.0) * 2.0**-53
