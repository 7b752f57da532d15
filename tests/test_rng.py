"""The public generator against its specification, re-derived here in scalar code, and against theory."""

from __future__ import annotations

import hashlib
import math
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedlora.errors import AdapterError
from fedlora.rng import public_normal, public_orthonormal, stream

# Test vectors: for whoever writes the generator in another language.
NORMALS = {
    (0, "basis", ()): [
        -0.05120216922046631,
        0.3343082018669209,
        0.5182559848693279,
        1.8926777362286427,
        1.1390130552017064,
    ],
    (0, "basis", ("model.layers.0.self_attn.q_proj",)): [
        0.752410721969401,
        -0.8202351236073425,
        -0.78012831515825,
        -1.0011709481604523,
        -0.23901541818696515,
    ],
    (18446744073709551616, "Subräume", (-1, "1", 1)): [
        0.30466964229864973,
        0.008436930449854737,
        0.2397931726499996,
        -0.11247083128868116,
        2.130429236838407,
    ],
}
ROWS = [
    [0.23807746089156276, 0.9664795500584579, -0.0961062013307537],
    [-0.875674727461914, 0.2564006586505321, 0.40920957213642484],
]


def normals(seed: int, purpose: str, ids: list, count: int) -> list[float]:
    """Steps 1 to 4 of the specification, a value at a time, without numpy."""
    text = b"fedlora-public-1"
    for item in [seed, purpose, *ids]:
        raw = (b"i" if isinstance(item, int) else b"s") + str(item).encode("utf-8")
        text += bytes([len(raw) & 255, len(raw) >> 8 & 255, len(raw) >> 16 & 255, len(raw) >> 24]) + raw
    key = hashlib.sha256(text).digest()

    def uniform(index: int) -> float:
        counter = sum((index // 4 >> 8 * i & 255) << 8 * (7 - i) for i in range(8)).to_bytes(8, "big")
        block = hashlib.sha256(key + counter).digest()
        word = sum(block[8 * (index % 4) + i] << 8 * i for i in range(8))
        return (2 * (word // 4096) + 1) / 2**53

    values = []
    for i in range(0, count, 2):
        radius, angle = math.sqrt(-2.0 * math.log(uniform(i))), 2.0 * math.pi * uniform(i + 1)
        values += [radius * math.cos(angle), radius * math.sin(angle)]
    return values[:count]


def gram_schmidt(rows: list[list[float]]) -> list[list[float]]:
    """Step 5: modified Gram and Schmidt, twice; its R has a positive diagonal by construction."""
    done: list[list[float]] = []
    for row in rows:
        v = list(row)
        for _ in range(2):
            for q in done:
                along = math.fsum(x * y for x, y in zip(v, q, strict=True))
                v = [x - along * y for x, y in zip(v, q, strict=True)]
        size = math.sqrt(math.fsum(x * x for x in v))
        done.append([x / size for x in v])
    return done


def test_vectors():
    for (seed, purpose, ids), expected in NORMALS.items():
        got = public_normal(seed, purpose, *ids, shape=(len(expected),))
        np.testing.assert_allclose(got, expected, rtol=1e-13, atol=1e-14)
    np.testing.assert_allclose(public_orthonormal(0, "basis", "q", rows=2, cols=3), ROWS, rtol=0, atol=1e-14)


ids_ = st.lists(st.one_of(st.integers(-(2**70), 2**70), st.text(st.characters(exclude_categories=["Cs"]))), max_size=3)


@settings(deadline=None, max_examples=40)
@given(st.integers(-5, 2**64), st.text(max_size=5), ids_, st.integers(0, 5), st.integers(0, 5))
def test_normals_follow_the_specification(seed, purpose, ids, rows, cols):
    got = public_normal(seed, purpose, *ids, shape=(rows, cols))
    assert got.shape == (rows, cols)
    assert got.dtype == np.float64
    expected = np.array(normals(seed, purpose, ids, rows * cols)).reshape(rows, cols)
    np.testing.assert_allclose(got, expected, rtol=1e-12, atol=1e-14)


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 2**32), st.integers(0, 8), st.integers(1, 12))
def test_orthonormal_rows_follow_the_specification(seed, rows, cols):
    if rows > cols:
        rows, cols = cols, rows
    got = public_orthonormal(seed, "basis", "q", rows=rows, cols=cols)
    np.testing.assert_allclose(got @ got.T, np.eye(rows), atol=1e-14)
    flat = normals(seed, "basis", ["q"], rows * cols)
    expected = gram_schmidt([flat[i * cols : (i + 1) * cols] for i in range(rows)])
    np.testing.assert_allclose(got, np.array(expected).reshape(rows, cols), atol=1e-9)


@pytest.mark.parametrize("cols", [16, 65, 300])
def test_ranks_are_nested(cols):
    whole = public_orthonormal(3, "basis", "layer.0", rows=16, cols=cols)
    for rows in range(17):
        got = public_orthonormal(3, "basis", "layer.0", rows=rows, cols=cols)
        np.testing.assert_allclose(got, whole[:rows], atol=1e-13)


def test_every_argument_matters_and_items_do_not_run_together():
    calls = [
        (0, "a"),
        (1, "a"),
        (0, "b"),
        (0, "a", "b"),
        (0, "ab"),
        (0, "a", "b", "c"),
        (0, "a", "bc"),
        (0, "a", 1),
        (0, "a", "1"),
        (0, "a", -1),
        (0, "a", ""),
    ]
    assert len({public_normal(*call, shape=(1,)).item() for call in calls}) == len(calls)
    assert len({stream(*call).random() for call in calls}) == len(calls)


def test_normals_are_normal():
    x = np.sort(public_normal(1, "statistics", shape=(40_000,)))
    cdf = np.array([0.5 * (1.0 + math.erf(v / math.sqrt(2.0))) for v in x])
    assert np.abs(cdf - (np.arange(len(x)) + 0.5) / len(x)).max() < 1.95 / math.sqrt(len(x))  # Kolmogorov, 0.1 %
    pairs = public_normal(1, "statistics", shape=(40_000,)).reshape(-1, 2)
    assert abs(np.corrcoef(pairs.T)[0, 1]) < 4.0 / math.sqrt(len(pairs))
    assert abs(np.corrcoef(np.abs(pairs).T)[0, 1]) < 4.0 / math.sqrt(len(pairs))


@pytest.mark.parametrize(("rows", "cols"), [(5, 4), (-1, 4)])
def test_rows_that_do_not_fit_are_refused(rows, cols):
    with pytest.raises(AdapterError, match=re.escape(f"basis: no {rows} orthonormal rows fit into {cols} dimensions")):
        public_orthonormal(0, "basis", rows=rows, cols=cols)


def test_stream_repeats_itself():
    assert np.array_equal(stream(5, "batches", "c", 1).random(4), stream(5, "batches", "c", 1).random(4))
