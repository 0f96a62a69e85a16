"""config.json of DeepSeek's own model_types: deepseek (V1, the 16B MoE), deepseek_v2, deepseek_v3, of which kimi_k2 is
one, and deepseek_v32.

The reference's defaults stand beside each field. ``norm_topk_prob`` of V1 and V2 is ignored by the reference and
honoured by DeepSeek's code: only the value of the released files is taken.
"""

from dataclasses import replace
from typing import Any

from deepseek_jax.configs import schema
from deepseek_jax.configs.checks import ConfigError
from deepseek_jax.configs.published.fields import (
    ALIASES,
    DEPTHS,
    GQA,
    INDEXER,
    MLA,
    MOE,
    MOST_LAID_OUT,
    MOST_MTP,
    Fields,
)
from deepseek_jax.configs.published.rope import read_rope, write_rope
from deepseek_jax.configs.published.tradition import (
    Networks,
    Tradition,
    check_following,
    head_size,
    streams_if_any,
    written,
)
from deepseek_jax.configs.schema import ModelConfig, MoE
from deepseek_jax.notes import shown

FIXED = {"attention_bias": False, "hidden_act": "silu", "moe_layer_freq": 1}
SOFTMAX = FIXED | {"scoring_func": "softmax", "norm_topk_prob": False}
# A choice of experts without groups, and by a group's best expert.
GREEDY, LIMITED = "greedy", "group_limited_greedy"


# --- Attention ----------------------------------------------------------------------------------------------------


def _v3_attention(fields: Fields) -> schema.MLA:
    return _mla(fields, fields.flag("rope_interleave", True))


def _v32_attention(fields: Fields) -> schema.MLA:
    # transformers says of every layer what the fields before say of all.
    kinds = fields.value("layer_types", None) or ()
    if set(kinds) - {"indexed_attention"}:
        raise ConfigError(f"config.json: layer_types {shown(kinds)} are not supported, only 'indexed_attention'.")
    networks, dense = fields.value("mlp_layer_types", None), fields.integer("first_k_dense_replace")
    if networks is not None and networks != ["dense"] * dense + ["sparse"] * (len(networks) - dense):
        raise fields.contradiction(f"mlp_layer_types is {shown(networks)}, but first_k_dense_replace is {dense}")
    read = {ours: fields.integer(theirs) for ours, theirs in INDEXER.items()}
    return _mla(fields, True, indexer=fields.make(schema.Indexer, **read))


def _mla(fields: Fields, interleaved: bool, **rest) -> schema.MLA:
    heads = fields.integer("num_attention_heads")
    attention = fields.make(
        schema.MLA,
        n_heads=heads,
        q_rank=fields.integer("q_lora_rank") if fields.value("q_lora_rank") is not None else None,
        kv_rank=fields.integer("kv_lora_rank"),
        nope_dim=fields.integer("qk_nope_head_dim"),
        rope_dim=fields.integer("qk_rope_head_dim"),
        v_dim=fields.integer("v_head_dim"),
        rope=read_rope(fields, ("default", "yarn"), interleaved),
        **rest,
    )
    qk = attention.nope_dim + attention.rope_dim
    check_following(
        fields,
        {
            "num_key_value_heads": (heads, "num_attention_heads"),
            "qk_head_dim": (qk, "qk_nope_head_dim + qk_rope_head_dim"),
        },
    )
    return attention


def _v1_attention(fields: Fields) -> schema.GQA:
    heads = fields.integer("num_attention_heads")
    key_heads = fields.integer("num_key_value_heads", None)
    return fields.make(
        schema.GQA,
        n_heads=heads,
        n_kv_heads=heads if key_heads is None else key_heads,
        head_dim=head_size(fields, heads),
        rope=read_rope(fields, ("default",), False),
    )


# --- Layers' networks ---------------------------------------------------------------------------------------------


def _shared(fields: Fields) -> int:
    return fields.integer("n_shared_experts") if fields.value("n_shared_experts") is not None else 0


def _v3_networks(fields: Fields, layers: int) -> Networks:
    depth = fields.integer("num_nextn_predict_layers", most=MOST_MTP)
    dense = fields.integer("first_k_dense_replace")
    if depth > 0 and layers <= dense < layers + depth:
        raise ConfigError(
            f"config.json: first_k_dense_replace {dense} makes all {layers} layers dense and an MTP layer "
            "MoE; an MTP layer is of the kind that ends the model."
        )
    moe = None
    if dense < layers or fields.value("n_routed_experts", None) is not None:
        moe = fields.make(
            MoE,
            n_experts=fields.integer("n_routed_experts", most=MOST_LAID_OUT),
            top_k=fields.integer("num_experts_per_tok", 8),
            expert_dim=fields.integer("moe_intermediate_size"),
            n_shared=_shared(fields),
            n_groups=fields.integer("n_group", 8),
            top_groups=fields.integer("topk_group", 4),
            normalize=fields.flag("norm_topk_prob", True),
            scale=fields.number("routed_scaling_factor", 2.5),
        )
    return Networks(min(dense, layers), moe, depth)


def _softmax_networks(fields: Fields, layers: int, **chosen) -> Networks:
    """V1's and V2's: softmax scores, not normalised again, no bias, a group as good as its best expert."""
    dense, moe = fields.integer("first_k_dense_replace"), None
    if dense < layers or fields.value("n_routed_experts", None) is not None:
        moe = fields.make(
            MoE,
            n_experts=fields.integer("n_routed_experts", most=MOST_LAID_OUT),
            top_k=fields.integer("num_experts_per_tok"),
            expert_dim=fields.integer("moe_intermediate_size"),
            n_shared=_shared(fields),
            normalize=False,
            score="softmax",
            group_score="max",
            bias=False,
            **chosen,
        )
    return Networks(min(dense, layers), moe)


def _v2_networks(fields: Fields, layers: int) -> Networks:
    method, groups = fields.value("topk_method", GREEDY), {}
    if method not in (GREEDY, LIMITED):
        raise ConfigError(
            f"config.json: topk_method {shown(method)} is not supported, only {GREEDY!r} and {LIMITED!r}."
        )
    if method == LIMITED:
        groups = {"n_groups": fields.integer("n_group"), "top_groups": fields.integer("topk_group")}
    scale = fields.number("routed_scaling_factor", 1.0)
    return _softmax_networks(fields, layers, scale=scale, **groups)


# --- Writing ------------------------------------------------------------------------------------------------------


def _depths(cfg: ModelConfig) -> dict[str, Any]:
    data = written(cfg, DEPTHS)
    if not cfg.n_moe_layers:  # a model that ends dense has dense MTP layers as well
        data["first_k_dense_replace"] = cfg.n_layers + cfg.mtp_depth
    return data


def _experts(cfg: ModelConfig, *but: str) -> dict[str, Any]:
    return {} if cfg.moe is None else {k: v for k, v in written(cfg.moe, MOE).items() if k not in but}


def _write_v3(cfg: ModelConfig) -> dict[str, Any]:
    a = cfg.attention
    data = _depths(cfg) | written(a, MLA) | {"num_key_value_heads": a.n_heads}
    data |= _experts(cfg, "scoring_func", "topk_method")
    return data | write_rope(a.rope) | {"rope_interleave": a.rope.interleaved}


def _write_v32(cfg: ModelConfig) -> dict[str, Any]:
    data = _write_v3(cfg)
    del data["rope_interleave"]
    return data | written(cfg.attention.indexer, INDEXER)


def _write_v2(cfg: ModelConfig) -> dict[str, Any]:
    a, moe = cfg.attention, cfg.moe
    data = {"first_k_dense_replace": _depths(cfg)["first_k_dense_replace"], **written(a, MLA)}
    data |= {"num_key_value_heads": a.n_heads} | _experts(cfg, "norm_topk_prob")
    if moe is not None:
        data["topk_method"] = LIMITED if moe.n_groups > 1 else GREEDY
    return data | write_rope(a.rope)


def _write_v1(cfg: ModelConfig) -> dict[str, Any]:
    data = {"first_k_dense_replace": _depths(cfg)["first_k_dense_replace"], **written(cfg.attention, GQA)}
    del data["head_dim"]
    data |= _experts(cfg, "n_group", "topk_group", "routed_scaling_factor", "topk_method", "norm_topk_prob")
    return data | write_rope(cfg.attention.rope)


_SIZES = {"rms_norm_eps": 1e-6, "tie_word_embeddings": False, "initializer_range": 0.02}
_COUNTED = {"first_k_dense_replace", "n_routed_experts", ALIASES["n_routed_experts"], "n_shared_experts"}
_COUNTED |= {"num_experts_per_tok", "moe_intermediate_size", "norm_topk_prob", "num_key_value_heads"}
_V2 = {*_COUNTED, *MLA.values(), *MOE.values(), "qk_head_dim"}
V3 = Tradition(
    architecture="DeepseekV3ForCausalLM",
    kind=schema.MLA,
    attention=_v3_attention,
    networks=_v3_networks,
    write=_write_v3,
    fixed=FIXED | {"scoring_func": "sigmoid", "topk_method": "noaux_tc"},
    residual=streams_if_any,
    known=frozenset({*_V2, *DEPTHS.values(), *ALIASES.values(), "rope_interleave"}),
    defaults=_SIZES | {"max_position_embeddings": 4096, "bos_token_id": 0, "eos_token_id": 1},
)
V32 = replace(
    V3,
    architecture="DeepseekV32ForCausalLM",
    attention=_v32_attention,
    write=_write_v32,
    fixed=V3.fixed | {"mlp_bias": False},
    known=V3.known - {"rope_interleave"} | {*INDEXER.values(), "layer_types", "mlp_layer_types"},
    defaults=_SIZES | {"max_position_embeddings": 163840, "bos_token_id": 0, "eos_token_id": 1},
)
V2 = Tradition(
    architecture="DeepseekV2ForCausalLM",
    kind=schema.MLA,
    attention=lambda fields: _mla(fields, True),
    networks=_v2_networks,
    write=_write_v2,
    fixed=SOFTMAX | {"mlp_bias": False},
    residual=streams_if_any,
    known=frozenset(_V2),
    defaults=_SIZES | {"max_position_embeddings": 2048, "bos_token_id": 1, "eos_token_id": 2},
)
V1 = Tradition(
    architecture="DeepseekForCausalLM",
    kind=schema.GQA,
    attention=_v1_attention,
    networks=_softmax_networks,
    write=_write_v1,
    fixed=SOFTMAX,
    residual=streams_if_any,
    known=frozenset({*_COUNTED, "num_attention_heads"}),
    # Those of the released files: no class of the reference reads this model_type.
    defaults=_SIZES | {"max_position_embeddings": 4096, "bos_token_id": 100000, "eos_token_id": 100001},
)
