"""Janus-Pro (2501.17811): sizes of its parts, and that each stage of its training moves what the paper says alone."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_janus import batch, pictures, tiny_janus

import deepseek_jax as dsj
from deepseek_jax.core.params import matrix_of, named
from deepseek_jax.core.partition import partition
from deepseek_jax.multimodal.janus import abstract
from deepseek_jax.multimodal.objective import Pictures, begin, loss, picture_nats, step, text_nats, vq_loss
from deepseek_jax.multimodal.stages import STAGES, Stage, _constant
from deepseek_jax.multimodal.vq import unit

VQ_ALONE = Stage(("*",), _constant(1e-3, 0), 1, 1, (0, 0, 1))


@pytest.mark.slow
def test_a_fresh_janus_has_a_fresh_language_model():
    """Variances of the other parts are those of the maps' inputs."""
    key, cfg = jax.random.key(3), tiny_janus().cfg
    # Fewer parameters, whose every draw is compiled.
    model = dsj.init(replace(cfg, vq=replace(cfg.vq, multipliers=(1,))), key)
    for name, value in named(dsj.init(model.cfg.language, key)).items():
        np.testing.assert_array_equal(value, named(model.language)[name], err_msg=name)
    for w in (model.vision.layers.q, model.vq.decoder.conv_in.weight, model.gen_head.layers[1].weight):
        inputs = np.prod([w.get_value().shape[a] for a in matrix_of(w).inputs])
        np.testing.assert_allclose(np.std(w.get_value()), inputs**-0.5, rtol=0.1)


@pytest.mark.parametrize(("name", "dim", "layers"), [("janus-pro-1b", 2048, 24), ("janus-pro-7b", 4096, 30)])
def test_sizes(name, dim, layers):
    """§2.1 and table 1: SigLIP-L/16 at 384, a code of 16,384 by 8 that is a sixteenth as wide, two-layer adaptors."""
    cfg = dsj.zoo(name)
    assert (cfg.language.vocab_size, cfg.language.dim, cfg.language.n_layers) == (102400, dim, layers)
    assert (cfg.vision.image_size, cfg.vision.n_tokens, cfg.n_codes) == (384, 576, 576)
    assert (cfg.vq.n_codes, cfg.vq.code_dim, cfg.vq.factor, cfg.depth) == (16384, 8, 16, 2)
    assert cfg.language.attention.n_heads * cfg.language.attention.head_dim == dim


def test_the_stages_are_the_papers():
    """Table 2."""
    one, two, three = STAGES.values()
    assert [s.rate.peak for s in STAGES.values()] == [1e-3, 1e-4, 4e-5]
    assert [s.rate.warmup_steps for s in STAGES.values()] == [600, 5000, 0]
    assert [(s.steps, s.batch_rows, s.mixture) for s in STAGES.values()] == [
        (20_000, 256, (1, 0, 3)),
        (360_000, 512, (2, 3, 5)),
        (80_000, 128, (5, 1, 4)),
    ]
    assert (two.stops, one.stops, three.stops) == (270_000, None, None)
    assert {s.optimizer for s in STAGES.values()} == {one.optimizer}
    assert (one.optimizer.b1, one.optimizer.b2, one.optimizer.weight_decay, one.optimizer.clip) == (0.9, 0.95, 0, 1)
    assert [sum(s.rows) for s in STAGES.values()] == [256, 512, 128]
    assert one.rows == (64, 0, 192)


def test_what_is_frozen():
    parts = {"vision", "aligner", "vq", "gen_embed", "gen_aligner", "gen_head", "language"}
    adaptors = {"aligner", "gen_embed", "gen_aligner", "gen_head"}
    trained = [adaptors, adaptors | {"language"}, parts - {"vq"}]
    for stage, expected in zip(STAGES.values(), trained, strict=True):
        params, rest = partition(abstract(tiny_janus().cfg), stage.trains)
        assert {name.split(".")[0] for name in named(params)} == expected
        assert {name.split(".")[0] for name in named(rest)} == parts - expected


@pytest.mark.slow
@pytest.mark.parametrize("name", STAGES)
def test_a_step_moves_that_alone_and_the_loss_falls(name):
    model, stage = tiny_janus(), STAGES[name]
    before = {path: np.asarray(value) for path, value in named(model).items()}
    training = begin(jax.tree.map(jnp.array, model), stage)
    values = []
    for _ in range(3):
        training, value = step(training, batch(), np.float32(1e-3), stage=stage)
        values.append(float(value))
    assert values[2] < values[0]
    for path, value in named(training.model).items():
        assert np.array_equal(value, before[path]) != stage.trains(path), path


@pytest.mark.slow
def test_the_loss_is_the_mean_over_tokens_and_codes():
    model, (text, drawn) = tiny_janus(), batch()
    whole, (a, n), (b, m) = jax.jit(lambda t, d: (loss(model, (t, d)), text_nats(model, t), picture_nats(model, d)))(
        text, drawn
    )
    assert (n, m) == (8, 48)
    np.testing.assert_allclose(whole, (a + b) / (n + m), rtol=1e-6)
    nats = jax.jit(picture_nats)
    # Row 1 alone and without its padding has the same codes' nats.
    one = Pictures(drawn.tokens[1:2, 2:], drawn.segments[1:2, 2:], drawn.codes[1:2])
    rest = Pictures(*(getattr(drawn, name)[0::2] for name in ("tokens", "segments", "codes")))
    parts = [float(nats(model, rows)[0]) for rows in (one, rest)]
    np.testing.assert_allclose(sum(parts), b, rtol=1e-5)


@pytest.mark.slow
def test_a_vq_learns():
    """Its three terms as defined; gradients reach encoder, decoder and those codes that were chosen."""
    vq, images = tiny_janus().vq, jnp.asarray(pictures(4, seed=2))
    training = begin(jax.tree.map(jnp.array, vq), VQ_ALONE)
    z, codes, drawn = jax.jit(lambda vq, x: (vq.vectors(x), vq.encode(x), vq.decode(vq.encode(x))))(vq, images)
    code = unit(vq.codebook.get_value())[codes]
    expected = jnp.mean((drawn - images) ** 2) + 1.25 * jnp.mean((code - z) ** 2)
    training, first = step(training, images, np.float32(1e-3), stage=VQ_ALONE, objective=vq_loss)
    np.testing.assert_allclose(first, expected, rtol=1e-5)
    for _ in range(5):
        training, value = step(training, images, np.float32(1e-3), stage=VQ_ALONE, objective=vq_loss)
    assert value < first
    moved = np.abs(np.asarray(training.model.codebook.get_value()) - np.asarray(vq.codebook.get_value())).max(-1) > 0
    assert set(np.unique(codes)) <= set(np.flatnonzero(moved))


def test_nothing_to_learn_is_an_error():
    with pytest.raises(ValueError, match=r"matches one of nothing.\*: nothing would learn"):
        begin(tiny_janus(), Stage(("nothing.*",), _constant(1e-3, 0), 1, 1, (1, 0, 0)))
