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
    `labels`: int64 `[rows]`, or None for language modelling; `choices`: each row's classes to choose from (None: all),
    or None where no row has any."""

    tokens: NDArray[np.int64]
    attention: NDArray[np.int64]
    answer: NDArray[np.bool_]
    labels: NDArray[np.int64] | None
    choices: tuple[tuple[int, ...] | None, ...] | None = None


def steps(
    rows: Sequence[TokenRow],
    *,
    step_rows: int,
    batch_size: int,
    overhead: int,
    rng: np.random.Generator,
    pad_id: int,
) -> Iterator[list[Batch]]:
    """The rows of one optimiser step after another, endlessly, each as batches of like length.

    A step is `step_rows` rows at random (all rows, if there are fewer): the stream of rows, cut every `len(rows)` rows,
    is a permutation each time. Only *inside* a step are rows sorted by length and cut into batches of at most
    `batch_size` rows, so as to pad least, where one batch more costs as much as `overhead` tokens. Sorting over several
    steps would pad a little less and make each step one-sided: length tells tasks apart.

    Cost: O(step_rows * batch_size) a step. Raises: DataError if there are no rows, if a size is below 1, or if only
    some rows have labels.
    """
    lengths = _check(rows, batch_size)
    if step_rows < 1 or overhead < 0:
        raise DataError(f"steps: step_rows must be at least 1 and overhead 0, got {step_rows} and {overhead}")
    return (
        [pad([rows[i] for i in chosen], pad_id) for chosen in alike(drawn, lengths, batch_size, overhead)]
        for drawn in _endless(len(rows), min(step_rows, len(rows)), rng)
    )


def alike(chosen: Indices, lengths: Indices, batch_size: int, overhead: int) -> list[Indices]:
    """`chosen`, longest first, cut where the padded tokens plus `overhead` for each batch are fewest.

    Cuts of a sorted sequence by dynamic programming: `cost[i] = min over j of cost[j] + length[j] (i - j) + overhead`.
    """
    order = chosen[np.argsort(-lengths[chosen], kind="stable")]
    longest = lengths[order]
    cost, cut = np.zeros(len(order) + 1), np.zeros(len(order) + 1, np.int64)
    for i in range(1, len(order) + 1):
        first = max(0, i - batch_size)
        tries = cost[first:i] + longest[first:i] * (i - np.arange(first, i)) + overhead
        best = int(np.argmin(tries))
        cost[i], cut[i] = tries[best], first + best
    batches: list[Indices] = []
    end = len(order)
    while end:
        batches.append(order[cut[end] : end])
        end = int(cut[end])
    return batches[::-1]


def in_order(rows: Sequence[TokenRow], *, batch_size: int, pad_id: int) -> Iterator[tuple[Batch, Indices]]:
    """Each row once, longest first, for evaluation: pairs of a batch and the indices `[rows]` of its rows in `rows`.

    The last batch may be smaller. No rows give no batches. Raises: DataError as `steps`.
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
    choices = tuple(row.choices for row in rows)
    return Batch(
        tokens, attention, answer, np.array(labels, np.int64) if labels else None, choices if any(choices) else None
    )


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


def _endless(count: int, size: int, rng: np.random.Generator) -> Iterator[Indices]:
    """Indices below `count`, `size` at a time, through one shuffle after another."""
    waiting = np.empty(0, np.int64)
    while True:
        while len(waiting) < size:
            waiting = np.concatenate([waiting, rng.permutation(count)])
        yield waiting[:size]
        waiting = waiting[size:]
