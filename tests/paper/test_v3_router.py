"""The router of the real V3, 256 experts in 8 groups, against the paper's rules written as loops."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import tokens_of

from deepseek_jax.configs.zoo import zoo
from deepseek_jax.core.context import DEFAULT
from deepseek_jax.model.router import Router

MOE = zoo("deepseek-v3").moe
DIM, TOKENS = 32, 64


@pytest.fixture(scope="module")
def routed():
    """The router's inputs and its choice for 64 tokens, biases of both signs."""
    rng = np.random.default_rng(0)
    router = Router(MOE, DIM, jnp.float32)
    router.weight.set_value(jnp.asarray(np.random.default_rng(1).normal(0, 0.3, (DIM, MOE.n_experts)), jnp.float32))
    bias = rng.normal(-0.4, 0.2, MOE.n_experts).astype(np.float32)
    router.bias.set_value(jnp.asarray(bias))
    x = jnp.asarray(rng.normal(0, 1, (1, TOKENS, DIM)), jnp.float32)
    result = jax.jit(lambda r, x: r(x, tokens_of(np.ones(x.shape[:2])), DEFAULT))(router, x)
    return np.asarray(result.score_BTE)[0], bias, np.asarray(result.index_BTK)[0], np.asarray(result.weight_BTK)[0]


def papers_choice(score, bias) -> set[int]:
    """Equation 16 within the groups whose two best biased scores sum highest, for one token."""
    biased = (score + bias).tolist()
    groups = [range(g * 32, (g + 1) * 32) for g in range(8)]
    ranked = sorted(groups, key=lambda group: sum(sorted((biased[e] for e in group), reverse=True)[:2]))
    candidates = [e for group in ranked[-4:] for e in group]
    return set(sorted(candidates, key=lambda e: biased[e])[-8:])


def test_choice_is_the_papers(routed):
    score, bias, index, _ = routed
    assert [set(row) for row in index.tolist()] == [papers_choice(s, bias) for s in score]


def test_weights_are_the_papers(routed):
    score, _, index, weight = routed
    for s, chosen, w in zip(score, index, weight, strict=True):
        np.testing.assert_allclose(w, 2.5 * s[chosen] / s[chosen].sum(), rtol=1e-6)
    np.testing.assert_allclose(weight.sum(-1), 2.5, rtol=1e-6)


def test_no_token_reaches_more_than_four_groups(routed):
    index = routed[2]
    reached = [len({e // 32 for e in row}) for row in index.tolist()]
    assert max(reached) <= MOE.top_groups == 4
    # The limit acts: the eight best experts of all lie in more groups for some token.
    biased = routed[0] + routed[1]
    assert max(len({e // 32 for e in row}) for row in np.argsort(-biased)[:, :8].tolist()) > 4


def test_a_common_shift_of_all_biases_changes_no_choice(routed):
    # Multiples of 2**-16 keep every bit when 8 is added, so that no two experts become equal.
    score, bias = (np.round(a * 2**16) / 2**16 for a in routed[:2])
    router = Router(MOE, DIM, jnp.float32)

    def chosen(shift):
        router.bias.set_value(jnp.asarray(bias + shift, jnp.float32))
        return np.asarray(router.choose(jnp.asarray(score, jnp.float32)[None]))[0]

    for shift in (-8.0, 8.0):
        np.testing.assert_array_equal(chosen(shift), chosen(0.0))


def test_release_config():
    assert (MOE.n_experts, MOE.top_k, MOE.n_groups, MOE.top_groups, MOE.scale) == (256, 8, 8, 4, 2.5)
    assert MOE.normalize
    assert MOE.top_groups * MOE.n_experts // MOE.n_groups == 128
