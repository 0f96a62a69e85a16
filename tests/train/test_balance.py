"""The router bias's update against numbers computed by hand."""

import jax.numpy as jnp
import numpy as np
import pytest
from tiny import random_model, tiny_config

import deepseek_jax as dsj
from deepseek_jax.train.balance import max_violation

CFG = tiny_config()
LOAD = jnp.array([[4, 0, 2, 2, 2, 2, 2, 2], [9, 1, 1, 1, 1, 1, 1, 1]], jnp.int32)
# Up below the mean of 2, down above it, unmoved on it.
MOVES = [[-1, 1, 0, 0, 0, 0, 0, 0], [-1, 1, 1, 1, 1, 1, 1, 1]]


def biases(rest):
    return np.asarray(rest.stacks[1].ffn.router.bias.get_value()), np.asarray(
        rest.mtp[0].block.ffn.router.bias.get_value()
    )


def test_each_bias_moves_by_the_speed_towards_balance():
    _, rest = dsj.partition(random_model(CFG))
    before, mtp_before = biases(rest)
    after, mtp_after = biases(dsj.update_router_bias(rest, LOAD, LOAD[1:], 0.001))
    np.testing.assert_allclose(after - before, 0.001 * np.array(MOVES), atol=1e-8)
    np.testing.assert_allclose(mtp_after - mtp_before, 0.001 * np.array(MOVES[1]), atol=1e-8)
    assert after.dtype == np.float32
    # Pure: the tree that was handed in is as it was.
    np.testing.assert_array_equal(biases(rest)[0], before)


def test_without_a_load_for_mtp_its_bias_stays():
    _, rest = dsj.partition(random_model(CFG))
    np.testing.assert_array_equal(biases(dsj.update_router_bias(rest, LOAD, None, 0.001))[1], biases(rest)[1])


def test_a_load_for_other_layers_is_refused():
    _, rest = dsj.partition(random_model(CFG))
    with pytest.raises(ValueError, match=r"load must have shape \(2, 8\)"):
        dsj.update_router_bias(rest, LOAD[:1], None, 0.001)
    with pytest.raises(ValueError, match=r"mtp_load must have shape \(1, 8\)"):
        dsj.update_router_bias(rest, LOAD, LOAD, 0.001)


def test_max_violation():
    np.testing.assert_allclose(max_violation(LOAD), [1.0, 3.5])
