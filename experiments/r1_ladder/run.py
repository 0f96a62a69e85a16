"""Does GRPO teach a model of two million parameters what it taught R1-Zero, on tasks from a form to a long thought?

The claims stand in paper_notes/r1_ladder.md; the rule of each is `CLAIMS` here. Five rungs, three seeds each:

- L0 tags: the base has seen four tags in any order, one text in ten in theirs. GRPO on the form alone, from the base.
- L1 sort: five digits, from a cold start that is stopped early.
- L2 carry: two-digit addition with its steps, from such a start.
- L3 parity: of 12 bits; a fifth of the texts reasons, bit by bit, the others answer at once. The start has learned them
  all; half of what it answers at once is right.
- L4 thought: L3 once more, put down after its first two runs: there the start's thoughts were wrong, every second step
  of them, and RL found nothing to lengthen. Here the start has first learned texts of which all reason.

A base is trained on the texts of L0 alone. A cold start is `train --sft` on the task's own solutions with a checkpoint
every 25 steps, of which the first counts whose held-out pass@1 reaches `Rung.begin`, on L3 the last one. All runs are
of one form, DeepSeekMath's without a KL: 8 problems (L2: 16) of 16 answers a step, one update each, so that ratios are
1.

    python experiments/r1_ladder/run.py            # the runs that are missing, one after another, then the verdicts
    python experiments/r1_ladder/run.py --smoke    # the same code at toy size, in a folder that goes

A run takes up to 15 minutes of one core. `results` holds a file a run, figure.png draws them.
"""

import argparse
import json
import shutil
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import deepseek_jax as dsj
from deepseek_jax.analysis.provenance import provenance
from deepseek_jax.cli.programs import keep_programs
from deepseek_jax.core.context import DEFAULT
from deepseek_jax.data.config import DataConfig
from deepseek_jax.lab.practice import BASE, MODEL, supervised
from deepseek_jax.lab.study import described, digest
from deepseek_jax.rl.held_out import measure
from deepseek_jax.rl.improve import Writing
from deepseek_jax.rl.problems import Problems
from deepseek_jax.rl.recipe import RlRecipe
from deepseek_jax.rl.tasks import Carry, Exercise, Parity, Sort
from deepseek_jax.rl.traces import write_traces
from deepseek_jax.rl.trainer import improve
from deepseek_jax.rl.variants import Grpo
from deepseek_jax.runs.finetune import fine_tune
from deepseek_jax.runs.options import Options
from deepseek_jax.runs.pretrain import train
from deepseek_jax.version import __version__

HERE = Path(__file__).parent
SEEDS = (0, 1, 2)
FORM = Grpo()


@dataclass(frozen=True)
class Rung:
    """``begin``: the held-out pass@1 at which the cold start ends; None: after all its ``steps``, and of no cold start
    where these are 0. ``before``: what it learns before its task, in ``before_steps``."""

    task: Exercise
    recipe: RlRecipe
    steps: int = 0
    begin: float | None = None
    before: Exercise | None = None
    before_steps: int = 0


RL = RlRecipe(steps=150, prompts=8, group=16, lr=1e-4, held_out=64, attempts=8, evaluate_every=10)
RUNGS = {
    "L0": Rung(BASE, replace(RL, steps=50, form="text", max_new_tokens=8, lr=5e-4)),
    "L1": Rung(Sort(symbols=5, documents=4000), replace(RL, max_new_tokens=12), 600, 0.2),
    "L2": Rung(Carry(digits=2, documents=4000), replace(RL, prompts=16, max_new_tokens=32), 600, 0.2),
    "L3": Rung(Parity(bits=12, long=20, documents=4000), replace(RL, max_new_tokens=20), 600),
    "L4": Rung(
        Parity(bits=12, long=20, documents=4000),
        replace(RL, max_new_tokens=20, steps=60, evaluate_every=5),
        100,
        before=Parity(bits=12, long=100, documents=8000),
        before_steps=600,
    ),
}
# Which were put down together, before the first result of any of them.
PUT_DOWN = (("L0", "L1", "L2", "L3"), ("L4",))
# What each claim asks of a run's measurements [first .. last], each of a dict as `held_out.measure` gives it; a claim
# holds where it holds in every seed, and is opposite where it fails in every seed.
CLAIMS = {
    "C1": ("L0", "the form rises to above 95% of held-out answers, from below 50%"),
    "C2": ("L1", "pass@1 rises by 0.2"),
    "C3": ("L2", "pass@1 rises by 0.2, and the form reaches 90% at an earlier measurement than 90% of the last pass@1"),
    "C4": (
        "L3",
        "pass@1 rises by 0.1 and the mean length by 30%, and they rise together: rank correlation 0.7",
    ),
    "C5": ("L1", "pass@8 rises by less than half of what pass@1 does"),
    "C6": (
        "L4",
        "pass@1 rises by 0.1 and the mean length by 30%, and they rise together: rank correlation 0.7",
    ),
}


def holds(claim: str, seen: list[dict]) -> bool:
    first, last = seen[0], seen[-1]

    def risen(name: str) -> float:
        return last[name] - first[name]

    if claim == "C1":
        return first["format"] < 0.5 and last["format"] > 0.95
    if claim == "C2":
        return risen("pass_at_1") >= 0.2
    if claim == "C3":
        form = next((i for i, found in enumerate(seen) if found["format"] >= 0.9), len(seen))
        right = next(i for i, found in enumerate(seen) if found["pass_at_1"] >= 0.9 * last["pass_at_1"])
        return risen("pass_at_1") >= 0.2 and form < right
    if claim in ("C4", "C6"):
        together = correlation([s["pass_at_1"] for s in seen], [s["length"] for s in seen])
        return risen("pass_at_1") >= 0.1 and last["length"] >= 1.3 * first["length"] and together >= 0.7
    return risen("pass_at_k") < risen("pass_at_1") / 2


def correlation(a: list[float], b: list[float]) -> float:
    """Spearman's, by ranks; equal values have the mean of theirs."""

    def ranks(values: list[float]) -> list[float]:
        mean = {v: sum(i for i, w in enumerate(sorted(values)) if w == v) / values.count(v) for v in values}
        return [mean[v] - (len(values) - 1) / 2 for v in values]

    x, y = ranks(a), ranks(b)
    size = (sum(i * i for i in x) * sum(i * i for i in y)) ** 0.5
    return sum(i * j for i, j in zip(x, y, strict=True)) / size if size else 0.0


def rule(name: str) -> str:
    """A hash of the rungs put down with one, of seeds, the model and these rungs' claims."""
    together = next(names for names in PUT_DOWN if name in names)
    rungs = {name: described(RUNGS[name]) for name in together}
    claims = {claim: says for claim, says in CLAIMS.items() if says[0] in together}
    return digest([rungs, described(MODEL), described(FORM), claims, list(SEEDS)])


def base(work: Path, seed: int, steps: int) -> Path:
    folder = work / f"base-{seed}"
    if not (folder / "checkpoint").is_dir():
        shutil.rmtree(folder, ignore_errors=True)
        if not (work / "tags").is_dir():
            write_traces(BASE, work / "tags")
        text = DataConfig(data=(f"tags={work / 'tags/traces.jsonl'}",), workers=0)
        train(MODEL, supervised(steps, seed), text, work / "tags/tokenizer", folder)
    return folder / "checkpoint"


def learned(task: Exercise, source: Path, steps: int, work: Path, name: str, seed: int) -> Path:
    """The folder of a supervised run on a task's own solutions, with a checkpoint every 25 steps."""
    traces, folder = work / f"{name}-traces", work / name
    if not traces.is_dir():
        write_traces(task, traces)
    shutil.rmtree(folder, ignore_errors=True)
    options = Options(save_every=25, keep_last=steps, keep_best=0)
    fine_tune(source, supervised(steps, seed), traces / "traces.jsonl", folder, options=options)
    return folder


def start(name: str, rung: Rung, work: Path, seed: int, source: Path) -> tuple[Path, list[dict]]:
    """The checkpoint that RL begins from, and what was measured of those before it."""
    if not rung.steps:
        return source, []
    if rung.before is not None:
        source = learned(rung.before, source, rung.before_steps, work, f"{name}-{seed}-before", seed) / "checkpoint"
    folder = learned(rung.task, source, rung.steps, work, f"{name}-{seed}-start", seed)
    saved = sorted((path for path in (folder / "checkpoints").iterdir()), key=lambda path: int(path.name))
    if rung.begin is None:
        return folder / "checkpoint", []
    words = dsj.load_tokenizer(source)
    recipe = replace(rung.recipe, seed=seed)
    problems = Problems.of(rung.task, words, recipe.form, recipe.held_out)
    writing, seen = Writing(problems, words, recipe, FORM, DEFAULT), []
    for path in saved:
        found = measure(dsj.load_pretrained(path), writing)
        seen.append({"step": int(path.name), **{key: float(value) for key, value in found.items()}})
        if found["pass_at_1"] >= rung.begin:
            return path, seen
    raise ValueError(f"{name}, seed {seed}: no checkpoint of the cold start reaches pass@1 {rung.begin}.")


def carry_out(name: str, rung: Rung, work: Path, seed: int, base_steps: int) -> dict:
    began = time.process_time()
    source = base(work, seed, base_steps)
    begun, cold = start(name, rung, work, seed, source)
    folder = work / f"{name}-{seed}"
    shutil.rmtree(folder, ignore_errors=True)
    result = improve(begun, rung.task, folder, recipe=replace(rung.recipe, seed=seed), grpo=FORM)
    if result.interrupted:
        raise SystemExit(f"{name}, seed {seed}: ended by {result.interrupted}; what there is of it is no result.")
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    kept = ("step", "reward", "rewards", "silent", "length", "truncated", "entropy", "grad_norm")
    return {
        "rung": name,
        "seed": seed,
        "rule": rule(name),
        "settings": {"recipe": asdict(rung.recipe), "task": rung.task.spelled},
        **provenance(),
        "cpu_minutes": (time.process_time() - began) / 60,
        "cold_start": cold,
        "evaluations": [
            {k: v for k, v in r.items() if k not in ("kind", "minutes", "tokens")}
            for r in records
            if r["kind"] == "evaluation"
        ],
        "steps": [{k: r[k] for k in kept} for r in records if r["kind"] == "step"],
    }


def verdicts(results: Path) -> list[str]:
    lines = []
    for claim, (rung, says) in CLAIMS.items():
        found = [json.loads(path.read_text()) for path in sorted(results.glob(f"{rung}-*.json"))]
        found = [run for run in found if run["rule"] == rule(rung)]
        held = [holds(claim, run["evaluations"]) for run in found]
        ends = "; ".join(
            f"seed {run['seed']}: pass@1 {a['pass_at_1']:.2f} to {b['pass_at_1']:.2f}, pass@8 {a['pass_at_k']:.2f} to "
            f"{b['pass_at_k']:.2f}, maj@8 {a['maj_at_k']:.2f} to {b['maj_at_k']:.2f}, form {a['format']:.2f} to "
            f"{b['format']:.2f}, length {a['length']:.1f} to {b['length']:.1f}"
            for run in found
            for a, b in [(run["evaluations"][0], run["evaluations"][-1])]
        )
        verdict = f"open: {len(held)} of {len(SEEDS)} runs are there"
        if len(held) == len(SEEDS):
            verdict = "holds" if all(held) else "opposite" if not any(held) else f"holds in {sum(held)} of {len(held)}"
        lines.append(f"{claim} ({rung}): {says}: {verdict}. {ends}")
    return lines


def draw(results: Path, path: Path) -> None:
    """A column a rung: pass@1 and pass@8 above, tokens an answer below; a colour a seed."""
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    figure = Figure(figsize=(3.1 * len(RUNGS), 5.2), layout="constrained")
    axes = figure.subplots(2, len(RUNGS), squeeze=False)
    for (name, rung), (above, below) in zip(RUNGS.items(), axes.T, strict=True):
        for file in sorted(results.glob(f"{name}-*.json")):
            run = json.loads(file.read_text())
            seen, colour = run["evaluations"], f"C{run['seed']}"
            steps = [s["step"] for s in seen]
            above.plot(steps, [s["pass_at_1"] for s in seen], color=colour)
            above.plot(steps, [s["pass_at_k"] for s in seen], color=colour, linestyle=":")
            below.plot(steps, [s["length"] for s in seen], color=colour)
        task, start = type(rung.task).__name__.lower(), ", from starts that reason" if rung.before else ""
        above.set_title(f"{name}: {task}{start}", fontsize=10)
        above.set_ylim(-0.03, 1.03)
        below.set_ylim(0, 1.1 * below.get_ylim()[1])
        below.set_xlabel("steps of GRPO")
        for axis in (above, below):
            axis.grid(alpha=0.3)
    axes[0, 0].set_ylabel("share of held-out problems")
    axes[1, 0].set_ylabel("tokens an answer")
    kinds = [
        Line2D([], [], color="0.3", linestyle=line, label=label) for line, label in (("-", "pass@1"), (":", "pass@8"))
    ]
    seeds = [Line2D([], [], color=f"C{seed}", label=f"seed {seed}") for seed in SEEDS]
    figure.legend(handles=kinds + seeds, loc="outside lower center", ncols=5, frameon=False)
    figure.savefig(path, dpi=110, metadata={"Software": f"deepseek_jax {__version__}"})


def toy(rung: Rung) -> Rung:
    recipe = replace(rung.recipe, steps=2, prompts=2, group=4, held_out=2, attempts=4, evaluate_every=1)
    begin = None if rung.begin is None else 0.0
    return replace(rung, recipe=recipe, steps=25 * bool(rung.steps), begin=begin, before_steps=5)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="at toy size; its results are not kept")
    parser.add_argument("--rungs", nargs="+", default=list(RUNGS), choices=RUNGS)
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS))
    parser.add_argument("--work", type=Path, help="where runs are made and stay; by default a folder that goes")
    arguments = parser.parse_args()
    keep_programs()
    with tempfile.TemporaryDirectory() as gone:
        work = arguments.work or Path(gone)
        work.mkdir(parents=True, exist_ok=True)
        results = work / "results" if arguments.smoke else HERE / "results"
        results.mkdir(exist_ok=True)
        for seed in arguments.seeds[: 1 if arguments.smoke else None]:
            for name in arguments.rungs:
                file = results / f"{name}-{seed}.json"
                if file.exists() and json.loads(file.read_text())["rule"] == rule(name):
                    continue
                rung = toy(RUNGS[name]) if arguments.smoke else RUNGS[name]
                found = carry_out(name, rung, work, seed, 5 if arguments.smoke else 150)
                part = file.with_suffix(".part")
                part.write_text(json.dumps(found, indent=1) + "\n")
                part.replace(file)
                print(f"{file.name}: {found['cpu_minutes']:.1f} CPU minutes", flush=True)
        draw(results, results.parent / "figure.png")
        print("\n".join(verdicts(results)))


if __name__ == "__main__":
    main()
