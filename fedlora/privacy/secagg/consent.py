"""What a client must remember of a run so that no two sums can be subtracted from one another.

Sums of the same updates over two sets of clients differ by the updates of few. So a client answers one unmasking a
round (one for each of its parts), and never lends itself to an attempt while an earlier one, for which it sent its
vector, could still be opened. The record is to be on disk before the message that it allows is sent: `Consents.save`
must return only then.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import asdict, dataclass, replace
from typing import Any, Protocol

from fedlora.errors import CheckpointError
from fedlora.privacy.secagg.context import Context
from fedlora.privacy.secagg.refusal import Refused

_FORMAT = "fedlora-secagg-consent-v1"


@dataclass(frozen=True)
class Signed:
    """An attempt for which this client sent its vector: `threshold` of `neighbourhood` could open it, without it."""

    attempt: int
    threshold: int
    neighbourhood: tuple[str, ...]


@dataclass(frozen=True)
class Consent:
    """One client's record of one run: the latest round, and in it the latest part and attempt that it began.

    `answered` is the last part whose unmasking it answered, 0 if none; `survivors` are those of part 1.
    """

    run: str
    round: int = -1
    parts: int = 1
    part: int = 0
    attempt: int = -1
    answered: int = 0
    survivors: tuple[str, ...] = ()
    signed: tuple[Signed, ...] = ()

    def begin(self, context: Context) -> Consent:
        """The record with this session begun. Raises: Refused if the client may not take part in it."""
        if context.run != self.run:
            raise Refused("run", f"session of run {context.run!r}, and this record is of {self.run!r}")
        if context.round < self.round:
            raise Refused("round", f"round {context.round} is over; the latest begun is {self.round}")
        if context.round > self.round:
            if context.part != 1:
                raise Refused("parts", f"round {context.round} begins with part {context.part}")
            return Consent(self.run, context.round, context.parts, 1, context.attempt)
        if context.parts != self.parts:
            raise Refused("parts", f"round {self.round} began with {self.parts} parts, not {context.parts}")
        if context.part <= self.answered:
            raise Refused(
                "unmasked",
                f"round {self.round}, part {context.part} was unmasked with this client's help; another sum of "
                "the same updates is refused for good, go on to the next round",
            )
        if context.part == 1:
            if context.attempt <= self.attempt:
                raise Refused("attempt", f"attempt {context.attempt} of round {self.round} was begun before")
            return replace(self, attempt=context.attempt)
        if self.answered != 1 or self.part != 1 or context.attempt != self.attempt:
            raise Refused("parts", f"part 2 comes once, after part 1 of the same attempt; round {self.round} is lost")
        if tuple(sorted(context.members)) != self.survivors:
            raise Refused("parts", "part 2 is for the survivors of part 1, all of them and nobody else")
        return replace(self, part=2, signed=())

    def require_closed(self, present: Collection[str]) -> None:
        """No earlier attempt that has the client's vector can be opened, given who is `present` in the latest one.

        Whoever is present never answers for an earlier attempt. With t of the s in that attempt's neighbourhood
        present, c of them helping the server, at most s - t + c answer: too few for this client's seed while
        c < 2t - s, which is what unmasking itself bears. So the earlier sum stays closed. `present` are neighbours of
        the latest attempt, the only ones of whom a client has proof: on a sparse graph that was drawn for another
        roster they are rarely enough, and a round that failed after its vectors were sent is then lost.
        Raises: Refused if fewer than t are present.
        """
        for old in self.signed:
            here = len(set(old.neighbourhood) & set(present))
            if old.attempt != self.attempt and here < old.threshold:
                raise Refused(
                    "retry",
                    f"{here} neighbours of attempt {old.attempt} are here, and with fewer than {old.threshold} it "
                    "could still be opened by the others; the two sums would differ by few; go on to the next round",
                )

    def sign(self, context: Context, neighbourhood: Collection[str]) -> Consent:
        """The record with this session's vector sent, or its survivors signed.

        Raises: Refused if a later session was begun.
        """
        self._require_latest(context)
        new = Signed(context.attempt, context.threshold, tuple(sorted(neighbourhood)))
        return replace(self, signed=(*(s for s in self.signed if s.attempt != context.attempt), new))

    def answer(self, context: Context, survivors: Collection[str]) -> Consent:
        """The record with this session unmasked. Raises: Refused if it was before, or a later one was begun."""
        self._require_latest(context)
        return replace(self, answered=context.part, survivors=tuple(sorted(survivors)))

    def _require_latest(self, context: Context) -> None:
        got = (context.run, context.round, context.part, context.attempt)
        if got != (self.run, self.round, self.part, self.attempt) or self.answered >= context.part:
            raise Refused(
                "attempt",
                f"round {context.round}, part {context.part}, attempt {context.attempt} is not what this client is in: "
                f"{self.round}, {self.part}, {self.attempt}, part {self.answered} of it answered",
            )

    def to_bytes(self) -> bytes:
        """Canonical JSON, for the caller to keep."""
        return json.dumps({"format": _FORMAT, **asdict(self)}, sort_keys=True, separators=(",", ":")).encode()

    @classmethod
    def from_bytes(cls, data: bytes) -> Consent:
        """The record in these bytes. Raises: CheckpointError if they are not what `to_bytes` gives."""
        try:
            values: dict[str, Any] = json.loads(data)
            if values.pop("format") != _FORMAT:
                raise ValueError("another format")
            signed = tuple(
                Signed(s["attempt"], s["threshold"], tuple(s["neighbourhood"])) for s in values.pop("signed")
            )
            record = cls(survivors=tuple(values.pop("survivors")), signed=signed, **values)
            canonical = record.to_bytes()
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise CheckpointError(f"not a record of secure sums: {type(error).__name__}: {error}") from None
        if canonical != data:
            raise CheckpointError("a record of secure sums that was edited by hand; without it nothing is answered")
        return record


class Consents(Protocol):
    """Where a client's record of one run is kept, for one process at a time. `save` returns once it is on the disk."""

    def load(self) -> Consent: ...

    def save(self, consent: Consent) -> None: ...
