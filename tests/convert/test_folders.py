"""Paths that are no checkpoint are named for what they are, with the way out."""

import json
from pathlib import Path

import pytest
from tiny import tiny_config

from deepseek_jax.cli.main import main
from deepseek_jax.configs.hf import config_to_json
from deepseek_jax.convert.config_file import read_config
from deepseek_jax.convert.folders import why_no_checkpoint
from deepseek_jax.convert.safetensors import CheckpointError

GIVE = "give a folder with config.json and safetensors files"


def tree(root, **files):
    """Files below ``root``, __ for a slash and _ for a dot."""
    for name, content in files.items():
        path = root / name.replace("__", "/").replace("_", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    return root


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({}, ["is an empty folder", GIVE]),
        ({"_DS": ""}, ["is an empty folder"]),
        ({"run_json": "{}"}, ["is a training run: it has no checkpoint yet"]),
        (
            {"run_json": "{}", "checkpoint__config_json": "{}", "checkpoints__9__x": "", "checkpoints__10__x": ""},
            ["its model is in {}/checkpoint, its newest checkpoint is in {}/checkpoints/10."],
        ),
        ({"config_json": "{}"}, []),
        ({"model_gguf": "GGUF"}, ["holds GGUF files, llama.cpp's format", GIVE]),
        ({"pytorch-model_bin": ""}, ["PyTorch's pickled weights", GIVE]),
        ({"a_safetensors": ""}, ["has no config.json", GIVE]),
        ({"notes_txt": ""}, ["has no config.json", GIVE]),
        ({"snapshots__abc__config_json": "{}"}, ["Hugging Face's cache: give {}/snapshots/abc."]),
        ({"inner__config_json": "{}"}, ["such as {}/inner"]),
    ],
)
def test_folders(tmp_path, files, words):
    root = tree(tmp_path, **files)
    why = why_no_checkpoint(root)
    if not words:
        assert why is None
        return
    assert why.startswith(f"{root} ")
    assert why.endswith(".")
    for text in words:
        assert text.format(root, root) in why
    with pytest.raises(CheckpointError) as error:
        read_config(root)
    assert str(error.value) == why


def test_a_runs_checkpoints(tmp_path):
    (tmp_path / "checkpoints" / "30").mkdir(parents=True)
    (tmp_path / "run.json").write_text("{}")
    assert f"newest checkpoint is in {tmp_path / 'checkpoints' / '30'}." in why_no_checkpoint(tmp_path / "checkpoints")


def test_an_adapter_names_its_base(tmp_path):
    (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "models/base"}))
    why = why_no_checkpoint(tmp_path)
    assert "is an adapter (LoRA) to models/base, not a whole model" in why
    assert f"convert BASE DST --adapter {tmp_path}" in why
    (tmp_path / "adapter_config.json").write_text("{")
    assert "adapter_config.json cannot be read" in why_no_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("model.gguf", b"GGUF", "is a GGUF file"),
        ("model", b"GGUF\x03", "is a GGUF file"),
        ("model.safetensors", b"", "is one file of weights; give a folder"),
        ("model.pth", b"PK", "is a file of PyTorch's pickled weights"),
        ("config.json", b"{}", "is a config without weights; give its folder"),
        ("notes.txt", b"", "is a file, not a checkpoint"),
    ],
)
def test_files(tmp_path, name, content, words):
    path = tmp_path / name
    path.write_bytes(content)
    assert f"{path} {words}" in why_no_checkpoint(path)


def test_names_of_models():
    for name, release in (("deepseek-v3", "deepseek-v3"), ("moonshotai/Kimi-K2-Instruct", "kimi-k2")):
        why = why_no_checkpoint(Path(name))
        assert f"{name} is not a folder; {release} is the name of a release" in why
        assert "hf download" in why


def test_a_training_checkpoint_is_not_what_pytorch_reads(tmp_path, capsys):
    (tmp_path / "config.json").write_text(json.dumps(config_to_json(tiny_config())))
    (tmp_path / "deepseek_jax.json").write_text('{"format": "training"}')
    assert main(["verify", str(tmp_path)]) == 1
    err = capsys.readouterr().err
    assert f"{tmp_path} is a checkpoint of a training run, which PyTorch does not read" in err
    assert err.count("\n") == 1
