"""Scores of the base with whatever is attached to it: sums, so that clients' scores add."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as nnf
from numpy.typing import NDArray

from fedlora.base import Base
from fedlora.data.batches import in_order
from fedlora.data.rows import TokenRow
from fedlora.errors import DataError
from fedlora.training.objective import among, answer_logits, class_logits

__all__ = ["all_logits", "score"]


def score(base: Base, rows: Sequence[TokenRow], *, batch_size: int) -> dict[str, float]:
    """Sums over the rows: `correct`, `counted`, `loss`, `tokens`, and per group `correct/<group>`, `counted/<group>`.

    Causal language models: a row is correct when every answer token is the most likely one given the tokens before it.
    By induction over the answer this is greedy decoding's exact match, token for token, at the cost of one forward
    pass. `loss` is summed over the `tokens` answer tokens, so perplexity is exp(loss / tokens).
    Classification: a row is correct when its label has the largest logit among its choices; `loss` is summed over rows,
    and `tokens` counts rows. Where any row has choices, `correct_open` and `correct_open/<group>` count the rows whose
    label has the largest logit of all classes. Batches run from the longest row to the shortest; logits exist only at
    answer positions.
    Raises: DataError if a row has no answer token, or no label.
    """
    classify = base.task_type == "sequence-classification"
    bad = sum((row.label is None) if classify else not row.answer[1:].any() for row in rows)
    if bad:
        raise DataError(f"{bad} of {len(rows)} rows to score have no {'label' if classify else 'answer token'}")
    right, right_open = np.zeros((2, len(rows)), np.bool_)
    loss = tokens = 0.0
    with torch.inference_mode():
        for batch, indices in in_order(rows, batch_size=batch_size, pad_id=base.pad_id):
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
    sums: dict[str, float] = defaultdict(float)
    sums.update(correct=float(right.sum()), counted=float(len(rows)), loss=loss, tokens=tokens)
    counts = {"correct": right, "counted": np.ones(len(rows), np.bool_)}
    if classify and any(row.choices is not None for row in rows):
        counts["correct_open"] = right_open
        sums["correct_open"] = float(right_open.sum())
    for i, row in enumerate(rows):
        if row.group:
            for what, flags in counts.items():
                sums[f"{what}/{row.group}"] += float(flags[i])
    return dict(sums)


def all_logits(base: Base, rows: Sequence[TokenRow], *, batch_size: int) -> NDArray[np.float32]:
    """The logits of every class, whatever a row's choices: `[rows, classes]`. Cost: one forward pass."""
    out = np.zeros((len(rows), base.model.config.num_labels), np.float32)
    with torch.inference_mode():
        for batch, indices in in_order(rows, batch_size=batch_size, pad_id=base.pad_id):
            out[indices] = class_logits(base, batch).cpu().numpy()
    return out
