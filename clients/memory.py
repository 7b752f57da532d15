"""What a client keeps between messages, on disk: its last answer, and its optimiser's moments where a plan asks for it.

Flower's context is not trusted to survive.
"""

from __future__ import annotations

import hashlib
import os
import re
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load, save

from fedlora.errors import CheckpointError

_PLAIN = re.compile(r"[A-Za-z0-9_-]{1,100}")
_DIGEST = 32  # bytes


class Memory:
    """One client's folder, keyed by fedlora's run id and the client's stable id; nobody else may read it.

    It holds the last answer with the digests of that and of the ask that it answered, so that the same question, asked
    again after a crash, gets the same bytes without training twice.
    """

    def __init__(self, root: Path, run: str, client: str) -> None:
        self._folder = root / _safe(run) / _safe(client)

    def recall(self, ask: bytes) -> bytes | None:
        """The answer given to exactly this ask, or None, also where a crash tore what was kept."""
        try:
            data = (self._folder / "answer").read_bytes()
        except FileNotFoundError:
            return None
        answer = data[2 * _DIGEST :]
        kept = data[: 2 * _DIGEST]
        return answer if kept == hashlib.sha256(ask).digest() + hashlib.sha256(answer).digest() else None

    def remember(self, ask: bytes, answer: bytes) -> None:
        """Keep `answer` for `ask`, in place of the one before; whole or not at all.

        Raises: CheckpointError if the disk refuses; the one before is intact.
        """
        self._write("answer", hashlib.sha256(ask).digest() + hashlib.sha256(answer).digest() + answer)

    def moments(self, round_: int) -> dict[str, NDArray[np.floating]]:
        """AdamW's moments as they were after this client's last round before `round_`; empty if there was none.

        Raises: CheckpointError if the file is damaged.
        """
        before = [path for number, path in self._kept_moments() if number < round_]
        if not before:
            return {}
        try:
            return dict(load(before[-1].read_bytes()))
        except (OSError, SafetensorError, ValueError, KeyError) as error:
            raise CheckpointError(
                f"{before[-1]} cannot be read: {error}. Delete the folder to begin with fresh moments."
            ) from error

    def keep_moments(self, round_: int, moments: dict[str, NDArray[np.floating]]) -> None:
        """Keep the moments after `round_`, and those of one round before, which a repeated round starts from.

        Raises: CheckpointError if the disk refuses.
        """
        self._write(f"moments-{round_:06d}", save({k: np.array(x, order="C") for k, x in moments.items()}))
        for _, path in self._kept_moments()[:-2]:
            path.unlink(missing_ok=True)

    def _kept_moments(self) -> list[tuple[int, Path]]:
        found = self._folder.glob("moments-[0-9][0-9][0-9][0-9][0-9][0-9]")
        return sorted((int(path.name.removeprefix("moments-")), path) for path in found)

    def _write(self, name: str, data: bytes) -> None:
        partial = self._folder / f"{name}.partial"
        try:
            for folder in (self._folder.parents[1], self._folder.parent, self._folder):
                folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            with open(partial, "wb", opener=_private) as file:
                file.write(data)
            os.replace(partial, self._folder / name)
        except OSError as error:
            raise CheckpointError(
                f"cannot keep {len(data):,} bytes in {self._folder}: {error.strerror or error}. Free some space or "
                "mend the permissions."
            ) from error


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


def _safe(name: str) -> str:
    """A folder name that no id can use to leave the root: the id if it is plain, else its hash."""
    return name if _PLAIN.fullmatch(name) else hashlib.sha256(name.encode(errors="surrogatepass")).hexdigest()
