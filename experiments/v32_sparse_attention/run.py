"""Does an indexer learn which keys a small model looks at, and what does it cost to look at these alone?

DeepSeek-V3.2 (2512.02556) section 2.1.1; the claims with the paper's numbers stand in
paper_notes/v32_sparse_attention.md.

    deepseek-jax experiment v32_sparse_attention     # 15 runs; 5 minutes of one core each, and 5 more for each seed

In the paper's three stages: a model is trained with attention to all keys, 400 steps; then its indexers alone, by their
divergence from attention, 60 steps at the paper's rate; then everything, with the 32 keys of 512 that the indexers
choose, 150 steps, in which the indexers go on learning. "dense" goes on with all keys instead, its indexers learning as
well; "unwarmed" leaves out the second stage. What the stages before make is kept on the machine for a seed's variants.
At scale gpu they choose 128 keys of 2,048, and the stages have 1,000, 150 and 375 steps of 65,536 tokens.
"""

from dataclasses import replace

from deepseek_jax.configs.schema import Indexer, ModelConfig
from deepseek_jax.lab.bases import GPU, MICRO
from deepseek_jax.lab.rules import Beyond, NoWorse, Ordering
from deepseek_jax.lab.study import Claim, Scale, Setup, Study
from deepseek_jax.train.recipe import LearningRate, Recipe

WARM = 1e-3


def staged(size: Setup, rows: int, length: int, steps: tuple[int, int, int], peak: float, later: float) -> Scale:
    """A model of this size on rows so long: steps of each stage, rates of the first and of the last."""
    text = replace(size.text, held_out_bytes=size.text.held_out_bytes // 3)
    mla, dim = size.model.attention, size.model.dim

    def model(keys: int) -> ModelConfig:
        attention = replace(mla, q_rank=dim // 2, indexer=Indexer(8, mla.rope_dim, keys))
        return replace(size.model, name="indexed", attention=attention, max_length=length, model_type="deepseek_v32")

    def recipe(stage: int, peak: float, index: float) -> Recipe:
        """AdamW, a tenth of the steps warm-up, with a cosine down to a twentieth of the peak."""
        tokens = steps[stage] * rows * length
        rate = LearningRate(peak, steps[stage] // 10, tokens // 10, tokens, decay_to=peak / 20, drops=())
        weights = replace(size.recipe.weights, index=index)
        return replace(
            size.recipe, tokens=tokens, batch_rows=rows, length=length, rate=rate, weights=weights, bias_until=None
        )

    dense, sparse = model(length), model(length // 16)
    begun = Setup(dense, recipe(0, peak, 0.0), text)
    warmed = Setup(dense, recipe(1, WARM, 1.0), text, first=begun, trained=("layers.*.attn.indexer.*",))
    base = Setup(sparse, recipe(2, later, 1.0), text, first=warmed, probes=("indexers",))
    return Scale(base, {"sparse": {}, "dense": {"model": dense}, "unwarmed": {"first": begun}})


STUDY = Study(
    stem="v32_sparse_attention",
    question="does an indexer learn which keys are looked at, and what does it cost to look at these alone?",
    scales={
        "cpu": staged(MICRO, rows=4, length=512, steps=(400, 60, 150), peak=2e-3, later=3e-4),
        "gpu": staged(GPU, rows=32, length=2048, steps=(1000, 150, 375), peak=6e-4, later=9e-5),
    },
    minutes=5,
    claims=(
        Claim(
            "C4",
            source="2512.02556 2.1.1",
            says="indexers learn what attention looks at",
            expected="at the end they are at most half as far from it as drawn ones, in every layer and seed",
            rule=Beyond("divergence_ratio", variant="sparse", over=2.0, under=1.0),
        ),
        Claim(
            "C5",
            source="2512.02556 2.1.1",
            says="the keys that they choose are worth more than as many that drawn ones choose",
            expected="with these the loss is more than 1% higher",
            rule=Beyond("drawn_cost", variant="sparse", over=0.01, under=0.0),
        ),
        Claim(
            "C6",
            source="2512.02556 table 1 (V3.2-Exp beside V3.1-Terminus)",
            says="a sparse model is as good as one that goes on with all keys",
            expected="the paper's benchmarks are alike, MMLU-Pro 85.0 and 85.0; here bits per byte within 1%",
            rule=NoWorse("bits_per_byte", variant="sparse", control="dense", margin=0.01),
            paper={"sparse": 85.0, "dense": 85.0},
            paper_as="MMLU-Pro",
        ),
        Claim(
            "C7",
            source="2512.02556 2.1.1; the paper shows no run without",
            says="the warm-up of the indexers is worth its steps",
            expected="open: indexers learn in the last stage as well, and catch up",
            rule=Ordering("bits_per_byte", low="sparse", high="unwarmed"),
        ),
    ),
)
