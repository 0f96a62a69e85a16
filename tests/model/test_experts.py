"""The forms of the expert computation agree, forward and backward, with a loop over tokens."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_jax.core.quant import FP8, Quantized
from deepseek_jax.kernels import grouped
from deepseek_jax.kernels.grouped import block_rows
from deepseek_jax.kernels.native.library import compiler
from deepseek_jax.model.experts import routed_experts, sort_by_expert

# That of the last is built here, where there is a C++ compiler.
FORMS = ("dense", "blocks", "ragged", "kernel", "native")[: 4 if compiler() is None else 5]
E, D, F = 6, 16, 12


def patterns(n: int, k: int) -> dict[str, np.ndarray]:
    """Choices of k of E experts for n tokens: even, skewed, and with experts or whole tokens left out."""
    rng = np.random.default_rng(0)
    random = rng.random((n, E)).argsort(-1)[:, :k]
    holes = random.copy()
    holes[rng.random(n) < 0.3] = -1
    return {
        "random": random,
        "padding": holes,
        "all padding": np.full((n, k), -1),
        "the same for all": np.broadcast_to(np.arange(2, 2 + k), (n, k)),
        "some experts empty": np.where(random % 2 == 0, random, random - 1) if k == 1 else random % 3 * 2,
    }


@partial(jax.jit, static_argnums=(5, 7))
def run(x, index, weight, gate_up, down, form, cotangent, limit=None):
    """The output, and gradients of its inner product with ``cotangent`` for x, weight and both matrices."""

    def f(x, weight, gate_up, down):
        return routed_experts(x, index, weight, gate_up, down, form, limit)

    y, back = jax.vjp(f, x, weight, gate_up, down)
    return y, back(cotangent)


def tensors(n: int, k: int):
    rng = np.random.default_rng(1)
    shapes = ((n, D), (n, k), (E, D, 2, F), (E, F, D), (n, D))
    return [jnp.asarray(rng.normal(0, 0.5, shape), jnp.float32) for shape in shapes]


def loop(x, index, weight, gate_up, down, limit=None):
    """Token by token, in float64."""
    x, weight, gate_up, down = (np.asarray(a, np.float64) for a in (x, weight, gate_up, down))
    y = np.zeros(x.shape)
    for n, chosen in enumerate(index):
        for j, e in enumerate(chosen):
            if e >= 0:
                gate, up = x[n] @ gate_up[e, :, 0], x[n] @ gate_up[e, :, 1]
                if limit is not None:
                    gate, up = np.minimum(gate, limit), np.clip(up, -limit, limit)
                y[n] += weight[n, j] * (gate / (1 + np.exp(-gate)) * up) @ down[e]
    return y


def assert_forms_agree(n, k, index, forms=FORMS, limit=None):
    x, weight, gate_up, down, cotangent = tensors(n, k)
    results = {form: run(x, jnp.asarray(index), weight, gate_up, down, form, cotangent, limit) for form in forms}
    np.testing.assert_allclose(results["dense"][0], loop(x, index, weight, gate_up, down, limit), atol=2e-5)
    for form in forms[1:]:
        y, (dx, dweight, dgate_up, ddown) = results[form]
        oracle, (ex, eweight, egate_up, edown) = results["dense"]
        for name, a, b in (
            ("y", y, oracle),
            ("dx", dx, ex),
            ("dweight", dweight, eweight),
            ("dgate_up", dgate_up, egate_up),
            ("ddown", ddown, edown),
        ):
            assert np.isfinite(a).all(), (form, name)
            np.testing.assert_allclose(a, b, atol=2e-5 * max(np.abs(b).max(), 1.0), err_msg=f"{form} {name}")


@pytest.mark.parametrize("name", patterns(40, 2))
def test_forms_agree(name):
    index = patterns(40, 2)[name]
    if name == "some experts empty":
        assert len(np.unique(index)) < E
    assert_forms_agree(40, 2, index)


def test_forms_agree_where_activations_are_cut_off():
    index, (x, weight, gate_up, down, _) = patterns(40, 2)["padding"], tensors(40, 2)
    assert_forms_agree(40, 2, index, limit=0.5)
    assert abs(loop(x, index, weight, gate_up, down, 0.5) - loop(x, index, weight, gate_up, down)).max() > 1


# Rows a block: 2 (decoding), 16, 128; row counts that blocks do not divide.
@pytest.mark.parametrize(("n", "k", "rows"), [(3, 1, 2), (67, 2, 16), (450, 2, 128)])
def test_blocks_of_every_size(n, k, rows):
    assert block_rows(n * k, E) == rows
    for index in patterns(n, k).values():
        assert_forms_agree(n, k, index, ("dense", "blocks"))


def test_repeated_expert_of_a_token_adds_up():
    # A replayed choice may name an expert twice.
    assert_forms_agree(40, 2, np.full((40, 2), 3))


@pytest.mark.parametrize("form", [form for form in FORMS if form != "native"])
def test_quantised_experts_equal_dequantised_ones(form, monkeypatch):
    rng = np.random.default_rng(2)
    x, weight, *_ = tensors(40, 2)
    index = jnp.asarray(patterns(40, 2)["padding"])

    def leaf(shape, block):
        values = jnp.asarray(rng.normal(0, 1, shape), FP8)
        grid = [-(-s // b) for s, b in zip(shape, block, strict=True)]
        return Quantized(values, jnp.asarray(rng.random(grid), jnp.float32), block, shape)

    gate_up, down = leaf((E, D, 2, F), (1, 8, 1, 8)), leaf((E, F, D), (1, 8, 8))
    quantised = routed_experts(x, index, weight, gate_up, down, form)
    plain = routed_experts(x, index, weight, gate_up.dequantize(x.dtype), down.dequantize(x.dtype), form)
    if form != "ragged":
        np.testing.assert_allclose(quantised, plain, atol=1e-6)
        return
    # Few rows meet slabs of a matrix, each of which rebuilds its own blocks, and whose products add up.
    monkeypatch.setattr(grouped, "SLAB", 8)
    in_slabs = routed_experts(x, index, weight, gate_up, down, form)
    assert (np.asarray(in_slabs) != np.asarray(quantised)).any()
    for found in (quantised, in_slabs):
        assert np.linalg.norm(found - plain) <= 1e-6 * np.linalg.norm(plain)


def test_no_program_for_a_gpu_computes_all_experts_for_all_rows():
    """XLA makes dense products of `jax.lax.ragged_dot` there: at 256 experts a hundredth of a card's rate."""
    x, weight, gate_up, down, _ = tensors(600, 2)
    index = jnp.asarray(patterns(600, 2)["padding"])

    def loss(x, weight, gate_up, down):
        return routed_experts(x, index, weight, gate_up, down, "auto").sum()

    step = jax.jit(jax.grad(loss, (0, 1, 2, 3)))
    text = {
        platform: jax.export.export(step, platforms=[platform])(x, weight, gate_up, down).mlir_module()
        for platform in ("cuda", "tpu")
    }
    assert "ragged_dot" in text["tpu"]
    assert "ragged_dot" not in text["cuda"]
    # Five products, of blocks of 128 rows (of 200 rows an expert has) with one expert's matrix.
    products = re.findall(r"dot_general .*: \(tensor<([\dx]+)xf32>, tensor<([\dx]+)xf32>\)", text["cuda"])
    assert {tuple(sorted(pair)) for pair in products} == {
        tuple(sorted(pair))
        for pair in ((f"128x{D}", f"{D}x{2 * F}"), (f"128x{D}", f"{F}x{D}"),
                     (f"128x{2 * F}", f"{D}x{2 * F}"), (f"128x{F}", f"128x{D}"), (f"128x{D}", f"128x{2 * F}"))
    }  # fmt: skip


def test_sorting_keeps_order_within_an_expert():
    index = jnp.asarray([[2, 0], [-1, -1], [0, 2], [5, 0]])
    order, inverse, sizes = sort_by_expert(index, E)
    np.testing.assert_array_equal(order, [1, 4, 7, 0, 5, 6, 2, 3])
    np.testing.assert_array_equal(order[inverse], np.arange(8))
    np.testing.assert_array_equal(sizes, [3, 0, 2, 0, 0, 1])


def test_more_assignments_than_have_numbers_are_refused():
    index = jax.ShapeDtypeStruct((2**26, 8), jnp.int32)
    with pytest.raises(ValueError, match=r"536,870,912 assignments .*: give tokens for 477,218,588 at most"):
        jax.eval_shape(partial(sort_by_expert, n_experts=8), index)


def test_auto_is_the_block_form_on_a_cpu():
    x, weight, gate_up, down, _ = tensors(40, 2)
    index = jnp.asarray(patterns(40, 2)["random"])
    auto, blocks = (routed_experts(x, index, weight, gate_up, down, form) for form in ("auto", "blocks"))
    np.testing.assert_array_equal(auto, blocks)
