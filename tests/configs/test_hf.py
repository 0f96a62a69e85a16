"""config.json, both spellings and both ways."""

import contextlib
import copy
import json
import re
import warnings
from dataclasses import dataclass, fields, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deepseek_jax.configs.hf import config_from_json, config_to_json
from deepseek_jax.configs.published.fields import NAMES
from deepseek_jax.configs.published.rope import ROPE_KEYS
from deepseek_jax.configs.schema import MLA, ConfigError, ModelConfig, MoE, Rope, Yarn
from deepseek_jax.configs.zoo import language_models, zoo
from deepseek_jax.notes import CheckpointWarning

# The released config.json of DeepSeek-V3, less the fields that concern no tensor and no number.
V3 = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "ep_size": 1,
    "first_k_dense_replace": 3,
    "hidden_act": "silu",
    "hidden_size": 7168,
    "initializer_range": 0.02,
    "intermediate_size": 18432,
    "kv_lora_rank": 512,
    "max_position_embeddings": 163840,
    "model_type": "deepseek_v3",
    "moe_intermediate_size": 2048,
    "moe_layer_freq": 1,
    "n_group": 8,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 61,
    "num_key_value_heads": 128,
    "num_nextn_predict_layers": 1,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "quantization_config": {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "quant_method": "fp8",
        "weight_block_size": [128, 128],
    },
    "rms_norm_eps": 1e-06,
    "rope_scaling": {
        "beta_fast": 32,
        "beta_slow": 1,
        "factor": 40,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 4096,
        "type": "yarn",
    },
    "rope_theta": 10000,
    "routed_scaling_factor": 2.5,
    "scoring_func": "sigmoid",
    "tie_word_embeddings": False,
    "topk_group": 4,
    "topk_method": "noaux_tc",
    "torch_dtype": "bfloat16",
    "v_head_dim": 128,
    "vocab_size": 129280,
}


def changed(**changes):
    data = copy.deepcopy(V3)
    data.update(changes)
    return {key: value for key, value in data.items() if value is not ...}


def test_released_v3_is_the_zoo():
    """The fresh-initialisation scale apart, on which the paper (0.006) and the file (0.02) differ."""
    assert config_from_json(V3, "deepseek-v3") == replace(zoo("deepseek-v3"), init_std=0.02)


def test_both_spellings_agree():
    new = changed(rope_theta=..., rope_scaling=..., num_nextn_predict_layers=..., n_routed_experts=...)
    scaling = {k: v for k, v in V3["rope_scaling"].items() if k != "type"}
    new["rope_parameters"] = {**scaling, "rope_type": "yarn", "rope_theta": 10000.0}
    new["num_mtp_layers"], new["num_local_experts"] = 1, 256
    assert config_from_json(new) == config_from_json(V3)
    assert config_from_json({**new, "rope_scaling": V3["rope_scaling"], "rope_theta": 10000}) == config_from_json(V3)


@pytest.mark.parametrize("name", language_models())
def test_zoo_round_trip(name):
    cfg = zoo(name)
    data = json.loads(json.dumps(config_to_json(cfg)))
    assert config_from_json(data, name) == cfg


def test_defaults_are_those_of_the_reference():
    from transformers import DeepseekV3Config

    reference = DeepseekV3Config()
    optional = "n_group topk_group norm_topk_prob routed_scaling_factor num_experts_per_tok rms_norm_eps"
    optional += " tie_word_embeddings initializer_range bos_token_id eos_token_id max_position_embeddings"
    bare = changed(**dict.fromkeys(optional.split(), ...), rope_scaling=..., rope_theta=..., rope_interleave=...)
    cfg = config_from_json(bare)
    assert (cfg.moe.n_groups, cfg.moe.top_groups) == (reference.n_group, reference.topk_group)
    assert (cfg.moe.normalize, cfg.moe.scale) == (reference.norm_topk_prob, reference.routed_scaling_factor)
    assert (cfg.moe.top_k, cfg.norm_eps) == (reference.num_experts_per_tok, reference.rms_norm_eps)
    assert (cfg.tie_embeddings, cfg.init_std) == (reference.tie_word_embeddings, reference.initializer_range)
    assert (cfg.bos_id, cfg.eos_ids) == (reference.bos_token_id, (reference.eos_token_id,))
    assert cfg.max_length == reference.max_position_embeddings
    assert cfg.attention.rope == Rope(reference.rope_parameters["rope_theta"], None, reference.rope_interleave)


def test_the_reference_reads_what_is_written(tmp_path):
    """Every field that we write means to transformers what it means here."""
    from transformers import DeepseekV3Config

    cfg = zoo("deepseek-v3")
    reference = DeepseekV3Config(**config_to_json(cfg))
    reference.save_pretrained(tmp_path)
    again = json.loads((tmp_path / "config.json").read_text())
    assert "rope_parameters" in again
    assert config_from_json(again, "deepseek-v3") == cfg


def test_yarn_without_mscale_leaves_the_softmax_alone():
    scaling = {"type": "yarn", "factor": 4, "original_max_position_embeddings": 64}
    yarn = config_from_json(changed(rope_scaling=scaling)).attention.rope.yarn
    assert yarn == Yarn(4.0, 64, 32.0, 1.0, mscale=0.0, mscale_all_dim=0.0)


def test_dense_models():
    moe = ("n_routed_experts", "n_shared_experts", "num_experts_per_tok", "moe_intermediate_size")
    data = changed(**dict.fromkeys(moe, ...), first_k_dense_replace=62)
    cfg = config_from_json(data)
    assert cfg.moe is None
    assert (cfg.n_dense_layers, cfg.mtp_depth, cfg.mtp_layer.is_moe) == (61, 1, False)
    assert config_from_json(config_to_json(cfg)) == cfg


@pytest.mark.parametrize("ids", [None, 1, [1], [1, 2]])
def test_stop_tokens(ids):
    expected = () if ids is None else (ids,) if isinstance(ids, int) else tuple(ids)
    cfg = config_from_json(changed(eos_token_id=ids, bos_token_id=None))
    assert (cfg.eos_ids, cfg.bos_id) == (expected, None)
    assert config_from_json(config_to_json(cfg)) == cfg


SHAPING = [
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_nextn_predict_layers",
    "first_k_dense_replace",
    "num_attention_heads",
    "q_lora_rank",
    "kv_lora_rank",
    "qk_nope_head_dim",
    "qk_rope_head_dim",
    "v_head_dim",
    "n_routed_experts",
    "n_shared_experts",
    "moe_intermediate_size",
]


@pytest.mark.parametrize("field", SHAPING)
def test_missing_fields_that_shape_tensors(field):
    with pytest.raises(ConfigError, match=field):
        config_from_json(changed(**{field: ...}))


@pytest.mark.parametrize("field", [f for f in SHAPING if f != "q_lora_rank"])
@pytest.mark.parametrize("value", ["8", 8.5, True, [8], -1])
def test_wrong_values(field, value):
    with pytest.raises(ConfigError):
        config_from_json(changed(**{field: value}))


YARN = V3["rope_scaling"]
REFUSED = {
    "model_type": ({"model_type": "gpt2"}, "'gpt2'.*deepseek_v3, kimi_k2, .*, llama, qwen2"),
    "no model_type": ({"model_type": ...}, "model_type None"),
    "attention_bias": ({"attention_bias": True}, "attention_bias True"),
    "hidden_act": ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
    "scoring_func": ({"scoring_func": "softmax"}, "scoring_func 'softmax'"),
    "topk_method": ({"topk_method": "greedy"}, "topk_method 'greedy'"),
    "moe_layer_freq": ({"moe_layer_freq": 2}, "moe_layer_freq 2"),
    "heads": ({"num_key_value_heads": 8}, "num_key_value_heads is 8.*128"),
    "qk_head_dim": ({"qk_head_dim": 128}, "qk_head_dim is 128.*192"),
    "two depths": ({"num_mtp_layers": 2}, "num_nextn_predict_layers is 1, num_mtp_layers 2"),
    "two experts": ({"num_local_experts": 8}, "n_routed_experts is 256, num_local_experts 8"),
    "rope type": ({"rope_scaling": {**YARN, "type": "linear"}}, "'linear'"),
    "two rope types": ({"rope_scaling": {**YARN, "rope_type": "default"}}, "rope_type and type"),
    "two thetas": ({"rope_scaling": {**YARN, "rope_theta": 5e4}}, "rope_theta is 10000.0 and.*50000.0"),
    "two ropes": ({"rope_parameters": {"rope_type": "default"}}, "different RoPEs"),
    "attention_factor": ({"rope_scaling": {**YARN, "attention_factor": 2.0}}, "attention_factor 2.0"),
    "truncate": ({"rope_scaling": {**YARN, "truncate": False}}, "truncate False"),
    "factor": ({"rope_scaling": {**YARN, "factor": "40"}}, "factor must be a number, not '40'"),
    "no factor": ({"rope_scaling": {k: v for k, v in YARN.items() if k != "factor"}}, "factor"),
    "rope no object": ({"rope_scaling": [1]}, "rope_scaling must be a JSON object"),
    "groups": ({"n_group": 7}, r"config.json: n_routed_experts=256 does not divide into n_group=7 groups\.$"),
    "default groups": (
        {"n_routed_experts": 100, "n_group": ...},
        "n_routed_experts=100 does not divide into n_group=8 groups. The file lacks n_group: 8 was taken",
    ),
    "default chosen": (
        {"n_routed_experts": 4, "n_group": 1, "topk_group": 1, "num_experts_per_tok": ...},
        "num_experts_per_tok=8 exceeds the 4 experts .* The file lacks num_experts_per_tok: 8 was taken",
    ),
    "length": ({"max_position_embeddings": 0}, "config.json: max_position_embeddings must be positive, not 0"),
    "expert width": ({"moe_intermediate_size": 0}, "moe_intermediate_size must be positive, not 0"),
    "epsilon": ({"rms_norm_eps": 0}, "rms_norm_eps must be positive, not 0.0"),
    "depth": ({"num_nextn_predict_layers": -1}, "num_nextn_predict_layers must not be negative, as -1 is"),
    "theta": ({"rope_theta": 1}, "rope_theta must exceed 1, not 1.0"),
    "original length": (
        {"rope_scaling": {**YARN, "original_max_position_embeddings": 0}},
        "config.json rope_scaling: YaRN original_max_position_embeddings must be positive",
    ),
    "default slope": (
        {"rope_scaling": {"type": "yarn", "factor": 4, "original_max_position_embeddings": 64, "beta_fast": 0.5}},
        "YaRN needs beta_fast >= beta_slow > 0, not 0.5 and 1.0",
    ),
    "eos": ({"eos_token_id": 200000}, "eos_token_id 200000 lies outside vocab_size=129280"),
    "long value": ({"hidden_act": "x" * 100_000}, r"hidden_act 'x{50,90}\.\.\.x{50,90}' is not supported"),
    "eos type": ({"eos_token_id": ["a"]}, "eos_token_id"),
    "dense but MoE": ({"first_k_dense_replace": 61}, "first_k_dense_replace 61"),
    "eps": ({"rms_norm_eps": "1e-6"}, "rms_norm_eps must be a number"),
    "rope type no text": ({"rope_scaling": {**YARN, "type": []}}, r"rope type \[\] is not supported"),
    "infinite theta": ({"rope_theta": 10**400}, "rope_theta must be a finite number, not 1000"),
    "infinite factor": ({"rope_scaling": {**YARN, "factor": float("inf")}}, "factor must be a finite number, not inf"),
    "NaN scale": ({"routed_scaling_factor": float("nan")}, "routed_scaling_factor must be a finite number, not nan"),
    "layers": ({"num_hidden_layers": 10**9}, "num_hidden_layers must be at most 10000"),
    "MTP layers": ({"num_nextn_predict_layers": 10**9}, "num_nextn_predict_layers must be at most 100;"),
    "experts": ({"n_routed_experts": 2**28}, "n_routed_experts must be at most 10000"),
    "width": ({"hidden_size": 2**31}, "hidden_size must be at most 2147483647"),
    "tie": ({"tie_word_embeddings": 1}, "tie_word_embeddings must be true or false"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case):
    changes, message = REFUSED[case]
    with pytest.raises(ConfigError, match=message):
        config_from_json(changed(**changes))


@pytest.mark.parametrize("case", REFUSED)
def test_no_refusal_is_long_or_speaks_of_our_fields(case):
    with pytest.raises(ConfigError) as caught:
        config_from_json(changed(**REFUSED[case][0]))
    words = set(re.findall(r"\w+", str(caught.value)))
    assert not words & {ours for ours, theirs in NAMES.items() if ours != theirs}
    assert len(str(caught.value)) < 500


def test_unknown_fields_are_named_in_one_line_and_mean_nothing():
    typo = changed(num_expert_per_tok=2, swiglu_limit=10, **{"y" * 1000: 1})
    said = (
        r"^config.json: nothing here reads num_expert_per_tok \(did you mean num_experts_per_tok\?\), swiglu_limit, 'y+"
    )
    with pytest.warns(CheckpointWarning, match=said) as caught:
        assert config_from_json(typo) == config_from_json(V3)
    assert len(str(caught[0].message)) < 400
    many = changed(**{f"field_{i}": i for i in range(1000)})
    with pytest.warns(CheckpointWarning, match="and 990 more; ignored") as caught:
        config_from_json(many)
    assert len(caught) == 1


def test_unknown_fields_of_the_rope_are_ignored_as_the_reference_does():
    scaled = changed(rope_scaling={**YARN, "attn_factor": 3.0, "short_factor": [1]})
    with pytest.warns(CheckpointWarning, match="rope_scaling: nothing here reads attn_factor.*, short_factor; ignored"):
        assert config_from_json(scaled) == config_from_json(V3)
    plain = changed(rope_scaling={"rope_type": "default", "factor": 40})
    with pytest.warns(CheckpointWarning, match="rope_scaling: nothing here reads factor"):
        assert config_from_json(plain).attention.rope == Rope(10000.0)


def test_what_the_reference_writes_itself_is_known():
    from transformers import DeepseekV3Config

    reference = DeepseekV3Config(rope_scaling=None)
    config_from_json({**reference.to_dict(), "model_type": "deepseek_v3"})
    config_from_json(json.loads(reference.to_json_string(use_diff=False)))


def test_extras_of_released_files_are_known():
    extras = {
        "auto_map": {"AutoConfig": "configuration_deepseek.DeepseekV3Config"},
        "aux_loss_alpha": 0.001,
        "seq_aux": True,
        "pretraining_tp": 1,
        "ep_size": 1,
        "use_cache": True,
        "transformers_version": "4.33.1",
        "_name_or_path": "x",
        "pad_token_id": 163839,
    }
    assert config_from_json(changed(**extras)) == config_from_json(V3)


@dataclass(frozen=True)
class LateMoE(MoE):
    """As CONTRIBUTING's steps add a field: in the schema, and not in the file's names."""

    late: str = "no"


def test_what_the_file_cannot_carry_is_not_written():
    moe = zoo("tiny-v3").moe
    late = replace(zoo("tiny-v3"), moe=LateMoE(**{f.name: getattr(moe, f.name) for f in fields(moe)}, late="yes"))
    with pytest.raises(ConfigError, match=r"cannot carry.*: moe\.late is 'yes' and has no field.*configs/hf\.py"):
        config_to_json(late)
    with pytest.raises(ConfigError, match=r"cannot carry.*: moe\.score is 'softmax' and would be read as 'sigmoid'"):
        config_to_json(zoo("tiny-v3", moe=replace(moe, score="softmax")))
    for change, said in (
        ({"score": "sqrtsoftplus"}, r"moe\.score is 'sqrtsoftplus' and would be read as 'sigmoid'"),
        ({"bias_form": "product"}, r"moe\.bias_form is 'product' and would be read as 'sum'"),
        ({"shared_dim": 24}, r"moe\.shared_dim is 24 and would be read as None"),
    ):
        with pytest.raises(ConfigError, match=f"cannot carry this model, which is not saved: {said}"):
            config_to_json(zoo("tiny-v3", moe=replace(moe, **change)))
    with pytest.raises(ConfigError, match="model of model_type llama has GQA, not MLA; give the config another"):
        config_to_json(zoo("tiny-v3", model_type="llama"))
    with pytest.raises(ConfigError, match=r"attention\.bias is True and would be read as False"):
        config_to_json(zoo("tiny-distill-qwen", model_type="llama"))
    with pytest.raises(ConfigError, match=r"mtp_depth is 1 and would be read as 0"):
        config_to_json(zoo("tiny-v2", mtp_depth=1))
    with pytest.raises(ConfigError, match=r"cannot carry this model, which is not saved: .*model_type 'mine'"):
        config_to_json(zoo("tiny-v3", model_type="mine"))
    with pytest.raises(ConfigError, match=r"cannot carry this model, which is not saved: .*num_hidden_layers"):
        config_to_json(zoo("tiny-v3", n_layers=20_000))


def test_no_object():
    with pytest.raises(ConfigError, match="JSON object"):
        config_from_json([1])


@st.composite
def configs(draw):
    def size(most=64):
        return draw(st.integers(1, most))

    def positive():
        return draw(st.floats(1e-7, 1e3))

    yarn = None
    if draw(st.booleans()):
        slow = positive()
        yarn = Yarn(
            1 + positive(),
            size(),
            slow + positive(),
            slow,
            *(draw(st.floats(0, 2, width=32, allow_subnormal=False)) for _ in range(2)),
        )
    groups = draw(st.sampled_from([1, 2, 4]))
    per_group = draw(st.integers(2, 8))
    top_groups = draw(st.integers(1, groups))
    moe = MoE(
        n_experts=groups * per_group,
        top_k=draw(st.integers(1, top_groups * per_group)),
        expert_dim=size(),
        n_shared=draw(st.integers(0, 3)),
        n_groups=groups,
        top_groups=top_groups,
        normalize=draw(st.booleans()),
        scale=positive(),
    )
    layers = size(8)
    dense = draw(st.integers(0, layers))
    return ModelConfig(
        name="drawn",
        vocab_size=draw(st.integers(100, 1000)),
        dim=size(),
        n_layers=layers,
        n_dense_layers=dense,
        ffn_dim=size(),
        attention=MLA(
            n_heads=size(),
            q_rank=draw(st.none() | st.integers(1, 64)),
            kv_rank=size(),
            nope_dim=size(),
            rope_dim=2 * size(),
            v_dim=size(),
            rope=Rope(1 + positive(), yarn, draw(st.booleans())),
        ),
        moe=moe if dense < layers or draw(st.booleans()) else None,
        mtp_depth=draw(st.integers(0, 3)),
        norm_eps=positive(),
        max_length=size(),
        tie_embeddings=draw(st.booleans()),
        init_std=positive(),
        model_type=draw(st.sampled_from(["deepseek_v3", "kimi_k2"])),
        bos_id=draw(st.none() | st.integers(0, 99)),
        eos_ids=tuple(draw(st.lists(st.integers(0, 99), max_size=3))),
    )


@settings(max_examples=200)
@given(configs())
def test_every_config_survives_the_file(cfg):
    assert config_from_json(json.loads(json.dumps(config_to_json(cfg))), "drawn") == cfg


ODD = st.sampled_from([10**400, -(10**400), 1e999, -1e999, float("nan"), 2**31, 10**9, 0, -1, 1.0, [], {}, "", "yarn"])
ANY_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | ODD,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
SPELLINGS = ["rope_parameters", "num_mtp_layers", "num_local_experts", "qk_head_dim"]
PLACES = [(field,) for field in [*V3, *SPELLINGS]] + [("rope_scaling", field) for field in ROPE_KEYS["yarn"]]


@settings(max_examples=1000)
@given(st.sampled_from(PLACES), ANY_JSON)
def test_any_value_is_read_or_refused(place, value):
    """Any value of any field leads to a ConfigError or to a config that its file can hold."""
    data = copy.deepcopy(V3)
    (data if len(place) == 1 else data[place[0]])[place[-1]] = value
    with contextlib.suppress(ConfigError), warnings.catch_warnings():
        warnings.simplefilter("ignore", CheckpointWarning)
        cfg = config_from_json(data)
        again = json.loads(json.dumps(config_to_json(cfg), allow_nan=False))
        assert config_from_json(again) == cfg
