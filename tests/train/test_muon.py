"""Muon's parts: the iteration's singular values, which axes are a matrix, the momentum; against optax and NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from deepseek_jax.core.params import Matrix
from deepseek_jax.train.muon import ROUNDS, matrices, orthogonalised, restore, scale_by_muon

RNG = np.random.default_rng(0)


def polar(x):
    """The orthogonal factor of each matrix, from a singular value decomposition in float64."""
    u, _, v = np.linalg.svd(np.asarray(x, np.float64), full_matrices=False)
    return u @ v


@pytest.mark.parametrize("shape", [(3, 24, 40), (40, 24)])
def test_every_singular_value_becomes_one(shape):
    x = RNG.normal(size=shape).astype(np.float32)
    # Columns of very different size: the smallest singular value is a thousandth of the largest.
    x[..., shape[-1] // 2 :] *= 1e-3
    found = np.asarray(jax.jit(orthogonalised)(x))
    values = np.linalg.svd(found, compute_uv=False)
    assert 0.99 < values.min() <= values.max() < 1.01
    np.testing.assert_allclose(found, polar(x), atol=0.01)


def test_the_iteration_is_the_papers_polynomial_on_singular_values():
    # A diagonal matrix stays one: every round maps s to a s + b s^3 + c s^5.
    s = np.array([0.8, 0.5, 0.3, 1e-3, 0.0], np.float64)
    expected = s / np.sqrt(np.sum(s**2))
    for a, b, c in [(3.4445, -4.7750, 2.0315)] * 8 + [(2.0, -1.5, 0.5)] * 2:
        expected = a * expected + b * expected**3 + c * expected**5
    np.testing.assert_allclose(np.diag(orthogonalised(jnp.diag(jnp.asarray(s, jnp.float32)))), expected, atol=1e-5)
    assert expected[:4].min() > 0.99


def test_the_step_does_not_depend_on_the_matrices_size():
    """Squares of the small ones vanish in float32, of the large ones they overflow; each matrix counts by itself."""
    sizes = np.array([1, 1e-10, 1e-19, 1e-25, 1e-30, 1.2e-38, 1e20, 3.4e38], np.float32)[:, None, None]
    found = np.asarray(jax.jit(orthogonalised)(sizes * np.eye(4, 8, dtype=np.float32)))
    assert 0.98 < found[0].max() < 1.02
    np.testing.assert_allclose(found, np.broadcast_to(found[0], found.shape), atol=1e-6)
    x = RNG.normal(size=(6, 5)).astype(np.float32)
    small, usual = (np.asarray(orthogonalised(x * np.float32(size))) for size in (1e-36, 1))
    np.testing.assert_allclose(small, usual, atol=1e-4)


def test_nothing_gives_a_zero_step_and_what_is_not_finite_is_not_hidden():
    """Below the smallest normal number, where accelerators have only 0, is nothing."""
    x = np.zeros((5, 3, 4), np.float32)
    x[1], x[2] = 1e-45, 1e-39
    np.testing.assert_allclose(orthogonalised(x[:3]), 0, atol=1e-30)
    x[3, 0, 0], x[4, 0, 0] = np.nan, np.inf
    found = np.asarray(orthogonalised(x))
    assert np.isfinite(found[:3]).all()
    assert np.isnan(found[3:]).any((1, 2)).all()
    # In float32 whatever comes in.
    assert orthogonalised(jnp.zeros((3, 4), jnp.bfloat16)).dtype == jnp.float32


def test_a_matrix_whose_gradients_stop_stays_finite():
    """Its momentum falls through all of float32; its steps keep their size until there is nothing left of it."""
    rule = scale_by_muon({"w": Matrix((-2,), (-1,))}, 0.95, 0.18)
    g = {"w": RNG.normal(size=(4, 8)).astype(np.float32)}
    _, state = rule.update(g, rule.init(g))

    @jax.jit
    def go(state):
        def one(state, _):
            step, state = rule.update({"w": jnp.zeros((4, 8))}, state)
            return state, jnp.sqrt(jnp.square(step["w"]).mean())

        return jax.lax.scan(one, state, None, length=2000)

    state, sizes = go(state)
    assert np.isfinite(sizes).all()
    np.testing.assert_allclose(sizes[:1500], sizes[0], rtol=1e-3)
    np.testing.assert_allclose(sizes[-100:], 0, atol=1e-30)


@pytest.mark.parametrize(
    ("shape", "axes", "count"),
    [
        ((2, 3, 5, 2, 4), Matrix((-3,), (-1,)), (2, 3, 2, 5, 4)),  # layers, experts, [in, gate and up, out]
        ((2, 6, 3, 4), Matrix((-3,), (-2, -1)), (2, 6, 12)),  # layers, [in, heads, dims]
        ((2, 3, 4, 6), Matrix((-3, -2), (-1,)), (2, 12, 6)),  # layers, [heads, dims, out]
    ],
)
def test_matrices_are_taken_apart_and_put_back(shape, axes, count):
    x = jnp.arange(np.prod(shape), dtype=jnp.float32).reshape(shape)
    found = matrices(x, axes)
    assert found.shape == count
    np.testing.assert_array_equal(restore(found, axes, shape), x)
    if len(shape) == 5:
        np.testing.assert_array_equal(found[1, 2, 1], x[1, 2, :, 1])


def test_steps_are_orthogonalised_nesterov_momentum():
    axes = {"gate_up": Matrix((-3,), (-1,))}
    first, second = (RNG.normal(size=(2, 12, 2, 8)).astype(np.float32) for _ in range(2))
    rule = scale_by_muon(axes, 0.95, 0.18)
    state = rule.init({"gate_up": first})
    update = jax.jit(rule.update)
    one, state = update({"gate_up": first}, state)
    two, state = update({"gate_up": second}, state)
    held = 0.95 * first + second
    np.testing.assert_allclose(state.momentum["gate_up"], held, rtol=1e-6)
    for found, momentum in ((one, 1.95 * first), (two, 0.95 * held + second)):
        expected = 0.18 * 12**0.5 * polar(np.moveaxis(momentum, 2, 1))
        np.testing.assert_allclose(np.moveaxis(found["gate_up"], 2, 1), expected, atol=3e-3)
        # 12 x 8 matrices: a step of root mean square 0.18 * sqrt(12) / sqrt(12).
        assert np.sqrt(np.mean(np.square(found["gate_up"]))) == pytest.approx(0.18, rel=0.01)


def test_an_update_leaves_its_gradients_as_they_are():
    """The step hands the same ones in twice, before and after it knows that the update is finite."""
    given = {"w": jnp.ones((3, 4)), "norm": jnp.ones(3)}
    rule, kept = scale_by_muon({"w": Matrix((-2,), (-1,))}, 0.95, 0.18), dict(given)
    found, _ = rule.update(given, rule.init(given))
    assert all(given[name] is kept[name] for name in kept)
    assert found["norm"] is given["norm"]


def test_the_first_step_is_optaxs():
    x = RNG.normal(size=(16, 24)).astype(np.float32)
    theirs = optax.contrib.scale_by_muon(
        ns_coeffs=jnp.asarray(ROUNDS),
        ns_steps=len(ROUNDS),
        beta=0.95,
        weight_dimension_numbers={"w": optax.contrib.MuonDimensionNumbers(0, 1)},
    )
    expected, _ = theirs.update({"w": x}, theirs.init({"w": jnp.zeros_like(x)}))
    rule = scale_by_muon({"w": Matrix((-2,), (-1,))}, 0.95, 0.2)
    found, _ = rule.update({"w": x}, rule.init({"w": x}))
    np.testing.assert_allclose(found["w"] / (0.2 * 24**0.5), expected["w"], atol=2e-5)
