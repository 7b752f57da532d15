"""Epsilon against theorems, quadrature, and the figures of three other accountants."""

from __future__ import annotations

import math
import subprocess
import sys
import warnings

import numpy as np
import pytest
from scipy.integrate import quad
from scipy.stats import norm

from fedlora.errors import ConfigError
from fedlora.privacy.accounting import (
    Event,
    Privacy,
    _pld_epsilon,
    advice,
    epsilon,
    gaussian_delta,
    gaussian_epsilon,
    noise_multiplier,
    require_poisson,
    within,
)

# sampling, noise multiplier, releases, delta; epsilon by Opacus RDP, Opacus PRV, and dp-accounting PLD on a fine grid
TABLE = [
    (1.0, 1.0, 50, 1e-5, 57.30, 54.39, 54.3766),
    (1.0, 5.0, 100, 1e-5, 10.73, 10.008, 9.9973),
    (0.1, 1.0, 100, 1e-5, 7.90, 7.057, 7.047),
    (0.01, 1.0, 1000, 1e-5, 2.101, 1.838, 1.828),
    (0.001, 0.6, 10_000, 1e-6, 3.999, 3.163, 3.152),
]


def event(sampling: float, z: float, times: int = 1) -> Event:
    return Event(noise_multiplier=z, sampling=sampling, times=times)


@pytest.mark.parametrize(("q", "z", "times", "delta", "rdp", "prv", "pld"), TABLE)
def test_the_table(q: float, z: float, times: int, delta: float, rdp: float, prv: float, pld: float) -> None:
    got = epsilon([event(q, z, times)], delta)
    assert got == pytest.approx(pld, rel=1e-3)
    assert pld * 0.9999 <= got < prv < rdp
    if q == 1.0:
        counts = (((z, 1.0), times),)
        assert _pld_epsilon(counts, delta, 1e-3) == pytest.approx(
            gaussian_epsilon(math.sqrt(times) / z, delta), rel=1e-5
        )


@pytest.mark.slow  # Opacus loads for seconds
@pytest.mark.parametrize(("q", "z", "times", "delta", "rdp", "prv", "pld"), TABLE)
def test_the_table_by_opacus(q: float, z: float, times: int, delta: float, rdp: float, prv: float, pld: float) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from opacus.accountants import PRVAccountant, RDPAccountant

        for accountant, want in ((PRVAccountant(), prv), (RDPAccountant(), rdp)):
            accountant.history = [(z, q, times)]
            got = accountant.get_epsilon(delta=delta)
            assert got == pytest.approx(want, rel=2e-3)
            assert got > epsilon([event(q, z, times)], delta)


def hockey_stick(q: float, z: float, eps: float) -> float:
    """Delta of one release on a sample, by quadrature of both directions' hockey-stick divergence."""

    def mixed(x: float) -> float:
        return float((1 - q) * norm.pdf(x, 0, z) + q * norm.pdf(x, 1, z))

    def plain(x: float) -> float:
        return float(norm.pdf(x, 0, z))

    def divergence(p: object, r: object) -> float:
        value, _ = quad(lambda x: max(p(x) - math.exp(eps) * r(x), 0.0), -12 * z, 12 * z + 1, limit=500, epsabs=1e-12)  # type: ignore[operator]
        return float(value)

    return max(divergence(mixed, plain), divergence(plain, mixed))


@pytest.mark.parametrize(("q", "z", "eps"), [(0.1, 1.0, 0.5), (0.5, 0.7, 1.5), (0.02, 2.0, 0.02), (1.0, 1.5, 1.0)])
def test_one_release_against_quadrature(q: float, z: float, eps: float) -> None:
    assert epsilon([event(q, z)], hockey_stick(q, z, eps)) == pytest.approx(eps, rel=2e-3)


def test_the_closed_form_against_its_definition() -> None:
    for mu in (0.3, 1.0, 4.0):
        for eps in (0.1, 1.0, 5.0):
            want = norm.cdf(mu / 2 - eps / mu) - math.exp(eps) * norm.cdf(-mu / 2 - eps / mu)
            assert gaussian_delta(mu, eps) == pytest.approx(float(want), rel=1e-6, abs=1e-15)
            if want > 1e-12:
                assert gaussian_epsilon(mu, float(want)) == pytest.approx(eps, rel=1e-6)
    assert gaussian_epsilon(0.0, 0.1) == 0.0
    assert gaussian_epsilon(0.1, 0.5) == 0.0  # delta alone covers it
    assert 5e5 < gaussian_epsilon(1000.0, 1e-6) < 6e5  # mu^2 / 2 and a little: nothing overflows


def test_releases_add_up_in_any_order_and_split() -> None:
    a, b = event(1.0, 2.0, 3), event(0.1, 1.0, 10)
    assert epsilon([], 1e-5) == 0.0
    assert epsilon([a, b], 1e-5) == epsilon([b, a], 1e-5) == epsilon([b] + [event(1.0, 2.0)] * 3, 1e-5)
    assert epsilon([a, b], 1e-5) > max(epsilon([a], 1e-5), epsilon([b], 1e-5))
    # Gaussian releases are as one whose precision is the sum
    assert epsilon([event(1.0, 3.0), event(1.0, 4.0)], 1e-5) == pytest.approx(epsilon([event(1.0, 2.4)], 1e-5))
    fewer = [epsilon([event(0.01, 1.0, times)], 1e-5) for times in (98, 99, 100, 101)]
    assert fewer == sorted(fewer)


def test_a_null_release_costs_in_full() -> None:
    null = Event(noise_multiplier=1.0, sampling=0.1, times=3, released=False)
    assert epsilon([null], 1e-5) == epsilon([event(0.1, 1.0, 3)], 1e-5) > 0


def test_sampling_never_costs_more_and_little_noise_is_no_trouble() -> None:
    for q, z in ((0.999, 1.0), (0.5, 0.3), (0.001, 0.01), (0.5, 0.01)):
        assert epsilon([event(q, z, 5)], 1e-5) <= epsilon([event(1.0, z, 5)], 1e-5)


@pytest.mark.parametrize(
    ("target", "delta", "q", "times"),
    [(3.0, 1e-5, 1.0, 100), (1.0, 1e-5, 0.05, 200), pytest.param(8.0, 1e-6, 0.01, 2000, marks=pytest.mark.slow)],
)
def test_the_noise_for_a_target_is_the_least(target: float, delta: float, q: float, times: int) -> None:
    z = noise_multiplier(target, delta, sampling=q, times=times)
    assert epsilon([event(q, z, times)], delta) <= target
    assert epsilon([event(q, z / 1.003, times)], delta) > target
    assert all(within([event(q, z, t)], delta, target) for t in (1, times // 2, times - 1, times))
    assert not within([event(q, z, times + times // 50 + 1)], delta, target)


@pytest.mark.parametrize(
    ("clients", "q", "rounds", "want"),
    [(10, 1.0, 20, 19.6), (100, 0.2, 50, 7.1), (1000, 0.05, 100, 2.9), (10_000, 0.01, 200, 0.91)],
)
def test_client_level_in_numbers(clients: int, q: float, rounds: int, want: float) -> None:
    assert epsilon([event(q, 1.0, rounds)], 1 / (10 * clients)) == pytest.approx(want, rel=0.012)


def test_advice_says_what_is_meaningless() -> None:
    assert advice("client", 10, [event(1.0, 1.0, 20)], 0.01) == (
        "10 clients, client level: epsilon 19.6 at delta 0.01 promises next to nothing; use example level."
    )
    assert advice("client", 1000, [event(0.05, 1.0, 100)], 1e-4) == ""
    assert "use more noise, fewer steps" in advice("example", 500, [event(1.0, 1.0, 50)], 1e-5)
    assert "delta 0.1 is not below 1/10" in advice("client", 10, [event(0.5, 20.0)], 0.1)
    assert "sampling 0.001 of 100 rows: most releases will be noise alone" in advice(
        "example", 100, [event(0.001, 1.0)], 1e-4
    )


def test_samples_of_fixed_size_are_refused() -> None:
    require_poisson("poisson")
    with pytest.raises(ConfigError, match="'fixed' is refused: epsilon is counted for Poisson sampling"):
        require_poisson("fixed")
    with pytest.raises(ConfigError, match="must be of kind 'gaussian', got 'fixed-size'"):
        Event.from_json({**event(0.1, 1.0).to_json(), "kind": "fixed-size"})


def test_json_gives_the_event_back_and_nothing_else() -> None:
    e = Event(noise_multiplier=1.1, sampling=0.3, times=7, released=False)
    assert Event.from_json(e.to_json()) == e
    for wrong in ({"times": 1.0}, {"times": True}, {"sampling": "1"}, {"more": 1}, {"noise_multiplier": 1}):
        with pytest.raises(ConfigError, match="an event has the fields"):
            Event.from_json({**e.to_json(), **wrong})


def test_refusals() -> None:
    for z in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(ConfigError, match="noise multiplier must be finite and above 0"):
            event(1.0, z)
    for q in (0.0, 1.1, math.nan):
        with pytest.raises(ConfigError, match="sampling probability must be above 0"):
            event(q, 1.0)
    with pytest.raises(ConfigError, match="at least once"):
        event(1.0, 1.0, 0)
    for delta in (0.0, 1.0, math.nan):
        with pytest.raises(ConfigError, match="delta must be above 0 and below 1"):
            epsilon([event(1.0, 1.0)], delta)
    with pytest.raises(ConfigError, match="target epsilon must be finite"):
        noise_multiplier(0.0, 1e-5)
    with pytest.raises(ConfigError, match="nothing is left"):
        noise_multiplier(1e-9, 1e-12, times=100)
    with pytest.raises(ConfigError, match="expected rows of a step must be finite"):
        Privacy(clip=1.0, noise_multiplier=1.0, sampling=0.1, expected=0.0)


def test_the_charge_of_local_training() -> None:
    assert Privacy(clip=1.0, noise_multiplier=0.8, sampling=0.1, expected=30.0).event(15) == event(0.1, 0.8, 15)


def test_other_accountants_trap() -> None:
    """RDP for replace-one forgets that the sensitivity doubles: 96 where 284 is right; ours is for one more or less."""
    doubled = gaussian_epsilon(2 * math.sqrt(100) / 1.0, 1e-5)
    assert doubled == pytest.approx(284.39, rel=1e-3)
    assert epsilon([event(1.0, 1.0, 100)], 1e-5) < 97 < doubled


def test_the_package_is_loaded_only_when_needed() -> None:
    script = """
import sys
from fedlora.privacy.accounting import Event, epsilon, noise_multiplier
epsilon([Event(noise_multiplier=1.0, times=9)], 1e-5); noise_multiplier(1.0, 1e-5, times=9)
assert "dp_accounting" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_numbers_are_plain_floats() -> None:
    assert type(epsilon([event(0.1, 1.0)], 1e-5)) is float
    assert type(epsilon([event(1.0, float(np.float64(1.0)))], 1e-5)) is float
