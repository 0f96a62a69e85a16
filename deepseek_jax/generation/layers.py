"""Layers one by one for decoding: a scan over stacked layers copies each layer's weights in every step."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from deepseek_jax.core.bits import Bits
from deepseek_jax.core.context import DEFAULT, Context
from deepseek_jax.core.params import Adapter, is_variable, matrix_of
from deepseek_jax.core.quant import Quantized
from deepseek_jax.model.mla import MLA, Absorbed
from deepseek_jax.model.transformer import Transformer


def unstacked(model: Transformer, dtype, ctx: Context = DEFAULT) -> Transformer:
    """The same model with every layer a stack of its own, which `Transformer` runs without a scan, and with the
    maps of absorbed attention in ``dtype``, laid out for it (a step would otherwise transpose every kv_b again).

    On a CPU bfloat16 maps become `Bits`, and FP8 ones their bits (`Quantized.with_bits`). The new leaves share the old
    ones' memory (where a layer does not begin on a boundary of 64 bytes they are copies): done once, outside jit. On an
    accelerator the model is returned as it is: there one compiled layer is better than many. So is a model that this
    function has made, and one on a mesh.
    """
    if ctx.mesh is not None:
        return model
    device = next(iter(jax.tree.leaves(model)[0].devices()))
    if device.platform != "cpu" or _is_prepared(model):
        return model
    leaves, structure = jax.tree.flatten(model)
    result = jax.tree.unflatten(structure, leaves)
    where = {
        number: (stack, i)
        for stack, kind in zip(model.stacks, model.cfg.stacks, strict=True)
        for i, number in enumerate(kind.numbers)
    }
    result.stacks = nnx.List(
        jax.tree.map(lambda a, i=i: jax.device_put(np.asarray(a)[i : i + 1], device), stack)
        for stack, i in (where[number] for number in range(model.cfg.n_layers))
    )
    for stack in result.stacks:
        if isinstance(stack.attn, MLA):
            stack.attn.kv_b = nnx.data(replace(_maps(stack.attn, dtype), whole=stack.attn.kv_b))
    return jax.tree.map(_as_bits, result, is_leaf=is_variable)


def _as_bits(leaf):
    """A bfloat16 map as `Bits`, be it a parameter or made of one, and FP8 values as theirs; all else as it is, adapters
    too: they are thin."""
    if not is_variable(leaf):
        return Bits.of(leaf) if leaf.dtype == jnp.bfloat16 else leaf
    value = leaf.get_value()
    if isinstance(value, Quantized):
        return leaf.replace(value.with_bits())
    held_so = isinstance(value, jax.Array) and value.dtype == jnp.bfloat16 and not isinstance(leaf, Adapter)
    return leaf.replace(Bits.of(value)) if held_so and matrix_of(leaf).inputs else leaf


def _is_prepared(model: Transformer) -> bool:
    attention = [stack.attn for stack in model.stacks]
    return len(attention) == model.cfg.n_layers and not any(
        isinstance(a, MLA) and not isinstance(a.kv_b, Absorbed) for a in attention
    )


@partial(jax.jit, static_argnames="dtype")
def _maps(attention, dtype) -> Absorbed:
    return jax.vmap(lambda layer: replace(layer.absorbed(dtype), whole=None))(attention)
