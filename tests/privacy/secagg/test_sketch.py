"""The two passes against the dense sum, its best approximation by SVD, and through two secure sums."""

from __future__ import annotations

from types import ModuleType

import numpy as np
import pytest

from fedlora.adapter import Factors
from fedlora.errors import AdapterError
from fedlora.privacy.secagg import sketch
from fedlora.privacy.secagg.fixed_point import FixedPoint, clipped
from fedlora.privacy.secagg.packing import Packing

OUT, INP = 40, 30
RANKS = (2, 5, 1, 3, 4)


def clients(seed: int = 0) -> tuple[list[Factors], list[float]]:
    rng = np.random.default_rng(seed)
    pairs = [Factors(rng.standard_normal((r, INP)), rng.standard_normal((OUT, r)), 0.5 + r) for r in RANKS]
    return pairs, [0.1 * (i + 1) for i in range(len(RANKS))]


def two_passes(pairs: list[Factors], weights: list[float], columns: int) -> Factors:
    omega = sketch.public_omega(7, "layer", inp=INP, columns=columns)
    both = list(zip(pairs, weights, strict=True))
    q = sketch.public_range(np.sum([sketch.first_pass(f, omega, w) for f, w in both], axis=0))
    return sketch.result(q, np.sum([sketch.second_pass(f, q, w) for f, w in both], axis=0))


def dense(pairs: list[Factors], weights: list[float]) -> np.ndarray:
    return np.sum([w * f.dense() for f, w in zip(pairs, weights, strict=True)], axis=0)


@pytest.mark.parametrize("columns", [15, 16, 30, 45])
def test_exact_from_the_rank_of_the_sum_on(columns: int) -> None:
    pairs, weights = clients()
    plain = dense(pairs, weights)
    assert np.linalg.matrix_rank(plain) == 15
    found = two_passes(pairs, weights, columns)
    assert found.rank == min(columns, OUT)
    np.testing.assert_allclose(found.dense(), plain, atol=1e-11 * np.linalg.norm(plain))


def test_below_the_rank_it_is_near_the_best() -> None:
    pairs, weights = clients()
    plain = dense(pairs, weights)
    singular = np.linalg.svd(plain, compute_uv=False)
    best = np.linalg.norm(singular[10:])
    error = np.linalg.norm(two_passes(pairs, weights, 10).dense() - plain)
    assert best <= error <= 4 * best


def test_omega_is_nested_and_public() -> None:
    wide = sketch.public_omega(3, "m", inp=8, columns=6)
    np.testing.assert_array_equal(wide[:, :4], sketch.public_omega(3, "m", inp=8, columns=4))
    assert not np.array_equal(wide, sketch.public_omega(3, "n", inp=8, columns=6))


def test_through_two_secure_sums(sessions: ModuleType) -> None:
    nodes = sessions.federation(5)
    pairs, weights = clients(1)
    omega = sketch.public_omega(7, "layer", inp=INP, columns=16)
    held = dict(zip(nodes.ids, zip(pairs, weights, strict=True), strict=True))

    def total(part: int, basis: str, of: dict[str, np.ndarray]) -> np.ndarray:
        packing = Packing({"x": next(iter(of.values())).shape})
        point = FixedPoint(size=packing.size, clients=5, bound=4096.0)
        context, key = nodes.session(
            fixed_point=point, layout=packing.digest, parts=2, part=part, basis=basis, threshold=3
        )
        values = {i: clipped(packing.pack({"x": x}, {}), 4096.0) for i, x in of.items()}
        return packing.unpack(sessions.Run(nodes, context, key, values).sum().values)[0]["x"]

    y = total(1, sketch.digest(omega), {i: sketch.first_pass(f, omega, w) for i, (f, w) in held.items()})
    q = sketch.public_range(y)
    z = total(2, sketch.digest(q), {i: sketch.second_pass(f, q, w) for i, (f, w) in held.items()})
    plain = dense(pairs, weights)
    assert np.linalg.norm(sketch.result(q, z).dense() - plain) <= 1e-5 * np.linalg.norm(plain)


def test_refusals() -> None:
    pairs, _ = clients()
    with pytest.raises(AdapterError, match="Omega"):
        sketch.first_pass(pairs[0], np.zeros((OUT, 3)), 1.0)
    with pytest.raises(AdapterError, match="does not fit"):
        sketch.second_pass(pairs[0], np.eye(INP), 1.0)
    with pytest.raises(AdapterError, match="not orthonormal"):
        sketch.second_pass(pairs[0], 1.01 * np.eye(OUT)[:, :3], 1.0)
    with pytest.raises(AdapterError, match="not orthonormal"):
        sketch.second_pass(pairs[0], np.full((OUT, 3), np.nan), 1.0)


def test_digests_tell_bases_apart() -> None:
    q = np.eye(4)
    assert len({sketch.digest(x) for x in (q, q[:, :3], q.reshape(2, 8), 2 * q)}) == 4
