"""The whole model: embedding, stacks of layers, final norm, head, MTP modules.

Suffixes: B batch, T tokens, D width, V vocabulary, L layers, K chosen experts, P MTP depth.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from deepseek_jax.configs.layers import Stack
from deepseek_jax.configs.schema import Compressed, ModelConfig
from deepseek_jax.core.context import DEFAULT, Context
from deepseek_jax.core.layout import BATCH, SEQUENCE
from deepseek_jax.core.norm import RMSNorm
from deepseek_jax.core.params import HashTable, drawn, drawn_table, map_variables, matrix_of, param, parameter_dtype
from deepseek_jax.kernels.hopper_decode import KEYS
from deepseek_jax.model.arguments import (
    check_cache,
    check_cache_size,
    check_call,
    check_context,
    check_embeddings,
    check_init,
    check_new_config,
    check_windows,
)
from deepseek_jax.model.block import Block
from deepseek_jax.model.cache import Cache, make_cache, seen_tokens
from deepseek_jax.model.linear import linear
from deepseek_jax.model.mtp import MTP, shifted
from deepseek_jax.model.outputs import Aux, Output
from deepseek_jax.model.residual import Collapse, spread
from deepseek_jax.model.router import KnockOut
from deepseek_jax.model.stacks import remat, run_stacks
from deepseek_jax.model.tokens import Tokens


class Transformer(nnx.Module):
    """A pytree of parameters with ``cfg``; calling it is pure.

    ``stacks``: runs of equal layers, each a `Block` whose leaves have a leading layer axis (V3: 3 dense
    layers, then 58 MoE layers). How layers are grouped does not change a number.
    """

    def __init__(self, cfg: ModelConfig, dtype):
        self.cfg = cfg
        self.embed = param(dtype, (cfg.vocab_size, cfg.dim), ("vocab", "embedding"), inputs=1)
        self.stacks = nnx.List(
            jax.vmap(lambda number, layer=stack.layer: Block(cfg, layer, dtype, number))(np.asarray(stack.numbers))
            for stack in cfg.stacks
        )
        self.collapse = None if cfg.residual is None else Collapse(cfg)
        self.norm = RMSNorm(dtype, cfg.dim, "embed", cfg.norm_eps)
        shape, axes = (cfg.dim, cfg.vocab_size), ("embed", "vocab")
        self.head = None if cfg.tie_embeddings else param(dtype, shape, axes, inputs=1)
        self.mtp = nnx.List(MTP(cfg, dtype) for _ in range(cfg.mtp_depth))

    def __setattr__(self, name: str, value) -> None:
        if name == "cfg" and "cfg" in vars(self):
            check_new_config(self.cfg, value)
        super().__setattr__(name, value)

    @property
    def segments(self) -> tuple[tuple[Stack, ...], ...]:
        """The config's, or a layer each in a model that `generation.layers.unstacked` made."""
        if len(self.stacks) < self.cfg.n_layers:
            return self.cfg.segments
        return tuple((Stack(layer, range(i, i + 1)),) for i, layer in enumerate(self.cfg.layers))

    def init_cache(self, batch: int, length: int, rewind: int = 0, ctx: Context | None = None) -> Cache:
        """An empty cache for ``length`` tokens a row (rounded up to blocks, where ``ctx.attention`` names a kernel that
        reads such), in the compute dtype or as ``ctx.cache`` says; ``rewind``: `Cache.rewind`. What is in a cache stays
        in its form, whatever the context of a later call."""
        check_cache_size(batch, length, rewind)
        ctx, dtype = ctx or DEFAULT, self.compute_dtype(ctx)
        if ctx.attention == "hopper":
            length += -length % KEYS
        make = partial(make_cache, batch=batch, length=length, rewind=rewind, ctx=ctx)
        # Modules see tokens again while they draft.
        again = rewind + self.cfg.mtp_depth if rewind else 0
        modules = [module.block.attn.held(1, batch, length, again, dtype, ctx) for module in self.mtp]
        kinds = (kind for segment in self.segments for kind in segment)
        held = [
            stack.attn.held(len(kind.numbers), batch, length, rewind, dtype, ctx)
            for stack, kind in zip(self.stacks, kinds, strict=True)
        ]
        return make(held, mtp=tuple(make([own], of_module=True) for own in modules))

    def _empty(self, batch: int, cache: Cache) -> Cache:
        """The shapes of an empty cache of the same size."""
        form = Context(cache="served" if cache.is_served else "compute")
        return jax.eval_shape(partial(self.init_cache, batch, cache.capacity, cache.max_rewind, form))

    def compute_dtype(self, ctx: Context | None = None):
        """The dtype of activations: the context's, else that of the embedding: some parameters are float32 always."""
        return (ctx or DEFAULT).dtype or parameter_dtype((self.embed, self.norm))

    def __call__(
        self,
        tokens_BT: jax.Array,
        positions: jax.Array | None = None,
        segments: jax.Array | None = None,
        next_tokens: jax.Array | None = None,
        cache: Cache | None = None,
        routing: jax.Array | KnockOut | None = None,
        with_mtp: bool = False,
        logits: str = "all",
        capture: Sequence[str] = (),
        ctx: Context | None = None,
        embeddings: jax.Array | None = None,
    ) -> Output:
        """Runs tokens int32 [B, T] through the model.

        ``positions``: int32 [B, T]; default 0..T-1, or on from the cache's length (real tokens only).
        ``segments``: int32 [B, T], 0 is padding; a token sees its own segment only; default all 1.
        ``next_tokens``: int32 [B, T, mtp_depth], the tokens at +1.., -1 for none; default the tokens shifted.
        With a cache and ``with_mtp`` the last token of a call has no next token unless ``next_tokens`` gives it, and
        its slot in the MTP cache then stays empty. ``routing``: int32 [L_moe, B, T, K], experts to use instead of
        choosing, -1 for none, or a `router.KnockOut`, experts to choose without; MTP modules choose freely. ``logits``:
        "all", "last" (of each row's last real token; MTP logits stay whole) or "none" (MTP logits neither).
        ``capture``: names of activations to return. ``embeddings``: [B, T, D] in place of the tokens' own, such as a
        picture's; the ids then only say what hash routing asks for.

        A model that compresses (V4) takes no ``positions``, has a segment in one run, and one segment a row of a cache.

        Raises ValueError for arguments that do not fit the model, ids outside the vocabulary (padding apart), experts
        that there are not, and for more tokens than the cache has room for. Under jit values cannot be checked: an id
        outside the vocabulary makes its row NaN, and tokens beyond the cache's room are lost.
        """
        ctx = check_context(ctx)
        tokens_BT, positions, segments, next_tokens, routing = check_call(
            self.cfg, tokens_BT, positions, segments, next_tokens, cache, routing, with_mtp, logits, capture
        )
        check_embeddings(self.cfg, embeddings, tokens_BT, with_mtp)
        if isinstance(self.cfg.attention, Compressed):
            check_windows(self.cfg, positions, segments, cache, ctx)
        if segments is not None:
            # What stands at padding is never looked up.
            tokens_BT = jnp.where(segments != 0, tokens_BT, 0)
        if cache is not None:
            check_cache(cache, self._empty(tokens_BT.shape[0], cache), tokens_BT, segments)
            ctx = ctx.whole_rows()
        tokens, cache = seen_tokens(self.cfg, tokens_BT, positions, segments, cache, ctx)
        if embeddings is None:
            embeddings = ctx.ops.lookup(self.embed, tokens_BT, self.compute_dtype(ctx))
        else:
            embeddings = ctx.ops.constrain(embeddings.astype(self.compute_dtype(ctx)), (BATCH, SEQUENCE, None))
        x = spread(embeddings, self.cfg, ctx)
        held = None if cache is None else cache.held
        x, held, aux, captured = run_stacks(self.stacks, self.segments, x, tokens, ctx, held, routing, tuple(capture))
        streams = None if self.collapse is None else x
        hidden = self.norm(x if streams is None else self.collapse(streams, ctx))
        cache = None if cache is None else replace(cache, held=held)

        mtp_hidden, mtp_aux, mtp_captured = (), None, {}
        if with_mtp:
            if next_tokens is None:
                next_tokens = shifted(tokens_BT, tokens.segment, self.cfg.mtp_depth)
            mtp_hidden, cache, mtp_aux, mtp_captured = self.predict(
                hidden if streams is None else streams, next_tokens, tokens, cache, ctx, tuple(capture)
            )
        return Output(
            hidden=hidden,
            streams=streams,
            logits=self._select(hidden, tokens.segment, logits, ctx),
            mtp_hidden=mtp_hidden,
            mtp_logits=() if logits == "none" else tuple(self.unembed(h, ctx) for h in mtp_hidden),
            cache=cache,
            captured=captured,
            aux=aux,
            mtp_aux=mtp_aux,
            mtp_captured=mtp_captured,
        )

    def unembed(self, hidden_BTD: jax.Array, ctx: Context | None = None) -> jax.Array:
        """float32 logits [B, T, V] of final hidden states."""
        ctx = ctx or DEFAULT
        equation, w = ("BTD,VD->BTV", self.embed) if self.head is None else ("BTD,DV->BTV", self.head)
        logits = linear(equation, hidden_BTD, w, ctx, dtype=jnp.float32)
        return ctx.ops.constrain(logits, (BATCH, SEQUENCE, "vocab"))

    def predict(
        self,
        carry: jax.Array,
        next_tokens_BTP: jax.Array,
        tokens: Tokens,
        cache: Cache | None,
        ctx: Context,
        capture: tuple[str, ...] = (),
    ) -> tuple[tuple[jax.Array, ...], Cache | None, Aux | None, dict[str, jax.Array]]:
        """The MTP modules' hidden states for known next tokens (-1: unknown), one a depth; router statistics and
        activations, a row a module. ``carry``: `Output.carry`."""
        outputs, statistics, seen = [], [], []
        for depth in range(self.cfg.mtp_depth):
            token_BT = next_tokens_BTP[..., depth]
            carry, tokens, cache, aux, captured = self.predict_depth(
                depth, carry, token_BT, tokens, cache, ctx, capture
            )
            outputs.append(self.mtp[depth].hidden(carry, ctx))
            statistics.append(aux)
            seen.append(captured)
        aux, captured = jax.tree.map(lambda *a: jnp.stack(a), *zip(statistics, seen, strict=True))
        return tuple(outputs), cache, aux, captured

    def predict_depth(
        self,
        depth: int,
        carry: jax.Array,
        token_BT: jax.Array,
        tokens: Tokens,
        cache: Cache | None,
        ctx: Context,
        capture: tuple[str, ...] = (),
    ) -> tuple[jax.Array, Tokens, Cache | None, Aux | None, dict[str, jax.Array]]:
        """MTP module ``depth`` alone, for drafts, where each module's token is the one before's prediction.

        ``carry``: what the module before returned, `Output.carry` for module 0; `MTP.hidden` makes hidden states of
        what this one returns. ``token_BT``: the tokens at +1 + depth, -1 where unknown; there the returned tokens'
        segment is 0.
        """
        known = jnp.where(token_BT >= 0, tokens.segment, 0)
        tokens = replace(tokens, id=token_BT, segment=known, uniform=False)
        own, mine, held = replace(tokens, key_segment=known), None, None
        if cache is not None:
            own, mine = cache.mtp[depth].entered(tokens)
            (held,) = mine.held
        embedding = ctx.ops.lookup(self.embed, jnp.maximum(token_BT, 0), carry.dtype)

        module, carry, embedding = ctx.ops.fence((self.mtp[depth], carry, embedding))

        def run(module, carry, embedding, own, held):
            return module(carry, embedding, own, ctx, held, capture)

        carry, held, aux, captured = remat(run, ctx)(module, carry, embedding, own, held)
        if cache is not None:
            mine = replace(mine, held=(held,))
            cache = replace(cache, mtp=(*cache.mtp[:depth], mine, *cache.mtp[depth + 1 :]))
        return carry, tokens, cache, aux, captured

    def _select(self, hidden, segment, logits: str, ctx: Context):
        if logits == "none":
            return None
        if logits == "last":
            last = jnp.max(jnp.where(segment != 0, jnp.arange(segment.shape[1]), 0), axis=-1)
            hidden, ctx = jnp.take_along_axis(hidden, last[:, None, None], axis=1), ctx.whole_rows()
        return self.unembed(hidden, ctx)


@partial(jax.jit, static_argnums=(0, 2))
def _init(cfg: ModelConfig, key: jax.Array, dtype) -> Transformer:
    numbers = [jnp.arange(stack.numbers.start, stack.numbers.stop, stack.numbers.step) for stack in cfg.stacks]

    def draw(path, variable):
        # Where a layer is kept depends on the layers beside it; what it is called must not.
        stacked = path[0] == "stacks"
        name = ".".join(("layers", *path[2:]) if stacked else map(str, path))
        if isinstance(variable, HashTable):
            return drawn_table(variable, key, name, numbers[path[1]])
        if not matrix_of(variable, name).inputs:
            return variable  # gains and biases begin as they were made
        return drawn(variable, key, name, cfg.init_std, numbers[path[1]] if stacked else None)

    return map_variables(draw, Transformer(cfg, dtype))


def init(cfg: ModelConfig, key: jax.Array, dtype=jnp.float32, ctx: Context | None = None) -> Transformer:
    """A fresh model: matrices from N(0, cfg.init_std**2), norms 1, router biases 0 (always float32), tables of hash
    routing random and balanced (`core.params.drawn_table`).

    Each matrix follows from the key, its name and shape, its layer's number and its experts': two configs with one key
    have equal values in all that they share. On a mesh every device makes its own shards; the numbers are those of one
    device.

    Raises ValueError for what is no config, key or dtype of weights, LayoutError where the context's layout does not
    divide the model.
    """
    dtype = check_init(cfg, key, dtype)
    return (ctx or DEFAULT).ops.made(partial(_init, cfg, dtype=dtype), key)


@partial(jax.jit, static_argnums=(0, 2, 3))
def _init_leaves(cfg: ModelConfig, key: jax.Array, paths: tuple, dtype) -> list[jax.Array]:
    found = {}
    map_variables(lambda path, v: found.setdefault(path, v.get_value()), _init(cfg, key, dtype))
    return [found[path] for path in paths]


def init_leaves(cfg: ModelConfig, key: jax.Array, paths: tuple, dtype=jnp.float32) -> dict[tuple, jax.Array]:
    """The leaves of `init` at these paths (``("stacks", 0, "attn", "q_a")``); the others are not made."""
    return dict(zip(paths, _init_leaves(cfg, key, paths, jnp.dtype(dtype)), strict=True))


def abstract(cfg: ModelConfig, dtype=jnp.float32) -> Transformer:
    """The model's tree with shapes and dtypes in place of arrays; allocates nothing."""
    return jax.eval_shape(lambda: Transformer(cfg, jnp.dtype(dtype)))
