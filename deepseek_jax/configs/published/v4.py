"""config.json of deepseek_v4, in both its spellings.

Released files say of each layer how many tokens it compresses into one (``compress_ratios``, where MTP layers follow)
and how many layers come first whose experts a hash chooses (``num_hash_layers``). transformers 5 says of each layer
what kind it is (``layer_types``, ``mlp_layer_types``), has one rate a kind (``compress_rates``) and both RoPEs in
``rope_parameters``. What the first can say and both read is written so; transformers takes rates other than 4 and 128
in its own spelling only.

There is no ``intermediate_size``: no layer is dense.
"""

from typing import Any

from deepseek_jax.configs import schema
from deepseek_jax.configs.checks import ConfigError
from deepseek_jax.configs.published.fields import (
    COMPRESSED,
    HASHED,
    INDEXER,
    MOE,
    MOST_LAID_OUT,
    MOST_MTP,
    YARN,
    Fields,
)
from deepseek_jax.configs.published.rope import ROPE_KEYS
from deepseek_jax.configs.published.tradition import Networks, Tradition, check_following, streams, written
from deepseek_jax.configs.schema import ModelConfig, MoE, Rope, Yarn
from deepseek_jax.notes import note, shown

SLIDING, SPARSE, HEAVY = "sliding_attention", "compressed_sparse_attention", "heavily_compressed_attention"
HASH, TOP_K = "hash_moe", "moe"
# The only ratios that transformers knows where a file gives ratios.
KINDS = {0: SLIDING, 4: SPARSE, 128: HEAVY}
RATES = {SPARSE: 4, HEAVY: 128}
# Another draft model than MTP layers, in the files of 2026-07 and later.
DSPARK = "dspark_"


def _attention(fields: Fields) -> schema.Compressed:
    heads, head_dim = fields.integer("num_attention_heads"), fields.integer("head_dim")
    ratios, sparse = _ratios(fields)
    rope_dim = _rope_dim(fields, head_dim)
    rope, entry_rope = _ropes(fields, rope_dim, head_dim)
    attention = fields.make(
        schema.Compressed,
        n_heads=heads,
        head_dim=head_dim,
        rope_dim=rope_dim,
        q_rank=fields.integer("q_lora_rank"),
        o_groups=fields.integer("o_groups"),
        o_rank=fields.integer("o_lora_rank"),
        window=fields.integer("sliding_window", 128),
        ratios=ratios,
        indexer=fields.make(schema.Indexer, **{ours: fields.integer(theirs) for ours, theirs in INDEXER.items()}),
        sparse_ratio=sparse,
        rope=rope,
        entry_rope=entry_rope,
    )
    check_following(fields, {"num_key_value_heads": (1, "the number of keys that all heads share")})
    return attention


def _ratios(fields: Fields) -> tuple[tuple[int, ...], int]:
    """Each layer's ratio, and which of them is the sparse one."""
    layers, found = fields.integer("num_hidden_layers", most=MOST_LAID_OUT), {}
    own = fields.value("compress_rates", None)
    rates = Fields({} if own is None else own, f"{fields.where} compress_rates")
    rates = {kind: rates.integer(kind, rate) for kind, rate in RATES.items()}
    for kind, name in ((SPARSE, "compress_rate_csa"), (HEAVY, "compress_rate_hca")):
        rates[kind] = fields.integer(name, rates[kind])
    if (listed := fields.value("compress_ratios", None)) is not None:
        if not isinstance(listed, list) or not all(type(n) is int for n in listed) or len(listed) < layers:
            raise ConfigError(
                f"{fields.where}: compress_ratios must be a list of integers, one for each of the "
                f"num_hidden_layers {layers} and each MTP layer, not {shown(listed)}."
            )
        if any(listed[layers:]):
            raise ConfigError(
                f"{fields.where}: compress_ratios {shown(listed[layers:])} of MTP layers are not supported, only 0."
            )
        found["compress_ratios"] = tuple(listed[:layers])
    if (kinds := fields.value("layer_types", None)) is not None:
        if not isinstance(kinds, list) or len(kinds) < layers or any(kind not in KINDS.values() for kind in kinds):
            raise ConfigError(
                f"{fields.where}: layer_types must name one of {', '.join(KINDS.values())} for each of the "
                f"num_hidden_layers {layers}, not {shown(kinds)}."
            )
        if min(rates.values()) < 1 or rates[SPARSE] == rates[HEAVY]:
            raise ConfigError(f"{fields.where}: compress_rates {shown(rates)} must be positive and differ.")
        found["layer_types"] = tuple(rates.get(kind, 0) for kind in kinds[:layers])
    if not found:
        raise ConfigError(f"{fields.where} lacks compress_ratios, which the shapes of the tensors depend on.")
    if len(set(found.values())) > 1:
        raise fields.contradiction("compress_ratios and layer_types describe different layers")
    return found.popitem()[1], rates[SPARSE]


def _rope_dim(fields: Fields, head_dim: int) -> int:
    """How many dimensions are rotated: a number, or a share of the head."""
    share, size = fields.number("partial_rotary_factor", None), fields.integer("qk_rope_head_dim", None)
    if share is None and size is None:
        raise ConfigError(f"{fields.where} lacks qk_rope_head_dim, which the meaning of the tensors depends on.")
    if share is None:
        return size
    part = round(share * head_dim)
    if size not in (None, part):
        raise fields.contradiction(f"qk_rope_head_dim is {size}, but partial_rotary_factor of head_dim is {part}")
    return part


def _ropes(fields: Fields, rope_dim: int, head_dim: int) -> tuple[Rope, Rope]:
    """Of layers without entries, and of those with."""
    main, entries = fields.number("rope_theta", 10000.0), fields.number("compress_rope_theta", 160000.0)
    flat, nested = None, fields.value("rope_parameters", None)
    if isinstance(nested, dict) and not {"main", "compress"} <= set(nested):
        flat, nested = nested, None
    old = fields.value("rope_scaling", None)
    spelled = [(fields.where + " rope_scaling", old), (fields.where + " rope_parameters", flat)]
    found = {_yarn(Fields(data, where), False) for where, data in spelled if data is not None}
    ropes = {(Rope(main), Rope(entries, yarn)) for yarn in found or ({None} if nested is None else ())}
    if nested is not None:
        pair = []
        for label, theta in (("main", main), ("compress", entries)):
            one = Fields(nested[label], f"{fields.where} rope_parameters {label}")
            own, share = one.number("rope_theta", theta), one.number("partial_rotary_factor", 1.0)
            if round(share * head_dim) != rope_dim:
                raise one.contradiction(f"partial_rotary_factor {share} of head_dim {head_dim} is not {rope_dim}")
            yarn = _yarn(one, True)
            if label == "main" and yarn is not None:
                raise ConfigError(f"{one.where}: rope type 'yarn' is not supported, only 'default'.")
            pair.append(one.make(Rope, theta=own, yarn=yarn))
        ropes.add(tuple(pair))
    if len(ropes) > 1:
        raise fields.contradiction("rope_parameters, rope_scaling and the thetas describe different RoPEs")
    return ropes.pop()


def _yarn(rope: Fields, has_factor: bool) -> Yarn | None:
    """The extension of what layers with entries rotate; cos and sin are not scaled, nor is the softmax.

    ``has_factor``: whether transformers would scale cos and sin unless the file says otherwise.
    """
    kind = next((rope.data[key] for key in ("rope_type", "type") if rope.data.get(key) is not None), "default")
    if kind not in ("default", "yarn"):
        raise ConfigError(f"{rope.where}: rope type {shown(kind)} is not supported, only 'default' and 'yarn'.")
    rope.note_unknown(ROPE_KEYS[kind], frozenset())
    if kind == "default":
        return None
    factor = rope.number("attention_factor", None)
    if factor != 1.0 and (has_factor or factor is not None):
        raise ConfigError(f"{rope.where}: attention_factor {shown(factor)} is not supported, only 1.0.")
    if not rope.flag("truncate", True):
        raise ConfigError(f"{rope.where}: truncate False is not supported.")
    return rope.make(
        Yarn,
        factor=rope.number("factor"),
        original_length=rope.integer("original_max_position_embeddings"),
        beta_fast=rope.number("beta_fast", None) or 32.0,
        beta_slow=rope.number("beta_slow", None) or 1.0,
    )


def _networks(fields: Fields, layers: int) -> Networks:
    n_hash, kinds = fields.integer("num_hash_layers", None), fields.value("mlp_layer_types", None)
    if kinds is not None:
        first = kinds.count(HASH) if isinstance(kinds, list) else 0
        if kinds != [HASH] * first + [TOP_K] * (layers - first):
            raise ConfigError(
                f"{fields.where}: mlp_layer_types must name {HASH} for the first layers and {TOP_K} for the rest of "
                f"the num_hidden_layers {layers}, not {shown(kinds)}."
            )
        if n_hash not in (None, first):
            raise fields.contradiction(f"num_hash_layers is {n_hash}, but mlp_layer_types has {first} {HASH}")
        n_hash = first
    if n_hash is None:
        raise ConfigError(f"{fields.where} lacks num_hash_layers, which the shapes of the tensors depend on.")
    moe = fields.make(
        MoE,
        n_experts=fields.integer("n_routed_experts", most=MOST_LAID_OUT),
        top_k=fields.integer("num_experts_per_tok", 6),
        expert_dim=fields.integer("moe_intermediate_size"),
        scale=fields.number("routed_scaling_factor", 1.5),
        score=fields.value("scoring_func", "sqrtsoftplus"),
        n_hash=n_hash,
        limit=fields.number("swiglu_limit", 10.0),
    )
    return Networks(0, moe, _mtp_depth(fields))


def _mtp_depth(fields: Fields) -> int:
    if drafts := [name for name in fields.data if name.startswith(DSPARK)]:
        note(
            f"{fields.where}: {', '.join(drafts[:3])}: DSpark, the draft model of these files, is not built; the model "
            "itself is read, without drafts."
        )
        return 0
    return fields.integer("num_nextn_predict_layers", most=MOST_MTP)


def _write(cfg: ModelConfig) -> dict[str, Any]:
    a, moe = cfg.attention, cfg.moe
    data = written(a, COMPRESSED) | written(a.indexer, INDEXER) | {"num_nextn_predict_layers": cfg.mtp_depth}
    data |= {"num_key_value_heads": 1, "compress_ratios": [*a.ratios, *[0] * cfg.mtp_depth]}
    rates = {kind: ratio for ratio, kind in zip(_rates(a), (SPARSE, HEAVY), strict=True) if ratio}
    if not set(a.ratios) <= set(KINDS) and len({*a.ratios} - {0, *rates.values()}) == 0:
        del data["compress_ratios"]
        kinds = {0: SLIDING, **{ratio: kind for kind, ratio in rates.items()}}
        data |= {"layer_types": [kinds[ratio] for ratio in a.ratios], "compress_rates": RATES | rates}
    if moe is not None:
        but = ("n_groups", "top_groups", "group_score", "n_shared", "normalize")
        data |= {theirs: getattr(moe, ours) for ours, theirs in MOE.items() if ours not in but} | written(moe, HASHED)
    yarn = a.entry_rope.yarn
    scaling = None if yarn is None else {"type": "yarn", **written(yarn, YARN)}
    for name in ("mscale", "mscale_all_dim") if scaling else ():
        del scaling[name]
    return data | {
        "rope_theta": a.rope.theta,
        "compress_rope_theta": a.entry_rope.theta,
        "rope_scaling": scaling,
    }


def _rates(a: schema.Compressed) -> tuple[int, int]:
    """The sparse ratio, and that of the layers which see all entries, 0 without any; of several the smallest."""
    return a.sparse_ratio, min((ratio for ratio in a.ratios if ratio not in (0, a.sparse_ratio)), default=0)


V4 = Tradition(
    architecture="DeepseekV4ForCausalLM",
    kind=schema.Compressed,
    attention=_attention,
    networks=_networks,
    write=_write,
    fixed={
        "attention_bias": False,
        "mlp_bias": False,
        "hidden_act": "silu",
        "norm_topk_prob": True,
        "topk_method": "noaux_tc",
        "n_shared_experts": 1,
    },
    known=frozenset(
        {
            *COMPRESSED.values(),
            *INDEXER.values(),
            *HASHED.values(),
            *("n_routed_experts", "num_local_experts", "num_experts_per_tok", "moe_intermediate_size"),
            *("routed_scaling_factor", "scoring_func", "num_nextn_predict_layers", "num_mtp_layers"),
            *("num_key_value_heads", "compress_rope_theta", "layer_types", "mlp_layer_types", "compress_rates"),
            *("compress_rate_csa", "compress_rate_hca", "partial_rotary_factor", "intermediate_size"),
            *("dspark_block_size", "dspark_noise_token_id", "dspark_target_layer_ids"),
        }
    ),
    defaults={
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
        "initializer_range": 0.02,
        "max_position_embeddings": 1048576,
        "bos_token_id": 0,
        "eos_token_id": 1,
    },
    ffn="moe_intermediate_size",
    residual=streams,
)
