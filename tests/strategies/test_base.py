"""The registry, and the sums that every method shares."""

from __future__ import annotations

import numpy as np
import pytest

from fedlora.errors import MethodError
from fedlora.state import Layout, Module
from strategies.base import METHODS, Sums, get, opened, pair_of, relative


def test_get_gives_the_registered_method() -> None:
    assert all(get(name) is method and method.name == name for name, method in METHODS.items())


@pytest.mark.parametrize(("wrong", "near"), [("fedIT", "fedit"), ("ffa_lora", "ffa-lora"), ("Flora", "flora")])
def test_an_unknown_name_is_refused_with_the_nearest(wrong: str, near: str) -> None:
    with pytest.raises(MethodError, match=rf"no method is called '{wrong}'; did you mean '{near}'\? There are: fed-sb"):
        get(wrong)


def test_a_name_near_to_nothing_lists_all() -> None:
    with pytest.raises(MethodError, match="no method is called 'zzz'; There are: "):
        get("zzz")


def test_sums_pad_at_the_end_of_every_axis() -> None:
    sums = Sums({"A:q": (3, 2), "B:q": (2, 3)})
    sums.add({"A:q": np.ones((1, 2), np.float32), "B:q": np.full((2, 2), 2.0, np.float32)}, 1.0)
    sums.add({"A:q": np.ones((3, 2), np.float32), "B:q": np.full((2, 3), 4.0, np.float32)}, 3.0)
    mean = sums.mean()
    np.testing.assert_array_equal(mean["A:q"], [[1, 1], [0.75, 0.75], [0.75, 0.75]])
    np.testing.assert_array_equal(mean["B:q"], [[3.5, 3.5, 3.0], [3.5, 3.5, 3.0]])
    assert mean["A:q"].dtype == np.float64


def test_sums_of_half_precision_do_not_accumulate_in_it() -> None:
    sums = Sums({"x": (1,)})
    for _ in range(5000):
        sums.add({"x": np.array([0.1], np.float16)}, 1.0)
    assert sums.mean()["x"][0] == pytest.approx(float(np.float16(0.1)), rel=1e-12)


def test_a_state_without_a_pair_is_refused() -> None:
    state = opened("base", Layout(modules={"q": Module(out=2, inp=3)}), 0)
    with pytest.raises(MethodError, match="ffa-lora: this state keeps no pair"):
        pair_of(state, "ffa-lora")


def test_relative() -> None:
    assert (relative(1.0, 4.0), relative(0.0, 0.0), relative(1.0, 0.0)) == (0.25, 0.0, float("inf"))
