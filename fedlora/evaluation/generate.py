"""Greedy generation with whatever is attached to the base."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch

from fedlora.base import Base
from fedlora.errors import DataError

__all__ = ["generate"]


def generate(
    base: Base, prompts: Sequence[list[int]], *, max_new_tokens: int, end_ids: Collection[int]
) -> list[list[int]]:
    """What the model writes after each prompt: the most likely token every time, without the end token.

    One batch, padded on the left, with the key-value cache. A row ends at the first token of `end_ids`, or after
    `max_new_tokens`. Raises: DataError if a prompt is empty or the base is a classifier.
    """
    if base.task_type != "causal-lm":
        raise DataError(f"a {base.task_type} base writes nothing; score it instead")
    if not all(prompts):
        raise DataError("an empty prompt cannot be continued; it needs at least one token")
    if not prompts:
        return []
    length = max(map(len, prompts))
    tokens = torch.tensor([[base.pad_id] * (length - len(p)) + p for p in prompts], device=base.device)
    mask = torch.tensor([[0] * (length - len(p)) + [1] * len(p) for p in prompts], device=base.device)
    with torch.inference_mode():
        whole = base.model.generate(
            input_ids=tokens,
            attention_mask=mask,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            num_beams=1,
            temperature=None,
            top_p=None,
            top_k=None,
            pad_token_id=base.pad_id,
            eos_token_id=sorted(end_ids) or None,
        )
    return [_until(row[length:].tolist(), end_ids) for row in whole]


def _until(tokens: list[int], end_ids: Collection[int]) -> list[int]:
    ends = [i for i, token in enumerate(tokens) if token in end_ids]
    return tokens[: ends[0]] if ends else tokens
