"""Published sizes of the key-value cache."""

from fractions import Fraction

from deepseek_jax.analysis.counts import BF16_BYTES
from deepseek_jax.analysis.forms import cache_values
from deepseek_jax.analysis.published.figure import Figure, counted
from deepseek_jax.configs.schema import GQA
from deepseek_jax.configs.zoo import zoo

_V2, _V4, _INSIGHTS = "2405.04434", "2606.19348", "2505.09343 table 1"
_STORED = "in the formats that releases are served in, which are our reading"
MILLION = 2**20
_ONE_GROUP = 2 * 128  # a key and a value of a head in V2 and V3

# The dense models that V3 is put beside: attention and number of layers of their published configs.
QWEN_72B = (GQA(n_heads=64, n_kv_heads=8, head_dim=128, bias=True), 80)
LLAMA_405B = (GQA(n_heads=128, n_kv_heads=8, head_dim=128), 126)


def _bytes(attention: GQA, layers: int) -> int:
    return layers * cache_values(attention, 1) * BF16_BYTES


def _v3_bytes() -> int:
    return counted("deepseek-v3").kv_bytes_per_token


def _values(release: str) -> int:
    """Numbers a token leaves in all layers."""
    return counted(release).kv_bytes_per_token // BF16_BYTES


def _small_mha() -> int:
    return counted("deepseek-v2-lite").kv_bytes_per_token_mha // BF16_BYTES


def _large_mha() -> int:
    return zoo("deepseek-v2").n_layers * 56 * _ONE_GROUP


def _fp8_bytes() -> int:
    """A layer's latent in FP8, a float32 scale for every 128 of it, and the rotated key in bfloat16."""
    a = zoo("deepseek-v3").attention
    return a.kv_rank + a.kv_rank // 128 * 4 + a.rope_dim * BF16_BYTES


def _v32_layer_bytes() -> int:
    """Of a token: V3's, and the indexer's key in FP8 with a float32 scale."""
    return _fp8_bytes() + zoo("deepseek-v3.2").attention.indexer.index_dim + 4


def _v4_bytes(release: str, scales: bool = True) -> int:
    """Of a million tokens, as its release stores them: entries and recent tokens in FP8 with a byte of scale for each
    64 and one of padding, the rotated part in bfloat16; the indexer's keys in FP4 with a byte of scale for each 32.
    ``scales``: whether scales and padding count."""
    cfg, total = zoo(release), 0
    for a in (layer.attention for layer in cfg.layers):
        plain = a.head_dim - a.rope_dim
        entry = plain + a.rope_dim * BF16_BYTES + (plain // 64 + 1 if scales else 0)
        index = a.indexer.index_dim // 2 + (a.indexer.index_dim // 32 if scales else 0)
        total += a.window * entry
        if a.ratio:
            total += MILLION // a.ratio * (entry + (index if a.sparse else 0))
    return total


def _v32_bytes() -> int:
    return zoo("deepseek-v3.2").n_layers * _v32_layer_bytes()


def _v4_share(release: str) -> Fraction:
    return Fraction(_v4_bytes(release), MILLION * _v32_bytes())


def _v4_token(name: str, published: str, least: str) -> tuple[Figure, Figure]:
    """Bytes of a token at a million, with scales and without."""
    release, label, source = f"deepseek-{name.lower()}", f"{name}, cache a token at 1M", f"{_V4} §2.3.4, from"
    return (
        Figure(f"{name.lower()}-cache-token", label, source, published, "bytes",
               lambda: Fraction(_v4_bytes(release), MILLION), _STORED, releases=(release,)),
        Figure(f"{name.lower()}-cache-values", f"{label}, values alone", source, least, "bytes",
               lambda: Fraction(_v4_bytes(release, scales=False), MILLION), f"{_STORED}; scales and padding left out"),
    )  # fmt: skip


FIGURES = (
    Figure("v3.2-cache-token", "V3.2, cache a token in FP8", "V3.2-Exp's inference, from", "48,068", "bytes",
           _v32_bytes, _STORED, releases=("deepseek-v3.2",)),
    *_v4_token("V4-Flash", "3,517", "3,453"),
    *_v4_token("V4-Pro", "5,036", "4,944"),
    Figure("v4-flash-cache", "V4-Flash, cache at 1M tokens to V3.2's", _V4, "7", "%",
           lambda: _v4_share("deepseek-v4-flash"), _STORED, releases=("deepseek-v4-flash",)),
    Figure("v4-pro-cache", "V4-Pro, cache at 1M tokens to V3.2's", _V4, "10", "%",
           lambda: _v4_share("deepseek-v4-pro"), _STORED, releases=("deepseek-v4-pro",)),
    Figure("v4-cache-gqa8", "V4-Flash, cache at 1M tokens to GQA with 8 groups", _V4, "2", "%",
           lambda: Fraction(_v4_bytes("deepseek-v4-flash"),
                            MILLION * _bytes(GQA(64, 8, 128), zoo("deepseek-v4-flash").n_layers)),
           f"{_STORED}; GQA in bfloat16, heads of 128", releases=("deepseek-v4-flash",)),
    Figure("mla-groups", "cache of MLA in groups of GQA", f"{_V2} table 1", "2.25", "",
           lambda: Fraction(counted("deepseek-v2").kv_values_per_token_layer, _ONE_GROUP)),
    Figure("v2-small-mha", "small model with MHA, numbers a token", f"{_V2} table 9", "110.6", "K", _small_mha,
           "V2-Lite's layers and heads"),
    Figure("v2-small-mla", "small model with MLA, numbers a token", f"{_V2} table 9", "15.6", "K",
           lambda: _values("deepseek-v2-lite"), releases=("deepseek-v2-lite",)),
    Figure("v2-small-share", "small model, MLA to MHA", f"{_V2} appendix D.2", "14", "%",
           lambda: Fraction(_values("deepseek-v2-lite"), _small_mha())),
    Figure("v2-large-mha", "large model with MHA, numbers a token", f"{_V2} table 9", "860.2", "K", _large_mha,
           "with 56 heads in 60 layers, which is inferred"),
    Figure("v2-large-mla", "V2, cache a token, numbers", f"{_V2} table 9", "34.6", "K",
           lambda: _values("deepseek-v2"), releases=("deepseek-v2",)),
    Figure("v2-large-share", "large model, MLA to MHA", f"{_V2} appendix D.2", "4", "%",
           lambda: Fraction(_values("deepseek-v2"), _large_mha())),
    Figure("v2-cache-saved", "V2, cache saved against DeepSeek 67B", f"{_V2} abstract", "93.3", "%",
           lambda: 1 - Fraction(6 * _values("deepseek-v2"), 16 * _values("deepseek-llm-67b")),
           "in bits: V2's numbers stored in 6, the 67B's in 16"),
    Figure("v2-numbers-saved", "the same in numbers, however stored", f"{_V2} §2.1.4, from", "82.2", "%",
           lambda: 1 - Fraction(_values("deepseek-v2"), _values("deepseek-llm-67b")),
           "the abstract's 93.3% is in bits"),
    Figure("v3-cache", "V3, cache a token", _INSIGHTS, "70.272", "KB", _v3_bytes, releases=("deepseek-v3",)),
    Figure("qwen-72b-cache", "Qwen2.5 72B, cache a token", _INSIGHTS, "327.680", "KB", lambda: _bytes(*QWEN_72B)),
    Figure("qwen-72b-cache-ratio", "Qwen2.5 72B, cache to V3's", _INSIGHTS, "4.66", "x",
           lambda: Fraction(_bytes(*QWEN_72B), _v3_bytes())),
    Figure("llama-405b-cache", "LLaMA-3.1 405B, cache a token", _INSIGHTS, "516.096", "KB",
           lambda: _bytes(*LLAMA_405B)),
    Figure("llama-405b-cache-ratio", "LLaMA-3.1 405B, cache to V3's", _INSIGHTS, "7.28", "x",
           lambda: Fraction(_bytes(*LLAMA_405B), _v3_bytes()),
           "the table's own sizes give 7.34; why 7.28 is printed is not known"),
    Figure("v3-cache-128k", "V3 with MTP, cache of 131,072 tokens", "FlashMLA's post", "8.72", "GiB",
           lambda: (_v3_bytes() + counted("deepseek-v3").kv_bytes_per_token_mtp) * 131072,
           "62 layers, the MTP module's among them"),
    Figure("fp8-cache", "FP8 cache of a token and layer", "FlashMLA, V3.2-Exp", "656", "bytes", _fp8_bytes,
           "from V3's attention, which V3.2 keeps: Context(cache=\"served\")"),
)  # fmt: skip
