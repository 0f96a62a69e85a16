"""A run from its beginning to the exported model: `carry_out`, which pre-training and fine-tuning share."""

import json
from collections.abc import Callable
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax

from deepseek_jax.analysis.peaks import peak_of, training_flops
from deepseek_jax.configs.hf import config_to_json
from deepseek_jax.configs.schema import ModelConfig
from deepseek_jax.core.context import Context
from deepseek_jax.core.params import named
from deepseek_jax.model.transformer import Transformer
from deepseek_jax.parallel.processes import Agreement, from_first
from deepseek_jax.runs.checkpoint import Checkpoints
from deepseek_jax.runs.course import Batches, Course, Source
from deepseek_jax.runs.journal import Journal, Progress, phase, progress_damage
from deepseek_jax.runs.metrics import JsonLines, Reporter, Reporters, TensorBoard, TextLog, number, plain
from deepseek_jax.runs.options import Options
from deepseek_jax.runs.prepare import origin
from deepseek_jax.runs.run_folder import RunFolder
from deepseek_jax.runs.signals import StopSignals
from deepseek_jax.runs.throughput import Throughput
from deepseek_jax.runs.trainer import Trainer
from deepseek_jax.text.files import tokenizer_files
from deepseek_jax.train.begin import like
from deepseek_jax.train.recipe import Recipe
from deepseek_jax.train.step import State
from deepseek_jax.version import __version__

REPEATED = 1.05  # passes over a source from which on a run says that it repeats text


@dataclass(frozen=True)
class Result:
    """How a run ended.

    ``interrupted``: None, or the signal that ended it early. ``model_bits``, ``trigram_bits``, ``ema_bits``: held-out
    bits per byte at the end of the weights, of a trigram counted on the tokens trained on (None for a checkpoint that
    is trained further), and of the weights' moving average. ``crossed_at``: minutes into the run of the first
    measurement at which the model was better than the trigram; None if it never was. ``stored_bits``: of the exported
    weights.
    ``checkpoint``: the published folder; None when SIGTERM left no time for it. ``figures``: the last evaluation whole.
    """

    steps: int
    tokens: int
    interrupted: str | None
    minutes: float
    model_bits: float | None
    trigram_bits: float | None
    ema_bits: float | None
    crossed_at: float | None
    draft_agreement: float | None
    stored_bits: float | None
    checkpoint: Path | None
    figures: dict[str, Any]


@dataclass(frozen=True)
class Work:
    """What a run trains, on what, and what becomes of it.

    ``source``: what it learns from. ``make``: the model as it begins. ``anew``: it has learned nothing before; any
    other is measured before the first step too. ``told``: a line for the log on what is learned from.
    """

    cfg: ModelConfig
    recipe: Recipe
    source: Source
    make: Callable[[], Transformer]
    anew: bool = False
    told: str | None = None


def carry_out(run: RunFolder, work: Work, *, options: Options, view: Reporter, ctx: Context, began: float) -> Result:
    """Trains from the beginning or from ``run``'s newest checkpoint, measures and exports.

    ``ctx``: what measurements run in; steps compute in the recipe's dtype.
    """
    run.describe(model=asdict(work.cfg), recipe=asdict(work.recipe))
    course = work.source.open(run, work.recipe, options, ctx)
    run.write_config(config_to_json(work.cfg))
    with closing(course.batches):
        return _fit(run, work, course, options=options, view=view, ctx=ctx, began=began)


def _fit(
    run: RunFolder, work: Work, course: Course, *, options: Options, view: Reporter, ctx: Context, began: float
) -> Result:
    recipe, batches = work.recipe, course.batches
    checkpoints = Checkpoints(run.checkpoints, options.keep_last, options.keep_best, _model_files(run), run.check)
    with phase(view, "making the model"):
        model = work.make()
    cfg, size = model.cfg, sum(v.size for v in named(model).values())
    state, step = course.begin(model)
    moving = sum(v.size for v in named(state.params).values())
    del model
    progress, damaged = Progress(data_state=batches.get_state()), ()
    if from_first(checkpoints.steps, "looking for checkpoints"):
        # Not both at once: on an accelerator there may be room for one state only.
        wanted, state = like(state), None
        with phase(view, "reading the checkpoint"):
            found = checkpoints.restore(wanted, lambda record: _damage(batches, record))
        state, damaged, progress = found.state, found.damaged, Progress(**found.extra)
        batches.set_state(found.data_state)
        began -= 60 * progress.minutes
    resumed = not run.fresh
    known = resumed and run.truncate_metrics(progress.step)
    files = [JsonLines(run.metrics), TextLog(run.log, began)] if run.writes else []
    if options.tensorboard and run.writes:
        files.append(TensorBoard(run.path / "tensorboard"))
    with closing(checkpoints), Reporters([*files, view]) as reporters:
        journal = Journal(reporters, began)
        if not known:  # nor is it after a kill before it was written
            journal.record("run", deepseek_jax=__version__, jax=jax.__version__)
        journal.say(
            f"deepseek_jax {__version__}, jax {jax.__version__}, {cfg.name}: {size:,} parameters, {moving:,} trained"
        )
        journal.say(f"from {json.dumps(origin())}")
        if work.told is not None:
            journal.say(work.told)
        journal.say(f"recipe {json.dumps(asdict(recipe))}")
        if recipe.bias_speed and cfg.moe is not None and not cfg.moe.bias:
            journal.say("the routers have no bias that bias_speed could move: the balance losses alone spread the load")
        if cfg.attention.indexed and not recipe.weights.index:
            journal.say("the indexers stay as they are: weights.index is 0, and no other loss reaches them")
        for message in damaged:
            journal.event("damaged", message, progress)
        if resumed:
            journal.event("resumed", f"from {checkpoints.newest() or 'the beginning'}", progress)
        for label, n in batches.passes(recipe.tokens // recipe.length).items():
            if n > REPEATED:
                journal.event("repeated", f"{label} has text for one pass; this run passes it {n:.3g} times", progress)
        peak, devices = peak_of(jax.devices()[0].device_kind), 1 if ctx.mesh is None else ctx.mesh.size
        flops = training_flops(cfg, recipe.length, bool(cfg.mtp_depth and recipe.weights.mtp))
        trainer = Trainer(
            state,
            step,
            batches,
            course.measure,
            course.figure,
            recipe=recipe,
            options=options,
            checkpoints=checkpoints,
            journal=journal,
            throughput=Throughput(flops, None if peak is None else peak.flops * devices),
            progress=progress,
        )
        del state
        with StopSignals(Agreement() if jax.process_count() > 1 else None) as stop:
            if not (work.anew or progress.step):
                trainer.evaluate()
            trainer.run(stop)
            return _end(run, trainer, stop, course.export)


def _end(run: RunFolder, trainer: Trainer, stop: StopSignals, export: Callable[[State], float | None]) -> Result:
    """Measures and exports, unless SIGTERM leaves no time for it."""
    progress, journal, asked = trainer.progress, trainer.journal, stop.settled()
    found, stored, exported = progress.evaluation, None, False
    if asked is not None:
        kept = f"saved in {trainer.checkpoints.newest()}; --resume goes on from there"
        journal.event("interrupted", f"by {asked}, {kept}", progress)
    if asked != "SIGTERM" and progress.step:
        if found is None or found["step"] != progress.step:
            # Not among the run's own measurements: a run that is resumed has the same ones as one never stopped.
            with phase(journal.reporter, "measuring"):
                found = plain(trainer.measure(trainer.state, progress))
        run.check()
        with phase(journal.reporter, "exporting"):
            stored, exported = export(trainer.state), True
        size = sum(f.stat().st_size for f in run.export.iterdir())
        told = "" if stored is None else f", bits per byte as stored {stored:.4f}"
        journal.say(f"exported {run.export}: {size / 1e6:.2f} MB{told}")
    found = found or {}
    result = Result(
        steps=progress.step,
        tokens=progress.tokens,
        interrupted=stop.settled(),
        minutes=journal.minutes(),
        model_bits=number(found.get("bits_per_byte")),
        trigram_bits=number(found.get("trigram_bits_per_byte")),
        ema_bits=number(found.get("ema_bits_per_byte")),
        crossed_at=progress.crossed_at,
        draft_agreement=found.get("draft_agreement"),
        stored_bits=stored,
        checkpoint=run.export if exported else None,
        figures=found,
    )
    record = asdict(result) | {"checkpoint": result.checkpoint and result.checkpoint.name}
    del record["minutes"], record["figures"]  # every record has the minutes, and the last evaluation the figures
    journal.record("result", step=progress.step, **record)
    return result


def _damage(batches: Batches, record: dict) -> str | None:
    """What is missing or of the wrong kind in a checkpoint's record that only a run knows; None where nothing is."""
    return progress_damage(record["extra"], record["step"]) or batches.damage(record["data_state"])


def _model_files(run: RunFolder) -> dict[str, Path]:
    words = {str(name): run.tokenizer / name for name in tokenizer_files(run.tokenizer)}
    return {run.config.name: run.config, **words}
