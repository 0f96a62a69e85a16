"""A published folder's tensors as the reference has them: opened by PyTorch's own readers, FP8 dequantised by block.

PyTorch is imported inside functions only.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from deepseek_jax.convert.names import IGNORED
from deepseek_jax.convert.pickles import Pickled, load_pickle, weight_files
from deepseek_jax.convert.references import EXTRA, VerifyError
from deepseek_jax.notes import cut
from deepseek_jax.small_files import LARGE, read_json

LAYER = re.compile(r"model\.layers\.(\d+)\.")


def find_tensors(path: Path, n_layers: int | None = None) -> dict[str, tuple[str, Any]]:
    """Tensor -> its file's name and the file, opened by its library: of model.safetensors, else of the index's files,
    else of all, else of PyTorch's own. ``n_layers``: layers from this one on are left out."""

    def wanted(name: str) -> bool:
        layer = LAYER.match(name)
        return n_layers is None or layer is None or int(layer[1]) < n_layers

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
    """(stored name, float32 tensor) of every weight of `find_tensors`, FP8 times its scales."""
    import torch

    rows, columns = (config.get("quantization_config") or {}).get("weight_block_size", (128, 128))
    for name, (file, opened) in held.items():
        if name.endswith(("_scale_inv", *IGNORED)):
            continue
        tensor = opened.get_tensor(name)
        if not tensor.numel():
            continue
        if tensor.dtype == torch.float8_e4m3fn:
            if f"{name}_scale_inv" not in held:
                raise VerifyError(f"{path}: {name} is FP8 but has no {name}_scale_inv.")
            scale = held[f"{name}_scale_inv"][1].get_tensor(f"{name}_scale_inv").float()
            n, k = tensor.shape if tensor.ndim == 2 else (0, 0)
            if scale.shape != (-(-n // rows), -(-k // columns)):
                raise VerifyError(
                    f"{path / file}: {name} has shape {tuple(tensor.shape)}, its scales {tuple(scale.shape)}; that is "
                    f"not one for each block of {rows} x {columns}."
                )
            spread = scale.repeat_interleave(min(rows, n), 0)[:n].repeat_interleave(min(columns, k), 1)[:, :k]
            tensor = tensor.float() * spread
        yield name, tensor.float()


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
