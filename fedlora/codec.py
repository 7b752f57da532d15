"""Codecs of arrays on the wire: float32, float16 and bfloat16; int8 and int4 with a scale for every group.

    m = max |x| over a group,   s = bfloat16(m / n),   q = rint(x / s),   x^ = s q        n = 127 (int8), 7 (int4)

Groups lie along the longer axis of an array (A `[rank, in]`: along `in`; B `[out, rank]`: along `out`; square: along
rows). Under int8 such a line is one group, under int4 every run of 64 values of a line is one, the last may be shorter.
So a group is one direction of a pair, or a part of one, and large directions do not blur small ones. Linear, symmetric,
to nearest, ties to even; blocks with scales of their own as in Dettmers et al., "8-bit Optimizers via Block-wise
Quantization", ICLR 2022.

A packed array is one string of bytes (uint8): first all scales (bfloat16, little endian), by lines, groups in order;
then the values by lines, as int8 in two's complement, or two int4 in a byte, the first in the low half. A line of odd
length ends with an empty half, which is 0. Only 2-D arrays are coded: biases and probes are small and stay float32.

**Coding twice loses no more than coding once.** `quantise` and `dequantise` are inverses of one another between the
arrays that `dequantise` gives and the bytes that it accepts, and those are the bytes that `quantise` gives. Proof. s
has 8 significant bits, so where m / n is normal |m / s - n| <= n 2^-8 < 1/2, by a margin of 1/256 at n = 127 that the
roundings of float32 (2^-24 each) cannot use up. So the largest value of a group gets +-n and no other gets more:
nothing is clipped. n s and q s have at most 15 significant bits and are exact in float32; (n s) / n gives s, which is
a bfloat16, and (q s) / s gives q. Below 2^-126, the smallest normal number, s would be less precise than that: such
groups are s = 0 and q = 0, which come back as they are. Nothing overflows: for the largest float32, m / n is rounded
down under both codecs. It follows that rows of a coded A and columns of a coded B, also times a power of two, lose
nothing either.

Where we differ from common absmax quantisers: scales are bfloat16 instead of float32 (4.25 bits for an int4 value
instead of 4.5), and only canonical bytes are accepted: scales 0 or normal, a largest |q| of exactly n (of 0 where
s = 0), so no -128 and no -8.

Cost: some ten passes over one array, in float32; a few copies of it in memory.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from fedlora.adapter import Array
from fedlora.errors import WireError
from fedlora.state import Codec

__all__ = ["BYTES", "dequantise", "lossless", "nbytes", "packed", "quantise", "rounded", "travels"]

Packed = NDArray[Any]  # float32, float16 or bfloat16 of the array's shape, or bytes

_FLOATS: dict[str, np.dtype[Any]] = {
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}
_LEVELS = {"int8": 127, "int4": 7}  # n
_RUN = 64  # values that share a scale under int4: an even number, so that groups begin at whole bytes
_SCALE = _FLOATS["bfloat16"]
_SMALLEST = np.float32(2.0**-126)  # scale
BYTES: Mapping[Codec, float] = {  # of a value in a long line, with its share of the scales
    "float32": 4.0,
    "float16": 2.0,
    "bfloat16": 2.0,
    "int8": 1.0,
    "int4": 0.5 + _SCALE.itemsize / _RUN,
}


def travels(key: str, shape: Sequence[int]) -> bool:
    """Whether the array of this key (`part:name`) and shape travels in the codec; all others travel in float32."""
    return len(shape) == 2 and not key.startswith("probe:")


def packed(shape: Sequence[int], codec: Codec, name: str = "array") -> tuple[np.dtype[Any], tuple[int, ...]]:
    """Dtype and shape of what `quantise` makes of an array of this shape.

    Raises: WireError naming the array for a shape that int8 and int4 cannot have, or for an unknown codec.
    """
    if codec in _FLOATS:
        return _FLOATS[codec], tuple(shape)
    grid = _Grid.of(shape, codec, name)
    return np.dtype(np.uint8), (grid.scale_bytes + grid.lines * grid.line_bytes,)


def nbytes(shape: Sequence[int], codec: Codec) -> int:
    """Bytes of a packed array, without its row in the table of the message. Raises: as `packed`."""
    dtype, size = packed(shape, codec)
    return dtype.itemsize * math.prod(size)


def quantise(x: Array, codec: Codec, name: str = "array") -> Packed:
    """`x` as it travels: of the dtype and shape that `packed` says; float32 that already is stays the same array.

    Raises: WireError naming the array: a value overflows the codec, a NaN or infinity under int8 or int4 (the floating
    codecs carry them), not two axes, an unknown codec.
    """
    if codec in _FLOATS:
        return _cast(x, _FLOATS[codec], name)
    grid = _Grid.of(x.shape, codec, name)
    if not np.isfinite(x).all():
        raise WireError(
            f"{name}: {int(np.sum(~np.isfinite(x)))} of {x.size} values are NaN or infinite, and {codec} has no such"
            " values; lower the learning rate (training.learning_rate)"
        )
    groups = grid.grouped(grid.along(_cast(x, _FLOATS["float32"], name)))
    peak = np.maximum(groups.max(axis=2, initial=0.0), -groups.min(axis=2, initial=0.0))
    scales = (peak / np.float32(grid.levels)).astype(_SCALE).astype(np.float32)
    scales[scales < _SMALLEST] = 0.0
    ratio = groups / np.where(scales > 0.0, scales, np.float32(np.inf))[:, :, None]
    values = grid.written(np.rint(ratio, out=ratio).astype(np.int8))
    return np.concatenate([scales.astype(_SCALE).reshape(-1).view(np.uint8), values.reshape(-1)])


def dequantise(data: Packed, shape: Sequence[int], codec: Codec, name: str = "array") -> NDArray[np.float32]:
    """The array `[shape]` in float32, C-contiguous, that `quantise` made `data` of; float32 stays the same array.

    Dtype and shape of `data` are checked before anything is made.
    Raises: WireError naming the array and what `quantise` would never have written.
    """
    dtype, size = packed(shape, codec, name)
    if data.dtype != dtype or data.shape != size:
        raise WireError(
            f"{name}: {codec} of {tuple(shape)} is {dtype} {size}, got {data.dtype} {data.shape}; does the sender use"
            " another codec?"
        )
    if codec in _FLOATS:
        return data.astype(np.float32, copy=False)
    grid = _Grid.of(shape, codec, name)
    scales = data[: grid.scale_bytes].view(_SCALE).astype(np.float32).reshape(grid.lines, grid.groups)
    values = grid.read(data[grid.scale_bytes :], name)
    top, low = values.max(axis=2, initial=0), values.min(axis=2, initial=0)
    if (low < -grid.levels).any():
        raise WireError(
            f"{name}: {codec} has no value {low.min()}; its values are from {-grid.levels} to {grid.levels}"
        )
    with np.errstate(over="ignore", invalid="ignore"):
        right = (scales == 0.0) & ~np.signbit(scales) | (scales >= _SMALLEST) & np.isfinite(grid.levels * scales)
    if not right.all():
        raise WireError(f"{name}: a scale is {scales[~right][0]:g}; scales are 0 or normal positive numbers")
    if not (np.maximum(top, -low) == np.where(scales > 0.0, grid.levels, 0)).all():
        raise WireError(
            f"{name}: not canonical: the largest value of every group is {grid.levels} where its scale is positive, and"
            " all are 0 where that is 0"
        )
    return grid.along(grid.joined(values * scales[:, :, None]))


def rounded(x: Array, codec: Codec, name: str = "array") -> NDArray[np.float32]:
    """What arrives when `x` travels: another round trip changes no byte. Raises: WireError as `quantise`."""
    return dequantise(quantise(x, codec, name), x.shape, codec, name)


def lossless(x: Array, codec: Codec, name: str = "array") -> bool:
    """Whether `x` arrives bit for bit as it is (-0.0 is not 0.0). Raises: WireError as `quantise`."""
    y = rounded(x, codec, name)
    return np.array_equal(y, x) and np.array_equal(np.signbit(y), np.signbit(x))


def _cast(x: Array, dtype: np.dtype[Any], name: str) -> NDArray[Any]:
    """`x` in a floating dtype. Raises: WireError if a finite value would become infinite."""
    with np.errstate(over="ignore"):
        y = x.astype(dtype, copy=False)
    if y is not x and not np.isfinite(y).all() and np.isfinite(x[~np.isfinite(y)]).any():
        raise WireError(
            f"{name}: {float(np.abs(x[np.isfinite(x)]).max()):.6g} overflows {dtype.name};"
            " choose bfloat16 or float32 (wire.up, wire.down)"
        )
    return y


@dataclass(frozen=True)
class _Grid:
    """How a 2-D array lies in lines along its longer axis, and each line in groups of `run` values."""

    shape: tuple[int, ...]
    run: int
    levels: int

    @classmethod
    def of(cls, shape: Sequence[int], codec: str, name: str) -> _Grid:
        if codec not in _LEVELS:
            raise WireError(f"unknown codec {codec!r}; known: {', '.join([*_FLOATS, *_LEVELS])}")
        if len(shape) != 2:
            raise WireError(f"{name}: {codec} is for arrays of two axes, got {tuple(shape)}; others travel in float32")
        if min(shape) < 0 or (min(shape) == 0 and max(shape) >= 2**31):  # what has no bytes could say anything
            raise WireError(f"{name}: shape {tuple(shape)} is impossible")
        return cls(tuple(shape), max(1, *shape) if codec == "int8" else _RUN, _LEVELS[codec])

    @property
    def lines(self) -> int:
        return min(self.shape)

    @property
    def length(self) -> int:
        return max(self.shape)

    @property
    def groups(self) -> int:
        """Groups of one line."""
        return -(-self.length // self.run)

    @property
    def halves(self) -> bool:
        """Whether two values share a byte."""
        return self.levels < 8

    @property
    def line_bytes(self) -> int:
        """Bytes of one line's values."""
        return -(-self.length // 2) if self.halves else self.length

    @property
    def scale_bytes(self) -> int:
        return self.lines * self.groups * _SCALE.itemsize

    def along(self, x: NDArray[Any]) -> NDArray[Any]:
        """`[lines, length]` of an array of `shape`, and back."""
        return np.ascontiguousarray(x if self.shape[0] <= self.shape[1] else x.T)

    def grouped(self, lines: NDArray[Any]) -> NDArray[Any]:
        """`[lines, groups, run]`; the last group of a line is filled up with zeros."""
        missing = self.groups * self.run - lines.shape[1]
        full = np.pad(lines, ((0, 0), (0, missing))) if missing else lines
        return full.reshape(self.lines, self.groups, self.run)

    def joined(self, groups: NDArray[Any]) -> NDArray[Any]:
        """The inverse of `grouped`."""
        return groups.reshape(self.lines, self.groups * self.run)[:, : self.length]

    def written(self, groups: NDArray[np.int8]) -> NDArray[np.uint8]:
        """Values as bytes, `[lines, line_bytes]`."""
        if not self.halves:
            return self.joined(groups).view(np.uint8)
        pairs = groups.view(np.uint8).reshape(self.lines, self.groups * self.run // 2, 2)[:, : self.line_bytes]
        return pairs[:, :, 0] & np.uint8(15) | pairs[:, :, 1] << np.uint8(4)

    def read(self, data: NDArray[np.uint8], name: str) -> NDArray[np.int8]:
        """The inverse of `written`. Raises: WireError if the empty half of a line is not empty."""
        data = data.reshape(self.lines, self.line_bytes)
        if not self.halves:
            return self.grouped(data.view(np.int8))
        if self.length % 2 and (data[:, -1] > 15).any():
            raise WireError(f"{name}: not canonical: the empty half at the end of a line holds a value")
        pairs = np.stack([data << np.uint8(4), data & np.uint8(240)], axis=2).view(np.int8) >> 4
        return self.grouped(pairs.reshape(self.lines, 2 * self.line_bytes))
