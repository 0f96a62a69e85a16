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
SCALES = {s: {name: STUDY.at(s).setup(name).model for name in STUDY.variants} for s in STUDY.scales}
# Heads and their dimensions; the latent's, and what is rotated with it.
SIZES = {"cpu": (4, 32, 32, 16), "gpu": (12, 64, 64, 32)}


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("name", STUDY.variants)
def test_a_cache_holds_what_table_1_says(name, scale):
    # v2_attention C1
    """V2 table 1: 2 n_h d_h numbers a token and layer, 2 n_g d_h, 2 d_h, and d_c + d_R, which is the least here."""
    cfg, tokens = SCALES[scale][name], 8
    heads, dim, latent, rotated = SIZES[scale]
    sizes = {"mha": 2 * heads * dim, "gqa": 2 * 2 * dim, "mqa": 2 * dim, "mla": latent + rotated}
    assert sorted(sizes.values(), reverse=True) == list(sizes.values())
    expected = sizes[name]
    cache = jax.eval_shape(partial(abstract(cfg).init_cache, 1, tokens))
    held = sum(leaf.size for leaf in jax.tree.leaves(cache) if jnp.issubdtype(leaf.dtype, jnp.floating))
    assert cfg.attention.n_heads == heads
    assert held == expected * tokens * cfg.n_layers
    assert counts(cfg).kv_values_per_token_layer == expected


@pytest.mark.parametrize("models", SCALES.values(), ids=SCALES)
def test_variants_have_the_same_parameters_to_a_tenth_of_a_percent(models):
    # v2_attention C2
    base = counts(models["mla"])
    for cfg in models.values():
        size = counts(cfg)
        assert size.total == size.activated == pytest.approx(base.total, rel=1e-3)
        # All that differs is attention and what makes up for it: one step of the dense width is the least.
        step = 3 * cfg.dim * cfg.n_layers
        assert abs(size.total - base.total) <= step / 2
        same = ("embedding", "head", "norms")
        assert [size.components.get(n) for n in same] == [base.components.get(n) for n in same]
