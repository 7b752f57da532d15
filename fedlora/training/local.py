"""Local training: one client, one round, on the resident base."""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from fedlora.adapter import Factors
from fedlora.base import Base
from fedlora.data.batches import Batch, steps
from fedlora.data.rows import TokenRow
from fedlora.errors import BaseMismatch, TrainingError
from fedlora.rng import stream
from fedlora.state import Answer, Ask, Header, TrainPlan, times
from fedlora.training.attach import attach
from fedlora.training.lora import Pair, to_tensor
from fedlora.training.objective import counted, loss_sum
from fedlora.training.penalty import penalties
from fedlora.training.private import PrivateGradient
from fedlora.training.schedule import rates
from fedlora.training.start import Start, bases, check_plan, coordinates, start
from fedlora.wire import blocks_id

__all__ = ["train_client"]

Float = NDArray[np.float32]
OVERHEAD_CPU, OVERHEAD = 32, 512  # tokens that one more batch of a step costs: dispatch on a CPU, launches on a GPU
Moments = dict[str, NDArray[np.floating]]  # of AdamW, between the rounds of one client
Kept = dict[str, NDArray[np.floating]]  # parts that stay at one client, by key


def train_client(
    base: Base,
    header: Header,
    ask: Ask,
    rows: Sequence[TokenRow],
    *,
    threads: int = 0,
    optimizer: Moments | None = None,
    kept: Kept | None = None,
) -> Answer:
    """Follow `ask.plan` on this client's rows and answer what it asks to send.

    `threads` is torch's number of CPU threads (0: leave it); the same inputs and threads give the same bytes on a CPU,
    whoever was trained before. `optimizer` is read and refilled when the plan keeps AdamW's moments between rounds;
    `kept` is read and refilled with the parts in `plan.keep` (keys `A:module`, `B:module`, `head:name`); no answer
    carries those.
    The loss of an optimiser step is the mean over the answer tokens (classification: rows) of all its micro-batches,
    plus the plan's penalties (see `fedlora.training.penalty`), once. In a subspace A is `M N`: M `[rank, dim]` is what
    starts, is trained, kept and sent; N stays.

    Metrics, all floats. loss_before, loss_after: that mean over the first and the last tenth of the local steps (at
    least one step each), every batch before the update it causes. grad_norm: L2 over all that is trained, before
    clipping, mean over steps. weight_change: ||s B A - s B0 A0||_F / ||W0 + blocks||_F over all adapted modules (with a
    core, B R in place of B). tail_penalty, overlap_penalty, anchor_penalty, only where the plan has one: what it added
    to the loss, mean over steps; the losses above are without it.
    tokens: all but padding; answer_tokens: those predicted; rows: presentations; steps; seconds: this call;
    step_seconds: forward, backward and optimiser alone. Under privacy only steps and weight_change, the examples are
    the number of rows that the plan takes a client to have, and rows without a loss are left out without a word.

    Raises: TrainingError if there are no usable rows, the plan cannot be followed or the loss is not finite (nothing is
    sent then); BaseMismatch if the base, or a public A or N, is not the server's; AdapterError if blocks do not fit.
    """
    begin = time.perf_counter()
    who = f"client {header.client}, round {header.round}"
    plan = ask.plan
    if plan is None:
        raise TrainingError(f"{who}: the ask has no plan; kind {header.kind!r} is not training")
    if header.base != base.fingerprint:
        raise BaseMismatch(
            f"{who}: the run was opened with base {header.base or '(none)'}, here is {base.fingerprint}; "
            "same model, revision and files on both sides?"
        )
    check_plan(plan, coordinates(ask, base.layout), who)
    if plan.privacy is None:
        check_rows(base, rows, header)
    else:  # to say how many are of no use, or to stop for one of them, would tell of them
        rows = [row for row in rows if _usable(base, row)]
    basis = bases(ask, header, base.layout)
    begun = start(ask, plan, header, base.layout, kept)
    with ExitStack() as stack:
        stack.enter_context(_threads(threads))
        attach(base, ask.blocks, blocks_id(ask.blocks), ask.frozen, begun.head or None)
        trained = _Trained(base, ask, plan, begun, basis, who)
        stack.callback(trained.detach)
        if plan.training.checkpointing:
            stack.enter_context(_checkpointed(base, who))
        progress = _run(base, plan, header, rows, trained, optimizer, who)
        arrays = trained.answer()
        change = trained.weight_change()
        if kept is not None and plan.keep:
            kept.clear()
            kept.update(trained.own())
    if plan.privacy is not None:  # losses, norms, counts and times are of private rows
        nominal = max(1, round(plan.privacy.expected / plan.privacy.sampling))
        return Answer(
            examples=nominal, metrics={"steps": float(progress.steps), "weight_change": change}, arrays=arrays
        )
    metrics = {**progress.metrics(), "weight_change": change, "seconds": time.perf_counter() - begin}
    return Answer(examples=len(rows), metrics=metrics, arrays=arrays)


def check_rows(base: Base, rows: Sequence[TokenRow], header: Header) -> None:
    """Raises: TrainingError if there are no rows, or some have no loss: no label of this base, or no answer token."""
    if not rows:
        raise TrainingError(f"client {header.client} has no training rows; is its share of the data empty?")
    if base.task_type == "sequence-classification":
        rule = f"no label from 0 to {base.model.config.num_labels - 1}, or choices beyond"
    else:
        rule = "no answer token after the first token; are prompts cut at model.max_length?"
    if bad := sum(not _usable(base, row) for row in rows):
        raise TrainingError(f"client {header.client}: {bad} of {len(rows)} rows have {rule}")


def _usable(base: Base, row: TokenRow) -> bool:
    """Whether the row has a loss."""
    if base.task_type == "sequence-classification":
        classes = range(base.model.config.num_labels)
        return row.label in classes and all(c in classes for c in row.choices or ())
    return bool(row.answer[1:].any())


@dataclass(frozen=True, eq=False)
class _Core:
    """One module's pair with a core: `left` B^T `[rows, out]` and `right` A `[rows, in]` are fixed, the leading part of
    `r [rows, rows]` is trained, and what the layer sees as its b is `seen` = B R, a leaf of its own."""

    left: Tensor
    right: Tensor
    r: Tensor
    seen: Tensor


class _Trained:
    """What is trained, as views of one flat fp32 buffer (so that clipping and AdamW are a few operations in all).

    With a core the layers are given the pair (A, B R), and in a subspace (M N, B). Before a step `refresh` computes B R
    from R, or M N from M; after the backward passes `finish` turns the gradient of B R into that of R, which is
    B^T d(B R), or that of M N into that of M, which is d(M N) N^T.
    """

    def __init__(
        self, base: Base, ask: Ask, plan: TrainPlan, begun: Start, basis: Mapping[str, Float], who: str
    ) -> None:
        self.base, self.plan = base, plan
        rank = plan.rank
        self.parts = "R" if plan.core else "AB"
        self.begin: dict[str, Float] = {}
        if plan.core:
            self.begin |= {f"R:{n}": x[:rank, :rank] for n, x in begun.r.items()}
        else:
            self.begin |= {f"A:{n}": x[:rank] for n, x in begun.a.items()}
            self.begin |= {f"B:{n}": x[:, :rank] for n, x in begun.b.items()}
        self.begin |= {f"head:{n}": x for n, x in begun.head.items()}
        self.shapes = {k: x.shape for k, x in self.begin.items() if k.split(":", 1)[0] in plan.train}
        self.flat = torch.zeros(sum(map(_room, self.shapes.values())), device=base.device)
        self.flat.grad = torch.zeros_like(self.flat)
        self.now: dict[str, Tensor] = {}
        grads = self.views(self.flat.grad)
        for key, leaf in self.views(self.flat).items():
            leaf.copy_(to_tensor(self.begin[key], base.device))
            self.now[key] = leaf.detach().requires_grad_(True)
            self.now[key].grad = grads[key]
        for key in self.begin.keys() - self.now.keys():
            self.now[key] = to_tensor(self.begin[key], base.device)
        self.penalties = penalties(ask, plan, self.now, self.flat, self.views, basis, who)
        self.basis = {n: to_tensor(x, base.device) for n, x in basis.items()}
        self.seen: dict[str, Tensor] = {}  # M N of each module whose M is trained, a leaf of its own
        self.cores: dict[str, _Core] = {}
        self.rest = {n: Factors(begun.a[n][rank:], begun.b[n][:, rank:], plan.scale) for n in base.layers}
        for name, layer in base.layers.items():
            if plan.core:
                layer.set_pair(self._with_core(name, begun))
                continue
            rest = self.rest[name]
            if basis:
                rest = Factors(times(rest.a, basis[name]), rest.b, rest.scale)
            layer.set_pair(Pair(self._a(name), self.now[f"B:{name}"], plan.scale), rest if rest.rank else None)
        if "head" in plan.train:
            for name, parameter in base.head.items():
                parameter.data = self.now[f"head:{name}"].detach()
                parameter.requires_grad_(True).grad = self.now[f"head:{name}"].grad

    def views(self, buffer: Tensor) -> dict[str, Tensor]:
        """The parts of a buffer like `flat` by key, 64-byte aligned. B lies as its transpose, see Pair."""
        out: dict[str, Tensor] = {}
        at = 0
        for key, shape in self.shapes.items():
            part = buffer[at : at + math.prod(shape)]
            out[key] = part.view(shape[::-1]).t() if key.startswith("B:") else part.view(shape)
            at += _room(shape)
        return out

    def _a(self, name: str) -> Tensor:
        """What a layer sees as its A: the leaf itself, or in a subspace M N, a leaf of its own where M is trained."""
        a = self.now[f"A:{name}"]
        if name not in self.basis:
            return a
        seen = a.detach() @ self.basis[name]
        if a.requires_grad:
            seen.requires_grad_(True).grad = torch.zeros_like(seen)
            self.seen[name] = seen
        return seen

    def _with_core(self, name: str, begun: Start) -> Pair:
        """The pair (A, B R) of a module whose R is trained, and how to compute it again."""
        device = self.base.device
        left = to_tensor(begun.b[name].T, device)
        seen = torch.empty_like(left).t().requires_grad_("R" in self.plan.train)
        if seen.requires_grad:
            seen.grad = torch.zeros_like(left).t()
        right = to_tensor(begun.a[name], device)
        right = right @ self.basis[name] if name in self.basis else right
        core = _Core(left, right, to_tensor(begun.r[name], device), seen)
        self.cores[name] = core
        return Pair(core.right, seen, self.plan.scale)

    def refresh(self) -> None:
        """Before a step: no gradient yet, B R where there is a core, M N where there is a subspace."""
        assert self.flat.grad is not None
        self.flat.grad.zero_()
        rank = self.plan.rank
        with torch.no_grad():
            for name, core in self.cores.items():
                core.r[:rank, :rank] = self.now[f"R:{name}"]
                torch.mm(core.r.t(), core.left, out=core.seen.data.t())
                if core.seen.grad is not None:
                    core.seen.grad.zero_()
            for name, seen in self.seen.items():
                torch.mm(self.now[f"A:{name}"], self.basis[name], out=seen.data)
                assert seen.grad is not None
                seen.grad.zero_()

    def finish(self) -> dict[str, float]:
        """After the backward passes of a step: gradients of cores, coordinates and penalties. Returns the penalties."""
        rank = self.plan.rank
        for name, core in self.cores.items():
            grad = self.now[f"R:{name}"].grad
            if grad is not None and core.seen.grad is not None:
                torch.mm(core.left[:rank], core.seen.grad[:, :rank], out=grad)
        for name, seen in self.seen.items():
            grad = self.now[f"A:{name}"].grad
            assert grad is not None
            assert seen.grad is not None
            torch.mm(seen.grad, self.basis[name].t(), out=grad)
        return self.press()

    def press(self) -> dict[str, float]:
        """Add the gradients of the penalties, which are of the factors alone. Returns their values."""
        return {name: press() for name, press in self.penalties.items()}

    def detach(self) -> None:
        """The base as it was, but for blocks and head values."""
        for layer in self.base.layers.values():
            layer.set_pair(None)
        self.base.set_frozen(None)
        for parameter in self.base.head.values():
            parameter.requires_grad_(False).grad = None
            parameter.data = parameter.data.clone()

    def answer(self) -> dict[str, Float]:
        out: dict[str, Float] = {}
        for key, tensor in self.now.items():
            name = key.split(":", 1)[0]
            if name in self.plan.send:
                value = tensor.detach().cpu().numpy()
                out[key] = value - self.begin[key] if name in self.plan.changes else value.copy()
        return dict(sorted(out.items()))

    def own(self) -> Kept:
        """What stays at the client, by key: the trained rows and columns with those that are only loaded."""
        out: Kept = {}
        for key, tensor in self.now.items():
            of, name = key.split(":", 1)
            if of not in self.plan.keep:
                continue
            x = tensor.detach().cpu().numpy()
            rest = self.rest[name] if of in "AB" else None
            whole = x if rest is None else np.concatenate([x, rest.a]) if of == "A" else np.hstack([x, rest.b])
            out[key] = np.array(whole, np.float32, order="C")
        return dict(sorted(out.items()))

    def weight_change(self) -> float:
        """Factored: B A - B0 A0 = (B - B0) A + B0 (A - A0), or B (R - R0) A; by Gram matrices in float64."""
        change = size = 0.0
        for name, layer in self.base.layers.items():
            now = {p: self.now[f"{p}:{name}"].detach().double() for p in self.parts}
            begin = {p: to_tensor(self.begin[f"{p}:{name}"], self.base.device, torch.float64) for p in self.parts}
            if core := self.cores.get(name):
                left = core.left[: self.plan.rank].double().t() @ (now["R"] - begin["R"])
                right = core.right[: self.plan.rank].double()
            else:
                left = torch.cat([now["B"] - begin["B"], begin["B"]], dim=1)
                right = torch.cat([now["A"], now["A"] - begin["A"]])
                right = right @ self.basis[name].double() if name in self.basis else right
            change += float(((left.t() @ left) * (right @ right.t())).sum())
            size += layer.squared_norm()
        return abs(self.plan.scale) * math.sqrt(max(change, 0.0) / size) if size else 0.0


def _room(shape: Sequence[int]) -> int:
    """Numbers set aside for a part of this shape: whole cache lines of 64 bytes."""
    return -(-math.prod(shape) // 16) * 16


@dataclass
class _Progress:
    losses: list[tuple[float, int]] = field(default_factory=list)  # (sum, count) of each step
    norms: list[float] = field(default_factory=list)
    penalties: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))  # of each step, by metric
    tokens: int = 0
    answer_tokens: int = 0
    rows: int = 0
    steps: int = 0
    step_seconds: float = 0.0

    def metrics(self) -> dict[str, float]:
        some = max(1, len(self.losses) // 10)
        return {
            **{name: sum(values) / len(values) for name, values in self.penalties.items()},
            "loss_before": _mean(self.losses[:some]),
            "loss_after": _mean(self.losses[-some:]),
            "grad_norm": sum(self.norms) / len(self.norms),
            "tokens": float(self.tokens),
            "answer_tokens": float(self.answer_tokens),
            "rows": float(self.rows),
            "steps": float(self.steps),
            "step_seconds": self.step_seconds,
        }


def _mean(losses: Sequence[tuple[float, int]]) -> float:
    return sum(total for total, _ in losses) / sum(count for _, count in losses)


def _run(
    base: Base,
    plan: TrainPlan,
    header: Header,
    rows: Sequence[TokenRow],
    trained: _Trained,
    moments: Moments | None,
    who: str,
) -> _Progress:
    t = plan.training
    total_steps = _steps(plan, len(rows))
    fused = base.device.type in ("cpu", "cuda")
    adam = torch.optim.AdamW(
        [trained.flat], lr=0.0, betas=(t.beta1, t.beta2), eps=t.epsilon, weight_decay=t.weight_decay, fused=fused
    )
    if t.optimizer_state == "keep":
        _restore(adam, trained, moments, who)
    if plan.privacy is not None:
        return _run_private(base, plan, rows, trained, adam, moments, total_steps, who)
    order = steps(
        rows,
        step_rows=t.batch_size * t.accumulation,
        batch_size=t.batch_size,
        overhead=OVERHEAD_CPU if base.device.type == "cpu" else OVERHEAD,
        rng=stream(plan.seed, "batches", header.client, header.round),
        pad_id=base.pad_id,
    )
    progress = _Progress()
    for i, (rate, micro) in enumerate(zip(rates(t, plan.progress, total_steps), order, strict=False)):
        adam.param_groups[0]["lr"] = rate
        begin = time.perf_counter()
        loss, count, pressed, norm = _step(base, plan, micro, trained, adam.step)
        progress.step_seconds += time.perf_counter() - begin
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise TrainingError(
                f"{who}, step {i + 1} of {total_steps}: the loss is {loss} and its gradient's norm {norm}; nothing is "
                f"sent. Lower training.learning_rate (now {t.learning_rate:g}), set clip_norm or a wider dtype"
            )
        progress.steps += 1
        progress.losses.append((loss, count))
        progress.norms.append(norm)
        for name, value in pressed.items():
            progress.penalties[name].append(value)
        progress.tokens += sum(int(b.attention.sum()) for b in micro)
        progress.answer_tokens += count if base.task_type == "causal-lm" else 0
        progress.rows += sum(len(b.tokens) for b in micro)
    if t.optimizer_state == "keep" and moments is not None:
        moments.update({k: v.cpu().numpy().copy() for k, v in adam.state[trained.flat].items()})
    return progress


def _run_private(
    base: Base,
    plan: TrainPlan,
    rows: Sequence[TokenRow],
    trained: _Trained,
    adam: torch.optim.AdamW,
    moments: Moments | None,
    total_steps: int,
    who: str,
) -> _Progress:
    """DP-SGD; all that is kept of it is the trained factors and how many steps there were."""
    t, progress = plan.training, _Progress()
    assert plan.privacy is not None
    private = PrivateGradient(
        base,
        {key: trained.now[key] for key in trained.shapes},
        plan.privacy,
        basis=trained.basis,
        cores={name: core.left for name, core in trained.cores.items()},
        autocast=t.autocast,
        who=who,
    )
    overhead = OVERHEAD_CPU if base.device.type == "cpu" else OVERHEAD
    trained.refresh()  # entering runs the layers
    with private:
        drawn = private.steps(rows, batch_size=t.batch_size, overhead=overhead, pad_id=base.pad_id)
        for rate, micro in zip(rates(t, plan.progress, total_steps), drawn, strict=False):
            adam.param_groups[0]["lr"] = rate
            trained.refresh()
            private.backward(micro)
            trained.press()
            adam.step()
            progress.steps += 1
    if not bool(trained.flat.isfinite().all()):
        raise TrainingError(f"{who}: the noised factors are not finite; lower training.learning_rate")
    if t.optimizer_state == "keep" and moments is not None:
        moments.update({k: v.cpu().numpy().copy() for k, v in adam.state[trained.flat].items()})
    return progress


def _step(
    base: Base, plan: TrainPlan, micro: Sequence[Batch], trained: _Trained, update: Callable[[], object]
) -> tuple[float, int, dict[str, float], float]:
    """One optimiser step: (loss sum, what it is a sum over, penalties, gradient norm). Not finite: no update."""
    autocast, clip_norm = plan.training.autocast, plan.training.clip_norm
    trained.refresh()
    count = sum(counted(base, batch) for batch in micro)
    total = 0.0
    for batch in micro:
        with torch.autocast(base.device.type, torch.bfloat16, enabled=autocast):
            loss = loss_sum(base, batch)
        (loss / count).backward()  # type: ignore[no-untyped-call]
        total += loss.item()
    pressed = trained.finish()
    gradient = trained.flat.grad
    assert gradient is not None
    norm = float(torch.linalg.vector_norm(gradient))
    if math.isfinite(total) and math.isfinite(norm):
        if clip_norm is not None and norm > clip_norm:
            gradient.mul_(clip_norm / (norm + 1e-6))
        update()
    return total, count, pressed, norm


def _steps(plan: TrainPlan, rows: int) -> int:
    """Optimiser steps of this round; a part of an epoch's last batch is a step."""
    t = plan.training
    if t.local_steps is not None:
        return t.local_steps
    assert t.local_epochs is not None  # check_plan
    return max(1, math.ceil(t.local_epochs * rows / (t.batch_size * t.accumulation)))


def _restore(adam: torch.optim.AdamW, trained: _Trained, moments: Moments | None, who: str) -> None:
    if moments is None:
        raise TrainingError(f"{who}: optimizer_state is 'keep', but nothing holds AdamW's moments; use 'fresh'")
    if not moments:
        return
    if moments["exp_avg"].shape != tuple(trained.flat.shape):
        raise TrainingError(
            f"{who}: the kept AdamW moments have {moments['exp_avg'].size} numbers, this plan trains "
            f"{trained.flat.numel()}; the rank or the trained parts changed, use optimizer_state 'fresh'"
        )
    adam.state[trained.flat] = {
        "step": torch.tensor(float(moments["step"])),
        **{k: to_tensor(moments[k], trained.flat.device) for k in ("exp_avg", "exp_avg_sq")},
    }


@contextmanager
def _threads(threads: int) -> Iterator[None]:
    before = torch.get_num_threads()
    if threads in (0, before):
        yield
        return
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def _checkpointed(base: Base, who: str) -> Iterator[None]:
    """Recompute each layer in the backward pass. Transformers' own switch needs `train()`, and dropout with it."""
    layers = [m for m in base.model.modules() if isinstance(m, GradientCheckpointingLayer)]
    if not layers:
        raise TrainingError(f"{who}: {type(base.model).__name__} has no layers to checkpoint; set checkpointing off")
    for layer in layers:
        layer.__dict__["forward"] = partial(checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False)
    try:
        yield
    finally:
        for layer in layers:
            del layer.__dict__["forward"]
