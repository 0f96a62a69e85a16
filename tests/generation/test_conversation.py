"""A cache that stays from prompt to prompt gives what one prompt alone gives."""

import numpy as np
import pytest
from generation.rigged import agreeing_model, config, random_prompts
from tiny import random_model

import deepseek_jax as dsj
from deepseek_jax.generation.conversation import Conversation

NEW, LENGTH = 12, 128


@pytest.mark.parametrize("depth", [0, pytest.param(1, marks=pytest.mark.slow), 2])
def test_every_turn_is_that_of_its_prompt_alone(depth):
    """Longer prompts, one that takes back much, one that takes back all; drafts are the same as well, so that the MTP
    modules' caches are."""
    model = agreeing_model(config(depth), mixing=0.35)
    first, more, other = random_prompts(model.cfg, (9, 40, 7))
    talk, use_mtp = Conversation(model, LENGTH, use_mtp=depth > 0), depth > 0
    prompt, fed, accepted = first, [], 0
    for turn in range(5):
        run = talk.stream(prompt, NEW)
        fed.append(run._fed)
        for _ in run:
            pass
        (tokens,), info = run.result()
        (alone,), wanted = dsj.generate(model, [prompt], NEW, use_mtp=use_mtp, cache_length=LENGTH)
        assert tokens == alone
        np.testing.assert_allclose(info.logprobs[0], wanted.logprobs[0], atol=2e-5)
        assert (info.drafted, info.accepted) == (wanted.drafted, wanted.accepted)
        accepted += info.accepted[0]
        prompt = [prompt + tokens + more, prompt + tokens + other, prompt[:20] + other, other, first][turn]
    back = 2 * depth
    # A draft that the last step accepts may be in the cache already.
    least = [0, 9 + NEW - 1 - back, 9 + 40 + 2 * NEW - 1 - back, 20 - back, 0]
    assert all(0 <= a - b <= min(depth, 1) for a, b in zip(fed, least, strict=True)), (fed, least)
    assert (accepted > 0) == use_mtp


def test_a_turn_left_early_is_gone_on_from():
    model = random_model(config(0))
    (prompt,) = random_prompts(model.cfg, (9,))
    talk = Conversation(model, LENGTH)
    run = talk.stream(prompt, NEW)
    said = next(run)[0]
    again = talk.stream(prompt + said, NEW - len(said))
    assert list(run) == []
    assert run.result()[1].finish_reason == ["interrupted"]
    for _ in again:
        pass
    assert said + again.result()[0][0] == dsj.generate(model, [prompt], NEW)[0][0]


def test_a_prompt_beyond_the_length_is_refused_and_nothing_lost():
    model = random_model(config(0))
    (prompt,) = random_prompts(model.cfg, (9,))
    talk = Conversation(model, 16)
    with pytest.raises(ValueError, match="beyond cache_length=16"):
        talk.stream(prompt, 8)
    assert len(next(talk.stream(prompt, 7))[0]) == 1
    with pytest.raises(ValueError, match="beyond the 256"):
        Conversation(model, 257)
