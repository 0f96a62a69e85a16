"""V4's compressor (2606.19348 §2.3.1, eq. 9 to 12; §2.3.2, eq. 20 to 23): many tokens become one entry.

Every run of m tokens of a segment is a window. Its entry is the mean of the tokens' values with weights of its own for
each dimension, a softmax over the window of the tokens' gates and of a bias for each place. Where windows overlap, a
token has two series of both: one for its own window, one for the next; the first window has no tokens before it.

Suffixes: B batch, L tokens in a line, E entries, M tokens of a window, K entry dimension, C = K or 2 K.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from deepseek_jax.core.context import Context
from deepseek_jax.core.norm import RMSNorm
from deepseek_jax.core.params import param
from deepseek_jax.model.linear import linear


class Compressor(nnx.Module):
    """Leaves follow the published matrices: of two series the first half is for the next window."""

    def __init__(self, size: int, ratio: int, overlapping: bool, dim: int, dtype, eps: float):
        self.size, self.ratio, self.overlapping = size, ratio, overlapping
        C = self.width // 2
        self.kv = param(dtype, (dim, C), ("embed", "kv_rank"), inputs=1)
        self.gate = param(dtype, (dim, C), ("embed", "kv_rank"), inputs=1)
        self.position = param(jnp.float32, (ratio, C), ("place", None), inputs=1, decay=False)
        self.norm = RMSNorm(dtype, size, "kv_rank", eps)

    @property
    def span(self) -> int:
        """The number of tokens that an entry is made of."""
        return 2 * self.ratio if self.overlapping else self.ratio

    @property
    def width(self) -> int:
        """The numbers of a token that go into entries, 2 C: `parts`."""
        return 4 * self.size if self.overlapping else 2 * self.size

    def parts(self, x_BTD: jax.Array, ctx: Context) -> jax.Array:
        """[B, T, 2 C], what of each token goes into entries: values, then gates."""
        return jnp.concatenate([linear("BTD,DC->BTC", x_BTD, w, ctx) for w in (self.kv, self.gate)], axis=-1)

    def entries(self, parts_BLP: jax.Array, last_BE: jax.Array | None, number_BE: jax.Array) -> jax.Array:
        """[B, E, K] of windows that end at places ``last_BE`` of the line; None: the line's windows from its start on,
        the last of them perhaps not whole. ``number_BE``: which of its segment each is. They are not rotated yet."""
        M = self.ratio
        if last_BE is None:
            E = number_BE.shape[1]
            line = jnp.pad(parts_BLP, ((0, 0), (0, E * M - parts_BLP.shape[1]), (0, 0)))
            own = line.reshape(line.shape[0], E, M, -1)
            before = jnp.pad(own[:, :-1], ((0, 0), (1, 0), (0, 0), (0, 0)))
        else:
            own, before = (_windows(parts_BLP, last_BE - back, M) for back in (0, M))
        (kv, gate), position = jnp.split(own, 2, axis=-1), self.position.get_value()
        if self.overlapping:
            # A token's first series belongs to the window after its own.
            kv_before, gate_before = (a[..., : self.size] for a in jnp.split(before, 2, axis=-1))
            kv = jnp.concatenate([kv_before, kv[..., self.size :]], axis=2)
            gate = jnp.concatenate([gate_before, gate[..., self.size :]], axis=2)
            position = jnp.concatenate([position[:, : self.size], position[:, self.size :]])
        gate = gate.astype(jnp.float32) + position
        if self.overlapping:
            nobody = (number_BE == 0)[..., None, None] & (jnp.arange(2 * M) < M)[:, None]
            gate = jnp.where(nobody, -jnp.inf, gate)
        entry_BEK = (jax.nn.softmax(gate, axis=2) * kv.astype(jnp.float32)).sum(2)
        return self.norm(entry_BEK.astype(parts_BLP.dtype))


def _windows(line_BLX: jax.Array, last_BE: jax.Array, size: int) -> jax.Array:
    """[B, E, size, X]: the tokens of a line up to each place; before its start, any."""
    at = jnp.clip(last_BE[..., None] + jnp.arange(1 - size, 1), 0, line_BLX.shape[1] - 1)
    return jax.vmap(lambda line, at: line[at])(line_BLX, at)
