"""The ServerApp: read the settings, prepare the run folder, conduct the rounds, release the adapter.

flwr run . local-simulation --run-config 'out="/path/of/a/new/folder"'

The same command again, with the folder of a run that was stopped, goes on from its newest checkpoint.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from fedlora.code import require_one_checkout
from fedlora.config import RunConfig, differences, load_config, task_config, to_toml
from fedlora.continual.tasks import task_names
from fedlora.errors import ConfigError
from fedlora.report.log import read_log
from server.channel import Channel
from server.checkpoint import write_atomic
from server.evaluate import Evaluator, TasksEvaluator
from server.release import release
from server.rounds import Conductor

require_one_checkout(__file__)

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    config = load_config(flower={k: v for k, v in context.run_config.items() if k != "out"})
    out = str(context.run_config.get("out", ""))
    if config.attack.kind != "none":
        raise ConfigError(
            f"attack.kind: only fedlora simulate and compare have hostile clients, got {config.attack.kind}"
        )
    if not out:
        raise ConfigError(
            "out: where should the run folder be? Give it as --run-config 'out=\"/path/of/a/new/folder\"'"
        )
    folder = Path(out)
    if (folder / "config.toml").is_file():
        require_same_settings(folder, config)
    else:
        open_run(folder, config)
    one, several = own_evaluators(config)
    run(grid, config, folder, evaluator=one, notify=_print, tasks_evaluator=several)


def require_same_settings(folder: Path, config: RunConfig) -> None:
    """A run goes on in its folder with the settings that it began with. Raises: ConfigError naming what differs."""
    changed = differences(load_config(folder / "config.toml"), config)
    if changed:
        raise ConfigError(
            f"{folder} holds a run with other settings, and a resumed run must keep them: {'; '.join(changed)}. Use "
            "the same settings, or choose another folder for a new run."
        )


def open_run(folder: Path, config: RunConfig) -> None:
    """Make a new run folder with its id and its settings. Raises: ConfigError if the folder exists."""
    try:
        folder.mkdir(parents=True)
    except FileExistsError:
        raise ConfigError(
            f"{folder} exists already. Choose another folder with --out, or go on with that run: --resume {folder}"
        ) from None
    except OSError as error:
        raise ConfigError(f"{folder} cannot be made: {error.strerror}. Choose another folder with --out.") from error
    write_atomic(folder / "run-id", f"{secrets.token_hex(8)}\n".encode())
    write_atomic(folder / "config.toml", to_toml(config).encode())  # last: with it the folder is a run


def run(
    grid: Grid,
    config: RunConfig,
    folder: Path,
    *,
    evaluator: Evaluator | None,
    notify: Callable[[dict[str, Any]], None],
    tasks_evaluator: TasksEvaluator | None = None,
    signing_key: Ed25519PrivateKey | None = None,
    channel: Channel | None = None,
    durable: bool = False,
) -> Path:
    """Conduct a run in a folder made by `open_run`, from its newest checkpoint on; returns the adapter's folder."""
    name = (folder / "run-id").read_text().strip()
    conductor = Conductor(
        grid,
        config,
        folder,
        run=name,
        evaluator=evaluator,
        notify=notify,
        tasks_evaluator=tasks_evaluator,
        channel=channel,
        durable=durable,
    )
    state = conductor.conduct()
    return release(folder, state, config, run=name, events=read_log(folder), signing_key=signing_key)


def own_evaluators(config: RunConfig) -> tuple[Evaluator | None, TasksEvaluator | None]:
    """The server's evaluator of a run without tasks, or of one with tasks, if the settings give it test rows.

    Loads the base. Raises: ConfigError if some tasks have test rows and others have none.
    """
    if not config.evaluation.server:
        return None, None
    from fedlora.base import load_base
    from server.evaluate import TaskRows, TestRows, test_tokens

    names = task_names(config)
    base = load_base(config.model)
    rows = {name: test_tokens(task_config(config, name), base) for name in names or ("",)}
    without = [name for name, some in rows.items() if not some]
    if len(without) == len(rows):
        return None, None
    if without:
        raise ConfigError(
            f"tasks: {', '.join(without)} have no test rows and others do; set data.test of all, or of none"
        )
    size = config.evaluation.batch_size
    if names:
        return None, TaskRows(base, rows, config, batch_size=size)
    return TestRows(base, rows[""], batch_size=size), None


def _print(event: dict[str, Any]) -> None:
    """One line in Flower's log for each step that someone may look for."""
    kind = event["event"]
    if kind == "closed":
        print(f"round {event['round']} closed", flush=True)
    elif kind == "refused":
        print(f"refused {event['client']}: {event['rule']}: {event['detail']}", flush=True)
    elif kind == "retry":
        print(f"round {event['round']} is repeated: {event['reason']}", flush=True)
    elif kind == "done":
        print(f"done after {event['seconds']:.0f} s", flush=True)
