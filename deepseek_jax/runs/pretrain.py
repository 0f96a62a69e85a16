"""Pre-training: from a config, a recipe and text to the exported model."""

import time
from dataclasses import asdict, replace
from pathlib import Path

import jax
import jax.numpy as jnp

from deepseek_jax.configs.hf import config_to_json
from deepseek_jax.configs.schema import ModelConfig
from deepseek_jax.convert.load import load_pretrained
from deepseek_jax.core.context import DEFAULT, Context
from deepseek_jax.data.config import DataConfig
from deepseek_jax.data.pipeline import load_data
from deepseek_jax.model.transformer import Transformer, abstract
from deepseek_jax.parallel.processes import first_then_all, is_first
from deepseek_jax.parallel.shardings import shardings
from deepseek_jax.runs.export import export_model
from deepseek_jax.runs.metrics import Reporter, Reporters
from deepseek_jax.runs.options import Options
from deepseek_jax.runs.prepare import check_fit, file_hash, make_tokenizer, open_run
from deepseek_jax.runs.reading import Reading
from deepseek_jax.runs.run import Result, Work, carry_out
from deepseek_jax.text.files import copy_tokenizer
from deepseek_jax.train.begin import fresh
from deepseek_jax.train.recipe import Recipe


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
    with open_run(folder, settings, resume, command, arguments) as run:
        words = make_tokenizer(run, tokenizer, text, cfg.max_length)
        if source is None:
            cfg = replace(cfg, vocab_size=words.vocab_size)
        words.check_fits(cfg.vocab_size)
        config_to_json(cfg)  # refuses, before the work, what could not be saved
        if ctx.mesh is not None:
            shardings(abstract(cfg), ctx)
        data = first_then_all(lambda: load_data(text, words, run.tokens, view.say), "tokenising the text")

        def make() -> Transformer:
            if source is not None:
                key = jax.random.key(recipe.seed)
                return load_pretrained(source, dtype=jnp.float32, ctx=ctx, cfg=cfg, key=key)
            return fresh(cfg, recipe, ctx)

        def write(model: Transformer, folder: Path) -> None:
            export_model(model, folder, options, source, recipe.dtype)
            if run.writes:
                copy_tokenizer(run.tokenizer, folder)

        anew = source is None
        work = Work(cfg, recipe, Reading(data, write, anew=anew), make, anew)
        return carry_out(run, work, options=options, view=view, ctx=ctx, began=began)
