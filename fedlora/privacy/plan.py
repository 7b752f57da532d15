"""What a run with private rows would promise and cost, before it is run: `fedlora plan --privacy`.

How much noise the model gets, beside what it can learn from (Sun et al., ICLR 2024, arXiv 2403.12313, for frozen A;
Singhal et al. 2025, arXiv 2502.15436, for cores): the sum of a step's clipped gradients over its expected rows is at
most C long, and the noise on it is z C sqrt(m) / (q N) long for m numbers trained. The mean of K clients has a
1/sqrt(K) of that:

    noise to signal = z sqrt(m) / (q N sqrt(K))

in one step, in the coordinates of what is trained. At client level the clip is that of a client's update, m numbers
are released once a round, and the ratio is z sqrt(m) / (q K). It is a bound on the signal, so true ratios are larger.
Where both factors are noised, their product has Z_B Z_A besides, which is quadratic in the noise and not in these
numbers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from fedlora.config import RunConfig
from fedlora.continual.tasks import rounds_in_all
from fedlora.errors import ConfigError
from fedlora.privacy.accounting import Event, Unit, advice, epsilon, noise_multiplier
from fedlora.privacy.budget import planned_steps, step_sampling
from fedlora.privacy.clients import client_privacy, planned_releases
from fedlora.report.charts import Series, line_chart
from fedlora.state import Layout

__all__ = ["TARGETS", "Plan", "Row", "picture", "plan"]

TARGETS = (8.0, 3.0, 1.0)  # shown where the settings name neither epsilon nor noise
WAYS = ("both factors", "B alone (FFA)", "core (Fed-SB)")
_STYLE = (
    "<style>text{font:11px sans-serif;fill:#333}.dim,.ref{opacity:.6}.line{fill:none;stroke-width:2}"
    ".grid{stroke:#ddd}.t1{stroke:#0b6e99;fill:#0b6e99}.t2{stroke:#b5542b;fill:#b5542b}.t3{stroke:#4b7f3a;"
    "fill:#4b7f3a}polyline.line{fill:none}text.name{stroke:none}</style>"
)


@dataclass(frozen=True, kw_only=True)
class Row:
    """One amount of noise: what it promises, and its ratio to the signal by way (in the order of `WAYS`)."""

    epsilon: float
    noise_multiplier: float
    ratios: tuple[float, float, float]
    advice: str  # empty if nothing is wrong


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Clients, steps and sizes of a run, and a `Row` for each amount of noise."""

    unit: Unit
    clients: int
    rounds: int
    steps: int  # of one client in the whole run; at client level, sums that are released
    sampling: float
    rows: int  # of a client; at client level, clients
    delta: float
    rank: int
    modules: int
    trained: tuple[int, int, int]  # numbers trained by way
    upload: tuple[int, int, int]  # bytes by way of all clients that are drawn in all rounds, as float32
    noise: tuple[Row, ...]
    whole_clients: str  # what noise as large as the clip, on a round's sum, would promise to whole clients; or empty


def plan(config: RunConfig, layout: Layout) -> Plan:
    """The plan of these settings on this base, at the largest rank; also where `privacy.level` is none.

    Then `privacy.rows` is what the embedded skills have, and epsilon those of `TARGETS`. Cost: seconds.
    Raises: ConfigError if it is not known how many rows a client has, or steps are given as epochs.
    """
    own, rank, clients = config.privacy, max(config.lora.ranks), config.rounds.clients
    rounds, delta = rounds_in_all(config), own.delta
    if own.level == "client":
        counted = 1.0 if config.secure.on else config.rounds.fraction
        sampling, times, units, mean = counted, planned_releases(config), clients, config.rounds.fraction * clients
    else:
        config, units = _with_rows(config)
        sampling, times = step_sampling(config), planned_steps(config)
        mean = sampling * units * math.sqrt(clients)
    if own.noise_multiplier is not None:
        noises = [own.noise_multiplier]
    else:
        wanted = (own.epsilon,) if own.epsilon is not None else TARGETS
        noises = [noise_multiplier(e, delta, sampling=sampling, times=times) for e in wanted]
    head = sum(math.prod(shape) for shape in layout.head.values())
    shapes = [(m.out, m.inp) for m in layout.modules.values()]
    trained = (
        head + sum(rank * (out + inp) for out, inp in shapes),
        head + sum(rank * out for out, _ in shapes),
        head + sum(rank * rank for _ in shapes),
    )
    rows = []
    for z in noises:
        events = [Event(noise_multiplier=z, sampling=sampling, times=times)]
        ratios = [_on_updates(config, z) * math.sqrt(m) / mean for m in trained]
        rows.append(
            Row(
                epsilon=epsilon(events, delta),
                noise_multiplier=z,
                ratios=(ratios[0], ratios[1], ratios[2]),
                advice=advice("client" if own.level == "client" else "example", units, events, delta),
            )
        )
    up = [round(4 * m * clients * config.rounds.fraction * rounds) for m in trained]
    return Plan(
        unit="client" if own.level == "client" else "example",
        clients=clients,
        rounds=rounds,
        steps=times,
        sampling=sampling,
        rows=units,
        delta=delta,
        rank=rank,
        modules=len(shapes),
        trained=trained,
        upload=(up[0], up[1], up[2]),
        noise=tuple(rows),
        whole_clients="" if own.level == "client" else _whole_clients(clients, rounds, config.rounds.fraction),
    )


def _on_updates(config: RunConfig, noise_multiplier: float) -> float:
    """The noise multiplier of the updates alone, which is more where the clip follows a count that is noised too."""
    known = config.privacy.model_copy(update={"noise_multiplier": noise_multiplier, "epsilon": None})
    terms = client_privacy(config.model_copy(update={"privacy": known}))
    return noise_multiplier if terms is None else terms.multiplier


def _whole_clients(clients: int, rounds: int, fraction: float) -> str:
    """What noise as large as the clip on each round's sum would promise to whole clients."""
    events, delta = [Event(noise_multiplier=1.0, sampling=fraction, times=rounds)], 0.1 / clients
    return advice("client", clients, events, delta) or f"epsilon {epsilon(events, delta):.1f} at delta {delta:g}"


def _with_rows(config: RunConfig) -> tuple[RunConfig, int]:
    """The settings with how many rows a client has, and that number. Raises: ConfigError if it is not known."""
    rows = config.privacy.rows
    if rows is None and config.data.name == "skills":
        rows = config.data.rows_per_client
        config = config.model_copy(update={"privacy": config.privacy.model_copy(update={"rows": rows})})
    if rows is None:
        raise ConfigError(
            "privacy.rows: how many rows does a client have? Say it with --set privacy.rows=1000 and level=example"
        )
    return config, rows


def picture(planned: Plan) -> str:
    """Epsilon against rounds, one line for each amount of noise, as an SVG file."""
    each = planned.steps / planned.rounds
    at = sorted({max(1, round(planned.rounds * i / 12)) for i in range(1, 13)})
    series = [_course(row, planned, at, each, tone) for tone, row in enumerate(planned.noise, 1)]
    drawn = line_chart("Epsilon by round", series, lambda e: f"{e:.3g}")
    head, rest = drawn.split(">", 1)
    return f'{head} xmlns="http://www.w3.org/2000/svg" style="background:#fff">{_STYLE}{rest}\n'


def _course(row: Row, planned: Plan, at: Sequence[int], each: float, tone: int) -> Series:
    def spent(steps: int) -> float:
        event = Event(noise_multiplier=row.noise_multiplier, sampling=planned.sampling, times=steps)
        return epsilon([event], planned.delta)

    points = [(float(n), spent(math.ceil(each * n))) for n in at]
    return Series(name=f"noise {row.noise_multiplier:.3g}", points=points, tone=tone)
