"""How long one step of local training takes on this machine, for `fedlora plan`: measured, not guessed."""

from __future__ import annotations

import time
from dataclasses import replace

import numpy as np

from fedlora.base import Base
from fedlora.config import RunConfig, local_training
from fedlora.data.rows import TokenRow
from fedlora.privacy.budget import resolved
from fedlora.rng import stream
from fedlora.state import Header
from fedlora.training.local import train_client
from strategies.base import Cohort, Member, get

__all__ = ["step_seconds"]

_STEPS = 3  # that are measured, beside one that is not


def step_seconds(config: RunConfig, base: Base) -> float:
    """Seconds of one optimiser step of these settings at the largest rank, on rows of the greatest length.

    Example-level privacy is on where the settings say so, at any noise. The rows are random tokens, so this is an upper
    bound for shorter rows. Cost: four steps. Raises: TrainingError or MethodError as a run of the settings would.
    """
    rank, training = max(config.lora.ranks), local_training(config)
    member = Member(id="client-00000", rank=rank, scale=config.scale_of(rank))
    method = get(config.method.name)
    state = method.open(base.fingerprint, base.layout, [member], config.method, config.seed)
    cohort = Cohort(
        round=1,
        rounds=1,
        members=(member,),
        settings=config.method,
        training=training,
        seed=config.seed,
        progress=(0.0, 1.0),
    )
    ask = next(method.protocol(state, cohort))[member.id]
    assert ask.plan is not None
    step = training.batch_size * training.accumulation
    rows = _rows(config, base, max(config.privacy.rows or 0, step))

    def seconds(steps: int) -> float:
        assert ask.plan is not None
        own = replace(training, local_steps=steps, local_epochs=None, optimizer_state="fresh")
        plan = replace(ask.plan, training=own, privacy=resolved(config, noise=1.0))
        header = Header(run="plan", round=1, client=member.id, kind="train", base=base.fingerprint, version=0)
        began = time.perf_counter()
        train_client(base, header, replace(ask, plan=plan), rows, threads=config.training.threads)
        return time.perf_counter() - began

    once = seconds(1)
    return max(seconds(1 + _STEPS) - once, 0.0) / _STEPS


def _rows(config: RunConfig, base: Base, count: int) -> list[TokenRow]:
    tokens = stream(config.seed, "plan").integers(5, base.model.config.vocab_size, (count, config.model.max_length))
    classes = config.model.task_type == "sequence-classification"
    answer = (np.arange(config.model.max_length) >= config.model.max_length // 2) & (not classes)
    return [TokenRow(t.astype(np.int32), answer, label=0 if classes else None) for t in tokens]
