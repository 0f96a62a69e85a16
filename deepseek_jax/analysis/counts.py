"""Exact counts of a model from its config alone: parameters, activated parameters, cache bytes, FLOPs.

Everything here is integer arithmetic on a `ModelConfig`; `deepseek_jax.analysis.shapes` counts the same
parameters on the real model's tree.
"""

from dataclasses import asdict, dataclass

from deepseek_jax.analysis.forms import cache_values, collapse_parameters, parameters, reads
from deepseek_jax.analysis.janus import components
from deepseek_jax.configs.multimodal import JanusConfig
from deepseek_jax.configs.schema import ModelConfig
from deepseek_jax.notes import shown

BF16_BYTES = 2


@dataclass(frozen=True)
class Counts:
    """What `counts` returns; every figure is an exact integer.

    Parameters, in elements. Like published totals, ``total`` leaves out the state of routers and MTP modules:

    - ``components``: component -> parameters; they add up to ``total``. ``attention`` has its own norms and biases;
      ``hyper_connections`` are what a residual of several streams has.
    - ``activated``: what one token multiplies with, input embedding and output head included.
      ``activated_no_embedding``: the same without the input embedding, which is a lookup.
    - ``attention_per_layer``, ``expert``, ``embedding``: one attention layer, of V4 the largest, one routed expert, one
      embedding.
    - ``router_bias``, ``hash_tables``: selection biases of the main model's routers and the entries of their tables,
      state rather than parameters.
    - ``mtp_components``, ``mtp``: what the MTP modules add. ``mtp_stored``: as published files hold them,
      each with its copies of the embedding and the head, which V4's lack. ``stored``: all weights of the published
      files, the state of routers included, scales not.

    Cache, in bytes, in bfloat16: ``kv_bytes`` of the main model after ``context`` tokens, ``kv_bytes_per_token`` for
    each of them, rounded up where they do not leave the same (V4's recent tokens and entries),
    ``kv_bytes_per_token_mtp`` more when MTP modules draft; ``kv_bytes_per_token_mha`` and
    ``kv_bytes_per_token_gqa8`` for the same layers and head sizes with as many key heads as query heads, and
    with 8. ``kv_values_per_token_layer``: elements (576 for V3), of V4 on average over layers, rounded up.

    FLOPs for each token, a multiply-add being two:

    - ``flops_per_token``: training. ``6 * activated_no_embedding`` plus causal attention, which sees half of
      ``context`` on average, or what an indexer chooses of it, whose scores count too, and in V4 the recent tokens
      and half of the entries; MTP modules, which a run may drop, and what is not a matrix (norms, the forming of
      entries, the mixing of streams) are not counted.
    - ``flops_per_token_mtp``: what training the MTP modules adds, their use of the head included.
    - ``forward_flops_per_token``: a third of the training figure: prefill, averaged over ``context`` tokens.
    - ``decode_flops_per_token``: one more token after ``context`` cached ones, of MLA in its absorbed form.
    """

    model: str
    context: int
    total: int
    activated: int
    activated_no_embedding: int
    components: dict[str, int]
    attention_per_layer: int
    expert: int
    embedding: int
    router_bias: int
    hash_tables: int
    mtp: int
    mtp_components: dict[str, int]
    mtp_router_bias: int
    mtp_stored: int
    stored: int
    kv_values_per_token_layer: int
    kv_bytes: int
    kv_bytes_per_token: int
    kv_bytes_per_token_mtp: int
    kv_bytes_per_token_mha: int
    kv_bytes_per_token_gqa8: int
    flops_per_token: int
    flops_per_token_mtp: int
    forward_flops_per_token: int
    decode_flops_per_token: int

    def as_dict(self) -> dict:
        """All figures as plain Python values, for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class JanusCounts:
    """What `counts` returns of a Janus; exact integers.

    ``language``: the language model's own counts. ``components``: component -> parameters of everything else, biases
    and norms included. ``shown``, ``drawn``: tokens of a picture that is shown, and codes of one that is drawn.
    """

    model: str
    language: Counts
    components: dict[str, int]
    shown: int
    drawn: int

    @property
    def total(self) -> int:
        """All parameters."""
        return sum(self.components.values()) + self.language.total

    def as_dict(self) -> dict:
        """All figures as plain Python values, for JSON."""
        return {**asdict(self), "total": self.total}


def counts(cfg: ModelConfig | JanusConfig, context: int = 4096) -> Counts | JanusCounts:
    """Counts a model. ``context``: tokens, the length at which FLOPs are counted. Of a Janus: `JanusCounts`.

    Conventions: V3 §4.2 for parameters, V2 table 1 for the cache. The FLOP formula is the one that gives the
    250 GFLOPs a token of V3 in "Insights into DeepSeek-V3" (2505.09343, table 2).

    Raises ValueError for what is no config and for a context that is not positive.
    """
    if not isinstance(cfg, ModelConfig | JanusConfig):
        raise ValueError(f"counts are of a ModelConfig, such as dsj.zoo('deepseek-v3'), not {shown(cfg)}.")
    if not isinstance(context, int) or context < 1:
        raise ValueError(f"context must be a positive number of tokens, not {shown(context)}.")
    if isinstance(cfg, JanusConfig):
        language = language_counts(cfg.language, context)
        return JanusCounts(cfg.name, language, components(cfg), cfg.vision.n_tokens, cfg.n_codes)
    return language_counts(cfg, context)


def language_counts(cfg: ModelConfig, context: int) -> Counts:
    """`counts` of a language model."""
    moe, layers, mtp_layer = cfg.moe, cfg.layers, cfg.mtp_layer
    embedding = cfg.vocab_size * cfg.dim
    attention = [parameters(layer.attention, cfg.dim) for layer in layers]
    expert = 3 * cfg.dim * moe.expert_dim if moe else 0
    idle_layer = (moe.n_experts - moe.top_k) * expert if moe else 0

    components = {
        "embedding": embedding,
        "attention": sum(attention),
        "dense_ffn": cfg.n_dense_layers * 3 * cfg.dim * cfg.ffn_dim,
        **_moe(cfg, cfg.n_moe_layers),
        "norms": (2 * cfg.n_layers + 1) * cfg.dim,
        "hyper_connections": _streams(cfg, cfg.n_layers, 1),
        "head": 0 if cfg.tie_embeddings else embedding,
    }
    total = sum(components.values())
    activated = total - cfg.n_moe_layers * idle_layer
    # A tied embedding is also the head, and as that it is multiplied with.
    no_embedding = activated if cfg.tie_embeddings else activated - embedding

    depth, mtp_moe = cfg.mtp_depth, cfg.mtp_depth if mtp_layer.is_moe else 0
    mtp_components = {
        "projection": depth * 2 * cfg.dim * cfg.dim,
        "attention": depth * parameters(mtp_layer.attention, cfg.dim),
        "dense_ffn": (depth - mtp_moe) * 3 * cfg.dim * cfg.ffn_dim,
        **_moe(cfg, mtp_moe),
        "norms": depth * 5 * cfg.dim,
        "hyper_connections": _streams(cfg, depth, depth),
    }
    mtp = sum(mtp_components.values())
    # Each stream is multiplied with its half of the projection.
    again = 0 if cfg.residual is None else (cfg.residual.n_streams - 1) * depth * cfg.dim * cfg.dim
    mtp_activated = mtp - mtp_moe * idle_layer + depth * embedding + again
    hashed = [layer.ffn.n_hash for layer in layers if layer.is_moe]
    biases, mtp_biases = (
        sum(layer.ffn.n_experts for layer in some if layer.is_moe and layer.ffn.bias)
        for some in (layers, depth * (mtp_layer,))
    )
    hash_tables = sum(hashed) * cfg.vocab_size * moe.top_k if moe else 0
    # MTP modules on streams are published without copies of the embedding and the head.
    mtp_stored = mtp + (depth * 2 * embedding if cfg.residual is None else 0)

    def cache(some, heads: int | None = None) -> int:
        return sum(cache_values(layer.attention, context, heads) for layer in some) * BF16_BYTES

    kv_bytes, n_heads = cache(layers), cfg.attention.n_heads
    forward = 2 * no_embedding + _causal(layers, context)
    decoding = sum(read.after(context) for layer in layers for read in reads(layer.attention, cached=True))
    return Counts(
        model=cfg.name,
        context=context,
        total=total,
        activated=activated,
        activated_no_embedding=no_embedding,
        components=components,
        attention_per_layer=max(attention),
        expert=expert,
        embedding=embedding,
        router_bias=biases,
        hash_tables=hash_tables,
        mtp=mtp,
        mtp_components=mtp_components,
        mtp_router_bias=mtp_biases,
        mtp_stored=mtp_stored,
        stored=total + mtp_stored + biases + mtp_biases + hash_tables,
        kv_values_per_token_layer=-(-kv_bytes // (BF16_BYTES * cfg.n_layers * context)),
        kv_bytes=kv_bytes,
        kv_bytes_per_token=-(-kv_bytes // context),
        kv_bytes_per_token_mtp=-(-cache(depth * (mtp_layer,)) // context),
        kv_bytes_per_token_mha=cache(layers, n_heads) // context,
        kv_bytes_per_token_gqa8=cache(layers, min(8, n_heads)) // context,
        flops_per_token=3 * forward,
        flops_per_token_mtp=3 * (2 * mtp_activated + _causal(depth * (mtp_layer,), context)),
        forward_flops_per_token=forward,
        decode_flops_per_token=2 * no_embedding + 2 * decoding,
    )


def _causal(layers, context: int) -> int:
    """FLOPs of a token with the keys before it in all layers, over ``context`` tokens on average."""
    return sum(read.flops(context) for layer in layers for read in reads(layer.attention))


def _streams(cfg: ModelConfig, layers: int, collapses: int) -> int:
    if cfg.residual is None:
        return 0
    return 2 * layers * parameters(cfg.residual, cfg.dim) + collapses * collapse_parameters(cfg.residual, cfg.dim)


def _moe(cfg: ModelConfig, layers: int) -> dict[str, int]:
    if cfg.moe is None:
        return {"routed_experts": 0, "shared_experts": 0, "router": 0}
    expert = 3 * cfg.dim * cfg.moe.expert_dim
    return {
        "routed_experts": layers * cfg.moe.n_experts * expert,
        "shared_experts": layers * 3 * cfg.dim * cfg.moe.shared_width,
        "router": layers * cfg.moe.n_experts * cfg.dim,
    }
