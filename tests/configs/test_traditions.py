"""The config.json of the other model_types: released files, the reference's own, and what is refused."""

import copy
import json
from dataclasses import replace

import pytest

from deepseek_jax.configs.hf import config_from_json, config_to_json
from deepseek_jax.configs.schema import ConfigError
from deepseek_jax.configs.zoo import zoo
from deepseek_jax.notes import CheckpointWarning

# Released files, less what concerns no tensor and no number.
QWEN = {
    "architectures": ["Qwen2ForCausalLM"],
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151643,
    "hidden_act": "silu",
    "hidden_size": 1536,
    "initializer_range": 0.02,
    "intermediate_size": 8960,
    "max_position_embeddings": 131072,
    "max_window_layers": 21,
    "model_type": "qwen2",
    "num_attention_heads": 12,
    "num_hidden_layers": 28,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-06,
    "rope_theta": 10000,
    "sliding_window": 4096,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "use_mrope": False,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "bos_token_id": 128000,
    "eos_token_id": 128001,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 14336,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "factor": 8.0,
        "high_freq_factor": 4.0,
        "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "vocab_size": 128256,
}
V1 = {
    "architectures": ["DeepseekForCausalLM"],
    "attention_bias": False,
    "aux_loss_alpha": 0.001,
    "bos_token_id": 100000,
    "eos_token_id": 100001,
    "first_k_dense_replace": 1,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "initializer_range": 0.02,
    "intermediate_size": 10944,
    "max_position_embeddings": 4096,
    "model_type": "deepseek",
    "moe_intermediate_size": 1408,
    "moe_layer_freq": 1,
    "n_routed_experts": 64,
    "n_shared_experts": 2,
    "norm_topk_prob": False,
    "num_attention_heads": 16,
    "num_experts_per_tok": 6,
    "num_hidden_layers": 28,
    "num_key_value_heads": 16,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 10000,
    "scoring_func": "softmax",
    "seq_aux": True,
    "tie_word_embeddings": False,
    "vocab_size": 102400,
}
V2_LITE = {
    "architectures": ["DeepseekV2ForCausalLM"],
    "attention_bias": False,
    "aux_loss_alpha": 0.001,
    "bos_token_id": 100000,
    "eos_token_id": 100001,
    "first_k_dense_replace": 1,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "initializer_range": 0.02,
    "intermediate_size": 10944,
    "kv_lora_rank": 512,
    "max_position_embeddings": 163840,
    "model_type": "deepseek_v2",
    "moe_intermediate_size": 1408,
    "moe_layer_freq": 1,
    "n_group": 1,
    "n_routed_experts": 64,
    "n_shared_experts": 2,
    "norm_topk_prob": False,
    "num_attention_heads": 16,
    "num_experts_per_tok": 6,
    "num_hidden_layers": 27,
    "num_key_value_heads": 16,
    "q_lora_rank": None,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "rms_norm_eps": 1e-06,
    "rope_scaling": {
        "beta_fast": 32,
        "beta_slow": 1,
        "factor": 40,
        "mscale": 0.707,
        "mscale_all_dim": 0.707,
        "original_max_position_embeddings": 4096,
        "type": "yarn",
    },
    "rope_theta": 10000,
    "routed_scaling_factor": 1.0,
    "scoring_func": "softmax",
    "seq_aux": True,
    "tie_word_embeddings": False,
    "topk_group": 1,
    "topk_method": "greedy",
    "v_head_dim": 128,
    "vocab_size": 102400,
}
V2 = V2_LITE | {
    "hidden_size": 5120,
    "intermediate_size": 12288,
    "moe_intermediate_size": 1536,
    "n_group": 8,
    "n_routed_experts": 160,
    "num_attention_heads": 128,
    "num_hidden_layers": 60,
    "num_key_value_heads": 128,
    "q_lora_rank": 1536,
    "routed_scaling_factor": 16.0,
    "topk_group": 3,
    "topk_method": "group_limited_greedy",
}
V32 = V2 | {
    "architectures": ["DeepseekV32ForCausalLM"],
    "bos_token_id": 0,
    "eos_token_id": 1,
    "first_k_dense_replace": 3,
    "hidden_size": 7168,
    "index_head_dim": 128,
    "index_n_heads": 64,
    "index_topk": 2048,
    "intermediate_size": 18432,
    "model_type": "deepseek_v32",
    "moe_intermediate_size": 2048,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 61,
    "num_nextn_predict_layers": 1,
    "rope_scaling": V2_LITE["rope_scaling"] | {"mscale": 1.0, "mscale_all_dim": 1.0},
    "routed_scaling_factor": 2.5,
    "scoring_func": "sigmoid",
    "topk_group": 4,
    "topk_method": "noaux_tc",
    "vocab_size": 129280,
}
RELEASED = {
    "deepseek-v3.2": V32,
    "r1-distill-qwen-1.5b": QWEN,
    "r1-distill-llama-8b": LLAMA,
    "deepseek-moe-16b": V1,
    "deepseek-v2-lite": V2_LITE,
    "deepseek-v2": V2,
}


def changed(data: dict, **changes) -> dict:
    return {key: value for key, value in (copy.deepcopy(data) | changes).items() if value is not ...}


@pytest.mark.parametrize("name", RELEASED)
def test_released_files_are_the_zoo(name):
    """The scale of fresh weights apart, on which papers (0.006) and files (0.02) differ."""
    cfg = config_from_json(RELEASED[name], name)
    assert cfg == replace(zoo(name), init_std=0.02)
    ours = config_to_json(cfg)
    # What is written says the same, field by field, and no more but what follows.
    assert {k: v for k, v in ours.items() if k in RELEASED[name]} == {
        k: v for k, v in RELEASED[name].items() if k in ours
    }


def test_mscale_is_that_of_the_file():
    scaling = V2["rope_scaling"] | {"mscale": 1.0, "mscale_all_dim": 1.0}
    yarn = config_from_json(changed(V2, rope_scaling=scaling)).attention.rope.yarn
    assert (yarn.mscale, yarn.mscale_all_dim) == (1.0, 1.0)
    assert zoo("deepseek-v2").attention.rope.yarn.mscale_all_dim == 0.707


CLASSES = {"llama": "Llama", "qwen2": "Qwen2", "deepseek_v2": "DeepseekV2", "deepseek_v32": "DeepseekV32"}
TWINS = ("tiny-llm", "tiny-distill-qwen", "tiny-distill-llama", "tiny-v2-lite", "tiny-v2", "tiny-v3.2")


@pytest.mark.parametrize("name", TWINS)
def test_the_reference_reads_what_is_written(name, tmp_path):
    """Every field that we write means to transformers what it means here, in its own spelling too."""
    import transformers

    cfg = zoo(name)
    kind = CLASSES[cfg.model_type]
    data = config_to_json(cfg)
    reference = getattr(transformers, f"{kind}Config")(**{k: v for k, v in data.items() if k != "model_type"})
    reference.save_pretrained(tmp_path)
    again = json.loads((tmp_path / "config.json").read_text())
    assert "rope_parameters" in again
    assert config_from_json(again, name) == cfg
    everything = json.loads(reference.to_json_string(use_diff=False))
    assert config_from_json(everything, name) == cfg


def test_defaults_are_those_of_the_reference():
    from transformers import DeepseekV2Config, LlamaConfig, Qwen2Config

    missing = "rms_norm_eps tie_word_embeddings initializer_range bos_token_id eos_token_id max_position_embeddings"
    missing = dict.fromkeys(
        [*missing.split(), "rope_theta", "rope_scaling", "topk_method", "routed_scaling_factor"], ...
    )
    for data, kind in ((LLAMA, LlamaConfig), (QWEN, Qwen2Config), (V2_LITE, DeepseekV2Config)):
        cfg, theirs = config_from_json(changed(data, **missing)), kind()
        assert (cfg.norm_eps, cfg.tie_embeddings) == (theirs.rms_norm_eps, theirs.tie_word_embeddings)
        assert (cfg.init_std, cfg.max_length) == (theirs.initializer_range, theirs.max_position_embeddings)
        eos = () if theirs.eos_token_id is None else (theirs.eos_token_id,)
        assert (cfg.bos_id, cfg.eos_ids) == (theirs.bos_token_id, eos)
        assert cfg.attention.rope.theta == theirs.rope_parameters["rope_theta"]
    assert (cfg.moe.n_groups, cfg.moe.scale) == (1, DeepseekV2Config().routed_scaling_factor)


def test_heads_that_are_not_named():
    bare = changed(LLAMA, num_key_value_heads=...)
    assert config_from_json(bare).attention.n_kv_heads == 32
    wide = config_from_json(changed(LLAMA, head_dim=64)).attention
    assert (wide.head_dim, wide.rope_dim, wide.cache_width) == (64, 64, 2 * 8 * 64)


def test_groups_count_only_where_the_method_says_so():
    cfg = config_from_json(changed(V2_LITE, n_group=8, topk_group=3))
    assert (cfg.moe.n_groups, cfg.moe.top_groups) == (1, 1)


def test_unknown_fields_are_named():
    with pytest.warns(
        CheckpointWarning, match="nothing here reads num_nextn_predict_layers, routed_scaling_factor; ign"
    ):
        config_from_json(changed(V1, num_nextn_predict_layers=1, routed_scaling_factor=2.0))


REFUSED = {
    "llama bias": (LLAMA, {"attention_bias": True}, "attention_bias True is not supported, only False"),
    "llama mlp": (LLAMA, {"mlp_bias": True}, "mlp_bias True"),
    "llama heads": (
        LLAMA,
        {"num_key_value_heads": 5},
        "num_attention_heads=32 does not divide into num_key_value_heads=5",
    ),
    "llama width": (LLAMA, {"hidden_size": 4097}, "hidden_size 4097 does not divide into num_attention_heads 32"),
    "odd head": (LLAMA, {"head_dim": 63}, "head_dim must be even, not 63"),
    "llama rope": (
        LLAMA,
        {"rope_scaling": {"type": "linear", "factor": 4.0}},
        "'linear' is not supported, only 'default'",
    ),
    "llama3 factor": (
        LLAMA,
        {"rope_scaling": {k: v for k, v in LLAMA["rope_scaling"].items() if k != "low_freq_factor"}},
        "rope_scaling lacks low_freq_factor",
    ),
    "llama3 order": (
        LLAMA,
        {"rope_scaling": LLAMA["rope_scaling"] | {"low_freq_factor": 4.0}},
        "Llama3 needs high_freq_factor > low_freq_factor > 0, not 4.0 and 4.0",
    ),
    "qwen window": (QWEN, {"use_sliding_window": True}, "use_sliding_window True"),
    "qwen layers": (
        QWEN,
        {"layer_types": ["sliding_attention"]},
        "layer_types .* not supported, only 'full_attention'",
    ),
    "v1 normalised": (V1, {"norm_topk_prob": True}, "norm_topk_prob True"),
    "v1 rope": (V1, {"rope_scaling": V2["rope_scaling"]}, "rope type 'yarn' is not supported, only 'default'"),
    "v1 chosen": (V1, {"num_experts_per_tok": ...}, "lacks num_experts_per_tok"),
    "v2 method": (
        V2,
        {"topk_method": "noaux_tc"},
        "topk_method 'noaux_tc' is not supported, only 'greedy' and 'group_",
    ),
    "v2 score": (V2, {"scoring_func": "sigmoid"}, "scoring_func 'sigmoid'"),
    "v2 groups": (V2, {"n_group": 7}, "n_routed_experts=160 does not divide into n_group=7 groups"),
    "v3.2 layers": (V32, {"layer_types": ["full_attention"] * 61}, "layer_types .* are not supported, only 'indexed"),
    "v3.2 networks": (V32, {"mlp_layer_types": ["sparse"] * 61}, "but first_k_dense_replace is 3"),
    "v3.2 indexer": (V32, {"index_n_heads": ...}, "index_n_heads"),
    "v3.2 top_k": (V32, {"index_topk": 0}, "index_topk must be positive, not 0"),
    "v3.2 queries": (V32, {"q_lora_rank": None}, "an indexer reads compressed queries, but .* is None"),
    "v2 heads": (V2, {"num_key_value_heads": 8}, "num_key_value_heads is 8, but num_attention_heads is 128"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case):
    data, changes, message = REFUSED[case]
    with pytest.raises(ConfigError, match=message):
        config_from_json(changed(data, **changes))
