"""The whole server: the real client, HTTP, the worker's thread, the batcher, and the shipped checkpoint."""

import asyncio
import json
import re
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import openai
import pytest
from browser import CHROMIUM, MISSING, browser
from served import client, serving
from soak import FORM, KINDS, LENGTH, NEW, PROMPTS, SLOTS, idle, soak

import deepseek_jax as dsj
from deepseek_jax.generation.batcher import Batcher
from deepseek_jax.generation.score import score
from deepseek_jax.serving.worker import Worker

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def loaded(root):
    folder = root / "checkpoints" / "tiny-v3"
    return dsj.load_pretrained(folder, dtype=np.float32), dsj.load_tokenizer(folder)


@pytest.fixture(scope="module")
def running(loaded):
    """A worker, its server's address, and a client."""
    worker = Worker(
        lambda: Batcher(loaded[0], slots=SLOTS, length=LENGTH, use_mtp=True, queue=64, chunk=16, routing=True)
    )
    asyncio.run(worker.started())
    with (
        serving(worker, loaded[1], name="tiny", context=LENGTH, drafts=True, routing=True) as url,
        client(url, timeout=60) as c,
    ):
        yield worker, url, c
    assert worker.error is None


@pytest.fixture(scope="module")
def expected(loaded):
    """Texts and log-probabilities of `dsj.generate`, of the prompts' greedy continuations and of two by chance."""
    model, tokenizer = loaded
    ids = [tokenizer.encode(text) for text in PROMPTS]
    greedy, info = dsj.generate(model, ids, NEW, cache_length=LENGTH)
    drawn, _ = dsj.generate(
        model, [ids[0]] * 3, NEW, temperature=0.8, top_p=0.9, seed=5, use_mtp=True, cache_length=LENGTH
    )

    def text(new):
        return tokenizer.decode(new, skip_special_tokens=True)

    return list(map(text, greedy)), [np.asarray(row) for row in info.logprobs], list(map(text, drawn))


def test_texts_are_those_of_generate_streamed_or_not_and_so_are_log_probabilities(running, expected):
    _, _, c = running
    for prompt, text, logprobs in zip(PROMPTS, *expected[:2], strict=True):
        settings = {"model": "tiny", "prompt": prompt, "max_tokens": NEW, "temperature": 0}
        whole = c.completions.create(logprobs=0, **settings)
        assert whole.choices[0].text == text
        found = np.asarray(whole.choices[0].logprobs.token_logprobs)
        # Drafts change no log-probability; a token that ends the text is no part of it.
        np.testing.assert_allclose(found, logprobs[: len(found)], atol=2e-5)
        assert "".join(x.choices[0].text for x in c.completions.create(stream=True, **settings)) == text


def test_a_repeated_prompt_is_scored_as_dsj_scores_it(running, loaded):
    """In several chunks; beside others; and its text goes on as without."""
    _, _, c = running
    model, tokenizer = loaded
    texts = ["".join(PROMPTS), *PROMPTS[:3]]
    settings = {"model": "tiny", "prompt": texts, "temperature": 0}
    scored = c.completions.create(echo=True, logprobs=1, max_tokens=1, **settings)
    plain = c.completions.create(max_tokens=1, **settings)
    for choice, bare, text in zip(scored.choices, plain.choices, texts, strict=True):
        ids = tokenizer.encode(text)
        found = choice.logprobs.token_logprobs
        assert (found[0], len(found)) == (None, len(ids) + 1)
        np.testing.assert_allclose(found[1:-1], score(model, ids), atol=2e-5)
        assert choice.text == text + bare.text
        # What harnesses take for greedy: the token's own value is the largest.
        assert found[-1] == max(choice.logprobs.top_logprobs[-1].values())


def test_choices_are_the_rows_of_generate_whatever_is_beside_them(running, expected):
    _, _, c = running
    settings = {"model": "tiny", "max_tokens": NEW, "temperature": 0.8, "top_p": 0.9}
    with ThreadPoolExecutor(8) as pool:
        asked = [
            pool.submit(c.completions.create, prompt=PROMPTS[0], n=3, seed=5, **settings),
            *(pool.submit(c.completions.create, prompt=prompt, **settings) for prompt in PROMPTS * 2),
        ]
    assert [choice.text for choice in asked[0].result().choices] == expected[2]
    # The prompt is counted once.
    assert asked[0].result().usage.prompt_tokens == asked[1].result().usage.prompt_tokens


def test_a_chat_is_its_template_s_prompt_continued(running, loaded):
    _, _, c = running
    model, tokenizer = loaded
    messages = [{"role": "user", "content": "say <｜end▁of▁sentence｜>"}]
    prompt = tokenizer.chat(messages)
    (new,), info = dsj.generate(model, [prompt], NEW, cache_length=LENGTH, record="routing")
    settings = {"model": "tiny", "messages": messages, "max_tokens": NEW, "temperature": 0}
    found = c.chat.completions.create(**settings, extra_body={"routing": True})
    experts = np.sort(np.asarray(found.choices[0].routing["experts"]))
    np.testing.assert_array_equal(experts, np.sort(info.routing[0].transpose(1, 0, 2)[len(prompt) :]))
    assert found.choices[0].message.content == tokenizer.decode(new, skip_special_tokens=True)
    assert found.usage.prompt_tokens == len(prompt)
    again = c.chat.completions.create(**settings)
    assert again.usage.prompt_tokens_details.cached_tokens > 0
    assert again.choices[0].message.content == found.choices[0].message.content


def test_an_answer_follows_its_schema(running):
    _, _, c = running
    settings = {"model": "tiny", "messages": [{"role": "user", "content": "x"}], "response_format": FORM}
    found = c.chat.completions.create(n=2, seed=1, max_tokens=100, **settings)
    for choice in found.choices:
        assert choice.finish_reason == "stop"
        said = json.loads(choice.message.content)
        assert (set(said), said["b"] in ("x", "y"), 0 <= said["a"] <= 999) == ({"a", "b"}, True, True)


def test_a_client_that_leaves_frees_its_slot_within_a_call(running):
    worker, url, c = running
    settings = {"model": "tiny", "prompt": "x", "max_tokens": 100, "extra_body": {"stop_token_ids": []}}
    stream = c.completions.create(stream=True, **settings)
    next(stream)
    stream.close()
    assert idle(worker.stats)
    with client(url, timeout=0.02) as hasty, pytest.raises(openai.APITimeoutError):
        hasty.completions.create(**settings)
    assert idle(worker.stats)


@pytest.mark.skipif(CHROMIUM is None, reason=MISSING)
def test_the_page_shows_an_answer_its_drafts_and_its_experts(running, loaded):
    _, url, _ = running
    model, tokenizer = loaded
    prompt = tokenizer.chat([{"role": "user", "content": PROMPTS[0].strip()}])
    (new,), info = dsj.generate(model, [prompt], NEW, cache_length=LENGTH, record="routing")
    with browser() as page:
        page.open(f"{url}/")
        page.until("at('name').textContent === 'tiny'")
        page.run(f"at('temperature').value = 0; at('most').value = {NEW}; at('box').focus()")
        page.type(PROMPTS[0])
        page.press("Enter")
        page.until("at('send').textContent === 'send' && messages.length === 2")
        assert page.run("messages[1].content") == tokenizer.decode(new, skip_special_tokens=True)
        said = page.run("document.querySelector('article .said').textContent")
        assert re.match(rf"{NEW} tokens, [0-9.]+ a second, .*[0-9]+ of [0-9]+ drafts accepted", said)
        page.hover(".token")
        told = page.run("at('experts').textContent").splitlines()[0]
        first = info.routing[0][:, len(prompt)]
        found = [set(map(int, layer.split(":")[-1].split())) for layer in told.split(" · ")]
        assert found == [set(row) for row in first.tolist()]
        assert page.thrown == []


def test_a_soak_of_some_seconds(loaded):
    """Random requests, clients that leave in every phase, hostile bodies; ``soak.py`` runs for longer."""
    found = soak(*loaded, seconds=16, parts=2)
    assert (found.wrong, found.compiled) == ([], [])
    assert set(found.done) >= KINDS
    assert found.done["whole"] + found.done["streamed"] > 5
