"""RMSNorm, RoPE and YaRN against transformers' modules."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from reference import hf_config, relative
from tiny import tiny_config
from transformers.models.deepseek_v3.modeling_deepseek_v3 import (
    DeepseekV3RMSNorm,
    apply_rotary_pos_emb,
    apply_rotary_pos_emb_interleave,
)

from deepseek_jax.configs.schema import GQA, MLA, Llama3, ModelConfig, Rope, Yarn
from deepseek_jax.configs.zoo import zoo
from deepseek_jax.convert.references import build_modules
from deepseek_jax.core.norm import RMSNorm
from deepseek_jax.core.rope import (
    apply_rope,
    inverse_frequencies,
    rope_tables,
    softmax_scale,
    yarn_mscale,
    yarn_range,
)

V3 = zoo("deepseek-v3").attention
YARN = V3.rope.yarn
ROPES = {
    "v3": V3.rope,
    "plain": Rope(10000.0),
    "moonlight": zoo("moonlight-16b").attention.rope,
    "kimi-k2": zoo("kimi-k2").attention.rope,
    "tiny-v3": tiny_config().attention.rope,
    "unequal mscale": Rope(10000.0, Yarn(40.0, 4096, mscale=1.0, mscale_all_dim=0.5)),
    "no mscale": Rope(10000.0, Yarn(40.0, 4096, mscale=0.0, mscale_all_dim=0.0)),
    "other betas": Rope(50000.0, Yarn(8.0, 2048, beta_fast=16.0, beta_slow=2.0)),
    # All pairs turn more than once within 900 tokens: the range, from 20 to 70, ends at dim - 1.
    "range cut off": Rope(10.0, Yarn(8.0, 900)),
}


def torch_rotary(rope: Rope):
    """transformers' rotary module and softmax scale for these settings, with V3's head sizes."""
    attention = MLA(n_heads=2, kv_rank=8, nope_dim=128, rope_dim=64, v_dim=8, rope=rope)
    cfg = ModelConfig("rope", 32, 16, 1, 1, 16, attention, None, max_length=163840)
    model = build_modules(hf_config(cfg))[0].model
    return model.rotary_emb, model.layers[0].self_attn.scaling


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_rms_norm(dtype):
    rng = np.random.default_rng(0)
    x, weight = rng.normal(0, 3, (4, 7, 48)), rng.normal(1, 0.1, 48)
    theirs = DeepseekV3RMSNorm(48, eps=1e-5)
    theirs.weight.data = torch.tensor(weight, dtype=torch.float32)
    ours = RMSNorm(jnp.float32, 48, "embed", 1e-5)
    ours.weight.set_value(jnp.asarray(weight, jnp.float32))
    y = ours(jnp.asarray(x, dtype))
    assert y.dtype == dtype
    expected = theirs(torch.tensor(np.asarray(jnp.asarray(x, dtype), np.float32))).detach()
    # bfloat16 keeps 8 bits: half a unit in the last place is 2**-9.
    assert relative(np.asarray(y, np.float32), expected) <= (1e-6 if dtype == "float32" else 2**-8)


@pytest.mark.parametrize("name", ROPES)
def test_inverse_frequencies_are_those_of_torch(name):
    rotary, scaling = torch_rotary(ROPES[name])
    ours = inverse_frequencies(64, ROPES[name])
    assert ours.dtype == np.float32
    # PyTorch's float32 power is not correctly rounded everywhere; at V3's theta it is, and every bit agrees.
    exact = ROPES[name].theta == 10000.0
    np.testing.assert_array_max_ulp(ours, rotary.inv_freq.numpy(), maxulp=0 if exact else 1)
    assert softmax_scale(192, ROPES[name]) == pytest.approx(scaling, rel=1e-12)


@pytest.mark.parametrize("name", ROPES)
def test_rope_tables(name):
    position = np.array([[0, 1, 2, 63, 64, 4095, 4096, 20000]])
    rotary, _ = torch_rotary(ROPES[name])
    cos, sin = rope_tables(jnp.asarray(position), 64, ROPES[name])
    theirs = rotary(torch.zeros(1, dtype=torch.float32), torch.tensor(position))
    # Equal frequencies give equal angles. One whose last place differs (6e-8 of it) turns that share further.
    slack = np.abs(inverse_frequencies(64, ROPES[name]).astype(float) - rotary.inv_freq.numpy())
    for table, expected in zip((cos, sin), theirs, strict=True):
        assert table.dtype == jnp.float32
        difference = np.abs(np.asarray(table) - expected[..., :32].numpy())
        assert (difference <= 1e-6 + 2 * slack * position[..., None]).all()


@pytest.mark.parametrize(
    "rope",
    [
        zoo("r1-distill-llama-8b").attention.rope,
        Rope(10000.0, interleaved=False, llama3=Llama3(32.0, 512, 1.5, 6.0)),
        zoo("r1-distill-qwen-32b").attention.rope,
    ],
    ids=["llama 3", "other numbers", "qwen"],
)
def test_ropes_of_llama_are_those_of_torch(rope):
    attention = GQA(2, 1, 128, rope=rope)
    cfg = ModelConfig("rope", 32, 256, 1, 1, 16, attention, None, max_length=131072, model_type="llama")
    theirs = build_modules(hf_config(cfg))[0].model.rotary_emb.inv_freq.numpy()
    ours = inverse_frequencies(128, rope)
    assert ours.dtype == np.float32
    # Powers differ in their last place (above), and where frequencies are blended that is rounded twice more.
    np.testing.assert_allclose(ours, theirs, rtol=4e-7)
    if rope.llama3 is not None:
        plain = inverse_frequencies(128, Rope(rope.theta))
        turns = rope.llama3.original_length * plain / (2 * np.pi)
        slow, fast = turns < rope.llama3.low_turns, turns > rope.llama3.high_turns
        assert slow.any()
        assert fast.any()
        assert (~slow & ~fast).any()
        np.testing.assert_array_equal(ours[fast], plain[fast])
        np.testing.assert_array_equal(ours[slow], plain[slow] / np.float32(rope.llama3.factor))


def test_pairs_are_rounded_to_float32_before_the_power():
    # Of 64 dimensions every pair is a binary fraction, of 48 it is not.
    pairs = torch.arange(0, 48, 2).float() / 48
    np.testing.assert_array_max_ulp(inverse_frequencies(48, Rope()), (1 / 10000.0**pairs).numpy(), maxulp=1)


def test_v3_yarn_numbers():
    assert yarn_range(64, 10000.0, YARN) == (10, 23)
    assert yarn_mscale(40.0, 1.0) == pytest.approx(1.368888, abs=5e-7)
    assert softmax_scale(192, V3.rope) == pytest.approx(0.135234, abs=5e-7)
    assert softmax_scale(192, Rope()) == 192**-0.5
    plain, scaled = inverse_frequencies(64, Rope()), inverse_frequencies(64, V3.rope)
    np.testing.assert_array_equal(scaled[:11], plain[:11])
    np.testing.assert_allclose(scaled[23:], plain[23:] / 40, rtol=2e-7)
    assert (scaled[11:23] < plain[11:23]).all()
    assert (scaled[11:23] > plain[11:23] / 40).all()


def test_v3_tables_carry_no_amplitude():
    cos, sin = rope_tables(jnp.asarray([[5]]), 64, V3.rope)
    np.testing.assert_allclose(cos**2 + sin**2, 1, atol=1e-6)


@pytest.mark.parametrize("interleaved", [True, False])
def test_apply_rope(interleaved):
    rng = np.random.default_rng(1)
    q, k = rng.normal(0, 1, (2, 2, 9, 3, 64)).astype(np.float32)
    position = np.arange(9)[None] + np.array([[0], [100]])
    rotary, _ = torch_rotary(V3.rope)
    cos, sin = rotary(torch.tensor(q), torch.tensor(position))
    apply = apply_rotary_pos_emb_interleave if interleaved else apply_rotary_pos_emb
    theirs = apply(torch.tensor(q), torch.tensor(k), cos, sin, unsqueeze_dim=2)
    tables = (jnp.asarray(cos[..., None, :32].numpy()), jnp.asarray(sin[..., None, :32].numpy()))
    ours = [apply_rope(jnp.asarray(x), *tables, interleaved) for x in (q, k)]
    for a, b in zip(ours, theirs, strict=True):
        # The reference takes interleaved pairs apart and leaves them so.
        a = np.concatenate([a[..., 0::2], a[..., 1::2]], -1) if interleaved else a
        np.testing.assert_allclose(a, b, atol=1e-6)


@pytest.mark.parametrize("interleaved", [True, False])
def test_bfloat16_is_rotated_in_float32(interleaved):
    x = jnp.asarray(np.random.default_rng(3).normal(0, 1, (1, 9, 64)), jnp.bfloat16)
    cos, sin = rope_tables(jnp.arange(9)[None], 64, V3.rope)
    found = apply_rope(x, cos, sin, interleaved)
    assert found.dtype == jnp.bfloat16
    exact = apply_rope(x.astype(jnp.float32), cos, sin, interleaved)
    np.testing.assert_array_equal(found, exact.astype(jnp.bfloat16))


def test_partners_are_found_at_full_precision():
    """On a TPU a float32 product at default precision rounds its operands to bfloat16."""
    arrays = [jax.ShapeDtypeStruct((1, 9, n), jnp.float32) for n in (64, 32, 32)]
    with jax.default_matmul_precision("default"):
        program = jax.jit(apply_rope, static_argnums=3).trace(*arrays, True).lower(lowering_platforms=("tpu",))
    (product,) = [line for line in program.as_text().splitlines() if "stablehlo.dot_general" in line]
    assert "precision = [HIGHEST, HIGHEST]" in product


def test_interleaved_and_half_split_are_one_permutation_apart():
    x = np.random.default_rng(2).normal(0, 1, (1, 5, 64)).astype(np.float32)
    cos, sin = rope_tables(jnp.arange(5)[None], 64, V3.rope)
    split = np.concatenate([x[..., 0::2], x[..., 1::2]], -1)
    pairs, halves = apply_rope(x, cos, sin, True), apply_rope(split, cos, sin, False)
    np.testing.assert_array_equal(np.concatenate([pairs[..., 0::2], pairs[..., 1::2]], -1), halves)
    assert np.abs(apply_rope(x, cos, sin, True) - apply_rope(x, cos, sin, False)).max() > 0.1
