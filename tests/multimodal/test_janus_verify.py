"""`verify` of a Janus: every comparison holds on either layout, and a tensor in a wrong place is found."""

import json
import shutil

import numpy as np
import pytest
from tiny_janus import tiny_janus

from deepseek_jax.cli.main import main
from deepseek_jax.convert.checkpoint import Checkpoint
from deepseek_jax.convert.safetensors import Writer
from deepseek_jax.multimodal.checkpoint import save_pretrained


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    base = tmp_path_factory.mktemp("verify")
    for name in ("multi_modality", "janus"):
        save_pretrained(tiny_janus(), base / name, model_type=name)
    return base


def verify(*arguments) -> int:
    return main(["verify", *map(str, arguments), "--length", "12", "--steps", "3"])


@pytest.mark.slow
@pytest.mark.parametrize("against", ["multi_modality", "janus"])
def test_every_comparison_holds(folders, against, tmp_path, capsys):
    """PyTorch reads each layout by names of its own."""
    record = tmp_path / "a.json"
    assert verify(folders / "multi_modality", "--against", folders / against, "--json", record) == 0
    rows = json.loads(record.read_text())["comparisons"]
    assert "All 12 comparisons hold" in capsys.readouterr().out
    assert len(rows) == 12
    assert [row["what"] for row in rows][:3] == ["vision tower", "aligner", "block"]
    assert max(row["relative"] for row in rows) < 2e-5


@pytest.mark.slow
def test_two_exchanged_norms_are_found(folders, tmp_path, capsys):
    checkpoint = Checkpoint(folders / "multi_modality")
    tensors = {name: checkpoint.read(name) for name in checkpoint}
    one, two = (f"gen_vision_model.decoder.mid.0.norm{i}.weight" for i in (1, 2))
    tensors[one], tensors[two] = tensors[two], tensors[one]
    with Writer(tmp_path / "model.safetensors", {n: (a.dtype, a.shape) for n, a in tensors.items()}) as writer:
        for name, array in tensors.items():
            writer.write(name, np.ascontiguousarray(array))
    shutil.copy(folders / "multi_modality/config.json", tmp_path)
    assert verify(tmp_path, "--against", folders / "multi_modality") == 1
    assert "First divergence: VQ decoder; 1 of 12 comparisons fail" in capsys.readouterr().out


def test_options_of_language_models_are_refused(folders, capsys):
    assert verify(folders / "janus", "--layers", 1, "--gradients") == 1
    assert "--layers, --gradients: " in capsys.readouterr().err
