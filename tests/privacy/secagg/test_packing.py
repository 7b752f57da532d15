"""Arrays and scalars come back from the vector, and its digest is that of its layout."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedlora.errors import AdapterError
from fedlora.privacy.secagg.packing import Packing

shapes = st.dictionaries(
    st.text("abcxyz.", min_size=1, max_size=4), st.lists(st.integers(0, 4), max_size=3).map(tuple), max_size=4
)


@given(shapes=shapes, scalars=st.sets(st.sampled_from(["loss", "examples", "weight"])), seed=st.integers(0, 99))
def test_there_and_back(shapes: dict[str, tuple[int, ...]], scalars: set[str], seed: int) -> None:
    rng, packing = np.random.default_rng(seed), Packing(shapes, tuple(scalars))
    arrays = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    arrays = {name: np.asarray(x, np.float32) for name, x in arrays.items()}
    numbers = {name: float(np.float32(rng.standard_normal())) for name in scalars}
    vector = packing.pack(arrays, numbers)
    assert vector.shape == (packing.size,)
    assert vector.dtype == np.float32
    back, found = packing.unpack(vector)
    assert found == numbers
    assert back.keys() == arrays.keys()
    for name, x in arrays.items():
        np.testing.assert_array_equal(back[name], x)


def test_the_digest_is_of_names_shapes_and_scalars_not_of_order() -> None:
    one = Packing({"a": (2, 3), "b": (1,)}, ("x", "y"))
    assert one.digest == Packing({"b": (1,), "a": (2, 3)}, ("y", "x")).digest
    others = [Packing({"a": (3, 2), "b": (1,)}, ("x", "y")), Packing({"a": (2, 3)}, ("x", "y")),
              Packing({"a": (2, 3), "c": (1,)}, ("x", "y")), Packing({"a": (2, 3), "b": (1,)}, ("x",))]  # fmt: skip
    assert len({p.digest for p in [one, *others]}) == 5


def test_sums_of_vectors_are_vectors_of_sums() -> None:
    packing = Packing({"a": (2, 2)}, ("n",))
    total = sum(packing.pack({"a": np.full((2, 2), v, np.float32)}, {"n": v}).astype(np.float64) for v in (1.0, 2.0))
    arrays, scalars = packing.unpack(np.asarray(total))
    np.testing.assert_array_equal(arrays["a"], np.full((2, 2), 3.0))
    assert scalars == {"n": 3.0}


def test_refusals() -> None:
    packing = Packing({"a": (2, 2)}, ("n",))
    good = np.zeros((2, 2), np.float32)
    for arrays, scalars in (
        ({}, {"n": 1.0}),
        ({"a": good[0]}, {"n": 1.0}),
        ({"a": good}, {}),
        ({"a": good, "b": good}, {"n": 1.0}),
    ):
        with pytest.raises(AdapterError, match="packed are"):
            packing.pack(arrays, scalars)
    with pytest.raises(AdapterError, match="was packed"):
        packing.unpack(np.zeros(4))
