"""Rollouts as a training step takes them: groups, log-probabilities that agree, what is kept."""

from dataclasses import replace

import jax
import numpy as np
import optax
import pytest
from tiny import random_model, tiny_config

from deepseek_jax.core.context import DEFAULT
from deepseek_jax.core.params import named
from deepseek_jax.rl.advantage import advantages
from deepseek_jax.rl.objective import loss
from deepseek_jax.rl.policy import Policy, logprobs
from deepseek_jax.rl.rollout import batch, rollout
from deepseek_jax.rl.variants import MATH, V32
from deepseek_jax.train.objective import Knobs
from deepseek_jax.train.schedule import Setting
from deepseek_jax.train.step import start, train_step

CFG = tiny_config(n_layers=2, mtp_depth=0, vocab_size=16)
step = jax.jit(train_step, static_argnames=("optimizer", "objective", "ctx", "clip"))
PLAIN = optax.scale(-1.0)


def knobs(lr, micro_batches=1, bias_speed=0.0):
    return Knobs.of(Setting(lr, bias_speed, 0.0, micro_batches, rows=0))


@pytest.fixture(scope="module")
def rolled():
    """Of V3.2's form, at a temperature and with a filter, with stop ids that come often."""
    model, form = random_model(CFG), replace(V32, beta=0.1)
    prompts = [[3, 4, 5], [7], [1, 2]]
    found = rollout(model, prompts, 4, form, 6, seed=3, temperature=0.7, top_p=0.8, stop_ids=(9, 11))
    reward = np.array([len(a) for a in found.answers], float)
    reward[5] = np.nan
    return model, form, found, batch(found, advantages(reward, found.group, "none"), form, 10)


def test_groups_are_of_their_prompts_and_answers_differ(rolled):
    _, _, found, rows = rolled
    assert found.group.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert [p[0] for p in found.prompts] == [3] * 4 + [7] * 4 + [1] * 4
    assert all(len({tuple(found.answers[i]) for i in range(g, g + 4)}) > 1 for g in (0, 4, 8))
    assert {"stop", "length"} == set(found.info.finish_reason)
    for i, (prompt, answer) in enumerate(zip(found.prompts, found.answers, strict=True)):
        n = len(prompt) + len(answer)
        assert rows["tokens"][i, :n].tolist() == prompt + answer
        assert rows["segments"][i].tolist() == [1] * n + [0] * (10 - n)
        counted = [0] * len(prompt) + [float(i != 5)] * len(answer) + [0] * (10 - n)
        assert rows["answer"][i].tolist() == counted


def test_the_trainers_logprobs_are_the_rollouts(rolled):
    """At the temperature, over the kept sets, of the same tokens; without the sets they are others."""
    model, _, _, rows = rolled
    counted = rows["answer"] > 0
    found = np.asarray(logprobs(model, rows, 0.7))
    np.testing.assert_allclose(found[counted], rows["old"][counted], atol=5e-5)
    without = np.asarray(logprobs(model, {n: a for n, a in rows.items() if n != "kept"}, 0.7))
    assert (without[counted] <= found[counted] + 1e-5).all()
    assert np.abs(without - rows["old"])[counted].max() > 0.01


def test_a_step_on_policy_has_ratios_of_1_and_replays_experts(rolled):
    """In three parts, as the whole; router weights learn through replayed experts, router biases do not move."""
    model, form, _, rows = rolled
    rows = {**rows, "reference": np.asarray(logprobs(random_model(CFG, seed=1), rows, 0.7))}
    shaped = {name: a.reshape(3, -1, *a.shape[1:]) for name, a in rows.items()}
    before = start(model, PLAIN)
    state, metrics = step(
        before,
        shaped,
        knobs(1.0, 3, bias_speed=0.01),
        optimizer=PLAIN,
        objective=Policy(form, 0.7),
        ctx=DEFAULT,
        clip=1e9,
    )
    assert float(metrics["ratio"]) == pytest.approx(1, abs=1e-5)
    assert float(metrics["mismatch"]) < 1e-6
    assert float(metrics["kl"]) > 0
    mine = np.asarray(logprobs(model, rows, 0.7))
    whole, seen = loss(form, mine, rows["old"], rows["advantage"][:, 0], rows["answer"], rows["reference"])
    np.testing.assert_allclose(metrics["loss"], whole, rtol=2e-5)
    np.testing.assert_allclose(metrics["kl"], seen["kl"], rtol=2e-5)
    after, values = named(state.params), named(before.params)
    moved = {name: np.abs(np.asarray(after[name]) - np.asarray(values[name])).max() for name in after}
    assert min(value for name, value in moved.items() if "router" in name) > 1e-6
    assert "load" not in metrics
    jax.tree.map(np.testing.assert_array_equal, state.rest, before.rest)


def test_recorded_routing_covers_every_position_that_is_scored(rolled):
    """The prompt's too: what is predicted at a position depends on the experts of all before it."""
    _, _, found, rows = rolled
    for i, (prompt, answer) in enumerate(zip(found.prompts, found.answers, strict=True)):
        n = len(prompt) + len(answer)
        assert (rows["routing"][i, : n - 1] >= 0).all()
        assert (rows["routing"][i, n - 1 :] == -1).all()


def test_padding_on_either_side_and_packing_change_no_logprob(rolled):
    """One batch: an answer with padding behind it, before it, on both sides, and behind another in its row. A pad's
    token may be any."""
    model, _, found, rows = rolled
    whole = {i: found.prompts[i] + found.answers[i] for i in (0, 4, 8)}
    expected = np.asarray(logprobs(model, {n: rows[n] for n in ("tokens", "segments")}))
    tokens, segments, places = np.full((4, 20), 13, np.int32), np.zeros((4, 20), np.int32), []
    for row, held in enumerate(([(0, 0)], [(0, 20 - len(whole[0]))], [(4, 5)], [(8, 0), (0, len(whole[8]))])):
        for segment, (i, first) in enumerate(held, 1):
            place = slice(first, first + len(whole[i]))
            tokens[row, place], segments[row, place] = whole[i], segment
            places.append((row, i, first))
    got = np.asarray(logprobs(model, {"tokens": tokens, "segments": segments}))
    for row, i, first in places:
        n = len(whole[i])
        np.testing.assert_allclose(got[row, first + 1 : first + n], expected[i, 1:n], atol=5e-5)


def test_what_is_missing_is_named(rolled):
    model, form, found, rows = rolled
    shaped = {name: a[None] for name, a in rows.items()}
    with pytest.raises(ValueError, match="needs reference"):
        train_step(start(model, PLAIN), shaped, knobs(1.0), optimizer=PLAIN, objective=Policy(form), ctx=DEFAULT)
    with pytest.raises(ValueError, match="more than length=5"):
        batch(found, advantages(np.zeros(12), found.group), form, 5)
    with pytest.raises(ValueError, match="greedy answers"):
        rollout(model, [[1]], 2, MATH, 3, seed=0, temperature=0.0)
