"""Products of two arrays, and of an array and a weight, on one device: dtype and accumulation are fixed here."""

from functools import partial

import jax
import jax.numpy as jnp

from deepseek_jax.core.bits import Bits, tiled_product
from deepseek_jax.core.lowrank import LowRank, dense, held


@partial(jax.custom_vjp, nondiff_argnums=(0, 3))
def product(equation: str, a: jax.Array, b: jax.Array, precision=None) -> jax.Array:
    """float32 ``einsum(equation, a, b)`` of operands of one dtype; no letter stands in one of its three terms only.

    The backward pass multiplies in the operands' dtype as well. JAX's own rule would multiply the float32 cotangent
    by a bfloat16 operand: a float32 product, several times slower on an accelerator.
    """
    terms, out = equation.split("->")
    of_a, of_b = terms.split(",")
    # Letters of all three terms first, a's before b's: of another order JAX multiplies b by a and turns what comes out,
    # which of the few rows of a decoding step takes a CPU three times as long.
    shared = [letter for letter in out if letter in of_a and letter in of_b]
    apart = "".join([*shared, *(letter for letter in out if letter not in shared)])
    y = jnp.einsum(f"{terms}->{apart}", a, b, precision=precision, preferred_element_type=jnp.float32)
    return y if apart == out else y.transpose([apart.index(letter) for letter in out])


def _forward(equation, a, b, precision):
    return product(equation, a, b, precision), (a, b)


def _backward(equation, precision, operands, dy):
    a, b = operands
    return tuple(cotangents(equation, a, b, dy.astype(a.dtype), precision))


product.defvjp(_forward, _backward)


def cotangents(equation: str, a, b, dy, precision):
    """Those of a and of b, for dy in their dtype."""
    inputs, out = equation.split("->")
    of_a, of_b = inputs.split(",")
    back = partial(jnp.einsum, precision=precision, preferred_element_type=jnp.float32)
    yield back(f"{out},{of_b}->{of_a}", dy, b).astype(a.dtype)
    yield back(f"{of_a},{out}->{of_b}", a, dy).astype(b.dtype)


def product_of_weight(equation: str, x: jax.Array, w, precision=None) -> jax.Array:
    """float32 `product` of x and a weight of any kind, whole: dequantised, from its bits, or with its adapter."""
    w = held(w)
    if isinstance(w, LowRank):
        whole = product_of_weight(equation, x, w.base, precision)
        return whole + w.scale * _adapted(equation, x, w, precision)
    if isinstance(w, Bits):
        return tiled_product(equation, x, w)
    return product(equation, x, dense(w, x.dtype), precision)


def _adapted(equation: str, x: jax.Array, w: LowRank, precision) -> jax.Array:
    """float32 ``x a b``: the map of an adapter before its factor, through the rank's few dimensions."""
    terms, out = equation.split("->")
    of_x, of_w = terms.split(",")
    inputs, split, outputs = of_w[: w.inputs], of_w[w.inputs : -w.outputs], of_w[-w.outputs :]
    thin = "".join(letter for letter in of_x if letter not in inputs) + split + "r"
    down = product(f"{of_x},{inputs}{split}r->{thin}", x, w.a.astype(x.dtype), precision).astype(x.dtype)
    return product(f"{thin},{split}r{outputs}->{out}", down, w.b.astype(x.dtype), precision)
