"""What a training run does, apart from the model and the text. Loads no JAX: the command line reads it.

The defaults are DeepSeek-V3's (2412.19437 §4.2); `recipes.py` has the other papers' and small ones. Every point of a
schedule is a number of tokens seen: rows times length, padding included.
"""

from dataclasses import dataclass, field

from deepseek_jax.configs.checks import check_types
from deepseek_jax.configs.numbers import LARGEST, ONE, complaint, within
from deepseek_jax.train.weights import LossWeights

B, T = 10**9, 10**12
DTYPES = ("float32", "bfloat16")
BIAS_RULES = ("sign", "proportional")
AT_ZERO = {
    "eps": "a parameter without a gradient, such as an unseen token's embedding, is divided by 0",
    "clip": "no gradient is left",
}


def _below_one(owner, *names: str) -> None:
    """Of averages: at 1 they never take anything in, and what corrects their beginning divides by 0."""
    within(owner, 0, 1, *names)
    for name in names:
        if getattr(owner, name) >= ONE:
            raise ValueError(f"{name} must be at least 0 and below 1 as float32, not {getattr(owner, name)}.")


@dataclass(frozen=True)
class LearningRate:
    """Linear warm-up, constant, cosine, drops."""

    peak: float = 2.2e-4
    """Rate after the warm-up."""
    warmup_steps: int = 2000
    """Steps of linear warm-up from 0."""
    decay_from: int | None = 10 * T
    """Tokens after which the rate falls along half a cosine; by default never."""
    decay_until: int = 14_300 * B
    """Tokens at which the cosine ends."""
    decay_to: float = 2.2e-5
    """Rate at the end of the cosine, and from there on."""
    drops: tuple[tuple[int, float], ...] = ((14_633 * B, 7.3e-6),)
    """Tokens and rate, in pairs: from those tokens on the rate is that, whatever the cosine says."""

    def __post_init__(self):
        check_types(self, ValueError)
        within(self, 0, LARGEST, "peak", "warmup_steps", "decay_to")
        if self.decay_from is not None and not 0 <= self.decay_from < self.decay_until:
            raise ValueError(
                f"the rate cannot fall from {self.decay_from} to {self.decay_until} tokens: decay_from must not be "
                "negative and must lie before decay_until."
            )
        starts = [tokens for tokens, _ in self.drops]
        if starts != sorted(starts) or any(tokens < 0 or rate < 0 for tokens, rate in self.drops):
            raise ValueError(f"drops must be pairs of tokens, in rising order, and a rate, not {self.drops}.")
        for _, rate in self.drops:
            if problem := complaint(rate):
                raise ValueError(f"a rate of drops {problem}.")


@dataclass(frozen=True)
class Optimizer:
    """AdamW, or Muon for matrices beside it."""

    muon: bool = False
    """Muon for matrices as V4 uses it, routers included; AdamW keeps the embedding, the head and the norms. Off: AdamW
    for all."""
    b1: float = 0.9
    """AdamW's first-moment decay."""
    b2: float = 0.95
    """AdamW's second-moment decay."""
    eps: float = 1e-8
    """Added to AdamW's denominator; the papers before V4 do not state theirs."""
    weight_decay: float = 0.1
    """Times the learning rate; on matrices only, not on norms."""
    clip: float = 1.0
    """Largest global norm of the gradient; inf for none."""
    moments: str = "bfloat16"
    """How AdamW's two moments are kept: bfloat16 (V3 section 3.3) or float32. Muon's momentum is kept in float32."""
    momentum: float = 0.95
    """Muon's momentum (Nesterov): mu of V4."""
    update_rms: float = 0.18
    """Muon's step for a learning rate of 1, as root mean square: V4's factor of sqrt(max(n, m))."""

    def __post_init__(self):
        check_types(self, ValueError)
        within(self, 0, LARGEST, "eps", "weight_decay", "update_rms")
        within(self, 0, float("inf"), "clip")
        for name in ("eps", "clip"):
            if getattr(self, name) == 0:
                raise ValueError(f"{name} must be positive: at 0 {AT_ZERO[name]}.")
        _below_one(self, "b1", "b2", "momentum")
        if self.moments not in DTYPES:
            raise ValueError(f"moments must be one of {', '.join(DTYPES)}, not {self.moments!r}.")


@dataclass(frozen=True)
class Recipe:
    """Tokens, batch, schedules, optimizer and losses of a run; the defaults are DeepSeek-V3's."""

    model: str = "deepseek-v3"
    """Architecture: a name of the zoo, a config.json, or a checkpoint folder, whose weights are not read. Its
    vocabulary becomes the tokenizer's."""
    tokens: int = 14_800 * B
    """Tokens of the run."""
    length: int = 4096
    """Tokens a row."""
    batch_rows: int = 15360
    """Rows a step, after the ramp."""
    first_rows: int | None = 3072
    """Rows of the first step; by default those of all steps."""
    ramp_tokens: int = 469 * B
    """Tokens over which the batch grows, in proportion to the tokens seen, in whole micro-batches."""
    micro_rows: int | None = 256
    """Rows of one forward and backward pass; a step adds up the gradients of as many as it needs. By default all."""
    init_std: float = 0.006
    """Standard deviation of freshly drawn matrices."""
    embed_std: float | None = None
    """Standard deviation of the freshly drawn embedding; by default `init_std`, as in the papers. Muon's first steps
    are large beside a small embedding, and the first layers' attention then hides the tokens from the later ones."""
    seed: int = 0
    """Of the initial weights, and of the order of the text where `data_seed` gives no other."""
    data_seed: int | None = None
    """Of the order of the text, its packing and its fill in the middle; by default `seed`. Apart from it, it tells how
    much of the spread between runs comes from the weights and how much from the order."""
    fim_rate: float = 0.1
    """Share of documents turned to prefix, suffix, middle."""
    sample_masks: bool = False
    """Whether documents packed into one row are hidden from each other (V4); V3 does not."""
    dtype: str = "bfloat16"
    """Of activations and products. The parameters are float32, as are routers, norms, reductions and the loss."""
    rate: LearningRate = field(default_factory=LearningRate)
    optimizer: Optimizer = field(default_factory=Optimizer)
    weights: LossWeights = field(default_factory=LossWeights)
    mtp_later: float = 0.1
    """Weight of multi-token prediction from `mtp_change` on; without effect where `LossWeights.mtp` is 0."""
    mtp_change: int | None = 10 * T
    """Tokens after which it is `mtp_later`; by default never."""
    bias_speed: float = 1e-3
    """Step of the router bias: gamma of V3 section 4.2, u of 2408.15664. 0: the bias stays."""
    bias_rule: str = "sign"
    """How far a step goes: sign, by the speed whatever the error (V3), or proportional, by the speed times the error,
    which is (mean load - load) / mean load (2408.15664, table 3; what its errors are divided by it does not state)."""
    bias_centred: bool = False
    """Take each step's mean over the experts off it, so that the bias does not drift; what is chosen stays."""
    bias_until: int | None = 14_300 * B
    """Tokens after which the router bias stays; by default it moves to the end."""
    ema_decay: float = 0.999
    """Decay a step of the parameters' moving average, which V3 keeps without stating its decay. 0: none is kept."""
    max_skipped: int = 5
    """Steps in a row whose loss, gradient or update is not finite after which a run stops."""
    evaluate_every: int = 1000
    """Steps between measurements on the held-out text."""
    log_every: int = 10
    """Steps between lines of the log."""

    def __post_init__(self):
        check_types(self, ValueError)
        for name in ("tokens", "batch_rows", "max_skipped", "evaluate_every", "log_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}.")
        if self.length < 3:
            raise ValueError(f"length must be at least 3 tokens, not {self.length}.")
        within(self, 0, LARGEST, "ramp_tokens", "mtp_later", "bias_speed", "init_std")
        if self.embed_std is not None:
            within(self, 0, LARGEST, "embed_std")
            if not (self.init_std and self.embed_std):
                raise ValueError(
                    f"embed_std must be positive, and init_std not 0, not {self.embed_std} and {self.init_std}."
                )
        within(self, 0, 1, "fim_rate")
        _below_one(self, "ema_decay")
        for name, choices in (("dtype", DTYPES), ("bias_rule", BIAS_RULES)):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be one of {', '.join(choices)}, not {getattr(self, name)!r}.")
        if not 1 <= self.start_rows <= self.batch_rows:
            raise ValueError(f"first_rows must lie between 1 and {self.batch_rows} rows, not {self.first_rows}.")
        if self.pass_rows < 1 or self.batch_rows % self.pass_rows or self.start_rows % self.pass_rows:
            raise ValueError(
                f"micro_rows={self.micro_rows} does not divide the batch of {self.start_rows} to {self.batch_rows} "
                "rows into whole micro-batches."
            )

    @property
    def order_seed(self) -> int:
        """Of the order of the text."""
        return self.seed if self.data_seed is None else self.data_seed

    @property
    def start_rows(self) -> int:
        """Rows of the first step."""
        return self.batch_rows if self.first_rows is None else self.first_rows

    @property
    def pass_rows(self) -> int:
        """Rows of a micro-batch."""
        return self.batch_rows if self.micro_rows is None else self.micro_rows

    @property
    def micro_batches(self) -> int:
        """Micro-batches of the largest step."""
        return self.batch_rows // self.pass_rows
