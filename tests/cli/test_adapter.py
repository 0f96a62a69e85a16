"""Adapters on the command line: used by generate and score, merged by convert."""

import json
import shutil
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file
from tiny import random_model, tiny_config

import deepseek_jax as dsj
from deepseek_jax.cli.main import main
from deepseek_jax.convert.adapter import save_adapter
from deepseek_jax.core.lowrank import LowRank
from deepseek_jax.text.bpe import save_tokenizer, train_tokenizer
from deepseek_jax.train.lora import adapt
from deepseek_jax.train.tuning import LoRA
from deepseek_jax.version import __version__

TEXT = "def f(x):\n    return x + 1\n" * 3


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A checkpoint and an adapter for its attention and head."""
    top = tmp_path_factory.mktemp("adapters")
    model = random_model(tiny_config(n_layers=2, vocab_size=270, mtp_depth=0))
    dsj.save_pretrained(model, top / "base")
    save_tokenizer(train_tokenizer([TEXT], 270), top / "base", version=__version__)
    tuned = adapt(model, LoRA(rank=2, targets=("head", "stacks.*.attn.o")))
    rng = np.random.default_rng(0)

    def fill(w):
        if not isinstance(w, LowRank):
            return w
        return replace(w, b=w.b.replace(jnp.asarray(rng.normal(0, 0.2, w.b.get_value().shape), jnp.float32)))

    tuned = jax.tree.map(fill, tuned, is_leaf=lambda x: isinstance(x, LowRank))
    save_adapter(tuned, top / "adapter", base=top / "base")
    return top / "base", top / "adapter"


def test_convert_merges(folders, tmp_path, capsys):
    base, adapter = folders
    assert main(["convert", str(base), str(tmp_path / "merged"), "--adapter", str(adapter)]) == 0
    assert capsys.readouterr().out.startswith(f"Wrote {tmp_path / 'merged'}: ")
    old, new = (load_file(folder / "model.safetensors") for folder in (base, tmp_path / "merged"))
    pairs = load_file(adapter / "adapter_model.safetensors")
    assert old.keys() == new.keys()
    for name, value in old.items():
        module = f"base_model.model.{name.removesuffix('.weight')}"
        if f"{module}.lora_A.weight" in pairs:
            change = 8 * pairs[f"{module}.lora_B.weight"] @ pairs[f"{module}.lora_A.weight"]
            assert np.abs(change).max() > 0.01
            np.testing.assert_allclose(new[name], value + change, atol=1e-5, err_msg=name)
        else:
            np.testing.assert_array_equal(new[name], value, err_msg=name)
    assert (tmp_path / "merged" / "tokenizer.json").read_bytes() == (base / "tokenizer.json").read_bytes()


def test_what_does_not_fit_is_one_line(folders, tmp_path, capsys):
    base, adapter = folders
    other = tmp_path / "other"
    dsj.save_pretrained(random_model(tiny_config(n_layers=1, vocab_size=280, mtp_depth=0)), other)
    (tmp_path / "run").mkdir()
    shutil.copy(base / "config.json", tmp_path / "run")
    for words, complaint in (
        (["convert", other, tmp_path / "out", "--adapter", adapter], "the model and rank 2 imply float32 (280, 2)"),
        (["convert", base, tmp_path / "out", "--adapter", base], "adapter_config.json"),
        (["convert", base, other, "--adapter", adapter], "is not an empty folder"),
        (["convert", base, tmp_path / "out", "--adapter", adapter, "--dry-run"], "merging has no dry run"),
        (["convert", tmp_path / "run", tmp_path / "out", "--adapter", adapter], "merged into a published folder"),
    ):
        assert main([str(word) for word in words]) in (1, 2)
        said = capsys.readouterr().err
        assert complaint in said
        assert said.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_generate_and_score_use_an_adapter_as_if_it_were_merged(folders, tmp_path, capsys):
    base, adapter = folders
    assert main(["convert", str(base), str(tmp_path / "merged"), "--adapter", str(adapter)]) == 0
    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    values = {}
    for name, words in (
        ("base", [base]),
        ("adapted", [base, "--adapter", adapter]),
        ("merged", [tmp_path / "merged"]),
    ):
        out = tmp_path / f"{name}.json"
        words = [str(w) for w in (*words, "--dtype", "float32", "--json", out)]
        assert main(["score", words[0], str(text), *words[1:]]) == 0
        scored = json.loads(out.read_text())
        assert main(["generate", *words, "--prompt", "def", "--max-new-tokens", "12"]) == 0
        values[name] = scored["logprobs"], json.loads(out.read_text())["rows"][0]["ids"]
    np.testing.assert_allclose(values["adapted"][0], values["merged"][0], atol=1e-4)
    assert values["adapted"][1] == values["merged"][1] != values["base"][1]
    assert np.abs(np.subtract(values["base"][0], values["merged"][0])).max() > 0.1
