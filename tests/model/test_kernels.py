"""The Pallas kernels, interpreted on the CPU, equal the XLA forms: outputs, gradients and a whole model."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import random_model, random_tokens, tiny_config

import deepseek_jax as dsj
from deepseek_jax.core.context import Context
from deepseek_jax.kernels import attention, megablox
from deepseek_jax.kernels.grouped import grouped_matmul, grouped_outer
from deepseek_jax.model.attention import attend
from deepseek_jax.model.tokens import Tokens, make_tokens

# Relative Frobenius errors, float32.
BOUND = 2e-5
# Heads, heads of keys, key and value dim: as MLA's expanded form has them, as its absorbed one, and grouped queries.
HEADS = {"expanded": (2, 2, 24, 16), "absorbed": (3, 1, 40, 32), "grouped": (4, 2, 16, 16)}


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks of 128 tokens, so that a few hundred make several; and tiles of few rows and columns."""
    for name in ("BLOCK", "WIDE_BLOCK", "COMPUTE"):
        monkeypatch.setattr(attention, name, 128)
    monkeypatch.setattr(megablox, "TILE_ROWS", 16)
    monkeypatch.setattr(megablox, "TILE_BYTES", 32)


def error(ours, theirs) -> float:
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    return np.linalg.norm(ours - theirs) / np.linalg.norm(theirs)


def tokens_of(segment, **changes) -> Tokens:
    position = jnp.broadcast_to(jnp.arange(segment.shape[1]), segment.shape)
    return replace(make_tokens(tiny_config(), position, segment, causal=True), **changes)


def packed() -> jax.Array:
    """Rows of 384: texts that end within, at and over the borders of blocks; padding before, between and behind."""
    segment = np.ones((3, 384), np.int32)
    segment[0, 70:128], segment[0, 128:300], segment[0, 300:] = 2, 3, 0
    segment[1, :10], segment[1, 100:110], segment[1, 110:] = 0, 0, 2
    segment[2, 1:] = 0
    return jnp.asarray(segment)


def both_ways(q, k, v, tokens, cotangent, form, remat="none"):
    """The output, and the gradients of its inner product with ``cotangent``."""
    o, back = jax.vjp(lambda q, k, v: attend(q, k, v, tokens, 0.3, Context(attention=form, remat=remat)), q, k, v)
    return o, *back(cotangent)


def tensors(heads: str, segment, dtype=jnp.float32):
    (N, G, K, V), rng = HEADS[heads], np.random.default_rng(0)
    shapes = ((N, K), (G, K), (G, V), (N, V))
    q, k, v, cotangent = (jnp.asarray(rng.normal(0, 1, (*segment.shape, *s)), dtype) for s in shapes)
    return q, k, v, cotangent


# With "offload" the backward pass is two kernels, else one. Both shapes of heads take both the same way.
@pytest.mark.parametrize(
    ("heads", "remat"),
    [
        ("expanded", "none"),
        ("absorbed", "offload"),
        ("grouped", "none"),
        pytest.param("grouped", "offload", marks=pytest.mark.slow),
        pytest.param("expanded", "offload", marks=pytest.mark.slow),
        pytest.param("absorbed", "none", marks=pytest.mark.slow),
    ],
)
def test_attention_of_packed_rows_with_padding(heads, remat, small_blocks):
    segment = packed()
    q, k, v, cotangent = tensors(heads, segment)
    run = jax.jit(both_ways, static_argnames=("form", "remat"))
    ours = run(q, k, v, tokens_of(segment), cotangent, form="kernel", remat=remat)
    theirs = run(q, k, v, tokens_of(segment), cotangent, form="xla")
    for name, a, b in zip(("o", "dq", "dk", "dv"), ours, theirs, strict=True):
        assert error(a, b) < BOUND, name
        # Padding takes no part: neither its queries nor its keys, though other padding precedes them.
        assert (np.asarray(a)[np.asarray(segment) == 0] == 0).all(), name


def test_attention_of_whole_rows(small_blocks):
    segment = jnp.ones((1, 256), jnp.int32)
    q, k, v, cotangent = tensors("expanded", segment)
    tokens = tokens_of(segment, uniform=True)
    ours, theirs = (jax.jit(partial(both_ways, form=f))(q, k, v, tokens, cotangent) for f in ("kernel", "xla"))
    assert max(error(a, b) for a, b in zip(ours, theirs, strict=True)) < BOUND


def test_attention_in_bfloat16_is_as_near_to_float32_as_the_other_form(small_blocks):
    segment = packed()
    exact = jax.jit(partial(both_ways, form="xla"))
    half = tensors("expanded", segment, jnp.bfloat16)
    full = [a.astype(jnp.float32) for a in half]
    reference = exact(*full[:3], tokens_of(segment), full[3])
    ours, theirs = (
        jax.jit(partial(both_ways, form=form))(*half[:3], tokens_of(segment), half[3]) for form in ("kernel", "xla")
    )
    for name, a, b, c in zip(("o", "dq", "dk", "dv"), ours, theirs, reference, strict=True):
        assert a.dtype == jnp.bfloat16
        assert error(a, c) < 1.5 * error(b, c) < 0.02, name


def test_automatic_choice_depends_on_the_platform_alone():
    segment = jnp.ones((1, 256), jnp.int32)
    arrays = (*tensors("expanded", segment)[:3], tokens_of(segment))
    run = jax.jit(lambda *a: attend(*a, 0.3, Context(attention="auto")))
    lowered = {p: run.trace(*arrays).lower(lowering_platforms=(p,)).as_text() for p in ("cpu", "cuda", "tpu")}
    assert {p: "tpu_custom_call" in text for p, text in lowered.items()} == {"cpu": False, "cuda": False, "tpu": True}
    # With a cache, with given positions or with rows of another length there is one form only.
    q, k, v, tokens = (jax.tree.map(lambda a: a[:, :200], a) for a in arrays)
    others = [(q, k, v, tokens), (*arrays[:3], replace(arrays[3], causal=False))]
    others += [(*arrays[:3], replace(arrays[3], slot=arrays[3].position))]
    for call in others:
        assert "tpu_custom_call" not in run.trace(*call).lower(lowering_platforms=("tpu",)).as_text()


def test_kernel_refuses_what_it_cannot_do():
    segment = jnp.ones((1, 256), jnp.int32)
    q, k, v, _ = tensors("expanded", segment)
    ctx = Context(attention="kernel")
    with pytest.raises(ValueError, match="in order, and this call gives positions; choose"):
        attend(q, k, v, tokens_of(segment, causal=False), 0.3, ctx)
    with pytest.raises(ValueError, match="a multiple of 128 tokens, not 250"):
        attend(*(a[:, :250] for a in (q, k, v)), tokens_of(segment[:, :250]), 0.3, ctx)
    with pytest.raises(ValueError, match="choose one of auto, xla, kernel, hopper"):
        Context(attention="flash")


# Rows of 24 columns by tiles of 8, and of 20: the last tile is partial. Tiles of 16 rows hold rows of several groups.
@pytest.mark.parametrize("dims", [(24, 16), (20, 12)])
@pytest.mark.parametrize("sizes", [(5, 0, 40, 3, 22), (0, 0, 0, 0, 0), (0, 16, 16, 0, 0)])
def test_grouped_matmul_in_many_tiles(dims, sizes, small_blocks):
    (D, Z), M, rng = dims, 70, np.random.default_rng(2)
    x, y, w = (jnp.asarray(rng.normal(0, 1, s), jnp.float32) for s in ((M, D), (M, Z), (len(sizes), D, Z)))
    sizes = jnp.asarray(sizes, jnp.int32)
    group = np.repeat(np.arange(len(sizes)), sizes)
    rows, n = np.asarray(x), group.size
    expected = np.einsum("MD,MDZ->MZ", rows[:n], np.asarray(w)[group])
    np.testing.assert_allclose(grouped_matmul(x, w, sizes, "kernel")[:n], expected, atol=1e-5)
    expected = np.einsum("MZ,MDZ->MD", np.asarray(y)[:n], np.asarray(w)[group])
    np.testing.assert_allclose(grouped_matmul(y, w, sizes, "kernel", transpose=True)[:n], expected, atol=1e-5)
    outer = grouped_outer(x, y, sizes, "kernel", jnp.bfloat16)
    assert outer.dtype == jnp.bfloat16
    for e in range(len(sizes)):
        expected = rows[:n][group == e].T @ np.asarray(y)[:n][group == e]
        np.testing.assert_allclose(np.asarray(outer[e], np.float32), expected, rtol=5e-3, atol=5e-3)


@pytest.mark.slow
def test_model_on_kernels_equals_the_model_without():
    cfg = tiny_config(n_layers=2)
    model, tokens = random_model(cfg), random_tokens(cfg, 2, 128)
    segments = jnp.ones((2, 128), jnp.int32).at[0, 50:].set(2).at[1, 100:].set(0)
    params, rest = dsj.partition(model)

    def run(params, ctx):
        def loss(params):
            return dsj.loss(dsj.combine(params, rest), {"tokens": tokens, "segments": segments}, ctx=ctx)[0]

        logits = dsj.combine(params, rest)(tokens, segments=segments, ctx=ctx).logits
        return logits, jax.grad(loss)(params)

    ours, theirs = (
        jax.jit(partial(run, ctx=dsj.Context(attention=a, experts=e, remat="full")))(params)
        for a, e in (("kernel", "kernel"), ("xla", "ragged"))
    )
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        assert error(a, b) < BOUND
