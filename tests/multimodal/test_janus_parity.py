"""A Janus equals transformers' on the same files: towers, aligners, logits, cached decoding, the code both ways."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from measured import measured
from tiny_janus import IMAGE, pictures, run, tiny_janus
from transformers import JanusForConditionalGeneration

from deepseek_jax.core.context import DEFAULT
from deepseek_jax.multimodal.checkpoint import save_pretrained
from deepseek_jax.multimodal.vq import unit

BOUND = 2e-5


def error(ours, theirs) -> float:
    theirs = theirs.detach().numpy()
    assert ours.shape == theirs.shape
    return float(np.abs(np.asarray(ours) - theirs).max() / np.abs(theirs).max())


def channels_first(images) -> torch.Tensor:
    return torch.tensor(np.moveaxis(np.asarray(images), -1, 1).copy())


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    folder = tmp_path_factory.mktemp("janus") / "tiny"
    save_pretrained(tiny_janus(), folder, model_type="janus")
    model, report = JanusForConditionalGeneration.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    with torch.no_grad():
        yield model.eval()


@pytest.fixture(scope="module")
def prompt():
    """Two rows with three pictures between them, the second padded on the left."""
    rng, P = np.random.default_rng(3), tiny_janus().cfg.vision.n_tokens
    tokens = rng.integers(3, IMAGE, (2, 45))
    tokens[0, 2 : 2 + P] = tokens[0, 21 : 21 + P] = tokens[1, 12 : 12 + P] = IMAGE
    segments = np.ones((2, 45), np.int32)
    segments[1, :5] = 0
    return tokens.astype(np.int32), segments, pictures(3)


@pytest.fixture(scope="module")
def theirs(reference, prompt):
    tokens, segments, images = prompt
    position = np.maximum(np.cumsum(segments, -1) - 1, 0)
    return reference(
        input_ids=torch.tensor(tokens, dtype=torch.long),
        attention_mask=torch.tensor(segments),
        position_ids=torch.tensor(position),
        pixel_values=channels_first(images),
        output_hidden_states=True,
    )


def test_what_is_shown(reference, prompt):
    model, images = tiny_janus(), prompt[2]
    tower, features = jax.jit(lambda m, x: (m.vision(x, DEFAULT), m.embed_images(x)))(model, images)
    theirs = reference.model.get_image_features(channels_first(images))
    assert error(tower, theirs.last_hidden_state) <= BOUND
    assert error(features, theirs.pooler_output) <= BOUND


def test_logits_and_hidden_states(prompt, theirs):
    tokens, segments, images = prompt
    out = run(tiny_janus(), tokens, images, segments)
    real = segments != 0
    for mine, other in ((out.hidden, theirs.hidden_states[-1]), (out.logits, theirs.logits)):
        found = error(np.asarray(mine)[real], other[torch.tensor(real)])
        assert found <= BOUND
    measured("janus", "logits", found)
    assert 0.5 < float(theirs.logits.std()) < 2


def test_cached_decoding(prompt, theirs):
    """The pictures in one call, then token by token; the rows of a cache have no padding."""
    model, (tokens, segments, images) = tiny_janus(), prompt
    cache, first = model.init_cache(2, 64), 40
    out = run(model, tokens[:, :first], images, segments[:, :first], cache)
    logits = [out.logits]
    for i in range(first, tokens.shape[1]):
        out = run(model, tokens[:, i : i + 1], None, segments[:, i : i + 1], out.cache)
        logits.append(out.logits)
    real = segments != 0
    found = error(np.concatenate(logits, 1)[real], theirs.logits[torch.tensor(real)])
    assert found <= BOUND
    measured("janus", "decode", found)


def test_what_is_drawn(reference):
    model, cfg = tiny_janus(), tiny_janus().cfg
    codes = np.random.default_rng(5).integers(0, cfg.vq.n_codes, (2, cfg.n_codes)).astype(np.int32)
    hidden = np.random.default_rng(6).normal(size=(2, 3, cfg.language.dim)).astype(np.float32)
    pixels, embedded, scores = jax.jit(lambda m, c, h: (m.vq.decode(c), m.embed_codes(c), m.code_logits(h)))(
        model, codes, hidden
    )
    long = torch.tensor(codes, dtype=torch.long)
    assert error(pixels, reference.decode_image_tokens(long)) <= BOUND
    assert error(embedded, reference.prepare_embeddings_for_image_generation(long)) <= BOUND
    found = error(scores, reference.model.generation_head(torch.tensor(hidden)))
    assert found <= BOUND
    measured("janus", "logits", found)


def test_codes_of_pictures(reference):
    """Between unit vectors, which transformers' lengths of codes are made to be: without that its codes are others."""
    model, images = tiny_janus(), pictures(4, seed=8)
    encode = jax.jit(lambda m, x: (m.vq.encoder(x), m.vq.vectors(x), m.vq.encode(x)))
    encoded, vectors, codes = encode(model, images)
    theirs = reference.model.vqmodel.encode(channels_first(images))
    assert error(jnp.moveaxis(encoded, -1, 1), theirs.last_hidden_state) <= BOUND
    assert not np.array_equal(np.asarray(codes).reshape(-1), theirs.image_tokens)
    table = reference.model.vqmodel.quantize.embedding.weight
    stored = table.detach().clone()
    table.data = torch.tensor(np.asarray(unit(model.vq.codebook.get_value())))
    theirs = reference.model.vqmodel.encode(channels_first(images)).image_tokens.reshape(codes.shape)
    table.data = stored
    np.testing.assert_array_equal(codes, theirs)
    assert len(np.unique(codes)) > 5
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=-1), 1, atol=1e-6)
