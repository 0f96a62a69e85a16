"""The rules by which a claim is judged, one for each kind: values, made before the first result. Loads no JAX.

A rule says which variants it compares, by which measure, and what follows from the values of all seeds. How often it
errs stands in its docstring, and `tests/lab/test_rules.py` holds it on simulated data. Suffix: S seeds.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Protocol

import numpy as np

from deepseek_jax.lab.statistics import (
    LEVEL,
    POWER,
    Difference,
    beyond_all,
    difference,
    rank_correlation,
    separable,
    steps_to,
    t_quantile,
)

REPRODUCED, OPPOSITE, OPEN = "reproduced", "opposite", "open"
MECHANISM, UNTESTABLE = "mechanism only", "not testable here"
WORDS = (REPRODUCED, OPPOSITE, OPEN, MECHANISM, UNTESTABLE)

# Variant -> a measure's value at each seed; all of a study's variants that have every seed.
Values = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Verdict:
    """One of `WORDS`, and the figures that it follows from in a line."""

    word: str
    why: str


class Rule(Protocol):
    """``measure``: a name of `records.MEASURES`. ``variants``: those that it compares. ``pooled``: whether it measures
    noise by all of a study's variants, and is judged once all of them are there."""

    measure: str
    pooled: ClassVar[bool]

    @property
    def variants(self) -> tuple[str, ...]: ...

    def judge(self, values: Values) -> Verdict: ...


@dataclass(frozen=True)
class Separation:
    """The lowest seed of ``high`` lies above the highest of ``low`` by ``factor``; opposite: the other way round.

    Where both variants do the same and ``factor`` is 1, each way has a chance of 1 / C(2S, S): 1 in 20 for three seeds,
    1 in 252 for five; a larger factor makes it smaller. Found in 80 of 100 studies: medians apart by ``factor``, times
    e to 3.11 deviations of the logarithms (2.57 for three seeds). Not for values that may be negative.
    """

    measure: str
    low: str
    high: str
    factor: float = 2.0
    pooled: ClassVar[bool] = False

    @property
    def variants(self) -> tuple[str, ...]:
        return self.low, self.high

    def judge(self, values: Values) -> Verdict:
        low_S, high_S = values[self.low], values[self.high]
        why = f"{self.low} {_range(low_S)}, {self.high} {_range(high_S)}, asked for a factor of {self.factor:g}"
        # Two that are 0 throughout lie in no order; NaN lies in none with anything.
        if np.min(high_S) >= self.factor * np.max(low_S) and np.min(high_S) > np.max(low_S):
            return Verdict(REPRODUCED, why)
        if np.min(low_S) >= self.factor * np.max(high_S) and np.min(low_S) > np.max(high_S):
            return Verdict(OPPOSITE, why)
        logs_VS = _logs(low_S, high_S)
        if logs_VS is None:
            return Verdict(OPEN, f"{why}; what would have been seen has no figure where values are 0 or none")
        seen = self.factor * math.exp(separable(len(low_S)) * _scatter(logs_VS))
        return Verdict(OPEN, f"{why} (detectable {seen:.2g} between medians)")


@dataclass(frozen=True)
class Beyond:
    """Every seed of ``variant`` lies above ``over``; opposite: every seed below ``under``.

    Where a seed falls on either side of a bound alike, each way has a chance of 2^-S: 1 in 8 for three seeds, 1 in 32
    for five. A mean beyond the bound by 1.71 deviations of a seed (1.46 for three) is found in 80 of 100 studies.
    """

    measure: str
    variant: str
    over: float
    under: float
    pooled: ClassVar[bool] = False

    @property
    def variants(self) -> tuple[str, ...]:
        return (self.variant,)

    def judge(self, values: Values) -> Verdict:
        values_S = values[self.variant]
        why = f"{self.variant} {_range(values_S)}, asked for more than {self.over:g}"
        if all(value > self.over for value in values_S):
            return Verdict(REPRODUCED, why)
        if all(value < self.under for value in values_S):
            return Verdict(OPPOSITE, f"{why}, below {self.under:g}")
        if not np.isfinite(values_S).all():
            return Verdict(OPEN, f"{why}; what would have been seen has no figure where values have none")
        seen = self.over + beyond_all(len(values_S)) * _scatter(np.asarray(values_S)[None])
        return Verdict(OPEN, f"{why} (detectable {seen:.3g})")


@dataclass(frozen=True)
class Ordering:
    """``high`` lies above ``low``: the mean difference beyond pooled noise, and all seeds but one agree at least.

    Where both do the same, at most 5% each way. With five seeds of five variants a difference of 1.16 deviations (of a
    paired difference) is found in about 80 of 100 studies.
    """

    measure: str
    low: str
    high: str
    pooled: ClassVar[bool] = True

    @property
    def variants(self) -> tuple[str, ...]:
        return self.low, self.high

    def judge(self, values: Values) -> Verdict:
        return self._judged(_difference(values, self.high, self.low))

    def _judged(self, d: Difference) -> Verdict:
        why = f"{self.high} - {self.low} = {_signed(d)}"
        if d.mean >= d.bound and _agree(d.each_S > 0):
            return Verdict(REPRODUCED, why)
        if d.mean <= -d.bound and _agree(d.each_S < 0):
            return Verdict(OPPOSITE, why)
        return Verdict(OPEN, why)


@dataclass(frozen=True)
class NoWorse:
    """``variant`` lies above ``control`` by less than ``margin``, a share of the control's mean; opposite: by more.
    ``both``: nor does it lie below by as much.

    Where the harm is the margin itself, at most 5% each way. Where there is none, a margin of 1.5 deviations of a
    paired difference is enough in about 93 of 100 studies of five seeds and variants, with ``both`` in 88, one of 2 in
    99. Under 1.5 the claim is not testable, for the study would too often say nothing.
    """

    measure: str
    variant: str
    control: str
    margin: float
    both: bool = False
    pooled: ClassVar[bool] = True

    @property
    def variants(self) -> tuple[str, ...]:
        return self.variant, self.control

    def judge(self, values: Values) -> Verdict:
        d, allowed = _difference(values, self.variant, self.control), self.margin * float(np.mean(values[self.control]))
        why = f"{self.variant} - {self.control} = {_signed(d)}; the margin is {allowed:.3g}"
        harm = abs(d.mean) if self.both else d.mean
        if harm + d.bound < allowed:
            return Verdict(REPRODUCED, why)
        if harm - d.bound > allowed:
            return Verdict(OPPOSITE, why)
        if allowed < 1.5 * d.deviation:
            return Verdict(UNTESTABLE, f"{why}, less than 1.5 deviations of {d.deviation:.3g}")
        return Verdict(OPEN, why)


@dataclass(frozen=True)
class Trend:
    """The measure rises along ``levels``: its rank correlation with their order is positive at every seed, and the ends
    are apart as in `Ordering`. Opposite: it falls, by the same rule.

    Where the levels do nothing, at most 2^-S each way (5% more could not be seen), and less for the ends. With five
    seeds of four levels, steps of one deviation (of a paired difference) are found in about 98 of 100 studies.
    """

    measure: str
    levels: tuple[str, ...]
    pooled: ClassVar[bool] = True

    @property
    def variants(self) -> tuple[str, ...]:
        return self.levels

    def judge(self, values: Values) -> Verdict:
        each_S = [rank_correlation(column) for column in np.stack([values[level] for level in self.levels], axis=1)]
        ends = Ordering(self.measure, self.levels[0], self.levels[-1]).judge(values)
        why = f"rank correlations {_range(np.asarray(each_S))}; {ends.why}"
        if all(r > 0 for r in each_S) and ends.word == REPRODUCED:
            return Verdict(REPRODUCED, why)
        if all(r < 0 for r in each_S) and ends.word == OPPOSITE:
            return Verdict(OPPOSITE, why)
        return Verdict(OPEN, why)


@dataclass(frozen=True)
class FewerSteps:
    """``variant`` needs fewer tokens than ``control`` to come to the control's last loss: the upper 95% bound of the
    geometric mean of the ratio lies under 1; opposite: the lower one over 1. ``measure`` is a curve. Both are taken
    where they first come there: text that is harder at the end holds the control up as well.

    Where both need the same, at most 5% each way. Found in 80 of 100 studies of five seeds: a ratio whose logarithm is
    1.38 deviations of a seed's. A seed that never comes there, or whose control diverged, leaves it open.
    """

    variant: str
    control: str
    measure: str = "curve"
    pooled: ClassVar[bool] = False

    @property
    def variants(self) -> tuple[str, ...]:
        return self.variant, self.control

    def judge(self, values: Values) -> Verdict:
        pairs = list(zip(values[self.variant], values[self.control], strict=True))
        if gone := sum(not math.isfinite(control[-1][1]) for _, control in pairs):
            return Verdict(OPEN, f"{self.control} comes to no loss at {gone} of {len(pairs)} seeds")
        ratios = [steps_to(curve, control[-1][1]) / steps_to(control, control[-1][1]) for curve, control in pairs]
        if not all(map(math.isfinite, ratios)):
            return Verdict(OPEN, f"{sum(map(math.isinf, ratios))} of {len(ratios)} seeds never come to the loss")
        logs, n = np.log(ratios), len(ratios)
        error, a_t = float(logs.std(ddof=1)) / math.sqrt(n), t_quantile(1 - LEVEL, n - 1)
        low, mean, high = (math.exp(float(logs.mean()) + by * a_t * error) for by in (-1, 0, 1))
        why = f"{self.variant} needs {mean:.2f} times the tokens of {self.control} ({low:.2f} to {high:.2f})"
        if low <= 1 <= high:
            seen = math.exp(-(a_t + t_quantile(POWER, n - 1)) * error)
            return Verdict(OPEN, f"{why} (detectable {seen:.2f})")
        return Verdict(REPRODUCED if high < 1 else OPPOSITE, why)


def _difference(values: Values, high: str, low: str) -> Difference:
    names = list(values)
    return difference(np.stack([values[name] for name in names]), names.index(high), names.index(low))


def _agree(signs_S: np.ndarray) -> bool:
    return int(np.sum(signs_S)) >= len(signs_S) - 1


def _signed(d: Difference) -> str:
    return f"{d.mean:+.3g} +- {d.bound:.2g} (one seed's scatters by {d.deviation:.2g}, detectable {d.detectable:.2g})"


def _logs(*rows: np.ndarray) -> np.ndarray | None:
    """The logarithms of variants' values [V, S]; None where some have none."""
    values_VS = np.stack([np.asarray(row, np.float64) for row in rows])
    return np.log(values_VS) if np.isfinite(values_VS).all() and (values_VS > 0).all() else None


def _scatter(values_VS: np.ndarray) -> float:
    """The standard deviation of a seed around its variant's mean."""
    return float(np.sqrt(np.mean(np.var(values_VS, axis=1, ddof=1))))


def _range(values_S: np.ndarray) -> str:
    return f"{min(values_S):.3g} to {max(values_S):.3g}"
