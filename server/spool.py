"""Accepted answers wait here until the round closes; folding then goes in stable-id order, whatever arrived first."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from fedlora.errors import CheckpointError
from fedlora.state import Answer
from server.checkpoint import write_atomic


class Spool(Mapping[str, Answer]):
    """client id -> Answer, iterated in id order and decoded one at a time.

    Small rounds stay in memory; past `memory_limit` bytes each further answer goes to its own file in `folder`, so the
    memory of a round does not grow with its clients. These files are worth nothing after a crash and are not synced.

    A `durable` spool keeps every answer in its file, synced before `put` returns: what was accepted stays accepted
    through a crash, and `found` gives it back. Its files outlive `clear`; whoever saved the round removes them.
    """

    def __init__(
        self, folder: Path, decode: Callable[[str, bytes], Answer], *, memory_limit: int, durable: bool = False
    ) -> None:
        self._folder = folder
        self._decode = decode
        self._limit = 0 if durable else memory_limit
        self._durable = durable
        self._held = 0
        self._memory: dict[str, bytes] = {}
        self._files: dict[str, Path] = {}

    def put(self, client: str, data: bytes) -> None:
        """Keep one accepted answer; each client has one. Raises: CheckpointError if the disk refuses."""
        if self._held + len(data) <= self._limit:
            self._memory[client] = data
            self._held += len(data)
            return
        path = self._path(client)
        try:
            if self._durable:
                write_atomic(path, data)
            else:
                self._folder.mkdir(parents=True, exist_ok=True)
                path.write_bytes(data)
        except (OSError, CheckpointError) as error:
            raise CheckpointError(
                f"cannot set aside the answer of {client} ({len(data):,} bytes) in {self._folder}: "
                f"{getattr(error, 'strerror', None) or error}. The last checkpoint is intact: free some space, then "
                "resume the run."
            ) from error
        self._files[client] = path

    def found(self, client: str) -> bytes | None:
        """What an earlier process accepted from `client` for this very ask, if it did; `keep` or `put` it to count."""
        if not self._durable:
            return None
        try:
            return self._path(client).read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise CheckpointError(f"{self._path(client)} cannot be read: {error.strerror}; mend that") from error

    def keep(self, client: str) -> None:
        """Count the answer that was `found`."""
        self._files[client] = self._path(client)

    def _path(self, client: str) -> Path:
        return self._folder / f"{hashlib.sha256(client.encode()).hexdigest()[:32]}.flw"

    def __getitem__(self, client: str) -> Answer:
        data = self._memory.get(client)
        if data is not None:
            return self._decode(client, data)
        path = self._files[client]
        try:
            data = path.read_bytes()
        except OSError as error:
            raise CheckpointError(
                f"cannot read the answer of {client} back from {path}: {error.strerror or error}. The last checkpoint "
                "is intact: resume the run."
            ) from error
        return self._decode(client, data)

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._memory.keys() | self._files.keys()))

    def __len__(self) -> int:
        return len(self._memory) + len(self._files)

    def __contains__(self, client: object) -> bool:
        return client in self._memory or client in self._files

    def clear(self) -> None:
        """Drop everything, and, unless it is durable, the folder with it, also what a crashed process left there."""
        if not self._durable:
            shutil.rmtree(self._folder, ignore_errors=True)
        self._memory.clear()
        self._files.clear()
        self._held = 0
