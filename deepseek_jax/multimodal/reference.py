"""PyTorch transformers' Janus as the reference: the same files, read by PyTorch alone.

Nothing here goes through this package's reader or its tables of names, so that a mistake there cannot hide. PyTorch is
imported inside functions only. `deepseek_jax.multimodal.verify` compares a model with it.
"""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from deepseek_jax.convert.reference_files import find_tensors, read_object, read_tensors
from deepseek_jax.convert.references import DROPPED, EXTRA, VerifyError
from deepseek_jax.notes import cut

# DeepSeek's names as transformers has them.
RENAMED = (
    (r"^language_model\.lm_head\.", "lm_head."),
    (r"^language_model\.model\.", "model.language_model."),
    (r"^aligner\.layers\.0\.", "model.aligner.fc1."),
    (r"^gen_aligner\.layers\.0\.", "model.generation_aligner.fc1."),
    (r"^gen_embed\.", "model.generation_embeddings."),
    (r"^gen_head\.output_mlp_projector\.", "model.generation_head.proj_out."),
    (r"^gen_head\.vision_head\.", "model.generation_head.vision_head."),
    (r"^vision_model\.vision_tower\.patch_embed\.proj\.", "model.vision_model.embeddings.patch_embedding."),
    (r"^vision_model\.vision_tower\.pos_embed$", "model.vision_model.embeddings.position_embedding.weight"),
    (r"^vision_model\.vision_tower\.norm\.", "model.vision_model.post_layernorm."),
    (r"^vision_model\.vision_tower\.blocks\.(\d+)\.norm(\d)\.", r"model.vision_model.encoder.layers.\1.layer_norm\2."),
    (r"^vision_model\.vision_tower\.blocks\.(\d+)\.mlp\.", r"model.vision_model.encoder.layers.\1.mlp."),
    (
        r"^vision_model\.vision_tower\.blocks\.(\d+)\.attn\.proj\.",
        r"model.vision_model.encoder.layers.\1.self_attn.projection_layer.",
    ),
    (r"^gen_vision_model\.", "model.vqmodel."),
    (r"vqmodel\.encoder\.conv_blocks\.", "vqmodel.encoder.down."),
    (r"vqmodel\.decoder\.conv_blocks\.", "vqmodel.decoder.up."),
    (r"(vqmodel\..*)\.res\.", r"\1.block."),
    (r"(vqmodel\.\w+)\.mid\.0\.", r"\1.mid.block_1."),
    (r"(vqmodel\.\w+)\.mid\.1\.", r"\1.mid.attn_1."),
    (r"(vqmodel\.\w+)\.mid\.2\.", r"\1.mid.block_2."),
)
FUSED = re.compile(r"vision_model\.vision_tower\.blocks\.(\d+)\.attn\.qkv\.(\w+)")
ALIGNED = re.compile(r"(gen_)?aligner\.layers\.(\d*[2468])\.(\w+)")


@dataclass
class Seen:
    """What the reference made of the inputs of `verify.Inputs`; arrays. ``blocks``: after each layer of the language
    model but the last. ``decoded``: its logits, a greedy step each, and ``chosen`` the tokens."""

    values: dict[str, np.ndarray] = field(default_factory=dict)
    blocks: list[np.ndarray] = field(default_factory=list)
    decoded: list[np.ndarray] = field(default_factory=list)
    chosen: list[int] = field(default_factory=list)


def reference_model(path: Path) -> Any:
    """transformers' model with the weights of a folder in either layout, float32, in memory on the CPU.

    Raises VerifyError without PyTorch, and for a folder that does not hold exactly the model's tensors.
    """
    config = read_object(path / "config.json")
    try:
        from transformers import JanusConfig, JanusForConditionalGeneration
        from transformers.initialization import no_init_weights
    except ImportError as error:
        raise VerifyError(f"{EXTRA} ({error})") from None
    fields = config if config.get("model_type") == "janus" else _as_transformers(config)
    try:
        theirs = JanusConfig(**{k: v for k, v in fields.items() if k not in DROPPED} | {"tie_word_embeddings": False})
        theirs._attn_implementation = "eager"
        with no_init_weights():
            model = JanusForConditionalGeneration(theirs).float().eval()
    except Exception as error:  # its checks raise exceptions of several libraries
        raise VerifyError(
            f"there is no reference for this config: transformers refuses it ({type(error).__name__}: {cut(error)})."
        ) from None
    targets = model.state_dict()
    missing = set(targets)
    for name, tensor in read_tensors(path, config, find_tensors(path)):
        if name.startswith("vision_model.vision_tower.attn_pool.") or name.endswith(".codebook_used"):
            continue
        for key, part in _placed(name, tensor):
            if key not in targets or targets[key].shape != part.shape:
                expected = f"shape {tuple(targets[key].shape)}" if key in targets else "no such tensor"
                raise VerifyError(f"{path}: {name} has shape {tuple(tensor.shape)}; the reference has {expected}.")
            targets[key].copy_(part)
            missing.discard(key)
    if missing:
        raise VerifyError(f"{path} lacks {len(missing)} tensors of the reference, among them {min(missing)}.")
    return model


def _placed(name: str, tensor):
    """The reference's tensors that a stored one is."""
    if found := FUSED.fullmatch(name):
        for kind, part in zip("qkv", tensor.chunk(3), strict=True):
            yield f"model.vision_model.encoder.layers.{found[1]}.self_attn.{kind}_proj.{found[2]}", part
        return
    if found := ALIGNED.fullmatch(name):
        module = "generation_aligner" if found[1] else "aligner"
        yield f"model.{module}.hidden_layers.{int(found[2]) // 2 - 1}.{found[3]}", tensor
        return
    if name.endswith("pos_embed"):
        tensor = tensor[0]
    for pattern, other in RENAMED:
        name = re.sub(pattern, other, name)
    yield name, tensor


def _as_transformers(config: dict) -> dict:
    """DeepSeek's config.json as transformers' one."""
    try:
        vision, codes = (config[part]["params"] for part in ("vision_config", "gen_vision_config"))
        depth, width = (config["aligner_config"]["params"][name] for name in ("depth", "n_embed"))
        head, hidden = config["gen_head_config"]["params"]["image_token_embed"], vision.get("width", 1024)
        multipliers, patch = codes.get("ch_mult", (1, 1, 2, 2, 4)), vision.get("patch_size", 16)
        return {
            "text_config": {"model_type": "llama", **config["language_config"]},
            "vision_config": {
                "image_size": vision["image_size"],
                "patch_size": patch,
                "hidden_size": hidden,
                "num_hidden_layers": vision.get("layers", 24),
                "num_attention_heads": vision.get("heads", 16),
                "mlp_ratio": vision.get("mlp_width", 4096) / hidden,
                "projection_dim": width,
                "depth": depth,
                "num_image_tokens": (vision["image_size"] // patch) ** 2,
            },
            "vq_config": {
                "num_embeddings": codes["image_token_size"],
                "embed_dim": codes["n_embed"],
                "latent_channels": codes.get("z_channels", 256),
                "base_channels": codes.get("ch", 128),
                "channel_multiplier": list(multipliers),
                "num_res_blocks": codes.get("num_res_blocks", 2),
                "projection_dim": head,
                "num_hidden_layers": depth,
                "image_token_embed_dim": width,
            },
            "image_token_id": config.get("image_token_id", 100581),
        }
    except (KeyError, TypeError, AttributeError) as error:
        raise VerifyError(f"config.json lacks what the reference needs ({type(error).__name__}: {error}).") from None


def observe(model, tokens, image, codes, steps: int) -> Seen:
    """Runs the reference. ``tokens``: int [1, T] with a picture in it, [1, side, side, 3]; ``codes``: int [1, S], as if
    they had been drawn after the tokens before the picture; ``steps``: greedy ones after the tokens."""
    import torch
    from transformers import DynamicCache

    seen, janus = Seen(), model.model
    tokens, codes = (torch.tensor(np.asarray(a), dtype=torch.long) for a in (tokens, codes))
    pixels = torch.tensor(np.moveaxis(np.asarray(image), -1, 1).copy())
    with torch.no_grad():
        features = janus.get_image_features(pixels)
        cache = DynamicCache(config=model.config.text_config)
        out = model(
            input_ids=tokens, pixel_values=pixels, past_key_values=cache, use_cache=True, output_hidden_states=True
        )
        *blocks, hidden = out.hidden_states[1:]
        seen.blocks = [block.numpy() for block in blocks]
        logits = out.logits
        for _ in range(steps):
            seen.chosen.append(int(logits[0, -1].argmax()))
            step = model(input_ids=torch.tensor([seen.chosen[-1:]]), past_key_values=cache, use_cache=True)
            logits = step.logits
            seen.decoded.append(logits.numpy())
        first = int((tokens[0] == model.config.image_token_id).nonzero()[0])
        embedded = model.prepare_embeddings_for_image_generation(codes)
        words = janus.get_input_embeddings()(tokens[:, :first])
        drawn = janus.language_model(inputs_embeds=torch.cat([words, embedded], 1)).last_hidden_state
        encoded = janus.vqmodel.encoder(pixels)
        vectors = torch.nn.functional.normalize(janus.vqmodel.quant_conv(encoded), dim=1)
        values = {
            "vision tower": features.last_hidden_state,
            "aligner": features.pooler_output,
            "final norm": hidden,
            "logits": out.logits,
            "codes embedded": embedded,
            "logits of codes": janus.generation_head(drawn),
            "VQ encoder": encoded.movedim(1, -1),
            "VQ vectors": vectors.flatten(2).movedim(1, -1),
            "VQ decoder": janus.vqmodel.decode(codes).movedim(1, -1),
        }
    seen.values = {name: value.numpy() for name, value in values.items()}
    return seen
