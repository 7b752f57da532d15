"""Training inside a subspace, A = M N: against autograd through M N, and against the same A given in full."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import islice
from typing import Literal

import numpy as np
import pytest
import torch
import torch.nn.functional as nnf
from torch import Tensor
from torch.func import functional_call
from transformers import AutoModelForCausalLM

from fedlora.base import Base
from fedlora.data.batches import steps
from fedlora.data.rows import TokenRow
from fedlora.errors import AdapterError, BaseMismatch, TrainingError
from fedlora.rng import public_orthonormal, stream
from fedlora.state import (
    Ask,
    Header,
    Layout,
    Module,
    PersonalPair,
    PublicPair,
    Subspace,
    TrainPlan,
    expected_arrays,
    times,
)
from fedlora.subspace import public_rows, rows_checksum
from fedlora.training.local import train_client
from fedlora.training.lora import Pair
from fedlora.training.objective import counted, loss_sum
from fedlora.training.start import bases, personal_pair, public_pair, start

Load = Callable[..., Base]
MakeHeader = Callable[..., Header]
Arrays = dict[str, np.ndarray]
DIM = 6
DESIGNED = Subspace(dim=DIM)


def designed(base: Base, dim: int = DIM, seed: int = 0) -> Arrays:
    g = np.random.default_rng(seed)
    return {
        f"N:{n}": np.linalg.qr(g.normal(size=(m.inp, dim)))[0].T.astype(np.float32)
        for n, m in base.layout.modules.items()
    }


def coordinates(base: Base, rows: int, dim: int = DIM, seed: int = 1) -> Arrays:
    g = np.random.default_rng(seed)
    out: Arrays = {}
    for n, m in base.layout.modules.items():
        out[f"A:{n}"] = (g.normal(size=(rows, dim)) / np.sqrt(dim)).astype(np.float32)
        out[f"B:{n}"] = (g.normal(size=(m.out, rows)) / 20).astype(np.float32)
        out[f"R:{n}"] = (g.normal(size=(rows, rows)) / 4).astype(np.float32)
    return out


def given_plan(plan: TrainPlan, **changes: object) -> TrainPlan:
    return replace(plan, **{"a_from": "given", "b_from": "given", **changes})  # type: ignore[arg-type]


def autograd_twin(
    base: Base, header: Header, ask: Ask, rows: Sequence[TokenRow], mode: Literal["coordinates", "projected"]
) -> dict[str, Tensor]:
    """The same round by torch's AdamW. `coordinates`: leaves M and B, A = M N by autograd. `projected`: leaves A and B,
    and only the gradient of A is projected onto the rows of N. Returns A in full, and B, by key."""
    plan = ask.plan
    assert plan is not None
    t = plan.training
    n = {k[2:]: torch.from_numpy(x) for k, x in ask.arrays.items() if k[0] == "N"}
    a = {k: torch.from_numpy(ask.arrays[f"A:{k}"]) for k in n}
    a = {k: x.clone() if mode == "coordinates" else x @ n[k] for k, x in a.items()}
    b = {k: torch.from_numpy(ask.arrays[f"B:{k}"]).clone() for k in n}
    leaves = [x.requires_grad_() for x in (*a.values(), *b.values())]
    adam = torch.optim.AdamW(leaves, lr=t.learning_rate, betas=(t.beta1, t.beta2), eps=t.epsilon, weight_decay=0.0)
    order = steps(
        rows,
        step_rows=t.batch_size,
        batch_size=t.batch_size,
        overhead=10**9,
        rng=stream(plan.seed, "batches", header.client, header.round),
        pad_id=base.pad_id,
    )

    def full(name: str) -> Tensor:
        return a[name] @ n[name] if mode == "coordinates" else a[name]

    for (batch,) in islice(order, t.local_steps):
        for name, layer in base.layers.items():
            layer.set_pair(Pair(full(name), b[name], plan.scale))
        adam.zero_grad()
        (loss_sum(base, batch) / counted(base, batch)).backward()  # type: ignore[no-untyped-call]
        if mode == "projected":
            for name, x in a.items():
                assert x.grad is not None
                x.grad = x.grad @ n[name].T @ n[name]
        adam.step()
    for layer in base.layers.values():
        layer.set_pair(None)
    return {f"A:{k}": full(k).detach() for k in n} | {f"B:{k}": x.detach() for k, x in b.items()}


def outside(a: Tensor, n: Tensor) -> float:
    """||A (I - N^T N)|| / ||A||."""
    a, n = a.double(), n.double()
    return float(torch.linalg.norm(a - a @ n.T @ n) / torch.linalg.norm(a))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_never_leaves_its_subspace_and_is_that_of_autograd(
    family: str, load: Load, rows: list[TokenRow], plan: TrainPlan, header: MakeHeader
) -> None:
    """A twin that only projects gradients leaves it under Adam, so the test can tell."""
    base = load(family)
    plan = given_plan(plan, training=replace(plan.training, local_steps=12))
    ask = Ask(plan=plan, subspace=DESIGNED, arrays={**coordinates(base, 4), **designed(base)})
    seen: list[dict[str, Tensor]] = []

    def look(*_: object) -> None:
        pairs = {name: layer.pair for name, layer in base.layers.items()}
        seen.append({name: pair.a.detach().clone() for name, pair in pairs.items() if pair is not None})

    hook = getattr(base.model, base.model.base_model_prefix).register_forward_pre_hook(look)
    answer = train_client(base, header(base), ask, rows, threads=1)
    hook.remove()
    assert {k: x.shape for k, x in answer.arrays.items()} == expected_arrays(ask, base.layout)
    assert len(seen) >= 12
    moved = 0.0
    for name in base.layers:
        n = torch.from_numpy(ask.arrays[f"N:{name}"])
        assert all(outside(step[name], n) <= 1e-6 for step in seen)
        assert answer.arrays[f"A:{name}"].shape == (4, DIM)
        moved = max(moved, float(torch.linalg.norm(seen[-1][name] - seen[0][name])))
    assert moved > 0.05
    want = autograd_twin(base, header(base), ask, rows, "coordinates")
    for key, x in answer.arrays.items():
        full = times(x, ask.arrays[f"N:{key[2:]}"]) if key[0] == "A" else x
        np.testing.assert_allclose(full, want[key], atol=2e-5, err_msg=key)
    lost = autograd_twin(base, header(base), ask, rows, "projected")
    assert max(outside(lost[f"A:{name}"], torch.from_numpy(ask.arrays[f"N:{name}"])) for name in base.layers) > 1e-2


def test_the_whole_space_changes_nothing(load: Load, rows: list[TokenRow], plan: TrainPlan, header: MakeHeader) -> None:
    """With N = I the same bytes as without a subspace, clipping and weight decay included."""
    base = load("llama", target_modules=("q_proj", "v_proj"))
    plan = replace(plan, training=replace(plan.training, clip_norm=0.5, weight_decay=0.1))
    identity = {f"N:{n}": np.eye(16, dtype=np.float32) for n in base.layers}
    free = train_client(base, header(base), Ask(plan=plan), rows, threads=1)
    held = train_client(base, header(base), Ask(plan=plan, subspace=Subspace(dim=16), arrays=identity), rows, threads=1)
    assert free.metrics["grad_norm"] > 0.5
    assert all(np.array_equal(x, held.arrays[k]) for k, x in free.arrays.items())
    timed = {"seconds", "step_seconds"}
    assert all(x == pytest.approx(held.metrics[k]) for k, x in free.metrics.items() if k not in timed)


@pytest.mark.parametrize("what", ["frozen-a", "core", "frozen-rest"])
def test_a_fixed_a_acts_as_m_n(
    what: str, load: Load, rows: list[TokenRow], plan: TrainPlan, header: MakeHeader
) -> None:
    """Where A, or some of its rows, stands still, the same round as with M N given in full."""
    base = load("gpt2")
    settings = {
        "frozen-a": {"train": ("B",), "send": ("B",), "rows": 5, "rank": 3},
        "core": {"train": ("R",), "send": ("R",), "rows": 5, "rank": 3, "core": True},
        "frozen-rest": {"train": ("B",), "send": ("A", "B"), "rows": 6, "rank": 2},
    }[what]
    plan = given_plan(plan, **settings)
    arrays = {**coordinates(base, plan.rows), **designed(base)}
    full = {k: times(x, arrays[f"N:{k[2:]}"]) if k[0] == "A" else x for k, x in arrays.items()}
    held = train_client(base, header(base), Ask(plan=plan, subspace=DESIGNED, arrays=arrays), rows, threads=1)
    free = train_client(base, header(base), Ask(plan=plan, arrays=full), rows, threads=1)
    for key, x in held.arrays.items():
        if key[0] == "A":
            np.testing.assert_array_equal(x, arrays[key][: plan.rank])
        else:
            np.testing.assert_allclose(x, free.arrays[key], atol=1e-5, err_msg=key)
    for metric in ("loss_before", "loss_after", "weight_change", "grad_norm"):
        assert held.metrics[metric] == pytest.approx(free.metrics[metric], rel=1e-4)
    assert held.metrics["weight_change"] > 1e-3


def test_rows_that_are_not_trained_are_kept_in_coordinates(
    load: Load, rows: list[TokenRow], plan: TrainPlan, header: MakeHeader
) -> None:
    base = load("llama")
    plan = given_plan(plan, rows=5, rank=2, send=("A",), changes=("A",), keep=("B",))
    arrays = {**coordinates(base, 5), **designed(base)}
    ask, kept = Ask(plan=plan, subspace=DESIGNED, arrays=arrays), dict[str, np.ndarray]()
    answer = train_client(base, header(base), ask, rows, threads=1, kept=kept)
    own: Arrays = {}
    alone = replace(ask, plan=replace(plan, send=(), changes=(), keep=("A", "B")))
    train_client(base, header(base), alone, rows, threads=1, kept=own)
    for n, m in base.layout.modules.items():
        assert kept[f"B:{n}"].shape == (m.out, 5)
        assert own[f"A:{n}"].shape == (5, DIM)
        np.testing.assert_array_equal(own[f"A:{n}"][2:], arrays[f"A:{n}"][2:])
        np.testing.assert_array_equal(answer.arrays[f"A:{n}"], own[f"A:{n}"][:2] - arrays[f"A:{n}"][:2])
        assert np.abs(answer.arrays[f"A:{n}"]).max() > 0


def test_the_weight_change_is_that_of_the_full_product(
    load: Load, rows: list[TokenRow], plan: TrainPlan, header: MakeHeader
) -> None:
    base = load("llama")
    arrays = {**coordinates(base, 4), **designed(base)}
    stretched = {k: x * np.float32(1.0004) if k[0] == "N" else x for k, x in arrays.items()}
    for some in (arrays, stretched):
        ask = Ask(plan=given_plan(plan, scale=-0.7), subspace=DESIGNED, arrays=some)
        answer = train_client(base, header(base), ask, rows, threads=1)
        change = size = 0.0
        for n in base.layers:
            now, begun = (
                x[f"B:{n}"].astype(float) @ x[f"A:{n}"].astype(float) @ some[f"N:{n}"].astype(float)
                for x in (answer.arrays, some)
            )
            change += float(np.sum((0.7 * (now - begun)) ** 2))
            size += float(np.sum(base.model.get_submodule(n).weight.double().numpy() ** 2))
        assert answer.metrics["weight_change"] == pytest.approx(math.sqrt(change / size), rel=1e-5)


PUBLIC = Subspace(dim=DIM, start=3, seed=5)


def probes(base: Base, subspace: Subspace, seed: int, rows: int) -> Arrays:
    """The checksums of a public N, and of a public M `[rows, dim]` in its coordinates."""
    out: Arrays = {}
    for n, m in base.layout.modules.items():
        out[f"probe:N/{n}"] = rows_checksum(subspace, n, public_rows(subspace, n, m.inp))
        inner = public_orthonormal(seed, "basis", n, rows=rows, cols=subspace.dim).astype(np.float32)
        out[f"probe:{n}"] = rows_checksum(Subspace(dim=rows, seed=seed), n, inner)
    return out


def test_a_frozen_public_a_in_a_public_subspace_is_the_dense_forward_pass(
    load: Load, folders: dict[str, str], rows: list[TokenRow], plan: TrainPlan, header: MakeHeader
) -> None:
    base = load("llama")
    plan = given_plan(plan, train=("B",), send=("B",), a_from="public", a_seed=11)
    arrays = {**probes(base, PUBLIC, 11, 4), **{k: x for k, x in coordinates(base, 4).items() if k[0] == "B"}}
    ask = Ask(plan=plan, subspace=PUBLIC, arrays=arrays)
    answer = train_client(base, header(base), ask, rows, threads=1)
    model = AutoModelForCausalLM.from_pretrained(folders["llama"]).eval()
    weights, dense = {}, {}
    for n, m in base.layout.modules.items():
        basis = public_orthonormal(5, "capacity", n, rows=9, cols=m.inp)[3:]
        dense[n] = 2.0 * arrays[f"B:{n}"] @ public_orthonormal(11, "basis", n, rows=4, cols=DIM) @ basis
        weights[f"{n}.weight"] = model.get_parameter(f"{n}.weight") + torch.from_numpy(dense[n]).float()
    order = steps(
        rows, step_rows=6, batch_size=6, overhead=10**9, rng=stream(3, "batches", "c0", 1), pad_id=base.pad_id
    )
    (batch,) = next(order)
    tokens = torch.from_numpy(batch.tokens)
    logits = functional_call(model, weights, (tokens,), {"attention_mask": torch.from_numpy(batch.attention)}).logits
    labels = torch.where(torch.from_numpy(batch.answer), tokens, -100)
    want = nnf.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
    assert answer.metrics["loss_before"] == pytest.approx(want.item(), rel=1e-5)
    asked = Ask(public=PublicPair(seed=11, rows=4, scale=2.0), subspace=PUBLIC, arrays=arrays)
    for n, f in public_pair(asked, header(base), base.layout).items():
        np.testing.assert_allclose(f.dense(), dense[n], atol=1e-5)


def test_a_personal_pair_acts_as_m_n(load: Load, header: MakeHeader) -> None:
    base = load("llama")
    arrays = {**coordinates(base, 4), **designed(base)}
    kept = {k: x for k, x in arrays.items() if k[0] == "B"}
    ask = Ask(
        personal=PersonalPair(rank=4, scale=0.5),
        subspace=DESIGNED,
        arrays={k: x for k, x in arrays.items() if k[0] in "AN"},
    )
    pair, _ = personal_pair(ask, header(base), base.layout, kept)
    for n, f in pair.items():
        want = 0.5 * kept[f"B:{n}"] @ arrays[f"A:{n}"] @ arrays[f"N:{n}"]
        np.testing.assert_allclose(f.dense(), want, atol=1e-5)


HEADER = Header(run="r", round=1, client="c0", kind="train")
LAYOUT = Layout(modules={"q": Module(out=7, inp=9), "v": Module(out=4, inp=12)})


def test_a_designed_basis_may_have_rows_of_any_length() -> None:
    rows = {f"N:{n}": public_rows(PUBLIC, n, m.inp) * np.float32(7.5) for n, m in LAYOUT.modules.items()}
    for n, x in bases(Ask(subspace=DESIGNED, arrays=rows), HEADER, LAYOUT).items():
        np.testing.assert_array_equal(x, rows[f"N:{n}"])


def test_bases_are_those_of_the_ask_or_of_the_seed() -> None:
    assert bases(Ask(), HEADER, LAYOUT) == {}
    checks = {
        f"probe:N/{n}": rows_checksum(PUBLIC, n, public_rows(PUBLIC, n, m.inp)) for n, m in LAYOUT.modules.items()
    }
    public = bases(Ask(subspace=PUBLIC, arrays=checks), HEADER, LAYOUT)
    sent = bases(Ask(subspace=DESIGNED, arrays={f"N:{n}": x for n, x in public.items()}), HEADER, LAYOUT)
    for n, m in LAYOUT.modules.items():
        whole = public_orthonormal(5, "capacity", n, rows=m.inp, cols=m.inp)
        np.testing.assert_allclose(public[n], whole[3:9], atol=1e-6)
        np.testing.assert_array_equal(sent[n], public[n])


def test_bases_that_are_not_the_servers_are_refused_by_name() -> None:
    checks = {
        f"probe:N/{n}": rows_checksum(PUBLIC, n, public_rows(PUBLIC, n, m.inp)) for n, m in LAYOUT.modules.items()
    }
    rows = {f"N:{n}": public_rows(PUBLIC, n, m.inp) for n, m in LAYOUT.modules.items()}

    def refuse(error: type[Exception], match: str, subspace: Subspace, arrays: Arrays, layout: Layout = LAYOUT) -> None:
        with pytest.raises(error, match=match):
            bases(Ask(subspace=subspace, arrays=arrays), HEADER, layout)

    who = "client c0, round 1: "
    refuse(TrainingError, f"{who}a public basis N of q needs its checksum probe:N/q of shape \\(6,\\)", PUBLIC, {})
    off = {**checks, "probe:N/v": checks["probe:N/v"] * np.float32(1 + 1e-4)}
    refuse(BaseMismatch, f"{who}the public basis N of v made here from seed 5 is not the server's", PUBLIC, off)
    refuse(AdapterError, "no 10 orthonormal rows fit into 9", replace(PUBLIC, start=4), checks)
    refuse(TrainingError, f"{who}the plan starts from N:q, which the ask does not carry", DESIGNED, {})
    refuse(TrainingError, r"N:q has shape \(6, 9\), .* need \(5, 9\)", Subspace(dim=5), rows)
    empty = rows["N:v"].copy()
    empty[2] = 0.0
    refuse(TrainingError, "N:v has rows that are zero or not finite", DESIGNED, {**rows, "N:v": empty})
    nan = {**rows, "N:v": rows["N:v"] * np.float32(np.nan)}
    refuse(TrainingError, "N:v has rows that are zero or not finite", DESIGNED, nan)
    table = Layout(modules={"tok": Module(out=7, inp=9, kind="embedding")})
    refuse(TrainingError, "tok is an embedding, and a subspace is one of inputs", DESIGNED, rows, table)


def test_a_fresh_m_is_as_large_as_a_fresh_a(load: Load, plan: TrainPlan, header: MakeHeader) -> None:
    base = load("llama")
    begun = start(Ask(plan=plan, subspace=DESIGNED), plan, header(base), base.layout)
    for a in begun.a.values():
        assert a.shape == (4, DIM)
        assert 0.7 / math.sqrt(DIM) < np.abs(a).max() <= 1 / math.sqrt(DIM)


def test_a_rank_above_the_subspace_is_refused(
    load: Load, rows: list[TokenRow], plan: TrainPlan, header: MakeHeader
) -> None:
    base = load("llama")
    ask = Ask(plan=plan, subspace=Subspace(dim=3), arrays=designed(base, 3))
    with pytest.raises(TrainingError, match=r"rank 4 is above what .*, 3\] can hold"):
        train_client(base, header(base), ask, rows, threads=1)
