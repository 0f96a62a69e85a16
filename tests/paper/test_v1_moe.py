"""DeepSeekMoE's claims that need no training, on the real 16B's numbers and router."""

import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from architectures import ARCHITECTURES
from tiny import random_model, random_tokens, tokens_of

from deepseek_jax.analysis.counts import counts
from deepseek_jax.configs.zoo import zoo
from deepseek_jax.core.context import DEFAULT
from deepseek_jax.lab.study import load
from deepseek_jax.model.router import Router

CFG = zoo("deepseek-moe-16b")
EXPERIMENTS = Path(__file__).parents[2] / "experiments"
DIM, TOKENS = 32, 64


def test_finer_experts_combine_in_more_ways():
    # v1_moe C1
    # §3.1: 2 of 16 experts; each in 4 quarters, 8 of 64.
    assert math.comb(16, 2) == 120
    assert math.comb(64, 8) == 4_426_165_368


def test_total_and_activated_parameters():
    # v1_moe C3
    # §5.1.2: 16.4B in all, 2.8B for a token; "about 40%" of DeepSeek 7B's computation.
    c, dense = counts(CFG), counts(zoo("deepseek-llm-7b"))
    assert round(c.total / 1e9, 1) == 16.4
    assert round(c.activated / 1e9, 1) == 2.8
    assert 0.39 < c.flops_per_token / dense.flops_per_token < 0.42


def test_experts_are_fine_and_two_are_shared():
    # §5.1.2: each expert is a quarter of a standard network, of 10944 here; the first layer is dense.
    assert CFG.ffn_dim / CFG.moe.expert_dim == pytest.approx(8, abs=0.3)
    assert (CFG.n_dense_layers, CFG.moe.n_shared, CFG.moe.top_k, CFG.moe.n_experts) == (1, 2, 6, 64)


def test_gates_are_the_softmax_over_all_experts():
    # v1_moe C2
    """Equations 9 to 11: the six largest of 64 scores, which are not normalised again."""
    rng = np.random.default_rng(0)
    router = Router(CFG.moe, DIM, jnp.float32)
    weight = rng.normal(0, 0.3, (DIM, CFG.moe.n_experts))
    router.weight.set_value(jnp.asarray(weight, jnp.float32))
    x = rng.normal(0, 1, (TOKENS, DIM))
    result = router(jnp.asarray(x[None], jnp.float32), tokens_of(jnp.ones((1, TOKENS))), DEFAULT)
    for token in range(TOKENS):
        power = np.exp(x[token] @ weight)
        score = power / power.sum()
        chosen = sorted(range(64), key=lambda e: -score[e])[:6]
        assert np.asarray(result.index_BTK)[0, token].tolist() == chosen
        np.testing.assert_allclose(np.asarray(result.weight_BTK)[0, token], score[chosen], rtol=1e-5)
    assert float(result.weight_BTK.sum(-1).max()) < 1


def test_shared_experts_see_every_token():
    """Without a choice of experts what is left of a layer is the shared experts' output, for every token."""
    cfg = ARCHITECTURES["deepseek-moe"]
    model, tokens = random_model(cfg), random_tokens(cfg, 2, 8)
    none = jnp.full((cfg.n_moe_layers, 2, 8, cfg.moe.top_k), -1, jnp.int32)
    out = jax.jit(lambda m, t, r: m(t, routing=r, capture=("ffn",)))(model, tokens, none)
    assert (out.aux.expert_index == -1).all()
    assert (jnp.abs(out.captured["ffn"][cfg.n_dense_layers :]).max(-1) > 0).all()


@pytest.mark.parametrize("scale", ["cpu", "gpu"])
def test_the_studys_variants_cost_the_same_but_for_their_routers(scale):
    study, without_router = load(EXPERIMENTS, "v1_moe").at(scale), {}
    for name in study.variants:
        cfg = study.setup(name).model
        # A row of the router's matrix for each expert; its bias is not counted among the parameters.
        router = cfg.n_moe_layers * cfg.moe.n_experts * cfg.dim
        size = counts(cfg)
        without_router[name] = (size.total - router, size.activated - router)
    dense = without_router.pop("dense")
    assert len(set(without_router.values())) == 1
    assert dense[0] == dense[1] == without_router["16k4"][1]
