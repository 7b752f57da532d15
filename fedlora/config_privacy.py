"""What privacy cannot be combined with, and which settings could be used instead."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from fedlora.config_secure import LINEAR, NESTED

if TYPE_CHECKING:
    from fedlora.config import RunConfig

__all__ = ["privacy_conflicts"]

Conflict = tuple[tuple[str, ...], str]


def privacy_conflicts(config: RunConfig) -> Iterator[Conflict]:
    """What would let something of rows or clients out un-noised or uncounted, or make the count wrong."""
    own = config.privacy
    if own.level == "none":
        return
    if (own.noise_multiplier is None) == (own.epsilon is None):
        what = "neither" if own.epsilon is None else f"{own.noise_multiplier} and {own.epsilon:g}"
        yield (
            ("privacy.epsilon", "privacy.noise_multiplier"),
            f"set exactly one of noise_multiplier and epsilon, got {what}",
        )
    if own.scheme != "poisson":
        yield (
            ("privacy.scheme",),
            f"epsilon is counted for Poisson sampling, when one row more or less changes nobody else's chance; with "
            f"{own.scheme} samples it does, and the number would be wrong: use poisson",
        )
    if config.personal.steps:
        yield (
            ("personal.steps", "privacy.level"),
            "local adapters are trained without noise and scored on private rows: leave it at 0",
        )
    if config.model.head != "random":
        yield (
            ("model.head", "privacy.level"),
            "clients would send class means of what the head reads, without noise: use random",
        )
    yield from _of_clients(config) if own.level == "client" else _of_examples(config)
    yield from _of_tasks(config)


def _of_clients(config: RunConfig) -> Iterator[Conflict]:
    own, rounds, name = config.privacy, config.rounds, config.method.name
    if name not in LINEAR:
        yield (
            ("method.name", "privacy.level"),
            f"whole clients are private in sums of updates of one kind: use {', '.join(LINEAR)}, or "
            f"privacy.level=example; got {name}",
        )
    elif name not in NESTED and len(set(config.lora.ranks)) > 1:
        yield (
            ("lora.ranks", "method.name", "privacy.level"),
            f"{name} pads each client's factors on its own, so the sum of different ranks is another mean than that of "
            f"its answers: give all one rank, or use {', '.join(NESTED)}",
        )
    if name == "fed-sb" and config.method.basis != "random":
        yield (
            ("method.basis", "privacy.level"),
            "fed-sb's first round takes the clients' factors without noise to find its bases: use random",
        )
    if rounds.fraction < 1.0 and rounds.sampling != "poisson" and not config.secure.on:
        yield (
            ("rounds.sampling", "rounds.fraction", "privacy.level"),
            "epsilon is counted for clients that are drawn each by itself; a fixed number of them changes everybody's "
            "chance when one comes or goes: use poisson",
        )
    if config.robust.rule != "none":
        yield (
            ("robust.rule", "privacy.level"),
            f"what {config.robust.rule} keeps depends on all clients at once, so one client moves the sum by more than "
            "the clip: private or robust, not both; use none",
        )
    if own.noise == "clients" and not config.secure.on:
        yield (
            ("privacy.noise", "secure.on"),
            "each client adds only its share, which protects it in a sum and not alone: set secure.on=true, or "
            "noise=server",
        )


def _of_examples(config: RunConfig) -> Iterator[Conflict]:
    own, training = config.privacy, config.training
    step = training.batch_size * training.accumulation
    if own.rows is None:
        yield (
            ("privacy.rows", "privacy.level"),
            "how many rows a client is taken to have must be said, since nothing may be counted; got none. For the "
            "embedded skills that is data.rows_per_client",
        )
    elif own.sampling is None and step > own.rows:
        yield (
            ("privacy.rows", "training.batch_size"),
            f"a step of {step} rows is more than the {own.rows} of a client: lower training.batch_size, or set "
            "privacy.sampling",
        )
    if training.local_steps is None:
        yield (
            ("training.local_epochs", "privacy.level"),
            "epochs have as many steps as a client's rows make, and both are private: set training.local_steps",
        )
    if training.optimizer_state == "keep":
        yield (
            ("training.optimizer_state", "privacy.level"),
            "what a client keeps from round to round is not in the account of what was spent: use fresh",
        )
    if config.method.name == "fedsa-lora":
        yield (
            ("method.name", "privacy.level"),
            "fedsa-lora's clients keep their B and head, and only they could score them, on private rows: use another "
            "method, e.g. ffa-lora",
        )
    if config.data.holdout:
        yield (
            ("data.holdout", "privacy.level"),
            "clients do not score under privacy, and which rows are held out depends on how many there are: one row "
            f"more would change what all steps are trained on; got {config.data.holdout:g}, set it to 0",
        )


def _of_tasks(config: RunConfig) -> Iterator[Conflict]:
    way = config.continual
    if not config.tasks:
        return
    for key, given in (("routing", way.routing), ("effects", way.effects)):
        if given:
            yield (
                (f"continual.{key}", "privacy.level"),
                "clients would send sums over their rows without noise: set it to false",
            )
    without = {
        "input-aware": "it is designed from sketches of the clients' inputs",
        "ewc": "its Fisher information is a sum over rows",
        "nearest-mean": "class means are sums over rows",
        "replay": "which rows are drawn again depends on how many there are",
    }
    if way.method in without and not (way.method == "replay" and config.privacy.level == "client"):
        yield (
            ("continual.method", "privacy.level"),
            f"{way.method}: {without[way.method]}, without noise: use subspace, o-lora, incremental or sequential",
        )
