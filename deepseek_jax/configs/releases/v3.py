"""V3 and what has its architecture: R1, V3.1, V3.2, Moonlight, Kimi-K2.

Numbers of a config.json are those of the file beside its weights, unless the docstring names another source.
"""

from dataclasses import replace

from deepseek_jax.configs.schema import MLA, Indexer, ModelConfig, MoE, Rope, Yarn


def deepseek_v3(name: str) -> ModelConfig:
    """DeepSeek-V3 technical report (2412.19437) §4.2 and the released config.json."""
    yarn = Yarn(factor=40.0, original_length=4096, mscale=1.0, mscale_all_dim=1.0)
    return ModelConfig(
        name=name,
        vocab_size=129280,
        dim=7168,
        n_layers=61,
        n_dense_layers=3,
        ffn_dim=18432,
        attention=MLA(
            n_heads=128,
            q_rank=1536,
            kv_rank=512,
            nope_dim=128,
            rope_dim=64,
            v_dim=128,
            rope=Rope(10000.0, yarn),
        ),
        moe=MoE(n_experts=256, top_k=8, expert_dim=2048, n_shared=1, n_groups=8, top_groups=4, scale=2.5),
        mtp_depth=1,
        max_length=163840,
    )


def deepseek_v32(name: str) -> ModelConfig:
    """DeepSeek-V3.2 (2512.02556) and V3.2-Exp: V3 with an indexer in every layer (the released config.json)."""
    base = deepseek_v3(name)
    indexer = Indexer(index_heads=64, index_dim=128, index_top_k=2048)
    return replace(base, attention=replace(base.attention, indexer=indexer), model_type="deepseek_v32")


def moonlight_16b(name: str) -> ModelConfig:
    """Moonlight-16B-A3B: V3's architecture at 16B (2502.16982, table 4, and its config.json)."""
    return ModelConfig(
        name=name,
        vocab_size=163840,
        dim=2048,
        n_layers=27,
        n_dense_layers=1,
        ffn_dim=11264,
        attention=MLA(n_heads=16, kv_rank=512, nope_dim=128, rope_dim=64, v_dim=128, rope=Rope(50000.0)),
        moe=MoE(n_experts=64, top_k=6, expert_dim=1408, n_shared=2, scale=2.446),
        norm_eps=1e-5,
        max_length=8192,
        bos_id=163584,
        eos_ids=(163585,),
    )


def kimi_k2(name: str) -> ModelConfig:
    """Kimi-K2: V3's architecture with 384 experts and 64 heads (2507.20534, table 2, and its config.json).

    Its beta_fast is 1, as beta_slow is: YaRN's ramp is one frequency wide.
    """
    yarn = Yarn(factor=32.0, original_length=4096, beta_fast=1.0, beta_slow=1.0, mscale=1.0, mscale_all_dim=1.0)
    return ModelConfig(
        name=name,
        vocab_size=163840,
        dim=7168,
        n_layers=61,
        n_dense_layers=1,
        ffn_dim=18432,
        attention=MLA(
            n_heads=64,
            q_rank=1536,
            kv_rank=512,
            nope_dim=128,
            rope_dim=64,
            v_dim=128,
            rope=Rope(50000.0, yarn),
        ),
        moe=MoE(n_experts=384, top_k=8, expert_dim=2048, n_shared=1, scale=2.827),
        norm_eps=1e-6,
        max_length=131072,
        model_type="kimi_k2",
        bos_id=163584,
        eos_ids=(163585,),
    )
