"""Linear maps as compiled calls: every path through them and their gradients, and which maps they take."""

import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import random_model, random_tokens, tiny_config

import deepseek_jax as dsj
from deepseek_jax.core.bits import Bits
from deepseek_jax.core.lowrank import LowRank
from deepseek_jax.core.quant import FP8, Quantized
from deepseek_jax.kernels.native.library import built, compiler
from deepseek_jax.model.linear import linear

pytestmark = pytest.mark.skipif(compiler() is None, reason="there is no C++ compiler here")

NATIVE, XLA = dsj.Context(linear="native"), dsj.Context()
# Rows, inputs and outputs: fewer than a vector has; whole panels and edges; rows in parts, of which the last is shorter
# or there is none; inputs and outputs of more than a block; a gradient that is not parted. Few rows, of a weight in one
# part, in several, and in several of the columns.
SHAPES = [
    (2, 1, 1),
    (1, 300, 33),
    (1, 70, 1100),
    (12, 300, 33),
    (7, 129, 1100),
    (3, 70, 4100),
    (64, 1, 1),
    (100, 7, 33),
    (513, 64, 128),
    (1100, 40, 70),
    (600, 1030, 45),
    (300, 45, 1030),
    (520, 530, 600),
]


def matrices(*shapes) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.normal(size=shape).astype(np.float32) for shape in shapes]


@partial(jax.jit, static_argnums=(0, 3))
def both(equation, x, w, ctx, dy):
    """A map and its gradients."""
    y, vjp = jax.vjp(lambda x, w: linear(equation, x, w, ctx), x, w)
    return y, *vjp(dy)


@pytest.mark.parametrize(("M", "D", "Z"), SHAPES)
def test_maps_and_gradients_equal_numpys(M, D, Z):
    x, w, dy = matrices((1, M, D), (D, Z), (1, M, Z))
    found = both("BTD,DZ->BTZ", x, w, NATIVE, dy)
    wide = [a.astype(np.float64) for a in (x[0], w, dy[0])]
    expected = wide[0] @ wide[1], wide[2] @ wide[1].T, wide[0].T @ wide[2]
    for ours, theirs, depth in zip(found, expected, (D, Z, M), strict=True):
        assert ours.dtype == np.float32
        np.testing.assert_allclose(ours.reshape(theirs.shape), theirs, atol=1e-5 * max(depth, 4) ** 0.5, rtol=1e-6)


def test_a_product_is_as_near_as_float32_is():
    """Of numbers of all digits, near 1 and far from it, where no sum hides how each is multiplied."""
    rng = np.random.default_rng(0)
    x, w = ((rng.uniform(1, 2, n) * 2.0 ** rng.integers(-40, 40, n)).astype(np.float32) for n in (128, 160))
    found = jax.jit(linear, static_argnums=(0, 3))("BTD,DZ->BTZ", x[None, :, None], w[None], NATIVE)[0]
    exact = x.astype(np.float64)[:, None] * w
    assert np.abs(found / exact - 1).max() < 2.0**-22


@pytest.mark.parametrize("odd", [np.inf, -np.inf, np.nan])
def test_what_is_not_finite_stays_so(odd):
    x, w = matrices((1, 70, 40), (40, 50))
    x[0, 3, 5] = odd
    found = np.isfinite(jax.jit(linear, static_argnums=(0, 3))("BTD,DZ->BTZ", x, w, NATIVE)[0])
    assert not found[3].any()
    assert np.delete(found, 3, axis=0).all()


# Without the units that multiply matrices, and without the widest vectors, where this machine has these.
@pytest.mark.slow
@pytest.mark.parametrize("without", ["-U__AMX_BF16__", "-mno-avx512f"])
def test_processors_without_its_instructions(without, tmp_path, root):
    by = tmp_path / "compiler"
    by.write_text(f'#!/bin/sh\nexec {compiler()} "$@" {without if os.uname().machine == "x86_64" else ""}\n')
    by.chmod(0o755)
    files = [str(Path(__file__).with_name(f"test_native{name}.py")) for name in ("", "_linear", "_experts")]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "numpys or near", *files]
    before = set(built().parent.glob("*.so"))
    done = subprocess.run(command, cwd=root, env=os.environ | {"CXX": str(by)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:]
    assert len(set(built().parent.glob("*.so")) - before) == 1


# Several axes that are summed over, and of the result; rows of more than two axes.
@pytest.mark.parametrize(
    ("equation", "x", "w"),
    [
        ("BTD,DZF->BTZF", (2, 40, 12), (12, 2, 9)),
        ("BTNV,NVD->BTD", (2, 40, 3, 5), (3, 5, 8)),
        ("BTHX,XD->BTHD", (2, 40, 3, 5), (5, 8)),
    ],
)
def test_axes_are_those_of_the_equation(equation, x, w):
    x, w = matrices(x, w)
    dy = np.random.default_rng(1).normal(size=np.einsum(equation, x, w).shape).astype(np.float32)
    for ours, theirs in zip(both(equation, x, w, NATIVE, dy), both(equation, x, w, XLA, dy), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=2e-5)


def test_bfloat16_is_read_as_its_values():
    x, w, dy = (jnp.asarray(a, jnp.bfloat16) for a in matrices((2, 70, 40), (40, 50), (2, 70, 50)))
    wide = [a.astype(jnp.float32) for a in (x, w, dy)]
    expected = both("BTD,DZ->BTZ", *wide[:2], NATIVE, wide[2])
    found = both("BTD,DZ->BTZ", x, w, NATIVE, dy)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.dtype == jnp.bfloat16
        np.testing.assert_array_equal(ours, theirs.astype(jnp.bfloat16))
    bits = Bits.of(w)
    y, vjp = jax.vjp(lambda x: linear("BTD,DZ->BTZ", x, bits, NATIVE), x)
    np.testing.assert_array_equal(y, found[0])
    np.testing.assert_array_equal(vjp(dy)[0], found[1])
    # A weight is taken in the activation's dtype, which is that of its gradient no more.
    of_both = both("BTD,DZ->BTZ", x, wide[1], NATIVE, dy)
    np.testing.assert_array_equal(of_both[0], found[0])
    assert of_both[2].dtype == jnp.float32


@pytest.mark.parametrize(("M", "D", "Z"), SHAPES)
def test_weights_of_half_the_bytes_give_the_same_bits(M, D, Z):
    """Stored in bfloat16, beside activations in float32."""
    x, w, dy = matrices((1, M, D), (D, Z), (1, M, Z))
    w = jnp.asarray(w, jnp.bfloat16)
    y, dx, dw = both("BTD,DZ->BTZ", x, w.astype(jnp.float32), NATIVE, dy)
    found = both("BTD,DZ->BTZ", x, w, NATIVE, dy)
    of_bits = jax.jit(linear, static_argnums=(0, 3))("BTD,DZ->BTZ", x, Bits.of(w), NATIVE)
    for ours, theirs in zip((*found, of_bits), (y, dx, dw.astype(jnp.bfloat16), y), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_calls_agree_bit_for_bit():
    """Whichever thread takes what; and with calls at the same time."""
    x, w, dy = matrices((1, 1100, 330), (330, 200), (1, 1100, 200))
    expected = both("BTD,DZ->BTZ", x, w, NATIVE, dy)
    together = jax.jit(lambda x, w, dy: [both("BTD,DZ->BTZ", x * s, w, NATIVE, dy) for s in (1, 2, 4)])
    for _ in range(20):
        for ours, theirs in zip(together(x, w, dy)[0], expected, strict=True):
            np.testing.assert_array_equal(ours, theirs)


def test_mapped_over_an_axis_it_is_called_for_each():
    """As `analysis.streams` maps a layer over a stack."""
    x, w = matrices((3, 2, 40, 8), (3, 8, 16))
    found = jax.jit(jax.vmap(lambda x, w: linear("BTD,DZ->BTZ", x, w, NATIVE)))(x, w)
    for ours, *given in zip(found, x, w, strict=True):
        np.testing.assert_array_equal(ours, linear("BTD,DZ->BTZ", *map(jnp.asarray, given), NATIVE))


def test_other_maps_are_xlas():
    """Of few rows; by head; of a weight that is quantised or has an adapter."""
    x, w = map(jnp.asarray, matrices((2, 40, 3, 8), (3, 8, 16)))
    stored = Quantized(jnp.asarray(w, FP8), jnp.ones((1, 1, 1)), (3, 8, 16), w.shape)
    adapted = LowRank(w, jnp.ones((3, 8, 1)), jnp.ones((1, 16)), 1.0, 2, 0, 1)
    cases = {
        "natively": ("BTNH,NHD->BTD", x, w, 1),
        "few rows": ("BTNH,NHD->BTD", x[:, :31], w, 0),
        "by head": ("BTNH,NHC->BTNC", x, w, 0),
        "quantised": ("BTNH,NHD->BTD", x, stored, 0),
        "an adapter": ("BTNH,NHD->BTD", x, adapted, 0),
    }
    for name, (equation, x, w, count) in cases.items():
        text = jax.jit(linear, static_argnums=(0, 3)).lower(equation, x, w, NATIVE).as_text()
        assert text.count("@deepseek_jax.LinearFloat32(") == count, name


def test_a_models_maps_are_native():
    """All of a layer's, the head's and the router's; the gradient of each is two calls."""
    cfg = tiny_config(n_layers=1, n_dense_layers=1, mtp_depth=0)
    params, rest = dsj.partition(random_model(cfg))
    batch = {"tokens": random_tokens(cfg, 2, 40)}

    def loss(params):
        return dsj.loss(dsj.combine(params, rest), batch, ctx=NATIVE)[0]

    def calls(function) -> list[int]:
        text = jax.jit(function).lower(params).as_text()
        return [text.count(f"@deepseek_jax.{name}(") for name in ("LinearFloat32", "LinearGradient")]

    # q_a, q_b, kv_a, kv_b, o, gate_up, down and the head.
    assert calls(loss) == [8, 0]
    assert calls(jax.grad(loss)) == [16, 8]


def test_other_dtypes_are_refused():
    x, w = (jnp.zeros(shape, jnp.float16) for shape in ((1, 64, 8), (8, 8)))
    with pytest.raises(ValueError, match=r'Context\(linear="native"\): it multiplies float32 .* here are float16'):
        linear("BTD,DZ->BTZ", x, w, NATIVE)
