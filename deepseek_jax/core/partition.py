"""What of a model is trained: parts of its tree, apart for gradients and optimizers, and together again."""

from collections.abc import Callable, Sequence
from itertools import groupby
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from deepseek_jax.core.params import Adapter, has_adapters, is_trained, is_variable, map_variables, stacked_layers

Tree = TypeVar("Tree")
Trained = Callable[[str], bool | Sequence[int]]


def partition(model: Tree, trained: Trained | None = None) -> tuple[Tree, Tree]:
    """Splits a model into trained parameters and the rest (routers' state, quantised leaves, what is frozen).

    Both have the model's structure, with None where a variable went to the other; `combine` joins them.

    ``trained``: says of a parameter's dotted path (``stacks.1.ffn.router.weight``) whether it is trained, or which of
    its layers are: indices along the leading axis of a stacked leaf, each layer once. Such a leaf is in both parts,
    its trained layers in the first and the others in the second, so that no optimizer can move what is frozen; see
    `train.patterns.select` for patterns. None: every parameter, or the adapters alone in a model that has adapters.

    Raises ValueError when ``trained`` asks for a quantised leaf, or for layers that a leaf does not have.
    """
    if trained is None:
        kind = Adapter if has_adapters(model) else nnx.Param
        return _split(model, lambda path, v: isinstance(v, kind) and is_trained(v))

    def chosen(path, v) -> bool | tuple[int, ...]:
        name = ".".join(map(str, path))
        layers = trained(name) if isinstance(v, nnx.Param) else False
        if layers is False or (not isinstance(layers, bool) and len(layers) == 0):
            return False
        if not is_trained(v):
            raise ValueError(f"{name} is quantised and takes no gradients: load it with a dtype, or use LoRA.")
        if layers is True:
            return True
        size = stacked_layers(v)
        layers = tuple(sorted(int(i) for i in layers))
        if len(set(layers)) < len(layers) or not all(0 <= i < size for i in layers):
            raise ValueError(f"{name} has {size} stacked layers; {list(layers)} are not among them, each once.")
        return layers if len(layers) < size else True

    return _split(model, chosen)


def _split(model: Tree, chosen) -> tuple[Tree, Tree]:
    def part(path, v, wanted: bool):
        layers = chosen(path, v)
        if isinstance(layers, bool):
            return v if layers == wanted else None
        value = v.get_value()
        if wanted:
            return v.replace(value[np.asarray(layers)], layers=layers)
        return v.replace(value[np.setdiff1d(np.arange(len(value)), layers)])

    params, rest = (map_variables(lambda path, v, w=w: part(path, v, w), model) for w in (True, False))
    return params, rest


def combine(params: Tree, rest: Tree) -> Tree:
    """The model whose `partition` these two are."""

    def join(a, b):
        if a is None or b is None:
            return b if a is None else a
        return b.replace(_interleave(a.get_value(), b.get_value(), a.get_metadata()["layers"]))

    return jax.tree.map(join, params, rest, is_leaf=lambda x: x is None or is_variable(x))


def trained_layers(params) -> dict[str, tuple[int, ...]]:
    """Of a `partition`'s trained parameters, those of which only some layers are: dotted path -> the layers."""
    found = {}

    def note(path, v):
        if "layers" in v.get_metadata():
            found[".".join(map(str, path))] = v.get_metadata()["layers"]

    map_variables(note, params)
    return found


def _interleave(some: jax.Array, others: jax.Array, layers: tuple[int, ...]) -> jax.Array:
    """The stack whose ``layers`` are ``some``, in runs: a slice costs less than a gather."""
    parts, first = [], [0, 0]
    for trained, run in groupby(range(len(some) + len(others)), key=set(layers).__contains__):
        size, start = len(list(run)), first[trained]
        parts.append((others, some)[trained][start : start + size])
        first[trained] += size
    return jnp.concatenate(parts)
