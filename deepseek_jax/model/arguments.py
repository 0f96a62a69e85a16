"""What the public functions are given, checked before anything runs: kinds, shapes, and values where they are known.

Under jit values are not known. There an id outside the vocabulary has an embedding of NaN (`Operations.lookup`).
"""

from dataclasses import fields

import jax
import jax.numpy as jnp
import numpy as np

from deepseek_jax.configs.schema import ModelConfig
from deepseek_jax.core.context import DEFAULT, Context
from deepseek_jax.model.block import CAPTURABLE
from deepseek_jax.model.cache import Cache
from deepseek_jax.model.router import KnockOut

# Fields of a config that no layer has built in: a model may be given other ones.
LOOSE = ("name", "max_length", "bos_id", "eos_ids", "model_type", "init_std")
DTYPES = ("float32", "bfloat16", "float16")
# What other libraries write where a label is no target.
IGNORED = -100


def integers(name: str, value, like: str = "[batch, length]"):
    """``value`` as an array of integers: an array as it is, lists of numbers as int32.

    Raises ValueError for anything else.
    """
    if isinstance(value, str | bytes) or (isinstance(value, list | tuple) and _holds_text(value)):
        raise ValueError(
            f"{name} is text: give token ids, integers {like}; dsj.load_tokenizer(FOLDER).encode makes them."
        )
    if isinstance(value, list | tuple):
        try:
            value = np.asarray(value)
        except ValueError:
            raise ValueError(
                f"{name} has rows of unequal length: pad them, and say with segments of 0 what is padding."
            ) from None
        value = value.astype(np.int32) if value.dtype.kind in "iu" else value
    if not hasattr(value, "dtype") or not hasattr(value, "shape"):
        raise ValueError(f"{name} must be an array of integers {like}, not {type(value).__name__}.")
    if not jnp.issubdtype(value.dtype, jnp.integer):
        raise ValueError(f"{name} must be integers {like}, not {value.dtype}.")
    return value


def _holds_text(value) -> bool:
    return bool(value) and (isinstance(value[0], str) or (isinstance(value[0], list | tuple) and _holds_text(value[0])))


def known(*arrays) -> bool:
    """Whether all values are there to be looked at: not under jit, and not on devices of other processes."""
    return not any(isinstance(a, jax.core.Tracer) or not getattr(a, "is_fully_addressable", True) for a in arrays)


def check_call(cfg: ModelConfig, tokens, positions, segments, next_tokens, cache, routing, with_mtp, logits, capture):
    """The arguments of a model's call as arrays: tokens, positions, segments, next_tokens, routing.

    Raises ValueError for what does not fit the model.
    """
    tokens = integers("tokens", tokens)
    if len(tokens.shape) != 2 or 0 in tokens.shape:
        raise ValueError(f"tokens must have shape [batch, length] with both positive, not {tokens.shape}.")
    if positions is not None:
        positions = integers("positions", positions)
    if segments is not None and getattr(segments, "dtype", None) != np.dtype(bool):
        segments = integers("segments", segments)
    for name, array in (("positions", positions), ("segments", segments)):
        if array is not None and array.shape != tokens.shape:
            raise ValueError(f"{name} must have the tokens' shape {tokens.shape}, not {array.shape}.")
    if with_mtp and not cfg.mtp_depth:
        raise ValueError(f"with_mtp=True, but {cfg.name} has no MTP modules (mtp_depth=0).")
    if next_tokens is not None:
        next_tokens = _next_tokens(cfg, tokens, next_tokens, with_mtp)
    if isinstance(routing, KnockOut):
        check_knock_out(cfg, routing)
    elif routing is not None:
        routing = integers("routing", routing, "[MoE layers, batch, length, experts a token]")
        expected = (cfg.n_moe_layers, *tokens.shape, cfg.moe.top_k if cfg.moe else 0)
        if routing.shape != expected:
            raise ValueError(f"routing must have shape {expected}, not {routing.shape}.")
    if logits not in ("all", "last", "none"):
        raise ValueError(f'logits={logits!r}: choose "all", "last" or "none".')
    offered = CAPTURABLE if cfg.n_moe_layers else tuple(n for n in CAPTURABLE if n != "router_scores")
    if isinstance(capture, str) or any(name not in offered for name in capture):
        raise ValueError(f"capture={capture!r}: give a sequence of names; {cfg.name} offers {', '.join(offered)}.")
    if cache is not None and not isinstance(cache, Cache):
        raise ValueError(f"cache must be what model.init_cache or an earlier call gave, not {type(cache).__name__}.")
    check_ids("tokens", tokens, segments, cfg.vocab_size)
    if routing is not None and not isinstance(routing, KnockOut) and known(routing):
        _check_experts(np.asarray(routing), segments, cfg.moe.n_experts)
    return tokens, positions, segments, next_tokens, routing


def check_ids(name: str, tokens, segments, vocab_size: int) -> None:
    """Raises ValueError for an id outside the vocabulary, padding apart, where the values are known."""
    if not known(tokens) or (segments is not None and not known(segments)):
        return
    ids = np.asarray(tokens)
    if ids.min(initial=0) >= 0 and ids.max(initial=0) < vocab_size:
        return
    bad = (ids < 0) | (ids >= vocab_size)
    if segments is not None:
        bad &= np.asarray(segments) != 0
    if bad.any():
        at = tuple(int(i) for i in np.argwhere(bad)[0])
        found = int(ids[at])
        hint = ": where a token is no target it stays, and a loss_mask of 0 says so" if found == IGNORED else ""
        raise ValueError(f"{name}{list(at)} is {found}, outside the vocabulary of {vocab_size}{hint}.")


def _next_tokens(cfg: ModelConfig, tokens, next_tokens, with_mtp: bool):
    if not with_mtp:
        raise ValueError("next_tokens are for the MTP modules: give with_mtp=True as well.")
    next_tokens = integers("next_tokens", next_tokens, "[batch, length, MTP modules]")
    if next_tokens.shape != (*tokens.shape, cfg.mtp_depth):
        raise ValueError(f"next_tokens must have shape {(*tokens.shape, cfg.mtp_depth)}, not {next_tokens.shape}.")
    if known(next_tokens) and (largest := int(np.asarray(next_tokens).max())) >= cfg.vocab_size:
        raise ValueError(f"next_tokens hold {largest}, outside the vocabulary of {cfg.vocab_size}.")
    return next_tokens


def _check_experts(index_LBTK: np.ndarray, segments, n_experts: int) -> None:
    bad = (index_LBTK < -1) | (index_LBTK >= n_experts)
    if segments is not None and known(segments):
        bad &= (np.asarray(segments) != 0)[None, :, :, None]
    if bad.any():
        at = tuple(int(i) for i in np.argwhere(bad)[0])
        raise ValueError(
            f"routing{list(at)} is expert {index_LBTK[at]}, but there are {n_experts}, from 0; -1 stands for none."
        )


def check_knock_out(cfg: ModelConfig, without: KnockOut) -> None:
    """Raises ValueError for a `KnockOut` that does not fit the model, or leaves too few experts."""
    if cfg.moe is None:
        raise ValueError(f"routing=KnockOut, but {cfg.name} has no experts.")
    expected = (cfg.n_moe_layers, cfg.moe.n_experts)
    found = (getattr(without.expert_LE, "shape", None), getattr(without.expert_LE, "dtype", None))
    if found != (expected, np.dtype(bool)):
        raise ValueError(
            f"KnockOut expert_LE must be an array of bool, shape {expected}, [MoE layers, experts], not "
            f"{type(without.expert_LE).__name__} of {found[1]}, shape {found[0]}."
        )
    if not isinstance(without.top, int) or without.top < 0:
        raise ValueError(f"KnockOut top must be a number of experts, 0 or more, not {without.top!r}.")
    out = int(np.asarray(without.expert_LE).sum(-1).max()) if known(without.expert_LE) else 0
    if cfg.moe.n_experts - out - without.top < cfg.moe.top_k:
        raise ValueError(
            f"KnockOut leaves a layer {max(0, cfg.moe.n_experts - out - without.top)} of {cfg.moe.n_experts} experts, "
            f"fewer than the top_k={cfg.moe.top_k} that a token takes: knock out fewer."
        )


def check_embeddings(cfg: ModelConfig, embeddings, tokens, with_mtp: bool) -> None:
    """Raises ValueError for embeddings that do not stand for the tokens, or beside MTP modules, which look ids up."""
    if embeddings is None:
        return
    shape = (*tokens.shape, cfg.dim)
    if getattr(embeddings, "shape", None) != shape or not jnp.issubdtype(embeddings.dtype, jnp.floating):
        found = [getattr(embeddings, name, type(embeddings).__name__) for name in ("dtype", "shape")]
        raise ValueError(f"embeddings must be floats of shape {shape}, not {found[0]} of shape {found[1]}.")
    if with_mtp:
        raise ValueError("embeddings are given, but MTP modules look up the next tokens: leave with_mtp out.")


def check_windows(cfg: ModelConfig, positions, segments, cache, ctx: Context) -> None:
    """Raises ValueError for what compressed attention cannot do: its windows are runs of tokens from a segment's start
    on, which a row's device has to have whole."""
    if ctx.ops.splits_rows and cache is None:
        raise ValueError(
            f"the mesh splits rows over its axis 'context', but {cfg.name} compresses runs of a row's tokens, for "
            "which this is not built: give that axis size 1."
        )
    if positions is not None:
        raise ValueError(
            f"positions are given, but {cfg.name} compresses runs of tokens: they are counted from the start of each "
            "segment; leave positions out."
        )
    if ctx.attention in ("kernel", "hopper") and cache is None:
        raise ValueError(
            f'Context(attention="{ctx.attention}"): no kernel is built for the compressed attention of {cfg.name}; '
            'choose "auto" or "xla".'
        )
    if segments is None or not known(segments):
        return
    segments = np.asarray(segments)
    if cache is not None and segments.max() > 1:
        raise ValueError(
            f"segments go up to {segments.max()}, but in a cache {cfg.name} holds entries of one segment a row: give "
            "each text a row of its own."
        )
    if cache is None:
        begins = np.diff(segments, axis=1, prepend=0) != 0
        runs = (begins & (segments != 0)).sum(-1)
        for row, count in zip(segments, runs, strict=True):
            if count != len(set(row[row != 0].tolist())):
                raise ValueError(
                    f"a segment stands in several runs of a row, but {cfg.name} compresses runs of tokens: give every "
                    "run a segment of its own, and put padding before or behind it."
                )


def check_cache(cache, expected, tokens, segments) -> None:
    """Raises ValueError for a cache that is none, or is not like ``expected``, an empty one of its size for this model,
    or has no room for the tokens."""
    shapes = lambda cache: [a.shape for a in jax.tree.leaves(cache)]  # noqa: E731
    if shapes(cache) != shapes(expected):
        B = tokens.shape[0]
        raise ValueError(
            f"the cache's arrays have shapes {shapes(cache)}, this model and {B} rows need {shapes(expected)}."
        )
    T = tokens.shape[1]
    if segments is None and cache.capacity < T:
        raise ValueError(f"{T} tokens a row exceed the cache's length of {cache.capacity}.")
    if known(cache.length, *(() if segments is None else (segments,))):
        new = T if segments is None else (segments != 0).sum(-1)
        if (cache.length + new).max() > cache.capacity:
            raise ValueError(
                f"the cache holds {cache.length.tolist()} tokens of {cache.capacity} a row; {T} more do not fit."
            )


def check_cache_size(batch: int, length: int, rewind: int) -> None:
    if batch < 1 or length < 1 or not 0 <= rewind < length:
        raise ValueError(
            f"init_cache(batch={batch}, length={length}, rewind={rewind}): batch and length must be positive "
            "and rewind must lie in [0, length)."
        )


def check_context(ctx) -> Context:
    """``ctx``, or how a model runs by default. Raises ValueError for anything but a context."""
    if ctx is not None and not isinstance(ctx, Context):
        raise ValueError(f"ctx must be a dsj.Context(...), which has the mesh and more, not {type(ctx).__name__}.")
    return ctx or DEFAULT


def check_init(cfg, key, dtype) -> np.dtype:
    """The dtype of a fresh model's parameters. Raises ValueError for what is no config, key or dtype of weights."""
    if not isinstance(cfg, ModelConfig):
        raise ValueError(f"a model is made from a ModelConfig, such as dsj.zoo('tiny-v3'), not {cfg!r}.")
    is_key = hasattr(key, "dtype") and (jnp.issubdtype(key.dtype, jax.dtypes.prng_key) or key.dtype == np.uint32)
    if not is_key:
        raise ValueError(f"key must be a random key, such as jax.random.key(0), not {key!r}.")
    return check_dtype(dtype)


def check_dtype(dtype) -> np.dtype:
    """Raises ValueError for a dtype that parameters cannot have."""
    try:
        found = jnp.dtype(dtype)
    except TypeError:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, not {dtype!r}.") from None
    if found.name not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, not {found.name}.")
    return found


def check_new_config(old: ModelConfig, new) -> None:
    """Raises ValueError for a config that a model cannot be given: its layers have been built from the old one."""
    if not isinstance(new, ModelConfig):
        raise ValueError(f"a model's cfg must be a ModelConfig, not {type(new).__name__}.")
    changed = [f.name for f in fields(old) if getattr(old, f.name) != getattr(new, f.name)]
    if fixed := [name for name in changed if name not in LOOSE]:
        raise ValueError(
            f"{', '.join(fixed)} cannot be changed in a model: its layers have been built with the old values. Make "
            "another one, with dataclasses.replace(cfg, ...) and dsj.init, and give it these weights."
        )
