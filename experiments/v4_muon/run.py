"""How many steps does Muon need to come to where AdamW ends, with both at their best rate?

DeepSeek-V4 (2606.19348) takes Muon because it converges faster, and gives no figures; what is expected here is from
others, and stands with the claims in paper_notes/v4_muon.md.

    deepseek-jax experiment v4_muon      # 16 runs of 6 to 7 minutes of one core, 11 if AdamW's best is the base

The base is AdamW at 2e-3; its rate and Muon's take three values each, with the cosine's end at a twentieth of each.
Both are tuned alike: one run a value on a seed of its own, of which the best goes on to the seeds of the verdict. All
else is one: weight decay, warm-up, batch, clip, first weights. At scale gpu the base's rate is 6e-4, and the three are
in proportion.
"""

from deepseek_jax.lab.bases import GPU, MICRO
from deepseek_jax.lab.rules import FewerSteps, Ordering
from deepseek_jax.lab.study import Claim, Scale, Setup, Study


def tuned(base: Setup, *peaks: str) -> Scale:
    """Both optimizers at each of these rates."""
    rates = {peak: {"recipe.rate.peak": float(peak), "recipe.rate.decay_to": float(peak) / 20} for peak in peaks}
    sides = {"adamw": {}, "muon": {"recipe.optimizer.muon": True}}
    variants = {f"{side}-{peak}": rate | change for side, change in sides.items() for peak, rate in rates.items()}
    return Scale(base, variants, tuned={side: tuple(f"{side}-{peak}" for peak in peaks) for side in sides})


STUDY = Study(
    stem="v4_muon",
    question="how many of AdamW's steps does Muon need?",
    scales={"cpu": tuned(MICRO, "2e-3", "4e-3", "8e-3"), "gpu": tuned(GPU, "6e-4", "1.2e-3", "2.4e-3")},
    minutes=7,
    claims=(
        Claim(
            "C4",
            source="2606.19348, optimizer",
            says="Muon comes to AdamW's last loss in fewer steps",
            expected="no figure in the paper; others need 0.6 to 0.75 of the steps, with experts 0.8 to 0.95",
            rule=FewerSteps(variant="muon", control="adamw"),
        ),
        Claim(
            "C5",
            source="2606.19348, optimizer",
            says="at equal steps its model is better",
            expected="bits per byte 1 to 2% lower",
            rule=Ordering("bits_per_byte", low="muon", high="adamw"),
        ),
    ),
)
