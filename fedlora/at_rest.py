"""Files at rest, encrypted: AES-256-GCM in chunks that cannot be changed, dropped, added, reordered or swapped.

    file  = "FLSEAL1\\0" | nonce (12 random bytes) | chunk_0 | chunk_1 ...
    chunk = AES-256-GCM(key, nonce xor i, plain_i, associated data) of 2^20 bytes (the last: 0 to 2^20) and a tag of 16
    associated data = "FLSEAL1\\0" | i as u64 | 1 if it is the last chunk, else 0 | the name in UTF-8      (big endian)

`nonce xor i` is over its last 8 bytes, as TLS 1.3 numbers its records (RFC 8446, section 5.3). The flag of the last
chunk is what finds a file cut at a border of chunks (STREAM; Hoang, Reyhanitabar, Rogaway and Vizár, 2015). The
name keeps one file from standing in for another. Two files of n chunks under one key share a nonce with probability of
about n / 2^95: one key may seal 2^30 files of a gigabyte with odds below 2^-24.

What is not hidden: the size, and that an old copy of the same file was put back. Python cannot wipe a key from memory.
"""

from __future__ import annotations

import base64
import binascii
import os
import secrets
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from fedlora.errors import CheckpointError, ConfigError

__all__ = ["CHUNK", "VARIABLE", "is_sealed", "key_from_environment", "key_from_file", "new_key", "seal", "unseal"]

MAGIC: Final = b"FLSEAL1\0"
CHUNK: Final = 2**20  # bytes of plain text
VARIABLE: Final = "FEDLORA_CHECKPOINT_KEY"
_NONCE: Final = 12
_TAG: Final = 16
_KEY: Final = 32


def seal(data: bytes, key: bytes, name: str) -> bytes:
    """`data` encrypted under a key of 32 bytes, as the file `name`; each call draws another nonce.

    Cost: one copy of the data, some 0.2 s a GB with AES instructions.
    Raises: ConfigError if the key has another length.
    """
    cipher = _cipher(key)
    nonce = secrets.token_bytes(_NONCE)
    view = memoryview(data)
    count = max(1, -(-len(data) // CHUNK))
    parts = [MAGIC, nonce]
    for i in range(count):
        plain = view[i * CHUNK : (i + 1) * CHUNK]
        parts.append(cipher.encrypt(_numbered(nonce, i), plain, _associated(i, i == count - 1, name)))
    return b"".join(parts)


def unseal(data: bytes, key: bytes, name: str) -> bytes:
    """What `seal` was given. Nothing is returned before all of it is known to be whole.

    Raises: CheckpointError if it was changed, cut, reordered, belongs to another name or key, or is no such file;
    ConfigError if the key has another length.
    """
    cipher = _cipher(key)
    start = len(MAGIC) + _NONCE
    if not is_sealed(data) or len(data) < start + _TAG:
        raise CheckpointError(f"{name}: not an encrypted file of fedlora, or its beginning is torn off")
    nonce = data[len(MAGIC) : start]
    view = memoryview(data)[start:]
    count = -(-len(view) // (CHUNK + _TAG))
    parts: list[bytes] = []
    for i in range(count):
        sealed = view[i * (CHUNK + _TAG) : (i + 1) * (CHUNK + _TAG)]
        try:
            parts.append(cipher.decrypt(_numbered(nonce, i), sealed, _associated(i, i == count - 1, name)))
        except InvalidTag:
            raise CheckpointError(
                f"{name}: chunk {i + 1} of {count} cannot be opened: another key, another file under this name, or "
                "damage. With the right key, restore the file from a copy."
            ) from None
    return b"".join(parts)


def is_sealed(data: bytes) -> bool:
    """Whether these bytes begin as `seal` begins them."""
    return data[: len(MAGIC)] == MAGIC


def new_key() -> str:
    """A fresh key of 32 bytes in base64, as a key file or the variable holds it."""
    return base64.b64encode(secrets.token_bytes(_KEY)).decode()


def key_from_file(path: Path) -> bytes:
    """The key in a file that nobody else may read. Raises: ConfigError if it is missing, open to others, or no key."""
    try:
        with path.open("rb") as file:
            mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
            text = file.read(1024)
    except OSError as error:
        raise ConfigError(f"key file {path} cannot be read: {error.strerror or error}") from error
    if mode & 0o077:
        raise ConfigError(f"key file {path} is open to others (mode {mode:04o}): chmod 600 {path}")
    return _decoded(text, f"key file {path}")


def key_from_environment(environment: Mapping[str, str] = os.environ) -> bytes | None:
    """The key in `FEDLORA_CHECKPOINT_KEY`, None if that is unset. Raises: ConfigError if it is set to no key."""
    text = environment.get(VARIABLE)
    return None if text is None else _decoded(os.fsencode(text), VARIABLE)


def _decoded(text: bytes, where: str) -> bytes:
    try:
        key = base64.b64decode(text.strip(), validate=True)
    except binascii.Error:
        key = b""
    if len(key) != _KEY:
        raise ConfigError(
            f"{where}: expected {_KEY} bytes in base64 (44 letters); make one with: openssl rand -base64 32"
        )
    return key


def _cipher(key: bytes) -> AESGCM:
    if len(key) != _KEY:
        raise ConfigError(f"a key has {_KEY} bytes, got {len(key)}")
    return AESGCM(key)


def _numbered(nonce: bytes, index: int) -> bytes:
    return nonce[:4] + (int.from_bytes(nonce[4:]) ^ index).to_bytes(8)


def _associated(index: int, last: bool, name: str) -> bytes:
    return MAGIC + index.to_bytes(8) + bytes([last]) + name.encode()
