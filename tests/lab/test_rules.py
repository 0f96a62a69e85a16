"""The rules on simulated studies: how often they are wrong, and how much they see, are what they say."""

import math
from itertools import combinations

import numpy as np
import pytest

from deepseek_jax.lab.rules import (
    OPEN,
    OPPOSITE,
    REPRODUCED,
    UNTESTABLE,
    Beyond,
    FewerSteps,
    NoWorse,
    Ordering,
    Separation,
    Trend,
)
from deepseek_jax.lab.statistics import (
    beyond_all,
    difference,
    rank_correlation,
    residual_deviation,
    separable,
    steps_to,
)

STUDIES, SEEDS = 1500, 5
NAMES = ("a", "b", "c", "d", "e")


def words(rule, effects, *, scale: float = 1.0, seeds: int = SEEDS, mean: float = 100.0) -> dict[str, float]:
    """How often each word falls in simulated studies: a paired difference scatters by ``scale``, seeds by five times
    that. ``effects``: of the variants, in units of ``scale``."""
    rng = np.random.default_rng(0)
    shape = (STUDIES, len(effects), seeds)
    values = mean + rng.normal(0, scale / math.sqrt(2), shape) + rng.normal(0, 5 * scale, (STUDIES, 1, seeds))
    values += scale * np.asarray(effects)[:, None]
    found = [rule.judge(dict(zip(NAMES, study, strict=False))).word for study in values]
    return {word: found.count(word) / STUDIES for word in {*found, REPRODUCED, OPPOSITE, OPEN, UNTESTABLE}}


def test_an_ordering_that_is_none_is_found_in_a_twentieth_each_way():
    found = words(Ordering("m", low="a", high="b"), [0, 0, 0, 0, 0])
    assert 0.02 < found[REPRODUCED] < 0.06
    assert 0.02 < found[OPPOSITE] < 0.06


def test_an_ordering_of_the_size_that_is_called_detectable_is_found_by_four_in_five():
    found = words(Ordering("m", low="a", high="b"), [0, 1.16, 0, 0, 0])
    assert 0.74 < found[REPRODUCED] < 0.85
    assert found[OPPOSITE] == 0


def test_the_detectable_difference_is_the_one_of_the_table_of_power():
    rng = np.random.default_rng(1)
    sizes = [difference(rng.normal(0, math.sqrt(0.5), (5, 5)), 0, 1) for _ in range(2000)]
    assert np.mean([d.detectable for d in sizes]) == pytest.approx(1.16, abs=0.03)
    assert np.mean([d.deviation for d in sizes]) == pytest.approx(1.0, abs=0.03)


def test_seeds_that_are_apart_do_not_count_as_noise():
    base = np.array([[1.0, 2.0, 3.0], [1.0, 2.0, 3.0], [2.0, 3.0, 4.0]])
    assert residual_deviation(base) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize(("margin", "both", "chance"), [(1.5, False, 0.93), (1.5, True, 0.88), (2.0, True, 0.99)])
def test_what_does_no_harm_is_found_harmless_as_often_as_is_said(margin, both, chance):
    found = words(NoWorse("m", "b", "a", margin / 100, both), [0, 0, 0, 0, 0])
    assert found[REPRODUCED] == pytest.approx(chance, abs=0.02)


@pytest.mark.parametrize("both", [False, True])
def test_a_harm_of_the_margin_itself_passes_in_a_twentieth(both):
    found = words(NoWorse("m", "b", "a", 0.02, both), [0, 2, 0, 0, 0])
    assert found[REPRODUCED] < 0.065
    assert found[OPPOSITE] < 0.065


def test_a_margin_within_the_noise_is_not_testable_and_a_harm_beyond_it_is_seen():
    assert words(NoWorse("m", "b", "a", 0.005), [0, 0, 0, 0, 0])[UNTESTABLE] > 0.5
    assert words(NoWorse("m", "b", "a", 0.02), [0, 4, 0, 0, 0])[OPPOSITE] > 0.8


def test_a_gain_is_no_harm_unless_both_sides_count():
    assert words(NoWorse("m", "b", "a", 0.02), [0, -4, 0, 0, 0])[REPRODUCED] == 1
    assert words(NoWorse("m", "b", "a", 0.02, both=True), [0, -4, 0, 0, 0])[OPPOSITE] > 0.8


@pytest.mark.parametrize(("seeds", "ways"), [(3, 20), (5, 252)])
def test_separation_by_chance_is_as_rare_as_is_said(seeds, ways):
    """Of all ways in which the same values may fall to two variants, one is called each."""
    rule, values = Separation("m", low="a", high="b", factor=1.0), np.random.default_rng(0).normal(9, 1, 2 * seeds)
    halves = [list(half) for half in combinations(range(2 * seeds), seeds)]
    found = [rule.judge({"a": values[half], "b": np.delete(values, half)}).word for half in halves]
    assert (len(found), found.count(REPRODUCED), found.count(OPPOSITE)) == (ways, 1, 1)


def test_separation_asks_for_its_factor_in_the_worst_seeds():
    rule = Separation("m", low="a", high="b")
    judged = {b: rule.judge({"a": np.array([0.1, 0.2]), "b": np.array([b, 9.0])}).word for b in (0.41, 0.39, math.inf)}
    assert judged == {0.41: REPRODUCED, 0.39: OPEN, math.inf: REPRODUCED}
    assert rule.judge({"a": np.array([1.0, 2.0]), "b": np.array([0.1, 0.5])}).word == OPPOSITE
    assert rule.judge({"a": np.zeros(2), "b": np.zeros(2)}).word == OPEN


@pytest.mark.parametrize(("seeds", "apart"), [(3, 2.57), (5, 3.11)])
def test_separation_finds_what_it_calls_detectable_in_four_of_five(seeds, apart):
    assert separable(seeds) == pytest.approx(apart, abs=0.01)
    rng, n, rule, s = np.random.default_rng(0), 4000, Separation("m", low="a", high="b", factor=1.5), 0.2
    logs = rng.normal(0, s, (n, 2, seeds))
    logs[:, 1] += math.log(1.5) + separable(seeds) * s
    found = [rule.judge({"a": a, "b": b}).word for a, b in np.exp(logs)]
    assert found.count(REPRODUCED) / n == pytest.approx(0.80, abs=0.03)
    shown = rule.judge({"a": np.exp([-0.2, 0.0, 0.2]), "b": np.exp([-0.2, 0.0, 0.2])})
    assert shown.word == OPEN
    assert f"detectable {1.5 * math.exp(2.572 * 0.2):.2g}" in shown.why
    assert "no figure" in rule.judge({"a": np.array([0.0, 1.0]), "b": np.array([0.5, 2.0])}).why


@pytest.mark.parametrize(("seeds", "beyond"), [(3, 1.46), (5, 1.71)])
def test_a_mean_that_is_called_detectable_is_beyond_its_bound_in_four_of_five(seeds, beyond):
    assert beyond_all(seeds) == pytest.approx(beyond, abs=0.01)
    rng, n, rule = np.random.default_rng(0), 4000, Beyond("m", "a", over=2.0, under=1.0)
    found = [rule.judge({"a": a}).word for a in rng.normal(2 + beyond_all(seeds) * 0.3, 0.3, (n, seeds))]
    assert found.count(REPRODUCED) / n == pytest.approx(0.80, abs=0.03)
    shown = rule.judge({"a": np.array([1.7, 2.0, 2.3])})
    assert shown.word == OPEN
    assert f"detectable {2 + 1.463 * 0.3:.3g}" in shown.why
    assert "no figure" in rule.judge({"a": np.array([1.7, math.inf])}).why


def test_what_has_no_figure_lies_in_no_order():
    some, none = np.array([1.0, 2.0]), np.array([math.nan, 9.0])
    for low, high in ((some, none), (none, some), (some, none[::-1]), (none[::-1], some)):
        assert Separation("m", low="a", high="b").judge({"a": low, "b": high}).word == OPEN


def test_a_bound_is_passed_by_every_seed_or_by_none():
    rule = Beyond("m", "a", over=2.0, under=0.5)
    judged = {value: rule.judge({"a": np.array([value, 3.0])}).word for value in (2.1, 2.0, math.nan)}
    assert judged == {2.1: REPRODUCED, 2.0: OPEN, math.nan: OPEN}
    assert [rule.judge({"a": np.array([0.4, b])}).word for b in (0.1, 0.5)] == [OPPOSITE, OPEN]
    rng, n = np.random.default_rng(0), 4000
    even = Beyond("m", "a", over=0.0, under=0.0)
    found = [even.judge({"a": a}).word for a in rng.normal(0, 1, (n, SEEDS))]
    for word in (REPRODUCED, OPPOSITE):
        assert found.count(word) / n == pytest.approx(2**-SEEDS, abs=0.012)


def test_a_trend_of_nothing_is_rare_and_one_of_all_seeds_is_seen():
    rule = Trend("m", levels=NAMES[:4])
    nothing = words(rule, [0, 0, 0, 0])
    assert max(nothing[REPRODUCED], nothing[OPPOSITE]) < 2**-SEEDS + 0.01
    assert words(rule, [0, 1, 2, 3])[REPRODUCED] == pytest.approx(0.98, abs=0.015)
    assert words(rule, [3, 2, 1, 0])[OPPOSITE] > 0.85
    assert rank_correlation([1, 2, 2, 3]) == pytest.approx(0.9487, abs=1e-4)
    assert rank_correlation([2, 2]) == 0


def test_fewer_steps_are_found_by_their_ratio_and_hardly_ever_by_chance():
    def curve(factor, noise=0.0):
        return [(float(t), 3.0 * (t * factor) ** -0.2 * (1 + noise)) for t in range(1, 21)]

    assert steps_to(curve(1.0), curve(1.0)[-1][1]) == pytest.approx(20)
    assert steps_to([(1.0, 3.0), (2.0, 1.0)], 2.0) == pytest.approx(1.5)
    assert steps_to([(1.0, 3.0)], 2.0) == math.inf
    rng, rule, found = np.random.default_rng(0), FewerSteps("a", "b"), []
    for _ in range(400):
        both = [[curve(1.5, n) for n in rng.normal(0, 0.01, SEEDS)] for _ in range(2)]
        reach = [[(t, loss) for t, loss in one] for one in both[1]]
        # The control stops early, so that both come to its last loss.
        found.append(rule.judge({"a": both[0], "b": [one[:14] for one in reach]}).word)
    assert max(found.count(REPRODUCED), found.count(OPPOSITE)) / 400 < 0.08
    faster = {"a": [curve(2.0, n) for n in (0.0, 0.01, -0.01)], "b": [curve(1.0)] * 3}
    assert rule.judge(faster).word == REPRODUCED
    assert "0.5" in rule.judge(faster).why
    assert rule.judge({"a": [curve(0.5)] * 3, "b": [curve(1.0)] * 3}).word == OPEN
    # Where the last text is harder, both were down at the last loss before.
    harder = [(tokens, loss + (0.3 if tokens == 20 else 0.0)) for tokens, loss in curve(1.0)]
    assert rule.judge({"a": [harder] * 3, "b": [harder] * 3}).word == OPEN
    assert "a needs 0.50 times" in rule.judge({"a": [curve(2.0)] * 3, "b": [harder] * 3}).why
    # A run that diverged has this for its curve.
    gone = rule.judge({"a": [curve(2.0)] * 3, "b": [curve(1.0), [(0.0, math.inf)], curve(1.0)]})
    assert (gone.word, gone.why) == (OPEN, "b comes to no loss at 1 of 3 seeds")
    assert rule.judge({"a": [curve(2.0), [(0.0, math.inf)], curve(2.0)], "b": [curve(1.0)] * 3}).word == OPEN


@pytest.mark.parametrize(("size", "share"), [(0.0, 0.05), (1.38, 0.80)])
def test_a_ratio_of_steps_is_found_as_often_as_is_said(size, share):
    """Logarithms of ratios that scatter by 0.1 around ``size`` deviations."""

    def line(tokens):
        return [(0.0, 2.0), (tokens, 1.0), (9.0, 0.9)]

    rng, n, rule = np.random.default_rng(0), 2000, FewerSteps("a", "b")
    studies = np.exp(rng.normal(-size * 0.1, 0.1, (n, SEEDS)))
    judged = [rule.judge({"a": [line(r) for r in ratios], "b": [line(1.0)[:2]] * SEEDS}) for ratios in studies]
    found = [verdict.word for verdict in judged]
    assert found.count(REPRODUCED) / n == pytest.approx(share, abs=0.03)
    assert found.count(OPPOSITE) / n <= 0.065
    assert all("detectable" in verdict.why for verdict in judged if verdict.word == OPEN)


def test_a_run_that_diverged_counts_as_the_worst():
    d = difference(np.array([[1.0, 1.1, np.inf], [1.0, 1.2, 1.5], [1.1, 1.0, 1.3]]), 0, 1)
    assert d.each_S[2] == 0
    with pytest.raises(ValueError, match="Every run diverged"):
        difference(np.full((2, 2), np.inf), 0, 1)
    with pytest.raises(ValueError, match="two variants and two seeds"):
        difference(np.ones((2, 1)), 0, 1)
