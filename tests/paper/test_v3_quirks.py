"""Details that ports of V3 got wrong; the table of the note points to a test for each."""

import re
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import random_model, random_tokens, tiny_config, tokens_of

import deepseek_jax as dsj
from deepseek_jax.core.params import RouterBias, map_variables, unstack
from deepseek_jax.core.rope import softmax_scale, yarn_mscale
from deepseek_jax.train.balance import update_router_bias

ROOT = Path(__file__).parents[2]
NOTE = (ROOT / "paper_notes" / "v3_quirks.md").read_text()
TESTS = re.findall(r"`(tests/[\w/]+\.py)`: `(\w+)`", NOTE)


@pytest.mark.parametrize(("file", "name"), TESTS)
def test_the_notes_tests_exist(file, name):
    assert f"def {name}(" in (ROOT / file).read_text()


def test_every_row_of_the_note_names_a_test():
    rows = [line for line in NOTE.splitlines() if line.startswith("| ") and not line.startswith("| detail")]
    assert len(rows) >= 17
    assert [row for row in rows if "`: `test_" not in row] == []


def test_softmax_scale_counts_both_halves_of_a_key():
    rope = replace(dsj.zoo("deepseek-v3").attention.rope, yarn=None)
    assert softmax_scale(128 + 64, rope) == pytest.approx(192**-0.5)


def test_mscale_acts_at_any_length():
    """Of four tokens, far from the original 64: mscale squared is a factor of every score, and of nothing else."""
    cfg, tokens = tiny_config(mtp_depth=0), random_tokens(tiny_config(), 1, 4)
    forward = jax.jit(lambda model, tokens: model(tokens).logits)

    def model(mscale):
        """Both mscales alike: cos and sin carry no factor, and frequencies do not depend on them."""
        rope = cfg.attention.rope
        yarn = replace(rope.yarn, mscale=mscale, mscale_all_dim=mscale)
        return random_model(replace(cfg, attention=replace(cfg.attention, rope=replace(rope, yarn=yarn))))

    factor = (yarn_mscale(4.0, 2.0) / yarn_mscale(4.0, 1.0)) ** 2

    def louder(path, variable):
        return variable.replace(variable.get_value() * factor) if path[-1] == "q_b" else variable

    one, two = forward(model(1.0), tokens), forward(model(2.0), tokens)
    assert np.abs(np.asarray(one) - np.asarray(two)).max() > 1e-2
    np.testing.assert_allclose(forward(map_variables(louder, model(1.0)), tokens), two, atol=2e-5)


def test_the_routed_factor_acts_without_normalisation_too():
    cfg = tiny_config()
    moe = replace(cfg.moe, normalize=False)
    router = unstack(random_model(replace(cfg, moe=moe)).stacks[1], 0).ffn.router
    x = jnp.asarray(np.random.default_rng(0).normal(size=(1, 5, cfg.dim)), jnp.float32)
    routing = jax.jit(lambda router, x: router(x, tokens_of(jnp.ones((1, 5))), dsj.Context()))(router, x)
    chosen = np.take_along_axis(np.asarray(routing.score_BTE), np.asarray(routing.index_BTK), -1)
    np.testing.assert_allclose(routing.weight_BTK, chosen * cfg.moe.scale, rtol=1e-6)


def test_a_step_of_the_bias_is_visible_at_five():
    model = random_model(tiny_config(), bias_offset=5.0, dtype=jnp.bfloat16)
    biases = [
        v for v in jax.tree.leaves(model, is_leaf=lambda v: isinstance(v, RouterBias)) if isinstance(v, RouterBias)
    ]
    assert {v.get_value().dtype for v in biases} == {np.dtype(np.float32)}
    _, rest = dsj.partition(model)
    load = jnp.asarray([[9, 1, 1, 1, 1, 1, 1, 1]] * 2, jnp.int32)
    before = np.asarray(rest.stacks[1].ffn.router.bias.get_value())
    after = np.asarray(update_router_bias(rest, load, None, 0.001).stacks[1].ffn.router.bias.get_value())
    np.testing.assert_allclose(after - before, 0.001 * np.sign(2 - np.asarray(load)), atol=5e-7)
    assert (before.astype(jnp.bfloat16) == (before + np.float32(0.001)).astype(jnp.bfloat16)).mean() > 0.9


def test_the_name_changes_no_number():
    cfg = tiny_config()
    renamed = replace(cfg, name="deepseek2-something", model_type="kimi_k2")
    tokens = random_tokens(cfg, 1, 8)
    forward = jax.jit(lambda model, tokens: model(tokens, with_mtp=True))
    a, b = forward(random_model(cfg), tokens), forward(random_model(renamed), tokens)
    np.testing.assert_array_equal(a.logits, b.logits)
    np.testing.assert_array_equal(a.mtp_logits[0], b.mtp_logits[0])
