"""Numbers as people read them."""

from __future__ import annotations

from typing import Final

NOTHING: Final = "–"
_WORDS: Final = "no one two three four five six seven eight nine ten eleven twelve".split()


def percent(share: float | None, digits: int = 0) -> str:
    """A share from 0 to 1: `84 %`."""
    return NOTHING if share is None else f"{100 * share:.{digits}f} %"


def size(count: float | None) -> str:
    """Bytes, in powers of 1000: `3.1 MB`."""
    if count is None:
        return NOTHING
    for unit in ("B", "kB", "MB", "GB"):
        if count < 999.5:
            return f"{count:.0f} {unit}" if count >= 99.5 or unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:,.1f} TB"


def duration(seconds: float | None) -> str:
    """`0.4 s`, `58 s`, `3 min 20 s`, `2 h 5 min`."""
    if seconds is None:
        return NOTHING
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60:,} h {minutes % 60} min"


def decimal(value: float | None) -> str:
    """Three significant digits, without an exponent where that reads well."""
    if value is None:
        return NOTHING
    if 1000 <= abs(value) < 1e7:
        return f"{value:,.0f}"
    if value == 0:
        return "0"
    return f"{value:#.3g}".removesuffix(".") if 1e-4 <= abs(value) < 1000 else f"{value:.1e}"


def whole(value: float | None) -> str:
    """`12,345`."""
    return NOTHING if value is None else f"{value:,.0f}"


def count(number: int, thing: str) -> str:
    """`one client`, `ten clients`, `1,000 clients`."""
    return f"{word(number)} {thing}{'' if number == 1 else 's'}"


def word(number: int) -> str:
    """`ten`, `1,000`."""
    return _WORDS[number] if number < len(_WORDS) else f"{number:,}"
