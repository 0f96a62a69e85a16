"""The training loss against NumPy on the model's own logits."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import random_model, random_tokens, tiny_config

import deepseek_jax as dsj
from deepseek_jax.core.params import combine, named, partition

CFG = tiny_config(mtp_depth=2)
WEIGHTS = dsj.LossWeights(mtp=0.3, balance=0.01)


@pytest.fixture(scope="module")
def model():
    return random_model(CFG)


@partial(jax.jit, static_argnames="weights")
def loss(model, batch, weights):
    return dsj.loss(model, batch, weights)


def mean_nats(logits, targets):
    """Mean of -log p over targets that are not -1, in float64."""
    logits = np.asarray(logits, np.float64)
    log_p = logits - np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1, keepdims=True))
    log_p -= logits.max(-1, keepdims=True)
    rows, columns = np.nonzero(targets >= 0)
    return -log_p[rows, columns, targets[rows, columns]].mean()


def test_terms_are_those_of_the_paper(model):
    tokens = np.asarray(random_tokens(CFG, 2, 24))
    segments = np.ones_like(tokens)
    segments[0, 10:] = 2
    segments[1, 20:] = 0
    total, out = loss(model, {"tokens": tokens, "segments": segments}, WEIGHTS)
    found = []
    for ahead, logits in enumerate((out.logits, *out.mtp_logits), start=1):
        targets = np.full_like(tokens, -1)
        targets[:, :-ahead] = np.where(segments[:, ahead:] == segments[:, :-ahead], tokens[:, ahead:], -1)
        targets[segments == 0] = -1
        found.append(mean_nats(logits, targets))
    np.testing.assert_allclose(out.losses["main"], found[0], rtol=1e-5)
    np.testing.assert_allclose(out.losses["mtp"], (found[1] + found[2]) / 2, rtol=1e-5)
    balance = sum(a.balance["sequence"].mean(-1).sum() for a in (out.aux, out.mtp_aux))
    np.testing.assert_allclose(total, found[0] + 0.3 * (found[1] + found[2]) / 2 + 0.01 * balance, rtol=1e-5)
    assert int(out.losses["tokens"]) == 9 + 13 + 19


def test_without_mtp_weight_the_modules_are_not_run(model):
    tokens = random_tokens(CFG, 2, 24)
    with_mtp = loss(model, {"tokens": tokens}, dsj.LossWeights(mtp=0.3, balance=0.0))[1]
    total, out = loss(model, {"tokens": tokens}, dsj.LossWeights(mtp=0.0, balance=0.0))
    assert out.mtp_logits == ()
    assert "mtp" not in out.losses
    np.testing.assert_array_equal(out.losses["main"], with_mtp.losses["main"])
    np.testing.assert_array_equal(total, out.losses["main"])


def test_the_router_bias_gets_no_gradient_and_every_parameter_gets_one(model):
    params, rest = partition(model)
    assert not any("bias" in name for name in named(params))
    batch = {"tokens": random_tokens(CFG, 4, 24)}
    gradient = jax.jit(jax.grad(lambda p: dsj.loss(combine(p, rest), batch, WEIGHTS)[0]))(params)
    silent = [name for name, g in named(gradient).items() if not jnp.any(g)]
    assert silent == []


def test_a_batch_needs_tokens(model):
    with pytest.raises(ValueError, match="needs 'tokens'"):
        dsj.loss(model, {"ids": random_tokens(CFG, 1, 4)})
