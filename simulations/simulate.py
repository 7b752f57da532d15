"""One simulated run: settings in, a run folder out.

fedlora simulate simulations/scenarios/default.toml --seed 0
"""

from __future__ import annotations

import resource
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clients.app import app as client_app
from clients.app import resident_base
from fedlora.config import RunConfig, flat
from fedlora.data import test_rows
from fedlora.data.prompt import prompt_format
from fedlora.data.rows import TokenRow
from fedlora.report.html import write_report
from fedlora.report.log import RunLog, read_log
from server.app import run
from server.evaluate import TestRows
from simulations.engine import LocalGrid
from simulations.references import Reference, bare_base, centralised, local_only, scored_rows

Notify = Callable[[dict[str, Any]], None]
MAKE = {"local only": local_only, "centralised": centralised}


@dataclass(frozen=True)
class Result:
    """What a run came to, at its last round."""

    folder: Path
    score: float | None
    loss: float | None
    bytes_up: int
    bytes_down: int
    seconds: float
    references: tuple[Reference, ...]


def simulate(
    config: RunConfig, folder: Path, *, notify: Notify, references: Sequence[str] = (), bare: bool = True
) -> Result:
    """Conduct a run in `folder` (made by `server.app.open_run`), from its newest checkpoint on, in this process.

    `references` names rows to add: `local only`, `centralised`; `bare` adds the bare base. The score is the server's
    where it has test rows, else the clients' own.
    """
    started = time.monotonic()
    base = resident_base(config.model)
    test = test_tokens(config)
    evaluator = TestRows(base, test, batch_size=config.evaluation.batch_size) if test else None
    grid = LocalGrid(client_app, clients=config.rounds.clients, run_config=flat(config), memory=folder / "clients")
    run(grid, config, folder, evaluator=evaluator, notify=notify)
    log = RunLog(folder)
    rows = scored_rows(config, test) if bare or references else []
    made = [bare_base(config, rows)] if bare else []
    for name in references:
        notify({"event": "reference", "name": name})
        made.append(MAKE[name](config, rows))
    for reference in made:
        log.append(reference.event())
    rounds = [e for e in read_log(folder) if e["event"] == "round"]
    last: dict[str, Any] = next((e["evaluation"] for e in reversed(rounds) if "evaluation" in e), {})
    final = last.get("server", last)
    seconds = time.monotonic() - started
    end: dict[str, Any] = {
        "event": "end",
        "seconds": seconds,
        "peak_memory_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }
    log.append(end | {k: final[k] for k in ("score", "loss") if k in final})
    write_report(folder)
    shutil.rmtree(folder / "clients", ignore_errors=True)  # answers that only a crash would have needed again
    return Result(
        folder=folder,
        score=final.get("score"),
        loss=final.get("loss"),
        bytes_up=sum(e["bytes_up"] for e in rounds),
        bytes_down=sum(e["bytes_down"] for e in rounds),
        seconds=sum(e["seconds"] for e in rounds),
        references=tuple(made),
    )


def test_tokens(config: RunConfig) -> list[TokenRow]:
    """The server's test rows as tokens; empty if the settings give none or keep the server from evaluating."""
    if not config.evaluation.server:
        return []
    base = resident_base(config.model)
    form = prompt_format(config, base.tokenizer)
    return form.encode(test_rows(config))[0]


test_tokens.__test__ = False  # type: ignore[attr-defined]  # not a pytest function

__all__ = ["MAKE", "Result", "simulate", "test_tokens"]
