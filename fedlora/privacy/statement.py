"""What a run promises about rows or whole clients, in words, out of its log: for the manifest and the model card."""

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
    if told["unit"] == "client":
        return _of_clients(told, secure, used)
    return (
        f"differential privacy of single training rows (unit: {told['unit']}; relation: {told['relation']}): epsilon "
        f"{told['epsilon']:.4g} at delta {told['delta']:g}, for this run and any one client that took part in every "
        f"round. Mechanism: DP-SGD with Adam on what is trained, {told['steps']} steps, each row's gradient clipped to "
        f"{told['clip']:g}, Gaussian noise multiplier {told['noise_multiplier']:.4g}, Poisson sampling "
        f"{told['sampling']:.4g}. Accountant: {ACCOUNTANT} ({used}). Who adds the noise: each client, locally, before "
        f"anything leaves it; the server sees {sees}, and epsilon counts each by itself. Each client keeps its own "
        "ledger; other runs on the same rows add to it."
    )


def _of_clients(told: Mapping[str, Any], secure: bool, used: str) -> str:
    if told["noise_by"] == "clients":
        who = (
            f"the clients, inside a secure sum, each 1/sqrt({told['parties']}) of it; at least {told['parties']} are "
            "in every sum, and the noise of those who deceive does not count. The server sees noised sums only"
        )
    elif secure:
        who = "the server, which is trusted with each round's sum, and sees no single update, by secure aggregation"
    else:
        who = "the server, which is trusted with every single update"
    clip = f"{told['clip']:g}"
    if told.get("quantile") is not None:
        clip = (
            f"a bound that began at {clip} and follows the quantile {told['quantile']:g} of the clients' norms, by "
            "noised counts that the noise multiplier includes,"
        )
    drawn = "each client drawn by itself, and who was drawn is kept from the log" if told["sampling"] < 1.0 else "none"
    return (
        f"differential privacy of whole clients, with all their rows (unit: {told['unit']}; relation: "
        f"{told['relation']}): epsilon {told['epsilon']:.4g} at delta {told['delta']:g}, for this run. Mechanism: the "
        f"sum of the clients' updates, each clipped to {clip} in one norm over all that it sends, Gaussian "
        f"noise multiplier {told['noise_multiplier']:.4g}, {told['steps']} releases, amplification by sampling: "
        f"{drawn}. Accountant: {ACCOUNTANT} ({used}). Who adds the noise: {who}. The ledger is of this run; other runs "
        "with the same clients add to it."
    )
