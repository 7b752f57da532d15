"""The server's account of what a run with private training has cost a client at most, and what all its asks carry.

The noise is found once, when the run opens, and kept with the steps in the state's memory. Each client keeps its own
ledger, which decides; here every training ask counts as answered. A round that is repeated asks the same again, which
costs a client nothing (`clients/private.py`); where an ask may depend on answers before it, every attempt counts.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from fedlora.adapter import Array
from fedlora.config import RunConfig
from fedlora.privacy.accounting import RELATION, advice, epsilon
from fedlora.privacy.budget import planned_steps, resolved
from fedlora.state import Ask

__all__ = ["OWNER", "Account"]

OWNER = "privacy"  # in GlobalState.memory
_NOISE = "noise_multiplier"
_STEPS = "steps:"  # and a client's id


class Account:
    """What the training asks of one run have cost. `memory` is what was kept under `OWNER`, empty when the run opens.

    Raises: ConfigError for an epsilon that no noise reaches. Cost when a run opens with an epsilon: seconds.
    """

    def __init__(self, config: RunConfig, memory: Mapping[str, Array]) -> None:
        self._config = config
        noise = float(memory[_NOISE][0]) if _NOISE in memory else None
        self.privacy = resolved(config, noise=noise)
        self._delta = config.privacy.delta
        self._repeats = bool(config.tasks)  # whether a round may ask in several phases
        self._spent = {k.removeprefix(_STEPS): int(x[0]) for k, x in memory.items() if k.startswith(_STEPS)}
        self._counted: set[tuple[int, int, int, str]] = set()

    @property
    def private(self) -> bool:
        """Whether single rows are private in this run."""
        return self.privacy is not None

    def asked(self, round_: int, attempt: int, phase: int, asks: Mapping[str, Ask]) -> None:
        """Count the training asks of one phase, before they are sent."""
        for client, ask in asks.items():
            release = (round_, attempt if self._repeats else 0, phase, client)
            if ask.plan is None or ask.plan.privacy is None or release in self._counted:
                continue
            self._counted.add(release)
            self._spent[client] = self._spent.get(client, 0) + (ask.plan.training.local_steps or 0)

    def told(self) -> dict[str, Any]:
        """For the log: what any one client has spent at most so far, and under which terms; empty without privacy."""
        if self.privacy is None:
            return {}
        steps = max(self._spent.values(), default=0)
        return {
            "unit": "example",
            "relation": RELATION,
            "epsilon": epsilon([self.privacy.event(steps)], self._delta) if steps else 0.0,
            "delta": self._delta,
            "noise_multiplier": self.privacy.noise_multiplier,
            "clip": self.privacy.clip,
            "sampling": self.privacy.sampling,
            "steps": steps,
        }

    def warning(self) -> str:
        """What is wrong with the run's promise, in plain sentences; empty if nothing is, or without privacy."""
        if self.privacy is None or self._config.privacy.rows is None:
            return ""
        events = [self.privacy.event(planned_steps(self._config))]
        return advice("example", self._config.privacy.rows, events, self._delta)

    def memory(self) -> dict[str, Array]:
        """What to keep under `OWNER`; empty without privacy."""
        if self.privacy is None:
            return {}
        spent = {f"{_STEPS}{c}": np.array([n], np.float64) for c, n in sorted(self._spent.items())}
        return {_NOISE: np.array([self.privacy.noise_multiplier], np.float64), **spent}
