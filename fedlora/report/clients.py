"""The clients of a report, and their own adapters: a row for each, or, of many, a summary and the extremes."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from fedlora.report.charts import spark
from fedlora.report.numbers import NOTHING, count, decimal, percent, size, whole

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
    tasks: dict[str, list[float]] = field(default_factory=dict)  # the same by task, where there are tasks
    score: float | None = None  # the last one
    up: int = 0
    down: int = 0


def gather(start: Sequence[Mapping[str, Any]], rounds: Sequence[Mapping[str, Any]]) -> list[Client]:
    """Clients by id, whether they were announced at the start or only turn up in a round."""
    clients = {
        c["id"]: Client(c["id"], rank=c.get("rank"), examples=c.get("examples"), groups=c.get("groups") or {})
        for c in start
    }
    rows: dict[str, dict[str, int]] = {}  # client -> task -> rows
    for event in rounds:
        for id_ in {told["id"] for told in event.get("clients", ())}:
            clients.setdefault(id_, Client(id_)).rounds += 1
        for told in event.get("clients", ()):
            client = clients[told["id"]]
            client.rank = told.get("rank", client.rank)
            if "examples" in told:
                rows.setdefault(client.id, {})[told.get("task", "")] = told["examples"]
                client.examples = sum(rows[client.id].values())
            losses = client.tasks.setdefault(told["task"], []) if "task" in told else client.losses
            if "loss_before" in told and not losses:
                losses.append(told["loss_before"])
            if "loss_after" in told:
                losses.append(told["loss_after"])
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
        if any(c.tasks for c in clients):
            text = "Loss is on a client's own training rows of a task: before its first round of it → after its last. "
            text += "The score is the shared model's on the rows that the client holds out of all tasks that it was "
            text += "last asked about."
        else:
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


@dataclass(frozen=True)
class Own:
    """One client's held-out rows, and its scores on them without and with its own adapter."""

    id: str
    rows: float | None
    before: float | None
    after: float | None


def personal_view(event: Mapping[str, Any], measure: str) -> dict[str, Any]:
    """Text and tables of a `personal` event of the log; `measure` says what a score is, e.g. `exact match`.

    Every client has a row, up to `ALL`; of more, those that their own adapter helps least and most. The means are over
    the clients that have both scores, weighted by the rows counted, which are the same for both.
    """
    every = [
        Own(c["id"], {**before, **after}.get("counted"), before.get("score"), after.get("score"))
        for c in event["clients"]
        for before, after in [(c.get("global") or {}, c.get("personal") or {})]
    ]
    scored = [(c, c.rows, c.before, c.after) for c in every if c.rows and c.before is not None and c.after is not None]
    text = (
        f"After the last round {count(len(every), 'client')} trained a local adapter on top of the global one, "
        f"{count(event['steps'], 'step')} each, and kept it. "
    )
    if "bytes_up" in event and "bytes_down" in event:
        text += f"With its evaluations this took {size(event['bytes_up'])} up and {size(event['bytes_down'])} down. "
    if not scored:
        return {"text": text + "No client has both scores on rows that it holds out.", "tables": []}
    text += (
        f"Scores are {measure} on the rows that each client holds out; the mean, over clients with both scores, is "
        "weighted by these rows."
    )
    _, rows, before, after = zip(*scored, strict=True)
    mean = Own("mean", math.fsum(rows), statistics.fmean(before, rows), statistics.fmean(after, rows))
    if len(every) <= ALL:
        return {"text": text, "tables": [_own_table("", [*sorted(every, key=lambda c: c.id), mean])]}
    ranked = [c for c, *_ in sorted(scored, key=lambda s: (s[3] - s[2], s[0].id))]
    tables = [("All together", [mean]), ("Least gain", ranked[:SOME]), ("Largest gain", ranked[: -SOME - 1 : -1])]
    return {"text": text, "tables": [_own_table(title, some) for title, some in tables]}


def _own_table(title: str, clients: Sequence[Own]) -> dict[str, Any]:
    rows = [(_short(c.id), whole(c.rows), percent(c.before, 1), percent(c.after, 1)) for c in clients]
    return {
        "title": title,
        "heads": [(head, "") for head in ("client", "rows", "global", "personal")],
        "rows": [[(cell, "") for cell in row] for row in rows],
    }


def _table(title: str, clients: Sequence[Client], everyone: Sequence[Client]) -> dict[str, Any]:
    """Columns that no client fills are left out, the same ones in every table of the page."""
    columns: list[tuple[str, str, Callable[[Client], str], bool]] = [
        ("client", "", lambda c: _short(c.id), True),
        ("rank", "", lambda c: whole(c.rank), any(c.rank is not None for c in everyone)),
        ("rows", "", lambda c: whole(c.examples), any(c.examples is not None for c in everyone)),
        ("holds", "skills", _holds, any(c.groups for c in everyone)),
        ("rounds", "", lambda c: whole(c.rounds), any(c.rounds for c in everyone)),
        (
            "loss before",
            "",
            lambda c: decimal(c.losses[0]) if len(c.losses) > 1 else NOTHING,
            any(c.losses for c in everyone),
        ),
        ("after", "", lambda c: decimal(c.losses[-1]) if c.losses else NOTHING, any(c.losses for c in everyone)),
        ("course", "svg", _course, any(len(c.losses) > 1 for c in everyone)),
        ("loss by task", "skills", _by_task, any(c.tasks for c in everyone)),
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


def _short(id_: str) -> str:
    return id_ if len(id_) <= 24 else id_[:21] + "…"


def _holds(client: Client) -> str:
    return ", ".join(sorted(client.groups)[:8]) + (" …" if len(client.groups) > 8 else "")


def _by_task(client: Client) -> str:
    said = [f"{name} {decimal(losses[0])} → {decimal(losses[-1])}" for name, losses in client.tasks.items() if losses]
    return ", ".join(text.replace(" ", "\u00a0") for text in said[:8]) + (" …" if len(said) > 8 else "")


def _course(client: Client) -> str:
    return spark(client.losses, f"loss of {client.id}: " + ", ".join(map(decimal, client.losses[:30])))


def _summary(clients: Sequence[Client]) -> dict[str, Any]:
    """Quartiles over the clients that have a value."""
    values: list[tuple[str, list[float], Callable[[float | None], str]]] = [
        ("rank", [c.rank for c in clients if c.rank is not None], whole),
        ("rows", [c.examples for c in clients if c.examples is not None], whole),
        ("rounds", [c.rounds for c in clients if any(d.rounds for d in clients)], whole),
        ("loss before", [c.losses[0] for c in clients if len(c.losses) > 1], decimal),
        ("loss after", [c.losses[-1] for c in clients if len(c.losses) > 1], decimal),
        *(
            (f"loss {when}, {task}", [c.tasks[task][at] for c in clients if len(c.tasks.get(task, ())) > 1], decimal)
            for task in dict.fromkeys(task for c in clients for task in c.tasks)
            for when, at in (("before", 0), ("after", -1))
        ),
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
