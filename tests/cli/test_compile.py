"""Bad input to `deepseek-jax compile` is one line, before anything is compiled; a tiny model compiles for real TPUs."""

import importlib.util
import json
import tempfile
from pathlib import Path

import pytest

from deepseek_jax.aot.janus import lower
from deepseek_jax.aot.programs import Program
from deepseek_jax.cli.main import main
from deepseek_jax.configs.zoo import zoo
from deepseek_jax.version import __version__


@pytest.fixture
def with_libtpu(monkeypatch):
    """As if libtpu were installed."""
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: True if name == "libtpu" else find(name))


def complaint(capsys, *arguments: str) -> str:
    assert main(["compile", *arguments]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    return err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("tiny-v3", "--topology", "v5p:8x8"), "'v5p:8x8' is no topology"),
        (("tiny-v3", "--topology", "h100:8"), "v5p:8x8x8, v6e:16x16 or v5e:8x8"),
        (("tiny-v3", "--topology", "v5p:2x2x1", "--mesh", "fsdp=3"), "fsdp=3 does not make up the 4 chips"),
        (("tiny-v3", "--topology", "v5p:2x2x1", "--mesh", "fsdp=-1,expert=3"), "does not make up the 4 chips"),
        (("tiny-v3", "--topology", "v5p:2x2x1", "--mesh", "chips=4"), "'chips=4' is not AXIS=SIZE"),
        (("no-such-model",), "no-such-model"),
        (("tiny-v3", "--rows", "0"), "--rows 0: must be positive"),
        (("tiny-v3", "--json", "/no/such/folder/file.json"), "there is no folder"),
    ],
)
def test_bad_input(arguments, words, capsys):
    assert words in complaint(capsys, *arguments)


@pytest.mark.parametrize("option", ["--set", "--xla"])
def test_pairs_have_an_equals_sign(option, capsys, with_libtpu):
    assert f"{option} 'drop': give NAME=VALUE" in complaint(capsys, "tiny-v3", option, "drop")


def test_without_libtpu_the_extra_is_named(capsys, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "libtpu" else find(name))
    assert "pip install 'deepseek-jax[compile]'" in complaint(capsys, "tiny-v3")


@pytest.fixture
def temporary(tmp_path, monkeypatch) -> Path:
    """Where temporary files go."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


@pytest.mark.slow
def test_a_training_step_for_a_slice(tmp_path, temporary, capsys):
    arguments = [
        "compile",
        "tiny-v3",
        "--topology",
        "v5p:2x2x1",
        "--mesh",
        "fsdp=2,expert=2",
        "--length",
        "512",
        "--largest",
        "3",
    ]
    for name, more in (("quick", ["--quick"]), ("full", [])):
        assert main([*arguments, *more, "--json", str(tmp_path / f"{name}.json")]) == 0
    assert "What binds" in capsys.readouterr().out
    quick, full = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("quick", "full"))
    assert quick["deepseek_jax"] == __version__
    for figure in ("memory", "time"):
        assert quick[figure] == full[figure]
    compiler = full["compiler"]
    memory = full["memory"]
    assert memory["temporaries"] == pytest.approx(compiler["temp_size_in_bytes"], abs=2**16)
    assert sum(memory["arguments"].values()) == compiler["argument_size_in_bytes"]
    assert memory["donated"] == compiler["alias_size_in_bytes"] > 0
    # Weights and both moments in float32, on four chips.
    assert memory["arguments"]["state.opt_state"] == pytest.approx(2 * memory["arguments"]["state.params"], rel=0.01)
    assert 0 < full["time"]["seconds"] < 1
    assert full["time"]["sent"]["ragged-all-to-all over expert"] > 0
    assert list(temporary.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize("weights", ["bfloat16", "int8"])
def test_a_decoding_step_for_a_slice(weights, tmp_path, capsys):
    file = tmp_path / "out.json"
    arguments = ["--topology", "v5e:2x2", "--mesh", "expert=4", "--program", "decode", "--context", "256"]
    assert main(["compile", "tiny-v3", *arguments, "--weights", weights, "--quick", "--json", str(file)]) == 0
    record = json.loads(file.read_text())
    assert set(record["memory"]["arguments"]) > {"model.stacks", "model.embed", "cache.held"}
    assert record["memory"]["donated"] >= record["memory"]["arguments"]["cache.held"]


@pytest.mark.slow
@pytest.mark.parametrize("program", ["train", "decode"])
def test_a_janus_for_a_slice(program, tmp_path, capsys):
    """A step on rows of both kinds; the code that is drawn next, for two rows a picture."""
    file = tmp_path / "out.json"
    arguments = ["--topology", "v5e:2x2", "--mesh", "fsdp=2,tensor=2", "--length", "128", "--context", "128"]
    arguments += ["--program", program, "--quick", "--json", str(file)]
    assert main(["compile", "tiny-janus", *arguments]) == 0
    record = json.loads(file.read_text())
    assert record["tokens_per_second_chip"] > 0
    held = record["memory"]["arguments"]
    given_back = {"train": "training.params", "decode": "state.cache"}[program]
    assert record["memory"]["donated"] >= held[given_back] > 0
    assert ("model.gen_head" in held) == (program == "decode")


def test_what_a_janus_has_no_room_for_is_said():
    cfg = zoo("tiny-janus")
    for program, words in ((Program(length=32), "rows of 32 tokens have no room"), (Program(weights="fp8"), "in bfl")):
        with pytest.raises(ValueError, match=words):
            lower(cfg, program, [], {}, None)


@pytest.mark.slow
def test_what_does_not_fit_is_said_with_its_sizes(temporary, capsys):
    arguments = ["moonlight-16b", "--topology", "v5e:2x2", "--mesh", "fsdp=4", "--rows", "8", "--remat", "none"]
    assert main(["compile", *arguments, "--quick"]) == 1
    out, err = capsys.readouterr()
    assert "temporaries" in out
    assert "exceeds available HBM" in err
    assert list(temporary.iterdir()) == []


@pytest.mark.slow
def test_a_layout_that_does_not_fit_the_model_is_named(capsys):
    assert "does not divide" in complaint(capsys, "tiny-v3", "--topology", "v5p:4x4x8", "--mesh", "expert=128")
