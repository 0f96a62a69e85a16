"""Every published figure is equal to ours, is what ours rounds to, or is named here as one that does not reproduce."""

import math
import re

import pytest

from deepseek_jax.analysis.published.absent import ABSENT
from deepseek_jax.analysis.published.figure import Figure, outcome
from deepseek_jax.analysis.published.parameters import fp8_scales
from deepseek_jax.analysis.published.table import FIGURES, SECTIONS, of_release
from deepseek_jax.configs.zoo import zoo
from deepseek_jax.convert.names import layout

# What ours is beside what is printed, of every figure that does not reproduce.
DIFFERING = {
    "janus-pro-1b-parameters": ("1B", "2.08B"),
    "janus-pro-1b-language": ("1.5B", "1.653B"),
    "v2-lite-activated": ("2.4B", "2.451B"),
    "v3-activated-first": ("36.7B", "36.626B"),
    "v3-mtp-files": ("14B", "13.46B"),
    "llama-405b-cache-ratio": ("7.28x", "7.3443x"),
    "flops-share-7b": ("40.5%", "40.562%"),
    "flops-moe-145b": ("585.6 TFLOPs", "585.490 TFLOPs"),
    "qwen-72b-training": ("394 GFLOPs", "444.87 GFLOPs"),
    "llama-405b-training": ("2448 GFLOPs", "2,473.25 GFLOPs"),
    "expert-choice-leak": ("50 bits", "50.53 bits"),
    "rate-ib": ("67 tokens/s", "67.76 tokens/s"),
    "day-revenue": ("$562,027", "$562,100.00"),
    "day-nodes": ("226.75 nodes", "226.8636 nodes"),
}


@pytest.mark.parametrize("figure", [f for f in FIGURES.values() if f.id not in DIFFERING], ids=lambda f: f.id)
def test_a_published_figure_is_ours(figure):
    found = outcome(figure)
    assert found.verdict != "differs", f"{figure.name}: {figure.published_text} is published, ours is {found.text}"


@pytest.mark.parametrize("name", DIFFERING)
def test_a_figure_that_does_not_reproduce_says_why(name):
    found = outcome(FIGURES[name])
    assert found.verdict == "differs"
    assert (found.figure.published_text, found.text) == DIFFERING[name]
    assert found.figure.note


def test_figures_are_told_apart_and_have_a_source():
    everything = [*FIGURES.values(), *ABSENT]
    assert len({figure.id for figure in everything}) == len(ABSENT) + sum(map(len, SECTIONS.values()))
    for figure in everything:
        assert figure.source
        assert re.fullmatch(r"[a-z0-9.-]+", figure.id), figure.id
    assert all(absent.on for absent in ABSENT)


@pytest.mark.parametrize(
    ("ours", "verdict", "text"),
    [
        (250 * 10**9, "equal", "250B"),
        (250_499_999_999, "rounds to it", "250.50B"),
        (249_500_000_000, "rounds to it", "249.50B"),
        (250_500_000_000, "differs", "250.50B"),
        (249_499_999_999, "differs", "249.50B"),
        (251 * 10**9, "differs", "251.00B"),
    ],
)
def test_a_figure_rounds_to_its_last_digit(ours, verdict, text):
    found = outcome(Figure("x", "x", "x", "250", "B", lambda: ours))
    assert (found.verdict, found.text) == (verdict, text)


def test_zeros_may_mean_nothing_and_money_stands_before_its_number():
    hundreds = Figure("x", "x", "x", "1,200", "$M", lambda: 1_249_999_999, digits=-2)
    assert (outcome(hundreds).verdict, outcome(hundreds).text) == ("rounds to it", "$1,250M")
    assert hundreds.published_text == "$1,200M"
    meant = Figure("x", "x", "x", "0.010", "$M", lambda: 10_600)
    assert (outcome(meant).verdict, outcome(meant).text) == ("differs", "$0.01060M")


def test_every_release_has_published_figures_and_an_ablation_has_none():
    releases = [name for name in zoo() if not name.startswith("tiny-")]
    assert [name for name in releases if not of_release(name)] == []
    assert of_release(None) == of_release("tiny-v3") == ()
    shown = {release for figure in FIGURES.values() for release in figure.releases}
    assert shown == set(releases)


def test_fp8_scales_are_those_of_the_files():
    cfg = zoo("deepseek-v3")
    held = sum(math.prod(-(-size // 128) for size in t.shape) for t in layout(cfg)[0] if t.fp8 and t.written)
    assert fp8_scales(cfg) == held == 41_540_496
