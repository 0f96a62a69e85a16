"""Parameters and what is said of them where they are made, which Flax's variable metadata hold.

Modules are NNX modules used as plain pytrees: they go through jit, grad, scan and vmap as they are.
"""

import zlib
from dataclasses import dataclass
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx

from deepseek_jax.core.bits import Bits
from deepseek_jax.core.quant import Quantized

Tree = TypeVar("Tree")


class RouterState(nnx.Variable):
    """What a router has that is no parameter: never differentiated, decayed, cast or counted as one."""


class RouterBias(RouterState):
    """A router's selection bias: state of the load balance, float32."""


class HashTable(RouterState):
    """The experts of every token of the vocabulary, int32: a router's fixed choice (V4 §2.1)."""


class Adapter(nnx.Param):
    """A matrix of a low-rank adapter (`core.lowrank.LowRank`): what is trained in a model that has any."""


# An axis along which each index has values of its own: the first 8 of 16 experts are those of a model with 8.
DRAWN_EACH = ("expert", "scores")


@dataclass(frozen=True)
class Matrix:
    """What a parameter's axes are, each counted from the end, so that stacked layers may stand in front.

    ``inputs``, ``outputs``: of the linear map; several are one axis of the published matrix, row-major (heads and
    their dimensions). ``apart``: number separate matrices: experts in front, gate and up between inputs and outputs. A
    vector (a gain, a bias) has outputs only.
    """

    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    apart: tuple[int, ...] = ()

    @property
    def front(self) -> tuple[int, ...]:
        """The axes of ``apart`` that stand before the inputs."""
        return tuple(a for a in self.apart if a not in self.between)

    @property
    def between(self) -> tuple[int, ...]:
        """The axes of ``apart`` that stand between inputs and outputs."""
        return tuple(a for a in self.apart if self.inputs and a > self.inputs[-1])


def param(
    dtype,
    shape: tuple[int, ...],
    axes: tuple[str | None, ...],
    *,
    inputs: int,
    apart: tuple[int, ...] = (),
    decay: bool | None = None,
) -> nnx.Param:
    """A parameter, zero until `drawn` gives a linear map values by its name.

    ``axes``: a logical name for each axis, which says how it is split over a mesh (`core.layout`). ``inputs``: how many
    axes, from the first on, are the map's inputs; those after them are its outputs. 0: a vector. ``apart``: which axes
    number separate published matrices, and are neither. ``decay``: whether weight decay moves it; a map's does unless
    this says otherwise, a vector has to say it.

    Raises ValueError for axes that are out of this order, and for a vector that does not say whether it decays.
    """
    return nnx.Param(jnp.zeros(shape, dtype), **declared(axes, inputs, apart, decay))


def gain(dtype, size: int, axis: str) -> nnx.Param:
    """A norm's weight, ones; it does not decay."""
    return nnx.Param(jnp.ones((size,), dtype), **declared((axis,), 0, decay=False))


def declared(
    axes: tuple[str | None, ...], inputs: int, apart: tuple[int, ...] = (), decay: bool | None = None
) -> dict[str, Any]:
    """The metadata of a parameter, as `param` takes it: ``axes``, ``matrix``, ``decay``."""
    own = [a for a in range(len(axes)) if a not in apart]
    if not 0 <= inputs < len(own):
        raise ValueError(f"a parameter with axes {axes}, {apart} of them apart, cannot have {inputs} inputs.")
    matrix = Matrix(*(tuple(a - len(axes) for a in group) for group in (own[:inputs], own[inputs:], apart)))
    if matrix.front + matrix.inputs + matrix.between + matrix.outputs != tuple(range(-len(axes), 0)):
        raise ValueError(f"of a parameter with axes {axes}, {apart} stand neither in front nor after the inputs.")
    if decay is None and not inputs:
        raise ValueError(
            f"a parameter with axes {axes} and no inputs has to say whether it decays; a bias: decay=False."
        )
    return {"axes": axes, "matrix": matrix, "decay": decay is None or decay}


def matrix_of(variable: nnx.Variable, name: str = "a parameter") -> Matrix:
    """What `param` was told of a variable's axes. Raises ValueError for one that it was told nothing of."""
    return _declaration(variable, name, "matrix")


def decays(variable: nnx.Variable, name: str = "a parameter") -> bool:
    """Whether weight decay moves a parameter. Raises ValueError for one that does not say it."""
    return _declaration(variable, name, "decay")


def is_looked_up(variable: nnx.Variable) -> bool:
    """Whether a map's inputs are tokens, or places in a window, whose rows are looked up: an embedding, a table."""
    inputs = matrix_of(variable).inputs
    return bool(inputs) and variable.get_metadata()["axes"][inputs[0]] in ("vocab", "place", "token")


def _declaration(variable: nnx.Variable, name: str, what: str):
    metadata = variable.get_metadata()
    if what not in metadata:
        raise ValueError(
            f"{name} does not say which of its axes are inputs, nor whether it decays: make it with "
            "core.params.param(..., inputs=..., decay=...)."
        )
    return metadata[what]


def drawn(matrix: nnx.Param, key: jax.Array, name: str, std: float, layers: jax.Array | None = None) -> nnx.Param:
    """The matrix with values from N(0, std**2) that follow from ``key``, ``name`` and its own shape alone.

    ``layers``: int [L], of a matrix [L, ...] stacked over layers: each layer's values follow from its number, and each
    expert's from the expert's. So models have equal values in all that they share, whatever else they have.
    """
    axes, dtype, shape = matrix.get_metadata()["axes"], matrix.get_value().dtype, matrix.get_value().shape
    each = next((i for i, axis in enumerate(axes) if axis in DRAWN_EACH), None)
    # Not `hash`, which differs from process to process.
    key = jax.random.fold_in(key, zlib.crc32(name.encode()))

    def normal(key, shape):
        # Drawn in float32: a bfloat16 draw has 128 different values only.
        return (jax.random.normal(key, shape, jnp.float32) * std).astype(dtype)

    def layer(key):
        own = shape[len(shape) - len(axes) :]
        if each is None:
            return normal(key, own)
        part = (*own[:each], *own[each + 1 :])
        one = jax.vmap(lambda i: normal(jax.random.fold_in(key, i), part), out_axes=each)
        return one(jnp.arange(own[each]))

    if layers is None:
        return matrix.replace(layer(key))
    return matrix.replace(jax.vmap(lambda number: layer(jax.random.fold_in(key, number)))(layers))


def router_bias(n_experts: int) -> RouterBias:
    return RouterBias(jnp.zeros((n_experts,), jnp.float32), **declared(("scores",), 0, decay=False))


def hash_table(vocab_size: int, top_k: int, n_experts: int) -> HashTable:
    """int32 [V, K] experts, zero until `drawn_table`; whole on every device of a mesh."""
    zeros = jnp.zeros((vocab_size, top_k), jnp.int32)
    return HashTable(zeros, n_experts=n_experts, **declared(("token", None), 1, decay=False))


def drawn_table(table: HashTable, key: jax.Array, name: str, layers: jax.Array) -> HashTable:
    """The table [L, V, K] with random experts that follow from ``key``, ``name`` and each layer's number; ``layers``:
    int [L].

    A token's experts are K different ones, and of each run of as many ids as there are experts, from 0 on, every expert
    has K: the i-th id of a run has those at i + o_1, ..., i + o_K of a random order of the experts, from whose end it
    goes on at the front; the o are K different random numbers. A run has its own order and o.
    """
    (vocab_size, K), E = table.get_value().shape[-2:], table.get_metadata()["n_experts"]
    key = jax.random.fold_in(key, zlib.crc32(name.encode()))

    def run(key):
        order, offset = (jax.random.permutation(each, E) for each in jax.random.split(key))
        return order[(jnp.arange(E)[:, None] + offset[:K]) % E]

    def layer(number):
        own = jax.random.fold_in(key, number)
        runs = jax.vmap(lambda i: run(jax.random.fold_in(own, i)))(jnp.arange(-(-vocab_size // E)))
        return runs.reshape(-1, K)[:vocab_size].astype(jnp.int32)

    return table.replace(jax.vmap(layer)(layers))


def is_variable(x) -> bool:
    return isinstance(x, nnx.Variable)


def is_trained(x) -> bool:
    """Whether a variable is a parameter that gradients reach: not a router's state, not a quantised leaf."""
    return isinstance(x, nnx.Param) and not isinstance(x.get_value(), Quantized | Bits)


def has_adapters(model) -> bool:
    return any(isinstance(v, Adapter) for v in variables(model))


def stacked_layers(variable: nnx.Variable) -> int:
    """How many layers a leaf stacks: the size of the axis in front of its own ones, 0 without one."""
    value, axes = variable.get_value(), variable.get_metadata()["axes"]
    return value.shape[0] if len(value.shape) > len(axes) else 0


def map_variables(f, model: Tree, *others: Tree) -> Tree:
    """``f(path, variable, *other_variables)`` for every variable; a path is a tuple of names and numbers."""

    def call(path, *variables):
        return f(tuple(getattr(p, "name", getattr(p, "key", getattr(p, "idx", None))) for p in path), *variables)

    return jax.tree_util.tree_map_with_path(call, model, *others, is_leaf=is_variable)


def variables(model) -> list[nnx.Variable]:
    return [v for v in jax.tree.leaves(model, is_leaf=is_variable) if is_variable(v)]


def unstack(module: Tree, layer: int) -> Tree:
    """One layer of a stacked module."""
    return jax.tree.map(lambda a: a[layer], module)


def parameter_dtype(model) -> jnp.dtype:
    """The dtype of the first parameter that is not quantised."""
    values = (v.get_value() for v in variables(model) if isinstance(v, nnx.Param))
    return next(value.dtype for value in values if not isinstance(value, Quantized))


def named_variables(params) -> dict[str, nnx.Variable]:
    """Every variable under its dotted path (``stacks.1.attn.q_a``)."""
    found = {}
    map_variables(lambda path, v: found.update({".".join(map(str, path)): v}), params)
    return found


def named(params) -> dict[str, jax.Array]:
    """Every variable's value under its dotted path; what optimizers work on."""
    return {name: v.get_value() for name, v in named_variables(params).items()}


def renamed(params: Tree, values: dict[str, jax.Array]) -> Tree:
    """``params`` with the values of `named`."""
    return map_variables(lambda path, v: v.replace(values[".".join(map(str, path))]), params)
