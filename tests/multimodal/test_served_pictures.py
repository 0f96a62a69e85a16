"""Prompts with pictures beside others, in slots: the texts that a Janus gives each alone."""

import base64
from dataclasses import replace
from io import BytesIO

import httpx2
import numpy as np
import openai
import pytest
from multimodal.test_understand import NEW, PROMPTS
from PIL import Image
from serving.served import Told, client, serving
from tiny_janus import IMAGE, pictures, tiny_config, tiny_janus

from deepseek_jax import generate
from deepseek_jax.generation.batcher import Batcher
from deepseek_jax.generation.request import Request
from deepseek_jax.multimodal.pictures import shown
from deepseek_jax.multimodal.prompts import PromptWriter
from deepseek_jax.multimodal.served import Chats, Seen
from deepseek_jax.text import bpe
from deepseek_jax.text.tokenizer import Tokenizer

IMAGES = [list(pictures(3, seed=11)[:2]), list(pictures(3, seed=11)[2:])]


@pytest.fixture(scope="module")
def batcher():
    model = tiny_janus()
    return Batcher(model.language, slots=3, length=64, chunk=8, steps=4, sight=Seen(model))


def told(batcher, *requests):
    ids, found = [batcher.submit(request) for request in requests], {}
    while (stats := batcher.stats()).running + stats.waiting:
        for delta in batcher.step():
            found.setdefault((delta.request, delta.choice), []).append(delta)
    return [[i for delta in found[number, 0] for i in delta.tokens] for number in ids], found


def test_pictures_are_seen_in_chunks_beside_others_and_nothing_of_them_is_kept(batcher):
    expected, info = generate(tiny_janus(), PROMPTS, NEW, stop_ids=(), images=IMAGES)
    words = [1, 5, 6, 7]
    (plain,), _ = generate(tiny_janus().language, [words], NEW, stop_ids=())
    asked = [Request(p, NEW, stop_ids=(), pictures=own) for p, own in zip(PROMPTS, IMAGES, strict=True)]
    texts, found = told(batcher, *asked, Request(words, NEW, stop_ids=()))
    assert texts == [*expected, plain]
    for number, own in zip((1, 2), info.logprobs, strict=True):
        said = [value for delta in found[number, 0] for value in delta.logprobs]
        np.testing.assert_allclose(said, own, atol=2e-5)
    # The same ids, and another picture; and two choices of one.
    other = pictures(1, seed=3)[:1]
    (new,), _ = generate(tiny_janus(), PROMPTS[1:], NEW, stop_ids=(), images=[list(other)])
    (text,), found = told(batcher, Request(PROMPTS[1], NEW, stop_ids=(), pictures=list(other), n=2))
    assert text == new != expected[1]
    both = list(found.values())
    assert [d.tokens for d in both[0]] == [d.tokens for d in both[1]]
    assert both[0][0].cached == 0


@pytest.mark.parametrize(
    ("prompt", "own", "message"),
    [
        ([1, 5, 6], IMAGES[1], "0 tokens of pictures, its 1 pictures have 16 each"),
        ([1, IMAGE, 6], [], "1 tokens of pictures, its 0 pictures"),
        ([1, *[IMAGE] * 16], IMAGES[1], "ends in a picture"),
        ([1, *[IMAGE] * 16, 5], [np.zeros((8, 9, 3))], "a picture has shape"),
    ],
)
def test_pictures_and_their_places_have_to_match(batcher, prompt, own, message):
    with pytest.raises(ValueError, match=message):
        batcher.check(Request(prompt, NEW, pictures=own))


MARKS = ["<begin_of_image>", "<end_of_image>", "<image_placeholder>", "<|User|>", "<|Assistant|>"]


@pytest.fixture(scope="module")
def janus():
    """A tokenizer with a Janus's tokens, and its config."""
    backend = bpe.train_tokenizer(["some text to learn from"], 264)
    backend.add_special_tokens(MARKS)
    tokenizer = Tokenizer(backend, {"bos_token": bpe.BOS, "eos_token": bpe.EOS})
    language = replace(tiny_config().language, vocab_size=400)
    return tokenizer, replace(tiny_config(), language=language, image_id=tokenizer.id_of("<image_placeholder>"))


def drawing(colour=(200, 30, 60)):
    image, file = Image.new("RGB", (12, 6), colour), BytesIO()
    image.save(file, format="PNG")
    return image, "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def test_a_chat_s_picture_is_shown_to_the_engine(janus):
    tokenizer, cfg = janus
    engine, (image, url) = Told(lambda request, choice: [*tokenizer.encode("Red.", add_bos=False), 1]), drawing()
    part, text = {"type": "image_url", "image_url": {"url": url}}, "What <image_placeholder> is this?"
    ask = [{"role": "user", "content": [part, {"type": "text", "text": text}]}]
    talk = [*ask, {"role": "assistant", "content": "Red."}, {"role": "user", "content": "Sure?"}]
    with serving(engine, tokenizer, shows=Chats(tokenizer, cfg)) as url, client(url) as c:
        for messages in (ask, talk):
            found = c.chat.completions.create(model="tiny", messages=messages)
            assert found.choices[0].message.content == "Red."
            asked = engine.asked[-1]
            np.testing.assert_array_equal(asked.pictures[0], shown(image, 8))
            # What a user writes is no place of a picture.
            assert (len(asked.pictures), asked.prompt.count(cfg.image_id)) == (1, 16)
        assert engine.asked[0].prompt[:-2] == engine.asked[1].prompt[: len(engine.asked[0].prompt) - 2]
        assert c.models.retrieve("tiny").pictures
        wrong = [
            ("https://example.org/x.png", "messages[0].content[0].image_url.url"),
            ("data:image/png;base64,%", "messages[0].content[0].image_url.url"),
            ("data:image/png;base64,AAAA", "messages[0].content[0].image_url"),
        ]
        for address, param in wrong:
            message = {"role": "user", "content": [{"type": "image_url", "image_url": {"url": address}}]}
            with pytest.raises(openai.BadRequestError) as error:
                c.chat.completions.create(model="tiny", messages=[message])
            assert error.value.param == param
        for messages in (talk[:2], [{"role": "assistant", "content": "x"}, *ask]):
            with pytest.raises(openai.BadRequestError, match="user and assistant in turn"):
                c.chat.completions.create(model="tiny", messages=messages)
    engine = Told(lambda request, choice: [1])
    with serving(engine, tokenizer) as url, httpx2.Client(base_url=url) as web:  # of a model that is shown none
        answer = web.post("/v1/chat/completions", json={"messages": ask})
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "messages[0].content[0].type")


def test_one_message_is_what_deepseek_s_processor_writes(janus):
    tokenizer, cfg = janus
    writer, chats = PromptWriter(tokenizer, cfg), Chats(tokenizer, cfg)
    for content, count in ((["What is this?"], 0), ([None, " What is this? "], 1), ([None, None, "Which?"], 2)):
        text = next(part for part in content if part)
        assert chats.chat([{"role": "user", "content": content}])[1] == writer.about_pictures(text, count)
