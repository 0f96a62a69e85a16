"""Steps, measurements and checkpoints in their order: what a run does between its beginning and its end."""

import time
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec

from deepseek_jax.configs.schema import ModelConfig
from deepseek_jax.core.context import DEFAULT, Context
from deepseek_jax.core.params import Trained, has_adapters, map_variables, named, partition
from deepseek_jax.model.arguments import check_ids
from deepseek_jax.model.transformer import Transformer, init
from deepseek_jax.parallel.placement import place_batch, settle
from deepseek_jax.train import optim
from deepseek_jax.train.checkpoint import Checkpoints
from deepseek_jax.train.feed import Fed, Feed
from deepseek_jax.train.guards import Skips, Spikes, TrainingStopped, fault
from deepseek_jax.train.journal import Journal, Progress, phase
from deepseek_jax.train.metrics import number, plain
from deepseek_jax.train.norms import fault_names
from deepseek_jax.train.options import Options
from deepseek_jax.train.recipe import Recipe
from deepseek_jax.train.signals import StopSignals
from deepseek_jax.train.step import Knobs, State, start, train_step
from deepseek_jax.train.throughput import Throughput

Measure = Callable[[State, Progress], dict[str, Any]]


def prepared(model: Transformer, recipe: Recipe, ctx: Context, trained: Trained | None = None):
    """The optimizer of a recipe for a model, and `train_step` with all but state, batch and knobs given.

    Of a model that is trained in part those router biases move that ``trained`` chooses, beside adapters none.
    """
    optimizer = optim.make(recipe.optimizer, named(partition(model, trained)[0]))

    def nothing(path: str) -> bool:
        return False

    biases = nothing if trained is None and has_adapters(model) else trained
    return optimizer, partial(
        train_step,
        optimizer=optimizer,
        weights=recipe.weights,
        ctx=ctx,
        clip=recipe.optimizer.clip,
        ema_decay=recipe.ema_decay,
        biases=biases,
    )


def compiled(step: Callable, state: State, ctx: Context) -> Callable[[State, dict, Knobs], tuple[State, dict]]:
    """The step under jit; the state that it is given, like ``state`` an array or a shape a leaf, is used up.

    On a mesh the state stays where it lies, and every device has the whole metrics.
    """
    if ctx.mesh is None:
        return jax.jit(step, donate_argnums=0)
    places = jax.tree.map(lambda a: a.sharding, state), NamedSharding(ctx.mesh, PartitionSpec())
    return jax.jit(step, donate_argnums=0, out_shardings=places)


def fresh(cfg: ModelConfig, recipe: Recipe, ctx: Context) -> Transformer:
    """A model to train from its beginning: matrices from N(0, init_std**2), the embedding from N(0, embed_std**2)."""
    model = init(replace(cfg, init_std=recipe.init_std), jax.random.key(recipe.seed), ctx=ctx)
    if recipe.embed_std is None:
        return model
    factor = recipe.embed_std / recipe.init_std
    return map_variables(lambda path, v: v.replace(v.get_value() * factor) if path == ("embed",) else v, model)


def begin(
    model: Transformer, recipe: Recipe, ctx: Context, trained: Trained | None = None
) -> tuple[State, Callable[[State, dict, Knobs], tuple[State, dict]]]:
    """The state before the first step, and the `compiled` step.

    ``trained``: which parameters are trained (`core.params.partition`); by default all.
    """
    optimizer, step = prepared(model, recipe, ctx, trained)
    state = settle(start(model, optimizer, recipe.ema_decay > 0, trained), ctx)
    return state, compiled(step, state, ctx)


def like(tree):
    """Shapes, dtypes and, where they are bound to devices, shardings of a tree of arrays, without the arrays."""

    def shape(a: jax.Array) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding if a.committed else None)

    return jax.tree.map(shape, tree)


class Trainer:
    """Takes the steps of a recipe from wherever ``progress`` stands.

    ``batches``: an iterator over micro-batches with ``get_state``, that stands there too, of this process's rows.
    ``measure``: the figures of an evaluation, "bits_per_byte" among them. ``ctx``: where batches go.
    A step's figures are fetched while the next one runs; only a step that is logged is waited for.
    """

    def __init__(
        self,
        state: State,
        step: Callable,
        batches,
        measure: Measure,
        *,
        recipe: Recipe,
        options: Options,
        checkpoints: Checkpoints,
        journal: Journal,
        throughput: Throughput,
        progress: Progress,
        ctx: Context = DEFAULT,
    ):
        self.state, self.step, self.batches, self.measure = state, step, batches, measure
        self.recipe, self.options, self.checkpoints, self.journal = recipe, options, checkpoints, journal
        self.throughput, self.progress, self.ctx = throughput, progress, ctx
        self.spikes = Spikes(progress.recent_losses)
        self.skips = Skips(recipe.max_skipped, progress.skipped_in_a_row, progress.skipped)
        self.saved = progress.step if progress.step else None
        self._unseen: tuple[int, dict] | None = None

    def run(self, stop: StopSignals) -> None:
        """Until the tokens are used up or ``stop`` is asked for; then the last state is saved.

        Raises TrainingStopped after too many skipped steps in a row, OSError when a checkpoint cannot be written.
        """
        recipe, progress, save_every = self.recipe, self.progress, self.options.save_every
        self._passes = self._begun_passes()
        with Feed(self.batches, recipe, progress.step, progress.tokens) as feed:
            compiled = False
            while stop.agreed() is None and (fed := next(feed, None)) is not None:
                metrics = self._take(fed, compiled)
                stop.hold()
                compiled, last = True, progress.tokens >= recipe.tokens
                if progress.step % recipe.log_every == 0 or progress.step == 1 or last:
                    self._log(fed, metrics)
                evaluated = progress.step % recipe.evaluate_every == 0 or last
                if evaluated:
                    self.evaluate()
                if evaluated if save_every is None else last or progress.step % save_every == 0:
                    self.save()
        self._look()
        if self.saved != progress.step:
            self.save()
        self.checkpoints.wait()

    def evaluate(self) -> None:
        self._look()
        progress = self.progress
        if not progress.step:
            self.journal.say("measuring the held-out text before the first step")
        with phase(self.journal.reporter, "measuring"):
            found = plain(self.measure(self.state, progress))
        progress.evaluation = {"step": progress.step, "tokens": progress.tokens, **found}
        self.journal.record("evaluation", **progress.evaluation)
        trigram = found.get("trigram_bits_per_byte")
        if trigram is not None and progress.crossed_at is None and number(found["bits_per_byte"]) < number(trigram):
            progress.crossed_at = self.journal.minutes()
            self.journal.say(f"the model is better than the trigram after {progress.crossed_at:.1f} minutes")
        self.throughput.restart()

    def save(self) -> None:
        self._look()
        progress = self.progress
        progress.minutes, progress.recent_losses = self.journal.minutes(), list(self.spikes.recent)
        progress.skipped_in_a_row, progress.skipped = self.skips.in_a_row, self.skips.total
        found, metric = progress.evaluation, None
        if found is not None and found["step"] == progress.step:
            metric = number(found["ema_bits_per_byte" if self.options.export == "ema" else "bits_per_byte"])
        self.checkpoints.save(progress.step, self.state, progress.data_state, asdict(progress), metric)
        self.saved = progress.step
        where = f"{self.checkpoints.folder.name}/{progress.step}"
        self.journal.event("saved", f"{where}, written in the background", progress)
        self.throughput.restart()

    def _take(self, fed: Fed, compiled: bool) -> dict:
        progress, began = self.progress, time.monotonic()
        # Here they are known; in the compiled step an id without an embedding could only make the loss NaN.
        size = self.state.rest.cfg.vocab_size
        check_ids(f"tokens of step {progress.step + 1}", fed.batch["tokens"], fed.batch.get("segments"), size)
        if compiled:
            self.state, metrics = self.step(self.state, place_batch(fed.batch, self.ctx), Knobs.of(fed.setting))
        else:
            self.journal.say("compiling the step")
            with phase(self.journal.reporter, "compiling"):
                self.state, metrics = self.step(self.state, place_batch(fed.batch, self.ctx), Knobs.of(fed.setting))
                jax.block_until_ready(metrics["loss"])
        tokens = fed.setting.rows * self.recipe.length
        progress.step, progress.tokens, progress.data_state = (
            progress.step + 1,
            progress.tokens + tokens,
            fed.data_state,
        )
        self._look()
        self._unseen = (progress.step, {name: metrics[name] for name in ("loss", "grad_norm", "skipped", "fault")})
        if compiled:
            self.throughput.step(tokens, fed.waited)
        else:
            self.journal.event("compiled", f"the first step took {time.monotonic() - began:.1f} s", progress)
            self.throughput.restart()
        return metrics

    def _look(self) -> None:
        """Looks at the step before the one under way, or, where there is none, at the last one."""
        if self._unseen is None:
            return
        (step, found), self._unseen = self._unseen, None
        found = jax.device_get(found)
        at = Progress(step=step, tokens=self.progress.tokens)
        if message := self.spikes.see(float(found["loss"])):
            self.journal.event("spike", message, at)
        too_many = self.skips.see(bool(found["skipped"]))
        if not self.skips.in_a_row:
            return
        cause = fault(found, lambda: fault_names(self.state))
        self.journal.event("skipped", f"{cause.what}; {self.skips.in_a_row} of {self.skips.most} in a row", at)
        if too_many:
            self.checkpoints.wait()
            good = self.checkpoints.newest()
            raise TrainingStopped(
                f"{self.skips.in_a_row} steps in a row changed nothing; in the last of them, step {step}, "
                f"{cause.what}. The last good checkpoint is {good or 'none'} (train --from continues from one): "
                f"{cause.advice}."
            )

    def _begun_passes(self) -> dict[str, int]:
        """How often each source had been passed whole when the last batch was drawn."""
        rows = (self.progress.data_state or {"rows": 0})["rows"]
        return {label: int(passes) for label, passes in self.batches.passes(rows).items()}

    def _log(self, fed: Fed, metrics: dict) -> None:
        self._look()
        before, self._passes = self._passes, self._begun_passes()
        for label, passes in self._passes.items():
            if passes > before[label]:
                self.journal.event("pass", f"{label} has been passed {passes} times; its text repeats", self.progress)
        metrics = jax.device_get(metrics)
        now, progress = fed.setting, self.progress
        metrics["targets"] = metrics.pop("tokens")
        # The event of a skipped step has it in words.
        del metrics["fault"]
        self.journal.record(
            "step",
            step=progress.step,
            tokens=progress.tokens,
            **metrics,
            lr=now.lr,
            bias_speed=now.bias_speed,
            mtp_weight=now.mtp_weight,
            batch_rows=now.rows,
            **self.throughput.measure(),
        )
