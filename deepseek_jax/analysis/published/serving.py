"""Published figures of serving V3: the shortest time a token, what a day of production costs, and where copies of
experts are placed."""

from fractions import Fraction

from deepseek_jax.analysis.published.figure import Figure
from deepseek_jax.analysis.replicas import placed
from deepseek_jax.configs.zoo import zoo

_INSIGHTS, _INDEX = "2505.09343 §2.3.2", "open-infra-index"
# Production on a day: H800 nodes of 8 GPUs on average; tokens read from the cache, read anew, and written, each with
# its price in dollars a million; the revenue as printed.
_NODES, _GPU_PRICE = Fraction("226.75"), 2
_HIT, _MISS, _WRITTEN = 342 * 10**9, 266 * 10**9, 168 * 10**9
_PRICES = (Fraction("0.14"), Fraction("0.55"), Fraction("2.19"))
_REVENUE = 562_027
# Tokens a second of a node that reads and of one that writes.
_READING, _WRITING = 73_700, 14_800
# The load balancer's example: loads of 12 experts in two layers, and the experts in 16 slots of 8 GPUs, as printed.
EXAMPLE = (
    (
        (90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86),
        (5, 6, 5, 7, 8, 4, 3, 4, 10, 9, 10, 2, 0, 1, 11, 1),
    ),
    (
        (20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27),
        (7, 10, 6, 8, 6, 11, 8, 9, 2, 4, 5, 1, 5, 0, 3, 1),
    ),
)


def exchange_seconds(bytes_a_second: int) -> Fraction:
    """Time to send 32 tokens of a GPU to their experts and back: a width taken as 7000, FP8 there and bfloat16 back, to
    each of a token's experts, the shared one included."""
    moe = zoo("deepseek-v3").moe
    return Fraction((1 + 2) * 32 * (moe.top_k + moe.n_shared) * 7000, bytes_a_second)


def token_seconds(bytes_a_second: int) -> Fraction:
    """Two exchanges in each layer, computation hidden behind them."""
    return 2 * zoo("deepseek-v3").n_layers * exchange_seconds(bytes_a_second)


def _day_cost() -> Fraction:
    return _NODES * 8 * _GPU_PRICE * 24


def _day_revenue() -> Fraction:
    return sum(tokens * price / 10**6 for tokens, price in zip((_HIT, _MISS, _WRITTEN), _PRICES, strict=True))


def _nodes() -> Fraction:
    return Fraction(_HIT + _MISS, 86400 * _READING) + Fraction(_WRITTEN, 86400 * _WRITING)


def _placed_as_printed() -> int:
    """Slots of the example with the printed expert."""
    return sum(
        ours == theirs
        for loads, printed in EXAMPLE
        for ours, theirs in zip(placed(loads, len(printed), groups=4, nodes=2, devices=8), printed, strict=True)
    )


INFINIBAND, NVLINK = 50 * 10**9, 900 * 10**9  # bytes a second of a GPU
FIGURES = (
    Figure("exchange-ib", "V3, one exchange over InfiniBand", _INSIGHTS, "120.96", "us",
           lambda: exchange_seconds(INFINIBAND)),
    Figure("token-ib", "V3, a token over InfiniBand", _INSIGHTS, "14.76", "ms", lambda: token_seconds(INFINIBAND)),
    Figure("rate-ib", "V3, tokens a second over InfiniBand", _INSIGHTS, "67", "tokens/s",
           lambda: 1 / token_seconds(INFINIBAND), "67.76, cut and not rounded"),
    Figure("exchange-nvlink", "V3, one exchange over NVLink of 72 GPUs", _INSIGHTS, "6.72", "us",
           lambda: exchange_seconds(NVLINK)),
    Figure("token-nvlink", "V3, a token over NVLink of 72 GPUs", _INSIGHTS, "0.82", "ms",
           lambda: token_seconds(NVLINK)),
    Figure("rate-nvlink", "V3, tokens a second over NVLink of 72 GPUs", _INSIGHTS, "1200", "tokens/s",
           lambda: 1 / token_seconds(NVLINK), digits=-2),
    Figure("day-cost", "production, a day at $2 a GPU hour", _INDEX, "87,072", "$", _day_cost),
    Figure("day-revenue", "production, revenue of a day, all tokens at R1's prices", _INDEX, "562,027", "$",
           _day_revenue,
           "the tokens that it follows from are published in whole billions"),
    Figure("day-margin", "production, margin over the cost", _INDEX, "545", "%", lambda: _REVENUE / _day_cost() - 1,
           "from the printed revenue"),
    Figure("day-nodes", "production, nodes, from tokens and rates", _INDEX, "226.75", "nodes", _nodes,
           "226.86: 95.48 that read and 131.38 that write; tokens and rates are published rounded"),
    Figure("eplb-example", "load balancer's example, slots with the printed expert", "EPLB's README", "32", "",
           _placed_as_printed, "of 32, in two layers"),
)  # fmt: skip
