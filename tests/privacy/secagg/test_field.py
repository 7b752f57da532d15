"""Shamir's sharing against the definition of a polynomial, and the prime against Miller-Rabin."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedlora.privacy.secagg.field import PRIME, combine, share_bytes, share_value, split

fast = settings(deadline=None, max_examples=60)
elements = st.integers(0, PRIME - 1)


def probably_prime(n: int, rounds: int) -> bool:
    """Miller-Rabin, with bases of a fixed stream."""
    odd, twos, rng = n - 1, 0, random.Random(1)
    while odd % 2 == 0:
        odd, twos = odd // 2, twos + 1
    for _ in range(rounds):
        x = pow(rng.randrange(2, n - 1), odd, n)
        if x not in (1, n - 1) and not any((x := x * x % n) == n - 1 for _ in range(twos - 1)):
            return False
    return True


def test_the_prime_is_the_least_above_32_bytes() -> None:
    assert probably_prime(PRIME, 40)
    assert not any(probably_prime(n, 2) for n in range(2**256 + 1, PRIME, 2))


@fast
@given(secret=elements, data=st.data(), count=st.integers(1, 12))
def test_any_threshold_of_shares_give_the_secret(secret: int, data: st.DataObject, count: int) -> None:
    points = data.draw(st.lists(st.integers(1, 10_000), min_size=count, max_size=count, unique=True))
    threshold = data.draw(st.integers(1, count))
    shares = dict(zip(points, split(secret, threshold, points), strict=True))
    some = data.draw(st.permutations(points))[:threshold]
    assert combine({x: shares[x] for x in some}) == secret
    assert combine(shares) == secret


@fast
@given(secret=elements, guess=elements, threshold=st.integers(2, 6))
def test_fewer_shares_fit_every_secret(secret: int, guess: int, threshold: int) -> None:
    """With one share less than needed, some last share leads to any guess: interpolate through the guess at 0."""
    points = range(1, threshold + 1)
    fewer = dict(zip(points[:-1], split(secret, threshold, points), strict=False))
    last = combine({(x - threshold) % PRIME: y for x, y in {**fewer, 0: guess}.items()})
    assert combine({**fewer, threshold: last}) == guess


@fast
@given(left=elements, right=elements)
def test_shares_add(left: int, right: int) -> None:
    points = (3, 1, 7, 9)
    both = [(x + y) % PRIME for x, y in zip(split(left, 3, points), split(right, 3, points), strict=True)]
    assert combine(dict(zip(points, both, strict=True))) == (left + right) % PRIME


@fast
@given(secret=elements, at=st.integers(0, 4), change=st.integers(1, PRIME - 1))
def test_one_wrong_share_gives_another_secret(secret: int, at: int, change: int) -> None:
    shares = dict(zip(range(1, 6), split(secret, 5, range(1, 6)), strict=True))
    shares[at + 1] = (shares[at + 1] + change) % PRIME
    assert combine(shares) != secret


@fast
@given(value=elements)
def test_bytes(value: int) -> None:
    assert share_value(share_bytes(value)) == value


@pytest.mark.parametrize("data", [b"", bytes(32), bytes(34), b"\xff" * 33, PRIME.to_bytes(33, "little")])
def test_bytes_that_are_no_element(data: bytes) -> None:
    with pytest.raises(ValueError, match="not an element"):
        share_value(data)


def test_refusals() -> None:
    for secret, threshold, points in (
        (PRIME, 1, [1]), (-1, 1, [1]), (1, 3, [1, 2]), (1, 0, [1]), (1, 2, [1, 1]), (1, 2, [0, 1]), (1, 1, [PRIME]),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=r"secret|threshold|points"):
            split(secret, threshold, points)
    for shares in ({}, {1: PRIME}, {1: -1}, {0: 1}):
        with pytest.raises(ValueError, match=r"shares|points"):
            combine(shares)
