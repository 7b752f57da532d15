"""Error feedback: nothing is lost but the last error, by entry and in products, up and down."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import get_args

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from fedlora.adapter import Adapter, Array, Factors, difference, norm, stack, truncated
from fedlora.codec import lossless, rounded
from fedlora.errors import AdapterError, MethodError, WireError
from fedlora.feedback import compress, publish
from fedlora.state import (
    Block,
    Codec,
    GlobalState,
    Layout,
    LocalTraining,
    Module,
    Task,
    TrainPlan,
    expected_shapes,
    zero_adapter,
)

fast = settings(deadline=None, max_examples=25)
Dense = dict[str, NDArray[np.float64]]
CODECS: tuple[Codec, ...] = get_args(Codec)
LOSSY: tuple[Codec, ...] = ("float16", "bfloat16", "int8", "int4")
LAYOUT = Layout(modules={"q": Module(out=12, inp=20), "v": Module(out=9, inp=7)}, head={"w": (3, 20), "b": (3,)})
WIDE = Layout(modules={"q": Module(out=60, inp=80)})
PLAN = TrainPlan(
    method="test",
    rank=3,
    rows=3,
    scale=2.0,
    train=("A", "B", "head"),
    send=("A", "B", "head"),
    changes=("A", "B", "head"),
    codec="int4",
    training=LocalTraining(learning_rate=1e-2, local_steps=1, local_epochs=None, batch_size=1),
)
PRODUCT = replace(PLAN, changes=("head",), feedback="product")
seeds = st.integers(0, 2**32 - 1)


def answer(plan: TrainPlan, rng: np.random.Generator, layout: Layout = LAYOUT) -> dict[str, Array]:
    return {k: rng.standard_normal(s).astype(np.float32) for k, s in expected_shapes(plan, layout).items()}


def products(arrays: Mapping[str, Array], scale: float = 1.0) -> Dense:
    """`scale * B A` of each module, dense."""
    return {
        k[2:]: scale * (arrays[f"B:{k[2:]}"].astype(np.float64) @ x.astype(np.float64))
        for k, x in arrays.items()
        if k.startswith("A:")
    }


def size(dense: Dense) -> float:
    return float(np.sqrt(sum(np.sum(x**2) for x in dense.values())))


def minus(x: Dense, y: Dense) -> Dense:
    return {n: x[n] - y[n] for n in x}


class Run:
    """One client's messages, with their sums and those of the truth, dense."""

    def __init__(self, plan: TrainPlan, layout: Layout = LAYOUT, *, memory: bool = True) -> None:
        self.plan, self.layout, self.memory = plan, layout, memory
        self.error: dict[str, Array] = {}
        self.sent: Dense = {}
        self.true: Dense = {}

    def send(self, arrays: Mapping[str, Array]) -> dict[str, Array]:
        sent, error = compress(arrays, self.plan, self.error if self.memory else {}, self.layout)
        self.error = error
        for total, x in ((self.sent, sent), (self.true, arrays)):
            dense: Dense = {k: y.astype(np.float64) for k, y in x.items() if k[:2] not in ("A:", "B:")}
            if self.plan.feedback == "product":
                dense |= products(x, self.plan.scale)
            else:
                dense |= {k: y.astype(np.float64) for k, y in x.items()}
            for key, y in dense.items():
                total[key] = total.get(key, np.zeros_like(y)) + y
        return sent

    def missing(self) -> float:
        return size(minus(self.true, self.sent))


class TestCoordinates:
    @pytest.mark.parametrize("codec", CODECS)
    @fast
    @given(seed=seeds, rounds=st.integers(1, 6), scale=st.sampled_from([1e-4, 1.0, 30.0]))
    def test_what_was_sent_and_the_last_error_are_what_was_true(
        self, codec: Codec, seed: int, rounds: int, scale: float
    ) -> None:
        rng, run = np.random.default_rng(seed), Run(replace(PLAN, codec=codec))
        for _ in range(rounds):
            run.send({k: x * np.float32(scale) for k, x in answer(PLAN, rng).items()})
        for key, total in run.true.items():
            left = run.error.get(key, np.zeros(1))
            np.testing.assert_allclose(run.sent[key] + left, total, rtol=0, atol=1e-6 * scale)
        assert run.error.keys() == (set() if codec == "float32" else run.true.keys() - {"head:b"})

    @pytest.mark.parametrize("codec", LOSSY)
    def test_what_is_sent_is_exact_in_the_codec_and_of_the_same_shapes(self, codec: Codec) -> None:
        rng, run = np.random.default_rng(0), Run(replace(PLAN, codec=codec))
        for _ in range(3):
            arrays = answer(PLAN, rng)
            sent = run.send(arrays)
            assert {k: x.shape for k, x in sent.items()} == expected_shapes(PLAN, LAYOUT)
            assert all(lossless(x, codec) and x.dtype == np.float32 for x in sent.values() if x.ndim == 2)
            assert sent["head:b"] is arrays["head:b"]
            assert any(not lossless(x, codec) for x in arrays.values() if x.ndim == 2)

    def test_float32_sends_the_arrays_themselves(self) -> None:
        arrays = answer(PLAN, np.random.default_rng(0))
        sent, error = compress(arrays, replace(PLAN, codec="float32"), {}, LAYOUT)
        assert error == {}
        assert all(sent[k] is x for k, x in arrays.items())

    def test_a_pruned_client_drops_the_errors_of_rows_that_are_gone(self) -> None:
        rng = np.random.default_rng(1)
        before = answer(PLAN, rng)
        _, error = compress(before, PLAN, {}, LAYOUT)
        small = replace(PLAN, rank=2)
        now = answer(small, rng)
        sent, left = compress(now, small, error, LAYOUT)
        for name in LAYOUT.modules:
            target = now[f"A:{name}"] + error[f"A:{name}"][:2]
            np.testing.assert_array_equal(sent[f"A:{name}"], rounded(target, "int4"))
            np.testing.assert_array_equal(
                sent[f"B:{name}"], rounded(now[f"B:{name}"] + error[f"B:{name}"][:, :2], "int4")
            )
            assert left[f"A:{name}"].shape == (2, LAYOUT.modules[name].inp)
        again, _ = compress(before, PLAN, left, LAYOUT)
        np.testing.assert_array_equal(again["A:q"][2:], rounded(before["A:q"], "int4")[2:])

    def test_a_core_is_pruned_on_both_axes(self) -> None:
        plan = replace(PLAN, send=("R",), changes=("R",), core=True)
        _, error = compress({"R:q": np.random.default_rng(2).normal(size=(3, 3)).astype(np.float32)}, plan, {}, LAYOUT)
        core = np.ones((2, 2), np.float32)
        sent, _ = compress({"R:q": core}, plan, error, LAYOUT)
        np.testing.assert_array_equal(sent["R:q"], rounded(core + error["R:q"][:2, :2], "int4"))

    def test_a_part_that_is_not_sent_keeps_its_error(self) -> None:
        arrays = answer(PLAN, np.random.default_rng(3))
        _, error = compress(arrays, PLAN, {}, LAYOUT)
        b = replace(PLAN, send=("B", "head"), changes=("B", "head"))
        sent, left = compress({k: x for k, x in arrays.items() if k[0] != "A"}, b, error, LAYOUT)
        assert left.keys() == error.keys()
        assert not any(k.startswith("A:") for k in sent)
        for key, e in error.items():
            assert np.array_equal(left[key], e) == key.startswith("A:")

    def test_int4_reaches_the_minimum_with_feedback_and_stalls_without(self) -> None:
        """Two clients pull hard and against each other in one entry; without memory that rounds away all the others."""
        centre = np.random.default_rng(4).normal(size=(2, 20)).astype(np.float32)
        pull = np.zeros_like(centre)
        pull[:, 0] = 40.0
        plan = replace(PLAN, send=("A",), changes=("A",))

        def distance(memory: bool) -> float:
            x: Array = np.zeros_like(centre)
            errors: list[dict[str, Array]] = [{}, {}]
            for _ in range(150):
                steps = []
                for i, sign in enumerate((1.0, -1.0)):
                    step = np.float32(0.1) * (centre + np.float32(sign) * pull - x)
                    sent, left = compress({"A:q": step}, plan, errors[i], LAYOUT)
                    errors[i] = left if memory else {}
                    steps.append(sent["A:q"])
                x = x + (steps[0] + steps[1]) / 2
            return float(np.linalg.norm(x[:, 1:] - centre[:, 1:]) / np.linalg.norm(centre[:, 1:]))

        assert distance(memory=False) > 0.9
        assert distance(memory=True) < 0.2

    def test_int4_with_feedback_converges_where_the_changes_vanish(self) -> None:
        centre = np.random.default_rng(5).normal(size=(3, 200)).astype(np.float32)
        x: Array = np.zeros_like(centre)
        error: dict[str, Array] = {}
        plan = replace(PLAN, send=("A",), changes=("A",))
        for _ in range(150):
            sent, error = compress({"A:q": np.float32(0.2) * (centre - x)}, plan, error, LAYOUT)
            x = x + sent["A:q"]
        assert np.linalg.norm(x - centre) < 1e-5 * np.linalg.norm(centre)

    def test_restarted_factors_remember_only_the_head(self) -> None:
        rng = np.random.default_rng(6)
        arrays = answer(PLAN, rng)
        plan = replace(PLAN, feedback="none")  # type: ignore[arg-type]
        sent, error = compress(arrays, plan, {}, LAYOUT)
        assert error.keys() == {"head:w"}
        again, _ = compress(arrays, plan, error | {"A:q": np.ones((3, 20), np.float32)}, LAYOUT)
        for key in ("A:q", "B:q", "A:v", "B:v"):
            np.testing.assert_array_equal(sent[key], rounded(arrays[key], "int4"))
            np.testing.assert_array_equal(again[key], sent[key])
        assert not np.array_equal(again["head:w"], sent["head:w"])


class TestProducts:
    @pytest.mark.parametrize("codec", CODECS)
    @pytest.mark.parametrize("scale", [2.0, 1 / 3, -1.5])
    def test_nothing_is_lost_while_the_error_holds_every_direction(self, codec: Codec, scale: float) -> None:
        """min(out, in) = 7 and 12, twice the rank is 12: in `v` and `q` the bound on E is none."""
        plan = replace(PRODUCT, rank=6, codec=codec, scale=scale)
        rng, run = np.random.default_rng(7), Run(plan)
        for _ in range(6):
            run.send(answer(plan, rng))
        if codec == "float32":
            assert run.missing() == 0.0
            return
        left = products(run.error)
        for name, total in run.true.items():
            e = left[name] if name in left else run.error.get(name, np.zeros(1))
            np.testing.assert_allclose(run.sent[name] + e, total, atol=1e-4)

    @pytest.mark.parametrize("codec", LOSSY)
    def test_what_is_sent_is_exact_in_the_codec_and_of_the_same_shapes(self, codec: Codec) -> None:
        plan = replace(PRODUCT, codec=codec, scale=1 / 3)
        rng, run = np.random.default_rng(8), Run(plan)
        for _ in range(3):
            sent = run.send(answer(plan, rng))
            assert {k: x.shape for k, x in sent.items()} == expected_shapes(plan, LAYOUT)
            assert all(lossless(x, codec) and x.dtype == np.float32 for x in sent.values() if x.ndim == 2)
        for name, module in LAYOUT.modules.items():
            rank = min(6, module.out, module.inp)
            assert run.error[f"A:{name}"].shape == (rank, module.inp)
            assert run.error[f"B:{name}"].shape == (module.out, rank)
            assert run.error[f"A:{name}"].dtype == np.float32

    def test_the_first_message_is_the_rounded_product(self) -> None:
        arrays = answer(PRODUCT, np.random.default_rng(9))
        sent, _ = compress(arrays, replace(PRODUCT, codec="bfloat16"), {}, LAYOUT)
        true = products(arrays, 2.0)
        assert size(minus(products(sent, 2.0), true)) < 0.01 * size(true)

    def test_the_coordinates_of_the_factors_do_not_matter(self) -> None:
        """The same product in other factors is the same message, up to the sign of a direction."""
        rng = np.random.default_rng(10)
        arrays = answer(replace(PRODUCT, send=("A", "B")), rng)
        mix = rng.normal(size=(3, 3)) + 3 * np.eye(3)
        other = {k: (np.linalg.solve(mix, x) if k[0] == "A" else x @ mix).astype(np.float32) for k, x in arrays.items()}
        sent, again = (compress(x, PRODUCT, {}, LAYOUT)[0] for x in (arrays, other))
        one, two = products(sent), products(again)
        assert size(minus(one, two)) < 0.02 * size(one)  # a value at a tie may round the other way

    @staticmethod
    def repeated(rank: int = 4) -> Callable[[], dict[str, Array]]:
        """The same product each time, in fresh factors."""
        rng = np.random.default_rng(11)
        a, b = rng.normal(size=(rank, 80)), rng.normal(size=(60, rank))

        def draw() -> dict[str, Array]:
            mix = rng.normal(size=(rank, rank)) + 3 * np.eye(rank)
            return {"A:q": np.linalg.solve(mix, a).astype(np.float32), "B:q": (b @ mix).astype(np.float32)}

        return draw

    @pytest.mark.parametrize("codec", ["int8", "int4"])
    def test_sums_follow_with_a_bounded_error_where_without_memory_they_drift(self, codec: Codec) -> None:
        plan = replace(PRODUCT, codec=codec, rank=4, send=("A", "B"), changes=(), scale=0.5)
        missing = {}
        for memory in (True, False):
            draw, run = self.repeated(), Run(plan, WIDE, memory=memory)
            missing[memory] = [(run.send(draw()), run.missing())[1] for _ in range(40)]
        assert missing[False][39] == pytest.approx(40 * missing[False][0], rel=0.2)
        assert max(missing[True][20:]) < 2.5 * missing[True][0]

    def test_leading_directions_bring_the_others_in_turn(self) -> None:
        plan = replace(PRODUCT, codec="int8", rank=4, send=("A", "B"), changes=(), top=1)
        missing = {}
        for memory in (True, False):
            draw, run = self.repeated(), Run(plan, WIDE, memory=memory)
            for _ in range(40):
                sent = run.send(draw())
                assert {k: x.shape for k, x in sent.items()} == {"A:q": (1, 80), "B:q": (60, 1)}
                assert {k: x.shape for k, x in sent.items()} == expected_shapes(plan, WIDE)
            missing[memory] = run.missing() / size(products(draw(), plan.scale))
        assert missing[False] > 25
        assert missing[True] < 6

    def test_leading_directions_in_float32(self) -> None:
        plan = replace(PRODUCT, codec="float32", rank=4, send=("A", "B"), changes=(), top=2)
        draw = self.repeated()
        arrays = draw()
        sent, error = compress(arrays, plan, {}, WIDE)
        full = products(arrays, plan.scale)["q"]
        u, s, vt = np.linalg.svd(full)
        np.testing.assert_allclose(products(sent, plan.scale)["q"], (u[:, :2] * s[:2]) @ vt[:2], atol=1e-4)
        np.testing.assert_allclose(products(error)["q"], (u[:, 2:4] * s[2:4]) @ vt[2:4], atol=1e-4)

    def test_a_top_above_the_rank_is_the_rank(self) -> None:
        arrays = answer(PRODUCT, np.random.default_rng(12))
        one, two = (compress(arrays, replace(PRODUCT, top=top), {}, LAYOUT)[0] for top in (None, 9))
        assert all(np.array_equal(one[k], two[k]) for k in one)

    @pytest.mark.parametrize("codec", ["int8", "int4"])
    def test_whole_products_that_begin_at_the_last_ones(self, codec: Codec) -> None:
        """FlexLoRA's loop with one client: the state is what was sent, and small steps are added to a large product."""
        plan = replace(PRODUCT, codec=codec, rank=4, send=("A", "B"), changes=(), scale=1.0)
        gaps: dict[bool, list[float]] = {}
        for memory in (True, False):
            rng = np.random.default_rng(13)
            large = Factors(rng.normal(size=(4, 80)).astype(np.float32), rng.normal(size=(60, 4)).astype(np.float32))
            step = Factors(large.a, (0.01 * rng.normal(size=(60, 4))).astype(np.float32))
            state, true, run, gaps[memory] = Adapter({"q": large}), large.dense(), Run(plan, WIDE, memory=memory), []
            for _ in range(40):
                true += step.dense()
                pair = truncated(stack([state, Adapter({"q": step})]), 4)[0]["q"]
                sent = run.send({"A:q": pair.a, "B:q": pair.b})
                state = Adapter({"q": Factors(sent["A:q"], sent["B:q"])})
                gaps[memory].append(float(np.linalg.norm(state["q"].dense() - true)))
        assert max(gaps[True]) < 1.3 * gaps[True][0]
        assert gaps[False][-1] > 5 * gaps[False][0]

    def test_directions_that_never_come_back_add_up_but_less_than_without_memory(self) -> None:
        plan = replace(PRODUCT, rank=4, send=("A", "B"), changes=())
        missing = {}
        for memory in (True, False):
            rng, run = np.random.default_rng(17), Run(plan, WIDE, memory=memory)
            missing[memory] = [(run.send(answer(plan, rng, WIDE)), run.missing())[1] for _ in range(40)]
        assert missing[True][0] < missing[True][39] < 0.9 * missing[False][39]
        assert missing[False][39] < 10 * missing[False][0]  # a random walk: about the root of 40

    def test_the_mean_over_clients_of_mixed_ranks_and_scales_follows_the_true_one(self) -> None:
        layout = Layout(modules={"v": Module(out=9, inp=7)})
        rng = np.random.default_rng(18)
        shares, runs = (0.5, 0.3, 0.2), []
        for rank, scale in ((4, 2.0), (5, 0.5), (7, 16 / 7)):
            plan = replace(PRODUCT, rank=rank, rows=rank, scale=scale, send=("A", "B"), changes=())
            runs.append(Run(plan, layout))
            for _ in range(10):
                runs[-1].send(answer(plan, rng, layout))
        gap = sum(p * (r.true["v"] - r.sent["v"]) for p, r in zip(shares, runs, strict=True))
        owed = sum(p * products(r.error)["v"] for p, r in zip(shares, runs, strict=True))
        np.testing.assert_allclose(gap, owed, atol=1e-4)
        assert np.linalg.norm(gap) < 0.2 * np.linalg.norm(
            sum(p * r.true["v"] for p, r in zip(shares, runs, strict=True))
        )

    def test_a_pruned_client_keeps_the_whole_product_error(self) -> None:
        rng = np.random.default_rng(15)
        _, error = compress(answer(PRODUCT, rng), PRODUCT, {}, LAYOUT)
        small = replace(PRODUCT, rank=1)
        arrays = answer(small, rng)
        sent, left = compress(arrays, small, error, LAYOUT)
        for name, true in products(arrays, 2.0).items():
            owed = true + products(error)[name] - products(sent, 2.0)[name]
            gone = owed - products(left)[name]
            assert left[f"A:{name}"].shape[0] == 6
            best = np.linalg.svd(owed, compute_uv=False)[6:]  # Eckart and Young
            assert np.linalg.norm(gone) == pytest.approx(np.linalg.norm(best), abs=1e-4)

    def test_an_untrained_pair_sends_zero(self) -> None:
        arrays = answer(PRODUCT, np.random.default_rng(16)) | {
            "B:q": np.zeros((12, 3), np.float32),
            "B:v": np.zeros((9, 3), np.float32),
        }
        sent, error = compress(arrays, PRODUCT, {}, LAYOUT)
        assert size(products(sent)) == 0.0
        assert size(products(error)) == 0.0


class TestRefused:
    def test_top_where_factors_are_combined_by_entry(self) -> None:
        with pytest.raises(
            MethodError, match=r"test: leading directions of a product \(wire\.top = 2\) cannot be chosen"
        ):
            compress(answer(PLAN, np.random.default_rng(0)), replace(PLAN, top=2), {}, LAYOUT)

    @pytest.mark.parametrize(
        "plan",
        [replace(PRODUCT, send=("B", "head")), replace(PRODUCT, changes=("A", "B", "head"))],
        ids=["half", "changes"],
    )
    def test_half_a_product(self, plan: TrainPlan) -> None:
        with pytest.raises(MethodError, match=r"test: the error of a product needs A and B of every module, whole"):
            compress(answer(plan, np.random.default_rng(0)), plan, {}, LAYOUT)

    @pytest.mark.parametrize("plan", [PLAN, PRODUCT], ids=["coordinates", "product"])
    def test_an_error_of_another_model(self, plan: TrainPlan) -> None:
        other = replace(LAYOUT, modules={"q": Module(out=12, inp=21), "v": Module(out=9, inp=7)})
        rng = np.random.default_rng(0)
        _, error = compress(answer(plan, rng, other), plan, {}, other)
        with pytest.raises(AdapterError, match=r"A:q: the error kept is \(3, 21\), the array is|q: shapes differ"):
            compress(answer(plan, rng), plan, error, LAYOUT)

    @pytest.mark.parametrize("plan", [PLAN, PRODUCT], ids=["coordinates", "product"])
    def test_what_is_not_finite(self, plan: TrainPlan) -> None:
        arrays = answer(plan, np.random.default_rng(0))
        arrays["B:v"][1, 2] = np.nan
        with pytest.raises(AdapterError, match="B:v has 1 non-finite values"):
            compress(arrays, plan, {}, LAYOUT)

    def test_overflow_names_the_array(self) -> None:
        arrays = answer(PLAN, np.random.default_rng(0))
        arrays["A:v"][0, 0] = 1e6
        with pytest.raises(WireError, match="A:v: 1e\\+06 overflows float16"):
            compress(arrays, replace(PLAN, codec="float16"), {}, LAYOUT)


def opened(
    *, pair: Adapter | None = None, blocks: Sequence[Adapter] = (), public_seed: int | None = None
) -> GlobalState:
    rng = np.random.default_rng(99)
    task = Task(
        name="",
        pair=pair,
        blocks=tuple(Block(adapter=b, born=0) for b in blocks),
        extras={"w": rng.normal(size=(3, 20)).astype(np.float32), "b": rng.normal(size=3).astype(np.float32)},
        public_seed=public_seed,
    )
    return GlobalState(version=0, base="x", layout=LAYOUT, tasks={"": task})


def drawn(rank: int | Mapping[str, int], rng: np.random.Generator, scale: float = 1.0, size: float = 1.0) -> Adapter:
    ranks = {n: rank if isinstance(rank, int) else rank[n] for n in LAYOUT.modules}
    return Adapter(
        {
            n: Factors(
                rng.normal(size=(ranks[n], m.inp)).astype(np.float32),
                (size * rng.normal(size=(m.out, ranks[n]))).astype(np.float32),
                scale,
            )
            for n, m in LAYOUT.modules.items()
        }
    )


def dense(adapter: Adapter) -> Dense:
    return {n: f.dense() for n, f in adapter.items()}


def close(x: Dense, y: Dense, tolerance: float) -> None:
    for name in x:
        np.testing.assert_allclose(x[name], y[name], rtol=0, atol=tolerance)


def with_block(state: GlobalState, update: Adapter, *, whole: bool = False) -> GlobalState:
    task, version = state.open_task, state.version + 1
    if whole:
        rank = {n: min(f.shape) for n, f in update.items()}
        one = truncated(stack([*(b.adapter for b in task.blocks), update]), rank)[0]
        return state.with_task(replace(task, blocks=(Block(adapter=one, born=version),)))
    return state.with_task(
        replace(task, blocks=(*task.blocks, Block(adapter=update, born=version, since=state.version)))
    )


def all_lossless(adapter: Adapter, codec: Codec) -> bool:
    return all(lossless(x, codec) for f in adapter.values() for x in (f.a, f.b))


class TestPublishedBlocks:
    @pytest.mark.parametrize("codec", LOSSY)
    @pytest.mark.parametrize("whole", [False, True], ids=["stack", "one"])
    def test_published_and_error_are_the_sum_of_the_updates(self, codec: Codec, whole: bool) -> None:
        """Rank 6 and twice that are all directions of the smaller modules: the bound on E loses nothing."""
        rng, state = np.random.default_rng(20), opened()
        error: dict[str, Array] = {}
        true = {n: np.zeros((m.out, m.inp)) for n, m in LAYOUT.modules.items()}
        for _ in range(5):
            update = drawn(6, rng)
            after = with_block(state, update, whole=whole)
            new, error = publish(state, after, codec, error)
            assert (new.version, new.open_task.blocks[-1].born) == (after.version, after.version)
            assert new.open_task.blocks[-1].since == after.open_task.blocks[-1].since
            assert new.open_task.blocks[-1].adapter.ranks == after.open_task.blocks[-1].adapter.ranks
            assert all(x is y for x, y in zip(new.open_task.blocks[:-1], state.open_task.blocks, strict=False))
            state = new
            true = {n: true[n] + x for n, x in dense(update).items()}
            left = products({k.removeprefix("block/"): e for k, e in error.items() if k.startswith("block/")})
            close({n: x + left[n] for n, x in dense(state.update()).items()}, true, 1e-3)
        assert all(all_lossless(b.adapter, codec) for b in state.open_task.blocks)

    def test_without_feedback_equal_updates_drift(self) -> None:
        rng = np.random.default_rng(21)
        update = drawn(2, rng)
        gaps = {}
        error: dict[str, Array]
        for memory in (True, False):
            state, error = opened(), {}
            for _ in range(20):
                mix = rng.normal(size=(2, 2)) + 3 * np.eye(2)
                again = {
                    n: Factors(np.linalg.solve(mix, f.a).astype(np.float32), (f.b @ mix).astype(np.float32))
                    for n, f in update.items()
                }
                state, left = publish(state, with_block(state, Adapter(again)), "int4", error)
                error = left if memory else {}
            gaps[memory] = norm(difference(state.update(), update.scaled(20.0))) / norm(update)
        assert gaps[True] < 0.4
        assert gaps[False] > 1.0

    def test_a_module_of_rank_zero_keeps_its_error(self) -> None:
        rng = np.random.default_rng(22)
        state, error = publish(opened(), with_block(opened(), drawn(2, rng)), "int4", {})
        after = with_block(state, drawn({"q": 0, "v": 2}, rng))
        state, left = publish(state, after, "int4", error)
        assert state.open_task.blocks[-1].adapter.ranks == {"q": 0, "v": 2}
        names = ("block/A:q", "block/B:q")
        close({"q": left[names[1]] @ left[names[0]]}, {"q": error[names[1]] @ error[names[0]]}, 1e-6)
        assert size(products({"A:q": left[names[0]], "B:q": left[names[1]]})) > 0.0
        state, last = publish(state, with_block(state, zero_adapter(LAYOUT, 0)), "int4", left)
        assert state.open_task.blocks[-1].adapter.ranks == {"q": 0, "v": 0}
        assert all(last[k].shape == x.shape for k, x in left.items())

    def test_blocks_that_were_there_are_left_alone(self) -> None:
        rng = np.random.default_rng(23)
        state = opened(blocks=[drawn(2, rng)])
        moved = state.with_task(replace(state.open_task, statistics={"rounds": 1.0}))
        new, error = publish(state, moved, "int4", {"block/A:q": np.ones((2, 20), np.float32)})
        assert new.open_task.blocks[0] is state.open_task.blocks[0]
        assert error.keys() == {"block/A:q"}

    def test_float32_publishes_the_state_itself(self) -> None:
        after = with_block(opened(), drawn(2, np.random.default_rng(24)))
        new, error = publish(opened(), after, "float32", {})
        assert new is after
        assert error == {}


def with_pair(state: GlobalState, pair: Adapter) -> GlobalState:
    return state.with_task(replace(state.open_task, pair=pair))


def shifted(pair: Adapter, rng: np.random.Generator, parts: str) -> Adapter:
    def step(x: Array, name: str) -> Array:
        return (x + 0.1 * rng.normal(size=x.shape)).astype(np.float32) if name in parts else x

    return Adapter({n: Factors(step(f.a, "A"), step(f.b, "B"), f.scale) for n, f in pair.items()})


class TestPublishedPair:
    @pytest.mark.parametrize("codec", LOSSY)
    def test_factors_follow_their_changes_entry_by_entry(self, codec: Codec) -> None:
        rng = np.random.default_rng(30)
        state, error = publish(None, opened(pair=drawn(3, rng, 2.0)), codec, {})
        assert state.open_task.pair is not None
        assert all_lossless(state.open_task.pair, codec)
        true = {k: opened_value(state, error, k) for k in ("A:q", "B:q", "A:v", "B:v")}
        for parts in ("AB", "B", "A", "AB"):
            pair = state.open_task.pair
            after = with_pair(state, shifted(pair, rng, parts))
            assert after.open_task.pair is not None
            moves = {k: x - value(pair, k) for k in true for x in [value(after.open_task.pair, k)]}
            state, error = publish(state, after, codec, error)
            assert state.open_task.pair is not None
            assert state.open_task.pair["q"].scale == 2.0
            for key, move in moves.items():
                true[key] = true[key] + move
                np.testing.assert_allclose(opened_value(state, error, key), true[key], atol=1e-5)
                frozen = key[0] not in parts
                assert (value(state.open_task.pair, key) is value(pair, key)) == frozen
            assert all_lossless(state.open_task.pair, codec)

    def test_a_public_a_stays(self) -> None:
        rng = np.random.default_rng(31)
        before = opened(pair=drawn(3, rng), public_seed=5)
        assert before.open_task.pair is not None
        after = with_pair(before, shifted(before.open_task.pair, rng, "B"))
        for old in (before, None):
            state, error = publish(old, after, "int8", {})
            assert state.open_task.pair is not None
            assert after.open_task.pair is not None
            for name, f in after.open_task.pair.items():
                assert state.open_task.pair[name].a is f.a
                np.testing.assert_array_equal(state.open_task.pair[name].b, rounded(f.b, "int8"))
            assert not any("A:" in k for k in error)

    def test_a_pair_that_did_not_move_stays(self) -> None:
        state = opened(pair=drawn(3, np.random.default_rng(33)))
        assert state.open_task.pair is not None
        new, error = publish(state, state.with_task(state.open_task), "int4", {})
        assert new.open_task.pair is not None
        assert new.open_task.pair.digest == state.open_task.pair.digest
        assert error == {}


def value(pair: Adapter, key: str) -> Array:
    return pair[key[2:]].a if key[0] == "A" else pair[key[2:]].b


def opened_value(state: GlobalState, error: Mapping[str, Array], key: str) -> NDArray[np.float64]:
    """What is published and what is still owed."""
    assert state.open_task.pair is not None
    return value(state.open_task.pair, key).astype(np.float64) + error[f"pair/{key}"]


class TestPublishedRest:
    def test_heads_follow_and_biases_are_exact(self) -> None:
        rng = np.random.default_rng(40)
        state, error = publish(None, opened(), "int4", {})
        true = state.open_task.extras["w"] + error["head:w"]
        for _ in range(8):
            step = rng.normal(size=(3, 20)).astype(np.float32) / 10
            extras: dict[str, Array] = {
                "w": state.open_task.extras["w"] + step,
                "b": rng.normal(size=3).astype(np.float32),
            }
            after = state.with_task(replace(state.open_task, extras=extras))
            state, error = publish(state, after, "int4", error)
            true = true + step
            np.testing.assert_allclose(state.open_task.extras["w"] + error["head:w"], true, atol=1e-5)
            assert state.open_task.extras["b"] is extras["b"]
            assert lossless(state.open_task.extras["w"], "int4")
        assert error.keys() == {"head:w"}

    def test_starts_are_rounded_without_memory(self) -> None:
        rng = np.random.default_rng(42)
        pair = {"A:q": rng.normal(size=(3, 20)).astype(np.float32), "phase": np.ones(1, np.float32)}
        state = replace(opened(), memory={"flora": pair, "other": {"A:q": pair["A:q"]}})
        new, error = publish(state, replace(state, version=1), "int8", {}, starts=("flora", "frlora"))
        np.testing.assert_array_equal(new.memory["flora"]["A:q"], rounded(pair["A:q"], "int8"))
        assert new.memory["flora"]["phase"] is pair["phase"]
        assert new.memory["other"]["A:q"] is pair["A:q"]
        assert new.memory.keys() == {"flora", "other"}
        assert error == {}

    def test_a_new_task_starts_without_errors_and_leaves_the_old_one(self) -> None:
        rng = np.random.default_rng(43)
        state, error = publish(opened(), with_block(opened(), drawn(2, rng)), "int4", {})
        old = replace(state.open_task, sealed=True)
        fresh = Task(name="next", extras={"w": np.ones((3, 20), np.float32)})
        after = with_block(replace(state, tasks={"": old, "next": fresh}), drawn(2, rng))
        update = after.open_task.blocks[-1].adapter
        new, left = publish(state, after, "int4", error)
        assert new.tasks[""] is old
        [block] = new.open_task.blocks
        owed = products({k.removeprefix("block/"): e for k, e in left.items() if k.startswith("block/")})
        close({n: x + owed[n] for n, x in dense(block.adapter).items()}, dense(update), 1e-4)

    def test_the_arguments_are_not_changed(self) -> None:
        rng = np.random.default_rng(44)
        state, error = publish(None, with_block(opened(pair=drawn(3, rng)), drawn(2, rng)), "int4", {})
        copies = {k: e.copy() for k, e in error.items()}
        assert state.open_task.pair is not None
        after = with_block(with_pair(state, shifted(state.open_task.pair, rng, "AB")), drawn(2, rng))
        digests = [b.adapter.digest for b in after.open_task.blocks]
        publish(state, after, "int4", error)
        assert error.keys() == copies.keys()
        assert all(np.array_equal(error[k], x) for k, x in copies.items())
        assert [Adapter(dict(b.adapter)).digest for b in after.open_task.blocks] == digests
