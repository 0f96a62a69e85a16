"""A Janus's tensors in files, in both traditions: one table, read both ways, on the engine of `convert.names`.

DeepSeek's own names are those of its modules; transformers' are others for the same tensors, but for queries, keys and
values of the vision tower, which DeepSeek's files hold as one tensor: several of ours with one name stand in it one
after the other. Files have convolutions as [out, in, size, size].
"""

import re
from dataclasses import dataclass, replace
from functools import cache

from deepseek_jax.configs.multimodal import JanusConfig
from deepseek_jax.convert import names
from deepseek_jax.convert.names import Leaf, Path, Tensor
from deepseek_jax.core.params import map_variables
from deepseek_jax.multimodal.janus import abstract

VISION = (
    ("patch", "patch_embed.proj.weight", "embeddings.patch_embedding.weight"),
    ("patch_bias", "patch_embed.proj.bias", "embeddings.patch_embedding.bias"),
    ("position", "pos_embed", "embeddings.position_embedding.weight"),
    ("norm.weight", "norm.weight", "post_layernorm.weight"),
    ("norm.bias", "norm.bias", "post_layernorm.bias"),
)
VISION_LAYER = (
    ("norm1.weight", "norm1.weight", "layer_norm1.weight"),
    ("norm1.bias", "norm1.bias", "layer_norm1.bias"),
    ("q", "attn.qkv.weight", "self_attn.q_proj.weight"),
    ("k", "attn.qkv.weight", "self_attn.k_proj.weight"),
    ("v", "attn.qkv.weight", "self_attn.v_proj.weight"),
    ("q_bias", "attn.qkv.bias", "self_attn.q_proj.bias"),
    ("k_bias", "attn.qkv.bias", "self_attn.k_proj.bias"),
    ("v_bias", "attn.qkv.bias", "self_attn.v_proj.bias"),
    ("o", "attn.proj.weight", "self_attn.projection_layer.weight"),
    ("o_bias", "attn.proj.bias", "self_attn.projection_layer.bias"),
    ("norm2.weight", "norm2.weight", "layer_norm2.weight"),
    ("norm2.bias", "norm2.bias", "layer_norm2.bias"),
    ("fc1.weight", "mlp.fc1.weight", "mlp.fc1.weight"),
    ("fc1.bias", "mlp.fc1.bias", "mlp.fc1.bias"),
    ("fc2.weight", "mlp.fc2.weight", "mlp.fc2.weight"),
    ("fc2.bias", "mlp.fc2.bias", "mlp.fc2.bias"),
)
# What a VQ's modules are called otherwise: in DeepSeek's files than here, and in transformers' than there.
VQ_DEEPSEEK = ((r"\.(down|up)sample\.", r".\1sample.conv."), (r"^codebook$", "quantize.embedding.weight"))
VQ_TRANSFORMERS = (
    (r"^encoder\.conv_blocks\.", "encoder.down."),
    (r"^decoder\.conv_blocks\.", "decoder.up."),
    (r"\.res\.(\d+)\.", r".block.\1."),
    (r"\.mid\.0\.", ".mid.block_1."),
    (r"\.mid\.1\.", ".mid.attn_1."),
    (r"\.mid\.2\.", ".mid.block_2."),
)
# Tensors of released files that no path of the model reads: how the tower would pool, and a count from training.
UNUSED = ("vision_model.vision_tower.attn_pool.", "gen_vision_model.quantize.codebook_used")


@dataclass(frozen=True)
class Kept:
    """A tensor as a file has it: ``parts``, matrices [out, in] or vectors, one after the other along its first axis."""

    name: str
    shape: tuple[int, ...]
    parts: tuple[Tensor, ...]


@cache
def layout(cfg: JanusConfig) -> tuple[tuple[Kept, ...], dict[Path, Leaf]]:
    """Every tensor of a Janus's files in its tradition (``cfg.model_type``), and the shapes of its leaves."""
    published = cfg.model_type == "multi_modality"
    found: dict[str, list[tuple[Tensor, tuple[int, ...]]]] = {}
    leaves: dict[Path, Leaf] = {}

    def add(path, variable):
        if path[0] == "language":
            return
        stacked = cfg.vision.n_layers if path[:2] == ("vision", "layers") else 0
        leaf = leaves[path] = names.leaf_of(variable, path, bool(stacked))
        both = _names(path)
        for layer in range(stacked) if stacked else (None,):
            index = () if layer is None else (layer,)
            name = both[0 if published else 1].format(layer=layer)
            matrix = leaf.matrix[leaf.stacked :]
            tensor = Tensor(
                name=".".join(map(str, (*path, *index))),
                scale="",
                shape=matrix[::-1] if leaf.transposed else matrix,
                path=path,
                index=(*index, *(slice(None) for _ in matrix)),
                transposed=leaf.transposed,
                fp8=False,
            )
            shape = tensor.shape
            if len(leaf.dims) == 4:
                shape = (leaf.dims[-1], *leaf.dims[:-1])
            elif path == ("vision", "position") and published:
                shape = (1, *shape)
            found.setdefault(name, []).append((tensor, shape))

    map_variables(add, abstract(cfg))
    kept = [_kept(name, parts) for name, parts in found.items()]
    tensors, own = names.layout(cfg.language)
    for tensor in tensors:
        mine = replace(tensor, path=("language", *tensor.path), name=f"language.{tensor.name}", fp8=False)
        kept.append(Kept(_of_language(tensor.name, published), tensor.shape, (mine,)))
    return tuple(kept), leaves | {("language", *path): leaf for path, leaf in own.items()}


def _kept(name: str, parts: list[tuple[Tensor, tuple[int, ...]]]) -> Kept:
    # A tree's leaves come in alphabetical order; in the file queries come before keys.
    parts = sorted(parts, key=lambda part: "qkv".find(part[0].path[-1][0]))
    rows, rest = sum(shape[0] for _, shape in parts), parts[0][1][1:]
    return Kept(name, (rows, *rest), tuple(tensor for tensor, _ in parts))


def _of_language(name: str, published: bool) -> str:
    if published:
        return f"language_model.{name}"
    return name.replace("model.", "model.language_model.", 1) if name.startswith("model.") else name


def _names(path: Path) -> tuple[str, str]:
    """A leaf's name in DeepSeek's files and in transformers'."""
    first, *others = path
    rest = ".".join(map(str, others))
    if first == "vision":
        if others[0] == "layers":
            rows, rest, between = (
                VISION_LAYER,
                rest.removeprefix("layers."),
                ("blocks.{layer}.", "encoder.layers.{layer}."),
            )
        else:
            rows, between = VISION, ("", "")
        _, deepseek, transformers = next(row for row in rows if row[0] == rest)
        return f"vision_model.vision_tower.{between[0]}{deepseek}", f"model.vision_model.{between[1]}{transformers}"
    if first == "vq":
        for pattern, other in VQ_DEEPSEEK:
            rest = re.sub(pattern, other, rest)
        deepseek = f"gen_vision_model.{rest}"
        for pattern, other in VQ_TRANSFORMERS:
            rest = re.sub(pattern, other, rest)
        return deepseek, f"model.vqmodel.{rest}"
    if first == "gen_embed":
        return "gen_embed.weight", "model.generation_embeddings.weight"
    _, number, kind = others
    if first == "gen_head":
        mine, theirs = (("output_mlp_projector", "proj_out"), ("vision_head", "vision_head"))[number]
        return f"gen_head.{mine}.{kind}", f"model.generation_head.{theirs}.{kind}"
    theirs = {"aligner": "aligner", "gen_aligner": "generation_aligner"}[first]
    linear = f"hidden_layers.{number - 1}" if number else "fc1"
    # DeepSeek's aligners count the GELUs between their linear maps.
    return f"{first}.layers.{2 * number}.{kind}", f"model.{theirs}.{linear}.{kind}"
