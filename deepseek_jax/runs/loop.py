"""A training run from its settings to the exported model: `train`, and `fit`, which takes any model and batches."""

import json
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp

from deepseek_jax.analysis.peaks import peak_of, training_flops
from deepseek_jax.configs.hf import config_to_json
from deepseek_jax.configs.schema import ModelConfig
from deepseek_jax.convert.load import load_pretrained
from deepseek_jax.core.axes import shardings
from deepseek_jax.core.context import DEFAULT, Context
from deepseek_jax.core.params import Trained, named
from deepseek_jax.data.batches import Batches
from deepseek_jax.data.config import DataConfig
from deepseek_jax.data.pipeline import load_data
from deepseek_jax.model.transformer import Transformer, abstract
from deepseek_jax.parallel.placement import row_share
from deepseek_jax.parallel.processes import Agreement, first_then_all, from_first, is_first
from deepseek_jax.runs.checkpoint import Checkpoints
from deepseek_jax.runs.export import export_model
from deepseek_jax.runs.journal import Journal, Progress, phase, progress_damage
from deepseek_jax.runs.measure import exporter, measurer
from deepseek_jax.runs.metrics import JsonLines, Reporter, Reporters, TensorBoard, TextLog, number, plain
from deepseek_jax.runs.options import Options
from deepseek_jax.runs.prepare import check_fit, file_hash, make_tokenizer, open_run, origin
from deepseek_jax.runs.run_folder import RunFolder
from deepseek_jax.runs.signals import StopSignals
from deepseek_jax.runs.throughput import Throughput
from deepseek_jax.runs.trainer import Measure, Trainer
from deepseek_jax.text.files import copy_tokenizer, tokenizer_files
from deepseek_jax.train.begin import begin, fresh, like
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
    ``checkpoint``: the published folder; None when SIGTERM left no time for it.
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


def train(
    cfg: ModelConfig,
    recipe: Recipe,
    text: DataConfig,
    tokenizer: Path | int,
    folder: Path,
    *,
    options: Options | None = None,
    resume: bool = False,
    source: Path | None = None,
    view: Reporter | None = None,
    ctx: Context = DEFAULT,
    began: float | None = None,
    command: str | None = None,
    arguments: list[str] | None = None,
) -> Result:
    """Pre-trains ``cfg`` and exports it into ``folder``; `runs.run_folder` says what lies there.

    ``text``: the recipe's FIM rate and sample masks take the place of its own. ``tokenizer``: a folder with a
    tokenizer.json, or the vocabulary size of one to be trained on the text; the model's vocabulary becomes the
    tokenizer's. ``source``: a checkpoint to continue from, with rows for all of ``tokenizer``'s ids, or more; of a
    ``cfg`` that is not its own the weights that fit are kept (`convert.other_config`). ``resume``: go on with the run
    in ``folder``, from its newest whole checkpoint, bit for bit as if it had never stopped (on a GPU with
    ``--xla_gpu_deterministic_ops=true`` in XLA_FLAGS). A recipe of more tokens than it was begun with extends it,
    whether it has ended or not: what is counted in tokens stays where it was, so that after a cosine the rate stays at
    its last value; the steps are those of a run begun with the longer recipe. ``view``: sees what is reported.
    ``began``: `time.monotonic()` at which the run counts as begun. ``command``, ``arguments``: what started the run,
    for run.json.

    ``ctx``: with a mesh the model is made or loaded in its shards and trained there; a run may be resumed on another
    mesh and by another number of processes. Several processes (`parallel.processes.join`) all call this, with a mesh
    of all their devices and a folder that they share; each reads the rows that its devices compute, the first one
    alone reports and writes, and all of them stop where one is stopped.

    Ctrl-C ends the run after the step under way: it is saved, measured and exported like a whole one, and can be
    resumed; a second one stops at once. SIGTERM saves and returns.

    Raises ValueError, FileExistsError or FileNotFoundError for settings that do not fit each other or the folder;
    nothing is written then. TrainingStopped after too many steps that are not finite; OSError for a full disk.
    """
    options = options or Options()
    check_fit(cfg, recipe, options, ctx)
    text = replace(text, fim_rate=recipe.fim_rate, sample_masks=recipe.sample_masks)
    began = time.monotonic() if began is None else began
    view = Reporters([view] if view is not None and is_first() else [])
    settings = {
        "model": asdict(cfg),
        "recipe": asdict(recipe),
        "text": {k: v for k, v in asdict(text).items() if k not in ("workers", "token_folder")},
        "tokenizer": tokenizer if isinstance(tokenizer, int) else file_hash(tokenizer),
        "from": None if source is None else str(source),
    }
    about = origin() | {"command": command, "arguments": arguments}
    with open_run(folder, settings, about, resume) as run:
        words = make_tokenizer(run, tokenizer, text, cfg.max_length)
        if source is None:
            cfg = replace(cfg, vocab_size=words.vocab_size)
        words.check_fits(cfg.vocab_size)
        published = config_to_json(cfg)  # refuses, before the work, what could not be saved
        if ctx.mesh is not None:
            shardings(abstract(cfg), ctx)
        data = first_then_all(lambda: load_data(text, words, run.tokens, view.say), "tokenising the text")
        batches = data.batches(length=recipe.length, rows=recipe.pass_rows, seed=recipe.seed, shard=row_share(ctx))
        held_out = data.held_out(recipe.length)
        run.describe(
            model=asdict(cfg), recipe=asdict(recipe), data=data.record(), held_out_tokens=len(held_out.stream_n)
        )
        run.write_config(published)

        def make() -> Transformer:
            if source is not None:
                key = jax.random.key(recipe.seed)
                return load_pretrained(source, dtype=jnp.float32, ctx=ctx, cfg=cfg, key=key)
            return fresh(cfg, recipe, ctx)

        def seen() -> Batches:
            return data.batches(length=recipe.length, rows=recipe.pass_rows, seed=recipe.seed)

        def write(model: Transformer, folder: Path) -> None:
            export_model(model, folder, options, source, recipe.dtype)
            if run.writes:
                copy_tokenizer(run.tokenizer, folder)

        with closing(batches):
            return fit(
                run,
                make,
                recipe,
                batches,
                measurer(held_out, ctx, seen if source is None else None),
                exporter(run, options, held_out, ctx, write),
                options=options,
                view=view,
                ctx=replace(ctx, dtype=jnp.dtype(recipe.dtype)),
                began=began,
                measure_first=source is not None,
            )


def fit(
    run: RunFolder,
    make: Callable[[], Transformer],
    recipe: Recipe,
    batches: Batches,
    measure: Measure,
    export: Callable[[State], float],
    *,
    options: Options,
    view: Reporter,
    ctx: Context,
    began: float,
    trained: Trained | None = None,
    measure_first: bool = False,
    told: str | None = None,
) -> Result:
    """Trains what ``make`` makes on ``batches``, from the beginning or from ``run``'s newest checkpoint.

    ``batches``: endless micro-batches of `train_step` with ``get_state`` and ``set_state``. ``measure``: an
    evaluation's figures, "bits_per_byte" among them. ``export``: writes the trained model and returns its bits per byte
    as stored. ``trained``: which parameters are trained, by default all. ``measure_first``: measure before the first
    step too. ``told``: a line for the log on what is learned from.
    """
    checkpoints = Checkpoints(run.checkpoints, options.keep_last, options.keep_best, _model_files(run), run.check)
    with phase(view, "making the model"):
        model = make()
    cfg, size = model.cfg, sum(v.size for v in named(model).values())
    state, step = begin(model, recipe, ctx, trained)
    moving = sum(v.size for v in named(state.params).values())
    del model
    progress, damaged = Progress(data_state=batches.get_state()), ()
    if from_first(checkpoints.steps, "looking for checkpoints"):
        # Not both at once: on an accelerator there may be room for one state only.
        wanted, state = like(state), None
        with phase(view, "reading the checkpoint"):
            found = checkpoints.restore(wanted, partial(_damage, batches))
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
        if told is not None:
            journal.say(told)
        journal.say(f"recipe {json.dumps(asdict(recipe))}")
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
            measure,
            recipe=recipe,
            options=options,
            checkpoints=checkpoints,
            journal=journal,
            throughput=Throughput(flops, None if peak is None else peak.flops * devices),
            progress=progress,
            ctx=ctx,
        )
        del state
        with StopSignals(Agreement() if jax.process_count() > 1 else None) as stop:
            if measure_first and not progress.step:
                trainer.evaluate()
            trainer.run(stop)
            return _end(run, trainer, stop, export)


def _end(run: RunFolder, trainer: Trainer, stop: StopSignals, export: Callable[[State], float]) -> Result:
    """Measures and exports, unless SIGTERM leaves no time for it."""
    progress, journal, asked = trainer.progress, trainer.journal, stop.settled()
    found, stored = progress.evaluation, None
    if asked is not None:
        kept = f"saved in {trainer.checkpoints.newest()}; train with --resume goes on from there"
        journal.event("interrupted", f"by {asked}, {kept}", progress)
    if asked != "SIGTERM" and progress.step:
        if found is None or found["step"] != progress.step:
            # Not among the run's own measurements: a run that is resumed has the same ones as one never stopped.
            with phase(journal.reporter, "measuring"):
                found = plain(trainer.measure(trainer.state, progress))
        run.check()
        with phase(journal.reporter, "exporting"):
            stored = export(trainer.state)
        size = sum(f.stat().st_size for f in run.export.iterdir())
        journal.say(f"exported {run.export}: {size / 1e6:.2f} MB, bits per byte as stored {stored:.4f}")
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
        checkpoint=None if stored is None else run.export,
    )
    record = asdict(result) | {"checkpoint": result.checkpoint and result.checkpoint.name}
    del record["minutes"]
    journal.record("result", step=progress.step, **record)
    return result


def _damage(batches: Batches, record: dict) -> str | None:
    """What is missing or of the wrong kind in a checkpoint's record that only a run knows; None where nothing is."""
    return progress_damage(record["extra"], record["step"]) or batches.damage(record["data_state"])


def _model_files(run: RunFolder) -> dict[str, Path]:
    words = {str(name): run.tokenizer / name for name in tokenizer_files(run.tokenizer)}
    return {run.config.name: run.config, **words}
