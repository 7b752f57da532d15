"""Any method that is linear in its clients' answers, under secure aggregation: the server learns one sum a round.

The method is asked for its round, and its clients' answers are never seen: they add their updates up under masks
(`fedlora.privacy.secagg`), in five stages, each a yield of the round. From the sum the method gets one answer, the
weighted mean, as if one client of the largest rank had sent it. Since it folds answers by weighted sums alone, that
gives the same state (to the rounding of fixed point) as all answers together: a law that tests hold every such method
to. Ranks may differ where smaller updates are padded with zeros; clients whose tier of ranks is too small are moved
down before they train (`demoted`), or their columns would be shown.

Bonawitz et al., CCS 2017; FFA-LoRA under secure sums: Sun et al., ICLR 2024; nested ranks: docs/PRIVACY.md.
"""

from __future__ import annotations

import hashlib
from collections.abc import Generator, Mapping
from dataclasses import replace
from typing import Final

from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from fedlora.config import SecureConfig
from fedlora.config_secure import LEAST, LINEAR, NESTED
from fedlora.errors import AnswerRejected, MethodError, RoundFailed, WireError
from fedlora.privacy.secagg import messages
from fedlora.privacy.secagg.context import Context, demoted, roster, usual_threshold
from fedlora.privacy.secagg.fixed_point import FixedPoint
from fedlora.privacy.secagg.graph import least_degree
from fedlora.privacy.secagg.packing import Packing
from fedlora.privacy.secagg.refusal import Refused
from fedlora.privacy.secagg.server import SecureSum, Server
from fedlora.privacy.secagg.update import mean_of, packing
from fedlora.state import Answer, Ask, GlobalState, Secure, Stage, expected_arrays
from strategies.base import Closed, Cohort, Method, Round, plan_of_largest

__all__ = ["secured"]

_MEANINGLESS: Final = ("aggregation_error", "truncation_error")  # where there is one answer


def secured(method: Method, settings: SecureConfig) -> Method:
    """The same method, whose rounds are secure sums. Raises: MethodError for one that is not linear."""
    if method.name not in LINEAR:
        raise MethodError(
            f"{method.name} needs single updates, which a secure sum hides; under sums there are {', '.join(LINEAR)}"
        )

    def protocol(state: GlobalState, cohort: Cohort) -> Round:
        return _protocol(method, settings, state, cohort)

    return replace(method, protocol=protocol)


def _protocol(method: Method, settings: SecureConfig, state: GlobalState, cohort: Cohort) -> Round:
    try:
        ranks = demoted({m.id: m.rank for m in cohort.members}, settings.least)
    except Refused as error:
        raise RoundFailed(f"round {cohort.round}: {error}") from error
    members = tuple(replace(m, rank=ranks[m.id]) for m in cohort.members)
    inner = method.protocol(state, replace(cohort, members=members))
    asks = next(inner)
    largest = plan_of_largest(asks)
    _require_linear(method.name, asks)
    into = packing(expected_arrays(asks[largest], state.layout))
    session = _Session(state, cohort, asks, settings, into)
    try:
        total = yield from session.run(_trained(asks, largest, settings))
    except _Lost as lost:
        inner.close()
        return Closed(state=state, report={"lost": 1.0}, refused=(*session.refused, *lost.refused))
    mean = mean_of(total.values, into, clients=len(total.survivors), most=settings.examples)
    try:
        inner.send({largest: Answer(examples=mean.examples, arrays=mean.arrays)})
    except StopIteration as end:
        closed: Closed = end.value
    else:
        raise MethodError(f"{method.name}: asks its clients twice a round, which a secure sum does not do")
    report = {k: v for k, v in closed.report.items() if k not in _MEANINGLESS}
    report |= {"loss_before": mean.loss_before, "loss_after": mean.loss_after, "clipped": mean.clipped}
    report |= {"summed": float(len(total.survivors)), "examples": float(mean.examples)}
    return replace(closed, report=report, refused=tuple(session.refused))


def _require_linear(name: str, asks: Mapping[str, Ask]) -> None:
    """Raises: MethodError where the method's fold of these asks would be no weighted sum."""
    plans = [ask.plan for ask in asks.values() if ask.plan is not None]
    if any(plan.a_from == "fresh" for plan in plans):
        raise MethodError(f"{name}: clients would send factors on bases of their own, which add up to nothing")
    ranks = sorted({plan.rank for plan in plans})
    if name not in NESTED and len(ranks) > 1:
        raise MethodError(
            f"{name}: the sum of padded factors of ranks {ranks} is another mean than that of its answers; give all "
            f"clients one rank, or use {', '.join(NESTED)}"
        )


def _trained(asks: Mapping[str, Ask], largest: str, settings: SecureConfig) -> dict[str, Ask]:
    """The method's asks as those of the first stage."""
    reference = asks[largest].plan
    found = {}
    for client, ask in asks.items():
        assert ask.plan is not None
        assert reference is not None
        ratio = ask.plan.scale / reference.scale
        secure = Secure(stage="advertise", rows=reference.rank, ratio=ratio, examples=settings.examples)
        found[client] = replace(ask, secure=secure)
    return found


class _Lost(Exception):
    """The sum could not be opened after clients had begun to open it; the round is over without it."""

    def __init__(self, refused: tuple[AnswerRejected, ...]) -> None:
        self.refused = refused


class _Session:
    """One secure sum, between the stable ids of a run and the ids of signing keys."""

    def __init__(
        self,
        state: GlobalState,
        cohort: Cohort,
        asks: Mapping[str, Ask],
        settings: SecureConfig,
        into: Packing,
    ) -> None:
        keys = {m.id: m.key for m in cohort.members if m.id in asks}
        if without := [c for c, key in keys.items() if len(key) != 32]:
            raise RoundFailed(
                f"{without[0]} and {len(without) - 1} other clients told no signing key: secure sums need nodes with "
                "keys and a memory folder"
            )
        if cohort.session is None:
            raise MethodError("a secure sum needs the run and the number of its session in its cohort")
        own = X25519PrivateKey.generate()
        ranks = {c: plan.rank for c, ask in asks.items() if (plan := ask.plan) is not None}
        listed = roster({keys[c]: ranks[c] for c in asks})
        degree = least_degree(len(listed)) if len(listed) > 1 else 0
        try:
            self._context = Context(
                run=cohort.session.run,
                round=cohort.session.round,
                attempt=cohort.session.attempt,
                part=1,
                parts=1,
                base=state.base,
                layout=into.digest,
                basis=_basis(next(iter(asks.values()))),
                server_key=own.public_key().public_bytes_raw(),
                fixed_point=FixedPoint(size=into.size, clients=max(len(listed), 1), bound=settings.bound),
                threshold=usual_threshold(degree + 1),
                degree=degree,
                least_survivors=max(LEAST, settings.least),
                least_per_tier=settings.least,
                roster=listed,
            )
        except Refused as error:
            raise RoundFailed(f"round {cohort.round}: a sum of these clients would hide nothing: {error}") from error
        self._server = Server(self._context, own)
        by_key = {m.key: m.id for m in self._context.roster}
        self._inside = {c: by_key[keys[c]] for c in asks}  # stable id -> id in the session
        self._outside = {inside: c for c, inside in self._inside.items()}
        self.refused: list[AnswerRejected] = []

    def run(self, first: Mapping[str, Ask]) -> Generator[Mapping[str, Ask], Mapping[str, Answer], SecureSum]:
        """The five stages. Raises: RoundFailed while the round can be tried again, _Lost after that."""
        context = self._context.to_bytes()
        self._receive((yield {c: replace(ask, message=context) for c, ask in first.items()}))
        adverts = self._server.close_advertising()
        self._receive((yield self._asks("share", {i: m.to_bytes() for i, m in adverts.items()})))
        deliveries = self._server.close_sharing()
        self._receive((yield self._asks("mask", {i: m.to_bytes() for i, m in deliveries.items()})))
        survivors = self._server.close_masking()
        told = survivors.to_bytes()
        self._receive((yield self._asks("confirm", dict.fromkeys(survivors.ids, told))))
        requests = self._server.close_confirming()
        self._receive((yield self._asks("unmask", {i: m.to_bytes() for i, m in requests.items()})))
        try:
            return self._server.finish()
        except (RoundFailed, Refused, AnswerRejected) as error:
            raise _Lost((AnswerRejected("server", "secure sum", str(error)),)) from error

    def _asks(self, stage: Stage, told: Mapping[str, bytes]) -> dict[str, Ask]:
        return {self._outside[i]: Ask(secure=Secure(stage=stage), message=message) for i, message in told.items()}

    def _receive(self, answers: Mapping[str, Answer]) -> None:
        for client in sorted(answers):
            try:
                message = messages.from_client(answers[client].message, self._context)
                self._server.receive(self._inside[client], message)
            except (AnswerRejected, WireError) as error:
                rule = error.rule if isinstance(error, AnswerRejected) else "malformed"
                detail = error.detail if isinstance(error, AnswerRejected) else str(error)
                self.refused.append(AnswerRejected(client, rule, detail))


def _basis(ask: Ask) -> str:
    """What is public and common besides the base: the seed of A, as a digest."""
    seed = ask.plan.a_seed if ask.plan is not None else 0
    return hashlib.sha256(f"basis {seed}".encode()).hexdigest()
