"""PyTorch's pickled weights, ``pytorch_model*.bin``: where each tensor's bytes stand in the file.

PyTorch reads the pickle, with ``weights_only``, so that no code in it is run, and maps the file, so that no more of it
is read. A tensor's bytes are a run of the file, as they are in safetensors: from here on it is read as one.
"""

import zipfile
from pathlib import Path
from typing import Any

from deepseek_jax.convert.safetensors import NAMES, CheckpointError, Entry
from deepseek_jax.notes import cut

PICKLED = "pytorch_model*.bin"
LOCAL_HEADER = 30  # bytes of a zip entry's header, before its name and extra field


def safetensors_name(file: str) -> str:
    """What a file of weights is called once it is safetensors: ``model-00001-of-00002.safetensors``."""
    return f"{file.removeprefix('pytorch_').removesuffix('.bin')}.safetensors" if file.endswith(".bin") else file


def load_pickle(path: Path) -> dict[str, Any]:
    """The tensors by name, mapped from the file. Raises CheckpointError without PyTorch, and for no such file."""
    try:
        import torch
    except ImportError:
        raise CheckpointError(
            f'{path} is a PyTorch file, which PyTorch has to read: pip install "deepseek-jax[verify]", or save the '
            "weights as safetensors first."
        ) from None
    try:
        found = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # a damaged pickle raises whatever it runs into
        raise CheckpointError(f"{path} is not read by PyTorch ({type(error).__name__}: {cut(error)}).") from None
    if not isinstance(found, dict) or not all(
        isinstance(name, str) and isinstance(tensor, torch.Tensor) for name, tensor in found.items()
    ):
        raise CheckpointError(f"{path} holds no table of tensors' names to tensors.")
    return found


def weight_files(folder: Path) -> list[Path]:
    """A folder's safetensors files, else its pickled ones."""
    return sorted(folder.glob("*.safetensors")) or sorted(folder.glob(PICKLED))


class Pickled(dict):
    """A file's tensors, with the interface of safetensors' own reader."""

    get_tensor = dict.__getitem__


def read_pickle(path: Path) -> dict[str, Entry]:
    """The entries of a file. Raises CheckpointError as `load_pickle` does, and for tensors that are no run of bytes."""
    tensors, starts, entries = load_pickle(path), _starts(path), {}
    # The file lies in memory as it is on the disk: each storage is as far from the first as its bytes are.
    storages = {name: tensor.untyped_storage() for name, tensor in tensors.items()}
    first = min((storage.data_ptr() for storage in storages.values()), default=0)
    gaps = {storage.data_ptr() - first for storage in storages.values()}
    bases = [start for start in starts if all(start + gap in starts for gap in gaps)]
    dtypes = {dtype.name: dtype for dtype in NAMES}
    for name, tensor in tensors.items():
        kind = str(tensor.dtype).removeprefix("torch.")
        if not tensor.is_contiguous() or kind not in dtypes or not bases:
            raise CheckpointError(
                f"{path}: {cut(name)}, {kind} with strides {tensor.stride()}, is no run of bytes of a dtype that is "
                "read here: save the weights as safetensors."
            )
        start = bases[0] + tensor.data_ptr() - first
        shape = tuple(tensor.shape)
        entries[name] = Entry(path, name, dtypes[kind], shape, start, start + tensor.numel() * tensor.element_size())
    return entries


def _starts(path: Path) -> set[int]:
    """Where the bytes of each storage begin in the file, a zip archive that compresses nothing."""
    starts = set()
    with zipfile.ZipFile(path) as archive, path.open("rb") as file:
        for member in archive.infolist():
            if "/data/" in member.filename and member.compress_type == zipfile.ZIP_STORED:
                file.seek(member.header_offset + LOCAL_HEADER - 4)
                lengths = file.read(4)
                name, extra = (int.from_bytes(lengths[i : i + 2], "little") for i in (0, 2))
                starts.add(member.header_offset + LOCAL_HEADER + name + extra)
    return starts
