"""Janus-Pro (2501.17811, table 1; the config.json beside its weights)."""

from deepseek_jax.configs.multimodal import JanusConfig
from deepseek_jax.configs.releases.dense import LLM_IDS, dense
from deepseek_jax.configs.schema import GQA


def janus_pro(name: str, sizes: tuple[int, ...], n_heads: int) -> JanusConfig:
    """SigLIP-L/16 at 384 pixels, VQ-16 and DeepSeek-LLM's architecture; ``sizes``: of `dense`.

    The paper's context is 4096 tokens, the language model's own, by its config.json, 16384.
    """
    attention = GQA(n_heads, n_heads, head_dim=128)
    language = dense(name, sizes, attention, max_length=16384, init_std=0.02, model_type="llama", **LLM_IDS)
    return JanusConfig(name, language, head_dim=language.dim)
