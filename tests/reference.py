"""PyTorch reference models with the weights of one of ours, by a mapping of their own.

The mapping is written out here, apart from the package's converter, so that each checks the other.
"""

from dataclasses import dataclass
from functools import cache, partial

import jax
import numpy as np
import torch
from tiny import random_model, random_tokens

from deepseek_jax.configs.schema import GQA, MLA, Compressed, ModelConfig
from deepseek_jax.convert.ladder import agreement
from deepseek_jax.convert.references import build_modules
from deepseek_jax.convert.verify import Observed, Reference
from deepseek_jax.core.context import Context
from deepseek_jax.model.outputs import Output
from deepseek_jax.model.transformer import Transformer

torch.set_num_threads(1)


def _rope(rope) -> dict:
    fields = {"rope_type": "default", "rope_theta": rope.theta}
    if rope.yarn is not None:
        yarn = rope.yarn
        fields |= {
            "rope_type": "yarn",
            "factor": yarn.factor,
            "original_max_position_embeddings": yarn.original_length,
            "beta_fast": yarn.beta_fast,
            "beta_slow": yarn.beta_slow,
            "mscale": yarn.mscale,
            "mscale_all_dim": yarn.mscale_all_dim,
        }
    if rope.llama3 is not None:
        fields |= {
            "rope_type": "llama3",
            "factor": rope.llama3.factor,
            "original_max_position_embeddings": rope.llama3.original_length,
            "low_freq_factor": rope.llama3.low_turns,
            "high_freq_factor": rope.llama3.high_turns,
        }
    return fields


def _compressed(cfg: ModelConfig) -> dict:
    """V4's, in transformers' words."""
    a, moe, hc = cfg.attention, cfg.moe, cfg.residual
    heavy = next(ratio for ratio in a.ratios if ratio not in (0, a.sparse_ratio))
    kinds = {
        0: "sliding_attention",
        a.sparse_ratio: "compressed_sparse_attention",
        heavy: "heavily_compressed_attention",
    }
    share = a.rope_dim / a.head_dim
    compress = _rope(a.entry_rope) | {"attention_factor": 1.0, "partial_rotary_factor": share}
    return {
        "num_key_value_heads": 1,
        "head_dim": a.head_dim,
        "q_lora_rank": a.q_rank,
        "o_groups": a.o_groups,
        "o_lora_rank": a.o_rank,
        "sliding_window": a.window,
        "partial_rotary_factor": share,
        "layer_types": [kinds[ratio] for ratio in a.ratios],
        "compress_rates": {kind: ratio for ratio, kind in kinds.items() if ratio},
        "mlp_layer_types": ["hash_moe"] * moe.n_hash + ["moe"] * (cfg.n_layers - moe.n_hash),
        "index_n_heads": a.indexer.index_heads,
        "index_head_dim": a.indexer.index_dim,
        "index_topk": a.indexer.index_top_k,
        "rope_parameters": {"main": _rope(a.rope) | {"partial_rotary_factor": share}, "compress": compress},
        "scoring_func": moe.score,
        "swiglu_limit": moe.limit,
        "hc_mult": hc.n_streams,
        "hc_sinkhorn_iters": hc.sinkhorn_steps,
        "hc_eps": hc.eps,
    }


def _attention(attention) -> dict:
    if isinstance(attention, GQA):
        return {"num_key_value_heads": attention.n_kv_heads, "head_dim": attention.head_dim}
    chosen = {}
    if attention.indexer is not None:
        names = {"index_n_heads": "index_heads", "index_head_dim": "index_dim", "index_topk": "index_top_k"}
        chosen = {theirs: getattr(attention.indexer, ours) for theirs, ours in names.items()}
    return chosen | {
        "num_key_value_heads": attention.n_heads,
        "q_lora_rank": attention.q_rank,
        "kv_lora_rank": attention.kv_rank,
        "qk_nope_head_dim": attention.nope_dim,
        "qk_rope_head_dim": attention.rope_dim,
        "v_head_dim": attention.v_dim,
        "rope_interleave": attention.rope.interleaved,
    }


def _experts(moe) -> dict:
    if moe is None:
        return {}
    return {
        "n_routed_experts": moe.n_experts,
        "num_experts_per_tok": moe.top_k,
        "moe_intermediate_size": moe.expert_dim,
        "n_shared_experts": moe.n_shared,
        "n_group": moe.n_groups,
        "topk_group": moe.top_groups,
        "norm_topk_prob": moe.normalize,
        "routed_scaling_factor": moe.scale,
    } | ({} if moe.bias else {"topk_method": "group_limited_greedy" if moe.n_groups > 1 else "greedy"})


def hf_config(cfg: ModelConfig) -> dict:
    """The published fields of ``config.json``, in today's spelling."""
    data = {
        "model_type": cfg.model_type,
        "vocab_size": cfg.vocab_size,
        "hidden_size": cfg.dim,
        "num_hidden_layers": cfg.n_layers,
        "num_attention_heads": cfg.attention.n_heads,
        "rms_norm_eps": cfg.norm_eps,
        "max_position_embeddings": cfg.max_length,
        "tie_word_embeddings": cfg.tie_embeddings,
        "num_nextn_predict_layers": cfg.mtp_depth,
    }
    if isinstance(cfg.attention, Compressed):
        groups = ("n_group", "topk_group", "norm_topk_prob")
        return data | {k: v for k, v in _experts(cfg.moe).items() if k not in groups} | _compressed(cfg)
    return data | {
        "intermediate_size": cfg.ffn_dim,
        "first_k_dense_replace": cfg.n_dense_layers,
        "rope_parameters": _rope(cfg.attention.rope),
        **_attention(cfg.attention),
        **_experts(cfg.moe),
    }


def torch_tensors(model: Transformer) -> dict[str, np.ndarray]:
    """The tree's leaves under PyTorch's names and in its layout; ``mtp.D.`` for the MTP modules.

    Works on any tree of the model's structure, so on gradients too; absent leaves (None) are left out.
    """
    out = {}

    def put(name, variable, arrange=lambda a: a):
        if variable is not None:
            out[name] = np.ascontiguousarray(arrange(np.asarray(variable.get_value())))

    def flat_in(a):  # [in, *out] -> [out, in]
        return a.reshape(a.shape[0], -1).T

    def flat_out(a):  # [*in, out] -> [out, in]
        return a.reshape(-1, a.shape[-1]).T

    def experts_in(a):  # [E, in, 2, F] -> [E, 2F, in]
        return a.transpose(0, 2, 3, 1).reshape(len(a), -1, a.shape[1])

    def network(name, ffn):
        put(f"{name}.gate_proj.weight", ffn.gate_up, lambda a: a[:, 0].T)
        put(f"{name}.up_proj.weight", ffn.gate_up, lambda a: a[:, 1].T)
        put(f"{name}.down_proj.weight", ffn.down, lambda a: a.T)

    def streams(name, s, prefix=""):
        if s is not None:
            put(f"{name}.{prefix}fn", s.map, lambda a: a.T)
            put(f"{name}.{prefix}base", s.base)
            put(f"{name}.{prefix}scale", s.scale)

    def compressor(name, c):
        put(f"{name}.position_bias", c.position)
        put(f"{name}.kv_proj.weight", c.kv, lambda a: a.T)
        put(f"{name}.gate_proj.weight", c.gate, lambda a: a.T)
        put(f"{name}.kv_norm.weight", c.norm.weight)

    def compressed(name, attn):
        put(f"{name}.sinks", attn.sink)
        put(f"{name}.q_a_proj.weight", attn.q_a, lambda a: a.T)
        put(f"{name}.q_a_norm.weight", attn.q_norm.weight)
        put(f"{name}.q_b_proj.weight", attn.q_b, flat_in)
        put(f"{name}.kv_proj.weight", attn.kv, lambda a: a.T)
        put(f"{name}.kv_norm.weight", attn.kv_norm.weight)
        # [J, K, G, R] -> [G * R, J * K] and [G, R, D] -> [D, G * R]
        put(f"{name}.o_a_proj.weight", attn.o_a, lambda a: a.transpose(2, 3, 0, 1).reshape(-1, a.shape[0] * a.shape[1]))
        put(f"{name}.o_b_proj.weight", attn.o_b, flat_out)
        if attn.compressor is not None:
            compressor(f"{name}.compressor", attn.compressor)
        if attn.indexer is not None:
            part = f"{name}.compressor.indexer"
            compressor(part, attn.indexer.compressor)
            put(f"{part}.q_b_proj.weight", attn.indexer.q, flat_in)
            put(f"{part}.scorer.weights_proj.weight", attn.indexer.weight, lambda a: a.T)

    def block(name, b):
        attn, ffn = b.attn, b.ffn
        put(f"{name}.input_layernorm.weight", b.attn_norm.weight)
        put(f"{name}.post_attention_layernorm.weight", b.ffn_norm.weight)
        streams(f"{name}.attn_hc", b.attn_streams)
        streams(f"{name}.ffn_hc", b.ffn_streams)
        if isinstance(attn.cfg, Compressed):
            compressed(f"{name}.self_attn", attn)
        elif isinstance(attn.cfg, GQA):
            for part in ("q", "k", "v"):
                put(f"{name}.self_attn.{part}_proj.weight", getattr(attn, part), flat_in)
                put(f"{name}.self_attn.{part}_proj.bias", getattr(attn, f"{part}_bias"))
        elif attn.cfg.q_rank is None:
            put(f"{name}.self_attn.q_proj.weight", attn.q, flat_in)
        else:
            put(f"{name}.self_attn.q_a_proj.weight", attn.q_a, flat_in)
            put(f"{name}.self_attn.q_a_layernorm.weight", attn.q_norm.weight)
            put(f"{name}.self_attn.q_b_proj.weight", attn.q_b, flat_in)
        if isinstance(attn.cfg, MLA):
            put(f"{name}.self_attn.kv_a_proj_with_mqa.weight", attn.kv_a, flat_in)
            put(f"{name}.self_attn.kv_a_layernorm.weight", attn.kv_norm.weight)
            put(f"{name}.self_attn.kv_b_proj.weight", attn.kv_b, flat_in)
        if isinstance(attn.cfg, MLA) and attn.cfg.indexer:
            part = f"{name}.self_attn.indexer"
            put(f"{part}.wq_b.weight", attn.indexer.q, flat_in)
            put(f"{part}.wk.weight", attn.indexer.k, lambda a: a.T)
            put(f"{part}.k_norm.weight", attn.indexer.k_norm.weight)
            put(f"{part}.k_norm.bias", attn.indexer.k_norm.bias)
            put(f"{part}.weights_proj.weight", attn.indexer.weight, lambda a: a.T)
        if not isinstance(attn.cfg, Compressed):
            put(f"{name}.self_attn.o_proj.weight", attn.o, flat_out)
        if not hasattr(ffn, "router"):
            return network(f"{name}.mlp", ffn)
        put(f"{name}.mlp.gate.weight", ffn.router.weight, lambda a: a.T)
        put(f"{name}.mlp.gate.e_score_correction_bias", ffn.router.bias)
        put(f"{name}.mlp.gate.tid2eid", ffn.router.table)
        put(f"{name}.mlp.experts.gate_up_proj", ffn.gate_up, experts_in)
        put(f"{name}.mlp.experts.down_proj", ffn.down, lambda a: a.transpose(0, 2, 1))
        return network(f"{name}.mlp.shared_experts", ffn.shared)

    put("model.embed_tokens.weight", model.embed)
    for stack, layers in zip(model.stacks, model.cfg.stacks, strict=True):
        for i, number in enumerate(layers.numbers):
            block(f"model.layers.{number}", jax.tree.map(lambda a, i=i: a[i], stack))
    put("model.norm.weight", model.norm.weight)
    streams("model.hc_head", model.collapse, "hc_")
    if model.head is not None:
        put("lm_head.weight", model.head, lambda a: a.T)
    for depth, module in enumerate(model.mtp):
        put(f"mtp.{depth}.enorm.weight", module.embed_norm.weight)
        put(f"mtp.{depth}.hnorm.weight", module.hidden_norm.weight)
        if model.collapse is None:
            put(f"mtp.{depth}.eh_proj.weight", module.proj, lambda a: a.T)
            put(f"mtp.{depth}.post_norm.weight", module.norm.weight)
        else:
            put(f"mtp.{depth}.e_proj.weight", module.embed_proj, lambda a: a.T)
            put(f"mtp.{depth}.h_proj.weight", module.hidden_proj, lambda a: a.T)
            put(f"mtp.{depth}.norm.weight", module.norm.weight)
            streams(f"mtp.{depth}.hc_head", module.collapse, "hc_")
        block(f"mtp.{depth}.mtp_block", module.block)
    return out


def torch_model(model: Transformer) -> Reference:
    """The reference with this model's weights; every one of its tensors is filled, none is left over."""
    reference = Reference(*build_modules(hf_config(model.cfg)))
    main, mtp = {}, {}
    for name, array in torch_tensors(model).items():
        (mtp if name.startswith("mtp.") else main)[name.removeprefix("mtp.")] = torch.tensor(array)
    if model.head is None:
        main["lm_head.weight"] = main["model.embed_tokens.weight"]
    reference.main.load_state_dict(main, strict=True)
    reference.mtp.load_state_dict(mtp, strict=True)
    return reference


@dataclass(frozen=True)
class Pair:
    """Our model and the reference, with the same weights, and tokens int32 [B, T] for both."""

    model: Transformer
    reference: Reference
    tokens: jax.Array

    def observe(self, **arguments) -> Observed:
        with torch.no_grad():
            return self.reference.run(self.tokens, **arguments)


@cache
def pair(cfg: ModelConfig, batch: int = 2, length: int = 96, seed: int = 0, bias_offset: float = 0.0) -> Pair:
    model = random_model(cfg, seed, bias_offset)
    return Pair(model, torch_model(model), random_tokens(cfg, batch, length, seed + 1))


def relative(ours, theirs) -> float:
    """Largest |difference| over the largest |reference value|."""
    ours, theirs = np.asarray(ours), np.asarray(theirs)
    assert ours.shape == theirs.shape, (ours.shape, theirs.shape)
    assert np.isfinite(ours).all()
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())


CAPTURED = ("attn", "ffn", "block", "router_scores")


@partial(jax.jit, static_argnames=("with_mtp", "logits", "capture", "ctx"))
def forward(model: Transformer, tokens: jax.Array, **arguments) -> Output:
    """The model's call, jitted once for all tests."""
    return model(tokens, **arguments)


def full(p: Pair, routing=None, ctx: Context | None = None) -> Output:
    """Everything the model returns; one compilation a config serves every test that asks for this."""
    cfg = p.model.cfg
    capture = CAPTURED if cfg.moe else CAPTURED[:3]
    return forward(p.model, p.tokens, routing=routing, with_mtp=cfg.mtp_depth > 0, capture=capture, ctx=ctx)


def experts(indices) -> np.ndarray:
    """A list of torch indices, one a layer, as int [L, B, T, K]."""
    return np.stack([np.asarray(index) for index in indices])


def assert_same_routing(ours, theirs, biased, moe) -> int:
    """Sets of experts [..., K] agree outside near-ties; returns how many tokens flipped at one."""
    result = agreement(np.asarray(ours), np.asarray(theirs), np.asarray(biased), moe)
    assert result.ok, result
    if result.flipped:
        print(f"{result.flipped} of {result.tokens} tokens flipped at near-ties of at most {result.widest:.1e}")
    return result.flipped
