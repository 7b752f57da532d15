"""The server's ledger of a run in which whole clients are private, `privacy.jsonl` in the run's folder.

For one round, each step on disk before the next: charge; ask, sum and noise; keep the state; seal its SHA-256; score
and log. A round that a crash undid before it was sealed let nothing out, and is made again under the same charge. One
that was sealed goes on from the state that was kept; only if that is lost is it made again, as a new release. A refused
charge changes nothing.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any, Final

from fedlora.config import RunConfig
from fedlora.continual.tasks import legs
from fedlora.errors import RoundFailed
from fedlora.privacy.accounting import RELATION, advice
from fedlora.privacy.clients import client_privacy, planned_releases, promised
from fedlora.privacy.ledger import BudgetSpent, Key, Ledger, Terms

__all__ = ["LEDGER", "Releases"]

LEDGER: Final = "privacy.jsonl"


class Releases:
    """What one run releases of whole clients. Without client-level privacy it does nothing.

    `begun`: whether the run is resumed; its ledger must then be there.
    Raises: ConfigError as `client_privacy`; LedgerError as `Ledger.open`.
    """

    def __init__(self, config: RunConfig, folder: Path, run: str, *, begun: bool) -> None:
        self._config, self._run, self._terms = config, run, client_privacy(config)
        self._ledger: Ledger | None = None
        self._keys: list[Key] = []
        if self._terms is None:
            return
        spend = promised(config)
        assert spend is not None
        terms = Terms(owner="server", unit="client", epsilon=spend, delta=config.privacy.delta)
        self._ledger = Ledger.open(folder / LEDGER, terms, create=not begun)

    @property
    def private(self) -> bool:
        """Whether whole clients are private in this run."""
        return self._terms is not None

    @property
    def hidden(self) -> bool:
        """Whether epsilon counts on it that nobody but the server learns who was drawn."""
        return self._terms is not None and self._terms.counted < 1.0

    def charge(self, round_: int) -> None:
        """Write down what this round costs, on disk when this returns, before anybody is asked.

        Raises: RoundFailed if the budget is spent; LedgerError if the disk fails.
        """
        if self._terms is None or self._ledger is None:
            return
        active = [leg.name for leg in legs(self._config) if leg.first <= round_ <= leg.last] or [""]
        self._keys = []
        for name in active:
            parts = (Key(run=self._run, round=round_, release=name, part=str(n)) for n in itertools.count())
            key = next(k for k in parts if self._ledger.sealed(k) is None)
            try:
                self._ledger.charge(key, self._terms.event())
            except BudgetSpent as error:
                raise RoundFailed(f"round {round_}: {error}") from error
            self._keys.append(key)

    def seal(self, digest: str) -> None:
        """Write down which state the round that was charged last has made, before it is seen anywhere.

        Raises: LedgerError if the disk fails.
        """
        for key in self._keys:
            assert self._ledger is not None
            self._ledger.seal(key, digest)

    def out(self, round_: int, digest: str) -> bool:
        """Whether this state of the round was sealed, so that it may have been seen."""
        if self._ledger is None:
            return False
        return any(k.round == round_ and self._ledger.sealed(k) == digest for k in self._ledger.charges)

    def told(self) -> dict[str, Any]:
        """For the log: what is spent so far of any one client, and under which terms; empty without."""
        if self._terms is None or self._ledger is None:
            return {}
        return {
            "unit": "client",
            "relation": RELATION,
            "epsilon": self._ledger.epsilon(),
            "delta": self._ledger.terms.delta,
            "noise_multiplier": self._terms.noise_multiplier,
            "clip": self._terms.clip,
            "sampling": self._terms.counted,
            "steps": len(self._ledger.charges),
            "noise_by": self._terms.by,
            "parties": self._terms.parties,
            "quantile": self._terms.quantile,
        }

    def warning(self) -> str:
        """What is wrong with the run's promise, in plain sentences; empty if nothing is."""
        if self._terms is None:
            return ""
        events = [self._terms.event(planned_releases(self._config))]
        return advice("client", self._terms.population, events, self._config.privacy.delta)

    def close(self) -> None:
        """Let go of the ledger."""
        if self._ledger is not None:
            self._ledger.close()
