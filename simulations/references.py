"""The rows that users always ask for beside a federated score: the bare base, local only, and centralised.

Each gets the same number of optimiser steps as a client of the federated run has in all (local only), or as all clients
have together (centralised, on the union of the rows), with one cosine schedule over all of them. The other settings are
the run's; a learning rate that is not set is that of plain LoRA, so that the references are no straw men.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from clients.answer import threads
from clients.resident import encoded, resident_base, stable_id
from fedlora.adapter import Adapter, Array, Factors
from fedlora.base import Base
from fedlora.config import RunConfig, local_training
from fedlora.data.rows import TokenRow
from fedlora.errors import DataError
from fedlora.evaluation.score import score
from fedlora.state import Ask, Block, Header, LocalTraining, Part, TrainPlan, keyed, part
from fedlora.training.attach import attach
from fedlora.training.local import train_client
from fedlora.wire import blocks_id
from server.evaluate import summary


@dataclass(frozen=True)
class Reference:
    """One reference: its score and loss on the rows that the federated run is scored on, by group."""

    name: str
    score: float
    loss: float
    groups: Mapping[str, Mapping[str, float]]
    seconds: float = 0.0
    detail: Mapping[str, float] | None = None

    def event(self) -> dict[str, Any]:
        """The run log's `reference` event."""
        event: dict[str, Any] = {
            "event": "reference",
            "name": self.name,
            "score": self.score,
            "loss": self.loss,
            "groups": {g: dict(v) for g, v in self.groups.items()},
            "seconds": self.seconds,
        }
        return event | ({"detail": dict(self.detail)} if self.detail else {})


def scored_rows(config: RunConfig, test: Sequence[TokenRow]) -> list[TokenRow]:
    """What references are scored on: the server's test rows, or without any all clients' held-out rows."""
    if test:
        return list(test)
    rows = [row for i in range(config.rounds.clients) for row in encoded(config, i)[1]]
    if not rows:
        raise DataError("nothing to score on: no test rows are given and data.holdout leaves none to the clients")
    return rows


def bare_base(config: RunConfig, rows: Sequence[TokenRow]) -> Reference:
    """The frozen base as it is, with the head that every client starts from."""
    base = resident_base(config.model)
    return _reference("bare base", _scored(base, None, base.initial_head, rows, config))


def local_only(config: RunConfig, rows: Sequence[TokenRow]) -> Reference:
    """Every client trains alone; the mean of their scores, also apart for the groups it holds and those it does not."""
    base = resident_base(config.model)
    taken = max(1, round(config.rounds.count * config.rounds.fraction))
    sums: dict[str, float] = {}
    seconds = 0.0
    held = {"held": [0.0, 0.0], "not held": [0.0, 0.0]}
    for index in range(config.rounds.clients):
        train = encoded(config, index)[0]
        if not train:
            continue
        rank = config.rank_of(index)
        adapter, head, took = _train(base, config, stable_id(index), train, rank, _times(config, taken))
        got = _scored(base, adapter, head, rows, config)
        seconds += took
        own = {row.group for row in train}
        for key, value in got.items():
            sums[key] = sums.get(key, 0.0) + value
            if key.startswith(("correct/", "counted/")):
                kind, group = key.split("/", 1)
                held["held" if group in own else "not held"][kind == "counted"] += value
    detail = {f"score on groups {k}": c / n for k, (c, n) in held.items() if n}
    return replace(_reference("local only", sums), seconds=seconds, detail=detail)


def centralised(config: RunConfig, rows: Sequence[TokenRow]) -> Reference:
    """All rows in one place, at the largest rank, with as many steps as all clients have together."""
    base = resident_base(config.model)
    union = [row for i in range(config.rounds.clients) for row in encoded(config, i)[0]]
    rank = max(config.rank_of(i) for i in range(config.rounds.clients))
    taken = max(1, round(config.rounds.count * config.rounds.fraction))
    steps = _times(config, taken * (config.rounds.clients if config.training.local_steps is not None else 1))
    adapter, head, seconds = _train(base, config, "centralised", union, rank, steps)
    return replace(_reference("centralised", _scored(base, adapter, head, rows, config)), seconds=seconds)


def _times(config: RunConfig, factor: int) -> LocalTraining:
    training = replace(local_training(config, method="plain LoRA"), schedule="cosine", optimizer_state="fresh")
    if training.local_steps is not None:
        return replace(training, local_steps=training.local_steps * factor)
    assert training.local_epochs is not None
    return replace(training, local_epochs=training.local_epochs * factor)


def _train(
    base: Base, config: RunConfig, name: str, rows: Sequence[TokenRow], rank: int, training: LocalTraining
) -> tuple[Adapter, dict[str, Array], float]:
    """(update, head, seconds) of plain LoRA on `rows`, from a fresh A and B = 0."""
    parts: tuple[Part, ...] = ("A", "B", "head") if base.layout.head else ("A", "B")
    plan = TrainPlan(
        method=name,
        rank=rank,
        rows=rank,
        scale=config.scale_of(rank),
        train=parts,
        send=parts,
        a_from="fresh",
        b_from="zero",
        training=training,
        seed=config.seed,
    )
    header = Header(run="reference", round=1, client=name, kind="train", base=base.fingerprint)
    answer = train_client(
        base, header, Ask(plan=plan, arrays=keyed("head", base.initial_head)), rows, threads=threads(config)
    )
    a, b = part(answer.arrays, "A"), part(answer.arrays, "B")
    adapter = Adapter({n: Factors(a[n], b[n], plan.scale).folded() for n in a})
    return adapter, part(answer.arrays, "head"), answer.metrics["seconds"]


def _scored(
    base: Base, adapter: Adapter | None, head: Mapping[str, Array], rows: Sequence[TokenRow], config: RunConfig
) -> dict[str, float]:
    blocks = () if adapter is None else (Block(adapter=adapter, born=0),)
    attach(base, blocks, blocks_id(blocks), None, dict(head))
    return score(base, rows, batch_size=config.evaluation.batch_size)


def _reference(name: str, sums: Mapping[str, float]) -> Reference:
    got = summary(sums)
    return Reference(name=name, score=got["score"], loss=got["loss"], groups=got["groups"])
