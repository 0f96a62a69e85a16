"""Do a few steps with YaRN let a small model find a pass key in a context four times as long?

DeepSeek-V2 (2405.04434) section 3.1.4, DeepSeek-V3 (2412.19437) section 4.3, YaRN (2309.00071); the claims stand in
paper_notes/v3_yarn_passkey.md. The same question of ordinary text: `v3_yarn`.

    deepseek-jax experiment v3_yarn_passkey     # 15 runs; 1 minute of one core each, and 6 more for each seed

A dense model is trained on pass keys in rows of 144 tokens, 800 steps of 4,032 tokens. Three ways on from it, 60 steps
each: "yarn" on rows of 576 with YaRN of factor 4, "rope" on the same rows with RoPE as it was, "short" on rows of 144.
What is compared is the share of 500 held-out keys that a model says without a fault, in rows of 576 and of 144. At
scale gpu rows are of 1,024 and 4,096 tokens, and the model has 103M parameters.
"""

from dataclasses import replace

from deepseek_jax.configs.schema import Yarn
from deepseek_jax.data.config import DataConfig
from deepseek_jax.lab.bases import GPU, MICRO
from deepseek_jax.lab.probes import VOCABULARY, passkey
from deepseek_jax.lab.rules import Beyond, NoWorse, Ordering, Separation
from deepseek_jax.lab.study import Claim, Scale, Setup, Study, changed
from deepseek_jax.train.recipe import LearningRate, Recipe

WIDER = {"model.dim": 1024, "model.n_layers": 10, "model.ffn_dim": 2816, "recipe.micro_rows": 32}


def extended(size: Setup, short: int, rows: int, steps: tuple[int, int], peaks: tuple[float, float]) -> Scale:
    """A model of this size without experts: rows of the first stage and their length, steps and rates of each stage."""
    long = 4 * short
    model = replace(size.model, vocab_size=VOCABULARY, n_dense_layers=size.model.n_layers, moe=None, max_length=long)
    rope = replace(model.attention.rope, yarn=Yarn(factor=long / short, original_length=short))
    yarn = replace(model, attention=replace(model.attention, rope=rope))

    def source(name: str, stage: int, length: int) -> str:
        """A quarter more items than the stage has rows."""
        items = steps[stage] * rows * short // length * 5 // 4
        return f"{name}=task:passkey,length={passkey(length).length},documents={items}"

    sources = source("short", 0, short), source("long", 1, long)
    text = DataConfig(data=sources, held_out_bytes=50_000, sample_masks=True)

    def recipe(stage: int, length: int) -> Recipe:
        """AdamW, a tenth of the steps warm-up, half of them at the peak, with a cosine down to a twentieth of it."""
        tokens, peak, passed = steps[stage] * rows * short, peaks[stage], size.recipe.micro_rows
        rate = LearningRate(peak, steps[stage] // 10, tokens // 2, tokens, decay_to=peak / 20, drops=())
        return replace(
            size.recipe,
            tokens=tokens,
            batch_rows=rows * short // length,
            length=length,
            micro_rows=None if passed is None else passed * short // length,
            rate=rate,
            bias_speed=0.0,
            bias_until=None,
            sample_masks=True,
        )

    begun = Setup(model, recipe(0, short), text, reads=("short",))
    base = Setup(model, recipe(1, long), text, first=begun, probes=("passkeys",), reads=("long",))
    return Scale(
        base, {"yarn": {"model": yarn}, "rope": {}, "short": {"recipe": recipe(1, short), "reads": ("short",)}}
    )


STUDY = Study(
    stem="v3_yarn_passkey",
    question="do a few steps with YaRN let a small model find a pass key four times as far away?",
    scales={
        "cpu": extended(MICRO, short=144, rows=28, steps=(800, 60), peaks=(2e-3, 3e-4)),
        "gpu": extended(changed(GPU, WIDER), short=1024, rows=64, steps=(1000, 150), peaks=(6e-4, 9e-5)),
    },
    minutes=3,
    claims=(
        Claim(
            "C1",
            source="2405.04434 3.1.4, 2412.19437 4.3",
            says="a few steps with YaRN let a model find a key in a context four times as long",
            expected="the paper's needle is found at all depths up to 128K; here twice the keys of short rows alone",
            rule=Separation("passkey_long", low="short", high="yarn", factor=2.0),
            paper={"yarn": 1.0},
        ),
        Claim(
            "C2",
            source="2309.00071",
            says="as many steps on long rows without YaRN do not reach that",
            expected="fewer keys there, or open: this RoPE turns half of what attention compares",
            rule=Ordering("passkey_long", low="rope", high="yarn"),
        ),
        Claim(
            "C3",
            source="2309.00071",
            says="YaRN helps without any training",
            expected="of the model of short rows, one and a half times as many keys in rows of 576, in every seed",
            rule=Beyond("passkey_untrained", variant="short", over=1.5, under=1.0),
        ),
        Claim(
            "C4",
            source="2412.19437 4.3, figure 8",
            says="keys in short contexts are found as before",
            expected="the papers' retrieval is whole at all lengths; here at most half as many more are missed",
            rule=NoWorse("passkey_missed", variant="yarn", control="short", margin=0.5),
        ),
    ),
)
