"""Batched greedy generation against one forward pass per token."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from fedlora.base import Base
from fedlora.errors import DataError
from fedlora.evaluation.generate import generate

Load = Callable[..., Base]
PROMPTS = [[5, 9, 2], [7], [1, 2, 3, 4, 5, 6, 7, 8], [60, 1]]


def slow(base: Base, prompt: list[int], count: int) -> list[int]:
    tokens = list(prompt)
    for _ in range(count):
        with torch.inference_mode():
            tokens.append(int(base.model(input_ids=torch.tensor([tokens])).logits[0, -1].argmax()))
    return tokens[len(prompt) :]


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_greedy_and_independent_of_the_batch(family: str, load: Load) -> None:
    base = load(family)
    want = [slow(base, p, 6) for p in PROMPTS]
    assert generate(base, PROMPTS, max_new_tokens=6, end_ids=[]) == want
    end = want[0][3]
    cut = [w[: w.index(end)] if end in w else w for w in want]
    assert generate(base, PROMPTS, max_new_tokens=6, end_ids=[end]) == cut


def test_what_cannot_be_generated(load: Load) -> None:
    base = load("llama")
    assert generate(base, [], max_new_tokens=3, end_ids=[]) == []
    with pytest.raises(DataError, match="an empty prompt cannot be continued"):
        generate(base, [[1], []], max_new_tokens=3, end_ids=[])
    with pytest.raises(DataError, match="a sequence-classification base writes nothing"):
        generate(load("bert"), [[1]], max_new_tokens=3, end_ids=[])
