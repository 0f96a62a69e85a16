"""Published folders for the tests of this package, and ways to damage them."""

import json
import shutil
from functools import cache
from pathlib import Path

import jax.numpy as jnp
import ml_dtypes
import numpy as np
from tiny import random_model, tiny_config

from deepseek_jax.convert.checkpoint import Checkpoint
from deepseek_jax.convert.safetensors import Writer
from deepseek_jax.core.quant import PACKED

# Every FP8 matrix of this model has blocks at its edges: 160 and 144 rows, 136 columns.
EDGES = tiny_config(dim=136, ffn_dim=160, vocab_size=144)


@cache
def edge_model(dtype=jnp.float32):
    return random_model(EDGES, seed=3, bias_offset=0.5, dtype=dtype)


def arrays(folder: Path) -> dict:
    checkpoint = Checkpoint(folder)
    return {name: checkpoint.read(name) for name in checkpoint}


def write_arrays(folder: Path, tensors: dict, file: str = "model.safetensors") -> None:
    specs = {name: (array.dtype, array.shape) for name, array in tensors.items()}
    with Writer(folder / file, specs) as writer:
        for name, array in tensors.items():
            writer.write(name, array)


def assert_same_tensors(a: Path, b: Path) -> None:
    """Byte for byte, names, shapes and dtypes included."""
    left, right = Checkpoint(a), Checkpoint(b)
    assert set(left) == set(right)
    for name in left:
        x, y = left.read(name), right.read(name)
        assert (x.dtype, x.shape) == (y.dtype, y.shape), name
        assert x.tobytes() == y.tobytes(), name


def edit_json(path: Path, change) -> None:
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


def with_fp4_experts(source: Path, folder: Path) -> Path:
    """The same folder with any routed experts in FP4, as V4 has them."""
    shutil.copytree(source, folder)
    tensors, rng = arrays(folder), np.random.default_rng(6)
    for name in [name for name in tensors if ".experts." in name and name.endswith(".weight")]:
        rows, columns = tensors[name].shape
        tensors[name] = rng.integers(-128, 128, (rows, columns // 2)).astype(PACKED)
        scale = rng.integers(118, 124, (rows, -(-columns // 32))).astype(np.uint8)
        beside = f"{name}_scale_inv" if f"{name}_scale_inv" in tensors else f"{name.removesuffix('weight')}scale"
        tensors[beside] = scale.view(ml_dtypes.float8_e8m0fnu)
    write_arrays(folder, tensors)
    edit_json(folder / "config.json", lambda config: config.update(expert_dtype="fp4"))
    return folder


def fuse(tensors: dict) -> None:
    """Each layer's 8 experts in one tensor, as transformers 5 has them in memory."""
    modules = {name.split(".experts.")[0] + ".experts" for name in tensors if ".experts.0." in name}
    for module in modules:
        for suffix in ("", "_scale_inv"):
            if f"{module}.0.up_proj.weight{suffix}" in tensors:
                gate, up, down = (
                    np.stack([tensors.pop(f"{module}.{e}.{part}_proj.weight{suffix}") for e in range(8)])
                    for part in ("gate", "up", "down")
                )
                tensors[f"{module}.gate_up_proj{suffix}"] = np.concatenate([gate, up], axis=1)
                tensors[f"{module}.down_proj{suffix}"] = down


def edited(folder: Path, into: Path, change) -> Path:
    """A copy whose tensors ``change`` has changed."""
    shutil.copytree(folder, into)
    tensors = arrays(into)
    change(tensors)
    write_arrays(into, tensors)
    return into
