"""What does each part of V3.2's objective do when rollouts are old and of another precision than training?

2512.02556 3.1; the claims stand in paper_notes/r1_v32_parts.md. Sorting five digits, from a cold start that is stopped
early. Rollouts are written in bfloat16 by the weights of two steps before, with top-p 0.9, and learned from in float32.
Each variant is V3.2's form with one part taken away, or put as it was before.

    python experiments/r1_v32_parts/run.py            # the runs that are missing, one after another, then the verdicts
    python experiments/r1_v32_parts/run.py --smoke    # the same code at toy size, in a folder that goes

A run takes up to 8 minutes of one core. `results` holds a file a run, figure.png draws them.
"""

from dataclasses import replace

from deepseek_jax.cli.programs import keep_programs
from deepseek_jax.lab.practice import Drill, Way, main
from deepseek_jax.lab.rules import NoWorse, Ordering
from deepseek_jax.lab.study import Claim
from deepseek_jax.rl.recipe import RlRecipe
from deepseek_jax.rl.tasks import Sort
from deepseek_jax.rl.variants import V32

WITHOUT = {
    "routing": {"keep_routing": False},
    "sampling-mask": {"keep_sampling_mask": False},
    "sequence-mask": {"delta": None},
    "unbiased-kl": {"kl": "k3"},
    "plain-advantage": {"scale": "std"},
}
DRILL = Drill(
    stem="r1_v32_parts",
    question="what does each part of V3.2's form do when rollouts are old?",
    task=Sort(symbols=5, documents=4000),
    recipe=RlRecipe(
        steps=100,
        prompts=8,
        group=16,
        max_new_tokens=12,
        top_p=0.9,
        stale=2,
        rollout_dtype="bfloat16",
        lr=1e-4,
        evaluate_every=20,
    ),
    ways={
        "whole": Way(V32),
        **{f"no-{name}": Way(replace(V32, **parts)) for name, parts in WITHOUT.items()},
    },
    claims=(
        Claim(
            "C1",
            source="2512.02556 3.1, keep routing",
            says="without the rollout's experts the mismatch is larger",
            expected="a token's experts flip where precision and age differ",
            rule=Ordering("mismatch", low="whole", high="no-routing"),
        ),
        Claim(
            "C2",
            source="2512.02556 3.1, keep sampling mask",
            says="without the sampler's kept set the mismatch is larger",
            expected="probabilities of all tokens beside those of the kept ones: a tenth of the mass at every draw",
            rule=Ordering("mismatch", low="whole", high="no-sampling-mask"),
        ),
        *(
            Claim(
                f"C{number}",
                source=f"2512.02556 3.1, {name}",
                says=f"the whole form learns no worse than without its {name.replace('-', ' ')}",
                expected="wrong answers at most a quarter more",
                rule=NoWorse("wrong", variant="whole", control=f"no-{name}", margin=0.25),
            )
            for number, name in enumerate(WITHOUT, start=3)
        ),
    ),
)

if __name__ == "__main__":
    keep_programs()
    main(DRILL, __file__, __doc__)
