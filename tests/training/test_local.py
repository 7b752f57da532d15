"""One client's round against PEFT, torch's AdamW and full logits; and what it refuses."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import islice

import numpy as np
import pytest
import torch
import torch.nn.functional as nnf
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from fedlora.adapter import Adapter, Factors
from fedlora.base import Base
from fedlora.data.batches import steps
from fedlora.data.rows import TokenRow
from fedlora.errors import BaseMismatch, TrainingError
from fedlora.rng import public_normal, public_orthonormal, stream
from fedlora.state import Answer, Ask, Block, Header, TrainPlan, expected_shapes
from fedlora.training.local import train_client

Load = Callable[..., Base]
MakeHeader = Callable[..., Header]
MakeAsk = Callable[..., Ask]


def with_training(plan: TrainPlan, **changes: object) -> TrainPlan:
    return replace(plan, training=replace(plan.training, **changes))  # type: ignore[arg-type]


def peft_twin(
    folder: str, base: Base, header: Header, ask: Ask, rows: Sequence[TokenRow]
) -> tuple[dict[str, np.ndarray], list[float]]:
    """The same round in PEFT: all logits, torch's own AdamW over separate factors. Returns arrays and losses."""
    plan = ask.plan
    assert plan is not None
    t = plan.training
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    conv = base.layout.modules and next(iter(base.layout.modules.values())).kind == "conv1d"
    names = "|".join(re.escape(n) for n in base.layout.modules)
    peft = get_peft_model(
        model,
        LoraConfig(
            r=plan.rows, lora_alpha=plan.scale * plan.rows, target_modules=f"({names})", fan_in_fan_out=bool(conv)
        ),
    ).eval()
    a = {n: peft.base_model.model.get_submodule(n).lora_A["default"].weight for n in base.layout.modules}
    b = {n: peft.base_model.model.get_submodule(n).lora_B["default"].weight for n in base.layout.modules}
    for name in a:
        a[name].data.copy_(torch.from_numpy(ask.arrays[f"A:{name}"]))
        b[name].data.copy_(torch.from_numpy(ask.arrays[f"B:{name}"]))
        a[name].requires_grad_("A" in plan.train)
        b[name].requires_grad_("B" in plan.train)
    trained = [p for x in (a, b) for p in x.values() if p.requires_grad]
    adam = torch.optim.AdamW(
        trained, lr=t.learning_rate, betas=(t.beta1, t.beta2), eps=t.epsilon, weight_decay=t.weight_decay
    )
    order = steps(
        rows,
        step_rows=t.batch_size * t.accumulation,
        batch_size=t.batch_size * t.accumulation,
        overhead=10**9,  # one batch a step: ours is cut by length
        rng=stream(plan.seed, "batches", header.client, header.round),
        pad_id=base.pad_id,
    )
    losses = []
    for (batch,) in islice(order, t.local_steps):
        tokens = torch.from_numpy(batch.tokens)
        labels = torch.where(torch.from_numpy(batch.answer), tokens, -100)
        logits = peft(input_ids=tokens, attention_mask=torch.from_numpy(batch.attention)).logits
        loss = nnf.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
        adam.zero_grad()
        loss.backward()
        for name in a:  # a client of lower rank trains the first rows and columns only
            if a[name].grad is not None:
                a[name].grad[plan.rank :] = 0
            if b[name].grad is not None:
                b[name].grad[:, plan.rank :] = 0
        if t.clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(trained, t.clip_norm)
        adam.step()
        losses.append(loss.item())
    arrays = {f"A:{n}": x.detach().numpy()[: plan.rank] for n, x in a.items()}
    return arrays | {f"B:{n}": x.detach().numpy()[:, : plan.rank] for n, x in b.items()}, losses


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # PEFT asks for it
@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize(
    ("train", "rank", "clip"),
    [(("A", "B"), 4, None), (("B",), 4, None), (("A", "B"), 2, 0.5), (("A",), 3, None)],
    ids=["both", "frozen-a", "partial-rank-clipped", "frozen-b"],
)
def test_five_steps_equal_peft(
    family: str,
    train: tuple[str, ...],
    rank: int,
    clip: float | None,
    load: Load,
    folders: dict[str, str],
    rows: list[TokenRow],
    plan: TrainPlan,
    header: MakeHeader,
    given: MakeAsk,
) -> None:
    base = load(family)
    plan = with_training(replace(plan, train=train, rank=rank), clip_norm=clip, weight_decay=0.0)  # type: ignore[arg-type]
    ask = given(base, plan)
    answer = train_client(base, header(base), ask, rows, threads=1)
    want, losses = peft_twin(str(folders[family]), base, header(base), ask, rows)
    assert answer.arrays.keys() == want.keys()
    for key, x in answer.arrays.items():
        np.testing.assert_allclose(x, want[key], atol=1e-5, err_msg=key)
    assert answer.metrics["loss_before"] == pytest.approx(losses[0], rel=1e-5)
    assert answer.metrics["loss_after"] == pytest.approx(losses[-1], rel=1e-4)


def test_answers_have_the_planned_shapes_and_changes_are_differences(
    load: Load, rows: list[TokenRow], plan: TrainPlan, header: MakeHeader, given: MakeAsk
) -> None:
    base = load("llama")
    ask = given(base, replace(plan, rows=6, rank=3, train=("B",), send=("B",)))
    assert ask.plan is not None
    whole = train_client(base, header(base), ask, rows, threads=1)
    change = train_client(base, header(base), replace(ask, plan=replace(ask.plan, changes=("B",))), rows, threads=1)
    assert {k: x.shape for k, x in whole.arrays.items()} == expected_shapes(ask.plan, base.layout)
    for key, x in whole.arrays.items():
        assert x.dtype == np.float32
        np.testing.assert_array_equal(change.arrays[key], x - ask.arrays[key][:, :3])
        assert np.abs(change.arrays[key]).max() > 0


def same(left: Answer, right: Answer) -> bool:
    return left.arrays.keys() == right.arrays.keys() and all(
        np.array_equal(x, right.arrays[k]) for k, x in left.arrays.items()
    )


def test_same_bytes_whoever_was_trained_before(
    load: Load, rows: list[TokenRow], plan: TrainPlan, header: MakeHeader, given: MakeAsk
) -> None:
    base = load("llama")
    ask = replace(given(base, plan), blocks=(Block(adapter=random_adapter(base, 3), born=1),))
    alone = train_client(load("llama"), header(base), ask, rows, threads=1)
    train_client(base, header(base, "other"), given(base, replace(plan, rows=7), seed=9), rows[::2], threads=1)
    frozen = replace(given(base, plan, seed=5), frozen=random_adapter(base, 8))
    train_client(base, header(base, "third"), frozen, rows[::3], threads=1)
    assert same(train_client(base, header(base), ask, rows, threads=1), alone)
    assert not same(train_client(base, header(base, round=2), ask, rows, threads=1), alone)


def random_adapter(base: Base, seed: int, size: float = 0.1) -> Adapter:
    g = np.random.default_rng(seed)
    return Adapter(
        {
            n: Factors(
                g.normal(size=(2, m.inp)).astype(np.float32) * np.float32(size),
                g.normal(size=(m.out, 2)).astype(np.float32),
            )
            for n, m in base.layout.modules.items()
        }
    )


def test_accumulation_is_the_big_batch(
    load: Load, rows: list[TokenRow], plan: TrainPlan, header: MakeHeader, given: MakeAsk
) -> None:
    base = load("llama")
    rows = rows[:24]  # micro-batches of 12 or of 24: both steps see every row, in batches of unlike answer counts
    big = with_training(plan, batch_size=24, local_steps=3)
    small = with_training(plan, batch_size=12, accumulation=2, local_steps=3)
    answers = [train_client(base, header(base), given(base, p), rows, threads=1) for p in (big, small)]
    for key, x in answers[0].arrays.items():
        np.testing.assert_allclose(answers[1].arrays[key], x, atol=2e-5, err_msg=key)
    assert answers[0].metrics["tokens"] == answers[1].metrics["tokens"]
    assert answers[0].metrics["loss_before"] == pytest.approx(answers[1].metrics["loss_before"], rel=1e-5)


def test_checkpointing_changes_nothing(
    load: Load, rows: list[TokenRow], plan: TrainPlan, header: MakeHeader, given: MakeAsk
) -> None:
    base = load("llama")
    calls = 0

    def count(*_: object) -> None:
        nonlocal calls
        calls += 1

    hook = base.model.model.layers[0].mlp.register_forward_pre_hook(count)
    plain = train_client(base, header(base), given(base, plan), rows, threads=1)
    once, calls = calls, 0
    again = train_client(base, header(base), given(base, with_training(plan, checkpointing=True)), rows, threads=1)
    hook.remove()
    assert same(plain, again)
    assert calls == 2 * once >= 2 * 5  # once forward, once again in the backward pass of each step
    assert "forward" not in base.model.model.layers[0].__dict__


def test_the_base_gets_no_gradients_and_comes_back_pristine(
    load: Load, rows: list[TokenRow], plan: TrainPlan, header: MakeHeader, given: MakeAsk
) -> None:
    base = load("llama")
    tokens = torch.arange(1, 9)[None]
    before = base.model(input_ids=tokens).logits
    weights = {n: p.detach().clone() for n, p in base.model.named_parameters()}
    train_client(base, header(base), given(base, plan), rows, threads=1)
    assert not any(p.requires_grad or p.grad is not None for p in base.model.parameters())
    assert all(torch.equal(p, weights[n]) for n, p in base.model.named_parameters())
    assert torch.equal(base.model(input_ids=tokens).logits, before)


def test_blocks_and_frozen_factors_are_in_the_loss(
    load: Load, rows: list[TokenRow], plan: TrainPlan, header: MakeHeader
) -> None:
    """Blocks of a pair and the same pair frozen for this client alone: one loss, and not that of the bare base."""
    base, extra = load("llama"), random_adapter(load("llama"), 1)
    asks = [Ask(plan=plan), Ask(plan=plan, blocks=(Block(adapter=extra, born=1),)), Ask(plan=plan, frozen=extra)]
    bare, blocks, frozen = (train_client(base, header(base), a, rows, threads=1) for a in asks)
    assert blocks.metrics["loss_before"] == pytest.approx(frozen.metrics["loss_before"], rel=1e-5)
    assert abs(blocks.metrics["loss_before"] - bare.metrics["loss_before"]) > 0.01
    for key, x in blocks.arrays.items():
        np.testing.assert_allclose(frozen.arrays[key], x, atol=1e-4)


def test_weight_change_is_the_dense_one(
    load: Load, rows: list[TokenRow], plan: TrainPlan, header: MakeHeader, given: MakeAsk
) -> None:
    base = load("gpt2")
    block = random_adapter(base, 2)
    ask = replace(given(base, plan), blocks=(Block(adapter=block, born=1),))
    pristine = {n: base.model.get_submodule(n).weight.detach().double().numpy().copy() for n in base.layers}
    answer = train_client(base, header(base), ask, rows, threads=1)
    change = size = 0.0
    for n in base.layers:
        trained = answer.arrays[f"B:{n}"].astype(float) @ answer.arrays[f"A:{n}"].astype(float)
        begun = ask.arrays[f"B:{n}"].astype(float) @ ask.arrays[f"A:{n}"].astype(float)
        change += np.sum((2.0 * (trained - begun)) ** 2)
        size += np.sum((pristine[n].T + block[n].dense()) ** 2)
    assert answer.metrics["weight_change"] == pytest.approx(math.sqrt(change / size), rel=1e-5)


def test_metrics_count_what_was_trained(load: Load, rows: list[TokenRow], plan: TrainPlan, header: MakeHeader) -> None:
    base = load("llama")
    answer = train_client(base, header(base), Ask(plan=with_training(plan, local_steps=5)), rows, threads=1)
    # Five batches of six rows are one epoch of thirty.
    m = answer.metrics
    assert set(m) == {
        *("loss_before", "loss_after", "grad_norm", "weight_change", "tokens", "answer_tokens", "rows", "steps"),
        *("seconds", "step_seconds"),
    }
    assert m["tokens"] == sum(len(r.tokens) for r in rows)
    assert m["answer_tokens"] == sum(r.answer[1:].sum() for r in rows)
    assert (m["rows"], m["steps"], answer.examples) == (30, 5, 30)
    assert 0 < m["step_seconds"] <= m["seconds"]
    assert all(isinstance(x, float) for x in m.values())


@pytest.mark.parametrize(("epochs", "steps"), [(1.0, 5), (2.0, 10), (0.1, 1), (1.1, 6)])
def test_epochs_become_steps(
    epochs: float, steps: int, load: Load, rows: list[TokenRow], plan: TrainPlan, header: MakeHeader
) -> None:
    base = load("llama")
    ask = Ask(plan=with_training(plan, local_steps=None, local_epochs=epochs))
    assert train_client(base, header(base), ask, rows, threads=1).metrics["steps"] == steps


def test_kept_moments_continue_the_run(
    load: Load, rows: list[TokenRow], plan: TrainPlan, header: MakeHeader, given: MakeAsk
) -> None:
    """Two rounds of three steps with kept moments equal six steps, if the rows are one batch."""
    base, rows = load("llama"), rows[:6]
    keep = with_training(plan, optimizer_state="keep", local_steps=3)
    moments: dict[str, np.ndarray] = {}
    ask = given(base, keep)
    first = train_client(base, header(base), ask, rows, threads=1, optimizer=moments)
    second = train_client(
        base, header(base, round=2), replace(ask, arrays=first.arrays), rows, threads=1, optimizer=moments
    )
    whole = train_client(base, header(base), given(base, with_training(plan, local_steps=6)), rows, threads=1)
    for key, x in whole.arrays.items():
        np.testing.assert_allclose(second.arrays[key], x, atol=1e-5)
    with pytest.raises(TrainingError, match="nothing holds AdamW's moments"):
        train_client(base, header(base), ask, rows, threads=1)
    with pytest.raises(TrainingError, match="the rank or the trained parts changed"):
        train_client(base, header(base), given(base, replace(keep, train=("B",))), rows, threads=1, optimizer=moments)


def test_public_a_is_made_here_and_checked(
    load: Load, rows: list[TokenRow], plan: TrainPlan, header: MakeHeader
) -> None:
    base = load("llama")
    ffa = replace(plan, train=("B",), send=("A", "B"), rows=6, rank=4, a_from="public", a_seed=11)
    probes, bases = {}, {}
    for n, m in base.layout.modules.items():
        bases[n] = public_orthonormal(11, "basis", n, rows=6, cols=m.inp)
        probes[f"probe:{n}"] = (bases[n] @ public_normal(11, "probe", n, shape=(m.inp,))).astype(np.float32)
    answer = train_client(base, header(base), Ask(plan=ffa, arrays=probes), rows, threads=1)
    for n in base.layers:
        np.testing.assert_allclose(answer.arrays[f"A:{n}"], bases[n][:4], atol=1e-6)
        assert np.abs(answer.arrays[f"B:{n}"]).max() > 0
    name = sorted(probes)[0]
    bad = {**probes, name: probes[name] * np.float32(1 + 1e-4)}
    with pytest.raises(BaseMismatch, match=r"public A of .* is not the server's"):
        train_client(base, header(base), Ask(plan=ffa, arrays=bad), rows, threads=1)
    with pytest.raises(TrainingError, match="needs its checksum probe:"):
        train_client(base, header(base), Ask(plan=ffa), rows, threads=1)


def test_fresh_a_differs_by_client_and_round_and_lies_in_its_bounds(
    load: Load, rows: list[TokenRow], plan: TrainPlan, header: MakeHeader
) -> None:
    base = load("llama")
    plan = with_training(replace(plan, train=("B",), send=("A",)), local_steps=1)
    draws = [
        train_client(base, header(base, c, r), Ask(plan=plan), rows, threads=1).arrays
        for c, r in (("a", 1), ("a", 1), ("b", 1), ("a", 2))
    ]
    for key, x in draws[0].items():
        inp = x.shape[1]
        assert np.abs(x).max() <= 1 / math.sqrt(inp)
        assert np.abs(x).max() > 0.7 / math.sqrt(inp)
        np.testing.assert_array_equal(x, draws[1][key])
        assert not np.array_equal(x, draws[2][key])
        assert not np.array_equal(x, draws[3][key])


def test_an_embedding_trains_from_a_fresh_pair(
    load: Load, rows: list[TokenRow], plan: TrainPlan, header: MakeHeader
) -> None:
    base = load("llama", target_modules=("embed_tokens", "q_proj"))
    answer = train_client(base, header(base), Ask(plan=with_training(plan, local_steps=30)), rows, threads=1)
    assert base.layout.modules["model.embed_tokens"].kind == "embedding"
    assert np.abs(answer.arrays["A:model.embed_tokens"]).max() > 0  # its zero factor has learnt
    assert answer.metrics["loss_after"] < answer.metrics["loss_before"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_classifier_trains_its_head_from_the_asked_one(
    dtype: str, load: Load, labelled: list[TokenRow], plan: TrainPlan, header: MakeHeader, given: MakeAsk
) -> None:
    base = load("bert", dtype=dtype)
    plan = with_training(replace(plan, train=("A", "B", "head"), send=("A", "B", "head")), local_steps=20)
    ask = given(base, plan)
    first = train_client(base, header(base), ask, labelled, threads=1)
    assert first.metrics["loss_after"] < 0.8 * first.metrics["loss_before"]
    for name, shape in base.layout.head.items():
        assert first.arrays[f"head:{name}"].shape == shape
        assert not np.array_equal(first.arrays[f"head:{name}"], ask.arrays[f"head:{name}"])
    assert same(train_client(base, header(base), ask, labelled, threads=1), first)
    assert not any(p.requires_grad or p.grad is not None for p in base.model.parameters())
    frozen = replace(ask, plan=replace(plan, train=("A", "B")))
    again = train_client(base, header(base), frozen, labelled, threads=1)
    for name in base.layout.head:
        np.testing.assert_array_equal(again.arrays[f"head:{name}"], ask.arrays[f"head:{name}"])


def test_bf16_base_and_autocast_learn_in_fp32_factors(
    load: Load, rows: list[TokenRow], plan: TrainPlan, header: MakeHeader, given: MakeAsk
) -> None:
    exact = load("llama")
    want = train_client(exact, header(exact), given(exact, plan), rows, threads=1)
    low = load("llama", dtype="bfloat16")
    for base, p in ((low, plan), (exact, with_training(plan, autocast=True))):
        got = train_client(base, header(base), given(base, p), rows, threads=1)
        assert got.metrics["loss_before"] == pytest.approx(want.metrics["loss_before"], rel=2e-2)
        assert all(x.dtype == np.float32 for x in got.arrays.values())
        cosine = [
            float(np.sum(d * e) / (np.linalg.norm(d) * np.linalg.norm(e)))
            for k, x in want.arrays.items()
            for d, e in [(got.arrays[k] - start[k], x - start[k]) for start in [given(exact, plan).arrays]]
        ]
        assert np.mean(cosine) > 0.9


def test_a_non_finite_loss_stops_the_client(
    load: Load, rows: list[TokenRow], plan: TrainPlan, header: MakeHeader, given: MakeAsk
) -> None:
    base = load("llama")
    ask = given(base, plan)
    name = sorted(ask.arrays)[0]
    ask.arrays[name][0, 0] = np.inf  # type: ignore[index]
    with pytest.raises(TrainingError, match=r"client c0, round 1, step 1 of 5: the loss is .*; nothing is sent"):
        train_client(base, header(base), ask, rows, threads=1)
    assert all(layer.pair is None for layer in base.layers.values())
    train_client(base, header(base), given(base, plan), rows, threads=1)


def test_bad_asks_are_refused_by_name(
    load: Load, rows: list[TokenRow], plan: TrainPlan, header: MakeHeader, given: MakeAsk
) -> None:
    base = load("llama")
    ok = header(base)

    def refuse(error: type[Exception], match: str, ask: Ask, h: Header = ok, r: Sequence[TokenRow] = rows) -> None:
        with pytest.raises(error, match=match):
            train_client(base, h, ask, r, threads=1)

    refuse(TrainingError, "client c0 has no training rows", Ask(plan=plan), r=[])
    refuse(BaseMismatch, f"opened with base feed, here is {base.fingerprint}", Ask(plan=plan), replace(ok, base="feed"))
    refuse(TrainingError, "has no plan; kind 'train'", Ask())
    refuse(TrainingError, "rank 17 is above what .* can hold", Ask(plan=replace(plan, rank=17, rows=17)))
    refuse(TrainingError, "rank 5 must be between 1 and the pair's 4 rows", Ask(plan=replace(plan, rank=5)))
    refuse(TrainingError, "rank 0 must be between 1", Ask(plan=replace(plan, rank=0)))
    refuse(TrainingError, "trains nothing", Ask(plan=replace(plan, train=())))
    refuse(TrainingError, "names a head, this base has none", Ask(plan=replace(plan, send=("head",))))
    refuse(TrainingError, "only \\['B'\\] is sent", Ask(plan=replace(plan, send=("B",), changes=("A",))))
    refuse(TrainingError, "scale must be finite and not 0", Ask(plan=replace(plan, scale=math.nan)))
    refuse(TrainingError, "exactly one of local_steps", Ask(plan=with_training(plan, local_epochs=1.0)))
    refuse(TrainingError, "starts from A:.*, which the ask does not carry", Ask(plan=replace(plan, a_from="given")))
    ask = given(base, plan)
    refuse(TrainingError, "has shape .* the plan and this base need", replace(ask, plan=replace(ask.plan, rows=5)))
    silent = [replace(rows[0], answer=np.zeros_like(rows[0].answer)), *rows]
    refuse(TrainingError, "1 of 31 rows have no answer token", Ask(plan=plan), r=silent)


def test_a_classifier_refuses_rows_without_labels(
    load: Load, rows: list[TokenRow], labelled: list[TokenRow], plan: TrainPlan, header: MakeHeader, given: MakeAsk
) -> None:
    base = load("bert")
    with pytest.raises(TrainingError, match="30 of 30 rows have no label from 0 to 2"):
        train_client(base, header(base), given(base, plan), rows, threads=1)
    beyond = [replace(row, choices=(0, 1, 2, 3 * (i == 0))) for i, row in enumerate(labelled)]
    with pytest.raises(TrainingError, match="1 of 30 rows have no label from 0 to 2, or choices beyond"):
        train_client(base, header(base), given(base, plan), beyond, threads=1)
    with pytest.raises(TrainingError, match=r"starts from head:classifier\.bias, which the ask does not carry"):
        train_client(base, header(base), Ask(plan=plan), labelled, threads=1)


def test_no_layers_to_checkpoint(
    load: Load, rows: list[TokenRow], plan: TrainPlan, header: MakeHeader, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedlora.training.local.GradientCheckpointingLayer", str)
    base = load("llama")
    with pytest.raises(TrainingError, match="LlamaForCausalLM has no layers to checkpoint"):
        train_client(base, header(base), Ask(plan=with_training(plan, checkpointing=True)), rows, threads=1)


def test_threads_are_set_for_the_call_only(
    load: Load, rows: list[TokenRow], plan: TrainPlan, header: MakeHeader
) -> None:
    base, before = load("llama"), torch.get_num_threads()
    seen = []
    hook = base.model.register_forward_hook(lambda *_: seen.append(torch.get_num_threads()))
    inner = base.model.model.register_forward_hook(lambda *_: seen.append(torch.get_num_threads()))
    train_client(base, header(base), Ask(plan=with_training(plan, local_steps=1)), rows, threads=before + 1)
    hook.remove()
    inner.remove()
    assert set(seen) == {before + 1}
    assert torch.get_num_threads() == before
