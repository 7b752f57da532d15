"""LoRA on one module of the resident base: blocks, frozen factors and the trained pair are swapped, the module stays.

    y = base(x) + x F_a^T F_b^T + scale * x A^T B^T

One `LoraLayer` is installed over each adapted module when the base is loaded and remains there; with nothing attached
it calls the module's own forward, so the pristine model's logits are exact. In fp32 the blocks go into the weight,
derived once per version from the pristine copy; in every other dtype they are a factored branch, because adding a
small product to a bf16 weight rounds it away.

Where each row of a batch mixes the experts in its own way, their factors stand side by side and the gates lie between:

    y += ((x A^T) * g(row)) B^T        2 R (in + out) + R operations a token for R ranks of all experts together
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as nnf
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from fedlora.adapter import Factors
from fedlora.errors import AdapterError
from fedlora.state import Module

__all__ = ["Gates", "LoraLayer", "Pair"]


@dataclass(frozen=True, eq=False)
class Pair:
    """What is trained: `a [rank, in]`, `b [out, rank]`, fp32; leaves of autograd where they are trained.

    Fastest where b lies in memory as its transpose: skinny products along the long side cost a CPU ten times less so.
    """

    a: Tensor
    b: Tensor
    scale: float


class Gates:
    """How much of each task, and so of each expert, every row gets; all layers of a base look at the same one.

    `tasks [n, tasks]` are the rows' weights over tasks and `known [tasks, experts]` how often a task has an expert, so
    that the experts' gates are `tasks @ known`. Between `take` and the next, a forward pass is over those rows.
    """

    def __init__(self, tasks: Tensor, known: Tensor) -> None:
        self._tasks, self._experts = tasks, tasks @ known
        self.tasks, self.experts = self._tasks, self._experts  # of the rows at hand; at first all, in order

    def take(self, rows: Sequence[int] | np.ndarray[Any, Any]) -> None:
        """The next forward passes are over these rows."""
        at = torch.as_tensor(rows, device=self._tasks.device)
        self.tasks, self.experts = self._tasks[at], self._experts[at]


def along(gates: Tensor, shape: Sequence[int]) -> Tensor:
    """Gates `[rows, k]` in a shape that multiplies something `[*shape, k]`, rows first.

    `shape` is `[rows, ...]`; `[rows * length]` where a module flattens its rows; `[1, ...]` where all rows share one
    input, such as position ids. Raises: AdapterError for anything else.
    """
    rows, one = len(gates), len(shape) == 1
    if one and shape[0] and shape[0] % rows == 0:
        return gates.repeat_interleave(shape[0] // rows, 0)
    if not one and shape[0] in (rows, 1):
        return gates.view(rows, *[1] * (len(shape) - 1), gates.shape[1])
    raise AdapterError(
        f"a mixture of {rows} rows met an input of shape {tuple(shape)}, whose rows cannot be told; leave modules that "
        "see some of the tokens alone out of model.target_modules"
    )


class LoraLayer:
    """The forward of one adapted module, and what is attached to it.

    `folds` says whether blocks are added to the weight (a plain fp32 weight that no other module shares).
    """

    def __init__(self, module: nn.Module, spec: Module, *, folds: bool) -> None:
        self.module = module
        self.spec = spec
        self.weight: Tensor = module.get_parameter("weight")
        self.folds = folds
        self.pair: Pair | None = None
        self._original: Callable[[Tensor], Tensor] = module.forward
        # Subclasses with a forward of their own (quantised linears, scaled embeddings) keep it; we add to its result.
        self._fused = type(module).forward in (nn.Linear.forward, Conv1D.forward)
        self._pristine: Tensor | None = None
        self._blocks: tuple[Tensor, Tensor] | None = None  # factored, where they do not fold
        self._private: tuple[Tensor, Tensor] | None = None  # this client's frozen factors
        self._rest: tuple[Tensor, Tensor] | None = None  # rows of the pair that this client does not train
        self._frozen: tuple[Tensor, Tensor] | None = None  # the three above, side by side
        self._experts: tuple[Tensor, Tensor, Tensor, Gates] | None = None  # a, b, the expert of each rank, the gates
        self._norm: float | None = None
        module.__dict__["forward"] = self.forward

    # -- what is attached

    def set_blocks(self, factors: Factors | None) -> None:
        """`W0 + B A` in the weight, from the pristine W0, or a factored branch. None: W0 itself, bit for bit."""
        self._norm = None
        if not self.folds:
            self._blocks = None if factors is None else self._tensors(factors, self.weight.dtype)
            self._refresh()
            return
        if factors is None:
            if self._pristine is not None:
                self.weight.data.copy_(self._pristine)
            return
        if self._pristine is None:
            self._pristine = self.weight.detach().clone()
        a, b = self._tensors(factors, torch.float32)
        left, right = (b, a) if self.spec.kind == "linear" else (a.t(), b.t())
        torch.addmm(self._pristine, left, right, out=self.weight.data)

    def set_frozen(self, factors: Factors | None) -> None:
        self._private = None if factors is None else self._tensors(factors, self._branch_dtype)
        self._refresh()

    def set_pair(self, pair: Pair | None, rest: Factors | None = None) -> None:
        """The trained pair, and the frozen remainder of the pair it was cut from."""
        self.pair = pair
        self._rest = None if rest is None else self._tensors(rest, self._branch_dtype)
        self._refresh()

    def set_experts(self, factors: Factors | None, owner: Sequence[int] = (), gates: Gates | None = None) -> None:
        """Factors of all experts side by side, `owner [rank]` the expert of each, gated by row. None takes them off.

        They add to whatever else is attached. Without them the ordinary forward is in place, so they cost it nothing.
        """
        self._experts = None
        if factors is not None and gates is not None:
            a, b = self._tensors(factors, self._branch_dtype)
            self._experts = a, b, torch.as_tensor(owner, device=a.device), gates
        self.module.__dict__["forward"] = self.forward if self._experts is None else self._mixed

    def squared_norm(self) -> float:
        """`||W0 + blocks||_F^2`, computed once per version of the blocks."""
        if self._norm is None:
            total = float(self.weight.detach().float().square().sum(dtype=torch.float64))
            if self._blocks is not None:
                a, b = (x.double() for x in self._blocks)
                weight = self.weight.detach().double()
                weight = weight if self.spec.kind == "linear" else weight.t()
                total += float(2 * (b * (weight @ a.t())).sum() + ((b.t() @ b) * (a @ a.t())).sum())
            self._norm = max(total, 0.0)
        return self._norm

    @property
    def _branch_dtype(self) -> torch.dtype:
        # Rounding a factor is relative to the factor, so tiny updates survive; activations round as much.
        return self.weight.dtype if self.weight.dtype.is_floating_point else torch.float32

    def _tensors(self, factors: Factors, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        f = factors.folded()
        return to_tensor(f.a, self.weight.device, dtype), to_tensor(f.b.T, self.weight.device, dtype).t()

    def _refresh(self) -> None:
        parts = [p for p in (self._blocks, self._private, self._rest) if p is not None and len(p[0])]
        if not parts:
            self._frozen = None
        elif len(parts) == 1:
            self._frozen = parts[0]
        else:
            self._frozen = torch.cat([a for a, _ in parts]), torch.cat([b.t() for _, b in parts]).t()

    # -- forward

    def forward(self, x: Tensor) -> Tensor:
        """`x`: `[..., in]`, or token ids `[...]` for an embedding. Returns `[..., out]`."""
        pair, frozen = self.pair, self._frozen
        if pair is None and frozen is None:
            return self._original(x)
        if self.spec.kind == "embedding":
            return self._embedding(x)
        if not self._fused:
            y = self._original(x)
            return y + branch(x.to(y.dtype), pair, frozen)
        weight = self.weight if self.spec.kind == "conv1d" else self.weight.t()
        dtype = _compute_dtype(x, weight)
        a, b, scale = (pair.a, pair.b, pair.scale) if pair is not None else (None, None, 1.0)
        fa, fb = frozen if frozen is not None else (None, None)
        out: Tensor = _FrozenLinear.apply(  # type: ignore[no-untyped-call]
            x, weight, self.module.bias, a, b, fa, fb, scale, dtype
        )
        return out

    def _mixed(self, x: Tensor) -> Tensor:
        """As `forward`, and each row's own mixture of the experts; by plain composition."""
        assert self._experts is not None
        y, (a, b, owner, gates) = self.forward(x), self._experts
        table = self.spec.kind == "embedding"
        low = nnf.embedding(x, a.t()).to(y.dtype) if table else x.to(y.dtype) @ a.t().to(y.dtype)
        gated = low * along(gates.experts[:, owner], x.shape if table else x.shape[:-1]).to(y.dtype)
        return y + gated @ b.t().to(y.dtype)

    def _embedding(self, ids: Tensor) -> Tensor:
        y = self._original(ids)
        padding: Any = self.module.padding_idx
        if self._frozen is not None:
            fa, fb = self._frozen
            y = y + nnf.embedding(ids, fa.t()).to(y.dtype) @ fb.t().to(y.dtype)
        if self.pair is not None:
            looked_up = nnf.embedding(ids, self.pair.a.t(), padding_idx=padding).to(y.dtype)
            y = y + self.pair.scale * (looked_up @ self.pair.b.t().to(y.dtype))
        return y


def branch(x: Tensor, pair: Pair | None, frozen: tuple[Tensor, Tensor] | None) -> Tensor:
    """What the factors add to a linear module, by plain composition: the slow twin of `_FrozenLinear`'s branch."""
    parts = [] if frozen is None else [(*frozen, 1.0)]
    parts += [] if pair is None else [(pair.a, pair.b, pair.scale)]
    terms = [scale * ((x @ a.t().to(x.dtype)) @ b.t().to(x.dtype)) for a, b, scale in parts]
    return torch.stack(terms).sum(0) if len(terms) > 1 else terms[0]


def to_tensor(x: np.ndarray[Any, Any], device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
    """A copy in torch's own, aligned memory: the last bits of a product can depend on the alignment of its inputs."""
    out = torch.empty(x.shape)
    out.numpy()[...] = x
    return out.to(device, dtype)


def _compute_dtype(x: Tensor, weight: Tensor) -> torch.dtype:
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype


class _FrozenLinear(torch.autograd.Function):
    """`x W + b + x F_a^T F_b^T + scale x A^T B^T` with a frozen base weight `w [in, out]`.

    Every product with B is taken along the rows of B^T (see `Pair`).
    Saves x (only if A is trained) and x A^T (only if B is); never a dense product, never a gradient of the base.
    Backward, with g = dy and h = scale g B: dx = g W^T + h A + (g F_b) F_a; dA = h^T x; dB = scale g^T (x A^T).
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        w: Tensor,
        bias: Tensor | None,
        a: Tensor | None,
        b: Tensor | None,
        fa: Tensor | None,
        fb: Tensor | None,
        scale: float,
        dtype: torch.dtype,
    ) -> Tensor:
        flat = x.reshape(-1, x.shape[-1]).to(dtype)
        base = w.to(dtype)
        y = flat @ base if bias is None else torch.addmm(bias.to(dtype), flat, base)
        if fa is not None and fb is not None:
            y.addmm_(flat @ fa.to(dtype).t(), fb.to(dtype).t())
        low = None
        if a is not None and b is not None:
            low = flat @ a.to(dtype).t()
            y.addmm_(low, b.to(dtype).t(), alpha=scale)
        train_a, train_b = ctx.needs_input_grad[3], ctx.needs_input_grad[4]
        ctx.save_for_backward(w, a, b, fa, fb, flat if train_a else None, low if train_b else None)
        ctx.scale, ctx.dtype, ctx.x_dtype, ctx.x_shape = scale, dtype, x.dtype, x.shape
        return y.view(*x.shape[:-1], y.shape[-1])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        w, a, b, fa, fb, flat, low = ctx.saved_tensors
        dtype, scale = ctx.dtype, ctx.scale
        g = grads[0].reshape(-1, grads[0].shape[-1]).to(dtype)
        dx = da = db = None
        h = g @ b.to(dtype) if a is not None and (ctx.needs_input_grad[0] or flat is not None) else None
        if ctx.needs_input_grad[0]:
            dx = g @ w.to(dtype).t()
            if fa is not None:
                dx.addmm_(g @ fb.to(dtype), fa.to(dtype))
            if h is not None:
                dx.addmm_(h, a.to(dtype), alpha=scale)
            dx = dx.view(ctx.x_shape).to(ctx.x_dtype)
        if flat is not None and h is not None:
            da = (h.t() @ flat).to(a.dtype).mul_(scale)
        if low is not None:
            db = (low.t() @ g).to(b.dtype).mul_(scale).t()
        return dx, None, None, da, db, None, None, None, None
