"""One simulated run: settings in, a run folder out.

fedlora simulate simulations/scenarios/default.toml --seed 0
"""

from __future__ import annotations

import math
import resource
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clients.app import app as client_app
from clients.app import reply
from clients.resident import encoded, resident_base, stable_id
from fedlora.config import RunConfig, flat, task_config
from fedlora.continual.tasks import legs, task_names
from fedlora.data import test_rows
from fedlora.data.prompt import prompt_format
from fedlora.data.report import tell
from fedlora.data.rows import TokenRow
from fedlora.errors import ConfigError, DataError
from fedlora.report.html import write_report
from fedlora.report.log import RunLog, read_log
from fedlora.report.stream import Stream, stream_of
from server.app import run
from server.evaluate import TaskRows, TestRows
from simulations.attacks import hostile
from simulations.engine import LocalGrid
from simulations.personal import export_personal, has_personal
from simulations.references import Reference, bare_base, centralised, local_only, scored_rows
from strategies.base import Member, get
from strategies.streams import streamed

Notify = Callable[[dict[str, Any]], None]
MAKE = {"local only": local_only, "centralised": centralised}


@dataclass(frozen=True)
class Result:
    """What a run came to, at its last round."""

    folder: Path
    score: float | None  # of the server's test rows, or without any (or under a personal method) as `own`; with tasks
    # the average accuracy after the last was sealed
    own: float | None  # of the clients' held-out rows, each client its own; None with tasks
    loss: float | None  # None with tasks
    bytes_up: float  # nan where a private run does not tell, and so below
    bytes_down: float
    seconds: float
    references: tuple[Reference, ...]
    next_command: str  # what a person may want to type next, after `fedlora`
    stream: Stream | None = None  # what was kept and lost, of a run with tasks


def simulate(
    config: RunConfig, folder: Path, *, notify: Notify, references: Sequence[str] = (), bare: bool = True
) -> Result:
    """Conduct a run in `folder` (made by `server.app.open_run`), from its newest checkpoint on, in this process.

    `references` names rows to add: `local only`, `centralised`; `bare` adds the bare base. The score is the server's
    where it has test rows, else the clients' own.
    """
    started = time.monotonic()
    base = resident_base(config.model)
    test = [] if config.tasks else test_tokens(config)
    evaluator = TestRows(base, test, batch_size=config.evaluation.batch_size) if test else None
    by_task = task_tests(config)
    scorer = TaskRows(base, by_task, config, batch_size=config.evaluation.batch_size) if by_task else None
    app = hostile(client_app, config, poisonable=reply) if config.attack.kind != "none" else client_app
    grid = LocalGrid(app, clients=config.rounds.clients, run_config=flat(config), memory=folder / "clients")
    run(grid, config, folder, evaluator=evaluator, notify=notify, tasks_evaluator=scorer)
    log = RunLog(folder)
    events = read_log(folder)
    rounds, stream = [e for e in events if e["event"] == "round"], stream_of(events)
    last: dict[str, Any] = {}
    if stream is None:
        last = next((e["evaluation"] for e in reversed(rounds) if "evaluation" in e), {})
    final = last.get("server", {} if test and get(config.method.name).personal else last)
    if stream is not None and (found := stream.measured()) is not None:
        final = {"score": found.average_accuracy}
    seconds = time.monotonic() - started
    end: dict[str, Any] = {
        "event": "end",
        "seconds": seconds,
        "peak_memory_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }
    log.append(end | {k: final[k] for k in ("score", "loss") if k in final})
    write_report(folder)
    if has_personal(config):
        export_personal(config, folder)
    else:
        # answers that only a crash would have needed again; the ledgers of private runs lie beside them and stay
        kept = folder / "clients"
        if config.privacy.level != "none":
            kept /= (folder / "run-id").read_text().strip()
        shutil.rmtree(kept, ignore_errors=True)
    made: list[Reference] = []
    wanted = [] if config.tasks else (["bare base"] if bare else []) + list(references)
    if config.tasks and references:
        notify({"event": "note", "text": "no references for tasks: run continual.method separate and joint instead"})
    try:
        rows = scored_rows(config, test) if wanted else []
    except DataError as error:
        notify({"event": "note", "text": f"no {', '.join(wanted)} for comparison: {error}"})
        wanted = []
    for name in wanted:
        notify({"event": "reference", "name": name})
        made.append(bare_base(config, rows) if name == "bare base" else MAKE[name](config, rows))
        log.append(made[-1].event())
        write_report(folder)
    return Result(
        folder=folder,
        score=final.get("score"),
        own=last.get("score"),
        loss=final.get("loss"),
        bytes_up=sum(e.get("bytes_up", math.nan) for e in rounds),
        bytes_down=sum(e.get("bytes_down", math.nan) for e in rounds),
        seconds=sum(e["seconds"] for e in rounds),
        references=tuple(made),
        next_command=_next(config, folder, test) if stream is None else _next_of_tasks(config, folder, stream),
        stream=stream,
    )


def test_tokens(config: RunConfig) -> list[TokenRow]:
    """The server's test rows as tokens; empty if the settings give none or keep the server from evaluating."""
    if not config.evaluation.server:
        return []
    base = resident_base(config.model)
    rows, left_out = prompt_format(config, base.tokenizer).encode(test_rows(config))
    tell(left_out, "test rows")
    return rows


def task_tests(config: RunConfig) -> dict[str, list[TokenRow]]:
    """The server's test rows of every task as tokens; empty without tasks, or if the server is not to evaluate.

    Raises: ConfigError if some tasks have test rows and others have none.
    """
    rows = {name: test_tokens(task_config(config, name)) for name in task_names(config)}
    without = [name for name, some in rows.items() if not some]
    if 0 < len(without) < len(rows):
        raise ConfigError(
            f"tasks: {', '.join(without)} have no test rows and others do; set data.test of all, or of none"
        )
    return {} if without else rows


def _next(config: RunConfig, folder: Path, test: Sequence[TokenRow]) -> str:
    if config.model.task_type == "causal-lm":
        return f"generate {folder}" if test else f'generate {folder} "your prompt"'
    return f"evaluate {folder}" if test else f"evaluate {folder} --data FILE"


def _next_of_tasks(config: RunConfig, folder: Path, stream: Stream) -> str:
    scored = bool(stream.inference)  # there are test rows of the server
    if config.model.task_type != "causal-lm":
        return f"evaluate {folder}" if scored else f"report {folder}"
    asked = f"generate {folder}" if scored else f'generate {folder} "your prompt"'
    return f"{asked} --task {'auto' if 'routing' in stream.inference else 'all'}"


def check(config: RunConfig) -> None:
    """Refuse what no run could do, before there is a folder: model, data, columns, prompts, ranks, tasks, test rows.

    Raises: ConfigError, DataError naming the setting; MethodError for tasks that nobody has, or without room.
    """
    base = resident_base(config.model)
    most = base.layout.max_rank()
    for rank in (config.rank_of(i) for i in range(min(config.rounds.clients, len(config.lora.ranks)))):
        if rank > most:
            raise ConfigError(f"lora.ranks: rank {rank}; the smallest adapted layer allows 1 to {most}")
    if config.personal.rank is not None and config.personal.rank > most:
        raise ConfigError(f"personal.rank: {config.personal.rank}; the smallest adapted layer allows 1 to {most}")
    for leg in legs(config):
        if leg.rank is not None and leg.rank > most:
            raise ConfigError(f"tasks, {leg.name}: rank {leg.rank}; the smallest adapted layer allows 1 to {most}")
    if config.tasks:
        ids = {stable_id(i): i for i in range(config.rounds.clients)}
        ranks = {name: config.rank_of(i) for name, i in ids.items()}
        who = [Member(id=name, rank=rank, scale=config.scale_of(rank)) for name, rank in ranks.items()]
        streamed(config).open(base.fingerprint, base.layout, who, config.method, config.seed)
        for leg in legs(config):
            encoded(config, next(i for name, i in ids.items() if leg.holds(name)), leg.name)
        task_tests(config)
        return
    encoded(config, 0)
    test_tokens(config)


test_tokens.__test__ = False  # type: ignore[attr-defined]  # not a pytest function

__all__ = ["MAKE", "Result", "check", "simulate", "task_tests", "test_tokens"]
