"""Muon as DeepSeek-V4 uses it (2606.19348): the momentum of a matrix, orthogonalised, as its step.

Suffixes: n rows, m columns of a matrix; any axes in front are separate matrices.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from deepseek_jax.core.params import Matrix
from deepseek_jax.train.norms import scaled

# X <- a X + b (X X^T) X + c (X X^T)^2 X: eight rounds that bring every singular value near 1 fast, two that end there.
FAST, EXACT = (3.4445, -4.7750, 2.0315), (2.0, -1.5, 0.5)
ROUNDS = (FAST,) * 8 + (EXACT,) * 2


def matrices(x: jax.Array, form: Matrix) -> jax.Array:
    """[..., n, m]: the matrices of an array, inputs by outputs; what numbers them stands in front, in its order."""
    order, shape = _order(x.shape, form)
    return x.transpose(order).reshape(shape)


def restore(x_nm: jax.Array, form: Matrix, shape: tuple[int, ...]) -> jax.Array:
    """The array of ``shape`` whose `matrices` these are."""
    order, _ = _order(shape, form)
    back = sorted(range(len(order)), key=order.__getitem__)
    return x_nm.reshape([shape[a] for a in order]).transpose(back)


def _order(shape: tuple[int, ...], form: Matrix) -> tuple[list[int], list[int]]:
    rows, columns = ([len(shape) + a for a in group] for group in (form.inputs, form.outputs))
    front = [a for a in range(len(shape)) if a not in rows + columns]
    n, m = (math.prod(shape[a] for a in group) for group in (rows, columns))
    return front + rows + columns, [*(shape[a] for a in front), n, m]


def orthogonalised(x_nm: jax.Array) -> jax.Array:
    """float32 [..., n, m]: the nearest matrix with singular values 1, by hybrid Newton-Schulz iterations.

    Singular values of x under about 1e-3 of its Frobenius norm end below 1; the size of x does not matter. Zero gives
    zero, and so does a matrix whose entries all lie below 1.2e-38; entries that are not finite give NaN.
    """
    tall = x_nm.shape[-2] > x_nm.shape[-1]
    x = x_nm.astype(jnp.float32)
    x = x.mT if tall else x
    x, _ = scaled(x, (-2, -1))
    # The Frobenius norm, now about 1 or more of any matrix but zero, bounds the largest singular value.
    x = x / jnp.maximum(jnp.sqrt(jnp.square(x).sum((-2, -1), keepdims=True)), 0.5)

    def iterate(x, coefficients):
        a, b, c = coefficients
        gram = x @ x.mT
        return a * x + (b * gram + c * gram @ gram) @ x, None

    x, _ = jax.lax.scan(iterate, x, jnp.asarray(ROUNDS, jnp.float32))
    return x.mT if tall else x


class MuonState(NamedTuple):
    """``momentum``: float32, by parameter."""

    momentum: dict[str, jax.Array]


def scale_by_muon(forms: dict[str, Matrix], momentum: float, update_rms: float) -> optax.GradientTransformation:
    """The orthogonalised Nesterov momentum of named matrices, with root mean square ``update_rms``.

    M <- momentum M + G; the update is O(momentum M + G) * sqrt(max(n, m)) * update_rms. ``forms``: name -> the matrices
    within that parameter, each of which is orthogonalised by itself.
    """

    def init(params):
        return MuonState({name: jnp.zeros(params[name].shape, jnp.float32) for name in forms})

    def update(gradients, state, params=None):
        held, updates = {}, dict(gradients)
        for name, form in forms.items():
            g = gradients[name].astype(jnp.float32)
            held[name] = momentum * state.momentum[name] + g
            x_nm = matrices(momentum * held[name] + g, form)
            scale = update_rms * max(x_nm.shape[-2:]) ** 0.5
            updates[name] = restore(scale * orthogonalised(x_nm), form, g.shape)
        return updates, MuonState(held)

    return optax.GradientTransformation(init, update)
