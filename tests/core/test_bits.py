"""bfloat16 weights held as bits: the products of the weights themselves, and no copy of them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import random_model, tiny_config

from deepseek_jax.core import bits
from deepseek_jax.core.bits import Bits, tiled_product
from deepseek_jax.core.context import DEFAULT
from deepseek_jax.core.lowrank import LowRank
from deepseek_jax.core.params import Adapter, is_variable, map_variables, named_variables
from deepseek_jax.generation.layers import unstacked
from deepseek_jax.model.linear import linear
from deepseek_jax.train.lora import adapt
from deepseek_jax.train.tuning import LoRA


def drawn(shape, seed: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.bfloat16)


# The first axis of the weight is summed over, is one of the result's, or is one of all three terms'.
@pytest.mark.parametrize(
    ("equation", "x", "w"),
    [
        ("BTD,DZF->BTZF", (2, 3, 24), (24, 2, 20)),
        ("BTNV,NVD->BTD", (2, 3, 6, 5), (6, 5, 16)),
        ("BTD,VD->BTV", (2, 3, 16), (31, 16)),
        ("BTNH,NHC->BTNC", (2, 3, 4, 8), (4, 8, 12)),
    ],
)
def test_a_product_by_tiles_is_the_product(equation, x, w, monkeypatch):
    monkeypatch.setattr(bits, "TILE_BYTES", 400)
    x, w = drawn(x, 0), drawn(w, 1)
    ours = jax.jit(lambda x, w: tiled_product(equation, x, w))(x, Bits.of(w))
    theirs = np.einsum(equation, np.asarray(x, np.float64), np.asarray(w, np.float64))
    assert ours.dtype == jnp.float32
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-6 * np.abs(theirs).max())
    assert jax.jit(lambda x, w: linear(equation, x, w, DEFAULT))(x, Bits.of(w)).dtype == jnp.bfloat16


def test_an_adapter_stands_beside_bits_as_beside_the_weight():
    shapes = ((2, 3, 24), (24, 2, 20), (24, 2, 4), (2, 4, 20))
    x, w, a, b = (drawn(shape, seed) for seed, shape in enumerate(shapes))
    apply = jax.jit(lambda x, w: linear("BTD,DZF->BTZF", x, w, DEFAULT, dtype=jnp.float32))
    ours, theirs = (apply(x.astype(jnp.float32), LowRank(base, a, b, 8.0, 1, 1, 1)) for base in (Bits.of(w), w))
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-6 * np.abs(theirs).max())


def test_rows_of_a_table_are_its_own_and_an_id_outside_it_is_nan():
    table = drawn((10, 4), 0)
    rows = jax.jit(lambda w: DEFAULT.ops.lookup(w, jnp.asarray([[3, 9, 10, -1]]), jnp.bfloat16))(Bits.of(table))
    np.testing.assert_array_equal(rows[0, :2], table[jnp.asarray([3, 9])])
    assert np.isnan(np.asarray(rows[0, 2:], np.float32)).all()


@pytest.mark.parametrize("kind", ["a weight", "a weight with an adapter"])
def test_a_loop_of_products_holds_no_copy_of_the_weight(kind):
    x, w, a, b = (drawn(shape, seed) for seed, shape in enumerate([(1, 1, 512), (512, 4096), (512, 2), (2, 4096)]))

    def loop(x, w, a, b):
        w = w if kind == "a weight" else LowRank(w, a, b, 8.0, 1, 0, 1)
        return jax.lax.fori_loop(
            0, 3, lambda i, y: linear("BTD,DF->BTF", x * i, w, DEFAULT) + y, jnp.zeros((1, 1, 4096))
        )

    held, copied = (jax.jit(loop).lower(x, base, a, b).compile().memory_analysis() for base in (Bits.of(w), w))
    assert held.temp_size_in_bytes < w.nbytes < copied.temp_size_in_bytes


def narrow(path, variable):
    return variable.replace(variable.get_value().astype(jnp.bfloat16)) if isinstance(variable, Adapter) else variable


def weights(model) -> dict[str, jax.Array | Bits]:
    return {name: v.get_value() for name, v in named_variables(model).items() if is_variable(v)}


def test_a_model_for_decoding_holds_its_bfloat16_maps_as_bits_in_the_same_memory():
    model = random_model(tiny_config(), dtype=jnp.bfloat16)
    ours = weights(unstacked(model, jnp.bfloat16))
    kinds = {name: isinstance(a, Bits) for name, a in ours.items()}
    assert all(kinds[name] for name in ("embed", "stacks.0.attn.o", "stacks.1.ffn.gate_up", "mtp.0.proj"))
    assert not any(held for name, held in kinds.items() if name.endswith(("norm.weight", "router.bias")))
    np.testing.assert_array_equal(ours["embed"].dequantize(jnp.bfloat16), model.embed.get_value())
    assert ours["embed"].values.unsafe_buffer_pointer() == model.embed.get_value().unsafe_buffer_pointer()
    # Beside them an adapter's thin matrices are arrays.
    thin = map_variables(narrow, adapt(model, LoRA(rank=2), 0))
    adapted = weights(unstacked(thin, jnp.bfloat16))
    assert isinstance(adapted["stacks.1.attn.o.base"], Bits)
    assert not isinstance(adapted["stacks.1.attn.o.a"], Bits)
    # In float32 there is nothing to hold otherwise.
    plain = weights(unstacked(random_model(tiny_config()), jnp.float32))
    assert not any(isinstance(a, Bits) for a in plain.values())
