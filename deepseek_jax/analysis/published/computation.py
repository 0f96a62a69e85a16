"""Published FLOPs: of DeepSeekMoE's models by its own convention, and a token in training."""

from fractions import Fraction

from deepseek_jax.analysis.counts import counts
from deepseek_jax.analysis.published.cache import LLAMA_405B, QWEN_72B
from deepseek_jax.analysis.published.figure import CONTEXT, Figure, counted
from deepseek_jax.configs.releases.dense import dense
from deepseek_jax.configs.zoo import zoo

_MOE, _INSIGHTS, _V4 = "2401.06066", "2505.09343 table 2", "2606.19348"
_ALIKE = "every operation counts alike here; how theirs weighs FP4, FP8 and bfloat16 is not published"


def moe_flops(layers: int, width: int, networks: Fraction | int, vocabulary: int, tokens: int) -> Fraction:
    """Training FLOPs of a row of ``tokens``, as DeepSeekMoE's tables count them.

    A token multiplies with 4 d^2 parameters of attention and ``networks`` times 8 d^2 of feed-forward networks in every
    layer, dense first layers included; attention is not causal and has as many key heads as query heads.
    """
    weights = layers * (4 + 8 * networks) * width**2
    return Fraction(tokens * (6 * (weights + vocabulary * width) + 12 * layers * width * tokens))


def _small(networks: int) -> Fraction:
    return moe_flops(9, 1280, networks, 8192, 2048)


def _release(name: str, networks: int) -> Fraction:
    cfg = zoo(name)
    return moe_flops(cfg.n_layers, cfg.dim, networks, cfg.vocab_size, CONTEXT)


def _moe_16b() -> Fraction:
    return _release("deepseek-moe-16b", 2)


def _dense_7b() -> Fraction:
    return _release("deepseek-llm-7b", 1)


def _llama_7b() -> Fraction:
    return moe_flops(32, 4096, 1, 32000, CONTEXT)


def _moe_145b(experts: int) -> Fraction:
    return moe_flops(62, 4096, Fraction(experts * 3 * 1408, 8 * 4096), 102400, CONTEXT)


def _dense_token(attention, layers: int, sizes: tuple[int, int, int]) -> int:
    vocabulary, width, inner = sizes
    return counts(dense("other", (vocabulary, width, layers, inner), attention), CONTEXT).flops_per_token


def _v4_share(release: str) -> Fraction:
    """FLOPs of one more token after a million, to V3.2's."""
    ours, v32 = (counts(zoo(name), 2**20).decode_flops_per_token for name in (release, "deepseek-v3.2"))
    return Fraction(ours, v32)


FIGURES = (
    Figure("v4-flash-flops", "V4-Flash, FLOPs of a token at 1M to V3.2's", _V4, "10", "%",
           lambda: _v4_share("deepseek-v4-flash"), _ALIKE, releases=("deepseek-v4-flash",)),
    Figure("v4-pro-flops", "V4-Pro, FLOPs of a token at 1M to V3.2's", _V4, "27", "%",
           lambda: _v4_share("deepseek-v4-pro"), _ALIKE, releases=("deepseek-v4-pro",)),
    Figure("flops-dense-0.2b", "dense 0.2B, 2K tokens", f"{_MOE} table 1", "2.9", "TFLOPs", lambda: _small(1)),
    Figure("flops-moe-2b", "DeepSeekMoE and GShard 2B, 2K tokens", f"{_MOE} table 1", "4.3", "TFLOPs",
           lambda: _small(2)),
    Figure("flops-gshard-1.5", "GShard x1.5, 2K tokens", f"{_MOE} table 2", "5.8", "TFLOPs", lambda: _small(3)),
    Figure("flops-dense-16", "dense x16, 2K tokens", f"{_MOE} table 2", "24.6", "TFLOPs", lambda: _small(16)),
    Figure("flops-moe-16b", "DeepSeekMoE 16B, 4K tokens", f"{_MOE} table 3", "74.4", "TFLOPs", _moe_16b),
    Figure("flops-llm-7b", "DeepSeek 7B, 4K tokens", f"{_MOE} table 3", "183.5", "TFLOPs", _dense_7b),
    Figure("flops-llama2-7b", "LLaMA2 7B, 4K tokens", f"{_MOE} table 4", "187.9", "TFLOPs", _llama_7b),
    Figure("flops-share-7b", "DeepSeekMoE 16B to DeepSeek 7B", f"{_MOE} §5.2.1", "40.5", "%",
           lambda: _moe_16b() / _dense_7b(), "40.56%; the rounded 74.4 and 183.5 give 40.54%"),
    Figure("flops-share-llama2", "DeepSeekMoE 16B to LLaMA2 7B", f"{_MOE} §5.2.2", "39.6", "%",
           lambda: _moe_16b() / _llama_7b()),
    Figure("flops-llm-67b", "DeepSeek 67B, 4K tokens", f"{_MOE} table 6", "2057.5", "TFLOPs",
           lambda: _release("deepseek-llm-67b", 1), "as if it had no grouped queries"),
    Figure("flops-gshard-137b", "GShard 137B, 4K tokens", f"{_MOE} table 6", "572.7", "TFLOPs",
           lambda: moe_flops(62, 4096, 2, 102400, CONTEXT)),
    Figure("flops-moe-145b", "DeepSeekMoE 145B, 4K tokens", f"{_MOE} table 6", "585.6", "TFLOPs", lambda: _moe_145b(16),
           "585.49 with experts 1408 wide, a width that is inferred: the paper does not state it"),
    Figure("flops-moe-142b", "DeepSeekMoE 142B, half activated, 4K tokens", f"{_MOE} table 6", "374.6", "TFLOPs",
           lambda: _moe_145b(8), "with experts 1408 wide, which is inferred"),
    Figure("v2-training", "V2, training a token", _INSIGHTS, "155", "GFLOPs",
           lambda: counted("deepseek-v2").flops_per_token, releases=("deepseek-v2",)),
    Figure("v3-training", "V3, training a token", _INSIGHTS, "250", "GFLOPs",
           lambda: counted("deepseek-v3").flops_per_token, "6 N and causal attention at 4096 tokens",
           releases=("deepseek-v3",)),
    Figure("qwen-72b-training", "Qwen2.5 72B, training a token", _INSIGHTS, "394", "GFLOPs",
           lambda: _dense_token(*QWEN_72B, (152064, 8192, 29568)),
           "not known: by the convention that gives V2's and V3's it is 445, and 6 N alone is 429"),
    Figure("llama-405b-training", "LLaMA-3.1 405B, training a token", _INSIGHTS, "2448", "GFLOPs",
           lambda: _dense_token(*LLAMA_405B, (128256, 16384, 53248)),
           "not known: by the convention that gives V2's and V3's it is 2473, and 6 N alone is 2423"),
)  # fmt: skip
