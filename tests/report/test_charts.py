"""Charts from numbers of any size: a run must not fail for what its report draws."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedlora.report.charts import Series, line_chart, ticks


@given(st.floats(1e-290, 1e300), st.sampled_from([0.0, 0.3, 0.999]))
def test_ticks_rise_evenly_and_span_what_is_drawn(high: float, share: float) -> None:
    low = share * high
    found = ticks(low, high)
    assert 2 <= len(found) <= 8
    steps = [b - a for a, b in itertools.pairwise(found)]
    assert min(steps) > 0.0
    assert max(steps) == pytest.approx(min(steps), rel=1e-3)
    slack = 1e-6 * (high - low)
    assert found[0] <= low + slack
    assert found[-1] >= high - slack


@pytest.mark.parametrize("size", [0.0, 5e-324, 5e-16, 1e-9, 1.0, 1e12])
def test_a_line_of_any_size_is_drawn(size: float) -> None:
    svg = line_chart("t", [Series(name="s", points=[(1.0, size), (2.0, size / 2)], tone=1)], "{:.1e}".format)
    assert svg.startswith("<svg")
    assert not any(word in svg for word in ("nan", 'inf"'))
