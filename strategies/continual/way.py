"""What the ways of learning task after task (`continual.method`) may differ in; each is a value, one file each."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from fedlora.adapter import Array
from fedlora.config import RunConfig
from fedlora.continual.tasks import ONE_PAIR, Leg
from fedlora.errors import MethodError
from fedlora.state import GlobalState, Subspace, TrainPlan
from strategies.base import Cohort, Steps
from strategies.continual.moments import Moments
from strategies.continual.views import bounded, members_of

__all__ = ["Opening", "Way"]

_FROZEN = ("fed-sb", "fedsvd", "ffa-lora")  # methods whose A is not trained: dimensions beyond the rank do nothing


@dataclass(frozen=True, kw_only=True)
class Opening:
    """A task that is about to begin: what its subspace may depend on."""

    config: RunConfig
    state: GlobalState
    leg: Leg
    tasks: int  # of the run
    inputs: Moments  # of the new task, where the way sketches them

    @property
    def dim(self) -> int:
        """Dimensions of its subspace: as configured; where A stands still the largest rank; else up to four times it,
        as far as all tasks and one more have room. Raises: MethodError for an adapted embedding, which has no inputs.
        """
        layout, leg = self.state.layout, self.leg
        if bad := [n for n, m in layout.modules.items() if m.kind == "embedding"]:
            raise MethodError(
                f"task {leg.name}: {bad[0]} is an embedding, whose inputs are token ids: they have no subspace. Leave "
                "embeddings out of model.target_modules, or use continual.method=incremental"
            )
        if given := leg.task_dim or self.config.continual.task_dim:
            return given
        most = max(bounded(m, leg.rank).rank for m in members_of(self.state, leg))
        if leg.config.method.name in _FROZEN:
            return leg.config.method.task_rank or most
        return max(most, min(4 * most, min(layout.inputs().values()) // (self.tasks + 1)))


@dataclass(frozen=True, kw_only=True)
class Way:
    """One value of `continual.method`. What it leaves at its default is a new pair a task, on top of the sealed ones.

    `allotted(opening)` gives a new task's subspace and its basis `[dim, in]` by module. `led(plan, under, state,
    config)` adds a penalty to a plan of training above `under` sealed blocks, and the arrays that it is measured
    against. `sealed(state, leg, cohort, config)` is what else clients are asked when a task ends.
    """

    name: str
    trains: bool = True
    alone: bool = False  # each task on the base, without those before it
    sketches: bool = False  # clients sketch their inputs when a task opens, and when it is sealed if another follows
    allotted: Callable[[Opening], tuple[Subspace, dict[str, Array]]] | None = None
    led: Callable[[TrainPlan, int, GlobalState, RunConfig], tuple[TrainPlan, Mapping[str, Array]]] | None = None
    sealed: Callable[[GlobalState, Leg, Cohort, RunConfig], Steps[GlobalState]] | None = None

    @property
    def one_pair(self) -> bool:
        """Whether one pair and head go on from task to task."""
        return self.name in ONE_PAIR
