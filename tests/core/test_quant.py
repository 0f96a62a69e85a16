"""Quantised leaves on the device equal the host's dequantisation, whole blocks or not."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_jax.core.quant import FP8, Quantized, dequantize_matrix


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


def test_two_matrices_side_by_side():
    """Gate and up lie beside each other, each in blocks of its own."""
    rng = np.random.default_rng(1)
    values = rng.normal(0, 50, (256, 2, 128)).astype(FP8)
    scale = rng.uniform(0.1, 3, (2, 2, 1)).astype(np.float32)
    found = Quantized(jnp.asarray(values), jnp.asarray(scale), (128, 1, 128), (256, 2, 128)).dequantize(jnp.float32)
    for half in range(2):
        wanted = dequantize_matrix(values[:, half], scale[:, half], (128, 128))
        np.testing.assert_array_equal(found[:, half], wanted)
