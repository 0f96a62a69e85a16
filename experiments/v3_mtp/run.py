"""Does predicting a second token cost the main model anything, or help it?

DeepSeek-V3 (2412.19437) section 2.2 and table 4; the claims with the paper's numbers stand in paper_notes/v3_mtp.md.

    deepseek-jax experiment v3_mtp     # 10 runs, of which 5 are calibration's; 6 minutes of one core each

The base predicts one token; its main model begins with the same weights and reads the same text as the one beside it,
which has one module more. The loss's weight is V3's: 0.3 for the first 68% of the tokens, then 0.1. What is compared is
the main head alone, on held-out text. How often the module's drafts would be accepted stands in each run; that is
asked by `v3_mtp_acceptance`.
"""

from deepseek_jax.lab.bases import GPU, MICRO
from deepseek_jax.lab.rules import NoWorse, Ordering
from deepseek_jax.lab.study import Claim, Scale, Setup, Study


def variants(base: Setup) -> dict:
    """The base, and one module more, weighted as V3's over the base's tokens."""
    change = base.recipe.tokens * 68 // 100
    weights = {"recipe.weights.mtp": 0.3, "recipe.mtp_change": change, "recipe.mtp_later": 0.1}
    return {"base": {}, "mtp": {"model.mtp_depth": 1} | weights}


STUDY = Study(
    stem="v3_mtp",
    question="what does predicting a second token do to the first?",
    scales={"cpu": Scale(MICRO, variants(MICRO)), "gpu": Scale(GPU, variants(GPU))},
    minutes=6,
    claims=(
        Claim(
            "C3",
            source="2412.19437 table 4",
            says="multi-token prediction leaves the main model's bits per byte as they are",
            expected="the paper's small model: 0.729 with and without on Pile; here within 1% of the base, either way",
            rule=NoWorse("bits_per_byte", variant="mtp", control="base", margin=0.01, both=True),
            paper={"base": 0.729, "mtp": 0.729},
        ),
        Claim(
            "C4",
            source="2412.19437 4.5.1",
            says="the main model is better for it",
            expected="the paper's gains are in benchmarks (HumanEval 20.7 to 26.8), not in bits per byte: open",
            rule=Ordering("bits_per_byte", low="mtp", high="base"),
        ),
    ),
)
