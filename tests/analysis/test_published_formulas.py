"""What published figures are computed with, beside the config's counts: against sums made another way."""

import math

import pytest

from deepseek_jax.analysis.counts import counts
from deepseek_jax.analysis.published.computation import bfloat16_matrices, fp8_flops
from deepseek_jax.analysis.published.formulas import expert_choice_leak
from deepseek_jax.analysis.published.table import FIGURES
from deepseek_jax.analysis.published.traffic import APART, BACK, PLAIN, traffic
from deepseek_jax.analysis.published.training import V3_STEP, step_flops
from deepseek_jax.configs.zoo import zoo
from deepseek_jax.convert.names import layout

MILLION = 2**20
V4 = ("deepseek-v4-flash", "deepseek-v4-pro")
V32 = "deepseek-v3.2"


@pytest.mark.parametrize("release", [V32, *V4])
def test_matrices_in_bfloat16_are_those_of_the_files(release):
    cfg = zoo(release, mtp_depth=0)
    kept = [t for t in layout(cfg)[0] if t.written and not t.fp8 and len(t.shape) == 2]
    multiplied = [t for t in kept if not any(part in t.name for part in ("embed", "tid2eid", ".ape"))]
    assert bfloat16_matrices(cfg) == sum(math.prod(t.shape) for t in multiplied)
    assert len(multiplied) < len(kept)


# Multiply-adds after a million tokens: attention's, and pairs of an indexer's head and a key.
READS = {
    V32: (61 * 2048 * 128 * (2 * 512 + 64), 61 * MILLION * 64),
    V4[0]: (64 * 2 * 512 * (43 * 128 + 21 * 512 + 20 * MILLION // 128), 21 * MILLION // 4 * 64),
    V4[1]: (128 * 2 * 512 * (61 * 128 + 30 * 1024 + 31 * MILLION // 128), 30 * MILLION // 4 * 64),
}


def weighed(release: str, attention: float, scores: float, products: int = 129, matrices: int = 0) -> float:
    """FLOPs by weights: of attention, of the indexer, whose pairs are so many multiply-adds, and, beyond 1, of matrices
    in bfloat16."""
    once = counts(zoo(release), MILLION).activated_no_embedding + matrices * bfloat16_matrices(zoo(release))
    read, chosen = READS[release]
    return 2 * (once + attention * read + scores * products * chosen)


@pytest.mark.parametrize("release", READS)
def test_flops_of_fp8_are_the_weighed_sum(release):
    assert fp8_flops(zoo(release), MILLION) == weighed(release, 2, 1 if release == V32 else 0.5, matrices=1)
    assert counts(zoo(release), MILLION).decode_flops_per_token == weighed(release, 1, 1)


@pytest.mark.parametrize(
    ("attention", "scores", "options", "flash", "pro"),
    [
        (2, 0.5, {"matrices": 1}, 10.06, 26.60),
        # Nothing but attention in bfloat16: Pro's 27% is missed.
        (2, 0.5, {}, 9.93, 26.32),
        (2, 1, {}, 13.71, 31.72),
        (1, 1, {}, 12.10, 26.09),
        # An indexer's weighted sum over heads, one multiply-add of each pair, left out.
        (2, 0.5, {"products": 128}, 9.97, 26.45),
        (2, 1, {"products": 128}, 13.75, 31.86),
        (1, 1, {"products": 128}, 12.12, 26.19),
    ],
)
def test_v4s_flops_to_v32s_by_weights(attention, scores, options, flash, pro):
    """The paper's 10% and 27% follow from its unit, FP8's FLOPs, and not from a count of products."""
    v32 = weighed(V32, attention, 1, **options)
    assert [round(100 * weighed(r, attention, scores, **options) / v32, 2) for r in V4] == [flash, pro]


def test_the_notes_say_what_every_product_alike_gives():
    for figure, release in (("v4-flash-flops", V4[0]), ("v4-pro-flops", V4[1])):
        share = weighed(release, 1, 1) / weighed(V32, 1, 1)
        assert FIGURES[figure].note.endswith(f"every multiply-add alike it is {share:.2%}")


@pytest.mark.parametrize(("n", "width"), [(1, 64), (2, 2560), (4, 2560), (4, 7168), (8, 32)])
def test_traffic_of_streams_is_mhcs_table(n, width):
    """Table 2's sums; less is moved by a fused kernel (§4.3.1), where the paper leaves out the maps' n^2 + n."""
    assert traffic([PLAIN], 1, width) == (2 * width, width)
    small = n * n + 2 * n
    assert traffic(APART, n, width) == ((5 * n + 1) * width + small, (3 * n + 1) * width + small)
    assert traffic([("write",), ("mix",), ("add",)], n, width) == ((3 * n + 1) * width + n * n + n, 3 * n * width)
    assert traffic([BACK], n, width) == ((n + 1) * width + n * n + n, n * width)


@pytest.mark.parametrize(("n_experts", "top_k"), [(16, 2), (64, 6), (256, 8)])
def test_experts_that_choose_tokens_leak_more_than_the_bound(n_experts, top_k):
    """Each expert takes its share of a sequence's tokens in one of so many ways. The longer the sequence, the nearer
    are the bits a token to the entropy of being chosen, of which the bound lacks -log2(1 - R) for each expert."""
    bound, share = expert_choice_leak(n_experts, top_k), top_k / n_experts
    for tokens in (n_experts, 16 * n_experts, 1024 * n_experts):
        ways = math.comb(tokens, tokens * top_k // n_experts)
        leaked = n_experts * math.log2(ways) / tokens
        assert bound < leaked
    entropy = -share * math.log2(share) - (1 - share) * math.log2(1 - share)
    assert leaked == pytest.approx(n_experts * entropy, rel=1e-2)
    assert bound == pytest.approx(n_experts * (entropy + math.log2(1 - share)))


# Step in seconds, utilization with causal and with whole attention, in percent: both networks of 2505.09343's table 4.
STEPS = [(float(V3_STEP), 38.94, 43.73), (19.946, 38.90, 43.68)]


@pytest.mark.parametrize(("seconds", "causal", "whole"), STEPS)
def test_v3s_utilization_is_of_a_step_without_its_routers(seconds, causal, whole):
    """Within what the step's last digit leaves open; with the routers all four are missed by 0.1."""
    c, batch = counts(zoo("deepseek-v3")), 15360 * 4096
    attention = 3 * 2 * 2048 * (192 + 128) * 128 * 61
    routers = 6 * 58 * 7168 * 256
    assert step_flops() == 6 * c.activated_no_embedding - routers + attention
    assert step_flops(whole=True) == step_flops() + attention
    for flops, published in ((step_flops(), causal), (step_flops(whole=True), whole)):
        found, with_routers = (100 * f * batch / (seconds * 2048 * 989e12) for f in (flops, flops + routers))
        assert found == pytest.approx(published, abs=0.006)
        assert with_routers == pytest.approx(published + 0.1, abs=0.006)


def test_the_notes_say_what_the_routers_make_of_it():
    c = counts(zoo("deepseek-v3"))
    for whole, form in ((False, ""), (True, "-whole")):
        rate = (step_flops(whole) + 6 * c.components["router"]) * 15360 * 4096 / (float(V3_STEP) * 2048)
        assert FIGURES[f"v3-rate{form}"].note.endswith(f"with them it is {rate / 1e12:.2f}")
        assert FIGURES[f"v3-mfu{form}"].note.endswith(f"with them it is {rate / 989e12:.2%}")
