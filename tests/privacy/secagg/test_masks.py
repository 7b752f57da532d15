"""Masks are AES-256-CTR by the library's plain interface; keys are RFC 5869 by hand."""

from __future__ import annotations

import hashlib
import hmac

import numpy as np
import pytest
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import AES256
from cryptography.hazmat.primitives.ciphers.modes import CTR

from fedlora.privacy.secagg.masks import derive, mask


def stream(key: bytes, size: int) -> np.ndarray:
    return np.frombuffer(Cipher(AES256(key), CTR(bytes(16))).encryptor().update(bytes(4 * size)), "<u4")


@pytest.mark.parametrize("size", [1, 3, 4, 65_535, 65_536, 65_537, 200_001])
def test_masks_are_the_key_stream(size: int) -> None:
    keys = [bytes([i]) * 32 for i in range(3)]
    words = np.arange(size, dtype=np.uint32)
    mask(words, add=keys[:2], subtract=keys[2:])
    expected = np.arange(size, dtype=np.uint32) + stream(keys[0], size) + stream(keys[1], size) - stream(keys[2], size)
    np.testing.assert_array_equal(words, expected)


def test_more_keys_than_are_open_at_once() -> None:
    keys = [i.to_bytes(32, "little") for i in range(130)]
    words = np.zeros(10, np.uint32)
    mask(words, add=keys)
    assert words.any()
    mask(words, subtract=keys)
    assert not words.any()


def test_keys_are_hkdf() -> None:
    secret, session, public = b"s" * 32, b"c" * 32, (b"one", b"two")
    info = b"".join(len(x).to_bytes(4, "little") + x for x in (b"fedlora-secagg/1", b"mask", *public))
    extracted = hmac.digest(session, secret, hashlib.sha256)
    assert derive(secret, session, "mask", *public) == hmac.digest(extracted, info + b"\x01", hashlib.sha256)


def test_every_part_of_a_key_s_context_counts() -> None:
    base = (b"s" * 32, b"c" * 32, "mask", b"ab", b"c")
    others = [
        (b"t" * 32, *base[1:]), (base[0], b"d" * 32, *base[2:]), (*base[:2], "channel", *base[3:]),
        (*base[:3], b"a", b"bc"), (*base[:3], b"abc"), (*base[:3], b"c", b"ab"),
    ]  # fmt: skip
    assert len({derive(*args) for args in [base, *others]}) == 7  # type: ignore[arg-type]
