"""`report.html`: one file that says what a run taught, to whom, and at what price."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, Final

from jinja2 import Environment

from fedlora.config import RunConfig, flat, load_config, to_toml
from fedlora.continual.tasks import rounds_in_all
from fedlora.data import skills_per_client
from fedlora.report.charts import Series, line_chart, traffic_chart
from fedlora.report.clients import clients_view, personal_view
from fedlora.report.compare import write_page
from fedlora.report.log import read_log
from fedlora.report.numbers import count, decimal, duration, percent, size, whole, word
from fedlora.report.page import REPORT, STYLE
from fedlora.report.stream import Stream, stream_of
from fedlora.report.tasks import spans, tasks_view

COLUMNS: Final = 12  # of the heat map; more rounds are thinned out
GROUPS: Final = 40  # rows of the heat map; of more, the best and the worst
REFUSED: Final = 50  # rows of the table of refused answers
ROUNDING: Final = 1e-6  # relative errors below this are those of float32
REFERENCES: Final = ("bare base", "local only", "centralised")

Json = Mapping[str, Any]


@dataclass(frozen=True)
class Run:
    """A run folder as read: settings, events sorted by kind."""

    config: RunConfig
    start: Json
    rounds: Sequence[Json]
    references: Mapping[str, Json]  # by name, the usual ones first
    end: Json | None
    personal: Json | None
    stream: Stream | None  # of tasks

    @property
    def clients(self) -> int:
        return len(self.start.get("clients", ())) or self.config.rounds.clients

    @property
    def measure(self) -> str:
        return "exact match" if self.config.model.task_type == "causal-lm" else "right labels"

    def scored(self, key: str, by: str) -> list[tuple[float, float]]:
        """(round, score or loss) as the `server` or the `clients` measured it."""
        points = []
        for event in self.rounds:
            evaluation = event.get("evaluation") or {}
            value = (evaluation.get("server") or {} if by == "server" else evaluation).get(key)
            if value is not None:
                points.append((float(event["round"]), float(value)))
        return points

    def best_judge(self, key: str) -> list[tuple[float, float]]:
        """The server's measurements if it has any (its rows cover all groups), else the clients'."""
        return self.scored(key, "server") or self.scored(key, "clients")

    def groups(self, event: Json) -> Json:
        evaluation = event.get("evaluation") or {}
        found: Json = (evaluation.get("server") or {}).get("groups") or evaluation.get("groups") or {}
        return found

    def reference(self, name: str, key: str) -> float | None:
        value = self.references.get(name, {}).get(key)
        return None if value is None else float(value)


def read_run(folder: Path) -> Run:
    """Settings and events of a run, finished or not. Raises: ConfigError, CheckpointError."""
    events = read_log(folder)
    named = {e["name"]: e for e in events if e["event"] == "reference"}
    order = [n for n in REFERENCES if n in named] + [n for n in named if n not in REFERENCES]
    return Run(
        config=load_config(folder / "config.toml"),
        start=next((e for e in reversed(events) if e["event"] == "start"), {}),
        rounds=list({e["round"]: e for e in events if e["event"] == "round"}.values()),
        references={name: named[name] for name in order},
        end=next((e for e in reversed(events) if e["event"] == "end"), None),
        personal=next((e for e in reversed(events) if e["event"] == "personal"), None),
        stream=stream_of(events),
    )


def write_report(folder: Path) -> Path:
    """Write `report.html` from `config.toml` and `metrics.jsonl`, also of a run that is still going; returns its path.

    Raises: ConfigError or CheckpointError for a folder that is no run, or is damaged.
    """
    run = read_run(folder)
    view = {
        "style": STYLE,
        "title": f"fedlora {run.config.method.name}: {run.config.name}",
        "eyebrow": " · ".join(
            str(x) for x in ("fedlora", run.config.method.name, run.config.name, run.start.get("started")) if x
        ),
        "headline": headline(run),
        "lead": _lead(run),
        "going": _going(run),
        "keys": _keys(run),
        "tasks": tasks_view(run.stream, run.measure) if run.stream else None,
        "sections": _sections(run),
        "table": _heat(run),
        "clients": clients_view(run.start.get("clients", ()), run.rounds),
        "personal": personal_view(run.personal, run.measure) if run.personal else None,
        "refused": _refused(run),
        "usage": _usage(run.config),
        "settings": _settings(run.config),
        "footer": " · ".join(
            f"{name} {run.start[key]}" for name, key in (("run", "run"), ("base", "base")) if run.start.get(key)
        ),
    }
    return write_page(folder / "report.html", Environment(autoescape=True).from_string(REPORT).render(view))


def headline(run: Run) -> str:
    """The result in one sentence."""
    who = count(run.clients, "client").capitalize()
    going = run.end is None
    verb = ("is teaching" if run.clients == 1 else "are teaching") if going else "taught"
    if run.stream is not None:
        return f"{who} {verb} {_tasks_headline(run.stream, run.measure)}"
    scores, losses = run.best_judge("score"), run.best_judge("loss")
    if scores:
        bare = run.reference("bare base", "score")
        before = f"{percent(bare)} → " if bare is not None else ""
        result = f"{before}{percent(scores[-1][1])}".replace(" ", "\u00a0")
        return f"{who} {verb} one model: {result} {run.measure}{_on_what(run)}"
    if losses:
        return f"{who} {verb} one model: loss {decimal(losses[0][1])} → {decimal(losses[-1][1])} on held-out rows"
    trained = _training_loss(run)
    if trained:
        return f"{who} {verb} one model: training loss {decimal(trained[0][1])} → {decimal(trained[-1][1])}"
    return f"{who} {verb} one model"


def _tasks_headline(stream: Stream, measure: str) -> str:
    what = f"one model {count(len(stream.tasks), 'task')}"
    if stream.way in ("joint", "nearest-mean"):
        what += {"joint": " at once", "nearest-mean": " by class means"}[stream.way]
    elif stream.way == "separate":
        what = f"{count(len(stream.tasks), 'task')}, an adapter for each"
    elif len(stream.tasks) > 1:
        what += ", partly at the same time" if stream.overlapping else ", one after another"
    found = stream.measured()
    if found is None:
        return what
    closed = len(stream.sealed)
    what += f": {word(closed)} sealed, " if closed < len(stream.tasks) else ": "
    what += f"{percent(found.average_accuracy, 1)} {measure} on average".replace(" %", "\u00a0%")
    if found.forgetting is None:
        return what
    if found.forgetting >= 0.0005:
        return f"{what}, {100 * found.forgetting:.1f}\u00a0points forgotten"
    return what if stream.falls() else f"{what}, nothing forgotten"


def _on_what(run: Run) -> str:
    groups = next((g for g in map(run.groups, reversed(run.rounds)) if g), {})
    data = run.config.data
    if data.name == "skills" and data.partition.kind == "skills":
        most = skills_per_client(data, run.config.rounds.clients)
        if len(groups) > most:
            return f" on {count(len(groups), 'skill')}, of which no client holds more than {word(most)}"
    return " on test rows of the server" if run.scored("score", "server") else " on the rows that clients held out"


def _lead(run: Run) -> str:
    alone, together = run.reference("local only", "score"), run.reference("centralised", "score")
    said = []
    if alone is not None:
        said.append(f"a client that learns alone reaches {percent(alone)}")
    if together is not None:
        said.append(f"training on all the data in one place reaches {percent(together)}")
    text = f"For comparison: {', and '.join(said)}. " if said else ""
    detail = run.references.get("local only", {}).get("detail") or {}
    held, other = detail.get("score on groups held"), detail.get("score on groups not held")
    if held is not None and other is not None:
        groups = "skills" if run.config.data.name == "skills" else "groups"
        text += f"Alone, a client scores {percent(held)} on the {groups} it holds "
        text += f"and {percent(other)} on those it does not. "
    moved = [e["bytes_up"] for e in run.rounds if "bytes_up" in e]
    return text + (f"No row left its owner: {size(sum(moved))} of {_travels(run)} did." if moved else "")


def _travels(run: Run) -> str:
    """What clients send: under some ways to keep tasks apart also sums over their rows."""
    continual = run.config.continual
    sums = run.stream is not None and (continual.routing or continual.method in ("input-aware", "ewc", "nearest-mean"))
    if sums and continual.method == "nearest-mean":
        return "sums over rows"
    return "adapter factors and sums over rows" if sums or run.config.model.head != "random" else "adapter factors"


def _going(run: Run) -> str:
    if run.end is not None:
        return ""
    if not run.rounds:
        return "No round has closed yet."
    return f"Round {run.rounds[-1]['round']} of {rounds_in_all(run.config)} has closed; the run has not ended."


def _keys(run: Run) -> list[tuple[str, str, str]]:
    keys = []
    scores = run.best_judge("score")
    alone, together = run.reference("local only", "score"), run.reference("centralised", "score")
    if run.stream is not None:
        keys += _task_keys(run.stream, run.measure)
    elif scores:
        score = scores[-1][1]
        keys.append(("score", percent(score, 1), f"{run.measure}, round {scores[-1][0]:g}"))
        if alone is not None:
            keys.append(("against local only", f"{100 * (score - alone):+.1f}".replace("-", "−"), "percentage points"))
        if together is not None:
            keys.append(
                ("against centralised", f"{100 * (score - together):+.1f}".replace("-", "−"), "percentage points")
            )
    up = sum(e.get("bytes_up", 0) for e in run.rounds)
    down = sum(e.get("bytes_down", 0) for e in run.rounds)
    if up or down:
        keys.append(("sent", size(up + down), f"{size(up)} up, {size(down)} down"))
    seconds = (run.end or {}).get("seconds") or sum(e.get("seconds", 0.0) for e in run.rounds)
    if seconds:
        memory = (run.end or {}).get("peak_memory_mib")
        keys.append(("time", duration(seconds), f"peak memory {size(memory * 2**20)}" if memory else ""))
    if spent := _spent(run):
        terms = run.rounds[-1]["privacy"]
        keys.append(("epsilon", f"{spent[-1][1]:.2f}", f"{_UNITS[terms['unit']]}, at delta {terms['delta']:g}"))
    ranks = [c["rank"] for c in run.start.get("clients", ()) if "rank" in c]
    if ranks:
        same = min(ranks) == max(ranks)
        result = _last(run, "rank")
        keys.append(
            (
                "client ranks",
                f"{min(ranks)}" if same else f"{min(ranks)} to {max(ranks)}",
                f"the result has rank {result:g}" if result is not None and run.stream is None else "",
            )
        )
    return keys


_UNITS = {"example": "of a training row", "client": "of a whole client"}


def _task_keys(stream: Stream, measure: str) -> list[tuple[str, str, str]]:
    found = stream.measured()
    if found is None:
        return []
    keys = [("average accuracy", percent(found.average_accuracy, 1), f"{measure}, {count(len(stream.sealed), 'task')}")]
    if found.forgetting is not None:
        keys.append(("forgetting", f"{100 * found.forgetting:.1f}".replace("-", "−"), "points, mean of earlier tasks"))
    if routing := stream.inference.get("routing"):
        keys.append(("tasks found", percent(statistics.fmean(routing.values()), 1), "routing accuracy"))
    return keys


def _last(run: Run, key: str) -> float | None:
    return next((a[key] for e in reversed(run.rounds) if key in (a := e.get("aggregate") or {})), None)


def _spent(run: Run) -> list[tuple[float, float]]:
    """Epsilon of any one client by round; empty where nothing is promised."""
    return [(float(e["round"]), float(e["privacy"]["epsilon"])) for e in run.rounds if "privacy" in e]


def _training_loss(run: Run, key: str = "loss_after") -> list[tuple[float, float]]:
    points = []
    for event in run.rounds:
        values = [c[key] for c in event.get("clients", ()) if key in c]
        if values:
            points.append((float(event["round"]), statistics.fmean(values)))
    return points


def _sections(run: Run) -> list[dict[str, Any]]:
    def references(key: str) -> list[tuple[str, float]]:
        return [(n, v) for n in run.references if (v := run.reference(n, key)) is not None]

    begins = spans(run.stream, 0.5) if run.stream else []
    score = line_chart(
        "Score by round",
        [
            Series(name="test rows", points=run.scored("score", "server"), tone=1),
            Series(name="held out", points=run.scored("score", "clients"), tone=3),
        ],
        percent,
        references=references("score"),
        top=1.0,
        spans=begins,
    )
    loss = line_chart(
        "Loss by round",
        [
            Series(name="test rows", points=run.scored("loss", "server"), tone=1),
            Series(name="held out", points=run.scored("loss", "clients"), tone=3),
            Series(name="training", points=_training_loss(run), tone=2),
        ],
        decimal,
        references=[r for r in references("loss") if r[0] != "bare base"],
        spans=begins,
    )
    numbers = [float(e["round"]) for e in run.rounds]
    up, down = ([float(e.get(f"bytes_{way}", 0)) for e in run.rounds] for way in ("up", "down"))
    moved = any(up) or any(down)
    total = list(accumulate(u + d for u, d in zip(up, down, strict=True)))
    traffic = traffic_chart("Bytes by round", numbers, up, down, size) if moved else ""
    together = line_chart(
        "Bytes in all",
        [Series(name="sent", points=list(zip(numbers, total, strict=True)), tone=4)] if moved else [],
        size,
    )

    def course(key: str) -> list[tuple[float, float]]:
        found = ((e["round"], (e.get("aggregate") or {}).get(key)) for e in run.rounds)
        return [(float(n), float(v)) for n, v in found if v is not None]

    held = [(n, v) for n, v in course("rank")]
    rank = line_chart("Rank of the update by round", [Series(name="rank", points=held, tone=5)], whole)
    lost = course("truncation_error_relative")
    truncation = line_chart(
        "Truncation error by round",
        [Series(name="left behind", points=lost, tone=2)] if any(v > ROUNDING for _, v in lost) else [],
        _error,
    )
    missed = course("aggregation_error")
    aggregation = line_chart(
        "Aggregation error by round",
        [Series(name="error", points=missed, tone=2)],
        _error,
    )
    spent = line_chart("Epsilon by round", [Series(name="spent", points=_spent(run), tone=5)], decimal)
    whose = "a task's adapter" if run.stream else "the adapter"
    said = [f"the rank of what {whose} adds to the base"] if rank else []
    said += ["what combining the clients' factors costs"] if truncation or aggregation else []
    kept = ", and ".join(said) + (": every round was merged without loss" if lost and len(said) == 1 and rank else "")
    return [
        {
            "title": "What was learnt",
            "text": "Test rows are the server's, held-out rows the clients' own. Training loss is the mean of the "
            "clients at the end of their round."
            + (
                " Every round is scored on the tasks that it trained, so the lines jump where a task begins"
                + ("; what became of the earlier tasks stands above." if run.stream.borders else ".")
                if run.stream
                else ""
            ),
            "charts": _drawn(
                ("Score", f"{run.measure}{', tasks in training' if run.stream else ''}", score),
                ("Loss", f"per answer token{', tasks in training' if run.stream else ''}", loss),
            ),
        },
        {
            "title": "What was sent",
            "text": f"All clients together: {_travels(run)}, and their headers. The base model never travels.",
            "charts": _drawn(("A round", "up and down", traffic), ("In all", "up and down together", together)),
        },
        {
            **_told(run),
            "charts": _drawn(("Epsilon", "spent in all", spent)),
        },
        {
            "title": "What the server keeps",
            "text": f"{kept[:1].upper()}{kept[1:]}.",
            "charts": _drawn(
                ("Rank", "largest of the adapted layers", rank),
                ("Truncation error", "of the update, Frobenius norm", truncation),
                ("Aggregation error", "mean(BA) against mean(B) mean(A)", aggregation),
            ),
        },
    ]


def _told(run: Run) -> dict[str, str]:
    """Title and text of what was spent, by whose privacy it is and who adds the noise."""
    terms = next((e["privacy"] for e in reversed(run.rounds) if "privacy" in e), None)
    if terms is None or terms["unit"] != "client":
        return {
            "title": "What a row may have told",
            "text": "Epsilon of a client that took part in every round so far: each adds the noise itself, before "
            "anything leaves it. What clients would have said of their losses stays with them.",
        }
    who = {
        "server": "the server adds the noise to each round's sum",
        "clients": "each adds its share of the noise, inside a sum that hides it",
    }[terms["noise_by"]]
    drawn = " Who was drawn is not told here." if terms["sampling"] < 1.0 else ""
    return {
        "title": "What a client may have told",
        "text": f"Epsilon of any one client with all its rows: {who}. Every round counts, also one that failed.{drawn}",
    }


def _error(share: float) -> str:
    return f"{decimal(100 * share)} %"


def _drawn(*charts: tuple[str, str, str]) -> list[tuple[str, str, str]]:
    return [c for c in charts if c[2]]


def _heat(run: Run) -> dict[str, Any] | None:
    scored = [e for e in run.rounds if run.groups(e)]
    if not scored:
        return None
    if len(scored) > COLUMNS and run.stream is not None:
        scored = [e for e in scored if "border" in e] or scored
    if len(scored) > COLUMNS:
        scored = [scored[round(i * (len(scored) - 1) / (COLUMNS - 1))] for i in range(COLUMNS)]
    final = run.groups(scored[-1])
    names = sorted({g for e in scored for g in run.groups(e)}, key=lambda g: (-(_share(final.get(g)) or 0.0), g))
    text = "Right answers by skill or class, the best first." if len(names) > 1 else "Right answers."
    if run.stream is not None:
        first = {g: e["round"] for e in reversed(scored) for g in run.groups(e)}
        names.sort(key=lambda g: first[g])
        text = "Right answers by skill or class, in the rounds that trained its task."
    if len(names) > GROUPS:
        text = f"Of {len(names):,} groups, the {GROUPS // 2} best and the {GROUPS // 2} worst."
        names = names[: GROUPS // 2] + names[-GROUPS // 2 :]
    references = [n for n, e in run.references.items() if e.get("groups")]
    return {
        "title": "By skill and round"
        if run.config.data.name == "skills" and run.stream is None
        else "By group and round",
        "text": text,
        "corner": "round",
        "rounds": [e["round"] for e in scored],
        "references": references,
        "rows": [
            {
                "name": name,
                "cells": [_cell(run.groups(e).get(name)) for e in scored],
                "references": [_cell(run.references[n]["groups"].get(name)) for n in references],
            }
            for name in names
        ],
    }


def _share(group: Json | None) -> float | None:
    return group["correct"] / group["counted"] if group and group["counted"] else None


def _cell(group: Json | None) -> tuple[float, str]:
    share = _share(group)
    return (0.0, "") if share is None else (math.floor(100 * share), f"{100 * share:.0f}")


def _refused(run: Run) -> dict[str, Any] | None:
    rows = [("start", r["client"], r["rule"], r["detail"]) for r in run.start.get("refused", ())]
    rows += [(str(e["round"]), r["client"], r["rule"], r["detail"]) for e in run.rounds for r in e.get("refused", ())]
    rows += [("personal", r["client"], r["rule"], r["detail"]) for r in (run.personal or {}).get("refused", ())]
    missing = [(e["round"], len(e["missing"])) for e in run.rounds if e.get("missing")]
    if not rows and not missing:
        return None
    text = f"{count(len(rows), 'answer').capitalize()} refused by name" + (
        f"; the first {REFUSED} are shown. " if len(rows) > REFUSED else ". "
    )
    if missing:
        each = ", ".join(f"{n} in round {r}" for r, n in missing[:8]) + (", …" if len(missing) > 8 else "")
        text += f"Asked and never answered: {each}."
    return {"text": text, "rows": rows[:REFUSED]}


def _usage(config: RunConfig) -> dict[str, str]:
    if config.model.task_type == "causal-lm":
        kind, extra = "AutoModelForCausalLM", ""
    else:
        kind, extra = "AutoModelForSequenceClassification", f", num_labels={len(config.model.labels)}"
    if config.model.name == "tiny":
        where, base = "from fedlora.tiny import base_path\n", "base_path()"
    else:
        where, base = (
            "",
            repr(config.model.name) + (f", revision={config.model.revision!r}" if config.model.revision else ""),
        )
    text = "The folder adapter/ beside this page is an ordinary PEFT adapter."
    if config.model.pooling == "mean":
        text += " Its head reads the mean of the last hidden states: adapter/README.md has the lines for that."
    return {
        "text": text,
        "code": f"from peft import PeftModel\nfrom transformers import {kind}\n{where}"
        f'\nmodel = PeftModel.from_pretrained({kind}.from_pretrained({base}{extra}), "adapter")',
    }


def _settings(config: RunConfig) -> dict[str, Any]:
    default, mine = flat(RunConfig()), flat(config)
    changed = [
        (k, _plain(v), _plain(default[k])) for k, v in mine.items() if v != default[k] and k not in ("name", "tasks")
    ]
    for table in config.tasks:
        own = ", ".join(f"{k} = {v}" for k, v in table.items() if k != "name")
        changed.append((f"task {table['name']}", own or "as all", "none"))
    text = "What differs from the defaults:" if changed else "Every setting has its default."
    return {"text": text, "changed": changed, "toml": to_toml(config)}


def _plain(value: bool | int | float | str) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "none" if value == "" else str(value)
