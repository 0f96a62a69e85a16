"""The reference's modules: transformers' classes by model_type, float32 on the CPU.

Imported inside functions only, as PyTorch and transformers are. `deepseek_jax.convert.verify` fills and runs them.
"""

from collections.abc import Callable
from typing import Any

from deepseek_jax.notes import cut, shown

EXTRA = 'the reference needs PyTorch and transformers: pip install "deepseek-jax[verify]"'
# Of the file or of other classes; layer_types follows from the number of layers, but not V4's.
DROPPED = ("model_type", "architectures", "auto_map", "quantization_config", "torch_dtype", "dtype")


class VerifyError(ValueError):
    """A checkpoint that the reference cannot read, or a missing installation."""


def build_modules(config: dict) -> tuple[Any, Any]:
    """The causal model for a parsed ``config.json`` and its MTP layers (a ModuleList), their weights not filled in.

    Raises VerifyError when PyTorch or transformers is missing, for a model_type without a reference, and for a config
    that transformers does not take.
    """
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in REFERENCES:
        raise VerifyError(
            f"there is no reference for model_type {shown(model_type)}, only for {', '.join(REFERENCES)}."
        )
    if model_type != "deepseek_v4" and config.get("hc_mult") is not None:
        raise VerifyError(
            f"there is no reference for this config: only deepseek_v4's has a residual of several streams (hc_mult), "
            f"not {model_type}'s."
        )
    if config.get("hc_constrained") is False:
        raise VerifyError("there is no reference for this config: transformers has no unconstrained hyper-connections.")
    try:
        import torch
        from transformers.initialization import no_init_weights

        make_config, make_model, make_mtp = REFERENCES[model_type]()
    except ImportError as error:
        raise VerifyError(f"{EXTRA} ({error})") from None
    try:
        listed = () if model_type == "deepseek_v4" else ("layer_types",)
        config = make_config({k: v for k, v in config.items() if k not in (*DROPPED, *listed)})
    except Exception as error:  # its checks raise exceptions of several libraries
        raise VerifyError(
            f"there is no reference for this config: transformers refuses it ({type(error).__name__}: {cut(error)})."
        ) from None
    config._attn_implementation, config._experts_implementation = "eager", "eager"
    with no_init_weights():
        main = make_model(config).float().eval()
        if config.tie_word_embeddings:  # left out with the initialisation
            main.lm_head.weight = main.model.embed_tokens.weight
        mtp = torch.nn.ModuleList(make_mtp(config)).float().eval()
    return main, mtp


Maker = tuple[Callable[[dict], Any], Callable[[Any], Any], Callable[[Any], list]]


def _without_mtp(config) -> list:
    return []


def _deepseek_v3() -> Maker:
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM
    from transformers.modeling_layers import MtpLayer
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3DecoderLayer, DeepseekV3RMSNorm

    def mtp(config) -> list:
        depths = range(config.num_mtp_layers or 0)
        first = config.num_hidden_layers
        return [MtpLayer(config, DeepseekV3DecoderLayer, DeepseekV3RMSNorm, first + depth) for depth in depths]

    return lambda fields: DeepseekV3Config(**fields), DeepseekV3ForCausalLM, mtp


def _deepseek_v32() -> Maker:
    from transformers import DeepseekV32Config, DeepseekV32ForCausalLM
    from transformers.modeling_layers import MtpLayer
    from transformers.models.deepseek_v32.modeling_deepseek_v32 import DeepseekV32DecoderLayer, DeepseekV32RMSNorm

    def mtp(config) -> list:
        # Its config has no MTP layers: they are made as its last layer, which has the same mechanisms.
        last, depth = config.num_hidden_layers - 1, getattr(config, "num_nextn_predict_layers", None) or 0
        return [MtpLayer(config, DeepseekV32DecoderLayer, DeepseekV32RMSNorm, last) for _ in range(depth)]

    return lambda fields: DeepseekV32Config(**fields), DeepseekV32ForCausalLM, mtp


def _deepseek_v4() -> Maker:
    import copy

    import torch
    from transformers import DeepseekV4Config, DeepseekV4ForCausalLM
    from transformers.models.deepseek_v4 import modeling_deepseek_v4 as v4

    class MtpModule(torch.nn.Module):
        """What DeepSeek's own code has after the last layer, of transformers' parts: it has no MTP of V4 itself."""

        def __init__(self, config):
            super().__init__()
            own = copy.deepcopy(config)
            own.layer_types, own.mlp_layer_types = ["sliding_attention"], ["moe"]
            dim, eps = config.hidden_size, config.rms_norm_eps
            self.e_proj, self.h_proj = (torch.nn.Linear(dim, dim, bias=False) for _ in range(2))
            self.enorm, self.hnorm, self.norm = (v4.DeepseekV4RMSNorm(dim, eps=eps) for _ in range(3))
            self.mtp_block = v4.DeepseekV4DecoderLayer(own, 0)
            self.hc_head = v4.DeepseekV4HyperHead(config)

        def forward(self, embedding, streams, **arguments):
            x = self.e_proj(self.enorm(embedding))[:, :, None] + self.h_proj(self.hnorm(streams))
            return self.norm(self.hc_head(self.mtp_block(x, **arguments)))

    def config(fields: dict):
        depth = fields.get("num_mtp_layers", fields.get("num_nextn_predict_layers")) or 0
        fields = {k: v for k, v in fields.items() if k != "num_mtp_layers"}
        return DeepseekV4Config(**copy.deepcopy(fields) | {"num_nextn_predict_layers": depth})

    return (
        config,
        DeepseekV4ForCausalLM,
        lambda config: [MtpModule(config) for _ in range(config.num_nextn_predict_layers)],
    )


def rotations(rotary, embedding, positions):
    """What a layer is given to rotate with: of V4 by both its RoPEs."""
    if not hasattr(rotary, "layer_types"):
        return rotary(embedding, positions)
    return {kind: rotary(embedding, position_ids=positions, layer_type=kind) for kind in rotary.layer_types}


def windowed(config) -> int | None:
    """How many tokens a query sees as they are; None: all before it."""
    return config.sliding_window if config.model_type == "deepseek_v4" else None


def _deepseek_v2() -> Maker:
    from transformers import DeepseekV2Config, DeepseekV2ForCausalLM

    return lambda fields: DeepseekV2Config(**fields), DeepseekV2ForCausalLM, _without_mtp


def _deepseek() -> Maker:
    """DeepSeekMoE 16B. transformers has no class of this model_type; the text model of its DeepSeek-OCR 2 is the same
    network: multi-head attention with rotation in halves, softmax router in float32 (the released code routes in the
    model's dtype), shared experts."""
    import torch
    from transformers.modeling_outputs import CausalLMOutputWithPast
    from transformers.models.deepseek_ocr2.configuration_deepseek_ocr2 import DeepseekOcr2TextConfig
    from transformers.models.deepseek_ocr2.modeling_deepseek_ocr2 import DeepseekOcr2TextModel

    def config(fields: dict):
        dense, layers = fields["first_k_dense_replace"], fields["num_hidden_layers"]
        kinds = ["dense" if layer < dense else "sparse" for layer in range(layers)]
        # Not its own defaults, but what V1 has.
        fixed = {"topk_method": "greedy", "routed_scaling_factor": 1.0, "mlp_layer_types": kinds}
        return DeepseekOcr2TextConfig(**(fields | fixed))

    class DeepseekForCausalLM(torch.nn.Module):
        def __init__(self, config):
            super().__init__()
            self.config = config
            self.model = DeepseekOcr2TextModel(config)
            self.lm_head = torch.nn.Linear(config.hidden_size, config.vocab_size, bias=False)

        def forward(self, **arguments) -> CausalLMOutputWithPast:
            out = self.model(**arguments)
            logits = self.lm_head(out.last_hidden_state)
            return CausalLMOutputWithPast(logits=logits, past_key_values=out.past_key_values)

    return config, DeepseekForCausalLM, _without_mtp


def _llama() -> Maker:
    from transformers import LlamaConfig, LlamaForCausalLM

    return lambda fields: LlamaConfig(**fields), LlamaForCausalLM, _without_mtp


def _qwen2() -> Maker:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    return lambda fields: Qwen2Config(**fields), Qwen2ForCausalLM, _without_mtp


# Each imports its classes and gives what makes a config of the fields, a causal model and MTP layers of that config.
REFERENCES: dict[str, Callable[[], Maker]] = {
    "deepseek_v3": _deepseek_v3,
    "kimi_k2": _deepseek_v3,
    "deepseek_v32": _deepseek_v32,
    "deepseek_v4": _deepseek_v4,
    "deepseek_v2": _deepseek_v2,
    "deepseek": _deepseek,
    "llama": _llama,
    "qwen2": _qwen2,
}
