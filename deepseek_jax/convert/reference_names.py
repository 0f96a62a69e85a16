"""Where the reference keeps published tensors: by transformers' names in memory, a layer's experts in one tensor.

Apart from the names that the package itself reads and writes, so that each checks the other.
"""

import re
from collections.abc import Iterator

LAYER = re.compile(r"(?:model\.)?layers\.(\d+)\.|mtp\.(\d+)\.")
# V4's published names, part by part, and transformers'; those without a layer, those of an MTP module, and the others.
V4_ROOT = {
    "embed.weight": "model.embed_tokens.weight",
    "head.weight": "lm_head.weight",
    "norm.weight": "model.norm.weight",
}
V4_MTP = ("e_proj.", "h_proj.", "enorm.", "hnorm.", "norm.", "hc_head.")
V4_PARTS = (
    (r"^attn_norm\.", "input_layernorm."),
    (r"^ffn_norm\.", "post_attention_layernorm."),
    (r"^hc_head_", "hc_head.hc_"),
    (r"^hc_(attn|ffn)_", r"\1_hc."),
    (r"^attn\.indexer\.compressor\.", "attn.compressor.indexer."),
    (r"^attn\.indexer\.wq_b\.", "attn.compressor.indexer.q_b_proj."),
    (r"^attn\.indexer\.weights_proj\.", "attn.compressor.indexer.scorer.weights_proj."),
    (r"\.attn_sink$", ".sinks"),
    (r"\.ape$", ".position_bias"),
    (r"\.wgate\.", ".gate_proj."),
    (r"\.w(q_a|q_b|kv|o_a|o_b)\.", r".\1_proj."),
    (r"\.q_norm\.", ".q_a_norm."),
    (r"^(attn\..*)\.norm\.", r"\1.kv_norm."),
    (r"\.gate\.bias$", ".gate.e_score_correction_bias"),
    (r"\.w1\.", ".gate_proj."),
    (r"\.w2\.", ".down_proj."),
    (r"\.w3\.", ".up_proj."),
    (r"^attn\.", "self_attn."),
    (r"^ffn\.", "mlp."),
)


def layer_number(name: str, n_layers: int) -> int | None:
    """The layer of a published name; MTP modules are those after the last."""
    found = LAYER.match(name)
    if found is None:
        return None
    return n_layers + int(found[2]) if found[1] is None else int(found[1])


def in_memory(name: str) -> str:
    """The name of a published tensor in transformers, experts apart; of all but V4's it is the published one."""
    if name in V4_ROOT or name.startswith("hc_head_"):
        return V4_ROOT.get(name) or f"model.{_part(name)}"
    found = re.fullmatch(r"(layers|mtp)\.(\d+)\.(.*)", name)
    if found is None:
        return name
    part = _part(found[3])
    if found[1] == "layers":
        return f"model.layers.{found[2]}.{part}"
    return f"mtp.{found[2]}.{part if part.startswith(V4_MTP) else f'mtp_block.{part}'}"


def _part(name: str) -> str:
    for pattern, replacement in V4_PARTS:
        name = re.sub(pattern, replacement, name)
    return name


def published(name: str, tensor) -> list[str]:
    """The published names of what a stored tensor holds: itself, or the experts that transformers 5 has in one."""
    fused = re.fullmatch(r"(.*\.mlp\.experts)\.(gate_up|down)_proj", name)
    if fused is None:
        return [name]
    parts = ("gate", "up") if fused[2] == "gate_up" else ("down",)
    return [f"{fused[1]}.{expert}.{part}_proj.weight" for expert in range(len(tensor)) for part in parts]


def slots(name: str, target) -> Iterator[str]:
    """What has to be filled of a tensor: of a stack of experts, every published matrix."""
    if ".mlp.experts." not in name:
        yield name
        return
    for expert in range(len(target)):
        parts = (".gate", ".up") if name.endswith("gate_up_proj") else ("",)
        yield from (f"{name}[{expert}]{part}" for part in parts)


def with_stored_mtp(config: dict, held: dict) -> dict:
    """The config with as many MTP layers as it announces and the files hold; where it announces none, as the files."""
    layers = config.get("num_hidden_layers")
    numbers = [layer_number(name, layers) for name in held]
    stored = max((n + 1 - layers for n in numbers if n is not None and n >= layers), default=0)
    if any(".markov_head." in name for name in held):  # another draft model
        stored = 0
    names = [name for name in ("num_nextn_predict_layers", "num_mtp_layers") if config.get(name) is not None]
    depth = min(stored, config[names[0]]) if names else stored
    return {**config, **dict.fromkeys(names or ["num_nextn_predict_layers"], depth)}


def place(name: str, targets: dict, n_layers: int):
    """Where a tensor goes, by its name `in_memory`: a name to tick off, and the view to fill (None: nowhere)."""
    module = name
    layer = re.match(r"model\.layers\.(\d+)\.(.*)", name)
    if layer and int(layer[1]) >= n_layers:
        rest = layer[2]
        if rest == "embed_tokens.weight":
            return "copy", "model.embed_tokens.weight"
        if rest == "shared_head.head.weight":
            return "copy", "lm_head.weight"
        rest = rest.replace("shared_head.norm", "post_norm")
        if rest.split(".")[0] not in ("enorm", "hnorm", "eh_proj", "post_norm"):
            rest = "mtp_block." + rest
        module = f"mtp.{int(layer[1]) - n_layers}.{rest}"
    expert = re.fullmatch(r"(.*\.mlp\.experts)\.(\d+)\.(gate|up|down)_proj\.weight", module)
    if not expert:
        return module, targets.get(module)
    stack, number, part = expert[1], int(expert[2]), expert[3]
    fused = f"{stack}.{'down' if part == 'down' else 'gate_up'}_proj"
    if fused not in targets or number >= len(targets[fused]):
        return module, None
    view = targets[fused][number]
    if part == "down":
        return f"{fused}[{number}]", view
    half = view.shape[0] // 2
    return f"{fused}[{number}].{part}", view[:half] if part == "gate" else view[half:]
