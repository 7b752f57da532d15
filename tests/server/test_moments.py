"""Moments that rows may have pass, whatever the rows; what no rows have is refused by name, one client at a time."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from fedlora.continual.router import omega
from fedlora.errors import AnswerRejected
from fedlora.rng import public_normal
from fedlora.state import Answer, Ask, Measure
from server.admission import require_moments

WIDTH, SKETCH, CLASSES, COLUMNS = 12, 5, 4, 6
WHAT = Measure(sketch=SKETCH, seed=3, classes=CLASSES, columns=COLUMNS, reads=CLASSES)
Arrays = dict[str, NDArray[np.float32]]


def given_by(x: NDArray[np.float64], labels: NDArray[np.int64]) -> Answer:
    """The slow twin of a client: moments of rows `x [n, WIDTH]`, which are inputs, features (of norm 1) and reads."""
    n, test = len(x), public_normal(3, "sketch", "q", shape=(WIDTH, SKETCH))
    f, wide = x / np.linalg.norm(x, axis=1, keepdims=True), omega(3, WIDTH, COLUMNS)
    one = np.eye(CLASSES)[labels]
    found = {
        "sketch:q": x.T @ x @ test / n,
        "energy:q": np.array([np.sum(x**2) / n]),
        "feature:sum": one.T @ f,
        "feature:count": one.sum(0),
        "feature:sketch": f.T @ f @ wide,
        "read:sum": one.T @ x / n,
        "read:count": one.sum(0) / n,
        "read:energy": np.array([np.sum(x**2) / n]),
        "read:sketch": x.T @ x @ wide / n,
    }
    return Answer(examples=n, arrays={k: v.astype(np.float32) for k, v in found.items()})


@given(
    st.integers(1, 30),
    st.integers(1, 8),
    st.sampled_from([0.0, 1e-4, 1e-2, 1.0]),
    st.sampled_from([1e-3, 1.0, 300.0]),
    st.integers(0, 2**32 - 1),
)
def test_what_rows_have_passes(rows: int, kinds: int, spread: float, size: float, seed: int) -> None:
    """Few rows and many, rows that repeat, near copies, far from the origin, small and large."""
    rng = np.random.default_rng(seed)
    which = rng.integers(0, kinds, rows)
    x = size * (rng.normal(3.0, 1.0, (kinds, WIDTH))[which] + spread * rng.normal(size=(rows, WIDTH)))
    require_moments(Ask(measure=WHAT), given_by(x, which % CLASSES), "a")


def negated(arrays: Arrays) -> None:
    arrays["sketch:q"] *= -1


def turned(arrays: Arrays) -> None:
    arrays["sketch:q"] = arrays["sketch:q"][::-1].copy()


def enlarged(arrays: Arrays) -> None:
    arrays["sketch:q"] *= 1.3


def miscounted(arrays: Arrays) -> None:
    arrays["feature:count"][0] += 1


def long_feature(arrays: Arrays) -> None:
    arrays["feature:sum"] *= 3


def without_rows(arrays: Arrays) -> None:
    arrays["feature:count"][:2] = 20.0, 0.0


def means_off_features(arrays: Arrays) -> None:
    beside_the_rows(arrays, "feature", 40.0)


def other_features(arrays: Arrays) -> None:
    arrays["feature:sketch"] *= 2


def long_read(arrays: Arrays) -> None:
    arrays["read:sum"][1] *= 50


def reads_without_rows(arrays: Arrays) -> None:
    arrays["read:count"][:2] = 0.5, 0.0


def other_reads(arrays: Arrays) -> None:
    arrays["read:sketch"] *= 1.3


def means_off_reads(arrays: Arrays) -> None:
    beside_the_rows(arrays, "read", float(arrays["read:energy"][0]))


def beside_the_rows(arrays: Arrays, name: str, energy: float) -> None:
    """Means no longer than rows are, all within the energy, but not where the second moment has any."""
    counts = arrays[f"{name}:count"]
    flat = np.linalg.svd(arrays[f"{name}:sketch"])[0][:, -1]
    arrays[f"{name}:sum"][:] = np.sqrt(0.5 * energy / counts.sum()) * counts[:, None] * flat


@pytest.mark.parametrize(
    ("forge", "why"),
    [
        (negated, "the approximation holds|asymmetric"),
        (turned, "Omega.T Y is asymmetric by"),
        (enlarged, "the approximation holds .* and the inputs' whole energy is"),
        (miscounted, "features of 41 rows were counted, and it measured 40"),
        (long_feature, r"feature:sum of class \d has norm .*, and 10 features of norm 1 have no larger sum"),
        (without_rows, "feature:sum of class 1 has norm .*, and 0 features"),
        (means_off_features, "the approximation holds|asymmetric"),
        (other_features, "the approximation holds"),
        (long_read, "the means of classes in read:sum hold .*, and the energy of all is"),
        (reads_without_rows, "read:sum of class 1 is not 0, and it has no rows"),
        (other_reads, "the approximation holds"),
        (means_off_reads, "the approximation holds|asymmetric"),
    ],
)
def test_what_no_rows_have_is_refused_by_name(forge: Callable[[Arrays], None], why: str) -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(40, 4)) @ rng.normal(size=(4, WIDTH))  # of rank 4: the sketches hold all of it
    answer = given_by(x, np.arange(40) % CLASSES)
    require_moments(Ask(measure=WHAT), answer, "mallory")
    forge(answer.arrays)  # type: ignore[arg-type]
    with pytest.raises(AnswerRejected, match=why) as caught:
        require_moments(Ask(measure=WHAT), answer, "mallory")
    assert (caught.value.client, caught.value.rule) == ("mallory", "moments")


@pytest.mark.parametrize("name", ["feature", "read"])
def test_a_sketch_is_held_to_the_energy_of_classes_of_one_point_too(name: str) -> None:
    """Within such classes nothing is left to look at; the second moment of all rows is still one."""
    labels = np.arange(40) % CLASSES
    x = np.random.default_rng(1).normal(size=(CLASSES, WIDTH))[labels]
    answer = given_by(x, labels)
    require_moments(Ask(measure=WHAT), answer, "mallory")
    answer.arrays[f"{name}:sketch"][:] *= 2.0
    with pytest.raises(AnswerRejected, match="moments: the approximation holds"):
        require_moments(Ask(measure=WHAT), answer, "mallory")


def test_other_asks_have_no_moments() -> None:
    require_moments(Ask(), Answer(), "a")
    require_moments(Ask(measure=Measure(fisher=3)), Answer(), "a")
