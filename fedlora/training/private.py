"""Example-level differential privacy of local training: DP-SGD (Abadi et al., CCS 2016) on what LoRA trains.

    gradient = (sum over drawn rows of clip(gradient of the row's loss) + N(0, (z C)^2)) / expected rows

The unit is a training row (a sequence), its loss the mean over its answer tokens, or its class's cross-entropy. A row's
gradient is clipped to C in one L2 norm over all that is trained: A, B, cores R and a classifier's head. Rows are drawn
by Poisson sampling; a step may draw none and is noise then. The sum is divided by the plan's expected number of rows.

How a row's gradient is had: with x what an adapted module read and g the gradient of what it gave, both `[row, token,
...]`, it is a sum over tokens of outer products,

    dB = s g (A x)^T        dA = s (B^T g) x^T  (in a subspace, N x)        dR = s (B^T g) (A x)^T

so one backward pass over a micro-batch gives those of all its rows, and never the sum of unclipped ones: leaves and
heads require no gradient meanwhile. Works with micro-batches of any size, autocast, checkpointing, frozen factors, bf16
bases, Linear and Conv1D. Refused by name: adapted embeddings, an adapted output head of a language model that sees
answer tokens alone, heads with layers other than Linear, and models in which rows meet or are not told apart.

Memory beyond ordinary training: 4 bytes for each row of a micro-batch and number trained, which `steps` keeps below
1 GiB by smaller micro-batches, and 8 bytes for each number trained.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from types import TracebackType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fedlora.base import Base
from fedlora.data.batches import Batch, alike, pad
from fedlora.data.rows import TokenRow
from fedlora.errors import TrainingError
from fedlora.privacy.accounting import Privacy
from fedlora.privacy.noise import Noise
from fedlora.training.objective import class_logits, loss_sum

__all__ = ["PrivateGradient"]

MEMORY = 1 << 30  # bytes of gradients of single rows
SLACK = 1e-5  # of the clip: more than float32 can round a row's gradient, or the sum of a micro-batch, up by


class PrivateGradient:
    """Clipped, noised gradients of one client's leaves, in place of a backward pass. A context manager, on one base.

    `leaves`: all that is trained, by key: `A:module [rank, in]`, `B:module [out, rank]`, `R:module [rank, rank]`,
    `head:name`; the pairs of `base.layers` are made of them. In a subspace, `basis` is N `[dim, in]` by module, and an
    A is `[rank, dim]`. With cores, `cores` is B^T `[rows, out]` by module.

        with PrivateGradient(base, leaves, privacy, who="client c0") as private:
            for micro in private.steps(rows, batch_size=16, overhead=32, pad_id=base.pad_id):
                private.backward(micro)    # fills leaf.grad; then any optimiser's step

    Entering runs two made-up rows through the base, whose pairs must hold finite numbers by then, to see that no row's
    loss reaches another row.
    Raises: TrainingError for a base or a leaf whose rows' gradients cannot be told apart, when entered.
    """

    def __init__(
        self,
        base: Base,
        leaves: Mapping[str, Tensor],
        privacy: Privacy,
        *,
        basis: Mapping[str, Tensor] | None = None,
        cores: Mapping[str, Tensor] | None = None,
        autocast: bool = False,
        who: str,
    ) -> None:
        self.base, self.leaves, self.privacy, self.who = base, dict(leaves), privacy, who
        self.basis, self.cores, self.autocast = dict(basis or {}), dict(cores or {}), autocast
        self.unusable = 0  # rows whose gradient was not finite and counted as zero; private, so never sent
        self._noise = Noise()
        self._shape = (0, 0)  # rows and length of the micro-batch under way
        self._grads: dict[str, Tensor] = {}  # of single rows, by key: [rows, *shape], a B as its transpose
        self._probing: set[str] | None = None  # modules where the rows of a probe met
        self._anchor = torch.zeros((), device=base.device, requires_grad=True)
        self._stack = ExitStack()

    def __enter__(self) -> PrivateGradient:
        with ExitStack() as stack:
            for leaf in [*self.leaves.values(), *self._seen()]:
                if leaf.requires_grad:
                    stack.callback(leaf.requires_grad_, True)
                    leaf.requires_grad_(False)
            for module, hook in self._hooks():
                stack.callback(module.register_forward_hook(hook).remove)
            self._require_rows_apart()
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._grads = {}
        self._stack.close()

    def steps(self, rows: Sequence[TokenRow], *, batch_size: int, overhead: int, pad_id: int) -> Iterator[list[Batch]]:
        """The Poisson sample of one step after another, endlessly, each as batches of like length, or none at all.

        Batches have at most `batch_size` rows, fewer where the rows' gradients would not fit in 1 GiB; `overhead` is as
        in `fedlora.data.batches.steps`. Rows are as `fedlora.training.local.check_rows` wants them.
        """
        size = sum(leaf.numel() for leaf in self.leaves.values())
        fit = max(1, min(batch_size, MEMORY // (4 * max(1, size))))
        lengths = np.array([len(row.tokens) for row in rows], np.int64)
        while True:
            drawn = self._noise.chosen(len(rows), self.privacy.sampling)
            yield [pad([rows[i] for i in chosen], pad_id) for chosen in alike(drawn, lengths, fit, overhead)]

    def backward(self, micro: Sequence[Batch]) -> None:
        """Fill every leaf's `grad` with the noised mean gradient of a step's rows; what was there is overwritten.

        A row whose gradient is not finite counts as zero, since to stop would tell that it is there. Noise and the sum
        over micro-batches are float64, a row's gradient is float32. Says nothing about the loss: that is private.
        """
        total = {key: torch.zeros_like(leaf, dtype=torch.float64) for key, leaf in self.leaves.items()}
        for batch in micro:
            self._run(batch, loss_sum)
            self._add_clipped(total, self._counted(batch))
        sd = self.privacy.clip * self.privacy.noise_multiplier
        for key, leaf in self.leaves.items():
            noise = torch.from_numpy(self._noise.normal(tuple(leaf.shape), sd)).to(leaf.device)
            mean = (total[key] + noise) / self.privacy.expected
            if leaf.grad is None:
                leaf.grad = torch.empty_like(leaf)
            leaf.grad.copy_(mean)

    # -- gradients of single rows

    def _run(self, batch: Batch, loss: Callable[[Base, Batch], Tensor]) -> None:
        self._grads = {}
        self._shape = batch.tokens.shape[0], batch.tokens.shape[1]
        with torch.autocast(self.base.device.type, torch.bfloat16, enabled=self.autocast):
            value = loss(self.base, batch)
        value.backward()  # type: ignore[no-untyped-call]

    def _add_clipped(self, total: Mapping[str, Tensor], counted: Tensor) -> None:
        """Add the clipped gradients of a micro-batch; `counted` `[rows]`: what each row's loss is a mean over."""
        squares = torch.zeros_like(counted)
        for grad in self._grads.values():
            squares += torch.linalg.vector_norm(grad.flatten(1), dim=1, dtype=torch.float64).square()
        norms = squares.sqrt() / counted
        usable = norms.isfinite()
        bound = self.privacy.clip * (1.0 - SLACK)
        scale = torch.where(usable, (bound / norms).clamp(max=1.0), 0.0) / counted
        lost = int((~usable).sum())
        self.unusable += lost
        for key, grad in self._grads.items():
            if lost:
                grad[~usable] = 0.0
            clipped = torch.tensordot(scale.to(grad.dtype), grad, dims=([0], [0]))
            total[key].add_(clipped.t() if key.startswith("B:") else clipped)
        self._grads = {}

    def _counted(self, batch: Batch) -> Tensor:
        ones = np.ones(len(batch.tokens))
        counted = batch.answer[:, 1:].sum(1) if self.base.task_type == "causal-lm" else ones
        return torch.from_numpy(counted.astype(np.float64)).to(self.base.device)

    def _keep(self, key: str, grad: Tensor) -> None:
        """A module that is passed twice gives a part of its gradient each time."""
        self._grads[key] = self._grads[key] + grad if key in self._grads else grad

    def _adapted(self, name: str, kept: Tensor, g: Tensor) -> None:
        """`kept`: x `[row, token, in]` where A is trained, else A x `[row, token, rank]`; `g`: `[row, token, out]`."""
        pair = self.base.layers[name].pair
        assert pair is not None
        if f"A:{name}" in self.leaves:
            x = kept @ self.basis[name].t() if name in self.basis else kept
            self._keep(f"A:{name}", (pair.scale * (g @ pair.b)).mT @ x)
        if f"B:{name}" in self.leaves:
            low = kept @ pair.a.t() if f"A:{name}" in self.leaves else kept
            self._keep(f"B:{name}", (pair.scale * low).mT @ g)
        if (r := self.leaves.get(f"R:{name}")) is not None:
            rank = len(r)
            self._keep(f"R:{name}", (pair.scale * (g @ self.cores[name][:rank].t())).mT @ kept[..., :rank])

    def _dense(self, weight: str, bias: str, x: Tensor, g: Tensor) -> None:
        if weight in self.leaves:
            self._keep(weight, g.mT @ x)
        if bias in self.leaves:
            self._keep(bias, g.sum(1))

    # -- hooks

    def _hooks(self) -> Iterator[tuple[nn.Module, Callable[..., Tensor | None]]]:
        """Every module with something to train, and the hook that taps it. Raises: TrainingError for one of no use."""
        adapted = sorted({key.split(":", 1)[1] for key in self.leaves if key[0] in "ABR"})
        for name in adapted:
            layer = self.base.layers[name]
            if layer.spec.kind == "embedding":
                raise TrainingError(
                    f"{self.who}: {name} is an embedding, whose gradients of single rows are as large as its table; "
                    "leave it out of model.target_modules under example-level privacy"
                )
            if self.base.splits and layer.module is self.base.model.get_output_embeddings():
                raise TrainingError(
                    f"{self.who}: {name} is the output head and sees answer tokens alone, so rows are not told apart; "
                    "leave it out of model.target_modules under example-level privacy"
                )
            yield layer.module, partial(self._tap, name, partial(self._adapted, name), f"A:{name}" in self.leaves)
        heads = [key.split(":", 1)[1] for key in self.leaves if key.startswith("head:")]
        for owner in sorted({name.rpartition(".")[0] for name in heads}):
            module = self.base.model.get_submodule(owner)
            if not isinstance(module, nn.Linear):
                raise TrainingError(
                    f"{self.who}: the head's {owner} is a {type(module).__name__}; example-level privacy knows heads "
                    "of Linear layers only. Use another base, or train no head"
                )
            yield (
                module,
                partial(self._tap, owner, partial(self._dense, f"head:{owner}.weight", f"head:{owner}.bias"), True),
            )

    def _tap(
        self,
        name: str,
        take: Callable[[Tensor, Tensor], None],
        whole: bool,
        _module: nn.Module,
        inputs: tuple[Tensor, ...],
        output: Tensor,
    ) -> Tensor | None:
        if not torch.is_grad_enabled():
            return None
        kept = inputs[0].detach()
        if not whole:
            pair = self.base.layers[name].pair
            assert pair is not None
            kept = kept.to(pair.a.dtype) @ pair.a.t()
        out: Tensor = _Tap.apply(output, kept, self._anchor, partial(self._collect, name, take))  # type: ignore[no-untyped-call]
        return out

    def _collect(self, name: str, take: Callable[[Tensor, Tensor], None], kept: Tensor, g: Tensor) -> None:
        kept, g = self._by_row(name, kept), self._by_row(name, g)
        if self._probing is None:
            take(kept, g)
        elif g[1:].any():
            self._probing.add(name)

    def _by_row(self, name: str, x: Tensor) -> Tensor:
        """`[rows, tokens, features]` in float32. Raises: TrainingError if the first axis is neither rows nor tokens."""
        rows, length = self._shape
        if x.ndim < 2 or (x.shape[0] != rows and (x.ndim, x.shape[0]) != (2, rows * length)):
            raise TrainingError(
                f"{self.who}: {name} works on {tuple(x.shape)} where the batch is {(rows, length)}, so rows cannot be "
                "told apart; leave it out of model.target_modules under example-level privacy"
            )
        return x.reshape(rows, -1, x.shape[-1]).float()

    def _seen(self) -> Iterator[Tensor]:
        """What requires a gradient beside the leaves: products that layers see in their place, and head parameters."""
        for layer in self.base.layers.values():
            if layer.pair is not None:
                yield layer.pair.a
                yield layer.pair.b
        yield from self.base.head.values()

    def _require_rows_apart(self) -> None:
        """Raises: TrainingError if the loss of one of two made-up rows reaches the other."""
        size = int(self.base.model.config.get_text_config().vocab_size)
        tokens = (np.arange(6, dtype=np.int64).reshape(2, 3) + 1 + self.base.pad_id) % size
        answer = np.array([[False, False, True], [False, False, False]])
        batch = Batch(tokens, np.ones_like(tokens), answer, None)
        met: set[str] = set()
        self._probing = met
        try:
            self._run(batch, loss_sum if self.base.task_type == "causal-lm" else _first_row)
        finally:
            self._probing = None
        if met:
            raise TrainingError(
                f"{self.who}: in {sorted(met)[0]} one row's loss reaches another row, so no clip bounds what a row "
                "does; example-level privacy cannot be had with this base"
            )


def _first_row(base: Base, batch: Batch) -> Tensor:
    return class_logits(base, batch)[0].logsumexp(0)


class _Tap(torch.autograd.Function):
    """The identity on `y`, which gives `collect` what was kept and the gradient that comes back.

    The anchor requires a gradient, so that one comes although nothing in front of it does.
    """

    @staticmethod
    def forward(
        ctx: Any, y: Tensor, kept: Tensor, _anchor: Tensor, collect: Callable[[Tensor, Tensor], None]
    ) -> Tensor:
        ctx.save_for_backward(kept)
        ctx.collect = collect
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (kept,) = ctx.saved_tensors
        ctx.collect(kept, grads[0])
        return grads[0] if ctx.needs_input_grad[0] else None, None, None, None
