"""V4's Muon: two stages of the iteration, steps of one size for every matrix and every gradient's scale."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_jax.core.params import Matrix, gain, named, param
from deepseek_jax.train.muon import EXACT, FAST, ROUNDS, orthogonalised, scale_by_muon
from deepseek_jax.train.optim import make
from deepseek_jax.train.recipes import recipe

RNG = np.random.default_rng(0)


def rounds(values: np.ndarray, coefficients) -> np.ndarray:
    for a, b, c in coefficients:
        values = a * values + b * values**3 + c * values**5
    return values


def test_eight_fast_rounds_bring_every_singular_value_near_one_and_two_exact_ones_end_there():
    # v4_muon C2
    assert ROUNDS == ((3.4445, -4.7750, 2.0315),) * 8 + ((2.0, -1.5, 0.5),) * 2
    values = np.geomspace(1e-4, 1, 10_000)
    fast = rounds(values, [FAST] * 8)
    # The fast polynomial does not settle: it leaves values between about 0.7 and 1.2.
    assert 0.65 < fast.min() < 0.75
    assert 1.1 < fast.max() < 1.25
    both = rounds(values, ROUNDS)
    assert np.abs(both - 1).max() < 0.02
    # 1 is where the second polynomial stays, with slope 0.
    assert sum(EXACT) == 1
    assert EXACT[0] + 3 * EXACT[1] + 5 * EXACT[2] == 0


def test_a_steps_singular_values_are_one_before_scaling():
    values = np.linalg.svd(jax.jit(orthogonalised)(RNG.normal(size=(2, 48, 32))), compute_uv=False)
    np.testing.assert_allclose(values, 1, atol=0.01)


@pytest.mark.parametrize("shape", [(32, 32), (16, 64), (64, 16)])
def test_a_steps_root_mean_square_is_018_whatever_the_matrix_and_the_gradients_scale(shape):
    # v4_muon C1
    axes = {"w": Matrix((-2,), (-1,))}
    rule = scale_by_muon(axes, 0.95, 0.18)
    x = RNG.normal(size=shape).astype(np.float32)
    sizes = []
    for scale in (1e-6, 1.0, 1e4):
        step, _ = rule.update({"w": scale * x}, rule.init({"w": x}))
        sizes.append(np.sqrt(np.mean(np.square(step["w"]))))
    np.testing.assert_allclose(sizes, 0.18, rtol=0.01)


def test_every_expert_takes_a_step_of_its_own_whatever_its_gradient():
    """A rarely chosen expert moves as far as a busy one; one that got no token does not move."""
    rule = scale_by_muon({"gate_up": Matrix((-3,), (-1,))}, 0.95, 0.18)
    g = RNG.normal(size=(3, 12, 2, 8)).astype(np.float32) * np.array([1.0, 1e-4, 0.0], np.float32)[:, None, None, None]
    step, _ = rule.update({"gate_up": g}, rule.init({"gate_up": g}))
    sizes = np.sqrt(np.square(np.asarray(step["gate_up"])).mean((1, 2, 3)))
    np.testing.assert_allclose(sizes, [0.18, 0.18, 0], rtol=0.01)


def test_v4_leaves_embedding_head_and_norms_to_adamw():
    # v4_muon C3
    params = {
        "embed": param("float32", (8, 4), ("vocab", "embedding"), inputs=1),
        "head": param("float32", (4, 8), ("embed", "vocab"), inputs=1),
        "norm.weight": gain("float32", 4, "embed"),
        "stacks.0.attn.q_a": param("float32", (1, 4, 8), (None, "embed", "q_rank"), inputs=1, apart=(0,)),
        "stacks.0.ffn.router.weight": param("float32", (1, 4, 8), (None, "embed", "scores"), inputs=1, apart=(0,)),
    }
    optimizer = make(recipe("deepseek-v4-flash").optimizer, params)
    values = {name: jnp.ones(v.shape) for name, v in named(params).items()}
    g = {name: jnp.asarray(RNG.normal(size=v.shape), jnp.float32) * 1e-9 for name, v in values.items()}
    change, _ = optimizer.update(g, optimizer.init(values), values)
    decay = {name: 0.0 if name == "norm.weight" else 0.1 for name in values}
    for name, value in change.items():
        moved = -(np.asarray(value) + decay[name])
        if name.startswith("stacks"):
            singular = np.linalg.svd(moved[0], compute_uv=False)
            np.testing.assert_allclose(singular, 0.18 * 8**0.5, rtol=0.01)
        else:
            # An epsilon of 1e-20 does not slow the smallest gradients.
            np.testing.assert_allclose(moved, np.sign(g[name]), rtol=1e-3)
