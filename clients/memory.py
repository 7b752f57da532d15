"""What a client keeps between messages, on disk: its last answer. Flower's context is not trusted to survive."""

from __future__ import annotations

import hashlib
import os
import re
from pathlib import Path

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
        partial = self._folder / "answer.partial"
        try:
            for folder in (self._folder.parents[1], self._folder.parent, self._folder):
                folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            with open(partial, "wb", opener=_private) as file:
                file.write(hashlib.sha256(ask).digest() + hashlib.sha256(answer).digest())
                file.write(answer)
            os.replace(partial, self._folder / "answer")
        except OSError as error:
            raise CheckpointError(
                f"cannot keep an answer of {len(answer):,} bytes in {self._folder}: {error.strerror or error}. Free "
                "some space or mend the permissions."
            ) from error


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


def _safe(name: str) -> str:
    """A folder name that no id can use to leave the root: the id if it is plain, else its hash."""
    return name if _PLAIN.fullmatch(name) else hashlib.sha256(name.encode(errors="surrogatepass")).hexdigest()
