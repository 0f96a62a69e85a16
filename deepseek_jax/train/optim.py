"""Optimizers over named parameters: AdamW as V3 uses it, Muon as V4 does for matrices.

They give the change for a learning rate of 1; the step multiplies, for the rate comes from the schedule.
"""

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from deepseek_jax.core.params import Adapter, Matrix, decays, matrix_of, named_variables
from deepseek_jax.train.muon import scale_by_muon
from deepseek_jax.train.recipe import Optimizer


def muon_matrix(variable: nnx.Variable, name: str) -> Matrix | None:
    """The matrices of a parameter that Muon moves; None for what V4 leaves to AdamW: embedding, head, vectors. So are
    the two factors of an adapter, which are one map together."""
    matrix = matrix_of(variable, name)
    alone = isinstance(variable, Adapter) or "vocab" in variable.get_metadata()["axes"]
    return None if alone or not matrix.inputs else matrix


def make(cfg: Optimizer, params) -> optax.GradientTransformation:
    """The optimizer of a tree of parameters, which works on their values as `core.params.named` names them; it takes a
    gradient that has been clipped.

    Which parameters decay, and which of their axes are matrices, is said where they are made (`core.params.param`).
    Raises ValueError for one that does not say it.
    """
    held = named_variables(params)
    decayed = {name: decays(v, name) for name, v in held.items()}
    adam = stored_as(optax.scale_by_adam(cfg.b1, cfg.b2, cfg.eps), jnp.dtype(cfg.moments))
    rule = adam
    if cfg.muon:
        forms = {name: muon_matrix(v, name) for name, v in held.items()}
        muon = scale_by_muon({n: form for n, form in forms.items() if form}, cfg.momentum, cfg.update_rms)
        rule = optax.partition(
            {"muon": muon, "adamw": adam}, {name: "muon" if form else "adamw" for name, form in forms.items()}
        )
    return optax.chain(rule, optax.add_decayed_weights(cfg.weight_decay, decayed), optax.scale(-1.0))


def stored_as(inner: optax.GradientTransformation, dtype: jnp.dtype) -> optax.GradientTransformation:
    """``inner`` with its state's floating-point arrays kept in ``dtype``; it computes in float32."""

    def cast(state, to):
        return jax.tree.map(lambda a: a.astype(to) if jnp.issubdtype(a.dtype, jnp.floating) else a, state)

    def update(gradients, state, params=None):
        updates, state = inner.update(cast(gradients, jnp.float32), cast(state, jnp.float32), params)
        return updates, cast(state, dtype)

    return optax.GradientTransformation(lambda params: cast(inner.init(params), dtype), update)
