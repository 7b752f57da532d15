"""Scores of the base with whatever is attached to it: sums, so that clients' scores add."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as nnf
from numpy.typing import NDArray

from fedlora.base import Base
from fedlora.data.batches import in_order
from fedlora.data.rows import TokenRow
from fedlora.errors import DataError
from fedlora.training.lora import Gates
from fedlora.training.objective import among, answer_logits, class_logits

__all__ = ["Outcomes", "all_logits", "outcomes", "score"]


@dataclass(frozen=True, kw_only=True)
class Outcomes:
    """Whether each row is right `[rows]`, among its choices and among all classes, and the summed loss of `tokens`."""

    right: NDArray[np.bool_]
    right_open: NDArray[np.bool_]
    loss: float
    tokens: float


def score(base: Base, rows: Sequence[TokenRow], *, batch_size: int, gates: Gates | None = None) -> dict[str, float]:
    """Sums over the rows: `correct`, `counted`, `loss`, `tokens`, and per group `correct/<group>`, `counted/<group>`.

    Causal language models: a row is correct when every answer token is the most likely one given the tokens before it.
    By induction over the answer this is greedy decoding's exact match, token for token, at the cost of one forward
    pass. `loss` is summed over the `tokens` answer tokens, so perplexity is exp(loss / tokens).
    Classification: a row is correct when its label has the largest logit among its choices; `loss` is summed over rows,
    and `tokens` counts rows. Where any row has choices, `correct_open` and `correct_open/<group>` count the rows whose
    label has the largest logit of all classes. Batches run from the longest row to the shortest; logits exist only at
    answer positions. `gates`: of a mixture that is attached, for these rows (`fedlora.training.attach.mixture`).
    Raises: DataError if a row has no answer token, or no label; or for a classifier's mixture, whose classes compete
    over several heads (see `all_logits`).
    """
    found = outcomes(base, rows, batch_size=batch_size, gates=gates)
    right = found.right
    sums: dict[str, float] = defaultdict(float)
    sums.update(correct=float(right.sum()), counted=float(len(rows)), loss=found.loss, tokens=found.tokens)
    counts = {"correct": right, "counted": np.ones(len(rows), np.bool_)}
    if base.task_type == "sequence-classification" and any(row.choices is not None for row in rows):
        counts["correct_open"] = found.right_open
        sums["correct_open"] = float(found.right_open.sum())
    for i, row in enumerate(rows):
        if row.group:
            for what, flags in counts.items():
                sums[f"{what}/{row.group}"] += float(flags[i])
    return dict(sums)


def outcomes(base: Base, rows: Sequence[TokenRow], *, batch_size: int, gates: Gates | None = None) -> Outcomes:
    """What `score` adds up, row by row. Raises: as `score`."""
    classify = base.task_type == "sequence-classification"
    bad = sum((row.label is None) if classify else not row.answer[1:].any() for row in rows)
    if bad:
        raise DataError(f"{bad} of {len(rows)} rows to score have no {'label' if classify else 'answer token'}")
    if classify and gates is not None:
        raise DataError("a classifier's mixture has a head for each task, and no one set of logits: ask all_logits")
    right, right_open = np.zeros((2, len(rows)), np.bool_)
    loss = tokens = 0.0
    with torch.inference_mode():
        for batch, indices in in_order(rows, batch_size=batch_size, pad_id=base.pad_id):
            if gates is not None:
                gates.take(indices)
            if classify:
                assert batch.labels is not None
                logits, labels = class_logits(base, batch), torch.from_numpy(batch.labels).to(base.device)
                chosen = among(logits, batch)
                loss += float(nnf.cross_entropy(chosen, labels, reduction="sum"))
                tokens += len(indices)
                right[indices] = (chosen.argmax(1) == labels).cpu().numpy()
                right_open[indices] = (logits.argmax(1) == labels).cpu().numpy()
                continue
            wrong = torch.zeros(len(indices), dtype=torch.bool, device=base.device)
            for at, logits, target in answer_logits(base, batch):
                loss += float(nnf.cross_entropy(logits, target, reduction="sum"))
                tokens += len(target)
                wrong[at[logits.argmax(1) != target]] = True
            right[indices] = ~wrong.cpu().numpy()
    return Outcomes(right=right, right_open=right_open, loss=loss, tokens=float(tokens))


def all_logits(
    base: Base, rows: Sequence[TokenRow], *, batch_size: int, gates: Gates | None = None
) -> NDArray[np.float32]:
    """The logits of every class, whatever a row's choices: `[rows, classes]`; with the gates of an attached mixture
    those of every task's head, `[rows, tasks, classes]`. Cost: one forward pass."""
    classes = base.model.config.num_labels
    out = np.zeros((len(rows), classes * (1 if gates is None else gates.tasks.shape[1])), np.float32)
    with torch.inference_mode():
        for batch, indices in in_order(rows, batch_size=batch_size, pad_id=base.pad_id):
            if gates is not None:
                gates.take(indices)
            out[indices] = class_logits(base, batch).cpu().numpy()
    return out if gates is None else out.reshape(len(rows), -1, classes)
