"""The published config.json, both ways: `config_from_json` and `config_to_json`.

Two spellings are read, that of the released files (``rope_theta`` with ``rope_scaling``,
``num_nextn_predict_layers``, ``n_routed_experts``) and that of transformers 5 (``rope_parameters``,
``num_mtp_layers``, ``num_local_experts``); the first is written. A field that shapes a tensor has to be
there. Another that is missing has the value that transformers gives it, which is V3's.
"""

from dataclasses import fields as fields_of
from dataclasses import is_dataclass
from typing import Any

from deepseek_jax.configs.checks import ConfigError
from deepseek_jax.configs.json_fields import (
    ATTENTION,
    FIXED,
    IDLE,
    KNOWN,
    MODEL,
    MOE,
    MOST_LAID_OUT,
    MOST_MTP,
    YARN,
    Fields,
)
from deepseek_jax.configs.schema import MLA, ModelConfig, MoE, Rope, Yarn
from deepseek_jax.notes import shown

MODEL_TYPES = ("deepseek_v3", "kimi_k2")
ROPE_KEYS = {"default": ("type", "rope_type", "rope_theta", "partial_rotary_factor")}
ROPE_KEYS["yarn"] = (*ROPE_KEYS["default"], *YARN.values(), "attention_factor", "truncate")


def config_from_json(data: dict, name: str | None = None) -> ModelConfig:
    """The model that a published config.json describes. ``name``: what to call it; default its model_type.

    Raises ConfigError for a model_type or mechanism that is not built, a missing field that shapes a tensor,
    a field of the wrong type or too large, and fields that contradict each other, in the file's names. Fields that
    nothing reads are named in a `CheckpointWarning`; those that released files hold and no model needs are known.
    """
    fields = Fields(data)
    model_type = fields.value("model_type", None)
    if model_type not in MODEL_TYPES:
        raise ConfigError(
            f"config.json: model_type {shown(model_type)} is not supported; supported: {', '.join(MODEL_TYPES)}."
        )
    fields.note_unknown(KNOWN, IDLE)
    for field, built in FIXED.items():
        value = fields.value(field, built)
        if value != built:
            raise ConfigError(f"config.json: {field} {shown(value)} is not supported, only {built!r}.")
    attention = _attention(fields)
    layers = fields.integer("num_hidden_layers", most=MOST_LAID_OUT)
    depth = fields.integer("num_nextn_predict_layers", most=MOST_MTP)
    dense = fields.integer("first_k_dense_replace")
    if depth > 0 and layers <= dense < layers + depth:
        raise ConfigError(
            f"config.json: first_k_dense_replace {dense} makes all {layers} layers dense and an MTP layer "
            "MoE; an MTP layer is of the kind that ends the model."
        )
    has_moe = dense < layers or fields.value("n_routed_experts", None) is not None
    return fields.make(
        ModelConfig,
        name=name or model_type,
        vocab_size=fields.integer("vocab_size"),
        dim=fields.integer("hidden_size"),
        n_layers=layers,
        n_dense_layers=min(dense, layers),
        ffn_dim=fields.integer("intermediate_size"),
        attention=attention,
        moe=_moe(fields) if has_moe else None,
        mtp_depth=depth,
        norm_eps=fields.number("rms_norm_eps", 1e-6),
        max_length=fields.integer("max_position_embeddings", 4096),
        tie_embeddings=fields.flag("tie_word_embeddings", False),
        init_std=fields.number("initializer_range", 0.02),
        model_type=model_type,
        bos_id=fields.integer("bos_token_id", None) if "bos_token_id" in data else 0,
        eos_ids=eos_ids(fields.value("eos_token_id", 1), "config.json"),
    )


def eos_ids(value, file: str) -> tuple[int, ...]:
    """The tokens that end a text, from an ``eos_token_id``: an integer, a list of them, or null."""
    ids = tuple(value) if isinstance(value, list) else () if value is None else (value,)
    for i in ids:
        if not isinstance(i, int) or isinstance(i, bool):
            raise ConfigError(f"{file}: eos_token_id must hold integers, not {shown(value)}.")
    return ids


def _attention(fields: Fields) -> MLA:
    heads = fields.integer("num_attention_heads")
    attention = fields.make(
        MLA,
        n_heads=heads,
        q_rank=fields.integer("q_lora_rank") if fields.value("q_lora_rank") is not None else None,
        kv_rank=fields.integer("kv_lora_rank"),
        nope_dim=fields.integer("qk_nope_head_dim"),
        rope_dim=fields.integer("qk_rope_head_dim"),
        v_dim=fields.integer("v_head_dim"),
        rope=_rope(fields),
    )
    qk = attention.nope_dim + attention.rope_dim
    for name, follows, why in (
        ("num_key_value_heads", heads, "num_attention_heads"),
        ("qk_head_dim", qk, "qk_nope_head_dim + qk_rope_head_dim"),
    ):
        value = fields.integer(name, None)
        if value is not None and value != follows:
            raise ConfigError(f"config.json contradicts itself: {name} is {value}, but {why} is {follows}.")
    return attention


def _moe(fields: Fields) -> MoE:
    return fields.make(
        MoE,
        n_experts=fields.integer("n_routed_experts", most=MOST_LAID_OUT),
        top_k=fields.integer("num_experts_per_tok", 8),
        expert_dim=fields.integer("moe_intermediate_size"),
        n_shared=fields.integer("n_shared_experts") if fields.value("n_shared_experts") is not None else 0,
        n_groups=fields.integer("n_group", 8),
        top_groups=fields.integer("topk_group", 4),
        normalize=fields.flag("norm_topk_prob", True),
        scale=fields.number("routed_scaling_factor", 2.5),
    )


def _rope(fields: Fields) -> Rope:
    """One of the two spellings; both, as transformers writes them for older readers, have to agree."""
    found = {}
    for spelling in ("rope_parameters", "rope_scaling"):
        if fields.value(spelling, None) is not None:
            found[spelling] = _rope_spelled(fields, Fields(fields.data[spelling], f"config.json {spelling}"))
    if len(set(found.values())) > 1:
        raise ConfigError(
            "config.json contradicts itself: rope_parameters and rope_scaling describe different RoPEs, "
            f"{shown(fields.data['rope_parameters'])} and {shown(fields.data['rope_scaling'])}."
        )
    for rope in found.values():
        return rope
    interleaved = fields.flag("rope_interleave", True)
    return fields.make(Rope, theta=fields.number("rope_theta", 10000.0), interleaved=interleaved)


def _rope_spelled(fields: Fields, rope: Fields) -> Rope:
    kinds = [rope.data[key] for key in ("rope_type", "type") if rope.data.get(key) is not None]
    if len(kinds) == 2 and kinds[0] != kinds[1]:
        raise ConfigError(
            f"{rope.where} contradicts itself: rope_type and type are {shown(kinds[0])} and {shown(kinds[1])}."
        )
    kind = kinds[0] if kinds else "default"
    if kind not in ("default", "yarn"):
        raise ConfigError(f"{rope.where}: rope type {shown(kind)} is not supported, only 'default' and 'yarn'.")
    rope.note_unknown(ROPE_KEYS[kind], frozenset())
    for name, built in (("attention_factor", None), ("truncate", True), ("partial_rotary_factor", 1.0)):
        value = rope.value(name, built)
        if value is not None and value != built:
            raise ConfigError(f"{rope.where}: {name} {shown(value)} is not supported.")
    theta = rope.number("rope_theta", None)
    outer = fields.number("rope_theta", None)
    if theta is not None and outer is not None and theta != outer:
        raise ConfigError(f"config.json contradicts itself: rope_theta is {outer} and, in {rope.where}, {theta}.")
    theta = next((t for t in (theta, outer) if t is not None), 10000.0)
    yarn = None
    if kind == "yarn":
        # Without mscale_all_dim the softmax is not scaled; 0 says so here as it does in the reference.
        yarn = rope.make(
            Yarn,
            factor=rope.number("factor"),
            original_length=rope.integer("original_max_position_embeddings"),
            beta_fast=rope.number("beta_fast", None) or 32.0,
            beta_slow=rope.number("beta_slow", None) or 1.0,
            mscale=rope.number("mscale", None) or 0.0,
            mscale_all_dim=rope.number("mscale_all_dim", None) or 0.0,
        )
    return fields.make(Rope, theta=theta, yarn=yarn, interleaved=fields.flag("rope_interleave", True))


def config_to_json(cfg: ModelConfig, quantization: dict | None = None) -> dict:
    """The published config.json of a model; ``quantization``: its quantization_config, if any.

    Raises ConfigError where reading it back would give another model: a config that the file cannot carry is not
    written as one that it can.
    """
    a, moe, rope = cfg.attention, cfg.moe, cfg.attention.rope
    data: dict[str, Any] = {"architectures": ["DeepseekV3ForCausalLM"]}
    data |= {theirs: getattr(cfg, ours) for ours, theirs in MODEL.items()}
    data |= {theirs: getattr(a, ours) for ours, theirs in ATTENTION.items()}
    data["num_key_value_heads"] = a.n_heads
    if not cfg.n_moe_layers:  # a model that ends dense has dense MTP layers as well
        data["first_k_dense_replace"] = cfg.n_layers + cfg.mtp_depth
    if moe is not None:
        data |= {theirs: getattr(moe, ours) for ours, theirs in MOE.items()}
    data |= FIXED | {"rope_theta": rope.theta, "rope_scaling": None, "rope_interleave": rope.interleaved}
    if rope.yarn is not None:
        scaling = {theirs: getattr(rope.yarn, ours) for ours, theirs in YARN.items()}
        data["rope_scaling"] = {"type": "yarn", **scaling}
    data["eos_token_id"] = cfg.eos_ids[0] if len(cfg.eos_ids) == 1 else list(cfg.eos_ids) or None
    if quantization is not None:
        data["quantization_config"] = quantization
    check_carried(cfg, data)
    return data


def check_carried(cfg: ModelConfig, data: dict) -> None:
    """Raises ConfigError, naming what differs, unless a config.json is read as ``cfg``."""
    try:
        again = config_from_json(data, cfg.name)
    except ConfigError as error:
        raise ConfigError(f"config.json cannot carry this model, which is not saved: {error}") from None
    if again != cfg:
        lost = "; ".join(_differences("", cfg, again)) or f"it is a {type(cfg).__name__}"
        raise ConfigError(
            f"config.json cannot carry this model, which is not saved: {lost}. What the file holds is said in "
            "deepseek_jax/configs/hf.py and json_fields.py."
        )


def _differences(where: str, ours, read) -> list[str]:
    """The fields in which a config differs from the one that its file would be read as."""
    if not is_dataclass(ours) or not is_dataclass(read):
        return [] if ours == read else [f"{where or 'it'} is {shown(ours)} and would be read as {shown(read)}"]
    found = []
    for field in fields_of(ours):
        name = f"{where}.{field.name}".lstrip(".")
        if not hasattr(read, field.name):
            found.append(f"{name} is {shown(getattr(ours, field.name))} and has no field in the file")
        else:
            found += _differences(name, getattr(ours, field.name), getattr(read, field.name))
    return found
