"""Checkpoints: one file a round, whole or not there at all.

checkpoint = SHA-256 of the rest | the state, as `fedlora.wire.encode_state` writes it
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
from pathlib import Path

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


def save(folder: Path, round_: int, state: GlobalState) -> Path:
    """Write the state after `round_` (0 is the opening), then drop all but the newest `KEPT` checkpoints.

    Raises: CheckpointError as `write_atomic`; the checkpoints before are intact.
    """
    path = folder / f"round-{round_:06d}.flw"
    data = encode_state(state)
    write_atomic(path, hashlib.sha256(data).digest() + data)
    for _, old in _found(folder)[:-KEPT]:
        with contextlib.suppress(OSError):  # one checkpoint too many harms nobody
            old.unlink()
    return path


def latest(folder: Path) -> tuple[int, GlobalState] | None:
    """(round, state) of the newest checkpoint, or None if there is none.

    Raises: CheckpointError if the newest file cannot be read, or any of its bytes is not what was written.
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
