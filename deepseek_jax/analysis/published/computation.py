"""Published FLOPs: of DeepSeekMoE's models by its own convention, a token in training, and V4's beside V3.2's."""

from fractions import Fraction

from deepseek_jax.analysis.counts import counts
from deepseek_jax.analysis.forms import reads
from deepseek_jax.analysis.published.cache import LLAMA_405B, QWEN_72B
from deepseek_jax.analysis.published.figure import CONTEXT, Figure, counted
from deepseek_jax.configs.releases.dense import dense
from deepseek_jax.configs.schema import MLA, Compressed, ModelConfig
from deepseek_jax.configs.zoo import zoo

_MOE, _INSIGHTS, _V4 = "2401.06066", "2505.09343 table 2", "2606.19348 §1"
_FP8 = (
    "the paper counts in FP8's FLOPs; that attention and what the files keep in bfloat16 count two there, and the "
    "indexer's FP4 half, is our reading, and every multiply-add alike it is "
)


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


def bfloat16_matrices(cfg: ModelConfig) -> int:
    """Elements of the matrices of V3.2's and V4's files that are not in FP8 or FP4, lookups left out: head, routers,
    the indexer's weights of its heads, what makes V4's entries, and the maps of its streams."""
    total = cfg.vocab_size * cfg.dim
    for layer in cfg.layers:
        a = layer.attention
        indexed = a.sparse if isinstance(a, Compressed) else a.indexer is not None
        width = layer.ffn.n_experts if layer.is_moe else 0
        width += a.indexer.index_heads if indexed else 0
        if isinstance(a, Compressed) and a.ratio:
            width += 2 * (2 * a.head_dim + 2 * a.indexer.index_dim if indexed else a.head_dim)
        total += width * cfg.dim
    if cfg.residual is not None:
        H = cfg.residual.n_streams
        total += (2 * cfg.n_layers * (2 * H + H * H) + H) * H * cfg.dim
    return total


def fp8_flops(cfg: ModelConfig, length: int) -> Fraction:
    """FLOPs of one more token after ``length``, in those of FP8: a product in bfloat16 counts two, one of FP4 with FP8
    one (V4 §1), one of FP4 with FP4 half. Attention is in bfloat16, the indexer in FP8 and V4's in FP4."""
    matrices = counts(cfg, length).activated_no_embedding + bfloat16_matrices(cfg)
    attention = Fraction(0)
    for a in (layer.attention for layer in cfg.layers):
        chosen = Fraction(1) if isinstance(a, MLA) else Fraction(1, 2)
        attention += sum((chosen if read.chooses else 2) * read.after(length) for read in reads(a, cached=True))
    return 2 * (matrices + attention)


def _v4_share(release: str) -> Fraction:
    """After a million tokens, to V3.2's."""
    return fp8_flops(zoo(release), 2**20) / fp8_flops(zoo("deepseek-v3.2"), 2**20)


FIGURES = (
    Figure("v4-flash-flops", "V4-Flash, FLOPs of a token at 1M to V3.2's", _V4, "10", "%",
           lambda: _v4_share("deepseek-v4-flash"), f"{_FP8}12.10%", releases=("deepseek-v4-flash",)),
    Figure("v4-pro-flops", "V4-Pro, FLOPs of a token at 1M to V3.2's", _V4, "27", "%",
           lambda: _v4_share("deepseek-v4-pro"), f"{_FP8}26.09%", releases=("deepseek-v4-pro",)),
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
