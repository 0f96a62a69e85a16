"""Gradients of every parameter against torch autograd, main model and MTP modules together."""

from dataclasses import replace
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from measured import measured
from reference import experts, full, pair, torch_tensors
from test_parity import CONFIGS, TINY
from tiny import random_model, random_tokens

from deepseek_jax.core.context import Context
from deepseek_jax.core.params import named
from deepseek_jax.core.partition import combine, partition
from deepseek_jax.model.transformer import abstract

CASES = [name for name, (cfg, _) in CONFIGS.items() if cfg.moe]


def cotangents(logits, mtp_logits):
    """One fixed direction for each logit: the loss is their inner product."""
    rng = np.random.default_rng(11)
    return [rng.normal(0, 1, tuple(a.shape)).astype(np.float32) for a in (logits, *mtp_logits)]


def torch_gradients(p, directions) -> dict[str, np.ndarray]:
    reference = p.reference
    for module in (reference.main, reference.mtp):
        module.zero_grad(set_to_none=True)
    with torch.enable_grad():
        seen = reference.run(p.tokens)
        outputs = [seen.logits, *seen.mtp_logits]
        sum((o * torch.tensor(d)).sum() for o, d in zip(outputs, directions, strict=True)).backward()
    named = dict(reference.main.named_parameters())
    named |= {f"mtp.{name}": value for name, value in reference.mtp.named_parameters()}
    # The reference's indexer is not differentiated at all.
    untouched = {name: torch.zeros_like(value) for name, value in named.items() if ".indexer." in name}
    assert all(named[name].grad is None for name in untouched)
    return {name: untouched.get(name, value.grad).numpy() for name, value in named.items()}


def jax_gradients(p, directions, ctx=None) -> dict[str, np.ndarray]:
    params, rest = partition(p.model)
    T = p.tokens.shape[1]

    def loss(params):
        out = combine(params, rest)(p.tokens, with_mtp=len(directions) > 1, ctx=ctx)
        total = jnp.sum(out.logits * directions[0])
        for depth, direction in enumerate(directions[1:]):
            total += jnp.sum(out.mtp_logits[depth][:, : T - 1 - depth] * direction)
        return total

    return torch_tensors(jax.jit(jax.grad(loss))(params))


def check(name: str, ctx: Context | None = None):
    cfg, offset = CONFIGS[name]
    check_gradients(pair(cfg, bias_offset=offset), name, ctx)


def check_gradients(p, name: str, ctx: Context | None = None):
    seen = p.observe()
    if p.model.cfg.moe:
        # Where a choice of experts differs, gradients are of different functions.
        np.testing.assert_array_equal(np.sort(full(p).aux.expert_index, -1), np.sort(experts(seen.index), -1))
    directions = cotangents(seen.logits, seen.mtp_logits)
    ours, theirs = jax_gradients(p, directions, ctx), torch_gradients(p, directions)
    assert ours.keys() == theirs.keys()
    for tensor, expected in theirs.items():
        if ".indexer." in tensor:
            assert not ours[tensor].any(), tensor
            continue
        assert np.linalg.norm(expected) > 0, tensor
        error = np.linalg.norm(ours[tensor] - expected) / np.linalg.norm(expected)
        assert error <= 1e-4, (tensor, error)
        measured(name, "gradients", error)


def test_gradients_of_every_parameter_equal_torch():
    check("tiny-v3")


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES[1:])
def test_gradients_of_other_shapes(name):
    check(name)


@pytest.mark.slow
@pytest.mark.parametrize("ctx", [Context(experts=e, mla=m) for e, m in (("ragged", "absorbed"), ("dense", "expanded"))])
def test_gradients_of_other_forms(ctx):
    check("queries not compressed", ctx)


# "attention" and "core" keep a subset and a superset of what "sublayers" keeps of attention, by the same policy.
SLOWLY = [
    pytest.param(remat, marks=pytest.mark.slow)
    for remat in ("full", "attention", "core", "offload", "offload_attention")
]


@pytest.mark.parametrize("remat", ["sublayers", *SLOWLY])
def test_remat_changes_no_gradient(remat):
    base, again = main_gradients("none"), main_gradients(remat)
    for name, value in base.items():
        np.testing.assert_allclose(again[name], value, rtol=1e-4, atol=1e-5 * np.abs(value).max(), err_msg=name)


def test_layers_that_are_no_loop_change_no_gradient():
    base, again = main_gradients("none"), main_gradients("none", unrolled=True)
    for name, value in base.items():
        np.testing.assert_allclose(again[name], value, rtol=1e-4, atol=1e-5 * np.abs(value).max(), err_msg=name)


def test_layers_are_a_loop_or_none():
    # Without experts, whose products are loops of their own on a CPU, as many as a version of JAX likes.
    cfg, _ = CONFIGS["dense only, tied"]
    tokens = jax.ShapeDtypeStruct((1, 8), jnp.int32)

    def loops(**options) -> int:
        run = jax.jit(lambda model, tokens: model(tokens, logits="none", ctx=Context(**options)).hidden)
        return run.lower(abstract(cfg), tokens).as_text().count("stablehlo.while")

    assert (loops(), loops(unrolled=True)) == (1, 0)


def test_remat_computes_again():
    cfg = replace(TINY, n_layers=2, mtp_depth=0)
    params, rest = partition(abstract(cfg))

    def products(remat: str) -> int:
        def loss(params, rest, tokens):
            return combine(params, rest)(tokens, logits="none", ctx=Context(remat=remat)).hidden.sum()

        tokens = jax.ShapeDtypeStruct((1, 8), jnp.int32)
        return str(jax.make_jaxpr(jax.grad(loss))(params, rest, tokens)).count("dot_general")

    assert products("full") > products("none")


@pytest.mark.slow
@pytest.mark.parametrize("form", ["blocks", "ragged"])
def test_bfloat16_compute_with_float32_parameters(form):
    """Gradients keep the parameters' dtype and lie near those of float32 under the same experts."""
    cfg = replace(TINY, mtp_depth=0)
    model, tokens = random_model(cfg), random_tokens(cfg, 2, 16)
    params, rest = partition(model)
    cotangent = jnp.asarray(np.random.default_rng(1).normal(size=(2, 16, cfg.vocab_size)), jnp.float32)

    def loss(params, routing, ctx):
        out = combine(params, rest)(tokens, routing=routing, ctx=ctx)
        return (out.logits * cotangent).sum() / out.logits.size, out.aux.expert_index

    gradient = jax.jit(jax.grad(loss, has_aux=True), static_argnums=2)
    exact, routing = gradient(params, None, Context(experts="blocks"))
    rough, _ = gradient(params, routing, Context(dtype=jnp.dtype(jnp.bfloat16), experts=form))
    for name, value in named(exact).items():
        other = named(rough)[name]
        assert other.dtype == value.dtype == jnp.float32
        error = jnp.linalg.norm(other - value) / jnp.linalg.norm(value)
        assert 0 < error < 0.05, (name, float(error))


@cache
def main_gradients(remat: str, unrolled: bool = False) -> dict[str, np.ndarray]:
    """Gradients of the main model on one short row."""
    p = pair(replace(TINY, mtp_depth=0), batch=1, length=16)
    return jax_gradients(p, cotangents(p.observe().logits, []), Context(remat=remat, unrolled=unrolled))
