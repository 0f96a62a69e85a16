"""Layers, the stacks they are kept in and the segments they are scanned in."""

from dataclasses import replace

import pytest
from tiny import tiny_config

from deepseek_jax.configs.layers import Dense, Layer, segmented
from deepseek_jax.configs.zoo import zoo

V3 = zoo("deepseek-v3")
# V4's kinds of layer as they alternate: the compression ratio of attention, and whether tokens' ids choose the experts.
FLASH = [(ratio, i < 3) for i, ratio in enumerate([0, 0, 4] + [128, 4] * 20)]
PRO = [(ratio, i < 3) for i, ratio in enumerate([128, 128, 4] + [128, 4] * 29)]


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        (["d"] * 3 + ["m"] * 58, [[("d", 0, 3)], [("m", 3, 61)]]),
        (["d"] * 30, [[("d", 0, 30)]]),
        (["d", "m"], [[("d", 0, 1)], [("m", 1, 2)]]),
        (["a", "b", "a"], [[("a", 0, 1)], [("b", 1, 2)], [("a", 2, 3)]]),
        (FLASH, [[((0, True), 0, 2)], [((4, True), 2, 3)], [((128, False), 3, 43), ((4, False), 4, 43)]]),
        (PRO, [[((128, True), 0, 2)], [((4, True), 2, 3)], [((128, False), 3, 61), ((4, False), 4, 61)]]),
    ],
    ids=["V3", "Llama", "one of each", "too short to repeat", "V4-Flash", "V4-Pro"],
)
def test_layers_that_repeat_are_scanned_together(layers, expected):
    found = segmented([Layer(layer, None) for layer in layers])
    assert [[(s.layer.attention, s.numbers.start, s.numbers.stop) for s in segment] for segment in found] == expected
    assert {s.numbers.step for segment in found for s in segment} <= {1, 2}
    numbers = [
        n for segment in found for repetition in zip(*(s.numbers for s in segment), strict=True) for n in repetition
    ]
    assert numbers == list(range(len(layers)))


def test_v3_is_three_dense_layers_and_58_of_experts():
    assert [layer.is_moe for layer in V3.layers] == [False] * 3 + [True] * 58
    assert {layer.attention for layer in V3.layers} == {V3.attention}
    assert (V3.layers[2].ffn, V3.layers[3].ffn) == (Dense(18432), V3.moe)
    assert [[(s.layer.is_moe, s.numbers) for s in segment] for segment in V3.segments] == [
        [(False, range(3))],
        [(True, range(3, 61))],
    ]
    assert V3.stacks == (V3.segments[0][0], V3.segments[1][0])
    assert V3.moe_layers == tuple(range(3, 61))
    assert V3.mtp_layer == V3.layers[-1]


def test_an_ablation_is_one_replace():
    cfg = tiny_config()
    assert replace(cfg, n_dense_layers=0).stacks[0].numbers == range(3)
    dense = replace(cfg, n_dense_layers=3, moe=None)
    assert [len(s.numbers) for s in dense.stacks] == [3]
    assert not dense.mtp_layer.is_moe
    assert replace(cfg, moe=replace(cfg.moe, top_k=1)).layers[1].ffn.top_k == 1
    assert [layer.is_moe for layer in cfg.first_layers(2).layers] == [False, True]
    # A config.json may claim any number: what is asked before its files are looked at lists no layers.
    huge = replace(cfg, n_layers=10**12)
    assert (huge.n_moe_layers, huge.mtp_layer.is_moe) == (10**12 - 1, True)
    assert (cfg.first_layers(1).n_dense_layers, cfg.first_layers(1).mtp_depth) == (1, 0)
