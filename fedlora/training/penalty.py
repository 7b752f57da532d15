"""Penalties on the trained factors, added to the gradient once per optimiser step, after all its micro-batches.

    tail      tail_penalty * sum over modules of ||B_tail||_F ||A_tail||_F
    overlap   squared     overlap * sum over modules of sum_ij (A_prev A^T)_ij^2
              absolute    overlap * sum over modules of sum_ij |A_prev A^T|_ij
              normalised  overlap * sum over modules of ||A P||_F^2 / ||A||_F^2
    anchor    anchor / 2 * sum over the entries x of trained A and B of F (x - x*)^2

A_prev holds the rows of A of sealed tasks, P projects on their span. Overlap is the penalty of O-LoRA (Wang et al.,
Findings of EMNLP 2023, equations 7 and 8, the squared form; its authors' code has the absolute one). Neither is free of
scale: with A small and B large the same product pays next to nothing. The normalised form, which is ours, is. Anchor is
elastic weight consolidation (Kirkpatrick et al., PNAS 2017, equation 3), with lambda = `anchor`.

In a subspace, A = M N with orthonormal rows of N: norms of A are those of M and A_prev A^T is (A_prev N^T) M^T, so that
everything is measured, and the gradient taken, in the coordinates M. An anchor's F and x* are in coordinates already.
Gradients are by hand: each is one product beside the value itself. Only trained rows and columns count.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedlora.adapter import Array
from fedlora.errors import TrainingError
from fedlora.state import Ask, Block, TrainPlan
from fedlora.training.lora import to_tensor

__all__ = ["Penalty", "penalties"]

Float = NDArray[np.float32]
Penalty = Callable[[], float]  # adds its gradient to that of the leaves, and returns its value
Views = Callable[[Tensor], Mapping[str, Tensor]]
TINY = float(np.finfo(np.float32).tiny)  # divides nothing by zero


def penalties(
    ask: Ask,
    plan: TrainPlan,
    leaves: Mapping[str, Tensor],
    flat: Tensor,
    views: Views,
    basis: Mapping[str, Float],
    who: str,
) -> dict[str, Penalty]:
    """The penalties of a plan by the name of their metric; none for a plan without.

    `leaves` are A `[rank, in]` and B `[out, rank]` by key, those that are trained with their gradient. `flat` holds all
    that is trained, and `views` cuts a buffer like it into parts by key. `basis` is N `[dim, in]` by module, or empty.
    The constants, such as the rows of A_prev, are made here, once.
    Raises: TrainingError if the ask lacks what a penalty of its plan is measured against.
    """
    names = sorted(key.removeprefix("A:") for key in leaves if key.startswith("A:"))
    found: dict[str, Penalty] = {}
    if plan.tail_penalty:
        found["tail_penalty"] = _tail(plan, [(leaves[f"A:{n}"], leaves[f"B:{n}"]) for n in names])
    if plan.overlap:
        blocks = ask.blocks[: plan.against]
        if len(blocks) < plan.against or not any(b.adapter[n].rank for b in blocks for n in names):
            raise TrainingError(
                f"{who}: the overlap is measured against {plan.against} blocks, and the ask has {len(ask.blocks)}, "
                "some perhaps of rank 0; were blocks of sealed tasks merged or left out?"
            )
        if plan.overlap_form == "normalised" and ask.subspace is not None and ask.subspace.seed is None:
            raise TrainingError(
                f"{who}: the normalised overlap needs a basis of orthonormal rows, and a designed one has others; "
                "use the squared form, or a public subspace"
            )
        found["overlap_penalty"] = _overlap(plan, blocks, {n: leaves[f"A:{n}"] for n in names}, basis)
    if plan.anchor:
        found["anchor_penalty"] = _anchor(ask, plan, flat, views, who)
    return found


def _tail(plan: TrainPlan, pairs: Sequence[tuple[Tensor, Tensor]]) -> Penalty:
    """d ||B|| ||A|| = ||A|| B / ||B|| dB + ||B|| A / ||A|| dA, and zero where either is zero."""
    rows = slice(plan.rank - plan.tail, plan.rank)

    @torch.no_grad()
    def press() -> float:
        total = torch.zeros((), dtype=torch.float64, device=pairs[0][0].device)
        for a, b in pairs:
            size_a, size_b = (torch.linalg.vector_norm(x) for x in (a[rows], b[:, rows]))
            live = ((size_a > 0) & (size_b > 0)).to(a.dtype) * plan.tail_penalty
            total += live * size_a * size_b
            if a.grad is not None:
                a.grad[rows] += (live * size_b / size_a.clamp_min(TINY)) * a[rows]
            if b.grad is not None:
                b.grad[:, rows] += (live * size_a / size_b.clamp_min(TINY)) * b[:, rows]
        return float(total)

    return press


def _overlap(
    plan: TrainPlan, blocks: Sequence[Block], leaves: Mapping[str, Tensor], basis: Mapping[str, Float]
) -> Penalty:
    """With C = A P^T, P the rows `[k, dim]`: d sum C^2 = 2 C P dA, d sum |C| = sign(C) P dA, and for orthonormal P
    d (||C||^2 / ||A||^2) = 2 (C P - A ||C||^2 / ||A||^2) / ||A||^2 dA. Modules of one shape go through one product."""
    alike: dict[tuple[int, ...], list[tuple[Tensor, Float]]] = defaultdict(list)
    for name, leaf in leaves.items():
        rows = np.concatenate([block.adapter[name].a for block in blocks]).astype(np.float32)
        if len(rows):
            rows = _span(rows) if plan.overlap_form == "normalised" else rows
            rows = rows @ basis[name].T if name in basis else rows
            alike[(*leaf.shape, len(rows))].append((leaf, rows))
    groups = [
        ([leaf for leaf, _ in group], to_tensor(np.stack([rows for _, rows in group]), group[0][0].device))
        for group in alike.values()
    ]

    @torch.no_grad()
    def press() -> float:
        total = torch.zeros((), dtype=torch.float64, device=groups[0][1].device)
        for members, rows in groups:
            a = torch.stack(members)
            c = a @ rows.mT
            if plan.overlap_form == "absolute":
                value, gradient = c.abs().sum(), c.sign() @ rows
            elif plan.overlap_form == "squared":
                value, gradient = c.square().sum(), 2 * (c @ rows)
            else:
                size = a.square().sum((1, 2), keepdim=True).clamp_min(TINY)
                share = c.square().sum((1, 2), keepdim=True) / size
                value, gradient = share.sum(), (c @ rows).addcmul_(a, share, value=-1).mul_(2 / size)
            total += value
            for leaf, change in zip(members, gradient.mul_(plan.overlap), strict=True):
                assert leaf.grad is not None  # A is trained: check_plan
                leaf.grad.add_(change)
        return plan.overlap * float(total)

    return press


def _span(rows: Float) -> Float:
    """Orthonormal rows of the span of `rows [k, in]`, followed by rows of zeros: `[min(k, in), in]`.

    Directions below float32's rounding of the largest are none. Householder QR first, so that the SVD is a small one.
    """
    q, r = np.linalg.qr(rows.T.astype(np.float64))
    u, s, _ = np.linalg.svd(r)
    live = s > s.max(initial=0.0) * max(rows.shape) * np.finfo(np.float32).eps
    return np.asarray(((q @ u) * live).T, np.float32)


def _anchor(ask: Ask, plan: TrainPlan, flat: Tensor, views: Views, who: str) -> Penalty:
    """With d = x - x*: the gradient is anchor * F d. On the flat buffer, so a few operations whatever is trained."""
    fisher, centre = torch.zeros_like(flat), torch.zeros_like(flat)
    for of, buffer in (("fisher", fisher), ("anchor", centre)):
        for key, view in views(buffer).items():
            if key[:2] in ("A:", "B:"):
                view.copy_(
                    to_tensor(_constant(ask.arrays, f"{of}-{key}", tuple(view.shape), plan.rank, who), flat.device)
                )

    @torch.no_grad()
    def press() -> float:
        assert flat.grad is not None
        away = flat - centre
        pull = fisher * away
        flat.grad.add_(pull, alpha=plan.anchor)
        return plan.anchor / 2 * float((pull * away).sum(dtype=torch.float64))

    return press


def _constant(arrays: Mapping[str, Array], key: str, shape: tuple[int, ...], rank: int, who: str) -> Array:
    """The first `rank` rows of A's, or columns of B's, array `key` of an anchored plan."""
    if key not in arrays:
        raise TrainingError(f"{who}: an anchored plan needs {key}, which the ask does not carry")
    x = arrays[key]
    leading = x[:rank] if key.split(":", 1)[0].endswith("A") else x[:, :rank] if x.ndim == 2 else x
    if leading.shape != shape:
        raise TrainingError(f"{who}: {key} has shape {x.shape}, the plan and this base need at least {shape}")
    if not np.isfinite(leading).all() or (key.startswith("fisher") and leading.min(initial=0.0) < 0):
        raise TrainingError(f"{who}: {key} must be finite, and a Fisher information not negative")
    return leading
