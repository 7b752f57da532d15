"""`fedlora status`: how a run goes, on a terminal."""

from __future__ import annotations

import time
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from fedlora.watching import NodeStatus, OpenRound, Status

__all__ = ["page", "status"]

console = Console(highlight=False)
_COLOURS: Final = {
    "running": "green",
    "done": "green",
    "failed": "red",
    "starting": "yellow",
    "waiting": "yellow",
    "stopped": "yellow",
    "paused": "yellow",
    "not started": "yellow",
}
_VERBS: Final = {"train": "trained", "measure": "measured", "evaluate": "evaluated"}
_PERIOD: Final = 1.0  # seconds between two looks
_LINES: Final = 23  # of a page without its nodes
_FEWEST: Final = 8  # nodes that are listed on any terminal


def status(
    run: Annotated[Path, typer.Argument(metavar="DEPLOY.TOML|RUN_FOLDER", help="A server's deploy.toml, or a folder.")],
    watch: Annotated[bool, typer.Option("--watch", help="Draw it again every second, until Ctrl-C.")] = False,
) -> None:
    """Tell how a run goes.

    Its rounds, nodes, refusals, bytes, and the server's certificate. Exit status 0 while it runs and when it is
    done, 3 when it paused or nobody serves it, 1 when it failed.
    """
    from fedlora.watching import watcher

    looking = watcher(run)
    found = looking.look(at=datetime.now(UTC))
    if watch:
        with Live(page(found, console.height), console=console, auto_refresh=False) as live:
            try:
                while True:
                    time.sleep(_PERIOD)
                    found = looking.look(at=datetime.now(UTC))
                    live.update(page(found, console.height), refresh=True)
            except KeyboardInterrupt:
                pass
    else:
        console.print(page(found, console.height))
    raise typer.Exit(found.exit_status)


def page(found: Status, height: int) -> RenderableType:
    """All of a status, with as many nodes as a terminal of `height` lines has room for, those with trouble first."""
    facts = Table.grid(padding=(0, 2))
    facts.add_column(style="dim", no_wrap=True)
    facts.add_column()
    for name, said, style in _facts(found):
        facts.add_row(name, Text(said, style=style))
    parts: list[RenderableType] = [facts]
    if found.nodes:
        parts += [Text(), *_nodes(found, max(_FEWEST, height - _LINES))]
    parts += [Text(f"problem: {said}", style="yellow") for said in found.problems]
    return Group(*parts)


def _facts(found: Status) -> list[tuple[str, str, str]]:
    """(what, in words, style)"""
    from fedlora.display import megabytes
    from fedlora.watching import span

    colour = _COLOURS[found.state]
    rows = [
        ("run", "  ".join(filter(None, (found.run or "none yet", found.method))), ""),
        ("state", f"{found.state}: {found.detail}" if found.detail else found.state, colour),
        ("rounds", f"{found.round} of {'?' if found.rounds is None else found.rounds} closed", ""),
    ]
    if found.open is not None:
        rows.append(("now", _open(found.open), ""))
    if not found.nodes:
        rows.append(("clients", f"{found.clients}", ""))
    if found.score is not None:
        rows.append(("score", f"{found.score.value:.1%} on {found.score.rows}, after round {found.score.round}", ""))
    if found.last_seconds is not None and found.mean_seconds is not None:
        rows.append(("a round", f"{span(found.last_seconds)} the last, {span(found.mean_seconds)} on average", ""))
    if found.bytes_up or found.bytes_down:  # a private run may not tell
        last = f"{megabytes(found.last_bytes_up)} and {megabytes(found.last_bytes_down)} in the last round"
        rows.append(("sent", f"{megabytes(found.bytes_up)} up, {megabytes(found.bytes_down)} down; {last}", ""))
    for what, rules in (("missing", found.missing), ("refused", found.refusals)):
        said = ", ".join(f"{rule} {count}" for rule, count in rules.items())
        rows.append((what, said or "nothing", "yellow" if said else ""))
    rows.append(("privacy", found.privacy, ""))
    if found.certificate_days is not None:
        rows.append(("certificate", *_certificate(found.certificate_days)))
    if found.programs:
        rows.append(("programs", *_programs(found)))
    return rows


def _open(one: OpenRound) -> str:
    from fedlora.watching import span

    verb = _VERBS.get(one.kind, "answered")
    again = ", repeated" if one.repeated else ""
    return f"round {one.number} for {span(one.seconds)}{again}: {one.answered} of {one.asked} have {verb}"


def _certificate(days: float) -> tuple[str, str]:
    from fedlora.display import counted
    from fedlora.pki import WARNING

    span = counted(round(abs(days)), "day")
    if days < 0.0:
        return f"ended {span} ago: renew it with `fedlora pki renew`", "red"
    if days < WARNING.days:
        return f"{span} left: renew it with `fedlora pki renew`", "yellow"
    return f"{span} left", ""


def _programs(found: Status) -> tuple[str, str]:
    up = [name for name, runs in found.programs.items() if runs]
    down = [name for name, runs in found.programs.items() if not runs]
    if not up:
        return "none", ""
    said = f"{', '.join(up)} run"
    if not down:
        return said, ""
    return f"{said}; {', '.join(down)} not", "" if found.state in ("starting", "done") else "yellow"


def _nodes(found: Status, most: int) -> list[RenderableType]:
    there = [node for node in found.nodes if not node.revoked or node.last_round is not None]
    if len(there) > most:
        there.sort(key=lambda n: (not n.quarantined, -(n.strikes or 0), n.last_round or 0, n.name))
    told = any(node.strikes is not None for node in there)
    table = Table("node", "last answer", *(["strikes"] if told else []), "", box=None, padding=(0, 2, 0, 0))
    for node in there[:most]:
        last = "none" if node.last_round is None else f"round {node.last_round}"
        state, style = _state(node, found)
        table.add_row(node.name, last, *([f"{node.strikes or 0}"] if told else []), state, style=style)
    left = len(there) - most
    more = "node" if left == 1 else "nodes"
    return [table, Text(f"and {left} more {more}", style="dim")] if left > 0 else [table]


def _state(node: NodeStatus, found: Status) -> tuple[str, str]:
    if node.revoked:
        return "revoked", "dim"
    if node.quarantined:
        return "in quarantine", "red"
    return "", "yellow" if node.strikes or (found.round and node.last_round is None) else ""
