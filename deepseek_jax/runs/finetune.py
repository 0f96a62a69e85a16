"""Fine-tuning a published model: on chats or text, all of it, a part, or adapters beside it."""

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import jax
import jax.numpy as jnp

from deepseek_jax.configs.schema import ModelConfig
from deepseek_jax.convert.adapter import load_adapter, merge, save_adapter
from deepseek_jax.convert.config_file import read_config
from deepseek_jax.convert.load import load_pretrained
from deepseek_jax.core.context import DEFAULT, Context
from deepseek_jax.core.lowrank import dense
from deepseek_jax.core.params import map_variables
from deepseek_jax.core.partition import Trained
from deepseek_jax.data.chat_rows import ChatConfig, ChatData, load_chats
from deepseek_jax.data.config import DataConfig
from deepseek_jax.data.pipeline import Data, load_data
from deepseek_jax.model.transformer import Transformer, abstract
from deepseek_jax.parallel.processes import first_then_all, from_first, is_first
from deepseek_jax.runs.export import export_model
from deepseek_jax.runs.metrics import Reporter, Reporters
from deepseek_jax.runs.options import Options
from deepseek_jax.runs.prepare import check_fit, open_run
from deepseek_jax.runs.run import Result, Work, carry_out
from deepseek_jax.runs.run_folder import RunFolder
from deepseek_jax.text.files import copy_tokenizer
from deepseek_jax.text.tokenizer import load_tokenizer
from deepseek_jax.train.lora import adapt, check_targets
from deepseek_jax.train.patterns import select
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
    lora = lora if lora is not None and lora.rank else None
    own = read_config(source)
    cfg = cfg or own
    check_fit(cfg, recipe, options, ctx)
    _check(recipe, data, epochs, patterns, lora, ctx)
    trained = select(abstract(cfg), patterns) if patterns else None
    if lora is not None:
        check_targets(abstract(cfg), lora)
    if lora is not None and not lora.merge and cfg != own:
        raise ValueError(
            "adapters alone fit the checkpoint as it is stored, not another config: merge them, or leave the config."
        )
    words = load_tokenizer(source)
    words.check_fits(cfg.vocab_size)
    view = Reporters([view] if view is not None and is_first() else [])
    if isinstance(data, DataConfig):
        data = replace(data, fim_rate=recipe.fim_rate, sample_masks=recipe.sample_masks)
    settings = {
        "from": str(source),
        "weights": _fingerprint(source),
        "recipe": asdict(recipe),
        "epochs": epochs,
        "train": list(patterns),
        "lora": None if lora is None else asdict(lora),
        "model": None if cfg == own else asdict(cfg),
        "data": _data_settings(data, chats),
    }
    with open_run(folder, settings, resume, command, arguments) as run:
        from_first(lambda: _keep_tokenizer(source, run), "copying the tokenizer")
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
        ctx = replace(ctx, dtype=jnp.dtype(recipe.dtype))

        def make() -> Transformer:
            key = jax.random.key(recipe.seed)
            if lora is not None:
                return adapt(load_pretrained(source, dtype=None, cfg=cfg, key=key), lora, recipe.seed)
            if trained is not None:
                return thawed(load_pretrained(source, dtype=None, cfg=cfg, key=key), trained)
            return load_pretrained(source, dtype=jnp.float32, ctx=ctx, cfg=cfg, key=key)

        def write(model: Transformer, folder: Path) -> None:
            if lora is not None and not lora.merge:
                save_adapter(model, folder, base=source)
            else:
                export_model(merge(model) if lora is not None else model, folder, options, source, recipe.dtype)

        def adapted(folder: Path) -> Transformer:
            return load_adapter(load_pretrained(source, dtype=None), folder)

        work = Work(
            cfg,
            recipe,
            loaded,
            make,
            write,
            load=None if lora is None or lora.merge else adapted,
            trained=trained,
            told=loaded.line() if isinstance(loaded, ChatData) else None,
        )
        return carry_out(run, work, options=options, view=view, ctx=ctx, began=began)


def thawed(model: Transformer, trained: Trained) -> Transformer:
    """``model`` with every leaf that ``trained`` chooses, in whole or in part, as float32, quantised ones included."""

    def thaw(path, variable):
        if not trained(".".join(map(str, path))):
            return variable
        return variable.replace(dense(variable, jnp.float32))

    return map_variables(thaw, model)


def _keep_tokenizer(source: Path, run: RunFolder) -> None:
    run.tokenizer.mkdir(exist_ok=True)
    copy_tokenizer(source, run.tokenizer)


def _check(recipe: Recipe, data, epochs, patterns, lora, ctx: Context) -> None:
    if ctx.mesh is not None and (patterns or lora is not None):
        raise ValueError(
            "a part of a model and adapters are trained on one device: leave the mesh out, or train all of the model."
        )
    if patterns and lora is not None:
        raise ValueError(
            "patterns of trained parameters and LoRA exclude each other: its targets say what gets adapters."
        )
    for pattern in patterns:
        if pattern.endswith("router.bias") and not recipe.bias_speed:
            raise ValueError(f"{pattern!r} asks for router biases to move, but the recipe's bias_speed is 0: give one.")
    if epochs is not None and isinstance(data, DataConfig):
        raise ValueError("epochs count passes over chats; the length of a run on text is given in tokens.")


def _data_settings(data: Path | DataConfig, chats: ChatConfig) -> dict:
    if isinstance(data, DataConfig):
        return {k: v for k, v in asdict(data).items() if k not in ("workers", "token_folder")}
    if not Path(data).is_file():
        raise FileNotFoundError(f"No file of chats at {data}.")
    settings = {k: v for k, v in asdict(chats).items() if k != "workers"}
    return {"chats": str(data), "sha256": hashlib.sha256(Path(data).read_bytes()).hexdigest(), **settings}


def _fingerprint(source: Path) -> str:
    """Tells two states of a checkpoint's folder apart by names, sizes and times: hashing terabytes would take hours."""
    files = sorted(p for p in source.rglob("*") if p.is_file())
    listed = [(str(p.relative_to(source)), p.stat().st_size, p.stat().st_mtime_ns) for p in files]
    return hashlib.sha256(json.dumps(listed).encode()).hexdigest()
