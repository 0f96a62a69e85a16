"""Gradients of every published tensor beside the reference's, of one product of the logits with given directions."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from deepseek_jax.convert.names import layout
from deepseek_jax.core.params import map_variables
from deepseek_jax.core.partition import combine, partition
from deepseek_jax.model.transformer import Transformer

GRADIENT_BOUND = 1e-4  # Frobenius norm of the difference / that of the reference's gradient


@dataclass(frozen=True)
class Gradients:
    """Gradients of every published tensor. ``relative``: the Frobenius norm of the difference over that of the
    reference's, of the ``worst`` tensor; ``error``: its largest |difference|. ``zero``: tensors whose gradient is
    zero on both sides, such as those of experts that no token chose."""

    layer: int | None
    what: str
    tensors: int
    zero: int
    worst: str
    error: float
    relative: float

    @property
    def ok(self) -> bool:
        return self.relative <= GRADIENT_BOUND


def gradients_of(model: Transformer, tokens, directions: list[np.ndarray], routing) -> dict[str, np.ndarray]:
    """Our side of `Reference.gradients`. ``routing``: int [L_moe, B, T, K], the reference's experts; where a choice
    differs, gradients are of different functions."""
    params, rest = partition(model)
    tokens, T = jnp.asarray(tokens, jnp.int32), tokens.shape[1]

    @jax.jit
    def gradient(params, rest):
        def product(params):
            out = combine(params, rest)(tokens, routing=routing, with_mtp=len(directions) > 1)
            total = jnp.sum(out.logits * directions[0])
            for depth, direction in enumerate(directions[1:]):
                total += jnp.sum(out.mtp_logits[depth][:, : T - 1 - depth] * direction)
            return total

        return jax.grad(product)(params)

    held: dict[tuple, np.ndarray] = {}
    map_variables(lambda path, v: held.setdefault(path, np.asarray(v.get_value())), gradient(params, rest))
    found, (tensors, leaves) = {}, layout(model.cfg)
    for tensor in tensors:
        if tensor.path in held and not tensor.copy:
            array = held[tensor.path].reshape(leaves[tensor.path].matrix)[tensor.index]
            found[tensor.name] = array.T if tensor.transposed else array
    return found


def compare_gradients(ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray]) -> Gradients:
    """Finds the worst tensor; one that only one side has is infinitely wrong, as is one that is not finite."""
    zero, worst = 0, (min(theirs), 0.0, 0.0)
    for name in ours.keys() | theirs.keys():
        a, b = ours.get(name), theirs.get(name)
        if a is None or b is None:
            worst = (name, float("inf"), float("inf"))
            continue
        norm, difference = float(np.linalg.norm(b)), float(np.linalg.norm(a - b))
        zero += norm == difference == 0
        relative = difference / norm if norm else float("inf") if difference else 0.0
        if not relative <= worst[2]:
            error = float(np.abs(a - b).max())
            worst = (name, error, relative) if np.isfinite(relative) else (name, error, float("inf"))
    return Gradients(None, "gradients", len(theirs), zero, *worst)
