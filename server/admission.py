"""What a client sent is checked here, once, and accepted or refused by name. Inside, everything trusts it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import fields, replace

import numpy as np

from fedlora.adapter import Adapter, Array, Factors, norm
from fedlora.continual.design import second_moment
from fedlora.continual.router import omega
from fedlora.discriminants import scatter
from fedlora.errors import AnswerRejected, MethodError, WireError
from fedlora.rng import public_normal
from fedlora.state import Answer, Ask, Header, Layout, Measure, part
from fedlora.wire import decode_answer, peek
from strategies.gram import head_change_of, update_of

MAX_EXAMPLES = 10**9  # rows of one client; more is a mistake or an attempt to own the mean
MAX_VALUE = 1e6  # of a trained factor or head; far above any sane weight, far below what overflows float32 in a product
MAX_MEASURE = 1e15  # of a reported measure, so that sums over clients stay finite
SHARES = 1e-3  # how far from 1 shares may sum, in float32
_ROUNDING = 1e-3  # of sums over rows, relative; those in float32 are far closer
MAX_MEASURES = 4096  # names in one answer
_SUMS = {"correct", "counted", "loss", "tokens"}
_RULES = {"base": "other base", "code": "other code"}


class ReportedError(AnswerRejected):
    """No answer: the client says itself what went wrong. `rule` is the type of its error."""


def plain(text: object, limit: int) -> str:
    """A client's text as one printable line of at most `limit` characters, fit for a terminal and a log."""
    return "".join(c if c.isprintable() else " " for c in str(text)[:limit])


_SQUARES = (
    "energy:",
    "feature:count",
    "fisher-",
    "read:count",
    "read:energy",
)  # what a measurement cannot have below zero


def admit(data: bytes, asked: Header, *, expected: Mapping[str, tuple[int, ...]] | None, max_bytes: int) -> Answer:
    """Decode one answer to `asked`, or refuse it; cheap tests come first, nothing is allocated before the size test.

    Order: size, well-formed header, the header that was asked, field by field; an error that the client reports; exact
    keys and shapes (from the table; None leaves them to the caller); finite and sane values; row count (1 to 10^9 where
    it trained or measured); sane measures, and in an evaluation the sums that `fedlora.evaluation.score` returns.
    Raises: AnswerRejected with the client, the rule and what came.
    """

    def refuse(rule: str, detail: str) -> AnswerRejected:
        return AnswerRejected(asked.client, rule, plain(detail, 2000))  # keys are the client's in a hello

    try:
        header = peek(data, max_bytes=max_bytes)
        if header.kind == "error":
            require_echo(replace(header, kind=asked.kind), asked)
            info = decode_answer(data, max_bytes=max_bytes, expected={})[1].info
            raise ReportedError(
                asked.client, plain(info.get("error", "error"), 100), plain(info.get("message", ""), 2000)
            )
        require_echo(header, asked)
        _, answer = decode_answer(data, max_bytes=max_bytes, expected=expected)
    except WireError as error:
        raise refuse("malformed", plain(error, 2000)) from error
    for key, x in answer.arrays.items():
        largest = float(np.max(np.abs(x), initial=0.0))
        if not np.isfinite(largest):
            raise refuse(
                "not finite",
                f"{key} has {int(np.sum(~np.isfinite(x)))} NaN or infinite values of {x.size}; lower the learning rate "
                "or check the client's data",
            )
        if largest > MAX_VALUE:
            raise refuse("absurd value", f"{key} has a value of {largest:.3g}, at most {MAX_VALUE:g} is plausible")
        if asked.kind == "measure" and key.startswith(_SQUARES) and np.min(x, initial=0.0) < 0.0:
            raise refuse(
                "absurd value", f"{key} has a value of {float(x.min()):.3g}, and sums of squares have none below 0"
            )
    shares = answer.arrays.get("read:count") if asked.kind == "measure" else None
    if shares is not None and abs(float(np.sum(shares, dtype=np.float64)) - 1.0) > SHARES:
        raise refuse("absurd value", f"read:count sums to {float(np.sum(shares)):.4g}, and shares of rows sum to 1")
    if asked.kind == "secure" and (answer.examples or answer.metrics or answer.info):
        raise refuse("secure sum", "an answer in a secure sum carries its message and nothing else")
    least = 1 if asked.kind in ("train", "measure") else 0
    if not least <= answer.examples <= MAX_EXAMPLES:
        raise refuse(
            "example count", f"{plain(answer.examples, 40)} rows; the weight must be from {least} to {MAX_EXAMPLES:,}"
        )
    wrong = _wrong_measure(answer.metrics, sums=asked.kind == "evaluate")
    if wrong is not None:
        raise refuse("measures", plain(wrong, 400))
    return answer


def require_norm(ask: Ask, answer: Answer, client: str, layout: Layout, bound: float) -> None:
    """Refuse an update to a training ask whose norm is above `bound`.

    The norm is Frobenius, in product space, over all modules of `layout` and the changes of heads: rescaled factors of
    one product count the same (strategies/gram.py). Cost: O((out + in) r^2) a module.
    Raises: AnswerRejected with the norm that came.
    """
    seen = layout if ask.subspace is None else layout.within(ask.subspace.dim)
    update = update_of(ask, answer, seen)
    designed = part(ask.arrays, "N")
    if designed:
        update = Adapter({n: Factors(f.a @ designed[n].astype(np.float64), f.b, f.scale) for n, f in update.items()})
    heads = sum(float(np.sum(x**2)) for x in head_change_of(ask, answer).values())
    size = math.sqrt(norm(update) ** 2 + heads)
    if not size <= bound:
        raise AnswerRejected(
            client, "norm", f"its update has norm {size:.4g}, at most {bound:g} is taken (rounds.max_norm)"
        )


def require_moments(ask: Ask, answer: Answer, client: str) -> None:
    """Refuse sketches, counts and means (`fedlora.state.Measure`) of an admitted answer that no rows have.

    They add, so that in their sum nobody can be told apart; one that is no second moment would leave a sum from which
    no subspace, router or head can be made. What passes is what some rows may have given: it can still be false.
    Each sketch must be symmetric under its own Omega and hold no more than the energy beside it. Features, of norm 1,
    must be counted once for each row, and no class may have a sum that is longer than its count. The means of classes
    must fit in the energy of all, and the sketch of all less these means must still be that of a second moment.
    Cost: O(d s^2) for every sketch `[d, s]`. Raises: AnswerRejected, rule "moments", with what does not hold.
    """
    what, arrays = ask.measure, answer.arrays
    if what is None:
        return
    try:
        for name, sketch in part(arrays, "sketch").items():
            test = public_normal(what.seed, "sketch", name, shape=sketch.shape)
            second_moment(sketch, test, float(arrays[f"energy:{name}"][0]))
        if what.classes:
            _require_features(what, arrays, answer.examples)
        if what.reads:
            _require_classes("read", what, arrays, float(arrays["read:energy"][0]))
    except MethodError as error:
        raise AnswerRejected(client, "moments", str(error)) from error


def _require_features(what: Measure, arrays: Mapping[str, Array], examples: int) -> None:
    counts = arrays["feature:count"].astype(np.float64)
    if abs(counts.sum() - examples) > _ROUNDING * examples:
        raise MethodError(f"features of {counts.sum():g} rows were counted, and it measured {examples}")
    lengths = np.linalg.norm(arrays["feature:sum"].astype(np.float64), axis=1)
    for label in np.flatnonzero(lengths > (1.0 + _ROUNDING) * counts)[:1]:
        raise MethodError(
            f"feature:sum of class {label} has norm {lengths[label]:.4g}, and {counts[label]:g} features of norm 1 "
            "have no larger sum"
        )
    if what.columns:
        _require_classes("feature", what, arrays, float(counts.sum()))


def _require_classes(name: str, what: Measure, arrays: Mapping[str, Array], energy: float) -> None:
    """Sums, counts and sketch of rows by class, whose energy is that of all rows."""
    sums, counts = arrays[f"{name}:sum"].astype(np.float64), arrays[f"{name}:count"].astype(np.float64)
    squares, seen = np.sum(sums**2, axis=1), counts > 0.0
    if squares[~seen].any():
        raise MethodError(f"{name}:sum of class {np.flatnonzero(squares * ~seen)[0]} is not 0, and it has no rows")
    held = float(np.sum(squares[seen] / counts[seen]))
    if held > (1.0 + _ROUNDING) * energy:
        raise MethodError(f"the means of classes in {name}:sum hold {held:.4g}, and the energy of all is {energy:.4g}")
    sketch = arrays[f"{name}:sketch"]
    test = omega(what.seed, *sketch.shape)
    second_moment(sketch, test, energy)
    scatter(sums[seen], counts[seen], sketch, energy, test)


def require_echo(header: Header, asked: Header) -> None:
    """Refuse an answer to another question. Raises: AnswerRejected naming the first field that differs."""
    for field in fields(Header):
        came, wanted = getattr(header, field.name), getattr(asked, field.name)
        if came != wanted:
            rule = _RULES.get(field.name, "not the answer asked for")
            raise AnswerRejected(asked.client, rule, plain(f"{field.name} is {came!r}, asked was {wanted!r}", 400))


def _wrong_measure(metrics: Mapping[str, float], *, sums: bool) -> str | None:
    """What is wrong with the measures, if anything; `sums` are those of an evaluation (none: no rows held out)."""
    if len(metrics) > MAX_MEASURES:
        return f"{len(metrics)} measures, at most {MAX_MEASURES} are taken"
    for key, value in metrics.items():
        if not abs(value) <= MAX_MEASURE:
            return f"{key} is {value:g}, beyond {MAX_MEASURE:g}"
    if not sums or not metrics:
        return None
    groups = {key.split("/", 1)[1] for key in metrics if "/" in key}
    scores = ["correct", *(["correct_open"] if "correct_open" in metrics else [])]  # open: where rows have choices
    wanted = _SUMS | set(scores) | {f"{what}/{group}" for what in (*scores, "counted") for group in groups}
    if metrics.keys() != wanted:
        return f"missing {sorted(wanted - metrics.keys())[:5]}, unknown {sorted(metrics.keys() - wanted)[:5]}"
    negative = [key for key, value in metrics.items() if value < 0]
    if negative:
        return f"{negative[0]} is {metrics[negative[0]]:g}, a sum cannot be negative"
    for suffix in ("", *(f"/{group}" for group in sorted(groups))):
        counted = metrics[f"counted{suffix}"]
        for what in scores:
            if metrics[f"{what}{suffix}"] > counted:
                return f"{what}{suffix} is {metrics[f'{what}{suffix}']:g} of {counted:g}"
    return None
