"""Batches of rows of like length, padded on the right to the longest row of the batch. Numpy only."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedlora.data.rows import TokenRow
from fedlora.errors import DataError

Indices = NDArray[np.int64]


@dataclass(frozen=True)
class Batch:
    """`tokens`, `attention` (1 on tokens, 0 on padding): int64 `[rows, length]`; `answer`: bool `[rows, length]`;
    `labels`: int64 `[rows]`, or None for language modelling."""

    tokens: NDArray[np.int64]
    attention: NDArray[np.int64]
    answer: NDArray[np.bool_]
    labels: NDArray[np.int64] | None


def batches(
    rows: Sequence[TokenRow], *, batch_size: int, rng: np.random.Generator, pad_id: int, window: int = 8
) -> Iterator[Batch]:
    """Endless training batches; every epoch is a new shuffle in which each row appears exactly once.

    Rows of like length go together: an epoch's shuffle is cut into windows of `window` batches, rows are sorted by
    length inside a window, and the order of all the epoch's batches is shuffled. (Larger windows pad less and mix
    less.) Every batch is full: what an epoch leaves over is completed with rows of the next epoch, both chosen near
    each other in length. So the stream of rows, cut every `len(rows)` rows, is a permutation each time. With fewer rows
    than `batch_size` each batch is all rows once.

    Cost: O(n log n) an epoch; nothing is copied but the batch. Raises: DataError if there are no rows, if
    `batch_size` or `window` is below 1, or if only some rows have labels.
    """
    lengths, size = _check(rows, batch_size), min(batch_size, len(rows))
    if window < 1:
        raise DataError(f"batches: window must be at least 1, got {window}")
    return (pad([rows[i] for i in chosen], pad_id) for chosen in _endless(lengths, size, window, rng))


def in_order(rows: Sequence[TokenRow], *, batch_size: int, pad_id: int) -> Iterator[tuple[Batch, Indices]]:
    """Each row once, longest first, for evaluation: pairs of a batch and the indices `[rows]` of its rows in `rows`.

    The last batch may be smaller. No rows give no batches. Raises: DataError as `batches`.
    """
    if not len(rows):
        return iter(())
    order = np.argsort(-_check(rows, batch_size), kind="stable")
    cuts = (order[start : start + batch_size] for start in range(0, len(rows), batch_size))
    return ((pad([rows[i] for i in chosen], pad_id), chosen) for chosen in cuts)


def pad(rows: Sequence[TokenRow], pad_id: int) -> Batch:
    """One batch of these rows, in this order."""
    shape = len(rows), max(len(row.tokens) for row in rows)
    tokens = np.full(shape, pad_id, np.int64)
    attention = np.zeros(shape, np.int64)
    answer = np.zeros(shape, np.bool_)
    for i, row in enumerate(rows):
        length = len(row.tokens)
        tokens[i, :length] = row.tokens
        attention[i, :length] = 1
        answer[i, :length] = row.answer
    labels = [row.label for row in rows if row.label is not None]
    return Batch(tokens, attention, answer, np.array(labels, np.int64) if labels else None)


def _check(rows: Sequence[TokenRow], batch_size: int) -> Indices:
    """The lengths of the rows, once they are known to make batches."""
    if batch_size < 1:
        raise DataError(f"batches: batch_size must be at least 1, got {batch_size}")
    if not len(rows):
        raise DataError("batches: there are no rows; does this client hold any data after cleaning?")
    labelled = sum(row.label is not None for row in rows)
    if 0 < labelled < len(rows):
        raise DataError(f"batches: {labelled} of {len(rows)} rows have labels; all or none must")
    return np.array([len(row.tokens) for row in rows], np.int64)


def _endless(lengths: Indices, size: int, window: int, rng: np.random.Generator) -> Iterator[Indices]:
    """Indices of one batch after another. `size` is at most the number of rows."""
    left = np.empty(0, np.int64)
    while True:
        order = rng.permutation(len(lengths))
        if len(left):
            near, order = _nearest(order, lengths, int(lengths[left[0]]), size - len(left))
            yield np.concatenate([left, near])
        left = order[:0]
        if over := len(order) % size:
            left, order = _nearest(order, lengths, int(lengths[order[-1]]), over)
        full: list[Indices] = []
        for start in range(0, len(order), window * size):
            part = order[start : start + window * size]
            full.extend(part[np.argsort(lengths[part], kind="stable")].reshape(-1, size))
        for i in rng.permutation(len(full)):
            yield full[i]


def _nearest(order: Indices, lengths: Indices, length: int, count: int) -> tuple[Indices, Indices]:
    """The `count` rows nearest to a length (ties as they come), and the others in their order."""
    by_distance = np.argsort(np.abs(lengths[order] - length), kind="stable")
    return order[by_distance[:count]], np.delete(order, by_distance[:count])
