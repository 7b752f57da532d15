"""What a run's settings come to, of single rows: the privacy of every training ask, its steps, and the budget.

The number of steps is that of a client which takes part in every round of every task. Sampling of clients is not
counted as a help, since who was drawn is in the log.
"""

from __future__ import annotations

from fedlora.config import RunConfig
from fedlora.continual.tasks import legs
from fedlora.errors import ConfigError
from fedlora.privacy.accounting import Privacy, epsilon, noise_multiplier

__all__ = ["known_steps", "planned_steps", "resolved", "run_epsilon", "step_sampling"]


def planned_steps(config: RunConfig) -> int:
    """Optimiser steps of a client that trains in every round. Raises: ConfigError where they are given as epochs."""
    steps = known_steps(config)
    if steps is None:
        raise ConfigError("training.local_epochs: epochs depend on private numbers of rows; set training.local_steps")
    return steps


def known_steps(config: RunConfig) -> int | None:
    """Optimiser steps of a client that trains in every round; None where they depend on how many rows it has."""
    each = [(leg.rounds, leg.config.training.local_steps) for leg in legs(config)]
    found = 0
    for rounds, steps in each or [(config.rounds.count, config.training.local_steps)]:
        if steps is None:
            return None
        found += rounds * steps
    return found


def step_sampling(config: RunConfig) -> float:
    """The probability with which a row takes part in a step. Raises: ConfigError without `privacy.rows`."""
    own, training = config.privacy, config.training
    if own.rows is None:
        raise ConfigError("privacy.rows: how many rows a client is taken to have must be said, got none")
    return own.sampling or min(1.0, training.batch_size * training.accumulation / own.rows)


def resolved(config: RunConfig, *, noise: float | None = None) -> Privacy | None:
    """The privacy that every training ask of the run carries; None where nothing is promised of single rows.

    `noise` is the noise multiplier found before, else it is `privacy.noise_multiplier`, or the smallest with which all
    planned steps stay within `privacy.epsilon` (seconds; see `fedlora.privacy.accounting.noise_multiplier`).
    Raises: ConfigError for an epsilon that no noise reaches.
    """
    own = config.privacy
    if own.level != "example":
        return None
    sampling = step_sampling(config)
    assert own.rows is not None
    z = noise or own.noise_multiplier
    if z is None:
        assert own.epsilon is not None
        z = noise_multiplier(own.epsilon, own.delta, sampling=sampling, times=planned_steps(config))
    return Privacy(clip=own.clip, noise_multiplier=z, sampling=sampling, expected=sampling * own.rows)


def run_epsilon(config: RunConfig) -> float | None:
    """What the run may spend at each client: `privacy.epsilon`, or what its noise comes to over all planned steps.

    None where nothing is promised of single rows.
    """
    if config.privacy.level != "example":
        return None
    privacy = resolved(config, noise=1.0) if config.privacy.epsilon is not None else resolved(config)
    if privacy is None:
        return None
    return config.privacy.epsilon or epsilon([privacy.event(planned_steps(config))], config.privacy.delta)
