"""Any method that is linear in its clients' answers, under secure aggregation: the server learns one sum a round.

The method is asked for its round, and its clients' answers are never seen: they add their updates up under masks
(`fedlora.privacy.secagg`), in five stages, each a yield of the round. From the sum the method gets one answer, the
weighted mean, as if one client of the largest rank had sent it. Since it folds answers by weighted sums alone, that
gives the same state (to the rounding of fixed point) as all answers together: a law that tests hold every such method
to. Ranks may differ where smaller updates are padded with zeros; clients whose tier of ranks is too small are moved
down before they train (`demoted`), or their columns would be shown.

`flora`, whose clients send products on bases of their own, goes in two parts: a secure sum finds the range of the sum
of the products, a second one, over the same clients, its coordinates in it. With `secure.columns` at least the sum of
the ranks that is the exact sum, at any ranks; with fewer, near its best approximation of that rank.

Where whole clients are private (`fedlora.privacy.clients`) each weighs 1, its arrays are clipped to the public clip,
and the sum is noised, by the server or by the clients before it, and divided by the clients that the run is planned
for. A round with too few clients for a sum is a null release: the state stays as it is, and the round is paid for.

Bonawitz et al., CCS 2017; sketches: Halko et al., 2011, and FedASK (2507.09990); FFA-LoRA under secure sums: Sun et
al., ICLR 2024; nested ranks: docs/PRIVACY.md.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Mapping
from dataclasses import replace

import numpy as np
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from numpy.typing import NDArray

from fedlora.adapter import Array
from fedlora.config import SecureConfig
from fedlora.config_secure import LEAST, LINEAR, SKETCHED
from fedlora.errors import AnswerRejected, MethodError, RoundFailed, WireError
from fedlora.privacy.clients import ClientPrivacy
from fedlora.privacy.noise import Noise
from fedlora.privacy.secagg import messages, sketch
from fedlora.privacy.secagg.context import Context, demoted, roster, usual_threshold
from fedlora.privacy.secagg.fixed_point import FixedPoint
from fedlora.privacy.secagg.graph import least_degree
from fedlora.privacy.secagg.packing import Packing
from fedlora.privacy.secagg.refusal import Refused
from fedlora.privacy.secagg.server import Server
from fedlora.privacy.secagg.update import Mean, basis_of, mean_of, packing, sum_shapes
from fedlora.privacy.secagg.whole import coding, count_in, slack_of, whole_of
from fedlora.rng import stream
from fedlora.state import Answer, Ask, GlobalState, Secure, Stage, TrainPlan, keyed, part
from strategies.base import Closed, Cohort, Method, Round
from strategies.one_answer import MEANINGLESS, closed_with, plan_in, ratio_of, reference_of, require_linear
from strategies.private import clip_after, clip_now

__all__ = ["secured"]


def secured(method: Method, settings: SecureConfig, terms: ClientPrivacy | None = None) -> Method:
    """The same method, whose rounds are secure sums, with `terms` under client-level privacy.

    Raises: MethodError for one that needs single updates, or whose two sums would be two releases.
    """
    if terms is not None and settings.columns is not None:
        raise MethodError(f"{method.name} by sketches: its two sums are two releases, and one is accounted for")
    if settings.columns is not None and method.name in SKETCHED:
        fold = _sketched
    elif method.name in LINEAR:
        fold = _summed
    else:
        raise MethodError(
            f"{method.name} needs single updates, which a secure sum hides; under sums there are {', '.join(LINEAR)}, "
            f"and by sketches (secure.columns) {', '.join(SKETCHED)}"
        )

    def protocol(state: GlobalState, cohort: Cohort) -> Round:
        now = None if terms is None else clip_now(terms, state)
        if now is not None and len(cohort.members) < max(LEAST, settings.least):
            return Closed(state=state, report={"null": 1.0, "clip": now.clip})
        session = _Sum(state, cohort, settings, now)
        try:
            closed, mean = yield from fold(method, state, cohort, session, settings)
        except _Lost as lost:
            why = AnswerRejected("server", "secure sum", str(lost))
            return Closed(state=state, report={"lost": 1.0}, refused=(*session.refused, why))
        if now is not None:
            closed = clip_after(now, mean.clipped, None, closed)
            report = {**closed.report, "summed": float(session.summed)}
            return replace(closed, report=report, refused=tuple(session.refused))
        report = {k: v for k, v in closed.report.items() if k not in MEANINGLESS}
        report |= {"loss_before": mean.loss_before, "loss_after": mean.loss_after, "clipped": mean.clipped}
        report |= {"summed": float(session.summed), "examples": float(mean.examples)}
        return replace(closed, report=report, refused=tuple(session.refused))

    return replace(method, protocol=protocol)


Folded = Generator[Mapping[str, Ask], Mapping[str, Answer], tuple[Closed, Mean]]


def _summed(method: Method, state: GlobalState, cohort: Cohort, session: _Sum, settings: SecureConfig) -> Folded:
    """One sum of what a linear method folds."""
    try:
        ranks = demoted({m.id: m.rank for m in cohort.members}, settings.least)
    except Refused as error:
        raise RoundFailed(f"round {cohort.round}: {error}") from error
    members = tuple(replace(m, rank=ranks[m.id]) for m in cohort.members)
    inner = method.protocol(state, replace(cohort, members=members))
    asks = next(inner)
    require_linear(method.name, asks)
    largest, reference = reference_of(asks)
    secure = Secure(stage="advertise", rows=reference.rank, examples=settings.examples, whole=session.whole)
    first = {
        client: replace(ask, secure=replace(secure, ratio=ratio_of(ask, reference))) for client, ask in asks.items()
    }
    mean = yield from session.part(first, reference, {c: plan_in(ask).rank for c, ask in asks.items()})
    return closed_with(method.name, inner, largest, Answer(examples=mean.examples, arrays=mean.arrays)), mean


def _sketched(method: Method, state: GlobalState, cohort: Cohort, session: _Sum, settings: SecureConfig) -> Folded:
    """Two sums over the same clients, which give the sum of their products: its range, then its coordinates in it.

    If part 2 fails the round is lost, never repeated: clients have opened part 1.
    """
    inner = method.protocol(state, cohort)
    asks = next(inner)
    largest, reference = reference_of(asks)
    columns = settings.columns
    assert columns is not None
    seed = int(stream(cohort.seed, "omega", cohort.round).integers(2**53))
    secure = Secure(stage="advertise", examples=settings.examples, columns=columns, seed=seed)
    ranks = dict.fromkeys(asks, 1)  # a sketch shows nothing of a rank
    first = yield from session.part({c: replace(a, secure=secure) for c, a in asks.items()}, reference, ranks)
    ranges = {
        n: sketch.public_range(y.astype(np.float64)).astype(np.float32) for n, y in part(first.arrays, "Y").items()
    }
    ask = Ask(secure=replace(secure, part=2), arrays=keyed("Q", ranges))
    try:
        mean = yield from session.part(dict.fromkeys(session.left, ask), reference, ranks, ranges)
    except RoundFailed as error:
        raise _Lost(str(error)) from error
    b = {n: q / np.float32(reference.scale) for n, q in ranges.items()}
    arrays = {**keyed("A", part(mean.arrays, "Z")), **keyed("B", b), **keyed("head", part(mean.arrays, "head"))}
    return closed_with(method.name, inner, largest, Answer(examples=mean.examples, arrays=arrays)), mean


class _Lost(Exception):
    """The sum could not be opened after clients had begun to open it; the round is over without it."""


class _Sum:
    """The secure sums of one round, between the stable ids of a run and the ids of signing keys.

    `refused` is what clients sent that broke a rule; `left` are the stable ids in the last sum, `summed` their number.
    """

    def __init__(self, state: GlobalState, cohort: Cohort, settings: SecureConfig, terms: ClientPrivacy | None) -> None:
        self._state, self._cohort, self._settings, self._terms = state, cohort, settings, terms
        self.whole = None if terms is None else whole_of(terms)
        self._keys = {m.id: m.key for m in cohort.members}
        self.refused: list[AnswerRejected] = []
        self.left: tuple[str, ...] = tuple(sorted(self._keys))

    @property
    def summed(self) -> int:
        return len(self.left)

    def part(
        self,
        first: Mapping[str, Ask],
        plan: TrainPlan,
        ranks: Mapping[str, int],
        ranges: Mapping[str, Array] | None = None,
    ) -> Generator[Mapping[str, Ask], Mapping[str, Answer], Mean]:
        """One sum, whose first asks are given; `plan` is of the largest rank, `ranks` are those of the roster.

        Raises: RoundFailed while it can be tried again, _Lost after that.
        """
        secure = next(iter(first.values())).secure
        assert secure is not None
        into = packing(sum_shapes(plan, secure, self._state.layout))
        own = X25519PrivateKey.generate()
        context = self._context(plan, secure, ranges or {}, {c: ranks[c] for c in first}, into, own)
        server = Server(context, own)
        inside = {self._keys[m]: m for m in first}
        outside = {member.id: inside[member.key] for member in context.roster}

        def receive(answers: Mapping[str, Answer]) -> None:
            ids = {client: i for i, client in outside.items()}
            for client in sorted(answers):
                try:
                    server.receive(ids[client], messages.from_client(answers[client].message, context))
                except AnswerRejected as error:
                    self.refused.append(AnswerRejected(client, error.rule, error.detail))
                except WireError as error:
                    self.refused.append(AnswerRejected(client, "malformed", str(error)))

        def asks(stage: Stage, told: Mapping[str, bytes]) -> dict[str, Ask]:
            ask = replace(secure, stage=stage)
            return {outside[i]: Ask(secure=ask, message=message) for i, message in told.items()}

        receive((yield {c: replace(ask, message=context.to_bytes()) for c, ask in first.items()}))
        adverts = server.close_advertising()
        receive((yield asks("share", {i: m.to_bytes() for i, m in adverts.items()})))
        deliveries = server.close_sharing()
        receive((yield asks("mask", {i: m.to_bytes() for i, m in deliveries.items()})))
        survivors = server.close_masking()
        receive((yield asks("confirm", dict.fromkeys(survivors.ids, survivors.to_bytes()))))
        requests = server.close_confirming()
        receive((yield asks("unmask", {i: m.to_bytes() for i, m in requests.items()})))
        try:
            total = server.finish()
            self.left = tuple(sorted(outside[i] for i in total.survivors))
            if self._terms is not None:
                return self._released(total.values, into, self._terms)
            return mean_of(total.values, into, clients=len(total.survivors), most=self._settings.examples)
        except (RoundFailed, Refused, AnswerRejected) as error:
            raise _Lost(str(error)) from error

    def _released(self, total: NDArray[np.float64], into: Packing, terms: ClientPrivacy) -> Mean:
        """The release out of the sum; `clipped` is the noised sum of the clients' indicators."""
        arrays, scalars = into.unpack(total)
        noise = Noise() if terms.by == "server" else None
        released = terms.released(arrays, noise, slack_of(terms.clip))
        within = count_in(scalars, terms.clip)
        if noise is not None and terms.adaptive is not None:
            within += float(noise.normal((), terms.adaptive.count_noise))
        return Mean(arrays=released, examples=1, loss_before=math.nan, loss_after=math.nan, clipped=within)

    def _context(
        self,
        plan: TrainPlan,
        secure: Secure,
        ranges: Mapping[str, Array],
        ranks: Mapping[str, int],
        into: Packing,
        own: X25519PrivateKey,
    ) -> Context:
        session, least = self._cohort.session, self._settings.least
        if session is None:
            raise MethodError("a secure sum needs the run and the number of its session in its cohort")
        if without := [c for c in ranks if len(self._keys[c]) != 32]:
            raise RoundFailed(
                f"{without[0]} and {len(without) - 1} other clients told no signing key: secure sums need nodes with "
                "keys and a memory folder"
            )
        listed = roster({self._keys[c]: rank for c, rank in ranks.items()})
        degree = least_degree(len(listed)) if len(listed) > 1 else 0
        try:
            return Context(
                run=session.run,
                round=session.round,
                attempt=session.attempt,
                part=secure.part,
                parts=2 if secure.columns else 1,
                base=self._state.base,
                layout=into.digest,
                basis=basis_of(plan, secure, ranges),
                server_key=own.public_key().public_bytes_raw(),
                fixed_point=self._coding(into.size, max(len(listed), 1)),
                threshold=usual_threshold(degree + 1),
                degree=degree,
                least_survivors=max(LEAST, least),
                least_per_tier=least,
                roster=listed,
            )
        except Refused as error:
            raise RoundFailed(
                f"round {self._cohort.round}: a sum of these clients would hide nothing: {error}"
            ) from error

    def _coding(self, size: int, clients: int) -> FixedPoint:
        if self.whole is not None:
            return coding(size, clients, self.whole)
        return FixedPoint(size=size, clients=clients, bound=self._settings.bound)
