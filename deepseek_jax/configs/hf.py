"""The published config.json, both ways: `config_from_json` and `config_to_json`.

Two spellings are read, that of the released files (``rope_theta`` with ``rope_scaling``,
``num_nextn_predict_layers``, ``n_routed_experts``) and that of transformers 5 (``rope_parameters``,
``num_mtp_layers``, ``num_local_experts``); the first is written. A field that shapes a tensor has to be
there. Another that is missing has the value that transformers gives it, which is V3's.
"""

import sys
from typing import Any

from deepseek_jax.configs.schema import MLA, ConfigError, ModelConfig, MoE, Rope, Yarn

MODEL_TYPES = ("deepseek_v3", "kimi_k2")
ALIASES = {"num_nextn_predict_layers": "num_mtp_layers", "n_routed_experts": "num_local_experts"}
ROPE_FIELDS = ("rope_theta", "rope_scaling", "rope_parameters")
YARN_FIELDS = (
    "type",
    "rope_type",
    "rope_theta",
    "factor",
    "original_max_position_embeddings",
    "beta_fast",
    "beta_slow",
    "mscale",
    "mscale_all_dim",
    "attention_factor",
    "truncate",
    "partial_rotary_factor",
)
# Fields with one value that is built; any other is refused.
FIXED = {
    "attention_bias": False,
    "hidden_act": "silu",
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "moe_layer_freq": 1,
}
# Axes are counted in 32 bits. Layers and experts are laid out one by one, so that far fewer exhaust the memory.
MOST = 2**31 - 1
MOST_LAID_OUT = 10_000


class _Fields:
    """Typed access to a JSON object; every refusal names the field and its value."""

    def __init__(self, data: dict, where: str = "config.json"):
        if not isinstance(data, dict):
            raise ConfigError(f"{where} must be a JSON object, not {type(data).__name__} ({data!r}).")
        self.data, self.where = data, where

    def value(self, name: str, *default) -> Any:
        """The field's value under either spelling; without a default a missing field is an error."""
        alias = ALIASES.get(name)
        if alias in self.data and name in self.data and self.data[alias] != self.data[name]:
            raise ConfigError(
                f"{self.where} contradicts itself: {name} is {self.data[name]!r}, {alias} {self.data[alias]!r}."
            )
        for spelling in (name, alias):
            if spelling in self.data:
                return self.data[spelling]
        if not default:
            raise ConfigError(f"{self.where} lacks {name}, which the shapes of the tensors depend on.")
        return default[0]

    def _typed(self, name: str, kinds: tuple[type, ...], kind: str, default):
        value = self.value(name, *default)
        if value is None and default and default[0] is None:
            return None
        # In Python a bool is an int.
        if not isinstance(value, kinds) or isinstance(value, bool) != (bool in kinds):
            raise ConfigError(f"{self.where}: {name} must be {kind}, not {value!r}.")
        return value

    def integer(self, name: str, *default, most: int = MOST) -> Any:
        value = self._typed(name, (int,), "an integer", default)
        if value is not None and value > most:
            raise ConfigError(f"{self.where}: {name} must be at most {most}; a larger one is not built.")
        return value

    def number(self, name: str, *default) -> Any:
        value = self._typed(name, (int, float), "a number", default)
        # An integer of JSON has any length, a float of Python's JSON may be NaN or Infinity.
        if value is not None and not abs(value) <= sys.float_info.max:
            raise ConfigError(f"{self.where}: {name} must be a finite number, not {str(value)[:20]}.")
        return value if value is None else float(value)

    def flag(self, name: str, *default) -> Any:
        return self._typed(name, (bool,), "true or false", default)


def config_from_json(data: dict, name: str | None = None) -> ModelConfig:
    """The model that a published config.json describes. ``name``: what to call it; default its model_type.

    Raises ConfigError for a model_type or mechanism that is not built, a missing field that shapes a tensor,
    a field of the wrong type or too large, and fields that contradict each other.
    """
    fields = _Fields(data)
    model_type = fields.value("model_type", None)
    if model_type not in MODEL_TYPES:
        raise ConfigError(
            f"config.json: model_type {model_type!r} is not supported; supported: {', '.join(MODEL_TYPES)}."
        )
    for field, built in FIXED.items():
        value = fields.value(field, built)
        if value != built:
            raise ConfigError(f"config.json: {field} {value!r} is not supported, only {built!r}.")
    attention = _attention(fields)
    layers = fields.integer("num_hidden_layers", most=MOST_LAID_OUT)
    depth = fields.integer("num_nextn_predict_layers", most=MOST_LAID_OUT)
    dense = fields.integer("first_k_dense_replace")
    if depth > 0 and layers <= dense < layers + depth:
        raise ConfigError(
            f"config.json: first_k_dense_replace {dense} makes all {layers} layers dense and an MTP layer "
            "MoE; an MTP layer is of the kind that ends the model."
        )
    has_moe = dense < layers or fields.value("n_routed_experts", None) is not None
    return ModelConfig(
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
            raise ConfigError(f"{file}: eos_token_id must hold integers, not {value!r}.")
    return ids


def _attention(fields: _Fields) -> MLA:
    heads = fields.integer("num_attention_heads")
    attention = MLA(
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


def _moe(fields: _Fields) -> MoE:
    return MoE(
        n_experts=fields.integer("n_routed_experts", most=MOST_LAID_OUT),
        top_k=fields.integer("num_experts_per_tok", 8),
        expert_dim=fields.integer("moe_intermediate_size"),
        n_shared=fields.integer("n_shared_experts") if fields.value("n_shared_experts") is not None else 0,
        n_groups=fields.integer("n_group", 8),
        top_groups=fields.integer("topk_group", 4),
        normalize=fields.flag("norm_topk_prob", True),
        scale=fields.number("routed_scaling_factor", 2.5),
    )


def _rope(fields: _Fields) -> Rope:
    """One of the two spellings; both, as transformers writes them for older readers, have to agree."""
    found = {}
    for spelling in ("rope_parameters", "rope_scaling"):
        if fields.value(spelling, None) is not None:
            found[spelling] = _rope_spelled(fields, _Fields(fields.data[spelling], f"config.json {spelling}"))
    if len(set(found.values())) > 1:
        raise ConfigError(
            "config.json contradicts itself: rope_parameters and rope_scaling describe different RoPEs, "
            f"{fields.data['rope_parameters']!r} and {fields.data['rope_scaling']!r}."
        )
    for rope in found.values():
        return rope
    interleaved = fields.flag("rope_interleave", True)
    return Rope(fields.number("rope_theta", 10000.0), interleaved=interleaved)


def _rope_spelled(fields: _Fields, rope: _Fields) -> Rope:
    unknown = sorted(set(rope.data) - set(YARN_FIELDS))
    if unknown:
        raise ConfigError(f"{rope.where}: unknown fields {', '.join(unknown)}; known are {', '.join(YARN_FIELDS)}.")
    kinds = [rope.data[key] for key in ("rope_type", "type") if rope.data.get(key) is not None]
    if len(kinds) == 2 and kinds[0] != kinds[1]:
        raise ConfigError(f"{rope.where} contradicts itself: rope_type and type are {kinds[0]!r} and {kinds[1]!r}.")
    kind = kinds[0] if kinds else "default"
    if kind not in ("default", "yarn"):
        raise ConfigError(f"{rope.where}: rope type {kind!r} is not supported, only 'default' and 'yarn'.")
    for name, built in (("attention_factor", None), ("truncate", True), ("partial_rotary_factor", 1.0)):
        value = rope.value(name, built)
        if value is not None and value != built:
            raise ConfigError(f"{rope.where}: {name} {value!r} is not supported.")
    theta = rope.number("rope_theta", None)
    outer = fields.number("rope_theta", None)
    if theta is not None and outer is not None and theta != outer:
        raise ConfigError(f"config.json contradicts itself: rope_theta is {outer} and, in {rope.where}, {theta}.")
    theta = next((t for t in (theta, outer) if t is not None), 10000.0)
    yarn = None
    if kind == "yarn":
        # Without mscale_all_dim the softmax is not scaled; 0 says so here as it does in the reference.
        yarn = Yarn(
            factor=rope.number("factor"),
            original_length=rope.integer("original_max_position_embeddings"),
            beta_fast=rope.number("beta_fast", None) or 32.0,
            beta_slow=rope.number("beta_slow", None) or 1.0,
            mscale=rope.number("mscale", None) or 0.0,
            mscale_all_dim=rope.number("mscale_all_dim", None) or 0.0,
        )
    return Rope(theta, yarn, fields.flag("rope_interleave", True))


def config_to_json(cfg: ModelConfig, quantization: dict | None = None) -> dict:
    """The published config.json of a model; ``quantization``: its quantization_config, if any."""
    a, moe, yarn = cfg.attention, cfg.moe, cfg.attention.rope.yarn
    data = {
        "architectures": ["DeepseekV3ForCausalLM"],
        "model_type": cfg.model_type,
        "vocab_size": cfg.vocab_size,
        "hidden_size": cfg.dim,
        "intermediate_size": cfg.ffn_dim,
        "num_hidden_layers": cfg.n_layers,
        "num_nextn_predict_layers": cfg.mtp_depth,
        # A model that ends dense has dense MTP layers as well.
        "first_k_dense_replace": cfg.n_dense_layers if cfg.n_moe_layers else cfg.n_layers + cfg.mtp_depth,
        "num_attention_heads": a.n_heads,
        "num_key_value_heads": a.n_heads,
        "q_lora_rank": a.q_rank,
        "kv_lora_rank": a.kv_rank,
        "qk_nope_head_dim": a.nope_dim,
        "qk_rope_head_dim": a.rope_dim,
        "v_head_dim": a.v_dim,
    }
    if moe is not None:
        data |= {
            "n_routed_experts": moe.n_experts,
            "n_shared_experts": moe.n_shared,
            "num_experts_per_tok": moe.top_k,
            "moe_intermediate_size": moe.expert_dim,
            "n_group": moe.n_groups,
            "topk_group": moe.top_groups,
            "norm_topk_prob": moe.normalize,
            "routed_scaling_factor": moe.scale,
        }
    scaling = None
    if yarn is not None:
        scaling = {
            "type": "yarn",
            "factor": yarn.factor,
            "original_max_position_embeddings": yarn.original_length,
            "beta_fast": yarn.beta_fast,
            "beta_slow": yarn.beta_slow,
            "mscale": yarn.mscale,
            "mscale_all_dim": yarn.mscale_all_dim,
        }
    data |= FIXED | {
        "rope_theta": a.rope.theta,
        "rope_scaling": scaling,
        "rope_interleave": a.rope.interleaved,
        "rms_norm_eps": cfg.norm_eps,
        "max_position_embeddings": cfg.max_length,
        "tie_word_embeddings": cfg.tie_embeddings,
        "initializer_range": cfg.init_std,
        "bos_token_id": cfg.bos_id,
        "eos_token_id": cfg.eos_ids[0] if len(cfg.eos_ids) == 1 else list(cfg.eos_ids) or None,
    }
    if quantization is not None:
        data["quantization_config"] = quantization
    return data
