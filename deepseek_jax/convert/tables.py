"""Published tensor names: one table for each naming tradition, which `convert.names` reads both ways.

A row: our name, the published one, and whether releases store the tensor as FP8. ``{expert}`` and ``{half}`` stand
where each expert, and each of gate and up, is a tensor of its own.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

from deepseek_jax.configs.layers import Dense, Layer
from deepseek_jax.configs.schema import GQA, MLA, Compressed, ModelConfig, MoE
from deepseek_jax.convert.safetensors import CheckpointError

HALVES = ("gate", "up")

Rows = tuple[tuple[str, str, bool], ...]


@dataclass(frozen=True)
class Names:
    """A tradition. ``embedding`` and ``root``: rows before and after the layers. ``prefix``: what stands before the
    names of a layer; ``mtp_prefix``: before those of an MTP module, None where these are the layers after the last.

    ``attention_norm``, ``ffn_norm``: rows of every layer. ``rows``: those of what a layer is made of, by the class of
    its config. ``mtp``: an MTP module's, beside those of its layer. ``copies``: an MTP layer's tensors that repeat one
    of the main model, and our name of that one. ``scale``: the name of a tensor's scales. ``halves``: of gate and up.
    """

    embedding: Rows
    root: Rows
    prefix: str
    attention_norm: Rows
    ffn_norm: Rows
    rows: dict[type, Rows]
    mtp: Rows
    copies: tuple[tuple[str, str], ...]
    scale: Callable[[str], str]
    mtp_prefix: str | None = None
    halves: tuple[str, str] = HALVES

    def of_mtp(self, depth: int, n_layers: int) -> str:
        """What stands before the names of an MTP module."""
        if self.mtp_prefix is None:
            return self.prefix.format(layer=n_layers + depth)
        return self.mtp_prefix.format(depth=depth)

    def layer(self, layer: Layer) -> Rows:
        """A layer's rows, in published order. Raises CheckpointError where a part of it has none."""
        for part in (layer.attention, layer.ffn):
            if type(part) not in self.rows:
                known = ", ".join(kind.__name__ for kind in self.rows)
                raise CheckpointError(f"no published names are known of {type(part).__name__} here, only of {known}.")
        return self.attention_norm + self.rows[type(layer.attention)] + self.ffn_norm + self.rows[type(layer.ffn)]


def scale_inv(name: str) -> str:
    """``weight_scale_inv`` of ``weight``. What stands there are the scales, not their inverses."""
    return f"{name}_scale_inv"


def scale_beside(name: str) -> str:
    """``wkv.scale`` of ``wkv.weight``."""
    return f"{name.removesuffix('weight')}scale"


LLAMA = Names(
    embedding=(("embed", "model.embed_tokens.weight", False),),
    root=(
        ("norm.weight", "model.norm.weight", False),
        ("head", "lm_head.weight", False),
    ),
    prefix="model.layers.{layer}.",
    attention_norm=(("attn_norm.weight", "input_layernorm.weight", False),),
    ffn_norm=(("ffn_norm.weight", "post_attention_layernorm.weight", False),),
    rows={
        GQA: (
            ("attn.q", "self_attn.q_proj.weight", True),
            ("attn.q_bias", "self_attn.q_proj.bias", False),
            ("attn.k", "self_attn.k_proj.weight", True),
            ("attn.k_bias", "self_attn.k_proj.bias", False),
            ("attn.v", "self_attn.v_proj.weight", True),
            ("attn.v_bias", "self_attn.v_proj.bias", False),
            ("attn.o", "self_attn.o_proj.weight", True),
        ),
        Dense: (
            ("ffn.gate_up", "mlp.{half}_proj.weight", True),
            ("ffn.down", "mlp.down_proj.weight", True),
        ),
    },
    mtp=(),
    copies=(),
    scale=scale_inv,
)


def _streams(ours: str, theirs: str) -> Rows:
    return tuple(
        (f"{ours}.{a}", f"{theirs}_{b}", False) for a, b in (("map", "fn"), ("base", "base"), ("scale", "scale"))
    )


# Beside the released tensors those of a residual of several streams, under V4's names.
DEEPSEEK = replace(
    LLAMA,
    root=(*LLAMA.root, *_streams("collapse", "model.hc_head")),
    attention_norm=(*LLAMA.attention_norm, *_streams("attn_streams", "hc_attn")),
    ffn_norm=(*LLAMA.ffn_norm, *_streams("ffn_streams", "hc_ffn")),
    rows={
        **LLAMA.rows,
        MLA: (
            ("attn.q", "self_attn.q_proj.weight", True),
            ("attn.q_a", "self_attn.q_a_proj.weight", True),
            ("attn.q_norm.weight", "self_attn.q_a_layernorm.weight", False),
            ("attn.q_b", "self_attn.q_b_proj.weight", True),
            ("attn.kv_a", "self_attn.kv_a_proj_with_mqa.weight", True),
            ("attn.kv_norm.weight", "self_attn.kv_a_layernorm.weight", False),
            ("attn.kv_b", "self_attn.kv_b_proj.weight", True),
            ("attn.o", "self_attn.o_proj.weight", True),
            ("attn.indexer.q", "self_attn.indexer.wq_b.weight", True),
            ("attn.indexer.k", "self_attn.indexer.wk.weight", True),
            ("attn.indexer.k_norm.weight", "self_attn.indexer.k_norm.weight", False),
            ("attn.indexer.k_norm.bias", "self_attn.indexer.k_norm.bias", False),
            ("attn.indexer.weight", "self_attn.indexer.weights_proj.weight", False),
        ),
        MoE: (
            ("ffn.router.weight", "mlp.gate.weight", False),
            ("ffn.router.bias", "mlp.gate.e_score_correction_bias", False),
            ("ffn.gate_up", "mlp.experts.{expert}.{half}_proj.weight", True),
            ("ffn.down", "mlp.experts.{expert}.down_proj.weight", True),
            ("ffn.shared.gate_up", "mlp.shared_experts.{half}_proj.weight", True),
            ("ffn.shared.down", "mlp.shared_experts.down_proj.weight", True),
        ),
    },
    mtp=(
        ("embed_norm.weight", "enorm.weight", False),
        ("hidden_norm.weight", "hnorm.weight", False),
        ("proj", "eh_proj.weight", False),
        ("embed_proj", "e_proj.weight", True),
        ("hidden_proj", "h_proj.weight", True),
        ("norm.weight", "shared_head.norm.weight", False),
        *_streams("collapse", "hc_head"),
    ),
    copies=(("embed_tokens.weight", "embed"), ("shared_head.head.weight", "head")),
)


def _compressor(ours: str, theirs: str) -> Rows:
    return (
        (f"{ours}.position", f"{theirs}.ape", False),
        (f"{ours}.kv", f"{theirs}.wkv.weight", False),
        (f"{ours}.gate", f"{theirs}.wgate.weight", False),
        (f"{ours}.norm.weight", f"{theirs}.norm.weight", False),
    )


V4 = Names(
    embedding=(("embed", "embed.weight", False),),
    root=(
        ("norm.weight", "norm.weight", False),
        *_streams("collapse", "hc_head"),
        ("head", "head.weight", False),
    ),
    prefix="layers.{layer}.",
    mtp_prefix="mtp.{depth}.",
    attention_norm=(("attn_norm.weight", "attn_norm.weight", False), *_streams("attn_streams", "hc_attn")),
    ffn_norm=(("ffn_norm.weight", "ffn_norm.weight", False), *_streams("ffn_streams", "hc_ffn")),
    rows={
        Compressed: (
            ("attn.q_a", "attn.wq_a.weight", True),
            ("attn.q_norm.weight", "attn.q_norm.weight", False),
            ("attn.q_b", "attn.wq_b.weight", True),
            ("attn.kv", "attn.wkv.weight", True),
            ("attn.kv_norm.weight", "attn.kv_norm.weight", False),
            ("attn.sink", "attn.attn_sink", False),
            ("attn.o_a", "attn.wo_a.weight", True),
            ("attn.o_b", "attn.wo_b.weight", True),
            *_compressor("attn.compressor", "attn.compressor"),
            ("attn.indexer.q", "attn.indexer.wq_b.weight", True),
            ("attn.indexer.weight", "attn.indexer.weights_proj.weight", False),
            *_compressor("attn.indexer.compressor", "attn.indexer.compressor"),
        ),
        MoE: (
            ("ffn.router.weight", "ffn.gate.weight", False),
            ("ffn.router.bias", "ffn.gate.bias", False),
            ("ffn.router.table", "ffn.gate.tid2eid", False),
            ("ffn.gate_up", "ffn.experts.{expert}.{half}.weight", True),
            ("ffn.down", "ffn.experts.{expert}.w2.weight", True),
            ("ffn.shared.gate_up", "ffn.shared_experts.{half}.weight", True),
            ("ffn.shared.down", "ffn.shared_experts.w2.weight", True),
        ),
    },
    mtp=(
        ("embed_norm.weight", "enorm.weight", False),
        ("hidden_norm.weight", "hnorm.weight", False),
        ("embed_proj", "e_proj.weight", True),
        ("hidden_proj", "h_proj.weight", True),
        ("norm.weight", "norm.weight", False),
        *_streams("collapse", "hc_head"),
    ),
    copies=(),
    scale=scale_beside,
    halves=("w1", "w3"),
)
TRADITIONS = {
    **dict.fromkeys(("llama", "qwen2"), LLAMA),
    **dict.fromkeys(("deepseek", "deepseek_v2", "deepseek_v3", "deepseek_v32", "kimi_k2"), DEEPSEEK),
    "deepseek_v4": V4,
}


def names_of(cfg: ModelConfig) -> Names:
    """The tradition of a model's published files. Raises CheckpointError for a model_type that none is known of."""
    if cfg.model_type not in TRADITIONS:
        raise CheckpointError(
            f"{cfg.name}: no published names are known of model_type {cfg.model_type!r}, only of "
            f"{', '.join(TRADITIONS)}."
        )
    return TRADITIONS[cfg.model_type]
