"""What a run of reinforcement learning does, apart from the model, the task and the objective. Loads no JAX."""

from dataclasses import dataclass, field, replace

from deepseek_jax.configs.checks import check_types
from deepseek_jax.configs.numbers import LARGEST, within
from deepseek_jax.train.recipe import DTYPES, LearningRate, Optimizer, Recipe
from deepseek_jax.train.tuning import fine_tuning
from deepseek_jax.train.weights import LossWeights

FORMS = ("chat", "text", "r1-zero")


@dataclass(frozen=True)
class Rewards:
    """The weight of each part of the reward; each part is a column of its own in the log, whatever it weighs."""

    accuracy: float = 1.0
    """Whether the answer is right."""
    format: float = 1.0
    """Whether the text is one thought and then one answer, in their tags, and nothing else."""
    graded: float = 0.0
    """How much of the answer is right, where a task can say it: for a start without fine-tuning."""
    language: float = 0.0
    """Which share of a thought is in the language that is wanted, where a task has languages (R1 2501.12948 §2.3.2)."""

    def __post_init__(self):
        check_types(self, ValueError)
        within(self, 0, LARGEST, "accuracy", "format", "graded", "language")
        if not (self.accuracy or self.format or self.graded or self.language):
            raise ValueError("all rewards weigh 0, so that nothing could be learned: give one a weight.")


@dataclass(frozen=True)
class RlRecipe:
    """Rollouts, steps and measurements of a run. A step is a rollout of all its groups and the updates on it."""

    steps: int = 200
    """Rollouts of the run."""
    prompts: int = 8
    """Problems a step."""
    group: int = 16
    """Answers to each of them."""
    max_new_tokens: int = 64
    """Longest answer, its end token included."""
    form: str = "chat"
    """How a problem is put: chat, a user's message in the checkpoint's own template; text, the problem's text alone,
    which a model of such texts continues; r1-zero, in R1-Zero's template (2501.12948 table 1)."""
    temperature: float = 1.0
    """Of the rollouts and of the held-out answers."""
    top_k: int = 0
    """Most tokens that may be drawn from; 0: all."""
    top_p: float = 1.0
    """Smallest share of the probability that is drawn from."""
    min_p: float = 0.0
    """Least probability of a token that may be drawn, as a share of the likeliest one's."""
    inner: int = 1
    """Updates on each rollout (mu of DeepSeekMath's algorithm 1)."""
    stale: int = 0
    """Steps by which the weights that write a rollout are older than those that learn from it; as many copies of what
    is trained are kept. The first rollouts are written by the first weights."""
    rollout_dtype: str | None = None
    """What rollouts are computed in; by default as training is."""
    rewards: Rewards = field(default_factory=Rewards)
    lr: float = 1e-4
    """Learning rate after the warm-up; it stays."""
    warmup_steps: int = 0
    """Steps of linear warm-up from 0."""
    optimizer: Optimizer = field(default_factory=lambda: Optimizer(weight_decay=0.0, moments="float32"))
    bias_speed: float = 0.0
    """Step of the router bias. Where the rollout's experts are replayed the bias stays whatever it is."""
    micro_rows: int | None = None
    """Answers of one forward and backward pass, whole groups of them; by default all of a step."""
    dtype: str = "float32"
    """Of activations and products in training. What is trained is float32."""
    seed: int = 0
    """Of the rollouts, and of adapters' first values."""
    held_out: int = 64
    """Held-out problems that are measured."""
    attempts: int = 8
    """Answers to each of them: k of pass@k and maj@k."""
    max_skipped: int = 5
    """Steps in a row whose loss, gradient or update is not finite after which a run stops."""
    evaluate_every: int = 20
    """Steps between measurements on the held-out problems."""
    log_every: int = 1
    """Steps between lines of the log."""

    def __post_init__(self):
        check_types(self, ValueError)
        for name in ("steps", "prompts", "group", "max_new_tokens", "inner", "held_out", "attempts"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}.")
        if self.stale < 0 or self.seed < 0:
            raise ValueError(f"stale and seed must be at least 0, not {self.stale} and {self.seed}.")
        if not self.temperature > 0:
            raise ValueError(f"temperature={self.temperature!r}: greedy answers to a prompt are all the same.")
        for name, choices in (("form", FORMS), ("dtype", DTYPES), ("rollout_dtype", (None, *DTYPES))):
            if getattr(self, name) not in choices:
                known = ", ".join(str(choice) for choice in choices if choice is not None)
                raise ValueError(f"{name} must be one of {known}, not {getattr(self, name)!r}.")
        if self.micro_rows is not None and (self.micro_rows < 1 or self.micro_rows % self.group):
            raise ValueError(f"micro_rows={self.micro_rows} must hold whole groups of {self.group} answers.")
        self.training(3)  # refuses what no recipe may have

    @property
    def rows(self) -> int:
        """Answers a step."""
        return self.prompts * self.group

    def training(self, length: int) -> Recipe:
        """What a run is told of it: rows of ``length`` tokens, of a prompt and its answer, padding included."""
        return Recipe(
            model="",
            tokens=self.steps * self.rows * length,
            length=length,
            batch_rows=self.rows,
            first_rows=None,
            ramp_tokens=0,
            micro_rows=self.micro_rows,
            seed=self.seed,
            fim_rate=0.0,
            dtype=self.dtype,
            rate=LearningRate(self.lr, self.warmup_steps, decay_from=None, drops=()),
            optimizer=self.optimizer,
            weights=LossWeights(mtp=0.0, balance=0.0),
            mtp_later=0.0,
            mtp_change=None,
            bias_speed=self.bias_speed,
            bias_until=None,
            ema_decay=0.0,
            max_skipped=self.max_skipped,
            evaluate_every=self.evaluate_every,
            log_every=self.log_every,
        )


def on_chats(lr: float, max_length: int, seed: int) -> Recipe:
    """Of fine-tuning on a task's solutions, in passes over them: a cosine from ``lr`` to a tenth of it. ``max_length``:
    of the model."""
    recipe = fine_tuning("sft-tiny").recipe
    return replace(
        recipe,
        rate=replace(recipe.rate, peak=lr, decay_to=lr / 10),
        length=min(recipe.length, max_length),
        seed=seed,
        weights=replace(recipe.weights, mtp=0.0),
        mtp_later=0.0,
    )
