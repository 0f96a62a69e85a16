"""An objective that is not this package's trains by the same step, accumulation, guard and trainer."""

from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny import random_model, random_tokens, tiny_config

import deepseek_jax as dsj
from deepseek_jax.core.context import Context
from deepseek_jax.core.params import named
from deepseek_jax.train.loss import ENTRIES
from deepseek_jax.train.objective import CAPTURE, Knobs, NextToken, loads, squares
from deepseek_jax.train.schedule import Setting
from deepseek_jax.train.step import start, train_step

CFG = tiny_config(n_layers=2, mtp_depth=0)
T, KEPT = 16, 4
# Steps are the gradient itself, with a state of its own.
PLAIN = optax.chain(optax.trace(0.5), optax.scale(-1.0))


@dataclass(frozen=True)
class Distillation:
    """Cross-entropy with a teacher's likeliest tokens, to the power of ``1 / temperature``, weighted by token."""

    temperature: float

    entries = ENTRIES | {"teacher", "share", "weight"}

    def counts(self, batch):
        real = batch["segments"] != 0
        return jnp.where(real, batch["weight"], 0).sum(), real.sum().astype(jnp.float32)

    def __call__(self, model, part, counts, knobs, ctx):
        out = model(part["tokens"], segments=part["segments"], capture=CAPTURE, ctx=ctx)
        log_p_BTV = jax.nn.log_softmax(out.logits / self.temperature)
        nats_BT = -(part["share"] * jnp.take_along_axis(log_p_BTV, part["teacher"], axis=-1)).sum(-1)
        total = jnp.where(part["segments"] != 0, part["weight"] * nats_BT, 0).sum() / counts[0]
        return total, {"distillation": total, "activation_norm": squares(out, part) / counts[1], **loads(out)}


step = jax.jit(train_step, static_argnames=("optimizer", "objective", "ctx", "clip"))


def knobs(micro_batches: int, lr: float = 1.0) -> Knobs:
    return Knobs.of(Setting(lr, 0.01, 0.0, micro_batches, rows=0))


def take(state, rows, micro_batches: int, lr: float = 1.0):
    batch = {name: a.reshape(micro_batches, -1, *a.shape[1:]) for name, a in rows.items()}
    # Made anew each time: equal objectives are one program.
    made = Distillation(temperature=2.0)
    return step(state, batch, knobs(micro_batches, lr), optimizer=PLAIN, objective=made, ctx=Context(), clip=1e9)


@pytest.fixture(scope="module")
def model():
    return random_model(CFG)


@pytest.fixture(scope="module")
def rows() -> dict[str, np.ndarray]:
    """Six rows whose tokens weigh unequally, one of padding alone, and a teacher's shares."""
    rng = np.random.default_rng(0)
    segments = np.ones((6, T), np.int32)
    segments[1, 5:] = segments[4] = 0
    return {
        "tokens": np.asarray(random_tokens(CFG, 6, T)),
        "segments": segments,
        "teacher": rng.integers(0, CFG.vocab_size, (6, T, KEPT)).astype(np.int32),
        "share": rng.dirichlet(np.ones(KEPT), (6, T)).astype(np.float32),
        "weight": rng.random((6, T)).astype(np.float32),
    }


@pytest.fixture(scope="module")
def large(model, rows):
    return take(start(model, PLAIN), rows, 1)


def test_parts_equal_the_large_batch(model, rows, large):
    (state, metrics), (other, theirs) = large, take(start(model, PLAIN), rows, 3)
    for name in ("loss", "distillation", "grad_norm", "activation_norm"):
        np.testing.assert_allclose(theirs[name], metrics[name], rtol=1e-5)
    np.testing.assert_array_equal(theirs["load"], metrics["load"])
    np.testing.assert_array_equal(theirs["bias"], metrics["bias"])
    before, ours = named(start(model, PLAIN).params), named(state.params)
    for name, value in named(other.params).items():
        change = np.asarray(ours[name]) - np.asarray(before[name])
        assert np.linalg.norm(value - ours[name]) <= 1e-5 * np.linalg.norm(change), name


def test_the_loss_and_the_state_are_its_own(model, rows, large):
    _, metrics = large
    out = jax.jit(lambda m: m(rows["tokens"], segments=rows["segments"]))(model)
    log_p = np.asarray(jax.nn.log_softmax(out.logits / 2.0), np.float64)
    nats = -(rows["share"] * np.take_along_axis(log_p, rows["teacher"], -1)).sum(-1)
    real = rows["segments"] != 0
    assert float(metrics["loss"]) == pytest.approx(np.average(nats[real], weights=rows["weight"][real]), rel=1e-5)
    assert np.abs(np.asarray(metrics["bias"]) - np.asarray(model.stacks[1].ffn.router.bias.get_value())).max() > 0.009
    assert {"load", "max_violation", "gradient_norms", "activation_norm", "fault"} <= set(metrics)
    assert not {"main", "mtp", "tokens"} & set(metrics)


def test_it_learns_and_a_step_that_is_not_finite_changes_nothing(rows, large):
    compiled, (state, first) = step._cache_size(), large
    for _ in range(8):
        state, metrics = take(state, rows, 1, lr=0.3)
    assert float(metrics["loss"]) < float(first["loss"]) - 0.3
    bad = {**rows, "weight": np.where(np.arange(T) == 3, np.nan, rows["weight"]).astype(np.float32)}
    after, metrics = take(state, bad, 1)
    assert (int(metrics["skipped"]), bool(metrics["fault"]["loss"]), int(after.step)) == (1, True, int(state.step) + 1)
    jax.tree.map(np.testing.assert_array_equal, (after.params, after.rest), (state.params, state.rest))
    assert step._cache_size() == compiled


def test_entries_are_those_of_the_objective(model, rows):
    state = start(model, PLAIN)
    with pytest.raises(ValueError, match=r"may have .*'share'.*'teacher', 'weight'\], not .*'labels'"):
        take(state, {**rows, "labels": rows["tokens"]}, 1)
    with pytest.raises(ValueError, match=r"share have shape \(1, 6, 4\), its tokens \(1, 6, 16\)"):
        take(state, {**rows, "share": rows["share"][:, 0]}, 1)
    ours = NextToken(dsj.LossWeights(), 0)
    assert ours == NextToken(dsj.LossWeights(), 0)
    assert hash(ours) != hash(replace(ours, mtp_depth=1))
    batch = {name: a[None] for name, a in rows.items()}
    with pytest.raises(ValueError, match="'teacher'"):
        train_step(state, batch, knobs(1), optimizer=PLAIN, objective=ours, ctx=Context())
    batch = {"tokens": batch["tokens"]}
    with pytest.raises(ValueError, match="targets of 1 MTP modules, but tiny has 0"):
        train_step(state, batch, knobs(1), optimizer=PLAIN, objective=replace(ours, mtp_depth=1), ctx=Context())
