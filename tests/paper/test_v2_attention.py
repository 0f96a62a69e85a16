"""The study of attention's forms: what each keeps of a token, and that they have as many parameters."""

from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from deepseek_jax.analysis.counts import counts
from deepseek_jax.lab.study import load
from deepseek_jax.model.transformer import abstract

STUDY = load(Path(__file__).parents[2] / "experiments", "v2_attention")
MODELS = {name: STUDY.setup(name).model for name in STUDY.variants}


@pytest.mark.parametrize("name", MODELS)
def test_a_cache_holds_what_table_1_says(name):
    # v2_attention C1
    """V2 table 1: 2 n_h d_h numbers a token and layer, 2 n_g d_h, 2 d_h, and d_c + d_R."""
    cfg, tokens = MODELS[name], 8
    a = cfg.attention
    expected = {"mha": 2 * 4 * 32, "gqa": 2 * 2 * 32, "mqa": 2 * 32, "mla": MODELS["mla"].attention.kv_rank + 16}[name]
    cache = jax.eval_shape(partial(abstract(cfg).init_cache, 1, tokens))
    held = sum(leaf.size for leaf in jax.tree.leaves(cache) if jnp.issubdtype(leaf.dtype, jnp.floating))
    assert a.n_heads == 4
    assert held == expected * tokens * cfg.n_layers
    assert counts(cfg).kv_values_per_token_layer == expected


def test_variants_have_the_same_parameters_to_a_tenth_of_a_percent():
    # v2_attention C2
    base = counts(MODELS["mla"])
    for cfg in MODELS.values():
        size = counts(cfg)
        assert size.total == size.activated == pytest.approx(base.total, rel=1e-3)
        # All that differs is attention and what makes up for it: one step of the dense width is the least.
        step = 3 * cfg.dim * cfg.n_layers
        assert abs(size.total - base.total) <= step / 2
        same = ("embedding", "head", "norms")
        assert [size.components.get(n) for n in same] == [base.components.get(n) for n in same]
