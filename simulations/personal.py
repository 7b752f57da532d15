"""Personal adapters: each client's own, beside the global one. They stay in the run folder's `clients/`, one PEFT
folder a client; in a deployment that is the client's machine.

fedlora evaluate RUN --personal
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from clients.memory import Memory
from clients.resident import encoded, resident_base, stable_id
from fedlora.adapter import Adapter, Array, Factors
from fedlora.at_rest import key_from_environment
from fedlora.config import RunConfig
from fedlora.errors import ConfigError
from fedlora.evaluation.score import score
from fedlora.peft_bridge import load_adapter, save_adapter
from fedlora.state import Block, GlobalState, Layout, part, zero_adapter
from fedlora.training.attach import attach
from fedlora.wire import blocks_id
from server.checkpoint import latest

__all__ = ["PersonalScores", "export_personal", "has_personal", "score_personal"]


def has_personal(config: RunConfig) -> bool:
    """Whether a run of these settings leaves personal adapters."""
    return config.personal.steps > 0 or config.method.name == "fedsa-lora"


def export_personal(config: RunConfig, folder: Path) -> None:
    """Write `clients/ID/` as PEFT folders from what the clients kept, and drop what only the run needed.

    A personal adapter is what a client has on top of the global one: B (and a head) that it kept, with the A it kept
    or, under fedsa-lora, the leading rows of the shared one. A client that took no part has none.
    """
    found = latest(folder / "checkpoints", key=key_from_environment())
    assert found is not None  # the run has ended
    state, run = found[1], (folder / "run-id").read_text().strip()
    kept_in, done = folder / "clients" / run, folder / "clients" / f".done-{run}"
    if not kept_in.exists():  # a run that was resumed after its end: all is written
        shutil.rmtree(done, ignore_errors=True)
        return
    for index in range(config.rounds.clients):
        client = stable_id(index)
        kept = Memory(folder / "clients", run, client).arrays("parts", 10**6)
        if kept:
            adapter, head = _own(state, kept, config.scale_of(config.rank_of(index)))
            save_adapter(
                folder / "clients" / client,
                adapter,
                state.layout,
                base_name=config.model.name,
                task_type=config.model.task_type,
                head=head,
            )
    kept_in.rename(done)  # at once, so that a crash leaves all of it or nothing to export again
    shutil.rmtree(done, ignore_errors=True)


def _own(state: GlobalState, kept: Mapping[str, Array], scale: float) -> tuple[Adapter, dict[str, Array]]:
    a, b, pair = part(kept, "A"), part(kept, "B"), state.open_task.pair
    if not a:
        assert pair is not None  # a method whose clients keep B alone shares A
        a = {n: f.a[: b[n].shape[1]] for n, f in pair.items()}
    adapter = Adapter({n: Factors(x, b[n], scale).folded() for n, x in a.items()})
    return adapter, part(kept, "head") or dict(state.open_task.extras)


@dataclass(frozen=True)
class PersonalScores:
    """One client: its held-out rows, and the score of the global adapter plus `weight` times its own, by weight."""

    client: str
    rows: int
    scores: Mapping[float, float]


def score_personal(config: RunConfig, folder: Path, weights: Sequence[float]) -> list[PersonalScores]:
    """Every client's held-out rows, scored with the global adapter (weight 0), its own on top (1), or parts of it.

    Heads are interpolated likewise. Clients without a personal adapter or without held-out rows are left out.
    Raises: ConfigError if nothing is left to score.
    """
    base = resident_base(config.model)
    adapter, head = load_adapter(folder / "adapter")
    shared, start = _fitted(adapter, base.layout), {**base.initial_head, **head}
    results = []
    for index in range(config.rounds.clients):
        own_folder = folder / "clients" / stable_id(index)
        rows = encoded(config, index)[1]
        if not own_folder.is_dir() or not rows:
            continue
        own, own_head = load_adapter(own_folder)
        mine = _fitted(own, base.layout)
        scores = {}
        for weight in weights:
            blocks = (Block(adapter=shared, born=0), Block(adapter=mine.scaled(weight), born=0))
            mixed = {n: (1 - weight) * x + weight * own_head.get(n, x) for n, x in start.items()}
            attach(base, blocks, blocks_id(blocks), None, {n: x.astype(np.float32) for n, x in mixed.items()})
            got = score(base, rows, batch_size=config.evaluation.batch_size)
            scores[weight] = got["correct"] / got["counted"]
        results.append(PersonalScores(stable_id(index), len(rows), scores))
    if not results:
        raise ConfigError(
            f"{folder} has no personal adapters to score on held-out rows: they come from method.name=fedsa-lora or "
            "from personal.steps, and data.holdout must leave rows to the clients"
        )
    return results


def _fitted(adapter: Adapter, layout: Layout) -> Adapter:
    return Adapter({**zero_adapter(layout, 0), **adapter.folded()})
