"""R1's pipeline as one run: cold start, GRPO, rejection sampling, fine-tuning of the base on what was kept, GRPO; and
R1-Zero beside it (2501.12948 §2.2, §2.3).

::

    run.json             what it is, and what its finished stages found
    r1-zero/             a run of `trainer.improve` from the base
    cold-start-chats/    the task's own solutions, and cold-start/, a run of `runs.finetune.fine_tune` on them
    grpo/                from cold-start/checkpoint
    sampled/             right answers of grpo/checkpoint, and sft/, the base fine-tuned on them
    rl/                  from sft/checkpoint; its checkpoint is what comes out
"""

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import jax

from deepseek_jax.convert.config_file import read_config
from deepseek_jax.core.context import DEFAULT, Context
from deepseek_jax.rl.problems import Problems
from deepseek_jax.rl.recipe import RlRecipe, on_chats
from deepseek_jax.rl.reject import reject
from deepseek_jax.rl.stages import LEFT_OUT, Stages
from deepseek_jax.rl.tasks import Exercise
from deepseek_jax.rl.traces import CHATS, write_traces
from deepseek_jax.rl.trainer import improve
from deepseek_jax.rl.variants import Grpo
from deepseek_jax.runs.finetune import fine_tune
from deepseek_jax.runs.metrics import Reporter
from deepseek_jax.runs.options import Options
from deepseek_jax.runs.prepare import check_fit, origin
from deepseek_jax.runs.run import Result
from deepseek_jax.runs.run_folder import RunFolder
from deepseek_jax.runs.tuned import fingerprint
from deepseek_jax.text.tokenizer import load_tokenizer
from deepseek_jax.train.recipe import Recipe
from deepseek_jax.train.tuning import LoRA

# A stage's view, and what is told of its recipe.
Shown = Callable[[str], AbstractContextManager[tuple[Reporter | None, Callable[[Recipe], None]]]]


@dataclass(frozen=True)
class Outcome:
    """``stages``: of each finished stage, by name in their order, what was found: "before" and "after" of a run of
    reinforcement learning, each an evaluation by `held_out.measure`; "problems", "solved" and "kept" of rejection
    sampling; "steps" of fine-tuning. ``interrupted``: as `runs.run.Result` has it."""

    stages: dict[str, dict[str, Any]]
    interrupted: str | None = None

    def table(self) -> list[tuple[str, dict[str, Any]]]:
        """The models in order of their making, with the evaluation of each that is there; "base" is asked as R1-Zero
        is. A model that is fine-tuned is measured before the first step of the run that begins from it."""
        rows = {"base": ("r1-zero", "before"), "r1-zero": ("r1-zero", "after"), "cold-start": ("grpo", "before")}
        rows |= {"grpo": ("grpo", "after"), "sft": ("rl", "before"), "rl": ("rl", "after")}
        return [(name, self.stages[stage][when]) for name, (stage, when) in rows.items() if stage in self.stages]


@contextmanager
def _unseen(name: str) -> Iterator[tuple[None, Callable[[Recipe], None]]]:
    yield None, lambda recipe: None


def pipeline(
    source: Path,
    task: Exercise,
    folder: Path,
    *,
    stages: Stages | None = None,
    recipe: RlRecipe | None = None,
    grpo: Grpo | None = None,
    keep: int = 1,
    patterns: Sequence[str] = (),
    lora: LoRA | None = None,
    options: Options | None = None,
    shown: Shown = _unseen,
    ctx: Context = DEFAULT,
    command: str | None = None,
    arguments: list[str] | None = None,
) -> Outcome:
    """Leads a base through all stages, each a folder of ``folder``. Where that holds a pipeline of the same settings it
    goes on: a finished stage is not repeated, one under way goes on from its newest checkpoint, bit for bit.

    ``source``: the base, which fine-tuning after rejection sampling begins from too. ``recipe``, ``grpo``: of every run
    of reinforcement learning; ``keep``: as `reject.chosen` has it; ``patterns``, ``lora``: of every training.
    ``shown``: how a stage is shown.

    Raises ValueError, FileExistsError or FileNotFoundError for what does not fit; before the first stage nothing is
    written then.
    """
    stages, recipe, grpo, options = stages or Stages(), recipe or RlRecipe(), grpo or Grpo(), options or Options()
    source = Path(source)
    _check(source, task, stages, recipe, lora, options, ctx)
    cfg = read_config(source)
    tuning = on_chats(stages.sft_lr, cfg.max_length, recipe.seed)
    trained = {"patterns": patterns, "lora": lora, "options": options, "ctx": ctx}

    def going_on(name: str) -> bool:
        return (folder / name / "run.json").is_file()

    def reinforced(name: str, begin: Path, how: RlRecipe) -> Callable[[], Result | dict]:
        def work() -> Result | dict:
            with shown(name) as (view, planned):
                seen = {"view": view, "planned": planned, "resume": going_on(name)}
                result = improve(begin, task, folder / name, recipe=how, grpo=grpo, **trained, **seen)
            if result.interrupted is not None:
                return result
            return {"before": _first_evaluation(folder / name), "after": result.figures}

        return work

    def fine_tuned(name: str, chats: str, epochs: float) -> Callable[[], Result | dict]:
        def work() -> Result | dict:
            with shown(name) as (view, planned):
                seen = {"view": view, "planned": planned, "resume": going_on(name)}
                data = folder / chats / CHATS
                result = fine_tune(source, tuning, data, folder / name, epochs=epochs, **trained, **seen)
            return result if result.interrupted is not None else {"steps": result.steps}

        return work

    def solutions() -> dict:
        write_traces(replace(task, documents=stages.cold_start), _anew(folder / "cold-start-chats"))
        return {"kept": stages.cold_start}

    def sampled() -> dict:
        asked = replace(recipe, steps=stages.rollouts)
        found = reject(folder / "grpo/checkpoint", task, _anew(folder / "sampled"), asked, keep, ctx)
        return dict(zip(("problems", "solved", "kept"), found, strict=True))

    work: dict[str, Callable[[], Result | dict]] = {
        "r1-zero": reinforced("r1-zero", source, replace(recipe, form=stages.zero)),
        "cold-start-chats": solutions,
        "cold-start": fine_tuned("cold-start", "cold-start-chats", stages.cold_epochs),
        "grpo": reinforced("grpo", folder / "cold-start/checkpoint", recipe),
        "sampled": sampled,
        "sft": fine_tuned("sft", "sampled", stages.sft_epochs),
        "rl": reinforced("rl", folder / "sft/checkpoint", recipe),
    }
    if stages.zero == LEFT_OUT:
        del work["r1-zero"]
    settings = {
        "from": str(source),
        "weights": fingerprint(source),
        "task": task.spelled,
        "stages": asdict(stages),
        "recipe": asdict(recipe),
        "grpo": asdict(grpo),
        "keep": keep,
        "train": list(patterns),
        "lora": None if lora is None else asdict(lora),
    }
    about = origin() | {"command": command, "arguments": arguments}
    with _opened(folder, settings, about) as run:
        done = dict(run.about.get("stages", {}))
        for name, make in work.items():
            if name in done:
                continue
            found = make()
            if isinstance(found, Result):
                return Outcome(done, found.interrupted)
            done[name] = found
            run.describe(stages=done)
    return Outcome(done)


@contextmanager
def _opened(folder: Path, settings: dict, about: dict) -> Iterator[RunFolder]:
    if not (folder / "run.json").is_file():
        # A new folder goes after an error; from its second opening on there may be something to keep.
        with RunFolder.opened(folder, settings, about, resume=False):
            pass
    with RunFolder.opened(folder, settings, about, resume=True) as run:
        yield run


def _check(
    source: Path, task: Exercise, stages: Stages, recipe: RlRecipe, lora: LoRA | None, options: Options, ctx: Context
) -> None:
    """Raises ValueError for what a later stage would refuse, so that it is said before the first."""
    if recipe.form != "chat":
        raise ValueError(f"a pipeline's fine-tuning teaches chats, so its runs ask in chats, not as {recipe.form!r}.")
    if lora is not None and lora.rank and not lora.merge:
        raise ValueError("each stage begins from the model of another: adapters must be merged (leave out no-merge).")
    if jax.process_count() > 1:
        raise ValueError(f"a pipeline is of one process, not of {jax.process_count()}: run its stages one by one.")
    cfg, words = read_config(source), load_tokenizer(source)
    for form in dict.fromkeys((recipe.form, stages.zero)):
        if form == LEFT_OUT:
            continue
        width = Problems.of(task, words, form, recipe.held_out).width
        try:
            check_fit(cfg, recipe.training(width + recipe.max_new_tokens), options, ctx)
        except ValueError as error:
            hint = " Choose another form of R1-Zero's prompts with --stages.zero text, or none." * (form != "chat")
            raise ValueError(f"problems put as {form}: {error}{hint}") from None


def _first_evaluation(run: Path) -> dict[str, Any]:
    lines = map(json.loads, (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    return next(line for line in lines if line["kind"] == "evaluation")


def _anew(folder: Path) -> Path:
    """What a process that was killed has left of a stage without checkpoints goes."""
    shutil.rmtree(folder, ignore_errors=True)
    return folder
