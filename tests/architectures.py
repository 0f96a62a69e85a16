"""Tiny configs of the family's architectures beside V3, one a mechanism; sequences pass the original context of 64."""

from dataclasses import replace

from tiny import tiny_config

from deepseek_jax.configs.schema import GQA, Compressed, HyperConnections, Indexer, Llama3, ModelConfig, MoE, Rope, Yarn

SOFTMAX = MoE(8, 3, 48, n_shared=2, normalize=False, score="softmax", group_score="max", bias=False)


def _dense(attention: GQA, model_type: str, **rest) -> ModelConfig:
    return tiny_config(
        n_dense_layers=3, moe=None, mtp_depth=0, attention=attention, model_type=model_type, norm_eps=1e-5, **rest
    )


def _mla(moe: MoE, **changes) -> ModelConfig:
    rope = Rope(yarn=Yarn(4.0, 64, mscale=0.707, mscale_all_dim=0.707))
    attention = replace(tiny_config().attention, rope=rope, **changes)
    return tiny_config(attention=attention, moe=moe, mtp_depth=0, model_type="deepseek_v2")


def _indexed(indexer: Indexer) -> ModelConfig:
    return tiny_config(attention=replace(tiny_config().attention, indexer=indexer), model_type="deepseek_v32")


def _compressed() -> ModelConfig:
    """As V4-Flash's layers begin: recent tokens twice, entries of 4, then these two in turn with entries of 8."""
    attention = Compressed(
        n_heads=4,
        head_dim=16,
        rope_dim=8,
        q_rank=48,
        o_groups=2,
        o_rank=24,
        window=16,
        ratios=(0, 0, 4, 8, 4, 8, 4),
        indexer=Indexer(index_heads=16, index_dim=16, index_top_k=6),
        entry_rope=Rope(160000.0, Yarn(4.0, 64)),
    )
    return tiny_config(
        n_layers=7,
        n_dense_layers=0,
        ffn_dim=48,
        attention=attention,
        moe=MoE(8, 2, 48, scale=1.5, score="sqrtsoftplus", n_hash=3, limit=1.5),
        residual=HyperConnections(sinkhorn_steps=5),
        model_type="deepseek_v4",
    )


ARCHITECTURES = {
    "v4": _compressed(),
    "v3.2": _indexed(Indexer(index_heads=16, index_dim=16, index_top_k=12)),
    "distill-qwen": _dense(GQA(4, 2, 16, bias=True), "qwen2"),
    "distill-qwen, tied, yarn": _dense(
        GQA(4, 1, 16, bias=True, rope=Rope(1e6, Yarn(4.0, 64, mscale=0.0, mscale_all_dim=0.0), False)),
        "qwen2",
        tie_embeddings=True,
    ),
    "distill-llama": _dense(GQA(4, 2, 16, rope=Rope(500000.0, interleaved=False, llama3=Llama3(8.0, 64))), "llama"),
    "deepseek-llm": _dense(GQA(4, 4, 16), "llama"),
    "deepseek-moe": tiny_config(attention=GQA(4, 4, 16), moe=SOFTMAX, mtp_depth=0, model_type="deepseek"),
    "v2-lite": _mla(SOFTMAX, q_rank=None),
    "v2": _mla(replace(SOFTMAX, n_groups=4, top_groups=2, scale=16.0)),
}
