"""Steps, measurements and checkpoints in their order: what a run does between its beginning and its end."""

import time
from dataclasses import asdict

import jax

from deepseek_jax.model.arguments import check_ids
from deepseek_jax.runs.checkpoint import Checkpoints
from deepseek_jax.runs.course import Measure, Step
from deepseek_jax.runs.feed import Fed, Feed
from deepseek_jax.runs.guards import Skips, Spikes, TrainingStopped, fault
from deepseek_jax.runs.journal import Journal, Progress, phase
from deepseek_jax.runs.metrics import number, plain
from deepseek_jax.runs.options import Options
from deepseek_jax.runs.signals import StopSignals
from deepseek_jax.runs.throughput import Throughput
from deepseek_jax.train.norms import fault_names
from deepseek_jax.train.objective import Knobs
from deepseek_jax.train.recipe import Recipe
from deepseek_jax.train.step import State


class Trainer:
    """Takes the steps of a recipe from wherever ``progress`` stands.

    ``batches``, ``measure``, ``figure``: as a `course.Course` has them; the batches stand there too.
    A step's figures are fetched while the next one runs; only a step that is logged is waited for.
    """

    def __init__(
        self,
        state: State,
        step: Step,
        batches,
        measure: Measure,
        figure: str,
        *,
        recipe: Recipe,
        options: Options,
        checkpoints: Checkpoints,
        journal: Journal,
        throughput: Throughput,
        progress: Progress,
    ):
        self.state, self.step, self.batches, self.measure, self.figure = state, step, batches, measure, figure
        self.recipe, self.options, self.checkpoints, self.journal = recipe, options, checkpoints, journal
        self.throughput, self.progress = throughput, progress
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
            self.journal.say("measuring what is held out, before the first step")
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
            metric = number(found[f"ema_{self.figure}" if self.options.export == "ema" else self.figure])
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
            self.state, metrics = self.step(self.state, fed.batch, Knobs.of(fed.setting))
        else:
            self.journal.say("compiling the step")
            with phase(self.journal.reporter, "compiling"):
                self.state, metrics = self.step(self.state, fed.batch, Knobs.of(fed.setting))
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
                f"{cause.what}. The last good checkpoint is {good or 'none'} (--from continues from one): "
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
        if "tokens" in metrics:
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
