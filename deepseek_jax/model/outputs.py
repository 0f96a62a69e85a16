"""What a forward pass returns. Nothing is stored on the side.

Suffixes: L MoE layers (or MTP modules), B rows, T tokens, K chosen experts, E experts, H streams, D width,
V vocabulary.
"""

from dataclasses import dataclass, field
from typing import Any

import jax

from deepseek_jax.model.cache import Cache


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Aux:
    """Router statistics, a leading axis for the layers.

    ``expert_index``: int32 [L, B, T, K], -1 where a token is padding. ``load``: int32 [L, E], tokens that
    chose each expert. ``balance``: name -> float32 [L, B], unweighted balance losses a row; "sequence" is V3
    eq. 17. ``share``: float32 [L, B, E], each expert's normalised scores summed over a row's real tokens, from which
    other balance losses are made. Both are 0 in a hash layer, whose gate chooses nobody. ``dropped``: int32 [L],
    assignments not computed.
    """

    expert_index: jax.Array
    load: jax.Array
    balance: dict[str, jax.Array]
    share: jax.Array
    dropped: jax.Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Output:
    """``hidden``: [B, T, D] after the final norm. ``logits``: float32 [B, T, V], [B, 1, V] or None. ``streams``:
    [B, T, H, D] after the last layer, None where the residual is one stream.

    ``mtp_hidden`` and ``mtp_logits``: one a depth, [B, T, D] and float32 [B, T, V]. ``captured``: name ->
    [L, B, T, ...] in layer order; ``mtp_captured``: the same of the MTP modules. ``aux`` and ``mtp_aux``: None where
    the model has no such router.
    """

    hidden: jax.Array
    logits: jax.Array | None
    streams: jax.Array | None = None
    mtp_hidden: tuple[jax.Array, ...] = ()
    mtp_logits: tuple[jax.Array, ...] = ()
    cache: Cache | None = None
    captured: dict[str, jax.Array] = field(default_factory=dict)
    aux: Aux | None = None
    mtp_aux: Aux | None = None
    mtp_captured: dict[str, jax.Array] = field(default_factory=dict)
    losses: dict[str, Any] = field(default_factory=dict)

    @property
    def carry(self) -> jax.Array:
        """What the first MTP module reads: the streams where there are several, else the final hidden states."""
        return self.hidden if self.streams is None else self.streams
