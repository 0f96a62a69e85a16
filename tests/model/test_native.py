"""The grouped matmul that is built for the CPU: every path through its tiles, in a model, and where it cannot be."""

import os
import subprocess
import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import random_model, random_tokens, tiny_config

import deepseek_jax as dsj
from deepseek_jax.core.bits import Bits
from deepseek_jax.core.quant import FP8, Quantized
from deepseek_jax.generation.programs import keep_ready
from deepseek_jax.kernels import native
from deepseek_jax.kernels.grouped import grouped_matmul

pytestmark = pytest.mark.skipif(native.compiler() is None, reason="there is no C++ compiler here")

# Of no row, of fewer than a tile has and of one more, of several blocks; the last rows are nobody's.
SIZES = np.array([1, 0, 2, 3, 4, 6, 12, 13, 0, 25, 192, 401, 7], np.int32)
ROWS = int(SIZES.sum()) + 9
# Narrower than a vector; whole panels and strips; more columns than a unit of work has; deeper than is packed at once.
WIDTHS = [(1, 1), (7, 33), (64, 256), (600, 40), (40, 600), (1030, 130)]


def matrices(*shapes) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.normal(size=shape).astype(np.float32) for shape in shapes]


def close(found, expected, depth: int) -> None:
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, atol=1e-5 * max(depth, 4) ** 0.5, rtol=1e-6)


@pytest.mark.parametrize(("D", "Z"), WIDTHS)
def test_products_equal_numpys(D, Z):
    x, w, y = matrices((ROWS, D), (SIZES.size, D, Z), (ROWS, Z))
    x[-9:] = y[-9:] = np.nan
    ends = np.cumsum(SIZES)
    groups = [slice(end - size, end) for end, size in zip(ends, SIZES, strict=True)]
    wide = w.astype(np.float64)
    forward = jax.jit(native.grouped_matmul, static_argnums=3)
    expected = np.concatenate([x[g] @ wide[e] for e, g in enumerate(groups)])
    found = np.asarray(forward(x, w, SIZES, False))
    close(found[:-9], expected, D)
    assert not found[-9:].any()
    expected = np.concatenate([y[g] @ wide[e].T for e, g in enumerate(groups)])
    close(np.asarray(forward(y, w, SIZES, True))[:-9], expected, Z)
    expected = np.stack([x[g].astype(np.float64).T @ y[g] for g in groups])
    found = np.asarray(jax.jit(native.grouped_outer, static_argnums=3)(x, y, SIZES, jnp.float32))
    close(found, expected, 401)
    assert not found[SIZES == 0].any()


def test_many_calls_at_once_give_what_one_gives():
    """Units of work are shared with XLA's threads; a call ends when all of its own are done."""
    x, w = matrices((ROWS, 64), (SIZES.size, 64, 96))
    inputs = [x * (1 + i) for i in range(16)]
    once = jax.jit(lambda x: native.grouped_matmul(x, w, SIZES))
    together = jax.jit(lambda inputs: [native.grouped_matmul(x, w, SIZES) for x in inputs])
    expected = [np.asarray(once(x)) for x in inputs]
    for _ in range(20):
        for found, alone in zip(together(inputs), expected, strict=True):
            np.testing.assert_array_equal(found, alone)


def test_a_model_is_trained_by_it():
    model = random_model(tiny_config(n_layers=2, mtp_depth=0))
    params, rest = dsj.partition(model)
    tokens = random_tokens(model.cfg, 2, 12)

    @partial(jax.jit, static_argnums=1)
    def gradient(params, form):
        ctx = dsj.Context(experts=form)
        return jax.value_and_grad(lambda p: dsj.loss(dsj.combine(p, rest), {"tokens": tokens}, ctx=ctx)[0])(params)

    (ours, ours_by), (loss, by) = gradient(params, "native"), gradient(params, "blocks")
    assert float(ours) == pytest.approx(float(loss), rel=1e-6)
    for a, b in zip(jax.tree.leaves(ours_by), jax.tree.leaves(by), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5 * float(jnp.abs(b).max()))


@pytest.mark.parametrize(("D", "Z"), WIDTHS)
def test_products_of_bfloat16_are_those_of_its_values(D, Z):
    x, w, y = (jnp.asarray(a, jnp.bfloat16) for a in matrices((ROWS, D), (SIZES.size, D, Z), (ROWS, Z)))
    wide = [a.astype(jnp.float32) for a in (x, w, y)]
    for given, of, transpose in ((x, wide[0], False), (y, wide[2], True)):
        expected = native.grouped_matmul(of, wide[1], SIZES, transpose)
        for matrix in (w, Bits.of(w)):
            # The output is rounded once; a sum may be rounded to the other side.
            found = native.grouped_matmul(given, matrix, SIZES, transpose)
            assert found.dtype == jnp.bfloat16
            np.testing.assert_allclose(found.astype(jnp.float32), expected, rtol=2**-8, atol=1e-5)
            np.testing.assert_array_equal(native.grouped_matmul(of, matrix, SIZES, transpose), expected)
    found = native.grouped_outer(x, y, SIZES, jnp.float32)
    np.testing.assert_array_equal(found, native.grouped_outer(wide[0], wide[2], SIZES, jnp.float32))


def test_what_it_does_not_multiply_is_refused():
    x, w = matrices((4, 8), (2, 8, 16))
    sizes = np.array([2, 2], np.int32)
    with pytest.raises(
        ValueError, match=r"multiplies float32 and bfloat16, and here are float16; choose another dtype"
    ):
        grouped_matmul(jnp.asarray(x, jnp.float16), jnp.asarray(w, jnp.float16), sizes, "native")
    stored = Quantized(jnp.asarray(w, FP8), jnp.ones((2, 1, 1)), (1, 8, 16), w.shape)
    with pytest.raises(ValueError, match="the experts are stored quantised; load the model in float32 or bfloat16"):
        grouped_matmul(x, stored, sizes, "native")


def test_without_a_compiler_it_says_what_is_missing(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(ValueError, match="CXX=no-such-compiler is not found; install one"):
        native.built()
    monkeypatch.setenv("CXX", "false")
    with pytest.raises(ValueError, match=r"false .* failed"):
        native.built()
    assert list((tmp_path / "deepseek-jax" / "native").iterdir()) == []
    monkeypatch.delenv("CXX")
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc")
    with pytest.raises(
        ValueError, match=r"built in /proc/deepseek-jax/native, which cannot be written: .*XDG_CACHE_HOME"
    ):
        native.built()
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ValueError, match=r"there is no c\+\+, g\+\+ or clang\+\+ here"):
        native.built()


def test_it_is_built_once(monkeypatch):
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("built again"))
    native._register()
    assert native.built().is_file()


def test_its_programs_are_not_among_those_kept_ready(tmp_path):
    """A process that found one would not have loaded the library; those in JAX's own cache are traced first."""
    model, ctx = random_model(tiny_config(n_layers=2, mtp_depth=0)), dsj.Context(experts="native")
    keep_ready(tmp_path / "ready")
    try:
        tokens, _ = dsj.generate(model, [[2, 3, 4]], max_new_tokens=3, ctx=ctx)
    finally:
        keep_ready(None)
    assert not (tmp_path / "ready").exists()
    dsj.save_pretrained(model, tmp_path / "model")
    program = (
        "import jax.numpy as jnp, deepseek_jax as dsj\n"
        f"model = dsj.load_pretrained({str(tmp_path / 'model')!r}, dtype=jnp.float32)\n"
        'print(dsj.generate(model, [[2, 3, 4]], max_new_tokens=3, ctx=dsj.Context(experts="native"))[0])'
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=os.environ, check=True)
    assert done.stdout.strip() == str(tokens)
