"""What fine-tuning does beside a recipe: adapters, and recipes counted in epochs. Loads no JAX.

A number that a paper does not state is marked "not stated" and is a choice made here.
"""

import math
from dataclasses import dataclass, replace

from deepseek_jax.train.recipe import LearningRate, Optimizer, Recipe
from deepseek_jax.train.scaling import scaled
from deepseek_jax.train.weights import LossWeights

# Nominal length of a recipe whose real one follows from the data.
NOMINAL = 10**9


@dataclass(frozen=True)
class LoRA:
    """Low-rank adapters (2106.09685): each chosen matrix W acts as W + (alpha / rank) B A, and only A and B are
    trained. A matrix is one of the published layout: gate and up have an adapter each, so has every expert."""

    rank: int = 8
    """Inner dimension of A and B. 0: no adapters."""
    alpha: float = 16.0
    """The adapters' output is multiplied by alpha / rank."""
    targets: tuple[str, ...] = ("stacks.*.attn.*",)
    """Patterns, as --train has them, of the matrices that get adapters, among the linear maps of attention, networks,
    experts, MTP modules and the head."""
    merge: bool = True
    """Export the model with the adapters added to its weights; otherwise the adapters alone, in PEFT's format."""

    def __post_init__(self):
        if self.rank < 0:
            raise ValueError(f"LoRA's rank must be at least 1, or 0 for no adapters, not {self.rank}.")
        if not 0 < self.alpha < float("inf"):
            raise ValueError(f"LoRA's alpha must be positive and finite, not {self.alpha}.")
        if isinstance(self.targets, str) or not self.targets:
            raise ValueError(f"LoRA's targets are patterns of matrices, at least one, not {self.targets!r}.")


@dataclass(frozen=True)
class FineTuning:
    """A recipe for fine-tuning: its tokens follow from the data, by ``epochs``, unless these are None."""

    recipe: Recipe
    epochs: float | None

    def sized(
        self, tokens: int | None = None, batch_rows: int | None = None, length: int | None = None
    ) -> "FineTuning":
        """The same with other rows and batches, and of ``tokens`` instead of epochs where these are given.

        A micro-batch is no larger than it was.
        """
        recipe, rows = self.recipe, batch_rows or self.recipe.batch_rows
        micro_rows = next(n for n in range(min(recipe.pass_rows, rows), 0, -1) if rows % n == 0)
        recipe = replace(recipe, batch_rows=rows, micro_rows=micro_rows, length=length or recipe.length)
        return FineTuning(recipe, self.epochs) if tokens is None else FineTuning(_of_tokens(recipe, tokens), None)


def of_epochs(recipe: Recipe, epochs: float, rows: int) -> Recipe:
    """``recipe`` for ``epochs`` passes over data of ``rows`` rows: its schedules keep their shares, its batch stays.

    Raises ValueError for epochs that are not positive.
    """
    if not 0 < epochs < float("inf"):
        raise ValueError(f"epochs must be positive, not {epochs}.")
    return _of_tokens(recipe, max(1, math.ceil(epochs * rows)) * recipe.length)


def _of_tokens(recipe: Recipe, tokens: int) -> Recipe:
    shorter = scaled(recipe, tokens, batch_rows=recipe.batch_rows, length=recipe.length)
    return replace(shorter, micro_rows=recipe.micro_rows)


def _recipe(peak: float, final: float, *, length: int, batch_rows: int, micro_rows: int, **changes) -> Recipe:
    """A cosine over the whole run; router biases stay, and so does the balance: no term pulls at it."""
    rate = LearningRate(peak, 0, decay_from=0, decay_until=NOMINAL, decay_to=final, drops=())
    common = Recipe(
        tokens=NOMINAL,
        length=length,
        batch_rows=batch_rows,
        first_rows=None,
        ramp_tokens=0,
        micro_rows=micro_rows,
        fim_rate=0.0,
        sample_masks=True,
        rate=rate,
        weights=LossWeights(mtp=0.1, balance=0),
        mtp_later=0.1,
        mtp_change=None,
        bias_speed=0.0,
        bias_until=None,
        ema_decay=0.0,
        evaluate_every=100,
    )
    return replace(common, **changes)


def _deepseek_v3() -> FineTuning:
    """2412.19437 §5.1: 2 epochs, a cosine from 5e-6 to 1e-6, samples packed and masked from each other. Not stated: the
    batch, the rows' length, the optimizer (pre-training's here), the weight of MTP (pre-training's last one here)."""
    return FineTuning(_recipe(5e-6, 1e-6, length=4096, batch_rows=128, micro_rows=16), 2)


def _deepseek_v2() -> FineTuning:
    """2405.04434 §4.1: 2 epochs at 5e-6. Not stated: the batch, the rows' length, packing, the optimizer."""
    weights = LossWeights(mtp=0, balance=0)
    recipe = _recipe(5e-6, 5e-6, length=4096, batch_rows=128, micro_rows=16, model="deepseek-v2", weights=weights)
    return FineTuning(recipe, 2)


def _deepseek_r1() -> FineTuning:
    """2501.12948, the fine-tuning between R1's two stages of reinforcement learning: 2 to 3 epochs, 5e-5 to 5e-6, rows
    of 32K tokens, 128 of them. Not stated: the optimizer, the weight of MTP."""
    return FineTuning(_recipe(5e-5, 5e-6, length=32768, batch_rows=128, micro_rows=16, model="deepseek-r1"), 2)


def _lora() -> FineTuning:
    """For adapters, which need a far higher rate than weights: 2e-4 to 2e-5, as 2106.09685 has for its largest model,
    and no weight decay. The rest is a choice made here."""
    recipe = _recipe(2e-4, 2e-5, length=4096, batch_rows=16, micro_rows=2)
    return FineTuning(replace(recipe, optimizer=Optimizer(weight_decay=0.0, moments="float32")), 3)


def _tiny() -> FineTuning:
    """Minutes on two cores: `tiny-v3` learns an answer's form from some dozens of chats."""
    recipe = _recipe(1e-3, 1e-4, length=256, batch_rows=4, micro_rows=4, model="tiny-v3", dtype="float32")
    return FineTuning(
        replace(recipe, optimizer=Optimizer(weight_decay=0.0, moments="float32"), evaluate_every=20, log_every=5), 10
    )


FINE_TUNING = {
    "sft-deepseek-v3": _deepseek_v3,
    "sft-deepseek-v2": _deepseek_v2,
    "sft-deepseek-r1": _deepseek_r1,
    "sft-lora": _lora,
    "sft-tiny": _tiny,
}


def fine_tuning(name: str) -> FineTuning:
    """The recipe of a name in `FINE_TUNING`; ValueError for another."""
    if name not in FINE_TUNING:
        raise ValueError(f"there is no recipe for fine-tuning {name!r}; choose one of {', '.join(FINE_TUNING)}.")
    return FINE_TUNING[name]()
