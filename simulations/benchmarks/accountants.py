"""Epsilon by our accountant beside the closed form, Opacus (PRV and RDP) and dp-accounting's RDP, as Markdown.

    python -m simulations.benchmarks.accountants

Each row is so many releases of Gaussian noise on Poisson samples, under add-or-remove-one. Ours is an upper bound by
privacy loss distributions; the closed form (Balle and Wang, ICML 2018) is exact where there is no sampling. PRV adds
its own error bound, RDP is looser.
"""

from __future__ import annotations

import math
import warnings

import dp_accounting
from dp_accounting.rdp import RdpAccountant

from fedlora.privacy.accounting import Event, epsilon, gaussian_epsilon

__all__ = ["ROWS", "main", "row"]

ROWS = (
    (1.0, 1.0, 50, 1e-5),
    (1.0, 5.0, 100, 1e-5),
    (0.1, 1.0, 100, 1e-5),
    (0.01, 1.0, 1000, 1e-5),
    (0.001, 0.6, 10_000, 1e-6),
)  # sampling, noise multiplier, releases, delta


def row(sampling: float, noise: float, times: int, delta: float) -> list[float | None]:
    """Ours, closed form (None with sampling), Opacus PRV, Opacus RDP, dp-accounting RDP."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from opacus.accountants import PRVAccountant, RDPAccountant

        theirs = []
        for accountant in (PRVAccountant(), RDPAccountant()):
            accountant.history = [(noise, sampling, times)]
            theirs.append(float(accountant.get_epsilon(delta=delta)))
    google = RdpAccountant()
    gaussian = dp_accounting.GaussianDpEvent(noise)
    sampled = gaussian if sampling == 1.0 else dp_accounting.PoissonSampledDpEvent(sampling, gaussian)
    google.compose(sampled, times)
    ours = epsilon([Event(noise_multiplier=noise, sampling=sampling, times=times)], delta)
    exact = gaussian_epsilon(math.sqrt(times) / noise, delta) if sampling == 1.0 else None
    return [ours, exact, *theirs, float(google.get_epsilon(delta))]


def main() -> None:
    """Print the table."""
    print("| sampling | noise | releases | delta | ours | closed form | Opacus PRV | Opacus RDP | dp-accounting RDP |")
    print("|---:|---:|---:|---:|---:|---:|---:|---:|---:|")
    for given in ROWS:
        found = " | ".join("" if x is None else f"{x:.4f}" for x in row(*given))
        sampling, noise, times, delta = given
        print(f"| {sampling:g} | {noise:g} | {times:,} | {delta:g} | {found} |")


if __name__ == "__main__":
    main()
