"""Are an MTP module's drafts accepted on code and on prose alike?

DeepSeek-V3 (2412.19437) section 5.4.3; the claims with the paper's numbers stand in paper_notes/v3_mtp_acceptance.md.

    deepseek-jax experiment v3_mtp_acceptance     # 5 runs of 6 minutes of one core each

The model is that of `v3_mtp` with its module. Held-out text is parted by tokens: comments and docstrings are prose, all
else is code. A draft is the module's best token; it counts as accepted where it is the main model's best one as well,
given the true text before it. What has to be beaten is a constant draft, always the token that the main model prefers
most often there.
"""

from dataclasses import replace

from deepseek_jax.lab.bases import GPU, MICRO
from deepseek_jax.lab.rules import Beyond
from deepseek_jax.lab.study import Claim, Scale, Setup, Study


def drafting(size: Setup) -> Scale:
    """A model of this size with one module, whose loss weighs what V3's does over such a run."""
    weights = {"recipe.weights.mtp": 0.3, "recipe.mtp_change": size.recipe.tokens * 68 // 100, "recipe.mtp_later": 0.1}
    return Scale(replace(size, probes=("drafts",)), {"mtp": {"model.mtp_depth": 1} | weights})


STUDY = Study(
    stem="v3_mtp_acceptance",
    question="are an MTP module's drafts accepted on code and on prose alike?",
    scales={"cpu": drafting(MICRO), "gpu": drafting(GPU)},
    minutes=6,
    claims=(
        Claim(
            "C1",
            source="2412.19437 5.4.3",
            says="drafts of the second token are accepted whatever the text is about",
            expected="the paper's 85 to 90%; here more than three times as often as a constant one, for either kind",
            rule=Beyond("draft_over_constant", "mtp", over=3.0, under=1.5),
            paper={"mtp": 87.5},
            paper_as="second tokens accepted, %",
        ),
        Claim(
            "C2",
            source="2412.19437 5.4.3",
            says="they are accepted more often of code than of prose",
            expected="the paper gives one range for all topics, 85 to 90%; code repeats itself more: a ratio over 1",
            rule=Beyond("draft_code_over_prose", "mtp", over=1.0, under=1.0),
        ),
    ),
)
