"""Routed experts: every token through its chosen SwiGLU networks, nothing dropped (DeepSeekMoE 2401.06066).

One function, `routed_experts`, in forms that agree: a dense oracle that computes every expert for every
token; and tokens sorted by expert with one of the grouped matmuls of `kernels.grouped`.

Suffixes: N tokens, K chosen experts, M = N * K assignments sorted by expert, E experts, D width, F expert
width.
"""

from dataclasses import dataclass, replace
from functools import partial

import jax
import jax.numpy as jnp

from deepseek_jax.configs.fp8 import Fp8
from deepseek_jax.core.lowrank import LowRank, dense, held
from deepseek_jax.core.quant import Quantized
from deepseek_jax.kernels.grouped import grouped_matmul, grouped_outer, native_routed
from deepseek_jax.kernels.grouped_fp8 import fp8_matmul, fp8_outer, fp8_transposed
from deepseek_jax.model.ffn import swiglu


def routed_experts(
    x_ND: jax.Array,
    index_NK: jax.Array,
    weight_NK: jax.Array,
    gate_up_ED2F,
    down_EFD,
    form: str,
    limit: float | None = None,
    fp8: Fp8 | None = None,
) -> jax.Array:
    """[N, D]: the weighted sum of each token's experts; index -1 contributes nothing.

    ``gate_up_ED2F``: [E, D, 2, F], ``down_EFD``: [E, F, D], arrays, `Quantized` or `LowRank`. ``form``: a
    `Context.experts`. ``limit``: `ffn.swiglu`. ``fp8``: `Context.fp8`, which "dense" leaves out.
    """
    gate_up, down = held(gate_up_ED2F), held(down_EFD)
    weight_NK = jnp.where(index_NK >= 0, weight_NK, 0)
    if form == "dense":
        return dense_experts(x_ND, index_NK, weight_NK, dense(gate_up, x_ND.dtype), dense(down, x_ND.dtype), limit)
    if form == "native" and fp8 is None and not isinstance(gate_up, LowRank) and not isinstance(down, LowRank):
        return native_routed(x_ND, index_NK, weight_NK, gate_up, down, limit)
    return sorted_experts(x_ND, index_NK, weight_NK.astype(x_ND.dtype), gate_up, down, form, limit, fp8)


def dense_experts(x_ND, index_NK, weight_NK, gate_up_ED2F, down_EFD, limit: float | None = None) -> jax.Array:
    """The oracle: all experts for all tokens, then the weighted sum of the chosen ones."""
    E = gate_up_ED2F.shape[0]
    weight_NE = (jax.nn.one_hot(index_NK, E, dtype=x_ND.dtype) * weight_NK[..., None].astype(x_ND.dtype)).sum(1)
    gate_up_ED2F = gate_up_ED2F.reshape(*gate_up_ED2F.shape[:2], 2, -1)
    gate_NEF, up_NEF = jnp.moveaxis(jnp.einsum("ND,EDZF->NEZF", x_ND, gate_up_ED2F), 2, 0)
    return jnp.einsum("NEF,EFD,NE->ND", swiglu(gate_NEF, up_NEF, limit), down_EFD, weight_NE)


def sort_by_expert(index_NK: jax.Array, n_experts: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The assignments in order of expert, -1 last.

    Returns order [M] (sorted place -> assignment), its inverse [M], and the experts' sizes [E]. Raises ValueError for
    more assignments than can be numbered by expert.
    """
    flat = index_NK.reshape(-1)
    M = flat.size
    if (n_experts + 1) * M > 2**32:
        most = 2**32 // (n_experts + 1)
        raise ValueError(f"{M:,} assignments to {n_experts} experts in one call: give tokens for {most:,} at most.")
    # Expert and assignment are one key: XLA sorts one array on a CPU five times as fast as two that belong together.
    key = jnp.where(flat < 0, n_experts, flat).astype(jnp.uint32) * M + jnp.arange(M, dtype=jnp.uint32)
    order = (jnp.sort(key) % M).astype(jnp.int32)
    inverse = jnp.zeros_like(order).at[order].set(jnp.arange(order.size, dtype=order.dtype))
    sizes = jnp.zeros(n_experts, jnp.int32).at[flat].add(1, mode="drop", wrap_negative_indices=False)
    return order, inverse, sizes


@partial(jax.custom_vjp, nondiff_argnums=(5, 6, 7))
def sorted_experts(
    x_ND, index_NK, weight_NK, gate_up_ED2F, down_EFD, form: str, limit: float | None = None, fp8: Fp8 | None = None
) -> jax.Array:
    """Sort, two grouped matmuls, gather back. Permutations are gathers in both directions, never scatters."""
    return _forward(x_ND, index_NK, weight_NK, gate_up_ED2F, down_EFD, form, limit, fp8)[0]


def _forward(x_ND, index_NK, weight_NK, gate_up_ED2F, down_EFD, form, limit, fp8):
    K = index_NK.shape[1]
    order, inverse, sizes = sort_by_expert(index_NK, gate_up_ED2F.shape[0])
    weight_M1 = weight_NK.reshape(-1)[order][:, None]
    h_MZ = rows_up(x_ND[order // K], gate_up_ED2F, sizes, form, fp8)
    y_MD = rows_down(h_MZ, weight_M1, down_EFD, sizes, form, limit, fp8)
    y_ND = _summed(_of_tokens(y_MD, inverse, index_NK))
    return y_ND, (x_ND, index_NK, weight_NK, gate_up_ED2F, down_EFD, order, inverse, sizes, h_MZ)


def _backward(form, limit, fp8, residuals, dy_ND):
    x_ND, index_NK, weight_NK, gate_up, down, order, inverse, sizes, h_MZ = residuals
    K = index_NK.shape[1]
    weight_M1 = weight_NK.reshape(-1)[order][:, None]
    dh_MZ, dweight_M1, d_down = rows_down_backward(h_MZ, weight_M1, dy_ND[order // K], down, sizes, form, limit, fp8)
    dx_MD, d_gate_up = rows_up_backward(x_ND[order // K], dh_MZ, gate_up, sizes, form, fp8)
    dweight_NK = _of_tokens(dweight_M1, inverse, index_NK)[..., 0].astype(weight_NK.dtype)
    return _of_tokens(dx_MD, inverse, index_NK).sum(1), None, dweight_NK, d_gate_up, d_down


sorted_experts.defvjp(_forward, _backward)


def _of_tokens(a_MX, inverse, index_NK) -> jax.Array:
    """[N, K, X]: sorted rows back at their tokens, zero for nobody's: behind the groups stands anything."""
    return jnp.where(index_NK[..., None] >= 0, a_MX[inverse].reshape(*index_NK.shape, -1), 0)


def _summed(a_NKX) -> jax.Array:
    """[N, X] in a's dtype, summed over K in float32. One by one: XLA does not fuse a reduction on a CPU with the
    gather before it."""
    return sum(a_NKX[:, k].astype(jnp.float32) for k in range(a_NKX.shape[1])).astype(a_NKX.dtype)


# Rows sorted by expert through their experts, in the steps between which a mesh's devices exchange rows. The routing
# weight stands before the second product, where it scales the narrower array: the backward pass then needs neither that
# product nor, on a mesh, its way back.


def rows_up(x_MD, gate_up, sizes, form: str, fp8: Fp8 | None) -> jax.Array:
    """[M, 2F]: the first product."""
    return _apply(x_MD, gate_up, sizes, form, fp8)


def _activated(h_MZ, limit: float | None) -> jax.Array:
    """[M, F] of h = [gate | up], the fused product."""
    return swiglu(*jnp.split(h_MZ, 2, axis=-1), limit)


def rows_down(h_MZ, weight_M1, down, sizes, form: str, limit: float | None, fp8: Fp8 | None) -> jax.Array:
    """[M, D]: the second product, of weighted activations."""
    return _apply(_inside(_activated(h_MZ, limit) * weight_M1.astype(h_MZ.dtype), sizes), down, sizes, form, fp8)


def rows_down_backward(h_MZ, weight_M1, dy_MD, down, sizes, form: str, limit: float | None, fp8: Fp8 | None):
    """The gradients of `rows_down` by h, weight (float32) and down."""
    weight_M1 = weight_M1.astype(h_MZ.dtype)
    a_MF, activated_vjp = jax.vjp(partial(_activated, limit=limit), h_MZ)
    da_MF = _apply_transposed(dy_MD, down, sizes, form, fp8)
    (dh_MZ,) = activated_vjp(da_MF * weight_M1)
    dweight_M1 = (a_MF * da_MF).sum(-1, keepdims=True, dtype=jnp.float32)
    return (
        _inside(dh_MZ, sizes),
        dweight_M1,
        _weight_gradient(down, _inside(a_MF * weight_M1, sizes), dy_MD, sizes, form, fp8),
    )


def rows_up_backward(x_MD, dh_MZ, gate_up, sizes, form: str, fp8: Fp8 | None):
    """The gradients of `rows_up` by x and gate_up."""
    dx_MD = _apply_transposed(dh_MZ, gate_up, sizes, form, fp8)
    return dx_MD, _weight_gradient(gate_up, x_MD, dh_MZ, sizes, form, fp8)


def _inside(a_MX, sizes) -> jax.Array:
    """Zero behind the groups, where a grouped matmul leaves anything: fused into what computes the rows."""
    return jnp.where(jnp.arange(a_MX.shape[0])[:, None] < sizes.sum(), a_MX, 0)


def _halves(w: LowRank, dy_MZ=None) -> list[tuple]:
    """An adapter's pairs a [E, D, r], b [E, r, F]: two for gate and up, one for down; each with its part of dy."""
    if not w.split:
        return [(w.a, w.b, dy_MZ)]
    parts = (None, None) if dy_MZ is None else jnp.split(dy_MZ, 2, axis=-1)
    return [(w.a[:, :, half], w.b[:, half], part) for half, part in enumerate(parts)]


def _thin(form: str) -> str:
    """The form for an adapter's matrices, of which one width is a rank: those of "hopper" are too narrow a block."""
    return "auto" if form == "hopper" else form


def _apply(x_MD, w, sizes, form, fp8):
    """[M, Z]: every row times its expert's weight, an adapter's two thin matrices apart."""
    if fp8 is not None:
        return fp8_matmul(x_MD, w, sizes, form, fp8)
    if not isinstance(w, LowRank):
        return grouped_matmul(x_MD, w, sizes, form)
    matmul = partial(grouped_matmul, sizes_E=sizes)
    thin = partial(matmul, form=_thin(form))
    low_MZ = jnp.concatenate([thin(thin(x_MD, a), b) for a, b, _ in _halves(w)], axis=-1)
    return matmul(x_MD, w.base, form=form) + (w.scale * low_MZ).astype(x_MD.dtype)


def _apply_transposed(dy_MZ, w, sizes, form, fp8):
    """[M, D]: every row times its expert's weight transposed."""
    if fp8 is not None:
        return fp8_transposed(dy_MZ, w, sizes, form, fp8)
    if not isinstance(w, LowRank):
        return grouped_matmul(dy_MZ, w, sizes, form, transpose=True)
    matmul = partial(grouped_matmul, sizes_E=sizes, transpose=True)
    thin = partial(matmul, form=_thin(form))
    low_MD = sum(thin(thin(dy, b), a) for a, b, dy in _halves(w, dy_MZ))
    return matmul(dy_MZ, w.base, form=form) + (w.scale * low_MD).astype(dy_MZ.dtype)


def _weight_gradient(w, x_MD, dy_MZ, sizes, form, fp8=None):
    if isinstance(w, Quantized):  # never differentiated; the cotangent has to exist all the same
        return jax.tree.map(jnp.zeros_like, w)
    if fp8 is not None:
        return fp8_outer(x_MD, dy_MZ, sizes, form, w.dtype, fp8).reshape(w.shape)
    if isinstance(w, LowRank):
        matmul, outer = (partial(f, sizes_E=sizes, form=_thin(form)) for f in (grouped_matmul, grouped_outer))
        parts = _halves(w, w.scale * dy_MZ)
        da = [outer(x_MD, matmul(dy, b, transpose=True)) for _, b, dy in parts]
        db = [outer(matmul(x_MD, a), dy) for a, _, dy in parts]
        da, db = (jnp.stack(da, 2), jnp.stack(db, 1)) if w.split else (da[0], db[0])
        base = _weight_gradient(w.base, x_MD, dy_MZ, sizes, form)
        return replace(w, base=base, a=da.astype(w.a.dtype), b=db.astype(w.b.dtype))
    return grouped_outer(x_MD, dy_MZ, sizes, form, w.dtype).reshape(w.shape)


@dataclass(frozen=True)
class Experts:
    """The computation on one device in one form, for ``ctx.ops.experts``, which on a mesh brings tokens to it.
    ``limit``: `ffn.swiglu`. ``fp8``: `Context.fp8`."""

    form: str
    limit: float | None = None
    fp8: Fp8 | None = None

    sort = staticmethod(sort_by_expert)

    def routed(self, x_ND, index_NK, weight_NK, gate_up, down) -> jax.Array:
        return routed_experts(x_ND, index_NK, weight_NK, gate_up, down, self.form, self.limit, self.fp8)

    def up(self, x_MD, gate_up, sizes) -> jax.Array:
        return rows_up(x_MD, gate_up, sizes, self.form, self.fp8)

    def down(self, h_MZ, weight_M1, down, sizes) -> jax.Array:
        return rows_down(h_MZ, weight_M1, down, sizes, self.form, self.limit, self.fp8)

    def down_backward(self, h_MZ, weight_M1, dy_MD, down, sizes):
        return rows_down_backward(h_MZ, weight_M1, dy_MD, down, sizes, self.form, self.limit, self.fp8)

    def up_backward(self, x_MD, dh_MZ, gate_up, sizes):
        return rows_up_backward(x_MD, dh_MZ, gate_up, sizes, self.form, self.fp8)
