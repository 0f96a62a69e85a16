"""Do experts specialise by domain, and does a balance loss on every sequence keep them from it?

DeepSeek-V3 (2412.19437) section 4.5.3; the claims with the paper's numbers stand in paper_notes/v3_specialisation.md.

    deepseek-jax experiment v3_specialisation     # 20 runs of 6 minutes of one core, of which 10 are other studies'

The base balances by its bias alone; the other variants' bias stands still, and they balance by a loss: over the 2,048
tokens of a step, or over each row of 256, by one weight and by ten times that. A row is cut from one or two files, so
that it is of one domain nearly always: the parts of the standard library, as held-out text names them. What is compared
is how far the domains' use of experts lies apart: the Jensen-Shannon divergence of their loads, the mean over layers.
At scale gpu a step has 65,536 tokens, and a row 1,024.
"""

from deepseek_jax.lab.bases import GPU, MICRO
from deepseek_jax.lab.rules import NoWorse, Ordering, Separation
from deepseek_jax.lab.study import Claim, Scale, Study

FIXED = {"recipe.bias_speed": 0.0}
VARIANTS = {
    "free": {},
    "batch-1e-2": FIXED | {"recipe.weights.batch_balance": 1e-2},
    "sequence-1e-2": FIXED | {"recipe.weights.balance": 1e-2},
    "sequence-1e-1": FIXED | {"recipe.weights.balance": 1e-1},
}

STUDY = Study(
    stem="v3_specialisation",
    question="does balance within every sequence keep experts from specialising by domain?",
    scales={"cpu": Scale(MICRO, VARIANTS), "gpu": Scale(GPU, VARIANTS)},
    minutes=6,
    claims=(
        Claim(
            "C1",
            source="2412.19437 figure 9",
            says="without a sequence-wise loss experts specialise more by domain",
            expected="the divergence of the domains' loads is twice that under a loss that acts on every row, 1e-1",
            rule=Separation("load_divergence", low="sequence-1e-1", high="free", factor=2.0),
        ),
        Claim(
            "C2",
            source="2412.19437 4.5.3",
            says="a loss over the batch leaves experts free to specialise, one over each sequence does not",
            expected="at one weight, 1e-2, the divergence is larger with the batch-wise loss, in every seed",
            rule=Separation("load_divergence", low="sequence-1e-2", high="batch-1e-2", factor=1.0),
        ),
        Claim(
            "C3",
            source="2412.19437 4.5.3",
            says="the batch-wise loss makes a model as good as the bias does",
            expected="the paper's 1B: 2.253 both, 3B 2.080 both; here within 0.2%, either way",
            rule=NoWorse("bits_per_byte", variant="batch-1e-2", control="free", margin=0.002, both=True),
        ),
        Claim(
            "C4",
            source="2412.19437 4.5.3",
            says="the sequence-wise loss makes a worse model than the bias",
            expected="the paper's 1B: 2.258 against 2.253, 0.2%: 0.004 bits a byte here, where five seeds see 0.0024",
            rule=Ordering("bits_per_byte", low="free", high="sequence-1e-2"),
            paper={"free": 2.253, "batch-1e-2": 2.253, "sequence-1e-2": 2.258},
            paper_as="validation loss, 1B",
        ),
    ),
)
