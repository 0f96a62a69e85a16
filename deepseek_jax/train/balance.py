"""Auxiliary-loss-free load balance: the router bias's update (2408.15664; V3 §2.1.2).

Suffixes: L MoE layers, E experts, P MTP modules.
"""

import jax
import jax.numpy as jnp
import numpy as np

from deepseek_jax.configs.schema import ModelConfig
from deepseek_jax.core.params import RouterBias, map_variables
from deepseek_jax.core.partition import Trained
from deepseek_jax.train.recipe import BIAS_RULES


def update_router_bias(
    rest,
    load: jax.Array,
    mtp_load: jax.Array | None,
    speed: float | jax.Array,
    moved: Trained | None = None,
    rule: str = "sign",
    centred: bool = False,
):
    """``rest`` with every bias moved by ``speed`` towards balance: up where an expert got less than the mean.

    ``load``, ``mtp_load``: int [L, E] and [P, E], counts over the *global* batch (`Output.aux.load` and
    `Output.mtp_aux.load`); None for MTP leaves those biases. ``moved``: says of a bias's dotted path whether it moves,
    or which of its stacked layers do; None: all. ``rule``: "sign", by the speed (algorithm 1), or "proportional", by
    the speed times (mean - load) / mean (table 3). ``centred``: without the step's mean over the experts, as torchtitan
    has it, so that the biases' mean stays; what is chosen does not change by that. A router without a bias stays as
    it is. Called once an optimizer step, after it. Pure.

    Raises ValueError for loads of other routers than the model's, or an unknown rule.
    """
    if rule not in BIAS_RULES:
        raise ValueError(f"rule must be one of {', '.join(BIAS_RULES)}, not {rule!r}.")
    n_experts = rest.cfg.moe.n_experts if rest.cfg.moe else 0
    for name, counts, layers in (("load", load, rest.cfg.n_moe_layers), ("mtp_load", mtp_load, len(rest.mtp))):
        if counts is not None and jnp.shape(counts) != (layers, n_experts):
            raise ValueError(
                f"{name} must have shape {(layers, n_experts)}, a row a router; it has {jnp.shape(counts)}."
            )
    load, mtp_load = jnp.asarray(load), None if mtp_load is None else jnp.asarray(mtp_load)

    def move(path, variable):
        if not isinstance(variable, RouterBias) or (path[0] == "mtp" and mtp_load is None):
            return variable
        layers = True if moved is None else moved(".".join(map(str, path)))
        if layers is False:
            return variable
        bias = variable.get_value()
        if path[0] == "mtp":
            counts = mtp_load[path[1]]
        else:
            counts = load[_rows(rest.cfg, path[1])]
        counts = counts.astype(jnp.float32)
        new = bias + speed * _direction(counts, rule, centred)
        if layers is not True:
            chosen = np.isin(np.arange(len(bias)), layers)
            new = jnp.where(chosen[:, None], new, bias)
        return variable.replace(new)

    return map_variables(move, rest)


def _rows(cfg: ModelConfig, stack: int) -> slice:
    """The rows of a stack's layers in statistics, a row an MoE layer: two stacks' layers may alternate."""
    numbers, first = cfg.stacks[stack].numbers, cfg.n_dense_layers
    return slice(numbers.start - first, numbers.stop - first, numbers.step)


def _direction(counts: jax.Array, rule: str, centred: bool) -> jax.Array:
    """float32 [..., E]: a step of speed 1, from loads [..., E]."""
    mean = counts.mean(-1, keepdims=True)
    error = mean - counts
    step = jnp.sign(error) if rule == "sign" else error / jnp.maximum(mean, 1e-9)
    return step - step.mean(-1, keepdims=True) if centred else step


def max_violation(load_LE: jax.Array) -> jax.Array:
    """float32 [L]: (largest load - mean load) / mean load (2408.15664 §4.1); 0 is perfect balance."""
    load = load_LE.astype(jnp.float32)
    mean = load.mean(-1)
    return (load.max(-1) - mean) / jnp.maximum(mean, 1e-9)


def routing_entropy(load_LE: jax.Array) -> jax.Array:
    """float32 [L]: entropy in nats of the experts' shares of the load; log(E) is perfect balance."""
    load = load_LE.astype(jnp.float32)
    share = load / jnp.maximum(load.sum(-1, keepdims=True), 1.0)
    return -jnp.where(share > 0, share * jnp.log(jnp.maximum(share, 1e-30)), 0).sum(-1)


def router_bias(rest) -> jax.Array:
    """float32 [L, E]: the selection biases of the model's MoE layers, 0 where a router has none; without those of its
    MTP modules."""
    found, numbers = [], []
    for stack, kind in zip(rest.stacks, rest.cfg.stacks, strict=True):
        if kind.layer.is_moe:
            bias = stack.ffn.router.bias
            none = jnp.zeros((len(kind.numbers), rest.cfg.moe.n_experts))
            found.append(none if bias is None else bias.get_value())
            numbers += kind.numbers
    rows = jnp.concatenate(found)
    return rows if numbers == sorted(numbers) else rows[np.argsort(numbers)]
