"""The tensors of a published folder, whichever of its files they stand in: safetensors, else PyTorch's pickled ones."""

import re
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from deepseek_jax.convert.pickles import PICKLED, read_pickle
from deepseek_jax.convert.safetensors import INDEX, LONGEST_NAME, SINGLE, CheckpointError, Entry, load_json, read_header
from deepseek_jax.notes import cut, note, shown
from deepseek_jax.small_files import LARGE

SHARD = re.compile(r"model-\d+-of-\d+\.safetensors")
MOST_NAMED = 5


def model_files(folder: Path) -> tuple[list[Path], bool]:
    """A folder's files that are the model, and whether an index lists them; pickled ones where there are no others.

    A note names the other files with weights. Raises CheckpointError where there are none.
    """
    files, single, pickled = sorted(folder.glob("*.safetensors")), folder / SINGLE, sorted(folder.glob(PICKLED))
    listed = set(read_index(folder / INDEX).values()) if (folder / INDEX).exists() else set()
    indexed = bool(listed) and (SINGLE in listed or not single.is_file())
    taken = [single] if single.is_file() else [file for file in files if SHARD.fullmatch(file.name)] or files
    if indexed:
        taken = [file for file in files if file.name in listed]
    elif not files and pickled:
        whole = [file for file in pickled if file.stem == "pytorch_model"]
        return whole or pickled, False
    elif not files:
        raise CheckpointError(f"{folder} holds no .safetensors file.")
    others = [file.name for file in [*files, *pickled] if file not in taken]
    if others:
        model = taken[0].name if len(taken) == 1 else f"what {INDEX} lists" if indexed else "model-*.safetensors"
        more = f" and {len(others) - MOST_NAMED} more" if len(others) > MOST_NAMED else ""
        note(f"{folder}: {model} is the model; {', '.join(others[:MOST_NAMED])}{more} beside it: left out.")
    return taken, indexed


def read_index(path: Path) -> dict[str, str]:
    """Tensor -> file name of an index. Raises CheckpointError for one that is damaged or leads out of its folder."""
    found = load_json(path, LARGE).get("weight_map")
    if not isinstance(found, dict) or not found:
        raise CheckpointError(f"{path} has no weight_map.")
    for name, file in found.items():
        if not isinstance(file, str) or Path(file).name != file or len(file) > LONGEST_NAME:
            raise CheckpointError(f"{path}: {cut(name)} is mapped to {shown(file)}, which is no file name.")
    return found


def stored_names(folder: Path) -> list[str]:
    """The names of a folder's tensors: of its index where it has one, else of its files' headers.

    Raises CheckpointError as `Checkpoint` does.
    """
    files, indexed = model_files(folder)
    if indexed:
        return list(read_index(folder / INDEX))
    return [name for file in files for name in entries_of(file)]


def entries_of(file: Path) -> dict[str, Entry]:
    """The tensors of a file of either kind. Raises CheckpointError as `read_header` and `read_pickle` do."""
    return read_pickle(file) if file.suffix == ".bin" else read_header(file)[0]


class Checkpoint:
    """The tensors of a folder, as they are named in its files.

    The files are those that transformers takes: ``model.safetensors``, else what ``model.safetensors.index.json``
    lists. Without either, the files ``model-00001-of-0000N.safetensors``, else all
    ``*.safetensors``, else ``pytorch_model*.bin``. A note names other files with weights.

    ``entries``: name -> `Entry`, of those names that ``wanted`` accepts; with an index, only their files have to
    be there. Raises CheckpointError if the folder has no such file, if the index and the files disagree, or if two
    files hold a tensor of one name. ``block``: the rows and columns of its FP8 blocks.
    """

    def __init__(self, folder: str | Path, wanted: Callable[[str], bool] = lambda name: True, block=None):
        self.folder, self.wanted, self.block = Path(folder), wanted, block
        if not self.folder.is_dir():
            raise CheckpointError(f"{self.folder} is not a folder.")
        files, self.indexed = model_files(self.folder)
        self.map = self._indexed() if self.indexed else {}
        self.entries: dict[str, Entry] = {}
        for file in sorted({self.folder / file for file in self.map.values()}) if self.indexed else files:
            for name, entry in entries_of(file).items():
                if name in self.entries:
                    raise CheckpointError(f"{name} stands in both {self.entries[name].file} and {file}.")
                if wanted(name):
                    self.entries[name] = entry
        if self.indexed:
            self._check_index()

    def _indexed(self) -> dict[str, str]:
        path = self.folder / INDEX
        found = {name: file for name, file in read_index(path).items() if self.wanted(name)}
        for name, file in found.items():
            name = cut(name)
            if not (self.folder / file).is_file():
                raise CheckpointError(f"{self.folder / file} does not exist, but {path} has {name} in it.")
        return found

    def _check_index(self) -> None:
        path = self.folder / INDEX
        for name, file in self.map.items():
            if name not in self.entries:
                raise CheckpointError(f"{self.folder / file} lacks {cut(name)}, which {path} has in it.")
            if self.entries[name].file.name != file:
                name = cut(name)
                raise CheckpointError(f"{path} has {name} in {file}, but it stands in {self.entries[name].file}.")
        for name, entry in self.entries.items():
            if name not in self.map:
                raise CheckpointError(f"{entry.file} holds {cut(name)}, which {path} does not list.")

    def read(self, name: str) -> np.ndarray:
        return self.entries[name].read()

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)
