"""What became of rows on their way in: nothing is dropped in silence."""

from __future__ import annotations

import logging
from collections import Counter
from dataclasses import dataclass
from functools import lru_cache

_SHOWN = 3  # places named in a summary


@dataclass(frozen=True, kw_only=True)
class Report:
    """`kept` rows; `dropped`: (source, reason) of each row that was not; `truncated`: sources of rows kept but cut."""

    kept: int = 0
    dropped: tuple[tuple[str, str], ...] = ()
    truncated: tuple[str, ...] = ()

    def __add__(self, other: Report) -> Report:
        return Report(
            kept=self.kept + other.kept,
            dropped=self.dropped + other.dropped,
            truncated=self.truncated + other.truncated,
        )

    def summary(self) -> str:
        """One line: how many were kept, dropped and cut, why, and the first places.

        >>> Report(kept=7, dropped=(("a.jsonl:3", "bad JSON: torn"), ("a.jsonl:9", "bad JSON: torn"))).summary()
        '7 rows kept, 2 dropped (2 bad JSON): a.jsonl:3, a.jsonl:9'
        """
        text = f"{self.kept} row{'' if self.kept == 1 else 's'} kept"
        if self.dropped:
            reasons = Counter(reason.partition(":")[0] for _, reason in self.dropped)
            counts = ", ".join(f"{count} {reason}" for reason, count in reasons.most_common())
            text += f", {len(self.dropped)} dropped ({counts}): {_places([source for source, _ in self.dropped])}"
        if self.truncated:
            text += f", {len(self.truncated)} cut at the maximum length: {_places(self.truncated)}"
        return text


def _places(sources: list[str] | tuple[str, ...]) -> str:
    return ", ".join(sources[:_SHOWN]) + (", ..." if len(sources) > _SHOWN else "")


@lru_cache(maxsize=4096)
def tell(report: Report, whose: str) -> None:
    """Warn, once for each report, of rows that were left out or cut; nothing if there were none."""
    if report.dropped or report.truncated:
        logging.getLogger("fedlora").warning("%s: %s", whose, report.summary())
