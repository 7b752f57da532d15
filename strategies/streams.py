"""Tasks one after another, over any method that can be sealed: a Method whose rounds open, train and seal tasks.

    W_eff = W0 + sum over sealed tasks of their blocks + (the open task's own blocks and pair)

A task is trained on the base, the tasks that were sealed before, and its own pair; when its last round closes its pair
becomes a block under its name, with its head, and the next task begins with a fresh pair, fresh moments and fresh
method memory. Two tasks that are open at once do not see one another until one of them is sealed.

The method of a task never learns that there are others: it is shown a state with that one task, and where the task has
a subspace (`fedlora.state.Subspace`), a layout whose inputs are the subspace's coordinates. So every A of the task is
`M N`, whatever the method does with M: means, stacks, truncations, codecs, element-wise server optimisers and noise all
stay inside, and tasks with orthogonal subspaces have orthogonal A by construction.

What the ways differ in (`continual.method`) is a value of each, in strategies/continual/.

Source of the pieces: InfLoRA (Liang and Li, CVPR 2024), GPM (Saha et al., ICLR 2021), FOT (Bakman et al., ICLR 2024);
their federation by summed sketches and subspaces of coordinates is ours.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from fedlora.adapter import Adapter, Array
from fedlora.config import MethodConfig, RunConfig, local_training, task_config
from fedlora.continual.router import added
from fedlora.continual.tasks import JOINT, Leg, legs
from fedlora.errors import MethodError
from fedlora.privacy.clients import client_privacy
from fedlora.rng import public_orthonormal, stream
from fedlora.state import Ask, Block, GlobalState, Layout, Subspace, Task, keyed, times
from fedlora.subspace import rows_checksum
from strategies.base import Closed, Cohort, Member, Method, Round, Steps
from strategies.configured import configured
from strategies.continual import WAYS
from strategies.continual.moments import Moments, effect_on_old, measured, old_inputs, with_old_inputs
from strategies.continual.sealing import cut, overlaps
from strategies.continual.views import (
    FEATURES,
    HEAD,
    blocks_known,
    blocks_of,
    bounded,
    first_memory,
    joint_head,
    members_of,
    owned,
    remembering,
    sealed_in_order,
    with_owned,
)
from strategies.continual.way import Opening
from strategies.headed import fitted_head, headed
from strategies.server_optimizer import OWNER as MOMENTS

__all__ = ["streamed"]


def streamed(config: RunConfig) -> Method:
    """The run's method over its tasks; without tasks the method itself. Raises: MethodError, ConfigError."""
    plan = legs(config)
    if not plan:
        return headed(configured(config, client_privacy(config)), config)
    one = _Stream(config, plan)
    return Method(
        name=config.method.name,
        summary=f"{config.method.name} over {len(config.tasks)} tasks, {config.continual.method}",
        open=one.open,
        protocol=one.protocol,
    )


class _Stream:
    """The two functions of a streamed Method; all that a run remembers is in its state."""

    def __init__(self, config: RunConfig, plan: tuple[Leg, ...]) -> None:
        self._config, self._legs, self._way = config, plan, WAYS[config.continual.method]
        terms = client_privacy(config)
        self._inner = {leg.name: configured(leg.config, terms) for leg in plan}

    def open(
        self, base: str, layout: Layout, members: Sequence[Member], settings: MethodConfig, seed: int
    ) -> GlobalState:
        """Version 0: no task is open yet. Raises: MethodError for a task that no client holds, or without room."""
        for leg in self._legs:
            if not any(leg.holds(m.id) for m in members):
                raise MethodError(
                    f"task {leg.name}: none of the {len(members)} enrolled clients has it; mend `clients`"
                )
        state = GlobalState(version=0, base=base, layout=layout, tasks={}, memory=first_memory(layout, members, seed))
        if self._way.allotted is not None:
            self._require_room(state)
        return state

    def _require_room(self, state: GlobalState) -> None:
        """Refuse tasks that will not all have their subspace, before the first is trained. Raises: MethodError."""
        dims = {leg.name: self._opening(state, leg).dim for leg in self._legs}
        inputs = state.layout.inputs()
        narrow = min(inputs, key=lambda n: inputs[n])
        if sum(dims.values()) > inputs[narrow]:
            told = ", ".join(f"{name} {dim}" for name, dim in dims.items())
            raise MethodError(
                f"the tasks need {sum(dims.values())} dimensions ({told}), and {narrow} has {inputs[narrow]} inputs; "
                "lower continual.task_dim or the ranks, take fewer tasks, or adapt only modules with more inputs"
            )

    def protocol(self, state: GlobalState, cohort: Cohort) -> Round:
        """One round of every task that is open in it, in the order of the settings; sealing those that end."""
        report: dict[str, float] = {}
        facts: dict[str, dict[str, float]] = {}
        version = state.version
        for leg in self._legs:
            if not leg.first <= cohort.round <= leg.last:
                continue
            own = self._cohort_of(state, leg, cohort, drawn=True)
            if leg.name not in state.tasks:
                state = yield from self._open_task(state, leg, self._cohort_of(state, leg, cohort))
            told: dict[str, float] = {}
            if self._way.trains and (own.members or own.enrolled):  # else nobody who has it was drawn
                closed = yield from self._train(state, leg, own)
                state, told = closed.state, closed.report
                for client, values in closed.clients.items():
                    facts.setdefault(client, {}).update(values)
            if cohort.round == leg.last:
                state, more = yield from self._seal(state, leg, self._cohort_of(state, leg, cohort))
                told = {**told, **more}
            report |= {f"{leg.name}/{k}" if k in report else k: v for k, v in told.items()}
        return Closed(state=replace(state, version=version + 1), report=report, clients=facts)

    def _cohort_of(self, state: GlobalState, leg: Leg, cohort: Cohort, *, drawn: bool = False) -> Cohort:
        """The clients of this round that have the task; where none was drawn, all who have it, unless `drawn`."""
        members = [m for m in cohort.members if leg.holds(m.id)]
        if not members and not drawn:
            members = members_of(state, leg)
        enrolled = tuple(bounded(m, leg.rank) for m in cohort.enrolled if leg.holds(m.id))
        return replace(cohort, members=tuple(bounded(m, leg.rank) for m in members), enrolled=enrolled)

    # -- a task begins

    def _open_task(self, state: GlobalState, leg: Leg, cohort: Cohort) -> Steps[GlobalState]:
        tasks, memory = dict(state.tasks), {}
        before, way = sealed_in_order(state), self._way
        own = self._fitted(leg, before) if self._config.model.head == "discriminants" else []
        inputs: Moments = {}
        if own or way.sketches:
            under = () if way.alone else blocks_of(state, before)
            inputs, sums = yield from measured(
                state, leg, cohort, self._config, under, inputs=way.sketches, reads=bool(own)
            )
        if way.one_pair and before:
            last = before[-1]
            task = replace(last, name=leg.name, sealed=False, statistics={})
            tasks[last.name] = replace(last, pair=None, blocks=())
            memory = {owner: x for owner, x in owned(state, last.name).items() if owner != MOMENTS}
            state = with_owned(state, last.name, {})
        elif way.trains:
            task, memory = self._begun(state, leg, inputs)
        else:
            task = Task(name=leg.name)
        head = dict(state.memory.get(HEAD, {})) if way.alone else joint_head(state, self._config)
        tasks[leg.name] = replace(task, extras=fitted_head(head, sums, own, self._config.seed) if own else head)
        return with_owned(replace(state, tasks=tasks), leg.name, memory)

    def _begun(self, state: GlobalState, leg: Leg, inputs: Moments) -> tuple[Task, dict[str, Mapping[str, Array]]]:
        """A task with a fresh pair, in a subspace where the way allots one, and what its method remembers."""
        subspace: Subspace | None = None
        basis: dict[str, Array] = {}
        layout = state.layout
        if self._way.allotted is not None:
            subspace, basis = self._way.allotted(self._opening(state, leg, inputs))
            layout = layout.within(subspace.dim)
        everybody = self._everybody(state, leg, subspace)
        settings, seed = leg.config.method, self._seed(leg, "open")
        opened = self._inner[leg.name].open(state.base, layout, everybody, settings, seed)
        task = opened.open_task
        if basis and subspace is not None and subspace.seed is None and task.public_seed is not None:
            basis = _turned(basis, task.public_seed)
        return replace(task, name=leg.name, subspace=subspace, basis=basis), dict(opened.memory)

    def _opening(self, state: GlobalState, leg: Leg, inputs: Moments | None = None) -> Opening:
        return Opening(config=self._config, state=state, leg=leg, tasks=len(self._legs), inputs=inputs or {})

    def _everybody(self, state: GlobalState, leg: Leg, subspace: Subspace | None) -> list[Member]:
        """For whom a pair is opened, each at the largest rank that it will train it with: where one pair goes on from
        task to task, all who have any of them."""
        found: dict[str, Member] = {}
        for each in self._legs if self._way.one_pair else (leg,):
            for m in members_of(state, each):
                one = bounded(m, each.rank, subspace)
                found[m.id] = max(one, found.get(m.id, one), key=lambda x: x.rank)
        return [found[name] for name in sorted(found)]

    def _fitted(self, leg: Leg, before: Sequence[Task]) -> list[int]:
        """The classes whose rows of the head begin as discriminants: a task's own, but where one pair and head go on
        from task to task, those that were trained before."""
        labels = self._config.model.labels

        def classes(task: str) -> set[int]:
            own = task_config(self._config, task).data.labels if task != JOINT else ()
            return {labels.index(name) for name in own or labels}

        known = set().union(*(classes(t.name) for t in before)) if self._way.one_pair else set()
        return sorted(classes(leg.name) - known)

    # -- a task is trained

    def _train(self, state: GlobalState, leg: Leg, cohort: Cohort) -> Steps[Closed]:
        """One round of the task's method on a state that holds this task alone, and the state with what came out."""
        task, done = state.tasks[leg.name], cohort.round - leg.first
        subspace = task.subspace
        layout = state.layout if subspace is None else state.layout.within(subspace.dim)
        view = GlobalState(
            version=state.version,
            base=state.base,
            layout=layout,
            tasks={"": replace(task, name="", subspace=None, basis={})},
            memory=owned(state, leg.name),
        )
        inner = replace(
            cohort,
            round=done + 1,
            rounds=leg.rounds,
            members=tuple(bounded(m, None, subspace) for m in cohort.members),
            settings=leg.config.method,
            training=local_training(leg.config),
            seed=self._seed(leg, "rounds"),
            progress=(done / leg.rounds, (done + 1) / leg.rounds),
        )
        under = () if self._way.alone else blocks_of(state, sealed_in_order(state))
        expand, extra = _Expand(task), _extra(task)

        def led(ask: Ask) -> Ask:
            return self._led(ask, state, task, under, expand, extra)

        protocol = self._inner[leg.name].protocol(view, inner)
        asks = next(protocol)
        while True:
            try:
                asks = protocol.send((yield {client: led(ask) for client, ask in asks.items()}))
            except StopIteration as end:
                closed: Closed = end.value
                break
        new = replace(closed.state.open_task, name=leg.name, subspace=subspace, basis=task.basis)
        state = replace(state, tasks={**state.tasks, leg.name: new}, version=closed.state.version)
        return replace(closed, state=with_owned(state, leg.name, closed.state.memory))

    def _led(
        self,
        ask: Ask,
        state: GlobalState,
        task: Task,
        under: tuple[Block, ...],
        expand: _Expand,
        extra: Mapping[str, Array],
    ) -> Ask:
        """A method's ask as the client gets it: with the sealed tasks, in its subspace, under the way's penalty."""
        plan = ask.plan
        if plan is None and ask.secure is not None:  # a later stage of a secure sum
            return replace(ask, task=task.name)
        if plan is not None and self._way.led is not None:
            plan, more = self._way.led(plan, len(under), state, self._config)
            extra = {**extra, **more}
        return replace(
            ask,
            task=task.name,
            plan=plan,
            subspace=task.subspace,
            blocks=under + tuple(map(expand.block, ask.blocks)),
            frozen=None if ask.frozen is None else expand.adapter(ask.frozen),
            arrays={**ask.arrays, **extra},
        )

    # -- a task ends

    def _seal(self, state: GlobalState, leg: Leg, cohort: Cohort) -> Steps[tuple[GlobalState, dict[str, float]]]:
        """The task's pair becomes a block under its name; what later tasks need to know of its inputs is summed."""
        config, way = self._config, self._way
        task, report = state.tasks[leg.name], {}
        if way.trains and not way.one_pair and (task.blocks or task.pair is not None):  # else nobody ever trained it
            task, lost = cut(task, config.continual.rank, state.version)
            report["sealed_error_relative"] = lost
            report |= overlaps(task, sealed_in_order(state))
        order = 1.0 + len(sealed_in_order(state))
        task = replace(task, sealed=True, statistics={"sealed": order, "round": float(cohort.round), **report})
        state = replace(state, tasks={**state.tasks, leg.name: task})
        if not way.one_pair:
            state = with_owned(state, leg.name, {})
        inputs = config.continual.effects or (way.sketches and leg.last < max(other.last for other in self._legs))
        features = (config.continual.routing and leg.name != JOINT) or not way.trains
        if inputs or features:
            under = blocks_known(state, leg.name, way.name)
            found, sums = yield from measured(state, leg, cohort, config, under, inputs=inputs, features=features)
            if inputs:
                before = old_inputs(state, config)
                if before and task.blocks:
                    report["effect_on_old"] = effect_on_old(task, found, before, state.layout)
                state = with_old_inputs(state, sums)
                told = [float(values.sum()) / energy for _, values, energy in found.values()]
                report["inputs_seen"] = float(np.mean(told))  # share of the energy that the sketch holds at all
            if features:
                labelled = bool(leg.config.model.labels)
                totals = (sums[f"feature:{key}"] for key in ("sum", "count", "sketch"))
                kept = added(state.memory.get(FEATURES, {}), leg.name, *totals, labelled=labelled)
                state = remembering(state, FEATURES, kept)
        if way.sealed is not None:
            state = yield from way.sealed(state, leg, cohort, config)
        return state, report

    def _seed(self, leg: Leg, purpose: str) -> int:
        """A seed of this task alone; the public generator takes it too."""
        return int(stream(self._config.seed, f"task {purpose}", leg.name).integers(2**53))


class _Expand:
    """Products in a task's coordinates as they act on the base, each computed once."""

    def __init__(self, task: Task) -> None:
        self._task = task
        self._done: dict[int, tuple[Adapter, Adapter]] = {}

    def adapter(self, adapter: Adapter) -> Adapter:
        if self._task.subspace is None:
            return adapter
        if id(adapter) not in self._done:
            full = replace(self._task, pair=adapter, blocks=()).full.pair
            assert full is not None
            self._done[id(adapter)] = adapter, full
        return self._done[id(adapter)][1]

    def block(self, block: Block) -> Block:
        return replace(block, adapter=self.adapter(block.adapter))


def _extra(task: Task) -> dict[str, Array]:
    """What the asks of a task carry beyond its method's: its basis, or a checksum of it."""
    if task.subspace is None:
        return {}
    if task.subspace.seed is None:
        return keyed("N", task.basis)
    sums = {n: rows_checksum(task.subspace, n, basis) for n, basis in task.basis.items()}
    return keyed("probe", {f"N/{n}": x for n, x in sums.items()})


def _turned(basis: Mapping[str, Array], public_seed: int) -> dict[str, Array]:
    """The basis in which a method's public rows are the leading rows of `basis`: N' = Q^T N, Q the public rotation.

    A method that freezes a public A takes its first r rows; a designed basis is ordered by importance.
    """
    turned = {}
    for name, n in basis.items():
        q = public_orthonormal(public_seed, "basis", name, rows=len(n), cols=len(n))
        turned[name] = times(q.T, n)
    return turned
