"""config.json of a Janus, both ways: DeepSeek's own files ("multi_modality") and transformers' ("janus").

A release of DeepSeek's names its towers by words, ``siglip_large_patch16_384`` and ``VQ-16``, which stand for sizes.
Another tower's sizes are written beside the word, under the names of `_VISION` and `_VQ`, and read there.
"""

from dataclasses import replace
from typing import Any

from deepseek_jax.configs.checks import ConfigError
from deepseek_jax.configs.hf import config_from_json, config_to_json, differences
from deepseek_jax.configs.multimodal import VQ, JanusConfig, Vision
from deepseek_jax.configs.published.fields import Fields
from deepseek_jax.configs.schema import ModelConfig
from deepseek_jax.notes import shown

SIGLIP, VQ_16 = "siglip_large_patch16_384", "VQ-16"
# Our field -> that of DeepSeek's params, where a size is not the word's.
_VISION = {"patch": "patch_size", "dim": "width", "n_layers": "layers", "n_heads": "heads", "ffn_dim": "mlp_width"}
_VQ = {"z_dim": "z_channels", "channels": "ch", "multipliers": "ch_mult", "n_blocks": "num_res_blocks"}
# Our field -> that of transformers' vision_config and vq_config.
_HF_VISION = {"image_size": "image_size", "patch": "patch_size", "dim": "hidden_size", "n_layers": "num_hidden_layers",
              "n_heads": "num_attention_heads", "norm_eps": "layer_norm_eps"}  # fmt: skip
_HF_VQ = {"n_codes": "num_embeddings", "code_dim": "embed_dim", "z_dim": "latent_channels", "channels": "base_channels",
          "multipliers": "channel_multiplier", "n_blocks": "num_res_blocks"}  # fmt: skip
_HF_FIXED = {
    "vision_config": {"hidden_act": "gelu", "use_qk_norm": False, "attention_bias": True, "num_channels": 3},
    "vq_config": {"hidden_act": "gelu", "double_latent": False, "in_channels": 3, "out_channels": 3},
}
# LlamaConfig's own, which DeepSeek's files leave out, and what ends and begins a text by its tokenizer.
_LANGUAGE = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32,
             "vocab_size": 32000, "bos_token_id": 100000, "eos_token_id": 100001}  # fmt: skip


def is_janus(data: dict) -> bool:
    """Whether a config.json is a Janus's."""
    kind = data.get("model_type")
    return isinstance(kind, str) and kind in READERS


def janus_from_json(data: dict, name: str | None = None) -> JanusConfig:
    """The Janus that a config.json describes. ``name``: what to call it; default its model_type.

    Raises ConfigError for another model_type, a missing size, a field of the wrong type, and what is not built: another
    activation, projector or layer of the tower than the releases have.
    """
    if not is_janus(data):
        raise ConfigError(
            f"config.json: model_type {shown(data.get('model_type'))} is no Janus's: {', '.join(READERS)}."
        )
    return READERS[data["model_type"]](data, name or data["model_type"])


def janus_to_json(cfg: JanusConfig) -> dict:
    """The config.json of a Janus in its tradition. Raises ConfigError where reading it back would give another one."""
    language = {k: v for k, v in config_to_json(cfg.language).items() if k != "architectures"}
    data = WRITERS[cfg.model_type](cfg, language)
    again = janus_from_json(data, cfg.name)
    if lost := differences("", named(cfg, cfg.name), again):
        raise ConfigError(f"config.json cannot carry this Janus, which is not saved: {'; '.join(lost)}.")
    return data


def named(cfg: JanusConfig, name: str) -> JanusConfig:
    """The config under another name, its language model's too."""
    return replace(cfg, name=name, language=replace(cfg.language, name=name))


def _read_deepseek(data: dict, name: str) -> JanusConfig:
    vision, aligner, codes, gen_aligner, head = (
        _part(data, f"{part}_config", cls, fixed)
        for part, cls, fixed in (
            ("vision", "CLIPVisionTower", {"model_name": SIGLIP, "select_feature": "same", "select_layer": -1}),
            ("aligner", "MlpProjector", {"projector_type": "mlp_gelu"}),
            ("gen_vision", VQ_16, {}),
            ("gen_aligner", "MlpProjector", {"projector_type": "mlp_gelu"}),
            ("gen_head", "vision_head", {}),
        )
    )
    language = _language(data, "language_config", name, _LANGUAGE)
    depths = [fields.integer("depth", 1) for fields in (aligner, gen_aligner)]
    widths = [fields.integer("n_embed") for fields in (aligner, gen_aligner, head)]
    _check_same("aligner_config and gen_aligner_config: depth", *depths)
    _check_same("n_embed of aligners and head, and hidden_size", *widths, language.dim)
    own, base = Vision(), VQ()
    return JanusConfig(
        name=name,
        language=language,
        vision=Vision(
            image_size=vision.integer("image_size", own.image_size),
            **{ours: vision.integer(theirs, getattr(own, ours)) for ours, theirs in _VISION.items()},
        ),
        vq=VQ(
            n_codes=codes.integer("image_token_size"),
            code_dim=codes.integer("n_embed"),
            multipliers=_numbers(codes, _VQ["multipliers"], base.multipliers),
            **{o: codes.integer(t, getattr(base, o)) for o, t in _VQ.items() if o != "multipliers"},
        ),
        head_dim=head.integer("image_token_embed"),
        depth=depths[0],
        image_id=Fields(data).integer("image_token_id", JanusConfig.image_id),
        model_type="multi_modality",
    )


def _write_deepseek(cfg: JanusConfig, language: dict) -> dict:
    dim, depth = cfg.language.dim, cfg.depth

    def part(kind: str, cls: str, **params) -> dict:
        return {"cls": cls, "model_type": kind, "params": params}

    def sizes(ours, names: dict[str, str]) -> dict:
        other = {
            theirs: getattr(ours, name)
            for name, theirs in names.items()
            if getattr(ours, name) != getattr(type(ours), name)
        }
        return {key: list(value) if isinstance(value, tuple) else value for key, value in other.items()}

    tower = {"model_name": SIGLIP, "select_feature": "same", "select_layer": -1}
    projector = {"depth": depth, "n_embed": dim, "projector_type": "mlp_gelu"}
    vision = {"image_size": cfg.vision.image_size, **tower, **sizes(cfg.vision, _VISION)}
    codes = {"image_token_size": cfg.vq.n_codes, "n_embed": cfg.vq.code_dim, **sizes(cfg.vq, _VQ)}
    head = {"image_token_embed": cfg.head_dim, "image_token_size": cfg.vq.n_codes, "n_embed": dim}
    return {
        "architectures": ["MultiModalityCausalLM"],
        "model_type": "multi_modality",
        "vision_config": part("vision", "CLIPVisionTower", **vision),
        "aligner_config": part("aligner", "MlpProjector", input_dim=cfg.vision.dim, **projector),
        "gen_vision_config": part("gen_vision", VQ_16, **codes),
        "gen_aligner_config": part("gen_aligner", "MlpProjector", input_dim=cfg.vq.code_dim, **projector),
        "gen_head_config": part("gen_head", "vision_head", **head),
        "language_config": language,
        "image_token_id": cfg.image_id,
    }


def _read_transformers(data: dict, name: str) -> JanusConfig:
    language = _language(data, "text_config", name, {})
    vision, vq = (_fixed(data, part, _HF_FIXED[part]) for part in _HF_FIXED)
    own = Vision()
    dim = vision.integer("hidden_size", own.dim)
    depths = vision.integer("depth", 2), vq.integer("num_hidden_layers", 2)
    head_dim = vq.integer("projection_dim", 2048)
    _check_same("vision_config depth and vq_config num_hidden_layers", *depths)
    widths = vision.integer("projection_dim", 2048), head_dim, vq.integer("image_token_embed_dim", 2048)
    _check_same("projection_dim, image_token_embed_dim and hidden_size", *widths, language.dim)
    return JanusConfig(
        name=name,
        language=language,
        vision=Vision(
            **{o: vision.integer(t, getattr(own, o)) for o, t in _HF_VISION.items() if o != "norm_eps"},
            norm_eps=vision.number("layer_norm_eps", own.norm_eps),
            ffn_dim=int(dim * vision.number("mlp_ratio", 4.0)),
        ),
        vq=VQ(
            **{o: vq.integer(t, getattr(VQ, o)) for o, t in _HF_VQ.items() if o != "multipliers"},
            multipliers=_numbers(vq, _HF_VQ["multipliers"], VQ.multipliers),
        ),
        head_dim=head_dim,
        depth=depths[0],
        image_id=Fields(data).integer("image_token_id", JanusConfig.image_id),
        model_type="janus",
    )


def _write_transformers(cfg: JanusConfig, language: dict) -> dict:
    dim = cfg.language.dim
    vision = {theirs: getattr(cfg.vision, ours) for ours, theirs in _HF_VISION.items()}
    vision |= {"mlp_ratio": cfg.vision.ffn_dim / cfg.vision.dim, "projection_dim": dim, "depth": cfg.depth}
    vq = {theirs: getattr(cfg.vq, ours) for ours, theirs in _HF_VQ.items()} | {
        "channel_multiplier": list(cfg.vq.multipliers),
        "num_patches": cfg.grid,
        "projection_dim": cfg.head_dim,
        "num_hidden_layers": cfg.depth,
        "image_token_embed_dim": dim,
    }
    return {
        "architectures": ["JanusForConditionalGeneration"],
        "model_type": "janus",
        "text_config": language,
        "vision_config": {
            "model_type": "janus_vision_model",
            "num_image_tokens": cfg.vision.n_tokens,
            **vision,
            **_HF_FIXED["vision_config"],
        },
        "vq_config": {"model_type": "janus_vqgan", **vq, **_HF_FIXED["vq_config"]},
        "image_token_id": cfg.image_id,
        "tie_word_embeddings": False,
    }


READERS = {"multi_modality": _read_deepseek, "janus": _read_transformers}
WRITERS = {"multi_modality": _write_deepseek, "janus": _write_transformers}


def _part(data: dict, part: str, cls: str, fixed: dict[str, Any]) -> Fields:
    """The params of a part of DeepSeek's file, which has to be of the class."""
    own = Fields(Fields(data).value(part), f"config.json {part}")
    if own.value("cls") != cls:
        raise ConfigError(f"config.json {part}: cls {shown(own.value('cls'))} is not built, only {cls!r}.")
    return _fixed(own.data, "params", fixed, f"config.json {part}")


def _fixed(data: dict, part: str, fixed: dict[str, Any], where: str = "config.json") -> Fields:
    """A part's fields; those of ``fixed`` have that value where they are there."""
    fields = Fields(Fields(data, where).value(part), f"{where} {part}")
    for name, built in fixed.items():
        if (value := fields.value(name, built)) != built:
            raise ConfigError(f"{where} {part}: {name} {shown(value)} is not built, only {built!r}.")
    return fields


def _language(data: dict, part: str, name: str, defaults: dict[str, Any]) -> ModelConfig:
    given = Fields(Fields(data).value(part), f"config.json {part}").data
    # Whether the head is tied the tensors say: transformers' default for the whole is another than for the part.
    return config_from_json(defaults | {"model_type": "llama"} | given | {"tie_word_embeddings": False}, name)


def _numbers(fields: Fields, name: str, default: tuple[int, ...]) -> tuple[int, ...]:
    value = fields.value(name, list(default))
    if not isinstance(value, list) or not all(type(n) is int for n in value):
        raise ConfigError(f"{fields.where}: {name} must be a list of integers, not {shown(value)}.")
    return tuple(value)


def _check_same(what: str, *values: int) -> None:
    if len(set(values)) > 1:
        raise ConfigError(f"config.json: {what} must be the same, not {', '.join(map(str, values))}.")
