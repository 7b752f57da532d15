"""Penalties against autograd on their formulas, and their place in a round of training."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from fedlora.adapter import Adapter, Factors
from fedlora.base import Base
from fedlora.data.rows import TokenRow
from fedlora.errors import TrainingError
from fedlora.state import Ask, Block, Header, Layout, LocalTraining, Module, Overlap, Subspace, TrainPlan
from fedlora.training.local import train_client
from fedlora.training.penalty import penalties
from fedlora.training.start import check_plan

Load = Callable[..., Base]
MakeHeader = Callable[..., Header]
MakeAsk = Callable[..., Ask]
Arrays = dict[str, np.ndarray]
FORMS = ("squared", "absolute", "normalised")
LAYOUT = Layout(modules={"k": Module(out=5, inp=12), "q": Module(out=7, inp=12), "v": Module(out=4, inp=9)})
PLAN = TrainPlan(
    method="test",
    rank=3,
    rows=3,
    scale=2.0,
    train=("A", "B"),
    send=("A", "B"),
    training=LocalTraining(learning_rate=1e-2, local_steps=1, local_epochs=None, batch_size=1),
)


def normals(*shape: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def sealed(layout: Layout, ranks: Mapping[str, int], seed: int) -> Block:
    """A block with these ranks by module; scale 1."""
    pairs = {
        n: Factors(normals(ranks.get(n, 2), m.inp, seed=seed), normals(m.out, ranks.get(n, 2), seed=seed + 1))
        for n, m in layout.modules.items()
    }
    return Block(adapter=Adapter(pairs), born=1)


class Flat:
    """Leaves in one buffer, as training has them; every gradient begins at one, since penalties add to it."""

    def __init__(self, parts: Arrays) -> None:
        self.shapes = {k: x.shape for k, x in parts.items()}
        self.flat = torch.zeros(sum(x.size for x in parts.values()))
        self.flat.grad = torch.ones_like(self.flat)
        self.leaves: dict[str, Tensor] = {}
        grads = self.views(self.flat.grad)
        for key, view in self.views(self.flat).items():
            view.copy_(torch.from_numpy(parts[key]))
            self.leaves[key] = view.detach().requires_grad_()
            self.leaves[key].grad = grads[key]

    def views(self, buffer: Tensor) -> dict[str, Tensor]:
        out, at = {}, 0
        for key, (rows, columns) in self.shapes.items():
            part = buffer[at : at + rows * columns]
            out[key] = part.view(columns, rows).t() if key[0] == "B" else part.view(rows, columns)
            at += rows * columns
        return out

    def added(self) -> dict[str, Tensor]:
        return {k: x.grad - 1.0 for k, x in self.leaves.items() if x.grad is not None}


def pair(layout: Layout = LAYOUT, rank: int = 3) -> Arrays:
    out: Arrays = {}
    for i, (n, m) in enumerate(layout.modules.items()):
        out[f"A:{n}"] = normals(rank, m.inp, seed=10 + i)
        out[f"B:{n}"] = normals(m.out, rank, seed=20 + i)
    return out


def by_formula(form: str, a: Tensor, previous: np.ndarray) -> Tensor:
    """The overlap of one module in float64; P by the pseudo-inverse."""
    p = torch.from_numpy(previous).double()
    if form == "squared":
        return (p @ a.T).square().sum()
    if form == "absolute":
        return (p @ a.T).abs().sum()
    onto = torch.linalg.pinv(p, rtol=1e-5) @ p
    return (a @ onto).square().sum() / a.square().sum()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("case", ["plain", "dependent", "subspace"])
def test_the_overlap_and_its_gradient_are_those_of_autograd(form: str, case: str) -> None:
    """Sealed tasks of unlike ranks, one with none in a module; rows that repeat; coordinates in a subspace."""
    blocks = [sealed(LAYOUT, {"k": 2, "q": 4, "v": 0}, 1), sealed(LAYOUT, {"k": 3, "q": 1, "v": 2}, 5)]
    if case == "dependent":
        blocks.append(blocks[0])
    if case == "plain":
        blocks[1] = sealed(LAYOUT, {"k": 12, "q": 1, "v": 0}, 5)  # more rows than k has inputs; none for v
    basis: Arrays = {}
    parts = pair()
    if case == "subspace":
        basis = {n: np.linalg.qr(normals(m.inp, 6, seed=40))[0].T.astype(np.float32) for n, m in LAYOUT.modules.items()}
        parts = pair(LAYOUT.within(6))
    plan = replace(PLAN, overlap=0.7, overlap_form=form, against=len(blocks))  # type: ignore[arg-type]
    ask = Ask(plan=plan, blocks=(*blocks, sealed(LAYOUT, {}, 9)))  # the last is no sealed task's
    held = Flat(parts)
    found = penalties(ask, plan, held.leaves, held.flat, held.views, basis, "c0")
    assert list(found) == ["overlap_penalty"]
    value = found["overlap_penalty"]()

    leaves = {n: torch.from_numpy(parts[f"A:{n}"]).double().requires_grad_() for n in LAYOUT.modules}
    total = torch.zeros((), dtype=torch.float64)
    for n, leaf in leaves.items():
        previous = np.concatenate([b.adapter[n].a for b in blocks])
        if len(previous):
            a = leaf @ torch.from_numpy(basis[n]).double() if n in basis else leaf
            total = total + 0.7 * by_formula(form, a, previous)
    total.backward()  # type: ignore[no-untyped-call]
    assert value == pytest.approx(total.item(), rel=1e-5)
    for key, got in held.added().items():
        want = leaves[key[2:]].grad if key[0] == "A" else None
        size = 1.0 if want is None else max(1e-2, float(want.abs().max()))
        np.testing.assert_allclose(got, 0.0 if want is None else want, atol=1e-4 * size, err_msg=key)
    again = found["overlap_penalty"]()
    assert again == value  # nothing but gradients was changed


def test_the_normalised_overlap_does_not_fall_when_a_shrinks() -> None:
    """Homogeneous of degree 0: the same value for c A, a gradient at a right angle to A, and 0 at A = 0."""
    plan = replace(PLAN, overlap=2.0, overlap_form="normalised", against=1)
    ask = Ask(plan=plan, blocks=(sealed(LAYOUT, {}, 1),))
    values = []
    for c in (1.0, 0.01, 0.0):
        held = Flat({k: x * np.float32(c) for k, x in pair().items()})
        values.append(penalties(ask, plan, held.leaves, held.flat, held.views, {}, "c0")["overlap_penalty"]())
        for key, x in held.added().items():
            leaf = held.leaves[key].detach()
            assert abs(float((x * leaf).sum())) <= 1e-4 * float(x.norm() * leaf.norm())
            assert torch.isfinite(x).all()
    assert values[0] == pytest.approx(values[1], rel=1e-4)
    assert 0 < values[0] <= 2.0 * len(LAYOUT.modules)
    assert values[2] == 0.0
    inside = Flat({f"{p}:{n}": x for n, f in ask.blocks[0].adapter.items() for p, x in (("A", f.a), ("B", f.b))})
    whole = penalties(ask, plan, inside.leaves, inside.flat, inside.views, {}, "c0")["overlap_penalty"]()
    assert whole == pytest.approx(2.0 * len(LAYOUT.modules), rel=1e-5)


@pytest.mark.parametrize("train", [("A", "B"), ("B",)])
def test_the_anchor_and_its_gradient_are_those_of_autograd(train: tuple[str, ...]) -> None:
    """Fisher and anchor come with more rows than this client trains."""
    plan = replace(PLAN, anchor=5.0, train=train)  # type: ignore[arg-type]
    parts = {k: x for k, x in pair().items() if k[0] in train}
    wide = pair(rank=5)
    arrays = {f"fisher-{k}": x**2 for k, x in wide.items()} | {f"anchor-{k}": x - 1 for k, x in wide.items()}
    held = Flat(parts)
    found = penalties(Ask(plan=plan, arrays=arrays), plan, held.leaves, held.flat, held.views, {}, "c0")
    value = found["anchor_penalty"]()
    total = 0.0
    for key, x in parts.items():
        cut = np.s_[:3] if key[0] == "A" else np.s_[:, :3]
        leaf = torch.from_numpy(x).requires_grad_()
        far = leaf - torch.from_numpy(arrays[f"anchor-{key}"][cut])
        loss = 2.5 * (torch.from_numpy(arrays[f"fisher-{key}"][cut]) * far**2).sum()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.testing.assert_close(held.added()[key], leaf.grad, rtol=1e-4, atol=1e-5)
        total += loss.item()
    assert value == pytest.approx(total, rel=1e-5)


def test_a_penalty_without_what_it_is_measured_against_is_refused() -> None:
    held = Flat(pair())

    def refuse(match: str, ask: Ask, **changes: object) -> None:
        plan = replace(PLAN, **changes)  # type: ignore[arg-type]
        with pytest.raises(TrainingError, match=f"^c0: .*{match}"):
            penalties(ask, plan, held.leaves, held.flat, held.views, {}, "c0")

    block = sealed(LAYOUT, {}, 1)
    refuse("against 2 blocks, and the ask has 1", Ask(blocks=(block,)), overlap=1.0, against=2)
    empty = sealed(LAYOUT, {"k": 0, "q": 0, "v": 0}, 1)
    refuse("against 1 blocks, and the ask has 1, some perhaps of rank 0", Ask(blocks=(empty,)), overlap=1.0, against=1)
    full = {f"{of}-{k}": np.abs(x) for of in ("fisher", "anchor") for k, x in pair().items()}
    for key in ("fisher-A:q", "anchor-B:v"):
        left = {k: x for k, x in full.items() if k != key}
        refuse(f"an anchored plan needs {key}, which the ask does not carry", Ask(arrays=left), anchor=1.0)
        short = {**full, key: full[key][:-1]}
        refuse(f"{key} has shape .*, the plan and this base need at least", Ask(arrays=short), anchor=1.0)
        nan = {**full, key: full[key] * np.nan}
        refuse(f"{key} must be finite, and a Fisher information not negative", Ask(arrays=nan), anchor=1.0)
    minus = {**full, "fisher-A:q": -full["fisher-A:q"]}
    refuse("fisher-A:q must be finite, and a Fisher information not negative", Ask(arrays=minus), anchor=1.0)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"overlap": -1.0, "against": 1}, "overlap must be finite and not negative, got -1"),
        ({"overlap": math.inf, "against": 1}, "overlap must be finite and not negative, got inf"),
        ({"anchor": math.nan}, "anchor must be finite and not negative, got nan"),
        ({"against": -1}, "against counts blocks, got -1"),
        ({"overlap": 0.5}, "overlap 0.5 against 0 blocks: there is nothing to be orthogonal to"),
        ({"overlap": 0.5, "against": 1, "train": ("B",)}, "overlap 0.5 would be a constant, because A is frozen"),
        ({"overlap": 0.5, "against": 1, "overlap_form": "cubed"}, "overlap_form is one of squared, .*got 'cubed'"),
        (
            {"overlap": 0.5, "against": 1, "core": True, "train": ("R",), "send": ("R",)},
            "would be a constant, because A is frozen",
        ),
        (
            {"anchor": 2.0, "core": True, "train": ("R",), "send": ("R",)},
            "anchor 2 would be a constant, because neither",
        ),
    ],
)
def test_penalties_that_cannot_work_are_refused_by_name(changes: Mapping[str, object], match: str) -> None:
    check_plan(replace(PLAN, overlap=0.5, against=1, anchor=1.0), LAYOUT, "c0")
    with pytest.raises(TrainingError, match=f"^c0: .*{match}"):
        check_plan(replace(PLAN, **changes), LAYOUT, "c0")  # type: ignore[arg-type]


def penalised(base: Base, plan: TrainPlan, ask: Ask, form: str) -> Ask:
    plan = replace(ask.plan or plan, overlap=0.3, overlap_form=form, against=1, anchor=4.0)  # type: ignore[arg-type]
    extra = {f"fisher-{k}": np.abs(x) for k, x in ask.arrays.items() if k[0] in "AB"}
    extra |= {f"anchor-{k}": x + 0.2 for k, x in ask.arrays.items() if k[0] in "AB"}
    return replace(ask, plan=plan, arrays={**ask.arrays, **extra}, blocks=(sealed_small(base),))


def sealed_small(base: Base) -> Block:
    block = sealed(base.layout, {}, 3)
    return replace(block, adapter=Adapter({n: Factors(f.a, f.b * 0.01) for n, f in block.adapter.items()}))


@pytest.mark.parametrize("form", FORMS)
def test_penalties_count_once_a_step_whatever_the_accumulation(
    form: str, load: Load, rows: list[TokenRow], plan: TrainPlan, header: MakeHeader, given: MakeAsk
) -> None:
    base, rows = load("llama"), rows[:24]
    answers = []
    for batch, times in ((24, 1), (6, 4)):
        training = replace(plan.training, batch_size=batch, accumulation=times, local_steps=3)
        ask = penalised(base, plan, given(base, replace(plan, training=training)), form)
        answers.append(train_client(base, header(base), ask, rows, threads=1))
    whole, cut = answers
    for key, x in whole.arrays.items():
        np.testing.assert_allclose(cut.arrays[key], x, atol=5e-5, err_msg=key)
    assert ask.plan is not None
    free = replace(ask, plan=replace(ask.plan, overlap=0.0, anchor=0.0))
    plain = train_client(base, header(base), free, rows, threads=1)
    assert not {"overlap_penalty", "anchor_penalty", "tail_penalty"} & plain.metrics.keys()
    for name in ("overlap_penalty", "anchor_penalty"):
        assert whole.metrics[name] == pytest.approx(cut.metrics[name], rel=1e-4)
        assert whole.metrics[name] > 0
        alone = replace(ask.plan, **{"anchor" if name[0] == "o" else "overlap": 0.0})  # type: ignore[arg-type]
        pressed = train_client(base, header(base), replace(ask, plan=alone), rows, threads=1)
        assert max(float(np.abs(x - plain.arrays[k]).max()) for k, x in pressed.arrays.items()) > 1e-3


def test_training_lowers_the_overlap_also_in_a_subspace(
    load: Load, rows: list[TokenRow], plan: TrainPlan, header: MakeHeader
) -> None:
    base = load("llama")
    block = sealed_small(base)
    g = np.random.default_rng(0)
    arrays = {
        f"N:{n}": np.linalg.qr(g.normal(size=(m.inp, 8)))[0].T.astype(np.float32)
        for n, m in base.layout.modules.items()
    }
    plan = replace(plan, against=1, training=replace(plan.training, local_steps=25))

    def overlap(weight: float, subspace: Subspace | None) -> float:
        form: Overlap = "squared" if subspace else "normalised"
        one = replace(plan, overlap=weight, overlap_form=form)
        ask = Ask(plan=one, blocks=(block,), subspace=subspace, arrays=arrays)
        answer = train_client(base, header(base), ask, rows, threads=1)
        total = 0.0
        for n in base.layers:
            a = answer.arrays[f"A:{n}"] @ arrays[f"N:{n}"] if subspace else answer.arrays[f"A:{n}"]
            total += float(by_formula("normalised", torch.from_numpy(a).double(), block.adapter[n].a))
        return total

    for subspace in (None, Subspace(dim=8)):
        assert overlap(10.0, subspace) < 0.3 * overlap(0.0, subspace)


def test_the_normalised_form_is_refused_where_rows_of_the_basis_have_other_lengths(
    load: Load, rows: list[TokenRow], plan: TrainPlan, header: MakeHeader
) -> None:
    base = load("llama")
    g = np.random.default_rng(0)
    arrays = {f"N:{n}": g.normal(size=(8, m.inp)).astype(np.float32) for n, m in base.layout.modules.items()}
    one = replace(plan, against=1, overlap=1.0, overlap_form="normalised")
    ask = Ask(plan=one, blocks=(sealed_small(base),), subspace=Subspace(dim=8), arrays=arrays)
    with pytest.raises(TrainingError, match="needs a basis of orthonormal rows"):
        train_client(base, header(base), ask, rows, threads=1)
