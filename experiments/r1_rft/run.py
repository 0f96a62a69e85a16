"""Is fine-tuning on a model's own right answers worse than GRPO, and what does either do to pass@k?

DeepSeekMath 2402.03300 5.2.1, figures 5 and 7; the claims stand in paper_notes/r1_rft.md. Sorting five digits, from a
cold start that is stopped early. All ways have 19,200 answers to 1,200 problems and train on as many tokens:

- offline: all answers are the start's; it is fine-tuned on the right ones.
- online: ten times over, each time by the model as it is then.
- grpo: DeepSeekMath's form without a KL, 150 steps of 8 problems and 16 answers.

    python experiments/r1_rft/run.py            # the runs that are missing, one after another, then the verdicts
    python experiments/r1_rft/run.py --smoke    # the same code at toy size, in a folder that goes

A run takes up to 8 minutes of one core. `results` holds a file a run, figure.png draws them.
"""

from deepseek_jax.cli.programs import keep_programs
from deepseek_jax.lab.practice import Drill, Way, main
from deepseek_jax.lab.rules import NoWorse, Ordering
from deepseek_jax.lab.study import Claim
from deepseek_jax.rl.recipe import RlRecipe
from deepseek_jax.rl.tasks import Sort
from deepseek_jax.rl.variants import Grpo

DRILL = Drill(
    stem="r1_rft",
    question="what do right answers alone teach, and what do wrong ones add?",
    task=Sort(symbols=5, documents=4000),
    recipe=RlRecipe(steps=150, prompts=8, group=16, max_new_tokens=12, lr=1e-4, evaluate_every=30),
    ways={"offline": Way(rounds=1), "online": Way(rounds=10), "grpo": Way(Grpo())},
    claims=(
        Claim(
            "C1",
            source="2402.03300 figure 5",
            says="rejection sampling by the model as it learns is better than by the start alone",
            expected="online RFT above RFT, late in training",
            rule=Ordering("pass_at_1", low="offline", high="online"),
        ),
        Claim(
            "C2",
            source="2402.03300 figure 5",
            says="GRPO, which learns from wrong answers too, is no worse than online rejection sampling",
            expected="wrong answers at most a quarter more; in the paper GRPO is above",
            rule=NoWorse("wrong", variant="grpo", control="online", margin=0.25),
        ),
        Claim(
            "C3",
            source="2402.03300 figure 7",
            says="GRPO raises the majority of 8",
            expected="maj@8 after it above maj@8 of the start",
            rule=Ordering("maj_at_k", low="start", high="grpo"),
        ),
        Claim(
            "C4",
            source="2402.03300 figure 7",
            says="GRPO leaves pass@8 where it was",
            expected="within a tenth of the start's, either way",
            rule=NoWorse("pass_at_k", variant="grpo", control="start", margin=0.1, both=True),
        ),
    ),
)

if __name__ == "__main__":
    keep_programs()
    main(DRILL, __file__, __doc__)
