"""The loss of a batch, with logits computed only where an answer token is predicted.

A prompt of sixty tokens and an answer of thirty need thirty rows of logits, not ninety; at a vocabulary of 32,000 the
rest is most of a small model's work. The frozen output head's gradient is taken while its logits are at hand, in
chunks, so they are never all alive (as in Wijmans et al. 2025, "Cut your losses in large-vocabulary language models").
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
import torch.nn.functional as nnf
from torch import Tensor, nn

from fedlora.base import Base
from fedlora.data.batches import Batch

__all__ = [
    "among",
    "answer_logits",
    "class_logits",
    "counted",
    "full_logits",
    "hidden_states",
    "loss_sum",
    "mean_states",
]

CHUNK = 1024  # rows of logits alive at once


def counted(base: Base, batch: Batch) -> int:
    """What the batch's loss is a sum over: predicted answer tokens, or rows for sequence classification.

    The first token of a row has nothing before it that could predict it and never counts.
    """
    return len(batch.tokens) if base.task_type == "sequence-classification" else int(batch.answer[:, 1:].sum())


def loss_sum(base: Base, batch: Batch) -> Tensor:
    """Cross-entropy summed over what `counted` counts, fp32, a scalar; a class is one of its row's choices."""
    if base.task_type == "sequence-classification":
        return nnf.cross_entropy(among(class_logits(base, batch), batch), _labels(base, batch), reduction="sum")
    where, targets = _predicted(base, batch)
    if not base.splits:
        logits = full_logits(base, batch).flatten(0, 1)[where]
        return nnf.cross_entropy(logits.float(), targets, reduction="sum")
    hidden = hidden_states(base, batch).flatten(0, 1)[where]
    head = base.model.get_output_embeddings()
    if not _plain_frozen(head):
        return nnf.cross_entropy(head(hidden).float(), targets, reduction="sum")
    out: Tensor = _FrozenHeadLoss.apply(hidden, head.weight, head.bias, targets)  # type: ignore[no-untyped-call]
    return out


def answer_logits(base: Base, batch: Batch) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """For evaluation: (row of the batch `[n]`, logits `[n, vocabulary]` fp32, answer token `[n]`), in chunks."""
    where, targets = _predicted(base, batch)
    rows = torch.div(where, batch.tokens.shape[1], rounding_mode="floor")
    split = base.splits
    states = (hidden_states if split else full_logits)(base, batch).flatten(0, 1)[where]
    head = base.model.get_output_embeddings() if split else nn.Identity()
    for part, at, target in zip(*(torch.split(x, CHUNK) for x in (states, rows, targets)), strict=True):
        yield at, head(part).float(), target


def class_logits(base: Base, batch: Batch) -> Tensor:
    """Logits `[rows, classes]`, fp32, of all classes."""
    if base.classifier is not None:
        means: Tensor = base.classifier(mean_states(base, batch, batch.attention))
        return means.float()
    out: Tensor = base.model(input_ids=_tensor(base, batch.tokens), attention_mask=_mask(base, batch)).logits
    return out.float()


def among(logits: Tensor, batch: Batch) -> Tensor:
    """Logits `[rows, classes]` with minus infinity where a class is none of its row's choices."""
    if batch.choices is None:
        return logits
    out = np.zeros(logits.shape, np.bool_)
    for row, choices in zip(out, batch.choices, strict=True):
        if choices is not None:
            row[:] = True
            row[list(choices)] = False
    return logits.masked_fill(torch.from_numpy(out).to(logits.device), -math.inf)


def _labels(base: Base, batch: Batch) -> Tensor:
    assert batch.labels is not None  # rows are checked before they become batches
    return _tensor(base, batch.labels)


def _tensor(base: Base, x: np.ndarray[Any, Any]) -> Tensor:
    return torch.from_numpy(x).to(base.device)


def _predicted(base: Base, batch: Batch) -> tuple[Tensor, Tensor]:
    """Flat positions `[n]` whose next token is an answer token, and those tokens `[n]`."""
    ahead = np.zeros_like(batch.answer)
    ahead[:, :-1] = batch.answer[:, 1:]
    where = np.flatnonzero(ahead)
    return _tensor(base, where), _tensor(base, batch.tokens.reshape(-1)[where + 1])


def _mask(base: Base, batch: Batch) -> Tensor | None:
    """None where every row has the same length."""
    return None if batch.attention.all() else _tensor(base, batch.attention)


def hidden_states(base: Base, batch: Batch) -> Tensor:
    """Last hidden states `[rows, length, features]`, in the base's dtype.

    A causal model gets no mask: its attention never looks right at the padding.
    """
    encoder, tokens = getattr(base.model, base.model.base_model_prefix), _tensor(base, batch.tokens)
    if base.task_type == "causal-lm":
        states: Tensor = encoder(input_ids=tokens, use_cache=False).last_hidden_state
    else:
        states = encoder(input_ids=tokens, attention_mask=_mask(base, batch)).last_hidden_state
    return states


def mean_states(base: Base, batch: Batch, where: np.ndarray[Any, Any]) -> Tensor:
    """The mean `[rows, features]`, fp32, of each row's last hidden states where `where` `[rows, length]` is 1."""
    there = torch.from_numpy(where).to(base.device, torch.float32)
    states = hidden_states(base, batch).float()
    return (there[:, None] @ states)[:, 0] / there.sum(1, keepdim=True)


def full_logits(base: Base, batch: Batch) -> Tensor:
    out: Tensor = base.model(input_ids=_tensor(base, batch.tokens), use_cache=False).logits
    return out


def _plain_frozen(head: nn.Module) -> bool:
    return "forward" not in head.__dict__ and type(head) is nn.Linear


class _FrozenHeadLoss(torch.autograd.Function):
    """Summed cross-entropy of `hidden [n, d]` under a frozen head, with its gradient taken in the forward pass.

    Saves `[n, d]` instead of `[n, vocabulary]`; d loss / d hidden = (softmax - onehot) W.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> Tensor:
        total = hidden.new_zeros((), dtype=torch.float32)
        wanted = ctx.needs_input_grad[0]
        gradient = torch.empty_like(hidden) if wanted else None
        for start in range(0, len(hidden), CHUNK):
            part, target = hidden[start : start + CHUNK], targets[start : start + CHUNK]
            logits = nnf.linear(part, weight, bias).float()
            logits -= logits.amax(dim=1, keepdim=True)
            gold = logits.gather(1, target[:, None])
            mass = logits.exp_().sum(dim=1, keepdim=True)
            total += (mass.log() - gold).sum()
            if gradient is not None:
                logits /= mass
                logits.scatter_add_(1, target[:, None], torch.full_like(gold, -1.0))
                gradient[start : start + CHUNK] = logits.to(weight.dtype) @ weight
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return gradient * grads[0].to(gradient.dtype), None, None, None
