"""Emulated FP8: values and scales by hand, each product's operands, sums of 14 bits, experts, what stays as it is."""

from functools import partial

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import deepseek_jax as dsj
from deepseek_jax.core.fp8 import FORMATS, HIGHEST, Fp8, accumulated, fp8_product, rounded
from deepseek_jax.core.lowrank import LowRank
from deepseek_jax.core.quant import quantize_matrix
from deepseek_jax.kernels.grouped_fp8 import fp8_matmul, fp8_outer, fp8_transposed
from deepseek_jax.model.experts import routed_experts
from deepseek_jax.model.linear import linear
from deepseek_jax.parallel.mesh import make_mesh
from tests.tiny import random_model, tiny_config

RNG = np.random.default_rng(0)


def normal(*shape) -> np.ndarray:
    """Values of many sizes, so that small ones meet the end of a format's range."""
    return (RNG.normal(size=shape) * np.exp(2 * RNG.normal(size=shape))).astype(np.float32)


def by_hand(a, sizes, kind: str = "e4m3", powers_of_two: bool = False) -> np.ndarray:
    """Block by block, with NumPy's own FP8."""
    out, most = np.zeros_like(a), np.float32(ml_dtypes.finfo(FORMATS[kind]).max)
    sizes = [n if size is None else size for size, n in zip(sizes, a.shape, strict=True)]
    for place in np.ndindex(*(-(-n // size) for size, n in zip(sizes, a.shape, strict=True))):
        part = tuple(slice(i * size, (i + 1) * size) for i, size in zip(place, sizes, strict=True))
        scale = np.abs(a[part]).max() / most or np.float32(1)
        if powers_of_two:
            scale = np.float32(2.0 ** np.ceil(np.log2(scale)))
        out[part] = (a[part] / scale).astype(FORMATS[kind]).astype(np.float32) * scale
    return out


fast_rounded = jax.jit(rounded, static_argnums=(1, 2, 3))
# Of a scale that XLA divides for, which may round its last bit otherwise.
LAST_BIT = 3e-7


@pytest.mark.parametrize(
    ("kind", "powers_of_two", "sizes"),
    [("e4m3", False, (1, 8)), ("e5m2", False, (8, 8)), ("e4m3", True, (8, 8)), ("e5m2", True, (None, None))],
)
def test_values_and_scales(kind, powers_of_two, sizes):
    a = normal(13, 29)
    a[:, 8:16] = 0
    found = fast_rounded(a, sizes, Fp8(powers_of_two=powers_of_two), kind)
    np.testing.assert_allclose(found, by_hand(a, sizes, kind, powers_of_two), rtol=0 if powers_of_two else LAST_BIT)


def test_a_weight_is_rounded_as_checkpoints_store_it():
    a = normal(40, 24)
    values, scale = quantize_matrix(a, (16, 16))
    stored = values.astype(np.float32) * np.repeat(np.repeat(scale, 16, 0), 16, 1)[:40, :24]
    np.testing.assert_allclose(fast_rounded(a, (16, 16), Fp8(), "e4m3"), stored, rtol=LAST_BIT)


# A stack of matrices [N, M, K] x [N, K, Z] from each equation's arrays, and the arrays back, written out.
EQUATIONS = {
    "BTD,DZF->BTZF": (
        ((2, 7, 12), (12, 2, 5), (2, 7, 2, 5)),
        (lambda x: x.reshape(1, 14, 12), lambda w: w.reshape(1, 12, 10), lambda y: y.reshape(1, 14, 10)),
    ),
    "BTNV,NVD->BTD": (
        ((2, 7, 3, 5), (3, 5, 6), (2, 7, 6)),
        (lambda x: x.reshape(1, 14, 15), lambda w: w.reshape(1, 15, 6), lambda y: y.reshape(1, 14, 6)),
    ),
    "BTGJK,JKGR->BTGR": (
        ((2, 7, 2, 3, 4), (3, 4, 2, 5), (2, 7, 2, 5)),
        (
            lambda x: x.reshape(14, 2, 12).transpose(1, 0, 2),
            lambda w: w.reshape(12, 2, 5).transpose(1, 0, 2),
            lambda y: y.reshape(14, 2, 5).transpose(1, 0, 2),
        ),
    ),
}
# Extents of a scale over [N, rows, columns]: x and w forward; dy and w for x's gradient; x and dy for w's.
WHOLE, BLOCK = (None, None, None), (1, 4, 4)
V3 = ((1, 1, 4), BLOCK, (1, 1, 4), BLOCK, (1, 4, 1), (1, 4, 1))
WAYS = {
    "v3": (Fp8(tile=4, block=4), V3),
    "tensor": (Fp8(tile=None, block=None, gradient="e5m2"), (WHOLE,) * 6),
    "blocks": (Fp8(tile=4, block=4, gradient_blocks=True, powers_of_two=True), (*V3[:2], BLOCK, BLOCK, V3[4], BLOCK)),
    "forward": (Fp8(tile=4, block=4, input_gradient=False, weight_gradient=False), (*V3[:2], *[None] * 4)),
    "inputs": (Fp8(tile=4, block=4, forward=False, weight_gradient=False), (None, None, *V3[2:4], None, None)),
    "weights": (Fp8(tile=4, block=4, forward=False, input_gradient=False), (*[None] * 4, *V3[4:])),
}


@pytest.mark.parametrize(
    ("equation", "way"), [*((e, "v3") for e in EQUATIONS), *(("BTGJK,JKGR->BTGR", way) for way in WAYS if way != "v3")]
)
def test_each_product_rounds_its_operands_along_its_own_contraction(equation, way):
    # v3_fp8 C1
    (shapes, (of_x, of_w, of_out)), (fp8, sizes) = EQUATIONS[equation], WAYS[way]
    x, w, dy = (normal(*shape) for shape in shapes)

    @jax.jit
    def results(x, w, dy):
        y, back = jax.vjp(lambda x, w: fp8_product(equation, x, w, fp8), x, w)
        return y, *back(dy)

    y, dx, dw = results(x, w, dy)

    def r(a, size, kind="e4m3"):
        return (a if size is None else by_hand(a, size, kind, fp8.powers_of_two)).astype(np.float64)

    X, W, dY, g = of_x(x), of_w(w), of_out(dy), fp8.gradient
    pairs = (
        (of_out(np.asarray(y)), r(X, sizes[0]) @ r(W, sizes[1])),
        (of_x(np.asarray(dx)), r(dY, sizes[2], g) @ r(W, sizes[3]).transpose(0, 2, 1)),
        (of_w(np.asarray(dw)), r(X, sizes[4]).transpose(0, 2, 1) @ r(dY, sizes[5], g)),
    )
    for found, wanted in pairs:
        np.testing.assert_allclose(found, wanted, atol=2e-6 * np.abs(wanted).max())


@pytest.mark.parametrize("equation", ["mk,kz->mz", "mk,zk->mz"])
def test_sums_are_cut_after_every_instruction_and_promoted(equation):
    a, b = RNG.random((3, 100), np.float32), RNG.random((100, 2), np.float32)
    b_given, axis = (b, 0) if equation == "mk,kz->mz" else (b.T, 1)
    multiply = partial(jnp.einsum, equation, precision=HIGHEST)
    fp8 = Fp8(accumulation_bits=6, promotion=64)
    found = jax.jit(lambda a, b: accumulated(multiply, a, b, (1, axis), fp8))(a, b_given)

    def cut(value):
        mantissa, exponent = np.frexp(value)
        return np.ldexp(np.trunc(mantissa * 2**6), exponent - 6)

    total = 0
    for start in (0, 64):
        part = 0
        for i in range(start, min(start + 64, 100), 32):
            part = cut(part + a[:, i : i + 32].astype(np.float64) @ b[i : i + 32].astype(np.float64))
        total = total + part
    np.testing.assert_allclose(found, total, rtol=1e-6)


# Rows of four experts, one of them idle, behind them three of nobody; tiles of four.
SIZES = np.array([5, 0, 9, 4], np.int32)
ENDS = np.cumsum(SIZES)


def groups(a):
    return [a[end - size : end] for end, size in zip(ENDS, SIZES, strict=True)]


@pytest.mark.parametrize(
    ("form", "way"), [("blocks", "v3"), ("ragged", "v3"), ("blocks", "tensor"), ("blocks", "blocks")]
)
def test_experts_multiply_as_a_loop_over_them_does(form, way):
    fp8, sizes = WAYS[way]
    x, w, dy = normal(21, 12), normal(4, 12, 10), normal(21, 10)
    x[18:], dy[18:] = 1e30, np.nan  # nobody's

    def r(a, size, kind="e4m3"):
        return by_hand(a, size[1:], kind, fp8.powers_of_two)

    def rows(a, size, kind="e4m3"):
        """Tiles of tokens begin anew with every expert; of a whole tensor there is one scale for all experts."""
        if size == WHOLE:
            return groups(r(a[:18], size, kind))
        return [r(part, size, kind) if len(part) else part for part in groups(a)]

    W, g = [r(one, sizes[1]) for one in w], fp8.gradient
    y = np.concatenate([a @ b for a, b in zip(rows(x, sizes[0]), W, strict=True)])
    dx = np.concatenate([a @ b.T for a, b in zip(rows(dy, sizes[2], g), W, strict=True)])
    dw = np.stack([a.T @ b for a, b in zip(rows(x, sizes[4]), rows(dy, sizes[5], g), strict=True)])

    @jax.jit
    def products(x, w, dy, sizes_E):
        outer = fp8_outer(x, dy, sizes_E, form, jnp.float32, fp8)
        return fp8_matmul(x, w, sizes_E, form, fp8)[:18], fp8_transposed(dy, w, sizes_E, form, fp8)[:18], outer

    for name, a, b in zip(("y", "dx", "dw"), products(x, w, dy, SIZES), (y, dx, dw), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-6 * np.abs(b).max(), err_msg=name)


def test_narrow_sums_of_experts_are_those_of_dense_maps():
    fp8 = Fp8(tile=32, block=32, accumulation_bits=6, promotion=32)
    x, w = RNG.random((6, 96), np.float32), RNG.random((1, 96, 4), np.float32)
    experts = jax.jit(lambda x, w, sizes: fp8_matmul(x, w, sizes, "blocks", fp8))
    dense = jax.jit(lambda x, w: fp8_product("mk,kz->mz", x, w, fp8))
    np.testing.assert_allclose(experts(x, w, jnp.array([6])), dense(x, w[0]), rtol=1e-6)


def distance(a, b) -> float:
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


def test_routed_experts_and_their_gradients_are_emulated():
    """Beside one expert written with the dense maps' product; a value in between may be rounded otherwise."""
    fp8 = Fp8(tile=8, block=8)
    x, gate_up, down, cotangent = (
        jnp.asarray(RNG.normal(size=shape), jnp.float32) for shape in ((40, 32), (1, 32, 2, 24), (1, 24, 32), (40, 32))
    )

    def routed(x, gate_up, down, fp8=fp8):
        return routed_experts(x, jnp.zeros((40, 1), jnp.int32), jnp.ones((40, 1)), gate_up, down, "blocks", fp8=fp8)

    def dense(x, gate_up, down):
        gate, up = jnp.moveaxis(fp8_product("nd,dzf->nzf", x, gate_up[0], fp8), 1, 0)
        return fp8_product("nf,fd->nd", jax.nn.silu(gate) * up, down[0], fp8)

    @jax.jit
    def results(x, gate_up, down):
        backs = [jax.vjp(f, x, gate_up, down) for f in (routed, dense, partial(routed, fp8=None))]
        return [(y, *back(cotangent)) for y, back in backs]

    for found, wanted, float32 in zip(*results(x, gate_up, down), strict=True):
        assert distance(found, wanted) < 0.01
        assert 0.02 < distance(found, float32) < 0.1


def test_maps_that_ask_for_a_precision_or_a_dtype_stay_as_they_are():
    x, w = normal(1, 3, 8), jnp.asarray(normal(8, 4))
    ctx, plain = dsj.Context(fp8=Fp8(tile=4, block=4)), dsj.Context()
    for asked in ({"precision": HIGHEST}, {"dtype": jnp.float32}):
        found, wanted = (linear("BTD,DE->BTE", x, w, c, **asked) for c in (ctx, plain))
        np.testing.assert_array_equal(found, wanted)
    assert distance(linear("BTD,DE->BTE", x, w, ctx), linear("BTD,DE->BTE", x, w, plain)) > 0.001


def test_a_models_loss_and_gradients():
    """The loss within 1% of float32's; no gradient is lost, and all lie in float32's direction."""
    cfg = tiny_config(n_layers=2, mtp_depth=0)
    model = random_model(cfg)
    params, rest = dsj.partition(model)
    tokens = jnp.asarray(np.random.default_rng(1).integers(0, cfg.vocab_size, (2, 24)))

    def value(params, ctx):
        return dsj.loss(dsj.combine(params, rest), {"tokens": tokens}, ctx=ctx)[0]

    run = jax.jit(jax.value_and_grad(value), static_argnums=1)
    (emulated, found), (exact, wanted) = (run(params, dsj.Context(fp8=fp8)) for fp8 in (Fp8(tile=16, block=16), None))
    assert 0 < abs(emulated / exact - 1) < 0.01
    # The first MoE layer's experts may be chosen otherwise, so that single weights' gradients differ by more.
    flat = [np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)]) for tree in (found, wanted)]

    cosine = flat[0] @ flat[1] / np.linalg.norm(flat[0]) / np.linalg.norm(flat[1])

    assert 0.9 < cosine < 0.9999


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"tile": 0}, r"Fp8\(tile=0\): must be at least 1"),
        ({"block": 1.5}, "block must be an integer or None, not 1.5"),
        ({"gradient": "e3m4"}, "choose one of e4m3, e5m2"),
        ({"gradient_blocks": True, "block": None}, "say how large the blocks are"),
        ({"accumulation_bits": 1}, r"must lie in \[2, 24\]"),
        ({"promotion": 100}, "must be a multiple of 32"),
        ({"forward": False, "input_gradient": False, "weight_gradient": False}, "all three products are left out"),
    ],
)
def test_values_that_mean_nothing(values, message):
    with pytest.raises(ValueError, match=message):
        Fp8(**values)


def test_what_is_not_emulated():
    with pytest.raises(ValueError, match="FP8 is emulated on one device"):
        dsj.Context(mesh=make_mesh(fsdp=1), layout="fsdp", fp8=Fp8())
    with pytest.raises(ValueError, match="the oracle is not emulated"):
        dsj.Context(experts="dense", fp8=Fp8())
    adapted = LowRank(jnp.ones((4, 4)), jnp.ones((4, 1)), jnp.ones((1, 4)), 1.0, 1, 0, 1)
    with pytest.raises(ValueError, match="not for LowRank"):
        linear("BTD,DF->BTF", jnp.ones((1, 1, 4)), adapted, dsj.Context(fp8=Fp8()))
    with pytest.raises(ValueError, match="narrow sums of experts' weight gradients"):
        fp8_outer(jnp.ones((4, 4)), jnp.ones((4, 4)), jnp.array([4]), "blocks", jnp.float32, Fp8(accumulation_bits=14))
