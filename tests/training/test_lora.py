"""The fused LoRA layer against plain composition and autograd, in float64 and in bf16."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as nnf
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from fedlora.adapter import Factors
from fedlora.state import Module
from fedlora.training.lora import LoraLayer, Pair


def plain(x: Tensor, w: Tensor, bias: Tensor | None, pair: Pair, frozen: Factors | None) -> Tensor:
    """The slow twin: the dense effective weight `[out, in]`, formed and applied."""
    weight = w + pair.scale * pair.b @ pair.a
    if frozen is not None:
        weight = weight + torch.from_numpy(frozen.dense()).to(w.dtype)
    return nnf.linear(x, weight, bias)


def make(kind: str, g: torch.Generator, out: int, inp: int, bias: bool) -> tuple[nn.Module, Tensor]:
    """A float64 module and its weight as `[out, in]`."""
    module: nn.Module = Conv1D(out, inp).double() if kind == "conv1d" else nn.Linear(inp, out, bias=bias).double()
    module.requires_grad_(False)
    module.weight.copy_(torch.randn(module.weight.shape, generator=g, dtype=torch.float64))
    return module, module.weight.t() if kind == "conv1d" else module.weight


@given(
    kind=st.sampled_from(["linear", "conv1d"]),
    out=st.integers(1, 9),
    inp=st.integers(1, 9),
    rank=st.integers(1, 5),
    rest=st.integers(0, 3),
    private=st.integers(0, 3),
    train=st.sampled_from(["AB", "A", "B"]),
    bias=st.booleans(),
    seed=st.integers(0, 2**31),
)
@settings(deadline=None, max_examples=50)
def test_fused_layer_equals_the_dense_weight(
    kind: str, out: int, inp: int, rank: int, rest: int, private: int, train: str, bias: bool, seed: int
) -> None:
    g = torch.Generator().manual_seed(seed)
    module, weight = make(kind, g, out, inp, bias)
    layer = LoraLayer(module, Module(out=out, inp=inp, kind=kind), folds=False)  # type: ignore[arg-type]
    n = np.random.default_rng(seed)

    def factors(r: int) -> Factors:
        return Factors(n.normal(size=(r, inp)).astype(np.float32), n.normal(size=(out, r)).astype(np.float32), 0.5)

    def drawn(*shape: int, trained: bool) -> Tensor:
        return torch.randn(shape, generator=g, dtype=torch.float64).requires_grad_(trained)

    pair = Pair(drawn(rank, inp, trained="A" in train), drawn(out, rank, trained="B" in train), 1.5)
    frozen, remainder = factors(private), factors(rest)
    layer.set_frozen(frozen if private else None)
    layer.set_pair(pair, remainder if rest else None)
    both = Factors(np.concatenate([frozen.a, remainder.a]), np.concatenate([frozen.b, remainder.b], axis=1), 0.5)
    x = drawn(2, 3, inp, trained=True)
    wanted = [t for t in (x, pair.a, pair.b) if t.requires_grad]
    y, want = module(x), plain(x, weight, module.bias, pair, both if rest + private else None)
    torch.testing.assert_close(y, want, rtol=1e-6, atol=1e-6)  # the frozen factors came as fp32
    up = torch.randn(y.shape, generator=g, dtype=torch.float64)
    got, expected = torch.autograd.grad(y, wanted, up), torch.autograd.grad(want, wanted, up)
    for left, right in zip(got, expected, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-6, atol=1e-6)


def saved_sizes(layer_train: str) -> list[int]:
    module = nn.Linear(32, 16, bias=False).requires_grad_(False)
    layer = LoraLayer(module, Module(out=16, inp=32), folds=True)
    layer.set_pair(
        Pair(
            torch.ones(2, 32, requires_grad="A" in layer_train),
            torch.ones(16, 2, requires_grad="B" in layer_train),
            1.0,
        )
    )
    sizes: list[int] = []

    def pack(t: Tensor) -> Tensor:
        sizes.append(t.numel())
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        module(torch.ones(100, 32))
    return sizes


def test_a_frozen_a_keeps_no_activations_but_the_low_ones() -> None:
    """100 inputs of width 32: with A trained they are saved; with A frozen only their 2 projections are."""
    assert 3200 in saved_sizes("AB")
    assert 3200 not in saved_sizes("B")
    assert 200 in saved_sizes("B")
    assert 200 not in saved_sizes("A")


def test_gradients_pass_gradcheck() -> None:
    g = torch.Generator().manual_seed(0)
    module, _ = make("linear", g, 3, 4, True)
    layer = LoraLayer(module, Module(out=3, inp=4), folds=False)
    args = [torch.randn(s, generator=g, dtype=torch.float64, requires_grad=True) for s in ((5, 4), (2, 4), (3, 2))]

    def run(x: Tensor, a: Tensor, b: Tensor) -> Any:
        layer.set_pair(Pair(a, b, 0.7))
        return module(x)

    assert torch.autograd.gradcheck(run, args)


def test_an_embedding_adds_the_looked_up_product() -> None:
    module = nn.Embedding(7, 5, padding_idx=0).requires_grad_(False)
    layer = LoraLayer(module, Module(out=5, inp=7, kind="embedding"), folds=True)
    n = np.random.default_rng(0)
    rest = Factors(n.normal(size=(2, 7)), n.normal(size=(5, 2)), 3.0)
    pair = Pair(torch.randn(2, 7, requires_grad=True), torch.randn(5, 2, requires_grad=True), 0.5)
    layer.set_pair(pair, rest)
    ids = torch.tensor([[1, 2, 2], [6, 0, 3]])
    table = module.weight + 0.5 * (pair.b @ pair.a).t() + torch.from_numpy(rest.dense()).t()
    torch.testing.assert_close(module(ids).double(), table[ids], rtol=1e-5, atol=1e-5)
    module(ids).sum().backward()
    assert pair.a.grad is not None
    assert pair.a.grad[:, [1, 2, 3, 6]].abs().min() > 0
    assert not pair.a.grad[:, [0, 4, 5]].any()  # padding, and tokens that did not occur


def test_a_module_with_its_own_forward_keeps_it() -> None:
    """A quantised linear computes its base in its own way; the factors are added to its result."""

    class Own(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 10 * super().forward(x)

    module = Own(4, 3).requires_grad_(False)
    layer = LoraLayer(module, Module(out=3, inp=4), folds=False)
    pair, x = Pair(torch.randn(2, 4), torch.randn(3, 2), 2.0), torch.randn(5, 4)
    bare = module(x)
    n = np.random.default_rng(0)
    frozen = Factors(n.normal(size=(1, 4)).astype(np.float32), n.normal(size=(3, 1)).astype(np.float32))
    layer.set_pair(pair)
    layer.set_frozen(frozen)
    want = bare + 2.0 * x @ (pair.b @ pair.a).t() + x @ torch.from_numpy(frozen.dense()).float().t()
    torch.testing.assert_close(module(x), want)


@pytest.mark.parametrize("autocast", [False, True])
def test_bf16_compute_gives_fp32_gradients(autocast: bool) -> None:
    """A bf16 base, and bf16 compute over an fp32 base: within bf16 rounding of the fp32 layer."""
    g = torch.Generator().manual_seed(0)
    exact = nn.Linear(16, 8, bias=False).requires_grad_(False)
    exact.weight.copy_(torch.randn(8, 16, generator=g))
    low = nn.Linear(16, 8, bias=False, dtype=torch.float32 if autocast else torch.bfloat16).requires_grad_(False)
    low.weight.copy_(exact.weight)
    x = torch.randn(6, 16, generator=g)
    found = []
    for module, inputs in ((exact, x), (low, x if autocast else x.bfloat16())):
        layer = LoraLayer(module, Module(out=8, inp=16), folds=False)
        pair = Pair(torch.ones(2, 16).div(4).requires_grad_(), torch.ones(8, 2).div(3).requires_grad_(), 2.0)
        layer.set_pair(pair)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast and module is low):
            y = module(inputs)
        y.float().square().sum().backward()
        assert pair.a.grad is not None
        assert pair.b.grad is not None
        assert pair.a.grad.dtype == pair.b.grad.dtype == torch.float32
        found.append((y, pair.a.grad, pair.b.grad))
    assert found[1][0].dtype == torch.bfloat16
    for want, got in zip(*found, strict=True):
        assert float((got.detach().float() - want.detach()).norm() / want.detach().norm()) < 2e-2


def test_fifty_tiny_blocks_survive_in_bf16() -> None:
    """Fifty updates of 1/1000 of the weight: the branch keeps them, merging one after another loses much of them."""
    n = np.random.default_rng(0)
    module = nn.Linear(64, 64, bias=False, dtype=torch.bfloat16).requires_grad_(False)
    module.weight.copy_(torch.from_numpy(n.normal(size=(64, 64))))
    size = float(module.weight.float().norm())
    tiny = []
    for _ in range(50):
        a, b = n.normal(size=(2, 64)).astype(np.float32), n.normal(size=(64, 2)).astype(np.float32)
        tiny.append(Factors(a, b * np.float32(1e-3 * size / np.linalg.norm(b @ a))))
    whole = Factors(np.concatenate([f.a for f in tiny]), np.concatenate([f.b for f in tiny], axis=1))
    merged, pristine = module.weight.clone(), module.weight.double()
    for f in tiny:
        merged += torch.from_numpy(f.dense()).to(torch.bfloat16)

    def error(update: Tensor) -> float:
        want = torch.from_numpy(whole.dense())
        return float((update - want).norm() / want.norm())

    layer = LoraLayer(module, Module(out=64, inp=64), folds=False)
    layer.set_blocks(whole)
    assert torch.equal(module.weight.double(), pristine)
    assert layer._frozen is not None
    kept = layer._frozen[1].double() @ layer._frozen[0].double()
    assert error(kept) < 0.01
    assert error(merged.double() - pristine) > 0.2
    want = float((pristine + kept).norm() ** 2)
    assert layer.squared_norm() == pytest.approx(want, rel=1e-6)
    x = torch.eye(64, dtype=torch.bfloat16)
    torch.testing.assert_close(module(x).double().t(), pristine + kept, rtol=2e-2, atol=2e-2)
