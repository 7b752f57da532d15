"""Attacks on our own private releases, with canaries: on clipped and noised sums of clients, and on private training.

Clients: T rounds of a method at client level, clipped, summed, noised by the server and charged by the code of a run
(`strategies.private`, `server.releases`). Canaries are orthogonal directions, several times as long as the clip, spread
over all arrays, heads included; the score of one is how far the state has moved along it. Not attacked: sampling, noise
by the clients, a clip that moves. Not seen: what the noised sum is divided by, which scales signal and noise alike.

Rows: `train_client` on the embedded base, with rows of random tokens, drawn, clipped and noised by the code that trains
in a run. Two attacks. *Gradients*: AdamW with an epsilon so large that it is plain gradient descent, in steps so small
that nothing else changes; each row's gradient, had from training on it alone without privacy, is told from the others
in the released change by least squares. What the optimiser does is no part of the claim, so the auditor may choose it.
*Losses*: AdamW as runs use it, at the auditor's learning rate, and how far each row's loss fell.

Clients and gradients are attacked twice over: a second release is made without the canaries, from the same global
seeds, and what it shows is taken off the first. Noise that anyone could draw again is then gone; noise from the
system's entropy is only doubled.
"""

from __future__ import annotations

import random
import secrets
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
import torch.nn.functional as nnf
from numpy.typing import NDArray

from fedlora.adapter import Adapter, Array, Factors
from fedlora.base import Base
from fedlora.config import load_config
from fedlora.data.batches import in_order
from fedlora.data.rows import TokenRow
from fedlora.errors import ConfigError
from fedlora.privacy.accounting import Privacy, epsilon
from fedlora.privacy.audit import Finding, auc, bounds
from fedlora.privacy.clients import client_privacy
from fedlora.state import Answer, Ask, Block, GlobalState, Header, Layout, LocalTraining, Module, TrainPlan, keyed
from fedlora.training.attach import attach
from fedlora.training.local import train_client
from fedlora.training.objective import answer_logits
from fedlora.wire import blocks_id
from server.releases import Releases
from strategies.base import Cohort, Member, pair_arrays, pair_of, play
from strategies.configured import configured

__all__ = ["ClientAudit", "RowAudit", "audit_clients", "audit_losses", "audit_rows", "canary_rows"]

CONFIDENCE: Final = 0.999
LINEAR: Final = 1e6  # AdamW's epsilon: far above any gradient, so that a step is the rate over it times the gradient
STEP: Final = 1e-3  # of gradient descent: rounding is far below what it changes, and curvature too
LENGTH: Final = 12  # tokens of a canary row, half of them answer

Float = NDArray[np.float64]


# -- clients


@dataclass(frozen=True, kw_only=True)
class ClientAudit:
    """`canaries` clients of `overshoot` times the clip, over `rounds` releases of noise `noise_multiplier`.

    An update is A `[rank, width]`, B `[width, rank]` and a head `[rank, width]`; each must have room for as many
    directions, and has its share of every canary.
    """

    canaries: int = 500
    rounds: int = 20
    noise_multiplier: float = 4.0
    clip: float = 1.0
    delta: float = 1e-5
    overshoot: float = 4.0
    rank: int = 8
    width: int = 80
    confidence: float = CONFIDENCE


def audit_clients(settings: ClientAudit, *, harness: np.random.Generator | None = None) -> Finding:
    """Attack a run of `rounds` rounds that canary clients join by fair coins; the claim is that of its own ledger.

    `harness` draws canaries and coins: leave it out, so that what is audited cannot know them.
    Cost: seconds at the defaults. Raises: ConfigError if there are more canaries than an array has numbers.
    """
    size, count = settings.rank * settings.width, settings.canaries
    if not 3 <= count <= size:
        raise ConfigError(f"audit: from 3 to {size} canaries fit in each array, got {count}")
    harness = harness or np.random.default_rng(secrets.randbits(128))
    frames = [np.linalg.qr(harness.standard_normal((size, count)))[0].T for _ in range(3)]
    frame = np.concatenate(frames, axis=1) / 3**0.5  # orthogonal in each array too
    joined = _coins(harness, count)
    updates = (settings.overshoot * settings.clip * frame).astype(np.float32)
    total, claimed = _run(settings, {int(i): updates[i] for i in np.flatnonzero(joined)})
    again, _ = _run(settings, {0: 0.0 * updates[0]})
    return _found(
        f"sums of clients, {settings.rounds} rounds",
        {"canary directions": frame @ total, "canary directions, replayed noise taken off": frame @ (total - again)},
        joined,
        claimed,
        settings.delta,
        settings.confidence,
        asdict(settings) | {"numbers": 3 * size},
    )


def _run(settings: ClientAudit, updates: Mapping[int, Array]) -> tuple[Float, float]:
    """What a run moves its state by, A, B and head as one vector, and the epsilon of its ledger."""
    rank, width = settings.rank, settings.width
    fields = {
        "method.name": "fedit",
        "lora.ranks": rank,
        "rounds.count": settings.rounds,
        "rounds.clients": settings.canaries,
        "privacy.level": "client",
        "privacy.clip": settings.clip,
        "privacy.noise_multiplier": settings.noise_multiplier,
        "privacy.delta": settings.delta,
    }
    config = load_config(None, [f"{key}={value}" for key, value in fields.items()])
    method = configured(config, client_privacy(config))
    layout = Layout(modules={"m": Module(out=width, inp=width)}, head={"w": (rank, width)})
    members = tuple(Member(id=f"client-{i:05d}", rank=rank, scale=1.0) for i in range(settings.canaries))
    drawn = {members[i].id: x for i, x in updates.items()}
    shapes = {"A:m": (rank, width), "B:m": (width, rank), "head:w": (rank, width)}
    cohort = Cohort(
        round=1,
        rounds=settings.rounds,
        members=tuple(m for m in members if m.id in drawn),
        settings=config.method,
        training=LocalTraining(learning_rate=1e-3, local_steps=1, local_epochs=None, batch_size=1),
        seed=0,
        progress=(0.0, 1.0),
    )

    def answered(client: str, ask: Ask) -> Answer:
        parts = zip(shapes.items(), np.split(drawn[client], 3), strict=True)
        return Answer(examples=1, arrays={key: x.reshape(shape) for (key, shape), x in parts})

    def flat(state: GlobalState) -> Float:
        arrays = {**pair_arrays(pair_of(state, method.name)), **keyed("head", state.open_task.extras)}
        return np.concatenate([arrays[key].ravel().astype(np.float64) for key in shapes])

    with (
        _rewound(),
        tempfile.TemporaryDirectory() as folder,
        closing(Releases(config, Path(folder), "audit", begun=False)) as ledger,
    ):
        first = state = method.open("audit", layout, members, config.method, 0)
        for number in range(1, settings.rounds + 1):
            ledger.charge(number)
            state = play(method.protocol(state, replace(cohort, round=number)), answered).state
        return flat(state) - flat(first), float(ledger.told()["epsilon"])


# -- rows


@dataclass(frozen=True, kw_only=True)
class RowAudit:
    """`repeats` times `canaries` rows, `steps` of training under `privacy`, pairs of rank `rank`, both factors trained.

    `learning_rate` is that of the attack by losses; that by gradients needs none.
    """

    privacy: Privacy
    canaries: int = 64
    steps: int = 2
    repeats: int = 10
    rank: int = 8
    learning_rate: float = 1e-2
    delta: float = 1e-5
    confidence: float = CONFIDENCE

    @cached_property
    def claimed(self) -> float:
        """Epsilon of one repeat: each has canaries of its own, so no row is in two."""
        return epsilon([self.privacy.event(self.steps)], self.delta)


def canary_rows(base: Base, count: int, harness: np.random.Generator) -> list[TokenRow]:
    """Rows of random tokens with random answers, which nothing but themselves can teach."""
    size = int(base.model.config.get_text_config().vocab_size)
    tokens = harness.integers(4, size, size=(count, LENGTH)).astype(np.int32)
    answer = np.arange(LENGTH) >= LENGTH // 2
    return [TokenRow(tokens=row, answer=answer) for row in tokens]


def audit_rows(base: Base, settings: RowAudit, *, harness: np.random.Generator | None = None) -> Finding:
    """Attack private training by its rows' gradients.

    The same canaries join every repeat, by other coins, and each repeat is trained by itself: a coin reaches one
    release alone. The second release is of as many copies of one more row, whose direction no score sees.
    Cost on the embedded base: a tenth of a second for each canary, and for each step of each repeat.
    Raises: TrainingError as `train_client`; ConfigError if canaries cannot be told apart.
    """
    harness = harness or np.random.default_rng(secrets.randbits(128))
    rows = canary_rows(base, settings.canaries + 1, harness)
    start = _start(base, settings.rank, harness)
    gradients = np.stack([_gradient(base, settings, start, [row], private=False) for row in rows])
    norms = np.linalg.norm(gradients, axis=1)
    clipped = gradients * np.minimum(1.0, settings.privacy.clip / norms)[:, None]
    gram = clipped @ clipped.T
    if np.linalg.cond(gram) > 1e12:
        raise ConfigError("audit: the canaries' gradients cannot be told apart; raise the rank or take fewer")
    inverse = np.linalg.inv(gram)
    alone = 1.0 / np.sqrt(np.diagonal(inverse))  # of each, the length that is in no other's direction
    seen: list[tuple[Float, Float, NDArray[np.bool_]]] = []
    for _ in range(settings.repeats):
        joined = _coins(harness, settings.canaries)
        chosen = [row for row, one in zip(rows, joined, strict=False) if one]
        with _rewound():
            total = _gradient(base, settings, start, chosen, private=True)
        with _rewound():
            again = _gradient(base, settings, start, rows[-1:] * len(chosen), private=True)
        plain, less = ((alone * (inverse @ (clipped @ x)))[:-1] for x in (total, total - again))
        seen.append((plain, less, joined))
    return _found(
        f"rows by gradients, {_how(settings)}",
        {
            "row gradients": np.concatenate([plain for plain, _, _ in seen]),
            "row gradients, replayed noise taken off": np.concatenate([less for _, less, _ in seen]),
        },
        np.concatenate([joined for _, _, joined in seen]),
        settings.claimed,
        settings.delta,
        settings.confidence,
        _told(settings) | {"strength": float(alone.mean() / settings.privacy.clip)},
    )


def audit_losses(base: Base, settings: RowAudit, *, harness: np.random.Generator | None = None) -> Finding:
    """Attack private training by its rows' losses, as anyone with the adapter can.

    `auc_without_privacy` in the settings is what the same attack reaches against the same training without noise or
    clip. Source: Yeom et al., CSF 2018 (arXiv 1709.01604), with the loss before training as the row's own difficulty.
    Cost on the embedded base: a tenth of a second for each step of each repeat.
    Raises: TrainingError as `train_client`.
    """
    harness = harness or np.random.default_rng(secrets.randbits(128))
    rows = canary_rows(base, settings.canaries, harness)
    start = _start(base, settings.rank, harness)
    before = _losses(base, start, rows)
    training = LocalTraining(
        learning_rate=settings.learning_rate,
        local_steps=settings.steps,
        local_epochs=None,
        batch_size=settings.canaries,
        warmup=0.0,
    )

    def attacked(*, private: bool) -> tuple[Float, NDArray[np.bool_]]:
        joined = _coins(harness, settings.canaries)
        chosen = [row for row, one in zip(rows, joined, strict=True) if one]
        changed = _trained(base, settings, start, chosen, training, private=private)
        return before - _losses(base, {key: start[key] + x for key, x in changed.items()}, rows), joined

    seen = [attacked(private=True) for _ in range(settings.repeats)]
    return _found(
        f"rows by losses, {_how(settings)}",
        {"fall of a row's loss": np.concatenate([scores for scores, _ in seen])},
        np.concatenate([joined for _, joined in seen]),
        settings.claimed,
        settings.delta,
        settings.confidence,
        _told(settings)
        | {"learning_rate": settings.learning_rate, "auc_without_privacy": auc(*attacked(private=False))},
    )


def _how(settings: RowAudit) -> str:
    return f"{settings.steps} steps, sampling {settings.privacy.sampling:.3g}"


def _told(settings: RowAudit) -> dict[str, Any]:
    told = asdict(settings)
    return {k: told[k] for k in ("privacy", "canaries", "steps", "repeats", "rank")}


def _start(base: Base, rank: int, harness: np.random.Generator) -> dict[str, Array]:
    """A pair on every module: A uniform within 1/sqrt(in), as LoRA's, and a small B, so that both have gradients."""
    out: dict[str, Array] = {}
    for name, module in base.layout.modules.items():
        bound = module.inp**-0.5
        out[f"A:{name}"] = harness.uniform(-bound, bound, (rank, module.inp)).astype(np.float32)
        out[f"B:{name}"] = (0.02 * harness.standard_normal((module.out, rank))).astype(np.float32)
    return out


def _gradient(
    base: Base, settings: RowAudit, start: Mapping[str, Array], rows: Sequence[TokenRow], *, private: bool
) -> Float:
    """What one step of descent shows of the gradient, flat; private: the sum over the steps of clipped, noised sums."""
    scale = settings.privacy.expected if private else 1.0
    training = LocalTraining(
        learning_rate=STEP * LINEAR,
        local_steps=settings.steps if private else 1,
        local_epochs=None,
        batch_size=max(1, len(rows)),
        warmup=0.0,
        beta1=0.0,
        epsilon=LINEAR,
        clip_norm=None,
    )
    changed = _trained(base, settings, start, rows, training, private=private)
    return np.concatenate([changed[key].ravel().astype(np.float64) for key in sorted(changed)]) * (-scale / STEP)


def _trained(
    base: Base,
    settings: RowAudit,
    start: Mapping[str, Array],
    rows: Sequence[TokenRow],
    training: LocalTraining,
    *,
    private: bool,
) -> Mapping[str, Array]:
    """The changes of A and B that a client answers with."""
    header = Header(run="audit", round=1, client="audit", kind="train", base=base.fingerprint)
    plan = TrainPlan(
        method="audit",
        rank=settings.rank,
        rows=settings.rank,
        scale=2.0,
        train=("A", "B"),
        send=("A", "B"),
        changes=("A", "B"),
        training=training,
        privacy=settings.privacy if private else None,
    )
    return train_client(base, header, Ask(plan=plan, arrays=start), rows).arrays


def _losses(base: Base, pair: Mapping[str, Array], rows: Sequence[TokenRow]) -> Float:
    """The mean loss of each row's answer tokens, under the pair on the bare base."""
    factors = {n: Factors(pair[f"A:{n}"], 2.0 * pair[f"B:{n}"], 1.0) for n in base.layout.modules}
    blocks = (Block(adapter=Adapter(factors), born=0),)
    attach(base, blocks, blocks_id(blocks))
    total, count = np.zeros(len(rows)), np.zeros(len(rows))
    with torch.inference_mode():
        for batch, chosen in in_order(rows, batch_size=64, pad_id=base.pad_id):
            for at, logits, target in answer_logits(base, batch):
                own = chosen[at.cpu().numpy()]
                np.add.at(total, own, nnf.cross_entropy(logits, target, reduction="none").double().cpu().numpy())
                np.add.at(count, own, 1.0)
    attach(base, (), blocks_id(()))
    return total / count


# -- both


def _coins(harness: np.random.Generator, count: int) -> NDArray[np.bool_]:
    """Fair coins, of which at least one fell on either side."""
    while True:
        coins = harness.random(count) < 0.5
        if 0 < coins.sum() < count:
            return coins


@contextmanager
def _rewound() -> Iterator[None]:
    """After it every global generator is as it was before, so that the next use draws the same again."""
    numpy, python, torches = np.random.get_state(), random.getstate(), torch.get_rng_state()
    try:
        yield
    finally:
        np.random.set_state(numpy)
        random.setstate(python)
        torch.set_rng_state(torches)


def _found(
    what: str,
    scores: Mapping[str, Float],
    joined: NDArray[np.bool_],
    claimed: float,
    delta: float,
    confidence: float,
    settings: Mapping[str, Any],
) -> Finding:
    return Finding(
        what=what,
        claimed=claimed,
        delta=delta,
        auc=max(auc(x, joined) for x in scores.values()),
        bounds=tuple(
            bound
            for attack, x in scores.items()
            for bound in bounds(x, joined, delta=delta, confidence=confidence, attack=attack)
        ),
        settings=settings,
    )
