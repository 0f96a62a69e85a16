"""Keys in FP8 and FP4 as releases are served: rounding against NumPy, the bytes that a key takes."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from deepseek_jax.core.cached import empty, kept, read
from deepseek_jax.core.quant import FP4, FP8
from deepseek_jax.core.served import Form, turned

LATENT = Form(512, 128)
ENTRY = Form(448, 64, powers_of_two=True)
INDEX = Form(128, 128, turned=True)
ENTRY_INDEX = Form(128, 32, bits=4, powers_of_two=True, turned=True)


def nothing(form: Form, width: int):
    return empty(form, (1, 1, 1, width), None, jnp.zeros)


def scales_of(words, like):
    form = like.form
    first, count, _ = form.words(like.width - form.width)
    words = np.asarray(words)[..., first : first + count]
    if not form.powers_of_two:
        return words.view(np.float32)
    # The first byte of all words, then the second one.
    byte = np.concatenate([words >> 8 * place & 255 for place in range(4)], -1)[..., : form.blocks]
    return (byte << 23).view(np.float32)


# 656 and 132: V3.2-Exp's inference; 584, of which a byte is padding, and 68: V4's.
@pytest.mark.parametrize(
    ("form", "width", "size"), [(LATENT, 576, 656), (INDEX, 128, 132), (ENTRY, 512, 584), (ENTRY_INDEX, 128, 68)]
)
def test_the_bytes_of_a_key(form, width, size):
    keys = nothing(form, width)
    assert sum(a.nbytes for a in jax.tree.leaves(keys)) == size
    assert keys.shape == (1, 1, 1, width)


@pytest.mark.parametrize("form", [LATENT, ENTRY, Form(40, 32), Form(40, 32, bits=4, powers_of_two=True)])
def test_values_are_rounded_as_numpy_rounds_them(form):
    rng = np.random.default_rng(0)
    x = (rng.normal(size=(64, form.width + 8)) * 10.0 ** rng.uniform(-6, 3, (64, 1))).astype(np.float32)
    x[0], x[1, : form.width] = 0, 448 * 2.0**-20
    like = nothing(form, form.width + 8)
    keys = jax.jit(kept)(x, like)
    found = np.asarray(read(keys, like, jnp.float32))

    kind, most, least = (FP4, 6, 6 * 2.0**-126) if form.bits == 4 else (FP8, 448, 1e-4)
    expected, scales = np.empty((64, form.width), np.float32), scales_of(keys, like)
    for first in range(0, form.width, form.block):
        part = x[:, first : min(first + form.block, form.width)]
        scale = np.maximum(np.abs(part).max(-1, keepdims=True), np.float32(least)) / np.float32(most)
        if form.powers_of_two:
            scale = 2 ** np.ceil(np.log2(scale.astype(np.float64))).astype(np.float32)
            np.testing.assert_array_equal(scales[:, first // form.block], scale[:, 0])
        # Dividing by a constant is multiplying by its inverse to a compiler.
        np.testing.assert_allclose(scales[:, first // form.block], scale[:, 0], rtol=2e-7)
        scale = scales[:, first // form.block, None]
        rounded = np.clip(part / scale, -most, most).astype(kind).astype(np.float32)
        expected[:, first : first + form.block] = rounded * scale
    np.testing.assert_array_equal(found[:, : form.width], expected)
    rest = x[:, form.width :].astype(ml_dtypes.bfloat16).astype(np.float32)
    np.testing.assert_array_equal(found[:, form.width :], rest)


@pytest.mark.parametrize(("bits", "kind"), [(8, FP8), (4, FP4)])
def test_every_value_and_what_lies_between_is_rounded_as_numpy_rounds_it(bits, kind):
    values = np.arange(2**bits, dtype=np.uint8).view(kind).astype(np.float32)
    values = np.sort(values[np.isfinite(values)])
    halves = (values[1:] + values[:-1]) / 2
    around = [np.nextafter(halves, np.float32(side)) for side in (-np.inf, np.inf)]
    x = np.concatenate([values, halves, *around])
    form = Form(len(x), len(x), bits, powers_of_two=True)
    like = nothing(form, len(x))
    keys = kept(jnp.asarray(x), like)
    assert scales_of(keys, like) == 1
    np.testing.assert_array_equal(read(keys, like, jnp.float32), x.astype(kind).astype(np.float32))


def test_a_hadamard_matrix_is_its_own_inverse_and_keeps_products():
    q, k = np.random.default_rng(1).normal(size=(2, 5, 128)).astype(np.float32)
    np.testing.assert_allclose(turned(turned(q)), q, atol=2e-6)
    np.testing.assert_allclose(turned(q) @ turned(k).T, q @ k.T, atol=3e-5)
    # One large value is spread over all: rounding to FP4 then costs the small ones less.
    k[:, 0] = 50
    with_it, without = (nothing(Form(128, 32, 4, powers_of_two=True, turned=how), 128) for how in (True, False))
    found = turned(read(kept(jnp.asarray(k), with_it), with_it, jnp.float32))
    without = read(kept(jnp.asarray(k), without), without, jnp.float32)
    # All columns of the block that holds the large value.
    error = lambda a: np.abs(np.asarray(a) - k)[:, 1:32].mean()  # noqa: E731
    assert error(found) < error(without)


def test_what_cannot_be_turned_is_refused():
    with pytest.raises(ValueError, match="power of two; index_dim is 96"):
        Form(96, 32, bits=4, turned=True)
