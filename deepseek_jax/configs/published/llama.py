"""config.json of Llama's and Qwen2's model_types, which the dense releases and the distilled models have."""

from typing import Any

from deepseek_jax.configs import schema
from deepseek_jax.configs.checks import ConfigError
from deepseek_jax.configs.published.fields import GQA, Fields
from deepseek_jax.configs.published.rope import read_rope, write_rope
from deepseek_jax.configs.published.tradition import Networks, Tradition, head_size, written
from deepseek_jax.configs.schema import ModelConfig
from deepseek_jax.notes import shown

KINDS = ("default", "yarn", "llama3")


def _attention(fields: Fields, bias: bool) -> schema.GQA:
    heads, head_dim = fields.integer("num_attention_heads"), fields.integer("head_dim", None)
    key_heads = fields.integer("num_key_value_heads", None)
    return fields.make(
        schema.GQA,
        n_heads=heads,
        n_kv_heads=heads if key_heads is None else key_heads,
        head_dim=head_size(fields, heads) if head_dim is None else head_dim,
        bias=bias,
        rope=read_rope(fields, KINDS, False),
    )


def _llama_attention(fields: Fields) -> schema.GQA:
    return _attention(fields, False)


def _qwen2_attention(fields: Fields) -> schema.GQA:
    types = fields.value("layer_types", None)
    if types is not None and (not isinstance(types, list) or any(kind != "full_attention" for kind in types)):
        raise ConfigError(f"config.json: layer_types {shown(types)} are not supported, only 'full_attention'.")
    return _attention(fields, True)


def _write(cfg: ModelConfig) -> dict[str, Any]:
    return written(cfg.attention, GQA) | write_rope(cfg.attention.rope)


_KNOWN = frozenset({"num_attention_heads", "num_key_value_heads", "head_dim"})
_SIZES = {"rms_norm_eps": 1e-6, "tie_word_embeddings": False, "initializer_range": 0.02}
LLAMA = Tradition(
    architecture="LlamaForCausalLM",
    kind=schema.GQA,
    attention=_llama_attention,
    networks=lambda fields, layers: Networks(layers),
    write=_write,
    fixed={"attention_bias": False, "mlp_bias": False, "hidden_act": "silu"},
    known=_KNOWN,
    defaults=_SIZES | {"max_position_embeddings": 2048, "bos_token_id": 1, "eos_token_id": 2},
)
QWEN2 = Tradition(
    architecture="Qwen2ForCausalLM",
    kind=schema.GQA,
    attention=_qwen2_attention,
    networks=lambda fields, layers: Networks(layers),
    write=_write,
    fixed={"hidden_act": "silu", "use_sliding_window": False, "use_mrope": False},
    # Of the window, which is off.
    known=_KNOWN | {"layer_types", "sliding_window", "max_window_layers"},
    defaults=_SIZES | {"max_position_embeddings": 32768, "bos_token_id": None, "eos_token_id": None},
)
