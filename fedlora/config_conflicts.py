"""Settings that cannot go together, or that nothing reads, and what could be used instead."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

from fedlora.config_privacy import privacy_conflicts
from fedlora.config_secure import secure_conflicts
from fedlora.config_text import shown

if TYPE_CHECKING:
    from fedlora.config import RunConfig

__all__ = ["BELONGS_TO", "EXCLUSIVE", "TASK_KEYS", "conflicts"]

Conflict = tuple[tuple[str, ...], str]  # the keys involved, the first one to blame; what is wrong
Values = Mapping[str, tuple[Any, Any]]  # key -> (value, default), of every setting

TASK_KEYS: Final = ("name", "start", "clients", "rank")  # of a task's table; all others are settings
_OF_A_TASK: Final = (
    "data.",
    "training.",
    "method.",
    "rounds.count",
    "continual.task_dim",
)  # settings that a task may have for itself
EXCLUSIVE: Final = ("training.local_steps", "training.local_epochs")
BELONGS_TO: Final[Mapping[str, tuple[str, ...]]] = {
    "method.max_rank": ("fedex-lora", "flexlora", "flora", "frlora"),
    "method.max_error": ("fedex-lora", "flexlora", "flora", "frlora"),
    "method.warm_start": ("flora",),
    "method.task_rank": (
        "fed-sb",
        "fedex-lora",
        "fedit",
        "fedsa-lora",
        "fedsvd",
        "ffa-lora",
        "frlora",
        "hetlora",
        "lora-fair",
        "rolora",
    ),
    "method.prune": ("hetlora",),
    "method.prune_penalty": ("hetlora",),
    "method.ridge": ("lora-fair",),
    "method.basis": ("fed-sb",),
}


_MOMENTS_KEPT: Final = ("fedex-lora", "fedit", "fedsa-lora", "ffa-lora", "lora-fair")  # factors go on as they are
_ONE_BASIS: Final = ("fed-sb", "fedsa-lora", "ffa-lora")  # what moves has one shape and one basis for the whole run
_CODED: Final = (
    "fedex-lora",
    "fedit",
    "fedsa-lora",
    "ffa-lora",
    "flexlora",
    "flora",
    "hetlora",
    "lora-fair",
    "rolora",
)  # what a codec leaves out of a message can be added to the next one
_PAIRS: Final[Mapping[tuple[str, str], tuple[tuple[str, ...], str]]] = {
    ("server.optimizer", "adam"): (_ONE_BASIS, "element-wise moments need one basis for the whole run"),
    ("server.optimizer", "yogi"): (_ONE_BASIS, "element-wise moments need one basis for the whole run"),
    ("server.optimizer", "momentum"): ((*_ONE_BASIS, "flora", "frlora"), "it adds up what moves, factors or blocks"),
    ("robust.rule", "median"): (("ffa-lora",), "entries mean the same for all clients only under a common frozen A"),
    ("robust.rule", "trimmed-mean"): (("ffa-lora",), "entries mean the same only under a common frozen A"),
}
_OPTIMIZERS: Final = ("momentum", "adam", "yogi")
_ATTACKS: Final = ("sign-flip", "scaling", "gaussian", "label-flip", "little-is-enough", "collusion", "backdoor")
_READ_BY: Final[Mapping[str, tuple[str, tuple[str, ...]]]] = {
    "model.pooling": ("model.task_type", ("sequence-classification",)),
    "model.head": ("model.pooling", ("mean",)),
    "server.rate": ("server.optimizer", _OPTIMIZERS),
    "server.beta1": ("server.optimizer", _OPTIMIZERS),
    "server.beta2": ("server.optimizer", ("adam", "yogi")),
    "server.tau": ("server.optimizer", ("adam", "yogi")),
    "robust.attackers": ("robust.rule", ("krum", "multi-krum", "median", "trimmed-mean")),
    **{
        f"privacy.{key}": ("privacy.level", ("example", "client"))
        for key in ("clip", "noise_multiplier", "epsilon", "delta", "scheme")
    },
    **{f"privacy.{key}": ("privacy.level", ("example",)) for key in ("sampling", "rows")},
    **{f"privacy.{key}": ("privacy.level", ("client",)) for key in ("noise", "quantile")},
    "attack.share": ("attack.kind", _ATTACKS),
    "attack.strength": ("attack.kind", _ATTACKS),
}  # settings of a kind of thing: the setting that names the kind, and the kinds that read them


_FROZEN_A: Final = ("fed-sb", "fedsvd", "ffa-lora")
_RESERVED: Final = {"all", "all-tasks", "auto", "mix"}
_TASK_NAME: Final = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,63}")


def conflicts(config: RunConfig, values: Values) -> Iterator[Conflict]:
    """Every conflict of a run's settings, whose `values` are those of all settings with their defaults."""
    model, data, training = config.model, config.data, config.training
    if (training.local_steps is None) == (training.local_epochs is None):
        what = "neither" if training.local_steps is None else f"{training.local_steps} and {training.local_epochs:g}"
        yield EXCLUSIVE, f"set exactly one of local_steps and local_epochs, got {what}"
    if lost := [name for name in data.labels if name not in model.labels]:
        yield (
            ("data.labels", "model.labels"),
            f"must be among model.labels ({shown(model.labels)}), and {shown(lost)} is not",
        )
    if model.task_type == "sequence-classification":
        if data.name == "skills" and not config.tasks:
            yield (
                ("model.task_type", "data.name"),
                "the embedded skills are prompts with answers, not labelled texts: set data.name, or use causal-lm",
            )
        if len(set(model.labels)) < max(2, len(model.labels)):
            yield (
                ("model.labels", "model.task_type"),
                "sequence-classification needs at least two different label names in order, "
                f"got {shown(model.labels)}; e.g. model.labels=negative,positive",
            )
    kind = data.partition.kind
    if data.name != "skills":
        if kind in ("natural", "dirichlet") and data.partition.key is None:
            what = "owner" if kind == "natural" else "label"
            yield (
                ("data.partition.key", "data.partition.kind", "data.name"),
                f"a {kind} partition of {data.name} needs the column that holds the {what}, got none",
            )
        if kind == "skills":
            yield (
                ("data.partition.kind", "data.name"),
                f"deals the embedded skills only, and data.name is {data.name}: use iid, dirichlet, natural or files",
            )
    elif kind == "files":
        yield ("data.partition.kind", "data.name"), "files need a folder of files in data.name, got the embedded skills"
    if model.head != "random":
        yield from _head_conflicts(config)
    if config.lora.rslora and config.lora.alpha is None:
        yield (
            ("lora.rslora", "lora.alpha"),
            "scales alpha by the root of the rank and lora.alpha is none: set lora.alpha, or leave rslora off",
        )
    yield from _ignored(config, values)
    yield from _method_conflicts(config)
    yield from _continual_conflicts(config, values)
    yield from privacy_conflicts(config)
    yield from secure_conflicts(config)
    for key, methods in BELONGS_TO.items():
        value = getattr(config.method, key.removeprefix("method."))
        if value not in (None, False) and config.method.name not in methods:
            yield (
                (key, "method.name"),
                f"belongs to {', '.join(methods)}; the method is {config.method.name} and got {shown(value)}",
            )


def _ignored(config: RunConfig, values: Values) -> Iterator[Conflict]:
    """Settings other than their default that no part of this run reads, and what would read them."""
    given = {key: value for key, (value, _) in values.items()}
    for key, (owner, readers) in _READ_BY.items():
        if given[key] != values[key][1] and given[owner] not in readers:
            while owner in _READ_BY and given[_READ_BY[owner][0]] not in _READ_BY[owner][1]:
                owner, readers = _READ_BY[owner]  # what has no effect itself is not to be set
            yield (
                (key, owner),
                f"has no effect while {owner} is {given[owner]}, got {shown(given[key])}: leave it out, or set {owner} "
                f"to {' or '.join(readers)}",
            )
    if config.personal.rank is not None and config.personal.steps == 0:
        yield (
            ("personal.rank", "personal.steps"),
            f"has no effect while personal.steps is 0, got {config.personal.rank}: leave it out, or set personal.steps "
            "to 1 or more",
        )


def _method_conflicts(config: RunConfig) -> Iterator[Conflict]:
    """What a method cannot be combined with, and which could."""
    name, robust, wire = config.method.name, config.robust, config.wire
    if config.training.optimizer_state == "keep" and name not in _MOMENTS_KEPT:
        yield (
            ("training.optimizer_state", "method.name"),
            f"{name}'s clients begin each round with other factors, to which kept moments do not belong: use fresh, or "
            f"one of {', '.join(_MOMENTS_KEPT)}",
        )
    for (key, value), (methods, why) in _PAIRS.items():
        section, _, field = key.partition(".")
        if getattr(getattr(config, section), field) == value and name not in methods:
            yield (
                (key, "method.name"),
                f"{value} goes with {', '.join(methods)} ({why}); the method is {name}",
            )
    if robust.rule != "none" and name == "fedsa-lora":
        yield (
            ("robust.rule", "method.name"),
            f"fedsa-lora's B stays with the clients, so nobody can compare their updates: got {robust.rule}; use none, "
            "or another method",
        )
    if robust.rule in ("geometric-median", "centred-clipping", "fltrust") and name == "hetlora":
        yield (
            ("robust.rule", "method.name"),
            f"{robust.rule} is a matter of weights, and hetlora weighs updates by their own norms: use norm-bound, "
            "screen, krum or multi-krum, or another method",
        )
    if (robust.rule == "fltrust") != (robust.trusted is not None):
        yield (
            ("robust.trusted", "robust.rule"),
            "names the client that fltrust holds the others against, e.g. client-00000: set both or neither, got "
            f"rule {robust.rule} and trusted {shown(robust.trusted)}",
        )
    asked = round(config.rounds.fraction * config.rounds.clients)
    if robust.rule == "fltrust" and (config.rounds.fraction < 1 or config.rounds.sampling == "poisson"):
        yield (
            ("robust.rule", "rounds.fraction", "rounds.sampling"),
            "fltrust needs the trusted client in every round: use rounds.fraction=1 and rounds.sampling=fraction",
        )
    hostile = -(-robust.attackers * asked // 1)
    least = {"krum": 2 * hostile + 2, "multi-krum": 2 * hostile + 2, "median": 2 * hostile, "trimmed-mean": 2 * hostile}
    if robust.rule in least and (asked <= least[robust.rule] or config.rounds.sampling == "poisson"):
        yield (
            ("robust.rule", "rounds.clients", "rounds.fraction", "rounds.sampling"),
            f"{robust.rule} against a share of {robust.attackers:g} needs more than {least[robust.rule]:g} clients in "
            f"every round, got {asked}{' on average' if config.rounds.sampling == 'poisson' else ''}: ask more, lower "
            "robust.attackers, or use geometric-median",
        )
    if config.attack.kind != "none" and name == "fedsa-lora":
        yield (
            ("attack.kind", "method.name"),
            f"fedsa-lora's clients send A alone, which no simulated attack is made for: got {config.attack.kind}",
        )
    if robust.bound is not None and robust.rule not in ("norm-bound", "centred-clipping"):
        yield (
            ("robust.bound", "robust.rule"),
            f"belongs to norm-bound and centred-clipping; the rule is {robust.rule} and got {shown(robust.bound)}",
        )
    if wire.down != "float32" and name == "flexlora":
        yield (
            ("wire.down", "method.name"),
            f"flexlora sends every client a start of its own, rescaled to its rank, which {wire.down} cannot carry: "
            "use float32 down (wire.up may have a codec), or flora",
        )
    for key, codec in (("wire.up", wire.up), ("wire.down", wire.down)):
        if codec != "float32" and name not in _CODED:
            yield (
                (key, "method.name"),
                f"{codec} goes with {', '.join(_CODED)}; {name}'s factors mean something else in every round (fed-sb's "
                "are tiny), so what the codec leaves out could not be sent later: use float32",
            )
    if wire.top is not None and name not in ("flexlora", "flora"):
        yield (
            ("wire.top", "method.name"),
            f"flora and flexlora send products, which have leading directions; {name} sends changes of factors in a "
            f"common basis, got {wire.top}: leave it out, or use wire.up=int8 or int4",
        )
    if config.rounds.max_norm is not None and name == "fedsa-lora":
        yield (
            ("rounds.max_norm", "method.name"),
            f"fedsa-lora's B stays with the clients, so nobody knows an update's norm: got {config.rounds.max_norm:g}; "
            "leave it out, or use another method",
        )
    if config.personal.steps and name == "fedsa-lora":
        yield (
            ("personal.steps", "method.name"),
            "fedsa-lora's clients have personal adapters already: leave it at 0, or use another method",
        )


def _continual_conflicts(config: RunConfig, values: Values) -> Iterator[Conflict]:
    """What tasks, and the way that they are kept apart, cannot be combined with."""
    tasks, way, name = config.tasks, config.continual, config.method.name
    if not tasks:
        plain = type(way)()
        for key in type(way).model_fields:
            if getattr(way, key) != getattr(plain, key):
                yield (f"continual.{key}", "tasks"), f"needs tasks, and there are none; got {shown(getattr(way, key))}"
        return
    names = [task.get("name", "") for task in tasks]
    for task_name in sorted(set(names) & _RESERVED):
        yield ("tasks",), f"{task_name} is what `--task` calls all tasks, or the one found: name the task otherwise"
    for task_name in sorted({n for n in names if not _TASK_NAME.fullmatch(n) or names.count(n) > 1}):
        yield (
            ("tasks",),
            f"every task needs a name of its own, of letters, digits, '_', '-' and '.', got {shown(task_name)}"
            f"{' twice' if names.count(task_name) > 1 else ''}",
        )
    for task in tasks:
        for key in task.keys() - set(TASK_KEYS):
            if not key.startswith(_OF_A_TASK) or key not in values:
                yield (
                    ("tasks",),
                    f"{task.get('name')}: {key} is no setting of a task; there are {', '.join(TASK_KEYS)}, and those "
                    f"that begin with {', '.join(_OF_A_TASK)}",
                )
        for key in ("start", "rank", "continual.task_dim"):
            if key in task and not (task[key].isdecimal() and int(task[key]) > 0):
                yield ("tasks",), f"{task.get('name')}: {key} must be a whole number from 1 on, got {shown(task[key])}"
    for key, value, methods in (
        ("task_dim", way.task_dim or _first(tasks, "continual.task_dim"), ("subspace", "input-aware")),
        ("sketch", way.sketch, ("input-aware",)),
        ("penalty", way.penalty, ("o-lora", "ewc")),
        ("penalty_form", way.penalty_form, ("o-lora",)),
        ("replay_rows", way.replay_rows, ("replay",)),
    ):
        if value is not None and way.method not in methods:
            yield (
                (f"continual.{key}", "continual.method"),
                f"belongs to {', '.join(methods)}; the method is {way.method} and got {shown(value)}",
            )
    trained_by = sorted({task.get("method.name", name) for task in tasks})
    for method in trained_by:
        yield from _way_conflicts(way.method, method)
    if way.method in ("sequential", "replay", "ewc") and len(trained_by) > 1:
        yield (
            ("continual.method", "method.name"),
            f"under {way.method} one pair goes on from task to task, so all have one: got {', '.join(trained_by)}",
        )
    for task in tasks if way.method in ("subspace", "input-aware") else ():
        dim = task.get("continual.task_dim", way.task_dim)
        rank = task.get("method.task_rank", config.method.task_rank)
        if dim is not None and rank is not None and int(rank) > int(dim):
            yield (
                ("method.task_rank", "continual.task_dim"),
                f"task {task.get('name', '')}: a pair of rank {rank} has no room in a subspace of {dim} dimensions: "
                "raise task_dim, or lower task_rank",
            )
    if config.attack.kind != "none":
        yield ("attack.kind", "tasks"), f"no simulated attack is made for runs with tasks: got {config.attack.kind}"
    if way.method == "nearest-mean" and config.model.task_type != "sequence-classification":
        yield ("continual.method", "model.task_type"), "nearest-mean needs classes: use sequence-classification"
    if config.personal.steps:
        yield ("personal.steps", "tasks"), "local adapters come after a run of one task: leave it at 0"
    if config.training.optimizer_state == "keep":
        yield ("training.optimizer_state", "tasks"), "a new task begins with new moments: use fresh"


def _head_conflicts(config: RunConfig) -> Iterator[Conflict]:
    """What a head that is made of clients' sums cannot be combined with."""
    for key, given in (
        ("robust.rule", config.robust.rule != "none"),
        ("rounds.max_norm", config.rounds.max_norm is not None),
    ):
        if given:
            yield (
                ("model.head", key),
                "one forged client could set the whole head, for no rule and no bound is applied to sums: use random",
            )
    if config.wire.down != "float32":
        yield (
            ("model.head", "wire.down"),
            f"the fitted head would be rounded to {config.wire.down} on its way and not at the server: use float32",
        )
    if config.tasks and config.continual.method == "nearest-mean":
        yield ("model.head", "continual.method"), "nearest-mean trains no head: use random"


def _way_conflicts(way: str, name: str) -> Iterator[Conflict]:
    """Why a method cannot train a task under this way."""
    if name == "fedsa-lora":
        yield ("tasks", "method.name"), "fedsa-lora's B stays with the clients, so no task could be sealed: use another"
    if way == "o-lora" and name in _FROZEN_A:
        yield (
            ("continual.method", "method.name"),
            f"o-lora is a penalty on A, and {name} freezes A: it would be a constant. Use subspace or input-aware, or "
            "a method that trains A, such as fedit",
        )
    if way == "ewc" and name not in ("fedit", "ffa-lora"):
        yield (
            ("continual.method", "method.name"),
            f"ewc holds the entries of one pair that goes on from task to task, as fedit and ffa-lora have: got {name}",
        )


def _first(tasks: Sequence[Mapping[str, str]], key: str) -> str | None:
    return next((task[key] for task in tasks if key in task), None)
