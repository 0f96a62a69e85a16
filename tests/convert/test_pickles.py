"""PyTorch's pickled weights: read as safetensors are, by bytes, with no code of theirs run."""

import pickle
import sys

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from architectures import ARCHITECTURES
from folders import arrays, assert_same_tensors
from tiny import random_model

import deepseek_jax as dsj
from deepseek_jax.convert.checkpoint import Checkpoint
from deepseek_jax.convert.ladder import ladder
from deepseek_jax.convert.safetensors import CheckpointError
from deepseek_jax.convert.stream import convert


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The same model in safetensors and, as DeepSeek-LLM's releases have it, in two pickled files."""
    base = tmp_path_factory.mktemp("pickles")
    dsj.save_pretrained(random_model(ARCHITECTURES["deepseek-llm"], dtype=jnp.bfloat16), base / "safe")
    tensors = {n: torch.tensor(a.view(np.uint16)).view(torch.bfloat16) for n, a in arrays(base / "safe").items()}
    (base / "bins").mkdir()
    (base / "bins/config.json").write_bytes((base / "safe/config.json").read_bytes())
    names = sorted(tensors)
    for i, part in enumerate((names[:7], names[7:]), start=1):
        # One storage for two tensors, as tools save slices of a larger one.
        held = {name: tensors[name] for name in part}
        if i == 1:
            one, two = part[:2]
            both = torch.cat([held[one].flatten(), held[two].flatten()])
            held[one] = both[: held[one].numel()].view(held[one].shape)
            held[two] = both[held[one].numel() :].view(held[two].shape)
        torch.save(held, base / f"bins/pytorch_model-{i:05d}-of-00002.bin")
    return base


def test_the_same_bytes(folders):
    ours, theirs = Checkpoint(folders / "bins"), Checkpoint(folders / "safe")
    assert set(ours) == set(theirs)
    for name in ours:
        a, b = ours.read(name), theirs.read(name)
        assert (a.dtype, a.shape, a.tobytes()) == (b.dtype, b.shape, b.tobytes()), name


def test_the_same_model_both_ways(folders, tmp_path):
    model = dsj.load_pretrained(folders / "bins", dtype=None)
    dsj.save_pretrained(model, tmp_path / "a", like=folders / "bins")
    convert(folders / "bins", tmp_path / "orbax")
    convert(tmp_path / "orbax", tmp_path / "b")
    for name in ("a", "b"):
        assert_same_tensors(tmp_path / name, folders / "safe")
        assert {p.name for p in (tmp_path / name).glob("*.safetensors*")} == {
            "model-00001-of-00002.safetensors",
            "model-00002-of-00002.safetensors",
            "model.safetensors.index.json",
        }


def test_it_is_verified_as_it_lies(folders):
    tokens = np.random.default_rng(0).integers(0, 256, (1, 24))
    assert all(row.ok for row in ladder(folders / "bins", tokens, steps=2))


def test_without_pytorch_it_is_refused(folders, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(CheckpointError, match=r'which PyTorch has to read: pip install "deepseek-jax\[verify\]"'):
        Checkpoint(folders / "bins")


class Code:
    def __reduce__(self):
        return (print, ("run",))


def test_code_in_a_pickle_is_not_run(tmp_path, capsys):
    torch.save({"a": Code()}, tmp_path / "pytorch_model.bin")
    (tmp_path / "old.bin").write_bytes(pickle.dumps({"a": 1}))
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin is not read by PyTorch \(UnpicklingError"):
        Checkpoint(tmp_path)
    assert "run" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("held", "message"),
    [
        ([torch.ones(2)], "holds no table of tensors' names to tensors"),
        ({"a": 1}, "holds no table of tensors' names to tensors"),
        ({"a": torch.ones(3, 4).T}, r"a, float32 with strides \(1, 4\), is no run of bytes"),
        ({"a": torch.ones(2, dtype=torch.complex64)}, "a, complex64 with strides"),
    ],
)
def test_what_is_no_table_of_plain_tensors_is_refused(held, message, tmp_path):
    torch.save(held, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=message):
        Checkpoint(tmp_path)
