"""V2's device-limited routing and its figures, on the real V2's numbers."""

import math

import jax.numpy as jnp
import numpy as np
import pytest
from tiny import tokens_of

from deepseek_jax.analysis.counts import counts
from deepseek_jax.configs.zoo import zoo
from deepseek_jax.core.context import DEFAULT
from deepseek_jax.core.rope import softmax_scale, yarn_mscale
from deepseek_jax.model.router import Router

V2 = zoo("deepseek-v2")
DIM, TOKENS = 32, 64
PER_GROUP = V2.moe.n_experts // V2.moe.n_groups


@pytest.fixture(scope="module")
def routed():
    """Softmax scores [64, 160], and the router's choice and weights."""
    rng = np.random.default_rng(0)
    router = Router(V2.moe, DIM, jnp.float32)
    weight = rng.normal(0, 0.3, (DIM, V2.moe.n_experts))
    router.weight.set_value(jnp.asarray(weight, jnp.float32))
    x = rng.normal(0, 1, (TOKENS, DIM))
    result = router(jnp.asarray(x[None], jnp.float32), tokens_of(jnp.ones((1, TOKENS))), DEFAULT)
    power = np.exp(x @ weight)
    return power / power.sum(-1, keepdims=True), np.asarray(result.index_BTK)[0], np.asarray(result.weight_BTK)[0]


def test_the_choice_is_the_papers(routed):
    """§2.2.2: the three devices with the best single experts, then the six best experts on these."""
    score, index, _ = routed
    for token in range(TOKENS):
        best = [max(score[token, g * PER_GROUP : (g + 1) * PER_GROUP]) for g in range(8)]
        devices = sorted(range(8), key=lambda g: -best[g])[:3]
        candidates = [e for g in devices for e in range(g * PER_GROUP, (g + 1) * PER_GROUP)]
        assert index[token].tolist() == sorted(candidates, key=lambda e: -score[token, e])[:6]


def test_a_token_goes_to_three_devices_at_most(routed):
    _, index, _ = routed
    reached = [len({e // PER_GROUP for e in row}) for row in index.tolist()]
    assert max(reached) == V2.moe.top_groups == 3


def test_the_limit_matters(routed):
    """Without it some tokens would be sent further."""
    score, index, _ = routed
    free = np.argsort(-score, axis=-1)[:, :6]
    assert (np.sort(free) != np.sort(index)).any(-1).mean() > 0.2


def test_gates_are_scaled_by_16_and_not_normalised(routed):
    score, index, weight = routed
    np.testing.assert_allclose(weight, 16 * np.take_along_axis(score, index, -1), rtol=1e-5)


def test_yarn():
    # §3.1.4: sqrt(t) = 0.0707 ln s + 1 at s = 40; it scales the softmax twice, once for queries and once for keys.
    assert yarn_mscale(40.0, 0.707) == pytest.approx(0.0707 * math.log(40) + 1)
    assert yarn_mscale(40.0, 0.707) == pytest.approx(1.260804, abs=5e-7)
    assert softmax_scale(192, V2.attention.rope) == pytest.approx(0.1147214, abs=5e-8)


def test_cache():
    # Table 9, numbers a token: MHA 110.6K and MLA 15.6K of the small models (V2-Lite has the latter's shape), 34.6K of
    # the large one.
    assert counts(zoo("deepseek-v2-lite")).kv_bytes_per_token // 2 == 15_552
    assert counts(V2).kv_bytes_per_token // 2 == 34_560
    assert round(15_552 / 110_592, 4) == 0.1406
    # Table 1: as much as grouped queries with 2.25 groups.
    assert counts(V2).kv_bytes_per_token / (counts(V2).kv_bytes_per_token_gqa8 / 8) == 2.25
    # The abstract's 93.3% less than DeepSeek 67B holds in bits: 6 for each of V2's numbers, 16 for each of the other's.
    dense = counts(zoo("deepseek-llm-67b")).kv_bytes_per_token // 2
    assert dense == 2 * 8 * 128 * 95
    assert round(1 - 34_560 * 6 / (dense * 16), 3) == 0.933
    assert round(1 - 34_560 / dense, 3) == 0.822


def test_parameters():
    # Abstract: 236B in all, 21B for a token; V2-Lite (appendix B): 15.7B and 2.4B.
    c, lite = counts(V2), counts(zoo("deepseek-v2-lite"))
    assert (round(c.total / 1e9), round(c.activated_no_embedding / 1e9)) == (236, 21)
    assert round(lite.total / 1e9, 1) == 15.7
    assert lite.activated_no_embedding / 1e9 == pytest.approx(2.4, abs=0.06)
