"""A run with tasks, put to use: which task a prompt is of, what is attached for it, and what every way of that scores.

fedlora generate RUN "a prompt" --task auto
fedlora generate RUN "a prompt" --task mix
fedlora evaluate RUN --without NAME
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from clients.resident import resident_base
from fedlora.adapter import Array
from fedlora.at_rest import key_from_environment
from fedlora.base import Base
from fedlora.config import RunConfig, task_config
from fedlora.continual.router import fit, largest
from fedlora.continual.router import task_names as seen_tasks
from fedlora.continual.tasks import JOINT, ONE_PAIR, task_names
from fedlora.data import Row, test_rows
from fedlora.data.columns import nearest
from fedlora.data.prompt import prompt_format
from fedlora.data.rows import TokenRow
from fedlora.errors import BaseMismatch, ConfigError
from fedlora.evaluation.generate import generate
from fedlora.state import Block, GlobalState
from fedlora.training.attach import attach, mixture
from fedlora.training.measure import features
from fedlora.wire import blocks_id
from server.checkpoint import latest
from server.evaluate import TaskRows, tasks_blocks
from simulations.simulate import task_tests
from strategies.continual.views import FEATURES, blocks_known, blocks_of, head_of, joint_head

ALL, AUTO, MIX = "all", "auto", "mix"  # what may be said in place of a task's name
EXAMPLES = 8  # test rows that are asked where no prompt is given
_INSEPARABLE = {
    **dict.fromkeys(ONE_PAIR, "one pair goes on from task to task, so no task's part can be told from the others'"),
    "joint": "one pair learnt all tasks at once, so no task's part can be told from the others'",
    "nearest-mean": "nothing was trained, so there is nothing to remove",
}  # ways under which no task can be taken out of the sum

__all__ = [
    "ALL",
    "AUTO",
    "MIX",
    "Said",
    "TaskScores",
    "answers",
    "asked_tasks",
    "attached",
    "begun",
    "judge",
    "newest",
    "require_separable",
    "routable",
    "routed",
    "score_tasks",
    "without_task",
]

Scores = Mapping[str, Mapping[str, float]]  # way of inference -> task -> share


@dataclass(frozen=True, kw_only=True)
class Said:
    """One prompt: what the bare base and the tuned one wrote, and the task whose adapter was used (or `all`).

    Of a mixture `task` is the likeliest, and `shares` what each that took part had, the largest first.
    """

    prompt: str
    task: str
    base: str
    tuned: str
    right: str = ""  # the answer of the test row that the prompt is from
    of: str = ""  # its task
    shares: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class TaskScores:
    """Shares of right answers by task: of the bare base, by every way of inference, and without one task's blocks."""

    rows: Mapping[str, int]
    base: Mapping[str, float]
    ways: Scores  # as `server.evaluate.TaskRows.inference`
    without: Scores | None = None


def newest(config: RunConfig, folder: Path) -> GlobalState:
    """The state of a run with tasks at its newest checkpoint, also of a run that is still going.

    Raises: ConfigError for a run without tasks, without a checkpoint, or before its first task; CheckpointError.
    """
    if not config.tasks:
        raise ConfigError(f"{folder} was trained without tasks: leave --task and --without out")
    found = latest(folder / "checkpoints", key=key_from_environment())
    if found is None:
        raise ConfigError(f"{folder} has no checkpoint, which holds its tasks: run it, or copy checkpoints/ as well")
    if not found[1].tasks:
        raise ConfigError(f"{folder}: no task has begun. Go on with: fedlora simulate --resume {folder}")
    return found[1]


def begun(config: RunConfig, state: GlobalState) -> tuple[str, ...]:
    """The tasks that have begun, in the order of the settings: those that can be asked for by name."""
    return tuple(name for name in task_names(config) if name in state.tasks or JOINT in state.tasks)


def routable(config: RunConfig, state: GlobalState) -> str:
    """Empty if the task of an input can be found by its features; else why it cannot, and what to do."""
    names = begun(config, state)
    if len(names) < 2:
        return f"routing chooses between tasks, and there is one: use --task {names[0]}"
    if JOINT in state.tasks:
        return f"under continual.method=joint one adapter serves all tasks: use --task {ALL}"
    found = seen_tasks(state.memory.get(FEATURES, {}))
    if not found and not config.continual.routing:
        return f"continual.routing was off, so no features were summed: use --task {ALL}, or {' or '.join(names)}"
    if len(found) < 2:
        return f"features are summed when tasks are sealed, and {len(found)} of {len(names)} was: use --task {ALL}"
    return ""


def asked_tasks(config: RunConfig, state: GlobalState, task: str | None) -> str:
    """What `--task` means: a task's name, `all`, `auto` or `mix`; without it `auto` where that can be, else `all`.

    Raises: ConfigError for a name that is none, or `auto` or `mix` where no task can be found.
    """
    why = routable(config, state)
    if task is None:
        return ALL if why else AUTO
    if task in (AUTO, MIX) and why:
        raise ConfigError(f"--task {task}: {why}")
    names = begun(config, state)
    if task not in (ALL, AUTO, MIX, *names):
        why = "it has not begun yet" if task in task_names(config) else "no task of this run is called so"
        there = f"there are {', '.join(names)}, {ALL}, {AUTO} and {MIX}"
        raise ConfigError(f"--task {task}: {why}; {there}{nearest(task, names)}")
    return task


def attached(config: RunConfig, state: GlobalState, task: str) -> tuple[tuple[Block, ...], dict[str, Array]]:
    """Blocks and head for a task by name: its own adapter on those sealed before it (under `separate` alone), with its
    head; for `all` every adapter, and one head of all classes."""
    if task == ALL:
        return blocks_of(state, state.tasks.values()), joint_head(state, config)
    return blocks_known(state, task, config.continual.method), head_of(state, task, config)


def routed(
    base: Base, config: RunConfig, state: GlobalState, prompts: Sequence[Sequence[int]], *, batch_size: int
) -> tuple[tuple[str, ...], NDArray[np.float64]]:
    """The tasks, and how likely each prompt `[prompts, tasks]` is of each, by the bare base's features of its tokens.

    Takes off whatever is attached. Cost: one forward pass. Source: see fedlora/continual/router.py.
    """
    router = fit(state.memory[FEATURES], config.seed)
    rows = [TokenRow(np.array(ids, np.int32), np.zeros(len(ids), np.bool_), None, "") for ids in prompts]
    return router.names, router.routed(features(base, rows, batch_size=batch_size))[1]


def answers(
    config: RunConfig, folder: Path, prompts: Sequence[str], *, task: str | None, max_new_tokens: int
) -> list[Said]:
    """What the base writes after each prompt, bare and with what `task` attaches (greedy); without prompts, after some
    of the tasks' test rows. Under `mix` a prompt is written as its likeliest task's settings say.

    Raises: ConfigError for a classifier, a task as `asked_tasks`, or nothing to ask; BaseMismatch if the base is not
    that of the run; as `newest`.
    """
    state = newest(config, folder)
    task = asked_tasks(config, state, task)
    if config.model.task_type != "causal-lm":
        raise ConfigError(f"a classifier writes nothing: score it with fedlora evaluate {folder}")
    rows = [] if prompts else _examples(config, begun(config, state) if task in (ALL, AUTO, MIX) else (task,))
    if not prompts and not rows:
        raise ConfigError("no prompt: give one or more, in quotes, after the folder")
    base = _base(config, state)
    asked = [(prompt, Row.single(prompt, "", "-"), "", "") for prompt in prompts] or [
        (row.prompt, row, row.answer, of) for of, row in rows
    ]
    form = prompt_format(config, base.tokenizer)  # before its task is known, a prompt is read as the run's settings say
    ids = form.prompts([row for _, row, _, _ in asked])
    found = [task] * len(ids)
    names: tuple[str, ...] = ()
    if task in (AUTO, MIX):
        names, likely = routed(base, config, state, ids, batch_size=config.evaluation.batch_size)
        found = [names[i] for i in likely.argmax(1)]
    weights = largest(likely) if task == MIX else np.zeros((len(ids), 0))
    bare: dict[int, str] = {}
    tuned: dict[int, str] = {}
    for name in dict.fromkeys(found):
        at = [i for i, other in enumerate(found) if other == name]
        form = prompt_format(config if name == ALL else task_config(config, name), base.tokenizer)
        starts = form.prompts([asked[i][1] for i in at])
        if task == MIX:
            own = _mixed(base, config, state, names, weights[at])
        else:
            own = _one(base, *attached(config, state, name))
        for said, on in ((bare, _one(base, (), {})), (tuned, own)):
            with on:
                tokens = generate(base, starts, max_new_tokens=max_new_tokens, end_ids=form.stop_ids)
            said |= {i: str(form.tokenizer.decode(ids)) for i, ids in zip(at, tokens, strict=True)}
    told = [_shared(names, row) for row in weights]
    return [
        Said(prompt=prompt, task=found[i], base=bare[i], tuned=tuned[i], right=right, of=of, shares=told[i])
        for i, (prompt, _, right, of) in enumerate(asked)
    ]


@contextmanager
def _one(base: Base, blocks: tuple[Block, ...], head: Mapping[str, Array]) -> Iterator[None]:
    """One adapter for all rows."""
    attach(base, blocks, blocks_id(blocks), None, {**base.initial_head, **head})
    yield


def _mixed(
    base: Base, config: RunConfig, state: GlobalState, tasks: Sequence[str], weights: NDArray[np.float64]
) -> AbstractContextManager[object]:
    """Every row's own mixture of the tasks' adapters, by its weights `[rows, tasks]`."""
    blocks, known = tasks_blocks(state, tasks, config.continual.method)
    return mixture(base, blocks, known, weights, [head_of(state, task, config) for task in tasks])


def _shared(names: Sequence[str], weights: NDArray[np.float64]) -> dict[str, float]:
    """The weights above 0 by name, the largest first."""
    return {names[i]: float(weights[i]) for i in np.argsort(-weights, kind="stable") if weights[i] > 0.0}


def without_task(config: RunConfig, state: GlobalState, task: str) -> GlobalState:
    """The same state without the blocks of one task: its product is gone from W_eff, exactly, and nothing else is.

    Heads and the router stay. What later tasks, which were trained on top of it, lose by that is to be measured.
    Raises: ConfigError for a name that is none, or a way under which no task's part can be told from the others'.
    """
    require_separable(config, state, task)
    if config.continual.method == "separate":
        raise ConfigError(
            f"--without {task}: under continual.method=separate every task has its adapter on the base alone, so no "
            "other task would change"
        )
    empty = replace(state.tasks[task], blocks=(), pair=None)
    return replace(state, tasks={**state.tasks, task: empty})


def require_separable(config: RunConfig, state: GlobalState, task: str) -> None:
    """Raises: ConfigError for a name that is none, or a way under which no task has a part in the sum of its own."""
    way = config.continual.method
    if task not in begun(config, state):
        names = begun(config, state)
        raise ConfigError(
            f"--without {task}: no task of this run is called so; there are {', '.join(names)}{nearest(task, names)}"
        )
    if way in _INSEPARABLE:
        raise ConfigError(f"--without {task}: under continual.method={way} {_INSEPARABLE[way]}")


def score_tasks(config: RunConfig, folder: Path, *, without: str | None = None) -> TaskScores:
    """Every task's test rows, scored by every way of inference, and again without the blocks of one task.

    Raises: ConfigError if the settings name no test rows, or as `newest` and `without_task`; BaseMismatch.
    """
    state = newest(config, folder)
    less = None if without is None else without_task(config, state, without)
    rows, scorer = judge(config, folder, state)
    before = scorer.scores(replace(state, tasks={}), tuple(rows))
    return TaskScores(
        rows={name: len(some) for name, some in rows.items()},
        base={name: sums["correct"] / sums["counted"] for name, sums in before.items()},
        ways=_shares(scorer.inference(state)),
        without=None if less is None else _shares(scorer.inference(less)),
    )


def judge(config: RunConfig, folder: Path, state: GlobalState) -> tuple[dict[str, list[TokenRow]], TaskRows]:
    """The test rows of every task of the run in `folder`, and what scores states on them.

    Raises: ConfigError if the settings name no test rows; BaseMismatch.
    """
    base = _base(config, state)
    served = config.model_copy(update={"evaluation": config.evaluation.model_copy(update={"server": True})})
    rows = task_tests(served)
    if not rows:
        raise ConfigError(f"nothing to score on: the settings of {folder} name no test rows of its tasks (data.test)")
    return rows, TaskRows(base, rows, config, batch_size=config.evaluation.batch_size)


def _shares(found: Mapping[str, Mapping[str, Mapping[str, float]]]) -> Scores:
    return {way: {name: told["score"] for name, told in tasks.items()} for way, tasks in found.items()}


def _base(config: RunConfig, state: GlobalState) -> Base:
    base = resident_base(config.model)
    if base.fingerprint != state.base:
        raise BaseMismatch(
            f"the run's adapters are of base {state.base}, and {config.model.name} is {base.fingerprint}: leave "
            "--model out, or give the base that the run was opened with"
        )
    return base


def _examples(config: RunConfig, names: Sequence[str]) -> list[tuple[str, Row]]:
    """A few test rows of each task, spread over what it has, with its name."""
    each = -(-EXAMPLES // len(names))
    found = []
    for name in names:
        rows = test_rows(task_config(config, name))
        found += [(name, row) for row in rows[:: max(1, len(rows) // each)][:each]]
    return found
