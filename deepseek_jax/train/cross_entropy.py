"""Cross-entropy of hidden states and a head, without the logits of all tokens in memory.

The forward pass computes the gradients along with the loss, a chunk of tokens at a time: the loss enters the training
loss by a factor only, so that the backward pass has nothing to do but multiply. A chunk's logits are made once, and on
a mesh the head is gathered once.

Suffixes: B rows, T tokens, D width, V vocabulary (on a mesh: the part of this device).
"""

from functools import partial

import jax
import jax.numpy as jnp

from deepseek_jax.core.context import Context


@partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def chunked_nats(hidden_BTD: jax.Array, head, target_BT: jax.Array, axes: tuple[str, str], ctx: Context) -> jax.Array:
    """float32: the sum of -log p(target) over the known targets; a target of -1 takes no part.

    ``head``: array [D, V] or, for a tied embedding, [V, D]; ``axes``: its logical axes. ``ctx.loss_chunk``: tokens of
    each row at once.
    """
    return _run(hidden_BTD, head, target_BT, axes, ctx, gradients=False)


def _forward(hidden_BTD, head, target_BT, axes, ctx):
    nats, dhidden_BTD, dhead = _run(hidden_BTD, head, target_BT, axes, ctx, gradients=True)
    return nats, (dhidden_BTD, dhead)


def _backward(axes, ctx, residuals, dnats):
    return *((dnats * d).astype(d.dtype) for d in residuals), None


chunked_nats.defvjp(_forward, _backward)


def _run(hidden_BTD, head, target_BT, axes, ctx: Context, gradients: bool):
    compute = partial(_on_device, tied=axes[0] == "vocab", chunk=ctx.loss_chunk, gradients=gradients)
    return ctx.ops.nats(compute, hidden_BTD, head, target_BT, axes)


def _on_device(
    hidden_BTD, head, target_BT, *, tied, chunk, gradients, vocabulary=(), over=(), in_use=None, at_rest=None
):
    """The sum, with ``gradients`` also its own by hidden states and head.

    On a mesh, of this device's part. ``vocabulary``, ``over``: the mesh axes over which vocabulary and tokens are
    split. ``in_use``, ``at_rest``: bring the head here, and its gradient back.
    """
    dtype = hidden_BTD.dtype
    w = in_use(head) if in_use else head.astype(dtype)
    product = partial(jnp.einsum, preferred_element_type=jnp.float32)
    of_w, size = ("VD", w.shape[0]) if tied else ("DV", w.shape[1])
    first = jax.lax.axis_index(vocabulary) * size if vocabulary else 0
    T = target_BT.shape[1]
    chunk = min(chunk, T)
    missing = -T % chunk
    hidden_BTD = jnp.pad(hidden_BTD, ((0, 0), (0, missing), (0, 0)))
    target_BT = jnp.pad(target_BT, ((0, 0), (0, missing)), constant_values=-1)

    def add(held, index):
        h_BTD, t_BT = (jax.lax.dynamic_slice_in_dim(a, index * chunk, chunk, axis=1) for a in (hidden_BTD, target_BT))
        logits_BTV = product(f"BTD,{of_w}->BTV", h_BTD, w)
        known_BT1, place_BT1 = (t_BT >= 0)[..., None], (t_BT - first)[..., None]
        target_BTV = jnp.arange(size) == place_BT1
        top_BT1 = jax.lax.pmax(logits_BTV.max(-1, keepdims=True), vocabulary)
        sum_BT1 = jax.lax.psum(jnp.exp(logits_BTV - top_BT1).sum(-1, keepdims=True), vocabulary)
        picked_BT1 = jax.lax.psum(jnp.where(target_BTV, logits_BTV, 0).sum(-1, keepdims=True), vocabulary)
        log_sum_BT1 = top_BT1 + jnp.log(sum_BT1)
        nats = jnp.where(known_BT1, log_sum_BT1 - picked_BT1, 0).sum()
        if not gradients:
            return held + nats, None
        total, dw = held
        d_BTV = jnp.where(known_BT1, jnp.exp(logits_BTV - log_sum_BT1) - target_BTV, 0).astype(w.dtype)
        dh_BTD = jax.lax.psum(product(f"BTV,{of_w}->BTD", d_BTV, w), vocabulary)
        return (total + nats, dw + product(f"BTD,BTV->{of_w}", h_BTD, d_BTV)), dh_BTD.astype(w.dtype)

    start = (jnp.zeros(()), jnp.zeros(w.shape)) if gradients else jnp.zeros(())
    held, dh_nBTD = jax.lax.scan(add, start, jnp.arange((T + missing) // chunk))
    if not gradients:
        return jax.lax.psum(held, over)
    nats, dw = held
    dhidden_BTD = jnp.moveaxis(dh_nBTD, 0, 1).reshape(hidden_BTD.shape)[:, :T]
    dw = dw.astype(w.dtype)
    dw = at_rest(dw) if at_rest else dw
    # Together, or the compiler would hold the whole of this gradient until everything else is done.
    return jax.lax.optimization_barrier((jax.lax.psum(nats, over), dhidden_BTD, dw.astype(head.dtype)))
