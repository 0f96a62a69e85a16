"""The published config.json, both ways: `config_from_json` and `config_to_json`.

Two spellings are read, that of the released files (``rope_theta`` with ``rope_scaling``,
``num_nextn_predict_layers``, ``n_routed_experts``) and that of transformers 5 (``rope_parameters``,
``num_mtp_layers``, ``num_local_experts``); the first is written. A field that shapes a tensor has to be
there. Another that is missing has the value that transformers gives it. What the files of a model_type hold is said in
`deepseek_jax/configs/published`, a file a naming tradition.
"""

from dataclasses import fields as fields_of
from dataclasses import is_dataclass
from typing import Any

from deepseek_jax.configs.checks import ConfigError
from deepseek_jax.configs.published import deepseek, llama, v4
from deepseek_jax.configs.published.fields import IDLE, MODEL, MOST_LAID_OUT, Fields
from deepseek_jax.configs.published.tradition import written, written_streams
from deepseek_jax.configs.schema import ModelConfig
from deepseek_jax.notes import shown

TRADITIONS = {
    "deepseek_v3": deepseek.V3,
    "kimi_k2": deepseek.V3,
    "deepseek_v32": deepseek.V32,
    "deepseek_v4": v4.V4,
    "deepseek_v2": deepseek.V2,
    "deepseek": deepseek.V1,
    "llama": llama.LLAMA,
    "qwen2": llama.QWEN2,
}
JANUS = ("multi_modality", "janus")
NOT_BUILT = {"deepseek_v41": "DeepSeek-V4.1, another architecture (a causal encoder-decoder with Engram tables)"}


def config_from_json(data: dict, name: str | None = None) -> ModelConfig:
    """The model that a published config.json describes. ``name``: what to call it; default its model_type.

    Raises ConfigError for a model_type or mechanism that is not built, a missing field that shapes a tensor,
    a field of the wrong type or too large, and fields that contradict each other, in the file's names. Fields that
    nothing reads are named in a `CheckpointWarning`; those that released files hold and no model needs are known.
    """
    fields = Fields(data)
    model_type = fields.value("model_type", None)
    if isinstance(model_type, str) and model_type in NOT_BUILT:
        raise ConfigError(f"config.json: model_type {model_type} is {NOT_BUILT[model_type]}, which is not built.")
    if isinstance(model_type, str) and model_type in JANUS:
        raise ConfigError(
            f"config.json: model_type {model_type} is a Janus, not a language model alone: dsj.load_pretrained loads "
            "it, and the commands generate, draw, score, summary and verify take it."
        )
    if not isinstance(model_type, str) or model_type not in TRADITIONS:
        raise ConfigError(
            f"config.json: model_type {shown(model_type)} is not supported; supported: {', '.join(TRADITIONS)}."
        )
    tradition = TRADITIONS[model_type]
    fields.note_unknown(tradition.fields, IDLE)
    for field, built in tradition.fixed.items():
        value = fields.value(field, built)
        if value != built:
            raise ConfigError(f"config.json: {field} {shown(value)} is not supported, only {built!r}.")
    attention = tradition.attention(fields)
    layers = fields.integer("num_hidden_layers", most=MOST_LAID_OUT)
    networks, default = tradition.networks(fields, layers), tradition.defaults
    return fields.make(
        ModelConfig,
        name=name or model_type,
        vocab_size=fields.integer("vocab_size"),
        dim=fields.integer("hidden_size"),
        n_layers=layers,
        n_dense_layers=networks.dense,
        ffn_dim=fields.integer(tradition.ffn),
        attention=attention,
        moe=networks.moe,
        mtp_depth=networks.mtp_depth,
        norm_eps=fields.number("rms_norm_eps", default["rms_norm_eps"]),
        max_length=fields.integer("max_position_embeddings", default["max_position_embeddings"]),
        tie_embeddings=fields.flag("tie_word_embeddings", default["tie_word_embeddings"]),
        init_std=fields.number("initializer_range", default["initializer_range"]),
        model_type=model_type,
        bos_id=fields.integer("bos_token_id", None) if "bos_token_id" in data else default["bos_token_id"],
        eos_ids=eos_ids(fields.value("eos_token_id", default["eos_token_id"]), "config.json"),
        residual=None if tradition.residual is None else tradition.residual(fields),
    )


def reads(data: dict, field: str) -> bool:
    """Whether files of this one's model_type have a field that is read; of an unknown model_type, none."""
    tradition = TRADITIONS.get(str(data.get("model_type")))
    return tradition is not None and field in tradition.fields


def eos_ids(value, file: str) -> tuple[int, ...]:
    """The tokens that end a text, from an ``eos_token_id``: an integer, a list of them, or null."""
    ids = tuple(value) if isinstance(value, list) else () if value is None else (value,)
    for i in ids:
        if not isinstance(i, int) or isinstance(i, bool):
            raise ConfigError(f"{file}: eos_token_id must hold integers, not {shown(value)}.")
    return ids


def config_to_json(cfg: ModelConfig, quantization: dict | None = None) -> dict:
    """The published config.json of a model; ``quantization``: its quantization_config, if any.

    Raises ConfigError where reading it back would give another model: a config that the file cannot carry is not
    written as one that it can.
    """
    tradition = TRADITIONS.get(cfg.model_type)
    if tradition is None:
        raise ConfigError(
            f"config.json cannot carry this model, which is not saved: model_type {shown(cfg.model_type)} is not "
            f"supported; supported: {', '.join(TRADITIONS)}."
        )
    if not isinstance(cfg.attention, tradition.kind):
        raise ConfigError(
            f"config.json cannot carry this model, which is not saved: a model of model_type {cfg.model_type} has "
            f"{tradition.kind.__name__}, not {type(cfg.attention).__name__}; give the config another model_type."
        )
    data: dict[str, Any] = {"architectures": [tradition.architecture]}
    data |= written(cfg, MODEL | {"ffn_dim": tradition.ffn}) | tradition.write(cfg) | tradition.fixed
    if tradition.residual is not None:
        data |= written_streams(cfg.residual)
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
        lost = "; ".join(differences("", cfg, again)) or f"it is a {type(cfg).__name__}"
        raise ConfigError(
            f"config.json cannot carry this model, which is not saved: {lost}. What the file holds is said in "
            "deepseek_jax/configs/hf.py and published/."
        )


def differences(where: str, ours, read) -> list[str]:
    """The fields in which a config differs from the one that its file would be read as."""
    if not is_dataclass(ours) or not is_dataclass(read):
        return [] if ours == read else [f"{where or 'it'} is {shown(ours)} and would be read as {shown(read)}"]
    found = []
    for field in fields_of(ours):
        name = f"{where}.{field.name}".lstrip(".")
        if not hasattr(read, field.name):
            found.append(f"{name} is {shown(getattr(ours, field.name))} and has no field in the file")
        else:
            found += differences(name, getattr(ours, field.name), getattr(read, field.name))
    return found
