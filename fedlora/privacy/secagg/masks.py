"""Keys by HKDF-SHA256 and masks by AES-256-CTR, added to words in place, block by block in the cache.

The nonce is zero throughout: every key is derived for one purpose in one session (run, round, attempt, part) and
encrypts one stream. A mask of m words is the first 4m bytes of the key stream, read as little-endian words.
Sources: RFC 5869 (HKDF), NIST SP 800-38A (CTR). `update_into` works on blocks that exist; without it, allocation
costs more than AES.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, CipherContext
from cryptography.hazmat.primitives.ciphers.algorithms import AES256
from cryptography.hazmat.primitives.ciphers.modes import CTR
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from fedlora.privacy.secagg.fixed_point import Words

_BLOCK = 1 << 16  # words; 256 KiB
_CIPHERS = 64  # open at once
_ZEROS = memoryview(bytes(4 * _BLOCK))


def derive(secret: bytes, session: bytes, purpose: str, *public: bytes) -> bytes:
    """A 32-byte key for one purpose: the salt is the session's digest, the info names purpose and public values.

    Public values are length-prefixed, so that no two lists of them read the same.
    """
    info = b"".join(len(x).to_bytes(4, "little") + x for x in (b"fedlora-secagg/1", purpose.encode(), *public))
    return HKDF(algorithm=SHA256(), length=32, salt=session, info=info).derive(secret)


def mask(words: Words, add: Sequence[bytes] = (), subtract: Sequence[bytes] = ()) -> None:
    """Add and subtract the masks of 32-byte keys, modulo 2^32, in place; `words` `[m]` is contiguous."""
    keys = [(key, np.add) for key in add] + [(key, np.subtract) for key in subtract]
    room = np.empty(_BLOCK + 4, "<u4")  # a block of AES more, as `update_into` demands
    stream, room_bytes = room[:_BLOCK], room.data.cast("B")
    for first in range(0, len(keys), _CIPHERS):
        opened = [(_cipher(key), change) for key, change in keys[first : first + _CIPHERS]]
        for start in range(0, words.size, _BLOCK):
            block = words[start : start + _BLOCK]
            for cipher, change in opened:
                cipher.update_into(_ZEROS[: 4 * block.size], room_bytes)
                change(block, stream[: block.size], out=block)


def _cipher(key: bytes) -> CipherContext:
    return Cipher(AES256(key), CTR(bytes(16))).encryptor()
