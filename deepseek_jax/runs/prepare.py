"""What a run needs before its first step: settings that fit each other, its folder, its tokenizer."""

import hashlib
import platform
import shutil
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path

import jax

from deepseek_jax.analysis.provenance import provenance
from deepseek_jax.configs.schema import ModelConfig
from deepseek_jax.core.context import DEFAULT, Context
from deepseek_jax.data.config import DataConfig
from deepseek_jax.data.pipeline import training_texts
from deepseek_jax.parallel.placement import row_groups
from deepseek_jax.parallel.processes import from_first
from deepseek_jax.parallel.sequence import balanced_order, sequence_parts
from deepseek_jax.runs.options import Options
from deepseek_jax.runs.run_folder import RunFolder
from deepseek_jax.text.bpe import save_tokenizer, train_tokenizer
from deepseek_jax.text.files import FAST, RANKS, copy_tokenizer
from deepseek_jax.text.tokenizer import Tokenizer, load_tokenizer
from deepseek_jax.train.balance_loss import check_devices
from deepseek_jax.train.recipe import Recipe
from deepseek_jax.version import __version__


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
    if sequence_parts(ctx) > 1:
        balanced_order(recipe.length, sequence_parts(ctx))


@contextmanager
def open_run(
    folder: Path, settings: Mapping, resume: bool, command: str | None, arguments: list[str] | None
) -> Iterator[RunFolder]:
    """`RunFolder.opened` on the first process; the others get the same folder, in which they write nothing.

    ``command``, ``arguments``: what started the run, for run.json.
    """
    about = origin() | {"command": command, "arguments": arguments}
    with ExitStack() as stack:
        held = []

        def enter() -> dict:
            held.append(stack.enter_context(RunFolder.opened(folder, settings, about, resume)))
            return {"about": held[0].about, "fresh": held[0].fresh}

        told = from_first(enter, f"opening {folder}")
        yield held[0] if held else RunFolder(folder, told["about"], told["fresh"], writes=False)


def make_tokenizer(run: RunFolder, tokenizer: Path | int, text: DataConfig, max_length: int) -> Tokenizer:
    """The run's tokenizer, in its folder: there already, or copied, or trained on the text."""
    from_first(lambda: tokenizer_folder(run.tokenizer, tokenizer, text, max_length), "making the tokenizer")
    return load_tokenizer(run.tokenizer)


def tokenizer_folder(folder: Path, tokenizer: Path | int, text: DataConfig, max_length: int) -> None:
    """``folder`` with a tokenizer in it, whole or not at all: there already, or copied, or trained on the text."""
    if not folder.exists():
        part = folder.with_name(f".{folder.name}.part")
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir()
        if isinstance(tokenizer, int):
            trained = train_tokenizer(training_texts(text), tokenizer)
            save_tokenizer(trained, part, version=__version__, max_length=max_length)
        else:
            copy_tokenizer(tokenizer, part)
        part.replace(folder)


def origin() -> dict:
    """The package, the commit, the date and the machine, with its name on the network."""
    return {**provenance(), "host": platform.node()}


def file_hash(tokenizer: Path) -> str:
    """The sha256 of the file that decides a tokenizer folder's ids."""
    file = next((file for name in (FAST, RANKS) if (file := tokenizer / name).is_file()), tokenizer / FAST)
    return hashlib.sha256(file.read_bytes()).hexdigest()
