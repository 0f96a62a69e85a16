"""Do GRPO's three published forms differ on one task, once a rollout is learned from more than once?

The claims stand in paper_notes/r1_variants.md. Sorting five digits, from a cold start that is stopped early, as rung L1
of experiments/r1_ladder: 8 problems of 16 answers a step, 100 steps. Each form by itself (`rl.variants`), with one
update a rollout, where every ratio is 1, and with four, where ratios, clips and masks act.

    python experiments/r1_variants/run.py            # the runs that are missing, one after another, then the verdicts
    python experiments/r1_variants/run.py --smoke    # the same code at toy size, in a folder that goes

A run takes up to 8 minutes of one core. `results` holds a file a run, figure.png draws them.
"""

from deepseek_jax.cli.programs import keep_programs
from deepseek_jax.lab.practice import Drill, Way, main
from deepseek_jax.lab.rules import NoWorse, Ordering
from deepseek_jax.lab.study import Claim
from deepseek_jax.rl.recipe import RlRecipe
from deepseek_jax.rl.tasks import Sort
from deepseek_jax.rl.variants import MATH, V3, V32

FORMS = {"math": MATH, "v3": V3, "v3.2": V32}
DRILL = Drill(
    stem="r1_variants",
    question="do GRPO's published forms differ on one task?",
    task=Sort(symbols=5, documents=4000),
    recipe=RlRecipe(steps=100, prompts=8, group=16, max_new_tokens=12, lr=1e-4, evaluate_every=20),
    ways={f"{name}-{inner}": Way(form, {"inner": inner}) for inner in (1, 4) for name, form in FORMS.items()},
    claims=(
        *(
            Claim(
                f"C{number}",
                source="this project",
                says=f"the form of {name} teaches sorting, one update a rollout",
                expected="pass@1 rises, by about 0.3 in 100 steps as on rung L1",
                rule=Ordering("pass_at_1", low="start", high=f"{name}-1"),
            )
            for number, name in enumerate(FORMS, start=1)
        ),
        Claim(
            "C4",
            source="2412.19437 eq. 26 beside 2402.03300 eq. 3",
            says="with four updates a rollout a ratio of whole answers is clipped more often than one of tokens",
            expected="the logarithm of a product of ten ratios is larger than theirs",
            rule=Ordering("clipped", low="math-4", high="v3-4"),
        ),
        Claim(
            "C5",
            source="2512.02556 eq. 5-9",
            says="with four updates V3.2's form learns no worse than DeepSeekMath's",
            expected="wrong answers at most a quarter more",
            rule=NoWorse("wrong", variant="v3.2-4", control="math-4", margin=0.25),
        ),
    ),
)

if __name__ == "__main__":
    keep_programs()
    main(DRILL, __file__, __doc__)
