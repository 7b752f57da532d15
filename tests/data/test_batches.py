from __future__ import annotations

from dataclasses import replace
from itertools import islice

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedlora.data.batches import Batch, alike, in_order, pad, steps
from fedlora.data.rows import TokenRow
from fedlora.errors import DataError

PAD = 999


def make(lengths: list[int], labels: bool = False) -> list[TokenRow]:
    """Rows that can be told apart: the tokens of row i are all i."""
    return [
        TokenRow(np.full(n, i, np.int32), np.arange(n) >= n // 2, i % 3 if labels else None)
        for i, n in enumerate(lengths)
    ]


def drawn(found: list[Batch]) -> list[int]:
    return [int(row[0]) for batch in found for row in batch.tokens]


def endless(rows: list[TokenRow], *, step_rows: int, batch_size: int = 8, overhead: int = 10, seed: int = 0):
    rng = np.random.default_rng(seed)
    return steps(rows, step_rows=step_rows, batch_size=batch_size, overhead=overhead, rng=rng, pad_id=PAD)


cases = given(
    lengths=st.lists(st.integers(1, 30), min_size=1, max_size=60),
    step_rows=st.integers(1, 17),
    batch_size=st.integers(1, 17),
    overhead=st.integers(0, 60),
    seed=st.integers(0, 2**32 - 1),
)


@cases
@settings(deadline=None, max_examples=50)
def test_every_epoch_is_a_permutation_and_every_step_is_full(lengths, step_rows, batch_size, overhead, seed):
    n, epochs = len(lengths), 4
    size = min(step_rows, n)
    found = list(
        islice(
            endless(make(lengths), step_rows=step_rows, batch_size=batch_size, overhead=overhead, seed=seed),
            -(-epochs * n // size),
        )
    )
    assert {sum(len(batch.tokens) for batch in step) for step in found} == {size}
    assert all(len(batch.tokens) <= batch_size for step in found for batch in step)
    stream = [i for step in found for i in drawn(step)]
    whole = len(stream) // size * size
    for epoch in range(epochs):  # a step may hold rows of two epochs, sorted together, so count over whole steps
        end = min((epoch + 1) * n // size * size, whole)
        assert max(np.bincount(stream[:end], minlength=n)) - min(np.bincount(stream[:end], minlength=n)) <= 1


@cases
@settings(deadline=None, max_examples=30)
def test_a_batch_is_its_rows_and_padding_to_the_longest(lengths, step_rows, batch_size, overhead, seed):
    rows = make(lengths, labels=True)
    found = endless(rows, step_rows=step_rows, batch_size=batch_size, overhead=overhead, seed=seed)
    for batch in (batch for step in islice(found, 5) for batch in step):
        assert batch.tokens.dtype == batch.attention.dtype == np.int64
        assert batch.answer.dtype == np.bool_
        members = [rows[int(row[0])] for row in batch.tokens]
        assert batch.tokens.shape == (len(members), max(len(row.tokens) for row in members))
        assert batch.labels is not None
        assert batch.labels.tolist() == [row.label for row in members]
        for i, row in enumerate(members):
            n = len(row.tokens)
            assert batch.tokens[i, :n].tolist() == row.tokens.tolist()
            assert batch.answer[i, :n].tolist() == row.answer.tolist()
            assert (batch.tokens[i, n:] == PAD).all()
            assert not batch.answer[i, n:].any()
            assert batch.attention[i].tolist() == [1] * n + [0] * (batch.tokens.shape[1] - n)


@given(
    lengths=st.lists(st.integers(1, 30), min_size=1, max_size=8),
    batch_size=st.integers(1, 8),
    overhead=st.integers(0, 40),
)
@settings(deadline=None, max_examples=50)
def test_the_cuts_are_the_cheapest_of_all(lengths, batch_size, overhead):
    def price(groups: list[list[int]]) -> int:
        return sum(max(lengths[i] for i in g) * len(g) + overhead for g in groups)

    n = len(lengths)
    order = sorted(range(n), key=lambda i: -lengths[i])
    tried = []
    for mask in range(2 ** (n - 1)):  # oracle: every way to cut the sorted rows
        ends = [i + 1 for i in range(n - 1) if mask >> i & 1] + [n]
        groups = [order[a:b] for a, b in zip([0, *ends], ends, strict=False)]
        if max(map(len, groups)) <= batch_size:
            tried.append(price(groups))
    found = alike(np.arange(n), np.array(lengths), batch_size, overhead)
    assert sorted(int(i) for g in found for i in g) == list(range(n))
    assert price([list(map(int, g)) for g in found]) == min(tried)


def test_the_seed_decides_and_epochs_differ():
    rows = make([3] * 40)

    def first(seed: int, count: int) -> list[int]:
        return [i for step in islice(endless(rows, step_rows=8, seed=seed), count) for i in drawn(step)]

    assert first(1, 10) == first(1, 10)
    assert first(1, 10) != first(2, 10)
    two_epochs = first(1, 10)
    assert two_epochs[:40] != two_epochs[40:]


def test_a_step_is_mixed_and_its_batches_are_of_like_length():
    lengths = [10] * 320 + [100] * 320
    found = list(islice(endless(make(lengths), step_rows=32, batch_size=32), 20))
    for step in found:
        short = sum(lengths[i] == 10 for i in drawn(step))
        assert 2 <= short <= 30  # not one length a step
        assert all(len({lengths[i] for i in drawn([batch])}) == 1 for batch in step)
        assert all(batch.attention.all() for batch in step)


@given(lengths=st.lists(st.integers(1, 30), max_size=40), batch_size=st.integers(1, 9))
@settings(deadline=None, max_examples=30)
def test_in_order_gives_each_row_once_longest_first(lengths, batch_size):
    found = list(in_order(make(lengths), batch_size=batch_size, pad_id=PAD))
    indices = [int(i) for _, chosen in found for i in chosen]
    assert sorted(indices) == list(range(len(lengths)))
    assert drawn([batch for batch, _ in found]) == indices
    assert [lengths[i] for i in indices] == sorted(lengths, reverse=True)
    assert all(len(chosen) == batch_size for _, chosen in found[:-1])


def test_refusals():
    with pytest.raises(DataError, match="there are no rows; does this client hold any"):
        endless([], step_rows=4)
    with pytest.raises(DataError, match="batch_size must be at least 1, got 0"):
        endless(make([3]), step_rows=1, batch_size=0)
    with pytest.raises(DataError, match="step_rows must be at least 1 and overhead 0, got 0 and 10"):
        endless(make([3]), step_rows=0)
    with pytest.raises(DataError, match="1 of 2 rows have labels"):
        in_order([*make([3]), *make([3], labels=True)], batch_size=2, pad_id=0)
    with pytest.raises(DataError, match=r"one shape \[length >= 1\], got \(0,\) and \(0,\)"):
        TokenRow(np.empty(0, np.int32), np.empty(0, np.bool_))


def test_a_batch_carries_its_rows_choices():
    rows = [replace(row, choices=None if i == 1 else (2, i % 3)) for i, row in enumerate(make([4, 9, 2], labels=True))]
    assert pad(rows, PAD).choices == ((2, 0), None, (2, 2))
    assert pad(rows[1:2], PAD).choices is None
    for batch, indices in in_order(rows, batch_size=3, pad_id=PAD):
        assert batch.choices == tuple(rows[i].choices for i in indices)


def test_a_label_is_one_of_its_choices():
    row = TokenRow(np.ones(3, np.int32), np.zeros(3, np.bool_), 1, choices=(0, 1))
    with pytest.raises(DataError, match=r"label 2 must be one of its choices \(0, 1\)"):
        replace(row, label=2)
    with pytest.raises(DataError, match="label None must be one of its choices"):
        replace(row, label=None)
    with pytest.raises(DataError, match=r"one of its choices \(\)"):
        replace(row, choices=())
