"""Parameters and their logical axes; the only file that touches Flax's variable metadata.

Modules are NNX modules used as plain pytrees: they go through jit, grad, scan and vmap as they are.
"""

from dataclasses import dataclass, field
from typing import TypeVar

import jax
import jax.numpy as jnp
from flax import nnx

from deepseek_jax.core.quant import Quantized

Tree = TypeVar("Tree")


class RouterBias(nnx.Variable):
    """A router's selection bias: state of the load balance, float32, never differentiated or decayed."""


@dataclass
class Init:
    """What a module needs to make its parameters: a random key, the standard deviation and the dtype."""

    key: jax.Array
    std: float
    dtype: jnp.dtype
    used: int = field(default=0)

    def next_key(self) -> jax.Array:
        self.used += 1
        return jax.random.fold_in(self.key, self.used)


def param(init: Init, shape: tuple[int, ...], axes: tuple[str | None, ...]) -> nnx.Param:
    """A matrix drawn from N(0, std**2), with a logical name for each axis."""
    # Drawn in float32: a bfloat16 draw has 128 different values only.
    value = jax.random.normal(init.next_key(), shape, jnp.float32) * init.std
    return nnx.Param(value.astype(init.dtype), axes=axes)


def gain(init: Init, size: int, axis: str) -> nnx.Param:
    """A norm's weight, ones."""
    return nnx.Param(jnp.ones((size,), init.dtype), axes=(axis,))


def router_bias(n_experts: int) -> RouterBias:
    return RouterBias(jnp.zeros((n_experts,), jnp.float32), axes=("expert",))


def is_variable(x) -> bool:
    return isinstance(x, nnx.Variable)


def is_trained(x) -> bool:
    """Whether a variable is a parameter that gradients reach: not a router bias, not a quantised leaf."""
    return isinstance(x, nnx.Param) and not isinstance(x.get_value(), Quantized)


def partition(model: Tree) -> tuple[Tree, Tree]:
    """Splits a model into trained parameters and the rest (router biases, quantised leaves).

    Both have the model's structure, with None where a variable went to the other; `combine` joins them.
    """
    params = jax.tree.map(lambda v: v if is_trained(v) else None, model, is_leaf=is_variable)
    rest = jax.tree.map(lambda v: None if is_trained(v) else v, model, is_leaf=is_variable)
    return params, rest


def combine(params: Tree, rest: Tree) -> Tree:
    """The model whose `partition` these two are."""
    return jax.tree.map(lambda a, b: b if a is None else a, params, rest, is_leaf=lambda x: x is None or is_variable(x))


def map_variables(f, model: Tree, *others: Tree) -> Tree:
    """``f(path, variable, *other_variables)`` for every variable; a path is a tuple of names and numbers."""

    def call(path, *variables):
        return f(tuple(getattr(p, "name", getattr(p, "key", getattr(p, "idx", None))) for p in path), *variables)

    return jax.tree_util.tree_map_with_path(call, model, *others, is_leaf=is_variable)


def unstack(module: Tree, layer: int) -> Tree:
    """One layer of a stacked module."""
    return jax.tree.map(lambda a: a[layer], module)


def parameter_dtype(model) -> jnp.dtype:
    """The dtype of the first floating-point leaf that is not quantised."""
    return next(v.get_value().dtype for v in jax.tree.leaves(model, is_leaf=is_variable) if is_trained(v))


def named(params) -> dict[str, jax.Array]:
    """Every variable's value under its dotted path (``stacks.1.attn.q_a``); what optimizers work on."""
    values = {}
    map_variables(lambda path, v: values.update({".".join(map(str, path)): v.get_value()}), params)
    return values


def renamed(params: Tree, values: dict[str, jax.Array]) -> Tree:
    """``params`` with the values of `named`."""
    return map_variables(lambda path, v: v.replace(values[".".join(map(str, path))]), params)
