from __future__ import annotations

from itertools import islice

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedlora.data.batches import Batch, batches, in_order
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


cases = given(
    lengths=st.lists(st.integers(1, 30), min_size=1, max_size=60),
    batch_size=st.integers(1, 17),
    window=st.integers(1, 4),
    seed=st.integers(0, 2**32 - 1),
)


@cases
@settings(deadline=None, max_examples=50)
def test_every_epoch_is_a_permutation_and_every_batch_is_full(lengths, batch_size, window, seed):
    rows, n, epochs = make(lengths), len(lengths), 4
    size = min(batch_size, n)
    endless = batches(rows, batch_size=batch_size, rng=np.random.default_rng(seed), pad_id=PAD, window=window)
    found = list(islice(endless, -(-epochs * n // size)))
    assert {len(batch.tokens) for batch in found} == {size}
    stream = drawn(found)
    for epoch in range(epochs):
        assert sorted(stream[epoch * n : (epoch + 1) * n]) == list(range(n))


@cases
@settings(deadline=None, max_examples=30)
def test_a_batch_is_its_rows_and_padding_to_the_longest(lengths, batch_size, window, seed):
    rows = make(lengths, labels=True)
    endless = batches(rows, batch_size=batch_size, rng=np.random.default_rng(seed), pad_id=PAD, window=window)
    for batch in islice(endless, 5):
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


def test_the_seed_decides_and_epochs_differ():
    rows = make([3] * 40)

    def first(seed: int, count: int) -> list[int]:
        return drawn(list(islice(batches(rows, batch_size=8, rng=np.random.default_rng(seed), pad_id=PAD), count)))

    assert first(1, 10) == first(1, 10)
    assert first(1, 10) != first(2, 10)
    two_epochs = first(1, 10)
    assert two_epochs[:40] != two_epochs[40:]


def test_rows_of_like_length_go_together():
    lengths = np.random.default_rng(0).integers(5, 200, 640).tolist()
    rows = make(lengths)

    def padding(window: int) -> float:
        endless = batches(rows, batch_size=16, rng=np.random.default_rng(0), pad_id=PAD, window=window)
        found = list(islice(endless, 40))
        return 1 - sum(int(b.attention.sum()) for b in found) / sum(b.tokens.size for b in found)

    assert padding(8) < 0.15 < 0.4 < padding(1)


def test_what_an_epoch_leaves_over_is_completed_with_rows_of_like_length():
    rows = make([10] * 20 + [100] * 20)  # 40 rows in batches of 16: 8 are left over
    found = list(islice(batches(rows, batch_size=16, rng=np.random.default_rng(3), pad_id=PAD), 3))
    assert len({len(rows[i].tokens) for i in drawn(found[2:])}) == 1


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
    rng = np.random.default_rng(0)
    with pytest.raises(DataError, match="there are no rows; does this client hold any"):
        batches([], batch_size=4, rng=rng, pad_id=0)
    with pytest.raises(DataError, match="batch_size must be at least 1, got 0"):
        batches(make([3]), batch_size=0, rng=rng, pad_id=0)
    with pytest.raises(DataError, match="window must be at least 1, got 0"):
        batches(make([3]), batch_size=1, rng=rng, pad_id=0, window=0)
    with pytest.raises(DataError, match="1 of 2 rows have labels"):
        in_order([*make([3]), *make([3], labels=True)], batch_size=2, pad_id=0)
    with pytest.raises(DataError, match=r"one shape \[length >= 1\], got \(0,\) and \(0,\)"):
        TokenRow(np.empty(0, np.int32), np.empty(0, np.bool_))
