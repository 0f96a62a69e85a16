"""V4-Flash and V4-Pro (2606.19348; numbers of the released config.json)."""

from deepseek_jax.configs.schema import Compressed, HyperConnections, Indexer, ModelConfig, MoE, Rope, Yarn

# Entries of 4 tokens, of which an indexer chooses, and of 128.
SPARSE, HEAVY = 4, 128


def deepseek_v4_flash(name: str) -> ModelConfig:
    """DeepSeek-V4-Flash: 284B parameters, 13B activated."""
    return _v4(
        name,
        dim=4096,
        ratios=(0, 0, *(SPARSE, HEAVY) * 20, SPARSE),
        heads=(64, 1024, 8),
        index_top_k=512,
        moe=MoE(256, 6, 2048, scale=1.5, score="sqrtsoftplus", n_hash=3, limit=10.0),
    )


def deepseek_v4_pro(name: str) -> ModelConfig:
    """DeepSeek-V4-Pro: 1.6T parameters, 49B activated."""
    return _v4(
        name,
        dim=7168,
        ratios=(HEAVY, HEAVY, *(SPARSE, HEAVY) * 29, SPARSE),
        heads=(128, 1536, 16),
        index_top_k=1024,
        moe=MoE(384, 6, 3072, scale=2.5, score="sqrtsoftplus", n_hash=3, limit=10.0),
    )


def _v4(
    name: str, dim: int, ratios: tuple[int, ...], heads: tuple[int, int, int], index_top_k: int, moe: MoE
) -> ModelConfig:
    """``heads``: their number, the rank of their queries, and the groups in which they leave."""
    n_heads, q_rank, o_groups = heads
    return ModelConfig(
        name=name,
        vocab_size=129280,
        dim=dim,
        n_layers=len(ratios),
        n_dense_layers=0,
        ffn_dim=moe.expert_dim,
        attention=Compressed(
            n_heads=n_heads,
            head_dim=512,
            rope_dim=64,
            q_rank=q_rank,
            o_groups=o_groups,
            o_rank=1024,
            window=128,
            ratios=ratios,
            indexer=Indexer(index_heads=64, index_dim=128, index_top_k=index_top_k),
            entry_rope=Rope(160000.0, Yarn(factor=16.0, original_length=65536)),
        ),
        moe=moe,
        mtp_depth=1,
        max_length=1048576,
        model_type="deepseek_v4",
        residual=HyperConnections(),
    )
