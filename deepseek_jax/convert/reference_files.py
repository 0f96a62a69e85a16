"""A published folder's tensors as the reference has them: opened by PyTorch's own readers, FP8 and FP4 dequantised by
block.

PyTorch is imported inside functions only.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from deepseek_jax.convert.names import IGNORED
from deepseek_jax.convert.pickles import Pickled, load_pickle, weight_files
from deepseek_jax.convert.reference_names import layer_number
from deepseek_jax.convert.references import EXTRA, VerifyError
from deepseek_jax.notes import cut
from deepseek_jax.small_files import LARGE, read_json

# What the codes of FP4 mean, of two in a byte the lower half first; 32 of a row share a scale.
FP4_CODES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
FP4_BLOCK = (1, 32)


def find_tensors(path: Path, n_layers: int | None = None) -> dict[str, tuple[str, Any]]:
    """Tensor -> its file's name and the file, opened by its library: of model.safetensors, else of the index's files,
    else of all, else of PyTorch's own. ``n_layers``: layers from this one on are left out."""

    def wanted(name: str) -> bool:
        return n_layers is None or (layer_number(name, n_layers) or 0) < n_layers

    index, single = path / "model.safetensors.index.json", path / "model.safetensors"
    files = read_object(index).get("weight_map") if index.exists() else None
    if index.exists() and (not isinstance(files, dict) or not all(isinstance(file, str) for file in files.values())):
        raise VerifyError(f"{index} has no weight_map of tensors' names to files.")
    if files is not None and (single.name in files.values() or not single.exists()):
        files = {name: file for name, file in files.items() if wanted(name)}
        opened = {file: _open(path / file) for file in sorted(set(files.values()))}
        for name, file in files.items():
            if name not in opened[file].keys():  # noqa: SIM118
                raise VerifyError(f"{path / file} lacks {name}, which {index} has in it.")
    else:
        shards = sorted(path.glob("model-*-of-*.safetensors")) or weight_files(path)
        opened = {file.name: _open(file) for file in ([single] if single.exists() else shards)}
        files = {name: file for file, f in opened.items() for name in f.keys() if wanted(name)}  # noqa: SIM118
    if not files:
        raise VerifyError(f"{path} holds no *.safetensors with weights.")
    return {name: (file, opened[file]) for name, file in files.items()}


def read_tensors(path: Path, config: dict, held: dict[str, tuple[str, Any]]) -> Iterator[tuple[str, Any]]:
    """(stored name, float32 tensor) of every weight of `find_tensors`, FP8 and FP4 times their scales; tables of
    integers as they are."""
    import torch

    fp8_block = (config.get("quantization_config") or {}).get("weight_block_size", (128, 128))
    for name, (file, opened) in held.items():
        if name.endswith(("_scale_inv", *IGNORED)) or f"{name.removesuffix('scale')}weight" in held:
            continue
        tensor = opened.get_tensor(name)
        if not tensor.numel():
            continue
        if tensor.dtype in (torch.float8_e4m3fn, torch.int8):
            kind, (rows, columns) = ("FP8", fp8_block) if tensor.dtype != torch.int8 else ("FP4", FP4_BLOCK)
            values = tensor.float() if kind == "FP8" else _unpacked(tensor)
            scales = f"{name.removesuffix('weight')}scale"
            scales = scales if scales in held else f"{name}_scale_inv"
            if scales not in held:
                raise VerifyError(f"{path}: {name} is {kind} but has no {scales}.")
            scale = held[scales][1].get_tensor(scales).float()
            n, k = values.shape if values.ndim == 2 else (0, 0)
            if scale.shape != (-(-n // rows), -(-k // columns)):
                raise VerifyError(
                    f"{path / file}: {name} has shape {(n, k)}, its scales {tuple(scale.shape)}; that is not one for "
                    f"each block of {rows} x {columns}."
                )
            spread = scale.repeat_interleave(min(rows, n), 0)[:n].repeat_interleave(min(columns, k), 1)[:, :k]
            tensor = values * spread
        yield name, tensor.float() if tensor.is_floating_point() else tensor


def _unpacked(packed):
    """FP4 values [N, K] as float32 of int8 [N, K / 2]."""
    import torch

    raw = packed.view(torch.uint8).long()
    return torch.tensor(FP4_CODES)[torch.stack([raw & 15, raw >> 4], -1).flatten(-2)]


def read_object(path: Path) -> dict:
    try:
        return read_json(path, LARGE)
    except ValueError as error:
        raise VerifyError(str(error)) from None


def _open(file: Path):
    try:
        import torch  # noqa: F401
        from safetensors import SafetensorError, safe_open
    except ImportError as error:
        raise VerifyError(f"{EXTRA} ({error})") from None
    if not file.is_file():
        raise VerifyError(f"{file} does not exist.")
    if file.suffix == ".bin":
        return Pickled(load_pickle(file))
    try:
        return safe_open(file, "pt")
    except SafetensorError as error:
        raise VerifyError(f"{file} is damaged: safetensors cannot read it ({cut(error)}).") from None
