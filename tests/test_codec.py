"""The codecs against a slow twin that goes value by value, and the theorem that coding twice is coding once."""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from typing import get_args

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

from fedlora.codec import BYTES, dequantise, lossless, nbytes, packed, quantise, rounded, travels
from fedlora.errors import WireError
from fedlora.frame import DTYPES
from fedlora.state import Codec

fast = settings(deadline=None, max_examples=40)
CODECS: tuple[Codec, ...] = get_args(Codec)
LEVELS: dict[Codec, int] = {"int8": 127, "int4": 7}
INTEGERS: tuple[Codec, ...] = ("int8", "int4")
LARGEST = float(np.finfo(np.float32).max)

shapes = st.one_of(
    st.tuples(st.integers(0, 5), st.integers(0, 9)),
    st.tuples(st.integers(62, 66), st.integers(1, 2)),
    st.tuples(st.integers(1, 2), st.sampled_from([63, 65, 128, 129])),
)
usual = st.floats(-1e3, 1e3, width=32)
anything = st.one_of(
    usual, st.floats(width=32, allow_nan=False, allow_infinity=False), st.sampled_from([0.0, -0.0, LARGEST, -LARGEST])
)
tiny = st.floats(-(2.0**-110), 2.0**-110, width=32)
arrays = st.one_of(*(hnp.arrays(np.float32, shapes, elements=e) for e in (usual, anything, tiny)))


def bfloat16(x: float) -> float:
    """To nearest, ties to even, by bits; independent of ml_dtypes."""
    (bits,) = struct.unpack("<I", struct.pack("<f", x))
    bits = (bits + 0x7FFF + (bits >> 16 & 1)) & 0xFFFF0000
    (y,) = struct.unpack("<f", struct.pack("<I", bits))
    return float(y)


def groups_of(x: NDArray[np.float32], codec: Codec) -> list[list[list[float]]]:
    """Lines along the longer axis, each as its groups."""
    lines = [list(map(float, line)) for line in (x if x.shape[0] <= x.shape[1] else x.T)]
    run = max(1, *x.shape) if codec == "int8" else 64
    return [[line[i : i + run] for i in range(0, len(line), run)] for line in lines]


def slow_scale(group: Sequence[float], n: int) -> float:
    scale = bfloat16(float(np.float32(max(map(abs, group))) / np.float32(n)))
    return scale if scale >= 2.0**-126 else 0.0


def slow_bytes(x: NDArray[np.float32], codec: Codec) -> bytes:
    scales, values = b"", b""
    for line in groups_of(x, codec):
        q: list[int] = []
        for group in line:
            s = slow_scale(group, LEVELS[codec])
            scales += struct.pack("<f", s)[2:]
            q += [0 if s == 0.0 else round(float(np.float32(v) / np.float32(s))) for v in group]
        if codec == "int8":
            values += struct.pack(f"<{len(q)}b", *q)
        else:
            q += [0] * (len(q) % 2)
            values += bytes(low % 16 + 16 * (high % 16) for low, high in zip(q[::2], q[1::2], strict=True))
    return scales + values


class TestInt:
    @pytest.mark.parametrize("codec", INTEGERS)
    @fast
    @given(x=arrays)
    @example(x=np.full((1, 65), LARGEST, np.float32))
    @example(x=np.array([[LARGEST, -1.0]], np.float32))
    @example(x=np.full((1, 3), 2.0**-149, np.float32))
    @example(x=np.array([[127 * 2.0**-126, 1.0 * 2.0**-126, 0.0]], np.float32))
    def test_bytes_are_those_of_the_slow_twin(self, codec: Codec, x: NDArray[np.float32]) -> None:
        assert quantise(x, codec).tobytes() == slow_bytes(x, codec)

    @pytest.mark.parametrize("codec", INTEGERS)
    @fast
    @given(x=arrays)
    def test_coding_twice_is_coding_once(self, codec: Codec, x: NDArray[np.float32]) -> None:
        first = quantise(x, codec)
        y = dequantise(first, x.shape, codec)
        assert (y.dtype.name, y.shape, y.flags.c_contiguous) == ("float32", x.shape, True)
        assert quantise(y, codec).tobytes() == first.tobytes()
        assert lossless(y, codec)
        assert rounded(y, codec).tobytes() == y.tobytes()

    @pytest.mark.parametrize("codec", INTEGERS)
    @pytest.mark.parametrize("power", [-126, -120, -1, 0, 100, 119])
    def test_the_largest_of_a_group_gets_n_for_every_mantissa(self, codec: Codec, power: int) -> None:
        """The theorem's inequality, at all neighbours of every tie of bfloat16."""
        n = LEVELS[codec]
        ties = 1.0 + (np.arange(129) + 0.5) / 128
        m = (np.concatenate([ties - 2.0**-23, ties, ties + 2.0**-23]) * 2.0**power * n).astype(np.float32)
        x = np.stack([m, -m / 3], axis=1)[:, ::-1].copy()  # lines of two values
        y = np.concatenate([rounded(line[None], codec) for line in x])
        s = np.array([bfloat16(float(v / np.float32(n))) for v in m])
        np.testing.assert_array_equal(y[:, 1], n * s)

    @pytest.mark.parametrize("codec", INTEGERS)
    @fast
    @given(x=hnp.arrays(np.float32, shapes, elements=usual))
    def test_no_value_is_off_by_more_than_half_a_step(self, codec: Codec, x: NDArray[np.float32]) -> None:
        y = rounded(x, codec)
        for line, got in zip(groups_of(x, codec), groups_of(y, codec), strict=True):
            for group, back in zip(line, got, strict=True):
                peak, n = max(map(abs, group)), LEVELS[codec]
                step = peak / n * (1 + 2.0**-8) if peak / n > 2.0**-126 else 2 * peak
                assert max(abs(a - b) for a, b in zip(group, back, strict=True)) <= step / 2 * (1 + 1e-6)

    @pytest.mark.parametrize("codec", INTEGERS)
    @fast
    @given(data=st.data(), shape=shapes)
    def test_all_canonical_bytes_are_accepted_and_come_back(
        self, codec: Codec, data: st.DataObject, shape: tuple[int, int]
    ) -> None:
        rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
        x = np.zeros(shape, np.float32)
        lines = x if shape[0] <= shape[1] else x.T
        n, run = LEVELS[codec], max(1, *shape) if codec == "int8" else 64
        for line in lines:
            for i in range(0, len(line), run):
                group = rng.integers(-n, n + 1, len(line[i : i + run])).astype(np.float32)
                group[rng.integers(len(group))] = n * rng.choice([-1, 1])
                mantissa, power = rng.integers(128, 256) / 128, int(rng.choice([-126, -3, 0, 120]))
                line[i : i + run] = group * np.float32(mantissa * 2.0**power) * rng.choice([0.0, 1.0]) + 0.0
        assert lossless(x, codec)
        assert dequantise(quantise(x, codec), shape, codec).tobytes() == x.tobytes()

    def test_known_bytes(self) -> None:
        x = np.array([[1.0, -0.25, 0.5], [0.0, -0.0, 0.0]], np.float32)
        one = struct.pack("<f", bfloat16(1 / 127))[2:]
        assert quantise(x, "int8").tobytes() == one + bytes(2) + bytes([127, 256 - 32, 64, 0, 0, 0])
        seventh = struct.pack("<f", bfloat16(1 / 7))[2:]
        assert quantise(x, "int4").tobytes() == seventh + bytes(2) + bytes([7 + 16 * 14, 4, 0, 0])
        assert quantise(x.T, "int4").tobytes() == quantise(x, "int4").tobytes()

    @pytest.mark.parametrize("codec", INTEGERS)
    def test_what_is_cut_out_of_a_coded_pair_loses_nothing(self, codec: Codec) -> None:
        rng = np.random.default_rng(0)
        a, b = (rounded(rng.standard_normal(s).astype(np.float32), codec) for s in ((8, 150), (97, 8)))
        for rank in range(9):
            for scale in (1.0, 2.0, 0.25):
                assert lossless(a[:rank] * np.float32(scale), codec)
                assert lossless(b[:, :rank] / np.float32(scale), codec)
        assert not lossless(b / np.float32(3), codec)

    @pytest.mark.parametrize("codec", INTEGERS)
    def test_memory_order_and_dtype_do_not_matter(self, codec: Codec) -> None:
        x = np.random.default_rng(1).standard_normal((70, 5)).astype(np.float32)
        data = quantise(x, codec).tobytes()
        wide = np.zeros((70, 10), np.float32)
        wide[:, ::2] = x
        for same in (np.asfortranarray(x), x.astype(np.float64), wide[:, ::2]):
            assert quantise(same, codec).tobytes() == data
        odd = memoryview(b"?" + data)[1:]
        y = dequantise(np.frombuffer(odd, np.uint8), x.shape, codec)
        assert y.tobytes() == rounded(x, codec).tobytes()

    @pytest.mark.parametrize("codec", INTEGERS)
    @pytest.mark.parametrize("shape", [(0, 0), (0, 5), (5, 0), (0, 200)])
    def test_rank_zero_takes_no_bytes(self, codec: Codec, shape: tuple[int, int]) -> None:
        data = quantise(np.zeros(shape, np.float32), codec)
        assert data.shape == (0,)
        assert dequantise(data, shape, codec).shape == shape

    def test_a_direction_of_small_size_keeps_its_digits(self) -> None:
        rng = np.random.default_rng(2)
        x = rng.standard_normal((2, 300)).astype(np.float32)
        x[1] *= 1e-6
        for y in (rounded(x, "int8"), rounded(x.T, "int8").T):
            off = np.linalg.norm(y - x, axis=1) / np.linalg.norm(x, axis=1)
            assert (off < 0.02).all()


class TestFloats:
    @pytest.mark.parametrize("codec", ["float16", "bfloat16"])
    @fast
    @given(x=hnp.arrays(np.float32, shapes, elements=st.floats(-6e4, 6e4, width=32)))
    def test_coding_twice_is_coding_once(self, codec: Codec, x: NDArray[np.float32]) -> None:
        data = quantise(x, codec)
        y = dequantise(data, x.shape, codec)
        assert data.dtype.name == codec
        assert y.dtype == np.float32
        assert quantise(y, codec).tobytes() == data.tobytes()
        assert lossless(y, codec)
        relative = 2.0**-11 if codec == "float16" else 2.0**-8
        assert (np.abs(y - x) <= np.maximum(relative * np.abs(x), 2.0**-25)).all()

    def test_float32_stays_the_same_array(self) -> None:
        x = np.zeros((2, 3), np.float32)
        assert quantise(x, "float32") is x
        assert dequantise(x, (2, 3), "float32") is x

    def test_they_carry_what_is_not_finite(self) -> None:
        x = np.array([[np.nan, np.inf]], np.float32)
        np.testing.assert_array_equal(rounded(x, "float16"), x)

    def test_overflow_names_the_array(self) -> None:
        with pytest.raises(WireError, match=r"A:q: 70000 overflows float16; choose bfloat16 or float32"):
            quantise(np.array([[7e4, np.inf]], np.float32), "float16", "A:q")
        with pytest.raises(WireError, match=r"A:q: 1e\+300 overflows float32"):
            quantise(np.array([[1e300]]), "int8", "A:q")


class TestSizes:
    @pytest.mark.parametrize("codec", CODECS)
    @fast
    @given(shape=shapes)
    def test_announced_is_what_comes(self, codec: Codec, shape: tuple[int, int]) -> None:
        data = quantise(np.ones(shape, np.float32), codec)
        assert (data.dtype, data.shape) == packed(shape, codec)
        assert data.nbytes == nbytes(shape, codec)
        assert data.dtype in DTYPES.values()

    @pytest.mark.parametrize("codec", CODECS)
    def test_bytes_of_a_value_in_a_long_line(self, codec: Codec) -> None:
        assert nbytes((16, 2**20), codec) / 2**24 == pytest.approx(BYTES[codec], rel=1e-5)
        assert BYTES.keys() == set(CODECS)

    def test_of_a_usual_pair(self) -> None:
        assert nbytes((16, 2048), "int8") == nbytes((2048, 16), "int8") == 16 * 2048 + 16 * 2
        assert nbytes((16, 2048), "int4") == 16 * 1024 + 16 * 32 * 2
        assert nbytes((3, 65), "int4") == 3 * 33 + 3 * 2 * 2

    def test_who_travels_in_the_codec(self) -> None:
        assert travels("A:probe", (2, 3))
        assert not travels("probe:q", (2, 3))
        assert not travels("head:bias", (3,))
        assert not travels("head:conv", (3, 3, 3))


def coded(codec: Codec, shape: tuple[int, int] = (2, 65)) -> NDArray[np.uint8]:
    x = np.random.default_rng(3).standard_normal(shape).astype(np.float32)
    return np.array(quantise(x, codec))


class TestRefused:
    """`dequantise` takes what `quantise` writes and nothing else."""

    @pytest.mark.parametrize("codec", INTEGERS)
    @pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
    def test_what_is_not_finite(self, codec: Codec, value: float) -> None:
        x = np.ones((3, 4), np.float32)
        x[1, 2] = value
        with pytest.raises(WireError, match=r"B:up: 1 of 12 values are NaN or infinite, and int. has no such values"):
            quantise(x, codec, "B:up")

    @pytest.mark.parametrize("codec", CODECS)
    def test_another_shape_or_dtype(self, codec: Codec) -> None:
        data = quantise(np.ones((2, 65), np.float32), codec)
        with pytest.raises(WireError, match=rf"A:q: {codec} of \(2, 67\) is .*; does the sender use another codec"):
            dequantise(data, (2, 67), codec, "A:q")
        with pytest.raises(WireError, match=r"A:q: .* got int64"):
            dequantise(np.zeros(data.shape, np.int64), (2, 65), codec, "A:q")

    @pytest.mark.parametrize("codec", INTEGERS)
    @pytest.mark.parametrize(
        ("scale", "says"),
        [
            (math.nan, "nan"),
            (math.inf, "inf"),
            (-1.0, "-1"),
            (-0.0, "-0"),
            (2.0**-127, "5.87747e-39"),
            (2.0**126, "8.50706e"),
        ],
    )
    def test_a_scale_that_is_never_written(self, codec: Codec, scale: float, says: str) -> None:
        data = coded(codec)
        data[2:4] = np.frombuffer(struct.pack("<f", scale)[2:], np.uint8)
        with pytest.raises(WireError, match=f"A:q: a scale is {says}.*; scales are 0 or normal positive numbers"):
            dequantise(data, (2, 65), codec, "A:q")

    def test_the_largest_scale_that_is_written(self) -> None:
        for codec, n in LEVELS.items():
            data = quantise(np.full((1, 1), LARGEST, np.float32), codec)
            assert dequantise(data, (1, 1), codec)[0, 0] == n * bfloat16(LARGEST / n) < LARGEST

    @pytest.mark.parametrize(("codec", "byte", "value"), [("int8", 0x80, -128), ("int4", 0x08, -8), ("int4", 0x80, -8)])
    def test_the_value_without_a_positive_twin(self, codec: Codec, byte: int, value: int) -> None:
        data = coded(codec)
        data[20] = byte
        with pytest.raises(WireError, match=rf"A:q: {codec} has no value {value}; its values are from"):
            dequantise(data, (2, 65), codec, "A:q")

    @pytest.mark.parametrize("codec", INTEGERS)
    def test_a_group_without_its_largest_value(self, codec: Codec) -> None:
        data = np.array(quantise(np.array([[1.0, 0.1, 0.2]], np.float32), codec))
        data[2] -= 1  # 127 -> 126, or 7 -> 6
        with pytest.raises(WireError, match=r"A:q: not canonical: the largest value of every group is"):
            dequantise(data, (1, 3), codec, "A:q")

    @pytest.mark.parametrize("codec", INTEGERS)
    def test_values_in_a_group_of_scale_zero(self, codec: Codec) -> None:
        data = np.array(quantise(np.zeros((1, 3), np.float32), codec))
        data[2] = 1
        with pytest.raises(WireError, match=r"A:q: not canonical: .* all are 0 where that is 0"):
            dequantise(data, (1, 3), codec, "A:q")

    def test_an_empty_half_that_is_not_empty(self) -> None:
        data = coded("int4")
        data[-1] |= 0x10
        with pytest.raises(WireError, match=r"A:q: not canonical: the empty half at the end of a line holds a value"):
            dequantise(data, (2, 65), "int4", "A:q")

    @pytest.mark.parametrize("codec", INTEGERS)
    def test_no_flipped_bit_gives_the_values_of_other_bytes(self, codec: Codec) -> None:
        shape = (3, 5)
        data = coded(codec, shape)
        accepted = 0
        for bit in range(8 * len(data)):
            other = data.copy()
            other[bit // 8] ^= 1 << bit % 8
            try:
                y = dequantise(other, shape, codec)
            except WireError:
                continue
            accepted += 1
            assert quantise(y, codec).tobytes() == other.tobytes()
        assert accepted

    @pytest.mark.parametrize("codec", INTEGERS)
    @pytest.mark.parametrize("shape", [(4,), (2, 2, 2), ()])
    def test_other_numbers_of_axes(self, codec: Codec, shape: tuple[int, ...]) -> None:
        with pytest.raises(
            WireError, match=r"head:bias: int. is for arrays of two axes, got .*; others travel in float32"
        ):
            quantise(np.ones(shape, np.float32), codec, "head:bias")
        with pytest.raises(WireError, match="two axes"):
            packed(shape, codec)

    @pytest.mark.parametrize("shape", [(-1, -1), (3, -1), (2**31, 0)])
    def test_impossible_shapes(self, shape: tuple[int, int]) -> None:
        with pytest.raises(WireError, match=r"A:q: shape .* is impossible"):
            packed(shape, "int8", "A:q")
        with pytest.raises(WireError, match=r"A:q: shape .* is impossible"):
            dequantise(np.zeros(3, np.uint8), shape, "int8", "A:q")

    def test_an_unknown_codec(self) -> None:
        with pytest.raises(WireError, match="unknown codec 'int2'; known: float32, float16, bfloat16, int8, int4"):
            quantise(np.ones((1, 1), np.float32), "int2")  # type: ignore[arg-type]

    def test_minus_zero_is_not_lost_without_notice(self) -> None:
        x = np.array([[127.0, -0.0]], np.float32)
        assert not lossless(x, "int8")
        assert lossless(x, "bfloat16")
        assert lossless(np.abs(x), "int8")
