"""Jensen-Shannon divergence of load between domains against values known exactly."""

import numpy as np
import pytest

from deepseek_jax.analysis.specialisation import load_divergence


def test_bounds_and_a_value_by_hand():
    alike, apart = [[3, 1, 0, 0], [6, 2, 0, 0]], [[3, 1, 0, 0], [0, 0, 5, 5]]
    half = [[4, 0, 0, 0], [1, 1, 0, 0]]
    found = load_divergence(np.stack([alike, apart, half], axis=1))
    # Of (1, 0) and (1/2, 1/2): H(3/4, 1/4) - log(2) / 2.
    by_hand = -(0.75 * np.log(0.75) + 0.25 * np.log(0.25)) - np.log(2) / 2
    np.testing.assert_allclose(found, [0, np.log(2), by_hand], atol=1e-12)
    three = np.eye(3, 4)[:, None] * 7
    np.testing.assert_allclose(load_divergence(three), [np.log(3)])


def test_a_domains_size_does_not_matter():
    load = np.random.default_rng(0).integers(0, 50, (3, 2, 8))
    scaled = load * np.array([1, 10, 1000])[:, None, None]
    np.testing.assert_allclose(load_divergence(load), load_divergence(scaled), rtol=1e-12)


def test_domains_without_tokens_take_no_part():
    load = np.random.default_rng(1).integers(1, 50, (2, 2, 8))
    with_none = np.concatenate([load, np.zeros((1, 2, 8), int)])
    np.testing.assert_array_equal(load_divergence(with_none), load_divergence(load))
    with pytest.raises(ValueError, match="two domains or more that have tokens; there are 1"):
        load_divergence(with_none[1:])
