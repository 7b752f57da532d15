"""What secure sums cannot be combined with, and which settings could be used instead."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from fedlora.config import RunConfig

LINEAR: Final = ("fed-sb", "fedit", "ffa-lora", "rolora")  # methods whose state follows from weighted sums of answers
_WAYS: Final = ("incremental", "separate", "sequential", "subspace")  # of tasks, that measure nothing at clients
SKETCHED: Final = ("flora",)  # methods whose updates are products, summed by sketches
NESTED: Final = ("fed-sb", "ffa-lora", "rolora")  # of these, those whose clients may have different ranks
LEAST: Final = 3  # clients in any sum

__all__ = ["LEAST", "LINEAR", "NESTED", "SKETCHED", "secure_conflicts"]


def secure_conflicts(config: RunConfig) -> Iterator[tuple[tuple[str, ...], str]]:
    """(keys, what is wrong) for every setting under which single updates, or measures of them, would be seen."""
    own, name = config.secure, config.method.name
    if not own.on:
        default = type(own)()
        for key in ("bound", "examples", "least", "columns"):
            if getattr(own, key) != getattr(default, key):
                yield (
                    (f"secure.{key}", "secure.on"),
                    f"has no effect while secure.on is false, got {getattr(own, key)}: leave it out",
                )
        return
    sketched = own.columns is not None
    if sketched and name not in SKETCHED:
        yield (
            ("secure.columns", "method.name"),
            f"sketches are for {', '.join(SKETCHED)}, whose updates are products on bases of their own; {name} got "
            f"{own.columns}: leave it out",
        )
    whole = config.privacy.level == "client"
    if whole and sketched:
        yield (
            ("secure.columns", "privacy.level"),
            "a sketch is two sums, which are two releases of one client: use a method that is one sum, e.g. ffa-lora",
        )
    for key in ("bound", "examples"):
        if whole and getattr(own, key) != getattr(type(own)(), key):
            yield (
                (f"secure.{key}", "privacy.level"),
                "has no effect where whole clients are private: all weigh the same, and privacy.clip is the bound",
            )
    if sketched and config.method.warm_start:
        yield (
            ("method.warm_start", "secure.columns"),
            "a sketch sums what was trained, not what it began with: leave warm_start off",
        )
    if name not in LINEAR and not (sketched and name in SKETCHED):
        why = "its output is the clients' factors themselves, stacked" if name == "flora" else "it needs single updates"
        yield (
            ("method.name", "secure.on"),
            f"{name} does not go under secure sums: {why}. Use ffa-lora, whose ranks may differ (nested columns of one "
            f"frozen A), or another of {', '.join(LINEAR)}; or flora with secure.columns, the two-pass sketch, for any "
            "A and rank",
        )
    if name == "fed-sb" and config.method.basis != "random":
        yield (
            ("method.basis", "secure.on"),
            "fed-sb's first round stacks the clients' factors to find its bases, which no sum can hide: use random",
        )
    if name in LINEAR and name not in NESTED and len(set(config.lora.ranks)) > 1:
        yield (
            ("lora.ranks", "method.name", "secure.on"),
            f"{name} pads each client's factors on its own, so the sum of different ranks is another mean than that of "
            f"its answers: give all one rank, or use {', '.join(NESTED)}",
        )
    if config.robust.rule != "none":
        yield (
            ("robust.rule", "secure.on"),
            f"{config.robust.rule} compares single updates, and a secure sum hides them: private or robust, not both; "
            "use none (clients clip to secure.bound, and the sum is checked)",
        )
    for key, given, plain in (
        ("wire.up", config.wire.up, "float32"),
        ("wire.top", config.wire.top, None),
        ("rounds.max_norm", config.rounds.max_norm, None),
        ("training.optimizer_state", config.training.optimizer_state, "fresh"),
        ("personal.steps", config.personal.steps, 0),
        ("attack.kind", config.attack.kind, "none"),
        ("model.head", config.model.head, "random"),
    ):
        if given != plain:
            yield (key, "secure.on"), f"goes with updates that are seen one by one; under secure.on use {plain}"
    asked = round(config.rounds.fraction * config.rounds.clients)
    if asked < max(LEAST, own.least):
        yield (
            ("rounds.clients", "rounds.fraction", "secure.least"),
            f"a sum of {asked} clients hides too little; at least {max(LEAST, own.least)} must be asked",
        )
    if not config.tasks:
        return
    if config.continual.method not in _WAYS:
        yield (
            ("continual.method", "secure.on"),
            f"{config.continual.method} has clients send measures of their rows one by one: use {', '.join(_WAYS)}",
        )
    for key, given in (("routing", config.continual.routing), ("effects", config.continual.effects)):
        if given:
            yield (
                (f"continual.{key}", "secure.on"),
                "clients would send sums over their rows singly: set it to false",
            )
