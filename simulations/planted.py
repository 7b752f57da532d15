"""Faults put into the code of private sums and private training, to see whether the audit catches them.

Keys, coins and canaries are of a seed here, so that a repetition gives the same twice; it protects nothing.
"""

from __future__ import annotations

import hashlib
import itertools
import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any, Final
from unittest.mock import patch

import numpy as np
from numpy.typing import NDArray

import fedlora.training.private as training
import strategies.private as sums
from fedlora.adapter import Array
from fedlora.base import Base
from fedlora.errors import ConfigError
from fedlora.privacy.audit import Finding
from fedlora.privacy.clients import ClientPrivacy
from fedlora.privacy.clipping import clip_jointly, joint_norm
from fedlora.privacy.noise import Noise
from fedlora.training.private import PrivateGradient
from server.releases import Releases
from simulations.audit import ClientAudit, RowAudit, audit_clients, audit_rows

__all__ = ["CLIENT_FAULTS", "ROW_FAULTS", "clients_with", "noise_of", "rows_with"]

_NOISE: Final = {"half noise": 0.5, "a tenth": 0.1}
_CHARGED: Final = 4  # of so many rounds or steps one is charged, where charges are forgotten

ROW_FAULTS: Final = ("half noise", "a tenth", "no clip", "replayable", "forgotten charges")
CLIENT_FAULTS: Final = (*ROW_FAULTS, "clipped one by one", "head unclipped", "noise of the mean on the sum")

Clipped = tuple[dict[str, Array], float]


def clients_with(fault: str, settings: ClientAudit, seed: int) -> Finding:
    """What the audit finds in sums of clients with this fault, or "none". Raises: ConfigError for another name."""
    _known(fault, CLIENT_FAULTS)
    with noise_of(fault, seed, sums), ExitStack() as faults:
        if fault in _CLIPS:
            faults.enter_context(patch.object(sums, "clip_jointly", _CLIPS[fault]))
        if fault == "noise of the mean on the sum":
            faults.enter_context(patch.object(ClientPrivacy, "sd", _sd_of_the_mean))
        if fault == "forgotten charges":
            faults.enter_context(patch.object(Releases, "charge", _forgetful(Releases.charge)))
        return audit_clients(settings, harness=np.random.default_rng(seed))


def rows_with(fault: str, base: Base, settings: RowAudit, seed: int) -> Finding:
    """What the audit finds in private training with this fault, or "none". Raises: ConfigError for another name."""
    _known(fault, ROW_FAULTS)
    with noise_of(fault, seed, training), ExitStack() as faults:
        if fault == "no clip":
            faults.enter_context(patch.object(PrivateGradient, "_add_clipped", _unclipped(PrivateGradient)))
        if fault != "forgotten charges":
            return audit_rows(base, settings, harness=np.random.default_rng(seed))
        ran = replace(settings, steps=_CHARGED * settings.steps)
        found = audit_rows(base, ran, harness=np.random.default_rng(seed))
        return replace(found, claimed=settings.claimed)


def _known(fault: str, faults: tuple[str, ...]) -> None:
    if fault not in ("none", *faults):
        raise ConfigError(f"the faults to be planted are {', '.join(faults)}, or none; got {fault!r}")


@contextmanager
def noise_of(fault: str, seed: int, module: Any) -> Iterator[None]:
    """`module.Noise` of keys that follow from the seed, as strong as the fault says.

    Under "replayable" the keys are of the global generator, which is as it was before afterwards.
    """
    factor, numbers = _NOISE.get(fault, 1.0), itertools.count()

    class Scaled(Noise):
        def normal(self, shape: tuple[int, ...], sd: float) -> NDArray[np.float64]:
            return super().normal(shape, sd * factor)

    def made() -> Noise:
        if fault == "replayable":
            return Scaled._with_key(random.randbytes(32))
        return Scaled._with_key(hashlib.sha256(f"{seed}:{next(numbers)}".encode()).digest())

    before = random.getstate()
    random.seed(seed)
    try:
        with patch.object(module, "Noise", made):
            yield
    finally:
        random.setstate(before)


def _no_clip(arrays: Mapping[str, Array], clip: float) -> Clipped:
    return dict(arrays), joint_norm(arrays)


def _one_by_one(arrays: Mapping[str, Array], clip: float) -> Clipped:
    return {key: clip_jointly({key: x}, clip)[0][key] for key, x in arrays.items()}, joint_norm(arrays)


def _head_unclipped(arrays: Mapping[str, Array], clip: float) -> Clipped:
    clipped, norm = clip_jointly(arrays, clip)
    return {key: arrays[key] if key.startswith("head:") else x for key, x in clipped.items()}, norm


_CLIPS: Final = {"no clip": _no_clip, "clipped one by one": _one_by_one, "head unclipped": _head_unclipped}


def _sd_of_the_mean(terms: ClientPrivacy, slack: float = 0.0) -> float:
    return terms.multiplier * (terms.clip + slack) / terms.expected


def _forgetful(charge: Callable[[Releases, int], None]) -> Callable[[Releases, int], None]:
    return lambda ledger, number: charge(ledger, number) if number % _CHARGED == 1 else None


def _unclipped(gradient: type[PrivateGradient]) -> Callable[[PrivateGradient, Any, Any], None]:
    clipping = gradient._add_clipped

    def added(self: PrivateGradient, total: Any, counted: Any) -> None:
        kept, self.privacy = self.privacy, replace(self.privacy, clip=1e9)
        clipping(self, total, counted)
        self.privacy = kept

    return added
