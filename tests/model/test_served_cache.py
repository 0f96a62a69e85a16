"""A cache in FP8 and FP4: a model that runs with it is one whose keys are rounded when they are written."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from architectures import ARCHITECTURES
from reference import relative
from tiny import random_model, tiny_config

from deepseek_jax.core import cached, served
from deepseek_jax.core.context import Context
from deepseek_jax.core.served import Form
from deepseek_jax.model import mla, ring

SERVED = Context(cache="served")
CHUNK, CHUNKS = 8, 6


def _v4():
    cfg = ARCHITECTURES["v4"]
    # Widths that tell keys of the kinds apart: 16 attention's, 64 the indexer's.
    attention = replace(cfg.attention, ratios=(0, 4, 8), indexer=replace(cfg.attention.indexer, index_dim=64))
    return replace(cfg, n_layers=3, attention=attention, mtp_depth=0)


def _v32():
    cfg = ARCHITECTURES["v3.2"]
    indexer = replace(cfg.attention.indexer, index_dim=64)
    return replace(cfg, n_layers=2, attention=replace(cfg.attention, indexer=indexer), mtp_depth=0)


CASES = {
    "v4": (_v4(), {16: Form(8, 64, powers_of_two=True), 64: Form(64, 32, 4, powers_of_two=True, turned=True)}),
    "v3.2": (_v32(), {40: Form(32, 128), 64: Form(64, 128, turned=True)}),
}


def _in_chunks(model, tokens, ctx: Context):
    run = jax.jit(lambda model, tokens, cache: model(tokens, cache=cache, logits="all"))
    cache, pieces = model.init_cache(2, CHUNK * CHUNKS, rewind=3, ctx=ctx), []
    for first in range(0, tokens.shape[1], CHUNK):
        out = run(model, tokens[:, first : first + CHUNK], cache)
        cache = out.cache
        pieces.append(out.logits)
    # The last tokens again, over what stands there.
    again = run(model, jnp.concatenate([tokens[:, -3:], tokens[:, : CHUNK - 3]], 1), cache.rewind(jnp.array([3, 3])))
    return jnp.concatenate([*pieces, again.logits[:, :3]], 1), cache


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) if n == "v4" else n for n in CASES])
def test_a_cache_as_served_is_one_of_rounded_keys(name, monkeypatch):
    cfg, forms = CASES[name]
    model = random_model(cfg, seed=3)
    tokens = jnp.asarray(np.random.default_rng(4).integers(0, cfg.vocab_size, (2, CHUNK * CHUNKS)), jnp.int32)
    found, cache = _in_chunks(model, tokens, SERVED)
    assert cache.is_served
    # Rounding is seen: it is no cache in the compute dtype.
    whole = jax.jit(lambda model, tokens: model(tokens).logits)(model, tokens)
    assert 1e-3 < relative(found[:, : CHUNK * CHUNKS], whole) < 0.5

    original = cached.kept

    def rounded(x, like):
        """Of a cache of arrays: what would be read of one that is served."""
        form = forms.get(x.shape[-1])
        if form is None:
            return original(x, like)
        as_served = cached.empty(form, (1, 1, 1, x.shape[-1]), None, jnp.zeros)
        keys = cached.read(original(x, as_served), as_served, jnp.float32)
        return (served.turned(keys) if form.turned else keys).astype(like.dtype)

    for module in (cached, ring, mla):
        monkeypatch.setattr(module, "kept", rounded)
    expected, _ = _in_chunks(model, tokens, Context())
    assert relative(found, expected) <= 2e-5


def test_grouped_query_attention_has_no_such_cache():
    model = random_model(ARCHITECTURES["distill-qwen"])
    with pytest.raises(ValueError, match=r'cache="served".*grouped-query attention'):
        model.init_cache(1, 8, ctx=SERVED)
    with pytest.raises(ValueError, match="choose one of compute, served"):
        Context(cache="fp8")


def test_bytes_of_a_layer_are_the_published_ones():
    attention = replace(tiny_config().attention, kv_rank=512, rope_dim=64)
    model = random_model(tiny_config(attention=attention, n_layers=2, mtp_depth=0))
    cache = jax.eval_shape(lambda: model.init_cache(1, 8, ctx=SERVED))
    assert sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(cache.held)) == 2 * 8 * 656
