"""Why updates need protection: training text, word for word, out of what one client sends after one step.

The gradient of a LoRA factor A is a sum of outer products with what its module read, so its rows lie in the span of
those inputs. In a decoder's first layer an input is a function of one token: every token of the vocabulary is tried,
and those whose input lies in the span were in the batch. Query, key and value read the same and are taken together:
three times the rank in dimensions. In the second layer an input depends on the tokens before it too: prefixes are made
longer by one recovered token at a time, as long as they lie in that layer's span. Nothing is optimised or guessed.

Source: Petrov et al., DAGER: Exact Gradient Inversion for Large Language Models, NeurIPS 2024 (arXiv 2405.15586), with
LoRA's A in place of the full weight, which bounds what can be told apart by the rank.

It needs a B that is not zero, so from the second round on (in the first, A has no gradient), plain gradient descent (an
AdamW step is nearly the gradient's sign and no longer in the span) and fewer tokens than three times the rank. That it
fails elsewhere protects nothing: other attacks ask for less.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray

from fedlora.adapter import Adapter, Array, Factors
from fedlora.base import Base
from fedlora.data.rows import TokenRow
from fedlora.errors import ConfigError
from fedlora.privacy.accounting import Privacy
from fedlora.privacy.audit import Inverted
from fedlora.rng import stream
from fedlora.state import Ask, Block, Header, LocalTraining, TrainPlan
from fedlora.training.attach import attach
from fedlora.training.local import train_client
from fedlora.wire import blocks_id

__all__ = ["KINDS", "invert", "rows_that_fit", "update"]

KINDS: Final[Mapping[str, str]] = {
    "gradient": "one step of gradient descent, unprotected",
    "adamw": "one step of AdamW, unprotected",
    "private": "one step of gradient descent, private rows",
}
RANK: Final = 32
SCALE: Final = 2.0
INSIDE: Final = 5e-3  # distance to the span, over the length: members are below 1e-3 (rounding), strangers above 0.1
RATE: Final = 0.5  # of gradient descent, its gradient clipped to norm 1 as ever
ADAM_RATE: Final = 5e-3
_WIDE: Final = 64  # prefixes that are followed at once; more are no reconstruction
LINEAR: Final = 1e6  # as in `simulations.audit`
_FULL: Final = 5e-5  # singular values above this share of the largest are no rounding


def rows_that_fit(base: Base, rows: Sequence[TokenRow], most: int = 2) -> list[TokenRow]:
    """The first rows, up to `most`, that have together fewer tokens than the span can tell apart.

    Raises: ConfigError if there is none.
    """
    chosen: list[TokenRow] = []
    room = len(_groups(base)[0]) * RANK - 2
    for row in rows:
        if len(chosen) < most and len(row.tokens) <= room:
            chosen.append(row)
            room -= len(row.tokens)
    if not chosen:
        raise ConfigError(f"inversion: no row has less than {room} tokens; give shorter ones")
    return chosen


def start(base: Base) -> dict[str, Array]:
    """A pair as after some rounds: A uniform within 1/sqrt(in), a small B."""
    draw = stream(0, "inversion")
    out: dict[str, Array] = {}
    for name, module in base.layout.modules.items():
        bound = module.inp**-0.5
        out[f"A:{name}"] = draw.uniform(-bound, bound, (RANK, module.inp)).astype(np.float32)
        out[f"B:{name}"] = (0.02 * draw.standard_normal((module.out, RANK))).astype(np.float32)
    return out


def update(
    base: Base, pair: Mapping[str, Array], rows: Sequence[TokenRow], kind: str, *, noise: float
) -> Mapping[str, Array]:
    """What a client that trained one step on all these rows sends: the changes of A and B, by key.

    `kind`: one of `KINDS`; private: clip 1, noise multiplier `noise`.
    Raises: TrainingError as `train_client`; ConfigError for another kind.
    """
    if kind not in KINDS:
        raise ConfigError(f"inversion: an update is one of {', '.join(KINDS)}, got {kind!r}")
    linear = kind != "adamw"
    training = LocalTraining(
        learning_rate=RATE * LINEAR if linear else ADAM_RATE,
        local_steps=1,
        local_epochs=None,
        batch_size=len(rows),
        warmup=0.0,
        beta1=0.0 if linear else 0.9,
        epsilon=LINEAR if linear else 1e-8,
    )
    privacy = Privacy(clip=1.0, noise_multiplier=noise, sampling=1.0, expected=float(len(rows)))
    plan = TrainPlan(
        method="inversion",
        rank=RANK,
        rows=RANK,
        scale=SCALE,
        train=("A", "B"),
        send=("A", "B"),
        changes=("A", "B"),
        training=training,
        privacy=privacy if kind == "private" else None,
    )
    header = Header(run="inversion", round=2, client="client", kind="train", base=base.fingerprint)
    return train_client(base, header, Ask(plan=plan, arrays=pair), rows).arrays


def invert(base: Base, rows: Sequence[TokenRow], kind: str, *, noise: float = 1.0) -> Inverted:
    """Send one update on these rows and read it; `noise` is the noise multiplier of private rows.

    Works for decoders whose first layer reads token embeddings without positions (Llama and its kin).
    Cost on the embedded base: seconds. Raises: TrainingError as `train_client`; ConfigError for another base.
    """
    first, second = _groups(base)[:2]
    pair = start(base)
    sent = update(base, pair, rows, kind, noise=noise)
    size = int(base.model.config.get_text_config().vocab_size)
    there = {int(t) for row in rows for t in row.tokens[:-1]}  # the last token of a row is predicted and never read
    factors = {n: Factors(pair[f"A:{n}"], SCALE * pair[f"B:{n}"], 1.0) for n in base.layout.modules}
    blocks = (Block(adapter=Adapter(factors), born=0),)
    attach(base, blocks, blocks_id(blocks))
    try:
        distances = _distances(sent, first, _inputs(base, first[0], np.arange(size)[:, None]))
        near = set(np.flatnonzero(distances < INSIDE).tolist())
        best = set(np.argsort(distances, kind="stable")[: len(there)].tolist())
        prefixes = _sequences(base, sent, second, sorted(near), max(len(row.tokens) for row in rows))
    finally:
        attach(base, (), blocks_id(()))
    want = {tuple(int(t) for t in row.tokens[:-1]) for row in rows}
    return Inverted(
        kind=kind,
        rows=len(rows),
        tokens=len(there),
        found=len(near & there),
        wrong=len(near - there),
        ranked=len(best & there),
        by_chance=len(there) ** 2 / size,
        texts=tuple(_text(base, prefix) for prefix in prefixes),
        whole=len(want & set(prefixes)),
    )


def _groups(base: Base) -> list[list[str]]:
    """Adapted modules that read the same input, three or more together, by layer: query, key and value."""
    owners: dict[str, list[str]] = {}
    for name, module in base.layout.modules.items():
        owners.setdefault(module.shares or name, []).append(name)
    groups = [sorted(names) for _, names in sorted(owners.items()) if len(names) >= 3]
    if len(groups) < 2 or base.task_type != "causal-lm":
        raise ConfigError(
            "inversion: the demonstration needs a decoder with query, key and value adapted in two layers"
        )
    return groups


def _inputs(base: Base, module: str, tokens: NDArray[np.int64]) -> NDArray[np.float64]:
    """What a module reads at the last of these tokens: `[sequences, length]` -> `[sequences, in]`."""
    kept: list[torch.Tensor] = []
    hook = base.layers[module].module.register_forward_pre_hook(lambda _, inputs: kept.append(inputs[0][:, -1]))
    try:
        with torch.inference_mode():
            for part in np.array_split(tokens, -(-len(tokens) // 512)):
                base.model(input_ids=torch.from_numpy(np.ascontiguousarray(part)).to(base.device), use_cache=False)
    finally:
        hook.remove()
    return torch.cat(kept).double().cpu().numpy()


def _distances(sent: Mapping[str, Array], modules: Sequence[str], inputs: NDArray[np.float64]) -> NDArray[np.float64]:
    """Of inputs `[n, in]` to the row space of the changes of A of these modules, over their lengths: `[n]`."""
    stacked = np.concatenate([sent[f"A:{name}"].astype(np.float64) for name in modules])
    _, values, right = np.linalg.svd(stacked, full_matrices=False)
    rows = right[values > _FULL * values[0]]
    outside = inputs - (inputs @ rows.T) @ rows
    return np.asarray(np.linalg.norm(outside, axis=1) / np.linalg.norm(inputs, axis=1))


def _sequences(
    base: Base, sent: Mapping[str, Array], modules: Sequence[str], tokens: Sequence[int], longest: int
) -> list[tuple[int, ...]]:
    """The longest sequences of these tokens all of whose prefixes lie in the span of the second layer's inputs."""
    growing: list[tuple[int, ...]] = [()]
    done: list[tuple[int, ...]] = []
    while growing and tokens and len(growing[0]) < longest and len(growing) <= _WIDE:
        tried = [(*prefix, token) for prefix in growing for token in tokens]
        distances = _distances(sent, modules, _inputs(base, modules[0], np.array(tried, np.int64)))
        longer = [one for one, d in zip(tried, distances, strict=True) if d < INSIDE]
        done += sorted(set(growing) - {one[:-1] for one in longer})
        growing = longer
    # The same token again and again reads as that token alone, and says nothing.
    return [one for one in done + growing if len(set(one)) > 1]


def _text(base: Base, tokens: Sequence[int]) -> str:
    return "" if base.tokenizer is None else str(base.tokenizer.decode(list(tokens)))
