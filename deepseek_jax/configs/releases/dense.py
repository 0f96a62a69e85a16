"""Dense models: DeepSeek-LLM and R1's distilled ones.

Numbers of a config.json are those of the file beside its weights, unless the docstring names another source.
"""

from deepseek_jax.configs.schema import GQA, Llama3, ModelConfig, Rope


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
