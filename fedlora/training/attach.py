"""Put a state on the resident base: one adapter for all rows, or for every row a mixture of several."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fedlora.adapter import Adapter, Array, stack
from fedlora.base import Base
from fedlora.errors import AdapterError
from fedlora.state import Block
from fedlora.training.lora import Gates, along, to_tensor
from fedlora.wire import blocks_id

__all__ = ["attach", "mixture"]


def attach(
    base: Base,
    blocks: Sequence[Block],
    blocks_id: str,
    frozen: Adapter | None = None,
    head: Mapping[str, Array] | None = None,
) -> None:
    """Attach blocks, one client's frozen factors (or none) and a head, and take off any trained pair.

    Blocks already attached under `blocks_id` cost nothing. Raises: AdapterError if something does not fit the base.
    """
    for layer in base.layers.values():
        layer.set_pair(None)
    base.set_blocks(blocks, blocks_id)
    base.set_frozen(frozen)
    if head is not None:
        base.set_head(head)


@contextmanager
def mixture(
    base: Base,
    blocks: Sequence[Block],
    known: Array,
    weights: Array,
    heads: Sequence[Mapping[str, Array]],
) -> Iterator[Gates]:
    """While it lasts, every row has its own mixture of the tasks' adapters, all in one forward pass:

        y = W0 x + sum_e g_e(row) B_e A_e x,    g = weights @ known

    `weights [n, tasks]` of n rows, `known [tasks, blocks]`: how often a task has each block (1 or 0). A block that
    every task has once goes into the weight as ever; the others are experts. The gates that come out say by `take`
    which rows the next batch holds; at first all. For a row of one task alone this is that task's own adapter and head.

    Of a classifier `heads` are the tasks' heads. Its last module, whose outputs are the classes, gives the logits of
    every task's own, side by side: `[rows, tasks * classes]`; modules of the head before it are mixed as adapters are.

    Cost: `2 R (in + out)` a token and module for experts of R ranks in all; the heads once for each task; no copy of
    the base. Source: Zadouri et al., Pushing Mixture of Experts to the Limit, ICLR 2024, section 2 (LoRA experts that a
    router merges softly); there gates are of tokens and trained with the experts, here of rows and out of sums.
    Raises: AdapterError if shapes do not agree or blocks or heads do not fit the base.
    """
    known, weights = np.asarray(known, np.float64), np.asarray(weights, np.float64)
    tasks = weights.shape[-1]
    if weights.ndim != 2 or known.shape != (tasks, len(blocks)) or len(heads) != tasks:
        raise AdapterError(
            f"a mixture needs weights [rows, tasks], known [tasks, blocks] and a head for each task: got "
            f"{weights.shape}, {known.shape} for {len(blocks)} blocks and {len(heads)} heads"
        )
    everywhere = (known == 1.0).all(0)
    shared = [block for block, every in zip(blocks, everywhere, strict=True) if every]
    experts = [block.adapter for block, every in zip(blocks, everywhere, strict=True) if not every]
    for adapter in experts:
        base.require_fit(adapter)
    attach(base, shared, blocks_id(shared))
    gates = Gates(to_tensor(weights, base.device), to_tensor(known[:, ~everywhere], base.device))
    total = stack(experts) if experts else {}
    with ExitStack() as undo:
        for name, factors in total.items():
            owner = [i for i, adapter in enumerate(experts) for _ in range(adapter[name].rank)]
            base.layers[name].set_experts(factors if owner else None, owner, gates)
            undo.callback(base.layers[name].set_experts, None)
        for hook in _mix_heads(base, heads, gates):
            undo.callback(hook.remove)
        yield gates


def _mix_heads(base: Base, heads: Sequence[Mapping[str, Array]], gates: Gates) -> list[Any]:
    """Hooks over the modules of a classifier's head: the last gives every task's logits, those before it are mixed."""
    if not base.head:
        return []
    classes = base.model.config.num_labels
    wide: dict[str, bool] = {}  # by module of the head: whether its outputs are as many as the classes
    for name, parameter in sorted(base.head.items()):
        owner = name.rpartition(".")[0]
        wide[owner] = wide.get(owner, True) and len(parameter) == classes
    if sum(wide.values()) != 1:
        raise AdapterError(f"one module of the head must have {classes} outputs, the classes; got {wide}")
    modules = {owner: base.model.get_submodule(owner) for owner in wide}
    copies: dict[str, list[nn.Module]] = {owner: [] for owner in wide}
    for head in heads:
        base.set_head(head)
        for owner, module in modules.items():
            copies[owner].append(copy.deepcopy(module))
    return [m.register_forward_hook(_Heads(copies[o], gates, last=wide[o])) for o, m in modules.items()]


class _Heads:
    """In place of one module of a head, that module of every task."""

    def __init__(self, copies: Sequence[nn.Module], gates: Gates, *, last: bool) -> None:
        self._copies, self._gates, self._last = copies, gates, last

    def __call__(self, _module: nn.Module, inputs: tuple[Tensor, ...], _output: Tensor) -> Tensor:
        outputs = [module(*inputs) for module in self._copies]
        if self._last:
            return torch.cat(outputs, -1)
        gates = along(self._gates.tasks, outputs[0].shape[:-1]).to(outputs[0].dtype)
        return torch.stack([gates[..., i : i + 1] * out for i, out in enumerate(outputs)]).sum(0)
