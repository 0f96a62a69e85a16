"""Multi-token prediction: the combination, the causal chain, shared weights, the loss, the real module's size."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import forward, relative
from tiny import random_model, random_tokens, tiny_config

import deepseek_jax as dsj
from deepseek_jax.core.params import is_trained, is_variable, map_variables
from deepseek_jax.model.transformer import abstract
from deepseek_jax.train.loss import count, mtp_divisors
from deepseek_jax.train.weights import LossWeights

CFG = tiny_config(mtp_depth=2)
T = 24


@pytest.fixture(scope="module")
def model():
    return random_model(CFG)


@pytest.fixture(scope="module")
def tokens():
    return random_tokens(CFG, 2, T)


run = partial(forward, with_mtp=True)


def change(model, path, f):
    """The model with one leaf replaced."""

    def visit(where, variable):
        return variable.replace(f(variable.get_value())) if where == path else variable

    return map_variables(visit, model)


def test_combination_is_the_papers_up_to_the_order_of_halves(model, tokens):
    """Equation 21 with the hidden state first, its matrix's halves exchanged, gives the module's input."""
    module = model.mtp[0]
    hidden = jnp.asarray(np.random.default_rng(2).normal(0, 1, (2, T, CFG.dim)), jnp.float32)
    embedding = model.embed.get_value()[tokens]
    proj = module.proj.get_value()
    paper = jnp.concatenate([proj[CFG.dim :], proj[: CFG.dim]])
    h, e = module.hidden_norm(hidden), module.embed_norm(embedding)
    ours = jnp.concatenate([e, h], -1) @ proj
    assert relative(jnp.concatenate([h, e], -1) @ paper, ours) <= 2e-6
    # The order matters: the matrix is not symmetric in its halves.
    assert relative(jnp.concatenate([h, e], -1) @ proj, ours) > 0.1


def test_each_module_sees_one_token_more(model, tokens):
    # v3_mtp C1
    """A change of token 12 reaches the main logits from 12 on, module 0's from 11 on, module 1's from 10 on."""
    a, b = run(model, tokens), run(model, tokens.at[:, 12].add(1))
    for logits, first in ((a.logits, 12), (a.mtp_logits[0], 11), (a.mtp_logits[1], 10)):
        other = {12: b.logits, 11: b.mtp_logits[0], 10: b.mtp_logits[1]}[first]
        np.testing.assert_array_equal(logits[:, :first], other[:, :first])
        assert (np.abs(logits[:, first] - other[:, first]).max(-1) > 1e-3).all()


def test_embedding_and_head_are_the_main_models(model, tokens):
    base = run(model, tokens)
    doubled = run(change(model, ("head",), lambda w: 2 * w), tokens)
    for a, b in zip((base.logits, *base.mtp_logits), (doubled.logits, *doubled.mtp_logits), strict=True):
        np.testing.assert_array_equal(2 * a, b)
    assert not [v for v in jax.tree.leaves(model.mtp, is_leaf=is_variable) if CFG.vocab_size in v.get_value().shape]


def mean_nats(logits, tokens, ahead: int) -> float:
    """The mean cross-entropy of the token ``ahead`` places on, by hand."""
    logits = np.asarray(logits, np.float64)[:, : T - ahead]
    target = np.asarray(tokens)[:, ahead:]
    nats = np.log(np.exp(logits).sum(-1)) - np.take_along_axis(logits, target[..., None], -1)[..., 0]
    return nats.mean()


def test_loss_is_the_papers(model, tokens):
    """Equations 24 and 25: each module's mean cross-entropy of the token k + 1 ahead, their mean times lambda."""
    weights = LossWeights(mtp=0.3, balance=0.0)
    total, out = jax.jit(partial(dsj.loss, weights=weights))(model, {"tokens": tokens})

    main = mean_nats(out.logits, tokens, 1)
    modules = [mean_nats(logits, tokens, 2 + depth) for depth, logits in enumerate(out.mtp_logits)]
    assert float(total) == pytest.approx(main + 0.3 / 2 * sum(modules), rel=1e-6)
    assert LossWeights().mtp == 0.3


def test_the_papers_t_is_offered_beside_each_modules_own_targets():
    """Equation 24 divides by T whatever the depth: of two packed texts each module has a target less in each."""
    segments = jnp.asarray([[1] * 10 + [2] * 14, [1] * 20 + [0] * 4])
    counts = count({"tokens": jnp.ones((2, 24), jnp.int32), "segments": segments}, 2)
    np.testing.assert_array_equal(counts.targets, [44 - 3, 44 - 6, 44 - 9])
    np.testing.assert_array_equal(mtp_divisors(counts, LossWeights()), [38, 35])
    np.testing.assert_array_equal(mtp_divisors(counts, LossWeights(mtp_over="tokens")), [44, 44])
    with pytest.raises(ValueError, match="mtp_over must be targets or tokens, not 'main'"):
        LossWeights(mtp_over="main")


@pytest.mark.slow
def test_divided_by_t_a_module_weighs_less_the_further_it_looks(model, tokens):
    """The same nats, over 2 x 24 tokens where the modules have 2 x 22 and 2 x 21 targets."""
    weights = LossWeights(mtp=0.3, balance=0.0, mtp_over="tokens")
    total, out = jax.jit(partial(dsj.loss, weights=weights))(model, {"tokens": tokens})
    modules = [mean_nats(logits, tokens, 2 + depth) for depth, logits in enumerate(out.mtp_logits)]
    over_t = (modules[0] * 22 / 24 + modules[1] * 21 / 24) / 2
    assert float(out.losses["mtp"]) == pytest.approx(over_t, rel=1e-6)
    assert float(total) == pytest.approx(float(out.losses["main"]) + 0.3 * over_t, rel=1e-6)


def test_module_of_v3_counts_its_parameters():
    cfg = dsj.zoo("deepseek-v3")
    leaves = jax.tree.leaves(abstract(cfg, jnp.bfloat16).mtp, is_leaf=is_variable)
    trained = sum(v.get_value().size for v in leaves if is_trained(v))
    assert cfg.mtp_depth == 1
    assert trained == 11_610_067_968
    copies = 2 * cfg.vocab_size * cfg.dim
    assert round((trained + copies) / 1e9, 3) == 13.463
