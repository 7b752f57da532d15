"""Rows that mix experts in one pass, against dense weights row by row and against the ordinary layer."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import nn
from transformers.pytorch_utils import Conv1D

from fedlora.adapter import Adapter, Factors
from fedlora.base import Base
from fedlora.data.rows import TokenRow
from fedlora.errors import AdapterError, DataError
from fedlora.evaluation.generate import generate
from fedlora.evaluation.score import all_logits, outcomes, score
from fedlora.state import Block, Module
from fedlora.training.attach import attach, mixture
from fedlora.training.lora import Gates, LoraLayer, along
from fedlora.wire import blocks_id

KNOWN = np.array([[1.0, 0.0, 0.0], [1.0, 1.0, 0.0], [1.0, 1.0, 1.0]])  # of three tasks, one trained on another


def factors(rng: np.random.Generator, out: int, inp: int, rank: int, scale: float = 1.0) -> Factors:
    a, b = rng.normal(size=(rank, inp)), rng.normal(size=(out, rank))
    return Factors(a.astype(np.float32) / 2, b.astype(np.float32) / 2, scale)


@pytest.mark.parametrize("kind", ["linear", "conv1d", "embedding"])
@pytest.mark.parametrize("folds", [True, False])
def test_every_row_has_its_own_weight(kind: str, folds: bool) -> None:
    rng, inp, out = np.random.default_rng(0), 7, 5
    module: nn.Module = {
        "linear": lambda: nn.Linear(inp, out),
        "conv1d": lambda: Conv1D(out, inp),
        "embedding": lambda: nn.Embedding(inp, out),
    }[kind]()
    module.requires_grad_(False)
    layer = LoraLayer(module, Module(out=out, inp=inp, kind=kind), folds=folds)  # type: ignore[arg-type]
    shared, private = factors(rng, out, inp, 2), factors(rng, out, inp, 1)
    experts = [factors(rng, out, inp, r, s) for r, s in ((1, 1.0), (3, 0.5), (2, 2.0))]
    dense = module.weight.double() if kind == "linear" else module.weight.t().double()
    layer.set_blocks(shared)
    layer.set_frozen(private)
    known = torch.from_numpy(KNOWN).float()
    weights = torch.tensor([[0.2, 0.5, 0.3], [1.0, 0.0, 0.0], [0.0, 0.25, 0.75], [0.0, 0.0, 1.0]])
    gates = Gates(weights, known)
    folded = [f.folded() for f in experts]
    whole = Factors(np.concatenate([f.a for f in folded]), np.concatenate([f.b for f in folded], 1))
    layer.set_experts(whole, [0, 1, 1, 1, 2, 2], gates)
    rows = [2, 0, 3]
    gates.take(rows)
    ids = torch.from_numpy(rng.integers(0, inp, (3, 4)))
    x = nn.functional.one_hot(ids, inp).float() if kind == "embedding" else torch.randn(3, 4, inp)
    got = module(ids if kind == "embedding" else x)
    bias = 0.0 if kind == "embedding" else module.bias.double()
    for i, row in enumerate(rows):
        g = (weights[row] @ known).tolist()
        product = sum(share * f.dense() for share, f in zip(g, experts, strict=True))
        w = dense + torch.from_numpy(shared.dense() + private.dense() + product).double()
        torch.testing.assert_close(got[i].double(), x[i].double() @ w.t() + bias, rtol=1e-5, atol=1e-5)
    layer.set_experts(None)
    assert module.__dict__["forward"] == layer.forward


@pytest.mark.parametrize(
    ("shape", "rows"),
    [((3, 4), [0, 1, 2]), ((3,), [0, 1, 2]), ((6,), [0, 0, 1, 1, 2, 2]), ((1, 4), [0, 1, 2]), ((3, 2, 4), [0, 1, 2])],
)
def test_gates_find_their_rows(shape: tuple[int, ...], rows: list[int]) -> None:
    found = along(torch.tensor([[0.0, 3.0], [1.0, 4.0], [2.0, 5.0]]), shape)
    assert found.flatten(0, -2)[:, 0].tolist() == [float(r) for r in rows]
    lead = torch.broadcast_shapes(found.shape[:-1], shape)
    assert len(lead) == len(shape)


@pytest.mark.parametrize("shape", [(4,), (2, 4), (0,)])
def test_rows_that_cannot_be_told_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(AdapterError, match=r"mixture of 3 rows met .*target_modules"):
        along(torch.zeros(3, 2), shape)


def blocks_of(base: Base, seed: int = 1) -> list[Block]:
    rng = np.random.default_rng(seed)
    return [
        Block(adapter=Adapter({n: factors(rng, m.out, m.inp, r) for n, m in base.layout.modules.items()}), born=r)
        for r in (2, 1, 3)
    ]


def heads_of(base: Base) -> list[dict[str, NDArray[np.float32]]]:
    rng = np.random.default_rng(2)
    return [
        {n: (x + rng.normal(size=x.shape)).astype(np.float32) for n, x in base.initial_head.items()} for _ in range(3)
    ]


def labelled(rows: Sequence[TokenRow]) -> list[TokenRow]:
    return [TokenRow(row.tokens, np.zeros(len(row.tokens), np.bool_), i % 3, "") for i, row in enumerate(rows)]


def test_rows_of_one_task_alone_are_that_tasks_own(load: Callable[..., Base], rows: list[TokenRow]) -> None:
    """The law: one-hot weights in one mixed batch give what each task's blocks and head give, attached by themselves;
    and afterwards the base is as it was."""
    base = load("bert", target_modules="query,dense")
    some, blocks, heads = labelled(rows), blocks_of(base), heads_of(base)
    attach(base, (), blocks_id(()), None, base.initial_head)
    before = all_logits(base, some, batch_size=4)
    to = np.random.default_rng(3).integers(0, 3, len(some))
    with mixture(base, blocks, KNOWN, np.eye(3)[to], heads) as gates:
        mixed = all_logits(base, some, batch_size=4, gates=gates)
        with pytest.raises(DataError, match="all_logits"):
            score(base, some, batch_size=4, gates=gates)
    for task in range(3):
        at = np.flatnonzero(to == task)
        assert len(at)
        own = blocks[: task + 1]
        attach(base, own, blocks_id(own), None, heads[task])
        alone = all_logits(base, [some[i] for i in at], batch_size=4)
        np.testing.assert_allclose(mixed[at, task], alone, atol=2e-5)
        assert (mixed[at, task].argmax(1) == alone.argmax(1)).all()
    attach(base, (), blocks_id(()), None, base.initial_head)
    np.testing.assert_array_equal(all_logits(base, some, batch_size=4), before)


def test_a_soft_mixture_is_the_dense_sum_of_its_row(load: Callable[..., Base], rows: list[TokenRow]) -> None:
    base = load("bert")
    some, blocks, heads = labelled(rows)[:6], blocks_of(base), heads_of(base)
    weights = np.random.default_rng(4).dirichlet(np.ones(3), len(some))
    with mixture(base, blocks, KNOWN, weights, heads) as gates:
        mixed = all_logits(base, some, batch_size=4, gates=gates)
    for i, row in enumerate(some):
        g = weights[i] @ KNOWN
        own = [
            Block(adapter=Adapter({n: Factors(f.a, f.b, float(s) * f.scale) for n, f in b.adapter.items()}), born=0)
            for s, b in zip(g, blocks, strict=True)
        ]
        for task, head in enumerate(heads):
            attach(base, own, blocks_id(own), None, head)
            np.testing.assert_allclose(mixed[i, task], all_logits(base, [row], batch_size=1)[0], atol=2e-5)


@pytest.mark.parametrize(("family", "dtype"), [("llama", "float32"), ("llama", "bfloat16"), ("gpt2", "float32")])
def test_a_language_model_mixes_and_writes(
    family: str, dtype: str, load: Callable[..., Base], rows: list[TokenRow]
) -> None:
    base = load(family, dtype=dtype)
    blocks, to = blocks_of(base), np.arange(len(rows)) % 3
    prompts = [row.tokens.tolist() for row in rows[:7]]
    with mixture(base, blocks, KNOWN, np.eye(3)[to], [{}] * 3) as gates:
        found = outcomes(base, rows, batch_size=7, gates=gates)
    with mixture(base, blocks, KNOWN, np.eye(3)[to[:7]], [{}] * 3):
        said = generate(base, prompts, max_new_tokens=5, end_ids=())
    total = 0.0
    for task in range(3):
        own = blocks[: task + 1]
        attach(base, own, blocks_id(own))
        at = np.flatnonzero(to == task)
        alone = outcomes(base, [rows[i] for i in at], batch_size=7)
        total += alone.loss
        if dtype == "float32":
            assert (found.right[at] == alone.right).all()
            assert [said[i] for i in at if i < 7] == generate(
                base, [prompts[i] for i in at if i < 7], max_new_tokens=5, end_ids=()
            )
    assert found.loss == pytest.approx(total, rel=1e-4 if dtype == "float32" else 0.03)


def test_what_every_task_has_goes_into_the_weight(load: Callable[..., Base]) -> None:
    base = load("bert")
    blocks = blocks_of(base)
    with mixture(base, blocks, KNOWN, np.eye(3), heads_of(base)):
        for name, layer in base.layers.items():
            assert layer._experts is not None
            assert len(layer._experts[0]) == 1 + 3  # ranks of the second and third block
            assert base._blocks_id == blocks_id(blocks[:1])
            assert name in base.layout.modules
    with mixture(base, blocks, np.ones((2, 3)), np.eye(2), heads_of(base)[:2]):
        assert all(layer._experts is None for layer in base.layers.values())


def test_a_failure_leaves_nothing_attached(load: Callable[..., Base], rows: list[TokenRow]) -> None:
    base = load("bert")
    some, heads = labelled(rows), heads_of(base)
    attach(base, (), blocks_id(()), None, base.initial_head)
    before = all_logits(base, some, batch_size=8)
    with pytest.raises(AdapterError, match="head"), mixture(base, blocks_of(base), KNOWN, np.eye(3), [*heads[:2], {}]):
        pass
    with pytest.raises(ZeroDivisionError), mixture(base, blocks_of(base), KNOWN, np.eye(3), heads):
        _ = 1 / 0
    attach(base, (), blocks_id(()), None, base.initial_head)
    np.testing.assert_array_equal(all_logits(base, some, batch_size=8), before)
    refused = pytest.raises(AdapterError, match=r"weights \[rows, tasks\].*\(3, 3\), \(2, 3\)")
    with refused, mixture(base, blocks_of(base), KNOWN[:2], np.eye(3), heads):
        pass
