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
from tiny import tiny_config, tokens_of

import deepseek_jax as dsj
from deepseek_jax.core.context import Context
from deepseek_jax.core.fp8 import Fp8
from deepseek_jax.kernels import cudnn, hopper
from deepseek_jax.kernels.grouped import grouped_matmul, grouped_outer
from deepseek_jax.model.attention import attend
from deepseek_jax.model.experts import routed_experts

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
    model = jax.eval_shape(partial(dsj.init, cfg, dtype=jnp.bfloat16), jax.random.key(0))
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
    ctx = dsj.Context(experts="hopper", attention="cudnn", dtype=jnp.dtype(jnp.bfloat16))
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

    for a, b in zip(run("cudnn", *qkv), run("xla", *qkv), strict=True):
        assert np.linalg.norm(a - b) < 2e-5 * np.linalg.norm(b)


def test_what_cudnn_refuses(with_cudnn, monkeypatch):
    tokens = replace(tokens_of(jnp.ones((1, 64))), causal=True, uniform=True)
    ctx = Context(attention="cudnn")
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
    with pytest.raises(
        ValueError, match=r'attention="cudnn"\): it is for NVIDIA GPUs of compute capability 9 or 10 or 12'
    ):
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
