"""Does a small model train as well when its products are in FP8?

DeepSeek-V3 (2412.19437) section 3.3 and appendix B.2; the claims with the paper's numbers stand in
paper_notes/v3_fp8.md. What FP8 loses without training is measured by errors.py, beside this file.

    deepseek-jax experiment v3_fp8     # 20 runs, of which 5 are calibration's; about 12 minutes of one core each

Products are emulated, forward and backward, with sums in float32; held-out text is measured in FP8 too. The model is
128 wide: V3's tiles of 128 and blocks of 128 x 128 would be one scale a token and one a matrix, so that both are 32
here. At scale gpu it is 512 wide and has V3's, beside float32 as well. Of the paper's two comparisons, tiles beside
blocks of gradients and fine scales beside one a tensor, it reports the first as a divergence at 16B parameters after
300B tokens and gives no number for the second.
"""

from deepseek_jax.configs.fp8 import Fp8
from deepseek_jax.lab.bases import GPU, MICRO
from deepseek_jax.lab.rules import NoWorse, Ordering
from deepseek_jax.lab.study import Claim, Scale, Study, changed

EXACT = changed(GPU, {"recipe.dtype": "float32", "recipe.micro_rows": 32})


def variants(size: int) -> dict:
    """Of tiles and blocks of this size."""
    return {
        "float32": {},
        "fine": {"fp8": Fp8(tile=size, block=size)},
        "tensor": {"fp8": Fp8(tile=None, block=None)},
        "blocks": {"fp8": Fp8(tile=size, block=size, gradient_blocks=True)},
    }


STUDY = Study(
    stem="v3_fp8",
    question="does a small model train as well when its products are in FP8?",
    scales={"cpu": Scale(MICRO, variants(32)), "gpu": Scale(EXACT, variants(128))},
    minutes=12,
    claims=(
        Claim(
            "C5",
            source="2412.19437 3.3, B.1",
            says="in tiles and blocks the loss stays within 0.25% of that in high precision",
            expected="within the paper's own 0.25%, either way, which calibration's noise of 0.1% lets be seen",
            rule=NoWorse("bits_per_byte", variant="fine", control="float32", margin=0.0025, both=True),
            paper={"float32": 0.0, "fine": 0.25},
            paper_as="loss over BF16's, % at most",
        ),
        Claim(
            "C6",
            source="2412.19437 3.3.2",
            says="a scale a tensor is worse than tiles and blocks",
            expected="open: without outliers, which a model of this size has not, the scale hardly matters",
            rule=Ordering("bits_per_byte", low="fine", high="tensor"),
        ),
        Claim(
            "C7",
            source="2412.19437 B.2",
            says="output gradients in blocks are worse than in tiles",
            expected="the paper's 16B diverges after 300B tokens; here no difference",
            rule=Ordering("bits_per_byte", low="fine", high="blocks"),
            mechanism_only=(
                "what the paper saw took a model 7,000 times as large and 180,000 times the tokens; the mechanism, "
                "large gradients of few tokens, is measured by itself"
            ),
        ),
    ),
)
