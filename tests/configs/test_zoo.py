"""The releases are what their publishers say, and a wrong name or value is refused in one sentence."""

import re
from dataclasses import FrozenInstanceError, replace

import numpy as np
import pytest

from deepseek_jax.configs.schema import GQA, MLA, Compressed, ConfigError, Llama3, MoE, Rope, Yarn
from deepseek_jax.configs.zoo import meant, zoo


def test_names():
    assert {"deepseek-v3", "deepseek-r1", "deepseek-v3.1", "moonlight-16b", "kimi-k2", "tiny-v3"} <= set(zoo())
    for name in zoo():
        assert zoo(name).name == name


def test_v3():
    cfg = zoo("deepseek-v3")
    assert (cfg.vocab_size, cfg.dim, cfg.n_layers, cfg.n_dense_layers, cfg.ffn_dim) == (
        129280,
        7168,
        61,
        3,
        18432,
    )
    assert (cfg.max_length, cfg.norm_eps, cfg.mtp_depth, cfg.init_std) == (163840, 1e-6, 1, 0.006)
    assert (cfg.bos_id, cfg.eos_ids, cfg.tie_embeddings) == (0, (1,), False)
    yarn = Yarn(factor=40, original_length=4096, beta_fast=32, beta_slow=1, mscale=1, mscale_all_dim=1)
    assert cfg.attention == MLA(
        n_heads=128,
        kv_rank=512,
        nope_dim=128,
        rope_dim=64,
        v_dim=128,
        q_rank=1536,
        rope=Rope(10000, yarn, True),
    )
    assert cfg.moe == MoE(
        n_experts=256,
        top_k=8,
        expert_dim=2048,
        n_shared=1,
        n_groups=8,
        top_groups=4,
        normalize=True,
        scale=2.5,
    )


def test_moonlight():
    cfg = zoo("moonlight-16b")
    assert (cfg.vocab_size, cfg.dim, cfg.n_layers, cfg.n_dense_layers, cfg.ffn_dim) == (
        163840,
        2048,
        27,
        1,
        11264,
    )
    assert (cfg.max_length, cfg.norm_eps, cfg.mtp_depth, cfg.bos_id, cfg.eos_ids) == (
        8192,
        1e-5,
        0,
        163584,
        (163585,),
    )
    assert cfg.attention == MLA(
        n_heads=16, kv_rank=512, nope_dim=128, rope_dim=64, v_dim=128, q_rank=None, rope=Rope(50000)
    )
    assert cfg.moe == MoE(n_experts=64, top_k=6, expert_dim=1408, n_shared=2, scale=2.446)


def test_kimi_k2():
    cfg = zoo("kimi-k2")
    assert (cfg.vocab_size, cfg.dim, cfg.n_layers, cfg.n_dense_layers, cfg.ffn_dim) == (
        163840,
        7168,
        61,
        1,
        18432,
    )
    assert (cfg.max_length, cfg.norm_eps, cfg.mtp_depth, cfg.model_type) == (131072, 1e-6, 0, "kimi_k2")
    # Both betas are 1 in its config.json: the ramp between kept and divided frequencies is one wide.
    yarn = Yarn(factor=32, original_length=4096, beta_fast=1, beta_slow=1, mscale=1, mscale_all_dim=1)
    assert cfg.attention == MLA(
        n_heads=64, kv_rank=512, nope_dim=128, rope_dim=64, v_dim=128, q_rank=1536, rope=Rope(50000, yarn)
    )
    assert cfg.moe == MoE(n_experts=384, top_k=8, expert_dim=2048, n_shared=1, scale=2.827)


def test_r1_and_v31_are_v3():
    v3 = zoo("deepseek-v3")
    for name in ("deepseek-r1", "deepseek-v3.1"):
        assert replace(zoo(name), name="deepseek-v3") == v3


def test_the_tiny_twin_has_every_mechanism():
    cfg = zoo("tiny-v3")
    assert cfg.attention.q_rank
    assert cfg.attention.rope.yarn.original_length < cfg.max_length
    assert cfg.moe.n_groups > cfg.moe.top_groups > 1
    assert cfg.moe.n_shared
    assert cfg.n_dense_layers
    assert cfg.mtp_depth


def test_twins_have_their_releases_mechanisms():
    twins = {
        "tiny-llm": "deepseek-llm-67b",
        "tiny-moe": "deepseek-moe-16b",
        "tiny-v2-lite": "deepseek-v2-lite",
        "tiny-v2": "deepseek-v2",
        "tiny-v3.2": "deepseek-v3.2",
        "tiny-v4": "deepseek-v4-flash",
        "tiny-distill-qwen": "r1-distill-qwen-1.5b",
        "tiny-distill-llama": "r1-distill-llama-8b",
    }

    def mechanisms(cfg):
        a, moe, rope = cfg.attention, cfg.moe, cfg.attention.rope
        return (
            cfg.model_type,
            cfg.tie_embeddings,
            cfg.n_dense_layers < cfg.n_layers,
            type(a),
            getattr(a, "bias", None),
            getattr(a, "q_rank", None) is None,
            getattr(a, "indexer", None) is None,
            getattr(a, "n_kv_heads", 1) < a.n_heads,
            (rope.interleaved, rope.yarn is None, rope.llama3 is None, rope.yarn and rope.yarn.mscale_all_dim),
            [layer.attention.sparse for layer in cfg.layers[:5]] if isinstance(a, Compressed) else None,
            cfg.residual,
            moe and (moe.n_hash, moe.limit),
            moe and (moe.score, moe.group_score, moe.bias, moe.normalize, moe.n_shared, moe.n_groups > moe.top_groups),
        )

    for twin, release in twins.items():
        assert mechanisms(zoo(twin)) == mechanisms(zoo(release)), twin


def test_configs_are_hashable_and_frozen():
    cfg = zoo("deepseek-v3")
    assert hash(cfg) == hash(zoo("deepseek-v3"))
    with pytest.raises(FrozenInstanceError):
        cfg.dim = 1


V3 = zoo("deepseek-v3")
WRONG_TYPES = [
    (V3, "dim", "7168", "an integer, not '7168'"),
    (V3, "dim", 7168.0, "an integer, not 7168.0"),
    (V3, "n_layers", True, "an integer, not True"),
    (V3, "mtp_depth", None, "an integer, not None"),
    (V3, "norm_eps", "1e-6", "a number, not '1e-6'"),
    (V3, "norm_eps", float("nan"), "a number, not nan"),
    (V3, "norm_eps", float("inf"), "a number, not inf"),
    (V3, "norm_eps", 10**400, "a number, not 1000"),
    (V3, "norm_eps", 1e-6 + 0j, "a number, not "),
    (V3, "tie_embeddings", 1, "True or False, not 1"),
    (V3, "name", 3, "text, not 3"),
    (V3, "moe", {"n_experts": 4}, "a MoE or None, not {'n_experts': 4}"),
    (V3, "attention", None, "a MLA or a GQA or a Compressed, not None"),
    (V3, "eos_ids", [1], r"a tuple, each element an integer, not \[1\]"),
    (V3, "eos_ids", 1, "a tuple, each element an integer, not 1"),
    (V3, "eos_ids", (1.0,), "a tuple, each element an integer, not "),
    (V3, "bos_id", "0", "an integer or None, not '0'"),
    (V3.attention, "q_rank", 1536.5, "an integer or None, not 1536.5"),
    (V3.attention, "rope", 10000.0, "a Rope, not 10000.0"),
    (V3.attention.rope, "theta", "x" * 100_000, "a number, not 'xxx"),
    (V3.attention.rope, "yarn", 40, "a Yarn or None, not 40"),
    (V3.attention.rope.yarn, "factor", True, "a number, not True"),
    (V3.moe, "top_k", np.float32(8), "an integer, not "),
    (V3.moe, "n_shared", np.array([1]), "an integer, not array"),
    (V3.moe, "normalize", None, "True or False, not None"),
]


@pytest.mark.parametrize(("owner", "field", "value", "message"), WRONG_TYPES)
def test_a_value_of_the_wrong_type_is_refused(owner, field, value, message):
    with pytest.raises(ConfigError, match=f"{type(owner).__name__}: {field} must be {message}") as caught:
        replace(owner, **{field: value})
    assert len(str(caught.value)) < 300


def test_numbers_become_those_of_python():
    cfg = replace(V3, dim=np.int64(7168), norm_eps=1, eos_ids=(np.int32(1),), init_std=np.float64(0.5))
    assert [type(v) for v in (cfg.dim, cfg.norm_eps, cfg.eos_ids[0], cfg.init_std)] == [int, float, int, float]
    assert cfg == replace(V3, norm_eps=1.0, init_std=0.5)
    assert hash(cfg) == hash(replace(V3, norm_eps=1.0, init_std=0.5))


def test_changes_are_applied():
    cfg = zoo("tiny-v3", n_layers=5, mtp_depth=2)
    assert (cfg.n_layers, cfg.n_moe_layers, cfg.mtp_depth) == (5, 4, 2)


def test_unknown_and_unbuilt_names_say_so():
    with pytest.raises(ConfigError, match=r"there is no model 'gpt2'; built are: deepseek-llm-7b, "):
        zoo("gpt2")
    for name in ("deepseek-v4.1-flash",):
        with pytest.raises(ConfigError, match=rf"'{name}' belongs to the family but is not built yet"):
            zoo(name)


@pytest.mark.parametrize(
    ("name", "likeliest"),
    [
        ("deepseek-ai/DeepSeek-V3", "deepseek-v3"),
        ("deepseek-ai/DeepSeek-V3-0324", "deepseek-v3"),
        ("DeepSeek-V3-Base", "deepseek-v3"),
        ("DeepSeek-V3.1-Base", "deepseek-v3.1"),
        ("DeepSeek-R1-Distill-Qwen-7B", "r1-distill-qwen-7b"),
        ("moonshotai/Moonlight-16B-A3B-Instruct", "moonlight-16b"),
        ("deepseek_v3", "deepseek-v3"),
        ("v3", "deepseek-v3"),
        ("kimi", "kimi-k2"),
        ("V4", "deepseek-v4-flash"),
        ("deepsek-v3", "deepseek-v3"),
    ],
)
def test_a_name_is_guessed(name, likeliest):
    assert meant(name)[0] == likeliest
    with pytest.raises(
        ConfigError, match=rf"there is no model '{name}'; did you mean {re.escape(likeliest)}( or .*)?\?"
    ):
        zoo(name)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: replace(V3, dim=0), "dim must be positive, not 0"),
        (lambda: replace(V3, n_dense_layers=62), "n_dense_layers=62 does not lie within n_layers=61"),
        (lambda: replace(V3, moe=None), "58 layers are neither dense nor have a MoE config"),
        (lambda: replace(V3, eos_ids=(129280,)), "eos_ids 129280 lies outside vocab_size=129280"),
        (lambda: replace(V3, bos_id=-1), "bos_id -1 lies outside"),
        (lambda: replace(V3.moe, n_groups=7), "n_experts=256 does not divide into n_groups=7 groups"),
        (lambda: replace(V3.moe, top_groups=9), "top_groups=9 exceeds n_groups=8"),
        (lambda: replace(V3.moe, top_k=129), "top_k=129 exceeds the 128 experts that top_groups=4 of n_groups=8 offer"),
        (lambda: replace(V3.moe, n_groups=256), "have 1 each"),
        (lambda: replace(V3.moe, score="tanh"), "MoE score must be one of sigmoid, softmax, sqrtsoftplus, not 'tanh'"),
        (lambda: replace(V3.moe, bias_form="add"), "MoE bias_form must be one of sum, product, not 'add'"),
        (lambda: replace(V3.moe, bias_form="product", bias=False), "says how a bias acts, but bias is False"),
        (lambda: replace(V3.moe, shared_dim=0), "MoE shared_dim must be positive, not 0"),
        (lambda: replace(V3.moe, shared_dim=8, n_shared=0), "width of a shared expert, but n_shared is 0"),
        (lambda: replace(V3.moe, group_score="mean"), "MoE group_score must be one of top2, max, not 'mean'"),
        (lambda: GQA(4, 3, 16), "n_heads=4 does not divide into n_kv_heads=3 groups"),
        (lambda: GQA(4, 0, 16), "GQA n_kv_heads must be positive, not 0"),
        (lambda: GQA(4, 2, 15), "GQA head_dim must be even, not 15"),
        (lambda: Llama3(0.5, 8192), "Llama3 factor must be at least 1, not 0.5"),
        (lambda: Llama3(8.0, 8192, 4.0, 4.0), "Llama3 needs high_turns > low_turns > 0, not 4.0 and 4.0"),
        (lambda: Rope(1e4, Yarn(4.0, 64), llama3=Llama3(8.0, 64)), "extended by yarn or by llama3, not by both"),
        (lambda: replace(V3.attention, rope_dim=63), "rope_dim must be even, not 63"),
        (lambda: Yarn(factor=0.5, original_length=4096), "YaRN factor must be at least 1, not 0.5"),
        (
            lambda: Yarn(factor=2, original_length=4096, beta_fast=1, beta_slow=2),
            "YaRN needs beta_fast >= beta_slow > 0, not 1.0 and 2.0",
        ),
        # Fine as Python's numbers, not as float32's.
        (lambda: replace(V3, norm_eps=1e-46), "norm_eps is used as float32, where 1e-46 counts as 0"),
        (lambda: replace(V3, init_std=1e39), "init_std must be finite, not 1e[+]39"),
        (lambda: Rope(theta=1e300), "Rope theta must be finite"),
        (lambda: Rope(theta=1), "RoPE theta must exceed 1, not 1.0"),
    ],
)
def test_a_contradiction_is_refused(make, message):
    with pytest.raises(ConfigError, match=message):
        make()
