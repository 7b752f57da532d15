"""Cores, kept parts and pressed tails, against autograd on dense products of all the factors."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import islice

import numpy as np
import pytest
import torch
import torch.nn.functional as nnf
from torch import Tensor
from torch.func import functional_call
from transformers import AutoModelForCausalLM

from fedlora.adapter import Adapter
from fedlora.base import Base
from fedlora.data.batches import steps
from fedlora.data.rows import TokenRow
from fedlora.errors import BaseMismatch, TrainingError
from fedlora.rng import public_normal, public_orthonormal, stream
from fedlora.state import Answer, Ask, Header, Layout, Module, PersonalPair, PublicPair, TrainPlan, expected_shapes
from fedlora.training.local import train_client
from fedlora.training.start import check_plan, personal_pair, public_pair, start

Load = Callable[..., Base]
MakeHeader = Callable[..., Header]
MakeAsk = Callable[..., Ask]
Arrays = dict[str, np.ndarray]


def with_training(plan: TrainPlan, **changes: object) -> TrainPlan:
    return replace(plan, training=replace(plan.training, **changes))  # type: ignore[arg-type]


def core_plan(plan: TrainPlan, **changes: object) -> TrainPlan:
    settings = {"core": True, "train": ("R",), "send": ("R",), "a_from": "given", "b_from": "given", **changes}
    return replace(plan, **settings)  # type: ignore[arg-type]


def core_ask(base: Base, plan: TrainPlan, seed: int = 0) -> Ask:
    """Random bases and a random core for every module."""
    g = np.random.default_rng(seed)
    arrays: Arrays = {f"head:{n}": x for n, x in base.initial_head.items()}
    for name, m in base.layout.modules.items():
        arrays[f"A:{name}"] = (g.normal(size=(plan.rows, m.inp)) / np.sqrt(m.inp)).astype(np.float32)
        arrays[f"B:{name}"] = (g.normal(size=(m.out, plan.rows)) / 4).astype(np.float32)
        arrays[f"R:{name}"] = (g.normal(size=(plan.rows, plan.rows)) / 4).astype(np.float32)
    return Ask(plan=plan, arrays=arrays)


def dense_twin(
    folder: str, base: Base, header: Header, ask: Ask, rows: Sequence[TokenRow]
) -> tuple[dict[str, np.ndarray], list[float], list[float]]:
    """The same round by autograd through dense weights W0 + s B R A. Returns arrays, losses and penalties by step."""
    plan = ask.plan
    assert plan is not None
    t, r = plan.training, plan.rank
    model = AutoModelForCausalLM.from_pretrained(folder).eval().requires_grad_(False)
    given = {key: torch.from_numpy(np.array(x)) for key, x in ask.arrays.items()}
    leaves: dict[str, Tensor] = {}
    for key, x in given.items():
        of = key.split(":")[0]
        cut = x[:r, :r] if of == "R" else x[:r] if of == "A" else x[:, :r]
        leaves[key] = cut.clone().requires_grad_(of in plan.train)

    def factor(of: str, name: str) -> Tensor:
        """The whole factor, its leading part a leaf."""
        whole, leaf = given[f"{of}:{name}"], leaves[f"{of}:{name}"]
        if of == "A":
            return torch.cat([leaf, whole[r:]])
        if of == "B":
            return torch.cat([leaf, whole[:, r:]], dim=1)
        return torch.cat([torch.cat([leaf, whole[:r, r:]], dim=1), whole[r:]])

    def weights() -> dict[str, Tensor]:
        out = {}
        for name, m in base.layout.modules.items():
            core = factor("R", name) if plan.core else torch.eye(plan.rows)
            product = plan.scale * factor("B", name) @ core @ factor("A", name)
            w0 = model.get_parameter(f"{name}.weight")
            out[f"{name}.weight"] = w0 + (product if m.kind == "linear" else product.t())
        return out

    trained = [x for x in leaves.values() if x.requires_grad]
    adam = torch.optim.AdamW(
        trained, lr=t.learning_rate, betas=(t.beta1, t.beta2), eps=t.epsilon, weight_decay=t.weight_decay
    )
    order = steps(
        rows,
        step_rows=t.batch_size * t.accumulation,
        batch_size=t.batch_size * t.accumulation,
        overhead=10**9,
        rng=stream(plan.seed, "batches", header.client, header.round),
        pad_id=base.pad_id,
    )
    losses, penalties = [], []
    for (batch,) in islice(order, t.local_steps):
        tokens, mask = torch.from_numpy(batch.tokens), torch.from_numpy(batch.attention)
        labels = torch.where(torch.from_numpy(batch.answer), tokens, -100)
        logits = functional_call(model, weights(), (tokens,), {"attention_mask": mask}).logits
        loss = nnf.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
        penalty = torch.zeros(())
        if plan.tail:
            for name in base.layout.modules:
                a, b = leaves[f"A:{name}"][r - plan.tail :], leaves[f"B:{name}"][:, r - plan.tail :]
                penalty = penalty + plan.tail_penalty * a.pow(2).sum().sqrt() * b.pow(2).sum().sqrt()
        adam.zero_grad()
        (loss + penalty).backward()
        if t.clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(trained, t.clip_norm)
        adam.step()
        losses.append(loss.item())
        penalties.append(penalty.item())
    return {k: x.detach().numpy() for k, x in leaves.items() if k[0] in plan.send}, losses, penalties


@pytest.mark.parametrize(
    ("family", "modules"),
    [("llama", "all-linear"), ("gpt2", "all-linear"), ("llama", ("embed_tokens", "q_proj"))],
    ids=["linear", "conv1d", "embedding"],
)
@pytest.mark.parametrize(("rows_", "rank", "clip"), [(4, 4, None), (5, 2, 0.5)], ids=["whole", "leading-clipped"])
def test_a_core_trains_as_the_dense_product_of_three(
    family: str,
    modules: object,
    rows_: int,
    rank: int,
    clip: float | None,
    load: Load,
    folders: dict[str, str],
    rows: list[TokenRow],
    plan: TrainPlan,
    header: MakeHeader,
) -> None:
    base = load(family, target_modules=modules)
    ask = core_ask(base, with_training(core_plan(plan, rows=rows_, rank=rank), clip_norm=clip, accumulation=2))
    answer = train_client(base, header(base), ask, rows, threads=1)
    want, losses, _ = dense_twin(str(folders[family]), base, header(base), ask, rows)
    assert ask.plan is not None
    assert {k: x.shape for k, x in answer.arrays.items()} == expected_shapes(ask.plan, base.layout)
    moved = 0.0
    for key, x in answer.arrays.items():
        np.testing.assert_allclose(x, want[key], atol=1e-5, err_msg=key)
        moved = max(moved, float(np.abs(x - ask.arrays[key][:rank, :rank]).max()))
    assert moved > 1e-3
    assert answer.metrics["loss_before"] == pytest.approx(losses[0], rel=1e-5)
    assert answer.metrics["loss_after"] == pytest.approx(losses[-1], rel=1e-4)
    change = train_client(base, header(base), replace(ask, plan=replace(ask.plan, changes=("R",))), rows, threads=1)
    for key, x in answer.arrays.items():
        np.testing.assert_array_equal(change.arrays[key], x - ask.arrays[key][:rank, :rank])


def test_the_weight_change_of_a_core_is_the_dense_one(
    load: Load, rows: list[TokenRow], plan: TrainPlan, header: MakeHeader
) -> None:
    base = load("gpt2")
    ask = core_ask(base, core_plan(plan, rows=5, rank=3, scale=-0.7, changes=("R",)))
    pristine = {n: base.model.get_submodule(n).weight.detach().double().numpy().copy() for n in base.layers}
    answer = train_client(base, header(base), ask, rows, threads=1)
    change = size = 0.0
    for n in base.layers:
        a, b = (ask.arrays[f"{p}:{n}"].astype(float) for p in "AB")
        core = np.zeros((5, 5))
        core[:3, :3] = answer.arrays[f"R:{n}"]
        change += float(np.sum((0.7 * b @ core @ a) ** 2))
        size += float(np.sum(pristine[n] ** 2))
    assert answer.metrics["weight_change"] == pytest.approx(math.sqrt(change / size), rel=1e-5)


def test_public_bases_are_made_here_and_one_checksum_vouches_for_both(
    load: Load, rows: list[TokenRow], plan: TrainPlan, header: MakeHeader
) -> None:
    """The same bytes as with the bases sent; an evaluation forms the same product."""
    base = load("llama")
    whole = core_ask(base, core_plan(plan, rows=6, rank=4))
    sent, public = {}, {k: x for k, x in whole.arrays.items() if k[0] == "R"}
    for n, m in base.layout.modules.items():
        sent[f"A:{n}"] = public_orthonormal(11, "basis", n, rows=6, cols=m.inp).astype(np.float32)
        sent[f"B:{n}"] = public_orthonormal(11, "basis-b", n, rows=6, cols=m.out).T.astype(np.float32)
        probe = public_normal(11, "probe", n, shape=(m.inp,))
        public[f"probe:{n}"] = (sent[f"A:{n}"].astype(float) @ probe).astype(np.float32)
    cores = {k: x for k, x in public.items() if k[0] == "R"}
    there = train_client(base, header(base), replace(whole, arrays={**sent, **cores}), rows, threads=1)
    assert whole.plan is not None
    here = replace(whole.plan, a_from="public", b_from="public", a_seed=11)
    made = train_client(base, header(base), Ask(plan=here, arrays=public), rows, threads=1)
    assert all(np.array_equal(x, made.arrays[k]) for k, x in there.arrays.items())
    ask = Ask(public=PublicPair(seed=11, rows=6, scale=2.0, core=True), arrays=public)
    for n, f in public_pair(ask, header(base), base.layout).items():
        want = 2.0 * sent[f"B:{n}"].astype(float) @ public[f"R:{n}"].astype(float) @ sent[f"A:{n}"].astype(float)
        np.testing.assert_allclose(f.dense(), want, atol=1e-5)
    name = sorted(public)[0]
    with pytest.raises(TrainingError, match=f"{name} has shape .* need \\(6, 6\\)"):
        public_pair(replace(ask, arrays={**public, name: np.zeros((5, 5))}), header(base), base.layout)
    with pytest.raises(TrainingError, match="needs its checksum"):
        public_pair(replace(ask, arrays=cores), header(base), base.layout)
    other = "probe:" + name.removeprefix("R:")
    with pytest.raises(BaseMismatch, match=r"public A of .* is not the server's"):
        public_pair(replace(ask, arrays={**public, other: public[other] * 2}), header(base), base.layout)
    with pytest.raises(TrainingError, match="a public B of 17 orthonormal columns does not fit"):
        public_pair(_wide(17), header(base), Layout(modules={"x": Module(out=16, inp=40)}))


def _wide(rows: int) -> Ask:
    a = public_orthonormal(1, "basis", "x", rows=rows, cols=40)
    probe = a @ public_normal(1, "probe", "x", shape=(40,))
    arrays = {"R:x": np.zeros((rows, rows), np.float32), "probe:x": probe.astype(np.float32)}
    return Ask(public=PublicPair(seed=1, rows=rows, scale=1.0, core=True), arrays=arrays)


def test_a_core_leaves_nothing_behind(
    load: Load, rows: list[TokenRow], plan: TrainPlan, header: MakeHeader, given: MakeAsk
) -> None:
    """The same bytes before and after other clients trained, with and without cores; the base is pristine."""
    base = load("llama")
    tokens = torch.arange(1, 9)[None]
    before = base.model(input_ids=tokens).logits
    ask = core_ask(base, core_plan(plan, rows=5, rank=3))
    first = train_client(base, header(base), ask, rows, threads=1)
    train_client(base, header(base, "other"), core_ask(base, core_plan(plan), 3), rows, threads=1)
    train_client(base, header(base, "third"), given(base, plan), rows, threads=1)
    again = train_client(base, header(base), ask, rows, threads=1)
    assert all(x.tobytes() == again.arrays[k].tobytes() for k, x in first.arrays.items())
    assert all(layer.pair is None for layer in base.layers.values())
    assert torch.equal(base.model(input_ids=tokens).logits, before)


def test_a_core_and_a_head_train_together(
    load: Load, labelled: list[TokenRow], plan: TrainPlan, header: MakeHeader
) -> None:
    base = load("bert")
    both = with_training(core_plan(plan, train=("R", "head"), send=("R", "head")), local_steps=8)
    ask = core_ask(base, both)
    answer = train_client(base, header(base), ask, labelled, threads=1)
    assert answer.metrics["loss_after"] < answer.metrics["loss_before"]
    assert all(not np.array_equal(x, ask.arrays[k]) for k, x in answer.arrays.items())
    head_only = replace(ask, plan=replace(both, train=("head",)))
    for key, x in train_client(base, header(base), head_only, labelled, threads=1).arrays.items():
        assert np.array_equal(x, ask.arrays[key]) == key.startswith("R:")


# -- parts that stay


def own_parts(answer: Answer, of: str) -> bool:
    return any(key.split(":")[0] in of for key in answer.arrays)


def test_kept_parts_go_on_where_they_were_and_are_never_sent(
    load: Load, labelled: list[TokenRow], plan: TrainPlan, header: MakeHeader, given: MakeAsk
) -> None:
    """Round 2 with what was kept equals round 2 of a client that was given those very values."""
    base = load("bert")
    mine = replace(
        plan, train=("A", "B", "head"), send=("A",), changes=("A",), a_from="given", b_from="zero", keep=("B", "head")
    )
    ask = replace(given(base, plan), plan=mine)
    kept: dict[str, np.ndarray] = {"B:stray": np.zeros(3)}
    first = train_client(base, header(base), ask, labelled, threads=1, kept=kept)
    assert {k: x.shape for k, x in first.arrays.items()} == expected_shapes(mine, base.layout)
    assert not own_parts(first, "B head")
    assert {k: (x.shape, x.dtype.name) for k, x in kept.items()} == {
        **{f"B:{n}": ((m.out, 4), "float32") for n, m in base.layout.modules.items()},
        **{f"head:{n}": (s, "float32") for n, s in base.layout.head.items()},
    }
    loud = replace(ask, plan=replace(mine, keep=(), send=("A", "B", "head"), changes=()))
    told = train_client(base, header(base), loud, labelled, threads=1)
    for key, x in kept.items():
        np.testing.assert_array_equal(x, told.arrays[key])
    for n in base.layout.modules:
        np.testing.assert_array_equal(first.arrays[f"A:{n}"], told.arrays[f"A:{n}"] - ask.arrays[f"A:{n}"])

    before = {k: x.copy() for k, x in kept.items()}
    second = train_client(base, header(base, round=2), ask, labelled, threads=1, kept=kept)
    assert loud.plan is not None
    told = train_client(
        base,
        header(base, round=2),
        Ask(plan=replace(loud.plan, b_from="given"), arrays={**ask.arrays, **before}),
        labelled,
        threads=1,
    )
    for key, x in kept.items():
        np.testing.assert_array_equal(x, told.arrays[key])
        assert not np.array_equal(x, before[key])
    assert second.metrics["loss_before"] == pytest.approx(told.metrics["loss_before"])


def test_what_is_missing_or_misshapen_starts_as_the_plan_says(
    load: Load, rows: list[TokenRow], plan: TrainPlan, header: MakeHeader, given: MakeAsk
) -> None:
    base = load("llama")
    ask = given(base, plan)
    keeping = replace(plan, send=("A",), a_from="given", b_from="zero", keep=("B",), rows=4)
    names = sorted(base.layout.modules)
    odd = {f"B:{names[0]}": np.ones((3, 4), np.float32), f"B:{names[1]}": ask.arrays[f"B:{names[1]}"]}
    begun = start(ask, keeping, header(base), base.layout, odd)
    assert not begun.b[names[0]].any()
    np.testing.assert_array_equal(begun.b[names[1]], odd[f"B:{names[1]}"])
    assert not begun.b[names[2]].any()
    np.testing.assert_array_equal(begun.a[names[1]], ask.arrays[f"A:{names[1]}"])
    unkept = start(ask, replace(keeping, keep=()), header(base), base.layout, odd)
    assert not any(x.any() for x in unkept.b.values())


def test_rows_that_are_loaded_and_not_trained_are_kept_too(
    load: Load, rows: list[TokenRow], plan: TrainPlan, header: MakeHeader, given: MakeAsk
) -> None:
    base = load("llama")
    wide = replace(plan, rows=6, rank=2)
    ask = given(base, wide)
    assert ask.plan is not None
    keeping = replace(ask, plan=replace(ask.plan, send=(), keep=("A", "B")))
    kept: dict[str, np.ndarray] = {}
    answer = train_client(base, header(base), keeping, rows, threads=1, kept=kept)
    assert answer.arrays == {}
    for n in base.layers:
        for key, leading in ((f"A:{n}", np.s_[:2]), (f"B:{n}", np.s_[:, :2])):
            assert kept[key].shape == ask.arrays[key].shape
            rest = kept[key].copy()
            rest[leading] = ask.arrays[key][leading]
            np.testing.assert_array_equal(rest, ask.arrays[key])
            assert not np.array_equal(kept[key], ask.arrays[key])


def test_clients_of_one_process_share_nothing_that_they_keep(
    load: Load, rows: list[TokenRow], plan: TrainPlan, header: MakeHeader, given: MakeAsk
) -> None:
    """Two rounds of one client are the same bytes whether or not another one trains in between, on the same base."""
    base = load("llama")
    ask = given(base, plan)
    ask = replace(ask, plan=replace(plan, send=("A",), a_from="given", keep=("B",)))

    def two_rounds(neighbour: bool) -> tuple[Answer, Arrays]:
        mine: Arrays = {}
        for t in (1, 2):
            answer = train_client(base, header(base, round=t), ask, rows, threads=1, kept=mine)
            if neighbour:
                train_client(base, header(base, "other", t), ask, rows[::-1], threads=1, kept={})
        return answer, mine

    (alone, left), (beside, right) = two_rounds(False), two_rounds(True)
    assert all(x.tobytes() == beside.arrays[k].tobytes() for k, x in alone.arrays.items())
    assert all(x.tobytes() == right[k].tobytes() for k, x in left.items())


def test_a_client_without_memory_or_with_a_broken_round_keeps_what_it_had(
    load: Load, rows: list[TokenRow], plan: TrainPlan, header: MakeHeader, given: MakeAsk
) -> None:
    base = load("llama")
    ask = given(base, plan)
    assert ask.plan is not None
    ask = replace(ask, plan=replace(ask.plan, send=("A",), keep=("B",)))
    with pytest.raises(TrainingError, match=r"c0, round 1: this client has no memory folder, and test keeps B there"):
        train_client(base, header(base), ask, rows, threads=1)
    kept = {k: x.copy() for k, x in ask.arrays.items() if k[0] == "B"}
    name = sorted(kept)[0]
    kept[name][0, 0] = np.inf
    before = {k: x.copy() for k, x in kept.items()}
    with pytest.raises(TrainingError, match="nothing is sent"):
        train_client(base, header(base), ask, rows, threads=1, kept=kept)
    assert kept.keys() == before.keys()
    assert all(np.array_equal(x, before[k]) for k, x in kept.items())
    untouched = dict(before)
    train_client(base, header(base), given(base, plan), rows, threads=1, kept=untouched)
    assert untouched.keys() == before.keys()  # a plan that keeps nothing reads and writes nothing


# -- a tail that is pressed


@pytest.mark.parametrize(("train", "tail"), [(("A", "B"), 1), (("B",), 3), (("A", "B"), 4)])
def test_the_penalty_of_a_tail_is_in_the_gradient_once_a_step(
    train: tuple[str, ...],
    tail: int,
    load: Load,
    folders: dict[str, str],
    rows: list[TokenRow],
    plan: TrainPlan,
    header: MakeHeader,
    given: MakeAsk,
) -> None:
    """Two micro-batches a step, clipped, against autograd on the loss with the penalty written out."""
    base = load("llama")
    pressed = replace(plan, train=train, send=("A", "B"), tail=tail, tail_penalty=0.3)  # type: ignore[arg-type]
    pressed = with_training(pressed, accumulation=2, batch_size=6, clip_norm=1.0)
    ask = given(base, replace(pressed, rows=5))
    answer = train_client(base, header(base), ask, rows, threads=1)
    want, losses, penalties = dense_twin(str(folders["llama"]), base, header(base), ask, rows)
    for key, x in answer.arrays.items():
        np.testing.assert_allclose(x, want[key], atol=2e-5, err_msg=key)
    assert answer.metrics["tail_penalty"] == pytest.approx(np.mean(penalties), rel=1e-4)
    assert answer.metrics["loss_before"] == pytest.approx(losses[0], rel=1e-5)
    assert answer.metrics["loss_after"] == pytest.approx(losses[-1], rel=1e-4)
    assert ask.plan is not None
    free = train_client(base, header(base), replace(ask, plan=replace(ask.plan, tail_penalty=0.0)), rows, threads=1)
    assert "tail_penalty" not in free.metrics
    assert max(float(np.abs(x - free.arrays[k]).max()) for k, x in answer.arrays.items()) > 1e-3


def test_a_tail_of_zero_is_left_alone(
    load: Load, rows: list[TokenRow], plan: TrainPlan, header: MakeHeader, given: MakeAsk
) -> None:
    """Beside a B of zero the penalty is 0 in the first step and pulls at nothing, whatever A is."""
    base = load("llama")
    pressed = with_training(replace(plan, tail=2, tail_penalty=1e6), local_steps=1)
    one = train_client(base, header(base), Ask(plan=pressed), rows, threads=1)
    free = train_client(base, header(base), Ask(plan=replace(pressed, tail_penalty=0.0)), rows, threads=1)
    assert one.metrics["tail_penalty"] == 0.0
    assert one.metrics["grad_norm"] == free.metrics["grad_norm"]
    assert all(np.array_equal(x, free.arrays[k]) for k, x in one.arrays.items())


# -- a personal pair to evaluate


LAYOUT = Layout(modules={"q": Module(out=7, inp=5), "v": Module(out=4, inp=6)}, head={"score.weight": (2, 4)})
HEADER = Header(run="r", round=3, client="c7", kind="evaluate")


def random_parts(rank: int, seed: int, parts: str = "AB") -> Arrays:
    g = np.random.default_rng(seed)
    out: Arrays = {}
    for n, m in LAYOUT.modules.items():
        out[f"A:{n}"] = g.normal(size=(rank, m.inp)).astype(np.float32)
        out[f"B:{n}"] = g.normal(size=(m.out, rank)).astype(np.float32)
    return {k: x for k, x in out.items() if k[0] in parts}


def products(pair: Adapter) -> Mapping[str, np.ndarray]:
    return {n: f.dense() for n, f in pair.items()}


def test_a_personal_pair_is_ones_own_b_beside_the_asks_rows_of_a() -> None:
    shared, head = random_parts(4, 1, "A"), {"head:score.weight": np.ones((2, 4), np.float32)}
    ask = Ask(personal=PersonalPair(rank=3, scale=0.5), arrays={**shared, **head})
    kept = {**random_parts(3, 2), "head:score.weight": np.full((2, 4), 7.0, np.float32)}
    pair, mine = personal_pair(ask, HEADER, LAYOUT, kept)
    for n, x in products(pair).items():
        np.testing.assert_allclose(x, 0.5 * kept[f"B:{n}"] @ shared[f"A:{n}"][:3], rtol=1e-5, atol=1e-6)
    assert (mine["score.weight"] == 7.0).all()
    alone, _ = personal_pair(replace(ask, arrays=head), HEADER, LAYOUT, kept)
    for n, x in products(alone).items():
        np.testing.assert_allclose(x, 0.5 * kept[f"B:{n}"] @ kept[f"A:{n}"], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kept", [{}, random_parts(2, 2)], ids=["nothing", "another-rank"])
def test_who_kept_nothing_of_that_shape_adds_nothing(kept: Arrays) -> None:
    head = {"head:score.weight": np.ones((2, 4), np.float32)}
    for arrays in ({**random_parts(4, 1, "A"), **head}, head):
        ask = Ask(personal=PersonalPair(rank=3, scale=0.5), arrays=arrays)
        pair, mine = personal_pair(ask, HEADER, LAYOUT, {**kept, "head:score.weight": np.zeros((4, 2))})
        assert {n: f.shape for n, f in pair.items()} == {"q": (7, 5), "v": (4, 6)}
        assert not any(x.any() for x in products(pair).values())
        assert (mine["score.weight"] == 1.0).all()


def test_a_personal_ask_that_cannot_be_followed_is_refused_by_name() -> None:
    head = {"head:score.weight": np.ones((2, 4), np.float32)}
    own = PersonalPair(rank=3, scale=0.5)
    with pytest.raises(TrainingError, match="client c7, round 3: the ask has no personal pair"):
        personal_pair(Ask(), HEADER, LAYOUT, {})
    with pytest.raises(TrainingError, match=r"A:q has shape \(2, 5\), the plan and this base need \(3, 5\)"):
        personal_pair(Ask(personal=own, arrays={**random_parts(2, 1, "A"), **head}), HEADER, LAYOUT, {})
    with pytest.raises(TrainingError, match="starts from A:v, which the ask does not carry"):
        personal_pair(
            Ask(personal=own, arrays={"A:q": random_parts(3, 1)["A:q"], **head}), HEADER, LAYOUT, random_parts(3, 2)
        )
    with pytest.raises(TrainingError, match=r"head:score\.weight, which the ask does not carry"):
        personal_pair(Ask(personal=own), HEADER, LAYOUT, {})


# -- plans that contradict themselves


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"core": True}, "with a core only R and head are trained and sent"),
        ({"core": True, "train": ("R",), "send": ("R", "A")}, "with a core only R and head are trained and sent"),
        ({"train": ("R",), "send": ("R",)}, "names R, but its pair has no core"),
        ({"send": ("R",)}, "names R, but its pair has no core"),
        ({"keep": ("B",)}, r"\['B'\] must stay at the client and is to be sent too"),
        ({"keep": ("R",)}, "a core and its bases are the same for all clients"),
        ({"core": True, "train": ("R",), "send": ("R",), "keep": ("A",)}, "a core and its bases are the same for all"),
        ({"send": ("A",), "keep": ("B",), "a_from": "public", "b_from": "public"}, r"\['B'\] is public and cannot be"),
        ({"b_from": "public"}, "a public B has no checksum but that of a public A .*; a_from is 'fresh'"),
        ({"keep": ("head",)}, "names a head, this base has none"),
        ({"tail": 5}, "the tail must be 0 to 4 of the trained rows, got 5"),
        ({"tail": -1}, "the tail must be 0 to 4 of the trained rows, got -1"),
        ({"tail": 1, "tail_penalty": -1.0}, "tail_penalty must be finite and not negative, got -1"),
        ({"tail": 1, "tail_penalty": math.nan}, "tail_penalty must be finite and not negative, got nan"),
        ({"tail_penalty": 0.1}, "tail_penalty 0.1 needs a tail of a trained A or B"),
        ({"core": True, "train": ("R",), "send": ("R",), "tail": 1, "tail_penalty": 0.1}, "needs a tail of a trained"),
    ],
)
def test_contradictions_are_refused_by_name(changes: Mapping[str, object], match: str, plan: TrainPlan) -> None:
    layout = Layout(modules={"q": Module(out=7, inp=5)})
    check_plan(plan, layout, "client c0, round 1")
    with pytest.raises(TrainingError, match=f"client c0, round 1: .*{match}"):
        check_plan(replace(plan, **changes), layout, "client c0, round 1")  # type: ignore[arg-type]
