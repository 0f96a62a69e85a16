"""The training loss against NumPy on the model's own logits."""

from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tiny import random_model, random_tokens, tiny_config

import deepseek_jax as dsj
from deepseek_jax.core.context import Context
from deepseek_jax.core.lowrank import LowRank, dense
from deepseek_jax.core.params import named
from deepseek_jax.core.partition import combine, partition
from deepseek_jax.train.loss import _nats, check_entries, cross_entropy

CFG = tiny_config(mtp_depth=2)
WEIGHTS = dsj.LossWeights(mtp=0.3, balance=0.01)


@pytest.fixture(scope="module")
def model():
    return random_model(CFG)


@partial(jax.jit, static_argnames="weights")
def loss(model, batch, weights):
    return dsj.loss(model, batch, weights)


def mean_nats(logits, targets):
    """Mean of -log p over targets that are not -1, in float64."""
    logits = np.asarray(logits, np.float64)
    log_p = logits - np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1, keepdims=True))
    log_p -= logits.max(-1, keepdims=True)
    rows, columns = np.nonzero(targets >= 0)
    return -log_p[rows, columns, targets[rows, columns]].mean()


def test_terms_are_those_of_the_paper(model):
    tokens = np.asarray(random_tokens(CFG, 2, 24))
    segments = np.ones_like(tokens)
    segments[0, 10:] = 2
    segments[1, 20:] = 0
    total, out = loss(model, {"tokens": tokens, "segments": segments}, WEIGHTS)
    found = []
    for ahead, logits in enumerate((out.logits, *out.mtp_logits), start=1):
        targets = np.full_like(tokens, -1)
        targets[:, :-ahead] = np.where(segments[:, ahead:] == segments[:, :-ahead], tokens[:, ahead:], -1)
        targets[segments == 0] = -1
        found.append(mean_nats(logits, targets))
    np.testing.assert_allclose(out.losses["main"], found[0], rtol=1e-5)
    np.testing.assert_allclose(out.losses["mtp"], (found[1] + found[2]) / 2, rtol=1e-5)
    balance = sum(a.balance["sequence"].mean(-1).sum() for a in (out.aux, out.mtp_aux))
    np.testing.assert_allclose(total, found[0] + 0.3 * (found[1] + found[2]) / 2 + 0.01 * balance, rtol=1e-5)
    assert int(out.losses["tokens"]) == 9 + 13 + 19


def test_without_mtp_weight_the_modules_are_not_run(model):
    tokens = random_tokens(CFG, 2, 24)
    with_mtp = loss(model, {"tokens": tokens}, dsj.LossWeights(mtp=0.3, balance=0.0))[1]
    total, out = loss(model, {"tokens": tokens}, dsj.LossWeights(mtp=0.0, balance=0.01))
    assert out.mtp_logits == ()
    assert "mtp" not in out.losses
    np.testing.assert_array_equal(out.losses["main"], with_mtp.losses["main"])
    balance = float(out.losses["balance"]["sequence"])
    assert balance > 0.5
    assert float(total) == pytest.approx(float(out.losses["main"]) + 0.01 * balance, rel=1e-6)


def test_masked_targets_and_padded_rows_take_no_part(model):
    """The terms by hand, with masked tokens, and the same again with a row of padding more."""
    tokens = np.asarray(random_tokens(CFG, 2, 24))
    segments, mask = np.ones_like(tokens), np.zeros_like(tokens)
    segments[0, 20:] = 0
    mask[0, 8:] = mask[1, 3:5] = 1
    batch = {"tokens": tokens, "segments": segments, "loss_mask": mask}
    total, out = loss(model, batch, WEIGHTS)
    found = []
    for ahead, logits in enumerate((out.logits, *out.mtp_logits), start=1):
        targets = np.full_like(tokens, -1)
        # A token is a target wherever it is predicted from: the mask stands at the token, not at the prediction.
        known = (segments[:, ahead:] != 0) & (mask[:, ahead:] == 1)
        targets[:, :-ahead] = np.where(known, tokens[:, ahead:], -1)
        found.append(mean_nats(logits, targets))
    np.testing.assert_allclose(out.losses["main"], found[0], rtol=1e-5)
    np.testing.assert_allclose(out.losses["mtp"], (found[1] + found[2]) / 2, rtol=1e-5)
    assert int(out.losses["tokens"]) == 12 + 2
    # What is read but not predicted is routed and balanced all the same.
    assert out.aux.load.sum(-1).tolist() == [CFG.moe.top_k * 44] * CFG.n_moe_layers

    padded = {name: np.concatenate([a, np.zeros((2, 24), np.int32)]) for name, a in batch.items()}
    padded_total, padded_out = loss(model, padded, WEIGHTS)
    np.testing.assert_allclose(padded_total, total, rtol=1e-6)
    np.testing.assert_allclose(padded_out.losses["balance"]["sequence"], out.losses["balance"]["sequence"], rtol=1e-6)


@pytest.fixture(scope="module")
def differentiated(model):
    params, rest = partition(model)
    mask = np.ones((4, 24), np.int32)
    mask[1, 4:9] = 0
    batch = {"tokens": random_tokens(CFG, 4, 24), "loss_mask": mask}

    def run(ctx):
        return jax.jit(jax.value_and_grad(lambda p: dsj.loss(combine(p, rest), batch, WEIGHTS, ctx)[0]))(params)

    return run


def test_the_router_bias_gets_no_gradient_and_every_parameter_gets_one(differentiated):
    _, gradient = differentiated(Context())
    assert not any("bias" in name for name in named(gradient))
    silent = [name for name, g in named(gradient).items() if not jnp.any(g)]
    assert silent == []


def test_logits_in_chunks_give_the_same_loss_and_gradient(differentiated):
    whole, gradient = differentiated(Context())
    # 24 tokens in chunks of 7: the last is filled up.
    total, in_chunks = differentiated(Context(loss_chunk=7))
    np.testing.assert_allclose(total, whole, rtol=1e-6)
    for name, value in named(gradient).items():
        assert np.linalg.norm(named(in_chunks)[name] - value) <= 1e-5 * np.linalg.norm(value), name


def test_chunks_never_hold_all_logits(model):
    params, rest = partition(model)
    batch = {"tokens": random_tokens(CFG, 2, 24)}

    def sizes(ctx):
        program = jax.make_jaxpr(jax.grad(lambda p: dsj.loss(combine(p, rest), batch, WEIGHTS, ctx)[0]))(params)
        return str(program)

    assert "f32[2,24,256]" in sizes(Context())
    assert "f32[2,8,256]" in sizes(Context(loss_chunk=8))
    assert "f32[2,24,256]" not in sizes(Context(loss_chunk=8))
    with pytest.raises(ValueError, match="loss_chunk=0"):
        Context(loss_chunk=0)


def test_a_batch_needs_tokens(model):
    with pytest.raises(ValueError, match="needs 'tokens'"):
        dsj.loss(model, {"ids": random_tokens(CFG, 1, 4)})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"labels": np.full((1, 4), -100)},
            r"not \['labels', 'tokens'\]; a loss_mask of 0 says what labels of -100 do",
        ),
        ({"tokens": [[1, 2, 3, 4]]}, "entries are arrays, but tokens is list"),
        ({"tokens": np.ones((1, 4), np.float32)}, "tokens are integers, not float32"),
        ({"tokens": np.full((1, 4), -100)}, "is -100, outside the vocabulary of 256: .*loss_mask"),
        ({"tokens": np.full((1, 4), 256)}, "is 256, outside the vocabulary"),
        ({"segments": np.ones((1, 3), np.int32)}, r"segments have shape \(1, 3\), its tokens \(1, 4\)"),
        ({"segments": np.ones((1, 4))}, "segments are integers, not float64"),
        ({"loss_mask": np.array([["a"] * 4])}, "loss_mask are integers"),
    ],
)
def test_a_batch_of_other_things_is_refused(model, changes, message):
    with pytest.raises(ValueError, match=message):
        dsj.loss(model, {"tokens": np.ones((1, 4), np.int32), **changes})


def test_arguments_of_other_kinds_are_named(model):
    batch = {"tokens": np.ones((1, 4), np.int32)}
    for call, message in (
        (lambda: dsj.loss(model, [1, 2]), "a dict of arrays, 'tokens' among them, not list"),
        (lambda: dsj.loss("tiny-v3", batch), "not of str and LossWeights"),
        (lambda: dsj.loss(model, batch, {"mtp": 0.3}), "not of Transformer and dict"),
        (lambda: model(batch["tokens"], ctx="cpu"), r"ctx must be a dsj\.Context\(\.\.\.\).*not str"),
        (lambda: dsj.generate(model, [[1]], ctx=jax.devices()), r"ctx must be a dsj\.Context.*not list"),
        (lambda: dsj.counts("tiny-v3"), r"such as dsj\.zoo\('deepseek-v3'\), not 'tiny-v3'"),
        (lambda: dsj.counts(CFG, context=1.5), "context must be a positive number of tokens, not 1.5"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_masks_may_be_booleans_and_ids_may_not():
    ids, mask = np.ones((1, 4), np.int32), np.ones((1, 4), bool)
    check_entries({"tokens": ids, "segments": mask, "loss_mask": mask})
    check_entries({"tokens": ids, "loss_mask": mask.astype(np.float32)})
    for batch in ({"tokens": mask}, {"tokens": ids, "positions": mask}, {"tokens": ids, "segments": mask * 1.0}):
        with pytest.raises(ValueError, match=f"{list(batch)[-1]} are integers, not"):
            check_entries(batch)


def test_an_adapted_head_in_chunks(model):
    """Not an array: it is multiplied out before it is cut."""
    rng = np.random.default_rng(0)
    a, b = (
        nnx.Param(jnp.asarray(rng.normal(size=shape), jnp.float32)) for shape in ((CFG.dim, 2), (2, CFG.vocab_size))
    )
    head = LowRank(model.head, a, b, alpha=1.0, inputs=1, split=0, outputs=1)
    hidden = jnp.asarray(rng.normal(size=(2, 12, CFG.dim)), jnp.float32)
    target = random_tokens(CFG, 2, 12).at[0, 3].set(-1)
    whole = cross_entropy(hidden @ dense(head, jnp.float32), target)[0]
    adapted = SimpleNamespace(head=head, embed=None)
    found = jax.jit(lambda: _nats(adapted, hidden, None, target, Context(loss_chunk=5)))()
    assert float(found) == pytest.approx(float(whole), rel=2e-6)
