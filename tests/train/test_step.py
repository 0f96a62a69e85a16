"""The training step: micro-batches equal the large batch, the guard, the average, metrics, precision, learning."""

from collections import Counter
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny import random_model, random_tokens, tiny_config

import deepseek_jax as dsj
from deepseek_jax.core.context import Context
from deepseek_jax.core.params import named, renamed
from deepseek_jax.core.partition import partition
from deepseek_jax.runs.guards import fault
from deepseek_jax.train import optim
from deepseek_jax.train import step as train_step_module
from deepseek_jax.train.begin import prepared
from deepseek_jax.train.norms import fault_names, first_fault, gradient_norms, parts
from deepseek_jax.train.objective import Knobs, NextToken
from deepseek_jax.train.recipe import Optimizer, Recipe
from deepseek_jax.train.schedule import Setting
from deepseek_jax.train.step import start, train_step

CFG = tiny_config(mtp_depth=2)
T, CLIP = 24, 0.5
WEIGHTS = dsj.LossWeights(mtp=0.3, balance=0.01, expert_balance=0.02, device_balance=0.03, communication_balance=0.04)
OBJECTIVE = NextToken(WEIGHTS, 2)
# Steps are the clipped gradient itself, with a state of its own.
PLAIN = optax.chain(optax.trace(0.5), optax.scale(-1.0))


def knobs(lr=1.0, bias_speed=0.01, mtp_weight=0.3, micro_batches=1):
    return Knobs.of(Setting(lr, bias_speed, mtp_weight, micro_batches, rows=0))


@pytest.fixture(scope="module")
def model():
    return random_model(CFG)


@pytest.fixture(scope="module")
def step():
    return jax.jit(partial(train_step, optimizer=PLAIN, objective=OBJECTIVE, ctx=Context(), clip=CLIP, ema_decay=0.9))


def rows(seed: int = 0) -> dict[str, np.ndarray]:
    """Six rows: of very different length, of several texts, with masked targets, and one of padding alone."""
    rng = np.random.default_rng(seed)
    tokens = np.asarray(random_tokens(CFG, 6, T, seed))
    segments = np.ones((6, T), np.int32)
    segments[0, 5:] = segments[3, 20:] = segments[4] = 0
    segments[1, 9:] = 2
    mask = (rng.random((6, T)) < 0.7).astype(np.int32)
    mask[2] = 1
    return {"tokens": tokens, "segments": segments, "loss_mask": mask}


def parted(batch, micro_batches: int):
    return {name: a.reshape(micro_batches, -1, T) for name, a in batch.items()}


def moved(state, model) -> dict[str, np.ndarray]:
    """How far every parameter went: minus the clipped gradient."""
    before = named(partition(model)[0])
    return {name: np.asarray(v) - np.asarray(before[name]) for name, v in named(state.params).items()}


def biases(rest) -> np.ndarray:
    routers = [rest.stacks[1].ffn.router, *(m.block.ffn.router for m in rest.mtp)]
    return np.concatenate([np.asarray(r.bias.get_value()).reshape(-1, 8) for r in routers])


def test_a_step_moves_biases_by_the_recipes_rule(model, monkeypatch):
    recipe = Recipe(bias_rule="proportional", bias_centred=True)
    optimizer, made = prepared(model, recipe, Context())
    state, rules = start(model, optimizer, average=True), []

    def recorded(rest, load, mtp_load, speed, moved, rule, centred):
        rules.append((rule, centred))
        return rest

    monkeypatch.setattr(train_step_module, "update_router_bias", recorded)
    batch = {name: a for name, a in parted(rows(), 1).items() if name != "loss_mask"}
    jax.eval_shape(made, state, batch, knobs())
    assert rules == [("proportional", True)]


@pytest.fixture(scope="module")
def large(model, step):
    """One step on all six rows at once."""
    return step(start(model, PLAIN, average=True), parted(rows(), 1), knobs())


@pytest.fixture(scope="module")
def accumulated(model, step):
    """The same in three micro-batches of two rows."""
    return step(start(model, PLAIN, average=True), parted(rows(), 3), knobs(micro_batches=3))


def assert_equal_steps(one, other, model):
    (state, metrics), (other_state, other_metrics) = one, other
    flat, other_flat = (dict(jax.tree_util.tree_leaves_with_path(m)) for m in (metrics, other_metrics))
    for path, value in flat.items():
        np.testing.assert_allclose(other_flat[path], value, rtol=2e-5, atol=1e-7, err_msg=str(path))
    theirs = moved(other_state, model)
    for name, value in moved(state, model).items():
        assert np.linalg.norm(value) > 0, name
        # Differences of parameters of size 1 are rounded to 1e-7 of it.
        limit = 1e-5 * np.linalg.norm(value) + 1e-7 * value.size**0.5
        assert np.linalg.norm(value - theirs[name]) <= limit, name
    np.testing.assert_array_equal(biases(other_state.rest), biases(state.rest))
    for name, value in state.ema.items():
        np.testing.assert_allclose(other_state.ema[name], value, rtol=1e-5, atol=2e-7)


def test_micro_batches_equal_the_large_batch(model, large, accumulated):
    assert_equal_steps(large, accumulated, model)


def test_unused_micro_batches_do_not_count(model, step):
    """Two of three micro-batches, the third being full of other text, against four rows and two of padding."""
    batch, other = rows(), rows(seed=1)
    padded = {name: a.copy() for name, a in batch.items()}
    padded["segments"][4:] = 0
    filled = {name: np.concatenate([a[:4], other[name][:2]]) for name, a in batch.items()}
    first = start(model, PLAIN, average=True)
    assert_equal_steps(
        step(first, parted(padded, 1), knobs()), step(first, parted(filled, 3), knobs(micro_batches=2)), model
    )


def test_the_loss_is_that_of_the_public_function(model, large):
    total, out = jax.jit(partial(dsj.loss, weights=WEIGHTS))(model, rows())
    _, metrics = large
    np.testing.assert_allclose(metrics["loss"], total, rtol=1e-6)
    assert int(metrics["tokens"]) == int(out.losses["tokens"])
    assert set(metrics["balance"]) == {"sequence", "expert", "device", "communication"}


def test_the_bias_moves_by_its_speed_from_the_whole_batchs_counts(model, accumulated):
    state, metrics = accumulated
    load = np.asarray(metrics["load"])
    assert load.sum(-1).tolist() == [CFG.moe.top_k * int((rows()["segments"] != 0).sum())] * CFG.n_moe_layers
    change = biases(state.rest) - biases(model)
    np.testing.assert_allclose(change[:2], 0.01 * np.sign(load.mean(-1, keepdims=True) - load), atol=1e-6)
    np.testing.assert_array_equal(metrics["bias"], biases(state.rest)[:2])
    np.testing.assert_array_equal(metrics["bias_min"], biases(state.rest)[:2].min(-1))
    share = load / load.sum(-1, keepdims=True)
    np.testing.assert_allclose(metrics["routing_entropy"], -(share * np.log(share)).sum(-1), rtol=1e-5)
    np.testing.assert_allclose(metrics["max_violation"], load.max(-1) / load.mean(-1) - 1, rtol=1e-5)
    assert int(metrics["dropped"]) == 0


def test_norms_are_those_of_the_gradient_before_the_clip(model, large):
    state, metrics = large
    norm = float(metrics["grad_norm"])
    assert norm > 2 * CLIP
    groups = Counter()
    for name, value in moved(state, model).items():
        square = np.square(value.astype(np.float64) * norm / CLIP)
        top, *below = name.split(".")
        if top == "stacks":
            for i, layer in enumerate(square):
                groups[f"layer.{i + int(below[0])}"] += layer.sum()
        else:
            groups[{"mtp": f"mtp.{(*below, '')[0]}", "embed": "embed"}.get(top, "head")] += square.sum()
    found = {name: float(v) for name, v in metrics["gradient_norms"].items()}
    assert found == {name: pytest.approx(v**0.5, rel=1e-4) for name, v in groups.items()}
    assert set(found) == {"embed", "layer.0", "layer.1", "layer.2", "head", "mtp.0", "mtp.1"}
    total = np.sqrt(sum(np.square(v).sum() for v in moved(state, model).values()))
    assert total == pytest.approx(CLIP, rel=1e-4)


def test_activation_norms_are_those_of_real_tokens(model, large):
    batch = rows()
    block = np.asarray(blocks(model, batch["tokens"], batch["segments"]), np.float64)
    real = batch["segments"] != 0
    expected = np.sqrt(np.square(block).mean(-1)[:, real].mean(-1))
    np.testing.assert_allclose(large[1]["activation_norm"], expected, rtol=1e-5)


@jax.jit
def blocks(model, tokens, segments):
    return model(tokens, segments=segments, capture=("block",), logits="none").captured["block"]


def test_the_average_follows_the_parameters(model, large):
    before, after = named(partition(model)[0]), named(large[0].params)
    for name, value in large[0].ema.items():
        assert value.dtype == jnp.float32
        np.testing.assert_allclose(value, 0.9 * before[name] + 0.1 * after[name], atol=1e-6)
    np.testing.assert_array_equal(large[0].averaged.embed.get_value(), large[0].ema["embed"])
    with pytest.raises(ValueError, match="keeps no average"):
        _ = start(model, PLAIN).averaged


BAD = {
    "loss inf": ({"mtp_weight": np.inf}, "the loss is inf"),
    "loss nan": ({"mtp_weight": np.nan}, "the loss is nan"),
    "gradient": ({"mtp_weight": 3e37}, "the gradient"),
    "update": ({"lr": np.inf}, "the update of embed is not finite"),
}


@pytest.mark.parametrize("bad", BAD)
def test_a_step_that_is_not_finite_changes_nothing_but_the_counts(step, large, bad):
    """In the third the loss is finite, in the last one the gradient too."""
    state, (turned, cause) = large[0], BAD[bad]
    if bad == "gradient":
        # Norms divide an embedding by its size, and so multiply its gradient.
        values = named(state.params)
        state = replace(state, params=renamed(state.params, values | {"embed": values["embed"] * 0.01}))
    once, metrics = step(state, parted(rows(), 1), knobs(**turned))
    assert np.isfinite(metrics["loss"]) == (not bad.startswith("loss"))
    assert np.isfinite(metrics["grad_norm"]) == (bad == "update")
    assert fault(jax.device_get(metrics), lambda: fault_names(state)).what.startswith(cause)
    twice, _ = step(once, parted(rows(), 1), knobs(**turned))
    assert (int(metrics["skipped"]), int(once.skipped), int(twice.skipped), int(twice.step)) == (1, 1, 2, 3)
    for part in ("params", "rest", "opt_state", "ema"):
        jax.tree.map(np.testing.assert_array_equal, getattr(twice, part), getattr(state, part))
    after, metrics = step(twice, parted(rows(), 1), knobs())
    assert (int(after.skipped), int(metrics["skipped"])) == (0, 0)
    assert not np.array_equal(after.params.embed.get_value(), state.params.embed.get_value())
    assert all(np.isfinite(v).all() for v in named(after.params).values())


def test_the_first_part_that_is_not_finite_is_named(model):
    """Of parameters and, in an optimizer's state, of what belongs to them: by layer where they are stacked."""
    every = named(partition(model)[0])
    values = {n: every[n] for n in ("stacks.0.attn.kv_a", "stacks.1.attn.kv_a", "norm.weight")}
    names = [name for found, _, _ in parts((values, [values]), model) for name in found]
    assert names[:4] == ["norm.weight", "layers.0.attn.kv_a", "layers.1.attn.kv_a", "layers.2.attn.kv_a"]
    assert int(first_fault((values, [values]), model)) == -1
    broken = {**values, "stacks.1.attn.kv_a": values["stacks.1.attn.kv_a"].at[1, 3, 0].set(np.nan)}
    assert names[first_fault((broken, [values]), model)] == "layers.2.attn.kv_a"
    assert first_fault((values, [broken]), model) == 4 + 3
    assert [n for found, _, _ in parts(values, model, {"stacks.1.attn.kv_a": (1,)}) for n in found][2:] == [
        "layers.2.attn.kv_a"
    ]


@pytest.mark.parametrize("size", [1e-30, 1e-22, 1.0, 1e25, 1e36])
def test_norms_are_exact_over_all_of_float32(model, size):
    gradients = {name: jnp.full(v.shape, size, jnp.float32) for name, v in named(partition(model)[0]).items()}
    norms = gradient_norms({n: g for n, g in gradients.items() if n in ("embed", "head", "norm.weight")}, model)
    expected = {"embed": size * (256 * 64) ** 0.5, "head": size * (256 * 64 + 64) ** 0.5}
    assert {name: float(v) for name, v in norms.items()} == {n: pytest.approx(v, rel=1e-5) for n, v in expected.items()}


def test_turning_knobs_compiles_nothing(step, large, accumulated):
    """One program for each number of micro-batches, whatever was asked of it in the tests before."""
    compiled = step._cache_size()
    step(large[0], parted(rows(), 3), knobs(lr=0.1, bias_speed=0.0, mtp_weight=0.1, micro_batches=1))
    step(large[0], parted(rows(), 1), knobs(lr=0.2))
    assert step._cache_size() == compiled


@pytest.mark.slow
def test_steps_learn_one_batch_by_heart():
    cfg = tiny_config()
    model = random_model(cfg)
    optimizer = optim.make(Optimizer(muon=True), partition(model)[0])
    step = jax.jit(partial(train_step, optimizer=optimizer, objective=NextToken(dsj.LossWeights(), 1), ctx=Context()))
    batch = {"tokens": random_tokens(cfg, 2, 32)[None]}
    state, metrics = step(start(model, optimizer), batch, knobs(1e-2, 0.001))
    before = float(metrics["main"])
    for _ in range(25):
        state, metrics = step(state, batch, knobs(1e-2, 0.001))
    assert float(metrics["main"]) < 0.2 * before
    assert float(metrics["mtp"]) < 0.5 * before
    assert all(bool(jnp.isfinite(v).all()) for v in named(state.params).values())


def equations(jaxpr, inside=()):
    """Every equation of a program with the loops and functions it stands in."""
    for equation in jaxpr.eqns:
        yield equation, inside
        for value in equation.params.values():
            for sub in value if isinstance(value, tuple | list) else (value,):
                sub = getattr(sub, "jaxpr", sub)
                if hasattr(sub, "eqns"):
                    yield from equations(sub, (*inside, equation.primitive.name))


def test_with_bfloat16_only_products_are_bfloat16():
    """Master weights, gradients, router, norms, reductions and loss are float32; AdamW's moments bfloat16."""
    # No other matrix than the router's has 12 columns.
    model = random_model(replace(CFG, moe=replace(CFG.moe, n_experts=12)))
    optimizer = optim.make(Optimizer(moments="bfloat16"), partition(model)[0])
    state = start(model, optimizer, average=True)
    run = partial(train_step, optimizer=optimizer, objective=OBJECTIVE, ctx=Context(dtype=jnp.bfloat16), ema_decay=0.9)
    program, (after, _) = jax.make_jaxpr(run, return_shape=True)(state, parted(rows(), 3), knobs(micro_batches=3))
    assert {v.dtype for v in named(after.params).values()} == {jnp.dtype("float32")}
    moments = [a.dtype for a in jax.tree.leaves(after.opt_state) if jnp.issubdtype(a.dtype, jnp.floating)]
    assert set(moments) == {jnp.dtype("bfloat16")}
    assert {a.dtype for a in after.ema.values()} == {jnp.dtype("float32")}

    found = list(equations(program.jaxpr))
    products = Counter()
    for equation, _ in found:
        kinds = {str(v.aval.dtype) for v in equation.invars if hasattr(v.aval, "dtype")}
        name = equation.primitive.name
        if name == "dot_general":
            out = equation.outvars[0].aval
            products["+".join(sorted(kinds))] += 1
            assert out.dtype == jnp.float32, equation
            experts = [v.aval.shape for v in equation.invars] + [out.shape]
            if any(shape in ((64, 12), (12, 64)) for shape in experts):
                assert kinds == {"float32"}, f"the router multiplies in {kinds}"
                products["router"] += 1
        # What sums over tokens, or feeds a loss, a norm or a choice of experts.
        sums_tokens = name == "reduce_sum" and set(equation.params["axes"]) & {0, 1}
        if sums_tokens or name in ("exp", "log", "log1p", "rsqrt", "reduce_max", "cumsum", "top_k", "scatter-add"):
            assert "bfloat16" not in kinds, equation
    assert products["bfloat16"] > 20
    assert products["router"] >= 6
    (loop,) = [e for e, inside in found if e.primitive.name == "while" and not inside]
    carried = {str(v.aval.dtype) for v in loop.outvars if jnp.issubdtype(v.aval.dtype, jnp.floating)}
    assert carried == {"float32"}
