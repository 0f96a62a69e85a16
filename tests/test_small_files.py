"""What is read whole is a regular file of bounded size; no other file hangs or fills the memory."""

import json
import os
import sys

import pytest

import deepseek_jax as dsj
from deepseek_jax.convert.config_file import read_config
from deepseek_jax.convert.safetensors import CheckpointError, read_header
from deepseek_jax.convert.verify import VerifyError, reference_model
from deepseek_jax.data.tokens import TokenFile, TokenFileError
from deepseek_jax.notes import LONGEST, cut, shown
from deepseek_jax.runs.run_folder import read_run
from deepseek_jax.small_files import SMALL, read_json, read_small, read_text

HOSTILE = ("pipe", "device", "sparse", "folder")


def make(kind: str, path) -> str:
    """A hostile file; what is said of it."""
    if kind == "pipe":
        os.mkfifo(path)
        return "not a regular file"
    if kind == "device":
        path.symlink_to("/dev/zero")
        return "not a regular file"
    if kind == "folder":
        path.mkdir()
        return "not a regular file"
    with path.open("wb") as file:
        file.truncate(20 * 10**9)
    return "has 20000000000 bytes, more than the"


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_files_are_refused_wherever_a_file_is_read_whole(kind, tmp_path, root):
    def refused(name, error, read, *beside):
        folder = tmp_path / f"{name}-{error.__name__}-{len(list(tmp_path.iterdir()))}"
        folder.mkdir()
        for file in beside:
            (folder / file).write_bytes((root / "checkpoints/tiny-v3" / file).read_bytes())
        said = make(kind, folder / name)
        with pytest.raises(error, match=said) as caught:
            read(folder)
        assert name in str(caught.value)

    refused("config.json", CheckpointError, read_config)
    refused("generation_config.json", CheckpointError, read_config, "config.json")
    refused("model.safetensors.index.json", CheckpointError, dsj.load_pretrained, "config.json")
    refused("deepseek_jax.json", CheckpointError, dsj.load_pretrained, "config.json")
    refused("tokenizer.json", ValueError, dsj.load_tokenizer)
    refused("tokenizer_config.json", ValueError, dsj.load_tokenizer, "tokenizer.json")
    refused("chat_template.jinja", ValueError, dsj.load_tokenizer, "tokenizer.json")
    refused("manifest.json", TokenFileError, TokenFile)
    refused("run.json", ValueError, read_run)
    refused("config.json", VerifyError, reference_model)


@pytest.mark.parametrize("kind", ["pipe", "device"])
def test_a_safetensors_file_is_a_regular_one(kind, tmp_path):
    make(kind, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="not a regular file"):
        read_header(tmp_path / "model.safetensors")


def test_a_bounded_file_is_read_whole(tmp_path):
    file = tmp_path / "a.json"
    file.write_text('{"a": "é"}', encoding="utf-8")
    assert read_small(file) == '{"a": "é"}'.encode()
    assert read_text(file) == '{"a": "é"}'
    assert read_json(file) == {"a": "é"}
    with pytest.raises(ValueError, match="has 11 bytes, more than the 10"):
        read_small(file, 10)
    with pytest.raises(FileNotFoundError):
        read_small(tmp_path / "b.json")


def test_a_file_of_unknown_size_is_bounded_too():
    with pytest.raises(ValueError, match="more than the 3 that are read"):
        read_small(os.path.realpath("/proc/self/maps"), 3)


@pytest.mark.parametrize(
    "text", [b"", b"{", b"\xff", b"[" * 100_000, b'{"a": ' + b"1" * 10_000 + b"}", b"[1]", b"null"]
)
def test_what_is_no_json_object(text, tmp_path):
    file = tmp_path / "a.json"
    file.write_bytes(text)
    with pytest.raises(ValueError, match=r"a\.json (is not valid JSON|must hold a JSON object)"):
        read_json(file)


@pytest.mark.parametrize(
    "value",
    ["x" * 100_000, ["x" * 1000] * 1000, {"k" * 1000: [[[[[1]]]]]}, 10**4000, 10**5000, 1.5, None, "a\nb"],
    ids=lambda value: type(value).__name__,
)
def test_a_value_in_a_message_is_cut(value):
    assert len(shown(value)) <= LONGEST
    assert len(cut(value if value != 10**5000 else "y")) <= LONGEST


def test_short_values_are_shown_whole():
    assert [shown(v) for v in ("a", 3, [1, 2], {"a": None})] == ["'a'", "3", "[1, 2]", "{'a': None}"]
    nested = json.loads("[" * 900 + "]" * 900)
    assert len(shown(nested)) < LONGEST
    assert sys.getrecursionlimit() < 5000
    assert SMALL < 2**30
