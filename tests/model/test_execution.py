"""How the model runs changes no number: expert forms, quantised leaves, precisions, full-size shapes."""

import re
from dataclasses import replace
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import full, pair, relative
from test_parity import CONFIGS
from tiny import random_model, random_tokens

from deepseek_jax.configs.zoo import zoo
from deepseek_jax.core.context import Context
from deepseek_jax.core.params import is_trained, is_variable, map_variables
from deepseek_jax.core.partition import combine, partition
from deepseek_jax.core.quant import FP8, Quantized
from deepseek_jax.model.transformer import abstract, init

TINY = CONFIGS["tiny-v3"][0]


# The forms by themselves: `test_experts`. The dense one in a whole model waits for the slow tests.
@pytest.mark.parametrize("form", [pytest.param("dense", marks=pytest.mark.slow), "ragged"])
def test_expert_forms_agree_in_the_whole_model(form):
    p = pair(TINY)
    assert relative(full(p, ctx=Context(experts=form)).logits, full(p).logits) <= 2e-5


def quantised(model):
    """The model with its matrices as FP8 leaves of small blocks, and the same model dequantised."""
    rng = np.random.default_rng(6)

    def leaf(path, variable):
        if path[-1] in ("embed", "head", "weight", "bias", "proj"):
            return variable
        value = np.asarray(variable.get_value())
        lead = 1 if "stacks" in path else 0
        dims = value.shape[lead:]
        # An expert's scales are its own; of the other axes every block holds 8 or, at an edge, fewer.
        block = tuple(1 if path[-2] == "ffn" and len(dims) > 2 and i == 0 else 8 for i in range(len(dims)))
        scale = rng.uniform(0.5, 1.5, (*value.shape[:lead], *(-(-n // b) for n, b in zip(dims, block, strict=True))))
        values = Quantized(jnp.asarray(value.astype(FP8)), jnp.asarray(scale.astype(np.float32)), block, dims)
        return type(variable)(values, **variable.get_metadata())

    def plain(path, variable):
        value = variable.get_value()
        value = value.dequantize(jnp.float32) if isinstance(value, Quantized) else value
        return type(variable)(value, **variable.get_metadata())

    low = map_variables(leaf, model)
    return low, jax.jit(lambda model: map_variables(plain, model))(low)


def test_quantised_leaves_equal_the_dequantised_model():
    model = pair(TINY).model
    low, plain = quantised(model)
    run = jax.jit(lambda model, tokens: model(tokens, with_mtp=True))
    tokens = random_tokens(TINY, 2, 24)
    a, b = run(low, tokens), run(plain, tokens)
    assert relative(a.logits, b.logits) <= 1e-6
    assert relative(a.mtp_logits[0][:, :-1], b.mtp_logits[0][:, :-1]) <= 1e-6
    np.testing.assert_array_equal(a.aux.expert_index, b.aux.expert_index)
    params, rest = partition(low)
    kinds = {type(v.get_value()) for v in jax.tree.leaves(params, is_leaf=is_variable)}
    assert Quantized not in kinds
    assert jax.tree.structure(combine(params, rest)) == jax.tree.structure(low)


def test_bfloat16_is_finite_and_near():
    p = pair(TINY)
    model = random_model(TINY, dtype=jnp.bfloat16)
    out = jax.jit(lambda model, tokens: model(tokens, with_mtp=True))(model, p.tokens)
    assert out.hidden.dtype == jnp.bfloat16
    assert out.logits.dtype == out.mtp_logits[0].dtype == jnp.float32
    assert np.isfinite(out.logits).all()
    # Flipped experts and 8 bits of mantissa: near in the mean, not in each number.
    error = np.asarray(out.logits) - np.asarray(full(p).logits)
    assert 1e-4 < np.abs(error).mean() < 0.2
    bias = model.stacks[1].ffn.router.bias.get_value()
    assert bias.dtype == jnp.float32


@cache
def traced(backward: bool):
    """The program of a bfloat16 model, for any platform yet."""
    model = abstract(TINY, jnp.bfloat16)
    tokens = jax.ShapeDtypeStruct((2, 16), jnp.int32)

    def loss(params, rest, tokens):
        out = combine(params, rest)(tokens, with_mtp=True, ctx=Context(experts="dense"))
        balance = out.aux.balance["sequence"].sum() + out.mtp_aux.balance["sequence"].sum()
        return out.logits.sum() + out.mtp_logits[0].sum() + balance

    with jax.default_matmul_precision("default"):
        return jax.jit(jax.grad(loss) if backward else loss).trace(*partition(model), tokens)


@cache
def lowered(platform: str, backward: bool) -> list[str]:
    """That program for this platform, line by line."""
    with jax.default_matmul_precision("default"):
        return traced(backward).lower(lowering_platforms=(platform,)).as_text().splitlines()


def of_float32(line: str) -> bool:
    operands = re.search(r": \((tensor<[^>]*>), (tensor<[^>]*>)\)", line)
    return all("xf32" in operand for operand in operands.groups())


@pytest.mark.parametrize(("platform", "backward"), [("tpu", False), ("cuda", False), ("tpu", True), ("cuda", True)])
def test_float32_products_name_highest_precision(platform, backward):
    """On TPU and GPU a float32 product at default precision is bfloat16 or TF32."""
    lines = lowered(platform, backward)
    products = [line for line in lines if "stablehlo.dot_general" in line]
    float32 = [line.strip() for line in products if of_float32(line)]
    # The routers' logits and the balance loss's shares, of the scanned layers and of the MTP module.
    assert len(float32) >= (8 if backward else 4)
    assert len(products) > 2 * len(float32)
    assert [line for line in float32 if "precision = [HIGHEST, HIGHEST]" not in line] == []


def test_softmax_norms_and_rope_are_float32_under_bfloat16():
    lines = lowered("tpu", False)
    for name in ("rsqrt", "cosine", "sine"):
        found = [line for line in lines if f"stablehlo.{name} " in line]
        assert found
        assert not [line for line in found if "bf16" in line]
    # The softmax's exponential is the one of rank five, [B, G, J, T, S].
    softmax = [line for line in lines if re.search(r"stablehlo.exponential .*tensor<\d+x\d+x\d+x\d+x\d+x", line)]
    assert softmax
    assert not [line for line in softmax if "bf16" in line]


def test_full_size_v3_counts():
    """What the papers call 671B, to the last parameter; no array is allocated."""
    model = abstract(zoo("deepseek-v3", mtp_depth=0), jnp.bfloat16)
    variables = jax.tree.leaves(model, is_leaf=is_variable)
    assert sum(v.get_value().size for v in variables if is_trained(v)) == 671_026_404_352
    assert sum(v.get_value().size for v in variables if not is_trained(v)) == 58 * 256


def test_init_follows_the_config():
    model = init(TINY, jax.random.key(0))
    again = init(TINY, jax.random.key(0))
    for path_a, b in zip(jax.tree.leaves(model), jax.tree.leaves(again), strict=True):
        np.testing.assert_array_equal(path_a, b)
    assert float(model.stacks[1].ffn.gate_up.get_value().std()) == pytest.approx(TINY.init_std, rel=0.05)
    assert (model.norm.weight.get_value() == 1).all()
    assert (model.stacks[1].ffn.router.bias.get_value() == 0).all()
    layers = np.asarray(model.stacks[1].ffn.down.get_value())
    assert np.abs(layers[0] - layers[1]).max() > 0
    # Drawn in float32 and rounded: a draw in bfloat16 has 128 values.
    small = replace(TINY, n_layers=1, mtp_depth=0)
    assert len(np.unique(np.asarray(init(small, jax.random.key(0), jnp.bfloat16).embed.get_value(), np.float32))) > 500
    low = abstract(TINY, jnp.bfloat16)
    assert low.embed.get_value().dtype == jnp.bfloat16
    assert low.stacks[1].ffn.router.bias.get_value().dtype == jnp.float32


def test_gradient_does_not_reach_what_is_not_trained():
    params, rest = partition(pair(TINY).model)
    trained = jax.tree.leaves(params, is_leaf=is_variable)
    assert all(is_trained(v) for v in trained)
    assert {v.get_value().shape for v in jax.tree.leaves(rest, is_leaf=is_variable)} == {(2, 8), (8,)}
    everything = partial(jax.tree.leaves, is_leaf=is_variable)
    assert len(everything(combine(params, rest))) == len(trained) + 2
