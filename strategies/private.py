"""Any linear method with whole clients private, the server trusted with single updates: it clips, sums and noises.

    the method's one answer = (sum over answers of clip_C(x_k) + N(0, (z C)^2 I)) / (q K)

The sum is over the clients that were drawn; what is divided by is fixed (`fedlora.privacy.clients`). Who drops out
or is refused adds nothing. Where nobody was drawn the answer is noise, in the shapes that the enrolled clients would
have sent, so nobody can tell from a release how many there were. Nothing else of single clients is in the report.

McMahan et al., ICLR 2018 (1710.06963); the clip that follows a quantile: Andrew et al., NeurIPS 2021 (1905.03871).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Final

import numpy as np

from fedlora.adapter import Array
from fedlora.config_secure import LINEAR
from fedlora.errors import MethodError
from fedlora.privacy.clients import ClientPrivacy
from fedlora.privacy.clipping import clip_jointly
from fedlora.privacy.noise import Noise
from fedlora.privacy.secagg.update import padded
from fedlora.state import Answer, GlobalState, expected_shapes
from strategies.base import Closed, Cohort, Method, Round
from strategies.one_answer import MEANINGLESS, closed_with, ratio_of, reference_of, require_linear

__all__ = ["clip_after", "clip_now", "private_clients"]

_OWNER: Final = "private-clients"  # in GlobalState.memory: the clip, where it moves


def private_clients(method: Method, terms: ClientPrivacy) -> Method:
    """The same method under client-level privacy, noised by the server.

    Each round costs `terms.event()`, also where nobody was drawn; to charge it first is the caller's.
    Raises: MethodError for a method that is not linear in its answers.
    """
    if method.name not in LINEAR:
        raise MethodError(
            f"{method.name}: whole clients are private in sums of updates of one kind, which are those of "
            f"{', '.join(LINEAR)}"
        )

    def protocol(state: GlobalState, cohort: Cohort) -> Round:
        now, drawn = clip_now(terms, state), {m.id for m in cohort.members}
        inner = method.protocol(state, replace(cohort, members=cohort.enrolled or cohort.members))
        asks = next(inner)
        require_linear(method.name, asks)
        largest, reference = reference_of(asks)
        asks = {client: ask for client, ask in asks.items() if client in drawn}
        answers: Mapping[str, Answer] = {}
        if asks:
            answers = yield asks
        shapes = expected_shapes(reference, state.layout)
        total: dict[str, Array] = {key: np.zeros(shape) for key, shape in shapes.items()}
        adaptive, within = now.adaptive, 0.0
        for client in sorted(answers):
            update, norm = clip_jointly(
                padded(answers[client].arrays, shapes, ratio_of(asks[client], reference)), now.clip
            )
            within += adaptive.indicator(norm) if adaptive else 0.0
            for key, x in update.items():
                total[key] += x
        noise = Noise()
        mean = Answer(examples=1, arrays=now.released(total, noise))
        return clip_after(now, within, noise, closed_with(method.name, inner, largest, mean))

    return replace(method, protocol=protocol)


def clip_now(terms: ClientPrivacy, state: GlobalState) -> ClientPrivacy:
    """The terms at the clip of this round."""
    return terms.at(float(state.memory[_OWNER]["clip"][0])) if _OWNER in state.memory else terms


def clip_after(now: ClientPrivacy, within: float, noise: Noise | None, closed: Closed) -> Closed:
    """The round with the next clip, where it moves, and the report of a private round.

    `within` is the sum of the clients' indicators; without `noise` it is noised already.
    """
    if now.adaptive is not None:
        clip = now.adaptive.after(within, noise).clip
        memory = {**closed.state.memory, _OWNER: {"clip": np.array([clip], np.float64)}}
        closed = replace(closed, state=replace(closed.state, memory=memory))
    report = {k: v for k, v in closed.report.items() if k not in MEANINGLESS} | {"clip": now.clip}
    return replace(closed, report=report, clients={})
