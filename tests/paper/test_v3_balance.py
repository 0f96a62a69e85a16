"""The bias update and the sequence-wise loss: the sign rule, its fixed point, the loss's identities."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import random_model, tiny_config

from deepseek_jax.core.ops import counted
from deepseek_jax.core.params import map_variables
from deepseek_jax.core.partition import partition
from deepseek_jax.model.router import Router, sequence_balance
from deepseek_jax.train.balance import max_violation, router_bias, update_router_bias
from deepseek_jax.train.weights import LossWeights

TINY = tiny_config()


def biases(tree) -> np.ndarray:
    """[L_moe + MTP modules, E], MTP last."""
    routers = (tree.stacks[1].ffn.router, tree.mtp[0].block.ffn.router)
    return np.concatenate([np.asarray(router.bias.get_value()).reshape(-1, 8) for router in routers])


def test_update_is_the_sign_rule():
    # v3_balance C1
    rest = partition(random_model(TINY))[1]
    load = np.array([[9, 1, 5, 5, 5, 5, 5, 5], [0, 0, 0, 0, 0, 0, 0, 8]])
    mtp = np.array([[2, 2, 2, 2, 2, 2, 2, 2]])
    before, after = biases(rest), biases(update_router_bias(rest, jnp.asarray(load), jnp.asarray(mtp), 0.001))
    moved = np.array([[-1, 1, 0, 0, 0, 0, 0, 0], [1, 1, 1, 1, 1, 1, 1, -1], [0] * 8])
    np.testing.assert_allclose(after - before, 0.001 * moved, atol=1e-7)


@pytest.mark.parametrize(("rule", "speed"), [("sign", 0.001), ("proportional", 0.01)])
@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("form", ["sum", "product"])
def test_skewed_scores_are_balanced_by_the_bias_alone(rule, speed, centred, form):
    # Scores whose means differ by expert: without a bias the first experts take nearly all tokens.
    rng = np.random.default_rng(0)
    logit = rng.normal(0, 0.5, (4096, 8)) + np.linspace(1.5, -1.5, 8)
    score = jnp.asarray(1 / (1 + np.exp(-logit)), jnp.float32)
    rest = map_variables(lambda _, bias: bias.replace(0 * bias.get_value()), partition(random_model(TINY))[1])

    def load(rest):
        """Both layers choose by the same scores."""
        router = Router(replace(TINY.moe, n_groups=1, top_groups=1, bias_form=form), 1, jnp.float32)
        loads = []
        for bias in router_bias(rest):
            router.bias.set_value(bias)
            loads.append(counted(router.choose(score[None]), 8))
        return jnp.stack(loads)

    balanced = jax.jit(
        lambda rest: jax.lax.fori_loop(
            0, 1000, lambda _, r: update_router_bias(r, load(r), None, speed, None, rule, centred), rest
        )
    )(rest)
    assert (max_violation(load(rest)) > 1.5).all()
    assert (max_violation(load(balanced)) < 0.02).all()
    assert (np.diff(router_bias(balanced)) > 0).all()
    # By this skew the sign rule's bias drifts; without the steps' means it cannot.
    assert (abs(router_bias(balanced).mean(-1)) < 1e-5).all() == (centred or rule == "proportional")


def test_max_violation():
    load = jnp.asarray([[4, 4, 4, 4], [16, 0, 0, 0], [6, 2, 4, 4]])
    np.testing.assert_allclose(max_violation(load), [0, 3, 0.5])


def test_sequence_loss_lies_between_its_bounds():
    # f sums to E and P to 1. One expert that takes every first place weighs E / K times its share.
    ones = jnp.ones((1, 16), jnp.int32)
    concentrated = jnp.full((1, 16, 8), 1e-6).at[..., :2].set(1.0)
    np.testing.assert_allclose(sequence_balance(concentrated, ones, 2), 4.0, rtol=1e-4)
    np.testing.assert_allclose(sequence_balance(jnp.full((1, 16, 8), 0.3), ones, 2), 1.0, rtol=1e-6)


def test_sequence_loss_pushes_the_busy_expert_down():
    # v3_balance C2
    rng = np.random.default_rng(1)
    logit = jnp.asarray(rng.normal(0, 1, (1, 64, 8)) + np.array([2.0] + [0.0] * 7), jnp.float32)
    ones = jnp.ones((1, 64), jnp.int32)
    gradient = jax.grad(lambda x: sequence_balance(jax.nn.sigmoid(x), ones, 2)[0])(logit)
    assert (gradient[..., 0] > 0).all()


def test_the_papers_weight_is_the_default():
    assert LossWeights().balance == 1e-4
