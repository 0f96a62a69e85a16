"""Does a small model learn more from a larger one than from rewards, at equal tokens of its own?

R1 2501.12948 4.1, table 6; the claims stand in paper_notes/r1_distill.md. Sorting five digits. The teacher is the model
of the other studies after 100 steps of GRPO; the student has half its width and half its layers, and a start of its
own, from which it goes on by

- grpo: rewards alone, 100 steps of 8 problems and 16 answers.
- reverse-kl: as many of its own answers, at every token of which it is moved to the teacher's distribution.
- sft: fine-tuning on the teacher's right answers, as many tokens as the others train on.

    python experiments/r1_distill/run.py            # the runs that are missing, one after another, then the verdicts
    python experiments/r1_distill/run.py --smoke    # the same code at toy size, in a folder that goes

A run takes up to 8 minutes of one core, a seed's teacher included. `results` holds a file a run, figure.png draws them.
"""

from dataclasses import replace

from deepseek_jax.cli.programs import keep_programs
from deepseek_jax.lab.practice import MODEL, Drill, Way, main
from deepseek_jax.lab.rules import Ordering
from deepseek_jax.lab.study import Claim
from deepseek_jax.rl.recipe import RlRecipe
from deepseek_jax.rl.tasks import Sort

DRILL = Drill(
    stem="r1_distill",
    question="does a student learn more from a teacher than from rewards?",
    task=Sort(symbols=5, documents=4000),
    recipe=RlRecipe(steps=100, prompts=8, group=16, max_new_tokens=12, lr=1e-4, evaluate_every=20),
    ways={"grpo": Way(), "reverse-kl": Way(taught=True), "sft": Way(rounds=1, taught=True)},
    claims=(
        Claim(
            "C1",
            source="2501.12948 table 6",
            says="fine-tuning on the teacher's right answers ends above RL",
            expected="Qwen-32B: AIME 2024 72.6 by distillation, 47.0 by RL",
            rule=Ordering("pass_at_1", low="grpo", high="sft"),
        ),
        Claim(
            "C2",
            source="2501.12948 table 6, by the teacher's distribution in place of its answers",
            says="the reverse KL to the teacher, on what the student writes, ends above RL",
            expected="a signal at every token in place of one an answer",
            rule=Ordering("pass_at_1", low="grpo", high="reverse-kl"),
        ),
    ),
    model=replace(MODEL, dim=64, n_layers=2, ffn_dim=160),
    teacher=MODEL,
)

if __name__ == "__main__":
    keep_programs()
    main(DRILL, __file__, __doc__)
