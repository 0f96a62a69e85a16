"""Tiny twins: every mechanism of a release, small enough to train on two CPU cores."""

from dataclasses import replace

from deepseek_jax.configs.multimodal import VQ, JanusConfig, Vision
from deepseek_jax.configs.releases.dense import dense
from deepseek_jax.configs.releases.v2 import softmax_moe
from deepseek_jax.configs.schema import (
    GQA,
    MLA,
    Compressed,
    HyperConnections,
    Indexer,
    Llama3,
    ModelConfig,
    MoE,
    Rope,
    Yarn,
)


def tiny_v3(name: str) -> ModelConfig:
    """V3 in every mechanism at 6 million parameters: what `checkpoints/tiny-v3` holds, trained on 2 CPU cores."""
    yarn = Yarn(factor=4.0, original_length=512, mscale=1.0, mscale_all_dim=1.0)
    return ModelConfig(
        name=name,
        vocab_size=2048,
        dim=256,
        n_layers=5,
        n_dense_layers=1,
        ffn_dim=320,
        attention=MLA(n_heads=4, q_rank=128, kv_rank=64, nope_dim=32, rope_dim=16, v_dim=32, rope=Rope(10000.0, yarn)),
        moe=MoE(n_experts=16, top_k=4, expert_dim=64, n_shared=1, n_groups=4, top_groups=2, scale=2.5),
        mtp_depth=1,
        max_length=2048,
        init_std=0.02,
    )


# Twins of the other releases have tiny-v3's sizes.
TINY = (2048, 256, 5, 640)


def tiny_dense(name: str, attention: GQA, model_type: str, **rest) -> ModelConfig:
    return dense(name, TINY, attention, max_length=2048, init_std=0.02, model_type=model_type, **rest)


def tiny_llm(name: str) -> ModelConfig:
    """DeepSeek-LLM 67B's mechanisms: grouped queries without biases, a plain RoPE."""
    return tiny_dense(name, GQA(n_heads=4, n_kv_heads=2, head_dim=64), "llama")


def tiny_distill_qwen(name: str) -> ModelConfig:
    """R1-Distill-Qwen's mechanisms: grouped queries with biases."""
    return tiny_dense(name, GQA(n_heads=4, n_kv_heads=2, head_dim=64, bias=True), "qwen2")


def tiny_distill_llama(name: str) -> ModelConfig:
    """R1-Distill-Llama's mechanisms: grouped queries, a RoPE that is extended as Llama 3.1's is."""
    rope = Rope(500000.0, interleaved=False, llama3=Llama3(4.0, 512))
    return tiny_dense(name, GQA(n_heads=4, n_kv_heads=2, head_dim=64, rope=rope), "llama", norm_eps=1e-5)


def tiny_moe(name: str) -> ModelConfig:
    """DeepSeekMoE 16B's mechanisms: multi-head attention, softmax scores, two shared experts, the first layer dense."""
    base, moe = tiny_v3(name), softmax_moe(n_experts=16, top_k=4, expert_dim=64)
    attention = GQA(n_heads=4, n_kv_heads=4, head_dim=64)
    return replace(base, attention=attention, moe=moe, mtp_depth=0, model_type="deepseek")


def tiny_v2_lite(name: str) -> ModelConfig:
    """V2-Lite's mechanisms: MLA without compressed queries, softmax scores without groups."""
    base, moe = tiny_v3(name), softmax_moe(n_experts=16, top_k=4, expert_dim=64)
    rope = Rope(10000.0, Yarn(factor=4.0, original_length=512, mscale=0.707, mscale_all_dim=0.707))
    attention = replace(base.attention, q_rank=None, rope=rope)
    return replace(base, attention=attention, moe=moe, mtp_depth=0, model_type="deepseek_v2")


def tiny_v2(name: str) -> ModelConfig:
    """V2's mechanisms: those of V2-Lite with compressed queries, and groups of experts scored by their best."""
    base = tiny_v2_lite(name)
    moe = replace(base.moe, n_groups=4, top_groups=2, scale=4.0)
    return replace(base, attention=replace(base.attention, q_rank=128), moe=moe)


def tiny_v32(name: str) -> ModelConfig:
    """V3.2's mechanisms: tiny-v3 with an indexer that chooses 64 keys."""
    base = tiny_v3(name)
    indexer = Indexer(index_heads=16, index_dim=32, index_top_k=64)
    return replace(base, attention=replace(base.attention, indexer=indexer), model_type="deepseek_v32")


def tiny_v4(name: str) -> ModelConfig:
    """V4's mechanisms: recent tokens, entries of 4 tokens that an indexer chooses and of 16 that all are seen, two
    RoPEs, four residual streams, experts chosen by a hash in the first three layers."""
    moe = MoE(16, 4, 64, scale=1.5, score="sqrtsoftplus", n_hash=3, limit=10.0)
    return ModelConfig(
        name=name,
        vocab_size=2048,
        dim=256,
        n_layers=7,
        n_dense_layers=0,
        ffn_dim=moe.expert_dim,
        attention=Compressed(
            n_heads=4,
            head_dim=64,
            rope_dim=16,
            q_rank=128,
            o_groups=2,
            o_rank=64,
            window=32,
            ratios=(0, 0, 4, 16, 4, 16, 4),
            indexer=Indexer(index_heads=16, index_dim=32, index_top_k=16),
            entry_rope=Rope(160000.0, Yarn(factor=4.0, original_length=512)),
        ),
        moe=moe,
        mtp_depth=1,
        max_length=2048,
        init_std=0.02,
        model_type="deepseek_v4",
        residual=HyperConnections(),
    )


def tiny_janus(name: str) -> JanusConfig:
    """Janus-Pro's mechanisms at a size for tests and laptops: pictures of 64 pixels are 64 tokens, or 64 codes."""
    attention = GQA(n_heads=4, n_kv_heads=4, head_dim=64)
    language = tiny_dense(name, attention, "llama")
    return JanusConfig(
        name,
        language,
        vision=Vision(image_size=64, patch=8, dim=128, n_layers=4, n_heads=4, ffn_dim=512),
        vq=VQ(n_codes=512, code_dim=8, z_dim=64, channels=32, multipliers=(1, 1, 2, 2)),
        head_dim=256,
        image_id=2047,
    )
