"""GRPO's loss: what counts, what is divided by what, which side is clipped, and what a mask leaves alone."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_jax.rl.objective import answer_mask, count, loss, reverse_kl, token_logprobs
from deepseek_jax.rl.variants import MATH, V3, V32, VARIANTS, Grpo

RNG = np.random.default_rng(0)
B, T = 4, 7
MASK = np.array(
    [[0, 0, 1, 1, 1, 0, 0], [0, 1, 1, 0, 0, 0, 0], [0, 0, 0, 1, 1, 1, 1], [0, 0, 1, 0, 0, 0, 0]], np.float32
)
LOGPROB, OLD, REFERENCE = (RNG.normal(-1, 0.3, (B, T)).astype(np.float32) for _ in range(3))
ADVANTAGE = np.array([1.5, -0.5, 0.7, -2], np.float32)
# Every part at work.
FORMS = {
    **VARIANTS,
    "token mean": replace(MATH, average="token", kl="k2"),
    "fixed": replace(MATH, average="fixed", length=5, high=0.28),
    "gspo": replace(V3, ratio="mean", low=3e-4, high=4e-4),
    "masked at once": replace(V32, delta=0.0),
}
jitted_loss = jax.jit(loss, static_argnums=0)


def of(cfg, logprob=LOGPROB, old=OLD, advantage=ADVANTAGE, mask=MASK, reference=REFERENCE, counts=None):
    return jitted_loss(cfg, logprob, old, advantage, mask, reference if cfg.beta else None, counts)


def gradient(cfg, logprob=LOGPROB, **changes):
    """[B, T]: of the loss by every log-probability."""
    return np.asarray(jax.jit(jax.grad(lambda a: of(cfg, a, **changes)[0]))(jnp.asarray(logprob)))


def one(ratio, advantage, cfg=MATH):
    """Loss and gradient by the ratio of one token."""
    cfg = replace(cfg, beta=0.0)

    def by_ratio(r):
        return of(cfg, jnp.log(r)[None, None], np.zeros((1, 1)), np.float32([advantage]), np.ones((1, 1)))[0]

    value, slope = jax.jit(jax.value_and_grad(by_ratio))(jnp.float32(ratio))
    return round(float(value), 5), round(float(slope), 5)


def test_for_a_bad_answer_the_loss_is_the_larger_of_the_negated_surrogates():
    assert one(3, -1) == (3, 1)
    assert one(0.5, -1) == (0.8, 0)
    assert one(3, 1) == (-1.2, 0)
    assert one(0.5, 1) == (-0.5, -1)
    _, seen = of(
        replace(MATH, beta=0), np.log([[3.0, 0.5]] * 2), np.zeros((2, 2)), np.array([1.0, -1]), np.ones((2, 2))
    )
    assert (float(seen["clipped_high"]), float(seen["clipped_low"])) == (0.25, 0.25)


def test_the_clip_has_two_sides_of_its_own_and_may_be_wide():
    asymmetric = replace(MATH, low=0.1, high=0.3)
    assert (one(1.25, 1, asymmetric)[1], one(1.35, 1, asymmetric)[1]) == (-1, 0)
    assert (one(0.85, -1, asymmetric)[1], one(0.95, -1, asymmetric)[1]) == (0, 1)
    assert one(9, 1, VARIANTS["r1"]) == (-9, -1)
    assert one(0.01, -1, VARIANTS["r1"])[1] == 1


@pytest.mark.parametrize("name", FORMS)
def test_parts_of_a_batch_add_up_to_its_loss_gradient_and_diagnostics(name):
    cfg, counts = FORMS[name], count(MASK)
    whole, seen = of(cfg)
    parts = [slice(0, 1), slice(1, 4)]
    rows = lambda at: {"logprob": LOGPROB[at], "old": OLD[at], "advantage": ADVANTAGE[at], "mask": MASK[at]}  # noqa: E731
    found = [of(cfg, **rows(at), reference=REFERENCE[at], counts=counts) for at in parts]
    np.testing.assert_allclose(sum(f[0] for f in found), whole, rtol=2e-5)
    for key, value in seen.items():
        np.testing.assert_allclose(sum(f[1][key] for f in found), value, atol=1e-6)
    split = [gradient(cfg, **rows(at), reference=REFERENCE[at], counts=counts) for at in parts]
    np.testing.assert_allclose(np.concatenate(split), gradient(cfg), atol=1e-6)


@pytest.mark.parametrize("name", FORMS)
def test_a_masked_answer_leaves_numerator_and_denominator(name):
    cfg = FORMS[name]
    mask = MASK.copy()
    mask[1] = 0
    kept = [0, 2, 3]
    rest = of(cfg, LOGPROB[kept], OLD[kept], ADVANTAGE[kept], MASK[kept], REFERENCE[kept])
    masked = of(cfg, mask=mask)
    np.testing.assert_allclose(masked[0], rest[0], rtol=1e-6)
    np.testing.assert_allclose(masked[1]["kl"], rest[1]["kl"], rtol=1e-6)
    assert (gradient(cfg, mask=mask)[1] == 0).all()
    nothing = np.zeros_like(MASK)
    assert float(of(cfg, mask=nothing)[0]) == 0
    assert (gradient(cfg, mask=nothing) == 0).all()


@pytest.mark.parametrize("name", FORMS)
def test_what_does_not_count_changes_nothing_whatever_it_is(name):
    cfg, out = FORMS[name], MASK == 0
    sentinels = [np.where(out, value, a) for value, a in ((np.nan, LOGPROB), (-np.inf, OLD), (1e9, REFERENCE))]
    found, seen = of(cfg, sentinels[0], sentinels[1], reference=sentinels[2])
    expected, wanted = of(cfg)
    np.testing.assert_array_equal(found, expected)
    jax.tree.map(np.testing.assert_array_equal, seen, wanted)
    moved = gradient(cfg, sentinels[0], old=sentinels[1], reference=sentinels[2])
    np.testing.assert_array_equal(moved, gradient(cfg))
    assert (moved[out] == 0).all()


def test_tokens_count_up_to_the_first_stop_id_of_any_kind_which_counts_too():
    #          prompt | answer
    tokens = [[8, 9, 3, 4, 9, 5, 0], [3, 3, 3, 8, 9, 8, 3], [3, 4, 5, 6, 7, 3, 4], [9, 3, 3, 3, 9, 0, 0]]
    start, length = [2, 3, 1, 2], [7, 7, 6, 4]
    mask, ended = answer_mask(np.array(tokens), np.array(start), np.array(length), (9, 8))
    assert mask.tolist() == [
        [0, 0, 1, 1, 1, 0, 0],
        [0, 0, 0, 1, 0, 0, 0],
        [0, 1, 1, 1, 1, 1, 0],
        [0, 0, 1, 1, 0, 0, 0],
    ]
    assert ended.tolist() == [True, True, False, False]
    changed = np.array(tokens)
    changed[0, 5:] = [8, 9]
    np.testing.assert_array_equal(answer_mask(changed, np.array(start), np.array(length), (8, 9))[0], mask)
    # One of the two alone: a text that ends on the other was cut.
    assert answer_mask(np.array(tokens), np.array(start), np.array(length), (9,))[1].tolist() == [
        True,
        True,
        False,
        False,
    ]
    assert answer_mask(np.array(tokens), np.array(start), np.array(length), ())[1].tolist() == [False] * 4
    truncated, _ = answer_mask(np.array(tokens), np.array(start), np.array(length), (9, 8), truncated="mask")
    np.testing.assert_array_equal(truncated, mask * ended[:, None])


def test_equal_groups_have_no_policy_gradient_but_feel_the_kl():
    silent = np.zeros(B, np.float32)
    for cfg in VARIANTS.values():
        assert (gradient(replace(cfg, beta=0.0), advantage=silent) == 0).all()
        moved = gradient(cfg, advantage=silent)
        assert (moved != 0)[MASK > 0].all()
        only_kl = of(cfg, advantage=silent)
        np.testing.assert_allclose(only_kl[0], cfg.beta * only_kl[1]["kl"], rtol=1e-6)


def test_on_the_first_step_ratios_are_1_and_the_gradient_is_reinforces():
    for cfg in (replace(MATH, beta=0), replace(V3, beta=0), replace(V32, beta=0)):
        value, seen = of(cfg, old=LOGPROB)
        assert float(seen["ratio"]) == 1
        assert float(seen["mismatch"]) == 0
        np.testing.assert_allclose(value, -ADVANTAGE.mean(), rtol=1e-6)
        tokens = MASK.sum(1, keepdims=True) if cfg.ratio == "token" else 1
        np.testing.assert_allclose(gradient(cfg, old=LOGPROB), -ADVANTAGE[:, None] * MASK / tokens / B, atol=1e-7)


def test_with_inner_steps_the_ratio_is_to_the_rollout_and_the_clip_acts():
    """Of a softmax policy over four tokens, which was rolled out once."""
    tokens, mask = np.array([[0, 1], [2, 2]]), np.ones((2, 2))
    advantage, cfg = np.float32([1, -1]), replace(MATH, beta=0)

    def policy(logits):
        return jax.nn.log_softmax(logits)[tokens]

    logits = jnp.zeros(4)
    old, seen = policy(logits), []
    for _ in range(3):
        slope, now = jax.grad(lambda a: of(cfg, policy(a), old, advantage, mask), has_aux=True)(logits)
        logits, seen = logits - 0.5 * slope, [*seen, now]
    assert [float(s["ratio"]) == 1 for s in seen] == [True, False, False]
    assert float(seen[0]["clipped_high"] + seen[0]["clipped_low"]) == 0
    assert float(seen[-1]["clipped_low"]) == 0.5
    np.testing.assert_allclose(old, np.log(0.25), rtol=1e-6)


def test_the_off_policy_mask_is_one_decision_an_answer_on_the_surrogate_only():
    # r1_grpo C5
    cfg, off = replace(V32, delta=0.5, low=0.9, high=9.0), LOGPROB.copy()
    # Old far above the policy: rows 1 (bad) and 0 (good) in the mean, row 3 (bad) less; row 2 outside its answer only.
    off[0], off[1], off[2], off[3] = (
        OLD[0] - 1,
        OLD[1] + [9, -3, 0.5, 9, 9, 9, 9],
        OLD[2] - 9 * (1 - MASK[2]),
        OLD[3] - 0.4,
    )
    value, seen = of(cfg, off)
    assert float(seen["masked"]) == 0.25
    moved, kl_only = gradient(cfg, off), gradient(cfg, off, advantage=np.zeros(B, np.float32))
    np.testing.assert_array_equal(moved[1], kl_only[1])
    assert (moved[1] != 0).any()
    for row in (0, 2, 3):
        assert (moved[row] != kl_only[row])[MASK[row] > 0].all()
    # It stays in what is divided by.
    unmasked = gradient(replace(cfg, delta=None), off)
    np.testing.assert_allclose(moved[[0, 2, 3]], unmasked[[0, 2, 3]], atol=1e-7)
    assert not np.allclose(moved[1], unmasked[1])
    assert jnp.shape(value) == ()
    # The mean does not depend on length, as V3's product does.
    assert float(of(replace(cfg, delta=0.39), off)[1]["masked"]) == 0.5
    assert float(of(replace(cfg, delta=0.41), off)[1]["masked"]) == 0.25


def test_a_ratio_beyond_e_20_is_cut_and_counted():
    far = OLD + np.float32(60)
    for cfg in (MATH, V3, V32):
        value, seen = of(cfg, far)
        assert np.isfinite(value)
        assert float(seen["cut"]) == 1
        assert np.isfinite(gradient(cfg, far)).all()
        assert float(of(cfg)[1]["cut"]) == 0
    assert [float(of(MATH, OLD + np.float32(far), reference=OLD)[1]["cut"]) for far in (19.9, 20.1)] == [0, 1]


def test_the_policy_is_divided_by_the_samplers_temperature():
    logits, tokens = RNG.normal(0, 2, (2, 4, 9)).astype(np.float32), RNG.integers(0, 9, (2, 4))
    found = token_logprobs(jnp.asarray(logits), tokens, np.array([0.7, 1.0]))
    assert found[:, 0].tolist() == [0, 0]
    for row, temperature in enumerate((0.7, 1.0)):
        scaled = logits[row].astype(np.float64) / temperature
        scaled -= np.logaddexp.reduce(scaled, -1, keepdims=True)
        # Entry t is of the token at t, by the logits before it.
        np.testing.assert_allclose(found[row, 1:], scaled[np.arange(3), tokens[row, 1:]], atol=1e-5)


def test_with_the_kept_set_the_ratio_is_1_on_policy_and_biased_without():
    # r1_grpo C6
    logits, tokens = RNG.normal(0, 2, (1, 4, 9)).astype(np.float32), np.array([[0, 0, 0, 0]])
    p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    kept = np.zeros((1, 4, 9), bool)
    for t in range(2, 4):  # the first token of the answer stands at 2; a prompt's tokens have no set
        kept[0, t, np.argsort(-p[0, t - 1])[:3]] = True
        tokens[0, t] = np.argsort(-p[0, t - 1])[t - 2]
    behaviour = [np.log(p[0, t - 1, tokens[0, t]] / p[0, t - 1, kept[0, t]].sum()) for t in (2, 3)]
    policy = lambda a, kept: token_logprobs(a, tokens, 1.0, kept)  # noqa: E731
    np.testing.assert_allclose(policy(jnp.asarray(logits), kept)[0, 2:], behaviour, atol=1e-5)
    removed = [p[0, t - 1, kept[0, t]].sum() for t in (2, 3)]
    without = policy(jnp.asarray(logits), None)[0, 2:]
    np.testing.assert_allclose(np.exp(without - np.array(behaviour)), removed, rtol=1e-5)
    slope = np.asarray(jax.grad(lambda a: policy(a, kept)[0, 2:].sum())(jnp.asarray(logits)))
    assert np.isfinite(slope).all()
    assert ((slope[0, 1:3] != 0) == kept[0, 2:]).all()


def test_distillation_is_over_the_whole_vocabulary():
    student, teacher = (RNG.normal(0, 2, (1, 2, 9)).astype(np.float32) for _ in range(2))
    p, q = (np.exp(a) / np.exp(a).sum(-1, keepdims=True) for a in (student, teacher))
    np.testing.assert_allclose(reverse_kl(student, teacher), (p * np.log(p / q)).sum(-1), rtol=1e-5)
    slopes = jax.grad(lambda *a: reverse_kl(*a).sum(), (0, 1))(jnp.asarray(student), jnp.asarray(teacher))
    expected = p * (np.log(p / q) - (p * np.log(p / q)).sum(-1, keepdims=True))
    np.testing.assert_allclose(slopes[0], expected, atol=1e-5)
    assert (np.asarray(slopes[1]) == 0).all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ratio": "product"}, r"Grpo\(ratio='product'\): choose one of token, sequence, mean"),
        ({"kl": "k1"}, "the gradient of k1 is 0"),
        ({"average": "mean"}, "choose one of answer, token, fixed"),
        ({"average": "fixed"}, "a length of at least 1 belongs"),
        ({"average": "fixed", "length": 0}, "a length of at least 1 belongs"),
        ({"length": 5}, "a length of at least 1 belongs"),
        ({"scale": "none", "ddof": 1}, "without a deviation"),
        ({"ddof": 2}, "ddof=2"),
        ({"low": -0.1}, "low=-0.1"),
        ({"high": float("inf")}, "high=inf"),
        ({"beta": "0.1"}, "beta must be a number"),
        ({"delta": -1.0}, "delta=-1.0"),
        ({"truncated": "drop"}, "choose one of keep, mask"),
    ],
)
def test_choices_that_contradict_one_another_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        Grpo(**changes)


def test_arrays_that_do_not_belong_together_are_refused():
    with pytest.raises(ValueError, match="needs the reference"):
        loss(MATH, LOGPROB, OLD, ADVANTAGE, MASK)
    with pytest.raises(ValueError, match="old has shape"):
        of(MATH, old=OLD[:, :3])
    with pytest.raises(ValueError, match="advantages have shape"):
        of(MATH, advantage=ADVANTAGE[:3])
