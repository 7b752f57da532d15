"""Several methods, several seeds, one table: last-round scores, with the local-only and centralised rows beside them.

fedlora compare simulations/scenarios/default.toml --methods fedit,ffa-lora,flora --seeds 3
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedlora.config import RunConfig
from fedlora.errors import ConfigError
from fedlora.report.compare import ComparisonRow, comparison_markdown, write_comparison
from server.app import open_run
from server.checkpoint import write_atomic
from simulations.references import scored_rows
from simulations.simulate import MAKE, simulate, test_tokens

Notify = Callable[[dict[str, Any]], None]


@dataclass
class _Column:
    """What one row of the table gathers over the seeds."""

    scores: list[float] = field(default_factory=list)
    own: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    up: list[int] = field(default_factory=list)
    down: list[int] = field(default_factory=list)


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
    if references:
        scored_rows(config, test_tokens(config))  # refuses a comparison on nothing before hours were spent
    try:
        folder.mkdir(parents=True)
    except OSError as error:
        raise ConfigError(f"{folder} cannot be made: {error.strerror}. Choose another folder with --out.") from error
    columns: dict[tuple[str, str], _Column] = {}
    for seed in range(config.seed, config.seed + seeds):
        for i, settings in enumerate(methods):
            one = settings.model_copy(update={"seed": seed})
            label = "-".join(filter(None, names[i]))
            target = folder / f"{label}-seed{seed}"
            open_run(target, one)
            notify({"event": "run", "method": label, "seed": seed})
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
