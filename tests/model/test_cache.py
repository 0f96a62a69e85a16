"""Decoding with the latent cache equals the full forward and transformers' cache; rewinding is exact."""

import warnings
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from measured import measured
from reference import forward, full, pair, relative
from test_parity import CONFIGS

from deepseek_jax.configs.zoo import zoo
from deepseek_jax.core.context import Context

TINY = CONFIGS["tiny-v3"][0]
PROMPT, STEPS = 90, 6
EXPANDED, ABSORBED = Context(mla="expanded"), Context(mla="absorbed")


def prefill(p, cache, length=PROMPT, ctx=None):
    return forward(p.model, p.tokens[:, :length], cache=cache, with_mtp=p.model.cfg.mtp_depth > 0, ctx=ctx)


def step(p, tokens_B1, cache, **arguments):
    return forward(p.model, tokens_B1, cache=cache, **arguments)


@pytest.mark.parametrize("name", ["tiny-v3", "queries not compressed"])
def test_cached_decoding_equals_the_full_forward(name):
    check_decoding(pair(CONFIGS[name][0]), name)


def check_decoding(p, name: str):
    """Prefill, then token by token: our full forward's logits, and transformers' with its own cache."""
    whole = full(p)
    cache = p.model.init_cache(2, 100)
    out = prefill(p, cache)
    pieces = [out.logits]
    for t in range(PROMPT, PROMPT + STEPS):
        out = step(p, p.tokens[:, t : t + 1], out.cache)
        pieces.append(out.logits)
    error = relative(jnp.concatenate(pieces, 1), whole.logits[:, : PROMPT + STEPS])
    assert error <= 2e-5
    measured(name, "decode", error)
    np.testing.assert_array_equal(out.cache.length, [PROMPT + STEPS] * 2)


def test_greedy_decoding_equals_transformers_cache_and_generate():
    p = pair(TINY)
    prompt, tokens = p.tokens[:, :PROMPT], check_greedy(p)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        generated = p.reference.main.generate(
            torch.tensor(np.asarray(prompt), dtype=torch.long),
            max_new_tokens=STEPS,
            do_sample=False,
            eos_token_id=None,
        )
    np.testing.assert_array_equal(generated[:, PROMPT:], tokens)


def check_greedy(p):
    """Greedy decoding step by step with transformers' cache and with ours; the tokens."""
    tokens, seen = p.reference.decode(p.tokens[:, :PROMPT], STEPS)
    out = prefill(p, p.model.init_cache(2, 100))
    for i in range(STEPS):
        last = out.logits[:, -1]
        assert relative(last, seen[i].logits[:, -1]) <= 2e-5
        np.testing.assert_array_equal(last.argmax(-1), tokens[:, i])
        out = step(p, last.argmax(-1, keepdims=True).astype(jnp.int32), out.cache)
    return tokens


def test_absorbed_equals_expanded():
    p = pair(TINY)
    whole = full(p).logits
    for ctx in (EXPANDED, ABSORBED):
        assert relative(forward(p.model, p.tokens, ctx=ctx).logits, whole) <= 2e-5


def test_rows_of_different_lengths_share_a_cache():
    p = pair(TINY)
    whole = full(p).logits
    segments = jnp.asarray(np.arange(PROMPT)[None] < np.array([[PROMPT], [40]]), jnp.int32)
    out = forward(p.model, p.tokens[:, :PROMPT], segments=segments, cache=p.model.init_cache(2, 100), logits="last")
    assert out.logits.shape == (2, 1, TINY.vocab_size)
    assert relative(out.logits[0, 0], whole[0, PROMPT - 1]) <= 2e-5
    assert relative(out.logits[1, 0], whole[1, 39]) <= 2e-5
    np.testing.assert_array_equal(out.cache.length, [PROMPT, 40])
    for i in range(3):
        tokens = jnp.stack([p.tokens[0, PROMPT + i], p.tokens[1, 40 + i]])[:, None]
        out = step(p, tokens, out.cache)
        assert relative(out.logits[0, 0], whole[0, PROMPT + i]) <= 2e-5
        assert relative(out.logits[1, 0], whole[1, 40 + i]) <= 2e-5


def test_several_tokens_at_once_and_a_row_that_rests():
    p = pair(TINY)
    whole = full(p).logits
    out = prefill(p, p.model.init_cache(2, 100))
    # Row 0 takes four tokens, row 1 two.
    segments = jnp.asarray([[1, 1, 1, 1], [1, 1, 0, 0]])
    out = step(p, p.tokens[:, PROMPT : PROMPT + 4], out.cache, segments=segments)
    assert relative(out.logits[0], whole[0, PROMPT : PROMPT + 4]) <= 2e-5
    assert relative(out.logits[1, :2], whole[1, PROMPT : PROMPT + 2]) <= 2e-5
    np.testing.assert_array_equal(out.cache.length, [PROMPT + 4, PROMPT + 2])


def test_a_large_cache_equals_the_full_forward():
    # The keys are read in tiles here, also by the second call, whose queries begin within the first tile.
    p = pair(TINY)
    whole = full(p)
    first = prefill(p, p.model.init_cache(2, 300), length=30)
    second = forward(p.model, p.tokens[:, 30:], cache=first.cache, with_mtp=True)
    assert relative(jnp.concatenate([first.logits, second.logits], 1), whole.logits) <= 2e-5


def test_rewinding_equals_never_having_decoded():
    p = pair(TINY)
    first = prefill(p, p.model.init_cache(2, 100, rewind=4))
    wrong = step(p, (p.tokens[:, PROMPT : PROMPT + 4] + 1) % TINY.vocab_size, first.cache)
    back = wrong.cache.rewind(jnp.asarray([4, 3]))
    np.testing.assert_array_equal(back.length, [PROMPT, PROMPT + 1])
    # Row 1 keeps its first wrong token; row 0 is where it was, and so is everything after it.
    clean = step(p, p.tokens[:, PROMPT : PROMPT + 4], first.cache)
    again = step(p, p.tokens[:, PROMPT : PROMPT + 4], back)
    np.testing.assert_array_equal(again.logits[0], clean.logits[0])
    assert relative(again.logits[1], clean.logits[1]) > 1e-3
    for held in ("position", "segment"):
        np.testing.assert_array_equal(getattr(again.cache, held)[0], getattr(clean.cache, held)[0])


def test_a_module_forgets_what_the_model_takes_back():
    """Its rows lack tokens whose next one was unknown, so that the counts are its own."""
    p, ask = pair(TINY), {"with_mtp": True}
    first = prefill(p, p.model.init_cache(2, 100, rewind=4)).cache
    np.testing.assert_array_equal(first.mtp[0].length, [PROMPT - 1] * 2)
    # Four wrong tokens, of which the module sees three: it does not know what follows the last one.
    wrong = (p.tokens[:, PROMPT : PROMPT + 4] + 1) % TINY.vocab_size
    one = step(p, wrong[:, 3:], first, next_tokens=wrong[:, :1, None], **ask)
    cache = step(p, wrong[:, :3], one.cache, **ask).cache
    np.testing.assert_array_equal(cache.mtp[0].length, [PROMPT + 2] * 2)
    back = cache.rewind(jnp.asarray([4, 3]))
    np.testing.assert_array_equal(back.mtp[0].length, [PROMPT - 1, PROMPT])
    again, clean = (step(p, p.tokens[:, PROMPT : PROMPT + 4], c, **ask) for c in (back, first))
    np.testing.assert_array_equal(again.mtp_logits[0][0], clean.mtp_logits[0][0])
    assert relative(again.mtp_logits[0][1, :3], clean.mtp_logits[0][1, :3]) > 1e-3

    # A model that goes on without its module, then with it: the module sees neither that token nor stale ones.
    def later(cache):
        unseen = step(p, p.tokens[:, PROMPT : PROMPT + 1], cache).cache
        out = step(p, p.tokens[:, PROMPT + 1 : PROMPT + 5], unseen, **ask)
        assert out.cache.mtp[0].length[0] == PROMPT - 1 + 3
        return out.mtp_logits[0][0]

    np.testing.assert_array_equal(later(back), later(first))


def test_mtp_keeps_its_own_cache():
    p = pair(TINY)
    whole = full(p)
    out = prefill(p, p.model.init_cache(2, 100))
    # At the prompt's last position the next token was unknown, so the module has not seen it.
    np.testing.assert_array_equal(out.cache.mtp[0].length, [PROMPT - 1] * 2)
    pieces = []
    known = jnp.concatenate([p.tokens[:, PROMPT + 1 :], jnp.full((2, 1), -1, jnp.int32)], 1)
    cache = forward(
        p.model,
        p.tokens[:, :PROMPT],
        cache=p.model.init_cache(2, 100),
        next_tokens=p.tokens[:, 1 : PROMPT + 1, None],
        with_mtp=True,
    ).cache
    for t in range(PROMPT, PROMPT + 3):
        out = step(
            p,
            p.tokens[:, t : t + 1],
            cache,
            next_tokens=known[:, t - PROMPT : t - PROMPT + 1, None],
            with_mtp=True,
        )
        pieces.append(out.mtp_logits[0])
        cache = out.cache
    assert relative(jnp.concatenate(pieces, 1), whole.mtp_logits[0][:, PROMPT : PROMPT + 3]) <= 2e-5


def test_rewind_says_what_it_cannot_do():
    p = pair(TINY)
    cache = p.model.init_cache(2, 100, rewind=2)
    with pytest.raises(ValueError, match="takes back 0 to 2 tokens"):
        cache.rewind(jnp.asarray([0, 3]))
    with pytest.raises(ValueError, match="exceeds the lengths"):
        cache.rewind(jnp.asarray([1, 1]))


def test_more_tokens_than_the_cache_holds_are_refused():
    p = pair(TINY)
    with pytest.raises(ValueError, match="9 tokens a row exceed the cache's length of 8"):
        p.model(p.tokens[:, :9], cache=p.model.init_cache(2, 8))
    full = replace(p.model.init_cache(2, 8), length=jnp.asarray([5, 3]))
    with pytest.raises(ValueError, match=r"holds \[5, 3\] tokens of 8 a row; 4 more do not fit"):
        p.model(p.tokens[:, :4], cache=full)
    with pytest.raises(ValueError, match="the cache's arrays have shapes"):
        p.model(p.tokens[:1, :4], cache=full)
    # Padding takes no room: the first row has three tokens to come, and they fit.
    segments = jnp.asarray([[1, 1, 1, 0], [1, 1, 1, 1]])
    assert step(p, p.tokens[:, :4], full, segments=segments).cache.length.tolist() == [8, 7]


def test_a_v3_cache_holds_576_numbers_a_token_and_layer():
    attention = zoo("deepseek-v3").attention
    assert attention.kv_rank + attention.rope_dim == 576
    held = jax.tree.leaves(pair(TINY).model.init_cache(1, 8).held)
    assert [a.shape for a in held] == [(1, 1, 8, 32 + 8), (2, 1, 8, 32 + 8)]
