"""Secure sums are plain sums: exact up to the proved rounding, whoever drops out, on every graph."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from fedlora.errors import RoundFailed
from fedlora.privacy.secagg.consent import Consent
from fedlora.privacy.secagg.context import demoted
from fedlora.privacy.secagg.fixed_point import FixedPoint, clipped
from fedlora.privacy.secagg.packing import Packing

STAGES = ("advertise", "share", "mask", "confirm", "unmask")


def require_plain(run: Any, got: Any, expected: list[str]) -> None:
    """The values are those of the plain sum within the bound, and word for word the sum of rounded vectors."""
    point = run.context.fixed_point
    plain = sum((run.vectors[i].astype(np.float64) for i in expected), np.zeros(point.size))
    words = sum((np.rint(run.vectors[i].astype(np.float64) * 2.0**point.bits) for i in expected), np.zeros(point.size))
    assert got.survivors == tuple(sorted(expected))
    assert np.abs(got.values - plain).max() <= point.error(len(expected))
    np.testing.assert_array_equal(got.values, words * 2.0**-point.bits)


@pytest.mark.parametrize("count", [3, 4, 10, 34, pytest.param(100, marks=pytest.mark.slow)])
def test_without_drop_outs(sessions: ModuleType, count: int) -> None:
    clients = sessions.federation(count)
    context, key = clients.session(fixed_point=FixedPoint(size=11, clients=count, bound=2.5))
    run = sessions.Run(clients, context, key, sessions.vectors(context, norm=2.5))
    assert (context.degree < count - 1) == (count > 31)
    require_plain(run, run.sum(), clients.ids)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("count", [1, 3])
def test_drop_outs_at_one_stage(sessions: ModuleType, stage: str, count: int) -> None:
    clients = sessions.federation(10)
    context, key = clients.session()
    gone = clients.ids[2 : 2 + count]
    run = sessions.Run(clients, context, key, sessions.vectors(context), drop={stage: gone})
    counted = clients.ids if stage in ("confirm", "unmask") else [i for i in clients.ids if i not in gone]
    require_plain(run, run.sum(), counted)


@pytest.mark.parametrize("count", [12, 36])
def test_a_drop_out_at_every_stage(sessions: ModuleType, count: int) -> None:
    clients = sessions.federation(count)
    context, key = clients.session(threshold=7 if count == 12 else 17)
    drop = dict(zip(STAGES, ([i] for i in clients.ids), strict=False))
    run = sessions.Run(clients, context, key, sessions.vectors(context), drop=drop)
    require_plain(run, run.sum(), clients.ids[3:])


@pytest.mark.parametrize("stage", STAGES)
def test_too_many_drop_outs_lose_the_round(sessions: ModuleType, stage: str) -> None:
    clients = sessions.federation(10)
    context, key = clients.session()
    run = sessions.Run(clients, context, key, sessions.vectors(context), drop={stage: clients.ids[:4]})
    with pytest.raises(RoundFailed, match="6 in the neighbourhood"):
        run.sum()


def test_a_new_attempt_after_a_loss_and_the_next_round(sessions: ModuleType) -> None:
    clients = sessions.federation(10)
    context, key = clients.session()
    values = sessions.vectors(context)
    lost = sessions.Run(clients, context, key, values, drop={"confirm": clients.ids[:4]})
    with pytest.raises(RoundFailed):
        lost.sum()
    left = clients.ids[2:]
    for round_, attempt in ((0, 1), (1, 0)):
        again, key = clients.session(left, round=round_, attempt=attempt)
        run = sessions.Run(clients, again, key, values)
        require_plain(run, run.sum(), left)


def test_mixed_ranks_padded_are_the_sum_of_products(sessions: ModuleType) -> None:
    """Nested: B_i [out, r_i] on the first rows of one A; a lone client of the top rank is moved down first."""
    clients = sessions.federation(9, ranks=[8])
    clients.ranks = dict(zip(clients.ids, [8, 4, 4, 4, 2, 2, 2, 2, 1], strict=True))
    clients.ranks = demoted(clients.ranks, 3)
    assert sorted(clients.ranks.values()) == [1, 2, 2, 2, 2, 4, 4, 4, 4]
    rng, packing = np.random.default_rng(3), Packing({"b": (6, 4)}, ("weight",))
    a = np.linalg.qr(rng.standard_normal((7, 4))).Q.T
    context, key = clients.session(
        fixed_point=FixedPoint(size=packing.size, clients=9, bound=3.0), layout=packing.digest
    )
    b = {i: rng.standard_normal((6, r)).astype(np.float32) for i, r in clients.ranks.items()}
    values = {}
    for i, r in clients.ranks.items():
        padded = np.zeros((6, 4), np.float32)
        padded[:, :r] = b[i]
        values[i] = clipped(packing.pack({"b": padded}, {"weight": 0.5}), 3.0)
    run = sessions.Run(clients, context, key, values)
    arrays, scalars = packing.unpack(run.sum().values)
    scale = {i: float(v[-1]) / 0.5 for i, v in values.items()}
    expected = sum(scale[i] * b[i].astype(np.float64) @ a[: clients.ranks[i]] for i in clients.ids)
    np.testing.assert_allclose(arrays["b"] @ a, expected, atol=1e-5)
    assert scalars["weight"] == pytest.approx(sum(0.5 * s for s in scale.values()), abs=1e-5)


def test_integer_noise_is_in_the_sum(sessions: ModuleType) -> None:
    clients = sessions.federation(3)
    context, key = clients.session(fixed_point=FixedPoint(size=5, clients=3, bound=1.0, headroom=10_000))
    run = sessions.Run(clients, context, key, sessions.vectors(context))
    run.until("mask")
    noise = {i: np.arange(at, at + 5, dtype=np.int32) - 3 for at, i in enumerate(clients.ids)}
    for i in clients.ids:
        run.send(i, run.clients[i].mask(run.to(i, run.deliveries[i]), run.vectors[i], noise[i]))
    run.survivors = run.server.close_masking()
    run.confirm()
    run.unmask()
    quanta = run.server.finish().values * 2.0**context.fixed_point.bits
    plain = sum((np.rint(run.vectors[i] * 2.0**context.fixed_point.bits) for i in clients.ids), np.zeros(5))
    np.testing.assert_array_equal(quanta - plain, sum(noise.values(), np.zeros(5)))


def masked_words(sessions: ModuleType, size: int, count: int) -> list[NDArray[np.uint32]]:
    clients = sessions.federation(count)
    context, key = clients.session(fixed_point=FixedPoint(size=size, clients=count, bound=1.0))
    run = sessions.Run(clients, context, key, {i: np.zeros(size, np.float32) for i in clients.ids})
    run.until("mask")
    return [run.clients[i].mask(run.deliveries[i], run.vectors[i]).words for i in clients.ids]


def test_masked_vectors_look_uniform(sessions: ModuleType) -> None:
    """Chi-square with 255 degrees of freedom on each byte of a masked zero; 8 looks, each false 1 time in 10^5."""
    from scipy.stats import chi2

    words = masked_words(sessions, 1 << 17, 3)
    for vector in words[:2]:
        for byte in range(4):
            counts = np.bincount((vector >> np.uint32(8 * byte) & np.uint32(255)).astype(np.int64), minlength=256)
            expected = vector.size / 256
            assert chi2.sf(((counts - expected) ** 2 / expected).sum(), 255) > 1e-5
    pairs = np.corrcoef(np.stack(words).astype(np.float64))
    assert np.abs(pairs - np.eye(3)).max() < 0.02


def test_a_masked_vector_says_nothing_twice(sessions: ModuleType) -> None:
    first, second = (masked_words(sessions, 64, 3)[0] for _ in range(2))
    assert not np.array_equal(first, second)


def test_two_parts_sum_over_the_same_clients(sessions: ModuleType) -> None:
    clients = sessions.federation(8)
    context, key = clients.session(parts=2)
    one = sessions.Run(clients, context, key, sessions.vectors(context), drop={"mask": clients.ids[:1]})
    survivors = one.sum().survivors
    context, key = clients.session(survivors, parts=2, part=2)
    two = sessions.Run(clients, context, key, sessions.vectors(context, seed=1))
    require_plain(two, two.sum(), clients.ids[1:])


def test_part_two_with_a_drop_out_is_lost(sessions: ModuleType) -> None:
    clients = sessions.federation(8)
    for memory in clients.consents.values():
        memory.consent = Consent("run", 0, 2, 1, 0, 1, tuple(clients.ids))
    context, key = clients.session(parts=2, part=2)
    run = sessions.Run(clients, context, key, sessions.vectors(context), drop={"mask": clients.ids[:1]})
    with pytest.raises(RoundFailed, match="1 of those in part 1 are missing"):
        run.sum()
