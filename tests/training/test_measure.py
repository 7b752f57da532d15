"""What a client measures, against dense second moments, row by row, and autograd through dense weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as nnf
from torch import Tensor, nn
from torch.func import functional_call
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from fedlora.adapter import Adapter, Factors
from fedlora.base import Base
from fedlora.continual.router import omega
from fedlora.data.rows import TokenRow
from fedlora.errors import BaseMismatch, TrainingError
from fedlora.rng import public_normal
from fedlora.state import Answer, Ask, Block, Header, Measure, Subspace, expected_arrays
from fedlora.training.measure import features, measure

Load = Callable[..., Base]
MakeHeader = Callable[..., Header]
Arrays = dict[str, np.ndarray]


def asking(base: Base, make: MakeHeader) -> Header:
    return replace(make(base), kind="measure")


def random_adapter(base: Base, seed: int) -> Adapter:
    g = np.random.default_rng(seed)
    return Adapter(
        {
            n: Factors(
                g.normal(size=(2, m.inp)).astype(np.float32) / 4, g.normal(size=(m.out, 2)).astype(np.float32) / 4
            )
            for n, m in base.layout.modules.items()
        }
    )


def heads(base: Base) -> Arrays:
    g = np.random.default_rng(9)
    return {f"head:{n}": g.normal(size=s).astype(np.float32) for n, s in base.layout.head.items()}


def dense(folder: object, base: Base, adapters: Sequence[Adapter], head: Arrays) -> nn.Module:
    """The model with the products in its weights, loaded anew."""
    causal = base.task_type == "causal-lm"
    kind = AutoModelForCausalLM if causal else AutoModelForSequenceClassification
    extra = {} if causal else {"num_labels": 3}
    model: nn.Module = kind.from_pretrained(folder, **extra).eval()
    with torch.no_grad():
        for n, m in base.layout.modules.items():
            weight = model.get_parameter(f"{n}.weight")
            for adapter in adapters:
                product = torch.from_numpy(adapter[n].dense()).float()
                weight += product if m.kind == "linear" else product.T
        for key, x in head.items():
            model.get_parameter(key.removeprefix("head:")).copy_(torch.from_numpy(x))
    return model


def tokens_of(row: TokenRow) -> Tensor:
    return torch.from_numpy(row.tokens.astype(np.int64))[None]


def moments(model: nn.Module, names: Sequence[str], rows: Sequence[TokenRow]) -> dict[str, Tensor]:
    """The mean of x x^T `[in, in]` over the inputs of each module, one unpadded row after another."""
    out: dict[str, Tensor] = {}
    count: dict[str, int] = {}

    def take(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def see(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            x = inputs[0].detach().flatten(0, -2).double()
            out[name] = out.get(name, torch.zeros(())) + x.T @ x
            count[name] = count.get(name, 0) + len(x)

        return see

    hooks = [model.get_submodule(n).register_forward_pre_hook(take(n)) for n in names]
    with torch.no_grad():
        for row in rows:
            model(input_ids=tokens_of(row))
    for hook in hooks:
        hook.remove()
    return {name: x / count[name] for name, x in out.items()}


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
def test_sketches_are_those_of_the_second_moments_of_every_token(
    family: str, load: Load, folders: dict[str, str], rows: list[TokenRow], labelled: list[TokenRow], header: MakeHeader
) -> None:
    """Under blocks and frozen factors, in padded batches, with a pooler that reads one token of each row."""
    base = load(family)
    some = labelled[:11] if family == "bert" else rows[:11]
    block, frozen, head = random_adapter(base, 1), random_adapter(base, 2), heads(base)
    what = Measure(sketch=5, seed=77)
    ask = Ask(measure=what, blocks=(Block(adapter=block, born=1),), frozen=frozen, arrays=head)
    answer = measure(base, asking(base, header), ask, some, batch_size=4)
    assert {k: x.shape for k, x in answer.arrays.items()} == expected_arrays(ask, base.layout)
    assert {x.dtype.name for x in answer.arrays.values()} == {"float32"}
    inputs = base.layout.inputs()
    assert (len(inputs) < len(base.layout.modules)) == (family != "gpt2")
    want = moments(dense(folders[family], base, [block, frozen], head), list(base.layout.modules), some)
    for name, inp in inputs.items():
        omega = public_normal(77, "sketch", name, shape=(inp, 5))
        sketch = want[name].numpy() @ omega
        np.testing.assert_allclose(answer.arrays[f"sketch:{name}"], sketch, atol=1e-4 * np.abs(sketch).max())
        assert answer.arrays[f"energy:{name}"][0] == pytest.approx(float(want[name].trace()), rel=1e-4)
    for name, module in base.layout.modules.items():  # an input that is shared is one input
        if module.shares:
            torch.testing.assert_close(want[name], want[module.shares])
    assert answer.examples == 11
    assert answer.metrics.keys() == {"tokens", "seconds"}
    assert answer.metrics["tokens"] == sum(len(row.tokens) for row in some)


def test_features_are_the_bare_bases_mean_hidden_states(
    load: Load, folders: dict[str, str], rows: list[TokenRow], labelled: list[TokenRow], header: MakeHeader
) -> None:
    for family, some in (("llama", rows), ("bert", labelled)):
        base = load(family)
        arrays = heads(base)
        blocks = (Block(adapter=random_adapter(base, 1), born=1),)
        ask = Ask(measure=Measure(classes=4, columns=5), blocks=blocks, frozen=random_adapter(base, 2), arrays=arrays)
        answer = measure(base, asking(base, header), ask, some, batch_size=7)
        assert {k: x.shape for k, x in answer.arrays.items()} == expected_arrays(ask, base.layout)
        model = dense(folders[family], base, [], {})
        encoder = getattr(model, str(model.base_model_prefix))
        total, count = np.zeros((4, base.layout.features)), np.zeros(4)
        alone = []
        with torch.no_grad():
            for row in some:
                asked = ~row.answer if (~row.answer).any() else row.answer  # of an answer nobody knows when asking
                mean = encoder(input_ids=tokens_of(row)).last_hidden_state[0][torch.tensor(asked)].mean(0)
                alone.append((mean / mean.norm()).numpy())
                total[row.label or 0] += alone[-1]
                count[row.label or 0] += 1
        np.testing.assert_allclose(answer.arrays["feature:sum"], total, atol=1e-5)
        np.testing.assert_array_equal(answer.arrays["feature:count"], count)
        assert count[3] == 0
        f = np.stack(alone).astype(np.float64)
        sketch = f.T @ (f @ omega(0, base.layout.features, 5))
        np.testing.assert_allclose(answer.arrays["feature:sketch"], sketch, atol=1e-4)
        found = features(base, some, batch_size=8)
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, alone, atol=1e-5)
        np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1.0, rtol=1e-5)


def test_what_a_head_reads_is_the_mean_of_hidden_states_under_the_blocks(
    load: Load, folders: dict[str, str], labelled: list[TokenRow], header: MakeHeader
) -> None:
    base = load("bert", pooling="mean")
    arrays, adapter = heads(base), random_adapter(base, 1)
    ask = Ask(measure=Measure(seed=3, reads=4, columns=5), blocks=(Block(adapter=adapter, born=1),), arrays=arrays)
    answer = measure(base, asking(base, header), ask, labelled, batch_size=7)
    assert {k: x.shape for k, x in answer.arrays.items()} == expected_arrays(ask, base.layout)
    model = dense(folders["bert"], base, [adapter], {})
    with torch.no_grad():
        read = [model.bert(input_ids=tokens_of(row)).last_hidden_state[0].mean(0).numpy() for row in labelled]  # type: ignore[operator,union-attr]
    h = np.stack(read).astype(np.float64)
    labels = np.array([row.label for row in labelled])
    total, n = np.stack([h[labels == c].sum(0) for c in range(4)]), len(labelled)
    np.testing.assert_allclose(answer.arrays["read:sum"], total / n, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(answer.arrays["read:count"], np.bincount(labels, minlength=4) / n, rtol=1e-6)
    np.testing.assert_allclose(answer.arrays["read:energy"], [np.sum(h**2) / n], rtol=1e-5)
    sketch = h.T @ (h @ omega(3, base.layout.features, 5)) / n
    np.testing.assert_allclose(answer.arrays["read:sketch"], sketch, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("case", ["causal", "subspace", "classifier"])
def test_a_fisher_information_sums_squared_gradients_of_single_rows(
    case: str, load: Load, folders: dict[str, str], rows: list[TokenRow], labelled: list[TokenRow], header: MakeHeader
) -> None:
    """By autograd through dense weights W0 + blocks + B A (in a subspace B M N), for the first four rows."""
    family = "bert" if case == "classifier" else "llama"
    base = load(family)
    some = [replace(row, choices=(0, 1, 2)) for row in labelled[:6]] if case == "classifier" else rows[:6]
    block, head, g = random_adapter(base, 1), heads(base), np.random.default_rng(3)
    arrays = dict(head)
    basis: Arrays = {}
    for n, m in base.layout.modules.items():
        inner = 6 if case == "subspace" else m.inp
        basis[n] = np.eye(m.inp, dtype=np.float32)
        if case == "subspace":
            basis[n] = np.linalg.qr(g.normal(size=(m.inp, 6)))[0].T.astype(np.float32)
            arrays[f"N:{n}"] = basis[n]
        arrays[f"A:{n}"] = g.normal(size=(3, inner)).astype(np.float32) / 3
        arrays[f"B:{n}"] = g.normal(size=(m.out, 3)).astype(np.float32) / 8
    ask = Ask(
        measure=Measure(fisher=4),
        blocks=(Block(adapter=block, born=1),),
        subspace=Subspace(dim=6) if case == "subspace" else None,
        arrays=arrays,
    )
    answer = measure(base, asking(base, header), ask, some, batch_size=2)
    assert {k: x.shape for k, x in answer.arrays.items()} == expected_arrays(ask, base.layout)
    model = dense(folders[family], base, [block], head)
    leaves = {k: torch.from_numpy(x).requires_grad_() for k, x in arrays.items() if k[0] in "AB" and k[1] == ":"}
    want = {k: torch.zeros_like(x) for k, x in leaves.items()}
    for row in some[:4]:
        weights = {
            f"{n}.weight": model.get_parameter(f"{n}.weight")
            + leaves[f"B:{n}"] @ leaves[f"A:{n}"] @ torch.from_numpy(basis[n])
            for n in base.layout.modules
        }
        logits = functional_call(model, weights, (tokens_of(row),)).logits
        if case == "classifier":
            loss = nnf.cross_entropy(logits, torch.tensor([row.label]))
        else:
            at = torch.from_numpy(row.answer[1:])
            loss = nnf.cross_entropy(logits[0, :-1][at], tokens_of(row)[0, 1:][at], reduction="sum")
        for key, grad in zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True):
            want[key] += grad.square()
    for key, x in want.items():
        size = float(x.max())
        assert size > 0
        np.testing.assert_allclose(answer.arrays[f"fisher-{key}"], x, atol=1e-4 * size, err_msg=key)


def test_parts_add_up_to_the_whole_and_nothing_stays_behind(
    load: Load, labelled: list[TokenRow], header: MakeHeader
) -> None:
    base = load("bert")
    g = np.random.default_rng(0)
    arrays = heads(base)
    for n, m in base.layout.modules.items():
        arrays[f"A:{n}"], arrays[f"B:{n}"] = g.normal(size=(2, m.inp)), g.normal(size=(m.out, 2)) / 9
    blocks = (Block(adapter=random_adapter(base, 1), born=1),)
    frozen = random_adapter(base, 2)
    ask = Ask(measure=Measure(sketch=3, seed=1, classes=3, fisher=99), blocks=blocks, frozen=frozen, arrays=arrays)

    def run(some: Sequence[TokenRow]) -> Answer:
        return measure(base, asking(base, header), ask, some, batch_size=4)

    whole, left, right = run(labelled), run(labelled[:13]), run(labelled[13:])
    again = run(labelled)
    for key, x in whole.arrays.items():
        parts = [left.arrays[key], right.arrays[key]]
        if key.startswith(("sketch", "energy")):  # means over tokens, or over rows
            pooled = key.endswith("pooler.dense")
            weights = [a.examples if pooled else a.metrics["tokens"] for a in (left, right)]
            parts = [w / sum(weights) * y for w, y in zip(weights, parts, strict=True)]
        np.testing.assert_allclose(sum(parts), x, atol=1e-4 * np.abs(x).max(), err_msg=key)
        np.testing.assert_array_equal(again.arrays[key], x)
    assert all(layer.pair is None for layer in base.layers.values())
    assert not any(p.requires_grad for p in base.model.parameters())
    assert not any(m._forward_pre_hooks for m in (layer.module for layer in base.layers.values()))
    with torch.no_grad():
        base.set_blocks((), "none")
        base.set_head(base.initial_head)
        fresh = load("bert")
        assert torch.equal(*(b.model(input_ids=torch.arange(1, 9)[None]).logits for b in (base, fresh)))


def test_what_cannot_be_measured_is_refused_by_name(
    load: Load, rows: list[TokenRow], labelled: list[TokenRow], header: MakeHeader
) -> None:
    base = load("llama")
    ok = asking(base, header)

    def refuse(
        match: str,
        ask: Ask,
        some: Sequence[TokenRow] = rows,
        where: Base = base,
        who: Header = ok,
        error: type[Exception] = TrainingError,
    ) -> None:
        with pytest.raises(error, match=match):
            measure(where, replace(who, base=who.base or where.fingerprint), ask, some, batch_size=8)
        assert all(layer.pair is None for layer in where.layers.values())

    sketch = Ask(measure=Measure(sketch=2))
    refuse("client c0, round 1: the ask measures nothing; kind 'measure'", Ask())
    refuse("opened with base feed, here is", sketch, who=replace(ok, base="feed"), error=BaseMismatch)
    refuse("there are no rows to measure", sketch, [])
    named = replace(ok, base="")
    tables = load("llama", target_modules=("embed_tokens", "q_proj"))
    refuse(r"model\.embed_tokens is an embedding", sketch, where=tables, who=named)
    refuse("labels go from 0 to 2, 2 classes are asked for", Ask(measure=Measure(classes=2)), labelled)
    bert = load("bert")
    means = Ask(measure=Measure(reads=3, columns=2))
    refuse("what a head reads needs model.pooling=mean", means, labelled, where=bert, who=named)
    pooled = load("bert", pooling="mean")
    refuse("and labelled rows", means, where=pooled, who=named)
    refuse(
        "labels go from 0 to 2, 2 classes are",
        Ask(measure=Measure(reads=2, columns=2)),
        labelled,
        where=pooled,
        who=named,
    )
    refuse("needs its head: arrays in the ask", Ask(measure=Measure(fisher=2)), labelled, where=bert, who=named)
    refuse(r"needs A:.* \[rank, \d+\] and B:.*, got \[None, None\]", Ask(measure=Measure(fisher=2)))
    silent = [replace(row, answer=np.zeros_like(row.answer)) for row in rows]
    refuse("3 of 3 rows have no answer token", Ask(measure=Measure(fisher=3)), silent)


def test_an_output_head_is_sketched_at_every_token_and_an_idle_module_is_refused(
    load: Load, folders: dict[str, str], rows: list[TokenRow], header: MakeHeader, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = load("llama", target_modules=("lm_head", "q_proj"))
    ask = Ask(measure=Measure(sketch=2, seed=1))
    answer = measure(base, asking(base, header), ask, rows[:5], batch_size=3)
    want = moments(dense(folders["llama"], base, [], {}), ["lm_head"], rows[:5])["lm_head"]
    assert answer.arrays["energy:lm_head"][0] == pytest.approx(float(want.trace()), rel=1e-4)
    monkeypatch.setattr(base.model, "get_output_embeddings", lambda: None)
    with pytest.raises(TrainingError, match="no token of these rows passed lm_head"):
        measure(base, asking(base, header), ask, rows[:5], batch_size=3)


def test_inputs_whose_padding_cannot_be_told_are_refused(load: Load, rows: list[TokenRow], header: MakeHeader) -> None:
    """A module that is given tokens in another order; without padding there is nothing to tell."""
    base = load("llama", target_modules=("q_proj",))
    module = base.model.model.layers[0].self_attn.q_proj
    inner = module.forward
    module.register_forward_pre_hook(lambda _, x: (x[0].transpose(0, 1),))
    module.__dict__["forward"] = lambda x: inner(x.transpose(0, 1))
    ask = Ask(measure=Measure(sketch=2))
    with pytest.raises(TrainingError, match="so padding cannot be told from tokens"):
        measure(base, asking(base, header), ask, rows[:3], batch_size=3)
    measure(base, asking(base, header), ask, rows[:3], batch_size=1)
