"""Text about pictures: the same tokens as whole passes over all that is known, several pictures a prompt."""

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from tiny_janus import IMAGE, pictures, run, tiny_janus

from deepseek_jax import generate
from deepseek_jax.multimodal.pictures import read_picture, shown, write_png

P, NEW = 16, 6
PROMPTS = ([1, *[IMAGE] * P, 7, 8, *[IMAGE] * P, 9], [1, 20, *[IMAGE] * P, 30, 31, 32])


@pytest.fixture(scope="module")
def images():
    a, b, c = pictures(3, seed=11)
    return [[a, b], [c]]


def test_tokens_and_their_probabilities(images):
    model = tiny_janus()
    tokens, info = generate(model, PROMPTS, NEW, stop_ids=(), images=images)
    texts, rows = [[*p, *new] for p, new in zip(PROMPTS, tokens, strict=True)], np.zeros((2, 48), np.int32)
    for row, text in zip(rows, texts, strict=True):
        row[: len(text)] = text
    segments = np.array([np.arange(48) < len(text) for text in texts]).astype(np.int32)
    logits = np.asarray(run(model, rows, np.stack([*images[0], *images[1]]), segments).logits)
    for row, (prompt, new) in enumerate(zip(PROMPTS, tokens, strict=True)):
        own = logits[row, len(prompt) - 1 : len(prompt) - 1 + NEW]
        assert np.argmax(own, -1).tolist() == new
        expected = own - np.log(np.exp(own).sum(-1, keepdims=True))
        np.testing.assert_allclose(info.logprobs[row], expected[np.arange(NEW), new], atol=2e-5)


@pytest.mark.parametrize(
    ("prompts", "count", "message"),
    [
        ([[1, 5, 6]], 1, "prompt 0 has 0 tokens of pictures, its 1 pictures have 16 each"),
        ([[1, *[IMAGE] * 17, 6]], 1, "prompt 0 has 17 tokens of pictures"),
        ([[1, *[IMAGE] * 16]], 1, "prompt 0 ends in a picture"),
    ],
)
def test_pictures_and_their_places_have_to_match(prompts, count, message):
    with pytest.raises(ValueError, match=message):
        generate(tiny_janus(), prompts, NEW, images=[list(pictures(count))])


def test_without_pictures_the_language_model_goes_on():
    model, prompts = tiny_janus(), [[1, 5, 6], [1, 20, 30, 31, 32]]
    tokens, info = generate(model, prompts, NEW, stop_ids=())
    expected, same = generate(model.language, prompts, NEW, stop_ids=())
    assert (tokens, info.logprobs) == (expected, same.logprobs)


def test_options_of_prompts_without_pictures_are_refused(images):
    model = tiny_janus()
    with pytest.raises(ValueError, match="with images, use_mtp, cache_length, chunk and record stay as they are"):
        generate(model, PROMPTS, images=images, cache_length=64)
    with pytest.raises(ValueError, match="the model is no Janus"):
        generate(model.language, PROMPTS, images=images)


def test_a_call_says_what_does_not_match():
    model = tiny_janus()
    with pytest.raises(ValueError, match=r"images must have shape \[pictures, 8, 8, 3\], not \[1, 8, 9, 3\]"):
        model(np.array([[IMAGE] * 16]), np.zeros((1, 8, 9, 3), np.float32))
    with pytest.raises(ValueError, match="1 pictures have 16 tokens each, but image_id 250 stands 15 times"):
        model(np.array([[IMAGE] * 15]), pictures(1))
    with pytest.raises(ValueError, match=r"embeddings must be floats of shape \(1, 2, 64\)"):
        model.language(np.array([[1, 2]]), embeddings=jnp.zeros((1, 3, 64)))


@pytest.mark.parametrize(("width", "height"), [(100, 60), (37, 91), (50, 50), (8, 900)])
def test_a_picture_as_it_is_shown_equals_transformers(width, height, tmp_path):
    """Where its sizes are whole pixels without rounding; the grey is that of the bars."""
    from transformers.models.janus.image_processing_pil_janus import JanusImageProcessorPil

    rng = np.random.default_rng(width)
    write_png(tmp_path / "a.png", rng.integers(0, 256, (height, width, 3), dtype=np.uint8))
    picture = read_picture(tmp_path / "a.png")
    ours = shown(picture, 48)
    assert (ours.dtype, ours.shape) == (np.float32, (48, 48, 3))
    processor = JanusImageProcessorPil(image_mean=[0.5] * 3, image_std=[0.5] * 3, size={"height": 48, "width": 48})
    if all(float(n / max(width, height) * 48).is_integer() or n < 14 for n in (width, height)):
        theirs = np.asarray(processor(picture, return_tensors="np")["pixel_values"][0])
        np.testing.assert_allclose(ours, np.moveaxis(theirs, 0, -1), atol=1e-5)
    cut = [max(int(n / max(width, height) * 48), 14) for n in (width, height)]
    bars = np.isclose(ours, (127 / 255 - 0.5) / 0.5, atol=1e-6).all(-1)
    assert [int(bars.all(axis).sum()) for axis in (0, 1)] == [48 - size for size in cut]


def test_what_is_no_picture_is_named(tmp_path):
    (tmp_path / "a.png").write_text("no picture")
    with pytest.raises(ValueError, match=r"a.png is no picture that Pillow reads"):
        read_picture(tmp_path / "a.png")
    with pytest.raises(FileNotFoundError):
        read_picture(tmp_path / "b.png")
    with pytest.raises(ValueError, match="is no picture"):
        read_picture(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["a.png"]
    assert Image.MAX_IMAGE_PIXELS
