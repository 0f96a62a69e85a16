"""Fresh models: with one key, two configs have equal values in all that they share."""

from dataclasses import replace

import jax
import numpy as np
import pytest
from test_parity import CONFIGS

from deepseek_jax.core.params import named
from deepseek_jax.model.transformer import init

TINY = CONFIGS["tiny-v3"][0]


def by_layer(model) -> dict[str, np.ndarray]:
    """Values by names that count the model's layers from its first one."""
    values = {}
    sizes = [stack.attn_norm.weight.get_value().shape[0] for stack in model.stacks]
    for name, value in named(model).items():
        if name.startswith("stacks."):
            _, stack, rest = name.split(".", 2)
            first = sum(sizes[: int(stack)])
            values |= {f"layers.{first + i}.{rest}": np.asarray(part) for i, part in enumerate(value)}
        else:
            values[name] = np.asarray(value)
    return values


def test_a_key_gives_equal_values_to_what_two_configs_share():
    """Layers, dense ones among them, experts, MTP modules and the form of queries differ; nothing else moves."""
    other = replace(
        TINY,
        n_layers=4,
        n_dense_layers=2,
        moe=replace(TINY.moe, n_experts=12),
        attention=replace(TINY.attention, q_rank=None),
        mtp_depth=2,
    )
    ours, theirs = (by_layer(init(cfg, jax.random.key(0))) for cfg in (TINY, other))
    alone = {n for n in ours if n not in theirs}
    assert {n.removeprefix("mtp.0.block.").split("attn.")[-1] for n in alone if "attn." in n} == {
        "q_a",
        "q_b",
        "q_norm.weight",
    }
    assert {n for n in alone if "attn." not in n} == {
        "layers.1.ffn.router.weight",
        "layers.1.ffn.router.bias",
        "layers.1.ffn.shared.gate_up",
        "layers.1.ffn.shared.down",
    }
    for name in ours.keys() - alone - {"layers.1.ffn.gate_up", "layers.1.ffn.down"}:
        value = theirs[name]
        if 12 in value.shape:
            value = value.take(range(8), value.shape.index(12))
        np.testing.assert_array_equal(ours[name], value, err_msg=name)
    # No two matrices begin alike, nor two experts.
    experts = {name for name, value in theirs.items() if value.ndim > 2 and len(value) == 12}
    parts = [value for name, value in theirs.items() if value.ndim > 1 and name not in experts]
    parts += [expert for name in experts for expert in theirs[name]]
    first = [float(part.reshape(-1)[0]) for part in parts]
    assert len(set(first)) == len(first) > 100
    # Equal in every process: names are hashed to the same numbers.
    assert float(ours["layers.2.ffn.down"][3, 0, 0]) == pytest.approx(-0.00407096, rel=1e-5)
