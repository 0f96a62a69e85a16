"""The kernels for NVIDIA Hopper, interpreted on the CPU, equal the plain forms; and programs for a GPU have them."""

import re
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic_gpu.interpret.params import force_gpu_interpret_mode
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from tiny import tiny_config

import deepseek_jax as dsj
from deepseek_jax.core.fp8 import Fp8
from deepseek_jax.kernels import hopper
from deepseek_jax.kernels.grouped import grouped_matmul, grouped_outer
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


def wide_config():
    """A tiny V3 whose experts are as wide as the kernels' blocks."""
    cfg = tiny_config(n_layers=2, mtp_depth=0)
    return replace(cfg, moe=replace(cfg.moe, expert_dim=64))


def test_training_program_for_a_gpu_has_no_dense_expansion(on_hopper):
    cfg = wide_config()
    model = jax.eval_shape(partial(dsj.init, cfg, dtype=jnp.bfloat16), jax.random.key(0))
    params, rest = dsj.partition(model)
    tokens = jax.ShapeDtypeStruct((2, 32), jnp.int32)
    ctx = dsj.Context(experts="hopper", dtype=jnp.dtype(jnp.bfloat16))

    def step(params, rest, tokens):
        return jax.grad(lambda p: dsj.loss(dsj.combine(p, rest), {"tokens": tokens}, ctx=ctx)[0])(params)

    text = jax.export.export(jax.jit(step), platforms=["cuda"])(params, rest, tokens).mlir_module()
    # Two products forward and four backward, and no other with the matrices of all 8 experts.
    assert text.count("custom_call @mosaic_gpu_v2") == 6
    assert "chlo.ragged_dot" not in text
    operands = re.findall(r"dot_general .*: \(tensor<([\dx]+)x\w+>, tensor<([\dx]+)x\w+>\)", text)
    assert len(operands) > 20
    assert not [pair for pair in operands if any(shape.startswith("8x64x") for shape in pair)]


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
