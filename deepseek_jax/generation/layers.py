"""Layers one by one for decoding: a scan over stacked layers copies each layer's weights in every step."""

import jax
import numpy as np
from flax import nnx

from deepseek_jax.model.transformer import Transformer


def unstacked(model: Transformer) -> Transformer:
    """The same model with every layer a stack of its own, which `Transformer` runs without a scan.

    On a CPU the new leaves share the old ones' memory (where a layer does not begin on a boundary of 64
    bytes they are copies): done once, outside jit. On an accelerator the model is returned as it is: there
    one compiled layer is better than many. A model whose stacks hold one layer each is returned as it is too.
    """
    device = next(iter(jax.tree.leaves(model)[0].devices()))
    sizes = [stack.attn_norm.weight.get_value().shape[0] for stack in model.stacks]
    if device.platform != "cpu" or all(size == 1 for size in sizes):
        return model
    leaves, structure = jax.tree.flatten(model)
    result = jax.tree.unflatten(structure, leaves)
    result.stacks = nnx.List(
        jax.tree.map(lambda a, i=i: jax.device_put(np.asarray(a)[i : i + 1], device), stack)
        for stack, size in zip(model.stacks, sizes, strict=True)
        for i in range(size)
    )
    return result
