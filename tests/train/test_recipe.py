"""Every recipe's fields against its paper, scaling to a budget, and what is refused."""

from dataclasses import replace

import pytest

from deepseek_jax.configs.zoo import zoo
from deepseek_jax.train.recipe import B, LearningRate, Optimizer, Recipe, T
from deepseek_jax.train.recipes import RECIPES, recipe
from deepseek_jax.train.scaling import scaled
from deepseek_jax.train.schedule import count_steps
from deepseek_jax.train.weights import LossWeights


def fields(name: str, *names: str) -> list:
    """Fields by dotted name."""
    found = []
    for dotted in names:
        value = recipe(name)
        for part in dotted.split("."):
            value = getattr(value, part)
        found.append(value)
    return found


def test_v3_is_the_default():
    assert Recipe() == recipe("deepseek-v3")
    assert fields("deepseek-v3", "tokens", "length", "batch_rows", "first_rows", "ramp_tokens") == [
        14_800 * B,
        4096,
        15360,
        3072,
        469 * B,
    ]
    assert fields("deepseek-v3", "init_std", "fim_rate", "sample_masks", "dtype") == [0.006, 0.1, False, "bfloat16"]
    assert fields("deepseek-v3", "bias_speed", "bias_until") == [0.001, 14_300 * B]
    assert fields("deepseek-v3", "weights.mtp", "mtp_later", "mtp_change", "weights.balance") == [
        0.3,
        0.1,
        10 * T,
        1e-4,
    ]
    adam = ["b1", "b2", "weight_decay", "clip", "moments", "muon"]
    assert fields("deepseek-v3", *(f"optimizer.{n}" for n in adam)) == [0.9, 0.95, 0.1, 1.0, "bfloat16", False]
    assert recipe("deepseek-v3").ema_decay > 0


@pytest.mark.parametrize("name", RECIPES)
def test_what_all_papers_share(name):
    assert fields(name, "optimizer.b1", "optimizer.b2", "optimizer.weight_decay", "optimizer.clip") == [
        0.9,
        0.95,
        0.1,
        1,
    ]
    made = recipe(name)
    assert made.init_std == (zoo(made.model).init_std if name == "tiny" else 0.006)
    # Nothing but V3, V4 and the small twin of them predicts several tokens or keeps an average.
    later = name in ("tiny", "deepseek-v3", "deepseek-v4-flash", "deepseek-v4-pro")
    assert (made.weights.mtp, made.ema_decay > 0) == (0.3 if later else 0, later)


@pytest.mark.parametrize(
    ("name", "tokens", "length", "rows", "balance"),
    [
        # Balance: sequence-wise, expert, device and communication level.
        ("deepseek-v2", 8_100 * B, 4096, 9216, (0, 0.003, 0.05, 0.02)),
        ("deepseek-v2-lite", 5_700 * B, 4096, 4608, (0, 0.001, 0, 0)),
        ("deepseek-moe-2b", 104_857_600_000, 2048, 2048, (0, 0.01, 0, 0)),
        ("deepseek-moe-16b", 106_449 * 4608 * 4096, 4096, 4608, (0, 0.001, 0, 0)),
        ("deepseek-moe-145b", 13_000 * 4608 * 4096, 4096, 4608, (0, 0.003, 0.05, 0)),
        ("loss-free-1b", 100 * B, 2048, 1152, (0, 0, 0, 0)),
        ("loss-free-3b", 56_514 * 1728 * 2048, 2048, 1728, (0, 0, 0, 0)),
        ("deepseek-v4-flash", 32 * T, 4096, 18432, (1e-4, 0, 0, 0)),
        ("deepseek-v4-pro", 33 * T, 4096, 23040, (1e-4, 0, 0, 0)),
        ("tiny", 4_915_200, 512, 4, (1e-4, 0, 0, 0)),
    ],
)
def test_sizes_and_balance(name, tokens, length, rows, balance):
    assert fields(name, "tokens", "length", "batch_rows") == [tokens, length, rows]
    w = recipe(name).weights
    assert (w.balance, w.expert_balance, w.device_balance, w.communication_balance) == balance


def test_devices_bias_and_masks():
    assert (recipe("deepseek-v2").weights.devices, recipe("deepseek-moe-145b").weights.devices) == (8, 4)
    assert {name: recipe(name).bias_speed for name in RECIPES} == {
        **dict.fromkeys((n for n in RECIPES if n.startswith(("deepseek-v2", "deepseek-moe"))), 0.0),
        **dict.fromkeys(("deepseek-v3", "loss-free-1b", "loss-free-3b", "deepseek-v4-flash", "deepseek-v4-pro"), 1e-3),
        "tiny": 3e-3,
    }
    assert [name for name in RECIPES if recipe(name).sample_masks] == ["deepseek-v4-flash", "deepseek-v4-pro"]
    assert fields("deepseek-v2", "first_rows", "ramp_tokens") == [2304, 225 * B]


def test_v4_uses_muon_and_an_epsilon_of_its_own():
    names = ["muon", "momentum", "update_rms", "eps", "weight_decay"]
    for name in ("deepseek-v4-flash", "deepseek-v4-pro"):
        assert fields(name, *(f"optimizer.{n}" for n in names)) == [True, 0.95, 0.18, 1e-20, 0.1]


def test_tiny_has_every_part_of_v3():
    v3, tiny = recipe("deepseek-v3"), recipe("tiny")
    for point in ("ramp_tokens", "bias_until"):
        assert getattr(tiny, point) / tiny.tokens == pytest.approx(getattr(v3, point) / v3.tokens, abs=1e-6)
    for point in (0, 1):
        ours = (tiny.rate.decay_until, tiny.rate.drops[0][0])[point] / tiny.tokens
        assert ours == pytest.approx((v3.rate.decay_until, v3.rate.drops[0][0])[point] / v3.tokens, abs=1e-6)
    assert (tiny.fim_rate, tiny.mtp_later, tiny.micro_batches, tiny.optimizer.muon) == (0.1, 0.1, 2, True)
    assert 2400 < count_steps(tiny) < 2500


def test_scaled_keeps_every_points_share():
    small = scaled(recipe("deepseek-v3"), 14_800_000, length=512)
    assert (small.rate.decay_from, small.rate.decay_until, small.mtp_change) == (10_000_000, 14_300_000, 10_000_000)
    assert (small.rate.drops, small.ramp_tokens) == (((14_633_000, 7.3e-6),), 469_000)
    # 28 rows of 512 leave 1032 steps; V3's ramp begins at a fifth of the batch, here 4 of 28 (5 does not divide it).
    assert (small.batch_rows, small.first_rows, small.micro_rows) == (28, 4, 4)
    steps = count_steps(small)
    assert steps == pytest.approx(1000, rel=0.1)
    # A bias may travel 8; the warm-up is 2% of the steps; the average's horizon keeps its share of the run.
    assert small.bias_speed == pytest.approx(8 / steps)
    assert small.rate.warmup_steps == round(0.02 * steps)
    assert (1 - small.ema_decay) * steps == pytest.approx((1 - 0.999) * count_steps(recipe("deepseek-v3")))
    assert (small.rate.peak, small.rate.decay_to) == (2.2e-4, 2.2e-5)


def test_scaled_to_its_own_size_is_the_same_recipe():
    for name in RECIPES:
        assert scaled(recipe(name), recipe(name).tokens) == recipe(name)


def test_scaled_keeps_a_small_batch_and_takes_a_given_one():
    tiny = recipe("tiny")
    assert scaled(tiny, 600_000).batch_rows == 4
    assert scaled(tiny, 600_000, batch_rows=8).first_rows == 4
    assert scaled(tiny, 600_000, batch_rows=1).first_rows is None
    assert scaled(tiny, 50_000).bias_speed == 0.01
    assert scaled(recipe("deepseek-v2"), 1_000_000).bias_speed == 0
    with pytest.raises(ValueError, match="100 tokens do not fill one row of 512"):
        scaled(tiny, 100)


def test_an_unknown_name_is_refused():
    with pytest.raises(ValueError, match=r"no recipe 'v3'; choose one of tiny, deepseek-v3"):
        recipe("v3")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Recipe(tokens=0), "tokens must be at least 1, not 0"),
        (lambda: Recipe(length=2), "at least 3 tokens"),
        (lambda: Recipe(first_rows=20_000), "first_rows must lie between 1 and 15360"),
        (lambda: Recipe(micro_rows=1000), "micro_rows=1000 does not divide"),
        (lambda: Recipe(micro_rows=0), "micro_rows=0 does not divide"),
        (lambda: Recipe(bias_speed=-1.0), "bias_speed"),
        (lambda: Recipe(embed_std=0.0), "embed_std must be positive"),
        (lambda: Recipe(embed_std=1.0, init_std=0.0), "init_std not 0"),
        (lambda: Recipe(fim_rate=1.5), "fim_rate must lie between 0 and 1"),
        (lambda: Recipe(ema_decay=1.0), "ema_decay"),
        (lambda: Recipe(dtype="float16"), "dtype must be one of float32, bfloat16"),
        (lambda: Recipe(bias_rule="magnitude"), "bias_rule must be one of sign, proportional, not 'magnitude'"),
        (lambda: Recipe(bias_centred=1), "bias_centred must be True or False, not 1"),
        (lambda: Recipe(data_seed=1.5), "data_seed must be an integer or None, not 1.5"),
        (lambda: LossWeights(mtp=float("nan")), "mtp"),
        (lambda: LossWeights(device_balance=-1), "device_balance"),
        (lambda: LossWeights(devices=0), "devices must be at least 1"),
        (lambda: LearningRate(decay_from=10, decay_until=10), "decay_from must not be negative"),
        (lambda: LearningRate(drops=((20, 1e-5), (10, 1e-6))), "rising order"),
        (lambda: LearningRate(peak=-1.0), "peak"),
        (lambda: Optimizer(b1=2.0), "b1 must lie between 0 and 1"),
        # What float32, in which they are used, takes for 0, 1 or infinity.
        (lambda: Optimizer(b1=1 - 1e-9), "b1 must be at least 0 and below 1 as float32"),
        (lambda: Optimizer(b2=1), "b2 must be at least 0 and below 1"),
        (lambda: Optimizer(momentum=1.0), "momentum must be at least 0 and below 1"),
        (lambda: Optimizer(eps=1e-45), "eps is used as float32, where 1e-45 counts as 0"),
        (lambda: Optimizer(eps=0), "eps must be positive"),
        (lambda: Optimizer(clip=0.0), "clip must be positive"),
        (lambda: Optimizer(clip=1e-300), "clip is used as float32"),
        (lambda: Optimizer(weight_decay=1e39), "weight_decay must be finite and at least 0, not 1e[+]39"),
        (lambda: LearningRate(peak=float("inf")), "peak must be finite"),
        (lambda: LearningRate(peak=1e-60), "peak is used as float32"),
        (lambda: LearningRate(peak="fast"), "peak must be a number, not 'fast'"),
        (lambda: LearningRate(drops=((10, 1e300),)), "a rate of drops must be finite"),
        (lambda: LossWeights(balance=1e-46), "balance is used as float32"),
        (lambda: Recipe(bias_speed=float("inf")), "bias_speed must be finite"),
        (lambda: Recipe(ema_decay=0.999999999), "ema_decay must be at least 0 and below 1 as float32"),
        (lambda: Optimizer(moments="fp8"), "moments must be one of float32, bfloat16"),
        (lambda: replace(recipe("tiny"), batch_rows=3), "does not divide"),
    ],
)
def test_what_cannot_be_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_what_float32_holds_is_taken():
    Optimizer(clip=float("inf"), eps=1.2e-38, b1=0, b2=1 - 1e-7, weight_decay=0)
    LearningRate(peak=1e-37, warmup_steps=0, decay_to=0)
