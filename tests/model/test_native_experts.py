"""The routed experts as one compiled call, where no gradient is asked for: every path through it, and who takes it."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import random_model, random_tokens, tiny_config

import deepseek_jax as dsj
from deepseek_jax.core.bits import Bits
from deepseek_jax.core.quant import FP8, Quantized
from deepseek_jax.kernels.native import experts, grouped
from deepseek_jax.kernels.native.library import compiler
from deepseek_jax.model.experts import routed_experts

pytestmark = pytest.mark.skipif(compiler() is None, reason="there is no C++ compiler here")

# Assignments of each expert: none, fewer than a tile has rows and one more, several blocks; and of nobody.
MANY = [1, 0, 2, 3, 4, 6, 12, 13, 0, 25, 192, 401, 7]
NOBODY = 10
# Narrower than a vector; whole panels and strips; an expert that is packed at once, and ones that are too large for it;
# deeper than is packed at once.
WIDTHS = [(1, 1), (7, 33), (64, 128), (600, 40), (40, 600), (320, 256), (1030, 130)]


# One assignment; one expert, whose inner width the threads part; as many experts as assignments; one of one token; a
# last part that is narrower; all of one expert; nobody's only; of no tokens.
FEW = {
    "one": ([0, 1], 0, 1, 40, 600),
    "one expert": ([0, 3], 0, 3, 40, 1030),
    "as many": ([1, 1, 1, 1], 0, 4, 33, 520),
    "some of nobody": ([2, 0, 0, 1], 3, 2, 70, 515),
    "more than a tile": ([0, 100, 0], 28, 2, 64, 512),
    "all of one": ([0, 0, 700], 0, 1, 48, 36),
    "nobody": ([0, 0], 4, 2, 8, 8),
    "no tokens": ([0, 0], 0, 2, 8, 8),
}


@partial(jax.jit, static_argnums=5)
def run(x, index, weight, gate_up, down, limit=None):
    return routed_experts(x, index, weight, gate_up, down, "native", limit)


def tensors(sizes: list[int], nobody: int, K: int, D: int, F: int) -> list:
    """x, index, weight, gate_up and down for so many assignments of each expert; the last token is nobody's."""
    rng = np.random.default_rng(0)
    E, none = len(sizes), np.resize([-1, len(sizes)], nobody)
    flat = rng.permutation([*np.repeat(np.arange(E), sizes), *none[K:]])
    index = np.append(flat, none[:K]).astype(np.int32).reshape(-1, K)
    x, weight = rng.normal(size=(len(index), D)), rng.normal(size=index.shape)
    gate_up, down = rng.normal(size=(E, D, 2, F)) / D**0.5, rng.normal(size=(E, F, D)) / F**0.5
    # What nobody reads may be anything.
    x[nobodys(index, E)] = np.nan
    return [a if a.dtype == np.int32 else a.astype(np.float32) for a in (x, index, weight, gate_up, down)]


def nobodys(index, E: int) -> np.ndarray:
    return ((index < 0) | (index >= E)).all(1)


def loop(x, index, weight, gate_up, down, limit=None) -> np.ndarray:
    """Assignment by assignment, in float64."""
    x, weight, gate_up, down = (np.asarray(a, np.float64) for a in (x, weight, gate_up, down))
    y = np.zeros(x.shape)
    for e in range(len(down)):
        n, k = np.nonzero(index == e)
        gate, up = x[n] @ gate_up[e, :, 0], x[n] @ gate_up[e, :, 1]
        if limit is not None:
            gate, up = np.minimum(gate, limit), np.clip(up, -limit, limit)
        np.add.at(y, n, weight[n, k, None] * ((gate / (1 + np.exp(-gate)) * up) @ down[e]))
    return y


def close(found, expected, depth: int) -> None:
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, atol=1e-6 * max(depth, 64) ** 0.5)


@pytest.mark.parametrize(("D", "F"), WIDTHS)
def test_sums_equal_numpys(D, F):
    given = tensors(MANY, NOBODY, 2, D, F)
    expected = loop(*given)
    found = run(*given)
    close(found, expected, max(D, F))
    nothing = nobodys(given[1], len(MANY))
    assert nothing.any()
    assert not np.asarray(found)[nothing].any()
    cut = loop(*given, 0.5)
    close(run(*given, 0.5), cut, max(D, F))
    assert np.abs(cut - expected)[~nothing].max() > 0.1


@partial(jax.jit, static_argnums=(6, 7))
def gradients(x, index, weight, gate_up, down, dy, limit, form):
    """The sums, and their gradients by x, weight and the matrices."""
    floats = (x, weight, gate_up, down)
    y, vjp = jax.vjp(lambda x, w, g, d: routed_experts(x, index, w, g, d, form, limit), *floats)
    return y, *vjp(dy)


def derived(x, index, weight, gate_up, down, dy, limit=np.inf) -> list[np.ndarray]:
    """Those of `loop`, assignment by assignment, in float64."""
    x, weight, gate_up, down, dy = (np.asarray(a, np.float64) for a in (x, weight, gate_up, down, dy))
    dx, dweight, dgate_up, ddown = (np.zeros(a.shape) for a in (x, weight, gate_up, down))
    for e in range(len(down)):
        n, k = np.nonzero(index == e)
        gate, up, w = x[n] @ gate_up[e, :, 0], x[n] @ gate_up[e, :, 1], weight[n, k, None]
        inside = [gate <= limit, np.abs(up) <= limit]
        gate, up = np.minimum(gate, limit), np.clip(up, -limit, limit)
        sigmoid = 1 / (1 + np.exp(-gate))
        da = dy[n] @ down[e].T
        dweight[n, k] = (gate * sigmoid * up * da).sum(1)
        d_gate = inside[0] * w * da * up * sigmoid * (1 + gate * (1 - sigmoid))
        d_up = inside[1] * w * da * gate * sigmoid
        np.add.at(dx, n, d_gate @ gate_up[e, :, 0].T + d_up @ gate_up[e, :, 1].T)
        dgate_up[e] = np.stack([x[n].T @ d_gate, x[n].T @ d_up], axis=1)
        ddown[e] = (w * gate * sigmoid * up).T @ dy[n]
    return [dx, dweight, dgate_up, ddown]


@pytest.mark.parametrize("limit", [None, 0.5])
@pytest.mark.parametrize(("D", "F"), WIDTHS)
def test_gradients_equal_numpys(D, F, limit):
    given = tensors(MANY, NOBODY, 2, D, F)
    dy = np.random.default_rng(1).normal(size=given[0].shape).astype(np.float32)
    dy[nobodys(given[1], len(MANY))] = np.nan
    y, *found = gradients(*given, dy, limit, "native")
    np.testing.assert_array_equal(y, run(*given, limit))
    for ours, theirs in zip(found, derived(*given, dy, np.inf if limit is None else limit), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-6 * max(D, F, 401) ** 0.5 * np.abs(theirs).max())
    assert not found[0][nobodys(given[1], len(MANY))].any()
    assert not found[1][(given[1] < 0) | (given[1] >= len(MANY))].any()
    assert not found[2][np.array(MANY) == 0].any()
    assert not found[3][np.array(MANY) == 0].any()


@pytest.mark.parametrize("name", ["one", "some of nobody", "nobody", "no tokens"])
def test_gradients_of_few_assignments(name):
    given = tensors(*FEW[name])
    dy = np.ones(given[0].shape, np.float32)
    _, *found = gradients(*given, dy, None, "native")
    for ours, theirs in zip(found, derived(*given, dy), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=2e-5)


def test_gradients_agree_bit_for_bit():
    """Whichever thread takes what; and with calls at the same time."""
    given = tensors(MANY, NOBODY, 4, 320, 256)
    dy = np.random.default_rng(1).normal(size=given[0].shape).astype(np.float32)
    expected = gradients(*given, dy, None, "native")
    together = jax.jit(lambda *given: [gradients(*given, dy * s, None, "native") for s in (1, 2, 4)])
    for _ in range(20):
        for ours, theirs in zip(together(*given)[0], expected, strict=True):
            np.testing.assert_array_equal(ours, theirs)


def test_gradients_of_bfloat16_are_those_of_its_values():
    given = tensors(MANY, NOBODY, 2, 70, 40)
    dy = np.random.default_rng(1).normal(size=given[0].shape).astype(np.float32)
    index, (x, weight, *matrices, dy) = given[1], (jnp.asarray(a, jnp.bfloat16) for a in (given[0], *given[2:], dy))
    wide = [a.astype(jnp.float32) for a in (x, weight, *matrices, dy)]
    _, *expected = gradients(wide[0], index, *wide[1:], None, "native")
    _, *found = gradients(x, index, weight, *matrices, dy, None, "native")
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.dtype == jnp.bfloat16
        np.testing.assert_array_equal(ours, theirs.astype(jnp.bfloat16))
    # Stored so beside activations in float32, the matrices have gradients in bfloat16.
    of_both = gradients(wide[0], index, wide[1], *matrices, wide[-1], None, "native")[1:]
    for ours, theirs, held in zip(of_both, expected, (*wide[:2], *matrices), strict=True):
        assert ours.dtype == held.dtype
        np.testing.assert_array_equal(ours, theirs.astype(held.dtype))
    # Bits have no gradient; what is before them has.
    bits = [Bits.of(a) for a in matrices]
    y, vjp = jax.vjp(lambda x, weight: run(x, index, weight, *bits), x, weight)
    for ours, theirs in zip(vjp(dy.astype(y.dtype)), found[:2], strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("name", FEW)
def test_few_assignments(name):
    given = tensors(*FEW[name])
    close(run(*given), loop(*given), max(FEW[name][3:]))


def test_far_activations_are_those_of_the_formula():
    """The exponential function neither overflows nor is cut off where it counts."""
    x, index, weight, gate_up, down = tensors([40], 0, 1, 1, 64)
    given = x, index, weight, np.abs(gate_up), np.eye(*down.shape[1:], dtype=np.float32)[None]
    for far in (1.0, 5.0, 80.0, 1e4):
        inputs = np.linspace(-far, far, 40, dtype=np.float32)[:, None]
        with np.errstate(over="ignore"):
            expected = loop(inputs, *given[1:])
        np.testing.assert_allclose(run(inputs, *given[1:]), expected, rtol=2e-6, atol=1e-30 * far)
    assert np.isnan(run(np.full((40, 1), np.nan, np.float32), *given[1:], 0.5)).all()


@pytest.mark.parametrize(("D", "F"), WIDTHS)
def test_bfloat16_is_read_as_its_values(D, F):
    given = tensors(MANY, NOBODY, 2, D, F)
    rounded = [jnp.asarray(a, jnp.bfloat16) for a in given[3:]]
    wide = [np.asarray(a.astype(jnp.float32)) for a in rounded]
    expected = run(*given[:3], *wide)
    for held in (rounded, map(Bits.of, rounded)):
        np.testing.assert_array_equal(run(*given[:3], *held), expected)
    x, weight = (jnp.asarray(a, jnp.bfloat16) for a in (given[0], given[2]))
    expected = run(x.astype(jnp.float32), given[1], weight.astype(jnp.float32), *wide)
    for held in (rounded, [Bits.of(a) for a in rounded]):
        found = run(x, given[1], weight, *held)
        assert found.dtype == jnp.bfloat16
        np.testing.assert_array_equal(found, expected.astype(jnp.bfloat16))


@pytest.mark.parametrize("case", [(MANY, NOBODY, 4, 64, 128), (MANY, NOBODY, 4, 320, 256), FEW["as many"]])
def test_calls_agree_bit_for_bit(case):
    """Whichever thread takes what; and with calls at the same time."""
    given = tensors(*case)
    expected = np.asarray(run(*given))
    together = jax.jit(lambda x, *rest: [routed_experts(x * s, *rest, "native") for s in (1, 2, 4, 8)])
    for _ in range(20):
        np.testing.assert_array_equal(run(*given), expected)
        np.testing.assert_array_equal(together(*given)[0], expected)


@pytest.mark.parametrize(
    ("cut", "message"),
    [
        (lambda x, i, w, g, d: (x[:-1], i, w, g, d), r"index \(3, 2\) does not fit x: N is 3 in it and 2 there"),
        (lambda x, i, w, g, d: (x, i, w[:, :1], g, d), "weight .* does not fit index: K is 1 in it and 2 there"),
        (lambda x, i, w, g, d: (x, i, w, g[:, :-1], d), "gate_up .* does not fit x: D is 7 in it and 8 there"),
        (lambda x, i, w, g, d: (x, i, w, g[:-1], d), "down .* does not fit gate_up: E is 2 in it and 1 there"),
        (lambda x, i, w, g, d: (x, i, w, g, d[:, :, :-1]), "down .* does not fit x: D is 7 in it and 8 there"),
        (lambda x, i, w, g, d: (x, i, w, g, d[:, :-1]), "gate_up is 32 wide, which is not twice the 15 of down"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(cut, message):
    """The library goes by them through memory, and would read and write beyond its end."""
    x, index, weight, gate_up, down = map(jnp.asarray, tensors([3, 2], 1, 2, 8, 16))
    with pytest.raises(ValueError, match=message):
        experts.routed(*cut(x, index, weight, gate_up.reshape(2, 8, 32), down), None)


def test_what_it_does_not_multiply_is_refused():
    x, index, weight, gate_up, down = tensors([2, 2], 0, 1, 8, 16)
    half = [jnp.asarray(a, jnp.float16) for a in (x, weight, gate_up, down)]
    with pytest.raises(ValueError, match=r"multiplies float32 and bfloat16, and here are float16; choose another"):
        routed_experts(half[0], index, half[1], half[2], half[3], "native")
    stored = Quantized(jnp.asarray(gate_up, FP8), jnp.ones((2, 1, 1, 1)), (1, 8, 1, 16), gate_up.shape)
    with pytest.raises(ValueError, match="the experts are stored quantised; load the model in float32 or bfloat16"):
        routed_experts(x, index, weight, stored, down, "native")


@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.slow)])
def test_a_model_decodes_by_it(dtype, monkeypatch):
    """A prompt in chunks, and drafts; weights of bfloat16 as bits."""
    cfg = replace(tiny_config(), n_layers=2, n_dense_layers=1)
    model = random_model(cfg, dtype=jnp.dtype(dtype))
    prompts = [row.tolist() for row in np.asarray(random_tokens(cfg, 2, 21))]

    def generated(form: str):
        how = {"max_new_tokens": 6, "stop_ids": (), "chunk": 8}
        return dsj.generate(model, prompts, ctx=dsj.Context(experts=form), **how)

    expected, by = generated("auto")
    monkeypatch.setattr(grouped, "grouped_matmul", lambda *_: pytest.fail("a product by itself"))
    tokens, info = generated("native")
    assert tokens == expected
    for ours, theirs in zip(info.logprobs, by.logprobs, strict=True):
        assert ours == pytest.approx(theirs, abs=2e-5 if dtype == "float32" else 5e-2)


def test_who_asks_for_a_gradient_keeps_what_it_needs():
    given = [jnp.asarray(a) for a in tensors([2, 2], 0, 1, 8, 16)]

    def calls(function) -> list[int]:
        text = jax.jit(function).lower(*given).as_text()
        names = ("RoutedFloat32", "RoutedGradientsFloat32", "GroupedRowsFloat32")
        return [text.count(f"@deepseek_jax.{name}(") for name in names], "tensor<4x32xf32>" in text

    assert calls(run) == ([1, 0, 0], False)
    # What the first product came to is kept for it.
    assert calls(jax.grad(lambda *given: run(*given).sum())) == ([1, 1, 0], True)
