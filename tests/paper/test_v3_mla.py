"""Exact figures of multi-head latent attention, on the real V3 where that needs no weights."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_jax.configs.schema import Rope, Yarn
from deepseek_jax.configs.zoo import zoo
from deepseek_jax.core.context import Context
from deepseek_jax.core.params import is_variable
from deepseek_jax.core.rope import (
    apply_rope,
    inverse_frequencies,
    rope_tables,
    softmax_scale,
    yarn_mscale,
    yarn_range,
)
from deepseek_jax.model.transformer import abstract

V3 = zoo("deepseek-v3", mtp_depth=0)


def v3_cache():
    return jax.eval_shape(lambda: abstract(V3).init_cache(1, 1, ctx=Context(dtype=jnp.bfloat16)))


def test_cache_bytes_a_token():
    latents = jax.tree.leaves(v3_cache().held)
    assert [latent.shape for latent in latents] == [(3, 1, 1, 576), (58, 1, 1, 576)]
    assert sum(latent.size * latent.dtype.itemsize for latent in latents) == 70_272


def test_cache_equals_two_and_a_quarter_groups():
    # A grouped-query cache holds a key and a value of 128 numbers a group.
    attention = V3.attention
    assert (attention.kv_rank + attention.rope_dim) / (2 * attention.nope_dim) == 2.25
    assert attention.n_heads * 2 * attention.nope_dim / 576 == pytest.approx(56.9, abs=0.05)


def test_attention_parameters_a_layer():
    stack = abstract(V3).stacks[0]
    leaves = jax.tree.leaves(stack.attn, is_leaf=is_variable)
    # The two latents' norms, 2048 numbers, are part of it.
    assert sum(v.get_value().size for v in leaves) / V3.n_dense_layers == 187_107_328


def test_yarn_of_factor_one_is_rope():
    plain, one = Rope(10000.0), Rope(10000.0, Yarn(factor=1.0, original_length=4096))
    # Blending a frequency with itself rounds once more.
    np.testing.assert_array_max_ulp(inverse_frequencies(64, one), inverse_frequencies(64, plain), maxulp=1)
    assert softmax_scale(192, one) == softmax_scale(192, plain)


def test_yarn_constants():
    rope = V3.attention.rope
    assert yarn_mscale(40, 1.0) == 0.1 * math.log(40) + 1
    assert yarn_mscale(40, 1.0) ** 2 == pytest.approx(1.873854, abs=5e-7)
    assert yarn_range(64, rope.theta, rope.yarn) == (10, 23)
    assert softmax_scale(192, rope) == pytest.approx(1.873854 / math.sqrt(192), abs=5e-8)


def test_yarn_slows_the_slowest_pairs_by_the_factor():
    # Below one turn within 4096 tokens a pair is interpolated, above 32 turns it is kept.
    rope = V3.attention.rope
    plain, scaled = inverse_frequencies(64, Rope(rope.theta)), inverse_frequencies(64, rope)
    turns = plain * 4096 / (2 * math.pi)
    ratio = plain / scaled
    np.testing.assert_array_equal(ratio[turns > 32], 1)
    np.testing.assert_allclose(ratio[turns < 1][1:], 40, rtol=1e-6)
    assert (np.diff(ratio) >= -1e-5).all()


def test_scores_depend_on_position_differences_only():
    """Rotated by the package, a query and a key score what the difference of their positions gives in closed form."""
    q, k = np.random.default_rng(0).normal(0, 1, (2, 64)).astype(np.float32)
    pairs = (q[0::2] + 1j * q[1::2]) * np.conj(k[0::2] + 1j * k[1::2])
    rope = V3.attention.rope
    ratio = [1 / 40 if i >= 23 else 1 - max(i - 10, 0) / 13 * (1 - 1 / 40) for i in range(32)]
    frequency = 10000.0 ** (-np.arange(32) / 32) * ratio

    def rotated(x, position):
        cos, sin = rope_tables(jnp.asarray([[position]]), 64, rope)
        return np.asarray(apply_rope(jnp.asarray(x)[None, None], cos, sin, rope.interleaved), np.float64)

    for t, s in ((9, 2), (309, 302), (2, 9), (300, 2)):
        expected = (pairs * np.exp(1j * (t - s) * frequency)).sum().real
        # float32 angles: 300 radians are kept to 2e-5.
        assert (rotated(q, t) * rotated(k, s)).sum() == pytest.approx(expected, abs=2e-4)
