"""The forms for NVIDIA GPUs: interpreted on the CPU, kernels equal the plain forms; programs for CUDA have them."""

import re
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.cudnn import fused_attention_stablehlo
from jax._src.pallas.mosaic_gpu.interpret.params import force_gpu_interpret_mode
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from tiny import random_model, random_tokens, tiny_config, tokens_of

import deepseek_jax as dsj
from deepseek_jax.core.context import Context
from deepseek_jax.core.fp8 import Fp8
from deepseek_jax.kernels import cudnn, hopper, hopper_decode
from deepseek_jax.kernels.grouped import grouped_matmul, grouped_outer
from deepseek_jax.model.attention import attend
from deepseek_jax.model.experts import routed_experts
from deepseek_jax.model.transformer import abstract

H100 = SimpleNamespace(platform="gpu", compute_capability="9.0")
E, D, Z = 7, 64, 128
# Rows of 7 experts: none at first, a block and a little, none between, a few, two blocks whole, some that end a block,
# and none at last; 20 rows are nobody's.
SIZES, ROWS = (0, 70, 0, 3, 183, 64, 0), 340


@pytest.fixture
def on_hopper(monkeypatch):
    """A machine that says it is one, for programs that are traced only."""
    monkeypatch.setattr(jax, "devices", lambda *_: [H100])


def multiplied(multiply, sums, *operands):
    """``multiply(sums, *operands)``; for the interpreter of jax 0.10, which transposes nothing, with a copy."""
    turned = [a for a in operands if type(getattr(a, "transforms", [None])[-1]).__name__ == "TransposeTransform"]
    if not turned:
        return multiply(sums, *operands)
    straight = replace(turned[0], transforms=turned[0].transforms[:-1])

    def run(copy):
        copy[...] = straight[...].T
        multiply(sums, *(copy if a is turned[0] else a for a in operands))

    return pl.run_scoped(run, plgpu.SMEM(turned[0].shape, turned[0].dtype))


@pytest.fixture
def interpreted(on_hopper, monkeypatch):
    """The context in which kernels run interpreted."""
    monkeypatch.setattr(hopper, "PROCESSORS", 1)
    if jax.__version_info__ < (0, 11):
        monkeypatch.setattr(plgpu, "wgmma", partial(multiplied, plgpu.wgmma))
    # It has no products that add to registers either.
    added = lambda o, p, v: o + p.astype(jnp.float32) @ v[...].astype(jnp.float32)  # noqa: E731
    monkeypatch.setattr(hopper_decode, "_sum", added)
    return force_gpu_interpret_mode


def arrays(*shapes, dtype=jnp.bfloat16):
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.normal(0, 1, shape), dtype) for shape in shapes]


def exact(*operands):
    return (np.asarray(a, np.float32) for a in operands)


def beyond(a, fill=np.nan):
    return a.at[sum(SIZES) :].set(fill)


GROUP = np.repeat(np.arange(E), SIZES)


def test_rows_times_weights(interpreted):
    x, w = arrays((ROWS, D), (E, D, Z))
    with interpreted():
        y = grouped_matmul(beyond(x), w, jnp.asarray(SIZES), "hopper")
    assert y.dtype == jnp.bfloat16
    x, w = exact(x, w)
    # Of the products' sums, only the rounding to bfloat16 is left.
    expected = np.einsum("MD,MDZ->MZ", x[: GROUP.size], w[GROUP])
    np.testing.assert_allclose(np.asarray(y, np.float32)[: GROUP.size], expected, rtol=2**-8, atol=1e-4)


@pytest.mark.slow
def test_rows_times_transposed_weights(interpreted):
    y, w = arrays((ROWS, Z), (E, D, Z))
    with interpreted():
        x = grouped_matmul(beyond(y), w, jnp.asarray(SIZES), "hopper", transpose=True)
    y, w = exact(y, w)
    expected = np.einsum("MZ,MDZ->MD", y[: GROUP.size], w[GROUP])
    np.testing.assert_allclose(np.asarray(x, np.float32)[: GROUP.size], expected, rtol=2**-8, atol=1e-4)


@pytest.mark.parametrize("dtype", [jnp.float32, pytest.param(jnp.bfloat16, marks=pytest.mark.slow)])
def test_weight_gradient(dtype, interpreted):
    x, y = arrays((ROWS, D), (ROWS, Z))
    with interpreted():
        outer = grouped_outer(beyond(x), beyond(y), jnp.asarray(SIZES), "hopper", dtype)
    assert outer.dtype == dtype
    x, y = exact(x, y)
    for e in range(E):
        mine = np.flatnonzero(e == GROUP)
        expected = x[mine].T @ y[mine]
        rounding = {"rtol": 1e-6, "atol": 1e-4} if dtype == jnp.float32 else {"rtol": 2**-8, "atol": 1e-4}
        np.testing.assert_allclose(np.asarray(outer[e], np.float32), expected, **rounding)
    assert (np.asarray(outer)[np.asarray(SIZES) == 0] == 0).all()


@pytest.mark.slow
def test_experts_and_their_gradients(interpreted):
    """As near to float32 as the block form is: output, and gradients for tokens, weights and both matrices."""
    n, k, width = 60, 2, 64
    x, gate_up, down, cotangent = arrays((n, D), (E, D, 2, width), (E, width, D), (n, D))
    gate_up, down = gate_up / 8, down / 8
    rng = np.random.default_rng(1)
    index = jnp.asarray(np.where(rng.random((n, 1)) < 0.2, -1, rng.random((n, E)).argsort(-1)[:, :k]))
    weight = jnp.asarray(rng.random((n, k)), jnp.bfloat16)

    def run(form, dtype):
        def f(x, weight, gate_up, down):
            return routed_experts(x, index, weight, gate_up, down, form)

        y, back = jax.vjp(f, *(a.astype(dtype) for a in (x, weight, gate_up, down)))
        return y, *back(cotangent.astype(dtype))

    with interpreted():
        ours = run("hopper", jnp.bfloat16)
    theirs, reference = run("blocks", jnp.bfloat16), run("blocks", jnp.float32)
    for name, a, b, c in zip(("y", "dx", "dweight", "dgate_up", "ddown"), ours, theirs, reference, strict=True):
        a, b, c = exact(a, b, c)
        assert np.linalg.norm(a - c) < 1.5 * np.linalg.norm(b - c) < 0.02 * np.linalg.norm(c), name


@pytest.fixture
def with_cudnn(on_hopper, monkeypatch):
    """Such a machine with a cuDNN, whose version JAX asks for as it traces."""
    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 91200)
    monkeypatch.setattr(fused_attention_stablehlo, "check_compute_capability", lambda _: True)


def gradient_for_a_gpu(cfg, ctx, batch) -> str:
    """The program of a training gradient, lowered for CUDA from shapes alone."""
    model = abstract(cfg, jnp.bfloat16)
    params, rest = dsj.partition(model)

    def gradient(params, rest, batch):
        return jax.grad(lambda p: dsj.loss(dsj.combine(p, rest), batch, ctx=ctx)[0])(params)

    return jax.jit(gradient).trace(params, rest, batch).lower(lowering_platforms=("cuda",)).as_text()


# One block of queries, and no width of the model: a shape that has it twice is one of scores or of a mask.
LENGTH = 56


def test_training_program_for_a_gpu_has_no_dense_expansion_and_no_scores(with_cudnn):
    # Experts as wide as the kernels' blocks.
    cfg = tiny_config(n_layers=2, mtp_depth=0)
    cfg = replace(cfg, moe=replace(cfg.moe, expert_dim=64))
    ctx = dsj.Context(experts="hopper", attention="hopper", dtype=jnp.dtype(jnp.bfloat16))
    batch = {"tokens": jax.ShapeDtypeStruct((2, LENGTH), jnp.int32)}
    text = gradient_for_a_gpu(cfg, ctx, batch)
    # Two products forward and four backward, and no other with the matrices of all 8 experts.
    assert text.count("custom_call @mosaic_gpu_v2") == 6
    assert "chlo.ragged_dot" not in text
    operands = re.findall(r"dot_general .*: \(tensor<([\dx]+)x\w+>, tensor<([\dx]+)x\w+>\)", text)
    assert len(operands) > 20
    assert not [pair for pair in operands if any(shape.startswith("8x64x") for shape in pair)]
    # The attention of a dense layer and of a layer of experts.
    assert text.count("custom_call @__cudnn$fmhaSoftmax(") == 2
    assert text.count("custom_call @__cudnn$fmhaSoftmaxBackward(") == 2
    assert not re.findall(rf"tensor<(?:\d+x)*{LENGTH}x{LENGTH}x", text)


@pytest.mark.parametrize("heads", [(4, 4), (4, 2)])
def test_what_cudnn_is_asked_for_is_our_attention(heads, with_cudnn, monkeypatch):
    """Scale, layout, causality and the zeros behind narrow values, with JAX's plain form in cuDNN's place."""
    asked = jax.nn.dot_product_attention

    def plain(*arrays, implementation, **how):
        assert implementation == "cudnn"
        return asked(*arrays, implementation="xla", **how)

    monkeypatch.setattr(jax.nn, "dot_product_attention", plain)
    monkeypatch.setattr(cudnn, "DTYPES", (jnp.float32,))
    (N, G), K, V, B = heads, 24, 16, 2
    shapes = (B, LENGTH, N, K), (B, LENGTH, G, K), (B, LENGTH, G, V), (B, LENGTH, N, V)
    *qkv, cotangent = arrays(*shapes, dtype=jnp.float32)
    tokens = replace(tokens_of(jnp.ones((B, LENGTH))), causal=True, uniform=True)

    @partial(jax.jit, static_argnums=0)
    def run(form, *qkv):
        o, back = jax.vjp(lambda *a: attend(*a, tokens, 0.3, Context(attention=form)), *qkv)
        return o, *back(cotangent)

    for a, b in zip(run("hopper", *qkv), run("xla", *qkv), strict=True):
        assert np.linalg.norm(a - b) < 2e-5 * np.linalg.norm(b)


def test_what_cudnn_refuses(with_cudnn, monkeypatch):
    tokens = replace(tokens_of(jnp.ones((1, 64))), causal=True, uniform=True)
    ctx = Context(attention="hopper")
    call = partial(attend, tokens=tokens, scale=0.3, ctx=ctx)
    q, k, v, wide = arrays((1, 64, 2, 24), (1, 64, 2, 24), (1, 64, 2, 16), (1, 64, 2, 264))
    with pytest.raises(ValueError, match="takes bfloat16 or float16, not float32; choose"):
        call(*(a.astype(jnp.float32) for a in (q, k, v)))
    with pytest.raises(ValueError, match="keys of a multiple of 8 numbers up to 256, not 264; choose"):
        call(wide, wide, v)
    with pytest.raises(ValueError, match="values no wider than keys, not 264 beside 24; choose"):
        call(q, k, wide)
    packed = jax.jit(partial(call, tokens=replace(tokens, uniform=False))).lower(q, k, v).as_text()
    assert "cudnn" not in packed
    monkeypatch.undo()
    with pytest.raises(ValueError, match=r'attention="hopper"\): it is for NVIDIA GPUs of compute capability 9'):
        call(q, k, v)


def test_what_the_kernels_refuse(on_hopper, monkeypatch):
    x, w = arrays((64, 64), (2, 64, 64))
    sizes = jnp.asarray([30, 34])
    with pytest.raises(ValueError, match="multiplies bfloat16 or float16, not float32; give"):
        grouped_matmul(x.astype(jnp.float32), w, sizes, "hopper")
    with pytest.raises(ValueError, match='an expert maps 64 numbers to 40; choose "auto"'):
        grouped_matmul(x, w[..., :40], sizes, "hopper")
    monkeypatch.setattr(jax, "devices", lambda *_: [SimpleNamespace(platform="gpu", compute_capability="8.0")])
    with pytest.raises(ValueError, match=r"the devices here are of compute capability 8\.0; choose"):
        grouped_outer(x, x, sizes, "hopper")
    monkeypatch.undo()
    with pytest.raises(ValueError, match="of the platform 'cpu'; choose"):
        grouped_matmul(x, w, sizes, "hopper")
    with pytest.raises(ValueError, match=r'experts="hopper", fp8=.* is not emulated'):
        dsj.Context(experts="hopper", fp8=Fp8())


def plain_attention(q_BNK, k_BSK, visible_BS, scale, value_dim):
    s_BNS = jnp.einsum("BNK,BSK->BNS", q_BNK, k_BSK, preferred_element_type=jnp.float32) * scale
    top = jnp.where(visible_BS[:, None], s_BNS, -1e30).max(-1, keepdims=True)
    p_BNS = jnp.where(visible_BS[:, None], jnp.exp(s_BNS - top), 0)
    v_BSV = k_BSK[..., :value_dim]
    o_BNV = jnp.einsum("BNS,BSV->BNV", p_BNS.astype(v_BSV.dtype), v_BSV, preferred_element_type=jnp.float32)
    return o_BNV / jnp.maximum(p_BNS.sum(-1, keepdims=True), 1e-30)


# V3's sizes, both parts of the values, two parts of a row's keys: a length within a block and with holes, one that ends
# a block, and no key.
def test_a_step_of_decoding_over_the_cache(interpreted, monkeypatch):
    B, N, S, K, V, layer = 3, 5, 256, 576, 512, 1
    monkeypatch.setattr(hopper_decode, "PROCESSORS", 12)
    q, k = arrays((B, N, K), (2, B, S, K))
    visible = np.arange(S) < np.asarray([130, 64, 0])[:, None]
    visible[0, 60:100] = False
    visible = jnp.asarray(visible)
    # What stands behind the last visible block is never read.
    k = k.at[1, 1, 64:].set(jnp.nan).at[0].set(jnp.nan)
    with interpreted():
        ours = hopper_decode.absorbed_attention(q, k, layer, visible, 0.1, V)
    assert ours.dtype == jnp.bfloat16
    assert (np.asarray(ours[2]) == 0).all()
    seen = jnp.where(visible[..., None], k[layer], 0)
    theirs = plain_attention(q, seen, visible, 0.1, V).astype(jnp.bfloat16)
    reference = plain_attention(q.astype(jnp.float32), seen.astype(jnp.float32), visible, 0.1, V)
    for b in range(2):
        a, other, c = exact(ours[b], theirs[b], reference[b])
        assert np.linalg.norm(a - c) <= 1.5 * np.linalg.norm(other - c) <= 0.01 * np.linalg.norm(c), b


# Heads, latents and slots: V3's, and those of V2-Lite, whose heads are a quarter of a tile.
@pytest.mark.parametrize("heads", [128, 16])
def test_published_sizes_lower_for_a_gpu(heads, on_hopper):
    shapes = ((8, heads, 576), (3, 8, 4096, 576))
    q, k = (jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in shapes)
    visible, layer = jax.ShapeDtypeStruct((8, 4096), bool), jax.ShapeDtypeStruct((), jnp.int32)
    run = jax.jit(lambda q, k, layer, visible: hopper_decode.absorbed_attention(q, k, layer, visible, 0.1, 512))
    text = run.trace(q, k, layer, visible).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("custom_call @mosaic_gpu_v2") == 1


def latent_config():
    """A tiny V3 whose latents are whole tiles."""
    cfg = tiny_config(n_layers=2, mtp_depth=0)
    return replace(cfg, attention=replace(cfg.attention, kv_rank=64, rope_dim=64))


def step_of(model, tokens, ctx):
    """The last token's logits, after a prompt of the others without the kernel."""
    cache = model.init_cache(*tokens.shape, ctx=ctx)
    *prompt, last = jnp.split(tokens, [tokens.shape[1] - 1], axis=1)
    cache = model(prompt[0], cache=cache, ctx=replace(ctx, attention="xla")).cache
    return model(last, cache=cache, ctx=ctx).logits


def test_a_step_of_a_model_reads_the_cache_by_the_kernel(on_hopper):
    cfg = latent_config()
    ctx = dsj.Context(attention="hopper", mla="absorbed", dtype=jnp.dtype(jnp.bfloat16))
    model = abstract(cfg, jnp.bfloat16)
    tokens = jax.ShapeDtypeStruct((2, 100), jnp.int32)
    run = jax.jit(partial(step_of, ctx=ctx))
    text = run.trace(model, tokens).lower(lowering_platforms=("cuda",)).as_text()
    # A dense layer and one of experts.
    assert text.count("custom_call @mosaic_gpu_v2") == 2
    # No scores of one query over the slots, 100 rounded up.
    assert "tensor<2x1x4x1x128xf32>" not in text


@pytest.mark.slow
def test_a_step_of_a_model_is_the_plain_one(interpreted):
    model, tokens = random_model(latent_config(), dtype=jnp.bfloat16), random_tokens(latent_config(), 2, 100)
    ctx = dsj.Context(attention="hopper", mla="absorbed", dtype=jnp.dtype(jnp.bfloat16))
    with interpreted():
        ours = step_of(model, tokens, ctx)
    theirs = step_of(model, tokens, replace(ctx, attention="xla"))
    reference = step_of(model, tokens, replace(ctx, attention="xla", dtype=jnp.dtype(jnp.float32)))
    a, b, c = exact(ours, theirs, reference)
    assert np.linalg.norm(a - c) < 1.5 * np.linalg.norm(b - c) < 0.05 * np.linalg.norm(c)


def test_what_a_step_of_decoding_refuses(on_hopper):
    q, k = arrays((1, 4, 128), (1, 1, 64, 128))
    run = partial(hopper_decode.absorbed_attention, layer=0, scale=0.1)
    see = lambda size: jnp.ones((1, size), bool)  # noqa: E731
    with pytest.raises(ValueError, match="not float32 and bfloat16; give"):
        run(q.astype(jnp.float32), k, visible_BS=see(64), value_dim=64)
    with pytest.raises(ValueError, match="not 128 and 40; choose"):
        run(q, k, visible_BS=see(64), value_dim=40)
    with pytest.raises(ValueError, match="this cache has 60 a row; make it with"):
        run(q, k[:, :, :60], visible_BS=see(60), value_dim=64)
    ctx = dsj.Context(attention="hopper")
    cache = jax.eval_shape(lambda: abstract(tiny_config(), jnp.bfloat16).init_cache(1, 65, ctx=ctx))
    assert cache.capacity == 128
