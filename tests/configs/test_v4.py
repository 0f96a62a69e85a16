"""V4's config.json: the released spelling, transformers' own, and what is refused."""

import copy
import json
from dataclasses import replace

import pytest

from deepseek_jax.configs.hf import config_from_json, config_to_json
from deepseek_jax.configs.releases.v4 import deepseek_v4_flash, deepseek_v4_pro
from deepseek_jax.configs.schema import ConfigError, HyperConnections, Rope, Yarn
from deepseek_jax.configs.twins import tiny_v4
from deepseek_jax.configs.zoo import zoo
from deepseek_jax.notes import CheckpointWarning

# A released file, less what concerns no tensor and no number.
FLASH = {
    "architectures": ["DeepseekV4ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 0,
    "compress_ratios": [0, 0, *[4, 128] * 20, 4, 0],
    "compress_rope_theta": 160000,
    "eos_token_id": 1,
    "expert_dtype": "fp4",
    "hc_eps": 1e-06,
    "hc_mult": 4,
    "hc_sinkhorn_iters": 20,
    "head_dim": 512,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "index_head_dim": 128,
    "index_n_heads": 64,
    "index_topk": 512,
    "initializer_range": 0.02,
    "max_position_embeddings": 1048576,
    "model_type": "deepseek_v4",
    "moe_intermediate_size": 2048,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 64,
    "num_experts_per_tok": 6,
    "num_hash_layers": 3,
    "num_hidden_layers": 43,
    "num_key_value_heads": 1,
    "num_nextn_predict_layers": 1,
    "o_groups": 8,
    "o_lora_rank": 1024,
    "q_lora_rank": 1024,
    "qk_rope_head_dim": 64,
    "quantization_config": {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "quant_method": "fp8",
        "scale_fmt": "ue8m0",
        "weight_block_size": [128, 128],
    },
    "rms_norm_eps": 1e-06,
    "rope_scaling": {
        "beta_fast": 32,
        "beta_slow": 1,
        "factor": 16,
        "original_max_position_embeddings": 65536,
        "type": "yarn",
    },
    "rope_theta": 10000,
    "routed_scaling_factor": 1.5,
    "scoring_func": "sqrtsoftplus",
    "sliding_window": 128,
    "swiglu_limit": 10.0,
    "tie_word_embeddings": False,
    "topk_method": "noaux_tc",
    "torch_dtype": "bfloat16",
    "vocab_size": 129280,
}
PRO = FLASH | {
    "compress_ratios": [128, 128, *[4, 128] * 29, 4, 0],
    "hidden_size": 7168,
    "index_topk": 1024,
    "moe_intermediate_size": 3072,
    "n_routed_experts": 384,
    "num_attention_heads": 128,
    "num_hidden_layers": 61,
    "o_groups": 16,
    "q_lora_rank": 1536,
    "routed_scaling_factor": 2.5,
}
RELEASES = {"flash": (FLASH, deepseek_v4_flash), "pro": (PRO, deepseek_v4_pro)}


def changed(**changes) -> dict:
    return {key: value for key, value in (copy.deepcopy(FLASH) | changes).items() if value is not ...}


@pytest.mark.parametrize("name", RELEASES)
def test_released_files(name):
    data, release = RELEASES[name]
    cfg = config_from_json(data, name)
    assert cfg == replace(release(name), init_std=0.02)
    ours = config_to_json(cfg)
    kept = {k: v for k, v in data.items() if k not in ("quantization_config", "expert_dtype", "torch_dtype")}
    assert ours == {k: v for k, v in kept.items() if k != "attention_dropout"} | {"mlp_bias": False}
    # No layer has more than one of the RoPEs: YaRN is that of layers with entries.
    assert (cfg.layers[0].attention.rope, cfg.mtp_layer.attention.rope) == (
        (Rope(10000.0),) * 2 if name == "flash" else (Rope(160000.0, Yarn(16.0, 65536)), Rope(10000.0))
    )


@pytest.mark.parametrize("release", [deepseek_v4_flash, deepseek_v4_pro, tiny_v4])
def test_the_reference_reads_what_is_written(release, tmp_path):
    """Each field means to transformers what it means here, and its own spelling is read as the same model."""
    from transformers import DeepseekV4Config

    cfg = release("v4")
    reference = DeepseekV4Config(**copy.deepcopy(config_to_json(cfg)))
    rates = {"sliding_attention": 0} | reference.compress_rates
    assert tuple(rates[kind] for kind in reference.layer_types) == cfg.attention.ratios
    assert reference.mlp_layer_types == ["hash_moe"] * 3 + ["moe"] * (cfg.n_layers - 3)
    assert reference.qk_rope_head_dim == cfg.attention.rope_dim
    compress = reference.rope_parameters["compress"]
    assert (compress["rope_theta"], compress["factor"]) == (160000.0, cfg.attention.entry_rope.yarn.factor)
    assert (compress["rope_type"], compress["attention_factor"]) == ("yarn", 1.0)
    reference.save_pretrained(tmp_path)
    for text in ((tmp_path / "config.json").read_text(), reference.to_json_string(use_diff=False)):
        again = json.loads(text)
        assert {"layer_types", "mlp_layer_types", "compress_rates", "rope_parameters"} <= set(again)
        assert config_from_json(again, "v4") == cfg
        # Its own spelling alone, without what it keeps of ours.
        own = {k: v for k, v in again.items() if k not in ("compress_ratios", "num_hash_layers", "rope_scaling")}
        assert config_from_json(own, "v4") == cfg


def test_ratios_that_transformers_has_no_words_for():
    """Two rates of entries that all are seen: the released spelling still says what they are."""
    base = tiny_v4("v4")
    cfg = replace(base, attention=replace(base.attention, ratios=(0, 8, 4, 16, 4, 16, 4)))
    data = config_to_json(cfg)
    assert data["compress_ratios"] == [0, 8, 4, 16, 4, 16, 4, 0]
    assert config_from_json(data, "v4") == cfg


def test_defaults_are_those_of_the_reference():
    from transformers import DeepseekV4Config

    left_out = "sliding_window swiglu_limit hc_sinkhorn_iters hc_eps routed_scaling_factor scoring_func rope_theta"
    left_out = [*left_out.split(), "num_experts_per_tok", "compress_rope_theta", "max_position_embeddings"]
    cfg, theirs = config_from_json(changed(**dict.fromkeys(left_out, ...))), DeepseekV4Config()
    a, moe, residual = cfg.attention, cfg.moe, cfg.residual
    ours = (a.window, moe.limit, residual.sinkhorn_steps, residual.eps, moe.scale, moe.score, a.rope.theta)
    ours = (*ours, moe.top_k, a.entry_rope.theta, cfg.max_length)
    assert ours == tuple(getattr(theirs, name) for name in left_out)


def test_dspark_is_named_and_left_out():
    with pytest.warns(
        CheckpointWarning, match="dspark_block_size: DSpark, the draft model .*, is not built; .*without"
    ):
        cfg = config_from_json(changed(dspark_block_size=5))
    assert cfg.mtp_depth == 0


YARN = FLASH["rope_scaling"]
BOTH = {
    "main": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.125},
    "compress": YARN | {"rope_theta": 160000.0, "attention_factor": 1.0, "partial_rotary_factor": 0.125},
}
NESTED = {"rope_scaling": ..., "rope_theta": ...}
REFUSED = {
    "V4.1": ({"model_type": "deepseek_v41"}, "model_type deepseek_v41 is DeepSeek-V4.1, .*, which is not built"),
    "no ratios": ({"compress_ratios": ...}, "lacks compress_ratios, which the shapes of the tensors depend on"),
    "few ratios": (
        {"compress_ratios": [0, 4]},
        "compress_ratios must be a list of integers, one for each of the num_h",
    ),
    "MTP with entries": (
        {"compress_ratios": [4] * 44},
        r"compress_ratios \[4\] of MTP layers are not supported, only 0",
    ),
    "both, unlike": ({"layer_types": ["sliding_attention"] * 43}, "compress_ratios and layer_types describe different"),
    "kind": ({"layer_types": ["full_attention"] * 43}, "layer_types must name one of sliding_attention, compressed_sp"),
    "equal rates": (
        {"layer_types": ["sliding_attention"] * 43, "compress_rates": {"heavily_compressed_attention": 4}},
        "compress_rates .* must be positive and differ",
    ),
    "no hash": ({"num_hash_layers": ...}, "lacks num_hash_layers"),
    "hash, unlike": ({"mlp_layer_types": ["moe"] * 43}, "num_hash_layers is 3, but mlp_layer_types has 0 hash_moe"),
    "hash behind": (
        {"mlp_layer_types": ["moe", *["hash_moe"] * 42]},
        "mlp_layer_types must name hash_moe for the first",
    ),
    "many hashes": ({"num_hash_layers": 44}, "num_hash_layers=44 exceeds the 43 layers with experts"),
    "no streams": ({"hc_mult": ...}, "lacks hc_mult"),
    "streams": ({"hc_mult": 0}, "HyperConnections hc_mult must be positive, not 0"),
    "groups": ({"o_groups": 7}, "num_attention_heads=64 does not divide into o_groups=7 groups"),
    "rotated": ({"qk_rope_head_dim": ...}, "lacks qk_rope_head_dim"),
    "rotated, unlike": (
        {"partial_rotary_factor": 0.25},
        "qk_rope_head_dim is 64, but partial_rotary_factor of head_dim",
    ),
    "two keys": (
        {"num_key_value_heads": 2},
        "num_key_value_heads is 2, but the number of keys that all heads share is 1",
    ),
    "two shared": ({"n_shared_experts": 2}, "n_shared_experts 2 is not supported, only 1"),
    "limit": ({"swiglu_limit": -1}, "MoE swiglu_limit must .*-1"),
    "rope": ({"rope_scaling": YARN | {"type": "linear"}}, "'linear' is not supported, only 'default' and 'yarn'"),
    "factor": ({"rope_scaling": YARN | {"attention_factor": 1.2}}, "attention_factor 1.2 is not supported, only 1.0"),
    "nested factor": (
        NESTED | {"rope_parameters": BOTH | {"compress": YARN}},
        "partial_rotary_factor 1.0 of head_dim 512 is not 64",
    ),
    "no nested factor": (
        NESTED | {"rope_parameters": BOTH | {"compress": YARN | {"partial_rotary_factor": 0.125}}},
        "attention_factor None is not supported, only 1.0",
    ),
    "main": (
        NESTED | {"rope_parameters": BOTH | {"main": BOTH["compress"]}},
        "main: rope type 'yarn' is not supported",
    ),
    "two ropes": ({"rope_parameters": BOTH | {"compress": BOTH["main"]}}, "describe different RoPEs"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case):
    changes, message = REFUSED[case]
    with pytest.raises(ConfigError, match=message):
        config_from_json(changed(**changes))


def test_what_no_file_can_carry_is_not_written():
    base = tiny_v4("v4")
    for cfg, what in (
        (replace(base, residual=None), "lacks hc_mult"),
        (replace(base, ffn_dim=96), "ffn_dim is 96 and would be read as 64"),
        (replace(base, moe=replace(base.moe, limit=None)), "swiglu_limit must be a number, not None"),
        (replace(base, moe=replace(base.moe, n_shared=2)), "moe.n_shared is 2 and would be read as 1"),
        (replace(base, attention=replace(base.attention, entry_rope=Rope(1e4, Yarn(4.0, 64, mscale=0.5)))), "mscale"),
    ):
        with pytest.raises(ConfigError, match=f"config.json cannot carry this model, which is not saved: .*{what}"):
            config_to_json(cfg)


@pytest.mark.parametrize("residual", [HyperConnections(2, sinkhorn_steps=5), HyperConnections(3, constrained=False)])
@pytest.mark.parametrize("name", ["tiny-v3", "tiny-v2", "tiny-moe"])
def test_other_files_carry_a_residual_of_several_streams(name, residual):
    cfg = replace(zoo(name), residual=residual)
    assert config_from_json(config_to_json(cfg), cfg.name) == cfg
    assert "hc_mult" not in config_to_json(zoo(name))
    with pytest.raises(ConfigError, match="residual"):
        config_to_json(replace(zoo("tiny-llm"), residual=residual))
