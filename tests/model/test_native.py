"""The grouped matmul and the attention that are built for the CPU: every path through their tiles, in a model, and
where the library cannot be built."""

import os
import subprocess
import sys
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from architectures import ARCHITECTURES
from tiny import random_model, random_tokens, tiny_config

import deepseek_jax as dsj
from deepseek_jax.core.bits import Bits
from deepseek_jax.core.quant import FP8, Quantized
from deepseek_jax.generation.programs import keep_ready
from deepseek_jax.kernels import grouped
from deepseek_jax.kernels.native import library
from deepseek_jax.kernels.native.attention import attention, latent_attention
from deepseek_jax.kernels.native.grouped import grouped_matmul, grouped_outer
from deepseek_jax.parallel.mesh import make_mesh

pytestmark = pytest.mark.skipif(library.compiler() is None, reason="there is no C++ compiler here")

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
    forward = jax.jit(grouped_matmul, static_argnums=3)
    expected = np.concatenate([x[g] @ wide[e] for e, g in enumerate(groups)])
    found = np.asarray(forward(x, w, SIZES, False))
    close(found[:-9], expected, D)
    assert not found[-9:].any()
    expected = np.concatenate([y[g] @ wide[e].T for e, g in enumerate(groups)])
    close(np.asarray(forward(y, w, SIZES, True))[:-9], expected, Z)
    expected = np.stack([x[g].astype(np.float64).T @ y[g] for g in groups])
    found = np.asarray(jax.jit(grouped_outer, static_argnums=3)(x, y, SIZES, jnp.float32))
    close(found, expected, 401)
    assert not found[SIZES == 0].any()


def test_wide_rows_of_one_group_are_parted():
    x, w = matrices((3, 40), (4, 40, 1500))
    found = jax.jit(grouped_matmul)(x, w, np.array([0, 0, 3, 0], np.int32))
    close(np.asarray(found), x @ w[2].astype(np.float64), 40)


def test_many_calls_at_once_give_what_one_gives():
    """Units of work are shared with XLA's threads; a call ends when all of its own are done."""
    x, w = matrices((ROWS, 64), (SIZES.size, 64, 96))
    inputs = [x * (1 + i) for i in range(16)]
    once = jax.jit(lambda x: grouped_matmul(x, w, SIZES))
    together = jax.jit(lambda inputs: [grouped_matmul(x, w, SIZES) for x in inputs])
    expected = [np.asarray(once(x)) for x in inputs]
    for _ in range(20):
        for found, alone in zip(together(inputs), expected, strict=True):
            np.testing.assert_array_equal(found, alone)


@pytest.mark.parametrize("name", ["v3", "distill-qwen", pytest.param("v2", marks=pytest.mark.slow)])
def test_a_model_is_trained_by_it(name):
    """Packed rows with padding, an MTP module, key heads that are shared; through `remat`, which keeps softmaxes."""
    cfg = tiny_config() if name == "v3" else ARCHITECTURES[name]
    model = random_model(replace(cfg, n_layers=2, n_dense_layers=min(cfg.n_dense_layers, 2)))
    params, rest = dsj.partition(model)
    segments = jnp.asarray([[1] * 5 + [2] * 7 + [3] * 6, [1] * 15 + [0] * 3], jnp.int32)
    batch = {"tokens": random_tokens(model.cfg, 2, 18), "segments": segments}

    @partial(jax.jit, static_argnums=1)
    def gradient(params, ctx):
        return jax.value_and_grad(lambda p: dsj.loss(dsj.combine(p, rest), batch, ctx=ctx)[0])(params)

    native_forms = dsj.Context(experts="native", attention="native", linear="native", remat="core")
    (ours, ours_by), (loss, by) = gradient(params, native_forms), gradient(params, dsj.Context())
    assert float(ours) == pytest.approx(float(loss), rel=1e-6)
    for a, b in zip(jax.tree.leaves(ours_by), jax.tree.leaves(by), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5 * float(jnp.abs(b).max()))


@pytest.mark.slow
def test_a_model_is_trained_in_bfloat16_as_near_to_float32_as_by_xla():
    """Its products round once, sums never; the other form rounds as often as XLA's operations do."""
    params, rest = dsj.partition(random_model(tiny_config(n_layers=2, mtp_depth=0)))
    batch = {"tokens": random_tokens(rest.cfg, 2, 18)}

    @partial(jax.jit, static_argnums=1)
    def gradient(params, ctx):
        return jax.grad(lambda p: dsj.loss(dsj.combine(p, rest), batch, ctx=ctx)[0])(params)

    exact = jax.tree.leaves(gradient(params, dsj.Context()))

    def distance(form: str) -> np.ndarray:
        ctx = dsj.Context(dtype=jnp.bfloat16, experts=form, attention=form, linear=form)
        found = jax.tree.leaves(gradient(params, ctx))
        return np.array([jnp.linalg.norm(a - b) / jnp.linalg.norm(b) for a, b in zip(found, exact, strict=True)])

    ours, theirs = distance("native"), distance("auto")
    assert 0 < ours.max() < 0.05
    assert np.sqrt((ours**2).mean()) <= 1.1 * np.sqrt((theirs**2).mean())


@pytest.mark.parametrize(("D", "Z"), WIDTHS)
def test_products_of_bfloat16_are_those_of_its_values(D, Z):
    x, w, y = (jnp.asarray(a, jnp.bfloat16) for a in matrices((ROWS, D), (SIZES.size, D, Z), (ROWS, Z)))
    wide = [a.astype(jnp.float32) for a in (x, w, y)]
    for given, of, transpose in ((x, wide[0], False), (y, wide[2], True)):
        expected = grouped_matmul(of, wide[1], SIZES, transpose)
        for matrix in (w, Bits.of(w)):
            # The output is rounded once; a sum may be rounded to the other side.
            found = grouped_matmul(given, matrix, SIZES, transpose)
            assert found.dtype == jnp.bfloat16
            np.testing.assert_allclose(found.astype(jnp.float32), expected, rtol=2**-8, atol=1e-5)
            np.testing.assert_array_equal(grouped_matmul(of, matrix, SIZES, transpose), expected)
    found = grouped_outer(x, y, SIZES, jnp.float32)
    np.testing.assert_array_equal(found, grouped_outer(wide[0], wide[2], SIZES, jnp.float32))


# Shapes [B, T, S, N, G, K, V]: a step over shared keys; key heads apart, and shared by some; more queries than are
# taken together, and more heads than that; more keys than tiles have, and fewer; widths of whole panels and not;
# more keys than a thread keeps packed.
ATTENTION = [
    (2, 1, 256, 8, 1, 112, 96),
    (2, 5, 70, 8, 8, 48, 32),
    (1, 130, 300, 4, 2, 16, 24),
    (3, 2, 33, 200, 1, 20, 7),
    (1, 513, 600, 2, 2, 33, 65),
    (1, 100, 13200, 1, 1, 48, 20),
]


def chances(q, k, places, scale: float) -> np.ndarray:
    """The softmax of `attention` in float64, [B, N, T, S]."""
    position, segment, key_position, key_segment = places
    seen = (key_segment[:, None] == segment[..., None]) & (segment[..., None] != 0)
    seen &= key_position[:, None] <= position[..., None]
    score = np.where(seen[:, None], np.einsum("BTNK,BSNK->BNTS", q, by_head(k, q)) * scale, -np.inf)
    top = score.max(-1, keepdims=True)
    p = np.exp(score - np.where(np.isfinite(top), top, 0))
    total = p.sum(-1, keepdims=True)
    return p / np.where(total > 0, total, 1)


def by_head(a, q) -> np.ndarray:
    return np.repeat(a.astype(np.float64), q.shape[2] // a.shape[2], axis=2)


def attended(q, k, v, places, scale: float) -> np.ndarray:
    """`attention` in float64."""
    return np.einsum("BNTS,BSNV->BTNV", chances(q, k, places, scale), by_head(v, q))


def gradients(q, k, v, places, scale: float, do) -> list[np.ndarray]:
    """Of `attended`, in float64."""
    p = chances(q, k, places, scale)
    dp = np.einsum("BTNV,BSNV->BNTS", do, by_head(v, q))
    ds = p * (dp - (p * dp).sum(-1, keepdims=True)) * scale
    dq = np.einsum("BNTS,BSNK->BTNK", ds, by_head(k, q))
    dk, dv = np.einsum("BNTS,BTNK->BSNK", ds, q), np.einsum("BNTS,BTNV->BSNV", p, do)
    return [dq, *(g.reshape(*a.shape[:3], -1, a.shape[-1]).sum(3) for g, a in ((dk, k), (dv, v)))]


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("shape", ATTENTION)
def test_attention_equals_numpys(shape, dtype):
    """Three segments, 0 among them, in any order."""
    B, T, S, N, G, K, V = shape
    q, k, v, held, do = matrices((B, T, N, K), (B, S, G, K), (B, S, G, V), (3, B, S, K), (B, T, N, V))
    rng = np.random.default_rng(1)
    places = (
        rng.integers(0, S, (B, T), dtype=np.int32),
        rng.integers(0, 3, (B, T), dtype=np.int32),
        np.tile(np.arange(S, dtype=np.int32), (B, 1)),
        rng.integers(0, 3, (B, S), dtype=np.int32),
    )
    kept = [jnp.asarray(a, dtype) for a in (k, v, held)]
    k, v, held = (np.asarray(a.astype(jnp.float32)) for a in kept)

    @jax.jit
    def both(*operands):
        return jax.vjp(lambda *a: attention(*a, places, 0.3), *operands)

    found, vjp = both(q, *kept[:2])
    np.testing.assert_allclose(found, attended(q, k, v, places, 0.3), atol=5e-6)
    nothing = (places[1] == 0)[..., None, None]
    assert not (found * nothing).any()
    ours, theirs = jax.jit(vjp)(jnp.asarray(do)), gradients(q, k, v, places, 0.3, do)
    assert not (ours[0] * nothing).any()
    for gradient, expected, operand in zip(ours, theirs, (q, *kept[:2]), strict=True):
        assert gradient.dtype == operand.dtype
        rounded = 2**-8 if gradient.dtype == jnp.bfloat16 else 1e-6
        np.testing.assert_allclose(gradient.astype(jnp.float32), expected, atol=2e-5, rtol=rounded)
    if G == 1:
        layer = held[2][:, :, None]
        found = jax.jit(latent_attention, static_argnums=(3, 5))(q, kept[2], 2, V, places, 0.3)
        np.testing.assert_allclose(found, attended(q, layer, layer[..., :V], places, 0.3), atol=5e-6)


@jax.jit
def attention_and_gradients(q, k, v, places, do):
    found, vjp = jax.vjp(lambda *a: attention(*a, places, 0.3), q, k, v)
    return found, *vjp(do)


# Lengths of the segments that a row is made of, the last one padding: one, and several, of whole tiles and not.
@pytest.mark.parametrize("lengths", [(300, 0), (150, 106, 44), (64, 64, 128, 44), (192, 64, 44)])
def test_tokens_in_order_see_all_keys_of_a_tile_or_some_or_none(lengths):
    """By positions in the row, as from a cache that holds 40 more keys behind, and in each segment."""
    T, S = 300, 340
    q, k, v, do = matrices((1, T, 4, 16), (1, S, 2, 16), (1, S, 2, 24), (1, T, 4, 24))
    segment = np.repeat([*range(1, len(lengths)), 0], lengths).astype(np.int32)
    for position in (np.arange(T), np.concatenate([np.arange(n) for n in lengths])):
        at = position.astype(np.int32)
        behind = np.arange(T, S, dtype=np.int32), np.ones(S - T, np.int32)
        keys = (np.concatenate(pair) for pair in zip((at, segment), behind, strict=True))
        places = tuple(a[None] for a in (at, segment, *keys))
        found, *ours = attention_and_gradients(q, k, v, places, do)
        np.testing.assert_allclose(found, attended(q, k, v, places, 0.3), atol=5e-6)
        for gradient, expected in zip(ours, gradients(q, k, v, places, 0.3, do), strict=True):
            np.testing.assert_allclose(gradient, expected, atol=2e-5, rtol=1e-6)


def test_large_scores_and_distant_ones():
    """The running maximum moves, and what lies far below it counts for nothing."""
    rng = np.random.default_rng(0)
    q, k, v = (rng.normal(size=(1, size, 2, 16)).astype(np.float32) for size in (9, 200, 200))
    places = (np.full((1, 9), 200, np.int32), *(np.ones((1, size), np.int32) for size in (9, 200, 200)))
    found = attention(q * 40, k, v, places, 1.0)
    np.testing.assert_allclose(found, attended(q * 40, k, v, places, 1.0), atol=2e-5)


def test_what_remat_keeps_is_not_attended_again():
    model = random_model(tiny_config(n_layers=1, n_dense_layers=1, mtp_depth=0))
    params, rest = dsj.partition(model)
    batch = {"tokens": random_tokens(model.cfg, 1, 8)}

    def calls(remat: str) -> int:
        ctx = dsj.Context(attention="native", remat=remat)
        step = jax.grad(lambda p: dsj.loss(dsj.combine(p, rest), batch, ctx=ctx)[0])
        return jax.jit(step).lower(params).as_text().count("@deepseek_jax.AttendFloat32(")

    assert (calls("none"), calls("core"), calls("full")) == (1, 1, 2)


# An indexer chooses the keys of v3.2: that is not for it.
@pytest.mark.parametrize(
    ("name", "dtype", "cache"),
    [
        (None, "float32", "compute"),
        ("distill-qwen", "float32", "compute"),
        pytest.param(None, "bfloat16", "served", marks=pytest.mark.slow),
        pytest.param("v3.2", "float32", "compute", marks=pytest.mark.slow),
    ],
)
def test_a_model_decodes_by_it(name, dtype, cache):
    """Prompts of two lengths in chunks, and drafts."""
    cfg = tiny_config() if name is None else ARCHITECTURES[name]
    cfg = replace(cfg, n_layers=2, n_dense_layers=min(cfg.n_dense_layers, 2))
    model = random_model(cfg, dtype=jnp.dtype(dtype))
    prompts = [row.tolist() for row in np.asarray(random_tokens(cfg, 2, 21))]
    prompts[1] = prompts[1][:3]

    def run(form: str):
        ctx = dsj.Context(attention=form, cache=cache)
        how = {"max_new_tokens": 6, "stop_ids": (), "use_mtp": cfg.mtp_depth > 0, "chunk": 8}
        return dsj.generate(model, prompts, ctx=ctx, **how)

    (tokens, info), (expected, by) = run("native"), run("xla")
    assert tokens == expected
    for ours, theirs in zip(info.logprobs, by.logprobs, strict=True):
        assert ours == pytest.approx(theirs, abs=2e-5 if dtype == "float32" else 5e-2)


@pytest.mark.parametrize("name", ["v3", "distill-qwen"])
def test_weights_as_stored_give_the_same_bits(name):
    """Parameters in bfloat16 and computing in float32, against parameters in float32."""
    cfg = tiny_config(mtp_depth=0) if name == "v3" else ARCHITECTURES[name]
    cfg = replace(cfg, n_layers=2, n_dense_layers=1 if cfg.moe else 2)
    stored = random_model(cfg, dtype=jnp.bfloat16)
    wide = jax.tree.map(lambda a: a.astype(jnp.float32) if a.dtype == jnp.bfloat16 else a, stored)
    ctx = dsj.Context(dtype=jnp.float32, experts="native", attention="native", linear="native")
    prompts = [np.asarray(random_tokens(cfg, 1, n))[0].tolist() for n in (70, 5)]

    def run(model):
        return dsj.generate(model, prompts, ctx=ctx, max_new_tokens=6, stop_ids=(), chunk=64)

    (tokens, info), (expected, by) = run(stored), run(wide)
    assert tokens == expected
    for ours, theirs in zip(info.logprobs, by.logprobs, strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_what_it_does_not_multiply_is_refused():
    x, w = matrices((4, 8), (2, 8, 16))
    sizes = np.array([2, 2], np.int32)
    with pytest.raises(
        ValueError, match=r"multiplies float32 and bfloat16, and here are float16; choose another dtype"
    ):
        grouped.grouped_matmul(jnp.asarray(x, jnp.float16), jnp.asarray(w, jnp.float16), sizes, "native")
    stored = Quantized(jnp.asarray(w, FP8), jnp.ones((2, 1, 1)), (1, 8, 16), w.shape)
    with pytest.raises(ValueError, match="the experts are stored quantised; load the model in float32 or bfloat16"):
        grouped.grouped_matmul(x, stored, sizes, "native")


def test_shapes_that_do_not_fit_are_refused():
    """The library goes by them through memory, and would read and write beyond its end."""
    x, w = matrices((4, 8), (2, 8, 16))
    sizes, q = np.array([2, 2], np.int32), jnp.zeros((2, 3, 4, 8))
    places = [jnp.zeros(shape, jnp.int32) for shape in ((2, 3), (2, 3), (2, 5), (2, 5))]
    k = jnp.zeros((2, 5, 2, 8))
    refused = [
        (
            lambda: grouped_matmul(x[:, :7], w, sizes),
            r"w \(2, 8, 16\) does not fit x: D is 8 in it and 7 there",
        ),
        (lambda: grouped_matmul(x, w, sizes, transpose=True), "w .* does not fit x: Z is 16 in it and 8 there"),
        (lambda: grouped_matmul(x, w, sizes[:1]), r"sizes \(1,\) does not fit w: E is 1 in it and 2 there"),
        (lambda: grouped_matmul(x, w[0], sizes), r"w must have axes EDZ; its shape is \(8, 16\)"),
        (lambda: grouped_outer(x, x[:3], sizes, jnp.float32), "y .* does not fit x: M is 3 in it and 4 there"),
        (lambda: attention(q, k, k[:, :4], places, 1.0), "v .* does not fit k: S is 4 in it and 5 there"),
        (lambda: attention(q, k, k, places[:2] * 2, 1.0), "positions of keys .* does not fit k: S is 3"),
        (
            lambda: attention(q[:, :, :3], k, k, places, 1.0),
            "2 heads of keys do not serve 3 of queries alike",
        ),
        (lambda: latent_attention(q, k[None, :, :, 0, :4], 0, 2, places, 1.0), "k .* does not fit q: K is 4"),
        (
            lambda: latent_attention(q, k[None, :, :, 0], 0, 9, places, 1.0),
            "values of 9 numbers are no part of",
        ),
    ]
    for call, message in refused:
        with pytest.raises(ValueError, match=message):
            call()


def test_it_is_for_cpus(monkeypatch):
    q, places = jnp.zeros((1, 1, 1, 4), jnp.float16), [jnp.zeros((1, 1), jnp.int32)] * 4
    with pytest.raises(
        ValueError, match=r'Context\(attention="native"\): it multiplies float32 .* and here are float16'
    ):
        attention(q, q, q, places, 1.0)
    mesh = make_mesh(data=1)
    monkeypatch.setattr(dsj.Context, "platform", "tpu")
    for form in ("experts", "attention", "linear"):
        with pytest.raises(ValueError, match=rf'Context\({form}="native"\): it is for CPUs, and the mesh is of tpu'):
            dsj.Context(mesh=mesh, **{form: "native"})


def test_without_a_compiler_it_says_what_is_missing(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(ValueError, match="CXX=no-such-compiler is not found; install one"):
        library.built()
    monkeypatch.setenv("CXX", "false")
    with pytest.raises(ValueError, match=r"false .* failed"):
        library.built()
    assert list((tmp_path / "deepseek-jax" / "native").iterdir()) == []
    monkeypatch.delenv("CXX")
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc")
    with pytest.raises(
        ValueError, match=r"built in /proc/deepseek-jax/native, which cannot be written: .*XDG_CACHE_HOME"
    ):
        library.built()
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ValueError, match=r"there is no c\+\+, g\+\+ or clang\+\+ here"):
        library.built()


def test_it_is_built_once(monkeypatch):
    library.built()
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("built again"))
    library._register()
    assert library.built().is_file()


def test_another_compiler_of_the_same_name_builds_anew(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    by = tmp_path / "c++"
    by.write_text("")
    by.chmod(0o755)
    monkeypatch.setenv("CXX", str(by))
    monkeypatch.setattr(library, "_compile", lambda _, path: path.touch())
    first = library.built()
    assert library.built() == first
    os.utime(by, ns=(0, 0))
    assert library.built() != first


def test_matrix_units_are_for_who_may_use_them(monkeypatch):
    flags = library._flags.__wrapped__
    for answer, expected in ((0, library.FLAGS), (-1, (*library.FLAGS, "-U__AMX_BF16__"))):
        monkeypatch.setattr(library.platform, "machine", lambda: "x86_64")
        monkeypatch.setattr(library.sys, "platform", "linux")
        monkeypatch.setattr(library.ctypes, "CDLL", lambda _, answer=answer: SimpleNamespace(syscall=lambda *_: answer))
        assert flags() == expected
    monkeypatch.setattr(library.platform, "machine", lambda: "aarch64")
    monkeypatch.setattr(library.ctypes, "CDLL", None)
    assert flags() == library.FLAGS


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
