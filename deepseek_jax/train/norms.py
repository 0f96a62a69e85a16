"""What a step looks at in its gradients and its update: norms by layer, and the first entry that is not finite.

A part is a layer of a stacked parameter, named as `train.patterns` names it (``layers.3.attn.q_a``), or a whole one.
"""

from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

from deepseek_jax.core.params import named
from deepseek_jax.core.partition import trained_layers
from deepseek_jax.model.transformer import Transformer

# Accelerators, and XLA on the CPU, take smaller magnitudes for 0.
SMALLEST = np.finfo(np.float32).tiny


def scaled(x: jax.Array, axes: tuple[int, ...] | None = None) -> tuple[jax.Array, jax.Array]:
    """x over its largest magnitude along ``axes``, so that squares neither vanish nor overflow; and that one's root.

    Zero, and what has entries that are not finite, stays as it is, with a root of 1.
    """
    largest = jnp.abs(x).max(axes, keepdims=True)
    largest = jnp.where((largest >= SMALLEST) & jnp.isfinite(largest), largest, 1)
    # Twice by the root: a compiler makes a division by the magnitude a product with its inverse, which may vanish.
    inverse_root = jax.lax.rsqrt(largest)
    return x * inverse_root * inverse_root, jnp.sqrt(largest)


def norm(x: jax.Array, axes: tuple[int, ...] | None = None) -> jax.Array:
    """float32: the root of the sum of squares over ``axes``, wherever float32 can hold it."""
    x, root = scaled(x.astype(jnp.float32), axes)
    return (jnp.sqrt(jnp.square(x).sum(axes, keepdims=True)) * root * root).squeeze(axes)


def parts(tree, model: Transformer, layers: dict[str, tuple[int, ...]] | None = None) -> Iterator[tuple]:
    """Of each floating-point array in a tree of parameters by name, such as an optimizer's state: the names of its
    parts, the array, and the axes within a part.

    ``layers``: of stacked parameters of which single layers are there, which ones (`core.partition.trained_layers`).
    """
    numbers = [stack.numbers for stack in model.cfg.stacks]
    for path, a in jax.tree_util.tree_leaves_with_path(tree):
        if not jnp.issubdtype(a.dtype, jnp.floating):
            continue
        keys = [p.key for p in path if isinstance(p, jax.tree_util.DictKey)]
        name = keys[-1] if keys else jax.tree_util.keystr(path)
        if name.startswith("stacks.") and a.ndim:
            _, stack, below = name.split(".", 2)
            there = (layers or {}).get(name, range(a.shape[0]))
            yield [f"layers.{numbers[int(stack)][i]}.{below}" for i in there], a, tuple(range(1, a.ndim))
        else:
            yield [name], a, tuple(range(a.ndim))


def gradient_norms(
    gradients: dict[str, jax.Array], model: Transformer, layers: dict[str, tuple[int, ...]] | None = None
) -> dict[str, jax.Array]:
    """float32 norms by group: "embed", "layer.0", ..., "mtp.0", ..., "head" (with the final norm)."""
    found: dict[str, list[jax.Array]] = {}
    for names, g, axes in parts(gradients, model, layers):
        for name, value in zip(names, jnp.atleast_1d(norm(g, axes)), strict=True):
            found.setdefault(_group(name), []).append(value)
    return {group: norm(jnp.stack(values)) for group, values in found.items()}


def _group(part: str) -> str:
    top, *below = part.split(".")
    if top in ("layers", "mtp"):
        return f"{top.removesuffix('s')}.{below[0]}"
    return "embed" if top == "embed" else "head"


def first_fault(tree, model: Transformer) -> jax.Array:
    """int32: the number, among the names of all `parts`, of the first that is not finite; -1 where there is none."""
    good = jnp.concatenate([jnp.atleast_1d(jnp.isfinite(a).all(axes)) for _, a, axes in parts(tree, model)])
    return jnp.where(good.all(), -1, jnp.argmin(good)).astype(jnp.int32)


def fault_names(state) -> dict[str, list[str]]:
    """What the numbers of `train_step`'s "fault" stand for in a `train.step.State`: of its gradient and its update."""
    model, layers = jax.eval_shape(lambda s: s.model, state), trained_layers(state.params)

    def names(tree) -> list[str]:
        return [name for found, _, _ in parts(tree, model, layers) for name in found]

    values = named(state.params)
    return {"gradient": names(values), "update": names((values, state.opt_state))}
