"""What a client measures on its training rows before a task: where its inputs lie, its features, what matters to it."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache, partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fedlora.base import Base
from fedlora.continual.router import omega
from fedlora.data.batches import Batch, in_order, pad
from fedlora.data.rows import TokenRow
from fedlora.errors import BaseMismatch, TrainingError
from fedlora.rng import public_normal
from fedlora.state import Answer, Ask, Header, Measure, part
from fedlora.training.attach import attach
from fedlora.training.local import check_rows
from fedlora.training.lora import Pair, to_tensor
from fedlora.training.objective import class_logits, full_logits, hidden_states, loss_sum, mean_states
from fedlora.training.start import bases, coordinates
from fedlora.wire import blocks_id

__all__ = ["features", "measure"]

Float = NDArray[np.float32]
Sums = dict[str, NDArray[np.float64]]


def measure(base: Base, header: Header, ask: Ask, rows: Sequence[TokenRow], *, batch_size: int) -> Answer:
    """The sums and means that `ask.measure` asks for over these rows, as `fedlora.state.Measure` defines them.

    Sketch, energy and Fisher information are those of the base with the ask's blocks, frozen factors and head. The
    Fisher's pair is the ask's `A:` and `B:` at scale 1 (in a subspace, A is coordinates, and so is its gradient); it is
    the empirical one, of the answers or labels that the first `fisher` rows have. Features are of the bare base.
    Padding counts nowhere; a pooler has one input a row. All is summed up in float64. Cost: two passes forward at most,
    and one forward and backward for each row of the Fisher.

    Metrics: tokens, all but padding, of one pass over the rows; seconds, of this call.
    Raises: TrainingError if the ask has no measure or there are no rows, an embedding or a module that no token of
    these rows passed is to be sketched, a label is not below `classes`, or the Fisher's pair or rows cannot be used;
    BaseMismatch if the base is not the server's; AdapterError if blocks do not fit.
    """
    begin = time.perf_counter()
    who = f"client {header.client}, round {header.round}"
    what = ask.measure
    if what is None:
        raise TrainingError(f"{who}: the ask measures nothing; kind {header.kind!r} is not a measurement")
    if header.base != base.fingerprint:
        raise BaseMismatch(f"{who}: the run was opened with base {header.base or '(none)'}, here is {base.fingerprint}")
    if not rows:
        raise TrainingError(f"{who}: there are no rows to measure; is its share of the data empty?")
    sums: Sums = {}
    if what.classes:
        sums |= _features_by_label(base, rows, what, batch_size, who)
    try:
        attach(base, ask.blocks, blocks_id(ask.blocks), ask.frozen, part(ask.arrays, "head") or None)
        if what.reads:
            sums |= _reads_by_label(base, rows, what, batch_size, who)
        if what.sketch:
            sums |= _sketches(base, what, rows, batch_size, who)
        if what.fisher:
            check_rows(base, rows[: what.fisher], header)
            sums |= _fisher(base, header, ask, rows[: what.fisher], who)
    finally:
        base.set_frozen(None)
        for layer in base.layers.values():
            layer.set_pair(None)
    metrics = {"tokens": float(sum(len(row.tokens) for row in rows)), "seconds": time.perf_counter() - begin}
    arrays = {key: x.astype(np.float32) for key, x in sorted(sums.items())}
    return Answer(examples=len(rows), metrics=metrics, arrays=arrays)


def features(base: Base, rows: Sequence[TokenRow], *, batch_size: int) -> Float:
    """The mean over a row's tokens of the bare base's last hidden states, scaled to norm 1: `[rows, features]`.

    Of a language model's row only what is not to be answered counts, since that is all there is when a task is to be
    found; a row that is nothing but answer counts whole. Whatever was attached is taken off. Cost: one forward pass.
    """
    out = np.zeros((len(rows), base.layout.features), np.float32)
    attach(base, (), blocks_id(()))
    with torch.inference_mode():
        for batch, indices in in_order(rows, batch_size=batch_size, pad_id=base.pad_id):
            asked = batch.attention * ~batch.answer
            asked = np.where(asked.any(1, keepdims=True), asked, batch.attention)
            out[indices] = torch.nn.functional.normalize(mean_states(base, batch, asked)).cpu().numpy()
    return out


def _features_by_label(base: Base, rows: Sequence[TokenRow], what: Measure, batch_size: int, who: str) -> Sums:
    """Sums by class of the rows' features, and their sketch; rows without a label are of class 0."""
    labels = np.array([0 if row.label is None else row.label for row in rows])
    found = features(base, rows, batch_size=batch_size).astype(np.float64)
    return _sums_by_label("feature", found, labels, what.classes, what, who)


def _reads_by_label(base: Base, rows: Sequence[TokenRow], what: Measure, batch_size: int, who: str) -> Sums:
    """Sums by class of what the head reads under what is attached, their energy and their sketch, by the rows."""
    if base.classifier is None or not what.columns or any(row.label is None for row in rows):
        raise TrainingError(
            f"{who}: what a head reads needs model.pooling=mean, columns of a sketch, and labelled rows"
        )
    found = np.zeros((len(rows), base.layout.features))
    with torch.inference_mode():
        for batch, indices in in_order(rows, batch_size=batch_size, pad_id=base.pad_id):
            found[indices] = mean_states(base, batch, batch.attention).cpu().numpy()
    sums = _sums_by_label("read", found, np.array([row.label for row in rows]), what.reads, what, who)
    return {key: x / len(rows) for key, x in {**sums, "read:energy": np.array([np.sum(found**2)])}.items()}


def _sums_by_label(
    name: str, found: NDArray[np.float64], labels: NDArray[np.int64], classes: int, what: Measure, who: str
) -> Sums:
    """Sums and counts by class of `found [rows, d]`, and with columns the sketch of their second moment."""
    if labels.min() < 0 or labels.max() >= classes:
        raise TrainingError(f"{who}: labels go from {labels.min()} to {labels.max()}, {classes} classes are asked for")
    total = np.zeros((classes, found.shape[1]))
    np.add.at(total, labels, found)
    sums = {f"{name}:sum": total, f"{name}:count": np.bincount(labels, minlength=classes).astype(np.float64)}
    if what.columns:
        sums[f"{name}:sketch"] = found.T @ (found @ omega(what.seed, found.shape[1], what.columns))
    return sums


@lru_cache(maxsize=1024)
def _omega(seed: int, name: str, inp: int, columns: int) -> Float:
    omega = public_normal(seed, "sketch", name, shape=(inp, columns)).astype(np.float32)
    omega.flags.writeable = False
    return omega


class _Sketch:
    """Sums over the `count` inputs x of one module: `product` x x^T Omega `[in, sketch]`, and `energy` |x|^2."""

    def __init__(self, omega: Tensor) -> None:
        self.omega = omega
        self.count = 0
        self.product = torch.zeros(omega.shape, dtype=torch.float64, device=omega.device)
        self.energy = torch.zeros(1, dtype=torch.float64, device=omega.device)

    def add(self, x: Tensor) -> None:
        """`x`: `[tokens, in]`."""
        x = x.float()
        self.count += len(x)
        self.product += x.t() @ (x @ self.omega)
        self.energy += x.square().sum(dtype=torch.float64)


def _sketches(base: Base, what: Measure, rows: Sequence[TokenRow], batch_size: int, who: str) -> Sums:
    tables = [n for n, m in base.layout.modules.items() if m.kind == "embedding"]
    if tables:
        raise TrainingError(f"{who}: {tables[0]} is an embedding: it looks tokens up and has no input to sketch")
    sketches: dict[str, _Sketch] = {}
    for name, inp in base.layout.inputs().items():
        omega = to_tensor(_omega(what.seed, name, inp, what.sketch), base.device)
        sketches[name] = _Sketch(omega)
    with torch.inference_mode():
        for batch, _ in in_order(rows, batch_size=batch_size, pad_id=base.pad_id):
            with _seen(base, sketches, batch, who):
                _forward(base, batch)
    if unseen := [name for name, sketch in sketches.items() if not sketch.count]:
        raise TrainingError(f"{who}: no token of these rows passed {unseen[0]}, so there is no input of it to sketch")
    out: Sums = {}
    for name, sketch in sketches.items():
        out[f"sketch:{name}"] = sketch.product.cpu().numpy() / sketch.count
        out[f"energy:{name}"] = sketch.energy.cpu().numpy() / sketch.count
    return out


def _forward(base: Base, batch: Batch) -> None:
    """One pass through every adapted module; logits of a language model only where its output head is one."""
    if base.task_type == "sequence-classification":
        class_logits(base, batch)
    elif any(layer.module is base.model.get_output_embeddings() for layer in base.layers.values()):
        full_logits(base, batch)
    else:
        hidden_states(base, batch)


@contextmanager
def _seen(base: Base, sketches: Mapping[str, _Sketch], batch: Batch, who: str) -> Iterator[None]:
    """Every input of these modules in one forward pass goes into its sketch, but for padding."""
    there = torch.from_numpy(batch.attention.astype(np.bool_)).to(base.device)
    padded = not batch.attention.all()

    def see(name: str, _module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        x = inputs[0]
        if x.shape[:-1] in (there.shape, (there.numel(),)):
            x = x.reshape(-1, x.shape[-1])
            x = x[there.flatten()] if padded else x
        elif padded and x.shape[:-1] != there.shape[:1]:  # a pooler reads one token of each row
            raise TrainingError(
                f"{who}: {name} reads {tuple(x.shape)} where the batch is {tuple(there.shape)}, so padding cannot be "
                "told from tokens; leave it out of model.target_modules, or measure with batches of one row"
            )
        sketches[name].add(x.reshape(-1, x.shape[-1]))

    hooks = [base.layers[name].module.register_forward_pre_hook(partial(see, name)) for name in sketches]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _fisher(base: Base, header: Header, ask: Ask, rows: Sequence[TokenRow], who: str) -> Sums:
    """Sums of squared gradients, by entry of the ask's pair; row by row, for the square of a sum is another thing."""
    if base.layout.head and not part(ask.arrays, "head"):
        raise TrainingError(f"{who}: a Fisher information of a classifier needs its head: arrays in the ask")
    basis = {n: to_tensor(x, base.device) for n, x in bases(ask, header, base.layout).items()}
    given = {of: part(ask.arrays, of) for of in ("A", "B")}
    leaves: dict[str, Tensor] = {}
    for name, module in coordinates(ask, base.layout).modules.items():
        a, b = (given[of].get(name) for of in ("A", "B"))
        if a is None or b is None or a.shape != (len(a), module.inp) or b.shape != (module.out, len(a)):
            raise TrainingError(
                f"{who}: a Fisher information needs A:{name} [rank, {module.inp}] and B:{name} [{module.out}, rank] in "
                f"the ask, got {[None if x is None else x.shape for x in (a, b)]}"
            )
        leaf = to_tensor(a, base.device)
        leaves[f"A:{name}"] = (leaf @ basis[name] if name in basis else leaf).requires_grad_()
        leaves[f"B:{name}"] = to_tensor(b.T, base.device).t().requires_grad_()
        base.layers[name].set_pair(Pair(leaves[f"A:{name}"], leaves[f"B:{name}"], 1.0))
    total = {key: torch.zeros(tuple(ask.arrays[key].shape), dtype=torch.float64, device=base.device) for key in leaves}
    for row in rows:
        loss = loss_sum(base, pad([row], base.pad_id))
        grads = torch.autograd.grad(loss, list(leaves.values()), materialize_grads=True)
        for key, grad in zip(leaves, grads, strict=True):
            of, name = key.split(":", 1)
            total[key] += (grad @ basis[name].t() if of == "A" and name in basis else grad).square()
    return {f"fisher-{key}": x.cpu().numpy() for key, x in total.items()}
