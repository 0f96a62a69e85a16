"""Pictures of text: codes by guidance as transformers draws them, seeds, prompts of any length, the way to pixels."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from tiny_janus import tiny_janus

from deepseek_jax.multimodal.draw import draw_pictures, guided
from deepseek_jax.multimodal.pictures import pixels

PAD = 3
PROMPTS = ([1, 40, 50, 60, 70, 9], [1, 80, 90, 9])


def alone(model, prompt, weight) -> np.ndarray:
    """The likeliest codes, each chosen after a whole pass over what is known, of a row with the prompt and one without;
    both are padded in front to one length."""
    rows = np.zeros((2, 6), np.int32)
    rows[:, -len(prompt) :] = [prompt, [prompt[0], *[PAD] * (len(prompt) - 2), prompt[-1]]]
    codes = np.zeros(model.cfg.n_codes, np.int32)
    for i in range(len(codes)):
        codes[i] = next_code(model, rows, codes, np.arange(6) >= 6 - len(prompt), i, weight)
    return codes


@jax.jit
def next_code(model, rows, codes, real, i, weight):
    x = jnp.concatenate([model.embed_text(rows), model.embed_codes(jnp.stack([codes, codes]))], axis=1)
    segments = jnp.broadcast_to(jnp.concatenate([real, codes == codes]).astype(jnp.int32), x.shape[:2])
    hidden = model.language(jnp.zeros(x.shape[:2], jnp.int32), None, segments, embeddings=x, logits="none").hidden
    return jnp.argmax(guided(model.code_logits(hidden[:, 5 + i][:, None])[:, 0], weight)[0])


@pytest.fixture(scope="module")
def greedy():
    return {w: draw_pictures(tiny_janus(), PROMPTS, PAD, weight=w, temperature=0).codes for w in (0.0, 1.0, 5.0)}


@pytest.mark.parametrize("weight", [0.0, 1.0, 5.0])
def test_codes_are_those_of_whole_passes(greedy, weight):
    """0 draws without the prompt, 1 by it alone; a picture is what it is beside another of a longer prompt."""
    for prompt, codes in zip(PROMPTS, greedy[weight], strict=True):
        np.testing.assert_array_equal(codes, alone(tiny_janus(), prompt, weight))


def test_guidance_is_between_the_two(greedy):
    assert len({greedy[w].tobytes() for w in greedy}) == 3
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(6, 9)), jnp.float32)
    np.testing.assert_array_equal(guided(logits, 0.0), logits[1::2])
    np.testing.assert_allclose(guided(logits, 1.0), logits[0::2], atol=1e-6)
    np.testing.assert_allclose(guided(logits, 5.0), 5 * logits[0::2] - 4 * logits[1::2], atol=1e-5)


@pytest.mark.slow
def test_codes_and_pictures_equal_transformers(greedy, tmp_path):
    """Greedily, with its cache and its guidance, of one prompt; the words of the second row are padding there too."""
    from transformers import GenerationConfig, JanusForConditionalGeneration

    from deepseek_jax.multimodal.checkpoint import save_pretrained

    model = tiny_janus()
    save_pretrained(model, tmp_path / "hf", model_type="janus")
    theirs = JanusForConditionalGeneration.from_pretrained(tmp_path / "hf", dtype=torch.float32).eval()
    theirs.model.vision_model.config.num_image_tokens = model.cfg.n_codes
    settings = GenerationConfig(
        do_sample=False,
        guidance_scale=5.0,
        bos_token_id=1,
        pad_token_id=PAD,
        eos_token_id=2,
        max_length=64,
        generation_kwargs={"boi_token_id": 9},
    )
    prompt = torch.tensor([PROMPTS[0]])
    codes = theirs.generate(
        prompt, attention_mask=torch.ones_like(prompt), generation_mode="image", generation_config=settings
    )
    np.testing.assert_array_equal(greedy[5.0][0], codes[0].numpy())
    images = draw_pictures(model, PROMPTS[:1], PAD, temperature=0).images
    with torch.no_grad():
        drawn = theirs.decode_image_tokens(codes).numpy()
    exact = np.clip((drawn + 1) / 2 * 255, 0, 255)
    assert images.dtype == np.uint8
    assert images.shape == (1, 8, 8, 3)
    assert (np.abs(images - exact) <= 1 + 1e-2).all()
    assert (images == exact.astype(np.uint8)).mean() > 0.99


def test_seeds():
    model = tiny_janus()
    same = [PROMPTS[0]] * 2
    told = []
    drawn = draw_pictures(model, same, PAD, seed=7, progress=told.append)
    a = drawn.codes
    b = draw_pictures(model, same, PAD, seed=7).codes
    np.testing.assert_array_equal(a, b)
    assert not np.array_equal(a[0], a[1])
    assert not np.array_equal(a, draw_pictures(model, same, PAD, seed=8).codes)
    assert told == [model.cfg.n_codes]
    # Its seed says what a picture is, not its place.
    c = draw_pictures(model, same, PAD, seed=[drawn.seed[1], 7]).codes
    np.testing.assert_array_equal(c, a[::-1])


def test_a_code_is_nearest_to_what_it_looks_up():
    vq = tiny_janus().vq
    codes = jnp.arange(48)[None]
    np.testing.assert_array_equal(vq.nearest(vq.look_up(codes)), codes)


def test_pixels():
    values = np.array([-2.0, -1.0, 0.0, 0.999, 1.0, 3.0, -0.9961])
    np.testing.assert_array_equal(pixels(values), [0, 0, 127, 254, 255, 255, 0])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompts": []}, "there is no prompt"),
        ({"prompts": [[1, 256]]}, "outside the vocabulary of 256"),
        ({"prompts": [[1] * 250]}, "beyond the 256"),
        ({"pad_id": 999}, "pad_id 999 lies outside"),
        ({"weight": float("nan")}, "weight=nan must be a finite number"),
        ({"temperature": -1}, "temperature=-1"),
    ],
)
def test_bad_arguments_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        draw_pictures(tiny_janus(), **{"prompts": PROMPTS, "pad_id": PAD, **changes})
