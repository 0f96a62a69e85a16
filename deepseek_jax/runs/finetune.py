"""Fine-tuning a published model: on chats or text, all of it, a part, or adapters beside it."""

import hashlib
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path

from deepseek_jax.configs.schema import ModelConfig
from deepseek_jax.convert.config_file import read_config
from deepseek_jax.core.context import DEFAULT, Context
from deepseek_jax.data.chat_rows import ChatConfig, ChatData, load_chats
from deepseek_jax.data.config import DataConfig
from deepseek_jax.data.pipeline import Data, load_data
from deepseek_jax.parallel.processes import first_then_all, from_first, is_first
from deepseek_jax.runs.metrics import Reporter, Reporters
from deepseek_jax.runs.options import Options
from deepseek_jax.runs.prepare import check_fit, open_run
from deepseek_jax.runs.reading import Reading
from deepseek_jax.runs.run import Result, Work, carry_out
from deepseek_jax.runs.tuned import Tuned, adapters, fingerprint, keep_tokenizer
from deepseek_jax.text.tokenizer import load_tokenizer
from deepseek_jax.train.recipe import Recipe
from deepseek_jax.train.tuning import LoRA, of_epochs


def fine_tune(
    source: Path,
    recipe: Recipe,
    data: Path | DataConfig,
    folder: Path,
    *,
    cfg: ModelConfig | None = None,
    epochs: float | None = None,
    chats: ChatConfig | None = None,
    patterns: Sequence[str] = (),
    lora: LoRA | None = None,
    options: Options | None = None,
    resume: bool = False,
    view: Reporter | None = None,
    planned: Callable[[Recipe], None] = lambda recipe: None,
    ctx: Context = DEFAULT,
    began: float | None = None,
    command: str | None = None,
    arguments: list[str] | None = None,
) -> Result:
    """Trains a checkpoint further and exports it into ``folder`` in the dtypes of ``source``, FP8 included, or in that
    of ``options``.

    ``data``: a file of chats, of which the assistant's tokens are learned (``chats``: what becomes of them), or text.
    ``cfg``: another config than the checkpoint's, for which the weights that fit are kept (`convert.other_config`).
    ``epochs``: the recipe is scaled to so many passes over the chats (`train.tuning.of_epochs`); None: it is taken as
    it is. ``patterns``: what is trained (`train.patterns.select`), all by default; everything else stays as it is
    stored, bit for bit. ``lora``: adapters are trained instead, on a model that stays as it is stored. ``planned``: is
    told the recipe as it will be run. The other arguments, and what Ctrl-C and SIGTERM do, are those of
    `runs.pretrain.train`. On a mesh the whole model is trained: ``patterns`` and ``lora`` are refused there.

    Raises ValueError, FileExistsError or FileNotFoundError for settings that do not fit each other, the checkpoint or
    the folder; nothing is written then.
    """
    options, source = options or Options(), Path(source)
    chats, began = chats or ChatConfig(), time.monotonic() if began is None else began
    cfg = cfg or read_config(source)
    check_fit(cfg, recipe, options, ctx)
    if epochs is not None and isinstance(data, DataConfig):
        raise ValueError("epochs count passes over chats; the length of a run on text is given in tokens.")
    tuned = Tuned(source, cfg, recipe, options, ctx, tuple(patterns), adapters(lora))
    words = load_tokenizer(source)
    words.check_fits(cfg.vocab_size)
    view = Reporters([view] if view is not None and is_first() else [])
    if isinstance(data, DataConfig):
        data = replace(data, fim_rate=recipe.fim_rate, sample_masks=recipe.sample_masks)
    settings = {
        "from": str(source),
        "weights": fingerprint(source),
        "recipe": asdict(recipe),
        "epochs": epochs,
        "train": list(patterns),
        "lora": None if tuned.lora is None else asdict(tuned.lora),
        "model": None if cfg == read_config(source) else asdict(cfg),
        "data": _data_settings(data, chats),
    }
    with open_run(folder, settings, resume, command, arguments) as run:
        from_first(lambda: keep_tokenizer(source, run), "copying the tokenizer")
        if isinstance(data, DataConfig):
            loaded: Data | ChatData = first_then_all(
                lambda: load_data(data, words, run.tokens, view.say), "tokenising the text"
            )
        else:
            loaded = load_chats(data, words, recipe.length, chats, view.say)
            if epochs is not None:
                rows = loaded.rows_an_epoch(recipe.length, recipe.order_seed)
                # An extended run keeps the schedule that it was begun with.
                begun = of_epochs(recipe, run.begun("epochs", epochs), rows)
                recipe = replace(begun, tokens=of_epochs(recipe, epochs, rows).tokens)
        planned(recipe)
        tuned = replace(tuned, recipe=recipe)
        reading = Reading(loaded, tuned.write, tuned.load, trained=tuned.trained)
        told = loaded.line() if isinstance(loaded, ChatData) else None
        work = Work(cfg, recipe, reading, tuned.make, told=told)
        return carry_out(run, work, options=options, view=view, ctx=ctx, began=began)


def _data_settings(data: Path | DataConfig, chats: ChatConfig) -> dict:
    if isinstance(data, DataConfig):
        return {k: v for k, v in asdict(data).items() if k not in ("workers", "token_folder")}
    if not Path(data).is_file():
        raise FileNotFoundError(f"No file of chats at {data}.")
    settings = {k: v for k, v in asdict(chats).items() if k != "workers"}
    return {"chats": str(data), "sha256": hashlib.sha256(Path(data).read_bytes()).hexdigest(), **settings}
