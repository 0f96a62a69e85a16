"""V2, V2-Lite and DeepSeekMoE 16B: softmax scores.

Numbers of a config.json are those of the file beside its weights, unless the docstring names another source.
"""

from deepseek_jax.configs.releases.dense import LLM_IDS
from deepseek_jax.configs.schema import GQA, MLA, ModelConfig, MoE, Rope, Yarn


def softmax_moe(**sizes) -> MoE:
    """The experts of V1 and V2: two shared ones, softmax scores, no bias, a group as good as its best expert."""
    return MoE(n_shared=2, normalize=False, score="softmax", group_score="max", bias=False, **sizes)


def v2_rope(mscale: float) -> Rope:
    return Rope(10000.0, Yarn(factor=40.0, original_length=4096, mscale=mscale, mscale_all_dim=mscale))


def deepseek_moe_16b(name: str) -> ModelConfig:
    """DeepSeekMoE 16B (2401.06066 §5.1.2 and its config.json): softmax scores, which are not normalised again."""
    return ModelConfig(
        name=name,
        vocab_size=102400,
        dim=2048,
        n_layers=28,
        n_dense_layers=1,
        ffn_dim=10944,
        attention=GQA(n_heads=16, n_kv_heads=16, head_dim=128),
        moe=softmax_moe(n_experts=64, top_k=6, expert_dim=1408),
        max_length=4096,
        model_type="deepseek",
        **LLM_IDS,
    )


def deepseek_v2_lite(name: str) -> ModelConfig:
    """DeepSeek-V2-Lite (2405.04434, appendix B, and its config.json): queries are not compressed, no groups."""
    return ModelConfig(
        name=name,
        vocab_size=102400,
        dim=2048,
        n_layers=27,
        n_dense_layers=1,
        ffn_dim=10944,
        attention=MLA(n_heads=16, kv_rank=512, nope_dim=128, rope_dim=64, v_dim=128, rope=v2_rope(0.707)),
        moe=softmax_moe(n_experts=64, top_k=6, expert_dim=1408),
        max_length=163840,
        model_type="deepseek_v2",
        **LLM_IDS,
    )


def deepseek_v2(name: str) -> ModelConfig:
    """DeepSeek-V2 (2405.04434 §3.1.2) and what was made of it: V2.5 and Coder-V2 have its architecture.

    YaRN's mscale is the paper's (§3.1.4: 0.0707 ln s + 1). Files of this size with 1.0 are about: a checkpoint's own
    config.json decides.
    """
    return ModelConfig(
        name=name,
        vocab_size=102400,
        dim=5120,
        n_layers=60,
        n_dense_layers=1,
        ffn_dim=12288,
        attention=MLA(n_heads=128, q_rank=1536, kv_rank=512, nope_dim=128, rope_dim=64, v_dim=128, rope=v2_rope(0.707)),
        moe=softmax_moe(n_experts=160, top_k=6, expert_dim=1536, n_groups=8, top_groups=3, scale=16.0),
        max_length=163840,
        model_type="deepseek_v2",
        **LLM_IDS,
    )
