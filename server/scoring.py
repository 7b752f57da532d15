"""Scores of a run: sums over the clients' held-out rows, which they give, and over the server's own, if it has some."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from fedlora.config import RunConfig
from fedlora.continual.tasks import JOINT, legs, rounds_in_all, task_names
from fedlora.state import Ask, Block, GlobalState, keyed
from server.asking import Courier, Tally, Turn
from server.evaluate import Evaluator, TasksEvaluator, evaluation_ask, summary
from server.roster import Roster
from strategies.base import Member, Method
from strategies.continual.views import blocks_known, blocks_of, head_of

__all__ = ["Scoring"]


class Scoring:
    """How a run is scored. `evaluator` scores one without tasks at the server, `tasks_evaluator` one with tasks."""

    def __init__(
        self,
        config: RunConfig,
        method: Method,
        courier: Courier,
        *,
        evaluator: Evaluator | None,
        tasks_evaluator: TasksEvaluator | None,
    ) -> None:
        self._config, self._method, self._courier, self._legs = config, method, courier, legs(config)
        self._evaluator = evaluator if config.evaluation.server else None
        self._tasks_evaluator = tasks_evaluator if config.evaluation.server else None

    @property
    def by_server(self) -> bool:
        """Whether the server scores a run without tasks."""
        return self._evaluator is not None

    def untrained(self, state: GlobalState) -> dict[str, dict[str, Any]]:
        """What the server scores on every task before anything is trained; empty where it scores nothing."""
        found = self._tasks_evaluator
        return {} if found is None else by_task(found.scores(state, task_names(self._config)))

    def plain(
        self, number: int, state: GlobalState, members: Sequence[Member], roster: Roster, tally: Tally
    ) -> dict[str, Any]:
        """Sums over the clients' held-out rows, per group and per client; and the server's own, if it has data.

        Who did not answer the training at all is not asked again: that could cost another deadline.
        """
        own = self._method.evaluation
        there = [m for m in members if m.id not in tally.missing]
        if own is None:
            asks = dict.fromkeys((m.id for m in there), evaluation_ask(state))
        else:
            asks = {m.id: own(state, m) for m in there}
        told = self._told(number, 0, state, asks, roster, tally)
        result = summary(added(client["metrics"] for client in told))
        result["clients"] = {c["id"]: summary(c["metrics"], groups=False) for c in told}
        if self._evaluator is not None and not self._method.personal:
            result["server"] = summary(self._evaluator(state))
        return result

    def of_tasks(
        self,
        number: int,
        state: GlobalState,
        sealed: Sequence[str],
        members: Sequence[Member] | None,
        roster: Roster,
        tally: Tally,
    ) -> dict[str, Any]:
        """`evaluation`: of the tasks that are being trained; where one was sealed also `border`: of all tasks.

        Clients score the tasks that they have and that have begun, each on its own held-out rows. The server scores
        all; after the last round it also tries every way to tell which task an input is of. Without `members` nothing
        of a single client may be seen, and none is asked.
        """
        begun = [leg for leg in self._legs if leg.name in state.tasks and (sealed or number <= leg.last)]
        own: dict[str, dict[str, float]] = {}
        clients: dict[str, dict[str, float]] = {}
        way = self._config.continual.method
        if way != "nearest-mean" and members is not None:
            for phase, leg in enumerate(begun):
                ask = Ask(
                    task=leg.name,
                    blocks=self._blocks_for(state, leg.name),
                    arrays=keyed("head", head_of(state, leg.name, self._config)),
                )
                asks = {m.id: ask for m in members if leg.holds(m.id) and m.id not in tally.missing}
                told = self._told(number, phase, state, asks, roster, tally)
                own[leg.name] = added(c["metrics"] for c in told)
                for c in told:
                    clients[c["id"]] = added([clients.get(c["id"], {}), c["metrics"]])
        active = [leg.name for leg in self._legs if leg.first <= number <= leg.last]
        names = task_names(self._config) if JOINT in active else tuple(active)
        served: dict[str, dict[str, float]] = {}
        if self._tasks_evaluator is not None:
            served = self._tasks_evaluator.scores(state, task_names(self._config) if sealed else names)
        result = summary(added(own[name] for name in active if name in own))
        result["clients"] = {c: summary(sums, groups=False) for c, sums in sorted(clients.items())}
        if served:
            result["server"] = summary(added(served[name] for name in names))
        found: dict[str, Any] = {"evaluation": result}
        if sealed:
            found["border"] = {"sealed": list(sealed), "own": by_task(own), "server": by_task(served)}
            if self._tasks_evaluator is not None and number == rounds_in_all(self._config):
                found["border"]["inference"] = self._tasks_evaluator.inference(state)
        return found

    def _blocks_for(self, state: GlobalState, task: str) -> tuple[Block, ...]:
        """What `task` is scored with: everything; one adapter a task has nothing else."""
        if self._config.continual.method == "separate":
            return blocks_known(state, task, "separate")
        return blocks_of(state, state.tasks.values())

    def _told(
        self, number: int, phase: int, state: GlobalState, asks: Mapping[str, Ask], roster: Roster, tally: Tally
    ) -> list[dict[str, Any]]:
        """What clients tell of one ask to evaluate; their answers carry nothing else."""
        spool, told = self._courier.ask(Turn(kind="evaluate", round=number, phase=phase), state, asks, roster, tally)
        spool.clear()
        return told


def added(several: Iterable[Mapping[str, float]]) -> dict[str, float]:
    sums: dict[str, float] = {}
    for one in several:
        for key, value in one.items():
            sums[key] = sums.get(key, 0.0) + value
    return sums


def by_task(sums: Mapping[str, Mapping[str, float]]) -> dict[str, dict[str, Any]]:
    """Score, loss and score among the classes of all tasks, by task."""
    return {task: summary(one, groups=False) for task, one in sums.items()}
