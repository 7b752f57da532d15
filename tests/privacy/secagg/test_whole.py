"""Whole clients in a secure sum: the coding holds the worst case, and the noise is never less than is charged."""

from __future__ import annotations

import contextlib
import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy.stats import chi2

from fedlora.errors import ConfigError, TrainingError
from fedlora.privacy.clients import ClientPrivacy
from fedlora.privacy.secagg.fixed_point import FixedPoint
from fedlora.privacy.secagg.refusal import Refused
from fedlora.privacy.secagg.update import packing
from fedlora.privacy.secagg.whole import (
    ROUNDING,
    coding,
    count_in,
    event_of,
    own_noise,
    slack_of,
    whole_of,
    whole_vector,
)
from fedlora.state import Whole

TAIL = 8.3  # of `fedlora.privacy.noise`: the inverse normal distribution at 2^-54 is -8.29
INTO = packing({"B:q": (30, 20), "head:w": (5,)})
CLIPS = st.floats(-3.0, 3.0).map(lambda e: 10.0**e)


def widest(size: int, clients: int, clip: float, sd: float) -> int | None:
    """The largest scale that holds the worst sum, by trying all; None where rounding adds more than a thousandth."""
    bound, rounding = clip * math.sqrt(1.25), math.sqrt(size) / 2.0
    for bits in range(60, -60, -1):
        noise = math.ceil(TAIL * sd * 2.0**bits) + 1 if sd else 0
        if clients * (2.0**bits * bound + rounding + noise) <= 2**31 - 1:
            return bits if rounding <= ROUNDING * clip * 2.0**bits else None
    return None


@settings(max_examples=300, deadline=None)
@given(
    clip=CLIPS,
    clients=st.integers(3, 2000),
    size=st.integers(5, 10**6),
    share=st.one_of(st.just(0.0), st.floats(1e-3, 10.0)),
    count=st.one_of(st.none(), st.floats(0.01, 10.0)),
)
def test_no_coordinate_of_any_sum_overflows_and_no_scale_is_wasted(
    clip: float, clients: int, size: int, share: float, count: float | None
) -> None:
    count_noise = count or 0.0
    whole = Whole(clip=clip, noise=share * clip, counted=count is not None, count_noise=count_noise)
    sd = clip * max(share, count_noise)
    best = widest(size, clients, clip, sd)
    found = None
    with contextlib.suppress(Refused):
        found = coding(size, clients, whole)
    if found is None:
        assert best is None or widest(size, clients, clip * (1 - 1e-5), sd * (1 + 1e-5)) is None
        return
    assert best is not None
    assert best - 1 <= found.bits <= best  # the proof has a millionth of slack
    if widest(size, clients, clip * (1 + 1e-5), sd) == best:
        assert found.bits == best
    scale = 2.0**found.bits
    # One coordinate has all of every vector, rounded up, and the largest noise of every client.
    vectors = clients * (scale * math.hypot(clip, 0.5 * clip) + math.sqrt(size) / 2.0)
    noise = clients * (TAIL * sd * scale + 0.5) if sd else 0.0
    assert vectors + noise < 2**31
    assert found.headroom >= noise
    assert math.sqrt(size) / 2.0 <= slack_of(clip) * scale  # what rounding adds to a norm


@pytest.mark.parametrize(
    ("clients", "clip", "sd", "size"),
    [(128, 27.53, 123.263, 2670), (64, 1.18409, 0.228826, 193), (87, 2.129, 11.2805, 14), (138, 0.2543, 0.1955, 1263)],
)
def test_noise_that_almost_fills_the_words_takes_a_smaller_scale(
    clients: int, clip: float, sd: float, size: int
) -> None:
    assert coding(size, clients, Whole(clip=clip, noise=sd)).bits == widest(size, clients, clip, sd)


@settings(max_examples=40, deadline=None)
@given(clip=CLIPS, clients=st.integers(3, 12), share=st.floats(0.01, 5.0), counted=st.booleans(), seed=st.integers(0))
def test_a_decoded_sum_is_the_float_sum_and_the_integer_noise(
    clip: float, clients: int, share: float, counted: bool, seed: int
) -> None:
    whole = Whole(clip=clip, noise=share * clip, counted=counted, count_noise=2.0 if counted else 0.0)
    try:
        grid = coding(INTO.size, clients, whole)
    except Refused:
        assume(False)
    rng = np.random.default_rng(seed)
    total, want, added = np.zeros(INTO.size, np.uint32), np.zeros(INTO.size), np.zeros(INTO.size)
    for _ in range(clients):
        size = clip * 10.0 ** rng.uniform(-2, 2)
        arrays = {k: size * rng.normal(size=s).astype(np.float32) for k, s in INTO.shapes.items()}
        vector = whole_vector(arrays, INTO, ratio=1.0, whole=whole)
        noise = own_noise(INTO, whole, grid.bits)
        assert noise is not None
        total += grid.encode(vector, noise)
        want += vector
        added += noise
    got = grid.decode(total, clients)
    np.testing.assert_allclose(got, want + added * 2.0**-grid.bits, rtol=0, atol=grid.error(clients) * (1 + 1e-9))
    arrays, scalars = INTO.unpack(got)
    assert (scalars["weight"], scalars["loss_before"], scalars["loss_after"]) == (
        0.0,
        0.0,
        0.0,
    )  # neither sent nor noised
    if not counted:
        assert scalars["clipped"] == 0.0


def test_what_a_client_adds_is_clipped_as_one_vector_with_its_indicator() -> None:
    whole = Whole(clip=2.0, counted=True)
    long = {"B:q": np.full((30, 20), 3.0, np.float32), "head:w": np.full(5, 4.0, np.float32)}
    arrays, scalars = INTO.unpack(whole_vector(long, INTO, ratio=0.5, whole=whole))
    assert math.sqrt(sum(float(np.sum(x.astype(float) ** 2)) for x in arrays.values())) == pytest.approx(2.0, rel=1e-6)
    assert arrays["head:w"][0] / arrays["B:q"][0, 0] == pytest.approx(4.0 / 1.5, rel=1e-6)  # B is scaled before
    assert scalars == {"weight": 0.0, "loss_before": 0.0, "loss_after": 0.0, "clipped": -1.0}
    short = {k: x / 1e4 for k, x in long.items()}
    arrays, scalars = INTO.unpack(whole_vector(short, INTO, ratio=1.0, whole=whole))
    np.testing.assert_array_equal(arrays["B:q"], short["B:q"])
    assert count_in(scalars, 2.0) == 0.5
    assert INTO.unpack(whole_vector(short, INTO, ratio=1.0, whole=replace(whole, counted=False)))[1]["clipped"] == 0.0
    with pytest.raises(TrainingError, match="nothing may be sent"):
        whole_vector({**short, "head:w": np.full(5, np.nan, np.float32)}, INTO, ratio=1.0, whole=whole)


@pytest.mark.parametrize("quantile", [None, 0.3])
@pytest.mark.parametrize("z", [0.05, 1.0, 7.5])
@pytest.mark.parametrize("clip", [1e-3, 1.0, 1e3])
def test_the_shares_of_the_parties_are_the_promised_noise_and_one_fewer_is_less(
    quantile: float | None, z: float, clip: float
) -> None:
    for parties, population in itertools.product((3, 4, 17, 1000), (20, 2000)):
        terms = ClientPrivacy(
            clip=clip, noise_multiplier=z, sampling=1.0, counted=1.0, population=population, by="clients",
            parties=parties, quantile=quantile,
        )  # fmt: skip
        whole = whole_of(terms)
        found = event_of(whole, parties).noise_multiplier
        assert z <= found <= z * (1 + 1e-8)
        assert event_of(whole, parties - 1).noise_multiplier < z
        assert event_of(whole, parties + 1).noise_multiplier > z
        assert whole.noise * math.sqrt(parties) >= terms.sd(slack_of(clip))
        assert whole.counted == (quantile is not None)
        if terms.adaptive is not None:
            assert whole.count_noise * math.sqrt(parties) >= terms.adaptive.count_noise


def test_where_the_server_adds_the_noise_the_clients_add_none() -> None:
    terms = ClientPrivacy(clip=2.0, noise_multiplier=1.0, sampling=1.0, counted=1.0, population=9, quantile=0.5)
    assert whole_of(terms) == Whole(clip=2.0, counted=True)
    assert own_noise(INTO, whole_of(terms), 20) is None


@pytest.mark.parametrize(
    "whole",
    [
        Whole(clip=1.0),
        Whole(clip=0.0, noise=1.0),
        Whole(clip=-1.0, noise=1.0),
        Whole(clip=math.nan, noise=1.0),
        Whole(clip=math.inf, noise=1.0),
        Whole(clip=1.0, noise=-1.0),
        Whole(clip=1.0, noise=math.nan),
        Whole(clip=1.0, noise=math.inf),
        Whole(clip=1.0, noise=1e-320),
        Whole(clip=1.0, noise=1.0, counted=True),
        Whole(clip=1.0, noise=1.0, counted=True, count_noise=-3.0),
    ],
)
def test_noise_that_protects_nothing_is_no_event(whole: Whole) -> None:
    with pytest.raises(ConfigError):
        event_of(whole, 3)


@pytest.mark.parametrize("noise", [1e4, 1e12, 1e20, 1e300])
def test_noise_beyond_the_words_is_refused_and_never_wraps_to_nothing(noise: float) -> None:
    """At 2^85 quanta every float is a multiple of 2^32: modulo that, no noise at all."""
    with pytest.raises(ConfigError, match="does not fit in 32 bits"):
        own_noise(INTO, Whole(clip=1.0, noise=noise), 20)
    with pytest.raises(Refused, match="too coarse"):
        coding(INTO.size, 3, Whole(clip=1.0, noise=max(noise, 1e8)))


def test_noise_is_on_all_arrays_and_the_count_with_the_deviation_asked_for() -> None:
    """Chi-square tests of the variance; each fails wrongly once in 10^9 runs."""
    whole = Whole(clip=1.0, noise=0.7, counted=True, count_noise=3.0)
    grid = coding(INTO.size, 20, whole)
    drawn = np.stack([x for x in (own_noise(INTO, whole, grid.bits) for _ in range(200)) if x is not None])
    assert drawn.dtype == np.int32
    arrays, scalars = drawn[:, :-4].ravel() * 2.0**-grid.bits, drawn[:, -4:] * 2.0**-grid.bits
    assert not scalars[:, 1:].any()
    for x, sd in ((arrays, 0.7), (scalars[:, 0], 3.0)):
        low, high = chi2.ppf([5e-10, 1 - 5e-10], len(x))
        assert low < float(x @ x) / sd**2 < high
    assert len(np.unique(drawn[:, :-4], axis=0)) == 200


def test_a_grid_too_coarse_for_the_noise_or_the_clip_is_refused() -> None:
    with pytest.raises(ConfigError, match="too coarse for the grid"):
        own_noise(INTO, Whole(clip=1.0, noise=1e-5), 10)
    with pytest.raises(Refused, match=r"numbers of 2000 clients, a clip of 1 and noise of 10 .*train less"):
        coding(10**6, 2000, Whole(clip=1.0, noise=10.0))
    plain = coding(INTO.size, 10, Whole(clip=3.0))
    assert plain.headroom == 0
    assert plain.bits == FixedPoint(size=INTO.size, clients=10, bound=3.0 * math.sqrt(1.25)).bits
