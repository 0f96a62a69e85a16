"""One training step as a pure function."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax

from deepseek_jax.core.context import Context
from deepseek_jax.core.params import combine, named, partition, renamed
from deepseek_jax.model.transformer import Transformer
from deepseek_jax.train.balance import max_violation, update_router_bias
from deepseek_jax.train.loss import loss
from deepseek_jax.train.recipe import LossWeights


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class State:
    """Trained parameters, the rest of the model (router biases), the optimizer's state and the step count."""

    params: Any
    rest: Any
    opt_state: Any
    step: jax.Array

    @property
    def model(self) -> Transformer:
        return combine(self.params, self.rest)


def start(model: Transformer, optimizer: optax.GradientTransformation) -> State:
    params, rest = partition(model)
    return State(params, rest, optimizer.init(named(params)), jnp.zeros((), jnp.int32))


def train_step(
    state: State,
    batch: dict[str, jax.Array],
    bias_speed: float | jax.Array,
    *,
    optimizer: optax.GradientTransformation,
    weights: LossWeights,
    ctx: Context,
) -> tuple[State, dict[str, jax.Array]]:
    """Gradient, optimizer update, then the router bias from this batch's counts; returns the next state and metrics.

    ``metrics``: scalars "loss", "main", "mtp", "balance" (nats), "grad_norm"; float32 [L] "max_violation"; int32
    [L, E] "load".
    """

    def objective(params):
        return loss(combine(params, state.rest), batch, weights, ctx)

    (total, out), gradients = jax.value_and_grad(objective, has_aux=True)(state.params)
    gradients, values = named(gradients), named(state.params)
    updates, opt_state = optimizer.update(gradients, state.opt_state, values)
    params = renamed(state.params, optax.apply_updates(values, updates))
    metrics = {"loss": total, **out.losses, "grad_norm": optax.tree.norm(gradients)}
    rest = state.rest
    if out.aux is not None:
        rest = update_router_bias(rest, out.aux.load, out.mtp_aux.load if out.mtp_aux else None, bias_speed)
        metrics |= {"max_violation": max_violation(out.aux.load), "load": out.aux.load}
    return State(params, rest, opt_state, state.step + 1), metrics
