"""Paired differences over seeds and what they can show. Loads no JAX.

Suffixes: V variants, S seeds. A difference is taken at each seed, for variants of one seed share first weights and
batches; how much differences scatter is pooled over all variants of a study.
"""

import math
from dataclasses import dataclass
from functools import cache

import numpy as np
from scipy.optimize import brentq
from scipy.special import ndtr, ndtri, stdtrit

LEVEL, POWER = 0.05, 0.80


def t_quantile(share: float, df: int) -> float:
    """The quantile of Student's t with ``df`` degrees of freedom."""
    return float(stdtrit(df, share))


def residual_deviation(values_VS: np.ndarray) -> float:
    """The standard deviation that is left of a cell after its variant's and its seed's mean, df = (V - 1)(S - 1)."""
    V, S = values_VS.shape
    left = values_VS - values_VS.mean(1, keepdims=True) - values_VS.mean(0, keepdims=True) + values_VS.mean()
    return float(np.sqrt(np.square(left).sum() / ((V - 1) * (S - 1))))


@dataclass(frozen=True)
class Difference:
    """A mean difference over seeds. ``deviation``: s, of one seed's difference, sqrt(2) times the pooled residual.
    ``bound``: half of the interval whose ends each have an error of 5%, t(.95, df) s / sqrt(S). ``detectable``: the
    smallest true difference that so many seeds find with 80% power, (t(.95, df) + t(.80, df)) s / sqrt(S)."""

    each_S: np.ndarray
    mean: float
    deviation: float
    bound: float
    detectable: float


def difference(values_VS: np.ndarray, high: int, low: int) -> Difference:
    """Row ``high`` minus row ``low``, measured by the residual of all rows.

    A value that is not finite, that of a run that diverged, counts as the largest finite one. Raises ValueError for
    fewer than two variants or seeds.
    """
    values_VS = np.array(values_VS, np.float64)
    V, S = values_VS.shape
    if V < 2 or S < 2:
        raise ValueError(f"A paired difference needs two variants and two seeds or more, not {V} and {S}.")
    finite = np.isfinite(values_VS)
    if not finite.any():
        raise ValueError("Every run diverged: there is no difference to measure.")
    values_VS[~finite] = values_VS[finite].max()
    each_S, df = values_VS[high] - values_VS[low], (V - 1) * (S - 1)
    deviation = math.sqrt(2) * residual_deviation(values_VS)
    a_t = t_quantile(1 - LEVEL, df)
    return Difference(
        each_S=each_S,
        mean=float(each_S.mean()),
        deviation=deviation,
        bound=a_t * deviation / math.sqrt(S),
        detectable=(a_t + t_quantile(POWER, df)) * deviation / math.sqrt(S),
    )


@cache
def separable(seeds: int) -> float:
    """How far apart the means of two variants must lie for every seed of one to lie above every seed of the other with
    80% power, in deviations of a seed of either: 2.57 for three seeds, 3.11 for five."""
    u = np.linspace(-10.0, 10.0, 4001)
    of_highest = seeds * np.exp(-np.square(u) / 2) / math.sqrt(2 * math.pi) * ndtr(u) ** (seeds - 1)

    def missed(apart: float) -> float:
        return POWER - float(np.trapezoid(of_highest * ndtr(apart - u) ** seeds, u))

    return float(brentq(missed, 0.0, 20.0))


def beyond_all(seeds: int) -> float:
    """How far beyond a bound a mean must lie for every seed to lie beyond it with 80% power, in deviations of a seed:
    1.46 for three seeds, 1.71 for five."""
    return float(ndtri(POWER ** (1 / seeds)))


def rank_correlation(values: np.ndarray) -> float:
    """Spearman's correlation of values with their order; values that are equal share their mean rank."""
    values = np.asarray(values, np.float64)
    ranks = np.array([(np.sum(values < v) + np.sum(values <= v) - 1) / 2 for v in values])
    ranks, order = ranks - ranks.mean(), np.arange(len(values)) - (len(values) - 1) / 2
    size = math.sqrt(float(np.square(ranks).sum() * np.square(order).sum()))
    return float((ranks * order).sum() / size) if size else 0.0


def steps_to(curve: list[tuple[float, float]], target: float) -> float:
    """Tokens at which a curve of (tokens, loss) first is down at ``target``, between two points on their line; inf
    where it never is."""
    before = None
    for tokens, loss in curve:
        if loss <= target:
            if before is None or before[1] <= loss:
                return tokens
            share = (before[1] - target) / (before[1] - loss)
            return before[0] + share * (tokens - before[0])
        before = (tokens, loss)
    return math.inf
