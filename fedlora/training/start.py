"""Where a client's training starts: the pair and head that its Ask gives, or that it makes by itself."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from fedlora.adapter import Adapter, Factors
from fedlora.errors import BaseMismatch, TrainingError
from fedlora.rng import public_normal, public_orthonormal, stream
from fedlora.state import Ask, Header, Layout, Module, TrainPlan, part

__all__ = ["check_plan", "public_pair", "start"]

Float = NDArray[np.float32]
PROBE_TOLERANCE = 1e-5  # relative to the norm of the checksum


def check_plan(plan: TrainPlan, layout: Layout, who: str) -> None:
    """Raises: TrainingError if this base cannot follow the plan."""
    if not 1 <= plan.rank <= plan.rows:
        raise TrainingError(f"{who}: rank {plan.rank} must be between 1 and the pair's {plan.rows} rows")
    for name, module in layout.modules.items():
        if plan.rank > min(module.out, module.inp):
            raise TrainingError(
                f"{who}: rank {plan.rank} is above what {name} [{module.out}, {module.inp}] can hold; lower lora.ranks"
            )
    if not plan.train:
        raise TrainingError(f"{who}: the plan trains nothing; train must name A, B or head")
    if "head" in {*plan.train, *plan.send} and not layout.head:
        raise TrainingError(
            f"{who}: the plan names a head, this base has none; is model.task_type the same everywhere?"
        )
    if extra := set(plan.changes) - set(plan.send):
        raise TrainingError(f"{who}: changes of {sorted(extra)} are asked for, but only {list(plan.send)} is sent")
    if not (math.isfinite(plan.scale) and plan.scale != 0):
        raise TrainingError(f"{who}: scale must be finite and not 0, got {plan.scale}")
    t = plan.training
    if (t.local_steps is None) == (t.local_epochs is None):
        raise TrainingError(
            f"{who}: exactly one of local_steps and local_epochs must be set, got {t.local_steps} and {t.local_epochs}"
        )


def start(
    ask: Ask, plan: TrainPlan, header: Header, layout: Layout
) -> tuple[dict[str, Float], dict[str, Float], dict[str, Float]]:
    """A `[rows, in]` and B `[out, rows]` by module, and the head by name.

    Fresh A is uniform within 1/sqrt(in) (LoRA's usual Kaiming start), one stream per client and round over sorted
    modules. An embedding's fresh pair is the other way round, as in PEFT: A is zero and B normal, because looking up
    a zero B would give A no gradient. A public A is checked against the Ask's checksum `A @ probe` per module.
    Raises: TrainingError if an array is missing or misshapen; BaseMismatch if a public A is not the server's.
    """
    who = f"client {header.client}, round {header.round}"
    given_a, given_b, head = (part(ask.arrays, name) for name in ("A", "B", "head"))
    probes = part(ask.arrays, "probe")
    a: dict[str, Float] = {}
    b: dict[str, Float] = {}
    draw = stream(plan.seed, "fresh-a", header.client, header.round)
    for name, module in sorted(layout.modules.items()):
        shape_a, shape_b = (plan.rows, module.inp), (module.out, plan.rows)
        if plan.a_from == "given":
            a[name] = _given(given_a, f"A:{name}", name, shape_a, who)
        elif plan.a_from == "fresh":
            bound = 1 / math.sqrt(module.inp)
            a[name] = (draw.random(shape_a, np.float32) * 2 - 1) * np.float32(bound)
        else:
            a[name] = _public(plan.a_seed, plan.rows, name, module, probes, who)
        if plan.b_from == "given":
            b[name] = _given(given_b, f"B:{name}", name, shape_b, who)
        else:
            b[name] = np.zeros(shape_b, np.float32)
        if module.kind == "embedding" and plan.a_from == "fresh" and plan.b_from == "zero":
            a[name], b[name] = np.zeros(shape_a, np.float32), draw.standard_normal(shape_b, np.float32)
    heads = {name: _given(head, f"head:{name}", name, tuple(shape), who) for name, shape in sorted(layout.head.items())}
    return a, b, heads


def _given(arrays: Mapping[str, NDArray[np.floating]], key: str, name: str, shape: tuple[int, ...], who: str) -> Float:
    if name not in arrays:
        raise TrainingError(f"{who}: the plan starts from {key}, which the ask does not carry")
    if arrays[name].shape != shape:
        raise TrainingError(f"{who}: {key} has shape {arrays[name].shape}, the plan and this base need {shape}")
    return arrays[name].astype(np.float32)


def public_pair(ask: Ask, header: Header, layout: Layout) -> Adapter:
    """The pair that an evaluation attaches: B from the ask, A made here. Raises: as `start`, and if there is none."""
    who = f"client {header.client}, round {header.round}"
    if ask.public is None:
        raise TrainingError(f"{who}: the ask has no public pair")
    b, probes, rows = part(ask.arrays, "B"), part(ask.arrays, "probe"), ask.public.rows
    return Adapter(
        {
            name: Factors(
                _public(ask.public.seed, rows, name, module, probes, who),
                _given(b, f"B:{name}", name, (module.out, rows), who),
                ask.public.scale,
            )
            for name, module in layout.modules.items()
        }
    )


def _public(
    seed: int, rows: int, name: str, module: Module, probes: Mapping[str, NDArray[np.floating]], who: str
) -> Float:
    basis, checksum = _basis(seed, name, rows, module.inp)
    if name not in probes or probes[name].shape != checksum.shape:
        raise TrainingError(f"{who}: a public A needs its checksum probe:{name} of shape {checksum.shape} in the ask")
    off = float(np.linalg.norm(probes[name].astype(np.float64) - checksum))
    if not off <= PROBE_TOLERANCE * max(float(np.linalg.norm(checksum)), 1e-30):
        raise BaseMismatch(
            f"{who}: the public A of {name} made here from seed {seed} is not the server's: checksums differ by "
            f"{off:.2e}; do both sides run the same fedlora version?"
        )
    return basis


@functools.lru_cache(maxsize=4096)
def _basis(seed: int, name: str, rows: int, inp: int) -> tuple[Float, NDArray[np.float64]]:
    basis = np.asarray(public_orthonormal(seed, "basis", name, rows=rows, cols=inp), np.float32)
    probe = np.asarray(public_normal(seed, "probe", name, shape=(inp,)), np.float64)
    basis.flags.writeable = False
    return basis, basis.astype(np.float64) @ probe
