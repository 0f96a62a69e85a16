"""The other architectures in use: trained from scratch and with adapters, exported, verified, and made to write."""

import json

import numpy as np
import pytest
from architectures import ARCHITECTURES

import deepseek_jax as dsj
from deepseek_jax.cli.main import main
from deepseek_jax.configs.hf import config_to_json

SIZES = [
    *("--length", "64", "--batch-rows", "4", "--first-rows", "4", "--micro-rows", "4"),
    *("--log-every", "10", "--save-every", "1000", "--tokens", "15000"),
]


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    folder, rng = tmp_path_factory.mktemp("inputs"), np.random.default_rng(0)
    words = ["alpha", "beta", "gamma", "delta", "return", "def", "(x)", "+ 1"]
    for i in range(12):
        lines = [" ".join(rng.choice(words, 8)) for _ in range(40)]
        (folder / f"part{i}.txt").write_text("\n".join(lines))
    return folder


def records(run, kind: str) -> list[dict]:
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [line for line in lines if line.get("kind") == kind]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["distill-qwen", "deepseek-moe", "v2", "v3.2"])
def test_it_learns_from_scratch_and_with_adapters(name, text, tmp_path, capsys):
    cfg = ARCHITECTURES[name]
    (tmp_path / "config.json").write_text(json.dumps(config_to_json(cfg)))
    source = ["--data", str(text), "--held-out-share", "0.2"]
    first = ["--model", str(tmp_path / "config.json"), "--vocab-size", "280", *SIZES]
    assert main(["train", str(tmp_path / "a"), *source, *first]) == 0
    steps = records(tmp_path / "a", "step")
    assert steps[-1]["loss"] < 0.3 * steps[0]["loss"]
    # A router without a bias has none in the metrics, and is balanced by the losses.
    biased, log = cfg.moe is not None and cfg.moe.bias, (tmp_path / "a/train.log").read_text()
    assert ("load" in steps[-1], "bias" in steps[-1]) == (cfg.moe is not None, biased)
    assert ("no bias that bias_speed could move" in log) == (cfg.moe is not None and not biased)
    assert ("the indexers stay as they are" in log) == (name == "v3.2")

    checkpoint = str(tmp_path / "a/checkpoint")
    model = dsj.load_pretrained(checkpoint, dtype=None)
    assert (model.cfg.attention, model.cfg.moe, model.cfg.model_type) == (cfg.attention, cfg.moe, cfg.model_type)
    assert main(["verify", checkpoint]) == 0
    assert main(["generate", checkpoint, "--prompt", "alpha beta", "--max-new-tokens", "4"]) == 0
    capsys.readouterr()

    adapted = ["--recipe", "sft-lora", "--lora.rank", "4", "--rate.peak", "5e-3"]
    sizes = ["--tokens", "6000", "--length", "64", "--batch-rows", "4"]
    assert main(["train", str(tmp_path / "b"), "--from", checkpoint, *source, *adapted, *sizes]) == 0
    measured = [e["bits_per_byte"] for e in records(tmp_path / "b", "evaluation")]
    assert measured[-1] < measured[0]
