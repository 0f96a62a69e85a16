"""The papers' training recipes by name, and one for minutes on a laptop. Loads no JAX.

A number that a paper does not state is marked "not stated" and is a choice made here.
"""

from deepseek_jax.train.recipe import B, LearningRate, Optimizer, Recipe, T
from deepseek_jax.train.weights import LossWeights

# What the papers before V3 have in common: no multi-token prediction, no router bias, no average.
NO_BIAS = {"bias_speed": 0.0, "bias_until": None}
NO_MTP = {"mtp_change": None, "mtp_later": 0.0}
ADAMW = Optimizer(moments="float32")


def _stepped(peak: float, tokens: int, first: float, second: float = 0.9) -> LearningRate:
    """The multi-step rate: times 0.316 at a share ``first`` of the tokens, and again at ``second``."""
    drops = ((round(first * tokens), 0.316 * peak), (round(second * tokens), 0.316**2 * peak))
    return LearningRate(peak, 2000, decay_from=None, drops=drops)


def _deepseek_v3() -> Recipe:
    """2412.19437 §4.2, §3.3. Not stated: how the batch grows between its ends (here in proportion to the tokens), the
    micro-batch, the average's decay, AdamW's epsilon."""
    return Recipe()


def _deepseek_v2() -> Recipe:
    """2405.04434 §3.1.2. Not stated: the micro-batch, and that the batch grows in proportion to the tokens."""
    tokens = 8100 * B
    return Recipe(
        model="deepseek-v2",
        tokens=tokens,
        batch_rows=9216,
        first_rows=2304,
        ramp_tokens=225 * B,
        fim_rate=0.0,
        rate=_stepped(2.4e-4, tokens, 0.6),
        optimizer=ADAMW,
        weights=LossWeights(
            mtp=0, balance=0, expert_balance=0.003, device_balance=0.05, communication_balance=0.02, devices=8
        ),
        ema_decay=0.0,
        **NO_BIAS,
        **NO_MTP,
    )


def _deepseek_v2_lite() -> Recipe:
    """2405.04434 appendix B. All experts on one device: the expert-level loss alone."""
    tokens = 5700 * B
    return Recipe(
        model="deepseek-v2-lite",
        tokens=tokens,
        batch_rows=4608,
        first_rows=None,
        ramp_tokens=0,
        fim_rate=0.0,
        rate=_stepped(4.2e-4, tokens, 0.8),
        optimizer=ADAMW,
        weights=LossWeights(mtp=0, balance=0, expert_balance=0.001),
        ema_decay=0.0,
        **NO_BIAS,
        **NO_MTP,
    )


def _moe(model: str, rate: LearningRate, weights: LossWeights, **sizes) -> Recipe:
    shared = {"first_rows": None, "ramp_tokens": 0, "fim_rate": 0.0, "ema_decay": 0.0, **NO_BIAS, **NO_MTP}
    return Recipe(model=model, rate=rate, optimizer=ADAMW, weights=weights, **shared, **sizes)


def _deepseek_moe_2b() -> Recipe:
    """2401.06066 §4.1: 25K steps, about 100B tokens."""
    tokens = 25_000 * 2048 * 2048
    weights = LossWeights(mtp=0, balance=0, expert_balance=0.01)
    return _moe("deepseek-moe-2b", _stepped(1.08e-3, tokens, 0.8), weights, tokens=tokens, length=2048, batch_rows=2048)


def _deepseek_moe_16b() -> Recipe:
    """2401.06066 §5.1: 106,449 steps of 4.5K rows, 2T tokens."""
    tokens = 106_449 * 4608 * 4096
    weights = LossWeights(mtp=0, balance=0, expert_balance=0.001)
    return _moe("deepseek-moe-16b", _stepped(4.2e-4, tokens, 0.8), weights, tokens=tokens, batch_rows=4608)


def _deepseek_moe_145b() -> Recipe:
    """2401.06066 §7.1: 13,000 steps of 4.5K rows, 245B tokens, at a constant rate; experts on 4 devices."""
    rate = LearningRate(3e-4, 2000, decay_from=None, drops=())
    weights = LossWeights(mtp=0, balance=0, expert_balance=0.003, device_balance=0.05, devices=4)
    return _moe("deepseek-moe-145b", rate, weights, tokens=13_000 * 4608 * 4096, batch_rows=4608)


def _loss_free(model: str, rate: LearningRate, tokens: int, batch_rows: int) -> Recipe:
    return Recipe(
        model=model,
        tokens=tokens,
        length=2048,
        batch_rows=batch_rows,
        first_rows=None,
        ramp_tokens=0,
        micro_rows=batch_rows // 12,
        fim_rate=0.0,
        rate=rate,
        optimizer=ADAMW,
        weights=LossWeights(mtp=0, balance=0),
        bias_speed=1e-3,
        bias_until=None,
        ema_decay=0.0,
        **NO_MTP,
    )


def _loss_free_1b() -> Recipe:
    """2408.15664 §4.1 and appendix, as others quote it: 100B tokens (its 40,000 steps are 94.4B), a cosine from 1e-3 to
    1e-4 after 1,000 steps of warm-up. Not stated in what was at hand: the optimizer (V2's here), the micro-batch."""
    tokens = 100 * B
    rate = LearningRate(1e-3, 1000, decay_from=1000 * 1152 * 2048, decay_until=tokens, decay_to=1e-4, drops=())
    return _loss_free("loss-free-1b", rate, tokens, batch_rows=1152)


def _loss_free_3b() -> Recipe:
    """2408.15664 §4.1 and appendix, as others quote it: 56,514 steps of 1,728 rows, 200B tokens; the rate falls after
    45,211 and after 50,862. Not stated in what was at hand: by how much (DeepSeekMoE's 0.316 here), the rest as 1B."""
    peak, step = 7.8e-4, 1728 * 2048
    drops = ((45_211 * step, 0.316 * peak), (50_862 * step, 0.316**2 * peak))
    rate = LearningRate(peak, 2000, decay_from=None, drops=drops)
    return _loss_free("loss-free-3b", rate, 56_514 * step, batch_rows=1728)


def _v4(model: str, tokens: int, batch_rows: int, peak: float) -> Recipe:
    """2606.19348: Muon, sample masks, rows of 4096 tokens (the paper lengthens them to 1M in stages). Not stated:
    where the rate begins to fall (V3's share of the run here; the MTP weight changes there, as the paper says), the
    first batch and its ramp (V3's), the micro-batch, the average."""
    decay_from = round(tokens * 10 / 14.8)
    return Recipe(
        model=model,
        tokens=tokens,
        batch_rows=batch_rows,
        first_rows=3072,
        ramp_tokens=469 * B,
        sample_masks=True,
        rate=LearningRate(peak, 2000, decay_from, decay_until=tokens, decay_to=peak / 10, drops=()),
        optimizer=Optimizer(muon=True, eps=1e-20),
        mtp_change=decay_from,
        bias_until=None,
    )


def _deepseek_v4_flash() -> Recipe:
    """2606.19348: 32T tokens, batches up to 75.5M tokens, 2.7e-4 to 2.7e-5."""
    return _v4("deepseek-v4-flash", 32 * T, 18432, 2.7e-4)


def _deepseek_v4_pro() -> Recipe:
    """2606.19348: 33T tokens, batches up to 94.4M tokens, 2.0e-4 to 2.0e-5."""
    return _v4("deepseek-v4-pro", 33 * T, 23040, 2.0e-4)


def _tiny() -> Recipe:
    """Every part of V3's recipe in minutes on two cores, with V4's Muon.

    2400 steps of 4 rows of 512 tokens. The rate was tuned for `tiny-v3`; it begins to fall at half of the run, earlier
    than V3's, for a short run gains from it. The embedding begins as large as what a layer reads, 1
    (paper_notes/v3_mtp_targets.md). Ramp, tail, bias and MTP weight keep V3's shares of the run.
    """
    tokens = 2400 * 4 * 512
    return Recipe(
        model="tiny-v3",
        tokens=tokens,
        length=512,
        batch_rows=4,
        first_rows=2,
        ramp_tokens=_share(tokens, 469 * B),
        micro_rows=2,
        init_std=0.02,
        embed_std=1.0,
        dtype="float32",
        rate=LearningRate(
            peak=6e-3,
            warmup_steps=50,
            decay_from=tokens // 2,
            decay_until=_share(tokens, 14_300 * B),
            decay_to=6e-4,
            drops=((_share(tokens, 14_633 * B), 2e-4),),
        ),
        optimizer=Optimizer(muon=True, moments="float32"),
        mtp_change=tokens // 2,
        bias_speed=3e-3,
        bias_until=_share(tokens, 14_300 * B),
        ema_decay=0.99,
        evaluate_every=200,
        log_every=20,
    )


def _share(tokens: int, point: int) -> int:
    """The point of a run of ``tokens`` tokens that corresponds to V3's ``point``."""
    return round(tokens * point / (14_800 * B))


RECIPES = {
    "tiny": _tiny,
    "deepseek-v3": _deepseek_v3,
    "deepseek-v2": _deepseek_v2,
    "deepseek-v2-lite": _deepseek_v2_lite,
    "deepseek-moe-2b": _deepseek_moe_2b,
    "deepseek-moe-16b": _deepseek_moe_16b,
    "deepseek-moe-145b": _deepseek_moe_145b,
    "loss-free-1b": _loss_free_1b,
    "loss-free-3b": _loss_free_3b,
    "deepseek-v4-flash": _deepseek_v4_flash,
    "deepseek-v4-pro": _deepseek_v4_pro,
}


def recipe(name: str) -> Recipe:
    """The recipe of a name in `RECIPES`; ValueError for another."""
    if name not in RECIPES:
        raise ValueError(f"there is no recipe {name!r}; choose one of {', '.join(RECIPES)}.")
    return RECIPES[name]()
