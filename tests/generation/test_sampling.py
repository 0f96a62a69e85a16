"""Sampling follows the exact probabilities after the filters, with drafts and without, row by row."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from generation.rigged import CHUNK, PROMPT_LENGTHS, config, full_forward, padded, random_prompts
from scipy.stats import chi2
from tiny import random_model

import deepseek_jax as dsj
from deepseek_jax.generation.sampling import distribution, make_sampling, packed, unpacked

V = 6
SETTINGS = (
    {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0},
    {"temperature": 0.7, "top_k": 3, "top_p": 1.0, "min_p": 0.0},
    {"temperature": 1.4, "top_k": 0, "top_p": 0.8, "min_p": 0.0},
    {"temperature": 1.2, "top_k": 5, "top_p": 0.95, "min_p": 0.25},
)
ROWS = 3000
NEW = 3
PROMPT = [2, 5, 0, 3, 3]


def filtered(logits, temperature, top_k, top_p, min_p):
    """The definition in plain float64 loops: what a token's probability is after each filter in turn."""
    p = np.exp((logits - logits.max()) / temperature)
    p /= p.sum()
    order = sorted(range(len(p)), key=lambda i: (-p[i], i))
    if top_k:
        order = order[:top_k]
    total, mass, kept = sum(p[i] for i in order), 0.0, []
    for i in order:
        if mass >= top_p * total:
            break
        kept.append(i)
        mass += p[i]
    kept = [i for i in kept if p[i] >= min_p * p[order[0]]]
    result = np.zeros_like(p)
    result[kept] = p[kept] / p[kept].sum()
    return result


def exact_joint(model, settings) -> np.ndarray:
    """Probability of each continuation of NEW tokens, [V] * NEW."""
    prefixes = list(itertools.product(range(V), repeat=NEW - 1))
    logprobs, *_ = full_forward(model, np.array([PROMPT + list(p) for p in prefixes], np.int32))
    logprobs = np.asarray(logprobs, np.float64)[:, len(PROMPT) - 1 :]
    joint = np.zeros((V,) * NEW)
    for row, prefix in zip(logprobs, prefixes, strict=True):
        conditionals = [filtered(step, **settings) for step in row]
        before = np.prod([c[t] for c, t in zip(conditionals, prefix, strict=False)])
        joint[prefix] = before * conditionals[-1]
    return joint


@pytest.mark.parametrize("depth", [0, 1, pytest.param(2, marks=pytest.mark.slow)])
def test_tokens_follow_the_exact_joint_distribution(depth, capsys):
    """Chi-square of each group of rows against probabilities enumerated from the full forward pass."""
    model = random_model(config(max(depth, 1), vocab_size=V), seed=3)
    rows = {name: np.repeat([s[name] for s in SETTINGS], ROWS) for name in SETTINGS[0]}
    tokens, info = dsj.generate(
        model, [PROMPT] * (ROWS * len(SETTINGS)), NEW, **rows, seed=11, use_mtp=depth > 0, stop_ids=(),
        cache_length=8, chunk=4,
    )  # fmt: skip
    tokens = np.array(tokens).reshape(len(SETTINGS), ROWS, NEW)
    if depth:
        accepted = np.array(info.accepted).reshape(len(SETTINGS), ROWS)
        share = accepted.sum() / np.sum(info.drafted)
        assert 0.1 < share < 0.9
        assert all(len(set(group)) > 1 for group in accepted)
    for group, settings in zip(tokens, SETTINGS, strict=True):
        joint = exact_joint(model, settings)
        counts = np.zeros_like(joint)
        np.add.at(counts, tuple(group.T), 1)
        assert counts[joint == 0].sum() == 0, "a token that the filters drop was drawn"
        often = joint * ROWS >= 5
        expected = np.append(joint[often], joint[~often].sum()) * ROWS
        observed = np.append(counts[often], counts[~often].sum())
        if expected[-1] < 5:
            expected, observed = expected[:-1] * ROWS / expected[:-1].sum(), observed[:-1]
        p_value = chi2.sf(((observed - expected) ** 2 / expected).sum(), len(expected) - 1)
        with capsys.disabled():
            print(f"\ndepth {depth}, {len(expected)} outcomes, p = {p_value:.3f}", end="")
        assert p_value > 1e-4


def test_filters_are_those_of_the_definition():
    rng = np.random.default_rng(0)
    cases = list(itertools.product((0.5, 1.0, 2.0), (0, 1, 4, 50), (0.3, 0.9, 1.0), (0.0, 0.2, 1.0)))
    logits = rng.normal(0, 2, (len(cases), 2, 20)).astype(np.float32)
    sampling = make_sampling(len(cases), *np.array(cases).T, seed=0)
    found = np.asarray(jax.jit(distribution)(logits, sampling))
    for row, case in enumerate(cases):
        for t in range(2):
            expected = filtered(logits[row, t].astype(np.float64), *case)
            np.testing.assert_allclose(found[row, t], expected, atol=1e-6, err_msg=str(case))


def test_equal_logits_are_kept_in_order_of_their_ids():
    sampling = make_sampling(2, [1.0, 0.0], 2, 1.0, 0.0, 0)
    p = jax.jit(distribution)(jnp.zeros((2, 1, 5)), sampling)
    np.testing.assert_allclose(p[:, 0], [[0.5, 0.5, 0, 0, 0], [1, 0, 0, 0, 0]], atol=1e-7)


def test_the_largest_logit_is_numpys():
    logits = np.random.default_rng(0).normal(size=(5, 3, 200)).astype(np.float32)
    logits[0] = 1.0
    logits[1, :, 7:] = -np.inf
    logits[2, 0, 190] = 9.0
    logits[2, 1:, [130, 131]] = np.inf
    logits[3, 1] = -np.inf
    logits[4, :, [70, 140]] = np.nan
    p = jax.jit(distribution)(logits, make_sampling(5, 0.0, 0, 1.0, 0.0, 0))
    np.testing.assert_array_equal(np.argmax(p, -1), np.argmax(logits, -1))
    np.testing.assert_array_equal(p.sum(-1), 1.0)


@pytest.mark.parametrize(
    ("temperature", "top_p", "min_p"),
    [
        *((t, 1.0, 0.0) for t in (1e-300, 1e-40, 1e-38, 1.2e-38, 1e-30, 1e-6)),
        *((1.0, p, 0.0) for p in (5e-324, 1e-300, 1e-45, 1e-40, 1.2e-38, 1e-30)),
        (1.0, 1.0, 1.0),
    ],
)
def test_the_smallest_settings_are_greedy_below_float32s_range_too(temperature, top_p, min_p):
    logits = np.random.default_rng(0).normal(0, 3, (1, 4, 9)).astype(np.float32)
    p = jax.jit(distribution)(logits, make_sampling(1, temperature, 0, top_p, min_p, 0))
    np.testing.assert_array_equal(np.argmax(p, -1), logits.argmax(-1))
    np.testing.assert_allclose(np.max(p, -1), 1.0, atol=1e-6)


@pytest.mark.parametrize("use_mtp", [False, True])
def test_a_rows_randomness_depends_on_its_seed_and_position_only(use_mtp):
    """Not on its place in the batch, which in a server or a pool of rollouts is any."""
    model = random_model(config(1))
    mine = [4, 7, 1]

    def run(seeds, neighbours, place=3, temperature=1.0):
        prompts = [*neighbours[:place], mine, *neighbours[place:]]
        common = {"stop_ids": (), "chunk": CHUNK, "use_mtp": use_mtp}
        tokens, info = dsj.generate(model, prompts, 20, temperature, seed=seeds, **common)
        return tokens[place], info

    others = random_prompts(model.cfg, PROMPT_LENGTHS[1:])
    base = run([1, 2, 3, 4, 5, 6, 7], others)[0]
    assert run([9, 9, 9, 4, 0, 0, 9], others[::-1], temperature=[0.0, 1.0, 3.0, 1.0, 2.0, 1.0, 0.5])[0] == base
    assert run([9, 9, 9, 0, 0, 9, 4], others[::-1], place=6)[0] == base
    assert run([4, 9, 9, 0, 0, 9, 9], others, place=0)[0] == base
    assert run([1, 2, 3, 8, 5, 6, 7], others)[0] != base
    same, info = run(7, [mine] * 6)
    assert info.seed[0] == 7
    assert len(set(info.seed)) == 7
    assert run([1, 2, info.seed[3], 4, 5, 6, 7], others, place=2)[0] == same


def test_what_is_recorded_is_what_a_full_forward_pass_says():
    """With rows that draft and rows that do not, limits and stop ids a row. Draws of rows without drafts are those of
    plain decoding."""
    model = random_model(config(1))
    cfg, prompts, rows = model.cfg, random_prompts(config(1)), len(PROMPT_LENGTHS)
    asked = {
        "temperature": [1.0, 0.0, 0.7, 1.4, 1.2, 1.0, 0.7],
        "top_k": [0, 0, 3, 0, 40, 0, 0],
        "top_p": [1.0, 1.0, 1.0, 0.8, 0.95, 0.5, 1.0],
        "min_p": [0.0, 0.0, 0.0, 0.0, 0.02, 0.0, 0.0],
    }
    common = {**asked, "seed": list(range(rows)), "chunk": CHUNK}
    drafts = [True, True, True, True, True, False, False]
    record = ("routing", "kept_size", "kept_mask")
    free, _ = dsj.generate(model, prompts, 20, stop_ids=(), use_mtp=drafts, record=record, **common)
    limits, stops = [20, 9, 1, 20, 20, 13, 20], [()] * 4 + [(free[4][6], 3, free[4][5])] + [()] * 2
    tokens, info = dsj.generate(model, prompts, limits, stop_ids=stops, use_mtp=drafts, record=record, **common)
    assert tokens[4] == free[4][: 1 + min(free[4].index(stop) for stop in (free[4][5], free[4][6]))]
    assert [len(row) for i, row in enumerate(tokens) if i != 4] == [n for i, n in enumerate(limits) if i != 4]
    assert all(row == whole[: len(row)] for row, whole in zip(tokens, free, strict=True))
    assert info.finish_reason == ["stop" if i == 4 else "length" for i in range(rows)]
    assert [n > 0 for n in info.drafted] == [i in (0, 1, 3, 4) for i in range(rows)]
    assert sum(info.accepted) > 0
    plain, plain_info = dsj.generate(model, prompts, 20, stop_ids=(), **common)
    assert free[5:] == plain[5:]
    assert plain_info.routing is plain_info.kept_size is plain_info.kept_mask is None

    whole = padded([p + t for p, t in zip(prompts, tokens, strict=True)], max(PROMPT_LENGTHS) + 20)
    out = jax.jit(lambda model, tokens: (model(tokens).logits, model(tokens).aux.expert_index))(model, whole)
    logits, routing = (np.asarray(a) for a in out)
    filters = 0
    for row, (prompt, new) in enumerate(zip(prompts, tokens, strict=True)):
        first, last = len(prompt), len(prompt) + len(new)
        np.testing.assert_array_equal(info.routing[row], routing[:, row, : last - 1])
        settings = {name: values[row] for name, values in asked.items()}
        found = logits[row, first - 1 : last - 1].astype(np.float64)
        at = np.arange(len(new)), new
        raw = found - np.logaddexp.reduce(found, axis=-1, keepdims=True)
        np.testing.assert_allclose(info.logprobs[row], raw[at], atol=2e-5)
        if settings["temperature"] == 0:
            p = np.eye(cfg.vocab_size)[found.argmax(-1)]
        else:
            p = np.array([filtered(step, **settings) for step in found])
        np.testing.assert_allclose(info.behaviour_logprobs[row], np.log(p[at]), atol=5e-5)
        assert info.kept_size[row] == (p > 0).sum(-1).tolist()
        np.testing.assert_array_equal(unpacked(info.kept_mask[row], cfg.vocab_size), p > 0)
        filters += (p == 0).any() and settings["temperature"] > 0
    assert filters >= 3


def test_bits_come_back_as_they_were_packed():
    kept = np.random.default_rng(0).random((2, 3, 70)) < 0.5
    mask = np.asarray(packed(jnp.asarray(kept)))
    assert (mask.shape, mask.dtype) == ((2, 3, 3), np.uint32)
    np.testing.assert_array_equal(unpacked(mask, 70), kept)
