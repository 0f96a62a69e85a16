"""Scores are the full forward pass's log-probabilities, in one window or several."""

import json

import numpy as np
import pytest
from generation.rigged import config, full_forward
from tiny import random_model, random_tokens

from deepseek_jax.convert.load import load_pretrained
from deepseek_jax.generation.score import score
from deepseek_jax.text.tokenizer import load_tokenizer


@pytest.fixture(scope="module")
def model():
    return random_model(config())


@pytest.mark.parametrize("length", [2, 16, 17, 50])
def test_scores_are_those_of_the_full_forward_pass(model, length):
    ids = np.asarray(random_tokens(model.cfg, 1, 50))[0]
    expected = np.asarray(full_forward(model, ids[None])[0])[0]
    found = score(model, ids[:length].tolist(), chunk=16)
    assert len(found) == length - 1
    np.testing.assert_allclose(found, expected[np.arange(length - 1), ids[1:length]], atol=2e-5)


def test_a_long_text_is_scored_in_overlapping_windows(model):
    ids = np.asarray(random_tokens(model.cfg, 1, 50))[0]
    found = score(model, ids.tolist(), window=20, chunk=16)
    assert len(found) == 49
    # Windows begin at 0, 10, 20, 30; each adds the tokens beyond the one before.
    for start, first, last in ((0, 1, 20), (10, 20, 30), (20, 30, 40), (30, 40, 50)):
        expected = np.asarray(full_forward(model, ids[None, start : start + 20])[0])[0]
        at = np.arange(first, last)
        np.testing.assert_allclose(np.array(found)[at - 1], expected[at - 1 - start, ids[at]], atol=2e-5)


@pytest.mark.parametrize(
    ("ids", "changes", "message"),
    [
        ([3], {}, "at least two"),
        ([], {}, "empty"),
        ([1, 256], {}, "outside the vocabulary"),
        ("text", {}, "ids is 'text', not a list of token ids"),
        (7, {}, "ids is 7, not a list"),
        ([1, 2.0], {}, "must be integers"),
        ([1, 2], {"window": 1}, "window=1"),
        ([1, 2], {"window": 257}, "window=257"),
        ([1, 2], {"chunk": 0}, "chunk=0"),
    ],
)
def test_bad_arguments_are_one_clear_error(model, ids, changes, message):
    with pytest.raises(ValueError, match=message):
        score(model, ids, **changes)


@pytest.mark.slow
def test_the_shipped_model_picks_as_many_lines_as_the_readme_says(root):
    """As lm-evaluation-harness asks: no BOS, and the white space at a context's end belongs to what goes on."""
    folder = root / "checkpoints" / "tiny-v3"
    model, words, right = load_pretrained(folder, dtype="float32"), load_tokenizer(folder), 0
    lines = (root / "experiments" / "lm_eval" / "python_lines.jsonl").read_text(encoding="utf-8").splitlines()
    for item in map(json.loads, lines):
        begun = len(words.encode(item["code"].rstrip())) - 1
        sums = [sum(score(model, words.encode(item["code"] + line)[1:])[begun - 1 :]) for line in item["lines"]]
        right += int(np.argmax(sums)) == item["right"]
    assert words.add_bos
    assert f"the right one of four lines {right} times of {len(lines)}" in (root / "README.md").read_text("utf-8")
