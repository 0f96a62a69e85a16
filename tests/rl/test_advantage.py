"""Advantages: statistics by prompt, equal groups exactly 0, rewards that could not be computed left out."""

import numpy as np
import pytest

from deepseek_jax.rl.advantage import advantages, informative

GROUPS = np.repeat(np.arange(3), 4)
REWARDS = np.array([1, 0, 0, 0, 0.5, 0.25, 2, 1, 3, 3, 1, 1])


@pytest.mark.parametrize("scale", ["std", "none"])
def test_statistics_are_by_prompt_and_answers_may_stand_in_any_order(scale):
    found = advantages(REWARDS, GROUPS, scale)
    for group in range(3):
        alone = advantages(REWARDS[group == GROUPS], np.zeros(4), scale)
        np.testing.assert_array_equal(found.value[group == GROUPS], alone.value)
        np.testing.assert_allclose(alone.value.sum(), 0, atol=1e-6)
    order = np.random.default_rng(0).permutation(12)
    np.testing.assert_array_equal(advantages(REWARDS[order], GROUPS[order], scale).value, found.value[order])
    assert found.silent == 0
    assert found.signal.all()


@pytest.mark.parametrize("ddof", [0, 1])
def test_a_group_of_one_has_advantage_0(ddof):
    found = advantages([1.0, 0.0, 3.0], [0, 1, 2], ddof=ddof)
    assert found.value.tolist() == [0, 0, 0]
    assert found.silent == 1


@pytest.mark.parametrize("reward", [0.0, 1.1, 0.2, 1 / 3, 1e-30, 1e30])
@pytest.mark.parametrize("size", [2, 8, 12, 64])
def test_a_group_of_equal_rewards_has_exactly_0(reward, size):
    for dtype in (np.float32, np.float64):
        found = advantages(np.full(size, reward, dtype), np.zeros(size))
        assert (found.value == 0).all()
        assert not found.signal.any()
        assert found.silent == 1
    # And sums of the same parts in two orders.
    orders = np.where(np.arange(size) % 2, (0.1 + 0.2) + 0.3, 0.1 + (0.2 + 0.3))
    assert (advantages(orders, np.zeros(size)).value == 0).all()


def test_the_share_of_silent_groups_counts_groups_not_answers():
    found = advantages([1, 1, 1, 1, 0, 1, 2, 3], [0, 0, 0, 0, 1, 1, 2, 2])
    assert found.silent == pytest.approx(1 / 3)
    assert found.value.dtype == np.float32
    np.testing.assert_allclose(found.value[4:], [-1, 1, -1, 1], rtol=1e-6)


def test_small_differences_are_differences():
    assert advantages([1 + 1.2e-6, 1], np.zeros(2)).signal.all()
    assert not advantages([1 + 0.8e-6, 1], np.zeros(2)).signal.any()
    found = advantages([1e-12, 0, 0, 0], np.zeros(4))
    np.testing.assert_allclose(found.value, advantages([1, 0, 0, 0], np.zeros(4)).value, rtol=1e-6)


def test_a_reward_that_could_not_be_computed_leaves_mean_and_deviation():
    found = advantages([1, 0, 0, 0, np.nan, np.nan, np.nan], [5, 5, 5, 5, 5, 6, 6])
    np.testing.assert_array_equal(found.value[:4], advantages([1, 0, 0, 0], np.zeros(4)).value)
    assert found.value[4:].tolist() == [0, 0, 0]
    assert found.scored.tolist() == [True] * 4 + [False] * 3
    assert found.silent == 0, "a group without any reward is none of the groups counted"


def test_normalising_twice_changes_nothing_so_once_is_enough():
    once = advantages(REWARDS, GROUPS).value
    np.testing.assert_allclose(once[:4].std(), 1, rtol=1e-6)
    np.testing.assert_allclose(advantages(once, GROUPS).value, once, atol=1e-6)
    assert not np.allclose(advantages(REWARDS, GROUPS, "none").value, once)


def test_groups_are_filtered_by_accuracy_not_by_the_sum():
    accuracy = np.array([0, 0, 0, 1, 1, 1, 0, np.nan, 1])
    form = np.array([1, 0, 0, 1, 1, 0, 0, 0, 0])
    group = np.repeat([0, 1, 2], 3)
    assert informative(accuracy.tolist(), group.tolist()).tolist() == [False] * 6 + [True] * 3
    assert advantages(accuracy + form, group).signal[:6].all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([1, 2], [0]), "one of each"),
        (([[1, 2]], [[0, 0]]), "one of each"),
        (([np.inf, 0], [0, 0]), "infinite"),
        (([1, 0], [0, 0], "mean"), "scale='mean'"),
        (([1, 0], [0, 0], "std", 2), "ddof=2"),
    ],
)
def test_bad_arguments_are_one_clear_error(arguments, message):
    with pytest.raises(ValueError, match=message):
        advantages(*arguments)
