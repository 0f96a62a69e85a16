"""What a run measures on held-out text, and what it exports and measures again as stored."""

from collections.abc import Callable
from pathlib import Path

import numpy as np

from deepseek_jax.convert.load import load_pretrained
from deepseek_jax.core.context import Context
from deepseek_jax.data.batches import Batches
from deepseek_jax.data.held_out import HeldOut
from deepseek_jax.model.transformer import Transformer
from deepseek_jax.parallel.processes import is_first, wait_for_all
from deepseek_jax.runs.evaluate import evaluate, trigram_bits_per_byte
from deepseek_jax.runs.journal import Progress
from deepseek_jax.runs.options import Options
from deepseek_jax.runs.run_folder import RunFolder
from deepseek_jax.runs.trainer import Measure
from deepseek_jax.train.step import State

# Counting n-grams in plain memory would take longer than training beyond this.
TRIGRAM_TOKENS = 50_000_000


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
