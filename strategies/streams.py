"""Tasks one after another, over any method that can be sealed: a Method whose rounds open, train and seal tasks.

    W_eff = W0 + sum over sealed tasks of their blocks + (the open task's own blocks and pair)

A task is trained on the base, the tasks that were sealed before, and its own pair; when its last round closes its pair
becomes a block under its name, with its head, and the next task begins with a fresh pair, fresh moments and fresh
method memory. Two tasks that are open at once do not see one another until one of them is sealed.

The method of a task never learns that there are others: it is shown a state with that one task, and where the task has
a subspace (`fedlora.state.Subspace`), a layout whose inputs are the subspace's coordinates. So every A of the task is
`M N`, whatever the method does with M: means, stacks, truncations, codecs, element-wise server optimisers and noise all
stay inside, and tasks with orthogonal subspaces have orthogonal A by construction.

What the ways differ in (`continual.method`):

- subspace: N_t is the next rows of a public orthonormal basis; nothing of it travels.
- input-aware: N_t spans what the new task's inputs use and what no earlier task's inputs use (fedlora/continual/
  design.py), from sums of sketches, once when a task opens and once when it is sealed.
- o-lora: no subspace; a penalty on the overlap with sealed A (Wang et al., EMNLP 2023 Findings).
- incremental: a new pair a task, unconstrained. sequential: one pair goes on from task to task. replay: the same, and
  clients train on rows of old tasks again. ewc: the same, held near old values by Fisher information (Kirkpatrick et
  al., PNAS 2017; the sum of all tasks' penalties is one quadratic, so its cost does not grow).
- separate: each task on the base alone, for inference with the task known: the upper bound. joint: all tasks at once.
- nearest-mean: nothing is trained; class means of the frozen base's features (Mensink et al., PAMI 2013).

Source of the pieces: InfLoRA (Liang and Li, CVPR 2024), GPM (Saha et al., ICLR 2021), FOT (Bakman et al., ICLR 2024);
their federation by summed sketches and subspaces of coordinates is ours.
"""

from __future__ import annotations

import json
from collections.abc import Generator, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from fedlora.adapter import Adapter, Array, norm, stack
from fedlora.config import MethodConfig, RunConfig, local_training, task_config
from fedlora.continual.capacity import allot
from fedlora.continual.design import design, second_moment, span
from fedlora.continual.overlap import product_overlap, random_overlap, row_overlap, row_spaces, similarities
from fedlora.continual.router import added
from fedlora.continual.tasks import JOINT, ONE_PAIR, Leg, legs
from fedlora.errors import MethodError
from fedlora.privacy.clients import client_privacy
from fedlora.rng import public_normal, public_orthonormal, stream
from fedlora.state import (
    Answer,
    Ask,
    Block,
    GlobalState,
    Layout,
    Measure,
    Subspace,
    Task,
    expected_arrays,
    keyed,
    times,
)
from fedlora.subspace import public_rows, rows_checksum
from strategies.base import Closed, Cohort, Member, Method, Round, Sums, in_order, new_head
from strategies.blocks import as_float32, bounded_svd, canonical
from strategies.configured import configured
from strategies.headed import COLUMNS, fitted_head, headed

__all__ = [
    "FEATURES",
    "HEAD",
    "INPUTS",
    "ONE_PAIR",
    "blocks_known",
    "blocks_of",
    "head_of",
    "joint_head",
    "sealed_in_order",
    "streamed",
]

HEAD = "stream:head"  # owners in GlobalState.memory: the head that every task starts from
INPUTS = "stream:inputs"  # by input, the orthonormal rows [k, in] of what old tasks' inputs use
FEATURES = "stream:features"  # sums of features by class and their sketch, see fedlora/continual/router.py
_MEMBERS = "stream:members"
_EWC = "stream:ewc"
_SUBSPACES = ("subspace", "input-aware")
_FROZEN = ("fed-sb", "fedsvd", "ffa-lora")
_SKETCH, _O_LORA, _EWC_WEIGHT, _FISHER_ROWS = 64, 0.5, 100.0, 64
_TINY = 1e-30  # divides nothing by zero

T = TypeVar("T")
Steps = Generator[Mapping[str, Ask], Mapping[str, Answer], T]  # a part of a round
Moments = dict[str, tuple[NDArray[np.float64], NDArray[np.float64], float]]  # by input: vectors, values, energy


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


def sealed_in_order(state: GlobalState) -> list[Task]:
    """The sealed tasks, in the order in which they were sealed."""
    return sorted((t for t in state.tasks.values() if t.sealed), key=lambda t: t.statistics["sealed"])


def blocks_known(state: GlobalState, task: str, way: str) -> tuple[Block, ...]:
    """The blocks of W_eff for an input that is known to be of `task`: what the task was trained on top of, and its own.

    Under the ways whose one pair moves on there is one W_eff for all tasks. A task that is not sealed has what is
    there now.
    """
    tasks = sealed_in_order(state)
    names = [t.name for t in tasks]
    if way in ONE_PAIR or task not in names:
        return blocks_of(state, state.tasks.values())
    if way == "separate":
        return blocks_of(state, [state.tasks[task]])
    return blocks_of(state, tasks[: names.index(task) + 1])


def blocks_of(state: GlobalState, tasks: Iterable[Task]) -> tuple[Block, ...]:
    """The blocks, and pairs as blocks, of some tasks, as they act on the base."""
    found: tuple[Block, ...] = ()
    for task in (t.full for t in tasks):
        found += task.blocks
        if task.pair is not None:
            found += (Block(adapter=task.pair.folded(), born=state.version),)
    return found


def head_of(state: GlobalState, task: str, config: RunConfig) -> dict[str, Array]:
    """The head that scores `task`: its own, or where it has not begun, the one that it would begin with."""
    found = state.tasks.get(task) or state.tasks.get(JOINT)
    return dict(found.extras) if found is not None and found.extras else joint_head(state, config)


def joint_head(state: GlobalState, config: RunConfig) -> dict[str, Array]:
    """One head for all classes: those of a task as its own head has them, all else as the task sealed last left it.

    Arrays with one entry, or row, for each of `model.labels` are taken apart; tasks without labels of their own have
    all of them. Before any task is sealed this is the head that the run began with.
    """
    head = {n: np.array(x) for n, x in state.memory.get(HEAD, {}).items()}
    labels = config.model.labels
    for task in sealed_in_order(state):
        own = task_config(config, task.name).data.labels if task.name != JOINT else ()
        rows = [labels.index(name) for name in own or labels]
        for name, x in task.extras.items():
            if len(x) == len(labels):
                head[name][rows] = x[rows]
            else:
                head[name] = np.array(x)
    return head


class _Stream:
    """The two functions of a streamed Method; all that a run remembers is in its state."""

    def __init__(self, config: RunConfig, plan: tuple[Leg, ...]) -> None:
        self._config, self._legs, self._way = config, plan, config.continual.method
        terms = client_privacy(config)
        self._inner = {leg.name: configured(leg.config, terms) for leg in plan}

    def open(
        self, base: str, layout: Layout, members: Sequence[Member], settings: MethodConfig, seed: int
    ) -> GlobalState:
        """Version 0: no task is open yet. Raises: MethodError for a task that no client holds."""
        for leg in self._legs:
            if not any(leg.holds(m.id) for m in members):
                raise MethodError(
                    f"task {leg.name}: none of the {len(members)} enrolled clients has it; mend `clients`"
                )
        table = json.dumps([[m.id, m.rank, m.scale] for m in sorted(members, key=lambda m: m.id)])
        memory: dict[str, Mapping[str, Array]] = {_MEMBERS: {"json": np.frombuffer(table.encode(), np.uint8)}}
        if layout.head:
            memory[HEAD] = new_head(layout, seed)
        return GlobalState(version=0, base=base, layout=layout, tasks={}, memory=memory)

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
            if self._way != "nearest-mean" and (own.members or own.enrolled):  # else nobody who has it was drawn
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
            members = [m for m in _members(state) if leg.holds(m.id)]
        enrolled = tuple(_bounded(m, leg.rank) for m in cohort.enrolled if leg.holds(m.id))
        return replace(cohort, members=tuple(_bounded(m, leg.rank) for m in members), enrolled=enrolled)

    # -- a task begins

    def _open_task(self, state: GlobalState, leg: Leg, cohort: Cohort) -> Steps[GlobalState]:
        tasks, memory = dict(state.tasks), {}
        before = sealed_in_order(state)
        own = self._fitted(leg, before) if self._config.model.head == "discriminants" else []
        moments: Moments = {}
        if own or self._way == "input-aware":
            moments, sums = yield from self._measured(
                state, leg, cohort, inputs=self._way == "input-aware", features=False, reads=bool(own)
            )
        if self._way in ONE_PAIR and before:
            last = before[-1]
            task = replace(last, name=leg.name, sealed=False, statistics={})
            tasks[last.name] = replace(last, pair=None, blocks=())
            memory = _owned(state, last.name)
            state = _with_owned(state, last.name, {})
        elif self._way == "nearest-mean":
            task = Task(name=leg.name)
        else:
            subspace: Subspace | None = None
            basis: dict[str, Array] = {}
            if self._way in _SUBSPACES:
                subspace, basis = self._allotted(state, leg, moments)
            layout = state.layout if subspace is None else state.layout.within(subspace.dim)
            everybody = [_bounded(m, leg.rank, subspace) for m in _members(state) if leg.holds(m.id)]
            opened = self._inner[leg.name].open(
                state.base, layout, everybody, leg.config.method, self._seed(leg, "open")
            )
            task, memory = opened.open_task, dict(opened.memory)
            if basis and subspace is not None and subspace.seed is None and task.public_seed is not None:
                basis = _turned(basis, task.public_seed)
            task = replace(task, name=leg.name, subspace=subspace, basis=basis)
        head = dict(state.memory.get(HEAD, {})) if self._way == "separate" else joint_head(state, self._config)
        tasks[leg.name] = replace(task, extras=fitted_head(head, sums, own, self._config.seed) if own else head)
        return _with_owned(replace(state, tasks=tasks), leg.name, memory)

    def _fitted(self, leg: Leg, before: Sequence[Task]) -> list[int]:
        """The classes whose rows of the head begin as discriminants: a task's own, but where one pair and head go on
        from task to task, those that were trained before."""
        labels = self._config.model.labels

        def classes(task: str) -> set[int]:
            own = task_config(self._config, task).data.labels if task != JOINT else ()
            return {labels.index(name) for name in own or labels}

        known = set().union(*(classes(t.name) for t in before)) if self._way in ONE_PAIR else set()
        return sorted(classes(leg.name) - known)

    def _allotted(self, state: GlobalState, leg: Leg, found: Moments) -> tuple[Subspace, dict[str, Array]]:
        """A subspace for a new task, and its basis by module; `found` are its inputs, where they count."""
        layout = state.layout
        if bad := [n for n, m in layout.modules.items() if m.kind == "embedding"]:
            raise MethodError(
                f"task {leg.name}: {bad[0]} is an embedding, whose inputs are token ids: they have no subspace. Leave "
                "embeddings out of model.target_modules, or use continual.method=incremental"
            )
        dim = self._dim(state, leg)
        if self._way == "subspace":
            used = [t.subspace for t in state.tasks.values() if t.subspace is not None]
            subspace = allot(layout, used, dim, self._config.seed, leg.name)
            return subspace, {n: public_rows(subspace, n, m.inp) for n, m in layout.modules.items()}
        made: dict[str, Array] = {}
        before = self._old_inputs(state)
        for name, moment in found.items():
            own = [t.basis[name] for t in state.tasks.values() if name in t.basis]
            avoid = span(np.concatenate([np.zeros((0, len(moment[0]))), *own]), 1e-7)
            made[name] = design(
                dim,
                moment,
                before.get(name),
                avoid,
                floor=self._config.continual.floor,
                seed=self._config.seed,
                name=f"task {leg.name}, {name}",
            )
        return Subspace(dim=dim), {n: made[m.shares or n] for n, m in layout.modules.items()}

    def _dim(self, state: GlobalState, leg: Leg) -> int:
        """Dimensions of a new task's subspace."""
        if given := leg.task_dim or self._config.continual.task_dim:
            return given
        most = max(_bounded(m, leg.rank).rank for m in _members(state) if leg.holds(m.id))
        if leg.config.method.name in _FROZEN:
            return leg.config.method.task_rank or most
        width = min(state.layout.inputs().values())
        return max(most, min(4 * most, width // (len(self._legs) + 1)))

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
            memory=_owned(state, leg.name),
        )
        inner = replace(
            cohort,
            round=done + 1,
            rounds=leg.rounds,
            members=tuple(_bounded(m, None, subspace) for m in cohort.members),
            settings=leg.config.method,
            training=local_training(leg.config),
            seed=self._seed(leg, "rounds"),
            progress=(done / leg.rounds, (done + 1) / leg.rounds),
        )
        under = () if self._way == "separate" else blocks_of(state, sealed_in_order(state))
        expand = _Expand(task)
        extra, anchors = self._extra(task), state.memory.get(_EWC, {})
        protocol = self._inner[leg.name].protocol(view, inner)
        asks = next(protocol)
        while True:
            try:
                asks = protocol.send(
                    (yield {c: self._led(ask, leg, task, under, expand, extra, anchors) for c, ask in asks.items()})
                )
            except StopIteration as end:
                closed: Closed = end.value
                break
        new = replace(closed.state.open_task, name=leg.name, subspace=subspace, basis=task.basis)
        state = replace(state, tasks={**state.tasks, leg.name: new}, version=closed.state.version)
        return replace(closed, state=_with_owned(state, leg.name, closed.state.memory))

    def _led(
        self,
        ask: Ask,
        leg: Leg,
        task: Task,
        under: tuple[Block, ...],
        expand: _Expand,
        extra: Mapping[str, Array],
        anchors: Mapping[str, Array],
    ) -> Ask:
        """A method's ask as the client gets it: with the sealed tasks, in its subspace, under the way's penalty."""
        plan = ask.plan
        if plan is None and ask.secure is not None:  # a later stage of a secure sum
            return replace(ask, task=leg.name)
        if plan is not None and self._way == "o-lora" and under and "A" in plan.train:
            plan = replace(
                plan,
                against=len(under),
                overlap=self._config.continual.penalty or _O_LORA,
                overlap_form=self._config.continual.penalty_form or "absolute",
            )
        if plan is not None and anchors:
            plan = replace(plan, anchor=self._config.continual.penalty or _EWC_WEIGHT)
            extra = {**extra, **_anchors_at(anchors, plan.scale)}
        return replace(
            ask,
            task=leg.name,
            plan=plan,
            subspace=task.subspace,
            blocks=under + tuple(map(expand.block, ask.blocks)),
            frozen=None if ask.frozen is None else expand.adapter(ask.frozen),
            arrays={**ask.arrays, **extra},
        )

    def _extra(self, task: Task) -> dict[str, Array]:
        """What the asks of a task carry beyond its method's: its basis, or a checksum of it."""
        arrays: dict[str, Array] = {}
        if task.subspace is not None and task.subspace.seed is None:
            arrays |= keyed("N", task.basis)
        elif task.subspace is not None:
            sums = {n: rows_checksum(task.subspace, n, basis) for n, basis in task.basis.items()}
            arrays |= keyed("probe", {f"N/{n}": x for n, x in sums.items()})
        return arrays

    # -- a task ends

    def _seal(self, state: GlobalState, leg: Leg, cohort: Cohort) -> Steps[tuple[GlobalState, dict[str, float]]]:
        """The task's pair becomes a block under its name; what later tasks need to know of its inputs is summed."""
        task, report = state.tasks[leg.name], {}
        if self._way not in ONE_PAIR and self._way != "nearest-mean":
            task, lost = _cut(task, self._config.continual.rank, state.version)
            report["sealed_error_relative"] = lost
            report |= _overlaps(task, sealed_in_order(state))
        order = 1.0 + len(sealed_in_order(state))
        memory = {k: v for k, v in state.memory.items() if not k.startswith(_owner(leg.name)) or self._way in ONE_PAIR}
        task = replace(task, sealed=True, statistics={"sealed": order, "round": float(cohort.round), **report})
        state = replace(state, tasks={**state.tasks, leg.name: task}, memory=memory)
        way = self._config.continual
        inputs = way.effects or (self._way == "input-aware" and leg.last < max(other.last for other in self._legs))
        features = (self._config.continual.routing and leg.name != JOINT) or self._way == "nearest-mean"
        if inputs or features:
            found, sums = yield from self._measured(state, leg, cohort, inputs=inputs, features=features)
            if inputs:
                before = self._old_inputs(state)
                if before and task.blocks:
                    report["effect_on_old"] = _effect_on_old(task, found, before, state.layout)
                kept = dict(state.memory.get(INPUTS, {}))
                for name in state.layout.inputs():
                    energy = float(sums[f"energy:{name}"][0]) or 1.0  # without any, the sketch is nothing too
                    for key in (f"sketch:{name}", f"energy:{name}"):
                        kept[key] = kept.get(key, 0.0) + sums[key] / energy
                state = _remembering(state, INPUTS, kept)
                told = [float(values.sum()) / energy for _, values, energy in found.values()]
                report["inputs_seen"] = float(np.mean(told))  # share of the energy that the sketch holds at all
            if features:
                labelled = bool(leg.config.model.labels)
                found_sums, counts, sketch = (sums[f"feature:{key}"] for key in ("sum", "count", "sketch"))
                kept = added(state.memory.get(FEATURES, {}), leg.name, found_sums, counts, sketch, labelled=labelled)
                state = _remembering(state, FEATURES, kept)
        if self._way == "ewc":
            state = yield from self._anchored(state, leg, cohort)
        return state, report

    def _measured(
        self, state: GlobalState, leg: Leg, cohort: Cohort, *, inputs: bool, features: bool, reads: bool = False
    ) -> Steps[tuple[Moments, dict[str, NDArray[np.float64]]]]:
        """Second moments of every input, and the sums that they come from, with those of features by class."""
        layout = state.layout
        widths = layout.inputs()
        size = self._config.continual.sketch or _SKETCH
        size = min(size, *widths.values()) if inputs else 0
        classes = max(1, len(leg.config.model.labels)) if features else 0
        columns = min(COLUMNS, layout.features) if features or reads else 0
        under = () if reads and self._way == "separate" else blocks_of(state, sealed_in_order(state))
        labels = len(leg.config.model.labels) if reads else 0
        ask = Ask(
            task=leg.name,
            measure=Measure(sketch=size, seed=self._config.seed, classes=classes, columns=columns, reads=labels),
            blocks=under,
            arrays=keyed("head", head_of(state, leg.name, self._config)),
        )
        answers: Mapping[str, Answer] = yield {m.id: ask for m in cohort.members}
        sums = Sums(expected_arrays(ask, layout))
        for _, answer in in_order(answers, cohort):
            means = {k: x * answer.examples for k, x in answer.arrays.items() if not k.startswith("feature")}
            sums.add({**answer.arrays, **means}, 1.0)
        total = sums.total()
        found = self._moments(total, widths) if inputs else {}
        return found, total

    def _moments(self, sums: Mapping[str, Array], widths: Mapping[str, int]) -> Moments:
        """The second moment of every input out of summed sketches; one Omega for all tasks, so that theirs add too."""
        found: Moments = {}
        for name, width in widths.items():
            sketch, energy = sums[f"sketch:{name}"], float(sums[f"energy:{name}"][0])
            omega = public_normal(self._config.seed, "sketch", name, shape=(width, sketch.shape[1]))
            found[name] = (*second_moment(sketch, omega, energy), energy)
        return found

    def _old_inputs(self, state: GlobalState) -> Moments:
        """The second moments of the sealed tasks' inputs, each scaled to energy 1 and added up; empty before any."""
        kept = state.memory.get(INPUTS)
        return {} if kept is None else self._moments(kept, state.layout.inputs())

    def _anchored(self, state: GlobalState, leg: Leg, cohort: Cohort) -> Steps[GlobalState]:
        """EWC: add this task's Fisher information, and its product with where the entries stand, to what is held."""
        pair = state.tasks[leg.name].pair
        if pair is None:
            raise MethodError(f"task {leg.name}: {leg.config.method.name} keeps no pair that ewc could hold")
        at = {**keyed("A", {n: f.a for n, f in pair.items()}), **keyed("B", {n: f.folded().b for n, f in pair.items()})}
        head = keyed("head", head_of(state, leg.name, self._config))
        ask = Ask(task=leg.name, measure=Measure(fisher=_FISHER_ROWS), arrays={**at, **head})
        answers: Mapping[str, Answer] = yield {m.id: ask for m in cohort.members}
        sums, rows = Sums({f"fisher-{key}": x.shape for key, x in at.items()}), 0
        for _, answer in in_order(answers, cohort):
            sums.add(answer.arrays, 1.0)
            rows += min(answer.examples, _FISHER_ROWS)
        kept = dict(state.memory.get(_EWC, {}))
        for key, total in sums.total().items():
            fisher, where = total / rows, key.removeprefix("fisher-")
            kept[key] = kept.get(key, 0.0) + fisher
            kept[f"moment-{where}"] = kept.get(f"moment-{where}", 0.0) + fisher * at[where].astype(np.float64)
        return _remembering(state, _EWC, kept)

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


def _anchors_at(kept: Mapping[str, Array], scale: float) -> dict[str, Array]:
    """All tasks' penalties as one, for a client that trains B at `scale`: what is kept is of A and of scale * B."""
    arrays: dict[str, Array] = {}
    for key, fisher in kept.items():
        of, _, where = key.partition("-")
        if of == "fisher":
            own = scale if where.startswith("B:") else 1.0
            anchor = kept[f"moment-{where}"] / np.maximum(fisher, _TINY)
            arrays[key] = (fisher * own**2).astype(np.float32)
            arrays[f"anchor-{where}"] = (anchor / own).astype(np.float32)
    return arrays


def _bounded(member: Member, rank: int | None, subspace: Subspace | None = None) -> Member:
    """The member at the rank that a task, or its subspace, leaves it."""
    most = min(rank or member.rank, member.rank if subspace is None else subspace.dim)
    return replace(member, rank=min(member.rank, most))


def _members(state: GlobalState) -> list[Member]:
    """Everybody who was enrolled when the run began."""
    table = json.loads(bytes(state.memory[_MEMBERS]["json"]))
    return [Member(id=name, rank=rank, scale=scale) for name, rank, scale in table]


def _turned(basis: Mapping[str, Array], public_seed: int) -> dict[str, Array]:
    """The basis in which a method's public rows are the leading rows of `basis`: N' = Q^T N, Q the public rotation.

    A method that freezes a public A takes its first r rows; a designed basis is ordered by importance.
    """
    turned = {}
    for name, n in basis.items():
        q = public_orthonormal(public_seed, "basis", name, rows=len(n), cols=len(n))
        turned[name] = times(q.T, n)
    return turned


def _cut(task: Task, rank: int | None, version: int) -> tuple[Task, float]:
    """The task's products as blocks at the least rank that loses nothing, or at `rank`; and the share that was lost."""
    if task.pair is not None and not task.blocks and rank is None:
        return replace(task, pair=None, blocks=(Block(adapter=as_float32(task.pair.folded()), born=version),)), 0.0
    terms = [b.adapter for b in task.blocks] + ([] if task.pair is None else [task.pair])
    whole = stack(terms)
    if rank is None:
        return replace(task, pair=None, blocks=(Block(adapter=canonical(whole), born=version),)), 0.0
    small, lost = bounded_svd(whole, max_rank=rank, max_error=None)
    size = norm(whole)
    return replace(task, pair=None, blocks=(Block(adapter=small, born=version),)), lost / size if size else 0.0


def _overlaps(task: Task, before: Sequence[Task]) -> dict[str, float]:
    """Normalised overlap of the sealed task with all before it, of A and of the product, beside random rows."""
    old = [b.adapter for t in before for b in t.full.blocks]
    if not old:
        return {}
    new = stack([b.adapter for b in task.full.blocks])
    rows = row_overlap(new, old)
    spaces = row_spaces(old)
    return {
        "overlap": float(np.mean(list(rows.values()))),
        "overlap_largest": float(max(rows.values())),
        "overlap_product": float(np.mean(list(product_overlap(new, old).values()))),
        "overlap_random": float(np.mean([random_overlap(*spaces[n].shape) for n in new])),
        **{f"similarity/{t.name}": phi for t, phi in zip(before, _similar(new, before), strict=True)},
    }


def _similar(new: Adapter, before: Sequence[Task]) -> list[float]:
    """The subspace similarity phi of a new task's product and that of each task before it; 0 to 1."""
    named = {t.name: stack([b.adapter for b in t.full.blocks]) for t in before if t.full.blocks}
    matrix = similarities({"": new, **named})[0]
    return [float(matrix[1 + list(named).index(t.name)]) if t.name in named else 0.0 for t in before]


def _effect_on_old(task: Task, new: Moments, old: Moments, layout: Layout) -> float:
    """`sqrt(E |dW x_old|^2 / E |dW x_new|^2)` over all modules, both inputs scaled to one mean energy: 1 if the task's
    update acts on old tasks' inputs as much as on its own, 0 if it is silent there. As far as the sketches can tell."""
    sums = {"new": 0.0, "old": 0.0}
    update = stack([b.adapter for b in task.full.blocks])
    for name, f in update.items():
        which = layout.modules[name].shares or name
        triangle = np.linalg.qr(f.b.astype(np.float64), mode="r") @ f.a.astype(np.float64) * f.scale
        for key, (vectors, values, energy) in (("new", new[which]), ("old", old[which])):
            seen = np.sum((triangle @ vectors) ** 2, axis=0)
            rest = max(energy - float(np.sum(values)), 0.0) / max(len(vectors) - len(values), 1)
            sums[key] += (float(seen @ values) + rest * (float(np.sum(triangle**2)) - float(np.sum(seen)))) / energy
    return float(np.sqrt(sums["old"] / sums["new"])) if sums["new"] > 0.0 else 0.0


def _owner(task: str) -> str:
    return f"task:{task}:"


def _owned(state: GlobalState, task: str) -> dict[str, Mapping[str, Array]]:
    """What the method of one task remembers."""
    prefix = _owner(task)
    return {owner.removeprefix(prefix): x for owner, x in state.memory.items() if owner.startswith(prefix)}


def _with_owned(state: GlobalState, task: str, memory: Mapping[str, Mapping[str, Array]]) -> GlobalState:
    prefix = _owner(task)
    rest = {owner: x for owner, x in state.memory.items() if not owner.startswith(prefix)}
    return replace(state, memory={**rest, **{prefix + owner: x for owner, x in memory.items()}})


def _remembering(state: GlobalState, owner: str, arrays: Mapping[str, Array]) -> GlobalState:
    return replace(state, memory={**state.memory, owner: dict(arrays)})
