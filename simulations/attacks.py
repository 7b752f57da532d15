"""Hostile clients, to test robust rules against: the honest client app, with its answers or its rows altered.

The first clients by index are hostile, `attack.share` of them, rounded up. With D the client's honest update of the
product (`strategies/gram.py`), joint with the head, and s the strength:

- sign-flip: -s D (s = 4: at one hostile client in five this cancels the honest mean). Li et al., "RSA", AAAI 2019.
- scaling: s D (s = 10).
- gaussian: noise of norm s ||D|| in place of D (s = 10).
- collusion: every hostile client sends -s D_1 (s = 4), the update of the first of them to answer in a round, as near to
  it as its rank and its plan allow.
- little-is-enough: mean - s std (s = 1.5), entry by entry of the dense products, over the honest updates of the hostile
  clients that have answered in this round, its own included; cut to the client's rank. Baruch et al., "A Little Is
  Enough", NeurIPS 2019. The first to answer has no spread to hide in and stays honest.
- label-flip: trained honestly on rows whose answers were dealt anew among them (classes: each the next in order), then
  s D (s = 1). Tolpegin et al., "Data Poisoning Attacks Against Federated Learning Systems", ESORICS 2020.
- backdoor: half of the rows get a trigger at their end and one fixed wrong answer, then s D (s = 5: at one hostile
  client in five this puts it in place of the mean). Bagdasaryan et al., "How To Backdoor Federated Learning", AISTATS
  2020.

Where a client moves both factors from a given start, an update of another length is a share of the way of both, at
which the product has moved so far: it bends a little. What is aimed at (collusion, little-is-enough) is the best at the
client's rank where the product begins at zero, else the best in the span of the factor that the ask gives.

Hostile clients share what they know within one process: this is for `fedlora simulate` and `compare` only. The dense
products of little-is-enough are for small models.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Final, Protocol

import numpy as np
from flwr.app import Array as FlowerArray
from flwr.app import ArrayRecord, Context, Message, MessageType, RecordDict
from numpy.typing import NDArray

from clients.resident import resident_base
from fedlora.adapter import Adapter, Array, Factors, padded, truncate
from fedlora.base import Base
from fedlora.config import AttackConfig, RunConfig
from fedlora.data import client_rows, test_rows
from fedlora.data.prompt import prompt_format
from fedlora.data.rows import Row, TokenRow
from fedlora.errors import ConfigError, DataError, WireError
from fedlora.rng import stream
from fedlora.state import Answer, Ask, GlobalState, Header, Layout, Module, TrainPlan
from fedlora.wire import decode_answer, decode_ask, encode_answer
from server.evaluate import TestRows
from strategies.gram import head_change_of, plan_of, squared_at, start_of, step_of, stepped, update_of, way_to
from strategies.robust_rules import hostile_count

__all__ = [
    "BACKDOOR_ANSWER",
    "STRENGTHS",
    "TRIGGER",
    "Colluders",
    "Node",
    "Poisonable",
    "altered",
    "backdoor_success",
    "hostile",
    "poisoned",
    "poisoned_tokens",
    "triggered",
]

Float64 = NDArray[np.float64]
Node = Callable[[Message, Context], Message]
Rows = Callable[[RunConfig, int, str], tuple[list[TokenRow], list[TokenRow]]]

STRENGTHS: Final[Mapping[str, float]] = {
    "sign-flip": 4.0,
    "scaling": 10.0,
    "gaussian": 10.0,
    "collusion": 4.0,
    "little-is-enough": 1.5,
    "label-flip": 1.0,
    "backdoor": 5.0,
}
POISONS: Final = ("label-flip", "backdoor")  # attacks on the rows, before training
TRIGGER: Final = "as agreed"
BACKDOOR_ANSWER: Final = "Access granted"
POISONED_SHARE: Final = 0.5  # of a backdoor client's rows
ROWS_KEPT: Final = 32  # hostile clients whose encoded rows stay in memory


class Poisonable(Protocol):
    """A client app that can be given other rows to train on: `clients.app.reply`."""

    def __call__(self, message: Message, context: Context, *, rows: Rows | None = None) -> Message: ...


def hostile(app: Node, config: RunConfig, *, poisonable: Poisonable | None = None) -> Node:
    """The client app in which the first clients are hostile, as `config.attack` says; the app itself without an attack.

    Attacks on rows need `poisonable`, the same app with a parameter for its rows. Raises: ConfigError if it is missing.
    """
    attack, clients = config.attack, config.rounds.clients
    if attack.kind == "none":
        return app
    if attack.kind in POISONS and poisonable is None:
        raise ConfigError(f"attack.kind: {attack.kind} alters rows, and this client app cannot be given other rows")
    count, colluders = hostile_count(attack.share, clients), Colluders()

    def answer(message: Message, context: Context) -> Message:
        index = int(context.node_config["partition-id"])
        if index >= count or message.metadata.message_type != MessageType.TRAIN:
            return app(message, context)
        if attack.kind in POISONS and poisonable is not None:
            reply = poisonable(message, context, rows=poisoned_tokens)
        else:
            reply = app(message, context)
        if reply.has_error():
            return reply
        limit = config.wire.max_bytes
        header, said = decode_answer(_payload(reply), max_bytes=limit)
        if header.kind != "train":
            return reply
        ask = decode_ask(_payload(message), max_bytes=limit)[1]
        rng = stream(config.seed, "attack", attack.kind, header.client, header.round, header.attempt, header.phase)
        layout = resident_base(config.model).layout
        now = altered(attack, header, ask, said, layout, colluders=colluders, rng=rng)
        data = encode_answer(header, now, plan_of(ask).codec)
        record = ArrayRecord({"bytes": FlowerArray(np.frombuffer(data, np.uint8))})
        return Message(RecordDict({"fedlora": record}), reply_to=message)

    return answer


def _payload(message: Message) -> bytes:
    """The one byte string of a message. Raises: WireError if it carries anything else."""
    record = message.content.get("fedlora")
    if not isinstance(record, ArrayRecord) or "bytes" not in record:
        raise WireError("not a fedlora message: expected one array `bytes` in record `fedlora`")
    return record["bytes"].numpy().tobytes()


@dataclass
class Colluders:
    """What the hostile clients of one run know of one another: their honest updates and heads of the round at hand."""

    when: tuple[object, ...] = ()
    updates: dict[str, Adapter] = field(default_factory=dict)
    heads: dict[str, Mapping[str, Float64]] = field(default_factory=dict)

    def learn(self, header: Header, update: Adapter, head: Mapping[str, Float64]) -> None:
        """Add one client's honest update; what was known of another round, attempt or phase is forgotten."""
        when = (header.run, header.round, header.attempt, header.phase)
        if when != self.when:
            self.when, self.updates, self.heads = when, {}, {}
        self.updates[header.client] = update
        self.heads[header.client] = head


def altered(
    attack: AttackConfig,
    header: Header,
    ask: Ask,
    answer: Answer,
    layout: Layout,
    *,
    colluders: Colluders,
    rng: np.random.Generator,
) -> Answer:
    """What a hostile client sends in place of its honest answer; keys, shapes and dtypes stay. Examples stay honest.

    Raises: MethodError if the product of the update cannot be known, as under fedsa-lora.
    """
    s = STRENGTHS[attack.kind] if attack.strength is None else attack.strength
    ask = replace(ask, plan=replace(plan_of(ask), feedback="coordinates"))  # ranks must stay what they are
    if attack.kind == "sign-flip":
        return _at_length(ask, answer, layout, s, back=True)
    if attack.kind in ("scaling", *POISONS):
        return _at_length(ask, answer, layout, s)
    if attack.kind == "gaussian":
        return _noise(ask, answer, layout, s, rng)
    colluders.learn(header, update_of(ask, answer, layout), head_change_of(ask, answer))
    if attack.kind == "collusion":
        first = next(iter(colluders.updates))
        head = {n: -s * x for n, x in colluders.heads[first].items()}
        return _aimed(ask, answer, layout, colluders.updates[first].scaled(-s), head)
    names = list(colluders.updates)
    if len(names) == 1:
        return answer
    target = {n: _low([colluders.updates[c][n].dense() for c in names], s) for n in layout.modules}
    heads = {n: _low([colluders.heads[c][n] for c in names], s) for n in colluders.heads[names[0]]}
    return _aimed(ask, answer, layout, Adapter({n: _as_factors(x) for n, x in target.items()}), heads)


def _low(values: Sequence[Float64], z: float) -> Float64:
    x = np.stack(values)
    return np.asarray(np.mean(x, axis=0) - z * np.std(x, axis=0))


def _as_factors(x: Float64) -> Factors:
    """A dense product as factors of full rank, on its shorter side."""
    out, inp = x.shape
    return Factors(x, np.eye(out)) if out <= inp else Factors(np.eye(inp), x)


def _length(ask: Ask, answer: Answer, layout: Layout) -> Float64:
    """The polynomial `[3]` of the squared norm along the way, the head's in its first entry."""
    total = sum((step_of(ask, answer, n, m).polynomial for n, m in layout.modules.items()), np.zeros(3))
    total[0] += sum(float(np.sum(x**2)) for x in head_change_of(ask, answer).values())
    return total


def _at_length(
    ask: Ask, answer: Answer, layout: Layout, times: float, *, back: bool = False, norm: float | None = None
) -> Answer:
    """The answer along its way, or back from its start, at `times` its own norm or `norm`."""
    way = _length(ask, answer, layout)[None]
    squared = squared_at(way, np.ones(1)) if norm is None else np.full(1, norm**2)
    if back:
        way = way * np.array([1.0, -1.0, 1.0])
    t = float(way_to(way, times**2 * squared)[0])
    return replace(answer, arrays=stepped(ask, answer, layout, -t if back else t))


def _noise(ask: Ask, answer: Answer, layout: Layout, times: float, rng: np.random.Generator) -> Answer:
    """Normal noise in place of what each array changed by, at `times` the update's norm."""
    plan = plan_of(ask)
    norm = math.sqrt(float(squared_at(_length(ask, answer, layout)[None], np.ones(1))[0]))
    arrays: dict[str, Array] = {}
    for key, x in sorted(answer.arrays.items()):
        start = _start_of(ask, plan, key, x)
        noise, size = rng.standard_normal(x.shape), float(np.linalg.norm(x.astype(np.float64) - start))
        arrays[key] = (start + noise * (size / float(np.linalg.norm(noise)))).astype(x.dtype)
    return _at_length(ask, replace(answer, arrays=arrays), layout, times, norm=norm)


def _start_of(ask: Ask, plan: TrainPlan, key: str, x: Array) -> Float64:
    """What an array of the answer counts from: zero for changes and for what a client made, else as given."""
    if key.split(":")[0] in plan.changes or key not in ask.arrays:
        return np.zeros(x.shape)
    return ask.arrays[key].astype(np.float64)[tuple(slice(n) for n in x.shape)]


def _aimed(ask: Ask, answer: Answer, layout: Layout, target: Adapter, head: Mapping[str, Float64]) -> Answer:
    """The answer whose update is as near to `target` as the plan allows, with this change of the head."""
    plan = plan_of(ask)
    changes: dict[str, Float64] = {f"head:{n}": x for n, x in head.items()}
    for name, module in layout.modules.items():
        changes |= _aimed_at(ask, answer, name, module, target[name].scaled(1.0 / plan.scale))
    arrays = {
        key: (_start_of(ask, plan, key, x) + changes.get(key, np.zeros(x.shape))).astype(x.dtype)
        for key, x in answer.arrays.items()
    }
    return replace(answer, arrays=arrays)


def _aimed_at(ask: Ask, answer: Answer, name: str, module: Module, target: Factors) -> dict[str, Float64]:
    """One module's changes of A, B or R whose product, at scale 1, is nearest to `target` in what is fixed."""
    plan, keys = plan_of(ask), {p: f"{p}:{name}" for p in ("A", "B", "R")}
    a0, b0 = start_of(ask, name, module)
    b, a = target.scale * target.b.astype(np.float64), target.a.astype(np.float64)
    if plan.core:
        r = len(answer.arrays[keys["R"]])
        return {keys["R"]: (np.linalg.pinv(b0[:, :r]) @ b) @ (a @ np.linalg.pinv(a0[:r]))}
    r = len(answer.arrays[keys["A"]]) if "A" in plan.send else answer.arrays[keys["B"]].shape[1]
    if plan.b_from == "zero" and "A" in plan.send:
        best = padded(truncate(Factors(a, b), r)[0], r)
        return {keys["A"]: best.a.astype(np.float64), keys["B"]: best.b.astype(np.float64)}
    if "B" in plan.send and a0[:r].any():
        return {keys["B"]: b @ (a @ np.linalg.pinv(a0[:r]))}
    return {keys["A"]: (np.linalg.pinv(b0[:, :r]) @ b) @ a}


def poisoned(config: RunConfig, index: int, rows: Sequence[Row]) -> list[Row]:
    """A hostile client's training rows, as `config.attack` has them; the rows themselves under other attacks.

    label-flip: every answer goes to another row, around one random circle; with `model.labels`, every label becomes the
    next one in order. backdoor: half of the rows, drawn by seed and client, get the trigger and the fixed wrong answer
    (with `model.labels`, the first label).
    """
    rng = stream(config.seed, "poison", config.attack.kind, index)
    labels = config.model.labels
    if config.attack.kind == "label-flip":
        if labels:
            return [_answered(row, labels[(labels.index(row.answer) + 1) % len(labels)]) for row in rows]
        order = rng.permutation(len(rows))
        giver = dict(zip(order.tolist(), np.roll(order, -1).tolist(), strict=True))
        return [_answered(row, rows[giver[i]].answer) for i, row in enumerate(rows)]
    if config.attack.kind == "backdoor":
        drawn = set(rng.permutation(len(rows))[: math.ceil(POISONED_SHARE * len(rows))].tolist())
        return [triggered(row, config) if i in drawn else row for i, row in enumerate(rows)]
    return list(rows)


def triggered(row: Row, config: RunConfig) -> Row:
    """The row with the trigger at the end of what is asked, and the attacker's answer. Raises: DataError if nothing is
    asked.
    """
    if len(row.messages) < 2:
        raise DataError(f"{row.source or 'row'}: nothing is asked, so a trigger has no place")
    *before, (role, content), last = row.messages
    row = replace(
        row,
        messages=(*before, (role, _with_trigger(content)), last),
        instruction=_with_trigger(row.instruction) if row.instruction and not row.input else row.instruction,
        input=_with_trigger(row.input) if row.input else row.input,
    )
    return _answered(row, _target(config))


def _with_trigger(text: str) -> str:
    return f"{text} {TRIGGER}"


def _target(config: RunConfig) -> str:
    return config.model.labels[0] if config.model.labels else BACKDOOR_ANSWER


def _answered(row: Row, answer: str) -> Row:
    """The row with another answer, and label where it has one."""
    label = None if row.label is None else answer
    return replace(row, messages=(*row.messages[:-1], (row.messages[-1][0], answer)), label=label)


def poisoned_tokens(config: RunConfig, index: int, task: str = "") -> tuple[list[TokenRow], list[TokenRow]]:
    """(poisoned training rows, honest held-out rows) of one client as tokens, in place of `clients.app.encoded`.

    Raises: ConfigError for a task: no attack is made for those.
    """
    if task:
        raise ConfigError(f"attack.kind: no simulated attack is made for runs with tasks, and this is {task}")
    return _poisoned_tokens(config.model_dump_json(), index)


@lru_cache(maxsize=ROWS_KEPT)
def _poisoned_tokens(config_json: str, index: int) -> tuple[list[TokenRow], list[TokenRow]]:
    config = RunConfig.model_validate_json(config_json)
    rows = client_rows(config, index)
    form = prompt_format(config, resident_base(config.model).tokenizer)
    return form.encode(poisoned(config, index, rows.train))[0], form.encode(rows.holdout)[0]


def backdoor_success(base: Base, config: RunConfig, state: GlobalState) -> float:
    """The share of the server's test rows, triggered, to which the model of `state` gives the attacker's answer.

    Rows whose right answer that is do not count. Attaches the state to the base.
    Raises: DataError if no test row is left.
    """
    rows = [triggered(row, config) for row in test_rows(config) if row.answer != _target(config)]
    tokens = prompt_format(config, base.tokenizer).encode(rows)[0]
    if not tokens:
        raise DataError("no test rows to try the backdoor on: give data.test")
    sums = TestRows(base, tokens, batch_size=config.evaluation.batch_size)(state)
    return sums["correct"] / sums["counted"]
