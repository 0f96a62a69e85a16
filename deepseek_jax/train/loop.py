"""A training run from its settings to the exported model: `train`, and `fit`, which takes any model and batches."""

import hashlib
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from deepseek_jax.analysis.peaks import peak_of, training_flops
from deepseek_jax.configs.hf import config_to_json
from deepseek_jax.configs.schema import ModelConfig
from deepseek_jax.convert.load import load_pretrained
from deepseek_jax.convert.save import save_pretrained
from deepseek_jax.core.axes import shardings
from deepseek_jax.core.context import DEFAULT, Context
from deepseek_jax.core.layout import balanced_order
from deepseek_jax.core.params import Trained, named
from deepseek_jax.data.config import DataConfig
from deepseek_jax.data.held_out import HeldOut
from deepseek_jax.data.pipeline import Batches, Data, load_data, training_texts
from deepseek_jax.model.transformer import Transformer, abstract
from deepseek_jax.parallel.placement import row_groups, row_share
from deepseek_jax.parallel.processes import Agreement, first_then_all, from_first, is_first, wait_for_all
from deepseek_jax.text.bpe import save_tokenizer, train_tokenizer
from deepseek_jax.text.files import FAST, RANKS, copy_tokenizer, tokenizer_files
from deepseek_jax.text.tokenizer import Tokenizer, load_tokenizer
from deepseek_jax.train.balance_loss import check_devices
from deepseek_jax.train.checkpoint import Checkpoints
from deepseek_jax.train.evaluate import evaluate, trigram_bits_per_byte
from deepseek_jax.train.metrics import JsonLines, Reporter, Reporters, TensorBoard, TextLog, number, plain
from deepseek_jax.train.options import Options
from deepseek_jax.train.recipe import Recipe
from deepseek_jax.train.run_folder import RunFolder
from deepseek_jax.train.signals import StopSignals
from deepseek_jax.train.step import State
from deepseek_jax.train.throughput import Throughput
from deepseek_jax.train.trainer import Journal, Measure, Progress, Trainer, begin, fresh, like
from deepseek_jax.version import __version__

# Counting n-grams in plain memory would take longer than training beyond this.
TRIGRAM_TOKENS = 50_000_000


@dataclass(frozen=True)
class Result:
    """How a run ended.

    ``interrupted``: None, or the signal that ended it early. ``model_bits``, ``trigram_bits``, ``ema_bits``: held-out
    bits per byte at the end of the weights, of a trigram counted on the tokens trained on, and of the weights' moving
    average. ``crossed_at``: minutes into the run of the first measurement at which the model was better than the
    trigram; None if it never was. ``stored_bits``: of the exported FP8 weights.
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
    """Pre-trains ``cfg`` and exports it, with FP8 blocks, into ``folder``; `train.run_folder` says what lies there.

    ``text``: the recipe's FIM rate and sample masks take the place of its own. ``tokenizer``: a folder with a
    tokenizer.json, or the vocabulary size of one to be trained on the text; the model's vocabulary becomes the
    tokenizer's. ``source``: a checkpoint to continue from, with rows for all of ``tokenizer``'s ids, or more; of a
    ``cfg`` that is not its own the weights that fit are kept (`convert.other_config`). ``resume``: go on with the run
    in ``folder``, from its newest whole checkpoint, bit for bit as if it had never stopped (on a GPU with
    ``--xla_gpu_deterministic_ops=true`` in XLA_FLAGS). ``view``: sees what is reported. ``began``: `time.monotonic()`
    at which the run counts as begun. ``command``, ``arguments``: what started the run, for run.json.

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
        "tokenizer": tokenizer if isinstance(tokenizer, int) else _hash(tokenizer),
        "from": None if source is None else str(source),
    }
    about = {"jax": jax.__version__, "command": command, "arguments": arguments}
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

        with closing(batches):
            return fit(
                run,
                make,
                recipe,
                batches,
                measurer(data, held_out, recipe, cfg, ctx),
                exporter(run, options, held_out, ctx),
                options=options,
                view=view,
                ctx=replace(ctx, dtype=jnp.dtype(recipe.dtype)),
                began=began,
            )


@contextmanager
def open_run(folder: Path, settings: Mapping, about: Mapping, resume: bool) -> Iterator[RunFolder]:
    """`RunFolder.opened` on the first process; the others get the same folder, in which they write nothing."""
    with ExitStack() as stack:
        held = []

        def enter() -> dict:
            held.append(stack.enter_context(RunFolder.opened(folder, settings, about, resume)))
            return {"about": held[0].about, "fresh": held[0].fresh}

        told = from_first(enter, f"opening {folder}")
        yield held[0] if held else RunFolder(folder, told["about"], told["fresh"], writes=False)


def check_fit(cfg: ModelConfig, recipe: Recipe, options: Options, ctx: Context = DEFAULT) -> None:
    """Raises ValueError for a recipe that does not fit the model, the options or the mesh."""
    if recipe.length > cfg.max_length:
        raise ValueError(f"rows of {recipe.length} tokens exceed the model's max_length of {cfg.max_length}.")
    if options.export == "ema" and not recipe.ema_decay:
        raise ValueError("there is no average to export: the recipe's ema_decay is 0.")
    if recipe.embed_std is not None and cfg.tie_embeddings:
        raise ValueError(
            f"embed_std={recipe.embed_std} would set the head's size as well, for {cfg.name} ties it to the embedding: "
            "leave it out."
        )
    check_devices(cfg.moe, recipe.weights)
    if ctx.mesh is None:
        if jax.process_count() > 1:
            raise ValueError(f"{jax.process_count()} processes need a mesh of all their devices, such as fsdp=-1.")
        return
    groups = row_groups(ctx)
    if recipe.pass_rows % groups:
        raise ValueError(
            f"micro-batches of {recipe.pass_rows} rows do not divide over the {groups} devices of the mesh's data x "
            "fsdp x expert axes: choose a batch, and micro_rows where they are given, that are multiples of it, or "
            "smaller axes."
        )
    if ctx.sequence_parts > 1:
        balanced_order(recipe.length, ctx.sequence_parts)


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
) -> Result:
    """Trains what ``make`` makes on ``batches``, from the beginning or from ``run``'s newest checkpoint.

    ``batches``: endless micro-batches of `train_step` with ``get_state`` and ``set_state``. ``measure``: an
    evaluation's figures, "bits_per_byte" among them. ``export``: writes the trained model and returns its bits per byte
    as stored. ``trained``: which parameters are trained, by default all.
    """
    checkpoints = Checkpoints(run.checkpoints, options.keep_last, options.keep_best, _model_files(run))
    model = make()
    cfg, size = model.cfg, sum(v.size for v in named(model).values())
    state, step = begin(model, recipe, ctx, trained)
    moving = sum(v.size for v in named(state.params).values())
    del model
    progress, damaged = Progress(data_state=batches.get_state()), ()
    if from_first(checkpoints.steps, "looking for checkpoints"):
        # Not both at once: on an accelerator there may be room for one state only.
        wanted, state = like(state), None
        found = checkpoints.restore(wanted)
        state, damaged, progress = found.state, found.damaged, Progress(**found.extra)
        batches.set_state(found.data_state)
        began -= 60 * progress.minutes
    resumed = not run.fresh
    if resumed:
        run.truncate_metrics(progress.step)
    files = [JsonLines(run.metrics), TextLog(run.log, began)] if run.writes else []
    if options.tensorboard and run.writes:
        files.append(TensorBoard(run.path / "tensorboard"))
    with closing(checkpoints), Reporters([*files, view]) as reporters:
        journal = Journal(reporters, began)
        if not resumed:
            journal.record("run", deepseek_jax=__version__, jax=jax.__version__)
        journal.say(
            f"deepseek_jax {__version__}, jax {jax.__version__}, {cfg.name}: {size:,} parameters, {moving:,} trained"
        )
        for message in damaged:
            journal.event("damaged", message, progress)
        if resumed:
            journal.event("resumed", f"from {checkpoints.newest() or 'the beginning'}", progress)
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
            found = plain(trainer.measure(trainer.state, progress))
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


def measurer(data: Data, held_out: HeldOut, recipe: Recipe, cfg: ModelConfig, ctx: Context) -> Measure:
    """Held-out figures of the model and of a trigram counted on the same tokens, and of the average where one is
    kept. Of several processes the first alone counts the trigram."""

    def measure(state: State, progress: Progress) -> dict:
        figures = asdict(evaluate(state.model, held_out, ctx))
        if state.ema is not None:
            figures["ema_bits_per_byte"] = evaluate(state.averaged, held_out, ctx).bits_per_byte
        if progress.tokens <= TRIGRAM_TOKENS and is_first():
            seen = data.batches(length=recipe.length, rows=recipe.pass_rows, seed=recipe.seed)
            seen.set_state(progress.data_state)
            figures["trigram_bits_per_byte"] = trigram_bits_per_byte(seen.rows_seen(), held_out, cfg.vocab_size)
        return figures

    return measure


def exporter(run: RunFolder, options: Options, held_out: HeldOut, ctx: Context) -> Callable[[State], float]:
    """Writes the published layout in FP8 with the tokenizer; returns the bits per byte of what was written."""

    def export(state: State) -> float:
        with run.exporting() as folder:
            save_pretrained(state.averaged if options.export == "ema" else state.model, folder, quantize="fp8")
            if run.writes:
                copy_tokenizer(run.tokenizer, folder)
        wait_for_all("exporting")
        return evaluate(load_pretrained(run.export, dtype=np.float32, ctx=ctx), held_out, ctx).bits_per_byte

    return export


def make_tokenizer(run: RunFolder, tokenizer: Path | int, text: DataConfig, max_length: int) -> Tokenizer:
    """The run's tokenizer, in its folder: there already, or copied, or trained on the text."""
    from_first(lambda: _make_tokenizer(run, tokenizer, text, max_length), "making the tokenizer")
    return load_tokenizer(run.tokenizer)


def _make_tokenizer(run: RunFolder, tokenizer: Path | int, text: DataConfig, max_length: int) -> None:
    if not run.tokenizer.exists():
        part = run.tokenizer.with_name(".tokenizer.part")
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir()
        if isinstance(tokenizer, int):
            trained = train_tokenizer(training_texts(text), tokenizer)
            save_tokenizer(trained, part, version=__version__, max_length=max_length)
        else:
            copy_tokenizer(tokenizer, part)
        part.replace(run.tokenizer)


def _model_files(run: RunFolder) -> dict[str, Path]:
    words = {str(name): run.tokenizer / name for name in tokenizer_files(run.tokenizer)}
    return {run.config.name: run.config, **words}


def _hash(tokenizer: Path) -> str:
    file = next((file for name in (FAST, RANKS) if (file := tokenizer / name).is_file()), tokenizer / FAST)
    return hashlib.sha256(file.read_bytes()).hexdigest()
