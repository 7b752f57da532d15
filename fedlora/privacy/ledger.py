"""What was spent, on disk before anything leaves: an append-only ledger of charges and of what each one released.

    ledger.charge(key, event)      before noise is drawn; refused beyond the budget
    ledger.seal(key, digest)       once the noised bytes are made, before they leave
    ... release ...

Both return only when the line is on disk, so a crash can lose a release but never a charge. After a crash, by `key`:
not charged: nothing left; charged, not sealed: nothing left either, so new noise may be drawn under the same charge;
sealed: the bytes may be out, and only bytes of that digest may leave under this key. Noise drawn again for the same
data is another release and needs another key.

The file is JSON lines, the terms first. Every line carries the SHA-256 of the line before it and itself; a line that
was altered, taken out or put in between breaks the chain and the ledger is refused. What a chain cannot see is an end
cut off: keep `head` elsewhere (a checkpoint, a manifest) and give it to `require`.

A torn last line, without its newline, is cut off when the ledger is opened: the call that wrote it had not returned, so
nothing left under it. A whole line whose call had not returned stays: it counts, and the same call again finds it.
One process at a time (flock). For local POSIX file systems; a disk that lies about fsync is beyond us.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Any

from fedlora.errors import ConfigError, FedLoRAError
from fedlora.privacy.accounting import RELATION, Event, Unit, epsilon, within

__all__ = ["BudgetSpent", "Key", "Ledger", "LedgerError", "Terms"]

FORMAT = "fedlora-ledger-1"


class LedgerError(FedLoRAError):
    """A ledger that is missing, damaged, held by another process, of other terms, or asked to contradict itself."""


class BudgetSpent(FedLoRAError):
    """A charge that would pass the budget; nothing was written."""


@dataclass(frozen=True, kw_only=True)
class Terms:
    """What a ledger promises: `owner` (the server, or one node) keeps `unit`s within `epsilon` at `delta`, for good.

    All runs and tasks on the same data share the one budget. Raises: ConfigError for a number out of its range.
    """

    owner: str
    unit: Unit
    epsilon: float
    delta: float

    def __post_init__(self) -> None:
        if not (0.0 < self.epsilon < float("inf") and 0.0 < self.delta < 1.0):
            raise ConfigError(
                f"{self.owner}: a budget needs a finite epsilon above 0 and a delta between 0 and 1, got "
                f"{self.epsilon} and {self.delta}"
            )


@dataclass(frozen=True, kw_only=True, order=True)
class Key:
    """One release. `release` tells apart what is released twice in a round: an attempt, a task, a phase; `part` the
    parts of one release that are noised by themselves."""

    run: str
    round: int
    release: str
    part: str = ""


class Ledger:
    """An open ledger, by `Ledger.open`. A context manager; `close` lets go of it.

    After a failed write nothing more is accepted: what is on disk is then unknown until it is opened again.
    """

    def __init__(self, path: Path, descriptor: int, terms: Terms) -> None:
        self.path, self.terms = path, terms
        self._descriptor = descriptor
        self._sound = True
        self._head = hashlib.sha256(FORMAT.encode()).hexdigest()
        self._heads = {self._head}
        self._charges: dict[Key, Event] = {}
        self._seals: dict[Key, str] = {}

    @classmethod
    def open(cls, path: Path, terms: Terms, *, create: bool = False) -> Ledger:
        """The ledger at `path`, read and verified; with `create` a new one (mode 0600) if there is none.

        Resume without `create`: a ledger that is gone must not look like one with nothing spent.
        Raises: LedgerError if it is missing, damaged, of other terms, open elsewhere, or others may read it.
        """
        flags = os.O_RDWR | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW | (os.O_CREAT if create else 0)
        try:
            descriptor = os.open(path, flags, 0o600)
        except OSError as error:
            raise LedgerError(
                f"{terms.owner}: the privacy ledger {path} cannot be opened: {error.strerror}; without it what was "
                "spent is unknown. Bring it back; only a first run may make a new one"
            ) from error
        ledger = cls(path, descriptor, terms)
        try:
            ledger._load(create)
        except BaseException:
            ledger.close()
            raise
        return ledger

    def close(self) -> None:
        """Let go of the file; nothing more is accepted."""
        self._sound = False
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def __enter__(self) -> Ledger:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # -- what was spent

    @property
    def charges(self) -> Mapping[Key, Event]:
        """Every charge, in the order in which they were made."""
        return MappingProxyType(self._charges)

    @property
    def head(self) -> str:
        """The hash that the chain ends with, 64 hexadecimal digits; see `require`."""
        return self._head

    def epsilon(self) -> float:
        """Epsilon of all charges at the terms' delta; cost as `fedlora.privacy.accounting.epsilon`."""
        return epsilon(self._charges.values(), self.terms.delta)

    def sealed(self, key: Key) -> str | None:
        """The digest of the only bytes that may leave under this key; None if nothing has left."""
        return self._seals.get(key)

    def require(self, head: str) -> None:
        """Raises: LedgerError unless the chain once ended with `head`: else lines written since are missing here."""
        if head not in self._heads:
            raise LedgerError(
                f"{self._who}: the line {head[:16]} should be in it and is not, after {len(self._charges)} charges; "
                "is this an old copy? Bring the newest back"
            )

    # -- spending

    def charge(self, key: Key, event: Event) -> bool:
        """Write the charge down, on disk when this returns. True: it is new; False: the same was charged before.

        Raises: BudgetSpent if all charges with this one would pass the budget; LedgerError if the key was charged with
        another event, or the disk fails. A refused charge changes nothing.
        """
        self._require_sound()
        before = self._charges.get(key)
        if before is not None:
            if before != event:
                raise LedgerError(
                    f"{self._who}: {key} was charged with {before} and now comes with {event}; one is wrong"
                )
            return False
        if not within([*self._charges.values(), event], self.terms.delta, self.terms.epsilon):
            spent = epsilon(self._charges.values(), self.terms.delta)
            would = epsilon([*self._charges.values(), event], self.terms.delta)
            raise BudgetSpent(
                f"{self._who}: {key} would bring epsilon from {spent:.4g} to {would:.4g}, above the budget of "
                f"{self.terms.epsilon:g} at delta {self.terms.delta:g}; stop here, or plan more noise or fewer rounds"
            )
        self._append({"charge": asdict(key), "event": event.to_json()})
        return True

    def seal(self, key: Key, digest: str) -> bool:
        """Write down which bytes (`digest`: SHA-256, hexadecimal) leave under this charge. False: the same as before.

        Raises: LedgerError if the key was never charged, was sealed with another digest, or the disk fails.
        """
        self._require_sound()
        if len(digest) != 64 or set(digest) - set("0123456789abcdef"):
            raise LedgerError(f"{self._who}: a digest is 64 hexadecimal digits in lower case, got {digest!r}")
        if key not in self._charges:
            raise LedgerError(f"{self._who}: {key} is to be released and was never charged")
        before = self._seals.get(key)
        if before is not None:
            if before != digest:
                raise LedgerError(
                    f"{self._who}: under {key} other bytes may have left already; release those again (digest "
                    f"{before[:16]}), or charge a new release"
                )
            return False
        self._append({"seal": asdict(key), "digest": digest})
        return True

    # -- lines

    @property
    def _who(self) -> str:
        return f"{self.terms.owner}: privacy ledger {self.path}"

    def _require_sound(self) -> None:
        if not self._sound:
            raise LedgerError(f"{self._who}: it is closed, or a write to it failed; open it again")

    def _line(self, body: Mapping[str, Any]) -> tuple[bytes, str]:
        text = json.dumps(body, sort_keys=True, separators=(",", ":"))
        digest = hashlib.sha256(f"{self._head}{text}".encode()).hexdigest()
        return f'{{"body":{text},"hash":"{digest}"}}\n'.encode(), digest

    def _append(self, body: Mapping[str, Any]) -> None:
        line, digest = self._line(body)
        self._sound = False
        try:
            rest = memoryview(line)
            while rest:
                rest = rest[os.write(self._descriptor, rest) :]
            os.fsync(self._descriptor)
        except OSError as error:
            raise LedgerError(f"{self._who}: writing failed: {error.strerror}; nothing may leave") from error
        self._take(body, digest)
        self._sound = True

    def _take(self, body: Mapping[str, Any], digest: str) -> None:
        """Raises: KeyError, TypeError, ConfigError or LedgerError for a body that cannot be."""
        if "charge" in body:
            key = Key(**body["charge"])
            if key in self._charges:
                raise LedgerError(f"{self._who}: {key} is charged twice")
            self._charges[key] = Event.from_json(body["event"])
        elif "seal" in body:
            self._seals[Key(**body["seal"])] = str(body["digest"])
        elif body != self._terms():
            raise LedgerError(f"{self._who}: it was opened with {body['terms']}, now with {self._terms()['terms']}")
        self._head = digest
        self._heads.add(digest)

    def _terms(self) -> dict[str, Any]:
        return {"terms": {"format": FORMAT, "relation": RELATION, **asdict(self.terms)}}

    def _load(self, create: bool) -> None:
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise LedgerError(f"{self._who}: another process holds it; is this owner running twice?") from error
        status = os.fstat(self._descriptor)
        if status.st_mode & 0o077:
            raise LedgerError(f"{self._who}: others may use it (mode {status.st_mode & 0o777:o}); chmod 600 it")
        raw = b""
        while part := os.pread(self._descriptor, 1 << 20, len(raw)):
            raw += part
        whole = raw.rfind(b"\n") + 1
        if not whole and not (create and self._line(self._terms())[0].startswith(raw)):
            raise LedgerError(f"{self._who}: it has no terms, so it was never begun or is damaged; bring it back")
        for number, line in enumerate(raw[:whole].splitlines(keepends=True), 1):
            self._read(number, line)
        if whole < len(raw):
            os.ftruncate(self._descriptor, whole)
        if not whole:
            self._append(self._terms())
        # Lines of a process that was killed between write and fsync are here and perhaps not yet on disk.
        os.fsync(self._descriptor)
        folder = os.open(self.path.absolute().parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)

    def _read(self, number: int, line: bytes) -> None:
        damaged = f"{self._who}: line {number} is damaged, or was changed; bring the right file back"
        try:
            body = json.loads(line)["body"]
            again, digest = self._line(body)
            first = "terms" in body
        except (ValueError, KeyError, TypeError) as error:
            raise LedgerError(damaged) from error
        if again != line or first != (number == 1):
            raise LedgerError(damaged)
        try:
            self._take(body, digest)
        except (KeyError, TypeError, ConfigError) as error:
            raise LedgerError(damaged) from error
