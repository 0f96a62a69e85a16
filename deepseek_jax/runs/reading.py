"""Runs on text and on chats: what is measured on what is held out, what is exported and measured again as stored."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from deepseek_jax.convert.load import load_pretrained
from deepseek_jax.core.context import Context
from deepseek_jax.core.partition import Trained
from deepseek_jax.data.batches import Batches
from deepseek_jax.data.chat_rows import ChatData
from deepseek_jax.data.held_out import HeldOut
from deepseek_jax.data.pipeline import Data
from deepseek_jax.model.transformer import Transformer
from deepseek_jax.parallel.placement import place_batch, row_share
from deepseek_jax.parallel.processes import is_first, wait_for_all
from deepseek_jax.runs.course import Course, Measure, Step
from deepseek_jax.runs.evaluate import evaluate, trigram_bits_per_byte
from deepseek_jax.runs.journal import Progress
from deepseek_jax.runs.options import Options
from deepseek_jax.runs.run_folder import RunFolder
from deepseek_jax.train.begin import begin
from deepseek_jax.train.objective import Objective
from deepseek_jax.train.recipe import Recipe
from deepseek_jax.train.step import State

# Counting n-grams in plain memory would take longer than training beyond this.
TRIGRAM_TOKENS = 50_000_000


@dataclass(frozen=True)
class Reading:
    """A `course.Source` of text or chats.

    ``write``: exports a model into a folder, ``load`` reads that again, by default as a published one. ``anew``: the
    model has seen no text before, and a trigram counted on what it sees is measured beside it. ``trained``: which
    parameters are trained, by default all. ``objective``: what is made small, by default next-token prediction with the
    recipe's weights.
    """

    data: Data | ChatData
    write: Callable[[Transformer, Path], None]
    load: Callable[[Path], Transformer] | None = None
    anew: bool = False
    trained: Trained | None = None
    objective: Objective | None = None

    def open(self, run: RunFolder, recipe: Recipe, options: Options, ctx: Context) -> Course:
        rows = {"length": recipe.length, "rows": recipe.pass_rows, "seed": recipe.order_seed}
        batches, held_out = self.data.batches(**rows, shard=row_share(ctx)), self.data.held_out(recipe.length)
        run.describe(data=self.data.record(), held_out_tokens=len(held_out.stream_n))
        return Course(
            batches,
            measurer(held_out, ctx, partial(self.data.batches, **rows) if self.anew else None),
            "bits_per_byte",
            exporter(run, options, held_out, ctx, self.write, self.load),
            partial(self._begin, recipe, replace(ctx, dtype=jnp.dtype(recipe.dtype))),
        )

    def _begin(self, recipe: Recipe, ctx: Context, model: Transformer) -> tuple[State, Step]:
        state, step = begin(model, recipe, ctx, self.trained, self.objective)
        return state, lambda state, batch, knobs: step(state, place_batch(batch, ctx), knobs)


def measurer(held_out: HeldOut, ctx: Context, seen: Callable[[], Batches] | None = None) -> Measure:
    """Held-out figures of the model, and of the average where one is kept.

    ``seen``: fresh batches of the text that the model has been trained on from its beginning, of which a trigram is
    counted as far as training has come; of several processes the first alone counts. None: no trigram, for one
    counted on what a checkpoint is trained on *further* says nothing of a model that has seen other text before.
    """

    def measure(state: State, progress: Progress) -> dict:
        figures = evaluate(state.model, held_out, ctx).record()
        if state.ema is not None:
            figures["ema_bits_per_byte"] = evaluate(state.averaged, held_out, ctx).bits_per_byte
        if seen is not None and progress.tokens <= TRIGRAM_TOKENS and is_first():
            batches = seen()
            batches.set_state(progress.data_state)
            rows, size = batches.rows_seen(), state.model.cfg.vocab_size
            figures["trigram_bits_per_byte"] = trigram_bits_per_byte(rows, held_out, size)
        return figures

    return measure


def exporter(
    run: RunFolder,
    options: Options,
    held_out: HeldOut,
    ctx: Context,
    write: Callable[[Transformer, Path], None],
    load: Callable[[Path], Transformer] | None = None,
) -> Callable[[State], float]:
    """Writes the weights, or their average, by ``write`` into the run's export; returns the bits per byte of what
    ``load``, by default `load_pretrained` as float32, reads there."""

    def export(state: State) -> float:
        with run.exporting() as folder:
            write(state.averaged if options.export == "ema" else state.model, folder)
        wait_for_all("exporting")
        stored = load_pretrained(run.export, dtype=np.float32, ctx=ctx) if load is None else load(run.export)
        return evaluate(stored, held_out, ctx).bits_per_byte

    return export
