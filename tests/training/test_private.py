"""Gradients of single rows against autograd and Opacus; the clipped sum, its denominator, its noise and its draws."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import fedlora.training.private as under_test
from fedlora.base import Base
from fedlora.data.batches import alike, pad
from fedlora.data.rows import TokenRow
from fedlora.errors import ConfigError, TrainingError
from fedlora.privacy.accounting import Privacy
from fedlora.state import Ask, Header, TrainPlan
from fedlora.training.local import train_client
from fedlora.training.lora import Pair
from fedlora.training.objective import loss_sum
from fedlora.training.private import PrivateGradient

LOOSE = Privacy(clip=1e6, noise_multiplier=1e-12, sampling=0.5, expected=1.0)  # neither clip nor noise to speak of


def attached(base: Base, train: str, rank: int = 3, seed: int = 0) -> dict[str, Tensor]:
    """Random pairs of scale 2 on every module, and the leaves among them; heads too where there is an `h`."""
    g = torch.Generator().manual_seed(seed)
    leaves: dict[str, Tensor] = {}
    for name, m in base.layout.modules.items():
        a = torch.randn((rank, m.inp), generator=g).div_(m.inp**0.5).requires_grad_("A" in train)
        b = torch.randn((rank, m.out), generator=g).div_(4.0).t().requires_grad_("B" in train)
        base.layers[name].set_pair(Pair(a, b, 2.0))
        leaves |= {key: x for key, x in ((f"A:{name}", a), (f"B:{name}", b)) if x.requires_grad}
    if "h" in train:
        leaves |= {f"head:{name}": p.requires_grad_() for name, p in base.head.items()}
    return leaves


def one_by_one(base: Base, leaves: Mapping[str, Tensor], rows: Sequence[TokenRow]) -> list[dict[str, Tensor]]:
    """Each row's gradient of its mean loss, by plain autograd on that row alone."""
    out = []
    for row in rows:
        count = 1 if base.task_type == "sequence-classification" else int(row.answer[1:].sum())
        grads = torch.autograd.grad(loss_sum(base, pad([row], base.pad_id)) / count, list(leaves.values()))
        out.append(dict(zip(leaves, grads, strict=True)))
    return out


def clipped_sum(grads: Sequence[Mapping[str, Tensor]], clip: float) -> tuple[dict[str, Tensor], list[float]]:
    norms = [float(torch.cat([x.flatten() for x in g.values()]).norm()) for g in grads]
    scaled = [{k: x.double() * min(1.0, clip / n) for k, x in g.items()} for g, n in zip(grads, norms, strict=True)]
    return {k: torch.stack([g[k] for g in scaled]).sum(0) for k in grads[0]}, norms


def batches(base: Base, rows: Sequence[TokenRow], size: int) -> list[under_test.Batch]:
    lengths = np.array([len(row.tokens) for row in rows])
    return [pad([rows[i] for i in c], base.pad_id) for c in alike(np.arange(len(rows)), lengths, size, 32)]


def gradient(leaves: Mapping[str, Tensor]) -> Tensor:
    return torch.cat([leaf.grad.flatten() for leaf in leaves.values() if leaf.grad is not None])


def close(got: Tensor | None, want: Tensor, rel: float = 1e-5) -> None:
    assert got is not None
    assert float((got.double() - want.double()).norm()) <= rel * float(want.double().norm())


@pytest.mark.parametrize(
    ("family", "train"),
    [
        ("llama", "AB"),
        ("llama", "B"),
        ("llama", "A"),
        ("gpt2", "AB"),
        ("gemma2", "AB"),
        ("bert", "ABh"),
        ("bert", "h"),
        ("means", "ABh"),
    ],
)
def test_rows_gradients_equal_autograd_one_by_one(
    load: Callable[..., Base],
    rows: list[TokenRow],
    labelled: list[TokenRow],
    family: str,
    train: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    base = load("bert", pooling="mean") if family == "means" else load(family)
    chosen = (labelled if family in ("bert", "means") else rows)[:6]
    leaves = attached(base, train)
    want = one_by_one(base, leaves, chosen)
    seen: list[dict[str, Tensor]] = []

    def spy(self: PrivateGradient, total: Mapping[str, Tensor], counted: Tensor) -> None:
        for i, count in enumerate(counted.tolist()):
            flipped = {k: x[i].t() if k.startswith("B:") else x[i] for k, x in self._grads.items()}
            seen.append({k: x / count for k, x in flipped.items()})

    monkeypatch.setattr(PrivateGradient, "_add_clipped", spy)
    with PrivateGradient(base, leaves, LOOSE, who="c") as private:
        private.backward([pad(chosen, base.pad_id)])
    assert len(seen) == len(chosen)
    for got, expected in zip(seen, want, strict=True):
        assert got.keys() == expected.keys() == leaves.keys()
        whole = torch.cat([x.flatten() for x in expected.values()]).norm()
        for key in leaves:
            assert (got[key] - expected[key]).norm() <= 1e-5 * whole


@pytest.mark.parametrize("size", [6, 2, 1])
def test_clipped_sums_over_the_expected_batch_whatever_the_micro_batches(
    load: Callable[..., Base], rows: list[TokenRow], size: int
) -> None:
    base = load("llama")
    leaves = attached(base, "AB")
    grads = one_by_one(base, leaves, rows[:6])
    clip = float(np.median(clipped_sum(grads, 1.0)[1]))
    want, norms = clipped_sum(grads, clip)
    assert min(norms) < clip < max(norms)
    privacy = replace(LOOSE, clip=clip, expected=17.0)
    with PrivateGradient(base, leaves, privacy, who="c") as private:
        private.backward(batches(base, rows[:6], size))
    for key, leaf in leaves.items():
        close(leaf.grad, want[key] / 17.0, 3e-5)  # the slack of the clip is 1e-5


def test_no_row_moves_the_sum_by_more_than_the_clip(load: Callable[..., Base], rows: list[TokenRow]) -> None:
    base = load("llama")
    leaves = attached(base, "AB")
    privacy = replace(LOOSE, clip=0.05)
    sums = []
    with PrivateGradient(base, leaves, privacy, who="c") as private:
        for chosen in (rows[:5], rows[:4]):
            private.backward(batches(base, chosen, 3))
            sums.append(gradient(leaves).double())
    assert 0.0499 < float((sums[0] - sums[1]).norm()) <= 0.05


def test_an_empty_draw_is_noise_of_the_right_size(load: Callable[..., Base], rows: list[TokenRow]) -> None:
    base = load("llama")
    leaves = attached(base, "AB")
    privacy = Privacy(clip=0.5, noise_multiplier=3.0, sampling=0.5, expected=10.0)
    with PrivateGradient(base, leaves, privacy, who="c") as private:
        private.backward(batches(base, rows[:4], 4))
        private.backward([])  # what the step before left in the leaves is gone
        first = gradient(leaves)
        private.backward([])
        second = gradient(leaves)
    n = len(first)
    assert n > 1000
    for noise in (first, second):
        assert abs(float(noise.std()) / (0.5 * 3.0 / 10.0) - 1.0) < 5.0 / (2 * n) ** 0.5
        assert abs(float(noise.mean())) < 5 * 0.15 / n**0.5
    assert abs(float(torch.corrcoef(torch.stack([first, second]))[0, 1])) < 5 / n**0.5


def test_noise_is_added_to_the_sum(load: Callable[..., Base], rows: list[TokenRow]) -> None:
    base = load("llama")
    leaves = attached(base, "B")
    want, _ = clipped_sum(one_by_one(base, leaves, rows[:4]), 0.1)
    privacy = Privacy(clip=0.1, noise_multiplier=2.0, sampling=0.5, expected=8.0)
    with PrivateGradient(base, leaves, privacy, who="c") as private:
        private.backward(batches(base, rows[:4], 4))
    left = gradient(leaves).double() * 8.0 - torch.cat([x.flatten() for x in want.values()])
    assert abs(float(left.std()) / 0.2 - 1.0) < 5.0 / (2 * len(left)) ** 0.5


def test_cores_and_subspaces(load: Callable[..., Base], rows: list[TokenRow]) -> None:
    base = load("llama")
    g = torch.Generator().manual_seed(1)
    names = list(base.layout.modules)
    leaves: dict[str, Tensor] = {}
    basis: dict[str, Tensor] = {}
    cores: dict[str, Tensor] = {}
    for i, name in enumerate(names):
        m = base.layout.modules[name]
        if i % 2:  # a core R, of which the leading 2 x 2 of 3 x 3 is trained
            r = torch.randn((3, 3), generator=g)
            leaves[f"R:{name}"] = r[:2, :2].clone().requires_grad_()
            cores[name] = torch.randn((3, m.out), generator=g)
            whole = r.clone()
            whole[:2, :2] = leaves[f"R:{name}"]
            a = torch.randn((3, m.inp), generator=g).div_(m.inp**0.5)
            base.layers[name].set_pair(Pair(a, cores[name].t() @ whole, 0.5))
        else:  # A = M N
            basis[name] = torch.linalg.qr(torch.randn((m.inp, 5), generator=g)).Q.t().contiguous()
            leaves[f"A:{name}"] = torch.randn((3, 5), generator=g).requires_grad_()
            leaves[f"B:{name}"] = torch.randn((m.out, 3), generator=g).requires_grad_()
            base.layers[name].set_pair(Pair(leaves[f"A:{name}"] @ basis[name], leaves[f"B:{name}"], 0.5))
    grads = []
    for row in rows[:4]:
        loss = loss_sum(base, pad([row], base.pad_id)) / int(row.answer[1:].sum())
        found = torch.autograd.grad(loss, list(leaves.values()), retain_graph=True)
        grads.append(dict(zip(leaves, found, strict=True)))
    want, _ = clipped_sum(grads, 0.3)
    for name in names:  # what training attaches: leaves of their own in place of products
        pair = base.layers[name].pair
        assert pair is not None
        base.layers[name].set_pair(Pair(pair.a.detach().requires_grad_(), pair.b.detach().requires_grad_(), pair.scale))
    with PrivateGradient(base, leaves, replace(LOOSE, clip=0.3), basis=basis, cores=cores, who="c") as private:
        private.backward(batches(base, rows[:4], 4))
    for key, leaf in leaves.items():
        close(leaf.grad, want[key], 3e-5)


def test_no_unclipped_gradient_is_formed_and_all_is_put_back(load: Callable[..., Base], rows: list[TokenRow]) -> None:
    base = load("llama")
    leaves = attached(base, "AB")
    batch = pad(rows[:3], base.pad_id)
    before = loss_sum(base, batch).item()
    with PrivateGradient(base, leaves, LOOSE, who="c") as private:
        assert not any(leaf.requires_grad for leaf in leaves.values())
        assert loss_sum(base, batch).item() == before
        private._run(batch, loss_sum)
        assert all(leaf.grad is None for leaf in leaves.values())
    assert all(leaf.requires_grad for leaf in leaves.values())
    assert not any(layer.module._forward_hooks for layer in base.layers.values())
    loss_sum(base, batch).backward()
    assert all(leaf.grad is not None for leaf in leaves.values())


def test_autocast_and_checkpointing(load: Callable[..., Base], rows: list[TokenRow]) -> None:
    from fedlora.training.local import _checkpointed

    base = load("llama")
    leaves = attached(base, "AB")
    want, _ = clipped_sum(one_by_one(base, leaves, rows[:4]), 0.2)
    for autocast, rel in ((False, 3e-5), (True, 0.1)):
        private = PrivateGradient(base, leaves, replace(LOOSE, clip=0.2), autocast=autocast, who="c")
        with _checkpointed(base, "c"), private:
            private.backward(batches(base, rows[:4], 4))
        for key, leaf in leaves.items():
            close(leaf.grad, want[key], rel)
            assert leaf.grad is not None
            assert leaf.grad.dtype == torch.float32


def test_a_row_that_overflows_counts_as_zero(load: Callable[..., Base], rows: list[TokenRow]) -> None:
    base = load("llama")
    leaves = attached(base, "AB")
    want, _ = clipped_sum(one_by_one(base, leaves, rows[1:4]), 0.2)
    with PrivateGradient(base, leaves, replace(LOOSE, clip=0.2), who="c") as private:
        spoil = private._keep
        private._keep = lambda key, grad: spoil(key, grad.index_fill(0, torch.tensor(0), float("nan")))  # type: ignore[method-assign]
        private.backward([pad(rows[:4], base.pad_id)])
    assert private.unusable == 1
    for key, leaf in leaves.items():
        close(leaf.grad, want[key], 3e-5)


def test_draws_are_poisson_and_batches_bounded(
    load: Callable[..., Base], rows: list[TokenRow], monkeypatch: pytest.MonkeyPatch
) -> None:
    base = load("llama")
    leaves = attached(base, "AB")
    private = PrivateGradient(base, leaves, replace(LOOSE, sampling=0.1), who="c")
    endless = private.steps(rows, batch_size=2, overhead=0, pad_id=base.pad_id)
    drawn = [next(endless) for _ in range(2000)]
    sizes = np.array([sum(len(b.tokens) for b in micro) for micro in drawn])
    assert max(len(b.tokens) for micro in drawn for b in micro) == 2
    # binomial(30, 0.1): mean 3, variance 2.7, none at all 0.9^30 = 0.0424
    assert abs(sizes.mean() - 3.0) < 5 * (2.7 / 2000) ** 0.5
    assert abs(sizes.var() - 2.7) < 5 * 2.7 * (2.1 / 2000) ** 0.5
    assert 40 < (sizes == 0).sum() < 135
    monkeypatch.setattr(under_test, "MEMORY", 4 * sum(leaf.numel() for leaf in leaves.values()))
    small = next(replace_sampling(private, 1.0).steps(rows, batch_size=8, overhead=0, pad_id=base.pad_id))
    assert [len(b.tokens) for b in small] == [1] * 30


def replace_sampling(private: PrivateGradient, sampling: float) -> PrivateGradient:
    private.privacy = replace(private.privacy, sampling=sampling)
    return private


def test_refusals(load: Callable[..., Base], labelled: list[TokenRow]) -> None:
    base = load("llama", target_modules="embed_tokens,q_proj")
    with pytest.raises(TrainingError, match=r"c: model\.embed_tokens is an embedding"):
        PrivateGradient(base, attached(base, "AB"), LOOSE, who="c").__enter__()
    base = load("llama", target_modules="lm_head")
    with pytest.raises(TrainingError, match=r"lm_head is the output head and sees answer tokens alone"):
        PrivateGradient(base, attached(base, "AB"), LOOSE, who="c").__enter__()
    base = load("bert")
    leaves = attached(base, "ABh")
    base.model.classifier = nn.Bilinear(2, 2, 3)
    with pytest.raises(TrainingError, match="classifier is a Bilinear; example-level privacy knows heads of Linear"):
        PrivateGradient(base, leaves, LOOSE, who="c").__enter__()
    assert all(leaf.requires_grad for leaf in leaves.values())  # a refusal leaves nothing behind
    with pytest.raises(ConfigError, match="clip must be finite and above 0"):
        replace(LOOSE, clip=0.0)


class Mixing(nn.Module):
    """Takes the mean over rows away, as normalising over a batch does."""

    def forward(self, x: Tensor) -> Tensor:
        return x - x.mean(0, keepdim=True)


def test_a_base_whose_rows_meet_is_refused(load: Callable[..., Base]) -> None:
    base = load("llama")
    base.model.model.norm = nn.Sequential(base.model.model.norm, Mixing())
    with pytest.raises(TrainingError, match="one row's loss reaches another row"):
        PrivateGradient(base, attached(base, "AB"), LOOSE, who="c").__enter__()


def test_a_module_that_hides_rows_is_refused(load: Callable[..., Base], rows: list[TokenRow]) -> None:
    base = load("llama")
    leaves = attached(base, "AB")
    with PrivateGradient(base, leaves, LOOSE, who="c") as private:
        private._shape = (4, 5)
        assert private._by_row("m", torch.zeros(20, 3)).shape == (4, 5, 3)
        assert private._by_row("m", torch.zeros(4, 3)).shape == (4, 1, 3)
        for shape in ((5, 4, 3), (19, 3), (20,)):
            with pytest.raises(TrainingError, match="rows cannot be told apart"):
                private._by_row("m", torch.zeros(shape))


class TwoLinears(nn.Module):
    """LoRA as two plain layers, for Opacus to hook: `layer(x) + 2 B(A(x))`."""

    def __init__(self, layer: nn.Linear, pair: Pair) -> None:
        super().__init__()
        self.layer = layer
        self.a = nn.Linear(pair.a.shape[1], len(pair.a), bias=False)
        self.b = nn.Linear(len(pair.a), len(pair.b), bias=False)
        self.a.weight = nn.Parameter(pair.a.detach().clone())
        self.b.weight = nn.Parameter(pair.b.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layer(x) + 2.0 * self.b(self.a(x))
        return out


@pytest.mark.slow  # Opacus loads for seconds
def test_clipped_sums_equal_those_of_opacus(load: Callable[..., Base], labelled: list[TokenRow]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from opacus import GradSampleModule
        from opacus.optimizers import DPOptimizer

    base = load("bert")
    leaves = attached(base, "ABh")
    chosen = [row for row in labelled if len(row.tokens) == len(labelled[0].tokens)] or labelled[:1]
    chosen = (chosen * 5)[:5]
    batch = pad([replace(row, label=i % 3) for i, row in enumerate(chosen)], base.pad_id)
    other = load("bert")
    for name, layer in base.layers.items():
        pair = layer.pair
        assert pair is not None
        module = other.model.get_submodule(name)
        del module.__dict__["forward"]
        owner, _, last = name.rpartition(".")
        setattr(other.model.get_submodule(owner), last, TwoLinears(module, pair))
    for parameter in other.head.values():
        parameter.requires_grad_()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for module in other.model.modules():  # Opacus looks at modules that train; those have no dropout
            module.training = isinstance(module, nn.Linear)
        wrapped = GradSampleModule(other.model, batch_first=True, loss_reduction="sum")
        trained = {n.removeprefix("_module."): p for n, p in wrapped.named_parameters() if p.requires_grad}
        for shuffled in (batch, replace(batch, tokens=batch.tokens[:, ::-1].copy())):
            sgd = DPOptimizer(
                torch.optim.SGD(list(trained.values()), lr=0.0),
                noise_multiplier=0.0,
                max_grad_norm=0.5,
                expected_batch_size=9,
                loss_reduction="mean",
            )
            sgd.zero_grad()
            logits = wrapped(input_ids=torch.from_numpy(shuffled.tokens)).logits
            nn.functional.cross_entropy(logits, torch.from_numpy(shuffled.labels), reduction="sum").backward()
            sgd.pre_step()
            with PrivateGradient(base, leaves, replace(LOOSE, clip=0.5, expected=9.0), who="c") as private:
                private.backward([shuffled])
            for key, leaf in leaves.items():
                of, name = key.split(":", 1)
                theirs = trained[name if of == "head" else f"{name}.{of.lower()}.weight"].grad
                assert theirs is not None
                close(leaf.grad, theirs, 1e-4)


def private_ask(plan: TrainPlan, **fields: Any) -> Ask:
    privacy = Privacy(clip=1.0, noise_multiplier=2.0, sampling=0.5, expected=20.0)
    return Ask(plan=replace(plan, privacy=privacy, **fields))


@pytest.mark.parametrize("broken", [0, 1, 30])
def test_rows_of_no_use_are_left_out_without_a_word(
    load: Callable[..., Base],
    rows: list[TokenRow],
    plan: TrainPlan,
    header: Callable[..., Header],
    broken: int,
) -> None:
    """Neither that there are some, nor that there are no others, shows in the answer: 40 is the plan's number."""
    base = load("llama")
    useless = [replace(row, answer=np.zeros_like(row.answer)) for row in rows[:broken]]
    answer = train_client(base, header(base), private_ask(plan), [*useless, *rows[broken:]], threads=1)
    assert answer.examples == 40
    assert answer.metrics.keys() == {"steps", "weight_change"}
    assert answer.metrics["steps"] == 5.0
    assert all(np.isfinite(x).all() for x in answer.arrays.values())


def test_no_rows_at_all_are_answered_with_noise(
    load: Callable[..., Base], plan: TrainPlan, header: Callable[..., Header]
) -> None:
    base = load("llama")
    one, other = (train_client(base, header(base), private_ask(plan), [], threads=1) for _ in range(2))
    assert one.examples == 40
    assert not np.array_equal(*(x.arrays[min(x.arrays)] for x in (one, other)))  # no seed gives it again
