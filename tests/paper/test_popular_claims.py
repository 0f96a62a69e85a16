"""What articles repeat of V3 and R1, held to the exact figures: a test for each row of the note."""

from dataclasses import asdict, replace
from pathlib import Path

import pytest

from deepseek_jax.analysis.counts import counts
from deepseek_jax.analysis.published.absent import ABSENT
from deepseek_jax.analysis.published.costs import COSTS, R1_STAGES, r1_hours
from deepseek_jax.analysis.published.figure import counted, outcome
from deepseek_jax.analysis.published.parameters import fp8_scales
from deepseek_jax.analysis.published.table import FIGURES
from deepseek_jax.analysis.published.training import R1_SECOND_STAGE
from deepseek_jax.configs.schema import GQA, MLA
from deepseek_jax.configs.zoo import zoo
from deepseek_jax.rl.recipe import Rewards
from deepseek_jax.rl.rewards import answer_of, format_reward, same_integer

V3, COST = zoo("deepseek-v3"), COSTS["deepseek-v3"]
# The note's text, a space between any two words.
NOTE = " ".join((Path(__file__).parents[2] / "paper_notes" / "popular_claims.md").read_text(encoding="utf-8").split())


def holds(*names: str) -> bool:
    return all(outcome(FIGURES[name]).verdict != "differs" for name in names)


def test_v3_has_latent_attention_and_the_67b_grouped_queries():
    assert isinstance(V3.attention, MLA)
    c = counted("deepseek-v3")
    assert (c.kv_values_per_token_layer, c.kv_bytes_per_token) == (576, 70_272)
    assert c.kv_bytes_per_token_gqa8 / c.kv_bytes_per_token == pytest.approx(3.6, abs=0.05)
    assert holds("v3-cache", "mla-groups")
    grouped = zoo("deepseek-llm-67b").attention
    assert isinstance(grouped, GQA)
    assert (grouped.n_heads, grouped.n_kv_heads) == (64, 8)


def test_nine_experts_take_a_token_and_three_layers_have_none():
    assert (V3.moe.top_k, V3.moe.n_experts, V3.moe.n_shared) == (8, 256, 1)
    assert V3.moe.top_k + V3.moe.n_shared == 9
    assert [layer.is_moe for layer in V3.layers] == [False] * 3 + [True] * 58


def test_37b_is_the_count_without_the_input_embedding():
    c = counted("deepseek-v3")
    assert (round(c.activated_no_embedding / 1e9, 2), round(c.activated / 1e9, 2)) == (36.63, 37.55)
    assert round(c.activated / 1e9) == 38
    assert round(c.activated_no_embedding / c.total, 3) == 0.055
    assert holds("v3-activated", "v3-parameters")


def test_685b_are_the_files_with_mtp_and_scales():
    c = counted("deepseek-v3")
    assert round(c.total / 1e9, 2) == 671.03
    assert round(c.mtp_stored / 1e9, 2) == 13.46
    # Without the scales it would be 684.
    assert round(c.stored / 1e9) == 684
    assert round((c.stored + fp8_scales(V3)) / 1e9, 2) == 684.53
    assert holds("v3-files")


def test_the_final_run_cost_5_576_million_at_an_assumed_price():
    assert (COST.price, COST.gpu_hours, COST.dollars) == (2, 2_788_000, 5_576_000)
    assert COST.stages[0].gpu_hours * COST.price == 5_328_000
    assert holds("v3-dollars", "v3-pretraining-dollars", "v3-extension-dollars", "v3-post-dollars")


def test_54_days_are_pre_training_alone():
    assert round(COST.days, 1) == 54.2
    assert round(COST.gpu_hours / COST.n_gpus / 24, 1) == 56.7
    assert holds("v3-days", "v3-all-days", "v3-day")


def test_2048_gpus_agree_with_the_hours():
    assert (COST.gpu, COST.n_gpus) == ("H800", 2048)
    assert holds("v3-days-a-trillion", "v3-pretraining-hours")


def test_r1_came_on_top_of_v3():
    assert [stage.gpu_hours for stage in R1_STAGES] == [101_000, 5_000, 41_000]
    assert r1_hours() * COST.price == 294_000
    assert r1_hours() * COST.price + COST.dollars == 5_870_000
    assert holds("r1-hours", "r1-dollars", "r1-zero-hours")
    # It is V3's architecture, of the same size.
    assert counted("deepseek-r1").total == counted("deepseek-v3").total


def test_128k_comes_from_two_short_phases():
    assert V3.attention.rope.yarn.original_length == 4096
    assert holds("v3-extension-32k", "v3-extension-128k")
    phases = FIGURES["v3-extension-32k"].ours(), FIGURES["v3-extension-128k"].ours()
    assert phases[0] == phases[1] == 62_914_560_000
    assert round(sum(phases) / COST.tokens, 3) == 0.009
    assert round(COST.stages[1].gpu_hours / COST.gpu_hours, 3) == 0.043


def test_mtp_is_one_module_that_can_be_dropped():
    assert V3.mtp_depth == 1
    c, without = counted("deepseek-v3"), counts(zoo("deepseek-v3", mtp_depth=0))
    assert c.mtp == 11_610_067_968
    assert without == replace(
        c, mtp=0, mtp_components=dict.fromkeys(c.mtp_components, 0), mtp_router_bias=0, mtp_stored=0,
        stored=c.total + c.router_bias, kv_bytes_per_token_mtp=0, flops_per_token_mtp=0,
    )  # fmt: skip
    assert holds("v3-mtp")


def test_preferences_took_part_in_a_quarter_of_one_stage():
    # What a run is rewarded for by default are R1-Zero's two rules; a rule judges by the text alone.
    assert {name for name, weight in asdict(Rewards()).items() if weight} == {"accuracy", "format"}
    texts = ("<think>1 + 1</think><answer>2</answer>", "1 + 1 is 2")
    assert [(format_reward(text), same_integer(answer_of(text), 2)) for text in texts] == [(1, 1), (0, 0)]
    steps, last = R1_SECOND_STAGE
    assert f"in the last {last} of {steps:,} steps of its second stage, {last / steps:.0%}." in NOTE
    assert holds("r1-preferences", "r1-zero-batch", "r1-zero-rollout")
    # How long it ran is not computed here, and the table says whose figure that is.
    assert [absent.id for absent in ABSENT if absent.source == "2501.12948"] == ["r1-zero-steps"]


def test_the_note_counts_the_figures_as_the_table_does():
    verdicts = [outcome(figure).verdict for figure in FIGURES.values()]
    equal, rounded, differing = (verdicts.count(verdict) for verdict in ("equal", "rounds to it", "differs"))
    derived = sum(figure.source.endswith(", from") for figure in FIGURES.values())
    assert (
        f"Of {len(verdicts)} figures, {derived} of which no paper prints but which follow from its settings "
        f'("from" in their source), {equal} are equal to ours, {rounded} are ours rounded and {differing} differ.'
    ) in NOTE
