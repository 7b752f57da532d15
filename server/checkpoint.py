"""Checkpoints: one file a round, whole or not there at all.

checkpoint = SHA-256 of the rest | the state, as `fedlora.wire.encode_state` writes it

With a key that whole is encrypted (`fedlora.at_rest`), under the file's name; a plain checkpoint is then refused.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
from pathlib import Path

from fedlora.at_rest import is_sealed, seal, unseal
from fedlora.errors import CheckpointError, WireError
from fedlora.state import GlobalState
from fedlora.wire import decode_state, encode_state

_NAME = re.compile(r"round-(\d{6,})\.flw")
_DIGEST = 32  # bytes
KEPT = 2  # the newest, and the one before it


def write_atomic(path: Path, data: bytes) -> None:
    """Write so that `path` holds all of `data` or what it held before, through any crash; makes the folder if need be.

    A temporary file in the same folder, fsync, rename, fsync of the folder.
    Raises: CheckpointError if the disk is full or the folder cannot be written; the old file is intact.
    """
    temporary = path.with_name(f".{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise CheckpointError(
            f"cannot write {path} ({len(data):,} bytes): {error.strerror or error}. Nothing that was saved before is "
            "lost. Free some space or mend the permissions, then resume the run."
        ) from error


def save(folder: Path, round_: int, state: GlobalState, *, key: bytes | None = None) -> Path:
    """Write the state after `round_` (0 is the opening), then drop all but the newest `KEPT` checkpoints.

    Raises: CheckpointError as `write_atomic`; the checkpoints before are intact.
    """
    path = folder / f"round-{round_:06d}.flw"
    data = encode_state(state)
    data = hashlib.sha256(data).digest() + data
    write_atomic(path, data if key is None else seal(data, key, path.name))
    for _, old in _found(folder)[:-KEPT]:
        with contextlib.suppress(OSError):  # one checkpoint too many harms nobody
            old.unlink()
    return path


def latest(folder: Path, *, key: bytes | None = None) -> tuple[int, GlobalState] | None:
    """(round, state) of the newest checkpoint, or None if there is none.

    Raises: CheckpointError if the newest file cannot be read, any of its bytes is not what was written, or it is
    encrypted and there is no key, or plain and there is one.
    """
    found = _found(folder)
    if not found:
        return None
    round_, path = found[-1]
    fix = f"delete it to go on from {found[-2][1].name}" if len(found) > 1 else "start the run anew in another folder"
    try:
        data = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}. Mend that, then resume.") from error
    if is_sealed(data) != (key is not None):
        why = "encrypted: give its key" if key is None else "not encrypted, and a key was given"
        raise CheckpointError(f"{path} is {why}; mend that, then resume")
    if key is not None:
        data = unseal(data, key, path.name)
    state = memoryview(data)[_DIGEST:]
    if hashlib.sha256(state).digest() != data[:_DIGEST]:
        raise CheckpointError(f"{path} is damaged: its {len(data):,} bytes do not match their SHA-256; {fix}.")
    try:
        return round_, decode_state(bytes(state))
    except WireError as error:
        raise CheckpointError(
            f"{path} was written by another version of fedlora: {error}; resume with that."
        ) from error


def _found(folder: Path) -> list[tuple[int, Path]]:
    matches = ((_NAME.fullmatch(path.name), path) for path in folder.glob("round-*.flw"))
    return sorted((int(match[1]), path) for match, path in matches if match)
