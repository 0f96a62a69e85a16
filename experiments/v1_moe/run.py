"""What do shared experts hold that routed ones do not, and what do finer experts bring at the same cost?

DeepSeekMoE (2401.06066) sections 4.3 to 4.5; the claims with the paper's numbers stand in paper_notes/v1_moe.md.

    deepseek-jax experiment v1_moe        # 25 runs of about 7 minutes of one core, two at a time

The base chooses 4 of 16 routed experts beside a shared one, all of width 64. The other variants have as many
parameters, in all and for a token, but for the router's: 2 of 8 experts of width 128 and 8 of 32 of width 32, both
beside a shared one of 64; 5 of 17 of width 64, none of them shared; and a dense network of width 320, which is what a
token activates, in place of experts. Three of them are measured without single experts at their end: a probe, by which
the base's runs are others than calibration's. At scale gpu there are as many experts, the base's of width 768: 286M
parameters, 116M of them for a token.
"""

from deepseek_jax.lab.bases import GPU, MICRO
from deepseek_jax.lab.rules import Beyond, Ordering, Separation, Trend
from deepseek_jax.lab.study import Claim, Scale, Setup, Study, changed

PROBED = {"probes": ("knock_outs",)}
WIDER = {"model.dim": 768, "model.ffn_dim": 5 * 768, "recipe.micro_rows": 32}
EXPERTS = {"model.moe.n_experts": 16, "model.moe.top_k": 4, "model.moe.expert_dim": 768}
LARGE = changed(GPU, WIDER | EXPERTS)


def variants(base: Setup) -> dict:
    """The base, and others at its cost."""
    width = base.model.moe.expert_dim
    coarse = {"model.moe.top_k": 2, "model.moe.n_experts": 8, "model.moe.expert_dim": width * 2}
    fine = {"model.moe.n_experts": 32, "model.moe.top_k": 8, "model.moe.expert_dim": width // 2}
    return {
        "16k4": PROBED,
        "8k2": PROBED | {"model.moe.shared_dim": width} | coarse,
        "32k8": PROBED | {"model.moe.shared_dim": width} | fine,
        "no-shared": {"model.moe.n_experts": 17, "model.moe.top_k": 5, "model.moe.n_shared": 0},
        "dense": {"model.n_dense_layers": base.model.n_layers},
    }


STUDY = Study(
    stem="v1_moe",
    question="what do shared and fine experts hold, and what do they bring at equal cost?",
    scales={"cpu": Scale(MICRO, variants(MICRO)), "gpu": Scale(LARGE, variants(LARGE))},
    minutes=7,
    claims=(
        Claim(
            "C4",
            source="2401.06066 4.5",
            says="in each layer the shared expert's absence costs more than that of any routed one",
            expected="in every layer more than four times the worst of 16, for it has four times a routed one's tokens",
            rule=Beyond("shared_to_routed", "16k4", over=4.0, under=1.0),
        ),
        Claim(
            "C5",
            source="2401.06066 4.5",
            says="one routed expert more does not replace the shared one",
            expected="the paper's 2B: Pile loss 1.808 to 2.414, a rise of 34%; here by a tenth or more",
            rule=Beyond("replaced", "16k4", over=0.1, under=0.01),
            paper={"16k4": 0.335},
        ),
        Claim(
            "C6",
            source="2401.06066 figure 4",
            says="fine experts replace each other less: without its top-scored ones a token loses more",
            expected="without the top eighth (4 of 32 against 1 of 8) the fine model rises more, in every seed",
            rule=Separation("top_eighth", low="8k2", high="32k8", factor=1.0),
        ),
        Claim(
            "C7",
            source="2401.06066 figure 3",
            says="the finer the experts, the better the model at equal cost",
            expected="bits per byte fall from 2 of 8 over 4 of 16 to 8 of 32, in every seed, by some 0.3% each",
            rule=Trend("bits_per_byte", levels=("32k8", "16k4", "8k2")),
        ),
        Claim(
            "C8",
            source="2401.06066 figure 3",
            says="one expert set apart as shared makes a better model at equal cost",
            expected="the paper's figure has no losses; others find no gain or the reverse (2409.02060): open",
            rule=Ordering("bits_per_byte", low="16k4", high="no-shared"),
        ),
        Claim(
            "C9",
            source="2401.06066 table 1",
            says="it is better than a dense model of equal activation",
            expected="the paper's 2B: Pile loss 1.808 against 2.060, 12%; here less, for 800 steps",
            rule=Ordering("bits_per_byte", low="16k4", high="dense"),
            paper={"16k4": 1.808, "dense": 2.060},
            paper_as="Pile loss, 2B",
        ),
    ),
)
