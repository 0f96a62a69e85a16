"""Multi-head latent attention by itself: both forms against transformers, blocks against one piece."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from reference import pair, relative
from test_parity import CONFIGS

from deepseek_jax.core.context import Context
from deepseek_jax.core.params import unstack
from deepseek_jax.model import attention
from deepseek_jax.model.attention import attend
from deepseek_jax.model.mla import MLA
from deepseek_jax.model.tokens import Tokens, make_tokens

B, T = 2, 96


def causal(cfg, positions) -> Tokens:
    return make_tokens(cfg, positions, jnp.ones((B, T), jnp.int32), causal=True)


@partial(jax.jit, static_argnums=3)
def call(mla, x, tokens, ctx):
    return mla(x, tokens, ctx)[0]


def transformers_attention(p, x, position):
    """Layer 0's attention of the reference, causal."""
    model = p.reference.main.model
    with torch.no_grad():
        rope = model.rotary_emb(torch.tensor(x), torch.tensor(position))
        mask = torch.full((T, T), torch.finfo(torch.float32).min).triu(1)[None, None]
        return model.layers[0].self_attn(torch.tensor(x), rope, mask)[0]


def our_attention(p, x, position, form):
    tokens = causal(p.model.cfg, jnp.asarray(position))
    return call(unstack(p.model.stacks[0], 0).attn, x, tokens, Context(mla=form))


@pytest.mark.parametrize("form", ["expanded", "absorbed"])
@pytest.mark.parametrize("name", ["tiny-v3", "queries not compressed", "no yarn"])
def test_attention_equals_transformers(name, form):
    cfg, offset = CONFIGS[name]
    p = pair(cfg, bias_offset=offset)
    x = np.random.default_rng(7).normal(0, 1, (B, T, cfg.dim)).astype(np.float32)
    # Positions far beyond the original context of 64, different in each row.
    position = np.arange(T)[None] + np.array([[0], [130]])
    assert relative(our_attention(p, x, position, form), transformers_attention(p, x, position)) <= 2e-5


def test_latent_norms_ignore_the_configs_epsilon():
    cfg = replace(CONFIGS["tiny-v3"][0], norm_eps=1e-2)
    p = pair(cfg)
    # So small that the latents' mean squares are of the epsilon's size.
    x = np.random.default_rng(7).normal(0, 1e-3, (B, T, cfg.dim)).astype(np.float32)
    position = np.broadcast_to(np.arange(T), (B, T))
    ours, theirs = our_attention(p, x, position, "expanded"), transformers_attention(p, x, position)
    assert relative(ours, theirs) <= 2e-5


def test_automatic_form_takes_the_fewer_multiplications():
    mla = unstack(pair(CONFIGS["tiny-v3"][0]).model.stacks[0], 0).attn
    assert not mla._absorbs(96, 96, Context())
    assert mla._absorbs(1, 96, Context())
    # A head multiplies 182,528 times absorbed and 186,624 expanded for 23 queries, 190,464 times either way for 24.
    assert [mla._absorbs(T, 96, Context()) for T in (23, 24)] == [True, False]
    assert mla._absorbs(96, 96, Context(mla="absorbed"))
    assert not mla._absorbs(1, 96, Context(mla="expanded"))


def test_the_form_is_chosen_by_the_numbers_of_queries_and_keys(monkeypatch):
    cfg = CONFIGS["tiny-v3"][0]
    mla, asked = unstack(pair(cfg).model.stacks[0], 0).attn, []
    monkeypatch.setattr(MLA, "_absorbs", lambda self, T, S, ctx: asked.append((T, S)))
    tokens = causal(cfg, jnp.broadcast_to(jnp.arange(T), (B, T)))
    jax.eval_shape(lambda x: mla(x, tokens, Context())[0], jnp.zeros((B, T, cfg.dim)))
    assert asked == [(T, T)]


def dense_attention(q, k, v, visible, scale):
    scores = np.einsum("BTNK,BSNK->BNTS", q, k) * scale
    scores = np.where(visible[:, None], scores, -np.inf)
    scores -= np.where(np.isfinite(scores.max(-1, keepdims=True)), scores.max(-1, keepdims=True), 0)
    p = np.exp(scores)
    total = p.sum(-1, keepdims=True)
    return np.einsum("BNTS,BSNV->BTNV", p / np.where(total > 0, total, 1), v)


def test_blocks_of_queries_equal_one_piece(monkeypatch):
    # 200 queries in blocks of 64, the last one partial; rows with segments and padding.
    rng = np.random.default_rng(8)
    q, k = rng.normal(0, 1, (2, 2, 200, 3, 8))
    v = rng.normal(0, 1, (2, 200, 3, 5))
    position = np.broadcast_to(np.arange(200), (2, 200))
    segment = np.ones((2, 200), np.int32)
    segment[0, 70:150], segment[1, 180:] = 2, 0
    tokens = make_tokens(CONFIGS["tiny-v3"][0], jnp.asarray(position), jnp.asarray(segment), causal=True)
    visible = (segment[:, :, None] == segment[:, None]) & (segment[:, :, None] != 0)
    visible &= position[:, None] <= position[:, :, None]
    expected = dense_attention(q, k, v, visible, 0.3)
    arrays = [jnp.asarray(a, jnp.float32) for a in (q, k, v)]
    np.testing.assert_allclose(jax.jit(attend, static_argnums=4)(*arrays, tokens, 0.3), expected, atol=2e-6)
    # Attention that computes its probabilities again in the backward pass returns the same gradient.
    loss = lambda q, k, v: (attend(q, k, v, tokens, 0.3) ** 2).sum()  # noqa: E731
    kept = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(*arrays)
    monkeypatch.setattr(attention, "KEPT_PROBABILITIES", 0)
    again = jax.jit(jax.grad(lambda *a: loss(*a), argnums=(0, 1, 2)))(*arrays)
    # Nor does it matter whether a long block runs whole or in pieces, here 64 = 24 + 24 + 16 queries.
    monkeypatch.setattr(attention, "MAX_PIECE", 24)
    np.testing.assert_allclose(jax.jit(lambda *a: attend(*a, tokens, 0.3))(*arrays), expected, atol=2e-6)
    pieces = jax.jit(jax.grad(lambda *a: loss(*a) * 1.0, argnums=(0, 1, 2)))(*arrays)
    for a, b, c in zip(kept, again, pieces, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)
        np.testing.assert_allclose(a, c, atol=1e-5)


@pytest.mark.parametrize("ordered", [True, False])
def test_tiles_of_cached_keys_equal_dense_attention(ordered):
    # 300 slots are no whole number of tiles. The rows hold 70 and 150 tokens; 130 and 110 new ones follow, the
    # second row's last 20 queries being padding. Slots that are not used hold rubbish of an old position.
    rng = np.random.default_rng(10)
    B, T, S, held, new = 2, 130, 300, np.array([[70], [150]]), np.array([[130], [110]])
    q, k, v = rng.normal(0, 1, (B, T, 4, 8)), rng.normal(0, 1, (B, S, 2, 8)), rng.normal(0, 1, (B, S, 2, 5))
    segment = (np.arange(T) < new).astype(np.int32)
    slot = np.where(segment, held + np.arange(T), S)
    position = np.where(segment, slot, 0)
    key_position = np.broadcast_to(np.arange(S), (B, S)).copy()
    key_segment = (np.arange(S) < held + new).astype(np.int32)
    key_position[key_segment == 0] = 0
    if not ordered:  # the new tokens' positions stand in any order among their slots
        for row in range(B):
            shuffled = rng.permutation(new[row, 0])
            position[row, : new[row, 0]] = held[row] + shuffled
            key_position[row, held[row, 0] : held[row, 0] + new[row, 0]] = held[row] + shuffled
    new = (jnp.asarray(a, jnp.int32) for a in (position, segment, slot))
    keys = {"key_position": jnp.asarray(key_position), "key_segment": jnp.asarray(key_segment)}
    tokens = replace(make_tokens(CONFIGS["tiny-v3"][0], *new, causal=ordered), **keys)
    visible = (segment[:, :, None] == key_segment[:, None]) & (segment[:, :, None] != 0)
    visible &= key_position[:, None] <= position[:, :, None]
    expected = dense_attention(q, np.repeat(k, 2, 2), np.repeat(v, 2, 2), visible, 0.3)
    arrays = (jnp.asarray(a, jnp.float32) for a in (q, k, v))
    np.testing.assert_allclose(jax.jit(attend, static_argnums=4)(*arrays, tokens, 0.3), expected, atol=2e-6)


def test_queries_that_see_nothing_return_zero():
    one = jnp.ones((1, 4, 1, 2))
    segment = jnp.zeros((1, 4), jnp.int32)
    position = jnp.arange(4)[None]
    tokens = make_tokens(CONFIGS["tiny-v3"][0], position, segment, causal=True)
    assert (attend(one, one, one, tokens, 1.0) == 0).all()


def test_shared_keys_serve_every_head():
    rng = np.random.default_rng(9)
    q, k, v = rng.normal(0, 1, (B, T, 4, 8)), rng.normal(0, 1, (B, T, 1, 8)), rng.normal(0, 1, (B, T, 1, 5))
    tokens = replace(causal(CONFIGS["no yarn"][0], jnp.broadcast_to(jnp.arange(T), (B, T))), uniform=True)
    ours = attend(*(jnp.asarray(a, jnp.float32) for a in (q, k, v)), tokens, 0.5)
    visible = np.tril(np.ones((B, T, T), bool))
    expected = dense_attention(q, np.repeat(k, 4, 2), np.repeat(v, 4, 2), visible, 0.5)
    np.testing.assert_allclose(ours, expected, atol=2e-6)
