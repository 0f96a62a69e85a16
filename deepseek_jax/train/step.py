"""One training step as a pure function: micro-batches, gradient, guard, update, router bias, average.

Suffixes: A micro-batches, B rows, T tokens, L MoE layers, E experts.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax

from deepseek_jax.core.context import Context
from deepseek_jax.core.params import named, renamed
from deepseek_jax.core.partition import Trained, combine, partition, trained_layers
from deepseek_jax.model.transformer import Transformer
from deepseek_jax.train.balance import max_violation, router_bias, routing_entropy, update_router_bias
from deepseek_jax.train.loss import check_entries
from deepseek_jax.train.norms import first_fault, gradient_norms, norm
from deepseek_jax.train.objective import Knobs, Objective


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class State:
    """All that a step changes.

    ``params``: trained parameters. ``rest``: the other leaves of the model (router biases, quantised weights).
    ``opt_state``: the optimizer's. ``ema``: name -> float32, the parameters' moving average, or None. ``step``: int32,
    steps taken. ``skipped``: int32, the non-finite steps since the last good one.
    """

    params: Any
    rest: Any
    opt_state: Any
    ema: dict[str, jax.Array] | None
    step: jax.Array
    skipped: jax.Array

    @property
    def model(self) -> Transformer:
        return combine(self.params, self.rest)

    @property
    def averaged(self) -> Transformer:
        """The model with its averaged parameters, in the parameters' dtype; ValueError where none are kept."""
        if self.ema is None:
            raise ValueError("this state keeps no average of the parameters: start it with average=True.")
        values = {name: self.ema[name].astype(v.dtype) for name, v in named(self.params).items()}
        return combine(renamed(self.params, values), self.rest)


def start(
    model: Transformer, optimizer: optax.GradientTransformation, average: bool = False, trained: Trained | None = None
) -> State:
    """The state before the first step; ``average``: keep a moving average of the parameters; ``trained``: which of
    them are trained, as `core.partition.partition` takes it."""
    params, rest = partition(model, trained)
    values = named(params)
    ema = {name: jnp.array(v, jnp.float32) for name, v in values.items()} if average else None
    # Two arrays: a donated state must not hold one buffer twice.
    return State(params, rest, optimizer.init(values), ema, jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32))


def train_step(
    state: State,
    batch: dict[str, jax.Array],
    knobs: Knobs,
    *,
    optimizer: optax.GradientTransformation,
    objective: Objective,
    ctx: Context,
    clip: float = 1.0,
    ema_decay: float = 0.0,
    biases: Trained | None = None,
    bias_rule: str = "sign",
    bias_centred: bool = False,
) -> tuple[State, dict[str, Any]]:
    """Gradient of the whole batch, optimizer update, router bias from the batch's counts, moving average.

    ``batch``: the entries of ``objective``, each [A, B, T]; ``knobs.micro_batches`` of the A micro-batches count. With
    A > 1 they run one after the other, in a loop whose length is no part of the compiled program. ``optimizer`` gives
    the change of the parameters for a learning rate of 1. ``objective``: the loss (`Objective`). ``clip``: largest
    global norm of the gradient. ``ema_decay``: of `State.ema`. ``biases``: which router biases move
    (`update_router_bias`); None: all. ``bias_rule``, ``bias_centred``: how they move, its ``rule`` and ``centred``.

    Where the loss, the gradient's norm, a parameter after its update or the optimizer's state is not finite the
    parameters, the optimizer's state, the router biases and the average stay as they were; the step is counted all the
    same.

    Returns the next state and the metrics. Scalars: "loss" and the objective's sums, of `NextToken` "main", "mtp"
    (nats), "balance" {term: scalar} and "tokens" (targets); "grad_norm" (before the clip), "skipped" (0 or 1). "fault":
    what is not finite, {"loss": bool, "gradient", "update": int32, the number of the first such parameter or layer in
    `norms.fault_names`, -1 for none}. "gradient_norms" {"embed", "layer.0", ..., "mtp.0", "head" (with the final norm):
    scalar}. Where the objective's sums have them: "dropped"; "activation_norm" float32
    [layers], root mean square of the residual stream after each block; a row an MoE layer, float32 [L] unless said
    otherwise: "load" int32 [L, E], "bias" [L, E] (after the step), "bias_min", "bias_max", "max_violation",
    "routing_entropy" (nats).

    Raises ValueError for a batch without tokens or with unknown entries.
    """
    check_entries(batch, objective.entries)
    model = state.model
    n_micro = batch["tokens"].shape[0]
    counts = objective.counts(_used(batch, knobs.micro_batches))

    @partial(jax.value_and_grad, has_aux=True)
    def differentiate(params, part):
        total, sums = objective(combine(params, state.rest), part, counts, knobs, ctx)
        return total, {**sums, "loss": total}

    def micro_batch(index):
        part = {name: jax.lax.dynamic_index_in_dim(a, index, keepdims=False) for name, a in batch.items()}
        (_, sums), gradients = differentiate(state.params, part)
        return sums, named(gradients)

    if n_micro == 1:
        sums, gradients = micro_batch(0)
    else:
        zero = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), jax.eval_shape(micro_batch, 0))
        sums, gradients = jax.lax.fori_loop(
            0, knobs.micro_batches, lambda a, held: jax.tree.map(jnp.add, held, micro_batch(a)), zero
        )

    norms = gradient_norms(gradients, model, trained_layers(state.params))
    size = norm(jnp.stack(list(norms.values())))
    factor = jnp.where(size > clip, clip / size, 1.0)
    values = named(state.params)
    clipped = {n: g * factor for n, g in gradients.items()}

    def apply(changes):
        # Added in float32 and rounded once, where parameters are kept in less.
        return {n: (v.astype(jnp.float32) + knobs.lr * changes[n]).astype(v.dtype) for n, v in values.items()}

    changes, opt_state = optimizer.update(clipped, state.opt_state, values)
    fault = {
        "loss": ~jnp.isfinite(sums["loss"]),
        "gradient": first_fault(gradients, model),
        "update": first_fault((apply(changes), opt_state), model),
    }
    good = ~fault["loss"] & jnp.isfinite(size) & (fault["update"] < 0)
    # Only what the optimizer made is kept until all of it is known to be finite; what follows from it is computed
    # again. And the optimizer's state only after the parameters. So each array is overwritten in its place: computed
    # together, all from the old state, they would need a copy of it.
    good, changes, held = jax.lax.optimization_barrier((good, changes, state.opt_state))
    held, moved = jax.lax.optimization_barrier((held, apply(changes)))
    _, opt_state = optimizer.update(clipped, held, values)
    values = moved

    load, mtp_load = sums.get("load"), sums.pop("mtp_load", None)
    rest = state.rest
    if load is not None:
        rest = update_router_bias(rest, load, mtp_load, knobs.bias_speed, biases, bias_rule, bias_centred)
    ema = state.ema
    if ema is not None:
        ema = {n: ema_decay * e + (1 - ema_decay) * values[n].astype(jnp.float32) for n, e in ema.items()}

    new = (renamed(state.params, values), rest, opt_state, ema)
    old = (state.params, state.rest, held, state.ema)
    kept = jax.tree.map(lambda n, o: o if n is o else jnp.where(good, n, o), new, old)
    state = State(*kept, step=state.step + 1, skipped=jnp.where(good, 0, state.skipped + 1))

    if "activation_norm" in sums:
        sums["activation_norm"] = jnp.sqrt(sums["activation_norm"])
    metrics = sums | {
        "grad_norm": size,
        "gradient_norms": norms,
        "skipped": 1 - good.astype(jnp.int32),
        "fault": fault,
    }
    if load is not None:
        metrics |= {"max_violation": max_violation(load), "routing_entropy": routing_entropy(load)}
        if model.cfg.moe.bias:
            bias = router_bias(state.rest)
            metrics |= {"bias": bias, "bias_min": bias.min(-1), "bias_max": bias.max(-1)}
    return state, metrics


def _used(batch: dict[str, jax.Array], micro_batches) -> dict[str, jax.Array]:
    """The batch with everything but the first ``micro_batches`` turned into padding."""
    tokens = batch["tokens"]
    segments = batch.get("segments", jnp.ones_like(tokens))
    if tokens.shape[0] > 1:
        segments = jnp.where(jnp.arange(tokens.shape[0])[:, None, None] < micro_batches, segments, 0)
    return {**batch, "segments": segments}
