"""Does an indexer learn which keys a small model looks at, and what does it cost to look at these alone?

DeepSeek-V3.2 (2512.02556) section 2.1.1; the claims with the paper's numbers stand in
paper_notes/v32_sparse_attention.md.

    deepseek-jax experiment v32_sparse_attention     # 15 runs; 5 minutes of one core each, and 5 more for each seed

In the paper's three stages: a model is trained with attention to all keys, 400 steps; then its indexers alone, by their
divergence from attention, 60 steps at the paper's rate; then everything, with the 32 keys of 512 that the indexers
choose, 150 steps, in which the indexers go on learning. "dense" goes on with all keys instead, its indexers learning as
well; "unwarmed" leaves out the second stage. What the stages before make is kept on the machine for a seed's variants.
"""

from dataclasses import replace

from deepseek_jax.configs.schema import Indexer
from deepseek_jax.lab.bases import MICRO
from deepseek_jax.lab.rules import Beyond, NoWorse, Ordering
from deepseek_jax.lab.study import Claim, Setup, Study
from deepseek_jax.train.recipe import LearningRate, Recipe

ROWS, LENGTH, KEYS = 4, 512, 32
PEAK, LATER, WARM = 2e-3, 3e-4, 1e-3
TEXT = replace(MICRO.text, held_out_bytes=250_000)
INDEXED = replace(
    MICRO.model,
    name="indexed",
    attention=replace(MICRO.model.attention, q_rank=64, indexer=Indexer(8, 16, LENGTH)),
    max_length=LENGTH,
    model_type="deepseek_v32",
)
SPARSE = replace(
    INDEXED, attention=replace(INDEXED.attention, indexer=replace(INDEXED.attention.indexer, index_top_k=KEYS))
)


def recipe(steps: int, peak: float, index: float) -> Recipe:
    """So many steps of AdamW, a tenth of them warm-up, with a cosine down to a twentieth of the peak."""
    tokens = steps * ROWS * LENGTH
    rate = LearningRate(
        peak, warmup_steps=steps // 10, decay_from=tokens // 10, decay_until=tokens, decay_to=peak / 20, drops=()
    )
    weights = replace(MICRO.recipe.weights, index=index)
    return replace(
        MICRO.recipe, tokens=tokens, batch_rows=ROWS, length=LENGTH, rate=rate, weights=weights, bias_until=None
    )


BEGUN = Setup(INDEXED, recipe(400, PEAK, 0.0), TEXT)
WARMED = Setup(INDEXED, recipe(60, WARM, 1.0), TEXT, first=BEGUN, trained=("layers.*.attn.indexer.*",))
BASE = Setup(SPARSE, recipe(150, LATER, 1.0), TEXT, first=WARMED, probes=("indexers",))

STUDY = Study(
    stem="v32_sparse_attention",
    question="does an indexer learn which keys are looked at, and what does it cost to look at these alone?",
    scales={"cpu": BASE},
    variants={"sparse": {}, "dense": {"model": INDEXED}, "unwarmed": {"first": BEGUN}},
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
