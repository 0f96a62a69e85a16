"""The shapes that are compiled are those of releases."""

import jax.numpy as jnp
import numpy as np
import pytest

import deepseek_jax as dsj
from deepseek_jax.aot.programs import quantized
from deepseek_jax.core.params import map_variables
from deepseek_jax.core.quant import FP4, FP8, Quantized
from deepseek_jax.model.transformer import abstract


def quantized_leaves(name: str, kind: str) -> dict[str, Quantized]:
    cfg, found = dsj.zoo(name), {}

    def note(path, variable):
        if isinstance(variable.get_value(), Quantized):
            found[".".join(map(str, path))] = variable.get_value()
        return variable

    map_variables(note, quantized(abstract(cfg, jnp.bfloat16), cfg, kind))
    return found


def test_v4_has_its_experts_in_fp4_and_all_else_in_fp8():
    found = quantized_leaves("deepseek-v4-flash", "fp8")
    experts = {path for path, leaf in found.items() if leaf.dtype == FP4}
    assert {path.rsplit(".", 1)[1] for path in experts} == {"gate_up", "down"}
    assert all(found[path].block in ((1, 32, 1, 1), (1, 32, 1)) for path in experts)
    assert {found[path].dtype for path in found.keys() - experts} == {np.dtype(FP8)}
    assert {leaf.scale.dtype for leaf in found.values()} == {np.dtype(jnp.float8_e8m0fnu)}


@pytest.mark.parametrize(("kind", "dtype"), [("fp8", FP8), ("int8", jnp.int8)])
def test_v3_has_all_in_blocks_of_128(kind, dtype):
    found = quantized_leaves("deepseek-v3", kind)
    assert {leaf.dtype for leaf in found.values()} == {np.dtype(dtype)}
    assert {leaf.scale.dtype for leaf in found.values()} == {np.dtype(np.float32)}
    assert found["stacks.1.ffn.gate_up"].block == (1, 128, 1, 128)
