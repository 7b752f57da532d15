"""Files that another process writes: whole small ones, and logs of one JSON object a line that grow."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, Final, Generic, Protocol, TypeVar

__all__ = ["Fold", "Tail", "read_whole"]

_MARK: Final = 96  # bytes before the place that was reached, by which a log is known again; a chain of hashes fits in
_NO_EVENT: Final = (KeyError, TypeError, ValueError, AttributeError, OverflowError, RecursionError)


class Fold(Protocol):
    """What is kept of a log."""

    def take(self, event: Any) -> None:
        """Keep one line; any error of `_NO_EVENT` says that it is no event, and nothing of it is kept."""


_AnyFold = TypeVar("_AnyFold", bound=Fold)


class Tail(Generic[_AnyFold]):
    """A log and what is kept of it. Every look reads the lines that were added; one without its newline waits.

    A log that was cut or replaced, as a resumed run does, is read from its start into a new fold. `damaged` counts
    lines that are no events. Cost: once the file, then what was added; memory: the fold and the longest line.
    Raises: OSError, here and below, if the file is there and cannot be read.
    """

    def __init__(self, path: Path, make: Callable[[], _AnyFold]) -> None:
        self.path = path
        self._make = make
        self._restart()

    def look(self) -> _AnyFold:
        """The fold of all whole lines that are there now."""
        try:
            with self.path.open("rb") as file:
                file.seek(self._at - len(self._mark))
                if file.read(len(self._mark)) != self._mark:
                    self._restart()
                    file.seek(0)
                self._read(file)
        except (FileNotFoundError, NotADirectoryError):
            self._restart()
        return self._fold

    def _restart(self) -> None:
        self._fold = self._make()
        self._at = 0
        self._mark = b""
        self.damaged = 0

    def _read(self, file: BinaryIO) -> None:
        for line in file:
            if not line.endswith(b"\n"):
                return
            self._at += len(line)
            self._mark = (self._mark + line[-_MARK:])[-_MARK:]
            try:
                self._fold.take(json.loads(line))
            except _NO_EVENT:
                self.damaged += 1


def read_whole(path: Path) -> bytes | None:
    """The bytes of a small file, None if there is none."""
    try:
        return path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return None
