"""Published figures that follow from a formula and the paper's settings alone."""

import math
from fractions import Fraction

from deepseek_jax.analysis.published.figure import Figure
from deepseek_jax.configs.zoo import zoo

_NSA = "2502.11089 table 4"
_NSA_ROWS = ((8, "2048", "4"), (16, "2560", "6.4"), (32, "3584", "9.1"), (64, "5632", "11.6"))


def _amplitude(release: str) -> float:
    """YaRN's temperature factor of a release, 0.1 * mscale * ln(s) + 1."""
    from deepseek_jax.core.rope import yarn_mscale

    yarn = zoo(release).attention.rope.yarn
    return yarn_mscale(yarn.factor, yarn.mscale_all_dim)


def _softmax_scale(release: str) -> float:
    from deepseek_jax.core.rope import softmax_scale

    a = zoo(release).attention
    return softmax_scale(a.nope_dim + a.rope_dim, a.rope)


def nsa_reads(context: int) -> int:
    """Tokens that one decoding step of NSA reads: compressed ones (a block every 16), 16 chosen blocks of 64, a window
    of 512."""
    return context // 16 + 16 * 64 + 512


def expert_choice_leak(n_experts: int, top_k: int) -> float:
    """Bits a token and layer that are leaked at least where experts choose their tokens, ``top_k`` experts a token on
    average: which of a sequence's tokens are chosen depends on the later ones (2408.15664 appendix D.1)."""
    return top_k * math.log2((n_experts - top_k) / top_k)


FIGURES = (
    Figure("expert-choice-leak", "experts choose tokens, leak of 9 layers, 2 of 16", "2408.15664 appendix D.1", "50",
           "bits", lambda: 9 * expert_choice_leak(16, 2),
           "more than 50, as the paper says: 50.53, cut and not rounded"),
    Figure("experts-2-of-16", "ways to choose 2 experts of 16", "2401.06066 §3.1", "120", "", lambda: math.comb(16, 2)),
    Figure("experts-8-of-64", "ways to choose 8 experts of 64", "2401.06066 §3.1", "4,426,165,368", "",
           lambda: math.comb(64, 8)),
    Figure("v3-yarn", "V3, YaRN's factor 0.1 ln 40 + 1", "2412.19437 §4.3, from", "1.368888", "",
           lambda: _amplitude("deepseek-v3")),
    Figure("v3-yarn-squared", "V3, its square, on the softmax", "released code, from", "1.873854", "",
           lambda: _amplitude("deepseek-v3") ** 2),
    Figure("v3-softmax-scale", "V3, softmax scale", "released code, from", "0.135234", "",
           lambda: _softmax_scale("deepseek-v3")),
    Figure("v2-yarn", "V2, YaRN's factor 0.0707 ln 40 + 1", "2405.04434 §3.1.4, from", "1.260804", "",
           lambda: _amplitude("deepseek-v2")),
    Figure("v3-extension-32k", "V3, tokens of the extension to 32K", "2412.19437 §4.3, from", "62.91", "B",
           lambda: 1000 * 1920 * 32768),
    Figure("v3-extension-128k", "V3, tokens of the extension to 128K", "2412.19437 §4.3, from", "62.91", "B",
           lambda: 1000 * 480 * 131072),
    Figure("v2-extension", "V2, tokens of the extension", "2405.04434 §3.1.4, from", "18.87", "B",
           lambda: 1000 * 576 * 32768),
    Figure("v3.2-warmup", "V3.2, tokens of the indexer's warm-up", "V3.2-Exp report, from", "2.1", "B",
           lambda: 1000 * 16 * 131072),
    Figure("v3.2-sparse", "V3.2, tokens of sparse training", "V3.2-Exp report, from", "943.7", "B",
           lambda: 15000 * 480 * 131072),
    *(
        figure
        for thousands, tokens, ratio in _NSA_ROWS
        for figure in (
            Figure(f"nsa-{thousands}k", f"NSA at {thousands}K, tokens read", _NSA, tokens, "",
                   lambda context=thousands * 1024: nsa_reads(context), "the paper's formula; NSA is not built"),
            Figure(f"nsa-{thousands}k-ratio", f"NSA at {thousands}K, fewer by", _NSA, ratio, "x",
                   lambda context=thousands * 1024: Fraction(context, nsa_reads(context))),
        )
    ),
)  # fmt: skip
