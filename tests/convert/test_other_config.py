"""`load_pretrained(path, cfg=...)`: the same weights under another config."""

import re
from dataclasses import replace

import jax
import numpy as np
import pytest
from tiny import random_model, tiny_config

import deepseek_jax as dsj
from deepseek_jax.convert.other_config import with_config
from deepseek_jax.core.params import named
from deepseek_jax.notes import CheckpointWarning

CFG = tiny_config()


@pytest.fixture(scope="module")
def model():
    return random_model(CFG)


def same(a, b) -> None:
    np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def test_the_same_weights_load_under_another_config(model, tmp_path):
    """What no weight depends on changes nothing; what is left out is said."""
    dsj.save_pretrained(model, tmp_path / "it")
    cfg = dsj.load_pretrained(tmp_path / "it", dtype=None).cfg
    fewer = replace(
        cfg,
        moe=replace(cfg.moe, top_k=1),
        attention=replace(cfg.attention, rope=replace(cfg.attention.rope, theta=5e4)),
    )
    loaded = dsj.load_pretrained(tmp_path / "it", dtype=np.float32, cfg=fewer)
    assert loaded.cfg == fewer
    for name, value in named(model).items():
        same(named(loaded)[name], value)
    with pytest.warns(CheckpointWarning, match=r"left out mtp\.0\.$"):
        loaded = dsj.load_pretrained(tmp_path / "it", dtype=np.float32, cfg=replace(cfg, mtp_depth=0))
    assert {n for n in named(model) if not n.startswith("mtp")} == set(named(loaded))


def test_layers_meet_by_number_however_they_are_stacked(model):
    """One layer more in front is dense: the second one's network is drawn anew, its attention stays."""
    cfg = replace(CFG, n_layers=4, n_dense_layers=2)
    with pytest.warns(CheckpointWarning) as told:
        other = with_config(model, cfg, jax.random.key(7))
    left, new = (re.split(r" (?:left out|drawn anew) ", str(w.message))[1] for w in told)
    inside = {"down", "gate_up", "router.bias", "router.weight", "shared.down", "shared.gate_up"}
    assert set(left.removesuffix(".").split(", ")) == {f"layers.1.ffn.{name}" for name in inside}
    assert set(new.removesuffix(".").split(", ")) == {"layers.1.ffn.down", "layers.1.ffn.gate_up", "layers.3"}
    dense, moe = other.stacks
    same(dense.attn.q_a.get_value()[0], model.stacks[0].attn.q_a.get_value()[0])
    same(dense.attn.q_a.get_value()[1], model.stacks[1].attn.q_a.get_value()[0])
    same(dense.ffn.down.get_value()[0], model.stacks[0].ffn.down.get_value()[0])
    assert float(dense.ffn.down.get_value()[1].std()) == pytest.approx(CFG.init_std, rel=0.05)
    same(moe.ffn.down.get_value()[0], model.stacks[1].ffn.down.get_value()[1])
    same(moe.ffn.router.bias.get_value()[0], model.stacks[1].ffn.router.bias.get_value()[1])
    same(moe.attn_norm.weight.get_value()[1], np.ones(CFG.dim))
    same(other.mtp[0].proj.get_value(), model.mtp[0].proj.get_value())


@pytest.mark.slow
def test_experts_and_the_vocabulary_keep_their_first_ones(model):
    wide = replace(CFG, moe=replace(CFG.moe, n_experts=12), vocab_size=300)
    with pytest.raises(ValueError, match=r"layers\.1-2\.ffn\.router\.weight\[:, 8:12\].* Give a key"):
        with_config(model, wide)
    with pytest.warns(CheckpointWarning, match=r"drawn anew embed\[256:300\], head\[:, 256:300\], "):
        more = with_config(model, wide, jax.random.key(0))
    for name, value in named(model).items():
        grown = named(more)[name]
        same(grown[tuple(slice(n) for n in value.shape)], value)
    with pytest.warns(CheckpointWarning, match=r"left out embed\[256:300\]"):
        again = with_config(more, CFG)
    for name, value in named(model).items():
        same(named(again)[name], value)


def test_what_cannot_be_is_refused(model):
    with pytest.raises(ValueError, match="dim is 64 in tiny and 32 in the other config"):
        with_config(model, replace(CFG, dim=32), jax.random.key(0))
    # Of one shape, and yet other halves.
    swapped = replace(CFG, attention=replace(CFG.attention, nope_dim=8, rope_dim=16))
    with pytest.raises(ValueError, match=r"layers\.0-2\.attn\.q_b.*Give a key"):
        with_config(model, swapped)
    # An unstacked leaf that stays as it is, is shared; nothing is copied.
    assert with_config(model, replace(CFG, norm_eps=1e-5)).embed.get_value() is model.embed.get_value()
