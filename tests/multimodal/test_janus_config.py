"""What a Janus is: the releases, their config.json in both traditions, and exact counts."""

import json
from dataclasses import replace

import pytest
from tiny_janus import tiny_config

import deepseek_jax as dsj
from deepseek_jax.configs.checks import ConfigError
from deepseek_jax.configs.hf import config_from_json
from deepseek_jax.configs.multimodal import VQ, Vision
from deepseek_jax.configs.published.janus import is_janus, janus_from_json, janus_to_json, named
from deepseek_jax.multimodal.counted import disagreements

RELEASES = ("janus-pro-1b", "janus-pro-7b", "tiny-janus")


def released(dim: int, language: dict) -> dict:
    """As DeepSeek's config.json of Janus-Pro is."""
    projector = {"depth": 2, "n_embed": dim, "projector_type": "mlp_gelu"}
    tower = {"image_size": 384, "model_name": "siglip_large_patch16_384", "select_feature": "same", "select_layer": -1}
    head = {"image_token_embed": dim, "image_token_size": 16384, "n_embed": dim}
    parts = {
        "vision": ("CLIPVisionTower", tower),
        "aligner": ("MlpProjector", projector | {"input_dim": 1024}),
        "gen_vision": ("VQ-16", {"image_token_size": 16384, "n_embed": 8}),
        "gen_aligner": ("MlpProjector", projector | {"input_dim": 8}),
        "gen_head": ("vision_head", head),
    }
    return {
        "architectures": ["MultiModalityCausalLM"],
        "model_type": "multi_modality",
        "torch_dtype": "bfloat16",
        "transformers_version": "4.33.1",
        "language_config": {"model_type": "llama", "torch_dtype": "bfloat16", **language},
        **{f"{kind}_config": {"cls": cls, "model_type": kind, "params": p} for kind, (cls, p) in parts.items()},
    }


ONE_B = {
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "max_position_embeddings": 16384,
    "num_attention_heads": 16,
    "num_hidden_layers": 24,
    "num_key_value_heads": 16,
    "vocab_size": 102400,
}
# Lists only what is not LlamaConfig's default.
SEVEN_B = {"max_position_embeddings": 16384, "num_hidden_layers": 30, "vocab_size": 102400}


@pytest.mark.parametrize(("name", "dim", "language"), [("janus-pro-1b", 2048, ONE_B), ("janus-pro-7b", 4096, SEVEN_B)])
def test_released_files_are_the_zoo(name, dim, language):
    assert janus_from_json(released(dim, language), name) == dsj.zoo(name)


@pytest.mark.parametrize("model_type", ["multi_modality", "janus"])
@pytest.mark.parametrize("cfg", [*map(dsj.zoo, RELEASES), tiny_config()], ids=lambda cfg: cfg.name)
def test_round_trips(cfg, model_type):
    cfg = replace(cfg, model_type=model_type)
    data = json.loads(json.dumps(janus_to_json(cfg)))
    assert janus_from_json(data, cfg.name) == named(cfg, cfg.name)


def test_the_reference_reads_what_is_written():
    from transformers import JanusConfig

    cfg = replace(dsj.zoo("janus-pro-7b"), model_type="janus")
    theirs = JanusConfig(**janus_to_json(cfg))
    assert (theirs.text_config.hidden_size, theirs.text_config.num_hidden_layers) == (4096, 30)
    assert int(theirs.vision_config.hidden_size * theirs.vision_config.mlp_ratio) == cfg.vision.ffn_dim
    assert (theirs.vq_config.num_patches, tuple(theirs.vq_config.channel_multiplier)) == (24, cfg.vq.multipliers)
    assert (theirs.image_token_id, theirs.tie_word_embeddings) == (100581, False)


@pytest.mark.parametrize("name", RELEASES)
def test_counts_are_the_trees(name):
    cfg = dsj.zoo(name)
    c = dsj.counts(cfg)
    assert disagreements(cfg, c) == []
    assert disagreements(cfg, replace(c, components=c.components | {"vision": 1})) != []
    assert (c.shown, c.drawn) == ((64, 64) if name == "tiny-janus" else (576, 576))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda d: d["gen_vision_config"].update(cls="VQ-8"),
            "gen_vision_config: cls 'VQ-8' is not built, only 'VQ-16'",
        ),
        (lambda d: d["vision_config"]["params"].update(select_layer=-2), "select_layer -2 is not built, only -1"),
        (lambda d: d["aligner_config"]["params"].update(n_embed=8), "hidden_size must be the same, not 8, 2048"),
        (lambda d: d["gen_vision_config"]["params"].pop("n_embed"), "lacks n_embed"),
        (lambda d: d.pop("gen_head_config"), "lacks gen_head_config"),
        (lambda d: d.update(model_type="llava"), "model_type 'llava' is no Janus's"),
    ],
)
def test_what_is_not_built_is_refused(change, message):
    data = released(2048, ONE_B)
    change(data)
    with pytest.raises(ConfigError, match=message):
        janus_from_json(data)


def test_contradictions_are_refused():
    cfg = tiny_config()
    for make, message in (
        (lambda: Vision(image_size=100), "does not divide into patches of 16"),
        (lambda: VQ(channels=48), "do not divide into the 32 groups"),
        (lambda: replace(cfg, image_id=256), "image_id 256 lies outside vocab_size=256"),
        (lambda: replace(cfg, vq=replace(cfg.vq, multipliers=(1, 1, 1, 1, 1))), "do not divide into codes of 16"),
        (lambda: replace(cfg, language=replace(cfg.language, tie_embeddings=True)), "has a head of its own"),
        (lambda: config_from_json({"model_type": "janus"}), "is a Janus, not a language model alone"),
        (lambda: janus_to_json(replace(cfg, head_dim=48, model_type="janus")), "must be the same, not 64, 48"),
    ):
        with pytest.raises(ConfigError, match=message):
            make()


@pytest.mark.parametrize("kind", [None, 3, [], {"a": 1}, ["janus"]])
def test_a_model_type_of_another_kind_is_no_janus(kind):
    assert not is_janus({"model_type": kind})
    with pytest.raises(ConfigError, match="model_type"):
        janus_from_json({"model_type": kind})
