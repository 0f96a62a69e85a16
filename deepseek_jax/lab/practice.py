"""Studies of reinforcement learning: ways to go on from one start, compared by the workbench's rules.

``experiments/STEM/run.py`` holds one as ``DRILL`` and hands it to `main`, which also draws its figure. Each seed has a
base of its own, trained on tags in any order, and one cold start on the task's solutions, which ends at the first
checkpoint whose held-out pass@1 reaches `Drill.begin`. That is the variant "start"; all others begin from it. A run is
a file, VARIANT-SEED.json.
"""

import argparse
import json
import shutil
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

from deepseek_jax.analysis.provenance import committed, provenance
from deepseek_jax.configs.schema import ModelConfig
from deepseek_jax.convert.load import load_pretrained
from deepseek_jax.core.context import DEFAULT
from deepseek_jax.data.config import DataConfig
from deepseek_jax.lab.bases import MICRO
from deepseek_jax.lab.figure import draw
from deepseek_jax.lab.study import Claim, described, digest
from deepseek_jax.lab.verdicts import judge
from deepseek_jax.rl.held_out import measure
from deepseek_jax.rl.improve import Writing
from deepseek_jax.rl.problems import Problems
from deepseek_jax.rl.recipe import RlRecipe
from deepseek_jax.rl.reject import reject
from deepseek_jax.rl.tasks import Exercise, Tags
from deepseek_jax.rl.traces import CHATS, TOKENIZER, write_traces
from deepseek_jax.rl.trainer import improve
from deepseek_jax.rl.variants import Grpo
from deepseek_jax.runs.finetune import fine_tune
from deepseek_jax.runs.options import Options
from deepseek_jax.runs.pretrain import train
from deepseek_jax.runs.run_folder import write_whole
from deepseek_jax.text.tokenizer import load_tokenizer
from deepseek_jax.train.recipe import LearningRate, Optimizer, Recipe
from deepseek_jax.train.weights import LossWeights

START = "start"
MODEL = replace(MICRO.model, name="practice", vocab_size=268)
BASE = Tags(documents=4000)
# Of a step: the last of its rollout's updates, or their mean (`improve.MEANS`).
KEPT = ("reward", "silent", "length", "entropy", "mismatch", "clipped_low", "clipped_high", "masked", "grad_norm")
ROWS, LENGTH = 8, 128  # of a step of fine-tuning


@dataclass(frozen=True)
class Way:
    """How a run goes on from the start. ``grpo``, ``recipe``: the form, and changes of the study's recipe.
    ``rounds``: above 0 it is rejection sampling and fine-tuning on what is kept instead, so many times over, each time
    by the model as it is then and on problems of its own, with as many answers and trained tokens in all as the study's
    recipe has; 1 is offline. ``taught``: a teacher (`Drill.teacher`) takes the place of the rewards, or writes these
    answers."""

    grpo: Grpo = field(default_factory=Grpo)
    recipe: Mapping[str, Any] = field(default_factory=dict)
    rounds: int = 0
    taught: bool = False


@dataclass(frozen=True)
class Drill:
    """``ways``: those that are compared, "start" aside. ``begin``: pass@1 at which the cold start ends, of at
    most ``cold_steps``. ``teacher``: a model that first learns the task by GRPO, from a start of its own. The other
    fields are those of `lab.study.Study`."""

    stem: str
    question: str
    task: Exercise
    recipe: RlRecipe
    ways: Mapping[str, Way]
    claims: tuple[Claim, ...]
    begin: float = 0.2
    cold_steps: int = 600
    seeds: tuple[int, ...] = (0, 1, 2)
    model: ModelConfig = MODEL
    teacher: ModelConfig | None = None
    tuned: ClassVar[Mapping[str, tuple[str, ...]]] = {}
    against: ClassVar[None] = None

    def __post_init__(self):
        for claim in self.claims:
            if unknown := sorted(set(claim.rule.variants) - set(self.variants)):
                raise ValueError(f"claim {claim.id} of {self.stem} compares {', '.join(unknown)}: no such variant.")

    @property
    def variants(self) -> tuple[str, ...]:
        return START, *self.ways

    @property
    def sides(self) -> tuple[str, ...]:
        return self.variants

    @property
    def rule_hash(self) -> str:
        """Of all that a verdict follows from beside the runs, as `Study.rule_hash`."""
        claims = [[c.id, described(c.rule), c.mechanism_only is not None] for c in self.claims]
        ways = {n: [described(w.grpo), dict(w.recipe), w.rounds, *["taught"] * w.taught] for n, w in self.ways.items()}
        begun = [described(self.task), described(self.recipe), self.begin, self.cold_steps, described(self.model)]
        by = [] if self.teacher is None else [described(self.teacher)]
        return digest([claims, ways, begun, list(self.seeds), *by])

    def toy(self) -> "Drill":
        """The same code in a minute, of a task that a few steps teach."""
        recipe = replace(self.recipe, steps=2, prompts=4, group=4, held_out=2, attempts=4, evaluate_every=2)
        task, model = Tags(documents=400, ordered=100), replace(MODEL, n_layers=2, dim=64)
        ways = {name: replace(way, rounds=min(way.rounds, 2)) for name, way in self.ways.items()}
        teacher = None if self.teacher is None else model
        small = {"task": task, "recipe": recipe, "ways": ways, "model": model, "teacher": teacher}
        return replace(self, **small, begin=0.5, cold_steps=100)


def supervised(steps: int, seed: int, rate: float = 1e-3) -> Recipe:
    """Of bases, cold starts and fine-tuning: `ROWS` rows a step at a constant rate."""
    return Recipe(
        model="",
        tokens=steps * ROWS * LENGTH,
        length=LENGTH,
        batch_rows=ROWS,
        first_rows=None,
        ramp_tokens=0,
        micro_rows=None,
        init_std=0.02,
        seed=seed,
        fim_rate=0.0,
        sample_masks=True,
        dtype="float32",
        rate=LearningRate(rate, warmup_steps=min(20, steps), decay_from=None, drops=()),
        optimizer=Optimizer(weight_decay=0.0, moments="float32"),
        weights=LossWeights(mtp=0.0, balance=0.0),
        mtp_change=None,
        bias_speed=3e-3,
        bias_until=None,
        ema_decay=0.0,
        evaluate_every=steps,
    )


def begin(drill: Drill, work: Path, seed: int, base_steps: int) -> tuple[Path, dict]:
    """The checkpoint that a seed's runs begin from, and what `held_out.measure` finds of it."""
    tags, base, chats, cold = (work / f"{name}-{seed}" for name in ("tags", "base", "chats", "cold"))
    told = work / f"begun-{seed}.json"
    if told.is_file():
        found = json.loads(told.read_text())
        return Path(found["path"]), found["figures"]
    for folder in (tags, base, chats, cold):
        shutil.rmtree(folder, ignore_errors=True)
    write_traces(BASE, tags)
    text = DataConfig(data=(f"tags={tags / CHATS}",), workers=0)
    train(drill.model, supervised(base_steps, seed), text, tags / TOKENIZER, base)
    write_traces(drill.task, chats)
    options = Options(save_every=25, keep_last=drill.cold_steps, keep_best=0)
    fine_tune(base / "checkpoint", supervised(drill.cold_steps, seed), chats / CHATS, cold, options=options)
    writing = _writing(drill, base / "checkpoint", seed)
    for path in sorted((cold / "checkpoints").iterdir(), key=lambda path: int(path.name)):
        figures = _plain(measure(load_pretrained(path), writing))
        if figures["pass_at_1"] >= drill.begin:
            write_whole(told, json.dumps({"path": str(path), "figures": {"step": int(path.name), **figures}}))
            return begin(drill, work, seed, base_steps)
    raise ValueError(f"{drill.stem}, seed {seed}: no checkpoint of the cold start reaches pass@1 {drill.begin}.")


def carry_out(drill: Drill, name: str, work: Path, seed: int, base_steps: int = 150) -> dict:
    """A run's record, but for what it says of the rule."""
    began = time.process_time()
    begun, before = begin(drill, work, seed, base_steps)
    if name == START:
        found = {"after": before, "steps": []}
    else:
        folder, way = work / f"{name}-{seed}", drill.ways[name]
        shutil.rmtree(folder, ignore_errors=True)
        make = _fine_tuned if way.rounds else _reinforced
        teacher, can = _teacher(drill, work, seed, base_steps) if way.taught else (None, None)
        found = {"teacher": can, **make(drill, way, begun, folder, seed, teacher)}
    minutes = (time.process_time() - began) / 60
    return {"variant": name, "seed": seed, **provenance(), "cpu_minutes": minutes, "before": before, **found}


def _teacher(drill: Drill, work: Path, seed: int, base_steps: int) -> tuple[Path, dict]:
    """A seed's teacher and what is found of it; the first run that it teaches makes it."""
    folder, larger = work / "teachers", replace(drill, model=drill.teacher, ways={"teacher": Way()}, claims=())
    folder.mkdir(exist_ok=True)
    can = folder / f"teacher-{seed}.json"
    if not can.is_file():
        write_whole(can, json.dumps(carry_out(larger, "teacher", folder, seed, base_steps)["after"]))
    return folder / f"teacher-{seed}" / "checkpoint", json.loads(can.read_text(encoding="utf-8"))


def _reinforced(drill: Drill, way: Way, begun: Path, folder: Path, seed: int, teacher: Path | None) -> dict:
    recipe = replace(drill.recipe, seed=seed, **way.recipe)
    result = improve(begun, drill.task, folder, recipe=recipe, grpo=way.grpo, teacher=teacher)
    if result.interrupted:
        raise SystemExit(f"{folder.name}: ended by {result.interrupted}; what there is of it is no result.")
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    steps = [{"step": r["step"], **{k: r[k] for k in KEPT if k in r}} for r in records if r["kind"] == "step"]
    seen = [{k: v for k, v in r.items() if k not in ("kind", "minutes")} for r in records if r["kind"] == "evaluation"]
    return {"after": _plain(result.figures), "evaluations": seen, "steps": steps}


def _fine_tuned(drill: Drill, way: Way, begun: Path, folder: Path, seed: int, teacher: Path | None) -> dict:
    recipe, model, told = drill.recipe, begun, []
    length = _writing(drill, begun, seed).length
    updates = max(1, recipe.steps * recipe.rows * length // (ROWS * LENGTH * way.rounds))
    for number in range(way.rounds):
        chats, tuned = folder / f"answers-{number}", folder / f"tuned-{number}"
        # Held-out problems are the same of every seed of a task.
        task = replace(drill.task, seed=drill.task.seed + 1 + number)
        asked = replace(recipe, steps=recipe.steps // way.rounds, seed=1000 * seed + number)
        found = reject(teacher or model, task, chats, asked)
        result = fine_tune(model, supervised(updates, seed, recipe.lr), chats / CHATS, tuned)
        if result.interrupted:
            raise SystemExit(f"{folder.name}: ended by {result.interrupted}; what there is of it is no result.")
        model = tuned / "checkpoint"
        told.append(dict(zip(("problems", "solved", "kept"), found, strict=True)))
    figures = _plain(measure(load_pretrained(model), _writing(drill, begun, seed)))
    return {"after": figures, "rounds": told, "steps": []}


def _writing(drill: Drill, source: Path, seed: int) -> Writing:
    words, recipe = load_tokenizer(source), replace(drill.recipe, seed=seed)
    return Writing(Problems.of(drill.task, words, recipe.form, recipe.held_out), words, recipe, Grpo(), DEFAULT)


def _plain(figures: Mapping[str, Any]) -> dict[str, float]:
    return {name: float(value) for name, value in figures.items()}


def runs(drill: Drill, results: Path) -> dict[tuple[str, int], dict]:
    """(variant, seed) -> run, of those in a folder that were made under this rule."""
    made = (json.loads(path.read_text(encoding="utf-8")) for path in sorted(results.glob("*.json")))
    return {(run["variant"], run["seed"]): run for run in made if run["rule"] == drill.rule_hash}


def told(drill: Drill, found: Mapping[tuple[str, int], dict]) -> list[str]:
    """A line a variant with its ends, and a line a claim with its verdict. ``found``: as `runs` gives it."""
    lines = []
    for name in drill.variants:
        ends = [found[name, seed]["after"] for seed in drill.seeds if (name, seed) in found]
        shown = "; ".join(f"{e['pass_at_1']:.2f} {e['pass_at_k']:.2f} {e['maj_at_k']:.2f}" for e in ends)
        lines.append(f"{name}: pass@1, pass@k, maj@k of each seed: {shown}")
    judged = judge(drill, found)
    return lines + [f"{j.claim.id}: {j.claim.says}: {j.verdict.word}: {j.verdict.why}" for j in judged]


def main(drill: Drill, file: str, words: str) -> None:
    """The command of ``file``, a study's run.py: makes the runs that are missing, one after another, and tells."""
    parser = argparse.ArgumentParser(description=words, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="at toy size; its results are not kept")
    parser.add_argument("--variants", nargs="+", default=list(drill.variants), choices=drill.variants)
    parser.add_argument("--seeds", nargs="+", type=int, default=list(drill.seeds), choices=drill.seeds)
    parser.add_argument("--work", type=Path, help="where runs are made and stay; by default a folder that goes")
    parser.add_argument("--results", type=Path, help="by default beside this file, which must be committed then")
    asked = parser.parse_args()
    commit = committed(Path(file))
    if commit is None and not (asked.smoke or asked.results):
        raise SystemExit(f"{file} is not committed as it stands: commit it before its first run, or give --results.")
    if asked.smoke:
        drill = drill.toy()
    with tempfile.TemporaryDirectory() as gone:
        work = (asked.work or Path(gone)).resolve()
        work.mkdir(parents=True, exist_ok=True)
        results = work / "results" if asked.smoke else asked.results or Path(file).parent / "results"
        results.mkdir(parents=True, exist_ok=True)
        for seed in asked.seeds[: 1 if asked.smoke else None]:
            for name in asked.variants:
                path = results / f"{name}-{seed}.json"
                if path.exists() and json.loads(path.read_text(encoding="utf-8"))["rule"] == drill.rule_hash:
                    continue
                found = carry_out(drill, name, work, seed, 5 if asked.smoke else 150)
                record = {"rule": drill.rule_hash, "rule_commit": commit, **found}
                write_whole(path, json.dumps(record, indent=1) + "\n")
                print(f"{path.name}: {found['cpu_minutes']:.1f} CPU minutes", flush=True)
        found = runs(drill, results)
        print("\n".join(told(drill, found)))
        if not asked.smoke:
            print(draw(drill, found, judge(drill, found), results.parent / "figure.png"))
