"""Do a few steps with YaRN let a small model read a context four times as long?

DeepSeek-V2 (2405.04434) section 3.1.4, DeepSeek-V3 (2412.19437) section 4.3, YaRN (2309.00071); the claims stand in
paper_notes/v3_yarn.md.

    deepseek-jax experiment v3_yarn     # 15 runs; 2 minutes of one core each, and 4 more for each seed

A model is trained on rows of 256 tokens, 400 steps. Three ways on from it, 60 steps of 2,048 tokens each: "yarn" on
rows of 1,024 with YaRN of factor 4, "rope" on the same rows with RoPE as it was, "short" on rows of 256. What is
compared is held-out text in windows of 1,024, and of 256. The papers show retrieval (a needle in a haystack) at 128K
tokens, which a model of this size does not learn in so many steps. At scale gpu rows are as long, and steps are 1,000
and 150 of 65,536 tokens.
"""

from dataclasses import replace

from deepseek_jax.configs.schema import Yarn
from deepseek_jax.lab.bases import GPU, MICRO
from deepseek_jax.lab.rules import Beyond, NoWorse, Ordering
from deepseek_jax.lab.study import Claim, Scale, Setup, Study
from deepseek_jax.train.recipe import LearningRate, Recipe

SHORT, LONG = 256, 1024


def extended(size: Setup, steps: tuple[int, int], peaks: tuple[float, float]) -> Scale:
    """A model of this size, whose steps have as many tokens: steps and rates of the first stage and of the second."""
    model, text = replace(size.model, max_length=LONG), replace(size.text, held_out_bytes=size.text.held_out_bytes // 3)
    rope = replace(model.attention.rope, yarn=Yarn(factor=LONG / SHORT, original_length=SHORT))
    yarn = replace(model, attention=replace(model.attention, rope=rope))

    def recipe(stage: int, length: int) -> Recipe:
        """AdamW, a tenth of the steps warm-up, with a cosine down to a twentieth of the peak."""
        rows, peak = size.recipe.batch_rows * size.recipe.length // length, peaks[stage]
        tokens = steps[stage] * rows * length
        rate = LearningRate(peak, steps[stage] // 10, tokens // 10, tokens, decay_to=peak / 20, drops=())
        return replace(
            size.recipe, tokens=tokens, batch_rows=rows, length=length, rate=rate, bias_until=tokens * 9 // 10
        )

    begun = Setup(model, recipe(0, SHORT), text)
    base = Setup(model, recipe(1, LONG), text, first=begun, probes=("lengths",))
    return Scale(base, {"yarn": {"model": yarn}, "rope": {}, "short": {"recipe": recipe(1, SHORT)}})


STUDY = Study(
    stem="v3_yarn",
    question="do a few steps with YaRN let a small model read a context four times as long?",
    scales={
        "cpu": extended(MICRO, steps=(400, 60), peaks=(2e-3, 3e-4)),
        "gpu": extended(GPU, steps=(1000, 150), peaks=(6e-4, 9e-5)),
    },
    minutes=3,
    claims=(
        Claim(
            "C1",
            source="2405.04434 3.1.4, 2412.19437 4.3",
            says="a few steps with YaRN let a model read a context four times as long",
            expected="in windows of 1,024 fewer bits per byte than with as many steps on short rows",
            rule=Ordering("bits_long", low="yarn", high="short"),
        ),
        Claim(
            "C2",
            source="2309.00071",
            says="as many steps on long rows without YaRN do not reach that",
            expected="more bits per byte there, or open: this RoPE turns half of what attention compares",
            rule=Ordering("bits_long", low="yarn", high="rope"),
        ),
        Claim(
            "C3",
            source="2309.00071",
            says="YaRN helps without any training",
            expected="in windows of 1,024 the short model's bits per byte fall in every seed",
            rule=Beyond("untrained_yarn", variant="short", over=1.0, under=1.0),
        ),
        Claim(
            "C4",
            source="2412.19437 4.3, figure 8",
            says="short contexts are read as well as before",
            expected="the papers' retrieval is whole at all lengths; here bits per byte within 1% in windows of 256",
            rule=NoWorse("bits_short", variant="yarn", control="short", margin=0.01),
        ),
    ),
)
