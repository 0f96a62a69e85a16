"""GRPO's three published forms against their equations, and exact values by enumeration."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_jax.rl.advantage import advantages, share_without_signal
from deepseek_jax.rl.objective import kl_terms, loss
from deepseek_jax.rl.variants import MATH, V3, V32, VARIANTS, Grpo

RNG = np.random.default_rng(1)
V = 6
POLICY, OLD, REFERENCE = (RNG.normal(0, 1, V).astype(np.float32) for _ in range(3))
FIRST = [1, 0, 0, 0]


def kl(logits, other=REFERENCE):
    p, q = jax.nn.log_softmax(logits), jax.nn.log_softmax(other)
    return (jnp.exp(p) * (p - q)).sum()


def forward_kl(logits):
    return -(jax.nn.softmax(REFERENCE) * jax.nn.log_softmax(logits)).sum()


def expected(kind, samples_of, logits, stopped=False):
    """The mean of an estimator over samples that are held fixed, by enumeration of the vocabulary."""
    log = jax.nn.log_softmax(logits)
    log_ratio = log - jax.nn.log_softmax(REFERENCE)
    log_old = log - jax.nn.log_softmax(samples_of)
    if stopped:
        terms = jnp.exp(log_old) * jax.lax.stop_gradient(kl_terms("k3", log_ratio))
    else:
        terms = kl_terms(kind, log_ratio, log_old)
    return (jax.lax.stop_gradient(jax.nn.softmax(samples_of)) * terms).sum()


def slope(function, *arguments):
    return np.asarray(jax.grad(function)(jnp.asarray(POLICY), *arguments))


def test_values_of_the_kl_estimators():
    exact = float(kl(POLICY))
    assert exact > 0.1
    for kind in ("k1", "k3"):
        np.testing.assert_allclose(expected(kind, POLICY, POLICY), exact, rtol=1e-5)
    for samples_of in (POLICY, OLD):
        np.testing.assert_allclose(expected("unbiased", samples_of, POLICY), exact, rtol=1e-5)
    assert abs(float(expected("k3", OLD, POLICY)) - exact) > 0.01, "off policy k3 is another number"
    assert (np.asarray(kl_terms("k3", RNG.normal(0, 2, 1000))) >= 0).all()


def test_gradients_of_the_kl_estimators_on_policy():
    of = lambda kind: slope(lambda logits: expected(kind, POLICY, logits))  # noqa: E731
    np.testing.assert_allclose(of("k1"), 0, atol=1e-6)
    np.testing.assert_allclose(of("k2"), slope(kl), atol=1e-6)
    np.testing.assert_allclose(of("k3"), slope(forward_kl), atol=1e-6)
    assert np.abs(of("k3") - slope(kl)).max() > 0.01
    np.testing.assert_allclose(of("unbiased"), slope(kl), atol=1e-6)


def test_off_policy_the_unbiased_kls_gradient_is_the_kls_where_both_factors_are_differentiated():
    # r1_grpo C4
    np.testing.assert_allclose(slope(lambda a: expected("unbiased", OLD, a)), slope(kl), atol=2e-6)
    stopped = slope(lambda a: expected("unbiased", OLD, a, stopped=True))
    assert np.abs(stopped - slope(kl)).max() > 0.01
    for kind in ("k2", "k3"):
        assert np.abs(slope(lambda a, kind=kind: expected(kind, OLD, a)) - slope(kl)).max() > 0.01


@pytest.mark.parametrize("name", ["deepseek-math", "v3.2"])
def test_the_losss_kl_has_the_same_gradients(name):
    """Through `loss`, of single tokens drawn from the old policy, weighed by their probabilities."""
    cfg = replace(VARIANTS[name], beta=1.0)
    log = lambda a: jax.nn.log_softmax(a)[:, None]  # noqa: E731

    def by_logits(logits, samples_of):
        def one(v):
            rows = [log(a)[v : v + 1] for a in (logits, samples_of, REFERENCE)]
            return loss(cfg, *rows[:2], np.zeros(1), np.ones((1, 1)), rows[2])[0]

        p = jax.nn.softmax(samples_of)
        return sum(p[v] * one(v) for v in range(V))

    wanted = {"deepseek-math": forward_kl, "v3.2": kl}[name]
    np.testing.assert_allclose(slope(by_logits, POLICY), slope(wanted), atol=2e-6)
    if name == "v3.2":
        np.testing.assert_allclose(slope(by_logits, OLD), slope(kl), atol=2e-6)


@pytest.mark.parametrize(
    ("scale", "ddof", "values"),
    [("std", 0, [1.7321] + [-0.5774] * 3), ("std", 1, [1.5] + [-0.5] * 3), ("none", 0, [0.75] + [-0.25] * 3)],
)
def test_advantages_of_one_right_answer_in_four(scale, ddof, values):
    # r1_grpo C1
    np.testing.assert_allclose(advantages(FIRST, np.zeros(4), scale, ddof).value, values, atol=5e-5)


def test_equal_rewards_in_float32_leave_no_residue():
    """Twelve of 1.1, whose float32 mean is another number: divided by its deviation that was -0.886."""
    rewards = np.full(12, 1.1, np.float32)
    residue = rewards - rewards.sum(dtype=np.float32) / np.float32(12)
    assert residue[0] != 0
    assert residue[0] / (residue.std() + np.float32(1e-8)) < -0.8
    assert (advantages(rewards, np.zeros(12)).value == 0).all()


@pytest.mark.parametrize(("average", "value"), [("answer", 0), ("token", 1 / 3), ("fixed", 1 / 4)])
def test_normalisations_of_two_answers_of_two_and_four_tokens(average, value):
    mask, logprob = np.array([[1, 1, 0, 0], [1, 1, 1, 1]]), np.full((2, 4), -1.0, np.float32)
    cfg = replace(MATH, beta=0.0, average=average, length=4 if average == "fixed" else None)
    found, _ = loss(cfg, logprob, logprob, np.array([1.0, -1]), mask)
    np.testing.assert_allclose(found, value, atol=1e-7)


def test_the_first_loss_of_deepseekmaths_form_is_0_and_its_gradient_is_not():
    rewards, mask = RNG.integers(0, 2, 8), np.arange(6) < RNG.integers(1, 7, 8)[:, None]
    advantage, logprob = advantages(rewards, np.zeros(8)).value, RNG.normal(-1, 0.2, (8, 6)).astype(np.float32)
    of = lambda average: replace(MATH, beta=0.0, average=average)  # noqa: E731
    value, slopes = jax.value_and_grad(lambda a: loss(of("answer"), a, logprob, advantage, mask)[0])(
        jnp.asarray(logprob)
    )
    assert abs(float(value)) < 1e-7
    assert np.abs(slopes).max() > 0.01
    assert abs(float(loss(of("token"), logprob, logprob, advantage, mask)[0])) > 0.01


def test_three_names_for_three_ratios_of_an_answer():
    # r1_grpo C3
    ratios = np.array([[1.5, 0.8, 1.1, 0.9]])
    of = lambda ratio: float(  # noqa: E731
        loss(replace(V3, beta=0.0, ratio=ratio), np.log(ratios), np.zeros((1, 4)), np.zeros(1), np.ones((1, 4)))[1][
            "ratio"
        ]
    )
    np.testing.assert_allclose([of("sequence"), of("mean"), of("token")], [1.188, 1.0440, 1.075], atol=5e-5)


@pytest.mark.parametrize(
    ("size", "row"),
    [
        (4, [0.96, 0.92, 0.81, 0.66, 0.45, 0.25, 0.12]),
        (8, [0.92, 0.85, 0.66, 0.43, 0.20, 0.06, 0.01]),
        (16, [0.85, 0.72, 0.44, 0.19, 0.04, 0.00, 0.00]),
        (32, [0.72, 0.52, 0.19, 0.03, 0.00, 0.00, 0.00]),
    ],
)
def test_the_share_of_groups_without_signal_is_arithmetic(size, row):
    found = [share_without_signal(p, size) for p in (0.01, 0.02, 0.05, 0.10, 0.18, 0.30, 0.50)]
    np.testing.assert_allclose(found, row, atol=0.0051)
    drawn = np.random.default_rng(0).random((2000, size)) < 0.1
    silent = advantages(drawn.ravel(), np.repeat(np.arange(2000), size)).silent
    assert abs(silent - share_without_signal(0.1, size)) < 0.04


def written_out(name, logprob, old, reference, advantage, lengths):
    """The papers' objectives in plain float64 loops, as losses; the numbers of `VARIANTS`."""
    cfg, answers = VARIANTS[name], []
    for i, n in enumerate(lengths):
        logs, olds, refs, A = logprob[i, :n], old[i, :n], reference[i, :n], advantage[i]
        if name in ("v3", "r1"):
            # V3 eq. 26-27: ratios of whole answers.
            ratio, far = np.exp(logs.sum() - olds.sum()), refs.sum() - logs.sum()
            surrogate = min(ratio * A, np.clip(ratio, 1 - cfg.low, 1 + cfg.high) * A)
            answers.append(surrogate - cfg.beta * (np.exp(far) - far - 1))
            continue
        steps = []
        for log, before, ref in zip(logs, olds, refs, strict=True):
            ratio, far = np.exp(log - before), ref - log
            surrogate, k3 = min(ratio * A, np.clip(ratio, 0.8, 1.2) * A), np.exp(far) - far - 1
            if name == "v3.2":
                surrogate *= not (A < 0 and (olds - logs).mean() > cfg.delta)
                k3 *= ratio
            steps.append(surrogate - cfg.beta * k3)
        answers.append(np.mean(steps))
    return -np.mean(answers)


@pytest.mark.parametrize("name", VARIANTS)
def test_each_form_is_its_papers_equation(name):
    # r1_grpo C2
    lengths = [3, 5, 1, 4, 5, 2]
    old, reference, logprob = (RNG.normal(-1.5, 0.5, (6, 5)) for _ in range(3))
    logprob[4] = old[4] - 0.8  # bad, and far from the policy
    advantage = np.array([1.2, -0.3, 0.7, -1, -0.6, 0])
    mask = np.arange(5) < np.array(lengths)[:, None]
    as_32 = [a.astype(np.float32) for a in (logprob, old)]
    found, seen = loss(VARIANTS[name], *as_32, advantage.astype(np.float32), mask, reference.astype(np.float32))
    np.testing.assert_allclose(found, written_out(name, logprob, old, reference, advantage, lengths), rtol=2e-5)
    assert (float(seen["masked"]) > 0) == (name == "v3.2")


def test_the_published_settings():
    assert Grpo() == Grpo(
        "token", 0.2, 0.2, "answer", None, scale="std", ddof=0, beta=0.0, kl="k3", delta=None, keep_routing=False,
        keep_sampling_mask=False, truncated="keep",
    )  # fmt: skip
    assert (MATH.beta, MATH.ratio, MATH.scale, MATH.kl) == (0.04, "token", "std", "k3")
    assert (V3.ratio, V3.average) == ("sequence", "answer")
    assert (VARIANTS["r1"].beta, VARIANTS["r1"].low, VARIANTS["r1"].high) == (0.001, 10, 10)
    assert (V32.ratio, V32.scale, V32.kl, V32.keep_routing, V32.keep_sampling_mask) == (
        "token", "none", "unbiased", True, True,
    )  # fmt: skip
