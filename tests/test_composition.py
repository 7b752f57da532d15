"""The oracles are dense, in float64 and plain loops; randomness is checked by its expectation too."""

from __future__ import annotations

import math
import subprocess
import sys

import numpy as np
import pytest
from numpy.typing import NDArray

from fedlora import composition
from fedlora.adapter import Adapter, Factors
from fedlora.composition import HOW, Recipe, compacted, compose, composed_head, factorised, search
from fedlora.errors import AdapterError, ConfigError
from fedlora.rng import stream

Float = NDArray[np.float64]
SHAPES = {"q": (9, 7), "up": (12, 6), "v": (5, 8)}
RANKS = ({"q": 3, "up": 2, "v": 4}, {"q": 5, "up": 1, "v": 2}, {"q": 1, "up": 4, "v": 0})
SCALES = (2.0, 0.25, 1.0 / math.sqrt(3))
WEIGHTS = (0.7, 0.3, -0.45)


def random_adapter(seed: int, ranks: dict[str, int], scale: float) -> Adapter:
    g = np.random.default_rng(seed)
    return Adapter(
        {
            n: Factors(
                g.normal(size=(r, SHAPES[n][1])).astype(np.float32),
                g.normal(size=(SHAPES[n][0], r)).astype(np.float32),
                scale,
            )
            for n, r in ranks.items()
        }
    )


@pytest.fixture
def three() -> list[Adapter]:
    return [random_adapter(i, ranks, scale) for i, (ranks, scale) in enumerate(zip(RANKS, SCALES, strict=True))]


def dense(adapter: Adapter) -> dict[str, Float]:
    return {n: f.scale * f.b.astype(np.float64) @ f.a.astype(np.float64) for n, f in adapter.items()}


def apart(left: Adapter, right: dict[str, Float]) -> float:
    """The largest difference of one module's product, relative to the largest module's norm."""
    size = max(float(np.linalg.norm(x)) for x in right.values())
    return max(float(np.linalg.norm(x - right[n])) for n, x in dense(left).items()) / size


def summed(adapters: list[Adapter], weights: tuple[float, ...]) -> dict[str, Float]:
    return {n: np.sum([w * dense(a)[n] for a, w in zip(adapters, weights, strict=True)], axis=0) for n in adapters[0]}


def rotated(adapter: Adapter, seed: int) -> Adapter:
    """The same products from other factors: (B M)(M^-1 A)."""
    g = np.random.default_rng(seed)
    out = {}
    for n, f in adapter.items():
        m = g.normal(size=(f.rank, f.rank)) + 3 * np.eye(f.rank)
        out[n] = Factors(np.linalg.inv(m) @ f.a, f.b.astype(np.float64) @ m * 0.5, 2 * f.scale)
    return Adapter(out)


# --- cat and task arithmetic


def test_cat_is_the_sum(three: list[Adapter]) -> None:
    result = compose(three, WEIGHTS, Recipe())
    want = summed(three, WEIGHTS)
    assert apart(result.adapter, want) < 1e-6
    assert result.error < 1e-6
    assert result.norm == pytest.approx(math.sqrt(sum(np.sum(x**2) for x in want.values())), rel=1e-6)
    assert result.adapter.ranks == {"q": 7, "up": 6, "v": 5}  # 9, 7 and 6 ranks in 9 x 7, 12 x 6 and 5 x 8
    assert {f.a.dtype for f in result.adapter.values()} == {f.b.dtype for f in result.adapter.values()}
    assert result.adapter["q"].a.dtype == np.float32
    assert {f.scale for f in result.adapter.values()} == {1.0}


def test_an_adapter_averaged_with_itself_is_itself(three: list[Adapter]) -> None:
    for how, options in (("cat", {}), ("task-arithmetic", {}), ("ties", {"density": 1.0})):
        result = compose([three[0], three[0]], (0.5, 0.5), Recipe(how=how, **options))  # type: ignore[arg-type]
        assert apart(result.adapter, dense(three[0])) < 1e-6, how
        assert result.adapter.ranks == three[0].ranks, how
    doubled = compose([three[0], three[0]], (1.0, 1.0), Recipe())
    assert apart(doubled.adapter, {n: 2 * x for n, x in dense(three[0]).items()}) < 1e-6


def test_terms_that_cancel_leave_rank_0(three: list[Adapter]) -> None:
    result = compose([three[0], rotated(three[0], 1), three[0]], (1.0, 1.0, -2.0), Recipe())
    assert set(result.adapter.ranks.values()) == {0}
    assert result.relative_error == 0.0
    part = compose([three[0], three[1], three[0]], (1.0, 1.0, -1.0), Recipe())
    assert part.adapter.ranks == three[1].ranks
    assert apart(part.adapter, dense(three[1])) < 1e-6


def test_compacted_drops_only_what_float32_cannot_tell() -> None:
    g = np.random.default_rng(3)
    u, v = np.linalg.qr(g.normal(size=(20, 4)))[0], np.linalg.qr(g.normal(size=(30, 4)))[0]
    f = Factors(v.T, u * np.array([1.0, 1e-3, 3e-7, 3e-8]))
    small = compacted([Adapter({"m": f})])["m"]
    assert small.rank == 3
    assert np.allclose(np.sum(small.b**2, axis=0), [1.0, 1e-3, 3e-7])
    assert np.linalg.norm(small.b @ small.a - f.b @ f.a) < 4e-8


def test_task_arithmetic_scales_the_sum(three: list[Adapter]) -> None:
    result = compose(three, WEIGHTS, Recipe(how="task-arithmetic", coefficient=-0.4))
    assert apart(result.adapter, {n: -0.4 * x for n, x in summed(three, WEIGHTS).items()}) < 1e-6
    plain = compose(three, WEIGHTS, Recipe(how="task-arithmetic"))
    assert plain.adapter.digest == compose(three, WEIGHTS, Recipe()).adapter.digest


def test_rank_is_the_best_cut_and_the_error_is_true(three: list[Adapter]) -> None:
    want = summed(three, WEIGHTS)
    result = compose(three, WEIGHTS, Recipe(rank=3))
    assert set(result.adapter.ranks.values()) == {3}
    optimal = math.sqrt(sum(float(np.sum(np.linalg.svd(x)[1][3:] ** 2)) for x in want.values()))
    true = math.sqrt(sum(float(np.sum((x - want[n]) ** 2)) for n, x in dense(result.adapter).items()))
    assert result.error == pytest.approx(optimal, rel=1e-6)
    assert true == pytest.approx(optimal, rel=1e-6)
    assert result.relative_error == pytest.approx(optimal / result.norm)


@pytest.mark.parametrize("share", [0.02, 0.1, 0.3, 0.7])
def test_max_error_keeps_the_fewest_directions(three: list[Adapter], share: float) -> None:
    want = summed(three, WEIGHTS)
    result = compose(three, WEIGHTS, Recipe(max_error=share))
    every = np.sort(np.concatenate([np.linalg.svd(x)[1] for x in want.values()]))
    dropped = next(i for i in range(len(every) + 1) if np.sum(every[: i + 1] ** 2) > share**2 * np.sum(every**2))
    assert sum(result.adapter.ranks.values()) == len(every) - dropped
    assert result.error == pytest.approx(math.sqrt(np.sum(every[:dropped] ** 2)), abs=1e-6)
    assert result.relative_error <= share


def test_a_rank_that_cannot_meet_the_error_is_refused(three: list[Adapter]) -> None:
    ranks = compose(three, WEIGHTS, Recipe(max_error=0.1)).adapter.ranks
    most = max(ranks.values())
    assert compose(three, WEIGHTS, Recipe(max_error=0.1, rank=most)).adapter.ranks == ranks
    with pytest.raises(ConfigError, match=rf"needs rank {most} in .*--rank allows {most - 1}"):
        compose(three, WEIGHTS, Recipe(max_error=0.1, rank=most - 1))


# --- dense methods


def plain_trim(x: Float, density: float) -> Float:
    kept = sorted(range(x.size), key=lambda i: -abs(x.reshape(-1)[i]))[: max(1, round(density * x.size))]
    out = np.zeros(x.size)
    for i in kept:
        out[i] = x.reshape(-1)[i]
    return out.reshape(x.shape)


def plain_election(voices: list[Float], weights: tuple[float, ...]) -> Float:
    """Entry by entry: the sign of the weighted sum, then the weighted mean of those that have it."""
    out = np.zeros(voices[0].shape)
    for at in np.ndindex(out.shape):
        terms = [(w * v[at], abs(w)) for v, w in zip(voices, weights, strict=True)]
        total = sum(t for t, _ in terms)
        agreeing = [(t, w) for t, w in terms if t * total > 0]
        if agreeing:
            out[at] = sum(t for t, _ in agreeing) / sum(w for _, w in agreeing)
    return out


def plain_drop(x: Float, p: float, seed: int, i: int, name: str) -> Float:
    return np.where(stream(seed, "dare", i, name).random(x.shape, np.float32) < p, 0.0, x / (1 - p))


@pytest.mark.parametrize("density", [0.001, 0.1, 0.2, 0.55, 1.0])
@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0), WEIGHTS])
def test_ties_is_trim_elect_and_disjoint_mean(three: list[Adapter], density: float, weights: tuple[float, ...]) -> None:
    recipe = Recipe(how="ties", density=density, coefficient=1.3, rank=99)
    parts = [dense(a) for a in three]
    want = {n: 1.3 * plain_election([plain_trim(p[n], density) for p in parts], weights) for n in SHAPES}
    result = compose(three, weights, recipe)
    assert apart(result.adapter, want) < 1e-6
    assert result.relative_error < 1e-6


def test_ties_of_one_source_only_trims(three: list[Adapter]) -> None:
    result = compose(three[:1], (0.4,), Recipe(how="ties", density=0.3, rank=99))
    assert apart(result.adapter, {n: plain_trim(x, 0.3) for n, x in dense(three[0]).items()}) < 1e-6
    assert Recipe(how="ties").settings == {"rank": None, "density": 0.2, "coefficient": 1.0, "seed": 0}


def test_ties_of_opposites_is_zero_and_of_negatives_the_negative(three: list[Adapter]) -> None:
    recipe = Recipe(how="ties", density=1.0, rank=99)
    assert set(compose([three[0], three[0]], (1.0, -1.0), recipe).adapter.ranks.values()) == {0}
    there = compose(three, WEIGHTS, recipe)
    back = compose([a.scaled(-1.0) for a in three], WEIGHTS, recipe)
    assert apart(back.adapter, {n: -x for n, x in dense(there.adapter).items()}) < 1e-6


def test_ties_weights_are_relative(three: list[Adapter]) -> None:
    recipe = Recipe(how="ties", density=0.5)
    one = compose(three, WEIGHTS, recipe)
    two = compose(three, tuple(10 * w for w in WEIGHTS), recipe)
    assert apart(two.adapter, dense(one.adapter)) < 1e-6


@pytest.mark.parametrize("how", ["dare", "dare-ties"])
@pytest.mark.parametrize("p", [0.25, 0.9])
def test_dare_is_drop_and_rescale(three: list[Adapter], how: str, p: float) -> None:
    parts = [dense(a) for a in three]
    want = {}
    for n in SHAPES:
        voices = [plain_drop(part[n], p, 5, i, n) for i, part in enumerate(parts)]
        mixed = sum(w * v for w, v in zip(WEIGHTS, voices, strict=True))
        want[n] = 0.8 * (mixed if how == "dare" else plain_election(voices, WEIGHTS))  # type: ignore[operator]
    result = compose(three, WEIGHTS, Recipe(how=how, drop=p, coefficient=0.8, seed=5, rank=99))
    assert apart(result.adapter, want) < 1e-6


def test_dare_is_right_in_expectation(three: list[Adapter]) -> None:
    draws = 300
    want = summed(three, WEIGHTS)
    made = [dense(compose(three, WEIGHTS, Recipe(how="dare", seed=s, rank=99)).adapter) for s in range(draws)]
    p = 0.5  # the default
    for n in SHAPES:
        mean = np.mean([m[n] for m in made], axis=0)
        variance = sum((w * dense(a)[n]) ** 2 * p / (1 - p) for a, w in zip(three, WEIGHTS, strict=True))
        z = (mean - want[n]) / np.sqrt(variance / draws + 1e-20)
        assert np.abs(z).max() < 5
        assert 0.7 < np.sqrt(np.mean(z**2)) < 1.3  # as spread out as independent drops are


def test_dare_drops_nothing_at_0_and_by_source_and_module(three: list[Adapter]) -> None:
    assert apart(compose(three, WEIGHTS, Recipe(how="dare", drop=0.0)).adapter, summed(three, WEIGHTS)) < 1e-6
    both = compose([three[0], three[0]], (1.0, -1.0), Recipe(how="dare", rank=99))
    assert min(both.adapter.ranks.values()) > 0  # two copies of one source are thinned independently
    other = compose(three, WEIGHTS, Recipe(how="dare", seed=1))
    assert other.adapter.digest != compose(three, WEIGHTS, Recipe(how="dare", seed=0)).adapter.digest


@pytest.mark.parametrize("how", HOW)
def test_factors_do_not_matter_and_bytes_are_the_same_twice(three: list[Adapter], how: str) -> None:
    recipe = Recipe(how=how, rank=4)
    one = compose(three, WEIGHTS, recipe)
    turned = compose([rotated(a, i) for i, a in enumerate(three)], WEIGHTS, recipe)
    assert apart(turned.adapter, dense(one.adapter)) < 3e-6
    assert turned.error == pytest.approx(one.error, rel=1e-5, abs=1e-7)
    assert compose(three, WEIGHTS, recipe).adapter.digest == one.adapter.digest


def test_in_factor_space_factors_would_matter(three: list[Adapter]) -> None:
    """Why products: summing sqrt(w) A and sqrt(w) B, as PEFT's `linear` does, makes 2 of one and depends on M."""
    f = three[0]["q"]
    half = math.sqrt(0.5)
    b, a = half * f.b + half * f.b, half * f.a + half * f.a
    assert np.allclose(b @ a, 2 * f.b @ f.a, rtol=1e-5)
    kept = [
        plain_trim(g.b.astype(np.float64), 0.3) @ plain_trim(g.a.astype(np.float64), 0.3) * g.scale
        for g in (f, rotated(three[0], 1)["q"])
    ]
    assert np.linalg.norm(kept[0] - kept[1]) > 0.1 * np.linalg.norm(kept[0])


def test_dense_results_keep_the_sum_of_ranks_at_most(three: list[Adapter]) -> None:
    two = [random_adapter(i, {"q": r, "up": r, "v": r}, 1.0) for i, r in enumerate((2, 1))]
    result = compose(two, (1.0, 1.0), Recipe(how="ties"))
    assert set(result.adapter.ranks.values()) == {3}
    want = {n: plain_election([plain_trim(dense(a)[n], 0.2) for a in two], (1.0, 1.0)) for n in SHAPES}
    tail = [float(np.sum(np.linalg.svd(x)[1][3:] ** 2)) for x in want.values()]
    assert result.error == pytest.approx(math.sqrt(sum(tail)), rel=1e-5)
    assert result.norm == pytest.approx(math.sqrt(sum(np.sum(x**2) for x in want.values())), rel=1e-5)
    assert compose(three, WEIGHTS, Recipe(how="ties")).adapter.ranks == {"q": 7, "up": 6, "v": 5}


def test_the_range_finder_is_close_to_the_best(monkeypatch: pytest.MonkeyPatch) -> None:
    g = np.random.default_rng(0)
    sigma = 0.93 ** np.arange(130)
    u, v = np.linalg.qr(g.normal(size=(160, 130)))[0], np.linalg.qr(g.normal(size=(130, 130)))[0]
    x = (u * sigma @ v.T).astype(np.float32)
    best = float(np.linalg.norm(sigma[6:]))
    exact, error = factorised(x, 6)
    assert error == pytest.approx(best, rel=1e-6)
    monkeypatch.setattr(composition, "_SMALL", 16)
    for matrix in (x, np.ascontiguousarray(x.T)):
        near, reported = factorised(matrix, 6, seed=1, name="m")
        assert near.shape == matrix.shape
        assert near.rank == 6
        assert reported == pytest.approx(float(np.linalg.norm(matrix - near.b.astype(np.float64) @ near.a)), rel=1e-6)
        assert best * (1 - 1e-6) < reported < best * 1.0001
    again, _ = factorised(x, 6, seed=1, name="m")
    other, _ = factorised(x, 6, seed=2, name="m")
    assert exact.rank == again.rank == 6
    assert np.array_equal(again.a, factorised(x, 6, seed=1, name="m")[0].a)
    assert not np.array_equal(again.a, other.a)
    low = (g.normal(size=(160, 3)) @ g.normal(size=(3, 130))).astype(np.float32)
    assert factorised(low, 6)[0].rank == 3


def test_a_large_module_takes_blocks_of_rows() -> None:
    x = np.random.default_rng(0).normal(size=(2100, 2100)).astype(np.float32)
    f, error = factorised(x, 2)
    assert error == pytest.approx(float(np.linalg.norm(x - f.b @ f.a)), rel=1e-5)


# --- lorahub's search


@pytest.mark.parametrize("n", [1, 2, 3, 6])
def test_the_search_finds_a_shrunk_minimum(n: int) -> None:
    c = np.linspace(-1.0, 0.8, n) if n > 1 else np.array([0.6])

    def bowl(w: tuple[float, ...]) -> float:
        return float(np.sum((np.array(w) - c) ** 2))

    found = search(bowl, [0.0] * n, evaluations=150 * n, seed=1)
    want = np.sign(c) * np.maximum(np.abs(c) - 0.025, 0)  # the penalty's soft threshold
    assert np.allclose(found.weights, want, atol=0.02)
    assert found.objective == pytest.approx(bowl(found.weights) + 0.05 * sum(map(abs, found.weights)))
    assert found.start == pytest.approx(float(np.sum(c**2)))


def test_the_search_handles_a_turned_narrow_valley() -> None:
    def valley(w: tuple[float, ...]) -> float:
        x, y = w
        return 1000 * (x - y - 0.3) ** 2 + (x + y - 0.9) ** 2

    found = search(valley, [0.0, 0.0], evaluations=400, seed=0)
    assert np.allclose(found.weights, (0.6 - 0.0125, 0.3 - 0.0125), atol=0.01)


def test_the_search_stays_in_its_box_and_its_budget() -> None:
    seen: list[tuple[float, ...]] = []

    def slope(w: tuple[float, ...]) -> float:
        seen.append(w)
        return -sum(w)

    found = search(slope, [9.0, -9.0], evaluations=43, seed=2)
    assert seen[0] == (1.5, -1.5)
    assert len(seen) == found.evaluations == 43
    assert max(abs(x) for w in seen for x in w) <= 1.5
    assert np.allclose(found.weights, 1.5, atol=0.2)
    assert search(slope, [9.0, -9.0], evaluations=43, seed=2) == found
    assert search(slope, [9.0, -9.0], evaluations=43, seed=3) != found
    assert search(slope, [0.5, 0.5], evaluations=1).weights == (0.5, 0.5)


def test_the_search_walks_around_infinite_losses_and_never_gets_worse() -> None:
    def cliff(w: tuple[float, ...]) -> float:
        return math.nan if sum(w) <= 0 else (w[0] - 0.5) ** 2 + w[1] ** 2

    found = search(cliff, [-0.2, 0.1], evaluations=200, seed=0)
    assert found.start == math.inf
    assert np.allclose(found.weights, (0.475, 0.0), atol=0.03)
    at = search(lambda w: abs(w[0] - 0.1), [0.1], evaluations=5)
    assert at.weights == (0.1,)
    with pytest.raises(ConfigError, match="none of 20 candidate weights had a finite loss"):
        search(lambda _: math.inf, [0.5], evaluations=20)
    for start, evaluations in (([], 10), ([0.5], 0)):
        with pytest.raises(ConfigError, match="at least one weight and one evaluation"):
            search(cliff, start, evaluations=evaluations)


# --- heads


def test_heads_are_averaged_with_weights_of_sum_1() -> None:
    g = np.random.default_rng(0)
    heads = [{"w": g.normal(size=(3, 4)).astype(np.float32), "b": g.normal(size=3).astype(np.float32)} for _ in "ab"]
    mean = composed_head(heads, (1.4, 0.6))
    assert np.allclose(mean["w"], 0.7 * heads[0]["w"] + 0.3 * heads[1]["w"], atol=1e-7)
    assert mean["b"].dtype == np.float32
    assert np.array_equal(composed_head([heads[0], heads[0]], (0.1, 0.7))["b"], heads[0]["b"])
    assert composed_head([{}, {}], (1.0, -1.0)) == {}
    with pytest.raises(ConfigError, match="sum is 0: heads are averaged"):
        composed_head(heads, (1.0, -1.0))
    with pytest.raises(AdapterError, match=r"heads differ.*same labels"):
        composed_head([heads[0], {**heads[1], "b": np.zeros(4, np.float32)}], (1.0, 1.0))


# --- mistakes


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"how": "tie"}, r"'tie' to combine; did you mean ties\? There are cat, "),
        ({"how": ""}, r"no way ''"),
        ({"how": "linear"}, r"no way 'linear'"),
        ({"rank": 0}, r"--rank: at least 1, got 0"),
        ({"max_error": 0.0}, r"--max-error.*got 0"),
        ({"max_error": 1.0}, r"--max-error.*got 1"),
        ({"how": "ties", "density": 0.0}, r"--density.*got 0"),
        ({"how": "ties", "density": 1.01}, r"--density.*got 1.01"),
        ({"how": "dare", "drop": 1.0}, r"--drop.*got 1"),
        ({"how": "dare", "drop": -0.1}, r"--drop.*got -0.1"),
        ({"how": "ties", "coefficient": math.nan}, r"--lambda.*got nan"),
        ({"seed": -1}, r"--seed.*got -1"),
        ({"how": "dare", "density": 0.5}, r"--density belongs to ties; --how is dare"),
        ({"how": "ties", "drop": 0.5}, r"--drop belongs to dare, dare-ties; --how is ties"),
        ({"how": "cat", "coefficient": 2.0}, r"--lambda belongs to .*; --how is cat: multiply the weights"),
        ({"how": "ties", "max_error": 0.1}, r"--max-error belongs to cat, .*--how is ties: its result has full rank"),
    ],
)
def test_recipes_that_cannot_be(options: dict[str, object], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        Recipe(**options)  # type: ignore[arg-type]


def test_recipes_at_the_edge() -> None:
    assert Recipe(how="dare", drop=0.0).settings["drop"] == 0.0
    assert Recipe(how="ties", density=1.0, coefficient=0.0).settings["coefficient"] == 0.0
    assert Recipe().settings == {"rank": None, "max_error": None, "seed": 0}


def test_adapters_that_do_not_fit(three: list[Adapter]) -> None:
    with pytest.raises(ConfigError, match="one weight for each adapter"):
        compose(three, (1.0,), Recipe())
    with pytest.raises(ConfigError, match="at least one"):
        compose([], (), Recipe())
    with pytest.raises(ConfigError, match=r"finite numbers, got \[nan\]"):
        compose(three, (1.0, math.nan, 1.0), Recipe())
    with pytest.raises(AdapterError, match=r"modules differ; missing \['up', 'v'\]"):
        compose([three[0], Adapter({"q": three[1]["q"]})], (1.0, 1.0), Recipe())
    wrong = Adapter({**three[1], "q": Factors(np.zeros((1, 6)), np.zeros((9, 1)))})
    with pytest.raises(AdapterError, match=r"q: shapes differ, \(9, 7\) and \(9, 6\)"):
        compose([three[0], wrong], (1.0, 1.0), Recipe(how="ties"))
    huge = Adapter({n: Factors(f.a, f.b, 3e38) for n, f in three[0].items()})
    for how in ("ties", "dare"):
        with pytest.raises(AdapterError, match="the combination is not finite"):
            compose([huge], (1.0,), Recipe(how=how))


def test_the_algebra_needs_numpy_only() -> None:
    script = (
        "import sys\nfor name in 'torch flwr peft transformers pydantic scipy'.split():\n    sys.modules[name] = None\n"
        "import fedlora.composition"
    )
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0
