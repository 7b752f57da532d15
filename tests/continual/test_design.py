"""Sketches of second moments and designed subspaces, against dense eigendecompositions."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from fedlora.continual.design import design, second_moment, span
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
    assert values.sum() == pytest.approx(energy, rel=1e-9)


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
    assert values.sum() == pytest.approx(energy - left.sum(), abs=1e-9 * energy)


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


def orthonormal(seed: int, rows: int, width: int) -> Float64:
    return np.asarray(np.linalg.qr(np.random.default_rng(seed).normal(size=(width, rows)))[0].T)


@given(seeds, st.integers(1, 6), st.integers(0, 8), st.sampled_from([0.01, 1.0]))
@settings(max_examples=30, deadline=None)
def test_rows_are_the_generalised_eigenvectors_of_new_and_old_inputs(
    seed: int, dim: int, taken: int, floor: float
) -> None:
    """Dense oracle: eigenvalues of (D + floor/in I)^-1 C inside the complement of `avoid`, by a general solver."""
    x, y = inputs(seed, 200, 24, 24), inputs(seed + 1, 200, 24, 24)
    avoid = orthonormal(seed, taken, 24)
    n = design(dim, moment_of(x, 24), moment_of(y, 24), avoid, floor=floor, seed=0, name="q").astype(np.float64)
    c, d = x.T @ x / np.sum(x**2), y.T @ y / np.sum(y**2) + floor / 24 * np.eye(24)
    z = np.linalg.svd(off(avoid))[0][:, : 24 - taken]
    best = np.sort(np.linalg.eigvals(np.linalg.solve(z.T @ d @ z, z.T @ c @ z)).real)[::-1][:dim]
    ratios = np.sum(n @ c * n, axis=1) / np.sum(n @ d * n, axis=1)
    np.testing.assert_allclose(ratios, best, rtol=1e-4)
    np.testing.assert_allclose(n @ c @ n.T, np.eye(dim) / 24, atol=1e-6)  # even, and as large as along a unit row
    under = n @ d @ n.T
    np.testing.assert_allclose(under, np.diag(np.diag(under)), atol=1e-4 * under.max())
    assert np.abs(n @ avoid.T).max(initial=0.0) < 1e-6 * np.linalg.norm(n)


def test_without_old_tasks_rows_are_the_leading_directions_made_even() -> None:
    x = inputs(2, 300, 16, 16)
    n = design(5, moment_of(x, 16), None, np.zeros((0, 16)), floor=0.01, seed=0, name="q")
    rows, values = eigen(x.T @ x / np.sum(x**2))
    unit = n / np.linalg.norm(n, axis=1, keepdims=True)
    np.testing.assert_allclose(np.abs(np.sum(unit * rows[:5], axis=1)), 1.0, atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(n, axis=1), 1 / np.sqrt(16 * values[:5]), rtol=1e-5)


def test_rows_keep_off_old_inputs_however_much_energy_they_have() -> None:
    """Old inputs use half of the directions, most of the new task's energy is there too: the rows are in the rest."""
    rng = np.random.default_rng(3)
    shared, own = np.split(orthonormal(3, 12, 24), 2)
    y = rng.normal(size=(400, 6)) @ shared
    x = 3.0 * rng.normal(size=(400, 6)) @ shared + 0.5 * rng.normal(size=(400, 6)) @ own
    n = design(4, moment_of(x, 24), moment_of(y, 24), np.zeros((0, 24)), floor=0.01, seed=0, name="q")
    lead = design(4, moment_of(x, 24), None, np.zeros((0, 24)), floor=0.01, seed=0, name="q")

    def shown(rows: NDArray[np.float32]) -> float:
        return float(np.sum((y @ rows.T) ** 2) / np.sum(y**2) / (np.sum((x @ rows.T) ** 2) / np.sum(x**2)))

    assert shown(n) < 0.01 < 0.5 < shown(lead)


def test_tasks_in_turn_are_orthogonal_to_one_another() -> None:
    own = np.zeros((0, 40))
    old = None
    for seed in range(6):
        new = moment_of(inputs(seed, 60, 40, 8), 12)
        n = design(4, new, old, span(own, 1e-7), floor=0.01, seed=0, name="q")
        unit = n / np.linalg.norm(n, axis=1, keepdims=True)
        assert np.abs(unit @ span(own, 1e-7).T).max(initial=0.0) < 1e-6
        own, old = np.concatenate([own, n]), new


def test_running_out_of_directions_is_an_error_that_says_what_is_left() -> None:
    new, avoid = moment_of(inputs(6, 60, 12, 8), 12), orthonormal(6, 9, 12)
    assert design(3, new, None, avoid, floor=0.01, seed=0, name="q").shape == (3, 12)
    with pytest.raises(MethodError, match=r"^q: a task needs 4 input directions and 3 of 12 are left, 9 belong"):
        design(4, new, None, avoid, floor=0.01, seed=0, name="q")


@pytest.mark.parametrize("rank", [0, 2])
def test_seeded_directions_complete_what_the_inputs_lack(rank: int) -> None:
    x = inputs(7, 30, 16, rank)
    new, avoid = moment_of(x, 8), orthonormal(7, 9, 16)
    n = design(7, new, None, avoid, floor=0.01, seed=0, name="q").astype(np.float64)  # all that is left
    np.testing.assert_allclose(off(n), np.eye(16) - off(avoid), atol=1e-5)
    again = design(7, new, None, avoid, floor=0.01, seed=0, name="q")
    np.testing.assert_array_equal(n, again)
    for seed, name in ((1, "q"), (0, "k")):
        other = design(7, new, None, avoid, floor=0.01, seed=seed, name=name)
        assert np.abs(n - other).max() > 0.01 * np.abs(n).max()


def test_design_is_a_function_of_the_inputs_alone() -> None:
    """Other sketch, other order of rows, other signs of eigenvectors: the same rows, largest entry positive."""
    x, rng = inputs(8, 100, 20, 5), np.random.default_rng(8)
    avoid = orthonormal(8, 3, 20)
    vectors, values, energy = moment_of(x, 8)
    n = design(4, (vectors, values, energy), None, avoid, floor=0.01, seed=0, name="q")
    for row in n:
        assert row[np.abs(row).argmax()] > 0.0
    flipped = design(4, (-vectors, values, energy), None, avoid, floor=0.01, seed=0, name="q")
    np.testing.assert_allclose(n, flipped, rtol=1e-5, atol=1e-6)
    other = moment_of(x[rng.permutation(100)], 12)
    mixed = np.linalg.qr(rng.normal(size=(3, 3)))[0] @ avoid
    np.testing.assert_allclose(design(4, other, None, mixed, floor=0.01, seed=0, name="q"), n, rtol=1e-4, atol=1e-5)
