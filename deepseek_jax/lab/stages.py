"""Training in stages: what a setup's model is before its first step, and its steps.

The weights that a first setup comes to are kept beside the corpus, whatever goes on with them: a machine makes them
once.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from deepseek_jax.convert.other_config import with_config
from deepseek_jax.core.context import Context
from deepseek_jax.core.params import named, renamed
from deepseek_jax.core.partition import Trained
from deepseek_jax.lab.corpus import Corpus
from deepseek_jax.lab.records import spec
from deepseek_jax.lab.study import Setup
from deepseek_jax.model.transformer import Transformer
from deepseek_jax.runs.feed import Fed, Feed
from deepseek_jax.runs.guards import Skips
from deepseek_jax.train.begin import begin, fresh
from deepseek_jax.train.objective import Knobs
from deepseek_jax.train.patterns import select
from deepseek_jax.train.step import State


class Stepped(NamedTuple):
    """What a step took, the state after it, which the next one uses up, and its metrics."""

    fed: Fed
    state: State
    metrics: dict


class Diverged(ValueError):
    """Training came to nothing; ``step``: of the setup in which it did."""

    def __init__(self, setup: Setup, step: int):
        super().__init__(
            f"what trains {setup.model.name} first diverged at its step {step}: no setup can go on with it."
        )
        self.step = step


def context(setup: Setup) -> Context:
    """How a setup is trained."""
    return Context(dtype=jnp.dtype(setup.recipe.dtype), fp8=setup.fp8)


def parameters(setup: Setup, model: Transformer) -> Trained | None:
    """Which parameters of ``model`` a setup trains; None: all."""
    return select(model, setup.trained) if setup.trained else None


def stepping(setup: Setup, corpus: Corpus, waiting: Callable[[], None]) -> Iterator[Stepped]:
    """A seeded setup's run, step by step. ``waiting``: is called at times while what comes before is made.

    Raises Diverged as `beginning`, before the first step.
    """
    recipe, ctx = setup.recipe, context(setup)
    model = beginning(setup, corpus, waiting)
    state, step = begin(model, recipe, ctx, parameters(setup, model))
    batches = corpus.data.of(setup.reads).batches(length=recipe.length, rows=recipe.pass_rows, seed=recipe.order_seed)
    with closing(batches), Feed(batches, recipe, 0, 0) as feed:
        for fed in feed:
            state, metrics = step(state, fed.batch, Knobs.of(fed.setting))
            yield Stepped(fed, state, metrics)


def beginning(setup: Setup, corpus: Corpus, waiting: Callable[[], None] = lambda: None) -> Transformer:
    """The model before the first step of a seeded setup.

    Raises Diverged where the setup before it did.
    """
    recipe, before = setup.recipe, setup.first
    if before is None:
        return fresh(setup.model, recipe, context(setup))
    path = corpus.folder / "models" / f"{spec(before, recipe.seed)}-{corpus.hash}.npz"
    model = fresh(before.model, before.recipe, context(before))
    if path.exists():
        with np.load(path) as kept:
            model = renamed(model, {name: jnp.asarray(kept[name]) for name in kept.files})
    else:
        model = _trained(before, corpus, waiting)
        _keep(path, model)
    return with_config(model, setup.model, jax.random.key(recipe.seed))


def _trained(setup: Setup, corpus: Corpus, waiting: Callable[[], None]) -> Transformer:
    skips = Skips(setup.recipe.max_skipped)
    for number, stepped in enumerate(stepping(setup, corpus, waiting), 1):
        if skips.see(bool(stepped.metrics["skipped"])):
            raise Diverged(setup, number)
        waiting()
    return stepped.state.model


def _keep(path: Path, model: Transformer) -> None:
    """Whole or not at all, and of several processes that made the same, any one's."""
    path.parent.mkdir(exist_ok=True)
    part = path.with_name(f".{path.stem}-{os.getpid()}.npz")
    try:
        np.savez(part, **{name: np.asarray(value) for name, value in named(model).items()})
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
