"""The config of each release. Numbers of a config.json are those of the file beside its weights, unless the docstring
names another source.
"""

from dataclasses import replace

from deepseek_jax.configs.schema import GQA, MLA, Indexer, Llama3, ModelConfig, MoE, Rope, Yarn


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


def dense(name: str, sizes: tuple[int, ...], attention: GQA, **rest) -> ModelConfig:
    """A Llama-like model; ``sizes``: vocabulary, width, layers, inner width."""
    vocab_size, dim, n_layers, ffn_dim = sizes
    return ModelConfig(
        name=name,
        vocab_size=vocab_size,
        dim=dim,
        n_layers=n_layers,
        n_dense_layers=n_layers,
        ffn_dim=ffn_dim,
        attention=attention,
        moe=None,
        **rest,
    )


# The tokenizer of DeepSeek-LLM, DeepSeekMoE and V2: bos and eos of their config.json.
LLM_IDS = {"bos_id": 100000, "eos_ids": (100001,)}


def deepseek_llm(name: str, sizes: tuple[int, ...], heads: tuple[int, int]) -> ModelConfig:
    """DeepSeek-LLM (2401.02954, table 2, and its config.json): Llama's architecture; the 67B has grouped queries."""
    attention = GQA(*heads, head_dim=128)
    return dense(name, sizes, attention, max_length=4096, model_type="llama", **LLM_IDS)


def distill_qwen(name: str, sizes: tuple[int, ...], heads: tuple[int, int], theta: float, eps: float) -> ModelConfig:
    """DeepSeek-R1-Distill-Qwen: Qwen2.5's architecture (2412.15115), sizes, theta and eps of its config.json.

    The head is not tied to the embedding, not even in the 1.5B model, whose base ties it.
    """
    attention = GQA(*heads, head_dim=128, bias=True, rope=Rope(theta, interleaved=False))
    ids = {"bos_id": 151643, "eos_ids": (151643,)}
    return dense(name, sizes, attention, norm_eps=eps, max_length=131072, init_std=0.02, model_type="qwen2", **ids)


def distill_llama(name: str, sizes: tuple[int, ...], heads: tuple[int, int]) -> ModelConfig:
    """DeepSeek-R1-Distill-Llama: Llama 3.1's architecture at 8B and 3.3's at 70B (2407.21783, table 3)."""
    rope = Rope(500000.0, interleaved=False, llama3=Llama3(8.0, 8192, low_turns=1.0, high_turns=4.0))
    attention = GQA(*heads, head_dim=128, rope=rope)
    ids = {"bos_id": 128000, "eos_ids": (128001,)}
    return dense(name, sizes, attention, norm_eps=1e-5, max_length=131072, init_std=0.02, model_type="llama", **ids)


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


def softmax_moe(**sizes) -> MoE:
    """The experts of V1 and V2: two shared ones, softmax scores, no bias, a group as good as its best expert."""
    return MoE(n_shared=2, normalize=False, score="softmax", group_score="max", bias=False, **sizes)


def v2_rope(mscale: float) -> Rope:
    return Rope(10000.0, Yarn(factor=40.0, original_length=4096, mscale=mscale, mscale_all_dim=mscale))


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
