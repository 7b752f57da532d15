"""Several methods, several seeds, one table: last-round scores, with the local-only and centralised rows beside them.
With tasks, several ways to keep them apart, and what each of them forgot.

fedlora compare simulations/scenarios/default.toml --methods fedit,ffa-lora,flora --seeds 3
fedlora compare tasks --continual sequential,o-lora:fedit,input-aware --seeds 3
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from fedlora.config import CONTINUAL_NAMES, METHOD_NAMES, RunConfig, flat, load_config, with_method
from fedlora.continual.metrics import Measures
from fedlora.data.columns import nearest
from fedlora.errors import ConfigError
from fedlora.report.compare import (
    ComparisonRow,
    Figure,
    TaskCell,
    WayRow,
    comparison_markdown,
    ways_markdown,
    write_comparison,
    write_ways,
)
from fedlora.report.stream import Stream
from server.app import open_run
from server.checkpoint import write_atomic
from simulations.references import scored_rows
from simulations.simulate import MAKE, Result, check, simulate, test_tokens

Notify = Callable[[dict[str, Any]], None]


@dataclass
class _Column:
    """What one row of the table gathers over the seeds."""

    scores: list[float] = field(default_factory=list)
    own: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    up: list[float] = field(default_factory=list)
    down: list[float] = field(default_factory=list)


def compare(
    config: RunConfig,
    folder: Path,
    *,
    methods: Sequence[RunConfig],
    seeds: int,
    notify: Notify,
    references: Sequence[str] = tuple(MAKE),
) -> list[ComparisonRow]:
    """Run every method on seeds config.seed, config.seed + 1, ...; each run keeps its own folder under `folder`.

    `methods` are the settings of each row (the same but for `method`, the codecs in `wire`, and what a method wants
    tuned). References do not depend on them, so they are made once a seed. Writes `comparison.json`, `.md` and `.html`.
    """
    codecs = {m.wire.up for m in methods}
    names = [(m.method.name, m.wire.up if len(codecs) > 1 else "") for m in methods]
    if not names or len(set(names)) < len(names):
        raise ConfigError(f"compare needs one or more different methods, got {[' '.join(n).rstrip() for n in names]}")
    if config.tasks:
        references = ()  # there are none for tasks: compare ways to keep them apart instead
    elif references:
        scored_rows(config, test_tokens(config))  # refuses a comparison on nothing before hours were spent
    _make(folder)
    columns: dict[tuple[str, str], _Column] = {}
    for seed in range(config.seed, config.seed + seeds):
        for i, settings in enumerate(methods):
            one = settings.model_copy(update={"seed": seed})
            label = "-".join(filter(None, names[i]))
            target = folder / f"{label}-seed{seed}"
            open_run(target, one)
            notify({"event": "run", "method": label, "seed": seed, "config": one})
            result = simulate(one, target, notify=notify, references=references if i == 0 else (), bare=i == 0)
            column = columns.setdefault(names[i], _Column())
            if result.score is not None:
                column.scores.append(result.score)
            if result.own is not None:
                column.own.append(result.own)
            if result.loss is not None:
                column.losses.append(result.loss)
            column.seconds.append(result.seconds)
            column.up.append(result.bytes_up)
            column.down.append(result.bytes_down)
            for reference in result.references:
                other = columns.setdefault((reference.name, ""), _Column())
                other.scores.append(reference.score)
                other.losses.append(reference.loss)
                other.seconds.append(reference.seconds)
    order = [("bare base", ""), ("local only", ""), *names, ("centralised", "")]
    rows = [_row(name, columns[name], seeds) for name in order if name in columns]
    write_atomic(folder / "comparison.json", (json.dumps([vars(r) for r in rows], indent=2) + "\n").encode())
    write_atomic(folder / "comparison.md", comparison_markdown(rows).encode())
    write_comparison(folder, rows)
    return rows


_OF_WAYS = ("task_dim", "sketch", "penalty", "penalty_form", "replay_rows")  # read under some ways only
_SUBSPACES = ("subspace", "input-aware")


def with_way(config: RunConfig, name: str) -> RunConfig:
    """The same run under another way to keep tasks apart, `way` or `way:method`; settings that only other ways or
    methods read go back to their defaults.

    Raises: ConfigError for a run without tasks, a name that is not known, or a way and method that do not go together.
    """
    way, colon, method = name.partition(":")
    if not config.tasks:
        raise ConfigError(
            "--continual compares ways to learn tasks, and the settings have none: try the scenario tasks"
        )
    for kind, word, known in (("way", way, CONTINUAL_NAMES), ("method", method, METHOD_NAMES)):
        if word not in known and (colon or kind == "way"):
            raise ConfigError(
                f"--continual {name}: no {kind} is called {word!r}; there are {', '.join(known)}{nearest(word, known)}"
            )
    before, settings = config.continual.method, flat(config)
    kept = _OF_WAYS if way == before else ("task_dim",) if {way, before} <= set(_SUBSPACES) else ()
    back = {f"continual.{key}": settings.pop(f"continual.{key}") for key in _OF_WAYS}
    plain = load_config(flower={**settings, "continual.method": "incremental"})  # goes with every method
    plain = with_method(plain, method) if method else plain
    mine = {f"continual.{key}": back[f"continual.{key}"] for key in kept}
    return load_config(flower={**flat(plain), **mine, "continual.method": way})


def compare_ways(
    config: RunConfig, folder: Path, *, ways: Mapping[str, RunConfig], seeds: int, notify: Notify
) -> list[WayRow]:
    """Run every way of `ways` on seeds config.seed, config.seed + 1, ...; each run keeps its own folder under `folder`.

    `ways` are the settings of each row by its name, as `with_way` makes them. Writes `comparison.json`, `.md` and
    `.html`. Raises: ConfigError as `check`, before anything is trained, or if the folder is there.
    """
    for settings in ways.values():
        check(settings)
    _make(folder)
    found: dict[str, list[Result]] = {name: [] for name in ways}
    for seed in range(config.seed, config.seed + seeds):
        for name, settings in ways.items():
            one = settings.model_copy(update={"seed": seed})
            label = name.replace(":", "-")
            target = folder / f"{label}-seed{seed}"
            open_run(target, one)
            notify({"event": "run", "method": name, "seed": seed, "config": one})
            found[name].append(simulate(one, target, notify=notify))
    rows = [way_row(name, results) for name, results in found.items()]
    write_atomic(folder / "comparison.json", (json.dumps([asdict(r) for r in rows], indent=2) + "\n").encode())
    write_atomic(folder / "comparison.md", ways_markdown(rows).encode())
    write_ways(folder, rows)
    return rows


def way_row(name: str, results: Sequence[Result]) -> WayRow:
    """What the runs of one way came to, mean and sample standard deviation over them. Every run has tasks."""
    streams = [result.stream for result in results if result.stream is not None]
    measured = [stream.measured() for stream in streams]

    def figure(read: Callable[[Measures], float | None]) -> Figure | None:
        return _figure([None if found is None else read(found) for found in measured])

    def inferred(way: str) -> Figure | None:
        found = (stream.inference.get(way) for stream in streams)
        return _figure([statistics.fmean(scores.values()) if scores else None for scores in found])

    return WayRow(
        way=name,
        seeds=len(results),
        average_accuracy=figure(lambda m: m.average_accuracy),
        backward_transfer=figure(lambda m: m.backward_transfer),
        forgetting=figure(lambda m: m.forgetting),
        plasticity=figure(lambda m: m.plasticity),
        known=inferred("known"),
        open=inferred("open"),
        weighed=inferred("weighed"),
        routed=inferred("routed"),
        routing=inferred("routing"),
        bytes_up=statistics.fmean(r.bytes_up for r in results),
        bytes_down=statistics.fmean(r.bytes_down for r in results),
        seconds=statistics.fmean(r.seconds for r in results),
        tasks=streams[0].tasks,
        borders=tuple(border.sealed for border in streams[0].borders),
        untrained=tuple(_figure([s.untrained.get(task) for s in streams]) for task in streams[0].tasks),
        matrix=tuple(
            tuple(_cell(streams, task, row) for task in streams[0].tasks) for row in range(len(streams[0].borders))
        ),
    )


def _cell(streams: Sequence[Stream], task: str, row: int) -> TaskCell:
    """One cell of the accuracy matrix over all seeds, whose tasks and borders are the same."""
    return TaskCell(
        score=_figure([s.borders[row].scores.get(task) for s in streams]),
        own=task in streams[0].borders[row].sealed,
        ahead=(own := streams[0].border_of(task)) is None or own > row,
        forgotten=sum(s.forgotten(task, row) for s in streams),
    )


def _figure(values: Sequence[float | None]) -> Figure | None:
    """Mean and sample standard deviation; None unless every seed has a value."""
    known = [value for value in values if value is not None]
    if not known or len(known) < len(values):
        return None
    return Figure(mean=statistics.fmean(known), sd=statistics.stdev(known) if len(known) > 1 else None)


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True)
    except OSError as error:
        raise ConfigError(f"{folder} cannot be made: {error.strerror}. Choose another folder with --out.") from error


def _row(name: tuple[str, str], column: _Column, seeds: int) -> ComparisonRow:
    def mean(values: Sequence[float]) -> float | None:
        return statistics.fmean(values) if values else None

    def spread(values: Sequence[float]) -> float | None:
        return statistics.stdev(values) if len(values) > 1 else None

    return ComparisonRow(
        method=name[0],
        codec=name[1],
        seeds=seeds,
        own=mean(column.own),
        own_sd=spread(column.own),
        score=mean(column.scores),
        score_sd=spread(column.scores),
        loss=mean(column.losses),
        bytes_up=mean(column.up),
        bytes_down=mean(column.down),
        seconds=mean(column.seconds),
    )
