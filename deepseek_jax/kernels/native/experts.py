"""The routed experts' networks, and their gradients, each in one call (`experts.cc`, `experts_gradients.cc`): rows go
through both products of an expert and stay in a core's cache between these.

Suffixes: N tokens, K assignments of each, M = N K assignments, E experts, D width, F inner width, Z = 2F.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from deepseek_jax.core.bits import Bits
from deepseek_jax.kernels.native.grouped import EXPERTS
from deepseek_jax.kernels.native.library import DEEP, call, check, fit, panels_room, whole_panels

# Most assignments whose experts are parted, and fewest of an expert's inner numbers in a part: a strip of them is read
# slower than a matrix in the order of memory.
FEW, PART = 128, 256


def routed(x_ND, index_NK, weight_NK, gate_up_EDZ: jax.Array | Bits, down_EFD: jax.Array | Bits, limit) -> jax.Array:
    """[N, D] in x's dtype: the sum over K of weight times down(`ffn.swiglu`(gate_up(x), limit)), where -1 and what else
    is no expert adds nothing.

    Inputs and weights are rounded to x's dtype, the sum is, and nothing between: that is float32. Has a gradient, one
    call as well, which is given what the first product came to; the matrices' is computed for whoever asks for any, but
    bits have none.
    Errors: `grouped_matmul`.
    """
    check(EXPERTS, x_ND, gate_up_EDZ, down_EFD)
    gate_up, down = (w.values if isinstance(w, Bits) else w for w in (gate_up_EDZ, down_EFD))
    # Of gate and up, 2F wide, a letter of its own.
    fit(x=("ND", x_ND), index=("NK", index_NK), weight=("NK", weight_NK), gate_up=("EDZ", gate_up), down=("EFD", down))
    if gate_up.shape[2] != 2 * down.shape[1]:
        raise ValueError(f"gate_up is {gate_up.shape[2]} wide, which is not twice the {down.shape[1]} of down.")
    weight_NK = weight_NK.astype(x_ND.dtype)
    return _routed(x_ND, index_NK.astype(jnp.int32), weight_NK, gate_up, down, np.inf if limit is None else limit)


@partial(jax.custom_vjp, nondiff_argnums=(5,))
def _routed(x_ND, index_NK, weight_NK, gate_up_EDZ, down_EFD, limit: float) -> jax.Array:
    return _routed_call(x_ND, index_NK, weight_NK, gate_up_EDZ, down_EFD, limit, False)[0]


def _routed_call(x_ND, index_NK, weight_NK, gate_up_EDZ, down_EFD, limit: float, keep: bool):
    """The sums, and what the first product came to, [M, 2F] in order of expert, or of no rows where it is not kept."""
    M, (_, F, D) = index_NK.size, down_EFD.shape
    # Room for what threads add up apart where there are fewer experts than threads.
    parts = max(1, F // PART) if M <= FEW else 1
    shapes = (x_ND.shape, (M * keep, 2 * F), (parts * M, D))
    run = call("Routed", [jax.ShapeDtypeStruct(a, jnp.float32) for a in shapes], down_EFD)
    x, weight = (a.astype(jnp.float32) for a in (x_ND, weight_NK))
    y_ND, h_MZ, _ = run(x, index_NK, weight, gate_up_EDZ, down_EFD, limit=np.float32(limit))
    return y_ND.astype(x_ND.dtype), h_MZ


def _routed_forward(*operands_and_limit):
    y_ND, h_MZ = _routed_call(*operands_and_limit, True)
    return y_ND, (*operands_and_limit[:-1], h_MZ)


def _routed_backward(limit: float, kept, dy_ND):
    x_ND, index_NK, weight_NK, gate_up_EDZ, down_EFD, h_MZ = kept
    M, (_, F, D) = index_NK.size, down_EFD.shape
    of_bits = down_EFD.dtype == jnp.uint16
    matrices = [(0, *w.shape[1:]) if of_bits else w.shape for w in (gate_up_EDZ, down_EFD)]
    # Room for what threads leave to others: outputs, and what `Kept` of `experts_gradients.cc` holds.
    rows = M + (DEEP - 1) * min(M, gate_up_EDZ.shape[0])
    kept = panels_room(rows, 2 * F) + panels_room(rows, D) + M * (whole_panels(F) + 16)
    rooms = [(M, D), (kept,)]
    outs = [jax.ShapeDtypeStruct(a, jnp.float32) for a in (x_ND.shape, weight_NK.shape, *matrices, *rooms)]
    run = call("RoutedGradients", outs, down_EFD)
    x, weight, dy = (a.astype(jnp.float32) for a in (x_ND, weight_NK, dy_ND))
    dx, d_weight, d_gate_up, d_down, *_ = run(
        x, index_NK, weight, gate_up_EDZ, down_EFD, h_MZ, dy, limit=np.float32(limit)
    )
    of_matrices = (None, None) if of_bits else (d_gate_up.astype(gate_up_EDZ.dtype), d_down.astype(down_EFD.dtype))
    return dx.astype(x_ND.dtype), None, d_weight.astype(weight_NK.dtype), *of_matrices


_routed.defvjp(_routed_forward, _routed_backward)
