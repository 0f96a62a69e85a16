"""How far apart do two runs end that are the same but for rounding? What every other study's noise is made of.

The base of the other studies, with five seeds, beside a null variant: initial weights larger by one part in a million,
which changes nothing that anybody could mean by a change, and every bit of the run. Their paired difference is chaos
alone; what scatters between seeds is chaos, first weights and the order of the text together. Other recipes are
calibrated by `deepseek-jax sweep` first, on seeds of its own, and become a study's base where they are quieter.

    deepseek-jax experiment calibration       # 10 runs of about 5 minutes of one core, of which five are other studies'
"""

from deepseek_jax.lab.bases import GPU, MICRO
from deepseek_jax.lab.rules import NoWorse
from deepseek_jax.lab.study import Claim, Scale, Setup, Study


def variants(base: Setup) -> dict:
    """The base, and the null variant."""
    return {"base": {}, "null": {"recipe.init_std": base.recipe.init_std * (1 + 1e-6)}}


STUDY = Study(
    stem="calibration",
    question="how far apart do runs end that differ by rounding alone?",
    scales={"cpu": Scale(MICRO, variants(MICRO)), "gpu": Scale(GPU, variants(GPU))},
    minutes=5,
    claims=(
        Claim(
            "C1",
            source="this project; a pilot's paired SD was 1.0 to 2.5% of the loss",
            says="chaos alone moves the base's loss by less than 1%",
            expected="open: a paired SD near 1%, with which five seeds cannot show it",
            rule=NoWorse("bits_per_byte", variant="null", control="base", margin=0.01, both=True),
        ),
        Claim(
            "C2",
            source="this project",
            says="chaos alone moves the mean MaxVio of held-out text by less than a quarter",
            expected="reproduced: balance is steadier than what separates the methods, a factor of 2",
            rule=NoWorse("max_violation_global", variant="null", control="base", margin=0.25, both=True),
        ),
    ),
)
