"""Quantised leaves on the device equal the host's dequantisation, whole blocks or not."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from deepseek_jax.core.params import unstack
from deepseek_jax.core.quant import FP4, FP8, PACKED, Quantized, dequantize_matrix, pack, quantize_matrix, unpack
from deepseek_jax.kernels.grouped import grouped_matmul


@pytest.mark.parametrize("rows", [256, 200], ids=["whole rows", "a part of a block of rows"])
@pytest.mark.parametrize("columns", [384, 300], ids=["whole columns", "a part of a block of columns"])
def test_dequantized_matrices(rows, columns):
    rng = np.random.default_rng(0)
    values = rng.normal(0, 50, (2, rows, columns)).astype(FP8)
    scale = rng.uniform(0.1, 3, (2, -(-rows // 128), -(-columns // 128))).astype(np.float32)
    leaf = Quantized(jnp.asarray(values), jnp.asarray(scale), (128, 128), (rows, columns // 4, 4))
    for dtype in (jnp.float32, jnp.bfloat16):
        found = jax.jit(lambda leaf, dtype=dtype: leaf.dequantize(dtype))(leaf)
        wanted = np.stack([dequantize_matrix(v, s, (128, 128), dtype) for v, s in zip(values, scale, strict=True)])
        assert found.shape == leaf.shape == (2, rows, columns // 4, 4)
        np.testing.assert_array_equal(np.asarray(found).reshape(values.shape), wanted)


def test_bits_of_every_fp8_value_are_that_value_in_the_same_memory():
    codes = jnp.asarray(np.tile(np.arange(256, dtype=np.uint8), (2, 1)).view(FP8))
    leaf = Quantized(codes, jnp.asarray([[0.5], [1e-30]], jnp.float32), (1, 256), (2, 256))
    bits = leaf.with_bits()
    assert (bits.values.dtype, bits.dtype, bits.shape) == (jnp.uint8, leaf.dtype, leaf.shape)
    assert bits.values.unsafe_buffer_pointer() == codes.unsafe_buffer_pointer()
    for dtype in (jnp.float32, jnp.bfloat16):
        found, wanted = (np.asarray(jax.jit(lambda q, d=dtype: q.dequantize(d))(q)) for q in (bits, leaf))
        assert found.tobytes() == wanted.tobytes() or np.array_equal(found, wanted, equal_nan=True)
        # Zeros keep their sign.
        np.testing.assert_array_equal(np.signbit(found[wanted == 0]), np.signbit(wanted[wanted == 0]))
    scale = leaf.scale.astype(jnp.bfloat16)
    fp4 = Quantized(codes.astype(jnp.float32).astype(FP4), scale, (1, 256), (2, 256))
    assert fp4.with_bits() is fp4


def test_two_matrices_side_by_side():
    """Gate and up lie beside each other, each in blocks of its own."""
    rng = np.random.default_rng(1)
    values = rng.normal(0, 50, (256, 2, 128)).astype(FP8)
    scale = rng.uniform(0.1, 3, (2, 2, 1)).astype(np.float32)
    found = Quantized(jnp.asarray(values), jnp.asarray(scale), (128, 1, 128), (256, 2, 128)).dequantize(jnp.float32)
    for half in range(2):
        wanted = dequantize_matrix(values[:, half], scale[:, half], (128, 128))
        np.testing.assert_array_equal(found[:, half], wanted)


# What the sixteen codes of E2M1 mean.
CODES = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
CODES = np.concatenate([CODES, -CODES])


def fp4_experts(experts: int = 3, columns: int = 64, rows: int = 40):
    """FP4 experts as files have them, int8 [E, N, K / 2] and e8m0 scales [E, N, K / 32]; the leaf; what it means."""
    rng = np.random.default_rng(2)
    packed = rng.integers(-128, 128, (experts, rows, columns // 2)).astype(PACKED)
    exponent = rng.integers(-60, 60, (experts, rows, columns // 32))
    scale = (exponent + 127).astype(np.uint8).view(ml_dtypes.float8_e8m0fnu)
    even, odd = packed.view(np.uint8) & 15, packed.view(np.uint8) >> 4
    meant = CODES[np.stack([even, odd], -1).reshape(experts, rows, columns)] * np.repeat(2.0**exponent, 32, -1)
    values = unpack(packed).swapaxes(1, 2)
    return packed, Quantized(jnp.asarray(values), jnp.asarray(scale.swapaxes(1, 2)), (1, 32, 1), values.shape), meant


def test_fp4_means_its_codes_and_comes_back():
    packed, leaf, meant = fp4_experts()
    assert leaf.dtype == FP4
    np.testing.assert_array_equal(jax.jit(lambda q: q.dequantize(jnp.float32))(leaf), meant.swapaxes(1, 2))
    values = np.asarray(leaf.values).swapaxes(1, 2)
    np.testing.assert_array_equal(pack(values), packed)
    for one, of_values, of_scale in zip(meant, values, np.asarray(leaf.scale).swapaxes(1, 2), strict=True):
        np.testing.assert_array_equal(dequantize_matrix(of_values, of_scale, (1, 32)), one)


def test_every_fp4_code_under_every_scale():
    """Whose products are normal numbers, others are 0 on a CPU; the conversions within jit are the compiler's."""
    scale = np.arange(2, 252, dtype=np.uint8).view(ml_dtypes.float8_e8m0fnu)[None]
    values = np.repeat(np.tile(np.arange(16, dtype=np.uint8), 2)[:, None], 250, 1).view(FP4)
    found = jax.jit(lambda q: q.dequantize(jnp.float32))(
        Quantized(jnp.asarray(values), jnp.asarray(scale), (32, 1), values.shape)
    )
    wanted = np.tile(CODES, 2)[:, None] * 2.0 ** (np.arange(2, 252) - 127.0)
    np.testing.assert_array_equal(found, wanted.astype(np.float32))


def test_fp4_layers_and_experts_one_by_one():
    """A stack's layer, an expert of it, and rows sorted by expert through them."""
    _, leaf, meant = fp4_experts(columns=32)
    stack = Quantized(leaf.values[None], leaf.scale[None], leaf.block, leaf.dims)
    x, sizes = jnp.asarray(np.random.default_rng(3).integers(-2, 3, (9, 32)), jnp.float32), jnp.asarray([2, 0, 7])

    @jax.jit
    def run(stack, x):
        return jax.lax.scan(lambda x, layer: (x, grouped_matmul(x, layer, sizes, "blocks")), x, stack)[1]

    layer = unstack(stack, 0)
    np.testing.assert_array_equal(layer.dequantize(jnp.float32), meant.swapaxes(1, 2))
    of_row = np.repeat(np.arange(3), sizes)
    wanted = np.einsum("MK,MNK->MN", np.asarray(x, np.float64), meant[of_row])
    np.testing.assert_allclose(run(stack, x)[0], wanted, rtol=1e-5, atol=1e-6 * np.abs(wanted).max())


def test_a_matrix_becomes_fp4_again():
    """What FP4 holds comes back in its own bytes; a changed row of a block takes the nearest values."""
    _, leaf, meant = fp4_experts()
    stored = tuple(np.asarray(a)[0].T for a in (leaf.values, leaf.scale))
    e8m0 = stored[1].dtype
    w = meant[0].astype(np.float32)
    values, scale = quantize_matrix(w, (1, 32), stored, True, e8m0, FP4)
    assert (values.tobytes(), scale.tobytes()) == tuple(np.ascontiguousarray(a).tobytes() for a in stored)
    w[5, 32:] = np.linspace(-1, 1, 32)
    values, scale = quantize_matrix(w, (1, 32), stored, True, e8m0, FP4)
    again = dequantize_matrix(values, scale, (1, 32))
    assert float(scale[5, 1]) == 0.25  # 1 / 6 rounded up to a power of two
    steps = np.abs(w[5, 32:, None] / 0.25 - CODES).min(-1) * 0.25
    np.testing.assert_allclose(np.abs(again[5, 32:] - w[5, 32:]), steps, atol=1e-7)
    w[5, 32:] = again[5, 32:] = 0
    np.testing.assert_array_equal(again, w)
