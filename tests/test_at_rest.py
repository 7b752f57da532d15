"""Encrypted files: what was sealed comes back, and every way to change one is found."""

from __future__ import annotations

import base64
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from fedlora import at_rest
from fedlora.at_rest import is_sealed, key_from_environment, key_from_file, new_key, seal, unseal
from fedlora.errors import CheckpointError, ConfigError

KEY = bytes(range(32))
HEAD = 8 + 12  # magic, nonce
SMALL = 64  # bytes of a chunk in these tests


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(at_rest, "CHUNK", SMALL)


@pytest.mark.parametrize("size", [0, 1, SMALL - 1, SMALL, SMALL + 1, 3 * SMALL, 3 * SMALL + 7])
def test_what_was_sealed_comes_back(size: int) -> None:
    data = bytes(i % 251 for i in range(size))
    sealed = seal(data, KEY, "round-000001.flw")
    assert unseal(sealed, KEY, "round-000001.flw") == data
    assert is_sealed(sealed)
    assert not is_sealed(data)
    chunks = max(1, -(-size // SMALL))
    assert len(sealed) == HEAD + size + 16 * chunks
    assert size < 8 or data[:8] not in sealed


def test_the_format_worked_out_with_aes_gcm_alone() -> None:
    data = bytes(range(200))
    sealed = seal(data, KEY, "a")
    nonce, at, plain = sealed[8:20], HEAD, b""
    assert sealed[:8] == b"FLSEAL1\0"
    for i in range(4):
        chunk, at = sealed[at : at + SMALL + 16], at + SMALL + 16
        number = bytes([*nonce[:11], nonce[11] ^ i])
        associated = b"FLSEAL1\0" + bytes([0, 0, 0, 0, 0, 0, 0, i]) + (b"\1" if i == 3 else b"\0") + b"a"
        plain += AESGCM(KEY).decrypt(number, chunk, associated)
    assert plain == data


def test_the_chunks_are_of_a_megabyte(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    assert at_rest.CHUNK == 2**20
    data = bytes(2**20 + 5)
    assert unseal(seal(data, KEY, "a"), KEY, "a") == data


def test_no_two_nonces_are_equal() -> None:
    nonces = {at_rest._numbered(b"\xff" * 12, i) for i in range(1000)}
    assert len(nonces) == 1000
    assert seal(b"x", KEY, "a") != seal(b"x", KEY, "a")


def test_every_byte_counts() -> None:
    sealed = seal(bytes(SMALL + 9), KEY, "a")
    for at in range(len(sealed)):
        with pytest.raises(CheckpointError):
            unseal(sealed[:at] + bytes([sealed[at] ^ 1]) + sealed[at + 1 :], KEY, "a")


def test_a_file_cut_extended_reordered_swapped_or_under_another_key_is_refused() -> None:
    sealed = seal(bytes(range(3 * SMALL)), KEY, "a")
    chunk = SMALL + 16
    first, second, third = (sealed[HEAD + i * chunk : HEAD + (i + 1) * chunk] for i in range(3))
    head = sealed[:HEAD]
    for wrong in (
        head + first + second,
        head + first,
        head,
        b"",
        sealed[:-1],
        sealed + b"\0",
        head + second + first + third,
        head + first + third,
        head + first + first + third,
        head + third,
        sealed + third,
    ):
        with pytest.raises(CheckpointError):
            unseal(wrong, KEY, "a")
    with pytest.raises(CheckpointError, match="another file under this name"):
        unseal(sealed, KEY, "b")
    with pytest.raises(CheckpointError, match="chunk 1 of 3 cannot be opened: another key"):
        unseal(sealed, bytes(32), "a")
    for use in (seal, unseal):
        with pytest.raises(ConfigError, match="a key has 32 bytes, got 16"):
            use(sealed, bytes(16), "a")


def test_keys_come_from_a_private_file_or_the_environment(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.key"
    text = new_key()
    path.write_text(text + "\n")
    path.chmod(0o600)
    assert key_from_file(path) == base64.b64decode(text)
    assert key_from_environment({at_rest.VARIABLE: text}) == base64.b64decode(text)
    assert key_from_environment({}) is None
    for mode in (0o640, 0o604, 0o601):
        path.chmod(mode)
        with pytest.raises(ConfigError, match="chmod 600"):
            key_from_file(path)
    path.chmod(0o600)
    path.write_text("c2hvcnQ=")
    with pytest.raises(ConfigError, match="expected 32 bytes in base64"):
        key_from_file(path)
    with pytest.raises(ConfigError, match="FEDLORA_CHECKPOINT_KEY: expected 32 bytes"):
        key_from_environment({at_rest.VARIABLE: "not base64!"})
    with pytest.raises(ConfigError, match="cannot be read"):
        key_from_file(tmp_path / "none")


def test_a_variable_that_is_no_text_is_refused_as_any_other(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="FEDLORA_CHECKPOINT_KEY: expected 32 bytes"):
        key_from_environment({at_rest.VARIABLE: "\udcff" * 44})  # as os.environ gives bytes that are no UTF-8
