"""What a run begins with: a recipe's optimizer and compiled step, a fresh model, the state before the first step."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import jax
from jax.sharding import NamedSharding, PartitionSpec

from deepseek_jax.configs.schema import ModelConfig
from deepseek_jax.core.context import Context
from deepseek_jax.core.params import has_adapters, map_variables
from deepseek_jax.core.partition import Trained, partition
from deepseek_jax.model.transformer import Transformer, init
from deepseek_jax.parallel.placement import settle
from deepseek_jax.train import optim
from deepseek_jax.train.objective import Knobs, NextToken, Objective
from deepseek_jax.train.recipe import Recipe
from deepseek_jax.train.step import State, start, train_step


def prepared(
    model: Transformer,
    recipe: Recipe,
    ctx: Context,
    trained: Trained | None = None,
    objective: Objective | None = None,
):
    """The optimizer of a recipe for a model, and `train_step` with all but state, batch and knobs given.

    ``objective``: by default `NextToken` with the recipe's weights. Of a model that is trained in part those router
    biases move that ``trained`` chooses, beside adapters none.
    """
    optimizer = optim.make(recipe.optimizer, partition(model, trained)[0])

    def nothing(path: str) -> bool:
        return False

    biases = nothing if trained is None and has_adapters(model) else trained
    return optimizer, partial(
        train_step,
        optimizer=optimizer,
        objective=objective or NextToken(recipe.weights, model.cfg.mtp_depth),
        ctx=ctx,
        clip=recipe.optimizer.clip,
        ema_decay=recipe.ema_decay,
        biases=biases,
        bias_rule=recipe.bias_rule,
        bias_centred=recipe.bias_centred,
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
    model: Transformer,
    recipe: Recipe,
    ctx: Context,
    trained: Trained | None = None,
    objective: Objective | None = None,
) -> tuple[State, Callable[[State, dict, Knobs], tuple[State, dict]]]:
    """The state before the first step, and the `compiled` step.

    ``trained``: which parameters are trained (`core.partition.partition`); by default all. ``objective``: as `prepared`
    takes it.
    """
    optimizer, step = prepared(model, recipe, ctx, trained, objective)
    state = settle(start(model, optimizer, recipe.ema_decay > 0, trained), ctx)
    return state, compiled(step, state, ctx)


def like(tree):
    """Shapes, dtypes and, where they are bound to devices, shardings of a tree of arrays, without the arrays."""

    def shape(a: jax.Array) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding if a.committed else None)

    return jax.tree.map(shape, tree)
