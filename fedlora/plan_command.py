"""What `fedlora plan --privacy` prints."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.table import Table

from fedlora.config import RunConfig
from fedlora.display import counted
from fedlora.errors import CheckpointError
from fedlora.privacy.budget import known_steps
from fedlora.privacy.plan import WAYS, picture, plan
from fedlora.state import Layout

__all__ = ["show"]


def show(config: RunConfig, layout: Layout, console: Console, out: Path | None, *, step: float | None = None) -> None:
    """Print the plan, with `step` (seconds of one local step here) its time; with `out` write its picture, an SVG.

    Raises: ConfigError as `plan`; CheckpointError.
    """
    found = plan(config, layout)

    def say(line: str) -> None:
        console.print(line, markup=False, soft_wrap=True)

    clients, rounds = counted(found.clients, "client"), counted(found.rounds, "round")
    if found.unit == "client":
        say(f"{clients}, each private as a whole; {rounds}, {counted(found.steps, 'noised sum')} in all")
        say(f"sampling of clients that is counted: {found.sampling:.4g}; delta {found.delta:g}")
    else:
        say(f"{clients}, {rounds}, {counted(found.steps, 'step')} of each client in all")
        say(
            f"a row takes part in a step with probability {found.sampling:.4g}, of {found.rows} rows; "
            f"delta {found.delta:g}"
        )
    say(f"rank {found.rank}, {found.modules} modules")
    table = Table("epsilon", "noise multiplier", *(f"noise / signal, {way}" for way in WAYS))
    for row in found.noise:
        table.add_row(f"{row.epsilon:.3f}", f"{row.noise_multiplier:.3f}", *(f"{x:.2f}" for x in row.ratios))
    table.add_row("", "numbers trained", *(f"{m:,}" for m in found.trained))
    table.add_row("", "sent by all clients", *(f"{n / 1e6:.1f} MB" for n in found.upload))
    console.print(table)
    when = "one round" if found.unit == "client" else "one step"
    say(f"noise / signal: in {when}, in the mean of all clients, against the longest signal that the clip allows.")
    if step is not None:
        steps = known_steps(config)
        whole = f", {steps * step:.0f} s of a client that takes part in every round" if steps else ""
        say(f"a local step takes {step:.3g} s on this machine, with rows of the greatest length{whole}")
    for row in found.noise:
        if row.advice:
            say(f"epsilon {row.epsilon:.3g}: {row.advice}")
    if found.whole_clients:
        say(f"Whole clients (level=client), with noise multiplier 1 on each round's sum: {found.whole_clients}")
    if out is not None:
        try:
            out.write_text(picture(found), encoding="utf-8")
        except OSError as error:
            raise CheckpointError(f"{out} cannot be written: {error.strerror}; choose another file") from error
        say(f"picture: {out}")
