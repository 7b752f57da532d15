"""What an attack on a private release has shown: lower bounds on epsilon, to hold beside the epsilon that is claimed.

Canaries (made-up clients or rows) join by fair coins of the auditor; an attack gives each a score, higher for those
that it takes to have joined. Three ways turn scores and coins into a bound:

- `gaussian_bound` takes scores to be normal with one shift mu, as with noise that is Gaussian: the strongest, and
  asymptotic: its confidence is that of many canaries, no finite-sample bound. In the manner of Andrew et al., One-shot
  Empirical Privacy Estimation for Federated Learning, ICLR 2024 (arXiv 2302.03098).
- `one_run_bound` holds for any scores and any number of canaries: Steinke, Nasr and Jagielski, Privacy Auditing with
  One (1) Training Run, NeurIPS 2023 (arXiv 2305.08846), theorem 5.2. m canaries can show little more than log m.
- `threshold_bound` is Clopper and Pearson's interval for the error rates of "joined if the score is among the k
  highest": Jagielski et al., NeurIPS 2020 (arXiv 2006.07709). It takes canaries for independent trials, which those of
  one run are not quite.

A bound below the claim proves nothing: a better attack may exist. One above it says that code or claim is wrong, or
that chance, which `confidence` bounds, has struck.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from fedlora.errors import ConfigError
from fedlora.privacy.accounting import gaussian_epsilon

__all__ = [
    "CLAIM",
    "Finding",
    "Inverted",
    "LedgerFinding",
    "LowerBound",
    "auc",
    "bounds",
    "gaussian_bound",
    "one_run_bound",
    "threshold_bound",
]

CLAIM: Final = "lower bound from one attack"
_MU: Final = 100.0  # more is not told apart: epsilon is above 5000 then
_EPSILON: Final = 50.0  # where the search for a rigorous bound ends; no number of canaries comes near it
_CUTS: Final = (0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95)  # shares of canaries above a threshold
_GUESSES: Final = (0.1, 0.25, 0.5)  # shares of canaries that are guessed; the others are abstained from

Scores = NDArray[np.float64]
Joined = NDArray[np.bool_]


@dataclass(frozen=True, kw_only=True)
class LowerBound:
    """Epsilon is at least `epsilon` at `delta`, with `confidence`, as far as `assumes` holds. It shows nothing private.

    `attack`: what gave the scores. `way`: what made a bound of them. `mu`: the shift over the noise, where it is
    estimated. `canaries`: how many there were.
    """

    attack: str
    way: str
    epsilon: float
    delta: float
    confidence: float
    assumes: str
    canaries: int
    mu: float | None = None

    def __str__(self) -> str:
        return (
            f"epsilon >= {self.epsilon:.3g} at delta {self.delta:g} ({CLAIM}: {self.attack}, {self.way}; confidence "
            f"{self.confidence:.4g}, {self.assumes})"
        )


@dataclass(frozen=True, kw_only=True)
class Finding:
    """What the attacks on one thing found: `claimed` epsilon at `delta`, the bounds, the area under the ROC curve.

    `settings`: what was audited, for the record; JSON values.
    """

    what: str
    claimed: float
    delta: float
    auc: float
    bounds: tuple[LowerBound, ...]
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def best(self) -> LowerBound:
        """The largest of the bounds."""
        return max(self.bounds, key=lambda bound: bound.epsilon)

    @property
    def flagged(self) -> bool:
        """Whether a bound is above the claim: code or claim is wrong, but for the chance that `confidence` leaves."""
        return self.best.epsilon > self.claimed

    def to_json(self) -> dict[str, Any]:
        """All of it, and `says`, what it is."""
        best = asdict(self.best)
        return {"says": CLAIM, **asdict(self), "best": best, "flagged": self.flagged, "settings": dict(self.settings)}


@dataclass(frozen=True, kw_only=True)
class LedgerFinding:
    """One client's ledger beside a run's log: exact, no attack.

    `rounds` were answered, of `steps` steps in all; `uncharged`: those without a charge. `charged_steps` and `charged`,
    an epsilon, are of this run's charges; `told` is what the run says that a client spent at most.
    """

    client: str
    rounds: int
    uncharged: tuple[int, ...]
    steps: int
    charged_steps: int
    charged: float
    told: float

    @property
    def flagged(self) -> bool:
        """Whether something was released that nobody counted, or more was charged than is told."""
        short = self.charged_steps < self.steps
        return bool(self.uncharged) or short or self.charged > self.told * (1.0 + 1e-9)

    def to_json(self) -> dict[str, Any]:
        """All of it."""
        return {**asdict(self), "uncharged": list(self.uncharged), "flagged": self.flagged}


@dataclass(frozen=True, kw_only=True)
class Inverted:
    """What was read out of one update of a client.

    `tokens`: how many different ones the batch could give away; `found`: how many of them were recovered; `wrong`: how
    many that were not there. `ranked`: how many of the nearest `tokens` candidates were there, of which chance gives
    `by_chance`. `texts`: the sequences recovered; `whole`: how many of the `rows` are among them, word for word.
    """

    kind: str
    rows: int
    tokens: int
    found: int
    wrong: int
    ranked: int
    by_chance: float
    texts: tuple[str, ...]
    whole: int


def auc(scores: Scores, joined: Joined) -> float:
    """The chance that one that joined scores above one that did not, ties by half; 0.5 is blind. Both are `[m]`.

    Raises: ConfigError unless some joined and some did not, and all scores are finite.
    """
    from scipy.stats import rankdata

    inside, outside = _split(scores, joined)
    ranks = rankdata(np.concatenate([inside, outside]))[: len(inside)]
    return float((ranks.sum() - len(inside) * (len(inside) + 1) / 2) / (len(inside) * len(outside)))


def gaussian_bound(
    scores: Scores, joined: Joined, *, delta: float, confidence: float = 0.999, attack: str
) -> LowerBound:
    """From mu = (mean that joined - mean that did not) / pooled standard deviation; `scores`, `joined` `[m]`.

    Its variance is about 1/n_in + 1/n_out + mu^2 / (2 m) (Hedges and Olkin 1985, section 5.E, large samples). The lower
    end of mu's one-sided interval is turned into epsilon by `gaussian_epsilon`. Cut at mu = 100.
    Raises: ConfigError as `auc`, for fewer than 3 canaries, or a number out of its range.
    """
    from scipy.special import ndtri

    _check(confidence)
    inside, outside = _split(scores, joined)
    m = len(inside) + len(outside)
    if m < 3:
        raise ConfigError(f"an audit needs at least 3 canaries, got {m}")
    shift = float(inside.mean() - outside.mean())
    squares = ((inside - inside.mean()) ** 2).sum() + ((outside - outside.mean()) ** 2).sum()
    spread = math.sqrt(float(squares) / (m - 2))
    mu = min(shift / spread, _MU) if spread > abs(shift) / _MU else math.copysign(_MU, shift) if shift else 0.0
    error = math.sqrt(1.0 / len(inside) + 1.0 / len(outside) + mu * mu / (2.0 * m))
    least = max(0.0, mu - float(ndtri(confidence)) * error)
    return LowerBound(
        attack=attack,
        way="normal scores",
        epsilon=gaussian_epsilon(least, delta),
        delta=delta,
        confidence=confidence,
        assumes="asymptotic: for many canaries and normal scores, no finite-sample bound",
        canaries=m,
        mu=mu,
    )


def one_run_bound(
    scores: Scores, joined: Joined, *, delta: float, confidence: float = 0.999, attack: str
) -> LowerBound:
    """Guess that the highest scores joined and the lowest did not; the bound is rigorous. `scores`, `joined` `[m]`.

    The coins must be fair, independent and unknown to the attack, and each canary on its own. Guessed are a tenth, a
    quarter and a half of the canaries, and the best of the three counts at a third of the allowed error each.
    Raises: ConfigError as `auc`, or for a number out of its range.
    """
    _check(confidence)
    _split(scores, joined)
    m, level = len(scores), (1.0 - confidence) / len(_GUESSES)
    order = np.argsort(scores, kind="stable")
    best = 0.0
    for share in _GUESSES:
        half = max(1, round(share * m / 2))
        correct = int((~joined[order[:half]]).sum() + joined[order[-half:]].sum())
        best = max(best, _rejected(partial(_p_value, m, 2 * half, correct, delta), level))
    return LowerBound(
        attack=attack,
        way="one run",
        epsilon=best,
        delta=delta,
        confidence=confidence,
        assumes="rigorous for any number of canaries that join by fair coins",
        canaries=m,
    )


def threshold_bound(
    scores: Scores, joined: Joined, *, delta: float, confidence: float = 0.999, attack: str
) -> LowerBound:
    """The best of seven thresholds, each at a share of the allowed error. `scores`, `joined` `[m]`.

    (epsilon, delta) allows TPR <= e^epsilon FPR + delta, and 1 - FPR <= e^epsilon (1 - TPR) + delta.
    Raises: ConfigError as `auc`, or for a number out of its range.
    """
    from scipy.stats import beta

    _check(confidence)
    inside, outside = _split(scores, joined)
    level = (1.0 - confidence) / (4 * len(_CUTS))  # two rates, two directions

    def most(hits: int, of: int) -> float:
        return 1.0 if hits == of else float(beta.ppf(1.0 - level, hits + 1, of - hits))

    best = 0.0
    for share in _CUTS:
        cut = float(np.quantile(scores, 1.0 - share))
        told, wrong = int((inside > cut).sum()), int((outside > cut).sum())
        missed, right = len(inside) - told, len(outside) - wrong
        for high, of_high, low, of_low in (
            (told, len(inside), wrong, len(outside)),
            (right, len(outside), missed, len(inside)),
        ):
            least = 1.0 - most(of_high - high, of_high)
            if least > delta:
                best = max(best, math.log((least - delta) / most(low, of_low)))
    return LowerBound(
        attack=attack,
        way="thresholds",
        epsilon=best,
        delta=delta,
        confidence=confidence,
        assumes="if canaries are independent trials, which those of one run are not quite",
        canaries=len(scores),
    )


def _p_value(m: int, guesses: int, correct: int, delta: float, epsilon: float) -> float:
    """The most likely that an (epsilon, delta) private release lets so many of m canaries be guessed.

    P[X >= v] + 2 m delta max_i P[v > X >= v - i] / i with X ~ Binomial(guesses, 1 / (1 + e^-epsilon)).
    """
    from scipy.stats import binom

    rate = 1.0 / (1.0 + math.exp(-epsilon))
    p = float(binom.sf(correct - 1, guesses, rate))
    if delta and correct:
        below = np.cumsum(binom.pmf(np.arange(correct - 1, -1, -1), guesses, rate))
        p += 2.0 * m * delta * float((below / np.arange(1, correct + 1)).max())
    return min(1.0, p)


def _rejected(p_value: Callable[[float], float], level: float) -> float:
    """The largest epsilon found whose p-value is at most `level`, 0.0 if none is; all below it are rejected with it."""
    if p_value(0.0) > level:
        return 0.0
    low, high = 0.0, _EPSILON
    while high - low > 1e-4:
        middle = (low + high) / 2.0
        low, high = (middle, high) if p_value(middle) <= level else (low, middle)
    return low


def _split(scores: Scores, joined: Joined) -> tuple[Scores, Scores]:
    if scores.ndim != 1 or scores.shape != joined.shape or joined.dtype != np.bool_:
        raise ConfigError(f"an audit needs a score and a coin for each canary, got {scores.shape} and {joined.shape}")
    if not np.isfinite(scores).all():
        raise ConfigError(f"an audit's scores must be finite; {int((~np.isfinite(scores)).sum())} are not")
    if joined.all() or not joined.any():
        raise ConfigError(f"an audit needs canaries that joined and others; of {len(joined)}, {joined.sum()} did")
    return scores[joined].astype(np.float64), scores[~joined].astype(np.float64)


def _check(confidence: float) -> None:
    if not 0.5 <= confidence < 1.0:
        raise ConfigError(f"a confidence must be from 0.5 to below 1, got {confidence}")


def bounds(
    scores: Scores, joined: Joined, *, delta: float, confidence: float = 0.999, attack: str
) -> Sequence[LowerBound]:
    """All three of one attack's scores."""
    return [
        way(scores, joined, delta=delta, confidence=confidence, attack=attack)
        for way in (gaussian_bound, one_run_bound, threshold_bound)
    ]
