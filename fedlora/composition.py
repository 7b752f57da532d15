"""Adapters of one base combined after training, as sums of what they do to the weights: `dW_i = s_i B_i A_i`.

    cat               sum_i w_i dW_i, exact: factors stacked, then brought to the lowest rank that holds the sum
    task-arithmetic   lambda * sum_i w_i dW_i; a negative weight unlearns
    ties              lambda * disjoint mean of the trimmed dW_i whose sign agrees with the elected one
    dare              lambda * sum_i w_i drop(dW_i), each entry dropped with probability p, else divided by 1 - p
    dare-ties         the same drop, then the election and the disjoint mean of ties
    lorahub           cat with weights that `search` found on a few examples

Sources: task arithmetic, Ilharco et al., Editing Models with Task Arithmetic, ICLR 2023, section 2; TIES, Yadav et al.,
TIES-Merging: Resolving Interference When Merging Models, NeurIPS 2023, section 4 (algorithm 1); DARE, Yu et al.,
Language Models are Super Mario, ICML 2024, section 3; LoRAHub, Huang et al., LoraHub: Efficient Cross-Task
Generalization via Dynamic LoRA Composition, COLM 2024, section 3.

Where we differ. Everything acts on products, never on factors. A pair (A, B) is only one of many with the same product,
(B M)(M^-1 A) = B A, and trimming, sign election or a weighted sum of A and of B give another result for each: averaging
an adapter with itself by summing sqrt(w) A and sqrt(w) B returns twice the adapter. LoRAHub's paper sums A and B with
the same weights, so its update is quadratic in them and a negative weight acts like a positive one; ours is linear.
For LoRA, task arithmetic is `cat` with one coefficient in front; both names are kept because both are looked for.
TIES trims each module by itself (the paper: all parameters of the model in one ranking); weights, which it has not,
count in the election and in the mean (sum of w_i dW_i over sum of |w_i|, of those that agree), so that they say how
much a source matters and not how large the result is: that is lambda. Where the election ends at exactly 0, the entry
is 0.

Cost, per module, with S the sum of the sources' ranks. cat, task-arithmetic: O((out + in) S^2), factors only. ties,
dare, dare-ties: O(out * in * S) operations and dense float32 arrays `[out, in]`, at most eight at a time whatever the
number of sources, one module after another (4096 x 4096, four sources of rank 16: 0.5 GB, 3 s on one core); their
result has full rank and is cut to `rank`, by SVD, or by a randomised range finder where a module is large. What the cut
loses is in `Composition.error`. LoRAHub's search: one scoring of the examples for each candidate.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from fedlora.adapter import Adapter, Array, Factors, factor_norm, norm, require_same_modules, stack, truncated
from fedlora.errors import AdapterError, ConfigError
from fedlora.rng import stream

__all__ = [
    "HOW",
    "Composition",
    "Found",
    "Recipe",
    "compacted",
    "compose",
    "composed_head",
    "factorised",
    "penalty",
    "search",
]

HOW: Final = ("cat", "task-arithmetic", "ties", "dare", "dare-ties", "lorahub")
DENSE: Final = ("ties", "dare", "dare-ties")
DENSITY: Final = 0.2  # the TIES paper's k
DROP: Final = 0.5
L1: Final = 0.05  # LoRAHub's alpha, on the sum of |w_i|
BOUND: Final = 1.5  # LoRAHub's largest |w_i|
_SMALL: Final = 512  # up to this min(out, in) a dense SVD takes less than a second
_OVERSAMPLING: Final = 16
_POWER_ITERATIONS: Final = 3
_OPTIONS: Final[Mapping[str, tuple[str, tuple[str, ...]]]] = {
    "max_error": ("--max-error", ("cat", "task-arithmetic", "lorahub")),
    "density": ("--density", ("ties",)),
    "drop": ("--drop", ("dare", "dare-ties")),
    "coefficient": ("--lambda", ("task-arithmetic", *DENSE)),
}

Dense = NDArray[np.float32]


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How to combine. What is None takes the default of `how`; an option of another `how` is refused.

    Raises: ConfigError for an unknown `how` (with the nearest name), an option that `how` has not, or a value out of
    its range.
    """

    how: str = "cat"
    rank: int | None = None  # most per module; None: cat needs no bound, the dense ones take the sum of ranks
    max_error: float | None = None  # Frobenius, relative to the combination's norm: the fewest directions within it
    density: float | None = None  # share of each module's entries that TIES keeps; None: 0.2
    drop: float | None = None  # probability p with which DARE drops an entry; None: 0.5
    coefficient: float | None = None  # lambda; None: 1
    seed: int = 0  # of DARE's drops, the range finder's start, LoRAHub's search

    def __post_init__(self) -> None:
        if self.how not in HOW:
            near = difflib.get_close_matches(self.how, HOW, 1, 0.0)[0]
            raise ConfigError(f"--how: no way {self.how!r} to combine; did you mean {near}? There are {', '.join(HOW)}")
        for name, (flag, of) in _OPTIONS.items():
            if getattr(self, name) is not None and self.how not in of:
                raise ConfigError(f"{flag} belongs to {', '.join(of)}; --how is {self.how}{_INSTEAD.get(name, '')}")
        if self.rank is not None and self.rank < 1:
            raise ConfigError(f"--rank: at least 1, got {self.rank}")
        if self.max_error is not None and not 0 < self.max_error < 1:
            raise ConfigError(f"--max-error: a share of the norm above 0 and below 1, got {self.max_error}")
        if self.density is not None and not 0 < self.density <= 1:
            raise ConfigError(f"--density: the share of entries kept, above 0 and at most 1, got {self.density}")
        if self.drop is not None and not 0 <= self.drop < 1:
            raise ConfigError(f"--drop: the probability of dropping an entry, from 0 to below 1, got {self.drop}")
        if self.coefficient is not None and not math.isfinite(self.coefficient):
            raise ConfigError(f"--lambda: a finite number, got {self.coefficient}")
        if self.seed < 0:
            raise ConfigError(f"--seed: 0 or more, got {self.seed}")

    @property
    def settings(self) -> dict[str, float | None]:
        """The options of `how`, with its defaults, as JSON values."""
        given = {
            "max_error": self.max_error,
            "density": self.density or DENSITY,
            "drop": DROP if self.drop is None else self.drop,
            "coefficient": 1.0 if self.coefficient is None else self.coefficient,
        }
        mine = {name: value for name, value in given.items() if self.how in _OPTIONS[name][1]}
        return {"rank": self.rank, **mine, "seed": self.seed}


_INSTEAD: Final[Mapping[str, str]] = {
    "max_error": ": its result has full rank, so say with --rank what to keep; the error is reported",
    "coefficient": ": multiply the weights instead",
}


@dataclass(frozen=True, kw_only=True)
class Composition:
    """The result, with scale 1 in float32; what it left out, and how large the whole was, in Frobenius norm."""

    adapter: Adapter
    error: float
    norm: float  # of the combination before it was cut

    @property
    def relative_error(self) -> float:
        return self.error / self.norm if self.norm > 0.0 else 0.0


def compose(adapters: Sequence[Adapter], weights: Sequence[float], recipe: Recipe) -> Composition:
    """Combine adapters (at least one, the same modules and shapes; any ranks and scales) as `recipe` says.

    `lorahub` is `cat` here: its weights come from `search`. The order of the adapters changes the last bits only, and
    which entries DARE drops. Equal arguments give equal bytes on one machine.
    Raises: AdapterError if modules or shapes differ or a factor is not finite; ConfigError if there is no adapter, not
    a finite weight for each, or `rank` cannot meet `max_error`.
    """
    if not adapters or len(adapters) != len(weights):
        raise ConfigError(f"one weight for each adapter, and at least one: got {len(adapters)} and {len(weights)}")
    if wrong := [w for w in weights if not math.isfinite(w)]:
        raise ConfigError(f"weights must be finite numbers, got {wrong}")
    for other in adapters[1:]:
        require_same_modules(adapters[0], other)
    if recipe.how in DENSE:
        return _composed_dense(adapters, weights, recipe)
    by = 1.0 if recipe.coefficient is None else recipe.coefficient
    terms = [_as(a, np.float64).scaled(by * w) for a, w in zip(adapters, weights, strict=True)]
    whole = compacted(terms)
    size = norm(whole)
    small, error = _cut(whole, recipe)
    return Composition(adapter=_as(small, np.float32), error=error, norm=size)


def compacted(terms: Sequence[Adapter]) -> Adapter:
    """The sum of products at the lowest rank that holds it to float32 rounding, in the form of a compact SVD.

    Directions fall along the rank, singular values are split evenly, scale 1. Left out is what lies below 1e-7 of a
    module's largest singular value, or below 1e-12 of its largest term: what remains where terms cancel.
    Raises: AdapterError as `fedlora.adapter.stack` and `truncate`.
    """
    total = stack(terms)
    exact, _ = truncated(total, {n: min(f.shape) for n, f in total.items()})
    small = {}
    for name, f in exact.items():
        sigma = _singular_values(f)
        floor = 1e-12 * max(factor_norm(term[name]) for term in terms)
        small[name] = _kept(f, int(np.sum(sigma > max(1e-7 * sigma.max(initial=0.0), floor))))
    return Adapter(small)


def _cut(svd: Adapter, recipe: Recipe) -> tuple[Adapter, float]:
    """At most `rank` directions of each module; with `max_error`, the fewest over all modules that stay within it."""
    sigma = {n: _singular_values(f) for n, f in svd.items()}
    most = {n: f.rank if recipe.rank is None else min(f.rank, recipe.rank) for n, f in svd.items()}
    keep = most
    if recipe.max_error is not None:
        squares = np.sort(np.concatenate([np.zeros(0), *sigma.values()])) ** 2
        gone = np.searchsorted(np.cumsum(squares), recipe.max_error**2 * float(np.sum(squares)), side="right")
        edge = math.sqrt(squares[gone]) if gone < len(squares) else math.inf
        keep = {n: int(np.sum(s >= edge)) for n, s in sigma.items()}
        if over := [n for n in keep if keep[n] > most[n]]:
            worst = max(over, key=lambda n: keep[n])
            raise ConfigError(
                f"--max-error {recipe.max_error:g} needs rank {keep[worst]} in {worst}, and --rank allows "
                f"{recipe.rank}: raise the one or the other, or leave one of them out"
            )
    left = math.sqrt(sum(float(np.sum(sigma[n][keep[n] :] ** 2)) for n in svd))
    return Adapter({n: _kept(f, keep[n]) for n, f in svd.items()}), left


def _composed_dense(adapters: Sequence[Adapter], weights: Sequence[float], recipe: Recipe) -> Composition:
    made: dict[str, Factors] = {}
    lost = whole = 0.0
    by = 1.0 if recipe.coefficient is None else recipe.coefficient
    for name, first in adapters[0].items():
        with np.errstate(over="ignore", invalid="ignore"):
            merged = _merged([a[name] for a in adapters], weights, recipe, name)
            merged *= np.float32(by)
        if not np.isfinite(merged).all():
            raise AdapterError(f"{name}: the combination is not finite; is one of the adapters damaged?")
        rank = min(recipe.rank or sum(a[name].rank for a in adapters), *first.shape)
        made[name], error = factorised(merged, rank, seed=recipe.seed, name=name)
        lost += error**2
        whole += _square(merged)
    return Composition(adapter=Adapter(made), error=math.sqrt(lost), norm=math.sqrt(whole))


def _merged(parts: Sequence[Factors], weights: Sequence[float], recipe: Recipe, name: str) -> Dense:
    """One module's combination before lambda, `[out, in]`: two passes for the election, so that memory stays flat."""

    def sparse(i: int) -> Dense:
        """`w_i` times the trimmed or thinned product of source i."""
        dense = np.multiply(parts[i].b, np.float32(parts[i].scale), dtype=np.float32) @ parts[i].a.astype(np.float32)
        if recipe.how == "ties":
            dense = _trimmed(dense, recipe.density or DENSITY)
        else:
            p = DROP if recipe.drop is None else recipe.drop
            dense *= stream(recipe.seed, "dare", i, name).random(dense.shape, np.float32) >= np.float32(p)
            dense *= np.float32(1.0 / (1.0 - p))
        dense *= np.float32(weights[i])
        return dense

    total = np.zeros(parts[0].shape, np.float32)
    for i in range(len(parts)):
        total += sparse(i)
    if recipe.how == "dare":
        return total
    elected = np.sign(total)
    total[:] = 0.0
    share = np.zeros_like(total)
    for i, weight in enumerate(weights):
        voice = sparse(i)
        agree = voice * elected > 0.0
        np.add(total, voice, out=total, where=agree)
        np.add(share, np.float32(abs(weight)), out=share, where=agree)
    return np.divide(total, share, out=total, where=share > 0.0)


def _trimmed(dense: Dense, density: float) -> Dense:
    """The entries of largest magnitude, `density` of all (rounded, at least one; equals of the last one too)."""
    size = np.abs(dense)
    kept = max(1, round(density * dense.size))
    edge = np.partition(size.reshape(-1), dense.size - kept)[dense.size - kept] if dense.size else 0.0
    dense[size < edge] = 0.0
    return dense


def factorised(dense: Dense, rank: int, *, seed: int = 0, name: str = "") -> tuple[Factors, float]:
    """Factors (float32, scale 1) of at most `rank` for `dense [out, in]`, and the Frobenius error that they leave.

    A dense SVD in float64 where min(out, in) is at most 512 or `rank` is not far below it: the best there is (Eckart
    and Young, 1936). Else the randomised range finder with 3 power iterations, 16 further directions and a start drawn
    by `seed` and `name`: close to the best, O(out * in * rank), and the error is that of the result itself (Halko,
    Martinsson and Tropp, Finding Structure with Randomness, SIAM Review 2011, algorithms 4.4 and 5.1). Directions below
    float32 rounding are left out.
    """
    width = min(rank + _OVERSAMPLING, *dense.shape)
    if min(dense.shape) <= _SMALL or 4 * width >= min(dense.shape):
        u, s, vt = np.linalg.svd(dense.astype(np.float64), full_matrices=False)
    else:
        start = stream(seed, "range", name).standard_normal((dense.shape[1], width), np.float32)
        q = _basis(dense @ start)
        for _ in range(_POWER_ITERATIONS):
            q = _basis(dense @ _basis(dense.T @ q))
        small, s, vt = np.linalg.svd((q.T @ dense).astype(np.float64), full_matrices=False)
        u = q.astype(np.float64) @ small
    noise = float(np.finfo(np.float32).eps) * math.sqrt(max(dense.shape))
    keep = min(rank, int(np.sum(s > noise * s.max(initial=0.0))))
    root = np.sqrt(s[:keep])
    a, b = vt[:keep] * root[:, None], u[:, :keep] * root
    f = Factors(np.ascontiguousarray(a, np.float32), np.ascontiguousarray(b, np.float32))
    step = max(1, 2**22 // max(1, dense.shape[1]))
    left = sum(
        _square(dense[at : at + step].astype(np.float64) - f.b[at : at + step].astype(np.float64) @ f.a)
        for at in range(0, dense.shape[0], step)
    )
    return f, math.sqrt(left)


def composed_head(heads: Sequence[Mapping[str, Array]], weights: Sequence[float]) -> dict[str, NDArray[np.float32]]:
    """Dense extras (a classifier's head) by name: the mean with the weights brought to sum 1, folded in float64.

    A head is no update, so it is averaged where products are added; lambda and the trimming do not apply to it.
    Raises: AdapterError if names or shapes differ; ConfigError if there are heads and the weights' sum is not positive.
    """
    shapes = [{n: x.shape for n, x in head.items()} for head in heads]
    if wrong := [s for s in shapes if s != shapes[0]]:
        raise AdapterError(f"heads differ, {shapes[0]} and {wrong[0]}: same labels in every source?")
    if not any(shapes):
        return {}
    total = math.fsum(weights)
    if not total > 0.0:
        raise ConfigError(
            f"the weights' sum is {total:g}: heads are averaged with the weights over their sum, which must be positive"
        )
    out = {}
    for name in heads[0]:
        mean = np.zeros(heads[0][name].shape)
        for head, weight in zip(heads, weights, strict=True):
            mean += weight / total * head[name].astype(np.float64)
        out[name] = mean.astype(np.float32)
    return out


def penalty(weights: Sequence[float]) -> float:
    """What LoRAHub adds to the loss: 0.05 times the sum of |w_i|."""
    return L1 * math.fsum(abs(w) for w in weights)


@dataclass(frozen=True, kw_only=True)
class Found:
    """The best weights that a search saw, their objective (with the penalty), the start's, and how many it tried."""

    weights: tuple[float, ...]
    objective: float
    start: float
    evaluations: int


def search(
    loss: Callable[[tuple[float, ...]], float], start: Sequence[float], *, evaluations: int = 40, seed: int = 0
) -> Found:
    """Minimise `loss(w) + 0.05 * sum |w_i|` over weights in [-1.5, 1.5], without gradients.

    The objective, bounds and default budget are LoRAHub's; it uses nevergrad (and its code the mean of |w_i|), we a
    CMA-ES of standard settings (Hansen, The CMA Evolution Strategy: A Tutorial, 2016, algorithm of figure 6), with
    candidates cut to the box. The start (cut to the box) counts as one evaluation; a loss that is not finite is as bad
    as can be. Deterministic by `seed`.
    Raises: ConfigError if there is no weight, `evaluations` is below 1, or no candidate had a finite loss.
    """
    n = len(start)
    if n < 1 or evaluations < 1:
        raise ConfigError(f"a search needs at least one weight and one evaluation, got {n} and {evaluations}")

    def objective(w: NDArray[np.float64]) -> float:
        weights = tuple(float(x) for x in w)
        value = loss(weights) + penalty(weights)
        return value if math.isfinite(value) else math.inf

    rng = stream(seed, "lorahub", n)
    offspring = 4 + int(3 * math.log(n))
    parents = offspring // 2
    rank_weights = math.log((offspring + 1) / 2) - np.log(np.arange(1, parents + 1))
    rank_weights /= rank_weights.sum()
    mass = 1.0 / float(np.sum(rank_weights**2))
    c_step = (mass + 2) / (n + mass + 5)
    damping = 1 + 2 * max(0.0, math.sqrt((mass - 1) / (n + 1)) - 1) + c_step
    c_path = (4 + mass / n) / (n + 4 + 2 * mass / n)
    c_one = 2 / ((n + 1.3) ** 2 + mass)
    c_many = min(1 - c_one, 2 * (mass - 2 + 1 / mass) / ((n + 2) ** 2 + mass))
    expected = math.sqrt(n) * (1 - 1 / (4 * n) + 1 / (21 * n**2))

    mean = np.clip(np.asarray(start, np.float64), -BOUND, BOUND)
    step, covariance, path, step_path = 0.3, np.eye(n), np.zeros(n), np.zeros(n)
    best, at_start = mean.copy(), objective(mean)
    value, done = at_start, 1
    while done < evaluations:
        spread, axes = np.linalg.eigh(covariance)
        spread = np.sqrt(np.maximum(spread, 1e-20))
        count = min(offspring, evaluations - done)
        points = np.clip(mean + step * (rng.standard_normal((count, n)) * spread) @ axes.T, -BOUND, BOUND)
        values = np.array([objective(p) for p in points])
        done += count
        order = np.argsort(values, kind="stable")
        if values[order[0]] < value:
            best, value = points[order[0]], float(values[order[0]])
        if count < offspring:
            break
        moves = (points[order[:parents]] - mean) / step
        move = rank_weights @ moves
        mean = mean + step * move
        whitened = axes @ ((axes.T @ move) / spread)
        step_path = (1 - c_step) * step_path + math.sqrt(c_step * (2 - c_step) * mass) * whitened
        length = float(np.linalg.norm(step_path))
        generations = (done - 1) / offspring
        steady = length / math.sqrt(1 - (1 - c_step) ** (2 * generations)) < (1.4 + 2 / (n + 1)) * expected
        path = (1 - c_path) * path + steady * math.sqrt(c_path * (2 - c_path) * mass) * move
        many = (moves * rank_weights[:, None]).T @ moves
        fading = (1 - steady) * c_path * (2 - c_path)
        covariance = (1 - c_one - c_many + c_one * fading) * covariance + c_one * np.outer(path, path) + c_many * many
        step *= math.exp(c_step / damping * (length / expected - 1))
    if not math.isfinite(value):
        raise ConfigError(f"none of {done} candidate weights had a finite loss; do examples and adapters fit?")
    return Found(weights=tuple(float(x) for x in best), objective=value, start=at_start, evaluations=done)


def _as(adapter: Adapter, dtype: type[np.float32] | type[np.float64]) -> Adapter:
    return Adapter(
        {n: Factors(f.a.astype(dtype, copy=False), f.b.astype(dtype, copy=False), f.scale) for n, f in adapter.items()}
    )


def _singular_values(f: Factors) -> NDArray[np.float64]:
    """Of factors in the form of `truncate`: a column of b has norm sqrt(sigma)."""
    return np.asarray(np.sum(f.b.astype(np.float64) ** 2, axis=0))


def _kept(f: Factors, rank: int) -> Factors:
    return Factors(np.ascontiguousarray(f.a[:rank]), np.ascontiguousarray(f.b[:, :rank]))


def _basis(x: Array) -> Dense:
    """Orthonormal columns with the span of x, in float32; found in float64."""
    return np.linalg.qr(x.astype(np.float64))[0].astype(np.float32)


def _square(x: Array) -> float:
    return float(np.einsum("ij,ij->", x, x, dtype=np.float64))
