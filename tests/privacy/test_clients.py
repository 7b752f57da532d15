"""Client-level terms: clip, noise, the fixed denominator, and what a count besides the sum costs."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
from scipy.stats import chi2

from fedlora.config import RunConfig, load_config
from fedlora.errors import ConfigError
from fedlora.privacy.accounting import Event, epsilon, gaussian_epsilon
from fedlora.privacy.clients import ClientPrivacy, client_privacy, planned_releases, promised
from fedlora.privacy.noise import Noise

TERMS = ClientPrivacy(clip=2.0, noise_multiplier=1.5, sampling=0.25, counted=0.25, population=40)
CLIENT = ("method.name=ffa-lora", "privacy.level=client")
WAY = ("continual.method=subspace", "continual.routing=false")
TASKS = ('tasks=[{"name": "a"}, {"name": "b"}]', *WAY)
OVERLAP = ('tasks=[{"name": "a"}, {"name": "b", "start": 2}]', *WAY)


def config(*sets: str) -> RunConfig:
    return load_config(None, [*CLIENT, *sets])


def test_the_denominator_is_planned_and_the_sum_is_divided_by_it() -> None:
    assert TERMS.expected == 10.0
    total = {"B:q": np.full((3, 2), 5.0), "head:w": np.ones(4)}
    found = TERMS.released(total, None)
    assert {k: x.dtype for k, x in found.items()} == {"B:q": np.float32, "head:w": np.float32}
    np.testing.assert_array_equal(found["B:q"], np.full((3, 2), 0.5, np.float32))
    np.testing.assert_array_equal(found["head:w"], np.full(4, 0.1, np.float32))


@pytest.mark.parametrize("slack", [0.0, 0.5])
@pytest.mark.parametrize("quantile", [None, 0.5])
def test_the_noise_has_the_promised_deviation(slack: float, quantile: float | None) -> None:
    """A two-sided chi-square test of the variance; it fails wrongly once in 10^9 runs."""
    terms, n = replace(TERMS, quantile=quantile), 100_000
    x = terms.released({"B:q": np.zeros(n)}, Noise(), slack)["B:q"].astype(np.float64)
    sd = terms.multiplier * (2.0 + slack) / 10.0
    low, high = chi2.ppf([5e-10, 1 - 5e-10], n)
    assert low < float(x @ x) / sd**2 < high
    assert abs(float(x.mean())) < 6.2 * sd / math.sqrt(n)
    assert terms.multiplier == pytest.approx(1.5 if quantile is None else 1.5 / math.sqrt(1.0 - 1.0 / 16.0))


def test_two_releases_never_have_the_same_noise() -> None:
    zero, noise = {"B:q": np.zeros(4)}, Noise()
    found = [TERMS.released(zero, n)["B:q"] for n in (noise, noise, Noise(), Noise())]
    for one, other in itertools.combinations(found, 2):
        assert not np.any(one == other)


def test_sum_and_count_cost_together_what_is_charged() -> None:
    """Theorem 1 of Andrew et al.: the pair is one Gaussian release of sensitivity (C, 1/2)."""
    for z, q, population in itertools.product((0.3, 1.0, 8.0), (0.1, 1.0), (10, 3000)):
        terms = ClientPrivacy(
            clip=3.0, noise_multiplier=z, sampling=q, counted=1.0, population=population, quantile=0.5
        )
        count = terms.adaptive
        assert count is not None
        assert count.count_noise == max(q * population / 20.0, 2.0 * z)
        assert (count.clip, count.quantile, count.expected) == (3.0, 0.5, q * population)
        mu = math.hypot(terms.clip / terms.sd(), 0.5 / count.count_noise)
        assert 1.0 / mu == pytest.approx(z, rel=1e-12)
        assert terms.event().noise_multiplier == z
    assert TERMS.adaptive is None


def test_an_event_is_of_what_is_counted_and_not_of_what_was_drawn() -> None:
    assert TERMS.event(7) == Event(noise_multiplier=1.5, sampling=0.25, times=7)
    assert replace(TERMS, counted=1.0).event() == Event(noise_multiplier=1.5)
    assert TERMS.at(0.5) == replace(TERMS, clip=0.5)


def test_terms_out_of_range() -> None:
    for clip in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(ConfigError, match=r"privacy\.clip must be finite and above 0"):
            replace(TERMS, clip=clip)
    for fields in ({"population": 0}, {"parties": 0}):
        with pytest.raises(ConfigError, match="there must be some"):
            replace(TERMS, **fields)
    with pytest.raises(ConfigError, match="no noise, no privacy"):
        replace(TERMS, noise_multiplier=0.0)
    with pytest.raises(ConfigError, match="sampling probability"):
        replace(TERMS, counted=0.0)


def test_the_terms_of_a_run() -> None:
    sets = ("privacy.noise_multiplier=3", "privacy.clip=0.5", "rounds.clients=40")
    half = ("rounds.fraction=0.5", "rounds.sampling=poisson")
    common = ClientPrivacy(clip=0.5, noise_multiplier=3.0, sampling=1.0, counted=1.0, population=40)
    assert client_privacy(config(*sets)) == common
    assert client_privacy(config(*sets, *half)) == replace(common, sampling=0.5, counted=0.5)
    secure = ("secure.on=true", "secure.least=5")
    assert client_privacy(config(*sets, *half, *secure)) == replace(common, sampling=0.5)  # the server sees who
    own = client_privacy(config(*sets, *secure, "privacy.noise=clients", "privacy.quantile=0.7"))
    assert own == replace(common, by="clients", parties=5, quantile=0.7)
    assert client_privacy(load_config(None, [])) is None
    assert promised(load_config(None, [])) is None


def test_noise_from_epsilon_is_the_smallest_that_keeps_all_rounds_within() -> None:
    wanted = config("privacy.epsilon=4", "rounds.count=20")
    terms = client_privacy(wanted)
    assert terms is not None
    assert promised(wanted) == 4.0
    assert 3.98 < gaussian_epsilon(math.sqrt(20) / terms.noise_multiplier, 1e-5) <= 4.0
    given = config("privacy.noise_multiplier=2", "rounds.count=20")
    assert promised(given) == epsilon([Event(noise_multiplier=2.0, times=20)], 1e-5)


def test_every_task_is_a_release_of_its_own() -> None:
    sets = ("privacy.noise_multiplier=2", "rounds.count=3")
    assert planned_releases(config("privacy.noise_multiplier=2", "rounds.count=3")) == 3
    assert planned_releases(config(*sets, *TASKS)) == 6
    overlapping = config(*sets, *OVERLAP)
    assert planned_releases(overlapping) == 6
    assert promised(overlapping) == gaussian_epsilon(math.sqrt(6) / 2.0, 1e-5)


def test_tasks_that_share_a_sample_are_refused_where_sampling_is_counted() -> None:
    """Drawn for one is drawn for both: z = 1, q = 0.05, 100 rounds come to epsilon 7.7, and 4.8 would be said."""
    sets = ("privacy.noise_multiplier=2", "rounds.count=3", "rounds.sampling=poisson")
    overlap = (*sets, *OVERLAP)
    with pytest.raises(ConfigError, match=r"leave `start` out, or set rounds\.fraction=1"):
        client_privacy(config(*overlap, "rounds.fraction=0.5"))
    assert client_privacy(config(*overlap)) is not None
    assert client_privacy(config(*sets, *TASKS, "rounds.fraction=0.5")) is not None
