"""Does moving a selection bias balance the load of experts, without what a balance loss costs?

2408.15664, and V3 section 4.5.3; the claims with the paper's numbers stand in paper_notes/v3_balance.md.

    deepseek-jax experiment v3_balance        # 25 runs of 5 to 7 minutes of one core, two at a time

The base balances by the sign rule at u = 3e-3, with no balance loss at all; what differs is said below, one field each
but for those that balance by a loss or not at all, whose bias stands still. The balance loss is the batch-wise one
(`batch_balance`) over the 2,048 tokens of a step: the paper's baseline, whose alpha it states as 1e-3. Load is measured
on the same 185,000 held-out tokens after the bias has come to rest; MaxVio of perfectly even, independent routing would
be about 0.01 there. The base at scale gpu has V3's speed of 1e-3, which no variant keeps.

Other rules than the sign are the study `v3_balance_rules` on this base, softmax gates `v3_balance_gates`.
"""

from deepseek_jax.lab.bases import GPU, MICRO
from deepseek_jax.lab.rules import Ordering, Separation, Trend
from deepseek_jax.lab.study import Claim, Scale, Study

FIXED = {"recipe.bias_speed": 0.0}
VARIANTS = {
    "none": FIXED,
    "aux-1e-3": FIXED | {"recipe.weights.batch_balance": 1e-3},
    "aux-1e-2": FIXED | {"recipe.weights.batch_balance": 1e-2},
    "sign-3e-3": {},
    "sign-1e-2": {"recipe.bias_speed": 1e-2},
}

STUDY = Study(
    stem="v3_balance",
    question="does a moving selection bias balance the experts' load, and at what price?",
    scales={"cpu": Scale(MICRO, VARIANTS), "gpu": Scale(GPU, VARIANTS | {"sign-3e-3": {"recipe.bias_speed": 3e-3}})},
    registered_with=("gpu",),
    minutes=5,
    against=("max_violation_global", "bits_per_byte"),
    claims=(
        Claim(
            "C3",
            source="2408.15664 figure 1, 3.1",
            says="the sign rule alone balances the load",
            expected="global MaxVio of 2 to 3 without balance, 0.1 to 0.4 with the rule, in every seed",
            rule=Separation("max_violation_global", low="sign-3e-3", high="none", factor=2.0),
        ),
        Claim(
            "C4",
            source="2408.15664 table 2",
            says="it balances better than a balance loss of alpha 1e-3",
            expected="the paper's 1B: global MaxVio 0.04 against 0.72; here a factor of 2 in every seed",
            rule=Separation("max_violation_global", low="sign-3e-3", high="aux-1e-3", factor=2.0),
            paper={"sign-3e-3": 0.04, "aux-1e-3": 0.72},
        ),
        Claim(
            "C5",
            source="2408.15664 figure 2",
            says="the larger the balance loss, the better the balance",
            expected="global MaxVio falls from no loss over 1e-3 to 1e-2 in every seed",
            rule=Trend("max_violation_global", levels=("aux-1e-2", "aux-1e-3", "none")),
        ),
        Claim(
            "C6",
            source="2408.15664 figure 4",
            says="a fast bias (u = 1e-2) keeps the load of batches unsteady late in the run",
            expected="MaxVio of training batches, before the bias comes to rest, is higher at 1e-2 than at 3e-3",
            rule=Ordering("max_violation_batch", low="sign-3e-3", high="sign-1e-2"),
        ),
        Claim(
            "C7",
            source="2408.15664 table 2",
            says="the language model is better without a balance loss",
            expected="the paper's 1B: perplexity 9.50 against 9.56, 0.0063 nats; here nothing can be seen",
            rule=Ordering("bits_per_byte", low="sign-3e-3", high="aux-1e-3"),
            paper={"sign-3e-3": 9.50, "aux-1e-3": 9.56},
            paper_as="perplexity, 1B",
            mechanism_only=(
                "five seeds of a model of this size see differences of about 0.03 nats, five times the paper's; in a "
                "pilot even no balance at all could not be told from either by its loss"
            ),
        ),
    ),
)
