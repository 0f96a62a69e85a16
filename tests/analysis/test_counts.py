"""The counts of every release are the published figures, and what the model's own tree holds."""

import math
import subprocess
import sys
from dataclasses import replace

import pytest
from tiny import tiny_config

from deepseek_jax.analysis.counts import counts
from deepseek_jax.analysis.forms import reads
from deepseek_jax.analysis.published.costs import COSTS
from deepseek_jax.analysis.published.figure import CONTEXT
from deepseek_jax.analysis.published.table import release_of
from deepseek_jax.analysis.shapes import disagreements, shape_counts
from deepseek_jax.configs.releases.v4 import deepseek_v4_flash, deepseek_v4_pro
from deepseek_jax.configs.schema import HyperConnections
from deepseek_jax.configs.zoo import language_models, zoo
from deepseek_jax.convert.names import layout


def test_v3_parameters():
    c = counts(zoo("deepseek-v3"))
    assert c.total == 671_026_404_352
    assert c.router_bias == 14_848
    assert c.attention_per_layer == 187_107_328
    assert c.expert == 44_040_192
    assert c.embedding == 926_679_040
    assert sum(c.components.values()) == c.total


def test_v3_activated_parameters():
    c = counts(zoo("deepseek-v3"))
    assert c.activated_no_embedding == 36_625_603_584
    assert c.activated == 37_552_282_624
    assert c.activated - c.activated_no_embedding == c.embedding


def test_v3_mtp_and_the_whole_checkpoint():
    c = counts(zoo("deepseek-v3"))
    assert c.mtp_components["projection"] == 2 * 7168 * 7168
    assert c.mtp - c.mtp_components["projection"] == 11_507_307_520
    assert c.mtp == 11_610_067_968
    assert c.mtp_stored == 13_463_426_048
    assert c.mtp_router_bias == 256
    assert c.stored == 671_026_404_352 + 13_463_426_048 + 14_848 + 256


def test_v3_cache():
    c = counts(zoo("deepseek-v3"))
    assert c.kv_values_per_token_layer == 576
    assert c.kv_bytes_per_token == 70_272
    assert c.kv_bytes_per_token_mha == 2 * 128 * 128 * 61 * 2
    assert c.kv_bytes_per_token_gqa8 == 2 * 8 * 128 * 61 * 2
    assert c.kv_bytes_per_token_mtp == 576 * 2
    # V2, table 1: as much as grouped attention with 2.25 groups.
    assert c.kv_bytes_per_token / (c.kv_bytes_per_token_gqa8 / 8) == 2.25


def test_v3_flops():
    c = counts(zoo("deepseek-v3"), context=4096)
    # Forward and backward of scores (192) and values (128), 128 heads, 61 layers, 2048 keys on average.
    assert c.flops_per_token == 6 * 36_625_603_584 + 3 * 2 * 2048 * (192 + 128) * 128 * 61
    assert c.flops_per_token == 250_455_926_784
    assert c.forward_flops_per_token * 3 == c.flops_per_token
    assert c.decode_flops_per_token == 2 * 36_625_603_584 + 2 * 4096 * (576 + 512) * 128 * 61


def test_flops_grow_with_the_context_and_parameters_do_not():
    short, long = counts(zoo("deepseek-v3"), context=1), counts(zoo("deepseek-v3"), context=131_072)
    assert short.total == long.total
    assert short.kv_bytes_per_token == long.kv_bytes_per_token
    assert long.flops_per_token - short.flops_per_token == 131_071 * 3 * 320 * 128 * 61


def test_other_releases():
    moonlight, kimi = counts(zoo("moonlight-16b")), counts(zoo("kimi-k2"))
    assert moonlight.total == 15_960_108_544
    # 2502.16982, table 4, leaves both embeddings out.
    assert round((moonlight.total - 2 * moonlight.embedding) / 1e9, 2) == 15.29
    assert round((moonlight.activated - 2 * moonlight.embedding) / 1e9, 2) == 2.24
    assert round(kimi.total / 1e12, 2) == 1.03
    assert kimi.activated_no_embedding < 32.6e9 < kimi.activated
    assert kimi.mtp == moonlight.mtp == moonlight.mtp_stored == 0


# Parameters, and bytes of cache a token in bfloat16. DeepSeek's MoE models as counted on transformers' modules without
# weights; the dense ones are what their publishers' pages round (1.78B, 7.62B, 14.8B, 32.8B; 8.03B, 70.6B).
EXACT = {
    "deepseek-llm-7b": (6_910_365_696, 2 * 30 * 32 * 128 * 2),
    "deepseek-llm-67b": (67_425_001_472, 2 * 95 * 8 * 128 * 2),
    "deepseek-moe-16b": (16_375_728_128, 2 * 28 * 16 * 128 * 2),
    "deepseek-v2-lite": (15_706_484_224, 27 * 576 * 2),
    "deepseek-v2": (235_741_434_880, 60 * 576 * 2),
    "r1-distill-qwen-1.5b": (1_777_088_000, 2 * 28 * 2 * 128 * 2),
    "r1-distill-qwen-7b": (7_615_616_512, 2 * 28 * 4 * 128 * 2),
    "r1-distill-qwen-14b": (14_770_033_664, 2 * 48 * 8 * 128 * 2),
    "r1-distill-qwen-32b": (32_763_876_352, 2 * 64 * 8 * 128 * 2),
    "r1-distill-llama-8b": (8_030_261_248, 2 * 32 * 8 * 128 * 2),
    "r1-distill-llama-70b": (70_553_706_496, 2 * 80 * 8 * 128 * 2),
}


def test_exact_totals():
    for name, (total, cache) in EXACT.items():
        c = counts(zoo(name))
        assert (c.total, c.kv_bytes_per_token, c.stored) == (total, cache, total), name
        assert c.router_bias == 0


def test_v32():
    """V3 and an indexer in each layer: 13.96M parameters, 128 numbers of cache."""
    c, v3 = counts(zoo("deepseek-v3.2"), context=131072), counts(zoo("deepseek-v3"), context=131072)
    indexer = 1536 * 64 * 128 + (7168 + 2) * 128 + 7168 * 64
    assert indexer == 13_959_424
    assert c.total == v3.total + 61 * indexer == 671_877_929_216
    assert c.mtp == v3.mtp + indexer
    assert (c.activated_no_embedding, c.activated) == (37_477_128_448, 38_403_807_488)
    assert c.kv_values_per_token_layer == 576 + 128
    # A query multiplies with 2048 keys, all of which are scored: at 128K a step costs a fifth of dense attention's.
    attention = 2 * 61 * (2048 * 128 * (2 * 512 + 64) + 131072 * 64 * 129)
    assert c.decode_flops_per_token == 2 * c.activated_no_embedding + attention
    assert counts(zoo("deepseek-v3.2"), context=2048).flops_per_token == (
        counts(zoo("deepseek-v3"), context=2048).flops_per_token + 6 * 61 * indexer + 3 * 61 * 2048 * 64 * 129
    )


def test_v4_parameters():
    """284B and 13B, 1.6T and 49B; as counted on transformers' classes without weights."""
    flash, pro = counts(deepseek_v4_flash("flash")), counts(deepseek_v4_pro("pro"))
    assert (flash.total, flash.router_bias) == (284_332_230_231, 40 * 256)
    assert (pro.total, pro.router_bias) == (1_572_997_179_491, 58 * 384)
    assert flash.hash_tables == pro.hash_tables == 3 * 129_280 * 6
    assert [round(c.activated_no_embedding / 1e9, 3) for c in (flash, pro)] == [13.270, 48.852]
    assert [round(c.activated / 1e9, 3) for c in (flash, pro)] == [13.800, 49.779]
    assert [round(c.mtp / 1e9, 2) for c in (flash, pro)] == [6.61, 25.84]
    # Their files hold no copies of the embedding and the head.
    assert flash.stored == flash.total + flash.mtp + flash.hash_tables + 41 * 256


def test_v4_cache_and_flops():
    """Of a token 128 recent keys, a quarter of an entry and of its key for the indexer in 21 layers, a 128th in 20."""
    cfg, length = deepseek_v4_flash("flash"), 2**20
    c = counts(cfg, context=length)
    entries = 21 * length // 4 * (512 + 128) + 20 * length // 128 * 512
    assert c.kv_bytes == 2 * (43 * 128 * 512 + entries)
    assert c.kv_bytes_per_token == 2 * (21 * 160 + 20 * 4) + 6  # of which the recent tokens are the rest, rounded up
    assert c.kv_bytes_per_token_gqa8 == 43 * 2 * 8 * 512 * 2
    core, scores = 64 * 2 * 512, 64 * 129
    attention = 43 * 128 * core + 21 * (512 * core + length // 4 * scores) + 20 * length // 128 * core
    assert c.decode_flops_per_token == 2 * c.activated_no_embedding + 2 * attention
    # In a short row everything is recent, and no entry is complete.
    short = counts(cfg, context=3)
    assert short.kv_bytes == 2 * 43 * 3 * 512
    assert short.forward_flops_per_token == 2 * short.activated_no_embedding + 43 * 3 * core


def test_what_is_read_on_average_is_the_sum_over_a_row():
    """Window, all entries of 128, and of those of 4 the chosen ones, after each token of a row."""
    length = 4096
    for layer in (0, 3, 4):
        for read in reads(deepseek_v4_flash("flash").layers[layer].attention):
            exact = 2 * sum(read.after(n) for n in range(1, length + 1)) / length
            assert read.flops(length) == pytest.approx(exact, rel=0.05)


def test_activated_parameters_of_v1_and_v2():
    # 2.619/2.829, 2.451/2.661 and 20.852/21.376 billion; V2's claim is 21B, V2-Lite's 2.4B, DeepSeekMoE's 2.8B.
    found = {}
    for name in ("deepseek-moe-16b", "deepseek-v2-lite", "deepseek-v2"):
        c = counts(zoo(name))
        found[name] = (c.activated_no_embedding, c.activated)
    assert found == {
        "deepseek-moe-16b": (2_618_935_296, 2_828_650_496),
        "deepseek-v2-lite": (2_451_435_008, 2_661_150_208),
        "deepseek-v2": (20_851_512_320, 21_375_800_320),
    }


def test_v2_cache_and_flops():
    c = counts(zoo("deepseek-v2"))
    # V2 table 9's large model: 34,560 numbers a token; 155 GFLOPs (2505.09343, table 2).
    assert c.kv_bytes_per_token // 2 == 34_560
    assert round(c.flops_per_token / 1e9, 1) == 155.3
    llm = counts(zoo("deepseek-llm-67b"))
    # V2, abstract: 93.3% less cache than DeepSeek 67B, its own stored in 6 bits.
    assert round(1 - 34_560 * 6 / (llm.kv_bytes_per_token // 2 * 16), 3) == 0.933


def test_gqa_decodes_as_it_trains():
    a = zoo("deepseek-llm-67b").attention
    c = counts(zoo("deepseek-llm-67b"))
    assert c.decode_flops_per_token == 2 * c.activated_no_embedding + 2 * 95 * 4096 * 2 * a.n_heads * 128
    assert c.kv_bytes_per_token == c.kv_bytes_per_token_gqa8 == c.kv_bytes_per_token_mha // 8


@pytest.mark.parametrize("name", language_models())
def test_the_full_size_model_holds_what_is_counted(name):
    cfg = zoo(name)
    c = counts(cfg)
    assert disagreements(cfg, c) == []
    main = shape_counts(cfg)["main"]
    assert sum(main.values()) == c.total + c.router_bias + c.hash_tables


@pytest.mark.parametrize(
    "changes",
    [
        {"tie_embeddings": True},
        {"mtp_depth": 0},
        {"mtp_depth": 3},
        {"n_dense_layers": 0},
        {"n_dense_layers": 3, "moe": None},
        {"n_dense_layers": 3, "moe": None, "mtp_depth": 2, "tie_embeddings": True},
        {"moe": replace(tiny_config().moe, n_shared=0)},
        {"moe": replace(tiny_config().moe, n_shared=2, shared_dim=20)},
        {"attention": replace(tiny_config().attention, q_rank=None)},
        {"residual": HyperConnections(n_streams=3), "mtp_depth": 2},
        {"residual": HyperConnections(constrained=False), "mtp_depth": 2},
    ],
    ids=str,
)
def test_ablations_hold_what_is_counted(changes):
    cfg = tiny_config(**changes)
    assert disagreements(cfg, counts(cfg)) == []


@pytest.mark.parametrize(
    "cfg",
    [*map(zoo, language_models()), tiny_config(mtp_depth=2, tie_embeddings=True)],
    ids=lambda cfg: cfg.name,
)
def test_published_files_hold_what_is_counted(cfg):
    assert sum(math.prod(tensor.shape) for tensor in layout(cfg)[0] if tensor.written) == counts(cfg).stored


def test_fewer_heads_than_eight_are_not_padded():
    c = counts(tiny_config())
    assert c.kv_bytes_per_token_gqa8 == c.kv_bytes_per_token_mha == 3 * 4 * (16 + 16) * 2


def test_a_wrong_count_is_noticed():
    cfg = tiny_config()
    c = counts(cfg)
    wrong = replace(c, components={**c.components, "attention": c.components["attention"] + 1})
    (line,) = disagreements(cfg, wrong)
    assert "main attention" in line


def test_a_tied_embedding_is_multiplied_with():
    untied, tied = counts(tiny_config()), counts(tiny_config(tie_embeddings=True))
    assert tied.total == untied.total - untied.embedding
    assert tied.activated_no_embedding == untied.activated_no_embedding
    assert tied.flops_per_token == untied.flops_per_token


def test_streams_add_what_mhc_has():
    """The tensors of V4-Flash's width: 2 x [24, 16384], biases and scales a layer, and [4, 16384] at the end."""
    plain, streams = (counts(tiny_config(dim=4096, residual=r)) for r in (None, HyperConnections()))
    sublayer, collapse = 24 * 16384 + 24 + 3, 4 * 16384 + 4 + 1
    assert streams.components["hyper_connections"] == streams.total - plain.total == 3 * 2 * sublayer + collapse
    assert streams.mtp_components["hyper_connections"] == 2 * sublayer + collapse
    # A module's map of streams is used for each of four.
    more = streams.mtp_components["hyper_connections"] + 3 * 4096 * 4096
    assert streams.flops_per_token_mtp == plain.flops_per_token_mtp + 6 * more


def test_context_must_be_positive():
    with pytest.raises(ValueError, match="context must be a positive number of tokens, not 0"):
        counts(tiny_config(), context=0)


def test_training_cost():
    cost, c = COSTS["deepseek-v3"], counts(zoo("deepseek-v3"), CONTEXT)
    assert cost.gpu_hours == 2_788_000
    assert cost.dollars == 5_576_000
    assert round(cost.days, 1) == 54.2
    assert round(cost.flops_per_second(c.flops_per_token) / 1e12, 1) == 386.5
    assert round(cost.utilization(c.flops_per_token), 3) == 0.391


def test_an_ablation_is_not_the_release():
    assert release_of(zoo("deepseek-v3")) == "deepseek-v3"
    assert release_of(zoo("deepseek-v3", n_layers=60)) is None


def test_counting_does_not_load_jax():
    code = "import sys, deepseek_jax as dsj; dsj.counts(dsj.zoo('deepseek-v3')); sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_as_dict_is_plain():
    c = counts(zoo("deepseek-v3"))
    assert c.as_dict()["components"]["attention"] == 61 * 187_107_328
    assert c.as_dict()["total"] == c.total
