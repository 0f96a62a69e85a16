"""The router against transformers' on many tokens, and each of its rules by itself."""

import itertools
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from reference import assert_same_routing, hf_config, relative
from tiny import tiny_config, tokens_of
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2TopkRouter
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter
from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4TopKRouter

from deepseek_jax.configs.schema import MoE
from deepseek_jax.convert.ladder import choose
from deepseek_jax.convert.references import build_modules
from deepseek_jax.core.context import DEFAULT
from deepseek_jax.core.ops import counted
from deepseek_jax.model.router import KnockOut, Router, sequence_balance, sqrt_softplus

GROUPED = MoE(n_experts=32, top_k=4, expert_dim=8, n_groups=8, top_groups=4, scale=2.5)
SOFTMAX = MoE(32, 6, 8, normalize=False, scale=16.0, score="softmax", group_score="max", bias=False)
LIMITED = replace(SOFTMAX, n_groups=8, top_groups=3)
PLAIN = MoE(n_experts=32, top_k=6, expert_dim=8, normalize=False, scale=1.5)


@partial(jax.jit, static_argnums=3)
def call(router, x_BTD, segment_BT, ctx=DEFAULT, replay=None):
    return router(x_BTD, tokens_of(segment_BT), ctx, replay)


def make(cfg: MoE, offset: float, dim: int = 48):
    """Our router and transformers' (V2's where there is no bias), with the same weights, and tokens [4, 512, dim]."""
    rng = np.random.default_rng(0)
    weight = rng.normal(0, dim**-0.5, (dim, cfg.n_experts)).astype(np.float32)
    bias = rng.normal(offset, 0.1, cfg.n_experts).astype(np.float32)
    ours = Router(cfg, dim, jnp.float32)
    ours.weight.set_value(jnp.asarray(weight))
    model = replace(tiny_config(), dim=dim, moe=cfg, model_type="deepseek_v3" if cfg.bias else "deepseek_v2")
    config = build_modules(hf_config(replace(model, mtp_depth=0)))[0].config
    theirs = (DeepseekV3TopkRouter if cfg.bias else DeepseekV2TopkRouter)(config)
    theirs.weight.data = torch.tensor(weight.T)
    if cfg.bias:
        ours.bias.set_value(jnp.asarray(bias))
        theirs.e_score_correction_bias = torch.tensor(bias)
    return ours, theirs, rng.normal(0, 2, (4, 512, dim)).astype(np.float32)


@pytest.mark.parametrize(
    ("cfg", "offset"),
    [*itertools.product((GROUPED, PLAIN), (0.0, 5.0, -5.0)), (SOFTMAX, 0.0), (LIMITED, 0.0)],
    ids=[*(f"{groups} {offset}" for groups in ("groups", "no groups") for offset in (0, 5, -5)), "softmax", "limited"],
)
def test_choice_and_weights_equal_transformers(cfg, offset):
    ours, theirs, x = make(cfg, offset)
    result = call(ours, x, jnp.ones(x.shape[:2], jnp.int32))
    with torch.no_grad():
        logits, weights, index = theirs(torch.tensor(x))
    scores = (logits.sigmoid() if cfg.bias else logits.softmax(-1)).reshape(4, 512, -1)
    biased = scores + theirs.e_score_correction_bias if cfg.bias else scores
    index, weights = index.reshape(4, 512, -1).numpy(), weights.reshape(4, 512, -1).numpy()
    flipped = assert_same_routing(result.index_BTK, index, biased, cfg)
    same = (np.sort(result.index_BTK, -1) == np.sort(index, -1)).all(-1)
    ours_sorted = np.take_along_axis(np.asarray(result.weight_BTK), np.argsort(result.index_BTK, -1), -1)
    theirs_sorted = np.take_along_axis(weights, np.argsort(index, -1), -1)
    assert relative(ours_sorted[same], theirs_sorted[same]) <= 1e-6
    assert flipped == (~same).sum()
    assert relative(result.score_BTE, scores) <= 1e-6
    np.testing.assert_array_equal(choose(np.asarray(biased), cfg)[0][same], np.sort(index, -1)[same])


def test_bias_moves_the_choice_and_never_the_weights():
    ours, _, x = make(GROUPED, 0.0)
    ones = jnp.ones(x.shape[:2], jnp.int32)
    before = call(ours, x, ones)
    ours.bias.set_value(ours.bias.get_value().at[3].add(10.0))
    after = call(ours, x, ones)
    assert (after.index_BTK == 3).any(-1).all()
    assert not (before.index_BTK == 3).any(-1).all()
    np.testing.assert_array_equal(before.score_BTE, after.score_BTE)
    chosen = np.take_along_axis(np.asarray(after.score_BTE), np.asarray(after.index_BTK), -1)
    np.testing.assert_allclose(after.weight_BTK, 2.5 * chosen / chosen.sum(-1, keepdims=True), rtol=1e-6)


def test_v4s_scores_choice_and_weights_equal_transformers():
    cfg = replace(PLAIN, normalize=True, score="sqrtsoftplus")
    ours, _, x = make(replace(cfg, score="sigmoid"), 0.0)
    router = Router(cfg, 48, jnp.float32)
    router.weight.set_value(ours.weight.get_value())
    router.bias.set_value(ours.bias.get_value())
    theirs = DeepseekV4TopKRouter(
        SimpleNamespace(
            num_experts_per_tok=cfg.top_k,
            num_local_experts=cfg.n_experts,
            hidden_size=48,
            scoring_func="sqrtsoftplus",
            routed_scaling_factor=cfg.scale,
        )
    )
    theirs.weight.data = torch.tensor(np.asarray(ours.weight.get_value()).T)
    theirs.e_score_correction_bias = torch.tensor(np.asarray(ours.bias.get_value()))
    result = call(router, x, jnp.ones(x.shape[:2], jnp.int32))
    with torch.no_grad():
        logits, weights, index = theirs(torch.tensor(x))
    index, weights = (a.reshape(4, 512, -1).numpy() for a in (index, weights))
    scores = theirs.score_fn(logits).reshape(4, 512, -1)
    flipped = assert_same_routing(result.index_BTK, index, scores + theirs.e_score_correction_bias, cfg)
    same = (np.sort(result.index_BTK, -1) == np.sort(index, -1)).all(-1)
    assert flipped == (~same).sum()
    ordered = [
        np.take_along_axis(np.asarray(w), np.argsort(np.asarray(i), -1), -1)
        for w, i in ((result.weight_BTK, result.index_BTK), (weights, index))
    ]
    assert relative(ordered[0][same], ordered[1][same]) <= 1e-6
    assert relative(result.score_BTE, scores) <= 1e-6


def test_v4s_scores_have_a_gradient_everywhere():
    slope = jax.vmap(jax.grad(sqrt_softplus))(jnp.array([-1e4, -200.0, -3.0, 0.0, 200.0]))
    assert jnp.isfinite(slope).all()
    # d sqrt(y) / dx = sigmoid(x) / (2 sqrt(y)).
    x = np.array([-3.0, 0.0, 200.0])
    np.testing.assert_allclose(slope[2:], 1 / (1 + np.exp(-x)) / (2 * np.sqrt(np.logaddexp(0, x))), rtol=1e-6)


def test_a_bias_that_multiplies_moves_the_choice_and_never_the_weights():
    """2408.15664, table 4: the experts of the largest s_i b_i, b_i from 1; a fresh bias chooses as none does."""
    cfg = replace(PLAIN, bias_form="product")
    ours, _, x = make(PLAIN, 0.0)
    router, ones = Router(cfg, 48, jnp.float32), jnp.ones(x.shape[:2], jnp.int32)
    router.weight.set_value(ours.weight.get_value())
    fresh = call(router, x, ones)
    score = np.asarray(fresh.score_BTE)
    np.testing.assert_array_equal(fresh.index_BTK, np.argsort(-score, -1, kind="stable")[..., : cfg.top_k])
    factor = np.random.default_rng(1).uniform(0.5, 1.5, cfg.n_experts).astype(np.float32)
    router.bias.set_value(jnp.asarray(factor - 1))
    result = call(router, x, ones)
    ranked = np.argsort(-score * (1 + (factor - 1)), -1, kind="stable")[..., : cfg.top_k]
    assert (np.asarray(result.index_BTK) == ranked).mean() > 0.999
    assert (np.asarray(result.index_BTK) != np.asarray(fresh.index_BTK)).any(-1).mean() > 0.5
    chosen = np.take_along_axis(score, np.asarray(result.index_BTK), -1)
    np.testing.assert_allclose(result.weight_BTK, cfg.scale * chosen, rtol=1e-6)


def one_token(scores, cfg: MoE, bias=0.0):
    """The experts chosen for one token with these sigmoid scores."""
    router = Router(cfg, 1, jnp.float32)
    if cfg.bias:
        router.bias.set_value(jnp.broadcast_to(jnp.float32(bias), (cfg.n_experts,)))
    return set(np.asarray(router.choose(jnp.asarray(scores, jnp.float32)[None, None]))[0, 0].tolist())


def test_a_group_is_scored_by_the_sum_of_its_two_best():
    cfg = MoE(n_experts=6, top_k=2, expert_dim=8, n_groups=2, top_groups=1)
    # The first group holds the best expert, the second the better pair.
    assert one_token([0.9, 0.1, 0.1, 0.6, 0.6, 0.1], cfg) == {3, 4}
    assert one_token([0.9, 0.1, 0.1, 0.6, 0.6, 0.1], replace(cfg, group_score="max", bias=False)) == {0, 1}


def test_masked_groups_lose_to_negative_scores():
    cfg = MoE(n_experts=4, top_k=2, expert_dim=8, n_groups=2, top_groups=1)
    # With a fill of 0 instead of -inf the masked group's experts would win over the negative ones.
    assert one_token([0.9, 0.8, 0.2, 0.1], cfg, bias=-3.0) == {0, 1}


def test_padding_is_routed_nowhere():
    ours, _, x = make(GROUPED, 0.0)
    segment = jnp.ones(x.shape[:2], jnp.int32).at[:, 400:].set(0)
    result = call(ours, x, segment)
    assert (result.index_BTK[:, 400:] == -1).all()
    assert (result.weight_BTK[:, 400:] == 0).all()
    assert (result.index_BTK[:, :400] >= 0).all()
    load = counted(result.index_BTK, 32)
    assert load.dtype == jnp.int32
    assert load.sum() == 4 * 400 * 4
    np.testing.assert_array_equal(load, np.bincount(np.asarray(result.index_BTK[:, :400]).ravel(), minlength=32))


def test_replayed_experts_are_weighed_by_their_scores():
    ours, _, x = make(GROUPED, 0.0)
    replay = jnp.broadcast_to(jnp.asarray([31, 0, 7, 2]), (4, 512, 4))
    result = call(ours, x, jnp.ones(x.shape[:2], jnp.int32), DEFAULT, replay)
    np.testing.assert_array_equal(result.index_BTK, replay)
    score = np.asarray(result.score_BTE)[..., [31, 0, 7, 2]]
    np.testing.assert_allclose(result.weight_BTK, 2.5 * score / score.sum(-1, keepdims=True), rtol=1e-6)


def test_scores_near_nothing_are_divided_as_the_reference_divides_them():
    router = Router(MoE(n_experts=4, top_k=2, expert_dim=8, scale=2.5), 1, jnp.float32)
    router.weight.set_value(jnp.full((1, 4), -46.0))
    weight = call(router, jnp.ones((1, 1, 1)), jnp.ones((1, 1), jnp.int32)).weight_BTK
    # Two sigmoids of 1.05e-20 and the 1e-20 that transformers adds to their sum.
    score = np.exp(-46.0)
    np.testing.assert_allclose(weight, np.full((1, 1, 2), 2.5 * score / (2 * score + 1e-20)), rtol=1e-5)


def test_a_replayed_minus_one_is_no_expert():
    ours, _, x = make(GROUPED, 0.0)
    replay = jnp.broadcast_to(jnp.asarray([31, -1, 7, -1]), (4, 512, 4))
    result = call(ours, x, jnp.ones(x.shape[:2], jnp.int32), DEFAULT, replay)
    np.testing.assert_array_equal(result.index_BTK, replay)
    score = np.asarray(result.score_BTE)[..., [31, 7]]
    np.testing.assert_allclose(result.weight_BTK[..., ::2], 2.5 * score / score.sum(-1, keepdims=True), rtol=1e-6)
    assert (result.weight_BTK[..., 1::2] == 0).all()


def test_no_gradient_reaches_the_bias():
    ours, _, x = make(GROUPED, 0.0)

    def loss(router):
        return router(jnp.asarray(x), tokens_of(jnp.ones(x.shape[:2])), DEFAULT).weight_BTK[..., 0].sum()

    gradient = jax.jit(jax.grad(loss))(ours)
    assert (gradient.bias.get_value() == 0).all()
    assert (gradient.weight.get_value() != 0).any()


def test_router_stays_float32_under_bfloat16():
    ours, _, x = make(GROUPED, 5.0)
    x16 = jnp.asarray(x, jnp.bfloat16)
    ones = jnp.ones(x.shape[:2], jnp.int32)
    low, high = call(ours, x16, ones), call(ours, x16.astype(jnp.float32), ones)
    assert low.weight_BTK.dtype == low.score_BTE.dtype == jnp.float32
    np.testing.assert_array_equal(low.index_BTK, high.index_BTK)
    np.testing.assert_array_equal(low.weight_BTK, high.weight_BTK)


def naive_balance(score, segment, top_k):
    """V3 equations 17 to 20, one sequence, one expert, one token at a time."""
    E = score.shape[-1]
    tokens = [t for t in range(len(score)) if segment[t] != 0]
    total = 0.0
    for i in range(E):
        f = sum(1 for t in tokens if i in np.argsort(-score[t], kind="stable")[:top_k]) * E / (top_k * len(tokens))
        p = sum(score[t, i] / score[t].sum() for t in tokens) / len(tokens)
        total += f * p
    return total


def test_sequence_balance_is_the_papers():
    rng = np.random.default_rng(3)
    score = rng.random((3, 20, 8))
    segment = np.ones((3, 20), np.int32)
    segment[1, 13:], segment[2, :4] = 0, 0
    ours = sequence_balance(jnp.asarray(score, jnp.float32), jnp.asarray(segment), 3)
    assert ours.shape == (3,)
    expected = [naive_balance(score[b], segment[b], 3) for b in range(3)]
    np.testing.assert_allclose(ours, expected, rtol=1e-5)


def test_sequence_balance_of_uniform_scores_is_one():
    uniform = jnp.full((1, 10, 8), 0.5)
    np.testing.assert_allclose(sequence_balance(uniform, jnp.ones((1, 10), jnp.int32), 2), 1.0, rtol=1e-6)


@pytest.mark.parametrize(("cfg", "top"), [(PLAIN, 0), (PLAIN, 3), (GROUPED, 0), (GROUPED, 3), (SOFTMAX, 2)])
def test_experts_that_are_knocked_out_are_chosen_around(cfg, top):
    ours, _, x = make(cfg, 0.3 if cfg.bias else 0.0)
    out = np.zeros(32, bool)
    out[[0, 5, 6, 7, 31]] = True
    result = call(ours, x, jnp.ones(x.shape[:2], jnp.int32), DEFAULT, KnockOut(jnp.asarray(out), top))
    score = np.asarray(result.score_BTE).reshape(-1, 32)
    skipped = np.argsort(np.where(out, np.inf, -score), -1, kind="stable")[:, :top]
    left = np.broadcast_to(~out, score.shape).copy()
    np.put_along_axis(left, skipped, False, -1)
    biased = score + np.asarray(ours.bias.get_value()) if cfg.bias else score
    worst, biased = biased.min(-1, keepdims=True), np.where(left, biased, -np.inf)
    if cfg.n_groups > 1:
        groups = biased.reshape(len(score), cfg.n_groups, -1)
        worth = np.sort(np.maximum(groups, worst[..., None]), -1)[..., -2:].sum(-1)
        best = np.argsort(-worth, -1, kind="stable")[:, : cfg.top_groups]
        kept = np.zeros(worth.shape, bool)
        np.put_along_axis(kept, best, True, -1)
        biased = np.where(kept[..., None], groups, -np.inf).reshape(biased.shape)
    index = np.asarray(result.index_BTK).reshape(len(score), -1)
    expected = np.argsort(-biased, -1, kind="stable")[:, : cfg.top_k]
    assert (np.sort(index, -1) == np.sort(expected, -1)).all(-1).mean() > 0.999
    assert np.take_along_axis(left, index, -1).all()
    weight = np.take_along_axis(score, index, -1)
    weight = weight / weight.sum(-1, keepdims=True) if cfg.normalize else weight
    np.testing.assert_allclose(result.weight_BTK.reshape(weight.shape), cfg.scale * weight, rtol=1e-5)


def test_a_token_whose_groups_are_knocked_out_has_fewer_experts():
    cfg = MoE(n_experts=4, top_k=2, expert_dim=8, n_groups=2, top_groups=1)
    router = Router(cfg, 1, jnp.float32)
    score = jnp.array([0.9, 0.8, 0.2, 0.1])[None, None]
    for out, index in (([0, 0, 0, 0], [0, 1]), ([1, 0, 0, 0], [1, -1]), ([1, 1, 0, 0], [2, 3])):
        chosen = router.choose(score, without=KnockOut(jnp.array(out, bool)))
        np.testing.assert_array_equal(chosen[0, 0], index)
