"""V3's training recipe as a whole: stages that meet, a rate and a batch that never turn back, the moments' memory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import tiny_config

from deepseek_jax.core.params import named
from deepseek_jax.core.partition import partition
from deepseek_jax.model.transformer import abstract
from deepseek_jax.train.optim import make
from deepseek_jax.train.recipe import B, Recipe, T
from deepseek_jax.train.schedule import count_steps, setting

V3 = Recipe()
LATE = 10**7


def rate(tokens: int) -> float:
    return setting(V3, tokens, LATE).lr


def test_the_stages_add_up_to_the_papers_tokens():
    constant, cosine = V3.rate.decay_from, V3.rate.decay_until - V3.rate.decay_from
    (drop, _) = V3.rate.drops[0]
    stages = (constant, cosine, drop - V3.rate.decay_until, V3.tokens - drop)
    assert stages == (10 * T, 4_300 * B, 333 * B, 167 * B)
    assert sum(stages) == 14_800 * B


def test_the_rate_is_continuous_up_to_its_only_drop_and_never_rises():
    points = np.linspace(0, V3.tokens - 1, 20_001).astype(np.int64)
    rates = np.array([rate(int(p)) for p in points])
    assert (np.diff(rates) <= 0).all()
    jumps = np.flatnonzero(np.diff(rates) < -1e-6)
    assert len(jumps) == 1
    assert points[jumps[0]] < 14_633 * B <= points[jumps[0] + 1]
    # The cosine begins and ends flat.
    for joint in (10 * T, 14_300 * B):
        assert rate(joint - B) == pytest.approx(rate(joint + B), rel=1e-4)


def test_the_batch_grows_to_five_times_its_first_size_and_stays():
    rows = [setting(V3, tokens, LATE).rows for tokens in range(0, 600 * B, B)]
    assert (rows[0], max(rows), rows[-1]) == (3072, 15360, 15360)
    assert (np.diff(rows) >= 0).all()
    # In whole micro-batches, none left out.
    assert set(np.diff(rows)) == {0, V3.micro_rows}
    # 469B tokens at the mean of the two batches, the rest at the larger one.
    expected = 469 * B / (9216 * 4096) * (np.log(5) * 9216 / 12288) + (14_800 - 469) * B / (15360 * 4096)
    assert count_steps(V3) == pytest.approx(expected, rel=0.005)


def test_moments_take_four_bytes_a_parameter_and_masters_stay_float32():
    params = partition(abstract(tiny_config()))[0]
    values = named(params)
    state = jax.eval_shape(make(V3.optimizer, params).init, values)
    held = [a for a in jax.tree.leaves(state) if jnp.issubdtype(a.dtype, jnp.floating)]
    assert sum(a.size * a.dtype.itemsize for a in held) == 4 * sum(v.size for v in values.values())
    assert {v.dtype for v in values.values()} == {jnp.dtype("float32")}
