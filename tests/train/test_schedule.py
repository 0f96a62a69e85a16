"""Each paper's schedules against numbers computed by hand from its text."""

from dataclasses import replace

import pytest

from deepseek_jax.train.recipe import B, LearningRate, Recipe, T
from deepseek_jax.train.recipes import recipe
from deepseek_jax.train.schedule import batch_rows, count_steps, setting, tokens_by_step

LATE = 10**7  # a step long after every warm-up


def lr(name: str, tokens: int, step: int = LATE) -> float:
    return setting(recipe(name), tokens, step).lr


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        (0, 2.2e-4),
        (10 * T, 2.2e-4),
        # A quarter, a half and three quarters of the cosine's 4.3T tokens.
        (11_075 * B, 2.2e-5 + 1.98e-4 * (1 + 0.5**0.5) / 2),
        (12_150 * B, 1.21e-4),
        (13_225 * B, 2.2e-5 + 1.98e-4 * (1 - 0.5**0.5) / 2),
        (14_300 * B, 2.2e-5),
        (14_632 * B, 2.2e-5),
        (14_633 * B, 7.3e-6),
        (14_799 * B, 7.3e-6),
    ],
)
def test_v3_rate(tokens, expected):
    assert lr("deepseek-v3", tokens) == pytest.approx(expected, rel=1e-9)


def test_v3_tail_is_333_and_167_billion_tokens():
    v3 = recipe("deepseek-v3")
    (drop, _) = v3.rate.drops[0]
    assert (drop - v3.rate.decay_until, v3.tokens - drop) == (333 * B, 167 * B)


@pytest.mark.parametrize(("step", "share"), [(0, 1 / 2000), (999, 0.5), (1999, 1.0), (2000, 1.0)])
@pytest.mark.parametrize("name", ["deepseek-v3", "deepseek-v2", "deepseek-moe-2b", "loss-free-3b", "deepseek-v4-pro"])
def test_warm_up_takes_2000_steps(name, step, share):
    assert lr(name, 0, step) == pytest.approx(recipe(name).rate.peak * share, rel=1e-9)


def test_the_loss_free_recipes_count_in_steps():
    rates = [lr("loss-free-1b", step * 1152 * 2048, step) for step in (499, 999, 1000)]
    assert rates == pytest.approx([5e-4, 1e-3, 1e-3], rel=1e-9)
    rates = [lr("loss-free-3b", step * 1728 * 2048, step) for step in (45_210, 45_211, 50_861, 50_862)]
    assert rates == pytest.approx([7.8e-4, 2.4648e-4, 2.4648e-4, 7.788768e-5], rel=1e-9)


def test_without_warm_up_the_first_step_has_the_peak():
    assert setting(replace(Recipe(), rate=LearningRate(warmup_steps=0)), 0, 0).lr == 2.2e-4


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        # Share of the run -> rate; 0.316 of the peak, then 0.316 of that.
        ("deepseek-v2", {0.59: 2.4e-4, 0.6: 7.584e-5, 0.89: 7.584e-5, 0.9: 2.396544e-5}),
        ("deepseek-v2-lite", {0.79: 4.2e-4, 0.8: 1.3272e-4, 0.9: 4.193952e-5}),
        ("deepseek-moe-2b", {0.79: 1.08e-3, 0.8: 3.4128e-4, 0.9: 1.0784448e-4}),
        ("deepseek-moe-16b", {0.79: 4.2e-4, 0.8: 1.3272e-4, 0.9: 4.193952e-5}),
        ("deepseek-moe-145b", {0.0: 3e-4, 1.0: 3e-4}),
        ("loss-free-1b", {0.0: 1e-3, 0.51179648: 5.5e-4, 1.0: 1e-4}),
        ("loss-free-3b", {0.79: 7.8e-4, 0.8: 2.4648e-4, 0.9: 7.788768e-5}),
        ("deepseek-v4-flash", {0.5: 2.7e-4, 1.0: 2.7e-5}),
        ("deepseek-v4-pro", {0.5: 2.0e-4, 1.0: 2.0e-5}),
        ("tiny", {0.49: 6e-3, 0.97: 6e-4, 0.99: 2e-4}),
    ],
)
def test_rates_of_the_other_recipes(name, expected):
    tokens = recipe(name).tokens
    # One token on: a share of a whole number of tokens need not be one.
    found = {share: lr(name, round(share * tokens) + (0 < share < 1)) for share in expected}
    assert found == {share: pytest.approx(rate, rel=1e-6) for share, rate in expected.items()}


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        # Half of V3's ramp lies at 234.5B tokens: 3072 + 12288 / 2 rows.
        ("deepseek-v3", {0: 3072, 234_500 * B // 1000: 9216, 468 * B: 15104, 469 * B: 15360, 14 * T: 15360}),
        ("deepseek-v2", {0: 2304, 112_500 * B // 1000: 5632, 225 * B: 9216}),
        ("deepseek-v2-lite", {0: 4608, T: 4608}),
        ("deepseek-v4-flash", {0: 3072, 469 * B: 18432}),
        ("tiny", {0: 2, 155_000: 2, 155_761: 4, 4_000_000: 4}),
    ],
)
def test_batches(name, expected):
    found = {tokens: batch_rows(recipe(name), tokens) for tokens in expected}
    assert found == expected


def test_v4s_largest_batches_are_the_papers_tokens():
    rows = {name: recipe(name).batch_rows * recipe(name).length for name in ("deepseek-v4-flash", "deepseek-v4-pro")}
    assert rows == {"deepseek-v4-flash": 75_497_472, "deepseek-v4-pro": 94_371_840}


def test_v3_bias_and_mtp():
    v3 = recipe("deepseek-v3")
    at = {tokens: setting(v3, tokens, LATE) for tokens in (0, 10 * T - 1, 10 * T, 14_300 * B - 1, 14_300 * B)}
    assert [now.bias_speed for now in at.values()] == [1e-3, 1e-3, 1e-3, 1e-3, 0.0]
    assert [now.mtp_weight for now in at.values()] == [0.3, 0.3, 0.1, 0.1, 0.1]
    # MTP's weight of 0.1 lasts for 4.8T tokens.
    assert v3.tokens - v3.mtp_change == 4_800 * B


def test_v4_changes_mtp_when_the_rate_begins_to_fall():
    flash = recipe("deepseek-v4-flash")
    assert flash.mtp_change == flash.rate.decay_from
    assert setting(flash, flash.tokens - 1, LATE).bias_speed == 1e-3


def test_without_mtp_its_weight_stays_zero():
    v3 = recipe("deepseek-v3")
    without = replace(v3, weights=replace(v3.weights, mtp=0.0))
    assert setting(without, 12 * T, LATE).mtp_weight == 0


def test_steps_follow_from_tokens_and_batches():
    small = replace(recipe("tiny"), tokens=20 * 512, ramp_tokens=9 * 512)
    # Rows 2, 2, 2, 2 up to 8 rows seen: half of the ramp's 9 is passed after 4.5 rows' tokens, at 6.
    assert [tokens // 512 for tokens in tokens_by_step(small)] == [0, 2, 4, 6, 8, 10, 14, 18]
    assert count_steps(small) == 8
    assert count_steps(replace(small, ramp_tokens=0)) == 5
    # The papers' counts of steps.
    assert {n: count_steps(recipe(f"deepseek-moe-{n}")) for n in ("2b", "16b", "145b")} == {
        "2b": 25_000,
        "16b": 106_449,
        "145b": 13_000,
    }


def test_a_setting_hands_out_whole_micro_batches():
    v3 = recipe("deepseek-v3")
    assert (setting(v3, 0, 0).micro_batches, setting(v3, 0, 0).rows) == (12, 3072)
    assert (setting(v3, T, LATE).micro_batches, setting(v3, T, LATE).rows) == (60, 15360)
    assert v3.micro_batches == 60
