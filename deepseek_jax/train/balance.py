"""Auxiliary-loss-free load balance: the router bias's update (2408.15664; V3 §2.1.2).

Suffixes: L MoE layers, E experts, P MTP modules.
"""

import jax
import jax.numpy as jnp

from deepseek_jax.core.params import RouterBias, map_variables


def update_router_bias(rest, load_LE: jax.Array, mtp_load_PE: jax.Array | None, speed: float | jax.Array):
    """``rest`` with every bias moved by ``speed`` towards balance: up where an expert got less than the mean.

    ``load_LE``, ``mtp_load_PE``: counts over the *global* batch (`Output.aux.load`, `Output.mtp_aux.load`); None
    for MTP leaves those biases. Called once an optimizer step, after it. Pure.
    """
    first = 0
    starts = {}
    for number, stack in enumerate(rest.stacks):
        if hasattr(stack.ffn, "router"):
            starts[number] = first
            first += stack.ffn.router.bias.get_value().shape[0]
    if load_LE.shape[0] != first:
        raise ValueError(f"the model has {first} MoE layers, the load {load_LE.shape[0]}.")

    def move(path, variable):
        if not isinstance(variable, RouterBias):
            return variable
        bias = variable.get_value()
        if path[0] == "mtp":
            if mtp_load_PE is None:
                return variable
            load = mtp_load_PE[path[1]]
        else:
            start = starts[path[1]]
            load = load_LE[start : start + bias.shape[0]]
        load = load.astype(jnp.float32)
        return variable.replace(bias + speed * jnp.sign(load.mean(-1, keepdims=True) - load))

    return map_variables(move, rest)


def max_violation(load_LE: jax.Array) -> jax.Array:
    """float32 [L]: (largest load - mean load) / mean load (2408.15664 §4.1); 0 is perfect balance."""
    load = load_LE.astype(jnp.float32)
    mean = load.mean(-1)
    return (load.max(-1) - mean) / jnp.maximum(mean, 1e-9)
