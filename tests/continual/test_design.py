"""Sketches of second moments, the memory of old inputs and designed subspaces, against dense eigendecompositions."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from fedlora.continual.design import design, held, remember, second_moment, span
from fedlora.errors import MethodError
from fedlora.rng import public_normal

Float64 = NDArray[np.float64]
seeds = st.integers(0, 2**32 - 1)


def inputs(seed: int, rows: int, width: int, rank: int) -> Float64:
    """Rows in `rank` directions whose energies fall from about 1 to 1/rank^2, so that they can be told apart."""
    rng = np.random.default_rng(seed)
    directions = np.linalg.qr(rng.normal(size=(width, rank)))[0].T
    return np.asarray((rng.normal(size=(rows, rank)) / np.arange(1, rank + 1)) @ directions)


def omega_of(width: int, s: int) -> Float64:
    return public_normal(5, "sketch", "q", shape=(width, s))


def moment_of(x: Float64, s: int) -> tuple[Float64, Float64, float]:
    omega = omega_of(x.shape[1], s)
    energy = float(np.sum(x**2))
    return *second_moment(x.T @ (x @ omega), omega, energy), energy


def eigen(c: Float64) -> tuple[Float64, Float64]:
    """Eigenvectors as rows and eigenvalues, falling."""
    values, vectors = np.linalg.eigh(c)
    return vectors.T[::-1], values[::-1]


def off(rows: Float64) -> Float64:
    """The dense projector on the complement of `rows`, by the pseudo-inverse."""
    return np.eye(rows.shape[1]) - np.linalg.pinv(rows) @ rows


@given(seeds, st.integers(1, 12), st.sampled_from([12, 20, 30]))
@settings(max_examples=20, deadline=None)
def test_the_approximation_is_exact_where_the_rank_fits(seed: int, rank: int, s: int) -> None:
    x = inputs(seed, 60, 20, rank)
    vectors, values, energy = moment_of(x, s)
    assert len(values) == rank
    np.testing.assert_allclose((vectors * values) @ vectors.T, x.T @ x, atol=1e-9 * energy)
    np.testing.assert_allclose(vectors.T @ vectors, np.eye(rank), atol=1e-12)
    assert held(vectors.T, vectors, values, energy) == pytest.approx(1.0, abs=1e-9)


@given(seeds)
@settings(max_examples=20, deadline=None)
def test_the_approximation_never_exceeds_c_and_is_within_the_bound(seed: int) -> None:
    """0 <= hat C <= C, and on average an error of (1 + r/(s-r-1)) times the best of rank r (theorem 4.1)."""
    x = inputs(seed, 200, 40, 40)
    s, r = 16, 6
    vectors, values, energy = moment_of(x, s)
    left = np.linalg.eigvalsh(x.T @ x - (vectors * values) @ vectors.T)
    assert left.min() > -1e-10 * energy
    assert np.all(np.diff(values) <= 0.0)
    best = eigen(x.T @ x)[1][r:].sum()
    assert left.sum() < 3.0 * (1.0 + r / (s - r - 1)) * best
    assert held(vectors.T, vectors, values, energy) == pytest.approx(1.0 - left.sum() / energy, abs=1e-9)


def test_summed_sketches_are_the_sketch_of_all_inputs() -> None:
    x = inputs(0, 90, 20, 20)
    omega = omega_of(20, 8)
    parts = [x[:10], x[10:35], x[35:]]
    summed = np.sum([p.T @ (p @ omega) for p in parts], axis=0)
    vectors, values = second_moment(summed, omega, sum(float(np.sum(p**2)) for p in parts))
    alone, alone_values, _ = moment_of(x, 8)
    np.testing.assert_allclose((vectors * values) @ vectors.T, (alone * alone_values) @ alone.T, atol=1e-10)


@pytest.mark.parametrize("noise", [0.0, 1e-5, 1e-4])
def test_float32_sketches_and_their_noise_cost_about_the_noise(noise: float) -> None:
    x = inputs(1, 300, 60, 10)
    omega = omega_of(60, 24)
    sketch = x.T @ (x @ omega)
    sketch += noise * np.abs(sketch).max() * np.random.default_rng(2).normal(size=sketch.shape)
    vectors, values = second_moment(sketch.astype(np.float32), omega, float(np.sum(x**2)))
    error = np.linalg.norm((vectors * values) @ vectors.T - x.T @ x) / np.linalg.norm(x.T @ x)
    assert error < 1e-5 + 60.0 * noise
    assert values.sum() == pytest.approx(np.sum(x**2), rel=1e-5 + 90.0 * noise)  # the shift does not bias it
    assert len(values) == 10


def test_no_input_has_no_direction() -> None:
    omega = omega_of(6, 3)
    vectors, values = second_moment(np.zeros((6, 3), np.float32), omega, 0.0)
    assert vectors.shape == (6, 0)
    assert values.shape == (0,)
    assert held(vectors.T, vectors, values, 0.0) == 1.0
    assert remember(np.zeros((0, 6)), vectors, values, 0.0, 0.9).shape == (0, 6)


def test_sketches_that_do_not_belong_are_refused() -> None:
    x, omega = inputs(3, 50, 20, 20), omega_of(20, 8)
    sketch, energy = x.T @ (x @ omega), float(np.sum(x**2))
    for seed in range(20):
        with pytest.raises(MethodError, match=r"asymmetric by .*made with this Omega"):
            second_moment(sketch, public_normal(seed, "other", shape=(20, 8)), energy)
    with pytest.raises(MethodError, match="over the same clients"):
        second_moment(sketch, omega, 0.5 * energy)
    with pytest.raises(MethodError, match=r"sketch \(20, 8\) and Omega \(20, 7\)"):
        second_moment(sketch, omega[:, :7], energy)
    for bad in (-1.0, float("nan")):
        with pytest.raises(MethodError, match="finite and its energy 0 or more"):
            second_moment(sketch, omega, bad)
    sketch[3, 2] = np.nan
    with pytest.raises(MethodError, match="finite"):
        second_moment(sketch, omega, energy)


@given(seeds, st.sampled_from([0.3, 0.8, 0.95, 0.999]), st.sampled_from([0, 1, 5]))
@settings(max_examples=30, deadline=None)
def test_memory_holds_the_threshold_with_the_fewest_directions(seed: int, threshold: float, known: int) -> None:
    x = inputs(seed, 80, 24, 14)
    vectors, values, energy = moment_of(x, 24)
    memory = np.linalg.qr(np.random.default_rng(seed).normal(size=(24, known)))[0].T
    new = remember(memory, vectors, values, energy, threshold)
    c = x.T @ x
    np.testing.assert_allclose(new @ new.T, np.eye(len(new)), atol=1e-12)
    np.testing.assert_allclose(new[:known], memory, atol=1e-12)
    assert np.trace(new @ c @ new.T) >= (threshold - 1e-9) * energy
    rows, gains = eigen(off(memory) @ c @ off(memory))
    np.testing.assert_allclose(off(new), off(np.vstack([memory, rows[: len(new) - known]])), atol=1e-6)
    if len(new) > known:  # the best with one direction fewer misses it (Ky Fan)
        assert np.trace(memory @ c @ memory.T) + gains[: len(new) - known - 1].sum() < threshold * energy


def test_memory_does_not_grow_with_inputs_that_it_holds_and_stops_at_what_the_sketch_has() -> None:
    x = inputs(4, 80, 24, 24)
    vectors, values, energy = moment_of(x, 6)
    assert held(vectors.T, vectors, values, energy) < 0.999
    memory = remember(np.zeros((0, 24)), vectors, values, energy, 0.999)
    assert len(memory) == 6
    again = remember(memory.astype(np.float32), vectors, values, energy, 0.999)
    assert len(again) == 6
    np.testing.assert_allclose(again @ again.T, np.eye(6), atol=1e-12)


def test_the_threshold_is_a_share_of_all_energy_and_not_of_what_the_sketch_holds() -> None:
    vectors, values, energy = moment_of(inputs(4, 80, 24, 24), 6)
    for threshold in (0.5, 0.8, 0.999 * held(vectors.T, vectors, values, energy)):
        memory = remember(np.zeros((0, 24)), vectors, values, energy, threshold)
        assert held(memory, vectors, values, energy) >= threshold > held(memory[:-1], vectors, values, energy)


def test_memory_is_orthonormal_where_almost_nothing_is_new() -> None:
    rng = np.random.default_rng(9)
    old, new = np.split(np.linalg.qr(rng.normal(size=(20, 6)))[0].T, 2)
    x = rng.normal(size=(50, 3)) @ old + 1e-5 * rng.normal(size=(50, 3)) @ new
    _, values, vectors = np.linalg.svd(x, full_matrices=False)
    memory = remember(old, vectors[:6].T, values[:6] ** 2, float(np.sum(x**2)), 1.0)
    assert len(memory) == 6
    np.testing.assert_allclose(memory @ memory.T, np.eye(6), atol=1e-12)
    np.testing.assert_allclose(off(memory), off(np.vstack([old, new])), atol=1e-6)


def test_memory_of_tasks_in_turn_holds_every_task() -> None:
    memory = np.zeros((0, 30))
    tasks = [inputs(seed, 50, 30, 6) for seed in range(3)]
    for x in tasks:
        memory = remember(memory, *moment_of(x, 10), 0.95)
    assert len(memory) < 18
    for x in tasks:
        assert np.sum((x @ memory.T) ** 2) >= 0.95 * np.sum(x**2)


@given(seeds, st.integers(1, 6), st.integers(0, 10))
@settings(max_examples=30, deadline=None)
def test_design_is_the_leading_residual_eigenvectors(seed: int, dim: int, taken: int) -> None:
    x = inputs(seed, 200, 24, 24)
    vectors, values, _ = moment_of(x, 24)
    rng = np.random.default_rng(seed)
    avoid = np.linalg.qr(rng.normal(size=(24, taken)))[0].T
    n = design(dim, vectors, values, avoid, seed=0, name="q")
    assert n.dtype == np.float32
    assert n.shape == (dim, 24)
    np.testing.assert_allclose(n.astype(np.float64) @ n.T, np.eye(dim), atol=1e-6)
    assert np.abs(n @ avoid.T).max(initial=0.0) < 1e-7
    _, gains = eigen(off(avoid) @ (x.T @ x) @ off(avoid))
    np.testing.assert_allclose(np.sum((x @ n.T) ** 2, axis=0), gains[:dim], rtol=1e-5)


def test_two_tasks_are_orthogonal_to_old_inputs_and_to_one_another() -> None:
    """A x_old = 0 for what is remembered of them, and <dW_i, dW_j> = 0: both by construction, in float32."""
    memory, bases = np.zeros((0, 40)), np.zeros((0, 40), np.float32)
    for seed in range(4):
        vectors, values, energy = moment_of(inputs(seed, 60, 40, 8), 12)
        avoid = np.concatenate([memory, bases])
        n = design(4, vectors, values, avoid, seed=0, name="q")
        assert np.abs(n @ avoid.T).max(initial=0.0) < 1.5e-7
        bases = np.concatenate([bases, n])
        memory = remember(memory, vectors, values, energy, 0.9)


def test_directions_that_are_known_twice_take_capacity_once() -> None:
    vectors, values, energy = moment_of(inputs(6, 60, 12, 8), 12)
    n = design(4, vectors, values, np.zeros((0, 12)), seed=0, name="q")
    memory = remember(np.zeros((0, 12)), vectors, values, energy, 0.999)
    assert len(memory) > 4
    avoid = np.concatenate([memory, n])
    assert len(span(avoid, 1e-7)) == len(memory)
    free = 12 - len(memory)
    assert design(free, vectors, values, avoid, seed=0, name="q").shape == (free, 12)
    with pytest.raises(MethodError, match=rf"^q: a task needs {free + 1} input directions and {free} of 12 are left"):
        design(free + 1, vectors, values, avoid, seed=0, name="q")


@pytest.mark.parametrize("rank", [0, 2])
def test_seeded_directions_complete_what_the_inputs_lack(rank: int) -> None:
    x = inputs(7, 30, 16, rank)
    vectors, values, _ = moment_of(x, 8)
    avoid = np.linalg.qr(np.random.default_rng(7).normal(size=(16, 9)))[0].T
    n = design(7, vectors, values, avoid, seed=0, name="q")  # all that is left
    np.testing.assert_allclose(off(n.astype(np.float64)), np.eye(16) - off(avoid), atol=1e-6)
    np.testing.assert_allclose(n[rank:] @ x.T, 0.0, atol=1e-5)
    np.testing.assert_array_equal(n, design(7, vectors, values, avoid, seed=0, name="q"))
    for other in ({"seed": 1, "name": "q"}, {"seed": 0, "name": "k"}):
        assert np.abs(n[rank:] - design(7, vectors, values, avoid, **other)[rank:]).max() > 0.01  # type: ignore[arg-type]
    np.testing.assert_array_equal(n[:rank], design(7, vectors, values, avoid, seed=1, name="q")[:rank])


def test_design_is_a_function_of_the_inputs_alone() -> None:
    """Other sketch, other order of rows, other signs of eigenvectors: the same rows, largest entry positive."""
    x = inputs(8, 100, 20, 5)
    rng = np.random.default_rng(8)
    avoid = np.linalg.qr(rng.normal(size=(20, 3)))[0].T
    vectors, values, _ = moment_of(x, 8)
    n = design(4, vectors, values, avoid, seed=0, name="q")
    for row in n:
        assert row[np.abs(row).argmax()] > 0.0
    np.testing.assert_array_equal(n, design(4, -vectors, values, avoid, seed=0, name="q"))
    other, other_values, _ = moment_of(x[rng.permutation(100)], 12)
    mixed = np.linalg.qr(rng.normal(size=(3, 3)))[0] @ avoid
    np.testing.assert_allclose(design(4, other, other_values, mixed, seed=0, name="q"), n, atol=1e-6)
