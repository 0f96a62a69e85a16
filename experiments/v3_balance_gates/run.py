"""Does the selection bias balance a softmax gate as it does a sigmoid one?

2408.15664 table 6; the claims with the paper's numbers stand in paper_notes/v3_balance_gates.md.

    deepseek-jax experiment v3_balance_gates     # 9 runs, 3 seeds, of 5 minutes of one core

The base is `v3_balance`'s with a softmax over all experts as its gate, whose chosen scores are divided by their sum as
before. The scores of E experts are then 1/E in the mean, where a sigmoid's are one half, and the speed of the bias is
less by as much: 3e-3 x 2/16 = 3.75e-4, at scale gpu 1e-3 x 2/64. Without balance, with a loss of the paper's alpha, and
by the bias alone.
"""

from deepseek_jax.lab.bases import GPU, MICRO
from deepseek_jax.lab.rules import Ordering, Separation
from deepseek_jax.lab.study import Claim, Scale, Setup, Study


def variants(base: Setup) -> dict:
    """No balance, a loss, the bias; each with a softmax gate."""
    softmax = {"model.moe.score": "softmax"}
    fixed = softmax | {"recipe.bias_speed": 0.0}
    return {
        "none": fixed,
        "aux-1e-3": fixed | {"recipe.weights.batch_balance": 1e-3},
        "free": softmax | {"recipe.bias_speed": base.recipe.bias_speed * 2 / base.model.moe.n_experts},
    }


STUDY = Study(
    stem="v3_balance_gates",
    question="does a selection bias balance a softmax gate too?",
    scales={"cpu": Scale(MICRO, variants(MICRO)), "gpu": Scale(GPU, variants(GPU))},
    minutes=6,
    seeds=(0, 1, 2),
    claims=(
        Claim(
            "C1",
            source="2408.15664 table 6",
            says="the bias alone balances a softmax gate",
            expected="global MaxVio less than half of that without balance, in every seed",
            rule=Separation("max_violation_global", low="free", high="none", factor=2.0),
        ),
        Claim(
            "C2",
            source="2408.15664 table 6",
            says="it balances one better than a balance loss of alpha 1e-3",
            expected="the paper's 1B: global MaxVio 0.027 against 0.937; here a factor of 2 in every seed",
            rule=Separation("max_violation_global", low="free", high="aux-1e-3", factor=2.0),
            paper={"free": 0.027, "aux-1e-3": 0.937},
        ),
        Claim(
            "C3",
            source="2408.15664 table 6",
            says="the language model is better without a balance loss",
            expected="the paper's 1B: perplexity 9.599 against 9.604, 0.0005 nats; here nothing can be seen",
            rule=Ordering("bits_per_byte", low="free", high="aux-1e-3"),
            paper={"free": 9.599, "aux-1e-3": 9.604},
            paper_as="perplexity, 1B",
            mechanism_only=(
                "three seeds of a model of this size see differences of 0.003 bits per byte, 0.01 nats a token, twenty "
                "times the paper's"
            ),
        ),
    ),
)
