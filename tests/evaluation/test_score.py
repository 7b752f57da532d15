"""Scores are sums, and teacher-forced correctness is greedy decoding's exact match."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as nnf

from fedlora.base import Base
from fedlora.data.rows import TokenRow
from fedlora.errors import DataError
from fedlora.evaluation.generate import generate
from fedlora.evaluation.score import score

Load = Callable[..., Base]


def greedy_answers(base: Base, rows: list[TokenRow], count: int) -> list[list[int]]:
    prompts = [row.tokens[: int(np.argmax(row.answer))].tolist() for row in rows]
    return generate(base, prompts, max_new_tokens=count, end_ids=[])


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_correct_rows_are_those_that_greedy_decoding_writes(family: str, load: Load, rows: list[TokenRow]) -> None:
    """Half of the rows get the model's own greedy answer, found with the key-value cache; some differ in one token."""
    base = load(family)
    written = greedy_answers(base, rows, 3)
    made, want = [], []
    for i, (row, answer) in enumerate(zip(rows, written, strict=True)):
        kept = list(answer)
        if i % 2:
            kept[i % 3] = (kept[i % 3] + 1) % 61
        start = int(np.argmax(row.answer))
        tokens = np.array([*row.tokens[:start], *kept], np.int32)
        made.append(TokenRow(tokens, np.arange(len(tokens)) >= start, None, row.group))
        want.append(i % 2 == 0)
    sums = score(base, made, batch_size=7)
    assert sums["correct"] == sum(want)
    assert sums["counted"] == len(rows)
    for group in ("g0", "g1"):
        assert sums[f"correct/{group}"] == sum(w for w, row in zip(want, made, strict=True) if row.group == group)
        assert sums[f"counted/{group}"] == 15


def test_loss_is_summed_over_answer_tokens(load: Load, rows: list[TokenRow]) -> None:
    base = load("llama")
    want, tokens = 0.0, 0
    for row in rows:
        logits = base.model(input_ids=torch.from_numpy(row.tokens.astype(np.int64))[None]).logits[0, :-1]
        at = torch.from_numpy(row.answer[1:])
        targets = torch.from_numpy(row.tokens[1:].astype(np.int64))[at]
        want += float(nnf.cross_entropy(logits[at], targets, reduction="sum"))
        tokens += len(targets)
    for batch_size in (1, 8, 100):
        sums = score(base, rows, batch_size=batch_size)
        assert sums["loss"] == pytest.approx(want, rel=1e-5)
        assert sums["tokens"] == tokens
    assert math.exp(sums["loss"] / sums["tokens"]) > 1


def test_classification_counts_rows(load: Load, labelled: list[TokenRow]) -> None:
    base = load("bert")
    logits = torch.cat(
        [base.model(input_ids=torch.from_numpy(r.tokens.astype(np.int64))[None]).logits for r in labelled]
    )
    labels = torch.tensor([r.label for r in labelled])
    sums = score(base, labelled, batch_size=8)
    assert sums["correct"] == float((logits.argmax(1) == labels).sum())
    assert sums["loss"] == pytest.approx(float(nnf.cross_entropy(logits, labels, reduction="sum")), rel=1e-5)
    assert sums["tokens"] == sums["counted"] == 30


def test_correct_among_the_choices_and_among_all(load: Load, labelled: list[TokenRow]) -> None:
    base = load("bert")
    logits = torch.cat(
        [base.model(input_ids=torch.from_numpy(r.tokens.astype(np.int64))[None]).logits for r in labelled]
    )
    held = [
        replace(row, choices=None if i % 3 == 0 else tuple({row.label, i % 2}))  # type: ignore[arg-type]
        for i, row in enumerate(labelled)
    ]
    sums = score(base, held, batch_size=8)
    loss, hit, hit_open = 0.0, [], []
    for row, line in zip(held, logits, strict=True):
        chosen = [0, 1, 2] if row.choices is None else sorted(row.choices)
        assert row.label is not None
        loss += float(nnf.cross_entropy(line[chosen][None], torch.tensor([chosen.index(row.label)])))
        hit.append(chosen[int(line[chosen].argmax())] == row.label)
        hit_open.append(int(line.argmax()) == row.label)
    assert sums["correct"] == sum(hit) > sum(hit_open) == sums["correct_open"]
    assert sums["loss"] == pytest.approx(loss, rel=1e-5)
    for group in ("g0", "g1"):
        members = [i for i, row in enumerate(held) if row.group == group]
        assert sums[f"correct/{group}"] == sum(hit[i] for i in members)
        assert sums[f"correct_open/{group}"] == sum(hit_open[i] for i in members)
        assert sums[f"counted/{group}"] == len(members)
    assert not any("open" in key for key in score(base, labelled, batch_size=8))


def test_sums_of_parts_add_up(load: Load, rows: list[TokenRow]) -> None:
    base = load("llama")
    whole, left, right = (score(base, r, batch_size=8) for r in (rows, rows[:13], rows[13:]))
    for key, x in whole.items():
        assert left[key] + right[key] == pytest.approx(x, rel=1e-5)


def test_no_rows_score_nothing(load: Load) -> None:
    assert score(load("llama"), [], batch_size=8) == {"correct": 0.0, "counted": 0.0, "loss": 0.0, "tokens": 0.0}


def test_rows_that_cannot_be_scored_are_refused(load: Load, rows: list[TokenRow]) -> None:
    silent = replace(rows[0], answer=np.zeros_like(rows[0].answer))
    with pytest.raises(DataError, match="1 of 31 rows to score have no answer token"):
        score(load("llama"), [silent, *rows], batch_size=8)
    with pytest.raises(DataError, match="30 of 30 rows to score have no label"):
        score(load("bert"), rows, batch_size=8)
