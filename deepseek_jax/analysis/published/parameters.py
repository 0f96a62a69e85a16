"""Published parameters, in all and activated."""

import math
from collections.abc import Callable

from deepseek_jax.analysis.published.figure import Figure, counted
from deepseek_jax.configs.schema import ModelConfig
from deepseek_jax.configs.zoo import zoo

_MOE, _V2, _V3, _V4 = "2401.06066", "2405.04434", "2412.19437", "2606.19348"
_LLM, _KIMI, _MOONLIGHT = "2401.02954", "2507.20534", "2502.16982 table 4"
_PAGE = "the release's page"
_COUNTED = "transformers' class, counted"
_CONFIG = "config.json, from"
_V2S = ("deepseek-v2", "deepseek-v2.5", "deepseek-coder-v2")
_V3S = ("deepseek-v3", "deepseek-r1", "deepseek-v3.1")
# Rows and columns of one FP8 scale in V3's published files.
BLOCK = 128


def fp8_scales(cfg: ModelConfig) -> int:
    """Scales in the published files of a model of V3's kind: one a block of every matrix that is stored in FP8.

    Embedding, head, router and MTP projection are not.
    """
    a, moe = cfg.attention, cfg.moe

    def blocks(rows: int, columns: int) -> int:
        return math.ceil(rows / BLOCK) * math.ceil(columns / BLOCK)

    attention = (
        blocks(a.q_rank, cfg.dim)
        + blocks(a.n_heads * (a.nope_dim + a.rope_dim), a.q_rank)
        + blocks(a.kv_rank + a.rope_dim, cfg.dim)
        + blocks(a.n_heads * (a.nope_dim + a.v_dim), a.kv_rank)
        + blocks(cfg.dim, a.n_heads * a.v_dim)
    )
    shared = 3 * blocks(moe.n_shared * moe.expert_dim, cfg.dim)
    experts = moe.n_experts * 3 * blocks(moe.expert_dim, cfg.dim) + shared
    dense = cfg.n_dense_layers * 3 * blocks(cfg.ffn_dim, cfg.dim)
    return (cfg.n_layers + cfg.mtp_depth) * attention + dense + (cfg.n_moe_layers + cfg.mtp_depth) * experts


def _total(release: str) -> Callable[[], int]:
    return lambda: counted(release).total


def _activated(release: str) -> Callable[[], int]:
    """Without the input embedding, which is a lookup."""
    return lambda: counted(release).activated_no_embedding


def _with_both(name: str, published: str) -> Figure:
    """Activated parameters as papers that leave nothing out would count them."""
    release = f"deepseek-{name.lower()}"
    return Figure(f"{name.lower()}-activated-both", f"{name}, activated, with both embeddings", _CONFIG, published, "B",
                  lambda: counted(release).activated)  # fmt: skip


def _mtp_layer() -> int:
    c = counted("deepseek-v3")
    return c.mtp - c.mtp_components["projection"]


def _mtp_activated() -> int:
    c, moe = counted("deepseek-v3"), zoo("deepseek-v3").moe
    return _mtp_layer() - (moe.n_experts - moe.top_k) * c.expert + c.embedding


def _distill(model: str, published: str) -> Figure:
    release = f"r1-distill-{model}"
    name = f"{release}, parameters"
    return Figure(name.replace(", ", "-"), name, _PAGE, published, "B", _total(release), releases=(release,))


# The 2B models of DeepSeekMoE (§4.1.3): nine layers of width 1280, experts in all of them, a vocabulary of 8K.
_LAYERS, _WIDTH, _VOCABULARY = 9, 1280, 8192
_FFN = 8 * _WIDTH**2  # parameters of a standard feed-forward network


def _experts(number: float) -> int:
    """Parameters of so many standard networks in every layer."""
    return round(_LAYERS * number * _FFN)


FIGURES = (
    Figure("v4-flash-parameters", "V4-Flash, parameters", _V4, "284", "B", _total("deepseek-v4-flash"),
           "MTP and hash tables left out", releases=("deepseek-v4-flash",)),
    Figure("v4-flash-activated", "V4-Flash, activated", _V4, "13", "B", _activated("deepseek-v4-flash"),
           "without the input embedding; 13.80B with it", releases=("deepseek-v4-flash",)),
    Figure("v4-pro-parameters", "V4-Pro, parameters", _V4, "1.6", "T", _total("deepseek-v4-pro"),
           "MTP and hash tables left out", releases=("deepseek-v4-pro",)),
    Figure("v4-pro-activated", "V4-Pro, activated", _V4, "49", "B", _activated("deepseek-v4-pro"),
           "without the input embedding; 49.78B with it", releases=("deepseek-v4-pro",)),
    Figure("v4-flash-mtp", "V4-Flash, MTP module", _CONFIG, "6.61", "B", lambda: counted("deepseek-v4-flash").mtp,
           "which has no copies of embedding and head"),
    Figure("v4-pro-mtp", "V4-Pro, MTP module", _CONFIG, "25.84", "B", lambda: counted("deepseek-v4-pro").mtp,
           "which has no copies of embedding and head"),
    Figure("v4-pro-with-mtp", "V4-Pro, parameters, MTP module included", _CONFIG, "1.5988", "T",
           lambda: counted("deepseek-v4-pro").total + counted("deepseek-v4-pro").mtp,
           "the paper's 1.6T either way: 1.5730T without the module", releases=("deepseek-v4-pro",)),
    *(_with_both(*row) for row in (("V2-Lite", "2.661"), ("V2", "21.376"), ("V3", "37.552"), ("V3.2", "38.404"),
                                   ("V4-Flash", "13.800"), ("V4-Pro", "49.779"))),
    Figure("v3.2-parameters", "V3.2, parameters", _COUNTED, "671.88", "B", _total("deepseek-v3.2"),
           releases=("deepseek-v3.2",)),
    Figure("v3.2-activated", "V3.2, activated, without embedding", _COUNTED, "37.48", "B",
           _activated("deepseek-v3.2"), releases=("deepseek-v3.2",)),
    Figure("v3.2-indexer", "V3.2, indexer of a layer", _COUNTED, "13.96", "M",
           lambda: counted("deepseek-v3.2").attention_per_layer - counted("deepseek-v3").attention_per_layer),
    Figure("llm-7b-parameters", "DeepSeek LLM 7B, parameters", _LLM, "7", "B", _total("deepseek-llm-7b"),
           releases=("deepseek-llm-7b",)),
    Figure("llm-67b-parameters", "DeepSeek LLM 67B, parameters", _LLM, "67", "B", _total("deepseek-llm-67b"),
           releases=("deepseek-llm-67b",)),
    Figure("moe-2b-total", "DeepSeekMoE 2B, parameters", f"{_MOE} table 1", "2.0", "B",
           lambda: _experts(16) + _LAYERS * 4 * _WIDTH**2 + 2 * _VOCABULARY * _WIDTH),
    Figure("moe-2b-experts", "DeepSeekMoE 2B, expert parameters", f"{_MOE} table 2", "1.89", "B", lambda: _experts(16)),
    Figure("moe-2b-activated", "DeepSeekMoE 2B, expert parameters activated", f"{_MOE} table 2", "0.24", "B",
           lambda: _experts(2)),
    Figure("gshard-1.5-experts", "GShard x1.5, expert parameters", f"{_MOE} table 2", "2.83", "B",
           lambda: _experts(24)),
    Figure("gshard-1.5-activated", "GShard x1.5, expert parameters activated", f"{_MOE} table 2", "0.35", "B",
           lambda: _experts(3)),
    Figure("moe-16b-parameters", "DeepSeekMoE 16B, parameters", f"{_MOE} §5.1.2", "16.4", "B",
           _total("deepseek-moe-16b"), releases=("deepseek-moe-16b",)),
    Figure("moe-16b-activated", "DeepSeekMoE 16B, activated", f"{_MOE} §5.1.2", "2.8", "B",
           lambda: counted("deepseek-moe-16b").activated,
           "input embedding and head included; 2.62B without the embedding",
           releases=("deepseek-moe-16b",)),
    Figure("v2-lite-parameters", "V2-Lite, parameters", f"{_V2} appendix B", "15.7", "B",
           _total("deepseek-v2-lite"), releases=("deepseek-v2-lite",)),
    Figure("v2-lite-activated", "V2-Lite, activated", f"{_V2} appendix B", "2.4", "B",
           _activated("deepseek-v2-lite"),
           "2.451B without the input embedding, cut and not rounded; 2.661B with it", releases=("deepseek-v2-lite",)),
    Figure("v2-parameters", "V2, parameters", _V2, "236", "B", _total("deepseek-v2"), releases=_V2S),
    Figure("v2-activated", "V2, activated", _V2, "21", "B", _activated("deepseek-v2"),
           "without the input embedding; 21.38B with it", releases=_V2S),
    Figure("v3-parameters", "V3, parameters", f"{_V3} §4.2", "671", "B", _total("deepseek-v3"),
           "MTP left out", releases=_V3S),
    Figure("v3-activated", "V3, activated", f"{_V3} §4.2", "37", "B", _activated("deepseek-v3"),
           "without the input embedding; 37.55B with it", releases=_V3S),
    Figure("v3-activated-files", "V3, activated, as its files describe it", "README_WEIGHTS", "36.6", "B",
           _activated("deepseek-v3"), releases=("deepseek-v3",)),
    Figure("v3-activated-first", "V3, activated, as its files were described first", "README_WEIGHTS, early",
           "36.7", "B", _activated("deepseek-v3"),
           "counts 0.9B of the embedding too, which would make it 37.6B; the file says 36.6B since"),
    Figure("v3-mtp", "V3, MTP layer", "README_WEIGHTS", "11.5", "B", _mtp_layer,
           "its projection left out; 11.61B with it", releases=_V3S),
    Figure("v3-mtp-activated", "V3, MTP layer, activated with the head", "README_WEIGHTS", "1.5", "B", _mtp_activated,
           "its projection left out"),
    Figure("v3-mtp-files", "V3, MTP module in the files", _PAGE, "14", "B",
           lambda: counted("deepseek-v3").mtp_stored,
           "13.46B with its copies of embedding and head; 14 is 685 less 671, both rounded"),
    Figure("v3-files", "V3, all numbers in the files", _PAGE, "685", "B",
           lambda: counted("deepseek-v3").stored + fp8_scales(zoo("deepseek-v3")),
           "684.49B of weights and 0.04B of FP8 scales, without which it is 684", releases=_V3S),
    Figure("moonlight-parameters", "Moonlight, without embeddings", _MOONLIGHT, "15.29", "B",
           lambda: counted("moonlight-16b").total - 2 * counted("moonlight-16b").embedding,
           releases=("moonlight-16b",)),
    Figure("moonlight-activated", "Moonlight, activated, without embeddings", _MOONLIGHT, "2.24", "B",
           lambda: counted("moonlight-16b").activated - 2 * counted("moonlight-16b").embedding,
           releases=("moonlight-16b",)),
    Figure("kimi-parameters", "Kimi-K2, parameters", _KIMI, "1", "T", _total("kimi-k2"),
           releases=("kimi-k2",)),
    Figure("kimi-activated", "Kimi-K2, activated", _KIMI, "32", "B", _activated("kimi-k2"),
           "without the input embedding; 32.86B with it", releases=("kimi-k2",)),
    *(_distill(*row) for row in (("qwen-1.5b", "1.78"), ("qwen-7b", "7.62"), ("qwen-14b", "14.8"), ("qwen-32b", "32.8"),
                                 ("llama-8b", "8.03"), ("llama-70b", "70.6"))),
)  # fmt: skip
