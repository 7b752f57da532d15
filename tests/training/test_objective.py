"""Logits at answer positions only, against all logits and torch's cross-entropy."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as nnf

from fedlora.base import Base
from fedlora.data.batches import Batch, pad
from fedlora.data.rows import TokenRow
from fedlora.training import objective
from fedlora.training.lora import Pair
from fedlora.training.objective import among, answer_logits, class_logits, counted, loss_sum

Load = Callable[..., Base]


def reference(base: Base, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """All logits with the attention mask, then the positions before answer tokens: logits and targets."""
    tokens = torch.from_numpy(batch.tokens)
    logits = base.model(input_ids=tokens, attention_mask=torch.from_numpy(batch.attention)).logits
    answer = torch.from_numpy(batch.answer[:, 1:])
    return logits[:, :-1][answer], tokens[:, 1:][answer]


def adapt(base: Base) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    leaves = []
    for name, m in base.layout.modules.items():
        a = torch.randn(2, m.inp, generator=g).div(4).requires_grad_()
        b = torch.randn(m.out, 2, generator=g).div(4).requires_grad_()
        base.layers[name].set_pair(Pair(a, b, 1.0))
        leaves += [a, b]
    return leaves


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
@pytest.mark.parametrize("chunk", [7, 1024])
def test_loss_and_gradient_equal_the_full_logits(
    family: str, chunk: int, load: Load, rows: list[TokenRow], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(objective, "CHUNK", chunk)
    base = load(family)
    assert base.splits is (family != "gemma2")  # its logits pass a soft cap after the head
    leaves, batch = adapt(base), pad(rows[:9], 0)
    logits, targets = reference(base, batch)
    want = nnf.cross_entropy(logits, targets, reduction="sum")
    got = loss_sum(base, batch)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    for left, right in zip(torch.autograd.grad(got, leaves), torch.autograd.grad(want, leaves), strict=True):
        torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-4)
    assert counted(base, batch) == len(targets)
    with torch.inference_mode():
        parts = list(answer_logits(base, batch))
    torch.testing.assert_close(torch.cat([x for _, x, _ in parts]), logits.detach(), rtol=1e-4, atol=1e-4)
    assert torch.equal(torch.cat([t for _, _, t in parts]), targets)
    assert torch.cat([r for r, _, _ in parts]).tolist() == np.nonzero(batch.answer[:, 1:])[0].tolist()


def test_an_adapted_output_head_is_trained_too(load: Load, rows: list[TokenRow]) -> None:
    base = load("llama", target_modules=("lm_head", "q_proj"))
    leaves, batch = adapt(base), pad(rows[:5], 0)
    want = nnf.cross_entropy(*reference(base, batch), reduction="sum")
    for left, right in zip(
        torch.autograd.grad(loss_sum(base, batch), leaves), torch.autograd.grad(want, leaves), strict=True
    ):
        torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-4)


def test_logits_exist_at_answer_positions_only(load: Load, rows: list[TokenRow]) -> None:
    base, batch, seen = load("llama"), pad(rows, 0), []
    hook = base.model.lm_head.register_forward_hook(lambda _m, _i, out: seen.append(out.shape[:-1].numel()))
    with torch.inference_mode():
        list(answer_logits(base, batch))
    hook.remove()
    assert sum(seen) == counted(base, batch) < batch.tokens.size / 4


def test_class_logits_ignore_padding(load: Load, labelled: list[TokenRow]) -> None:
    base = load("bert")
    together = class_logits(base, pad(labelled[:6], 0))
    alone = torch.cat([class_logits(base, pad([row], 0)) for row in labelled[:6]])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)
    batch = pad(labelled[:6], 0)
    labels = torch.tensor([row.label for row in labelled[:6]])
    torch.testing.assert_close(loss_sum(base, batch), nnf.cross_entropy(alone, labels, reduction="sum"))
    assert counted(base, batch) == 6


def test_a_class_is_one_of_its_rows_choices(load: Load, labelled: list[TokenRow]) -> None:
    """The loss is that over the logits of the choices alone, row by row; other classes get no gradient."""
    base = load("bert")
    choices = [None, (0, 1, 2), (2, 0), (1, 2)]
    some = [
        replace(row, choices=c if c is None or row.label in c else (row.label,))
        for row, c in zip(labelled[:12], choices * 3, strict=True)
    ]
    logits = class_logits(base, pad(some, 0)).detach().requires_grad_()
    held = among(logits, pad(some, 0))
    want = torch.zeros(())
    for row, line, masked in zip(some, logits, held, strict=True):
        chosen = list(range(3)) if row.choices is None else sorted(row.choices)
        assert torch.equal(masked[chosen], line[chosen])
        assert torch.isneginf(masked).sum() == 3 - len(chosen)
        want = want + nnf.cross_entropy(line[chosen][None], torch.tensor([chosen.index(row.label)]))
    got = loss_sum(base, pad(some, 0))
    torch.testing.assert_close(got, want)
    (left,) = torch.autograd.grad(
        nnf.cross_entropy(held, torch.tensor([r.label for r in some]), reduction="sum"), logits
    )
    (right,) = torch.autograd.grad(want, logits)
    torch.testing.assert_close(left, right)
    assert among(logits, pad(labelled[:12], 0)) is logits
    everything = [replace(row, choices=(0, 1, 2)) for row in labelled[:12]]
    torch.testing.assert_close(loss_sum(base, pad(everything, 0)), loss_sum(base, pad(labelled[:12], 0)))
