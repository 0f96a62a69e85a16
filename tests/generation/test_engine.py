"""Generation equals the full forward pass, whatever the batch, the chunks and the drafts."""

import jax
import numpy as np
import pytest
from generation.rigged import (
    CHUNK,
    PROMPT_LENGTHS,
    agreeing_model,
    config,
    full_forward,
    nan_model,
    padded,
    random_prompts,
)
from tiny import random_model

import deepseek_jax as dsj
from deepseek_jax.configs.schema import Compressed, HyperConnections, Indexer
from deepseek_jax.generation import loop
from deepseek_jax.generation.engine import stream
from deepseek_jax.generation.layers import unstacked

NEW = 30
NEAR_TIE = 1e-4


@pytest.fixture(scope="module")
def model():
    return random_model(config())


@pytest.fixture(scope="module")
def prompts():
    return random_prompts(config())


@pytest.fixture(scope="module")
def plain(model, prompts):
    return dsj.generate(model, prompts, NEW, stop_ids=(), chunk=CHUNK)


def forward_of(model, prompts, tokens):
    """Log-probabilities and margins at the positions that produced each row's new tokens."""
    rows = [p + t for p, t in zip(prompts, tokens, strict=True)]
    logprobs, margins, _ = map(np.asarray, full_forward(model, padded(rows, max(PROMPT_LENGTHS) + NEW)))
    spans = [slice(len(p) - 1, len(p) - 1 + len(t)) for p, t in zip(prompts, tokens, strict=True)]
    return [logprobs[i, s] for i, s in enumerate(spans)], [margins[i, s] for i, s in enumerate(spans)]


def test_greedy_tokens_and_logprobs_are_those_of_the_full_forward_pass(model, prompts, plain):
    tokens, info = plain
    logprobs, margins = forward_of(model, prompts, tokens)
    for row, expected in enumerate(logprobs):
        assert len(tokens[row]) == NEW
        clear = margins[row] > NEAR_TIE
        assert clear.sum() > NEW // 2
        np.testing.assert_array_equal(np.array(tokens[row])[clear], expected.argmax(-1)[clear])
        np.testing.assert_allclose(info.logprobs[row], expected[np.arange(NEW), tokens[row]], atol=2e-5)
    assert info.finish_reason == ["length"] * len(prompts)
    assert info.drafted == info.accepted == [0] * len(prompts)


def test_a_row_alone_gives_what_it_gives_in_a_batch(model, prompts, plain):
    for row, prompt in enumerate(prompts):
        alone, info = dsj.generate(model, [prompt], NEW, stop_ids=(), chunk=CHUNK)
        assert alone[0] == plain[0][row]
        np.testing.assert_allclose(info.logprobs[0], plain[1].logprobs[row], atol=2e-5)


def test_the_chunk_changes_nothing(model, prompts, plain):
    assert dsj.generate(model, prompts, NEW, stop_ids=(), chunk=64)[0] == plain[0]


def test_nothing_is_compiled_again_for_other_lengths_settings_and_stops(model, prompts, plain):
    prefill, decode = loop.compiled()
    before = prefill.jitted._cache_size(), decode.jitted._cache_size()
    other = random_prompts(model.cfg, [3, 40, 1, 12, 8, 5, 2], seed=1)
    settings = {"temperature": 0.5, "top_k": [0, 1, 2, 3, 4, 5, 6], "top_p": 0.9, "min_p": 0.1, "seed": 4}
    dsj.generate(model, other, 70, chunk=CHUNK, stop_ids=(5, 6, 7), **settings)
    dsj.generate(model, [[1]] * 7, 1, chunk=CHUNK)
    assert (prefill.jitted._cache_size(), decode.jitted._cache_size()) == before


# Rings shorter than texts, and entries: what decoding takes back differs by layer.
V4 = {
    "n_layers": 3,
    "n_dense_layers": 0,
    "attention": Compressed(4, 16, 8, 32, 2, 8, 6, (0, 4, 8), Indexer(16, 16, 3)),
    "residual": HyperConnections(),
}
DEPTHS = {"1": config(1), "2": config(2), "2, V4": config(2, **V4)}
SLOWLY = ["1", "2", pytest.param("2, V4", marks=pytest.mark.slow)]


@pytest.mark.parametrize("depth", SLOWLY)
def test_greedy_with_drafts_gives_the_plain_tokens(depth, capsys):
    model = agreeing_model(DEPTHS[depth], mixing=0.25)
    prompts = random_prompts(model.cfg)
    plain, plain_info = dsj.generate(model, prompts, NEW, stop_ids=(), chunk=CHUNK)
    tokens, info = dsj.generate(model, prompts, NEW, stop_ids=(), chunk=CHUNK, use_mtp=True)
    _, margins = forward_of(model, prompts, plain)
    equal = near_ties = 0
    for row in range(len(prompts)):
        assert len(tokens[row]) == NEW
        differ = np.flatnonzero(np.array(tokens[row]) != plain[row])
        # After a flipped near-tie the two texts differ and are no longer compared.
        end = differ[0] if differ.size else NEW
        equal += end
        if differ.size:
            assert margins[row][end] < NEAR_TIE, (row, end, margins[row][end])
            near_ties += 1
        np.testing.assert_allclose(info.logprobs[row][:end], plain_info.logprobs[row][:end], atol=2e-5)
    with capsys.disabled():
        print(f"\ndepth {depth}: {equal} tokens equal, {near_ties} near-ties flipped, ", end="")
        print(f"{sum(info.accepted)} of {sum(info.drafted)} drafts accepted")
    assert equal >= 0.9 * NEW * len(prompts)
    share = np.array(info.accepted) / np.array(info.drafted)
    assert 0.1 < share.mean() < 0.9
    assert len(set(info.accepted)) > 1


def test_drafts_that_always_hold_save_steps():
    model = agreeing_model(config(1), mixing=0.0)
    prompts = random_prompts(model.cfg)
    run = stream(model, prompts, 21, stop_ids=(), chunk=CHUNK, use_mtp=True, steps=11)
    # One token in the first step, which has no draft, then two a step.
    assert [len(new) for new in next(run)] == [21] * len(prompts)
    assert run.result()[1].accepted == [10] * len(prompts)
    assert run.result()[1].drafted == [10] * len(prompts)


@jax.jit
def mtp_probabilities(model, temperature, tokens_BT):
    return [jax.nn.softmax(x / temperature) for x in model(tokens_BT, with_mtp=True).mtp_logits]


@pytest.mark.parametrize("case", SLOWLY)
def test_drafts_come_from_the_mtp_modules_on_true_tokens(case):
    """After acceptances and rejections, the caches of all modules hold what a full pass computes."""
    model = random_model(DEPTHS[case])
    depth = model.cfg.mtp_depth
    prompts = random_prompts(model.cfg)
    run = stream(model, prompts, NEW, 3.0, stop_ids=(), chunk=CHUNK, use_mtp=True, steps=5)
    next(run)
    next(run)
    state = run._state
    known, tokens = np.asarray(state.known), np.asarray(state.tokens)
    assert 0 < sum(run.result()[1].accepted) < sum(run.result()[1].drafted)
    rows = [tokens[row, : known[row] + depth].tolist() for row in range(len(prompts))]
    expected = mtp_probabilities(model, 3.0, padded(rows, max(PROMPT_LENGTHS) + NEW))
    for d in range(depth):
        for row in range(len(prompts)):
            np.testing.assert_allclose(state.q[row, d], expected[d][row, known[row] - 2], atol=1e-5)


@pytest.mark.parametrize("use_mtp", [False, True])
@pytest.mark.parametrize("place", [3, 4])
def test_a_stop_id_ends_its_row_and_stands_in_it(use_mtp, place):
    """With drafts that always hold, token 3 is a draft and comes in one step with token 4."""
    model = agreeing_model(config(1), mixing=0.0)
    prompts = random_prompts(model.cfg)
    tokens, _ = dsj.generate(model, prompts, NEW, stop_ids=(), chunk=CHUNK, use_mtp=use_mtp)
    stop = tokens[2][place]
    assert tokens[2].index(stop) == place
    stopped, info = dsj.generate(model, prompts, NEW, stop_ids=(stop,), chunk=CHUNK, use_mtp=use_mtp)
    for row, whole in enumerate(tokens):
        cut = whole.index(stop) + 1 if stop in whole else NEW
        assert stopped[row] == whole[:cut]
        assert len(info.logprobs[row]) == cut
        assert info.finish_reason[row] == ("stop" if stop in whole else "length")
    assert info.finish_reason[2] == "stop"
    if use_mtp:
        assert info.accepted[2] == 2


def test_the_models_eos_is_the_default_stop(model, prompts, plain):
    eos = plain[0][0][3]
    model = random_model(config(eos_ids=(eos, 9)))
    tokens, info = dsj.generate(model, prompts, NEW, chunk=CHUNK)
    assert tokens[0] == plain[0][0][: plain[0][0].index(eos) + 1]
    assert info.finish_reason[0] == "stop"


def test_what_was_made_is_kept_when_the_iteration_stops(model, prompts, plain):
    run = stream(model, prompts, NEW, stop_ids=(), chunk=CHUNK, steps=4)
    assert run.result()[0] == [[]] * len(prompts)
    first, second = next(run), next(run)
    assert [a + b for a, b in zip(first, second, strict=True)] == run.result()[0]
    assert run.result()[0] == [row[:8] for row in plain[0]]
    assert run.result()[1].finish_reason == ["interrupted"] * len(prompts)
    for _ in run:
        pass
    assert run.result()[0] == plain[0]


def test_the_whole_length_of_the_model_can_be_used(model):
    prompts = random_prompts(model.cfg, [model.cfg.max_length - 3, *PROMPT_LENGTHS[1:]])
    plain, _ = dsj.generate(model, prompts, 3, stop_ids=(), chunk=CHUNK)
    assert [len(row) for row in plain] == [3] * len(prompts)
    assert dsj.generate(model, prompts, 3, stop_ids=(), chunk=CHUNK, use_mtp=True)[0] == plain


@pytest.mark.slow
def test_unstacked_layers_change_nothing():
    cfg = config(n_layers=4)
    model = random_model(cfg)
    apart = unstacked(model, np.float32)
    assert [s.attn_norm.weight.get_value().shape[0] for s in apart.stacks] == [1, 1, 1, 1]
    assert unstacked(apart, np.float32) is apart
    assert [s.attn_norm.weight.get_value().shape[0] for s in model.stacks] == [1, 3]
    tokens = padded(random_prompts(cfg), 24)
    np.testing.assert_allclose(full_forward(apart, tokens)[0], full_forward(model, tokens)[0], atol=2e-5)
    # Its cache is made for its own stacks.
    prompt = tokens[:1, :20].tolist()
    (new,), _ = dsj.generate(model, prompt, 3, stop_ids=(), chunk=CHUNK)
    whole = full_forward(model, padded([prompt[0] + new], 24))[0]
    assert new == whole[0, 19:22].argmax(-1).tolist()


def test_weights_that_are_not_finite_are_one_error(model, prompts, plain):
    with pytest.raises(ValueError, match="not finite"):
        dsj.generate(nan_model(model), prompts, NEW, stop_ids=(), chunk=CHUNK)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompts": []}, "no prompt"),
        ({"prompts": [[1], []]}, "prompt 1 is empty"),
        ({"prompts": [1, 2]}, r"prompt 0 is 1, not a list of token ids\. dsj\.load_tokenizer"),
        ({"prompts": ["text"]}, r"prompt 0 is 'text', not a list of token ids"),
        ({"prompts": "text"}, "list of lists"),
        ({"prompts": 5}, "list of lists"),
        ({"prompts": [np.ones((2, 2), np.int32)]}, "not a list of token ids"),
        ({"prompts": [np.ones(3)]}, "must be integers"),
        ({"prompts": [[np.float32(1)]]}, "must be integers"),
        ({"prompts": [[True]]}, "must be integers"),
        ({"stop_ids": 1.5}, "stop_ids holds 1.5"),
        ({"temperature": "0.5"}, "must be a number"),
        ({"temperature": 1e39}, r"temperature=1e\+39 of row 0"),
        ({"temperature": None}, "must be a number"),
        ({"top_p": [[0.5], [0.5, 0.6]]}, "must be a number"),
        ({"prompts": [[1, 256]]}, "id 256, outside the vocabulary of 256"),
        ({"prompts": [[-1]]}, "id -1"),
        ({"prompts": [[1.5]]}, "must be integers"),
        ({"max_new_tokens": 0}, "max_new_tokens=0"),
        ({"max_new_tokens": 255}, "make 257, beyond the 256"),
        ({"cache_length": 9, "max_new_tokens": 8}, "beyond cache_length=9"),
        ({"cache_length": 0}, "cache_length=0"),
        ({"chunk": 0}, "chunk=0"),
        ({"temperature": -1}, "temperature=-1 of row 0"),
        ({"temperature": float("nan")}, "temperature=nan"),
        ({"temperature": float("inf")}, "temperature=inf"),
        ({"temperature": [1, 2]}, "shape"),
        ({"temperature": "hot"}, "must be a number"),
        ({"top_k": -1}, "top_k=-1"),
        ({"top_k": 1.5}, "top_k=1.5"),
        ({"top_p": 0.0}, "top_p=0"),
        ({"top_p": 1.1}, "top_p=1.1"),
        ({"min_p": 1.1}, "min_p=1.1"),
        ({"seed": -1}, "seed=-1"),
        ({"stop_ids": (256,)}, "stop_ids holds id 256"),
        ({"stop_ids": [(1,), (2,)]}, "stop_ids has 2 lists"),
        ({"prompts": [[1], [2]], "stop_ids": [(1,), 2]}, "stop_ids holds 2 beside lists"),
        ({"max_new_tokens": [1, 2]}, "max_new_tokens has 2 values"),
        ({"prompts": [[1], [2]], "max_new_tokens": [1, 0]}, "max_new_tokens=0"),
        ({"max_new_tokens": 10**20}, "beyond the 256"),
        ({"use_mtp": [True, False]}, "one for each of 1 rows"),
        ({"record": ("text",)}, "record holds 'text': choose among routing, kept_size, kept_mask"),
    ],
)
def test_bad_arguments_are_one_clear_error(model, changes, message):
    with pytest.raises(ValueError, match=message):
        dsj.generate(model, **{"prompts": [[1, 2]], **changes})


@pytest.mark.parametrize("model", ["checkpoints/tiny-v3", None])
def test_what_is_no_model_is_named(model):
    with pytest.raises(ValueError, match=r"must be one that dsj\.init or dsj\.load_pretrained gave, not"):
        dsj.generate(model, [[1, 2]])


def test_routing_needs_experts():
    with pytest.raises(ValueError, match="has no experts"):
        dsj.generate(random_model(config(0, n_dense_layers=2, moe=None)), [[1]], record="routing")


def test_drafts_need_mtp_modules():
    with pytest.raises(ValueError, match="no MTP modules"):
        dsj.generate(random_model(config(0)), [[1]], use_mtp=True)
