"""Padding, packing, positions, next tokens and the other arguments of the model's call."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import forward, full, pair, relative
from test_parity import CONFIGS
from tiny import random_model

from deepseek_jax.configs.schema import Rope
from deepseek_jax.model.arguments import check_call
from deepseek_jax.model.mtp import shifted
from deepseek_jax.model.router import KnockOut
from deepseek_jax.model.transformer import init

TINY = CONFIGS["tiny-v3"][0]
TWO = CONFIGS["two mtp modules"][0]
T = 96


def segmented(p, segments, positions=None, **arguments):
    return forward(p.model, p.tokens, segments=jnp.asarray(segments, jnp.int32), positions=positions, with_mtp=True)


def test_right_padding_equals_transformers_and_the_shorter_row():
    p = pair(TINY)
    real = np.arange(T)[None] < np.array([[T], [60]])
    out = segmented(p, real)
    visible = np.tril(np.ones((2, T, T), bool)) & real[:, None]
    seen = p.observe(visible=visible)
    assert relative(np.asarray(out.logits)[real], seen.logits.numpy()[real]) <= 2e-5
    assert relative(out.logits[1, :60], full(p).logits[1, :60]) <= 2e-5
    # The module's last real position knows no next token.
    assert relative(out.mtp_logits[0][1, :59], seen.mtp_logits[0][1, :59]) <= 2e-5
    assert (out.mtp_logits[0][1, 59:] == 0).all()


def test_left_padding_equals_transformers():
    p = pair(TINY)
    real = np.arange(T)[None] >= np.array([[0], [30]])
    positions = np.maximum(real.cumsum(-1) - 1, 0)
    out = segmented(p, real, jnp.asarray(positions, jnp.int32))
    visible = np.tril(np.ones((2, T, T), bool)) & real[:, None]
    seen = p.observe(visible=visible, positions=positions)
    assert relative(np.asarray(out.logits)[real], seen.logits.numpy()[real]) <= 2e-5


def test_padding_is_not_routed_or_counted():
    p = pair(TINY)
    real = np.arange(T)[None] < np.array([[T], [60]])
    out = segmented(p, real)
    index = np.asarray(out.aux.expert_index)
    assert (index[:, ~real] == -1).all()
    assert (index[:, real] >= 0).all()
    np.testing.assert_array_equal(out.aux.load.sum(-1), [real.sum() * TINY.moe.top_k] * 2)
    np.testing.assert_array_equal(out.mtp_aux.load.sum(-1), [(real.sum() - 2) * TINY.moe.top_k])
    np.testing.assert_array_equal(out.aux.dropped, [0, 0])
    for layer in range(2):
        counts = np.bincount(index[layer][real].ravel(), minlength=8)
        np.testing.assert_array_equal(out.aux.load[layer], counts)


def test_what_stands_at_padding_changes_nothing():
    p = pair(TINY)
    real = np.arange(T)[None] < np.array([[T], [60]])
    other = jnp.where(real, p.tokens, 7)
    a, b = (
        segmented(p, real),
        forward(p.model, other, segments=jnp.asarray(real, jnp.int32), positions=None, with_mtp=True),
    )
    np.testing.assert_array_equal(np.asarray(a.logits)[real], np.asarray(b.logits)[real])
    np.testing.assert_array_equal(a.aux.balance["sequence"], b.aux.balance["sequence"])


def test_packed_texts_equal_separate_rows():
    p = pair(TINY)
    whole = full(p)
    # Row 0 holds the first 50 tokens of text 0 and 40 of text 1, each from position 0, and 6 of padding.
    tokens = jnp.concatenate([p.tokens[0, :50], p.tokens[1, :40], jnp.zeros(6, jnp.int32)])
    segments = np.repeat([1, 2, 0], [50, 40, 6])
    positions = np.concatenate([np.arange(50), np.arange(40), np.zeros(6)])
    both = [jnp.asarray(np.broadcast_to(a, (2, T)), jnp.int32) for a in (segments, positions)]
    out = forward(p.model, jnp.broadcast_to(tokens, (2, T)), segments=both[0], positions=both[1], with_mtp=True)
    assert relative(out.logits[0, :50], whole.logits[0, :50]) <= 2e-5
    assert relative(out.logits[0, 50:90], whole.logits[1, :40]) <= 2e-5
    # The last token of a text has no next token, whatever follows it in the row.
    assert relative(out.mtp_logits[0][0, :49], whole.mtp_logits[0][0, :49]) <= 2e-5
    assert relative(out.mtp_logits[0][0, 50:89], whole.mtp_logits[0][1, :39]) <= 2e-5
    assert (out.mtp_logits[0][0, [49, *range(89, 96)]] == 0).all()


def test_permuted_rows_permute_the_outputs():
    p = pair(TINY)
    order = np.random.default_rng(4).permutation(T)
    next_tokens = shifted(p.tokens, jnp.ones_like(p.tokens), 1)
    out = forward(
        p.model,
        p.tokens[:, order],
        positions=jnp.asarray(np.broadcast_to(order, (2, T)), jnp.int32),
        next_tokens=next_tokens[:, order],
        with_mtp=True,
    )
    whole = full(p)
    assert relative(out.logits, whole.logits[:, order]) <= 2e-5
    assert relative(out.mtp_logits[0], whole.mtp_logits[0][:, order]) <= 2e-5


def test_positions_count_by_differences_only():
    p = pair(TINY)
    positions = jnp.broadcast_to(jnp.arange(T) + 500, (2, T))
    assert relative(forward(p.model, p.tokens, positions=positions).logits, full(p).logits) <= 2e-5


def test_next_tokens_are_the_tokens_shifted():
    tokens = jnp.asarray([[10, 11, 12, 13, 14]])
    segments = jnp.asarray([[1, 1, 1, 2, 0]])
    np.testing.assert_array_equal(shifted(tokens, segments, 2)[0], [[11, 12], [12, -1], [-1, -1], [-1, -1], [-1, -1]])


def test_given_next_tokens_replace_the_shifted_ones():
    p = pair(TWO)
    whole = full(p)
    default = shifted(p.tokens, jnp.ones_like(p.tokens), 2)
    same = forward(p.model, p.tokens, next_tokens=default, with_mtp=True)
    for depth in (0, 1):
        assert relative(same.mtp_logits[depth], whole.mtp_logits[depth]) <= 2e-5
    other = forward(p.model, p.tokens, next_tokens=default.at[:, 20, 0].add(1), with_mtp=True)
    np.testing.assert_array_equal(other.logits, same.logits)
    np.testing.assert_array_equal(other.mtp_logits[0][:, :20], same.mtp_logits[0][:, :20])
    assert relative(other.mtp_logits[0][:, 20], same.mtp_logits[0][:, 20]) > 1e-2


def test_mtp_positions_without_a_next_token_are_zero():
    out = full(pair(TWO))
    for depth in (0, 1):
        assert (out.mtp_logits[depth][:, T - 1 - depth :] == 0).all()
        assert (out.mtp_hidden[depth][:, T - 1 - depth :] == 0).all()
        assert (np.asarray(out.mtp_logits[depth])[:, : T - 1 - depth].std(-1) > 0).all()


def test_dropping_mtp_leaves_the_main_logits():
    # v3_mtp C2
    p = pair(TWO)
    np.testing.assert_array_equal(forward(p.model, p.tokens, with_mtp=True).logits, forward(p.model, p.tokens).logits)
    out = forward(p.model, p.tokens)
    assert out.mtp_logits == ()
    assert out.mtp_aux is None


def test_logits_of_the_last_real_token():
    p = pair(TINY)
    real = np.arange(T)[None] < np.array([[T], [60]])
    last = forward(p.model, p.tokens, segments=jnp.asarray(real, jnp.int32), logits="last").logits
    whole = full(p).logits
    assert last.shape == (2, 1, TINY.vocab_size)
    assert relative(last[0, 0], whole[0, -1]) <= 2e-5
    assert relative(last[1, 0], whole[1, 59]) <= 2e-5
    assert forward(p.model, p.tokens, logits="none").logits is None


IDS, PADDED = np.arange(2 * T).reshape(2, T) % 200, np.arange(T)[None] < np.array([[T], [60]])


def with_id(at, value) -> np.ndarray:
    ids = IDS.copy()
    ids[at] = value
    return ids


def routing(value) -> np.ndarray:
    index = np.zeros((2, 2, T, 2), np.int32)
    index[1, 0, 5, 1] = value
    return index


BAD = {
    "tokens must have shape": {"tokens": jnp.zeros(3, jnp.int32)},
    "tokens is text: give token ids": {"tokens": "text"},
    "tokens is text: give token": {"tokens": [["a", "b"]]},
    "tokens must be an array of integers .*, not int": {"tokens": 3},
    "tokens must be integers .*, not float32": {"tokens": jnp.zeros((2, 3))},
    "tokens must be integers .*, not float64": {"tokens": [[1.5, 2.0]]},
    "rows of unequal length: pad them": {"tokens": [[1, 2], [3]]},
    r"tokens\[1, 9\] is 256, outside the vocabulary of 256": {"tokens": with_id((1, 9), 256)},
    r"tokens\[0, 3\] is -1, outside the vocabulary of 256\.": {"tokens": with_id((0, 3), -1)},
    r"tokens\[0, 3\] is -100.*a loss_mask of 0": {"tokens": with_id((0, 3), -100)},
    "segments must be integers": {"segments": jnp.ones((2, T))},
    "next_tokens hold 256, outside": {"next_tokens": jnp.full((2, T, 1), 256), "with_mtp": True},
    r"routing\[1, 0, 5, 1\] is expert 8, but there are 8, from 0": {"routing": routing(8)},
    "is expert -2": {"routing": routing(-2)},
    "cache must be what model.init_cache": {"cache": {}},
    "positions must have the tokens' shape": {"positions": jnp.zeros((2, 3), jnp.int32)},
    "segments must have the tokens' shape": {"segments": jnp.zeros((1, 96), jnp.int32)},
    "next_tokens must have shape": {"next_tokens": jnp.zeros((2, 96, 2), jnp.int32), "with_mtp": True},
    r"shape \(2, 8\), \[MoE layers, experts\], not ndarray of bool, shape \(8,\)": {
        "routing": KnockOut(np.ones(8, bool))
    },
    r"not ndarray of int64, shape \(2, 8\)": {"routing": KnockOut(np.zeros((2, 8), np.int64))},
    "KnockOut top must be a number of experts, 0 or more, not -1": {"routing": KnockOut(np.zeros((2, 8), bool), -1)},
    "leaves a layer 1 of 8 experts, fewer than the top_k=2": {"routing": KnockOut(np.arange(16).reshape(2, 8) > 9, 1)},
    "routing must have shape": {"routing": jnp.zeros((3, 2, 96, 2), jnp.int32)},
    'choose "all"': {"logits": "first"},
    "offers block": {"capture": ("keys",)},
}


@pytest.mark.parametrize("message", BAD)
def test_wrong_arguments_are_named(message):
    p = pair(TINY)
    arguments = dict(BAD[message])
    with pytest.raises(ValueError, match=message):
        p.model(arguments.pop("tokens", p.tokens), **arguments)


def test_lists_are_ids_and_padding_may_be_anything():
    """-100, which other libraries pad labels with, and ids that there are not, stand at padding only."""
    p = pair(TINY)
    padded = jnp.asarray(PADDED, jnp.int32)
    expected = forward(p.model, jnp.asarray(IDS), segments=padded)
    for value in (-100, 256, 2**31 - 1):
        ids = np.where(PADDED, IDS, value).astype(np.int32)
        check_call(TINY, ids, None, padded, None, None, None, False, "all", ())
        found = forward(p.model, jnp.asarray(ids), segments=padded)
        np.testing.assert_array_equal(np.asarray(found.logits)[PADDED], np.asarray(expected.logits)[PADDED])
    (ids, *_) = check_call(TINY, IDS.tolist(), None, None, None, None, None, False, "all", ())
    np.testing.assert_array_equal(ids, IDS)


@pytest.mark.parametrize("value", [-1, -100, 256, 2**31 - 1])
def test_under_jit_an_id_that_is_none_makes_its_row_nan_and_no_other(value):
    p = pair(TINY)
    good, bad = (np.asarray(full(replace(p, tokens=jnp.asarray(ids))).logits) for ids in (IDS, with_id((1, 40), value)))
    assert np.isnan(bad[1, 40:]).all()
    np.testing.assert_array_equal(bad[0], good[0])


def test_a_config_that_layers_have_built_in_cannot_be_assigned():
    model = random_model(TINY)
    for changes, fixed in (
        ({"norm_eps": 1e-5}, "norm_eps"),
        ({"moe": replace(TINY.moe, top_k=1), "max_length": 64}, "moe"),
        ({"attention": replace(TINY.attention, rope=Rope())}, "attention"),
    ):
        with pytest.raises(ValueError, match=f"^{fixed} cannot be changed in a model"):
            model.cfg = replace(TINY, **changes)
        assert model.cfg == TINY
    with pytest.raises(ValueError, match="must be a ModelConfig, not dict"):
        model.cfg = {}
    # What no layer has is taken.
    model.cfg = replace(TINY, eos_ids=(7,), name="other")
    assert model.cfg.eos_ids == (7,)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("tiny-v3", jax.random.key(0)), r"made from a ModelConfig, such as .*not 'tiny-v3'"),
        ((TINY, 0), r"key must be a random key, such as jax\.random\.key\(0\), not 0"),
        ((TINY, jax.random.key(0), "float8"), "dtype must be one of float32, bfloat16, float16, not 'float8'"),
        ((TINY, jax.random.key(0), jnp.int32), "dtype must be one of .*, not int32"),
        ((TINY, jax.random.key(0), np.float64), "dtype must be one of .*, not float64"),
    ],
)
def test_a_model_is_made_of_a_config_and_a_key(arguments, message):
    with pytest.raises(ValueError, match=message):
        init(*arguments)


def test_mtp_of_a_model_without_modules():
    p = pair(CONFIGS["no dense layer, no mtp"][0])
    with pytest.raises(ValueError, match="has no MTP modules"):
        p.model(p.tokens, with_mtp=True)
