"""V3.2's sparse attention: the indexer's choice against transformers', and what it does to attention."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from architectures import ARCHITECTURES
from reference import forward, full, pair, relative
from tiny import random_model

from deepseek_jax.core.context import DEFAULT
from deepseek_jax.core.params import decays, map_variables, named, named_variables, unstack
from deepseek_jax.core.partition import combine, partition
from deepseek_jax.generation.layers import unstacked
from deepseek_jax.model import attention
from deepseek_jax.model.attention import MIN_BLOCK, UNROLLED_BLOCKS, attend
from deepseek_jax.model.indexer import Seeking, chosen_keys, divergence, index_scores, only_chosen
from deepseek_jax.model.tokens import Tokens, make_tokens
from deepseek_jax.model.transformer import abstract
from deepseek_jax.train.loss import loss
from deepseek_jax.train.weights import LossWeights

CFG = ARCHITECTURES["v3.2"]
TOP_K = CFG.attention.indexer.index_top_k
NEAR_TIE = 1e-5


def without_indexer(model):
    """V3 with the same weights."""
    cfg = replace(model.cfg, attention=replace(model.cfg.attention, indexer=None), model_type="deepseek_v3")
    held = named(model)
    return map_variables(lambda path, v: v.replace(held[".".join(map(str, path))]), abstract(cfg))


def test_chosen_keys_are_those_of_the_reference():
    # v32_sparse_attention C1
    """Layer by layer, from the reference's own inputs; a choice may differ at near-ties, which are counted."""
    p, seen = pair(CFG), []
    layers = p.reference.main.model.layers
    hooks = [
        layer.self_attn.indexer.register_forward_hook(lambda module, args, out: seen.append((*args[:2], out)))
        for layer in layers
    ]
    p.observe()
    for hook in hooks:
        hook.remove()
    B, T = p.tokens.shape
    tokens = make_tokens(CFG, jnp.broadcast_to(jnp.arange(T), (B, T)), jnp.ones((B, T), jnp.int32), causal=True)
    visible = jnp.broadcast_to(tokens.visible(0, T, T), (B, T, T))

    @jax.jit
    def ours(indexer, x_BTD, q_BTQ):
        seeking, k_BTI = indexer(x_BTD, q_BTQ, tokens, DEFAULT)
        index = chosen_keys(seeking, k_BTI, visible)
        return only_chosen(visible, index), jnp.where(visible, index_scores(seeking, k_BTI), -jnp.inf)

    sizes = [len(kind.numbers) for kind in CFG.stacks]
    indexers = [unstack(s.attn.indexer, i) for s, n in zip(p.model.stacks, sizes, strict=True) for i in range(n)]
    flipped = 0
    for indexer, (x, q, theirs) in zip(indexers, seen, strict=True):
        found, score = ours(indexer, jnp.asarray(x.numpy()), jnp.asarray(q.numpy()))
        index = jnp.asarray(theirs.numpy())
        differs = np.asarray((found != only_chosen(visible, index)).any(-1))
        ordered = -np.sort(-np.asarray(score)[differs], axis=-1)
        assert (ordered[:, TOP_K - 1] - ordered[:, TOP_K] < NEAR_TIE).all()
        flipped += int(differs.sum())
        # More than half of the queries have to leave keys out, and they do.
        assert (np.asarray(found).sum(-1) == np.minimum(np.arange(T) + 1, TOP_K)).all()
    print(f"{flipped} of {len(indexers) * B * T} choices differ at near-ties")
    assert flipped <= len(indexers) * B * T / 1000


def test_logits_with_the_references_choice_replayed_are_the_references(monkeypatch):
    """As routing is replayed: what a near-tie of the choice would change is not what logits are compared for."""
    p, given = pair(CFG), []
    hooks = [
        layer.self_attn.indexer.register_forward_hook(lambda module, args, out: given.append(jnp.asarray(out.numpy())))
        for layer in p.reference.main.model.layers
    ]
    expected = p.observe()
    for hook in hooks:
        hook.remove()
    T = p.tokens.shape[1]
    # Layer after layer, and of each one block of queries after the other.
    replayed = iter([index[:, first : first + MIN_BLOCK] for index in given for first in range(0, T, MIN_BLOCK)])
    assert T <= UNROLLED_BLOCKS * MIN_BLOCK
    monkeypatch.setattr(attention, "chosen_keys", lambda *_: next(replayed))
    logits = jax.jit(lambda model, tokens: model(tokens).logits)(unstacked(p.model, jnp.float32), p.tokens)
    assert next(replayed, None) is None
    assert relative(logits, expected.logits) <= 2e-5


def test_as_many_keys_as_tokens_are_dense_attention_bit_for_bit():
    p = pair(CFG)
    wide = replace(CFG.attention, indexer=replace(CFG.attention.indexer, index_top_k=p.tokens.shape[1]))
    sparse = random_model(replace(CFG, attention=wide))
    ours, dense = (forward(m, p.tokens, with_mtp=True) for m in (sparse, without_indexer(sparse)))
    np.testing.assert_array_equal(ours.logits, dense.logits)
    np.testing.assert_array_equal(ours.mtp_logits[0], dense.mtp_logits[0])
    assert relative(full(p).logits, dense.logits) > 1e-2


def test_keys_that_are_brought_to_few_queries_are_those_of_the_mask():
    rng = np.random.default_rng(0)
    B, T, S, N, K, V, H, I = 2, 2, 96, 3, 8, 5, 16, 8  # noqa: E741
    q, k, v = (rng.normal(0, 1, s) for s in ((B, T, N, K), (B, S, 1, K), (B, S, 1, V)))
    arrays = [jnp.asarray(a, jnp.float32) for a in (q, k, v)]
    seeking = Seeking(*(jnp.asarray(rng.normal(0, 1, s), jnp.float32) for s in ((B, T, H, I), (B, T, H))), top_k=TOP_K)
    index_BSI = jnp.asarray(rng.normal(0, 1, (B, S, I)), jnp.float32)
    # One row holds fewer keys than are chosen.
    position = jnp.asarray([[90, 91], [5, 6]])
    tokens = replace(
        make_tokens(CFG, position, jnp.ones((B, T), jnp.int32), position),
        key_position=jnp.broadcast_to(jnp.arange(S), (B, S)),
        key_segment=jnp.ones((B, S), jnp.int32),
    )
    assert T * TOP_K <= S
    ours = jax.jit(lambda *a: attend(*a, tokens, 0.4, DEFAULT, seeking, index_BSI))(*arrays)
    seen = tokens.visible(0, T, S)
    mask = np.asarray(only_chosen(seen, chosen_keys(seeking, index_BSI, seen)))
    assert mask.sum(-1).tolist() == [[TOP_K, TOP_K], [6, 7]]
    score = np.where(mask[:, :, None], np.einsum("BTNK,BSK->BTNS", q, k[:, :, 0]) * 0.4, -np.inf)
    power = np.exp(score - score.max(-1, keepdims=True))
    expected = np.einsum("BTNS,BSV->BTNV", power / power.sum(-1, keepdims=True), v[:, :, 0])
    np.testing.assert_allclose(ours, expected, atol=2e-6)


def arrays_of(*shapes, seed=0):
    rng = np.random.default_rng(seed)
    return [jnp.asarray(rng.normal(0, 1, s), jnp.float32) for s in shapes]


@pytest.mark.parametrize("top_k", [7, 300])
def test_the_divergence_and_its_gradient_are_the_papers(top_k):
    """In blocks of queries, two of them, over chosen keys and over all; heads of keys shared; a row with padding."""
    B, T, N, G, K, H, I = 2, 100, 4, 2, 6, 5, 8  # noqa: E741
    q, k, qi, w, ki = arrays_of((B, T, N, K), (B, T, G, K), (B, T, H, I), (B, T, H), (B, T, I))
    segment = np.ones((B, T), np.int32)
    segment[1, 90:] = 0
    position = jnp.broadcast_to(jnp.arange(T), (B, T))
    tokens = make_tokens(CFG, position, jnp.asarray(segment), causal=True)

    @jax.jit
    def ours(q, k, qi, w, ki):
        f = lambda *a: divergence(a[0], a[1], tokens, 0.5, Seeking(a[2], a[3], top_k), a[4])  # noqa: E731
        kl, back = jax.vjp(f, q, k, qi, w, ki)
        mask = only_chosen(tokens.visible(0, T, T), chosen_keys(Seeking(qi, w, top_k), ki, tokens.visible(0, T, T)))
        return kl, back(jnp.ones_like(kl)), mask

    kl, (dq, dk, _, dw, _), mask = ours(q, k, qi, w, ki)
    q, k, qi, w, ki = (np.asarray(a, np.float64) for a in (q, k, qi, w, ki))
    assert np.asarray(mask).sum(-1).max() == min(top_k, T)
    mask, seen = np.asarray(mask), segment[..., None] != 0
    score = np.where(mask[:, :, None], np.einsum("BTNK,BSNK->BTNS", q, np.repeat(k, N // G, 2)) * 0.5, -np.inf)

    def softmax(a):
        power = np.exp(a - np.where(np.isfinite(a.max(-1, keepdims=True)), a.max(-1, keepdims=True), 0))
        return power / np.maximum(power.sum(-1, keepdims=True), 1e-300)

    p = softmax(score).mean(2) * seen
    heads = np.maximum(np.einsum("BTHI,BSI->BTHS", qi, ki), 0)
    guess = softmax(np.where(mask, np.einsum("BTHS,BTH->BTS", heads, w), -np.inf)) * seen
    ratio = np.where(p > 0, p, 1) / np.where(p > 0, guess, 1)
    np.testing.assert_allclose(kl, (p * np.log(ratio)).sum(-1), atol=2e-5)
    assert (np.asarray(kl)[1, 90:] == 0).all()
    # Of a head's weight: how much more the guess gives its scores than attention does.
    np.testing.assert_allclose(dw, np.einsum("BTS,BTHS->BTH", guess - p, heads), atol=2e-5)
    assert not np.asarray(dq).any()
    assert not np.asarray(dk).any()


@pytest.mark.slow
def test_the_two_losses_are_walled_off_from_one_another():
    # v32_sparse_attention C2
    """The language loss reaches all but the indexers, MTP's too; the divergence reaches them alone."""
    p = pair(CFG)
    params, rest = partition(p.model)
    weights = LossWeights(index=1.0)

    @jax.jit
    def both(params, rest, tokens):
        def losses(params):
            total, out = loss(combine(params, rest), {"tokens": tokens}, weights)
            return total - out.losses["index"], out.losses["index"]

        values, back = jax.vjp(losses, params)
        one = jnp.ones((), jnp.float32)
        return values, back((one, one * 0))[0], back((one * 0, one))[0]

    (_, kl), language, index = both(params, rest, p.tokens)
    assert 0 < float(kl) < (CFG.n_layers + 1) * np.log(96)
    language, index = named(language), named(index)
    reached = lambda found: {name for name, a in found.items() if np.asarray(a).any()}  # noqa: E731
    assert reached(language) == {name for name in language if ".indexer." not in name}
    assert reached(index) == {name for name in index if ".indexer." in name}
    assert any(name.startswith("mtp") for name in reached(index))


def test_training_leaves_the_indexer_as_it_is():
    """By default: no gradient reaches it, and nothing decays."""
    held = named_variables(partition(abstract(CFG))[0])
    assert {decays(v) for name, v in held.items() if ".indexer." in name} == {False}


def test_packed_rows_choose_among_their_own_tokens():
    p = pair(CFG)
    a, b = 40, 56
    row = jnp.concatenate([p.tokens[:1, :a], p.tokens[1:, :b]], axis=1)
    segments = jnp.asarray([[1] * a + [2] * b])
    packed = forward(p.model, row, segments=segments, positions=jnp.asarray([[*range(a), *range(b)]]))
    alone = full(p).logits
    assert relative(packed.logits[0, :a], alone[0, :a]) <= 2e-5
    assert relative(packed.logits[0, a:], alone[1, :b]) <= 2e-5


def test_taking_back_tokens_takes_back_their_index_keys():
    p, prompt = pair(CFG), 60
    first = forward(p.model, p.tokens[:, :prompt], cache=p.model.init_cache(2, 100, rewind=4)).cache
    wrong = (p.tokens[:, prompt : prompt + 4] + 1) % CFG.vocab_size
    back = forward(p.model, wrong, cache=first).cache.rewind(jnp.asarray([4, 4]))
    ours, clean = (forward(p.model, p.tokens[:, prompt : prompt + 4], cache=cache) for cache in (back, first))
    np.testing.assert_array_equal(ours.logits, clean.logits)
    assert relative(clean.logits, full(p).logits[:, prompt : prompt + 4]) <= 2e-5


def test_the_indexer_rotates_in_halves_what_attention_rotates_in_pairs(monkeypatch):
    # v32_sparse_attention C3
    """An early file of the release rotated both in pairs; that chooses other keys."""
    model = random_model(CFG)
    indexer = unstack(model.stacks[0], 0).attn.indexer
    x, q = (jnp.asarray(np.random.default_rng(0).normal(0, 1, (1, 64, n)), jnp.float32) for n in (64, 48))
    tokens = make_tokens(CFG, jnp.arange(64)[None], jnp.ones((1, 64), jnp.int32), causal=True)
    seeking, k_BTI = indexer(x, q, tokens, DEFAULT)
    rotated = Tokens.rotated
    monkeypatch.setattr(Tokens, "rotated", lambda self, x, dim, rope, interleaved: rotated(self, x, dim, rope, True))
    early = index_scores(*indexer(x, q, tokens, DEFAULT))
    assert relative(index_scores(seeking, k_BTI), early) > 0.1
