"""Charts as inline SVG: colours are the page's CSS variables, so they follow its light and dark."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from typing import Final

Point = tuple[float, float]

WIDTH: Final = 480
HEIGHT: Final = 250
LEFT, RIGHT, TOP, BOTTOM = 52, 104, 14, 30
LINE_HEIGHT: Final = 14
NAME: Final = 16  # letters of a row's name in a heat map
FEW: Final = 4  # up to so many rows or columns it has large cells


@dataclass(frozen=True, kw_only=True)
class Series:
    """One line; `tone` 1 to 5 picks its colour, and the name stands at its end."""

    name: str
    points: Sequence[Point]
    tone: int = 1


def ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round numbers that span `low` to `high`; at least two."""
    span = high - low if high - low > 1e-300 else 1.0
    raw = span / about
    unit = 10.0 ** math.floor(math.log10(raw))
    step = next(unit * m for m in (1, 2, 5, 10) if unit * m >= raw * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    digits = 12 - math.floor(math.log10(step))
    return [round(i * step, digits) for i in range(first, max(last, first + 1) + 1)]


def line_chart(
    title: str,
    series: Sequence[Series],
    show: Callable[[float], str],
    *,
    references: Sequence[tuple[str, float]] = (),
    top: float | None = None,
    x_name: str = "round",
    spans: Sequence[tuple[float, str]] = (),
    values: bool = True,
) -> str:
    """Lines over rounds from zero up, with dashed levels to compare with. Empty text if there is nothing to draw.

    `spans`: where along x something begins that lasts until the next does, and its name, in order. `values`: whether
    the last value stands beside a line's name.
    """
    series = [s for s in series if s.points]
    if not series:
        return ""
    xs = [x for s in series for x, _ in s.points]
    highest = max([y for s in series for _, y in s.points] + [y for _, y in references])
    scale = ticks(0.0, top if top is not None else highest or 1.0)
    low_x, high_x = min(xs), max(xs)
    if low_x == high_x:
        low_x, high_x = low_x - 0.5, high_x + 0.5

    def px(x: float) -> float:
        return round(LEFT + (x - low_x) / (high_x - low_x) * (WIDTH - LEFT - RIGHT), 1)

    def py(y: float) -> float:
        return round(HEIGHT - BOTTOM - y / scale[-1] * (HEIGHT - TOP - BOTTOM), 1)

    parts = [_frame(scale, py, show)]
    for x in _rounds(min(xs), max(xs)):
        parts.append(f'<text x="{px(x)}" y="{HEIGHT - 11}" text-anchor="middle">{x:g}</text>')
    parts.append(f'<text x="{WIDTH - RIGHT + 14}" y="{HEIGHT - 11}" class="dim">{escape(x_name)}</text>')
    parts += _spans([(px(max(x, low_x)), name) for x, name in spans if x < high_x])
    labels: list[tuple[float, str, str]] = []
    for name, y in references:
        parts.append(f'<line class="ref" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{py(y)}" y2="{py(y)}"/>')
        labels.append((py(y), f"{name} {show(y)}", "dim"))
    for s in series:
        path = " ".join(f"{px(x)},{py(y)}" for x, y in s.points)
        parts.append(f'<polyline class="line t{s.tone}" points="{path}"/>')
        if len(s.points) <= 40:
            parts += [
                f'<circle class="dot t{s.tone}" cx="{px(x)}" cy="{py(y)}" r="2.6">'
                f"<title>{escape(s.name)}, {escape(x_name)} {x:g}: {escape(show(y))}</title></circle>"
                for x, y in s.points
            ]
        value = f" {show(s.points[-1][1])}" if values else ""
        labels.append((py(s.points[-1][1]), s.name + value, f"name t{s.tone}"))
    parts.append(_labels(labels))
    said = "; ".join(f"{s.name} from {show(s.points[0][1])} to {show(s.points[-1][1])}" for s in series)
    return _svg(title, said, parts)


def curve_chart(
    title: str,
    series: Sequence[Series],
    show: Callable[[float], str],
    show_x: Callable[[float], str],
) -> str:
    """Lines over a logarithmic axis, from the lowest to the highest score: what a score costs in bytes. Every x must be
    positive. Empty text if there is nothing to draw.
    """
    series = [s for s in series if s.points]
    if not series:
        return ""
    ys = [y for s in series for _, y in s.points]
    scale = ticks(min(ys), max(ys))
    logs = [math.log10(x) for s in series for x, _ in s.points]
    low, high = min(logs), max(logs)
    if high - low < 0.1:
        low, high = low - 0.5, high + 0.5

    def px(x: float) -> float:
        return round(LEFT + 8 + (math.log10(x) - low) / (high - low) * (WIDTH - LEFT - RIGHT - 8), 1)

    def py(y: float) -> float:
        return round(HEIGHT - BOTTOM - (y - scale[0]) / (scale[-1] - scale[0]) * (HEIGHT - TOP - BOTTOM), 1)

    parts = [_frame(scale, py, show)]
    marks = [m * 10.0**e for e in range(math.floor(low), math.ceil(high) + 1) for m in (1, 2, 5)]
    marks = [x for x in marks if low - 1e-9 <= math.log10(x) <= high + 1e-9]
    for x in marks[:: math.ceil(len(marks) / 5)] if marks else [10**low, 10**high]:
        parts.append(f'<text x="{px(x)}" y="{HEIGHT - 11}" text-anchor="middle">{escape(_short(show_x(x)))}</text>')
    labels: list[tuple[float, str, str]] = []
    for s in series:
        path = " ".join(f"{px(x)},{py(y)}" for x, y in s.points)
        parts.append(f'<polyline class="line t{s.tone}" points="{path}"/>')
        parts += [
            f'<circle class="dot t{s.tone}" cx="{px(x)}" cy="{py(y)}" r="2.6">'
            f"<title>{escape(s.name)}, {escape(show_x(x))}: {escape(show(y))}</title></circle>"
            for x, y in s.points
        ]
        labels.append((py(max(s.points)[1]), s.name, f"name t{s.tone}"))
    parts.append(_labels(labels))
    said = "; ".join(f"{s.name}: " + ", ".join(f"{show(y)} at {show_x(x)}" for x, y in s.points) for s in series)
    return _svg(title, said, parts)


def traffic_chart(
    title: str, rounds: Sequence[float], up: Sequence[float], down: Sequence[float], show: Callable[[float], str]
) -> str:
    """Two bars a round. Empty text if there is nothing to draw."""
    if not rounds:
        return ""
    scale = ticks(0.0, max(*up, *down) or 1.0)
    width = (WIDTH - LEFT - RIGHT) / len(rounds)
    bar = min(18.0, width * 0.38)

    def py(y: float) -> float:
        return round(HEIGHT - BOTTOM - y / scale[-1] * (HEIGHT - TOP - BOTTOM), 1)

    parts = [_frame(scale, py, show)]
    labelled = set(_rounds(rounds[0], rounds[-1]))
    for i, (number, u, d) in enumerate(zip(rounds, up, down, strict=True)):
        middle = LEFT + (i + 0.5) * width
        for x, value, tone, name in ((middle - bar, u, 1, "up"), (middle, d, 2, "down")):
            parts.append(
                f'<rect class="bar t{tone}" x="{x:.1f}" y="{py(value)}" width="{max(bar - 1, 0.5):.1f}" '
                f'height="{HEIGHT - BOTTOM - py(value):.1f}">'
                f"<title>round {number:g}, {name}: {escape(show(value))}</title></rect>"
            )
        if number in labelled:
            parts.append(f'<text x="{middle:.1f}" y="{HEIGHT - 11}" text-anchor="middle">{number:g}</text>')
    parts.append(f'<text x="{WIDTH - RIGHT + 14}" y="{HEIGHT - 11}" class="dim">round</text>')
    last = [(py(up[-1]), f"up {show(up[-1])}", "name t1"), (py(down[-1]), f"down {show(down[-1])}", "name t2")]
    parts.append(_labels(last))
    return _svg(title, f"up {show(sum(up))} and down {show(sum(down))} in all", parts)


def heat_map(
    title: str,
    rows: Sequence[str],
    columns: Sequence[str],
    cells: Sequence[Sequence[float | None]],
    show: Callable[[float], str],
) -> str:
    """Cells `[rows, columns]` of values from 0 to 1, the fuller the more, each with its number; None leaves one empty.

    The numbers keep the colour of the page's text, dark on light and light on dark. Empty text without a value.
    """
    if all(value is None for line in cells for value in line):
        return ""
    cell, high = 96 if len(columns) <= FEW else 58, 44 if len(rows) <= FEW else 30
    left = 14 + 8 * min(NAME, max(map(len, rows)))
    width, height = left + cell * len(columns) + 2, TOP + 12 + high * len(rows) + 4
    parts, said = [], []
    for i, name in enumerate(columns):
        parts.append(_named(left + (i + 0.5) * cell, TOP + 4, "middle", "dim", name, cell // 8))
    for j, (name, line) in enumerate(zip(rows, cells, strict=True)):
        y = TOP + 12 + j * high
        parts.append(_named(left - 10, y + high / 2 + 4, "end", "", name, NAME))
        for i, value in enumerate(line):
            if value is None:
                continue
            what = f"{name}, {columns[i]}: {show(value)}"
            share = 100 * min(max(value, 0.0), 1.0)
            x = left + i * cell
            parts.append(
                f'<g><title>{escape(what)}</title><rect class="cell" style="--v:{share:.1f}%" x="{x}" y="{y}" '
                f'width="{cell}" height="{high}"/><text x="{x + cell / 2:.1f}" y="{y + high / 2 + 4:.1f}" '
                f'text-anchor="middle" class="value">{_cell(value)}</text></g>'
            )
            said.append(what)
    return (
        f'<svg class="chart" viewBox="0 0 {width} {height}" style="min-width:{0.9 * width:.0f}px;max-width:{width}px" '
        f'role="img"><title>{escape(title)}</title><desc>{escape("; ".join(said))}</desc>{"".join(parts)}</svg>'
    )


def spark(values: Sequence[float], title: str) -> str:
    """A line as high as a word, from the first value to the last."""
    if len(values) < 2:
        return ""
    low, high = min(values), max(values)
    span = (high - low) or 1.0
    points = " ".join(
        f"{2 + i / (len(values) - 1) * 76:.1f},{18 - (v - low) / span * 15:.1f}" for i, v in enumerate(values)
    )
    x, y = points.rsplit(" ", 1)[-1].split(",")
    return (
        f'<svg class="spark" viewBox="0 0 82 20" role="img"><title>{escape(title)}</title>'
        f'<polyline class="line t1" points="{points}"/><circle class="dot t1" cx="{x}" cy="{y}" r="2.2"/></svg>'
    )


def _rounds(first: float, last: float) -> list[float]:
    """Whole rounds to write under the axis: the first, the last, and round numbers far enough from both."""
    if last - first <= 8:
        return [float(x) for x in range(int(first), int(last) + 1)]
    step = max(1.0, ticks(first, last, 6)[1] - ticks(first, last, 6)[0])
    inner = [x for x in ticks(first, last, 6) if x == int(x) and first + step * 0.6 < x < last - step * 0.6]
    return [first, *inner, last]


def _frame(scale: Sequence[float], py: Callable[[float], float], show: Callable[[float], str]) -> str:
    return "".join(
        f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{py(y)}" y2="{py(y)}"/>'
        f'<text x="{LEFT - 7}" y="{py(y) + 4}" text-anchor="end">{escape(_short(show(y)))}</text>'
        for y in scale
    )


def _spans(starts: Sequence[tuple[float, str]]) -> list[str]:
    """A line where each begins, and above the chart its name, cut to the room or left out."""
    parts = []
    for at, (x, name) in enumerate(starts):
        end = starts[at + 1][0] if at + 1 < len(starts) else float(WIDTH - RIGHT)
        room = int((end - x - 4) / 6.6)
        text = name if len(name) <= room else f"{name[: room - 1]}…" if room > 5 else ""
        parts.append(
            f'<line class="span" x1="{x}" x2="{x}" y1="{TOP - 12}" y2="{HEIGHT - BOTTOM}">'
            f"<title>{escape(name)}</title></line>"
        )
        if text:
            parts.append(f'<text x="{x + 4:.1f}" y="{TOP - 4}" class="dim">{escape(text)}</text>')
    return parts


def _named(x: float, y: float, anchor: str, css: str, name: str, room: int) -> str:
    """A name of a row or column, cut to `room` letters; whole where the pointer rests."""
    text = name if len(name) <= room else f"{name[: room // 2]}…{name[1 - room // 2 :]}"
    return (
        f'<text x="{x:g}" y="{y:g}" text-anchor="{anchor}" class="{css}">{escape(text)}'
        f"<title>{escape(name)}</title></text>"
    )


def _cell(value: float) -> str:
    """`0.25`; what would be 0.00 and is not 0 as `3e-08`."""
    return f"{value:.2f}" if value >= 0.005 or value == 0 else f"{value:.0e}"


def _short(text: str) -> str:
    """`30.0 MB` as `30 MB` and `0.500` as `0.5`: an axis needs no trailing zeros."""
    number, space, unit = text.partition(" ")
    return (number.rstrip("0").rstrip(".") if "." in number else number) + space + unit


def _labels(labels: Sequence[tuple[float, str, str]]) -> str:
    """Names at the right edge, moved apart where they would meet; long ones on two lines."""
    wrapped = [(y, _wrap(text), css) for y, text, css in sorted(labels)]
    below: list[float] = []
    for y, lines, _ in wrapped:
        start = y + 4 - (len(lines) - 1) * LINE_HEIGHT / 2
        below.append(max(start, below[-1] + len(wrapped[len(below) - 1][1]) * LINE_HEIGHT if below else TOP))
    floor = HEIGHT - BOTTOM + 4.0
    for i in reversed(range(len(below))):
        floor -= (len(wrapped[i][1]) - 1) * LINE_HEIGHT
        below[i] = min(below[i], floor)
        floor = below[i] - LINE_HEIGHT
    return "".join(
        f'<text class="{css}" x="{WIDTH - RIGHT + 8}" y="{start + i * LINE_HEIGHT:.1f}">{escape(line)}</text>'
        for start, (_, lines, css) in zip(below, wrapped, strict=True)
        for i, line in enumerate(lines)
    )


def _wrap(text: str, width: int = 15) -> list[str]:
    lines = [""]
    for word in text.replace(" %", "\u00a0%").split(" "):
        joined = f"{lines[-1]} {word}".strip()
        if len(joined) <= width or not lines[-1]:
            lines[-1] = joined
        else:
            lines.append(word)
    return [line if len(line) <= width + 2 else line[: width + 1] + "…" for line in lines]


def _svg(title: str, said: str, parts: Sequence[str]) -> str:
    return (
        f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img"><title>{escape(title)}</title>'
        f"<desc>{escape(said)}</desc>{''.join(parts)}</svg>"
    )
