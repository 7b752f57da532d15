"""What a run promises about single rows, in words, out of its log: for the manifest and the model card."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from fedlora.privacy.accounting import ACCOUNTANT

__all__ = ["statement"]


def statement(events: Sequence[Mapping[str, Any]]) -> str | None:
    """Unit, relation, epsilon, delta, accountant, mechanism, and who adds the noise; None where nothing is promised.

    `events` is the run log; its last round counts.
    """
    told = next((e["privacy"] for e in reversed(events) if e["event"] == "round" and e.get("privacy")), None)
    if told is None:
        return None
    config: Mapping[str, Any] = next((e.get("config", {}) for e in reversed(events) if e["event"] == "start"), {})
    secure = bool(config.get("secure.on", False))
    sees = "sums of noised updates only, by secure aggregation" if secure else "each noised update"
    try:
        used = f"dp-accounting {version('dp-accounting')}"
    except PackageNotFoundError:
        used = "dp-accounting not installed here"
    return (
        f"differential privacy of single training rows (unit: {told['unit']}; relation: {told['relation']}): epsilon "
        f"{told['epsilon']:.4g} at delta {told['delta']:g}, for this run and any one client that took part in every "
        f"round. Mechanism: DP-SGD with Adam on what is trained, {told['steps']} steps, each row's gradient clipped to "
        f"{told['clip']:g}, Gaussian noise multiplier {told['noise_multiplier']:.4g}, Poisson sampling "
        f"{told['sampling']:.4g}. Accountant: {ACCOUNTANT} ({used}). Who adds the noise: each client, locally, before "
        f"anything leaves it; the server sees {sees}, and epsilon counts each by itself. Each client keeps its own "
        "ledger; other runs on the same rows add to it."
    )
