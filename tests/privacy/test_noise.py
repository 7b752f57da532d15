"""Noise against the standard library's normal quantiles and AES in another mode; its laws by statistics; no replay."""

from __future__ import annotations

import copy
import inspect
import math
import os
import pickle
from statistics import NormalDist

import numpy as np
import pytest
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import AES
from cryptography.hazmat.primitives.ciphers.modes import ECB

import fedlora.privacy.noise as under_test
from fedlora.errors import ConfigError
from fedlora.privacy.noise import Noise, grid_sd, grid_sensitivity

KEY = bytes(range(32))
N = 400_000


def words_of(key: bytes, count: int) -> list[int]:
    """Counter mode by its definition: each counter, big endian, through the block cipher by itself."""
    block = Cipher(AES(key), ECB()).encryptor()
    stream = b"".join(block.update(i.to_bytes(16, "big")) for i in range(-(-count // 2)))
    return [int.from_bytes(stream[8 * i : 8 * i + 8], "little") for i in range(count)]


def test_normals_are_quantiles_of_aes_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(under_test, "BLOCK", 16)  # so that one draw takes several blocks
    noise = Noise._with_key(KEY)
    got = np.concatenate([noise.normal((3, 10), 2.0).ravel(), noise.normal((20,), 2.0)])
    for z, word in zip(got, words_of(KEY, 50), strict=True):
        tail = NormalDist().inv_cdf(((word >> 11) + 1) / 2**54)
        assert z == pytest.approx(2.0 * (tail if word & 1 == 0 else -tail), rel=1e-9)


def test_normals_are_normal() -> None:
    noise = Noise()
    z = noise.normal((N,), 3.0) / 3.0
    assert z.dtype == np.float64
    assert abs(z.mean()) < 5 / math.sqrt(N)
    assert abs(z.var() - 1.0) < 5 * math.sqrt(2 / N)
    assert abs((z**4).mean() - 3.0) < 5 * math.sqrt(96 / N)
    # Kolmogorov and Smirnov: sqrt(n) D is above 2.2 once in 8,000 times
    level = np.vectorize(NormalDist().cdf)(np.sort(z[:20_000]))
    steps = np.arange(20_001) / 20_000
    assert math.sqrt(20_000) * max((steps[1:] - level).max(), (level - steps[:-1]).max()) < 2.2
    other = noise.normal((N,), 1.0)
    assert abs(np.corrcoef(z, other)[0, 1]) < 5 / math.sqrt(N)


def test_the_extremes_are_finite(monkeypatch: pytest.MonkeyPatch) -> None:
    ends = np.array([0, 1, 2**64 - 2, 2**64 - 1], np.uint64)
    noise = Noise()
    monkeypatch.setattr(noise, "_words", lambda count: ends)
    assert noise.normal((4,), 1.0) == pytest.approx([-8.2924, 8.2924, 0.0, 0.0], abs=1e-3)


def test_grid_noise_is_rounded_and_adds_up() -> None:
    parties, sd = 5, grid_sd(0.01, 2.0**14, 5)
    assert sd == pytest.approx(0.01 * 2**14 / math.sqrt(5))
    shares = [Noise().grid((N // 4,), sd) for _ in range(parties)]
    assert all(x.dtype == np.int64 for x in shares)
    total = np.sum(shares, axis=0)
    want = parties * (sd**2 + 1 / 12)  # rounding adds the variance of a uniform
    assert abs(total.var() / want - 1.0) < 5 * math.sqrt(2 / len(total))
    assert abs(total.mean()) < 5 * math.sqrt(want / len(total))


def test_a_rounded_vector_stays_within_its_bound() -> None:
    g = np.random.default_rng(0)
    for _ in range(20):
        x = g.normal(size=300)
        x *= 0.7 / np.linalg.norm(x)
        assert np.linalg.norm(np.rint(x * 64.0)) <= grid_sensitivity(0.7, 64.0, 300)
    worst = np.full(9, 0.5 + 1e-9)
    assert np.linalg.norm(np.rint(worst)) == pytest.approx(grid_sensitivity(1.5, 1.0, 9), abs=1e-6)


def test_poisson_draws() -> None:
    noise = Noise()
    hits = np.array([np.isin(np.arange(20), noise.chosen(20, 0.3)) for _ in range(4000)])
    assert np.all(np.abs(hits.mean(0) - 0.3) < 5 * math.sqrt(0.21 / 4000))  # each by its own chance
    assert abs(hits.sum(1).var() / 4.2 - 1.0) < 0.15  # and by itself: the variance is a binomial's
    assert noise.chosen(7, 1.0).tolist() == list(range(7))
    assert noise.chosen(0, 0.5).tolist() == []
    assert noise.chosen(1000, 1e-300).tolist() == []


def test_there_is_no_seed_and_no_replay() -> None:
    assert list(inspect.signature(Noise).parameters) == []
    assert not np.array_equal(Noise().normal((8,), 1.0), Noise().normal((8,), 1.0))
    noise = Noise()
    assert not np.array_equal(noise.normal((8,), 1.0), noise.normal((8,), 1.0))
    for again in (copy.copy, copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match="cannot be copied or pickled"):
            again(noise)


def test_a_forked_child_draws_other_noise() -> None:
    noise = Noise._with_key(KEY)
    here, there = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(there, noise.normal((4,), 1.0).tobytes())
        os._exit(0)
    os.waitpid(child, 0)
    got = np.frombuffer(os.read(here, 32))
    assert len(got) == 4
    assert not np.isin(got, noise.normal((4,), 1.0)).any()


@pytest.mark.parametrize("sd", [0.0, -1.0, math.nan, math.inf])
def test_noise_of_no_size_is_refused(sd: float) -> None:
    with pytest.raises(ConfigError, match="standard deviation of noise must be finite and above 0"):
        Noise().normal((2,), sd)


def test_other_refusals() -> None:
    with pytest.raises(ConfigError, match=r"noise of 7\.9 quanta is too coarse"):
        Noise().grid((2,), 7.9)
    for q in (0.0, -0.1, 1.1, math.nan):
        with pytest.raises(ConfigError, match="sampling probability must be above 0 and at most 1"):
            Noise().chosen(3, q)
    with pytest.raises(ConfigError, match="a population cannot be -1"):
        Noise().chosen(-1, 0.5)
    with pytest.raises(ConfigError, match="at least 1 party"):
        grid_sd(1.0, 1.0, 0)
    with pytest.raises(ConfigError, match="at least 1 value"):
        grid_sensitivity(1.0, 1.0, 0)
