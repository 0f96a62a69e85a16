"""The demo on the shipped checkpoint: it passes as it is, and fails when a number or a file is another."""

import json
import shutil
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import deepseek_jax as dsj
from deepseek_jax.cli import demo
from deepseek_jax.cli.demo_janus import in_letters
from deepseek_jax.cli.main import main


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A copy of the shipped checkpoint that the demo takes for it."""
    copy = tmp_path / "tiny-v3"
    shutil.copytree(demo.shipped_checkpoint(), copy)
    monkeypatch.setattr(demo, "shipped_checkpoint", lambda: copy)
    return copy


def test_the_demo_checks_writes_and_draws(folder, tmp_path, capsys):
    picture, figures = tmp_path / "routing.png", tmp_path / "demo.json"
    assert main(["demo", "--max-new-tokens", "12", "--picture", str(picture), "--json", str(figures)]) == 0
    shown = capsys.readouterr().out
    assert "equal" in shown
    assert "the same tokens both ways" in shown
    record = json.loads(figures.read_text())
    assert max(record["reference"]["errors"].values()) <= record["reference"]["bound"] == 2e-5
    assert record["reference"]["routing_agreement"] == 1.0
    assert record["generation"]["plain"]["tokens"] == record["generation"]["mtp"]["tokens"]
    assert len(record["generation"]["plain"]["tokens"][0]) == 12
    assert picture.read_bytes().startswith(b"\x89PNG")
    drawn = record["picture"]
    assert [len(line) for line in drawn["picture"].splitlines()] == [32] * 16
    assert drawn["picture"] in shown
    assert f"asked for: {drawn['asked']}" in shown
    assert f"seen in it: {drawn['said']}" in shown
    assert len(drawn["said"].split()) == 7


def test_a_picture_in_letters():
    image = np.zeros((4, 3, 3))
    image[:2, 1], image[2:, 0], image[2:, 2], image[3, 1] = (1, -1, -1), (-1, 1, -1), (-1, -1, 1), (0.4, 0.4, -0.4)
    assert in_letters(image) == "·r·\ng·b"


@pytest.mark.parametrize("name", ["logits", "mtp_logits", "expert_index"])
def test_a_wrong_number_fails_it(folder, name, capsys):
    file = folder / "reference" / "reference.safetensors"
    stored = load_file(file)
    if name == "expert_index":
        stored[name][0, 0, 3] = (stored[name][0, 0, 3] + 1) % 16
    else:
        stored[name][0, 5, 7] += 1e-4 * np.abs(stored[name]).max()
    save_file(stored, file)
    assert main(["demo", "--max-new-tokens", "12"]) == 1
    assert "not equal" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--picture", "routing.jpg"), "--picture routing.jpg: the picture is a PNG image"),
        (
            ("--picture", "/no/such/folder/x.png"),
            "--picture /no/such/folder/x.png: there is no folder /no/such/folder.",
        ),
        (("--json", "/no/such/folder/x.json"), "--json /no/such/folder/x.json: there is no folder /no/such/folder."),
    ],
)
def test_places_that_cannot_be_written_end_it_before_it_begins(arguments, message, capsys):
    assert main(["demo", *arguments]) == 1
    captured = capsys.readouterr()
    assert message in captured.err
    assert (captured.out, captured.err.count("\n")) == ("", 1)


def test_it_generates_at_full_precision(monkeypatch):
    """Plain and drafted texts are compared, so neither may hang on a device's default precision."""
    seen = []

    def generate(*args, **settings):
        seen.append(jax.config.jax_default_matmul_precision)
        return [[5]], SimpleNamespace(drafted=[0], accepted=[0])

    monkeypatch.setattr(dsj, "generate", generate)
    with jax.default_matmul_precision("bfloat16"):
        demo.write(None, [1], 1, use_mtp=True)
    assert seen == ["highest"] * 2


def test_other_files_than_the_reference_read_are_refused(folder, capsys):
    with (folder / "config.json").open("a") as file:
        file.write("\n")
    assert main(["demo"]) == 1
    assert "is not the file that the stored reference logits were computed from" in capsys.readouterr().err


def test_a_missing_checkpoint_is_one_line(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(demo, "__file__", str(tmp_path / "deepseek_jax" / "cli" / "demo.py"))
    assert main(["demo"]) == 1
    complaint = capsys.readouterr().err
    assert "the shipped checkpoint is missing" in complaint
    assert complaint.count("\n") == 1
