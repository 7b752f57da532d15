"""The clients of a report: a row for each, or, of many, a summary and the ones that stand out."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from fedlora.report.charts import spark
from fedlora.report.numbers import NOTHING, decimal, percent, size, whole

ALL: Final = 40  # up to so many clients each have a row
SOME: Final = 5  # rows of each excerpt, when there are more

Cell = tuple[str, str]  # text and CSS class


@dataclass
class Client:
    """What the log says of one client over the whole run."""

    id: str
    rank: int | None = None
    examples: int | None = None
    groups: Mapping[str, int] = field(default_factory=dict)
    rounds: int = 0
    losses: list[float] = field(default_factory=list)  # the first loss before training, then after each round
    score: float | None = None  # the last one
    up: int = 0
    down: int = 0


def gather(start: Sequence[Mapping[str, Any]], rounds: Sequence[Mapping[str, Any]]) -> list[Client]:
    """Clients by id, whether they were announced at the start or only turn up in a round."""
    clients = {
        c["id"]: Client(c["id"], rank=c.get("rank"), examples=c.get("examples"), groups=c.get("groups") or {})
        for c in start
    }
    for event in rounds:
        for told in event.get("clients", ()):
            client = clients.setdefault(told["id"], Client(told["id"]))
            client.rounds += 1
            client.rank = told.get("rank", client.rank)
            client.examples = told.get("examples", client.examples)
            if "loss_before" in told and not client.losses:
                client.losses.append(told["loss_before"])
            if "loss_after" in told:
                client.losses.append(told["loss_after"])
            client.up += told.get("bytes_up", 0)
            client.down += told.get("bytes_down", 0)
        for id_, told in ((event.get("evaluation") or {}).get("clients") or {}).items():
            clients.setdefault(id_, Client(id_)).score = told.get("score", clients[id_].score)
    return [clients[id_] for id_ in sorted(clients)]


def clients_view(start: Sequence[Mapping[str, Any]], rounds: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """Tables for the page: all clients up to `ALL`, else a summary, the first, the last, and the extremes."""
    clients = gather(start, rounds)
    if not clients:
        return None
    if len(clients) <= ALL:
        text = "Loss is on a client's own training rows: before its first round, and after its last. "
        text += "The score is the shared model's on the rows that the client holds out."
        return {"text": text, "tables": [_table("", clients, clients)]}
    taken = sum(c.rounds > 0 for c in clients)
    tables = [
        _summary(clients),
        _table("The first", clients[:SOME], clients),
        _table("The last", clients[-SOME:], clients),
    ]
    ends = [c for c in clients if len(c.losses) > 1]
    scored = [c for c in clients if c.score is not None]
    for title, found, key in (
        ("Highest loss at the end", ends, lambda c: (-c.losses[-1], c.id)),
        ("Lowest score", scored, lambda c: (c.score, c.id)),
        ("Highest score", scored, lambda c: (-c.score, c.id)),
    ):
        if len(found) > SOME:
            tables.append(_table(title, sorted(found, key=key)[:SOME], clients))
    return {"text": f"{len(clients):,} clients, of which {taken:,} took part in a round.", "tables": tables}


def _table(title: str, clients: Sequence[Client], everyone: Sequence[Client]) -> dict[str, Any]:
    """Columns that no client fills are left out, the same ones in every table of the page."""
    columns: list[tuple[str, str, Callable[[Client], str], bool]] = [
        ("client", "", lambda c: c.id if len(c.id) <= 24 else c.id[:21] + "…", True),
        ("rank", "", lambda c: whole(c.rank), any(c.rank is not None for c in everyone)),
        ("rows", "", lambda c: whole(c.examples), any(c.examples is not None for c in everyone)),
        ("holds", "skills", _holds, any(c.groups for c in everyone)),
        ("rounds", "", lambda c: whole(c.rounds), True),
        (
            "loss before",
            "",
            lambda c: decimal(c.losses[0]) if len(c.losses) > 1 else NOTHING,
            any(c.losses for c in everyone),
        ),
        ("after", "", lambda c: decimal(c.losses[-1]) if c.losses else NOTHING, any(c.losses for c in everyone)),
        ("course", "svg", _course, any(len(c.losses) > 1 for c in everyone)),
        ("score", "", lambda c: percent(c.score), any(c.score is not None for c in everyone)),
        ("up", "", lambda c: size(c.up), any(c.up for c in everyone)),
        ("down", "", lambda c: size(c.down), any(c.down for c in everyone)),
    ]
    columns = [c for c in columns if c[3]]
    return {
        "title": title,
        "heads": [(name, "text" if css else "") for name, css, _, _ in columns],
        "rows": [[(show(client), css) for _, css, show, _ in columns] for client in clients],
    }


def _holds(client: Client) -> str:
    return ", ".join(sorted(client.groups)[:8]) + (" …" if len(client.groups) > 8 else "")


def _course(client: Client) -> str:
    return spark(client.losses, f"loss of {client.id}: " + ", ".join(map(decimal, client.losses[:30])))


def _summary(clients: Sequence[Client]) -> dict[str, Any]:
    """Quartiles over the clients that have a value."""
    values: list[tuple[str, list[float], Callable[[float | None], str]]] = [
        ("rank", [c.rank for c in clients if c.rank is not None], whole),
        ("rows", [c.examples for c in clients if c.examples is not None], whole),
        ("rounds", [c.rounds for c in clients], whole),
        ("loss before", [c.losses[0] for c in clients if len(c.losses) > 1], decimal),
        ("loss after", [c.losses[-1] for c in clients if len(c.losses) > 1], decimal),
        ("score", [c.score for c in clients if c.score is not None], percent),
        ("bytes up", [c.up for c in clients if c.rounds], size),
        ("bytes down", [c.down for c in clients if c.rounds], size),
    ]
    rows = []
    for name, found, show in values:
        if len(found) > 1:
            low, middle, high = statistics.quantiles(found, n=4, method="inclusive")
            rows.append([(name, ""), *((show(v), "") for v in (min(found), low, middle, high, max(found)))])
    heads = ("of all clients", "least", "quarter below", "median", "quarter above", "most")
    return {"title": "", "heads": [(h, "") for h in heads], "rows": rows}
