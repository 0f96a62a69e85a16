"""Training a part of a model: patterns, single layers of a stack, what stays bit-equal."""

from functools import partial

import jax
import numpy as np
import pytest
from tiny import random_model, random_tokens, tiny_config

import deepseek_jax as dsj
from deepseek_jax.core.params import map_variables, named
from deepseek_jax.core.partition import trained_layers
from deepseek_jax.train import optim
from deepseek_jax.train.objective import Knobs, NextToken
from deepseek_jax.train.patterns import select
from deepseek_jax.train.recipe import Optimizer
from deepseek_jax.train.step import start, train_step
from deepseek_jax.train.weights import LossWeights

CFG = tiny_config(n_layers=4)  # layer 0 dense, 1 to 3 MoE
MODEL = random_model(CFG)


def values(tree) -> dict[str, np.ndarray]:
    return {name: np.asarray(value) for name, value in named(tree).items()}


def trained(*patterns) -> dict[str, tuple[int, ...]]:
    """Path -> shape of what the patterns train."""
    params, _ = dsj.partition(MODEL, trained=select(MODEL, patterns))
    return {name: value.shape for name, value in named(params).items()}


def test_patterns_name_leaves_layers_and_ranges():
    width, experts = CFG.dim, CFG.moe.n_experts
    assert trained("stacks.*.ffn.router.*") == {"stacks.1.ffn.router.weight": (3, width, experts)}
    assert trained("layers.2-3.ffn.router.weight") == {"stacks.1.ffn.router.weight": (2, width, experts)}
    assert trained("layers.0.ffn.down", "head") == {"stacks.0.ffn.down": (1, 160, width), "head": (width, 256)}
    assert trained("layers.*.attn_norm.weight") == {
        "stacks.0.attn_norm.weight": (1, width),
        "stacks.1.attn_norm.weight": (3, width),
    }
    assert trained("layers.0-1.attn.q_a", "layers.3.attn.q_a") == {
        "stacks.0.attn.q_a": (1, 64, 48),
        "stacks.1.attn.q_a": (2, 64, 48),
    }
    assert set(trained("mtp.*")) == {n for n in named(dsj.partition(MODEL)[0]) if n.startswith("mtp.")}
    assert trained("*").keys() == named(dsj.partition(MODEL)[0]).keys()


@pytest.mark.parametrize(
    ("pattern", "match"),
    [
        ("stacks.*.ffn.ruoter.*", r"'stacks\.\*\.ffn\.ruoter\.\*' matches no .*near names are .*router\.weight"),
        ("layers.4.*", r"layers are 0 to 3"),
        ("layers.5-9.attn.*", r"layers are 0 to 3"),
        ("stacks.*.ffn.router.gain", r"near names are .*router\.bias"),
        ("heads", "near names are head"),
    ],
)
def test_a_pattern_that_matches_nothing_names_what_comes_close(pattern, match):
    with pytest.raises(ValueError, match=match):
        select(MODEL, ["embed", pattern])


def test_a_pattern_chooses_router_biases_as_it_does_parameters():
    chosen = select(MODEL, ["layers.2-3.ffn.*", "head"])
    paths = ("stacks.1.ffn.router.bias", "mtp.0.block.ffn.router.bias", "stacks.1.ffn.router.weight")
    assert [chosen(path) for path in paths] == [(1, 2), False, (1, 2)]
    assert not select(MODEL, ["*.router.weight"])("stacks.1.ffn.router.bias")
    with pytest.raises(ValueError, match=r"'\*\.router\.bias' match router biases alone"):
        select(MODEL, ["*.router.bias"])


@pytest.mark.parametrize(
    "patterns", [["layers.1.*", "layers.3.ffn.*"], ["layers.2-3.*", "embed"], ["*"], ["norm.weight"]]
)
def test_partition_and_combine_are_inverse(patterns):
    params, rest = dsj.partition(MODEL, trained=select(MODEL, patterns))
    again = dsj.combine(params, rest)
    assert jax.tree.structure(again) == jax.tree.structure(MODEL)
    for a, b in zip(jax.tree.leaves(MODEL), jax.tree.leaves(again), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_predicate_may_be_any_function():
    params, _ = dsj.partition(MODEL, trained=lambda path: path.endswith("router.weight"))
    assert set(named(params)) == {"stacks.1.ffn.router.weight", "mtp.0.block.ffn.router.weight"}
    params, _ = dsj.partition(MODEL, trained=lambda path: [2, 0] if path == "stacks.1.attn.o" else False)
    np.testing.assert_array_equal(named(params)["stacks.1.attn.o"], named(MODEL)["stacks.1.attn.o"][np.array([0, 2])])
    assert trained_layers(params) == {"stacks.1.attn.o": (0, 2)}
    for wrong in ([3], [-1], [1, 1]):
        with pytest.raises(ValueError, match="3 stacked layers"):
            dsj.partition(MODEL, trained=lambda path, wrong=wrong: wrong if path == "stacks.1.attn.o" else False)
    with pytest.raises(ValueError, match="0 stacked layers"):
        dsj.partition(MODEL, trained=lambda path: [0] if path == "head" else False)


def test_quantised_leaves_are_not_trained(tmp_path):
    dsj.save_pretrained(random_model(CFG), tmp_path / "fp8", quantize="fp8")
    stored = dsj.load_pretrained(tmp_path / "fp8", dtype=None)
    with pytest.raises(ValueError, match=r"layers\.\*\.attn\.\*.*quantised.*LoRA"):
        select(stored, ["layers.*.attn.*"])
    params, _ = dsj.partition(stored, trained=select(stored, ["layers.*.ffn.router.weight"]))
    assert set(named(params)) == {"stacks.1.ffn.router.weight"}


@pytest.mark.parametrize("muon", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_what_is_not_trained_stays_bit_equal(muon):
    """Weight decay and the optimizer's own memory included; the chosen layers move as they do when all are trained."""
    cfg = Optimizer(muon=muon, weight_decay=0.5, moments="float32")
    predicate = select(MODEL, ["layers.2-3.*", "head"])
    params, _ = dsj.partition(MODEL, trained=predicate)
    optimizer = optim.make(cfg, params)
    state = start(MODEL, optimizer, trained=predicate)
    step = jax.jit(
        partial(
            train_step,
            optimizer=optimizer,
            objective=NextToken(LossWeights(mtp=0), CFG.mtp_depth),
            ctx=dsj.Context(),
            clip=1e9,
        )
    )
    batch = {"tokens": random_tokens(CFG, 2, 16)[None]}
    for _ in range(3):
        state, metrics = step(state, batch, Knobs(np.float32(0.01), np.float32(0), np.float32(0), np.int32(1)))
    assert set(metrics["gradient_norms"]) == {"layer.2", "layer.3", "head"}
    before, after = every_value(MODEL), every_value(state.model)
    moved = {name for name in before if not np.array_equal(before[name], after[name])}
    chosen = {n for n in before if n.startswith("stacks.1.") and not n.endswith("router.bias")} | {"head"}
    assert moved == chosen
    for name in chosen - {"head"}:
        same = [np.array_equal(a, b) for a, b in zip(before[name], after[name], strict=True)]
        assert same == [True, False, False], name


def every_value(model) -> dict[str, np.ndarray]:
    found = {}
    map_variables(lambda path, v: found.setdefault(".".join(map(str, path)), np.asarray(v.get_value())), model)
    return found
