"""The whole model against transformers: activations layer by layer, experts, logits, MTP logits."""

from dataclasses import replace

import numpy as np
import pytest
from measured import measured
from reference import assert_same_routing, experts, full, pair, relative, torch_tensors
from tiny import tiny_config

from deepseek_jax.configs.schema import ModelConfig, MoE, Rope
from deepseek_jax.convert.ladder import choose

TINY = tiny_config()


def attention(**changes) -> ModelConfig:
    return replace(TINY, attention=replace(TINY.attention, **changes))


# name -> (config, offset of the router biases). Sequences of 96 tokens pass the original context of 64.
CONFIGS = {
    "tiny-v3": (TINY, 0.0),
    "biases around 5": (TINY, 5.0),
    "biases around -2": (TINY, -2.0),
    "queries not compressed": (attention(q_rank=None), 0.0),
    "no groups": (replace(TINY, moe=MoE(8, 3, 48, n_shared=2, normalize=False, scale=1.5)), 0.0),
    "no yarn": (attention(rope=Rope(50000.0)), 0.0),
    "half-split rope": (attention(rope=replace(TINY.attention.rope, interleaved=False)), 0.0),
    "two mtp modules": (replace(TINY, mtp_depth=2), 0.0),
    "no dense layer, no mtp": (replace(TINY, n_dense_layers=0, mtp_depth=0, norm_eps=1e-2), 0.0),
    "dense only, tied": (replace(TINY, n_dense_layers=3, moe=None, mtp_depth=0, tie_embeddings=True), 0.0),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_forward_equals_transformers(name):
    cfg, offset = CONFIGS[name]
    check_forward(pair(cfg, bias_offset=offset), name)


def check_forward(p, name: str):
    flipped = 0
    cfg, seen, out = p.model.cfg, p.observe(), full(p)
    std = float(seen.logits.std())
    assert 0.5 < std < 12, std

    if cfg.moe:
        theirs, biased = experts(seen.index), experts(seen.biased)
        if not np.array_equal(np.sort(out.aux.expert_index, -1), np.sort(theirs, -1)):
            out = full(p, routing=theirs)
            bias = [a for n, a in torch_tensors(p.model).items() if n.startswith("model") and n.endswith("_bias")]
            ours = np.asarray(out.captured["router_scores"]) + (np.stack(bias)[:, None, None] if bias else 0)
            for layer in range(cfg.n_moe_layers):
                chosen = choose(ours[layer], cfg.moe)[0]
                flipped += assert_same_routing(chosen, theirs[layer], biased[layer], cfg.moe)
        measured(name, "routing", flipped)
    for kind in ("attn", "ffn", "block"):
        for layer, expected in enumerate(seen.captured[kind]):
            assert relative(out.captured[kind][layer], expected) <= 2e-5, (kind, layer)
    assert relative(out.hidden, seen.hidden) <= 2e-5
    assert relative(out.logits, seen.logits) <= 2e-5
    measured(name, "logits", relative(out.logits, seen.logits))
    for depth in range(cfg.mtp_depth):
        known = p.tokens.shape[1] - 1 - depth
        index = out.mtp_aux.expert_index[depth]
        assert not assert_same_routing(index[:, :known], seen.mtp_index[depth], seen.mtp_biased[depth], cfg.moe), (
            "an MTP router flipped; its choice cannot be replayed"
        )
        assert (index[:, known:] == -1).all()
        assert relative(out.mtp_logits[depth][:, :known], seen.mtp_logits[depth]) <= 2e-5
        measured(name, "MTP", relative(out.mtp_logits[depth][:, :known], seen.mtp_logits[depth]))


def test_replayed_experts_equal_the_reference_under_the_same_experts():
    p = pair(TINY)
    shape = (TINY.n_moe_layers, *p.tokens.shape, TINY.moe.n_experts)
    chosen = np.random.default_rng(5).random(shape).argsort(-1)[..., : TINY.moe.top_k]
    seen, out = p.observe(routing=chosen), full(p, routing=chosen)
    np.testing.assert_array_equal(out.aux.expert_index, chosen)
    assert relative(out.logits, seen.logits) <= 2e-5
    assert relative(out.logits, full(p).logits) > 1e-2


def test_replaying_the_models_own_choice_changes_nothing():
    p = pair(TINY)
    out = full(p)
    assert relative(full(p, routing=out.aux.expert_index).logits, out.logits) <= 1e-6


def test_captured_values_come_in_layer_order():
    p = pair(TINY)
    out = full(p)
    block, attn, ffn = (np.asarray(out.captured[name]) for name in ("block", "attn", "ffn"))
    assert block.shape == (3, 2, 96, 64)
    assert out.captured["router_scores"].shape == (2, 2, 96, 8)
    np.testing.assert_allclose(block[1:], block[:-1] + attn[1:] + ffn[1:], atol=2e-5)
